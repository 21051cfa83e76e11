"""slabs.py: slab by slab is the same network with the same weights, and needs one slab at a time."""
import pytest
import torch

from layers import Conv3d
from model import ConvVAE, ConvVAEConfig, NeuroQuant, NeuroQuantConfig, encoder_hash, model_args
from slabs import slabwise

CONFIGS = [{}, dict(layout='sd'), dict(widths=(8, 8, 8, 8)), dict(bottleneck='vq', num_codes=8),
           dict(layout='fold', norm='none', widths=(8, 16))]

def random_vae(**kwargs):
    """A small ConvVAE in eval mode in which nothing starts at zero, one or the identity."""
    torch.manual_seed(0)
    model = ConvVAE(ConvVAEConfig(**{'widths': (8, 16, 32), 'res_blocks': 1, **kwargs})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, p.mean().item(), 0.1)
    if model.config.bottleneck == 'vq':
        torch.nn.init.normal_(model.quantizer.codebook)
    return model

def assert_near(parts, whole):
    torch.testing.assert_close(parts, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-5)

@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('slab', [1, 3, 100])
@torch.no_grad()
def test_slab_by_slab_equals_the_whole_to_1e_5(config, slab):
    model, x = random_vae(**config), torch.rand(1, 1, 24, 16, 8)
    parts = slabwise(model, slab)
    assert_near(parts.reconstruct(x), model.reconstruct(x))
    torch.testing.assert_close(parts.latent(x), model.latent(x), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_a_latent_decodes_slab_by_slab_as_whole(config):
    model = random_vae(**config)
    z = torch.randn(2, *model.latent_shape((24, 16, 8)))
    assert_near(slabwise(model, 2).decode_volume(z), model.decode_volume(z))

@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_every_entry_of_analyse_equals_the_whole_to_1e_5(config):
    model, x = random_vae(**config), torch.rand(2, 1, 23, 16, 7)
    parts, whole = slabwise(model, 2).analyse(x), model.analyse(x)
    assert parts.keys() == whole.keys()
    for key, value in whole.items():
        if key == 'tokens' or value is None:
            assert (parts[key] is None) if value is None else torch.equal(parts[key], value)
        else:
            torch.testing.assert_close(parts[key], value, atol=1e-5 * value.abs().max().item(), rtol=1e-4)

@torch.no_grad()
def test_a_model_of_slices_runs_slab_by_slab_too():
    model, x = random_vae(dims=2, layout='sd'), torch.rand(1, 1, 16, 12, 5)
    assert_near(slabwise(model, 1).reconstruct(x), model.reconstruct(x))

@torch.no_grad()
def test_no_convolution_sees_more_than_a_slab_and_its_halo():
    model, depths = random_vae(), []
    for layer in model.modules():
        if isinstance(layer, Conv3d) and layer.kernel_size[0] == 3:
            layer.register_forward_hook(lambda layer, inputs, output: depths.append(inputs[0].shape[2]))
    slabwise(model, 2).reconstruct(torch.rand(1, 1, 64, 8, 8))
    assert max(depths) <= 2 * (2 + 2 * 2)  # a slab of 2 and halos of 2, doubled

@torch.no_grad()
def test_the_callers_model_stays_as_it_is():
    model, x = random_vae(bottleneck='vq', num_codes=8), torch.rand(1, 1, 16, 16, 8)
    modules, state, whole = list(model.named_modules()), dict(model.state_dict()), model.reconstruct(x)
    attributes = {name: dict(vars(module)) for name, module in modules}
    slabwise(model, 2).reconstruct(x)
    assert type(model) is ConvVAE
    assert list(model.named_modules()) == modules
    assert {name: dict(vars(module)) for name, module in modules} == attributes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model.reconstruct(x), whole)

def test_the_weights_are_shared_under_the_same_names():
    model = random_vae(bottleneck='vq', num_codes=8)
    twin = slabwise(model, 2)
    assert isinstance(twin, ConvVAE) and model_args(twin) == model_args(model)
    ours, theirs = twin.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in theirs)
    assert encoder_hash(twin) == encoder_hash(model)

def test_other_models_are_refused():
    tiny = NeuroQuantConfig(widths=(8, 8, 8, 8), anat_dim=4, mod_dim=4, modality_dim=4, num_codes=4)
    with pytest.raises(ValueError, match='needs a ConvVAE, not a NeuroQuant'):
        slabwise(NeuroQuant(tiny), 8)

@pytest.mark.parametrize('slab', [0, -1])
def test_slabs_of_no_voxel_are_refused(slab):
    with pytest.raises(ValueError, match=f'slab={slab}'):
        slabwise(random_vae(), slab)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no second device')
@pytest.mark.parametrize('config', CONFIGS)
@torch.no_grad()
def test_results_lie_where_the_volume_lies(config):
    model, x = random_vae(**config), torch.rand(1, 1, 24, 16, 8)
    whole = model.analyse(x)
    torch.backends.cudnn.allow_tf32 = False
    parts = slabwise(model.cuda(), 2).analyse(x)
    assert all(value is None or value.device == x.device for value in parts.values())
    torch.testing.assert_close(parts['x_hat'], whole['x_hat'], atol=1e-4, rtol=1e-4)
