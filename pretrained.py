"""Third-party networks and their weights, from files of yours: nothing is downloaded.

LPIPS (perceptual distance) on a SqueezeNet, AlexNet or VGG16 trunk; MAISI's and Stable Diffusion's
autoencoders into ConvVAE; MAISI's U-Net into FlowUNet; RadImageNet's ResNet-50 and SynthSeg's U-Net as
judges. Loaders return networks in eval mode, or a ValueError that names what does not fit.
"""
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ConvVAE, ConvVAEConfig, FlowUNet, FlowUNetConfig

# ---------------------------------------------------------------- reading

def read_weights(path, what):
    """The state dict of a torch.save file. SystemExit with one line that ends in `what`."""
    if not os.path.isfile(path):
        raise SystemExit(f'{path or "(no path given)"}: no such file; {what}')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise SystemExit(f'{path}: not a readable checkpoint ({type(e).__name__}); {what}')

def bare(state_dict, wrappers=('autoencoder', 'unet_state_dict', 'state_dict')):
    """The state dict inside a checkpoint, without the prefixes of DDP and compile wrappers."""
    for key in wrappers:
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return {re.sub(r'^(module\.|_orig_mod\.)+', '', key): value for key, value in state_dict.items()}

def require(state, what, *keys):
    """ValueError unless the state dict has the keys that sizes are read from."""
    for key in keys:
        if key not in state:
            raise ValueError(f'not {what}: no {key}')

def count(state, prefix):
    """How many modules are numbered after this prefix."""
    return 1 + max(int(key[len(prefix):].split('.')[0]) for key in state if key.startswith(prefix))

def renamed(ours, theirs, parts):
    """{our module: theirs} for the parts {ours: theirs} of a module."""
    return {f'{ours}.{part}': f'{theirs}.{name}' for part, name in parts.items()}

def join_qkv(state):
    """Put q, k and v of every attention into one matrix, as ours."""
    for key in [key for key in state if '.to_q.' in key]:
        parts = [key.replace('.to_q.', f'.to_{letter}.') for letter in 'qkv']
        if all(part in state for part in parts):
            state[key.replace('.to_q.', '.qkv.')] = torch.cat([state.pop(part) for part in parts])

def fill(model, state, names={}):
    """The model with renamed weights, in eval mode.

    names: our module or parameter -> theirs, where they differ; more than it has do no harm.
    """
    new, missing, shapes = {}, [], []
    extra = dict(state)
    for ours, value in model.state_dict().items():
        module, _, leaf = ours.rpartition('.')
        theirs = names.get(ours) or (f'{names[module]}.{leaf}' if module in names else ours)
        if theirs not in state:
            missing.append(theirs)
            continue
        new[ours] = extra.pop(theirs)
        if new[ours].shape != value.shape:
            shapes.append(f'{theirs} {tuple(new[ours].shape)} instead of {tuple(value.shape)}')
    problems = []
    for what, keys in (('missing', missing), ('unexpected', list(extra)), ('shape of', shapes)):
        if keys:
            more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
            problems.append(f'{what} {", ".join(keys[:3])}{more}')
    if problems:
        raise ValueError(f'weights do not fit {type(model).__name__}: {"; ".join(problems)}')
    model.load_state_dict(new)
    return model.eval()

# ---------------------------------------------------------------- autoencoders

MAISI_PARTS = {'norm1': 'norm1', 'conv1': 'conv1.conv.conv', 'norm2': 'norm2', 'conv2': 'conv2.conv.conv',
               'skip': 'nin_shortcut.conv.conv'}

def load_maisi_vae(state_dict):
    """NVIDIA's or DeCo-VAE's MAISI autoencoder -> ConvVAE, its sizes read from the shapes.

    Accepts a bare state dict or one under 'unet_state_dict' or 'autoencoder'.
    """
    state = bare(state_dict)
    first = 'encoder.blocks.0.conv.conv.weight'
    require(state, 'a MAISI autoencoder', first, 'post_quant_conv.conv.weight')
    levels = [[]]  # output channels of the encoder's residual blocks, level by level
    for i in range(1, count(state, 'encoder.blocks.')):
        last_of_block = state.get(f'encoder.blocks.{i}.conv2.conv.conv.weight')
        if last_of_block is not None:
            levels[-1].append(len(last_of_block))
        if f'encoder.blocks.{i}.conv.conv.conv.weight' in state:  # this one halves the size
            levels.append([])
    if not all(levels): raise ValueError('not a MAISI autoencoder: a level without residual blocks')
    model = ConvVAE(ConvVAEConfig(
        widths=tuple(level[-1] for level in levels), res_blocks=len(levels[0]), layout='maisi',
        in_channels=state[first].shape[1], latent_dim=len(state['post_quant_conv.conv.weight'])))
    names = {'mu_head': 'quant_conv_mu.conv', 'logvar_head': 'quant_conv_log_sigma.conv',
             'post': 'post_quant_conv.conv'}
    for half in ('encoder', 'decoder'):
        for i in range(len(getattr(model, half).blocks)):
            block = f'{half}.blocks.{i}'
            resizes = f'{block}.conv.conv.conv.weight' in state
            names |= renamed(block, block, MAISI_PARTS)
            names[f'{block}.norm'] = block
            names[f'{block}.conv'] = f'{block}.conv.conv.conv' if resizes else f'{block}.conv.conv'
    return fill(model, state, names)

