"""Judge trained autoencoders on held-out sessions: tables (markdown and JSON) and a picture.

    python evaluate.py --ckpt=out/demo/best.pt
    python evaluate.py --ckpt=out/a/best.pt,out/b/best.pt --data_dir=data/mine --split=test

Writes table.md, table.json and reconstructions.png beside the first checkpoint (--out_dir elsewhere). Importing it runs nothing.
"""
import json
import math
import os
import sys

import numpy as np
import torch
from scipy import fft, ndimage, optimize, special, stats
from tqdm import tqdm

from common import autocast, configure, load_checkpoint, make_out_dir, start_processes, write_text
from data import Sessions, random
from losses import psnr, ssim_map
from model import from_checkpoint

# ---------------------------------------------------------------- settings
ckpt = 'out/neuroquant/best.pt'  # one, or several separated by commas
data_dir = ''               # '' for the one the first checkpoint was trained on
split = 'test'
max_sessions = -1           # -1 for all of the split
reference_sessions = 50     # sessions the reference rows are computed on; 0 for no such rows
out_dir = ''                # '' for the first checkpoint's folder
device = ''
dtype = 'float32'           # bfloat16 for autocast
seed = 0                    # of the bootstrap

DEFINITIONS = """\
PSNR: dB, data range 1, prediction clamped to [0,1]. SSIM: 3D, Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, valid region, times 100.
whole: every voxel of the box. brain: voxels where the input is above 0 (SSIM: windows centred there).
Mean +- standard deviation over subjects, the sessions of a subject averaged first.
DFT: decoder fine-tuned on a frozen encoder. cos_raw: mean absolute cosine of channel pairs, means included; pearson_abs: the same of
centred channels. Effective rank: exp of the entropy of the explained variance, whose covariance is that of pearson_abs."""

# ---------------------------------------------------------------- metrics

def scores(x_hat, x):
    """Dict of the four fidelity metrics of one volume; x_hat, x: (1,1,D,H,W), x in [0,1]."""
    x_hat, brain = x_hat.float().clamp(0, 1), x > 0
    similarity = ssim_map(x_hat, x)
    border = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(x.shape[2:], similarity.shape[2:])]
    inside = brain[(slice(None), slice(None), *border)]
    return {'psnr_whole': psnr(x_hat, x).item(), 'ssim_whole': 100 * similarity.mean().item(),
            'psnr_brain': psnr(x_hat, x, mask=brain).item(), 'ssim_brain': 100 * similarity[inside].mean().item()}

def summarise(values, subjects, draws=2000):
    """values: per session, subjects: their ids -> mean and sd over subjects, n, and the 95 % bootstrap interval of the mean."""
    ids = sorted(set(subjects))
    means = np.array([np.mean([v for v, s in zip(values, subjects) if s == i]) for i in ids])
    boot = means[random(seed, 0).integers(len(means), size=(draws, len(means)))].mean(1)
    return {'mean': float(means.mean()), 'sd': float(means.std(ddof=1)) if len(means) > 1 else 0.0, 'n_subjects': len(means),
            'n_sessions': len(values), 'ci95': [float(q) for q in np.quantile(boot, [0.025, 0.975])]}

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
    return {'channels': C, 'cos_raw': cosine_of(m, False)[off].mean().item() if C > 1 else None,
            'pearson_abs': cosine_of(m, True)[off].mean().item() if C > 1 else None, 'effective_rank': rank_of(shares),
            'explained_variance': shares.tolist(), 'channel_sd': covariance(m).diagonal().sqrt().tolist(), 'posterior_sigma': sigma}

# ---------------------------------------------------------------- distances between sets

def frechet_parts(mu1, cov1, mu2, cov2):
    """Mean part |mu1 - mu2|^2 and covariance part tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of the Frechet distance, float64."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(t, dtype=torch.float64) for t in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()  # symmetric, with the eigenvalues of cov1 cov2
    return (mu1 - mu2).square().sum().item(), (cov1.trace() + cov2.trace() - 2 * cross).item()

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance between two Gaussians, the "FID" of features; mu (C,), cov (C,C), arrays or tensors."""
    return sum(frechet_parts(mu1, cov1, mu2, cov2))

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

# ---------------------------------------------------------------- what a latent knows

def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    rank = stats.rankdata(score)
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))

