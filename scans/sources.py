"""Where scans are: the trees and tables of cohorts as sessions. Only names and tables are looked at.

A finder returns sessions {(subject, session): {modality: path}} and what tables say of persons (people.py).
It notes every file and row that it leaves out, and adds to doubts what a user should look at. A path may lead
into a zip archive; see nifti.read.
"""
import os
import re
from collections import defaultdict
from glob import escape, glob

from scans.files import SUFFIXES, add_scan, clean, every_scan, is_scan, stem
from scans.people import (
    Unread, Visits, collect, columns_of, read_bids_tables, read_table, whole_number)

# ---------------------------------------------------------------- layouts

def find_bids(root, notes, entities=(), doubts=None):
    """sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz], raw or derivatives.

    entities: such as space-MNI152NLin6Asym, desc-preproc; all must be in the name. Plain scans go before
    those after a contrast agent (ce-) or of a localizer; phase images, parts of a scan (chunk-) and spines
    are left out unless entities ask for them.
    """
    sessions, candidates, doubts = defaultdict(dict), [], [] if doubts is None else doubts
    for path in bids_files(root, notes):
        parts = os.path.relpath(path, root).split(os.sep)
        session = parts[1] if parts[1].startswith('ses-') else 'ses-01'
        words = stem(parts[-1]).split('_')
        suffix = words[-1]
        lacking = sorted(set(entities) - set(words))
        other = unwanted([word for word in words if word not in entities])
        if suffix.lower() not in SUFFIXES and not suffix[:1].isupper():
            notes.append(f'{path}: not a scan that is known ({suffix})')
        elif lacking:
            notes.append(f'{path}: without {", ".join(lacking)}')
        elif other:
            notes.append(f'{path}: {other}')
        else:
            try:
                slot = [clean(k, text, path) for k, text in
                        (('subject', parts[0]), ('session', session), ('modality', suffix))]
                candidates.append((is_special(words), path, slot))
            except SystemExit as e:
                notes.append(str(e))
    for special, path, slot in sorted(candidates):
        add_scan(sessions, *slot, path, notes)
        if sessions[slot[0], slot[1]][slot[2]] != path: continue
        others = other_owners(os.path.relpath(path, root))
        if others:
            doubts.append(f'{path}: named {others}, taken as of {slot[0]} {slot[1]} by its folder; '
                          'if that is wrong, move it')
        if special:
            doubts.append(f'{path}: {special} scan, used as there is no plain {slot[2]}')
    unread = Unread()
    persons = read_bids_tables(root, set(sessions), notes, unread)
    doubts += unread.lines()
    return sessions, persons

def bids_files(root, notes):
    """Files of anat folders, sorted; of a folder that is named as a file, the one scan in it.

    What looks like one and lies elsewhere is noted.
    """
    paths = []
    for path in sorted(glob(f'{escape(root)}/*')):
        note_misplaced(path, notes)
    for path in sorted(glob(f'{escape(root)}/sub-*/anat/*') + glob(f'{escape(root)}/sub-*/ses-*/anat/*')):
        if os.path.isdir(path):
            inside = [p for p in sorted(glob(f'{escape(path)}/*')) if is_scan(p, notes)]
            if len(inside) != 1:
                notes.append(f'{path}: a folder with {len(inside)} scans')
            paths += inside if len(inside) == 1 else []
        elif is_scan(path, notes):
            paths.append(path)
    return paths

def note_misplaced(path, notes):
    """Note structural scans of a file or folder in root that are in no folder sub-*/[ses-*/]anat."""
    name = os.path.basename(path)
    files = [path]
    if os.path.isdir(path) and name.lower().startswith('sub-'):
        files = []
        for folder, inner, names in os.walk(path):
            below = os.path.join(name, os.path.relpath(folder, path))
            if re.fullmatch(r'sub-[^/]*/(ses-[^/]*/)?anat', below.replace(os.sep, '/')):
                inner.clear()  # bids_files reads it
            else:
                inner.sort()
                files += [os.path.join(folder, file) for file in sorted(names)]
    elif glob(f'{escape(path)}/anat') + glob(f'{escape(path)}/ses-*/anat'):
        notes.append(f'{path}: its name does not begin with sub-, as that of a subject does; rename it')
    for file in files:
        suffix = stem(os.path.basename(file)).split('_')[-1].lower()
        if suffix in SUFFIXES and is_scan(file, []) and not os.path.isdir(file):
            notes.append(f'{file}: not in a folder sub-*/anat or sub-*/ses-*/anat, in small letters; '
                         'move it or rename its folders')

def other_owners(relative):
    """The subject and session that names in a subject's folder tell, where not the folders'; else ''."""
    subject, *names = relative.split(os.sep)
    words, others = re.split('[_/]', stem('/'.join(names))), []
    for folder in (subject, names[0]):
        kind = folder[:4]
        if kind in ('sub-', 'ses-'):
            others += [word for word in words if word.lower().startswith(kind) and word != folder]
    return ' '.join(dict.fromkeys(others))