SD_PARTS = {'norm1': 'norm1', 'conv1': 'conv1', 'norm2': 'norm2', 'conv2': 'conv2', 'skip': 'conv_shortcut',
            'norm': 'group_norm', 'qkv': 'qkv', 'proj': 'to_out.0'}
SD_OLD = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}

def sd_order(side, levels, blocks):
    """diffusers' modules of the encoder, side 'down', or the decoder, 'up', in their order."""
    middle = ['mid_block.resnets.0', 'mid_block.attentions.0', 'mid_block.resnets.1']
    stages = []
    for level in range(levels):
        stages += [f'{side}_blocks.{level}.resnets.{k}' for k in range(blocks)]
        if level < levels - 1:
            stages.append(f'{side}_blocks.{level}.{side}samplers.0.conv')
    between = stages + middle if side == 'down' else middle + stages
    return ['conv_in', *between, 'conv_norm_out', 'conv_out']

def load_sd_vae(state_dict):
    """Stable Diffusion's autoencoder in the layout of diffusers' AutoencoderKL -> 2D ConvVAE.

    The network works on (B,3,H,W) in [-1, 1]; reconstruct() and latent() give it grey slices of [0, 1]
    volumes so. Both namings of its attention (to_q, ... and query, ...) are read.
    """
    state = bare(state_dict)
    require(state, 'an AutoencoderKL of diffusers', 'encoder.conv_in.weight', 'quant_conv.weight',
            'encoder.down_blocks.0.resnets.0.conv1.weight', 'post_quant_conv.weight')
    levels = count(state, 'encoder.down_blocks.')
    blocks = count(state, 'encoder.down_blocks.0.resnets.')
    widths = [len(state[f'encoder.down_blocks.{i}.resnets.0.conv1.weight']) for i in range(levels)]
    model = ConvVAE(ConvVAEConfig(
        dims=2, in_channels=state['encoder.conv_in.weight'].shape[1], widths=tuple(widths), res_blocks=blocks,
        layout='sd', latent_dim=len(state['post_quant_conv.weight']), signed=True))
    names = {'post': 'post_quant_conv'}
    for half, side, n in (('encoder', 'down', blocks), ('decoder', 'up', blocks + 1)):
        for i, module in enumerate(sd_order(side, levels, n)):
            ours, theirs = f'{half}.blocks.{i}', f'{half}.{module}'
            if '.resnets.' in module or '.attentions.' in module:
                names |= renamed(ours, theirs, SD_PARTS)
            else:
                names |= {f'{ours}.norm': theirs, f'{ours}.conv': theirs}
    return fill(model, sd_rearranged(state), names)

def sd_rearranged(state):
    """The state with attention named the new way, q, k and v joined, quant_conv cut into two heads."""
    new = {}
    for key, value in state.items():
        if '.attentions.' in key:
            for old, name in SD_OLD.items():
                key = key.replace(f'.{old}.', f'.{name}.')
            value = value.flatten(1) if value.ndim == 4 else value  # once 1x1 convolutions
        new[key] = value
    join_qkv(new)
    for leaf in ('weight', 'bias'):
        if f'quant_conv.{leaf}' in new:
            new[f'mu_head.{leaf}'], new[f'logvar_head.{leaf}'] = new.pop(f'quant_conv.{leaf}').chunk(2)
    return new

# ---------------------------------------------------------------- MAISI's U-Net

# in the order of concatenation
VECTORS = ('top_region_index_layer', 'bottom_region_index_layer', 'spacing_layer', 'meta_layer')
UNET_PARTS = {'norm1': 'norm1', 'conv1': 'conv1.conv', 'emb': 'time_emb_proj', 'norm2': 'norm2',
              'conv2': 'conv2.conv', 'skip': 'skip_connection.conv', 'norm': 'norm', 'qkv': 'attn.qkv',
              'proj': 'attn.out_proj'}

