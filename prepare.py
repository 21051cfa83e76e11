"""Make training data: phantoms, or NIfTI scans reoriented, resampled, boxed, scaled and split by subject.

    python prepare.py --source=phantom --n=40 --shape=32,48,32 --out_dir=data/phantom       # needs no input
    python prepare.py --source=bids   --root=/path/to/bids --out_dir=data/mine              # sub-*/[ses-*/]anat/*_T1w.nii.gz
    python prepare.py --source=csv    --root=scans.csv     --out_dir=data/mine              # subject, session, modality, path[, sex, age, split]
    python prepare.py --source=folder --root=/path/to/nii  --out_dir=data/mine              # names that hold subject and modality

Writes out_dir/sub-XX_ses-XX_MODALITY.npy (D,H,W) in [0,1], subjects.tsv, dataset.json, checksums.json and report.txt. Start it again after an
interruption: what is written stays. See nifti.py for what happens to a scan.
"""
import csv
import glob
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

import nifti
import synth
from common import configure, make_out_dir, write_text

# ---------------------------------------------------------------- settings
source = 'phantom'        # phantom | bids | csv | folder
root = ''                 # of bids and folder: a directory; of csv: the table
out_dir = 'data/phantom'
shape = (144, 192, 144)   # box in voxels (left-right, posterior-anterior, inferior-superior)
spacing_mm = 1.0
resize = False            # stretch the field of view over the box, voxels not isotropic, instead of cutting a box out (DeCo-VAE)
percentiles = (0.5, 99.5) # intensities that become 0 and 1
clip = True               # False keeps intensities above 1 for training (DeCo-VAE's code); metrics clip them
percentiles_of = 'brain'  # or 'volume', background and all (DeCo-VAE, with 0,99.5)
modalities = ()           # () for all that are found; of phantoms: T1w, T2w, FLAIR
n = 40                    # phantoms
split = (0.8, 0.1, 0.1)   # train, val, test; a subject's part follows from a hash of its name
dtype = 'float32'         # or float16: half the disk, errors up to 0.00025
seed = 0                  # of phantoms and of the split
workers = -1              # processes; -1 for one per core, 1 for none but this
strict = False            # stop at the first bad scan instead of leaving it out

BOX = ('shape', 'spacing_mm', 'resize', 'percentiles', 'percentiles_of', 'clip')  # how a scan gets into its box: nifti.conform
ORDER = ('T1w', 'T2w', 'FLAIR', 'PD')  # the first one present gives a session its grid
SUFFIXES = {'t1w': 'T1w', 't1': 'T1w', 'mprage': 'T1w', 't2w': 'T2w', 't2': 'T2w', 'flair': 'FLAIR', 't2flair': 'FLAIR',
            'pd': 'PD', 'pdw': 'PD'}

# ---------------------------------------------------------------- finding scans

def clean(kind, text, where):
    """A subject, session or modality as part of a file name, with its prefix; refused if it holds anything else than a name."""
    text = str(text).strip()
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.+-]*', text) or '..' in text:
        raise SystemExit(f'{where}: {kind} {text!r}: only letters, digits and -_.+ may be in a name')
    if kind == 'modality': return SUFFIXES.get(text.lower(), text)
    prefix = {'subject': 'sub-', 'session': 'ses-'}[kind]
    return text if text.startswith(prefix) else prefix + text

def add_scan(sessions, subject, session, modality, path, notes):
    scans = sessions[subject, session]
    if modality in scans: notes.append(f'{path}: another {modality} of {subject} {session}, {scans[modality]} is used')
    else: scans[modality] = path

