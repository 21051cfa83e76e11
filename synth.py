"""Anatomy to images: procedural brain phantoms, and T1w, T2w, FLAIR and PD images from any label map.

Arrays are (D, H, W) = (left-right, posterior-anterior, inferior-superior), RAS+: an index grows to the right,
to the front and to the top. Labels are FreeSurfer numbers. All randomness comes from an explicit generator.

    phantom(index, shape, seed) -> labels (anatomy, sex, age) -> images (contrast, bias field, texture, noise)
"""
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation

LABELS = {
    0: 'background', 24: 'CSF', 14: '3rd ventricle', 15: '4th ventricle', 16: 'brain stem',
    2: 'left cerebral white matter', 41: 'right cerebral white matter',
    3: 'left cerebral cortex', 42: 'right cerebral cortex',
    4: 'left lateral ventricle', 43: 'right lateral ventricle',
    7: 'left cerebellum white matter', 46: 'right cerebellum white matter',
    8: 'left cerebellum cortex', 47: 'right cerebellum cortex',
    10: 'left thalamus', 49: 'right thalamus', 11: 'left caudate', 50: 'right caudate',
    12: 'left putamen', 51: 'right putamen', 13: 'left pallidum', 52: 'right pallidum',
    17: 'left hippocampus', 53: 'right hippocampus',
}

# ---------------------------------------------------------------------------------------------- anatomy

# The reference brain lives in a box of millimetres, x to the right, y to the front, z to the top, and the
# box is stretched over whatever `shape` is asked for.
BOX = np.array([(-84, 84), (-124, 94), (-78, 90)], np.float32)
CENTRE = np.array([0, -17, 7], np.float32)

# name: (left label, right label, stretch, nodes). A structure is a chain of balls (x, y, z, radius), joined
# by
# cones, in a space stretched per axis; one node is an ellipsoid. Nodes are those of the right side and are
# mirrored; a midline structure has one label. Later rows are painted over earlier ones.
STRUCTURES = {
    'lateral ventricle': (
        4,
        43,
        (0.8, 1.0, 1.15),
        [
            (13, 31, 2, 2.5),
            (10, 22, 9, 5),
            (9, 2, 19, 5.5),
            (13, -18, 20, 5.5),
            (22, -38, 14, 7.5),
            (25, -58, 8, 4.5),
            (24, -74, 5, 1.5),
        ],
    ),
    'inferior horn': (
        4,
        43,
        (1.1, 1.0, 0.8),
        [(23, -38, 12, 6), (33, -36, -5, 4), (35, -20, -17, 3), (32, -8, -20, 2)],
    ),
    'caudate': (
        11,
        50,
        (0.9, 1.0, 1.0),
        [(13, 20, 0, 7.5), (15, 12, 9, 7), (17, -4, 18, 4.5), (21, -22, 20, 3), (29, -36, 12, 2.2)],
    ),
    'putamen': (12, 51, (0.62, 1.2, 1.0), [(23, 14, 0, 9), (28, 0, 2, 11), (31, -14, 2, 6.5)]),
    'pallidum': (13, 52, (0.65, 1.1, 0.9), [(17, 3, -1, 6), (22, -9, 0, 6)]),
    'thalamus': (10, 49, (0.95, 1.1, 0.95), [(7, -8, 7, 6), (11, -18, 9, 9.5), (15, -27, 8, 7)]),
    'hippocampus': (
        17,
        53,
        (1.1, 1.0, 0.85),
        [(23, -9, -21, 6.5), (27, -20, -17, 5.5), (29, -32, -8, 4.5), (23, -39, 3, 3)],
    ),
    'brain stem': (
        16,
        16,
        (1.05, 0.9, 1.0),
        [(0, -22, -8, 12), (0, -25, -17, 13), (0, -26, -32, 16), (0, -36, -50, 9), (0, -41, -64, 7)],
    ),
    '3rd ventricle': (14, 14, (0.16, 1.0, 0.8), [(0, -4, -3, 10), (0, -20, 4, 11)]),
    '4th ventricle': (15, 15, (1.0, 0.6, 1.3), [(0, -44, -33, 7.5), (0, -41, -24, 2.5)]),
}
TEMPORAL = [(38, 12, -28, 16), (48, -18, -21, 18), (50, -45, -10, 20)]
CEREBELLUM = [((22, -66, -38), (30, 27, 20)), ((-22, -66, -38), (30, 27, 20)), ((0, -62, -36), (16, 25, 23))]
CORE = ((0, -6, 6), (37, 42, 23))  # corpus callosum and all inside it: no fissure and no fold goes in here
WAVES, WAVELENGTH = 24, 27.0  # plane waves whose sum folds the cortex; sulci lie half a wavelength (mm) apart

