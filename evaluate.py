"""Judge trained autoencoders on held-out sessions: tables (markdown and JSON) and pictures.

    python evaluate.py --ckpt=out/demo/best.pt
    python evaluate.py --ckpt=out/a/best.pt,out/b/best.pt --data_dir=data/mine --split=test
    python evaluate.py --table=deco4 --runs=out    # a table of the papers beside what earlier calls measured

Writes table.md, table.json and reconstructions.png beside the first checkpoint (--out_dir elsewhere).
Importing it runs nothing.
"""
import json
import os
import sys

import torch
from tqdm import tqdm

from common import autocast, configure, load_checkpoint, make_out_dir, start_processes, write_text
from data import Sessions
from judge import figures
from judge.anatomy import add_anatomy, anatomy_rows, generated_rows, volume_boxes
from judge.bits import bits_rows, load_gpts
from judge.metrics import (
    add_cross_modal, add_latent, channel_cosine, dice, effective_rank, explained_variance, fidelity,
    frechet_distance, region_volumes_mm3)
from judge.probe import Latent, embed_latents, linear_probe, probe_rows
from judge.references import reference_rows
from judge.report import DEFINITIONS, SHOWN, paper_table, report, show
from judge.runs import Run, Scan, compared_row, key_of, model_row, run_names
from judge.segment import make_segmenter
from judge.small_segmenter import learn_once
from judge.sets import add_slices, diversity_rows, frechet_rows, load_extractor, sample_views
from losses import psnr  # offered here too, as are some of the judges' names above
from model import from_checkpoint
from pretrained import LPIPS
from slabs import slabwise

# ---------------------------------------------------------------- settings
ckpt = 'out/neuroquant/best.pt'  # one, or several separated by commas
data_dir = ''               # '' for the one the first checkpoint was trained on
split = 'test'
max_sessions = -1           # -1 for all of the split
reference_sessions = 50     # sessions the reference rows are computed on; 0 for no such rows
lpips = ''                  # 'squeeze', 'alex' or 'vgg' for LPIPS columns; or 'random', a fixed random trunk
lpips_trunk = ''            # its two files
lpips_lin = ''
segmenter = ''              # Dice and volumes: synthseg_2.0.h5, or a command with {in} and {out}, or learn: a
                            # small one, in minutes from the data's label maps; out_dir/segmenter.pt keeps it
labels = ''                 # column of subjects.tsv with true label maps, such as dseg; '': the segmenter's
volumes_by = 'voxels'       # or 'posteriors', which SynthSeg itself adds up
table = ''                  # neuroquant1, neuroquant2, deco1 ... deco5: only print that table of the papers
runs = 'out'                # beside what is found in this folder
latent_figures = False      # also latent.png and tsne.png
tsne_points = 1000          # positions in it
probe = ''                  # column to tell from the latents, such as sex; from z_anat also the modality
probe_networks = ()         # also by SEResNet-152 on 'latent', 'volume' (the scans) or both: hours on a CPU
probe_epochs = 30
features = ''               # Frechet distances: RadImageNet-ResNet50_notop.pth, or 'random', a fixed network
features_as_released = False  # read that file as DeCo-VAE's code does, biases dropped and strides moved
fid_slices = 'all'          # or 'central': the middle 40 % of each plane
generated = ''              # folders of sample.py --mode=generate, one per ckpt: gFID, diversity, samples.png
gpt = ''                    # GPTs on the tokens of these checkpoints: held-out bits
out_dir = ''                # '' for the first checkpoint's folder
device = ''
dtype = 'float32'           # bfloat16 for autocast
slab = 0                    # > 0: autoencoders run slab by slab, for volumes that do not fit the card
seed = 0                    # of the bootstrap

def check_settings():
    """SystemExit with one line for settings that cannot be."""
    if not set(probe_networks) <= {'latent', 'volume'} or (probe_networks and not probe):
        raise SystemExit(f'--probe_networks={probe_networks}: of latent and volume, with --probe=COLUMN')
    if fid_slices not in ('all', 'central'):
        raise SystemExit(f'--fid_slices={fid_slices}: all or central')
    if volumes_by not in ('voxels', 'posteriors'):
        raise SystemExit(f'--volumes_by={volumes_by}: voxels or posteriors')

