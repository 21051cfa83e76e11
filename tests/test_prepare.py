"""prepare.py as a user runs it, on generated trees with the oddities real ones have."""
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import prepare as script
from conftest import ROOT, play, refused, run
from prepare import hash_of, split_of, split_subjects
from scans import masks
from test_nifti import head, nans, save, store, truncated

SMALL = ['--shape=48,48,48', '--workers=1']
REAL = os.path.join(ROOT, '..', 'shared', 'data', 'realmri')

def prepare(source, root, out, *args):
    return run('prepare.py', f'--source={source}', f'--root={root}', f'--out_dir={out}', *SMALL, *args)

def prepared(source, root, out, *args):
    """What prepare.py printed, which has to succeed."""
    done = prepare(source, root, out, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout

def table(out):
    with open(f'{out}/subjects.tsv', newline='') as f:
        return list(csv.DictReader(f, delimiter='\t'))

def array(out, name):
    return np.load(f'{out}/{name}.npy')

def write_times(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob('sub-*.npy')}

def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())

def add(root, name, volume=None, **kwargs):
    """A scan of a tree, of a head unless a volume is given; kwargs as test_nifti.store."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return store(str(path), head() if volume is None else volume, **kwargs)

def make_bids(root, n=4):
    """Subjects in mixed orientations and suffixes, and participants.tsv.

    One has two visits, one no T2w, one two runs. Inside the brain T2w is 200 - T1w.
    """
    for i in range(n):
        anat = f'sub-{i:02d}/anat/sub-{i:02d}'
        t1 = head(seed=i)
        add(root, f'{anat}_T1w.nii.gz', t1, code=('RAS', 'LAS', 'LPS', 'RAS')[i % 4])
        if i != 1:
            add(root, f'{anat}_T2w.nii', 200 * (t1 > 0) - t1, code='LPS')
    add(root, 'sub-00/ses-b/anat/sub-00_ses-b_T1w.nii.gz')
    add(root, 'sub-02/anat/sub-02_run-2_T1w.nii.gz')
    (root / 'participants.tsv').write_text('participant_id\tsex\tage\nsub-00\tF\t31\nsub-01\tn/a\t44\n')
    return root

# ---------------------------------------------------------------- a tree becomes data

@pytest.fixture(scope='module')
def bids(tmp_path_factory):
    """A prepared BIDS tree: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp('bids')
    return folder / 'out', prepared('bids', make_bids(folder / 'tree'), folder / 'out')

def test_the_index_has_a_row_per_session(bids):
    sessions = [(row['subject'], row['session']) for row in table(bids[0])]
    assert sessions == [('sub-00', 'ses-01'), ('sub-00', 'ses-b'), ('sub-01', 'ses-01'),
                        ('sub-02', 'ses-01'), ('sub-03', 'ses-01')]

def test_the_index_has_what_is_known_of_participants(bids):
    rows = table(bids[0])
    assert rows[0]['sex'] == 'F' and rows[0]['age'] == '31' and rows[2]['sex'] == ''

def test_a_missing_modality_is_empty_in_the_index(bids):
    assert [bool(row['T2w']) for row in table(bids[0])] == [True, False, False, True, True]

def test_visits_of_a_subject_share_a_split(bids):
    assert len({row['split'] for row in table(bids[0]) if row['subject'] == 'sub-00'}) == 1

def test_volumes_are_named_after_their_session_and_lie_in_0_1(bids):
    for row in table(bids[0]):
        for modality in ('T1w', 'T2w'):
            if not row[modality]: continue
            name = f"{row['subject']}_{row['session']}_{modality}"
            volume = array(bids[0], name)
            assert row[modality] == f'{name}.npy'
            assert volume.shape == (48, 48, 48) and volume.dtype == np.float32
            assert volume.min() == 0 and volume.max() == 1

def test_modalities_of_a_session_lie_on_one_another(bids):
    t1, t2 = array(bids[0], 'sub-00_ses-01_T1w'), array(bids[0], 'sub-00_ses-01_T2w')
    inside = t1 > 0
    assert ((t2 > 0) == inside).all() and np.corrcoef(t1[inside], t2[inside])[0, 1] < -0.99

