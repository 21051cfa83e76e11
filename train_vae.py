"""Train an autoencoder on prepared data (prepare.py).

    python train_vae.py config/demo.py                                      # phantoms on a laptop CPU, minutes
    python train_vae.py config/neuroquant.py --data_dir=data/mine           # the paper's run on one GPU
    torchrun --nproc_per_node=8 train_vae.py config/neuroquant.py --data_dir=data/mine
    python train_vae.py config/neuroquant.py --init_from=resume             # go on where it stopped
    python train_vae.py config/decovae_vad.py --data_dir=data/mine          # another autoencoder: see config/

Writes out_dir/ckpt.pt (resume), best.pt (best validation PSNR), log.jsonl, config.py; NeuroQuant also ckpt_3d.pt (end of the 3D phase).
"""
import copy
import dataclasses
import math
import os
import random
import shlex
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import (
    all_reduce_mean, autocast, catch_signals, check_finite, configure, explain_failures, git_commit,
    load_checkpoint, make_out_dir, open_log, peak_flops, print0, refuse_changes, save_checkpoint,
    start_processes, stop_processes, update_average
)
from data import Sessions, fingerprint, prefetch, refuse_other_data
from losses import (
    ModalityClassifier, PatchDiscriminator, adversarial_loss, cov_loss, generator_loss, grad_reverse, kl_loss,
    perceptual_loss, psnr, random_slices, reconstruction_loss, sid_loss, ssim, var_loss
)
from model import KINDS, model_args, step_flops
from pretrained import LPIPS
from synth import TISSUE, is_random, render

# ---------------------------------------------------------------- settings; the defaults are the paper's NeuroQuant
# in and out
data_dir = 'data/phantom'  # or several, with commas between
prepare = ''             # flags for prepare.py, run first when data_dir holds no data; '' for never
out_dir = 'out/neuroquant'
# scratch | resume (out_dir/ckpt.pt) | PATH of a checkpoint whose weights to start from
init_from = 'scratch'
resume_changed = False   # go on with other settings than the run began with
log_interval = 10        # steps between log lines
eval_interval = 1000     # steps between validations, each of which writes ckpt.pt
eval_sessions = 32       # validation sessions used; -1 for all
wandb_project = ''       # '' is off
# data
# per process and micro-step: sessions with all their modalities (neuroquant), scans or slices (convvae)
batch_size = 4
grad_accum = 1           # micro-steps per step
patch = ()               # (D,H,W) cut at random; () for whole volumes
batch_size_2d = 128      # slices per process of neuroquant's 2D steps
temperature = 1.0        # above 1, small datasets (data_dir=A,B,...) and rare modalities are drawn more often
synthesise = 0.0         # share of the volumes drawn anew, at every step, from their label maps (column dseg)
augment = False          # convvae: flips, bias field, gamma, small rotation and zoom
# model: fields of NeuroQuantConfig (kind='neuroquant') or ConvVAEConfig (kind='convvae'), explained there
kind = 'neuroquant'
modalities = ('T1w', 'T2w')
widths = (32, 64, 128, 256)
res_blocks = 1
quantizer = 'ema'
num_codes = 4096
num_codebooks = 1
codebooks = 'residual'
code_decay = 0.99
revive = 0.1
attention = True         # of neuroquant, to modality_dim
attn_levels = (0, 1, 2, 3)
film = True
anat_dim = 64
mod_dim = 32
modality_dim = 32
dims = 3                 # of convvae, to slice_axis
in_channels = 1
layout = 'maisi'
latent_dim = 4
bottleneck = 'kl'
signed = False
slice_axis = 2
# objective
# 'l1': mean absolute error, both papers; 'l2': mean squared error, what PSNR is made of
recon = 'l1'
w_ssim = 0.5             # lambda_SSIM of NeuroQuant eq. 12
w_commit = 0.25          # beta of eq. 7
w_cross = 0.5            # eq. 14, over every ordered pair of a session's modalities
cross_start, cross_ramp = 2000, 2000  # steps before w_cross sets in, and steps of its linear rise
w_adv = 0.001            # scale of the reversed gradient, eq. 15; the classifier itself learns at full weight
# steps before the reversal sets in; then 2/(1+exp(-10p))-1 over the rest of the 3D phase
adv_start = 5000
# objective of convvae: L1 + the following, DeCo eq. 1 and 7; 0 leaves a term out
w_kl = 0.0
kl_reduction = 'mean'    # over every element; 'sum' over the latent and mean over the batch, as MAISI
w_sid, w_cov, w_var = 0.0, 0.0, 0.0  # DeCo eq. 3, 4, 5, on mu; eq. 6 is w_cov = w_var
var_gamma, var_form = 1.0, 'hinge_std'  # or 'two_sided_var'
gather = False           # eq. 3-5 over the positions of all processes instead of each its own
w_perc = 0.0
# trunk of LPIPS: squeeze, alex, vgg, each from the two files below; or 'random', a fixed random trunk
perceptual = 'squeeze'
perc_trunk, perc_lin = '', ''  # paths: torchvision's trunk and LPIPS v0.1's channel weights
slice_fraction = 0.2     # of the slices of each plane that the perceptual loss and a 2D discriminator see
w_gan = 0.0
# PatchGANs on volumes and on slices, equal parts of w_gan; leave one out for none of it
gan_dims = (3, 2)
gan_form = 'least_squares'  # or 'hinge'
gan_start = 0            # steps before the discriminators take part
freeze_encoder = False   # decoder fine-tuning: only decoder and post layer learn, the latent stays as it is
# schedule
iters = 100_000          # of convvae
# of neuroquant, as the next three: slices after volumes | 'interleaved': with them | 'none'
joint = 'sequential'
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
beta1, beta2, adam_eps = 0.9, 0.999, 1e-8
grad_clip = 1.0
ema_decay = 0.999        # average of the weights, validated and used by evaluate.py and sample.py; 0 for none
# system
device = ''              # '' picks cuda when there is one
dtype = 'bfloat16'       # bfloat16 autocast, or float32; on a CPU float32 is used
compile = True           # torch.compile of encoder and decoder; on a CPU never
checkpointing = False    # recompute the large stages in the backward pass: less memory, more time
seed = 0