def unwanted(words):
    """Why a file with these words is no scan of a brain, '' where it is."""
    for word in words:
        small = word.lower()
        if small.startswith('chunk-'): return f'a part of a scan ({word})'
        if 'spine' in small: return f'not of the brain ({word})'
        if small in ('part-phase', 'part-imag', 'part-real'):
            return f'not a magnitude image ({word})'
    return ''

def is_special(words):
    """A word that makes a scan another one than plain: after a contrast agent or a localizer; else ''."""
    agents = [word for word in words if word.startswith('ce-')]
    if agents: return f'a contrast-enhanced ({agents[0]})'
    quick = [word for word in words if re.search('localizer|scout|survey', word.lower())]
    return f'a quick ({quick[0]})' if quick else ''

def find_csv(table, notes, doubts=None):
    """A table with columns subject, session, modality, path and perhaps sex, age, split."""
    sessions, splits, people = defaultdict(dict), {}, []
    rows = read_table(table)
    columns = {column.lower() for column in rows[0]} if rows else set()
    missing = {'subject', 'session', 'modality', 'path'} - columns
    if missing: raise SystemExit(f"{table}: no column {', '.join(sorted(missing))}")
    folder = os.path.dirname(os.path.abspath(table))
    rows = columns_of(rows, 'subject', 'session', 'modality', 'path', 'sex', 'age', 'split')
    for number, row in enumerate(rows, 2):
        where = f'{table} line {number}'
        if row['split'] not in ('', 'train', 'val', 'test'):
            raise SystemExit(f"{where}: split {row['split']!r}: train, val or test")
        try:
            subject = clean('subject', whole_number(row['subject']), where)
            session = clean('session', row['session'] or '01', where)
            modality = clean('modality', row['modality'], where)
        except SystemExit as e:
            notes.append(str(e))
            continue
        if not row['path']:
            notes.append(f'{where}: no path')
            continue
        first = splits.setdefault(subject, row['split'])
        if first != row['split']:
            raise SystemExit(f'{where}: subject {subject} is in two splits '
                             f'({first or "none"} and {row["split"] or "none"})')
        add_scan(sessions, subject, session, modality, os.path.join(folder, row['path']), notes)
        people.append(row | {'subject': subject, 'session': session})
    unread = Unread()
    persons = collect(people, table, Visits(sessions), unread)
    for subject, split in splits.items():
        persons[subject] = persons.get(subject, {}) | {'split': split}
    if doubts is not None:
        doubts += unread.lines()
    return sessions, persons

def check_modalities(root, present, wanted):
    """SystemExit for a modality that is wanted but not there, and for a label map, which is no scan."""
    for modality in wanted:
        if modality not in present:
            others = ', '.join(present) or 'no scan at all'
            raise SystemExit(f'{root}: no scan of modality {modality}; there is {others}')
    for modality in wanted or present:
        if modality.lower() == 'dseg':
            raise SystemExit(f'{root}: {modality} is a label map, no scan: name the scans by --modalities; '
                             '--source=labelmaps makes images of label maps, and evaluate.py --labels takes '
                             'a column of them')

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

def find_pattern(root, notes, pattern, doubts=None):
    """Files below root whose path fits a pattern, such as {subject}/{session}/*/{modality}.nii.gz.

    * is any name or part of one, **/ any folders or none. A name may be narrowed: {modality:T1|T2}, by a
    regular expression without braces.
    """
    regex, sessions = pattern_regex(pattern), defaultdict(dict)
    for path in every_scan(root, notes):
        match = regex.fullmatch(os.path.relpath(path, root).replace(os.sep, '/'))
        if not match:
            notes.append(f'{path}: does not fit --pattern={pattern}')
            continue
        words = {'session': '01'} | match.groupdict()
        try:
            slot = [clean(kind, words[kind], path) for kind in ('subject', 'session', 'modality')]
        except SystemExit as e:
            notes.append(str(e))
            continue
        add_scan(sessions, *slot, path, notes)
    return sessions, {}

def find_ukb(root, notes, doubts=None):
    """UK Biobank's bulk field 20252, EID_20252_INSTANCE_0.zip, as downloaded: the T1w brain in MNI space."""
    sessions = defaultdict(dict)
    for path in sorted(glob(f'{escape(root)}/**/*.zip', recursive=True)):
        match = re.fullmatch(r'(\d+)_20252_(\d)_\d\.zip', os.path.basename(path))
        if match:
            scan = f'{path}/T1/T1_brain_to_MNI.nii.gz'
            add_scan(sessions, f'sub-{match[1]}', f'ses-{match[2]}', 'T1w', scan, notes)
        else:
            notes.append(f'{path}: not named as EID_20252_INSTANCE_0.zip')
    return sessions, {}
