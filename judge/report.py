"""What evaluate.py measured, as markdown, and the papers' tables beside it.

report() takes what table.json holds; nothing is computed but means for display. paper_table() reads the
table.json files below a folder. A run is known by its folder's name, that of its config, and what was not
measured stays empty. The papers: NeuroQuant (arXiv:2604.05171), tables 1 and 2; DeCo-VAE (MIUA 2026), 1 to 5.
"""
import glob
import json
import os
import sys
import textwrap
from itertools import groupby

import numpy as np

from common import markdown_table

DEFINITIONS = """\
PSNR: dB, data range 1, prediction clamped to [0,1]. SSIM: 3D, Gaussian window 11, sigma 1.5, K1 0.01, \
K2 0.03, valid region, times 100.
SSIM uniform: scikit-image's default, a uniform window of 7 with sample covariance, as DeCo-VAE; times 100. \
LPIPS: over all slices, [0,1]
as is; brain: 0 outside it in both.
whole: every voxel of the box. brain: voxels where the input is above 0 (SSIM: windows centred there).
Mean +- standard deviation over subjects, the sessions of a subject averaged first.
DCT codec: one row is given the brain mask. PCA: coefficients on the components of up to 100 training scans.
DFT: decoder fine-tuned on a frozen encoder. cos_raw: mean absolute cosine of channel pairs, means included; \
pearson_abs: the same of
centred channels. Effective rank: exp of the entropy of the explained variance, \
whose covariance is that of pearson_abs."""

METRICS = {
    'psnr_whole': 'PSNR', 'ssim_whole': 'SSIM', 'psnr_brain': 'PSNR brain', 'ssim_brain': 'SSIM brain',
    'ssim_uniform_whole': 'SSIM uniform'}
SHOWN = ('cerebellum cortex', 'caudate')  # the structures whose volumes NeuroQuant fig. 4 shows

def report(results):
    """Every table of a call of evaluate.py as text."""
    settings = results['settings']
    lines = fidelity_tables(results) + latent_tables(results) + ['', DEFINITIONS]
    if 'frechet' in results:
        lines += frechet_table(results['frechet_features'], results['frechet'], settings['fid_slices'])
    if 'diversity' in results:
        lines += diversity_table(results['diversity'])
    if 'anatomy' in results:
        lines += anatomy_table(results, settings['labels'], settings['volumes_by'])
    else:
        lines += ['', 'Dice, region volumes: not computed; give --segmenter=synthseg_2.0.h5 '
                  '(github.com/BBillot/SynthSeg), a command with {in} and {out}, or learn']
    if results.get('generated_anatomy'):
        lines += generated_table(results['generated_anatomy'], settings['volumes_by'])
    if 'bits' in results:
        lines += bits_table(results['bits'])
    if 'probes' in results:
        lines += probe_table(results['probes'], settings['probe_epochs'] if settings['probe_networks'] else 0)
    return '\n'.join(lines) + '\n'

# ---------------------------------------------------------------- for a terminal

def show(text):
    """Print a report: to a terminal within its width, to a file or another program as it is."""
    print(for_terminal(text) if sys.stdout.isatty() else text)

def for_terminal(text, width=120):
    """A report with its tables as aligned columns, and no line longer than `width` but for a long word.

    A wide table becomes several below one another, each with the first column. What is too long for a line of
    its own ends in dots; table.md has it all.
    """
    lines = []
    for is_table, block in groupby(text.splitlines(), lambda line: line.startswith('| ')):
        if is_table:
            lines += aligned([line[2:-2].split(' | ') for line in block], width)
        else:
            for line in block:
                whole_words = dict(break_on_hyphens=False, break_long_words=False)  # paths are copied
                lines += textwrap.wrap(line, width, **whole_words) or ['']
    return '\n'.join(lines) + '\n'

