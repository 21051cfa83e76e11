"""Metrics: what the tables of evaluate.py are made of, as functions of arrays. Each states its unit, range and definition."""
import math

import numpy as np
import torch

from data import random
from losses import perceptual_loss, psnr, ssim, ssim_map

# ---------------------------------------------------------------- fidelity

def scores(x_hat, x, lpips=None):
    """Dict of the fidelity metrics of one volume; x_hat, x: (1,1,D,H,W), both clipped to [0,1].

    lpips: a network of pretrained.LPIPS; then also 'lpips_sum', over the three planes of the mean over all slices, 'lpips_mean', and
    'lpips_brain', the sum with the prediction's background removed. ValueError if x has no brain, no voxel above 0.
    """
    x_hat, x = x_hat.float().clamp(0, 1), x.clamp(0, 1)
    brain = x > 0
    if not brain.any(): raise ValueError('an empty mask: no voxel of the scan is above 0')
    similarity = ssim_map(x_hat, x)
    border = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(x.shape[2:], similarity.shape[2:])]
    inside = brain[(slice(None), slice(None), *border)]
    found = {
        'psnr_whole': psnr(x_hat, x).item(),
        'ssim_whole': 100 * similarity.mean().item(),
        'psnr_brain': psnr(x_hat, x, mask=brain).item(),
        'ssim_brain': 100 * similarity[inside].mean().item(),
        'ssim_uniform_whole': 100 * ssim(x_hat, x, window='uniform', size=7).item(),
    }
    if lpips:
        total = perceptual_loss(lpips, x_hat, x, 1.0).item()
        found |= {
            'lpips_sum': total,
            'lpips_mean': total / 3,
            'lpips_brain': perceptual_loss(lpips, x_hat * brain, x, 1.0).item(),
        }
    return found

def summarise(values, subjects, draws=2000, seed=0):
    """values: per session, subjects: their ids -> mean and sd over subjects, n, and the 95 % bootstrap interval of the mean."""
    ids = sorted(set(subjects))
    means = np.array([np.mean([v for v, s in zip(values, subjects) if s == i]) for i in ids])
    boot = means[random(seed, 0).integers(len(means), size=(draws, len(means)))].mean(1)
    return {
        'mean': float(means.mean()),
        'sd': float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        'n_subjects': len(means),
        'n_sessions': len(values),
        'ci95': [float(q) for q in np.quantile(boot, [0.025, 0.975])],
    }

# ---------------------------------------------------------------- geometry of the latent

def moments(z):
    """z (N,C) or (B,C,d,h,w) -> float64 matrix (C+1,C+1): sums of products of the channels and of a constant 1."""
    rows = z if z.ndim == 2 else z.movedim(1, -1).flatten(0, -2)
    rows = torch.nn.functional.pad(rows.double(), (0, 1), value=1.0)
    return rows.T @ rows

def covariance(m):
    """(C,C) unbiased covariance out of moments()."""
    n, mean = m[-1, -1], m[-1, :-1] / m[-1, -1]
    return (m[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1)

def cosine_of(m, centred):
    gram = covariance(m) if centred else m[:-1, :-1]
    norm = gram.diagonal().clamp(min=1e-30).rsqrt()
    return (gram * norm * norm[:, None]).abs()

def variance_shares(m):
    """(C,) eigenvalues of the covariance over their sum, descending."""
    values = torch.linalg.eigvalsh(covariance(m)).flip(0).clamp(min=0)
    return values / values.sum()

def rank_of(shares):
    return torch.exp(-torch.xlogy(shares, shares).sum()).item()

def channel_cosine(z, centred=True):
    """z (N,C) or (B,C,d,h,w) -> (C,C) absolute cosine between channels over all positions, DeCo table 1 and fig. 2.

    centred=True subtracts each channel's mean first: |Pearson correlation|. Without it, the means of channels count as
    similarity, and no covariance says anything about them.
    """
    return cosine_of(moments(z), centred)

def effective_rank(z):
    """exp of the entropy of explained_variance(z): 1 to C, DeCo table 1."""
    return rank_of(explained_variance(z))

def explained_variance(z):
    """z (N,C) or (B,C,d,h,w) -> (C,) shares of the variance along the principal axes of the channels, descending, DeCo fig. 3."""
    return variance_shares(moments(z))

def latent_geometry(m, sigma):
    """Summary of the moments m of a set's latents; every number comes from the same covariance. sigma: mean posterior sd or None."""
    shares, C = variance_shares(m), len(m) - 1
    off = ~torch.eye(C, dtype=bool)
    return {
        'channels': C,
        'matrix_raw': cosine_of(m, False).tolist() if C <= 16 else None,
        'matrix_centred': cosine_of(m, True).tolist() if C <= 16 else None,
        'cos_raw': cosine_of(m, False)[off].mean().item() if C > 1 else None,
        'pearson_abs': cosine_of(m, True)[off].mean().item() if C > 1 else None,
        'effective_rank': rank_of(shares),
        'explained_variance': shares.tolist(),
        'channel_sd': covariance(m).diagonal().sqrt().tolist(),
        'posterior_sigma': sigma,
    }

def tsne(x, perplexity=30.0, iterations=500, seed=0):
    """Exact t-SNE (van der Maaten & Hinton 2008) of points x (N,C) in the plane -> (N,2); N up to a few thousands.

    Gradient descent with momentum and per-coordinate gains, early exaggeration 12 for the first 100 iterations.
    """
    x = torch.as_tensor(x, dtype=torch.float32)
    n, off = len(x), ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    distance = torch.cdist(x, x).square()
    # of each point's precision, found by bisection
    low, high = torch.full_like(x[:, :1], 1e-10), torch.full_like(x[:, :1], 1e10)
    for _ in range(60):
        beta = (low * high).sqrt()
        p = torch.softmax(
            (-beta * (distance - distance.masked_fill(~off, float('inf')).amin(1, keepdim=True))).masked_fill(
                ~off, -float('inf')
            ),
            1,
        )
        entropy = -torch.xlogy(p, p).sum(1, keepdim=True)
        too_wide = entropy > math.log(min(perplexity, (n - 1) / 3))
        low, high = torch.where(too_wide, beta, low), torch.where(too_wide, high, beta)
    p = (p + p.T) / (2 * n)
    y = 1e-2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(x.device)
    step, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50)
    for it in range(iterations):
        near = (1 / (1 + torch.cdist(y, y).square())) * off
        force = ((12 if it < 100 else 1) * p - near / near.sum()) * near
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient.sign() == step.sign(), 0.8 * gain, gain + 0.2).clamp(min=0.01)
        step = (0.5 if it < 100 else 0.8) * step - rate * gain * gradient
        y = y + step
        y = y - y.mean(0)
    return y

