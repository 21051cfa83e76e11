"""Scans in, a model's box, and the way back: the steps that prepare.py and sample.py share.

Volumes are float32 (D,H,W) in RAS+: left-right, posterior-anterior, inferior-superior; indices grow to the
right, front and top. An affine takes voxel indices to mm. Refusals are ValueErrors of one line, PATH: reason.
"""
import io
import os
import re
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from scans.brain import brain_mask, cut_doubt, inner_region, size_doubt

# ---------------------------------------------------------------- files

@dataclass
class Native:
    """How a file stores its volume: what write() needs to store another like it."""
    affine: np.ndarray
    shape: tuple
    orientation: str     # such as LAS
    spacing_mm: tuple
    header: object = None  # nibabel's, of a NIfTI file: its codes, units and description
    doubts: tuple = ()     # lines: what in the header contradicts itself or is missing

def file_of(path):
    """The file that holds a scan: the archive of ARCHIVE.zip/MEMBER, else the path itself."""
    start = 0
    while '.zip/' in path[start:]:
        start = path.index('.zip/', start) + 4
        if not os.path.isdir(path[:start]): return path[:start]  # else a folder of that name
    return path

def dated(path):
    """[path, times of its files], 0 for a missing one: whether a scan is still what it was."""
    files = [file_of(path)]
    for ending in ('.hdr', '.HDR'):
        header = re.sub(r'(?i)\.img(?=(\.gz)?$)', ending, path)
        if header != path and os.path.exists(header):
            files.append(header)
    return [path, *[os.path.getmtime(file) if os.path.exists(file) else 0 for file in files]]

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
        except Exception as e:  # encrypted, of an unknown method, damaged, ...
            raise ValueError(f'{path}: cannot be unpacked ({e})')
        yield member

def image_class(start):
    """nibabel's class for the first bytes of a file; None if it is neither NIfTI in one file nor MGH."""
    sizes = {int.from_bytes(start[:4], order) for order in ('little', 'big')}
    if 348 in sizes and start[344:348] == b'n+1\0': return nib.Nifti1Image
    if 540 in sizes and start[4:8] == b'n+2\0': return nib.Nifti2Image
    if start[:4] == b'\0\0\0\1': return nib.MGHImage
    return None

GZIP = b'\x1f\x8b'

class Damaged(ValueError):
    """A file whose compressed data is cut short or does not agree with its checksum."""

def inflated(packed):
    """The content of gzip bytes; Damaged where a checksum or a length at the end of a stream is wrong.

    As gzip does, it joins streams and drops what follows the last of them. What lies far behind the voxels
    that a header promises is read for its checksum, but not kept.
    """
    parts, limit = [], None
    while packed[:2] == GZIP:
        stream = zlib.decompressobj(wbits=31)  # compares checksum and length at the end
        try:
            if limit is None:
                limit = content_limit(zlib.decompressobj(wbits=31).decompress(packed, 1024))
            parts.append(stream.decompress(packed, limit))
            while not stream.eof and stream.unconsumed_tail:
                stream.decompress(stream.unconsumed_tail, 2 ** 20)
        except zlib.error as e:
            raise Damaged(f'the compressed data is damaged: {e}')
        if not stream.eof: raise Damaged('the compressed data is cut short')
        packed = stream.unused_data
    return parts[0] if len(parts) == 1 else b''.join(parts)

def content_limit(start):
    """A number of bytes that a file which begins so does not exceed, by its header."""
    kind = image_class(start)
    if not kind: return 2 ** 30
    header = kind.header_class.from_fileobj(io.BytesIO(start), check=False)
    voxels = np.prod([max(int(n), 1) for n in header.get_data_shape()], dtype=float)
    return int(min(voxels * header.get_data_dtype().itemsize, 2 ** 34)) + 2 ** 24

def load(path):
    """nibabel's image of a file, whatever its name says of compression; its voxels are read later."""
    with open(path, 'rb') as f:
        start = f.read(1024)
        packed = start[:2] == GZIP
        if not packed and not path.lower().endswith(('.gz', '.mgz')): return nib.load(path)
        content = start + f.read()
    if packed:
        content = inflated(content)
    kind = image_class(content[:1024])
    return kind.from_bytes(content) if kind else nib.load(path)

