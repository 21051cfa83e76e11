"""What evaluate.py measured, as markdown. report(results) takes what table.json holds; nothing is computed here but means for display."""
import numpy as np

from common import markdown_table

DEFINITIONS = """\
PSNR: dB, data range 1, prediction clamped to [0,1]. SSIM: 3D, Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, valid region, times 100.
SSIM uniform: scikit-image's default, a uniform window of 7 with sample covariance, as DeCo-VAE; times 100. LPIPS: over all slices, [0,1]
as is; brain: 0 outside it in both.
whole: every voxel of the box. brain: voxels where the input is above 0 (SSIM: windows centred there).
Mean +- standard deviation over subjects, the sessions of a subject averaged first.
DFT: decoder fine-tuned on a frozen encoder. cos_raw: mean absolute cosine of channel pairs, means included; pearson_abs: the same of
centred channels. Effective rank: exp of the entropy of the explained variance, whose covariance is that of pearson_abs."""

METRICS = {
    'psnr_whole': 'PSNR',
    'ssim_whole': 'SSIM',
    'psnr_brain': 'PSNR brain',
    'ssim_brain': 'SSIM brain',
    'ssim_uniform_whole': 'SSIM uniform',
}
SHOWN = ('cerebellum cortex', 'caudate')  # the structures whose volumes NeuroQuant fig. 4 shows

def report(results):
    """Every table of a call of evaluate.py as text."""
    settings, lines = results['settings'], fidelity_tables(results) + latent_tables(results) + [
        '',
        DEFINITIONS,
    ]
    if 'frechet' in results:
        lines += frechet_table(results['frechet_features'], results['frechet'], settings['fid_slices'])
    if 'diversity' in results:
        lines += diversity_table(results['diversity'])
    if 'anatomy' in results:
        lines += anatomy_table(results['anatomy'], settings['labels'])
    else:
        lines += [
            '',
            (
                'Dice, region volumes: not computed; give --segmenter=synthseg_2.0.h5'
                ' (github.com/BBillot/SynthSeg), or a command with {in} and {out}'
            ),
        ]
    if 'probes' in results:
        lines += probe_table(results['probes'], settings['probe_epochs'] if settings['probe_networks'] else 0)
    return '\n'.join(lines) + '\n'

# ---------------------------------------------------------------- cells

def digits_of(summary):
    """Four for distances, which are far below 1."""
    return 2 if abs(summary['mean']) >= 1 else 4

def mean_sd(summary):
    if not summary: return ''
    digits = digits_of(summary)
    return f"{summary['mean']:.{digits}f} +- {summary['sd']:.{digits}f}"

def interval(summary):
    """The 95 % interval of the mean."""
    if not summary: return ''
    digits = digits_of(summary)
    return f"{summary['ci95'][0]:.{digits}f} to {summary['ci95'][1]:.{digits}f}"

def number(value, digits=4):
    return '' if value is None else f'{value:.{digits}f}'

def few(values):
    """The first eight of a list."""
    return ' '.join(f'{v:.3f}' for v in values[:8]) + (' ...' if len(values) > 8 else '')

def rows_or_reasons(found, keys, columns, cells):
    """Rows of a table: the `keys` of each dict, then cells(dict), or the reason in the last of all `columns`."""
    return [
        [r[k] for k in keys]
        + (cells(r) if 'reason' not in r else [''] * (columns - len(keys) - 1) + [r['reason']])
        for r in found
    ]

# ---------------------------------------------------------------- tables

def metric_names(lpips):
    """{key of scores: its name in the tables}."""
    if not lpips: return METRICS
    of = 'RANDOM trunk (no LPIPS)' if lpips == 'random' else f'LPIPS {lpips}'
    return METRICS | {'lpips_sum': f'{of}, sum', 'lpips_mean': 'mean of planes', 'lpips_brain': 'sum, brain'}

def fidelity_tables(results):
    rows, names = results['rows'], metric_names(results['settings']['lpips'])
    n = max(s['psnr_whole']['n_subjects'] for row in rows for s in row['fidelity'].values() if s)
    metrics = [f'{m} {name}' for m in results['modalities'] for name in names.values()]
    def cells(row, show):
        return [show(row['fidelity'].get(m, {}).get(k)) for m in results['modalities'] for k in names]
    return [
        f"Reconstruction, split {results['split']} of {results['data_dir']}, {n} subjects",
        '',
        *markdown_table(
            ['model', 'f', 'latent', 'bits/volume', 'DFT', *metrics],
            [
                [*(row[k] for k in ('name', 'f', 'latent', 'bits', 'dft')), *cells(row, mean_sd)]
                for row in rows
            ],
        ),
        '',
        '95 % bootstrap interval of each mean, by subject',
        '',
        *markdown_table(['model', *metrics], [[row['name'], *cells(row, interval)] for row in rows]),
    ]

