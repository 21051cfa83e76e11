"""Objectives against references, closed forms and invariances."""
import numpy as np
import pytest
import torch

from losses import ModalityClassifier, grad_reverse, psnr, reconstruction_loss, ssim

def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random(shape).astype(np.float32)
    return x, np.clip(x + 0.2 * rng.normal(size=shape), 0, 1).astype(np.float32)

@pytest.mark.parametrize('shape', [(30, 25), (17, 20, 14)])
@pytest.mark.parametrize('ours, theirs', [
    (dict(), dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)),
    (dict(window='uniform', size=7), dict())])
def test_ssim_equals_scikit_image(shape, ours, theirs):
    structural_similarity = pytest.importorskip('skimage.metrics', reason='scikit-image is the reference').structural_similarity
    x, y = pair(shape)
    expected = structural_similarity(x, y, data_range=1.0, **theirs)
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
    with pytest.raises(ValueError, match='window 11.*8'): ssim(torch.rand(1, 1, 8, 20, 20), torch.rand(1, 1, 8, 20, 20))
    with pytest.raises(ValueError, match='shapes differ'): ssim(torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21))

def test_ssim_stays_float32_under_autocast():
    x, y = (torch.tensor(a)[None, None] for a in pair((20, 20)))
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = ssim(x, y)
    torch.testing.assert_close(inside, ssim(x, y))

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
    classifier, z = ModalityClassifier(16, 3), torch.randn(4, 16, 2, 3, 2, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1])
    def gradients(z_in):
        loss = torch.nn.functional.cross_entropy(classifier(z_in), target)
        return torch.autograd.grad(loss, [z, *classifier.parameters()])
    plain, reversed_ = gradients(z), gradients(grad_reverse(z, 0.25))
    assert torch.equal(reversed_[0], -0.25 * plain[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], reversed_[1:]))  # the classifier learns at full weight
