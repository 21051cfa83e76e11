"""The quantiser against a slow numpy version; its gradients, start and revival; two processes."""
import copy
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conftest import Precision
from quantize import (VectorQuantizer, code_use, count_codes, hold_statistics, make_quantizer,
                      move_statistics, perplexity)

def started(num_codes=8, dim=4, **kwargs):
    """A quantiser whose codes are random and equally used, so that nothing is revived."""
    q = VectorQuantizer(num_codes, dim, **kwargs)
    q.codebook.copy_(torch.randn(num_codes, dim))
    q.cluster_size.fill_(1)
    q.embed_sum.copy_(q.codebook)
    return q

def numpy_step(z, codebook, size, total, decay, eps):
    """One EMA step, van den Oord et al. 2017 appendix A.1, with loops."""
    K = len(codebook)
    counts = np.zeros(K)
    sums = np.zeros_like(codebook)
    chosen = []
    for v in z:
        k = int(np.argmin([((v - c) ** 2).sum() for c in codebook]))
        counts[k] += 1
        sums[k] += v
        chosen.append(k)
    size = decay * size + (1 - decay) * counts
    total = decay * total + (1 - decay) * sums
    smoothed = (size + eps) / (size.sum() + K * eps) * size.sum()
    return chosen, size, total, total / smoothed[:, None]

def test_ema_equals_numpy_over_steps():
    torch.manual_seed(0)
    q = started(decay=0.9).train()
    size, total, codebook = (t.double().numpy().copy() for t in (q.cluster_size, q.embed_sum, q.codebook))
    for _ in range(5):
        z = torch.randn(2, 4, 3, 2, 2)
        flat = z.movedim(1, -1).reshape(-1, 4).double().numpy()
        z_q, indices, commit = q(z)
        chosen, size, total, new = numpy_step(flat, codebook, size, total, 0.9, 1e-5)
        assert indices.flatten().tolist() == chosen
        codebook = new
        np.testing.assert_allclose(q.codebook.numpy(), codebook, atol=1e-5)
        np.testing.assert_allclose(q.cluster_size.numpy(), size, atol=1e-5)
        np.testing.assert_allclose(commit.item(), ((flat - codebook[chosen]) ** 2).mean(), rtol=1e-4)

def test_gradient_is_straight_through_and_commit_reaches_only_z():
    q = started().eval()
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    z_q, _, commit = q(z)
    weight = torch.randn_like(z_q)
    assert torch.equal(torch.autograd.grad((z_q * weight).sum(), z, retain_graph=True)[0], weight)
    code = z_q.detach()
    torch.testing.assert_close(torch.autograd.grad(commit, z)[0], 2 * (z - code).detach() / z.numel())
    assert not q.codebook.requires_grad

@pytest.mark.parametrize('training, update', [(False, True), (True, False)])
def test_nothing_is_written_in_eval_or_without_update(training, update):
    q = started().train(training)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(torch.randn(4, 4, 5), update=update)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())

def test_indices_round_trip_to_z_q():
    q = started().eval()
    z_q, indices, _ = q(torch.randn(2, 4, 3, 5, 2))
    assert indices.shape == (2, 3, 5, 2) and indices.dtype == torch.int64
    torch.testing.assert_close(q.lookup(indices), z_q)
    assert torch.equal(q.nearest_indices(q.lookup(indices)), indices)

def test_first_batches_fill_the_codebook_with_their_vectors():
    torch.manual_seed(0)
    q = VectorQuantizer(50, 3).train()
    batches = [torch.randn(1, 3, 20) + 10 for _ in range(3)]
    seen = torch.cat([b[0].T for b in batches])
    for n, batch in enumerate(batches):
        q.revive_dead(batch[0].T)
        filled = q.codebook[q.codebook.abs().sum(1) > 0]
        assert len(filled) == min(50, 20 * (n + 1))
        assert (filled[:, None] == seen).all(2).any(1).all()
    assert len(torch.unique(q.codebook, dim=0)) == 50

