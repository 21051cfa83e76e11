"""ConvVAE against MONAI's MAISI and Stable Diffusion's layout, slices against volumes, any size."""
import math

import pytest
import torch
import torch.nn.functional as F

from judge.cost import vae_flops
from layers import Attention, depth_to_space, space_to_depth
from model import ConvVAE, ConvVAEConfig, from_checkpoint, model_args
from pretrained import load_maisi_vae, load_sd_vae

def small(**kwargs):
    torch.manual_seed(0)
    return ConvVAE(ConvVAEConfig(**{'widths': (8, 16, 32), 'res_blocks': 1, **kwargs})).eval()

def with_codebook(model, x):
    """The model in eval mode; if it has a codebook, begun on x."""
    if model.config.bottleneck == 'vq':
        model.train()
        model(torch.cat(model.cut(model.prepare(x))))
    return model.eval()

def assert_near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

# ---------------------------------------------------------------- MAISI

def monai_maisi(widths=(64, 128, 256), blocks=2):
    networks = pytest.importorskip('monai.apps.generation.maisi.networks.autoencoderkl_maisi')
    torch.manual_seed(1)
    n = len(widths)
    levels = dict(num_channels=widths, num_res_blocks=[blocks] * n, attention_levels=[False] * n)
    return networks.AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, norm_num_groups=32, norm_eps=1e-6,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, num_splits=1, norm_float16=False,
        print_info=False, save_mem=False, **levels).eval()

def random_maisi():
    """MONAI's network, narrow, in which nothing starts at zero."""
    theirs = monai_maisi((32, 64, 96))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.03)
    return theirs

def bare(state):
    return state

def under_unet_state_dict(state):
    return {'unet_state_dict': state}

def under_autoencoder(state):
    return {'autoencoder': {f'module.{name}': tensor for name, tensor in state.items()}, 'step': 3}

