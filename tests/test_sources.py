"""Cohorts' trees and tables, masks, registration, shards, the look before: on generated trees as real ones are laid out."""
import json
import os
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from scans import nifti
from scans import sources
import synth
from common import load_checkpoint
from conftest import ROOT, TINY, play, refused, refuses, run
from scans.register import mutual_information, register
from test_nifti import head, save, store
from test_prepare import add, prepare, table
from test_train import SHORT, assert_same_run

LABELMAPS = os.path.join(ROOT, '..', 'shared', 'data', 'labelmaps')

# ---------------------------------------------------------------- trees and tables

def test_ixi_archives_and_its_spreadsheet(tmp_path):
    for name in (
        'IXI-T1/IXI002-Guys-0828-T1',
        'IXI-T2/IXI002-Guys-0828-T2',
        'IXI-PD/IXI002-Guys-0828-PD',
        'IXI-T1/IXI012-HH-1211-T1',
        'IXI-T1/readme',
    ):
        add(tmp_path, f'ixi/{name}.nii.gz')
    (tmp_path / 'ixi.csv').write_text(
        'IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,AGE\n2,2,164,35.8\n12,1,175,38.78\n999,1,1,1\n'
    )
    done = run(
        'prepare.py',
        f'{ROOT}/config/data_ixi.py',
        f'--root={tmp_path}/ixi',
        f'--people={tmp_path}/ixi.csv',
        f'--out_dir={tmp_path}/out',
        '--shape=48,48,48',
        '--workers=1',
        '--register=False',
    )
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'out')
    assert [(r['subject'], r['sex'], r['age']) for r in rows] == [
        ('sub-IXI002', 'F', '35.8'),
        ('sub-IXI012', 'M', '38.78'),
    ]
    assert rows[0]['PD'] and rows[0]['T2w'] and not rows[1]['T2w'] and 'readme' in done.stdout

def test_ukb_archives_are_read_where_they_are(tmp_path):
    brain = store(str(tmp_path / 'b.nii.gz'), head(), code='LAS')
    (tmp_path / 'ukb').mkdir()
    for eid in ('1000010', '1000028'):
        with zipfile.ZipFile(tmp_path / 'ukb' / f'{eid}_20252_2_0.zip', 'w') as z:
            z.write(brain, 'T1/T1_brain_to_MNI.nii.gz')
    with zipfile.ZipFile(tmp_path / 'ukb' / '1000036_20252_2_0.zip', 'w') as z:
        z.write(brain, 'T1/other.nii.gz')
    (tmp_path / 'ukb' / '1000044_20252_2_0.zip').write_bytes(b'PK half')
    (tmp_path / 'ukb.csv').write_text('eid,31-0.0,21003-2.0\n1000010,0,61\n1000028,1,70\n')
    done = run(
        'prepare.py',
        f'{ROOT}/config/data_ukb.py',
        f'--root={tmp_path}/ukb',
        f'--people={tmp_path}/ukb.csv',
        f'--out_dir={tmp_path}/out',
        '--shape=48,48,48',
        '--workers=1',
    )
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'out')
    assert [(r['subject'], r['session'], r['sex'], r['age']) for r in rows] == [
        ('sub-1000010', 'ses-2', 'F', '61'),
        ('sub-1000028', 'ses-2', 'M', '70'),
    ]
    stored = np.load(tmp_path / 'out' / rows[0]['T1w'])
    (want,), _ = nifti.conform([nifti.read(brain)[0]], [nifti.read(brain)[1]], (48, 48, 48))
    assert stored.dtype == np.float16 and np.abs(stored - want).max() < 1e-3  # the error of float16 storage
    assert done.stdout.count('cannot be unpacked') == 2

