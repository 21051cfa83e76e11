"""What sample.py reads and writes: scans in the box of a model, and back on their own grid."""
import os
import re
from functools import lru_cache

import numpy as np
import torch

from data import as_float, box_of, open_npy, read_folder
from scans import nifti
from scans.brain import background_value
from scans.files import stem
from scans.folders import WORDS, Name

MASK = 'a mask or label map'

def named_modality(path, modalities):
    """Which of these a file's name says: T2w of x_T2w.nii.gz and t2.nii.gz; '' where it says none of them.

    A model may know modalities that prepare.py does not: those are known by the name's last word.
    """
    name = parsed_name(path)
    said = name.modality()
    if said in modalities: return said
    last_word = re.split('[-_. ]', name.text)[-1].lower()
    return next((modality for modality in modalities if modality.lower() == last_word), '')

def parsed_name(path):
    """What the words of a file's name say, as a folders.Name."""
    return Name(stem(os.path.basename(path)).removesuffix('.npy'))

def something_else(path, modalities):
    """What a file's name says that it is, if that is no scan of these modalities; '' otherwise."""
    name = parsed_name(path)
    if name.no_scan: return MASK
    return '' if named_modality(path, modalities) else name.modality()

def renamed(path, modality, wanted):
    """A file's name without ending, with one modality for another: x_T1w -> x_T2w, x -> x_T2w."""
    folder, name = os.path.split(stem(path).removesuffix('.npy'))
    words = re.split('([-_. ])', name)
    for k, word in enumerate(words):
        if word.lower() == modality.lower() or WORDS.get(word.lower()) == modality:
            words[k] = wanted
            return os.path.join(folder, ''.join(words))
    return os.path.join(folder, f'{name}_{wanted}')

class Scan:
    """A NIfTI file, its box (1,1,D,H,W) in [0,1] for the model, and what it takes to go back."""
    def __init__(self, path, data):
        path = os.fspath(path)
        self.volume, self.affine, self.native = nifti.read(path)
        try:
            boxes, self.placement = nifti.conform([self.volume], [self.affine], **data)
        except ValueError as e:
            raise ValueError(f'{path}: {e.args[0]}')
        nifti.check_inside(path, self.placement)
        for doubt in (*self.native.doubts, *self.placement.doubts[0]):
            print(f'{path}: {doubt}')
        self.box = torch.from_numpy(boxes[0])[None, None]
        lost = self.placement.lost
        if lost > 5e-4:
            print(f'{path}: {lost:.1%} of the brain lies outside the box of {data["shape"]} voxels')
        if self.placement.estimated[0]:
            print(f'{path}: no zero background, taken as a raw head scan')

    def write(self, path, box, own_scale, mask=True):
        """box (1,1,D,H,W) onto the scan's grid; in the scan's intensities, or in [0,1].

        mask: the background of the scan comes out as that: as its own value, or in [0,1] as 0.
        """
        low, high, background = 0.0, 1.0, 0.0
        if own_scale:
            low, high = self.placement.low[0], self.placement.high[0]
            background = background_value(self.volume) or 0.0
        box = box.float().cpu().clamp(1e-4 if mask else 0, 1)
        if mask:
            box = box * (self.box > 0)
        volume = nifti.restore(box[0, 0].numpy(), self.placement, self.affine, self.volume.shape, low, high,
                               background)
        nifti.write(path, volume, self.native)

class Stored:
    """A volume that prepare.py wrote, in its box; the same interface as Scan's."""
    def __init__(self, path, shape):
        self.modality = path.removesuffix('.npy').rpartition('_')[2]
        self.grid = box_grid(shape, voxels_of(os.path.dirname(path)))
        try:
            volume = as_float(open_npy(path))
        except (OSError, EOFError, ValueError) as e:
            raise ValueError(f'{path}: unreadable ({e})')
        if volume.shape != tuple(shape):
            raise ValueError(f"{path}: shape {volume.shape}, the model's box is {shape}")
        self.box = torch.tensor(volume)[None, None]

    def write(self, path, box, own_scale, mask=True):
        """box (1,1,D,H,W) in [0,1], which is the volume's own scale too."""
        box = box.float().cpu().clamp(0, 1)
        if mask:
            box = box * (self.box > 0)
        nifti.write(path, box[0, 0].numpy(), self.grid)

@lru_cache
def voxels_of(folder):
    """Voxel sizes (3,) in mm of prepared data."""
    _, dataset = read_folder(folder)
    return tuple(box_of(dataset)[1])

def is_prepared(folder):
    names = 'subjects.tsv', 'dataset.json'
    return all(os.path.exists(os.path.join(folder, name)) for name in names)

def is_stored(path):
    """Whether a file is a volume of a prepared data set."""
    return path.endswith('.npy') and is_prepared(os.path.dirname(path))

def box_grid(shape, voxel_mm):
    """The grid of a box of no scan: axes of the scanner, 0 mm in its middle."""
    size = np.array(voxel_mm, float)
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * size
    return nifti.Native(affine, tuple(shape), 'RAS', tuple(size))