def test_the_default_has_maisis_parameters():
    model = ConvVAE(ConvVAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 20_944_897 and len(model.state_dict()) == 130
    assert sum(p.numel() for p in (*model.decoder.parameters(), *model.post.parameters())) == 12_131_605
    assert model.latent_shape((128, 256, 128)) == (4, 32, 64, 32)

@pytest.mark.parametrize('wrap', [bare, under_unet_state_dict, under_autoencoder])
@torch.no_grad()
def test_maisi_weights_give_what_monai_gives(wrap):
    theirs, x = random_maisi(), torch.rand(1, 1, 16, 24, 20)
    ours = load_maisi_vae(wrap(theirs.state_dict()))
    mu, sigma = theirs.encode(x)
    assert_near(ours.encode(x)[0], mu, 1e-4)
    assert_near(torch.exp(0.5 * ours.encode(x)[1]), sigma, 1e-4)
    assert_near(ours.decode(mu), theirs.decode(mu), 1e-4)

@torch.no_grad()
def test_a_sample_of_maisi_weights_is_the_one_that_monai_draws():
    theirs, x = random_maisi(), torch.rand(1, 1, 16, 24, 20)
    ours = load_maisi_vae(theirs.state_dict())
    torch.manual_seed(7)
    x_hat, _, _ = theirs(x)
    torch.manual_seed(7)
    assert_near(ours(x)['x_hat'], x_hat, 1e-4)

@torch.no_grad()
def test_maisi_weights_of_full_size_load_and_agree():
    theirs, x = monai_maisi(), torch.rand(1, 1, 16, 16, 16)
    ours = load_maisi_vae(theirs.state_dict())
    assert ours.config == ConvVAEConfig()
    assert_near(ours.decode(ours.encode(x)[0]), theirs.decode(theirs.encode(x)[0]), 1e-4)

NAME = 'decoder.blocks.1.norm1.weight'

def lose_one(state):
    del state[NAME]

def add_one(state):
    state['extra'] = torch.zeros(1)

def change_a_shape(state):
    state[NAME] = torch.zeros(7)

def lose_all(state):
    state.clear()

@pytest.mark.parametrize('change, words', [
    (lose_one, f'missing {NAME}'), (add_one, 'unexpected extra'), (lose_all, 'not a MAISI autoencoder'),
    (change_a_shape, rf'{NAME} \(7,\) instead of \(96,\)')])
def test_weights_that_do_not_fit_are_refused_by_name(change, words):
    state = dict(monai_maisi((32, 64, 96)).state_dict())
    change(state)
    with pytest.raises(ValueError, match=words):
        load_maisi_vae(state)

# ---------------------------------------------------------------- Stable Diffusion's layout

class SDState:
    """state: random weights under diffusers' names, written out from its layout. old: its old names."""
    def __init__(self, widths=(32, 64, 64), latent=4, old=False):
        self.generator = torch.Generator().manual_seed(0)
        self.state = {}
        self.attention_parts = ('to_q', 'to_k', 'to_v', 'to_out.0')
        if old:
            self.attention_parts = ('query', 'key', 'value', 'proj_attn')
        self.conv('encoder.conv_in', 3, widths[0])
        c = widths[0]
        for i, width in enumerate(widths):
            for k in range(2):
                self.res(f'encoder.down_blocks.{i}.resnets.{k}', c, width)
                c = width
            if i < len(widths) - 1:
                self.conv(f'encoder.down_blocks.{i}.downsamplers.0.conv', width, width)
        self.middle('encoder', c)
        self.norm('encoder.conv_norm_out', c)
        self.conv('encoder.conv_out', c, 2 * latent)
        self.conv('quant_conv', 2 * latent, 2 * latent, 1)
        self.conv('post_quant_conv', latent, latent, 1)
        self.conv('decoder.conv_in', latent, c)
        self.middle('decoder', c)
        for i, width in enumerate(reversed(widths)):
            for k in range(3):
                self.res(f'decoder.up_blocks.{i}.resnets.{k}', c, width)
                c = width
            if i < len(widths) - 1:
                self.conv(f'decoder.up_blocks.{i}.upsamplers.0.conv', width, width)
        self.norm('decoder.conv_norm_out', c)
        self.conv('decoder.conv_out', c, 3)

    def put(self, name, *shape):
        values = torch.randn(*shape, generator=self.generator) * 0.1
        self.state[name] = values + ('norm' in name and name.endswith('weight'))

    def conv(self, name, c_in, c_out, k=3):
        self.put(f'{name}.weight', c_out, c_in, k, k)
        self.put(f'{name}.bias', c_out)

    def norm(self, name, c):
        self.put(f'{name}.weight', c)
        self.put(f'{name}.bias', c)

    def res(self, name, c_in, c_out):
        self.norm(f'{name}.norm1', c_in)
        self.conv(f'{name}.conv1', c_in, c_out)
        self.norm(f'{name}.norm2', c_out)
        self.conv(f'{name}.conv2', c_out, c_out)
        if c_in != c_out:
            self.conv(f'{name}.conv_shortcut', c_in, c_out, 1)

    def middle(self, half, c):
        self.res(f'{half}.mid_block.resnets.0', c, c)
        self.res(f'{half}.mid_block.resnets.1', c, c)
        self.norm(f'{half}.mid_block.attentions.0.group_norm', c)
        for part in self.attention_parts:
            self.put(f'{half}.mid_block.attentions.0.{part}.weight', c, c)
            self.put(f'{half}.mid_block.attentions.0.{part}.bias', c)

class SDFunctional:
    """Stable Diffusion's autoencoder straight from the names of diffusers' layout."""
    def __init__(self, state):
        self.state = state
        blocks = [name for name in state if name.startswith('encoder.down_blocks')]
        self.levels = 1 + max(int(name.split('.')[2]) for name in blocks)

    def encode(self, x):
        """-> mean, log-variance."""
        h = self.conv('encoder.conv_in', x, padding=1)
        for i in range(self.levels):
            for k in range(2):
                h = self.res(f'encoder.down_blocks.{i}.resnets.{k}', h)
            if i < self.levels - 1:
                h = F.pad(h, (0, 1, 0, 1))
                h = self.conv(f'encoder.down_blocks.{i}.downsamplers.0.conv', h, stride=2)
        h = F.silu(self.norm('encoder.conv_norm_out', self.middle('encoder', h)))
        return self.conv('quant_conv', self.conv('encoder.conv_out', h, padding=1)).chunk(2, 1)

    def decode(self, z):
        h = self.conv('decoder.conv_in', self.conv('post_quant_conv', z), padding=1)
        h = self.middle('decoder', h)
        for i in range(self.levels):
            for k in range(3):
                h = self.res(f'decoder.up_blocks.{i}.resnets.{k}', h)
            if i < self.levels - 1:
                h = F.interpolate(h, scale_factor=2, mode='nearest')
                h = self.conv(f'decoder.up_blocks.{i}.upsamplers.0.conv', h, padding=1)
        return self.conv('decoder.conv_out', F.silu(self.norm('decoder.conv_norm_out', h)), padding=1)

    def conv(self, name, x, **kwargs):
        return F.conv2d(x, self.state[f'{name}.weight'], self.state[f'{name}.bias'], **kwargs)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f'{name}.weight'], self.state[f'{name}.bias'], 1e-6)

    def linear(self, name, x):
        return F.linear(x, self.state[f'{name}.weight'], self.state[f'{name}.bias'])

    def res(self, name, x):
        h = self.conv(f'{name}.conv1', F.silu(self.norm(f'{name}.norm1', x)), padding=1)
        h = self.conv(f'{name}.conv2', F.silu(self.norm(f'{name}.norm2', h)), padding=1)
        if f'{name}.conv_shortcut.weight' in self.state:
            x = self.conv(f'{name}.conv_shortcut', x)
        return h + x

    def middle(self, half, x):
        x = self.res(f'{half}.mid_block.resnets.0', x)
        name = f'{half}.mid_block.attentions.0'
        rows = self.norm(f'{name}.group_norm', x).flatten(2).transpose(1, 2)
        q, k, v = [self.linear(f'{name}.to_{part}', rows) for part in 'qkv']
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        y = self.linear(f'{name}.to_out.0', weights @ v)
        return self.res(f'{half}.mid_block.resnets.1', x + y.transpose(1, 2).view_as(x))