# factors for a woman relative to a man
FEMALE = {'brain': 0.96, 'lateral ventricle': 0.92, 'hippocampus': 1.08, 'caudate': 1.08, 'putamen': 0.95}

def _smooth_field(shape, rng, order=4):
    """float32 field of `shape` with mean 0 and standard deviation 1: a random low-order cosine series."""
    field = rng.standard_normal((order,) * len(shape)).astype(np.float32)
    for n in shape:  # each step turns the first axis from order to n points and moves it to the end
        basis = np.cos(np.pi * np.outer(np.arange(order), (np.arange(n) + 0.5) / n)).astype(np.float32)
        field = np.tensordot(field, basis, axes=(0, 0))
    field -= field.mean()
    return field / field.std()

def _ball(p, centre, radii):
    """Depth in mm below the surface of an ellipsoid, negative outside; p is (3, ...) in mm."""
    q = [(p[i] - centre[i]) / np.float32(radii[i]) for i in range(3)]
    level = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-6)
    slope = np.sqrt(sum((q[i] / np.float32(radii[i])) ** 2 for i in range(3))) + np.float32(1e-6)
    return level * (1 - level) / slope

def _chain(p, nodes, stretch=(1, 1, 1)):
    """Depth below the surface of a chain of balls (x, y, z, radius), negative outside; p is (3, ...) in mm."""
    scale = np.asarray(stretch, np.float32)
    p = [p[i] / scale[i] for i in range(3)]
    nodes = [(np.array(n[:3], np.float32) / scale, n[3]) for n in nodes]
    depth = None
    for (a, ra), (b, rb) in zip(nodes[:-1] or nodes, nodes[1:] or nodes):
        ab = b - a
        t = sum((p[i] - a[i]) * ab[i] for i in range(3)) / max(float(ab @ ab), 1e-6)
        t = np.clip(t, 0, 1)
        away = np.sqrt(sum((p[i] - a[i] - t * ab[i]) ** 2 for i in range(3)))
        d = ra + t * (rb - ra) - away
        depth = d if depth is None else np.maximum(depth, d)
    return depth

