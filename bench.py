"""What everything costs, against the machine's own limits and against MONAI.

    python bench.py                                   # every case: full sizes on a GPU, small ones on a CPU
    python bench.py --cases=memory                    # what a card must hold for a full-size training step; needs none
    python bench.py --cases=vae,unet --profile=True   # also trace.json and the ten dearest kernels of each training step
    python bench.py --vs=monai                        # MAISI's networks, the same weights, in turns with MONAI's (needs monai)
    python bench.py --samplers=out/demo_flow/best.pt  # error of a flow's samples at equal numbers of calls, Heun against Euler

Times are medians of `repeats` runs after a warm-up, in milliseconds, with the spread from least to most. MFU is the FLOP of all
convolutions, products and attentions over time and the measured rate of a large matrix product. The floor of a step is the longer
of two times: those FLOP at that rate, and their operands, each read or written once, at the measured rate of a copy.
"""
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from unittest import mock

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

import model as networks
from scans import nifti
import synth
from common import (
    all_reduce_mean, autocast, configure, load_checkpoint, save_checkpoint, start_processes, stop_processes
)
from data import Sessions, prefetch
from flow import flow_matching_loss, sample
from losses import PatchDiscriminator, adversarial_loss, kl_loss, reconstruction_loss
from prepare import save_npy
from pretrained import load_maisi_unet, load_maisi_vae

# ---------------------------------------------------------------- settings
cases = (
    'memory', 'neuroquant', 'slices', 'linear', 'vae', 'whole', 'unet', 'critic', 'prepare', 'loader',
    'checkpoint', 'processes'
)
vs = ''                  # 'monai', of the cases vae, whole, unet, critic
samplers = ''            # checkpoint of a flow
# side of the cube of vae, of whole on a CPU and of --vs=monai; 0 picks 96 on a GPU, 48 on a CPU
size = 0
pairs = ()               # sessions per batch of neuroquant; () picks 1,2,4 on a GPU, 1 on a CPU
slices = 0               # per batch; 0 picks 128 on a GPU, 8 on a CPU
repeats = 5
turns = 3                # of --vs=monai
device = ''
dtype = 'bfloat16'       # on a CPU always float32
compile = True           # on a CPU never
checkpointing = False
profile = False
data_dir = ''            # of loader; '' makes 16 scans of 144x192x144 in a temporary folder
only = ''                # used by itself: one measurement in a process of its own

# ---------------------------------------------------------------- measuring

def milliseconds(step):
    """Median and spread of `repeats` calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])

@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def count_onednn(x_shape, w_shape, *args, out_shape=None, **kwargs):
    return conv_flop_count(x_shape, w_shape, out_shape)

class Operands(TorchDispatchMode):
    """Adds up the bytes that convolutions, matrix products and attentions read and write; the rest can be fused into them."""
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(word in func.__name__ for word in ('convolution', 'mm', 'scaled_dot_product')):
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)
            )
        return out

def cost(step):
    """FLOP and bytes of the operands of one call."""
    with Operands() as operands, FlopCounterMode(display=False) as flops:
        step()
    return flops.get_total_flops(), operands.bytes

def machine():
    """Measured FLOP/s of a large matrix product in the working precision and bytes/s of a copy."""
    cuda = device.startswith('cuda')
    n, kind = (
        (8192, torch.bfloat16 if dtype == 'bfloat16' else torch.float32) if cuda else (2048, torch.float32)
    )
    a, b = torch.randn(n, n, device=device, dtype=kind), torch.empty(2**28 if cuda else 2**25, device=device)
    c = torch.empty_like(b)
    return 2 * n**3 / (milliseconds(lambda: a @ a)[0] / 1000), 2 * b.numel() * 4 / (
        milliseconds(lambda: c.copy_(b))[0] / 1000
    )

def peak_memory(step):
    """MiB that memory rises to above what is held before a call; on a CPU the process's highest so far, None if that tells nothing."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = resident()
    step()
    after = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - held) / 2 ** 20 if after > before else None

