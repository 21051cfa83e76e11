"""Brain masks of scans: a file beside each scan, or a command that strips a head."""
import os
import shlex
import shutil
import subprocess
import tempfile
from glob import escape, glob

from scans import nifti

def mask_file(pattern, path, root, subject, session, modality):
    """The one file beside a scan, else below root, that fits a pattern of the setting mask."""
    subjects, visits = (subject, subject.removeprefix('sub-')), (session, session.removeprefix('ses-'))
    names = {pattern.format(subject=s, session=v, modality=modality) for s in subjects for v in visits}
    for folder in (os.path.dirname(path), root):
        files = {file for name in names for file in glob(os.path.join(escape(folder), name))}
        if files: break
    if len(files) != 1:
        raise ValueError(f"{path}: {len(files)} files fit its mask, {' or '.join(sorted(names))}")
    return files.pop()

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
