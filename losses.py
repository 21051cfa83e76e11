"""Training objectives as unweighted scalars, in float32; the scripts weigh and add them.

Images are float in [0, 1]. A batch of slices may be 4-D (B, C, H, W) or 5-D with one axis of length 1.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- reconstruction

def gaussian_window(size, sigma, device):
    t = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    w = torch.exp(-0.5 * (t / sigma) ** 2)
    return w / w.sum()

def window_mean(x, weights):
    """Weighted mean in a sliding window along every spatial axis of x (B, C, *grid), valid region only.

    Each axis is a product with a banded matrix (n - size + 1, n): on these sizes faster than a convolution of one channel.
    """
    size = len(weights)
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        band = torch.zeros(n - size + 1, n, device=x.device)
        rows = torch.arange(n - size + 1, device=x.device)
        for k in range(size): band[rows, rows + k] = weights[k]
        x = (x.movedim(axis, -1) @ band.T).movedim(-1, axis)
    return x

def ssim_map(x, y, data_range=1.0, window='gaussian', size=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) at every place where the window fits -> (B, C, *valid grid).

    x, y: (B, C, H, W), (B, C, D, H, W), or 5-D with one axis of length 1, which is then a slice. K1 0.01, K2 0.03.
    window 'gaussian': population covariance, equal to scikit-image with gaussian_weights=True, use_sample_covariance=False
    (its window is 11 wide at sigma 1.5). 'uniform': sample covariance, scikit-image's default (size 7 there).
    Raises ValueError if the shapes differ or an axis is shorter than the window.
    """
    if x.shape != y.shape: raise ValueError(f'ssim of {tuple(x.shape)} and {tuple(y.shape)}: shapes differ')
    if x.ndim == 5 and 1 in x.shape[2:]:
        axis = 2 + list(x.shape[2:]).index(1)
        x, y = x.squeeze(axis), y.squeeze(axis)
    if min(x.shape[2:]) < size: raise ValueError(f'ssim window {size} does not fit in {tuple(x.shape[2:])}')
    if window == 'gaussian': weights, unbias = gaussian_window(size, sigma, x.device), 1.0
    elif window == 'uniform':
        n = size ** (x.ndim - 2)
        weights, unbias = torch.full((size,), 1 / size, device=x.device), n / (n - 1)
    else: raise ValueError(f"ssim window '{window}': gaussian or uniform")
    with torch.autocast(x.device.type, enabled=False):  # float32: variances are differences of near-equal numbers
        x, y, C = x.float(), y.float(), x.shape[1]
        mx, my, xx, yy, xy = window_mean(torch.cat([x, y, x * x, y * y, x * y], 1), weights).split(C, 1)
        vx, vy, cov = unbias * (xx - mx * mx), unbias * (yy - my * my), unbias * (xy - mx * my)
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        return (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))

def ssim(x, y, data_range=1.0, window='gaussian', size=11, sigma=1.5):
    """Mean of ssim_map over channels and the valid region -> (B,)."""
    return ssim_map(x, y, data_range, window, size, sigma).flatten(1).mean(1)

def reconstruction_loss(x_hat, x, ssim_weight):
    """Mean absolute error + ssim_weight (1 - SSIM), NeuroQuant eq. 12; SSIM is 3D on volumes and 2D on slices.

    Mean over batch and voxels. The window is Gaussian, 7 wide, sigma 1.5 (open in the paper; its released code's choice).
    """
    loss = F.l1_loss(x_hat.float(), x.float())
    if ssim_weight > 0: loss = loss + ssim_weight * (1 - ssim(x_hat, x, size=7).mean())
    return loss

def psnr(x_hat, x, data_range=1.0, mask=None):
    """Peak signal-to-noise ratio in dB per sample -> (B,), float32. mask: bool like x; only its voxels count."""
    error = (x_hat.float() - x.float()).square().flatten(1)
    if mask is None: mse = error.mean(1)
    else: mse = (error * mask.flatten(1)).sum(1) / mask.flatten(1).sum(1)
    return 10 * torch.log10(data_range ** 2 / mse)

# ---------------------------------------------------------------- disentanglement

class GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.alpha * grad, None

def grad_reverse(x, alpha):
    """x itself; its gradient is multiplied by -alpha on the way back (Ganin & Lempitsky 2015)."""
    return GradReverse.apply(x, alpha)

class ModalityClassifier(nn.Module):
    """Guesses the modality from the anatomy latent, D_m of NeuroQuant eq. 15. z (B, C, d, h, w) -> logits (B, modalities).

    Global: 1x1x1 convolution, group norm, SiLU, mean over the grid, two-layer perceptron.
    """
    def __init__(self, channels, num_modalities, hidden=128):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(channels, hidden, 1), nn.GroupNorm(8, hidden), nn.SiLU())
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_modalities))

    def forward(self, z):
        return self.mlp(self.features(z).mean((2, 3, 4)))
