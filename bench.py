"""Costs: FLOP of a volume, a step on slices against volumes of depth 1, MAISI's networks against MONAI's, Heun against Euler.

    python bench.py                      # NeuroQuant, on a GPU or a CPU; --slices=2 --repeats=3 keeps it short on a CPU
    python bench.py --vs=monai           # forward and backward of the same networks, the same weights, in turns (needs monai)
    python bench.py --samplers=out/demo_flow/best.pt  # error of a flow's samples at equal numbers of calls

Times are medians of `repeats` steps after a warm-up, forward and backward, in milliseconds.
"""
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import model as networks
from common import autocast, configure, load_checkpoint, start_processes
from flow import sample
from losses import reconstruction_loss
from pretrained import load_maisi_unet, load_maisi_vae

# ---------------------------------------------------------------- settings
vs = ''                  # 'monai'
samplers = ''            # checkpoint of a flow
shape = (144, 192, 144)  # of NeuroQuant's volume
size = 48                # of the cube for --vs=monai
slices = 8
repeats = 5
device = ''
dtype = 'float32'
latent = 16              # of the cube that its U-Net gets
only = ''                # of --vs=monai, used by itself: 'vae nanomri', 'unet monai', ...: one measurement in a process of its own

def milliseconds(step):
    """Median and spread of `repeats` calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.startswith('cuda'): torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])

# ---------------------------------------------------------------- NeuroQuant

def bench_neuroquant():
    net = networks.NeuroQuant(networks.NeuroQuantConfig())
    encode, decode = networks.step_flops(net, shape)
    with torch.device('meta'):
        twin = networks.NeuroQuant(net.config)
        tokens = twin.encode(torch.empty(1, 1, *shape))[0].shape[2:].numel()
        half = torch.empty(1, net.config.widths[0], *[n // 2 for n in shape])
        film = [torch.empty(1, net.decoder.channels[-1])] * 2
        with FlopCounterMode(display=False) as tail: twin.decoder.heads[-1](twin.decoder.blocks[-1](half, *film))
    tail = tail.get_total_flops()
    print(f'volume {shape}: {tokens} tokens, {encode / 1e12:.3f} + {decode / 1e12:.3f} = {(encode + decode) / 1e12:.3f} TFLOP forward '
          f'(encode + decode), of which the full-size tail {tail / 1e12:.3f} ({tail / (encode + decode):.0%})')

    net.to(device, memory_format=torch.channels_last_3d).train()
    x = torch.rand(slices, 1, 1, *shape[1:], device=device)
    modality = torch.arange(slices, device=device) % len(net.config.modalities)
    def step():
        with autocast(device, dtype): loss = reconstruction_loss(net(x, modality)['x_hat'], x, 0.5)
        loss.backward()
        net.zero_grad()
    plane, plane_forward = milliseconds(step), networks.Conv.forward
    networks.Conv.forward = nn.Conv3d.forward  # the same slices as volumes of depth 1: 27 taps, 18 of them on padding
    try: depth, depth_spread = milliseconds(step)
    finally: networks.Conv.forward = plane_forward
    print(f'{slices} slices of {shape[1:]}, forward and backward on {device}: {plane[0]:.0f} ms (spread {plane[1]:.0f}) as slices, '
          f'{depth:.0f} ms (spread {depth_spread:.0f}) as volumes of depth 1 through Conv3d: ratio {plane[0] / depth:.2f}')

# ---------------------------------------------------------------- MAISI against MONAI

def monai_vae():
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    return AutoencoderKlMaisi(  # NVIDIA's released settings but for norm_float16, which a CPU cannot run
        spatial_dims=3, in_channels=1, out_channels=1, num_channels=(64, 128, 256), latent_channels=4, num_res_blocks=(2, 2, 2),
        norm_num_groups=32, norm_eps=1e-6, attention_levels=(False, False, False), with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False, num_splits=4, dim_split=1, norm_float16=False, print_info=False)

def monai_unet():
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
    return DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, num_channels=(64, 128, 256, 512), attention_levels=(False, False, True, True),
        num_head_channels=(0, 0, 32, 32), num_res_blocks=2, resblock_updown=True, include_fc=True, use_flash_attention=device.startswith('cuda'))

def measure():
    """One line of JSON: median ms of forward and backward, and how far memory rose above the model's own, in MiB."""
    what, who = only.split()
    net, ours = (monai_vae if what == 'vae' else monai_unet)(), who == 'nanomri'
    if ours: net = (load_maisi_vae if what == 'vae' else load_maisi_unet)(net.state_dict())
    net.to(device).train()
    cuda, t = device.startswith('cuda'), torch.full((1,), 0.3, device=device)
    x = torch.rand(1, 1, *[size] * 3, device=device) if what == 'vae' else torch.randn(1, 4, *[latent] * 3, device=device)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    if cuda: torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    def step():
        with autocast(device, dtype):
            if what == 'vae':
                out = net(x)
                x_hat, mu = (out['x_hat'], out['mu']) if ours else out[:2]
                loss = (x_hat - x).abs().mean() + 1e-3 * mu.square().mean()
            else: loss = (net(x, t if ours else 1000 * (1 - t)) - x).square().mean()
        loss.backward()
        net.zero_grad(set_to_none=False)
    ms, _ = milliseconds(step)
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({'ms': ms, 'mib': (peak - before) / 2 ** 20}))