def aligned(rows, width):
    """Lines of the tables that show rows of cells, the second of which is markdown's rule."""
    columns = [list(column) for column in zip(rows[0], *rows[2:])]
    columns[0] = [cell if 2 * len(cell) <= width else f'...{cell[3 - width // 2:]}' for cell in columns[0]]
    sizes = [max(map(len, column)) for column in columns]
    room = width - sizes[0] - 2
    parts, used = [], room + 1
    for k, column in list(enumerate(columns))[1:]:
        sizes[k] = min(sizes[k], room)
        if used + sizes[k] > room:
            parts.append([columns[0]])
            used = 0
        parts[-1].append([textwrap.shorten(cell, sizes[k], placeholder='...') for cell in column])
        used += sizes[k] + 2
    lines = []
    for part in parts:
        if lines:
            lines.append('')
        widths = [max(map(len, column)) for column in part]
        for cells in zip(*part):
            line = '  '.join(cell.ljust(size) for cell, size in zip(cells, widths))
            lines.append(line.rstrip())
    return lines

# ---------------------------------------------------------------- cells

def digits_of(value):
    """Four for distances, which are far below 1."""
    return 2 if abs(value) >= 1 else 4

def mean_sd(summary, factor=1):
    """Mean and sd of a metrics.summarise; the value alone of a single subject."""
    if not summary: return ''
    if summary['mean'] is None:
        return f"identical in {summary['identical']} of {summary['n_sessions']}"
    mean = factor * summary['mean']
    digits = digits_of(mean)
    if summary['sd'] is None: return f'{mean:.{digits}f} (n = 1)'
    return f"{mean:.{digits}f} +- {factor * summary['sd']:.{digits}f}"

def interval(summary, factor=1):
    """The 95 % interval of the mean; '' of a single subject, which has none."""
    if not summary or summary['ci95'] is None: return ''
    low, high = (factor * end for end in summary['ci95'])
    digits = digits_of(factor * summary['mean'])
    return f'{low:.{digits}f} to {high:.{digits}f}'

def change(summary):
    """A mean difference with its interval, both signed."""
    if not summary or summary['mean'] is None: return ''
    if summary['ci95'] is None: return f"{summary['mean']:+.3f}"
    low, high = summary['ci95']
    return f"{summary['mean']:+.3f} ({low:+.3f} to {high:+.3f})"

def number(value, digits=4):
    return '' if value is None else f'{value:.{digits}f}'

def numbers(row, keys, digits=4):
    return [number(row[key], digits) for key in keys]

def few(values):
    """The first eight of a list."""
    return ' '.join(f'{v:.3f}' for v in values[:8]) + (' ...' if len(values) > 8 else '')

def table_of(rows, keys, columns, cells):
    """Lines of a table whose rows begin with the dicts' `keys`; `columns` names the others.

    cells(dict) gives those. A dict with a reason has it in the last column and the others empty.
    """
    lines = []
    for row in rows:
        if 'reason' in row:
            rest = [''] * (len(columns) - 1) + [row['reason']]
        else:
            rest = cells(row)
        lines.append([*(row[key] for key in keys.values()), *rest])
    return markdown_table([*keys, *columns], lines)

# ---------------------------------------------------------------- tables

def metric_names(lpips):
    """{key of a scan's scores: its name in the tables}."""
    if not lpips: return METRICS
    network = 'RANDOM trunk (no LPIPS)' if lpips == 'random' else f'LPIPS {lpips}'
    return METRICS | {
        'lpips_sum': f'{network}, sum', 'lpips_mean': 'mean of planes', 'lpips_brain': 'sum, brain'}