def logistic(x, y, ridge):
    """Weights and bias that minimise mean log loss + ridge |w|^2 / 2 for y in {0, 1}, by L-BFGS."""
    def loss(p):
        margin = x @ p[:-1] + p[-1]
        residual = special.expit(margin) - y
        return np.logaddexp(0, margin).mean() - (y * margin).mean() + ridge * (p[:-1] ** 2).sum() / 2, np.append(x.T @ residual / len(y) + ridge * p[:-1], residual.mean())
    return optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method='L-BFGS-B', options={'maxiter': 500}).x

def linear_probe(z, y, groups, folds=5, ridge=0.1):
    """Can a linear function of frozen features tell two classes apart? Cross-validated, no group on both sides of a fold.

    z (N, features), or (N, C, d, h, w), flattened; y (N,) two values; groups (N,), such as subjects. Features are standardised and
    the ridge-logistic regression fitted on the training folds alone; with more features than rows, in the span of the rows, which
    is the same. returns dict: accuracy, balanced_accuracy, auc, per session; subject_accuracy, by the mean score of a group;
    n, n_groups, ci95 of accuracy by bootstrap of groups. ValueError with one class or fewer groups of a class than folds.
    """
    z, y, groups = np.asarray(z, np.float64).reshape(len(z), -1), np.asarray(y), np.asarray(groups)
    classes = np.unique(y)
    if len(classes) != 2: raise ValueError(f'a probe needs two classes, got {len(classes)}')
    positive = y == classes[1]
    first = {g: positive[groups == g][0] for g in np.unique(groups)}
    rng, fold_of = random(seed, 8), {}
    for value in (False, True):
        members = [g for g in first if first[g] == value]
        if len(members) < folds: raise ValueError(f'{len(members)} subjects of class {classes[int(value)]}: at least {folds} are needed')
        fold_of |= {members[k]: place % folds for place, k in enumerate(rng.permutation(len(members)))}  # each fold has both classes
    fold, score = np.array([fold_of[g] for g in groups]), np.zeros(len(y))
    for k in range(folds):
        train = fold != k
        mean, sd = z[train].mean(0), z[train].std(0)
        x = (z - mean) / np.where(sd > 1e-12, sd, 1)
        if x.shape[1] > train.sum():
            _, _, axes = np.linalg.svd(x[train], full_matrices=False)
            x = x @ axes.T
        weights = logistic(x[train], positive[train].astype(float), ridge)
        score[~train] = x[~train] @ weights[:-1] + weights[-1]
    right = (score > 0) == positive
    names = np.array(list(first))
    by_group = np.array([right[groups == g].mean() for g in names])
    votes = np.array([(score[groups == g].mean() > 0) == first[g] for g in names])
    boot = by_group[random(seed, 9).integers(len(names), size=(2000, len(names)))].mean(1)
    return {'accuracy': float(right.mean()), 'balanced_accuracy': float((right[positive].mean() + right[~positive].mean()) / 2),
            'auc': auc(score, positive), 'subject_accuracy': float(votes.mean()), 'n': len(y), 'n_groups': len(names),
            'ci95': [float(q) for q in np.quantile(boot, [0.025, 0.975])]}

# ---------------------------------------------------------------- reference rows

def dct_codec(x, bits):
    """x (D,H,W) after a transform codec that spends at most `bits`: global DCT, dead-zone quantiser, entropy per frequency band.

    The entropy is the ideal one of each band's own histogram, and the brain mask is given for free: a lower bound of what such
    a codec needs.
    """
    c = fft.dctn(x, norm='ortho')
    radius = np.sqrt(sum(np.meshgrid(*[(np.arange(n) / n) ** 2 for n in x.shape], indexing='ij')))
    band = np.minimum((radius * 48).astype(np.int64), 63)
    size = np.bincount(band.ravel(), minlength=64)
    def cost(step):
        symbol = np.trunc(c / step).astype(np.int64)
        at = symbol != 0
        keys, counts = np.unique((band[at] << 40) + symbol[at], return_counts=True)
        of = (keys + (1 << 39)) >> 40  # the band back
        zeros = size - np.bincount(of, counts, minlength=64)
        entropy = lambda n, of: (n * np.log2(np.maximum(of, 1) / np.maximum(n, 1))).sum()
        return entropy(counts, size[of]) + entropy(zeros, size)
    fine, coarse = np.abs(c).max() * 1e-6, np.abs(c).max() * 1.01
    for _ in range(26):
        middle = math.sqrt(fine * coarse)
        fine, coarse = (fine, middle) if cost(middle) <= bits else (middle, coarse)
    symbol = np.trunc(c / coarse)
    decoded = fft.idctn(np.sign(symbol) * (np.abs(symbol) + 0.5) * (symbol != 0) * coarse, norm='ortho')
    return np.where(x > 0, decoded, 0).astype(np.float32)

