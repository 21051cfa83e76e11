"""The networks: NeuroQuant, ConvVAE (MAISI, DeCo-VAE, SD-VAE, VQGAN by config), FlowUNet and GPT.

Shapes: x (B, 1, D, H, W) in [0, 1], background exactly 0, RAS+ at 1 mm, axes (left-right, posterior-anterior,
inferior-superior); latents (B, C, d, h, w). An axis of length 1 makes x a batch of slices and names the
missing axis. NeuroQuant reads the plane from the shape: volumes and slices share one set of weights.
"""
import hashlib
import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import (
    CONV, NORM, Attention, AxialAttention, Conv, Conv3d, ConvLayer, NormAct, ResBlock, ResConv, Stack,
    depth_to_space, double, group_norm, halve, missing_axis, run, space_to_depth, zeroed)
from quantize import QuantizerConfig, move_or_hold, sum_over_ranks

# ---------------------------------------------------------------- what autoencoders share

class Autoencoder(nn.Module):
    """What NeuroQuant and ConvVAE offer for volumes x (B,1,D,H,W). NeuroQuant with FiLM needs the modality.

    encoding(x) -> dict: latent, what probes see; mean and logvar, what a flow models (only 'kl' has a logvar,
    others None); tokens, indices of codes ('kl' has None).
    analyse(x, modality) -> the same and x_hat, not clamped, from one encoding and one decoding.
    latent_shape: (D,H,W) of a volume -> (C, d, h, w).
    """
    def posterior(self, x):
        out = self.encoding(x)
        return out['mean'], out['logvar']

    def latent(self, x, modality=None):
        return self.encoding(x)['latent']

    def tokens(self, x):
        tokens = self.encoding(x)['tokens']
        if tokens is None: raise ValueError("an autoencoder with bottleneck='kl' has no tokens")
        return tokens

    def reconstruct(self, x, modality=None):
        return self.analyse(x, modality)['x_hat']

    def from_latent(self, z, modality=None):
        """A generated latent as posterior() gives it -> x_hat."""
        return self.from_tokens(self.quantizer.nearest_indices(z), modality)

    def bits_per_volume(self, shape):
        """Bits of the codes of a (D,H,W) volume: 972 log2 K for NeuroQuant at 144x192x144."""
        positions = math.prod(self.latent_shape(shape)[1:])
        return positions * self.config.num_codebooks * math.log2(self.config.num_codes)

    def style_bits(self):
        """Bits beside the codes."""
        return 0

# ---------------------------------------------------------------- NeuroQuant

@dataclass
class NeuroQuantConfig(QuantizerConfig):
    """Defaults: the paper, read narrowly (it states C4 = 256 alone), with its released code's codebook."""
    modalities: tuple = ('T1w', 'T2w')
    widths: tuple = (32, 64, 128, 256)  # channels of the four blocks, at 1/2, 1/4, 1/8, 1/16
    res_blocks: int = 1                 # 3x3x3 convolutions per block besides the strided one
    norm: str = 'group'                 # or 'none'
    fold: bool = False                  # begin and end with blocks of 2x2x2 voxels: no layer at full size
    attention: bool = True              # factorised multi-axis attention (FMA) in encoder and decoder
    attn_levels: tuple = (0, 1, 2, 3)   # where: 0 is 1/2 of the size (the dearest), 3 is 1/16
    film: bool = True                   # modality stream and FiLM (M-FiLM); without it, a plain VQ-VAE
    anat_dim: int = 64                  # channels of z_anat and of a code
    mod_dim: int = 32                   # channels of z_mod
    modality_dim: int = 32              # channels of each modality's learned vector s_m

def local_then_axial(c, level, channels):
    """Residual convolutions, then A(F) = Attn_W(Attn_H(Attn_D(F))), NeuroQuant eq. 3."""
    layers = [ResConv(channels, c.norm) for _ in range(c.res_blocks)]
    if c.attention and level in c.attn_levels:
        layers += [AxialAttention(channels, axis) for axis in range(3)]
    return nn.Sequential(*layers)

class EncoderBlock(nn.Module):
    """F_t = skip(F_{t-1}) + A(Conv3D(F_{t-1})) at half the size, NeuroQuant eq. 3.

    Departs: the two terms of eq. 3 differ in shape, so the skip is a 2x2x2 mean and a 1x1x1 convolution.
    """
    def __init__(self, c, level, c_in, c_out):
        super().__init__()
        self.halves = not (c.fold and level == 0)  # blocks of voxels have half the size already
        self.skip = Conv(c_in, c_out, 1)
        self.down = Conv(c_in, c_out, 3, stride=2 if self.halves else 1, padding=1)
        self.body = local_then_axial(c, level, c_out)

    def forward(self, x):
        small = halve(x) if self.halves else x
        return self.skip(small) + self.body(self.down(x))  # (B, c_out, D/2, H/2, W/2)

