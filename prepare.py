"""Make training data: phantoms, or NIfTI scans reoriented, resampled, boxed, scaled and split by subject.

    python prepare.py --source=phantom --n=40 --shape=32,48,32           # needs no input
    python prepare.py --source=bids --root=BIDS --out_dir=data/mine      # sub-*/[ses-*/]anat/*_T1w.nii.gz
    python prepare.py --source=csv --root=scans.csv --out_dir=data/mine  # subject, session, modality, path
    python prepare.py --source=folder --root=DIR --out_dir=data/mine     # names with subject and modality
    python prepare.py config/data_ixi.py --root=IXI --dry_run=True       # look first, make nothing

Writes sub-XX_ses-XX_MODALITY.npy (D,H,W) in [0,1], subjects.tsv, dataset.json, checksums.json and report.txt
into out_dir. Start it again after an interruption: what is written stays. See nifti.py for a scan's way.
"""
import hashlib
import json
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
from nibabel.affines import voxel_sizes

import synth
from common import configure, make_out_dir, write_text
from judge import figures
from judge.report import show
from scans import labels, masks, nifti, preflight, sources
from scans.files import printable, tsv
from scans.folders import find_folder
from scans.nifti import save_npy
from scans.people import Unread, person_of, read_people
from scans.report import copy_doubts, name_doubts, rate, report, shape_warning
from scans.register import register as register_rigidly
from scans.workers import run_in_workers, stop

# ---------------------------------------------------------------- settings
# what to read
source = 'phantom'        # phantom | bids | csv | folder | pattern | ukb | labelmaps, images made from them
root = ''                 # a directory; of csv the table, which may also have columns sex, age, split
pattern = ''              # of pattern: paths below root; see find_pattern in sources.py
entities = ()             # of bids: what a name must hold, such as space-MNI152NLin6Asym
modalities = ()           # () for all that are found; of made images T1w, T2w, FLAIR
n = 40                    # phantoms, or sessions made from label maps
thickness_mm = 1.0        # of labelmaps: slices up to so thick, along an axis drawn per image
people = ''               # spreadsheet saved as .csv or .tsv, for sex and age
columns = ('subject', 'sex', 'age')  # its columns
sex_codes = ()            # what its values mean, such as 1=M,2=F; M, F, male and female are known
# what to do with a scan
mask = ''                 # brain masks beside it or below root, with {subject}, {session}, {modality} and *
skullstrip = ''           # or a command that makes a brain of a head: "CMD {in} {out}"
register = False          # rigidly register a session's scans onto its first one
min_coverage = 0.5        # scans that show less of the brain than another one of a session are left out
shape = (144, 192, 144)   # box in voxels (left-right, posterior-anterior, inferior-superior)
spacing_mm = 1.0
resize = False            # stretch the field of view over the box instead of cutting it out (DeCo-VAE)
percentiles = (0.5, 99.5) # intensities that become 0 and 1
clip = True               # False keeps what lies above 1 for training (DeCo-VAE's code); metrics clip it
percentiles_of = 'brain'  # or 'volume', background and all (DeCo-VAE, with 0,99.5)
# what to write
out_dir = 'data/phantom'
split = (0.8, 0.1, 0.1)   # train, val, test; by a hash of the subject's name; see split_subjects
dtype = 'float32'         # or float16: errors up to 0.00025; or uint8: up to 0.002, below 0.004 up to 0.004
seed = 0                  # of phantoms and of the split
# how to run
dry_run = False           # only look at the scans: a table and contact sheets in out_dir/preflight
shard = ''                # i/n: every n-th session from the i-th (0 to n-1) on; without it to finish
workers = -1              # processes; -1 for one per core, 1 for none but this
strict = False            # stop at the first bad scan instead of leaving it out

FINDERS = {'bids': sources.find_bids, 'csv': sources.find_csv, 'folder': find_folder,
           'pattern': sources.find_pattern, 'ukb': sources.find_ukb}
