"""What a training step holds: the count of bytes, and what the trainers say before the first step."""
import pytest
import torch

from conftest import TINY, play, step_bytes
from judge import cost
from judge.cost import Live, available_bytes, free_bytes, group_bytes, memory_line
from model import ConvVAE, ConvVAEConfig

# ---------------------------------------------------------------- counting

def test_the_count_of_memory_is_in_blocks_of_512_bytes():
    with Live() as live:
        kept = [torch.empty(1000), torch.empty(2, 64)]
        assert live.now == 4096 + 512
        kept.clear()
        assert live.now == 0

def test_a_view_holds_no_memory_of_its_own():
    with Live() as live:
        a, b = torch.empty(1000), torch.empty(2, 64)
        b = b.T[1:] + 1  # for a moment two are alive
        del a
        assert live.now == 512 and live.peak == 4096 + 2 * 512

def test_the_count_of_memory_holds_what_the_backward_pass_needs():
    with Live() as live:
        kept = torch.empty(256, requires_grad=True).exp().sin()  # the leaf and exp's result beside sin's
        assert live.now == 3 * 1024
        del kept
        assert live.now == 0

SMALL = ConvVAEConfig(widths=(8, 8, 8), res_blocks=1, latent_dim=2)

def make_scope():
    net = ConvVAE(SMALL)
    return {'net': net, 'device': 'cpu', 'dtype': 'float32', 'nothing': None}

def step_in(scope):
    x = torch.ones(1, 1, 16, 16, 16, device=scope['device'])
    scope['net'](x)['x_hat'].square().mean().backward()

def test_a_step_counted_without_content_holds_what_a_real_one_does():
    scope = make_scope()
    counted = step_bytes(scope, ('net', 'nothing'), (), lambda: step_in(scope))
    with Live() as live:
        real = make_scope()
        step_in(real)
    assert abs(counted - live.peak) < 0.1 * live.peak, (counted, live.peak)
    assert all(p.grad is None for p in scope['net'].parameters())  # it was done on copies

def test_what_an_optimiser_holds_is_added():
    scope, step = make_scope(), int
    held = [torch.empty(1000), torch.empty(1)]
    assert step_bytes(scope, (), held, step) == 4096 + 512

def test_a_count_that_fails_is_not_known():
    scope = make_scope()
    assert step_bytes(scope, ('net',), (), lambda: step_in(scope | {'net': print})) is None
    line = memory_line(2_000_000, None, 2 ** 30, 'cpu', 'batch_size=4')
    assert line == '2.00 M parameters, memory of a training step not known, free on cpu 1.0 GiB'

def test_what_does_not_fit_names_what_to_lower():
    fits, too_much = [memory_line(1, n * 2 ** 30, 2 ** 31, 'cpu', 'batch_size=4') for n in (1, 3)]
    assert 'fit' not in fits and too_much.endswith('3.0 GiB, free on cpu 2.0 GiB; it will not fit: '
                                                   'lower batch_size=4')

# ---------------------------------------------------------------- what the machine has

def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace('DOT', '.')).write_text(text)

def test_free_memory_is_what_the_kernel_says(tmp_path):
    write(tmp_path, meminfo='MemTotal:  9 kB\nMemAvailable:   2048 kB\n')
    assert free_bytes(tmp_path / 'meminfo') == 2 ** 21
    assert free_bytes(tmp_path / 'absent') is None

def test_the_limits_of_control_groups_count_without_the_files_they_cache(tmp_path):
    write(tmp_path / 'jobs' / 'one', memoryDOTmax='max\n', memoryDOTcurrent='5\n')
    write(tmp_path / 'jobs', memoryDOTmax='1000\n', memoryDOTcurrent='700\n',
          memoryDOTstat='anon 1\nfile 200\n')
    write(tmp_path, groups='0::/jobs/one\n')
    assert group_bytes(tmp_path, tmp_path / 'groups') == [500]
    write(tmp_path / 'memory', memoryDOTlimit_in_bytes='900\n', memoryDOTusage_in_bytes='100\n')
    write(tmp_path, groups='5:cpu:/x\n4:memory:/elsewhere\n')  # as in a container
    assert group_bytes(tmp_path, tmp_path / 'groups') == [800]

def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(cost, 'free_bytes', lambda: 100)
    monkeypatch.setattr(cost, 'group_bytes', lambda: [80])
    assert available_bytes('cpu') == 80
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert available_bytes('cpu') == 20

# ---------------------------------------------------------------- the trainers

@pytest.mark.parametrize('flags', [
    ['--muon=True', '--cross_start=0', '--adv_start=0', '--joint=none', '--w_align=0.001'],
    ['--quantizer=fsq', '--joint=none'],
    ['--kind=convvae', '--w_perc=1', '--perceptual=random', '--w_discriminator=1', '--modalities=T1w',
     '--w_ssim=0', '--w_cross=0', '--widths=8,8', '--attn_levels=', '--w_kl=1']])
def test_training_says_what_a_step_holds(monkeypatch, tiny_data, tmp_path, flags):
    monkeypatch.setattr(cost, 'step_bytes', step_bytes)
    printed = play('train_vae.py', *TINY, f'--data_dir={tiny_data}', f'--out_dir={tmp_path}/out',
                   '--max_iters=1', '--eval_sessions=1', *flags)
    line = next(line for line in printed.splitlines() if 'memory' in line)
    assert 'not known' not in line and 'not fit' not in line
    smaller, larger = line.split(' MiB')[0].split()[-1], 2 ** 10
    assert 1 < int(smaller) < larger
