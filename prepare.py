"""Make training data: phantoms, or NIfTI scans reoriented, resampled, boxed, scaled and split by subject.

    python prepare.py --source=phantom --n=40 --shape=32,48,32 --out_dir=data/phantom       # needs no input
    python prepare.py --source=bids   --root=/path/to/bids --out_dir=data/mine              # sub-*/[ses-*/]anat/*_T1w.nii.gz
    python prepare.py --source=csv    --root=scans.csv     --out_dir=data/mine              # subject, session, modality, path[, sex, age, split]
    python prepare.py --source=folder --root=/path/to/nii  --out_dir=data/mine              # names that hold subject and modality
    python prepare.py --source=pattern --root=/path --pattern='{subject}/{session}/*/{modality}.nii.gz' --out_dir=data/mine
    python prepare.py --source=labelmaps --root=/path/to/maps --n=500 --out_dir=data/labelmaps  # images made from label maps
    python prepare.py config/data_ixi.py --root=/path/to/IXI --dry_run=True                 # look first, make nothing

Writes out_dir/sub-XX_ses-XX_MODALITY.npy (D,H,W) in [0,1], subjects.tsv, dataset.json, checksums.json and report.txt. Start it again after an
interruption: what is written stays. See nifti.py for what happens to a scan.
"""
import glob
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

from scans import nifti
from scans import preflight
from scans import sources
import synth
from common import configure, make_out_dir, write_text
from data import BOX
from scans.register import register as register_rigidly

# ---------------------------------------------------------------- settings
source = 'phantom'        # phantom | labelmaps | bids | csv | folder | pattern | ixi | ukb
root = ''                 # a directory; of csv: the table
# of source='pattern': paths below root, with {subject}, {modality}, perhaps {session}, and * for any name
pattern = ''
# of bids: only files with all of these in their names, such as space-MNI152NLin6Asym
entities = ()
people = ''               # spreadsheet saved as .csv or .tsv, for sex and age
columns = ('subject', 'sex', 'age')  # its columns
sex_codes = ()            # what its values mean, such as 1=M,2=F
# brain masks: files beside the scan, or paths below root, with {subject}, {session}, {modality} and *
mask = ''
skullstrip = ''           # or a command that makes a brain of a head: "CMD {in} {out}"
register = False          # rigidly register a session's scans onto its first one
dry_run = False           # only look at every scan: a table and contact sheets in out_dir/preflight, no data
# i/n: only every n-th session from the i-th (0 to n-1) on; run once more without it to finish
shard = ''
out_dir = 'data/phantom'
shape = (144, 192, 144)   # box in voxels (left-right, posterior-anterior, inferior-superior)
spacing_mm = 1.0
# stretch the field of view over the box, voxels not isotropic, instead of cutting a box out (DeCo-VAE)
resize = False
percentiles = (0.5, 99.5) # intensities that become 0 and 1
clip = True               # False keeps intensities above 1 for training (DeCo-VAE's code); metrics clip them
percentiles_of = 'brain'  # or 'volume', background and all (DeCo-VAE, with 0,99.5)
modalities = ()           # () for all that are found; of phantoms: T1w, T2w, FLAIR
n = 40                    # phantoms, or sessions made from label maps
thickness_mm = 1.0        # of labelmaps: slices up to so thick, along an axis drawn per image
split = (0.8, 0.1, 0.1)   # train, val, test; a subject's part follows from a hash of its name
# or float16: half the disk, errors up to 0.00025; or uint8: a quarter, up to 0.002, below 0.004 up to 0.004
dtype = 'float32'
seed = 0                  # of phantoms and of the split
workers = -1              # processes; -1 for one per core, 1 for none but this
strict = False            # stop at the first bad scan instead of leaving it out

ORDER = ('T1w', 'T2w', 'FLAIR', 'PD')  # the first one present gives a session its grid

# ---------------------------------------------------------------- one session, in a worker process

def npy_path(s, subject, session, modality):
    return os.path.join(s['out_dir'], f'{subject}_{session}_{modality}.npy')

def is_written(path, s):
    """A whole volume of the right shape; np.load of a memory map checks the file's length against its header."""
    try:
        array = np.load(path, mmap_mode='r')
    except (OSError, EOFError, ValueError):
        return False
    return array.shape == tuple(s['shape'])

