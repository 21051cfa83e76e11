"""Latents of a trained autoencoder as training data of a flow: encoded once, kept as float16 files, read as batches."""
import json
import os

import numpy as np
import torch
from tqdm import tqdm

from common import make_out_dir, write_text
from data import Sessions, draw, open_npy, random, read_index

SEXES = ('F', 'M')  # the values of the column that count; anything else is "not known"

@torch.no_grad()
def encode_sessions(autoencoder, name, data_dir, modalities, latents_dir, rank, world, device):
    """Write the posterior of every scan of data_dir to latents_dir: (2,C,d,h,w) float16, mean and log-variance, or (1,...) without one.

    name: encoder_hash of the autoencoder; a folder that holds latents of another is refused. A file already there is kept, so an
    interrupted run goes on. Scans are shared out among the processes.
    """
    sessions = Sessions(data_dir, modalities, None)
    facts, path = {
        'encoder_hash': name,
        'shape': list(autoencoder.latent_shape(sessions.shape)),
    }, os.path.join(latents_dir, 'latents.json')
    if rank == 0:
        make_out_dir(latents_dir)
    if os.path.exists(path):
        check_latents(latents_dir, name)
    elif rank == 0:
        write_text(path, json.dumps(facts))
    mine = [(i, m) for i, m in sessions.scans[rank::world]
            if not is_whole(os.path.join(latents_dir, sessions.rows[i][modalities[m]]), facts['shape'])]
    for i, m in tqdm(mine, desc='encoding', disable=rank > 0 or not mine):
        x = torch.tensor(sessions.volume(i, m), dtype=torch.float32, device=device)[None, None]
        found = torch.cat([t.float().cpu() for t in autoencoder.posterior(x) if t is not None]).numpy()
        target = os.path.join(latents_dir, sessions.rows[i][modalities[m]])
        part = f'{target}.part{rank}.npy'
        np.save(part, found.astype(np.float16))
        os.replace(part, target)

def check_latents(latents_dir, name):
    """SystemExit with one line unless the folder holds latents of the encoder of this hash."""
    try:
        with open(os.path.join(latents_dir, 'latents.json')) as f:
            facts = json.load(f)
    except (OSError, ValueError):
        raise SystemExit(f'{latents_dir}: no latents there (latents.json); train_flow.py makes them')
    if facts['encoder_hash'] != name:
        raise SystemExit(
            f"{latents_dir}: latents of another autoencoder ({facts['encoder_hash']}, not {name}); "
            "delete the folder or choose another --latents_dir"
        )
    return facts

def is_whole(path, shape):
    try:
        return open_npy(path, (1, *shape), (2, *shape)).shape[1:] == tuple(shape)
    except (OSError, EOFError, ValueError):
        return False

