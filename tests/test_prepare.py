"""prepare.py as a user runs it, on generated trees with the oddities real ones have."""
import csv
import json
import os

import nibabel as nib
import numpy as np
import pytest

from conftest import ROOT, play, refused, run
from prepare import split_of
from test_nifti import head, nans, save, store, truncated

SMALL = ['--shape=48,48,48', '--workers=1']
REAL = os.path.join(ROOT, '..', 'shared', 'data', 'realmri')

def prepare(source, root, out, *args):
    return run('prepare.py', f'--source={source}', f'--root={root}', f'--out_dir={out}', *SMALL, *args)

def table(out):
    with open(f'{out}/subjects.tsv', newline='') as f:
        return list(csv.DictReader(f, delimiter='\t'))

def add(root, name, volume=None, **kwargs):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return store(str(path), head() if volume is None else volume, **kwargs)

def make_bids(root, n=4):
    """Subjects in mixed orientations and suffixes; one with two visits, one without T2w, one with two runs; participants.tsv."""
    for i in range(n):
        add(
            root,
            f'sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz',
            head(seed=i),
            code=('RAS', 'LAS', 'LPS', 'RAS')[i % 4],
        )
        if i != 1:
            add(
                root,
                f'sub-{i:02d}/anat/sub-{i:02d}_T2w.nii',
                200 * (head(seed=i) > 0) - head(seed=i),
                code='LPS',
            )
    add(root, 'sub-00/ses-b/anat/sub-00_ses-b_T1w.nii.gz')
    add(root, 'sub-02/anat/sub-02_run-2_T1w.nii.gz')
    (root / 'participants.tsv').write_text('participant_id\tsex\tage\nsub-00\tF\t31\nsub-01\tn/a\t44\n')
    return root

def test_bids_tree(tmp_path):
    done = prepare('bids', make_bids(tmp_path / 'bids'), tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'out')
    assert [(r['subject'], r['session']) for r in rows] == [
        ('sub-00', 'ses-01'),
        ('sub-00', 'ses-b'),
        ('sub-01', 'ses-01'),
        ('sub-02', 'ses-01'),
        ('sub-03', 'ses-01'),
    ]
    assert rows[0]['sex'] == 'F' and rows[0]['age'] == '31' and rows[2]['sex'] == '' and rows[2]['T2w'] == ''
    assert len({r['split'] for r in rows if r['subject'] == 'sub-00'}) == 1
    for r in rows:
        for m in ('T1w', 'T2w'):
            if not r[m]: continue
            assert r[m] == f"{r['subject']}_{r['session']}_{m}.npy"
            v = np.load(tmp_path / 'out' / r[m])
            assert v.shape == (48, 48, 48) and v.dtype == np.float32 and v.min() == 0 and v.max() == 1
    pair = [np.load(tmp_path / 'out' / rows[0][m]) for m in ('T1w', 'T2w')]
    inside = pair[0] > 0
    assert ((pair[1] > 0) == inside).all() and np.corrcoef(pair[0][inside], pair[1][inside])[0, 1] < -0.99
    assert (
        'sub-02_run-2_T1w' not in done.stdout.split('files not used')[0] and '1 files not used' in done.stdout
    )
    assert '4 subjects, 5 sessions' in done.stdout and 'LPS' in done.stdout
    dataset = json.load(open(tmp_path / 'out' / 'dataset.json'))
    assert (
        dataset['shape'] == [48, 48, 48]
        and dataset['modalities'] == ['T1w', 'T2w']
        and dataset['axes'] == 'RAS+'
    )

def test_csv_and_folder_sources_agree_with_bids(tmp_path):
    bids = make_bids(tmp_path / 'bids', 2)
    (tmp_path / 'scans.csv').write_text(
        'subject,session,modality,path,sex,age,split\n'
        '00,01,t1,bids/sub-00/anat/sub-00_T1w.nii.gz,F,31,train\n00,01,T2w,bids/sub-00/anat/sub-00_T2w.nii,F,31,train\n'
        '01,,T1w,bids/sub-01/anat/sub-01_T1w.nii.gz,M,44,test\n'
    )
    add(tmp_path, 'flat/00_T1.nii.gz', head(seed=0))
    add(tmp_path, 'flat/01/mprage.nii.gz', head(seed=1), code='LAS')
    add(tmp_path, 'flat/01/localizer.nii.gz')
    for source, root in (('bids', bids), ('csv', tmp_path / 'scans.csv'), ('folder', tmp_path / 'flat')):
        done = prepare(source, root, tmp_path / source)
        assert done.returncode == 0, done.stderr
    assert 'localizer' in done.stdout and [r['subject'] for r in table(tmp_path / 'folder')] == [
        'sub-00',
        'sub-01',
    ]
    assert [r['split'] for r in table(tmp_path / 'csv')] == ['train', 'test']
    for name in ('sub-00_ses-01_T1w.npy', 'sub-01_ses-01_T1w.npy'):
        first = np.load(tmp_path / 'csv' / name)
        np.testing.assert_array_equal(first, np.load(tmp_path / 'folder' / name))