def find_bids(root, notes):
    """sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz] -> sessions {(subject, session): {modality: path}}, people {subject: columns}."""
    sessions, people = defaultdict(dict), {}
    for path in sorted(glob.glob(f'{root}/sub-*/anat/*.nii*') + glob.glob(f'{root}/sub-*/ses-*/anat/*.nii*')):
        parts = os.path.relpath(path, root).split(os.sep)
        stem = re.sub(r'\.nii(\.gz)?$', '', parts[-1])
        suffix = stem.split('_')[-1]
        modality = SUFFIXES.get(suffix.lower(), suffix if suffix[:1].isupper() else '')
        if not modality: notes.append(f'{path}: not a scan that is known ({suffix})')
        else: add_scan(sessions, parts[0], parts[1] if len(parts) == 4 else 'ses-01', modality, path, notes)
    table = os.path.join(root, 'participants.tsv')
    for row in read_table(table) if os.path.exists(table) else []:
        person = row.get('participant_id', '')
        known = {k: v for k, v in row.items() if v and v.lower() not in ('n/a', 'nan')}
        people[person if person.startswith('sub-') else 'sub-' + person] = {'sex': known.get('sex') or known.get('gender') or '', 'age': known.get('age', '')}
    return sessions, people

def find_csv(table, notes):
    """A table with columns subject, session, modality, path and perhaps sex, age, split."""
    sessions, people = defaultdict(dict), {}
    rows = read_table(table)
    missing = {'subject', 'session', 'modality', 'path'} - set(rows[0] if rows else ())
    if missing: raise SystemExit(f"{table}: no column {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, 2):
        where = f'{table} line {number}'
        subject, session, modality = (clean(k, row[k] or ('01' if k == 'session' else ''), where) for k in ('subject', 'session', 'modality'))
        part = (row.get('split') or '').strip()
        if part not in ('', 'train', 'val', 'test'): raise SystemExit(f'{where}: split {part!r}: train, val or test')
        person = people.setdefault(subject, {'sex': row.get('sex') or '', 'age': row.get('age') or '', 'split': part})
        if person['split'] != part: raise SystemExit(f"{where}: subject {subject} is in two splits ({person['split'] or 'none'} and {part or 'none'})")
        add_scan(sessions, subject, session, modality, os.path.join(os.path.dirname(os.path.abspath(table)), row['path']), notes)
    return sessions, people

def find_folder(root, notes):
    """Every .nii[.gz] below root whose name, or its folder's and its own, hold subject and modality: 01_T1w.nii.gz, 01/t1.nii."""
    sessions = defaultdict(dict)
    for path in sorted(glob.glob(f'{root}/**/*.nii', recursive=True) + glob.glob(f'{root}/**/*.nii.gz', recursive=True)):
        names = re.sub(r'\.nii(\.gz)?$', '', os.path.relpath(path, root)).split(os.sep)
        words = [w for name in names for w in name.split('_')]
        kinds = [w for w in words if w.lower() in SUFFIXES]
        others = [w for w in words if w not in kinds]
        visits = [w for w in others if w.startswith('ses-')]
        subject = next((w for w in others if w not in visits), '')
        if not kinds or not subject: notes.append(f'{path}: subject and modality cannot be told from the name')
        else: add_scan(sessions, clean('subject', subject, path), visits[0] if visits else 'ses-01', SUFFIXES[kinds[-1].lower()], path, notes)
    return sessions, {}

def read_table(path):
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            return list(csv.DictReader(f, delimiter='\t' if path.endswith('.tsv') else ','))
    except (OSError, UnicodeDecodeError, csv.Error) as e: raise SystemExit(f'{path}: cannot read this table ({e})')

# ---------------------------------------------------------------- one session, in a worker process

def npy_path(s, subject, session, modality):
    return os.path.join(s['out_dir'], f'{subject}_{session}_{modality}.npy')

def is_written(path, s):
    """A whole volume of the right shape; np.load of a memory map checks the file's length against its header."""
    try: array = np.load(path, mmap_mode='r')
    except (OSError, ValueError): return False
    return array.shape == tuple(s['shape'])

def save_npy(path, array):
    """Write beside, then rename: a half-written volume never has its final name. returns the checksum of its voxels."""
    array = np.ascontiguousarray(array)
    part = os.path.join(os.path.dirname(path), f'.part{os.getpid()}_{os.path.basename(path)}')
    np.save(part, array)
    os.replace(part, path)
    return zlib.crc32(array)

def facts_path(s, subject, session):
    return os.path.join(s['out_dir'], '.facts', f'{subject}_{session}.json')

def make_phantom(s, index):
    p = synth.phantom(index, tuple(s['shape']), s['seed'], tuple(s['modalities']))
    facts = {'subject': p['subject'], 'session': p['session'], 'sex': p['sex'], 'age': f"{p['age']:.1f}", 'files': {}, 'checksums': {}, 'lost': 0.0,
             'skipped': [], 'orientation': {}, 'spacing': {}, 'estimated': []}
    for modality, volume in {**p['images'], 'dseg': p['labels']}.items():
        path = npy_path(s, p['subject'], p['session'], modality)
        if modality != 'dseg': volume = nifti.scale_intensity(volume, p['labels'] > 0, s['percentiles'], s['percentiles_of'], s['clip'])[0].astype(s['dtype'])
        facts['files'][modality] = os.path.basename(path)
        facts['checksums'][os.path.basename(path)] = save_npy(path, volume)
    return facts

def make_session(s, subject, session, scans):
    """Read, conform and write one session's scans; a scan that cannot be used is left out with its reason."""
    facts = {'subject': subject, 'session': session, 'files': {}, 'checksums': {}, 'lost': 0.0, 'skipped': [], 'orientation': {}, 'spacing': {}, 'estimated': []}
    good = []
    for modality in sorted(scans, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m)):
        try: good.append((modality, *nifti.read(scans[modality])))
        except ValueError as e: facts['skipped'].append(str(e))
    while good:
        try:
            boxes, placement = nifti.conform([g[1] for g in good], [g[2] for g in good], **{k: s[k] for k in BOX})
            break
        except ValueError as e:
            k = e.args[1]
            facts['skipped'].append(f'{scans[good[k][0]]}: {e.args[0]}')
            del good[k]
    for k, (modality, _, _, native) in enumerate(good):
        path = npy_path(s, subject, session, modality)
        facts['files'][modality] = os.path.basename(path)
        facts['checksums'][os.path.basename(path)] = save_npy(path, boxes[k].astype(s['dtype']))
        facts['orientation'][modality] = native.orientation
        facts['spacing'][modality] = 'x'.join(f'{v:.2g}' for v in native.spacing_mm)
        if placement.estimated[k]: facts['estimated'].append(scans[modality])
    if good:
        facts['lost'] = placement.lost
        facts['voxel_mm'] = [float(v) for v in np.sqrt((placement.affine[:3, :3] ** 2).sum(0))]
    return facts

