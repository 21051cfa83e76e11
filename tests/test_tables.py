"""The papers' tables: their numbers agree, ours land in their cells, fine-tuned rows never in others."""
import json
import os

import pytest

from common import markdown_table
from conftest import play, refuses
from judge.report import DECO, METRICS, TABLES, fidelity_tables, for_terminal, frechet_table, paper_table

def test_rows_have_a_number_for_each_column():
    for title, columns, rows in TABLES.values():
        for run, paper in rows.values():
            assert len(paper) == len(columns), (title, run)

def test_mean_gfid_of_the_paper_is_that_of_its_planes():
    for _, paper in DECO.values():
        assert sum(paper[4:7]) / 3 == pytest.approx(paper[7], abs=0.0011)

def write(folder, run, dft='no', psnr=31.25, lpips='random', fid_slices='all', split='test',
          data_dir='data/x', iteration=100, weights='a', name='', call='', **judges):
    """The table.json of a run with a row of its own and one of a reference; judges: other lists of rows.

    name: that of its row. call: tells the files of several calls on one run apart.
    """
    scores = {'psnr_whole': {'mean': psnr}, 'ssim_uniform_whole': {'mean': 95.5}, 'lpips_sum': {'mean': 0.5}}
    row = {'name': name or run, 'ckpt': f'{folder}/{run}.pt', 'iter': iteration, 'weights': weights,
           'dft': dft, 'fidelity': {'T1w': scores}, 'geometry': {'cos_raw': 0.25, 'effective_rank': 3.5}}
    results = {'split': split, 'data_dir': data_dir, 'settings': {'lpips': lpips, 'fid_slices': fid_slices},
               'rows': [row, {'name': 'blur'}], **judges}
    path = folder / f"{run.replace('/', '_')}{call}"
    path.mkdir(parents=True)
    (path / 'table.json').write_text(json.dumps(results))
    return path / 'table.json'

def rfid(run):
    """A row of frechet_rows that could be computed."""
    return {'row': f'{run} rFID', 'modality': 'T1w', 'mean': 2.0, 'axial': 1, 'coronal': 2, 'sagittal': 3}

def cells(text):
    """{label: the other cells} of a markdown table."""
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    return {row[0]: row[1:] for row in rows}

@pytest.fixture
def measured(tmp_path):
    """Folder of runs with one of decovae_vad, whose gFID could not be computed."""
    frechet = [
        rfid('decovae_vad/ckpt'),
        {'row': 'decovae_vad/ckpt gFID', 'modality': 'T1w', 'reason': 'few'}]
    write(tmp_path, 'decovae_vad/ckpt', frechet=frechet, frechet_features='RadImageNet')
    return tmp_path

def test_ours_land_in_their_cells(measured):
    row = cells(paper_table('deco4', measured))['VAD']
    assert row[:6] == ['decovae_vad/ckpt', 'no', '31.25 (33.17)', '0.955 (0.978)', '(0.025)', '2 (6.251)']
    assert '0.25 (0.0971) | 3.5 (3.97)' in paper_table('deco1', measured)

def test_a_row_says_what_it_was_measured_on(measured):
    assert 'data/x' in cells(paper_table('deco4', measured))['VAD'][-1]

def test_a_row_of_a_run_that_is_not_there_has_the_papers_numbers(measured):
    row = cells(paper_table('deco4', measured))['VAD + DFT']
    assert row[1:3] == ['yes', '(33.64)']

def test_what_could_not_be_measured_is_an_empty_cell(tmp_path):
    anatomy = [{'row': 'Dice', 'modality': '', 'reason': 'no segmenter'},
               {'row': 'neuroquant/best', 'modality': 'T1w', 'reason': 'no scan'}]
    probes = [{'row': 'neuroquant/best', 'probe': 'SEResNet-152', 'seen': 'latent, T1w', 'target': 'sex',
               'reason': 'one class'}]
    frechet = [{'row': 'rFID, gFID', 'modality': '', 'reason': 'no file'}]
    write(tmp_path, 'neuroquant/best', anatomy=anatomy, probes=probes, frechet=frechet)
    row = cells(paper_table('neuroquant1', tmp_path))['NeuroQuant']
    assert row[2] == '31.25 (28.89)'
    assert row[4:6] == ['(79.09)', '(95.25)']

