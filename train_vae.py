"""Train an autoencoder on prepared data (prepare.py).

    python train_vae.py config/demo.py                              # phantoms, minutes on a laptop
    python train_vae.py config/neuroquant.py --data_dir=data/mine   # the paper's run on one GPU
    torchrun --nproc_per_node=8 train_vae.py config/neuroquant.py --batch_size=1 --batch_size_2d=16
    python train_vae.py config/neuroquant.py --data_dir=data/mine --init_from=resume  # go on

Writes out_dir/ckpt.pt (resume), best.pt (best validation PSNR), log.jsonl, log.csv and config.py; with
matplotlib curves.png and progress.png; before a phase of slices ckpt_3d.pt.
"""
import copy
import dataclasses
import math
import os
import random
import sys

import torch

from common import (StepLog, autocast, catch_signals, compile_for, compile_whole, configure, end_by_signal,
                    explain_failures, git_commit, load_like, make_out_dir, print0, refuse_below_one,
                    refuse_overwriting, save_checkpoint, start_processes, stop_processes, wait_for_all)
from data import Sessions, generators, has_split, prefetch, prepare_absent, say_sessions, torch_seed
from judge import figures
from judge.cost import blank_batch, say_cost, say_memory, training_flops, vae_flops
from judge.validate import brief, say_probes, validate
from losses import (ModalityClassifier, PatchDiscriminator, adversary_loss, alignment_loss, cov_loss,
                    discriminator_term, generator_term, kl_loss, perceptual_loss, reconstruction_loss,
                    refuse_small, sid_loss, ssim, var_loss)
from model import from_settings, model_args
from optim import MeanGradients, adamw, cosine, make_optimizers, take_step, update_average
from pretrained import LPIPS
from quantize import hold_statistics, move_statistics, perplexity
from resume import best_so_far, fingerprint, load_parts, refuse_changes, refuse_other_data
from synth import TISSUE, is_random, redraw

