"""Use a trained autoencoder on NIfTI scans, or a trained flow or GPT to generate some.

    python sample.py --mode=reconstruct --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=rec.nii.gz
    python sample.py --mode=translate --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t2.nii.gz
    python sample.py --mode=tokens --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t1.npy
    python sample.py --mode=latents --ckpt=out/RUN/best.pt --input=FOLDER --output=FOLDER
    python sample.py --mode=tokens --ckpt=out/RUN/best.pt --input=t1.npy --output=back.nii.gz
    python sample.py --mode=generate --ckpt=out/FLOW/best.pt --output=DIR --sex=F --age=40
    python sample.py --mode=complete --ckpt=out/GPT/best.pt --input=t1.nii.gz --output=DIR
    python sample.py --mode=export --ckpt=out/RUN/best.pt --output=weights.pt --dtype=float16

In Python: Codec, which encodes and decodes files and arrays.

A scan goes through the steps of prepare.py into the model's box and back onto its own grid: a viewer overlays
input and output voxel by voxel. What does not fit the box comes back as background, and so does the input's
background unless --mask=False. --input and --output may be folders: every scan below the one goes to the same
name below the other, of translate with the new modality in it, unless that is there already; torchrun shares
the scans out. A folder that prepare.py wrote will do too: its volumes are taken as they are, and what becomes
of them stays on their box. generate writes volumes (with NeuroQuant one per modality, aligned), latents.npy,
montage.png and nearest.md. tokens writes a .json beside, which names modality and encoder for the way back.
complete generates too, but keeps the first half of a scan's tokens, which is its left, and lets a GPT draw
the others. export writes averaged weights alone, with what builds the model and its box: as .pt, or as
.safetensors with a .json beside.
"""
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import (autocast, configure, load_checkpoint, make_out_dir, print0, save_weights,
                    start_processes, stop_processes)
from data import box_of, random, read_folder
from flow import sample
from judge.figures import views
from judge.novelty import COMPARED, compare_with_training
from judge.runs import other_data
from latents import encode_conditions, value_of
from losses import psnr
from model import GPT, Autoencoder, FlowUNet, NeuroQuant, encoder_hash, from_checkpoint
from scans import nifti
from scans.boxed import (MASK, Scan, Stored, box_grid, is_prepared, is_stored, named_modality, renamed,
                         something_else)
from scans.files import SUFFIXES, every_scan, stem
from slabs import slabwise
from tokens import about_tokens, draw_brains, own_modality, read_tokens, save_codes, save_tokens

# ---------------------------------------------------------------- settings
mode = 'reconstruct'      # or translate, tokens, latents (float16), generate, complete, export
ckpt = 'out/neuroquant/best.pt'
input = ''                # .nii or .nii.gz, a folder of them or of prepared data; for tokens also .npy
output = ''
source = ''               # modality of the input; '': what its name says, else the model's first
target = ''               # modality that comes out; '': of tokens their scan's, of translate another one
mask = True               # the input's background is the output's too; False: what the decoder made of it
like = ''                 # scan whose grid a volume from tokens gets; '' for the box itself, centred at 0 mm
# of generate, complete; sample i of a seed is the same however many are drawn and whichever decoder shows it
n = 4
seed = 0
steps = 30                # of a flow
method = 'euler'          # of a flow, or 'heun', twice the calls per step
temperature = 1.0         # of a GPT; below 1: likelier brains
top_k = 0                 # > 0: a GPT draws among so many likeliest codes
guidance = 1.0            # above 1: away from what the network draws without conditions
sex = ''                  # F or M; sex, age and target condition a network that was trained with them
age = ''                  # years
vae = ''                  # another autoencoder with the same encoder, such as one with a fine-tuned decoder
# system
slab = 0                  # > 0: the autoencoder runs slab by slab, for volumes that do not fit the card
device = ''
dtype = 'float32'         # bfloat16 for autocast; of export float16 for half the size

