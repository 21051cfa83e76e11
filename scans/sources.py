"""Where scans are: the trees and tables of cohorts as sessions. Only names and tables are looked at, no scan is opened.

A finder returns sessions {(subject, session): {modality: path}} and people {subject: {'sex', 'age', 'split'}}, and adds a line to
`notes` for every file it leaves out. A path may lead into a zip archive, ARCHIVE.zip/MEMBER; see nifti.read.
"""
import csv
import glob
import os
import re
from collections import defaultdict

SUFFIXES = {
    't1w': 'T1w',
    't1': 'T1w',
    'mprage': 'T1w',
    't2w': 'T2w',
    't2': 'T2w',
    'flair': 'FLAIR',
    't2flair': 'FLAIR',
    'pd': 'PD',
    'pdw': 'PD',
}
NIFTI = re.compile(r'\.nii(\.gz)?$')

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
    if modality in scans:
        notes.append(f'{path}: another {modality} of {subject} {session}, {scans[modality]} is used')
    else:
        scans[modality] = path

def read_table(path):
    """Rows of a .csv or .tsv as dicts."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            return list(csv.DictReader(f, delimiter='\t' if path.endswith('.tsv') else ','))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f'{path}: cannot read this table ({e})')

# ---------------------------------------------------------------- layouts

def find_bids(root, notes, entities=()):
    """sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz], raw or derivatives. entities: such as space-MNI152NLin6Asym, desc-preproc; all must be in the name."""
    sessions, people = defaultdict(dict), {}
    for path in sorted(glob.glob(f'{root}/sub-*/anat/*.nii*') + glob.glob(f'{root}/sub-*/ses-*/anat/*.nii*')):
        parts = os.path.relpath(path, root).split(os.sep)
        words = NIFTI.sub('', parts[-1]).split('_')
        modality = SUFFIXES.get(words[-1].lower(), words[-1] if words[-1][:1].isupper() else '')
        if not modality:
            notes.append(f'{path}: not a scan that is known ({words[-1]})')
        elif not set(entities) <= set(words):
            notes.append(f'{path}: without {", ".join(sorted(set(entities) - set(words)))}')
        else:
            add_scan(sessions, parts[0], parts[1] if len(parts) == 4 else 'ses-01', modality, path, notes)
    table = os.path.join(root, 'participants.tsv')
    for row in read_table(table) if os.path.exists(table) else []:
        person = row.get('participant_id', '')
        known = {k: v for k, v in row.items() if v and v.lower() not in ('n/a', 'nan')}
        person = 'sub-' + person.removeprefix('sub-')
        people[person] = {'sex': known.get('sex') or known.get('gender') or '', 'age': known.get('age', '')}
    return sessions, people

def find_csv(table, notes):
    """A table with columns subject, session, modality, path and perhaps sex, age, split."""
    sessions, people = defaultdict(dict), {}
    rows = read_table(table)
    missing = {'subject', 'session', 'modality', 'path'} - set(rows[0] if rows else ())
    if missing: raise SystemExit(f"{table}: no column {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, 2):
        where = f'{table} line {number}'
        subject, session, modality = (
            clean(k, row[k] or ('01' if k == 'session' else ''), where)
            for k in ('subject', 'session', 'modality')
        )
        part = (row.get('split') or '').strip()
        if part not in ('', 'train', 'val', 'test'):
            raise SystemExit(f'{where}: split {part!r}: train, val or test')
        person = people.setdefault(
            subject, {'sex': row.get('sex') or '', 'age': row.get('age') or '', 'split': part}
        )
        if person['split'] != part:
            raise SystemExit(
                f"{where}: subject {subject} is in two splits ({person['split'] or 'none'} and"
                f" {part or 'none'})"
            )
        add_scan(
            sessions,
            subject,
            session,
            modality,
            os.path.join(os.path.dirname(os.path.abspath(table)), row['path']),
            notes,
        )
    return sessions, people

def find_folder(root, notes):
    """Every .nii[.gz] below root whose name, or its folder's and its own, hold subject and modality: 01_T1w.nii.gz, 01/t1.nii."""
    sessions = defaultdict(dict)
    for path in every_nifti(root):
        words = [
            w for name in NIFTI.sub('', os.path.relpath(path, root)).split(os.sep) for w in name.split('_')
        ]
        kinds = [w for w in words if w.lower() in SUFFIXES]
        others = [w for w in words if w not in kinds]
        visits = [w for w in others if w.startswith('ses-')]
        subject = next((w for w in others if w not in visits), '')
        if not kinds or not subject:
            notes.append(f'{path}: subject and modality cannot be told from the name')
        else:
            add_scan(
                sessions,
                clean('subject', subject, path),
                visits[0] if visits else 'ses-01',
                SUFFIXES[kinds[-1].lower()],
                path,
                notes,
            )
    return sessions, {}

