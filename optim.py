"""How weights learn: rates, optimisers, gradients of several processes, and the average of the weights."""
import math
from functools import partial

import torch
import torch.distributed as dist

# ---------------------------------------------------------------- optimisers

def cosine(it, lr, min_lr, warmup_iters, decay_iters):
    """Rate of step `it`: linear to lr in warmup_iters, a cosine to min_lr at decay_iters, then constant."""
    if it < warmup_iters: return lr * (it + 1) / warmup_iters
    p = min(1.0, (it - warmup_iters) / max(1, decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * p)) * (lr - min_lr)

def adamw(parameters, lr, betas, eps, weight_decay):
    """AdamW without decay on biases and norms."""
    groups = [{'params': [p for p in parameters if p.ndim > 1], 'weight_decay': weight_decay},
              {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

def for_muon(weight):
    """True of the weights of convolutions and linear layers with at least 16 outputs."""
    return weight.ndim > 1 and len(weight) >= 16

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised as a matrix (C_out, the rest), for convolutions and linear layers.

    Jordan et al. 2024, with updates as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so that lr and
    weight_decay mean the same. torch.optim.Muon takes no convolutions, and its bfloat16 is slow on a CPU.
    """
    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        super().__init__(weights, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # matrices of one size are orthogonalised together: a GPU waits for few launches
            for weight in group['params']:
                if weight.grad is not None:
                    alike.setdefault(weight.flatten(1).shape, []).append(weight)
            for weights in alike.values():
                self.move(weights, group['lr'], group['weight_decay'], group['momentum'])

    def move(self, weights, lr, weight_decay, momentum):
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]['average'] = torch.zeros_like(weight)
        averages = [self.state[weight]['average'] for weight in weights]
        gradients = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov's
        updates = orthogonal(torch.stack([matrix.flatten(1) for matrix in ahead]))
        rate = 0.2 * lr * math.sqrt(max(updates.shape[1:]))
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, [u.reshape(w.shape) for u, w in zip(updates, weights)], alpha=-rate)

def orthogonal(matrices, steps=5):
    """Nearly U V^T of each U S V^T in (n, rows, columns), singular values 0.7 to 1.2 (Newton-Schulz).

    A step multiplies x by a polynomial of x x^T, and so the next x x^T by it from both sides. Of all products
    only the first and the last have the long side.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], device=gram.device)
    product = identity
    for _ in range(steps):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if tall else x

def make_optimizers(parameters, muon, lr, betas, eps, weight_decay):
    """[AdamW] of the parameters, or [AdamW, Muon], each of those that are for it."""
    matrices = [p for p in parameters if muon and for_muon(p)]
    taken = set(matrices)
    optimizers = [adamw([p for p in parameters if p not in taken], lr, betas, eps, weight_decay)]
    if muon:
        if not matrices:
            raise SystemExit('--muon=True: no weight has 16 outputs or more; make the network wider')
        optimizers.append(Muon(matrices, lr, weight_decay))
    return optimizers

def take_step(optimizers, parameters, lr, grad_clip):
    """Clip the gradients of parameters (0: do not) and move all weights; returns their norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm

# ---------------------------------------------------------------- gradients of several processes

class MeanGradients:
    """The mean of gradients over the processes, sent while the backward pass still computes.

    parameters: lists, each in the order of the forward pass; gradients arrive from the last one on. They are
    sent in buckets of at least `mib` MiB, which hold parameters of one list. Buckets go in a fixed order, as
    soon as they and those before are whole: every process sends the same. A list that may get no gradient in
    a step comes last, or it holds up the others.

        gradients.expect()    # before the last backward passes of a step
        loss.backward()
        gradients.finish()    # now every .grad is the mean

    Alone, a process does nothing here.
    """
    def __init__(self, *parameters, mib=25):
        self.buckets = []
        self.waiting = []  # of each bucket, whose gradients have not come
        self.sent = []     # of each bucket in turn: its gradients, their copy on the way, and the message
        for group in parameters if dist.is_initialized() else ():
            size = math.inf
            for p in reversed(group):
                if size >= mib * 2 ** 20:
                    self.buckets.append([])
                    size = 0
                self.buckets[-1].append(p)
                size += p.numel() * p.element_size()
        for k, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self.arrived, k))

    def expect(self):
        """From here on to finish(), the next gradient of a parameter is its last of this step."""
        self.waiting = [set(bucket) for bucket in self.buckets]

    def arrived(self, k, parameter):
        if not self.waiting: return  # of an earlier backward pass: more will be added to it
        self.waiting[k].remove(parameter)  # KeyError for a second one: the first may be on its way
        while len(self.sent) < len(self.buckets) and not self.waiting[len(self.sent)]:
            self.send()

    def send(self):
        """Send the next bucket; those without a gradient, on every process alike, are left out."""
        grads = [p.grad for p in self.buckets[len(self.sent)] if p.grad is not None]
        if not grads: return self.sent.append((grads, None, None))
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        self.sent.append((grads, flat, dist.all_reduce(flat, async_op=True)))

    def finish(self):
        """Send what is left, wait, and put the means in the place of the gradients."""
        while len(self.sent) < len(self.buckets):
            self.send()
        for grads, flat, message in self.sent:
            if not grads: continue
            message.wait()
            flat /= dist.get_world_size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(mean.view_as(grad))
        self.waiting, self.sent = [], []

# ---------------------------------------------------------------- the average of the weights

@torch.no_grad()
def update_average(average, model, decay):
    """Exponential average of weights: average <- decay average + (1 - decay) model.

    Buffers, the codebook among them, are copied.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers()):
        a.copy_(b)
