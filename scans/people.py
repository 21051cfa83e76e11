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

SEX_OF = {'m': 'M', 'male': 'M', 'man': 'M', 'f': 'F', 'female': 'F', 'woman': 'F'}
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

class OpenQuote(Exception):
    """A value that goes on in the next line; most likely its quote is not closed, and it swallows rows."""

def values_of(text, separator, quoting=csv.QUOTE_MINIMAL):
    """Stripped values of each line of a table; OpenQuote, with the number of the line where one begins."""
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=separator, skipinitialspace=True,
                        quoting=quoting)
    lines, number = [], 1
    try:
        for line in reader:
            values = [value.strip() for value in line]
            if any(re.search('[\r\n]', value) for value in values): raise OpenQuote(number)
            if quoting == csv.QUOTE_NONE:
                values = [value.strip('"') for value in values]
            lines.append(values)
            number = reader.line_num + 1
    except csv.Error:
        if reader.line_num > number: raise OpenQuote(number)  # it is too long for a value
        raise
    return lines

def lines_of(path, text, separator):
    """Values of each line of a table. SystemExit for an open quote; in a .tsv it is a character."""
    try:
        return values_of(text, separator)
    except OpenQuote as e:
        if not path.lower().endswith('.tsv'):
            raise SystemExit(f'{path} line {e}: a value in quotes does not end in its line; '
                             'close its quote or take out its line break')
    return values_of(text, separator, csv.QUOTE_NONE)

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
        lines = lines_of(path, text, separator)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SystemExit(f'{path}: cannot read this table ({e})')
    rows, names = [], []
    for values in lines:
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
        self.others = []

    def add(self, table, column, text, hint):
        self.values[table, column, hint][text] += 1

    def lines(self):
        lines = []
        for (table, column, hint), texts in self.values.items():
            examples = ', '.join(f'{text!r}' for text, _ in texts.most_common(5))
            lines.append(f'{table}: {column} {examples} of {sum(texts.values())} rows: {hint}')
        return lines + self.others

def sex_of(text, codes, table, unread):
    """'M', 'F' or '' of a table's text."""
    text = codes.get(text, text)
    if text.lower() in NOT_KNOWN or text.lower() in ('o', 'other'): return ''
    if text.lower() in SEX_OF: return SEX_OF[text.lower()]
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
    """What is known of a subject at a session; later layers count more, but for ages of visits."""
    person = {}
    for persons in layers:
        person |= persons.get(subject, {}) | persons.get((subject, session), {})
    for persons in layers:  # of several visits, an age of this one counts more than one age for all
        age = persons.get((subject, session), {}).get('age')
        if age:
            person['age'] = age
    return person

def visit_of(text, names):
    """Which of a subject's sessions a table's text names, '' where it is none of them."""
    for name in (text, f'ses-{text}'):
        if name in names: return name
    plain = re.sub(r'^ses-?|[^a-z0-9]', '', text.lower())
    same = [name for name in names if re.sub(r'^ses-?|[^a-z0-9]', '', name.lower()) == plain]
    if not same and plain.isdigit():
        same = [name for name in names if number_in(name) == int(plain)]
    return same[0] if len(same) == 1 else ''

def number_in(name):
    """The number in a name that holds one, as 1 in sub-001; None where it holds none or several."""
    numbers = re.findall(r'[0-9]+', name)
    return int(numbers[0]) if len(numbers) == 1 else None

LATER = re.compile(r'(?i)[a-z]*[-_ ]?0*([2-9]|[1-9]\d)')  # such as ses-02, V2, M12: no first visit

class Visits:
    """The sessions that were found, by subject."""
    def __init__(self, sessions):
        self.names = defaultdict(list)
        for subject, name in sorted(sessions):
            self.names[subject].append(name)
        self.unnamed = {name for _, name in sessions} == {'ses-01'}  # a tree without sessions has these

    def find(self, subject, text, is_only_row):
        """The session that a row is of, '' where it is of none or of all.

        A subject's only row is of its only session, unless it names another one.
        """
        names = self.names.get(subject, [])
        visit = visit_of(text, names) if text else ''
        if visit or not is_only_row or len(names) != 1: return visit
        may_be = not text or self.unnamed and not LATER.fullmatch(text)
        return names[0] if may_be else ''