@torch.no_grad()
def test_stable_diffusion_weights_give_what_their_layout_says():
    state, x = SDState().state, torch.rand(2, 3, 16, 24) * 2 - 1
    model, reference = load_sd_vae(state), SDFunctional(state)
    mu, logvar = reference.encode(x)
    ours = model.encode(x)
    assert_near(ours[0], mu, 1e-4)
    assert_near(ours[1], logvar.clamp(-30, 20), 1e-4)
    assert_near(model.decode(mu), reference.decode(mu), 1e-4)

@torch.no_grad()
def test_stable_diffusion_weights_under_their_old_names_are_the_same():
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    old, new = load_sd_vae(SDState(old=True).state), load_sd_vae(SDState().state)
    assert_near(old.encode(x)[0], new.encode(x)[0], 1e-4)

@torch.no_grad()
def test_stable_diffusion_reconstructs_a_volume_slice_by_slice_in_its_own_range():
    model, volume = load_sd_vae(SDState().state), torch.rand(1, 1, 8, 12, 5)
    image = (2 * volume[..., 2] - 1).expand(-1, 3, -1, -1)
    expected = (model.decode(model.encode(image)[0]).mean(1, keepdim=True) + 1) / 2
    assert_near(model.reconstruct(volume)[..., 2], expected, 1e-4)

@torch.no_grad()
def test_training_sees_slices_as_stable_diffusion_does():
    model, volume = load_sd_vae(SDState().state).eval(), torch.rand(2, 1, 8, 16, 1)
    model.logvar_head.weight.zero_()
    model.logvar_head.bias.fill_(-30)  # no noise
    assert_near(model(volume)['x_hat'], model.reconstruct(volume), 1e-4)

def test_stable_diffusion_weights_with_a_part_missing_are_refused():
    state = SDState().state
    del state['decoder.conv_in.weight']
    with pytest.raises(ValueError, match='missing decoder.conv_in.weight'):
        load_sd_vae(state)

