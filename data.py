"""Prepared data as training batches: whole volumes, patches, and slices in any plane, from memory-mapped .npy files.

A batch is a function of (seed, rank, step) alone, so a resumed run goes on with the very next batch, and N processes together
see the batch that one process would see. Array axes are (D, H, W) = (left-right, posterior-anterior, inferior-superior).
"""
import csv
import io
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby, product

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

# ---------------------------------------------------------------- the index

# keys of dataset.json that say how scans got into their box: arguments of nifti.conform
BOX = ('shape', 'spacing_mm', 'resize', 'percentiles', 'percentiles_of', 'clip')

def read_index(data_dir, modalities, split=None):
    """Rows of subjects.tsv of one split (None: all) that hold at least one of the modalities, and dataset.json as a dict.

    data_dir: a folder, or several with commas between, made with the same settings. A row is a session: dict of the columns, file
    names under the modalities ('' where missing), and 'folder'. SystemExit with one line if a folder is not prepared data, a
    modality is missing everywhere, a subject is in two splits, or no session is left.
    """
    def refuse(reason, folder=data_dir):
        raise SystemExit(f'{folder}: {reason}')
    rows, first = [], None
    for folder in data_dir.split(',') if isinstance(data_dir, str) else [str(data_dir)]:
        try:
            with open(os.path.join(folder, 'dataset.json')) as f:
                dataset = json.load(f)
            with open(os.path.join(folder, 'subjects.tsv'), newline='') as f:
                found = list(csv.DictReader(f, delimiter='\t'))
        except OSError as e:
            refuse(f'no prepared data there ({os.path.basename(e.filename)}: {e.strerror}); make some with '
                   f'python prepare.py --source=phantom --out_dir={folder}', folder)
        except json.JSONDecodeError:
            refuse('dataset.json is not JSON; run prepare.py again', folder)
        first = first or dataset
        for key in BOX:
            if dataset.get(key) != first.get(key):
                refuse(
                    f'made with {key} {dataset.get(key)}, {data_dir.split(",")[0]} with {first.get(key)}',
                    folder,
                )
        split_of = {}
        for row in found:
            row['folder'] = folder
            if split_of.setdefault(row['subject'], row['split']) != row['split']:
                refuse(
                    f"subject {row['subject']} is in two splits ({split_of[row['subject']]} and"
                    f" {row['split']}); fix subjects.tsv",
                    folder,
                )
        rows += found
    for modality in modalities:
        if not any(row.get(modality) for row in rows):
            has = [m for m in first.get('modalities', []) if any(row.get(m) for row in rows)]
            refuse(f"no volume of modality {modality}; it has {', '.join(has) or 'none'}")
    rows = [row for row in rows if split in (None, row['split']) and any(row.get(m) for m in modalities)]
    if not rows:
        refuse(f"no session of {', '.join(modalities)} in split '{split}'")
    return rows, first

def fingerprint(data_dir):
    """{what: checksum} of dataset.json and of every session's row, by which a resumed run knows its data and can tell what changed."""
    found, folders = {}, data_dir.split(',')
    for k, folder in enumerate(folders):
        of = f'data set {k + 1}: ' * (len(folders) > 1)
        with open(os.path.join(folder, 'dataset.json'), 'rb') as f:
            found[f'{of}dataset.json'] = zlib.crc32(f.read())
        with open(os.path.join(folder, 'subjects.tsv'), newline='') as f:
            for row in csv.DictReader(f, delimiter='\t'):
                found[f"{of}{row['subject']} {row['session']}"] = zlib.crc32(repr(row).encode())
    return found

def refuse_other_data(there, data_dir, path):
    """SystemExit that says what differs if data_dir is not what the run of the checkpoint at `path`, with fingerprint `there`, has seen."""
    here = fingerprint(data_dir)
    kinds = {'changed': [k for k in there if k in here and there[k] != here[k]],
             'gone': [k for k in there if k not in here], 'new': [k for k in here if k not in there]}
    differ = [
        f'{len(names)} {kind} ({", ".join(names[:3])}{", ..." * (len(names) > 3)})'
        for kind, names in kinds.items()
        if names
    ]
    if differ:
        raise SystemExit(
            f'--init_from=resume: {data_dir} is not what {path} was trained on: {"; ".join(differ)}; '
            'restore it, or begin a new run'
        )

@lru_cache
def npy_headers(*shapes):
    """What np.save writes before arrays of these shapes, in the types in use: {bytes: (dtype, shape)}."""
    headers = {}
    for shape, dtype in product(shapes, ('<f4', '<f2', '|u1', '<i2')):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {'descr': dtype, 'fortran_order': False, 'shape': shape})
        headers[file.getvalue()] = dtype, shape
    return headers