def _join(a, b, k=6.0):
    """Smooth maximum of two depths: a union whose seam is rounded over k mm."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h * np.float32(0.25 / k)

def _folds(p, waves, phases):
    """Distance in mm to the nearest zero of a sum of plane waves at points p (n, 3): that of one wave, exactly.

    waves (3, WAVES) in radians per mm, phases (WAVES,). Zeros of such a sum are winding, evenly spaced sheets.
    """
    k = np.float32(2 * np.pi / WAVELENGTH)
    out = np.empty(len(p), np.float32)
    for i in range(0, len(p), 65536):
        angle = p[i:i + 65536] @ waves + phases
        value = np.cos(angle).sum(1)
        slope = np.sqrt(((np.sin(angle) @ waves.T) ** 2).sum(1))
        out[i:i + 65536] = np.arctan2(k * np.abs(value), slope) / k
    return out

def _coordinates(shape, rng, size):
    """(3, D, H, W) float32: where in the reference brain (mm) each voxel of a subject lies."""
    aspect = size * np.exp(0.04 * np.clip(rng.standard_normal(3), -2, 2))
    pitch, roll, yaw = np.radians((4, 2, 2)) * np.clip(rng.standard_normal(3), -2, 2)  # how the head lies
    turn = Rotation.from_euler('xyz', (pitch, roll, yaw)).as_matrix().astype(np.float32) / aspect[
        :, None
    ].astype(np.float32)
    lines = [
        (np.arange(n, dtype=np.float32) + 0.5) / n * (hi - lo) + lo - c
        for n, (lo, hi), c in zip(shape, BOX, CENTRE)
    ]
    grid = np.meshgrid(*lines, indexing='ij', sparse=True)
    p = np.empty((3,) + tuple(shape), np.float32)
    for i in range(3):
        p[i] = (
            sum(turn[i, j] * grid[j] for j in range(3))
            + CENTRE[i]
            + np.float32(2.0) * _smooth_field(shape, rng)
        )
    return p

def _window(shape, nodes, stretch):
    """Slices of the part of the box that holds a structure, with room for the deformation."""
    nodes = np.array(nodes)
    window = []
    for i, n in enumerate(shape):
        reach = nodes[:, 3].max() * stretch[i] + 32
        ends = np.array([nodes[:, i].min() - reach, nodes[:, i].max() + reach])
        lo, hi = (ends - BOX[i, 0]) / (BOX[i, 1] - BOX[i, 0]) * n
        window.append(slice(max(int(lo), 0), int(hi) + 1))
    return tuple(window)

def _paint_structures(labels, p, rng, factor, spacing):
    """Paint the table of structures over labels in place; factor: {name: size factor}."""
    for name, (left, right, stretch, nodes) in STRUCTURES.items():
        grow = factor.get(name, 1.0) * np.exp(0.05 * rng.standard_normal())
        for side, label in ((-1, left), (1, right))[int(left == right):]:
            jitter, grow_side = rng.standard_normal(3) * (0.3 + 0.5 * (left != right), 0.8, 0.8), np.exp(
                0.03 * rng.standard_normal()
            )
            placed = np.array(nodes, float) * (side, 1, 1, 1)
            placed[:, :3] += jitter
            # never lost between voxels
            placed[:, 3] = np.maximum(placed[:, 3] * grow * grow_side, 0.55 * min(spacing))
            wide = np.maximum(stretch, 0.55 * np.array(spacing) / placed[:, 3].max())
            window = _window(labels.shape, placed, wide)
            inside = _chain(p[(slice(None),) + window], placed.tolist(), wide) > 0
            labels[window][inside & (labels[window] > 0)] = label

def phantom_labels(shape, rng, sex, age=50.0):
    """Label map (D, H, W) int16 of a random subject; sex 'F' or 'M', age in years.

    The draws do not depend on shape: the same generator state gives the same subject at any resolution.
    """
    if sex not in ('F', 'M'):
        raise ValueError(f"sex must be 'F' or 'M', got {sex!r}")
    female, older = FEMALE if sex == 'F' else {}, (age - 50) / 30
    factor = dict(female)
    for name in ('lateral ventricle', 'inferior horn', '3rd ventricle'):
        factor[name] = female.get(name, 1.0) * (1 + 0.25 * older) * np.exp(0.12 * rng.standard_normal())
    p = _coordinates(
        shape, rng, factor.get('brain', 1.0) * np.exp(0.03 * np.clip(rng.standard_normal(), -2, 2))
    )
    spacing = [float(BOX[i, 1] - BOX[i, 0]) / n for i, n in enumerate(shape)]
    x, y, z = np.abs(p[0]), p[1], p[2]
    right = p[0] > 0
    half = np.stack([x, y, z])

    # depths in mm, positive inside: cerebrum, cerebellum, and the brain with all its gaps filled
    cerebellum = _join(_join(_ball(p, *CEREBELLUM[0]), _ball(p, *CEREBELLUM[1])), _ball(p, *CEREBELLUM[2]))
    cerebrum = -_join(-_ball(p, (0, -17, 10), (69, 87, 66)), -(z + 19 - 0.0016 * (y + 10) ** 2), 12)
    cerebrum = _join(cerebrum, _chain(half, TEMPORAL), 8)
    stem = _chain(p, STRUCTURES['brain stem'][3], STRUCTURES['brain stem'][2])
    brain = _join(_join(cerebrum, cerebellum, 14), stem, 14)
    core = _ball(p, *CORE)

    # cerebrum: depth below the pial surface, which follows the fissures and the folds
    thickness = 3.0 - 0.2 * older + 0.3 * rng.standard_normal() * 0.5
    widen = 0.7 + 0.25 * older
    depth = np.minimum(cerebrum, np.maximum(x - widen, core))
    depth = np.minimum(depth, -cerebellum - 2)
    plane = z + 4 - 0.35 * (10 - y) * (y < 10)
    sylvian = np.maximum(np.maximum(np.abs(plane) - 1 - widen, 37 - x), np.abs(y + 8) - 36)
    insula = np.maximum(np.maximum(np.abs(x - 38) - widen, np.abs(plane) - 13), np.abs(y - 2) - 20)
    pial = np.minimum(depth, np.minimum(sylvian, insula))
    common = np.random.default_rng(5)  # the main sulci are everyone's; a subject and a hemisphere vary them
    waves = common.standard_normal((3, WAVES))
    waves *= (
        2 * np.pi / WAVELENGTH * (1 + 0.12 * common.standard_normal(WAVES)) / np.linalg.norm(waves, axis=0)
    )
    phases = common.uniform(0, 2 * np.pi, WAVES) + 0.2 * rng.standard_normal(WAVES)
    shift = 0.15 * rng.standard_normal((2, WAVES))
    sulcus_depth = 17 + 3 * _smooth_field(shape, rng, 6)
    shell = (depth > 0) & (depth < sulcus_depth + thickness) & (core < thickness)
    for side in (0, 1):
        at = shell & (right == side)
        q = half[:, at].T - np.float32((30, -17, 10))
        r = np.sqrt((q ** 2).sum(1)) + 1
        # most of the way out to the surface, so that sulci run inwards
        q *= (1 + 0.85 * depth[at] / r)[:, None]
        fold = _folds(q, waves.astype(np.float32), (phases + shift[side]).astype(np.float32))
        width = widen + 1.6 * np.exp(-depth[at] / 4)
        fold = np.maximum(fold - width, np.maximum(depth[at] - sulcus_depth[at], core[at]))
        pial[at] = np.minimum(pial[at], fold)

    # cerebellum: folia are ridges around a centre near the 4th ventricle, white matter reaches into each
    wobble = 0.5 * _smooth_field(shape, rng, 6) + 0.0006 * x ** 2
    angle = np.arctan2(z + 33, -(y + 44))
    ridge = np.cos(13 * angle + wobble + rng.uniform(0, 6)) + 0.5 * np.cos(31 * angle + 2 * wobble)

    labels = np.where(brain > -2.5, 24, 0).astype(np.int16)
    grey = (pial > 0)
    labels[grey] = np.where(right, 42, 3)[grey]
    white = pial > thickness
    labels[white] = np.where(right, 41, 2)[white]
    grey = (cerebellum > 0) & ((ridge > -1.1) | (cerebellum > 8))
    labels[grey] = np.where(right, 47, 8)[grey]
    white = cerebellum > 8 - 4 * ridge
    labels[white] = np.where(right, 46, 7)[white]
    _paint_structures(labels, p, rng, factor, spacing)
    for axis in range(3):
        np.moveaxis(labels, axis, 0)[[0, -1]] = 0
    return labels

# ---------------------------------------------------------------------------------------------- images

# labels that share a mean; the phantoms' first, then those that only label maps of others hold
GROUPS = {
    'white': (2, 41, 7, 46, 77, 251, 252, 253, 254, 255),
    'cortex': (3, 42, 8, 47),
    'hippocampus': (17, 53, 18, 54),
    'thalamus': (10, 49),
    'caudate': (11, 50, 26, 58),
    'putamen': (12, 51),
    'pallidum': (13, 52),
    'stem': (16, 28, 60, 85),
    'csf': (24, 4, 43, 14, 15, 5, 44, 72),
}
# lesions, vessels, choroid plexus and borders inside ventricles count as the tissue around them
SAME_AS = {25: 2, 57: 41, 30: 24, 62: 24, 31: 4, 63: 43, 136: 4, 137: 43, 163: 4, 164: 43, 80: 2}
# mean intensity of each group, white or bright fluid near 1; a subject's own means lie within about 0.02 of
# these
TISSUE = {
    'T1w': dict(
        white=0.92, cortex=0.60, hippocampus=0.62, thalamus=0.75, caudate=0.66, putamen=0.69, pallidum=0.80,
        stem=0.84, csf=0.16
    ),
    'T2w': dict(
        white=0.32, cortex=0.50, hippocampus=0.53, thalamus=0.42, caudate=0.46, putamen=0.43, pallidum=0.29,
        stem=0.37, csf=0.95
    ),
    'FLAIR': dict(
        white=0.52, cortex=0.72, hippocampus=0.76, thalamus=0.64, caudate=0.68, putamen=0.65, pallidum=0.50,
        stem=0.56, csf=0.12
    ),
    'PD': dict(
        white=0.60, cortex=0.76, hippocampus=0.78, thalamus=0.70, caudate=0.73, putamen=0.72, pallidum=0.58,
        stem=0.64, csf=0.84
    ),
}

def _shrink(x, factor):
    """Mean over blocks of factor^3 voxels, as float32."""
    x = x.astype(np.float32)
    for axis in range(3):
        x = sum(x[(slice(None),) * axis + (slice(k, None, factor),)] for k in range(factor)) / np.float32(
            factor
        )
    return x

def is_random(modality):
    """random1, random2, ...: a contrast drawn anew for every image (domain randomisation, Billot et al. 2023)."""
    return modality.startswith('random') and modality[6:].isdigit()

def images_from_labels(labels, modalities, rng, noise=0.02, bias=0.08, shrink=1, thickness=1.0):
    """Images of any FreeSurfer-numbered label map -> {modality: float32 (D, H, W)}, background 0, brain above 0.

    labels: (D, H, W) integers; with shrink=2 twice as fine as the images, so that a voxel holds parts of tissues. modalities: of
    TISSUE, or is_random. noise: standard deviation of the Rician noise; bias: of the logarithm of a smooth field. thickness: slices
    up to so many voxels thick along a random axis. An image does not depend on which others are asked for. ValueError for an
    unknown modality or label.
    """
    unknown = sorted(
        set(np.unique(labels).tolist()) - {0} - {label for group in GROUPS.values() for label in group}
    )
    if unknown: raise ValueError(f'labels {unknown} have no tissue')
    base = int(rng.integers(2 ** 31))
    inside = _shrink(labels > 0, shrink) >= 0.5
    images = {}
    for modality in modalities:
        if modality not in TISSUE and not is_random(modality):
            raise ValueError(f"modality '{modality}': known are {', '.join(TISSUE)}, random1, random2, ...")
        own = np.random.default_rng(
            (base, len(TISSUE) + int(modality[6:]) if is_random(modality) else list(TISSUE).index(modality))
        )
        value = np.zeros(int(labels.max()) + 1, np.float32)
        means = (
            dict(zip(GROUPS, own.uniform(0.1, 1, len(GROUPS)))) if is_random(modality) else TISSUE[modality]
        )
        for group, mean in means.items():
            level = mean + 0.02 * own.standard_normal()
            for label in GROUPS[group]:
                if label < len(value):
                    value[label] = level
        clean = _shrink(ndimage.gaussian_filter(value[labels], 0.5), shrink)  # partial volume
        clean *= np.exp(bias * _smooth_field(clean.shape, own)) * (
            1 + 0.5 * noise * _smooth_field(clean.shape, own, 12)
        )
        real, imaginary = noise * own.standard_normal((2, *clean.shape), dtype=np.float32)
        image = np.hypot(clean + real, imaginary)
        if thickness > 1:
            image = ndimage.gaussian_filter1d(
                image, own.uniform(1, thickness) / 2.355, axis=int(own.integers(3))
            )
        images[modality] = np.where(inside, np.maximum(image, 1e-4), 0).astype(np.float32)
    return images

def coarsen(labels, fine):
    """Label map at 1/fine of the size: the commonest label of a block's tissue; background where half of the block is."""
    share = {label: _shrink(labels == label, fine) for label in np.unique(labels)}
    inside = 1 - share.pop(0, np.zeros(1)) >= 0.5
    return np.where(inside, np.array(list(share))[np.argmax(np.stack(list(share.values())), 0)], 0).astype(
        np.int16
    )

