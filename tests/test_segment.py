"""SynthSeg's surroundings with a network whose answer is known, and segmenters that are commands."""
import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import save_checkpoint
from conftest import make_tiny_data
from data import Sessions
from judge import segment, small_segmenter
from judge.anatomy import (
    MERGED, RIGHT, SIDED_NAMES, Segmentation, compare_labels, generated_rows, structure_volumes)
from judge.report import generated_table
from judge.segment import (
    CommandSegmenter, SynthSegSegmenter, clean_posteriors, largest_part, make_segmenter)
from judge.small_segmenter import blurred, held_out_dice, learn, learn_once
from pretrained import SYNTHSEG_LABELS
from test_nifti import store
from test_pretrained import synthseg_file

# ---------------------------------------------------------------- labels

def test_every_label_has_a_name():
    named = {label for labels in MERGED.values() for label in labels}
    assert named == set(SYNTHSEG_LABELS) - {0} == SIDED_NAMES.keys()

def test_right_labels_are_synthsegs():
    assert set(RIGHT.values()) <= set(SYNTHSEG_LABELS)

def test_a_map_compared_with_itself_has_a_dice_of_1_and_equal_volumes():
    labels = np.zeros((8, 8, 8), np.int16)
    labels[:4], labels[4:6] = 11, 50
    scan = compare_labels(Segmentation(labels), Segmentation(labels), 2.0)
    assert scan['dice'] == {'left caudate': 1.0, 'right caudate': 1.0}
    assert scan['mm3'] == scan['mm3_truth']
    assert scan['mm3']['caudate'] == 8 * 6 * 64

def by_brightness(volume, spacing_mm):
    return Segmentation(np.where(volume > 0.5, 11, 0).astype(np.int16))

def test_volumes_of_generated_brains_stand_beside_the_real_ones(tmp_path):
    for k, bright in enumerate((10, 30)):
        volume = np.zeros((8, 8, 8), np.float32)
        volume.flat[:bright] = 1
        store(str(tmp_path / f'sample_{k:03d}_T1w.nii.gz'), volume)
    real = {name: 5.0 * (name == 'caudate') for name in MERGED}
    run = SimpleNamespace(name='x', modalities=('T1w', 'T2w'), generated=str(tmp_path),
                          sessions=SimpleNamespace(voxel_mm=2.0),
                          anatomy={'T1w': [{'mm3_truth': real}], 'T2w': []})
    first, second = generated_rows([run], by_brightness, 'voxels')
    assert first['generated']['caudate'] == [80, 240] and first['real']['caudate'] == [5]
    assert first['generated']['thalamus'] == [0, 0]
    assert second['reason'] == 'no T2w scan'
    text = '\n'.join(generated_table([first, second], 'voxels'))
    assert '| x | T1w | caudate | 0.01 (1) | 0.16 +- 0.11 (2) |' in text
    assert 'thalamus' not in text

# ---------------------------------------------------------------- post-processing

def test_the_largest_part_is_kept():
    mask = np.zeros((8, 8, 8), bool)
    mask[0:2, 0, 0] = True
    mask[4:8, 4:8, 4] = True
    kept = largest_part(mask)
    assert kept.sum() == 16 and not kept[:2].any()

def test_an_empty_mask_has_no_part():
    assert not largest_part(np.zeros((3, 3, 3), bool)).any()

@pytest.fixture
def cleaned():
    """Posteriors of white matter with a caudate inside, an island of caudate and one of cortex, cleaned."""
    p = np.zeros((33, 24, 24, 24), np.float32)
    p[0] = 1

    def put(label, box):
        p[:, *box] = 0
        p[SYNTHSEG_LABELS.index(label), *box] = 1

    put(2, (slice(4, 20),) * 3)
    put(11, (slice(8, 14),) * 3)
    put(11, (slice(16, 18),) * 3)  # inside white matter
    put(3, (slice(0, 2),) * 3)     # outside the brain
    return clean_posteriors(p)

def test_islands_of_a_structure_are_removed(cleaned):
    labels = np.array(SYNTHSEG_LABELS)[cleaned.argmax(0)]
    assert (labels[9:13, 9:13, 9:13] == 11).all()
    assert not (labels[15:19, 15:19, 15:19] == 11).any()
    assert labels[0, 0, 0] == 0

def test_a_class_lies_where_any_of_its_posteriors_is_high():
    """Faint cortex and faint white matter together must not make an island part of the cerebrum."""
    p = np.zeros((33, 24, 24, 24), np.float32)
    p[0] = 1
    def put(label, box, value):
        p[0, *box] -= value
        p[SYNTHSEG_LABELS.index(label), *box] = value
    put(2, (slice(2, 14),) * 3, 1.0)
    for label in (2, 3):
        put(label, (slice(14, 22), slice(2, 10), slice(2, 10)), 0.2)
    assert clean_posteriors(p)[1:, 16:20, 4:8, 4:8].max() == 0

