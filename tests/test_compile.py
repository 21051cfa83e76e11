"""What speed rests on: networks compile whole and once, and no step asks the device for a number."""
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import blind_to_slices
from common import compile_for, compile_whole, fill_up
from flow import flow_matching_loss
from layers import Conv
from losses import (
    ModalityClassifier, PatchDiscriminator, discriminator_loss, adversary_loss, alignment_loss, kl_loss,
    reconstruction_loss, sid_loss, ssim, vad_loss)
from model import (GPT, ConvVAE, ConvVAEConfig, FlowUNet, FlowUNetConfig, GPTConfig, NeuroQuant,
                   NeuroQuantConfig)

NEUROQUANT = NeuroQuantConfig(widths=(16, 16, 16, 16), attn_levels=(3,), anat_dim=8, mod_dim=4,
                              modality_dim=4, num_codes=16)
FLOW = FlowUNetConfig(in_channels=3, widths=(8, 16), res_blocks=1, attention=(False, True), head_width=8)
TOKENS = GPTConfig(grid=(2, 3, 2), num_codes=16, layers=2, heads=2, width=16)

# ---------------------------------------------------------------- compilation

def randomised(net):
    """The network, nothing in which is zero at the start."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net

def networks():
    """{name: (network, list of its arguments, one for each shape)}"""
    nq, unet = randomised(NeuroQuant(NEUROQUANT)), randomised(FlowUNet(FLOW))
    vae = randomised(ConvVAE(ConvVAEConfig(widths=(8, 8), latent_dim=3)))
    sd = randomised(ConvVAE(ConvVAEConfig(widths=(8, 8), latent_dim=3, layout='sd', dims=2)))
    film = [(torch.randn(1, c), torch.randn(1, c)) for c in nq.decoder.channels]
    volumes, codes = [], []
    for size in [(32, 48, 32), (1, 48, 32), (32, 1, 32), (32, 48, 1)]:
        volumes.append((torch.rand(1, 1, *size),))
        codes.append((torch.randn(1, 8, *[max(1, n // 16) for n in size]), film))
    return {
        'NeuroQuant encoder': (nq.encoder, volumes),
        'NeuroQuant decoder': (nq.decoder, codes),
        'ConvVAE encoder': (vae.encoder, [(torch.rand(1, 1, 16, 24, 16),)]),
        'ConvVAE decoder': (vae.decoder, [(torch.randn(1, 3, 8, 12, 8),)]),
        'SD encoder': (sd.encoder, [(torch.rand(2, 1, 16, 24),)]),
        'SD decoder': (sd.decoder, [(torch.randn(2, 3, 8, 12),)]),
        'FlowUNet': (unet, [(torch.randn(2, 3, 8, 6, 8), torch.rand(2))]),
        'GPT': (randomised(GPT(TOKENS)), [(torch.randint(16, (2, 11)),)]),
    }

@pytest.mark.parametrize('name', list(networks()))
def test_networks_compile_without_graph_breaks_once_per_shape_and_give_the_same(name):
    net, inputs = networks()[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, backend='eager', fullgraph=True, dynamic=False)  # a graph break would raise
    for args in inputs + inputs:  # the second round finds what it needs
        torch.testing.assert_close(compiled(*args), net(*args), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == len(inputs)

def graphs_of(call, monkeypatch):
    """How many graphs torch.compile makes while call() runs."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager', fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    call()
    return torch._dynamo.utils.counters['stats']['unique_graphs']