def load_maisi_unet(state_dict):
    """NVIDIA's or DeCo-VAE's MAISI diffusion U-Net -> FlowUNet, its sizes read from the shapes.

    Accepts a bare state dict or one under 'unet' or 'unet_state_dict', with scale_factor and global_mean
    beside it where it is DeCo's. Same velocity, data - noise, of the same x_t: our t is their timestep t' as
    1 - t'/1000. Their class of unknown modality, 0, is also our last, which stands for "not known".
    """
    sd = 1 / float(state_dict.get('scale_factor', 1.0))
    mean = float(state_dict.get('global_mean', 0.0))
    state = bare(state_dict, ('unet', 'unet_state_dict', 'state_dict'))
    require(state, 'a MAISI U-Net', 'conv_in.conv.weight', 'time_embed.0.weight',
            'down_blocks.0.resnets.0.conv1.conv.weight')
    levels = count(state, 'down_blocks.')
    blocks = count(state, 'down_blocks.0.resnets.')
    widths = [len(state[f'down_blocks.{i}.resnets.0.conv1.conv.weight']) for i in range(levels)]
    attention = [f'down_blocks.{i}.attentions.0.norm.weight' in state for i in range(levels)]
    vectors = [name for name in VECTORS if f'{name}.0.weight' in state]
    classes = (len(state['class_embedding.weight']),) if 'class_embedding.weight' in state else ()
    model = FlowUNet(FlowUNetConfig(
        in_channels=state['conv_in.conv.weight'].shape[1], widths=tuple(widths), res_blocks=blocks,
        attention=tuple(attention), vectors=tuple(state[f'{name}.0.weight'].shape[1] for name in vectors),
        classes=classes))
    if classes:
        table = state['class_embedding.weight'].clone()
        table[-1] = table[0]
        state['class_embedding.weight'] = table
    join_qkv(state)
    state['latent_sd'] = torch.full_like(model.latent_sd, sd)
    state['latent_mean'] = torch.full_like(model.latent_mean, mean)

    names = {'conv_in': 'conv_in.conv', 'norm_out': 'out.0', 'conv_out': 'out.2.conv',
             'class_embeddings.0': 'class_embedding', 'time.0': 'time_embed.0', 'time.2': 'time_embed.2'}
    for n, name in enumerate(vectors):
        names |= {f'vector_mlps.{n}.{k}': f'{name}.{k}' for k in (0, 2)}
    modules = {'middle.0': 'middle_block.resnet_1', 'middle.1': 'middle_block.attention',
               'middle.2': 'middle_block.resnet_2'}
    for side in ('down', 'up'):
        for i in range(levels):
            modules[f'{side}.{i}.resampler'] = f'{side}_blocks.{i}.{side}sampler'
            for j in range(blocks + 1):
                modules[f'{side}.{i}.blocks.{j}'] = f'{side}_blocks.{i}.resnets.{j}'
                modules[f'{side}.{i}.attentions.{j}'] = f'{side}_blocks.{i}.attentions.{j}'
    for ours, theirs in modules.items():
        names |= renamed(ours, theirs, UNET_PARTS)
    return fill(model, state, names)

# ---------------------------------------------------------------- LPIPS

class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016): 1x1 to few channels, then 1x1 and 3x3 side by side."""
    def __init__(self, c_in, c_few, c_each):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, c_few, 1)
        self.expand1x1 = nn.Conv2d(c_few, c_each, 1)
        self.expand3x3 = nn.Conv2d(c_few, c_each, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))

def squeezenet():
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool,
        Fire(64, 16, 64), Fire(128, 16, 64), pool,
        Fire(128, 32, 128), Fire(256, 32, 128), pool,
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256))

def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())

def vgg16():
    layers, c_in = [], 3
    for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in stage:
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
            c_in = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])

@dataclass
class Trunk:
    """A network of LPIPS, its layers numbered as in torchvision's `features`."""
    make: callable
    taps: tuple      # layers whose output is compared
    channels: tuple  # their channels
    file: str        # torchvision's

TRUNKS = {
    'squeeze': Trunk(squeezenet, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512),
                     'squeezenet1_1-b8a52dc0.pth'),
    'alex': Trunk(alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 'alexnet-owt-7be5be79.pth'),
    'vgg': Trunk(vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 'vgg16-397923af.pth'),
}

