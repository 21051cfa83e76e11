"""Where scans are: the trees and tables of cohorts as sessions. Only names and tables are looked at.

A finder returns sessions {(subject, session): {modality: path}} and people {subject: {'sex', 'age',
'split'}}. It notes every file that it leaves out. A path may lead into a zip archive; see nifti.read.
"""
import csv
import os
import re
from collections import defaultdict
from glob import glob

SUFFIXES = {
    't1w': 'T1w', 't1': 'T1w', 'mprage': 'T1w', 't2w': 'T2w', 't2': 'T2w', 'flair': 'FLAIR',
    't2flair': 'FLAIR', 'pd': 'PD', 'pdw': 'PD'}

def clean(kind, text, where):
    """A subject, session or modality as part of a file name, with its prefix; refused if it is no name."""
    text = str(text).strip()
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.+-]*', text) or '..' in text:
        raise SystemExit(f'{where}: {kind} {text!r}: only letters, digits and -_.+ may be in a name')
    if kind == 'modality': return SUFFIXES.get(text.lower(), text)
    prefix = {'subject': 'sub-', 'session': 'ses-'}[kind]
    return text if text.startswith(prefix) else prefix + text

def stem(path):
    return re.sub(r'\.nii(\.gz)?$', '', path)

def every_nifti(root):
    return sorted(glob(f'{root}/**/*.nii', recursive=True) + glob(f'{root}/**/*.nii.gz', recursive=True))

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

def tsv(rows):
    return ''.join('\t'.join(map(str, row)) + '\n' for row in rows)

# ---------------------------------------------------------------- layouts

def find_bids(root, notes, entities=()):
    """sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz], raw or derivatives.

    entities: such as space-MNI152NLin6Asym, desc-preproc; all must be in the name.
    """
    sessions = defaultdict(dict)
    for path in sorted(glob(f'{root}/sub-*/anat/*.nii*') + glob(f'{root}/sub-*/ses-*/anat/*.nii*')):
        parts = os.path.relpath(path, root).split(os.sep)
        session = parts[1] if len(parts) == 4 else 'ses-01'
        words = stem(parts[-1]).split('_')
        suffix = words[-1]
        lacking = sorted(set(entities) - set(words))
        if suffix.lower() not in SUFFIXES and not suffix[:1].isupper():
            notes.append(f'{path}: not a scan that is known ({suffix})')
        elif lacking:
            notes.append(f'{path}: without {", ".join(lacking)}')
        else:
            add_scan(sessions, parts[0], session, SUFFIXES.get(suffix.lower(), suffix), path, notes)
    return sessions, read_participants(os.path.join(root, 'participants.tsv'))

def read_participants(table):
    """{subject: {'sex', 'age'}} of a participants.tsv, {} where there is none."""
    people = {}
    for row in read_table(table) if os.path.exists(table) else []:
        known = {k: v for k, v in row.items() if v and v.lower() not in ('n/a', 'nan')}
        subject = 'sub-' + row.get('participant_id', '').removeprefix('sub-')
        people[subject] = {'sex': known.get('sex') or known.get('gender') or '', 'age': known.get('age', '')}
    return people

def find_csv(table, notes):
    """A table with columns subject, session, modality, path and perhaps sex, age, split."""
    sessions, people = defaultdict(dict), {}
    rows = read_table(table)
    missing = {'subject', 'session', 'modality', 'path'} - set(rows[0] if rows else ())
    if missing: raise SystemExit(f"{table}: no column {', '.join(sorted(missing))}")
    folder = os.path.dirname(os.path.abspath(table))
    for number, row in enumerate(rows, 2):
        where = f'{table} line {number}'
        subject = clean('subject', row['subject'] or '', where)
        session = clean('session', row['session'] or '01', where)
        modality = clean('modality', row['modality'] or '', where)
        split = (row.get('split') or '').strip()
        if split not in ('', 'train', 'val', 'test'):
            raise SystemExit(f'{where}: split {split!r}: train, val or test')
        person = {'sex': row.get('sex') or '', 'age': row.get('age') or '', 'split': split}
        first = people.setdefault(subject, person)['split']
        if first != split:
            raise SystemExit(f'{where}: subject {subject} is in two splits '
                             f'({first or "none"} and {split or "none"})')
        add_scan(sessions, subject, session, modality, os.path.join(folder, row['path']), notes)
    return sessions, people

def find_folder(root, notes):
    """Every .nii[.gz] below root with subject and modality in its path: 01_T1w.nii.gz, 01/t1.nii."""
    sessions = defaultdict(dict)
    for path in every_nifti(root):
        words = re.split('[_/]', stem(os.path.relpath(path, root)).replace(os.sep, '/'))
        modalities = [SUFFIXES[w.lower()] for w in words if w.lower() in SUFFIXES]
        visits = [w for w in words if w.startswith('ses-')]
        others = [w for w in words if w.lower() not in SUFFIXES and w not in visits]
        subject = others[0] if others else ''
        if not modalities or not subject:
            notes.append(f'{path}: subject and modality cannot be told from the name')
            continue
        session = visits[0] if visits else 'ses-01'
        add_scan(sessions, clean('subject', subject, path), session, modalities[-1], path, notes)
    return sessions, {}