def check_settings():
    """SystemExit with one line for settings that cannot be."""
    if mode not in MODES: raise SystemExit(f'--mode={mode}: one of {", ".join(MODES)}')
    if not output or (not input and mode not in ('generate', 'export')):
        raise SystemExit('give --input=FILE and --output=FILE; generate wants --output=DIR, complete both')
    if os.path.exists(input) and os.path.exists(output) and os.path.samefile(input, output):
        raise SystemExit(f'--output={output}: that is the input; choose another')
    if mode == 'export':
        if not output.endswith(('.pt', '.safetensors')):
            raise SystemExit(f'--output={output}: must end in .pt or .safetensors')
        if dtype not in ('float32', 'float16'):
            raise SystemExit(f'--dtype={dtype}: float32 or float16')
        return
    if mode in ('generate', 'complete'):
        if steps < 1 or n < 1: raise SystemExit(f'--steps={steps} --n={n}: at least 1 each')
        if mode == 'complete' and os.path.isdir(input):
            raise SystemExit(f'--input={input}: complete wants one scan')
        if temperature <= 0 or top_k < 0:
            raise SystemExit(f'--temperature={temperature} --top_k={top_k}: above 0, and at least 0')
        return
    if os.path.isdir(input): return
    codes = mode in ('tokens', 'latents') and not input.endswith('.npy')
    endings = ('.npy',) if codes else ('.nii', '.nii.gz')
    if not output.endswith(endings):
        raise SystemExit(f'--output={output}: must end in {" or ".join(endings)}')

# ---------------------------------------------------------------- models

def check_model(model):
    """SystemExit with one line if this model of --ckpt cannot do what --mode asks for."""
    if mode == 'export': return
    draws = not isinstance(model, Autoencoder)
    if mode == 'generate' and not draws:
        raise SystemExit(f'{ckpt}: an autoencoder; generate wants a flow or a GPT '
                         '(train_flow.py, train_gpt.py)')
    if mode == 'complete' and not isinstance(model, GPT):
        raise SystemExit(f'{ckpt}: complete wants a GPT (train_gpt.py)')
    if mode not in ('generate', 'complete') and draws:
        kind = 'flow' if isinstance(model, FlowUNet) else 'GPT'
        raise SystemExit(f'{ckpt}: a {kind}; {mode} wants an autoencoder, a {kind} generates')
    if mode == 'tokens' and not hasattr(model, 'quantizer'):
        raise SystemExit(f'{ckpt}: this autoencoder has a KL bottleneck, no tokens')
    if mode == 'translate' and not hasattr(model, 'translate'):
        raise SystemExit(f'{ckpt}: only a NeuroQuant model translates')

def load_autoencoder(network_checkpoint):
    """The autoencoder whose latents a flow or GPT was trained on, or that of --vae; and its modalities."""
    path = vae or network_checkpoint['config']['vae']
    if not path: raise SystemExit(f'{ckpt} names no autoencoder; give --vae=PATH')
    checkpoint = load_checkpoint(path)
    model = from_checkpoint(checkpoint).to(device)
    if not isinstance(model, Autoencoder):
        raise SystemExit(f'--vae={path}: not an autoencoder')
    if encoder_hash(model) != network_checkpoint['encoder_hash']:
        raise SystemExit(f'{path}: not the autoencoder whose latents {ckpt} was trained on, '
                         'nor one with the same encoder')
    return in_slabs(model), tuple(checkpoint['config']['modalities'])

def in_slabs(model):
    """The autoencoder, slab by slab if --slab asks for that; ValueError if it cannot."""
    return slabwise(model, slab) if slab else model

def placed(x):
    """x where the autoencoder takes it; slab by slab, activations stay on the CPU."""
    return x.cpu() if slab else x.to(device)

# ---------------------------------------------------------------- one scan

def open_scan(path, checkpoint):
    """A scan with its modality; a stored one's name tells that, whatever --source is."""
    box = checkpoint['data']
    if is_stored(path): return Stored(path, box['shape'])
    scan = Scan(path, box)
    modalities = checkpoint['config'].get('modalities', ('',))  # a GPT takes any
    scan.modality = source or named_modality(path, modalities) or modalities[0]
    other = something_else(path, modalities)
    if other and scan.modality and not source:
        print(f'{path}: by its name {other}, which this model does not know; taken as {scan.modality}')
    return scan

