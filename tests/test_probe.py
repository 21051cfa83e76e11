"""Probes: planted and shuffled classes, and SEResNet-152 against MONAI's."""
import numpy as np
import pytest
import torch

from judge.probe import SEResNet, auc, linear_probe, network_probe

def people(rng, n=60, sessions=2, features=500, signal=0.0):
    """n subjects with several sessions each; the subject's own pattern is far stronger than the noise between sessions."""
    y = np.repeat(np.arange(n) % 2, sessions)
    own = np.repeat(rng.normal(size=(n, features)), sessions, 0) + 0.1 * rng.normal(
        size=(n * sessions, features)
    )
    own[:, :10] += signal * (y[:, None] - 0.5)
    return own, np.where(y, 'M', 'F'), np.repeat([f's{i}' for i in range(n)], sessions)

def test_the_probe_finds_a_planted_signal_and_nothing_in_shuffled_labels():
    rng = np.random.default_rng(0)
    z, y, groups = people(rng, signal=6.0)
    found = linear_probe(z, y, groups)
    assert min(found['accuracy'], found['balanced_accuracy'], found['auc'], found['subject_accuracy']) > 0.95
    assert (found['n'], found['n_groups']) == (120, 60) and found['ci95'][0] <= found['accuracy'] <= found[
        'ci95'
    ][1]
    # memory of the person would give 1
    chance = [linear_probe(*people(np.random.default_rng(s)))['accuracy'] for s in range(8)]
    assert abs(np.mean(chance) - 0.5) < 0.08

def test_the_probe_does_not_care_about_scale_and_shape():
    z, y, groups = people(np.random.default_rng(0), features=24, signal=2.0)
    plain = linear_probe(z, y, groups)
    again = linear_probe((1e4 * z + 7).reshape(-1, 3, 2, 2, 2), y, groups)
    assert {k: v for k, v in plain.items() if k != 'auc'} == {
        k: v for k, v in again.items() if k != 'auc'
    } and plain['auc'] == pytest.approx(again['auc'], abs=1e-3)

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
    with pytest.raises(ValueError, match='two classes'):
        linear_probe(z, ['F'] * len(y), groups)
    with pytest.raises(ValueError, match='0 in 0 scans'):
        linear_probe([], y[:0], groups[:0])
    with pytest.raises(ValueError, match='at least 5'):
        linear_probe(z[:12], y[:12], groups[:12])

# ---------------------------------------------------------------- SEResNet-152

def test_seresnet_152_has_monais_parameters_and_outputs():
    nets = pytest.importorskip('monai.networks.nets', reason='parity with MONAI')
    with torch.device('meta'):
        ours, theirs = SEResNet(1, 1000), nets.SEResNet152(spatial_dims=3, in_channels=1)
    assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]
    senet = nets.SENet(
        spatial_dims=3,
        in_channels=2,
        block='se_resnet_bottleneck',
        layers=(1, 2, 2, 1),
        groups=1,
        reduction=16,
        dropout_prob=None,
        inplanes=64,
        downsample_kernel_size=1,
        input_3x3=False,
        num_classes=3,
    ).eval()
    ours = SEResNet(2, 3, blocks=(1, 2, 2, 1)).eval()
    for name, p in senet.state_dict().items():
        if name.endswith('running_var'):
            p.uniform_(0.5, 1.5)
        if name.endswith('running_mean'):
            p.uniform_(-0.2, 0.2)
    ours.load_state_dict(dict(zip(ours.state_dict(), senet.state_dict().values())))
    x = torch.randn(2, 2, 37, 48, 33)
    with torch.no_grad():
        want = senet(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)

def test_small_stem_keeps_a_latent_from_shrinking_to_a_point():
    for small, size in ((True, (2, 2, 2)), (False, (1, 1, 1))):
        net = SEResNet(4, blocks=(1, 1, 1, 1), small=small).eval()
        assert net.layers(net.stem(torch.randn(1, 4, 9, 12, 9))).shape[2:] == size
    assert sum(p.numel() for p in SEResNet(1, blocks=(1, 1, 1, 1)).parameters()) == sum(
        p.numel() for p in SEResNet(1, blocks=(1, 1, 1, 1), small=True).parameters()
    )

def test_network_probe_finds_a_planted_shape_and_not_a_shuffled_class():
    rng = np.random.default_rng(0)
    y, z = np.tile([0, 1], 12), rng.normal(size=(24, 2, 4, 4, 4)).astype(np.float32)
    z[:, 1] = 100 + 1000 * z[:, 1]  # standardised away
    z[y == 1, 0, :2] += 2
    probe = lambda y: network_probe(
        lambda i: torch.from_numpy(z[i]), y, np.arange(24), epochs=5, lr=1e-3, folds=2, blocks=(1, 1, 1, 1)
    )
    assert probe(y)['accuracy'] > 0.95
    assert abs(probe(rng.permutation(y))['accuracy'] - 0.5) < 0.35
    with pytest.raises(ValueError, match='two classes'):
        probe(np.zeros(24))

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
    assert ((net(x)[:, 0] > 0) == (y > 0)).all() and loss < 0.1