def resident():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()

class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, in blocks of 512 as CUDA's allocator does, and keeps the peak."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
            if key in self.known: continue
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

def shape_text(shape):
    return 'x'.join(map(str, shape))

HEAD = (
    '\n| case | ms | spread | calls/s | Mvoxel/s | TFLOP | MFU | floor, ms | peak, MiB |\n'
    + '|'
    + ' --- |' * 9
)

def measure(name, calls, voxels, compiled=()):
    """A table with a line for each of calls {what: function}. voxels: of all volumes of a call. compiled: modules to compile.

    Counting happens before compilation, memory on a GPU after it. returns {what: ms}.
    """
    cuda, memory, found = device.startswith('cuda'), {}, {}
    if not cuda:
        memory = {what: peak_memory(call) for what, call in calls.items()}
    costs = {what: cost(call) for what, call in calls.items()}
    for module in compiled if compile else ():
        module.compile(dynamic=False)
    print(HEAD)
    for what, call in calls.items():
        if cuda:
            call(), memory.update({what: peak_memory(call)})
        (flops, data), (ms, spread) = costs[what], milliseconds(call)
        least = {'FLOP': 1000 * flops / peak, 'bytes': 1000 * data / bandwidth}
        binds = max(least, key=least.get)
        print(
            f'| {name}, {what} | {ms:.0f} | {spread:.0f} | {1000 / ms:.2f} | {voxels / ms / 1000:.2f} |'
            f' {flops / 1e12:.3f} | {1000 * flops / ms / peak:.0%} | {least[binds]:.0f} ({binds}) |'
            f' {"" if memory[what] is None else format(memory[what], ".0f")} |',
            flush=True,
        )
        found[what] = ms
    if profile and 'training step' in calls:
        dearest(name, calls['training step'])
    return found

def training(net, loss, layout=torch.channels_last_3d):
    """The forward pass and a training step of net as calls for measure(). loss(): a scalar."""
    net.to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
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

def dearest(name, step):
    """Trace of one step and its ten dearest kernels."""
    kinds, where = torch.profiler.ProfilerActivity, 'cuda' if device.startswith('cuda') else 'cpu'
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (where == 'cuda')) as found:
        step()
    found.export_chrome_trace('trace.json')
    print(
        found.key_averages().table(
            sort_by=f'self_{where}_time_total', row_limit=10, max_name_column_width=60
        ),
        f'\ntrace of {name}: trace.json\n',
    )

# ---------------------------------------------------------------- the cases

