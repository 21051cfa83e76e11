"""evaluate.py as a user runs it, on small autoencoders that are trained once."""
import csv
import importlib.util
import json
import os
import shutil
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import load_checkpoint
from conftest import TINY, play, refuses
from judge import figures
from judge.runs import chosen, compared_row
from losses import psnr
from model import from_checkpoint

CONVVAE = [*TINY, '--kind=convvae', '--iters=2', '--w_ssim=0']

# segments a scan into cortex (label 3) where it is bright, and cerebellum cortex (8) elsewhere
SEGMENTER = """
import sys, nibabel as nib, numpy as np
x = nib.load(sys.argv[1])
labels = np.where(x.get_fdata() > 0.5, 3, 8).astype(np.int16)
nib.save(nib.Nifti1Image(labels, x.affine), sys.argv[2])
"""

# ---------------------------------------------------------------- data, autoencoders, calls

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Ten phantoms, T1w and T2w; every split has sessions."""
    folder = tmp_path_factory.mktemp('phantoms') / 'data'
    play('prepare.py', '--source=phantom', '--n=10', '--shape=32,48,32', '--modalities=T1w,T2w',
         '--split=0.5,0.25,0.25', '--workers=1', f'--out_dir={folder}')
    return folder

@pytest.fixture(scope='module')
def neuroquant(data, tmp_path_factory):
    """Checkpoint of a NeuroQuant of both modalities."""
    out = tmp_path_factory.mktemp('neuroquant') / 'nq'
    play('train_vae.py', *TINY, '--iters_3d=4', '--iters_2d=0', '--cross_start=1', '--cross_ramp=2',
         '--adv_start=1', '--eval_sessions=1', f'--data_dir={data}', f'--out_dir={out}')
    return out / 'ckpt.pt'

@pytest.fixture(scope='module')
def kl(data, tmp_path_factory):
    """Checkpoint of a 3D KL autoencoder of T1w alone."""
    out = tmp_path_factory.mktemp('kl') / 'kl'
    play('train_vae.py', *CONVVAE, '--widths=8,8', '--latent_dim=3', '--modalities=T1w',
         f'--data_dir={data}', f'--out_dir={out}')
    return out / 'ckpt.pt'

@pytest.fixture(scope='module')
def vq2d(data, tmp_path_factory):
    """Checkpoint of a 2D autoencoder with two codebooks."""
    out = tmp_path_factory.mktemp('vq2d') / 'vq2d'
    play('train_vae.py', *CONVVAE, '--dims=2', '--widths=8,8,8', '--bottleneck=vq', '--num_codebooks=2',
         '--latent_dim=4', f'--data_dir={data}', f'--out_dir={out}')
    return out / 'ckpt.pt'

@pytest.fixture(scope='module')
def segmenter(tmp_path_factory):
    script = tmp_path_factory.mktemp('segmenter') / 'segment.py'
    script.write_text(SEGMENTER)
    return f'--segmenter={sys.executable} {script} {{in}} {{out}}'

def evaluate(checkpoints, data, out, *args):
    """What evaluate.py prints, and its table.json."""
    paths = ','.join(map(str, checkpoints))
    printed = play('evaluate.py', f'--ckpt={paths}', f'--data_dir={data}', f'--out_dir={out}',
                   '--device=cpu', '--reference_sessions=0', *args)
    return printed, json.loads((out / 'table.json').read_text())

def sessions_of(data, split):
    """The rows of subjects.tsv of one split."""
    with open(data / 'subjects.tsv', newline='') as f:
        return [row for row in csv.DictReader(f, delimiter='\t') if row['split'] == split]

# ---------------------------------------------------------------- tables

@pytest.fixture(scope='module')
def twice(data, neuroquant, tmp_path_factory):
    """Folder of a call with one checkpoint given twice, what it printed, and its table."""
    out = tmp_path_factory.mktemp('twice')
    printed, table = evaluate([neuroquant, neuroquant], data, out, '--reference_sessions=50')
    return out, printed, table

def test_scores_are_those_of_the_models_reconstructions(data, neuroquant, twice):
    model = from_checkpoint(load_checkpoint(neuroquant))
    want = []
    for row in sessions_of(data, 'test'):
        x = torch.tensor(np.load(data / row['T1w']))[None, None]
        with torch.no_grad():
            want.append(psnr(model.reconstruct(x, 'T1w').clamp(0, 1), x).item())
    summary = twice[2]['rows'][0]['fidelity']['T1w']['psnr_whole']
    assert summary['n_subjects'] == len(want)
    assert summary['mean'] == pytest.approx(np.mean(want), abs=1e-3)

def test_references_stand_under_the_models(twice):
    names = [row['name'] for row in twice[2]['rows']]
    assert names[:4] == ['nq/ckpt', 'nq/ckpt', 'population mean of the training set', 'nearest training scan']
    assert names[4:7] == ['PCA of the training set at 112 bits', 'DCT codec at 112 bits',
                          'DCT codec at 112 bits, given the brain mask']
    assert 'blur' in names[7]
    assert len(names) == 8

def test_the_codecs_free_mask_changes_nothing_inside_the_brain(twice):
    plain, masked = [row['fidelity']['T1w'] for row in twice[2]['rows'][5:7]]
    assert masked['psnr_brain'] == plain['psnr_brain']
    assert masked['psnr_whole']['mean'] > plain['psnr_whole']['mean']

def test_a_checkpoint_given_twice_gets_the_same_row_twice(twice):
    first, second, *_ = twice[2]['rows']
    assert first['fidelity'] == second['fidelity']
    assert first['bits'] == '48 + 64'

def test_every_ordered_pair_is_scored_in_both_styles(twice):
    cross = {(c['source'], c['target'], c['style']) for c in twice[2]['rows'][0]['cross']}
    assert cross == {('T1w', 'T2w', 'own'), ('T1w', 'T2w', 'mean'),
                     ('T2w', 'T1w', 'own'), ('T2w', 'T1w', 'mean')}

def test_every_token_is_counted(data, twice):
    n = len(sessions_of(data, 'test'))
    codes = twice[2]['rows'][0]['codes']
    assert codes['all']['tokens'] == 2 * 12 * n  # two modalities, 2x3x2 codes a volume

def test_the_tables_are_printed_and_written(twice):
    out, printed, _ = twice
    text = (out / 'table.md').read_text()
    assert text in printed and 'data range 1' in text

def test_a_picture_of_the_reconstructions_is_drawn(twice):
    pytest.importorskip('matplotlib', reason='the picture needs it')
    assert (twice[0] / 'reconstructions.png').stat().st_size > 10000

def test_results_lie_beside_the_first_checkpoint_unless_told_otherwise(data, neuroquant):
    play('evaluate.py', f'--ckpt={neuroquant}', '--device=cpu', '--reference_sessions=0')
    assert (neuroquant.parent / 'table.json').exists()

def test_two_files_of_a_run_have_rows_of_their_own(data, neuroquant, tmp_path):
    shutil.copy(neuroquant, neuroquant.parent / 'ckpt_3d.pt')
    _, table = evaluate([neuroquant, neuroquant.parent / 'ckpt_3d.pt'], data, tmp_path)
    assert [row['name'] for row in table['rows']] == ['nq/ckpt', 'nq/ckpt_3d']
    assert table['compared'][0]['fidelity']['T2w']['ssim_brain']['ci95'] == [0, 0]

def test_two_runs_of_one_folder_name_can_be_told_apart(data, kl, tmp_path):
    paths = [tmp_path / 'a' / 'm' / 'best.pt', tmp_path / 'b' / 'm' / 'best.pt']
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copy(kl, path)
    _, table = evaluate(paths, data, tmp_path, '--max_sessions=1')
    assert [row['name'] for row in table['rows']] == ['a/m/best', 'b/m/best']

def test_a_few_sessions_are_chosen_from_all(data, kl, segmenter, tmp_path):
    _, table = evaluate([kl], data, tmp_path, segmenter, '--labels=dseg', '--split=train', '--max_sessions=2')
    rows = sessions_of(data, 'train')
    judged = [scan['subject'] for scan in table['anatomy'][0]['scans']]
    assert judged == [rows[i]['subject'] for i in chosen(rows, 2)]

def test_references_of_fewer_subjects_say_so(data, kl, tmp_path):
    printed, _ = evaluate([kl], data, tmp_path, '--max_sessions=2', '--reference_sessions=1', '--split=train')
    assert '| kl/ckpt, n = 2 |' in printed and '| nearest training scan, n = 1 |' in printed

def test_data_of_another_voxel_size_get_a_note(data, kl, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(data, other)
    facts = json.loads((other / 'dataset.json').read_text())
    (other / 'dataset.json').write_text(json.dumps(facts | {'spacing_mm': 2.0}))
    printed, table = evaluate([kl], other, tmp_path / 'e', '--max_sessions=1')
    note = f'note: {kl} learned spacing_mm 1.0, {other} has 2.0'
    assert printed.startswith(note) and note in (tmp_path / 'e' / 'table.md').read_text()
    assert table['notes'] == [note]

def test_one_subject_has_no_interval(data, neuroquant, tmp_path):
    printed, table = evaluate([neuroquant], data, tmp_path, '--max_sessions=1')
    assert table['rows'][0]['fidelity']['T1w']['psnr_whole']['ci95'] is None
    assert '(n = 1)' in printed and '+- 0.00' not in printed

@pytest.mark.parametrize('args, words', [
    (['--split=other'], "split 'other'"),
    (['--generated=a,b'], 'b has no checkpoint'),
    (['--volumes_by=weight'], 'voxels or posteriors'),
    (['--data_dir=/nowhere'], '/nowhere'),
    (['--ckpt=/nowhere.pt'], '/nowhere.pt'),
    (['--colour=1'], "'colour'"),
    (['--fid_slices=some'], 'all or central'),
    (['--probe_networks=latent'], '--probe=COLUMN')])
def test_what_cannot_be_judged_is_refused_with_one_line(neuroquant, tmp_path, args, words):
    assert words in refuses('evaluate.py', f'--ckpt={neuroquant}', f'--out_dir={tmp_path}/e', *args)

# ---------------------------------------------------------------- several autoencoders

@pytest.fixture(scope='module', params=['kl', 'vq2d'])
def compared(request, data, neuroquant, tmp_path_factory):
    """Which autoencoder stands before NeuroQuant, the folder of the call, what it printed, its table."""
    out = tmp_path_factory.mktemp('compared')
    checkpoints = [request.getfixturevalue(request.param), neuroquant]
    args = ['--reference_sessions=50', '--max_sessions=2', '--lpips=random', '--latent_figures=True',
            '--tsne_points=100']
    return request.param, out, *evaluate(checkpoints, data, out, *args)

def test_latents_and_bits_of_each_kind_stand_beside_each_other(compared):
    kind, _, _, table = compared
    ours, other, *_ = table['rows']
    want = {'kl': ('3x16x24x16', '294912', 'no'), 'vq2d': ('4x8x12x32', '24576', 'no')}
    assert (ours['latent'], ours['bits'], ours['dft']) == want[kind]
    assert other['f'] == '16x'

def test_runs_are_compared_scan_by_scan(compared):
    _, _, printed, table = compared
    first, second, *_ = [row['fidelity']['T1w']['psnr_whole'] for row in table['rows']]
    difference = table['compared'][0]['fidelity']['T1w']['psnr_whole']
    assert difference['mean'] == pytest.approx(second['mean'] - first['mean'])
    low, high = difference['ci95']
    assert low <= difference['mean'] <= high and high - low > 0
    assert f"| {difference['mean']:+.3f} ({low:+.3f} to {high:+.3f}) |" in printed

def test_runs_are_compared_on_the_scans_that_both_have_seen():
    def run_of(**psnr):
        keys = [('data', subject, '1') for subject in psnr]
        scored = [(subject, {'psnr_whole': value, 'psnr_brain': np.inf}) for subject, value in psnr.items()]
        return SimpleNamespace(name='run', modalities=['T1w'], scanned=defaultdict(list, T1w=keys),
                               scores=defaultdict(list, T1w=scored))

    row = compared_row(run_of(a=23, b=24, d=25), run_of(b=20, c=21, d=22), 0)['fidelity']['T1w']
    assert row['psnr_whole']['mean'] == 3.5 and row['psnr_whole']['n_subjects'] == 2
    assert row['psnr_brain']['mean'] == 0
    assert compared_row(run_of(a=1), run_of(b=2), 0)['fidelity'] == {}
    assert compared_row(run_of(a=np.inf), run_of(a=2), 0)['fidelity']['T1w']['psnr_whole']['mean'] is None

def test_there_is_a_codec_for_each_rate(compared):
    names = [row['name'] for row in compared[3]['rows']]
    for codec in ('DCT codec', 'PCA of the training set'):
        assert len([name for name in names if name.startswith(codec) and name.endswith(' bits')]) == 2

def test_geometry_suits_the_latent(compared):
    kind, _, _, table = compared
    geometry = table['rows'][0]['geometry']
    assert geometry['channels'] == {'kl': 3, 'vq2d': 4}[kind]
    assert 1 <= geometry['effective_rank'] <= 4
    assert (geometry['posterior_sigma'] is None) == (kind == 'vq2d')

def test_only_a_model_with_film_is_scored_across_modalities(compared):
    ours, other, *_ = compared[3]['rows']
    assert not ours['cross'] and other['cross']

def test_a_random_trunk_is_named_so(compared):
    assert 'RANDOM trunk (no LPIPS)' in compared[2]

def test_figures_of_the_latent_are_drawn(compared):
    pytest.importorskip('matplotlib', reason='the pictures need it')
    assert {'latent.png', 'reconstructions.png'} <= set(os.listdir(compared[1]))

def test_tsne_is_drawn_or_one_line_says_what_it_needs(compared):
    pytest.importorskip('matplotlib', reason='the picture needs it')
    _, out, printed, _ = compared
    if importlib.util.find_spec('sklearn'):
        assert (out / 'tsne.png').exists()
    else:
        assert printed.count('pip install scikit-learn') == 1

# ---------------------------------------------------------------- a joint call equals the calls alone

@pytest.fixture(scope='module')
def gaps(data):
    """The same phantoms, all in one split; the first session lacks T1w, the third one T2w."""
    rows = sessions_of(data, 'train') + sessions_of(data, 'val') + sessions_of(data, 'test')
    for row in rows:
        row['split'] = 'train'
    rows[0]['T1w'] = ''
    rows[2]['T2w'] = ''
    folder = data.parent / 'gaps'
    shutil.copytree(data, folder)
    with open(folder / 'subjects.tsv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0].keys(), delimiter='\t')
        writer.writeheader()
        writer.writerows(rows)
    return folder

class Evaluation:
    """A call of evaluate.py with every judge; its rows by run, and the volumes in its picture."""
    def __init__(self, checkpoints, data, out, *args):
        drawn = {}

        def remember(path, blocks, title=''):
            drawn[os.path.basename(path)] = dict(sum(blocks, []))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, 'views', remember)
            _, self.table = evaluate(checkpoints, data, out, '--split=train', '--labels=dseg',
                                     '--features=random', '--probe=sex', *args)
        self.picture = drawn['reconstructions.png']

    def row(self, name):
        """The row of a run."""
        return next(row for row in self.table['rows'] if row['name'] == f'{name}/ckpt')

    def rows(self, judge, name):
        """A judge's rows of a run: of 'frechet' the rFID, of 'anatomy', of 'probes'."""
        names = (f'{name}/ckpt', f'{name}/ckpt rFID')
        return [row for row in self.table[judge] if row['row'] in names]

