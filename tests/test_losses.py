"""Objectives against references, closed forms and invariances."""
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from conftest import Precision
from losses import (ModalityClassifier, PatchDiscriminator, Product, discriminator_loss, adversary_loss,
                    alignment_loss, cov_loss, generator_loss, generator_term, grad_reverse, kl_loss, ms_ssim,
                    perceptual_loss, psnr, random_slices, reconstruction_loss, sid_loss, ssim, vad_loss,
                    var_loss)

def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random(shape).astype(np.float32)
    return x, np.clip(x + 0.2 * rng.normal(size=shape), 0, 1).astype(np.float32)

@pytest.mark.parametrize('shape', [(30, 25), (17, 20, 14)])
@pytest.mark.parametrize('ours, theirs', [
    (dict(), dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)),
    (dict(window='uniform', size=7), dict())])
def test_ssim_equals_scikit_image(shape, ours, theirs):
    metrics = pytest.importorskip('skimage.metrics', reason='scikit-image is the reference')
    x, y = pair(shape)
    expected = metrics.structural_similarity(x, y, data_range=1.0, **theirs)
    got = ssim(torch.tensor(x)[None, None], torch.tensor(y)[None, None], **ours)
    assert got.item() == pytest.approx(expected, abs=1e-5)

def test_ssim_of_a_5d_slice_is_the_2d_one():
    x, y = (torch.tensor(a)[None, None] for a in pair((20, 24)))
    for axis in (2, 3, 4):
        torch.testing.assert_close(ssim(x.unsqueeze(axis), y.unsqueeze(axis)), ssim(x, y))

def test_ssim_is_one_for_equal_and_symmetric():
    x, y = (torch.tensor(a)[None, None] for a in pair((16, 16, 16)))
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))

def test_ssim_refuses_small_images_and_other_shapes():
    with pytest.raises(ValueError, match='window 11.*8'):
        ssim(torch.rand(1, 1, 8, 20, 20), torch.rand(1, 1, 8, 20, 20))
    with pytest.raises(ValueError, match='shapes differ'):
        ssim(torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21))

def test_ssim_stays_float32_under_autocast():
    x, y = (torch.tensor(a)[None, None] for a in pair((20, 20)))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = ssim(x, y)
    torch.testing.assert_close(inside, ssim(x, y))

def test_ssim_and_covariances_keep_full_float32(tf32_allowed):
    """TF32 in SSIM's window puts the gradient inside a brain off by 12 to 59 %."""
    for loss in (lambda x: ssim(x, x.detach() ** 2).mean(), sid_loss, vad_loss):
        x = torch.rand(1, 2, 12, 12, 12, requires_grad=True)
        with Precision() as precision:
            loss(x).backward()
        assert len(precision.allowed) >= 2 and not any(precision.allowed)
    assert torch.backends.cuda.matmul.allow_tf32

def test_a_product_has_the_gradient_of_torchs():
    a = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Product.apply(a, b), a @ b)
    weight = torch.randn(3, 4, 6, dtype=torch.float64)
    ours = torch.autograd.grad((Product.apply(a, b) * weight).sum(), (a, b))
    theirs = torch.autograd.grad((a @ b * weight).sum(), (a, b))
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y)

def test_reconstruction_loss_is_l1_plus_weighted_dissimilarity():
    x, y = (torch.tensor(a)[None, None] for a in pair((12, 14, 16)))
    expected = (x - y).abs().mean() + 0.3 * (1 - ssim(x, y, size=7))[0]
    torch.testing.assert_close(reconstruction_loss(y, x, 0.3), expected)
    torch.testing.assert_close(reconstruction_loss(y, x, 0), (x - y).abs().mean())

def test_psnr_equals_its_closed_form_whole_and_masked():
    x = torch.rand(2, 1, 4, 5, 6)
    y = x.clone()
    y[:, :, :2] += 0.1
    assert psnr(y, x).tolist() == pytest.approx([10 * np.log10(1 / 0.005)] * 2, abs=1e-3)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, :, :2] = True
    assert psnr(y, x, mask=mask).tolist() == pytest.approx([20] * 2, abs=1e-3)

