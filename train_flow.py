"""Train a flow on the latents of an autoencoder of train_vae.py; sample.py --mode=generate draws brains then.

    python train_flow.py config/demo_flow.py                               # phantoms, after config/demo_kl.py
    python train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt      # DeCo-VAE's flow on one GPU
    torchrun --nproc_per_node=4 train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt --batch_size=1
    python train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt --init_from=resume

The first start encodes the training and validation scans into latents_dir. Writes out_dir/ckpt.pt (resume),
best.pt (best validation loss), log.jsonl, log.csv, config.py and, with matplotlib, curves.png and
samples_ITER.png.
"""
import copy
import math
import os
import sys

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from common import (StepLog, autocast, catch_signals, compile_whole, configure, end_by_signal,
                    explain_failures, make_out_dir, print0, refuse_below_one, refuse_overwriting,
                    save_checkpoint, start_processes, stop_processes)
from data import has_split, prefetch, torch_seed
from flow import draw_times, flow_matching_loss, sample
from judge.cost import say_memory, unet_flops
from judge.figures import curves, views
from latents import Latents, encode_all, go_on, run_state
from model import FlowUNet, FlowUNetConfig
from optim import MeanGradients, make_optimizers, take_step, update_average

# ---------------------------------------------------------------- settings; the defaults are DeCo-VAE's
# in and out
vae = 'out/decovae_vad/ckpt.pt'  # the autoencoder
data_dir = ''            # '' for what the autoencoder was trained on
latents_dir = ''         # '' for a folder beside its checkpoint; of several data sets as many, with commas
out_dir = 'out/flow'
init_from = 'scratch'    # or resume (out_dir/ckpt.pt)
resume_changed = False   # go on with other settings than the run began with
overwrite = False        # begin anew in an out_dir that holds a run
log_interval = 10
eval_interval = 1000     # steps between validations; each writes ckpt.pt
eval_scans = 32          # validation scans used; -1 for all
sample_interval = 10_000 # steps between pictures of two samples; 0 for none
wandb_project = ''
tensorboard = False      # also for TensorBoard, in out_dir/tensorboard
# data
batch_size = 4           # latents per process
conditions = ()          # of modality, sex, age; () is the paper's unconditional row
p_drop = 0.1             # probability that a latent is shown without its conditions, for guidance
normalise = 'global'     # one mean and sd for the whole latent, or 'channel', one for each
# model: fields of FlowUNetConfig
widths = (64, 128, 256, 512)
res_blocks = 2
attention = (False, False, True, True)
head_width = 32
# objective
norm = 'l2'              # DeCo eq. 2; its released code has 'l1'
times = 'uniform'        # or 'logit_normal'
shift = 1.0              # of the times, in training and sampling alike; MAISI: (d h w / 32^3)^(1/3)
# schedule and optimiser
iters = 100_000
max_iters = 0            # above 0 it stops the run, and changes nothing else
muon = False             # weights of 16 outputs and more move by orthogonal steps; the paper has Adam
lr = 1e-4
lr_power = 2.0           # lr (1 - step/iters)^lr_power; 0 for constant
warmup_iters = 0
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0
ema_decay = 0.999        # average of the weights: validated, and what is sampled
# system
device = ''
dtype = 'bfloat16'       # autocast, or float32; on a CPU float32 is used
compile = True
seed = 0

def check_settings():
    """SystemExit with one line for settings that cannot be."""
    refuse_below_one(config, 'batch_size', 'iters', 'log_interval', 'eval_interval')
    autocast('cpu', dtype)  # refuses other types
    if init_from not in ('scratch', 'resume'):
        raise SystemExit(f'--init_from={init_from}: scratch or resume')
    if normalise not in ('global', 'channel'):
        raise SystemExit(f'--normalise={normalise}: global or channel')
    if norm not in ('l1', 'l2'):
        raise SystemExit(f'--norm={norm}: l2 or l1')
    try:
        draw_times(1, times, shift)
    except ValueError as e:
        raise SystemExit(f'--times: {e}')

# ---------------------------------------------------------------- functions of the run

def get_lr(it):
    return lr * min(1.0, (it + 1) / max(1, warmup_iters)) * max(0.0, 1 - it / iters) ** lr_power

