"""Anatomy to images: procedural brain phantoms, and T1w, T2w, FLAIR and PD images from any label map.

Arrays are (D, H, W) = (left-right, posterior-anterior, inferior-superior), RAS+: an index grows to the right,
to the front and to the top. Labels are FreeSurfer numbers. All randomness comes from an explicit generator.
"""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data import torch_seed

LABELS = {0: 'background', 24: 'CSF', 14: '3rd ventricle', 15: '4th ventricle', 16: 'brain stem'}
PAIRS = {
    'cerebral white matter': (2, 41), 'cerebral cortex': (3, 42), 'lateral ventricle': (4, 43),
    'cerebellum white matter': (7, 46), 'cerebellum cortex': (8, 47), 'thalamus': (10, 49),
    'caudate': (11, 50), 'putamen': (12, 51), 'pallidum': (13, 52), 'hippocampus': (17, 53),
}
for name, pair in PAIRS.items():
    LABELS |= zip(pair, (f'left {name}', f'right {name}'))

# ---------------------------------------------------------------- the reference brain

# a box of mm from LOW on: x to the right, y to the front, z to the top, stretched over the shape asked for
LOW = np.array([-84, -124, -78], np.float32)
EXTENT = np.array([168, 218, 168], np.float32)
CENTRE = np.array([0, -17, 7], np.float32)

@dataclass
class Structure:
    """A chain of balls (x, y, z, radius) of the right side, joined by cones, in a stretched space."""
    labels: tuple  # left and right, or one on the midline
    stretch: tuple
    nodes: list

STRUCTURES = {  # later ones lie over earlier ones
    'lateral ventricle': Structure((4, 43), (0.8, 1.0, 1.15), [
        (13, 31, 2, 2.5), (10, 22, 9, 5), (9, 2, 19, 5.5), (13, -18, 20, 5.5), (22, -38, 14, 7.5),
        (25, -58, 8, 4.5), (24, -74, 5, 1.5)]),
    'inferior horn': Structure((4, 43), (1.1, 1.0, 0.8), [
        (23, -38, 12, 6), (33, -36, -5, 4), (35, -20, -17, 3), (32, -8, -20, 2)]),
    'caudate': Structure((11, 50), (0.9, 1.0, 1.0), [
        (13, 20, 0, 7.5), (15, 12, 9, 7), (17, -4, 18, 4.5), (21, -22, 20, 3), (29, -36, 12, 2.2)]),
    'putamen': Structure((12, 51), (0.62, 1.2, 1.0), [(23, 14, 0, 9), (28, 0, 2, 11), (31, -14, 2, 6.5)]),
    'pallidum': Structure((13, 52), (0.65, 1.1, 0.9), [(17, 3, -1, 6), (22, -9, 0, 6)]),
    'thalamus': Structure((10, 49), (0.95, 1.1, 0.95), [(7, -8, 7, 6), (11, -18, 9, 9.5), (15, -27, 8, 7)]),
    'hippocampus': Structure((17, 53), (1.1, 1.0, 0.85), [
        (23, -9, -21, 6.5), (27, -20, -17, 5.5), (29, -32, -8, 4.5), (23, -39, 3, 3)]),
    'brain stem': Structure((16,), (1.05, 0.9, 1.0), [
        (0, -22, -8, 12), (0, -25, -17, 13), (0, -26, -32, 16), (0, -36, -50, 9), (0, -41, -64, 7)]),
    '3rd ventricle': Structure((14,), (0.16, 1.0, 0.8), [(0, -4, -3, 10), (0, -20, 4, 11)]),
    '4th ventricle': Structure((15,), (1.0, 0.6, 1.3), [(0, -44, -33, 7.5), (0, -41, -24, 2.5)]),
}
TEMPORAL = [(38, 12, -28, 16), (48, -18, -21, 18), (50, -45, -10, 20)]
CEREBELLUM = [((22, -66, -38), (30, 27, 20)), ((-22, -66, -38), (30, 27, 20)), ((0, -62, -36), (16, 25, 23))]
CORE = ((0, -6, 6), (37, 42, 23))  # corpus callosum and all inside it: no fissure and no fold goes in here
WAVES, WAVELENGTH = 24, 27.0  # plane waves whose sum folds the cortex; sulci lie half a wavelength (mm) apart

