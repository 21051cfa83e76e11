"""NIfTI in, a model's box, and the way back: the steps that prepare.py and sample.py share.

Volumes are float32 (D,H,W) in RAS+: left-right, posterior-anterior, inferior-superior; indices grow to the
right, front and top. An affine takes voxel indices to mm. Refusals are ValueErrors of one line, PATH: reason.
"""
import os
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

# ---------------------------------------------------------------- files

@dataclass
class Native:
    """How a file stores its volume: what write() needs to store another like it."""
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
    """The file of a path; a member of a zip archive is unpacked into a temporary folder."""
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

def native_of(image, path):
    """Native of a nibabel image; ValueError for what read() refuses by the header alone."""
    shape, affine = tuple(image.shape), image.affine
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        hint = '; split the series first' if len(shape) == 4 else ''
        raise ValueError(f'{path}: shape {image.shape}: a single 3D volume is needed{hint}')
    if max(shape) > 1024:
        raise ValueError(f'{path}: shape {shape}: more than 1024 voxels along an axis; '
                         'is the header damaged?')
    if image.get_data_dtype().kind not in 'iuf':
        raise ValueError(f'{path}: voxels of type {image.get_data_dtype()}: a number per voxel is needed')
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f'{path}: its affine cannot be inverted; repair the header')
    spacing_mm = tuple(float(v) for v in voxel_sizes(affine))
    return Native(affine, shape, ''.join(nib.aff2axcodes(affine)), spacing_mm)

def read(path):
    """path of a .nii or .nii.gz, or ARCHIVE.zip/MEMBER -> volume (D,H,W) in RAS+, its affine (4,4), Native.

    Refused: a file that is missing, cut short or no NIfTI; sizes over 1024, checked before memory is taken;
    2D; 4D with more than one volume; colour or complex voxels; NaN or Inf; a constant volume; an affine that
    cannot be inverted.
    """
    if not os.path.isfile(file_of(path)): raise ValueError(f'{path}: no such file')
    with unpacked(path) as file:
        try:
            image = nib.load(file)
        except Exception as e:
            raise ValueError(f'{path}: not a readable NIfTI file ({type(e).__name__}); is it complete?')
        native = native_of(image, path)
        try:
            data = np.asarray(image.dataobj, np.float32).reshape(native.shape)
        except Exception as e:
            raise ValueError(f'{path}: its voxels cannot be read ({type(e).__name__}); '
                             'the file is cut short or damaged')
    bad = np.size(data) - np.count_nonzero(np.isfinite(data))
    if bad: raise ValueError(f'{path}: {bad} voxels are NaN or infinite; repair or leave out')
    if data.min() == data.max():
        raise ValueError(f'{path}: every voxel is {data.min():g}: an empty volume')
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, native.affine))
    return np.ascontiguousarray(canonical.dataobj, np.float32), canonical.affine, native