COHORTS = {  # config: its files, a spreadsheet, the rows that come of them
    'ncanda': (
        [
            'NCANDA_S00033/standard/baseline/structural/stripped/t1',
            'NCANDA_S00033/standard/baseline/structural/stripped/t2',
            'NCANDA_S00033/standard/baseline/structural/native/t1',
        ],
        'subject,sex,age\nNCANDA_S00033,F,17.2\n',
        [('sub-NCANDA_S00033', 'ses-baseline', ['T1w', 'T2w'], 'F', '17.2')],
    ),
    'abcd': (
        [
            f'sub-X/ses-b/anat/sub-X_ses-b_{name}'
            for name in (
                'desc-preproc_T1w',
                'space-MNI152NLin2009cAsym_desc-preproc_T1w',
                'space-MNI152NLin2009cAsym_desc-brain_mask',
            )
        ],
        'subject,sex,age\nX,M,10\n',
        [('sub-X', 'ses-b', ['T1w'], 'M', '10')],
    ),
    'hcp': (
        [
            f'{who}/T1w/{name}'
            for who in (100307, 100408)
            for name in (
                'T1w_acpc_dc_restore_brain',
                'T2w_acpc_dc_restore_brain',
                'T1w_acpc_dc_restore',
                'wmparc',
            )
        ],
        'Subject,Release,Gender,Age\n100307,Q1,F,26-30\n',
        [
            ('sub-100307', 'ses-01', ['T1w', 'T2w'], 'F', '26-30'),
            ('sub-100408', 'ses-01', ['T1w', 'T2w'], '', ''),
        ],
    ),
    'oasis3': (
        [
            'sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_run-01_T1w',
            'sub-OAS30001/ses-d0129/anat/sub-OAS30001_ses-d0129_FLAIR',
            'sub-OAS30001/ses-d0757/anat/sub-OAS30001_ses-d0757_T1w',
        ],
        'OASISID,GENDER,AgeatEntry\nOAS30001,2,65.1\n',
        [
            ('sub-OAS30001', 'ses-d0129', ['T1w', 'FLAIR'], 'F', '65.1'),
            ('sub-OAS30001', 'ses-d0757', ['T1w'], 'F', '65.1'),
        ],
    ),
}

@pytest.mark.parametrize('cohort', COHORTS)
def test_recipes_of_cohorts(cohort, tmp_path):
    files, people, wanted = COHORTS[cohort]
    for name in files:
        add(tmp_path, f'tree/{name}.nii.gz')
    (tmp_path / 'people.csv').write_text(people)
    play(
        'prepare.py',
        f'{ROOT}/config/data_{cohort}.py',
        f'--root={tmp_path}/tree',
        f'--people={tmp_path}/people.csv',
        f'--out_dir={tmp_path}/out',
        '--shape=48,48,48',
        '--workers=1',
        '--register=False',
    )
    assert [
        (
            r['subject'],
            r['session'],
            [m for m in ('T1w', 'T2w', 'FLAIR', 'PD') if r.get(m)],
            r['sex'],
            r['age'],
        )
        for r in table(tmp_path / 'out')
    ] == wanted

def test_patterns_name_subject_session_and_modality(tmp_path):
    add(tmp_path, 'n/NCANDA_S00033/standard/baseline/structural/stripped/t1.nii.gz')
    add(tmp_path, 'n/NCANDA_S00033/standard/followup_1y/structural/stripped/t2.nii.gz')
    add(tmp_path, 'n/NCANDA_S00033/standard/followup_1y/structural/native/t2.nii.gz')
    notes = []
    sessions, _ = sources.find_pattern(
        str(tmp_path / 'n'), notes, '{subject}/standard/{session}/structural/stripped/{modality}.nii.gz'
    )
    assert {k: sorted(v) for k, v in sessions.items()} == {
        ('sub-NCANDA_S00033', 'ses-baseline'): ['T1w'],
        ('sub-NCANDA_S00033', 'ses-followup_1y'): ['T2w'],
    }
    assert len(notes) == 1 and 'native' in notes[0]
    sessions, _ = sources.find_pattern(
        str(tmp_path / 'n'), [], '{subject}/*/{session}/*/native/{modality}.nii.gz'
    )
    assert list(sessions) == [('sub-NCANDA_S00033', 'ses-followup_1y')]

def test_derivatives_are_chosen_by_their_entities(tmp_path):
    anat = 'd/sub-01/ses-a/anat/sub-01_ses-a'
    for name in (
        'desc-preproc_T1w',
        'space-MNI_desc-preproc_T1w',
        'space-MNI_res-2_desc-preproc_T1w',
        'space-MNI_desc-brain_mask',
    ):
        add(tmp_path, f'{anat}_{name}.nii.gz')
    notes = []
    sessions, _ = sources.find_bids(str(tmp_path / 'd'), notes, ('space-MNI', 'desc-preproc'))
    assert [os.path.basename(p) for p in sessions['sub-01', 'ses-a'].values()] == [
        'sub-01_ses-a_space-MNI_desc-preproc_T1w.nii.gz'
    ]
    assert (
        len(notes) == 3
        and sum('is used' in n for n in notes) == 1
        and sum('without space-MNI' in n for n in notes) == 1
    )

