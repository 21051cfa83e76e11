"""A small segmenter that learns from label maps: evaluate.py --segmenter=learn.

It stands in for SynthSeg on phantoms and on images of label maps. It knows what its label maps show and
nothing else: its Dice on held-out ones is printed beside what it measures.
"""
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

from common import load_checkpoint, save_checkpoint
from data import Sessions, box_at, has_split, random, to_device
from judge.anatomy import Segmentation
from judge.metrics import dice
from layers import Conv, ResConv, double, halve
from optim import cosine, make_optimizers, take_step
from resume import fingerprint
from synth import TISSUE, redraw

PATCH = (48, 48, 48)  # that it learns from: whole volumes would take hours on a CPU

def padded(shape):
    """The size of a volume in multiples of 4."""
    return [n + -n % 4 for n in shape]

def places(shape, device):
    """Coordinates of a volume's voxels, from -1 to 1: (3, D, H, W), D, H and W padded."""
    axes = [torch.linspace(-1, 1, n, device=device) for n in padded(shape)]
    return torch.stack(torch.meshgrid(*axes, indexing='ij'))

def cut(volumes, starts, size):
    """The patch of each of volumes (B, ., D, H, W) that begins at its start."""
    return torch.stack([volume[:, *box_at(start, size)] for volume, start in zip(volumes, starts)])

class SmallUNet(nn.Module):
    """An image and its voxels' coordinates -> logits of labels: (B,1,D,H,W) -> (B,labels,D,H,W).

    Three levels. where (B,3,.,.,.): see places, cut to a patch of padded size; None for whole volumes. By it
    the network tells left from right.
    """
    def __init__(self, labels, widths=(16, 32, 64)):
        super().__init__()
        self.stem = Conv(4, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ResConv(width) for width in widths)
        pairs = list(zip(widths, widths[1:]))
        self.wider = nn.ModuleList(Conv(narrow, wide, 1) for narrow, wide in pairs)
        self.narrower = nn.ModuleList(Conv(wide, narrow, 1) for narrow, wide in pairs)
        self.up = nn.ModuleList(ResConv(width) for width in widths[:-1])
        self.head = Conv(widths[0], labels, 1)

    def forward(self, x, where=None):
        D, H, W = x.shape[2:]
        if where is None:
            where = places((D, H, W), x.device).expand(len(x), -1, -1, -1, -1)
        x = F.pad(x, [n for size in (W, H, D) for n in (0, -size % 4)])
        h = self.stem(torch.cat([x, where], 1))
        skips = []
        for block, wider in zip(self.down, self.wider):
            skips.append(block(h))                    # (B, widths[i], D/2^i, H/2^i, W/2^i)
            h = wider(halve(skips[-1]))
        h = self.down[-1](h)
        for block, narrower in reversed(list(zip(self.up, self.narrower))):
            h = block(double(narrower(h)) + skips.pop())
        return self.head(F.silu(h))[:, :, :D, :H, :W]  # (B, labels, D, H, W)

class SmallSegmenter:
    """Volume (D,H,W), spacing in mm -> Segmentation. labels: FreeSurfer's number of each of its classes."""
    def __init__(self, network, labels, about, device):
        self.network, self.labels, self.about, self.device = network.to(device).eval(), labels, about, device

    @torch.no_grad()
    def __call__(self, volume, spacing_mm):
        x = torch.tensor(np.asarray(volume, np.float32), device=self.device)[None, None]
        p = self.network(x)[0].softmax(0).cpu().numpy()
        voxel_mm3 = np.prod(np.broadcast_to(spacing_mm, 3))
        chosen = np.array(self.labels, np.int16)[p.argmax(0)]
        return Segmentation(chosen, dict(zip(self.labels, voxel_mm3 * p.sum((1, 2, 3), np.float64))))

def blurred(x, rng):
    """A batch as a decoder may give it back: some of it blurred by up to 1.2 voxels, some noisy."""
    rows = []
    for image in x[:, None]:
        if rng.random() < 0.5:
            sigma = rng.uniform(0.4, 1.2)
            kernel = torch.exp(-0.5 * (torch.arange(-3, 4, device=x.device) / sigma).square())
            kernel /= kernel.sum()
            for axis in range(3):
                shape = [1] * 5
                shape[2 + axis] = 7
                padding = [3 * (axis == k) for k in (2, 2, 1, 1, 0, 0)]  # F.pad begins with the last axis
                image = F.conv3d(F.pad(image, padding, mode='replicate'), kernel.view(shape))
        if rng.random() < 0.5:
            image = image + rng.uniform(0, 0.05) * torch.randn_like(image)
        rows.append(image)
    return torch.cat(rows).clamp(0, 1)