def training_mean(train, m):
    """Mean volume (D,H,W) of modality index m over the training sessions that have it."""
    scans = [i for i, k in train.scans if k == m]
    return sum(train.volume(i, m).astype(np.float64) for i in tqdm(scans, desc='training mean', leave=False)) / len(scans)

def nearest_training_scan(train, m, targets):
    """For each target (D,H,W), the training volume of modality index m at the smallest mean squared error.

    Searched among block means when the volume is larger than about 48 voxels a side, so that the training set fits in memory.
    """
    block = max(1, max(train.shape) // 48)
    small = lambda v: torch.nn.functional.avg_pool3d(torch.tensor(np.asarray(v, np.float32))[None], block)[0].flatten()
    scans = [i for i, k in train.scans if k == m]
    library = torch.stack([small(train.volume(i, m)) for i in tqdm(scans, desc='nearest scan', leave=False)])
    return [np.asarray(train.volume(scans[int((library - small(t)).square().mean(1).argmin())], m), np.float32) for t in targets]

def reference_rows(test, train, n, rates):
    """Scores of what costs nothing to learn, per row and modality: lists of (subject, scores). rates: bits for the codec's rows."""
    rows = {}
    for m, name in enumerate(test.modalities):
        sessions = [i for i in range(n) if m in test.present(i)]
        volumes = [np.asarray(test.volume(i, m), np.float32) for i in sessions]
        mean = training_mean(train, m).astype(np.float32)
        guesses = {'population mean of the training set': [mean] * len(volumes),
                   'nearest training scan': nearest_training_scan(train, m, volumes),
                   **{f'DCT codec at {bits:.0f} bits': [dct_codec(v, bits) for v in tqdm(volumes, desc='DCT codec', leave=False)] for bits in rates},
                   'blur, sigma 1 voxel (codes nothing)': [ndimage.gaussian_filter(v, 1.0) for v in volumes]}
        for row, predictions in guesses.items():
            rows.setdefault(row, {})[name] = [(test.rows[i]['subject'], scores(torch.tensor(p)[None, None], torch.tensor(v)[None, None]))
                                              for i, p, v in zip(sessions, predictions, volumes)]
    return rows

# ---------------------------------------------------------------- one model

@torch.no_grad()
def judge(model, test, n):
    """Scores of reconstructions, of cross-modal ones, code counts, latent geometry, and the first session with every modality."""
    fidelity, cross, shown = {name: [] for name in test.modalities}, {}, None
    books = getattr(model.config, 'num_codebooks', 1) if hasattr(model, 'quantizer') else 0
    counts = np.zeros((len(test.modalities), books, getattr(model.config, 'num_codes', 0)), np.int64)
    total, sigmas = 0.0, []
    for i in tqdm(range(n), desc='sessions', leave=False):
        subject, x, x_hat = test.rows[i]['subject'], {}, {}
        with autocast(device, dtype):
            for m in test.present(i):
                x[m] = torch.tensor(test.volume(i, m), dtype=torch.float32, device=device)[None, None]
                x_hat[m] = model.reconstruct(x[m], m).float()
                total = total + moments(model.latent(x[m], m))
                logvar = model.posterior(x[m])[1]
                if logvar is not None: sigmas.append(torch.exp(0.5 * logvar.float()).mean().item())
                if books:
                    for k, book in enumerate(model.tokens(x[m]).reshape(books, -1).cpu()): counts[m, k] += np.bincount(book, minlength=counts.shape[2])
                fidelity[test.modalities[m]].append((subject, scores(x_hat[m], x[m])))
            if hasattr(model, 'translate') and model.config.film: cross_modal(model, test.modalities, subject, x, cross)
        if shown is None and len(x) == len(test.modalities):
            shown = {test.modalities[m]: (x[m].cpu().numpy()[0, 0], x_hat[m].clamp(0, 1).cpu().numpy()[0, 0]) for m in x}
    return fidelity, cross, counts, latent_geometry(total.cpu(), float(np.mean(sigmas)) if sigmas else None), shown

def cross_modal(model, names, subject, x, cross):
    """Add the scores of every ordered pair of a session's scans x {modality: (1,1,D,H,W)} to cross."""
    films = {m: model.film(model.encode(scan)[1], m) for m, scan in x.items()}
    codes = {m: model.quantizer.lookup(model.tokens(scan)) for m, scan in x.items()}
    for a in x:
        for b in x:
            if a == b: continue
            for style, film in (('own', films[b]), ('mean', model.mean_film(b, codes[a]))):
                found = cross.setdefault((names[a], names[b], style), [])
                found.append((subject, scores(model.decode(codes[a], film), x[b])))

def collapse(found):
    """[(subject, scores)] -> {metric: summary over subjects}."""
    return {metric: summarise([s[metric] for _, s in found], [subject for subject, _ in found]) for metric in found[0][1]} if found else {}

def code_use(counts):
    """Codes used at least once and perplexity of histograms (codebooks, K), means over the codebooks; tokens of all."""
    shares = [c[c > 0] / c.sum() for c in counts]
    return {'used': float(np.mean([len(p) for p in shares])), 'perplexity': float(np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares])),
            'tokens': int(counts.sum())}

