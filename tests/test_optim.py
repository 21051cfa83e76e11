"""Optimisers, the average of the weights, and gradients of two processes against those of one."""
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

from optim import MeanGradients, Muon, make_optimizers, orthogonal, take_step, update_average
from resume import load_parts

# ---------------------------------------------------------------- orthogonal steps

def test_a_muon_step_of_a_matrix_is_torchs():
    weights = torch.randn(24, 40)
    ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    optimizers = [Muon([ours], 0.01, 0.1),
                  torch.optim.Muon([theirs], 0.01, 0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')]
    for _ in range(3):
        gradient = torch.randn(24, 40)
        for weight, optimizer in zip((ours, theirs), optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (ours - weights).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved  # theirs works in bfloat16

@pytest.mark.parametrize('shape', [(16, 8, 3, 3, 3), (64, 8), (16, 500)])
def test_singular_values_of_an_orthogonal_step_are_near_1(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape).flatten(1)))
    assert values.min() > 0.6 and values.max() < 1.3

def newton_schulz(x):
    """Jordan et al. 2024, as written there, in float64."""
    x = x.double() / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x

@pytest.mark.parametrize('shape', [(16, 200), (40, 40), (50, 20)])
@pytest.mark.parametrize('smallest', [1.0, 1e-3, 1e-6])
def test_an_orthogonal_step_is_five_of_newton_and_schulz(shape, smallest):
    """Also of matrices whose singular values span six orders of magnitude."""
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u @ torch.logspace(0, math.log10(smallest), len(vt)).diag() @ vt
    wide = x if shape[0] <= shape[1] else x.T
    want = newton_schulz(wide)
    found = orthogonal(x[None])[0]
    error = (found if shape[0] <= shape[1] else found.T) - want
    assert error.norm() < 1e-3 * want.norm()

def test_the_memory_format_of_a_convolution_changes_nothing_in_its_step():
    stepped = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(16, 4, 3, 3, 3).to(memory_format=memory_format))
        weight.grad = torch.randn(16, 4, 3, 3, 3)
        Muon([weight], 0.01, 0.0).step()
        stepped.append(weight.detach())
    torch.testing.assert_close(*stepped)

# ---------------------------------------------------------------- steps and averages

def test_average_follows_weights_and_copies_buffers():
    a, b = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    torch.nn.init.constant_(b.weight, 3.0)
    b.running_mean.fill_(7)
    update_average(a, b, 0.75)
    assert a.weight.tolist() == [1.5] * 3 and a.running_mean.tolist() == [7] * 3

def test_a_step_has_its_rate_clips_and_forgets_the_gradients():
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    optimizer = torch.optim.SGD([weight], lr=7.0)
    assert take_step([optimizer], [weight], 0.5, 1.0).item() == 6
    torch.testing.assert_close(weight.detach(), torch.full((4,), -0.25))  # half of the unit vector
    assert weight.grad is None

@pytest.mark.parametrize('muon', [False, True])
def test_every_weight_has_one_optimiser(muon):
    net = nn.Sequential(nn.Conv3d(1, 16, 3), nn.GroupNorm(4, 16), nn.Conv3d(16, 1, 3))
    optimizers = make_optimizers(list(net.parameters()), muon, 0.1, (0.9, 0.99), 1e-8, 0.0)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [p for group in groups for p in group['params']]
    assert len(held) == 6 and set(held) == set(net.parameters())
    assert len(optimizers) == 1 + muon

def test_orthogonal_steps_without_a_weight_for_them_are_refused():
    with pytest.raises(SystemExit, match='no weight has 16 outputs'):
        make_optimizers(list(nn.Linear(3, 8).parameters()), True, 0.1, (0.9, 0.99), 1e-8, 0.0)

def moved(net, muon, lr=0.1, beta1=0.9, weight_decay=0.0):
    """Optimisers of a network after a step."""
    optimizers = make_optimizers(list(net.parameters()), muon, lr, (beta1, 0.99), 1e-8, weight_decay)
    net(torch.ones(1, 3)).sum().backward()
    take_step(optimizers, list(net.parameters()), lr, 0)
    return optimizers

def as_parts(net, optimizers):
    optimizer, muon = [*optimizers, None][:2]
    return {'model': net, 'optimizer': optimizer, 'muon': muon}