@pytest.fixture(scope='module', params=['nq,kl', 'kl,nq', 'nq,kl of three sessions'])
def joint_and_alone(request, gaps, neuroquant, kl, segmenter, tmp_path_factory):
    """A call with a T1w model beside a T1w and T2w model, and {name: the call of each alone}."""
    order, _, limited = request.param.partition(' ')
    args = [segmenter, *(['--max_sessions=3'] if limited else [])]
    checkpoints = {'nq': neuroquant, 'kl': kl}
    in_order = [checkpoints[name] for name in order.split(',')]
    joint = Evaluation(in_order, gaps, tmp_path_factory.mktemp('joint'), *args)
    alone = {}
    for name, path in checkpoints.items():
        alone[name] = Evaluation([path], gaps, tmp_path_factory.mktemp(name), *args)
    return joint, alone

@pytest.mark.parametrize('name', ['nq', 'kl'])
def test_a_joint_call_scores_and_counts_as_a_call_alone(joint_and_alone, name):
    joint, alone = joint_and_alone
    assert joint.row(name) == alone[name].row(name)

@pytest.mark.parametrize('name', ['nq', 'kl'])
@pytest.mark.parametrize('judge', ['anatomy', 'frechet', 'probes'])
def test_a_joint_call_judges_as_a_call_alone(joint_and_alone, judge, name):
    joint, alone = joint_and_alone
    rows = joint.rows(judge, name)
    assert rows and rows == alone[name].rows(judge, name)