@pytest.mark.parametrize('args, words', [
    (['--source=pattern', '--pattern={subject}.nii.gz'], ['{modality}']), (['--source=pattern', '--pattern={subject}/{modality}_{run}.nii'], ['{run}']),
    (['--source=folder', '--people={root}/p.csv'], ['p.csv', "no column 'subject'", 'eid']), (['--source=folder', '--people={root}/p.csv', '--columns=eid,sex,age'], ['none of its rows']),
    (['--source=folder', '--shard=3/3'], ['--shard=3/3', 'i/n']), (['--source=folder', '--skullstrip=bet x y'], ['{in}', '{out}']), (['--source=folder', '--mask=a', '--skullstrip={in}{out}'], ['one of them']),
    (['--source=folder', '--mask={sub}.nii'], ['--mask', '{subject}']), (['--source=phantom', '--dry_run=True'], ['dry_run']), (['--source=labelmaps', '--modalities=CT'], ['CT', 'random1'])])
def test_bad_settings_of_sources_end_with_one_line(args, words, tmp_path):
    add(tmp_path, '01_T1w.nii.gz')
    (tmp_path / 'p.csv').write_text('eid,sex,age\n77,F,3\n')
    done = run(
        'prepare.py',
        f'--root={tmp_path}',
        f'--out_dir={tmp_path}/out',
        '--workers=1',
        *[a.replace('{root}', str(tmp_path)) for a in args],
    )
    assert refused(done, *words) and not (tmp_path / 'out' / 'subjects.tsv').exists()

# ---------------------------------------------------------------- masks

def raw_head(seed):
    return head(seed=seed) + 20 + 5 * np.random.default_rng(seed).random(head().shape).astype(np.float32)

def test_masks_come_from_files_beside_the_scan_or_from_a_command(tmp_path):
    brain = np.zeros(head().shape, np.float32)
    brain[12:28, 12:30, 10:26] = 1
    for i in (0, 1):
        add(tmp_path, f'a/sub-0{i}/anat/sub-0{i}_T1w.nii.gz', raw_head(i), code='LAS')
        add(tmp_path, f'a/sub-0{i}/anat/sub-0{i}_brainmask.nii.gz', brain, code='LAS')
    add(tmp_path, 'a/sub-02/anat/sub-02_T1w.nii.gz', raw_head(2))
    done = prepare('bids', tmp_path / 'a', tmp_path / 'out', '--mask={subject}*_brainmask.nii.gz')
    assert (
        done.returncode == 0
        and 'sub-02_T1w.nii.gz: 0 files fit its mask' in done.stdout
        and 'raw head' not in done.stdout
    )
    assert (np.load(tmp_path / 'out' / 'sub-00_ses-01_T1w.npy') > 0).sum() == brain.sum()
    script = tmp_path / 'strip.py'
    script.write_text(
        'import sys, nibabel as nib, numpy as np\nx = nib.load(sys.argv[1])\nm = np.zeros(x.shape,'
        ' np.float32)\nm[12:28, 12:30, 10:26] = 1\nnib.save(nib.Nifti1Image(m * x.get_fdata(), x.affine),'
        ' sys.argv[2])\n'
    )
    done = prepare(
        'bids', tmp_path / 'a', tmp_path / 'out2', f'--skullstrip={sys.executable} {script} {{in}} {{out}}'
    )
    assert (
        done.returncode == 0 and 'no scan was skipped' in done.stdout and len(table(tmp_path / 'out2')) == 3
    )
    assert (np.load(tmp_path / 'out2' / 'sub-02_ses-01_T1w.npy') > 0).sum() == brain.sum()
    assert (
        'ended with 2' in prepare(
            'bids',
            tmp_path / 'a',
            tmp_path / 'out3',
            f'--skullstrip={sys.executable} /nowhere.py {{in}} {{out}}',
        ).stderr
    )

# ---------------------------------------------------------------- registration

