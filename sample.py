"""Use a trained autoencoder on NIfTI scans, or a trained flow to generate some.

    python sample.py --mode=reconstruct --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=rec.nii.gz --source=T1w
    python sample.py --mode=translate   --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t2.nii.gz  --source=T1w --target=T2w
    python sample.py --mode=tokens      --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t1.npy
    python sample.py --mode=tokens      --ckpt=out/RUN/best.pt --input=t1.npy    --output=back.nii.gz --target=T1w [--like=t1.nii.gz]
    python sample.py --mode=generate    --ckpt=out/FLOW/best.pt --n=4 --seed=0 --steps=30 --output=DIR [--target=T1w --sex=F --age=40]

The scan goes through the steps of prepare.py (nifti.conform) into the model's box and back onto its own grid, in its own
orientation and affine: a viewer overlays input and output voxel by voxel. What does not fit the box comes back as 0.
generate writes a volume per sample (with NeuroQuant one per modality, aligned), latents.npy, montage.png and, where the training
data is at hand, nearest.md: how close each comes to a training scan, beside how close held-out scans come.
"""
import os
import sys

import numpy as np
import torch

from scans import nifti
from common import (
    autocast, configure, load_checkpoint, make_out_dir, markdown_table, start_processes, write_text
)
from data import as_float, random, read_index
from judge.figures import views
from flow import sample
from latents import Latents, encode_conditions, nearest, value_of
from losses import psnr
from model import FlowUNet, NeuroQuant, encoder_hash, from_checkpoint

# ---------------------------------------------------------------- settings
mode = 'reconstruct'      # reconstruct | translate | tokens | generate
ckpt = 'out/neuroquant/best.pt'
input = ''                # .nii or .nii.gz; for tokens also .npy
output = ''
source = 'T1w'            # modality of the input
target = 'T2w'            # of translate, and of tokens back to a volume
n = 4                     # of generate, as the following: how many
# sample i of a seed is the same however many are drawn and whichever decoder shows it
seed = 0
steps = 30
method = 'euler'          # or 'heun', twice the calls per step
guidance = 1.0            # above 1: away from the unconditional flow
# F or M; sex, age and target (the modality) condition a flow that was trained with them
sex = ''
age = ''                  # years
vae = ''                  # another autoencoder with the same encoder, such as one with a fine-tuned decoder
# scan whose grid a volume from tokens is put on; '' for the box itself, centred at 0 mm
like = ''
device = ''
dtype = 'float32'         # bfloat16 for autocast

# ---------------------------------------------------------------- one scan

class Scan:
    """A NIfTI file, its box (1,1,D,H,W) in [0,1] for the model, and what it takes to go back."""
    def __init__(self, path, data):
        self.volume, self.affine, self.native = nifti.read(path)
        boxes, self.placement = nifti.conform([self.volume], [self.affine], **data)
        self.box = torch.from_numpy(boxes[0])[None, None]
        if self.placement.lost > 0:
            print(
                f'{path}: {self.placement.lost:.1%} of the brain lies outside the box of {data["shape"]}'
                ' voxels'
            )
        if self.placement.estimated[0]:
            print(f'{path}: no zero background, taken as a raw head scan')

    def write(self, path, box, own_scale):
        """box (1,1,D,H,W) onto the scan's grid; in the scan's intensities, or in [0,1]."""
        low, high = (self.placement.low[0], self.placement.high[0]) if own_scale else (0.0, 1.0)
        box = box.float().clamp(1e-4, 1).cpu() * (self.box > 0)  # the input's background is known to be empty
        nifti.write(
            path,
            nifti.restore(box[0, 0].numpy(), self.placement, self.affine, self.volume.shape, low, high),
            self.native,
        )

