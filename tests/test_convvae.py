"""ConvVAE: MONAI's MAISI network with the same weights, slices against volumes, any size, slab by slab."""
import math

import pytest
import torch
import torch.nn.functional as F

from model import Attention, ConvVAE, ConvVAEConfig, model_args, from_checkpoint, step_flops
from pretrained import load_maisi_vae, load_sd_vae

SMALL = dict(widths=(8, 16, 32), res_blocks=1)

def make(**kwargs):
    torch.manual_seed(0)
    return ConvVAE(ConvVAEConfig(**{**SMALL, **kwargs})).eval()

# ---------------------------------------------------------------- MAISI

def monai_maisi(widths=(64, 128, 256), blocks=2):
    networks = pytest.importorskip('monai.apps.generation.maisi.networks.autoencoderkl_maisi')
    torch.manual_seed(1)
    return networks.AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_channels=widths,
        latent_channels=4,
        num_res_blocks=[blocks] * len(widths),
        norm_num_groups=32,
        norm_eps=1e-6,
        attention_levels=[False] * len(widths),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        num_splits=1,
        norm_float16=False,
        print_info=False,
        save_mem=False,
    ).eval()

def test_the_default_has_maisis_parameters():
    model = ConvVAE(ConvVAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 20_944_897 and len(model.state_dict()) == 130
    assert sum(p.numel() for p in (*model.decoder.parameters(), *model.post.parameters())) == 12_131_605
    assert model.latent_shape((128, 256, 128)) == (4, 32, 64, 32)

@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'unet_state_dict': s}, lambda s: {'autoencoder': {f'module.{k}': v for k, v in s.items()}, 'step': 3}])
def test_maisi_weights_give_what_monai_gives(wrap):
    theirs = monai_maisi((32, 64, 96))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.03)
    ours = load_maisi_vae(wrap(theirs.state_dict()))
    x = torch.rand(1, 1, 16, 24, 20)
    with torch.no_grad():
        mu, sigma = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x)[0], mu, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.exp(0.5 * ours.encode(x)[1]), sigma, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.decode(mu), theirs.decode(mu), atol=1e-4, rtol=1e-4)
        torch.manual_seed(7)
        x_hat, mu, _ = theirs(x)
        torch.manual_seed(7)
        torch.testing.assert_close(ours(x)['x_hat'], x_hat, atol=1e-4, rtol=1e-4)

def test_maisi_weights_of_full_size_load_and_agree():
    theirs = monai_maisi()
    ours = load_maisi_vae(theirs.state_dict())
    assert ours.config == ConvVAEConfig()
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.decode(ours.encode(x)[0]), theirs.decode(theirs.encode(x)[0]), atol=1e-4, rtol=1e-4
        )

def test_weights_that_do_not_fit_are_refused_by_name():
    state = monai_maisi((32, 64, 96)).state_dict()
    for change, words in (
        (lambda s: s.pop('decoder.blocks.1.norm1.weight'), 'missing decoder.blocks.1.norm1.weight'),
        (lambda s: s.update(extra=torch.zeros(1)), 'unexpected extra'),
        (
            lambda s: s.update({'decoder.blocks.1.norm1.weight': torch.zeros(7)}),
            r'decoder.blocks.1.norm1.weight \(7,\) instead of \(96,\)',
        ),
        (lambda s: s.clear(), 'not a MAISI autoencoder'),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=words):
            load_maisi_vae(changed)

# ---------------------------------------------------------------- Stable Diffusion's layout

