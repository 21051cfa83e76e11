"""Pictures, each one PNG; nothing is drawn, with one line, where matplotlib is not installed.

Volumes are arrays (D,H,W) in [0,1], axes (left-right, posterior-anterior, inferior-superior), shown in grey from 0 to 1.
"""
import os

import numpy as np

from common import print0

def pyplot():
    """matplotlib's pyplot, drawing to files alone; None, with one line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return print0('no picture: pip install matplotlib to get one')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt

def finish(plt, fig, path):
    """Write whole or not at all."""
    fig.tight_layout()
    fig.savefig(f'{path}.part', dpi=110, format='png')
    os.replace(f'{path}.part', path)
    plt.close(fig)
    print(f'picture: {path}')

def views(path, blocks, title=''):
    """Volumes side by side in three planes. blocks: lists of (heading, volume), each list three rows of the picture."""
    plt = pyplot()
    if not plt: return
    width = max(len(block) for block in blocks)
    fig, axes = plt.subplots(
        3 * len(blocks), width, figsize=(2.1 * width, 2.1 * 3 * len(blocks) + 0.4), squeeze=False
    )
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([]), ax.set_frame_on(False)
    for ax, plane in zip(axes[:, 0], len(blocks) * ('sagittal', 'coronal', 'axial')):
        ax.set_ylabel(plane, fontsize=9)
    for rows, block in zip(axes.reshape(len(blocks), 3, width), blocks):
        for column, (heading, volume) in zip(rows.T, block):
            for axis, ax in enumerate(column):
                # beside the midline, where there is tissue
                place = volume.shape[axis] // 2 + (volume.shape[axis] // 10 if axis == 0 else 0)
                ax.imshow(np.take(volume, place, axis).T, origin='lower', cmap='gray', vmin=0, vmax=1)
            column[0].set_title(heading, fontsize=9)
    if title:
        fig.suptitle(title, fontsize=10)
    finish(plt, fig, path)

def contact_sheet(path, volumes, width=12):
    """Middle axial slices of many volumes. volumes: [(heading, volume)]."""
    plt = pyplot()
    if not plt or not volumes: return
    height = -(-len(volumes) // width)
    fig, axes = plt.subplots(height, width, figsize=(1.1 * width, 1.5 * height + 0.2), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (heading, volume) in zip(axes.flat, volumes):
        ax.imshow(
            volume[:, :, volume.shape[2] // 2].T.astype(np.float32),
            origin='lower',
            cmap='gray',
            vmin=0,
            vmax=1,
        )
        ax.set_title(heading, fontsize=5)
    finish(plt, fig, path)

def geometry(path, rows):
    """|cosine| of channels raw and centred, and explained variance, DeCo fig. 2 and 3. rows: {name: metrics.latent_geometry}, up to 16 channels."""
    rows, plt = {name: g for name, g in rows.items() if g['matrix_raw']}, pyplot()
    if not plt or not rows: return
    fig, axes = plt.subplots(3, len(rows), figsize=(2.4 * len(rows) + 0.6, 7), squeeze=False)
    for column, (name, g) in zip(axes.T, rows.items()):
        for ax, key, title in zip(
            column, ('matrix_raw', 'matrix_centred'), ('|cosine|, raw', '|cosine|, centred')
        ):
            ax.imshow(g[key], cmap='viridis', vmin=0, vmax=1)
            for i, line in enumerate(g[key]):
                for j, v in enumerate(line):
                    ax.text(
                        j,
                        i,
                        f'{v:.2f}'.lstrip('0'),
                        ha='center',
                        va='center',
                        fontsize=7,
                        color='black' if v > 0.6 else 'white',
                    )
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_title(f'{name}\n{title}', fontsize=8)
        column[2].bar(range(1, g['channels'] + 1), [100 * v for v in g['explained_variance']])
        column[2].set_ylim(0, 100)
        column[2].set_title(f"explained variance, %\neffective rank {g['effective_rank']:.2f}", fontsize=8)
    finish(plt, fig, path)

def embedding(path, panels):
    """Points of t-SNE, brain and background marked, DeCo fig. 1b. panels: {name: (points (N,2), brain (N,) bool)}."""
    plt = pyplot()
    if not plt: return
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.8), squeeze=False)
    for ax, (name, (y, brain)) in zip(axes[0], panels.items()):
        for at, colour, word in ((~brain, '0.7', 'background'), (brain, 'tab:red', 'brain')):
            ax.scatter(y[at, 0], y[at, 1], s=2, c=colour, label=word)
        ax.set_title(name, fontsize=9), ax.set_xticks([]), ax.set_yticks([])
        ax.legend(fontsize=7, markerscale=4)
    finish(plt, fig, path)

def boxes(path, panels, unit):
    """Box plots. panels: {title: [(label, values), ...]}."""
    plt = pyplot()
    if not plt: return
    fig, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for ax, (title, found) in zip(axes[0], panels.items()):
        ax.boxplot([values for _, values in found])
        ax.set_xticks(range(1, len(found) + 1), [label for label, _ in found], fontsize=7)
        ax.set_title(title, fontsize=9)
        ax.set_ylabel(unit, fontsize=8)
    finish(plt, fig, path)
