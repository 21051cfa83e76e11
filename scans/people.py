"""Tables that people keep: read whatever their commas, tabs and encodings; sex and age per subject or visit.

A person is a dict of 'sex' (M, F), 'age' (years) and 'split', without what is not known. Tables of persons
have the keys subject and (subject, session); what is known of a visit counts more.
"""
import csv
import io
import math
import os
import re
from collections import Counter, defaultdict

SEXES = {'m': 'M', 'male': 'M', 'man': 'M', 'f': 'F', 'female': 'F', 'woman': 'F'}
NOT_KNOWN = ('', 'n/a', 'na', 'nan', 'none', 'null', 'unknown', 'missing', '.', '-', '?', 'inf', '-inf')
COLUMNS = {  # other names of columns, in small letters
    'subject': ('subject', 'participant_id', 'participant', 'subject_id', 'subjectid', 'sub', 'id'),
    'session': ('session', 'session_id', 'ses', 'visit', 'visit_id', 'timepoint'),
    'sex': ('sex', 'gender'),
    'age': ('age', 'age_at_scan', 'age_years', 'age_at_visit', 'age (years)'),
    'age_months': ('age_months', 'age_in_months', 'age (months)', 'age_at_scan_months', 'interview_age'),
}

# ---------------------------------------------------------------- tables

def decoded(content):
    """Bytes of a table as text: UTF-8 or UTF-16 with or without a mark, else Windows' Latin letters."""
    if content[:2] in (b'\xff\xfe', b'\xfe\xff'): return content.decode('utf-16', 'replace')
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError:
        return content.decode('cp1252', 'replace')