def test_the_report_counts_and_names_files_not_used(bids):
    used, not_used = bids[1].split('files not used')
    assert '4 subjects, 5 sessions' in used and 'LPS' in used
    assert used.endswith('1 ') and 'sub-02_run-2_T1w' not in used and 'sub-02_run-2_T1w' in not_used

def test_dataset_json_says_what_the_volumes_are(bids):
    dataset = json.loads((bids[0] / 'dataset.json').read_text())
    assert dataset['shape'] == [48, 48, 48]
    assert dataset['modalities'] == ['T1w', 'T2w'] and dataset['axes'] == 'RAS+'

def test_csv_and_folder_sources_agree_with_bids(tmp_path):
    make_bids(tmp_path / 'tree', 2)
    (tmp_path / 'scans.csv').write_text(
        'subject,session,modality,path,sex,age,split\n'
        '00,01,t1,tree/sub-00/anat/sub-00_T1w.nii.gz,F,31,train\n'
        '00,01,T2w,tree/sub-00/anat/sub-00_T2w.nii,F,31,train\n'
        '01,,T1w,tree/sub-01/anat/sub-01_T1w.nii.gz,M,44,test\n')
    add(tmp_path, 'flat/00_T1.nii.gz', head(seed=0))
    add(tmp_path, 'flat/01/mprage.nii.gz', head(seed=1), code='LAS')
    add(tmp_path, 'flat/01/localizer.nii.gz')
    prepared('bids', tmp_path / 'tree', tmp_path / 'bids')
    prepared('csv', tmp_path / 'scans.csv', tmp_path / 'csv')
    printed = prepared('folder', tmp_path / 'flat', tmp_path / 'folder')
    assert 'localizer' in printed
    assert [row['subject'] for row in table(tmp_path / 'folder')] == ['sub-00', 'sub-01']
    assert [row['split'] for row in table(tmp_path / 'csv')] == ['train', 'test']
    for name in ('sub-00_ses-01_T1w', 'sub-01_ses-01_T1w'):
        for source in ('bids', 'folder'):
            np.testing.assert_array_equal(array(tmp_path / source, name), array(tmp_path / 'csv', name))

PHANTOMS = ['--source=phantom', '--n=3', '--shape=32,48,32']

def phantoms(out, *args):
    play('prepare.py', *PHANTOMS, '--workers=1', f'--out_dir={out}', *args)
    return table(out)

def test_phantoms_come_with_labels_sex_and_age(tmp_path):
    rows = phantoms(tmp_path)
    assert len(rows) == 3 and all(row['sex'] in 'FM' and 20 <= float(row['age']) <= 80 for row in rows)
    labels, t2 = np.load(tmp_path / rows[0]['dseg']), np.load(tmp_path / rows[0]['T2w'])
    assert labels.dtype == np.int16 and ((labels > 0) == (t2 > 0)).all()

def test_a_phantom_is_as_large_as_a_head_whatever_its_voxels(tmp_path):
    prepared('phantom', '', tmp_path / 'out', '--n=1')
    with open(tmp_path / 'out' / 'dataset.json') as f:
        voxel_mm = json.load(f)['voxel_mm']
    brain = (np.load(tmp_path / 'out' / 'sub-001_ses-01_dseg.npy') > 0).sum() * np.prod(voxel_mm) / 1e6
    assert 1.0 < brain < 2.5  # litres, with the CSF around it

def test_a_phantom_depends_on_its_number_alone(tmp_path):
    all_rows, few_rows = phantoms(tmp_path / 'a'), phantoms(tmp_path / 'b', '--n=2', '--modalities=T2w')
    a, b = np.load(tmp_path / 'a' / all_rows[0]['T2w']), np.load(tmp_path / 'b' / few_rows[0]['T2w'])
    np.testing.assert_array_equal(a, b)