def sd_state(widths=(32, 64, 64), latent=4, old=False):
    """Random weights under diffusers' names, written out from its layout."""
    g = torch.Generator().manual_seed(0)
    state = {}
    def put(name, *shape):
        state[name] = torch.randn(*shape, generator=g) * 0.1 + ('norm' in name and name.endswith('weight'))
    def conv(name, c_in, c_out, k=3):
        put(f'{name}.weight', c_out, c_in, k, k), put(f'{name}.bias', c_out)
    def norm(name, c):
        put(f'{name}.weight', c), put(f'{name}.bias', c)
    def res(name, a, b):
        norm(f'{name}.norm1', a), conv(f'{name}.conv1', a, b), norm(f'{name}.norm2', b), conv(
            f'{name}.conv2', b, b
        )
        if a != b:
            conv(f'{name}.conv_shortcut', a, b, 1)
    def mid(half, c):
        res(f'{half}.mid_block.resnets.0', c, c), res(f'{half}.mid_block.resnets.1', c, c)
        norm(f'{half}.mid_block.attentions.0.group_norm', c)
        for p in ('query', 'key', 'value', 'proj_attn') if old else ('to_q', 'to_k', 'to_v', 'to_out.0'):
            put(f'{half}.mid_block.attentions.0.{p}.weight', c, c), put(
                f'{half}.mid_block.attentions.0.{p}.bias', c
            )
    conv('encoder.conv_in', 3, widths[0])
    for i, (a, b) in enumerate(zip((widths[0], *widths), widths)):
        res(f'encoder.down_blocks.{i}.resnets.0', a, b), res(f'encoder.down_blocks.{i}.resnets.1', b, b)
        if i < len(widths) - 1:
            conv(f'encoder.down_blocks.{i}.downsamplers.0.conv', b, b)
    mid('encoder', widths[-1]), norm('encoder.conv_norm_out', widths[-1]), conv(
        'encoder.conv_out', widths[-1], 2 * latent
    )
    conv('quant_conv', 2 * latent, 2 * latent, 1), conv('post_quant_conv', latent, latent, 1)
    back = widths[::-1]
    conv('decoder.conv_in', latent, back[0]), mid('decoder', back[0])
    for i, (a, b) in enumerate(zip((back[0], *back), back)):
        for k in range(3):
            res(f'decoder.up_blocks.{i}.resnets.{k}', a if k == 0 else b, b)
        if i < len(back) - 1:
            conv(f'decoder.up_blocks.{i}.upsamplers.0.conv', b, b)
    norm('decoder.conv_norm_out', back[-1]), conv('decoder.conv_out', back[-1], 3)
    return state

def sd_functional(s, x):
    """Mean, log-variance and decoded mean, straight from the names of diffusers' layout."""
    conv = lambda n, x, **kw: F.conv2d(x, s[f'{n}.weight'], s[f'{n}.bias'], **kw)
    norm = lambda n, x: F.group_norm(x, 32, s[f'{n}.weight'], s[f'{n}.bias'], 1e-6)
    def res(n, x):
        h = conv(f'{n}.conv1', F.silu(norm(f'{n}.norm1', x)), padding=1)
        h = conv(f'{n}.conv2', F.silu(norm(f'{n}.norm2', h)), padding=1)
        return h + (conv(f'{n}.conv_shortcut', x) if f'{n}.conv_shortcut.weight' in s else x)
    def mid(half, x):
        x, n = res(f'{half}.mid_block.resnets.0', x), f'{half}.mid_block.attentions.0'
        t = norm(f'{n}.group_norm', x).flatten(2).transpose(1, 2)
        q, k, v = (t @ s[f'{n}.to_{p}.weight'].T + s[f'{n}.to_{p}.bias'] for p in 'qkv')
        y = (
            torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
            @ v
            @ s[f'{n}.to_out.0.weight'].T
            + s[f'{n}.to_out.0.bias']
        )
        return res(f'{half}.mid_block.resnets.1', x + y.transpose(1, 2).view_as(x))
    levels = 1 + max(int(k.split('.')[2]) for k in s if k.startswith('encoder.down_blocks'))
    h = conv('encoder.conv_in', x, padding=1)
    for i in range(levels):
        for k in range(2):
            h = res(f'encoder.down_blocks.{i}.resnets.{k}', h)
        if i < levels - 1:
            h = conv(f'encoder.down_blocks.{i}.downsamplers.0.conv', F.pad(h, (0, 1, 0, 1)), stride=2)
    h = conv('encoder.conv_out', F.silu(norm('encoder.conv_norm_out', mid('encoder', h))), padding=1)
    mu, logvar = conv('quant_conv', h).chunk(2, 1)
    h = mid('decoder', conv('decoder.conv_in', conv('post_quant_conv', mu), padding=1))
    for i in range(levels):
        for k in range(3):
            h = res(f'decoder.up_blocks.{i}.resnets.{k}', h)
        if i < levels - 1:
            h = conv(
                f'decoder.up_blocks.{i}.upsamplers.0.conv',
                F.interpolate(h, scale_factor=2, mode='nearest'),
                padding=1,
            )
    return mu, logvar, conv('decoder.conv_out', F.silu(norm('decoder.conv_norm_out', h)), padding=1)

