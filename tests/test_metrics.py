"""What evaluate.py's tables are made of, against numpy, scipy, closed forms and constructed cases."""
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage

from judge.metrics import (
    channel_cosine, channels_in_use, code_row, dice, effective_rank, explained_variance, fidelity,
    frechet_distance, frechet_parts, latent_geometry, moments, region_volumes_mm3, summarise, tsne)
from judge.references import PrincipalComponents, dct_codec, sessions_with
from judge.report import diversity_table
from judge.runs import chosen, other_data, run_names
from judge.sets import feature_moments, ms_ssim_of_pairs, read_real, slice_frechet
from losses import ms_ssim, psnr, ssim, ssim_map

# ---------------------------------------------------------------- fidelity

@pytest.fixture
def pair():
    """A scan whose brain is an eighth of the box, and a prediction that is 0.1 off there."""
    x = torch.zeros(1, 1, 24, 24, 24)
    x[:, :, 6:18, 6:18, 6:18] = torch.rand(12, 12, 12) * 0.5 + 0.25
    return torch.where(x > 0, x + 0.1, x), x

def test_psnr_counts_the_whole_box_or_the_brain(pair):
    scores = fidelity(*pair)
    assert scores['psnr_brain'] == pytest.approx(20, abs=1e-3)
    assert scores['psnr_whole'] == pytest.approx(20 + 10 * np.log10(8), abs=1e-3)

def test_ssim_counts_the_whole_box_or_windows_centred_in_the_brain(pair):
    x_hat, x = pair
    scores = fidelity(x_hat, x)
    inside = x[:, :, 5:-5, 5:-5, 5:-5] > 0  # windows of 11
    assert scores['ssim_whole'] == pytest.approx(100 * ssim(x_hat, x).item(), abs=1e-3)
    assert scores['ssim_brain'] == pytest.approx(100 * ssim_map(x_hat, x)[inside].mean().item(), abs=1e-3)

def test_a_scan_without_brain_is_refused():
    with pytest.raises(ValueError, match='empty mask'):
        fidelity(torch.rand(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16))

def test_summary_averages_sessions_within_subjects():
    summary = summarise([1.0, 3.0, 8.0], ['a', 'a', 'b'])
    assert summary['mean'] == 5
    assert summary['sd'] == pytest.approx(np.std([2, 8], ddof=1))
    assert (summary['n_subjects'], summary['n_sessions']) == (2, 3)

def test_interval_of_two_subjects_reaches_from_one_to_the_other():
    assert summarise([1.0, 3.0, 8.0], ['a', 'a', 'b'])['ci95'] == [2, 8]

# ---------------------------------------------------------------- which sessions, which names

ROWS = [{'subject': f'{folder}-{i:02d}', 'session': 'ses-01'} for folder in ('a', 'b') for i in range(60)]

def test_a_part_of_the_sessions_is_of_every_folder():
    folders = [ROWS[i]['subject'][0] for i in chosen(ROWS, 30)]
    assert len(folders) == 30 and 8 < folders.count('a') < 22

@pytest.mark.parametrize('count', [-1, 120, 500])
def test_all_sessions_come_in_order(count):
    assert chosen(ROWS, count) == list(range(120))

def test_few_sessions_are_among_more_of_them():
    assert chosen(ROWS, 14) == sorted(chosen(ROWS, 14))
    assert set(chosen(ROWS, 3)) < set(chosen(ROWS, 14))

def test_a_list_without_a_session_that_is_not_chosen_gives_the_same_ones():
    few = [ROWS[i] for i in chosen(ROWS, 5)]
    others = [row for row in ROWS if row in few or row['subject'].endswith('7')]
    assert [others[i] for i in chosen(others, 5)] == few

def test_names_are_as_long_as_it_takes_to_tell_checkpoints_apart():
    paths = ['out/a/m/best.pt', 'out/b/m/best.pt', 'out/c/best.pt', 'out/a/m/best.pt', 'x/b/m/best.pt']
    assert run_names(paths) == ['a/m/best', 'out/b/m/best', 'c/best', 'a/m/best', 'x/b/m/best']

