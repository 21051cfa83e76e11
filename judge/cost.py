"""What a training step costs, FLOP and memory, counted on tensors without content; what the machine has."""
import contextlib
import copy
import logging
import math
import os
import weakref
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import print0
from optim import Muon

# ---------------------------------------------------------------- FLOP

def vae_flops(model, shape):
    """FLOP (2 per multiply-add) of an autoencoder to encode and to decode one (D,H,W) volume or slice."""
    c = model.config
    if getattr(c, 'dims', 3) == 2:
        shape = [n for n in shape if n != 1]
    with torch.device('meta'):  # a twin without weights
        twin = type(model)(c).eval()
        x = torch.empty(1, getattr(c, 'in_channels', 1), *shape)
    (z, z_mod_or_logvar), encode = count_flops(twin.encode, x)
    film = [twin.film(z_mod_or_logvar, 0)] if hasattr(twin, 'film') else []
    _, decode = count_flops(twin.decode, z, *film)
    return encode, decode

def training_flops(forward, batch, terms):
    """FLOP of a training step of a batch on this process; a backward pass counts as two forward passes.

    forward: vae_flops of one volume or slice. terms: those of the loss; a cross term decodes every pair.
    """
    encode, decode = forward
    n = len(batch['x'])
    n_cross = len(batch['pairs']) if 'cross' in terms else 0
    return 3 * (n * encode + (n + n_cross) * decode)

def unet_flops(model, shape):
    """FLOP of one forward pass of a FlowUNet on a (C,d,h,w) latent."""
    with torch.device('meta'):
        return count_flops(type(model)(model.config), torch.empty(1, *shape), torch.empty(1))[1]

def gpt_flops(model):
    """FLOP of one forward pass of a GPT on all tokens of a volume but the last."""
    with torch.device('meta'):
        twin = type(model)(model.config)
        return count_flops(twin, torch.empty(1, model.length - 1, dtype=torch.int64))[1]

def count_flops(function, *args):
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return result, counter.get_total_flops()

def say_cost(model, volume, sample, flops, where):
    """Print the bits of a (D,H,W) volume's latent, and flops, those of vae_flops for a sample's shape."""
    bits = model.bits_per_volume(volume)
    print0(f'{bits:.0f} bits of latent per volume ({16 * math.prod(volume) / bits:.0f}x less than 16-bit '
           f'voxels), {sum(flops) / 1e9:.1f} GFLOP forward for {"x".join(map(str, sample))}, on {where}')

# ---------------------------------------------------------------- what a step holds

