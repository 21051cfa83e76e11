"""sample.py on NIfTI scans as a user runs it, with small autoencoders that are trained once."""
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from common import load_checkpoint
from conftest import play, refuses
from model import from_checkpoint
from sample import Codec
from test_evaluate import data, kl, neuroquant, vq2d  # noqa: F401, fixtures
from test_nifti import head, store

@pytest.fixture
def scan(tmp_path):
    """Path of an oblique scan in LPS with voxels of its own."""
    return store(str(tmp_path / 't1.nii.gz'), head((26, 40, 28)), 'LPS', (1.2, 0.9, 1.0), turn=0.1)

def sampling(checkpoint, mode, scan, output, *args):
    return ['sample.py', f'--mode={mode}', f'--ckpt={checkpoint}', f'--input={scan}', f'--output={output}',
            '--device=cpu', *args]

def values(path):
    return nib.load(path).get_fdata()

# ---------------------------------------------------------------- on the scan's own grid

@pytest.fixture(scope='module', params=['reconstruct', 'translate'])
def overlay(request, neuroquant, tmp_path_factory):
    """A scan and what became of it, as NIfTI images."""
    folder = tmp_path_factory.mktemp('overlay')
    path = store(str(folder / 't1.nii.gz'), head((26, 40, 28)), 'LPS', (1.2, 0.9, 1.0), turn=0.1)
    play(*sampling(neuroquant, request.param, path, folder / 'out.nii.gz'))
    return nib.load(path), nib.load(folder / 'out.nii.gz')

def test_output_has_the_grid_of_the_input(overlay):
    scan, output = overlay
    assert scan.shape == output.shape
    assert nib.aff2axcodes(output.affine) == ('L', 'P', 'S')
    np.testing.assert_allclose(scan.affine, output.affine, atol=1e-5)

def test_output_is_0_away_from_the_brain_and_finite_everywhere(overlay):
    x, y = (image.get_fdata() for image in overlay)
    outside = ndimage.distance_transform_edt(x == 0) > 4
    assert (y[outside] == 0).all()
    assert np.isfinite(y).all()

def test_output_fills_the_brain(overlay):
    x, y = (image.get_fdata() for image in overlay)
    overlap = 2 * ((x > 0) & (y != 0)).sum() / ((x > 0).sum() + (y != 0).sum())
    assert overlap > 0.85
    inside = ndimage.binary_erosion(x > 0, iterations=2)
    assert (y[inside] != 0).mean() > 0.9

def test_without_the_mask_the_background_is_what_the_decoder_made(neuroquant, scan, tmp_path):
    masked = play(*sampling(neuroquant, 'reconstruct', scan, tmp_path / 'masked.nii'))
    plain = play(*sampling(neuroquant, 'reconstruct', scan, tmp_path / 'plain.nii', '--mask=False'))
    assert 'whose background is that of the input' in masked and 'whose background' not in plain
    with_mask, without = values(tmp_path / 'masked.nii'), values(tmp_path / 'plain.nii')
    assert (without[with_mask == 0] != 0).any()

def test_reconstruction_is_the_models_own(neuroquant, tmp_path):
    """On a grid the model's box equals, the file holds the network's output in the scan's intensities."""
    volume = head((32, 48, 32))
    brain = volume != 0
    volume[brain.any((1, 2)).argmax(), 24, 16] = 100
    brain = volume != 0
    store(str(tmp_path / 't1.nii.gz'), volume)
    play(*sampling(neuroquant, 'reconstruct', tmp_path / 't1.nii.gz', tmp_path / 'out.nii'))

    low, high = np.percentile(volume[brain], [0.5, 99.5])
    scaled = np.where(brain, np.clip((volume - low) / (high - low), 1e-4, 1), 0).astype(np.float32)
    places = np.argwhere(brain)
    first, last = places.min(0), places.max(0) + 1
    start = (first + last - np.array(volume.shape)) // 2
    box = np.roll(scaled, -start, (0, 1, 2))
    model = from_checkpoint(load_checkpoint(neuroquant))
    with torch.no_grad():
        x_hat = model.reconstruct(torch.tensor(box)[None, None], 'T1w')[0, 0].clamp(1e-4, 1).numpy()
    on_grid = np.roll(x_hat, start, (0, 1, 2))
    want = np.where(brain, low + on_grid * (high - low), 0)
    np.testing.assert_allclose(values(tmp_path / 'out.nii'), want, atol=0.05)