@pytest.mark.parametrize('rows', [2, 3, 4])
def test_rows_that_fill_a_batch_up_change_neither_result_nor_gradient(monkeypatch, rows):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    net = randomised(NeuroQuant(NEUROQUANT)).encoder
    x = torch.rand(rows, 1, 32, 32, 32).to(memory_format=torch.channels_last_3d)
    results = []
    for compiled in (False, True):
        if compiled:
            compile_for(net, (4,), 'eager')
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        results.append([y.detach(), *[p.grad.clone() for p in net.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('order', [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('rows', [1, 2, 3])
def test_a_batch_that_was_filled_up_lies_in_memory_as_a_full_one(rows, channels, order):
    full = torch.rand(4, channels, 5, 6, 7).to(memory_format=order)
    filled = fill_up(full[:rows], 4)
    assert filled.stride() == full.stride()
    assert torch.equal(filled[:rows], full[:rows]) and torch.equal(filled[3], full[0])

def test_nothing_is_compiled_for_validation(monkeypatch):
    net = NeuroQuant(NEUROQUANT).encoder.eval()
    compile_for(net, (4,), 'eager')
    assert graphs_of(lambda: net(torch.rand(1, 1, 32, 32, 32)), monkeypatch) == 0

@pytest.mark.parametrize('dims', [2, 3])
def test_discriminators_compile_whole(monkeypatch, dims):
    net = PatchDiscriminator(dims, channels=4, layers=1)
    x = torch.rand(1, 1, *[16] * dims)
    expected = net(x)
    def call():
        compile_whole(net)
        torch.testing.assert_close(net(x), expected)
    assert graphs_of(call, monkeypatch) == 1

def test_the_losses_of_a_step_compile_whole(monkeypatch):
    x = torch.rand(2, 1, 24, 24, 24)
    x_hat = torch.rand(2, 1, 24, 24, 24, requires_grad=True)
    def call():
        compiled = torch.compile(reconstruction_loss)
        torch.testing.assert_close(compiled(x_hat, x, 0.5), reconstruction_loss(x_hat, x, 0.5))
    assert graphs_of(call, monkeypatch) == 1

# ---------------------------------------------------------------- no scattered additions

SCATTERED = ('upsample', 'scatter', 'index_put', 'index_add', 'grid_sampler', 'embedding_dense_backward')

class NoScatter(TorchDispatchMode):
    """Raises where a backward pass on a GPU would be atomic additions: slow, and in no fixed order."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.overloadpacket.__name__.lstrip('_').startswith(SCATTERED), func
        return func(*args, **(kwargs or {}))

def test_the_detector_detects_an_interpolation():
    x = torch.rand(1, 1, 4, 4, 4, requires_grad=True)
    y = F.interpolate(x, scale_factor=2)
    with pytest.raises(AssertionError), NoScatter():
        y.sum().backward()

@pytest.mark.parametrize('name', list(networks()))
def test_no_backward_pass_scatters(name):
    net, inputs = networks()[name]
    if name == 'GPT':
        net.embedding.requires_grad_(False)  # the gradient of a table cannot be anything else
    for args in inputs:
        with NoScatter():
            net(*args).sum().backward()

# ---------------------------------------------------------------- slices

def test_the_bench_can_make_networks_take_slices_for_volumes():
    conv, x = Conv(2, 3, 3, padding=1), torch.randn(1, 2, 8, 6, 1)
    as_slice = conv(x)
    with blind_to_slices():
        torch.testing.assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=1))
    torch.testing.assert_close(conv(x), as_slice)
    assert not torch.allclose(as_slice, F.conv3d(x, conv.weight, conv.bias, padding=1))

# ---------------------------------------------------------------- no waiting

READS = ('_local_scalar_dense', 'nonzero', 'unique', '_unique2', 'masked_select', 'equal', 'is_nonzero',
         'bincount')

class NoQuestions(TorchDispatchMode):
    """Raises where a device would have to be waited for: a number is read, or a shape depends on values."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, func
        if name in ('index', 'index_put', 'index_put_'):
            for leaf in tree_leaves(args):
                assert not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool), func
        return func(*args, **(kwargs or {}))

def test_the_detector_detects_a_number():
    with pytest.raises(AssertionError), NoQuestions():
        torch.ones(1).item()

def test_the_detector_detects_a_mask():
    with pytest.raises(AssertionError), NoQuestions():
        torch.arange(3)[torch.tensor([True, False, True])]

def neuroquant_loss(quantizer='ema'):
    net, classifier = NeuroQuant(replace(NEUROQUANT, quantizer=quantizer)), ModalityClassifier(8, 2)
    x, modality = torch.rand(2, 1, 32, 48, 32), torch.tensor([0, 1])
    pairs = torch.tensor([[0, 1], [1, 0]])
    net(torch.rand(2, 1, 32, 48, 32), modality)  # the codebook begins with the first batch, once
    def loss():
        out = net(x, modality, pairs)
        recon = reconstruction_loss(out['x_hat'], x, 0.5)
        cross = reconstruction_loss(out['x_cross'], x[pairs[:, 1]], 0.0)
        adversarial = adversary_loss(classifier, out['z_anat'], modality, 0.1)
        aligned = alignment_loss(out['z_anat'], pairs)
        return recon + out['commit'] + cross + adversarial + aligned
    return net, loss

def scalars_loss():
    return neuroquant_loss('fsq')

def convvae_loss():
    net, x = ConvVAE(ConvVAEConfig(widths=(8, 8), latent_dim=3)), torch.rand(1, 1, 24, 24, 24)
    discriminator = PatchDiscriminator(3, channels=8)
    def loss():
        out = net(x)
        recon = reconstruction_loss(out['x_hat'], x, 0.0)
        latent = kl_loss(out['mu'], out['logvar']) + sid_loss(out['mu']) + vad_loss(out['mu'])
        similarity = 1 - ssim(out['x_hat'], x, size=7).mean()
        return recon + latent + similarity + discriminator_loss(discriminator(out['x_hat']), True)
    return net, loss

def flow_loss():
    net = FlowUNet(FLOW)
    x1, x0, t = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8), torch.rand(2)
    def loss():
        return flow_matching_loss(net, x1, x0, t)
    return net, loss

def gpt_loss():
    net = GPT(TOKENS)
    tokens = torch.randint(16, (2, 12))
    def loss():
        return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens.flatten())
    return net, loss

@pytest.mark.parametrize('make', [neuroquant_loss, scalars_loss, convvae_loss, flow_loss, gpt_loss])
def test_a_training_step_never_waits_for_the_device(make):
    net, loss = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=True)
    with NoQuestions():
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()  # its step counter lives on the CPU
    assert value.isfinite()