def fidelity_tables(results):
    rows, modalities = results['rows'], results['modalities']
    names = metric_names(results['settings']['lpips'])
    labels, n = labels_with_n(rows)
    head = [f'{modality} {name}' for modality in modalities for name in names.values()]

    def cells(row, show):
        fidelity = row['fidelity']
        return [show(fidelity.get(modality, {}).get(key)) for modality in modalities for key in names]

    scores = []
    for label, row in zip(labels, rows):
        facts = [row[key] for key in ('f', 'latent', 'bits', 'dft')]
        scores.append([label, *facts, *cells(row, mean_sd)])
    lines = [f"Reconstruction, split {results['split']} of {results['data_dir']}, {n} subjects", '',
             *markdown_table(['model', 'f', 'latent', 'bits/volume', 'DFT', *head], scores)]
    if n > 1:
        intervals = [[label, *cells(row, interval)] for label, row in zip(labels, rows)]
        lines += ['', '95 % bootstrap interval of each mean, by subject', '',
                  *markdown_table(['model', *head], intervals)]
    differences = [row for row in results.get('compared', ()) if row['fidelity']]
    if differences:
        labels, n = labels_with_n(differences)
        compared = [[label, *cells(row, change)] for label, row in zip(labels, differences)]
        first = differences[0]['than']
        title = f'Difference from {first}, scan by scan, {n} subjects: mean and 95 % interval, by subject'
        lines += ['', title, '', *markdown_table(['model', *head], compared)]
    for note in results.get('notes', ()):
        lines += ['', note]
    return lines

def labels_with_n(rows):
    """The rows' names, with numbers of subjects, or else of sessions, where they differ.

    returns these, and the largest number of subjects
    """
    names, counts = [row['name'] for row in rows], {}
    for key in ('n_subjects', 'n_sessions'):
        counts[key] = []  # {modality: how many} of each row
        for row in rows:
            scored = {modality: scores for modality, scores in row['fidelity'].items() if scores}
            counts[key].append({modality: scores['psnr_whole'][key] for modality, scores in scored.items()})
    most = max(numbers_in(counts['n_subjects']))
    for key, unit in (('n_subjects', ''), ('n_sessions', ' sessions')):
        if len(numbers_in(counts[key])) > 1:
            return [f'{name}, n = {count_text(count)}{unit}' for name, count in zip(names, counts[key])], most
    return names, most

def numbers_in(counts):
    """The set of all values of some dicts."""
    return set().union(*[count.values() for count in counts])

def count_text(count):
    """{modality: subjects} as text: one number where all are the same."""
    if len(set(count.values())) == 1: return str(max(count.values()))
    return ' and '.join(f'{n} {modality}' for modality, n in count.items()) or '0'

def latent_tables(results):
    """Geometry, use of the codes and cross-modal scores of each model."""
    names = metric_names(results['settings']['lpips'])
    models = [row for row in results['rows'] if 'geometry' in row]
    head = ['model', 'latent', 'cos_raw', 'pearson_abs', 'effective rank', 'explained variance', 'channel sd',
            'posterior sigma']
    cells = []
    for row in models:
        g = row['geometry']
        cells.append([row['name'], row['latent'], *numbers(g, ('cos_raw', 'pearson_abs', 'effective_rank')),
                      few(g['explained_variance']), few(g['channel_sd']), number(g['posterior_sigma'])])
    lines = ['', 'Latent, all positions of the same scans', '', *markdown_table(head, cells)]
    for row in models:
        use = [f"{k} {v['used']:.0f} used, perplexity {v['perplexity']:.1f}, {v['tokens']} tokens"
               for k, v in row['codes'].items()]
        if use:
            lines += ['', f"{row['name']}, codes of {row['num_codes']}: {'; '.join(use)}"]
        swaps = []
        for c in row['cross']:
            scores = [mean_sd(c['scores'][key]) for key in names]
            swaps.append([f"{c['source']} -> {c['target']}", c['style'], *scores])
        if swaps:
            lines += ['', f"{row['name']}, cross-modal: anatomy of the source, style of the target scan "
                      "(eq. 13) or the target's running mean (no target scan)", '',
                      *markdown_table(['source -> target', 'style', *names.values()], swaps)]
    return lines

