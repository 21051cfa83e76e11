"""Distances between sets and label maps: closed forms and constructed cases."""
import numpy as np
import pytest
import torch
from scipy import linalg

from judge.metrics import (
    dice, feature_moments, frechet_distance, frechet_parts, region_volumes_mm3, slice_frechet, tsne
)

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
    with pytest.raises(ValueError, match='shapes'):
        dice(a, b[:5], (1,))

def test_streamed_slice_features_give_the_distance_of_all_of_them_at_once():
    torch.manual_seed(0)
    extractor = lambda s: torch.stack([s.mean((1, 2, 3)), s.std((1, 2, 3)), s.amax((1, 2, 3))], 1)
    a, b = [torch.rand(1, 1, 8, 10, 12) for _ in range(6)], [
        torch.rand(1, 1, 8, 10, 12) ** 1.5 for _ in range(5)
    ]
    found = slice_frechet(feature_moments(a, extractor, batch=3), feature_moments(iter(b), extractor))
    for axis, plane in enumerate(('sagittal', 'coronal', 'axial')):
        fa, fb = (
            np.concatenate([extractor(torch.stack(v[0, 0].unbind(axis))[:, None]) for v in s]) for s in (a, b)
        )
        assert found[plane] == pytest.approx(
            frechet_distance(fa.mean(0), np.cov(fa.T), fb.mean(0), np.cov(fb.T)), rel=1e-5
        )
        assert found['slices'][plane] == (6 * (8, 10, 12)[axis], 5 * (8, 10, 12)[axis])
    assert found['mean'] == pytest.approx(found['mean_part'] + found['covariance_part'])
    central = feature_moments(a, extractor, 'central')
    assert central['coronal'][-1, -1] == 6 * 4
    same = slice_frechet(feature_moments(a, extractor), feature_moments(a, extractor))
    assert abs(same['mean']) < 1e-9

def test_too_few_slices_for_the_features_are_refused_with_both_numbers():
    few = feature_moments([torch.rand(1, 1, 4, 4, 4)], lambda s: s.flatten(1)[:, :9])
    with pytest.raises(ValueError, match='4 sagittal slices for 9 features'):
        slice_frechet(few, few)
    with pytest.raises(ValueError, match='all or central'):
        feature_moments([], None, 'some')

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
