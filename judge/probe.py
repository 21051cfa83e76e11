"""What does a latent know of a subject? Two classes told apart from frozen features, cross-validated by subject.

A linear probe, and SEResNet-152 (the classifier of NeuroQuant 4.1) trained on latents or on the scans themselves.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import optimize, special, stats
from tqdm import tqdm

from common import autocast
from data import random

# ---------------------------------------------------------------- cross-validation

def auc(score, positive):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    rank = stats.rankdata(score)
    n = positive.sum()
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))

def cross_validate(fit, y, groups, folds=5, seed=0):
    """Judge a classifier of rows 0..N-1, no group on both sides of a fold.

    fit(train, test, positive): rows to learn from, rows to score, (N,) bool -> scores of test, above 0 for positive. y (N,) two
    values, the later one in order is positive; groups (N,), such as subjects.
    returns dict: accuracy, balanced_accuracy, auc, per row; subject_accuracy, by the mean score of a group (None where groups hold
    both classes); n, n_groups, ci95 of accuracy by bootstrap of groups. ValueError with one class, or fewer groups of a class than
    folds.
    """
    y, groups = np.asarray(y), np.asarray(groups)
    classes = np.unique(y)
    if len(classes) != 2:
        raise ValueError(f'a probe needs two classes, got {len(classes)} in {len(y)} scans')
    positive = y == classes[1]
    names = np.unique(groups)
    share = {g: positive[groups == g].mean() for g in names}
    # every group of one class: then every fold gets its part of both
    pure = set(share.values()) <= {0.0, 1.0}
    rng, fold_of = random(seed, 8), {}
    for members in (
        [[g for g in names if share[g] == value] for value in (0.0, 1.0)] if pure else [list(names)]
    ):
        if len(members) < folds:
            of = f' of class {classes[int(share[members[0]])]}' if pure and members else ''
            raise ValueError(f'{len(members)} subjects{of}: at least {folds} are needed')
        fold_of |= {members[k]: place % folds for place, k in enumerate(rng.permutation(len(members)))}
    fold, score = np.array([fold_of[g] for g in groups]), np.zeros(len(y))
    for k in range(folds):
        score[fold == k] = fit(np.flatnonzero(fold != k), np.flatnonzero(fold == k), positive)
    right = (score > 0) == positive
    by_group = np.array([right[groups == g].mean() for g in names])
    votes = [(score[groups == g].mean() > 0) == share[g] for g in names] if pure else None
    boot = by_group[random(seed, 9).integers(len(names), size=(2000, len(names)))].mean(1)
    return {
        'accuracy': float(right.mean()),
        'balanced_accuracy': float((right[positive].mean() + right[~positive].mean()) / 2),
        'auc': auc(score, positive),
        'subject_accuracy': float(np.mean(votes)) if pure else None,
        'n': len(y),
        'n_groups': len(names),
        'ci95': [float(q) for q in np.quantile(boot, [0.025, 0.975])],
    }

# ---------------------------------------------------------------- linear

def logistic(x, y, ridge):
    """Weights and bias that minimise mean log loss + ridge |w|^2 / 2 for y in {0, 1}, by L-BFGS."""
    def loss(p):
        margin = x @ p[:-1] + p[-1]
        value = np.logaddexp(0, margin).mean() - (y * margin).mean() + ridge * (p[:-1] ** 2).sum() / 2
        residual = special.expit(margin) - y
        return value, np.append(x.T @ residual / len(y) + ridge * p[:-1], residual.mean())
    return optimize.minimize(
        loss, np.zeros(x.shape[1] + 1), jac=True, method='L-BFGS-B', options={'maxiter': 500}
    ).x

def linear_probe(z, y, groups, folds=5, ridge=0.1, seed=0):
    """Can a linear function of frozen features tell two classes apart? z (N, features), or (N, C, d, h, w), flattened.

    Features are standardised and the ridge-logistic regression fitted on the training folds alone; with more features than rows, in
    the span of the rows, which is the same. y, groups, returns, errors: see cross_validate.
    """
    z = np.asarray(z, np.float64)
    z = z.reshape(len(z), math.prod(z.shape[1:]))  # of no rows too, which cross_validate refuses
    def fit(train, test, positive):
        mean, sd = z[train].mean(0), z[train].std(0)
        x, new = ((z[rows] - mean) / np.where(sd > 1e-12, sd, 1) for rows in (train, test))
        if x.shape[1] > len(x):
            _, _, axes = np.linalg.svd(x, full_matrices=False)
            x, new = x @ axes.T, new @ axes.T
        weights = logistic(x, positive[train].astype(float), ridge)
        return new @ weights[:-1] + weights[-1]
    return cross_validate(fit, y, groups, folds, seed)

# ---------------------------------------------------------------- SEResNet-152

class SEBottleneck(nn.Module):
    """1x1x1 (strided), 3x3x3, 1x1x1 to 4 c channels, each weighed by squeeze and excitation (Hu et al. 2018), plus a shortcut."""
    def __init__(self, c_in, c, stride):
        super().__init__()
        conv = lambda a, b, size, step=1: nn.Sequential(
            nn.Conv3d(a, b, size, step, size // 2, bias=False), nn.BatchNorm3d(b)
        )
        self.conv1, self.conv2, self.conv3 = conv(c_in, c, 1, stride), conv(c, c, 3), conv(c, 4 * c, 1)
        self.excite = nn.Sequential(
            nn.Linear(4 * c, c // 4), nn.ReLU(), nn.Linear(c // 4, 4 * c), nn.Sigmoid()
        )
        self.shortcut = conv(c_in, 4 * c, 1, stride) if stride > 1 or c_in != 4 * c else nn.Identity()

    def forward(self, x):
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        h = h * self.excite(h.mean((2, 3, 4)))[:, :, None, None, None]
        return F.relu(h + self.shortcut(x))

class SEResNet(nn.Module):
    """SEResNet-152 in 3D, as MONAI's: x (B, in_channels, D, H, W) -> (B, outputs).

    small: a stem without strides, for latents of 9x12x9, which five halvings would reduce to a point.
    """
    def __init__(self, in_channels=1, outputs=1, blocks=(3, 8, 36, 3), small=False, dropout=0.0):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, 64, 7, 1 if small else 2, 3, bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(),
            nn.Identity() if small else nn.MaxPool3d(3, 2, ceil_mode=True),
        )
        c_in, layers = 64, []
        for level, (n, c) in enumerate(zip(blocks, (64, 128, 256, 512))):
            layers += [
                SEBottleneck(c_in if k == 0 else 4 * c, c, 2 if k == 0 and level else 1) for k in range(n)
            ]
            c_in = 4 * c
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.last = nn.Linear(c_in, outputs)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x):
        return self.last(self.dropout(self.layers(self.stem(x)).mean((2, 3, 4))))

def network_probe(
    load,
    y,
    groups,
    device='cpu',
    epochs=30,
    batch_size=8,
    lr=1e-4,
    folds=5,
    seed=0,
    dtype='float32',
    blocks=(3, 8, 36, 3),
):
    """The same question put to SEResNet-152, trained anew on the other folds for every fold.

    load: row -> tensor (C, d, h, w), all of one size; read anew in every epoch, so that scans need not fit in memory. Channels are
    standardised by the training rows. AdamW with a cosine to 0, dropout 0.2, the stem without strides for grids below 32.
    y, groups, returns, errors: see cross_validate.
    """
    y = np.asarray(y)
    def fit(train, test, positive):
        torch.manual_seed(seed)
        sums = torch.stack([
            torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3))])
            for x in (load(i).double() for i in train)
        ]).mean(0)
        mean, sd = sums[0].float(), (sums[1] - sums[0] ** 2).clamp(min=1e-12).sqrt().float()
        batch = lambda rows: torch.stack(
            [(load(i).float() - mean[:, None, None, None]) / sd[:, None, None, None] for i in rows]
        ).to(device)
        first = load(train[0])
        net = SEResNet(len(first), 1, blocks, min(first.shape[1:]) < 32, 0.2).to(
            device, memory_format=torch.channels_last_3d
        )
        size = min(batch_size, len(train))
        per_epoch = len(train) // size  # an odd rest is left out: batch norm needs company
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
        for epoch in tqdm(range(epochs), desc='SEResNet-152', leave=False):
            order = random(seed, 10, epoch).permutation(train)
            for k in range(per_epoch):
                rows = order[k * size:(k + 1) * size]
                with autocast(device, dtype):
                    logits = net(batch(rows))[:, 0]
                loss = F.binary_cross_entropy_with_logits(
                    logits.float(), torch.tensor(positive[rows], dtype=torch.float32, device=device)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        net.eval()
        with torch.no_grad(), autocast(device, dtype):
            return np.concatenate([
                net(batch(rows))[:, 0].float().cpu().numpy()
                for rows in np.split(test, range(size, len(test), size))
            ])
    return cross_validate(fit, y, groups, folds, seed)