# settings that change no weight, free to differ when a run is resumed; data_dir has its own check
NOT_RESULTS = (
    'data_dir', 'prepare', 'out_dir', 'init_from', 'resume_changed', 'log_interval', 'eval_interval',
    'eval_sessions', 'wandb_project', 'max_iters', 'perc_trunk', 'perc_lin', 'device', 'compile',
    'checkpointing'
)

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
    """What step `it` trains on: a list of (what, batch number, weight)."""
    if kind == 'convvae':
        return [
            ('slices' if dims == 2 else 'scans', it * grad_accum + k, 1 / grad_accum)
            for k in range(grad_accum)
        ]
    if it >= iters_3d: return [('slices', it, 1.0)]
    steps = [('sessions', it * grad_accum + k, 1 / grad_accum) for k in range(grad_accum)]
    coin = random.Random(f'{seed}:{it}').random()  # the same on every process
    if joint == 'interleaved' and coin < p_2d:
        steps.append(('slices', it, w_2d))
    return steps

def make_batch(micro):
    what, number, _ = micro
    if what == 'scans':
        return train_set.scan_batch(batch_size, seed, rank, world, number, patch, augment, synthesise > 0)
    if what == 'sessions':
        return train_set.session_batch(batch_size, seed, rank, world, number, patch, synthesise > 0)
    if kind == 'convvae':
        return train_set.slice_batch(batch_size, seed, rank, world, number, axis=slice_axis)
    return train_set.slice_batch(batch_size_2d, seed, rank, world, number)

