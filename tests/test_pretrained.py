"""Third-party networks against their layouts written out by hand, on random weights under the real names."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrained import LPIPS, SYNTHSEG_LABELS, TRUNKS, load_radimagenet, load_synthseg, radimagenet_input

# ---------------------------------------------------------------- LPIPS

# torchvision's `features` (squeezenet1_1, alexnet, vgg16): number of tensors and of parameters
SIZES = {'squeeze': (50, 722_496), 'alex': (10, 2_469_696), 'vgg': (26, 14_714_688)}

def lpips_files(folder, net):
    """Random trunk and channel weights in the real layout: two state dicts, and their files.

    The trunk's file also holds a classifier, as torchvision's does; it is left to be ignored.
    """
    g = torch.Generator().manual_seed(3)
    trunk, lins = {}, {}
    for key, value in LPIPS(net).features.state_dict().items():
        scale = 1.4 / value[0].numel() ** 0.5
        trunk[f'features.{key}'] = torch.randn(value.shape, generator=g) * scale
    for i, channels in enumerate(TRUNKS[net].channels):
        lins[f'lin{i}.model.1.weight'] = torch.rand(1, channels, 1, 1, generator=g)
    torch.save(trunk | {'classifier.1.weight': torch.zeros(2, 2)}, folder / 'trunk.pth')
    torch.save(lins, folder / 'lin.pth')
    return trunk, lins, folder / 'trunk.pth', folder / 'lin.pth'

@pytest.mark.parametrize('net', TRUNKS)
def test_trunks_have_torchvisions_sizes(net):
    features = LPIPS(net).features.state_dict()
    assert (len(features), sum(value.numel() for value in features.values())) == SIZES[net]

def test_squeezenet_has_torchvisions_shapes():
    features = LPIPS('squeeze').features.state_dict()
    assert features['0.weight'].shape == (64, 3, 3, 3)
    assert features['12.expand3x3.weight'].shape == (256, 64, 3, 3)

def alexnet_by_hand(state, x):
    """torchvision's AlexNet features: the five outputs after a ReLU."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    outputs = []
    for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if i in (3, 6):
            x = F.max_pool2d(x, 3, 2)
        x = F.conv2d(x, state[f'features.{i}.weight'], state[f'features.{i}.bias'], stride, padding)
        x = F.relu(x)
        outputs.append(x)
    return outputs

def lpips_by_hand(trunk, lins, a, b):
    total = 0
    for i, (fa, fb) in enumerate(zip(alexnet_by_hand(trunk, a), alexnet_by_hand(trunk, b))):
        fa = fa / (fa.norm(dim=1, keepdim=True) + 1e-10)
        fb = fb / (fb.norm(dim=1, keepdim=True) + 1e-10)
        total = total + F.conv2d((fa - fb) ** 2, lins[f'lin{i}.model.1.weight']).mean((1, 2, 3))
    return total

def test_lpips_is_its_formula_on_the_files_weights(tmp_path):
    trunk, lins, *paths = lpips_files(tmp_path, 'alex')
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    want = lpips_by_hand(trunk, lins, a, b)
    torch.testing.assert_close(LPIPS('alex', *paths)(a, b), want, rtol=1e-4, atol=1e-6)

def test_lpips_of_files_is_not_random_and_frozen(tmp_path):
    _, _, *paths = lpips_files(tmp_path, 'alex')
    model = LPIPS('alex', *paths)
    assert not model.random and not any(p.requires_grad for p in model.parameters())

@pytest.fixture(scope='module', params=TRUNKS)
def lpips(request, tmp_path_factory):
    _, _, *paths = lpips_files(tmp_path_factory.mktemp('lpips'), request.param)
    return LPIPS(request.param, *paths)

def test_lpips_is_a_distance(lpips):
    a, b = torch.rand(2, 1, 48, 48), torch.rand(2, 1, 48, 48)
    distance = lpips(a, b)
    assert (distance > 0).all() and lpips(a, a).abs().max() == 0
    torch.testing.assert_close(distance, lpips(b, a))

def test_grey_is_three_equal_channels(lpips):
    a, b = torch.rand(2, 1, 48, 48), torch.rand(2, 1, 48, 48)
    torch.testing.assert_close(lpips(a, b), lpips(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))

def test_lpips_passes_gradients(lpips):
    a, b = torch.rand(2, 1, 48, 48), torch.rand(2, 1, 48, 48, requires_grad=True)
    lpips(a, b).sum().backward()
    assert b.grad.abs().sum() > 0

def test_a_random_trunk_says_so_and_is_the_same_everywhere():
    a, b = LPIPS(), LPIPS()
    assert a.random
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def test_a_random_trunk_leaves_torchs_generator_alone():
    state = torch.random.get_rng_state()
    LPIPS()
    assert torch.equal(torch.random.get_rng_state(), state)

