"""What of a scan is brain: its mask, head or brain, and whether its size is one that people have.

Volumes are arrays (D,H,W) in RAS+. Nothing here depends on the offset or the scale of intensities.
"""
import numpy as np
from scipy import ndimage

COARSE_MM = 3.0            # of the small copy on which scans are judged
BRAIN_LITRES = (0.5, 2.5)  # of adults, the fluid around it included
HEAD_LITRES = (1.5, 7.0)
BRAIN_WIDTH_MM = 158       # brains are up to about 150 mm wide, heads of adults from 140 mm on
DIRTY_AIR = 0.01           # of the blocks outside a stripped brain, those that are not empty

# ---------------------------------------------------------------- the mask

def brain_mask(volume, voxel_mm=(1.0, 1.0, 1.0)):
    """volume (D,H,W) -> bool mask, and whether it had to be estimated.

    Of a stripped scan it is all but the background, the one value of at least 30 % of the voxels, whatever
    its level: 0, -1, -1024. A scan is not stripped where its air holds noise, or where that mask is a head's
    (is_head). The mask then is the head: above a threshold over air, largest part, holes filled.
    """
    background = background_value(volume)
    if background is not None:
        mask = volume != background
        small, fraction, small_mm = coarse(volume, mask, voxel_mm)
        small -= background
        solid = largest_part(fraction > 0.5, by_slices=False)
        if is_clean(fraction, solid):
            head = is_head(small, solid, small_mm)
            below = np.count_nonzero(volume < background) > 0.02 * np.count_nonzero(mask)
            if not head or below:  # z-scores: the background is no air, but a mean
                return mask, bool(head)
        field = ndimage.find_objects(mask.astype(np.int8), 1)[0]
        if mask[field].mean() > 0.85:  # a field of view, with its own air, in a larger grid
            mask[field] = head_mask(volume[field])
            return mask & (volume != background), True
    return head_mask(volume), True

def background_value(volume):
    """The value of at least 30 % of the voxels, None where there is none."""
    if np.count_nonzero(volume) <= 0.7 * volume.size: return 0.0
    faces = [volume[0], volume[-1], volume[:, 0], volume[:, -1], volume[:, :, 0], volume[:, :, -1]]
    values, counts = np.unique(np.concatenate([face.ravel() for face in faces]), return_counts=True)
    value = values[np.argmax(counts)]
    return value if np.count_nonzero(volume == value) >= 0.3 * volume.size else None