# ---------------------------------------------------------------- settings; NeuroQuant's by default
# in and out
data_dir = 'data/phantom' # or several, with commas between
prepare = ''             # flags for prepare.py, run first when data_dir holds no data; '' for never
out_dir = 'out/neuroquant'
init_from = 'scratch'    # or resume (out_dir/ckpt.pt), or the PATH of a checkpoint's weights
resume_changed = False   # go on with other settings than the run began with
overwrite = False        # begin anew in an out_dir that holds a run
log_interval = 10        # steps between log lines
eval_interval = 1000     # steps between validations; each writes ckpt.pt
eval_sessions = 32       # validation sessions used; -1 for all
wandb_project = ''       # '' is off
tensorboard = False      # also for TensorBoard, in out_dir/tensorboard
# data
batch_size = 4           # per process and micro-step: sessions (neuroquant), scans or slices (convvae)
grad_accum = 1           # micro-steps per step
patch = ()               # (D,H,W) cut at random; () for whole volumes
brain_patches = 0.0      # share of the patches whose centre is brain
batch_size_2d = 128      # slices per process of neuroquant's 2D steps
temperature = 1.0        # above 1, small data sets of several and rare modalities are drawn more often
synthesise = 0.0         # share of volumes drawn anew at every step from their label maps
deform = 0.0             # share of sessions whose label maps are deformed and drawn anew
augment = False          # convvae: flips, bias field, gamma, small rotation and zoom
# model: fields of NeuroQuantConfig (kind='neuroquant') or ConvVAEConfig (kind='convvae') of model.py
kind = 'neuroquant'
modalities = ('T1w', 'T2w')
widths = (32, 64, 128, 256)
res_blocks = 1
norm = 'group'
fold = False             # of neuroquant
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
recon = 'l1'             # mean absolute error, both papers; 'l2': mean squared error, which PSNR measures
w_ssim = 0.5             # lambda_SSIM of NeuroQuant eq. 12
w_commit = 0.25          # beta of eq. 7
w_commit_2d = 0.0        # the same of slices, whose reconstruction alone counts in NeuroQuant 3.5
w_cross = 0.5            # eq. 14, over every ordered pair of a session's modalities
cross_start = 2000       # steps before w_cross sets in
cross_ramp = 2000        # steps of its linear rise
w_align = 0.0            # of the distance between a session's anatomy latents; not the paper's
w_adv = 0.001            # scale of the reversed gradient, eq. 15; the classifier learns at full weight
adv_start = 5000         # steps before both begin; the scale rises over the rest of the 3D phase
# the rest of convvae's objective, DeCo eq. 1 and 7; 0 leaves a term out
w_kl = 0.0
kl_reduction = 'mean'    # over every element; 'sum' over the latent and mean over the batch, as MAISI
w_sid = 0.0              # DeCo eq. 3, on mu, as the next two
w_cov = 0.0              # DeCo eq. 4; eq. 6 is w_cov = w_var
w_var = 0.0              # DeCo eq. 5
var_gamma = 1.0
var_form = 'hinge_std'   # or 'two_sided_var'
gather = False           # eq. 3-5 over the positions of all processes instead of each its own
w_perc = 0.0
perceptual = 'squeeze'   # LPIPS trunk: squeeze, alex or vgg, from the files below; or random, a fixed one
perc_trunk = ''          # path of torchvision's trunk
perc_lin = ''            # path of LPIPS v0.1's channel weights
slice_fraction = 0.2     # of the slices of each plane that the perceptual loss and a 2D discriminator see
w_discriminator = 0.0    # of what the PatchGANs say of a reconstruction
discriminator_dims = (3, 2) # PatchGANs on volumes and on slices, in equal parts
discriminator_form = 'least_squares' # or 'hinge'
discriminator_start = 0  # steps before the discriminators take part
freeze_encoder = False   # decoder fine-tuning: only decoder and post layer learn, the latent stays as it is
# schedule
iters = 100_000          # of convvae
joint = 'sequential'     # of neuroquant: slices after volumes; or 'interleaved' with them, or 'none'
iters_3d = 100_000       # of neuroquant
iters_2d = 25_000        # of joint='sequential'
p_2d = 0.3               # of joint='interleaved': probability of a batch of slices in a step
w_2d = 0.5               # of joint='interleaved': its weight
max_iters = 0            # above 0 it stops the run, and changes nothing else
# optimiser
muon = False             # weights of 16 outputs and more move by orthogonal steps, the rest by AdamW
lr = 1e-4
min_lr = 4.5e-6          # reached at lr_decay_iters by a cosine, constant afterwards
warmup_iters = 2000
lr_decay_iters = 100_000
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
adam_eps = 1e-8
grad_clip = 1.0
ema_decay = 0.999        # average of the weights, what is validated and used; 0 for none
# system
device = ''              # '' picks cuda when there is one
dtype = 'bfloat16'       # autocast, or float32; on a CPU float32 is used
compile = True           # torch.compile of the networks; on a CPU never
checkpointing = False    # recompute the large stages in the backward pass: less memory, more time
seed = 0

# what may differ when a run is resumed; data_dir has its own check
NOT_RESULTS = ('data_dir', 'prepare', 'out_dir', 'init_from', 'resume_changed', 'overwrite', 'log_interval',
               'eval_interval', 'eval_sessions', 'wandb_project', 'tensorboard', 'max_iters', 'perc_trunk',
               'perc_lin', 'device', 'compile', 'checkpointing')

def check_settings():
    """SystemExit with one line for settings that cannot be, or not together."""
    refuse_below_one(config, 'batch_size', 'batch_size_2d', 'grad_accum', 'log_interval', 'eval_interval')
    autocast('cpu', dtype)  # refuses other types
    choices = {
        'kind': ('neuroquant', 'convvae'),
        'joint': ('sequential', 'interleaved', 'none'),
        'recon': ('l1', 'l2'),
        'kl_reduction': ('mean', 'sum'),
        'var_form': ('hinge_std', 'two_sided_var'),
        'discriminator_form': ('least_squares', 'hinge'),
    }
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise SystemExit(f'--{key}={config[key]}: {" or ".join(allowed)}')
    neuroquant = kind == 'neuroquant'
    swaps, slices_alone = neuroquant and w_cross > 0, not neuroquant and dims == 2
    latent_terms = max(w_kl, w_sid, w_cov, w_var) > 0
    for_convvae = freeze_encoder or augment or latent_terms or max(w_perc, w_discriminator) > 0
    drawable = all(m in TISSUE or is_random(m) for m in modalities) and not augment and not slices_alone
    wrong = {
        f'--discriminator_dims={discriminator_dims}: of 3 and 2': not set(discriminator_dims) <= {2, 3},
        f'--temperature={temperature}: 1 or more': temperature < 1,
        'w_cross > 0 needs film=True: without FiLM there is no modality to swap': swaps and not film,
        'freeze_encoder, augment, w_kl, w_sid, w_cov, w_var, w_perc and w_discriminator are for '
        "kind='convvae'": neuroquant and for_convvae,
        'patch and augment are for volumes; with dims=2 whole slices are used':
            slices_alone and (patch or augment),
        "w_kl, w_sid, w_cov and w_var need bottleneck='kl'":
            not neuroquant and bottleneck == 'vq' and latent_terms,
        f"--synthesise={synthesise} --deform={deform}: for volumes of {', '.join(TISSUE)}, random1, "
        'random2, ..., not with dims=2 or augment': max(synthesise, deform) > 0 and not drawable,
    }
    for message, is_so in wrong.items():
        if is_so: raise SystemExit(message)