def test_dead_codes_are_revived_and_all_are_used():
    """Half the codes are put out of reach; after a few hundred steps every code is used again."""
    torch.manual_seed(0)
    q = started(32, 4).train()
    q.codebook[16:] += 1000
    q.embed_sum.copy_(q.codebook)
    for _ in range(600):
        q(torch.randn(4, 4, 64))
    assert (q.cluster_size > 0.1 * q.cluster_size.mean()).all()
    assert q.codebook.abs().max() < 10

def test_unused_codes_stay_put_in_the_first_ema_step():
    torch.manual_seed(0)
    q = started(16, 4).train()
    q.codebook[8:] += 100
    q.embed_sum.copy_(q.codebook)
    far = q.codebook[8:].clone()
    q(torch.randn(1, 4, 64))
    torch.testing.assert_close(q.codebook[8:], far, rtol=1e-3, atol=0)

def test_perplexity_is_K_when_uniform_and_1_when_collapsed():
    q = started(16, 4)
    assert q.perplexity().item() == pytest.approx(16, rel=1e-5)
    q.cluster_size.zero_()
    q.cluster_size[3] = 7
    assert q.perplexity().item() == pytest.approx(1, rel=1e-5)

def test_distances_do_not_follow_autocast():
    """Codes closer together than bf16 can tell apart are still told apart."""
    q = started(2, 2).eval()
    q.codebook.copy_(torch.tensor([[100.0, 0.0], [100.1, 0.0]]))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        indices = q(torch.tensor([[100.0, 0.0], [100.1, 0.0]])[:, :, None])[1]
    assert indices.flatten().tolist() == [0, 1]

def test_the_code_search_keeps_full_float32(tf32_allowed):
    """With TF32, up to 58 % of the codes differ where they lie close around a mean."""
    q = started()
    z = torch.randn(2, 4, 3, 3)
    with Precision() as precision:
        q(z)
        q.nearest_indices(z)
    assert precision.allowed == [False, False]

# ---------------------------------------------------------------- use of the codes

def test_perplexity_of_a_step_cannot_exceed_its_distinct_vectors():
    """Revived codes are given the mean use: the codebook's own average would say 244 of 256."""
    torch.manual_seed(0)
    q = VectorQuantizer(256, 4).train()
    z = torch.randn(1, 4, 16).repeat(1, 1, 20)
    for _ in range(20):
        q(z)
    assert perplexity(q.step_counts) <= 16 + 1e-3
    assert q.perplexity() > 100

def test_codes_are_counted_apart_for_brain_and_background():
    x = torch.zeros(1, 1, 4, 4, 4)
    x[..., 2:] = 1.0
    tokens = torch.arange(8).view(1, 2, 2, 2) // 2 * 2 + torch.tensor([0, 9])  # even: background, odd: brain
    counts = count_codes(tokens, x, 20)
    assert counts.shape == (2, 1, 20)
    assert counts[0, 0].nonzero().flatten().tolist() == [0, 2, 4, 6]
    assert counts[1, 0].nonzero().flatten().tolist() == [9, 11, 13, 15]
    use = code_use(counts)
    assert use['codes_used'] == 8 and use['codes_used_brain'] == 4 and use['codes_used_background'] == 4
    assert use['perplexity'] == pytest.approx(8) and use['perplexity_brain'] == pytest.approx(4)

def test_use_of_several_codebooks_is_their_mean():
    x = torch.ones(1, 1, 4, 4, 4)
    tokens = torch.stack([torch.zeros(2, 2, 2, dtype=torch.int64), torch.arange(8).view(2, 2, 2)])[None]
    use = code_use(count_codes(tokens, x, 20, num_codebooks=2))
    assert use['codes_used'] == (1 + 8) / 2 and use['perplexity'] == pytest.approx((1 + 8) / 2)

# ---------------------------------------------------------------- micro-steps and processes

@pytest.mark.parametrize('kind', [dict(), dict(num_codebooks=2), dict(quantizer='fsq')])
def test_held_micro_steps_move_the_codes_as_one_batch(kind):
    torch.manual_seed(0)
    z = torch.randn(4, 4, 6)
    one = make_quantizer(16, 4, decay=0.5, **kind).train()
    one(torch.randn(8, 4, 6))
    hold_statistics(one)
    two = copy.deepcopy(one)
    one(z)
    assert move_statistics(one)
    for part in z.split(2):
        two(part)
    assert move_statistics(two) and not move_statistics(two)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, rtol=0, atol=1e-5)