def test_the_sd_layout_at_full_width_has_stable_diffusions_parameters():
    with torch.device('meta'):
        model = ConvVAE(ConvVAEConfig(dims=2, in_channels=3, widths=(128, 256, 512, 512), layout='sd'))
    assert sum(p.numel() for p in model.parameters()) == 83_653_863

# ---------------------------------------------------------------- sizes and slices

CONFIGS = [{}, dict(layout='sd'), dict(layout='sd', dims=2), dict(dims=2, slice_axis=0),
           dict(bottleneck='vq', num_codes=8), dict(dims=2, bottleneck='vq', num_codes=8, num_codebooks=2)]
VQ = [config for config in CONFIGS if 'bottleneck' in config]

@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_reconstruct_and_latent_take_volumes_of_any_size(config):
    x = torch.rand(2, 1, 13, 18, 15)
    model = with_codebook(small(**config), x)
    assert model.reconstruct(x).shape == x.shape
    assert model.latent(x).shape == (2, *model.latent_shape(x.shape[2:]))

@pytest.mark.parametrize('config', VQ)
@torch.no_grad()
def test_tokens_decode_to_the_reconstruction(config):
    x = torch.rand(2, 1, 13, 18, 15)
    model = with_codebook(small(**config), x)
    tokens = model.tokens(x)
    assert tokens.shape[-3:] == model.latent(x).shape[2:]
    assert (tokens.ndim == 5) == (model.config.num_codebooks > 1)
    assert_near(model.from_tokens(tokens)[:, :, :13, :18, :15], model.reconstruct(x))

@pytest.mark.parametrize('config', [config for config in CONFIGS if 'dims' not in config])
@torch.no_grad()
def test_zeros_at_the_far_ends_are_what_a_volume_that_divides_would_hold(config):
    x = torch.rand(2, 1, 13, 18, 15)
    model = with_codebook(small(**config), x)
    whole = F.pad(x, (0, 1, 0, 2, 0, 3))
    assert_near(model.reconstruct(whole)[:, :, :13, :18, :15], model.reconstruct(x))

@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_bits_are_16_a_number_or_3_for_a_code_of_8(config):
    model, x = small(**config), torch.rand(1, 1, 13, 18, 15)
    z = model.posterior(x)[0][0]
    bits = 16 * z.numel()
    if config in VQ:
        bits = 3 * z[0].numel() * model.config.num_codebooks
    assert model.bits_per_volume(x.shape[2:]) == bits

@pytest.mark.parametrize('axis', [0, 1, 2])
@torch.no_grad()
def test_a_2d_model_on_a_volume_equals_slice_by_slice(axis):
    model, x = small(dims=2, slice_axis=axis), torch.rand(1, 1, 20, 20, 20)
    slices = [model.decode(model.encode(image)[0]) for image in x.unbind(2 + axis)]
    assert_near(model.reconstruct(x), torch.stack(slices, 2 + axis))

@pytest.mark.parametrize('axis', [0, 1, 2])
@torch.no_grad()
def test_a_2d_model_takes_a_training_batch_of_slices_with_an_axis_of_length_1(axis):
    x = torch.rand(1, 1, 20, 20, 20).narrow(2 + axis, 3, 1)
    assert small(dims=2, slice_axis=axis)(x)['x_hat'].shape == x.shape

@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_analyse_gives_what_each_method_gives_bit_for_bit(config):
    x = torch.rand(2, 1, 13, 18, 15)
    model = with_codebook(small(**config), x)
    out = model.analyse(x)
    mean, logvar = model.posterior(x)
    assert torch.equal(out['mean'], mean)
    assert torch.equal(out['latent'], model.latent(x))
    assert torch.equal(out['x_hat'], model.reconstruct(x))
    if config in VQ:
        assert out['logvar'] is None and logvar is None
        assert torch.equal(out['tokens'], model.tokens(x))
    else:
        assert torch.equal(out['logvar'], logvar)
        assert out['tokens'] is None

