"""Cohorts' trees and tables, masks, registration, shards, the look before, label maps.

Trees are generated as real ones are laid out.
"""
import os
import shutil
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import synth
from common import load_checkpoint
from conftest import ROOT, TINY, play, refused, refuses, run
from scans import labels, nifti, preflight, sources
from scans.folders import find_folder
from scans.register import mutual_information, register
from test_nifti import head, save, store
from test_prepare import add, array, dice, prepare, prepared, table, write_times
from test_train import SHORT, assert_same_run

LABELMAPS = os.path.join(ROOT, '..', 'shared', 'data', 'labelmaps')

# ---------------------------------------------------------------- recipes of cohorts

def scans(folder, *names):
    return [f'{folder}/{name}' for name in names]

NCANDA = 'NCANDA_S00033/standard/baseline/structural'
HCP = ('T1w_acpc_dc_restore_brain', 'T2w_acpc_dc_restore_brain', 'T1w_acpc_dc_restore', 'wmparc')
COHORTS = {  # config: its files, a spreadsheet, the rows that come of them
    'ixi': (
        ['IXI-T1/IXI002-Guys-0828-T1', 'IXI-T2/IXI002-Guys-0828-T2', 'IXI-PD/IXI002-Guys-0828-PD',
         'IXI012-HH-1211-T1', 'IXI-MRA/IXI012-HH-1211-MRA', 'IXI-T1/readme'],
        'IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,AGE\n2,2,164,35.8\n12,1,175,38.78\n999,1,1,1\n',
        [('sub-IXI002', 'ses-01', ['T1w', 'T2w', 'PD'], 'F', '35.8'),
         ('sub-IXI012', 'ses-01', ['T1w'], 'M', '38.78')]),
    'ncanda': (
        [*scans(f'{NCANDA}/stripped', 't1', 't2'), f'{NCANDA}/native/t1'],
        'subject,sex,age\nNCANDA_S00033,F,17.2\n',
        [('sub-NCANDA_S00033', 'ses-baseline', ['T1w', 'T2w'], 'F', '17.2')]),
    'abcd': (
        scans('sub-X/ses-b/anat', 'sub-X_ses-b_desc-preproc_T1w',
              'sub-X_ses-b_space-MNI152NLin2009cAsym_desc-preproc_T1w',
              'sub-X_ses-b_space-MNI152NLin2009cAsym_desc-brain_mask'),
        'subject,sex,age\nX,M,10\n',
        [('sub-X', 'ses-b', ['T1w'], 'M', '10')]),
    'hcp': (
        scans('100307/T1w', *HCP) + scans('100408/T1w', *HCP),
        'Subject,Release,Gender,Age\n100307,Q1,F,26-30\n',
        [('sub-100307', 'ses-01', ['T1w', 'T2w'], 'F', '26-30'),
         ('sub-100408', 'ses-01', ['T1w', 'T2w'], '', '')]),
    'oasis3': (
        ['sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_run-01_T1w',
         'sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_FLAIR',
         'sub-OAS30001/ses-d0757/anat/sub-OAS30001_ses-d0757_T1w'],
        'OASISID,GENDER,AgeatEntry\nOAS30001,2,65.1\n',
        [('sub-OAS30001', 'ses-d0129', ['T1w', 'FLAIR'], 'F', '65.1'),
         ('sub-OAS30001', 'ses-d0757', ['T1w'], 'F', '65.1')]),
}

def play_recipe(cohort, folder):
    """Prepare folder/tree with folder/people.csv into folder/out by a config; returns what was printed."""
    return play('prepare.py', f'{ROOT}/config/data_{cohort}.py', f'--root={folder}/tree',
                f'--people={folder}/people.csv', f'--out_dir={folder}/out', '--shape=48,48,48', '--workers=1',
                '--register=False')

@pytest.mark.parametrize('cohort', COHORTS)
def test_recipes_of_cohorts(cohort, tmp_path):
    files, people, expected = COHORTS[cohort]
    for name in files:
        add(tmp_path, f'tree/{name}.nii.gz')
    (tmp_path / 'people.csv').write_text(people)
    play_recipe(cohort, tmp_path)
    rows = []
    for row in table(tmp_path / 'out'):
        modalities = [m for m in ('T1w', 'T2w', 'FLAIR', 'PD') if row.get(m)]
        rows.append((row['subject'], row['session'], modalities, row['sex'], row['age']))
    assert rows == expected

@pytest.fixture(scope='module')
def ukb(tmp_path_factory):
    """Two archives of UK Biobank, one without the scan, one cut short: folder, a scan, what was printed."""
    folder = tmp_path_factory.mktemp('ukb')
    brain = store(str(folder / 'brain.nii.gz'), head(), code='LAS')
    (folder / 'tree').mkdir()
    for eid, member in ((1000010, 'T1_brain_to_MNI'), (1000028, 'T1_brain_to_MNI'), (1000036, 'other')):
        with zipfile.ZipFile(folder / 'tree' / f'{eid}_20252_2_0.zip', 'w') as z:
            z.write(brain, f'T1/{member}.nii.gz')
    (folder / 'tree' / '1000044_20252_2_0.zip').write_bytes(b'PK half')
    (folder / 'people.csv').write_text('eid,31-0.0,21003-2.0\n1000010,0,61\n1000028,1,70\n')
    return folder, brain, play_recipe('ukb', folder)