BOX = {'shape': [8, 8, 8], 'spacing_mm': 1.0, 'resize': False, 'percentiles': (0.5, 99.5), 'clip': True}

def notes_on(voxel_mm=(1.0, 1.0, 1.0), **changed):
    learned = {'data': BOX, 'voxel_mm': (1.0, 1.0, 1.0)}
    return other_data('a.pt', learned, 'data/x', BOX | changed, list(voxel_mm))

def test_data_of_the_learned_settings_need_no_note():
    assert notes_on(shape=[16, 16, 16], percentiles=[0.5, 99.5], percentiles_of='brain') == []
    assert notes_on(voxel_mm=(1.0, 1.001, 1.0)) == []

@pytest.mark.parametrize('changed, words', [
    ({'spacing_mm': 2.0, 'voxel_mm': (2.0, 2.0, 2.0)}, 'spacing_mm 1.0, data/x has 2.0'),
    ({'voxel_mm': (1.0, 1.5, 1.0)}, 'voxel_mm [1.0, 1.0, 1.0], data/x has [1.0, 1.5, 1.0]'),
    ({'percentiles': [0, 99.5]}, 'percentiles [0.5, 99.5], data/x has [0.0, 99.5]'),
    ({'percentiles': [0.5, 99.9]}, 'percentiles [0.5, 99.5], data/x has [0.5, 99.9]'),
    ({'clip': False}, 'clip True, data/x has False')])
def test_data_of_other_settings_get_a_note_with_both_values(changed, words):
    assert notes_on(**changed) == [f'note: a.pt learned {words}']

# ---------------------------------------------------------------- references

def test_references_are_of_the_chosen_sessions():
    sessions = Volumes(range(120))
    assert sessions_with(sessions, 0, 5) == chosen(sessions.rows, 5) != list(range(5))
    assert sessions_with(sessions, 0) == list(range(120))

def test_components_are_of_training_scans_from_the_whole_list(brains):
    train = Volumes(brains)
    components = PrincipalComponents(train, 0, most=6)
    np.testing.assert_allclose(components.mean, brains[chosen(train.rows, 6)].mean(0).ravel(), rtol=1e-5)
    assert not np.allclose(components.mean, brains[:6].mean(0).ravel())

def test_dct_codec_gets_better_with_more_bits():
    rng = np.random.default_rng(0)
    x = np.clip(ndimage.gaussian_filter(rng.random((24, 32, 24)), 2) * 3 - 1, 0, 1).astype(np.float32)
    quality = []
    for bits in (50, 500, 5000, 50000):
        decoded = dct_codec(x, bits)
        quality.append(psnr(torch.tensor(decoded)[None, None], torch.tensor(x)[None, None]).item())
    assert quality == sorted(quality)
    assert quality[-1] > quality[0] + 8

def test_dct_codec_with_bits_to_spare_returns_the_volume():
    rng = np.random.default_rng(0)
    x = np.clip(ndimage.gaussian_filter(rng.random((24, 32, 24)), 2) * 3 - 1, 0, 1).astype(np.float32)
    assert np.abs(dct_codec(x, 1e7) - x).max() < 1e-3

class Volumes:
    """What PrincipalComponents wants of a data.Sessions: arrays of one modality."""
    def __init__(self, arrays):
        self.arrays, self.n = arrays, len(arrays)
        self.rows = [{'subject': f'sub-{i:02d}'} for i in range(self.n)]

    def present(self, i):
        return [0]

    def volume(self, i, m):
        return self.arrays[i]

@pytest.fixture
def brains():
    """20 volumes that differ in three ways, and a little noise."""
    rng = np.random.default_rng(0)
    ways = ndimage.gaussian_filter(rng.normal(size=(3, 12, 16, 12)), (0, 2, 2, 2))
    brains = np.tensordot(rng.normal(size=(20, 3)) * (4, 2, 1), ways, 1) + 0.5
    return (brains + 0.01 * rng.normal(size=brains.shape)).astype(np.float32)

