"""Metrics as functions of arrays, with unit, range and definition; and what a run gathers of them."""
import numpy as np
import torch

from common import print0
from data import random
from losses import perceptual_loss, psnr, ssim, ssim_map
from quantize import perplexity

def attempt(measure, *args, **row):
    """A row of results: what it is of, and what measure(*args) returns, or as 'reason' why it cannot."""
    try:
        return row | measure(*args)
    except ValueError as e:
        return row | {'reason': str(e)}

# ---------------------------------------------------------------- fidelity

def fidelity(x_hat, x, lpips=None):
    """Scores of a reconstruction as a dict; x_hat, x: (1,1,D,H,W), both clipped to [0,1].

    lpips: a pretrained.LPIPS. It adds 'lpips_sum', over the three planes of the mean over all slices,
    'lpips_mean', a third of it, and 'lpips_brain', the sum with the prediction's background removed.
    ValueError if x has no brain, no voxel above 0.
    """
    x_hat, x = x_hat.float().clamp(0, 1), x.clamp(0, 1)
    brain = x > 0
    if not brain.any(): raise ValueError('an empty mask: no voxel of the scan is above 0')
    similarity = ssim_map(x_hat, x)
    valid = [slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(x.shape[2:], similarity.shape[2:])]
    scores = {
        'psnr_whole': psnr(x_hat, x).item(),
        'ssim_whole': 100 * similarity.mean().item(),
        'psnr_brain': psnr(x_hat, x, mask=brain).item(),
        'ssim_brain': 100 * similarity[brain[:, :, *valid]].mean().item(),
        'ssim_uniform_whole': 100 * ssim(x_hat, x, window='uniform', size=7).item()}
    if lpips:
        total = perceptual_loss(lpips, x_hat, x, 1.0).item()
        scores['lpips_sum'] = total
        scores['lpips_mean'] = total / 3
        scores['lpips_brain'] = perceptual_loss(lpips, x_hat * brain, x, 1.0).item()
    return scores

def summarise(values, subjects, draws=2000, seed=0):
    """Mean, sd and n over subjects of a value per session; a subject's sessions are averaged first.

    subjects: those of the sessions. ci95: the 95 % interval of the mean, by bootstrap of subjects. One
    subject has neither sd nor interval. identical: sessions without any error, whose PSNR is infinite; with
    one of them, or a difference from one, there is no mean either.
    """
    values, subjects = np.asarray(values), np.asarray(subjects)
    means = np.array([values[subjects == subject].mean() for subject in np.unique(subjects)])
    summary = {'mean': None, 'sd': None, 'n_subjects': len(means), 'n_sessions': len(values), 'ci95': None,
               'identical': int(np.isposinf(values).sum())}
    if np.isinf(means).any(): return summary
    summary['mean'] = float(means.mean())
    if len(means) > 1:
        boot = means[random(seed, 0).integers(len(means), size=(draws, len(means)))].mean(1)
        summary['sd'] = float(means.std(ddof=1))
        summary['ci95'] = [float(q) for q in np.quantile(boot, [0.025, 0.975])]
    return summary

def summarise_scores(scored, seed):
    """[(subject, scores)] -> {metric: summary over subjects}; empty without scans."""
    if not scored: return {}
    subjects = [subject for subject, _ in scored]
    summaries = {}
    for metric in scored[0][1]:
        summaries[metric] = summarise([scores[metric] for _, scores in scored], subjects, seed=seed)
    return summaries

def add_cross_modal(run, scans, outputs, lpips):
    """Score every ordered pair of a session's scans: the source's anatomy in the target's style.

    The style is that of the target scan ('own', NeuroQuant eq. 13) or its modality's mean ('mean').
    """
    films = [run.model.film(out['z_mod'], scan.modality) for scan, out in zip(scans, outputs)]
    for source, out in zip(scans, outputs):
        for target, own_film in zip(scans, films):
            if source is target: continue
            mean_film = run.model.mean_film(target.modality, out['z_q'])
            for style, film in (('own', own_film), ('mean', mean_film)):
                scores = fidelity(run.model.decode(out['z_q'], film), target.x, lpips)
                key = source.modality, target.modality, style
                run.cross[key].append((target.row['subject'], scores))

def cross_rows(cross, seed):
    rows = []
    for (source, target, style), scored in cross.items():
        scores = summarise_scores(scored, seed)
        rows.append({'source': source, 'target': target, 'style': style, 'scores': scores})
    return rows

# ---------------------------------------------------------------- the latent

def moments(z):
    """z (N,C) or (B,C,d,h,w) -> (C+1,C+1) float64, sums of products of the channels and a constant 1."""
    rows = z if z.ndim == 2 else z.movedim(1, -1).flatten(0, -2)
    rows = torch.nn.functional.pad(rows.double(), (0, 1), value=1.0)
    return rows.T @ rows

def mean_of(m):
    return m[-1, :-1] / m[-1, -1]

