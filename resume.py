"""What a run must have in common with the checkpoint from which it goes on, and how it takes it over."""
import csv
import os
import zlib

import torch

from common import changes, print0
from data import read_checksums

# ---------------------------------------------------------------- the same settings, the same data

def refuse_changes(checkpoint, config, world, free):
    """SystemExit that shows every setting that differs from the checkpoint's, without --resume_changed.

    free: names of settings without influence on results, which may differ. batch_size may change if the
    number of processes does: what counts is the joined batch.
    """
    if config['resume_changed']: return

    def of_the_joined_batch(settings, world):
        joined = {key: settings.get(key) for key in config if key not in free}
        for key in joined:
            if key.startswith('batch_size') and key in settings:
                joined[key] *= world
        return joined

    old = of_the_joined_batch(checkpoint['config'], checkpoint['world'])
    new = of_the_joined_batch(config, world)
    if old != new:
        raise SystemExit('--init_from=resume goes on with one run, but its settings have changed: '
                         f'{changes(old, new)}; restore them, or add --resume_changed=True to go on')

def fingerprint(data_dir):
    """{what: checksum} of dataset.json and of every session, its row and its volumes, in data_dir."""
    checksums, folders = {}, data_dir.split(',')
    for k, folder in enumerate(folders):
        prefix = f'data set {k + 1}: ' if len(folders) > 1 else ''
        of_volumes = read_checksums(folder)
        with open(os.path.join(folder, 'dataset.json'), 'rb') as f:
            checksums[f'{prefix}dataset.json'] = zlib.crc32(f.read())
        with open(os.path.join(folder, 'subjects.tsv'), newline='') as f:
            for row in csv.DictReader(f, delimiter='\t'):
                known = [of_volumes.get(str(value)) for value in row.values()]
                name = f"{prefix}{row['subject']} {row['session']}"
                checksums[name] = zlib.crc32(repr((row, known)).encode())
    return checksums

def refuse_other_data(old, data_dir, path):
    """SystemExit that says what differs if data_dir is not what the run of the checkpoint at `path` has seen.

    old: the fingerprint that this checkpoint holds.
    """
    new = fingerprint(data_dir)
    differences = {
        'changed': [name for name in old if name in new and old[name] != new[name]],
        'gone': [name for name in old if name not in new],
        'new': [name for name in new if name not in old],
    }
    parts = []
    for kind, names in differences.items():
        if names:
            more = ', ...' if len(names) > 3 else ''
            parts.append(f'{len(names)} {kind} ({", ".join(names[:3])}{more})')
    if parts:
        raise SystemExit(f'--init_from=resume: {data_dir} is not what {path} was trained on: '
                         f'{"; ".join(parts)}; restore it, or begin a new run')

# ---------------------------------------------------------------- the state of the run

def load_parts(parts, checkpoint, path):
    """Load the parts of a run, {key: module, optimiser or None}, from the checkpoint at `path`.

    SystemExit with one line if the run had other parts.
    """
    for key, part in parts.items():
        if bool(part) != bool(checkpoint.get(key)):
            had = 'without' if part else 'with'
            raise SystemExit(f'{path}: a run {had} {key}, which cannot change on the way; begin another')
    for key, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, checkpoint[key])
        elif part:
            part.load_state_dict(checkpoint[key])
    print0(f"resumed {path} at iteration {checkpoint['iter_num']}")

def load_optimizer(optimizer, state):
    """Load what an optimiser knows of its weights; its settings stay those it was made with."""
    settings = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)

def best_so_far(checkpoint, config, count, worst):
    """The checkpoint's best validation; `worst` where config[count], how much is validated, has changed."""
    before, now = checkpoint['config'].get(count), config.get(count)
    if before == now: return checkpoint['best_val']
    print0(f'--{count}={now}, before {before}: best.pt begins anew, since such validations do not compare')
    return worst