def test_dice_compares_a_scan_with_its_own_subjects_labels(joint_and_alone, gaps):
    joint, _ = joint_and_alone
    voxel = np.prod(json.loads((gaps / 'dataset.json').read_text())['voxel_mm'])
    for row in joint.rows('anatomy', 'kl') + joint.rows('anatomy', 'nq'):
        for scan in row['scans']:
            truth = np.load(gaps / f"{scan['subject']}_ses-01_dseg.npy")
            caudate = voxel * np.isin(truth, (11, 50)).sum()
            assert scan['mm3_truth']['caudate'] == pytest.approx(caudate)

@pytest.mark.parametrize('name', ['nq', 'kl'])
def test_a_joint_call_shows_what_a_call_alone_shows(joint_and_alone, name):
    joint, alone = joint_and_alone
    for heading in ('T1w input', f'T1w {name}/ckpt'):
        np.testing.assert_array_equal(joint.picture[heading], alone[name].picture[heading])

def test_each_run_counts_its_own_sessions(gaps, neuroquant, kl, tmp_path):
    _, table = evaluate([neuroquant, kl], gaps, tmp_path, '--split=train')
    counts = {}
    for row in table['rows']:
        for modality, scores in row['fidelity'].items():
            counts[row['name'], modality] = scores['psnr_whole']['n_sessions']
    assert counts == {('nq/ckpt', 'T1w'): 9, ('nq/ckpt', 'T2w'): 9, ('kl/ckpt', 'T1w'): 9}