def test_stable_diffusion_weights_give_what_their_layout_says():
    state, x = sd_state(), torch.rand(2, 3, 16, 24) * 2 - 1
    model = load_sd_vae(state)
    mu, logvar, x_hat = sd_functional(state, x)
    with torch.no_grad():
        ours = model.encode(x)
        torch.testing.assert_close(ours[0], mu, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours[1], logvar.clamp(-30, 20), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.decode(mu), x_hat, atol=1e-4, rtol=1e-4)
        old = load_sd_vae(sd_state(old=True))
        torch.testing.assert_close(old.encode(x)[0], mu, atol=1e-4, rtol=1e-4)
        volume = torch.rand(1, 1, 8, 12, 5)
        slice_2 = (2 * volume[..., 2] - 1).expand(-1, 3, -1, -1)
        want = (model.decode(model.encode(F.pad(slice_2, (0, 0, 0, 0)))[0]).mean(1, keepdim=True) + 1) / 2
        torch.testing.assert_close(model.reconstruct(volume)[..., 2], want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='missing decoder.conv_in.weight'):
        load_sd_vae({k: v for k, v in state.items() if k != 'decoder.conv_in.weight'})

def test_the_sd_layout_at_full_width_has_stable_diffusions_parameters():
    with torch.device('meta'):
        model = ConvVAE(ConvVAEConfig(dims=2, in_channels=3, widths=(128, 256, 512, 512), layout='sd'))
    assert sum(p.numel() for p in model.parameters()) == 83_653_863

# ---------------------------------------------------------------- sizes, slices, slabs

@pytest.mark.parametrize('config', [{}, dict(layout='sd'), dict(layout='sd', dims=2), dict(dims=2, slice_axis=0),
                                    dict(bottleneck='vq', num_codes=8), dict(dims=2, bottleneck='vq', num_codes=8, num_codebooks=2)])
def test_reconstruct_and_latent_take_volumes_of_any_size(config):
    model, x = make(**config), torch.rand(2, 1, 13, 18, 15)
    if hasattr(model, 'quantizer'):
        model.train()(model.prepare(x)), model.eval()
    with torch.no_grad():
        assert model.reconstruct(x).shape == x.shape
        z = model.latent(x)
        assert tuple(z.shape[1:]) == model.latent_shape(x.shape[2:])
        if hasattr(model, 'quantizer'):
            tokens = model.tokens(x)
            torch.testing.assert_close(
                model.from_tokens(tokens)[:, :, :13, :18, :15], model.reconstruct(x), atol=1e-5, rtol=1e-5
            )
            assert tokens.shape[-3:] == z.shape[2:] and (tokens.ndim == 5) == (model.config.num_codebooks > 1)
        # zeros at the far ends are what a volume that divides would hold
        whole = F.pad(x, (0, 1, 0, 2, 0, 3))
        if model.config.dims == 3:
            torch.testing.assert_close(
                model.reconstruct(whole)[:, :, :13, :18, :15], model.reconstruct(x), atol=1e-5, rtol=1e-5
            )
    numbers = z[0].numel() * 16
    if hasattr(model, 'quantizer'):
        numbers = z[0, 0].numel() * 3 * model.config.num_codebooks
    assert model.bits_per_volume(x.shape[2:]) == numbers

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_2d_model_on_a_volume_equals_slice_by_slice(axis):
    model, x = make(dims=2, slice_axis=axis), torch.rand(1, 1, 20, 20, 20)
    with torch.no_grad():
        want = torch.stack([model.decode(model.encode(s)[0]) for s in x.unbind(2 + axis)], 2 + axis)
        torch.testing.assert_close(model.reconstruct(x), want, atol=1e-5, rtol=1e-5)
        single = x.narrow(2 + axis, 3, 1)  # a training batch: 5-D with one axis of length 1
        assert model(single)['x_hat'].shape == single.shape