def stored(volume, dtype):
    """A volume in [0,1] as it is stored; as uint8 it is 255 times that, and at least 1 where it is above 0."""
    if dtype != 'uint8': return volume.astype(dtype)
    return np.where(volume > 0, np.maximum(np.round(255 * volume), 1), 0).astype(np.uint8)

def save_npy(path, array):
    """Write beside, then rename: a half-written volume never has its final name. returns the checksum of its voxels."""
    array = np.ascontiguousarray(array)
    part = os.path.join(os.path.dirname(path), f'.part{os.getpid()}_{os.path.basename(path)}')
    np.save(part, array)
    os.replace(part, path)
    return zlib.crc32(array)

def facts_path(s, subject, session):
    return os.path.join(s['out_dir'], '.facts', f'{subject}_{session}.json')

def no_facts(subject, session):
    """What is known of a session before anything is made of it: files, checksums, spacings, ... by modality; what went wrong."""
    return {
        'subject': subject,
        'session': session,
        'files': {},
        'checksums': {},
        'lost': 0.0,
        'skipped': [],
        'orientation': {},
        'spacing': {},
        'estimated': [],
        'registered': [],
    }

def make_phantom(s, subject, session, index):
    p = synth.phantom(index, tuple(s['shape']), s['seed'], tuple(s['modalities']))
    facts = no_facts(subject, session) | {'sex': p['sex'], 'age': f"{p['age']:.1f}"}
    write_images(s, facts, p['images'], p['labels'])
    return facts

def make_from_labels(s, subject, session, job):
    """One deformed variant of a label map, and images made from it; a map that cannot be used is left out with its reason. job: (path, number)."""
    (path, number), facts = job, no_facts(subject, session)
    try:
        volume, affine, native = nifti.read(path)
        v = synth.variant(
            volume.astype(np.int16),
            np.sqrt((affine[:3, :3] ** 2).sum(0)),
            s['shape'],
            s['spacing_mm'],
            tuple(s['modalities']),
            (s['seed'], number),
            s['thickness_mm'],
        )
    except ValueError as e:
        facts['skipped'].append(str(e) if str(e).startswith(path) else f'{path}: {e}')
        return facts
    facts |= {
        'lost': v['lost'],
        'orientation': {'dseg': native.orientation},
        'spacing': {'dseg': 'x'.join(f'{w:.2g}' for w in native.spacing_mm)},
    }
    write_images(s, facts, v['images'], v['labels'])
    return facts

def write_images(s, facts, images, labels):
    """Scale and write a session that comes with its label map."""
    for modality, volume in {**images, 'dseg': labels}.items():
        path = npy_path(s, facts['subject'], facts['session'], modality)
        if modality != 'dseg':
            volume = stored(
                nifti.scale_intensity(volume, labels > 0, s['percentiles'], s['percentiles_of'], s['clip'])[
                    0
                ],
                s['dtype'],
            )
        facts['files'][modality] = os.path.basename(path)
        facts['checksums'][os.path.basename(path)] = save_npy(path, volume)