MADE = ('phantom', 'labelmaps')  # the other sources, whose images are made here
ORDER = ('T1w', 'T2w', 'FLAIR', 'PD')  # the first one present gives a session its grid
# what makes the data what they are: a folder keeps to one choice, in dataset.json
RECIPE = ('source', 'shape', 'spacing_mm', 'resize', 'percentiles', 'clip', 'percentiles_of', 'split',
          'dtype', 'seed')

def check_settings():
    """SystemExit with one line for a setting that cannot be."""
    def require(holds, name, need):
        if not holds: raise SystemExit(f'--{name}={globals()[name]}: {need}')

    require(source in (*MADE, *FINDERS), 'source', ', '.join((*MADE, *FINDERS)))
    require(len(shape) == 3 and all(type(size) is int and 8 <= size <= 1024 for size in shape), 'shape',
            'three sizes of 8 to 1024 voxels')
    require(np.prod(shape, dtype=float) <= 2 ** 29, 'shape', 'at most 2^29 voxels in all')
    require(len(split) == 3 and abs(sum(split) - 1) < 1e-6 and min(split) >= 0, 'split',
            'three fractions that add to 1')
    require(dtype in ('float32', 'float16', 'uint8'), 'dtype', 'float32, float16 or uint8')
    require(dtype != 'uint8' or clip, 'dtype', 'holds nothing above 1: it needs --clip=True')
    require(len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100, 'percentiles',
            'two numbers, rising, within 0 and 100')
    require(percentiles_of in ('brain', 'volume'), 'percentiles_of', 'brain or volume')
    require(0.05 <= spacing_mm <= 50, 'spacing_mm', 'must be positive, from 0.05 to 50 mm')
    require(0 <= min_coverage <= 1, 'min_coverage', 'from 0 to 1')
    try:
        mask.format(subject='', session='', modality='')
    except (KeyError, ValueError, IndexError, AttributeError, TypeError):
        require(False, 'mask', 'may hold {subject}, {session}, {modality} and *')
    require(not (mask and skullstrip), 'mask', 'this or --skullstrip, one of them')
    require(not skullstrip or '{in}' in skullstrip and '{out}' in skullstrip, 'skullstrip',
            'a command with {in} and {out}')
    if skullstrip:
        masks.command_words(skullstrip)
    if source in MADE:
        any_contrast = source == 'labelmaps'
        made = [*synth.TISSUE, *(['random1', 'random2', '...'] if any_contrast else [])]
        fine = [m in synth.TISSUE or any_contrast and synth.is_random(m) for m in modalities]
        require(all(fine), 'modalities', f"made images are {', '.join(made)}")
        require(n >= 1, 'n', 'at least 1')
        require(not dry_run, 'dry_run', 'looks at scans; phantoms and images of label maps are made')

# ---------------------------------------------------------------- which sessions

@dataclass
class Session:
    """A session to prepare."""
    subject: str
    name: str
    scans: dict      # {modality: path}; a label map is a dseg
    number: int = 0  # of a phantom, or of a session made from label maps

@dataclass
class Finding:
    """What there is to prepare. notes: lines on files left out; doubts: on what a user should look at."""
    sessions: list
    persons: dict          # {(subject, session): {'sex', 'age', 'split'}}, as far as known
    notes: list
    doubts: list

def find_sessions():
    if source == 'phantom':
        return Finding([Session(f'sub-{i:03d}', 'ses-01', {}, i) for i in range(1, n + 1)], {}, [], [])
    if not root: raise SystemExit(f'--source={source} needs --root=PATH, where the scans are')
    if not os.path.exists(root): raise SystemExit(f'--root={root}: no such file or folder')
    return find_maps() if source == 'labelmaps' else find_scans()

def find_maps():
    sessions, notes = [], []
    maps = list(labels.find_labelmaps(root, notes).items())
    if not maps: raise SystemExit(f'{root}: no label maps (.nii, .nii.gz, .mgz) there')
    for k in range(n):
        subject, path = maps[k % len(maps)]
        sessions.append(Session(subject, f'ses-{k // len(maps):04d}', {'dseg': path}, k))
    return Finding(sessions, {}, notes, name_doubts({subject for subject, _ in maps}))

