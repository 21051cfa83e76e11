"""Train an autoencoder on prepared data (prepare.py).

    python train_vae.py config/demo.py                                      # phantoms on a laptop CPU, minutes
    python train_vae.py config/neuroquant.py --data_dir=data/mine           # the paper's run on one GPU
    torchrun --nproc_per_node=8 train_vae.py config/neuroquant.py --data_dir=data/mine
    python train_vae.py config/neuroquant.py --init_from=resume             # go on where it stopped

Writes out_dir/ckpt.pt (resume), best.pt (best validation PSNR), ckpt_3d.pt (end of the 3D phase), log.jsonl, config.py.
"""
import copy
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (all_reduce_mean, autocast, configure, git_commit, load_checkpoint, log_json, make_out_dir, peak_flops, print0,
                    save_checkpoint, start_processes, stop_processes, update_average, write_text)
from data import Sessions, prefetch
from losses import ModalityClassifier, grad_reverse, psnr, reconstruction_loss
from model import NeuroQuant, NeuroQuantConfig, from_checkpoint, model_args, step_flops

# ---------------------------------------------------------------- settings; the defaults are the paper's NeuroQuant
# in and out
data_dir = 'data/phantom'
prepare = ''             # flags for prepare.py, run first when data_dir holds no data; '' for never
out_dir = 'out/neuroquant'
init_from = 'scratch'    # scratch | resume (out_dir/ckpt.pt) | PATH of a checkpoint whose weights to start from
log_interval = 10        # steps between log lines
eval_interval = 1000     # steps between validations, each of which writes ckpt.pt
eval_sessions = 32       # validation sessions used; -1 for all
wandb_project = ''       # '' is off
# data
batch_size = 4           # sessions per process and micro-step, each with all its modalities
grad_accum = 1           # micro-steps per step
patch = ()               # (D,H,W) cut at random; () for whole volumes
batch_size_2d = 128      # slices per process
# model: fields of NeuroQuantConfig
modalities = ('T1w', 'T2w')
widths = (32, 64, 128, 256)
res_blocks = 1
attention = True
film = True
anat_dim = 64
mod_dim = 32
modality_dim = 32
num_codes = 4096
code_decay = 0.99
revive = 0.1
# objective
w_ssim = 0.5             # lambda_SSIM of eq. 12
w_commit = 0.25          # beta of eq. 7
w_cross = 0.5            # eq. 14, over every ordered pair of a session's modalities
cross_start, cross_ramp = 2000, 2000  # steps before w_cross sets in, and steps of its linear rise
w_adv = 0.001            # scale of the reversed gradient, eq. 15; the classifier itself learns at full weight
adv_start = 5000         # steps before the reversal sets in; then 2/(1+exp(-10p))-1 over the rest of the 3D phase
# schedule
joint = 'sequential'     # slices after volumes | 'interleaved': with them | 'none'
iters_3d = 100_000
iters_2d = 25_000        # of joint='sequential'
p_2d, w_2d = 0.3, 0.5    # of joint='interleaved': probability of a batch of slices in a step, and its weight
max_iters = 125_000      # only stops the run; the phases and schedules above and below do not depend on it
# optimiser
lr = 1e-4
min_lr = 4.5e-6          # reached at lr_decay_iters by a cosine, constant afterwards
warmup_iters = 2000
lr_decay_iters = 100_000
weight_decay = 0.01
beta1, beta2 = 0.9, 0.999
grad_clip = 1.0
ema_decay = 0.999        # average of the weights, validated and used by evaluate.py and sample.py; 0 for none
# system
device = ''              # '' picks cuda when there is one
dtype = 'bfloat16'       # bfloat16 autocast, or float32; on a CPU float32 is used
compile = True           # torch.compile of encoder and decoder; on a CPU never
checkpointing = False    # recompute the decoder's half- and full-size stages in the backward pass: less memory, more time
seed = 0

# ---------------------------------------------------------------- functions of the run

def get_lr(it):
    """Linear warm-up, cosine from lr to min_lr at lr_decay_iters, constant afterwards."""
    if it < warmup_iters: return lr * (it + 1) / warmup_iters
    p = min(1.0, (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * p)) * (lr - min_lr)