def test_mutual_information_of_equal_and_of_independent_images():
    a, b = np.random.default_rng(0).integers(0, 8, (2, 200000))
    assert mutual_information(a, a, 8) == pytest.approx(2) and mutual_information(
        a, 7 - a, 8
    ) == pytest.approx(2)
    assert mutual_information(a, b, 8) == pytest.approx(1, abs=1e-3)

@pytest.fixture(scope='module')
def pair():
    return synth.phantom(1, (84, 109, 84))['images']

@pytest.mark.parametrize('turn, shift', [((6, -4, 3), (5, -7, 4)), ((0, 0, 0), (0, 0, 0))])
def test_registration_finds_the_way_back_between_two_contrasts(pair, turn, shift):
    affine, centre = np.diag([2.0, 2, 2, 1]), np.array([84.0, 109, 84])
    away = np.eye(4)
    away[:3, :3] = Rotation.from_euler('xyz', turn, degrees=True).as_matrix()
    away[:3, 3] = centre - away[:3, :3] @ centre + shift
    found, facts = register(pair['T1w'], affine, pair['T2w'], away @ affine)
    corners = affine[:3, :3] @ np.argwhere(pair['T1w'] > 0)[::500].T + affine[:3, 3:]
    back = found @ np.linalg.inv(affine) @ np.vstack([corners, np.ones(corners.shape[1])])
    assert np.linalg.norm(back[:3] - corners, axis=0).max() < 1.0  # half a voxel
    if any(turn):
        assert facts['reason'] == '' and facts['nmi_after'] > facts['nmi_before']

def test_registration_without_a_likeness_keeps_the_affine_and_says_so():
    rng = np.random.default_rng(0)
    a, b = np.pad(rng.random((24, 24, 24)), 4), np.pad(rng.random((24, 24, 24)), 4)
    affine = np.eye(4)
    affine[:3, 3] = 200
    found, facts = register(a, np.eye(4), b, affine, points=4000)
    assert facts['reason'] and (found == affine).all()

def test_registered_sessions_are_reported(tmp_path, pair):
    affine = np.diag([2.0, 2, 2, 1])
    moved = affine.copy()
    moved[0, 3] += 9
    for name, volume, a in (('T1w', pair['T1w'], affine), ('T2w', pair['T2w'], moved)):
        path = tmp_path / f'b/sub-01/anat/sub-01_{name}.nii.gz'
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, a), path)
    done = prepare('bids', tmp_path / 'b', tmp_path / 'out', '--register=True', '--spacing_mm=4')
    assert done.returncode == 0 and '1 scans registered, 0 of them without success' in done.stdout
    t1, t2 = (np.load(tmp_path / 'out' / f'sub-01_ses-01_{m}.npy') > 0 for m in ('T1w', 'T2w'))
    assert 2 * (t1 & t2).sum() / (t1.sum() + t2.sum()) > 0.97

# ---------------------------------------------------------------- array jobs

def test_shards_and_a_last_call_give_what_one_call_gives(tmp_path):
    for i in range(5):
        add(tmp_path, f'a/0{i}_T1w.nii.gz', head(seed=i))
    assert prepare('folder', tmp_path / 'a', tmp_path / 'whole').returncode == 0
    for part in (0, 1):
        assert (
            f'shard {part}/2' in prepare(
                'folder', tmp_path / 'a', tmp_path / 'parts', f'--shard={part}/2'
            ).stdout
        )
        assert not (tmp_path / 'parts' / 'subjects.tsv').exists()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'parts').glob('sub-*.npy')}
    assert prepare('folder', tmp_path / 'a', tmp_path / 'parts').returncode == 0 and len(times) == 5
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'parts').glob('sub-*.npy')}
    # a late job spoils nothing
    assert 'shard 0/2' in prepare('folder', tmp_path / 'a', tmp_path / 'parts', '--shard=0/2').stdout
    for name in ('subjects.tsv', 'checksums.json', 'report.txt', 'dataset.json'):
        assert (tmp_path / 'whole' / name).read_text() == (tmp_path / 'parts' / name).read_text()

# ---------------------------------------------------------------- the look before