# ---------------------------------------------------------------- schedules

def get_w_cross(it):
    return w_cross * min(1.0, max(0.0, (it - cross_start) / max(1, cross_ramp)))

def get_alpha(it):
    """Scale of the reversed gradient; it rises as in Ganin & Lempitsky 2015."""
    p = (it - adv_start) / max(1, iters_3d - adv_start)
    return 0.0 if p <= 0 else w_adv * (2 / (1 + math.exp(-10 * min(1.0, p))) - 1)

@dataclasses.dataclass
class MicroStep:
    """One batch of a step."""
    what: str          # sessions, scans or slices
    number: int        # of the batch, among those of its kind
    weight: float      # of its loss in the step
    log_weight: float  # of its terms in what the log says of the step

def micro_steps(it):
    """What step `it` trains on: a list of MicroSteps."""
    slices = MicroStep('slices', it, 1.0, 1.0)
    if it >= volumes_end: return [slices]
    what = 'sessions'
    if kind == 'convvae':
        what = 'scans' if dims == 3 else 'slices'
    part = 1 / grad_accum
    steps = [MicroStep(what, it * grad_accum + k, part, part) for k in range(grad_accum)]
    coin = random.Random(f'{seed}:{it}').random()  # the same on every process
    if kind == 'neuroquant' and joint == 'interleaved' and coin < p_2d:
        steps.append(dataclasses.replace(slices, weight=w_2d))
    return steps

# ---------------------------------------------------------------- batches

def make_batch(step):
    draws = max(synthesise, deform) > 0
    if step.what == 'scans':
        return train_set.scan_batch(step.number, batch_size, patch, augment, draws)
    if step.what == 'sessions':
        return train_set.session_batch(step.number, batch_size, patch, draws, grad_accum)
    if kind == 'convvae':
        return train_set.slice_batch(step.number, batch_size, slice_axis)
    return train_set.slice_batch(step.number, batch_size_2d)

# ---------------------------------------------------------------- objective

def loss_weights(it):
    """The weight of each term in the loss of step `it`."""
    return {
        'recon': 1.0,
        'commit': w_commit,
        'adv': 1.0,
        'cross': get_w_cross(it),
        'align': w_align,
        'recon_2d': 1.0,
        'commit_2d': w_commit_2d,
        'ssim': w_ssim,
        'kl': w_kl,
        'sid': w_sid,
        'cov': w_cov,
        'var': w_var,
        'perc': w_perc,
        'perc_random': w_perc,
        'generator': w_discriminator,
    }

def neuroquant_terms(batch, what, it):
    """Unweighted terms (recon: eq. 12), means over the joined batch, and x_hat."""
    x, modality, share = batch['x'], batch['modality'], batch['share']
    pairs = batch.get('pairs', ())
    crosses = get_w_cross(it) > 0  # by schedule alone: the same terms everywhere
    out = model(x, modality, pairs if crosses and len(pairs) else None)
    terms = {
        'recon': share * reconstruction_loss(out['x_hat'], x, w_ssim, recon),
        'commit': share * out['commit'],
    }
    if what == 'slices':
        return {f'{name}_2d': term for name, term in terms.items()}, out['x_hat']
    if classifier and it >= adv_start:
        terms['adv'] = share * adversary_loss(classifier, out['z_anat'].float(), modality, get_alpha(it))
    if crosses:
        terms['cross'] = torch.zeros((), device=device)
        if len(pairs):
            error = reconstruction_loss(out['x_cross'], x[pairs[:, 1]], 0.0, recon)
            terms['cross'] = batch['pair_share'] * error
    if w_align > 0:
        terms['align'] = batch['pair_share'] * alignment_loss(out['z_anat'].float(), pairs)
    return terms, out['x_hat']