# ---------------------------------------------------------------- runs

def count_used(sessions):
    return sessions.n if max_sessions < 0 else min(max_sessions, sessions.n)

def load_runs(paths, checkpoints):
    """A Run for each checkpoint, and the modalities that any of them knows.

    SystemExit with one line for a flow or a GPT, or for a model that cannot work in slabs.
    """
    folders = [folder for folder in generated.split(',') if folder]
    loaded, known = [], []
    for path, name, checkpoint in zip(paths, run_names(paths), checkpoints):
        model = from_checkpoint(checkpoint).to(device)
        if not hasattr(model, 'analyse'):
            raise SystemExit(f'{path}: a flow or a GPT, not an autoencoder')
        if slab:
            try:
                model = slabwise(model, slab)
            except ValueError as e:
                raise SystemExit(f'{path}: --slab={slab}: {e}')
        sessions = Sessions(data_dir, checkpoint['config']['modalities'], split)
        new = [modality for modality in sessions.modalities if modality not in known]
        known += new
        folder = folders.pop(0) if folders else ''
        loaded.append(Run(path, name, checkpoint, model, sessions, count_used(sessions), new, folder))
        for note in loaded[-1].notes:
            print(note)
    if folders:
        raise SystemExit(f'--generated={generated}: {",".join(folders)} has no checkpoint in --ckpt')
    return loaded, known

def load_or_reason(load, setting, *args):
    """What load makes of a setting, None if it is '', and the reason where that fails."""
    try:
        return load(setting, *args) if setting else None, ''
    except (SystemExit, ValueError) as e:
        return None, str(e)

# ---------------------------------------------------------------- one pass over the scans

@torch.no_grad()
def pass_over_scans(all_runs, joint):
    """Read each scan once; each run that uses it encodes and decodes it once, and all judges see the result.

    joint: Sessions of the modalities of all runs.
    """
    pictured = None  # the first session with every modality of the first run
    for i, row in enumerate(tqdm(joint.rows, desc='sessions', leave=False)):
        users = [run for run in all_runs if key_of(row) in run.keys]
        scans = {}
        for m in joint.present(i) if users else ():
            modality, volume = joint.modalities[m], joint.volume(i, m)
            x = torch.tensor(volume, device=device)[None, None]
            scans[modality] = Scan(row, modality, volume, x)
        if pictured is None and all_runs[0] in users and scans.keys() >= set(all_runs[0].modalities):
            pictured = row
        for run in users:
            known = [scans[modality] for modality in run.modalities if modality in scans]
            try:
                judge_session(run, known, row is pictured)
            except ValueError as e:
                raise SystemExit(f'{run.path} on {data_dir}: {e}')

def judge_session(run, scans, is_pictured):
    """Show a session's scans to a run, and gather what the judges want to know."""
    outputs = []
    with autocast(device, dtype):
        for scan in scans:
            x = scan.x.cpu() if slab else scan.x  # slabs travel to the card one by one
            out = run.model.analyse(x, scan.modality)
            out['x_hat'] = out['x_hat'].to(device)
            outputs.append(out)
            scores = fidelity(out['x_hat'], scan.x, lpips_net)
            run.scanned[scan.modality].append(key_of(scan.row))
            run.scores[scan.modality].append((scan.row['subject'], scores))
            add_latent(run, scan.modality, out)
        if getattr(run.model.config, 'film', False):
            add_cross_modal(run, scans, outputs, lpips_net)
    for scan, out in zip(scans, outputs):
        x_hat = out['x_hat'].float().clamp(0, 1)
        if probe or (latent_figures and key_of(scan.row) in run.drawn_keys):
            run.latents.append(Latent(scan, out))
        if extractor:
            add_slices(run, scan, x_hat, extractor, fid_slices)
        if segment:
            add_anatomy(run, scan, x_hat[0, 0].cpu().numpy(), segment, labels, volumes_by)
        if is_pictured:
            run.shown[scan.modality] = scan.volume, x_hat[0, 0].cpu().numpy()

# ---------------------------------------------------------------- results

