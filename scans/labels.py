"""Label maps as FreeSurfer and its relatives write them: whole numbers, parcels as parts of structures."""
import os
import re
from collections import defaultdict

import numpy as np

from scans import nifti
from scans.files import clean, every_scan, stem
from scans.folders import (
    GENERIC, NO_SCAN, TEMPLATE, Found, Longitudinal, better_by_file, mark_persons, tell_apart)

# (first, last, structure): the parcels of FreeSurferColorLUT.txt, left and right
PARCELS = [
    (1000, 1999, 3), (2000, 2999, 42),      # cortex, by Desikan-Killiany
    (3000, 3999, 2), (4000, 4999, 41),      # the white matter below it, of wmparc
    (5001, 5001, 2), (5002, 5002, 41),      # white matter without a parcel
    (11100, 11199, 3), (12100, 12199, 42),  # cortex, by Destrieux
    (13100, 13199, 2), (14100, 14199, 41),
    (8100, 8199, 10), (8200, 8299, 49),     # nuclei of the thalamus
    (801, 805, 28), (806, 810, 60),         # hypothalamus
    (170, 179, 16),                         # parts of the brain stem
    (78, 78, 2), (79, 79, 41), (81, 81, 2), (82, 82, 41),  # spots in the white matter
    (601, 601, 8), (602, 602, 47), (603, 603, 8), (604, 604, 47),  # lobules of the cerebellum
    *[(n, n, 47 if (n - 605) % 3 == 2 else 8) for n in range(605, 629)]]
DEEP = (4, 5, 7, 8, 10, 11, 12, 13, 16, 17, 18, 26, 28)  # and right: structures that a map of tissues lacks
DEEP_RIGHT = (43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60)
OUTSIDE = range(500, 600)  # head tissue in the maps of SynthSeg

def structures(values):
    """Label map (D,H,W), perhaps scaled by a slope -> int16 with parcels as their structures, and doubts.

    ValueError where values are no whole numbers, or are beyond any label.
    """
    labels = np.rint(values)
    if np.mean(np.abs(values - labels) > 0.25) > 0.001:
        raise ValueError('its values are no whole numbers: not a label map')
    if labels.min() < 0 or labels.max() > 32767:
        raise ValueError(f'labels from {labels.min():.0f} to {labels.max():.0f}: '
                         'FreeSurfer numbers are expected')
    labels = labels.astype(np.int16)
    table, sizes = np.arange(32768, dtype=np.int16), np.bincount(labels.ravel())
    for first, last, structure in PARCELS:
        table[first:last + 1] = structure
    present = np.flatnonzero(sizes)
    odd = [int(label) for label in present if table[label] >= 500 and label not in OUTSIDE]
    doubts = []
    if odd:
        share = sizes[odd].sum() / max(sizes[1:].sum(), 1)
        doubts.append(f'labels {odd[:10]}, {share:.1%} of its voxels, are taken as outside the brain')
    return table[labels], doubts

def count_structures(path):
    """How many deep structures a map holds; -1 where it cannot be read."""
    try:
        present = np.unique(structures(nifti.read(path)[0])[0])
    except ValueError:
        return -1
    return int(np.isin(present, DEEP + DEEP_RIGHT).sum())

def subjects_of(paths, root):
    """{path: subject}: the first word of a map's name, or what names and folders say where it names none."""
    groups, subjects = defaultdict(list), {}
    read_as = Longitudinal(paths, root).read_as
    for path in paths:
        groups[stem(os.path.basename(path)).split('_')[0]].append(Found(path, root, read_as))
    for word, files in groups.items():
        if set(re.split(r'[+.-]', re.sub(r'\d+$', '', word.lower()))) & NO_SCAN:  # 01/aseg, 01/seg4
            mark_persons(files)
            for file in files:
                file.assign(by_file=False)
            tell_apart([file for file in files if file.short_is_person])
        elif shared(word, files, len(groups)):
            by_file = better_by_file(files)
            for file in files:
                file.assign(by_file)
                file.subject = with_number(file)
        else:
            for file in files:
                file.subject = word
        for file in files:
            subjects[file.path] = file.subject or word
    return subjects

def shared(word, files, n_words):
    """Whether several persons share the first word of their maps' names: subj_01 and subj_02.

    Their names are of one form, and differ in numbers. P1_1 and P1_2 beside P2_1 are visits of P1.
    """
    forms = {re.sub(r'\d+', '#', os.path.basename(file.path)) for file in files}
    if len(forms) == len(files): return False
    persons = n_words > 1 and re.search(r'\d', word) and not GENERIC.fullmatch(word)
    return not persons or any(file.known for file in files)

def with_number(file):
    """A subject up to its last number: subj_01 of subj_01_glm, training_01 of training_seg_01."""
    numbered = re.match(r'.*\d[^-_. ]*', file.subject)
    if numbered and not file.known: return numbered[0]
    if GENERIC.fullmatch(file.subject):
        return '_'.join([file.subject, *re.findall(r'\d+', file.file.text)])
    return file.subject

def find_labelmaps(root, notes):
    """Label maps, one per subject: {subject: path}. Of several, the one with the most structures is taken."""
    paths, paths_of, maps = [], defaultdict(list), {}
    every_path = every_scan(root, notes)
    longitudinal = Longitudinal(every_path, root)
    for path in every_path:
        if longitudinal.is_template(path):
            notes.append(f'{path}: {TEMPLATE}')
        elif re.search(r'mask|probseg', os.path.basename(path).lower()):
            notes.append(f'{path}: a mask or probabilities by its name, no label map')
        else:
            paths.append(path)
    for path, subject in subjects_of(paths, root).items():
        try:
            paths_of[clean('subject', subject, path)].append(path)
        except SystemExit as e:
            notes.append(str(e))
    for subject, paths in paths_of.items():
        counts = [0] if len(paths) == 1 else list(map(count_structures, paths))
        best = int(np.argmax(counts))
        maps[subject] = paths[best]
        for path, count in zip(paths, counts):
            if path != paths[best]:
                notes.append(f'{path}: another label map of {subject}, with {max(count, 0)} deep structures; '
                             f'{paths[best]} with {counts[best]} is used')
    return maps