def test_codes_revived_in_a_micro_step_start_at_the_mean_use_of_a_step():
    """At that of the micro-step, they would count as dead again from ten micro-steps on."""
    torch.manual_seed(0)
    quantizer = make_quantizer(16, 4).train()
    hold_statistics(quantizer, 20)
    for _ in range(20):
        quantizer(torch.randn(2, 4, 16))
    assert move_statistics(quantizer)
    assert quantizer.cluster_size.mean().item() == pytest.approx(20 * 32 / 16)

def test_wrong_channels_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match='4.*5'):
        started()(torch.randn(1, 5, 2))

def one_of_two(rank, folder, parts):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29511')
    dist.init_process_group('gloo', rank=rank, world_size=2, init_method=f'file://{folder}/meet')
    q = VectorQuantizer(40, 4, decay=0.9).train()
    for step, batch in enumerate(parts):
        torch.manual_seed(step + 1000 * rank)  # another trainer may seed by rank
        q(batch[rank])
    torch.save(q.state_dict(), f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_have_the_codebook_of_one(tmp_path):
    """Start, EMA and revival; the processes' batches differ in size and in where their vectors lie."""
    torch.manual_seed(0)
    parts = [(torch.randn(1, 4, 15) + 5, torch.randn(1, 4, 11) - 5) for _ in range(6)]
    mp.spawn(one_of_two, (str(tmp_path), parts), nprocs=2)
    a, b = (torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in (0, 1))
    q = VectorQuantizer(40, 4, decay=0.9).train()
    for step, batch in enumerate(parts):
        torch.manual_seed(step)
        q(torch.cat(batch, 2))
    for k, v in q.state_dict().items():
        torch.testing.assert_close(a[k], v, rtol=0, atol=1e-5)
        torch.testing.assert_close(b[k], v, rtol=0, atol=1e-5)

# ---------------------------------------------------------------- several codebooks

@pytest.mark.parametrize('codebooks', ['residual', 'split'])
def test_several_codebooks_round_trip_and_pass_the_gradient_straight_through(codebooks):
    torch.manual_seed(0)
    q = make_quantizer(8, 6, num_codebooks=3, codebooks=codebooks).train()
    z = torch.randn(4, 6, 3, 3, 3, requires_grad=True)
    for _ in range(3):
        q(z.detach())
    q.eval()
    z_q, indices, commit = q(z)
    assert indices.shape == (4, 3, 3, 3, 3) and 0 <= indices.min() and indices.max() < 8
    assert torch.equal(indices, q.nearest_indices(z))
    torch.testing.assert_close(z_q, q.lookup(indices))
    (3 * z_q.sum()).backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 3.0))
    assert commit > 0 and 1 <= q.perplexity() <= 8

def trained_on(z, codebooks):
    """A quantiser of two codebooks after twenty steps on z."""
    torch.manual_seed(0)
    q = make_quantizer(8, 4, num_codebooks=2, codebooks=codebooks).train()
    for _ in range(20):
        q(z)
    return q.eval()

def coded(q, z):
    return q.lookup(q.nearest_indices(z))

def test_a_residual_codebook_starts_on_what_is_left_and_not_on_zeros():
    """Tokens on which the first codebook has just begun leave nothing."""
    torch.manual_seed(0)
    q = make_quantizer(64, 4, num_codebooks=3).train()
    hold_statistics(q)
    for _ in range(12):
        q(torch.randn(1, 4, 100))
        move_statistics(q)
    for part in q.parts:
        assert len(part.codebook.unique(dim=0)) == 64

def test_residual_codebooks_may_be_of_any_number():
    """Four channels make two or four equal parts, not three."""
    q = make_quantizer(8, 4, num_codebooks=3).train()
    _, indices, _ = q(torch.randn(2, 4, 5))
    assert indices.shape == (2, 3, 5) and q.nearest_indices(torch.randn(2, 4, 5)).shape == (2, 3, 5)