def brain_of(s, subject, session, modality, path):
    """A scan read, and its brain mask where one is given: volume, affine, Native, bool mask or None. ValueError with one line."""
    volume, affine, native = nifti.read(path)
    if s['mask']:
        names = {
            s['mask'].format(subject=a, session=b, modality=modality)
            for a in (subject, subject.removeprefix('sub-'))
            for b in (session, session.removeprefix('ses-'))
        }
        for folder in (os.path.dirname(path), s['root']):
            if found := sorted({file for name in names for file in glob.glob(os.path.join(folder, name))}):
                break
        if len(found) != 1:
            raise ValueError(f"{path}: {len(found)} files fit its mask, {' or '.join(sorted(names))}")
        inside, its_affine, _ = nifti.read(found[0])
        return (
            volume,
            affine,
            native,
            nifti.resample((inside > 0).astype(np.float32), its_affine, affine, volume.shape) > 0.5,
        )
    if s['skullstrip']:
        with tempfile.TemporaryDirectory() as folder:
            given, made = os.path.join(folder, 'head.nii.gz'), os.path.join(folder, 'brain.nii.gz')
            nifti.write(given, volume, native)
            command = [word.format(**{'in': given, 'out': made}) for word in shlex.split(s['skullstrip'])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not os.path.exists(made):
                raise ValueError(
                    f"{path}: --skullstrip ended with {done.returncode}"
                    f" ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
                )
            brain, its_affine, _ = nifti.read(made)
            return (
                volume,
                affine,
                native,
                nifti.resample((brain != 0).astype(np.float32), its_affine, affine, volume.shape) > 0.5,
            )
    return volume, affine, native, None

def register_scans(good, notes):
    """Move the affines of a session's later scans onto its first one; good: [(modality, volume, affine, ...)], changed in place.

    notes: gets a line per scan; where registration fails the scan keeps its affine.
    """
    fixed = good[0]
    for k, (modality, volume, affine, *rest) in enumerate(good[1:], 1):
        new, facts = register_rigidly(fixed[1], fixed[2], volume, affine)
        good[k] = (modality, volume, new, *rest)
        notes.append(
            f"{modality} moved {facts['moved_mm']:.1f} mm, likeness {facts['nmi_before']:.3f} ->"
            f" {facts['nmi_after']:.3f}"
            + (f", NOT USED: {facts['reason']}" if facts['reason'] else '')
        )

def make_session(s, subject, session, scans):
    """Read, conform and write one session's scans; a scan that cannot be used is left out with its reason."""
    facts, good = no_facts(subject, session), []
    for modality in sorted(scans, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m)):
        try:
            good.append((modality, *brain_of(s, subject, session, modality, scans[modality])))
        except ValueError as e:
            facts['skipped'].append(str(e))
    if s['register'] and good:
        register_scans(good, facts['registered'])
    while good:
        try:
            boxes, placement = nifti.conform(
                [g[1] for g in good],
                [g[2] for g in good],
                **{k: s[k] for k in BOX},
                masks=[g[4] for g in good],
            )
            break
        except ValueError as e:
            k = e.args[1]
            facts['skipped'].append(f'{scans[good[k][0]]}: {e.args[0]}')
            del good[k]
    for k, (modality, _, _, native, _) in enumerate(good):
        path = npy_path(s, subject, session, modality)
        facts['files'][modality] = os.path.basename(path)
        facts['checksums'][os.path.basename(path)] = save_npy(path, stored(boxes[k], s['dtype']))
        facts['orientation'][modality] = native.orientation
        facts['spacing'][modality] = 'x'.join(f'{v:.2g}' for v in native.spacing_mm)
        if placement.estimated[k]:
            facts['estimated'].append(scans[modality])
    if good:
        facts['lost'] = placement.lost
        facts['voxel_mm'] = [float(v) for v in np.sqrt((placement.affine[:3, :3] ** 2).sum(0))]
    return facts