def test_components_with_bits_to_spare_return_a_training_volume(brains):
    components = PrincipalComponents(Volumes(brains), 0)
    assert np.abs(components.code(brains[3], 1e5) - brains[3]).max() < 1e-3

def test_components_without_bits_return_the_mean(brains):
    components = PrincipalComponents(Volumes(brains), 0)
    np.testing.assert_allclose(components.code(brains[3], 0), brains.mean(0), atol=1e-5)

def test_one_training_scan_is_all_that_there_is(brains):
    np.testing.assert_array_equal(PrincipalComponents(Volumes(brains[:1]), 0).code(brains[3], 1e5), brains[0])

def test_components_code_others_with_few_bits_and_never_more_than_allowed(brains):
    components = PrincipalComponents(Volumes(brains[:15]), 0)
    errors = []
    for bits in (0, 6, 15, 40):
        errors.append(np.square(components.code(brains[17], bits) - brains[17]).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002

def test_a_gaussians_entropy_is_that_of_its_rounded_values(brains):
    components = PrincipalComponents(Volumes(brains), 0)
    step = components.sd.max() / 8
    rng = np.random.default_rng(1)
    total = 0
    for sd in components.sd:
        _, counts = np.unique(np.round(rng.normal(size=200_000) * sd / step), return_counts=True)
        p = counts / counts.sum()
        total -= (p * np.log2(p)).sum()
    assert components.bits(step) == pytest.approx(total, rel=0.03)

# ---------------------------------------------------------------- codes

def test_perplexity_of_two_codes_used_alike_is_2():
    assert code_row(np.array([[5, 5, 0, 0]])) == {'used': 2, 'perplexity': pytest.approx(2), 'tokens': 10}

def test_code_use_is_the_mean_over_codebooks():
    use = code_row(np.array([[9, 0], [2, 2]]))
    assert use == {'used': 1.5, 'perplexity': pytest.approx(1.5), 'tokens': 13}

# ---------------------------------------------------------------- geometry of the latent

@pytest.fixture
def latents():
    """Latents (B,C,d,h,w) of correlated channels with means, and the same as rows (N,C) of float64."""
    z = torch.randn(3, 4, 5, 6, 7) @ torch.randn(7, 7) + torch.tensor([0.0, 3, -2, 9]).view(4, 1, 1, 1)
    return z, z.double().movedim(1, -1).reshape(-1, 4).numpy()

def test_centred_cosine_is_numpys_correlation(latents):
    z, rows = latents
    np.testing.assert_allclose(channel_cosine(z), np.abs(np.corrcoef(rows.T)), atol=1e-6)

def test_raw_cosine_is_that_of_the_columns(latents):
    z, rows = latents
    unit = rows / np.linalg.norm(rows, axis=0)
    np.testing.assert_allclose(channel_cosine(z, centred=False), np.abs(unit.T @ unit), atol=1e-6)

def test_explained_variance_and_rank_are_those_of_numpys_covariance(latents):
    z, rows = latents
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    p = values / values.sum()
    np.testing.assert_allclose(explained_variance(z), p, atol=1e-6)
    assert effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)

def test_rows_and_volumes_of_latents_are_the_same_to_a_metric(latents):
    z, rows = latents
    np.testing.assert_allclose(channel_cosine(torch.from_numpy(rows)), channel_cosine(z), atol=1e-9)

def test_geometry_gathered_volume_by_volume_is_that_of_all_at_once(latents):
    z, _ = latents
    geometry = latent_geometry(sum(moments(part) for part in z.split(1)), 0.5)
    assert geometry['effective_rank'] == pytest.approx(effective_rank(z))
    assert geometry['explained_variance'] == pytest.approx(explained_variance(z).tolist())
    assert geometry['pearson_abs'] == pytest.approx((channel_cosine(z).sum().item() - 4) / 12)

