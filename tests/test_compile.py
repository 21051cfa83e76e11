"""What speed rests on: networks compile whole and once, and nothing in a step asks the device for a number."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import Live
from flow import flow_matching_loss
from losses import (
    ModalityClassifier, PatchDiscriminator, adversarial_loss, grad_reverse, kl_loss, reconstruction_loss,
    sid_loss, ssim, vad_loss
)
from model import ConvVAE, ConvVAEConfig, FlowUNet, FlowUNetConfig, NeuroQuant, NeuroQuantConfig

def networks():
    torch.manual_seed(0)
    nq = NeuroQuant(
        NeuroQuantConfig(widths=(16, 16, 16, 16), anat_dim=8, mod_dim=4, modality_dim=4, num_codes=16)
    )
    vae, sd = (
        ConvVAE(ConvVAEConfig(widths=(8, 8), latent_dim=3, **extra))
        for extra in ({}, {'layout': 'sd', 'dims': 2})
    )
    unet = FlowUNet(
        FlowUNetConfig(in_channels=3, widths=(8, 16), res_blocks=1, attention=(False, True), head_width=8)
    )
    for net in (nq, vae, sd, unet):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)  # nothing is zero at the start
    film = [tuple(torch.randn(1, c) for _ in (0, 1)) for c in nq.decoder.channels]
    planes = [(32, 48, 32), (1, 48, 32), (32, 1, 32), (32, 48, 1)]
    return {
        'NeuroQuant encoder': (nq.encoder, [(torch.rand(1, 1, *s),) for s in planes]),
        'NeuroQuant decoder': (
            nq.decoder,
            [(torch.randn(1, 8, *[max(1, n // 16) for n in s]), film) for s in planes],
        ),
        'ConvVAE encoder': (vae.encoder, [(torch.rand(1, 1, 16, 24, 16),)]),
        'ConvVAE decoder': (vae.decoder, [(torch.randn(1, 3, 8, 12, 8),)]),
        'SD encoder': (sd.encoder, [(torch.rand(2, 1, 16, 24),)]),
        'SD decoder': (sd.decoder, [(torch.randn(2, 3, 8, 12),)]),
        'FlowUNet': (unet, [(torch.randn(2, 3, 8, 6, 8), torch.rand(2))]),
    }

@pytest.mark.parametrize('name', list(networks()))
def test_networks_compile_without_graph_breaks_once_per_shape_and_give_the_same(name):
    net, inputs = networks()[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, backend='eager', fullgraph=True, dynamic=False)  # a graph break would raise
    for _ in range(2):
        for args in inputs:
            torch.testing.assert_close(compiled(*args), net(*args), rtol=1e-4, atol=1e-5)
    # the second round found what it needed
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == len(inputs)

class NoQuestions(TorchDispatchMode):
    """Raises where a device would have to be waited for: a tensor turned into a number, or a shape that depends on values."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = (
            [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
            if func.overloadpacket.__name__ in ('index', 'index_put', 'index_put_')
            else []
        )
        assert not masks, func
        assert func.overloadpacket.__name__ not in (
            '_local_scalar_dense', 'nonzero', 'unique', '_unique2', 'masked_select', 'equal', 'is_nonzero'
        ), func
        return func(*args, **(kwargs or {}))

def test_the_detector_detects():
    with pytest.raises(AssertionError), NoQuestions():
        torch.ones(1).item()
    with pytest.raises(AssertionError), NoQuestions():
        torch.arange(3)[torch.tensor([True, False, True])]

def neuroquant_loss():
    net = NeuroQuant(
        NeuroQuantConfig(widths=(16, 16, 16, 16), anat_dim=8, mod_dim=4, modality_dim=4, num_codes=16)
    )
    net(torch.rand(2, 1, 32, 48, 32), torch.tensor([0, 1]))  # the codebook begins with the first batch, once
    x, modality, pairs, judge = (
        torch.rand(2, 1, 32, 48, 32),
        torch.tensor([0, 1]),
        torch.tensor([[0, 1], [1, 0]]),
        ModalityClassifier(8, 2),
    )
    def loss():
        out = net(x, modality, pairs)
        return (
            reconstruction_loss(out['x_hat'], x, 0.5)
            + out['commit']
            + reconstruction_loss(out['x_cross'], x[pairs[:, 1]], 0.0)
            + torch.nn.functional.cross_entropy(judge(grad_reverse(out['z_anat'], 0.1)), modality)
        )
    return net, loss

def convvae_loss():
    net, critic, x = (
        ConvVAE(ConvVAEConfig(widths=(8, 8), latent_dim=3)),
        PatchDiscriminator(3, channels=8),
        torch.rand(1, 1, 24, 24, 24),
    )
    def loss():
        out = net(x)
        return (
            reconstruction_loss(out['x_hat'], x, 0.0)
            + kl_loss(out['mu'], out['logvar'])
            + sid_loss(out['mu'])
            + vad_loss(out['mu'])
            + 1
            - ssim(out['x_hat'], x, size=7).mean()
            + adversarial_loss(critic(out['x_hat']), True)
        )
    return net, loss

def flow_loss():
    net = FlowUNet(
        FlowUNetConfig(in_channels=3, widths=(8, 16), res_blocks=1, attention=(False, True), head_width=8)
    )
    x1, x0, t = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8), torch.rand(2)
    return net, lambda: flow_matching_loss(net, x1, x0, t)

@pytest.mark.parametrize('make', [neuroquant_loss, convvae_loss, flow_loss])
def test_a_training_step_never_waits_for_the_device(make):
    net, loss = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=True)
    with NoQuestions():
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()  # its step counter lives on the CPU
    assert value.isfinite()

def test_the_count_of_memory_is_that_of_the_tensors_alive():
    with Live() as live:
        a, b = torch.empty(1000), torch.empty(2, 64)
        assert live.now == 4096 + 512  # blocks of 512 bytes
        b = b.T[1:] + 1  # a view holds nothing of its own; for a moment two are alive
        del a
        assert live.now == 512 and live.peak == 4096 + 2 * 512
        # the leaf, and for the backward pass exp's result beside sin's
        kept = torch.empty(256, requires_grad=True).exp().sin()
        assert live.now == 512 + 3 * 1024
        del kept
        assert live.now == 512