def test_the_end_of_a_run_is_what_the_papers_rows_show(tmp_path):
    for k, file in enumerate(('ckpt_3d', 'ckpt', 'best')):
        write(tmp_path, f'neuroquant/{file}', psnr=16 + k)
    row = cells(paper_table('neuroquant1', tmp_path))['NeuroQuant']
    assert row[0] == 'neuroquant/ckpt' and row[2] == '17 (28.89)'

def test_two_runs_of_one_name_are_refused_with_both(tmp_path):
    for folder in ('a', 'b'):
        write(tmp_path / folder, 'neuroquant/ckpt')
    with pytest.raises(SystemExit, match='two runs are called neuroquant/ckpt: .*a/neuro.* and .*b/neuro'):
        paper_table('neuroquant1', tmp_path)

def test_random_features_never_stand_beside_the_papers_distances(tmp_path):
    write(tmp_path, 'maisi/ckpt', frechet=[rfid('maisi/ckpt')], frechet_features='RANDOM features (no FID)')
    row = cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)']
    assert row[4:6] == ['(0.027)', '(6.426)']

@pytest.mark.parametrize('lpips, cell', [('squeeze', '0.5 (0.027)'), ('alex', '(0.027)'), ('', '(0.027)')])
def test_lpips_of_the_papers_network_alone_stands_beside_theirs(tmp_path, lpips, cell):
    write(tmp_path, 'maisi/ckpt', lpips=lpips)
    assert cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)'][4] == cell

@pytest.mark.parametrize('slices, cell', [('all', '2 (6.426)'), ('central', '(6.426)')])
def test_distances_of_all_slices_alone_stand_beside_the_papers(tmp_path, slices, cell):
    write(tmp_path, 'maisi/ckpt', fid_slices=slices, frechet=[rfid('maisi/ckpt')],
          frechet_features='RadImageNet')
    assert cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)'][5] == cell

@pytest.mark.parametrize('changed, cell', [
    ({}, '2 (6.426)'), ({'data_dir': 'data/y'}, '(6.426)'), ({'split': 'val'}, '(6.426)'),
    ({'iteration': 200}, '(6.426)'), ({'weights': 'b'}, '(6.426)')])
def test_a_row_holds_numbers_of_one_data_set_split_and_network(tmp_path, changed, cell):
    """The distance is of an earlier call; it stays only where the later one judges the same."""
    first = write(tmp_path, 'maisi/ckpt', call='1', frechet=[rfid('maisi/ckpt')],
                  frechet_features='RadImageNet')
    os.utime(first, (1, 1))
    write(tmp_path, 'maisi/ckpt', call='2', psnr=30, **changed)
    row = cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)']
    assert row[2] == '30 (32.8)' and row[5] == cell

def test_a_run_with_a_lengthened_name_lands_in_its_row(tmp_path):
    write(tmp_path, 'maisi/ckpt', name='a/maisi/ckpt', frechet=[rfid('a/maisi/ckpt')],
          frechet_features='RadImageNet')
    row = cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)']
    assert row[2] == '31.25 (32.8)' and row[5] == '2 (6.426)'

def test_a_fine_tuned_run_under_a_plain_name_is_refused(tmp_path):
    write(tmp_path, 'maisi/ckpt', dft='yes')
    with pytest.raises(SystemExit, match='rename the run'):
        paper_table('deco2', tmp_path)

def test_the_command_prints_a_table(tmp_path):
    assert 'VQGAN' in play('evaluate.py', '--table=neuroquant1', f'--runs={tmp_path}')

def test_an_unknown_table_is_refused_with_those_there_are():
    assert 'neuroquant1, neuroquant2' in refuses('evaluate.py', '--table=table9')

# ---------------------------------------------------------------- the tables of a call

