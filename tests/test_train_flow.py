"""train_flow.py and sample.py --mode=generate as a user runs them, on the latents of small autoencoders of a few steps."""
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from common import load_checkpoint
from conftest import ROOT, TINY, play, refuses
from latents import Latents, encode_conditions, nearest
from losses import ms_ssim
from model import encoder_hash, from_checkpoint

FLOW = [
    '--widths=8,16', '--res_blocks=1', '--attention=False,True', '--head_width=8', '--batch_size=2',
    '--iters=4', '--log_interval=1', '--device=cpu'
]
KL = [
    *TINY, '--kind=convvae', '--widths=16,16', '--latent_dim=3', '--w_ssim=0', '--w_kl=1e-3', '--iters=2',
    '--eval_sessions=1'
]

def train_vae(data, out, *args):
    play('train_vae.py', *(args or KL), f'--data_dir={data}', f'--out_dir={out}')
    return f'{out}/ckpt.pt'

def train_flow(vae, out, *args):
    play('train_flow.py', *FLOW, f'--vae={vae}', f'--out_dir={out}', *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def generate(flow, out, *args):
    play(
        'sample.py',
        '--mode=generate',
        f'--ckpt={flow}/ckpt.pt',
        f'--output={out}',
        '--steps=3',
        '--device=cpu',
        *args,
    )
    return np.load(f'{out}/latents.npy')

def log_of(out):
    return [
        {k: v for k, v in json.loads(line).items() if k.startswith(('iter', 'train', 'val', 'lr'))}
        for line in open(f'{out}/log.jsonl')
    ]

def test_a_resumed_flow_has_the_same_bits_and_its_latents_are_written_once(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    whole = train_flow(vae, tmp_path / 'a')
    folder = tmp_path / 'vae' / 'latents_data'
    written = {p: p.stat().st_mtime_ns for p in folder.glob('*.npy')}
    assert len(written) == 22 and all(
        np.load(p).shape == (2, 3, 16, 24, 16) and np.load(p).dtype == np.float16 for p in written
    )
    victim = next(iter(written))
    victim.write_bytes(victim.read_bytes()[:100])  # an interrupted write
    train_flow(vae, tmp_path / 'b', '--max_iters=2')
    parts = train_flow(vae, tmp_path / 'b', '--init_from=resume')
    assert {p for p in written if p.stat().st_mtime_ns != written[p]} == {victim}
    for name in ('model', 'ema'):
        for k, v in whole[name].items():
            assert torch.equal(v, parts[name][k]), k
    train_lines = [[line for line in log_of(tmp_path / r) if 'lr' in line] for r in 'ab']
    assert train_lines[0] == train_lines[1]
    bins = [k for line in log_of(tmp_path / 'a') for k in line if k.startswith('val/loss_t')]
    assert len(bins) == 10

def test_latents_are_the_posterior_and_their_statistics_those_of_fresh_draws(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    checkpoint = train_flow(vae, tmp_path / 'a', '--normalise=channel')
    model = from_checkpoint(load_checkpoint(vae))
    train = Latents(tmp_path / 'vae' / 'latents_data', tiny_data, ('T1w', 'T2w'), 'train', ())
    assert train.n == 14
    draws = []
    for k in range(train.n):
        row, m = train.scans[k]
        x = torch.tensor(np.load(tiny_data / row[('T1w', 'T2w')[m]]))[None, None]
        with torch.no_grad():
            mu, logvar = model.posterior(x)
        mean, log = train.load(k)
        np.testing.assert_allclose(mean, mu[0], atol=2e-3), np.testing.assert_allclose(
            log, logvar[0], atol=2e-2
        )
        draws.append(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
    draws = torch.cat(draws)
    torch.testing.assert_close(
        checkpoint['model']['latent_mean'], draws.mean((0, 2, 3, 4)), atol=0.02, rtol=0.02
    )
    torch.testing.assert_close(
        checkpoint['model']['latent_sd'], draws.std((0, 2, 3, 4)), atol=0.02, rtol=0.02
    )
    flow = from_checkpoint(checkpoint)
    torch.testing.assert_close(flow.denormalise(flow.normalise(draws)), draws, atol=1e-5, rtol=1e-5)
    assert flow.normalise(draws).var((0, 2, 3, 4)).sub(1).abs().max() < 0.05
    first, second = (train.batch(2, 0, 0, 1, s)['mean'] for s in (0, 0))
    assert torch.equal(first, second) and not torch.equal(first, train.batch(2, 0, 0, 1, 1)['mean'])

def test_generated_volumes_depend_on_seed_and_place_alone_and_decoders_share_their_latents(
    tiny_data, tmp_path
):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'flow')
    two, three = generate(tmp_path / 'flow', tmp_path / 'two', '--n=2'), generate(
        tmp_path / 'flow', tmp_path / 'three', '--n=3'
    )
    assert np.array_equal(two, three[:2]) and not np.array_equal(three[0], three[1])
    assert not np.array_equal(two, generate(tmp_path / 'flow', tmp_path / 'other', '--n=2', '--seed=1'))
    assert not np.array_equal(two, generate(tmp_path / 'flow', tmp_path / 'heun', '--n=2', '--method=heun'))
    tuned = train_vae(
        tiny_data, tmp_path / 'dft', *KL, '--freeze_encoder=True', f'--init_from={vae}', '--lr=0.1'
    )
    assert np.array_equal(two, generate(tmp_path / 'flow', tmp_path / 'tuned', '--n=2', f'--vae={tuned}'))
    files = sorted(p.name for p in (tmp_path / 'two').iterdir())
    assert files == ['latents.npy', 'montage.png', 'nearest.md', 'sample_000.nii.gz', 'sample_001.nii.gz']
    a, b = nib.load(tmp_path / 'two' / 'sample_000.nii.gz'), nib.load(
        tmp_path / 'tuned' / 'sample_000.nii.gz'
    )
    assert (
        a.shape == (32, 48, 32)
        and nib.aff2axcodes(a.affine) == ('R', 'A', 'S')
        and not np.array_equal(a.get_fdata(), b.get_fdata())
    )
    np.testing.assert_allclose((a.affine @ [15.5, 23.5, 15.5, 1])[:3], 0, atol=1e-6)
    model = from_checkpoint(load_checkpoint(vae))
    with torch.no_grad():
        want = model.from_latent(torch.from_numpy(two[:1])).clamp(0, 1)[0, 0]
    np.testing.assert_allclose(a.get_fdata(), want, atol=1e-5)
    other = train_vae(tiny_data, tmp_path / 'other_vae', *KL, '--seed=3')
    assert 'same encoder' in refuses(
        'sample.py',
        '--mode=generate',
        f'--ckpt={tmp_path}/flow/ckpt.pt',
        f'--output={tmp_path}/x',
        f'--vae={other}',
        '--device=cpu',
    )

def test_neuroquant_gives_every_modality_of_each_new_brain(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'nq', *TINY, '--iters_3d=2', '--joint=none')
    train_flow(vae, tmp_path / 'flow', '--conditions=modality,sex,age', '--p_drop=0.5')
    z = generate(
        tmp_path / 'flow', tmp_path / 'out', '--n=1', '--target=T2w', '--sex=F', '--age=40', '--guidance=2'
    )
    assert sorted(p.name for p in (tmp_path / 'out').glob('*.nii.gz')) == [
        'sample_000_T1w.nii.gz',
        'sample_000_T2w.nii.gz',
    ]
    model = from_checkpoint(load_checkpoint(vae))
    for m in ('T1w', 'T2w'):
        with torch.no_grad():
            want = model.from_latent(torch.from_numpy(z), m).clamp(0, 1)[0, 0]
        np.testing.assert_allclose(
            nib.load(tmp_path / 'out' / f'sample_000_{m}.nii.gz').get_fdata(), want, atol=1e-5
        )
    assert 'F or M' in refuses(
        'sample.py',
        '--mode=generate',
        f'--ckpt={tmp_path}/flow/ckpt.pt',
        f'--output={tmp_path}/x',
        '--sex=x',
        '--device=cpu',
    )
    assert 'knows T1w, T2w' in refuses(
        'sample.py',
        '--mode=generate',
        f'--ckpt={tmp_path}/flow/ckpt.pt',
        f'--output={tmp_path}/x',
        '--target=CT',
        '--device=cpu',
    )

def test_conditions_are_encoded_and_dropped():
    values = [{'modality': 'T2w', 'sex': 'F', 'age': 40.0}, {'modality': 'T1w', 'sex': None, 'age': None}, {}]
    cond = encode_conditions(values, ('modality', 'sex', 'age'), ('T1w', 'T2w'))
    assert cond['classes'].tolist() == [[1, 0], [0, 2], [2, 2]]
    torch.testing.assert_close(cond['vectors'][0], torch.tensor([[0.4, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert encode_conditions(values, (), ('T1w',)) is None

def test_nearest_finds_a_memorised_one_at_distance_0():
    rng = np.random.default_rng(0)
    library = rng.normal(size=(5, 4, 3))
    found = nearest([library[3], library[1] + 0.1], enumerate(library))
    assert found[0] == (3, 0.0) and found[1][0] == 1 and found[1][1] == pytest.approx(0.1)

def test_encoder_hash_names_the_encoder_alone(tiny_data, tmp_path):
    model = from_checkpoint(load_checkpoint(train_vae(tiny_data, tmp_path / 'vae')))
    name = encoder_hash(model)
    torch.nn.init.ones_(model.decoder.blocks[0].conv.weight)
    assert encoder_hash(model) == name
    with torch.no_grad():
        model.mu_head.weight[0] += 1e-3
    assert encoder_hash(model) != name

def test_bad_input_ends_with_one_line(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'flow', '--max_iters=1')
    def flow(*args):
        return refuses('train_flow.py', *FLOW, f'--vae={vae}', f'--out_dir={tmp_path}/x', *args)
    def draw(*args):
        return refuses(
            'sample.py',
            '--mode=generate',
            f'--ckpt={tmp_path}/flow/ckpt.pt',
            f'--output={tmp_path}/y',
            '--device=cpu',
            *args,
        )
    assert 'not an autoencoder' in flow(f'--vae={tmp_path}/flow/ckpt.pt')
    other = train_vae(tiny_data, tmp_path / 'other', *KL, '--seed=1')
    assert 'latents of another autoencoder' in flow(
        f'--vae={other}', f'--latents_dir={tmp_path}/vae/latents_data'
    )
    assert 'no such checkpoint' in flow('--vae=/nowhere.pt') and '/nowhere/data' in flow(
        '--data_dir=/nowhere/data'
    )
    assert 'only modality, sex and age' in flow('--conditions=weight,') and 'uniform or logit_normal' in flow(
        '--times=cosine'
    )
    table = tiny_data / 'subjects.tsv'
    table.write_text(table.read_text().replace('\tF\t30', '\t\t'))
    assert 'no scan with a known age' in flow('--conditions=age,')
    assert 'another network' in refuses(
        'train_flow.py',
        *FLOW,
        f'--vae={vae}',
        f'--out_dir={tmp_path}/flow',
        '--init_from=resume',
        '--widths=16,16',
    )
    assert 'at least 1' in draw('--steps=0') and 'trained with conditions none' in draw('--sex=F')
    assert 'wants a flow' in refuses(
        'sample.py', '--mode=generate', f'--ckpt={vae}', f'--output={tmp_path}/y', '--device=cpu'
    )
    assert 'wants an autoencoder' in refuses(
        'sample.py',
        '--mode=reconstruct',
        f'--ckpt={tmp_path}/flow/ckpt.pt',
        '--input=a.nii',
        f'--output={tmp_path}/y.nii',
        '--device=cpu',
    )
    assert 'a flow' in refuses(
        'evaluate.py', f'--ckpt={tmp_path}/flow/ckpt.pt', f'--data_dir={tiny_data}', '--device=cpu'
    )

def test_evaluate_prints_frechet_distances_of_reconstructed_and_generated_slices(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    train_flow(vae, tmp_path / 'flow')
    generate(tmp_path / 'flow', tmp_path / 'new', '--n=3')
    args = [
        f'--ckpt={vae}',
        f'--data_dir={tiny_data}',
        '--split=train',
        '--device=cpu',
        '--reference_sessions=0',
    ]
    printed = play(
        'evaluate.py', *args, '--max_sessions=4', '--features=random', f'--generated={tmp_path}/new'
    )
    assert 'RANDOM features' in printed and 'gFID - rFID' in printed
    table = json.loads((tmp_path / 'vae' / 'table.json').read_text())
    rows = table['frechet']
    assert [r['row'] for r in rows] == ['floor: real against real', 'vae rFID', 'vae gFID'] * 2
    found = {(r['row'], r['modality']): r for r in rows}
    assert found['vae rFID', 'T1w']['mean'] > found['floor: real against real', 'T1w']['mean'] > 0
    assert found['vae gFID', 'T2w']['slices']['axial'] == [3 * 32, 3 * 32]
    real, new = (r for r in table['diversity'] if r['modality'] == 'T1w')
    volumes = [
        torch.from_numpy(nib.load(tmp_path / 'new' / f'sample_{k:03d}.nii.gz').get_fdata(dtype=np.float32))[
            None, None
        ]
        for k in range(3)
    ]
    assert new['ms_ssim'] == pytest.approx(
        np.mean([ms_ssim(volumes[a], volumes[b]).item() for a, b in ((0, 1), (0, 2), (1, 2))]), abs=1e-4
    )
    assert (real['row'], real['volumes'], real['pairs']) == ('real', 4, 6) and os.path.getsize(
        tmp_path / 'vae' / 'samples.png'
    ) > 10000
    play('evaluate.py', *args, '--features=random', '--max_sessions=1', '--fid_slices=central')
    rows = json.loads((tmp_path / 'vae' / 'table.json').read_text())['frechet']
    assert {
        (r['row'], 'more slices than features' in r['reason'], 'no volumes' in r['reason']) for r in rows
    } == {('vae rFID', True, False), ('floor: real against real', False, True)}
    printed = play('evaluate.py', *args, '--max_sessions=1', '--features=/nowhere.pth')
    # one line, and the other rows are there
    assert 'RadImageNet-ResNet50_notop.pth' in printed and '| vae | 2x |' in printed

def test_two_processes_train_the_flow_of_one(tiny_data, tmp_path):
    vae = train_vae(tiny_data, tmp_path / 'vae')
    conditioned = ['--conditions=modality,sex,age', '--p_drop=0.5', '--eval_scans=3']
    one = train_flow(vae, tmp_path / 'one', *conditioned)
    args = [*FLOW, f'--vae={vae}', *conditioned, f'--out_dir={tmp_path}/two', '--batch_size=1']
    done = subprocess.run(
        [
            sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29513',
            'train_flow.py', *args
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr
    two = load_checkpoint(tmp_path / 'two' / 'ckpt.pt')
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'two')):
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5), k
    for k, v in one['model'].items():
        torch.testing.assert_close(two['model'][k], v, rtol=1e-3, atol=1e-4)