def test_a_missing_trunk_is_refused_by_the_name_of_its_file(tmp_path):
    *_, lin_path = lpips_files(tmp_path, 'squeeze')
    with pytest.raises(SystemExit, match='squeezenet1_1-b8a52dc0.pth'):
        LPIPS('squeeze', '/nowhere.pth', lin_path)

def test_missing_channel_weights_are_refused_by_their_name(tmp_path):
    _, _, trunk_path, _ = lpips_files(tmp_path, 'squeeze')
    with pytest.raises(SystemExit, match='no path given.*lpips.weights.v0.1'):
        LPIPS('squeeze', trunk_path, '')

def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    *_, lin_path = lpips_files(tmp_path, 'squeeze')
    (tmp_path / 'bad.pth').write_text('no checkpoint')
    with pytest.raises(SystemExit, match='not a readable checkpoint'):
        LPIPS('squeeze', tmp_path / 'bad.pth', lin_path)

def test_weights_of_another_trunk_are_refused(tmp_path):
    _, _, *paths = lpips_files(tmp_path, 'squeeze')
    with pytest.raises(ValueError, match='missing'):
        LPIPS('alex', *paths)

def test_an_unknown_trunk_is_refused():
    with pytest.raises(ValueError, match='squeeze, alex, vgg'):
        LPIPS('resnet')

# ---------------------------------------------------------------- RadImageNet

RESNET50 = ((1, 3, 64), (2, 4, 128), (3, 6, 256), (4, 3, 512))  # layer, blocks, channels

def radimagenet_state():
    g, state = torch.Generator().manual_seed(0), {}

    def conv(name, c_in, c_out, k):
        state[f'{name}.weight'] = torch.randn(c_out, c_in, k, k, generator=g) / (c_in * k * k) ** 0.5
        state[f'{name}.bias'] = 0.1 * torch.randn(c_out, generator=g)

    def norm(name, c):
        state[f'{name}.weight'] = 1 + 0.1 * torch.randn(c, generator=g)
        state[f'{name}.bias'] = 0.1 * torch.randn(c, generator=g)
        state[f'{name}.running_mean'] = 0.1 * torch.randn(c, generator=g)
        state[f'{name}.running_var'] = 0.5 + torch.rand(c, generator=g)
        state[f'{name}.num_batches_tracked'] = torch.tensor(0)

    conv('conv1', 3, 64, 7)
    norm('bn1', 64)
    c_in = 64
    for n, blocks, c in RESNET50:
        for i in range(blocks):
            block = f'layer{n}.{i}'
            for k, (a, b, size) in enumerate(((c_in, c, 1), (c, c, 3), (c, 4 * c, 1)), 1):
                conv(f'{block}.conv{k}', a, b, size)
                norm(f'{block}.bn{k}', b)
            if i == 0:
                conv(f'{block}.downsample.0', c_in, 4 * c, 1)
                norm(f'{block}.downsample.1', 4 * c)
            c_in = 4 * c
    return state

def radimagenet_by_hand(state, x, released):
    """released: strides on the 3x3 convolutions and no biases, as DeCo-VAE's code reads the file."""
    def conv(name, x, stride=1, padding=0):
        bias = None if released else state[f'{name}.bias']
        return F.conv2d(x, state[f'{name}.weight'], bias, stride, padding)

    def norm(name, x):
        statistics = state[f'{name}.running_mean'], state[f'{name}.running_var']
        eps = 1e-5 if released else 1.001e-5
        return F.batch_norm(x, *statistics, state[f'{name}.weight'], state[f'{name}.bias'], eps=eps)

    x = F.max_pool2d(F.relu(norm('bn1', conv('conv1', x, 2, 3))), 3, 2, 1)
    for n, blocks, _ in RESNET50:
        for i in range(blocks):
            block = f'layer{n}.{i}'
            stride = 2 if n > 1 and i == 0 else 1
            first, second = (1, stride) if released else (stride, 1)
            h = F.relu(norm(f'{block}.bn1', conv(f'{block}.conv1', x, first)))
            h = F.relu(norm(f'{block}.bn2', conv(f'{block}.conv2', h, second, 1)))
            h = norm(f'{block}.bn3', conv(f'{block}.conv3', h))
            if i == 0:
                x = norm(f'{block}.downsample.1', conv(f'{block}.downsample.0', x, stride))
            x = F.relu(h + x)
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

def test_a_missing_radimagenet_is_refused_by_the_name_of_its_file():
    with pytest.raises(SystemExit, match='RadImageNet-ResNet50_notop.pth'):
        load_radimagenet('/nowhere.pth')

# ---------------------------------------------------------------- SynthSeg