def work(s, job):
    """Facts of one session, from an earlier run where its volumes are written and were made from the same files."""
    made_from = {m: [p, os.path.getmtime(p) if os.path.exists(p) else 0] for m, p in job[2].items()} if s['source'] != 'phantom' else {}
    subject, session = job[0], job[1]
    try:
        with open(facts_path(s, subject, session)) as f: facts = json.load(f)
        wanted = set(s['modalities'] if s['source'] == 'phantom' else ())
        if facts['made_from'] == made_from and wanted <= set(facts['files']) and facts['checksums'] and \
           all(is_written(os.path.join(s['out_dir'], name), s) for name in facts['files'].values()): return facts
    except (OSError, ValueError, KeyError): pass
    facts = make_phantom(s, job[2]) if s['source'] == 'phantom' else make_session(s, *job)
    facts['made_from'] = made_from
    write_text(facts_path(s, subject, session), json.dumps(facts))
    return facts

def work_all(s, jobs):
    """Facts of every job as they come; one worker is this process itself."""
    if s['workers'] == 1:
        yield from (work(s, job) for job in jobs)
        return
    os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')  # one thread for each worker
    with ProcessPoolExecutor(os.cpu_count() if s['workers'] < 1 else s['workers']) as pool:
        futures = [pool.submit(work, s, job) for job in jobs]
        try:
            for future in as_completed(futures): yield future.result()
        finally: pool.shutdown(cancel_futures=True)  # what has not begun never will, if the caller stops