def loss_of(logits, truth):
    """Cross-entropy and one minus the mean soft Dice of the classes that are there; truth (B,D,H,W) int64."""
    p = logits.softmax(1)
    wanted = F.one_hot(truth, logits.shape[1]).movedim(-1, 1).to(p.dtype)
    both = (p * wanted).sum((0, 2, 3, 4))
    sizes = (p + wanted).sum((0, 2, 3, 4))
    there = wanted.sum((0, 2, 3, 4)) > 0
    return F.cross_entropy(logits, truth) + 1 - (2 * both / sizes)[there].mean()

def learn(data_dir, modalities, path, device, steps=600, batch_size=2, lr=1e-2, seed=0):
    """Train a SmallSegmenter on the training split of prepared data with label maps; write it to `path`.

    It sees patches. Half of the images are drawn anew from their maps, if all modalities can be, and half of
    all are blurred. SystemExit with one line if the data have no label maps.
    """
    train = Sessions(data_dir, modalities, 'train', seed=seed, brain_patches=0.9)
    size = train.patch_size(PATCH)
    everywhere = places(train.shape, device).expand(batch_size, -1, -1, -1, -1)
    looked_at = random(seed, 13).permutation(train.n)[:50]
    labels = sorted(set().union(*[np.unique(train.labels(i)).tolist() for i in looked_at]))
    class_of = torch.zeros(2 ** 15, dtype=torch.int64, device=device)  # others count as background
    class_of[labels] = torch.arange(len(labels), device=device)
    share = 0.5 if all(m in TISSUE for m in modalities) else 0.0
    torch.manual_seed(seed)
    network = SmallUNet(len(labels)).to(device)
    weights = list(network.parameters())
    optimizers = make_optimizers(weights, True, lr, (0.9, 0.99), 1e-8, 0.01)
    for step in trange(steps, desc='segmenter', leave=False):
        batch = to_device(train.scan_batch(step, batch_size, PATCH, labels=True), device)
        x = blurred(redraw(batch, modalities, share, seed, train.box), random(seed, 12, step))
        truth = class_of[cut(batch['labels'], batch['starts'], size)[:, 0].long()]
        loss = loss_of(network(x, cut(everywhere, batch['starts'], padded(size))), truth)
        loss.backward()
        take_step(optimizers, weights, cosine(step, lr, 1e-5, 20, steps), 0)
    segmenter = SmallSegmenter(network, labels, '', device)
    about = f'small segmenter of {train.n} label maps'
    if has_split(data_dir, modalities, 'val'):
        score, n = held_out_dice(segmenter, Sessions(data_dir, modalities, 'val'))
        about += f', mean Dice x 100 of {n} held-out images {100 * score:.1f}'
    save_checkpoint(path, {'model': network.state_dict(), 'model_args': {'kind': 'segmenter'},
                           'labels': labels, 'about': about, 'of': learned_from(data_dir, modalities)})

def held_out_dice(segmenter, sessions, count=20):
    """Mean Dice over labels and `count` stored images drawn from all, and how many those are."""
    scores = []
    for k in random(0, 13).permutation(len(sessions.scans))[:count]:
        i, m = sessions.scans[k]
        truth = sessions.labels(i)
        there = [label for label in np.unique(truth) if label]
        found = segmenter(sessions.volume(i, m), sessions.rows[i]['voxel_mm']).labels
        scores.append(np.nanmean(list(dice(found, truth, there).values())))
    return float(np.mean(scores)), len(scores)

def load_small(path, device):
    """The SmallSegmenter that learn() wrote."""
    checkpoint = load_checkpoint(path)
    if checkpoint['model_args'].get('kind') != 'segmenter':
        raise SystemExit(f'--segmenter={path}: not a segmenter; --segmenter=learn makes one')
    network = SmallUNet(len(checkpoint['labels']))
    network.load_state_dict(checkpoint['model'])
    return SmallSegmenter(network, checkpoint['labels'], checkpoint['about'], device)

def learned_from(data_dir, modalities):
    """What a segmenter is known by: the data set and the modalities it has seen, and how much at once."""
    return {'modalities': tuple(modalities), 'fingerprint': fingerprint(data_dir), 'patch': PATCH}

def learn_once(data_dir, modalities, path, device):
    """Path of the segmenter of these data and modalities, learned now unless it is there."""
    wanted = learned_from(data_dir, modalities)
    if not os.path.exists(path) or load_checkpoint(path).get('of') != wanted:
        learn(data_dir, modalities, path, device)
    return path
