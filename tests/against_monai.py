"""MAISI's networks here and in MONAI, with the same weights, in turns; needs monai (requirements-dev.txt).

    python tests/against_monai.py                                # every network
    python tests/against_monai.py --networks=decoder --size=64   # one of them

Times are medians in ms of a forward and a backward pass, of the decoder of a forward pass, at batch 1. Memory
is above that of weights and gradients. Every run is a process of its own.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import autocast, compile_whole, configure, markdown_table, start_processes
from losses import PatchDiscriminator
from pretrained import load_maisi_unet, load_maisi_vae

# ---------------------------------------------------------------- settings
networks = ('autoencoder', 'decoder', 'unet', 'discriminator')
size = 0                 # side of the cube; 0 picks 96 on a GPU, 48 on a CPU
repeats = 5              # calls of a run
turns = 3                # runs of each
device = ''
dtype = 'bfloat16'       # on a CPU always float32
compile = True           # on a CPU never
only = ''                # 'NETWORK here' or 'NETWORK monai': one run

TITLES = {
    'autoencoder': 'MAISI autoencoder, {side}^3, forward and backward',
    'decoder': 'MAISI decoder to {side}^3, forward',
    'unet': 'MAISI U-Net, 4x{latent_side}^3, forward and backward',
    'discriminator': 'PatchGAN, {side}^3, forward and backward',
}

# ---------------------------------------------------------------- MONAI's networks

def monai_autoencoder():
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    return AutoencoderKlMaisi(  # NVIDIA's released settings but for norm_float16, which a CPU cannot run
        spatial_dims=3, in_channels=1, out_channels=1, num_channels=(64, 128, 256), latent_channels=4,
        num_res_blocks=(2, 2, 2), norm_num_groups=32, norm_eps=1e-6, attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, num_splits=4, dim_split=1,
        norm_float16=False, print_info=False)

def monai_unet():
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
    return DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, num_channels=(64, 128, 256, 512),
        attention_levels=(False, False, True, True), num_head_channels=(0, 0, 32, 32), num_res_blocks=2,
        resblock_updown=True, include_fc=True, use_flash_attention=device.startswith('cuda'))

def monai_discriminator():
    from monai.networks.nets import PatchDiscriminator as MonaiDiscriminator
    return MonaiDiscriminator(
        spatial_dims=3, channels=32, in_channels=1, out_channels=1, num_layers_d=3, norm='INSTANCE',
        bias=False, kernel_size=4, padding=1)

def our_discriminator(state):
    net = PatchDiscriminator(3)
    net.load_state_dict(dict(zip(net.state_dict(), state.values())))
    return net

# what makes MONAI's network, and what makes ours from its weights
MAKERS = {'autoencoder': (monai_autoencoder, load_maisi_vae), 'decoder': (monai_autoencoder, load_maisi_vae),
          'unet': (monai_unet, load_maisi_unet), 'discriminator': (monai_discriminator, our_discriminator)}

# ---------------------------------------------------------------- one run

def make_loss(network, net, ours):
    """A function of no arguments -> the scalar whose gradient is taken; of a decoder the volume."""
    if network == 'decoder':
        z = torch.randn(1, 4, *[side // 4] * 3, device=device)
        return lambda: net.decode(z)
    if network == 'unet':
        x = torch.randn(1, 4, *[latent_side] * 3, device=device)
        t = torch.full((1,), 0.3, device=device)
        time_of_net = t if ours else 1000 * (1 - t)
        return lambda: (net(x, time_of_net) - x).square().mean()
    x = torch.rand(1, 1, side, side, side, device=device)
    if network == 'discriminator':
        return lambda: (net(x) if ours else net(x)[-1]).square().mean()
    def loss():
        out = net(x)
        x_hat, mu = (out['x_hat'], out['mu']) if ours else out[:2]
        return (x_hat - x).abs().mean() + 1e-3 * mu.square().mean()
    return loss

def peak_memory(step):
    """MiB that memory rises to above what is held before a call; on a CPU the process's highest so far."""
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2 ** 20
    with open('/proc/self/statm') as f:
        held = int(f.read().split()[1]) * resource.getpagesize()
    step()
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 2 ** 20

def milliseconds(step):
    """Median of `repeats` calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])

def one_run(network, ours):
    """{'ms', 'mib'} of one network, ours or MONAI's."""
    make, load = MAKERS[network]
    net = make()
    if ours:
        net = load(net.state_dict())
    net.to(device).train()
    if ours and on_gpu:
        net.to(memory_format=torch.channels_last_3d)  # as the trainers
    loss = make_loss(network, net, ours)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)

    def step():
        with autocast(device, dtype), torch.set_grad_enabled(network != 'decoder'):
            value = loss()
        if network != 'decoder':
            value.backward()
            net.zero_grad(set_to_none=False)

    if compile:
        compile_whole(net)
        step()
    memory = peak_memory(step)
    return {'ms': milliseconds(step), 'mib': memory}

# ---------------------------------------------------------------- the contest

def run_apart(network, maker):
    """one_run() in a process of its own."""
    command = [sys.executable, __file__, f'--only={network} {maker}', f'--device={device}',
               f'--dtype={dtype}', f'--compile={compile}', f'--size={side}', f'--repeats={repeats}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{" ".join(command[1:])}: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])

def contest(network):
    """A row of the table: medians of `turns` runs of each, in turns."""
    runs = {'here': [], 'monai': []}
    for _ in range(turns):
        for maker in runs:
            runs[maker].append(run_apart(network, maker))
    row = [TITLES[network].format(side=side, latent_side=latent_side)]
    for key in ('ms', 'mib'):
        ours = statistics.median(run[key] for run in runs['here'])
        theirs = statistics.median(run[key] for run in runs['monai'])
        row += [f'{ours:.0f} / {theirs:.0f}', f'{ours / theirs:.2f}']
    return row

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    try:
        import monai
    except ImportError:
        raise SystemExit('the contest needs MONAI: pip install -r requirements-dev.txt')
    if set(networks) - set(TITLES):
        raise SystemExit(f'--networks={",".join(networks)}: of {", ".join(TITLES)}')
    _, _, device = start_processes(device)
    on_gpu = device.startswith('cuda')
    if not on_gpu:
        dtype, compile = 'float32', False
    side, latent_side = size or (96 if on_gpu else 48), 32 if on_gpu else 16
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    if only:
        network, maker = only.split()
        print(json.dumps(one_run(network, maker == 'here')))
    else:
        print(f'medians of {turns} runs in turn, on {device} in {dtype}{", compiled" * compile}, '
              f'MONAI {monai.__version__}\n')
        head = ['network, batch 1', 'ms: here / MONAI', 'ratio', 'MiB: here / MONAI', 'ratio']
        rows = [contest(network) for network in networks]
        print('\n'.join(markdown_table(head, rows)))
