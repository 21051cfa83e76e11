"""What does a latent know of a subject? Two classes told apart from frozen features, cross-validated."""
import math
from itertools import combinations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import optimize, special, stats
from tqdm import tqdm

from common import autocast
from data import random
from judge.metrics import attempt, tsne
from judge.runs import key_of

# ---------------------------------------------------------------- cross-validation

def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative; a tie counts half."""
    rank = stats.rankdata(score)
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))

def cross_validate(fit, y, groups, folds=5, seed=0):
    """Judge a classifier of rows 0..N-1; no group is on both sides of a fold.

    fit(train, test, positive): rows to learn from, rows to score, (N,) bool -> scores of test, above 0 for
    positive. y: (N,) two values, the later one in order is positive. groups: (N,), such as subjects.
    returns dict: accuracy, balanced_accuracy and auc of rows; subject_accuracy, by the mean score of a group,
    None where groups hold both classes; n; n_groups; ci95 of accuracy and balanced_ci95, by bootstrap of
    groups. ValueError with one class, or fewer groups of a class than folds.
    """
    y, groups = np.asarray(y), np.asarray(groups)
    classes, names = np.unique(y), np.unique(groups)
    if len(classes) != 2:
        raise ValueError(f'a probe needs two classes, got {len(classes)} in {len(y)} scans')
    positive = y == classes[1]
    share = {g: positive[groups == g].mean() for g in names}
    pure = set(share.values()) <= {0.0, 1.0}
    strata = {'': names}
    if pure:  # every group is of one class: each fold gets its part of both
        is_positive = np.array([share[g] == 1 for g in names])
        strata = {f' of class {classes[0]}': names[~is_positive],
                  f' of class {classes[1]}': names[is_positive]}
    fold_of = deal_into_folds(strata, folds, seed)
    fold = np.array([fold_of[g] for g in groups])
    score = np.zeros(len(y))
    for k in range(folds):
        score[fold == k] = fit(np.flatnonzero(fold != k), np.flatnonzero(fold == k), positive)
    right = (score > 0) == positive
    votes = [(score[groups == g].mean() > 0) == share[g] for g in names]
    ci95, balanced_ci95 = accuracy_intervals(right, positive, groups, seed)
    return {
        'accuracy': float(right.mean()),
        'balanced_accuracy': float((right[positive].mean() + right[~positive].mean()) / 2),
        'auc': auc(score, positive),
        'subject_accuracy': float(np.mean(votes)) if pure else None,
        'n': len(y),
        'n_groups': len(names),
        'ci95': ci95,
        'balanced_ci95': balanced_ci95}

def deal_into_folds(strata, folds, seed):
    """{group: fold}: each fold gets its part of every stratum.

    strata: {words for the message: groups}. ValueError for a stratum of fewer groups than folds.
    """
    rng, fold_of = random(seed, 8), {}
    for words, members in strata.items():
        if len(members) < folds:
            raise ValueError(f'{len(members)} subjects{words}: at least {folds} are needed')
        for position, j in enumerate(rng.permutation(len(members))):
            fold_of[members[j]] = position % folds
    return fold_of

def accuracy_intervals(right, positive, groups, seed):
    """95 % intervals of accuracy and balanced accuracy by bootstrap of groups; right, positive (N,) bool."""
    names = np.unique(groups)
    kinds = np.stack([positive, ~positive])                                    # (2, N)
    sizes = np.stack([kinds[:, groups == g].sum(1) for g in names])            # (n_groups, 2)
    hits = np.stack([(kinds & right)[:, groups == g].sum(1) for g in names])   # (n_groups, 2)
    drawn = random(seed, 9).integers(len(names), size=(2000, len(names)))
    drawn_hits, drawn_sizes = hits[drawn].sum(1), sizes[drawn].sum(1)          # (2000, 2), over rows
    accuracies = drawn_hits.sum(1) / drawn_sizes.sum(1)
    both = drawn_sizes.all(1)  # a draw without one of the classes has no balanced accuracy
    balanced = (drawn_hits[both] / drawn_sizes[both]).mean(1)
    return [np.quantile(values, [0.025, 0.975]).tolist() for values in (accuracies, balanced)]

# ---------------------------------------------------------------- linear

def logistic(x, y, ridge):
    """Weights and bias that minimise mean log loss + ridge |w|^2 / 2 for y in {0, 1}, by L-BFGS."""
    def loss(p):
        margin = x @ p[:-1] + p[-1]
        value = np.logaddexp(0, margin).mean() - (y * margin).mean() + ridge * (p[:-1] ** 2).sum() / 2
        residual = special.expit(margin) - y
        return value, np.append(x.T @ residual / len(y) + ridge * p[:-1], residual.mean())

    start = np.zeros(x.shape[1] + 1)
    return optimize.minimize(loss, start, jac=True, method='L-BFGS-B', options={'maxiter': 500}).x

def linear_probe(z, y, groups, folds=5, ridge=0.1, seed=0):
    """Can a linear function of frozen features tell two classes apart?

    z (N, features), or (N, C, d, h, w), flattened. Features are standardised, and the ridge-logistic
    regression fitted, on the training folds alone. y, groups, returns, errors: see cross_validate.
    """
    z = np.asarray(z, np.float64)
    z = z.reshape(len(z), math.prod(z.shape[1:]))  # of no rows too, which cross_validate refuses

    def fit(train, test, positive):
        mean, sd = z[train].mean(0), z[train].std(0)
        x, new = ((z[rows] - mean) / np.where(sd > 1e-12, sd, 1) for rows in (train, test))
        if x.shape[1] > len(x):  # the span of the rows gives the same
            _, _, axes = np.linalg.svd(x, full_matrices=False)
            x, new = x @ axes.T, new @ axes.T
        weights = logistic(x, positive[train].astype(float), ridge)
        return new @ weights[:-1] + weights[-1]

    return cross_validate(fit, y, groups, folds, seed)

# ---------------------------------------------------------------- SEResNet-152

def conv_norm(c_in, c_out, size, stride=1):
    conv = nn.Conv3d(c_in, c_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(c_out))

class SEBottleneck(nn.Module):
    """1x1x1 (strided), 3x3x3, 1x1x1 to 4 c channels, squeeze and excitation (Hu et al. 2018), a shortcut."""
    def __init__(self, c_in, c, stride):
        super().__init__()
        wide = 4 * c
        self.conv1, self.conv2 = conv_norm(c_in, c, 1, stride), conv_norm(c, c, 3)
        self.conv3 = conv_norm(c, wide, 1)
        self.excite = nn.Sequential(nn.Linear(wide, c // 4), nn.ReLU(), nn.Linear(c // 4, wide), nn.Sigmoid())
        same = stride == 1 and c_in == wide
        self.shortcut = nn.Identity() if same else conv_norm(c_in, wide, 1, stride)

    def forward(self, x):
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        h = h * self.excite(h.mean((2, 3, 4)))[:, :, None, None, None]
        return F.relu(h + self.shortcut(x))

class SEResNet(nn.Module):
    """SEResNet-152 in 3D, as MONAI's and in NeuroQuant 4.1: x (B, in_channels, D, H, W) -> (B, outputs).

    small: no strides in the stem, for latents of 9x12x9, which five halvings would reduce to a point.
    """
    def __init__(self, in_channels=1, outputs=1, blocks=(3, 8, 36, 3), small=False, dropout=0.0):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, 64, 7, 1 if small else 2, 3, bias=False), nn.BatchNorm3d(64), nn.ReLU(),
            nn.Identity() if small else nn.MaxPool3d(3, 2, ceil_mode=True))
        c_in, layers = 64, []
        for level, (n, c) in enumerate(zip(blocks, (64, 128, 256, 512))):
            for k in range(n):
                layers.append(SEBottleneck(c_in, c, 2 if k == 0 and level else 1))
                c_in = 4 * c
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.last = nn.Linear(c_in, outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x):
        return self.last(self.dropout(self.layers(self.stem(x)).mean((2, 3, 4))))

def network_probe(load, y, groups, device='cpu', epochs=30, batch_size=8, lr=1e-4, folds=5, seed=0,
                  dtype='float32', blocks=(3, 8, 36, 3)):
    """The same question put to SEResNet-152, trained anew on the other folds for every fold.

    load: row -> tensor (C, d, h, w), all of one size; called anew in every epoch, so that scans need not fit
    in memory. Channels are standardised by the training rows. AdamW with a cosine to 0, dropout 0.2, the stem
    without strides for grids below 32. y, groups, returns, errors: see cross_validate.
    """
    def fit(train, test, positive):
        torch.manual_seed(seed)
        sums = []
        for x in (load(i).double() for i in train):
            sums.append(torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3))]))
        first, second = torch.stack(sums).mean(0)[..., None, None, None]
        mean, sd = first.float(), (second - first ** 2).clamp(min=1e-12).sqrt().float()

        def batch(rows):
            return torch.stack([(load(i).float() - mean) / sd for i in rows]).to(device)

        shape = load(train[0]).shape
        net = SEResNet(shape[0], 1, blocks, min(shape[1:]) < 32, 0.2)
        net.to(device, memory_format=torch.channels_last_3d)
        size = min(batch_size, len(train))
        steps = len(train) // size  # an odd rest is left out: batch norm needs company
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for epoch in tqdm(range(epochs), desc='SEResNet-152', leave=False):
            order = random(seed, 10, epoch).permutation(train)
            for k in range(steps):
                rows = order[k * size:(k + 1) * size]
                with autocast(device, dtype):
                    logits = net(batch(rows))[:, 0]
                target = torch.tensor(positive[rows], dtype=torch.float32, device=device)
                loss = F.binary_cross_entropy_with_logits(logits.float(), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        net.eval()
        parts = np.split(test, range(size, len(test), size))
        with torch.no_grad(), autocast(device, dtype):
            return np.concatenate([net(batch(rows))[:, 0].float().cpu().numpy() for rows in parts])

    return cross_validate(fit, y, groups, folds, seed)

# ---------------------------------------------------------------- the latents of runs

class Latent:
    """What a run codes of a scan: its latent and mean, each (C,d,h,w) float32, and style, a vector or None.

    NeuroQuant's latent is z_q, its style GAP(z_mod): the decoder gets no more. brain: which positions are.
    """
    def __init__(self, scan, out):
        self.row, self.modality = scan.row, scan.modality
        self.latent, self.mean = (out[key][0].float().cpu() for key in ('latent', 'mean'))
        self.style = None
        if 'z_q' in out:
            self.latent = out['z_q'][0].float().cpu()
            if out['z_mod'] is not None:
                self.style = out['z_mod'][0].float().mean((1, 2, 3)).cpu()
        inside = F.interpolate((scan.x.cpu() > 0).float(), size=self.mean.shape[1:], mode='area')
        self.brain = inside.flatten() > 0.5

    def volume(self, with_style):
        """(C,d,h,w), the style as channels that are constant."""
        if not with_style: return self.latent
        grid = self.latent.shape[1:]
        return torch.cat([self.latent, self.style[:, None, None, None].expand(-1, *grid)])

    def features(self, with_style):
        """The same as a vector, the style once."""
        if not with_style: return self.latent.flatten()
        return torch.cat([self.latent.flatten(), self.style])

def block_means(volume):
    """(1, D, H, W) -> vector of the means of blocks of 4^3 voxels, as many as the latents of f = 4 have."""
    return F.avg_pool3d(volume, 4, ceil_mode=True).flatten().numpy()

def probe_rows(runs, column, networks, epochs, device, dtype, seed):
    """What the latents of each run tell: list of dicts, with a reason where a probe cannot be made.

    Folds are made by subject, within the sessions of the runs. column: of the index; z_anat is also asked for
    the modality. The scans themselves are asked once per modality. networks: what SEResNet-152 is trained on
    besides, 'latent', 'volume' or both. bits: of what a probe sees, as in the table of reconstructions.
    """
    rows = []
    for run in runs:
        value = np.array([(z.row.get(column) or '').strip() for z in run.latents])
        subject = np.array([z.row['subject'] for z in run.latents])
        modality = np.array([z.modality for z in run.latents])
        used = set(run.used)
        scans = [(i, m) for i, m in run.sessions.scans if i in used]
        bits = run.model.bits_per_volume(run.sessions.shape)
        with_style = any(z.style is not None for z in run.latents)
        parts = {'latent': (with_style, f'{bits + run.model.style_bits():.0f}')}
        if with_style:
            parts['z_q alone'] = False, f'{bits:.0f}'

        def load(scan):
            return torch.tensor(run.sessions.volume(*scan))[None]  # (1, D, H, W)

        def linear(features, y, keep, **row):
            def measure():
                return linear_probe(np.array([features(k) for k in keep]), y[keep], subject[keep], seed=seed)
            rows.append(attempt(measure, probe='linear', **row))

        def network(load, keep, **row):
            def measure():
                return network_probe(lambda k: load(keep[k]), value[keep], subject[keep], device, epochs,
                                     seed=seed, dtype=dtype)
            rows.append(attempt(measure, probe='SEResNet-152', target=column, **row))

        for name in run.modalities:
            keep = np.flatnonzero((modality == name) & ~np.isin(value, ('', 'n/a', 'nan')))
            for part, (style, size) in parts.items():
                seen = {'row': run.name, 'seen': f'{part}, {name}', 'bits': size}
                linear(lambda k: run.latents[k].features(style).numpy(), value, keep, target=column, **seen)
                if 'latent' in networks:
                    network(lambda k: run.latents[k].volume(style), keep, **seen)
            if name in run.new_modalities:
                seen = {'row': 'the scans', 'seen': f'volume, {name}', 'bits': ''}
                linear(lambda k: block_means(load(scans[k])), value, keep, target=column, **seen)
                if 'volume' in networks:
                    network(lambda k: load(scans[k]), keep, **seen)
        for a, b in combinations(run.modalities, 2) if hasattr(run.model, 'translate') else ():
            keep = np.flatnonzero(np.isin(modality, (a, b)))
            linear(lambda k: run.latents[k].mean.numpy(), modality, keep, row=run.name, seen='z_anat',
                   bits='', target=f'modality: {a} or {b}')
    return rows

def embed_latents(runs, count, seed):
    """For figures.embedding: t-SNE of each run's latents at `count` positions of the scans of 20 sessions."""
    panels = {}
    for run in runs:
        some = [z for z in run.latents if key_of(z.row) in run.drawn_keys]
        z, brain = torch.cat([z.mean.flatten(1).T for z in some]), torch.cat([z.brain for z in some])
        chosen = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:count]
        points = tsne(z[chosen].numpy(), seed=seed)
        if points is None: break
        panels[run.name] = points, brain[chosen].numpy()
    return panels