def unit(features):
    """Features (B, C, H, W), of length 1 at every position."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)

class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (Zhang et al. 2018): two (B, 1 or 3, H, W) -> (B,). Frozen, float32.

    net: 'squeeze', 'alex' or 'vgg'. trunk_path: a torchvision checkpoint (features.*). lin_path: the v0.1
    weights of the channels (lin*.model.1.weight). Inputs are taken as they are, not rescaled to [-1, 1] (as
    the released DeCo-VAE does with [0, 1]). Without paths: a trunk drawn from a fixed seed with equal channel
    weights. `random` is then True, and results must be named so: a distance between random features.
    """
    def __init__(self, net='squeeze', trunk_path=None, lin_path=None):
        super().__init__()
        if net not in TRUNKS: raise ValueError(f"LPIPS net '{net}': one of {', '.join(TRUNKS)}")
        trunk = TRUNKS[net]
        self.taps = trunk.taps
        self.random = trunk_path is None and lin_path is None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = trunk.make()
        self.weights = nn.ParameterList(torch.full((c,), 1 / c) for c in trunk.channels)
        for name, values in (('shift', [-0.030, -0.088, -0.188]), ('scale', [0.458, 0.448, 0.450])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        if not self.random:
            what = (f'LPIPS wants https://download.pytorch.org/models/{trunk.file} as --perc_trunk '
                    'and https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/'
                    f'{net}.pth as --perc_lin (of evaluate.py --lpips_trunk and --lpips_lin); '
                    '--w_perc=0 goes without')
            state, lins = read_weights(trunk_path, what), read_weights(lin_path, what)
            fill(self.features, {key[9:]: v for key, v in bare(state).items() if key.startswith('features.')})
            fill(self.weights, {key: v.flatten() for key, v in bare(lins).items()},
                 {str(i): f'lin{i}.model.1.weight' for i in range(len(trunk.channels))})
        self.requires_grad_(False)

    def forward(self, a, b):
        a = (a.float() - self.shift) / self.scale
        b = (b.float() - self.shift) / self.scale
        total, weights = 0.0, iter(self.weights)
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in self.taps:
                difference = (unit(a) - unit(b)).square() * next(weights)[:, None, None]  # (B, C, H, W)
                total = total + difference.sum(1).mean((1, 2))
        return total

# ---------------------------------------------------------------- RadImageNet

class Bottleneck(nn.Module):
    """Keras' ResNet v1 bottleneck: the stride is on the first convolution.

    released: as torchvision's v1.5, with the stride on the 3x3 one and without biases.
    """
    def __init__(self, c_in, c, stride, released):
        super().__init__()
        bias, eps = not released, 1e-5 if released else 1.001e-5
        first, second = (1, stride) if released else (stride, 1)
        self.conv1 = nn.Conv2d(c_in, c, 1, first, bias=bias)
        self.conv2 = nn.Conv2d(c, c, 3, second, 1, bias=bias)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=bias)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(n, eps) for n in (c, c, 4 * c))
        self.downsample = nn.Identity()
        if stride != 1 or c_in != 4 * c:
            conv = nn.Conv2d(c_in, 4 * c, 1, stride, bias=bias)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * c, eps))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))

class RadImageNet(nn.Module):
    """RadImageNet's ResNet-50 (Mei et al. 2022): preprocessed (B,3,H,W) -> (B,2048), means of last maps."""
    def __init__(self, released=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=not released)
        self.bn1 = nn.BatchNorm2d(64, 1e-5 if released else 1.001e-5)
        c_in = 64
        for n, blocks, c in ((1, 3, 64), (2, 4, 128), (3, 6, 256), (4, 3, 512)):
            layer = [Bottleneck(c_in, c, 1 if n == 1 else 2, released)]
            layer += [Bottleneck(4 * c, c, 1, released) for _ in range(blocks - 1)]
            self.add_module(f'layer{n}', nn.Sequential(*layer))
            c_in = 4 * c

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

def radimagenet_input(slices):
    """Slices (B,1,H,W) in [0,1] -> what the network knows: three channels BGR, minus their means."""
    means = torch.tensor([0.406, 0.456, 0.485], device=slices.device)
    return slices.expand(-1, 3, -1, -1) - means.view(1, 3, 1, 1)

def load_radimagenet(path, released=False):
    """RadImageNet-ResNet50_notop.pth (Warvito/radimagenet-models) -> RadImageNet.

    released: as the released DeCo-VAE reads it, into torchvision's layout, which drops the 53 biases and
    moves the strides; only for parity with its numbers.
    """
    what = 'wanted is RadImageNet-ResNet50_notop.pth (github.com/Warvito/radimagenet-models)'
    state = bare(read_weights(path, what))
    if released:
        state = {key: value for key, value in state.items()
                 if not re.search(r'(conv.*|downsample\.0)\.bias$', key)}
    return fill(RadImageNet(released), state).requires_grad_(False)

