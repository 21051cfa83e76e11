"""What everything costs, against the machine's own limits.

    python bench.py                                   # every case: full sizes on a GPU, small ones on a CPU
    python bench.py --cases=vae,unet --profile=True   # some, with a step's ten dearest kernels
    python bench.py --samplers=out/demo_flow/best.pt  # error of a flow's samples at equal numbers of calls
    python bench.py --check=True                      # is everything right on this machine? writes check.json

Times are medians after a warm-up, in ms, with the spread from least to most. MFU is the FLOP of convolutions,
products and attentions over time and the measured rate of a large matrix product. GB are what the compiled
kernels read and write; the floor is the longer of FLOP and bytes at the machine's own rates.
"""
import contextlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from unittest import mock

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch._inductor import compile_fx, metrics
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

import layers
import model as networks
import synth
from common import autocast, compile_whole, configure, load_checkpoint, save_checkpoint, start_processes
from data import Sessions, prefetch, read_folder
from flow import flow_matching_loss, sample
from judge.cost import counting
from judge.selfcheck import rates, run_all, timings
from losses import PatchDiscriminator, discriminator_loss, kl_loss, reconstruction_loss
from scans import nifti
from slabs import slabwise

# ---------------------------------------------------------------- settings
cases = ('memory', 'neuroquant', 'slices', 'vae', 'whole', 'unet', 'discriminator', 'convolutions', 'prepare',
         'loader', 'checkpoint')
check = False            # properties instead of cases, see judge/selfcheck.py
samplers = ''            # checkpoint of a flow, instead of cases
pairs = ()               # sessions per batch of memory and neuroquant; () for 1,2,4, but a CPU times 1
repeats = 5
device = ''
dtype = 'bfloat16'       # on a CPU always float32
compile = True           # on a CPU never
checkpointing = False
profile = False
data_dir = ''            # of loader; '' makes 16 full scans in a temporary folder

FULL = (144, 192, 144)   # of a volume

# ---------------------------------------------------------------- measuring

def milliseconds(call):
    """Median and spread of `repeats` calls after one that warms up."""
    times = [1000 * seconds for seconds in timings(call, device, repeats)]
    return statistics.median(times), max(times) - min(times)

@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def count_onednn(x_shape, w_shape, *args, out_shape=None, **kwargs):
    return conv_flop_count(x_shape, w_shape, out_shape)

def table(*head):
    print()
    row(*head)
    row(*['---'] * len(head))

def row(*cells):
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)

def by_x(shape):
    return 'x'.join(map(str, shape))

def measure(name, calls, *modules):
    """Print a row for each of calls {what: function}; returns {what: ms}. modules: what to compile."""
    flops, medians = {}, {}
    for what, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[what] = counter.get_total_flops()
    for module in modules if compile else ():
        compile_whole(module)
    table('case', 'ms', 'spread', 'TFLOP', 'MFU', 'GB', 'floor, ms', 'peak GiB', 'compiled in s')
    for what, call in calls.items():
        metrics.reset()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        moved = metrics.num_bytes_accessed
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        ms, spread = milliseconds(call)
        floor = 1000 * max(flops[what] / flop_rate, moved / byte_rate)
        peak = f'{torch.cuda.max_memory_allocated() / 2 ** 30:.1f}' if on_gpu else ''
        cells = [f'{ms:.0f}', f'{spread:.0f}', f'{flops[what] / 1e12:.3f}']
        cells += [f'{1000 * flops[what] / ms / flop_rate:.0%}', f'{moved / 1e9:.1f}', f'{floor:.0f}', peak]
        row(f'{name}, {what}', *cells, f'{seconds:.0f}')
        medians[what] = ms
    if profile and 'training step' in calls:
        print_profile(calls['training step'])
    return medians

def print_profile(step):
    """The ten dearest kernels of a step, its launches, and the share of its time that the device is busy."""
    start = time.perf_counter()
    with torch.profiler.profile() as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    where = 'cuda' if on_gpu else 'cpu'
    totals = trace.key_averages()
    print(totals.table(sort_by=f'self_{where}_time_total', row_limit=10, max_name_column_width=60))
    if on_gpu:
        kernels = [e for e in totals if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        launches = sum(e.count for e in kernels)
        print(f'{launches} launches, busy for {busy:.3f} of {seconds:.3f} s with the profiler')

def training(net, loss, layout=torch.channels_last_3d):
    """The forward pass and a training step of net, as calls for measure(). loss(): a scalar."""
    if layout:
        net.to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-5, fused=True)
    def forward():
        with torch.no_grad(), autocast(device, dtype):
            loss()
    def step():
        with autocast(device, dtype):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {'forward': forward, 'training step': step}

