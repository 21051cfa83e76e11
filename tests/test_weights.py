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
PAIRS = os.path.join(ROOT, '..', 'shared', 'data', 'realmri')
WEIGHTS = ['real_t1w.pt', pytest.param('real_t1w_gpu.pt', marks=pytest.mark.slow)]

@pytest.mark.parametrize('name', ['real_t1w.pt', 'real_t1w_gpu.pt', 'neuroquant_2mm.pt'])
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

@pytest.mark.skipif(not os.path.isdir(PAIRS), reason='the scans of realmri are not beside the project')
def test_a_real_brain_keeps_its_anatomy_in_150_tokens(tmp_path):
    """NeuroQuant learned from label maps alone: the T1w of a person comes back, and as a T2w."""
    folder = os.path.join(PAIRS, 'sub-mni152', 'anat')
    weights = f'--ckpt={ROOT}/weights/neuroquant_2mm.pt'
    scan = os.path.join(folder, 'sub-mni152_T1w.nii.gz')
    printed = play('sample.py', '--mode=reconstruct', weights, f'--input={scan}',
                   f'--output={tmp_path}/rec.nii.gz')
    assert float(re.search(r'PSNR ([\d.]+) dB whole', printed)[1]) > 20
    play('sample.py', '--mode=tokens', weights, f'--input={scan}', f'--output={tmp_path}/t1.npy')
    assert np.load(tmp_path / 't1.npy').size == 150
    play('sample.py', '--mode=translate', weights, f'--input={scan}', f'--output={tmp_path}/t2.nii.gz')
    paths = tmp_path / 't2.nii.gz', os.path.join(folder, 'sub-mni152_T2w.nii.gz'), scan
    made, t2, t1 = (nib.load(path).get_fdata() for path in paths)
    inside = ndimage.binary_erosion((t1 > 0) & (t2 > 0), iterations=2)
    likeness = [np.corrcoef(made[inside], image[inside])[0, 1] for image in (t2, t1)]
    assert likeness[0] > 0.5 > likeness[1]