def make_batch(it):
    return train_set.batch(it, batch_size, p_drop)

def draw_noise(sample_index):
    """Noise for the posterior, noise for the path, and times of a batch.

    A sample's draws depend on its index alone: they are the same on any number of processes.
    """
    eps, x0, t = [], [], []
    for k in sample_index.tolist():
        g = torch.Generator(device).manual_seed(torch_seed(seed, 30, k))
        eps.append(torch.randn(train_set.shape, generator=g, device=device))
        x0.append(torch.randn(train_set.shape, generator=g, device=device))
        t.append(draw_times(1, times, shift, device, g))
    return torch.stack(eps), torch.stack(x0), torch.cat(t)

def learn(x1, x0, t, cond):
    """The loss of a batch, whose gradients it adds to the network's."""
    with autocast(device, dtype):
        loss = flow_matching_loss(raw_model, x1, x0, t, cond, norm)
    loss.backward()
    return loss.detach()

@torch.no_grad()
def validate():
    """Loss of the averaged network in ten bins of t, and their mean. The noise is the same every time."""
    averaged = (ema or raw_model).eval()
    n = val_set.n if eval_scans < 0 else min(eval_scans, val_set.n)
    centres = [(k + 0.5) / 10 for k in range(10)]
    sums = torch.zeros(10, 2, dtype=torch.float64)  # of losses, and of scans
    for i in range(rank, n, world):
        x1, cond, x0 = tree_map_only(torch.Tensor, lambda x: x.to(device), val_set.whole(i))
        for k, centre in enumerate(centres):
            t = torch.full((1,), centre, device=device)
            with autocast(device, dtype):
                loss = flow_matching_loss(averaged, averaged.normalise(x1), x0, t, cond, norm)
            sums[k, 0] += loss.item()
            sums[k, 1] += 1
    if world > 1:
        dist.all_reduce(sums)
    raw_model.train()
    bins = (sums[:, 0] / sums[:, 1]).tolist()
    record = {f'val/loss_t{centre:.2f}': loss for centre, loss in zip(centres, bins)}
    return record | {'val/loss': sum(bins) / 10}

@torch.no_grad()
def draw_samples():
    """Picture of two unconditional samples of the averaged network, middle slices of the three planes."""
    averaged = (ema or raw_model).eval()
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, *train_set.shape, generator=g).to(device)
    with autocast(device, dtype):
        z = averaged.denormalise(sample(averaged, noise, 30, shift=shift))
        x = autoencoder.from_latent(z, 0).float().clamp(0, 1).cpu()
    raw_model.train()
    row = [(f'sample {i}', volume) for i, volume in enumerate(x[:, 0].numpy())]
    views(os.path.join(out_dir, f'samples_{it:06d}.png'), [row])

def save(name, validated=True):
    """Write what a resumed run and sample.py need; unless validated, the run begins with a validation."""
    if rank: return
    state = run_state(parts, config, world, train_set)
    save_checkpoint(os.path.join(out_dir, name), state | {
        'iter_num': it, 'best_val': best_val, 'validated': validated})

def validate_and_save():
    """What follows on step `it` every eval_interval steps and at the end."""
    global best_val
    if val_set:
        record = {'iter': it} | validate()
        log.write(record)
        print0(f'iter {it:,}/{stop:,}: val/loss {record["val/loss"]:.4f}')
        if rank == 0:
            curves(os.path.join(out_dir, 'curves.png'), log.tabulate())
        if record['val/loss'] < best_val:
            best_val = record['val/loss']
            save('best.pt')
    save('ckpt.pt')
    log.restart(it)

def make_model():
    """The U-Net of the settings, with the training set's statistics; SystemExit if there is none."""
    try:
        made = FlowUNet(FlowUNetConfig(
            in_channels=train_set.shape[0], widths=widths, res_blocks=res_blocks, attention=attention,
            head_width=head_width, classes=train_set.classes, vectors=train_set.vectors))
    except ValueError as e:
        raise SystemExit(f'model: {e}')
    made.latent_mean[:], made.latent_sd[:] = train_set.statistics(normalise)
    return made