def get_w_cross(it):
    return w_cross * min(1.0, max(0.0, (it - cross_start) / max(1, cross_ramp)))

def get_alpha(it):
    """Scale of the reversed gradient, Ganin & Lempitsky 2015's rise."""
    p = (it - adv_start) / max(1, iters_3d - adv_start)
    return 0.0 if p <= 0 else w_adv * (2 / (1 + math.exp(-10 * min(1.0, p))) - 1)

def micro_steps(it):
    """What step `it` trains on: a list of (kind, batch number, weight)."""
    if it >= iters_3d: return [('slices', it, 1.0)]
    steps = [('volumes', it * grad_accum + k, 1 / grad_accum) for k in range(grad_accum)]
    coin = random.Random(f'{seed}:{it}').random()  # the same on every process
    if joint == 'interleaved' and coin < p_2d: steps.append(('slices', it, w_2d))
    return steps

def make_batch(micro):
    kind, number, _ = micro
    if kind == 'slices': return train_set.slices(batch_size_2d, seed, rank, world, number)
    return train_set.volumes(batch_size, seed, rank, world, number, patch)

def objective(batch, kind, it):
    """The loss of one micro-batch, and its unweighted terms; each a mean over the joined batch of all processes."""
    x, modality, pairs, share = batch['x'], batch['modality'], batch.get('pairs', ()), batch['share']
    w_cross_now = get_w_cross(it) if len(pairs) else 0.0
    with autocast(device, dtype):
        out = model(x, modality, pairs if w_cross_now > 0 else None)
        recon, commit = share * reconstruction_loss(out['x_hat'], x, w_ssim), share * out['commit']
        if kind == 'slices': return recon, {'recon_2d': recon, 'commit_2d': commit}  # "only L_rec^2D is computed", 3.5
        terms = {'recon': recon, 'commit': commit}
        loss = recon + w_commit * commit
        if classifier:
            logits = classifier(grad_reverse(out['z_anat'].float(), get_alpha(it)))
            terms['adv'] = share * F.cross_entropy(logits.float(), modality)
            loss = loss + terms['adv']
        if w_cross_now > 0:
            terms['cross'] = batch['pair_share'] * F.l1_loss(out['x_cross'].float(), x[pairs[:, 1]])
            loss = loss + w_cross_now * terms['cross']
    return loss, terms

@torch.no_grad()
def validate():
    """Whole-volume PSNR of the (averaged) model on the first eval_sessions validation sessions, per modality and mean."""
    judge = ema or raw_model
    judge.eval()
    total = torch.zeros(len(modalities), 2, dtype=torch.float64)  # sum of PSNR, volumes
    n = val_set.n if eval_sessions < 0 else min(eval_sessions, val_set.n)
    for i in range(rank, n, world):
        for m in val_set.present(i):
            x = torch.tensor(val_set.volume(i, m), dtype=torch.float32, device=device)[None, None]
            with autocast(device, dtype): x_hat = judge.reconstruct(x, m)
            total[m] += torch.tensor([psnr(x_hat.clamp(0, 1), x).item(), 1.0])
    if world > 1: dist.all_reduce(total)
    raw_model.train()
    record = {f'val/psnr_db/{name}': s / k for name, (s, k) in zip(modalities, total.tolist()) if k}
    return record | {'val/psnr_db': sum(record.values()) / len(record), 'val/n_sessions': n}