# ---------------------------------------------------------------- the whole

def split_of(subject, fractions, seed):
    """train, val or test from a hash of the subject's name: the same however many others there are."""
    place = int(hashlib.sha256(f'{seed}:{subject}'.encode()).hexdigest()[:16], 16) / 16 ** 16
    return 'train' if place < fractions[0] else 'val' if place < fractions[0] + fractions[1] else 'test'

def claim_out_dir(s):
    """Write dataset.json, or refuse if the folder holds data of other settings."""
    path = os.path.join(s['out_dir'], 'dataset.json')
    keep = {k: list(v) if isinstance(v, tuple) else v for k, v in s.items() if k in ('source', *BOX, 'dtype', 'split', 'seed')}
    if os.path.exists(path):
        try:
            with open(path) as f: old = json.load(f)
        except ValueError: raise SystemExit(f'{path}: not JSON; delete the folder or choose another --out_dir')
        for k, v in keep.items():
            if old.get(k) != v: raise SystemExit(f"{s['out_dir']}: holds data made with {k}={old.get(k)}, not {v}; choose another --out_dir or delete it")
    make_out_dir(os.path.join(s['out_dir'], '.facts'))
    return keep

def report(facts, table, notes):
    """The closing report as text."""
    skipped = [line for f in facts for line in f['skipped']]
    count = lambda key: ', '.join(f'{k} {v}' for k, v in Counter(v for f in facts for v in f[key].values()).most_common(8)) or 'phantoms'
    cropped = sorted(((f['lost'], f"{f['subject']} {f['session']}") for f in facts if f['lost'] > 0), reverse=True)
    estimated = [p for f in facts for p in f['estimated']]
    splits = Counter(row['split'] for row in table)
    lines = [f"{len({row['subject'] for row in table})} subjects, {len(table)} sessions",
             'scans: ' + ', '.join(f'{m} {k}' for m, k in Counter(m for f in facts for m in f['files'] if m != 'dseg').items()),
             'sessions per split: ' + ', '.join(f'{p} {splits[p]}' for p in ('train', 'val', 'test')),
             f"orientations found: {count('orientation')}", f"spacings found (mm): {count('spacing')}"]
    lines += [f'warning: no subject in split {p}; give --split, more subjects, or a split column' for p in ('train', 'val', 'test') if not splits[p]]
    if cropped: lines.append(f'{len(cropped)} brains did not fit the box; most was lost of {cropped[0][1]}: {cropped[0][0]:.1%} of its voxels')
    if estimated: lines += [f'warning: {len(estimated)} scans have no zero background; taken as raw head scans, masked by a threshold:', *[f'  {p}' for p in estimated[:20]]]
    if notes: lines += [f'{len(notes)} files not used:', *[f'  {line}' for line in notes[:50]]]
    lines += [f'{len(skipped)} scans skipped:', *[f'  {line}' for line in skipped]] if skipped else ['no scan was skipped']
    return '\n'.join(lines) + '\n'

