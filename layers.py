"""What networks are made of: convolutions that know slices, x2 and back, residual blocks, attention.

Shapes as in model.py: (B, C, D, H, W), where an axis of length 1 makes slices.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

def missing_axis(x):
    """The axis (0, 1, 2) of x (B, C, D, H, W) of length 1, None for a volume. ValueError for two."""
    ones = [axis for axis, n in enumerate(x.shape[2:]) if n == 1]
    if len(ones) > 1:
        raise ValueError(f'{tuple(x.shape)} has {len(ones)} axes of length 1: a slice has one, a volume none')
    return ones[0] if ones else None

def as_slices(images, axis):
    """Images (B, C, ., .) -> (B, C, D, H, W) without `axis`."""
    return images.movedim(1, -1).unsqueeze(1 + axis).movedim(-1, 1)

class Conv3d(nn.Conv3d):
    """nn.Conv3d; in float32 on a CPU, a sample that comes alone goes to oneDNN, up to 11 times as fast."""
    def _conv_forward(self, x, weight, bias):
        alone = len(x) == 1 and math.prod(x.shape[2:]) >= 64
        float32_on_cpu = x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32
        onednn = not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available()
        if not (alone and float32_on_cpu and onednn): return super()._conv_forward(x, weight, bias)
        how = self.padding, self.stride, self.dilation, self.groups
        return torch.mkldnn_convolution(x, weight, bias, *how)

class Conv(Conv3d):
    """3D convolution; on a slice, the 2D one whose kernel is summed over the missing axis.

    A slice gets what it would get within a volume constant along that axis, so activations keep their scale
    ("kernels are adjusted along the selected plane", NeuroQuant 3.5).
    """
    def forward(self, x):
        axis = missing_axis(x)
        if axis is None: return super().forward(x)
        weight = self.weight.sum(2 + axis)  # (C_out, C_in, k, k)
        images = x.squeeze(2 + axis)        # (B, C_in, ., .)
        images = F.conv2d(images, weight, self.bias, self.stride[0], self.padding[0])
        return as_slices(images, axis)      # (B, C_out, D, H, W)

def halve(x):
    """Mean over 2x2x2 voxels, or 2x2 pixels of a slice."""
    axis = missing_axis(x)
    if axis is None: return F.avg_pool3d(x, 2)
    return as_slices(F.avg_pool2d(x.squeeze(2 + axis), 2), axis)

def double(x, mode='nearest'):
    """x2 by 'nearest' or 'linear' interpolation, of a slice within its plane."""
    return double_axes(x, mode, missing_axis(x))

def double_axes(x, mode, missing=None):
    """x (B, C, *size) to twice the size along all axes but a missing one.

    As F.interpolate, without its atomic additions in the backward pass on a GPU.
    """
    h = x.movedim(1, -1)                                   # (B, *size, C): channels-last comes out
    for axis, n in enumerate(x.shape[2:], 1):
        if axis - 1 == missing: continue
        if mode == 'linear':
            before = torch.cat([h.narrow(axis, 0, 1), h.narrow(axis, 0, n - 1)], axis)
            after = torch.cat([h.narrow(axis, 1, n - 1), h.narrow(axis, n - 1, 1)], axis)
            pair = before.lerp(h, 0.75), after.lerp(h, 0.75)
        else:
            pair = h, h
        h = torch.stack(pair, axis + 1).flatten(axis, axis + 1)
    return h.movedim(-1, 1)                                # (B, C, *2 size)

def run(net, block, *args):
    """block(*args). If net is checkpointing, nothing inside is kept: the backward pass computes it again."""
    if net.checkpointing and net.training: return checkpoint(block, *args, use_reentrant=False)
    return block(*args)

def zeroed(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

def space_to_depth(x):
    """2x2x2 voxels as channels: (B, C, D, H, W) -> (B, 8C, D/2, H/2, W/2). A slice counts as two alike."""
    axis = missing_axis(x)
    if axis is not None:
        x = x.repeat_interleave(2, 2 + axis)
    B, C, D, H, W = x.shape
    blocks = x.reshape(B, C, D // 2, 2, H // 2, 2, W // 2, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return blocks.reshape(B, 8 * C, D // 2, H // 2, W // 2)

def depth_to_space(x, missing=None):
    """Back: (B, 8C, d, h, w) -> (B, C, 2d, 2h, 2w); along a missing axis the mean of the two."""
    B, C, d, h, w = x.shape
    blocks = x.reshape(B, C // 8, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    volume = blocks.reshape(B, C // 8, 2 * d, 2 * h, 2 * w)
    return volume if missing is None else volume.mean(2 + missing, keepdim=True)

def group_norm(channels):
    """MAISI's: 32 groups, or the largest power of 2 that divides fewer or odd channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)

class ResConv(nn.Module):
    """x + conv(SiLU(norm(x))), 3x3x3. norm: 'group', each channel alone, or 'none'.

    In larger groups constants outgrow what differs, and codes fall out of use.
    """
    def __init__(self, channels, norm='group'):
        super().__init__()
        self.norm = nn.Identity() if norm == 'none' else nn.GroupNorm(channels, channels)
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))  # (B, C, D, H, W)