def work(s, job):
    """Facts of one session, from an earlier run where its volumes are written and were made from the same files in the same way."""
    subject, session, scans = job
    paths = {} if s['source'] == 'phantom' else {'dseg': scans[0]} if s['source'] == 'labelmaps' else scans
    made_from = {
        m: [p, os.path.getmtime(f) if os.path.exists(f := nifti.file_of(p)) else 0] for m, p in paths.items()
    }
    made_from['how'] = [s[k] for k in ('mask', 'skullstrip', 'register', 'thickness_mm')]
    try:
        with open(facts_path(s, subject, session)) as f:
            facts = no_facts(subject, session) | json.load(f)  # an earlier version's may lack some
        wanted = set(s['modalities'] if s['source'] in ('phantom', 'labelmaps') else ())
        if facts['made_from'] == made_from and wanted <= set(facts['files']) and facts['checksums'] and \
           all(is_written(os.path.join(s['out_dir'], name), s) for name in facts['files'].values()):
            return facts
    except (OSError, ValueError, KeyError):
        pass
    start = time.perf_counter()
    facts = {'phantom': make_phantom, 'labelmaps': make_from_labels}.get(s['source'], make_session)(s, *job)
    facts |= {
        'made_from': made_from,
        'seconds': time.perf_counter() - start,
        'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    write_text(facts_path(s, subject, session), json.dumps(facts))
    return facts

def run_all(task, s, jobs):
    """task(s, job) of every job as they come; one worker is this process itself."""
    if s['workers'] == 1:
        yield from (task(s, job) for job in jobs)
        return
    os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')  # one thread for each worker
    with ProcessPoolExecutor(os.cpu_count() if s['workers'] < 1 else s['workers']) as pool:
        futures = [pool.submit(task, s, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # what has not begun never will, if the caller stops

# ---------------------------------------------------------------- the whole

def split_of(subject, fractions, seed):
    """train, val or test from a hash of the subject's name: the same however many others there are."""
    place = int(hashlib.sha256(f'{seed}:{subject}'.encode()).hexdigest()[:16], 16) / 16 ** 16
    return 'train' if place < fractions[0] else 'val' if place < fractions[0] + fractions[1] else 'test'

def claim_out_dir(s):
    """The settings that make the data what they are; refused if the folder holds data of others, written to dataset.json if it holds none."""
    path = os.path.join(s['out_dir'], 'dataset.json')
    keep = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in s.items()
        if k in ('source', *BOX, 'dtype', 'split', 'seed')
    }
    if os.path.exists(path):
        try:
            with open(path) as f:
                old = json.load(f)
        except ValueError:
            raise SystemExit(f'{path}: not JSON; delete the folder or choose another --out_dir')
        for k, v in keep.items():
            if old.get(k) != v:
                raise SystemExit(
                    f"{s['out_dir']}: holds data made with {k}={old.get(k)}, not {v}; choose another"
                    " --out_dir or delete it"
                )
    make_out_dir(os.path.join(s['out_dir'], '.facts'))
    if not os.path.exists(path):
        write_text(path, json.dumps(keep, indent=1))
    return keep

def report(facts, table, notes):
    """The closing report as text."""
    skipped = [line for f in facts for line in f['skipped']]
    count = (
        lambda key: ', '.join(
            f'{k} {v}' for k, v in Counter(v for f in facts for v in f[key].values()).most_common(8)
        )
        or 'phantoms'
    )
    cropped = sorted(
        ((f['lost'], f"{f['subject']} {f['session']}") for f in facts if f['lost'] > 0), reverse=True
    )
    estimated = [p for f in facts for p in f['estimated']]
    splits = Counter(row['split'] for row in table)
    lines = [
        f"{len({row['subject'] for row in table})} subjects, {len(table)} sessions",
        'scans: '
        + ', '.join(
            f'{m} {k}' for m, k in Counter(m for f in facts for m in f['files'] if m != 'dseg').items()
        ),
        'sessions per split: ' + ', '.join(f'{p} {splits[p]}' for p in ('train', 'val', 'test')),
        f"orientations found: {count('orientation')}",
        f"spacings found (mm): {count('spacing')}",
    ]
    lines += [
        f'warning: no subject in split {p}; give --split, more subjects, or a split column'
        for p in ('train', 'val', 'test')
        if not splits[p]
    ]
    if cropped:
        lines.append(
            f'{len(cropped)} brains did not fit the box; most was lost of {cropped[0][1]}:'
            f' {cropped[0][0]:.1%} of its voxels'
        )
    if estimated:
        lines += [
            (
                f'warning: {len(estimated)} scans have no zero background; taken as raw head scans, masked by'
                ' a threshold:'
            ),
            *[f'  {p}' for p in estimated[:20]],
        ]
    moved = [f"  {f['subject']} {f['session']}: {line}" for f in facts for line in f['registered']]
    if moved:
        lines += [
            (
                f'{len(moved)} scans registered, {sum("NOT USED" in line for line in moved)} of them without'
                ' success:'
            ),
            *moved[:50],
        ]
    if notes:
        lines += [f'{len(notes)} files not used:', *[f'  {line}' for line in notes[:50]]]
    lines += (
        [f'{len(skipped)} scans skipped:', *[f'  {line}' for line in skipped]]
        if skipped
        else ['no scan was skipped']
    )
    return '\n'.join(lines) + '\n'

def rate(s, facts):
    """Speed, memory of a worker and size, and what they mean for 30,000 scans."""
    scans, seconds = sum(len(set(f['files']) - {'dseg'}) for f in facts), sum(f['seconds'] for f in facts)
    size = os.path.getsize(os.path.join(s['out_dir'], next(iter(facts[0]['files'].values()))))
    peaks = [f['peak_mib'] for f in facts if 'peak_mib' in f]  # not in folders of an earlier version
    return (
        f'{scans / seconds:.2f} scans/s per core'
        + (f', at most {max(peaks)} MiB per worker' if peaks else '')
        + f' and {size} bytes a scan: 30,000 scans would take {30000 * seconds / scans / 3600:.1f} core hours'
        f' and {30000 * size / 1e9:.0f} GB'
    )

def parse_shard(text):
    """'i/n' -> i, n; (0, 1) for ''."""
    part, _, parts = (text or '0/1').partition('/')
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise SystemExit(f'--shard={text}: i/n with i from 0 to n-1, such as 0/8')
    return int(part), int(parts)

def find_jobs(s):
    """What to make: [(subject, session, what make_... takes)], {subject: its sex, age, split}, and notes on files left out."""
    notes, who = [], {}
    if s['source'] not in FINDERS: raise SystemExit(f"--source={s['source']}: {', '.join(FINDERS)}")
    if s['source'] in ('phantom', 'labelmaps'):
        s['modalities'] = s['modalities'] or ORDER[:3]
        unknown = [
            m
            for m in s['modalities']
            if m not in synth.TISSUE and not (s['source'] == 'labelmaps' and synth.is_random(m))
        ]
        if unknown:
            made = [*synth.TISSUE, *['random1', 'random2', '...'] * (s['source'] == 'labelmaps')]
            raise SystemExit(f"--modalities: made images are {', '.join(made)}, not {', '.join(unknown)}")
        if s['n'] < 1: raise SystemExit(f"--n={s['n']}: at least 1")
    if s['source'] == 'phantom':
        return [(f'sub-{i:03d}', 'ses-01', i) for i in range(1, s['n'] + 1)], who, notes
    if not os.path.exists(s['root']):
        raise SystemExit(f"--root={s['root']}: no such file or folder")
    if s['source'] == 'labelmaps':
        maps = list(sources.find_labelmaps(s['root'], notes).items())
        if not maps: raise SystemExit(f"{s['root']}: no label maps (.nii, .nii.gz) there")
        return (
            [
                (maps[k % len(maps)][0], f'ses-{k // len(maps):04d}', (maps[k % len(maps)][1], k))
                for k in range(s['n'])
            ],
            who,
            notes,
        )
    extra = {'bids': (s['entities'],), 'pattern': (s['pattern'],)}.get(s['source'], ())
    sessions, who = FINDERS[s['source']](s['root'], notes, *extra)
    if s['people']:
        subjects = {subject for subject, _ in sessions}
        who = {
            k: who.get(k, {}) | v
            for k, v in sources.read_people(s['people'], s['columns'], s['sex_codes'], subjects).items()
        }
    if s['modalities']:
        for m in s['modalities']:
            if not any(m in scans for scans in sessions.values()):
                raise SystemExit(f"{s['root']}: no scan of modality {m}")
        sessions = {
            k: {m: p for m, p in scans.items() if m in s['modalities']} for k, scans in sessions.items()
        }
    jobs = [(*k, scans) for k, scans in sorted(sessions.items()) if scans]
    if not jobs:
        raise SystemExit(
            f"{s['root']}: no scans found for --source={s['source']}" + (f' ({notes[0]})' if notes else '')
        )
    return jobs, who, notes

FINDERS = {
    'phantom': None,
    'labelmaps': None,
    'bids': sources.find_bids,
    'csv': sources.find_csv,
    'folder': sources.find_folder,
    'pattern': sources.find_pattern,
    'ixi': sources.find_ixi,
    'ukb': sources.find_ukb,
}

def check_settings(s):
    """SystemExit with one line for a setting that cannot be."""
    if len(s['shape']) != 3 or min(s['shape']) < 8:
        raise SystemExit(f"--shape={s['shape']}: three sizes of at least 8 voxels")
    if len(s['split']) != 3 or abs(sum(s['split']) - 1) > 1e-6 or min(s['split']) < 0:
        raise SystemExit(f"--split={s['split']}: three fractions that add to 1")
    if s['dtype'] not in ('float32', 'float16', 'uint8'):
        raise SystemExit(f"--dtype={s['dtype']}: float32, float16 or uint8")
    if s['dtype'] == 'uint8' and not s['clip']:
        raise SystemExit('--dtype=uint8 holds nothing above 1: it needs --clip=True')
    if len(s['percentiles']) != 2 or not 0 <= s['percentiles'][0] < s['percentiles'][1] <= 100:
        raise SystemExit(f"--percentiles={s['percentiles']}: two numbers, rising, within 0 and 100")
    if s['percentiles_of'] not in ('brain', 'volume'):
        raise SystemExit(f"--percentiles_of={s['percentiles_of']}: brain or volume")
    try:
        s['mask'].format(subject='', session='', modality='')
    except (KeyError, ValueError, IndexError):
        raise SystemExit(f"--mask={s['mask']}: may hold {{subject}}, {{session}}, {{modality}} and *")
    if s['mask'] and s['skullstrip']: raise SystemExit('--mask and --skullstrip: one of them')
    if s['skullstrip'] and not ('{in}' in s['skullstrip'] and '{out}' in s['skullstrip']):
        raise SystemExit(f"--skullstrip={s['skullstrip']}: a command with {{in}} and {{out}}")
    if s['spacing_mm'] <= 0: raise SystemExit(f"--spacing_mm={s['spacing_mm']}: must be positive")

def main(s):
    check_settings(s)
    jobs, who, notes = find_jobs(s)
    if s['dry_run']:
        if s['source'] in ('phantom', 'labelmaps'):
            raise SystemExit('--dry_run looks at scans; phantoms and images of label maps are made')
        found = tqdm(run_all(preflight.examine, s, jobs), total=len(jobs), desc='sessions', mininterval=1)
        return preflight.show(s, [row for rows in found for row in rows], notes)
    part, parts = parse_shard(s['shard'])
    jobs = jobs[part::parts]
    keep = claim_out_dir(s)

    facts, coming = [], run_all(work, s, jobs)
    try:
        for done in tqdm(coming, total=len(jobs), desc='sessions', mininterval=1):
            facts.append(done)
            if s['strict'] and done['skipped']:
                raise SystemExit(f"{done['skipped'][0]} (--strict=True)")
    finally:
        coming.close()
    if s['shard']:
        return print(
            f"shard {s['shard']}: {len(facts)} sessions are written; once all {parts} are, run without"
            " --shard to finish"
        )
    facts.sort(key=lambda f: (f['subject'], f['session']))
    used = [f for f in facts if f['files']]
    if not used:
        raise SystemExit(f"{s['root']}: every scan was skipped, the first because {facts[0]['skipped'][0]}")

    found = [m for m in {m: 0 for f in used for m in f['files']} if m != 'dseg']
    columns = sorted(found, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))
    table = [
        {
            'subject': f['subject'],
            'session': f['session'],
            'split': who.get(f['subject'], {}).get('split') or split_of(f['subject'], s['split'], s['seed']),
            **{m: f['files'].get(m, '') for m in columns},
            'dseg': f['files'].get('dseg', ''),
            'sex': f.get('sex') or who.get(f['subject'], {}).get('sex', ''),
            'age': f.get('age') or who.get(f['subject'], {}).get('age', ''),
            'lost': f"{f['lost']:.4f}",
        }
        for f in used
    ]
    text = report(facts, table, notes)
    labels = {str(k): v for k, v in synth.LABELS.items()} if s['source'] in ('phantom', 'labelmaps') else {}
    write_text(os.path.join(s['out_dir'], 'dataset.json'), json.dumps(keep | {
        'modalities': columns, 'axes': 'RAS+', 'labels': labels,
        'voxel_mm': np.median([f.get('voxel_mm', [s['spacing_mm']] * 3) for f in used], 0).tolist(),
        'sessions': dict(Counter(row['split'] for row in table))}, indent=1))
    write_text(
        os.path.join(s['out_dir'], 'checksums.json'),
        json.dumps({name: c for f in used for name, c in f['checksums'].items()}, indent=0),
    )
    write_text(os.path.join(s['out_dir'], 'report.txt'), text)
    # last: without it the folder does not count as data
    write_text(
        os.path.join(s['out_dir'], 'subjects.tsv'),
        '\n'.join(
            '\t'.join(str(v) for v in line) for line in [list(table[0]), *[row.values() for row in table]]
        )
        + '\n',
    )
    print(f"{text}{rate(s, used)}\nwritten to {s['out_dir']}")

if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
