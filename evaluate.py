"""Judge trained autoencoders on held-out sessions: tables (markdown and JSON) and a picture.

    python evaluate.py --ckpt=out/demo/best.pt
    python evaluate.py --ckpt=out/a/best.pt,out/b/best.pt --data_dir=data/mine --split=test
    python evaluate.py --table=deco4 --runs=out          # a table of the papers beside what earlier calls measured

Writes table.md, table.json and reconstructions.png beside the first checkpoint (--out_dir elsewhere). Importing it runs nothing.
"""
import glob
import json
import math
import os
import sys
from itertools import combinations, islice

import numpy as np
import torch
from scipy import fft, ndimage
from tqdm import tqdm

from judge import figures
from scans import nifti
from common import autocast, configure, load_checkpoint, make_out_dir, start_processes, write_text
from data import Sessions, random
from losses import ms_ssim, psnr  # offered here too, as are some of metrics: a judge's names in one place
from judge.metrics import (
    channel_cosine, dice, effective_rank, explained_variance, feature_moments, frechet_distance,
    latent_geometry, moments, region_volumes_mm3, scores, slice_frechet, summarise, tsne
)
from model import from_checkpoint
from pretrained import LPIPS, RandomFeatures, load_radimagenet, radimagenet_input
from judge.probe import linear_probe, network_probe
from judge.report import DEFINITIONS, SHOWN, report
from judge.segment import MERGED, make_segmenter
from tables import paper_table

# ---------------------------------------------------------------- settings
ckpt = 'out/neuroquant/best.pt'  # one, or several separated by commas
data_dir = ''               # '' for the one the first checkpoint was trained on
split = 'test'
max_sessions = -1           # -1 for all of the split
reference_sessions = 50     # sessions the reference rows are computed on; 0 for no such rows
# 'squeeze', 'alex' or 'vgg' for LPIPS columns, with the two files below; or 'random', a fixed random trunk
lpips = ''
lpips_trunk, lpips_lin = '', ''
# Dice and region volumes: path of synthseg_2.0.h5, or a command with {in} and {out}
segmenter = ''
# column of subjects.tsv with given label maps as ground truth, such as dseg; '' for the segmenter's of the
# input
labels = ''
# neuroquant1, neuroquant2, deco1 ... deco5: only print that table of the papers beside what is found in runs
table = ''
runs = 'out'
latent_figures = False      # also latent.png and tsne.png
tsne_points = 1000          # positions in it
# column to tell apart from the latents, such as sex; of NeuroQuant also the modality from z_anat
probe = ''
# also by SEResNet-152, trained on 'latent' or 'volume', the scans themselves, or both: hours without a GPU
probe_networks = ()
probe_epochs = 30
# Frechet distances: path of RadImageNet-ResNet50_notop.pth, or 'random', a fixed random network; '' for none
features = ''
features_as_released = False  # read that file as DeCo-VAE's code does, biases dropped and strides moved
fid_slices = 'all'          # or 'central': the middle 40 % of each plane
# folders of sample.py --mode=generate, in the order of ckpt, separated by commas: gFID, diversity,
# samples.png
generated = ''
out_dir = ''                # '' for the first checkpoint's folder
device = ''
dtype = 'float32'           # bfloat16 for autocast
seed = 0                    # of the bootstrap

lpips_net = None            # the network of the lpips setting, once loaded

def attempt(make, **row):
    """A row of results: what it is of, and what make() finds, or the reason why that cannot be found."""
    try:
        return row | make()
    except ValueError as e:
        return row | {'reason': str(e)}

def batch_of(volume):
    """A volume (D,H,W) as (1,1,D,H,W) on the device."""
    return torch.tensor(volume, device=device)[None, None]

def load(test, i, m):
    """Scan of session i, modality index m, as (1,1,D,H,W) on the device."""
    return batch_of(test.volume(i, m))

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
    return sum(
        train.volume(i, m).astype(np.float64) for i in tqdm(scans, desc='training mean', leave=False)
    ) / len(scans)