def test_reversed_gradient_is_exactly_minus_alpha_times_the_plain_one():
    torch.manual_seed(0)
    classifier = ModalityClassifier(16, 3)
    z = torch.randn(4, 16, 2, 3, 2, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1])
    def gradients(z_in):
        loss = torch.nn.functional.cross_entropy(classifier(z_in), target)
        return torch.autograd.grad(loss, [z, *classifier.parameters()])
    of_z, *of_weights = gradients(z)
    reversed_of_z, *reversed_of_weights = gradients(grad_reverse(z, 0.25))
    assert torch.equal(reversed_of_z, -0.25 * of_z)
    # the classifier learns at full weight
    assert all(torch.equal(a, b) for a, b in zip(of_weights, reversed_of_weights))

@pytest.mark.parametrize('shape', [(1, 1, 48, 56, 50), (2, 1, 200, 180)])
def test_ms_ssim_equals_monais(shape):
    metrics = pytest.importorskip('monai.metrics.regression')
    x, y = map(torch.from_numpy, pair(shape))
    levels = sum(min(shape[2:]) // 2 ** k >= 11 for k in range(5))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:levels])
    want = metrics.compute_ms_ssim(x, y, len(shape) - 2, weights=(weights / weights.sum()).tolist())
    torch.testing.assert_close(ms_ssim(x, y), want.flatten(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ms_ssim(x, x), torch.ones(len(x)))

# ---------------------------------------------------------------- the latent of a KL autoencoder

def rows(z):
    return np.moveaxis(z.double().numpy(), 1, -1).reshape(-1, z.shape[1])

def channels(*values):
    """One value per channel of a (B, C, d, h, w) latent."""
    return torch.tensor(values).view(1, -1, 1, 1, 1)

@pytest.fixture
def latent():
    """(2,4,3,4,5) with correlated channels of unequal means and spreads."""
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 3, 4, 5))).float()
    return z + channels(0.0, 2, -1, 5) + 0.8 * z[:, [1, 0, 0, 2]] * channels(1.0, 3, 0.2, 1)

def test_latent_losses_equal_their_formulas(latent):
    z = rows(latent)
    sigma = np.cov(z.T)
    off = ~np.eye(4, dtype=bool)
    assert cov_loss(latent).item() == pytest.approx((sigma[off] ** 2).sum() / 16, rel=1e-4)
    assert sid_loss(latent).item() == pytest.approx((np.corrcoef(z.T)[off] ** 2).sum() / 16, rel=1e-4)
    for gamma in (1.0, 2.5):
        hinge = (np.maximum(0, gamma - np.sqrt(np.diag(sigma))) ** 2).mean()
        assert var_loss(latent, gamma).item() == pytest.approx(hinge, rel=1e-4, abs=1e-7)
        two_sided = ((np.diag(sigma) - gamma ** 2) ** 2).mean()
        assert var_loss(latent, gamma, 'two_sided_var').item() == pytest.approx(two_sided, rel=1e-4)
        assert vad_loss(latent, gamma).item() == pytest.approx((sigma[off] ** 2).sum() / 16 + hinge, rel=1e-4)
    # (N, C) is the same
    torch.testing.assert_close(sid_loss(latent), sid_loss(latent.movedim(1, -1).reshape(-1, 4)))

def test_invariances_of_the_latent_losses(latent):
    scale = channels(0.1, 3, 20, 1)
    shift = channels(1.0, -5, 0, 9)
    torch.testing.assert_close(sid_loss(scale * latent + shift), sid_loss(latent), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cov_loss(latent + shift), cov_loss(latent), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(cov_loss(2 * latent), 16 * cov_loss(latent), rtol=1e-3, atol=1e-5)
    q = torch.linalg.qr(torch.randn(60, 5) - torch.randn(60, 5).mean(0))[0]
    orthogonal = torch.linalg.qr(torch.cat([torch.ones(60, 1), q], 1))[0][:, 1:5]  # centred and orthogonal
    assert sid_loss(orthogonal) < 1e-10 and cov_loss(orthogonal) < 1e-10
    assert var_loss(10 * latent) == 0 and var_loss(0.01 * latent) > 0.5
    assert sid_loss(torch.cat([latent, torch.ones_like(latent[:, :1])], 1)).isfinite()  # a dead channel

def test_latent_losses_have_finite_gradients_even_for_dead_channels():
    z = torch.randn(50, 3)
    z[:, 1] = 2.0
    z.requires_grad_()
    (sid_loss(z) + vad_loss(z) + var_loss(z, form='two_sided_var')).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0

def test_alignment_is_0_for_equal_latents_and_2_for_strangers():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 8, 16, 16, 16, generator=g)
    pair = torch.tensor([[0, 1], [1, 0]])
    assert alignment_loss(z, pair).item() == pytest.approx(2, rel=0.02)
    assert alignment_loss(torch.cat([z[:1], z[:1]]), pair) == 0
    assert alignment_loss(z, pair[:0]) == 0