def read_tokens(path, model, shape):
    """(1,d,h,w) int64 from a .npy file; refused if they are not tokens of this model."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as e:
        raise ValueError(f'{path}: not a readable .npy file ({e})')
    books = model.config.num_codebooks
    grid = (books,) * (books > 1) + model.latent_shape(shape)[1:]
    if tokens.dtype.kind not in 'iu' or tokens.shape != grid:
        raise ValueError(f'{path}: integers of shape {grid} are needed, got {tokens.dtype} {tokens.shape}')
    if tokens.min() < 0 or tokens.max() >= model.config.num_codes:
        raise ValueError(
            f'{path}: tokens {tokens.min()}..{tokens.max()}, the model has 0..{model.config.num_codes - 1}'
        )
    return torch.from_numpy(tokens.astype(np.int64))[None]

# ---------------------------------------------------------------- new volumes

def box_affine(checkpoint):
    """Affine of a box of no scan: axes of the scanner, 0 mm in its middle."""
    size = np.array(checkpoint['voxel_mm'], float)
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = -(np.array(checkpoint['data']['shape']) - 1) / 2 * size
    return nifti.Native(affine, tuple(checkpoint['data']['shape']), 'RAS', tuple(size))

def generate(flow, checkpoint):
    """Draw n latents, decode them, write volumes, latents, a montage and the table of nearest training scans."""
    if steps < 1 or n < 1: raise SystemExit(f'--steps={steps} --n={n}: at least 1 each')
    vae_path = vae or checkpoint['config']['vae']
    vae_checkpoint = load_checkpoint(vae_path)
    if vae_checkpoint['model_args']['kind'] == 'flowunet':
        raise SystemExit(f'--vae={vae_path}: this is a flow, not an autoencoder')
    autoencoder = from_checkpoint(vae_checkpoint).to(device)
    if encoder_hash(autoencoder) != checkpoint['encoder_hash']:
        raise SystemExit(
            f'{vae_path}: not the autoencoder whose latents this flow was trained on, nor one with the same'
            ' encoder'
        )
    names, shape = tuple(vae_checkpoint['config']['modalities']), checkpoint['data']['shape']
    cond = wanted_conditions(checkpoint, names)
    x = []
    for i in range(n):  # one at a time: the batch would change the last bits
        noise = torch.from_numpy(
            random(seed, 7, i).standard_normal((1, *checkpoint['latent_shape']), dtype=np.float32)
        ).to(device)
        x.append(sample(flow, noise, steps, method, cond, checkpoint['config']['shift'], guidance))
    z = flow.denormalise(torch.cat(x))
    shown = names if isinstance(autoencoder, NeuroQuant) else ('',)
    make_out_dir(output)
    np.save(os.path.join(output, 'latents.npy'), z.cpu().numpy())
    inside = (slice(None), 0, *map(slice, shape))
    volumes = {
        name: (
            torch.cat([autoencoder.from_latent(one, name or None) for one in z.split(1)])
            .float()
            .clamp(0, 1)
            .cpu()
            .numpy()[inside]
        )
        for name in shown
    }
    for name, found in volumes.items():
        for i, volume in enumerate(found):
            nifti.write(
                os.path.join(output, f'sample_{i:03d}{"_" * bool(name)}{name}.nii.gz'),
                volume,
                box_affine(checkpoint),
            )
    print(f'{n} new brains{" in " + ", ".join(shown) if shown[0] else ""}: {output}')
    views(
        os.path.join(output, 'montage.png'),
        [[(f'{i} {name}', found[i]) for i in range(min(n, 8)) for name, found in volumes.items()]],
    )
    compare_with_training(checkpoint, names, z.cpu().numpy(), volumes, shown)

def wanted_conditions(checkpoint, names):
    """--target, --sex and --age as the flow takes them; refused if it was not trained with them. target counts only if it was."""
    known, value = checkpoint['conditions'], {}
    for name, given in (('sex', sex), ('age', age)):
        if given == '': continue
        if name not in known:
            raise SystemExit(
                f"--{name}={given}: this flow was trained with conditions {', '.join(known) or 'none'}"
            )
        value[name] = value_of({name: str(given)}, name)
        if value[name] is None:
            raise SystemExit(f'--{name}={given}: ' + ('F or M' if name == 'sex' else 'a number of years'))
    if 'modality' in known:
        if target not in names:
            raise SystemExit(f"--target={target}: this flow knows {', '.join(names)}")
        value['modality'] = target
    cond = encode_conditions([value], known, names) if value else None
    return cond and {
        k: v.to(device) if k == 'classes' else [t.to(device) for t in v] for k, v in cond.items()
    }

def compare_with_training(checkpoint, names, z, volumes, shown):
    """nearest.md: root-mean-square distance to the nearest training latent and volume, for new brains and for held-out scans."""
    c = checkpoint['config']
    if not (os.path.isdir(c['latents_dir']) and os.path.isdir(c['data_dir'])):
        return print(f"no table of nearest training scans: {c['latents_dir']} or {c['data_dir']} is not here")
    train = Latents(c['latents_dir'], c['data_dir'], names, 'train', ())
    held = [
        s for s in ('val', 'test') if any(row['split'] == s for row in read_index(c['data_dir'], names)[0])
    ]
    others = [Latents(c['latents_dir'], c['data_dir'], names, s, ()) for s in held]
    places = [(part, k) for part in others for k in range(part.n)][:50]
    m = names.index(shown[0]) if shown[0] else None  # volumes are compared in one modality
    def volume(part, k):
        row, modality = part.scans[k]
        return as_float(np.load(os.path.join(row['folder'], row[names[modality]]), mmap_mode='r'))
    of_modality = [k for k in range(train.n) if m in (None, train.scans[k][1])]
    latent = nearest(
        [*z, *[part.load(k)[0] for part, k in places]], ((k, train.load(k)[0]) for k in range(train.n))
    )
    seen = [(part, k) for part, k in places if m in (None, part.scans[k][1])]
    image = nearest(
        [*volumes[shown[0]], *[volume(part, k) for part, k in seen]],
        ((k, volume(train, k)) for k in of_modality),
    )
    who = lambda k: f"{train.scans[k][0]['subject']} {names[train.scans[k][1]]}"
    rows = [
        [i, f'{latent[i][1]:.4f}', who(latent[i][0]), f'{image[i][1]:.4f}', who(image[i][0])]
        for i in range(n)
    ]
    held_latent, held_image = ([d for _, d in found[n:]] for found in (latent, image))
    spread = lambda d: f'{np.min(d):.4f} / {np.median(d):.4f}' if d else ''
    if places:
        rows.append(
            [f'{len(places)} held-out scans, least / median', spread(held_latent), '', spread(held_image), '']
        )
    lines = [
        'Root-mean-square distance to the nearest training scan: of latents (posterior means), and of volumes'
        + (f' ({shown[0]})' if shown[0] else '')
        + '. A blurred volume is close to many.',
        '',
        *markdown_table(['new brain', 'latent', 'nearest', 'volume', 'nearest'], rows),
    ]
    close = [str(i) for i in range(n) if places and latent[i][1] < min(held_latent)]
    if close:
        lines += [
            '',
            (
                f'warning: new brains {", ".join(close)} lie closer to a training latent than any held-out'
                ' scan does: memorised?'
            ),
        ]
    write_text(os.path.join(output, 'nearest.md'), '\n'.join(lines) + '\n')
    print('\n'.join(lines))

def write_tokens(path, tokens):
    part = f'{path}.part.npy'
    try:
        np.save(part, tokens)
        os.replace(part, path)
    except OSError as e:
        raise ValueError(f'{path}: cannot write ({e.strerror})')

@torch.no_grad()
def main():
    global device
    _, _, device = start_processes(device)
    if mode not in ('reconstruct', 'translate', 'tokens', 'generate'):
        raise SystemExit(f'--mode={mode}: reconstruct, translate, tokens or generate')
    if not output or (not input and mode != 'generate'):
        raise SystemExit('give --input=FILE and --output=FILE; generate wants --output=DIR')
    if mode == 'generate':
        checkpoint = load_checkpoint(ckpt)
        flow = from_checkpoint(checkpoint).to(device)
        if not isinstance(flow, FlowUNet):
            raise SystemExit(f'{ckpt}: an autoencoder; generate wants a flow (train_flow.py)')
        with autocast(device, dtype):
            return generate(flow, checkpoint)
    back = mode == 'tokens' and input.endswith('.npy')
    wanted = '.npy' if mode == 'tokens' and not back else ('.nii', '.nii.gz')
    if not output.endswith(wanted):
        raise SystemExit(
            f'--output={output}: must end in {wanted if isinstance(wanted, str) else " or ".join(wanted)}'
        )
    checkpoint = load_checkpoint(ckpt)
    model, data = from_checkpoint(checkpoint).to(device), checkpoint['data']
    if isinstance(model, FlowUNet):
        raise SystemExit(f'{ckpt}: a flow; {mode} wants an autoencoder, a flow generates')
    if mode == 'tokens' and not hasattr(model, 'quantizer'):
        raise SystemExit(f'{ckpt}: this autoencoder has a KL bottleneck, no tokens')
    if mode == 'translate' and not hasattr(model, 'translate'):
        raise SystemExit(f'{ckpt}: only a NeuroQuant model translates')
    with autocast(device, dtype):
        if back:
            tokens = read_tokens(input, model, data['shape']).to(device)
            volume = (
                model.from_tokens(tokens, target)
                .float()
                .clamp(0, 1)[(..., *(slice(n) for n in data['shape']))]
            )
            if like:
                Scan(like, data).write(output, volume, own_scale=False)
            else:
                nifti.write(output, volume[0, 0].cpu().numpy(), box_affine(checkpoint))
            print(f'{tokens.numel()} tokens as {target}: {output}')
            return
        scan = Scan(input, data)
        x = scan.box.to(device)
        if mode == 'tokens':
            tokens = model.tokens(x)[0].cpu().numpy().astype(np.int32)
            write_tokens(output, tokens)
            print(f'{tokens.size} tokens of {model.config.num_codes} codes, shape {tokens.shape}: {output}')
        elif mode == 'reconstruct':
            x_hat = model.reconstruct(x, source).float().clamp(0, 1)
            scan.write(output, x_hat, own_scale=True)
            print(
                f'PSNR {psnr(x_hat, x).item():.2f} dB whole, {psnr(x_hat, x, mask=x > 0).item():.2f} dB'
                f' brain: {output}'
            )
        else:
            scan.write(output, model.translate(x, source, target), own_scale=False)
            print(f'{source} as {target}, intensities in [0,1]: {output}')

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    try:
        main()
    except ValueError as e:
        raise SystemExit(str(e.args[0]))