def test_ukb_archives_are_sessions_with_sex_and_age(ukb):
    rows = [(row['subject'], row['session'], row['sex'], row['age']) for row in table(ukb[0] / 'out')]
    assert rows == [('sub-1000010', 'ses-2', 'F', '61'), ('sub-1000028', 'ses-2', 'M', '70')]

def test_ukb_archives_are_read_where_they_are(ukb):
    folder, brain, _ = ukb
    volume, affine, _ = nifti.read(brain)
    (expected,), _ = nifti.conform([volume], [affine], (48, 48, 48))
    stored = array(folder / 'out', 'sub-1000010_ses-2_T1w')
    assert stored.dtype == np.float16
    assert np.abs(stored - expected).max() < 1e-3  # the error of float16 storage

def test_bad_ukb_archives_are_reported(ukb):
    assert ukb[2].count('cannot be unpacked') == 2

# ---------------------------------------------------------------- trees and tables

def names_of(sessions):
    """{(subject, session): modalities} of what a finder returns."""
    return {key: sorted(paths) for key, paths in sessions.items()}

@pytest.fixture
def ncanda(tmp_path):
    for name in ('baseline/structural/stripped/t1', 'followup_1y/structural/stripped/t2',
                 'followup_1y/structural/native/t2'):
        add(tmp_path, f'NCANDA_S00033/standard/{name}.nii.gz')
    return str(tmp_path)

def test_patterns_name_subject_session_and_modality(ncanda):
    notes = []
    pattern = '{subject}/standard/{session}/structural/stripped/{modality}.nii.gz'
    sessions, _ = sources.find_pattern(ncanda, notes, pattern)
    assert names_of(sessions) == {('sub-NCANDA_S00033', 'ses-baseline'): ['T1w'],
                                  ('sub-NCANDA_S00033', 'ses-followup_1y'): ['T2w']}
    assert len(notes) == 1 and 'native' in notes[0]

def test_a_star_of_a_pattern_is_any_name(ncanda):
    sessions, _ = sources.find_pattern(ncanda, [], '{subject}/*/{session}/*/native/{modality}.nii.gz')
    assert list(sessions) == [('sub-NCANDA_S00033', 'ses-followup_1y')]

def test_two_stars_of_a_pattern_are_any_folders_or_none(tmp_path):
    for name in ('a_T1', 'x/b_T1', 'x/y/c_T1'):
        add(tmp_path, f'{name}.nii.gz')
    sessions, _ = sources.find_pattern(str(tmp_path), [], '**/{subject}_{modality}.nii.gz')
    assert [subject for subject, _ in sessions] == ['sub-a', 'sub-b', 'sub-c']

def test_a_name_of_a_pattern_may_be_narrowed(tmp_path):
    for name in ('S1_T1', 'S1_CT', 'T1_T1', 'S22_T2'):
        add(tmp_path, f'{name}.nii.gz')
    notes = []
    sessions, _ = sources.find_pattern(str(tmp_path), notes, r'{subject:S\d+}_{modality:T1|T2}.nii.gz')
    assert names_of(sessions) == {('sub-S1', 'ses-01'): ['T1w'], ('sub-S22', 'ses-01'): ['T2w']}
    assert len(notes) == 2

def test_derivatives_are_chosen_by_their_entities(tmp_path):
    anat = 'sub-01/ses-a/anat/sub-01_ses-a'
    for name in ('desc-preproc_T1w', 'space-MNI_desc-preproc_T1w', 'space-MNI_res-2_desc-preproc_T1w',
                 'space-MNI_desc-brain_mask'):
        add(tmp_path, f'{anat}_{name}.nii.gz')
    notes = []
    sessions, _ = sources.find_bids(str(tmp_path), notes, ('space-MNI', 'desc-preproc'))
    path = str(tmp_path / f'{anat}_space-MNI_desc-preproc_T1w.nii.gz')
    assert sessions == {('sub-01', 'ses-a'): {'T1w': path}}
    assert len(notes) == 3
    assert sum('is used' in note for note in notes) == 1
    assert sum('without space-MNI' in note for note in notes) == 1