def read_table(path):
    """Rows of a table as dicts of stripped texts; commas, semicolons or tabs, whatever its name says.

    Blank lines go. A short line's last values are ''; what is beyond the last column goes.
    """
    try:
        with open(path, 'rb') as f:
            text = decoded(f.read()).replace('\0', '')
        heading = next((line for line in text.splitlines() if line.strip()), '')
        likeliest = '\t' if path.lower().endswith('.tsv') else ','
        separator = max((likeliest, '\t', ';', ','), key=heading.count)
        lines = list(csv.reader(io.StringIO(text, newline=''), delimiter=separator, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f'{path}: cannot read this table ({e})')
    rows, names = [], []
    for line in lines:
        values = [value.strip() for value in line]
        if not any(values): continue
        if names:
            row = dict(zip(names, values + [''] * len(names)))
            row.pop('', None)
            rows.append(row)
        else:
            names = values
    return rows

def column_of(rows, name):
    """The name that a table's column has, '' where there is none: as given, else in other letters."""
    if not rows or name in rows[0]: return name if rows else ''
    for other in (name.lower(), *COLUMNS.get(name, ())):
        for column in rows[0]:
            if column.lower() == other: return column
    return ''

def columns_of(rows, *names):
    """Rows with the columns of these names alone, under these names; '' where a table has none."""
    columns, found = [column_of(rows, name) for name in names], []
    for row in rows:
        values = [row.get(column, '') for column in columns]
        found.append(dict(zip(names, values)))
    return found

# ---------------------------------------------------------------- sex and age

class Unread:
    """What of the tables could not be read, as lines for the report."""
    def __init__(self):
        self.values = defaultdict(Counter)

    def add(self, table, column, text, hint):
        self.values[table, column, hint][text] += 1

    def lines(self):
        lines = []
        for (table, column, hint), texts in self.values.items():
            examples = ', '.join(f'{text!r}' for text, _ in texts.most_common(5))
            lines.append(f'{table}: {column} {examples} of {sum(texts.values())} rows: {hint}')
        return lines

def sex_of(text, codes, table, unread):
    """'M', 'F' or '' of a table's text."""
    text = codes.get(text, text)
    if text.lower() in NOT_KNOWN or text.lower() in ('o', 'other'): return ''
    if text.lower() in SEXES: return SEXES[text.lower()]
    unread.add(table, 'sex', text, 'not known; say what the values mean, such as --sex_codes=1=M,2=F')
    return ''

def age_of(text, table, unread):
    """The age in years as text, '' where it is not known; bands such as 26-30 and 89+ stay as they are.

    18 months and 18mo are 1.5.
    """
    if text.lower() in NOT_KNOWN: return ''
    months = re.fullmatch(r'(\d+(?:[.,]\d*)?)\s*(?:mo|mos|months?)', text, re.IGNORECASE)
    if months: return f"{float(months[1].replace(',', '.')) / 12:.4g}"
    number = re.fullmatch(r'(.*\d)\s*(?:y|yr|yrs|years?)', text, re.IGNORECASE)
    number = (number[1] if number else text).replace(',', '.')
    try:
        years = float(number)
    except ValueError:
        if re.fullmatch(r'\d+\s*-\s*\d+|[<>]?\s*\d+\s*\+?', text):
            unread.add(table, 'age', text, 'a band, no number; training takes it as not known')
            return text
        years = -1.0
    if math.isfinite(years) and 0 <= years <= 130:
        return number if number == text else f'{years:g}'
    if not math.isnan(years) and abs(years) != math.inf:
        unread.add(table, 'age', text, 'not an age in years; taken as not known')
    return ''

def with_months(text):
    """A number of months with its unit, for age_of."""
    return text if text.lower() in NOT_KNOWN else f'{text} months'

def known(**person):
    return {name: value for name, value in person.items() if value}

def person_of(layers, subject, session):
    """What is known of a subject at a session; later layers count more."""
    person = {}
    for persons in layers:
        person |= persons.get(subject, {}) | persons.get((subject, session), {})
    return person

def visit_of(text, subject, sessions):
    """The session of a subject that a table's text names, '' where there is none."""
    names = sorted(name for person, name in sessions if person == subject)
    for name in (text, f'ses-{text}'):
        if name in names: return name
    plain = re.sub(r'^ses-?|[^a-z0-9]', '', text.lower())
    same = [name for name in names if re.sub(r'^ses-?|[^a-z0-9]', '', name.lower()) == plain]
    if not same and plain.isdigit():
        same = [name for name in names if re.sub(r'\D', '', name).lstrip('0') == plain.lstrip('0')]
    return same[0] if len(same) == 1 else ''

def collect(rows, table, sessions, unread, codes=None):
    """Persons of a table. rows: dicts of subject (as found), session, sex and age; sessions: those found.

    Of several rows of a subject, each counts for its visit; of the sex, the first counts for all visits.
    """
    rows_of, persons = defaultdict(list), {}
    for row in rows:
        rows_of[row['subject']].append(row)
    for subject, own in rows_of.items():
        for row in own:
            person = known(sex=sex_of(row.get('sex', ''), codes or {}, table, unread),
                           age=age_of(row.get('age', ''), table, unread))
            visit = visit_of(row['session'], subject, sessions) if row.get('session') else ''
            if visit:
                persons.setdefault((subject, visit), person)
                persons.setdefault(subject, known(sex=person.get('sex')))
            elif len(own) == 1:
                persons[subject] = person
            elif row.get('session'):
                unread.add(table, 'session', row['session'], 'no such visit was found; its age is not used')
            else:
                first = persons.setdefault(subject, person)
                if first != person:
                    hint = 'several rows, and no column session for their ages; the first is used'
                    unread.add(table, 'subject', subject, hint)
    return persons

# ---------------------------------------------------------------- tables of BIDS, and spreadsheets

def read_bids_tables(root, sessions, notes, unread):
    """Persons of participants.tsv and of every sub-*/sub-*_sessions.tsv; a bad table is noted."""
    persons = {}
    subjects = sorted({subject for subject, _ in sessions})
    for subject in ('', *subjects):
        name = f'{subject}/{subject}_sessions.tsv' if subject else 'participants.tsv'
        table = os.path.join(root, name)
        if not os.path.exists(table): continue
        try:
            rows = read_table(table)
        except SystemExit as e:
            notes.append(str(e))
            continue
        if not subject and rows and not column_of(rows, 'subject'):
            notes.append(f'{table}: no column participant_id')
            continue
        own = columns_of(rows, 'subject', 'session', 'sex', 'age', 'age_months')
        for row in own:
            if row['age_months'] and not row['age']:
                row['age'] = with_months(row['age_months'])
            row['subject'] = subject or 'sub-' + row['subject'].removeprefix('sub-')
        own = [row for row in own if row['subject'] in subjects]
        for key, person in collect(own, table, sessions, unread).items():
            persons[key] = persons.get(key, {}) | person
    return persons

def read_people(table, columns, sex_codes, subjects, sessions=(), unread=None):
    """Persons of a spreadsheet saved as .csv or .tsv; SystemExit if no row fits.

    columns: its names for subject, sex and age; a column session (or visit) tells visits apart. sex_codes:
    such as ('1=M', '2=F'). An id that is a number stands for the one subject whose name holds that number.
    """
    rows = read_table(table)
    if not all(code.count('=') == 1 for code in sex_codes):
        raise SystemExit(f'--sex_codes={",".join(sex_codes)}: such as 1=M,2=F')
    codes = dict(code.split('=') for code in sex_codes)
    if len(columns) != 3:
        raise SystemExit(f'--columns={columns}: three names, of subject, sex and age')
    names = {}
    for kind, column in zip(('subject', 'sex', 'age'), columns):
        exact = [name for name in (rows[0] if rows else ()) if name.lower() == column.strip().lower()]
        if rows and not exact:
            present = ', '.join(map(repr, rows[0]))
            raise SystemExit(f"{table}: no column '{column}'; it has {present}; name yours by --columns")
        names[kind] = column if column in exact or not exact else exact[0]
    names['session'] = column_of(rows, 'session')
    by_number = defaultdict(list)
    for subject in subjects:
        by_number[int(re.sub(r'\D', '', subject) or -1)].append(subject)
    own = []
    for row in rows:
        person = row[names['subject']]
        found = [name for name in (person, f'sub-{person}') if name in subjects]
        if not found and person.isascii() and person.isdigit():
            found = by_number[int(person)]
        if len(found) == 1:
            values = {kind: row.get(name, '') for kind, name in names.items()}
            if 'month' in names['age'].lower() or names['age'].lower() in COLUMNS['age_months']:
                values['age'] = with_months(values['age'])
            own.append(values | {'subject': found[0]})
    if not own:
        example = next(iter(sorted(subjects)), '(none)')
        raise SystemExit(f'{table}: none of its rows is of a subject that was found, such as {example}')
    return collect(own, table, sessions, unread or Unread(), codes)
