"""The networks. NeuroQuant: one 3D encoder, two latent streams, a shared codebook of anatomy, a decoder driven by modality.

Shapes: x (B, 1, D, H, W) in [0, 1], background exactly 0, RAS+ at 1 mm, axes (left-right, posterior-anterior, inferior-superior);
latents (B, C, d, h, w) at 1/16 of the size. An axis of length 1 makes x a batch of slices and names the missing axis: layers
read the plane from the shape, so volumes and slices share one set of weights and no flag is passed.
"""
import hashlib
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from quantize import make_quantizer, sum_over_ranks

# ---------------------------------------------------------------- building blocks

def missing_axis(x):
    """The one spatial axis (0, 1, 2) of length 1 of x (B, C, D, H, W), or None for a volume. ValueError for two of them."""
    ones = [axis for axis, n in enumerate(x.shape[2:]) if n == 1]
    if len(ones) > 1:
        raise ValueError(f'{tuple(x.shape)} has {len(ones)} axes of length 1: a slice has one, a volume none')
    return ones[0] if ones else None

def slicewise(fn, x, axis):
    """fn of images (B, C, ., .), applied to slices x (B, C, D, H, W) that lack `axis`; channels-last stays channels-last."""
    return fn(x.squeeze(2 + axis)).movedim(1, -1).unsqueeze(1 + axis).movedim(-1, 1)

class Conv3d(nn.Conv3d):
    """nn.Conv3d. On a CPU a single small sample goes to oneDNN, up to 11 times as fast as the kernel that torch picks for it."""
    def _conv_forward(self, x, weight, bias):
        if (
            x.device.type == 'cpu'
            and len(x) == 1
            and x[0, 0].numel() >= 64
            and x.dtype == weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available()
        ):
            return torch.mkldnn_convolution(
                x, weight, bias, self.padding, self.stride, self.dilation, self.groups
            )
        return super()._conv_forward(x, weight, bias)

class Conv(Conv3d):
    """Zero-padded 3D convolution; on a slice, the 2D convolution whose kernel is summed over the missing axis.

    The sum gives a slice what an inner slice of a volume constant along that axis would get, so activations keep their scale
    ("kernels are adjusted along the selected plane", NeuroQuant 3.5). Stride and padding along the missing axis are 1 and none.
    """
    def forward(self, x):
        axis = missing_axis(x)
        if axis is None: return super().forward(x)
        weight = self.weight.sum(2 + axis)
        return slicewise(
            lambda images: F.conv2d(images, weight, self.bias, self.stride[0], self.padding[0]), x, axis
        )

def halve(x):
    """Mean over 2x2x2 voxels; on a slice, over 2x2 pixels."""
    axis = missing_axis(x)
    if axis is None: return F.avg_pool3d(x, 2)
    return slicewise(lambda images: F.avg_pool2d(images, 2), x, axis)

def double(x, mode='nearest'):
    """x2 by 'nearest' or 'trilinear' interpolation; on a slice, within its plane."""
    axis = missing_axis(x)
    if axis is None: return F.interpolate(x, scale_factor=2, mode=mode)
    plane_mode = 'bilinear' if mode == 'trilinear' else mode
    return slicewise(lambda images: F.interpolate(images, scale_factor=2, mode=plane_mode), x, axis)

def channel_norm(channels):
    """Each channel to mean 0 and variance 1 over its own grid, then scale and shift (group norm with groups of one channel).

    Groups of several channels let the constants of channels outgrow what differs between brains, and codes fall out of use.
    """
    return nn.GroupNorm(channels, channels)

class ResConv(nn.Module):
    """x + conv(SiLU(norm(x))), 3x3x3, same shape."""
    def __init__(self, channels):
        super().__init__()
        self.norm = channel_norm(channels)
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))

class AxialAttention(nn.Module):
    """Self-attention along one spatial axis, NeuroQuant eq. 2; three in a row, one per axis, let any voxel reach any other.

    x: (B, C, D, H, W) -> the same shape, residual, with layer norm over channels first. axis: 0, 1, 2 = D, H, W.
    Cost of the scores: D*H*W*L*C for axis length L, not (D*H*W)^2*C. On slices the missing axis is skipped.
    Heads are 32 wide where C allows. The projection starts at zero: the block starts as the identity.
    """
    def __init__(self, channels, axis):
        super().__init__()
        self.axis = axis
        self.n_head = channels // 32 if channels % 32 == 0 else 1
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        if missing_axis(x) == self.axis: return x
        h = self.norm(x.movedim(1, -1)).movedim(1 + self.axis, 3)       # (B, ., ., L, C)
        rows = h.reshape(-1, *h.shape[3:])                              # (R, L, C), R = B*D*H*W/L
        # (R, heads, L, C/heads)
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.qkv(rows).chunk(3, -1))
        if len(rows) <= 65535:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.cat([F.scaled_dot_product_attention(*part)      # CUDA kernels take no more rows
                             for part in zip(q.split(65535), k.split(65535), v.split(65535))])
        y = self.proj(y.transpose(1, 2).flatten(2)).view(h.shape)
        return x + y.movedim(3, 1 + self.axis).movedim(-1, 1)

def local_then_axial(channels, res_blocks, attention):
    """Residual 3x3x3 convolutions, then attention along D, H and W: A(F) = Attn_W(Attn_H(Attn_D(F))), NeuroQuant eq. 3."""
    return nn.Sequential(*[ResConv(channels) for _ in range(res_blocks)],
                         *[AxialAttention(channels, axis) for axis in range(3 if attention else 0)])

# ---------------------------------------------------------------- NeuroQuant