@pytest.mark.parametrize('args, words', [
    (['--source=ixi'], ['--source=ixi', 'pattern']),
    (['--source=pattern', '--pattern={subject}.nii.gz'], ['{modality}']),
    (['--source=pattern', '--pattern={subject}/{modality}_{run}.nii'], ['{run}']),
    (['--source=pattern', '--pattern={subject:(}/{modality}.nii'], ['{subject:(}', 'regular expression']),
    (['--source=folder', '--people={root}/p.csv'], ['p.csv', "no column 'subject'", 'eid']),
    (['--source=folder', '--people={root}/p.csv', '--columns=eid,sex,age'], ['none of its rows']),
    (['--source=folder', '--shard=3/3'], ['--shard=3/3', 'i/n']),
    (['--source=folder', '--skullstrip=bet x y'], ['{in}', '{out}']),
    (['--source=folder', '--mask=a', '--skullstrip={in}{out}'], ['one of them']),
    (['--source=folder', '--mask={sub}.nii'], ['--mask', '{subject}']),
    (['--source=phantom', '--dry_run=True'], ['dry_run']),
    (['--source=labelmaps', '--modalities=CT'], ['CT', 'random1'])])
def test_bad_settings_of_sources_end_with_one_line(args, words, tmp_path):
    add(tmp_path, '01_T1w.nii.gz')
    (tmp_path / 'p.csv').write_text('eid,sex,age\n77,F,3\n')
    args = [arg.replace('{root}', str(tmp_path)) for arg in args]
    done = run('prepare.py', f'--root={tmp_path}', f'--out_dir={tmp_path}/out', '--workers=1', *args)
    assert refused(done, *words) and not (tmp_path / 'out' / 'subjects.tsv').exists()

# ---------------------------------------------------------------- names of folders

