"""Names of files and of what is in them, for every way to find scans."""
import os
import re

SUFFIXES = {
    't1w': 'T1w', 't1': 'T1w', 'mprage': 'T1w', 't2w': 'T2w', 't2': 'T2w', 'flair': 'FLAIR',
    't2flair': 'FLAIR', 'pd': 'PD', 'pdw': 'PD'}
SCAN = re.compile(r'\.(nii|nii\.gz|mgz|mgh|mgh\.gz|img|img\.gz)$', re.IGNORECASE)
OTHER = re.compile(r'\.(nii\.\w+|nrrd|nhdr|mha|mhd|mnc|dcm|ima|par|v|hdr|hdr\.gz)$', re.IGNORECASE)

def clean(kind, text, where):
    """A subject, session or modality as part of a file name, with its prefix; SystemExit if it is no name."""
    text = str(text).strip()
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_.+-]*', text) or '..' in text:
        raise SystemExit(f'{where}: {kind} {text!r}: only letters, digits and -_.+ may be in a name')
    if kind == 'modality': return SUFFIXES.get(text.lower(), text)
    prefix = {'subject': 'sub-', 'session': 'ses-'}[kind]
    return text if text.startswith(prefix) else prefix + text

def stem(path):
    """A path without the ending of a scan."""
    return SCAN.sub('', path)

def is_scan(path, notes):
    """Whether a file has the ending of a scan that can be read; a scan of another format is noted."""
    name = os.path.basename(path)
    if name.startswith('.'): return False
    if SCAN.search(name): return True
    image = re.sub(r'(?i)hdr(?=(\.gz)?$)', 'img', path)  # a header belongs to it
    if OTHER.search(name) and not (image != path and os.path.exists(image)):
        notes.append(f'{path}: not a format that is read; convert it to .nii.gz')
    return False

def every_scan(root, notes):
    """Paths of the scans below a folder, sorted; hidden ones are left out, links are followed."""
    paths = []
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        for name in list(names):  # a link to a folder above would never end
            if name.startswith('.') or is_above(os.path.join(folder, name), real):
                names.remove(name)
        for name in files:
            path = os.path.join(folder, name)
            if is_scan(path, notes):
                paths.append(path)
    return sorted(paths)

def is_above(path, folder):
    """Whether a path is a link to a folder or to one above it."""
    return os.path.islink(path) and f'{folder}/'.startswith(os.path.realpath(path) + '/')

def add_scan(sessions, subject, session, modality, path, notes):
    scans = sessions[subject, session]
    if modality in scans:
        notes.append(f'{path}: another {modality} of {subject} {session}, {scans[modality]} is used')
    else:
        scans[modality] = path

def tsv(rows):
    """Rows as text; a tab or line break within a value becomes a space."""
    lines = []
    for row in rows:
        values = [re.sub(r'[\t\r\n]', ' ', str(value)) for value in row]
        lines.append('\t'.join(values) + '\n')
    return ''.join(lines)

def printable(text):
    """Text that any file or terminal takes: of a name that is not UTF-8, what cannot be told becomes ?."""
    return os.fsencode(text).decode('utf-8', 'replace') if not text.isprintable() else text
