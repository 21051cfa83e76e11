"""The latents of a trained autoencoder: written once per scan, read as batches, with their conditions."""
import json
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from common import git_commit, load_checkpoint, load_like, make_out_dir, wait_for_all, write_text
from data import Sessions, box_of, draw, open_npy, random, read_index
from model import Autoencoder, encoder_hash, from_checkpoint, model_args
from resume import best_so_far, fingerprint, load_parts, refuse_changes, refuse_other_data
from scans import people
from scans.nifti import save_npy

SEXES = ('F', 'M')  # the values of the column that count; anything else is "not known"

# ---------------------------------------------------------------- what the networks on latents begin with

def encode_all(path, data_dir, latents_dir, rank, world, device):
    """Write the latents of all scans, whichever are missing, by the autoencoder of a checkpoint.

    data_dir: '' for what it was trained on. latents_dir: '' for a folder beside the checkpoint; each of
    several data sets has its own, with commas between.
    returns the autoencoder, its checkpoint, data_dir and latents_dir. SystemExit with one line for another
    network.
    """
    checkpoint = load_checkpoint(path)
    model = from_checkpoint(checkpoint).to(device)
    if not isinstance(model, Autoencoder):
        raise SystemExit(f'--vae={path}: not an autoencoder')
    data_dir = data_dir or checkpoint['config']['data_dir']
    latents_dir = latents_dir or usual_dirs(os.path.dirname(path) or '.', data_dir)
    modalities = checkpoint['config']['modalities']
    encode_sessions(model, data_dir, modalities, latents_dir, rank, world, device)
    wait_for_all()
    return model, checkpoint, data_dir, latents_dir

def usual_dirs(parent, data_dir):
    """Folders in `parent` for the latents of data_dir's folders, with commas between as there."""
    folders = [os.path.normpath(folder) for folder in data_dir.split(',')]
    names = [os.path.basename(folder) for folder in folders]
    if len(set(names)) < len(names):  # a/mine and b/mine
        names = [folder.strip(os.sep).replace(os.sep, '_') for folder in folders]
    return ','.join(os.path.join(parent, f'latents_{name}') for name in names)

def dirs_by_folder(data_dir, latents_dir):
    """{folder of data: folder of its latents}. SystemExit with one line unless there is one for each."""
    folders, dirs = str(data_dir).split(','), str(latents_dir).split(',')
    if len(dirs) != len(folders):
        raise SystemExit(f'--latents_dir={latents_dir}: give as many folders, with commas between, as '
                         f'--data_dir={data_dir} has')
    return dict(zip(folders, dirs))

# what may differ when a run is resumed; the autoencoder is known by its hash
NOT_RESULTS = ('vae', 'data_dir', 'latents_dir', 'out_dir', 'init_from', 'resume_changed', 'overwrite',
               'log_interval', 'eval_interval', 'eval_scans', 'sample_interval', 'wandb_project',
               'tensorboard', 'max_iters', 'device', 'compile')

def run_state(parts, config, world, latents):
    """What a resumed run on latents and sample.py need, but for its iteration and best validation.

    parts: {key: module, optimiser or None}, the network as 'model'.
    """
    return {
        **{key: part.state_dict() if part else None for key, part in parts.items()},
        'model_args': model_args(parts['model']), 'config': config, 'world': world, 'data': latents.box,
        'voxel_mm': latents.voxel_mm, 'fingerprint': latents.fingerprint,
        'encoder_hash': latents.encoder_hash, 'latent_shape': latents.shape,
        'conditions': latents.conditions, 'git_commit': git_commit()}

def go_on(path, made_by, config, world, parts):
    """Load the checkpoint of a run on latents into its parts.

    returns its iteration, its best validation, and whether it was validated at that iteration
    made_by: encoder_hash of the latents. parts: as in run_state. SystemExit with one line if the run is of
    another network, autoencoder, data set or an earlier version, or, without --resume_changed, if a setting
    has changed that is not in NOT_RESULTS.
    """
    checkpoint = load_like(path, model_args(parts['model']))
    if checkpoint['encoder_hash'] != made_by:
        raise SystemExit(f'{path}: a run on the latents of another autoencoder')
    if not parts.keys() <= checkpoint.keys():
        raise SystemExit(f'{path}: of an earlier version, not to be resumed; begin anew in another out_dir')
    refuse_changes(checkpoint, config, world, NOT_RESULTS)
    refuse_other_data(checkpoint['fingerprint'], config['data_dir'], path)
    load_parts(parts, checkpoint, path)
    best_val = best_so_far(checkpoint, config, 'eval_scans', math.inf)
    return checkpoint['iter_num'], best_val, checkpoint.get('validated', True)

# ---------------------------------------------------------------- encoding

