"""The check that a person with a card runs once, on a CPU; and that it can fail."""
import json

import pytest

from judge import selfcheck
from optim import update_average

FAST = [case for case in selfcheck.CASES if case not in (selfcheck.check_scripts, selfcheck.check_graphs)]
GRAPHS = pytest.param(selfcheck.check_graphs, marks=pytest.mark.slow)  # a minute of compiling

@pytest.mark.parametrize('case', [*FAST, GRAPHS], ids=lambda case: case.__name__)
def test_a_cpu_passes(case):
    lines = list(case('cpu'))
    assert lines
    assert [(what, value) for what, value, limit in lines if not value <= limit] == []

@pytest.mark.slow
def test_scripts_stop_and_resume():
    assert [(what, value) for what, value, limit in selfcheck.check_scripts('cpu') if value > limit] == []

def test_a_wrong_average_of_weights_is_noticed(monkeypatch):
    def wrong(average, model, decay):
        update_average(average, model, 1 - decay)
    monkeypatch.setattr(selfcheck, 'update_average', wrong)
    failed = [what for what, value, limit in selfcheck.check_optimisers('cpu') if value > limit]
    assert len(failed) == 2 and all('average' in what for what in failed)

def test_a_case_that_ends_in_an_error_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    def broken(device):
        yield 'first', 0, 1
        raise RuntimeError('no such kernel')
    def fine(device):
        yield 'last', 2, 1
    monkeypatch.setattr(selfcheck, 'CASES', (broken, fine))
    assert selfcheck.run_all('cpu', tmp_path / 'check.json') == 2
    lines = json.loads((tmp_path / 'check.json').read_text())['lines']
    assert [line['pass'] for line in lines] == [True, False, False]
    assert 'FAIL  broken: RuntimeError' in capsys.readouterr().out