def frechet_table(extractor, rows, slices):
    head = [*PLANES, 'mean', 'of it means', 'covariances', 'slices (real / other)']

    def cells(r):
        counts = ['{} {} / {}'.format(plane, *r['slices'][plane]) for plane in PLANES]
        distances = [f'{r[key]:.4g}' for key in (*PLANES, 'mean', 'mean_part', 'covariance_part')]
        return [*distances, ', '.join(counts)]

    lines = ['', f'Frechet distance on slices, {extractor}, {slices} slices', '',
             *table_of(rows, {'row': 'row', 'modality': 'modality'}, head, cells)]
    for rebuilt, drawn in zip(rows, rows[1:]):  # a run's gFID stands below its rFID
        run, _, kind = drawn['row'].rpartition(' ')
        if kind == 'gFID' and 'mean' in rebuilt and 'mean' in drawn:
            lines += ['', f"{run} {drawn['modality']}: gFID - rFID {drawn['mean'] - rebuilt['mean']:.4g}"]
    return lines

def diversity_table(rows):
    def cells(r):
        spread = '' if r['sd'] is None else f" +- {r['sd']:.4f}"
        return [f"{r['ms_ssim']:.4f}{spread}", r['pairs'], r['volumes']]

    return ['', 'MS-SSIM between pairs of volumes (1: all alike); real: one scan per subject', '',
            *table_of(rows, {'set': 'row', 'modality': 'modality'}, ['MS-SSIM', 'pairs', 'volumes'], cells)]

def anatomy_table(results, labels, volumes_by):
    head = ['Dice', '95 % interval']
    for name in SHOWN:
        head += [f'{name}: reconstruction', 'ground truth']

    def cells(r):
        volumes = []
        for name in SHOWN:
            for key in ('mm3', 'mm3_truth'):
                volumes.append(f"{np.mean([scan[key][name] for scan in r['scans']]):.0f}")
        return [mean_sd(r['mean_dice'], 100), interval(r['mean_dice'], 100), *volumes]

    against = f"the given label maps ('{labels}')" if labels else "the segmenter's labels of the input"
    return ['', f"Segmenter: {results['segmenter']}", '',
            f'Dice x 100 against {against}, mean over foreground structures, then over subjects. The '
            'reconstruction is segmented as the decoder made it, background and all. Volumes, left + right, '
            f'in mm3 of {volumes_by}', '',
            *table_of(results['anatomy'], {'model': 'row', 'modality': 'modality'}, head, cells)]

def cm3(volumes):
    """Mean, sd and number of volumes in mm3; one has no sd."""
    spread = f' +- {np.std(volumes, ddof=1) / 1000:.2f}' if len(volumes) > 1 else ''
    return f'{np.mean(volumes) / 1000:.2f}{spread} ({len(volumes)})'

def generated_table(rows, volumes_by):
    """The structures that any volume has, one below the other."""
    lines = []
    for row in rows:
        if 'reason' in row:
            lines.append([row['row'], row['modality'], '', '', '', row['reason']])
            continue
        for name, real in row['real'].items():
            drawn = row['generated'][name]
            if not any(real) and not any(drawn): continue
            spread = np.std(real, ddof=1) if len(real) > 1 else 0.0
            shift = (np.mean(drawn) - np.mean(real)) / spread if spread > 0 else None
            lines.append([row['row'], row['modality'], name, cm3(real), cm3(drawn), number(shift, 2)])
    head = ['model', 'modality', 'structure', 'real, cm3 (n)', 'generated', 'shift in sd of real']
    return ['', f'Volumes of structures, left + right, of {volumes_by}: real scans and generated brains', '',
            *markdown_table(head, lines)]