UNITS = {1: ('metre', 1000.0), 3: ('micrometre', 0.001)}  # by NIfTI's code, in mm

def in_mm(image):
    """The affine of a nibabel image in mm, and a doubt or ''. Units count where they make voxels likely."""
    affine = np.array(image.affine, float)
    code = int(image.header['xyzt_units']) % 8 if isinstance(image.header, nib.Nifti1Header) else 0
    if code not in UNITS: return affine, ''
    unit, factor = UNITS[code]
    sizes = voxel_sizes(affine)
    if is_likely(sizes) and not is_likely(sizes * factor):
        return affine, f'its unit is the {unit}, but its voxels are likely only in mm; taken as mm'
    affine[:3] *= factor
    return affine, f'its unit is the {unit}; its voxels are taken as {mm_text(sizes * factor)} mm'

def is_likely(sizes):
    return 0.1 <= sizes.min() and sizes.max() <= 30

def mm_text(sizes):
    return 'x'.join(f'{v:.3g}' for v in sizes)

def header_doubts(header):
    """Lines: what a header does not say of orientation, or where it contradicts itself."""
    if isinstance(header, nib.freesurfer.mghformat.MGHHeader):
        return [] if header['goodRASFlag'] else ['no orientation is stored: left and right are a guess']
    if not isinstance(header, nib.Nifti1Header):
        return ['Analyze format, no orientation is stored: left and right are a guess']
    sform, qform = int(header['sform_code']), int(header['qform_code'])
    if sform <= 0 and qform <= 0:
        return ['no orientation codes (sform and qform are 0): left and right are a guess']
    if sform <= 0: return []
    doubts = []
    sizes, pixdim = voxel_sizes(header.get_sform()), np.abs(header['pixdim'][1:4].astype(float))
    tolerance = 0.02 if sform < 3 else 0.25  # a sform into a template's space also scales
    if np.isfinite(pixdim).all() and pixdim.min() > 0:
        if np.max(np.abs(sizes / pixdim - 1)) > tolerance:
            doubts.append(f'its sform says voxels of {mm_text(sizes)} mm, its pixdim {mm_text(pixdim)} mm')
        if qform > 0:
            doubts += axes_doubts(header)
    return doubts

def axes_doubts(header):
    """A line where sform and qform name other axes."""
    try:
        axes = [''.join(map(str, nib.aff2axcodes(form))) for form in (header.get_sform(), header.get_qform())]
    except (ValueError, nib.spatialimages.HeaderDataError):
        return ['its qform is damaged']
    return [f'its sform says {axes[0]}, its qform {axes[1]}'] if axes[0] != axes[1] else []

def native_of(image, path):
    """Native of a nibabel image; ValueError for what read() refuses by the header alone."""
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        hint = '; split the series first' if len(shape) > 3 else ''
        raise ValueError(f'{path}: shape {tuple(image.shape)}: a single 3D volume is needed{hint}')
    if max(shape) > 1024:
        raise ValueError(f'{path}: shape {shape}: more than 1024 voxels along an axis; '
                         'is the header damaged?')
    if image.get_data_dtype().kind not in 'iuf':
        raise ValueError(f'{path}: voxels of type {image.get_data_dtype()}: a number per voxel is needed')
    if image.affine is None or not np.isfinite(image.affine).all():
        raise ValueError(f'{path}: its affine cannot be inverted; repair the header')
    affine, unit_doubt = in_mm(image)
    sizes = voxel_sizes(affine)
    if not sizes.min() > 0 or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise ValueError(f'{path}: its affine cannot be inverted; repair the header')
    extent = sizes * shape
    if not (5 <= extent.max() <= 1500 and 0.01 <= sizes.min() and sizes.max() <= 100):
        raise ValueError(f'{path}: its field of view is {mm_text(extent)} mm: are its voxel sizes '
                         f'({mm_text(sizes)}) in mm? Repair the header')
    doubts = [line for line in (unit_doubt, *header_doubts(image.header)) if line]
    header = image.header.copy() if isinstance(image.header, nib.Nifti1Header) else None
    return Native(affine, shape, ''.join(nib.aff2axcodes(affine)), tuple(map(float, sizes)), header,
                  tuple(doubts))

