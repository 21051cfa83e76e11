"""Batches are a function of (seed, step); processes share the batch of one; no subject is in two splits."""
import contextlib
import json
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from conftest import TINY, play, refuses
from data import (
    Sessions, augmented, generators, open_npy, prefetch, random, read_index, to_device, torch_seed)
from prepare import stored
from resume import fingerprint
from scans.nifti import scale_intensity
from synth import GROUPS, deformed, redraw, scale_like_prepared, smooth_fields

MODALITIES = ('T1w', 'T2w')
PATCH = (16, 48, 16)

def sessions_of(folder, seed=0, rank=0, world=1):
    return Sessions(folder, MODALITIES, 'train', seed=seed, rank=rank, world=world)

def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key], key

# ---------------------------------------------------------------- which scans are drawn

def test_a_batch_is_a_function_of_seed_and_step(tiny_data):
    one = sessions_of(tiny_data)
    two = sessions_of(tiny_data)
    for step in (0, 3, 17):
        assert_same_batch(one.session_batch(step, 2, PATCH), two.session_batch(step, 2, PATCH))
        assert_same_batch(one.scan_batch(step, 2, PATCH, True), two.scan_batch(step, 2, PATCH, True))
        assert_same_batch(one.slice_batch(step, 8), two.slice_batch(step, 8))

def test_another_seed_draws_other_scans(tiny_data):
    one = sessions_of(tiny_data)
    other = sessions_of(tiny_data, seed=1)
    files = [one.session_batch(step, 2)['files'] for step in range(4)]
    assert files != [other.session_batch(step, 2)['files'] for step in range(4)]

@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('step', [0, 1, 2])
def test_processes_together_see_the_batch_of_one(tiny_data, world, step):
    whole = sessions_of(tiny_data)
    ranks = [sessions_of(tiny_data, rank=rank, world=world) for rank in range(world)]
    for kind, size, args in (('session', 4, (PATCH,)), ('scan', 4, (PATCH,)), ('scan', 4, (PATCH, True)),
                             ('slice', 32, ())):
        batch = getattr(whole, f'{kind}_batch')(step, size, *args)
        parts = [getattr(rank, f'{kind}_batch')(step, size // world, *args) for rank in ranks]
        for key in ('x', 'modality'):
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))