def neuroquant_facts(shape=(144, 192, 144)):
    """Tokens and forward FLOP of one volume, counted without memory."""
    with torch.device('meta'):
        net = networks.NeuroQuant(networks.NeuroQuantConfig())
        tokens = net.encode(torch.empty(1, 1, *shape))[0].shape[2:].numel()
        half, film = (
            torch.empty(1, net.config.widths[0], *[n // 2 for n in shape]),
            [torch.empty(1, net.decoder.channels[-1])] * 2,
        )
        with FlopCounterMode(display=False) as tail:
            net.decoder.heads[-1](net.decoder.blocks[-1](half, *film))
    encode, decode = networks.step_flops(net, shape)
    return (
        f'NeuroQuant, {shape_text(shape)}: {tokens} tokens, {encode / 1e12:.3f} + {decode / 1e12:.3f} TFLOP'
        f' to encode and decode, {tail.get_total_flops() / (encode + decode):.0%} of it in the full-size tail'
    )

def neuroquant_step(shape, sessions, checkpointing, device):
    """NeuroQuant's default, and its loss on sessions of two modalities with both swaps, as config/neuroquant.py trains it."""
    net = networks.NeuroQuant(networks.NeuroQuantConfig())
    for half in (net.encoder, net.decoder):
        half.checkpointing = checkpointing
    x = torch.rand(2 * sessions, 1, *shape, device=device).to(memory_format=torch.channels_last_3d)
    modality = torch.arange(2 * sessions, device=device) % 2
    swaps = torch.tensor(
        [(a + k, a + 1 - k) for a in range(0, 2 * sessions, 2) for k in (0, 1)], device=device
    )
    def loss():
        out = net(x, modality, swaps)
        return (
            reconstruction_loss(out['x_hat'], x, 0.5)
            + 0.25 * out['commit']
            + 0.5 * reconstruction_loss(out['x_cross'], x[swaps[:, 1]], 0.0)
        )
    return net, loss

def step_gib(shape, sessions, checkpointing):
    """Peak GiB of NeuroQuant's training step, not compiled, in bfloat16: counted on tensors without content, norms in float32 as on a GPU."""
    in_float = lambda norm: lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)
    with mock.patch.multiple(
        F, group_norm=in_float(F.group_norm), layer_norm=in_float(F.layer_norm)
    ), FakeTensorMode(), Live() as live:
        net, loss = neuroquant_step(shape, sessions, checkpointing, 'cpu')
        optimizer = torch.optim.AdamW(net.train().parameters())
        for _ in range(2):  # the second holds the optimiser's state too
            with torch.autocast('cpu', torch.bfloat16):
                value = loss()
            value.backward()
            del value
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak / 2 ** 30

def case_memory():
    """What a card must hold for a training step at full size; needs neither the card nor the memory."""
    print(
        '\n| NeuroQuant, 144x192x144, bfloat16, not compiled | GiB | with checkpointing |\n| --- | --- |'
        ' --- |'
    )
    for sessions in pairs or (1, 2, 4):
        plain, recomputed = (step_gib((144, 192, 144), sessions, keep) for keep in (False, True))
        print(f'| {sessions} x 2 volumes, both swaps | {plain:.1f} | {recomputed:.1f} |', flush=True)

def case_neuroquant():
    shape = (144, 192, 144) if big else (48, 64, 48)
    for sessions in pairs or ((1, 2, 4) if big else (1,)):
        net, loss = neuroquant_step(shape, sessions, checkpointing, device)
        name, voxels = f'NeuroQuant, {sessions} x 2 volumes of {shape_text(shape)}', 2 * sessions * math.prod(
            shape
        )
        measure(name, training(net, loss), voxels, (net.encoder, net.decoder))

def case_slices():
    """A 2D step; and the same slices as volumes of depth 1, by a network that does not see that they are slices."""
    n = slices or (128 if big else 8)
    as_volumes = dict(
        missing_axis=lambda x: None,
        halve=lambda x: F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]]),
        double=lambda x, mode='nearest': F.interpolate(
            x, size=[n if n == 1 else 2 * n for n in x.shape[2:]], mode=mode
        ),
    )
    for shape in ((144, 192, 1), (144, 1, 144), (1, 192, 144)):
        net = networks.NeuroQuant(networks.NeuroQuantConfig())
        x, modality = (
            torch.rand(n, 1, *shape, device=device).to(memory_format=torch.channels_last_3d),
            torch.arange(n, device=device) % 2,
        )
        calls = training(net, lambda: reconstruction_loss(net(x, modality)['x_hat'], x, 0.5))
        name, voxels, compiled = (
            f'NeuroQuant, {n} slices of {shape_text(shape)}',
            n * math.prod(shape),
            (net.encoder, net.decoder),
        )
        ours = measure(name, calls, voxels, compiled)
        with mock.patch.multiple(networks, **as_volumes):
            theirs = measure(
                f'{name}, as volumes', {'training step': calls['training step']}, voxels, compiled
            )
        print(
            '\nslices against volumes of depth 1: ratio'
            f' {ours["training step"] / theirs["training step"]:.2f}'
        )

