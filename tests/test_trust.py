"""Runs that are killed, disks that are full, data that are spoilt: nothing is lost, refusals are one line."""
import json
import os
import random
import resource
import shutil
import subprocess
import time
import zlib

import numpy as np
import pytest
import torch

from common import load_checkpoint
from conftest import TINY, make_tiny_data, play, read_until, refuses, start, start_two
from data import Sessions
from test_nifti import BAD
from test_train import CONVVAE, SHORT, assert_same_run

def training(data, out, *args):
    return ['train_vae.py', *TINY, *SHORT, f'--data_dir={data}', f'--out_dir={out}', *args]

# ---------------------------------------------------------------- interruptions

@pytest.mark.parametrize('kills', [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_as_one_that_was_not(kills, tiny_data, tmp_path):
    """kill -9 at any moment. A checkpoint is written at every step, so that many kills fall into one."""
    def train(out):
        state = 'resume' if os.path.exists(tmp_path / out / 'ckpt.pt') else 'scratch'
        return start(*training(tiny_data, tmp_path / out, '--eval_interval=1', f'--init_from={state}',
                               f'--iters_3d={3 * kills}', f'--iters_2d={kills}'))
    # in a process of its own, as the others: another history of a process may change last bits
    assert train('whole').wait() == 0
    chance = random.Random(0)
    for _ in range(kills):
        process = train('killed')
        read_until(process, 'iter')
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -9
        if os.path.exists(tmp_path / 'killed' / 'ckpt.pt'):
            load_checkpoint(tmp_path / 'killed' / 'ckpt.pt')
    process = train('killed')
    assert process.wait() == 0, process.stderr.read()
    whole = load_checkpoint(tmp_path / 'whole' / 'ckpt.pt')
    assert whole['iter_num'] == 4 * kills
    killed = load_checkpoint(tmp_path / 'killed' / 'ckpt.pt')
    assert_same_run(whole, killed, tmp_path / 'whole', tmp_path / 'killed')

def test_a_full_disk_ends_with_one_line_and_keeps_the_last_checkpoint(tiny_data, tmp_path):
    args = training(tiny_data, tmp_path / 'out')
    play(*args, '--max_iters=1')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may grow beyond this: as a disk that fills up
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        line = refuses(*args, '--init_from=resume')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert '.pt: cannot write the checkpoint' in line and 'untouched' in line
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / 'out') if name.endswith('.part')]

def test_a_rank_that_dies_ends_the_whole_run(tiny_data, tmp_path):
    process = start_two(*training(tiny_data, tmp_path / 'out', '--iters_3d=100000', '--batch_size=1'),
                        port=29514)
    read_until(process, 'iter 2')
    ranks = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), 9)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and 'Signal 9 (SIGKILL)' in errors  # torchrun's own summary
    lines = [line for line in errors.splitlines() if 'another process is gone' in line]
    # the other one, if it noticed first, says so in a line of its own
    assert len(lines) <= 1 and 'all_reduce' not in errors, errors
    for rank in ranks:
        assert not os.path.exists(f'/proc/{rank}')

# ---------------------------------------------------------------- numbers that are not finite

def test_a_loss_that_is_not_finite_stops_with_step_term_and_files(tiny_data, tmp_path):
    train_set = Sessions(tiny_data, ('T1w', 'T2w'), 'train')
    name = train_set.session_batch(2, 2)['files'][0]  # of the third step
    volume = np.load(tiny_data / name)
    volume[16, 24, 16] = np.nan
    np.save(tiny_data / name, volume)
    line = refuses(*training(tiny_data, tmp_path / 'out', '--iters_3d=20', '--eval_interval=1',
                             '--log_interval=7'))
    assert line.startswith('iteration 3: recon is nan') and name in line and 'last good state' in line
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 2
    assert all(value.isfinite().all() for value in checkpoint['model'].values())

def test_a_flow_that_diverges_stops_too(tiny_data, tmp_path):
    play(*training(tiny_data, tmp_path / 'vae', *CONVVAE, '--max_iters=1'))
    line = refuses('train_flow.py', f'--vae={tmp_path}/vae/ckpt.pt', f'--out_dir={tmp_path}/flow',
                   '--widths=32,32', '--attention=False,False', '--res_blocks=1', '--device=cpu', '--lr=1e38',
                   '--warmup_iters=0', '--grad_clip=0', '--iters=6', '--batch_size=2', '--eval_interval=100')
    assert 'loss is' in line or 'gradient is' in line
    assert 'sub-0' in line and not os.path.exists(tmp_path / 'flow' / 'ckpt.pt')

# ---------------------------------------------------------------- a run goes on with what it began with

@pytest.fixture
def resuming(tiny_data, tmp_path):
    """Arguments that resume a run of one step, with a change that is allowed."""
    args = training(tiny_data, tmp_path / 'out')
    play(*args, '--max_iters=1')
    return [*args, '--init_from=resume', '--max_iters=2', '--log_interval=3']

def test_changed_settings_are_refused_on_resume_with_both_values(resuming):
    line = refuses(*resuming, '--lr=0.5', '--w_ssim=0.25')
    assert 'w_ssim 0.5 there, 0.25 here; lr 0.0001 there, 0.5 here' in line
    assert 'log_interval' not in line and 'max_iters' not in line

def test_a_changed_batch_size_is_refused_on_resume(resuming):
    assert 'batch_size 2 there, 3 here' in refuses(*resuming, '--batch_size=3')