class RandomFeatures(nn.Module):
    """Slices (B,1,H,W) in [0,1] -> (B,16) by fixed random convolutions, to test the path; no FID."""
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 5, 2, 2), nn.ReLU(),
                nn.Conv2d(64, 16, 3, 2, 1))
        self.requires_grad_(False)

    def forward(self, slices):
        return self.layers(slices).mean((2, 3))

# ---------------------------------------------------------------- SynthSeg

SYNTHSEG_LABELS = (0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 41, 42, 43, 44, 46,
                   47, 49, 50, 51, 52, 53, 54, 58, 60)

def conv_pair(c_in, c_out):
    return nn.ModuleList([nn.Conv3d(c_in, c_out, 3, padding=1), nn.Conv3d(c_out, c_out, 3, padding=1)])

class SynthSeg(nn.Module):
    """SynthSeg's 3D U-Net (Billot et al. 2023): (B,1,D,H,W) in [0,1] -> posteriors (B,33,D,H,W).

    Sides are multiples of 32. Each level ends in one batch norm; skips are taken before it and come first.
    """
    def __init__(self, labels=33, widths=(24, 48, 96, 192, 384)):
        super().__init__()
        back = widths[::-1]
        self.down = nn.ModuleList(conv_pair(a, b) for a, b in zip((1, *widths), widths))
        self.down_norm = nn.ModuleList(nn.BatchNorm3d(c, eps=1e-3) for c in widths)
        self.up = nn.ModuleList(conv_pair(a + b, b) for a, b in zip(back, back[1:]))
        self.up_norm = nn.ModuleList(nn.BatchNorm3d(c, eps=1e-3) for c in back[1:])
        self.likelihood = nn.Conv3d(widths[0], labels, 1)

    def forward(self, x):
        skips = []
        for level, ((first, second), norm) in enumerate(zip(self.down, self.down_norm)):
            if level > 0:
                x = F.max_pool3d(x, 2)
            x = F.elu(second(F.elu(first(x))))
            skips.append(x)
            x = norm(x)
        skips.pop()
        for (first, second), norm in zip(self.up, self.up_norm):
            x = torch.cat([skips.pop(), F.interpolate(x, scale_factor=2)], 1)
            x = norm(F.elu(second(F.elu(first(x)))))
        return self.likelihood(x).softmax(1)

def read_h5(path):
    """{layer/weight: tensor} of a Keras file, kernels in torch's order."""
    try:
        import h5py
    except ImportError:
        raise SystemExit('reading SynthSeg weights needs h5py: pip install h5py')
    state = {}
    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            value = torch.from_numpy(item[()])
            value = value.permute(4, 3, 0, 1, 2).contiguous() if value.ndim == 5 else value
            state['/'.join(name.split('/')[-2:])] = value
    try:
        with h5py.File(path, 'r') as f:
            f.visititems(collect)
    except OSError as e:
        raise SystemExit(f'{path}: not a readable .h5 file ({e}); wanted is synthseg_2.0.h5 '
                         '(github.com/BBillot/SynthSeg)')
    return state

KERAS_NORM = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'moving_mean',
              'running_var': 'moving_variance', 'num_batches_tracked': 'count'}

def load_synthseg(h5_path):
    """synthseg_2.0.h5 (github.com/BBillot/SynthSeg), Keras' layout -> SynthSeg; needs h5py."""
    state = read_h5(h5_path)
    if 'unet_likelihood/bias:0' not in state:
        raise ValueError(f'{h5_path}: not SynthSeg weights: no unet_likelihood')
    names = {}
    def conv(ours, layer):
        names.update({f'{ours}.weight': f'{layer}/kernel:0', f'{ours}.bias': f'{layer}/bias:0'})
    def norm(ours, layer):
        names.update({f'{ours}.{leaf}': f'{layer}/{name}:0' for leaf, name in KERAS_NORM.items()})
        state[f'{layer}/count:0'] = torch.tensor(0)  # Keras keeps none
    for level in range(5):
        for k in (0, 1):
            conv(f'down.{level}.{k}', f'unet_conv_downarm_{level}_{k}')
            conv(f'up.{level}.{k}', f'unet_conv_uparm_{level + 5}_{k}')
        norm(f'down_norm.{level}', f'unet_bn_down_{level}')
    for level in range(4):
        norm(f'up_norm.{level}', f'unet_bn_up_{level}')
    conv('likelihood', 'unet_likelihood')
    return fill(SynthSeg(len(state['unet_likelihood/bias:0'])), state, names).requires_grad_(False)