def test_alignment_does_not_depend_on_the_latents_scale():
    z = torch.randn(3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    pair = torch.tensor([[0, 2]])
    assert alignment_loss(100 * z, pair).item() == pytest.approx(alignment_loss(z, pair).item(), rel=1e-5)

def test_kl_equals_torchs_and_its_reductions_differ_by_the_number_of_elements():
    mu = torch.randn(3, 4, 2, 3, 2)
    logvar = torch.randn(3, 4, 2, 3, 2)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mu, torch.exp(0.5 * logvar)), normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(mu, logvar), want.mean())
    torch.testing.assert_close(kl_loss(mu, logvar, 'sum'), kl_loss(mu, logvar) * 4 * 2 * 3 * 2)
    assert kl_loss(torch.zeros(1, 4), torch.zeros(1, 4)) == 0
    with pytest.raises(ValueError, match='mean or sum'):
        kl_loss(mu, logvar, 'max')

# ---------------------------------------------------------------- adversary

@pytest.mark.parametrize('dims, parameters', [(2, 692_769), (3, 2_770_977)])
def test_discriminator_equals_monais(dims, parameters):
    ours = PatchDiscriminator(dims)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    monai = pytest.importorskip('monai.networks.nets')
    theirs = monai.PatchDiscriminator(spatial_dims=dims, channels=32, in_channels=1, out_channels=1,
                                      num_layers_d=3, norm='INSTANCE', bias=False, kernel_size=4, padding=1)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    x = torch.rand(2, 1, *[32] * dims)
    torch.testing.assert_close(ours(x), theirs(x)[-1], atol=1e-5, rtol=1e-5)

def test_discriminator_losses_equal_their_formulas_and_meet_in_the_middle():
    logits = torch.tensor([[-2.0, 0.5, 1.0, 3.0]])
    assert discriminator_loss(logits, True).item() == pytest.approx((9 + 0.25 + 0 + 4) / 4)
    assert discriminator_loss(logits, False).item() == pytest.approx((4 + 0.25 + 1 + 9) / 4)
    assert discriminator_loss(logits, True, 'hinge').item() == pytest.approx((3 + 0.5 + 0 + 0) / 4)
    assert discriminator_loss(logits, False, 'hinge').item() == pytest.approx((0 + 1.5 + 2 + 4) / 4)
    assert generator_loss(logits) == discriminator_loss(logits, True)
    assert generator_loss(logits, 'hinge').item() == pytest.approx(-2.5 / 4)
    with pytest.raises(ValueError):
        discriminator_loss(logits, True, 'wasserstein')

class Sees(torch.nn.Module):
    """A discriminator of `dims` dimensions that says its dims of whatever it sees."""
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.full((1, 1), float(self.dims))

def test_discriminators_of_volumes_and_of_slices_have_equal_weight():
    x = torch.rand(1, 1, 8, 8, 8)
    on_3d, on_2d = generator_loss(torch.full((1, 1), 3.0)), generator_loss(torch.full((1, 1), 2.0))
    both = generator_term([Sees(3), Sees(2)], x, 'least_squares', 0.5, None)
    assert both == (on_3d + on_2d) / 2

# ---------------------------------------------------------------- slices of volumes

def test_random_slices_are_slices_of_every_plane():
    x = torch.arange(2 * 3 * 4 * 5).float().view(2, 1, 3, 4, 5)
    planes = random_slices([x], 0.5)
    assert [tuple(slices.shape) for slices, in planes] == [(2, 1, 4, 5), (4, 1, 3, 5), (4, 1, 3, 4)]
    for axis, (slices,) in enumerate(planes):
        every = x.movedim(2 + axis, 1).flatten(0, 1)
        for image in slices:
            assert (every == image).flatten(1).all(1).any()
        assert len(slices.unique(dim=0)) == len(slices)

