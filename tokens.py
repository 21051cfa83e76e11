"""Scans as tokens: batches of them, their bits without a network, drawing by a GPT, and files of them."""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from common import autocast, write_text
from data import random
from latents import Latents
from scans import nifti

class Tokens(Latents):
    """The scans of one split as sequences of tokens (N,), codebook by codebook, each in raster order.

    quantizer: of the autoencoder whose latents these are. The others: as Latents'. grid: (d,h,w).
    tokens: (n, N) int64 on the CPU.
    """
    def __init__(self, quantizer, device, *args):
        super().__init__(*args)
        self.grid = self.shape[1:]
        rows = []
        for k in range(self.n):
            z = torch.from_numpy(self.load(k)[0]).to(device)
            rows.append(quantizer.nearest_indices(z[None]).flatten().cpu())
        self.tokens = torch.stack(rows)

    def batch(self, step, batch_size, p_drop=0.0):
        """A dict: tokens (B, N), cond, files, and sample_index (B,). batch_size, p_drop: as Latents.batch."""
        sample_index, chosen, dropped = self.choose(step, batch_size, p_drop)
        return {
            'tokens': self.tokens[chosen],
            'cond': self.cond(chosen, dropped),
            'sample_index': sample_index,
            'files': [self.file(k) for k in chosen],
        }

def mean_nats(gpt, tokens, cond, device, dtype):
    """Cross-entropy of a batch of tokens (B, N), mean over tokens. dtype: of autocast."""
    tokens = tokens.to(device)
    cond = tree_map_only(torch.Tensor, lambda x: x.to(device), cond)
    with autocast(device, dtype):
        logits = gpt(tokens[:, :-1], cond)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

@torch.no_grad()
def scan_bits(gpt, scans, numbers, device, dtype):
    """Bits per token that a GPT needs for each of some scans of Tokens."""
    bits = []
    for k in numbers:
        nats = mean_nats(gpt, scans.tokens[[k]], scans.cond([k]), device, dtype)
        bits.append(nats.item() / math.log(2))
    return bits

def baseline_bits(train, held_out, num_codes):
    """{name: bits per token of each scan} of held_out (n, N), by frequencies in train (m, N), of K codes.

    uniform: log2 K. unigram: each code is counted once more than it was seen. position: counts at each place
    alone, and the unigram with the weight of as many counts as the place has codes (Witten and Bell 1991).
    """
    n, length = train.shape
    unigram = torch.bincount(train.flatten(), minlength=num_codes).double() + 1
    unigram /= unigram.sum()
    counts = torch.zeros(length, num_codes, dtype=torch.float64)
    counts.scatter_add_(1, train.T, torch.ones(length, n, dtype=torch.float64))
    added = (counts > 0).sum(1, keepdim=True)
    position = (counts + added * unigram) / (n + added)
    return {
        'uniform': [math.log2(num_codes)] * len(held_out),
        'unigram': (-unigram[held_out].log2().mean(1)).tolist(),
        'position': (-position.gather(1, held_out.T).log2().mean(0)).tolist(),
    }

# ---------------------------------------------------------------- sampling

AT_ONCE = 8  # brains; always as many, since other numbers of rows change the last bits

def draw_brains(gpt, n, seed, device, **how):
    """Yield tokens (1, N) of n new brains. Brain i of a seed is the same for any n. how: see draw_tokens."""
    for first in range(0, n, AT_ONCE):
        chances = [random(seed, 7, i).random(gpt.length) for i in range(first, first + AT_ONCE)]
        tokens = draw_tokens(gpt, torch.from_numpy(np.stack(chances)).to(device), **how)
        yield from tokens[:n - first].split(1)

@torch.no_grad()
def draw_tokens(gpt, chances, cond=None, kept=None, temperature=1.0, top_k=0, guidance=1.0):
    """Tokens (B, N): each is where its chance (B, N), in [0, 1), meets the cumulated probabilities.

    cond: of each row, or one for all. kept: (N,) tokens that are given, -1 where one shall be drawn.
    top_k: only of the likeliest codes, 0 of all. guidance g: logits without conditions + g (with - without).
    """
    guided = cond is not None and guidance != 1.0
    cache = gpt.new_cache(len(chances))
    cache_without = gpt.new_cache(len(chances)) if guided else None
    tokens = torch.empty(len(chances), 0, dtype=torch.int64, device=chances.device)
    for i in range(gpt.length):
        logits = gpt(tokens[:, -1:], cond, cache, i)[:, -1].double()
        if guided:
            without = gpt(tokens[:, -1:], None, cache_without, i)[:, -1].double()
            logits = without + guidance * (logits - without)
        new = choose_tokens(logits / temperature, chances[:, i:i + 1], top_k)
        if kept is not None and kept[i] >= 0:
            new = torch.full_like(new, kept[i])
        tokens = torch.cat([tokens, new], 1)
    return tokens

def choose_tokens(logits, chance, top_k=0):
    """One token a row: logits (B, K), chance (B, 1) in [0, 1) -> (B, 1)."""
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    cumulated = logits.softmax(1).cumsum(1)
    return torch.searchsorted(cumulated, chance * cumulated[:, -1:], right=True)

# ---------------------------------------------------------------- tokens as files

def save_codes(path, array):
    """Tokens or a latent as .npy; ValueError with one line if it cannot be written."""
    try:
        nifti.save_npy(path, array)
    except OSError as e:
        raise ValueError(f'{path}: cannot write ({e.strerror or e})')

def save_tokens(path, indices, modality, made_by):
    """Tokens as .npy, and beside them a .json that says whose they are, for the way back."""
    save_codes(path, indices)
    about = {'modality': modality, 'encoder_hash': made_by}
    write_text(about_tokens(path), json.dumps(about) + '\n')

def about_tokens(path):
    """The file beside tokens that says which modality and encoder they come from."""
    return path.removesuffix('.npy') + '.json'

def own_modality(path, made_by):
    """The modality of the scan behind a file of tokens; '' if nothing beside it says so.

    made_by: encoder_hash of the model; ValueError if another encoder made them.
    """
    try:
        with open(about_tokens(path)) as f:
            about = json.load(f)
        encoder, modality = about['encoder_hash'], about['modality']
    except FileNotFoundError:
        return ''
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{about_tokens(path)}: unreadable ({e}); delete it and give --target')
    if encoder != made_by:
        raise ValueError(f'{path}: tokens of another encoder ({encoder}) than this model ({made_by})')
    return modality

def read_tokens(model, shape, path):
    """A file as (1,d,h,w) int64; ValueError if it holds no tokens of this model for a volume (D,H,W)."""
    try:
        indices = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as e:
        raise ValueError(f'{path}: not a readable .npy file ({e})')
    c = model.config
    grid = model.latent_shape(shape)[1:]
    if c.num_codebooks > 1:
        grid = (c.num_codebooks, *grid)
    if indices.dtype.kind not in 'iu' or indices.shape != grid:
        raise ValueError(f'{path}: integers of shape {grid} are needed, got {indices.dtype} {indices.shape}')
    low, high = indices.min(), indices.max()
    if low < 0 or high >= c.num_codes:
        raise ValueError(f'{path}: tokens {low}..{high}, the model has 0..{c.num_codes - 1}')
    return torch.from_numpy(indices.astype(np.int64))[None]
