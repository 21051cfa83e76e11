"""Third-party networks against their layouts written out by hand, on random weights under the real names; refusals."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrained import (
    LPIPS,
    SYNTHSEG_LABELS,
    TRUNKS,
    TRUNK_FILES,
    load_radimagenet,
    load_synthseg,
    radimagenet_input,
)

# sizes of torchvision's `features` (squeezenet1_1, alexnet, vgg16): number of tensors and of parameters
SIZES = {'squeeze': (50, 722_496), 'alex': (10, 2_469_696), 'vgg': (26, 14_714_688)}

def files(tmp_path, net):
    """A trunk and channel weights in the real layout, random; the classifier that a torchvision file also holds is left to be ignored."""
    model = LPIPS(net)
    g = torch.Generator().manual_seed(3)
    trunk = {
        f'features.{k}': torch.randn(v.shape, generator=g) * (1.4 / v[0].numel() ** 0.5)
        for k, v in model.features.state_dict().items()
    }
    lins = {
        f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1, generator=g) for i, c in enumerate(TRUNKS[net][2])
    }
    torch.save(trunk | {'classifier.1.weight': torch.zeros(2, 2)}, tmp_path / 'trunk.pth')
    torch.save(lins, tmp_path / 'lin.pth')
    return trunk, lins, tmp_path / 'trunk.pth', tmp_path / 'lin.pth'

@pytest.mark.parametrize('net', TRUNKS)
def test_trunks_have_torchvisions_sizes(net):
    features = LPIPS(net).features.state_dict()
    assert (len(features), sum(v.numel() for v in features.values())) == SIZES[net]
    if net == 'squeeze':
        assert features['12.expand3x3.weight'].shape == (256, 64, 3, 3) and features['0.weight'].shape == (
            64,
            3,
            3,
            3,
        )

def alex_by_hand(s, x):
    """torchvision's AlexNet features: the five outputs after a ReLU."""
    out, x = [], (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
        [0.458, 0.448, 0.450]
    ).view(3, 1, 1)
    for i, kw in (
        (0, dict(stride=4, padding=2)),
        (3, dict(padding=2)),
        (6, dict(padding=1)),
        (8, dict(padding=1)),
        (10, dict(padding=1)),
    ):
        if i in (3, 6):
            x = F.max_pool2d(x, 3, 2)
        x = F.relu(F.conv2d(x, s[f'features.{i}.weight'], s[f'features.{i}.bias'], **kw))
        out.append(x)
    return out