def test_a_second_run_writes_nothing_again_and_leftovers_never_count(tmp_path):
    bids, out = make_bids(tmp_path / 'bids'), tmp_path / 'out'
    first = prepare('bids', bids, out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob('sub-*.npy')}
    report = (out / 'report.txt').read_text()
    (out / '.part99_sub-00_ses-01_T1w.npy').write_bytes(b'half')
    broken = out / 'sub-03_ses-01_T1w.npy'
    broken.write_bytes(broken.read_bytes()[:1000])
    (out / 'subjects.tsv').unlink()
    done = prepare('bids', bids, out)
    assert first.returncode == done.returncode == 0 and (out / 'report.txt').read_text() == report
    assert np.load(broken).shape == (48, 48, 48)
    again = {p.name: p.stat().st_mtime_ns for p in out.glob('sub-*.npy')}
    assert {k for k in times if again[k] != times[k]} <= {broken.name, 'sub-03_ses-01_T2w.npy'}

def test_data_of_other_settings_is_refused_with_both_values(tmp_path):
    bids = make_bids(tmp_path / 'bids', 2)
    assert prepare('bids', bids, tmp_path / 'out').returncode == 0
    assert refused(prepare('bids', bids, tmp_path / 'out', '--spacing_mm=2'), 'spacing_mm=1.0, not 2.0')
    assert refused(prepare('bids', bids, tmp_path / 'out', '--shape=32,48,32'), 'shape=[48, 48, 48]')

def test_bad_scans_among_good_ones_are_skipped_with_a_report_or_stop_strictly(tmp_path):
    bids = make_bids(tmp_path / 'bids', 2)
    bad = {
        k: bids / f'sub-b{i}' / 'anat' / f'sub-b{i}_T1w.nii.gz'
        for i, k in enumerate(('truncated', 'nan', 'constant', '4d', '2d'))
    }
    for path in bad.values():
        path.parent.mkdir(parents=True)
    truncated(str(bad['truncated'])), nans(str(bad['nan']))
    save(str(bad['constant']), np.full((8, 8, 8), 7), np.float32), save(
        str(bad['4d']), np.ones((8, 8, 8, 4)), np.float32
    )
    save(str(bad['2d']), np.ones((8, 8)), np.float32)
    done = prepare('bids', bids, tmp_path / 'out')
    assert done.returncode == 0 and 'Traceback' not in done.stderr and '5 scans skipped' in done.stdout
    for path, reason in zip(
        bad.values(), ('cannot be read', 'NaN', 'every voxel is 7', 'split the series', '(8, 8)')
    ):
        assert any(str(path) in line and reason in line for line in done.stdout.splitlines())
    assert {r['subject'] for r in table(tmp_path / 'out')} == {'sub-00', 'sub-01', 'sub-02'}
    for workers in (1, 2):
        assert refused(
            prepare('bids', bids, tmp_path / 'strict', '--strict=True', f'--workers={workers}'), 'strict'
        )
    assert not (tmp_path / 'strict' / 'subjects.tsv').exists()