def test_residual_codebooks_code_what_is_left():
    z = torch.randn(64, 4, 2, 2, 2)
    q = trained_on(z, 'residual')
    first = coded(q.parts[0], z)
    second = coded(q.parts[1], z - first)
    torch.testing.assert_close(coded(q, z), first + second)
    assert (z - first - second).square().mean() < 0.8 * (z - first).square().mean()

def test_split_codebooks_code_their_channels():
    z = torch.randn(64, 4, 2, 2, 2)
    q = trained_on(z, 'split')
    torch.testing.assert_close(coded(q, z)[:, :2], coded(q.parts[0], z[:, :2]))
    torch.testing.assert_close(coded(q, z)[:, 2:], coded(q.parts[1], z[:, 2:]))

def test_one_codebook_is_the_plain_quantiser():
    assert type(make_quantizer(8, 4)) is VectorQuantizer
    for bad in (dict(num_codebooks=3, codebooks='split'), dict(num_codebooks=2, codebooks='product')):
        with pytest.raises(ValueError):
            make_quantizer(8, 4, **bad)

# ---------------------------------------------------------------- the control without a codebook

def test_finite_scalars_are_the_papers_formula_and_every_code_can_be_had():
    torch.manual_seed(0)
    q = make_quantizer(256, 3, quantizer='fsq').eval()
    z = 1.5 * torch.randn(4, 3, 16, 15, 14)
    levels = np.array([8, 8, 4])
    assert q.levels.tolist() == levels.tolist()
    torch.nn.init.eye_(q.down.weight)
    torch.nn.init.zeros_(q.down.bias)
    z_q, indices, commit = q(z)
    reach = (levels - 1) * 1.001 / 2  # Mentzer et al. 2023, the levels all even
    rounded = np.round(np.tanh(z.movedim(1, -1).numpy() + np.arctanh(0.5 / reach)) * reach - 0.5)
    assert np.array_equal(indices, ((rounded + levels // 2) * [1, 8, 64]).sum(-1))
    assert len(indices.unique()) == 256 and commit == 0
    scaled = torch.tensor(rounded / (levels / 2), dtype=torch.float32)
    torch.testing.assert_close(z_q, q.up(scaled).movedim(-1, 1))
    assert torch.equal(indices, q.nearest_indices(z))
    torch.testing.assert_close(q.lookup(indices), z_q)

@pytest.mark.parametrize('bits', range(2, 17))
def test_finite_scalars_have_as_many_codes_as_asked(bits):
    assert make_quantizer(2 ** bits, 3, quantizer='fsq').levels.prod() == 2 ** bits

def test_the_gradient_of_finite_scalars_passes_the_rounding_alone():
    torch.manual_seed(0)
    q = make_quantizer(64, 5, quantizer='fsq')
    z = torch.randn(2, 5, 3, 3, 3, requires_grad=True)
    weight = torch.randn(2, 5, 3, 3, 3)
    through = torch.autograd.grad((q(z)[0] * weight).sum(), z)[0]
    smooth = q.up(2 * q.bound(z) / q.levels).movedim(-1, 1)
    torch.testing.assert_close(through, torch.autograd.grad((smooth * weight).sum(), z)[0])

def test_finite_scalars_count_codes_in_training_alone():
    q = make_quantizer(16, 2, decay=0.5, quantizer='fsq')
    z = 3 * torch.randn(64, 2, 2, 2, 2)
    q.eval()(z)
    q.train()(z, update=False)
    assert q.cluster_size.sum() == 0
    indices = q(z)[1]
    counts = torch.bincount(indices.flatten(), minlength=16)
    torch.testing.assert_close(q.cluster_size, counts / 2)
    p = counts[counts > 0] / counts.sum()
    torch.testing.assert_close(q.perplexity(), torch.exp(-(p * p.log()).sum()))

def test_settings_that_make_no_finite_scalars_are_refused():
    for bad in (dict(num_codes=24), dict(num_codes=2), dict(num_codes=16, num_codebooks=2)):
        with pytest.raises(ValueError, match='fsq'):
            make_quantizer(**{'dim': 2, 'quantizer': 'fsq'} | bad)
    with pytest.raises(ValueError, match='ema or fsq'):
        make_quantizer(16, 2, quantizer='vq')