@pytest.mark.parametrize('kind', ['kl', 'vq2d'])
def test_other_autoencoders_reconstruct_on_the_scans_grid_too(kind, request, scan, tmp_path):
    play(*sampling(request.getfixturevalue(kind), 'reconstruct', scan, tmp_path / 'out.nii.gz'))
    assert nib.load(tmp_path / 'out.nii.gz').shape == nib.load(scan).shape

# ---------------------------------------------------------------- tokens

@pytest.fixture
def tokens(neuroquant, scan, tmp_path):
    """Path of a scan's tokens."""
    play(*sampling(neuroquant, 'tokens', scan, tmp_path / 't1.npy'))
    return tmp_path / 't1.npy'

def test_tokens_are_code_numbers(tokens):
    numbers = np.load(tokens)
    assert numbers.shape == (2, 3, 2) and numbers.dtype == np.int32
    assert 0 <= numbers.min() and numbers.max() < 16

def test_tokens_and_back_equal_the_models_translation(neuroquant, scan, tokens, tmp_path):
    back, direct = tmp_path / 'back.nii.gz', tmp_path / 'direct.nii.gz'
    play(*sampling(neuroquant, 'tokens', tokens, back, '--target=T2w', f'--like={scan}'))
    play(*sampling(neuroquant, 'translate', scan, direct))
    np.testing.assert_allclose(values(back), values(direct), atol=1e-5)

def test_modalities_may_be_written_small(neuroquant, scan, tmp_path):
    for name, args in (('a', ('--source=t1w', '--target=t2w')), ('b', ('--source=T1w', '--target=T2w'))):
        play(*sampling(neuroquant, 'translate', scan, tmp_path / f'{name}.nii', *args))
    np.testing.assert_array_equal(values(tmp_path / 'a.nii'), values(tmp_path / 'b.nii'))

def test_tokens_decode_as_their_own_modality(neuroquant, scan, tmp_path):
    play(*sampling(neuroquant, 'tokens', scan, tmp_path / 't2.npy', '--source=T2w'))
    said = play(*sampling(neuroquant, 'tokens', tmp_path / 't2.npy', tmp_path / 'own.nii'))
    play(*sampling(neuroquant, 'tokens', tmp_path / 't2.npy', tmp_path / 'named.nii', '--target=T2w'))
    assert 'as T2w' in said
    np.testing.assert_array_equal(values(tmp_path / 'own.nii'), values(tmp_path / 'named.nii'))

def test_scans_are_of_the_modality_that_their_names_say(neuroquant, tmp_path):
    """Of T1w and T2w in one folder, T2w was reconstructed as T1w."""
    folder = tmp_path / 'in'
    folder.mkdir()
    names = {'a_T1w': 'T1w', 'a_t2W': 'T2w', 't2': 'T2w', 'plain': 'T1w'}
    for name in names:
        store(str(folder / f'{name}.nii.gz'), head((26, 40, 28)))
    play(*sampling(neuroquant, 'reconstruct', folder, tmp_path / 'out'))
    for name, modality in names.items():
        alone = tmp_path / f'{name}.nii.gz'
        play(*sampling(neuroquant, 'reconstruct', folder / 'plain.nii.gz', alone, f'--source={modality}'))
        np.testing.assert_array_equal(values(tmp_path / 'out' / f'{name}.nii.gz'), values(alone))
    assert (values(tmp_path / 'a_T1w.nii.gz') != values(tmp_path / 'a_t2W.nii.gz')).any()