@torch.no_grad()
def encode_sessions(autoencoder, data_dir, modalities, latents_dir, rank, world, device):
    """Write the posterior of every scan of data_dir to latents_dir.

    A file is (2,C,d,h,w) float16, mean and log-variance, or (1,C,d,h,w) for an autoencoder without a
    posterior. A folder that holds latents of another autoencoder is refused. A file already there is kept, so
    an interrupted run goes on; the file of a scan that has changed since is made again. The processes share
    the scans.
    """
    sessions = Sessions(data_dir, modalities, None)
    made_by = encoder_hash(autoencoder)
    dirs = dirs_by_folder(data_dir, latents_dir)
    shape = list(autoencoder.latent_shape(sessions.shape))
    if rank == 0:
        for folder, scans in identities(sessions).items():
            begin_folder(dirs[folder], {'encoder_hash': made_by, 'shape': shape, 'scans': scans})
    wait_for_all()
    missing = []
    for i, m in sessions.scans[rank::world]:
        target = os.path.join(dirs[sessions.rows[i]['folder']], sessions.file(i, m))
        if not is_whole(target, shape):
            missing.append((i, m, target))
    for i, m, target in tqdm(missing, desc='encoding', disable=rank > 0 or not missing):
        x = torch.tensor(sessions.volume(i, m), device=device)[None, None]
        mean, logvar = autoencoder.posterior(x)
        parts = [mean] if logvar is None else [mean, logvar]
        posterior = torch.cat([part.float().cpu() for part in parts]).numpy()
        save_npy(target, posterior.astype(np.float16))

def begin_folder(latents_dir, facts):
    """Write latents.json, the facts, into the folder; latents of scans that are others now are removed."""
    path = os.path.join(latents_dir, 'latents.json')
    make_out_dir(latents_dir)
    if os.path.exists(path):
        before = check_latents(latents_dir, facts['encoder_hash']).get('scans', {})
        remove_stale(latents_dir, before, facts['scans'])
        facts['scans'] = before | facts['scans']
    write_text(path, json.dumps(facts))

def check_latents(latents_dir, made_by):
    """latents.json as a dict. SystemExit with one line unless its encoder_hash is made_by."""
    try:
        with open(os.path.join(latents_dir, 'latents.json')) as f:
            facts = json.load(f)
    except (OSError, ValueError):
        raise SystemExit(f'{latents_dir}: no latents there (latents.json); train_flow.py makes them')
    if facts['encoder_hash'] != made_by:
        raise SystemExit(f"{latents_dir}: latents of another autoencoder ({facts['encoder_hash']}, "
                         f'not {made_by}); delete the folder or choose another --latents_dir')
    return facts

def identities(sessions):
    """{folder: {file: what tells a scan from another of that name}}: checksum, or else time of writing."""
    checksums = sessions.checksums()
    found = {}
    for i, m in sessions.scans:
        name, folder = sessions.file(i, m), sessions.rows[i]['folder']
        identity = checksums[folder].get(name) or os.stat(sessions.path(i, m)).st_mtime_ns
        found.setdefault(folder, {})[name] = identity
    return found

def remove_stale(latents_dir, before, now):
    """Delete the latents of scans that are others than before; before, now: of identities(), of a folder."""
    stale = [name for name, scan in now.items() if before.get(name, scan) != scan]
    for name in stale:
        if os.path.exists(os.path.join(latents_dir, name)):
            os.remove(os.path.join(latents_dir, name))
    if stale:
        print(f'{latents_dir}: {len(stale)} latents were of other scans, such as {stale[0]}; encoded anew')

def is_whole(path, shape):
    try:
        return open_npy(path).shape[1:] == tuple(shape)
    except (OSError, EOFError, ValueError):
        return False

# ---------------------------------------------------------------- batches

