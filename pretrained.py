"""Third-party networks and their weights, from files of yours: nothing is downloaded.

LPIPS (perceptual distance) on a SqueezeNet, AlexNet or VGG16 trunk; MAISI's and Stable Diffusion's autoencoders into ConvVAE, MAISI's
U-Net into FlowUNet; RadImageNet's ResNet-50 and SynthSeg's U-Net as judges.
"""
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, ConvLayer, ConvVAE, ConvVAEConfig, FlowUNet, FlowUNetConfig, NormAct

# ---------------------------------------------------------------- reading

def read_weights(path, what):
    """The state dict in a file written by torch.save. SystemExit with one line, saying what the file is and where to get it."""
    if not os.path.isfile(path):
        raise SystemExit(f'{path or "(no path given)"}: no such file; wanted is {what}')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); wanted is {what}')

def bare(state_dict, wrappers=('autoencoder', 'unet_state_dict', 'state_dict')):
    """The state dict inside a training checkpoint, without the prefixes of DDP, compile and autocast wrappers."""
    for key in wrappers:
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return {re.sub(r'^(module\.|_orig_mod\.)+', '', k): v for k, v in state_dict.items()}

def fill(model, state, names={}):
    """Load renamed weights; ValueError that names what is missing, left over or of another shape.

    names: our module or parameter -> theirs, where they differ.
    """
    own = model.state_dict()
    def name(key):
        module, _, leaf = key.rpartition('.')
        return names[key] if key in names else f'{names[module]}.{leaf}' if module in names else key
    theirs = {name(k): k for k in own}
    missing = [k for k in theirs if k not in state]
    extra = [k for k in state if k not in theirs]
    shapes = [f'{k} {tuple(state[k].shape)} instead of {tuple(own[theirs[k]].shape)}' for k in theirs
              if k in state and state[k].shape != own[theirs[k]].shape]
    problems = [
        f'{what} {", ".join(found[:3])}{f" and {len(found) - 3} more" if len(found) > 3 else ""}'
        for what, found in (('missing', missing), ('unexpected', extra), ('shape of', shapes))
        if found
    ]
    if problems:
        raise ValueError(f'weights do not fit {type(model).__name__}: {"; ".join(problems)}')
    model.load_state_dict({ours: state[k] for k, ours in theirs.items()})
    return model.eval()

# ---------------------------------------------------------------- autoencoders

def load_maisi_vae(state_dict):
    """NVIDIA's or DeCo-VAE's MAISI autoencoder -> ConvVAE (widths and blocks read from the shapes), in eval mode.

    Accepts a bare state dict or one under 'unet_state_dict' or 'autoencoder'. ValueError naming what does not fit.
    """
    state = bare(state_dict)
    if not {'encoder.blocks.0.conv.conv.weight', 'post_quant_conv.conv.weight'} <= state.keys():
        raise ValueError('not a MAISI autoencoder: no encoder.blocks.0.conv.conv or no post_quant_conv.conv')
    levels, i = [[]], 1  # output channels of the encoder's residual blocks, level by level
    while any(k.startswith(f'encoder.blocks.{i}.') for k in state):
        if f'encoder.blocks.{i}.conv2.conv.conv.weight' in state:
            levels[-1].append(len(state[f'encoder.blocks.{i}.conv2.conv.conv.weight']))
        if f'encoder.blocks.{i}.conv.conv.conv.weight' in state:
            levels.append([])
        i += 1
    if not all(levels): raise ValueError('not a MAISI autoencoder: a level without residual blocks')
    model = ConvVAE(
        ConvVAEConfig(
            widths=tuple(level[-1] for level in levels),
            res_blocks=len(levels[0]),
            layout='maisi',
            in_channels=state['encoder.blocks.0.conv.conv.weight'].shape[1],
            latent_dim=len(state['post_quant_conv.conv.weight']),
        )
    )
    theirs = {
        'mu_head': 'quant_conv_mu.conv',
        'logvar_head': 'quant_conv_log_sigma.conv',
        'post': 'post_quant_conv.conv',
    }
    for half in ('encoder', 'decoder'):
        for i, block in enumerate(getattr(model, half).blocks):
            at = f'{half}.blocks.{i}'
            if isinstance(block, ConvLayer):
                theirs[f'{at}.conv'] = (
                    f'{at}.conv.conv.conv' if block.up or block.far_side else f'{at}.conv.conv'
                )
            elif isinstance(block, NormAct):
                theirs[f'{at}.norm'] = at
            else:
                theirs |= {
                    f'{at}.{a}': f'{at}.{b}'
                    for a, b in (
                        ('norm1', 'norm1'),
                        ('conv1', 'conv1.conv.conv'),
                        ('norm2', 'norm2'),
                        ('conv2', 'conv2.conv.conv'),
                        ('skip', 'nin_shortcut.conv.conv'),
                    )
                }
    return fill(model, state, theirs)