def block_means(volume, sizes):
    """Means (d,h,w) of blocks of `sizes` voxels; what does not fill a block at the end is left out."""
    total = volume[tuple(slice(n // k * k) for n, k in zip(volume.shape, sizes))]
    for axis, k in enumerate(sizes):
        parts = [total[(slice(None),) * axis + (slice(start, None, k),)] for start in range(k)]
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total += part
    return total / np.float32(np.prod(sizes))

def block_sizes(shape, voxel_mm):
    """How many voxels per axis make about COARSE_MM."""
    return [min(max(1, round(COARSE_MM / mm)), n) for mm, n in zip(voxel_mm, shape)]

def coarse(volume, mask, voxel_mm):
    """Small copies in blocks of about COARSE_MM: volume, fraction inside the mask; and their voxels in mm."""
    sizes = block_sizes(volume.shape, voxel_mm)
    return block_means(volume, sizes), block_means(mask, sizes), np.multiply(voxel_mm, sizes)

def largest_part(mask, by_slices=True):
    """The largest connected part of a bool mask, holes filled; as it is where it is empty.

    by_slices: holes in slices of any axis, since a head leaves the field of view, instead of closed ones.
    """
    if not mask.any(): return mask
    parts, _ = ndimage.label(mask)
    solid = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    if not by_slices: return ndimage.binary_fill_holes(solid)
    for axis in range(3):
        for plane in np.moveaxis(solid, axis, 0):
            plane[:] = ndimage.binary_fill_holes(plane)
    return solid

def is_clean(fraction, solid):
    """Whether nearly all that is not background is one solid thing, and the air around it is empty."""
    if not solid.any(): return True  # crumbs: too little to judge
    if solid.sum() > 1.4 * fraction.sum(): return False
    air = ~ndimage.binary_dilation(solid, iterations=2)
    return not air.any() or np.mean(fraction[air] > 0) < DIRTY_AIR

def head_mask(volume):
    """The head of a raw scan, bool (D,H,W): a threshold between the level of air and tissue."""
    air = air_level(volume)
    smooth = ndimage.gaussian_filter(volume, 1)
    highest = np.percentile(smooth, 99)
    contrast = otsu_threshold(np.clip(smooth, min(air, highest), highest)) - air
    bright = (smooth > air + 0.4 * contrast) & (volume > air + 0.2 * contrast)  # smoothing alone widens it
    padded = np.pad(bright, 2, 'edge')  # else closing would take the ends of the field of view
    closed = ndimage.binary_closing(padded, iterations=2)[2:-2, 2:-2, 2:-2]
    if not closed.any():
        raise ValueError('no brain is found in it: no voxels stand out from the background')
    return largest_part(closed)

def air_level(volume):
    """The median of the corners of the field of view, where there is air in most scans."""
    corners = [volume]
    for axis, n in enumerate(volume.shape):
        k = max(1, n // 8)
        first, last = [slice(None)] * 3, [slice(None)] * 3
        first[axis], last[axis] = slice(k), slice(n - k, n)
        corners = [corner[tuple(end)] for corner in corners for end in (first, last)]
    return float(np.median([np.median(corner) for corner in corners]))

def otsu_threshold(values):
    """The threshold between two classes of values with the largest variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sum_below = np.cumsum(counts), np.cumsum(counts * centres)
    above, sum_above = below[-1] - below, np.sum(counts * centres) - sum_below
    distance = sum_below / np.maximum(below, 1) - sum_above / np.maximum(above, 1)
    return centres[np.argmax(below * above * distance ** 2)]

# ---------------------------------------------------------------- head or brain

def depth_mm(solid, voxel_mm):
    """Distance of every voxel of a bool mask to the outside, which is not below the first slice: a neck."""
    padded = np.pad(np.pad(solid, ((1, 1), (1, 1), (0, 1))), ((0, 0), (0, 0), (1, 0)), 'edge')
    return ndimage.distance_transform_edt(padded, sampling=voxel_mm)[1:-1, 1:-1, 1:-1]

def upper(solid, voxel_mm, mm=90):
    """The part of a bool mask that lies within so many mm of its top: no neck, no jaw."""
    top = np.flatnonzero(solid.any((0, 1)))[-1] + 1
    part = solid.copy()
    part[:, :, :max(0, top - round(mm / voxel_mm[2]))] = False
    return part

def is_head(small, solid, voxel_mm):
    """Whether a scan without air, 0 outside the mask `solid`, shows a head and not a brain alone.

    It is too large for a brain, or its outermost 3 mm are nearly as dark as air, or dark layers reach deeper
    than the fluid around a brain, or a bright rim (the scalp) lies outside a dark layer (the skull).
    """
    if not solid.any(): return False
    litres = solid.sum() * np.prod(voxel_mm) / 1e6
    across = np.flatnonzero(solid.any((1, 2)))
    width_mm = (across[-1] - across[0] + 1) * voxel_mm[0]
    if litres > BRAIN_LITRES[1] or width_mm > BRAIN_WIDTH_MM + COARSE_MM: return True
    bottom = np.flatnonzero(upper(solid, voxel_mm, 120).any((0, 1)))[0]
    small, solid = small[:, :, bottom:], solid[:, :, bottom:]  # what lies far below does not count
    depth = depth_mm(solid, voxel_mm)
    depth[~upper(solid, voxel_mm)] = 0
    if depth.max() <= 18: return False  # too small to have layers
    values = small - min(np.percentile(small[solid], 2), 0)  # negative where 0 is not air but a mean
    tissue = np.median(values[depth > 18])
    if tissue <= 0: return False
    layers = {}
    for start in range(0, 24, 3):
        layer = (depth > start) & (depth <= start + 3)
        if layer.any():
            layers[start] = np.median(values[layer]) / tissue
    scaled = not np.array_equal(values, small)  # their ratios say less
    if not scaled and (layers.get(0, 1) < 0.05 or layers.get(6, 1) < 0.45): return True
    scalp = max([start for start in layers if start < 15], key=layers.get)
    skull = min(layers[start] for start in layers if start >= scalp)
    return skull < (0.4 if scaled else 0.8) * min(layers[scalp], 1.0)

def inner_region(mask, voxel_mm):
    """Where a head (bool mask) holds brain for certain: 18 mm below its surface, at most 90 mm below its top.

    Of what is smaller than a head, a third of its depth. Intensities of a head are scaled by this part of it:
    fat under the scalp is brighter than any brain.
    """
    sizes = block_sizes(mask.shape, voxel_mm)
    solid = block_means(mask, sizes) > 0.5
    if not solid.any(): return mask
    small_mm = np.multiply(voxel_mm, sizes)
    depth = depth_mm(solid, small_mm)
    inner = upper(solid, small_mm) & (depth > min(18, depth.max() / 3))
    for axis, k in enumerate(sizes):
        inner = np.repeat(inner, k, axis)
    inner = np.pad(inner, [(0, n - k) for n, k in zip(mask.shape, inner.shape)])
    return inner & mask if (inner & mask).any() else mask

# ---------------------------------------------------------------- size and coverage

def size_doubt(mask, voxel_mm, head=False):
    """One line where a mask has a volume that no adult's brain (or head) has, else ''."""
    litres = np.count_nonzero(mask) * float(np.prod(voxel_mm)) / 1e6
    low, high = HEAD_LITRES if head else BRAIN_LITRES
    if low <= litres <= high: return ''
    what = 'head' if head else 'brain'
    return f'its {what} has {litres:.3g} l, of adults {low:g} to {high:g}: are the voxel sizes right?'

def cut_doubt(mask, head=False):
    """One line where a field of view ends within the brain, at its top or bottom, else ''."""
    areas = np.trim_zeros(mask[::2, ::2].sum((0, 1)))
    if not areas.any(): return ''
    ends = {'top': areas[-1]} if head else {'top': areas[-1], 'bottom': areas[0]}
    most = 0.7 if head else 0.4  # scans often end a little below the top of the head
    cut = [name for name, area in ends.items() if area > most * areas.max()]
    if not cut: return ''
    return f"a slab: the field of view ends within the brain at its {' and '.join(cut)}"