def open_npy(path, *shapes):
    """Memory map of a .npy file of one of these shapes; another one is opened too. OSError, EOFError or ValueError if it is not usable.

    Its header is compared, not parsed as np.load does: Python's parser fails now and then when several threads are at it, with
    "AST constructor recursion depth mismatch".
    """
    headers = npy_headers(*shapes)
    with open(path, 'rb') as f:
        dtype, shape = headers.get(start := f.read(len(next(iter(headers)))), (None, None))
        return np.memmap(f, dtype, 'r', len(start), shape) if dtype else np.load(path, mmap_mode='r')

def as_float(stored):
    """A stored volume, or part of one, as float32 in [0, 1]; 8-bit ones hold 255 times that."""
    return (
        np.asarray(stored, np.float32) / np.float32(255)
        if stored.dtype == np.uint8
        else np.asarray(stored, np.float32)
    )

def random(*key):
    """A generator that is a function of its key, a few integers."""
    return np.random.default_rng(key)

@lru_cache(8)
def shuffled(n, seed, epoch):
    return random(seed, 0, epoch).permutation(n)

def draw(n, place, seed):
    """The element of range(n) at a place of an endless sequence of shuffled epochs."""
    epoch, position = divmod(place, n)
    return int(shuffled(n, seed, epoch)[position])

def augmented(volume, start, size, rng):
    """A random variant of the patch of `size` at `start` of a stored (D,H,W) volume: float32 in [0, 1], background 0.

    Left-right flip with probability 0.5, each other with 0.3. Rotation within 6 degrees about each axis and zoom 0.9 to 1.1 about
    the volume's centre, in one linear interpolation; bias: exp of a random cosine field within +-0.3; gamma 0.7 to 1.5.
    """
    if rng.random() < 0.5:
        volume = volume[::-1]
    if rng.random() < 0.3:
        turn = Rotation.from_euler('xyz', rng.uniform(-6, 6, 3), degrees=True).as_matrix() / rng.uniform(
            0.9, 1.1
        )
        centre = (np.array(volume.shape) - 1) / 2
        x = ndimage.affine_transform(as_float(volume), turn, centre + turn @ (start - centre), size, order=1)
    else:
        x = as_float(volume[tuple(slice(s, s + n) for s, n in zip(start, size))])
    if rng.random() < 0.3:
        waves = [
            np.cos(np.pi * rng.uniform(0.5, 2) * np.linspace(0, 1, n)[s : s + k] + rng.uniform(0, 2 * np.pi))
            for s, k, n in zip(start, size, volume.shape)
        ]
        x = x * np.exp(rng.uniform(-0.3, 0.3) * np.einsum('i,j,k->ijk', *waves)).astype(np.float32)
    if rng.random() < 0.3:
        x = np.clip(x, 0, 1) ** np.float32(np.exp(rng.uniform(np.log(0.7), np.log(1.5))))
    return np.clip(x, 0, 1)