def find_scans():
    sessions, notes, doubts = [], [], []
    options = {'bids': [entities], 'pattern': [pattern]}.get(source, [])
    scans_of, tree = FINDERS[source](root, notes, *options, doubts=doubts)
    tables, subjects = [tree], {subject for subject, _ in scans_of}
    doubts[:0] = name_doubts(subjects)  # first: of many doubts the report shows 50
    if people:
        unread = Unread()
        tables.append(read_people(people, columns, sex_codes, subjects, set(scans_of), unread))
        doubts += unread.lines()
    there = sorted({m for scans in scans_of.values() for m in scans})
    sources.check_modalities(root, there, modalities)
    for (subject, name), scans in sorted(scans_of.items()):
        scans = {m: path for m, path in scans.items() if m in modalities or not modalities}
        if scans:
            sessions.append(Session(subject, name, scans))
    if not sessions:
        hint = f' ({notes[0]})' if notes else ''
        raise SystemExit(f'{root}: no scans found for --source={source}{hint}')
    persons = {key: person_of(tables, *key) for key in scans_of}
    return Finding(sessions, persons, notes, doubts)

# ---------------------------------------------------------------- one session, in a worker process

def new_facts(session):
    """What is known of a session before anything is made of it.

    By modality: files, orientation (LPS), spacing (1x1x1). By file: checksums. lost: fraction of the brain
    outside the box. skipped, registered: a line per scan. estimated: scans whose mask is a guess. doubts:
    lines on odd headers and sizes. Later: voxel_mm; of phantoms sex, age; made_from, seconds, peak_mib.
    """
    return {'subject': session.subject, 'session': session.name, 'files': {}, 'checksums': {}, 'lost': 0.0,
            'skipped': [], 'orientation': {}, 'spacing': {}, 'estimated': [], 'registered': [], 'doubts': []}

def in_order(names):
    """Modalities in ORDER, then the others by name."""
    return [m for m in ORDER if m in names] + sorted(set(names) - set(ORDER))

def made_modalities():
    return modalities or ORDER[:3]

def stored(volume, dtype):
    """A volume in [0,1] as it is stored; as uint8 255 times that, and at least 1 where it is above 0."""
    if dtype != 'uint8': return volume.astype(dtype)
    return np.where(volume > 0, np.maximum(np.round(255 * volume), 1), 0).astype(np.uint8)

def write_volume(facts, modality, volume, native=None):
    """Store a session's volume; note its file, checksum and the Native of what it comes from."""
    name = f"{facts['subject']}_{facts['session']}_{modality}.npy"
    facts['files'][modality] = name
    facts['checksums'][name] = save_npy(f'{out_dir}/{name}', volume)
    if native:
        facts['orientation'][modality] = native.orientation
        facts['spacing'][modality] = 'x'.join(f'{v:.2g}' for v in native.spacing_mm)

def write_made(facts, made, native=None):
    """Scale and write what synth made: images {modality: volume} and labels."""
    inside = made['labels'] > 0
    for modality, volume in made['images'].items():
        scaled, _, _ = nifti.scale_intensity(volume, inside, percentiles, percentiles_of, clip)
        write_volume(facts, modality, stored(scaled, dtype))
    write_volume(facts, 'dseg', made['labels'], native)

def make_phantom(session):
    phantom = synth.phantom(session.number, shape, seed, made_modalities())
    facts = new_facts(session) | {'sex': phantom['sex'], 'age': f"{phantom['age']:.1f}",
                                  'voxel_mm': (synth.EXTENT / np.array(shape)).tolist()}
    write_made(facts, phantom)
    return facts

def make_from_labels(session):
    facts, path = new_facts(session), session.scans['dseg']
    try:
        values, affine, native = nifti.read(path)
        label_map, doubts = labels.structures(values)
        variant = synth.variant(label_map, voxel_sizes(affine), shape, spacing_mm, made_modalities(),
                                (seed, session.number), thickness_mm)
    except ValueError as e:
        facts['skipped'].append(str(e) if str(e).startswith(path) else f'{path}: {e}')
        return facts
    facts['lost'] = variant['lost']
    facts['doubts'] += [f'{path}: {line}' for line in doubts]
    write_made(facts, variant, native)
    return facts