def empty(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()

def read_names(root, names):
    """{file: 'subject session modality'} of what find_folder takes of empty files, its notes and doubts."""
    empty(root, names)
    notes, doubts, taken = [], [], {}
    sessions, _ = find_folder(str(root), notes, doubts)
    for (subject, session), paths in sessions.items():
        for modality, path in paths.items():
            taken[os.path.relpath(path, root)] = f'{subject[4:]} {session[4:]} {modality}'
    return taken, notes, doubts

def persons_of(root, names):
    taken, _, doubts = read_names(root, names)
    return {name: words.split()[0] for name, words in taken.items()}, doubts

@pytest.mark.parametrize('form', ['S{:03d}', 'M{:02d}', 'V{:02d}'])
def test_short_names_below_groups_are_persons_and_are_shown(tmp_path, form):
    numbers = [form.format(i) for i in (1, 2, 3)]
    persons, doubts = persons_of(tmp_path, [f'{group}/{s}/T1.nii' for group in ('AD', 'HC') for s in numbers])
    assert sorted(persons.values()) == [f'{group}-{s}' for group in ('AD', 'HC') for s in numbers]
    assert f'sub-AD-{numbers[0]} <- AD/{numbers[0]}/T1.nii' in doubts

def test_short_names_below_many_names_are_visits_and_are_shown(tmp_path):
    names = [f'{person}/V{i}/T1.nii' for person in ('anna', 'bert', 'cleo') for i in (1, 2)]
    taken, _, doubts = read_names(tmp_path, names)
    assert taken['anna/V1/T1.nii'] == 'anna V1 T1w' and taken['cleo/V2/T1.nii'] == 'cleo V2 T1w'
    assert 'sub-bert <- bert/V1/T1.nii, bert/V2/T1.nii' in doubts

def test_short_names_are_visits_where_other_persons_have_them(tmp_path):
    persons, _ = persons_of(tmp_path, ['001/V1/T1.nii', 'pilot/V1/T1.nii', 'pilot/V2/T1.nii'])
    assert list(persons.values()) == ['001', 'pilot', 'pilot']

@pytest.mark.parametrize('name, person', [
    ('controls/M01/T1.nii', 'M01'), ('HC/01M/T1.nii', '01M'), ('1001/12M/T1.nii', '1001'),
    ('AD/S001/V2/T1.nii', 'S001'), ('AD/S002/2019-03-04/T1.nii', 'S002'), ('V1/anna/T1.nii', 'anna'),
    ('AD/7/S1/T1.nii', '7'), ('Site1_S01_T1.nii', 'Site1_S01'), ('P1_S01_T1.nii', 'P1'),
    ('subject1_S01_T1.nii', 'subject1')])
def test_a_short_name_is_a_person_where_no_other_name_is_one(tmp_path, name, person):
    assert persons_of(tmp_path, [name])[0] == {name: person}

@pytest.mark.parametrize('name, modality', [
    ('001/T1_reg_T2', 'T1w'), ('001/T1_to_FLAIR', 'T1w'), ('001/T2_to_T1ce', 'T2w'),
    ('T1/001_to_FLAIR', 'T1w'), ('001/FLAIR_brain_coreg_to_T1w', 'FLAIR'),
    ('001/T2_in_T1', 'T2w'), ('001/T1_to_MNI152', 'T1w'),
    ('001_reg_T1', 'T1w'), ('001_on_T2', 'T2w'), ('001/T2_FLAIR', 'FLAIR'), ('T1_PD_001', 'T1w'),
    ('PD_001_T1', 'T1w'), ('001_PD', 'PD')])
def test_the_image_a_scan_was_registered_to_is_not_its_modality(tmp_path, name, modality):
    taken, _, _ = read_names(tmp_path, [f'{name}.nii'])
    assert [words.split()[-1] for words in taken.values()] == [modality]

def test_scans_registered_to_each_other_are_not_swapped(tmp_path):
    taken, _, _ = read_names(tmp_path, ['001/T1_to_T2.nii', '001/T2_to_T1.nii'])
    assert taken == {'001/T1_to_T2.nii': '001 01 T1w', '001/T2_to_T1.nii': '001 01 T2w'}

@pytest.mark.parametrize('name, session', [
    ('1001/12m/T1', '12m'), ('1001_12M_T1', '12M'), ('6m/1001/T1', '6m'), ('1001_6mo_T1', '6mo'),
    ('1001_6_months_T1', '6months'),
    ('1001/1year/T1', '1year'), ('1001_2y_T1', '2y'), ('1001_12wk_T1', '12wk'),
    ('1001_time2_T1', 'time2'), ('1001_pre_T1', 'pre'),
    ('1001_post_T1', 'post'), ('1001/post/T1', 'post'), ('1001_postop_T1', 'postop'), ('1001_T1_pre', '01'),
    ('1001_week_2_T1', 'week2'), ('1001_pre_contrast_T1', '01'), ('1001_T1_without_contrast', '01')])
def test_visits_of_a_person_are_told_from_persons(tmp_path, name, session):
    taken, _, _ = read_names(tmp_path, [f'{name}.nii'])
    assert taken == {f'{name}.nii': f'1001 {session} T1w'}

def test_a_number_with_a_letter_for_the_sex_is_no_visit(tmp_path):
    names = ['HC_001M', 'HC_001_M', 'HC_01M', '02M']
    persons, _ = persons_of(tmp_path, [f'{name}_T1.nii' for name in names])
    assert persons == {f'{name}_T1.nii': name for name in names}

@pytest.mark.parametrize('name', [
    '001/T1_post', '001_T1_contrast', '001/T1w_post_contrast', '001_post_contrast_T1', '001/mprage_post'])
def test_what_was_made_after_a_contrast_agent_is_left_out(tmp_path, name):
    taken, notes, _ = read_names(tmp_path, [f'{name}.nii'])
    assert not taken and 'contrast agent' in notes[0]

@pytest.mark.parametrize('names, subjects', [
    (['subj_01_aseg', 'subj_02_aseg', 'subj_02_aparc+aseg'], ['subj_01', 'subj_02']),
    (['study2x/subj_01_aseg', 'study2x/subj_02_aseg'], ['subj_01', 'subj_02']),
    (['brain_seg_001', 'brain_seg_002', 'brain_seg_003'], ['001', '002', '003']),
    (['IBSR_01/IBSR_01_seg_ana', 'IBSR_02/IBSR_02_seg_ana'], ['IBSR_01', 'IBSR_02']),
    (['OAS1_0001_MR1/seg4', 'OAS1_0002_MR1/seg4'], ['OAS1_0001', 'OAS1_0002']),
    (['AD/S1/aseg', 'AD/S2/aseg', 'HC/S1/aseg', 'HC/S2/aseg'], ['AD-S1', 'AD-S2', 'HC-S1', 'HC-S2']),
    (['training_seg_01', 'training_seg_02'], ['training_01', 'training_02']),
    (['P1/synthseg', 'P2/synthseg'], ['P1', 'P2']),
    (['BraTS20_Training_001_glm', 'BraTS20_Training_002_glm'],
     ['BraTS20_Training_001', 'BraTS20_Training_002']),
    # several maps or visits of a person
    (['1000_3_glm', '1001_3_glm', '1001_4_glm'], ['1000', '1001']),
    (['anna_aseg', 'anna_aparc+aseg', 'bert_aseg'], ['anna', 'bert']),
    (['sub-1_ses-1_dseg', 'sub-1_ses-2_dseg'], ['1'])])
def test_label_maps_of_several_persons_are_told_apart(tmp_path, names, subjects):
    empty(tmp_path, [f'{name}.nii.gz' for name in names])
    paths = [str(tmp_path / f'{name}.nii.gz') for name in names]
    subject_of = labels.subjects_of(paths, str(tmp_path))
    assert sorted({subject.removeprefix('sub-') for subject in subject_of.values()}) == subjects

def test_label_maps_that_share_a_word_are_all_taken(tmp_path):
    for i in (1, 2, 3):
        save(str(tmp_path / f'subj_0{i}_aseg.nii.gz'), np.full((8, 8, 8), 2), np.int16)
    notes = []
    maps = labels.find_labelmaps(str(tmp_path), notes)
    assert sorted(maps) == ['sub-subj_01', 'sub-subj_02', 'sub-subj_03'] and not notes

# ---------------------------------------------------------------- masks

def raw_head(seed):
    air = 20 + 5 * np.random.default_rng(seed).random(head().shape).astype(np.float32)
    return head(seed=seed) + air

BRAIN = np.zeros(head().shape, np.float32)
BRAIN[12:28, 12:30, 10:26] = 1

# a command that keeps of a scan what lies in BRAIN
STRIP = '''
import sys, nibabel as nib, numpy as np
scan = nib.load(sys.argv[1])
brain = np.zeros(scan.shape, np.float32)
brain[12:28, 12:30, 10:26] = 1
nib.save(nib.Nifti1Image(brain * scan.get_fdata(), scan.affine), sys.argv[2])
'''

@pytest.fixture(scope='module')
def heads(tmp_path_factory):
    """A BIDS tree of three raw heads, two of them with brain masks beside."""
    root = tmp_path_factory.mktemp('heads')
    for i in range(3):
        anat = f'sub-0{i}/anat/sub-0{i}'
        add(root, f'{anat}_T1w.nii.gz', raw_head(i), code='RAS' if i == 2 else 'LAS')
        if i < 2:
            add(root, f'{anat}_brainmask.nii.gz', BRAIN, code='LAS')
    return root

def test_masks_come_from_files_beside_the_scan(heads, tmp_path):
    printed = prepared('bids', heads, tmp_path, '--mask={subject}*_brainmask.nii.gz')
    assert 'sub-02_T1w.nii.gz: 0 files fit its mask' in printed and 'raw head' not in printed
    assert (array(tmp_path, 'sub-00_ses-01_T1w') > 0).sum() == BRAIN.sum()

def test_masks_come_from_files_below_root(heads, tmp_path):
    prepared('bids', heads, tmp_path, '--mask={subject}/anat/{subject}_brainmask.nii.gz')
    assert (array(tmp_path, 'sub-01_ses-01_T1w') > 0).sum() == BRAIN.sum()

def test_masks_come_from_files_below_the_folder_of_a_table(heads, tmp_path):
    tree = tmp_path / 'tree'
    shutil.copytree(heads, tree / 'scans')
    row = '01,1,T1w,scans/sub-01/anat/sub-01_T1w.nii.gz'
    (tree / 's.csv').write_text(f'subject,session,modality,path\n{row}\n')
    mask = '--mask=scans/{subject}/anat/{subject}_brainmask.nii.gz'
    prepared('csv', tree / 's.csv', tmp_path / 'out', mask)
    assert (array(tmp_path / 'out', 'sub-01_ses-1_T1w') > 0).sum() == BRAIN.sum()

def test_masks_come_from_a_command(heads, tmp_path):
    script = tmp_path / 'strip.py'
    script.write_text(STRIP)
    out = tmp_path / 'out'
    printed = prepared('bids', heads, out, f'--skullstrip={sys.executable} {script} {{in}} {{out}}')
    assert 'no scan was skipped' in printed and len(table(out)) == 3
    assert (array(out, 'sub-02_ses-01_T1w') > 0).sum() == BRAIN.sum()

def test_a_command_that_fails_is_reported(heads, tmp_path):
    done = prepare('bids', heads, tmp_path, f'--skullstrip={sys.executable} /nowhere.py {{in}} {{out}}')
    assert refused(done, 'ended with 2')

def test_a_scan_that_a_command_failed_on_is_tried_again(tmp_path):
    for modality in ('T1w', 'T2w'):
        add(tmp_path, f'tree/01_{modality}.nii.gz', raw_head(1))
    (tmp_path / 'strip.py').write_text(STRIP)
    # it fails on the second scan of the first run
    (tmp_path / 'once.sh').write_text(f"""cd {tmp_path}
        echo x >> count
        [ $(wc -l < count) = 2 ] && exit 137
        {sys.executable} strip.py $1 $2""")
    command = f'--skullstrip=bash {tmp_path}/once.sh {{in}} {{out}}'
    first = prepared('folder', tmp_path / 'tree', tmp_path / 'out', command)
    assert '1 scans skipped' in first and not table(tmp_path / 'out')[0].get('T2w')
    assert 'no scan was skipped' in prepared('folder', tmp_path / 'tree', tmp_path / 'out', command)
    assert table(tmp_path / 'out')[0]['T2w']
    prepared('folder', tmp_path / 'tree', tmp_path / 'out', command)
    assert (tmp_path / 'count').read_text() == 4 * 'x\n'  # what is whole is not made again

# ---------------------------------------------------------------- registration

def test_mutual_information_of_equal_images_is_two():
    a = np.random.default_rng(0).integers(0, 8, 200000)
    assert mutual_information(a, a, 8) == pytest.approx(2)
    assert mutual_information(a, 7 - a, 8) == pytest.approx(2)

def test_mutual_information_of_independent_images_is_one():
    a, b = np.random.default_rng(0).integers(0, 8, (2, 200000))
    assert mutual_information(a, b, 8) == pytest.approx(1, abs=1e-3)

@pytest.fixture(scope='module')
def contrasts():
    return synth.phantom(1, (84, 109, 84))['images']

@pytest.mark.parametrize('turn, shift', [((6, -4, 3), (5, -7, 4)), ((0, 0, 0), (0, 0, 0))])
def test_registration_finds_the_way_back_between_two_contrasts(contrasts, turn, shift):
    t1, t2 = contrasts['T1w'], contrasts['T2w']
    affine, centre = np.diag([2.0, 2, 2, 1]), np.array([84.0, 109, 84])
    away = np.eye(4)
    away[:3, :3] = Rotation.from_euler('xyz', turn, degrees=True).as_matrix()
    away[:3, 3] = centre - away[:3, :3] @ centre + shift
    new_affine, facts = register(t1, affine, t2, away @ affine)
    points = affine[:3, :3] @ np.argwhere(t1 > 0)[::500].T + affine[:3, 3:]
    back = new_affine @ np.linalg.inv(affine) @ np.vstack([points, np.ones(points.shape[1])])
    assert np.linalg.norm(back[:3] - points, axis=0).max() < 1.0  # half a voxel
    if any(turn):
        assert facts['reason'] == '' and facts['nmi_after'] > facts['nmi_before']

def test_registration_without_a_likeness_keeps_the_affine_and_says_so():
    rng = np.random.default_rng(0)
    a, b = np.pad(rng.random((24, 24, 24)), 4), np.pad(rng.random((24, 24, 24)), 4)
    affine = np.eye(4)
    affine[:3, 3] = 200
    new_affine, facts = register(a, np.eye(4), b, affine, points=4000)
    assert facts['reason'] and (new_affine == affine).all()

def test_registered_sessions_are_reported(tmp_path, contrasts):
    anat = tmp_path / 'tree/sub-01/anat'
    anat.mkdir(parents=True)
    affine = np.diag([2.0, 2, 2, 1])
    nib.save(nib.Nifti1Image(contrasts['T1w'], affine), anat / 'sub-01_T1w.nii.gz')
    affine[0, 3] += 9
    nib.save(nib.Nifti1Image(contrasts['T2w'], affine), anat / 'sub-01_T2w.nii.gz')
    printed = prepared('bids', tmp_path / 'tree', tmp_path / 'out', '--register=True', '--spacing_mm=4')
    assert '1 scans registered, 0 of them without success' in printed
    t1, t2 = (array(tmp_path / 'out', f'sub-01_ses-01_{m}') > 0 for m in ('T1w', 'T2w'))
    assert dice(t1, t2) > 0.97

# ---------------------------------------------------------------- array jobs

@pytest.fixture(scope='module')
def flat(tmp_path_factory):
    """A folder of five scans."""
    root = tmp_path_factory.mktemp('flat')
    for i in range(5):
        add(root, f'0{i}_T1w.nii.gz', head(seed=i))
    return root

def prepare_in_shards(root, out):
    for shard in ('0/2', '1/2'):
        assert f'shard {shard}' in prepared('folder', root, out, f'--shard={shard}')
        assert not (out / 'subjects.tsv').exists()

def test_the_last_call_makes_no_scan_of_the_shards_again(flat, tmp_path):
    prepare_in_shards(flat, tmp_path)
    times = write_times(tmp_path)
    prepared('folder', flat, tmp_path)
    assert len(times) == 5 and write_times(tmp_path) == times

def test_shards_and_a_last_call_give_what_one_call_gives(flat, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    prepared('folder', flat, whole)
    prepare_in_shards(flat, parts)
    prepared('folder', flat, parts)
    assert 'shard 0/2' in prepared('folder', flat, parts, '--shard=0/2')  # a late job spoils nothing
    for name in ('subjects.tsv', 'checksums.json', 'report.txt', 'dataset.json'):
        assert (whole / name).read_text() == (parts / name).read_text()

# ---------------------------------------------------------------- the look before

@pytest.fixture(scope='module')
def looked(tmp_path_factory):
    """A dry run of an odd folder: out_dir, and what was printed.

    Of six sessions, one has another orientation, one a T1w under the name of a T2w, one no T2w. Besides there
    are a copy, a text file named as a scan, and a file without a modality.
    """
    folder = tmp_path_factory.mktemp('looked')
    tree = folder / 'tree'
    tree.mkdir()
    for i in range(6):
        images = synth.phantom(i + 1, (40, 52, 40))['images']
        if i == 3:
            images['T2w'] = images['T1w']
        affine = np.diag([-4.0 if i == 1 else 4.0, 4, 4, 1])
        for name in ('T1w',) if i == 5 else ('T1w', 'T2w'):
            nib.save(nib.Nifti1Image(images[name], affine), tree / f'0{i}_{name}.nii.gz')
    (tree / '07_T1w.nii.gz').write_bytes((tree / '00_T1w.nii.gz').read_bytes())
    (tree / '08_T1w.nii.gz').write_text('hello')
    (tree / 'localizer.nii.gz').write_text('')
    return folder / 'out', prepared('folder', tree, folder / 'out', '--dry_run=True')

@pytest.mark.parametrize('words', [
    '13 scans, 1 of them unusable', 'RAS 6, LAS 1', '08_T1w.nii.gz: not a readable', '00_T1w.nii.gz = ',
    'sub-05 ses-01: no T2w', '03_T2w.nii.gz: named T2w, looks like T1w', '12 larger than the box',
    'localizer'])
def test_a_dry_run_prints_what_is_odd(looked, words):
    assert words in looked[1]

def test_a_dry_run_suspects_no_other_scan(looked):
    assert looked[1].count('looks like') == 1

def test_a_dry_run_writes_a_table_and_pictures_alone(looked):
    out, _ = looked
    files = sorted(str(path.relative_to(out)) for path in out.rglob('*') if path.is_file())
    pictures = ['preflight/T1w.png', 'preflight/T2w.png']  # none without matplotlib
    assert files in (['preflight/scans.tsv'], [*pictures, 'preflight/scans.tsv'])

def test_the_table_of_a_dry_run_has_a_row_per_usable_scan(looked):
    head_line, *lines = (looked[0] / 'preflight' / 'scans.tsv').read_text().splitlines()
    assert tuple(head_line.split('\t')) == preflight.COLUMNS and len(lines) == 12

# ---------------------------------------------------------------- label maps

def label_map(folder, seed):
    """A small head: a phantom's labels at 4 mm, an odd one for the 3rd ventricle, a slab that is no brain."""
    labels = synth.phantom_labels((42, 54, 42), np.random.default_rng(seed), 'F')
    labels[labels == 14] = 136
    labels[:2] = 514
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([-4.0, 4, 4, 1])), folder / f'm{seed}_dseg.nii.gz')