class Latents:
    """The latents of one split's scans as batches, with their conditions.

    conditions: of 'modality', 'sex', 'age'. seed, rank, world: of the run and of this process; only batches
    depend on them. classes, vectors: what a network's config says of the conditions. shape (C,d,h,w).
    n: number of scans. SystemExit with one line for a condition that no training scan has a value for.
    """
    def __init__(self, latents_dir, data_dir, modalities, split, conditions, seed=0, rank=0, world=1):
        self.modalities, self.conditions = tuple(modalities), tuple(conditions)
        self.seed, self.rank, self.world = seed, rank, world
        self.dirs = dirs_by_folder(data_dir, latents_dir)
        self.rows, dataset = read_index(data_dir, modalities, split)
        with open(os.path.join(self.dirs[self.rows[0]['folder']], 'latents.json')) as f:
            facts = json.load(f)
        self.shape, self.encoder_hash = tuple(facts['shape']), facts['encoder_hash']
        self.box, self.voxel_mm = box_of(dataset)
        self.fingerprint = fingerprint(str(data_dir))
        modality_indices = range(len(self.modalities))
        self.scans = [(row, m) for row in self.rows for m in modality_indices if row.get(self.modalities[m])]
        self.n = len(self.scans)
        unknown = set(conditions) - {'modality', 'sex', 'age'}
        if unknown:
            names = ', '.join(sorted(unknown))
            raise SystemExit(f'--conditions: {names}: only modality, sex and age are known')
        for column in set(conditions) - {'modality'}:
            known = any(value_of(row, column) is not None for row in self.rows)
            if split == 'train' and not known:
                raise SystemExit(f'{data_dir}: no training scan with a known {column}, '
                                 'which --conditions asks for')
        values = {'modality': self.modalities, 'sex': SEXES}
        self.classes = tuple(len(values[c]) + 1 for c in self.conditions if c != 'age')
        self.vectors = (2,) if 'age' in self.conditions else ()

    def file(self, k):
        """File name of scan k's latent."""
        row, m = self.scans[k]
        return row[self.modalities[m]]

    def load(self, k):
        """mean and log-variance (or None) of scan k, each (C,d,h,w) float32."""
        path = os.path.join(self.dirs[self.scans[k][0]['folder']], self.file(k))
        try:
            posterior = np.asarray(open_npy(path), np.float32)
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f'{path}: unreadable ({e}); delete it and start train_flow.py again')
        return posterior[0], posterior[1] if len(posterior) > 1 else None

    def cond(self, chosen, dropped=()):
        """Conditions of the scans `chosen` as the networks take them, None without any.

        dropped: places in `chosen` whose conditions are made "not known".
        """
        values = []
        for k in chosen:
            row, m = self.scans[k]
            person = {column: value_of(row, column) for column in ('sex', 'age')}
            values.append({'modality': self.modalities[m], **person})
        for b in dropped:
            values[b] = {}
        return encode_conditions(values, self.conditions, self.modalities)

    def choose(self, step, batch_size, p_drop):
        """A batch's sample_index (B,), its scans, and the places in it whose conditions are dropped."""
        sample_index = (step * self.world + self.rank) * batch_size + np.arange(batch_size)
        chosen = [draw(self.n, k, self.seed) for k in sample_index.tolist()]
        coins = [random(self.seed, 5, k).random() for k in sample_index.tolist()]
        return torch.from_numpy(sample_index), chosen, [b for b, coin in enumerate(coins) if coin < p_drop]

    def batch(self, step, batch_size, p_drop=0.0):
        """Latents for training, as a dict.

        mean (B,C,d,h,w), sd likewise if the autoencoder has a posterior, cond, files, and sample_index (B,)
        int64, the sample's number in the run.
        batch_size: latents per process. p_drop: probability that a latent comes without its conditions.
        """
        sample_index, chosen, dropped = self.choose(step, batch_size, p_drop)
        means, logvars = zip(*[self.load(k) for k in chosen])
        batch = {
            'mean': torch.from_numpy(np.stack(means)),
            'cond': self.cond(chosen, dropped),
            'sample_index': sample_index,
            'files': [self.file(k) for k in chosen],
        }
        if logvars[0] is not None:
            batch['sd'] = torch.from_numpy(np.exp(0.5 * np.stack(logvars)))
        return batch

    def whole(self, k):
        """For validation: the mean (1,C,d,h,w) of scan k, its conditions, and noise that belongs to it."""
        noise = random(0, 6, k).standard_normal((1, *self.shape), dtype=np.float32)
        return torch.from_numpy(self.load(k)[0])[None], self.cond([k]), torch.from_numpy(noise)

    def statistics(self, how):
        """mean and sd (C,) of z = mean + sd * noise over every scan and position.

        how: 'global', one value for all channels, or 'channel', one for each.
        """
        first, second = np.zeros(self.shape[0]), np.zeros(self.shape[0])  # moments
        for k in range(self.n):
            mean, logvar = self.load(k)
            mean = mean.astype(np.float64)
            variance = 0 if logvar is None else np.exp(logvar.astype(np.float64))
            first += mean.mean((1, 2, 3))
            second += (mean ** 2 + variance).mean((1, 2, 3))
        first, second = first / self.n, second / self.n
        if how == 'global':
            first, second = np.full_like(first, first.mean()), np.full_like(second, second.mean())
        return torch.from_numpy(first).float(), torch.from_numpy(np.sqrt(second - first ** 2)).float()

# ---------------------------------------------------------------- conditions

def value_of(row, column):
    """The sex ('F', 'M') or age (years) of a session, None if not known."""
    text = (row.get(column) or '').strip()
    if column == 'sex': return people.SEX_OF.get(text.lower())
    try:
        age = float(text)
    except ValueError:
        return None
    return age if math.isfinite(age) else None

def encode_conditions(values, conditions, modalities):
    """values: a dict of known conditions per sample -> what FlowUNet and GPT take. None without conditions.

    What is missing in a dict, or None, is "not known": the last class, a vector of 0.
    """
    if not conditions: return None
    known = {'modality': tuple(modalities), 'sex': SEXES}
    classes = []
    for name in conditions:
        if name == 'age': continue
        table = known[name]
        classes.append([len(table) if v.get(name) is None else table.index(v[name]) for v in values])
    cond = {}
    if classes:
        cond['classes'] = torch.tensor(classes, dtype=torch.int64).T
    if 'age' in conditions:
        ages = [[0.0, 0.0] if v.get('age') is None else [v['age'] / 100, 1.0] for v in values]
        cond['vectors'] = [torch.tensor(ages)]
    return cond