@dataclass
class Scan:
    """A scan as nifti.read gives it, and its brain mask, None where it is to be found."""
    modality: str
    path: str
    volume: np.ndarray
    affine: np.ndarray
    native: nifti.Native
    mask: np.ndarray = None

def read_scan(session, modality):
    """Scan; ValueError with one line where it or its mask cannot be used."""
    path = session.scans[modality]
    scan = Scan(modality, path, *nifti.read(path))
    if mask:
        brain, affine = masks.read_mask(mask, path, root, session.subject, session.name, modality)
    elif skullstrip:
        brain, affine, _ = masks.strip_skull(skullstrip, path, scan.volume, scan.native)
        brain = brain != 0
    else:
        return scan
    scan.mask = nifti.resample(brain.astype(np.float32), affine, scan.affine, scan.volume.shape) > 0.5
    if not scan.mask.any(): raise ValueError(f'{path}: its brain mask is empty or lies elsewhere')
    return scan

def register_scans(scans, facts):
    """Move the affines of later scans onto the first one; one that fails keeps its affine."""
    first = scans[0]
    for scan in scans[1:]:
        try:
            scan.affine, moved = register_rigidly(first.volume, first.affine, scan.volume, scan.affine)
        except (ValueError, IndexError, MemoryError) as e:
            facts['registered'].append(f'{scan.modality} moved 0.0 mm, NOT USED: {e}')
            continue
        failure = f", NOT USED: {moved['reason']}" if moved['reason'] else ''
        facts['registered'].append(f"{scan.modality} moved {moved['moved_mm']:.1f} mm, likeness "
                                   f"{moved['nmi_before']:.3f} -> {moved['nmi_after']:.3f}{failure}")

def make_session(session):
    """Read, conform and write scans; one that cannot be used is left out with its reason."""
    facts, scans = new_facts(session), []
    for modality in in_order(session.scans):
        try:
            scans.append(read_scan(session, modality))
        except ValueError as e:
            facts['skipped'].append(str(e))
    if register and scans:
        register_scans(scans, facts)
    while scans:
        try:
            boxes, placement = nifti.conform(
                [scan.volume for scan in scans], [scan.affine for scan in scans], shape, spacing_mm, resize,
                percentiles, percentiles_of, clip, [scan.mask for scan in scans], min_coverage)
            break
        except ValueError as e:
            reason, k = e.args
            facts['skipped'].append(f'{scans.pop(k).path}: {reason}')
    if not scans: return facts
    for scan, box, estimated, doubts in zip(scans, boxes, placement.estimated, placement.doubts):
        write_volume(facts, scan.modality, stored(box, dtype), scan.native)
        facts['doubts'] += [f'{scan.path}: {line}' for line in (*scan.native.doubts, *doubts)]
        if estimated:
            facts['estimated'].append(scan.path)
    facts['lost'] = placement.lost
    facts['voxel_mm'] = voxel_sizes(placement.affine).tolist()
    return facts

def origin(session):
    """What a session is made from: files, masks and their times, and settings that RECIPE lacks."""
    made_from = {}
    for modality, path in session.scans.items():
        made_from[modality] = nifti.dated(path)
        if mask:
            brain = masks.dated_mask(mask, path, root, session.subject, session.name, modality)
            made_from[modality].append(brain)
    how = [mask, skullstrip, register, thickness_mm] + ([min_coverage] if min_coverage != 0.5 else [])
    return made_from | {'how': how}

def facts_path(session):
    return f'{out_dir}/.facts/{session.subject}_{session.name}.json'

def is_whole(name):
    """Whether a volume of the right shape is there; np.load refuses a file that is cut short."""
    try:
        return np.load(f'{out_dir}/{name}', mmap_mode='r').shape == shape
    except (OSError, EOFError, ValueError):
        return False

def earlier_facts(session, made_from):
    """Facts of an earlier run, if it made whole volumes from the same in the same way; else None.

    A scan that a command failed on, perhaps for want of memory, is tried again.
    """
    try:
        with open(facts_path(session)) as f:
            facts = new_facts(session) | json.load(f)  # an earlier version's may lack some
        same = facts['made_from'] == made_from and facts['checksums']
    except (OSError, ValueError, KeyError):
        return None
    if any('--skullstrip' in line for line in facts['skipped']): return None
    wanted = set(made_modalities() if source in MADE else ())
    whole = wanted <= set(facts['files']) and all(map(is_whole, facts['files'].values()))
    return facts if same and whole else None

