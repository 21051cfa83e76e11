"""What a resumed run must have in common with the one before."""
import json
import math

import pytest

from conftest import make_tiny_data
from resume import best_so_far, fingerprint, refuse_other_data

def test_volumes_made_anew_are_other_data(tmp_path):
    """Their files and rows are the same."""
    folder = make_tiny_data(tmp_path / 'data')
    checksums = {path.name: 1 for path in folder.glob('*.npy')}
    (folder / 'checksums.json').write_text(json.dumps(checksums))
    before = fingerprint(f'{folder}')
    refuse_other_data(before, f'{folder}', 'ckpt.pt')
    (folder / 'checksums.json').write_text(json.dumps(checksums | {'sub-01_ses-01_T1w.npy': 2}))
    with pytest.raises(SystemExit, match=r'1 changed \(sub-01 ses-01\)'):
        refuse_other_data(before, f'{folder}', 'ckpt.pt')

def test_validations_of_other_sessions_do_not_compare(capsys):
    checkpoint = {'best_val': 30.0, 'config': {'eval_sessions': 32}}
    assert best_so_far(checkpoint, {'eval_sessions': 32}, 'eval_sessions', -math.inf) == 30
    assert best_so_far(checkpoint, {'eval_sessions': 2}, 'eval_sessions', -math.inf) == -math.inf
    assert '--eval_sessions=2, before 32: best.pt begins anew' in capsys.readouterr().out