class Encoder(nn.Module):
    """A stem at full size and four blocks, NeuroQuant 3.2. Only the half-size block is checkpointed.

    fold: no stem, the first block takes blocks of voxels.
    """
    def __init__(self, c):
        super().__init__()
        self.checkpointing = False
        self.fold = c.fold
        widths = (8 if c.fold else c.widths[0] // 2, *c.widths)  # few at full size, where memory is dear
        self.stem = None if c.fold else Conv(1, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(c, i, widths[i], widths[i + 1]) for i in range(4))

    def forward(self, x):
        h = space_to_depth(x) if self.fold else self.stem(x)  # (B, 8, D/2, H/2, W/2) or (B, C1/2, D, H, W)
        for i, block in enumerate(self.blocks):
            h = run(self, block, h) if i == 0 else block(h)
        return h          # (B, C4, D/16, H/16, W/16)

class FiLM(nn.Module):
    """u_m = (GAP(z_mod), s_m), (gamma_l, beta_l) = MLP_l(u_m) for every decoder layer l, NeuroQuant eq. 8-9.

    It starts as gamma = 1, beta = 0: the modulated decoder starts as the plain one.
    """
    def __init__(self, c, widths):
        super().__init__()
        self.embedding = nn.Embedding(len(c.modalities), c.modality_dim)
        self.mlps = nn.ModuleList()
        for width in widths:
            hidden = [nn.Linear(c.mod_dim + c.modality_dim, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
            self.mlps.append(nn.Sequential(*hidden, zeroed(nn.Linear(256, 2 * width))))

    def forward(self, pooled, modality):
        s_m = self.embedding(modality).to(pooled.dtype)       # (B,) -> (B, modality_dim)
        u_m = torch.cat([pooled, s_m], 1)                     # (B, mod_dim + modality_dim)
        halves = [mlp(u_m).chunk(2, 1) for mlp in self.mlps]  # pairs of (B, C_l)
        # contiguous as what forward() concatenates for swaps: other strides would compile another graph
        return [(1 + gamma, beta.contiguous()) for gamma, beta in halves]

class DecoderBlock(nn.Module):
    """Convolution, [x2,] residual convolutions, axial attention, FiLM (NeuroQuant eq. 10), SiLU.

    The channels change before the upsampling. No norm between body and FiLM: with one, what every brain
    has in common drowns the codes.
    """
    def __init__(self, c, level, c_in, c_out):
        super().__init__()
        self.up = level < 3
        self.conv = Conv(c_in, c_out, 3, padding=1)
        self.body = local_then_axial(c, level, c_out)

    def forward(self, x, gamma=None, beta=None):
        h = self.conv(x)                            # (B, c_out, d, h, w)
        if self.up:
            h = double(h)                           # (B, c_out, 2d, 2h, 2w)
        h = self.body(h)
        if gamma is not None:
            h = gamma[:, :, None, None, None] * h + beta[:, :, None, None, None]
        return F.silu(h)

class Decoder(nn.Module):
    """The encoder's mirror, linear output. Only the half- and full-size stages are checkpointed.

    At full size, where most time and memory would go, no attention and half of widths[0] channels; with fold
    nothing at all, the last stage gives blocks of voxels.
    """
    def __init__(self, c):
        super().__init__()
        self.checkpointing = False
        self.channels = tuple(reversed(c.widths))  # of the FiLM layers
        self.voxels = zeroed(Conv(c.widths[0], 8, 3, padding=1)) if c.fold else None
        if not c.fold:
            self.channels += (c.widths[0] // 2,)
        self.blocks = nn.ModuleList()
        c_in = c.anat_dim
        for i, c_out in enumerate(self.channels):
            self.blocks.append(DecoderBlock(c, 3 - i, c_in, c_out))
            c_in = c_out
        self.heads = nn.ModuleList(Conv(c_out, 1, 3, padding=1) for c_out in self.channels)

    def forward(self, z_q, film):
        h = z_q
        for i, (block, head) in enumerate(zip(self.blocks, self.heads)):
            args = (h, *film[i]) if film else (h,)
            h = run(self, block, *args) if i >= 3 else block(*args)  # (B, channels[i], 2^i d, 2^i h, 2^i w)
            if i == 0:
                x_hat = head(h)
            else:
                x_hat = head(h) + double(x_hat, 'linear')            # (B, 1, 2^i d, 2^i h, 2^i w)
        if self.voxels:
            x_hat = double(x_hat, 'linear') + depth_to_space(self.voxels(h), missing_axis(h))
        return x_hat

class NeuroQuant(Autoencoder):
    """Dual-stream VQ-VAE (arXiv:2604.05171): anatomy as a code per 16^3 voxels, modality as a FiLM vector.

    x and x_hat, not clamped: (B,1,D,H,W). z_anat, z_q: (B,Ca,d,h,w). z_mod: (B,Cm,d,h,w), Cm = 0 if
    film is off. indices: (B,d,h,w) int64. FiLM: list of (gamma, beta), one per decoder layer, (B,C_l) each.
    modality: a name, an index into config.modalities, or (B,) int64 of indices.
    Buffers mod_sum (M,Cm), mod_weight (M,): their ratio is the running mean of GAP(z_mod) by modality.
    """
    factor = 16

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.held = None  # a list after quantize.hold_statistics
        if len(c.widths) != 4 or any(width < 8 or width % 8 for width in c.widths):
            raise ValueError(f'widths {c.widths}: four are needed, each a multiple of 8')
        if c.norm not in NORM: raise ValueError(f'norm={c.norm!r}: one of {tuple(NORM)}')
        if not c.modalities: raise ValueError('modalities is empty: name at least one, such as T1w')
        self.encoder = Encoder(c)
        self.anat_head = nn.Sequential(nn.SiLU(), Conv(c.widths[-1], c.anat_dim, 3, padding=1))
        self.quantizer = c.make_quantizer(c.anat_dim)
        self.decoder = Decoder(c)
        if c.film:
            self.mod_head = nn.Sequential(nn.SiLU(), Conv(c.widths[-1], c.mod_dim, 3, padding=1))
            self.film_mlp = FiLM(c, self.decoder.channels)
            self.register_buffer('mod_sum', torch.zeros(len(c.modalities), c.mod_dim))
            self.register_buffer('mod_weight', torch.zeros(len(c.modalities)))

    def check_size(self, shape):
        """ValueError unless axes are multiples of 16, from 32 on: a latent axis of 1 reads as a slice."""
        lengths = [n for n in shape if n != 1]
        if len(shape) - len(lengths) > 1 or any(n % 16 or n < 32 for n in lengths):
            raise ValueError(f'size {tuple(shape)}: each axis must be a multiple of 16, at least 32 '
                             '(one may be 1: slices); pad first')

    def encode(self, x, modality=None):
        """x -> z_anat, z_mod, NeuroQuant eq. 1 and 4. modality is not used: one encoder serves all."""
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f'x must be (B,1,D,H,W), got {tuple(x.shape)}')
        self.check_size(x.shape[2:])
        h = self.encoder(x)  # (B, C4, d, h, w)
        return self.anat_head(h), self.mod_head(h) if self.config.film else h[:, :0]

    def film(self, z_mod, modality):
        """The scan's own FiLM, from its z_mod; empty without FiLM."""
        if not self.config.film: return []
        return self.film_mlp(z_mod.mean((2, 3, 4)), self.modality_index(modality, z_mod))

    def decode(self, z_q, film):
        """z_q, film -> x_hat, NeuroQuant eq. 11."""
        return self.decoder(z_q, film)

    def forward(self, x, modality, pairs=None):
        """One pass for everything the losses need.

        pairs (P,2) int64: rows (source, target) of the batch that are one subject's scans. Then x_cross
        (P,1,D,H,W), decoded in the same call, is the source's anatomy under the target's FiLM (eq. 13).
        returns dict: x_hat, z_anat, z_mod, z_q (float32, straight-through), indices, commit
        Slices read the codebook and the modality means without changing them. The paper leaves this open; its
        2D batches hold more tokens than its 3D ones and would take the codebook over.
        """
        volumes = missing_axis(x) is None
        z_anat, z_mod = self.encode(x)  # (B, Ca, d, h, w), (B, Cm, d, h, w)
        z_q, indices, commit = self.quantizer(z_anat, update=volumes)
        film = self.film(z_mod, modality)
        if self.training and volumes and self.config.film:
            move_or_hold(self, self.modality_sums(z_mod, modality))
        out = dict(z_anat=z_anat, z_mod=z_mod, z_q=z_q, indices=indices, commit=commit)
        if pairs is None: return out | dict(x_hat=self.decode(z_q, film))
        source, target = pairs.unbind(1)
        film = [(torch.cat([g, g[target]]), torch.cat([b, b[target]])) for g, b in film]
        decoded = self.decode(torch.cat([z_q, z_q[source]]), film)  # (B + P, 1, D, H, W)
        return out | dict(x_hat=decoded[:len(x)], x_cross=decoded[len(x):])

    @torch.no_grad()
    def modality_sums(self, z_mod, modality):
        """(M, Cm + 1): sums of GAP(z_mod) by modality, and of how many scans."""
        index = self.modality_index(modality, z_mod)
        pooled = z_mod.float().mean((2, 3, 4))     # (B, Cm)
        pooled = F.pad(pooled, (0, 1), value=1.0)  # (B, Cm + 1)
        sums = pooled.new_zeros(len(self.mod_weight), pooled.shape[1])
        return sums.index_add_(0, index, pooled)

    @torch.no_grad()
    def move(self, sums):
        """One step of the modalities' running means, over every process."""
        sums = sum_over_ranks(sums)
        self.mod_sum.lerp_(sums[:, :-1], 0.01)
        self.mod_weight.lerp_(sums[:, -1], 0.01)

    def modality_index(self, modality, x):
        """modality -> (B,) int64 on the device of x (B, ...)."""
        if isinstance(modality, torch.Tensor): return modality.to(x.device).expand(len(x))
        names = ', '.join(self.config.modalities)
        if modality is None: raise ValueError(f'this model needs the modality of x, one of {names}')
        if isinstance(modality, str):
            if modality not in self.config.modalities:
                raise ValueError(f"modality '{modality}': this model knows {names}")
            modality = self.config.modalities.index(modality)
        return torch.full((len(x),), modality, dtype=torch.int64, device=x.device)

    def mean_film(self, modality, x):
        """FiLM of a modality's running mean, for x (B, ...). ValueError if training saw none of it."""
        if not self.config.film: return []
        index = self.modality_index(modality, x)
        if (self.mod_weight[index] == 0).any():
            raise ValueError(f'no volume of modality {modality} was seen in training')
        return self.film_mlp(self.mod_sum[index] / self.mod_weight[index, None], index)

    def encoding(self, x):
        """latent: (z_q, z_mod), mean: z_anat. z_q and z_mod (None without FiLM) come beside."""
        z_anat, z_mod = self.encode(x)
        tokens = self.quantizer.nearest_indices(z_anat)
        z_q = self.quantizer.lookup(tokens)
        latent = torch.cat([z_q, z_mod.float()], 1)
        if not self.config.film:
            z_mod = None
        return dict(latent=latent, mean=z_anat, logvar=None, tokens=tokens, z_q=z_q, z_mod=z_mod)

    def analyse(self, x, modality=None):
        out = self.encoding(x)
        return out | dict(x_hat=self.decode(out['z_q'], self.film(out['z_mod'], modality)))

    def from_tokens(self, indices, modality):
        """indices -> x_hat in that modality, under its running mean of GAP(z_mod)."""
        return self.decode(self.quantizer.lookup(indices), self.mean_film(modality, indices))

    def translate(self, x, source, target):
        """x of modality `source` -> x_hat in the contrast of `target`."""
        if not self.config.film:
            raise ValueError('a model trained with film=False has no modality to swap')
        self.modality_index(source, x)  # refuses an unknown source
        return self.from_tokens(self.tokens(x), target)

    def latent_shape(self, shape):
        return (self.config.anat_dim, *[n // 16 for n in shape])

    def style_bits(self):
        """GAP(z_mod) is all that the decoder gets beside the codes, at 16 bits a number."""
        return 16 * self.config.mod_dim if self.config.film else 0

# ---------------------------------------------------------------- ConvVAE

@dataclass
class ConvVAEConfig(QuantizerConfig):
    """Defaults: MAISI's autoencoder (arXiv:2409.11169), which DeCo-VAE trains anew: 20,944,897 parameters.

    layout 'maisi': trilinear x2, no SiLU before the last convolution of either half. 'sd': nearest x2, that
    SiLU, attention between two blocks in the middle, one more block per decoder level. 'fold', our own, works
    on blocks of 2x2x2 voxels, at an eighth of the cost, and doubles by sub-pixels.
    norm: 'group', or 'none', which learns fastest and codes a patch as part of its volume.
    """
    dims: int = 3                   # 3: volumes; 2: slices, and volumes slice by slice
    in_channels: int = 1
    widths: tuple = (64, 128, 256)  # channels per level; every level but the last halves the size
    res_blocks: int = 2             # per level
    layout: str = 'maisi'
    norm: str = 'group'
    latent_dim: int = 4
    bottleneck: str = 'kl'          # 'kl' or 'vq'
    slice_axis: int = 2             # of dims=2: volumes are cut across this axis, 2 for axial slices
    signed: bool = False            # the network itself works in [-1, 1], as Stable Diffusion's weights do

UP = {'maisi': 'linear', 'sd': 'nearest', 'fold': 'subpixel'}  # by layout

def conv_levels(c, widths, res_blocks, **change):
    """Residual blocks, level by level. change: down or up of the layers between."""
    blocks, channels = [], widths[0]
    for level, width in enumerate(widths):
        if level > 0:
            c_out = width if c.layout == 'fold' else channels
            blocks.append(ConvLayer(c.dims, channels, c_out, **change))
            channels = c_out
        for _ in range(res_blocks):
            blocks.append(ResBlock(c.dims, channels, width, norm=c.norm))
            channels = width
    return blocks

def middle_blocks(c, width):
    if c.layout != 'sd': return []
    first, last = (ResBlock(c.dims, width, width, norm=c.norm) for _ in range(2))
    return [first, Attention(width), last]

def conv_encoder(c, c_in, c_out):
    """x (B, c_in, *size) -> (B, c_out, *size / 2^(levels-1))."""
    first, last = c.widths[0], c.widths[-1]
    blocks = [ConvLayer(c.dims, c_in, first)]
    blocks += conv_levels(c, c.widths, c.res_blocks, down=True)
    blocks += middle_blocks(c, last)
    return Stack([*blocks, NormAct(last, c.layout != 'maisi', c.norm), ConvLayer(c.dims, last, c_out)])

def conv_decoder(c, c_out):
    """z (B, latent_dim, *grid) -> (B, c_out, *grid * 2^(levels-1)), linear output."""
    first, last = c.widths[-1], c.widths[0]
    blocks = [ConvLayer(c.dims, c.latent_dim, first)]
    blocks += middle_blocks(c, first)
    blocks += conv_levels(c, c.widths[::-1], c.res_blocks + (c.layout == 'sd'), up=UP[c.layout])
    return Stack([*blocks, NormAct(last, c.layout != 'maisi', c.norm), ConvLayer(c.dims, last, c_out)])

class ConvVAE(Autoencoder):
    """Convolutional autoencoder with a KL or a VQ bottleneck.

    encode and decode take x (B,in_channels,*size) in the network's range, whose axes are multiples of
    `factor`: D,H,W for dims=3, two for dims=2. forward takes x (B,1,*size) in [0, 1] of such axes; for dims=2
    also of three, one of length 1. The methods from prepare() on take volumes of any size, pad them at the
    far ends and for dims=2 cut them into slices. Their latents are (B,latent_dim,d,h,w), for dims=2 whole
    along slice_axis; their indices (B,d,h,w), or (B,num_codebooks,d,h,w) of several codebooks.
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        choices = dict(dims=(2, 3), layout=tuple(UP), norm=tuple(NORM), bottleneck=('kl', 'vq'),
                       slice_axis=(0, 1, 2))
        for key, allowed in choices.items():
            value = getattr(c, key)
            if value not in allowed: raise ValueError(f'{key}={value!r}: one of {allowed}')
        self.kl = c.bottleneck == 'kl'
        self.folds = c.layout == 'fold'
        if self.folds and c.dims == 2: raise ValueError("layout='fold' needs dims=3")
        self.factor = 2 ** (len(c.widths) - 1 + self.folds)
        self.factors = [self.factor] * 3  # voxels per latent position along D, H, W
        if c.dims == 2:
            self.factors[c.slice_axis] = 1
        # Stable Diffusion's encoder gives 2 latent_dim channels, from which both heads read
        c_head = 2 * c.latent_dim if c.layout == 'sd' and self.kl else c.latent_dim
        channels = c.in_channels * (8 if self.folds else 1)
        self.encoder = conv_encoder(c, channels, c_head)
        self.decoder = conv_decoder(c, channels)
        self.mu_head = CONV[c.dims](c_head, c.latent_dim, 1)
        self.post = CONV[c.dims](c.latent_dim, c.latent_dim, 1)
        if self.folds:  # small square matrices drawn at random may all but lose a channel
            nn.init.orthogonal_(self.mu_head.weight)
            nn.init.orthogonal_(self.post.weight)
        if self.kl:
            self.logvar_head = CONV[c.dims](c_head, c.latent_dim, 1)
            nn.init.constant_(self.logvar_head.bias, -5.0)  # near 0, as in MAISI, noise drowns a new code
        else:
            self.quantizer = c.make_quantizer(c.latent_dim)

    def check_size(self, shape):
        """ValueError unless axes are multiples of factor; one may be 1 for dims=2."""
        if any(n % self.factor for n in shape if n != 1 or self.config.dims == 3):
            raise ValueError(f'size {tuple(shape)}: each axis must be a multiple of {self.factor}; pad first')

    def encode(self, x):
        """x -> mu, logvar (B,latent_dim,*grid), logvar in [-30, 20]; for 'vq' z before quantisation, None."""
        self.check_size(x.shape[2:])
        h = self.encoder(space_to_depth(x) if self.folds else x)  # (B, c_head, *grid)
        return self.mu_head(h), self.logvar_head(h).clamp(-30, 20) if self.kl else None

    def decode(self, z):
        """z (B,latent_dim,*grid) -> x_hat like x, not clamped."""
        x_hat = self.decoder(self.post(z))
        return depth_to_space(x_hat) if self.folds else x_hat

    def to_network(self, x):
        """Images (B,1,*size) in [0, 1] -> (B,in_channels,*size) in the network's range."""
        if self.config.signed:
            x = 2 * x - 1
        return x.expand(-1, self.config.in_channels, *x.shape[2:])

    def from_network(self, x_hat):
        """The way back, by the mean over the channels."""
        x_hat = x_hat.mean(1, keepdim=True)
        return (x_hat + 1) / 2 if self.config.signed else x_hat

    def forward(self, x, generators=None):
        """returns dict: x_hat; 'kl': mu, logvar, z = mu + exp(logvar/2) eps; 'vq': z, z_q, indices, commit

        generators: one torch.Generator per sample for eps, so that its noise does not depend on its batch.
        """
        axis = missing_axis(x) if self.config.dims == 2 and x.ndim == 5 else None
        if axis is not None:
            x = x.squeeze(2 + axis)                   # (B, 1, h, w)
        mu, logvar = self.encode(self.to_network(x))  # (B, latent_dim, *grid) each
        if self.kl:
            if generators is None:
                eps = torch.randn_like(mu)
            else:
                eps = [torch.randn(mu.shape[1:], generator=g, device=g.device) for g in generators]
                eps = torch.stack(eps).to(mu)
            z = mu + eps * torch.exp(0.5 * logvar)
            out = dict(z=z, mu=mu, logvar=logvar)
        else:
            z_q, indices, commit = self.quantizer(mu)
            out = dict(z=mu, z_q=z_q, indices=indices, commit=commit)
        x_hat = self.from_network(self.decode(z if self.kl else z_q))
        return out | dict(x_hat=x_hat if axis is None else x_hat.unsqueeze(2 + axis))

    def prepare(self, volume):
        """Volume -> (B,in_channels,D,H,W), padded with zeros and in the network's range."""
        d, h, w = [-n % factor for n, factor in zip(volume.shape[2:], self.factors)]
        return self.to_network(F.pad(volume, (0, w, 0, h, 0, d)))

    def cut(self, volume):
        """(B, ..., *grid) -> [itself], or for dims=2 its slices, few at a time to save memory."""
        if self.config.dims == 3: return [volume]
        return volume.movedim(self.config.slice_axis - 3, 1).flatten(0, 1).split(16)

    def stack(self, parts, batch):
        """The way back, to (batch, ..., *grid)."""
        x = torch.cat(parts)
        if self.config.dims == 3: return x
        return x.unflatten(0, (batch, -1)).movedim(1, self.config.slice_axis - 3)

    def encoding(self, x):
        """latent: mu, or codes. mean: mu, or the latent before quantisation."""
        mean, logvar = zip(*[self.encode(part) for part in self.cut(self.prepare(x))])
        mean = self.stack(mean, len(x))
        if self.kl:
            return dict(latent=mean, mean=mean, logvar=self.stack(logvar, len(x)), tokens=None)
        tokens = self.quantizer.nearest_indices(mean)
        return dict(latent=self.codes(tokens), mean=mean, logvar=None, tokens=tokens)

    def analyse(self, x, modality=None):
        out = self.encoding(x)
        D, H, W = x.shape[2:]
        return out | dict(x_hat=self.decode_volume(out['latent'])[:, :, :D, :H, :W])

    def codes(self, indices):
        """indices -> latent of their codes."""
        return self.stack([self.quantizer.lookup(part) for part in self.cut(indices)], len(indices))

    def from_tokens(self, indices, modality=None):
        """indices -> x_hat at the padded size."""
        return self.decode_volume(self.codes(indices))

    def from_latent(self, z, modality=None):
        return self.decode_volume(z) if self.kl else super().from_latent(z)

    def decode_volume(self, z):
        """Latent as latent() gives it -> x_hat (B,1,D,H,W) at the padded size."""
        return self.stack([self.from_network(self.decode(part)) for part in self.cut(z)], len(z))

    def latent_shape(self, shape):
        return (self.config.latent_dim, *[-(-n // factor) for n, factor in zip(shape, self.factors)])

    def bits_per_volume(self, shape):
        """Of the codes, or for 'kl' 16 a number."""
        return 16 * math.prod(self.latent_shape(shape)) if self.kl else super().bits_per_volume(shape)

# ---------------------------------------------------------------- FlowUNet

@dataclass
class FlowUNetConfig:
    """Defaults: MAISI's U-Net without conditions, 178,566,276 parameters; DeCo-VAE's paper states none."""
    in_channels: int = 4
    widths: tuple = (64, 128, 256, 512)  # per level; every level but the last halves the size
    res_blocks: int = 2                  # per level on the way down; one more on the way up
    attention: tuple = (False, False, True, True)
    head_width: int = 32
    classes: tuple = ()                  # rows of each class condition's embedding, the last for "not known"
    vectors: tuple = ()                  # lengths of condition vectors; MAISI's (3,): voxel size in 10 um

class UNetLevel(nn.Module):
    """Residual blocks, one for each of channels_in, each with its attention; then a resampling block."""
    def __init__(self, c, level, channels_in, c_emb, resample):
        super().__init__()
        width = c.widths[level]
        self.blocks = nn.ModuleList(ResBlock(3, c_in, width, c_emb) for c_in in channels_in)
        self.attentions = nn.ModuleList()
        for _ in channels_in:
            self.attentions.append(Attention(width, c.head_width) if c.attention[level] else nn.Identity())
        self.resampler = ResBlock(3, width, width, c_emb, resample) if resample else None

def embedding_mlp(c_in, c_out):
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))

class FlowUNet(nn.Module):
    """Velocity v of a flow: x_t (B,C,d,h,w), t (B,) in [0,1], 0 = noise, 1 = data -> v like x_t, DeCo eq. 2.

    cond, a dict: 'classes' (B, len(config.classes)) int64, 'vectors' a list of (B, n) float. None, or a key
    left out, is "not known": the last class, vectors of 0.
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if len(c.attention) != len(c.widths):
            raise ValueError(f'attention {c.attention}: one value for each of widths {c.widths}')
        c_time = 4 * c.widths[0]
        c_emb = c_time * (1 + len(c.vectors))
        self.time = embedding_mlp(c.widths[0], c_time)
        self.class_embeddings = nn.ModuleList(nn.Embedding(rows, c_time) for rows in c.classes)
        self.vector_mlps = nn.ModuleList(embedding_mlp(length, c_time) for length in c.vectors)
        self.conv_in = Conv3d(c.in_channels, c.widths[0], 3, padding=1)

        last = len(c.widths) - 1
        channels_above = c.widths[0]
        channels_skips = [channels_above]  # of what the way down leaves for the way up
        self.down = nn.ModuleList()
        for level, width in enumerate(c.widths):
            resample = 'down' if level < last else ''
            channels_in = [channels_above] + [width] * (c.res_blocks - 1)
            channels_skips += [width] * (c.res_blocks + 1 if resample else c.res_blocks)
            self.down.append(UNetLevel(c, level, channels_in, c_emb, resample))
            channels_above = width

        self.middle = nn.ModuleList([ResBlock(3, width, width, c_emb), Attention(width, c.head_width),
                                     ResBlock(3, width, width, c_emb)])

        channels_below = width
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(c.widths))):
            channels_in = []
            for _ in range(c.res_blocks + 1):
                channels_in.append(channels_below + channels_skips.pop())
                channels_below = width
            self.up.append(UNetLevel(c, level, channels_in, c_emb, 'up' if level > 0 else ''))

        self.norm_out = group_norm(c.widths[0])
        self.conv_out = zeroed(Conv3d(c.widths[0], c.in_channels, 3, padding=1))
        self.register_buffer('latent_mean', torch.zeros(c.in_channels))
        self.register_buffer('latent_sd', torch.ones(c.in_channels))

    def normalise(self, z):
        """An autoencoder's latent (B,C,d,h,w) -> x_1, of mean 0 and variance 1 over the training set."""
        return (z - self.latent_mean[:, None, None, None]) / self.latent_sd[:, None, None, None]

    def denormalise(self, x):
        """The way back, for the decoder."""
        return x * self.latent_sd[:, None, None, None] + self.latent_mean[:, None, None, None]

    def embed(self, t, cond):
        """-> (B, c_emb): sines of time, plus classes, beside vectors."""
        half = self.config.widths[0] // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = 1000 * (1 - t.float())[:, None] * frequency        # MAISI's weights: 0 = data, 1000 = noise
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, c_time)
        cond = cond or {}
        for k, table in enumerate(self.class_embeddings):
            index = torch.full_like(t, table.num_embeddings - 1, dtype=torch.int64)
            if 'classes' in cond:
                index = cond['classes'][:, k]
            emb = emb + table(index)
        vectors = cond.get('vectors') or [emb.new_zeros(len(t), length) for length in self.config.vectors]
        parts = [mlp(vector.to(emb.dtype)) for mlp, vector in zip(self.vector_mlps, vectors)]
        return torch.cat([emb, *parts], 1)

    def forward(self, x_t, t, cond=None):
        emb = self.embed(t, cond)                       # (B, c_emb)
        h = self.conv_in(x_t)                           # (B, widths[0], d, h, w)
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(h, emb))            # (B, width, *size)
                skips.append(h)
            if level.resampler:
                h = level.resampler(h, emb)             # half the size, rounded up
                skips.append(h)
        first, attention, second = self.middle
        h = second(attention(first(h, emb)), emb)       # (B, widths[-1], *size)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions):
                h = torch.cat([h, skips.pop()], 1)      # (B, channels_below + channels_skip, *size)
                h = attention(block(h, emb))
            if level.resampler:
                h = level.resampler(h, emb, size=skips[-1].shape[2:])
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, C, d, h, w)

# ---------------------------------------------------------------- GPT

@dataclass
class GPTConfig:
    """Defaults: about 30 M parameters for NeuroQuant's 972 tokens of 4096 codes."""
    grid: tuple = (9, 12, 9)  # of one codebook's tokens
    num_codes: int = 4096
    num_codebooks: int = 1
    layers: int = 9
    heads: int = 8
    width: int = 512
    dropout: float = 0.0
    tied: bool = True         # the head is the tokens' embedding; only of one codebook
    classes: tuple = ()       # as FlowUNetConfig's
    vectors: tuple = ()

class GPTBlock(nn.Module):
    """Causal self-attention and a perceptron, both residual, layer norm first."""
    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.norm = nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)
        self.mlp = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, 4 * c.width), nn.GELU(),
                                 nn.Linear(4 * c.width, c.width))

    def forward(self, x, cache=None, seen=0):
        """cache: keys and values (2, B, heads, N, C/heads), the first `seen` known; then x is one input."""
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)        # three of (B, heads, T, C/heads)
        if cache is not None:
            end = seen + x.shape[1]
            cache[:, :, :, seen:end] = torch.stack((k, v))
            k, v = cache[:, :, :, :end]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=seen == 0)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.mlp(x), dropout)  # (B, T, C)