def test_random_slices_of_several_volumes_are_at_the_same_positions():
    x = torch.rand(2, 1, 3, 4, 5)
    for slices, same_slices in random_slices([x, 10 * x], 0.5):
        assert torch.equal(same_slices, 10 * slices)

def test_random_slices_of_a_sample_do_not_depend_on_its_batch():
    x = torch.rand(2, 1, 3, 4, 5)
    both = random_slices([x], 0.5, [torch.Generator().manual_seed(k) for k in (0, 1)])
    alone = random_slices([x[1:]], 0.5, [torch.Generator().manual_seed(1)])
    for (slices,), (own,) in zip(both, alone):
        assert torch.equal(slices[len(slices) // 2:], own)

def test_random_slices_of_slices_are_themselves():
    x = torch.rand(2, 1, 1, 4, 5)
    (slices,), = random_slices([x], 0.5)
    assert torch.equal(slices, x[:, :, 0])

def test_perceptual_loss_sums_the_planes():
    x = torch.rand(1, 1, 3, 4, 5)
    y = torch.rand(1, 1, 3, 4, 5)
    def l1(a, b):
        return (a - b).abs().flatten(1).mean(1)
    torch.testing.assert_close(perceptual_loss(l1, x, y, 1.0), 3 * (x - y).abs().mean())

# ---------------------------------------------------------------- statistics of several processes

PAIRS = torch.tensor([[0, 1], [1, 0]])  # of a process's two rows

def one_of_two(rank, folder, z):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29533')
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = z.chunk(2)[rank].clone().requires_grad_()
    loss = sid_loss(own, gather=True) + vad_loss(own, gather=True)
    loss = loss + alignment_loss(own, PAIRS)
    loss.backward()
    torch.save((loss.detach(), own.grad), os.path.join(folder, f'rank{rank}.pt'))
    dist.destroy_process_group()

def test_gathered_statistics_are_those_of_the_joined_batch_and_so_are_the_gradients(tmp_path):
    z = torch.randn(4, 3, 2, 3, 2) * channels(0.3, 1, 0.5) + torch.randn(4, 1, 2, 3, 2)
    mp.spawn(one_of_two, (str(tmp_path), z), nprocs=2)
    parts = [torch.load(tmp_path / f'rank{r}.pt', weights_only=True) for r in (0, 1)]
    whole = z.clone().requires_grad_()
    loss = sid_loss(whole) + vad_loss(whole)
    loss = loss + alignment_loss(whole, torch.cat([PAIRS, PAIRS + 2]))
    loss.backward()
    values = torch.stack([value for value, _ in parts])
    torch.testing.assert_close(values.mean(), loss.detach())  # each has the distances of its own pairs
    # parameters get the sum over rows; averaged over two processes that is half the sum of these
    torch.testing.assert_close(torch.cat([g for _, g in parts]) / 2, whole.grad)

@pytest.mark.parametrize('bias, reaches_encoder', [(3.0, True), (-3.0, False)])
def test_a_scan_that_fools_the_classifier_beyond_chance_gives_the_encoder_no_gradient(bias, reaches_encoder):
    torch.manual_seed(0)
    classifier = ModalityClassifier(16, 2)
    with torch.no_grad():
        classifier.mlp[-1].bias.copy_(torch.tensor([bias, -bias]))  # so sure of modality 0
    z = torch.randn(3, 16, 2, 3, 2, requires_grad=True)
    target = torch.zeros(3, dtype=torch.int64)
    loss = adversary_loss(classifier, z, target, 0.25)
    of_z, *of_weights = torch.autograd.grad(loss, [z, *classifier.parameters()])
    assert of_z.any().item() == reaches_encoder
    assert all(gradient.any() for gradient in of_weights)  # the classifier learns either way
    if reaches_encoder:
        plain = torch.nn.functional.cross_entropy(classifier(z), target)
        torch.testing.assert_close(of_z, -0.25 * torch.autograd.grad(plain, z)[0])