def phantom(index, shape, seed=0, modalities=('T1w', 'T2w', 'FLAIR')):
    """Subject number `index` (from 1) of a cohort: subject, session, sex, age, labels (D, H, W) int16, images {modality: float32}.

    A function of (index, shape, seed); anatomy and sex do not depend on the modalities. On grids coarser than 3 mm the anatomy
    is drawn twice as fine: a voxel's label is then the commonest of its eight, its intensity their mean.
    """
    rng = np.random.default_rng((seed, index))
    sex, age = 'FM'[rng.integers(2)], float(rng.uniform(20, 80))
    fine = 2 if max((hi - lo) / n for (lo, hi), n in zip(BOX, shape)) > 3 else 1
    labels = phantom_labels(tuple(fine * n for n in shape), rng, sex, age)
    images = images_from_labels(labels, modalities, np.random.default_rng((seed, index, 1)), shrink=fine)
    if fine > 1:
        labels = coarsen(labels, fine)
    return {
        'subject': f'sub-{index:03d}',
        'session': 'ses-01',
        'sex': sex,
        'age': age,
        'labels': labels,
        'images': images,
    }

# ---------------------------------------------------------------------------------------------- label maps of real heads

def brain_labels(labels):
    """A FreeSurfer-style map of a head -> its brain alone, in the labels that have a tissue (GROUPS). ValueError for unknown ones."""
    labels = np.where(labels < 500, labels, 0)  # from 500 on: what lies outside the brain
    for label, other in SAME_AS.items():
        labels = np.where(labels == label, other, labels)
    unknown = sorted(
        set(np.unique(labels).tolist()) - {0} - {label for group in GROUPS.values() for label in group}
    )
    if unknown:
        raise ValueError(f'labels {unknown} have no tissue; FreeSurfer numbers are expected')
    if not labels.any(): raise ValueError('a label map without a brain')
    parts, _ = ndimage.label(labels > 0)
    # specks apart from the brain go
    return np.where(parts == np.bincount(parts[parts > 0]).argmax(), labels, 0).astype(np.int16)