def test_workers_make_what_one_process_makes(tmp_path):
    """Worker processes know the settings: shape, seed, dtype and modalities differ from the defaults."""
    args = ['--seed=2', '--dtype=float16', '--modalities=T2w']
    for workers in (1, 2):
        play('prepare.py', *PHANTOMS, *args, f'--workers={workers}', f'--out_dir={tmp_path}/{workers}')
    for name in ('subjects.tsv', 'dataset.json', 'checksums.json', 'report.txt'):
        assert (tmp_path / '1' / name).read_text() == (tmp_path / '2' / name).read_text()

@pytest.mark.skipif(not os.path.isdir(REAL), reason='no real scans beside the project')
def test_real_scans_prepare_without_a_hand_made_step(tmp_path):
    """Whole heads and stripped brains, LPS and LAS, thick slices and 1 mm: all 20 scans are used.

    Modalities lie on one another.
    """
    printed = play('prepare.py', '--source=bids', f'--root={REAL}', f'--out_dir={tmp_path}', '--spacing_mm=4',
                   '--shape=48,64,48')
    rows = table(tmp_path)
    assert len(rows) == 7 and 'no scan was skipped' in printed
    used = 0
    for row in rows:
        first, *others = [np.load(tmp_path / row[m]) > 0 for m in ('T1w', 'T2w', 'FLAIR') if row[m]]
        used += 1 + len(others)
        assert all(dice(first, other) > 0.85 for other in others)
    assert used == 20

# ---------------------------------------------------------------- once more

def test_a_second_run_writes_nothing_again_but_what_is_broken(tmp_path):
    tree, out = make_bids(tmp_path / 'bids'), tmp_path / 'out'
    prepared('bids', tree, out)
    times, report = write_times(out), (out / 'report.txt').read_text()
    broken = out / 'sub-03_ses-01_T1w.npy'
    os.truncate(broken, 1000)
    (out / 'subjects.tsv').unlink()
    prepared('bids', tree, out)
    again = write_times(out)
    assert {name for name in times if again[name] != times[name]} == {broken.name, 'sub-03_ses-01_T2w.npy'}
    assert np.load(broken).shape == (48, 48, 48)
    assert (out / 'report.txt').read_text() == report

def written_again(source, root, out, *args):
    """The volumes that another run writes again."""
    times = write_times(out)
    prepared(source, root, out, *args)
    return [name for name, time in sorted(write_times(out).items()) if times.get(name) != time]

def test_a_changed_or_added_mask_makes_its_session_again(tmp_path):
    tree, out, pattern = tmp_path / 'bids', tmp_path / 'out', '--mask={subject}_{modality}_mask.nii.gz'
    brain = (head() > 0).astype(np.float32)
    for name in ('sub-0', 'sub-1'):
        for suffix, volume in (('T1w', None), ('T2w', None), ('T1w_mask', brain)):
            add(tree, f'{name}/anat/{name}_{suffix}.nii.gz', volume)
    prepared('bids', tree, out, pattern)
    assert written_again('bids', tree, out, pattern) == []
    half = brain * (np.arange(len(brain)) < 20)[:, None, None]
    mask = tree / 'sub-0/anat/sub-0_T1w_mask.nii.gz'
    add(tree, f'sub-0/anat/{mask.name}', half)
    os.utime(mask, (1, 1))
    assert written_again('bids', tree, out, pattern) == ['sub-0_ses-01_T1w.npy']
    assert (array(out, 'sub-0_ses-01_T1w') > 0).sum() == half.sum()
    add(tree, 'sub-1/anat/sub-1_T2w_mask.nii.gz', brain)
    assert 'sub-1_ses-01_T2w.npy' in written_again('bids', tree, out, pattern)

def test_a_changed_header_beside_an_img_makes_its_session_again(tmp_path):
    tree, out = tmp_path / 'tree', tmp_path / 'out'
    tree.mkdir()
    nib.save(nib.Nifti1Pair(head(), np.eye(4)), tree / '01_T1w.img')
    prepared('folder', tree, out)
    assert written_again('folder', tree, out) == []
    os.utime(tree / '01_T1w.hdr', (1, 1))
    assert written_again('folder', tree, out) == ['sub-01_ses-01_T1w.npy']

