"""Settings and their refusals, checkpoints, the average of weights."""
import os
import subprocess
import sys
import types

import pytest
import torch

from common import (Muon, StepLog, configure, load_checkpoint, orthogonal, refuse_overwriting,
                    save_checkpoint, start_processes, update_average)
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

def test_average_follows_weights_and_copies_buffers():
    a, b = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    torch.nn.init.constant_(b.weight, 3.0)
    b.running_mean.fill_(7)
    update_average(a, b, 0.75)
    assert a.weight.tolist() == [1.5] * 3 and a.running_mean.tolist() == [7] * 3

def test_float32_is_float32_in_every_script(tf32_allowed):
    torch.backends.cudnn.allow_tf32 = True
    start_processes('cpu')
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    for script in ('train_vae', 'train_flow', 'evaluate', 'sample', 'bench'):
        with open(os.path.join(ROOT, f'{script}.py')) as f:
            source = f.read()
        assert 'start_processes(device)' in source and 'allow_tf32' not in source, script

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

# ---------------------------------------------------------------- orthogonal steps

def test_a_muon_step_of_a_matrix_is_torchs():
    weights = torch.randn(24, 40)
    ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    optimizers = [Muon([ours], 0.01, 0.1),
                  torch.optim.Muon([theirs], 0.01, 0.1, momentum=0.95, adjust_lr_fn='match_rms_adamw')]
    for _ in range(3):
        gradient = torch.randn(24, 40)
        for weight, optimizer in zip((ours, theirs), optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (ours - weights).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.02 * moved  # theirs works in bfloat16

@pytest.mark.parametrize('shape', [(16, 8, 3, 3, 3), (64, 8), (16, 500)])
def test_singular_values_of_an_orthogonal_step_are_near_1(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape).flatten(1)))
    assert values.min() > 0.6 and values.max() < 1.3

def test_the_memory_format_of_a_convolution_changes_nothing_in_its_step():
    stepped = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(16, 4, 3, 3, 3).to(memory_format=memory_format))
        weight.grad = torch.randn(16, 4, 3, 3, 3)
        Muon([weight], 0.01, 0.0).step()
        stepped.append(weight.detach())
    torch.testing.assert_close(*stepped)

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