def prepare_session(session):
    """Facts of a session, of an earlier run or made now; SystemExit if strict and a scan is left out."""
    made_from = origin(session)
    facts = earlier_facts(session, made_from)
    if not facts:
        start = time.perf_counter()
        make = {'phantom': make_phantom, 'labelmaps': make_from_labels}.get(source, make_session)
        try:
            facts = make(session) | {'made_from': made_from, 'seconds': time.perf_counter() - start}
            facts['peak_mib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            write_text(facts_path(session), json.dumps(facts))
        except OSError as e:  # of reading, ValueErrors tell
            raise SystemExit(f'{out_dir}: cannot write there ({e.strerror or e}); make room and start again; '
                             'what is written stays')
    if strict and facts['skipped']: raise SystemExit(f"{facts['skipped'][0]} (--strict=True)")
    return facts

def examine_session(session):
    box_mm = () if resize else [size * spacing_mm for size in shape]
    return preflight.examine(session.subject, session.name, session.scans, box_mm)

def use_settings(config):
    """The start of a worker process, which knows the defaults alone."""
    globals().update(config)

def run_all(task, sessions):
    """[task(session)] of all sessions, in whatever order; one worker is this process itself."""
    return run_in_workers(task, sessions, workers, use_settings, config)

# ---------------------------------------------------------------- the whole

PARTS = ('train', 'val', 'test')

def hash_of(subject, seed):
    """A number in [0, 1) that depends on the subject's name and the seed alone."""
    digest = hashlib.sha256(f'{seed}:{subject}'.encode()).hexdigest()
    return int(digest[:16], 16) / 16 ** 16

def split_of(subject, fractions, seed):
    """train, val or test from a hash of the subject's name: the same however many others there are."""
    u = hash_of(subject, seed)
    if u < fractions[0]: return 'train'
    return 'val' if u < fractions[0] + fractions[1] else 'test'

def split_subjects(subjects, fractions, seed):
    """{subject: part}: each by its hash alone, unless a part that is wanted would stay empty.

    Then the subjects in the order of their hashes fill exact counts (the largest remainders are rounded up),
    at least one a part. So few subjects cannot stay where they are when others join.
    """
    alone = {subject: split_of(subject, fractions, seed) for subject in subjects}
    wanted = {part for part, fraction in zip(PARTS, fractions) if fraction > 0}
    if wanted <= set(alone.values()) or len(alone) < len(wanted): return alone
    order = sorted(alone, key=partial(hash_of, seed=seed))
    exact = [fraction * len(order) for fraction in fractions]
    counts = [max(int(share), int(share > 0)) for share in exact]
    while sum(counts) != len(order):
        step = 1 if sum(counts) < len(order) else -1
        missing = [step * (share - count) for share, count in zip(exact, counts)]
        free = [i for i in range(3) if counts[i] > 1 or (step > 0 and exact[i] > 0)]
        counts[max(free, key=missing.__getitem__)] += step
    filled = [part for part, count in zip(PARTS, counts) for _ in range(count)]
    return dict(zip(order, filled))

def claim_out_dir():
    """The RECIPE as a dict, and the folder's from now on; SystemExit if it holds data of another."""
    path = f'{out_dir}/dataset.json'
    recipe = json.loads(json.dumps({name: globals()[name] for name in RECIPE}))  # tuples become lists
    if os.path.exists(path):
        try:
            with open(path) as f:
                old = json.load(f)
        except ValueError:
            raise SystemExit(f'{path}: not JSON; delete the folder or choose another --out_dir')
        for name, value in recipe.items():
            if old.get(name) != value:
                raise SystemExit(f'{out_dir}: holds data made with {name}={old.get(name)}, not {value}; '
                                 'choose another --out_dir or delete it')
    make_out_dir(f'{out_dir}/.facts')
    if not os.path.exists(path):
        write_text(path, json.dumps(recipe, indent=1))
    return recipe

def parse_shard():
    """The setting shard, i/n, as two numbers; 0, 1 where it is ''."""
    part, _, parts = (shard or '0/1').partition('/')
    if part.isdigit() and parts.isdigit() and int(part) < int(parts): return int(part), int(parts)
    raise SystemExit(f'--shard={shard}: i/n with i from 0 to n-1, such as 0/8')

def index_rows(facts, names, persons):
    """Rows of subjects.tsv, a dict per session. names: of the modalities."""
    rows = []
    unknown = [f for f in facts if not persons.get((f['subject'], f['session']), {}).get('split')]
    parts = split_subjects({f['subject'] for f in unknown}, split, seed)  # a table knows the others
    for f in facts:
        person = persons.get((f['subject'], f['session']), {})
        rows.append({
            'subject': f['subject'], 'session': f['session'],
            'split': person.get('split') or parts[f['subject']],
            **{name: f['files'].get(name, '') for name in (*names, 'dseg')},
            'sex': f.get('sex') or person.get('sex', ''), 'age': f.get('age') or person.get('age', ''),
            'lost': f"{f['lost']:.4f}"})
    return rows

def write_index(facts, used, recipe, finding):
    """Write the files about the whole. used: facts of the sessions that have a volume."""
    names = in_order({m for f in used for m in f['files']} - {'dseg'})
    rows = index_rows(used, names, finding.persons)
    doubts = copy_doubts(used, out_dir) + finding.doubts
    text = printable(report(facts, rows, finding.notes, doubts))
    dataset = recipe | {
        'modalities': names,
        'axes': 'RAS+',
        'labels': {str(k): v for k, v in synth.LABELS.items()} if source in MADE else {},
        'voxel_mm': np.median([f.get('voxel_mm', [spacing_mm] * 3) for f in used], 0).tolist(),
        'sessions': dict(Counter(row['split'] for row in rows)),
    }
    checksums = {name: checksum for f in used for name, checksum in f['checksums'].items()}
    write_text(f'{out_dir}/dataset.json', json.dumps(dataset, indent=1))
    write_text(f'{out_dir}/checksums.json', json.dumps(checksums, indent=0))
    write_text(f'{out_dir}/report.txt', text)
    table = printable(tsv([rows[0], *[row.values() for row in rows]]))
    write_text(f'{out_dir}/subjects.tsv', table)  # last: without it the folder is no data
    size = os.path.getsize(f"{out_dir}/{next(iter(used[0]['checksums']))}")
    print(f'{text}{rate(used, size)}\nwritten to {printable(out_dir)}')

def look(finding):
    """Print what is there and what is odd; write a table and contact sheets to out_dir/preflight."""
    rows = [row for rows in run_all(examine_session, finding.sessions) for row in rows]
    rows.sort(key=lambda row: (row['subject'], row['session'], row['modality']))
    folder = f'{out_dir}/preflight'
    make_out_dir(folder)
    show(printable(preflight.report(rows, finding.notes, finding.doubts)))
    write_text(f'{folder}/scans.tsv', printable(preflight.table(rows)))
    for modality, volumes in preflight.contact_sheets(rows).items():
        figures.contact_sheet(f'{folder}/{modality}.png', volumes)
    print(f'\n{folder}/scans.tsv; nothing else was written')

def main():
    check_settings()
    if shape_warning(shape):
        print(shape_warning(shape))
    finding = find_sessions()
    if dry_run: return look(finding)
    part, parts = parse_shard()
    sessions = finding.sessions[part::parts]
    recipe = claim_out_dir()
    facts = run_all(prepare_session, sessions)
    if shard:
        print(f'shard {shard}: {len(facts)} sessions are written; once all {parts} are, '
              'run without --shard to finish')
        return
    facts.sort(key=lambda f: (f['subject'], f['session']))
    used = [f for f in facts if f['files']]
    if not used:
        raise SystemExit(f"{root}: every scan was skipped, the first because {facts[0]['skipped'][0]}")
    write_index(facts, used, recipe, finding)

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt as interrupt:
        stop(out_dir, interrupt.args)