def test_lpips_is_its_formula_on_the_files_weights(tmp_path):
    trunk, lins, trunk_path, lin_path = files(tmp_path, 'alex')
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    want = 0
    for i, (fa, fb) in enumerate(zip(alex_by_hand(trunk, a), alex_by_hand(trunk, b))):
        unit = lambda f: f / (f.norm(dim=1, keepdim=True) + 1e-10)
        want = want + F.conv2d((unit(fa) - unit(fb)) ** 2, lins[f'lin{i}.model.1.weight']).mean((1, 2, 3))
    model = LPIPS('alex', trunk_path, lin_path)
    torch.testing.assert_close(model(a, b), want, rtol=1e-4, atol=1e-6)
    assert not model.random and not any(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize('net', TRUNKS)
def test_lpips_is_a_distance_and_passes_gradients(net, tmp_path):
    *_, trunk_path, lin_path = files(tmp_path, net)
    model = LPIPS(net, trunk_path, lin_path)
    a, b = torch.rand(2, 1, 48, 48), torch.rand(2, 1, 48, 48, requires_grad=True)
    d = model(a, b)
    assert (d > 0).all() and model(a, a).abs().max() == 0
    torch.testing.assert_close(d, model(b, a))
    # grey is three equal channels
    torch.testing.assert_close(d, model(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))
    d.sum().backward()
    assert b.grad.abs().sum() > 0

def test_random_trunk_is_the_same_everywhere_and_says_so():
    state = torch.random.get_rng_state()
    a, b = LPIPS(), LPIPS()
    assert a.random and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def test_missing_or_wrong_files_get_one_line(tmp_path):
    trunk, _, trunk_path, lin_path = files(tmp_path, 'squeeze')
    with pytest.raises(SystemExit, match=TRUNK_FILES['squeeze']):
        LPIPS('squeeze', '/nowhere.pth', lin_path)
    with pytest.raises(SystemExit, match='no path given.*LPIPS v0.1'):
        LPIPS('squeeze', trunk_path, '')
    (tmp_path / 'bad.pth').write_text('no checkpoint')
    with pytest.raises(SystemExit, match='not a readable checkpoint'):
        LPIPS('squeeze', tmp_path / 'bad.pth', lin_path)
    with pytest.raises(ValueError, match='missing'):
        LPIPS('alex', trunk_path, lin_path)
    with pytest.raises(ValueError, match='squeeze, alex, vgg'):
        LPIPS('resnet')

# ---------------------------------------------------------------- RadImageNet and SynthSeg, on random weights in the real layout

def radimagenet_state():
    g, state = torch.Generator().manual_seed(0), {}
    def conv(name, c_in, c_out, k):
        state.update({
            f'{name}.weight': torch.randn(c_out, c_in, k, k, generator=g) / (c_in * k * k) ** 0.5,
            f'{name}.bias': 0.1 * torch.randn(c_out, generator=g),
        })
    def bn(name, c):
        state.update({
            f'{name}.weight': 1 + 0.1 * torch.randn(c, generator=g),
            f'{name}.bias': 0.1 * torch.randn(c, generator=g),
            f'{name}.running_mean': 0.1 * torch.randn(c, generator=g),
            f'{name}.running_var': 0.5 + torch.rand(c, generator=g),
            f'{name}.num_batches_tracked': torch.tensor(0),
        })
    conv('conv1', 3, 64, 7), bn('bn1', 64)
    c_in = 64
    for n, (blocks, c) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for i in range(blocks):
            p = f'layer{n}.{i}'
            for k, (a, b, size) in enumerate(((c_in, c, 1), (c, c, 3), (c, 4 * c, 1)), 1):
                conv(f'{p}.conv{k}', a, b, size), bn(f'{p}.bn{k}', b)
            if i == 0:
                conv(f'{p}.downsample.0', c_in, 4 * c, 1), bn(f'{p}.downsample.1', 4 * c)
            c_in = 4 * c
    return state

def radimagenet_by_hand(s, x, released):
    conv = lambda n, x, **kw: F.conv2d(x, s[f'{n}.weight'], None if released else s[f'{n}.bias'], **kw)
    bn = lambda n, x: F.batch_norm(
        x,
        s[f'{n}.running_mean'],
        s[f'{n}.running_var'],
        s[f'{n}.weight'],
        s[f'{n}.bias'],
        eps=1e-5 if released else 1.001e-5,
    )
    x = F.max_pool2d(F.relu(bn('bn1', conv('conv1', x, stride=2, padding=3))), 3, 2, 1)
    for n, blocks in enumerate((3, 4, 6, 3), 1):
        for i in range(blocks):
            p, stride = f'layer{n}.{i}', 2 if n > 1 and i == 0 else 1
            h = F.relu(bn(f'{p}.bn1', conv(f'{p}.conv1', x, stride=1 if released else stride)))
            h = F.relu(bn(f'{p}.bn2', conv(f'{p}.conv2', h, padding=1, stride=stride if released else 1)))
            h = bn(f'{p}.bn3', conv(f'{p}.conv3', h))
            x = F.relu(
                h + (bn(f'{p}.downsample.1', conv(f'{p}.downsample.0', x, stride=stride)) if i == 0 else x)
            )
    return x.mean((2, 3))

@pytest.mark.parametrize('released', [False, True])
def test_radimagenet_is_keras_network_and_the_released_reading_is_another(released, tmp_path):
    state, x = radimagenet_state(), radimagenet_input(torch.rand(2, 1, 40, 48))
    torch.save(state, tmp_path / 'r.pth')
    features = load_radimagenet(tmp_path / 'r.pth', released)(x)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, radimagenet_by_hand(state, x, released), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(features, radimagenet_by_hand(state, x, not released), rtol=1e-2)

def test_radimagenet_refuses_another_file_by_its_first_unmatched_key(tmp_path):
    state = radimagenet_state()
    del state['layer3.0.downsample.0.bias']
    torch.save(state, tmp_path / 'r.pth')
    with pytest.raises(ValueError, match='missing layer3.0.downsample.0.bias'):
        load_radimagenet(tmp_path / 'r.pth')
    with pytest.raises(SystemExit, match='RadImageNet-ResNet50_notop.pth'):
        load_radimagenet('/nowhere.pth')

def synthseg_file(path, labels=33):
    h5py = pytest.importorskip('h5py')
    rng, names, widths = np.random.default_rng(0), {}, (24, 48, 96, 192, 384)
    def conv(name, a, b, k=3):
        names.update({
            f'{name}/kernel:0': rng.normal(size=(k, k, k, a, b)) / (a * k**3) ** 0.5,
            f'{name}/bias:0': 0.1 * rng.normal(size=b),
        })
    def bn(name, c):
        names.update({
            f'{name}/gamma:0': 1 + 0.1 * rng.normal(size=c),
            f'{name}/beta:0': 0.1 * rng.normal(size=c),
            f'{name}/moving_mean:0': 0.1 * rng.normal(size=c),
            f'{name}/moving_variance:0': 0.5 + rng.random(c),
        })
    for i, (a, b) in enumerate(zip((1, *widths), widths)):
        conv(f'unet_conv_downarm_{i}_0', a, b), conv(f'unet_conv_downarm_{i}_1', b, b), bn(
            f'unet_bn_down_{i}', b
        )
    for i, (a, b) in enumerate(zip((576, 288, 144, 72), (192, 96, 48, 24))):
        conv(f'unet_conv_uparm_{i + 5}_0', a, b), conv(f'unet_conv_uparm_{i + 5}_1', b, b), bn(
            f'unet_bn_up_{i}', b
        )
    conv('unet_likelihood', 24, labels, 1)
    with h5py.File(path, 'w') as f:
        for name, value in names.items():
            # a group per layer, its weights inside once more
            f[f"{name.split('/')[0]}/{name}"] = value.astype(np.float32)
    return names

def test_synthseg_is_its_published_layout(tmp_path):
    w = {k: torch.from_numpy(v).float() for k, v in synthseg_file(tmp_path / 's.h5').items()}
    model = load_synthseg(tmp_path / 's.h5')
    assert (
        sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers() if b.ndim)
        == 13_242_849
    )
    conv = lambda n, x: F.conv3d(
        x,
        w[f'{n}/kernel:0'].permute(4, 3, 0, 1, 2),
        w[f'{n}/bias:0'],
        padding=w[f'{n}/kernel:0'].shape[0] // 2,
    )
    bn = lambda n, x: F.batch_norm(
        x, w[f'{n}/moving_mean:0'], w[f'{n}/moving_variance:0'], w[f'{n}/gamma:0'], w[f'{n}/beta:0'], eps=1e-3
    )
    x = h = torch.rand(1, 1, 32, 32, 32)
    skips = []
    for i in range(5):
        h = F.elu(conv(f'unet_conv_downarm_{i}_1', F.elu(conv(f'unet_conv_downarm_{i}_0', h))))
        skips.append(h)
        h = bn(f'unet_bn_down_{i}', h)
        if i < 4:
            h = F.max_pool3d(h, 2)
    for i in range(4):
        h = torch.cat(
            [skips[3 - i], h.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)], 1
        )
        h = bn(
            f'unet_bn_up_{i}',
            F.elu(conv(f'unet_conv_uparm_{i + 5}_1', F.elu(conv(f'unet_conv_uparm_{i + 5}_0', h)))),
        )
    want = conv('unet_likelihood', h).softmax(1)
    got = model(x)
    assert got.shape == (1, 33, 32, 32, 32) and len(SYNTHSEG_LABELS) == 33
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)

def test_synthseg_refuses_other_files(tmp_path):
    h5py = pytest.importorskip('h5py')
    (tmp_path / 'no.h5').write_text('no')
    with pytest.raises(SystemExit, match='synthseg_2.0.h5'):
        load_synthseg(tmp_path / 'no.h5')
    with h5py.File(tmp_path / 'other.h5', 'w') as f:
        f['dense/kernel:0'] = np.zeros((2, 2))
    with pytest.raises(ValueError, match='no unet_likelihood'):
        load_synthseg(tmp_path / 'other.h5')
    synthseg_file(tmp_path / 's.h5')
    with h5py.File(tmp_path / 's.h5', 'a') as f:
        del f['unet_bn_up_2']
    with pytest.raises(ValueError, match='missing unet_bn_up_2/gamma:0'):
        load_synthseg(tmp_path / 's.h5')