def bits_table(rows):
    head = ['GPT', 'of', 'bits per token', '95 % interval', 'position', 'unigram', 'uniform',
            'scans (subjects)']
    lines = []
    for row in rows:
        bits = row['bits']
        lines.append([row['row'], row['of'], mean_sd(bits), interval(bits),
                      *numbers(row, ('position', 'unigram', 'uniform'), 2),
                      f"{bits['n_sessions']} ({bits['n_subjects']})"])
    return ['', 'Held-out bits per token; beside them, by frequencies in the training set', '',
            *markdown_table(head, lines)]

def probe_table(rows, epochs):
    """epochs: of the networks among the probes, 0 if there are none."""
    keys = {'model': 'row', 'probe': 'probe', 'of': 'seen', 'bits': 'bits', 'target': 'target'}
    head = ['accuracy', 'accuracy, 95 %', 'balanced', 'balanced, 95 %', 'AUC', 'by subject',
            'scans (subjects)']

    def share(value, ci95):
        low, high = ci95
        return [number(value, 3), f'{low:.3f} to {high:.3f}']

    def cells(r):
        return [*share(r['accuracy'], r['ci95']), *share(r['balanced_accuracy'], r['balanced_ci95']),
                *numbers(r, ('auc', 'subject_accuracy'), 3), f"{r['n']} ({r['n_groups']})"]

    networks = f'. SEResNet-152: trained anew for each fold, {epochs} epochs' if epochs else ''
    title = ('Probes, 5 folds by subject within the split. Linear: standardised features (of a volume the '
             f'means of 4^3 voxels), ridge-logistic regression{networks}')
    return ['', title, '', *table_of(rows, keys, head, cells)]

# ---------------------------------------------------------------- the papers' tables

# columns: {heading: (kind, key, modality, factor)}, where a number of ours is found
NEUROQUANT = {}
for short in ('T1', 'T2'):
    NEUROQUANT[f'{short} PSNR'] = ('fidelity', 'psnr_whole', f'{short}w', 1)
    NEUROQUANT[f'{short} SSIM'] = ('fidelity', 'ssim_whole', f'{short}w', 1)
    NEUROQUANT[f'{short} Acc'] = ('SEResNet-152', 'accuracy', f'{short}w', 100)
    NEUROQUANT[f'{short} Dice'] = ('anatomy', 'mean', f'{short}w', 100)
ABLATION = {heading: place for heading, place in NEUROQUANT.items() if 'Dice' not in heading}
GEOMETRY = {'cosine': ('geometry', 'cos_raw', '', 1), 'effective rank': ('geometry', 'effective_rank', '', 1)}
FIDELITY = {
    'PSNR': ('fidelity', 'psnr_whole', 'T1w', 1),
    'SSIM': ('fidelity', 'ssim_uniform_whole', 'T1w', 0.01),
    'LPIPS': ('fidelity', 'lpips_sum', 'T1w', 1),
    'rFID': ('rFID', 'mean', 'T1w', 1)}
PLANES = ('axial', 'coronal', 'sagittal')
GENERATION = {f'gFID {plane}': ('gFID', plane, 'T1w', 1) for plane in (*PLANES, 'mean')}

# rows: {label: (run, the paper's numbers)}; a run with a fine-tuned decoder is named so
DECO = {  # table 4
    'L_VAE (MAISI-VAE)': ('maisi', (32.80, 0.971, 0.027, 6.426, 6.566, 7.808, 5.424, 6.599)),
    'SID': ('decovae_sid', (33.47, 0.980, 0.024, 6.240, 6.380, 7.719, 4.983, 6.361)),
    'VAD': ('decovae_vad', (33.17, 0.978, 0.025, 6.251, 6.270, 7.651, 4.886, 6.269)),
    'L_VAE + DFT': ('maisi_dft', (32.99, 0.969, 0.025, 6.243, 6.577, 7.850, 5.356, 6.594)),
    'SID + DFT': ('decovae_sid_dft', (33.77, 0.981, 0.022, 5.822, 6.102, 7.498, 4.431, 6.010)),
    'VAD + DFT': ('decovae_vad_dft', (33.64, 0.979, 0.023, 5.946, 6.014, 7.485, 4.413, 5.971))}