@pytest.mark.parametrize('config', [{}, dict(layout='sd'), dict(widths=(8, 8, 8, 8)), dict(bottleneck='vq', num_codes=8)])
@pytest.mark.parametrize('slab', [1, 3, 100])
def test_slab_by_slab_equals_the_whole_to_1e_5(config, slab):
    model, x = make(**config), torch.rand(1, 1, 24, 16, 8)
    for p in model.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.1)
    if hasattr(model, 'quantizer'):
        torch.nn.init.normal_(model.quantizer.codebook)
    with torch.no_grad():
        whole, parts = model.reconstruct(x), model.reconstruct(x, slab=slab)
        torch.testing.assert_close(parts, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-5)
        torch.testing.assert_close(model.latent(x, slab=slab), model.latent(x), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('config', [{}, dict(layout='sd', dims=2), dict(bottleneck='vq', num_codes=8),
                                    dict(dims=2, slice_axis=1, bottleneck='vq', num_codes=8, num_codebooks=2)])
@torch.no_grad()
def test_analyse_gives_what_each_method_gives_bit_for_bit(config):
    model, x = make(**config), torch.rand(2, 1, 13, 18, 15)
    if model.config.bottleneck == 'vq':
        model.train()(model.prepare(x))
        model.eval()
    out = model.analyse(x)
    mean, logvar = model.posterior(x)
    assert torch.equal(out['mean'], mean)
    assert torch.equal(out['latent'], model.latent(x))
    assert torch.equal(out['x_hat'], model.reconstruct(x))
    if model.config.bottleneck == 'vq':
        assert out['logvar'] is None and logvar is None
        assert torch.equal(out['tokens'], model.tokens(x))
    else:
        assert torch.equal(out['logvar'], logvar)
        assert out['tokens'] is None

def test_analyse_encodes_and_decodes_once():
    model, calls = make(bottleneck='vq', num_codes=8), []
    model.encoder.register_forward_hook(lambda *_: calls.append('encoder'))
    model.decoder.register_forward_hook(lambda *_: calls.append('decoder'))
    model.analyse(torch.rand(1, 1, 16, 16, 16))
    assert calls == ['encoder', 'decoder']

def test_encode_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match='multiple of 4'):
        make().encode(torch.rand(1, 1, 16, 18, 16))

@pytest.mark.parametrize('config', [dict(dims=4), dict(bottleneck='ae'), dict(layout='unet'),
                                    dict(bottleneck='vq', num_codebooks=3, codebooks='split'), dict(bottleneck='vq', num_codebooks=2, codebooks='sum')])
def test_configs_that_make_no_sense_are_refused(config):
    with pytest.raises(ValueError):
        make(**config)

def test_the_sample_has_the_posteriors_mean_and_sd():
    model, x = make(), torch.rand(1, 1, 8, 8, 8).expand(400, -1, -1, -1, -1)
    with torch.no_grad():
        out = model(x)
    sigma = torch.exp(0.5 * out['logvar'][0])
    assert ((out['z'].mean(0) - out['mu'][0]).abs() < 5 * sigma / 20).all()
    assert ((out['z'].std(0) / sigma - 1).abs() < 0.25).all()

def test_attention_equals_torchs():
    layer, x = Attention(32, head_width=8), torch.randn(2, 32, 3, 4)
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    reference.load_state_dict({
        'in_proj_weight': layer.qkv.weight,
        'in_proj_bias': layer.qkv.bias,
        'out_proj.weight': layer.proj.weight,
        'out_proj.bias': layer.proj.bias,
    })
    t = layer.norm(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(x), x + reference(t, t, t)[0].transpose(1, 2).view_as(x))

def test_a_checkpoint_brings_the_same_model_back():
    model = make(bottleneck='vq', num_codebooks=2, num_codes=8)
    again = from_checkpoint({'model_args': model_args(model), 'model': model.state_dict(), 'ema': None})
    assert again.config == model.config and all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert all(v > 0 for v in step_flops(make(dims=2), (1, 16, 16)))
