"""Train a GPT on the tokens of an autoencoder of train_vae.py; sample.py --mode=generate draws brains then.

    python train_gpt.py config/demo_gpt.py                            # phantoms, after config/demo.py
    torchrun --nproc_per_node=4 train_gpt.py config/gpt.py --vae=out/neuroquant/best.pt --batch_size=4

The first start encodes the scans into latents_dir; each is a sample. Writes out_dir/ckpt.pt (resume), best.pt
(fewest held-out bits a token), log.jsonl, log.csv, config.py and, with matplotlib, curves.png.
"""
import copy
import math
import os
import statistics
import sys
from functools import partial

import torch
import torch.distributed as dist

from common import (StepLog, autocast, catch_signals, compile_whole, configure, end_by_signal,
                    explain_failures, make_out_dir, print0, refuse_below_one, refuse_overwriting,
                    save_checkpoint, start_processes, stop_processes)
from data import has_split, prefetch, torch_seed
from judge.cost import gpt_flops, say_memory
from judge.figures import curves
from latents import encode_all, go_on, run_state
from model import GPT, GPTConfig
from optim import MeanGradients, adamw, cosine, take_step, update_average
from tokens import Tokens, baseline_bits, mean_nats, scan_bits

# ---------------------------------------------------------------- settings
# in and out
vae = 'out/neuroquant/best.pt'  # the autoencoder, with a codebook
data_dir = ''            # '' for what the autoencoder was trained on
latents_dir = ''         # '' for a folder beside its checkpoint; of several data sets as many, with commas
out_dir = 'out/gpt'
init_from = 'scratch'    # or resume (out_dir/ckpt.pt)
resume_changed = False   # go on with other settings than the run began with
overwrite = False        # begin anew in an out_dir that holds a run
log_interval = 10
eval_interval = 500      # steps between validations; each writes ckpt.pt
wandb_project = ''
tensorboard = False
# data
batch_size = 16          # scans per process
conditions = ()          # of sex, age; in a prefix
p_drop = 0.1             # probability that a scan is shown without its conditions, for guidance
# model: fields of GPTConfig
layers = 9
heads = 8
width = 512
dropout = 0.1
tied = True              # False for several codebooks
# schedule and optimiser
iters = 20_000
max_iters = 0            # above 0 it stops the run, and changes nothing else
lr = 6e-4
min_lr = 6e-5
warmup_iters = 200
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1.0
ema_decay = 0.999        # average of the weights: validated, and what is sampled
# system
device = ''
dtype = 'bfloat16'       # autocast, or float32; on a CPU float32 is used
compile = True
seed = 0

def check_settings():
    """SystemExit with one line for settings that cannot be."""
    refuse_below_one(config, 'batch_size', 'iters', 'log_interval', 'eval_interval', 'layers', 'heads')
    autocast('cpu', dtype)  # refuses other types
    if init_from not in ('scratch', 'resume'):
        raise SystemExit(f'--init_from={init_from}: scratch or resume')
    if 'modality' in conditions:
        raise SystemExit('--conditions: of sex and age; anatomy has no modality')

# ---------------------------------------------------------------- functions of the run

def validate():
    """Mean bits per token of the averaged network over all held-out scans, and the baselines, for the log."""
    bits = scan_bits((ema or raw_model).eval(), val_set, range(rank, val_set.n, world), device, dtype)
    mean_bits = torch.tensor(sum(bits) / val_set.n, dtype=torch.float64)  # this process's part of it
    if world > 1:
        dist.all_reduce(mean_bits)
    raw_model.train()
    return {'val/bits': mean_bits.item()} | {f'val/{name}': value for name, value in baselines.items()}

