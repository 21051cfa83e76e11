"""The papers' tables: their numbers agree, ours land in their cells, fine-tuned rows never in others."""
import json

import pytest

from common import markdown_table
from conftest import play, refuses
from judge.report import DECO, TABLES, for_terminal, paper_table

def test_rows_have_a_number_for_each_column():
    for title, columns, rows in TABLES.values():
        for run, paper in rows.values():
            assert len(paper) == len(columns), (title, run)

def test_mean_gfid_of_the_paper_is_that_of_its_planes():
    for _, paper in DECO.values():
        assert sum(paper[4:7]) / 3 == pytest.approx(paper[7], abs=0.0011)

def write(folder, run, dft='no', psnr=31.25, lpips='random', **judges):
    """The table.json of a run with a row of its own and one of a reference; judges: other lists of rows."""
    scores = {'psnr_whole': {'mean': psnr}, 'ssim_uniform_whole': {'mean': 95.5}, 'lpips_sum': {'mean': 0.5}}
    row = {'name': run, 'ckpt': f'{folder}/{run}.pt', 'dft': dft, 'fidelity': {'T1w': scores},
           'geometry': {'cos_raw': 0.25, 'effective_rank': 3.5}}
    results = {'split': 'test', 'data_dir': 'data/x', 'settings': {'lpips': lpips},
               'rows': [row, {'name': 'blur'}], **judges}
    path = folder / run.replace('/', '_')
    path.mkdir(parents=True)
    (path / 'table.json').write_text(json.dumps(results))

def cells(text):
    """{label: the other cells} of a markdown table."""
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    return {row[0]: row[1:] for row in rows}

@pytest.fixture
def measured(tmp_path):
    """Folder of runs with one of decovae_vad, whose gFID could not be computed."""
    frechet = [
        {'row': 'decovae_vad/ckpt rFID', 'modality': 'T1w', 'mean': 2.0, 'axial': 1, 'coronal': 2,
         'sagittal': 3},
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
    frechet = [{'row': 'maisi/ckpt rFID', 'modality': 'T1w', 'mean': 2.0, 'axial': 1, 'coronal': 2,
                'sagittal': 3}]
    write(tmp_path, 'maisi/ckpt', frechet=frechet, frechet_features='RANDOM features (no FID)')
    row = cells(paper_table('deco4', tmp_path))['L_VAE (MAISI-VAE)']
    assert row[4:6] == ['(0.027)', '(6.426)']

def test_a_fine_tuned_run_under_a_plain_name_is_refused(tmp_path):
    write(tmp_path, 'maisi/ckpt', dft='yes')
    with pytest.raises(SystemExit, match='rename the run'):
        paper_table('deco2', tmp_path)

def test_the_command_prints_a_table(tmp_path):
    assert 'VQGAN' in play('evaluate.py', '--table=neuroquant1', f'--runs={tmp_path}')

def test_an_unknown_table_is_refused_with_those_there_are():
    assert 'neuroquant1, neuroquant2' in refuses('evaluate.py', '--table=table9')

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
