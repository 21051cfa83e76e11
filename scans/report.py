"""What prepare.py says in the end of a data set, as text."""
from collections import Counter

def counted(pairs):
    return ', '.join(f'{name} {count}' for name, count in pairs)

def listed(title, items, most=None):
    """Lines of a titled list, none where it is empty."""
    if not items: return []
    more = len(items) - len(items[:most])
    return [title, *[f'  {item}' for item in items[:most]], *([f'  and {more} more'] if more else [])]

def report(facts, rows, notes, doubts=()):
    """The closing report. facts: of all sessions; rows: of subjects.tsv; notes: on files left out.

    doubts: on names and tables.
    """
    scans = Counter(m for f in facts for m in f['files'] if m != 'dseg')
    orientations = Counter(code for f in facts for code in f['orientation'].values())
    spacings = Counter(mm for f in facts for mm in f['spacing'].values())
    cropped = [(f['lost'], f"{f['subject']} {f['session']}") for f in facts if f['lost'] > 0]
    estimated = [path for f in facts for path in f['estimated']]
    moved = [f"{f['subject']} {f['session']}: {line}" for f in facts for line in f['registered']]
    odd = [line for f in facts for line in f['doubts']]
    failed = sum('NOT USED' in line for line in moved)
    skipped = [line for f in facts for line in f['skipped']]
    splits = Counter(row['split'] for row in rows)
    parts = {part: splits[part] for part in ('train', 'val', 'test')}
    lines = [f"{len({row['subject'] for row in rows})} subjects, {len(rows)} sessions",
             f'scans: {counted(scans.items())}',
             f'sessions per split: {counted(parts.items())}',
             f"orientations found: {counted(orientations.most_common(8)) or 'phantoms'}",
             f"spacings found (mm): {counted(spacings.most_common(8)) or 'phantoms'}"]
    advice = 'give --split, more subjects, or a split column'
    lines += [f'warning: no subject in split {part}; {advice}' for part in parts if not parts[part]]
    if cropped:
        lost, session = max(cropped)
        lines.append(f'{len(cropped)} brains did not fit the box; most was lost of {session}: '
                     f'{lost:.1%} of its voxels')
    lines += listed(f'warning: {len(estimated)} scans are raw head scans or have no zero background; masked '
                    'by a threshold; better give --mask or --skullstrip:', estimated, 50)
    lines += listed(f'warning: the brain or the header of {len(odd)} scans is doubtful:', odd, 50)
    lines += listed('warning: names and tables to look at:', doubts, 50)
    lines += listed(f'{len(moved)} scans registered, {failed} of them without success:', moved, 50)
    lines += listed(f'{len(notes)} files not used:', notes, 50)
    lines += listed(f'{len(skipped)} scans skipped:', skipped) or ['no scan was skipped']
    return '\n'.join(lines) + '\n'

def rate(facts, size):
    """Speed, memory of a worker and size in bytes, and what they mean for 30,000 scans."""
    scans = sum(len(set(f['files']) - {'dseg'}) for f in facts)
    seconds = sum(f['seconds'] for f in facts)
    peaks = [f['peak_mib'] for f in facts if 'peak_mib' in f]  # not in folders of an earlier version
    memory = f', at most {max(peaks)} MiB per worker' if peaks else ''
    hours, gigabytes = 30000 * seconds / scans / 3600, 30000 * size / 1e9
    return (f'{scans / seconds:.2f} scans/s per core{memory} and {size} bytes a scan: '
            f'30,000 scans would take {hours:.1f} core hours and {gigabytes:.0f} GB')
