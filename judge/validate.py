"""What train_vae.py asks of an autoencoder: PSNR of held-out volumes, use of the codes, probes at the end."""
from itertools import combinations

import torch
import torch.distributed as dist

from common import autocast, print0
from judge.metrics import attempt, channels_in_use, moments
from judge.probe import linear_probe
from judge.runs import chosen
from losses import psnr
from quantize import code_use, collapse_warning, count_codes

@torch.no_grad()
def validate(model, sessions, count, device, dtype):
    """A model in evaluation mode on `count` sessions (-1: all), see runs.chosen; the processes share them.

    returns two things. A dict: 'val/psnr_db/<modality>' of whole volumes, 'val/psnr_db', their mean,
    'val/psnr_brain_db', inside the brain alone, 'val/n_sessions'; with a codebook 'val/<name>' of all that
    quantize.code_use says, else 'val/channels_in_use', see metrics. And for a picture the first scan of this
    process: (modality, volume, reconstruction), each array (D,H,W).
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    used = chosen(sessions.rows, count)
    c = model.config
    books = c.num_codebooks if hasattr(model, 'quantizer') else 0
    sums = torch.zeros(len(sessions.modalities), 3, dtype=torch.float64)  # PSNR, the brain's, volumes
    counts = torch.zeros(2, books, c.num_codes, dtype=torch.int64)
    channels = 0 if books else c.latent_dim
    latent = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)  # moments
    noise = torch.zeros(channels, dtype=torch.float64)
    shown = None
    for i in used[rank::world]:
        for m in sessions.present(i):
            x = torch.tensor(sessions.volume(i, m), device=device)[None, None]
            with autocast(device, dtype):
                out = model.analyse(x, m)
            x = x.clamp(0, 1)
            x_hat = out['x_hat'].clamp(0, 1)
            scores = psnr(x_hat, x).item(), psnr(x_hat, x, mask=x > 0).item(), 1
            sums[m] += torch.tensor(scores, dtype=torch.float64)
            shown = shown or (sessions.modalities[m], *(v[0, 0].float().cpu().numpy() for v in (x, x_hat)))
            if books:
                counts += count_codes(out['tokens'], x, c.num_codes, books)
            else:
                latent += moments(out['mean']).cpu()
                noise += out['logvar'].double().exp().mean((0, 2, 3, 4)).cpu()
    if world > 1:
        for part in (sums, counts, latent, noise):
            dist.all_reduce(part)
    seen = sums[:, 2] > 0
    means = sums[seen] / sums[seen, 2:]  # (modalities seen, 3)
    names = [name for name, there in zip(sessions.modalities, seen) if there]
    record = {f'val/psnr_db/{name}': value for name, value in zip(names, means[:, 0].tolist())}
    record |= {'val/psnr_db': means[:, 0].mean().item(), 'val/psnr_brain_db': means[:, 1].mean().item(),
               'val/n_sessions': len(used)}
    if books:
        use = code_use(counts)
        record |= {f'val/{name}': value for name, value in use.items()}
        warning = collapse_warning(use, c.num_codes, counts.sum().item() // books)
        if warning:
            print0(warning)
    else:
        record['val/channels_in_use'] = channels_in_use(latent, noise / sums[:, 2].sum())
    return record, shown

def brief(record):
    """What validate() found, in a line: PSNR, and codes in use for brain, or channels."""
    shown = [key for key in record if 'psnr' in key or 'brain' in key]
    line = ' | '.join(f'{key} {record[key]:.2f}' for key in shown)
    if 'val/channels_in_use' in record:
        line += f" | val/channels_in_use {record['val/channels_in_use']}"
    return line

@torch.no_grad()
def modality_probes(model, sessions, count, device):
    """How well a fresh linear probe tells two modalities apart by NeuroQuant's z_anat of held-out scans.

    count: as of validate, but 200 sessions at most. Subjects are on one side of a fold.
    returns {'T1w or T2w': what linear_probe says, or 'reason' why it cannot} for every two modalities there
    """
    n = 200 if count < 0 else min(count, 200)
    features = {m: [] for m in range(len(sessions.modalities))}
    subjects = {m: [] for m in features}
    for i in chosen(sessions.rows, n):
        for m in sessions.present(i):
            x = torch.tensor(sessions.volume(i, m), device=device)[None, None]
            features[m].append(model.encoding(x)['mean'].float().flatten().cpu())
            subjects[m].append(sessions.rows[i]['subject'])
    results = {}
    for a, b in combinations([m for m in features if features[m]], 2):
        z = torch.stack(features[a] + features[b]).numpy()
        groups = subjects[a] + subjects[b]
        is_b = [False] * len(subjects[a]) + [True] * len(subjects[b])
        folds = max(2, min(5, len(set(groups))))
        name = f'{sessions.modalities[a]} or {sessions.modalities[b]}'
        results[name] = attempt(linear_probe, z, is_b, groups, folds)
    return results

def say_probes(model, sessions, count, device):
    """Print a line for every two modalities, see modality_probes."""
    if len(sessions.modalities) < 2: return
    for name, result in modality_probes(model, sessions, count, device).items():
        print(probe_line(name, result), flush=True)

def probe_line(name, result):
    """One of modality_probes' results as text."""
    if 'reason' in result: return f"{name}: no probe of z_anat: {result['reason']}"
    return (f"{name}: a fresh linear probe tells them apart by z_anat in {result['accuracy']:.3f} of "
            f"{result['n']} validation scans of {result['n_groups']} subjects; 0.5 is chance")
