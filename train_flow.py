"""Train a flow on the latents of a trained autoencoder (train_vae.py), then generate with sample.py --mode=generate.

    python train_flow.py config/demo_flow.py                                  # phantoms on a laptop CPU, after config/demo_kl.py
    python train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt         # DeCo-VAE's flow on one GPU
    torchrun --nproc_per_node=4 train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt --batch_size=1
    python train_flow.py config/flow.py --vae=out/decovae_vad/ckpt.pt --init_from=resume

The first start encodes the training and validation scans into latents_dir. Writes out_dir/ckpt.pt (resume), best.pt (best
validation loss), log.jsonl, config.py and, with matplotlib, samples_ITER.png.
"""
import copy
import math
import os
import sys
import time

import torch
import torch.distributed as dist

from common import (
    all_reduce_mean, autocast, catch_signals, check_finite, configure, explain_failures, git_commit,
    load_checkpoint, make_out_dir, open_log, peak_flops, print0, refuse_changes, save_checkpoint,
    start_processes, stop_processes, update_average
)
from data import fingerprint, prefetch, refuse_other_data
from judge.figures import views
from flow import draw_times, flow_matching_loss, sample
from latents import Latents, encode_sessions
from model import FlowUNet, FlowUNetConfig, encoder_hash, from_checkpoint, model_args, unet_flops

# ---------------------------------------------------------------- settings; the defaults are DeCo-VAE's
# in and out
vae = 'out/decovae_vad/ckpt.pt'  # the autoencoder
data_dir = ''            # '' for the one the autoencoder was trained on
latents_dir = ''         # '' for a folder beside the autoencoder's checkpoint
out_dir = 'out/flow'
init_from = 'scratch'    # scratch | resume (out_dir/ckpt.pt)
resume_changed = False   # go on with other settings than the run began with
log_interval = 10
eval_interval = 1000     # steps between validations, each of which writes ckpt.pt
eval_scans = 32          # validation scans used; -1 for all
sample_interval = 10_000 # steps between pictures of two samples; 0 for none
wandb_project = ''
# data
batch_size = 4           # latents per process
# of modality, sex, age (columns of subjects.tsv); () is the paper's unconditional row
conditions = ()
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
max_iters = 100_000      # only stops the run
lr = 1e-4
lr_power = 2.0           # lr (1 - step/iters)^lr_power; 0 for constant
warmup_iters = 0
beta1, beta2 = 0.9, 0.999
grad_clip = 1.0
ema_decay = 0.999        # average of the weights: validated, and what is sampled
# system
device = ''
dtype = 'bfloat16'       # autocast, or float32; on a CPU float32 is used
compile = True
seed = 0

# settings that change no weight, free to differ when a run is resumed; vae is known by its hash
NOT_RESULTS = (
    'vae', 'data_dir', 'latents_dir', 'out_dir', 'init_from', 'resume_changed', 'log_interval',
    'eval_interval', 'eval_scans', 'sample_interval', 'wandb_project', 'max_iters', 'device', 'compile'
)

# ---------------------------------------------------------------- functions of the run

def get_lr(it):
    return lr * min(1.0, (it + 1) / max(1, warmup_iters)) * max(0.0, 1 - it / iters) ** lr_power

def make_batch(it):
    return train_set.batch(batch_size, seed, rank, world, it, p_drop)

def draws(places):
    """Noise for the posterior, noise for the path and times, per sample from its number in the run: the same on any number of processes."""
    eps, x0, t = [], [], []
    for place in places.tolist():
        g = torch.Generator(device).manual_seed((seed << 44) + place)
        for noise in (eps, x0):
            noise.append(torch.randn(train_set.shape, generator=g, device=device))
        t.append(draw_times(1, times, shift, device, g))
    return torch.stack(eps), torch.stack(x0), torch.cat(t)

def validate():
    """Loss of the averaged network in ten bins of t, with noise that is the same at every validation; their mean."""
    judge, total = ema or raw_model, torch.zeros(10, 2, dtype=torch.float64)
    n = val_set.n if eval_scans < 0 else min(eval_scans, val_set.n)
    judge.eval()
    with torch.no_grad():
        for i in range(rank, n, world):
            x1, cond, x0 = val_set.whole(i)
            x1, x0, cond = to_device(x1), to_device(x0), to_device(cond)
            for k in range(10):
                t = torch.full((1,), (k + 0.5) / 10, device=device)
                with autocast(device, dtype):
                    loss = flow_matching_loss(judge, judge.normalise(x1), x0, t, cond, norm)
                total[k] += torch.tensor([loss.item(), 1.0])
    if world > 1:
        dist.all_reduce(total)
    raw_model.train()
    bins = (total[:, 0] / total[:, 1]).tolist()
    return {f'val/loss_t{(k + 0.5) / 10:.2f}': v for k, v in enumerate(bins)} | {'val/loss': sum(bins) / 10}

