"""Prepared data as training batches: whole volumes, patches, and slices in any plane.

A batch is a function of (seed, rank, step) alone. So a resumed run goes on with the very next batch, and N
processes together see the batch that one process would see. Array axes are (D, H, W) = (left-right,
posterior-anterior, inferior-superior).
"""
import csv
import json
import os
import shlex
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from itertools import groupby
from threading import Lock

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.utils._pytree import tree_map_only

from common import print0

# ---------------------------------------------------------------- the index

# keys of dataset.json that say how scans got into their box: arguments of nifti.conform
BOX = ('shape', 'spacing_mm', 'resize', 'percentiles', 'percentiles_of', 'clip')

def prepare_absent(data_dir, flags):
    """Run prepare.py with the flags, a command line, where data_dir holds no data; nothing if they are ''."""
    if not flags or ',' in data_dir: return
    if os.path.exists(os.path.join(data_dir, 'subjects.tsv')): return
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'prepare.py')
    command = [sys.executable, script, *shlex.split(flags), f'--out_dir={data_dir}']
    if subprocess.run(command).returncode:
        raise SystemExit(f'{data_dir}: prepare.py {flags} did not finish')

def read_folder(folder):
    """The rows of subjects.tsv of one prepared folder as dicts, with folder and voxel_mm; and dataset.json.

    SystemExit with one line if the folder is not prepared data or a subject is in two splits.
    """
    try:
        with open(os.path.join(folder, 'dataset.json')) as f:
            dataset = json.load(f)
        with open(os.path.join(folder, 'subjects.tsv'), newline='') as f:
            rows = list(csv.DictReader(f, delimiter='\t'))
    except OSError as e:
        raise SystemExit(f'{folder}: no prepared data there ({os.path.basename(e.filename)}: {e.strerror}); '
                         f'make some with python prepare.py --source=phantom --out_dir={folder}')
    except json.JSONDecodeError:
        raise SystemExit(f'{folder}: dataset.json is not JSON; run prepare.py again')
    split_of = {}
    _, voxel_mm = box_of(dataset)
    for row in rows:
        row |= {'folder': folder, 'voxel_mm': voxel_mm}
        first = split_of.setdefault(row['subject'], row['split'])
        if first != row['split']:
            raise SystemExit(f"{folder}: subject {row['subject']} is in two splits "
                             f"({first} and {row['split']}); fix subjects.tsv")
    return rows, dataset

def read_checksums(folder):
    """What prepare.py wrote in checksums.json, {file: CRC-32}; {} without one."""
    path = os.path.join(folder, 'checksums.json')
    if not os.path.exists(path): return {}
    with open(path) as f:
        return json.load(f)

def box_of(dataset):
    """Of dataset.json: how scans got into their box, as arguments of nifti.conform; and its voxels in mm."""
    box = {key: dataset[key] for key in BOX if key in dataset}
    return box, dataset.get('voxel_mm', [dataset['spacing_mm']] * 3)

def read_index(data_dir, modalities, split=None):
    """Rows of subjects.tsv of one split (None: all) with at least one of the modalities; and dataset.json.

    data_dir: a folder, or several with commas between, made with the same settings. A row is a session: a
    dict of the columns, with file names under the modalities ('' where missing), folder and voxel_mm. A
    subject that several folders have is called 'folder/subject'. SystemExit with one line if a folder is not
    prepared data, a modality is missing everywhere, a subject is in two splits, or no session is left.
    """
    data_dir = str(data_dir)
    folders = data_dir.split(',')
    rows, first_dataset = [], None
    for folder in folders:
        folder_rows, dataset = read_folder(folder)
        rows += folder_rows
        first_dataset = first_dataset or dataset
        for key in BOX:
            if dataset.get(key) != first_dataset.get(key):
                raise SystemExit(f'{folder}: made with {key} {dataset.get(key)}, '
                                 f'{folders[0]} with {first_dataset.get(key)}')
    tell_subjects_apart(rows)
    for modality in modalities:
        if not any(row.get(modality) for row in rows):
            filled = {m for row in rows for m in row if row[m]}
            present = ', '.join(m for m in first_dataset.get('modalities', []) if m in filled)
            raise SystemExit(f"{data_dir}: no volume of modality {modality}; it has {present or 'none'}")
    splits = {row['split'] for row in rows if any(map(row.get, modalities))}
    rows = [row for row in rows if split in (None, row['split']) and any(map(row.get, modalities))]
    if not rows:
        hint = '; --split=val has some' if split == 'test' and 'val' in splits else ''
        raise SystemExit(f"{data_dir}: no session of {', '.join(modalities)} in split '{split}'{hint}")
    return rows, first_dataset

