"""Use a trained autoencoder on NIfTI scans.

    python sample.py --mode=reconstruct --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=rec.nii.gz --source=T1w
    python sample.py --mode=translate   --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t2.nii.gz  --source=T1w --target=T2w
    python sample.py --mode=tokens      --ckpt=out/RUN/best.pt --input=t1.nii.gz --output=t1.npy
    python sample.py --mode=tokens      --ckpt=out/RUN/best.pt --input=t1.npy    --output=back.nii.gz --target=T1w [--like=t1.nii.gz]

The scan goes through the steps of prepare.py (nifti.conform) into the model's box and back onto its own grid, in its own
orientation and affine: a viewer overlays input and output voxel by voxel. What does not fit the box comes back as 0.
"""
import os
import sys

import numpy as np
import torch

import nifti
from common import autocast, configure, load_checkpoint, start_processes
from losses import psnr
from model import from_checkpoint

# ---------------------------------------------------------------- settings
mode = 'reconstruct'      # reconstruct | translate | tokens
ckpt = 'out/neuroquant/best.pt'
input = ''                # .nii or .nii.gz; for tokens also .npy
output = ''
source = 'T1w'            # modality of the input
target = 'T2w'            # of translate, and of tokens back to a volume
like = ''                 # scan whose grid a volume from tokens is put on; '' for the box itself, centred at 0 mm
device = ''
dtype = 'float32'         # bfloat16 for autocast

# ---------------------------------------------------------------- one scan

class Scan:
    """A NIfTI file, its box (1,1,D,H,W) in [0,1] for the model, and what it takes to go back."""
    def __init__(self, path, data):
        self.volume, self.affine, self.native = nifti.read(path)
        boxes, self.placement = nifti.conform([self.volume], [self.affine], **data)
        self.box = torch.from_numpy(boxes[0])[None, None]
        if self.placement.lost > 0: print(f'{path}: {self.placement.lost:.1%} of the brain lies outside the box of {data["shape"]} voxels')
        if self.placement.estimated[0]: print(f'{path}: no zero background, taken as a raw head scan')

    def write(self, path, box, own_scale):
        """box (1,1,D,H,W) onto the scan's grid; in the scan's intensities, or in [0,1]."""
        low, high = (self.placement.low[0], self.placement.high[0]) if own_scale else (0.0, 1.0)
        box = box.float().clamp(1e-4, 1).cpu() * (self.box > 0)  # the input's background is known to be empty
        nifti.write(path, nifti.restore(box[0, 0].numpy(), self.placement, self.affine, self.volume.shape, low, high), self.native)

def read_tokens(path, model, shape):
    """(1,d,h,w) int64 from a .npy file; refused if they are not tokens of this model."""
    try: tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e: raise ValueError(f'{path}: not a readable .npy file ({e})')
    books = model.config.num_codebooks
    grid = (books,) * (books > 1) + model.latent_shape(shape)[1:]
    if tokens.dtype.kind not in 'iu' or tokens.shape != grid: raise ValueError(f'{path}: integers of shape {grid} are needed, got {tokens.dtype} {tokens.shape}')
    if tokens.min() < 0 or tokens.max() >= model.config.num_codes:
        raise ValueError(f'{path}: tokens {tokens.min()}..{tokens.max()}, the model has 0..{model.config.num_codes - 1}')
    return torch.from_numpy(tokens.astype(np.int64))[None]

def write_tokens(path, tokens):
    part = f'{path}.part.npy'
    try:
        np.save(part, tokens)
        os.replace(part, path)
    except OSError as e: raise ValueError(f'{path}: cannot write ({e.strerror})')

@torch.no_grad()
def main():
    global device
    _, _, device = start_processes(device)
    if mode not in ('reconstruct', 'translate', 'tokens'): raise SystemExit(f'--mode={mode}: reconstruct, translate or tokens')
    if not input or not output: raise SystemExit('give --input=FILE and --output=FILE')
    back = mode == 'tokens' and input.endswith('.npy')
    wanted = '.npy' if mode == 'tokens' and not back else ('.nii', '.nii.gz')
    if not output.endswith(wanted): raise SystemExit(f'--output={output}: must end in {wanted if isinstance(wanted, str) else " or ".join(wanted)}')
    checkpoint = load_checkpoint(ckpt)
    model, data = from_checkpoint(checkpoint).to(device), checkpoint['data']
    if mode == 'tokens' and not hasattr(model, 'quantizer'): raise SystemExit(f'{ckpt}: this autoencoder has a KL bottleneck, no tokens')
    if mode == 'translate' and not hasattr(model, 'translate'): raise SystemExit(f'{ckpt}: only a NeuroQuant model translates')
    with autocast(device, dtype):
        if back:
            tokens = read_tokens(input, model, data['shape']).to(device)
            volume = model.from_tokens(tokens, target).float().clamp(0, 1)[(..., *(slice(n) for n in data['shape']))]
            if like:
                Scan(like, data).write(output, volume, own_scale=False)
            else:
                affine = np.diag([data['spacing_mm']] * 3 + [1.0])
                affine[:3, 3] = [-(n - 1) / 2 * data['spacing_mm'] for n in data['shape']]
                nifti.write(output, volume[0, 0].cpu().numpy(), nifti.Native(affine, tuple(data['shape']), 'RAS', (data['spacing_mm'],) * 3))
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
            print(f'PSNR {psnr(x_hat, x).item():.2f} dB whole, {psnr(x_hat, x, mask=x > 0).item():.2f} dB brain: {output}')
        else:
            scan.write(output, model.translate(x, source, target), own_scale=False)
            print(f'{source} as {target}, intensities in [0,1]: {output}')

if __name__ == '__main__':
    configure(globals(), sys.argv[1:])
    try: main()
    except ValueError as e: raise SystemExit(str(e.args[0]))
