"""What prepare.py says in the end of a data set, as text; and of its box and its subjects' names."""
import filecmp
import re
from collections import Counter, defaultdict

from scans.folders import SITE

# what may tell visits of a person apart: P001V2, P001_2, P001_B; longer numbers tell persons apart
VISIT_END = re.compile(r'(.*\d.*?)(?:(?:[-_.]|(?<=\d))(V\d{1,2})|[-_.](\d{1,2}|[A-Z]))', re.IGNORECASE)
MOST_VISITS = 6  # of a person, where there are fewer persons than that

def counted(pairs):
    return ', '.join(f'{name} {count}' for name, count in pairs)

def listed(title, items, most=None):
    """Lines of a titled list, none where it is empty."""
    if not items: return []
    more = len(items) - len(items[:most])
    return [title, *[f'  {item}' for item in items[:most]], *([f'  and {more} more'] if more else [])]

def by_commas(sizes):
    return ','.join(map(str, sizes))

def shape_warning(shape):
    """A line where the box is none that NeuroQuant takes, with the nearest one; else ''."""
    nearest = tuple(max(32, 16 * int(n / 16 + 0.5)) for n in shape)
    if nearest == tuple(shape): return ''
    return (f'warning: --shape={by_commas(shape)}: NeuroQuant takes axes that are multiples of 16, '
            f'from 32 on (a ConvVAE of 4 or 8); the nearest such box is {by_commas(nearest)}')

# ---------------------------------------------------------------- one person under several names

def spelt_plainly(subject):
    """A subject's name without what spelling changes: sub-P01 and sub-p1, sub-sub01 and sub-1.0 are alike."""
    text = subject.lower().removeprefix('sub-')
    text = re.sub(r'^sub(?:ject|j)?[-_]?(?=.)|\.0$', '', text)
    return re.sub(r'(?<!\d)0+(?=\d)', '', text)

def spelling_doubts(subjects):
    """A line, in a list, on names that differ in their spelling alone."""
    groups = defaultdict(list)
    for subject in sorted(subjects):
        groups[spelt_plainly(subject)].append(subject)
    groups = [' = '.join(names) for names in groups.values() if len(names) > 1]
    if not groups: return []
    more = f' and {len(groups) - 5} more' if len(groups) > 5 else ''
    return [f"{'; '.join(groups[:5])}{more}: these names may mean one person; now they count as several, "
            'and may be in different splits; spell them alike']

def visit_doubts(subjects):
    """A line, in a list, where most names differ only in an end as visits have: P001_1 and P001_2.

    Not where the end numbers persons: sub_1 and sub_2, or the many persons of each of a few sites.
    """
    names_of, ends = defaultdict(list), {}
    for subject in sorted(subjects):
        match = VISIT_END.fullmatch(subject.removeprefix('sub-'))
        if match and not SITE.fullmatch(match[1]):
            names_of[match[1]].append(subject)
            ends[subject] = match[2] or match[3]
    groups = {person: names for person, names in names_of.items() if len(names) > 1}
    members = [subject for names in groups.values() for subject in names]
    if 2 * len(members) <= len(subjects): return []
    if len(names_of) == 1 and any(ends[subject].isdigit() for subject in members): return []
    if max(map(len, groups.values())) > max(MOST_VISITS, len(names_of)): return []
    person, names = next(iter(groups.items()))
    first, second, *_ = names
    more = f' and {len(members) - 2} more' if len(members) > 2 else ''
    better = f'{person}_ses-{ends[first]} and {person}_ses-{ends[second]}'
    return [f'{first}, {second}{more}: these names may mean visits of one person; now they count as '
            f'persons, and may be in different splits; if they are visits, name them {better}, or give '
            'a --pattern with {session}, or of a table a column session']

def name_doubts(subjects):
    """Lines on names of subjects that may mean one person."""
    return spelling_doubts(subjects) + visit_doubts(subjects)

def copy_doubts(facts, out_dir):
    """Lines on volumes in out_dir that two subjects share. facts: of sessions."""
    volumes_of, lines = defaultdict(list), []
    for f in facts:
        for name, checksum in f['checksums'].items():
            volumes_of[checksum].append((f['subject'], name))
    for (subject, name), *others in volumes_of.values():
        for other, copy in others:
            # a checksum may be that of different volumes
            if other != subject and filecmp.cmp(f'{out_dir}/{name}', f'{out_dir}/{copy}', shallow=False):
                lines.append(f'{subject} and {other} have the same volume ({name} = {copy}): one person '
                             'under two names, or a copy; they may be in different splits; name them '
                             'alike or take one out')
    return lines

# ---------------------------------------------------------------- the report

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