def latent_tables(results):
    """Geometry, use of the codes and cross-modal scores of each model."""
    names, models = metric_names(results['settings']['lpips']), [
        row for row in results['rows'] if 'geometry' in row
    ]
    def cells(g):
        return [
            *(number(g[k]) for k in ('cos_raw', 'pearson_abs', 'effective_rank')),
            few(g['explained_variance']),
            few(g['channel_sd']),
            number(g['posterior_sigma']),
        ]
    head = [
        'model', 'latent', 'cos_raw', 'pearson_abs', 'effective rank', 'explained variance', 'channel sd',
        'posterior sigma'
    ]
    lines = ['', 'Latent, all positions of the same scans', '',
             *markdown_table(head, [[row['name'], row['latent'], *cells(row['geometry'])] for row in models])]
    for row in models:
        if row['codes']:
            use = [
                f"{k} {v['used']:.0f} used, perplexity {v['perplexity']:.1f}, {v['tokens']} tokens"
                for k, v in row['codes'].items()
            ]
            lines += ['', f"{row['name']}, codes of {row['num_codes']}: {'; '.join(use)}"]
        if row['cross']:
            swaps = [
                [f"{c['source']} -> {c['target']}", c['style'], *(mean_sd(c['scores'][k]) for k in names)]
                for c in row['cross']
            ]
            lines += [
                '',
                (
                    f"{row['name']}, cross-modal: anatomy of the source, style of the target scan (eq. 13) "
                    "or the target's running mean (no target scan)"
                ),
                '',
                *markdown_table(['source -> target', 'style', *names.values()], swaps),
            ]
    return lines

def frechet_table(extractor, rows, slices):
    planes = ('axial', 'coronal', 'sagittal')
    def cells(r):
        counts = ', '.join('{} {} / {}'.format(plane, *r['slices'][plane]) for plane in planes)
        return [*(number(r[k]) for k in (*planes, 'mean', 'mean_part', 'covariance_part')), counts]
    head = ['row', 'modality', *planes, 'mean', 'of it means', 'covariances', 'slices (real / other)']
    lines = ['', f'Frechet distance on slices, {extractor}, {slices} slices', '',
             *markdown_table(head, rows_or_reasons(rows, ('row', 'modality'), len(head), cells))]
    means = {(r['row'], r['modality']): r['mean'] for r in rows if 'mean' in r}
    for (row, modality), value in means.items():
        run, _, kind = row.rpartition(' ')
        if kind == 'gFID' and (f'{run} rFID', modality) in means:
            lines += ['', f"{run} {modality}: gFID - rFID {value - means[f'{run} rFID', modality]:.4f}"]
    return lines

def diversity_table(rows):
    head = ['set', 'modality', 'MS-SSIM', 'pairs', 'volumes']
    def cells(r):
        return [f"{r['ms_ssim']:.4f} +- {r['sd']:.4f}", r['pairs'], r['volumes']]
    return ['', 'MS-SSIM between pairs of volumes (1: all alike); real: one scan per subject', '',
            *markdown_table(head, rows_or_reasons(rows, ('row', 'modality'), len(head), cells))]

def anatomy_table(rows, labels):
    head = [
        'model',
        'modality',
        'Dice',
        '95 % interval',
        *(cell for name in SHOWN for cell in (f'{name}: reconstruction', 'ground truth')),
    ]
    def cells(r):
        percent = {k: np.multiply(100, r['mean_dice'][k]) for k in ('mean', 'sd', 'ci95')}
        volumes = [
            f"{np.mean([scan[key][name] for scan in r['scans']]):.0f}"
            for name in SHOWN
            for key in ('mm3', 'mm3_truth')
        ]
        return [
            f"{percent['mean']:.2f} +- {percent['sd']:.2f}",
            f"{percent['ci95'][0]:.2f} to {percent['ci95'][1]:.2f}",
            *volumes,
        ]
    against = f"the given label maps ('{labels}')" if labels else "the segmenter's labels of the input"
    return [
        '',
        (
            f'Dice x 100 against {against}, mean over foreground structures, then over subjects; volumes,'
            ' left + right, in mm3'
        ),
        '',
        *markdown_table(head, rows_or_reasons(rows, ('row', 'modality'), len(head), cells)),
    ]

def probe_table(rows, epochs):
    """epochs: of the networks among the probes, 0 if there are none."""
    head = [
        'model', 'probe', 'of', 'target', 'accuracy', '95 % interval', 'balanced', 'AUC', 'by subject',
        'scans (subjects)'
    ]

    def cells(r):
        return [
            number(r['accuracy'], 3),
            f"{r['ci95'][0]:.3f} to {r['ci95'][1]:.3f}",
            *(number(r[k], 3) for k in ('balanced_accuracy', 'auc', 'subject_accuracy')),
            f"{r['n']} ({r['n_groups']})",
        ]

    networks = f'. SEResNet-152: trained anew for each fold, {epochs} epochs' if epochs else ''
    return [
        '',
        f'Probes, 5 folds by subject. Linear: standardised latent, ridge-logistic regression{networks}',
        '',
        *markdown_table(head, rows_or_reasons(rows, ('row', 'probe', 'seen', 'target'), len(head), cells)),
    ]
