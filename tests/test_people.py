"""Whose scan is it: names of folders, tables of sex and age, label maps; what is wrong is named."""
import os

import nibabel as nib
import numpy as np
import pytest

from conftest import refused, run
from prepare import FINDERS
from scans import labels, sources
from scans.files import printable
from scans.folders import find_folder
from scans.people import Unread, person_of, read_people
from test_brain import AFFINE, layered, noise
from test_nifti import coordinates, head
from test_prepare import add, prepared, table

# ---------------------------------------------------------------- names of folders

def found(root, *names):
    """What find_folder makes of empty files: sessions {(subject, session): modalities}, notes, doubts."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    notes, doubts = [], []
    sessions, _ = find_folder(str(root), notes, doubts)
    return {key: sorted(scans) for key, scans in sessions.items()}, notes, doubts

def each(names, words):
    return [name.replace('*', word) for name in names for word in words]

BRATS = ['BraTS20_Training_001', 'BraTS20_Training_002']
VISITS = ['BraTS-GLI-00001-000', 'BraTS-GLI-00001-001']
ADNI = 'ADNI/002_S_0295/MP-RAGE'
LAYOUTS = {  # layout: its files, subjects and sessions
    'BraTS 2020': (each([f'{name}/{name}_*.nii' for name in BRATS], ['t1', 't2', 'flair', 't1ce', 'seg'])[1:],
                   [f'sub-{name} ses-01' for name in BRATS]),
    'BraTS, flat': (['BraTS2021_00001_t2.nii.gz', 'BraTS2021_00002_t1.nii.gz'],
                    ['sub-BraTS2021_00001 ses-01', 'sub-BraTS2021_00002 ses-01']),
    'BraTS 2023': (each([f'{name}/{name}-*.nii.gz' for name in VISITS], ['t1n', 't2w', 't2f', 't1c']),
                   ['sub-BraTS-GLI-00001 ses-000', 'sub-BraTS-GLI-00001 ses-001']),
    'BraTS of Kaggle': (
        each(['C001/C001_*.nii/00001_brain_*.nii', 'C002/C002_*.nii/00002_brain_*.nii'], ['t1', 't2']),
        ['sub-C001 ses-01', 'sub-C002 ses-01']),
    'ADNI': ([f'{ADNI}/2006-04-18_08_20_30.0/S1/ADNI_002_S_0295_MR_MP-RAGE__br_raw_20060418193713091.nii',
              f'{ADNI}/2007-05-01_09_00_00.0/S2/ADNI_002_S_0295_MR_MP-RAGE__br_raw_20070501193713091.nii'],
             ['sub-002_S_0295 ses-20060418', 'sub-002_S_0295 ses-20070501']),
    'OASIS': (['OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.img', 'OAS2_0002_MR2/RAW/mpr-1.nifti.img'],
              ['sub-OAS1_0001 ses-1', 'sub-OAS2_0002 ses-2']),
    'dated folders': (['P1/2019-03-04/T1.nii', 'P1/20200304/T1.nii'],
                      ['sub-P1 ses-20190304', 'sub-P1 ses-20200304']),
    'dated files': (['P2_20190304_T1w.nii', 'P2_20200304_T1w.nii'],
                    ['sub-P2 ses-20190304', 'sub-P2 ses-20200304']),
    'named visits': (['01/baseline/t1.nii', '01/visit2/t1.nii', '02_v1_T1w.nii', '02_v2_T1w.nii'],
                     ['sub-01 ses-baseline', 'sub-01 ses-visit2', 'sub-02 ses-v1', 'sub-02 ses-v2']),
    'parts': (each(['train/001/*.nii', 'train/002/*.nii', 'val/003/*.nii'], ['t1', 't2']),
              ['sub-001 ses-01', 'sub-002 ses-01', 'sub-003 ses-01']),
    'sites': (['siteA/P1/anat/T1.nii', 'siteB/P2/anat/T1.nii'], ['sub-P1 ses-01', 'sub-P2 ses-01']),
    'folders of modalities': (['T1/001.nii', 'T1/002.nii', 'T2/001.nii'],
                              ['sub-001 ses-01', 'sub-002 ses-01']),
    'FreeSurfer': (['bert/mri/T1.mgz', 'anna/mri/T1.mgz', 'anna/mri/orig.mgz'],
                   ['sub-anna ses-01', 'sub-bert ses-01']),
    'names of several words': (['sub_01_T1.nii', 'sub_02_T1.nii', 'sub_02_T1_mask.nii'],
                               ['sub-01 ses-01', 'sub-02 ses-01']),
}

@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_person_and_visit_of_a_layout_is_one_session(tmp_path, layout):
    names, expected = LAYOUTS[layout]
    sessions, notes, doubts = found(tmp_path, *names)
    assert sorted(map(' '.join, sessions)) == expected
    assert not any('another' in note for note in notes) and not doubts

def test_scans_after_a_contrast_agent_masks_and_labels_are_no_plain_scans(tmp_path):
    sessions, notes, _ = found(tmp_path, *each(['01/01_*.nii'], ['t1', 't1ce', 'seg', 't2_mask']))
    assert sessions == {('sub-01', 'ses-01'): ['T1w']} and len(notes) == 3

def test_one_number_in_two_parts_is_two_persons_and_is_shown(tmp_path):
    sessions, _, doubts = found(tmp_path, 'train/001/t1.nii', 'val/001/t1.nii', 'val/002/t1.nii')
    assert [subject for subject, _ in sessions] == ['sub-train-001', 'sub-val-001', 'sub-002']
    assert 'sub-val-001 <- val/001/t1.nii' in doubts and '--pattern=' in doubts[-1]

def test_numbered_files_in_a_numbered_folder_are_persons_and_are_shown(tmp_path):
    sessions, _, doubts = found(tmp_path, 'study2019x/P001_T1.nii', 'study2019x/P002_T2.nii')
    assert sorted(subject for subject, _ in sessions) == ['sub-P001', 'sub-P002']
    assert 'sub-P001 <- study2019x/P001_T1.nii' in doubts

def test_doubtful_groupings_are_shown_by_report_and_dry_run(tmp_path):
    for part in ('train', 'val'):
        add(tmp_path, f'tree/{part}/001/t1.nii')
    for args in ([], ['--dry_run=True']):
        printed = prepared('folder', tmp_path / 'tree', tmp_path / 'out', *args)
        assert 'sub-train-001 <- train/001/t1.nii' in printed

@pytest.mark.parametrize('name', ['a[1]', 'x.zip', 'what?', 'a*b', 'é (1)'])
@pytest.mark.parametrize('source, file', [
    ('bids', 'sub-1/anat/sub-1_T1w.nii.gz'), ('folder', '1_T1w.NII.GZ'), ('pattern', '1/T1.nii.gz')])
def test_a_root_may_have_any_name(tmp_path, name, source, file):
    (tmp_path / name / file).parent.mkdir(parents=True)
    (tmp_path / name / file).touch()
    options = ['{subject}/{modality}.nii.gz'] if source == 'pattern' else []
    sessions, _ = FINDERS[source](f'{tmp_path}/{name}', [], *options)
    assert list(sessions) == [('sub-1', 'ses-01')]

def test_masks_are_found_in_folders_of_any_name(tmp_path):
    add(tmp_path, 'm[1]/sub-1/anat/sub-1_T1w.nii.gz')
    add(tmp_path, 'm[1]/sub-1/anat/sub-1_mask.nii.gz', (head() > 50).astype(np.float32))
    printed = prepared('bids', tmp_path / 'm[1]', tmp_path / 'out', '--mask={subject}_mask.nii.gz')
    assert 'no scan was skipped' in printed

def test_a_link_to_a_folder_above_ends(tmp_path):
    (tmp_path / '01_T1w.nii').touch()
    os.symlink(tmp_path, tmp_path / 'loop')
    assert list(found(tmp_path)[0]) == [('sub-01', 'ses-01')]

def test_what_cannot_be_read_is_named(tmp_path):
    _, notes, _ = found(tmp_path, '01_T1w.nii', '02_T1w.nrrd', '03/03_T1w.dcm')
    assert len(notes) == 2 and all('convert it' in note for note in notes)

def test_plain_scans_go_before_those_with_a_contrast_agent_of_spines_and_parts(tmp_path):
    anat = tmp_path / 'sub-1' / 'anat'
    anat.mkdir(parents=True)
    for name in ('acq-cspine', 'ce-gadolinium', 'chunk-1', 'part-phase', 'run-1'):
        (anat / f'sub-1_{name}_T1w.nii.gz').touch()
    notes, doubts = [], []
    sessions, _ = sources.find_bids(str(tmp_path), notes, doubts=doubts)
    assert sessions['sub-1', 'ses-01']['T1w'].endswith('run-1_T1w.nii.gz')
    assert len(notes) == 4 and not doubts
    (anat / 'sub-1_run-1_T1w.nii.gz').unlink()
    sessions, _ = sources.find_bids(str(tmp_path), [], doubts=doubts)
    assert 'ce-gadolinium' in sessions['sub-1', 'ses-01']['T1w'] and 'contrast-enhanced' in doubts[0]

# ---------------------------------------------------------------- tables

@pytest.fixture(scope='module')
def visits(tmp_path_factory):
    """A BIDS tree of a person with two visits and one with one."""
    root = tmp_path_factory.mktemp('visits')
    for name in ('sub-1/ses-1/anat/sub-1_ses-1', 'sub-1/ses-2/anat/sub-1_ses-2', 'sub-2/anat/sub-2'):
        add(root, f'{name}_T1w.nii.gz')
    return root

def known(root, **tables):
    """(sex, age) of the three sessions by the tables of a tree, {name: text}; and doubts."""
    for path in root.rglob('*.tsv'):
        path.unlink()
    for name, text in tables.items():
        path = {'participants': 'participants.tsv', 'sessions': 'sub-1/sub-1_sessions.tsv'}[name]
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    notes, doubts = [], []
    sessions, tree = sources.find_bids(str(root), notes, doubts=doubts)
    persons = [person_of([tree], *key) for key in sorted(sessions)]
    return [(person.get('sex', ''), person.get('age', '')) for person in persons], notes + doubts

BOTH = [('F', '10'), ('F', '10'), ('M', '40')]

@pytest.mark.parametrize('text', [
    'participant_id\tage\tsex\nsub-1\t10\tF\t\nsub-2\t40\tM\n',
    'participant_id\tage\tsex\nsub-1\t10\tF\tleft-handed\n\nsub-2\t40\tM\n\n',
    '\ufeffparticipant_id\tage\tsex\r\nsub-1\t10\tF\r\nsub-2\t40\tM\r\n',
    'participant_id\tAge\tGender\n1\t10\tfemale\n2\t40\tmale\n',
    'participant_id,age,sex\nsub-1,10,F\nsub-2,40,M\n',
    'participant_id; age; sex\nsub-1; 10; F\nsub-2; 40; M\n',
    'participant_id\tage\tsex\nsub-1\t10\tF\nsub-2\t40\tM\n'.encode('utf-16')])
def test_tables_of_any_make_are_read(visits, text):
    assert known(visits, participants=text) == (BOTH, [])

def test_a_short_line_leaves_out_what_it_lacks(visits):
    persons, _ = known(visits, participants='participant_id\tage\tsex\nsub-1\t10\nsub-2\t40\tM\n')
    assert persons == [('', '10'), ('', '10'), ('M', '40')]

@pytest.mark.parametrize('tables', [
    {'participants': 'participant_id\tsession_id\tage\tsex\nsub-1\tses-1\t10\tF\nsub-1\tses-2\t19\tF\n'},
    {'participants': 'participant_id\tsex\nsub-1\tF\n',
     'sessions': 'session_id\tage\nses-1\t10\nses-2\t19\n'}])
def test_an_age_of_a_visit_stays_with_it(visits, tables):
    assert known(visits, **tables)[0][:2] == [('F', '10'), ('F', '19')]

def test_several_rows_without_visits_are_reported(visits):
    text = 'participant_id\tage\tsex\nsub-1\t10\tF\nsub-1\t19\tF\n'
    persons, lines = known(visits, participants=text)
    assert persons[0] == ('F', '10') and 'several rows' in lines[0]

@pytest.mark.parametrize('age', ['n/a', 'NaN', 'nan', 'inf', '-inf', '', 'NA', '1e400', '-999', 'old', '999'])
def test_ages_that_are_none_are_not_known(visits, age):
    persons, lines = known(visits, participants=f'participant_id\tage\nsub-1\t{age}\nsub-2\n')
    assert persons[0] == ('', '') and bool(lines) == (age in ('-999', 'old', '999'))

@pytest.mark.parametrize('column, text', [
    ('age', '18 months'), ('age', '18mo'), ('age_months', '18'), ('interview_age', '18'),
    ('age (months)', '18')])
def test_ages_in_months_become_years(visits, column, text):
    assert known(visits, participants=f'participant_id\t{column}\nsub-1\t{text}\n')[0][0] == ('', '1.5')

def test_years_count_more_than_months(visits):
    text = 'participant_id\tage\tage_months\nsub-1\t2\t18\n'
    assert known(visits, participants=text)[0][0] == ('', '2')

@pytest.mark.parametrize('column', ['age_months', 'interview_age'])
def test_a_spreadsheets_months_become_years(tmp_path, column):
    (tmp_path / 'who.csv').write_text(f'subject,sex,{column}\nsub-1,F,30\n')
    persons = read_people(str(tmp_path / 'who.csv'), ('subject', 'sex', column), (), ['sub-1'])
    assert persons['sub-1'] == {'sex': 'F', 'age': '2.5'}

@pytest.mark.parametrize('age, expected', [
    ('31', '31'), ('35.80', '35.80'), ('35,5', '35.5'), ('041Y', '41'), ('89+', '89+')])
def test_ages_are_read(visits, age, expected):
    assert known(visits, participants=f'participant_id\tage\nsub-1\t{age}\n')[0][0] == ('', expected)

@pytest.mark.parametrize('sex, expected, said', [
    ('m', 'M', False), ('Female', 'F', False), ('missing', '', False), ('O', '', False), ('1', '', True),
    ('fish', '', True)])
def test_a_sex_is_known_for_documented_values_alone(visits, sex, expected, said):
    persons, lines = known(visits, participants=f'participant_id\tsex\nsub-1\t{sex}\nsub-2\n')
    assert persons[0] == (expected, '') and bool(lines) == said

@pytest.mark.parametrize('rows', ['1,1,F,10\n1,2,F,19', '1,ses-01,F,10\nsub-1,02,F,19'])
def test_a_spreadsheet_may_tell_visits_apart(visits, tmp_path, rows):
    (tmp_path / 'who.csv').write_text(f'subject,session,sex,age\n{rows}\n')
    known(visits)
    prepared('bids', visits, tmp_path / 'out', f'--people={tmp_path}/who.csv')
    persons = [(row['sex'], row['age']) for row in table(tmp_path / 'out')]
    assert persons == [('F', '10'), ('F', '19'), ('', '')]

def people_of(tmp_path, text, sessions, name='who.csv'):
    """What a spreadsheet says of sessions 'SUBJECT SESSION', as {session: (sex, age)}; and doubts."""
    (tmp_path / name).write_text(text)
    keys, unread = [('sub-' + key.split()[0], key.split()[1]) for key in sessions], Unread()
    subjects = {subject for subject, _ in keys}
    persons = read_people(str(tmp_path / name), ('subject', 'sex', 'age'), (), subjects, set(keys), unread)
    people = [person_of([persons], *key) for key in keys]
    return [(person.get('sex', ''), person.get('age', '')) for person in people], unread.lines()

@pytest.mark.parametrize('session, found, age', [
    ('ses-2', 'ses-1', ''), ('ses-1', 'ses-1', '75'), ('', 'ses-1', '75'), ('n/a', 'ses-1', '75'),
    ('ses-02', 'ses-01', ''), ('M12', 'ses-01', ''), ('baseline', 'ses-01', '75'),
    ('2019-03-04', 'ses-01', '75'), ('baseline', 'ses-1', '')])
def test_an_age_of_a_visit_that_is_not_there_is_no_other_visits(tmp_path, session, found, age):
    text = f'subject,session,sex,age\n01,{session},F,75\n'
    persons, lines = people_of(tmp_path, text, [f'01 {found}'])
    assert persons == [('F', age)]
    assert any('its age is not used' in line for line in lines) == (not age)

def test_sessions_of_other_subjects_tell_that_a_tree_has_sessions(tmp_path):
    text = 'subject,session,sex,age\n01,followup,F,75\n02,1,M,40\n'
    persons, lines = people_of(tmp_path, text, ['01 ses-01', '02 ses-01', '02 ses-02'])
    assert persons == [('F', ''), ('M', '40'), ('M', '')] and "'followup'" in lines[0]

def test_one_age_for_all_does_not_replace_ages_of_visits(visits, tmp_path):
    rows = ['participant_id,session_id,age,sex', 'sub-1,ses-1,10,M', 'sub-1,ses-2,19,M', 'sub-2,,40,M']
    known(visits, participants='\n'.join(rows))
    (tmp_path / 'who.csv').write_text('subject,sex,age\n1,F,10\n2,F,41\n')
    prepared('bids', visits, tmp_path / 'out', f'--people={tmp_path}/who.csv')
    persons = [(row['sex'], row['age']) for row in table(tmp_path / 'out')]
    assert persons == [('F', '10'), ('F', '19'), ('F', '41')]

def test_a_sex_that_the_first_row_lacks_is_taken_from_the_second(tmp_path):
    text = 'subject,session,sex,age\n01,1,n/a,30\n01,2,F,32\n'
    assert people_of(tmp_path, text, ['01 ses-1', '01 ses-2']) == ([('F', '30'), ('F', '32')], [])

def test_rows_of_one_visit_complete_each_other_and_are_reported_where_they_differ(tmp_path):
    rows = ['subject,session,sex,age\n01,1,F,n/a', '01,1,n/a,32']
    assert people_of(tmp_path, '\n'.join(rows), ['01 ses-1']) == ([('F', '32')], [])
    persons, lines = people_of(tmp_path, '\n'.join([*rows, '01,1,M,32']), ['01 ses-1'])
    assert persons == [('F', '32')] and 'rows of one visit differ' in lines[0]

def test_rows_of_one_visit_that_differ_in_a_table_of_scans_are_reported(tmp_path):
    rows = ['subject,session,modality,path,sex', '1,1,T1w,1.nii,F', '1,1,T2w,2.nii,M']
    (tmp_path / 's.csv').write_text('\n'.join(rows))
    doubts = []
    _, persons = sources.find_csv(str(tmp_path / 's.csv'), [], doubts)
    assert persons['sub-1', 'ses-1'] == {'sex': 'F'} and 'rows of one visit differ' in doubts[0]

def test_ids_that_lost_their_zeros_are_found_in_tables_of_bids(tmp_path):
    for name in ('001', '010'):
        (tmp_path / f'sub-{name}/anat').mkdir(parents=True)
        (tmp_path / f'sub-{name}/anat/sub-{name}_T1w.nii').touch()
    (tmp_path / 'participants.tsv').write_text('participant_id\tage\n1\t20\n10\t30\n')
    doubts = []
    sessions, tree = sources.find_bids(str(tmp_path), [], doubts=doubts)
    assert [person_of([tree], *key) for key in sorted(sessions)] == [{'age': '20'}, {'age': '30'}]
    assert not doubts

def test_a_number_is_not_a_subject_that_another_row_names(tmp_path):
    persons, lines = people_of(tmp_path, 'subject,sex,age\n1,F,20\n001,M,30\n', ['001 ses-01'])
    assert persons == [('M', '30')]
    assert "1 of 2 rows are of no subject that was found, such as '1'" in lines[0]

@pytest.mark.parametrize('number, subject, fits', [
    ('12', 'A1-B2', False), ('3', '3T', False), ('1001', '1-001', False), ('7', 'anna', False),
    ('2', '002', True), ('2.0', '002', True), ('12', 'IXI012', True)])
def test_a_number_is_the_one_number_at_the_end_of_a_name(tmp_path, number, subject, fits):
    text = f'subject,sex,age\n{number},F,20\n5,M,30\n'
    persons, _ = people_of(tmp_path, text, [f'{subject} ses-1', '5 ses-1'])
    assert persons == [('F', '20') if fits else ('', ''), ('M', '30')]

@pytest.mark.parametrize('session, found', [('0', 'ses-followup'), ('0', 'ses-baseline'), ('12', 'ses-1y2')])
def test_a_number_of_a_visit_is_the_one_number_in_a_name(tmp_path, session, found):
    text = f'subject,session,sex,age\n1,{session},F,75\n'
    persons, lines = people_of(tmp_path, text, [f'1 {found}', '1 ses-9'])
    assert persons[0] == ('F', '') and 'its age is not used' in lines[0]

def test_a_visit_of_number_0_is_found(tmp_path):
    persons, _ = people_of(tmp_path, 'subject,session,sex,age\n1,0,F,75\n', ['1 ses-00', '1 ses-9'])
    assert persons == [('F', '75'), ('F', '')]

def test_two_sexes_of_one_person_are_reported(tmp_path):
    text = 'subject,session,sex,age\n1,1,F,75\n1,2,M,76\n2,1,F,30\n2,2,F,31\n3,1,F,30\n3,2,n/a,31\n'
    sessions = [f'{subject} ses-{visit}' for subject in (1, 2, 3) for visit in (1, 2)]
    persons, lines = people_of(tmp_path, text, sessions)
    assert persons[:2] == [('F', '75'), ('M', '76')]
    assert len(lines) == 1 and "'sub-1'" in lines[0] and 'F at one visit and M at another' in lines[0]

def test_rows_of_nobody_and_subjects_without_a_row_are_counted_in_one_line(visits):
    _, lines = known(visits, participants='participant_id\tage\nsub-1\t10\nsub-7\t11\nsub-8\t12\n')
    assert len(lines) == 1 and "2 of 3 rows" in lines[0] and "such as 'sub-7'" in lines[0]
    assert '1 of 2 subjects have no row, such as sub-2' in lines[0]

OPEN = 'subject,sex,age,comment\n01,F,30,"left-handed\n02,M,40,ok\n03,F,50,"tired\n'

def test_an_open_quote_of_a_tsv_is_a_character(tmp_path):
    text = OPEN.replace(',', '\t').replace('F\t', '"F"\t')
    persons, _ = people_of(tmp_path, text, ['01 ses-01', '02 ses-01', '03 ses-01'], 'who.tsv')
    assert persons == [('F', '30'), ('M', '40'), ('F', '50')]

@pytest.mark.parametrize('text', [
    OPEN, OPEN.replace('"tired', '"tired"'), OPEN.replace(',ok', ',' + 'ok' * 100_000)])
def test_an_open_quote_of_a_csv_is_refused_with_its_line(tmp_path, text):
    with pytest.raises(SystemExit, match='who.csv line 2: a value in quotes'):
        people_of(tmp_path, text, ['01 ses-01', '02 ses-01'])

def test_an_open_quote_of_a_table_of_scans_does_not_swallow_rows(tmp_path):
    rows = ['1,1,T1w,1.nii.gz,', '2,1,T1w,2.nii.gz,"moved', '3,1,T1w,3.nii.gz,']
    (tmp_path / 's.csv').write_text('\n'.join(['subject,session,modality,path,comment', *rows]))
    args = ['--source=csv', f'--root={tmp_path}/s.csv', f'--out_dir={tmp_path}/out', '--workers=1']
    assert refused(run('prepare.py', *args), 's.csv line 3', 'quote')

GOOD = 'subject,session,modality,path\n1,1,T1w,1.nii.gz\n'

@pytest.mark.parametrize('text, reason', [
    (f'{GOOD}2,1,T1w\n', 'line 3: no path'), (f'{GOOD}2,1,T1w,\n', 'line 3: no path'),
    (f'{GOOD}J. D\u00f6,1,T1w,1.nii.gz\n', 'line 3: subject'), (f'{GOOD},,,\n', 'no scan was skipped'),
    (GOOD.replace('\n', ',\n'), 'no scan was skipped'), (GOOD.replace(',', ', '), 'no scan was skipped'),
    (GOOD.replace(',', ';'), 'no scan was skipped'), (GOOD.replace('path', 'Path'), 'no scan was skipped'),
    (f'{GOOD}2,1,T1w,none.nii\n', 'none.nii: no such file')])
def test_bad_rows_of_a_table_of_scans_are_named_and_the_rest_goes_on(tmp_path, text, reason):
    add(tmp_path, '1.nii.gz')
    (tmp_path / 's.csv').write_text(text)
    assert reason in prepared('csv', tmp_path / 's.csv', tmp_path / 'out')
    assert [row['subject'] for row in table(tmp_path / 'out')] == ['sub-1']

# ---------------------------------------------------------------- one bad input among good ones

def test_bad_scans_of_many_kinds_are_left_out_with_their_names(tmp_path):
    add(tmp_path, 'b/sub-0/anat/sub-0_T1w.nii.gz')
    bad = {'two': (head() > 0) * 2 + 1.0, 'plane': np.pad(np.ones((38, 42, 1)), 1),
           'spike': np.eye(40)[..., None] * np.ones(3)}
    for name, volume in bad.items():
        add(tmp_path, f'b/sub-{name}/anat/sub-{name}_T1w.nii.gz', volume.astype(np.float32))
    printed = prepared('bids', tmp_path / 'b', tmp_path / 'out')
    rows = {row['subject'] for row in table(tmp_path / 'out')}
    assert 'sub-0' in rows
    for name in bad:
        assert f'sub-{name}' in rows or f'sub-{name}_T1w.nii.gz: ' in printed

@pytest.mark.parametrize('args, words', [
    (['--skullstrip=no-such-program {in} {out}'], ['no-such-program', 'there is no program']),
    (["--skullstrip=echo '{in} {out}"], ['not a command line']),
    (['--shape=4000,4000,4000'], ['--shape', '1024']),
    (['--shape=1024,1024,1024'], ['--shape']),
    (['--spacing_mm=0.0001'], ['--spacing_mm']),
    (['--min_coverage=2.0'], ['--min_coverage']),
    (['--mask={subject.x}.nii'], ['--mask'])])
def test_what_cannot_work_is_said_before_any_work(tmp_path, args, words):
    add(tmp_path, 'b/sub-0/anat/sub-0_T1w.nii.gz')
    folders = [f'--root={tmp_path}/b', f'--out_dir={tmp_path}/out']
    done = run('prepare.py', '--source=bids', *folders, '--workers=1', *args)
    assert refused(done, *words) and not (tmp_path / 'out').exists()

def test_other_braces_of_a_command_are_left_alone(tmp_path):
    add(tmp_path, 'b/sub-0/anat/sub-0_T1w.nii.gz')
    command = "--skullstrip=bash -c 'cp {in} {out}; echo {done}'"
    assert 'no scan was skipped' in prepared('bids', tmp_path / 'b', tmp_path / 'out', command)

def test_a_folder_that_is_not_utf8_is_written_all_the_same(tmp_path):
    root = os.fsencode(tmp_path) + b'/\xe9tude'
    os.makedirs(root + b'/sub-1/anat')
    path = add(tmp_path, 'x.nii.gz', np.maximum(head(), noise(head().shape)))
    os.rename(path, root + b'/sub-1/anat/sub-1_T1w.nii.gz')
    prepared('bids', os.fsdecode(root), tmp_path / 'out')
    assert len(table(tmp_path / 'out')) == 1
    assert '\ufffdtude' in (tmp_path / 'out' / 'report.txt').read_text(encoding='utf-8')

def test_text_that_is_utf8_stays(tmp_path):
    assert printable('\u00e9tude\n') == '\u00e9tude\n' and printable('\udce9') == '\ufffd'

def test_raw_heads_are_named_by_report_and_dry_run(tmp_path):
    volume, _ = layered()
    (tmp_path / 'b/sub-0/anat').mkdir(parents=True)
    nib.save(nib.Nifti1Image(volume, np.diag([4.0, 4, 4, 1])), tmp_path / 'b/sub-0/anat/sub-0_T1w.nii.gz')
    for args, words in (([], '1 scans are raw head scans'), (['--dry_run=True'], '1 raw heads')):
        printed = prepared('bids', tmp_path / 'b', tmp_path / 'out', '--spacing_mm=4', *args)
        assert 'sub-0_T1w.nii.gz' in printed.split(words)[1]

# ---------------------------------------------------------------- label maps

def aseg():
    """A map of cortex, white matter and thalamus, left and right."""
    grid = coordinates((36, 44, 36))
    r, right = (grid ** 2).sum(0), grid[0] > 0
    return np.select([r < 0.05, r < 0.42, r < 0.62],
                     [np.where(right, 49, 10), np.where(right, 41, 2), np.where(right, 42, 3)], 0)

def test_parcels_are_the_structures_that_they_are_part_of():
    whole = aseg()
    parcels = 1001 + np.indices(whole.shape)[1] % 35
    wmparc = np.select([whole == 3, whole == 42, whole == 2, whole == 41],
                       [parcels, parcels + 1000, parcels + 2000, parcels + 3000], whole)
    destrieux = np.select([whole == 3, whole == 42], [parcels + 10100, parcels + 11100], whole)
    for parcellated in (wmparc, destrieux):
        back, doubts = labels.structures(parcellated.astype(np.float32))
        assert (back == whole).all() and back.dtype == np.int16 and not doubts

def test_labels_of_a_scaled_map_are_rounded():
    assert (labels.structures(aseg() * np.float32(0.9999))[0] == aseg()).all()

@pytest.mark.parametrize('values, reason', [
    (aseg() * 0.37, 'no whole numbers'), (aseg() * 1000, 'FreeSurfer numbers'),
    (aseg() - 9, 'FreeSurfer numbers')])
def test_what_is_no_label_map_is_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        labels.structures(values.astype(np.float32))

def test_unknown_labels_outside_are_named_and_those_of_head_tissue_are_not():
    odd = np.where(aseg() == 3, 900, aseg())
    assert '[900]' in labels.structures(odd)[1][0]
    assert not labels.structures(np.where(aseg() == 3, 511, aseg()))[1]

def test_of_two_maps_the_one_with_structures_is_taken_and_named(tmp_path):
    tissue = np.where(aseg() > 0, 2, 0)
    maps = {'desc-aparcaseg_dseg': tissue, 'desc-aseg_dseg': aseg(), 'desc-brain_mask': tissue > 0}
    for name, volume in maps.items():
        nib.save(nib.Nifti1Image(volume.astype(np.int16), AFFINE), tmp_path / f'sub-1_{name}.nii.gz')
    notes = []
    assert labels.find_labelmaps(str(tmp_path), notes) == {'sub-1': f'{tmp_path}/sub-1_desc-aseg_dseg.nii.gz'}
    assert any('aparcaseg' in note and 'desc-aseg_dseg.nii.gz with 2 is used' in note for note in notes)

def test_maps_named_after_their_kind_belong_to_their_folders(tmp_path):
    for subject in ('anna', 'bert'):
        (tmp_path / subject / 'mri').mkdir(parents=True)
        path = tmp_path / subject / 'mri' / 'aparc+aseg.mgz'
        nib.save(nib.MGHImage(aseg().astype(np.int32), AFFINE), path)
    assert sorted(labels.find_labelmaps(str(tmp_path), [])) == ['sub-anna', 'sub-bert']