def states(parts):
    return {key: part.state_dict() if part else None for key, part in parts.items()}

def test_a_resumed_optimiser_knows_the_weights_and_keeps_its_own_settings():
    net, new = nn.Linear(3, 16), nn.Linear(3, 16)
    old = as_parts(net, moved(net, True))
    parts = as_parts(new, moved(new, True, beta1=0.5, weight_decay=0.3))
    load_parts(parts, states(old) | {'iter_num': 1}, 'ckpt.pt')
    assert torch.equal(new.weight, net.weight)
    assert parts['optimizer'].param_groups[0]['betas'] == (0.5, 0.99)
    assert parts['muon'].param_groups[0]['weight_decay'] == 0.3
    average = parts['muon'].state[new.weight]['average']
    assert torch.equal(average, old['muon'].state[net.weight]['average'])

@pytest.mark.parametrize('before', [False, True])
def test_a_run_does_not_change_its_optimisers_on_the_way(before):
    net = nn.Linear(3, 16)
    old = states(as_parts(net, moved(net, before)))
    with pytest.raises(SystemExit, match=f'ckpt.pt: a run {"with" if before else "without"} muon'):
        load_parts(as_parts(net, moved(net, not before)), old, 'ckpt.pt')

# ---------------------------------------------------------------- gradients of several processes

class Two(nn.Module):
    """A trunk, and a head that some steps leave out."""
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 1)

    def loss(self, x, with_head):
        h = self.trunk(x)
        return h.square().mean() + (self.head(h).mean() if with_head else 0)

def gradients_of(net, batches, with_head, mean=None):
    """{name: gradient} of the mean loss of micro-batches, the head being in the first alone."""
    net.zero_grad()
    for k, x in enumerate(batches):
        if mean and k == len(batches) - 1:
            mean.expect()
        (net.loss(x, with_head and k == 0) / len(batches)).backward()
    if mean:
        mean.finish()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

def one_of_two(rank, folder, data):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29517')
    dist.init_process_group('gloo', rank=rank, world_size=2, init_method=f'file://{folder}/meet')
    torch.manual_seed(0)
    net = Two()
    mean = MeanGradients(list(net.trunk.parameters()), list(net.head.parameters()), mib=1e-4)
    steps = [gradients_of(net, batches[rank], with_head, mean) for with_head, batches in data]
    torch.save(steps, f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Several micro-batches to a step, and steps with and without the head."""
    torch.manual_seed(1)
    data = []
    for with_head in (True, False, True):
        ranks = torch.randn(2, 3, 5, 6)
        data.append((with_head, [batches.unbind() for batches in ranks]))
    mp.spawn(one_of_two, (str(tmp_path), data), nprocs=2)
    a, b = (torch.load(tmp_path / f'rank{rank}.pt', weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)
    net = Two()
    for (with_head, batches), first, second in zip(data, a, b):
        joined = [torch.cat(pair) for pair in zip(*batches)]
        want = gradients_of(net, joined, with_head)
        assert ('head.weight' in want) == with_head
        assert want.keys() == first.keys() == second.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(first[name], gradient)
            assert torch.equal(first[name], second[name])

@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group('gloo', rank=0, world_size=1, init_method=f'file://{tmp_path}/meet')
    yield
    dist.destroy_process_group()

def test_gradients_are_sent_while_the_backward_pass_still_computes(group):
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(4)])
    mean = MeanGradients(list(net.parameters()), mib=1e-9)
    on_the_way = []
    x = torch.randn(2, 4, requires_grad=True)
    x.register_hook(lambda grad: on_the_way.append(len(mean.sent)))  # the last gradient of all
    mean.expect()
    net(x).sum().backward()
    assert on_the_way == [3] and len(mean.sent) == 4

def test_a_gradient_that_comes_twice_is_an_error(group):
    net = nn.Linear(4, 4)
    mean = MeanGradients(list(net.parameters()))
    mean.expect()
    net(torch.ones(1, 4)).sum().backward()
    with pytest.raises(KeyError):
        net(torch.ones(1, 4)).sum().backward()

def test_a_process_alone_sends_nothing():
    net = nn.Linear(4, 4)
    mean = MeanGradients(list(net.parameters()))
    mean.expect()
    net(torch.ones(1, 4)).sum().backward()
    mean.finish()
    assert not mean.buckets and net.weight.grad is not None