def test_analyse_encodes_and_decodes_once_and_tokens_do_not_decode():
    model, x, calls = small(bottleneck='vq', num_codes=8), torch.rand(1, 1, 16, 16, 16), []
    model.encoder.register_forward_hook(lambda *_: calls.append('encoder'))
    model.decoder.register_forward_hook(lambda *_: calls.append('decoder'))
    model.analyse(x)
    assert calls == ['encoder', 'decoder']
    model.tokens(x)
    assert calls == ['encoder', 'decoder', 'encoder']

# ---------------------------------------------------------------- the rest

def test_blocks_of_voxels_become_channels_and_come_back():
    x = torch.rand(2, 3, 4, 6, 8)
    folded = space_to_depth(x)
    assert torch.equal(depth_to_space(folded), x)
    assert torch.equal(folded[:, :8, 1, 2, 3].view(2, 2, 2, 2), x[:, 0, 2:4, 4:6, 6:8])

@torch.no_grad()
def test_without_norm_a_patch_is_coded_as_that_part_of_the_volume():
    """Group norm sees the statistics of the patch, and codes it otherwise."""
    x = torch.rand(1, 1, 64, 16, 16)
    for norm, equal in (('none', True), ('group', False)):
        model = small(layout='fold', norm=norm, widths=(8, 16))
        inside = model.latent(x)[:, :, 4:8]
        of_patch = model.latent(x[:, :, :56])[:, :, 4:8]
        assert torch.allclose(inside, of_patch, atol=1e-6) == equal

@pytest.mark.parametrize('seed', range(4))
def test_a_folded_network_begins_with_all_of_its_channels(seed):
    """Its two square heads turn the latent and weaken no direction of it."""
    torch.manual_seed(seed)
    model = ConvVAE(ConvVAEConfig(layout='fold', norm='none', widths=(8, 16)))
    heads = model.post.weight.flatten(1) @ model.mu_head.weight.flatten(1)
    torch.testing.assert_close(heads @ heads.T, torch.eye(4))

def test_encode_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match='multiple of 4'):
        small().encode(torch.rand(1, 1, 16, 18, 16))

def test_an_autoencoder_without_codes_has_no_tokens():
    with pytest.raises(ValueError, match="bottleneck='kl' has no tokens"):
        small().tokens(torch.rand(1, 1, 16, 16, 16))

@pytest.mark.parametrize('config', [
    dict(dims=4), dict(bottleneck='ae'), dict(layout='unet'),
    dict(bottleneck='vq', num_codebooks=3, codebooks='split'),
    dict(bottleneck='vq', num_codebooks=2, codebooks='sum')])
def test_configs_that_make_no_sense_are_refused(config):
    with pytest.raises(ValueError):
        small(**config)

@torch.no_grad()
def test_the_sample_has_the_posteriors_mean_and_sd():
    out = small()(torch.rand(1, 1, 8, 8, 8).expand(400, -1, -1, -1, -1))
    sigma = torch.exp(0.5 * out['logvar'][0])
    assert ((out['z'].mean(0) - out['mu'][0]).abs() < 5 * sigma / 20).all()
    assert ((out['z'].std(0) / sigma - 1).abs() < 0.25).all()

def test_attention_equals_torchs():
    layer, x = Attention(32, head_width=8), torch.randn(2, 32, 3, 4)
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict({
        'in_proj_weight': layer.qkv.weight, 'in_proj_bias': layer.qkv.bias,
        'out_proj.weight': layer.proj.weight, 'out_proj.bias': layer.proj.bias})
    rows = layer.norm(x).flatten(2).transpose(1, 2)
    expected = reference(rows, rows, rows)[0].transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x), x + expected)

def test_a_checkpoint_brings_the_same_model_back():
    model = small(bottleneck='vq', num_codebooks=2, num_codes=8)
    twin = from_checkpoint({'model_args': model_args(model), 'model': model.state_dict(), 'ema': None})
    assert twin.config == model.config
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values()):
        assert torch.equal(ours, theirs)

def test_a_model_of_slices_has_a_cost_of_encoding_and_of_decoding():
    assert min(vae_flops(small(dims=2), (1, 16, 16))) > 0
