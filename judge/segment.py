"""Label maps of volumes for Dice and region volumes: SynthSeg on its published weights, or any command that reads and writes NIfTI.

Volumes are RAS+ (D,H,W); label maps have FreeSurfer numbers, left and right apart.
"""
import os
import shlex
import subprocess
import tempfile

import numpy as np
import torch
from scipy import ndimage

from scans import nifti
from pretrained import SYNTHSEG_LABELS, load_synthseg

NAMES = {
    2: 'cerebral white matter',
    3: 'cerebral cortex',
    4: 'lateral ventricle',
    5: 'inferior lateral ventricle',
    7: 'cerebellum white matter',
    8: 'cerebellum cortex',
    10: 'thalamus',
    11: 'caudate',
    12: 'putamen',
    13: 'pallidum',
    14: '3rd ventricle',
    15: '4th ventricle',
    16: 'brain stem',
    17: 'hippocampus',
    18: 'amygdala',
    24: 'CSF',
    26: 'accumbens',
    28: 'ventral DC',
}
# of each left label
RIGHT = {
    2: 41,
    3: 42,
    4: 43,
    5: 44,
    7: 46,
    8: 47,
    10: 49,
    11: 50,
    12: 51,
    13: 52,
    17: 53,
    18: 54,
    26: 58,
    28: 60,
}
# left and right together
MERGED = {name: (label, RIGHT[label]) if label in RIGHT else (label,) for label, name in NAMES.items()}
# labels whose joint posterior is kept in one piece
TOPOLOGY = [
    (2, 3, 4, 5),
    (41, 42, 43, 44),
    (7, 8),
    (46, 47),
    *[
        (label,)
        for label in SYNTHSEG_LABELS
        if label not in (0, 2, 3, 4, 5, 41, 42, 43, 44, 7, 8, 46, 47, 24)
    ],
]

def largest_part(mask):
    """The largest connected component of a bool volume."""
    parts, count = ndimage.label(mask)
    return mask if count < 2 else parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])

def clean_posteriors(p):
    """SynthSeg's post-processing of posteriors (33,D,H,W): smoothing, one piece for the brain and for each topological class."""
    p = np.stack([ndimage.gaussian_filter(channel, 0.5) for channel in p])
    p[1:] *= largest_part(p[1:].sum(0) > 0.25)
    for labels in TOPOLOGY:
        channels = [SYNTHSEG_LABELS.index(label) for label in labels]
        p[channels] *= largest_part(p[channels].sum(0) > 0.25)
    return p / np.maximum(p.sum(0), 1e-6)

class SynthSegSegmenter:
    """volume (D,H,W) and its spacing in mm -> label map (D,H,W) int16, by SynthSeg 2.0 (Billot et al. 2023)."""
    def __init__(self, h5_path, device):
        self.network, self.device = load_synthseg(h5_path).to(device), device
        if self.network.likelihood.out_channels != len(SYNTHSEG_LABELS):
            raise SystemExit(f'{h5_path}: {self.network.likelihood.out_channels} labels, SynthSeg 2.0 has 33')
        swap = {**RIGHT, **{right: left for left, right in RIGHT.items()}}
        self.flipped = [SYNTHSEG_LABELS.index(swap.get(label, label)) for label in SYNTHSEG_LABELS]

    @torch.no_grad()
    def __call__(self, volume, spacing_mm):
        spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        at_1_mm, affine = volume, np.diag([*spacing, 1.0])
        if np.abs(spacing - 1).max() > 0.05:
            one, shape = nifti.grid(affine, volume.shape, 1.0)
            at_1_mm = nifti.resample(np.asarray(volume, np.float32), affine, one, shape)
        low, high = np.percentile(at_1_mm, [0.5, 99.5])
        x = np.clip((at_1_mm - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
        pad = [(-n % 32 // 2, -n % 32 - -n % 32 // 2) for n in x.shape]
        x = torch.from_numpy(np.pad(x, pad))[None, None].to(self.device)
        p = (self.network(x)[0] + self.network(x.flip(2))[0].flip(1)[self.flipped]) / 2
        inner = tuple(slice(a, a + n) for (a, _), n in zip(pad, at_1_mm.shape))
        p = clean_posteriors(p.cpu().numpy())[(slice(None), *inner)]
        labels = np.array(SYNTHSEG_LABELS, np.int16)[p.argmax(0)]
        if at_1_mm is volume: return labels
        back = np.linalg.inv(one) @ affine  # nearest voxel of the 1 mm grid
        return ndimage.affine_transform(labels, back[:3, :3], back[:3, 3], volume.shape, order=0)

class CommandSegmenter:
    """A shell command with {in} and {out}, such as 'mri_synthseg --i {in} --o {out}', run on NIfTI files."""
    def __init__(self, command):
        if '{in}' not in command or '{out}' not in command:
            raise SystemExit(
                f'--segmenter={command}: neither a .h5 file nor a command with {{in}} and {{out}}'
            )
        self.command = command

    def __call__(self, volume, spacing_mm):
        spacing = tuple(float(s) for s in np.broadcast_to(spacing_mm, 3))
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, 'in.nii.gz'), os.path.join(folder, 'out.nii.gz')
            nifti.write(
                source,
                np.asarray(volume, np.float32),
                nifti.Native(np.diag([*spacing, 1.0]), volume.shape, 'RAS', spacing),
            )
            command = [
                part.replace('{in}', source).replace('{out}', target) for part in shlex.split(self.command)
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not os.path.exists(target):
                raise ValueError(
                    f'segmenter ended with {done.returncode}:'
                    f' {(done.stderr.strip().splitlines() or ["no output"])[-1]}'
                )
            labels, affine, _ = nifti.read(target)
        if labels.shape == volume.shape: return labels.astype(np.int16)
        back = np.linalg.inv(affine) @ np.diag([*spacing, 1.0])
        return ndimage.affine_transform(
            labels.astype(np.int16), back[:3, :3], back[:3, 3], volume.shape, order=0
        )

def make_segmenter(setting, device):
    """A .h5 file of SynthSeg weights, or a command."""
    return SynthSegSegmenter(setting, device) if setting.endswith('.h5') else CommandSegmenter(setting)