def test_of_a_folder_the_scans_of_one_modality_are_translated(neuroquant, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for name in ('a_T1w', 'a_T2w', 'a_T2w_mask', 'plain'):
        store(str(folder / f'{name}.nii.gz'), head((26, 40, 28)))
    said = play(*sampling(neuroquant, 'translate', folder, tmp_path / 'out', '--source=T2w'))
    assert sorted(os.listdir(tmp_path / 'out')) == ['a_T1w.nii.gz', 'plain_T1w.nii.gz']
    assert '1 scans are left out, such as' in said and 'of another modality than T2w' in said
    assert 'a_T2w_mask.nii.gz: by name a mask or label map' in said

def test_what_a_model_does_not_know_is_left_out_or_said(neuroquant, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for name in ('a_T1w', 'a_FLAIR'):
        store(str(folder / f'{name}.nii.gz'), head((26, 40, 28)))
    said = play(*sampling(neuroquant, 'reconstruct', folder, tmp_path / 'out'))
    assert os.listdir(tmp_path / 'out') == ['a_T1w.nii.gz']
    assert '1 scans are left out, such as' in said and 'by name FLAIR' in said
    said = play(*sampling(neuroquant, 'reconstruct', folder / 'a_FLAIR.nii.gz', tmp_path / 'alone.nii.gz'))
    assert 'by its name FLAIR, which this model does not know; taken as T1w' in said
    play(*sampling(neuroquant, 'reconstruct', folder, tmp_path / 'all', '--source=T1w'))
    assert len(os.listdir(tmp_path / 'all')) == 2

def test_results_below_the_input_are_not_taken_for_scans(neuroquant, tmp_path):
    store(str(tmp_path / 'a_T1w.nii.gz'), head((26, 40, 28)))
    play(*sampling(neuroquant, 'reconstruct', tmp_path, tmp_path / 'out'))
    assert '0 of 1 scans now' in play(*sampling(neuroquant, 'reconstruct', tmp_path, tmp_path / 'out'))

@pytest.mark.parametrize('linked', [False, True])
def test_the_input_is_never_overwritten(neuroquant, tmp_path, linked):
    scan, output = tmp_path / 'a_T1w.nii.gz', tmp_path / 'a_T1w.nii.gz'
    store(str(scan), head((26, 40, 28)))
    if linked:
        output = tmp_path / 'link.nii.gz'
        output.symlink_to(scan)
    before = scan.read_bytes()
    assert 'that is the input' in refuses(*sampling(neuroquant, 'translate', scan, output))
    assert scan.read_bytes() == before

def test_the_background_comes_back_as_it_was(neuroquant, tmp_path):
    scan = tmp_path / 'a_T1w.nii.gz'
    volume = head((26, 40, 28))
    store(str(scan), np.where(volume > 0, volume, -1024).astype(np.float32))
    play(*sampling(neuroquant, 'reconstruct', scan, tmp_path / 'out.nii.gz'))
    out = values(tmp_path / 'out.nii.gz')
    assert (out[values(scan) == -1024] == -1024).all() and (out > -1024).any()

def test_scans_that_would_share_an_output_are_named(neuroquant, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    for ending in ('nii', 'nii.gz'):
        store(str(folder / f'a_T1w.{ending}'), head((26, 40, 28)))
    said = play(*sampling(neuroquant, 'reconstruct', folder, tmp_path / 'out'))
    assert 'has the name of' in said and '1 of 1 scans now' in said

def test_tokens_of_another_encoder_are_refused(neuroquant, tokens, tmp_path):
    about = tokens.with_suffix('.json')
    about.write_text(about.read_text().replace('encoder_hash": "', 'encoder_hash": "0'))
    line = refuses(*sampling(neuroquant, 'tokens', tokens, tmp_path / 'back.nii'))
    assert 't1.npy' in line and 'another encoder' in line

def test_tokens_of_no_known_modality_want_a_target(neuroquant, tokens, tmp_path):
    tokens.with_suffix('.json').unlink()
    line = refuses(*sampling(neuroquant, 'tokens', tokens, tmp_path / 'back.nii'))
    assert '--target' in line and 'T1w, T2w' in line
    play(*sampling(neuroquant, 'tokens', tokens, tmp_path / 'back.nii', '--target=T1w'))

def test_tokens_without_a_scan_give_the_models_box(neuroquant, tokens, tmp_path):
    play(*sampling(neuroquant, 'tokens', tokens, tmp_path / 'box.nii.gz'))
    box = nib.load(tmp_path / 'box.nii.gz')
    assert box.shape == (32, 48, 32)
    assert nib.aff2axcodes(box.affine) == ('R', 'A', 'S')

def test_tokens_of_several_codebooks_go_both_ways(vq2d, scan, tmp_path):
    play(*sampling(vq2d, 'tokens', scan, tmp_path / 't1.npy'))
    assert np.load(tmp_path / 't1.npy').shape == (2, 8, 12, 32)
    play(*sampling(vq2d, 'tokens', tmp_path / 't1.npy', tmp_path / 'back.nii.gz'))
    assert nib.load(tmp_path / 'back.nii.gz').shape == (32, 48, 32)

# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize('mode, output, args, words', [
    ('dream', 'o.nii', [], ['--mode=dream']),
    ('reconstruct', 'o.png', [], ['.nii or .nii.gz']),
    ('tokens', 'o.nii', [], ['.npy']),
    ('reconstruct', 'o.nii', ['--source=PD'], ["'PD'", 'T1w, T2w']),
    ('translate', 'o.nii', ['--target=FLAIR'], ["'FLAIR'"]),
    ('reconstruct', 'file/o.nii', [], ['file/o.nii', 'cannot write']),
    ('reconstruct', 'o.nii', ['--input=/nowhere.nii'], ['/nowhere.nii', 'no such file']),
    ('reconstruct', 'o.nii', ['--ckpt=/nowhere.pt'], ['/nowhere.pt', 'no such checkpoint']),
    ('tokens', 'o.nii', ['--input=FOLDER/bad.npy'], ['bad.npy'])])
def test_refusals_leave_one_line_and_no_file(neuroquant, scan, tmp_path, mode, output, args, words):
    (tmp_path / 'file').write_text('')  # a file where a folder would have to be
    np.save(tmp_path / 'bad.npy', np.full((2, 3, 2), 99))
    before = sorted(tmp_path.iterdir())
    args = [arg.replace('FOLDER', str(tmp_path)) for arg in args]
    line = refuses(*sampling(neuroquant, mode, scan, tmp_path / output, *args))
    assert all(word in line for word in words)
    assert sorted(tmp_path.iterdir()) == before

def test_a_model_without_codes_has_no_tokens(kl, scan, tmp_path):
    assert 'no tokens' in refuses(*sampling(kl, 'tokens', scan, tmp_path / 't.npy'))

@pytest.mark.parametrize('kind', ['kl', 'vq2d'])
def test_a_model_without_film_does_not_translate(kind, request, scan, tmp_path):
    checkpoint = request.getfixturevalue(kind)
    assert 'translates' in refuses(*sampling(checkpoint, 'translate', scan, tmp_path / 't.nii'))

# ---------------------------------------------------------------- weights alone, and use in Python

@pytest.mark.parametrize('ending', ['.pt', '.safetensors'])
def test_exported_weights_are_the_checkpoints_to_the_bit(kl, tmp_path, ending):
    if ending == '.safetensors':
        pytest.importorskip('safetensors')
    exported = tmp_path / f'weights{ending}'
    play('sample.py', '--mode=export', f'--ckpt={kl}', f'--output={exported}', '--device=cpu')
    before = from_checkpoint(load_checkpoint(kl))
    after = load_checkpoint(str(exported))
    assert 'optimizer' not in after
    assert tuple(after['data']['shape']) == tuple(load_checkpoint(kl)['data']['shape'])
    after = from_checkpoint(after)
    assert after.config == before.config
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name

def test_half_precision_halves_the_file(kl, tmp_path):
    sizes = []
    for dtype in ('float32', 'float16'):
        path = tmp_path / f'{dtype}.pt'
        play('sample.py', '--mode=export', f'--ckpt={kl}', f'--output={path}', f'--dtype={dtype}')
        numbers = load_checkpoint(str(path))['model'].values()
        sizes.append(sum(value.numel() * value.element_size() for value in numbers))
    assert sizes[1] == sizes[0] / 2

def test_the_codec_makes_what_reconstruct_makes(kl, scan, tmp_path):
    play(*sampling(kl, 'reconstruct', scan, tmp_path / 'script.nii'))
    codec = Codec(kl)
    volume = codec.decode(codec.encode(scan))
    assert volume.shape == tuple(codec.box['shape'])
    codec.write(str(tmp_path / 'codec.nii'), volume, like=scan)
    by_script, by_codec = values(tmp_path / 'script.nii'), values(tmp_path / 'codec.nii')
    inside = by_codec > 0.05
    slope, intercept = np.polyfit(by_codec[inside], by_script[inside], 1)  # the scan's own intensities
    np.testing.assert_allclose(by_script[inside], slope * by_codec[inside] + intercept, atol=1e-3 * slope)

def test_the_codec_takes_an_array_on_the_box(neuroquant):
    codec = Codec(neuroquant)
    tokens = codec.encode(np.random.default_rng(0).random(codec.box['shape'], np.float32))
    assert tokens.dtype == torch.int64
    assert codec.decode(tokens, 'T2w').shape == tuple(codec.box['shape'])

# ---------------------------------------------------------------- folders

@pytest.fixture
def folder(scan, tmp_path):
    """Two scans, one of them in a folder of its own, and a file that is none."""
    (tmp_path / 'scans' / 'sub-2').mkdir(parents=True)
    for name in ('sub-1_T1w.nii.gz', 'sub-2/sub-2_T1w.nii.gz'):
        shutil.copy(scan, tmp_path / 'scans' / name)
    (tmp_path / 'scans' / 'broken.nii.gz').write_bytes(b'no scan')
    return tmp_path / 'scans'

def test_a_folder_gives_what_its_scans_give_alone(kl, folder, scan, tmp_path):
    play(*sampling(kl, 'reconstruct', scan, tmp_path / 'alone.nii.gz'))
    printed = play(*sampling(kl, 'reconstruct', folder, tmp_path / 'out'))
    assert '2 of 3 scans now, 1 left out' in printed and 'broken.nii.gz' in printed
    for name in ('sub-1_T1w.nii.gz', 'sub-2/sub-2_T1w.nii.gz'):
        assert np.array_equal(values(tmp_path / 'out' / name), values(tmp_path / 'alone.nii.gz'))

def test_a_folder_goes_on_where_it_stopped(kl, folder, tmp_path):
    play(*sampling(kl, 'latents', folder, tmp_path / 'out'))
    (tmp_path / 'out' / 'sub-1_T1w.npy').unlink()
    kept = tmp_path / 'out' / 'sub-2' / 'sub-2_T1w.npy'
    written = kept.stat().st_mtime_ns
    assert '1 of 3 scans now' in play(*sampling(kl, 'latents', folder, tmp_path / 'out'))
    assert kept.stat().st_mtime_ns == written
    latent = np.load(tmp_path / 'out' / 'sub-1_T1w.npy')
    model = from_checkpoint(load_checkpoint(kl))
    expected = Codec(kl).encode(str(folder / 'sub-1_T1w.nii.gz'))
    assert latent.dtype == np.float16 and latent.shape == model.latent_shape((32, 48, 32))
    np.testing.assert_allclose(latent, expected, rtol=2e-3, atol=1e-3)

def test_a_prepared_data_set_of_other_voxels_keeps_them(neuroquant, data, tmp_path):
    other = shutil.copytree(data, tmp_path / 'other')
    facts = json.loads((other / 'dataset.json').read_text())
    (other / 'dataset.json').write_text(json.dumps(facts | {'spacing_mm': 2.0, 'voxel_mm': [2.0] * 3}))
    said = play(*sampling(neuroquant, 'reconstruct', other, tmp_path / 'rec'))
    out = nib.load(sorted((tmp_path / 'rec').glob('*.nii.gz'))[0])
    assert out.header.get_zooms() == (2.0, 2.0, 2.0)
    assert 'learned spacing_mm 1.0' in said

def test_a_prepared_data_set_gives_what_its_volumes_give(neuroquant, tmp_path):
    """Each in its own modality; tokens and latents equal the model's, and a second call makes nothing."""
    checkpoint = load_checkpoint(neuroquant)
    model, data = from_checkpoint(checkpoint), checkpoint['config']['data_dir']
    printed = play(*sampling(neuroquant, 'reconstruct', data, tmp_path / 'rec'))
    volumes = sorted(name for name in os.listdir(data) if name.endswith(('T1w.npy', 'T2w.npy')))
    names = [name.removesuffix('.npy') for name in volumes]
    assert sorted(os.listdir(tmp_path / 'rec')) == [f'{name}.nii.gz' for name in names]
    assert f'{len(names)} of {len(names)} scans now, 0 left out' in printed
    x = np.load(os.path.join(data, f'{names[1]}.npy')).astype(np.float32)
    with torch.no_grad():
        expected = model.reconstruct(torch.from_numpy(x)[None, None], names[1].rpartition('_')[2])
    expected = np.where(x > 0, expected[0, 0].clamp(0, 1).numpy(), 0)
    np.testing.assert_allclose(values(tmp_path / 'rec' / f'{names[1]}.nii.gz'), expected, atol=1e-5)
    again = play(*sampling(neuroquant, 'reconstruct', data, tmp_path / 'rec'))
    assert f'0 of {len(names)} scans now' in again
    play(*sampling(neuroquant, 'tokens', data, tmp_path / 'tokens'))
    tokens = Codec(neuroquant).encode(x)
    assert np.array_equal(np.load(tmp_path / 'tokens' / f'{names[1]}.npy'), tokens)
    play(*sampling(neuroquant, 'translate', data, tmp_path / 'translated', '--source=T2w', '--target=T1w'))
    assert all('T1w' in name for name in os.listdir(tmp_path / 'translated'))

def test_a_codec_takes_arrays_on_its_box_alone(kl):
    codec = Codec(kl)
    for array, words in ((np.zeros((8, 8, 8)), 'of shape'), (np.full((32, 48, 32), 200.0), 'scale it')):
        with pytest.raises(ValueError, match=words):
            codec.encode(array)
    codes = codec.encode(np.zeros((32, 48, 32)))
    np.testing.assert_allclose(codec.decode(codes.numpy().astype(np.float16)), codec.decode(codes), atol=5e-3)