def redraw(batch):
    """Some volumes of a batch anew: an image of the same label map and modality, by the sample's number in the run."""
    draws = [
        torch.Generator().manual_seed((seed << 44) + (1 << 43) + place) for place in batch['place'].tolist()
    ]
    chosen = torch.tensor([torch.rand((), generator=g).item() < synthesise for g in draws])
    if not chosen.any(): return batch['x']
    x, k, modality = batch['x'].clone(), chosen.nonzero()[:, 0].tolist(), batch['modality'].tolist()
    x[k] = render(batch['labels'][k].long(), [modalities[modality[i]] for i in k], [draws[i] for i in k])
    return x

def neuroquant_objective(batch, what, it):
    """Loss of one micro-batch and its unweighted terms, each a mean over the joined batch; None, since no discriminator follows."""
    x, modality, pairs, share = batch['x'], batch['modality'], batch.get('pairs', ()), batch['share']
    w_cross_now = get_w_cross(it) if len(pairs) else 0.0
    out = model(x, modality, pairs if w_cross_now > 0 else None)
    terms = {
        'recon': share * reconstruction_loss(out['x_hat'], x, w_ssim, recon),
        'commit': share * out['commit'],
    }
    if what == 'slices':
        # "only L_rec^2D is computed", 3.5
        return terms['recon'], {f'{k}_2d': v for k, v in terms.items()}, None
    loss = terms['recon'] + w_commit * terms['commit']
    if classifier:
        logits = classifier(grad_reverse(out['z_anat'].float(), get_alpha(it)))
        terms['adv'] = share * F.cross_entropy(logits.float(), modality)
        loss = loss + terms['adv']
    if w_cross_now > 0:
        terms['cross'] = batch['pair_share'] * reconstruction_loss(out['x_cross'], x[pairs[:, 1]], 0.0, recon)
        loss = loss + w_cross_now * terms['cross']
    return loss, terms, None

def convvae_objective(batch, what, it):
    """Loss of one micro-batch, its unweighted terms, x_hat for the discriminators: DeCo eq. 1 and 7, or the VQ form of it."""
    x = batch['x']
    out = model(x, generators(batch, 0, device))
    x_hat, slices = out['x_hat'], generators(batch, 1)
    terms = {'recon': reconstruction_loss(x_hat, x, 0.0, recon)}
    loss = terms['recon']
    def add(name, weight, value):
        nonlocal loss
        terms[name] = value
        loss = loss + weight * value
    if w_ssim > 0:
        add('ssim', w_ssim, 1 - ssim(x_hat, x, size=7).mean())
    if bottleneck == 'vq':
        add('commit', w_commit, out['commit'])
    if w_kl > 0:
        add('kl', w_kl, kl_loss(out['mu'], out['logvar'], kl_reduction))
    if w_sid > 0:
        add('sid', w_sid, sid_loss(out['mu'], gather))
    if w_cov > 0:
        add('cov', w_cov, cov_loss(out['mu'], gather))
    if w_var > 0:
        add('var', w_var, var_loss(out['mu'], var_gamma, var_form, gather))
    if lpips:
        add(
            'perc_random' if lpips.random else 'perc',
            w_perc,
            perceptual_loss(lpips, x_hat, x, slice_fraction, slices),
        )
    if critics and it >= gan_start:
        judged = [
            generator_loss(critic(view), gan_form)
            for critic in critics
            for view, in critic_views(critic, [x_hat], generators(batch, 2))
        ]
        add('gan', w_gan, sum(judged) / len(judged))
    return loss, terms, x_hat.detach()

def generators(batch, purpose, device='cpu'):
    """A generator per sample that depends on the sample's number in the run alone: the same on any number of processes."""
    return [
        torch.Generator(device).manual_seed((seed << 44) + (place << 2) + purpose)
        for place in batch['place'].tolist()
    ]

def critic_views(critic, volumes, slices):
    """What a discriminator sees of volumes: lists of one tensor per volume; a 3D one the volumes, a 2D one random slices."""
    return (
        [volumes]
        if isinstance(critic[0], torch.nn.Conv3d)
        else random_slices(volumes, slice_fraction, slices)
    )