def load_sd_vae(state_dict):
    """Stable Diffusion's autoencoder in the layout of diffusers' AutoencoderKL -> 2D ConvVAE, in eval mode.

    The network works on (B,3,H,W) in [-1, 1]; reconstruct() and latent() give it grey slices of [0, 1] volumes so. Both namings of
    its attention (to_q, ... and query, ...) are read. ValueError naming what does not fit.
    """
    state = bare(state_dict)
    if (
        not {
            'encoder.conv_in.weight', 'encoder.down_blocks.0.resnets.0.conv1.weight', 'quant_conv.weight',
            'post_quant_conv.weight'
        }
        <= state.keys()
    ):
        raise ValueError(
            'not an AutoencoderKL of diffusers: no encoder.conv_in, encoder.down_blocks.0, quant_conv or'
            ' post_quant_conv'
        )
    levels = 1 + max(int(k.split('.')[2]) for k in state if k.startswith('encoder.down_blocks.'))
    blocks = 1 + max(int(k.split('.')[4]) for k in state if k.startswith('encoder.down_blocks.0.resnets.'))
    widths = tuple(len(state[f'encoder.down_blocks.{i}.resnets.0.conv1.weight']) for i in range(levels))
    model = ConvVAE(
        ConvVAEConfig(
            dims=2,
            in_channels=state['encoder.conv_in.weight'].shape[1],
            widths=widths,
            res_blocks=blocks,
            layout='sd',
            latent_dim=len(state['post_quant_conv.weight']),
            signed=True,
        )
    )
    theirs = {'mu_head': 'mu_head', 'logvar_head': 'logvar_head', 'post': 'post_quant_conv'}
    for half, side in (('encoder', 'down'), ('decoder', 'up')):
        stack, level, count, middle = list(getattr(model, half).blocks), 0, 0, 0
        for i, block in enumerate(stack):
            at = f'{half}.blocks.{i}'
            if isinstance(block, NormAct):
                theirs[f'{at}.norm'] = f'{half}.conv_norm_out'
            elif isinstance(block, Attention):
                theirs |= {f'{at}.{a}': f'{half}.mid_block.attentions.0.{b}'
                           for a, b in (('norm', 'group_norm'), ('qkv', 'qkv'), ('proj', 'to_out.0'))}
            elif isinstance(block, ConvLayer) and 0 < i < len(stack) - 1:
                theirs[f'{at}.conv'] = f'{half}.{side}_blocks.{level}.{side}samplers.0.conv'
                level, count = level + 1, 0
            elif isinstance(block, ConvLayer):
                theirs[f'{at}.conv'] = f'{half}.conv_{"out" if i else "in"}'
            else:
                if isinstance(stack[i - 1], Attention) or isinstance(stack[i + 1], Attention):
                    place, middle = f'mid_block.resnets.{middle}', middle + 1
                else:
                    place, count = f'{side}_blocks.{level}.resnets.{count}', count + 1
                theirs |= {
                    f'{at}.{a}': f'{half}.{place}.{b}'
                    for a, b in (
                        ('norm1', 'norm1'),
                        ('conv1', 'conv1'),
                        ('norm2', 'norm2'),
                        ('conv2', 'conv2'),
                        ('skip', 'conv_shortcut'),
                    )
                }
    return fill(model, sd_rearranged(state), theirs)