# factors for a woman relative to a man
FEMALE = {'brain': 0.96, 'lateral ventricle': 0.92, 'hippocampus': 1.08, 'caudate': 1.08, 'putamen': 0.95}

# ---------------------------------------------------------------- anatomy; depths in mm, positive inside

def smooth_field(shape, rng, order=4):
    """float32 field, mean 0, standard deviation 1: a random cosine series of low order."""
    field = rng.standard_normal((order,) * len(shape)).astype(np.float32)
    for n in shape:  # each step turns the first axis from order to n points and moves it to the end
        basis = np.cos(np.pi * np.outer(np.arange(order), (np.arange(n) + 0.5) / n)).astype(np.float32)
        field = np.tensordot(field, basis, axes=(0, 0))
    field -= field.mean()
    return field / field.std()

def ball(p, centre, radii):
    """Depth below the surface of an ellipsoid; p is (3, ...) in mm."""
    q = [(p[i] - centre[i]) / np.float32(radii[i]) for i in range(3)]
    level = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + np.float32(1e-6)
    slope = np.sqrt(sum((q[i] / np.float32(radii[i])) ** 2 for i in range(3))) + np.float32(1e-6)
    return level * (1 - level) / slope

def chain(p, nodes, stretch=(1, 1, 1)):
    """Depth below the surface of a chain, see Structure; p is (3, ...) in mm."""
    scale = np.asarray(stretch, np.float32)
    p = [p[i] / scale[i] for i in range(3)]
    nodes = [(np.array(node[:3], np.float32) / scale, node[3]) for node in nodes]
    depth = None
    for (a, radius_a), (b, radius_b) in zip(nodes, nodes[1:]):
        ab = b - a
        t = np.clip(sum((p[i] - a[i]) * ab[i] for i in range(3)) / max(float(ab @ ab), 1e-6), 0, 1)
        distance = np.sqrt(sum((p[i] - a[i] - t * ab[i]) ** 2 for i in range(3)))
        link = radius_a + t * (radius_b - radius_a) - distance
        depth = link if depth is None else np.maximum(depth, link)
    return depth

