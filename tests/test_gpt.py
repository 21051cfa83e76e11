"""GPT, its tokens and its draws; train_gpt.py and sample.py on tokens as a user runs them."""
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import load_checkpoint, save_checkpoint
from conftest import make_tiny_data, play, refuses, step_bytes
from data import Sessions
from judge import cost
from latents import encode_conditions
from model import GPT, GPTConfig, NeuroQuant, NeuroQuantConfig, from_checkpoint, model_args
from test_train import assert_same_tensors, log_of, training_lines
from tokens import Tokens, baseline_bits, choose_tokens, draw_brains, draw_tokens

SMALL = dict(grid=(2, 3, 2), num_codes=16, layers=2, heads=2, width=16)

def make_gpt(**changes):
    """A small network in eval mode, nothing in which is zero or one."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SMALL | changes))
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return gpt.eval()

KINDS = {'tied': {}, 'codebooks': dict(num_codebooks=2, tied=False),
         'conditions': dict(classes=(3,), vectors=(2,))}

@pytest.fixture(params=list(KINDS))
def gpt(request):
    return make_gpt(**KINDS[request.param])

def some_tokens(gpt, rows=3):
    g = torch.Generator().manual_seed(1)
    return torch.randint(gpt.config.num_codes, (rows, gpt.length), generator=g)

# ---------------------------------------------------------------- the network

def test_a_later_token_changes_no_earlier_logit(gpt):
    tokens = some_tokens(gpt)
    before = gpt(tokens[:, :-1])
    assert before.shape == (3, gpt.length, 16)
    for k in range(gpt.length - 1):
        other = tokens.clone()
        other[:, k] = (other[:, k] + 1) % 16
        change = (gpt(other[:, :-1]) - before).abs().amax((0, 2))
        assert change[:k + 1].max() == 0 and change[k + 1] > 1e-3

def test_logits_from_a_cache_are_those_without(gpt):
    tokens = some_tokens(gpt)
    for begun in (0, 5):  # tokens of the first call
        cache = gpt.new_cache(len(tokens))
        logits = [gpt(tokens[:, :begun], None, cache)]
        for k in range(begun, gpt.length - 1):
            logits.append(gpt(tokens[:, k:k + 1], None, cache, seen=k + 1))
        torch.testing.assert_close(torch.cat(logits, 1), gpt(tokens[:, :-1]), atol=1e-5, rtol=1e-5)

def test_two_places_of_one_code_differ():
    """Positions count: alike tokens in every place do not give alike logits."""
    gpt = make_gpt()
    logits = gpt(torch.full((1, gpt.length - 1), 3))[0]
    assert torch.pdist(logits).min() > 1e-3

def test_dropped_conditions_are_no_conditions():
    gpt = make_gpt(**KINDS['conditions'])
    tokens = some_tokens(gpt, 2)[:, :-1]
    cond = encode_conditions([{}, {'sex': 'F', 'age': 40.0}], ('sex', 'age'), ('T1w',))
    dropped, known = gpt(tokens, cond)
    unconditional = gpt(tokens)
    torch.testing.assert_close(dropped, unconditional[0], atol=1e-5, rtol=1e-5)
    assert (known - unconditional[1]).abs().max() > 1e-3

def test_a_checkpoint_builds_the_same_network(gpt):
    again = from_checkpoint({'model_args': model_args(gpt), 'model': gpt.state_dict()})
    tokens = some_tokens(gpt)[:, :-1]
    assert again.config == gpt.config and torch.equal(again(tokens), gpt(tokens))

def test_the_first_loss_is_that_of_uniform_codes():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SMALL)).eval()
    tokens = some_tokens(gpt, 50)
    loss = F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(16), rel=0.01)

# ---------------------------------------------------------------- likelihood

class Markov:
    """A chain of 6 codes that begins anywhere."""
    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.step = self.rng.dirichlet([0.3] * 6, 6)

    def draw(self, rows, length):
        tokens = self.rng.integers(6, size=(rows, 1))
        while tokens.shape[1] < length:
            below = self.step[tokens[:, -1]].cumsum(1)
            new = (below < self.rng.random((rows, 1))).sum(1).clip(max=5)
            tokens = np.concatenate([tokens, new[:, None]], 1)
        return torch.from_numpy(tokens)

    def bits(self, length):
        """Entropy per token of so many."""
        p, total = np.full(6, 1 / 6), math.log2(6)
        surprise = -(self.step * np.log2(self.step)).sum(1)
        for _ in range(length - 1):
            total += p @ surprise
            p = p @ self.step
        return total / length

def test_held_out_bits_of_a_markov_chain_are_its_entropy():
    torch.manual_seed(0)
    chain = Markov()
    gpt = GPT(GPTConfig(grid=(2, 2, 3), num_codes=6, layers=2, heads=2, width=32))
    optimizer = torch.optim.Adam(gpt.parameters(), lr=5e-3)
    def loss_of(tokens):
        return F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens.flatten())
    for step in range(300):
        optimizer.param_groups[0]['lr'] = 5e-3 * (1 - step / 300)
        loss_of(chain.draw(32, gpt.length)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        bits = loss_of(chain.draw(8000, gpt.length)).item() / math.log(2)
    assert bits == pytest.approx(chain.bits(gpt.length), rel=0.02)

def test_baselines_are_those_counted_by_hand():
    train = torch.tensor([[0, 1], [0, 1], [0, 2]])
    bits = baseline_bits(train, torch.tensor([[0, 3]]), 4)
    assert bits['uniform'] == [2]
    assert bits['unigram'] == [pytest.approx(-(math.log2(4 / 10) + math.log2(1 / 10)) / 2)]
    first = (3 + 1 * 0.4) / 4   # one code was seen there
    second = (0 + 2 * 0.1) / 5  # two were
    assert bits['position'] == [pytest.approx(-(math.log2(first) + math.log2(second)) / 2)]

# ---------------------------------------------------------------- draws

def test_codes_are_drawn_as_often_as_they_are_likely():
    logits = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chances = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    for top_k in (0, 3):
        counts = choose_tokens(logits.expand(1000, 8), chances, top_k).flatten().bincount(minlength=8) / 1000
        expected = logits[0].softmax(0)
        if top_k:
            expected = torch.where(expected >= expected.topk(3).values[-1], expected, 0.0)
        torch.testing.assert_close(counts.double(), expected / expected.sum(), atol=0.002, rtol=0)

def test_a_brain_depends_on_its_seed_and_number_alone(gpt):
    def drawn(n, seed=0):
        return torch.cat(list(draw_brains(gpt, n, seed, 'cpu')))
    ten = drawn(10)
    assert ten.shape == (10, gpt.length) and len(ten.unique(dim=0)) == 10
    for n in (1, 3, 9):
        assert torch.equal(drawn(n), ten[:n])
    assert not torch.equal(drawn(3, seed=1), ten[:3])

def test_a_brain_is_the_same_in_any_batch(gpt):
    chances = torch.rand(5, gpt.length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = [draw_tokens(gpt, row[None]) for row in chances]
    assert torch.equal(torch.cat(alone), draw_tokens(gpt, chances))

def test_guidance_moves_from_no_conditions_to_the_conditions_and_beyond():
    gpt = make_gpt(**KINDS['conditions'])
    torch.nn.init.normal_(gpt.class_embeddings[0].weight, std=10.0)
    cond = encode_conditions([{'sex': 'M', 'age': 70.0}], ('sex', 'age'), ('T1w',))
    chances = torch.rand(4, gpt.length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without, plain = draw_tokens(gpt, chances), draw_tokens(gpt, chances, cond)
    assert torch.equal(draw_tokens(gpt, chances, cond, guidance=0.0), without)
    assert not torch.equal(plain, without)
    assert not torch.equal(draw_tokens(gpt, chances, cond, guidance=3.0), plain)

def test_kept_tokens_stay_and_the_others_follow_them():
    gpt = make_gpt()
    chances = torch.rand(6, gpt.length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = torch.full((2, gpt.length), -1)
    kept[0, :6], kept[1, :6] = 2, 9
    first, second = (draw_tokens(gpt, chances, kept=row) for row in kept)
    assert (first[:, :6] == 2).all() and (second[:, :6] == 9).all()
    assert not torch.equal(first[:, 6:], second[:, 6:])

# ---------------------------------------------------------------- training

TRAIN = ['--layers=1', '--heads=2', '--width=16', '--batch_size=2', '--iters=4', '--warmup_iters=1',
         '--lr=0.01', '--log_interval=1', '--eval_interval=2', '--device=cpu']

@torch.no_grad()
def write_vae(data, folder, num_codebooks=1):
    """Checkpoint of a NeuroQuant of random weights, whose codes are what it says of some places."""
    torch.manual_seed(0)
    vae = NeuroQuant(NeuroQuantConfig(widths=(8, 8, 8, 8), anat_dim=8, mod_dim=4, modality_dim=4,
                                      num_codes=16, num_codebooks=num_codebooks))
    vae.mod_weight.fill_(1.0)
    sessions = Sessions(data, ('T1w', 'T2w'), 'train')
    places = []
    for i, m in sessions.scans:
        places.append(vae.encode(torch.tensor(sessions.volume(i, m))[None, None])[0].flatten(2)[0].T)
    places = torch.cat(places)
    codes = places[torch.randperm(len(places))[:16]]
    if num_codebooks == 1:
        vae.quantizer.codebook.copy_(codes)
    else:
        for k, part in enumerate(vae.quantizer.parts):
            part.codebook.copy_(codes if k == 0 else 0.3 * codes.roll(1, 0))
    folder.mkdir()
    save_checkpoint(folder / 'ckpt.pt', {
        'model_args': model_args(vae), 'model': vae.state_dict(), 'ema': None, 'iter_num': 0,
        'git_commit': '',
        'config': {'modalities': ('T1w', 'T2w'), 'data_dir': str(data)}, 'data': sessions.box,
        'voxel_mm': sessions.voxel_mm})

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder with data, a NeuroQuant in vae/ and a GPT on its tokens in gpt/; not to be changed."""
    folder = tmp_path_factory.mktemp('run')
    make_tiny_data(folder / 'data')
    write_vae(folder / 'data', folder / 'vae')
    train(folder, folder / 'gpt')
    return folder