def part_of(path):
    """Where a file is written before it gets its name; the suffix, which chooses the format, stays."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f'.part{os.getpid()}_{name}')

def write(path, volume, native):
    """Store a RAS+ volume (D,H,W) as float32 on the grid of a Native, whole or not at all."""
    ras = nib.orientations.axcodes2ornt('RAS')
    to_native = nib.orientations.ornt_transform(ras, nib.io_orientation(native.affine))
    data = nib.orientations.apply_orientation(volume, to_native).astype(np.float32)
    part = part_of(path)
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        nib.save(nib.Nifti1Image(data, native.affine), part)
        os.replace(part, path)
    except (OSError, nib.filebasedimages.ImageFileError) as e:
        if os.path.exists(part):
            os.remove(part)
        raise ValueError(f'{path}: cannot write ({e})')

def save_npy(path, array):
    """Store an array as .npy, whole or not at all; returns the checksum of its voxels."""
    array = np.ascontiguousarray(array)
    part = part_of(path)
    np.save(part, array)
    os.replace(part, path)
    return zlib.crc32(array)

# ---------------------------------------------------------------- grids

def rescaled(affine, scale):
    """affine of the grid over the same field of view with voxels `scale` (3,) times as large."""
    new = affine @ np.diag([*scale, 1])
    new[:3, 3] = affine[:3] @ [*((scale - 1) / 2), 1]  # outer voxel edges coincide
    return new

def grid(affine, shape, spacing_mm):
    """affine and shape of the isotropic grid over a field of view; as given where spacing agrees to 1e-3."""
    old = voxel_sizes(affine)
    if np.allclose(old, spacing_mm, atol=1e-3): return affine, tuple(shape)
    new_shape = tuple(int(max(2, round(n * s / spacing_mm))) for n, s in zip(shape, old))
    return rescaled(affine, spacing_mm / old), new_shape

def stretched(affine, shape, new_shape):
    """affine of a grid of new_shape voxels over the same field of view, of whatever spacing."""
    return rescaled(affine, np.array(shape) / np.array(new_shape))

def resample(volume, affine, target_affine, target_shape):
    """volume (D,H,W) on another grid: trilinear, 0 outside; a copy where the grids agree."""
    if volume.shape == tuple(target_shape) and np.allclose(affine, target_affine, atol=1e-4):
        return volume.copy()
    to_source = np.linalg.inv(affine) @ target_affine
    coarser = voxel_sizes(target_affine).max() / voxel_sizes(affine)
    sigma = np.sqrt(np.maximum(coarser ** 2 - 1, 0)) / 2.355
    if sigma.max() > 0.2:  # else detail finer than the target's voxels would alias
        volume = ndimage.gaussian_filter(volume, sigma)
    matrix = to_source[:3, :3]
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-6):
        matrix = np.diag(matrix)  # axis by axis is much faster
    return ndimage.affine_transform(volume, matrix, to_source[:3, 3], tuple(target_shape), order=1)

def resample_inside(volume, mask, affine, target_affine, target_shape):
    """volume and bool mask (D,H,W) on another grid, 0 outside.

    Values are means over the mask alone, so that edges do not fade.
    """
    weight = resample(mask.astype(np.float32), affine, target_affine, target_shape)
    inside = weight > 0.5
    values = resample(np.where(mask, volume, 0).astype(np.float32), affine, target_affine, target_shape)
    return np.where(inside, values / np.maximum(weight, 0.5), 0).astype(np.float32), inside

# ---------------------------------------------------------------- brain, box, intensities

def brain_mask(volume):
    """volume (D,H,W) -> bool mask, and whether it had to be estimated.

    Where at least 30 % of the voxels are exactly 0 (skull-stripped, or air removed) it is the rest, negative
    voxels included. Otherwise, of a raw scan, it is the head: Otsu's threshold, largest part, holes filled.
    """
    mask = volume != 0
    if mask.mean() <= 0.7: return mask, False
    smooth = ndimage.gaussian_filter(volume, 1)
    bright = smooth > 0.6 * otsu_threshold(np.clip(smooth, None, np.percentile(smooth, 99)))
    parts, _ = ndimage.label(ndimage.binary_closing(bright, iterations=2, border_value=0))
    mask = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    for axis in range(3):  # holes are closed slice by slice, since the head leaves the field of view
        for plane in np.moveaxis(mask, axis, 0):
            plane[:] = ndimage.binary_fill_holes(plane)
    return mask, True

def otsu_threshold(values):
    """The threshold between two classes of values with the largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sum_below = np.cumsum(counts), np.cumsum(counts * centres)
    above, sum_above = below[-1] - below, np.sum(counts * centres) - sum_below
    distance = sum_below / np.maximum(below, 1) - sum_above / np.maximum(above, 1)
    return centres[np.argmax(below * above * distance ** 2)]

def bounds(mask):
    """Three slices: the smallest box that holds a bool mask (D,H,W)."""
    return ndimage.find_objects(mask.astype(np.int8), 1)[0]