def test_changed_settings_are_taken_where_the_user_insists(resuming, tmp_path):
    play(*resuming, '--lr=0.5', '--resume_changed=True')
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 2 and checkpoint['config']['lr'] == 0.5

# ---------------------------------------------------------------- bad input

FIRST = 'sub-00_ses-01_T1w.npy'

def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new))

def overwrite_volumes(data, content):
    """Every volume becomes these bytes; a number instead cuts each to so many."""
    for path in data.glob('*.npy'):
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)

def make_volumes_small(data):
    for path in data.glob('*.npy'):
        np.save(path, np.zeros((4, 4, 4), np.float32))

def flip_a_bit(data):
    """One bit in every file, as a bad disk does: sizes stay."""
    sums = {path.name: zlib.crc32(np.load(path)) for path in data.glob('*.npy')}
    (data / 'checksums.json').write_text(json.dumps(sums))
    for path in data.glob('*.npy'):
        raw = bytearray(path.read_bytes())
        raw[-40001] ^= 1
        path.write_bytes(raw)

def write_pickle_with_code(path):
    path.write_bytes(b'cos\nsystem\n(S"touch ' + str(path.parent / 'ran').encode() + b'"\ntR.')

# what is spoilt: (how, in the folders of data and run; words with which train_vae.py refuses to resume)
PREPARED = {
    'no data': (
        lambda data, run: shutil.rmtree(data),
        ['no prepared data', 'prepare.py']),
    'no index': (
        lambda data, run: (data / 'subjects.tsv').unlink(),
        ['subjects.tsv', 'No such file']),
    'index without sessions': (
        lambda data, run: (data / 'subjects.tsv').write_text('subject\tsession\tsplit\tT1w\tT2w\n'),
        ['no volume of modality T1w']),
    'dataset.json cut short': (
        lambda data, run: (data / 'dataset.json').write_text('{"shape": [32'),
        ['dataset.json', 'not JSON']),
    'subject in two splits': (
        lambda data, run: replace(data / 'subjects.tsv', 'sub-11\tses-01\ttest', 'sub-01\tses-02\ttest'),
        ['sub-01', 'two splits']),
    'modality missing everywhere': (
        lambda data, run: replace(data / 'subjects.tsv', 'T2w', 'T3w'),
        ['no volume of modality T2w']),
    'no training session': (
        lambda data, run: replace(data / 'subjects.tsv', 'train', 'test'),
        ["split 'train'"]),
    'volume missing': (
        lambda data, run: (data / FIRST).unlink(),
        [FIRST, 'missing']),
    'volume cut short': (
        lambda data, run: overwrite_volumes(data, 5000),
        ['.npy', 'unreadable']),
    'volume that is no array': (
        lambda data, run: overwrite_volumes(data, b'hello'),
        ['.npy', 'unreadable']),
    'volume of no bytes': (
        lambda data, run: overwrite_volumes(data, b''),
        ['.npy', 'unreadable']),
    'volume of another size': (
        lambda data, run: make_volumes_small(data),
        ['(4, 4, 4)', '(32, 48, 32)']),
    'a flipped bit': (
        lambda data, run: flip_a_bit(data),
        ['.npy', 'checksum']),
    'another dataset': (
        lambda data, run: replace(data / 'subjects.tsv', 'F\t30', 'F\t31'),
        ['is not what', '12 changed (sub-00 ses-01, ']),
    'no checkpoint': (
        lambda data, run: (run / 'ckpt.pt').unlink(),
        ['ckpt.pt', 'no such checkpoint']),
    'checkpoint cut short': (
        lambda data, run: os.truncate(run / 'ckpt.pt', 3000),
        ['ckpt.pt', 'not a readable checkpoint']),
    'checkpoint with code': (
        lambda data, run: write_pickle_with_code(run / 'ckpt.pt'),
        ['ckpt.pt', 'not a readable checkpoint']),
    'checkpoint of something else': (
        lambda data, run: torch.save({'weights': torch.ones(2)}, run / 'ckpt.pt'),
        ['ckpt.pt', 'not a checkpoint of this project']),
}

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A folder with data in data/ and a run of one step in out/; not to be changed."""
    folder = tmp_path_factory.mktemp('finished')
    make_tiny_data(folder / 'data')
    play(*training(folder / 'data', folder / 'out', '--max_iters=1'))
    return folder

def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}

@pytest.mark.parametrize('kind', PREPARED)
def test_spoilt_data_and_runs_are_refused_in_one_line_and_nothing_is_written(kind, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'x')
    data = tmp_path / 'x' / 'data'
    run = tmp_path / 'x' / 'out'
    damage, words = PREPARED[kind]
    damage(data, run)
    before = content(tmp_path)
    line = refuses(*training(data, run, '--init_from=resume', '--max_iters=2'))
    assert all(word in line for word in words), line
    assert content(tmp_path) == before

@pytest.mark.parametrize('kind', BAD)
def test_bad_scans_are_refused_in_one_line_and_nothing_is_written(kind, finished, tmp_path):
    path = tmp_path / 'scan.nii.gz'
    make, _ = BAD[kind]
    make(str(path))
    before = content(tmp_path)
    line = refuses('sample.py', '--mode=reconstruct', f'--ckpt={finished}/out/ckpt.pt', f'--input={path}',
                   f'--output={tmp_path}/rec.nii.gz', '--device=cpu')
    assert str(path) in line and content(tmp_path) == before

def test_at_least_25_kinds_of_bad_input_are_tried():
    assert len(PREPARED) + len(BAD) >= 25
