"""The papers' tables beside what your runs measured: python evaluate.py --table=deco4 --runs=out

Ours come from the table.json files that evaluate.py left under the folder of runs; a run is known by its folder's name, that of its
config. What was not measured stays empty. Paper numbers: NeuroQuant (arXiv:2604.05171) tables 1 and 2, DeCo-VAE (MIUA 2026) 1 to 5.
"""
import glob
import json
import os

from common import markdown_table

# heading -> where a number of ours is found: (kind, key, modality, factor)
NEUROQUANT = {
    f'{m} {name}': (kind, key, f'{m}w', factor)
    for m in ('T1', 'T2')
    for name, kind, key, factor in (
        ('PSNR', 'fidelity', 'psnr_whole', 1),
        ('SSIM', 'fidelity', 'ssim_whole', 1),
        ('Acc', 'SEResNet-152', 'accuracy', 100),
        ('Dice', 'anatomy', 'mean', 100),
    )
}
ABLATION = {k: v for k, v in NEUROQUANT.items() if 'Dice' not in k}
GEOMETRY = {'cosine': ('geometry', 'cos_raw', '', 1), 'effective rank': ('geometry', 'effective_rank', '', 1)}
FIDELITY = {
    'PSNR': ('fidelity', 'psnr_whole', 'T1w', 1),
    'SSIM': ('fidelity', 'ssim_uniform_whole', 'T1w', 0.01),
    'LPIPS': ('fidelity', 'lpips_sum', 'T1w', 1),
    'rFID': ('rFID', 'mean', 'T1w', 1),
}
GENERATION = {
    f'gFID {plane}': ('gFID', plane, 'T1w', 1) for plane in ('axial', 'coronal', 'sagittal', 'mean')
}

DECO = {  # label: (run, with decoder fine-tuning, numbers of table 4)
    'L_VAE (MAISI-VAE)': ('maisi', False, (32.80, 0.971, 0.027, 6.426, 6.566, 7.808, 5.424, 6.599)),
    'SID': ('decovae_sid', False, (33.47, 0.980, 0.024, 6.240, 6.380, 7.719, 4.983, 6.361)),
    'VAD': ('decovae_vad', False, (33.17, 0.978, 0.025, 6.251, 6.270, 7.651, 4.886, 6.269)),
    'L_VAE + DFT': ('maisi_dft', True, (32.99, 0.969, 0.025, 6.243, 6.577, 7.850, 5.356, 6.594)),
    'SID + DFT': ('decovae_sid_dft', True, (33.77, 0.981, 0.022, 5.822, 6.102, 7.498, 4.431, 6.010)),
    'VAD + DFT': ('decovae_vad_dft', True, (33.64, 0.979, 0.023, 5.946, 6.014, 7.485, 4.413, 5.971))}
COV = {
    'L_VAE + L_COV + DFT': ('decovae_cov_dft', True, (33.77, 0.963, 0.024, 6.015, 6.334, 7.644, 4.789, 6.256))
}