class Sessions:
    """The sessions of one split, as batches. modalities: those wanted, in the model's order; a session may lack some.

    data_dir, split: as read_index. temperature: 1 draws every session, or scan, equally often; above 1, datasets (and modalities,
    of scans) with few are drawn more often, with probability ~ size^(1/temperature). shape: (D,H,W) of every volume. box: how scans
    got there, as arguments of nifti.conform; voxel_mm: its voxels. n: number of sessions.
    """
    def __init__(self, data_dir, modalities, split, temperature=1.0):
        self.data_dir, self.modalities, self.temperature = data_dir, tuple(modalities), temperature
        self.rows, dataset = read_index(data_dir, modalities, split)
        self.shape = tuple(dataset['shape'])
        self.box = {k: dataset[k] for k in BOX if k in dataset}
        self.voxel_mm = dataset.get('voxel_mm', [dataset['spacing_mm']] * 3)
        self.n = len(self.rows)
        self.scans = [
            (i, m)
            for i, row in enumerate(self.rows)
            for m, name in enumerate(self.modalities)
            if row.get(name)
        ]
        self.session_groups, self.scan_groups = {}, {}
        for i, row in enumerate(self.rows):
            self.session_groups.setdefault(row['folder'], []).append(i)
        for k, (i, m) in enumerate(self.scans):
            self.scan_groups.setdefault((self.rows[i]['folder'], m), []).append(k)

    def choose(self, groups, place, seed):
        """The element at a place of the run: of shuffled epochs of everything, or at another temperature of a group drawn by its size."""
        if self.temperature == 1: return draw(sum(map(len, groups.values())), place, seed)
        rng, weights = random(seed, 13, place), np.array([len(g) for g in groups.values()]) ** (
            1 / self.temperature
        )
        members = list(groups.values())[rng.choice(len(weights), p=weights / weights.sum())]
        return members[rng.integers(len(members))]

    def present(self, i):
        """Modality indices that session i has."""
        return [m for m, name in enumerate(self.modalities) if self.rows[i].get(name)]

    def path(self, i, m):
        return os.path.join(self.rows[i]['folder'], self.rows[i][self.modalities[m]])

    def stored(self, i, m):
        """Memory-mapped (D,H,W) array of session i, modality index m. SystemExit with one line if the file is not usable."""
        try:
            array = open_npy(self.path(i, m), self.shape)
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f'{self.path(i, m)}: unreadable ({e}); delete it and run prepare.py again')
        if array.shape != self.shape:
            raise SystemExit(f'{self.path(i, m)}: shape {array.shape}, dataset.json says {self.shape}')
        return array

    def volume(self, i, m):
        """The same as float32 in [0, 1]."""
        return as_float(self.stored(i, m))

    def verify(self, count=8):
        """SystemExit if a volume of the split is missing, or one of `count` random ones is unreadable or not what checksums.json says."""
        there, known = {}, {}
        for folder in {row['folder'] for row in self.rows}:
            there[folder] = set(os.listdir(folder))
            if 'checksums.json' in there[folder]:
                with open(os.path.join(folder, 'checksums.json')) as f:
                    known[folder] = json.load(f)
        for i, m in self.scans:
            if os.path.basename(self.path(i, m)) not in there[self.rows[i]['folder']]:
                raise SystemExit(f'{self.path(i, m)}: missing; run prepare.py again')
        for k in random(0, 12).permutation(len(self.scans))[:count]:
            (i, m), volume = self.scans[k], self.stored(*self.scans[k])
            sums = known.get(self.rows[i]['folder'])
            if sums and zlib.crc32(np.ascontiguousarray(volume)) != sums.get(
                self.rows[i][self.modalities[m]]
            ):
                raise SystemExit(
                    f'{self.path(i, m)}: not the volume that prepare.py wrote (checksum); delete it and run'
                    ' prepare.py again'
                )

    def labels(self, i, crop=...):
        """Part of session i's label map (column dseg) as int16. SystemExit with one line if it has none."""
        path = os.path.join(self.rows[i]['folder'], self.rows[i].get('dseg') or '(no dseg)')
        try:
            return np.asarray(open_npy(path, self.shape)[crop], np.int16)
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f'{path}: no label map of {self.rows[i]["subject"]} to draw images from ({e})')

    def session_batch(self, batch_size, seed, rank, world, step, patch=(), labels=False):
        """Batch of sessions, every modality that each has, whole or as patches at one random place per session.

        batch_size: sessions per process. patch: (D,H,W), at most the volume's size per axis; () for whole volumes. labels: also
        labels (B,1,D,H,W) int16, the sessions' label maps.
        returns dict: x (B,1,D,H,W) float32; modality (B,) int64; session (B,) int64, row of the index; place (B,) int64, the
            sample's number in the run;
            pairs (P,2) int64, every ordered pair (source, target) of rows of one session; files, names of the volumes;
            share, pair_share: this process's part of the joined batch's volumes and pairs, 1.0 when all have the same
        """
        places = step * batch_size * world + np.arange(batch_size * world)  # of the joined batch
        chosen = [self.choose(self.session_groups, int(p), seed) for p in places]
        counts = np.array([len(self.present(i)) for i in chosen]).reshape(world, batch_size)
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        size = tuple(min(p, n) for p, n in zip(patch or self.shape, self.shape))
        x, modality, session, numbers, maps, pairs = [], [], [], [], [], []
        for place, i in zip(places[mine], chosen[mine]):
            start = [
                int(s) for s in random(seed, 1, int(place)).integers(0, np.subtract(self.shape, size) + 1)
            ]
            crop = tuple(slice(s, s + n) for s, n in zip(start, size))
            first = len(x)
            for m in self.present(i):
                x.append(as_float(self.stored(i, m)[crop]))
                modality.append(m)
                session.append(i)
                numbers.append(int(place) * len(self.modalities) + m)
                if labels:
                    maps.append(self.labels(i, crop))
            rows = range(first, len(x))
            pairs += [(a, b) for a in rows for b in rows if a != b]
        counts, pair_counts = counts.sum(1), (counts * (counts - 1)).sum(1)  # per process
        files = [self.rows[i][self.modalities[m]] for i, m in zip(session, modality)]
        return dict(
            x=torch.from_numpy(np.stack(x))[:, None],
            modality=torch.tensor(modality),
            session=torch.tensor(session),
            files=files,
            place=torch.tensor(numbers),
            **({'labels': torch.from_numpy(np.stack(maps))[:, None]} if labels else {}),
            pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
            share=world * counts[rank] / counts.sum(),
            pair_share=world * pair_counts[rank] / max(pair_counts.sum(), 1),
        )

    def scan_batch(self, batch_size, seed, rank, world, step, patch=(), augment=False, labels=False):
        """Batch of single scans, of whichever modality, whole or as patches at random places; augment: see augmented(); labels as in session_batch.

        returns dict: x (B,1,D,H,W) float32; modality (B,) int64; place (B,) int64, the sample's number in the run; files; share 1.0
        """
        size = tuple(min(p, n) for p, n in zip(patch or self.shape, self.shape))
        x, modality, files, maps, places = (
            [],
            [],
            [],
            [],
            (step * world + rank) * batch_size + np.arange(batch_size),
        )
        for place in places:
            i, m = self.scans[self.choose(self.scan_groups, int(place), seed)]
            files.append(self.rows[i][self.modalities[m]])
            rng, volume = random(seed, 4, int(place)), self.stored(i, m)
            start = rng.integers(0, np.subtract(self.shape, size) + 1).tolist()
            crop = tuple(slice(s, s + n) for s, n in zip(start, size))
            x.append(augmented(volume, start, size, rng) if augment else as_float(volume[crop]))
            modality.append(m)
            if labels:
                maps.append(self.labels(i, crop))
        return dict(
            x=torch.from_numpy(np.stack(x))[:, None],
            modality=torch.tensor(modality),
            place=torch.from_numpy(places),
            files=files,
            **({'labels': torch.from_numpy(np.stack(maps))[:, None]} if labels else {}),
            share=1.0,
        )

    def slice_batch(self, batch_size, seed, rank, world, step, axis=None, min_brain=0.02, per_volume=8):
        """Batch of slices across `axis` (None: drawn per step); slices with less than min_brain of brain are left out.

        batch_size: slices per process. per_volume: consecutive slices of the joined batch come from one volume, since an axial
        or sagittal slice touches the whole file; one with fewer brain slices gives some twice.
        returns dict: x (B,1,D,H,W) float32 with one axis of length 1; modality (B,) int64; place (B,) int64; files; share 1.0
        """
        if axis is None:
            axis = int(random(seed, 2, step).integers(3))
        places = (step * world + rank) * batch_size + np.arange(batch_size)
        x, modality, files = [], [], []
        for place, group in groupby(places.tolist(), lambda p: p // per_volume):
            i, m, found = self.brain_slices(axis, place, seed, min_brain, per_volume)
            files.append(self.rows[i][self.modalities[m]])
            x += [np.expand_dims(found[p % per_volume % len(found)], axis) for p in group]
            modality += [m] * (len(x) - len(modality))
        return dict(
            x=torch.from_numpy(np.stack(x))[:, None],
            modality=torch.tensor(modality),
            place=torch.from_numpy(places),
            files=files,
            share=1.0,
        )

    def brain_slices(self, axis, place, seed, min_brain, count):
        """Session, modality index and up to `count` random slices across `axis` of the volume at a place of the shuffled scans."""
        rng, scan = random(seed, 3, place), self.choose(self.scan_groups, place, seed)
        for _ in range(100):
            i, m = self.scans[scan]
            volume, found = self.stored(i, m), []
            order = rng.permutation(volume.shape[axis])
            # several at once: across the last axis each of them touches the whole file
            for k in range(0, len(order), count):
                block = np.ascontiguousarray(np.moveaxis(volume.take(order[k:k + count], axis), axis, 0))
                found += [as_float(x) for x in block if np.count_nonzero(x) >= min_brain * x.size]
                if len(found) >= count: break
            if found: return i, m, found[:count]
            scan = rng.integers(len(self.scans))
        raise SystemExit(
            f'{self.data_dir}: no slice with {min_brain:.0%} brain in 100 volumes; is the background'
            ' exactly 0?'
        )

def prefetch(make_batch, steps, device, threads=4):
    """Yield make_batch(step) for each step, with its tensors on `device`, prepared by threads while the model computes.

    A batch depends on its step alone, so threads change nothing but time: on a network disk, or augmenting, one is too slow.
    'place' stays on the CPU: it seeds generators, and asking a device for it would mean waiting.
    """
    pin = device.startswith('cuda')
    def ready(step):
        batch = make_batch(step)
        return {k: v.pin_memory() if pin and isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    steps, waiting = iter(steps), []
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(waiting) < threads + 1 and (step := next(steps, None)) is not None:
                waiting.append(pool.submit(ready, step))
            if not waiting: return
            batch = waiting.pop(0).result()
            yield {
                k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) and k != 'place' else v
                for k, v in batch.items()
            }