def read(path):
    """path of a scan, or ARCHIVE.zip/MEMBER -> volume (D,H,W) in RAS+, its affine (4,4) in mm, Native.

    Read are NIfTI (.nii, .nii.gz, .img with .hdr), MGH (.mgz, .mgh) and Analyze, compressed or not.
    Refused: a file that is missing, cut short, damaged (by its checksum if compressed) or no scan; sizes over
    1024, checked before memory is taken; 2D; 4D with more than one volume; colour or complex voxels; NaN or
    Inf; a constant volume; an affine that cannot be inverted; a field of view under 5 mm or over 1.5 m.
    """
    path = os.fspath(path)
    if not os.path.isfile(file_of(path)): raise ValueError(f'{path}: no such file')
    with unpacked(path) as file:
        try:
            image = load(file)
        except Damaged as e:
            raise ValueError(f'{path}: its voxels cannot be read ({e}); download it again')
        except Exception as e:
            raise ValueError(f'{path}: not a readable NIfTI file ({type(e).__name__}); is it complete?')
        try:
            native = native_of(image, path)
        except Exception as e:
            if str(e).startswith(f'{path}: '): raise
            raise ValueError(f'{path}: its header cannot be used ({type(e).__name__}: {one_line(e)})')
        try:
            with np.errstate(all='ignore'):  # what overflows is infinite, and refused
                data = np.asarray(image.dataobj, np.float32).reshape(native.shape)
        except Exception as e:
            raise ValueError(f'{path}: its voxels cannot be read ({type(e).__name__}); '
                             'the file is cut short or damaged')
    low, high = data.min(), data.max()
    if not np.isfinite([low, high]).all():
        bad = np.size(data) - np.count_nonzero(np.isfinite(data))
        raise ValueError(f'{path}: {bad} voxels are NaN or infinite; repair or leave out')
    if low == high: raise ValueError(f'{path}: every voxel is {low:g}: an empty volume')
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, native.affine))
    return np.ascontiguousarray(canonical.dataobj, np.float32), canonical.affine, native

def one_line(text):
    return ' '.join(str(text).split())

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
        nib.save(like_native(data, native), part)
        os.replace(part, path)
    except (OSError, nib.filebasedimages.ImageFileError) as e:
        raise ValueError(f'{path}: cannot write ({e})')
    finally:  # after an error or Ctrl-C
        if os.path.exists(part):
            os.remove(part)

def like_native(data, native):
    """A NIfTI-1 image of data with the affine, and where they are known the codes, units and description."""
    if native.header is None: return nib.Nifti1Image(data, native.affine)
    header = nib.Nifti1Header.from_header(native.header, check=False)
    for name in ('sform_code', 'qform_code', 'descrip', 'aux_file'):
        header[name] = native.header[name]
    header.set_data_shape(data.shape)
    header.set_data_dtype(np.float32)
    header['cal_min'], header['cal_max'] = 0, 0
    header['intent_code'] = 0
    return nib.Nifti1Image(data, None, header)

def save_npy(path, array):
    """Store an array as .npy, whole or not at all; returns the checksum of its voxels."""
    array = np.ascontiguousarray(array)
    part = part_of(path)
    try:
        np.save(part, array)
        os.replace(part, path)
    finally:  # after an error or Ctrl-C
        if os.path.exists(part):
            os.remove(part)
    return zlib.crc32(array)

# ---------------------------------------------------------------- grids

MOST_VOXELS = 2 ** 30  # of a grid, 4 GiB in float32

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
    if np.prod(new_shape, dtype=float) > MOST_VOXELS:
        raise ValueError(f'its field of view would take {np.prod(new_shape, dtype=float):.2g} voxels of '
                         f'{spacing_mm:g} mm: are its voxel sizes right?')
    return rescaled(affine, spacing_mm / old), new_shape

def stretched(affine, shape, new_shape):
    """affine of a grid of new_shape voxels over the same field of view, of whatever spacing."""
    return rescaled(affine, np.array(shape) / np.array(new_shape))