def pattern_regex(pattern):
    """A pattern of find_pattern as a regular expression with the groups subject, session and modality."""
    text, names = '', []
    for part in re.split(r'(\{\w+(?::[^}]*)?\}|\*\*/|\*)', pattern):
        name, _, form = part[1:-1].partition(':')
        if part == '**/':
            text += '(?:[^/]+/)*'
        elif part == '*':
            text += '[^/]*'
        elif not part.startswith('{'):
            text += re.escape(part)
        elif name not in ('subject', 'session', 'modality'):
            raise SystemExit(f'--pattern={pattern}: {part}: only {{subject}}, {{session}} and {{modality}}')
        elif name in names:
            text += f'(?P={name})'
        else:
            text += f'(?P<{name}>{form or "[^/]+?"})'
            names.append(name)
    if 'subject' not in names or 'modality' not in names:
        raise SystemExit(f'--pattern={pattern}: must hold {{subject}} and {{modality}}, '
                         'and may hold {session} and *')
    try:
        return re.compile(text)
    except re.error as e:
        raise SystemExit(f'--pattern={pattern}: not a regular expression ({e})')

def find_pattern(root, notes, pattern):
    """Files below root whose path fits a pattern, such as {subject}/{session}/*/{modality}.nii.gz.

    * is any name or part of one, **/ any folders or none. A name may be narrowed: {modality:T1|T2}, by a
    regular expression without braces.
    """
    regex, sessions = pattern_regex(pattern), defaultdict(dict)
    for path in every_nifti(root):
        match = regex.fullmatch(os.path.relpath(path, root).replace(os.sep, '/'))
        if not match:
            notes.append(f'{path}: does not fit --pattern={pattern}')
            continue
        words = {'session': '01'} | match.groupdict()
        subject, session, modality = (clean(k, words[k], path) for k in ('subject', 'session', 'modality'))
        add_scan(sessions, subject, session, modality, path, notes)
    return sessions, {}

def find_ukb(root, notes):
    """UK Biobank's bulk field 20252, EID_20252_INSTANCE_0.zip, as downloaded: the T1w brain in MNI space."""
    sessions = defaultdict(dict)
    for path in sorted(glob(f'{root}/**/*.zip', recursive=True)):
        match = re.fullmatch(r'(\d+)_20252_(\d)_\d\.zip', os.path.basename(path))
        if match:
            scan = f'{path}/T1/T1_brain_to_MNI.nii.gz'
            add_scan(sessions, f'sub-{match[1]}', f'ses-{match[2]}', 'T1w', scan, notes)
        else:
            notes.append(f'{path}: not named as EID_20252_INSTANCE_0.zip')
    return sessions, {}

def find_labelmaps(root, notes):
    """Label maps, one per subject: {subject: path}."""
    maps = {}
    for path in every_nifti(root):
        subject = clean('subject', stem(os.path.basename(path)).split('_')[0], path)
        if subject in maps:
            notes.append(f'{path}: another label map of {subject}, {maps[subject]} is used')
        else:
            maps[subject] = path
    return maps

# ---------------------------------------------------------------- sex and age

def read_people(table, columns, sex_codes, subjects):
    """{subject: {'sex', 'age'}} from a spreadsheet saved as .csv or .tsv; SystemExit if no row fits.

    columns: its names for subject, sex and age. sex_codes: such as ('1=M', '2=F'). An id that is a number
    stands for the one subject whose name holds that number.
    """
    rows, codes = read_table(table), dict(code.split('=') for code in sex_codes)
    if len(columns) != 3:
        raise SystemExit(f'--columns={columns}: three names, of subject, sex and age')
    for column in columns:
        if rows and column not in rows[0]:
            names = ', '.join(map(repr, rows[0]))
            raise SystemExit(f"{table}: no column '{column}'; it has {names}; name yours by --columns")
    by_number = defaultdict(list)
    for subject in subjects:
        by_number[int(re.sub(r'\D', '', subject) or -1)].append(subject)
    people = {}
    for row in rows:
        person, sex, age = ((row[column] or '').strip() for column in columns)
        names = [name for name in (person, f'sub-{person}') if name in subjects]
        if not names and person.isdigit():
            names = by_number[int(person)]
        if len(names) == 1 and names[0] not in people:
            people[names[0]] = {'sex': codes.get(sex, sex), 'age': age}
    if not people:
        example = next(iter(subjects), '(none)')
        raise SystemExit(f'{table}: none of its rows is of a subject that was found, such as {example}')
    return people
