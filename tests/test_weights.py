"""The weights that come with the repository, on real scans that they have not seen."""
import os
import re

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common import load_checkpoint
from conftest import ROOT, play
from model import from_checkpoint

SCANS = os.path.join(ROOT, '..', 'shared', 'data', 'ds002748')
WEIGHTS = ['real_t1w.pt', 'real_t1w_gpu.pt']

@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_are_small_and_name_no_place(name):
    path = os.path.join(ROOT, 'weights', name)
    assert os.path.getsize(path) < 6 * 2 ** 20
    checkpoint = load_checkpoint(path)
    from_checkpoint(checkpoint)
    assert not any(isinstance(value, str) and '/' in value for value in checkpoint['config'].values())

@pytest.mark.skipif(not os.path.isdir(SCANS), reason='the scans of ds002748 are not beside the project')
@pytest.mark.parametrize('name', WEIGHTS)
def test_a_real_brain_that_was_held_out_comes_back(name, tmp_path):
    scan = os.path.join(SCANS, 'sub-07', 'anat', 'sub-07_T1w.nii.gz')
    output = tmp_path / 'rec.nii.gz'
    printed = play('sample.py', '--mode=reconstruct', f'--ckpt={ROOT}/weights/{name}', f'--input={scan}',
                   f'--output={output}')
    whole, brain = map(float, re.search(r'PSNR ([\d.]+) dB whole, ([\d.]+) dB brain', printed).groups())
    assert whole > 31 and brain > 27
    x, y = (nib.load(path).get_fdata() for path in (scan, output))
    inside = ndimage.binary_erosion(x > 0, iterations=2)
    assert np.corrcoef(x[inside], y[inside])[0, 1] > 0.97
