"""Puts the project's root on the path, and makes small prepared data sets without prepare.py."""
import contextlib
import functools
import io
import json
import os
import runpy
import signal
import subprocess
import sys

if 'PYTEST_XDIST_WORKER' in os.environ:
    # for torch, here and in the scripts it starts: workers share the cores
    os.environ['OMP_NUM_THREADS'] = '1'

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import model

@functools.cache
def counted(kind, fields, shape):
    cls, config = model.KINDS[kind]
    return count(cls(config(**dict(fields))), shape)

# once per network
count, model.step_flops = model.step_flops, lambda net, shape: counted(
    model.model_args(net)['kind'], tuple(vars(net.config).items()), tuple(shape)
)

def run(script, *args, **kwargs):
    """A script of the project as a user runs it; returns the finished process with its text output.

    prepare.py with several workers and calls with settings of their own get a new interpreter. The others run in this one, which
    saves the seconds that importing torch takes; any exception but SystemExit comes through.
    """
    if (script == 'prepare.py' and '--workers=1' not in args) or kwargs:
        return subprocess.run(
            [sys.executable, os.path.join(ROOT, script), *map(str, args)],
            capture_output=True,
            text=True,
            cwd=kwargs.pop('cwd', ROOT),
            **kwargs,
        )
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv, out, code = [script, *map(str, args)], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    said = code if isinstance(code, str) else ''
    return subprocess.CompletedProcess(script, 1 if said else code or 0, out.getvalue(), said)

def play(script, *args):
    """What a script printed that has to succeed."""
    done = run(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout

def refuses(script, *args):
    """The one line with which a script ends that has to refuse."""
    done = run(script, *args)
    assert done.returncode and '\n' not in done.stderr, done
    return done.stderr

def refused(process, *words):
    """True if the script ended with an error of one line that holds all the words, and no traceback."""
    message = process.stderr.strip().splitlines()
    assert process.returncode != 0, process.stdout
    assert 'Traceback' not in process.stderr, process.stderr
    assert all(w in message[-1] for w in words), (message[-1:], words)
    return True

def make_tiny_data(folder):
    """Twelve sessions of smooth random 32x48x32 volumes, T1w and T2w; session 3 lacks T2w, session 4 lacks T1w. folder: a new one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (32, 48, 32)], indexing='ij'))
    lines = ['subject\tsession\tsplit\tT1w\tT2w\tsex\tage']
    for i in range(12):
        brain = (grid ** 2).sum(0) < 0.7 + 0.2 * rng.random()
        tissue = 0.5 + 0.4 * np.sin(grid.T @ rng.normal(size=3) * 3).T
        names = []
        for j, image in enumerate((tissue, 1 - tissue)):
            name = f'sub-{i:02d}_ses-01_{("T1w", "T2w")[j]}.npy'
            np.save(folder / name, np.where(brain, image, 0).astype(np.float32))
            names.append('' if (i, j) in ((3, 1), (4, 0)) else name)
        lines.append(
            '\t'.join([
                f'sub-{i:02d}',
                'ses-01',
                'train' if i < 8 else 'val' if i < 10 else 'test',
                *names,
                'F',
                '30',
            ])
        )
    (folder / 'subjects.tsv').write_text('\n'.join(lines) + '\n')
    (folder / 'dataset.json').write_text(
        json.dumps({'shape': [32, 48, 32], 'spacing_mm': 1.0, 'modalities': ['T1w', 'T2w']})
    )
    return folder

@pytest.fixture
def tiny_data(tmp_path):
    return make_tiny_data(tmp_path / 'data')

TINY = [
    '--widths=8,8,8,8', '--anat_dim=8', '--mod_dim=4', '--modality_dim=4', '--num_codes=16', '--batch_size=2',
    '--batch_size_2d=4', '--res_blocks=1', '--device=cpu', '--warmup_iters=2', '--log_interval=1'
]