class GPTPlaces(nn.Module):
    """Learned embeddings (N, C) of the tokens' places: of the codebook and of each of three axes, added."""
    def __init__(self, c):
        super().__init__()
        sizes = c.num_codebooks, *c.grid
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(size, c.width)) for size in sizes)

    def forward(self):
        book, x, y, z = self.tables
        volume = x[:, None, None] + y[:, None] + z              # (d, h, w, C)
        return (book[:, None] + volume.flatten(0, 2)).flatten(0, 1)

class GPT(nn.Module):
    """A volume's N tokens one after the other: codebook by codebook, coarse to fine, each in raster order.

    cond as FlowUNet's, in a prefix from which the first token is predicted.
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.width % c.heads: raise ValueError(f'width {c.width}, heads {c.heads}: must divide')
        if c.tied and c.num_codebooks > 1: raise ValueError('several codebooks need tied=False')
        self.length = c.num_codebooks * math.prod(c.grid)  # N
        self.start = nn.Parameter(torch.zeros(1, c.width))
        self.class_embeddings = nn.ModuleList(nn.Embedding(rows, c.width) for rows in c.classes)
        self.vector_mlps = nn.ModuleList(embedding_mlp(length, c.width) for length in c.vectors)
        self.embedding = nn.Embedding(c.num_codebooks * c.num_codes, c.width)
        self.here, self.ahead = GPTPlaces(c), GPTPlaces(c)  # of an input, and of the token it shall predict
        self.blocks = nn.ModuleList(GPTBlock(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = None if c.tied else nn.Linear(c.width, c.num_codes, bias=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)           # GPT-2's
        for block in self.blocks:
            for last in (block.proj, block.mlp[-1]):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * c.layers))

    def prefix(self, cond):
        """-> (B, C); without conditions (1, C)."""
        x, cond = self.start, cond or {}
        for k, table in enumerate(self.class_embeddings):
            x = x + (table(cond['classes'][:, k]) if 'classes' in cond else table.weight[-1])
        vectors = cond.get('vectors') or [x.new_zeros(1, length) for length in self.config.vectors]
        for mlp, vector in zip(self.vector_mlps, vectors):
            x = x + mlp(vector.to(x.dtype))
        return x

    def new_cache(self, rows):
        """Room for the keys and values of N inputs: (layers, 2, rows, heads, N, C/heads)."""
        c, weight = self.config, self.start
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = c.layers, 2, rows, c.heads, self.length, c.width // c.heads
        return torch.empty(shape, dtype=dtype, device=weight.device)

    def forward(self, tokens, cond=None, cache=None, seen=0):
        """The first T < N tokens (B, T) -> logits (B, T + 1, K): token k's by those before, the next one's.

        cache: of new_cache, with what `seen` inputs left there, prefix and tokens. From 1 on a call takes one
        more token -> (B, 1, K).
        """
        B, T = tokens.shape
        first = max(seen - 1, 0)
        book = torch.arange(first, first + T, device=tokens.device) // math.prod(self.config.grid)
        x = self.embedding(tokens + self.config.num_codes * book) + self.here()[first:first + T]
        if not seen:
            x = torch.cat([self.prefix(cond)[:, None].expand(B, 1, -1), x], 1)
        x = x + self.ahead()[seen:seen + x.shape[1]]        # (B, inputs, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for k, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[k], seen)
        return F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)

# ---------------------------------------------------------------- checkpoints

KINDS = {'neuroquant': (NeuroQuant, NeuroQuantConfig), 'convvae': (ConvVAE, ConvVAEConfig),
         'flowunet': (FlowUNet, FlowUNetConfig), 'gpt': (GPT, GPTConfig)}

def from_settings(kind, settings):
    """A new model, whose config has the fields that are among the settings. ValueError if it cannot be."""
    cls, config_cls = KINDS[kind]
    return cls(config_cls(**{f.name: settings[f.name] for f in fields(config_cls) if f.name in settings}))

def model_args(model):
    """What builds the model again: its kind and every field of its config."""
    kind = next(kind for kind, (cls, _) in KINDS.items() if isinstance(model, cls))
    return {'kind': kind} | asdict(model.config)

def encoder_hash(model):
    """16 hex digits that name an autoencoder's encoder and codebook, whatever its decoder."""
    args = model_args(model)
    for key, usual in (('norm', 'group'), ('fold', False)):
        if args.get(key) == usual:
            del args[key]  # older networks keep their name
    digest = hashlib.sha256(repr(sorted(args.items())).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith(('decoder.', 'post.', 'film', 'mod_')):
            digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]

def from_checkpoint(checkpoint, average=True):
    """The model of a checkpoint dict, in eval mode, with its averaged weights if it has them.

    SystemExit with one line for a checkpoint whose model this version of the project does not know.
    """
    args = dict(checkpoint['model_args'])
    try:
        cls, config = KINDS[args.pop('kind')]
        model = cls(config(**args))
    except (KeyError, TypeError) as e:
        raise SystemExit(f"a checkpoint of another version, commit {checkpoint.get('git_commit')!r} ({e})")
    model.load_state_dict(checkpoint['ema'] if average and checkpoint.get('ema') else checkpoint['model'])
    return model.eval()
