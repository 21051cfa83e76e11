"""What the judges look at: the runs, and the scans that evaluate.py shows them one after the other."""
import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from data import Sessions
from judge.metrics import code_rows, cross_rows, latent_geometry, summarise_scores

def key_of(row):
    """What a session is known by. A number will not do: runs of other modalities count other sessions."""
    return row['folder'], row['subject'], row.get('session')

@dataclass
class Run:
    """An autoencoder, the sessions it is judged on, and what one pass over them gathers for the judges."""
    path: str             # of the checkpoint
    checkpoint: dict
    model: torch.nn.Module
    sessions: Sessions    # those with a modality it knows; the first n are used
    n: int
    new_modalities: list  # those that no run before it knows
    generated: str        # folder of volumes drawn with it, or ''

    def __post_init__(self):
        folder, file = os.path.split(os.path.abspath(self.path))
        self.name = f'{os.path.basename(folder)}/{file.removesuffix(".pt")}'
        self.modalities = self.sessions.modalities
        self.keys = {key_of(row) for row in self.sessions.rows[:self.n]}
        self.subjects = sorted({subject for _, subject, _ in self.keys})
        self.scores = defaultdict(list)    # modality -> [(subject, scores)]
        self.cross = defaultdict(list)     # (source, target, style) -> the same
        self.moments = 0.0                 # of the latents
        self.sigmas = []                   # mean posterior sd of each scan
        self.codes = defaultdict(int)      # modality -> how often each was used, (codebooks, K)
        self.features = defaultdict(dict)  # (set, modality) -> {plane: moments}, see sets.frechet_rows
        self.anatomy = defaultdict(list)   # modality -> what anatomy.compare_labels says of each scan
        self.latents = []                  # of each scan, a probe.Latent
        self.shown = {}                    # modality -> the scan in the picture and x_hat, each (D,H,W)

@dataclass
class Scan:
    """A scan of the session at hand, and what several runs need of it, made when the first one asks."""
    row: dict                  # of the index
    modality: str
    volume: np.ndarray         # (D,H,W)
    x: torch.Tensor            # the same as (1,1,D,H,W) on the device
    features: dict = None      # see sets.slice_features
    truth: object = None       # its anatomy.Segmentation

def model_row(run, seed):
    """What table.json says of a run; what sets, anatomy and probes say has rows of its own."""
    model, checkpoint, shape = run.model, run.checkpoint, run.sessions.shape
    style = model.style_bits()
    return {
        'name': run.name, 'ckpt': run.path, 'iter': checkpoint['iter_num'],
        'git_commit': checkpoint['git_commit'], 'f': f'{model.factor}x',
        'latent': 'x'.join(map(str, model.latent_shape(shape))),
        'bits': f'{model.bits_per_volume(shape):.0f}' + (f' + {style}' if style else ''),
        'num_codes': getattr(model.config, 'num_codes', None),
        'dft': 'yes' if checkpoint['config'].get('freeze_encoder') else 'no',
        'fidelity': {modality: summarise_scores(run.scores[modality], seed) for modality in run.modalities},
        'geometry': latent_geometry(run.moments.cpu(), np.mean(run.sigmas).item() if run.sigmas else None),
        'codes': code_rows(run.codes, run.modalities),
        'cross': cross_rows(run.cross, seed)}