def test_volumes_are_voxels_or_posteriors():
    labels = np.full((4, 4, 4), 11, np.int16)
    segmentation = Segmentation(labels, dict.fromkeys(SYNTHSEG_LABELS, 0.0) | {11: 40.5, 50: 3.0})
    assert structure_volumes(segmentation, 2.0, 'voxels')['caudate'] == 64 * 8
    assert structure_volumes(segmentation, 2.0, 'posteriors')['caudate'] == 43.5
    with pytest.raises(ValueError, match='needs SynthSeg'):
        structure_volumes(Segmentation(labels), 2.0, 'posteriors')

def test_posteriors_add_to_one(cleaned):
    total = cleaned.sum(0)
    np.testing.assert_allclose(total[total > 0], 1, atol=1e-4)

# ---------------------------------------------------------------- SynthSeg

class Halves(torch.nn.Module):
    """Calls bright voxels of the left half white matter of the left, of the right half cortex of the right.

    Shown a mirror image it takes one side for the other, as any network does.
    """
    def __init__(self, confidence=1.0):
        super().__init__()
        self.likelihood = torch.nn.Conv3d(1, 33, 1)
        self.confidence = confidence

    def forward(self, x):
        assert all(n % 32 == 0 for n in x.shape[2:])
        p = torch.zeros(1, 33, *x.shape[2:])
        left = torch.arange(x.shape[2])[:, None, None] < x.shape[2] // 2
        bright = x[0, 0] > 0.5
        for label, where in ((2, bright & left), (41, bright & ~left), (0, ~bright)):
            p[0, SYNTHSEG_LABELS.index(label)][where] = self.confidence
        p[0, 0] += 1 - self.confidence
        return p

@pytest.fixture(params=[1.0, 2.0, (1.5, 1.0, 2.0)])
def of_halves(request, monkeypatch):
    """Spacing in mm, and what SynthSegSegmenter with Halves makes of a bright block in 30x26x20 voxels."""
    monkeypatch.setattr(segment, 'load_synthseg', lambda path: Halves())
    volume = np.zeros((30, 26, 20), np.float32)
    volume[5:25, 5:20, 5:15] = 100
    return request.param, SynthSegSegmenter('x.h5', 'cpu')(volume, request.param)

def test_summed_posteriors_are_the_volume_in_mm3(of_halves):
    spacing, segmentation = of_halves
    mm3 = segmentation.posterior_mm3
    want = 20 * 15 * 10 * np.prod(np.broadcast_to(spacing, 3))
    assert mm3[2] + mm3[41] == pytest.approx(want, rel=0.1)

def test_half_a_posterior_is_half_a_volume(monkeypatch):
    monkeypatch.setattr(segment, 'load_synthseg', lambda path: Halves(confidence=0.6))
    monkeypatch.setattr(segment, 'clean_posteriors', lambda p: p)
    volume = np.zeros((32, 32, 32), np.float32)
    volume[:, :, :20] = 100
    segmentation = SynthSegSegmenter('x.h5', 'cpu')(volume, 1.0)
    hard = np.isin(segmentation.labels, (2, 41)).sum()
    soft = segmentation.posterior_mm3[2] + segmentation.posterior_mm3[41]
    assert soft == pytest.approx(0.6 * hard, rel=0.05)

def test_sides_stay_theirs_through_flip_padding_and_resampling(of_halves):
    labels = of_halves[1].labels
    assert labels.shape == (30, 26, 20)
    assert (labels[6:14, 7:18, 7:13] == 2).all()
    assert (labels[16:24, 7:18, 7:13] == 41).all()
    assert (labels[:3] == 0).all() and (labels[:, :3] == 0).all()

def test_a_segmenter_of_a_weights_file_runs_at_any_size(tmp_path):
    synthseg_file(tmp_path / 's.h5')
    volume = np.random.default_rng(0).random((20, 33, 18)).astype(np.float32)
    labels = make_segmenter(str(tmp_path / 's.h5'), 'cpu')(volume, 1.0).labels
    assert labels.shape == (20, 33, 18)
    assert set(np.unique(labels)) <= set(SYNTHSEG_LABELS)

def test_weights_of_another_version_are_refused(tmp_path):
    synthseg_file(tmp_path / 'old.h5', labels=32)
    with pytest.raises(SystemExit, match='32 labels'):
        make_segmenter(str(tmp_path / 'old.h5'), 'cpu')

# ---------------------------------------------------------------- commands

HIPPOCAMPUS = """
import sys, nibabel as nib, numpy as np
x = nib.load(sys.argv[1])
nib.save(nib.Nifti1Image((x.get_fdata() > 0.5).astype(np.int16) * 17, x.affine), sys.argv[2])
"""

def test_a_command_is_run_on_files(tmp_path):
    script = tmp_path / 'segment.py'
    script.write_text(HIPPOCAMPUS)
    volume = np.zeros((10, 12, 8), np.float32)
    volume[3:6, 3:9, 2:6] = 1
    labels = make_segmenter(f'{sys.executable} {script} {{in}} {{out}}', 'cpu')(volume, (1, 2, 1)).labels
    np.testing.assert_array_equal(labels, 17 * (volume > 0.5))

