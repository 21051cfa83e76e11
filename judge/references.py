"""Reference rows: what scores without any network. They stand under every table of reconstructions."""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft, ndimage
from tqdm import tqdm

from judge.metrics import fidelity, summarise_scores
from judge.runs import chosen

def dct_codec(x, bits):
    """x (D,H,W) after a transform codec that spends at most `bits`.

    It is a DCT of the whole volume, a quantiser with a dead zone, and per frequency band the entropy of its
    own histogram. A real codec of this kind needs more bits, and it draws waves outside the brain.
    """
    c = fft.dctn(x, norm='ortho')
    squares = [(np.arange(n) / n) ** 2 for n in x.shape]
    radius = np.sqrt(sum(np.meshgrid(*squares, indexing='ij')))
    band = np.minimum((radius * 48).astype(np.int64), 63)
    largest = np.abs(c).max()
    step = step_within(bits, partial(code_length, c, band), largest * 1e-6, largest * 1.01)
    symbol = np.trunc(c / step)
    magnitude = (np.abs(symbol) + 0.5) * (symbol != 0)
    return fft.idctn(np.sign(symbol) * magnitude * step, norm='ortho').astype(np.float32)

def step_within(bits, bits_of, fine, coarse):
    """The smallest step between two with at most so many bits; bits_of(step) falls as the step grows."""
    for _ in range(26):
        middle = math.sqrt(fine * coarse)
        if bits_of(middle) <= bits:
            coarse = middle
        else:
            fine = middle
    return coarse

def code_length(c, band, step):
    """Bits for coefficients c in steps of `step`; band: the frequency band 0..63 of each."""
    symbol = np.trunc(c / step).astype(np.int64)
    coded = symbol != 0
    keys, counts = np.unique((band[coded] << 40) + symbol[coded], return_counts=True)
    band_of_key = (keys + (1 << 39)) >> 40
    size = np.bincount(band.ravel(), minlength=64)
    zeros = size - np.bincount(band_of_key, counts, minlength=64)
    return ideal_bits(counts, size[band_of_key]) + ideal_bits(zeros, size)

def ideal_bits(counts, totals):
    """Bits of symbols that occur `counts` times among `totals`."""
    return (counts * np.log2(np.maximum(totals, 1) / np.maximum(counts, 1))).sum()

def sessions_with(sessions, m, n=-1):
    """Which of n chosen sessions (-1: all) of a data.Sessions have modality index m."""
    return [i for i in chosen(sessions.rows, n) if m in sessions.present(i)]

def training_mean(train, m):
    """Mean volume (D,H,W) of modality index m over the training sessions that have it."""
    scans = sessions_with(train, m)
    total = sum(train.volume(i, m).astype(np.float64) for i in tqdm(scans, 'training mean', leave=False))
    return (total / len(scans)).astype(np.float32)

class NearestScan:
    """Finds the training volume of modality index m with the smallest mean squared error to a volume.

    Above about 48 voxels a side, means of blocks are compared: those of the training set fit in memory.
    """
    def __init__(self, train, m):
        self.train, self.m = train, m
        self.block = max(1, max(train.shape) // 48)
        self.scans = sessions_with(train, m)
        progress = tqdm(self.scans, 'nearest scan', leave=False)
        self.library = torch.stack([self.small(train.volume(i, m)) for i in progress])

    def small(self, volume):
        x = torch.tensor(np.asarray(volume, np.float32))[None]
        return F.avg_pool3d(x, self.block)[0].flatten()

    def find(self, volume):
        errors = (self.library - self.small(volume)).square().mean(1)
        return self.train.volume(self.scans[int(errors.argmin())], self.m)

ENTROPY_SD = math.sqrt(2 * math.pi * math.e)  # a Gaussian's entropy is log2 of that times its sd

class PrincipalComponents:
    """Codes volumes of modality index m by coefficients on principal components of the training set.

    A linear code that has seen the same brains: what a network must beat at equal bits. Of at most `most`
    training scans, so that they fit in memory.
    """
    def __init__(self, train, m, most=100):
        scans = sessions_with(train, m)
        seen = chosen([train.rows[i] for i in scans], most)
        volumes = np.stack([train.volume(scans[k], m).ravel() for k in seen]).astype(np.float32)
        self.mean = volumes.mean(0)
        volumes -= self.mean
        energy, vectors = np.linalg.eigh((volumes @ volumes.T).astype(np.float64))
        kept = energy > 1e-6 * energy.max()
        energy, vectors = energy[kept], vectors[:, kept]
        self.basis = (vectors / np.sqrt(energy)).T.astype(np.float32) @ volumes  # (components, voxels)
        self.sd = np.sqrt(energy / len(seen))

    def bits(self, step):
        """Entropy of coefficients rounded to multiples of `step`, as of Gaussians; 0 of those far below."""
        return np.log2(np.maximum(ENTROPY_SD * self.sd / step, 1)).sum()

    def code(self, volume, bits):
        """volume (D,H,W) after coding with at most so many bits, one step for all coefficients.

        One training scan has no components: it is returned itself.
        """
        if not len(self.sd): return self.mean.reshape(volume.shape)
        step = step_within(bits, self.bits, self.sd.max() * 1e-9, self.sd.max() * 10)
        basis = self.basis[ENTROPY_SD * self.sd > step]
        coefficients = np.round(basis @ (volume.ravel() - self.mean) / step) * step
        return (self.mean + coefficients.astype(np.float32) @ basis).reshape(volume.shape)

def reference_rows(test, train, n, rates, lpips, device, seed):
    """Fidelity of every reference on n sessions, see runs.chosen, as rows of table.json.

    test, train: data.Sessions of the same modalities. rates: bits, three rows of codes for each.
    """
    scored, bits_of = {}, {}
    for m, modality in enumerate(test.modalities):
        mean, nearest = training_mean(train, m), NearestScan(train, m)
        components = PrincipalComponents(train, m)
        for i in tqdm(sessions_with(test, m, n), f'references {modality}', leave=False):
            volume = test.volume(i, m)
            predictions = {
                'population mean of the training set': mean,
                'nearest training scan': nearest.find(volume)}
            for bits in rates:
                decoded = dct_codec(volume, bits)
                at_rate = {
                    f'PCA of the training set at {bits:.0f} bits': components.code(volume, bits),
                    f'DCT codec at {bits:.0f} bits': decoded,
                    f'DCT codec at {bits:.0f} bits, given the brain mask': np.where(volume > 0, decoded, 0)}
                predictions |= at_rate
                bits_of |= dict.fromkeys(at_rate, f'{bits:.0f}')
            predictions['blur, sigma 1 voxel (codes nothing)'] = ndimage.gaussian_filter(volume, 1.0)
            for name, prediction in predictions.items():
                x_hat, x = (torch.tensor(v, device=device)[None, None] for v in (prediction, volume))
                pairs = scored.setdefault(name, {known: [] for known in test.modalities})[modality]
                pairs.append((test.rows[i]['subject'], fidelity(x_hat, x, lpips)))
    rows = []
    for name, pairs in scored.items():
        summaries = {modality: summarise_scores(pairs[modality], seed) for modality in test.modalities}
        rows.append({'name': name, 'f': '', 'latent': '', 'bits': bits_of.get(name, ''), 'dft': '',
                     'fidelity': summaries})
    return rows