def test_leftovers_of_an_interruption_never_count(tmp_path):
    tree, out = make_bids(tmp_path / 'bids', 2), tmp_path / 'out'
    prepared('bids', tree, out)
    index, report = table(out), (out / 'report.txt').read_text()
    (out / '.part99_sub-00_ses-01_T1w.npy').write_bytes(b'half')
    prepared('bids', tree, out)
    assert table(out) == index and (out / 'report.txt').read_text() == report

def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path):
    args = [*PHANTOMS, '--workers=1', f'--out_dir={tmp_path}']
    assert 'MiB per worker' in play('prepare.py', *args)
    times = write_times(tmp_path)
    for path in (tmp_path / '.facts').iterdir():  # it knew less of a session
        facts = json.loads(path.read_text())
        del facts['registered'], facts['peak_mib']
        path.write_text(json.dumps(facts))
    assert 'scans/s per core and' in play('prepare.py', *args)
    assert times and write_times(tmp_path) == times

@pytest.mark.parametrize('setting, words', [
    ('--spacing_mm=2', 'spacing_mm=1.0, not 2.0'), ('--shape=32,48,32', 'shape=[48, 48, 48]')])
def test_data_of_other_settings_is_refused_with_both_values(bids, setting, words):
    assert refused(prepare('bids', bids[0].parent / 'tree', bids[0], setting), words)

# ---------------------------------------------------------------- bad scans, settings and tables

REASONS = {'truncated': 'cannot be read', 'nan': 'NaN', 'constant': 'every voxel is 7',
           '4d': 'split the series', '2d': '(8, 8)'}

@pytest.fixture
def spoilt(tmp_path):
    """A BIDS tree with two good subjects, and {reason: path} of its bad scans."""
    tree = make_bids(tmp_path / 'bids', 2)
    paths = {}
    for kind in REASONS:
        paths[kind] = str(tree / f'sub-{kind}' / 'anat' / f'sub-{kind}_T1w.nii.gz')
        os.makedirs(os.path.dirname(paths[kind]))
    truncated(paths['truncated'])
    nans(paths['nan'])
    save(paths['constant'], np.full((8, 8, 8), 7), np.float32)
    save(paths['4d'], np.ones((8, 8, 8, 4)), np.float32)
    save(paths['2d'], np.ones((8, 8)), np.float32)
    return tree, {REASONS[kind]: path for kind, path in paths.items()}

def test_bad_scans_among_good_ones_are_skipped_with_a_report(spoilt, tmp_path):
    tree, paths = spoilt
    printed = prepared('bids', tree, tmp_path / 'out')
    assert '5 scans skipped' in printed
    for reason, path in paths.items():
        assert any(path in line and reason in line for line in printed.splitlines())
    assert {row['subject'] for row in table(tmp_path / 'out')} == {'sub-00', 'sub-01', 'sub-02'}

@pytest.mark.parametrize('workers', [1, 2])
def test_a_bad_scan_stops_a_strict_run(spoilt, tmp_path, workers):
    tree, _ = spoilt
    assert refused(prepare('bids', tree, tmp_path / 'out', '--strict=True', f'--workers={workers}'), 'strict')
    assert not (tmp_path / 'out' / 'subjects.tsv').exists()

def test_modalities_that_do_not_overlap_lose_the_second_one(tmp_path):
    add(tmp_path, 'b/sub-00/anat/sub-00_T1w.nii.gz')
    far = np.eye(4)
    far[0, 3] = 900
    nib.save(nib.Nifti1Image(head(), far), str(tmp_path / 'b/sub-00/anat/sub-00_T2w.nii.gz'))
    add(tmp_path, 'b/sub-01/anat/sub-01_T2w.nii.gz')
    assert 'sub-00_T2w.nii.gz: does not overlap' in prepared('bids', tmp_path / 'b', tmp_path / 'out')
    assert table(tmp_path / 'out')[0]['T2w'] == ''