def resample(volume, affine, target_affine, target_shape):
    """volume (D,H,W) on another grid: trilinear, 0 outside; a copy where the grids agree."""
    if volume.shape == tuple(target_shape) and np.allclose(affine, target_affine, atol=1e-4):
        return volume.copy()
    to_source = np.linalg.inv(affine) @ target_affine
    coarser = np.linalg.norm(to_source[:3, :3], axis=1)  # a target voxel's extent along each source axis
    sigma = np.sqrt(np.maximum(coarser ** 2 - 1, 0)) / 2.355
    if sigma.max() > 0.2:  # else detail finer than the target's voxels would alias
        volume = ndimage.gaussian_filter(volume, sigma)
    matrix = to_source[:3, :3]
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-6):
        matrix = np.diag(matrix)  # axis by axis is much faster
    # 'constant' gives 0 beyond the outer voxels' centres, where a brain may reach
    return ndimage.affine_transform(volume, matrix, to_source[:3, 3], tuple(target_shape), order=1,
                                    mode='grid-constant')

def resample_inside(volume, mask, affine, target_affine, target_shape):
    """volume and bool mask (D,H,W) on another grid, 0 outside.

    Values are means over the mask alone, so that edges do not fade.
    """
    weight = resample(mask.astype(np.float32), affine, target_affine, target_shape)
    inside = weight > 0.5
    values = resample(np.where(mask, volume, 0).astype(np.float32, copy=False), affine, target_affine,
                      target_shape)
    means = np.zeros(inside.shape, np.float32)
    np.divide(values, weight, out=means, where=inside)
    return means, inside

# ---------------------------------------------------------------- brain, box, intensities

def bounds(mask):
    """Three slices: the smallest box that holds a bool mask (D,H,W)."""
    return ndimage.find_objects(mask.astype(np.int8), 1)[0]

def without_specks(mask):
    """A bool mask (D,H,W) without its parts of less than a hundredth of the largest."""
    where = bounds(mask)
    parts, n = ndimage.label(mask[where])
    sizes = np.bincount(parts.ravel(), minlength=n + 1)
    sizes[0] = 0
    clean = np.zeros_like(mask)
    clean[where] = (sizes >= 0.01 * sizes.max())[parts] & mask[where]
    return clean

def box_start(mask, shape):
    """Where a box of `shape` starts to hold the mask (negative is padding), and the fraction that it loses.

    A smaller brain is centred. A larger one loses its inferior end first: the last axis keeps its top, the
    others their middle. Specks, such as one bright voxel far from the brain, do not count.
    """
    start = []
    for axis, brain in enumerate(bounds(without_specks(mask))):
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

def scale_intensity(volume, mask, percentiles=(0.5, 99.5), of='brain', clip=True, region=None):
    """volume to [0,1] by two percentiles -> scaled float32, low, high. ValueError if the percentiles agree.

    of: 'brain', inside the mask, or 'volume', everywhere. region: of a head, the part of the mask that is
    brain for certain (inner_region), instead of the mask. clip=False keeps what lies above 1. scaled is 0
    outside the mask and at least 1e-4 inside, so that `scaled > 0` is the mask for ever.
    """
    if not mask.any(): raise ValueError('none of its brain lies in the box')
    inside, values = volume[mask], volume
    if of == 'brain':
        values = volume[region] if region is not None and region.any() else inside
    low, high = (float(p) for p in np.percentile(values, percentiles))
    if high <= low:
        raise ValueError(f'percentiles {percentiles} of the {of} are both {low:g}: nothing to scale')
    scaled = np.zeros(volume.shape, np.float32)
    scaled[mask] = np.clip((inside - low) / (high - low), 1e-4, 1 if clip else None)
    return scaled, low, high

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
    estimated: list        # per scan: a head or no clean background, so the mask is a guess at the head
    doubts: list = ()      # per scan, lines: an unlikely size, a slab

@contextmanager
def blaming(k):
    """Errors of scan k of a session: ValueErrors whose second argument is its index."""
    try:
        yield
    except (ValueError, IndexError, MemoryError) as e:
        raise ValueError(one_line(e.args[0] if e.args else type(e).__name__), k)

@dataclass
class Inside:
    """The brain of a scan on the grid of its session."""
    mask: np.ndarray
    estimated: bool
    region: np.ndarray     # what is brain for certain
    doubts: list

def find_inside(volume, affine, mask, target_affine, target_shape):
    """A scan (D,H,W) on the target grid, 0 outside its brain, and its Inside. mask: None to find it."""
    estimated = False
    if mask is None:
        mask, estimated = brain_mask(volume, voxel_sizes(affine))
    scan, inside = resample_inside(volume, mask, affine, target_affine, target_shape)
    sizes = voxel_sizes(target_affine)
    region = inner_region(inside, sizes) if estimated else inside
    doubts = [line for line in (size_doubt(mask, voxel_sizes(affine), estimated), cut_doubt(mask, estimated))
              if line]
    return scan, Inside(inside, estimated, region, doubts)

