"""Distances between sets, label maps and the probe: closed forms and constructed cases."""
import numpy as np
import pytest
from scipy import linalg

from evaluate import auc, dice, frechet_distance, frechet_parts, linear_probe, region_volumes_mm3

def covariance(rng, n):
    a = rng.normal(size=(n, 3 * n))
    return a @ a.T / (3 * n)

def test_frechet_distance_equals_closed_forms():
    d1, d2, m1, m2 = np.array([1.0, 4, 9]), np.array([4.0, 4, 1]), np.zeros(3), np.array([1.0, -2, 0])
    want = 5 + ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(m1, np.diag(d1), m2, np.diag(d2)) == pytest.approx(want, abs=1e-6)
    assert frechet_parts(m1, np.diag(d1), m2, np.diag(d2)) == pytest.approx((5, want - 5), abs=1e-6)
    cov = covariance(np.random.default_rng(0), 20)
    assert frechet_distance(np.ones(20), cov, np.ones(20), cov) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(np.ones(20), cov, np.ones(20), 4 * cov) == pytest.approx(np.trace(cov), rel=1e-9)

@pytest.mark.parametrize('rank', [64, 20])
def test_frechet_distance_equals_scipys_square_root(rank):
    rng = np.random.default_rng(1)
    a, b = covariance(rng, 64), covariance(rng, 64)
    if rank < 64:
        q = np.linalg.qr(rng.normal(size=(64, rank)))[0]
        a = q @ q.T @ a @ q @ q.T  # singular: fewer samples than features
    want = np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(np.zeros(64), a, np.zeros(64), b) == pytest.approx(want, rel=1e-4)

def test_dice_and_volumes_of_constructed_maps():
    a, b = np.zeros((10, 10, 10), int), np.zeros((10, 10, 10), int)
    a[:4], b[2:6], a[8], b[9] = 1, 1, 2, 2
    found = dice(a, b, (1, 2, 3))
    assert found[1] == 0.5 and found[2] == 0 and np.isnan(found[3]) and dice(a, a, (1,)) == {1: 1.0}
    assert region_volumes_mm3(a, (1, 2, 3), (1, 2, 0.5)) == {1: 400.0, 2: 100.0, 3: 0.0}
    assert region_volumes_mm3(a, {'both': (1, 2)}, 2.0) == {'both': 4000.0}
    with pytest.raises(ValueError, match='shapes'): dice(a, b[:5], (1,))

def people(rng, n=60, sessions=2, features=500, signal=0.0):
    """n subjects with several sessions each; the subject's own pattern is far stronger than the noise between sessions."""
    y = np.repeat(np.arange(n) % 2, sessions)
    own = np.repeat(rng.normal(size=(n, features)), sessions, 0) + 0.1 * rng.normal(size=(n * sessions, features))
    own[:, :10] += signal * (y[:, None] - 0.5)
    return own, np.where(y, 'M', 'F'), np.repeat([f's{i}' for i in range(n)], sessions)

def test_the_probe_finds_a_planted_signal_and_nothing_in_shuffled_labels():
    rng = np.random.default_rng(0)
    z, y, groups = people(rng, signal=6.0)
    found = linear_probe(z, y, groups)
    assert min(found['accuracy'], found['balanced_accuracy'], found['auc'], found['subject_accuracy']) > 0.95
    assert (found['n'], found['n_groups']) == (120, 60) and found['ci95'][0] <= found['accuracy'] <= found['ci95'][1]
    chance = [linear_probe(*people(np.random.default_rng(s)))['accuracy'] for s in range(8)]  # memory of the person would give 1
    assert abs(np.mean(chance) - 0.5) < 0.08

def test_the_probe_does_not_care_about_scale_and_shape():
    z, y, groups = people(np.random.default_rng(0), features=24, signal=2.0)
    plain = linear_probe(z, y, groups)
    again = linear_probe((1e4 * z + 7).reshape(-1, 3, 2, 2, 2), y, groups)
    assert {k: v for k, v in plain.items() if k != 'auc'} == {k: v for k, v in again.items() if k != 'auc'} and plain['auc'] == pytest.approx(again['auc'], abs=1e-3)

def test_auc_counts_pairs():
    score, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auc(score, positive) == pytest.approx((1 + 1 + 0.5 + 1) / 4)

def test_probes_that_cannot_be_made_are_refused():
    z, y, groups = people(np.random.default_rng(0))
    with pytest.raises(ValueError, match='two classes'): linear_probe(z, ['F'] * len(y), groups)
    with pytest.raises(ValueError, match='at least 5'): linear_probe(z[:12], y[:12], groups[:12])