@pytest.mark.parametrize('world', [2, 4])
def test_the_shares_of_processes_weigh_scans_and_pairs_as_one_process_would(tiny_data, world):
    ranks = [sessions_of(tiny_data, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        parts = [r.session_batch(step, 4 // world, PATCH) for r in ranks]
        for share, items in (('share', 'x'), ('pair_share', 'pairs')):
            counts = np.array([len(part[items]) for part in parts])
            assert [part[share] for part in parts] == pytest.approx(world * counts / counts.sum())

def test_the_shares_of_micro_steps_weigh_scans_as_one_batch_would(tiny_data):
    sessions = sessions_of(tiny_data)
    for first in (0, 2, 4, 6):
        parts = [sessions.session_batch(step, 1, PATCH, micro_steps=2) for step in (first, first + 1)]
        for share, items in (('share', 'x'), ('pair_share', 'pairs')):
            counts = np.array([len(part[items]) for part in parts])
            assert [part[share] for part in parts] == pytest.approx(2 * counts / counts.sum())

def test_an_epoch_sees_every_session_once_and_missing_modalities_are_left_out(tiny_data):
    sessions = sessions_of(tiny_data)
    assert sessions.n == 8 and len(sessions.scans) == 14
    drawn = torch.cat([sessions.session_batch(step, 2)['session'] for step in range(4)])
    assert np.bincount(drawn, minlength=8).tolist() == [2, 2, 2, 1, 1, 2, 2, 2]

def test_an_epoch_of_single_scans_sees_every_scan_once(tiny_data):
    sessions = sessions_of(tiny_data)
    drawn = torch.cat([sessions.scan_batch(step, 2)['modality'] for step in range(7)])
    assert np.bincount(drawn).tolist() == [7, 7]

def test_pairs_are_two_modalities_of_one_session(tiny_data):
    sessions = sessions_of(tiny_data)
    for step in range(4):
        batch = sessions.session_batch(step, 2)
        for source, target in batch['pairs'].tolist():
            assert batch['session'][source] == batch['session'][target]
            assert batch['modality'][source] != batch['modality'][target]

def test_temperature_draws_small_data_sets_more_often(tiny_data, tmp_path):
    small = copy_of(tiny_data, tmp_path / 'small', 2)
    for temperature, share in ((1.0, 2 / 10), (2.0, 2 ** 0.5 / (2 ** 0.5 + 8 ** 0.5)), (1e9, 0.5)):
        sessions = Sessions(f'{tiny_data},{small}', MODALITIES, 'train', temperature)
        drawn = [sessions.choose(sessions.session_groups, position) for position in range(3000)]
        folders = [sessions.rows[i]['folder'] for i in drawn]
        assert folders.count(str(small)) / 3000 == pytest.approx(share, abs=0.03)

def test_temperature_draws_rare_modalities_more_often(tiny_data, tmp_path):
    small = copy_of(tiny_data, tmp_path / 'small', 2)
    replace(small / 'subjects.tsv', 'sub-01_ses-01_T2w.npy', '')
    sessions = Sessions(f'{tiny_data},{small}', MODALITIES, 'train', 1e9)
    drawn = [sessions.scans[sessions.choose(sessions.scan_groups, position)] for position in range(3000)]
    rare = [m == 1 and sessions.rows[i]['folder'] == str(small) for i, m in drawn]
    assert np.mean(rare) == pytest.approx(1 / 4, abs=0.03)  # one of 17 scans, one of four groups

def test_a_batch_of_several_data_sets_looks_like_one_of_one(tiny_data, tmp_path):
    small = copy_of(tiny_data, tmp_path / 'small', 2)
    both = Sessions(f'{tiny_data},{small}', MODALITIES, 'train', 2.0)
    assert both.session_batch(0, 2).keys() == sessions_of(tiny_data).session_batch(0, 2).keys()

# ---------------------------------------------------------------- patches, slices, augmentation

def test_patches_of_a_session_come_from_one_position(tiny_data):
    sessions = sessions_of(tiny_data)
    for step in range(4):
        batch = sessions.session_batch(step, 2, (16, 16, 16))
        assert batch['x'].shape[1:] == (1, 16, 16, 16)
        for source, target in batch['pairs'].tolist():  # T2w of the made volumes is 1 - T1w inside the brain
            inside = batch['x'][source] > 0
            torch.testing.assert_close(batch['x'][target][inside], 1 - batch['x'][source][inside])

def test_a_patch_larger_than_the_volume_is_the_volume(tiny_data):
    assert sessions_of(tiny_data).session_batch(0, 1, (999, 16, 999))['x'].shape[2:] == (32, 16, 32)

def test_slices_are_of_one_plane_hold_brain_and_all_planes_come(tiny_data):
    sessions = sessions_of(tiny_data)
    planes = set()
    for step in range(12):
        x = sessions.slice_batch(step, 16)['x']
        axis = [n == 1 for n in x.shape[2:]].index(True)
        assert x.shape[2:] == tuple(1 if a == axis else n for a, n in enumerate((32, 48, 32)))
        assert ((x > 0).flatten(1).float().mean(1) >= 0.02).all()
        planes.add(axis)
    assert planes == {0, 1, 2}

def test_slices_across_a_given_axis(tiny_data):
    sessions = sessions_of(tiny_data)
    assert {sessions.slice_batch(step, 4, axis=1)['x'].shape for step in range(6)} == {(4, 1, 32, 1, 32)}

def test_slices_are_slices_of_the_files(tiny_data):
    sessions = sessions_of(tiny_data)
    x = sessions.slice_batch(0, 16)['x']
    axis = list(x.shape[2:]).index(1)
    volumes = [np.load(tiny_data / sessions.rows[i][MODALITIES[m]]) for i, m in sessions.scans]
    slices = np.concatenate([np.moveaxis(volume, axis, 0) for volume in volumes])
    for image in x.squeeze(2 + axis)[:, 0].numpy():
        assert (slices == image).all((1, 2)).any()

def variant(volume, seed, start=(0, 0, 0), size=None):
    return augmented(volume, list(start), size or volume.shape, np.random.default_rng(seed))

def test_augmented_volumes_stay_images_with_a_background_of_zero(tiny_data):
    volume = np.asarray(sessions_of(tiny_data).volume(0, 0))
    for seed in range(60):
        x = variant(volume, seed)
        assert x.shape == volume.shape and x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
        assert (x == 0).mean() == pytest.approx((volume == 0).mean(), abs=0.2)

def test_some_augmented_volumes_are_flips_and_most_are_changed(tiny_data):
    volume = np.asarray(sessions_of(tiny_data).volume(0, 0))
    images = [variant(volume, seed) for seed in range(60)]
    flips = [np.array_equal(x, volume[::-1]) for x in images]
    assert any(flips) and not all(flips)
    assert sum(np.array_equal(x, volume) for x in images) < 20

def test_an_augmented_patch_is_that_part_of_the_augmented_whole(tiny_data):
    """The part is on the other side where the whole is flipped, so that a patch of brain stays one."""
    volume = np.asarray(sessions_of(tiny_data).volume(0, 0))
    size = (16, 32, 16)
    sides = {5: 0, len(volume) - 16 - 5: 0}  # where a patch that was cut at 5 lies in the whole
    for seed in range(60):
        patch, whole = variant(volume, seed, (5, 9, 3), size), variant(volume, seed)
        here = [side for side in sides if np.allclose(patch, whole[side:side + 16, 9:41, 3:19], atol=1e-6)]
        assert len(here) == 1
        flipped = np.random.default_rng(seed).random() < 0.5  # its first number
        assert flipped == (here[0] != 5)
        sides[here[0]] += 1
    assert min(sides.values()) > 10

# ---------------------------------------------------------------- images drawn anew

def test_what_was_prepared_without_clipping_is_not_clipped():
    volume = np.full((8, 8, 8), 1.3, np.float32)
    highest = [augmented(volume, [0, 0, 0], volume.shape, random(k), None).max() for k in range(50)]
    assert max(highest) > 1.2
    assert max(variant(volume, seed).max() for seed in range(50)) == 1

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Prepared phantoms with their label maps."""
    folder = tmp_path_factory.mktemp('drawn') / 'data'
    play('prepare.py', '--source=phantom', '--n=6', '--shape=32,48,32', '--split=1,0,0', '--workers=1',
         '--modalities=T1w,T2w', f'--out_dir={folder}')
    return sessions_of(folder)

def test_white_matter_drawn_anew_is_as_bright_as_prepared(drawn):
    """Scaled by the upper percentile alone, it was 0.355 in T2w where prepare.py makes 0.095."""
    batch = drawn.session_batch(0, 4, labels=True)
    new = redraw(batch, MODALITIES, 1.0, 0, drawn.box)
    assert not torch.equal(new, batch['x'])
    for m in range(2):
        rows = batch['modality'] == m
        white = torch.isin(batch['labels'][rows], torch.tensor(GROUPS['white']))
        prepared = batch['x'][rows][white].mean().item()
        assert new[rows][white].mean().item() == pytest.approx(prepared, abs=0.06)

@pytest.mark.parametrize('how', [
    dict(), dict(percentiles=(0, 99.5), percentiles_of='volume'), dict(percentiles=(5, 90), clip=False)])
def test_images_drawn_anew_are_scaled_as_prepared_ones(how):
    image = 7 + 100 * np.random.default_rng(0).random((30, 32, 34), np.float32)
    mask = np.zeros(image.shape, bool)
    mask[5:25, 5:25, 5:25] = True
    image[~mask] = 0
    options = {'of' if key == 'percentiles_of' else key: value for key, value in how.items()}
    want, _, _ = scale_intensity(image, mask, **options)
    scaled = scale_like_prepared(torch.from_numpy(image), torch.from_numpy(mask), **how)
    np.testing.assert_allclose(scaled.numpy(), want, atol=0.02)

def test_a_patch_drawn_anew_is_that_part_of_the_volume(drawn):
    """Percentiles of a patch are not those of its volume."""
    whole = drawn.session_batch(0, 2, labels=True)
    patch = drawn.session_batch(0, 2, (16, 16, 16), labels=True)
    volumes = redraw(whole, MODALITIES, 1.0, 0, drawn.box)
    patches = redraw(patch, MODALITIES, 1.0, 0, drawn.box)
    for volume, image, (d, h, w) in zip(volumes, patches, patch['starts']):
        assert torch.equal(image, volume[:, d:d + 16, h:h + 16, w:w + 16])

def test_volumes_of_a_session_are_drawn_of_one_deformed_map(drawn):
    """Where there is brain is the same in T1w and T2w, and no longer that of the stored map."""
    batch = drawn.session_batch(0, 3, labels=True)
    x = redraw(batch, MODALITIES, 0.0, 0, drawn.box, deform=1.0)
    brain, before = x > 0, batch['x'] > 0
    for source, target in batch['pairs'].tolist():
        assert torch.equal(brain[source], brain[target])
    changed = (brain != before).flatten(1).float().mean(1)
    assert changed.min() > 0.01 and changed.max() < 0.3

def test_half_of_the_sessions_are_deformed_and_the_rest_untouched(drawn):
    batch = drawn.session_batch(0, 40, labels=True)
    x = redraw(batch, MODALITIES, 0.0, 0, drawn.box, deform=0.5)
    new = (x != batch['x']).flatten(1).any(1)
    assert 0.25 < new.float().mean() < 0.75
    for source, target in batch['pairs'].tolist():
        assert new[source] == new[target]

def test_a_deformation_is_near_the_identity_and_keeps_the_labels(drawn):
    labels = torch.from_numpy(drawn.labels(0).astype(np.int64))
    g = torch.Generator().manual_seed(0)
    moved = deformed(labels, g, (5.25, 4.54, 5.25))
    assert set(moved.unique().tolist()) <= set(labels.unique().tolist())
    assert 0.75 < ((moved > 0) == (labels > 0)).float().mean() < 0.995
    volumes = (moved > 0).sum() / (labels > 0).sum()
    assert 0.7 < volumes < 1.4

@pytest.mark.parametrize('voxel_mm', [(1.0, 1.0, 1.0), (1.0, 0.8, 1.25)])
def test_a_turned_ball_is_a_ball_in_a_box_of_any_shape(voxel_mm):
    lines = [mm * (np.arange(n) - (n - 1) / 2) for n, mm in zip((40, 60, 50), voxel_mm)]
    grid = np.stack(np.meshgrid(*lines, indexing='ij'))
    ball = torch.from_numpy((np.square(grid).sum(0) < 15 ** 2).astype(np.int64))
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        turned = deformed(ball, g, voxel_mm, degrees=30.0, scale=0.0, warp_mm=0.0)
        assert (turned != ball).sum() < 0.08 * ball.sum()  # all at its surface

def test_a_scaled_ball_grows_as_its_scales_say():
    lines = [np.arange(n) - (n - 1) / 2 for n in (60, 70, 50)]
    grid = np.stack(np.meshgrid(*lines, indexing='ij'))
    ball = torch.from_numpy((np.square(grid).sum(0) < 15 ** 2).astype(np.int64))
    for seed in range(5):
        normal = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)[1]
        g = torch.Generator().manual_seed(seed)
        scaled = deformed(ball, g, (1.0, 1.0, 1.0), degrees=0.0, scale=0.1, warp_mm=0.0)
        for axis in range(3):
            others = [k for k in range(3) if k != axis]
            width = scaled.amax(others).sum().item()
            assert width == pytest.approx(30 * np.exp(-0.1 * normal[axis].item()), abs=1.5)

def test_smooth_fields_have_the_standard_deviation_1():
    g = torch.Generator().manual_seed(0)
    fields = torch.stack([smooth_fields(3, (30, 40, 20), g, 'cpu') for _ in range(20)])
    assert fields.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)

def test_draws_depend_on_the_seed_of_the_run(drawn):
    """A CPU's generator reads 32 bits of a seed: shifted beyond them, the run's own was lost."""
    batch = drawn.session_batch(0, 2, labels=True)
    one, other = (redraw(batch, MODALITIES, 1.0, seed, drawn.box) for seed in (0, 1))
    assert not torch.equal(one, other)
    noise = [torch.randn(3, generator=generators(batch, seed, 0)[0]) for seed in (0, 1)]
    assert not torch.equal(*noise)
    assert len({torch_seed(seed, 20, k) for seed in range(10) for k in range(100)}) == 1000

# ---------------------------------------------------------------- reading

def test_prefetch_keeps_the_order():
    def slow_at_first(step):
        time.sleep(0.05 if step == 0 else 0)
        return {'n': step}
    assert [batch['n'] for batch in prefetch(slow_at_first, range(7), 'cpu')] == list(range(7))

def test_a_gpu_copies_batches_in_a_stream_of_their_own(monkeypatch):
    """Stand-ins for streams say in which order things happen."""
    happened = []
    copies, current = SimpleNamespace(), SimpleNamespace(wait_stream=lambda other: happened.append(other))
    @contextlib.contextmanager
    def stream(chosen):
        assert chosen is copies
        happened.append('copies begin')
        yield
        happened.append('copies are queued')
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: current)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda x, reader: happened.append((x.item(), reader)))
    batch = {'x': torch.tensor(1), 'cond': {'vectors': [torch.tensor(2)]}, 'sample_index': torch.tensor(3)}
    assert to_device(batch, 'cpu', copies) == batch
    assert happened == ['copies begin', 'copies are queued', copies, (1, current), (2, current)]

def test_prefetch_passes_errors_on():
    def fail(step):
        raise SystemExit('file gone')
    with pytest.raises(SystemExit, match='file gone'):
        next(prefetch(fail, range(3), 'cpu'))

def test_files_are_opened_one_at_a_time(tmp_path, monkeypatch):
    """numpy reads headers with Python's parser, which some versions crash in when two threads use it."""
    np.save(tmp_path / 'a.npy', np.arange(24.0).reshape(2, 3, 4))
    load = np.load
    inside = []
    def slow_load(*args, **kwargs):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        array = load(*args, **kwargs)
        inside.pop()
        return array
    monkeypatch.setattr(data.np, 'load', slow_load)
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(open_npy(tmp_path / 'a.npy'))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8
    for array in opened:
        assert isinstance(array, np.memmap) and np.array_equal(array, np.arange(24.0).reshape(2, 3, 4))

def test_a_spoilt_volume_is_named(tiny_data):
    sessions = sessions_of(tiny_data)
    path = tiny_data / sessions.rows[0]['T1w']
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SystemExit, match=path.name):
        sessions.volume(0, 0)

def test_a_volume_of_another_size_is_named_with_both_sizes(tiny_data):
    sessions = sessions_of(tiny_data)
    np.save(tiny_data / sessions.rows[0]['T1w'], np.zeros((4, 4, 4), np.float32))
    with pytest.raises(SystemExit, match=r'\(4, 4, 4\).*\(32, 48, 32\)'):
        sessions.volume(0, 0)

def first_batches(folder):
    sessions = sessions_of(folder)
    return [sessions.session_batch(0, 2)['x'], sessions.scan_batch(0, 2, (16, 16, 16))['x'],
            sessions.slice_batch(0, 8)['x'], torch.tensor(sessions.volume(0, 0))]

def test_eight_bit_volumes_come_back_within_half_a_step_and_keep_their_mask(tiny_data):
    before = first_batches(tiny_data)
    for path in tiny_data.glob('*.npy'):
        np.save(path, stored(np.load(path), 'uint8'))
    for a, b in zip(before, first_batches(tiny_data)):
        assert b.dtype == torch.float32 and ((a > 0) == (b > 0)).all()
        error = (a - b).abs()
        assert error[a > 1 / 255].max() <= 0.5 / 255 + 1e-6 and error.max() <= 1 / 255

def test_the_faintest_brain_stays_brain_in_eight_bits():
    assert (stored(np.array([0, 1e-4, 1.0]), 'uint8') == [0, 1, 255]).all()

# ---------------------------------------------------------------- the index

def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))

def copy_of(folder, new, n):
    """A data set with only the first n sessions, and those outside of the split 'train'."""
    shutil.copytree(folder, new)
    head, *lines = (new / 'subjects.tsv').read_text().splitlines()
    others = [line for line in lines if '\ttrain\t' not in line]
    (new / 'subjects.tsv').write_text('\n'.join([head, *lines[:n], *others]) + '\n')
    return new

def test_a_subject_in_two_splits_stops_with_its_name(tiny_data):
    replace(tiny_data / 'subjects.tsv', 'sub-11\tses-01\ttest', 'sub-01\tses-02\ttest')
    with pytest.raises(SystemExit, match='sub-01 is in two splits'):
        read_index(tiny_data, MODALITIES)
    line = refuses('train_vae.py', *TINY, f'--data_dir={tiny_data}', f'--out_dir={tiny_data}/out')
    assert 'sub-01' in line and 'two splits' in line

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

def test_data_sets_of_different_boxes_are_refused(tiny_data, tmp_path):
    other = copy_of(tiny_data, tmp_path / 'other', 2)
    facts = json.loads((other / 'dataset.json').read_text())
    (other / 'dataset.json').write_text(json.dumps(facts | {'spacing_mm': 2.0}))
    with pytest.raises(SystemExit, match='other: made with spacing_mm 2.0, .* with 1.0'):
        Sessions(f'{tiny_data},{other}', MODALITIES, 'train')

@pytest.mark.parametrize('second, names', [
    ('other', {'data/sub-00', 'other/sub-00', 'sub-01'}),
    ('again/data', {'{first}/sub-00', '{second}/sub-00', 'sub-01'})])
def test_equal_subjects_of_two_folders_are_two_people(tiny_data, tmp_path, second, names):
    """Volumes keep their names, and a resumed run still knows the data."""
    before = fingerprint(f'{tiny_data}')
    (tmp_path / second).parent.mkdir(exist_ok=True)
    other = copy_of(tiny_data, tmp_path / second, 1)
    index = other / 'subjects.tsv'
    index.write_text('\n'.join(index.read_text().splitlines()[:2]) + '\n')
    both = f'{tiny_data},{other}'
    rows, _ = read_index(both, MODALITIES, 'train')
    wanted = {name.format(first=tiny_data, second=other) for name in names}
    assert wanted <= {row['subject'] for row in rows} and len({row['subject'] for row in rows}) == 9
    assert [row['T1w'] for row in rows if row['subject'].endswith('sub-00')] == 2 * ['sub-00_ses-01_T1w.npy']
    checksums = fingerprint(both)
    assert {name: checksums[f'data set 1: {name}'] for name in before} == before

def test_a_session_has_the_voxels_of_its_own_data_set(tiny_data, tmp_path):
    """With resize each data set has its own."""
    other = copy_of(tiny_data, tmp_path / 'other', 100)
    for folder, mm in ((tiny_data, 1.0), (other, 1.3)):
        facts = json.loads((folder / 'dataset.json').read_text())
        (folder / 'dataset.json').write_text(json.dumps(facts | {'voxel_mm': [mm] * 3}))
    rows, _ = read_index(f'{tiny_data},{other}', MODALITIES)
    assert {(row['folder'], *row['voxel_mm']) for row in rows} == {
        (str(tiny_data), 1.0, 1.0, 1.0), (str(other), 1.3, 1.3, 1.3)}

def test_subjects_of_one_folder_keep_their_names(tiny_data):
    assert read_index(tiny_data, MODALITIES)[0][0]['subject'] == 'sub-00'

# ---------------------------------------------------------------- patches inside the brain

@pytest.mark.parametrize('batch', ['scan_batch', 'session_batch'])
def test_the_centres_of_brain_patches_are_brain(tiny_data, batch):
    sessions = Sessions(tiny_data, MODALITIES, 'train', brain_patches=1.0)
    for step in range(20):
        x = getattr(sessions, batch)(step, 2, (8, 8, 8))['x']
        first_of_session = x[:1]  # a patch lies where the session's first scan has brain
        assert (first_of_session[:, 0, 4, 4, 4] > 0).all()

def test_the_share_of_brain_patches_is_as_said(tiny_data):
    def share_in_brain(brain_patches):
        sessions = Sessions(tiny_data, MODALITIES, 'train', brain_patches=brain_patches)
        batch = sessions.scan_batch(0, 400, (8, 8, 8))
        return (batch['x'][:, 0, 4, 4, 4] > 0).float().mean().item()
    anywhere = share_in_brain(0.0)
    assert anywhere < 0.9
    half = share_in_brain(0.5)
    assert abs(half - (1 + anywhere) / 2) < 0.08

def test_where_nobody_is_for_testing_the_validation_split_is_suggested(tiny_data):
    index = tiny_data / 'subjects.tsv'
    index.write_text(index.read_text().replace('\ttest\t', '\ttrain\t'))
    with pytest.raises(SystemExit, match="in split 'test'; --split=val has some"):
        Sessions(tiny_data, ('T1w',), 'test')
