"""Runs that are killed, disks that are full, data that are spoilt: nothing is lost, and every refusal is one line."""
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, make_tiny_data, play, refuses
from common import load_checkpoint
from data import Sessions
from test_nifti import BAD
from test_train import SHORT, assert_same_run, log_of

# ---------------------------------------------------------------- interruptions

@pytest.mark.parametrize('kills', [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_as_one_that_was_not(kills, tiny_data, tmp_path):
    """kill -9 at any moment, with a checkpoint at every step so that many fall into one; weights, codebook, optimiser and log agree."""
    steps = 4 * kills
    args = [
        *TINY,
        '--cross_start=1',
        '--cross_ramp=2',
        '--adv_start=1',
        f'--data_dir={tiny_data}',
        '--eval_interval=1',
        '--eval_sessions=1',
        f'--iters_3d={3 * kills}',
        f'--iters_2d={kills}',
    ]
    chance, killed = random.Random(0), 0
    def start(out):
        resume = os.path.exists(tmp_path / out / 'ckpt.pt')
        return subprocess.Popen(
            [
                sys.executable,
                'train_vae.py',
                *args,
                f'--out_dir={tmp_path}/{out}',
                f'--init_from={"resume" if resume else "scratch"}',
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    # in a process of its own, as the others: another history of a process may change last bits
    assert start('whole').wait() == 0
    while killed < kills:
        process = start('killed')
        for line in process.stdout:
            if line.startswith('iter'): break
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        killed += process.returncode == -9
        if process.returncode == 0: break  # it came to its end before all the kills
        if os.path.exists(tmp_path / 'killed' / 'ckpt.pt'):
            load_checkpoint(tmp_path / 'killed' / 'ckpt.pt')
    assert killed == kills
    process = start('killed')
    assert process.wait() == 0, process.stderr.read()
    whole, parts = (load_checkpoint(tmp_path / run / 'ckpt.pt') for run in ('whole', 'killed'))
    assert whole['iter_num'] == steps
    assert_same_run(whole, parts, tmp_path / 'whole', tmp_path / 'killed')

def test_a_full_disk_ends_with_one_line_and_keeps_the_last_checkpoint(tiny_data, tmp_path):
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out']
    play('train_vae.py', *args, '--max_iters=1')
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may grow beyond this: as a disk that fills up
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        line = refuses('train_vae.py', *args, '--init_from=resume')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert '.pt: cannot write the checkpoint' in line and 'untouched' in line
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before and not [
        f for f in os.listdir(tmp_path / 'out') if f.endswith('.part')
    ]

def test_a_rank_that_dies_ends_the_whole_run(tiny_data, tmp_path):
    args = [
        *TINY,
        '--iters_3d=100000',
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/out',
        '--batch_size=1',
    ]
    process = subprocess.Popen(
        [
            sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29514',
            'train_vae.py', *args
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    for line in process.stdout:
        if line.startswith('iter 2'): break
    ranks = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), 9)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and 'Signal 9 (SIGKILL)' in err  # torchrun's own summary
    said = [line for line in err.splitlines() if 'another process is gone' in line]
    # the other one, if it noticed first, says so in a line of its own
    assert len(said) <= 1 and 'all_reduce' not in err, err
    for rank in ranks:
        assert not os.path.exists(f'/proc/{rank}')

# ---------------------------------------------------------------- numbers that are not finite

def test_a_loss_that_is_not_finite_stops_with_step_term_and_files(tiny_data, tmp_path):
    # of the third step
    name = Sessions(tiny_data, ('T1w', 'T2w'), 'train').session_batch(2, 0, 0, 1, 2)['files'][0]
    volume = np.load(tiny_data / name)
    volume[16, 24, 16] = np.nan
    np.save(tiny_data / name, volume)
    line = refuses(
        'train_vae.py',
        *TINY,
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/out',
        '--iters_3d=20',
        '--eval_interval=1',
        '--log_interval=7',
    )
    assert line.startswith('iteration 3: recon is nan') and name in line and 'last good state' in line
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter_num'] == 2 and all(v.isfinite().all() for v in checkpoint['model'].values())

def test_a_flow_that_diverges_stops_too(tiny_data, tmp_path):
    play(
        'train_vae.py',
        *TINY,
        *SHORT,
        f'--data_dir={tiny_data}',
        f'--out_dir={tmp_path}/vae',
        '--max_iters=1',
        '--kind=convvae',
        '--widths=8,8',
        '--w_ssim=0',
    )
    line = refuses(
        'train_flow.py',
        f'--vae={tmp_path}/vae/ckpt.pt',
        f'--out_dir={tmp_path}/flow',
        '--widths=32,32',
        '--attention=False,False',
        '--res_blocks=1',
        '--device=cpu',
        '--lr=1e38',
        '--warmup_iters=0',
        '--grad_clip=0',
        '--iters=6',
        '--batch_size=2',
        '--eval_interval=100',
    )
    assert 'loss is' in line or 'gradient is' in line
    assert 'sub-0' in line and not os.path.exists(tmp_path / 'flow' / 'ckpt.pt')

# ---------------------------------------------------------------- a run goes on with what it began with

def test_changed_settings_are_refused_on_resume_with_both_values(tiny_data, tmp_path):
    args = [*TINY, *SHORT, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out']
    play('train_vae.py', *args, '--max_iters=1')
    resume = [*args, '--init_from=resume', '--max_iters=2', '--log_interval=3']
    line = refuses('train_vae.py', *resume, '--lr=0.5', '--w_ssim=0.25')
    assert (
        'w_ssim 0.5 there, 0.25 here; lr 0.0001 there, 0.5 here' in line
        and 'log_interval' not in line
        and 'max_iters' not in line
    )
    assert 'batch_size 2 there, 3 here' in refuses('train_vae.py', *resume, '--batch_size=3')
    play('train_vae.py', *resume, '--lr=0.5', '--resume_changed=True')

# ---------------------------------------------------------------- bad input

def spoil(path, old, new):
    path.write_text(path.read_text().replace(old, new))

def flip_a_bit(data):
    """One bit in every file, as a bad disk does: sizes stay."""
    (data / 'checksums.json').write_text(
        json.dumps({p.name: zlib.crc32(np.load(p)) for p in data.glob('*.npy')})
    )
    for path in data.glob('*.npy'):
        raw = bytearray(path.read_bytes())
        raw[-40001] ^= 1
        path.write_bytes(raw)

def pickle_with_code(path):
    path.write_bytes(b'cos\nsystem\n(S"touch ' + str(path.parent / 'ran').encode() + b'"\ntR.')

FIRST = 'sub-00_ses-01_T1w.npy'
# kind: what spoils the data or the run folder, words of the refusal; given to train_vae.py --init_from=resume
PREPARED = {
    'no data': (lambda d, o: shutil.rmtree(d), ['no prepared data', 'prepare.py']),
    'no index': (lambda d, o: (d / 'subjects.tsv').unlink(), ['subjects.tsv', 'No such file']),
    'index without sessions': (
        lambda d, o: (d / 'subjects.tsv').write_text('subject\tsession\tsplit\tT1w\tT2w\n'),
        ['no volume of modality T1w'],
    ),
    'dataset.json cut short': (
        lambda d, o: (d / 'dataset.json').write_text('{"shape": [32'),
        ['dataset.json', 'not JSON'],
    ),
    'subject in two splits': (
        lambda d, o: spoil(d / 'subjects.tsv', 'sub-11\tses-01\ttest', 'sub-01\tses-02\ttest'),
        ['sub-01', 'two splits'],
    ),
    'modality missing everywhere': (
        lambda d, o: spoil(d / 'subjects.tsv', 'T2w', 'T3w'),
        ['no volume of modality T2w'],
    ),
    'no training session': (lambda d, o: spoil(d / 'subjects.tsv', 'train', 'test'), ["split 'train'"]),
    'volume missing': (lambda d, o: (d / FIRST).unlink(), [FIRST, 'missing']),
    'volume cut short': (
        lambda d, o: [p.write_bytes(p.read_bytes()[:5000]) for p in d.glob('*.npy')],
        ['.npy', 'unreadable'],
    ),
    'volume that is no array': (
        lambda d, o: [p.write_text('hello') for p in d.glob('*.npy')],
        ['.npy', 'unreadable'],
    ),
    'volume of no bytes': (
        lambda d, o: [p.write_bytes(b'') for p in d.glob('*.npy')],
        ['.npy', 'unreadable'],
    ),
    'volume of another size': (
        lambda d, o: [np.save(p, np.zeros((4, 4, 4), np.float32)) for p in d.glob('*.npy')],
        ['(4, 4, 4)', '(32, 48, 32)'],
    ),
    'a flipped bit': (lambda d, o: flip_a_bit(d), ['.npy', 'checksum']),
    'another dataset': (
        lambda d, o: spoil(d / 'subjects.tsv', 'F\t30', 'F\t31'),
        ['is not what', '12 changed (sub-00 ses-01, '],
    ),
    'no checkpoint': (lambda d, o: (o / 'ckpt.pt').unlink(), ['ckpt.pt', 'no such checkpoint']),
    'checkpoint cut short': (
        lambda d, o: os.truncate(o / 'ckpt.pt', 3000),
        ['ckpt.pt', 'not a readable checkpoint'],
    ),
    'checkpoint with code': (
        lambda d, o: pickle_with_code(o / 'ckpt.pt'),
        ['ckpt.pt', 'not a readable checkpoint'],
    ),
    'checkpoint of something else': (
        lambda d, o: torch.save({'weights': torch.ones(2)}, o / 'ckpt.pt'),
        ['ckpt.pt', 'not a checkpoint of this project'],
    ),
}

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    make_tiny_data(folder / 'data')
    play(
        'train_vae.py', *TINY, *SHORT, f'--data_dir={folder}/data', f'--out_dir={folder}/out', '--max_iters=1'
    )
    return folder

def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.mark.parametrize('kind', PREPARED)
def test_spoilt_data_and_runs_are_refused_in_one_line_and_nothing_is_written(kind, finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'x')
    (damage, words), data, out = PREPARED[kind], tmp_path / 'x' / 'data', tmp_path / 'x' / 'out'
    damage(data, out)
    before = content(tmp_path)
    line = refuses(
        'train_vae.py',
        *TINY,
        *SHORT,
        f'--data_dir={data}',
        f'--out_dir={out}',
        '--init_from=resume',
        '--max_iters=2',
    )
    assert all(word in line for word in words), line
    assert content(tmp_path) == before

@pytest.mark.parametrize('kind', BAD)
def test_bad_scans_are_refused_in_one_line_and_nothing_is_written(kind, finished, tmp_path):
    path, (make, reason) = tmp_path / 'scan.nii.gz', BAD[kind]
    make(str(path))
    before = content(tmp_path)
    line = refuses(
        'sample.py',
        '--mode=reconstruct',
        f'--ckpt={finished}/out/ckpt.pt',
        f'--input={path}',
        f'--output={tmp_path}/rec.nii.gz',
        '--device=cpu',
    )
    assert str(path) in line and content(tmp_path) == before

def test_at_least_25_kinds_of_bad_input_are_tried():
    assert len(PREPARED) + len(BAD) >= 25