def test_a_dry_run_shows_what_is_odd_and_writes_no_data(tmp_path):
    for i in range(6):
        p = synth.phantom(i + 1, (40, 52, 40))['images']
        for name in ('T1w', 'T2w'):
            image = p['T1w' if (i, name) == (3, 'T2w') else name]  # one T1w under the name of a T2w
            path = tmp_path / f'a/0{i}_{name}.nii.gz'
            path.parent.mkdir(exist_ok=True)
            if (i, name) != (5, 'T2w'):
                nib.save(nib.Nifti1Image(image, np.diag([-4.0 if i == 1 else 4.0, 4, 4, 1])), path)
    (tmp_path / 'a' / '07_T1w.nii.gz').write_bytes((tmp_path / 'a' / '00_T1w.nii.gz').read_bytes())
    (tmp_path / 'a' / '08_T1w.nii.gz').write_text('hello')
    (tmp_path / 'a' / 'localizer.nii.gz').write_text('')
    done = prepare('folder', tmp_path / 'a', tmp_path / 'out', '--dry_run=True')
    assert done.returncode == 0, done.stderr
    for words in (
        '13 scans, 1 of them unusable',
        'RAS 6, LAS 1',
        '08_T1w.nii.gz: not a readable',
        '00_T1w.nii.gz = ',
        'sub-05 ses-01: no T2w',
        '03_T2w.nii.gz: named T2w, looks like T1w',
        '12 larger than the box',
        'localizer',
    ):
        assert words in done.stdout, words
    assert done.stdout.count('looks like') == 1
    written = sorted(
        str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*') if p.is_file()
    )
    assert written in (
        ['preflight/T1w.png', 'preflight/T2w.png', 'preflight/scans.tsv'],
        ['preflight/scans.tsv'],
    )

# ---------------------------------------------------------------- label maps

def label_map(folder, seed):
    """A small head: a phantom's labels at 4 mm inside a shell of 500, an odd label of the borders inside ventricles."""
    labels = synth.phantom_labels((42, 54, 42), np.random.default_rng(seed), 'F')
    labels[labels == 14] = 136
    labels[:2] = 514
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([-4.0, 4, 4, 1])), folder / f'm{seed}_dseg.nii.gz')

def test_label_maps_become_sessions_that_stay_with_their_subject(tmp_path):
    for seed in (1, 2, 3):
        label_map(tmp_path / 'maps', seed)
    save(str(tmp_path / 'maps' / 'm4_odd.nii.gz'), 200 + np.indices((8, 8, 8))[0], np.int16)
    args = [
        '--n=9',
        '--shape=32,48,32',
        '--spacing_mm=4',
        '--modalities=T1w,T2w,random1',
        '--thickness_mm=8',
        '--split=0.4,0.3,0.3',
    ]
    done = prepare('labelmaps', tmp_path / 'maps', tmp_path / 'out', *args)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'out')
    assert 'm4_odd.nii.gz: labels [200, 201' in done.stdout
    assert (
        len(rows) == 7
        and len({r['subject'] for r in rows}) == 3
        and len({(r['subject'], r['split']) for r in rows}) == 3
    )
    first = {m: np.load(tmp_path / 'out' / rows[0][m]) for m in ('T1w', 'T2w', 'random1', 'dseg')}
    assert all(((v > 0) == (first['dseg'] > 0)).all() for v in first.values()) and set(
        np.unique(first['dseg'])
    ) <= set(synth.LABELS)
    white, fluid = np.isin(first['dseg'], (2, 41)), np.isin(first['dseg'], (4, 43))
    assert (
        first['T1w'][white].mean() > first['T1w'][fluid].mean()
        and first['T2w'][white].mean() < first['T2w'][fluid].mean()
    )
    same = [r for r in rows if r['subject'] == rows[0]['subject']]
    # another deformation
    assert not np.array_equal(first['dseg'], np.load(tmp_path / 'out' / same[1]['dseg']))
    again = prepare('labelmaps', tmp_path / 'maps', tmp_path / 'again', *args)
    assert (
        again.returncode == 0
        and (tmp_path / 'out' / 'checksums.json').read_text()
        == (tmp_path / 'again' / 'checksums.json').read_text()
    )

def test_stripping_takes_the_csf_from_a_distance_on():
    distance = np.abs(np.indices((21, 21, 21)) - 10).sum(0)  # in steps between neighbours
    # a ventricle, white matter, CSF
    labels = np.select([distance == 0, distance < 5, distance < 10], [4, 2, 24]).astype(np.int16)
    for voxels in (0, 1, 2, 20):
        cut = synth.strip(labels, voxels)
        assert cut.dtype == np.int16 and (cut == np.where(distance < 5 + voxels, labels, 0)).all()