def blocks(n):
    """Bytes that n bytes take in blocks of 512."""
    return -(-n // 512) * 512

class Live(TorchDispatchMode):
    """Counts the bytes of the tensors alive, in blocks of 512 as CUDA's allocator, and keeps the peak."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            key, size = storage._cdata, blocks(storage.nbytes())
            if key in self.known: continue
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

def in_float(norm):
    return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)

@contextlib.contextmanager
def counting(dtype):
    """Within this context tensors have no content; it yields the Live that counts them, on the CPU.

    dtype: of autocast. With bfloat16, norms compute in float32, as on a GPU. Each process counts alone: none
    sends anything to the others.
    """
    norms = {name: getattr(F, name) for name in ('group_norm', 'layer_norm')}
    if dtype == 'bfloat16':
        norms = {name: in_float(norm) for name, norm in norms.items()}
    alone = mock.patch.object(dist, 'is_initialized', return_value=False)
    quiet = mock.patch.object(logging.getLogger('torch._subclasses.fake_tensor'), 'disabled', True)
    # layers.py calls an operator of oneDNN that wants contents
    plain = mock.patch.object(torch.backends.mkldnn, 'is_available', return_value=False)
    with alone, quiet, plain, mock.patch.multiple(F, **norms), FakeTensorMode(), Live() as live:
        yield live

def without_content(networks):
    """Copies of networks {name: module or None} on the CPU, whose weights have no content; in counting()."""
    memo = {}
    for network in networks.values():
        for tensor in (*network.parameters(), *network.buffers()) if network else ():
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, tensor.requires_grad)
            memo[id(tensor)] = empty
    return copy.deepcopy(networks, memo)

def step_bytes(scope, names, held, step):
    """Bytes of the tensors that a training step holds at most; None where they cannot be counted.

    scope: a script's globals. names: of its networks, or None, that step() takes from there; it finds copies
    without content there, and 'cpu' as the device. held: tensors as large as what else is there all the time.
    What a compiler saves is not known here.
    """
    try:
        with counting(scope['dtype']) as live:
            copies = without_content({name: scope[name] for name in names})
            with mock.patch.dict(scope, copies, device='cpu'):
                step()
    except Exception:  # a count that fails must not end a run
        return None
    return live.peak + sum(blocks(t.numel() * t.element_size()) for t in held)

def blank_batch(rows, shape, pairs):
    """A batch as data.Sessions makes them, for step_bytes: (rows, 1, *shape), and so many pairs of rows."""
    return {
        'x': torch.empty(rows, 1, *shape),
        'modality': torch.zeros(rows, dtype=torch.int64),
        'sample_index': np.arange(rows),
        'share': 1.0,
        'pairs': torch.zeros(pairs, 2, dtype=torch.int64),
        'pair_share': 1.0,
    }

# ---------------------------------------------------------------- what there is

def available_bytes(device):
    """Bytes that this process may still take, with what torch holds of a GPU; None where not known."""
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    known = [n for n in (free_bytes(), *group_bytes()) if n is not None]
    return min(known) // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if known else None

def read_lines(path):
    """Lines of a file of the kernel, none where it is not there."""
    try:
        with open(path) as f:
            return f.read().splitlines()
    except OSError:
        return []

def free_bytes(path='/proc/meminfo'):
    """MemAvailable, None where the system does not say."""
    for line in read_lines(path):
        if line.startswith('MemAvailable:'): return 1024 * int(line.split()[1])
    return None

def group_bytes(root='/sys/fs/cgroup', groups='/proc/self/cgroup'):
    """What is left of the limits of this process's control groups, of either version."""
    left = []
    for line in read_lines(groups):
        _, controllers, path = line.split(':', 2)
        if controllers and 'memory' not in controllers.split(','): continue
        names = ('memory/', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_cache')
        below, limit, usage, cache = names if controllers else ('', 'memory.max', 'memory.current', 'file')
        while True:  # a group is bound by those above it, and a container sees its own as the root
            folder = f'{root}/{below}{path.strip("/")}'
            bound, used = read_lines(f'{folder}/{limit}'), read_lines(f'{folder}/{usage}')
            stat = dict(entry.split() for entry in read_lines(f'{folder}/memory.stat'))
            if bound and used and bound[0].isdigit():
                left.append(int(bound[0]) - int(used[0]) + int(stat.get(cache, 0)))  # files can go
            if not path.strip('/'): break
            path = os.path.dirname(path)
    return left

# ---------------------------------------------------------------- the two together

def gib(n):
    if n is None: return 'not known'
    return f'{n / 2 ** 30:.1f} GiB' if n >= 2 ** 29 else f'{n / 2 ** 20:.0f} MiB'

def say_memory(scope, names, optimizers, beside, step, savers):
    """Print, on the first process alone, memory_line of a run, and of its model's parameters.

    scope, names, step: as step_bytes; the model comes first. optimizers: AdamW holds two averages of each of
    its weights, Muon one. beside: other modules that are there all the time. Either may have None among it.
    """
    if scope['rank']: return
    held = [p for module in beside if module for p in module.parameters()]
    for optimizer in filter(None, optimizers):
        for group in optimizer.param_groups:
            held += group['params'] if isinstance(optimizer, Muon) else 2 * group['params']
    device = scope['device']
    needed = step_bytes(scope, names, held, step)
    n_parameters = sum(p.numel() for p in scope[names[0]].parameters())
    print0(memory_line(n_parameters, needed, available_bytes(device), device, savers))

def memory_line(parameters, needed, available, device, savers):
    """A line on a run's parameters, the bytes of its step and of the device, and, if need be, what to lower.

    needed, available: bytes, or None. savers: the settings that lower the memory, as text.
    """
    line = (f'{parameters / 1e6:.2f} M parameters, memory of a training step {gib(needed)}, '
            f'free on {device} {gib(available)}')
    if needed and available is not None and needed > available:
        line += f'; it will not fit: lower {savers}'
    return line