COV_DFT = ('decovae_cov_dft', (33.77, 0.963, 0.024, 6.015, 6.334, 7.644, 4.789, 6.256))
LIKE_WITH_LIKE = 'like with like: the paper prints L_VAE without fine-tuning against SID and VAD with it'

TABLES = {  # name: title, columns, rows
    'neuroquant1': (
        'NeuroQuant table 1, NCANDA; Acc: sex from the latents by SEResNet-152 (--probe=sex '
        '--probe_networks=latent)', NEUROQUANT, {
            'VQGAN': ('vqgan', (26.09, 90.77, 76.23, 90.08, 25.57, 88.28, 66.25, 89.80)),
            'SD-VAE': ('sdvae', (27.48, 92.72, 77.14, 92.51, 26.16, 90.87, 67.34, 90.37)),
            'MediTok': ('meditok', (28.03, 94.11, 77.78, 93.88, 27.34, 93.08, 67.55, 92.53)),
            'MedVAE': ('medvae', (28.26, 94.38, 78.12, 94.83, 27.59, 92.51, 67.87, 92.31)),
            'NeuroQuant': ('neuroquant', (28.89, 95.27, 79.09, 95.25, 28.12, 93.57, 68.36, 93.45)),
            'w/o joint training': ('neuroquant_3d_only', (
                28.51, 94.89, 78.57, 94.83, 28.03, 93.67, 67.95, 93.03))}),
    'neuroquant2': (
        'NeuroQuant table 2, NCANDA; Acc as in table 1', ABLATION, {
            'Base': ('ablation_base', (27.56, 92.18, 77.38, 26.43, 91.24, 67.51)),
            '+ FMA': ('ablation_fma', (28.17, 94.37, 78.22, 27.39, 92.08, 67.85)),
            '+ M-FiLM': ('ablation_film', (28.52, 94.84, 78.39, 27.83, 92.49, 68.01)),
            '+ L_cross': ('ablation_cross', (28.63, 95.01, 78.45, 27.94, 92.76, 68.06)),
            '+ L_adv (full)': ('neuroquant', (28.89, 95.27, 79.09, 28.12, 93.57, 68.36))}),
    'deco1': (
        'DeCo-VAE table 1; cosine with channel means, as the printed numbers must have them', GEOMETRY, {
            'L_VAE (MAISI-VAE)': ('maisi', (0.2292, 3.22)),
            'SID': ('decovae_sid', (0.1148, 3.37)),
            'VAD': ('decovae_vad', (0.0971, 3.97))}),
    'deco2': (
        f'DeCo-VAE table 2, {LIKE_WITH_LIKE}', FIDELITY,
        {label: (run, paper[:4]) for label, (run, paper) in DECO.items()}),
    'deco3': (
        f'DeCo-VAE table 3, {LIKE_WITH_LIKE}', GENERATION,
        {label: (run, paper[4:]) for label, (run, paper) in DECO.items()}),
    'deco4': ('DeCo-VAE table 4', FIDELITY | GENERATION, DECO),
    'deco5': (
        'DeCo-VAE table 5; all its rows have fine-tuning', FIDELITY | GENERATION, {
            'L_VAE + DFT': DECO['L_VAE + DFT'],
            'L_VAE + L_COV + DFT': COV_DFT,
            'L_VAE + L_COV + L_VAR + DFT': DECO['VAD + DFT']})}

def collect(runs):
    """What every table.json below a folder holds: {run: facts}; of several files on a run the latest counts.

    facts: {(kind, key, modality): number}, and 'ckpt', 'dft', 'yes' or 'no', 'source', the data, and 'iter'.
    Numbers of other data, or of an earlier state of the checkpoint, than in the latest file are forgotten.
    The papers' LPIPS is of SqueezeNet, and their Frechet distances are of all slices: others are left out.
    """
    facts = {}
    paths = glob.glob(os.path.join(runs, '**', 'table.json'), recursive=True)
    for path in sorted(paths, key=os.path.getmtime):
        try:
            with open(path) as f:
                results = json.load(f)
        except (OSError, ValueError) as e:
            raise SystemExit(f'{path}: unreadable ({e}); run evaluate.py again')
        add_facts(facts, results)
    return facts