@dataclass
class NeuroQuantConfig:
    """Defaults: the narrow reading of the paper (only C4 = 256 is stated there) with its released code's codebook."""
    modalities: tuple = ('T1w', 'T2w')
    widths: tuple = (32, 64, 128, 256)  # channels of the four encoder blocks, at 1/2, 1/4, 1/8, 1/16
    res_blocks: int = 1                 # 3x3x3 convolutions per block besides the strided one
    attention: bool = True              # factorised multi-axis attention (FMA) in encoder and decoder
    attn_levels: tuple = (0, 1, 2, 3)   # where: 0 is 1/2 of the size (the dearest), 3 is 1/16
    film: bool = True                   # modality stream and FiLM (M-FiLM); without it, a plain VQ-VAE
    anat_dim: int = 64                  # channels of z_anat and of a code
    mod_dim: int = 32                   # channels of z_mod
    modality_dim: int = 32              # channels of the learned vector s_m of each modality
    # 'ema': a codebook; 'fsq': the control without one, see FiniteScalarQuantizer
    quantizer: str = 'ema'
    num_codes: int = 4096
    num_codebooks: int = 1              # indices per position; the paper has one
    codebooks: str = 'residual'         # how several work together, see MultiQuantizer
    code_decay: float = 0.99            # EMA of the codebook
    revive: float = 0.1                 # codes used less than this fraction of the mean use are replaced

class Encoder(nn.Module):
    """x (B, 1, D, H, W) -> F_4 (B, C4, D/16, H/16, W/16): a stem at full size and four blocks, NeuroQuant 3.2.

    checkpointing: recompute the half-size block in the backward pass instead of keeping what is inside it.
    """
    def __init__(self, c):
        super().__init__()
        self.checkpointing = False
        channels = (c.widths[0] // 2, *c.widths)  # half the width at full size, where memory is dear
        self.stem = Conv(1, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(a, b, c.res_blocks, c.attention and level in c.attn_levels)
                                    for level, (a, b) in enumerate(zip(channels, channels[1:])))

    def forward(self, x):
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            h = (
                checkpoint(block, h, use_reentrant=False)
                if self.checkpointing and self.training and i == 0
                else block(h)
            )
        return h

class EncoderBlock(nn.Module):
    """F_t = skip(F_{t-1}) + A(Conv3D(F_{t-1})) at half the size, NeuroQuant eq. 3.

    Departs: the two terms of eq. 3 differ in shape, so the skip is a 2x2x2 mean and a 1x1x1 convolution.
    """
    def __init__(self, c_in, c_out, res_blocks, attention):
        super().__init__()
        self.skip = Conv(c_in, c_out, 1)
        self.down = Conv(c_in, c_out, 3, stride=2, padding=1)
        self.body = local_then_axial(c_out, res_blocks, attention)

    def forward(self, x):
        return self.skip(halve(x)) + self.body(self.down(x))

class FiLM(nn.Module):
    """u_m = (GAP(z_mod), s_m), then (gamma_l, beta_l) = MLP_l(u_m) for every decoder layer l, NeuroQuant eq. 8-9.

    The last layers start at zero, so that gamma = 1 and beta = 0: the modulated decoder starts as the plain one.
    """
    def __init__(self, c, layers):
        super().__init__()
        self.embedding = nn.Embedding(len(c.modalities), c.modality_dim)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(c.mod_dim + c.modality_dim, 256),
                nn.SiLU(),
                nn.Linear(256, 256),
                nn.SiLU(),
                nn.Linear(256, 2 * channels),
            )
            for channels in layers
        )
        for mlp in self.mlps:
            nn.init.zeros_(mlp[-1].weight)
            nn.init.zeros_(mlp[-1].bias)

    def forward(self, pooled, modality):
        """pooled (B, mod_dim), modality (B,) int64 -> list of (gamma, beta), each (B, C_l)."""
        u = torch.cat([pooled, self.embedding(modality).to(pooled.dtype)], 1)
        out = [mlp(u).chunk(2, 1) for mlp in self.mlps]
        return [(1 + gamma, beta) for gamma, beta in out]

class DecoderBlock(nn.Module):
    """Convolution, [x2,] residual convolution, axis attention, FiLM (NeuroQuant eq. 10), SiLU.

    The convolution that changes the channels comes before the upsampling, where it costs an eighth. No norm between body and
    FiLM: with one, what every brain has in common drowns what the codes say.
    """
    def __init__(self, c_in, c_out, res_blocks, attention, up=True):
        super().__init__()
        self.up = up
        self.conv = Conv(c_in, c_out, 3, padding=1)
        self.body = local_then_axial(c_out, res_blocks, attention)

    def forward(self, x, gamma=None, beta=None):
        h = self.conv(x)
        h = self.body(double(h) if self.up else h)
        if gamma is not None:
            h = gamma[:, :, None, None, None] * h + beta[:, :, None, None, None]
        return F.silu(h)