def test_references_do_not_depend_on_the_runs_they_stand_under(gaps, neuroquant, kl, tmp_path):
    args = ['--split=train', '--reference_sessions=50']
    _, joint = evaluate([neuroquant, kl], gaps, tmp_path, *args)
    joint_rows = {row['name']: row for row in joint['rows']}
    for path in (neuroquant, kl):
        _, alone = evaluate([path], gaps, tmp_path, *args)
        for row in alone['rows'][1:]:
            for modality, scores in row['fidelity'].items():
                np.testing.assert_equal(joint_rows[row['name']]['fidelity'][modality], scores)

def test_identical_images_are_said_to_be_that(data, neuroquant, tmp_path):
    """The nearest training scan of a training scan is itself: a PSNR of infinity has no mean."""
    printed, table = evaluate([neuroquant], data, tmp_path, '--split=train', '--reference_sessions=2')
    nearest = next(row for row in table['rows'] if row['name'] == 'nearest training scan')
    assert nearest['fidelity']['T1w']['psnr_whole']['mean'] is None
    assert 'identical in 2 of 2' in printed and 'inf' not in printed
    assert 'Infinity' not in (tmp_path / 'table.json').read_text()

# ---------------------------------------------------------------- anatomy and probes

@pytest.fixture(scope='module')
def judged(data, neuroquant, segmenter, tmp_path_factory):
    """Folder of a call with given label maps and a probe, what it printed, and its table."""
    out = tmp_path_factory.mktemp('judged')
    args = [segmenter, '--labels=dseg', '--probe=sex', '--split=train']
    return out, *evaluate([neuroquant], data, out, *args)