def test_random_contrasts_differ_and_keep_tissues_uniform():
    labels = np.repeat(np.repeat(np.array([[2, 3], [4, 10]]), 8, 0), 8, 1)[..., None] * np.ones(
        (1, 1, 8), int
    )
    images = synth.images_from_labels(
        labels, ('random1', 'random2'), np.random.default_rng(0), noise=0.0, bias=0.0
    )
    means = [[v[labels == k].mean() for k in (2, 3, 4, 10)] for v in images.values()]
    assert np.ptp(means[0]) > 0.1 and not np.allclose(*means, atol=0.05)
    with pytest.raises(ValueError, match='random'):
        synth.images_from_labels(labels, ('random',), np.random.default_rng(0))
    with pytest.raises(ValueError, match='no tissue'):
        synth.brain_labels(np.full((4, 4, 4), 200))
    with pytest.raises(ValueError, match='without a brain'):
        synth.brain_labels(np.full((4, 4, 4), 514))

def test_rendered_images_are_functions_of_their_generator_with_the_contrasts_of_the_prepared_ones():
    labels = torch.from_numpy(synth.phantom(1, (40, 52, 40))['labels'].astype(np.int64))[None, None].repeat(
        3, 1, 1, 1, 1
    )
    draw = lambda seeds: synth.render(
        labels, ('T1w', 'T2w', 'random1'), [torch.Generator().manual_seed(s) for s in seeds]
    )
    a, b = draw((1, 2, 3)), draw((1, 5, 6))
    assert (
        torch.equal(a[0], b[0])
        and not torch.equal(a[1], b[1])
        and ((a > 0) == (labels > 0)).all()
        and a.max() <= 1
    )
    for image, modality in zip(a[:2], ('T1w', 'T2w')):
        means = {
            group: image[0][torch.isin(labels[0, 0], torch.tensor(synth.GROUPS[group]))].mean()
            for group in ('white', 'csf')
        }
        assert (means['white'] > means['csf'] + 0.1) == (modality == 'T1w')
    # a random contrast differs by more than noise
    assert (a[2] - b[2]).abs().mean() > (a[1] - b[1]).abs().mean()

def test_training_on_images_drawn_anew_resumes_to_the_same_bits(tmp_path):
    for seed in (1, 2, 3):
        label_map(tmp_path / 'maps', seed)
    assert (
        prepare(
            'labelmaps',
            tmp_path / 'maps',
            tmp_path / 'data',
            '--n=6',
            '--shape=32,48,32',
            '--spacing_mm=5',
            '--modalities=T1w,T2w',
            '--split=1,0,0',
        ).returncode
        == 0
    )
    def go(out, *args):
        play(
            'train_vae.py',
            *TINY,
            *SHORT,
            f'--data_dir={tmp_path}/data',
            f'--out_dir={tmp_path}/{out}',
            '--iters_2d=0',
            *args,
        )
        return load_checkpoint(tmp_path / out / 'ckpt.pt')
    whole = go('a', '--synthesise=0.5')
    go('b', '--synthesise=0.5', '--max_iters=2')
    assert_same_run(whole, go('b', '--synthesise=0.5', '--init_from=resume'), tmp_path / 'a', tmp_path / 'b')
    plain = go('c')
    assert any(not torch.equal(v, whole['model'][k]) for k, v in plain['model'].items())
    for file in (tmp_path / 'data').glob('*dseg.npy'):
        file.unlink()
    assert 'no label map' in refuses(
        'train_vae.py', *TINY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/d', '--synthesise=1.0'
    )

@pytest.mark.skipif(not os.path.isdir(LABELMAPS), reason='no real label maps beside the project')
def test_a_real_label_map_becomes_a_session(tmp_path):
    done = run(
        'prepare.py',
        '--source=labelmaps',
        f'--root={LABELMAPS}',
        '--n=2',
        '--shape=48,64,48',
        '--spacing_mm=3',
        f'--out_dir={tmp_path}/out',
    )
    assert done.returncode == 0, done.stderr
    for r in table(tmp_path / 'out'):
        assert float(r['lost']) < 0.03
        # mm3 with fluid
        assert (np.load(tmp_path / 'out' / r['dseg']) > 0).sum() * 27 == pytest.approx(1.5e6, rel=0.35)