class Decoder(nn.Module):
    """z_q (B, Ca, d, h, w) -> x_hat (B, 1, 16d, 16h, 16w), linear output. The encoder's mirror; no attention at full size.

    The full-size stage has half of widths[0] channels: it is where most of the time and memory would go.
    checkpointing: recompute the half- and full-size stages in the backward pass instead of keeping them.
    """
    def __init__(self, c):
        super().__init__()
        self.channels = (*reversed(c.widths), c.widths[0] // 2)  # of the five FiLM layers
        pairs = zip((c.anat_dim, *self.channels), self.channels)
        self.blocks = nn.ModuleList(
            DecoderBlock(a, b, c.res_blocks, c.attention and 3 - i in c.attn_levels, up=i > 0)
            for i, (a, b) in enumerate(pairs)
        )
        self.heads = nn.ModuleList(Conv(channels, 1, 3, padding=1) for channels in self.channels)
        self.checkpointing = False

    def forward(self, z_q, film):
        h, x_hat = z_q, None
        for i, (block, head) in enumerate(zip(self.blocks, self.heads)):
            args = film[i] if film else ()
            if self.checkpointing and self.training and i >= 3:
                h = checkpoint(block, h, *args, use_reentrant=False)
            else:
                h = block(h, *args)
            x_hat = head(h) if x_hat is None else head(h) + double(x_hat, 'trilinear')
        return x_hat

class NeuroQuant(nn.Module):
    """Dual-stream VQ-VAE (arXiv:2604.05171): anatomy as one code per 16^3 voxels, modality as a vector that drives FiLM.

    modality, wherever it is an argument: a name, an index into config.modalities, or (B,) int64 of indices.
    Buffers beside the codebook: mod_sum (M, Cm) and mod_weight (M,), whose ratio is the running mean of GAP(z_mod) for each
    modality, so that translate() needs no scan of the target.
    """
    def __init__(self, config):
        super().__init__()
        c, self.factor = config, 16
        self.config = config
        if len(c.widths) != 4 or any(w < 8 or w % 8 for w in c.widths):
            raise ValueError(f'widths {c.widths}: four are needed, each a multiple of 8')
        if not c.modalities: raise ValueError('modalities is empty: name at least one, such as T1w')
        self.encoder = Encoder(c)
        self.anat_head = nn.Sequential(nn.SiLU(), Conv(c.widths[-1], c.anat_dim, 3, padding=1))
        self.quantizer = make_quantizer(
            c.num_codes, c.anat_dim, c.code_decay, c.revive, c.num_codebooks, c.codebooks, c.quantizer
        )
        self.decoder = Decoder(c)
        if c.film:
            self.mod_head = nn.Sequential(nn.SiLU(), Conv(c.widths[-1], c.mod_dim, 3, padding=1))
            self.film_mlp = FiLM(c, self.decoder.channels)
            self.register_buffer('mod_sum', torch.zeros(len(c.modalities), c.mod_dim))
            self.register_buffer('mod_weight', torch.zeros(len(c.modalities)))

    def check_size(self, shape):
        """ValueError unless every axis is a multiple of 16 from 32 on, or one axis is 1 (slices).

        From 32, since a latent axis of length 1 would read as a slice.
        """
        if sum(n == 1 for n in shape) > 1 or any(n != 1 and (n % 16 or n < 32) for n in shape):
            raise ValueError(
                f'size {tuple(shape)}: each axis must be a multiple of 16, at least 32 (one may be 1:'
                ' slices); pad first'
            )

    def encode(self, x, modality=None):
        """x (B,1,D,H,W) -> z_anat (B,Ca,d,h,w), z_mod (B,Cm,d,h,w), NeuroQuant eq. 1 and 4; Cm = 0 without FiLM.

        modality is not used: one encoder serves all. Raises ValueError for sizes that check_size refuses.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f'x must be (B,1,D,H,W), got {tuple(x.shape)}')
        self.check_size(x.shape[2:])
        h = self.encoder(x)
        z_anat = self.anat_head(h)
        z_mod = self.mod_head(h) if self.config.film else h[:, :0]
        return z_anat, z_mod

    def film(self, z_mod, modality):
        """z_mod (B,Cm,d,h,w) -> list of (gamma, beta), one per decoder layer, each (B,C_l); empty without FiLM."""
        if not self.config.film: return []
        return self.film_mlp(z_mod.mean((2, 3, 4)), self.modality_index(modality, z_mod))

    def decode(self, z_q, film):
        """z_q (B,Ca,d,h,w), film as film() gives it -> x_hat (B,1,D,H,W), NeuroQuant eq. 11; not clamped."""
        return self.decoder(z_q, film)

    def forward(self, x, modality, pairs=None):
        """One pass for everything the losses need.

        x (B,1,D,H,W), modality. pairs (P,2) int64: rows (source, target) of the batch that are one subject's scans; then
        x_cross (P,1,D,H,W) is the source's anatomy under the target's FiLM, NeuroQuant eq. 13, decoded in the same call.
        returns dict: x_hat (B,1,D,H,W), z_anat, z_mod, z_q (float32, straight-through), indices (B,d,h,w), commit
        Slices read the codebook and the modality means without changing them (open in the paper: its 2D batches hold more
        tokens than its 3D ones and would take the codebook over).
        """
        volumes = missing_axis(x) is None
        z_anat, z_mod = self.encode(x)
        z_q, indices, commit = self.quantizer(z_anat, update=volumes)
        film = self.film(z_mod, modality)
        if self.training and volumes and self.config.film:
            self.update_modality_means(z_mod, modality)
        out = dict(z_anat=z_anat, z_mod=z_mod, z_q=z_q, indices=indices, commit=commit)
        if pairs is None: return out | dict(x_hat=self.decode(z_q, film))
        source, target = pairs.unbind(1)
        both = self.decode(
            torch.cat([z_q, z_q[source]]),
            [(torch.cat([g, g[target]]), torch.cat([b, b[target]])) for g, b in film],
        )
        return out | dict(x_hat=both[:len(x)], x_cross=both[len(x):])

    @torch.no_grad()
    def update_modality_means(self, z_mod, modality):
        new = z_mod.new_zeros(len(self.mod_weight), self.mod_sum.shape[1] + 1, dtype=torch.float32)
        pooled = F.pad(z_mod.float().mean((2, 3, 4)), (0, 1), value=1.0)  # the last column counts
        new = sum_over_ranks(new.index_add_(0, self.modality_index(modality, z_mod), pooled))
        self.mod_sum.lerp_(new[:, :-1], 0.01)
        self.mod_weight.lerp_(new[:, -1], 0.01)

    def modality_index(self, modality, like):
        """A name, an index or (B,) indices -> (B,) int64 on the device of `like` (B, ...)."""
        if isinstance(modality, torch.Tensor): return modality.to(like.device).expand(len(like))
        if isinstance(modality, str):
            if modality not in self.config.modalities:
                raise ValueError(
                    f"modality '{modality}': this model knows {', '.join(self.config.modalities)}"
                )
            modality = self.config.modalities.index(modality)
        if modality is None:
            raise ValueError(
                f"this model needs the modality of x, one of {', '.join(self.config.modalities)}"
            )
        return torch.full((len(like),), modality, dtype=torch.int64, device=like.device)

    def tokens(self, x):
        """x (B,1,D,H,W) -> indices (B,d,h,w) int64: 972 of them for 144x192x144."""
        return self.quantizer.nearest_indices(self.encode(x)[0])

    def from_tokens(self, indices, modality):
        """indices (B,d,h,w) -> x_hat (B,1,D,H,W) in that modality, under its running mean of GAP(z_mod)."""
        return self.decode(self.quantizer.lookup(indices), self.mean_film(modality, indices))

    def mean_film(self, modality, like):
        """FiLM of a modality from its running mean; ValueError if no volume of it was seen in training."""
        if not self.config.film: return []
        index = self.modality_index(modality, like)
        if (self.mod_weight[index] == 0).any():
            raise ValueError(f'no volume of modality {modality} was seen in training')
        return self.film_mlp(self.mod_sum[index] / self.mod_weight[index, None], index)

    def translate(self, x, source, target):
        """x (B,1,D,H,W) of modality `source` -> x_hat (B,1,D,H,W) in the contrast of `target`; no target scan is needed."""
        if not self.config.film:
            raise ValueError('a model trained with film=False has no modality to swap')
        self.modality_index(source, x)
        return self.from_tokens(self.tokens(x), target)

    def reconstruct(self, x, modality=None):
        """x (B,1,D,H,W) -> x_hat (B,1,D,H,W), not clamped. modality is needed when the model has FiLM."""
        z_anat, z_mod = self.encode(x)
        return self.decode(
            self.quantizer.lookup(self.quantizer.nearest_indices(z_anat)), self.film(z_mod, modality)
        )

    def posterior(self, x):
        """x (B,1,D,H,W) -> what a flow models: z_anat before quantisation (B,Ca,d,h,w), and None for its log-variance."""
        return self.encode(x)[0], None

    def from_latent(self, z, modality):
        """A generated z_anat (B,Ca,d,h,w), quantised, in the contrast of a modality -> x_hat (B,1,D,H,W)."""
        return self.from_tokens(self.quantizer.nearest_indices(z), modality)

    def latent(self, x, modality=None):
        """Frozen features for probes: (z_q, z_mod) as (B, Ca + Cm, d, h, w)."""
        z_anat, z_mod = self.encode(x)
        return torch.cat([self.quantizer.lookup(self.quantizer.nearest_indices(z_anat)), z_mod.float()], 1)

    def analyse(self, x, modality=None):
        """Everything about x (B,1,D,H,W) from one encoding and one decoding, each entry as its own method gives it.

        returns dict: latent, mean and logvar (posterior), tokens, x_hat (reconstruct), z_q, and z_mod, None without FiLM
        """
        z_anat, z_mod = self.encode(x)
        tokens = self.quantizer.nearest_indices(z_anat)
        z_q = self.quantizer.lookup(tokens)
        x_hat = self.decode(z_q, self.film(z_mod, modality))
        latent = torch.cat([z_q, z_mod.float()], 1)
        if not self.config.film:
            z_mod = None
        return dict(latent=latent, mean=z_anat, logvar=None, tokens=tokens, x_hat=x_hat, z_q=z_q, z_mod=z_mod)

    def latent_shape(self, shape):
        """(D,H,W) of a volume -> (anat_dim, d, h, w)."""
        return (self.config.anat_dim, *[n // 16 for n in shape])

    def bits_per_volume(self, shape):
        """Bits of the codes of a (D,H,W) volume: 972 log2 K at 144x192x144. The modality vector comes on top: style_bits()."""
        return (
            math.prod(n // 16 for n in shape) * self.config.num_codebooks * math.log2(self.config.num_codes)
        )

    def style_bits(self):
        """Bits of GAP(z_mod), all that the decoder gets of a scan beside its codes, at 16 bits a number."""
        return 16 * self.config.mod_dim if self.config.film else 0

# ---------------------------------------------------------------- ConvVAE

@dataclass
class ConvVAEConfig:
    """Defaults: MAISI's autoencoder (arXiv:2409.11169), which DeCo-VAE trains anew: 20,944,897 parameters, 4x per axis."""
    dims: int = 3                    # 3: volumes; 2: slices, and volumes slice by slice
    in_channels: int = 1
    widths: tuple = (64, 128, 256)   # channels per level; every level but the last halves the size
    res_blocks: int = 2              # per level
    # 'maisi': trilinear x2, no SiLU before the last convolution of either half; 'sd': nearest x2,
    layout: str = 'maisi'
                                     # that SiLU, attention between two
                                     # blocks in the middle, one more
                                     # block per decoder level
    latent_dim: int = 4
    bottleneck: str = 'kl'           # 'kl' or 'vq'
    quantizer: str = 'ema'           # this and the next five: of bottleneck='vq', as in NeuroQuantConfig
    num_codes: int = 4096
    num_codebooks: int = 1
    codebooks: str = 'residual'
    code_decay: float = 0.99
    revive: float = 0.1
    slice_axis: int = 2              # of dims=2: volumes are cut across this axis, 2 for axial slices
    signed: bool = False             # the network itself works in [-1, 1], as Stable Diffusion's weights do

def group_norm(channels):
    """MAISI's: 32 groups, or the largest power of 2 that divides fewer or odd channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)

def make_conv(dims, *args, **kwargs):
    return (nn.Conv2d if dims == 2 else Conv3d)(*args, **kwargs)

def slabwise(fn, x, size, up=1, down=1, halo=1):
    """fn(x) slab by slab along D, equal to fn(x) for an fn that changes D by up/down and reaches `halo` coarse voxels far.

    x (B,C,D,H,W) may lie elsewhere than the weights of fn, which has to move a slab to them; the result lies where x does.
    size: coarse voxels per slab.
    """
    n, y = x.shape[2] // down, None
    for a in range(0, n, size):
        b, lo, hi = min(a + size, n), max(a - halo, 0), min(a + size + halo, n)
        part = fn(x[:, :, lo * down:hi * down])[:, :, (a - lo) * up:(b - lo) * up]
        if y is None:
            y = part.new_empty(*part.shape[:2], n * up, *part.shape[3:], device=x.device)
        y[:, :, a * up:b * up] = part
    return y

def slab_norm(norm, x, size):
    """Group norm as a function of slabs of x, with the statistics of all of x, gathered slab by slab in float32."""
    groups = lambda: (
        s.to(norm.weight.device).float().reshape(len(x), norm.num_groups, -1) for s in x.split(size, 2)
    )
    n = x[0].numel() // norm.num_groups
    mean = sum(g.sum(2) for g in groups()) / n
    var = sum((g - mean[..., None]).square().sum(2) for g in groups()) / n
    spread = lambda t: t.repeat_interleave(x.shape[1] // norm.num_groups, 1)  # per group -> per channel
    scale = spread((var + norm.eps).rsqrt()) * norm.weight
    shift = norm.bias - spread(mean) * scale
    return lambda s: torch.addcmul(
        shift[:, :, None, None, None], s.to(scale.device).float(), scale[:, :, None, None, None]
    )

class ConvLayer(nn.Module):
    """3-wide convolution at the same size, after doubling (up='nearest' or 'linear') or to half the size (down=True).

    Halving pads one zero on the far side of each axis only.
    """
    def __init__(self, dims, c_in, c_out, up='', down=False):
        super().__init__()
        self.up = {'': '', 'nearest': 'nearest', 'linear': 'bilinear' if dims == 2 else 'trilinear'}[up]
        self.far_side = (0, 1) * dims if down else None
        self.conv = make_conv(dims, c_in, c_out, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode=self.up)
        if self.far_side:
            x = F.pad(x, self.far_side)
        return self.conv(x)

    def slabs(self, x, size):
        fn = lambda s: self(s.to(self.conv.weight.device))
        if self.up: return slabwise(fn, x, size, up=2, halo=2)
        return slabwise(fn, x, size, down=2) if self.far_side else slabwise(fn, x, size)

class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); a 1-wide convolution on the skip where the channels change."""
    def __init__(self, dims, c_in, c_out):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1 = make_conv(dims, c_in, c_out, 3, padding=1)
        self.conv2 = make_conv(dims, c_out, c_out, 3, padding=1)
        self.skip = make_conv(dims, c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))

    def slabs(self, x, size):
        norm = slab_norm(self.norm1, x, size)
        h = slabwise(lambda s: self.conv1(F.silu(norm(s))), x, size)
        norm = slab_norm(self.norm2, h, size)
        h = slabwise(lambda s: self.conv2(F.silu(norm(s))), h, size)
        for a, b in zip(h.split(size, 2), x.split(size, 2)):
            a += self.skip(b.to(self.conv1.weight.device)).to(a.device)
        return h