def strip(labels, voxels):
    """A label map without the CSF around the brain (24) that lies more than so many voxels from tissue."""
    tissue = (labels > 0) & (labels != 24)
    return np.where(ndimage.binary_dilation(tissue, iterations=voxels) if voxels else tissue, labels, 0)

def variant(labels, voxel_mm, shape, spacing_mm, modalities, seed, thickness_mm=1.0):
    """A deformed copy of a head's label map in a box of `shape` voxels of spacing_mm, and images of it.

    labels (D, H, W) RAS+, voxel_mm its three spacings. Turned within about 10 degrees and scaled by about 5 % per axis about the brain's
    middle, warped smoothly by about 2 mm; a brain too high for the box loses its inferior end. As skull-stripping cuts more or less
    tightly, the CSF around the brain goes from 0, 1 or 2 voxels on, or stays. A function of its arguments.
    returns labels (shape) int16, images {modality: float32}, lost, the fraction of the brain outside the box
    """
    labels, rng = brain_labels(labels), np.random.default_rng(seed)
    if (rim := int(rng.integers(4))) < 3:
        labels = strip(labels, rim)
    where = np.argwhere(labels > 0)
    low, high = where.min(0) * voxel_mm, (where.max(0) + 1) * voxel_mm
    box = np.array(shape) * spacing_mm
    middle = (low + high) / 2
    middle[2] = max(middle[2], high[2] - box[2] / 2)
    fine = 2 if spacing_mm > 1.5 * max(voxel_mm) else 1
    size = tuple(fine * n for n in shape)
    def normal():
        return np.clip(rng.standard_normal(3), -2.5, 2.5)
    turn = Rotation.from_euler('xyz', 4 * normal(), degrees=True).as_matrix() * np.exp(0.04 * normal())
    grid = np.meshgrid(
        *[(np.arange(n, dtype=np.float32) + 0.5) * (spacing_mm / fine) - b / 2 for n, b in zip(size, box)],
        indexing='ij',
        sparse=True,
    )
    def mm(i):
        return (
            sum(np.float32(turn[i, j]) * grid[j] for j in range(3))
            + np.float32(middle[i])
            + 2 * _smooth_field(size, rng)
        )
    at = [mm(i) / np.float32(voxel_mm[i]) - np.float32(0.5) for i in range(3)]
    warped = ndimage.map_coordinates(labels, at, order=0, output=np.int16)
    images = images_from_labels(
        warped,
        modalities,
        np.random.default_rng((*seed, 1)),
        shrink=fine,
        thickness=thickness_mm / spacing_mm,
    )
    # mm from the box's middle, but for the warp
    placed = ((where + 0.5) * voxel_mm - middle) @ np.linalg.inv(turn).T
    return {
        'labels': coarsen(warped, fine) if fine > 1 else warped,
        'images': images,
        'lost': float((np.abs(placed) > box / 2).any(1).mean()),
    }

