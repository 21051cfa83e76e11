"""Inference of a ConvVAE slab by slab along D, for volumes that do not fit a card: the result of the whole.

Convolutions get a halo of the slabs beside. Group norm gets the statistics of the whole volume, gathered over
all slabs first. Attention runs whole. So nothing is blended and no seam can show. Activations stay where x
lies, as a rule on the CPU; one slab at a time travels to the weights' device.
"""
import copy
from itertools import chain

import torch
import torch.nn.functional as F

from layers import Attention, ConvLayer, NormAct, ResBlock, Stack
from model import ConvVAE

def slabwise(model, slab):
    """A ConvVAE for inference that shares the weights of model. model itself stays as it is.

    slab: voxels of a slab along D, on the coarser side of a layer. ValueError for other models and slab < 1.
    """
    if not isinstance(model, ConvVAE):
        raise ValueError(f'slabwise needs a ConvVAE, not a {type(model).__name__}')
    if slab < 1: raise ValueError(f'slab={slab}: at least 1 voxel')
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # the twin's own, so that model keeps its encoder and decoder
    twin.encoder = SlabStack(model.encoder, slab)
    twin.decoder = SlabStack(model.decoder, slab)
    twin.mu_head = at_weights(model.mu_head)
    twin.post = at_weights(model.post)
    if model.kl:
        twin.logvar_head = at_weights(model.logvar_head)
    else:
        twin.quantizer = at_weights(model.quantizer, 'nearest_indices', 'lookup')
    return twin

def device_of(module, x):
    """Where a module's weights lie; that of x, if it has none."""
    return next(chain(module.parameters(), module.buffers(), [x])).device

def at_weights(module, *methods):
    """A copy that shares the weights; its methods (by default forward) take x there and the result back."""
    twin = copy.copy(module)
    for name in methods or ('forward',):
        setattr(twin, name, there_and_back(module, getattr(module, name)))
    return twin

def there_and_back(module, method):
    def call(x):
        return method(x.to(device_of(module, x))).to(x.device)
    return call

class SlabStack(Stack):
    """The blocks of a Stack, each slab by slab."""
    def __init__(self, stack, slab):
        super().__init__(stack.blocks)
        self.slab = slab

    @torch.no_grad()
    def forward(self, x):
        for block in self.blocks:
            x = BY_SLABS[type(block)](block, x, self.slab)  # (B, C_i, D_i, H_i, W_i)
        return x

# ---------------------------------------------------------------- blocks

def conv_layer(layer, x, slab):
    """ConvLayer; doubling reaches one voxel further than the convolution alone."""
    if layer.up: return in_slabs(layer, layer, x, slab, up=2, halo=2)
    return in_slabs(layer, layer, x, slab, down=2 if layer.far_side else 1)

def res_block(block, x, slab):
    h = norm_conv(block.norm1, block.conv1, x, slab)  # (B, c_out, D, H, W)
    h = norm_conv(block.norm2, block.conv2, h, slab)  # (B, c_out, D, H, W)
    device = device_of(block, x)
    for h_part, x_part in zip(h.split(slab, 2), x.split(slab, 2)):
        h_part += block.skip(x_part.to(device)).to(h.device)
    return h

def norm_conv(norm, conv, x, slab):
    normalise = whole_norm(norm, x, slab)
    def run(part):
        return conv(F.silu(normalise(part)))
    return in_slabs(run, conv, x, slab)

def norm_act(block, x, slab):
    normalise = whole_norm(block.norm, x, slab)
    def run(part):
        return F.silu(normalise(part)) if block.act else normalise(part)
    return in_slabs(run, block, x, slab, halo=0)

def attention(block, x, slab):
    return there_and_back(block, block)(x)

BY_SLABS = {ConvLayer: conv_layer, ResBlock: res_block, NormAct: norm_act, Attention: attention}

# ---------------------------------------------------------------- slabs

def in_slabs(fn, module, x, slab, up=1, down=1, halo=1):
    """fn(x) slab by slab, where module's weights lie; x and the result lie where x does.

    fn changes D by up / down and reaches `halo` coarse voxels far. slab: coarse voxels. x (B, C, D, H, W).
    """
    device = device_of(module, x)
    n, y = x.shape[2] // down, None
    for start in range(0, n, slab):
        stop = min(start + slab, n)
        first, last = max(start - halo, 0), min(stop + halo, n)  # with the halo
        part = fn(x[:, :, first * down:last * down].to(device))
        part = part[:, :, (start - first) * up:(stop - first) * up]
        if y is None:
            y = part.new_empty(*part.shape[:2], n * up, *part.shape[3:], device=x.device)
        y[:, :, start * up:stop * up] = part
    return y

def whole_norm(norm, x, slab):
    """Group norm as a function of slabs of x, with the statistics of all of x, gathered in float32."""
    if isinstance(norm, torch.nn.Identity): return norm
    device = device_of(norm, x)
    def groups():
        for part in x.split(slab, 2):
            yield part.to(device).float().reshape(len(x), norm.num_groups, -1)  # (B, groups, N)
    n = x[0].numel() // norm.num_groups
    mean = sum(part.sum(2) for part in groups()) / n                              # (B, groups)
    var = sum((part - mean[..., None]).square().sum(2) for part in groups()) / n  # (B, groups)
    width = x.shape[1] // norm.num_groups
    scale = (var + norm.eps).rsqrt().repeat_interleave(width, 1) * norm.weight    # (B, C)
    shift = norm.bias - mean.repeat_interleave(width, 1) * scale                  # (B, C)
    grid = (1,) * (x.ndim - 2)
    scale, shift = scale.view(*scale.shape, *grid), shift.view(*shift.shape, *grid)
    def normalise(part):
        return torch.addcmul(shift, part.float(), scale)
    return normalise