class Attention(nn.Module):
    """Self-attention over all positions of x (B, C, *grid), residual, group norm first; head_width None is one head."""
    def __init__(self, channels, head_width=None):
        super().__init__()
        self.heads = channels // (head_width or channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x):
        B, C = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).view(B, -1, 3, self.heads, C // self.heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, N, C/heads)
        return x + self.proj(y.transpose(1, 2).reshape(B, -1, C)).transpose(1, 2).view_as(x)

    def slabs(self, x, size):
        return self(x.to(self.proj.weight.device)).to(x.device)

class NormAct(nn.Module):
    """Group norm, with a SiLU if act."""
    def __init__(self, channels, act):
        super().__init__()
        self.norm, self.act = group_norm(channels), act

    def forward(self, x):
        return F.silu(self.norm(x)) if self.act else self.norm(x)

    def slabs(self, x, size):
        norm = slab_norm(self.norm, x, size)
        return slabwise(lambda s: F.silu(norm(s)) if self.act else norm(s), x, size, halo=0)

class Stack(nn.Module):
    """Blocks one after the other; with slab > 0 each runs slab by slab along D, to the same result with little memory.

    Group norm sees the whole volume either way, so nothing is blended and no seam can show. slab: voxels of the coarser side
    per slab. x may then lie on the CPU while the weights are on the GPU: activations stay with x, one slab at a time travels.
    """
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = False  # in training, keep only what lies between blocks

    def forward(self, x, slab=0):
        for block in self.blocks:
            if slab:
                x = block.slabs(x, slab)
            else:
                x = (
                    checkpoint(block, x, use_reentrant=False)
                    if self.checkpointing and self.training
                    else block(x)
                )
        return x

def conv_encoder(c, out):
    """x (B, in_channels, *size) -> (B, out, *size / 2^(levels-1))."""
    blocks = [ConvLayer(c.dims, c.in_channels, c.widths[0])]
    for i, (a, b) in enumerate(zip((c.widths[0], *c.widths), c.widths)):
        if i > 0:
            blocks.append(ConvLayer(c.dims, a, a, down=True))
        blocks += [ResBlock(c.dims, a if k == 0 else b, b) for k in range(c.res_blocks)]
    return Stack([*blocks, *middle(c), NormAct(b, c.layout == 'sd'), ConvLayer(c.dims, b, out)])

def conv_decoder(c):
    """z (B, latent_dim, *grid) -> (B, in_channels, *grid * 2^(levels-1)), linear output."""
    widths = c.widths[::-1]
    blocks = [ConvLayer(c.dims, c.latent_dim, widths[0]), *middle(c)]
    for i, (a, b) in enumerate(zip((widths[0], *widths), widths)):
        if i > 0:
            blocks.append(ConvLayer(c.dims, a, a, up='nearest' if c.layout == 'sd' else 'linear'))
        blocks += [ResBlock(c.dims, a if k == 0 else b, b) for k in range(c.res_blocks + (c.layout == 'sd'))]
    return Stack([*blocks, NormAct(b, c.layout == 'sd'), ConvLayer(c.dims, b, c.in_channels)])

def middle(c):
    w = c.widths[-1]
    return [ResBlock(c.dims, w, w), Attention(w), ResBlock(c.dims, w, w)] if c.layout == 'sd' else []

class ConvVAE(nn.Module):
    """Convolutional autoencoder with a KL or a VQ bottleneck, for volumes or slices: MAISI, DeCo-VAE, SD-VAE, VQGAN, ... by config.

    encode, decode and forward take x (B, C, *size) with every axis a multiple of `factor`: D,H,W for dims=3, two axes for dims=2
    (or three, one of them of length 1). reconstruct and latent take volumes (B,1,D,H,W) of any size.
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        for key, allowed in (
            ('dims', (2, 3)),
            ('layout', ('maisi', 'sd')),
            ('bottleneck', ('kl', 'vq')),
            ('slice_axis', (0, 1, 2)),
        ):
            if getattr(c, key) not in allowed:
                raise ValueError(f'{key}={getattr(c, key)!r}: one of {allowed}')
        self.factor = 2 ** (len(c.widths) - 1)
        head = c.latent_dim * (2 if c.layout == 'sd' and c.bottleneck == 'kl' else 1)
        self.encoder, self.decoder = conv_encoder(c, head), conv_decoder(c)
        self.mu_head = make_conv(c.dims, head, c.latent_dim, 1)
        self.post = make_conv(c.dims, c.latent_dim, c.latent_dim, 1)
        if c.bottleneck == 'kl':
            self.logvar_head = make_conv(c.dims, head, c.latent_dim, 1)
            # near 0, as in MAISI, noise drowns a new encoder's code
            nn.init.constant_(self.logvar_head.bias, -5.0)
        else:
            self.quantizer = make_quantizer(
                c.num_codes, c.latent_dim, c.code_decay, c.revive, c.num_codebooks, c.codebooks, c.quantizer
            )

    def check_size(self, shape):
        """ValueError unless every axis of what encode() takes is a multiple of factor (one axis may be 1 if dims is 2)."""
        if any(n % self.factor for n in shape if n != 1 or self.config.dims == 3):
            raise ValueError(f'size {tuple(shape)}: each axis must be a multiple of {self.factor}; pad first')

    def encode(self, x, slab=0):
        """x (B,C,*size) -> mu, logvar (B,latent_dim,*grid), logvar within [-30, 20]; for 'vq', the unquantised latent and None."""
        self.check_size(x.shape[2:])
        h = self.encoder(x, slab).to(self.post.weight.device)
        return self.mu_head(h), self.logvar_head(h).clamp(-30, 20) if self.config.bottleneck == 'kl' else None

    def decode(self, z, slab=0):
        """z (B,latent_dim,*grid) -> x_hat (B,C,*size), not clamped."""
        return self.decoder(self.post(z), slab)

    def forward(self, x, generators=None):
        """returns dict: x_hat like x; for 'kl' mu, logvar and z = mu + exp(logvar/2) eps; for 'vq' z, z_q, indices and commit.

        generators: one torch.Generator per sample for eps, so that a sample's noise does not depend on its batch; None: torch's own.
        """
        axis = missing_axis(x) if self.config.dims == 2 and x.ndim == 5 else None
        if axis is not None:
            x = x.squeeze(2 + axis)
        mu, logvar = self.encode(x)
        if logvar is None:
            z_q, indices, commit = self.quantizer(mu)
            out = dict(z=mu, z_q=z_q, indices=indices, commit=commit, x_hat=self.decode(z_q))
        else:
            if generators is None:
                eps = torch.randn_like(mu)
            else:
                eps = torch.stack(
                    [torch.randn(mu.shape[1:], generator=g, device=g.device) for g in generators]
                ).to(mu)
            z = mu + eps * torch.exp(0.5 * logvar)
            out = dict(z=z, mu=mu, logvar=logvar, x_hat=self.decode(z))
        if axis is not None:
            out['x_hat'] = out['x_hat'].unsqueeze(2 + axis)
        return out

    def prepare(self, volume):
        """(B,1,D,H,W) -> what encode takes: zero-padded at the far ends to multiples of factor, cut into slices if dims is 2."""
        axes = [a for a in range(3) if self.config.dims == 3 or a != self.config.slice_axis]
        pad = [-n % self.factor if a in axes else 0 for a, n in enumerate(volume.shape[2:])]
        x = F.pad(volume, [p for n in reversed(pad) for p in (0, n)])
        x = self.cut(2 * x - 1 if self.config.signed else x)
        return x.expand(-1, self.config.in_channels, *x.shape[2:])

    def cut(self, volume):
        """(B, ..., *grid) -> (B*n, ..., h, w), its slices, if dims is 2; volumes as they are."""
        if self.config.dims == 3: return volume
        return volume.movedim(self.config.slice_axis - 3, 1).flatten(0, 1)

    def stack(self, slices, batch):
        """The way back: (batch*n, ..., h, w) slices -> (batch, ..., *grid)."""
        if self.config.dims == 3: return slices
        return slices.unflatten(0, (batch, -1)).movedim(1, self.config.slice_axis - 3)

    def parts(self, x):
        """Slices a few at a time, so that a volume of them needs no more memory than a training batch."""
        return x.split(16) if self.config.dims == 2 else [x]

    def posterior(self, x, slab=0):
        """Volume (B,1,D,H,W) of any size -> mean and log-variance (B,latent_dim,d,h,w); for 'vq' the unquantised latent and None."""
        found = [self.encode(part, slab) for part in self.parts(self.prepare(x))]
        mu, logvar = (self.stack(torch.cat(t), len(x)) if t[0] is not None else None for t in zip(*found))
        return mu, logvar

    def latent(self, x, modality=None, slab=0):
        """Volume (B,1,D,H,W) -> (B,latent_dim,d,h,w): mu, or the quantised latent. dims=2 keeps the slice axis whole."""
        z = self.posterior(x, slab)[0]
        return z if self.config.bottleneck == 'kl' else self.quantized(z)

    def quantized(self, z):
        """Volume of latents (B,latent_dim,d,h,w) -> the same of codes."""
        return self.codes_of(self.tokens_of(z))

    def tokens_of(self, z):
        """Volume of latents (B,latent_dim,d,h,w) -> indices of the nearest codes, as tokens() gives them."""
        indices = [self.quantizer.nearest_indices(part) for part in self.parts(self.cut(z))]
        return self.stack(torch.cat(indices), len(z))

    def codes_of(self, indices):
        """Indices as tokens() gives them -> volume of codes (B,latent_dim,d,h,w)."""
        return self.stack(self.quantizer.lookup(self.cut(indices)), len(indices))

    def from_latent(self, z, modality=None):
        """A generated latent (B,latent_dim,d,h,w) -> x_hat (B,1,D,H,W) at the padded size; modality is not used."""
        return self.decode_volume(z if self.config.bottleneck == 'kl' else self.quantized(z))

    def tokens(self, x):
        """Volume (B,1,D,H,W) -> indices (B,*grid), with several codebooks (B,num_codebooks,*grid). ValueError for 'kl'."""
        if self.config.bottleneck == 'kl':
            raise ValueError("an autoencoder with bottleneck='kl' has no tokens")
        return self.tokens_of(self.posterior(x)[0])

    def from_tokens(self, indices, modality=None):
        """indices as tokens() gives them -> x_hat (B,1,D,H,W) at the padded size; modality is not used."""
        return self.decode_volume(self.codes_of(indices))

    def decode_volume(self, z, slab=0):
        """Latent (B,latent_dim,d,h,w) as latent() gives it -> (B,1,D,H,W) at the padded size."""
        x_hat = torch.cat([self.decode(part, slab).mean(1, keepdim=True) for part in self.parts(self.cut(z))])
        return self.stack((x_hat + 1) / 2 if self.config.signed else x_hat, len(z))

    def reconstruct(self, x, modality=None, slab=0):
        """Volume (B,1,D,H,W) of any size -> x_hat of that size, decoded from mu or the codes, not clamped. slab: see Stack."""
        x_hat = self.decode_volume(self.latent(x, slab=slab), slab)
        return x_hat[:, :, :x.shape[2], :x.shape[3], :x.shape[4]]

    def analyse(self, x, modality=None):
        """Everything about x (B,1,D,H,W) from one encoding and one decoding, each entry as its own method gives it.

        returns dict: latent, mean and logvar (posterior), tokens (None for 'kl'), x_hat (reconstruct)
        """
        mean, logvar = self.posterior(x)
        tokens, latent = None, mean
        if self.config.bottleneck == 'vq':
            tokens = self.tokens_of(mean)
            latent = self.codes_of(tokens)
        x_hat = self.decode_volume(latent)[:, :, :x.shape[2], :x.shape[3], :x.shape[4]]
        return dict(latent=latent, mean=mean, logvar=logvar, tokens=tokens, x_hat=x_hat)

    def latent_shape(self, shape):
        """(D,H,W) of a volume -> (latent_dim, d, h, w)."""
        whole = self.config.slice_axis if self.config.dims == 2 else None
        return (
            self.config.latent_dim,
            *[n if a == whole else -(-n // self.factor) for a, n in enumerate(shape)],
        )

    def bits_per_volume(self, shape):
        """Bits of the latent of a (D,H,W) volume: 16 per number for 'kl', log2(num_codes) per code for 'vq'."""
        c, (channels, *grid) = self.config, self.latent_shape(shape)
        return math.prod(grid) * (
            16 * channels if c.bottleneck == 'kl' else c.num_codebooks * math.log2(c.num_codes)
        )

    def style_bits(self):
        """Nothing is coded beside the latent."""
        return 0

# ---------------------------------------------------------------- FlowUNet

@dataclass
class FlowUNetConfig:
    """Defaults: MAISI's U-Net without conditions, 178,566,276 parameters; DeCo-VAE's paper states none."""
    in_channels: int = 4
    widths: tuple = (64, 128, 256, 512)          # per level; every level but the last halves the size
    res_blocks: int = 2                          # per level on the way down; one more on the way up
    attention: tuple = (False, False, True, True)
    head_width: int = 32
    # rows of an embedding per class condition, the last row for "not known"
    classes: tuple = ()
    # length of each condition vector; MAISI's (3,) is the voxel size in units of 10 um
    vectors: tuple = ()

class TimeResBlock(nn.Module):
    """skip(x) + conv(SiLU(norm(conv(SiLU(norm(x))) + linear(SiLU(emb))))); resample 'up' or 'down' changes both branches first."""
    def __init__(self, c_in, c_out, c_emb, resample=''):
        super().__init__()
        self.resample = resample
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1 = Conv3d(c_in, c_out, 3, padding=1)
        self.conv2 = Conv3d(c_out, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, c_out)
        self.skip = Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb, size=None):
        """size: of the result, for 'up', which may be one less than twice the input's where a level was odd."""
        h = F.silu(self.norm1(x))
        if self.resample == 'down':
            x, h = (F.avg_pool3d(t, [min(2, n) for n in t.shape[2:]], ceil_mode=True) for t in (x, h))
        if self.resample == 'up':
            x, h = (F.interpolate(t, size=size, mode='nearest') for t in (x, h))
        h = self.conv1(h) + self.emb(F.silu(emb))[:, :, None, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))

