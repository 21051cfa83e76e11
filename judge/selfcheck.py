"""What a person with a card runs once, `python bench.py --check=True`: a line PASS or FAIL for each property.

On a machine without a card the lines that compare with the CPU compare it with itself, and show only that the
check runs; float64, bfloat16, graphs, gradients and scripts are checked there too. No case ends the others.
"""
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import compile_for
from data import prefetch
from flow import flow_matching_loss
from layers import double_axes, group_norm
from losses import (ModalityClassifier, PatchDiscriminator, adversary_loss, generator_term, kl_loss,
                    perceptual_loss, reconstruction_loss, ssim)
from model import (GPT, ConvVAE, ConvVAEConfig, FlowUNet, FlowUNetConfig, GPTConfig, NeuroQuant,
                   NeuroQuantConfig)
from optim import Muon, MeanGradients, adamw, update_average
from pretrained import LPIPS
from quantize import VectorQuantizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = NeuroQuantConfig(widths=(8, 8, 16, 16), attn_levels=(2, 3), anat_dim=8, mod_dim=4, modality_dim=4,
                         num_codes=16)

def distance(a, b):
    """Relative distance of two tensors in norm."""
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()

def randomised(net, seed=0):
    """The network without the zeros that it starts with."""
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.7 * p[0].numel() ** -0.5)
    return net

# ---------------------------------------------------------------- numbers: this device against a CPU

def value_and_gradient(function, inputs, device, dtype):
    moved = [x.to(device, dtype).requires_grad_() for x in inputs]
    y = function(*moved)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return y, *torch.autograd.grad((weights * y).sum(), moved)

def check_numbers(device):
    """Losses, norms and doubling in float32, value and gradient."""
    torch.manual_seed(0)
    x = torch.rand(2, 1, 24, 24, 24)
    close = x + 0.02 * torch.randn_like(x)
    h = torch.randn(2, 32, 8, 10, 6)
    norm = group_norm(32)
    functions = {
        'double, nearest': (lambda t: double_axes(t, 'nearest'), [h]),
        'double, linear': (lambda t: double_axes(t, 'linear'), [h]),
        'group norm': (lambda t: norm.to(t)(t), [h]),
        'layer norm': (lambda t: F.layer_norm(t.movedim(1, -1), (32,)), [h]),
    }
    for name, (function, inputs) in functions.items():
        exact = value_and_gradient(function, inputs, 'cpu', torch.float64)
        here = value_and_gradient(function, inputs, device, torch.float32)
        yield f'{name}, float32 against float64', max(map(distance, here, exact)), 1e-4
    for name, function in (('SSIM', partial(ssim, size=7)), ('LPIPS of random features', lpips_of(device))):
        exact = value_and_gradient(function, [x, close], 'cpu', torch.float32)
        here = value_and_gradient(function, [x, close], device, torch.float32)
        yield f'{name}, this device against the CPU', max(map(distance, here, exact)), 1e-4

def lpips_of(device):
    nets = {where: LPIPS().to(where) for where in {'cpu', device}}
    def similarity(a, b):
        return nets[a.device.type if a.device.type == 'cpu' else device](a[:, :, 0], b[:, :, 0])
    return similarity

def check_codes(device):
    """Tokens and one step of the codebook against the CPU."""
    torch.manual_seed(0)
    z = torch.randn(4, 16, 6, 6, 6)
    quantizers = []
    for where in ('cpu', device):
        torch.manual_seed(0)
        q = VectorQuantizer(64, 16, revive=0.0).to(where).train()
        codes = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).to(where)
        q.codebook.copy_(codes)
        q.cluster_size.fill_(1.0)
        q.embed_sum.copy_(codes)
        quantizers.append((q, q(z.to(where))[1].cpu()))
    (exact, tokens), (here, tokens_here) = quantizers
    yield 'tokens that differ from the CPU\'s, share', (tokens != tokens_here).float().mean().item(), 1e-3
    yield 'codebook after a step', distance(here.codebook, exact.codebook), 1e-4