def scored(name, visits=1, **subjects):
    """A row of a table of reconstructions; subjects: how many of each modality, each with some visits."""
    fidelity = {}
    for modality, n in subjects.items():
        summary = {'mean': 30.0, 'sd': 1.0, 'ci95': [29.0, 31.0], 'n_subjects': n, 'n_sessions': visits * n}
        fidelity[modality] = {key: summary for key in METRICS}
    return {'name': name, 'f': '', 'latent': '', 'bits': '', 'dft': '', 'fidelity': fidelity}

def names_in_table(*rows):
    """First cells of the table of reconstructions and of its intervals."""
    lines = fidelity_tables({'rows': rows, 'modalities': ['T1w', 'T2w'], 'settings': {'lpips': ''},
                             'split': 'test', 'data_dir': 'data/x'})
    return [line.split(' | ')[0].strip('| ') for line in lines if line.startswith('| ')]

def test_rows_of_other_numbers_of_subjects_say_theirs():
    rows = scored('nq/best', T1w=14, T2w=12), scored('kl/best', T1w=14), scored('blur', T1w=3)
    names = names_in_table(*rows)
    assert names.count('nq/best, n = 14 T1w and 12 T2w') == 2
    assert names.count('kl/best, n = 14') == names.count('blur, n = 3') == 2

def test_rows_of_as_many_subjects_and_other_numbers_of_sessions_say_theirs():
    names = names_in_table(scored('nq/best', T1w=4, visits=2), scored('blur', T1w=4))
    assert names.count('nq/best, n = 8 sessions') == names.count('blur, n = 4 sessions') == 2

def test_rows_of_one_number_of_subjects_have_plain_names():
    assert names_in_table(scored('nq/best', T1w=14, T2w=14), scored('blur', T1w=14)).count('blur') == 2

def test_the_gap_of_a_generated_set_is_to_the_runs_own_reconstructions():
    """Also where one checkpoint stands there twice, with two generated sets."""
    rows = []
    for kind, mean in (('rFID', 1.0), ('gFID', 2.0), ('rFID', 1.0), ('gFID', 9.0)):
        slices = dict.fromkeys(('axial', 'coronal', 'sagittal'), (1, 1))
        rows.append(rfid('m/best') | {'row': f'm/best {kind}', 'mean': mean, 'slices': slices,
                                      'mean_part': 0, 'covariance_part': 0})
    gaps = [line for line in frechet_table('R', rows, 'all') if 'gFID - rFID' in line]
    assert gaps == ['m/best T1w: gFID - rFID 1', 'm/best T1w: gFID - rFID 8']

# ---------------------------------------------------------------- in a terminal

def wide_report(columns):
    head = ['model', *[f'column {k}' for k in range(columns)]]
    return '\n'.join(['a title of ' + 40 * 'words ', '', *markdown_table(head, [['a', *range(columns)]])])

@pytest.mark.parametrize('width', [60, 120])
def test_no_line_in_a_terminal_is_wider_than_it(width):
    text = for_terminal(wide_report(30), width)
    assert max(map(len, text.splitlines())) <= width

def test_a_wide_table_keeps_every_cell_in_a_terminal():
    words = for_terminal(wide_report(30), 80).split()
    for k in range(30):
        assert str(k) in words

def test_each_part_of_a_wide_table_names_the_rows():
    lines = for_terminal(wide_report(30), 80).splitlines()
    heads = [line for line in lines if line.startswith('model')]
    rows = [line for line in lines if line.startswith('a ') and 'words' not in line]
    assert len(heads) == len(rows) > 1

def test_a_cell_longer_than_the_terminal_ends_in_dots():
    text = for_terminal('\n'.join(markdown_table(['model', 'reason'], [['a', 50 * 'why ']])), 60)
    assert '...' in text and max(map(len, text.splitlines())) <= 60

def test_a_long_name_of_a_row_keeps_its_end():
    name = 'out/' + 40 * 'deep/' + 'best.pt'
    text = for_terminal('\n'.join(markdown_table(['model', 'PSNR'], [[name, '30.12']])), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert 'deep/best.pt  30.12' in text and '...' in text
