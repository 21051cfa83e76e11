"""How near new brains lie to the scans that a flow or a GPT was trained on."""
import os
from itertools import islice

import numpy as np

from common import markdown_table, write_text
from data import as_float, has_split, open_npy, random
from judge.report import show
from latents import Latents

COMPARED = 50  # new brains, and held-out scans, in nearest.md

def compare_with_training(folder, config, modalities, z, volumes, shown, coded=None):
    """Write folder/nearest.md: root-mean-square distance of new brains to the nearest training scan.

    Of latents z (n,C,d,h,w) and of volumes, n arrays (D,H,W) of modality `shown`, '' if there are no others;
    held-out scans beside them. config: of the flow or GPT. coded: where new latents are codes, a function
    that makes codes of a scan's latent (C,d,h,w).
    """
    folders = config['latents_dir'], config['data_dir']
    if not all(map(os.path.isdir, ','.join(folders).split(','))):
        return print(f'no table of nearest training scans: {" or ".join(folders)} is not here')
    train = Latents(*folders, modalities, 'train', ())
    held_out = []
    for split in ('val', 'test'):
        if has_split(folders[1], modalities, split):
            part = Latents(*folders, modalities, split, ())
            held_out += [(part, k) for k in range(part.n)]
    order = random(0, 12).permutation(len(held_out))  # the first ones are of one split
    held_out = [held_out[k] for k in order[:COMPARED]]

    def comparable(part, k):  # volumes are compared in one modality
        return shown in ('', modalities[part.scans[k][1]])

    def latent_of_scan(part, k):
        mean = part.load(k)[0]
        return coded(mean) if coded else mean

    queries = [*z, *[latent_of_scan(part, k) for part, k in held_out]]
    latent = nearest(queries, ((k, latent_of_scan(train, k)) for k in range(train.n)))
    queries = [*volumes, *[volume_of(part, k) for part, k in held_out if comparable(part, k)]]
    image = nearest(queries, ((k, volume_of(train, k)) for k in range(train.n) if comparable(train, k)))
    compared = len(z)
    rows = [[i] for i in range(compared)]
    for row, *neighbours in zip(rows, latent, image):
        for k, distance in neighbours:
            scan, m = train.scans[k]
            row += [f'{distance:.4f}', f"{scan['subject']} {modalities[m]}"]
    closest = 0.0
    if held_out:
        row = ['held-out scans, least / median']
        for neighbours in (latent[compared:], image[compared:]):
            distances = [distance for _, distance in neighbours]
            cell = ''
            if distances:
                cell = f'{min(distances):.4f} / {np.median(distances):.4f}, {len(distances)} scans'
            row += [cell, '']
        rows.append(row)
        closest = min(distance for _, distance in latent[compared:])
    of_modality = f' ({shown})' if shown else ''
    kind = 'codes' if coded else 'posterior means'
    lines = [f'Root-mean-square distance to the nearest training scan: of latents ({kind}), and of '
             f'volumes{of_modality}. A blurred volume is close to many.', '']
    lines += markdown_table(['new brain', 'latent', 'nearest', 'volume', 'nearest'], rows)
    close = [str(i) for i in range(compared) if latent[i][1] < closest]
    if close:
        lines += ['', f'warning: new brains {", ".join(close)} lie closer to a training latent than any '
                      'held-out scan does: memorised?']
    write_text(os.path.join(folder, 'nearest.md'), '\n'.join(lines) + '\n')
    show('\n'.join(lines))

def nearest(queries, library):
    """For each query array the key and root-mean-square distance of the nearest array.

    library: an iterable of (key, array), read once, some at a time. Squared lengths and products find the
    nearest of those; its distance is then taken from the differences, since lengths cancel.
    """
    queries = np.stack([np.ravel(query) for query in queries]).astype(np.float32)
    best = [(None, np.inf)] * len(queries)
    library = iter(library)
    at_once = max(1, 2 ** 26 // queries.shape[1])
    while True:
        chunk = list(islice(library, at_once))
        if not chunk:
            return best
        arrays = np.stack([np.ravel(array) for _, array in chunk]).astype(np.float32)
        order = (arrays ** 2).sum(1) - 2 * queries @ arrays.T  # |q|^2 is the same for all
        for q, k in enumerate(order.argmin(1)):
            distance = float(np.sqrt(np.mean((queries[q] - arrays[k]) ** 2)))
            if distance < best[q][1]:
                best[q] = chunk[k][0], distance

def volume_of(part, k):
    """The volume (D,H,W) behind latent k of a split."""
    return as_float(open_npy(os.path.join(part.scans[k][0]['folder'], part.file(k))))