def stored_volumes(checkpoint):
    """Paths of the volumes of the prepared --input that the model knows."""
    rows, dataset = read_folder(input)
    for note in other_data(ckpt, checkpoint, input, *box_of(dataset)):
        print0(note)
    names = checkpoint['config']['modalities']
    paths = [os.path.join(input, row[name]) for row in rows for name in names if row.get(name)]
    if not paths: raise SystemExit(f'{input}: no volume of {", ".join(names)}')
    return paths

def reconstruct(model, checkpoint, input, output):
    scan = open_scan(input, checkpoint)
    x = placed(scan.box)
    x_hat = model.reconstruct(x, scan.modality).float().clamp(0, 1)
    scan.write(output, x_hat, own_scale=True, mask=mask)
    whole, brain = psnr(x_hat, x).item(), psnr(x_hat, x, mask=x > 0).item()
    score = f'PSNR {whole:.2f} dB whole, {brain:.2f} dB brain'
    if not mask: return f'{score}: {output}'
    return f'{score}, before masking: {output}, whose background is that of the input'

def translate(model, checkpoint, input, output):
    scan = open_scan(input, checkpoint)
    wanted = target_of(scan.modality, model.config.modalities)
    translated = model.translate(placed(scan.box), scan.modality, wanted)
    scan.write(output, translated, own_scale=False, mask=mask)
    return f'{scan.modality} as {wanted}, intensities in [0,1]: {output}'

def target_of(modality, modalities):
    """What a scan of a modality becomes: --target, or else the first other one."""
    others = [other for other in modalities if other != modality]
    return target or (others or [modality])[0]

def tokens(model, checkpoint, input, output):
    """Tokens of a scan; back to a volume if the input holds tokens."""
    if input.endswith('.npy') and not is_stored(input):
        return from_tokens(model, checkpoint, input, output)
    scan = open_scan(input, checkpoint)
    indices = model.tokens(placed(scan.box))[0].cpu().numpy().astype(np.int32)
    save_tokens(output, indices, scan.modality, encoder_hash(model))
    return f'{indices.size} tokens of {model.config.num_codes} codes, shape {indices.shape}: {output}'

def latents(model, checkpoint, input, output):
    """What a flow models: of a KL autoencoder the posterior mean, else the latent before quantisation."""
    scan = open_scan(input, checkpoint)
    mean, _ = model.posterior(placed(scan.box))
    mean = mean[0].float().cpu().numpy().astype(np.float16)
    save_codes(output, mean)
    return f'latent of shape {mean.shape}, float16: {output}'

def from_tokens(model, checkpoint, input, output):
    shape = checkpoint['data']['shape']
    indices = read_tokens(model, shape, input)
    modality = target or own_modality(input, encoder_hash(model))
    if not modality and getattr(model.config, 'film', False):
        raise ValueError(f'{input}: no {about_tokens(input)} says which modality this is; give --target, '
                         f'one of {", ".join(model.config.modalities)}')
    volume = model.from_tokens(placed(indices), modality).float().clamp(0, 1)
    volume = volume[:, :, :shape[0], :shape[1], :shape[2]]
    if like:
        Scan(like, checkpoint['data']).write(output, volume, own_scale=False, mask=mask)
    else:
        nifti.write(output, volume[0, 0].cpu().numpy(), box_grid(shape, checkpoint['voxel_mm']))
    what = f'tokens as {modality}' if modality else 'tokens'
    return f'{indices.numel()} {what}: {output}'

