"""Batches: a function of (seed, rank, step), the joined batch of any number of processes, no subject in two splits."""
import ast
import json
import shutil
import time

import numpy as np
import pytest
import torch

from conftest import TINY, refused, run
from data import Sessions, augmented, open_npy, prefetch, read_index
from prepare import stored

MODALITIES = ('T1w', 'T2w')

def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)

def test_a_batch_is_a_function_of_its_place(tiny_data):
    one, two = Sessions(tiny_data, MODALITIES, 'train'), Sessions(tiny_data, MODALITIES, 'train')
    for step in (0, 3, 17):
        assert same(
            one.session_batch(2, 0, 0, 1, step, (16, 16, 16)),
            two.session_batch(2, 0, 0, 1, step, (16, 16, 16)),
        )
        assert same(one.slice_batch(8, 0, 0, 1, step), two.slice_batch(8, 0, 0, 1, step))
    assert not same(one.session_batch(2, 0, 0, 1, 0), one.session_batch(2, 1, 0, 1, 0))

@pytest.mark.parametrize('world', [2, 4])
def test_processes_together_see_the_batch_of_one(tiny_data, world):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    for step in range(3):
        whole = sessions.session_batch(4, 0, 0, 1, step, (16, 48, 16))
        parts = [
            sessions.session_batch(4 // world, 0, rank, world, step, (16, 48, 16)) for rank in range(world)
        ]
        assert torch.equal(whole['x'], torch.cat([p['x'] for p in parts]))
        assert torch.equal(whole['modality'], torch.cat([p['modality'] for p in parts]))
        n = [len(p['x']) for p in parts]
        assert [p['share'] for p in parts] == pytest.approx([world * k / sum(n) for k in n])
        pairs = [len(p['pairs']) for p in parts]
        assert [p['pair_share'] for p in parts] == pytest.approx([world * k / sum(pairs) for k in pairs])
        whole = sessions.slice_batch(32, 0, 0, 1, step)
        parts = [sessions.slice_batch(32 // world, 0, rank, world, step) for rank in range(world)]
        assert torch.equal(whole['x'], torch.cat([p['x'] for p in parts]))

def test_an_epoch_sees_every_session_once_and_missing_modalities_are_left_out(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    assert sessions.n == 8 and len(sessions.scans) == 14
    seen = [sessions.session_batch(2, 0, 0, 1, step) for step in range(4)]
    counts = np.bincount(torch.cat([b['session'] for b in seen]), minlength=8)
    assert counts.tolist() == [2, 2, 2, 1, 1, 2, 2, 2]
    for b in seen:
        for source, target in b['pairs'].tolist():
            assert (
                b['session'][source] == b['session'][target]
                and b['modality'][source] != b['modality'][target]
            )

def test_patches_of_a_session_come_from_one_place(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    for step in range(4):
        b = sessions.session_batch(2, 0, 0, 1, step, (16, 16, 16))
        assert b['x'].shape[1:] == (1, 16, 16, 16)
        for source, target in b['pairs'].tolist():  # T2w of the made volumes is 1 - T1w inside the brain
            inside = b['x'][source] > 0
            torch.testing.assert_close(b['x'][target][inside], 1 - b['x'][source][inside])
    assert sessions.session_batch(1, 0, 0, 1, 0, (999, 16, 999))['x'].shape[2:] == (32, 16, 32)

def test_slices_are_of_one_plane_hold_brain_and_all_planes_come(tiny_data):
    sessions, planes = Sessions(tiny_data, MODALITIES, 'train'), set()
    for step in range(12):
        x = sessions.slice_batch(16, 0, 0, 1, step)['x']
        axis = [n == 1 for n in x.shape[2:]].index(True)
        assert x.shape[2:] == tuple(1 if a == axis else n for a, n in enumerate((32, 48, 32)))
        assert ((x > 0).flatten(1).float().mean(1) >= 0.02).all()
        planes.add(axis)
    assert planes == {0, 1, 2}

def test_slices_are_slices_of_the_files(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    b = sessions.slice_batch(16, 0, 0, 1, 0)
    axis = 2 + list(b['x'].shape[2:]).index(1)
    files = [np.load(tiny_data / sessions.rows[i][MODALITIES[m]]) for i, m in sessions.scans]
    for x in b['x'].squeeze(axis)[:, 0].numpy():
        assert any((np.moveaxis(f, axis - 2, 0) == x).all((1, 2)).any() for f in files)

def test_prefetch_keeps_the_order_and_passes_errors_on():
    def slow_at_first(step):
        time.sleep(0.05 if step == 0 else 0)
        return {'n': step}
    assert [b['n'] for b in prefetch(slow_at_first, range(7), 'cpu')] == list(range(7))
    def fail(step):
        raise SystemExit('file gone')
    with pytest.raises(SystemExit, match='file gone'):
        next(prefetch(fail, range(3), 'cpu'))

def test_volumes_are_opened_without_a_parser(tmp_path, monkeypatch):
    rng, shape = np.random.default_rng(0), (4, 5, 6)
    for dtype in (np.float32, np.float16, np.uint8, np.int16):
        np.save(tmp_path / f'{np.dtype(dtype)}.npy', (100 * rng.random(shape)).astype(dtype))
    np.save(tmp_path / 'double.npy', rng.random(shape)), np.save(
        tmp_path / 'other.npy', np.ones((2, 4, 5, 6), np.float16)
    )
    (tmp_path / 'short.npy').write_bytes((tmp_path / 'float32.npy').read_bytes()[:-1]), (
        tmp_path / 'empty.npy'
    ).write_bytes(b'')
    plain = {p.stem: np.load(p) for p in tmp_path.glob('*.npy') if p.stem not in ('short', 'empty')}
    # what prepare.py never writes goes the slow way
    assert np.array_equal(open_npy(tmp_path / 'double.npy', shape), plain.pop('double'))
    monkeypatch.setattr(ast, 'literal_eval', None)
    for name, array in plain.items():
        found = open_npy(tmp_path / f'{name}.npy', shape, (2, *shape))
        assert isinstance(found, np.memmap) and found.dtype == array.dtype and np.array_equal(found, array)
    for name in ('short', 'empty', 'missing'):
        with pytest.raises((OSError, EOFError, ValueError)):
            open_npy(tmp_path / f'{name}.npy', shape)

def test_a_subject_in_two_splits_stops_with_its_name(tiny_data):
    table = tiny_data / 'subjects.tsv'
    table.write_text(table.read_text().replace('sub-11\tses-01\ttest', 'sub-01\tses-02\ttest'))
    with pytest.raises(SystemExit, match='sub-01 is in two splits'):
        read_index(tiny_data, MODALITIES)
    assert refused(
        run('train_vae.py', *TINY, f'--data_dir={tiny_data}', f'--out_dir={tiny_data}/out'),
        'sub-01',
        'two splits',
    )

def test_index_refusals_name_folder_and_reason(tiny_data, tmp_path):
    with pytest.raises(SystemExit, match='nowhere.*prepare.py'):
        read_index(str(tmp_path / 'nowhere'), MODALITIES)
    with pytest.raises(SystemExit, match='no volume of modality FLAIR; it has T1w, T2w'):
        read_index(tiny_data, ('FLAIR',))
    with pytest.raises(SystemExit, match="split 'other'"):
        read_index(tiny_data, MODALITIES, 'other')
    (tiny_data / 'dataset.json').write_text('{')
    with pytest.raises(SystemExit, match='dataset.json'):
        read_index(tiny_data, MODALITIES)

def test_a_spoilt_volume_is_named(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    path = tiny_data / sessions.rows[0]['T1w']
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SystemExit, match=path.name):
        sessions.volume(0, 0)
    np.save(path, np.zeros((4, 4, 4), np.float32))
    with pytest.raises(SystemExit, match=r'\(4, 4, 4\).*\(32, 48, 32\)'):
        sessions.volume(0, 0)

def test_scan_batches_are_single_scans_and_a_function_of_their_place(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    for augment in (False, True):
        whole = sessions.scan_batch(4, 0, 0, 1, 2, (16, 48, 16), augment)
        parts = [sessions.scan_batch(2, 0, rank, 2, 2, (16, 48, 16), augment) for rank in range(2)]
        assert torch.equal(whole['x'], torch.cat([p['x'] for p in parts])) and whole['x'].shape == (
            4, 1, 16, 48, 16
        )
    seen = torch.cat([sessions.scan_batch(2, 0, 0, 1, step)['modality'] for step in range(7)])
    assert np.bincount(seen).tolist() == [7, 7]  # fourteen scans, each once an epoch

def test_augmented_volumes_stay_images_with_a_background_of_zero(tiny_data):
    volume = np.asarray(Sessions(tiny_data, MODALITIES, 'train').volume(0, 0))
    variant = lambda seed, start=(0, 0, 0), size=volume.shape: augmented(
        volume, list(start), size, np.random.default_rng(seed)
    )
    images = [variant(seed) for seed in range(60)]
    for x in images:
        assert x.shape == volume.shape and x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
        assert (x == 0).mean() == pytest.approx((volume == 0).mean(), abs=0.2)
    flips = [np.array_equal(x, volume[::-1]) for x in images]
    assert any(flips) and not all(flips) and sum(np.array_equal(x, volume) for x in images) < 20
    for seed, x in enumerate(images):  # a patch is that part of the whole
        np.testing.assert_allclose(variant(seed, (5, 9, 3), (16, 32, 16)), x[5:21, 9:41, 3:19], atol=1e-6)

def test_slices_across_a_given_axis(tiny_data):
    sessions = Sessions(tiny_data, MODALITIES, 'train')
    assert {sessions.slice_batch(4, 0, 0, 1, step, axis=1)['x'].shape for step in range(6)} == {
        (4, 1, 32, 1, 32)
    }

# ---------------------------------------------------------------- several data sets, storage

def copy_of(folder, new, sessions):
    """A data set with only some sessions of the split 'train'."""
    shutil.copytree(folder, new)
    head, *lines = (new / 'subjects.tsv').read_text().splitlines()
    (new / 'subjects.tsv').write_text(
        '\n'.join([head, *lines[:sessions], *[line for line in lines if '\ttrain\t' not in line]]) + '\n'
    )
    return new

def test_temperature_draws_small_data_sets_and_rare_modalities_more_often(tiny_data, tmp_path):
    small = copy_of(tiny_data, tmp_path / 'small', 2)
    (small / 'subjects.tsv').write_text(
        (small / 'subjects.tsv').read_text().replace('sub-01_ses-01_T2w.npy', '')
    )
    both = f'{tiny_data},{small}'
    for temperature, share in ((1.0, 2 / 10), (2.0, 2 ** 0.5 / (2 ** 0.5 + 8 ** 0.5)), (1e9, 0.5)):
        sessions = Sessions(both, MODALITIES, 'train', temperature)
        drawn = [sessions.rows[sessions.choose(sessions.session_groups, p, 0)]['folder'] for p in range(3000)]
        assert drawn.count(str(small)) / 3000 == pytest.approx(share, abs=0.03)
    scans = [sessions.scans[sessions.choose(sessions.scan_groups, p, 0)] for p in range(3000)]
    # one of 17 scans
    assert sum(m == 1 and sessions.rows[i]['folder'] == str(small) for i, m in scans) / 3000 == pytest.approx(
        0.25, abs=0.03
    )
    assert set(sessions.session_batch(2, 0, 0, 1, 0)) == set(
        Sessions(tiny_data, MODALITIES, 'train').session_batch(2, 0, 0, 1, 0)
    )

def test_data_sets_of_different_boxes_are_refused(tiny_data, tmp_path):
    other = copy_of(tiny_data, tmp_path / 'other', 2)
    facts = json.loads((other / 'dataset.json').read_text())
    (other / 'dataset.json').write_text(json.dumps(facts | {'spacing_mm': 2.0}))
    with pytest.raises(SystemExit, match='other: made with spacing_mm 2.0, .* with 1.0'):
        Sessions(f'{tiny_data},{other}', MODALITIES, 'train')

def test_eight_bit_volumes_come_back_within_half_a_step_and_keep_their_mask(tiny_data):
    plain = Sessions(tiny_data, MODALITIES, 'train')
    before = [
        plain.session_batch(2, 0, 0, 1, 0)['x'],
        plain.scan_batch(2, 0, 0, 1, 0, (16, 16, 16))['x'],
        plain.slice_batch(8, 0, 0, 1, 0)['x'],
        torch.tensor(plain.volume(0, 0)),
    ]
    for path in tiny_data.glob('*.npy'):
        np.save(path, stored(np.load(path), 'uint8'))
    small = Sessions(tiny_data, MODALITIES, 'train')
    after = [
        small.session_batch(2, 0, 0, 1, 0)['x'],
        small.scan_batch(2, 0, 0, 1, 0, (16, 16, 16))['x'],
        small.slice_batch(8, 0, 0, 1, 0)['x'],
        torch.tensor(small.volume(0, 0)),
    ]
    for a, b in zip(before, after):
        assert b.dtype == torch.float32 and ((a > 0) == (b > 0)).all()
        assert (a - b).abs()[a > 1 / 255].max() <= 0.5 / 255 + 1e-6 and (a - b).abs().max() <= 1 / 255
    assert (stored(np.array([0, 1e-4, 1.0]), 'uint8') == [0, 1, 255]).all()
