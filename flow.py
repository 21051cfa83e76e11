"""Flow matching: the straight path from noise to data, its loss, and the samplers.

Time runs from 0 = noise to 1 = data.
psi_t = (1-t) x0 + t x1, u = x1 - x0 (DeCo eq. 2; Lipman et al. 2023, arXiv:2210.02747).
"""
import torch

def interpolate(x0, x1, t):
    """psi_t (B, ...) of noise x0 and data x1 at t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))
    return (1 - t) * x0 + t * x1

def flow_matching_loss(v, x1, x0, t, cond=None, norm='l2'):
    """Mean over all elements of |v(psi_t, t, cond) - (x1 - x0)|^2, DeCo eq. 2.

    norm: 'l2', or 'l1' for the absolute value, as in its released code.
    """
    error = v(interpolate(x0, x1, t), t, cond).float() - (x1 - x0).float()
    if norm == 'l2': return error.square().mean()
    if norm == 'l1': return error.abs().mean()
    raise ValueError(f"flow loss '{norm}': l2 or l1")

# ---------------------------------------------------------------- time

def shift_time(t, shift):
    """t -> t / (t + shift (1 - t)): for shift > 1 more of the time is near noise (Esser et al. 2024).

    Larger latents need that. In the noise level s = 1 - t it is MAISI's s' = shift s / (1 + (shift - 1) s),
    there with shift = (d h w / 32^3)^(1/3).
    """
    return t / (t + shift * (1 - t))

def draw_times(n, how='uniform', shift=1.0, device='cpu', generator=None):
    """(n,) shifted times to train at, float32; how: 'uniform', or 'logit_normal', sigmoids of normals."""
    if how == 'uniform':
        t = torch.rand(n, device=device, generator=generator)
    elif how == 'logit_normal':
        t = torch.sigmoid(torch.randn(n, device=device, generator=generator))
    else:
        raise ValueError(f"times '{how}': uniform or logit_normal")
    return shift_time(t, shift)

def time_grid(steps, shift=1.0):
    """steps + 1 times from exactly 0 to exactly 1, float64, by the same shift as in training."""
    if steps < 1: raise ValueError(f'steps={steps}: at least 1')
    return shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)

# ---------------------------------------------------------------- sampling

@torch.no_grad()
def sample(v, noise, steps=30, method='euler', cond=None, shift=1.0, guidance=1.0):
    """Follow dx/dt = v(x, t, cond) from noise (B, ...) at t=0 to t=1, in float32 -> (B, ...).

    method: 'euler' calls v once a step, 'heun' twice.
    guidance g: v without conditions + g (v with - v without), which doubles the calls. 1 is plain conditional
    sampling.
    """
    if method not in ('euler', 'heun'): raise ValueError(f"method '{method}': euler or heun")
    def velocity(x, t):
        t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        with_cond = v(x, t, cond).float()
        if cond is None or guidance == 1.0: return with_cond
        without = v(x, t, None).float()
        return without + guidance * (with_cond - without)
    x = noise.float()
    grid = time_grid(steps, shift).tolist()
    for t, next_t in zip(grid, grid[1:]):
        slope = velocity(x, t)
        if method == 'heun':
            slope = (slope + velocity(x + (next_t - t) * slope, next_t)) / 2
        x = x + (next_t - t) * slope
    return x