def join(a, b, k=6.0):
    """Smooth maximum of two depths: a union whose seam is rounded over k mm."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h * np.float32(0.25 / k)

def folds(p, waves, phases):
    """Distance in mm from points p (n, 3) to the nearest zero of a sum of plane waves; exact for one wave.

    waves (3, WAVES) in radians per mm, phases (WAVES,). The zeros are winding, evenly spaced sheets.
    """
    k = np.float32(2 * np.pi / WAVELENGTH)
    distance = np.empty(len(p), np.float32)
    for i in range(0, len(p), 65536):
        angle = p[i:i + 65536] @ waves + phases
        value = np.cos(angle).sum(1)
        slope = np.sqrt(((np.sin(angle) @ waves.T) ** 2).sum(1))
        distance[i:i + 65536] = np.arctan2(k * np.abs(value), slope) / k
    return distance

def warped(lines, turn, centre, rng):
    """(3, D, H, W): points of a grid turned, moved by centre, and displaced smoothly by about 2 mm."""
    turn, centre = np.float32(turn), np.float32(centre)
    grid = np.meshgrid(*lines, indexing='ij', sparse=True)
    p = np.empty((3, *map(len, lines)), lines[0].dtype)
    for i in range(3):
        turned = sum(turn[i, j] * grid[j] for j in range(3))
        p[i] = turned + centre[i] + 2 * smooth_field(p.shape[1:], rng)
    return p

def coordinates(shape, rng, size):
    """(3, D, H, W) float32: where in the reference brain (mm) each voxel of a subject lies."""
    aspect = size * np.exp(0.04 * np.clip(rng.standard_normal(3), -2, 2))
    angles = np.radians((4, 2, 2)) * np.clip(rng.standard_normal(3), -2, 2)  # pitch, roll, yaw of the head
    turn = np.float32(Rotation.from_euler('xyz', angles).as_matrix()) / np.float32(aspect)[:, None]
    lines = []
    for n, low, extent, centre in zip(shape, LOW, EXTENT, CENTRE):
        lines.append((np.arange(n, dtype=np.float32) + 0.5) / n * extent + low - centre)
    return warped(lines, turn, CENTRE, rng)

def sylvian_fissure(half, widen):
    """Depth outside the Sylvian fissure and the cleft at the insula, `widen` mm to both sides."""
    x, y, z = half
    plane = z + 4 - 0.35 * (10 - y) * (y < 10)
    fissure = np.maximum(np.maximum(np.abs(plane) - 1 - widen, 37 - x), np.abs(y + 8) - 36)
    insula = np.maximum(np.maximum(np.abs(x - 38) - widen, np.abs(plane) - 13), np.abs(y - 2) - 20)
    return np.minimum(fissure, insula)

def folded(cerebrum, half, right, thickness, widen, rng):
    """The depth `cerebrum` after fissures and folds are cut: that below the pial surface.

    half: p with x mirrored to the right. right: mask of that side. thickness: of the cortex.
    """
    core = ball(half, *CORE)
    depth = np.minimum(cerebrum, np.maximum(half[0] - widen, core))  # cut between the hemispheres
    pial = np.minimum(depth, sylvian_fissure(half, widen))
    common = np.random.default_rng(5)  # the main sulci are everyone's; a subject and a hemisphere vary them
    waves = common.standard_normal((3, WAVES))
    lengths = np.linalg.norm(waves, axis=0)
    waves *= 2 * np.pi / WAVELENGTH * (1 + 0.12 * common.standard_normal(WAVES)) / lengths
    phases = common.uniform(0, 2 * np.pi, WAVES) + 0.2 * rng.standard_normal(WAVES)
    shift = 0.15 * rng.standard_normal((2, WAVES))
    sulcus_depth = 17 + 3 * smooth_field(right.shape, rng, 6)
    shell = (depth > 0) & (depth < sulcus_depth + thickness) & (core < thickness)
    for side in (0, 1):
        here = shell & (right == side)
        d, q = depth[here], half[:, here].T - np.float32((30, -17, 10))
        r = np.sqrt((q ** 2).sum(1)) + 1
        q *= (1 + 0.85 * d / r)[:, None]  # most of the way out, so that sulci run inwards
        fold = folds(q, np.float32(waves), np.float32(phases + shift[side]))
        fold -= widen + 1.6 * np.exp(-d / 4)
        fold = np.maximum(fold, np.maximum(d - sulcus_depth[here], core[here]))
        pial[here] = np.minimum(pial[here], fold)
    return pial

def window_of(shape, nodes, stretch):
    """Slices of the part of the box that holds a structure, deformed."""
    reach = nodes[:, 3].max() * stretch + 32
    first = (nodes[:, :3].min(0) - reach - LOW) / EXTENT * shape
    last = (nodes[:, :3].max(0) + reach - LOW) / EXTENT * shape
    return tuple(slice(max(int(a), 0), int(b) + 1) for a, b in zip(first, last))

def paint_structures(labels, p, rng, factors):
    """Paint STRUCTURES over labels in place; factors: {name: size factor}."""
    thinnest = 0.55 * EXTENT / labels.shape  # mm; less is lost between voxels
    for name, structure in STRUCTURES.items():
        paired = len(structure.labels) == 2
        grow = factors.get(name, 1.0) * np.exp(0.05 * rng.standard_normal())
        for side, label in zip((-1, 1) if paired else (1,), structure.labels):
            jitter = rng.standard_normal(3) * (0.3 + 0.5 * paired, 0.8, 0.8)
            grow_side = np.exp(0.03 * rng.standard_normal())
            nodes = np.array(structure.nodes, float) * (side, 1, 1, 1)
            nodes[:, :3] += jitter
            nodes[:, 3] = np.maximum(nodes[:, 3] * grow * grow_side, thinnest.min())
            stretch = np.maximum(structure.stretch, thinnest / nodes[:, 3].max())
            window = window_of(labels.shape, nodes, stretch)
            inside = chain(p[(slice(None), *window)], nodes.tolist(), stretch) > 0
            labels[window][inside & (labels[window] > 0)] = label

def phantom_labels(shape, rng, sex, age=50.0):
    """Label map (D, H, W) int16 of a random subject; sex 'F' or 'M', age in years.

    The draws do not depend on shape: the same generator state gives the same subject at any resolution.
    """
    if sex not in ('F', 'M'): raise ValueError(f"sex must be 'F' or 'M', got {sex!r}")
    older = (age - 50) / 30
    factors = dict(FEMALE) if sex == 'F' else {}
    for name in ('lateral ventricle', 'inferior horn', '3rd ventricle'):
        factors[name] = factors.get(name, 1.0) * (1 + 0.25 * older) * np.exp(0.12 * rng.standard_normal())
    size = factors.get('brain', 1.0) * np.exp(0.03 * np.clip(rng.standard_normal(), -2, 2))
    p = coordinates(shape, rng, size)
    x, y, z = p
    half, right = np.stack([np.abs(x), y, z]), x > 0
    thickness = 3.0 - 0.2 * older + 0.15 * rng.standard_normal()
    cerebellum = join(join(ball(p, *CEREBELLUM[0]), ball(p, *CEREBELLUM[1])), ball(p, *CEREBELLUM[2]))
    tentorium = z + 19 - 0.0016 * (y + 10) ** 2
    cerebrum = -join(-ball(p, (0, -17, 10), (69, 87, 66)), -tentorium, 12)
    cerebrum = join(cerebrum, chain(half, TEMPORAL), 8)
    stem = STRUCTURES['brain stem']
    brain = join(join(cerebrum, cerebellum, 14), chain(p, stem.nodes, stem.stretch), 14)
    cerebrum = np.minimum(cerebrum, -cerebellum - 2)
    pial = folded(cerebrum, half, right, thickness, 0.7 + 0.25 * older, rng)
    wobble = 0.5 * smooth_field(shape, rng, 6) + 0.0006 * half[0] ** 2
    angle = np.arctan2(z + 33, -(y + 44))  # folia are ridges around a centre near the 4th ventricle
    ridge = np.cos(13 * angle + wobble + rng.uniform(0, 6)) + 0.5 * np.cos(31 * angle + 2 * wobble)
    labels = np.where(brain > -2.5, 24, 0).astype(np.int16)
    for mask, left_label, right_label in (
            (pial > 0, 3, 42),
            (pial > thickness, 2, 41),
            ((cerebellum > 0) & ((ridge > -1.1) | (cerebellum > 8)), 8, 47),
            (cerebellum > 8 - 4 * ridge, 7, 46)):  # white matter reaches into folia
        labels[mask] = np.where(right, right_label, left_label)[mask]
    paint_structures(labels, p, rng, factors)
    for axis in range(3):
        np.moveaxis(labels, axis, 0)[[0, -1]] = 0
    return labels

# ---------------------------------------------------------------- images

# labels that share a mean; the phantoms' first, then those that other label maps hold
GROUPS = {
    'white': (2, 41, 7, 46, 77, 251, 252, 253, 254, 255), 'cortex': (3, 42, 8, 47),
    'hippocampus': (17, 53, 18, 54), 'thalamus': (10, 49), 'caudate': (11, 50, 26, 58), 'putamen': (12, 51),
    'pallidum': (13, 52), 'stem': (16, 28, 60, 85), 'csf': (24, 4, 43, 14, 15, 5, 44, 72),
}
# lesions, vessels, choroid plexus and borders of ventricles count as the tissue around them
SAME_AS = {25: 2, 57: 41, 30: 24, 62: 24, 31: 4, 63: 43, 136: 4, 137: 43, 163: 4, 164: 43, 80: 2}
# mean intensity of each group, in that order; white or bright fluid near 1, a subject's within 0.02
TISSUE = {
    'T1w': (0.92, 0.60, 0.62, 0.75, 0.66, 0.69, 0.80, 0.84, 0.16),
    'T2w': (0.32, 0.50, 0.53, 0.42, 0.46, 0.43, 0.29, 0.37, 0.95),
    'FLAIR': (0.52, 0.72, 0.76, 0.64, 0.68, 0.65, 0.50, 0.56, 0.12),
    'PD': (0.60, 0.76, 0.78, 0.70, 0.73, 0.72, 0.58, 0.64, 0.84),
}

def is_random(modality):
    """random1, random2, ...: contrasts drawn for every image (domain randomisation, Billot et al. 2023)."""
    return modality.startswith('random') and modality[6:].isdigit()

def refuse_unknown(labels):
    """ValueError that lists the labels without a tissue."""
    known = {0}.union(*GROUPS.values())
    unknown = sorted(set(np.unique(labels).tolist()) - known)
    if unknown:
        raise ValueError(f'labels {unknown} have no tissue; FreeSurfer numbers are expected')

def shrunk(x, factor):
    """Mean over blocks of factor^3 voxels, as float32."""
    x = x.astype(np.float32)
    for axis in range(3):
        before = (slice(None),) * axis
        x = sum(x[(*before, slice(k, None, factor))] for k in range(factor)) / np.float32(factor)
    return x

def coarsen(labels, factor):
    """Label map at 1/factor of the size: a block's commonest tissue, 0 where half is background."""
    shares = {label: shrunk(labels == label, factor) for label in np.unique(labels)}
    inside = 1 - shares.pop(0, np.zeros(1)) >= 0.5
    commonest = np.argmax(np.stack(list(shares.values())), 0)
    return np.where(inside, np.array(list(shares))[commonest], 0).astype(np.int16)

