"""NIfTI in, a model's box, and the way back. prepare.py and sample.py share these steps, so a scan meets the same in both.

Volumes are float32 (D,H,W) in RAS+: axes left-right, posterior-anterior, inferior-superior, indices growing to the right, to the
front and to the top. An affine takes voxel indices to millimetres. Every refusal is a ValueError of one line, PATH: reason.
"""
import os
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy import ndimage

# ---------------------------------------------------------------- files

@dataclass
class Native:
    """How a file stores its volume; what write() needs to store another like it."""
    affine: np.ndarray
    shape: tuple
    orientation: str     # such as LAS
    spacing_mm: tuple

def file_of(path):
    """The file that holds a scan: the archive of ARCHIVE.zip/MEMBER, else the path itself."""
    archive, inside, _ = path.partition('.zip/')
    return archive + '.zip' if inside else path

@contextmanager
def unpacked(path):
    """A file for a path that may lead into a zip archive; a member is unpacked into a temporary folder."""
    archive = file_of(path)
    if archive == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(archive) as z:
                member = z.extract(path[len(archive) + 1:], folder)  # never outside the folder
        except (OSError, KeyError, zipfile.BadZipFile, EOFError, zlib.error) as e:
            raise ValueError(f'{path}: cannot be unpacked ({e})')
        yield member

def read(path):
    """path of a .nii or .nii.gz, or ARCHIVE.zip/MEMBER -> volume (D,H,W) in RAS+, its affine (4,4), Native.

    Refused: a file that is missing, cut short or no NIfTI; sizes over 1024 along an axis, checked before memory is taken; 2D;
    4D with more than one volume; colour or complex voxels; NaN or Inf; a constant volume; an affine that cannot be inverted.
    """
    def refuse(reason):
        raise ValueError(f'{path}: {reason}')
    if not os.path.isfile(file_of(path)):
        refuse('no such file')
    with unpacked(path) as file:
        try:
            image = nib.load(file)
        except Exception as e:
            refuse(f'not a readable NIfTI file ({type(e).__name__}); is it complete?')
        shape = tuple(image.shape)
        if len(shape) == 4 and shape[3] == 1:
            shape = shape[:3]
        if len(shape) != 3 or min(shape) < 2:
            refuse(
                f'shape {image.shape}: a single 3D volume is needed'
                + ('; split the series first' if len(shape) == 4 else '')
            )
        if max(shape) > 1024:
            refuse(f'shape {shape}: more than 1024 voxels along an axis; is the header damaged?')
        if image.get_data_dtype().kind not in 'iuf':
            refuse(f'voxels of type {image.get_data_dtype()}: a number per voxel is needed')
        affine = image.affine
        if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            refuse('its affine cannot be inverted; repair the header')
        native = Native(
            affine,
            shape,
            ''.join(nib.aff2axcodes(affine)),
            tuple(float(s) for s in nib.affines.voxel_sizes(affine)),
        )
        try:
            data = np.asarray(image.dataobj, np.float32).reshape(shape)
        except Exception as e:
            refuse(f'its voxels cannot be read ({type(e).__name__}); the file is cut short or damaged')
    bad = np.size(data) - np.count_nonzero(np.isfinite(data))
    if bad:
        refuse(f'{bad} voxels are NaN or infinite; repair or leave out')
    if data.min() == data.max():
        refuse(f'every voxel is {data.min():g}: an empty volume')
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    return np.ascontiguousarray(canonical.dataobj, np.float32), canonical.affine, native

def write(path, volume, native):
    """Store a RAS+ volume (D,H,W) float32 in the orientation, on the grid and with the affine of Native; whole or not at all."""
    to_native = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt('RAS'), nib.io_orientation(native.affine)
    )
    data = nib.orientations.apply_orientation(volume, to_native).astype(np.float32)
    folder, name = os.path.split(path)
    # keeps the suffix, which chooses the compression
    part = os.path.join(folder, f'.part{os.getpid()}_{name}')
    try:
        os.makedirs(folder or '.', exist_ok=True)
        nib.save(nib.Nifti1Image(data, native.affine), part)
        os.replace(part, path)
    except (OSError, nib.filebasedimages.ImageFileError) as e:
        if os.path.exists(part):
            os.remove(part)
        raise ValueError(f'{path}: cannot write ({e})')