def scans_below(checkpoint, notes):
    """Paths of the scans below --input that the model knows, of translate those of one modality alone."""
    if is_prepared(input):
        paths = stored_volumes(checkpoint)
    else:
        made = os.path.realpath(output) + os.sep  # what an earlier call wrote
        paths = [path for path in every_scan(input, notes) if not os.path.realpath(path).startswith(made)]
    modalities = checkpoint['config']['modalities']
    wanted = source or (modalities[0] if mode == 'translate' else '')
    kept, left_out = [], {}  # {why: paths}
    for path in paths:
        named, other = named_modality(path, modalities), something_else(path, modalities)
        if other and (other == MASK or not source):
            left_out.setdefault(f'by name {other}, which this model does not know', []).append(path)
        elif mode == 'translate' and named not in (wanted, ''):
            left_out.setdefault(f'of another modality than {wanted}; --source names another', []).append(path)
        else:
            kept.append(path)
    for why, those in left_out.items():
        notes.append(f'{len(those)} scans are left out, such as {those[0]}: {why}')
    return kept

def target_below(path, modalities):
    """Where below --output the result of a scan below --input goes."""
    name = stem(os.path.relpath(path, input).removesuffix('.npy'))
    if mode == 'translate':
        modality = source or named_modality(path, modalities) or modalities[0]
        name = renamed(name, modality, target_of(modality, modalities))
    return os.path.join(output, name + ('.npy' if mode in ('tokens', 'latents') else '.nii.gz'))

def each_below(model, checkpoint):
    """Every scan of the folder --input, this process's share of them; one that fails is left out."""
    notes, targets = [], {}  # targets: each with its scan
    for path in scans_below(checkpoint, notes):
        first = targets.setdefault(target_below(path, checkpoint['config']['modalities']), path)
        if first != path:
            notes.append(f'{path}: has the name of {first}; left out')
    for note in notes:
        print0(note)
    begun, done, failed = time.perf_counter(), 0, 0
    mine = list(targets.items())[rank::world]
    for target_path, path in tqdm(mine, desc=mode, leave=False, disable=rank > 0):
        if os.path.exists(target_path): continue
        try:
            make_out_dir(os.path.dirname(target_path))
            tqdm.write(MODES[mode](model, checkpoint, path, target_path))
            done += 1
        except ValueError as e:
            tqdm.write(f'{e.args[0]}; left out')
            failed += 1
    counts = torch.tensor([done, failed])
    if world > 1:
        dist.all_reduce(counts)  # waits for the slowest
    done, failed = counts.tolist()
    seconds = time.perf_counter() - begun
    print0(f'{done} of {len(targets)} scans now, {failed} left out, {done / seconds:.2f} scans/s: {output}')

# settings that name places of one machine
PLACES = ('data_dir', 'out_dir', 'init_from', 'prepare', 'perc_trunk', 'perc_lin', 'vae', 'latents_dir')

def export(model, checkpoint):
    """Write the averaged weights, with what builds the model and its box, and no path of this machine."""
    kept = ('model_args', 'config', 'data', 'voxel_mm', 'iter_num', 'git_commit', 'encoder_hash',
            'conditions', 'latent_shape')
    checkpoint['config'] |= {key: '' for key in PLACES if key in checkpoint['config']}
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():  # counts and sums of a codebook would not fit float16
        weights[name] = weights[name].to(getattr(torch, dtype))
    save_weights(output, weights, {key: checkpoint[key] for key in kept if key in checkpoint})
    print(f'{os.path.getsize(output) / 2 ** 20:.1f} MiB, {dtype}: {output}')