def test_a_brain_of_one_intensity_is_a_bad_scan(tmp_path):
    """A mask, say, among the scans: it used to end the run with a traceback."""
    add(tmp_path, 'b/sub-00/anat/sub-00_T1w.nii.gz')
    add(tmp_path, 'b/sub-01/anat/sub-01_T1w.nii.gz', (head() > 0).astype(np.float32))
    printed = prepared('bids', tmp_path / 'b', tmp_path / 'out')
    assert 'sub-01_T1w.nii.gz: percentiles' in printed and 'nothing to scale' in printed
    assert [row['subject'] for row in table(tmp_path / 'out')] == ['sub-00']

def test_subjects_that_a_spreadsheet_lacks_keep_what_the_tree_says(tmp_path):
    lines = ['subject,session,modality,path,sex,age,split']
    for k in range(2):
        path = add(tmp_path, f'{k}.nii.gz')
        lines.append(f'sub-{k},ses-1,T1w,{path},F,30,test')
    (tmp_path / 'scans.csv').write_text('\n'.join(lines))
    (tmp_path / 'people.csv').write_text('subject,sex,age\nsub-0,M,31\n')
    prepared('csv', tmp_path / 'scans.csv', tmp_path / 'out', f'--people={tmp_path}/people.csv')
    rows = [(row['split'], row['sex'], row['age']) for row in table(tmp_path / 'out')]
    assert rows == [('test', 'M', '31'), ('test', 'F', '30')]

# ---------------------------------------------------------------- masks and label maps

def prepared_with_mask(tmp_path, values):
    """How many voxels are brain by a mask of these values."""
    add(tmp_path, 'tree/01_T1w.nii.gz', head() + 20)
    add(tmp_path, 'tree/01_mask.nii.gz', values.astype(np.float32))
    prepared('folder', tmp_path / 'tree', tmp_path / 'out', '--mask={subject}_mask.nii.gz')
    return (array(tmp_path / 'out', 'sub-01_ses-01_T1w') > 0).sum()

@pytest.mark.parametrize('highest', [1, 1.0000001, 0.9])
def test_a_mask_of_probabilities_is_brain_above_a_half(tmp_path, highest):
    probability = ndimage.gaussian_filter((head() > 0).astype(np.float32), 2)
    probability *= highest / probability.max()
    assert prepared_with_mask(tmp_path, probability) == (probability > 0.5).sum()

@pytest.mark.parametrize('low, high', [(0.3, 0.3), (1, 1), (255, 255), (1, 3)])
def test_a_mask_of_labels_is_brain_above_0(tmp_path, low, high):
    inside = head() > 0
    labels = np.where(head() > 100, high, low) * inside
    assert prepared_with_mask(tmp_path, labels) == inside.sum()

@pytest.mark.parametrize('pattern, subject, other, fits', [
    ('{subject}*mask.nii', 'sub-1', 'sub-10_mask.nii', False),
    ('{subject}*mask.nii', 'sub-A', 'sub-Ab_mask.nii', False),
    ('{subject}*mask.nii', 'sub-1', 'sub-1_mask.nii', True),
    ('{subject}*mask.nii', 'sub-1', 'sub-1mask.nii', False),
    ('{subject}mask.nii', 'sub-1', 'sub-1mask.nii', True),
    ('*{subject}_mask.nii', 'sub-1', '11_mask.nii', False),
    ('*{subject}_mask.nii', 'sub-1', 'x-1_mask.nii', True),
    ('x{subject}_mask.nii', 'sub-1', 'x1_mask.nii', True),
    ('{subject}_{session}*mask.nii', 'sub-1', 'sub-1_ses-01_mask.nii', True),
    ('{subject}_{session}*mask.nii', 'sub-1', 'sub-1_ses-012_mask.nii', False),
    ('{subject}*/mask.nii', 'sub-1', 'sub-10/mask.nii', False),
    ('{subject}*/mask.nii', 'sub-1', 'sub-1_x/mask.nii', True)])
def test_a_mask_is_not_that_of_a_longer_name(tmp_path, pattern, subject, other, fits):
    path = tmp_path / 'm[1]' / other
    path.parent.mkdir(parents=True)
    path.touch()
    root = f'{tmp_path}/m[1]'
    scan = pattern, f'{root}/scan.nii', f'{root}//', subject, 'ses-01', 'T1w'
    if fits:
        assert masks.mask_file(*scan) == str(path)
    else:
        with pytest.raises(ValueError, match='0 files fit its mask.*longer name'):
            masks.mask_file(*scan)

