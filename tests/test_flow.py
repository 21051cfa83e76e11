"""Paths, samplers and the U-Net: closed forms, a toy to be recovered, MONAI's U-Net with the same weights."""
import math

import pytest
import torch

from flow import draw_times, flow_matching_loss, interpolate, sample, shift_time, time_grid
from model import FlowUNet, FlowUNetConfig
from pretrained import load_maisi_unet

# ---------------------------------------------------------------- path and loss

def ends_and_times():
    return torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0.0, 0.3, 1.0])

def test_the_path_runs_from_noise_to_data():
    x0, x1, t = ends_and_times()
    path = interpolate(x0, x1, t)
    assert torch.equal(path[0], x0[0]) and torch.equal(path[2], x1[2])
    torch.testing.assert_close(path[1], 0.7 * x0[1] + 0.3 * x1[1])

def test_the_loss_is_the_distance_from_the_slope_of_the_path():
    x0, x1, t = ends_and_times()
    def wrong_by(error):
        return lambda x, t, cond: x1 - x0 + torch.tensor(error).view(1, 2, 1)
    assert flow_matching_loss(wrong_by([0.0, 0.0]), x1, x0, t) == 0
    off = wrong_by([1.0, -3.0])
    assert flow_matching_loss(off, x1, x0, t).item() == pytest.approx((1 + 9) / 2)
    assert flow_matching_loss(off, x1, x0, t, norm='l1').item() == pytest.approx((1 + 3) / 2)
    with pytest.raises(ValueError, match='l2 or l1'):
        flow_matching_loss(wrong_by([0.0, 0.0]), x1, x0, t, norm='huber')

@pytest.mark.parametrize('steps', [1, 7, 30, 1000])
@pytest.mark.parametrize('shift', [1.0, 1.587])
def test_steps_sum_to_exactly_one(steps, shift):
    grid = time_grid(steps, shift).tolist()
    assert grid[0] == 0 and grid[-1] == 1 and len(grid) == steps + 1
    lengths = [b - a for a, b in zip(grid, grid[1:])]
    assert min(lengths) > 0
    assert math.fsum(lengths) == pytest.approx(1, abs=1e-15)

def test_shift_is_maisis_warp_of_the_noise_level():
    t, r = torch.linspace(0, 1, 11), 1.26
    s = 1 - t
    torch.testing.assert_close(1 - shift_time(t, r), r * s / (1 + (r - 1) * s))
    assert torch.equal(shift_time(t, 1.0), t)

def test_drawn_times_have_their_distribution():
    g = torch.Generator().manual_seed(0)
    t = draw_times(20000, generator=g)
    assert 0 <= t.min() and t.max() < 1 and abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.003
    z = torch.logit(draw_times(20000, 'logit_normal', generator=g))
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert draw_times(20000, shift=2.0, generator=g).mean() < 0.45
    with pytest.raises(ValueError):
        draw_times(3, 'cosine')

# ---------------------------------------------------------------- samplers

@pytest.mark.parametrize('method', ['euler', 'heun'])
def test_a_constant_field_is_followed_exactly(method):
    noise = torch.randn(4, 2, 3)
    slope = torch.randn(2, 3)
    x = sample(lambda x, t, cond: slope.expand_as(x), noise, 30, method)
    torch.testing.assert_close(x, noise + slope, atol=1e-5, rtol=1e-5)

def test_a_field_linear_in_time_is_exact_for_heun():
    noise = torch.randn(4, 2)
    def field(x, t, cond):
        return t[:, None] * torch.ones_like(x)
    torch.testing.assert_close(sample(field, noise, 5, 'heun'), noise + 0.5, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sample(field, noise, 5, 'euler'), noise + 0.4, atol=1e-6, rtol=1e-6)

def test_errors_fall_with_the_step_as_the_method_says():
    noise = torch.ones(1, 1)
    def error(method, steps):
        return abs(sample(lambda x, t, cond: x, noise, steps, method).item() - math.e)
    assert error('euler', 16) / error('euler', 32) == pytest.approx(2, rel=0.1)
    assert error('heun', 8) / error('heun', 16) == pytest.approx(4, rel=0.15)

def test_guidance_extrapolates_and_costs_calls():
    calls = []
    def v(x, t, cond):
        calls.append(cond)
        return torch.full_like(x, 0.0 if cond is None else 1.0)
    noise = torch.zeros(1, 1)
    assert sample(v, noise, 4, cond={'classes': 1}, guidance=3.0).item() == pytest.approx(3)
    assert len(calls) == 8
    assert sample(v, noise, 4, cond={'classes': 1}).item() == pytest.approx(1)
    assert len(calls) == 8 + 4
    assert sample(v, noise, 4).item() == 0

def test_bad_steps_and_methods_are_refused():
    with pytest.raises(ValueError, match='at least 1'):
        sample(lambda x, t, c: x, torch.zeros(1, 1), 0)
    with pytest.raises(ValueError, match='euler or heun'):
        sample(lambda x, t, c: x, torch.zeros(1, 1), 3, 'rk4')