def check_coverage(insides, least):
    """Note the scans that cover a part of another one's brain; ValueError, with the index, below `least`."""
    for k, inside in enumerate(insides):
        others = [other.region for other in insides if other is not inside]
        covered = min([(inside.mask & region).sum() / region.sum() for region in others], default=1.0)
        if covered >= 0.9: continue
        slab = f'a slab: it covers {covered:.0%} of the brain that another scan of its session shows'
        if covered < least:
            raise ValueError(f'{slab}; --min_coverage={max(covered - 0.01, 0):.2f} keeps it', k)
        inside.doubts.append(slab)

def conform(volumes, affines, shape, spacing_mm=1.0, resize=False, percentiles=(0.5, 99.5),
            percentiles_of='brain', clip=True, masks=None, min_coverage=0.0):
    """A session's scans, RAS+ with their affines -> boxes (shape) in [0,1] on one grid, Placement.

    The grid is that of the first scan, made isotropic; the others are brought there through the affines, each
    interpolated once. The box holds the union of the brains; each scan is scaled inside its own. A scan that
    cannot be used is a ValueError whose second argument is its index: one whose brain covers less than 5 % of
    the first one's (they do not overlap), or less than min_coverage of another one's (a slab).
    masks: a bool mask of the brain per scan, None where it is to be found (brain_mask).
    resize: stretch the first scan's whole field of view over the box instead, as DeCo-VAE's 182x218x182 mm
    over 128x256x128 voxels.
    """
    with blaming(0):
        if resize:
            affine, grid_shape = stretched(affines[0], volumes[0].shape, shape), tuple(shape)
        else:
            affine, grid_shape = grid(affines[0], volumes[0].shape, spacing_mm)
    scans, insides = [], []
    for k, volume in enumerate(volumes):
        with blaming(k):
            scan, inside = find_inside(volume, affines[k], masks[k] if masks else None, affine, grid_shape)
            scans.append(scan)
            insides.append(inside)
            first = insides[0].region
            if not first.any():
                raise ValueError(f'nothing is left of its brain at {spacing_mm:g} mm; '
                                 'are its voxel sizes right?')
            if k and (inside.mask & first).sum() < 0.05 * first.sum():
                raise ValueError('does not overlap the first scan of its session; '
                                 'are the affines of one space?')
    check_coverage(insides, min_coverage)
    union = np.logical_or.reduce([inside.mask for inside in insides])
    start, lost = ([0, 0, 0], 0.0) if resize else box_start(union, shape)
    scaled = []
    for k, (scan, inside) in enumerate(zip(scans, insides)):
        box, mask = crop_pad(scan, start, shape), crop_pad(inside.mask, start, shape)
        region = crop_pad(inside.region, start, shape) if inside.estimated else None
        with blaming(k):
            scaled.append(scale_intensity(box, mask, percentiles, percentiles_of, clip, region))
    boxes, low, high = map(list, zip(*scaled))
    estimated, doubts = [inside.estimated for inside in insides], [inside.doubts for inside in insides]
    return boxes, Placement(affine, grid_shape, start, low, high, float(lost), estimated, doubts)

def check_inside(path, placement):
    """ValueError where most of a brain lies outside the box: nothing useful would come back."""
    if placement.lost <= 0.5: return
    raise ValueError(f'{path}: {placement.lost:.0%} of its brain lies outside the box of the model; strip '
                     'and crop the scan to its brain, and see whether its voxel sizes are right')

def restore(box, placement, affine, shape, low=0.0, high=1.0, background=0.0):
    """A box in [0,1] back on a RAS+ grid (affine, shape); `background` where the box is 0 or ends.

    low, high: the intensities that 0 and 1 become.
    """
    back = [-s for s in placement.start]
    full = crop_pad(low + box * (high - low), back, placement.grid_shape)
    mask = crop_pad(box > 0, back, placement.grid_shape)
    volume, inside = resample_inside(full, mask, placement.affine, affine, shape)
    volume[~inside] = background
    return volume