def images_from_labels(labels, modalities, rng, noise=0.02, bias=0.08, shrink=1, thickness=1.0):
    """Images of a label map -> {modality: float32 (D, H, W)}, background 0, brain above.

    labels: (D, H, W) FreeSurfer numbers, `shrink` times as fine as the images. modalities: of TISSUE, or
    is_random. noise: standard deviation of Rician noise. bias: that of the logarithm of a smooth field.
    thickness: of slices along a random axis, at most, in voxels. An image does not depend on the others.
    """
    refuse_unknown(labels)
    base = int(rng.integers(2 ** 31))
    inside = shrunk(labels > 0, shrink) >= 0.5
    images = {}
    for modality in modalities:
        if modality not in TISSUE and not is_random(modality):
            raise ValueError(f"modality '{modality}': known are {', '.join(TISSUE)}, random1, random2, ...")
        position = len(TISSUE) + int(modality[6:]) if is_random(modality) else [*TISSUE].index(modality)
        draws = np.random.default_rng((base, position))
        image = one_image(labels, modality, draws, noise, bias, shrink, thickness)
        images[modality] = np.where(inside, np.maximum(image, 1e-4), 0).astype(np.float32)
    return images

def one_image(labels, modality, rng, noise, bias, shrink, thickness):
    """An image of images_from_labels, with noise still in the background."""
    means = rng.uniform(0.1, 1, len(GROUPS)) if is_random(modality) else TISSUE[modality]
    intensity = np.zeros(256, np.float32)  # of each label
    for group, mean in zip(GROUPS.values(), means):
        intensity[list(group)] = mean + 0.02 * rng.standard_normal()
    clean = shrunk(ndimage.gaussian_filter(intensity[labels], 0.5), shrink)  # partial volume
    shading = np.exp(bias * smooth_field(clean.shape, rng))
    texture = 1 + 0.5 * noise * smooth_field(clean.shape, rng, 12)
    clean *= shading * texture
    real, imaginary = noise * rng.standard_normal((2, *clean.shape), dtype=np.float32)
    image = np.hypot(clean + real, imaginary)
    if thickness > 1:
        sigma = rng.uniform(1, thickness) / 2.355
        image = ndimage.gaussian_filter1d(image, sigma, axis=int(rng.integers(3)))
    return image

