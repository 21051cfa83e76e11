"""Probes: planted and shuffled classes, and SEResNet-152 against MONAI's."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from judge import probe
from judge.probe import SEResNet, auc, cross_validate, embed_latents, linear_probe, network_probe
from judge.runs import chosen, key_of
from judge.validate import modality_probes, probe_line, validate

# ---------------------------------------------------------------- linear

def people(rng, n=60, sessions=2, features=500, signal=0.0):
    """n subjects with several sessions each: features, class and subject of every session.

    A subject's own pattern is far stronger than the noise between sessions. signal: what the class adds.
    """
    y = np.repeat(np.arange(n) % 2, sessions)
    pattern = np.repeat(rng.normal(size=(n, features)), sessions, 0)
    z = pattern + 0.1 * rng.normal(size=(n * sessions, features))
    z[:, :10] += signal * (y[:, None] - 0.5)
    return z, np.where(y, 'M', 'F'), np.repeat([f's{i}' for i in range(n)], sessions)

def test_the_probe_finds_a_planted_signal():
    result = linear_probe(*people(np.random.default_rng(0), signal=6.0))
    for key in ('accuracy', 'balanced_accuracy', 'auc', 'subject_accuracy'):
        assert result[key] > 0.95
    assert (result['n'], result['n_groups']) == (120, 60)
    low, high = result['ci95']
    assert low <= result['accuracy'] <= high

def test_the_probe_finds_nothing_where_nothing_is():
    """Memory of the person would give an accuracy of 1."""
    chance = [linear_probe(*people(np.random.default_rng(s)))['accuracy'] for s in range(8)]
    assert abs(np.mean(chance) - 0.5) < 0.08

def test_the_probe_does_not_care_about_scale_and_shape():
    z, y, groups = people(np.random.default_rng(0), features=24, signal=2.0)
    plain = linear_probe(z, y, groups)
    scaled = linear_probe((1e4 * z + 7).reshape(-1, 3, 2, 2, 2), y, groups)
    assert plain.pop('auc') == pytest.approx(scaled.pop('auc'), abs=1e-3)
    assert plain == scaled

def scans_of_two_modalities(rng):
    """Features, modality and subject of two scans each of 40 subjects."""
    z = np.repeat(rng.normal(size=(40, 30)), 2, 0) + 0.1 * rng.normal(size=(80, 30))
    return z, np.tile(['T1w', 'T2w'], 40), np.repeat(np.arange(40), 2)

def test_groups_that_hold_both_classes_stay_together():
    """The modality of a scan is not found by remembering the subject."""
    result = linear_probe(*scans_of_two_modalities(np.random.default_rng(0)))
    assert result['subject_accuracy'] is None
    assert abs(result['accuracy'] - 0.5) < 0.25

def test_a_planted_modality_is_found():
    z, modality, subject = scans_of_two_modalities(np.random.default_rng(0))
    z[:, 0] += 8 * (modality == 'T1w')
    assert linear_probe(z, modality, subject)['accuracy'] > 0.95

def test_auc_counts_pairs():
    score, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auc(score, positive) == pytest.approx((1 + 1 + 0.5 + 1) / 4)

def test_the_interval_is_of_the_same_share_of_scans_as_the_accuracy():
    """The first of ten subjects has 20 of 29 scans, and alone is told wrong."""
    subject = np.repeat(np.arange(10), [20] + [1] * 9)

    def fit(train, test, positive):
        sign = np.where(positive[test], 1.0, -1.0)
        return np.where(subject[test] == 0, -sign, sign)

    result = cross_validate(fit, subject % 2, subject)
    assert result['accuracy'] == pytest.approx(9 / 29)
    low, high = result['ci95']
    assert low < 9 / 49 < 9 / 29 < high

def test_the_balanced_interval_weighs_both_classes_alike():
    """30 people of one class are all told right, of 10 of the other one half: that half is what varies."""
    subject = np.arange(40)
    y = (subject >= 30).astype(int)

    def fit(train, test, positive):
        return np.where(positive[test] & (subject[test] % 2 == 0), 1.0, -1.0)

    result = cross_validate(fit, y, subject)
    assert (result['accuracy'], result['balanced_accuracy']) == (35 / 40, 0.75)
    shares = stats.binom(10, 0.5).ppf([0.025, 0.975]) / 10
    assert result['balanced_ci95'] == pytest.approx((1 + shares) / 2, abs=0.06)

def test_one_class_is_refused():
    z, y, groups = people(np.random.default_rng(0))
    with pytest.raises(ValueError, match='two classes'):
        linear_probe(z, ['F'] * len(y), groups)

def test_no_scans_are_refused():
    with pytest.raises(ValueError, match='0 in 0 scans'):
        linear_probe([], np.array([], str), np.array([], str))

def test_fewer_subjects_than_folds_are_refused():
    z, y, groups = people(np.random.default_rng(0))
    with pytest.raises(ValueError, match='at least 5'):
        linear_probe(z[:12], y[:12], groups[:12])

# ---------------------------------------------------------------- SEResNet-152

def test_seresnet_152_has_monais_parameters():
    nets = pytest.importorskip('monai.networks.nets', reason='parity with MONAI')
    with torch.device('meta'):
        ours, theirs = SEResNet(1, 1000), nets.SEResNet152(spatial_dims=3, in_channels=1)
    assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]

def test_a_small_seresnet_has_monais_outputs():
    nets = pytest.importorskip('monai.networks.nets', reason='parity with MONAI')
    theirs = nets.SENet(
        spatial_dims=3, in_channels=2, block='se_resnet_bottleneck', layers=(1, 2, 2, 1), groups=1,
        reduction=16, dropout_prob=None, inplanes=64, downsample_kernel_size=1, input_3x3=False,
        num_classes=3).eval()
    for name, p in theirs.state_dict().items():
        if name.endswith('running_var'):
            p.uniform_(0.5, 1.5)
        if name.endswith('running_mean'):
            p.uniform_(-0.2, 0.2)
    ours = SEResNet(2, 3, blocks=(1, 2, 2, 1)).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    x = torch.randn(2, 2, 37, 48, 33)
    with torch.no_grad():
        want = theirs(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('small, size', [(True, (2, 2, 2)), (False, (1, 1, 1))])
def test_a_small_stem_keeps_a_latent_from_shrinking_to_a_point(small, size):
    net = SEResNet(4, blocks=(1, 1, 1, 1), small=small).eval()
    assert net.layers(net.stem(torch.randn(1, 4, 9, 12, 9))).shape[2:] == size

def test_a_small_stem_has_as_many_parameters():
    sizes = []
    for small in (False, True):
        net = SEResNet(1, blocks=(1, 1, 1, 1), small=small)
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert sizes[0] == sizes[1]

def planted_shape(rng):
    """24 volumes of two channels and their class, which shows in one half of the first channel."""
    y, z = np.tile([0, 1], 12), rng.normal(size=(24, 2, 4, 4, 4)).astype(np.float32)
    z[:, 1] = 100 + 1000 * z[:, 1]  # standardised away
    z[y == 1, 0, :2] += 2
    return z, y

def probe_with_network(z, y):
    def load(row):
        return torch.from_numpy(z[row])

    return network_probe(load, y, np.arange(24), epochs=5, lr=1e-3, folds=2, blocks=(1, 1, 1, 1))

def test_the_network_finds_a_planted_shape():
    z, y = planted_shape(np.random.default_rng(0))
    assert probe_with_network(z, y)['accuracy'] > 0.95

def test_the_network_finds_no_shuffled_class():
    rng = np.random.default_rng(0)
    z, y = planted_shape(rng)
    assert abs(probe_with_network(z, rng.permutation(y))['accuracy'] - 0.5) < 0.35

def test_one_class_is_refused_by_the_network_too():
    z, _ = planted_shape(np.random.default_rng(0))
    with pytest.raises(ValueError, match='two classes'):
        probe_with_network(z, np.zeros(24))

@pytest.mark.slow
def test_seresnet_152_overfits_eight_latents():
    torch.manual_seed(0)
    net, x, y = SEResNet(8, small=True), torch.randn(8, 8, 9, 12, 9), torch.tensor([0.0, 1] * 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for _ in range(30):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((net(x)[:, 0] > 0) == (y > 0)).all()
    assert loss < 0.1

# ---------------------------------------------------------------- the modality in z_anat

class Scans:
    """Two modalities of 20 people as data.Sessions gives them. The last has no T2w. T2w is brighter."""
    modalities = ('T1w', 'T2w')
    n = 20
    rows = [{'subject': f'sub-{i:02d}'} for i in range(20)]

    def present(self, i):
        return (0, 1) if i < 19 else (0,)

    def volume(self, i, m):
        return np.random.default_rng([i, m]).random((2, 2, 2), np.float32) + m

class Codes:
    """A model whose z_anat is the volume, with or without its level, which is what tells the modality."""
    def __init__(self, level):
        self.level = level

    def encoding(self, x):
        return {'mean': x if self.level else x - x.mean()}

def test_a_modality_that_z_anat_tells_is_found_and_one_that_it_hides_is_not():
    told = modality_probes(Codes(level=True), Scans(), -1, 'cpu')['T1w or T2w']
    hidden = modality_probes(Codes(level=False), Scans(), -1, 'cpu')['T1w or T2w']
    assert (told['n'], told['n_groups']) == (39, 20)
    assert told['accuracy'] == 1.0
    assert hidden['accuracy'] < 0.75

class Copies:
    """A model that gives a volume back, and what it was shown."""
    config = SimpleNamespace(num_codes=2, latent_dim=1)

    def __init__(self):
        self.shown = []

    def analyse(self, x, m):
        self.shown.append(x.numpy())
        return {'x_hat': 0.9 * x, 'mean': x, 'logvar': torch.zeros_like(x)}

def test_validation_is_on_sessions_of_the_whole_list():
    model, scans = Copies(), Scans()
    record, _ = validate(model, scans, 4, 'cpu', 'float32')
    wanted = chosen(scans.rows, 4)
    assert record['val/n_sessions'] == 4 and wanted != [0, 1, 2, 3]
    first_scans = [scans.volume(i, 0) for i in wanted]
    np.testing.assert_array_equal(np.stack(model.shown[::2])[:, 0, 0], first_scans)

def test_the_embedding_is_of_the_sessions_drawn(monkeypatch):
    monkeypatch.setattr(probe, 'tsne', lambda points, seed: points)
    latents = []
    for i in range(60):
        row = {'folder': 'a' if i < 30 else 'b', 'subject': f'sub-{i}'}
        latents.append(SimpleNamespace(row=row, mean=torch.full((1, 1, 1, 1), i), brain=torch.ones(1) > 0))
    drawn = {key_of(latents[i].row) for i in (5, 50)}
    run = SimpleNamespace(name='m', latents=latents, drawn_keys=drawn)
    points, _ = embed_latents([run], 10, 0)['m']
    assert sorted(points.ravel()) == [5, 50]

def test_modalities_of_one_subject_are_not_probed_and_the_reason_is_said():
    (name, result), = modality_probes(Codes(level=True), Scans(), 1, 'cpu').items()
    assert result.keys() == {'reason'}
    assert probe_line(name, result) == 'T1w or T2w: no probe of z_anat: 1 subjects: at least 2 are needed'