def critic_objective(x_hat, batch):
    """Loss of the discriminators on a detached reconstruction and the scans themselves."""
    judged = []
    for critic in critics:
        for fake, real in critic_views(critic, [x_hat, batch['x']], generators(batch, 3)):
            judged.append(
                (
                    adversarial_loss(critic(fake), False, gan_form)
                    + adversarial_loss(critic(real), True, gan_form)
                )
                / 2
            )
    return sum(judged) / len(judged)

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
            with autocast(device, dtype):
                x_hat = judge.reconstruct(x, m)
            total[m] += torch.tensor([psnr(x_hat.clamp(0, 1), x.clamp(0, 1)).item(), 1.0])
    if world > 1:
        dist.all_reduce(total)
    train_mode()
    record = {f'val/psnr_db/{name}': s / k for name, (s, k) in zip(modalities, total.tolist()) if k}
    return record | {'val/psnr_db': sum(record.values()) / len(record), 'val/n_sessions': n}

def train_mode():
    raw_model.train()
    if freeze_encoder and hasattr(raw_model, 'quantizer'):
        raw_model.quantizer.eval()  # the codebook is the encoder's

def save(name):
    """Everything a resumed run needs; the optimiser is plain tensors, the data's place follows from iter_num."""
    if rank: return
    save_checkpoint(
        os.path.join(out_dir, name),
        {
            'model': raw_model.state_dict(),
            'ema': ema.state_dict() if ema else None,
            'classifier': classifier.state_dict() if classifier else None,
            'optimizer': optimizer.state_dict(),
            'critics': critics.state_dict(),
            'critic_optimizer': critic_optimizer.state_dict() if critics else None,
            'model_args': model_args(raw_model),
            'config': config,
            'world': world,
            'data': train_set.box,
            'fingerprint': fingerprint(data_dir),
            'voxel_mm': train_set.voxel_mm,
            'iter_num': it,
            'best_val': best_val,
            'git_commit': git_commit(),
        },
    )

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    if joint not in ('sequential', 'interleaved', 'none'):
        raise SystemExit(f'--joint={joint}: sequential, interleaved or none')
    if kind not in ('neuroquant', 'convvae'):
        raise SystemExit(f'--kind={kind}: neuroquant or convvae')
    for key, value, allowed in (
        ('recon', recon, ('l1', 'l2')),
        ('kl_reduction', kl_reduction, ('mean', 'sum')),
        ('gan_form', gan_form, ('least_squares', 'hinge')),
        ('var_form', var_form, ('hinge_std', 'two_sided_var')),
    ):
        if value not in allowed: raise SystemExit(f'--{key}={value}: {" or ".join(allowed)}')
    if not set(gan_dims) <= {2, 3}: raise SystemExit(f'--gan_dims={gan_dims}: of 3 and 2')
    if kind == 'neuroquant' and not film and w_cross > 0:
        raise SystemExit('w_cross > 0 needs film=True: without FiLM there is no modality to swap')
    if kind == 'neuroquant' and (
        freeze_encoder or augment or max(w_kl, w_sid, w_cov, w_var, w_perc, w_gan) > 0
    ):
        raise SystemExit(
            "freeze_encoder, augment, w_kl, w_sid, w_cov, w_var, w_perc and w_gan are for kind='convvae'"
        )
    if kind == 'convvae' and dims == 2 and patch:
        raise SystemExit('patch is for volumes; with dims=2 whole slices are used')
    if kind == 'convvae' and bottleneck == 'vq' and max(w_kl, w_sid, w_cov, w_var) > 0:
        raise SystemExit("w_kl, w_sid, w_cov and w_var need bottleneck='kl'")
    if device == 'cpu':
        dtype, compile = 'float32', False
    explain_failures(
        f'batch_size={batch_size} (raise grad_accum for it), batch_size_2d={batch_size_2d}, patch={patch} or'
        ' set checkpointing=True'
    )
    if augment and kind == 'convvae' and dims == 2:
        raise SystemExit('--augment: for volumes, not with dims=2')
    if synthesise > 0 and (
        augment
        or (kind == 'convvae' and dims == 2)
        or not all(m in TISSUE or is_random(m) for m in modalities)
    ):
        raise SystemExit(
            f"--synthesise={synthesise}: for volumes of {', '.join(TISSUE)}, random1, random2, ..., not with"
            " dims=2 or augment"
        )
    if temperature < 1: raise SystemExit(f'--temperature={temperature}: 1 or more')
    stop = min(
        max_iters, iters if kind == 'convvae' else iters_3d + (iters_2d if joint == 'sequential' else 0)
    )

    # ------------------------------------------------------------ data
    if rank == 0:
        make_out_dir(out_dir)
        if prepare and ',' not in data_dir and not os.path.exists(os.path.join(data_dir, 'subjects.tsv')):
            here = os.path.dirname(os.path.abspath(__file__))
            made = subprocess.run([
                sys.executable,
                os.path.join(here, 'prepare.py'),
                *shlex.split(prepare),
                f'--out_dir={data_dir}',
            ])
            if made.returncode: raise SystemExit(f'{data_dir}: prepare.py {prepare} did not finish')
    if world > 1:
        dist.barrier()
    train_set = Sessions(data_dir, modalities, 'train', temperature)
    train_set.verify()
    has_val = any(row['split'] == 'val' for row in Sessions(data_dir, modalities, None).rows)
    val_set = Sessions(data_dir, modalities, 'val') if has_val else None
    print0(f'{data_dir}: {train_set.n} training sessions, {val_set.n if val_set else 0} for validation, '
           f'volumes {train_set.shape}, modalities {", ".join(modalities)}')
    if not val_set:
        print0('no validation split: best.pt will not be written')

    # ------------------------------------------------------------ model
    torch.manual_seed(seed)
    sample_shape = tuple(min(p, n) for p, n in zip(patch or train_set.shape, train_set.shape))
    if kind == 'convvae' and dims == 2:
        sample_shape = tuple(1 if a == slice_axis else n for a, n in enumerate(train_set.shape))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    try:
        make_model, make_config = KINDS[kind]
        raw_model = make_model(
            make_config(
                **{f.name: config[f.name] for f in dataclasses.fields(make_config) if f.name in config}
            )
        )
        raw_model.check_size(sample_shape)
    except ValueError as e:
        raise SystemExit(f'model: {e}')
    classifier = ModalityClassifier(anat_dim, len(modalities)) if kind == 'neuroquant' and w_adv > 0 else None
    critics = torch.nn.ModuleList(PatchDiscriminator(n) for n in gan_dims if w_gan > 0)
    lpips = None
    if kind == 'convvae' and w_perc > 0:
        lpips = (LPIPS() if perceptual == 'random' else LPIPS(perceptual, perc_trunk, perc_lin)).to(device)
        if lpips.random:
            print0(
                "perceptual='random': the perceptual loss is a distance between random features, not LPIPS"
            )
    start, resumed = {}, None
    if init_from != 'scratch':
        start = load_checkpoint(os.path.join(out_dir, 'ckpt.pt') if init_from == 'resume' else init_from)
        ours = model_args(raw_model)
        differ = [
            f'{k} {start["model_args"].get(k)!r} there, {ours.get(k)!r} here'
            for k in start['model_args'] | ours
            if start['model_args'].get(k) != ours.get(k)
        ]
        if differ:
            raise SystemExit(f'--init_from={init_from}: checkpoint of another model: {"; ".join(differ)}')
        # what is judged goes on
        raw_model.load_state_dict(start['model'] if init_from == 'resume' else start['ema'] or start['model'])
        if init_from == 'resume':
            resumed = start
        if resumed and not resume_changed:
            refuse_changes(resumed, config, world, NOT_RESULTS)
        if resumed:
            refuse_other_data(resumed['fingerprint'], data_dir, f'{out_dir}/ckpt.pt')
    raw_model.to(
        device,
        memory_format=torch.channels_last if kind == 'convvae' and dims == 2 else torch.channels_last_3d,
    )
    if classifier:
        classifier.to(device)
    critics.to(device)
    if freeze_encoder:
        for name, p in raw_model.named_parameters():
            p.requires_grad_(name.startswith(('decoder.', 'post.')))
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    for half in (raw_model.encoder, raw_model.decoder):
        half.checkpointing = checkpointing
    def make_optimizer(parameters):
        # no decay on biases and norms
        groups = [{'params': [p for p in parameters if p.ndim > 1], 'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.ndim <= 1], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=adam_eps, fused=True)
    own = [p for p in raw_model.parameters() if p.requires_grad]
    trained = own + (list(classifier.parameters()) if classifier else [])
    optimizer = make_optimizer(trained)
    if critics:
        critic_optimizer = make_optimizer(list(critics.parameters()))
    it, best_val = 0, -math.inf
    if resumed:
        if ema:
            ema.load_state_dict(resumed['ema'])
        if classifier:
            classifier.load_state_dict(resumed['classifier'])
        optimizer.load_state_dict(resumed['optimizer'])
        critics.load_state_dict(resumed['critics'])
        if critics:
            critic_optimizer.load_state_dict(resumed['critic_optimizer'])
        it, best_val = resumed['iter_num'], resumed['best_val']
        print0(f'resumed {out_dir}/ckpt.pt at iteration {it}')
    del start, resumed  # the checkpoint's copy of everything
    model, objective = raw_model, {'neuroquant': neuroquant_objective, 'convvae': convvae_objective}[kind]
    if compile:  # part by part: the quantiser between them stays eager, so no graph breaks
        model.encoder.compile(dynamic=False)
        model.decoder.compile(dynamic=False)
    cost = step_flops(raw_model, sample_shape)
    flops = {
        'scans': cost,
        'sessions': cost,
        'slices': cost if kind == 'convvae' else step_flops(raw_model, (1, *train_set.shape[1:])),
    }
    bits = raw_model.bits_per_volume(train_set.shape)
    print0(
        f'{sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f} M parameters, {bits:.0f} bits of latent'
        f' per volume ({16 * math.prod(train_set.shape) / bits:.0f}x less than 16-bit voxels),'
        f' {sum(cost) / 1e9:.1f} GFLOP forward for {"x".join(map(str, sample_shape))}, on {device} x {world}'
    )

    # ------------------------------------------------------------ log
    log, stop_signal = open_log(out_dir, config, wandb_project, it), catch_signals()

    # ------------------------------------------------------------ loop
    train_mode()
    first = it
    batches = prefetch(make_batch, (micro for i in range(it, stop) for micro in micro_steps(i)), device)
    clock, waited, seen, done_flops, logged, recent = time.perf_counter(), 0.0, {}, 0.0, it, []
    while it < stop:
        for group in optimizer.param_groups:
            group['lr'] = get_lr(it)
        # the quantiser's draws, the same on every process and after a resume
        torch.manual_seed((seed << 40) + it)
        terms, files = {}, []
        for what, _, weight in micro_steps(it):
            t = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - t
            if 'labels' in batch:
                batch['x'] = redraw(batch)
            # contiguous() would leave one channel as it is
            x = batch['x'] = batch['x'].to(memory_format=torch.channels_last_3d)
            critics.requires_grad_(False)  # the generator's step leaves them no gradient
            with autocast(device, dtype):
                loss, new, x_hat = objective(batch, what, it)
            (weight * loss).backward()
            if critics and it >= gan_start:
                critics.requires_grad_(True)
                with autocast(device, dtype):
                    new['critic'] = critic_objective(x_hat, batch)
                (weight * new['critic']).backward()
            for k, v in new.items():
                terms[k] = terms.get(k, 0.0) + v.detach() * (
                    1.0 if what == 'slices' and kind == 'neuroquant' else weight
                )
            files += batch['files']
            counted = 'slices' if what == 'slices' else 'volumes'
            seen[counted] = seen.get(counted, 0) + len(x)
            decodes = len(x) + (len(batch['pairs']) if 'cross' in new else 0)
            # backward is twice forward
            done_flops += 3 * (len(x) * flops[what][0] + decodes * flops[what][1])
        all_reduce_mean([p.grad for p in (*trained, *critics.parameters()) if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(own, grad_clip if grad_clip > 0 else math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if critics and it >= gan_start:
            for group in critic_optimizer.param_groups:
                group['lr'] = get_lr(it)
            torch.nn.utils.clip_grad_norm_(critics.parameters(), grad_clip if grad_clip > 0 else math.inf)
            critic_optimizer.step()
            critic_optimizer.zero_grad(set_to_none=True)
        if ema:
            # a short average while weights move fast
            update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))
        it += 1
        # looked at later: a look waits for the GPU
        recent.append((it, [*terms, 'gradient'], torch.stack([*terms.values(), norm]), files))
        stopped_by = stop_signal()
        judged = it % eval_interval == 0 or it in (iters_3d, stop) or stopped_by

        if it % log_interval == 0 or it == first + 1 or judged:
            check_finite(recent)
            recent.clear()
        if it % log_interval == 0 or it == first + 1:
            if hasattr(raw_model, 'quantizer'):
                terms['perplexity'] = raw_model.quantizer.perplexity()
            values = torch.stack([*terms.values(), norm])
            all_reduce_mean([values])
            *values, norm = values.tolist()
            seconds, steps = time.perf_counter() - clock, it - logged
            record = {
                'iter': it,
                **{f'train/{k}': v for k, v in zip(terms, values)},
                'train/grad_norm': norm,
                'lr': get_lr(it - 1),
                'ms': 1000 * seconds / steps,
                **{f'{k}_per_s': world * n / seconds for k, n in seen.items()},
                'data_wait': waited / seconds,
            }
            if peak_flops(device):
                record['mfu'] = done_flops / seconds / peak_flops(device)
            if device.startswith('cuda'):
                record['peak_gib'] = torch.cuda.max_memory_allocated() / 2 ** 30
            if it % log_interval == 0 or it == 1:
                log(record)  # the first line after a resume is for the screen only
            print0(f'iter {it}: ' + ' | '.join(f'{k} {v:.4f}' for k, v in zip(terms, values))
                   + f' | grad {norm:.2f} | lr {record["lr"]:.1e} | {record["ms"]:.0f} ms'
                   + ''.join(f' | {record[f"{k}_per_s"]:.1f} {k}/s' for k in seen)
                   + f' | wait {record["data_wait"]:.0%}'
                   + (f' | mfu {record["mfu"]:.0%}' if 'mfu' in record else '')
                   + (f' | {record["peak_gib"]:.1f} GiB' if 'peak_gib' in record else ''))
            clock, waited, seen, done_flops, logged = time.perf_counter(), 0.0, {}, 0.0, it

        if judged:
            if val_set and not stopped_by:
                record = {'iter': it} | validate()
                log(record)
                print0(f'iter {it}: ' + ' | '.join(f'{k} {v:.2f}' for k, v in record.items() if 'psnr' in k))
                if record['val/psnr_db'] > best_val:
                    best_val = record['val/psnr_db']
                    save('best.pt')
            save('ckpt.pt')
            if it == iters_3d and joint == 'sequential':
                save('ckpt_3d.pt')
            clock, waited, seen, done_flops, logged = time.perf_counter(), 0.0, {}, 0.0, it
        if stopped_by:
            print0(f'stopped by signal {stopped_by} after iteration {it}; go on with --init_from=resume')
            stop_processes()
            raise SystemExit(128 + stopped_by)
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