def rehearse():
    """A step of this run for step_bytes."""
    x1 = torch.empty(batch_size, *train_set.shape).contiguous(memory_format=memory_format)
    learn(x1, torch.empty_like(x1), torch.rand(batch_size), train_set.cond([0] * batch_size))

# ---------------------------------------------------------------- the run

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    check_settings()
    if device == 'cpu':
        dtype, compile = 'float32', False
    savers = f'batch_size={batch_size}'
    explain_failures(savers)
    stop = min(max_iters or iters, iters)

    # ---- autoencoder and its latents
    if rank == 0:
        make_out_dir(out_dir)
        refuse_overwriting(out_dir, init_from, overwrite)
    autoencoder, vae_checkpoint, data_dir, latents_dir = encode_all(
        vae, data_dir, latents_dir, rank, world, device)
    config |= dict(data_dir=data_dir, latents_dir=latents_dir)
    modalities = tuple(vae_checkpoint['config']['modalities'])
    source = latents_dir, data_dir, modalities
    train_set = Latents(*source, 'train', conditions, seed, rank, world)
    val_set = Latents(*source, 'val', conditions) if has_split(data_dir, modalities, 'val') else None
    print0(f'{latents_dir}: {train_set.n} training latents, {val_set.n if val_set else 0} for validation, '
           f'shape {train_set.shape}' + (f', conditions {", ".join(conditions)}' if conditions else ''))
    if not val_set:
        print0('no validation split: best.pt will not be written')

    # ---- model
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    raw_model = make_model()
    # on a CPU small grids are faster in plain memory order
    memory_format = torch.channels_last_3d if device.startswith('cuda') else torch.contiguous_format
    raw_model.to(device, memory_format=memory_format)
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    parameters = list(raw_model.parameters())
    optimizers = make_optimizers(parameters, muon, lr, (beta1, beta2), 1e-8, 0.0)
    parts = {'model': raw_model, 'ema': ema, 'optimizer': optimizers[0],
             'muon': optimizers[1] if muon else None}
    it, best_val, validated = 0, math.inf, True
    if init_from == 'resume':
        it, best_val, validated = go_on(f'{out_dir}/ckpt.pt', train_set.encoder_hash, config, world, parts)
    say_memory(globals(), ('raw_model',), optimizers, [autoencoder, ema], rehearse, savers)
    if compile:
        compile_whole(raw_model)
    flops = unet_flops(raw_model, train_set.shape)
    print0(f'{flops / 1e9:.1f} GFLOP per latent forward, on {device} x {world}')

    # ---- loop
    gradients = MeanGradients(parameters)
    log = StepLog(out_dir, config, wandb_project, log_interval, it, stop, device, world, validated)
    stop_signal = catch_signals()
    raw_model.train()
    if not validated:
        validate_and_save()
    batches = prefetch(make_batch, range(it, stop), device)
    while it < stop:
        batch = log.next_batch(batches)
        z, cond = batch['mean'], batch['cond']
        eps, x0, t = draw_noise(batch['sample_index'])
        if 'sd' in batch:
            z = z + batch['sd'] * eps  # a fresh draw from the posterior at every step
        x1 = raw_model.normalise(z).contiguous(memory_format=memory_format)
        gradients.expect()
        loss = learn(x1, x0, t, cond)
        gradients.finish()
        grad_norm = take_step(optimizers, parameters, get_lr(it), grad_clip)
        if ema:  # a short average while weights move fast
            update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))
        it += 1

        terms = {'loss': loss}
        log.count('latents', batch_size, 3 * flops * batch_size)  # a backward pass costs two forward ones
        log.note(it, terms | {'gradient': grad_norm}, batch['files'])
        stopped_by = stop_signal()
        validates = it % eval_interval == 0 or it == stop
        if log.due(it) or validates or stopped_by:
            log.check()
        if log.due(it):
            log.step(it, terms, grad_norm, get_lr(it - 1))
        if stopped_by:
            save('ckpt.pt', not validates)  # a validation may be cut short
        if validates:
            validate_and_save()
        if sample_interval and it % sample_interval == 0 and rank == 0:
            draw_samples()
        if stopped_by:
            end_by_signal(stopped_by, it)
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
