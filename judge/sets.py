"""What is measured on sets of volumes: Frechet distances of slice features, and how alike the volumes are.

Volumes are (1,1,D,H,W) in [0,1]. runs: a list of runs.Run.
"""
import glob
import os
from itertools import islice

import numpy as np
import torch

from data import random
from judge.metrics import attempt, covariance, frechet_parts, mean_of, moments
from judge.runs import chosen
from losses import ms_ssim
from pretrained import RandomFeatures, load_radimagenet, radimagenet_input
from scans import nifti

PLANES = ('sagittal', 'coronal', 'axial')  # across axes 0, 1, 2

# ---------------------------------------------------------------- slice features

def load_extractor(features, as_released, device):
    """The features' name for the tables, and a function of slices (n,1,h,w) in [0,1] -> (n,F).

    features: 'random', or the path of RadImageNet's weights. as_released: see load_radimagenet.
    """
    if features == 'random': return 'RANDOM features (no FID)', RandomFeatures().to(device)
    network = load_radimagenet(features, released=as_released).to(device)
    name = 'RadImageNet as released by DeCo-VAE' if as_released else 'RadImageNet'
    return name, lambda slices: network(radimagenet_input(slices))

@torch.no_grad()
def slice_features(volume, extractor, rule='all', batch=64):
    """Features of a volume's slices: {plane: list of (n,F), of at most `batch` slices each}.

    rule: 'all' slices, empty ones too, or the 'central' 40 % of each plane.
    """
    if rule not in ('all', 'central'): raise ValueError(f"slices '{rule}': all or central")
    features = {}
    for axis, plane in enumerate(PLANES):
        slices = volume.clamp(0, 1).movedim(2 + axis, 1).flatten(0, 1)
        if rule == 'central':
            slices = slices[round(0.3 * len(slices)):round(0.7 * len(slices))]
        features[plane] = [extractor(part) for part in slices.split(batch)]
    return features

def add_features(total, features):
    """Add slice_features of a volume to total {plane: moments}: any number of slices fits in memory."""
    for plane, parts in features.items():
        for part in parts:
            total[plane] = total.get(plane, 0.0) + moments(part).cpu()

def add_slices(run, scan, x_hat, extractor, rule):
    """Add the features of a scan and of its reconstruction to the sets of frechet_rows."""
    if scan.features is None:
        scan.features = slice_features(scan.x, extractor, rule)
    add_features(run.features['real', scan.modality], scan.features)
    add_features(run.features['rebuilt', scan.modality], slice_features(x_hat, extractor, rule))
    if scan.modality in run.new_modalities:
        half = run.subjects.index(scan.row['subject']) % 2
        add_features(run.features[('even', 'odd')[half], scan.modality], scan.features)

def feature_moments(volumes, extractor, rule='all', batch=64):
    """{plane: moments (F+1,F+1)} of the slice features of an iterable of volumes."""
    total = {}
    for volume in volumes:
        add_features(total, slice_features(volume, extractor, rule, batch))
    return total

def slice_frechet(a, b):
    """Frechet distance of two sets, each {plane: moments}: per plane, their mean, its two parts, and slices.

    ValueError if a plane has no more slices than features: its covariance would be singular and the distance
    biased beyond use.
    """
    if not a or not b: raise ValueError('no volumes on one side')
    parts = {}
    for plane in PLANES:
        statistics = []
        for m in (a[plane], b[plane]):
            if m[-1, -1] <= len(m):
                raise ValueError(f'{int(m[-1, -1])} {plane} slices for {len(m) - 1} features: '
                                 'more slices than features are needed')
            statistics += [mean_of(m), covariance(m)]
        parts[plane] = frechet_parts(*statistics)
    distances = {plane: sum(both) for plane, both in parts.items()}
    return distances | {
        'mean': sum(distances.values()) / 3,
        'mean_part': sum(means for means, _ in parts.values()) / 3,
        'covariance_part': sum(covariances for _, covariances in parts.values()) / 3,
        'slices': {plane: (int(a[plane][-1, -1]), int(b[plane][-1, -1])) for plane in PLANES}}