NINE = ['--n=9', '--shape=32,48,32', '--spacing_mm=4', '--modalities=T1w,T2w,random1', '--thickness_mm=8',
        '--split=0.4,0.3,0.3']

@pytest.fixture(scope='module')
def mapped(tmp_path_factory):
    """Nine sessions of three label maps and one that cannot be used: out_dir, and what was printed."""
    folder = tmp_path_factory.mktemp('mapped')
    for seed in (1, 2, 3):
        label_map(folder / 'maps', seed)
    save(str(folder / 'maps' / 'm4_odd.nii.gz'), 200 + np.indices((8, 8, 8))[0], np.int16)
    return folder / 'out', prepared('labelmaps', folder / 'maps', folder / 'out', *NINE)

def first_session(out):
    """{modality: volume} of the first session, with its label map as dseg."""
    row = table(out)[0]
    return {m: np.load(out / row[m]) for m in ('T1w', 'T2w', 'random1', 'dseg')}

def test_label_maps_with_unknown_labels_are_reported(mapped):
    assert 'm4_odd.nii.gz: labels [200, 201' in mapped[1]

def test_sessions_of_a_label_map_stay_with_their_subject(mapped):
    rows = table(mapped[0])
    assert len(rows) == 7
    assert len({row['subject'] for row in rows}) == 3
    assert len({(row['subject'], row['split']) for row in rows}) == 3