# ---------------------------------------------------------------- grids

def grid(affine, shape, spacing_mm):
    """affine and shape of the isotropic grid over the same field of view, axes kept; the same grid where spacing agrees to 1e-3."""
    old = nib.affines.voxel_sizes(affine)
    if np.allclose(old, spacing_mm, atol=1e-3): return affine, tuple(shape)
    new_shape = tuple(int(max(2, round(n * s / spacing_mm))) for n, s in zip(shape, old))
    scale = spacing_mm / old
    new = affine @ np.diag([*scale, 1])
    new[:3, 3] = affine[:3] @ [*((scale - 1) / 2), 1]  # outer voxel edges coincide
    return new, new_shape

def stretched(affine, shape, new_shape):
    """affine of a grid of new_shape voxels over the same field of view; spacings become what they must."""
    scale = np.array(shape) / np.array(new_shape)
    new = affine @ np.diag([*scale, 1])
    new[:3, 3] = affine[:3] @ [*((scale - 1) / 2), 1]
    return new

def resample(volume, affine, target_affine, target_shape):
    """volume (D,H,W) on another grid: trilinear, 0 outside; a copy where the grids agree."""
    if volume.shape == tuple(target_shape) and np.allclose(affine, target_affine, atol=1e-4):
        return volume.copy()
    to_source = np.linalg.inv(affine) @ target_affine
    coarser = nib.affines.voxel_sizes(target_affine).max() / nib.affines.voxel_sizes(affine)
    # else detail finer than the target's voxels would alias
    sigma = np.sqrt(np.maximum(coarser ** 2 - 1, 0)) / 2.355
    if sigma.max() > 0.2:
        volume = ndimage.gaussian_filter(volume, sigma)
    matrix = to_source[:3, :3]
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-6):
        matrix = np.diag(matrix)  # axis by axis is much faster
    return ndimage.affine_transform(volume, matrix, to_source[:3, 3], tuple(target_shape), order=1)

def resample_inside(volume, mask, affine, target_affine, target_shape):
    """volume and bool mask (D,H,W) on another grid: values are means over the mask alone, so that edges do not fade; 0 outside."""
    weight = resample(mask.astype(np.float32), affine, target_affine, target_shape)
    inside = weight > 0.5
    values = resample(np.where(mask, volume, 0).astype(np.float32), affine, target_affine, target_shape)
    return np.where(inside, values / np.maximum(weight, 0.5), 0).astype(np.float32), inside

# ---------------------------------------------------------------- brain, box, intensities

def brain_mask(volume):
    """volume (D,H,W) -> bool mask, and whether it had to be estimated.

    Where at least 30 % of the voxels are exactly 0 (skull-stripped, or air already removed) the mask is the rest, negative
    voxels included. Otherwise, a raw head scan, it is the head: Otsu's threshold, largest part, holes filled.
    """
    mask = volume != 0
    if mask.mean() <= 0.7: return mask, False
    smooth = ndimage.gaussian_filter(volume, 1)
    top = np.percentile(smooth, 99)
    counts, edges = np.histogram(np.clip(smooth, None, top), 256)
    centres, below = (edges[:-1] + edges[1:]) / 2, np.cumsum(counts)
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    above = below[-1] - below
    mean_above = (np.sum(counts * centres) - np.cumsum(counts * centres)) / np.maximum(above, 1)
    threshold = centres[np.argmax(below * above * (mean_below - mean_above) ** 2)]
    parts, _ = ndimage.label(ndimage.binary_closing(smooth > 0.6 * threshold, iterations=2, border_value=0))
    mask = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    for axis in range(3):  # holes are closed slice by slice, since the head leaves the field of view
        for i in range(mask.shape[axis]):
            at = (slice(None),) * axis + (i,)
            mask[at] = ndimage.binary_fill_holes(mask[at])
    return mask, True

def box_start(mask, shape):
    """Where a box of `shape` starts so that it holds the mask; negative is padding. Also the lost fraction of the mask.

    A smaller brain is centred. A larger one loses its inferior end first: along the last axis the top is kept, along the
    others the middle.
    """
    start = []
    for axis, n in enumerate(shape):
        line = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        lo, hi = line[0], line[-1] + 1
        start.append(int(hi - n if axis == 2 and hi - lo > n else (lo + hi - n) // 2))
    return start, 1 - crop_pad(mask, start, shape).sum() / mask.sum()

def crop_pad(volume, start, shape):
    """The box of `shape` that starts at `start` (may be negative); 0 outside the volume."""
    box = np.zeros(shape, volume.dtype)
    source = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, shape))
    part = volume[source]
    box[tuple(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, part.shape))] = part
    return box