def test_a_lost_channel_is_one_that_noise_alone_fills():
    z = torch.randn(5000, 4) * torch.tensor([3.0, 1.0, 0.02, 0.3])
    noise = torch.full((4,), 0.01, dtype=torch.float64)
    assert channels_in_use(moments(z), noise) == 3  # 0.02^2 < 0.01
    assert channels_in_use(moments(z), noise / 100) == 4

def test_channels_that_repeat_others_are_not_in_use():
    three = torch.randn(5000, 3)
    z = torch.cat([three, three.mean(1, keepdim=True)], 1)
    noise = torch.full((4,), 1e-4, dtype=torch.float64)
    assert channels_in_use(moments(z), noise) == 3

def test_effective_rank_of_known_spectra():
    q = torch.linalg.qr(torch.cat([torch.ones(100, 1), torch.randn(100, 4)], 1))[0][:, 1:].double()
    assert effective_rank(q) == pytest.approx(4, abs=1e-4)
    assert effective_rank(q[:, :1] * torch.ones(1, 4)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(q * torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2, abs=1e-4)
    assert effective_rank(5 * q + 3) == pytest.approx(4, abs=1e-4)

@pytest.fixture(scope='module')
def blobs():
    """Three blobs of 60 points each in the plane, embedded by t-SNE, and the blob of each point."""
    pytest.importorskip('sklearn', reason='t-SNE is that of scikit-learn')
    rng = np.random.default_rng(0)
    centre = np.repeat(np.eye(3) * 10, 60, 0)
    points = tsne(np.concatenate([centre + rng.normal(size=(180, 3))], 1), perplexity=20)
    return points, np.repeat(np.arange(3), 60)

def test_tsne_keeps_neighbours(blobs):
    points, blob = blobs
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(180)
    assert (blob[distance.argmin(1)] == blob).mean() > 0.99

def test_tsne_separates_blobs(blobs):
    points, blob = blobs
    means = np.stack([points[blob == k].mean(0) for k in range(3)])
    within = max(points[blob == k].std() for k in range(3))
    between = min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert between > 2 * within

def test_tsne_without_scikit_learn_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'sklearn.manifold', None)
    assert tsne(np.zeros((10, 3))) is None
    assert 'pip install scikit-learn' in capsys.readouterr().out

# ---------------------------------------------------------------- Frechet distances

def covariance(rng, n):
    a = rng.normal(size=(n, 3 * n))
    return a @ a.T / (3 * n)

def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    d1, d2 = np.array([1.0, 4, 9]), np.array([4.0, 4, 1])
    m1, m2 = np.zeros(3), np.array([1.0, -2, 0])
    want = 5 + ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(m1, np.diag(d1), m2, np.diag(d2)) == pytest.approx(want, abs=1e-6)
    assert frechet_parts(m1, np.diag(d1), m2, np.diag(d2)) == pytest.approx((5, want - 5), abs=1e-6)

def test_frechet_distance_of_a_gaussian_to_itself_and_to_a_wider_one():
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

def three_features(slices):
    """Mean, standard deviation and maximum of slices (n,1,h,w)."""
    return torch.stack([slices.mean((1, 2, 3)), slices.std((1, 2, 3)), slices.amax((1, 2, 3))], 1)

@pytest.fixture
def volumes():
    """Two sets of volumes, six and five of them."""
    torch.manual_seed(0)
    one = [torch.rand(1, 1, 8, 10, 12) for _ in range(6)]
    other = [torch.rand(1, 1, 8, 10, 12) ** 1.5 for _ in range(5)]
    return one, other

@pytest.mark.parametrize('axis, plane', [(0, 'sagittal'), (1, 'coronal'), (2, 'axial')])
def test_streamed_slices_give_the_distance_of_all_of_them_at_once(volumes, axis, plane):
    one, other = volumes
    sums = feature_moments(one, three_features, batch=3), feature_moments(iter(other), three_features)
    statistics = []
    for volumes_of_set in volumes:
        slices = torch.cat([v[0, 0].movedim(axis, 0) for v in volumes_of_set])[:, None]
        features = three_features(slices).numpy()
        statistics += [features.mean(0), np.cov(features.T)]
    distance = slice_frechet(*sums)
    assert distance[plane] == pytest.approx(frechet_distance(*statistics), rel=1e-5)
    assert distance['slices'][plane] == (6 * (8, 10, 12)[axis], 5 * (8, 10, 12)[axis])

