"""What the judges look at: the runs, and the scans that evaluate.py shows them one after the other."""
import hashlib
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

# ---------------------------------------------------------------- which sessions, which names

def chosen(rows, count):
    """Sorted positions of `count` of the rows of an index (-1: all), chosen by a hash of session and subject.

    Not the first rows: where data_dir names several folders, they are of one. Not positions drawn at random:
    a run of other modalities has other rows, and would get other sessions.
    """
    if not 0 <= count < len(rows): return list(range(len(rows)))
    marks = []
    for row in rows:
        name = f"{row.get('session')} {row['subject']}"
        marks.append(hashlib.sha256(name.encode()).digest())
    by_mark = sorted(range(len(rows)), key=marks.__getitem__)
    return sorted(by_mark[:count])

def run_names(paths):
    """What the tables call checkpoints: folder and file, and as many folders above as tell them apart."""
    parts = [os.path.abspath(path).removesuffix('.pt').split(os.sep) for path in paths]
    names = []
    for own in parts:
        depth = 2
        while any(other != own and other[-depth:] == own[-depth:] for other in parts):
            depth += 1
        names.append('/'.join(own[-depth:]))
    return names

def other_data(path, checkpoint, data_dir, box, voxel_mm):
    """A line for each setting of the data, but their shape, that is not what the checkpoint has learned.

    box, voxel_mm: of data_dir, see data.box_of. Voxels count as others from 1 % on: of stretched scans they
    are a median.
    """
    learned = checkpoint['data'] | {'voxel_mm': checkpoint['voxel_mm']}
    judged = box | {'voxel_mm': voxel_mm}
    different = []
    for key in learned:
        tolerance = 0.01 if key == 'voxel_mm' else 1e-6
        if key in judged and not alike(learned[key], judged[key], tolerance):
            different.append(key)
    notes = []
    for key in different:
        if key == 'shape' or (key == 'voxel_mm' and 'spacing_mm' in different): continue
        notes.append(f'note: {path} learned {key} {rounded(learned[key])}, '
                     f'{data_dir} has {rounded(judged[key])}')
    return notes

def alike(a, b, tolerance):
    """Whether two settings are the same, numbers within a relative tolerance."""
    if isinstance(a, (str, bool)) or isinstance(b, (str, bool)): return a == b
    return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=tolerance, atol=0)

def rounded(value):
    """A setting as it is printed, with three decimals."""
    return value if isinstance(value, (str, bool)) else np.round(value, 3).tolist()

# ---------------------------------------------------------------- what the judges look at

@dataclass
class Run:
    """An autoencoder, the sessions it is judged on, and what one pass over them gathers for the judges."""
    path: str             # of the checkpoint
    name: str             # see run_names
    checkpoint: dict
    model: torch.nn.Module
    sessions: Sessions    # those with a modality it knows
    n: int                # how many of them are used
    new_modalities: list  # those that no run before it knows
    generated: str        # folder of volumes drawn with it, or ''

    def __post_init__(self):
        self.modalities = self.sessions.modalities
        self.notes = other_data(self.path, self.checkpoint, self.sessions.data_dir, self.sessions.box,
                                self.sessions.voxel_mm)
        rows = self.sessions.rows
        self.used = chosen(rows, self.n)   # positions in sessions.rows
        self.keys = {key_of(rows[i]) for i in self.used}
        self.drawn_keys = {key_of(rows[i]) for i in chosen(rows, min(self.n, 20))}  # those in tsne.png
        self.subjects = sorted({subject for _, subject, _ in self.keys})
        self.scanned = defaultdict(list)   # modality -> key_of the session of each of its scans
        self.scores = defaultdict(list)    # modality -> [(subject, scores)] of these scans
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

def weights_hash(model):
    """16 hex digits that name a model's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

def model_row(run, seed):
    """What table.json says of a run; what sets, anatomy and probes say has rows of its own."""
    model, checkpoint, shape = run.model, run.checkpoint, run.sessions.shape
    style = model.style_bits()
    return {
        'name': run.name, 'ckpt': run.path, 'iter': checkpoint['iter_num'],
        'git_commit': checkpoint['git_commit'], 'weights': weights_hash(model), 'f': f'{model.factor}x',
        'latent': 'x'.join(map(str, model.latent_shape(shape))),
        'bits': f'{model.bits_per_volume(shape):.0f}' + (f' + {style}' if style else ''),
        'num_codes': getattr(model.config, 'num_codes', None),
        'dft': 'yes' if checkpoint['config'].get('freeze_encoder') else 'no',
        'fidelity': {modality: summarise_scores(run.scores[modality], seed) for modality in run.modalities},
        'geometry': latent_geometry(run.moments.cpu(), np.mean(run.sigmas).item() if run.sigmas else None),
        'codes': code_rows(run.codes, run.modalities),
        'cross': cross_rows(run.cross, seed)}

def difference(a, b):
    """a - b, 0 where both are infinite."""
    return a - b if a != b else 0.0

def compared_row(run, first, seed):
    """How a run's scores differ from the first run's, scan by scan of those that both have seen."""
    differences = {}
    for modality in run.modalities:
        firsts = dict(zip(first.scanned[modality], first.scores[modality]))
        scored = []
        for key, (subject, scores) in zip(run.scanned[modality], run.scores[modality]):
            if key in firsts:
                _, others = firsts[key]
                change = {metric: difference(value, others[metric]) for metric, value in scores.items()}
                scored.append((subject, change))
        if scored:
            differences[modality] = summarise_scores(scored, seed)
    return {'name': run.name, 'than': first.name, 'fidelity': differences}
