"""Vector quantisation with a codebook that follows by moving average, and its control without a codebook."""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

def sum_over_ranks(x):
    """x summed over the processes, in place; x itself when alone."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x

def gather_over_ranks(x):
    """(N, C) of every process -> (sum of the N's, C), in rank order. The N's may differ."""
    if not dist.is_initialized(): return x
    # on the host: reading it does not wait for the GPU
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = len(x)
    sizes = sum_over_ranks(sizes).tolist()
    parts = [x.new_empty(max(sizes), x.shape[1]) for _ in sizes]
    dist.all_gather(parts, F.pad(x, (0, 0, 0, max(sizes) - len(x))))  # all_gather wants equal shapes
    return torch.cat([p[:n] for p, n in zip(parts, sizes)])

@contextlib.contextmanager
def full_float32():
    """Products of float32 keep their 24 bits inside, whatever the process allows: TF32 keeps 11.

    The distances to two codes may differ in the last bits alone.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed

def from_first_rank(x):
    """x of the first process, on every process, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
    return x

def perplexity(counts):
    """exp(entropy) of the use of K codes: K when uniform, 1 when one code is left.

    counts: (K,), or (num_codebooks, K) for the mean over codebooks.
    """
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1e-5)
    return torch.exp(-torch.xlogy(p, p).sum(-1)).mean()

def count_codes(tokens, x, num_codes, num_codebooks=1):
    """How often each code is used -> (2, num_codebooks, K) int64: for background, and for brain.

    tokens (B, *grid), with several codebooks (B, num_codebooks, *grid), of volumes x (B, 1, D, H, W). A token
    is brain where any of its voxels is above 0.
    """
    brain = F.adaptive_max_pool3d(x.float(), tokens.shape[-3:])[:, 0] > 0  # (B, *grid)
    books = tokens if num_codebooks > 1 else tokens[:, None]
    counts = torch.zeros(2, books.shape[1], num_codes, dtype=torch.int64)
    for k, book in enumerate(books.unbind(1)):
        for part, where in enumerate((~brain, brain)):
            counts[part, k] = torch.bincount(book[where], minlength=num_codes).cpu()
    return counts

def code_use(counts):
    """What count_codes says over a data set: perplexity and number of codes in use, means over codebooks.

    returns {name: value}: perplexity and codes_used of all tokens, and of those of brain and of background
    """
    use = {}
    for name, part in (('', counts.sum(0)), ('_brain', counts[1]), ('_background', counts[0])):
        use[f'perplexity{name}'] = perplexity(part).item()
        use[f'codes_used{name}'] = (part > 0).sum().item() / len(part)
    return use

def collapse_warning(use, num_codes, n_tokens):
    """A line if less than a tenth is used of the codes that n_tokens tokens could use; else ''.

    use: what code_use says.
    """
    if use['codes_used'] >= 0.1 * min(num_codes, n_tokens): return ''
    return (f"only {use['codes_used']:.0f} of {num_codes} codes are in use: the codebook has collapsed; "
            'raise revive, or lower num_codes or w_commit')

# ---------------------------------------------------------------- moving averages, once per step

def hold_statistics(model, micro_steps=1):
    """From here on the codebooks and moving averages of a model stand still until move_statistics.

    micro_steps: how many batches a step has.
    """
    for module in model.modules():
        if hasattr(module, 'held'):
            module.held = []
            module.micro_steps = micro_steps

def move_or_hold(module, new):
    """Move a module's averages by the statistics of a batch, or keep these for move_statistics."""
    if module.held is None:
        module.move(new)
    else:
        module.held.append(new)

def move_statistics(model):
    """One step of a model's averages, by the sum of what its micro-steps held; False if there is nothing."""
    holding = [module for module in model.modules() if getattr(module, 'held', None)]
    for module in holding:
        module.move(sum(module.held))
        module.held = []
    return len(holding) > 0

# ---------------------------------------------------------------- quantisers

class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with a codebook by EMA (van den Oord et al. 2017, A.1); NeuroQuant eq. 5-7.

    num_codes K, dim C. decay: of the EMA. eps: Laplace smoothing of the code counts.
    revive: a code used less than this fraction of the mean use is replaced by a random encoder vector of the
    batch. A new codebook is all dead, so the first batches fill it: data-driven start and revival are one
    rule. Any number of processes has the codebook of one process on the joined batch. After hold_statistics
    the same holds for any number of micro-steps; the first of a step revives codes.

    Buffers: codebook (K, C); cluster_size (K,), EMA of how many vectors chose each code; embed_sum (K, C),
    EMA of their sum.
    Departs: the EMA does the work of eq. 7's codebook term, so that only commitment is returned.
    """
    def __init__(self, num_codes, dim, decay=0.99, eps=1e-5, revive=0.1):
        super().__init__()
        if num_codes < 2 or dim < 1:
            raise ValueError(f'a codebook needs at least 2 codes of 1 channel, got {num_codes} x {dim}')
        self.num_codes = num_codes
        self.dim = dim
        self.decay = decay
        self.eps = eps
        self.revive = revive
        self.held = None  # a list after hold_statistics
        self.micro_steps = 1
        self.step_counts = None  # (K,) tokens of the last step, of all processes
        self.register_buffer('codebook', torch.zeros(num_codes, dim))
        self.register_buffer('cluster_size', torch.zeros(num_codes))
        self.register_buffer('embed_sum', torch.zeros(num_codes, dim))

    def forward(self, z, update=True):
        """z: (B, C, *grid), any float type; distances, EMA and loss are in float32.

        returns z_q (B, C, *grid) float32, straight-through: its gradient reaches z unchanged
                indices (B, *grid) int64 in [0, K)
                commit: mean squared distance to the chosen code per latent element, unweighted; gradient to z
                alone
        The codebook is written only in training mode with update=True. Raises ValueError for another channel
        count.
        """
        if z.shape[1] != self.dim:
            raise ValueError(f'quantiser has codes of {self.dim} channels, z has {z.shape[1]}')
        with torch.autocast(z.device.type, enabled=False):  # float32: squared distances cancel in bf16
            z = z.float()
            flat = z.movedim(1, -1).reshape(-1, self.dim)  # (N, C)
            writes = self.training and update
            if writes and not self.held:
                self.revive_dead(flat.detach())
            indices = self.nearest(flat.detach())
            if writes:
                move_or_hold(self, self.counts_and_sums(flat.detach(), indices))
            indices = indices.view(z.shape[0], *z.shape[2:])
            z_q = self.lookup(indices)
            commit = F.mse_loss(z, z_q)
            return z + (z_q - z).detach(), indices, commit

    def nearest_indices(self, z):
        """z (B, C, *grid) -> indices (B, *grid); nothing is written."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().movedim(1, -1).reshape(-1, self.dim)
            return self.nearest(flat).view(z.shape[0], *z.shape[2:])

    def nearest(self, flat):
        """(N, C) -> (N,) index of the code at the smallest Euclidean distance, NeuroQuant eq. 6."""
        with full_float32():  # |z|^2 is left out: it is the same for every code
            distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T  # (N, K)
        return distance.argmin(1)

    def lookup(self, indices):
        """indices (B, *grid) -> z_q (B, C, *grid)."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def revive_dead(self, flat):
        """Give each dead code a vector of the joined batch, no vector twice. It starts at the mean use.

        A vector of 0 starts none: it is what a residual codebook is left by one that has just begun on it.
        """
        flat = gather_over_ranks(flat)
        dead = self.cluster_size <= self.revive * self.cluster_size.mean()
        order = from_first_rank(torch.randperm(len(flat), device=flat.device))
        usable = flat.any(1).int()
        order = order[usable[order].argsort(descending=True, stable=True)][:self.num_codes]  # zeros come last
        turn = dead.cumsum(0) - 1  # the n-th dead code takes the n-th vector
        dead &= turn < usable.sum().clamp(max=len(order))
        vector = flat[order[turn.clamp(0, len(order) - 1)]]
        mean_use = self.micro_steps * len(flat) / self.num_codes
        self.codebook.copy_(torch.where(dead[:, None], vector, self.codebook))
        self.embed_sum.copy_(torch.where(dead[:, None], vector * mean_use, self.embed_sum))
        self.cluster_size.copy_(torch.where(dead, mean_use, self.cluster_size))

    def counts_and_sums(self, flat, indices):
        """(K, C + 1): the sum of each code's vectors, and in the last column their number."""
        new = flat.new_zeros(self.num_codes, self.dim + 1)
        return new.index_add_(0, indices, F.pad(flat, (0, 1), value=1.0))

    @torch.no_grad()
    def move(self, new):
        """One EMA step over every process: each code moves to the smoothed mean of its vectors."""
        new = sum_over_ranks(new)
        self.step_counts = new[:, -1]
        self.embed_sum.lerp_(new[:, :-1], 1 - self.decay)
        self.cluster_size.lerp_(new[:, -1], 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.num_codes * self.eps) * total
        alive = self.cluster_size > self.eps  # a code not yet started stays where it is
        means = self.embed_sum / smoothed[:, None].clamp(min=self.eps)
        self.codebook.copy_(torch.where(alive[:, None], means, self.codebook))

    def perplexity(self):
        return perplexity(self.cluster_size)

class FiniteScalarQuantizer(nn.Module):
    """A few channels, each rounded to one of a few levels, Mentzer et al. 2023: the codebook's control.

    It has no codebook that could collapse. num_codes K: a power of 2 from 4 on, as channels of 8 levels and
    at most two of 4. dim C: linear maps lead to those channels and back. Buffer cluster_size (K,): EMA of how
    many vectors had each code, for perplexity() alone.
    """
    def __init__(self, num_codes, dim, decay=0.99):
        super().__init__()
        bits = num_codes.bit_length() - 1
        if bits < 2 or num_codes != 2 ** bits:
            raise ValueError(f"quantizer='fsq' needs a power of 2 of codes, at least 4, not {num_codes}")
        fours = -bits % 3
        levels = [8] * ((bits - 2 * fours) // 3) + [4] * fours
        digits = [math.prod(levels[:i]) for i in range(len(levels))]  # what a level of each adds to the index
        self.num_codes = num_codes
        self.dim = dim
        self.decay = decay
        self.held = None
        self.step_counts = None
        self.down = nn.Linear(dim, len(levels))
        self.up = nn.Linear(len(levels), dim)
        self.register_buffer('levels', torch.tensor(levels), persistent=False)
        self.register_buffer('digits', torch.tensor(digits), persistent=False)
        self.register_buffer('cluster_size', torch.zeros(num_codes))

    def forward(self, z, update=True):
        """z (B, C, *grid) -> z_q (B, C, *grid) float32, indices (B, *grid) int64, and a commitment of 0."""
        if z.shape[1] != self.dim:
            raise ValueError(f'quantiser takes {self.dim} channels, z has {z.shape[1]}')
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            rounded = bounded + (bounded.round() - bounded).detach()
            indices = self.index(rounded.detach())
            if self.training and update:
                one = self.cluster_size.new_ones(indices.numel())  # bincount would wait for the device
                move_or_hold(self, torch.zeros_like(self.cluster_size).index_add_(0, indices.flatten(), one))
            z_q = self.up(2 * rounded / self.levels).movedim(-1, 1)
            return z_q, indices, torch.zeros((), device=z.device)

    def bound(self, z):
        """z (B, C, *grid) -> (B, *grid, channels), of L levels within (-L/2 - 1/2, L/2 - 1/2); 0 stays 0."""
        reach = (self.levels - 1) / 2 * 1.001  # a little beyond, so that the outer levels can be reached
        channels = self.down(z.float().movedim(1, -1))
        return torch.tanh(channels + torch.atanh(0.5 / reach)) * reach - 0.5

    def index(self, rounded):
        """Whole numbers (B, *grid, channels) -> (B, *grid) int64: channels are digits, lowest first."""
        return ((rounded.round().long() + self.levels // 2) * self.digits).sum(-1)

    def nearest_indices(self, z):
        """z (B, C, *grid) -> indices (B, *grid); nothing is written."""
        with torch.autocast(z.device.type, enabled=False):
            return self.index(self.bound(z).round())

    def lookup(self, indices):
        """indices (B, *grid) -> z_q (B, C, *grid)."""
        with torch.autocast(indices.device.type, enabled=False):
            rounded = indices[..., None] // self.digits % self.levels - self.levels // 2
            return self.up(2 * rounded / self.levels).movedim(-1, 1)

    @torch.no_grad()
    def move(self, counts):
        """One EMA step of the counts (K,), over every process."""
        self.step_counts = sum_over_ranks(counts)
        self.cluster_size.lerp_(self.step_counts, 1 - self.decay)

    def perplexity(self):
        return perplexity(self.cluster_size)

class MultiQuantizer(nn.Module):
    """Several codebooks per position, each a VectorQuantizer of num_codes codes.

    Indices are (B, num_codebooks, *grid).
    'residual': each codes what the ones before left over (Zeghidour et al. 2021); their codes are added.
    'split': each codes its equal part of the channels; their codes are concatenated.
    """
    def __init__(self, num_codes, dim, decay, revive, num_codebooks, codebooks):
        super().__init__()
        if codebooks not in ('residual', 'split'):
            raise ValueError(f"codebooks='{codebooks}': residual or split")
        self.residual = codebooks == 'residual'
        if not self.residual and dim % num_codebooks:
            raise ValueError(f'{dim} channels do not split into {num_codebooks} codebooks')
        self.num_codes = num_codes
        self.num_codebooks = num_codebooks
        channels = dim if self.residual else dim // num_codebooks
        self.parts = nn.ModuleList()
        for _ in range(num_codebooks):
            self.parts.append(VectorQuantizer(num_codes, channels, decay, revive=revive))

    def channels_of(self, z, k):
        """Those that codebook k codes: all, or its part."""
        return z if self.residual else z.chunk(self.num_codebooks, 1)[k]

    def forward(self, z, update=True):
        """As VectorQuantizer's; commit is the mean over the codebooks."""
        z = z.float()
        rest = z
        indices = []
        commit = 0.0
        for k, part in enumerate(self.parts):
            _, chosen, distance = part(self.channels_of(rest, k), update)
            indices.append(chosen)
            commit = commit + distance
            if self.residual:
                rest = rest - part.lookup(chosen)
        indices = torch.stack(indices, 1)
        z_q = z + (self.lookup(indices) - z).detach()
        return z_q, indices, commit / self.num_codebooks

    def nearest_indices(self, z):
        rest = z.float()
        indices = []
        for k, part in enumerate(self.parts):
            indices.append(part.nearest_indices(self.channels_of(rest, k)))
            if self.residual:
                rest = rest - part.lookup(indices[-1])
        return torch.stack(indices, 1)

    def lookup(self, indices):
        """indices (B, num_codebooks, *grid) -> z_q (B, C, *grid)."""
        codes = [part.lookup(i) for part, i in zip(self.parts, indices.unbind(1))]
        return sum(codes) if self.residual else torch.cat(codes, 1)

    def perplexity(self):
        """Mean over the codebooks."""
        return sum(part.perplexity() for part in self.parts) / self.num_codebooks

    @property
    def step_counts(self):
        return torch.stack([part.step_counts for part in self.parts])

def make_quantizer(num_codes, dim, decay=0.99, revive=0.1, num_codebooks=1, codebooks='residual',
                   quantizer='ema'):
    """One VectorQuantizer, a MultiQuantizer of several, or for 'fsq' a FiniteScalarQuantizer."""
    if quantizer not in ('ema', 'fsq'): raise ValueError(f"quantizer='{quantizer}': ema or fsq")
    if quantizer == 'fsq':
        if num_codebooks > 1:
            raise ValueError("quantizer='fsq' has no codebooks: num_codebooks=1; raise num_codes instead")
        return FiniteScalarQuantizer(num_codes, dim, decay)
    if num_codebooks == 1: return VectorQuantizer(num_codes, dim, decay, revive=revive)
    return MultiQuantizer(num_codes, dim, decay, revive, num_codebooks, codebooks)

# ---------------------------------------------------------------- settings

@dataclass
class QuantizerConfig:
    """The codebook of NeuroQuant, and of ConvVAE with bottleneck='vq'."""
    quantizer: str = 'ema'       # a codebook; 'fsq': the control without one, FiniteScalarQuantizer
    num_codes: int = 4096
    num_codebooks: int = 1       # indices per position; NeuroQuant's paper has one
    codebooks: str = 'residual'  # how several work together, see MultiQuantizer
    code_decay: float = 0.99     # EMA of the codebook
    revive: float = 0.1          # codes used less than this fraction of the mean use are replaced

    def make_quantizer(self, dim):
        return make_quantizer(self.num_codes, dim, self.code_decay, self.revive,
                              self.num_codebooks, self.codebooks, self.quantizer)