def sd_rearranged(state):
    """Old names of the attention's parts to new, its q, k and v in one matrix, quant_conv cut into mean and log-variance."""
    # once 1x1 convolutions
    state = {k: v.flatten(1) if '.attentions.' in k and v.ndim == 4 else v for k, v in state.items()}
    for old, new in (('query', 'to_q'), ('key', 'to_k'), ('value', 'to_v'), ('proj_attn', 'to_out.0')):
        state = {k.replace(f'.attentions.0.{old}.', f'.attentions.0.{new}.'): v for k, v in state.items()}
    for leaf in ('weight', 'bias'):
        for half in ('encoder', 'decoder'):
            parts = [f'{half}.mid_block.attentions.0.to_{p}.{leaf}' for p in 'qkv']
            if all(k in state for k in parts):
                state[f'{half}.mid_block.attentions.0.qkv.{leaf}'] = torch.cat([state.pop(k) for k in parts])
        if f'quant_conv.{leaf}' in state:
            state[f'mu_head.{leaf}'], state[f'logvar_head.{leaf}'] = state.pop(f'quant_conv.{leaf}').chunk(2)
    return state

# ---------------------------------------------------------------- MAISI's U-Net

# in the order of concatenation
VECTORS = ('top_region_index_layer', 'bottom_region_index_layer', 'spacing_layer', 'meta_layer')

def load_maisi_unet(state_dict):
    """NVIDIA's or DeCo-VAE's MAISI diffusion U-Net -> FlowUNet (widths, attention, conditions read from the shapes), in eval mode.

    Accepts a bare state dict or one under 'unet' or 'unet_state_dict', then with scale_factor and global_mean beside it. Same
    velocity, data - noise, of the same x_t: our t is their timestep t' as 1 - t'/1000. ValueError naming what does not fit.
    """
    # beside DeCo's weights
    sd, mean = 1 / float(state_dict.get('scale_factor', 1.0)), float(state_dict.get('global_mean', 0.0))
    state = bare(state_dict, ('unet', 'unet_state_dict', 'state_dict'))
    if (
        not {'conv_in.conv.weight', 'time_embed.0.weight', 'down_blocks.0.resnets.0.conv1.conv.weight'}
        <= state.keys()
    ):
        raise ValueError('not a MAISI U-Net: no conv_in.conv, time_embed.0 or down_blocks.0.resnets.0')
    levels = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('down_blocks.'))
    blocks = 1 + max(int(k.split('.')[3]) for k in state if k.startswith('down_blocks.0.resnets.'))
    vectors = [name for name in VECTORS if f'{name}.0.weight' in state]
    attention = tuple(f'down_blocks.{i}.attentions.0.norm.weight' in state for i in range(levels))
    model = FlowUNet(
        FlowUNetConfig(
            in_channels=state['conv_in.conv.weight'].shape[1],
            widths=tuple(len(state[f'down_blocks.{i}.resnets.0.conv1.conv.weight']) for i in range(levels)),
            res_blocks=blocks,
            attention=attention,
            vectors=tuple(state[f'{name}.0.weight'].shape[1] for name in vectors),
            classes=(len(state['class_embedding.weight']),) if 'class_embedding.weight' in state else (),
        )
    )
    state |= {
        'latent_sd': torch.full_like(model.latent_sd, sd),
        'latent_mean': torch.full_like(model.latent_mean, mean),
    }
    theirs = {
        'conv_in': 'conv_in.conv',
        'norm_out': 'out.0',
        'conv_out': 'out.2.conv',
        'class_embeddings.0': 'class_embedding',
        **{f'time.{k}': f'time_embed.{k}' for k in (0, 2)},
        **{f'vector_mlps.{n}.{k}': f'{name}.{k}' for n, name in enumerate(vectors) for k in (0, 2)},
    }
    def block(ours, name):
        theirs.update({
            f'{ours}.{a}': f'{name}.{b}'
            for a, b in (
                ('norm1', 'norm1'),
                ('conv1', 'conv1.conv'),
                ('emb', 'time_emb_proj'),
                ('norm2', 'norm2'),
                ('conv2', 'conv2.conv'),
                ('skip', 'skip_connection.conv'),
            )
        })
    def attend(ours, name):
        theirs.update({
            f'{ours}.norm': f'{name}.norm',
            f'{ours}.qkv': f'{name}.attn.qkv',
            f'{ours}.proj': f'{name}.attn.out_proj',
        })
        for leaf in ('weight', 'bias'):  # ours has q, k and v in one matrix
            parts = [f'{name}.attn.to_{p}.{leaf}' for p in 'qkv']
            if all(k in state for k in parts):
                state[f'{name}.attn.qkv.{leaf}'] = torch.cat([state.pop(k) for k in parts])
    for side, resampler, stages in (('down', 'downsampler', model.down), ('up', 'upsampler', model.up)):
        for i, level in enumerate(stages):
            for j, layer in enumerate(level.attentions):
                block(f'{side}.{i}.blocks.{j}', f'{side}_blocks.{i}.resnets.{j}')
                if isinstance(layer, Attention):
                    attend(f'{side}.{i}.attentions.{j}', f'{side}_blocks.{i}.attentions.{j}')
            block(f'{side}.{i}.resampler', f'{side}_blocks.{i}.{resampler}')
    block('middle.0', 'middle_block.resnet_1'), attend('middle.1', 'middle_block.attention'), block(
        'middle.2', 'middle_block.resnet_2'
    )
    return fill(model, state, theirs)