def test_images_lie_on_their_label_map(mapped):
    volumes = first_session(mapped[0])
    inside = volumes['dseg'] > 0
    assert all(((volume > 0) == inside).all() for volume in volumes.values())
    assert set(np.unique(volumes['dseg'])) <= set(synth.LABELS)

def test_images_have_their_contrast(mapped):
    volumes = first_session(mapped[0])
    white, fluid = np.isin(volumes['dseg'], (2, 41)), np.isin(volumes['dseg'], (4, 43))
    assert volumes['T1w'][white].mean() > volumes['T1w'][fluid].mean()
    assert volumes['T2w'][white].mean() < volumes['T2w'][fluid].mean()

def test_sessions_of_a_label_map_are_deformed_differently(mapped):
    rows = table(mapped[0])
    a, b = [np.load(mapped[0] / row['dseg']) for row in rows if row['subject'] == rows[0]['subject']][:2]
    assert not np.array_equal(a, b)

def test_sessions_of_label_maps_are_made_again_bit_for_bit(mapped, tmp_path):
    prepared('labelmaps', mapped[0].parent / 'maps', tmp_path, *NINE)
    assert (tmp_path / 'checksums.json').read_text() == (mapped[0] / 'checksums.json').read_text()

@pytest.mark.skipif(not os.path.isdir(LABELMAPS), reason='no real label maps beside the project')
def test_a_real_label_map_becomes_a_session(tmp_path):
    play('prepare.py', '--source=labelmaps', f'--root={LABELMAPS}', '--n=2', '--shape=48,64,48',
         '--spacing_mm=3', f'--out_dir={tmp_path}')
    for row in table(tmp_path):
        assert float(row['lost']) < 0.03
        volume_mm3 = (np.load(tmp_path / row['dseg']) > 0).sum() * 3 ** 3  # with fluid
        assert volume_mm3 == pytest.approx(1.5e6, rel=0.35)