def add_facts(facts, results):
    """Add what one table.json holds to the facts of collect()."""
    settings, source = results['settings'], f"{results['split']} of {results['data_dir']}"
    runs = {}  # of this file
    for row in results['rows']:
        if 'ckpt' not in row: continue
        name = '/'.join(row['name'].split('/')[-2:])  # without folders that told it from others of the call
        run = facts.setdefault(name, {})
        if run.get('ckpt', row['ckpt']) != row['ckpt']:
            raise SystemExit(f"two runs are called {name}: {run['ckpt']} and {row['ckpt']}; "
                             'rename one folder, or give a --runs that holds one of them')
        state = source, row['iter'], row.get('weights')
        if run.get('state') != state:
            run.clear()
        run |= {'ckpt': row['ckpt'], 'dft': row['dft'], 'source': source, 'state': state}
        runs[row['name']] = run
        for modality, metrics in row['fidelity'].items():
            for key, summary in metrics.items():
                if settings['lpips'] == 'squeeze' or not key.startswith('lpips'):
                    run['fidelity', key, modality] = summary['mean']
        for key, value in row['geometry'].items():
            run['geometry', key, ''] = value
    real_features = 'RANDOM' not in results.get('frechet_features', '')
    as_papers = real_features and settings['fid_slices'] == 'all'
    for row in results.get('frechet', ()) if as_papers else ():
        name, _, kind = row['row'].rpartition(' ')
        if kind in ('rFID', 'gFID') and 'mean' in row:
            for key in (*PLANES, 'mean'):
                runs[name][kind, key, row['modality']] = row[key]
    for row in results.get('anatomy', ()):
        if 'mean_dice' in row:
            runs[row['row']]['anatomy', 'mean', row['modality']] = row['mean_dice']['mean']
    for row in results.get('probes', ()):
        # a probe of the scans themselves is of no run
        if row['target'] == 'sex' and 'accuracy' in row and row['row'] in runs:
            modality = row['seen'].removeprefix('latent, ')
            runs[row['row']][row['probe'], 'accuracy', modality] = row['accuracy']

def paper_table(name, runs):
    """Markdown of one table of TABLES, with ours (paper) in each cell.

    SystemExit with one line for an unknown name, or a run that is fine-tuned where the row is not.
    """
    if name not in TABLES: raise SystemExit(f"--table={name}: one of {', '.join(TABLES)}")
    title, columns, rows = TABLES[name]
    ours = collect(runs)
    lines = []
    for label, (run, paper) in rows.items():
        judged = f'{run}/ckpt' if f'{run}/ckpt' in ours else f'{run}/best'  # the end of a run counts first
        facts = ours.get(judged, {})
        tuned = 'yes' if run.endswith('_dft') else 'no'
        if facts and facts['dft'] != tuned:
            raise SystemExit(f"{runs}/{judged}: fine-tuned: {facts['dft']}, the row '{label}' is not the "
                             'same; rename the run')
        cells = []
        for (kind, key, modality, factor), printed in zip(columns.values(), paper):
            value = facts.get((kind, key, modality))
            measured = '' if value is None else f'{factor * value:.4g} '
            cells.append(f'{measured}({printed:g})')
        lines.append([label, judged if facts else run, tuned, *cells, facts.get('source', '')])
    head = ['row', 'run', 'DFT', *columns, 'measured on']
    title += f'. Ours, from {runs}, with the paper in brackets.'
    return '\n'.join([title, '', *markdown_table(head, lines)]) + '\n'