class Codec:
    """An autoencoder for files and arrays: codec = Codec('weights/real_t1w.pt').

    encode(scan) -> codes: of a KL autoencoder the latent (C,d,h,w) float32, else tokens int64. scan: path of
    a NIfTI file, or an array (D,H,W) in [0,1] on the model's own box.
    decode(codes) -> array (D,H,W) in [0,1] on the box. modality: of NeuroQuant, what it shall look like.
    write(path, volume, like): such an array as NIfTI, on the grid of the NIfTI file `like`.
    """
    def __init__(self, path, device='cpu'):
        self.checkpoint = load_checkpoint(path)
        self.model = from_checkpoint(self.checkpoint).to(device)
        self.device = device
        self.box = self.checkpoint['data']

    def on_box(self, array):
        """An array (D,H,W) as a float tensor; ValueError unless it is on the model's box."""
        volume, shape = torch.as_tensor(array).float(), tuple(self.box['shape'])
        if volume.shape != shape:
            raise ValueError(f"an array of shape {tuple(volume.shape)}, the model's box is {shape}")
        return volume

    @torch.no_grad()
    def encode(self, scan):
        if isinstance(scan, (str, os.PathLike)):
            x = Scan(scan, self.box).box
        else:
            x = self.on_box(scan)[None, None]
            if x.min() < 0 or x.max() > 1:
                raise ValueError(f'an array from {x.min():g} to {x.max():g}; scale it to [0,1], background 0')
        x = x.to(self.device)
        if hasattr(self.model, 'quantizer'): return self.model.tokens(x)[0]
        return self.model.latent(x)[0]

    @torch.no_grad()
    def decode(self, codes, modality=None):
        codes = torch.as_tensor(codes)[None].to(self.device)
        if hasattr(self.model, 'quantizer'):
            x = self.model.from_tokens(codes, modality)
        else:
            x = self.model.from_latent(codes.float())
        D, H, W = self.box['shape']
        return x[0, 0, :D, :H, :W].clamp(0, 1).cpu().numpy()

    def write(self, path, volume, like):
        Scan(like, self.box).write(path, self.on_box(volume)[None, None], own_scale=False)

# ---------------------------------------------------------------- new volumes

PICTURED = 8   # new brains in montage.png

def generate(network, checkpoint):
    """Write new volumes, their latents, a montage, and the table of nearest training scans.

    Each is drawn, decoded and written before the next one, so that any number fits in memory.
    """
    autoencoder, modalities = load_autoencoder(checkpoint)
    cond = wanted_conditions(checkpoint['conditions'], modalities)
    make_out_dir(output)
    refuse_earlier_volumes()
    shown = modalities if isinstance(autoencoder, NeuroQuant) else ('',)
    if shown == ('',) and 'modality' in checkpoint['conditions']:
        shown = (target or modalities[0],)
    if target and target not in shown:
        raise SystemExit(f'--target={target}: {ckpt} was trained without the condition modality')
    first = {name: [] for name in shown}  # volumes of the first brains
    latents_part = os.path.join(output, 'latents.npy.part')
    shape = (n, *checkpoint['latent_shape'])
    latents = np.lib.format.open_memmap(latents_part, 'w+', np.float32, shape)
    if isinstance(network, GPT):
        brains = draw_codes(network, autoencoder, checkpoint, cond)
    else:
        brains = draw_latents(network, checkpoint, cond)
    box = checkpoint['data']['shape']
    grid = box_grid(box, checkpoint['voxel_mm'])
    for i, brain in enumerate(tqdm(brains, desc='new brains', total=n, leave=False)):
        latents[i] = latent_of(autoencoder, brain)[0].cpu().numpy()
        for name in shown:
            volume = decode(autoencoder, brain, name, box)
            ending = f'_{name}' if name else ''
            path = os.path.join(output, f'sample_{i:03d}{ending}.nii.gz')
            nifti.write(path, volume, grid)
            if i < (COMPARED if name == shown[0] else PICTURED):
                first[name].append(volume)
    latents.flush()
    os.replace(latents_part, os.path.join(output, 'latents.npy'))
    print(f'{n} new brains{" in " + ", ".join(shown) if shown[0] else ""}: {output}')
    row = [(f'{i} {name}', first[name][i]) for i in range(min(n, PICTURED)) for name in shown]
    views(os.path.join(output, 'montage.png'), [row])

    def coded(mean):
        brain = autoencoder.quantizer.nearest_indices(placed(torch.from_numpy(mean)[None]))
        return latent_of(autoencoder, brain)[0].cpu().numpy()

    compare_with_training(output, checkpoint['config'], modalities, latents[:COMPARED], first[shown[0]],
                          shown[0], coded if isinstance(network, GPT) else None)

def refuse_earlier_volumes():
    """SystemExit if volumes of an earlier call are there: evaluate.py would count them in."""
    earlier = [name for name in os.listdir(output) if name.startswith('sample_')]
    if earlier:
        raise SystemExit(f'{output}: holds {len(earlier)} volumes of an earlier call, such as '
                         f'{min(earlier)}; delete them or choose another --output')

