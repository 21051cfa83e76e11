"""Does a reconstruction keep the anatomy? Dice and region volumes of its label map against that of the scan.

Labels are FreeSurfer's numbers, left and right apart.
"""
import os
from dataclasses import dataclass
from itertools import islice

import numpy as np

from judge.metrics import attempt, dice, region_volumes_mm3, summarise
from judge.sets import read_generated

NAMES = {
    2: 'cerebral white matter', 3: 'cerebral cortex', 4: 'lateral ventricle', 5: 'inferior lateral ventricle',
    7: 'cerebellum white matter', 8: 'cerebellum cortex', 10: 'thalamus', 11: 'caudate', 12: 'putamen',
    13: 'pallidum', 14: '3rd ventricle', 15: '4th ventricle', 16: 'brain stem', 17: 'hippocampus',
    18: 'amygdala', 24: 'CSF', 26: 'accumbens', 28: 'ventral DC'}
RIGHT = {  # of each left label
    2: 41, 3: 42, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54, 26: 58, 28: 60}
MERGED = {}       # structure: its labels, left and right together
SIDED_NAMES = {}  # label: its name with its side
for label, name in NAMES.items():
    if label in RIGHT:
        MERGED[name] = (label, RIGHT[label])
        SIDED_NAMES |= {label: f'left {name}', RIGHT[label]: f'right {name}'}
    else:
        MERGED[name] = (label,)
        SIDED_NAMES[label] = name

def given_labels(row, column):
    """Segmentation that a row of the index names in a column. ValueError if there is none."""
    path = os.path.join(row['folder'], row.get(column) or '(none)')
    try:
        return Segmentation(np.load(path))
    except (OSError, EOFError, ValueError):
        raise ValueError(f'{path}: no label map; '
                         f'--labels={column} must be a column of subjects.tsv with .npy files')

@dataclass
class Segmentation:
    """Label map (D,H,W) of a volume, and where a segmenter gives them the sums of its posteriors in mm3."""
    labels: np.ndarray
    posterior_mm3: dict = None  # {label: mm3}

def structure_volumes(segmentation, voxel_mm, by):
    """mm3 of every structure. by: 'voxels' of its labels, or 'posteriors', as SynthSeg itself measures."""
    if by == 'voxels': return region_volumes_mm3(segmentation.labels, MERGED, voxel_mm)
    posterior = segmentation.posterior_mm3
    if posterior is None:
        raise ValueError('volumes of label maps are counted: --volumes_by=posteriors needs SynthSeg')
    volumes = {}
    for name, labels in MERGED.items():
        volumes[name] = sum(posterior[label] for label in labels)
    return volumes

def compare_labels(segmentation, truth, voxel_mm, by='voxels'):
    """Dice of every label of the true map, and volumes of every structure in both, as a dict."""
    present = [label for label in np.unique(truth.labels) if label in SIDED_NAMES]
    overlap = dice(segmentation.labels, truth.labels, present)
    return {
        'dice': {SIDED_NAMES[label]: value for label, value in overlap.items()},
        'mm3': structure_volumes(segmentation, voxel_mm, by),
        'mm3_truth': structure_volumes(truth, voxel_mm, by)}

def add_anatomy(run, scan, x_hat, segment, column, by):
    """Add what compare_labels says of a reconstruction (D,H,W) to run.anatomy, or why it cannot.

    What the decoder made is segmented as it is: cut out by the scan's own mask, it would be given the border
    of the brain. After a reason nothing of that modality is segmented. column: of given label maps; '' for
    the segmenter's of the scan. by: see structure_volumes.
    """
    results, voxel_mm = run.anatomy[scan.modality], scan.row['voxel_mm']
    if results and 'reason' in results[-1]: return
    try:
        if scan.truth is None:
            scan.truth = given_labels(scan.row, column) if column else segment(scan.volume, voxel_mm)
        comparison = compare_labels(segment(x_hat, voxel_mm), scan.truth, voxel_mm, by)
        results.append({'subject': scan.row['subject'], **comparison})
    except ValueError as e:
        results.append({'reason': str(e)})

def anatomy_rows(runs, seed, reason=''):
    """Mean Dice of each run and modality, and its scans; or a reason. reason: why there is no segmenter."""
    if reason: return [{'row': 'Dice', 'modality': '', 'reason': reason}]
    rows = []
    for run in runs:
        for modality in run.modalities:
            scans = run.anatomy[modality] or [{'reason': f'no {modality} scan'}]
            row = {'row': run.name, 'modality': modality}
            if 'reason' in scans[-1]:
                rows.append(row | scans[-1])
                continue
            per_scan = [np.nanmean(list(scan['dice'].values()) or [np.nan]) for scan in scans]
            subjects = [scan['subject'] for scan in scans]
            rows.append(row | {'mean_dice': summarise(per_scan, subjects, seed=seed), 'scans': scans})
    return rows

def generated_rows(runs, segment, by, reason='', limit=200):
    """Volumes of every structure in a run's first generated brains and in its real scans, or a reason.

    A row has 'generated' and 'real', {structure: [mm3 of each volume]}. The real ones are of the label maps
    that anatomy_rows compares with. by: see structure_volumes.
    """
    rows = []
    for run in runs:
        for modality in run.modalities if run.generated else ():
            row = {'row': run.name, 'modality': modality}
            real = run.anatomy[modality] or [{'reason': f'no {modality} scan'}]
            missing = reason or real[-1].get('reason')
            if missing:
                rows.append(row | {'reason': missing})
            else:
                rows.append(attempt(volumes_of_generated, run, modality, segment, by, limit, **row))
    return rows

def volumes_of_generated(run, modality, segment, by, limit):
    """What generated_rows says of one modality."""
    drawn = []
    for volume in islice(read_generated(run.generated, modality), limit):
        segmentation = segment(volume[0, 0].clamp(0, 1).numpy(), run.sessions.voxel_mm)
        drawn.append(structure_volumes(segmentation, run.sessions.voxel_mm, by))
    real = [scan['mm3_truth'] for scan in run.anatomy[modality]]
    return {'generated': by_structure(drawn), 'real': by_structure(real)}

def by_structure(volumes):
    """{structure: mm3 of each} of a list of {structure: mm3}."""
    table = {}
    for name in MERGED:
        table[name] = [one[name] for one in volumes]
    return table

def volume_boxes(rows, structures):
    """For figures.boxes: volumes in cm3 of each structure, the truth of each modality, then each row's."""
    panels = {}
    for name in structures:
        truth, others = {}, []
        for row in rows:
            if 'reason' in row: continue
            modality, scans = row['modality'], row['scans']
            truth.setdefault(f'{modality}\nground truth', [scan['mm3_truth'][name] / 1000 for scan in scans])
            others.append((f"{modality}\n{row['row']}", [scan['mm3'][name] / 1000 for scan in scans]))
        if others:
            panels[name] = [*truth.items(), *others]
    return panels