def write_tables(results):
    """table.md and table.json of what has been measured so far; returns the text."""
    text = report(results)
    write_text(f'{out_dir}/table.md', text)
    write_text(f'{out_dir}/table.json', json.dumps(results, indent=1))
    return text

if __name__ == '__main__':
    settings = configure(globals(), sys.argv[1:])
    if table:
        show(paper_table(table, runs))
        sys.exit()
    check_settings()
    _, world, device = start_processes(device)
    if world > 1:
        raise SystemExit('evaluate.py runs in one process: start it with python, not torchrun')
    paths = [path for path in ckpt.split(',') if path]
    checkpoints = [load_checkpoint(path) for path in paths]
    data_dir = data_dir or checkpoints[0]['config']['data_dir']
    if not data_dir: raise SystemExit(f'{paths[0]} names no data; give --data_dir=FOLDER')
    out_dir = out_dir or os.path.dirname(paths[0]) or '.'
    make_out_dir(out_dir)

    # ---- the runs, the judges' networks, and the pass
    lpips_net = None
    if lpips:
        lpips_net = (LPIPS() if lpips == 'random' else LPIPS(lpips, lpips_trunk, lpips_lin)).to(device)
    loaded, no_extractor = load_or_reason(load_extractor, features, features_as_released, device)
    extractor_name, extractor = loaded or ('not computed', None)
    all_runs, modalities = load_runs(paths, checkpoints)
    if segmenter == 'learn':
        segmenter = learn_once(data_dir, modalities, f'{out_dir}/segmenter.pt', device)
    segment, no_segment = load_or_reason(make_segmenter, segmenter, device)
    gpts = load_gpts([path for path in gpt.split(',') if path], all_runs, device)
    joint = Sessions(data_dir, modalities, split)
    pass_over_scans(all_runs, joint)

    # ---- tables
    rows = [model_row(run, seed) for run in all_runs]
    if reference_sessions > 0:
        rates = {run.model.bits_per_volume(joint.shape) + run.model.style_bits() for run in all_runs}
        train = Sessions(data_dir, modalities, 'train')
        n = min(count_used(joint), reference_sessions)
        rows += reference_rows(joint, train, n, sorted(rates), lpips_net, device, seed)
    compared = [compared_row(run, all_runs[0], seed) for run in all_runs[1:]]
    results = {'data_dir': data_dir, 'split': split, 'modalities': modalities, 'settings': settings,
               'definitions': DEFINITIONS, 'rows': rows, 'compared': compared,
               'notes': [note for run in all_runs for note in run.notes]}
    if features:
        results['frechet_features'] = extractor_name
        results['frechet'] = frechet_rows(all_runs, extractor, fid_slices, device, no_extractor)
    if any(run.generated for run in all_runs):
        results['diversity'] = diversity_rows(all_runs, seed, device)
    if segmenter:
        results['segmenter'] = getattr(segment, 'about', segmenter)
        results['anatomy'] = anatomy_rows(all_runs, seed, no_segment)
        results['generated_anatomy'] = generated_rows(all_runs, segment, volumes_by, no_segment)
    if gpts:
        results['bits'] = bits_rows(gpts, data_dir, split, device, dtype, seed)
    text = write_tables(results)
    if probe:  # it may take hours, or fail
        results['probes'] = probe_rows(all_runs, probe, probe_networks, probe_epochs, device, dtype, seed)
        text = write_tables(results)
    show(text)
    print(f'tables: {out_dir}/table.md, table.json')

    # ---- pictures
    figures.boxes(f'{out_dir}/volumes.png', volume_boxes(results.get('anatomy', ()), SHOWN), 'cm3')
    if latent_figures:
        geometries = {row['name']: row['geometry'] for row in rows if 'geometry' in row}
        figures.geometry(f'{out_dir}/latent.png', geometries)
        figures.embedding(f'{out_dir}/tsne.png', embed_latents(all_runs, tsne_points, seed))
    figures.views(f'{out_dir}/samples.png', sample_views(all_runs), 'generated')
    title = f'a session of {data_dir}, split {split}'
    figures.views(f'{out_dir}/reconstructions.png', figures.reconstruction_views(all_runs), title)