def test_modalities_that_do_not_overlap_lose_the_second_one(tmp_path):
    add(tmp_path, 'b/sub-00/anat/sub-00_T1w.nii.gz')
    far = nib.Nifti1Image(head(), np.array([[1, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    nib.save(far, str(tmp_path / 'b/sub-00/anat/sub-00_T2w.nii.gz'))
    add(tmp_path, 'b/sub-01/anat/sub-01_T2w.nii.gz')
    done = prepare('bids', tmp_path / 'b', tmp_path / 'out')
    assert done.returncode == 0 and 'sub-00_T2w.nii.gz: does not overlap' in done.stdout
    assert table(tmp_path / 'out')[0]['T2w'] == ''

@pytest.mark.parametrize('args, words', [
    (['--source=bids', '--root=/nowhere'], ['/nowhere', 'no such']), (['--source=mri'], ['--source=mri', 'bids']),
    (['--split=0.5,0.6,0.1'], ['--split']), (['--shape=4,4'], ['--shape']), (['--modalities=T9'], ['T9']), (['--nn=3'], ["'nn'", "'n'"]),
    (['--out_dir=/proc/no'], ['/proc/no', 'cannot write']), (['--dtype=int8'], ['--dtype=int8', 'float16'])])
def test_bad_settings_end_with_one_line(args, words, tmp_path):
    assert refused(run('prepare.py', f'--out_dir={tmp_path}/out', '--workers=1', *args), *words)

def test_nothing_usable_ends_with_one_line_and_no_index(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert refused(prepare('bids', tmp_path / 'empty', tmp_path / 'a'), 'no scans found')
    bids = make_bids(tmp_path / 'bids', 1)
    assert refused(prepare('bids', bids, tmp_path / 'b', '--modalities=T1w,FLAIR'), 'FLAIR')
    only_bad = tmp_path / 'bad/sub-0/anat/sub-0_T1w.nii.gz'
    only_bad.parent.mkdir(parents=True)
    truncated(str(only_bad))
    assert refused(prepare('bids', tmp_path / 'bad', tmp_path / 'c'), 'every scan was skipped', 'sub-0_T1w')
    assert not (tmp_path / 'c' / 'subjects.tsv').exists()

@pytest.mark.parametrize('rows, words', [
    ('a,1,../../T1w,x.nii', ['line 2', 'modality']), ('../up,1,T1w,x.nii', ['line 2', 'subject']), ('a,1,T1w,x.nii,sometimes', ['sometimes', 'train, val or test']),
    ('a,1,T1w,x.nii,train\na,2,T1w,y.nii,test', ['sub-a', 'two splits'])])
def test_tables_that_would_write_elsewhere_or_split_a_subject_are_refused(tmp_path, rows, words):
    (tmp_path / 'scans.csv').write_text('subject,session,modality,path,split\n' + rows + '\n')
    assert refused(prepare('csv', tmp_path / 'scans.csv', tmp_path / 'out'), *words)

def test_split_follows_from_the_name_and_keeps_its_proportions():
    names = [f'sub-{i}' for i in range(4000)]
    parts = [split_of(s, (0.8, 0.1, 0.1), 0) for s in names]
    assert parts == [split_of(s, (0.8, 0.1, 0.1), 0) for s in names]
    assert [parts.count(p) / 4000 for p in ('train', 'val', 'test')] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.02
    )
    assert parts != [split_of(s, (0.8, 0.1, 0.1), 1) for s in names]

def test_phantoms_are_written_with_labels_and_reproducibly(tmp_path):
    for out, extra in (('a', []), ('b', ['--n=2', '--modalities=T2w'])):
        done = run(
            'prepare.py',
            '--source=phantom',
            '--n=4',
            '--shape=32,48,32',
            '--workers=1',
            f'--out_dir={tmp_path}/{out}',
            *extra,
        )
        assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'a')
    assert len(rows) == 4 and all(r['sex'] in 'FM' and r['dseg'] for r in rows)
    labels, t2 = np.load(tmp_path / 'a' / rows[0]['dseg']), np.load(tmp_path / 'a' / rows[0]['T2w'])
    assert labels.dtype == np.int16 and ((labels > 0) == (t2 > 0)).all()
    np.testing.assert_array_equal(t2, np.load(tmp_path / 'b' / table(tmp_path / 'b')[0]['T2w']))

@pytest.mark.skipif(not os.path.isdir(REAL), reason='no real scans beside the project')
def test_real_scans_prepare_without_a_hand_made_step(tmp_path):
    """Whole heads and stripped brains, LPS and LAS, thick slices and 1 mm: all 20 scans are used and modalities lie on one another."""
    done = run(
        'prepare.py',
        '--source=bids',
        f'--root={REAL}',
        f'--out_dir={tmp_path}/out',
        '--spacing_mm=4',
        '--shape=48,64,48',
    )
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / 'out')
    assert (
        len(rows) == 7
        and 'no scan was skipped' in done.stdout
        and sum(bool(r[m]) for r in rows for m in ('T1w', 'T2w', 'FLAIR')) == 20
    )
    for r in rows:
        masks = [np.load(tmp_path / 'out' / r[m]) > 0 for m in ('T1w', 'T2w', 'FLAIR') if r[m]]
        for other in masks[1:]:
            assert 2 * (masks[0] & other).sum() / (masks[0].sum() + other.sum()) > 0.85

def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path):
    args = ['--source=phantom', '--n=3', '--shape=32,48,32', f'--out_dir={tmp_path}/data', '--workers=1']
    assert 'MiB per worker' in play('prepare.py', *args)
    for path in (tmp_path / 'data' / '.facts').iterdir():  # it knew less of a session
        path.write_text(
            json.dumps(
                {k: v for k, v in json.loads(path.read_text()).items() if k not in ('registered', 'peak_mib')}
            )
        )
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'data').glob('sub-*.npy')}
    said = play('prepare.py', *args)
    assert (
        'scans/s per core and' in said
        and times
        and times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'data').glob('sub-*.npy')}
    )