def case_linear():
    """Is the cost linear in voxels? A volume, and one of twice the length."""
    found = []
    for shape in ((96, 96, 96), (192, 96, 96)) if big else ((32, 48, 48), (64, 48, 48)):
        net, loss = neuroquant_step(shape, 1, checkpointing, device)
        name = f'NeuroQuant, 1 x 2 volumes of {shape_text(shape)}'
        found.append(measure(name, training(net, loss), 2 * math.prod(shape), (net.encoder, net.decoder)))
    print(f'\ntwice the voxels: {found[1]["training step"] / found[0]["training step"]:.2f} times the time')

def case_vae():
    net, batch = networks.ConvVAE(networks.ConvVAEConfig()), 2 if big else 1
    x = torch.rand(batch, 1, *[side] * 3, device=device).to(memory_format=torch.channels_last_3d)
    def loss():
        out = net(x)
        return reconstruction_loss(out['x_hat'], x, 0.0) + 5e-4 * kl_loss(out['mu'], out['logvar'])
    measure(
        f'MAISI-VAE, {batch} x {side}^3', training(net, loss), batch * side**3, (net.encoder, net.decoder)
    )

def case_whole():
    """A whole volume in and out, and out slab by slab."""
    shape = (128, 256, 128) if big else (side,) * 3
    net = networks.ConvVAE(networks.ConvVAEConfig()).to(device, memory_format=torch.channels_last_3d).eval()
    x, z = torch.rand(1, 1, *shape, device=device), torch.randn(1, *net.latent_shape(shape), device=device)
    def call(f):
        with torch.no_grad(), autocast(device, dtype):
            f()
    calls = {
        'encode': lambda: call(lambda: net.posterior(x)),
        'decode': lambda: call(lambda: net.decode_volume(z)),
        'decode in slabs of 8': lambda: call(lambda: net.decode_volume(z, slab=8)),
    }
    measure(f'MAISI-VAE, whole {shape_text(shape)}', calls, math.prod(shape))

def case_unet():
    net, batch, shape = (
        networks.FlowUNet(networks.FlowUNetConfig()),
        4 if big else 1,
        (4, 32, 64, 32) if big else (4, 16, 16, 16),
    )
    x, noise, t = (
        torch.randn(batch, *shape, device=device),
        torch.randn(batch, *shape, device=device),
        torch.rand(batch, device=device),
    )
    layout = torch.channels_last_3d if big else torch.contiguous_format  # as train_flow.py
    calls = training(net, lambda: flow_matching_loss(net, x, noise, t, None, 'l2'), layout)
    def draw():
        with autocast(device, dtype):
            sample(net, noise[:1], 30)
    calls['sampling of one latent, 30 steps'] = draw
    measure(f'FlowUNet, {batch} x {shape_text(shape)}', calls, batch * math.prod(shape[1:]), (net,))

def case_critic():
    net, x = PatchDiscriminator(3), torch.rand(2 if big else 1, 1, side, side, side, device=device)
    measure(
        f'PatchGAN, {len(x)} x {side}^3',
        training(net, lambda: adversarial_loss(net(x), True)),
        x.numel(),
        (net,),
    )

def write_index(folder, modalities, n):
    """What makes a folder a prepared data set of n subjects of 144x192x144, but for the scans. returns their file names."""
    names = [[f'sub-{i:05d}_{m}.npy' for m in modalities] for i in range(n)]
    lines = [
        ['subject', 'session', 'split', *modalities],
        *[[f'sub-{i:05d}', 'ses-01', 'train', *row] for i, row in enumerate(names)],
    ]
    with open(os.path.join(folder, 'subjects.tsv'), 'w') as f:
        f.write(''.join('\t'.join(line) + '\n' for line in lines))
    with open(os.path.join(folder, 'dataset.json'), 'w') as f:
        json.dump({'shape': (144, 192, 144), 'spacing_mm': 1.0, 'modalities': modalities}, f)
    return [name for row in names for name in row]