def synthseg_file(path, labels=33):
    """Write random weights in Keras' layout; returns {name: array}."""
    h5py = pytest.importorskip('h5py')
    rng, weights, widths = np.random.default_rng(0), {}, (24, 48, 96, 192, 384)

    def conv(name, c_in, c_out, k=3):
        weights[f'{name}/kernel:0'] = rng.normal(size=(k, k, k, c_in, c_out)) / (c_in * k**3) ** 0.5
        weights[f'{name}/bias:0'] = 0.1 * rng.normal(size=c_out)

    def norm(name, c):
        weights[f'{name}/gamma:0'] = 1 + 0.1 * rng.normal(size=c)
        weights[f'{name}/beta:0'] = 0.1 * rng.normal(size=c)
        weights[f'{name}/moving_mean:0'] = 0.1 * rng.normal(size=c)
        weights[f'{name}/moving_variance:0'] = 0.5 + rng.random(c)

    for i, (a, b) in enumerate(zip((1, *widths), widths)):
        conv(f'unet_conv_downarm_{i}_0', a, b)
        conv(f'unet_conv_downarm_{i}_1', b, b)
        norm(f'unet_bn_down_{i}', b)
    for i, (a, b) in enumerate(zip((576, 288, 144, 72), (192, 96, 48, 24))):
        conv(f'unet_conv_uparm_{i + 5}_0', a, b)
        conv(f'unet_conv_uparm_{i + 5}_1', b, b)
        norm(f'unet_bn_up_{i}', b)
    conv('unet_likelihood', 24, labels, 1)
    with h5py.File(path, 'w') as f:
        for name, value in weights.items():
            layer, _ = name.split('/')  # a group per layer, its weights inside once more
            f[f'{layer}/{name}'] = value.astype(np.float32)
    return weights

def synthseg_by_hand(weights, x):
    def conv(name, x):
        kernel = weights[f'{name}/kernel:0']
        return F.conv3d(x, kernel.permute(4, 3, 0, 1, 2), weights[f'{name}/bias:0'],
                        padding=kernel.shape[0] // 2)

    def two_convs(name, x):
        return F.elu(conv(f'{name}_1', F.elu(conv(f'{name}_0', x))))

    def norm(name, x):
        statistics = weights[f'{name}/moving_mean:0'], weights[f'{name}/moving_variance:0']
        return F.batch_norm(x, *statistics, weights[f'{name}/gamma:0'], weights[f'{name}/beta:0'], eps=1e-3)

    skips = []
    for i in range(5):
        x = two_convs(f'unet_conv_downarm_{i}', x)
        skips.append(x)
        x = norm(f'unet_bn_down_{i}', x)
        if i < 4:
            x = F.max_pool3d(x, 2)
    for i in range(4):
        for axis in (2, 3, 4):
            x = x.repeat_interleave(2, axis)
        x = two_convs(f'unet_conv_uparm_{i + 5}', torch.cat([skips[3 - i], x], 1))
        x = norm(f'unet_bn_up_{i}', x)
    return conv('unet_likelihood', x).softmax(1)

def test_synthseg_is_its_published_layout(tmp_path):
    weights = synthseg_file(tmp_path / 's.h5')
    weights = {name: torch.from_numpy(value).float() for name, value in weights.items()}
    x = torch.rand(1, 1, 32, 32, 32)
    posteriors = load_synthseg(tmp_path / 's.h5')(x)
    assert posteriors.shape == (1, 33, 32, 32, 32)
    torch.testing.assert_close(posteriors, synthseg_by_hand(weights, x), rtol=1e-3, atol=1e-5)

def test_synthseg_has_its_published_size(tmp_path):
    synthseg_file(tmp_path / 's.h5')
    model = load_synthseg(tmp_path / 's.h5')
    numbers = [*model.parameters(), *[b for b in model.buffers() if b.ndim]]
    assert sum(value.numel() for value in numbers) == 13_242_849
    assert len(SYNTHSEG_LABELS) == 33

def test_synthseg_refuses_a_file_that_is_no_h5(tmp_path):
    pytest.importorskip('h5py')
    (tmp_path / 'no.h5').write_text('no')
    with pytest.raises(SystemExit, match='synthseg_2.0.h5'):
        load_synthseg(tmp_path / 'no.h5')

def test_synthseg_refuses_weights_of_another_network(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path / 'other.h5', 'w') as f:
        f['dense/kernel:0'] = np.zeros((2, 2))
    with pytest.raises(ValueError, match='no unet_likelihood'):
        load_synthseg(tmp_path / 'other.h5')

def test_synthseg_refuses_a_file_without_one_layer(tmp_path):
    h5py = pytest.importorskip('h5py')
    synthseg_file(tmp_path / 's.h5')
    with h5py.File(tmp_path / 's.h5', 'a') as f:
        del f['unet_bn_up_2']
    with pytest.raises(ValueError, match='missing unet_bn_up_2/gamma:0'):
        load_synthseg(tmp_path / 's.h5')