class Latents:
    """The latents of one split's scans as batches, with their conditions.

    conditions: of 'modality', 'sex', 'age'. classes, vectors: what they need of FlowUNetConfig. shape (C,d,h,w). n: scans.
    SystemExit with one line for a condition that no scan has a value for.
    """
    def __init__(self, latents_dir, data_dir, modalities, split, conditions):
        self.latents_dir, self.modalities, self.conditions = latents_dir, tuple(modalities), tuple(conditions)
        with open(os.path.join(latents_dir, 'latents.json')) as f:
            facts = json.load(f)
        self.shape, self.encoder_hash = tuple(facts['shape']), facts['encoder_hash']
        self.rows, _ = read_index(data_dir, modalities, split)
        self.scans = [
            (row, m) for row in self.rows for m, name in enumerate(self.modalities) if row.get(name)
        ]
        self.n = len(self.scans)
        unknown = set(conditions) - {'modality', 'sex', 'age'}
        if unknown:
            raise SystemExit(
                f"--conditions: {', '.join(sorted(unknown))}: only modality, sex and age are known"
            )
        for column in set(conditions) - {'modality'}:
            if not any(value_of(row, column) is not None for row in self.rows):
                raise SystemExit(f'{data_dir}: no scan with a known {column}, which --conditions asks for')
        self.classes = tuple(
            len(self.modalities) + 1 if c == 'modality' else len(SEXES) + 1
            for c in self.conditions
            if c != 'age'
        )
        self.vectors = (2,) if 'age' in self.conditions else ()

    def load(self, k):
        """mean and log-variance (or None) of scan k, each (C,d,h,w) float32."""
        row, m = self.scans[k]
        path = os.path.join(self.latents_dir, row[self.modalities[m]])
        try:
            found = open_npy(path, (1, *self.shape), (2, *self.shape))
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f'{path}: unreadable ({e}); delete it and start train_flow.py again')
        return np.asarray(found[0], np.float32), np.asarray(found[1], np.float32) if len(found) > 1 else None

    def cond(self, chosen, dropped=()):
        """Conditions of scans as FlowUNet takes them, None without any; those at the places in dropped are made "not known"."""
        values = [
            {'modality': self.modalities[m], **{c: value_of(row, c) for c in ('sex', 'age')}}
            for row, m in (self.scans[k] for k in chosen)
        ]
        for place in dropped:
            values[place] = {}
        return encode_conditions(values, self.conditions, self.modalities)

    def batch(self, batch_size, seed, rank, world, step, p_drop=0.0):
        """dict: mean (B,C,d,h,w), sd likewise if the autoencoder has a posterior, cond, place (B,) int64, the sample's number in the run, files."""
        places = (step * world + rank) * batch_size + np.arange(batch_size)
        chosen = [draw(self.n, int(p), seed) for p in places]
        dropped = [b for b, p in enumerate(places) if random(seed, 5, int(p)).random() < p_drop]
        mean, logvar = zip(*[self.load(k) for k in chosen])
        batch = {
            'mean': torch.from_numpy(np.stack(mean)),
            'place': torch.from_numpy(places),
            'cond': self.cond(chosen, dropped),
            'files': [self.scans[k][0][self.modalities[self.scans[k][1]]] for k in chosen],
        }
        if logvar[0] is not None:
            batch['sd'] = torch.from_numpy(np.exp(0.5 * np.stack(logvar)))
        return batch

    def whole(self, k):
        """For validation: the mean (1,C,d,h,w) of scan k, its conditions, and noise that belongs to it."""
        noise = random(0, 6, k).standard_normal((1, *self.shape), dtype=np.float32)
        return torch.from_numpy(self.load(k)[0])[None], self.cond([k]), torch.from_numpy(noise)

    def statistics(self, how):
        """mean and sd (C,) of z = mean + sd * noise over every scan and position: 'global', one for all channels, or 'channel'."""
        sums = np.zeros((2, self.shape[0]))
        for k in range(self.n):
            mean, logvar = self.load(k)
            second = mean.astype(np.float64) ** 2 + (
                0 if logvar is None else np.exp(logvar.astype(np.float64))
            )
            sums += mean.astype(np.float64).mean((1, 2, 3)), second.mean((1, 2, 3))
        first, second = sums / self.n
        if how == 'global':
            first, second = (np.full_like(s, s.mean()) for s in (first, second))
        return torch.from_numpy(first).float(), torch.from_numpy(np.sqrt(second - first ** 2)).float()

def value_of(row, column):
    """The sex ('F', 'M') or age (years) of a session, None if not known."""
    text = (row.get(column) or '').strip()
    if column == 'sex': return text[:1].upper() if text[:1].upper() in SEXES else None
    try:
        return float(text)
    except ValueError:
        return None

def encode_conditions(values, conditions, modalities):
    """values: per sample a dict of known conditions -> what FlowUNet takes; what is missing is "not known". None without conditions."""
    if not conditions: return None
    tables, classes = {'modality': tuple(modalities), 'sex': SEXES}, []
    for c in (c for c in conditions if c != 'age'):
        classes.append([tables[c].index(v[c]) if v.get(c) is not None else len(tables[c]) for v in values])
    cond = {'classes': torch.tensor(classes, dtype=torch.int64).T} if classes else {}
    if 'age' in conditions:
        cond['vectors'] = [
            torch.tensor([[v['age'] / 100, 1.0] if v.get('age') is not None else [0.0, 0.0] for v in values])
        ]
    return cond

def nearest(queries, library):
    """For each query array the place and root-mean-square distance of the nearest array; library: an iterable of (place, array)."""
    best = [(None, np.inf)] * len(queries)
    for place, array in library:
        for q, query in enumerate(queries):
            distance = float(np.sqrt(np.mean((query - array) ** 2)))
            if distance < best[q][1]:
                best[q] = place, distance
    return best