TABLES = {  # name: title, columns, rows {label: (run, fine-tuned, paper numbers)}
    'neuroquant1': (
        (
            'NeuroQuant table 1, NCANDA; Acc: sex from the latents by SEResNet-152 (--probe=sex'
            ' --probe_networks=latent)'
        ),
        NEUROQUANT,
        {
            'VQGAN': ('vqgan', False, (26.09, 90.77, 76.23, 90.08, 25.57, 88.28, 66.25, 89.80)),
            'SD-VAE': ('sdvae', False, (27.48, 92.72, 77.14, 92.51, 26.16, 90.87, 67.34, 90.37)),
            'MediTok': ('meditok', False, (28.03, 94.11, 77.78, 93.88, 27.34, 93.08, 67.55, 92.53)),
            'MedVAE': ('medvae', False, (28.26, 94.38, 78.12, 94.83, 27.59, 92.51, 67.87, 92.31)),
            'NeuroQuant': ('neuroquant', False, (28.89, 95.27, 79.09, 95.25, 28.12, 93.57, 68.36, 93.45)),
            'w/o joint training': (
                'neuroquant_3d_only',
                False,
                (28.51, 94.89, 78.57, 94.83, 28.03, 93.67, 67.95, 93.03),
            ),
        },
    ),
    'neuroquant2': (
        'NeuroQuant table 2, NCANDA; Acc as in table 1',
        ABLATION,
        {
            'Base': ('ablation_base', False, (27.56, 92.18, 77.38, 26.43, 91.24, 67.51)),
            '+ FMA': ('ablation_fma', False, (28.17, 94.37, 78.22, 27.39, 92.08, 67.85)),
            '+ M-FiLM': ('ablation_film', False, (28.52, 94.84, 78.39, 27.83, 92.49, 68.01)),
            '+ L_cross': ('ablation_cross', False, (28.63, 95.01, 78.45, 27.94, 92.76, 68.06)),
            '+ L_adv (full)': ('neuroquant', False, (28.89, 95.27, 79.09, 28.12, 93.57, 68.36)),
        },
    ),
    'deco1': (
        'DeCo-VAE table 1; cosine with channel means, as the printed numbers must have them',
        GEOMETRY,
        {
            'L_VAE (MAISI-VAE)': ('maisi', False, (0.2292, 3.22)),
            'SID': ('decovae_sid', False, (0.1148, 3.37)),
            'VAD': ('decovae_vad', False, (0.0971, 3.97)),
        },
    ),
    'deco2': (
        (
            'DeCo-VAE table 2, like with like: the paper prints L_VAE without fine-tuning against SID and VAD'
            ' with it'
        ),
        FIDELITY,
        {k: (run, tuned, paper[:4]) for k, (run, tuned, paper) in DECO.items()},
    ),
    'deco3': (
        (
            'DeCo-VAE table 3, like with like: the paper prints L_VAE without fine-tuning against SID and VAD'
            ' with it'
        ),
        GENERATION,
        {k: (run, tuned, paper[4:]) for k, (run, tuned, paper) in DECO.items()},
    ),
    'deco4': ('DeCo-VAE table 4', FIDELITY | GENERATION, DECO),
    'deco5': (
        'DeCo-VAE table 5; all its rows have fine-tuning',
        FIDELITY | GENERATION,
        {'L_VAE + DFT': DECO['L_VAE + DFT'], **COV, 'L_VAE + L_COV + L_VAR + DFT': DECO['VAD + DFT']},
    ),
}

def collect(runs):
    """{run: {(kind, key, modality): number, 'dft': 'yes' or 'no', 'split': ...}} from every table.json below a folder."""
    found = {}
    # the latest counts
    for path in sorted(
        glob.glob(os.path.join(runs, '**', 'table.json'), recursive=True), key=os.path.getmtime
    ):
        try:
            with open(path) as f:
                results = json.load(f)
        except (OSError, ValueError) as e:
            raise SystemExit(f'{path}: unreadable ({e}); run evaluate.py again')
        for row in results['rows']:
            if 'ckpt' not in row: continue
            facts = found.setdefault(row['name'], {})
            facts |= {'dft': row['dft'], 'source': f"{results['split']} of {results['data_dir']}"}
            facts |= {
                ('fidelity', k, m): s['mean']
                for m, metrics in row['fidelity'].items()
                for k, s in metrics.items()
            }
            facts |= {('geometry', k, ''): v for k, v in row['geometry'].items()}
        for r in results.get('frechet', ()):
            run, _, kind = r['row'].rpartition(' ')
            if kind in ('rFID', 'gFID') and 'mean' in r:
                found[run] |= {
                    (kind, k, r['modality']): r[k] for k in ('axial', 'coronal', 'sagittal', 'mean')
                }
        for r in results.get('anatomy', ()):
            if 'mean_dice' in r:
                found[r['row']]['anatomy', 'mean', r['modality']] = r['mean_dice']['mean']
        for r in results.get('probes', ()):
            # a probe of the scans themselves is of no run
            if r['target'] == 'sex' and 'accuracy' in r and r['row'] in found:
                found[r['row']][r['probe'], 'accuracy', r['seen'].removeprefix('latent, ')] = r['accuracy']
    return found

def paper_table(name, runs):
    """Markdown of one table: ours (paper) in each cell. SystemExit with one line for an unknown name or a run of the wrong kind."""
    if name not in TABLES: raise SystemExit(f"--table={name}: one of {', '.join(TABLES)}")
    title, columns, rows = TABLES[name]
    ours = collect(runs)
    lines = []
    for label, (run, tuned, paper) in rows.items():
        facts = ours.get(run, {})
        if facts and (facts['dft'] == 'yes') != tuned:
            raise SystemExit(
                f"{runs}/{run}: fine-tuned: {facts['dft']}, the row '{label}' is not the same; rename the run"
            )
        cells = []
        for (kind, key, modality, factor), number in zip(columns.values(), paper):
            value = facts.get((kind, key, modality))
            cells.append(f"{'' if value is None else format(factor * value, '.4g')} ({number:g})".strip())
        lines.append([label, run, 'yes' if tuned else 'no', *cells, facts.get('source', '')])
    title += f'. Ours, from {runs}, with the paper in brackets.'
    return (
        '\n'.join([title, '', *markdown_table(['row', 'run', 'DFT', *columns, 'measured on'], lines)]) + '\n'
    )