class UNetLevel(nn.Module):
    """Residual blocks, each with attention if asked, and perhaps a resampling block after them."""
    def __init__(self, c_ins, c_out, c_emb, attention, head_width, resample=''):
        super().__init__()
        self.blocks = nn.ModuleList(TimeResBlock(c, c_out, c_emb) for c in c_ins)
        self.attentions = nn.ModuleList(
            Attention(c_out, head_width) if attention else nn.Identity() for _ in c_ins
        )
        self.resampler = TimeResBlock(c_out, c_out, c_emb, resample) if resample else None

class FlowUNet(nn.Module):
    """Velocity of a flow on latents: x_t (B,C,d,h,w), t (B,) in [0,1], 0 = noise, 1 = data -> v (B,C,d,h,w), DeCo eq. 2.

    cond, a dict: 'classes' (B, len(config.classes)) int64, 'vectors' a list of (B, n) float; None, or a key left out, is "not
    known": the last class, vectors of 0. Inside, time runs as in MAISI's weights: 1000 (1 - t), so that 1000 is noise.
    Buffers latent_mean, latent_sd (C,): the autoencoder's latents are x_1 latent_sd + latent_mean, see normalise().
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if len(c.attention) != len(c.widths):
            raise ValueError(f'attention {c.attention}: one value for each of widths {c.widths}')
        w, n = c.widths, 4 * c.widths[0]
        mlp = lambda c_in: nn.Sequential(nn.Linear(c_in, n), nn.SiLU(), nn.Linear(n, n))
        self.time = mlp(w[0])
        self.class_embeddings = nn.ModuleList(nn.Embedding(rows, n) for rows in c.classes)
        self.vector_mlps = nn.ModuleList(mlp(length) for length in c.vectors)
        c_emb, last = n * (1 + len(c.vectors)), len(w) - 1
        self.conv_in = Conv3d(c.in_channels, w[0], 3, padding=1)
        self.down = nn.ModuleList(
            UNetLevel(
                [w[max(i - 1, 0)]] + [w[i]] * (c.res_blocks - 1),
                w[i],
                c_emb,
                c.attention[i],
                c.head_width,
                'down' if i < last else '',
            )
            for i in range(len(w))
        )
        self.middle = nn.ModuleList([
            TimeResBlock(w[-1], w[-1], c_emb),
            Attention(w[-1], c.head_width),
            TimeResBlock(w[-1], w[-1], c_emb),
        ])
        self.up = nn.ModuleList()
        # inputs: what comes from below beside the skips of this level and one of the level above
        for i in range(last, -1, -1):
            below, skips = [w[min(i + 1, last)]] + [w[i]] * c.res_blocks, [w[i]] * c.res_blocks + [
                w[max(i - 1, 0)]
            ]
            self.up.append(
                UNetLevel(
                    [a + b for a, b in zip(below, skips)],
                    w[i],
                    c_emb,
                    c.attention[i],
                    c.head_width,
                    'up' if i else '',
                )
            )
        self.norm_out = group_norm(w[0])
        self.conv_out = Conv3d(w[0], c.in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.register_buffer('latent_mean', torch.zeros(c.in_channels))
        self.register_buffer('latent_sd', torch.ones(c.in_channels))

    def normalise(self, z):
        """An autoencoder's latent (B,C,d,h,w) -> x_1 of the flow, of mean 0 and variance 1 over the training set."""
        return (z - self.latent_mean[:, None, None, None]) / self.latent_sd[:, None, None, None]

    def denormalise(self, x):
        """The way back, for the decoder."""
        return x * self.latent_sd[:, None, None, None] + self.latent_mean[:, None, None, None]

    def embed(self, t, cond):
        """(B,) and conditions -> (B, 4 widths[0] (1 + vectors)): sines of time, plus classes, beside vectors."""
        half = self.config.widths[0] // 2
        angle = (
            1000
            * (1 - t.float())[:, None]
            * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        )
        emb, cond = self.time(torch.cat([angle.cos(), angle.sin()], 1)), cond or {}
        for k, table in enumerate(self.class_embeddings):
            chosen = (
                cond['classes'][:, k]
                if 'classes' in cond
                else torch.full_like(t, table.num_embeddings - 1, dtype=torch.int64)
            )
            emb = emb + table(chosen)
        vectors = cond.get('vectors') or [emb.new_zeros(len(t), length) for length in self.config.vectors]
        return torch.cat([emb, *[mlp(v.to(emb.dtype)) for mlp, v in zip(self.vector_mlps, vectors)]], 1)

    def forward(self, x_t, t, cond=None):
        emb, h = self.embed(t, cond), self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions):
                skips.append(h := attention(block(h, emb)))
            if level.resampler:
                skips.append(h := level.resampler(h, emb))
        first, attention, second = self.middle
        h = second(attention(first(h, emb)), emb)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(torch.cat([h, skips.pop()], 1), emb))
            if level.resampler:
                h = level.resampler(h, emb, size=skips[-1].shape[2:])
        return self.conv_out(F.silu(self.norm_out(h)))