def test_the_exact_velocity_of_a_gaussian_mixture_gives_the_mixture_back():
    """v = E[x1 - x0 | x_t] in closed form; mean and variance within 5 % at 30 Euler steps."""
    means, sd, weight = torch.tensor([-2.0, 2.0]), 0.5, torch.tensor([0.3, 0.7])
    def v(x, t, cond):
        t = t.view(-1, 1, 1, 1, 1, 1)
        var = (t * sd) ** 2 + (1 - t) ** 2
        x = x[..., None]
        share = torch.softmax(torch.log(weight) - (x - t * means) ** 2 / (2 * var), -1)
        x1 = means + t * sd ** 2 / var * (x - t * means)
        x0 = (1 - t) / var * (x - t * means)
        return (share * (x1 - x0)).sum(-1)
    x = sample(v, torch.randn(64, 4, 4, 8, 4, generator=torch.Generator().manual_seed(0)), 30)
    mean = (weight * means).sum().item()
    var = (weight * (means ** 2 + sd ** 2)).sum().item() - mean ** 2
    assert x.mean().item() == pytest.approx(mean, rel=0.05)
    assert x.var().item() == pytest.approx(var, rel=0.05)

# ---------------------------------------------------------------- U-Net

def small(**kwargs):
    """A U-Net none of whose weights is zero."""
    torch.manual_seed(0)
    defaults = dict(in_channels=3, widths=(16, 32), res_blocks=1, attention=(False, True), head_width=16)
    model = FlowUNet(FlowUNetConfig(**defaults | kwargs))
    for p in model.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.1)
    return model.eval()

@pytest.mark.parametrize('conditions, parameters', [
    (dict(), 178_566_276),
    (dict(vectors=(3,)), 180_468_100),
    (dict(vectors=(3,), classes=(128,)), 180_500_868),
    (dict(vectors=(3, 1)), 182_369_412)])
def test_parameters_are_maisis(conditions, parameters):
    with torch.device('meta'):
        model = FlowUNet(FlowUNetConfig(**conditions))
    assert sum(p.numel() for p in model.parameters()) == parameters

def test_a_new_network_predicts_zero_velocity():
    model = FlowUNet(FlowUNetConfig(in_channels=2, widths=(8, 16), attention=(False, True), head_width=8))
    assert model(torch.randn(1, 2, 4, 4, 4), torch.rand(1)).abs().max() == 0

def monais_unet(conditioned):
    networks = pytest.importorskip('monai.apps.generation.maisi.networks.diffusion_model_unet_maisi')
    torch.manual_seed(0)
    network = networks.DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, num_channels=(32, 64, 64), num_res_blocks=2,
        attention_levels=(False, True, True), num_head_channels=(0, 32, 32), resblock_updown=True,
        include_fc=True, use_flash_attention=False, num_class_embeds=16 if conditioned else None,
        include_spacing_input=conditioned)
    for p in network.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.05)
    return network.eval()

@torch.no_grad()
@pytest.mark.parametrize('conditioned', [False, True])
def test_maisi_unet_weights_give_what_monai_gives(conditioned):
    theirs = monais_unet(conditioned)
    weights = {f'module.{key}': value for key, value in theirs.state_dict().items()}
    ours = load_maisi_unet({'unet_state_dict': weights, 'scale_factor': 1.0})
    x = torch.randn(2, 4, 8, 16, 8)
    t = torch.tensor([0.25, 0.9])
    classes = torch.tensor([3, 9])
    spacing = torch.rand(2, 3) * 100
    if conditioned:
        want = theirs(x, 1000 * (1 - t), class_labels=classes, spacing_tensor=spacing)
        v = ours(x, t, {'classes': classes[:, None], 'vectors': [spacing]})
        unknown = theirs(x, 1000 * (1 - t), class_labels=torch.zeros_like(classes), spacing_tensor=spacing)
        torch.testing.assert_close(ours(x, t, {'vectors': [spacing]}), unknown, atol=1e-4, rtol=1e-4)
    else:
        want = theirs(x, 1000 * (1 - t))
        v = ours(x, t)
    torch.testing.assert_close(v, want, atol=1e-4, rtol=1e-4)

def test_weights_that_are_no_maisi_unet_are_refused():
    weights = monais_unet(False).state_dict()
    weights.pop('middle_block.resnet_1.conv1.conv.weight')
    with pytest.raises(ValueError, match='missing middle_block.resnet_1.conv1.conv.weight'):
        load_maisi_unet(weights)
    with pytest.raises(ValueError, match='not a MAISI U-Net'):
        load_maisi_unet({})

@pytest.mark.parametrize('grid', [(4, 6, 4), (5, 7, 9), (2, 3, 2), (1, 2, 1)])
def test_any_latent_grid_will_do(grid):
    x = torch.randn(2, 3, *grid)
    assert small(widths=(16, 32, 32), attention=(False, False, True))(x, torch.rand(2)).shape == x.shape

def test_conditions_change_the_velocity_and_none_is_not_known():
    model = small(classes=(4, 3), vectors=(2,))
    x = torch.randn(2, 3, 4, 4, 4)
    t = torch.rand(2)
    cond = {'classes': torch.tensor([[0, 1], [2, 0]]), 'vectors': [torch.tensor([[0.3, 1.0], [0.6, 1.0]])]}
    unknown = {'classes': torch.tensor([[3, 2], [3, 2]]), 'vectors': [torch.zeros(2, 2)]}
    torch.testing.assert_close(model(x, t, unknown), model(x, t))
    for k in ('classes', 'vectors'):
        assert not torch.allclose(model(x, t, {k: cond[k]}), model(x, t))
    one = model(x[1:], t[1:], {'classes': cond['classes'][1:], 'vectors': [cond['vectors'][0][1:]]})
    torch.testing.assert_close(model(x, t, cond)[1:], one, atol=1e-5, rtol=1e-5)

def test_configs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='one value for each'):
        FlowUNet(FlowUNetConfig(widths=(16, 32), attention=(True,)))