def save(name):
    """Everything a resumed run needs; the optimiser is plain tensors, the data's place follows from iter_num."""
    if rank: return
    save_checkpoint(os.path.join(out_dir, name), {
        'model': raw_model.state_dict(), 'ema': ema.state_dict() if ema else None,
        'classifier': classifier.state_dict() if classifier else None, 'optimizer': optimizer.state_dict(),
        'model_args': model_args(raw_model), 'config': config,
        'data': {'shape': train_set.shape, 'spacing_mm': train_set.spacing_mm}, 'iter_num': it, 'best_val': best_val, 'git_commit': git_commit()})

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    if joint not in ('sequential', 'interleaved', 'none'): raise SystemExit(f'--joint={joint}: sequential, interleaved or none')
    if not film and w_cross > 0: raise SystemExit('w_cross > 0 needs film=True: without FiLM there is no modality to swap')
    if device == 'cpu': dtype, compile = 'float32', False
    stop = min(max_iters, iters_3d + (iters_2d if joint == 'sequential' else 0))

    # ------------------------------------------------------------ data
    if rank == 0:
        make_out_dir(out_dir)
        if prepare and not os.path.exists(os.path.join(data_dir, 'subjects.tsv')):
            here = os.path.dirname(os.path.abspath(__file__))
            made = subprocess.run([sys.executable, os.path.join(here, 'prepare.py'), *shlex.split(prepare), f'--out_dir={data_dir}'])
            if made.returncode: raise SystemExit(f'{data_dir}: prepare.py {prepare} did not finish')
    if world > 1: dist.barrier()
    train_set = Sessions(data_dir, modalities, 'train')
    has_val = any(row['split'] == 'val' for row in Sessions(data_dir, modalities, None).rows)
    val_set = Sessions(data_dir, modalities, 'val') if has_val else None
    print0(f'{data_dir}: {train_set.n} training sessions, {val_set.n if val_set else 0} for validation, '
           f'volumes {train_set.shape}, modalities {", ".join(modalities)}')
    if not val_set: print0('no validation split: best.pt will not be written')

    # ------------------------------------------------------------ model
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        raw_model = NeuroQuant(NeuroQuantConfig(
            modalities=modalities, widths=widths, res_blocks=res_blocks, attention=attention, film=film, anat_dim=anat_dim,
            mod_dim=mod_dim, modality_dim=modality_dim, num_codes=num_codes, code_decay=code_decay, revive=revive))
        raw_model.check_size(patch or train_set.shape)
    except ValueError as e: raise SystemExit(f'model: {e}')
    classifier = ModalityClassifier(anat_dim, len(modalities)) if w_adv > 0 else None
    start, resumed = {}, None
    if init_from != 'scratch':
        start = load_checkpoint(os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from)
        ours = model_args(raw_model)
        differ = [f'{k} {start["model_args"].get(k)!r} there, {ours.get(k)!r} here' for k in start['model_args'] | ours
                  if start['model_args'].get(k) != ours.get(k)]
        if differ: raise SystemExit(f'--init_from={init_from}: checkpoint of another model: {"; ".join(differ)}')
        raw_model.load_state_dict(start['model'])
        if init_from == 'resume': resumed = start
    raw_model.to(device, memory_format=torch.channels_last_3d)
    if classifier: classifier.to(device)
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    raw_model.decoder.checkpointing = checkpointing
    trained = list(raw_model.parameters()) + (list(classifier.parameters()) if classifier else [])
    groups = [{'params': [p for p in trained if p.ndim > 1], 'weight_decay': weight_decay},  # no decay on biases and norms
              {'params': [p for p in trained if p.ndim <= 1], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)
    it, best_val = 0, -math.inf
    if resumed:
        if ema: ema.load_state_dict(resumed['ema'])
        if classifier: classifier.load_state_dict(resumed['classifier'])
        optimizer.load_state_dict(resumed['optimizer'])
        it, best_val = resumed['iter_num'], resumed['best_val']
        print0(f'resumed {out_dir}/ckpt.pt at iteration {it}')
    del start, resumed  # the checkpoint's copy of everything
    model = raw_model
    if compile:  # part by part: the quantiser between them stays eager, so no graph breaks
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    flops = {kind: step_flops(raw_model, shape) for kind, shape in
             (('volumes', patch or train_set.shape), ('slices', (1, *train_set.shape[1:])))}
    bits = raw_model.bits_per_volume(train_set.shape)
    print0(f'{sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f} M parameters, {bits:.0f} bits of codes per volume '
           f'({16 * math.prod(train_set.shape) / bits:.0f}x less than 16-bit voxels), '
           f'{sum(flops["volumes"]) / 1e9:.1f} GFLOP per volume forward, on {device} x {world}')

    # ------------------------------------------------------------ output
    if rank == 0:
        write_text(os.path.join(out_dir, 'config.py'), ''.join(f'{k} = {v!r}\n' for k, v in config.items()))
        if wandb_project:
            try: import wandb
            except ImportError: raise SystemExit('--wandb_project needs wandb: pip install wandb, or leave it empty')
            wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
    def log(record):
        if rank: return
        log_json(out_dir, record)
        if wandb_project: wandb.log(record, step=record['iter'])
    asked_to_stop = []
    for sig in (signal.SIGINT, signal.SIGTERM): signal.signal(sig, lambda number, frame: asked_to_stop.append(number))

    # ------------------------------------------------------------ loop
    raw_model.train()
    first = it
    batches = prefetch(make_batch, (micro for i in range(it, stop) for micro in micro_steps(i)), device)
    clock, waited, seen, done_flops, logged = time.perf_counter(), 0.0, {'volumes': 0, 'slices': 0}, 0.0, it
    while it < stop:
        for group in optimizer.param_groups: group['lr'] = get_lr(it)
        torch.manual_seed((seed << 32) + it)  # the quantiser's draws, the same on every process and after a resume
        terms = {}
        for kind, _, weight in micro_steps(it):
            t = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - t
            batch['x'] = batch['x'].contiguous(memory_format=torch.channels_last_3d)
            loss, new = objective(batch, kind, it)
            (weight * loss).backward()
            for k, v in new.items(): terms[k] = terms.get(k, 0.0) + v.detach() / (grad_accum if kind == 'volumes' else 1)
            seen[kind] += len(batch['x'])
            decodes = len(batch['x']) + (len(batch['pairs']) if 'cross' in new else 0)
            done_flops += 3 * (len(batch['x']) * flops[kind][0] + decodes * flops[kind][1])  # backward is twice forward
        all_reduce_mean([p.grad for p in trained if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip if grad_clip > 0 else math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema: update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))  # a short average while weights move fast
        it += 1

        if it % log_interval == 0 or it == first + 1:
            values = torch.stack([*terms.values(), norm])
            all_reduce_mean([values])
            *values, norm = values.tolist()
            seconds, steps = time.perf_counter() - clock, it - logged
            record = {'iter': it, **{f'train/{k}': v for k, v in zip(terms, values)}, 'train/grad_norm': norm, 'lr': get_lr(it - 1),
                      'perplexity': raw_model.quantizer.perplexity().item(), 'ms': 1000 * seconds / steps,
                      **{f'{kind}_per_s': world * n / seconds for kind, n in seen.items() if n}, 'data_wait': waited / seconds}
            if peak_flops(device): record['mfu'] = done_flops / seconds / peak_flops(device)
            if device.startswith('cuda'): record['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
            log(record)
            print0(f'iter {it}: ' + ' | '.join(f'{k} {v:.4f}' for k, v in zip(terms, values))
                   + f' | ppl {record["perplexity"]:.0f}/{num_codes} | grad {norm:.2f} | lr {record["lr"]:.1e} | {record["ms"]:.0f} ms'
                   + ''.join(f' | {record[f"{kind}_per_s"]:.1f} {kind}/s' for kind, n in seen.items() if n)
                   + f' | wait {record["data_wait"]:.0%}'
                   + (f' | mfu {record["mfu"]:.0%}' if 'mfu' in record else '')
                   + (f' | {record["peak_gib"]:.1f} GiB' if 'peak_gib' in record else ''))
            if not all(map(math.isfinite, [*values, norm])):
                raise SystemExit(f'iteration {it}: a loss or gradient is not finite; ckpt.pt holds the last good state')
            clock, waited, seen, done_flops, logged = time.perf_counter(), 0.0, {'volumes': 0, 'slices': 0}, 0.0, it

        if it % eval_interval == 0 or it in (iters_3d, stop) or asked_to_stop:
            if val_set and not asked_to_stop:
                record = {'iter': it} | validate()
                log(record)
                print0(f'iter {it}: ' + ' | '.join(f'{k} {v:.2f}' for k, v in record.items() if 'psnr' in k))
                if record['val/psnr_db'] > best_val:
                    best_val = record['val/psnr_db']
                    save('best.pt')
            save('ckpt.pt')
            if it == iters_3d and joint == 'sequential': save('ckpt_3d.pt')
            clock, waited, seen, done_flops, logged = time.perf_counter(), 0.0, {'volumes': 0, 'slices': 0}, 0.0, it
        if asked_to_stop:
            print0(f'stopped by signal {asked_to_stop[0]} after iteration {it}; go on with --init_from=resume')
            stop_processes()
            raise SystemExit(128 + asked_to_stop[0])
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