def test_the_parts_of_a_distance_add_up(volumes):
    distance = slice_frechet(*(feature_moments(v, three_features) for v in volumes))
    assert distance['mean'] == pytest.approx(distance['mean_part'] + distance['covariance_part'])

def test_a_set_is_at_no_distance_from_itself(volumes):
    sums = feature_moments(volumes[0], three_features)
    assert abs(slice_frechet(sums, sums)['mean']) < 1e-9

def test_central_slices_are_40_percent_of_a_plane(volumes):
    assert feature_moments(volumes[0], three_features, 'central')['coronal'][-1, -1] == 6 * 4

def nine_features(slices):
    return slices.flatten(1)[:, :9]

def test_too_few_slices_for_the_features_are_refused_with_both_numbers():
    few = feature_moments([torch.rand(1, 1, 4, 4, 4)], nine_features)
    with pytest.raises(ValueError, match='4 sagittal slices for 9 features'):
        slice_frechet(few, few)

def test_slices_are_all_or_central():
    with pytest.raises(ValueError, match='all or central'):
        feature_moments([torch.rand(1, 1, 4, 4, 4)], nine_features, 'some')

# ---------------------------------------------------------------- how alike volumes are

def test_the_spread_of_ms_ssim_is_that_of_a_sample():
    volumes = [torch.rand(1, 1, 32, 32, 32) for _ in range(3)]
    values = [ms_ssim(a, b).item() for a, b in combinations(volumes, 2)]
    assert ms_ssim_of_pairs(volumes, 0)['sd'] == pytest.approx(np.std(values, ddof=1), rel=1e-3)

def test_one_pair_of_volumes_has_no_spread():
    row = ms_ssim_of_pairs([torch.rand(1, 1, 32, 32, 32) for _ in range(2)], 0)
    assert row['sd'] is None
    table = diversity_table([{'row': 'real', 'modality': 'T1w', **row}])
    assert '+-' not in table[-1] and f"{row['ms_ssim']:.4f}" in table[-1]

def test_real_scans_are_of_at_most_100_subjects_of_the_whole_list():
    sessions = Volumes([np.full((2, 2, 2), i) for i in range(150)])
    run = SimpleNamespace(sessions=sessions, used=list(range(150)))
    seen = {int(volume[0, 0, 0, 0, 0]) for volume in read_real(run, 0, 'cpu')}
    assert len(seen) == 100 and len([i for i in seen if i < 50]) > 20

# ---------------------------------------------------------------- label maps

@pytest.fixture
def maps():
    """Two label maps: label 1 overlaps by half, label 2 not at all."""
    a, b = np.zeros((10, 10, 10), int), np.zeros((10, 10, 10), int)
    a[:4], a[8] = 1, 2
    b[2:6], b[9] = 1, 2
    return a, b

def test_dice_of_constructed_maps(maps):
    a, b = maps
    scores = dice(a, b, (1, 2, 3))
    assert scores[1] == 0.5 and scores[2] == 0
    assert np.isnan(scores[3])  # in neither
    assert dice(a, a, (1,)) == {1: 1.0}

def test_volumes_of_constructed_maps(maps):
    assert region_volumes_mm3(maps[0], (1, 2, 3), (1, 2, 0.5)) == {1: 400.0, 2: 100.0, 3: 0.0}
    assert region_volumes_mm3(maps[0], {'both': (1, 2)}, 2.0) == {'both': 4000.0}

def test_maps_of_different_shapes_are_refused(maps):
    with pytest.raises(ValueError, match='shapes'):
        dice(maps[0], maps[1][:5], (1,))
