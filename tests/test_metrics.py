"""Distances between sets, label maps and the probe: closed forms and constructed cases."""
import numpy as np
import pytest
import torch
from scipy import linalg

from metrics import auc, dice, feature_moments, frechet_distance, frechet_parts, linear_probe, region_volumes_mm3, slice_frechet, tsne

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

def test_groups_that_hold_both_classes_stay_together():
    """Modality of a scan, two scans a subject: found where planted, and never by remembering the subject."""
    rng = np.random.default_rng(0)
    subject, modality = np.repeat(np.arange(40), 2), np.tile(['T1w', 'T2w'], 40)
    z = np.repeat(rng.normal(size=(40, 30)), 2, 0) + 0.1 * rng.normal(size=(80, 30))
    found = linear_probe(z, modality, subject)
    assert found['subject_accuracy'] is None and abs(found['accuracy'] - 0.5) < 0.25
    z[:, 0] += 8 * (modality == 'T1w')
    assert linear_probe(z, modality, subject)['accuracy'] > 0.95

def test_auc_counts_pairs():
    score, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auc(score, positive) == pytest.approx((1 + 1 + 0.5 + 1) / 4)

def test_probes_that_cannot_be_made_are_refused():
    z, y, groups = people(np.random.default_rng(0))
    with pytest.raises(ValueError, match='two classes'): linear_probe(z, ['F'] * len(y), groups)
    with pytest.raises(ValueError, match='at least 5'): linear_probe(z[:12], y[:12], groups[:12])

def test_streamed_slice_features_give_the_distance_of_all_of_them_at_once():
    torch.manual_seed(0)
    extractor = lambda s: torch.stack([s.mean((1, 2, 3)), s.std((1, 2, 3)), s.amax((1, 2, 3))], 1)
    a, b = [torch.rand(1, 1, 8, 10, 12) for _ in range(6)], [torch.rand(1, 1, 8, 10, 12) ** 1.5 for _ in range(5)]
    found = slice_frechet(feature_moments(a, extractor, batch=3), feature_moments(iter(b), extractor))
    for axis, plane in enumerate(('sagittal', 'coronal', 'axial')):
        fa, fb = (np.concatenate([extractor(torch.stack(v[0, 0].unbind(axis))[:, None]) for v in s]) for s in (a, b))
        assert found[plane] == pytest.approx(frechet_distance(fa.mean(0), np.cov(fa.T), fb.mean(0), np.cov(fb.T)), rel=1e-5)
        assert found['slices'][plane] == (6 * (8, 10, 12)[axis], 5 * (8, 10, 12)[axis])
    assert found['mean'] == pytest.approx(found['mean_part'] + found['covariance_part'])
    central = feature_moments(a, extractor, 'central')
    assert central['coronal'][-1, -1] == 6 * 4
    same = slice_frechet(feature_moments(a, extractor), feature_moments(a, extractor))
    assert abs(same['mean']) < 1e-9

def test_too_few_slices_for_the_features_are_refused_with_both_numbers():
    few = feature_moments([torch.rand(1, 1, 4, 4, 4)], lambda s: s.flatten(1)[:, :9])
    with pytest.raises(ValueError, match='4 sagittal slices for 9 features'): slice_frechet(few, few)
    with pytest.raises(ValueError, match='all or central'): feature_moments([], None, 'some')

def test_tsne_separates_three_blobs():
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(3) * 10, 60, 0)
    y = tsne(np.concatenate([centre + rng.normal(size=(180, 3))], 1), perplexity=20, iterations=300).numpy()
    label = np.repeat(np.arange(3), 60)
    distance = np.linalg.norm(y[:, None] - y[None], axis=2) + 1e9 * np.eye(180)
    assert (label[distance.argmin(1)] == label).mean() > 0.99
    means = np.stack([y[label == k].mean(0) for k in range(3)])
    within = max(y[label == k].std() for k in range(3))
    assert min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 2 * within
