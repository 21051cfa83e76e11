"""The networks. NeuroQuant: one 3D encoder, two latent streams, a shared codebook of anatomy, a decoder driven by modality.

Shapes: x (B, 1, D, H, W) in [0, 1], background exactly 0, RAS+ at 1 mm, axes (left-right, posterior-anterior, inferior-superior);
latents (B, C, d, h, w) at 1/16 of the size. An axis of length 1 makes x a batch of slices and names the missing axis: layers
read the plane from the shape, so volumes and slices share one set of weights and no flag is passed.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from quantize import VectorQuantizer, sum_over_ranks

# ---------------------------------------------------------------- building blocks

def missing_axis(x):
    """The one spatial axis (0, 1, 2) of length 1 of x (B, C, D, H, W), or None for a volume. ValueError for two of them."""
    ones = [axis for axis, n in enumerate(x.shape[2:]) if n == 1]
    if len(ones) > 1: raise ValueError(f'{tuple(x.shape)} has {len(ones)} axes of length 1: a slice has one, a volume none')
    return ones[0] if ones else None

class Conv(nn.Conv3d):
    """Zero-padded 3D convolution; on a slice, the 2D convolution whose kernel is summed over the missing axis.

    The sum gives a slice what an inner slice of a volume constant along that axis would get, so activations keep their scale
    ("kernels are adjusted along the selected plane", NeuroQuant 3.5). Stride and padding along the missing axis are 1 and none.
    """
    def forward(self, x):
        axis = missing_axis(x)
        if axis is None: return super().forward(x)
        y = F.conv2d(x.squeeze(2 + axis), self.weight.sum(2 + axis), self.bias, self.stride[0], self.padding[0])
        return y.unsqueeze(2 + axis)

def halve(x):
    """Mean over 2x2x2 voxels; along an axis of length 1 nothing happens."""
    return F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]])

def double(x, mode='nearest'):
    """x2 by 'nearest' or 'trilinear' interpolation; along an axis of length 1 nothing happens."""
    return F.interpolate(x, size=[n if n == 1 else 2 * n for n in x.shape[2:]], mode=mode)

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
        if x.shape[2 + self.axis] == 1: return x
        h = self.norm(x.movedim(1, -1)).movedim(1 + self.axis, 3)      # (B, ., ., L, C)
        B, M, N, L, C = h.shape
        qkv = self.qkv(h).view(B * M * N, L, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # three of (B*M*N, heads, L, C/heads)
        y = torch.cat([F.scaled_dot_product_attention(*rows)           # CUDA kernels take at most 65535 rows
                       for rows in zip(q.split(65535), k.split(65535), v.split(65535))])
        y = self.proj(y.transpose(1, 2).reshape(B, M, N, L, C))
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
    film: bool = True                   # modality stream and FiLM (M-FiLM); without it, a plain VQ-VAE
    anat_dim: int = 64                  # channels of z_anat and of a code
    mod_dim: int = 32                   # channels of z_mod
    modality_dim: int = 32              # channels of the learned vector s_m of each modality
    num_codes: int = 4096
    code_decay: float = 0.99            # EMA of the codebook
    revive: float = 0.1                 # codes used less than this fraction of the mean use are replaced

class Encoder(nn.Module):
    """x (B, 1, D, H, W) -> F_4 (B, C4, D/16, H/16, W/16): a stem at full size and four blocks, NeuroQuant 3.2."""
    def __init__(self, c):
        super().__init__()
        channels = (c.widths[0] // 2, *c.widths)  # half the width at full size, where memory is dear
        self.stem = Conv(1, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(a, b, c.res_blocks, c.attention) for a, b in zip(channels, channels[1:]))

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks: h = block(h)
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
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(c.mod_dim + c.modality_dim, 256), nn.SiLU(), nn.Linear(256, 256),
                                                nn.SiLU(), nn.Linear(256, 2 * channels)) for channels in layers)
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
        if gamma is not None: h = gamma[:, :, None, None, None] * h + beta[:, :, None, None, None]
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
        self.blocks = nn.ModuleList(DecoderBlock(a, b, c.res_blocks, c.attention and i < 4, up=i > 0)
                                    for i, (a, b) in enumerate(pairs))
        self.heads = nn.ModuleList(Conv(channels, 1, 3, padding=1) for channels in self.channels)
        self.checkpointing = False

    def forward(self, z_q, film):
        h, x_hat = z_q, None
        for i, (block, head) in enumerate(zip(self.blocks, self.heads)):
            args = film[i] if film else ()
            if self.checkpointing and self.training and i >= 3: h = checkpoint(block, h, *args, use_reentrant=False)
            else: h = block(h, *args)
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
        c = self.config = config
        if len(c.widths) != 4 or any(w < 8 or w % 8 for w in c.widths):
            raise ValueError(f'widths {c.widths}: four are needed, each a multiple of 8')
        if not c.modalities: raise ValueError('modalities is empty: name at least one, such as T1w')
        self.encoder = Encoder(c)
        self.anat_head = nn.Sequential(nn.SiLU(), Conv(c.widths[-1], c.anat_dim, 3, padding=1))
        self.quantizer = VectorQuantizer(c.num_codes, c.anat_dim, c.code_decay, revive=c.revive)
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
            raise ValueError(f'size {tuple(shape)}: each axis must be a multiple of 16, at least 32 (one may be 1: slices); pad first')

    def encode(self, x, modality=None):
        """x (B,1,D,H,W) -> z_anat (B,Ca,d,h,w), z_mod (B,Cm,d,h,w), NeuroQuant eq. 1 and 4; Cm = 0 without FiLM.

        modality is not used: one encoder serves all. Raises ValueError for sizes that check_size refuses.
        """
        if x.ndim != 5 or x.shape[1] != 1: raise ValueError(f'x must be (B,1,D,H,W), got {tuple(x.shape)}')
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
        if self.training and volumes and self.config.film: self.update_modality_means(z_mod, modality)
        out = dict(z_anat=z_anat, z_mod=z_mod, z_q=z_q, indices=indices, commit=commit)
        if pairs is None: return out | dict(x_hat=self.decode(z_q, film))
        source, target = pairs.unbind(1)
        both = self.decode(torch.cat([z_q, z_q[source]]), [(torch.cat([g, g[target]]), torch.cat([b, b[target]])) for g, b in film])
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
                raise ValueError(f"modality '{modality}': this model knows {', '.join(self.config.modalities)}")
            modality = self.config.modalities.index(modality)
        if modality is None: raise ValueError(f"this model needs the modality of x, one of {', '.join(self.config.modalities)}")
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
        if (self.mod_weight[index] == 0).any(): raise ValueError(f'no volume of modality {modality} was seen in training')
        return self.film_mlp(self.mod_sum[index] / self.mod_weight[index, None], index)

    def translate(self, x, source, target):
        """x (B,1,D,H,W) of modality `source` -> x_hat (B,1,D,H,W) in the contrast of `target`; no target scan is needed."""
        if not self.config.film: raise ValueError('a model trained with film=False has no modality to swap')
        self.modality_index(source, x)
        return self.from_tokens(self.tokens(x), target)

    def reconstruct(self, x, modality=None):
        """x (B,1,D,H,W) -> x_hat (B,1,D,H,W), not clamped. modality is needed when the model has FiLM."""
        z_anat, z_mod = self.encode(x)
        return self.decode(self.quantizer.lookup(self.quantizer.nearest_indices(z_anat)), self.film(z_mod, modality))

    def latent(self, x, modality=None):
        """Frozen features for probes: (z_q, z_mod) as (B, Ca + Cm, d, h, w)."""
        z_anat, z_mod = self.encode(x)
        return torch.cat([self.quantizer.lookup(self.quantizer.nearest_indices(z_anat)), z_mod.float()], 1)

    def bits_per_volume(self, shape):
        """Bits of the codes of a (D,H,W) volume: 972 log2 K at 144x192x144. The modality vector comes on top: style_bits()."""
        return math.prod(n // 16 for n in shape) * math.log2(self.config.num_codes)

    def style_bits(self):
        """Bits of GAP(z_mod), all that the decoder gets of a scan beside its codes, at 16 bits a number."""
        return 16 * self.config.mod_dim if self.config.film else 0

# ---------------------------------------------------------------- cost and checkpoints

def step_flops(model, shape):
    """FLOP (2 per multiply-add) to encode and to decode one (D,H,W) volume or slice, forward, counted on a weightless copy."""
    with torch.device('meta'): twin = type(model)(model.config).eval()
    x = torch.empty(1, 1, *shape, device='meta')
    with FlopCounterMode(display=False) as encoding: z_anat, z_mod = twin.encode(x)
    with FlopCounterMode(display=False) as decoding: twin.decode(z_anat, twin.film(z_mod, 0))
    return encoding.get_total_flops(), decoding.get_total_flops()

KINDS = {'neuroquant': (NeuroQuant, NeuroQuantConfig)}

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
