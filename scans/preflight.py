"""A look at every scan as it is, before any mask or registration and before data are made: prepare.py --dry_run=True."""
import os
import zlib
from collections import Counter, defaultdict

import numpy as np

from judge import figures
from scans import nifti
from common import make_out_dir, markdown_table, write_text

SMALL = (40, 48, 40)  # voxels of 4.5 mm: what contact sheets show and modalities are told apart by
COLUMNS = (
    'subject', 'session', 'modality', 'orientation', 'spacing_mm', 'shape', 'low', 'median', 'high',
    'background', 'brain_mm', 'outside_box', 'same_grid', 'path'
)

def examine(s, job):
    """Facts of one session's scans: list of dicts with COLUMNS, 'checksum' and 'small', or with 'reason' where one cannot be used."""
    subject, session, scans = job
    rows, first = [], None
    for modality, path in sorted(scans.items()):
        row = {'subject': subject, 'session': session, 'modality': modality, 'path': path}
        rows.append(row)
        try:
            volume, affine, native = nifti.read(path)
            mask, estimated = nifti.brain_mask(volume)
            (small,), _ = nifti.conform([volume], [affine], SMALL, 4.5, masks=[mask])
        except ValueError as e:
            row['reason'] = str(e.args[0])
            continue
        with open(nifti.file_of(path), 'rb') as f:
            row['checksum'] = zlib.crc32(f.read())
        low, median, high = np.percentile(volume[mask], (0.5, 50, 99.5))
        where = [np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis))) for axis in range(3)]
        size = [(w[-1] - w[0] + 1) * v for w, v in zip(where, np.sqrt((affine[:3, :3] ** 2).sum(0)))]
        grid, first = (volume.shape, affine.round(3).tolist()), first or (
            volume.shape,
            affine.round(3).tolist(),
        )
        outside = not s['resize'] and any(v > n * s['spacing_mm'] for v, n in zip(size, s['shape']))
        row |= {
            'orientation': native.orientation,
            'spacing_mm': 'x'.join(f'{v:.3g}' for v in native.spacing_mm),
            'shape': 'x'.join(map(str, native.shape)),
            'low': f'{low:.4g}',
            'median': f'{median:.4g}',
            'high': f'{high:.4g}',
            'background': 'estimated' if estimated else 'zero',
            'brain_mm': 'x'.join(f'{v:.0f}' for v in size),
            'outside_box': 'yes' if outside else '',
            'same_grid': 'yes' if grid == first else 'no',
            'small': small.astype(np.float16),
        }
    return rows

def suspects(rows):
    """Scans that look more like another modality's mean than like their own's, the scan itself left out: list of lines.

    Heads are compared with heads and brains with brains, from 5 scans of a modality on.
    """
    lines = []
    for background in ('zero', 'estimated'):
        images = defaultdict(list)
        for row in rows:
            if row['background'] == background:
                images[row['modality']].append((row['path'], row['small'].astype(np.float64)))
        totals = {m: sum(x for _, x in these) for m, these in images.items() if len(these) >= 5}
        for own in totals if len(totals) > 1 else ():
            for path, x in images[own]:
                inside = x > 0
                like = {
                    m: np.corrcoef(x[inside], ((total - x) if m == own else total)[inside])[0, 1]
                    for m, total in totals.items()
                }
                best = max(like, key=like.get)
                if like[best] > like[own] + 0.05:
                    lines.append(
                        f'{path}: named {own}, looks like {best} (correlation {like[best]:.2f} against'
                        f' {like[own]:.2f})'
                    )
    return lines

def show(s, rows, notes):
    """Print the summary and what is odd; write scans.tsv and a contact sheet per modality into out_dir/preflight."""
    rows = sorted(rows, key=lambda r: (r['subject'], r['session'], r['modality']))
    good, bad = [r for r in rows if 'reason' not in r], [r for r in rows if 'reason' in r]
    folder = os.path.join(s['out_dir'], 'preflight')
    make_out_dir(folder)
    found = sorted({r['modality'] for r in rows})
    subjects, sessions = {r['subject'] for r in rows}, {(r['subject'], r['session']) for r in rows}
    print(
        f'{len(subjects)} subjects, {len(sessions)} sessions, {len(rows)} scans, {len(bad)} of them'
        ' unusable\n'
    )
    lines = []
    for m in found:
        these = [r for r in good if r['modality'] == m]
        common = lambda key: ', '.join(f'{k} {n}' for k, n in Counter(r[key] for r in these).most_common(3))
        span = (
            f"{min(float(r['low']) for r in these):.4g} to {max(float(r['high']) for r in these):.4g}"
            if these
            else ''
        )
        lines.append([
            m,
            sum(r['modality'] == m for r in rows),
            common('orientation'),
            common('spacing_mm'),
            common('shape'),
            span,
            *(
                sum(r[key] == value for r in these)
                for key, value in (('background', 'zero'), ('same_grid', 'no'), ('outside_box', 'yes'))
            ),
        ])
    print(
        '\n'.join(
            markdown_table(
                [
                    'modality', 'scans', 'orientations', 'spacings, mm', 'shapes',
                    'intensities, 0.5 to 99.5 %', 'zero background', 'another grid', 'outside the box'
                ],
                lines,
            )
        )
    )
    same = defaultdict(list)
    for r in good:
        same[r['checksum']].append(r['path'])
    present = defaultdict(set)
    for r in good:
        present[r['subject'], r['session']].add(r['modality'])
    lacking = [
        f"{a} {b}: no {', '.join(m for m in found if m not in has)}"
        for (a, b), has in sorted(present.items())
        if len(has) < len(found)
    ]
    for title, lines in (
        ('unusable', [r['reason'] for r in bad]),
        ('the same bytes', [' = '.join(paths) for paths in same.values() if len(paths) > 1]),
        ('sessions without a modality', lacking),
        ('perhaps another modality', suspects(good)),
        ('larger than the box', [f"{r['path']}: {r['brain_mm']} mm" for r in good if r['outside_box']]),
        ('files not used', notes),
    ):
        if not lines: continue
        print('\n'.join([f'\n{len(lines)} {title}:', *[f'  {line}' for line in lines[:50]]]))
        if len(lines) > 50:
            print(f'  and {len(lines) - 50} more')
    table = [COLUMNS, *[[str(r.get(c, '')) for c in COLUMNS] for r in good]]
    write_text(os.path.join(folder, 'scans.tsv'), ''.join('\t'.join(line) + '\n' for line in table))
    for m in found:
        small = [(f"{r['subject']} {r['session']}", r['small']) for r in good if r['modality'] == m]
        figures.contact_sheet(os.path.join(folder, f'{m}.png'), small[:120])
    print(f"\n{os.path.join(folder, 'scans.tsv')}; nothing else was written")