# ---------------------------------------------------------------- networks

def neuroquant_step(shape, sessions):
    """NeuroQuant's default, and its loss on sessions of two modalities with both swaps."""
    net = networks.NeuroQuant(networks.NeuroQuantConfig())
    net.encoder.checkpointing = net.decoder.checkpointing = checkpointing
    x = torch.rand(2 * sessions, 1, *shape, device=device).to(memory_format=torch.channels_last_3d)
    rows = torch.arange(2 * sessions, device=device)
    swaps = torch.stack([rows, rows + 1 - 2 * (rows % 2)], 1)  # (0, 1), (1, 0), (2, 3), ...
    error = torch.compile(reconstruction_loss) if compile else reconstruction_loss
    def loss():
        out = net(x, rows % 2, swaps)
        own = error(out['x_hat'], x, 0.5) + 0.25 * out['commit']
        return own + 0.5 * error(out['x_cross'], x[swaps[:, 1]], 0.0)
    return net, loss

def step_gib(sessions, checkpointing):
    """Peak GiB of a full training step in bfloat16, counted on tensors without content, norms as on a GPU."""
    changed = mock.patch.dict(globals(), device='cpu', dtype='bfloat16', checkpointing=checkpointing)
    with changed, counting('bfloat16') as live:
        step = training(*neuroquant_step(FULL, sessions), layout=None)['training step']
        step()
        step()  # this one holds the optimiser's state too
    return live.peak / 2 ** 30

def case_memory():
    """GiB that a card must hold for a training step at full size; needs neither the card nor the memory."""
    table(f'NeuroQuant, {by_x(FULL)}, bfloat16, not compiled', 'GiB', 'with checkpointing')
    for n in pairs or (1, 2, 4):
        row(f'{n} x 2 volumes, both swaps', f'{step_gib(n, False):.1f}', f'{step_gib(n, True):.1f}')

def case_neuroquant():
    """ms of a step on sessions of two volumes, reconstructed and swapped."""
    shape = FULL if on_gpu else (48, 64, 48)
    for n in pairs or ((1, 2, 4) if on_gpu else (1,)):
        net, loss = neuroquant_step(shape, n)
        name = f'NeuroQuant, {n} x 2 volumes of {by_x(shape)}'
        measure(name, training(net, loss), net.encoder, net.decoder)

@contextlib.contextmanager
def blind_to_slices():
    """Within, networks take a batch of slices for volumes of depth 1."""
    def double(x, mode='nearest'):
        return layers.double_axes(x, mode, list(x.shape[2:]).index(1))
    def halve(x):
        return F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]])
    changed = {'missing_axis': lambda x: None, 'halve': halve, 'double': double}
    with mock.patch.multiple(layers, **changed), mock.patch.multiple(networks, **changed):
        yield

def case_slices():
    """ms of a step on slices, over those of a network that takes them for volumes of depth 1."""
    n = 128 if on_gpu else 8
    for shape in ((144, 192, 1), (144, 1, 144), (1, 192, 144)):
        net = networks.NeuroQuant(networks.NeuroQuantConfig())
        x = torch.rand(n, 1, *shape, device=device).to(memory_format=torch.channels_last_3d)
        modality = torch.arange(n, device=device) % 2
        calls = training(net, lambda: reconstruction_loss(net(x, modality)['x_hat'], x, 0.5))
        name = f'NeuroQuant, {n} slices of {by_x(shape)}'
        ms = measure(name, calls, net.encoder, net.decoder)['training step']
        del calls['forward']
        with blind_to_slices():
            blind_ms = measure(f'{name}, as volumes', calls, net.encoder, net.decoder)['training step']
        print(f'\nslices against volumes of depth 1: ratio {ms / blind_ms:.2f}')

def case_convolutions():
    """ms of a 3x3x3 convolution by channels: forward, gradients of data and of weights; and its floor."""
    side = 96 if on_gpu else 32
    table(f'convolution, {by_x((side,) * 3)}', 'channels last: forward', 'data', 'weights', 'floor each',
          'contiguous: forward', 'data', 'weights')
    for c_in, c_out in ((1, 16), (16, 1), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128)):
        times = []
        for layout in (torch.channels_last_3d, torch.contiguous_format):
            kind = dict(device=device, dtype=getattr(torch, dtype))
            x = torch.randn(2, c_in, side, side, side, **kind).to(memory_format=layout).requires_grad_()
            w = torch.randn(c_out, c_in, 3, 3, 3, **kind).to(memory_format=layout).requires_grad_()
            y = F.conv3d(x, w, padding=1)
            grad = torch.randn_like(y)
            times.append(milliseconds(lambda: F.conv3d(x, w, padding=1))[0])
            for wanted in (x, w):
                backward = partial(torch.autograd.grad, y, wanted, grad, retain_graph=True)
                times.append(milliseconds(backward)[0])
        moved = (x.numel() + y.numel()) * x.element_size()
        floor = 1000 * max(2 * 27 * c_in * y.numel() / flop_rate, moved / byte_rate)
        times.insert(3, floor)
        row(f'{c_in} to {c_out}', *[f'{ms:.2f}' for ms in times])