def main(s):
    if len(s['shape']) != 3 or min(s['shape']) < 8: raise SystemExit(f"--shape={s['shape']}: three sizes of at least 8 voxels")
    if len(s['split']) != 3 or abs(sum(s['split']) - 1) > 1e-6 or min(s['split']) < 0: raise SystemExit(f"--split={s['split']}: three fractions that add to 1")
    if s['dtype'] not in ('float32', 'float16'): raise SystemExit(f"--dtype={s['dtype']}: float32 or float16")
    if len(s['percentiles']) != 2 or not 0 <= s['percentiles'][0] < s['percentiles'][1] <= 100: raise SystemExit(f"--percentiles={s['percentiles']}: two numbers, rising, within 0 and 100")
    if s['percentiles_of'] not in ('brain', 'volume'): raise SystemExit(f"--percentiles_of={s['percentiles_of']}: brain or volume")
    if s['spacing_mm'] <= 0: raise SystemExit(f"--spacing_mm={s['spacing_mm']}: must be positive")
    notes, people = [], {}
    if s['source'] == 'phantom':
        s['modalities'] = s['modalities'] or ORDER[:3]
        unknown = [m for m in s['modalities'] if m not in synth.TISSUE]
        if unknown: raise SystemExit(f"--modalities: phantoms have {', '.join(synth.TISSUE)}, not {', '.join(unknown)}")
        jobs = [(f'sub-{i:03d}', 'ses-01', i) for i in range(1, s['n'] + 1)]
    else:
        find = {'bids': find_bids, 'csv': find_csv, 'folder': find_folder}.get(s['source'])
        if not find: raise SystemExit(f"--source={s['source']}: phantom, bids, csv or folder")
        if not os.path.exists(s['root']): raise SystemExit(f"--root={s['root']}: no such file or folder")
        sessions, people = find(s['root'], notes)
        if s['modalities']:
            for m in s['modalities']:
                if not any(m in scans for scans in sessions.values()): raise SystemExit(f"{s['root']}: no scan of modality {m}")
            sessions = {k: {m: p for m, p in scans.items() if m in s['modalities']} for k, scans in sessions.items()}
        jobs = [(*k, scans) for k, scans in sorted(sessions.items()) if scans]
        if not jobs: raise SystemExit(f"{s['root']}: no scans found for --source={s['source']}" + (f' ({notes[0]})' if notes else ''))
    keep = claim_out_dir(s)
    write_text(os.path.join(s['out_dir'], 'dataset.json'), json.dumps(keep, indent=1))

    facts, coming = [], work_all(s, jobs)
    try:
        for done in tqdm(coming, total=len(jobs), desc='sessions', mininterval=1):
            facts.append(done)
            if s['strict'] and done['skipped']: raise SystemExit(f"{done['skipped'][0]} (--strict=True)")
    finally: coming.close()
    facts.sort(key=lambda f: (f['subject'], f['session']))
    used = [f for f in facts if f['files']]
    if not used: raise SystemExit(f"{s['root']}: every scan was skipped, the first because {facts[0]['skipped'][0]}")

    found = [m for m in {m: 0 for f in used for m in f['files']} if m != 'dseg']
    columns = sorted(found, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))
    table = [{'subject': f['subject'], 'session': f['session'],
              'split': people.get(f['subject'], {}).get('split') or split_of(f['subject'], s['split'], s['seed']),
              **{m: f['files'].get(m, '') for m in columns}, 'dseg': f['files'].get('dseg', ''),
              'sex': f.get('sex') or people.get(f['subject'], {}).get('sex', ''), 'age': f.get('age') or people.get(f['subject'], {}).get('age', ''),
              'lost': f"{f['lost']:.4f}"} for f in used]
    text = report(facts, table, notes)
    labels = {str(k): v for k, v in synth.LABELS.items()} if s['source'] == 'phantom' else {}
    write_text(os.path.join(s['out_dir'], 'dataset.json'), json.dumps(keep | {
        'modalities': columns, 'axes': 'RAS+', 'voxel_mm': np.median([f.get('voxel_mm', [s['spacing_mm']] * 3) for f in used], 0).tolist(), 'labels': labels,
        'sessions': dict(Counter(row['split'] for row in table))}, indent=1))
    write_text(os.path.join(s['out_dir'], 'checksums.json'), json.dumps({name: c for f in used for name, c in f['checksums'].items()}, indent=0))
    write_text(os.path.join(s['out_dir'], 'report.txt'), text)
    write_text(os.path.join(s['out_dir'], 'subjects.tsv'), '\n'.join(  # last: without it the folder does not count as data
        '\t'.join(str(v) for v in line) for line in [list(table[0]), *[row.values() for row in table]]) + '\n')
    print(text + f"written to {s['out_dir']}")

if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