# ---------------------------------------------------------------- distances between sets

def frechet_parts(mu1, cov1, mu2, cov2):
    """Mean part |mu1 - mu2|^2 and covariance part tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of the Frechet distance, float64."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(t, dtype=torch.float64) for t in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # symmetric, with the eigenvalues of cov1 cov2
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return (mu1 - mu2).square().sum().item(), (cov1.trace() + cov2.trace() - 2 * cross).item()

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance between two Gaussians, the "FID" of features; mu (C,), cov (C,C), arrays or tensors."""
    return sum(frechet_parts(mu1, cov1, mu2, cov2))

PLANES = ('sagittal', 'coronal', 'axial')  # the axis across which slices are cut, 0, 1, 2

@torch.no_grad()
def feature_moments(volumes, extractor, rule='all', batch=64):
    """Moments of the features of every slice of an iterable of volumes (1,1,D,H,W), per plane: {plane: (F+1,F+1) float64}.

    Nothing but these sums is kept, so any number of slices fits in memory. extractor: slices (n,1,h,w) in [0,1] -> (n,F).
    rule: 'all' slices, empty ones too, or the 'central' 40 % of each plane.
    """
    if rule not in ('all', 'central'): raise ValueError(f"slices '{rule}': all or central")
    total = {}
    for volume in volumes:
        for axis, plane in enumerate(PLANES):
            slices = volume.clamp(0, 1).movedim(2 + axis, 1).flatten(0, 1)
            if rule == 'central':
                slices = slices[round(0.3 * len(slices)):round(0.7 * len(slices))]
            for part in slices.split(batch):
                total[plane] = total.get(plane, 0.0) + moments(extractor(part)).cpu()
    return total

def slice_frechet(a, b):
    """Frechet distance of two sets in feature_moments' form: per plane, their mean, mean and covariance part of the mean, slices.

    ValueError if a plane has no more slices than features: its covariance would be singular and the distance biased beyond use.
    """
    if not a or not b: raise ValueError('no volumes on one side')
    parts = {}
    for plane in PLANES:
        for m in (a[plane], b[plane]):
            if m[-1, -1] <= len(m):
                raise ValueError(
                    f'{int(m[-1, -1])} {plane} slices for {len(m) - 1} features: more slices than features'
                    ' are needed'
                )
        parts[plane] = frechet_parts(
            *(stat for m in (a[plane], b[plane]) for stat in (m[-1, :-1] / m[-1, -1], covariance(m)))
        )
    found = {plane: sum(p) for plane, p in parts.items()}
    return found | {
        'mean': sum(found.values()) / 3,
        'mean_part': sum(p[0] for p in parts.values()) / 3,
        'covariance_part': sum(p[1] for p in parts.values()) / 3,
        'slices': {plane: (int(a[plane][-1, -1]), int(b[plane][-1, -1])) for plane in PLANES},
    }

# ---------------------------------------------------------------- label maps

def dice(a, b, labels):
    """Label maps a, b (D,H,W) of one shape -> {label: 2 |a and b| / (|a| + |b|)}, nan where neither has the label."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape: raise ValueError(f'dice of label maps of shapes {a.shape} and {b.shape}')
    result = {}
    for label in labels:
        x, y = a == label, b == label
        result[label] = float(2 * (x & y).sum() / (x.sum() + y.sum())) if x.any() or y.any() else float('nan')
    return result

def region_volumes_mm3(seg, labels, spacing_mm):
    """Label map (D,H,W) -> {label: volume in mm3}. spacing_mm: one number or three. labels: numbers, or {name: numbers to add up}."""
    voxel = float(np.prod(np.broadcast_to(spacing_mm, 3)))
    merged = labels if isinstance(labels, dict) else {label: (label,) for label in labels}
    return {name: voxel * int(np.isin(seg, parts).sum()) for name, parts in merged.items()}