def cubes():
    return torch.rand((2, 1, 96, 96, 96) if on_gpu else (1, 1, 48, 48, 48), device=device)

def case_vae():
    """ms of a step of MAISI's autoencoder."""
    net, x = networks.ConvVAE(networks.ConvVAEConfig()), cubes().to(memory_format=torch.channels_last_3d)
    def loss():
        out = net(x)
        return reconstruction_loss(out['x_hat'], x, 0.0) + 5e-4 * kl_loss(out['mu'], out['logvar'])
    measure(f'MAISI-VAE, {by_x(x.shape)}', training(net, loss), net.encoder, net.decoder)

def case_whole():
    """ms of MAISI's autoencoder on a whole volume: in, out, and out slab by slab."""
    shape = (128, 256, 128) if on_gpu else (48, 48, 48)
    net = networks.ConvVAE(networks.ConvVAEConfig()).to(device, memory_format=torch.channels_last_3d).eval()
    x, z = torch.rand(1, 1, *shape, device=device), torch.randn(1, *net.latent_shape(shape), device=device)
    calls = {'encode': lambda: net.posterior(x), 'decode': lambda: net.decode_volume(z),
             'decode in slabs of 8': lambda: slabwise(net, 8).decode_volume(z)}
    with torch.no_grad(), autocast(device, dtype):
        measure(f'MAISI-VAE, whole {by_x(shape)}', calls)

def case_unet():
    """ms of a step of MAISI's U-Net, and of drawing one latent in 30 steps."""
    net = networks.FlowUNet(networks.FlowUNetConfig())
    x = torch.randn((4, 4, 32, 64, 32) if on_gpu else (1, 4, 16, 16, 16), device=device)
    noise, t = torch.randn_like(x), torch.rand(len(x), device=device)
    layout = torch.channels_last_3d if on_gpu else torch.contiguous_format  # as train_flow.py
    calls = training(net, lambda: flow_matching_loss(net, x, noise, t), layout)
    def draw():
        with autocast(device, dtype):
            sample(net, noise[:1], 30)
    calls['sampling of one latent, 30 steps'] = draw
    measure(f'FlowUNet, {by_x(x.shape)}', calls, net)

def case_discriminator():
    """ms of a step of the patch discriminator on volumes."""
    net, x = PatchDiscriminator(3), cubes()
    calls = training(net, lambda: discriminator_loss(net(x), True))
    measure(f'PatchGAN, {by_x(x.shape)}', calls, net)

# ---------------------------------------------------------------- files

def write_index(folder, n):
    """The index of n subjects with T1w and T2w, without their scans."""
    with open(f'{folder}/subjects.tsv', 'w') as f:
        f.write('subject\tsession\tsplit\tT1w\tT2w\n')
        f.writelines(f'sub-{i}\tses-01\ttrain\t{i}_T1w.npy\t{i}_T2w.npy\n' for i in range(n))
    with open(f'{folder}/dataset.json', 'w') as f:
        json.dump({'shape': FULL, 'spacing_mm': 1.0, 'modalities': ['T1w', 'T2w']}, f)

def case_prepare():
    """ms to prepare a skull-stripped scan of 182x218x182 at 1 mm on one core, and to open 10,000 sessions."""
    with tempfile.TemporaryDirectory() as folder:
        scan = f'{folder}/scan.nii.gz'
        image = synth.phantom(0, (182, 218, 182), modalities=('T1w',))['images']['T1w']
        nib.save(nib.Nifti1Image((1000 * image).astype(np.int16), np.diag([-1.0, 1, 1, 1])), scan)
        write_index(folder, 10_000)
        def prepare():
            volume, affine, _ = nifti.read(scan)
            boxes, _ = nifti.conform([volume], [affine], FULL)
            nifti.save_npy(f'{folder}/scan.npy', boxes[0])
        preparing, _ = milliseconds(prepare)
        opening, _ = milliseconds(lambda: Sessions(folder, ('T1w', 'T2w'), 'train'))
    print(f'\npreparing a scan: {preparing:.0f} ms; opening 10,000 sessions: {opening:.0f} ms')