# ---------------------------------------------------------------- output

def cell(summary, digits=2):
    return f"{summary['mean']:.{digits}f} +- {summary['sd']:.{digits}f}" if summary else ''

METRICS = {'psnr_whole': 'PSNR', 'ssim_whole': 'SSIM', 'psnr_brain': 'PSNR brain', 'ssim_brain': 'SSIM brain'}

def markdown(results, modalities):
    """The tables as text."""
    n = max(s['psnr_whole']['n_subjects'] for row in results['rows'] for s in row['fidelity'].values() if s)
    head = ['model', 'f', 'latent', 'bits/volume', 'DFT', *[f'{m} {name}' for m in modalities for name in METRICS.values()]]
    lines = [f"Reconstruction, split {results['split']} of {results['data_dir']}, {n} subjects", '', '| ' + ' | '.join(head) + ' |',
             '|' + ' --- |' * len(head)]
    for row in results['rows']:
        cells = [cell(row['fidelity'].get(m, {}).get(k)) for m in modalities for k in METRICS]
        lines.append('| ' + ' | '.join([row['name'], row['f'], row['latent'], row['bits'], row['dft'], *cells]) + ' |')
    models = [row for row in results['rows'] if 'geometry' in row]
    lines += ['', f'Latent, all positions of the same scans', '',
              '| model | latent | cos_raw | pearson_abs | effective rank | explained variance | channel sd | posterior sigma |', '|' + ' --- |' * 8]
    for row in models:
        g = row['geometry']
        few = lambda values: ' '.join(f'{v:.3f}' for v in values[:8]) + (' ...' if len(values) > 8 else '')
        lines.append(f"| {row['name']} | {row['latent']} | " + ' | '.join('' if v is None else f'{v:.4f}' for v in (g['cos_raw'], g['pearson_abs'], g['effective_rank']))
                     + f" | {few(g['explained_variance'])} | {few(g['channel_sd'])} | {'' if g['posterior_sigma'] is None else format(g['posterior_sigma'], '.4f')} |")
    for row in models:
        if row['codes']:
            lines += ['', f"{row['name']}, codes of {row['num_codes']}: " + '; '.join(
                f"{k} {v['used']:.0f} used, perplexity {v['perplexity']:.1f}, {v['tokens']} tokens" for k, v in row['codes'].items())]
        if row['cross']:
            lines += ['', f"{row['name']}, cross-modal: anatomy of the source, style of the target scan (eq. 13) or the target's running mean (no target scan)", '',
                      '| source -> target | style | ' + ' | '.join(METRICS.values()) + ' |', '|' + ' --- |' * 6]
            lines += [f"| {c['source']} -> {c['target']} | {c['style']} | " + ' | '.join(cell(c['scores'][k]) for k in METRICS) + ' |' for c in row['cross']]
    return '\n'.join(lines) + '\n\n' + DEFINITIONS + '\n'

