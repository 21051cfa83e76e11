"""A small model is trained once; sample.py and evaluate.py are run on it as a user would."""
import json
import os
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from conftest import TINY, play, refused, refuses, run
from common import load_checkpoint
from evaluate import code_use, dct_codec
from judge.metrics import (
    channel_cosine,
    effective_rank,
    explained_variance,
    latent_geometry,
    moments,
    scores,
    summarise,
)
from losses import psnr, ssim, ssim_map
from model import from_checkpoint
from test_nifti import head, store
from test_train import SHORT

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(data folder, checkpoint) of eight phantoms and a few steps; every split has sessions."""
    folder = tmp_path_factory.mktemp('run')
    made = run(
        'prepare.py',
        '--source=phantom',
        '--n=10',
        '--shape=32,48,32',
        '--modalities=T1w,T2w',
        '--split=0.5,0.25,0.25',
        '--workers=1',
        f'--out_dir={folder}/data',
    )
    assert made.returncode == 0, made.stderr
    done = run(
        'train_vae.py', *TINY, *SHORT, '--iters_2d=0', f'--data_dir={folder}/data', f'--out_dir={folder}/out'
    )
    assert done.returncode == 0, done.stderr
    return folder / 'data', folder / 'out' / 'ckpt.pt'

def scan(tmp_path, code='LPS', spacing=(1.2, 0.9, 1.0)):
    return store(str(tmp_path / 't1.nii.gz'), head((26, 40, 28)), code, spacing, turn=0.1)

def sample(trained, tmp_path, mode, output, *args, input='t1.nii.gz'):
    return run(
        'sample.py',
        f'--mode={mode}',
        f'--ckpt={trained[1]}',
        f'--input={tmp_path}/{input}',
        f'--output={tmp_path}/{output}',
        '--device=cpu',
        *args,
    )

# ---------------------------------------------------------------- sample.py

@pytest.mark.parametrize('mode', ['reconstruct', 'translate'])
def test_output_lies_on_the_input_voxel_by_voxel(trained, tmp_path, mode):
    path = scan(tmp_path)
    done = sample(trained, tmp_path, mode, 'out.nii.gz')
    assert done.returncode == 0, done.stderr
    a, b = nib.load(path), nib.load(tmp_path / 'out.nii.gz')
    assert a.shape == b.shape and nib.aff2axcodes(b.affine) == ('L', 'P', 'S')
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    x, y = a.get_fdata(), b.get_fdata()
    outside = ndimage.distance_transform_edt(x == 0) > 4
    overlap = 2 * ((x > 0) & (y != 0)).sum() / ((x > 0).sum() + (y != 0).sum())
    assert (
        (y[outside] == 0).all()
        and overlap > 0.85
        and np.isfinite(y).all()
        and (y[ndimage.binary_erosion(x > 0, iterations=2)] != 0).mean() > 0.9
    )

def test_reconstruction_is_the_models_own(trained, tmp_path):
    """On a grid the model's box equals, the file holds exactly the network's output in the scan's intensities."""
    volume = head((32, 48, 32))
    mask = volume != 0
    volume[mask.any((1, 2)).argmax(), 24, 16] = 100
    store(str(tmp_path / 't1.nii.gz'), volume)
    assert sample(trained, tmp_path, 'reconstruct', 'out.nii').returncode == 0
    low, high = np.percentile(volume[volume != 0], [0.5, 99.5])
    lo, hi = (np.argwhere(volume != 0).min(0), np.argwhere(volume != 0).max(0) + 1)
    start = [(a + b - n) // 2 for a, b, n in zip(lo, hi, volume.shape)]
    box = np.roll(
        np.where(volume != 0, np.clip((volume - low) / (high - low), 1e-4, 1), 0),
        [-s for s in start],
        (0, 1, 2),
    ).astype(np.float32)
    model = from_checkpoint(load_checkpoint(trained[1]))
    with torch.no_grad():
        x_hat = model.reconstruct(torch.tensor(box)[None, None], 'T1w')[0, 0].clamp(1e-4, 1).numpy()
    expected = np.where(volume != 0, low + np.roll(x_hat, start, (0, 1, 2)) * (high - low), 0)
    np.testing.assert_allclose(nib.load(tmp_path / 'out.nii').get_fdata(), expected, atol=0.05)

def test_tokens_and_back_equal_the_models_translation(trained, tmp_path):
    scan(tmp_path)
    assert sample(trained, tmp_path, 'tokens', 't1.npy').returncode == 0
    tokens = np.load(tmp_path / 't1.npy')
    assert tokens.shape == (2, 3, 2) and tokens.dtype == np.int32 and 0 <= tokens.min() and tokens.max() < 16
    done = sample(
        trained,
        tmp_path,
        'tokens',
        'back.nii.gz',
        '--target=T2w',
        f'--like={tmp_path}/t1.nii.gz',
        input='t1.npy',
    )
    assert done.returncode == 0, done.stderr
    assert sample(trained, tmp_path, 'translate', 'direct.nii.gz').returncode == 0
    np.testing.assert_allclose(
        nib.load(tmp_path / 'back.nii.gz').get_fdata(),
        nib.load(tmp_path / 'direct.nii.gz').get_fdata(),
        atol=1e-5,
    )
    assert sample(trained, tmp_path, 'tokens', 'box.nii.gz', input='t1.npy').returncode == 0
    box = nib.load(tmp_path / 'box.nii.gz')
    assert box.shape == (32, 48, 32) and nib.aff2axcodes(box.affine) == ('R', 'A', 'S')

@pytest.mark.parametrize('mode, output, args, words', [
    ('dream', 'o.nii', [], ['--mode=dream']), ('reconstruct', 'o.png', [], ['.nii or .nii.gz']), ('tokens', 'o.nii', [], ['.npy']),
    ('reconstruct', 'o.nii', ['--source=PD'], ["'PD'", 'T1w, T2w']), ('translate', 'o.nii', ['--target=FLAIR'], ["'FLAIR'"]),
    ('reconstruct', 'no/such\0', [], []), ('reconstruct', 'o.nii', ['--input=/nowhere.nii'], ['/nowhere.nii', 'no such file']),
    ('reconstruct', 'o.nii', ['--ckpt=/nowhere.pt'], ['/nowhere.pt', 'no such checkpoint']), ('tokens', 'o.nii', ['--input=bad.npy'], ['bad.npy'])])
def test_sample_refusals(trained, tmp_path, mode, output, args, words):
    if '\0' in output:
        output, words = 'file/o.nii', ['file/o.nii', 'cannot write']
    scan(tmp_path)
    (tmp_path / 'file').write_text('')
    np.save(tmp_path / 'bad.npy', np.full((2, 3, 2), 99))
    before = sorted(p.name for p in tmp_path.iterdir())
    done = sample(
        trained, tmp_path, mode, output, *[a.replace('bad.npy', f'{tmp_path}/bad.npy') for a in args]
    )
    assert refused(done, *words) and sorted(p.name for p in tmp_path.iterdir()) == before

# ---------------------------------------------------------------- evaluate.py

def test_evaluate_writes_tables_that_agree_with_the_model(trained, tmp_path):
    pytest.importorskip('matplotlib', reason='the picture needs it')
    done = run('evaluate.py', f'--ckpt={trained[1]},{trained[1]}', f'--out_dir={tmp_path}', '--device=cpu')
    assert done.returncode == 0, done.stderr
    result = json.load(open(tmp_path / 'table.json'))
    text = (tmp_path / 'table.md').read_text()
    assert (
        text in done.stdout
        and 'data range 1' in text
        and (tmp_path / 'reconstructions.png').stat().st_size > 10000
    )
    names = [row['name'] for row in result['rows']]
    assert names[:2] == ['out', 'out'] and names[2:] == [
        'population mean of the training set',
        'nearest training scan',
        names[4],
        names[5],
    ]
    assert names[4].startswith('DCT codec at 112 bits') and 'blur' in names[5]
    assert (
        result['rows'][0]['fidelity'] == result['rows'][1]['fidelity']
        and result['rows'][0]['bits'] == '48 + 64'
    )
    model, from_data = from_checkpoint(load_checkpoint(trained[1])), []
    lines = [
        dict(zip(*[line.split('\t') for line in (header, row)]))
        for header, *rows in [(trained[0] / 'subjects.tsv').read_text().splitlines()]
        for row in rows
    ]
    for row in lines:
        if row['split'] != 'test': continue
        x = torch.tensor(np.load(trained[0] / row['T1w']))[None, None]
        with torch.no_grad():
            from_data.append(psnr(model.reconstruct(x, 'T1w').clamp(0, 1), x).item())
    got = result['rows'][0]['fidelity']['T1w']['psnr_whole']
    assert got['n_subjects'] == len(from_data) and got['mean'] == pytest.approx(np.mean(from_data), abs=1e-3)
    assert {(c['source'], c['target'], c['style']) for c in result['rows'][0]['cross']} == \
           {(a, b, s) for a, b in (('T1w', 'T2w'), ('T2w', 'T1w')) for s in ('own', 'mean')}
    assert result['rows'][0]['codes']['all']['tokens'] == 2 * 12 * len(from_data)

def test_scores_whole_and_brain_only():
    x = torch.zeros(1, 1, 24, 24, 24)
    x[:, :, 6:18, 6:18, 6:18] = torch.rand(12, 12, 12) * 0.5 + 0.25
    y = torch.where(x > 0, x + 0.1, x)
    s = scores(y, x)
    assert s['psnr_brain'] == pytest.approx(20, abs=1e-3)
    assert s['psnr_whole'] == pytest.approx(20 + 10 * np.log10(8), abs=1e-3)
    inside = x[:, :, 5:-5, 5:-5, 5:-5] > 0  # windows of 11 centred in the brain
    assert s['ssim_whole'] == pytest.approx(100 * ssim(y, x).item(), abs=1e-3)
    assert s['ssim_brain'] == pytest.approx(100 * ssim_map(y, x)[inside].mean().item(), abs=1e-3)

def test_a_scan_without_brain_is_refused():
    with pytest.raises(ValueError, match='empty mask'):
        scores(torch.rand(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16))

def test_summary_averages_sessions_within_subjects():
    s = summarise([1.0, 3.0, 8.0], ['a', 'a', 'b'])
    assert (
        s['mean'] == 5
        and s['sd'] == pytest.approx(np.std([2, 8], ddof=1))
        and (s['n_subjects'], s['n_sessions']) == (2, 3)
    )
    assert s['ci95'] == [2, 8]

def test_code_use_closed_forms():
    assert code_use(np.array([[5, 5, 0, 0]])) == {'used': 2, 'perplexity': pytest.approx(2), 'tokens': 10}
    assert code_use(np.array([[9, 0], [2, 2]])) == {
        'used': 1.5,
        'perplexity': pytest.approx(1.5),
        'tokens': 13,
    }

def test_dct_codec_spends_at_most_its_bits_and_gets_better_with_more():
    rng = np.random.default_rng(0)
    x = np.clip(ndimage.gaussian_filter(rng.random((24, 32, 24)), 2) * 3 - 1, 0, 1).astype(np.float32)
    quality = [
        psnr(torch.tensor(dct_codec(x, bits))[None, None], torch.tensor(x)[None, None]).item()
        for bits in (50, 500, 5000, 50000)
    ]
    assert quality == sorted(quality) and quality[-1] > quality[0] + 8
    assert np.abs(dct_codec(x, 1e7) - x).max() < 1e-3

@pytest.mark.parametrize('args, words', [
    (['--split=other'], ["split 'other'"]), (['--data_dir=/nowhere'], ['/nowhere']), (['--ckpt=/nowhere.pt'], ['/nowhere.pt']), (['--colour=1'], ["'colour'"])])
def test_evaluate_refusals(trained, tmp_path, args, words):
    assert refused(run('evaluate.py', f'--ckpt={trained[1]}', f'--out_dir={tmp_path}/e', *args), *words)

# ---------------------------------------------------------------- geometry of the latent

def test_latent_geometry_equals_numpy():
    z = torch.randn(3, 4, 5, 6, 7) @ torch.randn(7, 7) + torch.tensor([0.0, 3, -2, 9]).view(4, 1, 1, 1)
    rows = z.double().movedim(1, -1).reshape(-1, 4).numpy()
    np.testing.assert_allclose(channel_cosine(z), np.abs(np.corrcoef(rows.T)), atol=1e-6)
    unit = rows / np.linalg.norm(rows, axis=0)
    np.testing.assert_allclose(channel_cosine(z, centred=False), np.abs(unit.T @ unit), atol=1e-6)
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    np.testing.assert_allclose(explained_variance(z), values / values.sum(), atol=1e-6)
    p = values / values.sum()
    assert effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    np.testing.assert_allclose(channel_cosine(torch.from_numpy(rows)), channel_cosine(z), atol=1e-9)
    # gathered volume by volume, one covariance for every number
    total = sum(moments(part) for part in z.split(1))
    found = latent_geometry(total, 0.5)
    assert found['effective_rank'] == pytest.approx(effective_rank(z)) and found[
        'explained_variance'
    ] == pytest.approx(explained_variance(z).tolist())
    assert found['pearson_abs'] == pytest.approx((channel_cosine(z).sum().item() - 4) / 12)

def test_effective_rank_of_known_spectra():
    q = torch.linalg.qr(torch.cat([torch.ones(100, 1), torch.randn(100, 4)], 1))[0][:, 1:].double()
    assert effective_rank(q) == pytest.approx(4, abs=1e-4)
    assert effective_rank(q[:, :1] * torch.ones(1, 4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(q * torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2, abs=1e-4)
    assert effective_rank(5 * q + 3) == pytest.approx(4, abs=1e-4)

# ---------------------------------------------------------------- ConvVAE

@pytest.mark.parametrize('args, latent, bits', [(['--widths=8,8', '--latent_dim=3'], '3x16x24x16', '294912'),
                                                (['--dims=2', '--widths=8,8,8', '--bottleneck=vq', '--num_codebooks=2', '--latent_dim=4'], '4x8x12x32', '24576')])
def test_evaluate_compares_autoencoders_and_sample_reconstructs(trained, tmp_path, args, latent, bits):
    data, neuroquant = trained
    play(
        'train_vae.py',
        *TINY,
        '--kind=convvae',
        *args,
        '--iters=2',
        '--w_ssim=0',
        f'--data_dir={data}',
        f'--out_dir={tmp_path}/conv',
    )
    printed = play(
        'evaluate.py',
        f'--ckpt={tmp_path}/conv/ckpt.pt,{neuroquant}',
        f'--data_dir={data}',
        '--device=cpu',
        '--max_sessions=2',
        '--lpips=random',
        '--latent_figures=True',
        '--tsne_points=100',
    )
    assert 'RANDOM trunk (no LPIPS)' in printed and {'latent.png', 'tsne.png', 'reconstructions.png'} <= set(
        os.listdir(tmp_path / 'conv')
    )
    table = json.loads((tmp_path / 'conv' / 'table.json').read_text())
    ours, other, *references = table['rows']
    assert (ours['latent'], ours['bits'], ours['dft']) == (latent, bits, 'no') and other['f'] == '16x'
    assert len([r for r in references if r['name'].startswith('DCT')]) == 2  # one for each rate
    assert ours['geometry']['channels'] == int(latent[0]) and 1 <= ours['geometry']['effective_rank'] <= 4
    assert (
        (ours['geometry']['posterior_sigma'] is None) == ('--dims=2' in args)
        and not ours['cross']
        and other['cross']
    )
    path = scan(tmp_path)
    play(
        'sample.py',
        '--mode=reconstruct',
        f'--ckpt={tmp_path}/conv/ckpt.pt',
        f'--input={path}',
        f'--output={tmp_path}/out.nii.gz',
        '--device=cpu',
    )
    assert nib.load(tmp_path / 'out.nii.gz').shape == nib.load(path).shape
    if '--dims=2' in args:
        play(
            'sample.py',
            '--mode=tokens',
            f'--ckpt={tmp_path}/conv/ckpt.pt',
            f'--input={path}',
            f'--output={tmp_path}/t.npy',
            '--device=cpu',
        )
        assert np.load(tmp_path / 't.npy').shape == (2, 8, 12, 32)
        play(
            'sample.py',
            '--mode=tokens',
            f'--ckpt={tmp_path}/conv/ckpt.pt',
            f'--input={tmp_path}/t.npy',
            f'--output={tmp_path}/back.nii.gz',
            '--device=cpu',
        )
    else:
        assert 'no tokens' in refuses(
            'sample.py',
            '--mode=tokens',
            f'--ckpt={tmp_path}/conv/ckpt.pt',
            f'--input={path}',
            f'--output={tmp_path}/t.npy',
            '--device=cpu',
        )
    assert 'translates' in refuses(
        'sample.py',
        '--mode=translate',
        f'--ckpt={tmp_path}/conv/ckpt.pt',
        f'--input={path}',
        f'--output={tmp_path}/t.nii',
        '--device=cpu',
    )

def test_dice_volumes_and_probes_get_their_tables(trained, tmp_path):
    script = tmp_path / 'seg.py'
    script.write_text(
        'import sys, nibabel as nib, numpy as np\nx ='
        ' nib.load(sys.argv[1])\nnib.save(nib.Nifti1Image(np.where(x.get_fdata() > 0.5, 3,'
        ' 8).astype(np.int16), x.affine), sys.argv[2])\n'
    )
    data, ckpt = trained
    args = [
        f'--ckpt={ckpt}',
        f'--data_dir={data}',
        f'--out_dir={tmp_path}',
        '--device=cpu',
        '--reference_sessions=0',
        f'--segmenter={sys.executable} {script} {{in}} {{out}}',
    ]
    printed = play('evaluate.py', *args, '--labels=dseg', '--probe=sex', '--split=train')
    table = json.loads((tmp_path / 'table.json').read_text())
    found = {r['modality']: r for r in table['anatomy']}
    truth = np.load(data / f"{found['T1w']['scans'][0]['subject']}_ses-01_dseg.npy")
    box = np.prod([float(v) for v in json.loads((data / 'dataset.json').read_text())['voxel_mm']])
    assert found['T1w']['scans'][0]['mm3_truth']['caudate'] == pytest.approx(
        box * np.isin(truth, (11, 50)).sum()
    )
    dices = found['T1w']['scans'][0]['dice']
    assert (
        dices['left thalamus'] == 0
        and 0 < dices['left cerebral cortex'] < 1
        and 'volumes.png' in os.listdir(tmp_path)
    )
    assert (
        'cerebellum cortex: reconstruction' in printed
        and '| linear | z_anat | modality: T1w or T2w |' in printed
    )
    assert {(r['seen'], r['target']) for r in table['probes']} == {
        ('latent, T1w', 'sex'),
        ('latent, T2w', 'sex'),
        ('z_anat', 'modality: T1w or T2w'),
    }
    own = play('evaluate.py', *args, '--max_sessions=1')  # against the segmenter's own labels of the input
    assert "segmenter's labels of the input" in own
    for given, reason in (
        (['--labels=nothing'], 'no label map'),
        ([f'--segmenter={sys.executable} /nowhere.py {{in}} {{out}}'], 'segmenter ended with'),
        (['--segmenter=/nowhere.h5'], '/nowhere.h5'),
    ):
        # one line, and the other rows are there
        printed = play('evaluate.py', *args, '--max_sessions=1', *given)
        assert reason in printed and '| out | 16x |' in printed
        lines = [line for line in printed.splitlines() if line.startswith('| ')]
        for head, line in zip(lines, lines[1:]):
            if not line.startswith(('| model', '| source')):
                # a reason takes a cell, not a row's shape
                assert line.count(' | ') == head.count(' | '), line