def test_a_label_map_among_the_scans_of_a_table_ends_with_one_line(tmp_path):
    for name, values in (('1', None), ('1_seg', np.round(head() / 50))):
        add(tmp_path, f'{name}.nii.gz', values)
    rows = 'subject,session,modality,path\n1,1,T1w,1.nii.gz\n1,1,dseg,1_seg.nii.gz\n'
    (tmp_path / 's.csv').write_text(rows)
    done = prepare('csv', tmp_path / 's.csv', tmp_path / 'out')
    assert refused(done, 'dseg is a label map', '--source=labelmaps') and not (tmp_path / 'out').exists()
    prepared('csv', tmp_path / 's.csv', tmp_path / 'out', '--modalities=T1w')
    assert table(tmp_path / 'out')[0]['dseg'] == ''

@pytest.mark.parametrize('args, words', [
    (['--source=bids', '--root=/nowhere'], ['/nowhere', 'no such']),
    (['--source=mri'], ['--source=mri', 'bids']),
    (['--split=0.5,0.6,0.1'], ['--split']),
    (['--shape=4,4'], ['--shape']),
    (['--modalities=T9'], ['T9']),
    (['--nn=3'], ["'nn'", "'n'"]),
    (['--out_dir=/proc/no'], ['/proc/no', 'cannot write']),
    (['--dtype=int8'], ['--dtype=int8', 'float16'])])
def test_bad_settings_end_with_one_line(args, words, tmp_path):
    assert refused(run('prepare.py', f'--out_dir={tmp_path}/out', '--workers=1', *args), *words)

def test_an_empty_folder_ends_with_one_line(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert refused(prepare('bids', tmp_path / 'empty', tmp_path / 'out'), 'no scans found')

def test_a_modality_that_is_nowhere_ends_with_one_line(tmp_path):
    tree = make_bids(tmp_path / 'bids', 1)
    assert refused(prepare('bids', tree, tmp_path / 'out', '--modalities=T1w,FLAIR'), 'FLAIR')

def test_bad_scans_alone_end_with_one_line_and_no_index(tmp_path):
    scan = tmp_path / 'bad/sub-0/anat/sub-0_T1w.nii.gz'
    scan.parent.mkdir(parents=True)
    truncated(str(scan))
    done = prepare('bids', tmp_path / 'bad', tmp_path / 'out')
    assert refused(done, 'every scan was skipped', 'sub-0_T1w')
    assert not (tmp_path / 'out' / 'subjects.tsv').exists()

@pytest.mark.parametrize('rows, words', [
    ('a,1,../../T1w,x.nii', ['line 2', 'modality']),
    ('../up,1,T1w,x.nii', ['line 2', 'subject']),
    ('a,1,T1w,x.nii,sometimes', ['sometimes', 'train, val or test']),
    ('a,1,T1w,x.nii,train\na,2,T1w,y.nii,test', ['sub-a', 'two splits'])])
def test_tables_that_would_write_elsewhere_or_split_a_subject_are_refused(tmp_path, rows, words):
    (tmp_path / 'scans.csv').write_text(f'subject,session,modality,path,split\n{rows}\n')
    assert refused(prepare('csv', tmp_path / 'scans.csv', tmp_path / 'out'), *words)

# ---------------------------------------------------------------- the split

NAMES = [f'sub-{i}' for i in range(4000)]

def split_names(seed):
    return [split_of(name, (0.8, 0.1, 0.1), seed) for name in NAMES]

def test_split_follows_from_name_and_seed():
    assert split_names(0) == split_names(0) != split_names(1)

def test_split_keeps_its_proportions():
    parts = split_names(0)
    shares = [parts.count(part) / len(NAMES) for part in ('train', 'val', 'test')]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)

