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
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import model
from judge import cost, figures

vae_flops = cost.vae_flops

@functools.cache
def flops_of(kind, fields, shape):
    network, config = model.KINDS[kind]
    return vae_flops(network(config(**dict(fields))), shape)

def cached_vae_flops(network, shape):
    """cost.vae_flops, counted once per kind of network in a test process."""
    fields = tuple(vars(network.config).items())
    return flops_of(model.model_args(network)['kind'], fields, tuple(shape))

cost.vae_flops = cached_vae_flops

def counted_elsewhere(*args):
    """Instead of cost.step_bytes, which takes seconds: tests/test_cost.py has it."""
    return None

step_bytes = cost.step_bytes
cost.step_bytes = counted_elsewhere

def drawn_elsewhere(*args):
    """Instead of the pictures of a validation, which take longer than the training: one test has them."""

curves, progress = figures.curves, figures.progress
figures.curves = figures.progress = drawn_elsewhere

def run(script, *args):
    """A script of the project as a user runs it; returns the finished process with its text output.

    prepare.py with several workers gets a new interpreter. The others run in this one: importing torch takes
    seconds. Any exception but SystemExit comes through.
    """
    if script == 'prepare.py' and '--workers=1' not in args:
        command = [sys.executable, script, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, args)]
    printed = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    message = code if isinstance(code, str) else ''
    return subprocess.CompletedProcess(script, 1 if message else code or 0, printed.getvalue(), message)

# of processes that tests start: matplotlib is as if it were missing
NO_PICTURES = os.environ | {'PYTHONPATH': os.path.join(ROOT, 'tests', 'no_pictures')}

def start(script, *args):
    """A script in a process of its own, running."""
    command = [sys.executable, script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=NO_PICTURES, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def start_two(script, *args, port):
    """A script in two processes that train together, running."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
    environment = NO_PICTURES | {'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([*command, script, *map(str, args)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def play_two(script, *args, port):
    """Runs a script that has to succeed in two processes that train together."""
    process = start_two(script, *args, port=port)
    _, errors = process.communicate()
    assert process.returncode == 0, errors

def read_until(process, beginning):
    """Waits for a printed line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return

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

class Precision(TorchDispatchMode):
    """Remembers for every matrix product, forward and backward, whether a GPU might have used TF32 for it."""
    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return op(*args, **kwargs or {})

@pytest.fixture
def tf32_allowed():
    """A process that lets GPUs use TF32, as many trainers do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before

def make_tiny_data(folder):
    """Twelve sessions of smooth random 32x48x32 volumes, T1w and T2w, in a new folder.

    Session 3 lacks T2w and session 4 lacks T1w. Inside the brain T2w is 1 - T1w.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (32, 48, 32)], indexing='ij'))
    absent = ((3, 'T2w'), (4, 'T1w'))
    lines = ['subject\tsession\tsplit\tT1w\tT2w\tsex\tage']
    for i in range(12):
        brain = (grid ** 2).sum(0) < 0.7 + 0.2 * rng.random()
        tissue = 0.5 + 0.4 * np.sin(grid.T @ rng.normal(size=3) * 3).T
        names = []
        for modality, image in (('T1w', tissue), ('T2w', 1 - tissue)):
            name = f'sub-{i:02d}_ses-01_{modality}.npy'
            np.save(folder / name, np.where(brain, image, 0).astype(np.float32))
            names.append('' if (i, modality) in absent else name)
        split = ['train'] * 8 + ['val'] * 2 + ['test'] * 2
        lines.append('\t'.join([f'sub-{i:02d}', 'ses-01', split[i], *names, 'F', '30']))
    (folder / 'subjects.tsv').write_text('\n'.join(lines) + '\n')
    facts = {'shape': [32, 48, 32], 'spacing_mm': 1.0, 'modalities': ['T1w', 'T2w']}
    (folder / 'dataset.json').write_text(json.dumps(facts))
    return folder

@pytest.fixture
def tiny_data(tmp_path):
    return make_tiny_data(tmp_path / 'data')

# a network that trains in a second
TINY = ['--widths=8,8,8,8', '--anat_dim=8', '--mod_dim=4', '--modality_dim=4', '--num_codes=16',
        '--batch_size=2', '--batch_size_2d=4', '--res_blocks=1', '--device=cpu', '--warmup_iters=2',
        '--log_interval=1']
