"""Training objectives as scalars, in float32; the scripts weigh and add them.

Images are float in [0, 1]. A batch of slices may be 4-D (B, C, H, W) or 5-D with one axis of length 1.
"""
import copy
import math

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- reconstruction

class Product(torch.autograd.Function):
    """a @ b in full float32, forward and backward, whatever the process allows: TF32 keeps 11 of 24 bits.

    Variances are differences of near-equal numbers.
    """
    @staticmethod
    def forward(ctx, a, b):
        a_wanted, b_wanted = ctx.needs_input_grad
        ctx.save_for_backward(a if b_wanted else None, b if a_wanted else None)
        return full_float32_product(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = None if b is None else full_float32_product(grad, b.mT)
        grad_b = None if a is None else full_float32_product(a.mT, grad)
        return grad_a, grad_b

def full_float32_product(a, b):
    """a @ b. quantize.full_float32 says the same: either file can be copied without the other."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed

def gaussian_window(size, sigma, device):
    t = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    w = torch.exp(-0.5 * (t / sigma) ** 2)
    return w / w.sum()

def window_mean(x, weights):
    """Weighted mean in a sliding window along every spatial axis of x (B, C, *grid), valid region only.

    Each axis is a product with a banded matrix (n - size + 1, n). On these sizes that is faster than a
    convolution of one channel.
    """
    size = len(weights)
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        band = torch.zeros(n - size + 1, n, device=x.device)
        rows = torch.arange(n - size + 1, device=x.device)
        for k in range(size):
            band[rows, rows + k] = weights[k]
        x = Product.apply(x.movedim(axis, -1), band.T).movedim(-1, axis)
    return x

def ssim_terms(x, y, data_range=1.0, window='gaussian', size=11, sigma=1.5):
    """Luminance and contrast-structure (Wang et al. 2004); SSIM is their product.

    x, y: (B, C, H, W) or (B, C, D, H, W); an axis of length 1 of the latter makes it a slice.
    returns each term (B, C, *valid grid), wherever the window fits. K1 is 0.01, K2 0.03.
    window: 'gaussian' with the population's covariance, as scikit-image with gaussian_weights=True and
    use_sample_covariance=False, which is 11 wide at sigma 1.5; or 'uniform' with the sample's covariance,
    scikit-image's default, there 7 wide.
    Raises ValueError if the shapes differ or an axis is shorter than the window.
    """
    if x.shape != y.shape:
        raise ValueError(f'ssim of {tuple(x.shape)} and {tuple(y.shape)}: shapes differ')
    if x.ndim == 5 and 1 in x.shape[2:]:
        axis = 2 + list(x.shape[2:]).index(1)
        x = x.squeeze(axis)
        y = y.squeeze(axis)
    if min(x.shape[2:]) < size:
        raise ValueError(f'ssim window {size} does not fit in {tuple(x.shape[2:])}')
    if window == 'gaussian':
        weights = gaussian_window(size, sigma, x.device)
        unbias = 1.0
    elif window == 'uniform':
        weights = torch.full((size,), 1 / size, device=x.device)
        n = size ** (x.ndim - 2)
        unbias = n / (n - 1)
    else:
        raise ValueError(f"ssim window '{window}': gaussian or uniform")
    # float32: variances are differences of near-equal numbers
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        y = y.float()
        moments = window_mean(torch.cat([x, y, x * x, y * y, x * y], 1), weights)
        mx, my, xx, yy, xy = moments.chunk(5, 1)
        vx = unbias * (xx - mx * mx)
        vy = unbias * (yy - my * my)
        cov = unbias * (xy - mx * my)
        c1 = (0.01 * data_range) ** 2
        c2 = (0.03 * data_range) ** 2
        luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
        contrast = (2 * cov + c2) / (vx + vy + c2)
        return luminance, contrast

def ssim_map(x, y, **kwargs):
    """Structural similarity wherever the window fits -> (B, C, *valid grid). Arguments: see ssim_terms."""
    luminance, contrast = ssim_terms(x, y, **kwargs)
    return luminance * contrast

def ssim(x, y, data_range=1.0, window='gaussian', size=11, sigma=1.5):
    """Mean of ssim_map over channels and the valid region -> (B,)."""
    return ssim_map(x, y, data_range=data_range, window=window, size=size, sigma=sigma).flatten(1).mean(1)

def ms_ssim(x, y, data_range=1.0, size=11, sigma=1.5):
    """Multi-scale SSIM (Wang et al. 2003) -> (B,).

    It is a product of weighted powers: of the contrast at every scale and of the luminance at the last. A
    scale is the mean of 2 voxels a side of the one before. Of the five, those count into which the window
    fits; their weights are scaled to add to 1. Negative terms count as 0.
    """
    shortest = min(n for n in x.shape[2:] if n > 1)
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    weights = [weight for level, weight in enumerate(weights) if shortest // 2 ** level >= size]
    if not weights: raise ValueError(f'ssim window {size} does not fit in {tuple(x.shape[2:])}')
    result = 1.0
    for level, weight in enumerate(weights):
        luminance, contrast = ssim_terms(x, y, data_range=data_range, size=size, sigma=sigma)
        term = contrast if level < len(weights) - 1 else luminance * contrast
        result = result * term.flatten(1).mean(1).clamp(min=0) ** (weight / sum(weights))
        x = half_size(x)
        y = half_size(y)
    return result

def half_size(x):
    """Mean over 2 pixels or voxels a side; an axis of length 1 stays."""
    if x.ndim == 4: return F.avg_pool2d(x, 2)
    return F.avg_pool3d(x, [min(2, n) for n in x.shape[2:]])

def reconstruction_loss(x_hat, x, ssim_weight, norm='l1'):
    """Mean error + ssim_weight (1 - SSIM), NeuroQuant eq. 12; SSIM is 3D on volumes and 2D on slices.

    norm: 'l1', absolute (the papers), or 'l2', squared; mean over batch and voxels. The SSIM window is
    Gaussian, 7 wide, sigma 1.5: the paper leaves it open, its released code has this one.
    """
    if norm == 'l1':
        loss = F.l1_loss(x_hat.float(), x.float())
    elif norm == 'l2':
        loss = F.mse_loss(x_hat.float(), x.float())
    else:
        raise ValueError(f"reconstruction norm '{norm}': l1 or l2")
    if ssim_weight > 0:
        loss = loss + ssim_weight * (1 - ssim(x_hat, x, size=7).mean())
    return loss

def psnr(x_hat, x, data_range=1.0, mask=None):
    """Peak signal-to-noise ratio in dB per sample -> (B,), float32. mask: bool like x; its voxels count."""
    error = (x_hat.float() - x.float()).square().flatten(1)
    if mask is None:
        mse = error.mean(1)
    else:
        mse = (error * mask.flatten(1)).sum(1) / mask.flatten(1).sum(1)
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
    """Guesses the modality from the anatomy latent, D_m of NeuroQuant eq. 15.

    z (B, C, d, h, w) -> logits (B, modalities). 1x1x1 convolution, group norm, SiLU, mean over the grid,
    two-layer perceptron.
    """
    def __init__(self, channels, num_modalities, hidden=128):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(channels, hidden, 1), nn.GroupNorm(8, hidden), nn.SiLU())
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_modalities))

    def forward(self, z):
        return self.mlp(self.features(z).mean((2, 3, 4)))

def alignment_loss(z_anat, pairs):
    """Mean squared distance between z_anat (B, C, d, h, w) of scans that are one session's, in its variances.

    pairs (P, 2): their rows; 0 without any. 2 for latents that have nothing to do with one another. The
    variances are those of the batch of all processes.
    """
    z = z_anat.detach().transpose(0, 1).flatten(1).double()                                # (C, N)
    moments = torch.stack([torch.ones_like(z[:, 0]) * z.shape[1], z.sum(1), z.square().sum(1)])
    if dist.is_initialized():
        dist.all_reduce(moments)
    n, first, second = moments
    variance = (second / n - (first / n) ** 2).mean().clamp(min=1e-8).float()
    if not len(pairs): return z_anat.new_zeros(())
    return (z_anat[pairs[:, 0]] - z_anat[pairs[:, 1]]).square().mean() / variance

def adversary_loss(classifier, z, modality, alpha):
    """Mean cross entropy of what the classifier says of z (B, C, d, h, w); NeuroQuant eq. 15.

    z gets the gradient reversed, times alpha. Departs: a scan of which the classifier says less than chance
    gives none. Else the encoder runs from a wrong classifier without end, and codes fall out of use.
    """
    with torch.no_grad():
        log_likelihood = classifier(z).float().log_softmax(1)
        guessed = log_likelihood.gather(1, modality[:, None]) > -math.log(log_likelihood.shape[1])
    logits = classifier(grad_reverse(z, alpha * guessed[:, :, None, None, None]))
    return F.cross_entropy(logits.float(), modality)

# ---------------------------------------------------------------- the latent of a KL autoencoder

def kl_loss(mu, logvar, reduction='mean'):
    """KL(N(mu, exp(logvar)) || N(0, 1)) of DeCo eq. 1: 0.5 (mu^2 + exp(logvar) - 1 - logvar).

    mu, logvar: (B, C, *grid).
    reduction: 'mean' over every element; or 'sum' over channels and grid, then mean over the batch, which is
    MAISI's and larger by C * grid.
    """
    mu = mu.float()
    logvar = logvar.float()
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
    if reduction == 'mean': return kl.mean()
    if reduction == 'sum': return kl.flatten(1).sum(1).mean()
    raise ValueError(f"kl reduction '{reduction}': mean or sum")

def channel_covariance(z, gather=False):
    """Unbiased covariance (C, C) of channels over batch and grid, float32.

    z: (N, C) or (B, C, *grid), at least two positions.
    gather: over the positions of every process. Once the gradients are averaged over processes, they are
    those of one process with the joined batch.
    """
    gather = gather and dist.is_initialized()
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        if z.ndim > 2:
            z = z.movedim(1, -1).flatten(0, -2)  # (N, C)
        n = len(z) * (dist.get_world_size() if gather else 1)  # equal patches everywhere
        if n < 2: raise ValueError(f'a covariance of {n} position')
        total = z.sum(0)
        if gather:
            total = dist_nn.all_reduce(total)
        z = z - total / n
        products = Product.apply(z.T, z)
        if gather:
            products = dist_nn.all_reduce(products)
        return products / (n - 1)

def off_diagonal_square(m):
    """sum over i != j of m_ij^2, divided by C^2 (DeCo eq. 3 and 4 count the diagonal in the denominator)."""
    return (m - torch.diag(m.diagonal())).square().sum() / m.numel()

def sid_loss(z, gather=False):
    """Scale-invariant decorrelation, DeCo eq. 3: squared Pearson correlations of channel pairs.

    A constant channel counts 0.
    """
    cov = channel_covariance(z, gather)
    rsd = cov.diagonal().clamp(min=1e-12).rsqrt()
    return off_diagonal_square(cov * rsd * rsd[:, None])

def cov_loss(z, gather=False):
    """DeCo eq. 4: squared covariances of channel pairs. Shrinking all channels lowers it: see var_loss."""
    return off_diagonal_square(channel_covariance(z, gather))

def var_loss(z, gamma=1.0, form='hinge_std', gather=False):
    """Anchor of the channels' variances, DeCo eq. 5.

    form 'hinge_std': mean of max(0, gamma - sd)^2, which is 0 once every sd is gamma or more.
    form 'two_sided_var': mean of (variance - gamma^2)^2, the form of the released code at gamma 1.
    """
    var = channel_covariance(z, gather).diagonal()
    if form == 'hinge_std':
        return (gamma - (var + 1e-8).sqrt()).clamp(min=0).square().mean()  # sqrt has no slope at 0
    if form == 'two_sided_var': return (var - gamma ** 2).square().mean()
    raise ValueError(f"var form '{form}': hinge_std or two_sided_var")

def vad_loss(z, gamma=1.0, form='hinge_std', gather=False):
    """Variance-anchored decorrelation, DeCo eq. 6: cov_loss + var_loss."""
    return cov_loss(z, gather) + var_loss(z, gamma, form, gather)

# ---------------------------------------------------------------- discriminators of patches

class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): x (B, c_in, *grid) -> logits (B, 1, *smaller grid), one per patch.

    dims: 2 or 3; with 32 channels and 3 layers 692,769 or 2,770,977 parameters. Patches overlap. Kernels are
    4 wide, strides 2, 2, 2, 1, 1, with instance norm. Each axis needs at least 24 pixels for layers=3.
    Weights start as N(0, 0.02).
    """
    def __init__(self, dims=3, channels=32, layers=3, in_channels=1):
        conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
        stages = [conv(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(layers):
            stride = 2 if layer < layers - 1 else 1
            stages += [conv(width, 2 * width, 4, stride, 1, bias=False), norm(2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        super().__init__(*stages, conv(width, 1, 4, 1, 1))
        self.dims = dims
        for m in self:
            if isinstance(m, conv):
                nn.init.normal_(m.weight, 0, 0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

def discriminator_loss(logits, real, form='least_squares'):
    """What a discriminator pays for logits of real or of generated samples.

    form: 'least_squares', mean of (logits - real)^2 with real 1 or 0; or 'hinge'.
    """
    logits = logits.float()
    if form == 'least_squares': return (logits - float(real)).square().mean()
    if form == 'hinge': return F.relu(1 - logits if real else 1 + logits).mean()
    raise ValueError(f"adversarial form '{form}': least_squares or hinge")

def generator_loss(logits, form='least_squares'):
    """What the generator pays for its samples' logits: distance from 'real'; for 'hinge' minus their mean."""
    return -logits.float().mean() if form == 'hinge' else discriminator_loss(logits, True, form)

# ---------------------------------------------------------------- slices of volumes

def random_slices(volumes, fraction, generators=None):
    """Random slices of several volumes at the same positions, for losses that are 2D: "2.5D".

    volumes: list of (B, C, D, H, W). Slices (one axis of length 1) give themselves, for their plane alone.
    returns for each of the three planes a list, one per volume, of (n, C, h, w). From each sample comes that
    fraction of the plane's slices, at least one.
    generators: one CPU torch.Generator per sample; None: torch's own.
    """
    ones = [axis for axis in (2, 3, 4) if volumes[0].shape[axis] == 1]
    if ones: return [[volume.squeeze(ones[0]) for volume in volumes]]
    planes = []
    for axis in (2, 3, 4):
        n = volumes[0].shape[axis]
        take = max(1, int(fraction * n))
        chosen = []
        for b, generator in enumerate(generators or [None] * len(volumes[0])):
            chosen.append(b * n + torch.randperm(n, generator=generator)[:take])
        chosen = torch.cat(chosen)
        if volumes[0].is_cuda:  # from pinned memory the copy does not wait for the device
            chosen = chosen.pin_memory().to(volumes[0].device, non_blocking=True)
        planes.append([volume.movedim(axis, 1).flatten(0, 1)[chosen] for volume in volumes])
    return planes

def perceptual_loss(network, x_hat, x, fraction=0.2, generators=None):
    """Sum over planes of network(slices of x_hat, the same of x) -> (n,), averaged over slices."""
    loss = 0.0
    with torch.autocast(x.device.type, enabled=False):  # float32: normalised features, small differences
        for slices_hat, slices in random_slices([x_hat.float(), x.float()], fraction, generators):
            loss = loss + network(slices_hat, slices).mean()
    return loss

# ---------------------------------------------------------------- discriminators on volumes and slices

def refuse_small(judge, shape):
    """SystemExit if volumes (D,H,W), or their slices, are too small for a PatchDiscriminator or an LPIPS."""
    discriminates = isinstance(judge, PatchDiscriminator)
    dims = judge.dims if discriminates else 2
    smallest = torch.empty(1, 1, *sorted(n for n in shape if n > 1)[:dims], device='meta')
    images = [smallest] if discriminates else [smallest, smallest]
    try:
        copy.deepcopy(judge).to('meta')(*images)
    except (RuntimeError, ValueError) as e:
        name = 'PatchGAN' if discriminates else 'perceptual network'
        raise SystemExit(f'--patch: the {dims}D {name} wants larger ones than {"x".join(map(str, shape))} '
                         f'({str(e).splitlines()[0]})')

def mean_over_views(term, discriminators, volumes, fraction, generators):
    """Mean over the discriminators of each one's mean of term(discriminator, *views).

    volumes: list of (B, C, D, H, W).
    A 3D discriminator sees the volumes, a 2D one random slices of each plane.
    """
    total = 0.0
    for discriminator in discriminators:
        views = [volumes] if discriminator.dims == 3 else random_slices(volumes, fraction, generators)
        total = total + sum(term(discriminator, *view) for view in views) / len(views)
    return total / len(discriminators)

def generator_term(discriminators, x_hat, form, fraction, generators):
    """What the generator pays for x_hat (B, C, D, H, W); see discriminator_loss and random_slices."""
    def term(discriminator, fake):
        return generator_loss(discriminator(fake), form)
    return mean_over_views(term, discriminators, [x_hat], fraction, generators)

def discriminator_term(discriminators, x_hat, x, form, fraction, generators):
    """What the discriminators pay for a detached x_hat and the scans x themselves, each (B, C, D, H, W)."""
    def term(discriminator, fake, real):
        on_fake = discriminator_loss(discriminator(fake), False, form)
        on_real = discriminator_loss(discriminator(real), True, form)
        return (on_fake + on_real) / 2
    return mean_over_views(term, discriminators, [x_hat, x], fraction, generators)