def check_optimisers(device):
    """A step of AdamW and of Muon, and the average of the weights, against the CPU."""
    for name in ('AdamW', 'Muon'):
        results = []
        for where in ('cpu', device):
            torch.manual_seed(0)
            net = nn.Linear(48, 32)
            gradient = torch.randn(32, 48)
            net.to(where)
            net.weight.grad = gradient.to(where)
            matrices = [net.weight]
            optimizer = adamw(matrices, 0.1, (0.9, 0.99), 1e-8, 0.1)
            if name == 'Muon':
                optimizer = Muon(matrices, 0.1, 0.1)
            before = net.weight.detach().clone()
            optimizer.step()
            average = nn.Linear(48, 32).to(where)
            average.load_state_dict({'weight': before, 'bias': net.bias})
            update_average(average, net, 0.9)
            expected = 0.9 * before + 0.1 * net.weight
            results.append((net.weight.detach() - before, distance(average.weight, expected)))
        yield f'step of {name}', distance(results[1][0], results[0][0]), 1e-3
        yield f'average of weights after {name}', results[1][1], 1e-5

# ---------------------------------------------------------------- networks: as trained against float32

def networks(device):
    """{name: (network, its arguments)} for volumes and the three planes."""
    torch.manual_seed(0)  # biases too
    nq = randomised(NeuroQuant(SMALL)).to(device, memory_format=torch.channels_last_3d)
    vae = randomised(ConvVAE(ConvVAEConfig(widths=(16, 32)))).to(device, memory_format=torch.channels_last_3d)
    flow = randomised(FlowUNet(FlowUNetConfig(widths=(16, 32), attention=(False, True)))).to(device)
    t = torch.tensor([0.0, 1.0], device=device)
    film = [(torch.ones(2, c, device=device), torch.zeros(2, c, device=device)) for c in nq.decoder.channels]
    parts = {}
    for name, size in (('volume', (32, 48, 32)), ('sagittal', (1, 48, 32)), ('coronal', (32, 1, 32)),
                       ('axial', (32, 48, 1))):
        x = torch.rand(2, 1, *size, device=device)
        z = torch.randn(2, 8, *[max(1, n // 16) for n in size], device=device)
        parts[f'NeuroQuant encoder, {name}'] = nq.encoder, (x,)
        parts[f'NeuroQuant decoder, {name}'] = nq.decoder, (z, film)
    parts['ConvVAE encoder'] = vae.encoder, (torch.rand(2, 1, 16, 16, 16, device=device),)
    parts['ConvVAE decoder'] = vae.decoder, (torch.randn(2, 4, 8, 8, 8, device=device),)
    folded = randomised(NeuroQuant(replace(SMALL, fold=True, norm='none'))).to(device)
    parts['folded encoder'] = folded.encoder, (torch.rand(2, 1, 32, 48, 32, device=device),)
    parts['folded decoder'] = folded.decoder, (torch.randn(2, 8, 2, 3, 2, device=device), film[:4])
    gpt = randomised(GPT(GPTConfig(grid=(2, 3, 2), num_codes=16, layers=2, heads=2, width=32))).to(device)
    parts['GPT'] = gpt, (torch.randint(16, (2, 11), device=device),)
    parts['FlowUNet'] = flow, (torch.randn(2, 4, 8, 8, 8, device=device), t)
    return parts

def check_networks(device):
    """Forward pass in bfloat16 and compiled, as on a card; on a CPU in bfloat16 alone."""
    for name, (net, args) in networks(device).items():
        with torch.no_grad():
            exact = net(*args)
            with torch.autocast(device.split(':')[0], torch.bfloat16):
                forward = torch.compile(net, dynamic=False) if device != 'cpu' else net
                yield f'{name}, bfloat16', distance(forward(*args), exact), 2e-2

BACKENDS = {'flash': SDPBackend.FLASH_ATTENTION, 'efficient': SDPBackend.EFFICIENT_ATTENTION,
            'cudnn': SDPBackend.CUDNN_ATTENTION, 'math': SDPBackend.MATH}

def check_attention(device):
    """What scaled_dot_product_attention chooses for the rows of axial attention, against every backend."""
    full = (144, 192, 144) if device != 'cpu' else (32, 48, 32)
    for level in range(4):
        grid = [n // 2 ** (level + 1) for n in full]
        for length in sorted(set(grid)):
            rows = min(65535, 2 * math.prod(grid) // length)
            torch.manual_seed(0)
            q, k, v = torch.randn(3, rows, 1, length, 32, device=device, dtype=torch.bfloat16)
            attend = partial(F.scaled_dot_product_attention, q, k, v)
            with sdpa_kernel(SDPBackend.MATH):
                exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
            what = f'attention of {rows} rows of {length}'
            yield what, distance(attend(), exact), 2e-2
            if device != 'cpu':
                times = {name: attention_time(attend, backend, device) for name, backend in BACKENDS.items()}
                told = ', '.join(f'{name} {1000 * s:.2f}' for name, s in times.items())
                own = seconds_of(attend, device)
                yield f'{what}: {1000 * own:.2f} ms over the best ({told})', own / min(times.values()), 1.5

def attention_time(attend, backend, device):
    """Seconds; infinite where the backend cannot."""
    try:
        with sdpa_kernel(backend):
            return seconds_of(attend, device)
    except RuntimeError:
        return math.inf

def neuroquant_loss(device):
    net = randomised(NeuroQuant(SMALL)).to(device, memory_format=torch.channels_last_3d).train()
    classifier = ModalityClassifier(SMALL.anat_dim, 2).to(device)
    x = torch.rand(2, 1, 32, 48, 32, device=device).to(memory_format=torch.channels_last_3d)
    modality = torch.tensor([0, 1], device=device)
    pairs = torch.tensor([[0, 1], [1, 0]], device=device)
    def loss():
        out = net(x, modality, pairs)
        own = reconstruction_loss(out['x_hat'], x, 0.5) + out['commit']
        cross = reconstruction_loss(out['x_cross'], x[pairs[:, 1]], 0.0)
        return own + cross + adversary_loss(classifier, out['z_anat'], modality, 0.1)
    return net, loss

def strides(x):
    """Of the axes longer than 1; the others' say nothing."""
    return [stride for stride, n in zip(x.stride(), x.shape) if n > 1]

def check_steps(device):
    """A step waits for nothing, and leaves gradients laid out as the weights are."""
    flow = FlowUNet(FlowUNetConfig(widths=(16, 32), attention=(False, True))).to(device)
    z = torch.randn(2, 4, 16, 16, 16, device=device)
    t = torch.rand(2, device=device)
    vae = ConvVAE(ConvVAEConfig(widths=(16, 32))).to(device, memory_format=torch.channels_last_3d)
    x = torch.rand(1, 1, 32, 32, 32, device=device)
    lpips = LPIPS().to(device)
    critics = nn.ModuleList(PatchDiscriminator(dims, channels=8, layers=1) for dims in (2, 3)).to(device)
    def vae_loss():
        out = vae(x)
        own = reconstruction_loss(out['x_hat'], x, 0.0) + kl_loss(out['mu'], out['logvar'])
        adversarial = generator_term(critics, out['x_hat'], 'least_squares', 0.2, None)
        return own + perceptual_loss(lpips, out['x_hat'], x) + adversarial
    losses = {'NeuroQuant': neuroquant_loss(device), 'ConvVAE': (vae, vae_loss),
              'FlowUNet': (flow, lambda: flow_matching_loss(flow, z, torch.randn_like(z), t))}
    for name, (net, loss) in losses.items():
        loss().backward()  # the first one may wait: libraries choose their kernels
        if device != 'cpu':
            torch.cuda.set_sync_debug_mode('error')
        try:
            loss().backward()
            waits = 0
        except RuntimeError:
            waits = 1
        finally:
            if device != 'cpu':
                torch.cuda.set_sync_debug_mode('default')
        yield f'{name}: steps that wait for the device', waits, 0
        trained = [p for p in net.parameters() if p.grad is not None]
        others = sum(strides(p) != strides(p.grad) for p in trained)
        yield f'{name}: gradients laid out otherwise than their weights', others, 0

def check_batches(device):
    """Batches are copied beside the computation, and read some time later."""
    side = 256 if device == 'cpu' else 4096
    def make_batch(step):
        return {'x': torch.full((side, side), float(step))}
    busy = torch.rand(side, side, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for step, batch in enumerate(prefetch(make_batch, range(8), device)):
        for _ in range(10):
            busy = (busy @ busy).remainder(1)
        wrong += (batch['x'] + 0 * busy != step).sum()
    yield 'values of a batch that are not those that were made', wrong.item(), 0

def check_graphs(device):
    """Sessions with gaps, swaps, three planes: graphs of encoder and decoder, on volumes as in training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = NeuroQuant(replace(SMALL, attn_levels=(3,))).to(device)
    modality = torch.zeros(6, dtype=torch.int64, device=device)
    for part in (net.encoder, net.decoder):
        compile_for(part, (4, 8), backend='eager')  # which counts the same graphs, in seconds
    for n, swaps in ((4, 0), (3, 0), (2, 0), (4, 4), (4, 2), (3, 2), (3, 1), (2, 2), (3, 3)):
        pairs = torch.randint(n, (swaps, 2), device=device) if swaps else None
        x = torch.rand(n, 1, 32, 32, 32, device=device).to(memory_format=torch.channels_last_3d)
        net(x, modality[:n], pairs)
    for axis in range(3):
        x = torch.rand(6, 1, 32, 32, 32, device=device).narrow(2 + axis, 0, 1)
        net(x, modality)
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    # encoder: volumes, three planes; decoder: volumes without and with swaps, three planes
    yield 'graphs beyond one per phase and plane', graphs - (4 + 5), 0

# ---------------------------------------------------------------- processes

def gradients_of_part(rank, world, device):
    """A network with the gradients of a process's part of a batch; none of those of the variances."""
    torch.manual_seed(0)
    net = randomised(ConvVAE(ConvVAEConfig(widths=(8, 16), res_blocks=1, norm='none'))).to(device)
    x = torch.rand(4, 1, 16, 16, 16)[rank::world].to(device)
    mean = MeanGradients(list(net.parameters()), mib=0.01)
    mean.expect()
    net.decode(net.encode(x)[0]).square().mean().backward()
    mean.finish()
    return [p.grad.cpu() for p in net.parameters() if p.grad is not None]

def train_half(rank, folder, kind):
    """One of two processes with half of a batch each; the first saves the gradients."""
    dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', rank=rank, world_size=2,
                            init_method=f'file://{folder}/meet')
    where = f'cuda:{rank}' if kind == 'cuda' else 'cpu'
    if kind == 'cuda':
        torch.cuda.set_device(rank)
    gradients = gradients_of_part(rank, 2, where)
    if rank == 0:
        torch.save(gradients, f'{folder}/gradients.pt')
    dist.destroy_process_group()

def check_processes(device):
    """Gradients of two processes against those of one; on a GPU only where there are two."""
    kind = device.split(':')[0]
    if kind == 'cuda' and torch.cuda.device_count() < 2: return
    alone = gradients_of_part(0, 1, device)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_half, (folder, kind), nprocs=2)
        two = torch.load(f'{folder}/gradients.pt', weights_only=True)
    yield 'gradients of two processes and one', max(map(distance, two, alone)), 1e-4

# ---------------------------------------------------------------- scripts: start, signal, resume

def check_scripts(device):
    """train_vae.py and train_flow.py on phantoms: some steps, a signal, and the rest of the run."""
    with tempfile.TemporaryDirectory() as folder:
        data = f'--data_dir={folder}/data'
        vae = ['train_vae.py', 'config/demo_kl.py', data, f'--out_dir={folder}/vae', '--iters=20']
        vae.append('--prepare=--source=phantom --n=8 --shape=32,48,32 --modalities=T1w --split=0.6,0.2,0.2')
        flow = ['train_flow.py', 'config/demo_flow.py', data, f'--out_dir={folder}/flow', '--iters=20',
                f'--vae={folder}/vae/ckpt.pt', '--sample_interval=0']
        for name, args in (('train_vae.py', vae), ('train_flow.py', flow)):
            yield f'{name}: exit after SIGTERM, 143 less', stopped(args, device) - 143, 0
            resumed = start(args, device, '--init_from=resume')
            resumed.communicate(timeout=300)
            yield f'{name}: exit of the resumed run', resumed.returncode, 0

def start(args, device, *more):
    command = [sys.executable, *args, *more, '--log_interval=1', f'--device={device}']
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def stopped(args, device):
    """The exit status of a run that gets a signal after its fifth step."""
    process = start(args, device)
    for line in process.stdout:
        if line.startswith('iter 5/'):
            process.send_signal(signal.SIGTERM)
    return process.wait(300)

# ---------------------------------------------------------------- all of them

CASES = (check_numbers, check_codes, check_optimisers, check_networks, check_attention, check_steps,
         check_batches, check_graphs, check_processes, check_scripts)

def timings(call, device, repeats):
    """Seconds of each of `repeats` calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != 'cpu':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]

def seconds_of(call, device):
    return statistics.median(timings(call, device, 5))

def rates(device, dtype):
    """FLOP/s of a large matrix product, and bytes/s of a copy, read and written."""
    side = 8192 if device != 'cpu' else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = 2 * side ** 3 / seconds_of(lambda: a @ a, device)
    source = torch.rand(2 ** 30 if device != 'cpu' else 2 ** 26, device=device)
    target = torch.empty_like(source)
    return product, 2 * 4 * source.numel() / seconds_of(lambda: target.copy_(source), device)

def driver():
    """The version of NVIDIA's driver, '' where nvidia-smi does not say."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split('\n')[0]
    except (OSError, subprocess.TimeoutExpired):
        return ''

def machine(device):
    """What was checked, for the report."""
    about = {'torch': torch.__version__, 'python': platform.python_version(), 'device': device,
             'tf32': torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32}
    if device != 'cpu':
        about |= {'card': torch.cuda.get_device_name(), 'driver': driver(), 'cuda': torch.version.cuda,
                  'cudnn': torch.backends.cudnn.version()}
    product, copy = rates(device, torch.bfloat16 if device != 'cpu' else torch.float32)
    return about | {'product TFLOP/s': round(product / 1e12, 2), 'copy GB/s': round(copy / 1e9, 1)}

def run_all(device, path):
    """Print every line, write them to the JSON file `path`; returns how many fail."""
    about = machine(device)
    print(', '.join(f'{key} {value}' for key, value in about.items()))
    lines = []
    for case in CASES:
        began = time.perf_counter()
        try:
            for what, value, limit in case(device):
                fine = bool(value <= limit)
                lines.append({'what': what, 'value': value, 'limit': limit, 'pass': fine})
                print(f"{'PASS' if fine else 'FAIL'}  {what}: {value:.3g} (at most {limit:g})", flush=True)
        except Exception as e:  # one case must not end the others
            lines.append({'what': case.__name__, 'error': f'{type(e).__name__}: {e}', 'pass': False})
            print(f'FAIL  {case.__name__}: {type(e).__name__}: {str(e).splitlines()[:1]}', flush=True)
        print(f'      {case.__name__}: {time.perf_counter() - began:.0f} s')
    with open(path, 'w') as f:
        json.dump({'machine': about, 'lines': lines}, f, indent=1)
    failed = sum(not line['pass'] for line in lines)
    print(f'{len(lines) - failed} of {len(lines)} pass: {path}')
    return failed