def test_a_command_that_fails_is_told():
    segmenter = CommandSegmenter(f'{sys.executable} -c "import sys; sys.exit(3)" {{in}} {{out}}')
    with pytest.raises(ValueError, match='segmenter ended with 3'):
        segmenter(np.zeros((10, 12, 8), np.float32), 1)

def test_what_is_neither_weights_nor_a_command_is_refused():
    with pytest.raises(SystemExit, match='neither'):
        make_segmenter('synthseg', 'cpu')

# ---------------------------------------------------------------- the small segmenter

@pytest.fixture(scope='module')
def easy(tmp_path_factory):
    """Data of one structure, a bright ball on either side: left caudate and right caudate."""
    folder = make_tiny_data(tmp_path_factory.mktemp('easy') / 'data')
    with open(folder / 'subjects.tsv', newline='') as f:
        rows = list(csv.DictReader(f, delimiter='\t'))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (32, 48, 32)], indexing='ij'))
    rng = np.random.default_rng(0)
    for row in rows:
        labels = np.zeros((32, 48, 32), np.int16)
        for label, x in ((11, 9), (50, 23)):
            middle = np.array([x, *rng.integers(14, 20, 2)])[:, None, None, None]
            labels[np.square(grid - middle).sum(0) < rng.integers(20, 50)] = label
        row['dseg'] = f"{row['subject']}_dseg.npy"
        np.save(folder / row['dseg'], labels)
        for modality in ('T1w', 'T2w'):
            if row[modality]:
                np.save(folder / row[modality], (0.2 + 0.6 * (labels > 0)).astype(np.float32))
    with open(folder / 'subjects.tsv', 'w', newline='') as f:
        table = csv.DictWriter(f, rows[0], delimiter='\t')
        table.writeheader()
        table.writerows(rows)
    return folder

@pytest.fixture(scope='module')
def small(easy, tmp_path_factory):
    path = tmp_path_factory.mktemp('small') / 'segmenter.pt'
    learn(str(easy), ('T1w',), path, 'cpu', steps=40)
    return path

def test_a_small_segmenter_finds_what_its_maps_show_and_tells_left_from_right(easy, small):
    segmenter = make_segmenter(str(small), 'cpu')
    score, n = held_out_dice(segmenter, Sessions(str(easy), ('T1w',), 'test'))
    assert n > 0 and score > 0.8
    assert 'Dice x 100 of' in segmenter.about

def test_a_patch_knows_its_place():
    """Of a volume whose sides are no multiples of 4, the network pads both alike."""
    whole = small_segmenter.places((30, 50, 32), 'cpu')
    assert whole.shape == (3, 32, 52, 32)
    patch = small_segmenter.cut(whole[None], [(0, 2, 4)], (32, 48, 28))[0]
    assert torch.equal(patch, whole[:, :, 2:50, 4:32])
    torch.testing.assert_close(patch[:, 0, 0, 0], torch.tensor([-1, -1 + 4 / 51, -1 + 8 / 31]))

def test_posterior_volumes_add_up_to_the_box(easy, small):
    segmentation = make_segmenter(str(small), 'cpu')(Sessions(str(easy), ('T1w',), 'test').volume(0, 0), 2.0)
    assert sum(segmentation.posterior_mm3.values()) == pytest.approx(8 * 32 * 48 * 32, rel=1e-4)

def test_any_size_is_segmented(small):
    labels = make_segmenter(str(small), 'cpu')(np.zeros((31, 46, 33), np.float32), 1.0).labels
    assert labels.shape == (31, 46, 33)

def test_a_segmenter_is_learned_once_for_the_same_data(easy, small):
    written = small.stat().st_mtime_ns
    assert learn_once(str(easy), ('T1w',), str(small), 'cpu') == str(small)
    assert small.stat().st_mtime_ns == written

def test_a_segmenter_of_other_modalities_is_learned_anew(easy, small, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(small_segmenter, 'learn', lambda data, modalities, *rest: asked.append(modalities))
    learn_once(str(easy), ('T1w',), str(small), 'cpu')
    learn_once(str(easy), ('T1w', 'T2w'), str(small), 'cpu')
    learn_once(str(easy), ('T1w',), str(tmp_path / 'none.pt'), 'cpu')
    assert asked == [('T1w', 'T2w'), ('T1w',)]

def test_a_checkpoint_of_something_else_is_no_segmenter(tmp_path):
    save_checkpoint(tmp_path / 'x.pt', {'model_args': {'kind': 'gpt'}})
    with pytest.raises(SystemExit, match='not a segmenter'):
        make_segmenter(str(tmp_path / 'x.pt'), 'cpu')

def test_blurring_keeps_the_mean_inside():
    x = torch.zeros(4, 1, 16, 16, 16)
    x[:, :, 5:11, 5:11, 5:11] = 0.5
    rng = np.random.default_rng(3)
    torch.manual_seed(0)
    noisy = blurred(x, rng)
    assert noisy.shape == x.shape and (noisy != x).any()
    assert noisy.mean() == pytest.approx(x.mean().item(), rel=0.35)
