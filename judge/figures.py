"""Pictures, each one PNG. Where matplotlib is not installed, nothing is drawn and one line says so.

Volumes are arrays (D,H,W) in [0,1] with axes (left-right, posterior-anterior, inferior-superior).
"""
import os
from functools import lru_cache

import numpy as np

from common import print0

GREY = dict(origin='lower', cmap='gray', vmin=0, vmax=1)

@lru_cache
def pyplot():
    """matplotlib's pyplot, drawing to files alone; None, with one line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return print0('no picture: pip install matplotlib to get one')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt

def finish(plt, fig, path, quiet=False, fitted=True):
    """Write whole or not at all, and say so. fitted: measure all text to make room for it."""
    if fitted:
        fig.tight_layout()
    fig.savefig(f'{path}.part', dpi=110, format='png')
    os.replace(f'{path}.part', path)
    plt.close(fig)
    if not quiet:
        print(f'picture: {path}')

def bare(ax):
    """Axes without ticks and frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_frame_on(False)

def views(path, blocks, title='', quiet=False):
    """Volumes side by side in three planes.

    blocks: lists of (heading, volume); each list is three rows of the picture.
    """
    plt = pyplot() if blocks else None
    if not plt: return
    width, height = max(map(len, blocks)), 3 * len(blocks)
    size = (2.1 * width, 2.1 * height + 0.4)
    fig, axes = plt.subplots(height, width, figsize=size, squeeze=False)
    for ax in axes.flat:
        bare(ax)
    for ax, plane in zip(axes[:, 0], len(blocks) * ('sagittal', 'coronal', 'axial')):
        ax.set_ylabel(plane, fontsize=9)
    for b, block in enumerate(blocks):
        for column, (heading, volume) in enumerate(block):
            axes[3 * b, column].set_title(heading, fontsize=9)
            for axis in range(3):
                middle = volume.shape[axis] // 2
                if axis == 0:
                    middle += volume.shape[0] // 10  # beside the midline, where there is tissue
                axes[3 * b + axis, column].imshow(np.take(volume, middle, axis).T, **GREY)
    if title:
        fig.suptitle(title, fontsize=10)
    finish(plt, fig, path, quiet)

def run_so_far(out_dir, records, shown, it):
    """Draw curves.png and progress.png at iteration `it`. records: see curves(); shown: see progress()."""
    curves(os.path.join(out_dir, 'curves.png'), records)
    progress(os.path.join(out_dir, 'progress.png'), shown, f'{out_dir}, iteration {it:,}')

def progress(path, shown, title):
    """A scan, its reconstruction and the error in three planes, while a model learns.

    shown: (name, volume, reconstruction)
    """
    name, x, x_hat = shown
    block = [(name, x), ('reconstruction', x_hat), ('absolute error', np.abs(x - x_hat))]
    views(path, [block], title, quiet=True)

def curves(path, records):
    """What a run's log says over its iterations, a panel for each quantity.

    records: dicts with 'iter' and numbers, as log.jsonl has them.
    """
    names = dict.fromkeys(key for record in records for key in record)  # in the order of the log
    names = [name for name in names if name == 'lr' or name.startswith(('train/', 'val/'))]
    names = [name for name in names if not name.endswith(('n_sessions', 'background'))]
    plt = pyplot() if names else None
    if not plt: return
    height = -(-len(names) // 4)
    inches = 2.4 * height
    room = dict(left=0.04, right=0.99, bottom=0.4 / inches, top=1 - 0.4 / inches, wspace=0.25, hspace=0.4)
    fig, axes = plt.subplots(height, 4, figsize=(13, inches), squeeze=False, gridspec_kw=room)
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names):
        points = [(record['iter'], record[name]) for record in records if record.get(name) is not None]
        ax.plot(*zip(*points), '.-' if len(points) < 50 else '-', linewidth=1)
        ax.set_title(name, fontsize=9)
        ax.tick_params(which='both', labelsize=7)
        if name.startswith('train/') and min(value for _, value in points) > 0:
            ax.set_yscale('log')
            ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:.3g}')  # powers of ten as mathematics are slow to draw
            ax.minorticks_off()
    finish(plt, fig, path, quiet=True, fitted=False)  # drawn at every validation