def phantom(index, shape, seed=0, modalities=('T1w', 'T2w', 'FLAIR')):
    """Subject number `index` (from 1) of a cohort, as a dict: a function of (index, shape, seed).

    labels (D, H, W) int16, images {modality: float32}. Anatomy and sex do not depend on the modalities. On
    grids coarser than 3 mm the anatomy is drawn twice as fine: a voxel has the commonest label and the mean
    intensity of its eight.
    """
    rng = np.random.default_rng((seed, index))
    sex, age = 'FM'[rng.integers(2)], float(rng.uniform(20, 80))
    fine = 2 if (EXTENT / shape).max() > 3 else 1
    labels = phantom_labels(tuple(fine * n for n in shape), rng, sex, age)
    images = images_from_labels(labels, modalities, np.random.default_rng((seed, index, 1)), shrink=fine)
    if fine > 1:
        labels = coarsen(labels, fine)
    return dict(subject=f'sub-{index:03d}', session='ses-01', sex=sex, age=age, labels=labels, images=images)

def scale_like_prepared(image, mask, percentiles=(0.5, 99.5), percentiles_of='brain', clip=True):
    """nifti.scale_intensity in torch: what is drawn while training lies where prepared scans lie.

    image, mask: (D, H, W). A seventh of the voxels tells a percentile.
    """
    values = image[mask] if percentiles_of == 'brain' else torch.where(mask, image, 0.0).flatten()
    ends = torch.tensor(percentiles, device=image.device) / 100
    low, high = torch.quantile(values[::7], ends.float())
    scaled = ((image - low) / (high - low)).clamp(1e-4, 1 if clip else None)
    return torch.where(mask, scaled, 0.0)

