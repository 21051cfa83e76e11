"""The papers' tables: their own numbers are consistent, ours land in their cells, fine-tuned rows never in others."""
import json

import pytest

from conftest import play, refuses
from tables import DECO, TABLES, paper_table

def test_numbers_of_the_papers_are_whole_and_agree_with_their_own_means():
    for title, columns, rows in TABLES.values():
        assert all(len(paper) == len(columns) for _, _, paper in rows.values())
        assert all(tuned == run.endswith('_dft') for run, tuned, _ in rows.values())
    for _, _, paper in DECO.values():
        assert sum(paper[4:7]) / 3 == pytest.approx(paper[7], abs=0.0011)

def write(folder, run, dft='no', **more):
    (folder / run).mkdir()
    row = {'name': run, 'ckpt': 'x', 'dft': dft, 'geometry': {'cos_raw': 0.25, 'effective_rank': 3.5},
           'fidelity': {'T1w': {'psnr_whole': {'mean': 31.25}, 'ssim_uniform_whole': {'mean': 95.5}}}}
    (folder / run / 'table.json').write_text(
        json.dumps({'split': 'test', 'data_dir': 'data/x', 'rows': [row, {'name': 'blur'}], **more})
    )

def test_ours_land_in_their_cells_and_what_is_missing_stays_empty(tmp_path):
    frechet = [
        {'row': 'decovae_vad rFID', 'modality': 'T1w', 'axial': 1, 'coronal': 2, 'sagittal': 3, 'mean': 2.0},
        {'row': 'decovae_vad gFID', 'modality': 'T1w', 'reason': 'few'},
    ]
    write(tmp_path, 'decovae_vad', frechet=frechet)
    lines = {
        line.split(' | ')[0][2:]: line.split(' | ')[1:]
        for line in paper_table('deco4', tmp_path).splitlines()
        if line.startswith('| ')
    }
    assert lines['VAD'][:6] == ['decovae_vad', 'no', '31.25 (33.17)', '0.955 (0.978)', '(0.025)', '2 (6.251)']
    assert lines['VAD + DFT'][2] == '(33.64)' and 'data/x' in lines['VAD'][-1]
    assert '0.25 (0.0971) | 3.5 (3.97)' in paper_table('deco1', tmp_path)

def test_what_could_not_be_measured_is_an_empty_cell(tmp_path):
    reasons = [
        {'row': 'Dice', 'modality': '', 'reason': 'no segmenter'},
        {'row': 'neuroquant', 'modality': 'T1w', 'reason': 'no scan'},
    ]
    probes = [{
        'row': 'neuroquant',
        'probe': 'SEResNet-152',
        'seen': 'latent, T1w',
        'target': 'sex',
        'reason': 'one class',
    }]
    write(
        tmp_path,
        'neuroquant',
        anatomy=reasons,
        probes=probes,
        frechet=[{'row': 'rFID, gFID', 'modality': '', 'reason': 'no file'}],
    )
    line = next(
        line for line in paper_table('neuroquant1', tmp_path).splitlines() if '| neuroquant |' in line
    )
    assert '| 31.25 (28.89) |' in line and '| (79.09) | (95.25) |' in line

def test_a_fine_tuned_run_under_a_plain_name_is_refused(tmp_path):
    write(tmp_path, 'maisi', dft='yes')
    with pytest.raises(SystemExit, match='rename the run'):
        paper_table('deco2', tmp_path)

def test_the_command_prints_and_refuses(tmp_path):
    assert 'VQGAN' in play('evaluate.py', '--table=neuroquant1', f'--runs={tmp_path}')
    assert 'neuroquant1, neuroquant2' in refuses('evaluate.py', '--table=table9')