def reconstruction_views(runs):
    """Blocks for views() of runs' scans in the picture: one run beside its errors, several side by side."""
    blocks = []
    for modality, (x, _) in runs[0].shown.items():
        block = [(f'{modality} input', x)]
        for run in runs:
            if modality not in run.shown: continue
            x_hat = run.shown[modality][1]
            block.append((f'{modality} {run.name}', x_hat))
            if len(runs) == 1:
                block.append((f'{modality} absolute error', np.abs(x - x_hat)))
        blocks.append(block)
    return blocks if len(runs) > 1 or not blocks else [sum(blocks, [])]

def three_planes(volume):
    """The middle slices of a volume below one another as one image: sagittal, coronal, axial."""
    slices = [np.take(volume, n // 2, axis).T for axis, n in enumerate(volume.shape)]
    width = max(image.shape[1] for image in slices)
    padded = []
    for image in reversed(slices):  # an image's first row is drawn at the bottom
        left = (width - image.shape[1]) // 2
        padded.append(np.pad(image, ((0, 0), (left, width - image.shape[1] - left))))
    return np.concatenate(padded).astype(np.float32)

def contact_sheet(path, volumes, width=12):
    """Middle slices of many volumes in three planes. volumes: [(heading, volume)]."""
    plt = pyplot()
    if not plt or not volumes: return
    height = -(-len(volumes) // width)
    fig, axes = plt.subplots(height, width, figsize=(1.1 * width, 3.6 * height + 0.2), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (heading, volume) in zip(axes.flat, volumes):
        ax.imshow(three_planes(volume), **GREY)
        ax.set_title(heading, fontsize=5)
    finish(plt, fig, path)

def geometry(path, rows):
    """|cosine| of channels, raw and centred, and explained variance, DeCo fig. 2 and 3.

    rows: {name: metrics.latent_geometry}; those of more than 16 channels are left out.
    """
    plt = pyplot()
    rows = {name: g for name, g in rows.items() if g['matrix_raw']}
    if not plt or not rows: return
    fig, axes = plt.subplots(3, len(rows), figsize=(2.4 * len(rows) + 0.6, 7), squeeze=False)
    for column, (name, g) in zip(axes.T, rows.items()):
        matrix(column[0], g['matrix_raw'], f'{name}\n|cosine|, raw')
        matrix(column[1], g['matrix_centred'], f'{name}\n|cosine|, centred')
        column[2].bar(range(1, g['channels'] + 1), [100 * v for v in g['explained_variance']])
        column[2].set_ylim(0, 100)
        column[2].set_title(f"explained variance, %\neffective rank {g['effective_rank']:.2f}", fontsize=8)
    finish(plt, fig, path)

def matrix(ax, values, title):
    """A matrix of values in [0,1] as colours, with its numbers."""
    ax.imshow(values, cmap='viridis', vmin=0, vmax=1)
    for i, line in enumerate(values):
        for j, v in enumerate(line):
            colour = 'black' if v > 0.6 else 'white'
            ax.text(j, i, f'{v:.2f}'.lstrip('0'), ha='center', va='center', fontsize=7, color=colour)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=8)

def embedding(path, panels):
    """Points of t-SNE, brain and background marked, DeCo fig. 1b.

    panels: {name: (points (N,2), brain (N,) bool)}.
    """
    plt = pyplot() if panels else None
    if not plt: return
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.8), squeeze=False)
    for ax, (name, (points, brain)) in zip(axes[0], panels.items()):
        ax.scatter(*points[~brain].T, s=2, c='0.7', label='background')
        ax.scatter(*points[brain].T, s=2, c='tab:red', label='brain')
        ax.set_title(name, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.legend(fontsize=7, markerscale=4)
    finish(plt, fig, path)

def boxes(path, panels, unit):
    """Box plots. panels: {title: [(label, values), ...]}."""
    plt = pyplot() if panels else None
    if not plt: return
    fig, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for ax, (title, groups) in zip(axes[0], panels.items()):
        ax.boxplot([values for _, values in groups])
        ax.set_xticks(range(1, len(groups) + 1), [label for label, _ in groups], fontsize=7)
        ax.set_title(title, fontsize=9)
        ax.set_ylabel(unit, fontsize=8)
    finish(plt, fig, path)