def nearest_training_scan(train, m, targets):
    """For each target (D,H,W), the training volume of modality index m at the smallest mean squared error.

    Searched among block means when the volume is larger than about 48 voxels a side, so that the training set fits in memory.
    """
    block = max(1, max(train.shape) // 48)
    small = lambda v: torch.nn.functional.avg_pool3d(torch.tensor(np.asarray(v, np.float32))[None], block)[
        0
    ].flatten()
    scans = [i for i, k in train.scans if k == m]
    library = torch.stack([small(train.volume(i, m)) for i in tqdm(scans, desc='nearest scan', leave=False)])
    return [train.volume(scans[int((library - small(t)).square().mean(1).argmin())], m) for t in targets]

def reference_rows(test, train, n, rates):
    """Scores of what costs nothing to learn, per row and modality: lists of (subject, scores). rates: bits for the codec's rows."""
    rows = {}
    for m, name in enumerate(test.modalities):
        sessions = [i for i in range(n) if m in test.present(i)]
        volumes = [test.volume(i, m) for i in sessions]
        mean = training_mean(train, m).astype(np.float32)
        guesses = {
            'population mean of the training set': [mean] * len(volumes),
            'nearest training scan': nearest_training_scan(train, m, volumes),
            **{
                f'DCT codec at {bits:.0f} bits': [
                    dct_codec(v, bits) for v in tqdm(volumes, desc='DCT codec', leave=False)
                ]
                for bits in rates
            },
            'blur, sigma 1 voxel (codes nothing)': [ndimage.gaussian_filter(v, 1.0) for v in volumes],
        }
        for row, predictions in guesses.items():
            rows.setdefault(row, {})[name] = [
                (test.rows[i]['subject'], scores(batch_of(p), batch_of(v), lpips_net))
                for i, p, v in zip(sessions, predictions, volumes)
            ]
    return rows

# ---------------------------------------------------------------- one model

@torch.no_grad()
def judge(model, test, n):
    """Scores of reconstructions, of cross-modal ones, code counts and latent geometry."""
    fidelity, cross = {name: [] for name in test.modalities}, {}
    books = getattr(model.config, 'num_codebooks', 1) if hasattr(model, 'quantizer') else 0
    counts = np.zeros((len(test.modalities), books, getattr(model.config, 'num_codes', 0)), np.int64)
    total, sigmas = 0.0, []
    for i in tqdm(range(n), desc='sessions', leave=False):
        subject, x = test.rows[i]['subject'], {}
        with autocast(device, dtype):
            for m in test.present(i):
                x[m] = load(test, i, m)
                total = total + moments(model.latent(x[m], m))
                logvar = model.posterior(x[m])[1]
                if logvar is not None:
                    sigmas.append(torch.exp(0.5 * logvar.float()).mean().item())
                for k, book in enumerate(model.tokens(x[m]).reshape(books, -1).cpu() if books else ()):
                    counts[m, k] += np.bincount(book, minlength=counts.shape[2])
                fidelity[test.modalities[m]].append(
                    (subject, scores(model.reconstruct(x[m], m), x[m], lpips_net))
                )
            if hasattr(model, 'translate') and model.config.film:
                cross_modal(model, test.modalities, subject, x, cross)
    return fidelity, cross, counts, latent_geometry(total.cpu(), float(np.mean(sigmas)) if sigmas else None)

def cross_modal(model, names, subject, x, cross):
    """Add the scores of every ordered pair of a session's scans x {modality: (1,1,D,H,W)} to cross."""
    films = {m: model.film(model.encode(scan)[1], m) for m, scan in x.items()}
    codes = {m: model.quantizer.lookup(model.tokens(scan)) for m, scan in x.items()}
    for a in x:
        for b in x:
            if a == b: continue
            for style, film in (('own', films[b]), ('mean', model.mean_film(b, codes[a]))):
                found = cross.setdefault((names[a], names[b], style), [])
                found.append((subject, scores(model.decode(codes[a], film), x[b], lpips_net)))

# ---------------------------------------------------------------- Frechet distances

def load_extractor():
    """(name for the table, function of slices) of the features setting."""
    if features == 'random': return 'RANDOM features (no FID)', RandomFeatures().to(device)
    network = load_radimagenet(features, released=features_as_released).to(device)
    return (
        'RadImageNet as released by DeCo-VAE' if features_as_released else 'RadImageNet'
    ), lambda slices: network(radimagenet_input(slices))

def read_generated(folder, name):
    """Volumes (1,1,D,H,W) of sample_*[_MODALITY].nii.gz in a folder; of one modality where the files name one."""
    paths = sorted(glob.glob(os.path.join(folder, f'sample_*_{name}.nii.gz'))) or sorted(
        glob.glob(os.path.join(folder, 'sample_???.nii.gz'))
    )
    if not paths: raise ValueError(f'{folder}: no sample_*.nii.gz of {name}')
    return (torch.from_numpy(nifti.read(path)[0])[None, None].to(device) for path in paths)

@torch.no_grad()
def frechet_rows(models, n):
    """rFID and gFID of each (name, model, modalities, folder of generated volumes or '') and the floor, per modality: list of dicts.

    Real: the first n sessions of the split. Floor: their even against their odd subjects. A row that cannot be computed says why.
    """
    try:
        extractor_name, extractor = load_extractor()
    except (SystemExit, ValueError) as e:
        return 'not computed', [{'row': 'rFID, gFID', 'modality': '', 'reason': str(e)}]
    rows, real = [], {}
    def volumes(test, m, keep=lambda i: True):
        return (load(test, i, m) for i in range(n) if m in test.present(i) and keep(i))
    def add(row, modality, make):
        rows.append(attempt(make, row=row, modality=modality))
    def features_of(volumes):
        return feature_moments(volumes, extractor, fid_slices)
    for name, model, known, folder in models:
        test = Sessions(data_dir, known, split)
        subjects = sorted({row['subject'] for row in test.rows[:n]})
        for m, modality in enumerate(known):
            if modality not in real:
                real[modality] = features_of(tqdm(volumes(test, m), desc=f'features {modality}', leave=False))
                halves = [
                    volumes(test, m, lambda i, h=h: subjects.index(test.rows[i]['subject']) % 2 == h)
                    for h in (0, 1)
                ]
                add('floor: real against real', modality, lambda: slice_frechet(*map(features_of, halves)))
            rebuilt = (
                model.reconstruct(x, m).float()
                for x in tqdm(volumes(test, m), desc=f'rFID {modality}', leave=False)
            )
            add(f'{name} rFID', modality, lambda: slice_frechet(real[modality], features_of(rebuilt)))
            if folder:
                add(
                    f'{name} gFID',
                    modality,
                    lambda: slice_frechet(real[modality], features_of(read_generated(folder, modality))),
                )
    return extractor_name, rows

# ---------------------------------------------------------------- generated sets

def ms_ssim_of_pairs(volumes, pairs=200):
    """Mean and sd of MS-SSIM over random pairs of the first 100 volumes (1,1,D,H,W), all pairs if there are fewer; high is uniform."""
    volumes = list(islice(volumes, 100))
    every = [(a, b) for a in range(len(volumes)) for b in range(a)]
    if not every: raise ValueError('one volume makes no pair')
    chosen = random(seed, 11).permutation(len(every))[:pairs]
    found = [
        ms_ssim(volumes[a].clamp(0, 1), volumes[b].clamp(0, 1)).item() for a, b in (every[k] for k in chosen)
    ]
    return {
        'ms_ssim': float(np.mean(found)),
        'sd': float(np.std(found)),
        'pairs': len(found),
        'volumes': len(volumes),
    }

def diversity_rows(models, n):
    """MS-SSIM between the real volumes of a modality and between those of each generated set: list of dicts."""
    rows, seen = [], set()
    for name, _, known, folder in models:
        if not folder: continue
        test = Sessions(data_dir, known, split)
        for m, modality in enumerate(known):
            # one per subject
            first_scans = {
                test.rows[i]['subject']: i for i in reversed(range(n)) if m in test.present(i)
            }.values()
            sets = {name: lambda: read_generated(folder, modality)}
            if modality not in seen:
                sets = {'real': lambda: (load(test, i, m) for i in first_scans)} | sets
            seen.add(modality)
            rows += [
                attempt(lambda: ms_ssim_of_pairs(volumes()), row=row, modality=modality)
                for row, volumes in sets.items()
            ]
    return rows

def samples(models, shown=4):
    """Blocks for figures.views: the first volumes of each generated set, DeCo fig. 5. Sets of one seed and one flow show the same latents."""
    blocks = []
    for name, _, known, folder in models:
        named = [
            modality for modality in known if glob.glob(os.path.join(folder, f'sample_*_{modality}.nii.gz'))
        ]
        for modality in named or known[:1] if folder else ():
            try:
                found = [
                    volume[0, 0].cpu().numpy()
                    for volume, _ in zip(read_generated(folder, modality), range(shown))
                ]
            except ValueError:
                continue  # its rows in the tables say why
            blocks.append([
                (f"{name}{' ' * bool(named)}{modality * bool(named)} {k}", volume)
                for k, volume in enumerate(found)
            ])
    return blocks

# ---------------------------------------------------------------- anatomy

def anatomy_rows(models, n):
    """Dice and region volumes of reconstructions against the inputs, per model and modality: list of dicts, with a reason where it fails."""
    rows, truth = [], {}
    try:
        find = make_segmenter(segmenter, device)
    except (SystemExit, ValueError) as e:
        return [{'row': 'Dice', 'modality': '', 'reason': str(e)}]
    for name, model, known, _ in models:
        test = Sessions(data_dir, known, split)
        for m, modality in enumerate(known):
            rows.append(attempt(lambda: anatomy(find, model, test, m, n, truth), row=name, modality=modality))
    return rows

def anatomy(find, model, test, m, n, truth):
    """Mean Dice and, per scan, Dice and volumes of each structure, of modality index m.

    find: a segmenter. truth: label maps by (session, modality), filled here, so that every model is compared with the same.
    """
    found, modality = [], test.modalities[m]
    for i in tqdm([i for i in range(n) if m in test.present(i)], desc=f'segmenting {modality}', leave=False):
        x = test.volume(i, m)
        if (i, modality) not in truth:
            truth[i, modality] = given_labels(test.rows[i]) if labels else find(x, test.voxel_mm)
        with torch.no_grad():
            x_hat = model.reconstruct(load(test, i, m), m).float().clamp(0, 1)[0, 0].cpu().numpy()
        ours, real = find(np.where(x > 0, x_hat, 0), test.voxel_mm), truth[i, modality]
        present = [label for label in np.unique(real) if label in FOREGROUND]
        found.append({
            'subject': test.rows[i]['subject'],
            'dice': {NAME_OF[k]: v for k, v in dice(ours, real, present).items()},
            'mm3': region_volumes_mm3(ours, MERGED, test.voxel_mm),
            'mm3_truth': region_volumes_mm3(real, MERGED, test.voxel_mm),
        })
    if not found: raise ValueError(f'no {modality} scan')
    per_scan = [np.nanmean(list(f['dice'].values()) or [np.nan]) for f in found]
    return {'mean_dice': summarise(per_scan, [f['subject'] for f in found], seed=seed), 'scans': found}

FOREGROUND = {label for pair in MERGED.values() for label in pair}
NAME_OF = {
    label: ('' if len(pair) == 1 else ('left ', 'right ')[pair.index(label)]) + name
    for name, pair in MERGED.items()
    for label in pair
}

def given_labels(row):
    path = os.path.join(row['folder'], row.get(labels) or '(none)')
    try:
        return np.load(path)
    except (OSError, EOFError, ValueError):
        raise ValueError(
            f'{path}: no label map; --labels={labels} must be a column of subjects.tsv with .npy files'
        )

def volume_boxes(rows, name):
    """[(label, volumes in cm3)] of one structure: ground truth per modality, then each row."""
    first = {}
    for r in rows:
        first.setdefault(r['modality'], r)
    return [
        (f'{m}\nground truth', [f['mm3_truth'][name] / 1000 for f in r['scans']]) for m, r in first.items()
    ] + [(f"{r['modality']}\n{r['row']}", [f['mm3'][name] / 1000 for f in r['scans']]) for r in rows]

# ---------------------------------------------------------------- probes

def probe_rows(models, n):
    """What the frozen latents of the first n sessions tell: list of dicts, with a reason where a probe cannot be made.

    'volume' in probe_networks: SEResNet-152 on the scans themselves, once per modality.
    """
    rows, on_volumes = [], set()
    for name, model, known, _ in models:
        test = Sessions(data_dir, known, split)
        scans = [(i, m) for i, m in test.scans if i < n]
        whole, anatomy_latent = [], []
        for i, m in tqdm(scans, desc='latents', leave=False):
            x = load(test, i, m)
            with torch.no_grad():
                whole.append(model.latent(x, m)[0].cpu())
                if hasattr(model, 'translate'):
                    anatomy_latent.append(model.encode(x)[0][0].cpu())
        value = np.array([(test.rows[i].get(probe) or '').strip() for i, _ in scans])
        subject = np.array([test.rows[i]['subject'] for i, _ in scans])
        modality = np.array([known[m] for _, m in scans])
        def add(row, how, seen, target, make):
            rows.append(attempt(make, row=row, probe=how, seen=seen, target=target))
        def linear(z, y, keep):
            return linear_probe(np.array([z[k].numpy() for k in keep]), y[keep], subject[keep], seed=seed)
        def network(load, keep):
            return network_probe(
                lambda row: load(keep[row]),
                value[keep],
                subject[keep],
                device,
                probe_epochs,
                seed=seed,
                dtype=dtype,
            )
        for m, of in enumerate(known):
            keep = np.flatnonzero((modality == of) & (value != '') & ~np.isin(value, ('n/a', 'nan')))
            add(name, 'linear', f'latent, {of}', probe, lambda: linear(whole, value, keep))
            if 'latent' in probe_networks:
                add(name, 'SEResNet-152', f'latent, {of}', probe, lambda: network(whole.__getitem__, keep))
            if 'volume' in probe_networks and of not in on_volumes:
                on_volumes.add(of)
                volume = lambda k: torch.tensor(test.volume(*scans[k]))[None]
                add('the scans', 'SEResNet-152', f'volume, {of}', probe, lambda: network(volume, keep))
        for a, b in combinations(known, 2) if anatomy_latent else ():
            keep = np.flatnonzero(np.isin(modality, (a, b)))
            add(
                name,
                'linear',
                'z_anat',
                f'modality: {a} or {b}',
                lambda: linear(anatomy_latent, modality, keep),
            )
    return rows

# ---------------------------------------------------------------- summaries

def collapse(found):
    """[(subject, scores)] -> {metric: summary over subjects}."""
    return (
        {
            metric: summarise([s[metric] for _, s in found], [subject for subject, _ in found], seed=seed)
            for metric in found[0][1]
        }
        if found
        else {}
    )

def code_use(counts):
    """Codes used at least once and perplexity of histograms (codebooks, K), means over the codebooks; tokens of all."""
    shares = [c[c > 0] / c.sum() for c in counts]
    return {
        'used': float(np.mean([len(p) for p in shares])),
        'perplexity': float(np.mean([np.exp(-(p * np.log(p)).sum()) for p in shares])),
        'tokens': int(counts.sum()),
    }

# ---------------------------------------------------------------- pictures

@torch.no_grad()
def reconstructions(models):
    """Blocks for figures.views of the first session with every modality: one model beside its errors, several beside each other."""
    names = models[0][2]
    test = Sessions(data_dir, names, split)
    i = next((i for i in range(test.n) if len(test.present(i)) == len(names)), None)
    if i is None: return []
    blocks = []
    for m, modality in enumerate(names):
        x = test.volume(i, m)
        block, batch = [(f'{modality} input', x)], load(test, i, m)
        for name, model, known, _ in models:
            if modality not in known: continue
            with autocast(device, dtype):
                x_hat = (
                    model.reconstruct(batch, known.index(modality)).float().clamp(0, 1)[0, 0].cpu().numpy()
                )
            block.append((f'{modality} {name}', x_hat))
            if len(models) == 1:
                block.append((f'{modality} absolute error', np.abs(x - x_hat)))
        blocks.append(block)
    return blocks if len(models) > 1 else [sum(blocks, [])]

@torch.no_grad()
def embed_latents(models, n):
    """{name: (t-SNE (N,2) of latent vectors at single positions, (N,) bool, inside the brain)}, of the first n sessions."""
    panels = {}
    for name, model, known, _ in models:
        test, z, brain = Sessions(data_dir, known, split), [], []
        for i, m in [(i, m) for i, m in test.scans if i < n][:20]:
            x = load(test, i, m)
            latent = model.posterior(x)[0][0].cpu()
            z.append(latent.flatten(1).T)
            brain.append(
                torch.nn.functional.interpolate(
                    (x.cpu() > 0).float(), size=latent.shape[1:], mode='area'
                ).flatten()
                > 0.5
            )
        z, brain = torch.cat(z), torch.cat(brain)
        chosen = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:tsne_points]
        panels[name] = tsne(z[chosen].to(device), seed=seed).cpu().numpy(), brain[chosen].numpy()
    return panels