def first_scan(table):
    """The first T1w scan among the rows of anatomy."""
    row = next(row for row in table['anatomy'] if row['modality'] == 'T1w')
    return row['scans'][0]

def test_true_volumes_are_those_of_the_given_labels(data, judged):
    scan = first_scan(judged[2])
    truth = np.load(data / f"{scan['subject']}_ses-01_dseg.npy")
    voxel = np.prod(json.loads((data / 'dataset.json').read_text())['voxel_mm'])
    assert scan['mm3_truth']['caudate'] == pytest.approx(voxel * np.isin(truth, (11, 50)).sum())

def test_dice_is_0_for_structures_that_the_segmenter_never_finds(judged):
    dice = first_scan(judged[2])['dice']
    assert dice['left thalamus'] == 0
    assert 0 < dice['left cerebral cortex'] < 1

def test_what_the_decoder_made_is_what_is_segmented(data, neuroquant, judged):
    """Cut out by the scan's mask, a reconstruction would be given the border of the brain."""
    model = from_checkpoint(load_checkpoint(neuroquant))
    scan = first_scan(judged[2])
    x = torch.tensor(np.load(data / f"{scan['subject']}_ses-01_T1w.npy"))[None, None]
    with torch.no_grad():
        bright = model.reconstruct(x, 'T1w').clamp(0, 1) > 0.5
    voxel = np.prod(json.loads((data / 'dataset.json').read_text())['voxel_mm'])
    assert scan['mm3']['cerebellum cortex'] == pytest.approx(voxel * (~bright).sum().item(), rel=1e-3)