def resident():
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * resource.getpagesize()

def bench_monai(turns=3):
    try: import monai
    except ImportError: raise SystemExit('--vs=monai needs MONAI: pip install -r requirements-dev.txt')
    for what, title in (('vae', f'MAISI autoencoder, {size}^3'), ('unet', f'MAISI U-Net, 4x{latent}^3')):
        found = {'nanomri': [], 'monai': []}
        for _ in range(turns):
            for who in found:
                args = [f'--only={what} {who}', f'--device={device}', f'--dtype={dtype}', f'--size={size}', f'--latent={latent}', f'--repeats={repeats}']
                done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
                if done.returncode: raise SystemExit(f'{who}: {done.stderr.strip().splitlines()[-1]}')
                found[who].append(json.loads(done.stdout.strip().splitlines()[-1]))
        ms, mib = ({who: statistics.median(f[key] for f in runs) for who, runs in found.items()} for key in ('ms', 'mib'))
        print(f'{title}, batch 1, forward and backward on {device} in {dtype}, medians of {turns} runs in turn, MONAI {monai.__version__}:\n'
              f'  time   {ms["nanomri"]:.0f} ms against {ms["monai"]:.0f} ms: ratio {ms["nanomri"] / ms["monai"]:.2f}\n'
              f'  memory {mib["nanomri"]:.0f} MiB against {mib["monai"]:.0f} MiB: ratio {mib["nanomri"] / mib["monai"]:.2f}')

# ---------------------------------------------------------------- Heun against Euler

@torch.no_grad()
def bench_samplers():
    """Root-mean-square distance to the same noise followed with 200 Heun steps, at equal numbers of calls of the network."""
    checkpoint = load_checkpoint(samplers)
    flow = networks.from_checkpoint(checkpoint).to(device)
    noise = torch.randn(4, *checkpoint['latent_shape'], generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device, dtype):
        exact = sample(flow, noise, 200, 'heun')
        print(f'{samplers}, 4 samples, RMS distance to 200 Heun steps, in sd of the latent\n\n| calls | Euler | Heun |\n| --- | --- | --- |')
        for calls in (4, 8, 16, 30, 60):
            errors = [(sample(flow, noise, n, method) - exact).square().mean().sqrt().item() for method, n in (('euler', calls), ('heun', calls // 2))]
            print(f'| {calls} | {errors[0]:.4f} | {errors[1]:.4f} |')

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    if vs not in ('', 'monai'): raise SystemExit(f'--vs={vs}: monai')
    _, _, device = start_processes(device)
    torch.manual_seed(0)
    if only: measure()
    elif vs: bench_monai()
    elif samplers: bench_samplers()
    else: bench_neuroquant()
