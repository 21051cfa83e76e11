"""A look at every scan as it is, before masks, registration and data are made: prepare.py --dry_run=True."""
import zlib
from collections import Counter, defaultdict

import numpy as np
from nibabel.affines import voxel_sizes

from common import markdown_table
from scans import brain, nifti
from scans.files import tsv

SMALL = (40, 48, 40)  # voxels of 4.5 mm: what contact sheets show and modalities are told apart by
COLUMNS = ('subject', 'session', 'modality', 'orientation', 'spacing_mm', 'shape', 'low', 'median', 'high',
           'background', 'brain_mm', 'outside_box', 'same_grid', 'path')

def examine(subject, session, scans, box_mm):
    """A session's scans {modality: path} as rows, dicts of COLUMNS as text.

    With them: checksum, of the file; small, the scan in SMALL voxels. A scan that cannot be used has a reason
    instead. box_mm: size of the box per axis, () where every brain fits.
    """
    rows, first_grid = [], None
    for modality, path in sorted(scans.items()):
        row = {'subject': subject, 'session': session, 'modality': modality, 'path': path}
        rows.append(row)
        try:
            volume, affine, native = nifti.read(path)
            sizes = voxel_sizes(affine)
            mask, estimated = brain.brain_mask(volume, sizes)
            (small,), _ = nifti.conform([volume], [affine], SMALL, 4.5, masks=[mask])
        except ValueError as e:
            reason = str(e.args[0])
            row['reason'] = reason if reason.startswith(path) else f'{path}: {reason}'
            continue
        inner = brain.inner_region(mask, sizes) if estimated else mask
        sized = (brain.size_doubt(mask, sizes, estimated), brain.cut_doubt(mask, estimated))
        with open(nifti.file_of(path), 'rb') as f:
            row['checksum'] = zlib.crc32(f.read())
        low, median, high = np.percentile(volume[inner], (0.5, 50, 99.5))
        brain_mm = [(b.stop - b.start) * v for b, v in zip(nifti.bounds(mask), sizes)]
        outside = any(size > box for size, box in zip(brain_mm, box_mm))
        grid = (volume.shape, affine.round(3).tolist())
        first_grid = first_grid or grid
        row |= {
            'orientation': native.orientation,
            'spacing_mm': 'x'.join(f'{v:.3g}' for v in native.spacing_mm),
            'shape': 'x'.join(map(str, native.shape)),
            'low': f'{low:.4g}',
            'median': f'{median:.4g}',
            'high': f'{high:.4g}',
            'background': 'estimated' if estimated else 'zero',
            'brain_mm': 'x'.join(f'{v:.0f}' for v in brain_mm),
            'outside_box': 'yes' if outside else '',
            'same_grid': 'yes' if grid == first_grid else 'no',
            'small': small.astype(np.float16),
            'doubts': [f'{path}: {line}' for line in (*native.doubts, *sized) if line],
        }
    return rows

def usable(rows):
    return [row for row in rows if 'reason' not in row]

def modalities_of(rows):
    return sorted({row['modality'] for row in rows})

def suspects(rows):
    """A line per scan that looks more like another modality's mean than like its own's, itself left out.

    Heads are compared with heads and brains with brains, from 5 scans of a modality on.
    """
    lines = []
    for background in ('zero', 'estimated'):
        images = defaultdict(list)
        for row in rows:
            if row['background'] == background:
                images[row['modality']].append((row['path'], row['small'].astype(np.float64)))
        totals = {}
        for m, pairs in images.items():
            if len(pairs) >= 5:
                totals[m] = sum(x for _, x in pairs)
        if len(totals) < 2: continue
        for named in totals:
            for path, x in images[named]:
                inside, r = x > 0, {}  # r: correlation with each modality
                for m, total in totals.items():
                    others = total - x if m == named else total
                    r[m] = np.corrcoef(x[inside], others[inside])[0, 1]
                best = max(r, key=r.get)
                if r[best] > r[named] + 0.05:
                    lines.append(f'{path}: named {named}, looks like {best} '
                                 f'(correlation {r[best]:.2f} against {r[named]:.2f})')
    return lines

def summary(rows):
    """Lines of a markdown table: per modality what its scans share, and how many are odd."""
    head = ['modality', 'scans', 'orientations', 'spacings, mm', 'shapes', 'intensities, 0.5 to 99.5 %',
            'zero background', 'another grid', 'outside the box']
    lines = []
    for m in modalities_of(rows):
        group = [row for row in rows if row['modality'] == m]
        good = usable(group)
        line = [m, len(group)]
        for column in ('orientation', 'spacing_mm', 'shape'):
            commonest = Counter(row[column] for row in good).most_common(3)
            line.append(', '.join(f'{value} {count}' for value, count in commonest))
        lows, highs = [float(row['low']) for row in good], [float(row['high']) for row in good]
        line.append(f'{min(lows):.4g} to {max(highs):.4g}' if good else '')
        for column, value in (('background', 'zero'), ('same_grid', 'no'), ('outside_box', 'yes')):
            line.append(sum(row[column] == value for row in good))
        lines.append(line)
    return markdown_table(head, lines)

def report(rows, notes, doubts=()):
    """The summary and what is odd, as text. rows: of all sessions, sorted; notes: lines on files left out.

    doubts: lines on names and tables.
    """
    good = usable(rows)
    copies, present = defaultdict(list), defaultdict(set)
    for row in good:
        copies[row['checksum']].append(row['path'])
        present[row['subject'], row['session']].add(row['modality'])
    lacking = []
    for (subject, session), modalities in present.items():
        absent = [m for m in modalities_of(rows) if m not in modalities]
        if absent:
            lacking.append(f'{subject} {session}: no {", ".join(absent)}')
    findings = {
        'unusable': [row['reason'] for row in rows if 'reason' in row],
        'the same bytes': [' = '.join(paths) for paths in copies.values() if len(paths) > 1],
        'sessions without a modality': lacking,
        'perhaps another modality': suspects(good),
        'larger than the box': [f"{row['path']}: {row['brain_mm']} mm" for row in good if row['outside_box']],
        'raw heads, or without a zero background': [row['path'] for row in good
                                                    if row['background'] == 'estimated'],
        'odd headers or sizes': [line for row in good for line in row['doubts']],
        'names and tables to look at': doubts,
        'files not used': notes,
    }
    subjects = {row['subject'] for row in rows}
    sessions = {(row['subject'], row['session']) for row in rows}
    text = [f'{len(subjects)} subjects, {len(sessions)} sessions, {len(rows)} scans, '
            f'{len(rows) - len(good)} of them unusable', '', *summary(rows)]
    for title, lines in findings.items():
        if not lines: continue
        text += ['', f'{len(lines)} {title}:', *[f'  {line}' for line in lines[:50]]]
        if len(lines) > 50:
            text.append(f'  and {len(lines) - 50} more')
    return '\n'.join(text)

def table(rows):
    """scans.tsv as text: COLUMNS of every scan that can be used."""
    return tsv([COLUMNS, *[map(row.get, COLUMNS) for row in usable(rows)]])

def contact_sheets(rows):
    """{modality: up to 120 (heading, small volume)}, to be drawn."""
    sheets = {m: [] for m in modalities_of(rows)}
    for row in usable(rows):
        sheets[row['modality']].append((f"{row['subject']} {row['session']}", row['small']))
    return {m: sheet[:120] for m, sheet in sheets.items()}