def scale_intensity(volume, mask, percentiles=(0.5, 99.5), of='brain', clip=True):
    """volume to [0,1] by two percentiles of='brain', inside the mask, or of='volume', everywhere -> scaled float32, low, high.

    clip=False keeps what lies above 1. Outside exactly 0, inside at least 1e-4, so that `scaled > 0` is the mask for ever.
    ValueError if the percentiles agree.
    """
    low, high = (float(p) for p in np.percentile(volume[mask] if of == 'brain' else volume, percentiles))
    if high <= low:
        raise ValueError(f'percentiles {percentiles} of the {of} are both {low:g}: nothing to scale')
    return (
        np.where(mask, np.clip((volume - low) / (high - low), 1e-4, 1 if clip else None), 0).astype(
            np.float32
        ),
        low,
        high,
    )

# ---------------------------------------------------------------- a session into its box, and back

@dataclass
class Placement:
    """Where a box lies in the world, and how its numbers came about."""
    affine: np.ndarray     # of the isotropic grid
    grid_shape: tuple
    start: list            # of the box on that grid
    low: list              # intensity at 0 and at 1, per scan
    high: list
    lost: float            # fraction of the brain outside the box
    estimated: list        # per scan: no zero background, so the mask is a guess at the head

def conform(
    volumes,
    affines,
    shape,
    spacing_mm=1.0,
    resize=False,
    percentiles=(0.5, 99.5),
    percentiles_of='brain',
    clip=True,
    masks=None,
):
    """A session's scans, RAS+ (D,H,W) each with its affine, as boxes (shape) in [0,1] on one grid -> list of boxes, Placement.

    The grid is that of the first scan, made isotropic; the others are brought there through the affines, each interpolated
    once. The box holds the union of the brains; each scan is scaled inside its own. A scan whose brain covers less than 5 % of
    the first one's does not overlap: ValueError whose second argument is its place in the list.
    masks: a bool mask of the brain per scan, or None for those whose mask is to be found (brain_mask).
    resize: stretch the first scan's whole field of view over the box instead, as DeCo-VAE's 182x218x182 mm over 128x256x128 voxels.
    """
    if resize:
        affine, grid_shape = stretched(affines[0], volumes[0].shape, shape), tuple(shape)
    else:
        affine, grid_shape = grid(affines[0], volumes[0].shape, spacing_mm)
    given, scans, masks, estimated = masks or [None] * len(volumes), [], [], []
    for k, (volume, a) in enumerate(zip(volumes, affines)):
        mask, guess = brain_mask(volume) if given[k] is None else (given[k], False)
        scan, inside = resample_inside(volume, mask, a, affine, grid_shape)
        scans.append(scan), masks.append(inside), estimated.append(guess)
        if not masks[k].any() or (masks[k] & masks[0]).sum() < 0.05 * masks[0].sum():
            raise ValueError(
                'does not overlap the first scan of its session; are the affines of one space?', k
            )
    start, lost = ([0, 0, 0], 0.0) if resize else box_start(np.logical_or.reduce(masks), shape)
    boxes, low, high = [], [], []
    for scan, mask in zip(scans, masks):
        box, lo, hi = scale_intensity(
            crop_pad(scan, start, shape), crop_pad(mask, start, shape), percentiles, percentiles_of, clip
        )
        boxes.append(box), low.append(lo), high.append(hi)
    return boxes, Placement(affine, grid_shape, start, low, high, float(lost), estimated)

def restore(box, placement, affine, shape, low=0.0, high=1.0):
    """A box in [0,1] back on a RAS+ grid (affine, shape), with 0 as intensity `low` and 1 as `high`; 0 where the box is 0 or ends."""
    back = [-s for s in placement.start]
    full, mask = (crop_pad(v, back, placement.grid_shape) for v in (low + box * (high - low), box > 0))
    return resample_inside(full, mask, placement.affine, affine, shape)[0]