def convvae_terms(batch, what, it):
    """Unweighted terms of a micro-batch, DeCo eq. 1 and 7 or their VQ form, and x_hat."""
    x = batch['x']
    out = model(x, generators(batch, seed, 0, device))
    x_hat, mu = out['x_hat'], out.get('mu')
    terms = {'recon': reconstruction_loss(x_hat, x, 0.0, recon)}
    if w_ssim > 0:
        terms['ssim'] = 1 - ssim(x_hat, x, size=7).mean()
    if bottleneck == 'vq':
        terms['commit'] = out['commit']
    if w_kl > 0:
        terms['kl'] = kl_loss(mu, out['logvar'], kl_reduction)
    if w_sid > 0:
        terms['sid'] = sid_loss(mu, gather)
    if w_cov > 0:
        terms['cov'] = cov_loss(mu, gather)
    if w_var > 0:
        terms['var'] = var_loss(mu, var_gamma, var_form, gather)
    if lpips:
        name = 'perc_random' if lpips.random else 'perc'
        terms[name] = perceptual_loss(lpips, x_hat, x, slice_fraction, generators(batch, seed, 1))
    if discriminators and it >= discriminator_start:
        terms['generator'] = generator_term(discriminators, x_hat, discriminator_form, slice_fraction,
                                            generators(batch, seed, 2))
    return terms, x_hat

def learn(batch, step, it):
    """Add the gradients of a micro-step to those of step `it`; returns its unweighted terms."""
    weights = loss_weights(it)
    # to(), since contiguous() would leave a single channel as it is
    batch['x'] = batch['x'].to(memory_format=torch.channels_last_3d)
    discriminators.requires_grad_(False)  # the generator's step leaves them no gradient
    with autocast(device, dtype):
        terms, x_hat = compute_terms(batch, step.what, it)
        loss = sum(weights[name] * term for name, term in terms.items() if weights[name] > 0)
    (step.weight * loss).backward()
    if discriminators and it >= discriminator_start:
        discriminators.requires_grad_(True)
        with autocast(device, dtype):
            loss = discriminator_term(discriminators, x_hat.detach(), batch['x'], discriminator_form,
                                      slice_fraction, generators(batch, seed, 3))
        (step.weight * loss).backward()
        terms['discriminator'] = loss
    return terms

# ---------------------------------------------------------------- checkpoints

def train_mode():
    raw_model.train()
    if freeze_encoder and hasattr(raw_model, 'quantizer'):
        raw_model.quantizer.eval()  # the codebook is the encoder's

def save(name, validated=True):
    """Write everything that a resumed run needs; unless validated, it begins with a validation."""
    if rank: return
    save_checkpoint(os.path.join(out_dir, name), {
        'model': raw_model.state_dict(),
        **{key: part.state_dict() if part else None for key, part in parts.items()},
        'model_args': model_args(raw_model), 'config': config, 'world': world, 'data': train_set.box,
        'fingerprint': data_seen, 'voxel_mm': train_set.voxel_mm, 'iter_num': it, 'best_val': best_val,
        'validated': validated, 'git_commit': git_commit()})

def validate_and_save():
    """What follows on step `it` every eval_interval steps and at a phase's end."""
    global best_val
    if val_set:
        averaged = (ema or raw_model).eval()
        record, shown = validate(averaged, val_set, eval_sessions, device, dtype)
        train_mode()
        log.write({'iter': it} | record)
        print0(f'iter {it:,}/{stop:,}: {brief(record)}')
        if rank == 0:
            figures.run_so_far(out_dir, log.tabulate(), shown, it)
        if record['val/psnr_db'] > best_val:
            best_val = record['val/psnr_db']
            save('best.pt')
    if it == volumes_end < iters:
        best_val = -math.inf  # best.pt is of the last phase
        save('ckpt_3d.pt')
    save('ckpt.pt')
    log.restart(it)

# ---------------------------------------------------------------- parts of the start

def make_model():
    """The model of the settings; SystemExit with one line if there is none, or none for this size."""
    try:
        made = from_settings(kind, config)
        made.check_size(sample_shape)
    except ValueError as e:
        raise SystemExit(f'model: {e}')
    return made