def picture(path, shown, title):
    """PNG: rows are planes; for each modality input, reconstruction and absolute error, all on one scale."""
    try: import matplotlib
    except ImportError: return print('no picture: pip install matplotlib to get one')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(3, 3 * len(shown), figsize=(2.1 * 3 * len(shown), 6.6), squeeze=False)
    for k, (modality, (x, x_hat)) in enumerate(shown.items()):
        for c, (name, volume) in enumerate((('input', x), ('reconstruction', x_hat), ('absolute error', np.abs(x - x_hat)))):
            for r, plane in enumerate(('sagittal', 'coronal', 'axial')):
                ax = axes[r, 3 * k + c]
                ax.imshow(np.take(volume, volume.shape[r] // 2 + (volume.shape[r] // 10 if r == 0 else 0), r).T, origin='lower', cmap='gray', vmin=0, vmax=1)
                ax.set_xticks([]), ax.set_yticks([])
                if r == 0: ax.set_title(f'{modality} {name}', fontsize=9)
                if k == c == 0: ax.set_ylabel(plane, fontsize=9)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    print(f'picture: {path}')

def main():
    global device, out_dir, data_dir
    _, world, device = start_processes(device)
    if world > 1: raise SystemExit('evaluate.py runs in one process: start it with python, not torchrun')
    paths = [p for p in ckpt.split(',') if p]
    checkpoints = [load_checkpoint(p) for p in paths]
    data_dir = data_dir or checkpoints[0]['config']['data_dir']
    out_dir = out_dir or os.path.dirname(paths[0]) or '.'
    make_out_dir(out_dir)
    results, shown = {'data_dir': data_dir, 'split': split, 'definitions': DEFINITIONS, 'rows': []}, None
    modalities, rates = [], []
    for path, checkpoint in zip(paths, checkpoints):
        model = from_checkpoint(checkpoint).to(device)
        if not hasattr(model, 'reconstruct'): raise SystemExit(f'{path}: a flow, not an autoencoder')
        known = tuple(checkpoint['config']['modalities'])
        modalities += [m for m in known if m not in modalities]
        test = Sessions(data_dir, known, split)
        n = test.n if max_sessions < 0 else min(max_sessions, test.n)
        try: fidelity, cross, counts, geometry, pair = judge(model, test, n)
        except ValueError as e: raise SystemExit(f'{path} on {data_dir}: {e}')
        shown = shown or pair
        bits, style = model.bits_per_volume(test.shape), model.style_bits()
        rates.append(bits + style)
        results['rows'].append({
            'name': os.path.basename(os.path.dirname(path)) or path, 'ckpt': path, 'iter': checkpoint['iter_num'], 'git_commit': checkpoint['git_commit'],
            'f': f'{model.factor}x', 'latent': 'x'.join(map(str, model.latent_shape(test.shape))), 'bits': f'{bits:.0f}' + (f' + {style}' if style else ''),
            'dft': 'yes' if checkpoint['config'].get('freeze_encoder') else 'no', 'num_codes': getattr(model.config, 'num_codes', None),
            'fidelity': {m: collapse(found) for m, found in fidelity.items()}, 'geometry': geometry,
            'codes': {m: code_use(c) for m, c in zip([*known, 'all'], [*counts, counts.sum(0)]) if c.size},
            'cross': [{'source': a, 'target': b, 'style': style, 'scores': collapse(found)} for (a, b, style), found in cross.items()]})
    if reference_sessions > 0:
        train, test = Sessions(data_dir, modalities, 'train'), Sessions(data_dir, modalities, split)
        for name, found in reference_rows(test, train, min(test.n, n, reference_sessions), sorted(set(rates))).items():
            results['rows'].append({'name': name, 'f': '', 'latent': '', 'bits': name.split()[-2] if 'DCT' in name else '', 'dft': '',
                                    'fidelity': {m: collapse(f) for m, f in found.items()}})
    text = markdown(results, modalities)
    print(text)
    write_text(os.path.join(out_dir, 'table.md'), text)
    write_text(os.path.join(out_dir, 'table.json'), json.dumps(results, indent=1))
    print(f"tables: {os.path.join(out_dir, 'table.md')}, table.json")
    if shown: picture(os.path.join(out_dir, 'reconstructions.png'), shown, f"{results['rows'][0]['name']}, a held-out session of {data_dir}")

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