def test_the_table_says_what_is_segmented(judged):
    assert 'segmented as the decoder made it' in judged[1] and 'in mm3 of voxels' in judged[1]

def test_volumes_are_tabled_and_drawn(judged):
    out, printed, _ = judged
    assert 'cerebellum cortex: reconstruction' in printed
    pytest.importorskip('matplotlib', reason='the picture needs it')
    assert (out / 'volumes.png').exists()

def test_probes_ask_each_modality_z_anat_and_the_scans(judged):
    _, printed, table = judged
    asked = {(row['seen'], row['bits'], row['target']) for row in table['probes']}
    assert asked == {('latent, T1w', '112', 'sex'), ('z_q alone, T1w', '48', 'sex'),
                     ('latent, T2w', '112', 'sex'), ('z_q alone, T2w', '48', 'sex'),
                     ('volume, T1w', '', 'sex'), ('volume, T2w', '', 'sex'),
                     ('z_anat', '', 'modality: T1w or T2w')}
    assert '| linear | z_anat |  | modality: T1w or T2w |' in printed

def test_without_given_labels_the_segmenter_labels_the_input(data, neuroquant, segmenter, tmp_path):
    printed, _ = evaluate([neuroquant], data, tmp_path, segmenter, '--max_sessions=1')
    assert "segmenter's labels of the input" in printed

@pytest.mark.parametrize('args, reason', [
    (['--labels=nothing'], 'no label map'),
    ([f'--segmenter={sys.executable} /nowhere.py {{in}} {{out}}'], 'segmenter ended with'),
    (['--segmenter=/nowhere.h5'], '/nowhere.h5')])
def test_labels_that_cannot_be_had_cost_one_line_and_no_other_row(data, neuroquant, segmenter, tmp_path, args,
                                                                  reason):
    printed, _ = evaluate([neuroquant], data, tmp_path, segmenter, '--max_sessions=1', *args)
    assert reason in printed and '| nq/ckpt | 16x |' in printed
    lines = [line for line in printed.splitlines() if line.startswith('| ')]
    for above, line in zip(lines, lines[1:]):
        if not line.startswith(('| model', '| source')):
            assert line.count(' | ') == above.count(' | '), line  # a reason takes a cell, not a row's shape

# ---------------------------------------------------------------- slab by slab

def test_slabs_give_the_scores_of_whole_volumes(data, kl, tmp_path):
    _, whole = evaluate([kl], data, tmp_path)
    _, slabs = evaluate([kl], data, tmp_path, '--slab=4')
    one, other = (table['rows'][0]['fidelity']['T1w']['psnr_whole']['mean'] for table in (whole, slabs))
    assert one == pytest.approx(other, abs=1e-3)

def test_a_model_without_slabs_is_refused(data, neuroquant, tmp_path):
    args = [f'--ckpt={neuroquant}', f'--data_dir={data}', f'--out_dir={tmp_path}', '--device=cpu']
    assert '--slab=4' in refuses('evaluate.py', *args, '--slab=4')