def tell_subjects_apart(rows):
    """Put the folder's name before the subjects that several folders have: they are different people."""
    folders_of = {}
    for row in rows:
        folders_of.setdefault(row['subject'], set()).add(row['folder'])
    name_of = {row['folder']: os.path.basename(os.path.normpath(row['folder'])) for row in rows}
    if len(set(name_of.values())) < len(name_of):  # a/mine and b/mine
        name_of = {folder: folder for folder in name_of}
    for row in rows:
        if len(folders_of[row['subject']]) > 1:
            row['subject'] = f"{name_of[row['folder']]}/{row['subject']}"

def has_split(data_dir, modalities, split):
    """Whether any session with one of the modalities is in that split."""
    return any(row['split'] == split for row in read_index(data_dir, modalities)[0])

# ---------------------------------------------------------------- files and random numbers

header_lock = Lock()

def open_npy(path):
    """Memory map of a .npy file. OSError, EOFError or ValueError if it is missing, cut short or no array."""
    status = os.stat(path)
    dtype, shape, offset, order = read_header(path, status.st_size, status.st_mtime_ns)
    return np.memmap(path, dtype, 'r', offset, shape, order)

@lru_cache(maxsize=100_000)
def read_header(path, size, changed):
    """What np.memmap needs to know of a .npy file: parsing its header costs more than reading a patch."""
    with header_lock:  # Python's parser fails now and then when several threads are at it
        array = np.load(path, mmap_mode='r')
    return array.dtype, array.shape, array.offset, 'C' if array.flags.c_contiguous else 'F'

def as_float(stored):
    """A stored volume, or part of one, as float32 in [0, 1]; 8-bit ones hold 255 times that."""
    values = np.asarray(stored, np.float32)
    return values / np.float32(255) if stored.dtype == np.uint8 else values

def random(*key):
    """A generator that is a function of its key, a few integers: the run's seed, the purpose, a number."""
    return np.random.default_rng(key)

def torch_seed(*key):
    """The same for torch, as a seed of 32 bits: its generators on a CPU are blind to all above."""
    return int(random(*key).integers(2 ** 32))

@lru_cache(8)
def shuffled(n, seed, epoch):
    return random(seed, 0, epoch).permutation(n)

def generators(batch, seed, purpose, device='cpu'):
    """A torch.Generator per sample that depends on its index alone: the same on any number of processes.

    purpose: 0 to 3, one for each use of a sample's random numbers.
    """
    seeds = [torch_seed(seed, 20 + purpose, k) for k in batch['sample_index'].tolist()]
    return [torch.Generator(device).manual_seed(s) for s in seeds]

def draw(n, position, seed):
    """The element of range(n) at a position of an endless sequence of shuffled epochs."""
    epoch, rest = divmod(position, n)
    return int(shuffled(n, seed, epoch)[rest])

def box_at(start, size):
    """Slices of the box of `size` that starts at `start`."""
    return tuple(slice(s, s + n) for s, n in zip(start, size))

def augmented(volume, start, size, rng, most=1.0):
    """A random variant of the patch of `size` at `start` of a stored (D,H,W) volume, float32 in [0, 1].

    A left-right flip, of volume and place, has probability 0.5, everything else 0.3. Rotation within 6
    degrees about each axis and zoom 0.9 to 1.1 go about the volume's centre, in one linear interpolation.
    The bias field is exp of a random cosine field within +-0.3. Gamma is 0.7 to 1.5. most: values are clipped
    there, None not at all.
    """
    if rng.random() < 0.5:
        volume = volume[::-1]
        start = [len(volume) - size[0] - start[0], *start[1:]]
    if rng.random() < 0.3:
        turn = Rotation.from_euler('xyz', rng.uniform(-6, 6, 3), degrees=True).as_matrix()
        turn /= rng.uniform(0.9, 1.1)
        centre = (np.array(volume.shape) - 1) / 2
        x = ndimage.affine_transform(as_float(volume), turn, centre + turn @ (start - centre), size, order=1)
    else:
        x = as_float(volume[box_at(start, size)])
    if rng.random() < 0.3:
        waves = []
        for s, k, n in zip(start, size, volume.shape):
            frequency = rng.uniform(0.5, 2)
            along = np.linspace(0, 1, n)[s:s + k]
            waves.append(np.cos(np.pi * frequency * along + rng.uniform(0, 2 * np.pi)))
        field = np.einsum('i,j,k->ijk', *waves)
        x = x * np.exp(rng.uniform(-0.3, 0.3) * field).astype(np.float32)
    if rng.random() < 0.3:
        gamma = np.exp(rng.uniform(np.log(0.7), np.log(1.5)))
        x = np.clip(x, 0, most) ** np.float32(gamma)
    return np.clip(x, 0, most)