# ---------------------------------------------------------------- LPIPS

class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016): 1x1 down to few channels, then 1x1 and 3x3 side by side."""
    def __init__(self, c_in, c_few, c_each):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, c_few, 1)
        self.expand1x1 = nn.Conv2d(c_few, c_each, 1)
        self.expand3x3 = nn.Conv2d(c_few, c_each, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))

def squeezenet():
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2),
        nn.ReLU(),
        pool(),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        pool(),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        pool(),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )

def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )

def vgg16():
    layers, c = [], 3
    for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in stage:
            layers, c = layers + [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()], width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])

TRUNKS = {  # trunk, layers whose output is compared, their channels; numbered as in torchvision's `features`
    'squeeze': (squeezenet, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)),
    'alex': (alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    'vgg': (vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
}
TRUNK_FILES = {
    'squeeze': 'squeezenet1_1-b8a52dc0.pth',
    'alex': 'alexnet-owt-7be5be79.pth',
    'vgg': 'vgg16-397923af.pth',
}

class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (Zhang et al. 2018): (a, b) each (B, 1 or 3, H, W) -> (B,). Frozen, float32.

    net: 'squeeze', 'alex' or 'vgg'. trunk_path: a torchvision checkpoint (features.*); lin_path: the v0.1 weights of the channels
    (lin*.model.1.weight). Inputs are taken as they are, not rescaled to [-1, 1] (as the released DeCo-VAE does with [0, 1]).
    Without paths (both None): a trunk drawn from a fixed seed with equal channel weights, `random` is then True, and results
    must be named so: a distance between random features, not LPIPS.
    """
    def __init__(self, net='squeeze', trunk_path=None, lin_path=None):
        super().__init__()
        if net not in TRUNKS: raise ValueError(f"LPIPS net '{net}': one of {', '.join(TRUNKS)}")
        make, self.taps, channels = TRUNKS[net]
        self.random = trunk_path is None and lin_path is None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = make()
        self.weights = nn.ParameterList(torch.full((c,), 1 / c) for c in channels)
        self.register_buffer(
            'shift', torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer('scale', torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        if not self.random:
            trunk = bare(
                read_weights(trunk_path, f"torchvision's {TRUNK_FILES[net]} (download.pytorch.org/models)")
            )
            lins = bare(
                read_weights(
                    lin_path,
                    f'LPIPS v0.1 {net}.pth (github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1)',
                )
            )
            fill(
                self.features,
                {k.removeprefix('features.'): v for k, v in trunk.items() if k.startswith('features.')},
            )
            fill(
                self.weights,
                {k: v.flatten() for k, v in lins.items()},
                {str(i): f'lin{i}.model.1.weight' for i in range(len(channels))},
            )
        self.requires_grad_(False)

    def forward(self, a, b):
        fa, fb, total = (a.float() - self.shift) / self.scale, (b.float() - self.shift) / self.scale, 0.0
        unit = lambda f: f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weights = iter(self.weights)
        for i, layer in enumerate(self.features):
            fa, fb = layer(fa), layer(fb)
            if i in self.taps:
                total = total + ((unit(fa) - unit(fb)).square() * next(weights)[:, None, None]).sum(1).mean(
                    (1, 2)
                )
        return total

# ---------------------------------------------------------------- RadImageNet

class Bottleneck(nn.Module):
    """Keras' ResNet v1 bottleneck: the stride is on the first 1x1 convolution. released: on the 3x3, no biases, as torchvision's v1.5."""
    def __init__(self, c_in, c, stride, released):
        super().__init__()
        bias, eps = not released, 1e-5 if released else 1.001e-5
        self.conv1 = nn.Conv2d(c_in, c, 1, 1 if released else stride, bias=bias)
        self.conv2 = nn.Conv2d(c, c, 3, stride if released else 1, 1, bias=bias)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=bias)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(n, eps) for n in (c, c, 4 * c))
        if stride != 1 or c_in != 4 * c:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, 4 * c, 1, stride, bias=bias), nn.BatchNorm2d(4 * c, eps)
            )

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(h)))))
        return F.relu(h + (self.downsample(x) if hasattr(self, 'downsample') else x))