def smooth_fields(n, grid, g, device):
    """(n, *grid), standard deviation 1: random numbers on 4x4x4 nodes, linear in between."""
    nodes = torch.randn(1, n, 4, 4, 4, generator=g).to(device)
    fields = F.interpolate(nodes, size=grid, mode='trilinear', align_corners=True)
    return fields[0] / (2 / 3) ** 1.5  # between nodes the variance is 2/3 on average

def render(labels, modalities, generators, noise=0.02, bias=0.08, scale=scale_like_prepared):
    """images_from_labels in torch, on the device of the label maps: an augmentation.

    labels: (B, 1, D, H, W) int64, whole maps. modalities, generators of a CPU: B each. scale: a function of
    an image and its mask. returns (B, 1, D, H, W) float32, background 0
    """
    device, grid = labels.device, labels.shape[2:]
    images = []
    for one, modality, g in zip(labels[:, 0], modalities, generators):
        means = TISSUE.get(modality)
        if is_random(modality):
            means = (0.1 + 0.9 * torch.rand(len(GROUPS), generator=g)).tolist()
        intensity = torch.zeros(256)
        for group, mean in zip(GROUPS.values(), means):
            intensity[list(group)] = mean + 0.02 * torch.randn(1, generator=g)
        field = smooth_fields(1, grid, g, device)
        sharp = intensity.to(device)[one][None, None]
        clean = (sharp + F.avg_pool3d(sharp, 3, 1, 1)) / 2  # partial volume
        g = torch.Generator(device).manual_seed(int(torch.randint(2 ** 31, (1,), generator=g)))
        real, imaginary = noise * torch.randn(2, *grid, generator=g, device=device)
        image = torch.hypot(clean[0, 0] * torch.exp(bias * field[0]) + real, imaginary)
        images.append(scale(image, one > 0))
    return torch.stack(images)[:, None]

def generator(*key):
    """torch's generator on a CPU, a function of its key."""
    return torch.Generator().manual_seed(torch_seed(*key))

def deformed(labels, g, voxel_mm, degrees=5.0, scale=0.06, warp_mm=2.0):
    """A label map (D, H, W), turned, scaled along each axis and warped; nearest neighbours.

    degrees, scale (of its logarithm), warp_mm: standard deviations. g: a CPU's generator.
    """
    grid, device = labels.shape, labels.device
    normal = torch.randn(2, 3, generator=g).clamp(-2, 2).numpy()
    turn = Rotation.from_euler('xyz', degrees * normal[0], degrees=True).as_matrix()
    turn *= np.exp(scale * normal[1])
    mm = np.array(grid) * voxel_mm / 2  # half of the box; torch counts from -1 to 1, and the last axis first
    affine = np.flip(turn * mm / mm[:, None])
    still = torch.tensor(np.column_stack([affine, np.zeros(3)]), dtype=torch.float32, device=device)
    places = F.affine_grid(still[None], (1, 1, *grid), align_corners=False)
    half = torch.tensor(np.flip(mm).copy(), dtype=torch.float32, device=device)
    places = places + warp_mm * smooth_fields(3, grid, g, device).movedim(0, -1) / half
    moved = F.grid_sample(labels[None, None].float(), places, 'nearest', align_corners=False)
    return moved[0, 0].to(labels.dtype)