def every_nifti(root):
    return sorted(
        glob.glob(f'{root}/**/*.nii', recursive=True) + glob.glob(f'{root}/**/*.nii.gz', recursive=True)
    )

def find_pattern(root, notes, pattern):
    """Files below root whose relative path fits a pattern such as {subject}/{session}/structural/*/{modality}.nii.gz; * is any name or part."""
    if '{subject}' not in pattern or '{modality}' not in pattern:
        raise SystemExit(
            f'--pattern={pattern}: must hold {{subject}} and {{modality}}, and may hold {{session}} and *'
        )
    seen, text = set(), ''
    for part in re.split(r'(\{\w+\}|\*)', pattern):
        name = part.strip('{}')
        if part == '*':
            text += '[^/]*'
        elif part.startswith('{') and name not in ('subject', 'session', 'modality'):
            raise SystemExit(f'--pattern={pattern}: {part}: only {{subject}}, {{session}} and {{modality}}')
        elif part.startswith('{'):
            text += f'(?P={name})' if name in seen else f'(?P<{name}>[^/]+?)'
        else:
            text += re.escape(part)
        seen.add(name)
    sessions = defaultdict(dict)
    for path in every_nifti(root):
        found = re.fullmatch(text, os.path.relpath(path, root).replace(os.sep, '/'))
        if not found:
            notes.append(f'{path}: does not fit --pattern={pattern}')
        else:
            subject, session, modality = (
                clean(k, found.groupdict().get(k) or '01', path) for k in ('subject', 'session', 'modality')
            )
            add_scan(sessions, subject, session, modality, path, notes)
    return sessions, {}

def find_ixi(root, notes):
    """The extracted archives of brain-development.org: IXI-T1/IXI002-Guys-0828-T1.nii.gz and so on, in whatever folders below root."""
    sessions = defaultdict(dict)
    for path in every_nifti(root):
        found = re.fullmatch(r'(IXI\d+)-(\w+)-(\w+)-(T1|T2|PD)', NIFTI.sub('', os.path.basename(path)))
        if found:
            add_scan(sessions, 'sub-' + found[1], 'ses-01', SUFFIXES[found[4].lower()], path, notes)
        else:
            notes.append(f'{path}: not named as IXI002-Guys-0828-T1')
    return sessions, {}

def find_ukb(root, notes):
    """UK Biobank's bulk field 20252, EID_20252_INSTANCE_0.zip, as downloaded: the T1w in MNI space, its brain extracted."""
    sessions = defaultdict(dict)
    for path in sorted(glob.glob(f'{root}/**/*.zip', recursive=True)):
        found = re.fullmatch(r'(\d+)_20252_(\d)_\d\.zip', os.path.basename(path))
        if found:
            add_scan(
                sessions,
                'sub-' + found[1],
                'ses-' + found[2],
                'T1w',
                f'{path}/T1/T1_brain_to_MNI.nii.gz',
                notes,
            )
        else:
            notes.append(f'{path}: not named as EID_20252_INSTANCE_0.zip')
    return sessions, {}

def find_labelmaps(root, notes):
    """Label maps, one per subject: {subject: path}."""
    maps = {}
    for path in every_nifti(root):
        subject = clean('subject', NIFTI.sub('', os.path.basename(path)).split('_')[0], path)
        if subject in maps:
            notes.append(f'{path}: another label map of {subject}, {maps[subject]} is used')
        else:
            maps[subject] = path
    return maps

# ---------------------------------------------------------------- who they are

def read_people(table, columns, sex_codes, subjects):
    """Sex and age of the subjects from a spreadsheet saved as .csv or .tsv. columns: its names for subject, sex and age.

    sex_codes: such as ('1=M', '2=F'). An id that is a number stands for the one subject whose name holds that number.
    returns {subject: {'sex', 'age'}}; SystemExit if a column is missing or no row fits.
    """
    rows, codes = read_table(table), dict(code.split('=') for code in sex_codes)
    if len(columns) != 3:
        raise SystemExit(f'--columns={columns}: three names, of subject, sex and age')
    for column in columns:
        if rows and column not in rows[0]:
            raise SystemExit(
                f"{table}: no column '{column}'; it has {', '.join(map(repr, rows[0]))}; name yours by"
                " --columns"
            )
    by_number = {}
    for s in subjects:
        by_number.setdefault(int(re.sub(r'\D', '', s) or -1), []).append(s)
    people = {}
    for row in rows:
        who, sex, age = ((row[c] or '').strip() for c in columns)
        names = [s for s in (who, f'sub-{who}') if s in subjects] or (
            by_number.get(int(who), []) if who.isdigit() else []
        )
        if len(names) == 1 and names[0] not in people:
            people[names[0]] = {'sex': codes.get(sex, sex), 'age': age}
    if not people:
        raise SystemExit(
            f'{table}: none of its rows is of a subject that was found, such as'
            f' {next(iter(subjects), "(none)")}'
        )
    return people