def render(labels, modalities, generators, noise=0.02, bias=0.08):
    """Images of label maps on their own device, as an augmentation while training; the sister of images_from_labels in torch.

    labels: (B, 1, D, H, W) int64 on a CPU or GPU, of brain_labels. modalities: B names; generators: B torch.Generator on a CPU, one
    per sample. returns (B, 1, D, H, W) float32 in [0, 1], background exactly 0, brain above 0.
    """
    device, grid = labels.device, labels.shape[2:]
    images = []
    for one, modality, g in zip(labels[:, 0], modalities, generators):
        normal = lambda *shape: torch.randn(*shape, generator=g)
        if is_random(modality):
            means = dict(zip(GROUPS, (0.1 + 0.9 * torch.rand(len(GROUPS), generator=g)).tolist()))
        else:
            means = TISSUE[modality]
        value = torch.zeros(256)
        for group, mean in means.items():
            value[list(GROUPS[group])] = mean + 0.02 * normal(1)
        field = F.interpolate(
            normal(1, 1, 4, 4, 4).to(device), size=grid, mode='trilinear', align_corners=True
        )
        sharp = value.to(device)[one][None, None]
        clean = (sharp + F.avg_pool3d(sharp, 3, 1, 1)) / 2  # partial volume
        own = torch.Generator(device).manual_seed(int(torch.randint(2 ** 31, (1,), generator=g)))
        real, imaginary = noise * torch.randn(2, *grid, generator=own, device=device)
        image = torch.hypot(clean[0, 0] * torch.exp(bias * field[0, 0]) + real, imaginary)
        # every seventh voxel tells a percentile well enough
        image = image / torch.quantile(image[one > 0][::7], 0.995)
        images.append(torch.where(one > 0, image.clamp(1e-4, 1), 0.0))
    return torch.stack(images)[:, None]

def redraw(batch, modalities, share, seed):
    """x of a training batch with some volumes drawn anew: images of the same label maps and modalities.

    share: probability of a volume. What is drawn depends on the sample's index and the seed alone.
    """
    draws = []
    for sample_index in batch['sample_index'].tolist():
        draws.append(torch.Generator().manual_seed((seed << 44) + (1 << 43) + sample_index))
    rows = [b for b, g in enumerate(draws) if torch.rand((), generator=g).item() < share]
    if not rows: return batch['x']
    names = [modalities[m] for m in batch['modality'].tolist()]
    x = batch['x'].clone()
    x[rows] = render(batch['labels'][rows].long(), [names[b] for b in rows], [draws[b] for b in rows])
    return x