@pytest.mark.parametrize('voxels', [0, 1, 2, 20])
def test_stripping_takes_the_csf_from_a_distance_on(voxels):
    distance = np.abs(np.indices((21, 21, 21)) - 10).sum(0)  # in steps between neighbours
    # a ventricle, white matter, CSF
    labels = np.select([distance == 0, distance < 5, distance < 10], [4, 2, 24]).astype(np.int16)
    stripped = synth.strip(labels, voxels)
    assert stripped.dtype == np.int16
    assert (stripped == np.where(distance < 5 + voxels, labels, 0)).all()

def test_random_contrasts_differ_and_keep_tissues_uniform():
    quarters = np.kron([[2, 3], [4, 10]], np.ones((8, 8), int))
    labels = np.repeat(quarters[..., None], 8, axis=2)
    rng = np.random.default_rng(0)
    images = synth.images_from_labels(labels, ('random1', 'random2'), rng, noise=0.0, bias=0.0)
    means = []
    for image in images.values():
        means.append([image[labels == label].mean() for label in (2, 3, 4, 10)])
    assert np.ptp(means[0]) > 0.1 and not np.allclose(*means, atol=0.05)

def test_a_contrast_without_a_number_is_refused():
    with pytest.raises(ValueError, match='random'):
        synth.images_from_labels(np.full((4, 4, 4), 2), ('random',), np.random.default_rng(0))