def run_name(path):
    """What a checkpoint is called in the tables: its folder."""
    return os.path.basename(os.path.dirname(path)) or path

def main(settings):
    global device, out_dir, data_dir, lpips_net
    _, world, device = start_processes(device)
    if world > 1:
        raise SystemExit('evaluate.py runs in one process: start it with python, not torchrun')
    if not set(probe_networks) <= {'latent', 'volume'} or (probe_networks and not probe):
        raise SystemExit(f'--probe_networks={probe_networks}: of latent and volume, with --probe=COLUMN')
    paths = [p for p in ckpt.split(',') if p]
    checkpoints = [load_checkpoint(p) for p in paths]
    data_dir = data_dir or checkpoints[0]['config']['data_dir']
    out_dir = out_dir or os.path.dirname(paths[0]) or '.'
    make_out_dir(out_dir)
    if lpips:
        lpips_net = (LPIPS() if lpips == 'random' else LPIPS(lpips, lpips_trunk, lpips_lin)).to(device)
    modalities, rates, rows, models, folders = [], [], [], [], [f for f in generated.split(',') if f]
    for path, checkpoint in zip(paths, checkpoints):
        model = from_checkpoint(checkpoint).to(device)
        if not hasattr(model, 'reconstruct'):
            raise SystemExit(f'{path}: a flow, not an autoencoder')
        known = tuple(checkpoint['config']['modalities'])
        modalities += [m for m in known if m not in modalities]
        test = Sessions(data_dir, known, split)
        n = test.n if max_sessions < 0 else min(max_sessions, test.n)
        try:
            fidelity, cross, counts, geometry = judge(model, test, n)
        except ValueError as e:
            raise SystemExit(f'{path} on {data_dir}: {e}')
        bits, style = model.bits_per_volume(test.shape), model.style_bits()
        rates.append(bits + style)
        models.append((run_name(path), model, known, folders.pop(0) if folders else ''))
        rows.append({
            'name': run_name(path),
            'ckpt': path,
            'iter': checkpoint['iter_num'],
            'git_commit': checkpoint['git_commit'],
            'f': f'{model.factor}x',
            'latent': 'x'.join(map(str, model.latent_shape(test.shape))),
            'bits': f'{bits:.0f}' + (f' + {style}' if style else ''),
            'num_codes': getattr(model.config, 'num_codes', None),
            'dft': 'yes' if checkpoint['config'].get('freeze_encoder') else 'no',
            'fidelity': {m: collapse(found) for m, found in fidelity.items()},
            'geometry': geometry,
            'codes': {m: code_use(c) for m, c in zip([*known, 'all'], [*counts, counts.sum(0)]) if c.size},
            'cross': [
                {'source': a, 'target': b, 'style': style, 'scores': collapse(found)}
                for (a, b, style), found in cross.items()
            ],
        })
    if reference_sessions > 0:
        train, test = Sessions(data_dir, modalities, 'train'), Sessions(data_dir, modalities, split)
        for name, found in reference_rows(
            test, train, min(test.n, n, reference_sessions), sorted(set(rates))
        ).items():
            rows.append({
                'name': name,
                'f': '',
                'latent': '',
                'bits': name.split()[-2] if 'DCT' in name else '',
                'dft': '',
                'fidelity': {m: collapse(f) for m, f in found.items()},
            })
    results = {
        'data_dir': data_dir,
        'split': split,
        'modalities': modalities,
        'settings': settings,
        'definitions': DEFINITIONS,
        'rows': rows,
    }
    if features:
        results['frechet_features'], results['frechet'] = frechet_rows(models, n)
    if any(folder for *_, folder in models):
        results['diversity'] = diversity_rows(models, n)
    if segmenter:
        results['anatomy'] = anatomy_rows(models, n)
    if probe:
        results['probes'] = probe_rows(models, n)
    text, path = report(results), lambda name: os.path.join(out_dir, name)
    print(text)
    write_text(path('table.md'), text)
    write_text(path('table.json'), json.dumps(results, indent=1))
    print(f"tables: {path('table.md')}, table.json")
    if drawn := [r for r in results.get('anatomy', ()) if 'scans' in r]:
        figures.boxes(path('volumes.png'), {name: volume_boxes(drawn, name) for name in SHOWN}, 'cm3')
    if latent_figures:
        figures.geometry(path('latent.png'), {r['name']: r['geometry'] for r in rows if 'geometry' in r})
        figures.embedding(path('tsne.png'), embed_latents(models, n))
    if blocks := samples(models):
        figures.views(path('samples.png'), blocks, 'generated')
    if blocks := reconstructions(models):
        figures.views(path('reconstructions.png'), blocks, f'a session of {data_dir}, split {split}')

if __name__ == '__main__':
    settings = configure(globals(), sys.argv[1:])
    if table:
        print(paper_table(table, runs))
    else:
        main(settings)