def frechet_rows(runs, extractor, rule, device, reason=''):
    """Rows of the floor, and of each run's rFID and gFID, per modality; with a reason where one fails.

    run.features: {(set, modality): {plane: moments}} of the sets 'real', 'rebuilt', the reconstructions, and
    'even' and 'odd', every other subject's scans, whose distance is the floor. reason: of no extractor.
    """
    if reason: return [{'row': 'rFID, gFID', 'modality': '', 'reason': reason}]
    rows = []
    for run in runs:
        for modality in run.modalities:
            real, rebuilt, even, odd = (run.features[s, modality] for s in ('real', 'rebuilt', 'even', 'odd'))
            if modality in run.new_modalities:
                rows.append(attempt(slice_frechet, even, odd, row='floor: real against real',
                                    modality=modality))
            rows.append(attempt(slice_frechet, real, rebuilt, row=f'{run.name} rFID', modality=modality))
            if run.generated:
                drawn = read_generated(run.generated, modality, device)
                rows.append(attempt(lambda: slice_frechet(real, feature_moments(drawn, extractor, rule)),
                                    row=f'{run.name} gFID', modality=modality))
    return rows

# ---------------------------------------------------------------- generated sets

def generated_files(folder, modality=''):
    """Paths of the volumes of sample.py in a folder, in order: those that name the modality, '' for none."""
    numbers = {}
    for path in glob.glob(os.path.join(glob.escape(folder), 'sample_*.nii.gz')):
        name = os.path.basename(path).removesuffix('.nii.gz').removeprefix('sample_')
        number, _, named = name.partition('_')
        if number.isdigit() and named == modality:
            numbers[int(number)] = path
    return [numbers[k] for k in sorted(numbers)]

def read_generated(folder, modality, device='cpu'):
    """Yield the volumes of sample.py in a folder; those of one modality where the files name one."""
    paths = generated_files(folder, modality) or generated_files(folder)
    if not paths: raise ValueError(f'{folder}: no sample_*.nii.gz of {modality}')
    for path in paths:
        yield torch.from_numpy(nifti.read(path)[0])[None, None].to(device)

def read_real(run, m, device):
    """Yield the first scan of modality index m of each subject, of 100 subjects at most."""
    first_scans = {}
    for i in reversed(run.used):
        if m in run.sessions.present(i):
            first_scans[run.sessions.rows[i]['subject']] = i
    scans = list(first_scans.values())
    for k in chosen([run.sessions.rows[i] for i in scans], 100):
        yield torch.tensor(run.sessions.volume(scans[k], m), device=device)[None, None]

def ms_ssim_of_pairs(volumes, seed, pairs=200):
    """Mean and sd of MS-SSIM over random pairs of the first 100 volumes, or all pairs; high is uniform.

    One pair has no sd.
    """
    volumes = [volume.clamp(0, 1) for volume in islice(volumes, 100)]
    every = [(a, b) for a in range(len(volumes)) for b in range(a)]
    if not every: raise ValueError('one volume makes no pair')
    drawn = [every[k] for k in random(seed, 11).permutation(len(every))[:pairs]]
    values = [ms_ssim(volumes[a], volumes[b]).item() for a, b in drawn]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {'ms_ssim': float(np.mean(values)), 'sd': sd, 'pairs': len(values), 'volumes': len(volumes)}

def diversity_rows(runs, seed, device):
    """MS-SSIM between the volumes of each generated set, and between the real ones of its modality."""
    rows, with_real = [], set()
    for run in runs:
        if not run.generated: continue
        for m, modality in enumerate(run.modalities):
            sets = {run.name: read_generated(run.generated, modality, device)}
            if modality not in with_real:
                with_real.add(modality)
                sets = {'real': read_real(run, m, device), **sets}
            rows += [attempt(ms_ssim_of_pairs, volumes, seed, row=row, modality=modality)
                     for row, volumes in sets.items()]
    return rows

def sample_views(runs, shown=4):
    """Blocks for figures.views: the first volumes of each generated set, DeCo fig. 5.

    Sets of one seed and one flow show the same latents.
    """
    blocks = []
    for run in runs:
        if not run.generated: continue
        named = [modality for modality in run.modalities if generated_files(run.generated, modality)]
        for modality in named or run.modalities[:1]:
            try:
                volumes = list(islice(read_generated(run.generated, modality), shown))
            except ValueError:
                continue  # its rows in the tables say why
            heading = f'{run.name} {modality}' if named else run.name
            blocks.append([(f'{heading} {k}', v[0, 0].numpy()) for k, v in enumerate(volumes)])
    return blocks
