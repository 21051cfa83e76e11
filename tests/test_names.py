"""One person, one name: spellings, visits, copies, alphabets; folders of BIDS that say two things."""
import os

import numpy as np
import pytest

from scans import labels, sources
from scans.folders import find_folder
from scans.report import name_doubts
from test_nifti import head
from test_prepare import add, prepared, table

def empty(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

def found(root, names, find=find_folder):
    """What a finder makes of empty files: {file: 'SUBJECT SESSION'}, notes, doubts."""
    empty(root, names)
    notes, doubts, taken = [], [], {}
    sessions, _ = find(str(root), notes, doubts=doubts)
    for (subject, session), scans in sessions.items():
        for path in scans.values():
            taken[os.path.relpath(path, root)] = f'{subject} {session}'
    return taken, notes, doubts

def subs(names):
    return {f'sub-{name}' for name in names.split()}

# ---------------------------------------------------------------- names that may mean one person

@pytest.mark.parametrize('names', [
    'P01 p01', 'P01 P1', 'Sub-01 01', 'SUB-01 sub01', '1 01 001', '1.0 1', 'subject_2 2'])
def test_spellings_of_one_name_are_shown(names):
    doubts = name_doubts(subs(names))
    assert len(doubts) == 1 and all(subject in doubts[0] for subject in subs(names))
    assert 'spell them alike' in doubts[0]

@pytest.mark.parametrize('names, advice', [
    ('P001_1 P001_2 P002_1', 'P001_ses-1 and P001_ses-2'),
    ('P001_A P001_B', 'P001_ses-A and P001_ses-B'),
    ('training01_01 training01_02 training02_01 training02_02', 'training01_ses-01 and training01_ses-02'),
    ('P003V1 P003V2', 'P003_ses-V1 and P003_ses-V2'),
    ('P01-V1 P01-V2', 'P01_ses-V1 and P01_ses-V2')])
def test_names_that_may_mean_visits_are_shown_with_better_ones(names, advice):
    doubts = name_doubts(subs(names))
    assert len(doubts) == 1 and 'visits of one person' in doubts[0] and advice in doubts[0]

@pytest.mark.parametrize('names', [
    'sub_1 sub_2 sub_3', 'training_01 training_02', 'BraTS20_Training_001 BraTS20_Training_002',
    'IBSR_01 IBSR_02', 'OAS1_0001 OAS1_0002', '002_S_0295 002_S_0296 003_S_0001', '1000_3 1001_3 1002_3',
    'P001_45 P002_45 P003_71', 'P001_3T P002_3T', 'HC_001_M HC_002_F', 'CTRL_01 CTRL_02 PAT_01 PAT_02',
    'site1_01 site1_02 site2_01 site2_02', 'HV01 HV02', 'study2019_01 study2019_02', '100307 100408',
    'IXI002 IXI012', 'NDARINV003RTV85 NDARINV003RTV86', 'TCGA-02-0003 TCGA-02-0006', 'sub-01 sub-02',
    'A1_01 A1_02 A1_03 A1_04 A1_05 A1_06 A1_07 A2_01 A2_02'])
def test_usual_names_of_persons_raise_no_doubt(names):
    assert not name_doubts(subs(names))

@pytest.mark.parametrize('args', [[], ['--dry_run=True']])
def test_doubts_on_names_are_in_the_report_and_the_dry_run(tmp_path, args):
    for k, name in enumerate(('P001_1', 'P001_2', 'p001_2')):
        add(tmp_path, f'tree/{name}_T1.nii.gz', head(seed=k))
    printed = prepared('folder', tmp_path / 'tree', tmp_path / 'out', *args)
    assert 'sub-P001_1, sub-P001_2: these names may mean visits' in printed
    assert 'sub-P001_2 = sub-p001_2: these names may mean one person' in printed

def test_the_names_that_the_doubt_gives_make_visits_sessions(tmp_path):
    names = ['P001_ses-A_T1.nii', 'P001_ses-V2_T1.nii', 'P001_ses-3_T1.nii']
    taken, _, _ = found(tmp_path, names)
    assert list(taken.values()) == ['sub-P001 ses-3', 'sub-P001 ses-A', 'sub-P001 ses-V2']

def test_names_of_label_maps_that_may_mean_visits_are_shown(tmp_path):
    values = np.where(head() > 0, np.where(head() > 100, 2, 3), 0)
    for name in ('P01-V1_aseg', 'P01-V2_aseg'):
        add(tmp_path, f'maps/{name}.nii.gz', values.astype(np.int16))
    printed = prepared('labelmaps', tmp_path / 'maps', tmp_path / 'out', '--n=2', '--modalities=T1w')
    assert 'sub-P01-V1, sub-P01-V2: these names may mean visits' in printed

def test_an_id_that_a_spreadsheet_made_a_decimal_is_the_whole_number(tmp_path):
    rows = ['subject,session,modality,path', '1.0,1,T1w,a.nii', '1,2,T1w,b.nii', 'v1.0,1,T1w,c.nii']
    (tmp_path / 's.csv').write_text('\n'.join(rows))
    sessions, _ = sources.find_csv(str(tmp_path / 's.csv'), [])
    assert list(sessions) == [('sub-1', 'ses-1'), ('sub-1', 'ses-2'), ('sub-v1.0', 'ses-1')]

# ---------------------------------------------------------------- copies

def test_one_volume_of_two_subjects_is_shown(tmp_path):
    for name, seed in (('a1', 0), ('b2', 0), ('c3', 1)):
        add(tmp_path, f'tree/{name}_T1.nii.gz', head(seed=seed))
    printed = prepared('folder', tmp_path / 'tree', tmp_path / 'out')
    assert 'sub-a1 and sub-b2 have the same volume (sub-a1_ses-01_T1w.npy = sub-b2_ses' in printed
    assert printed.count('the same volume') == 1

def test_one_volume_of_two_visits_is_of_one_person(tmp_path):
    for name in ('a1_ses-1', 'a1_ses-2'):
        add(tmp_path, f'tree/{name}_T1.nii.gz')
    assert 'the same volume' not in prepared('folder', tmp_path / 'tree', tmp_path / 'out')

# ---------------------------------------------------------------- letters of all alphabets

@pytest.mark.parametrize('first, second', [('患者1', '对照1'), ('Müller', 'Möller'), ('José 2', 'Jos 2'),
                                           ('a b1', 'a-b1'), ('Müller', 'Muller'), ('Søren', 'Słren'),
                                           ('张三', '李四')])
def test_different_ids_are_different_persons(tmp_path, first, second):
    taken, _, _ = found(tmp_path, [f'{first}/T1.nii', f'{second}/T2.nii'])
    assert len(taken) == 2 and len(set(taken.values())) == 2

def test_ids_that_would_share_a_name_are_shown(tmp_path):
    taken, _, doubts = found(tmp_path, ['患者1/T1.nii', '对照1/T2.nii'])
    for file, session in taken.items():
        assert f"{session.split()[0]} <- {file.split('/')[0]}" in doubts[0]

@pytest.mark.parametrize('folder, other, subject', [
    ('Müller', 'Möller', 'sub-Muller'), ('a-b1', 'a b1', 'sub-a-b1'), ('Jos 2', 'Jos 3', 'sub-Jos-2'),
    ('1', '患者1', 'sub-1'), ('sub_1', '患者1', 'sub-1')])
def test_an_id_keeps_its_name_where_another_has_strange_letters(tmp_path, folder, other, subject):
    taken, _, _ = found(tmp_path, [f'{folder}/T1.nii', f'{other}/T1.nii'])
    assert taken[f'{folder}/T1.nii'] == f'{subject} ses-01'

def test_one_id_in_two_unicode_forms_is_one_person(tmp_path):
    taken, _, doubts = found(tmp_path, ['Müller/T1.nii', 'Müller/T2.nii'])
    assert set(taken.values()) == {'sub-Muller ses-01'} and not doubts

# ---------------------------------------------------------------- FreeSurfer's longitudinal folders

LONGITUDINAL = {  # the base: its visits, and the sessions they are
    'P01_base': (['P01_tp1', 'P01_tp2'], ['sub-P01 ses-tp1', 'sub-P01 ses-tp2']),
    'P01': (['P01_1', 'P01_2'], ['sub-P01 ses-1', 'sub-P01 ses-2']),
    'P02_template': (['20190304', '4711'], ['sub-P02 ses-20190304', 'sub-P02 ses-4711']),
    'anna_base': (['anna_x', 'anna_y'], ['sub-anna ses-x', 'sub-anna ses-y']),
    'OAS2_0001': (['OAS2_0001_MR1', 'OAS2_0001_MR2'], ['sub-OAS2_0001 ses-1', 'sub-OAS2_0001 ses-2']),
    'sub-01_base': (['sub-01_ses-a', 'sub-01_ses-b'], ['sub-01 ses-a', 'sub-01 ses-b'])}

@pytest.mark.parametrize('base', LONGITUDINAL)
def test_longitudinal_folders_are_sessions_of_one_person(tmp_path, base):
    visits, expected = LONGITUDINAL[base]
    folders = [base, *visits, *[f'{visit}.long.{base}' for visit in visits]]
    taken, notes, _ = found(tmp_path, [f'{folder}/mri/T1.mgz' for folder in folders])
    assert sorted(taken.values()) == expected
    assert sum("FreeSurfer's template" in note and f'/{base}/mri/' in note for note in notes) == 1

def test_a_folder_of_a_base_does_not_hide_the_visits_in_it(tmp_path):
    taken, _, _ = found(tmp_path, ['P01/P01_tp1.long.P01/mri/T1.mgz', 'P01/P01_tp2/mri/T1.mgz'])
    assert sorted(taken.values()) == ['sub-P01 ses-tp1', 'sub-P01 ses-tp2']

def test_a_file_named_base_is_a_scan(tmp_path):
    assert found(tmp_path, ['P01_base_T1.nii', 'P02_base/T1.nii'])[0].keys() == {
        'P01_base_T1.nii', 'P02_base/T1.nii'}

def test_label_maps_of_longitudinal_folders_are_of_one_person(tmp_path):
    folders = ['P01_base', 'P01_1', 'P01_1.long.P01_base']
    empty(tmp_path, [f'{folder}/mri/aseg.mgz' for folder in folders])
    notes = []
    assert list(labels.find_labelmaps(str(tmp_path), notes)) == ['sub-P01']
    assert any("FreeSurfer's template" in note for note in notes)

# ---------------------------------------------------------------- folders of BIDS

def found_in_bids(root, *names):
    return found(root, [f'{name}.nii.gz' for name in ('sub-1/anat/sub-1_T1w', *names)], sources.find_bids)

@pytest.mark.parametrize('name', [
    'Sub-3/anat/Sub-3_T1w', 'sub-4/sub-4_T1w', 'sub-4/ses-1/sub-4_ses-1_FLAIR', 'sub-5/Anat/sub-5_T1w',
    'sub-5/Ses-1/anat/sub-5_T2w', 'sub-6_T1w', 'sub-7/anat2/x/sub-7_T1w'])
def test_scans_outside_the_folders_of_bids_are_named(tmp_path, name):
    taken, notes, doubts = found_in_bids(tmp_path, name)
    assert len(taken) == 1 and not doubts
    assert len(notes) == 1 and f'{name}.nii.gz: not in a folder sub-*/anat' in notes[0]

@pytest.mark.parametrize('name', ['P9/anat/P9_T1w', 'P9/ses-1/anat/P9_ses-1_T1w'])
def test_folders_of_subjects_without_sub_are_named(tmp_path, name):
    _, notes, _ = found_in_bids(tmp_path, name)
    assert len(notes) == 1 and f'{tmp_path}/P9: its name does not begin with sub-' in notes[0]

def test_what_bids_keeps_elsewhere_is_not_named(tmp_path):
    _, notes, doubts = found_in_bids(
        tmp_path, 'derivatives/x/sub-1/anat/sub-1_T1w', 'sourcedata/sub-1/anat/sub-1_T1w',
        'sub-1/func/sub-1_task-rest_bold', 'sub-1/dwi/sub-1_dwi', 'sub-1/fmap/sub-1_phasediff',
        'sub-2/ses-1/anat/sub-2_ses-1_T1w', 'sub-2/ses-1/anat/sub-2_ses-1_run-1_T2w', 'sub-3/anat/sub-3_PD')
    assert not notes and not doubts

@pytest.mark.parametrize('name, other, session', [
    ('sub-2/anat/sub-99_T2w', 'sub-99', 'sub-2 ses-01'),
    ('sub-03/ses-1/anat/sub-03_ses-2_T1w', 'ses-2', 'sub-03 ses-1'),
    ('sub-03/ses-1/anat/sub-3_ses-2_T1w', 'sub-3 ses-2', 'sub-03 ses-1'),
    ('sub-4/anat/sub-5_T1w.nii/sub-5_T1w', 'sub-5', 'sub-4 ses-01')])
def test_a_scan_named_as_anothers_is_its_folders_and_is_shown(tmp_path, name, other, session):
    taken, _, doubts = found_in_bids(tmp_path, name)
    assert len(doubts) == 1 and f'named {other}, taken as of {session}' in doubts[0]