@pytest.mark.parametrize('label, reason', [(200, 'no tissue'), (514, 'without a brain')])
def test_label_maps_without_a_known_brain_are_refused(label, reason):
    with pytest.raises(ValueError, match=reason):
        synth.brain_labels(np.full((4, 4, 4), label))

# ---------------------------------------------------------------- images drawn anew while training

@pytest.fixture(scope='module')
def rendered():
    """Labels (3,1,D,H,W), and two renderings as T1w, T2w and random1; only the first seed is shared."""
    labels = torch.from_numpy(synth.phantom(1, (40, 52, 40))['labels'].astype(np.int64))
    labels = labels.repeat(3, 1, 1, 1, 1)
    images = []
    for seeds in ((1, 2, 3), (1, 5, 6)):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images.append(synth.render(labels, ('T1w', 'T2w', 'random1'), generators))
    return labels, *images

def test_a_rendered_image_is_a_function_of_its_generator(rendered):
    _, a, b = rendered
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])

def test_rendered_images_lie_on_their_labels_in_0_1(rendered):
    labels, a, _ = rendered
    assert ((a > 0) == (labels > 0)).all() and a.max() <= 1

def test_rendered_images_have_the_contrasts_of_prepared_ones(rendered):
    labels, a, _ = rendered
    white = torch.isin(labels[0, 0], torch.tensor(synth.GROUPS['white']))
    fluid = torch.isin(labels[0, 0], torch.tensor(synth.GROUPS['csf']))
    t1, t2 = a[0, 0], a[1, 0]
    assert t1[white].mean() > t1[fluid].mean() + 0.1
    assert t2[white].mean() <= t2[fluid].mean() + 0.1

def test_a_random_contrast_differs_by_more_than_noise(rendered):
    _, a, b = rendered
    assert (a[2] - b[2]).abs().mean() > (a[1] - b[1]).abs().mean()

@pytest.fixture(scope='module')
def synthesised(tmp_path_factory):
    """A folder with data of label maps, and the last checkpoint of folder/a, trained on images anew."""
    folder = tmp_path_factory.mktemp('synthesised')
    for seed in (1, 2, 3):
        label_map(folder / 'maps', seed)
    prepared('labelmaps', folder / 'maps', folder / 'data', '--n=6', '--shape=32,48,32', '--spacing_mm=5',
             '--modalities=T1w,T2w', '--split=1,0,0')
    return folder, train(folder, folder / 'a', '--synthesise=0.5')

def train(folder, out, *args):
    """The last checkpoint of a short training on folder/data."""
    folders = [f'--data_dir={folder}/data', f'--out_dir={out}']
    play('train_vae.py', *TINY, *SHORT, '--iters_2d=0', *folders, *args)
    return load_checkpoint(f'{out}/ckpt.pt')

def test_training_on_images_drawn_anew_resumes_to_the_same_bits(synthesised, tmp_path):
    folder, whole = synthesised
    train(folder, tmp_path, '--synthesise=0.5', '--max_iters=2')
    resumed = train(folder, tmp_path, '--synthesise=0.5', '--init_from=resume')
    assert_same_run(whole, resumed, folder / 'a', tmp_path)

def test_training_on_images_drawn_anew_learns_something_else(synthesised, tmp_path):
    folder, whole = synthesised
    plain = train(folder, tmp_path)
    assert any(not torch.equal(value, whole['model'][key]) for key, value in plain['model'].items())

def test_training_on_images_drawn_anew_needs_label_maps(synthesised, tmp_path):
    folder, _ = synthesised
    shutil.copytree(folder / 'data', tmp_path / 'data', ignore=shutil.ignore_patterns('*dseg.npy'))
    args = [*TINY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', '--synthesise=1.0']
    assert 'no label map' in refuses('train_vae.py', *args)