def redraw(batch, modalities, share, seed, box, deform=0.0, voxel_mm=(1.0, 1.0, 1.0)):
    """x of a training batch, each volume with probability `share` an image drawn anew of its label map.

    What is drawn depends on the sample's index and the seed alone; the modality stays. box: see
    data.Sessions. The whole map is drawn and scaled, then cut: a patch has other percentiles. deform: share
    of the sessions (or scans) all of whose volumes are drawn of one deformed() map.
    """
    index = batch['sample_index'].tolist()
    owners = [k // len(modalities) for k in index] if 'pairs' in batch else index
    maps = {}  # those deformed, by owner
    for owner, labels in zip(owners, batch['labels']):
        g = generator(seed, 34, owner)
        if owner not in maps and torch.rand((), generator=g).item() < deform:
            maps[owner] = deformed(labels[0], g, voxel_mm)
    draws = [generator(seed, 33, k) for k in index]
    chosen = [torch.rand((), generator=g).item() < share for g in draws]
    rows = [b for b, owner in enumerate(owners) if chosen[b] or owner in maps]
    if not rows: return batch['x']
    names = [modalities[m] for m in batch['modality'].tolist()]
    x = batch['x'].clone()
    how = {key: box[key] for key in ('percentiles', 'percentiles_of', 'clip') if key in box}
    labels = torch.stack([maps.get(owners[b], batch['labels'][b, 0]) for b in rows])[:, None]
    drawn = render(labels.long(), [names[b] for b in rows], [draws[b] for b in rows],
                   scale=partial(scale_like_prepared, **how))
    D, H, W = x.shape[2:]
    for b, image in zip(rows, drawn):
        d, h, w = batch['starts'][b]
        x[b] = image[:, d:d + D, h:h + H, w:w + W]
    return x

# ---------------------------------------------------------------- label maps of real heads

def brain_labels(labels):
    """A FreeSurfer map of a head -> its brain alone, in labels of GROUPS. ValueError for unknown ones."""
    labels = np.where(labels < 500, labels, 0)  # from 500 on: what lies outside the brain
    for label, other in SAME_AS.items():
        labels = np.where(labels == label, other, labels)
    refuse_unknown(labels)
    if not labels.any(): raise ValueError('a label map without a brain')
    parts, _ = ndimage.label(labels > 0)
    largest = np.bincount(parts[parts > 0]).argmax()  # specks apart from the brain go
    return np.where(parts == largest, labels, 0).astype(np.int16)

def strip(labels, voxels):
    """A label map without CSF (24) that lies more than so many voxels from tissue."""
    tissue = (labels > 0) & (labels != 24)
    kept = ndimage.binary_dilation(tissue, iterations=voxels) if voxels else tissue
    return np.where(kept, labels, 0)

def variant(labels, voxel_mm, shape, spacing_mm, modalities, seed, thickness_mm=1.0):
    """A deformed copy of a head's label map in a box of `shape` voxels of spacing_mm, and images of it.

    labels (D, H, W) RAS+, voxel_mm its three spacings. The brain is turned within about 10 degrees and scaled
    by about 5 % per axis about its middle, and warped. One too high for the box loses its inferior end. CSF
    around the brain goes from 0, 1 or 2 voxels on, or stays, as skull-stripping varies. A function of its
    arguments.
    returns labels (shape) int16, images {modality: float32}, lost, the fraction of the brain outside the box
    """
    labels, rng = brain_labels(labels), np.random.default_rng(seed)
    rim = int(rng.integers(4))
    if rim < 3:
        labels = strip(labels, rim)
    brain = np.argwhere(labels > 0)
    low, high = brain.min(0) * voxel_mm, (brain.max(0) + 1) * voxel_mm
    box = np.array(shape) * spacing_mm
    middle = (low + high) / 2
    middle[2] = max(middle[2], high[2] - box[2] / 2)
    normal = np.clip(rng.standard_normal((2, 3)), -2.5, 2.5)
    turn = Rotation.from_euler('xyz', 4 * normal[0], degrees=True).as_matrix() * np.exp(0.04 * normal[1])
    fine = 2 if spacing_mm > 1.5 * max(voxel_mm) else 1
    size = tuple(fine * n for n in shape)
    lines = [(np.arange(n, dtype=np.float32) + 0.5) * (spacing_mm / fine) - b / 2 for n, b in zip(size, box)]
    positions = warped(lines, turn, middle, rng)
    for i in range(3):  # from mm to voxels of the map
        positions[i] = positions[i] / np.float32(voxel_mm[i]) - np.float32(0.5)
    labels = ndimage.map_coordinates(labels, positions, order=0, output=np.int16)
    images = images_from_labels(labels, modalities, np.random.default_rng((*seed, 1)), shrink=fine,
                                thickness=thickness_mm / spacing_mm)
    # mm from the box's middle, but for the warp
    placed = ((brain + 0.5) * voxel_mm - middle) @ np.linalg.inv(turn).T
    lost = float((np.abs(placed) > box / 2).any(1).mean())
    return dict(labels=coarsen(labels, fine) if fine > 1 else labels, images=images, lost=lost)