class RadImageNet(nn.Module):
    """ResNet-50 of RadImageNet (Mei et al. 2022): preprocessed (B,3,H,W) -> (B,2048), the mean over space of its last map."""
    def __init__(self, released=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=not released)
        self.bn1 = nn.BatchNorm2d(64, 1e-5 if released else 1.001e-5)
        c_in = 64
        for n, (blocks, c) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
            setattr(
                self,
                f'layer{n}',
                nn.Sequential(*[
                    Bottleneck(c_in if k == 0 else 4 * c, c, 2 if k == 0 and n > 1 else 1, released)
                    for k in range(blocks)
                ]),
            )
            c_in = 4 * c

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

def radimagenet_input(slices):
    """Slices (B,1,H,W) in [0,1] -> what the network was trained on: three channels, order BGR, minus [0.406, 0.456, 0.485]."""
    return slices.expand(-1, 3, -1, -1) - torch.tensor([0.406, 0.456, 0.485], device=slices.device).view(
        1, 3, 1, 1
    )

def load_radimagenet(path, released=False):
    """RadImageNet-ResNet50_notop.pth (Warvito/radimagenet-models) -> RadImageNet, in eval mode; every key has to match.

    released: as the released DeCo-VAE reads it, into torchvision's layout, which drops the 53 biases and moves the strides; only
    for parity with its numbers. SystemExit or ValueError with one line for a missing or another file.
    """
    state = bare(read_weights(path, 'RadImageNet-ResNet50_notop.pth (github.com/Warvito/radimagenet-models)'))
    if released:
        state = {
            k: v
            for k, v in state.items()
            if not (k.endswith('.bias') and ('conv' in k or k.endswith('downsample.0.bias')))
        }
    return fill(RadImageNet(released), state).requires_grad_(False)

class RandomFeatures(nn.Module):
    """Slices (B,1,H,W) in [0,1] -> (B,16): fixed random convolutions, for tests of the path; distances in it are no FID."""
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 32, 5, 2, 2),
                nn.ReLU(),
                nn.Conv2d(32, 64, 5, 2, 2),
                nn.ReLU(),
                nn.Conv2d(64, 16, 3, 2, 1),
            )
        self.requires_grad_(False)

    def forward(self, slices):
        return self.layers(slices).mean((2, 3))

# ---------------------------------------------------------------- SynthSeg

