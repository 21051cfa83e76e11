"""Label maps of volumes for Dice and region volumes: SynthSeg on its published weights, or any command.

Volumes are RAS+ (D,H,W); label maps have FreeSurfer's numbers, left and right apart. The one that learns from
label maps is in small_segmenter.py.
"""
import os
import shlex
import subprocess
import tempfile

import numpy as np
import torch
from scipy import ndimage

from judge.anatomy import RIGHT, Segmentation
from judge.small_segmenter import load_small
from pretrained import SYNTHSEG_LABELS, load_synthseg
from scans import nifti

# labels that are kept in one piece together
JOINED = [(2, 3, 4, 5), (41, 42, 43, 44), (7, 8), (46, 47)]
ALONE = [label for label in SYNTHSEG_LABELS if label not in (0, 24, *sum(JOINED, ()))]
TOPOLOGY = [*JOINED, *[(label,) for label in ALONE]]

def largest_part(mask):
    """The largest connected component of a bool volume."""
    parts, count = ndimage.label(mask)
    return mask if count < 2 else parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])

def clean_posteriors(p):
    """SynthSeg's post-processing of posteriors (33,D,H,W): smooth, one piece for each topological class.

    The piece of a class is the largest one of where any of its labels has a posterior above 0.25.
    """
    p = np.stack([ndimage.gaussian_filter(channel, 0.5) for channel in p])
    p[1:] *= largest_part(p[1:].sum(0) > 0.25)
    for labels in TOPOLOGY:
        channels = [SYNTHSEG_LABELS.index(label) for label in labels]
        p[channels] *= largest_part((p[channels] > 0.25).any(0))
    return p / np.maximum(p.sum(0), 1e-6)

def to_grid(labels, affine, target_affine, shape):
    """A label map on another grid, each voxel from the nearest one."""
    step = np.linalg.inv(affine) @ target_affine
    return ndimage.affine_transform(labels, step[:3, :3], step[:3, 3], shape, order=0)

class SynthSegSegmenter:
    """Volume (D,H,W), spacing in mm -> Segmentation, by SynthSeg 2.0 (Billot et al. 2023)."""
    def __init__(self, h5_path, device):
        self.network, self.device = load_synthseg(h5_path).to(device), device
        channels = self.network.likelihood.out_channels
        if channels != len(SYNTHSEG_LABELS):
            raise SystemExit(f'{h5_path}: {channels} labels, SynthSeg 2.0 has 33')
        swap = RIGHT | {right: left for left, right in RIGHT.items()}
        self.mirrored = [SYNTHSEG_LABELS.index(swap.get(label, label)) for label in SYNTHSEG_LABELS]

    @torch.no_grad()
    def __call__(self, volume, spacing_mm):
        spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        affine = np.diag([*spacing, 1.0])
        if np.abs(spacing - 1).max() <= 0.05: return self.segment(volume, spacing.prod())
        mm_affine, shape = nifti.grid(affine, volume.shape, 1.0)
        volume_1mm = nifti.resample(np.asarray(volume, np.float32), affine, mm_affine, shape)
        segmentation = self.segment(volume_1mm, 1.0)
        segmentation.labels = to_grid(segmentation.labels, mm_affine, affine, volume.shape)
        return segmentation

    def segment(self, volume, voxel_mm3):
        """Segmentation of a volume at 1 mm, by the mean over it and its mirror image."""
        low, high = np.percentile(volume, [0.5, 99.5])
        x = np.clip((volume - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
        pad = [(-n % 32 // 2, -n % 32 - -n % 32 // 2) for n in x.shape]
        x = torch.from_numpy(np.pad(x, pad))[None, None].to(self.device)
        p = (self.network(x)[0] + self.network(x.flip(2))[0].flip(1)[self.mirrored]) / 2
        inner = [slice(before, before + n) for (before, _), n in zip(pad, volume.shape)]
        p = clean_posteriors(p.cpu().numpy())[:, *inner]
        labels = np.array(SYNTHSEG_LABELS, np.int16)[p.argmax(0)]
        return Segmentation(labels, dict(zip(SYNTHSEG_LABELS, voxel_mm3 * p.sum((1, 2, 3), np.float64))))

class CommandSegmenter:
    """A shell command with {in} and {out}, such as 'mri_synthseg --i {in} --o {out}', run on NIfTI files."""
    def __init__(self, command):
        if '{in}' not in command or '{out}' not in command:
            raise SystemExit(f'--segmenter={command}: '
                             'neither learn, nor a .h5 or .pt file, nor a command with {in} and {out}')
        self.command = command

    def __call__(self, volume, spacing_mm):
        spacing = tuple(float(s) for s in np.broadcast_to(spacing_mm, 3))
        native = nifti.Native(np.diag([*spacing, 1.0]), volume.shape, 'RAS', spacing)
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, 'in.nii.gz'), os.path.join(folder, 'out.nii.gz')
            nifti.write(source, np.asarray(volume, np.float32), native)
            parts = shlex.split(self.command)
            command = [part.replace('{in}', source).replace('{out}', target) for part in parts]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not os.path.exists(target):
                said = done.stderr.strip().splitlines() or ['no output']
                raise ValueError(f'segmenter ended with {done.returncode}: {said[-1]}')
            labels, affine, _ = nifti.read(target)
        labels = labels.astype(np.int16)
        if labels.shape != volume.shape:
            labels = to_grid(labels, affine, native.affine, volume.shape)
        return Segmentation(labels)

def make_segmenter(setting, device):
    """setting: a .h5 file of SynthSeg weights, a .pt file of a small segmenter, or a command."""
    if setting.endswith('.h5'): return SynthSegSegmenter(setting, device)
    if setting.endswith('.pt'): return load_small(setting, device)
    return CommandSegmenter(setting)