# ---------------------------------------------------------------- cost and checkpoints

def step_flops(model, shape):
    """FLOP (2 per multiply-add) to encode and to decode one (D,H,W) volume or slice, forward, counted on a weightless copy."""
    with torch.device('meta'):
        twin = type(model)(model.config).eval()
    size = [n for n in shape if n != 1] if getattr(model.config, 'dims', 3) == 2 else shape
    x = torch.empty(1, getattr(model.config, 'in_channels', 1), *size, device='meta')
    with FlopCounterMode(display=False) as encoding:
        z, z_mod = twin.encode(x)
    film = [twin.film(z_mod, 0)] if isinstance(twin, NeuroQuant) else []
    with FlopCounterMode(display=False) as decoding:
        twin.decode(z, *film)
    return encoding.get_total_flops(), decoding.get_total_flops()

def unet_flops(model, shape):
    """FLOP of one forward pass of a FlowUNet on a (C,d,h,w) latent."""
    with torch.device('meta'):
        twin = FlowUNet(model.config)
        with FlopCounterMode(display=False) as counter:
            twin(torch.empty(1, *shape), torch.empty(1))
    return counter.get_total_flops()

KINDS = {'neuroquant': (NeuroQuant, NeuroQuantConfig), 'convvae': (ConvVAE, ConvVAEConfig),
         'flowunet': (FlowUNet, FlowUNetConfig)}

def encoder_hash(model):
    """16 hex digits that name an autoencoder's encoder and codebook: equal for two that differ in the decoder alone."""
    digest = hashlib.sha256(repr(sorted(model_args(model).items())).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith(('decoder.', 'post.', 'film', 'mod_')):
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]

def model_args(model):
    """Everything needed to build the model again: its kind and every field of its config."""
    kind = next(kind for kind, (cls, _) in KINDS.items() if isinstance(model, cls))
    return {'kind': kind} | asdict(model.config)

def from_checkpoint(checkpoint, average=True):
    """The model of a checkpoint dict, in eval mode, with its averaged weights if it has them."""
    args = dict(checkpoint['model_args'])
    cls, config = KINDS[args.pop('kind')]
    model = cls(config(**args))
    model.load_state_dict(checkpoint['ema'] if average and checkpoint.get('ema') else checkpoint['model'])
    return model.eval()