def write_scans(folder):
    """A data set of eight subjects: noise within an ellipsoid."""
    rng, squares = np.random.default_rng(0), [np.linspace(-1, 1, n) ** 2 for n in FULL]
    inside = squares[0][:, None, None] + squares[1][:, None] + squares[2] < 0.8
    write_index(folder, 8)
    for i, modality in itertools.product(range(8), ('T1w', 'T2w')):
        np.save(f'{folder}/{i}_{modality}.npy', inside * rng.random(FULL, np.float32))

def case_loader():
    """ms per batch: one by one; by the threads that training uses; and so with an empty page cache."""
    with tempfile.TemporaryDirectory() as folder:
        if not data_dir:
            write_scans(folder)
        modalities = read_folder(data_dir or folder)[1]['modalities']
        data = Sessions(data_dir or folder, modalities, 'train')
        batches = {'2 sessions, whole': (data.session_batch, 2),
                   '2 patches of 96^3': (data.scan_batch, 2, (96, 96, 96)),
                   '2 patches of 96^3, augmented': (data.scan_batch, 2, (96, 96, 96), True)}
        batches |= {f'128 slices across axis {axis}': (data.slice_batch, 128, axis) for axis in range(3)}
        table('batch', 'ms, one by one', 'spread', 'prefetched', 'prefetched, cold')
        for name, (method, *args) in batches.items():
            times = loading_times(lambda step: method(step, *args), data)
            row(name, *[f'{ms:.1f}' for ms in times])

def loading_times(make_batch, data):
    steps = itertools.count()
    def ten():
        return list(prefetch(make_batch, itertools.islice(steps, 10), device))
    ms, spread = milliseconds(lambda: make_batch(next(steps)))
    warm, _ = milliseconds(ten)
    os.sync()
    for scan in data.scans:
        with open(data.path(*scan), 'rb') as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    ten()
    return ms, spread, warm / 10, 100 * (time.perf_counter() - start)

def case_checkpoint():
    """ms to save NeuroQuant's default and the two averages of its optimiser."""
    net = networks.NeuroQuant(networks.NeuroQuantConfig()).to(device)
    state = {'model': net.state_dict(), 'optimizer': [p.clone() for p in net.parameters() for _ in range(2)]}
    with tempfile.TemporaryDirectory() as folder:
        ms, spread = milliseconds(lambda: save_checkpoint(f'{folder}/ckpt.pt', state))
        mib = os.path.getsize(f'{folder}/ckpt.pt') / 2 ** 20
    print(f'\na checkpoint of {mib:.0f} MiB: {ms:.0f} ms (spread {spread:.0f})')

# ---------------------------------------------------------------- samplers

@torch.no_grad()
def bench_samplers():
    """RMS distance, in sd of the latent, to the same noise followed with 200 Heun steps, by calls."""
    checkpoint = load_checkpoint(samplers)
    flow = networks.from_checkpoint(checkpoint).to(device)
    noise = torch.randn(4, *checkpoint['latent_shape'], generator=torch.Generator().manual_seed(0)).to(device)
    table('calls', 'Euler', 'Heun')
    with autocast(device, dtype):
        exact = sample(flow, noise, 200, 'heun')
        for n in (4, 8, 16, 30, 60):
            drawn = sample(flow, noise, n, 'euler'), sample(flow, noise, n // 2, 'heun')
            row(n, *[f'{(x - exact).square().mean().sqrt():.4f}' for x in drawn])

CASES = {name.removeprefix('case_'): f for name, f in list(globals().items()) if name.startswith('case_')}

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    if set(cases) - set(CASES):
        raise SystemExit(f'--cases={",".join(cases)}: of {", ".join(CASES)}')
    _, _, device = start_processes(device)
    on_gpu = device.startswith('cuda')
    if not on_gpu:
        dtype, compile = 'float32', False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    if check:
        sys.exit(min(1, run_all(device, 'check.json')))
    if samplers:
        bench_samplers()
        sys.exit()
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # else no bytes are counted
    flop_rate, byte_rate = rates(device, getattr(torch, dtype))
    machine = torch.cuda.get_device_name() if on_gpu else f'{torch.get_num_threads()} CPU threads'
    print(f'{machine}, torch {torch.__version__}, {dtype}: matrix product {flop_rate / 1e12:.2f} TFLOP/s, '
          f'copy {byte_rate / 1e9:.0f} GB/s')
    for name in cases:
        CASES[name]()