def rehearse():
    """The largest part of a step, for say_memory."""
    tokens = torch.zeros(batch_size, raw_model.length, dtype=torch.int64)
    mean_nats(raw_model, tokens, train_set.cond([0] * batch_size), device, dtype).backward()

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
        print0(f'iter {it:,}/{stop:,}: held-out bits per token {record["val/bits"]:.3f} '
               f'({baseline_text})')
        if rank == 0:
            curves(os.path.join(out_dir, 'curves.png'), log.tabulate())
        if record['val/bits'] < best_val:
            best_val = record['val/bits']
            save('best.pt')
    save('ckpt.pt')
    log.restart(it)

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

    # ---- autoencoder and its tokens
    if rank == 0:
        make_out_dir(out_dir)
        refuse_overwriting(out_dir, init_from, overwrite)
    autoencoder, vae_checkpoint, data_dir, latents_dir = encode_all(
        vae, data_dir, latents_dir, rank, world, device)
    if not hasattr(autoencoder, 'quantizer'):
        raise SystemExit(f'--vae={vae}: its bottleneck is KL, so it has no tokens')
    config |= dict(data_dir=data_dir, latents_dir=latents_dir)
    modalities = tuple(vae_checkpoint['config']['modalities'])
    source = autoencoder.quantizer, device, latents_dir, data_dir, modalities
    train_set = Tokens(*source, 'train', conditions, seed, rank, world)
    val_set = Tokens(*source, 'val', conditions) if has_split(data_dir, modalities, 'val') else None
    codes = autoencoder.config.num_codes
    print0(f'{latents_dir}: {train_set.n} training scans, {val_set.n if val_set else 0} for validation, '
           f'{train_set.tokens.shape[1]} tokens each, {codes} codes')
    if not val_set:
        print0('no validation split: best.pt will not be written')
    else:
        of_scans = baseline_bits(train_set.tokens, val_set.tokens, codes)
        baselines = {name: statistics.fmean(bits) for name, bits in of_scans.items()}
        baseline_text = ', '.join(f'{name} {bits:.3f}' for name, bits in baselines.items())

    # ---- model
    torch.manual_seed(seed)
    try:
        raw_model = GPT(GPTConfig(
            grid=train_set.grid, num_codes=codes, num_codebooks=autoencoder.config.num_codebooks,
            layers=layers, heads=heads, width=width, dropout=dropout, tied=tied,
            classes=train_set.classes, vectors=train_set.vectors)).to(device)
    except ValueError as e:
        raise SystemExit(f'model: {e}')
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    parameters = list(raw_model.parameters())
    optimizer = adamw(parameters, lr, (beta1, beta2), 1e-8, weight_decay)
    parts = {'model': raw_model, 'ema': ema, 'optimizer': optimizer}
    it, best_val, validated = 0, math.inf, True
    if init_from == 'resume':
        it, best_val, validated = go_on(f'{out_dir}/ckpt.pt', train_set.encoder_hash, config, world, parts)
    flops = 3 * gpt_flops(raw_model)  # a backward pass costs two forward ones
    say_memory(globals(), ('raw_model',), [optimizer], [autoencoder, ema], rehearse, savers)
    print0(f'{flops * batch_size * world / 1e9:.1f} GFLOP per step, on {device} x {world}')
    if compile:
        compile_whole(raw_model)

    # ---- loop
    gradients = MeanGradients(parameters)
    log = StepLog(out_dir, config, wandb_project, log_interval, it, stop, device, world, validated)
    stop_signal = catch_signals()
    raw_model.train()
    if not validated:
        validate_and_save()
    make_batch = partial(train_set.batch, batch_size=batch_size, p_drop=p_drop)
    batches = prefetch(make_batch, range(it, stop), device)
    while it < stop:
        batch = log.next_batch(batches)
        torch.manual_seed(torch_seed(seed, 31, it * world + rank))  # dropout is a function of the step
        loss = mean_nats(raw_model, batch['tokens'], batch['cond'], device, dtype)
        gradients.expect()
        loss.backward()
        gradients.finish()
        grad_norm = take_step([optimizer], parameters, cosine(it, lr, min_lr, warmup_iters, iters), grad_clip)
        if ema:  # a short average while weights move fast
            update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))
        it += 1

        terms = {'bits': loss.detach() / math.log(2)}
        log.count('scans', batch_size, flops * batch_size)
        log.note(it, terms | {'gradient': grad_norm}, batch['files'])
        stopped_by = stop_signal()
        validates = it % eval_interval == 0 or it == stop
        if log.due(it) or validates or stopped_by:
            log.check()
        if log.due(it):
            log.step(it, terms, grad_norm, optimizer.param_groups[0]['lr'])
        if stopped_by:
            save('ckpt.pt', not validates)  # a validation may be cut short
        if validates:
            validate_and_save()
        if stopped_by:
            end_by_signal(stopped_by, it)
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