def covariance(m):
    """(C,C) unbiased covariance of the channels out of their moments."""
    n, mean = m[-1, -1], mean_of(m)
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

def channels_in_use(m, noise):
    """How many axes of a latent with moments m vary more than its noise does; 0 to C.

    noise: (C,) mean posterior variance of each channel. Of a lost channel only the noise is left.
    """
    scale = noise.rsqrt()
    return (torch.linalg.eigvalsh(scale[:, None] * covariance(m) * scale) > 1).sum().item()

def channel_cosine(z, centred=True):
    """z (N,C) or (B,C,d,h,w) -> (C,C) absolute cosine of channels over positions, DeCo table 1 and fig. 2.

    centred=True subtracts each channel's mean first: the absolute Pearson correlation. Without it the means
    of channels count as similarity, of which no covariance says anything.
    """
    return cosine_of(moments(z), centred)

def effective_rank(z):
    """exp of the entropy of explained_variance(z): 1 to C, DeCo table 1."""
    return rank_of(explained_variance(z))

def explained_variance(z):
    """z (N,C) or (B,C,d,h,w) -> (C,) shares of variance along principal axes, descending, DeCo fig. 3."""
    return variance_shares(moments(z))

def latent_geometry(m, sigma):
    """Summary of latents by their moments m, as a dict: every number comes from one covariance.

    sigma: mean posterior sd, or None. Above 16 channels the matrices are None.
    """
    shares, C = variance_shares(m), len(m) - 1
    raw, centred = cosine_of(m, False), cosine_of(m, True)
    pairs = ~torch.eye(C, dtype=bool)
    return {
        'channels': C,
        'matrix_raw': raw.tolist() if C <= 16 else None,
        'matrix_centred': centred.tolist() if C <= 16 else None,
        'cos_raw': raw[pairs].mean().item() if C > 1 else None,
        'pearson_abs': centred[pairs].mean().item() if C > 1 else None,
        'effective_rank': rank_of(shares),
        'explained_variance': shares.tolist(),
        'channel_sd': covariance(m).diagonal().sqrt().tolist(),
        'posterior_sigma': sigma}

def add_latent(run, modality, out):
    """Add what model.analyse() says of a scan to the run's moments, sigmas and codes."""
    run.moments = run.moments + moments(out['latent'])
    if out['logvar'] is not None:
        run.sigmas.append(torch.exp(0.5 * out['logvar'].float()).mean().item())
    if out['tokens'] is not None:
        config = run.model.config
        books = out['tokens'].reshape(config.num_codebooks, -1).cpu()
        counts = [np.bincount(book, minlength=config.num_codes) for book in books]
        run.codes[modality] = run.codes[modality] + np.stack(counts)

def code_rows(codes, modalities):
    """code_row of each modality that was seen, and of all."""
    counts = {modality: codes[modality] for modality in modalities if modality in codes}
    if counts:
        counts['all'] = sum(counts.values())
    return {name: code_row(histograms) for name, histograms in counts.items()}

def code_row(counts):
    """Histograms (codebooks, K) -> how many codes were used, and perplexity, means over codebooks; tokens."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return {
        'used': (counts > 0).sum(1).double().mean().item(),
        'perplexity': perplexity(counts).item(),
        'tokens': int(counts.sum())}

def tsne(points, perplexity=30.0, seed=0):
    """t-SNE (van der Maaten & Hinton 2008), (N,C) -> (N,2); None, with one line, without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return print0('no t-SNE: pip install scikit-learn to get one')
    perplexity = min(perplexity, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed).fit_transform(np.asarray(points))

def frechet_parts(mu1, cov1, mu2, cov2):
    """The parts of the Frechet distance: |mu1 - mu2|^2 and tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), float64."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(t, dtype=torch.float64) for t in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # symmetric, with the eigenvalues of cov1 cov2
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return (mu1 - mu2).square().sum().item(), (cov1.trace() + cov2.trace() - 2 * cross).item()

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two Gaussians, the "FID" of features; mu (C,), cov (C,C)."""
    return sum(frechet_parts(mu1, cov1, mu2, cov2))

# ---------------------------------------------------------------- label maps

def dice(a, b, labels):
    """Label maps a, b (D,H,W) -> {label: 2 |a and b| / (|a| + |b|)}, nan for a label that neither has."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape: raise ValueError(f'dice of label maps of shapes {a.shape} and {b.shape}')
    result = {}
    for label in labels:
        x, y = a == label, b == label
        total = x.sum() + y.sum()
        result[label] = float(2 * (x & y).sum() / total) if total else float('nan')
    return result

def region_volumes_mm3(seg, labels, spacing_mm):
    """Label map -> {label: mm3}. labels: numbers, or {name: numbers to add up}. spacing_mm: one or three."""
    voxel = float(np.prod(np.broadcast_to(spacing_mm, 3)))
    merged = labels if isinstance(labels, dict) else {label: (label,) for label in labels}
    return {name: voxel * int(np.isin(seg, parts).sum()) for name, parts in merged.items()}
