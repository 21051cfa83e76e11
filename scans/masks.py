"""Brain masks of scans: a file beside each scan, or a command that strips a head."""
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from glob import escape, glob

from scans import nifti

# ---------------------------------------------------------------- a file beside each scan

START, END = '\0', '\1'  # of a name within a pattern; no file has them in its name

def marked(name):
    """A subject or session with its ends marked: a number has two, as 1 is also the end of 11."""
    return f'{START if name.isdigit() else ""}{name}{END}'

def whole_names(marked_pattern):
    """The regular expression of a pattern in which no letter or digit continues a marked name.

    Only what a wildcard stands for can continue it: what the pattern spells out is meant so.
    """
    pattern = re.sub(f'{END}(?![*?[])', '', marked_pattern)
    pattern = re.sub(f'(?<![*?\\]]){START}', '', pattern)
    regex = fnmatch.translate(pattern)
    return re.compile(regex.replace(START, r'(?<![^\W_])').replace(END, r'(?![^\W_])'))

def mask_file(pattern, path, root, subject, session, modality):
    """The one file beside a scan, else below root, that fits a pattern of the setting mask.

    root: of a table of scans the table, which stands for its folder.
    """
    base = root if os.path.isdir(root) else os.path.dirname(os.path.abspath(root))
    subjects, visits = (subject, subject.removeprefix('sub-')), (session, session.removeprefix('ses-'))
    names, others = {}, set()
    for s in subjects:
        for v in visits:
            name = pattern.format(subject=marked(s), session=marked(v), modality=modality)
            names[re.sub(f'[{START}{END}]', '', name)] = name
    for folder in (os.path.dirname(path), base):
        files = set()
        for name, marked_name in names.items():
            regex = whole_names(os.path.normpath(os.path.join(escape(folder), marked_name)))
            for file in glob(os.path.join(escape(folder), name)):
                fits = regex.match(os.path.normpath(file))
                (files if fits else others).add(file)
        if files: break
    if len(files) != 1:
        other = '' if files or not others else f'; {min(others)} has a longer name of subject or session'
        raise ValueError(f"{path}: {len(files)} files fit its mask, {' or '.join(sorted(names))}{other}")
    return files.pop()

def dated_mask(*scan):
    """The mask of a scan as nifti.dated has it, None where there is none. scan: what mask_file takes."""
    try:
        return nifti.dated(mask_file(*scan))
    except ValueError:
        return None

def read_mask(*scan):
    """The mask of a scan (D,H,W), bool, and its affine; of probabilities, what is above 0.5."""
    values, affine, _ = nifti.read(mask_file(*scan))
    positive = values[values > 0]
    # probabilities have several values and end at 1, a little above it where they were interpolated
    is_probability = len(positive) and positive.min() < positive.max() < 1.5
    threshold = 0.5 if is_probability else 0
    return values > threshold, affine

# ---------------------------------------------------------------- a command

def command_words(command, scan='', brain=''):
    """The words of a command with its {in} and {out} filled in; SystemExit where it cannot be run."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise SystemExit(f'--skullstrip={command}: not a command line ({e})')
    if not shutil.which(words[0]):
        raise SystemExit(f'--skullstrip={command}: there is no program {words[0]}; '
                         'install it or give its path')
    return [word.replace('{in}', scan).replace('{out}', brain) for word in words]

def strip_skull(command, path, volume, native):
    """What a command leaves of a scan, as nifti.read gives it; ValueError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        head, brain = os.path.join(folder, 'head.nii.gz'), os.path.join(folder, 'brain.nii.gz')
        nifti.write(head, volume, native)
        words = command_words(command, head, brain)
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors='replace')
        except OSError as e:
            raise ValueError(f'{path}: --skullstrip cannot be run ({e})')
        if done.returncode or not os.path.exists(brain):
            message = (done.stderr.strip().splitlines() or ['no message'])[-1]
            raise ValueError(f'{path}: --skullstrip ended with {done.returncode} ({message})')
        try:
            return nifti.read(brain)
        except ValueError as e:
            raise ValueError(f'{path}: what --skullstrip made of it cannot be used ({e})')