# ---------------------------------------------------------------- sessions and their batches

class Sessions:
    """The sessions of one split, as batches.

    modalities: those wanted, in the model's order; a session may lack some.
    data_dir, split: as read_index. temperature: 1 draws every session, or scan, equally often; above 1, data
    sets (and modalities, of scans) with few are drawn more often, with probability ~ size^(1/temperature).
    seed, rank, world: of the run and of this process; only batches depend on them. brain_patches: share of
    the patches whose centre is brain, where most of a volume is air. shape: (D,H,W) of every volume.
    box: how scans got there, as arguments of nifti.conform; voxel_mm: its voxels. n: number of sessions.
    scans: [(session, modality index)]. unused: modalities that the data hold besides.

    Every batch is a dict with x (B,1,D,H,W) float32; modality (B,) int64, indices into modalities;
    sample_index (B,) int64, the sample's number in the run, by which random draws are made; files, names of
    the volumes; share, this process's part of the joined batch's volumes, 1.0 when all have the same.
    """
    def __init__(self, data_dir, modalities, split, temperature=1.0, seed=0, rank=0, world=1,
                 brain_patches=0.0):
        self.data_dir, self.modalities, self.temperature = data_dir, tuple(modalities), temperature
        self.seed, self.rank, self.world, self.brain_patches = seed, rank, world, brain_patches
        self.rows, dataset = read_index(data_dir, modalities, split)
        self.shape = tuple(dataset['shape'])
        self.box, self.voxel_mm = box_of(dataset)
        self.n = len(self.rows)
        self.unused = [m for m in dataset.get('modalities', ()) if m not in modalities]
        self.scans = [(i, m) for i in range(self.n) for m in self.present(i)]
        self.session_groups, self.scan_groups = {}, {}
        for i, row in enumerate(self.rows):
            self.session_groups.setdefault(row['folder'], []).append(i)
        for k, (i, m) in enumerate(self.scans):
            self.scan_groups.setdefault((self.rows[i]['folder'], m), []).append(k)

    def present(self, i):
        """Modality indices that session i has."""
        return [m for m, name in enumerate(self.modalities) if self.rows[i].get(name)]

    def file(self, i, m):
        """Name of the volume of session i, modality index m."""
        return self.rows[i][self.modalities[m]]

    def path(self, i, m):
        return os.path.join(self.rows[i]['folder'], self.file(i, m))

    def stored(self, i, m):
        """Memory-mapped (D,H,W) array of session i, modality index m; SystemExit if it is not usable."""
        path = self.path(i, m)
        try:
            array = open_npy(path)
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f'{path}: unreadable ({e}); delete it and run prepare.py again')
        if array.shape != self.shape:
            raise SystemExit(f'{path}: shape {array.shape}, dataset.json says {self.shape}')
        return array

    def volume(self, i, m):
        """The same as float32 in [0, 1]."""
        return as_float(self.stored(i, m))

    def labels(self, i):
        """Session i's label map (column dseg) as int16. SystemExit with one line if it has none."""
        row = self.rows[i]
        path = os.path.join(row['folder'], row.get('dseg') or '(no dseg)')
        try:
            return np.asarray(open_npy(path), np.int16)
        except (OSError, EOFError, ValueError) as e:
            raise SystemExit(f"{path}: no label map of {row['subject']} to draw images from ({e})")

    def checksums(self):
        """{folder: what read_checksums says of it}."""
        folders = {row['folder'] for row in self.rows}
        return {folder: read_checksums(folder) for folder in folders}

    def verify(self, count=8):
        """SystemExit if a volume is missing, or one of `count` random ones is spoilt (checksums.json)."""
        checksums = self.checksums()
        names = {folder: set(os.listdir(folder)) for folder in checksums}
        for i, m in self.scans:
            if self.file(i, m) not in names[self.rows[i]['folder']]:
                raise SystemExit(f'{self.path(i, m)}: missing; run prepare.py again')
        for k in random(0, 12).permutation(len(self.scans))[:count]:
            i, m = self.scans[k]
            volume = np.ascontiguousarray(self.stored(i, m))
            known = checksums[self.rows[i]['folder']]
            if known and zlib.crc32(volume) != known.get(self.file(i, m)):
                raise SystemExit(f'{self.path(i, m)}: not the volume that prepare.py wrote (checksum); '
                                 'delete it and run prepare.py again')

    def choose(self, groups, position):
        """The element at a position of the run: of shuffled epochs, or of a group drawn by its size."""
        if self.temperature == 1:
            return draw(sum(map(len, groups.values())), position, self.seed)
        rng = random(self.seed, 13, position)
        members = list(groups.values())
        weights = np.array([len(group) for group in members]) ** (1 / self.temperature)
        group = members[rng.choice(len(members), p=weights / weights.sum())]
        return group[rng.integers(len(group))]

    def patch_size(self, patch):
        """(D,H,W) of a patch, at most the volume's size per axis; () for whole volumes."""
        return tuple(min(p, n) for p, n in zip(patch or self.shape, self.shape))

    def patch_start(self, volume, size, rng):
        """Where a random patch of `size` of a stored volume begins; of brain_patches the centre is brain."""
        in_brain = self.brain_patches > 0 and rng.random() < self.brain_patches
        for _ in range(100):
            start = rng.integers(0, np.subtract(self.shape, size) + 1)
            centre = tuple(start + np.array(size) // 2)
            if not in_brain or volume[centre] > 0: break
        return start.tolist()

    def session_batch(self, step, batch_size, patch=(), labels=False, micro_steps=1):
        """Batch of sessions, every modality that each has, whole or as patches at one random position.

        batch_size: sessions per process. labels: also labels (B,1,D,H,W) int16, the sessions' whole label
        maps, and starts, where the patches begin.
        micro_steps: so many successive batches make a step, of which the shares are parts.
        returns a batch as above with, besides, session (B,) int64, row of the index; pairs (P,2) int64, every
            ordered pair (source, target) of rows of one session; pair_share, this process's part of the
            joined batch's pairs
        """
        size = self.patch_size(patch)
        first = (step * self.world + self.rank) * batch_size  # position in the run
        x, modality, session, sample_index, files, maps, pairs = [], [], [], [], [], [], []
        for position in range(first, first + batch_size):
            i = self.choose(self.session_groups, position)
            present = self.present(i)
            start = self.patch_start(self.stored(i, present[0]), size, random(self.seed, 1, position))
            box = box_at(start, size)
            first_row = len(x)
            for m in present:
                x.append(as_float(self.stored(i, m)[box]))
                modality.append(m)
                session.append(i)
                sample_index.append(position * len(self.modalities) + m)
                files.append(self.file(i, m))
                if labels:
                    maps.append((self.labels(i), start))
            rows = range(first_row, len(x))
            pairs += [(source, target) for source in rows for target in rows if source != target]
        batch = as_batch(x, modality, sample_index, files, maps)
        batch['session'] = torch.tensor(session)
        batch['pairs'] = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        batch['share'], batch['pair_share'] = self.shares(step, batch_size, micro_steps)
        return batch

    def shares(self, step, batch_size, micro_steps):
        """This batch's part of its step's volumes and pairs, times the number of batches."""
        first = (step - step % micro_steps) * batch_size * self.world
        positions = range(first, first + micro_steps * batch_size * self.world)
        counts = [len(self.present(self.choose(self.session_groups, p))) for p in positions]
        counts = np.array(counts).reshape(micro_steps, self.world, batch_size)
        volumes = counts.sum(2)
        pairs = (counts * (counts - 1)).sum(2)
        mine = step % micro_steps, self.rank
        return volumes.size * volumes[mine] / volumes.sum(), pairs.size * pairs[mine] / max(pairs.sum(), 1)

    def scan_batch(self, step, batch_size, patch=(), augment=False, labels=False):
        """Batch of single scans, of whichever modality, whole or as patches at random places.

        batch_size: scans per process. augment: see augmented(). labels: as in session_batch.
        """
        size = self.patch_size(patch)
        most = 1.0 if self.box.get('clip', True) else None
        sample_index = (step * self.world + self.rank) * batch_size + np.arange(batch_size)
        x, modality, files, maps = [], [], [], []
        for position in sample_index.tolist():
            i, m = self.scans[self.choose(self.scan_groups, position)]
            rng, volume = random(self.seed, 4, position), self.stored(i, m)
            start = self.patch_start(volume, size, rng)
            box = box_at(start, size)
            x.append(augmented(volume, start, size, rng, most) if augment else as_float(volume[box]))
            modality.append(m)
            files.append(self.file(i, m))
            if labels:
                maps.append((self.labels(i), start))
        return as_batch(x, modality, sample_index, files, maps)

    def slice_batch(self, step, batch_size, axis=None, min_brain=0.02, per_volume=8):
        """Batch of slices across `axis` (None: drawn per step), x with that axis of length 1.

        batch_size: slices per process. Slices with less than min_brain of brain are left out. per_volume:
        consecutive slices of the joined batch come from one volume, since an axial or sagittal slice touches
        the whole file; a volume with fewer brain slices gives some twice.
        """
        if axis is None:
            axis = int(random(self.seed, 2, step).integers(3))
        sample_index = (step * self.world + self.rank) * batch_size + np.arange(batch_size)
        x, modality, files = [], [], []
        for position, members in groupby(sample_index.tolist(), lambda k: k // per_volume):
            i, m, slices = self.brain_slices(axis, position, min_brain, per_volume)
            files.append(self.file(i, m))
            for k in members:
                image = slices[k % per_volume % len(slices)]
                x.append(np.expand_dims(image, axis))
                modality.append(m)
        return as_batch(x, modality, sample_index, files)

    def brain_slices(self, axis, position, min_brain, count):
        """Session, modality index and up to `count` random slices across `axis`, at a position of the run."""
        rng, scan = random(self.seed, 3, position), self.choose(self.scan_groups, position)
        for _ in range(100):
            i, m = self.scans[scan]
            volume = self.stored(i, m)
            slices = []
            order = rng.permutation(volume.shape[axis])
            for k in range(0, len(order), count):  # several at once: across the last axis each reads all
                block = np.moveaxis(volume.take(order[k:k + count], axis), axis, 0)
                block = np.ascontiguousarray(block)
                enough = [np.count_nonzero(image) >= min_brain * image.size for image in block]
                slices += [as_float(image) for image, keep in zip(block, enough) if keep]
                if len(slices) >= count: break
            if slices:
                return i, m, slices[:count]
            scan = rng.integers(len(self.scans))
        raise SystemExit(f'{self.data_dir}: no slice with {min_brain:.0%} brain in 100 volumes; '
                         'is the background exactly 0?')

def say_sessions(train, held_out):
    """Print what there is to train on, to validate on (None: nothing) and not in use."""
    print0(f'{train.data_dir}: {train.n} training sessions, {held_out.n if held_out else 0} for validation, '
           f'volumes {train.shape}, modalities {", ".join(train.modalities)}')
    if train.unused:
        print0(f'not used: {", ".join(train.unused)}; --modalities names those that are')
    if not held_out:
        print0('no validation split: best.pt will not be written')

def as_batch(x, modality, sample_index, files, maps=()):
    """A process's own batch as a dict; see Sessions."""
    batch = {
        'x': torch.from_numpy(np.stack(x))[:, None],
        'modality': torch.tensor(modality),
        'sample_index': torch.as_tensor(sample_index),
        'files': files,
        'share': 1.0,
    }
    if maps:
        labels, starts = zip(*maps)
        batch['labels'] = torch.from_numpy(np.stack(labels))[:, None]
        batch['starts'] = starts
    return batch

# ---------------------------------------------------------------- loading ahead

def prefetch(make_batch, steps, device, threads=4):
    """Yield make_batch(step) for each step, on `device`, prepared by threads while the model computes.

    A batch depends on its step alone, so threads change nothing but time: on a network disk, or augmenting,
    one is too slow. 'sample_index' stays on the CPU: it seeds generators, and asking a device for it would
    mean waiting. A GPU copies a batch while it still computes the step before.
    """
    on_gpu = device.startswith('cuda')
    copies = torch.cuda.Stream(device) if on_gpu else None

    def prepared(step):
        batch = make_batch(step)
        return tree_map_only(torch.Tensor, torch.Tensor.pin_memory, batch) if on_gpu else batch

    steps, waiting = iter(steps), []
    with ThreadPoolExecutor(threads) as pool:
        for step in steps:
            waiting.append(pool.submit(prepared, step))
            if len(waiting) > threads:
                yield to_device(waiting.pop(0).result(), device, copies)
        while waiting:
            yield to_device(waiting.pop(0).result(), device, copies)

def to_device(batch, device, copies=None):
    """The tensors of a batch but sample_index on a device; copies from pinned memory do not wait.

    copies: a CUDA stream for them, whose end the current one waits for; None for the current one.
    """
    travels = {key: value for key, value in batch.items() if key != 'sample_index'}
    with torch.cuda.stream(copies) if copies else nullcontext():
        moved = tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), travels)
    if copies:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        # until the current stream has read it, its memory is not given away
        tree_map_only(torch.Tensor, lambda x: x.record_stream(current), moved)
    return batch | moved