@pytest.mark.parametrize('n, fractions, counts', [
    (5, (0.7, 0.1, 0.2), (3, 1, 1)),
    (10, (0.5, 0.05, 0.45), (5, 1, 4)),
    (5, (0, 0.5, 0.5), (0, 3, 2)),
    (3, (1.0, 0.0, 0.0), (3, 0, 0)),
    (3, (0.98, 0.01, 0.01), (1, 1, 1))])
def test_a_small_cohort_has_exact_counts_and_no_empty_part(n, fractions, counts):
    names = [name for name in NAMES if hash_of(name, 0) < 0.05][:n]  # by hash alone all go to one part
    parts = split_subjects(names, fractions, 0)
    assert tuple(list(parts.values()).count(part) for part in ('train', 'val', 'test')) == counts
    assert split_subjects(names[::-1], fractions, 0) == parts
    order = sorted(names, key=lambda name: hash_of(name, 0))
    ranks = [('train', 'val', 'test').index(parts[name]) for name in order]
    assert ranks == sorted(ranks)  # in the order of the hashes

def test_a_cohort_without_an_empty_part_is_split_by_the_hashes_alone():
    for n in (50, 400):
        alone = {name: split_of(name, (0.8, 0.1, 0.1), 0) for name in NAMES[:n]}
        assert set(alone.values()) == {'train', 'val', 'test'}
        assert split_subjects(NAMES[:n], (0.8, 0.1, 0.1), 0) == alone

def test_five_phantoms_are_trained_validated_and_tested(tmp_path):
    prepared('phantom', '', tmp_path / 'out', '--n=5', '--shape=32,32,32', '--split=0.7,0.1,0.2')
    assert sorted(row['split'] for row in table(tmp_path / 'out')) == ['test'] + 3 * ['train'] + ['val']

def test_a_box_that_neuroquant_does_not_take_is_named_with_the_nearest_that_it_takes(tmp_path):
    small = ['--n=1', '--workers=1', f'--out_dir={tmp_path}/out']
    printed = play('prepare.py', '--source=phantom', '--shape=30,44,30', *small)
    assert 'warning: --shape=30,44,30' in printed and 'box is 32,48,32' in printed

# ---------------------------------------------------------------- what ends a run

def die(session):
    os._exit(1)

def test_a_killed_worker_costs_one_line(monkeypatch):
    monkeypatch.setattr(script, 'workers', 2)
    monkeypatch.setattr(script, 'config', {}, raising=False)
    with pytest.raises(SystemExit, match='lower --workers'):
        script.run_all(die, [1, 2])

@pytest.mark.parametrize('workers, whom', [(1, 'all'), (2, 'all'), (2, 'one')])
def test_an_interrupt_costs_one_line_and_leaves_no_half_volume(tmp_path, workers, whom):
    """By Ctrl-C, which a terminal sends to all processes, or by a signal to prepare.py alone."""
    command = [sys.executable, 'prepare.py', '--source=phantom', '--n=500', '--shape=48,64,48',
               f'--out_dir={tmp_path}', f'--workers={workers}']
    # a shell's background jobs ignore SIGINT, and so would what they start
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
                               preexec_fn=heard)
    while not list(tmp_path.glob('sub-*.npy')):
        assert process.poll() is None
        time.sleep(0.02)
    for pid in (process.pid, 99):
        (tmp_path / f'.part{pid}_x.npy').write_bytes(b'half')
    if whom == 'all':
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and 'Traceback' not in errors and 'Error' not in errors
    assert errors.endswith('\nstopped; what is written stays; start again with the same command\n')
    assert [path.name for path in tmp_path.rglob('*part*')] == ['.part99_x.npy']  # another process has it

@pytest.mark.parametrize('workers', [1, 2])
def test_a_full_disk_costs_one_line_and_leaves_no_half_volume(tmp_path, workers):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, 'prepare.py', '--source=phantom', '--n=2', '--shape=48,48,48',
               f'--out_dir={tmp_path}/out', f'--workers={workers}']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=little_room)
    assert done.returncode == 1
    assert 'cannot write there' in done.stderr and 'Traceback' not in done.stderr
    assert not [name for name in os.listdir(tmp_path / 'out') if name.endswith('.npy') or 'part' in name]
