"""NeuroQuant's parts against torch's own, plane by plane, and its promises about shape, start and state."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from judge.cost import vae_flops
from layers import (AxialAttention, Conv, Conv3d, ResBlock, depth_to_space, double, double_axes, halve,
                    space_to_depth)
from model import NeuroQuant, NeuroQuantConfig, from_checkpoint, model_args

TINY = dict(widths=(16, 16, 16, 16), anat_dim=8, mod_dim=4, modality_dim=4, num_codes=16)

def tiny(**kwargs):
    torch.manual_seed(0)
    return NeuroQuant(NeuroQuantConfig(**TINY | kwargs))

def with_random_film(model):
    """The model, its FiLM no longer the identity."""
    for mlp in model.film_mlp.mlps:
        nn.init.normal_(mlp[-1].weight, std=0.1)
    return model

def trained(**kwargs):
    """A tiny model in eval mode whose codebook has begun and whose FiLM does something."""
    model = tiny(**kwargs).train()
    model(torch.rand(2, 1, 32, 48, 32), torch.tensor([0, 1]))
    if model.config.film:
        with_random_film(model)
    return model.eval()

def with_random_projection(attention):
    nn.init.normal_(attention.proj.weight, std=0.1)
    nn.init.normal_(attention.proj.bias, std=0.1)
    return attention

def without(size, axis):
    """size with 1 along the axis."""
    size = list(size)
    size[axis] = 1
    return size

def stacked(slices, axis, n):
    """Slices (B, C, D, H, W) that lack the axis -> the volume that repeats them n times along it."""
    size = list(slices.shape)
    size[2 + axis] = n
    return slices.expand(*size)

# ---------------------------------------------------------------- convolution

SHAPES = [((8, 10, 6), dict(padding=1)), ((8, 10, 6), dict(padding=1, stride=2, bias=False)),
          ((3, 3, 3), dict(padding=1))]

@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('shape, kwargs', SHAPES)
def test_conv3d_gives_what_torchs_gives(batch, shape, kwargs):
    plain, ours = nn.Conv3d(5, 7, 3, **kwargs), Conv3d(5, 7, 3, **kwargs)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(batch, 5, *shape, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), plain(b), rtol=1e-5, atol=1e-5)
    ours(a).square().sum().backward()
    plain(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)

# ---------------------------------------------------------------- attention

@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('channels', [24, 64])
def test_axial_attention_equals_torch_multihead_on_the_reshaped_tensor(axis, channels):
    torch.manual_seed(0)
    ours = with_random_projection(AxialAttention(channels, axis))
    theirs = nn.MultiheadAttention(channels, ours.n_head, batch_first=True)
    theirs.in_proj_weight.data = ours.qkv.weight.data
    theirs.in_proj_bias.data = ours.qkv.bias.data
    theirs.out_proj.weight.data = ours.proj.weight.data
    theirs.out_proj.bias.data = ours.proj.bias.data
    x = torch.randn(2, channels, 4, 6, 5)
    rows = x.movedim(1, -1).movedim(1 + axis, 3)
    lines = ours.norm(rows.reshape(-1, x.shape[2 + axis], channels))
    expected = theirs(lines, lines, lines)[0].view(rows.shape).movedim(3, 1 + axis).movedim(-1, 1)
    torch.testing.assert_close(ours(x), x + expected, atol=1e-5, rtol=1e-5)

def test_axial_attention_sees_one_line_and_three_see_everything():
    torch.manual_seed(0)
    stack = [with_random_projection(AxialAttention(16, axis)).double() for axis in range(3)]
    x = torch.randn(1, 16, 4, 5, 6, dtype=torch.float64)
    y = x.clone()
    y[0, :, 1, 2, 3] += torch.randn(16)
    changed = (stack[1](x) != stack[1](y)).any(1)[0]
    assert changed[1, :, 3].all() and changed.sum() == 5
    for attention in stack:
        x, y = attention(x), attention(y)
    assert (x != y).any(1).all()

def test_attention_starts_as_the_identity_and_skips_the_missing_axis():
    x = torch.randn(2, 16, 4, 1, 6)
    assert torch.equal(AxialAttention(16, 0)(x), x)
    assert with_random_projection(AxialAttention(16, 1))(x) is x

# ---------------------------------------------------------------- slices are constant stacks

@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('stride', [1, 2])
def test_2d_conv_equals_3d_conv_on_a_stack_constant_along_the_missing_axis(axis, stride):
    torch.manual_seed(0)
    conv = Conv(3, 5, 3, stride=stride, padding=1)
    x = torch.randn(2, 3, *without((8, 10, 12), axis))
    inner = conv(stacked(x, axis, 8)).select(2 + axis, 2)
    torch.testing.assert_close(conv(x).squeeze(2 + axis), inner, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_halve_and_double_leave_the_missing_axis_alone(axis):
    x = torch.rand(1, 2, *without((4, 6, 8), axis))
    stack = stacked(x, axis, 4)
    torch.testing.assert_close(halve(x).squeeze(2 + axis), halve(stack).select(2 + axis, 1))
    torch.testing.assert_close(double(x).squeeze(2 + axis), double(stack).select(2 + axis, 2))

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_slices_stay_channels_last_through_the_whole_network(axis):
    net = tiny().to(memory_format=torch.channels_last_3d)
    strides = {}
    for name, module in net.named_modules():
        if isinstance(module, (Conv, nn.GroupNorm, AxialAttention)):
            module.register_forward_hook(lambda m, i, y, name=name: strides.update({name: y.stride(1)}))
    x = torch.rand(2, 1, *without((64, 64, 64), axis)).to(memory_format=torch.channels_last_3d)
    net(x, torch.tensor([0, 1]))
    assert len(strides) > 20
    assert [name for name, stride in strides.items() if stride != 1] == []

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_slice_in_blocks_of_voxels_is_a_volume_of_two_alike(axis):
    size = without((8, 12, 6), axis)
    x = torch.rand(2, 1, *size)
    folded = space_to_depth(x)
    twice = space_to_depth(x.repeat_interleave(2, 2 + axis))
    assert torch.equal(folded, twice)
    torch.testing.assert_close(depth_to_space(folded, axis), x)

def test_a_folded_network_has_no_layer_at_full_size():
    model = tiny(fold=True).eval()
    seen = []
    for layer in model.modules():
        if isinstance(layer, Conv):
            layer.register_forward_hook(lambda layer, args, out: seen.append(out.shape[2:]))
    with torch.no_grad():
        x_hat = model.reconstruct(torch.rand(1, 1, 32, 48, 32), 'T1w')
    assert x_hat.shape == (1, 1, 32, 48, 32)
    assert max(seen) == (16, 24, 16)

@pytest.mark.parametrize('fold', [False, True])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_slice_goes_through_and_leaves_codebook_and_means_alone(axis, fold):
    model = tiny(fold=fold).train()
    model(torch.rand(2, 1, 32, 32, 32), torch.tensor([0, 1]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    size = without((32, 48, 64), axis)
    out = model(torch.rand(2, 1, *size), 'T1w')
    assert out['x_hat'].shape == (2, 1, *size)
    assert out['indices'].shape == (2, *[max(1, n // 16) for n in size])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

# ---------------------------------------------------------------- FiLM

def test_film_is_the_identity_at_the_start_bit_for_bit():
    model = tiny().eval()
    z_q = torch.randn(2, 8, 2, 3, 2)
    film = model.film(torch.randn(2, 4, 2, 3, 2), torch.tensor([0, 1]))
    assert [gamma.shape[1] for gamma, _ in film] == list(model.decoder.channels)
    assert torch.equal(model.decode(z_q, film), model.decode(z_q, []))

def gammas(model, z_mod, modality):
    return torch.cat([gamma for gamma, _ in model.film(z_mod, modality)], 1)

def test_film_depends_on_the_mean_of_z_mod_alone():
    model = with_random_film(tiny()).eval()
    z_mod = torch.randn(1, 4, 2, 3, 2)
    shuffled = z_mod.flatten(2)[:, :, torch.randperm(12)].view_as(z_mod)
    torch.testing.assert_close(gammas(model, z_mod, 0), gammas(model, shuffled, 0), atol=1e-6, rtol=1e-5)

def test_film_of_every_layer_depends_on_the_modality():
    model = with_random_film(tiny()).eval()
    z_mod = torch.randn(1, 4, 2, 3, 2)
    for (a, _), (b, _) in zip(model.film(z_mod, 0), model.film(z_mod, 1)):
        assert not torch.allclose(a, b, atol=1e-6)

def test_cross_reconstruction_is_source_anatomy_under_target_film():
    model = with_random_film(tiny()).train()
    x, modality = torch.rand(2, 1, 32, 32, 32), torch.tensor([0, 1])
    model(x, modality)
    model.eval()
    out = model(x, modality, torch.tensor([[0, 1], [1, 0]]))
    film = model.film(out['z_mod'], modality)
    for source, target in ((0, 1), (1, 0)):
        film_of_target = [(gamma[[target]], beta[[target]]) for gamma, beta in film]
        expected = model.decode(out['z_q'][[source]], film_of_target)
        torch.testing.assert_close(out['x_cross'][[source]], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out['x_hat'], model.reconstruct(x, modality), atol=1e-5, rtol=1e-5)

# ---------------------------------------------------------------- the whole

def paper_model():
    """The default network without memory for its weights."""
    with torch.device('meta'):
        return NeuroQuant(NeuroQuantConfig()).eval()

def test_the_papers_config_has_972_tokens_at_full_size():
    model = paper_model()
    z_anat, z_mod = model.encode(torch.empty(1, 1, 144, 192, 144, device='meta'))
    assert z_anat.shape == (1, 64, 9, 12, 9) and z_mod.shape == (1, 32, 9, 12, 9)
    assert model.encoder.blocks[-1].down.out_channels == 256
    assert model.bits_per_volume((144, 192, 144)) == 972 * 12

def test_the_papers_config_costs_at_most_1_1_tflop_and_its_full_size_tail_at_most_half():
    model = paper_model()
    encode, decode = vae_flops(model, (144, 192, 144))
    assert encode + decode < 1.1e12
    half_size = torch.empty(1, 32, 72, 96, 72, device='meta')
    gamma = torch.empty(1, model.decoder.channels[4], device='meta')
    with FlopCounterMode(display=False) as tail:
        model.decoder.heads[4](model.decoder.blocks[4](half_size, gamma, gamma))
    assert tail.get_total_flops() < (encode + decode) / 2

def test_tokens_and_back_equal_the_forward_pass_under_mean_style():
    model = tiny().train()
    x, modality = torch.rand(2, 1, 32, 48, 32), torch.tensor([0, 1])
    model(x, modality)
    model.eval()
    tokens = model.tokens(x)
    assert tokens.shape == (2, 2, 3, 2)
    assert torch.equal(tokens, model(x, modality)['indices'])
    torch.testing.assert_close(model.from_tokens(tokens, 'T2w'), model.translate(x, 'T1w', 'T2w'))

@pytest.mark.parametrize('film', [True, False])
@pytest.mark.parametrize('size', [(32, 48, 32), (32, 1, 48)])
def test_analyse_gives_what_each_method_gives_bit_for_bit(film, size):
    model, x, modality = trained(film=film), torch.rand(2, 1, *size), torch.tensor([1, 0])
    out = model.analyse(x, modality)
    mean, logvar = model.posterior(x)
    assert torch.equal(out['mean'], mean) and torch.equal(mean, model.encode(x)[0])
    assert out['logvar'] is None and logvar is None
    assert torch.equal(out['latent'], model.latent(x, modality))
    assert torch.equal(out['tokens'], model.tokens(x))
    assert torch.equal(out['x_hat'], model.reconstruct(x, modality))
    assert torch.equal(out['z_q'], model.quantizer.lookup(out['tokens']))
    if film:
        assert torch.equal(out['z_mod'], model.encode(x)[1])
    else:
        assert out['z_mod'] is None

def test_analyse_encodes_and_decodes_once_and_tokens_do_not_decode():
    model, x, calls = trained(), torch.rand(1, 1, 32, 32, 32), []
    model.encoder.register_forward_hook(lambda *_: calls.append('encoder'))
    model.decoder.register_forward_hook(lambda *_: calls.append('decoder'))
    model.analyse(x, 'T1w')
    assert calls == ['encoder', 'decoder']
    model.tokens(x)
    assert calls == ['encoder', 'decoder', 'encoder']

def test_running_mean_of_the_modality_code_is_the_mean_of_what_was_seen():
    model = tiny().train()
    x, modality = torch.rand(3, 1, 32, 32, 32), torch.tensor([0, 1, 0])
    pooled = model(x, modality)['z_mod'].mean((2, 3, 4)).detach()
    expected = torch.stack([(pooled[0] + pooled[2]) / 2, pooled[1]])
    torch.testing.assert_close(model.mod_sum / model.mod_weight[:, None], expected)

def test_translation_to_a_modality_never_seen_is_refused():
    model = tiny(modalities=('T1w', 'T2w', 'FLAIR')).train()
    x = torch.rand(2, 1, 32, 32, 32)
    model(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match='FLAIR'):
        model.translate(x, 'T1w', 'FLAIR')

def test_a_modality_that_the_model_does_not_know_is_refused_with_those_it_knows():
    model, x = tiny(modalities=('T1w', 'T2w', 'FLAIR')), torch.rand(1, 1, 32, 32, 32)
    with pytest.raises(ValueError, match="'PD'.*T1w, T2w, FLAIR"):
        model.translate(x, 'T1w', 'PD')

SWITCHES = [('attention', ['qkv', 'proj']), ('film', ['film_mlp', 'mod_head', 'mod_sum'])]

@pytest.mark.parametrize('switch, names', SWITCHES)
def test_ablation_switches_remove_their_parts_from_the_state_dict(switch, names):
    full, ablated = ' '.join(tiny().state_dict()), ' '.join(tiny(**{switch: False}).state_dict())
    for name in names:
        assert name in full and name not in ablated

def test_plain_vq_vae_without_film_still_runs():
    model = tiny(film=False).train()
    out = model(torch.rand(1, 1, 32, 32, 32), 'T1w')
    assert out['z_mod'].shape[1] == 0 and out['x_hat'].shape == (1, 1, 32, 32, 32)
    assert model.style_bits() == 0

@pytest.mark.parametrize('size, word', [((32, 40, 32), '40'), ((16, 32, 32), '16'), ((1, 1, 32), '1, 1')])
def test_sizes_that_do_not_divide_are_refused_with_the_size(size, word):
    with pytest.raises(ValueError, match=word):
        tiny().encode(torch.rand(1, 1, *size))

def test_gradient_checkpointing_changes_nothing_but_memory():
    x, modality = torch.rand(2, 1, 32, 32, 32), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        model.encoder.checkpointing = model.decoder.checkpointing = checkpointing
        torch.manual_seed(1)
        model(x, modality)['x_hat'].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(kept, recomputed)

@pytest.mark.parametrize('fold', [False, True])
def test_every_parameter_gets_a_gradient_from_the_whole_objective(fold):
    model = tiny(fold=fold).train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    out = model(torch.rand(2, 1, 32, 32, 32), torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 0]]))
    (out['x_hat'].square().mean() + out['x_cross'].square().mean() + out['commit']).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

@pytest.mark.parametrize('change', [{'kind': 'segmenter'}, {'wings': 2}])
def test_a_checkpoint_of_another_version_is_refused_with_its_commit(change):
    model = tiny()
    args = model_args(model) | change
    checkpoint = {'model_args': args, 'model': model.state_dict(), 'git_commit': 'abc1234'}
    with pytest.raises(SystemExit, match='abc1234'):
        from_checkpoint(checkpoint)

def test_a_checkpoint_builds_the_same_model():
    model, x = tiny().train(), torch.rand(2, 1, 32, 32, 32)
    model(x, torch.tensor([0, 1]))
    twin = from_checkpoint({'model_args': model_args(model), 'model': model.state_dict(), 'ema': None})
    assert torch.equal(twin.reconstruct(x, 'T1w'), model.eval().reconstruct(x, 'T1w'))

# ---------------------------------------------------------------- doubling without scattered additions

@pytest.mark.parametrize('dims', [2, 3])
@pytest.mark.parametrize('mode', ['nearest', 'linear'])
def test_doubling_is_torchs_in_value_and_gradient(mode, dims):
    x = torch.rand(2, 3, *(5, 4, 6)[:dims], requires_grad=True)
    torch_mode = mode if mode == 'nearest' else {2: 'bilinear', 3: 'trilinear'}[dims]
    expected = F.interpolate(x, scale_factor=2, mode=torch_mode)
    weights = torch.rand_like(expected)
    torch.testing.assert_close(double_axes(x, mode), expected, atol=2e-7, rtol=0)
    gradient, = torch.autograd.grad((weights * double_axes(x, mode)).sum(), x)
    expected_gradient, = torch.autograd.grad((weights * expected).sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, atol=2e-6, rtol=1e-6)

@pytest.mark.parametrize('size', [(3, 4, 5), (5, 2, 1)])
def test_doubling_to_an_odd_size_is_torchs(size):
    block = ResBlock(3, 4, 4, 4, 'up')
    x = torch.rand(1, 4, *[-(-n // 2) for n in size])
    torch.testing.assert_close(block.resize(x, size), F.interpolate(x, size=size, mode='nearest'))