def to_device(t):
    if isinstance(t, torch.Tensor): return t.to(device)
    if isinstance(t, dict): return {k: to_device(v) for k, v in t.items()}
    return [to_device(v) for v in t] if isinstance(t, list) else t

def draw_samples():
    """Picture of two unconditional samples of the averaged network, middle slices of the three planes."""
    judge = (ema or raw_model).eval()
    noise = torch.randn(2, *train_set.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad(), autocast(device, dtype):
        x = (
            autoencoder.from_latent(judge.denormalise(sample(judge, noise, 30, shift=shift)), 0)
            .float()
            .clamp(0, 1)
            .cpu()[:, 0]
        )
    raw_model.train()
    views(
        os.path.join(out_dir, f'samples_{it:06d}.png'),
        [[(f'sample {i}', volume) for i, volume in enumerate(x.numpy())]],
    )

def save(name):
    if rank: return
    save_checkpoint(
        os.path.join(out_dir, name),
        {
            'model': raw_model.state_dict(),
            'ema': ema.state_dict() if ema else None,
            'optimizer': optimizer.state_dict(),
            'model_args': model_args(raw_model),
            'config': config,
            'world': world,
            'data': vae_checkpoint['data'],
            'fingerprint': fingerprint(data_dir),
            'voxel_mm': vae_checkpoint['voxel_mm'],
            'encoder_hash': train_set.encoder_hash,
            'latent_shape': train_set.shape,
            'conditions': train_set.conditions,
            'iter_num': it,
            'best_val': best_val,
            'git_commit': git_commit(),
        },
    )

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    if device == 'cpu':
        dtype, compile = 'float32', False
    explain_failures(f'batch_size={batch_size}')
    if normalise not in ('global', 'channel'):
        raise SystemExit(f'--normalise={normalise}: global or channel')
    try:
        draw_times(1, times, shift)
    except ValueError as e:
        raise SystemExit(f'--times: {e}')
    if norm not in ('l1', 'l2'): raise SystemExit(f'--norm={norm}: l2 or l1')
    stop = min(max_iters, iters)

    # ------------------------------------------------------------ autoencoder and its latents
    vae_checkpoint = load_checkpoint(vae)
    if vae_checkpoint['model_args']['kind'] == 'flowunet':
        raise SystemExit(f'--vae={vae}: this is a flow, not an autoencoder')
    autoencoder = from_checkpoint(vae_checkpoint).to(device)
    data_dir = data_dir or vae_checkpoint['config']['data_dir']
    if ',' in data_dir:
        raise SystemExit(f'--data_dir={data_dir}: the latents of one data set; give one folder')
    modalities = tuple(vae_checkpoint['config']['modalities'])
    latents_dir = latents_dir or os.path.join(
        os.path.dirname(vae) or '.', 'latents_' + os.path.basename(os.path.normpath(data_dir))
    )
    config |= dict(data_dir=data_dir, latents_dir=latents_dir)
    make_out_dir(out_dir) if rank == 0 else None
    encode_sessions(
        autoencoder, encoder_hash(autoencoder), data_dir, modalities, latents_dir, rank, world, device
    )
    if world > 1:
        dist.barrier()
    train_set = Latents(latents_dir, data_dir, modalities, 'train', conditions)
    try:
        val_set = Latents(latents_dir, data_dir, modalities, 'val', conditions)
    except SystemExit:
        val_set = None
    print0(
        f'{latents_dir}: {train_set.n} training latents, {val_set.n if val_set else 0} for validation, shape'
        f' {train_set.shape}'
        + (f', conditions {", ".join(conditions)}' if conditions else '')
    )
    if not val_set:
        print0('no validation split: best.pt will not be written')

    # ------------------------------------------------------------ model
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        raw_model = FlowUNet(
            FlowUNetConfig(
                in_channels=train_set.shape[0],
                widths=widths,
                res_blocks=res_blocks,
                attention=attention,
                head_width=head_width,
                classes=train_set.classes,
                vectors=train_set.vectors,
            )
        )
    except ValueError as e:
        raise SystemExit(f'model: {e}')
    raw_model.latent_mean[:], raw_model.latent_sd[:] = train_set.statistics(normalise)
    it, best_val, resumed = 0, math.inf, None
    if init_from == 'resume':
        resumed = load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))
        if (
            resumed['model_args'] != model_args(raw_model)
            or resumed.get('encoder_hash') != train_set.encoder_hash
        ):
            raise SystemExit(
                f'--init_from=resume: {out_dir}/ckpt.pt is of another network or of the latents of another'
                ' autoencoder'
            )
        if not resume_changed:
            refuse_changes(resumed, config, world, NOT_RESULTS)
        refuse_other_data(resumed['fingerprint'], data_dir, f'{out_dir}/ckpt.pt')
        raw_model.load_state_dict(resumed['model'])
    elif init_from != 'scratch':
        raise SystemExit(f'--init_from={init_from}: scratch or resume')
    # on a CPU small grids are faster so
    layout = torch.channels_last_3d if device.startswith('cuda') else torch.contiguous_format
    raw_model.to(device, memory_format=layout)
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    trained = list(raw_model.parameters())
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(beta1, beta2), fused=True)
    if resumed:
        if ema:
            ema.load_state_dict(resumed['ema'])
        optimizer.load_state_dict(resumed['optimizer'])
        it, best_val = resumed['iter_num'], resumed['best_val']
        print0(f'resumed {out_dir}/ckpt.pt at iteration {it}')
    del resumed
    if compile:
        raw_model.compile(dynamic=False)
    flops = unet_flops(raw_model, train_set.shape)
    print0(
        f'{sum(p.numel() for p in trained) / 1e6:.2f} M parameters, {flops / 1e9:.1f} GFLOP per latent'
        f' forward, on {device} x {world}'
    )

    # ------------------------------------------------------------ log
    log, stop_signal = open_log(out_dir, config, wandb_project, it), catch_signals()

    # ------------------------------------------------------------ loop
    raw_model.train()
    first = logged = it
    batches = prefetch(make_batch, range(it, stop), device)
    clock, waited, recent = time.perf_counter(), 0.0, []
    while it < stop:
        for group in optimizer.param_groups:
            group['lr'] = get_lr(it)
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        z, cond = batch['mean'], to_device(batch['cond'])
        eps, x0, t = draws(batch['place'])
        if 'sd' in batch:
            z = z + batch['sd'] * eps  # a fresh draw from the posterior at every step
        x1 = raw_model.normalise(z).contiguous(memory_format=layout)
        with autocast(device, dtype):
            loss = flow_matching_loss(raw_model, x1, x0, t, cond, norm)
        loss.backward()
        all_reduce_mean([p.grad for p in trained if p.grad is not None])
        gradient = torch.nn.utils.clip_grad_norm_(trained, grad_clip if grad_clip > 0 else math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))
        it += 1
        # looked at later: a look waits for the GPU
        recent.append((it, ['loss', 'gradient'], torch.stack([loss.detach(), gradient]), batch['files']))
        stopped_by = stop_signal()
        judged = it % eval_interval == 0 or it == stop or stopped_by

        if it % log_interval == 0 or it == first + 1 or judged:
            check_finite(recent)
            recent.clear()
        if it % log_interval == 0 or it == first + 1:
            values = torch.stack([loss.detach(), gradient])
            all_reduce_mean([values])
            seconds, steps = time.perf_counter() - clock, it - logged
            record = {
                'iter': it,
                'train/loss': values[0].item(),
                'train/grad_norm': values[1].item(),
                'lr': get_lr(it - 1),
                'ms': 1000 * seconds / steps,
                'latents_per_s': world * batch_size * steps / seconds,
                'data_wait': waited / seconds,
            }
            if peak_flops(device):
                record['mfu'] = 3 * flops * batch_size * steps / seconds / peak_flops(device)
            if device.startswith('cuda'):
                record['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
            if it % log_interval == 0 or it == 1:
                log(record)  # the first line after a resume is for the screen only
            print0(
                f'iter {it}: loss {record["train/loss"]:.4f} | grad {record["train/grad_norm"]:.2f} | lr'
                f' {record["lr"]:.1e} | {record["ms"]:.0f} ms | {record["latents_per_s"]:.1f} latents/s |'
                f' wait {record["data_wait"]:.0%}'
                + (f' | mfu {record["mfu"]:.0%}' if 'mfu' in record else '')
                + (f' | {record["peak_gib"]:.1f} GiB' if 'peak_gib' in record else '')
            )
            clock, waited, logged = time.perf_counter(), 0.0, it

        if judged:
            if val_set and not stopped_by:
                record = {'iter': it} | validate()
                log(record)
                print0(f'iter {it}: val/loss {record["val/loss"]:.4f}')
                if record['val/loss'] < best_val:
                    best_val = record['val/loss']
                    save('best.pt')
            save('ckpt.pt')
            clock, waited, logged = time.perf_counter(), 0.0, it
        if sample_interval and it % sample_interval == 0 and rank == 0:
            draw_samples()
        if stopped_by:
            print0(f'stopped by signal {stopped_by} after iteration {it}; go on with --init_from=resume')
            stop_processes()
            raise SystemExit(128 + stopped_by)
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
