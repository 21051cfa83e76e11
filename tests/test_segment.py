"""SynthSeg's surroundings (flip, pieces, padding, resampling) with a network whose answer is known, and segmenters that are commands."""
import sys

import numpy as np
import pytest
import torch

from judge import segment
from pretrained import SYNTHSEG_LABELS
from judge.segment import (
    MERGED, RIGHT, CommandSegmenter, SynthSegSegmenter, clean_posteriors, largest_part, make_segmenter
)
from test_pretrained import synthseg_file

def test_labels_come_in_pairs_and_every_one_has_a_name():
    named = {label for pair in MERGED.values() for label in pair}
    assert named == set(SYNTHSEG_LABELS) - {0} and set(RIGHT.values()) <= set(SYNTHSEG_LABELS)

def test_largest_part():
    mask = np.zeros((8, 8, 8), bool)
    mask[0:2, 0, 0], mask[4:8, 4:8, 4] = True, True
    kept = largest_part(mask)
    assert kept.sum() == 16 and not kept[:2].any() and not largest_part(np.zeros((3, 3, 3), bool)).any()

def test_islands_of_a_structure_are_removed_and_posteriors_add_to_one():
    p = np.zeros((33, 24, 24, 24), np.float32)
    p[0] = 1
    def put(label, at):
        p[:, *at], p[(SYNTHSEG_LABELS.index(label), *at)] = 0, 1
    put(2, (slice(4, 20), slice(4, 20), slice(4, 20)))
    put(11, (slice(8, 14), slice(8, 14), slice(8, 14)))
    put(11, (slice(16, 18),) * 3)  # an island inside white matter
    put(3, (slice(0, 2),) * 3)     # and one outside the brain
    cleaned = clean_posteriors(p)
    labels = np.array(SYNTHSEG_LABELS)[cleaned.argmax(0)]
    assert (
        (labels[9:13, 9:13, 9:13] == 11).all()
        and not (labels[15:19, 15:19, 15:19] == 11).any()
        and labels[0, 0, 0] == 0
    )
    np.testing.assert_allclose(cleaned.sum(0)[cleaned.sum(0) > 0], 1, atol=1e-4)

class Halves(torch.nn.Module):
    """Calls bright voxels of the left half white matter of the left, of the right half cortex of the right, unless shown a mirror image."""
    def __init__(self):
        super().__init__()
        self.likelihood = torch.nn.Conv3d(1, 33, 1)
    def forward(self, x):
        p = torch.zeros(1, 33, *x.shape[2:])
        left = torch.arange(x.shape[2])[:, None, None] < x.shape[2] // 2
        bright = x[0, 0] > 0.5
        for label, where in ((2, bright & left), (41, bright & ~left)):
            p[0, SYNTHSEG_LABELS.index(label)][where] = 1
        p[0, 0][~bright] = 1
        assert all(n % 32 == 0 for n in x.shape[2:])
        return p

@pytest.mark.parametrize('spacing', [1.0, 2.0, (1.5, 1.0, 2.0)])
def test_sides_stay_theirs_through_flip_padding_and_resampling(monkeypatch, spacing):
    monkeypatch.setattr(segment, 'load_synthseg', lambda path: Halves())
    volume = np.zeros((30, 26, 20), np.float32)
    volume[5:25, 5:20, 5:15] = 100
    labels = SynthSegSegmenter('x.h5', 'cpu')(volume, spacing)
    assert labels.shape == volume.shape
    assert (
        (labels[6:14, 7:18, 7:13] == 2).all()
        and (labels[16:24, 7:18, 7:13] == 41).all()
        and (labels[:3] == 0).all()
        and (labels[:, :3] == 0).all()
    )

def test_a_segmenter_with_real_layout_runs_at_any_size(tmp_path):
    synthseg_file(tmp_path / 's.h5')
    labels = make_segmenter(str(tmp_path / 's.h5'), 'cpu')(
        np.random.default_rng(0).random((20, 33, 18)).astype(np.float32), 1.0
    )
    assert labels.shape == (20, 33, 18) and set(np.unique(labels)) <= set(SYNTHSEG_LABELS)
    synthseg_file(tmp_path / 'old.h5', labels=32)
    with pytest.raises(SystemExit, match='32 labels'):
        make_segmenter(str(tmp_path / 'old.h5'), 'cpu')

def test_a_command_is_run_on_files_and_its_failure_told(tmp_path):
    script = tmp_path / 'seg.py'
    script.write_text(
        'import sys, nibabel as nib, numpy as np\nx = nib.load(sys.argv[1])\n'
        'nib.save(nib.Nifti1Image((x.get_fdata() > 0.5).astype(np.int16) * 17, x.affine), sys.argv[2])\n'
    )
    volume = np.zeros((10, 12, 8), np.float32)
    volume[3:6, 3:9, 2:6] = 1
    labels = make_segmenter(f'{sys.executable} {script} {{in}} {{out}}', 'cpu')(volume, (1, 2, 1))
    np.testing.assert_array_equal(labels, 17 * (volume > 0.5))
    with pytest.raises(ValueError, match='segmenter ended with 3'):
        CommandSegmenter(f'{sys.executable} -c "import sys; sys.exit(3)" {{in}} {{out}}')(volume, 1)
    with pytest.raises(SystemExit, match='neither'):
        make_segmenter('synthseg', 'cpu')