def case_prepare():
    """A skull-stripped scan of 182x218x182 at 1 mm, from NIfTI file to array file, on one core; and opening a set of 10,000 sessions."""
    with tempfile.TemporaryDirectory() as folder:
        scan, array = os.path.join(folder, 'scan.nii.gz'), os.path.join(folder, 'scan.npy')
        image = synth.phantom(0, (182, 218, 182), modalities=('T1w',))['images']['T1w']
        nib.save(nib.Nifti1Image((1000 * image).astype(np.int16), np.diag([-1.0, 1, 1, 1])), scan)
        volume, affine, _ = nifti.read(scan)
        box = nifti.conform([volume], [affine], (144, 192, 144))[0][0]
        steps = {
            'reading and checks': lambda: nifti.read(scan),
            'box and scale': lambda: nifti.conform([volume], [affine], (144, 192, 144)),
            'writing': lambda: save_npy(array, box),
        }
        found = {what: milliseconds(step)[0] for what, step in steps.items()}
        parts = ', '.join(f'{what} {ms:.0f}' for what, ms in found.items())
        print(f'\npreparing a scan of 182x218x182: {sum(found.values()):.0f} ms ({parts})')
        write_index(folder, ['T1w', 'T2w'], 10_000)
        print(
            "opening 10,000 sessions:"
            f" {milliseconds(lambda: Sessions(folder, ('T1w', 'T2w'), 'train'))[0]:.0f} ms"
        )