def box_start(mask, shape):
    """Where a box of `shape` starts to hold the mask (negative is padding), and the fraction that it loses.

    A smaller brain is centred. A larger one loses its inferior end first: the last axis keeps its top, the
    others their middle.
    """
    start = []
    for axis, brain in enumerate(bounds(mask)):
        n = shape[axis]
        keep_top = axis == 2 and brain.stop - brain.start > n
        start.append(brain.stop - n if keep_top else (brain.start + brain.stop - n) // 2)
    return start, 1 - crop_pad(mask, start, shape).sum() / mask.sum()

def crop_pad(volume, start, shape):
    """The box of `shape` that starts at `start` (may be negative); 0 outside the volume."""
    box = np.zeros(shape, volume.dtype)
    source = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, shape))
    part = volume[source]
    box[tuple(slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(start, part.shape))] = part
    return box

def scale_intensity(volume, mask, percentiles=(0.5, 99.5), of='brain', clip=True):
    """volume to [0,1] by two percentiles -> scaled float32, low, high. ValueError if the percentiles agree.

    of: 'brain', inside the mask, or 'volume', everywhere. clip=False keeps what lies above 1. scaled is 0
    outside the mask and at least 1e-4 inside, so that `scaled > 0` is the mask for ever.
    """
    low, high = (float(p) for p in np.percentile(volume[mask] if of == 'brain' else volume, percentiles))
    if high <= low:
        raise ValueError(f'percentiles {percentiles} of the {of} are both {low:g}: nothing to scale')
    scaled = np.clip((volume - low) / (high - low), 1e-4, 1 if clip else None)
    return np.where(mask, scaled, 0).astype(np.float32), low, high

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

def conform(volumes, affines, shape, spacing_mm=1.0, resize=False, percentiles=(0.5, 99.5),
            percentiles_of='brain', clip=True, masks=None):
    """A session's scans, RAS+ with their affines -> boxes (shape) in [0,1] on one grid, Placement.

    The grid is that of the first scan, made isotropic; the others are brought there through the affines, each
    interpolated once. The box holds the union of the brains; each scan is scaled inside its own. A scan whose
    brain covers less than 5 % of the first one's does not overlap: ValueError, whose second argument is its
    index.
    masks: a bool mask of the brain per scan, None where it is to be found (brain_mask).
    resize: stretch the first scan's whole field of view over the box instead, as DeCo-VAE's 182x218x182 mm
    over 128x256x128 voxels.
    """
    if resize:
        affine, grid_shape = stretched(affines[0], volumes[0].shape, shape), tuple(shape)
    else:
        affine, grid_shape = grid(affines[0], volumes[0].shape, spacing_mm)
    scans, insides, estimated = [], [], []
    for k, volume in enumerate(volumes):
        mask, guess = (masks[k], False) if masks and masks[k] is not None else brain_mask(volume)
        scan, inside = resample_inside(volume, mask, affines[k], affine, grid_shape)
        scans.append(scan)
        insides.append(inside)
        estimated.append(guess)
        if not inside.any() or (inside & insides[0]).sum() < 0.05 * insides[0].sum():
            raise ValueError('does not overlap the first scan of its session; '
                             'are the affines of one space?', k)
    start, lost = ([0, 0, 0], 0.0) if resize else box_start(np.logical_or.reduce(insides), shape)
    scaled = []
    for k, (scan, inside) in enumerate(zip(scans, insides)):
        box, mask = crop_pad(scan, start, shape), crop_pad(inside, start, shape)
        try:
            scaled.append(scale_intensity(box, mask, percentiles, percentiles_of, clip))
        except ValueError as e:
            raise ValueError(str(e), k)
    boxes, low, high = map(list, zip(*scaled))
    return boxes, Placement(affine, grid_shape, start, low, high, float(lost), estimated)

def restore(box, placement, affine, shape, low=0.0, high=1.0):
    """A box in [0,1] back on a RAS+ grid (affine, shape); 0 where the box is 0 or ends.

    low, high: the intensities that 0 and 1 become.
    """
    back = [-s for s in placement.start]
    full = crop_pad(low + box * (high - low), back, placement.grid_shape)
    mask = crop_pad(box > 0, back, placement.grid_shape)
    return resample_inside(full, mask, placement.affine, affine, shape)[0]