def collect(rows, table, visits, unread, codes=None):
    """Persons of a table. rows: dicts of subject (as found), session, sex and age; visits: Visits.

    Of several rows of a subject, each counts for its visit; the first known sex counts for all visits.
    """
    rows_of, persons = defaultdict(list), {}
    for row in rows:
        rows_of[row['subject']].append(row)
    for subject, own in rows_of.items():
        for row in own:
            person = known(sex=sex_of(row.get('sex', ''), codes or {}, table, unread),
                           age=age_of(row.get('age', ''), table, unread))
            session = row.get('session', '')
            session = '' if session.lower() in NOT_KNOWN else session
            visit = visits.find(subject, session, len(own) == 1)
            if visit:
                first = persons.setdefault((subject, visit), {})
                if any(first.get(name, value) != value for name, value in person.items()):
                    hint = 'rows of one visit differ; the first is used'
                    unread.add(table, 'subject', f'{subject} {visit}', hint)
                persons[subject, visit] = person | first
            elif session:
                if 'age' in person:
                    unread.add(table, 'session', session, 'no such visit was found; its age is not used')
            elif len(own) == 1:
                persons[subject] = person
            else:
                first = persons.setdefault(subject, person)
                if first != person:
                    hint = 'several rows, and no column session for their ages; the first is used'
                    unread.add(table, 'subject', subject, hint)
            if 'sex' in person:
                persons.setdefault(subject, {}).setdefault('sex', person['sex'])
    for subject in rows_of:
        keys = [subject, *[(subject, visit) for visit in visits.names.get(subject, ())]]
        if {persons.get(key, {}).get('sex') for key in keys} >= {'F', 'M'}:
            unread.add(table, 'subject', subject, 'F at one visit and M at another; each visit keeps its own')
    return persons

def whole_number(text):
    """An id as it was before a spreadsheet made 1.0 of 1."""
    return re.sub(r'^(\d+)\.0$', r'\1', text)

def subjects_of(ids, subjects):
    """{id: subject} of a table's ids, without those of nobody.

    A number stands for the one subject whose name ends in it and holds no other, as a spreadsheet makes 1 of
    001, unless a row has that name itself. In sub-3T the 3 is no person's number.
    """
    by_number, names = defaultdict(list), {}
    for subject in subjects:
        if subject[-1].isdigit():
            by_number[number_in(subject)].append(subject)
    for text in ids:
        for name in (f'sub-{text}', text):
            if name in subjects:
                names[text] = name
    exact = set(names.values())
    for text in ids:
        number = whole_number(text)
        if text in names or not (number.isascii() and number.isdigit()): continue
        same = by_number.get(int(number), [])
        if len(same) == 1 and same[0] not in exact:
            names[text] = same[0]
    return names

def misfits(table, ids, subjects, names):
    """A line on rows of nobody and subjects without a row, in a list; names: of subjects_of."""
    strangers = [text for text in ids if text not in names]
    lacking = sorted(set(subjects) - set(names.values()))
    parts = []
    if strangers:
        parts.append(f'{len(strangers)} of {len(ids)} rows are of no subject that was found, such as '
                     f'{strangers[0]!r}')
    if lacking:
        parts.append(f'{len(lacking)} of {len(subjects)} subjects have no row, such as {lacking[0]}')
    return [f"{table}: {'; '.join(parts)}"] if parts else []

# ---------------------------------------------------------------- tables of BIDS, and spreadsheets

def read_bids_tables(root, sessions, notes, unread):
    """Persons of participants.tsv and of every sub-*/sub-*_sessions.tsv; a bad table is noted."""
    persons, visits = {}, Visits(sessions)
    subjects = {subject for subject, _ in sessions}
    for subject in ('', *sorted(subjects)):
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
        ids = [row['subject'] for row in own]
        names = {} if subject else subjects_of(ids, subjects)
        if not subject:
            unread.others += misfits(table, ids, subjects, names)
        for row in own:
            row['subject'] = subject or names.get(row['subject'], '')
        own = [row for row in own if row['subject']]
        for key, person in collect(own, table, visits, unread).items():
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
    ids = [row[names['subject']] for row in rows]
    subject_names = subjects_of(ids, subjects)
    own = []
    for row, text in zip(rows, ids):
        if text not in subject_names: continue
        values = {kind: row.get(name, '') for kind, name in names.items()}
        if 'month' in names['age'].lower() or names['age'].lower() in COLUMNS['age_months']:
            values['age'] = with_months(values['age'])
        own.append(values | {'subject': subject_names[text]})
    if not own:
        example = next(iter(sorted(subjects)), '(none)')
        raise SystemExit(f'{table}: none of its rows is of a subject that was found, such as {example}')
    unread = unread or Unread()
    unread.others += misfits(table, ids, subjects, subject_names)
    return collect(own, table, Visits(sessions), unread, codes)
