"""Settings and their refusals, checkpoints, processes, the log."""
import os
import subprocess
import sys
import time
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common import (StepLog, configure, load_checkpoint, refuse_overwriting, save_checkpoint,
                    start_processes, wait_for_all)
from conftest import ROOT

def settings():
    return dict(lr=1e-3, steps=10, name='a', compile=True, widths=(32, 64), _hidden=3)

def test_flags_and_files_override_from_left_to_right(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('base = 2\nsteps = base * 20\nlr = 1\n'.replace('base', '_base'))
    g = settings()
    out = configure(g, ['--steps=5', str(file), '--name=001', '--widths=8,16', '--compile=False'])
    assert out == dict(lr=1.0, steps=40, name='001', compile=False, widths=(8, 16))
    assert g['steps'] == 40 and type(g['lr']) is float

@pytest.mark.parametrize('text, value', [
    ('T1w,T2w', ('T1w', 'T2w')), ('T1w', ('T1w',)), ('(1, 2)', (1, 2)), ('', ()), ('4', (4,))])
def test_tuples_may_be_written_as_lists(text, value):
    g = settings()
    assert configure(g, [f'--widths={text}'])['widths'] == value

@pytest.mark.parametrize('arg, message', [
    ('--lrr=1', "unknown key 'lrr', did you mean 'lr'"),
    ('--lr=fast', "lr must be float like 0.001, got 'fast'"),
    ('--steps=1.5', 'steps must be int'),
    ('--compile=1', 'compile must be bool'),
    ('--lr', 'write --lr=value'),
    ('--_hidden=1', "unknown key '_hidden'"),
    ('missing.py', 'missing.py: cannot read')])
def test_bad_settings_are_refused_in_one_line(arg, message):
    with pytest.raises(SystemExit) as e:
        configure(settings(), [arg])
    assert message in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('text, message', [
    ('lrr = 1', "unknown key 'lrr'"),
    ('lr = "x"', 'lr must be float'),
    ('lr =', 'SyntaxError'),
    ('lr = 1 / 0', 'ZeroDivisionError')])
def test_bad_config_files_are_refused_with_their_name(tmp_path, text, message):
    file = tmp_path / 'bad.py'
    file.write_text(text)
    with pytest.raises(SystemExit) as e:
        configure(settings(), [str(file)])
    assert message in str(e.value) and 'bad.py' in str(e.value) and '\n' not in str(e.value)

def test_checkpoints_are_read_without_running_code_and_written_whole(tmp_path):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, {'model_args': {'widths': (1, 2)}, 'w': torch.ones(2)})
    assert load_checkpoint(path)['model_args']['widths'] == (1, 2)
    assert os.listdir(tmp_path) == ['ckpt.pt']
    with pytest.raises(SystemExit, match='cannot write'):
        save_checkpoint(str(tmp_path / 'no' / 'ckpt.pt'), {})

def write_pickle_with_code(path):
    with open(path, 'wb') as f:
        f.write(b'cos\nsystem\n(S"true"\ntR.')

@pytest.mark.parametrize('spoil, message', [
    (os.remove, 'no such checkpoint'),
    (lambda path: os.truncate(path, 300), 'not a readable'),
    (lambda path: torch.save({'a': 1}, path), 'model_args'),
    (write_pickle_with_code, 'not a readable')])
def test_bad_checkpoints_are_refused_with_their_name(tmp_path, spoil, message):
    path = str(tmp_path / 'ckpt.pt')
    save_checkpoint(path, {'model_args': {}})
    spoil(path)
    with pytest.raises(SystemExit, match=message) as e:
        load_checkpoint(path)
    assert path in str(e.value)

def test_float32_is_float32_in_every_script(tf32_allowed):
    torch.backends.cudnn.allow_tf32 = True
    start_processes('cpu')
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    for script in ('train_vae', 'train_flow', 'evaluate', 'sample', 'bench'):
        with open(os.path.join(ROOT, f'{script}.py')) as f:
            source = f.read()
        assert 'start_processes(device)' in source and 'allow_tf32' not in source, script

def late_process(rank, folder):
    """Two processes that give up after a second; the first is busy for three."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29519')
    dist.init_process_group('gloo', rank=rank, world_size=2, init_method=f'file://{folder}/meet',
                            timeout=timedelta(seconds=1))
    if rank == 0:
        time.sleep(3)
        (folder / 'prepared').touch()
    wait_for_all()
    (folder / f'rank{rank}').write_text(str((folder / 'prepared').exists()))
    dist.destroy_process_group()

def test_processes_wait_for_one_that_prepares_data_longer_than_they_wait_for_a_message(tmp_path):
    mp.spawn(late_process, (tmp_path,), nprocs=2)
    assert [(tmp_path / f'rank{rank}').read_text() for rank in (0, 1)] == ['True', 'True']

def run_code(code):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)

def test_out_of_memory_ends_with_one_line():
    done = run_code("import torch, common; common.explain_failures('batch_size=4'); "
                    "raise torch.OutOfMemoryError('CUDA out of memory')")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and 'lower batch_size=4' in done.stderr

def test_other_errors_keep_their_traceback():
    done = run_code("import common; common.explain_failures('x'); raise KeyError('a fault of ours')")
    assert 'Traceback' in done.stderr and 'a fault of ours' in done.stderr

# ---------------------------------------------------------------- help, and what a run would overwrite

def test_help_shows_values_after_config_and_flags_with_their_comments(tmp_path, capsys):
    script = tmp_path / 'script.py'
    script.write_text('# in and out\nlr = 0.1   # the rate\nsteps = 3\n\n# not a setting\nother = f(2)\n')
    file = tmp_path / 'c.py'
    file.write_text('steps = 7\n')
    g = dict(__doc__='Does it.', __file__=str(script), lr=0.1, steps=3)
    with pytest.raises(SystemExit) as end:
        configure(g, [str(file), '--help', '--lr=0.5'])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[0] == 'Does it.'
    assert 'in and out' in lines and 'not a setting' not in lines
    assert any(line.split() == ['--lr=0.5', 'the', 'rate'] for line in lines)
    assert '  --steps=7' in lines

def test_a_run_is_not_overwritten_unasked(tmp_path):
    refuse_overwriting(tmp_path, 'scratch', False)
    (tmp_path / 'ckpt.pt').write_text('')
    refuse_overwriting(tmp_path, 'resume', False)
    refuse_overwriting(tmp_path, 'scratch', True)
    with pytest.raises(SystemExit, match='--overwrite=True'):
        refuse_overwriting(tmp_path, 'scratch', False)

# ---------------------------------------------------------------- the log of a run

def test_tensorboard_gets_every_record_of_a_log(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append('flush')

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    StepLog(str(tmp_path), {'tensorboard': True}, '', 1, 3, 10, 'cpu', 1).write({'iter': 4, 'lr': 0.5})
    assert written == [(f'{tmp_path}/tensorboard', 4), ('lr', 0.5, 4), 'flush']

def test_without_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(SystemExit, match='pip install tensorboard'):
        StepLog(str(tmp_path), {'tensorboard': True}, '', 1, 0, 10, 'cpu', 1)
    StepLog(str(tmp_path), {}, '', 1, 0, 10, 'cpu', 1)