class Attention(nn.Module):
    """Self-attention among all positions, residual, group norm first. head_width None: one head."""
    def __init__(self, channels, head_width=None):
        super().__init__()
        self.n_head = channels // (head_width or channels)
        if not self.n_head:
            raise ValueError(f'head_width {head_width}: more than {channels} channels')
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def attend(self, rows):
        qkv = self.qkv(rows).unflatten(2, (3, self.n_head, -1))    # (R, L, C) -> (R, L, 3, heads, C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # three of (R, heads, L, C/heads)
        if len(rows) <= 65535:                                     # CUDA kernels take no more rows
            y = F.scaled_dot_product_attention(q, k, v)            # (R, heads, L, C/heads)
        else:
            parts = zip(q.split(65535), k.split(65535), v.split(65535))
            y = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
        return self.proj(y.transpose(1, 2).flatten(2))             # (R, L, C)

    def forward(self, x):
        rows = self.norm(x).flatten(2).transpose(1, 2)             # (B, N, C), N positions
        return x + self.attend(rows).transpose(1, 2).view_as(x)    # (B, C, *grid)

class AxialAttention(Attention):
    """Attention along one axis (0, 1, 2), NeuroQuant eq. 2. Three in a row let any voxel reach any other.

    Layer norm comes first. The projection starts at zero: the block starts as the identity. On slices
    the missing axis is skipped.
    """
    def __init__(self, channels, axis):
        super().__init__(channels, head_width=32 if channels % 32 == 0 else None)
        self.axis = axis
        self.norm = nn.LayerNorm(channels)
        zeroed(self.proj)

    def forward(self, x):
        if missing_axis(x) == self.axis: return x
        h = self.norm(x.movedim(1, -1)).movedim(1 + self.axis, 3)  # (B, ., ., L, C)
        rows = h.reshape(-1, *h.shape[3:])                         # (R, L, C), R = B*D*H*W/L
        y = self.attend(rows).view(h.shape)                        # (B, ., ., L, C)
        return x + y.movedim(3, 1 + self.axis).movedim(-1, 1)      # (B, C, D, H, W)

# ---------------------------------------------------------------- layers of ConvVAE and FlowUNet

CONV = {2: nn.Conv2d, 3: Conv3d}  # by dims
NORM = {'group': group_norm, 'none': nn.Identity}

class ConvLayer(nn.Module):
    """3-wide convolution, to half the size if down, padding the far ends, or to double the size.

    up: 'nearest' or 'linear' doubles first, 'subpixel' makes eight voxels of each.
    """
    def __init__(self, dims, c_in, c_out, up='', down=False):
        super().__init__()
        self.up = up
        self.far_side = (0, 1) * dims if down else None
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = CONV[dims](c_in, 8 * c_out if up == 'subpixel' else c_out, 3, stride, padding)

    def forward(self, x):
        if self.up == 'subpixel': return depth_to_space(self.conv(x))  # (B, c_out, 2D, 2H, 2W)
        if self.up:
            x = double_axes(x, self.up)
        if self.far_side:
            x = F.pad(x, self.far_side)
        return self.conv(x)  # (B, c_out, *size), doubled or halved

class ResBlock(nn.Module):
    """skip(x) + conv(SiLU(norm(conv(SiLU(norm(x))) [+ linear(SiLU(emb))]))); skip is 1-wide, or nothing.

    FlowUNet gives emb (B, c_emb); its blocks start as skip. resample 'up' or 'down' comes first.
    """
    def __init__(self, dims, c_in, c_out, c_emb=0, resample='', norm='group'):
        super().__init__()
        self.resample = resample
        self.norm1 = NORM[norm](c_in)
        self.norm2 = NORM[norm](c_out)
        self.conv1 = CONV[dims](c_in, c_out, 3, padding=1)
        self.conv2 = CONV[dims](c_out, c_out, 3, padding=1)
        if c_emb:
            zeroed(self.conv2)
            self.emb = nn.Linear(c_emb, c_out)
        self.skip = CONV[dims](c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resize(self, x, size):
        if not self.resample: return x
        if self.resample == 'up':
            D, H, W = size
            return double_axes(x, 'nearest')[:, :, :D, :H, :W]
        return F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]], ceil_mode=True)

    def forward(self, x, emb=None, size=None):
        """size: of the result, for 'up': one less than twice the input's where a level was odd."""
        h = self.resize(F.silu(self.norm1(x)), size)             # (B, c_in, *size)
        h = self.conv1(h)                                        # (B, c_out, *size)
        if emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None, None]
        x = self.resize(x, size)                                 # (B, c_in, *size)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))  # (B, c_out, *size)

class NormAct(nn.Module):
    """A norm of NORM, then SiLU if act."""
    def __init__(self, channels, act, norm):
        super().__init__()
        self.norm = NORM[norm](channels)
        self.act = act

    def forward(self, x):
        return F.silu(self.norm(x)) if self.act else self.norm(x)  # (B, C, *size)

class Stack(nn.Module):
    """Blocks in a row. checkpointing: see run()."""
    def __init__(self, blocks):
        super().__init__()
        self.checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = run(self, block, x)  # (B, C_i, *size_i)
        return x