def load_start():
    """Load the weights that init_from names; returns the checkpoint if a run is resumed, else None."""
    if init_from == 'scratch': return None
    resumes = init_from == 'resume'
    path = f'{out_dir}/ckpt.pt' if resumes else init_from
    start = load_like(path, model_args(raw_model))
    if not resumes:
        raw_model.load_state_dict(start['ema'] or start['model'])  # what was validated goes on
        return None
    refuse_changes(start, config, world, NOT_RESULTS)
    refuse_other_data(start['fingerprint'], data_dir, path)
    raw_model.load_state_dict(start['model'])
    return start

def rehearse():
    """The micro-step that takes most memory, for step_bytes: all terms, the batch with most voxels."""
    last = volumes_end - 1
    what, rows, shape = micro_steps(last)[0].what, batch_size, sample_shape
    if kind == 'neuroquant':
        rows = batch_size * len(modalities)
        shortest = train_set.shape.index(min(train_set.shape))
        plane = [1 if axis == shortest else n for axis, n in enumerate(train_set.shape)]
        if joint != 'none' and batch_size_2d * math.prod(plane) > rows * math.prod(shape):
            what, rows, shape = 'slices', batch_size_2d, plane
    n_pairs = rows * (len(modalities) - 1) if what == 'sessions' else 0
    learn(blank_batch(rows, shape, n_pairs), MicroStep(what, 0, 1.0, 1.0), last)

# ---------------------------------------------------------------- the run