def train(run, out, *args):
    play('train_gpt.py', *TRAIN, f'--vae={run}/vae/ckpt.pt', f'--out_dir={out}', *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def load(run, name):
    return from_checkpoint(load_checkpoint(run / name / 'ckpt.pt'))

def test_training_tokens_are_those_of_the_encoder(run):
    vae = load(run, 'vae')
    latents = run / 'vae' / 'latents_data'
    train_set = Tokens(vae.quantizer, 'cpu', latents, run / 'data', ('T1w', 'T2w'), 'train', ())
    assert train_set.tokens.shape == (14, 12)
    same = 0
    for k, (row, m) in enumerate(train_set.scans):
        x = torch.tensor(np.load(run / 'data' / row[('T1w', 'T2w')[m]]))[None, None]
        with torch.no_grad():
            same += (vae.tokens(x).flatten() == train_set.tokens[k]).sum().item()
    assert same >= 0.98 * 14 * 12  # latents are stored in float16

def test_evaluation_prints_the_held_out_bits_of_a_gpt(run, tmp_path):
    play('evaluate.py', f'--ckpt={run}/vae/ckpt.pt', f'--gpt={run}/gpt/ckpt.pt', '--reference_sessions=0',
         f'--out_dir={tmp_path}')
    row, = json.loads((tmp_path / 'table.json').read_text())['bits']
    vae, gpt = load(run, 'vae'), load(run, 'gpt')
    source = vae.quantizer, 'cpu', run / 'vae' / 'latents_data', run / 'data', ('T1w', 'T2w')
    judged = Tokens(*source, 'test', ())
    want = []
    for tokens in judged.tokens:
        want.append(F.cross_entropy(gpt(tokens[None, :-1])[0], tokens).item() / math.log(2))
    assert row['bits']['n_sessions'] == judged.n
    assert row['uniform'] == pytest.approx(math.log2(gpt.config.num_codes))
    by_subject = {}
    for (scan, _), bits in zip(judged.scans, want):
        by_subject.setdefault(scan['subject'], []).append(bits)
    assert row['bits']['mean'] == pytest.approx(np.mean([np.mean(v) for v in by_subject.values()]), rel=1e-4)

def test_bits_of_another_autoencoders_gpt_are_refused(run, tmp_path):
    checkpoint = load_checkpoint(f'{run}/gpt/ckpt.pt') | {'encoder_hash': 'another'}
    save_checkpoint(tmp_path / 'gpt.pt', checkpoint)
    line = refuses('evaluate.py', f'--ckpt={run}/vae/ckpt.pt', f'--gpt={tmp_path}/gpt.pt',
                   '--reference_sessions=0', f'--out_dir={tmp_path}')
    assert 'another autoencoder' in line

def test_training_says_what_a_step_holds(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, 'step_bytes', step_bytes)
    printed = play('train_gpt.py', *TRAIN, f'--vae={run}/vae/ckpt.pt', f'--out_dir={tmp_path}',
                   '--max_iters=1')
    line, = [line for line in printed.splitlines() if 'memory of a training step' in line]
    assert 'not known' not in line

def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    train(run, tmp_path / 'b', '--max_iters=2')
    parts = train(run, tmp_path / 'b', '--init_from=resume')
    assert_same_tensors(load_checkpoint(run / 'gpt' / 'ckpt.pt'), parts)
    assert training_lines(run / 'gpt') == training_lines(tmp_path / 'b')

def test_validation_stands_beside_its_baselines(run):
    line = log_of(run / 'gpt')[-1]
    assert line['val/uniform'] == 4 and 0 < line['val/position'] and 0 < line['val/bits'] < 8

def test_two_processes_see_the_batch_of_one(run):
    vae = load(run, 'vae')
    folders = run / 'vae' / 'latents_data', run / 'data'
    source = vae.quantizer, 'cpu', *folders, ('T1w', 'T2w'), 'train', ('age',), 3
    whole = Tokens(*source).batch(2, 4, p_drop=0.5)
    halves = [Tokens(*source, rank, 2).batch(2, 2, p_drop=0.5) for rank in range(2)]
    assert torch.equal(whole['tokens'], torch.cat([half['tokens'] for half in halves]))
    ages = torch.cat([half['cond']['vectors'][0] for half in halves])
    assert torch.equal(whole['cond']['vectors'][0], ages) and 0 < ages[:, 1].sum() < 4

# ---------------------------------------------------------------- new brains, and halves of them

def drawing(gpt, out, *args, mode='generate'):
    return ['sample.py', f'--mode={mode}', f'--ckpt={gpt}/ckpt.pt', f'--output={out}', '--device=cpu', *args]

def volume(path):
    return nib.load(path).get_fdata(dtype=np.float32)

def codes_of(vae, latents):
    """latents.npy (n,C,d,h,w) -> indices (n,d,h,w)."""
    return vae.quantizer.nearest_indices(torch.from_numpy(np.load(latents)))

def test_generated_brains_are_decoded_in_every_modality(run, tmp_path):
    play(*drawing(run / 'gpt', tmp_path / 'two', '--n=2', '--temperature=2'))
    play(*drawing(run / 'gpt', tmp_path / 'one', '--n=1', '--temperature=2'))
    files = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert files == ['latents.npy', 'montage.png', 'nearest.md', 'sample_000_T1w.nii.gz',
                     'sample_000_T2w.nii.gz']
    vae = load(run, 'vae')
    tokens = codes_of(vae, tmp_path / 'two' / 'latents.npy')
    expected = next(draw_brains(load(run, 'gpt'), 2, 0, 'cpu', temperature=2.0))
    assert torch.equal(tokens[:1].flatten(1), expected)
    for name in ('T1w', 'T2w'):
        with torch.no_grad():
            x = vae.from_tokens(tokens[:1], name).clamp(0, 1)[0, 0]
        np.testing.assert_allclose(volume(tmp_path / 'two' / f'sample_000_{name}.nii.gz'), x, atol=1e-5)
        np.testing.assert_array_equal(volume(tmp_path / 'one' / f'sample_000_{name}.nii.gz'),
                                      volume(tmp_path / 'two' / f'sample_000_{name}.nii.gz'))

def test_a_completed_brain_keeps_the_first_half_of_its_tokens(run, tmp_path):
    scan = tmp_path / 'scan.nii.gz'
    array = np.load(run / 'data' / 'sub-10_ses-01_T1w.npy')
    nib.save(nib.Nifti1Image(array, np.eye(4)), scan)
    play(*drawing(run / 'gpt', tmp_path / 'out', f'--input={scan}', '--n=3', mode='complete'))
    play('sample.py', '--mode=tokens', f'--ckpt={run}/vae/ckpt.pt', f'--input={scan}',
         f'--output={tmp_path}/scan.npy', '--device=cpu')
    tokens = codes_of(load(run, 'vae'), tmp_path / 'out' / 'latents.npy').flatten(1)
    given = np.load(tmp_path / 'scan.npy').flatten()
    assert (tokens[:, :6].numpy() == given[:6]).all()
    assert len(tokens.unique(dim=0)) == 3

def test_residual_codebooks_are_drawn_and_decoded(run, tmp_path):
    write_vae(run / 'data', tmp_path / 'vae', num_codebooks=2)
    refusal = refuses('train_gpt.py', *TRAIN, f'--vae={tmp_path}/vae/ckpt.pt', f'--out_dir={tmp_path}/x')
    assert 'tied=False' in refusal
    train(tmp_path, tmp_path / 'gpt', '--tied=False')
    play(*drawing(tmp_path / 'gpt', tmp_path / 'out', '--n=1'))
    vae = load(tmp_path, 'vae')
    tokens = next(draw_brains(load(tmp_path, 'gpt'), 1, 0, 'cpu')).view(1, 2, 2, 3, 2)
    with torch.no_grad():
        x = vae.from_tokens(tokens, 'T1w').clamp(0, 1)[0, 0]
    np.testing.assert_allclose(volume(tmp_path / 'out' / 'sample_000_T1w.nii.gz'), x, atol=1e-5)

def test_drawn_brains_are_judged_beside_real_ones(run, tmp_path):
    play(*drawing(run / 'gpt', tmp_path / 'out', '--n=2'))
    printed = play('evaluate.py', f'--ckpt={run}/vae/ckpt.pt', f'--out_dir={tmp_path}', '--device=cpu',
                   '--reference_sessions=0', f'--generated={tmp_path}/out')
    assert '| vae/ckpt | T2w |' in printed.split('MS-SSIM between pairs')[1]

# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize('args, words', [
    (['--vae=RUN/gpt/ckpt.pt'], 'not an autoencoder'),
    (['--conditions=modality,'], 'anatomy has no modality'),
    (['--heads=3'], 'must divide'),
    (['--out_dir=RUN/gpt', '--init_from=resume', '--width=32'], 'another model'),
    (['--out_dir=RUN/gpt', '--init_from=resume', '--lr=1'], 'lr 0.01 there, 1.0 here')])
def test_bad_settings_of_training_end_with_one_line(args, words, run, tmp_path):
    args = [arg.replace('RUN', str(run)) for arg in args]
    usual = [f'--vae={run}/vae/ckpt.pt', f'--out_dir={tmp_path}/x']
    assert words in refuses('train_gpt.py', *TRAIN, *usual, *args)

@pytest.mark.parametrize('mode, args, words', [
    ('generate', ['--temperature=0'], 'above 0'),
    ('generate', ['--sex=F'], 'trained with conditions none'),
    ('complete', ['--input=RUN'], 'one scan'),
    ('complete', ['--input=a.nii', '--ckpt=RUN/vae/ckpt.pt'], 'wants a GPT'),
    ('reconstruct', ['--input=a.nii'], 'a GPT generates')])
def test_bad_settings_of_drawing_end_with_one_line(mode, args, words, run, tmp_path):
    args = [arg.replace('RUN', str(run)) for arg in args]
    assert words in refuses(*drawing(run / 'gpt', tmp_path / 'x.nii', *args, mode=mode))