SYNTHSEG_LABELS = (
    0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 41, 42, 43, 44, 46, 47, 49, 50, 51,
    52, 53, 54, 58, 60
)

class SynthSeg(nn.Module):
    """SynthSeg's 3D U-Net (Billot et al. 2023): (B,1,D,H,W) in [0,1], sides multiples of 32 -> posteriors (B,33,D,H,W).

    ELU convolutions, one batch norm per level after them; the skips are taken before that norm and come first when joined.
    """
    def __init__(self, labels=33, widths=(24, 48, 96, 192, 384)):
        super().__init__()
        pair = lambda a, b: nn.ModuleList([nn.Conv3d(a, b, 3, padding=1), nn.Conv3d(b, b, 3, padding=1)])
        norm = lambda c: nn.BatchNorm3d(c, eps=1e-3)
        back = widths[::-1]
        self.down = nn.ModuleList(pair(a, b) for a, b in zip((1, *widths), widths))
        self.down_norm = nn.ModuleList(norm(c) for c in widths)
        self.up = nn.ModuleList(pair(a + b, b) for a, b in zip(back, back[1:]))
        self.up_norm = nn.ModuleList(norm(c) for c in back[1:])
        self.likelihood = nn.Conv3d(widths[0], labels, 1)

    def forward(self, x):
        skips = []
        for level, ((first, second), norm) in enumerate(zip(self.down, self.down_norm)):
            skips.append(F.elu(second(F.elu(first(F.max_pool3d(x, 2) if level else x)))))
            x = norm(skips[-1])
        skips.pop()
        for (first, second), norm in zip(self.up, self.up_norm):
            x = torch.cat([skips.pop(), F.interpolate(x, scale_factor=2, mode='nearest')], 1)
            x = norm(F.elu(second(F.elu(first(x)))))
        return self.likelihood(x).softmax(1)

def load_synthseg(h5_path):
    """synthseg_2.0.h5 (github.com/BBillot/SynthSeg), Keras' layout -> SynthSeg, in eval mode; needs h5py; every weight has to match."""
    try:
        import h5py
    except ImportError:
        raise SystemExit('reading SynthSeg weights needs h5py: pip install h5py')
    state = {}
    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            state['/'.join(name.split('/')[-2:])] = torch.from_numpy(item[()])
    try:
        with h5py.File(h5_path, 'r') as f:
            f.visititems(collect)
    except OSError as e:
        raise SystemExit(
            f'{h5_path}: not a readable .h5 file ({e}); wanted is synthseg_2.0.h5'
            ' (github.com/BBillot/SynthSeg)'
        )
    state = {k: v.permute(4, 3, 0, 1, 2).contiguous() if v.ndim == 5 else v for k, v in state.items()}
    if 'unet_likelihood/bias:0' not in state:
        raise ValueError(f'{h5_path}: not SynthSeg weights: no unet_likelihood')
    model, theirs = SynthSeg(len(state['unet_likelihood/bias:0'])), {}
    def conv(ours, name):
        theirs.update({f'{ours}.weight': f'{name}/kernel:0', f'{ours}.bias': f'{name}/bias:0'})
    def norm(ours, name):
        theirs.update({
            f'{ours}.{a}': f'{name}/{b}:0'
            for a, b in (
                ('weight', 'gamma'),
                ('bias', 'beta'),
                ('running_mean', 'moving_mean'),
                ('running_var', 'moving_variance'),
            )
        })
        theirs[f'{ours}.num_batches_tracked'] = f'{name}/count'
        state[f'{name}/count'] = torch.tensor(0)  # Keras keeps none
    for level in range(5):
        for k in (0, 1):
            conv(f'down.{level}.{k}', f'unet_conv_downarm_{level}_{k}')
        norm(f'down_norm.{level}', f'unet_bn_down_{level}')
    for level in range(4):
        for k in (0, 1):
            conv(f'up.{level}.{k}', f'unet_conv_uparm_{level + 5}_{k}')
        norm(f'up_norm.{level}', f'unet_bn_up_{level}')
    conv('likelihood', 'unet_likelihood')
    return fill(model, state, theirs).requires_grad_(False)