if __name__ == '__main__':
    config = configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    check_settings()
    if device == 'cpu':
        dtype, compile = 'float32', False
    savers = (f'batch_size={batch_size} (raise grad_accum for it), batch_size_2d={batch_size_2d}, '
              f'patch={patch} or set checkpointing=True')
    explain_failures(savers)
    volumes_end = iters_3d if kind == 'neuroquant' else iters  # then slices alone
    if kind == 'neuroquant':
        iters = iters_3d + (iters_2d if joint == 'sequential' else 0)
    stop = min(max_iters or iters, iters)

    # ---- data
    if rank == 0:
        make_out_dir(out_dir)
        refuse_overwriting(out_dir, init_from, overwrite)
        prepare_absent(data_dir, prepare)
    wait_for_all()
    train_set = Sessions(data_dir, modalities, 'train', temperature, seed, rank, world, brain_patches)
    train_set.verify()
    data_seen = fingerprint(data_dir)
    val_set = Sessions(data_dir, modalities, 'val') if has_split(data_dir, modalities, 'val') else None
    say_sessions(train_set, val_set)
    sample_shape = train_set.patch_size(patch)
    if kind == 'convvae' and dims == 2:
        sample_shape = tuple(1 if axis == slice_axis else n for axis, n in enumerate(train_set.shape))

    # ---- model
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    raw_model = make_model()
    classifier, lpips = None, None
    if kind == 'neuroquant' and w_adv > 0:
        classifier = ModalityClassifier(anat_dim, len(modalities)).to(device)
    used_dims = discriminator_dims if w_discriminator > 0 else ()
    discriminators = torch.nn.ModuleList(PatchDiscriminator(n) for n in used_dims).to(device)
    if kind == 'convvae' and w_perc > 0:
        lpips = LPIPS() if perceptual == 'random' else LPIPS(perceptual, perc_trunk, perc_lin)
        lpips.to(device)
        if lpips.random:
            print0("perceptual='random': the perceptual loss compares random features, it is not LPIPS")
    judges = [*discriminators, *([lpips] if lpips else [])]
    for judge in judges:
        refuse_small(judge, sample_shape)
    resumed = load_start()
    memory_format = torch.channels_last if kind == 'convvae' and dims == 2 else torch.channels_last_3d
    raw_model.to(device, memory_format=memory_format)
    if freeze_encoder:
        for name, p in raw_model.named_parameters():
            p.requires_grad_(name.startswith(('decoder.', 'post.')))
    ema = copy.deepcopy(raw_model).requires_grad_(False).eval() if ema_decay > 0 else None
    raw_model.encoder.checkpointing = raw_model.decoder.checkpointing = checkpointing

    # ---- optimisers
    model_weights = [p for p in raw_model.parameters() if p.requires_grad]
    classifier_weights = list(classifier.parameters()) if classifier else []
    how = dict(lr=lr, betas=(beta1, beta2), eps=adam_eps, weight_decay=weight_decay)
    optimizers = make_optimizers(model_weights + classifier_weights, muon, **how)
    gan_weights = list(discriminators.parameters())
    discriminator_optimizer = adamw(gan_weights, **how) if gan_weights else None
    parts = {'ema': ema, 'classifier': classifier, 'optimizer': optimizers[0],
             'muon': optimizers[1] if muon else None, 'discriminators': discriminators,
             'discriminator_optimizer': discriminator_optimizer}
    it, best_val, validated = 0, -math.inf, True
    if resumed:
        it, validated = resumed['iter_num'], resumed.get('validated', True)
        best_val = best_so_far(resumed, config, 'eval_sessions', best_val)
        load_parts(parts, resumed, f'{out_dir}/ckpt.pt')
    del resumed
    model = raw_model
    compute_terms = neuroquant_terms if kind == 'neuroquant' else convvae_terms
    hold_statistics(raw_model, grad_accum)
    networks = ('model', 'classifier', 'lpips', 'discriminators')
    say_memory(globals(), networks, [*optimizers, discriminator_optimizer], [ema], rehearse, savers)
    if compile:  # part by part: the quantiser between them stays eager
        volumes = batch_size * (len(modalities) if kind == 'neuroquant' else 1)
        swaps = volumes * (len(modalities) - 1)
        for part in (model.encoder, model.decoder):
            compile_for(part, (volumes, volumes + swaps))
        for judge in judges:
            compile_whole(judge)
        reconstruction_loss = torch.compile(reconstruction_loss)

    flops = vae_flops(raw_model, sample_shape)
    forward_flops = {'scans': flops, 'sessions': flops, 'slices': flops}  # each (encode, decode) of one
    if kind == 'neuroquant':
        forward_flops['slices'] = vae_flops(raw_model, (1, *train_set.shape[1:]))
    say_cost(raw_model, train_set.shape, sample_shape, flops, f'{device} x {world}')

    # ---- loop
    gradients = MeanGradients(model_weights, classifier_weights, gan_weights)
    log = StepLog(out_dir, config, wandb_project, log_interval, it, stop, device, world, validated)
    stop_signal = catch_signals()
    train_mode()
    if not validated:
        validate_and_save()
    batches = prefetch(make_batch, (step for i in range(it, stop) for step in micro_steps(i)), device)
    while it < stop:
        torch.manual_seed(torch_seed(seed, 32, it))  # the quantiser draws alike on every process
        rate = cosine(it, lr, min_lr, warmup_iters, lr_decay_iters)
        steps, terms, files = micro_steps(it), {}, []
        for step in steps:
            batch = log.next_batch(batches)
            if 'labels' in batch:
                batch['x'] = redraw(batch, modalities, synthesise, seed, train_set.box, deform,
                                    train_set.voxel_mm)
            if step is steps[-1]:
                gradients.expect()
            new_terms = learn(batch, step, it)
            for name, term in new_terms.items():
                terms[name] = terms.get(name, 0.0) + step.log_weight * term.detach()
            files += batch['files']
            counted = 'slices' if step.what == 'slices' else 'volumes'
            cost = training_flops(forward_flops[step.what], batch, new_terms)
            log.count(counted, len(batch['x']), cost)
        gradients.finish()
        grad_norm = take_step(optimizers, model_weights, rate, grad_clip)
        if discriminators and it >= discriminator_start:
            take_step([discriminator_optimizer], gan_weights, rate, grad_clip)
        codes_moved = move_statistics(raw_model)
        if ema:  # a short one while weights move fast
            update_average(ema, raw_model, min(ema_decay, (1 + it) / (10 + it)))
        it += 1

        log.note(it, terms | {'gradient': grad_norm}, files)
        stopped_by = stop_signal()
        validates = it % eval_interval == 0 or it in (volumes_end, stop)
        if log.due(it) or validates or stopped_by:
            log.check()
        if log.due(it):
            if codes_moved:  # of the step's tokens: the codebook's own average counts revived codes as used
                terms['perplexity'] = perplexity(raw_model.quantizer.step_counts)
            log.step(it, terms, grad_norm, rate)
        if stopped_by:
            save('ckpt.pt', not validates)  # a validation may be cut short
        if validates:
            validate_and_save()
        if stopped_by:
            end_by_signal(stopped_by, it)
    if rank == 0 and kind == 'neuroquant' and val_set:
        say_probes((ema or raw_model).eval(), val_set, eval_sessions, device)
    print0(f'done: {out_dir}/ckpt.pt')
    stop_processes()