def draw_latents(flow, checkpoint, cond):
    """Yield n latents of the seed (1,C,d,h,w), each alone, since a batch changes the last bits."""
    shape = (1, *checkpoint['latent_shape'])
    for i in range(n):
        noise = torch.from_numpy(random(seed, 7, i).standard_normal(shape, dtype=np.float32)).to(device)
        shift = checkpoint['config']['shift']
        yield flow.denormalise(sample(flow, noise, steps, method, cond, shift, guidance))

def draw_codes(gpt, autoencoder, checkpoint, cond):
    """Yield n brains of the seed as indices of codes, int64, as autoencoder.tokens gives them."""
    c = gpt.config
    books = (c.num_codebooks,) if c.num_codebooks > 1 else ()
    kept = half_of_input(autoencoder, checkpoint) if mode == 'complete' else None
    how = dict(cond=cond, kept=kept, temperature=temperature, top_k=top_k, guidance=guidance)
    for tokens in draw_brains(gpt, n, seed, device, **how):
        yield tokens.view(1, *books, *c.grid)

def half_of_input(autoencoder, checkpoint):
    """(N,) tokens of --input, but -1 in the second half of each codebook's grid."""
    tokens = autoencoder.tokens(placed(open_scan(input, checkpoint).box)).cpu()
    books = tokens.view(autoencoder.config.num_codebooks, -1).clone()
    books[:, books.shape[1] // 2:] = -1
    return books.flatten()

def latent_of(autoencoder, brain):
    """The latent of a brain; of indices, that of their codes."""
    return brain if brain.is_floating_point() else autoencoder.quantizer.lookup(placed(brain))

def decode(autoencoder, brain, modality, shape):
    """A latent (1,C,d,h,w) or indices -> volume (D,H,W) in [0,1], an array."""
    decoder = autoencoder.from_latent if brain.is_floating_point() else autoencoder.from_tokens
    x = decoder(placed(brain), modality or None).float().clamp(0, 1).cpu().numpy()
    return x[0, 0, :shape[0], :shape[1], :shape[2]]

def wanted_conditions(known, modalities):
    """--target, --sex and --age as the network takes them, None without any; known: those of its training."""
    wanted = {}
    for name, text in (('sex', sex), ('age', age)):
        if text == '': continue
        if name not in known:
            trained_with = ', '.join(known) or 'none'
            raise SystemExit(f'--{name}={text}: {ckpt} was trained with conditions {trained_with}')
        wanted[name] = value_of({name: str(text)}, name)
        if wanted[name] is None:
            raise SystemExit(f'--{name}={text}: ' + ('F or M' if name == 'sex' else 'a number of years'))
    if 'modality' in known:
        wanted['modality'] = target or modalities[0]
        if wanted['modality'] not in modalities:
            raise SystemExit(f"--target={target}: {ckpt} knows {', '.join(modalities)}")
    with torch.device(device):
        return encode_conditions([wanted], known, modalities) if wanted else None

MODES = {'reconstruct': reconstruct, 'translate': translate, 'tokens': tokens, 'latents': latents,
         'generate': generate, 'complete': generate, 'export': export}

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    rank, world, device = start_processes(device)
    check_settings()
    source, target = (SUFFIXES.get(name.lower(), name) for name in (source, target))  # t1w is T1w
    checkpoint = load_checkpoint(ckpt)
    model = from_checkpoint(checkpoint).to(device)
    check_model(model)
    try:
        if mode == 'export':
            export(model, checkpoint)
        elif mode in ('generate', 'complete'):
            with torch.no_grad(), autocast(device, dtype):
                generate(model, checkpoint)
        else:
            with torch.no_grad(), autocast(device, dtype):
                model = in_slabs(model)
                if os.path.isdir(input):
                    each_below(model, checkpoint)
                else:
                    print(MODES[mode](model, checkpoint, input, output))
    except ValueError as e:
        raise SystemExit(str(e.args[0]))
    stop_processes()
