"""Rigid registration of a scan onto another, for sessions whose scans do not share a space.

Volumes (D,H,W) with affines to millimetres, as nifti.read gives them. Powell's method raises the normalised
mutual information (Studholme et al. 1999) of random points of the fixed scan, coarse to fine: seconds per
scan, no gradient needed.
"""
import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

BINS = 32

def rigid(p, centre):
    """(4,4) turn by p[:3] degrees about a centre in mm, then shift by p[3:] mm."""
    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler('xyz', p[:3], degrees=True).as_matrix()
    m[:3, 3] = centre - m[:3, :3] @ centre + p[3:]
    return m

def entropy(p):
    return -(p[p > 0] * np.log(p[p > 0])).sum()

def mutual_information(a, b, bins=BINS):
    """Normalised mutual information (H(a) + H(b)) / H(a,b), 1 to 2, of integers a, b (n,) in 0..bins-1."""
    joint = np.bincount(a * bins + b, minlength=bins * bins).reshape(bins, bins) / len(a)
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / max(entropy(joint), 1e-12)

def binned(values, low, high):
    """Intensities as integers 0 to BINS-1, in equal steps from low to high."""
    return np.clip((values - low) / max(high - low, 1e-12) * BINS, 0, BINS - 1).astype(np.int64)

def blurred(volume, affine, fwhm_mm):
    return ndimage.gaussian_filter(volume, np.maximum(fwhm_mm / voxel_sizes(affine), 0.01) / 2.355)

def register(fixed, fixed_affine, moving, moving_affine, points=20000, seed=0):
    """Move `moving` onto `fixed` -> its new affine (4,4), and facts.

    facts: nmi_before, nmi_after; moved_mm, at the brain's edge; reason, '' for a success, else why the old
    affine is returned: the likeness did not grow, or the way is over 60 mm.
    """
    rng = np.random.default_rng(seed)
    inside = np.argwhere(ndimage.binary_dilation(fixed > np.percentile(fixed, 50), iterations=2))
    voxels = inside[rng.integers(len(inside), size=points)].T
    voxels = voxels + rng.uniform(-0.5, 0.5, (3, points))  # between voxels: else grids would favour no turn
    world = fixed_affine[:3, :3] @ voxels + fixed_affine[:3, 3:]
    centre = world.mean(1)
    to_moving = np.linalg.inv(moving_affine)
    p = np.zeros(6)
    for fwhm_mm, step in ((4.0, 4.0), (1.5, 1.0)):
        fixed_values = ndimage.map_coordinates(blurred(fixed, fixed_affine, fwhm_mm), voxels, order=1)
        fixed_bins = binned(fixed_values, *np.percentile(fixed_values, (0.5, 99.5)))
        mover = blurred(moving, moving_affine, fwhm_mm)
        low, high = np.percentile(mover[mover > mover.min()], (0.5, 99.5))

        def likeness(p):
            at = to_moving @ rigid(p, centre) @ np.vstack([world, np.ones(points)])
            values = ndimage.map_coordinates(mover, at[:3], order=1)
            return mutual_information(fixed_bins, binned(values, low, high))

        before = likeness(np.zeros(6))
        options = {'xtol': 0.02, 'ftol': 1e-5, 'maxiter': 20, 'direc': step * np.eye(6)}
        p = optimize.minimize(lambda p: -likeness(p), p, method='Powell', options=options).x
    after = likeness(p)
    way = rigid(p, centre)
    moved_mm = float(np.linalg.norm(way[:3, :3] @ world + way[:3, 3:] - world, axis=0).max())
    reason = ''
    if after <= before + 1e-4:
        reason = 'no likeness gained'
    elif moved_mm > 60:
        reason = 'moved over 60 mm'
    facts = {'nmi_before': float(before), 'nmi_after': float(after), 'moved_mm': moved_mm, 'reason': reason}
    return moving_affine if reason else np.linalg.inv(way) @ moving_affine, facts
