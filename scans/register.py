"""Rigid registration of one scan onto another by mutual information, for sessions whose scans do not share a space.

Volumes (D,H,W) with affines to millimetres, as nifti.read gives them. Normalised mutual information (Studholme et al. 1999) of
random points of the fixed scan, coarse to fine, by Powell's method: seconds per scan, no gradient needed.
"""
import numpy as np
from scipy import ndimage, optimize
from scipy.spatial.transform import Rotation

def rigid(p, centre):
    """(4,4) turn by p[:3] degrees about a centre in mm, then shift by p[3:] mm."""
    m = np.eye(4)
    m[:3, :3] = Rotation.from_euler('xyz', p[:3], degrees=True).as_matrix()
    m[:3, 3] = centre - m[:3, :3] @ centre + p[3:]
    return m

def mutual_information(a, b, bins=32):
    """Normalised mutual information (H(a) + H(b)) / H(a,b), 1 to 2, of integers a, b (n,) in 0..bins-1."""
    joint = np.bincount(a * bins + b, minlength=bins * bins).reshape(bins, bins) / len(a)
    entropy = lambda p: -(p[p > 0] * np.log(p[p > 0])).sum()
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / max(entropy(joint), 1e-12)

def binned(values, bins=32):
    low, high = np.percentile(values, (0.5, 99.5))
    return lambda v: np.clip((v - low) / max(high - low, 1e-12) * bins, 0, bins - 1).astype(np.int64)

def register(fixed, fixed_affine, moving, moving_affine, points=20000, seed=0):
    """Move `moving` onto `fixed` -> its new affine (4,4), and facts: nmi_before, nmi_after, moved_mm (at the brain's edge), reason.

    reason is '' for a success; otherwise why the old affine is returned: the likeness did not grow, or the way is over 60 mm.
    """
    rng = np.random.default_rng(seed)
    inside = np.argwhere(ndimage.binary_dilation(fixed > np.percentile(fixed, 50), iterations=2))
    # between voxels: else grids would favour no turn
    voxels = inside[rng.integers(len(inside), size=points)].T + rng.uniform(-0.5, 0.5, (3, points))
    world = fixed_affine[:3, :3] @ voxels + fixed_affine[:3, 3:]
    centre, to_moving = world.mean(1), np.linalg.inv(moving_affine)
    sizes = [np.sqrt((a[:3, :3] ** 2).sum(0)) for a in (fixed_affine, moving_affine)]
    p = np.zeros(6)
    for blur_mm, step in ((4.0, 4.0), (1.5, 1.0)):
        still, mover = (
            ndimage.gaussian_filter(v, np.maximum(blur_mm / s, 0.01) / 2.355)
            for v, s in zip((fixed, moving), sizes)
        )
        a = ndimage.map_coordinates(still, voxels, order=1)
        a, bins = binned(a)(a), binned(mover[mover > mover.min()])
        def likeness(p):
            at = to_moving @ rigid(p, centre) @ np.vstack([world, np.ones(points)])
            return mutual_information(a, bins(ndimage.map_coordinates(mover, at[:3], order=1)))
        before = likeness(np.zeros(6))
        options = {'xtol': 0.02, 'ftol': 1e-5, 'maxiter': 20, 'direc': step * np.eye(6)}
        p = optimize.minimize(lambda p: -likeness(p), p, method='Powell', options=options).x
    after, moved = likeness(p), float(
        np.linalg.norm(rigid(p, centre)[:3, :3] @ world + rigid(p, centre)[:3, 3:] - world, axis=0).max()
    )
    reason = 'no likeness gained' if after <= before + 1e-4 else 'moved over 60 mm' if moved > 60 else ''
    facts = {'nmi_before': float(before), 'nmi_after': float(after), 'moved_mm': moved, 'reason': reason}
    return (moving_affine if reason else np.linalg.inv(rigid(p, centre)) @ moving_affine), facts