def case_loader():
    """Batches from memory-mapped files, without any network.

    One by one; by the threads that training uses; and so with no file in the page cache, where new ones are.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = data_dir or folder
        if not data_dir:
            rng, shape = np.random.default_rng(0), (144, 192, 144)
            inside = (
                sum(
                    np.linspace(-1, 1, n).reshape([-1 if a == k else 1 for a in range(3)]) ** 2
                    for k, n in enumerate(shape)
                )
                < 0.8
            )
            for name in write_index(folder, ['T1w', 'T2w'], 8):
                np.save(os.path.join(folder, name), inside * rng.random(shape, np.float32))
        with open(os.path.join(where, 'dataset.json')) as f:
            known = tuple(json.load(f)['modalities'])
        data, step = Sessions(where, known, 'train'), itertools.count()
        makers = {
            '2 sessions, whole': lambda k: data.session_batch(2, 0, 0, 1, k),
            '2 patches of 96^3': lambda k: data.scan_batch(2, 0, 0, 1, k, (96, 96, 96)),
            '2 patches of 96^3, augmented': lambda k: data.scan_batch(2, 0, 0, 1, k, (96, 96, 96), True),
        }
        makers |= {
            f'128 slices across axis {axis}': lambda k, axis=axis: data.slice_batch(128, 0, 0, 1, k, axis)
            for axis in range(3)
        }
        def run(make, n=10):
            return list(prefetch(make, itertools.islice(step, n), device))
        print(
            '\n| batch | ms, one by one | spread | prefetched | prefetched, cold |\n| --- | --- | --- | --- |'
            ' --- |'
        )
        for name, make in makers.items():
            ms, spread = milliseconds(lambda: make(next(step)))
            all_ms, _ = milliseconds(lambda: run(make))
            os.sync()
            for scan in data.scans:
                with open(data.path(*scan), 'rb') as f:
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            run(make)
            print(
                f'| {name} | {ms:.1f} | {spread:.1f} | {all_ms / 10:.1f} |'
                f' {(time.perf_counter() - start) * 100:.1f} |'
            )

def case_checkpoint():
    """What saving costs: weights, their average and the optimiser's state of NeuroQuant's default."""
    net, loss = neuroquant_step((32, 48, 32), 1, False, device)
    optimizer = torch.optim.AdamW(net.to(device).parameters(), fused=True)
    loss().backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'ckpt.pt')
        state = {'model': net.state_dict(), 'ema': net.state_dict(), 'optimizer': optimizer.state_dict()}
        ms, spread = milliseconds(lambda: save_checkpoint(path, state))
        print(
            f'\na checkpoint of {os.path.getsize(path) / 2 ** 20:.0f} MiB: {ms:.0f} ms (spread {spread:.0f}),'
            f' {ms / 350_000:.2%} of 1000 steps of 350 ms'
        )

def case_processes():
    """Throughput of two processes of one thread over twice that of one, gradients averaged; on a CPU only."""
    if big: return
    def run(n):
        args = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            f'--nproc_per_node={n}',
            '--master_port=29517',
            __file__,
            '--only=process',
            '--device=cpu',
            f'--repeats={repeats}',
        ]
        return last_json(args, os.environ | {'OMP_NUM_THREADS': '1'})['ms']
    one, two = run(1), run(2)
    print(
        f'\none process {one:.0f} ms a step, two {two:.0f} ms for twice the volumes: scaling efficiency'
        f' {one / two:.0%}'
    )

def one_process():
    net, loss = neuroquant_step((32, 48, 32), 1, False, device)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    def step():
        loss().backward()
        all_reduce_mean([p.grad for p in net.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {'ms': milliseconds(step)[0]}

# ---------------------------------------------------------------- MAISI against MONAI

def monai_vae():
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    return AutoencoderKlMaisi(  # NVIDIA's released settings but for norm_float16, which a CPU cannot run
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_channels=(64, 128, 256),
        latent_channels=4,
        num_res_blocks=(2, 2, 2),
        norm_num_groups=32,
        norm_eps=1e-6,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        num_splits=4,
        dim_split=1,
        norm_float16=False,
        print_info=False,
    )

def monai_unet():
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
    return DiffusionModelUNetMaisi(
        spatial_dims=3,
        in_channels=4,
        out_channels=4,
        num_channels=(64, 128, 256, 512),
        attention_levels=(False, False, True, True),
        num_head_channels=(0, 0, 32, 32),
        num_res_blocks=2,
        resblock_updown=True,
        include_fc=True,
        use_flash_attention=device.startswith('cuda'),
    )

def monai_critic():
    from monai.networks.nets import PatchDiscriminator as Theirs
    return Theirs(
        spatial_dims=3, channels=32, in_channels=1, out_channels=1, num_layers_d=3, norm='INSTANCE',
        bias=False, kernel_size=4, padding=1
    )

def contest(what, ours):
    """Median ms of one network, ours or MONAI's with the same weights, and how far memory rose above its own with gradients, in MiB."""
    net = {'vae': monai_vae, 'decode': monai_vae, 'unet': monai_unet, 'critic': monai_critic}[what]()
    if ours and what == 'critic':
        theirs, net = net, PatchDiscriminator(3)
        net.load_state_dict(dict(zip(net.state_dict(), theirs.state_dict().values())))
    elif ours:
        net = (load_maisi_unet if what == 'unet' else load_maisi_vae)(net.state_dict())
    net.to(device).train()
    n = latent_side if what == 'unet' else side
    x = (
        torch.rand(1, 1, n, n, n, device=device)
        if what in ('vae', 'critic')
        else torch.randn(1, 4, *[n // 4 if what == 'decode' else n] * 3, device=device)
    )
    t = torch.full((1,), 0.3, device=device)
    def loss():
        if what == 'vae':
            out = net(x)
            x_hat, mu = (out['x_hat'], out['mu']) if ours else out[:2]
            return (x_hat - x).abs().mean() + 1e-3 * mu.square().mean()
        if what == 'critic': return (net(x) if ours else net(x)[-1]).square().mean()
        return (net(x, t if ours else 1000 * (1 - t)) - x).square().mean()
    def step():
        with autocast(device, dtype), torch.set_grad_enabled(what != 'decode'):
            if what == 'decode': return net.decode(x)
            value = loss()
        value.backward()
        net.zero_grad(set_to_none=False)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    if compile:
        net.compile(dynamic=False), step()
    memory = peak_memory(step)
    return {'ms': milliseconds(step)[0], 'mib': memory}

def last_json(command, env=None):
    """What a command that has to succeed printed last, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f'{" ".join(command[1:])}: {done.stderr.strip().splitlines()[-1]}')
    return json.loads([line for line in done.stdout.splitlines() if line.startswith('{')][-1])

def against_monai():
    try:
        import monai
    except ImportError:
        raise SystemExit('--vs=monai needs MONAI: pip install -r requirements-dev.txt')
    print(
        f'medians of {turns} runs in turn, on {device} in {dtype}{", compiled" * compile}, MONAI'
        f' {monai.__version__}\n\n| network, batch 1 | ms: here / MONAI | ratio | MiB: here / MONAI | ratio'
        ' |\n| --- | --- | --- | --- | --- |'
    )
    settings = [
        f'--device={device}',
        f'--dtype={dtype}',
        f'--compile={compile}',
        f'--size={side}',
        f'--repeats={repeats}',
    ]
    for case, what, title in (('vae', 'vae', f'MAISI autoencoder, {side}^3, forward and backward'),
                              ('whole', 'decode', f'MAISI decoder to {side}^3, forward'),
                              ('unet', 'unet', f'MAISI U-Net, 4x{latent_side}^3, forward and backward'),
                              ('critic', 'critic', f'PatchGAN, {side}^3, forward and backward')):
        if case not in cases: continue
        found = {'nanomri': [], 'monai': []}
        for _ in range(turns):
            for who in found:
                found[who].append(last_json([sys.executable, __file__, f'--only={what} {who}', *settings]))
        (ms, their_ms), (mib, their_mib) = (
            [statistics.median(f[key] for f in runs) for runs in found.values()] for key in ('ms', 'mib')
        )
        print(
            f'| {title} | {ms:.0f} / {their_ms:.0f} | {ms / their_ms:.2f} | {mib:.0f} / {their_mib:.0f} |'
            f' {mib / their_mib:.2f} |',
            flush=True,
        )

# ---------------------------------------------------------------- Heun against Euler

@torch.no_grad()
def bench_samplers():
    """Root-mean-square distance to the same noise followed with 200 Heun steps, at equal numbers of calls of the network."""
    checkpoint = load_checkpoint(samplers)
    flow = networks.from_checkpoint(checkpoint).to(device)
    noise = torch.randn(4, *checkpoint['latent_shape'], generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device, dtype):
        exact = sample(flow, noise, 200, 'heun')
        print(
            f'{samplers}, 4 samples, RMS distance to 200 Heun steps, in sd of the latent\n\n| calls | Euler |'
            ' Heun |\n| --- | --- | --- |'
        )
        for calls in (4, 8, 16, 30, 60):
            errors = [(sample(flow, noise, n, method) - exact).square().mean().sqrt().item()
                      for method, n in (('euler', calls), ('heun', calls // 2))]
            print(f'| {calls} | {errors[0]:.4f} | {errors[1]:.4f} |')

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    CASES = {name.removeprefix('case_'): f for name, f in list(globals().items()) if name.startswith('case_')}
    if vs not in ('', 'monai'): raise SystemExit(f'--vs={vs}: monai')
    if set(cases) - set(CASES):
        raise SystemExit(f'--cases={",".join(cases)}: of {", ".join(CASES)}')
    rank, _, device = start_processes(device)
    big = device.startswith('cuda')
    if not big:
        dtype, compile = 'float32', False
    side, latent_side = size or (96 if big else 48), 32 if big else 16
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    if only:
        what, _, who = only.partition(' ')
        found = one_process() if what == 'process' else contest(what, who == 'nanomri')
        if rank == 0:
            print(json.dumps(found))
        stop_processes()
    elif vs:
        against_monai()
    elif samplers:
        bench_samplers()
    else:
        peak, bandwidth = machine()
        where = torch.cuda.get_device_name() if big else f'{torch.get_num_threads()} CPU threads'
        print(
            f'{where}, torch {torch.__version__}, {dtype}{", compiled" * compile}: matrix product'
            f' {peak / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s\n{neuroquant_facts()}'
        )
        for name in cases:
            CASES[name]()
