"""Costs of NeuroQuant: FLOP of a volume, and a step on slices against the same step through 3D convolutions of depth 1.

    python bench.py                      # on a GPU or a CPU; --slices=2 --repeats=3 keeps it short on a CPU

Times are medians of `repeats` steps after a warm-up, forward and backward, in milliseconds.
"""
import statistics
import sys
import time

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import model as networks
from common import autocast, configure, start_processes
from losses import reconstruction_loss

# ---------------------------------------------------------------- settings
shape = (144, 192, 144)
slices = 8
repeats = 5
device = ''
dtype = 'float32'

def milliseconds(step):
    """Median and spread of `repeats` calls after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.startswith('cuda'): torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])

def main():
    global device
    _, _, device = start_processes(device)
    torch.manual_seed(0)
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

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    main()
