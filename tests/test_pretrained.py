"""LPIPS: torchvision's layout read by name, the formula, and refusals."""
import pytest
import torch
import torch.nn.functional as F

from pretrained import LPIPS, TRUNKS, TRUNK_FILES

# sizes of torchvision's `features` (squeezenet1_1, alexnet, vgg16): number of tensors and of parameters
SIZES = {'squeeze': (50, 722_496), 'alex': (10, 2_469_696), 'vgg': (26, 14_714_688)}

def files(tmp_path, net):
    """A trunk and channel weights in the real layout, random; the classifier that a torchvision file also holds is left to be ignored."""
    model = LPIPS(net)
    g = torch.Generator().manual_seed(3)
    trunk = {f'features.{k}': torch.randn(v.shape, generator=g) * (1.4 / v[0].numel() ** 0.5) for k, v in model.features.state_dict().items()}
    lins = {f'lin{i}.model.1.weight': torch.rand(1, c, 1, 1, generator=g) for i, c in enumerate(TRUNKS[net][2])}
    torch.save(trunk | {'classifier.1.weight': torch.zeros(2, 2)}, tmp_path / 'trunk.pth')
    torch.save(lins, tmp_path / 'lin.pth')
    return trunk, lins, tmp_path / 'trunk.pth', tmp_path / 'lin.pth'

@pytest.mark.parametrize('net', TRUNKS)
def test_trunks_have_torchvisions_sizes(net):
    features = LPIPS(net).features.state_dict()
    assert (len(features), sum(v.numel() for v in features.values())) == SIZES[net]
    if net == 'squeeze': assert features['12.expand3x3.weight'].shape == (256, 64, 3, 3) and features['0.weight'].shape == (64, 3, 3, 3)

def alex_by_hand(s, x):
    """torchvision's AlexNet features: the five outputs after a ReLU."""
    out, x = [], (x - torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)) / torch.tensor([.458, .448, .450]).view(3, 1, 1)
    for i, kw in ((0, dict(stride=4, padding=2)), (3, dict(padding=2)), (6, dict(padding=1)), (8, dict(padding=1)), (10, dict(padding=1))):
        if i in (3, 6): x = F.max_pool2d(x, 3, 2)
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
    torch.testing.assert_close(d, model(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))  # grey is three equal channels
    d.sum().backward()
    assert b.grad.abs().sum() > 0

def test_random_trunk_is_the_same_everywhere_and_says_so():
    state = torch.random.get_rng_state()
    a, b = LPIPS(), LPIPS()
    assert a.random and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

def test_missing_or_wrong_files_get_one_line(tmp_path):
    trunk, _, trunk_path, lin_path = files(tmp_path, 'squeeze')
    with pytest.raises(SystemExit, match=TRUNK_FILES['squeeze']): LPIPS('squeeze', '/nowhere.pth', lin_path)
    with pytest.raises(SystemExit, match='no path given.*LPIPS v0.1'): LPIPS('squeeze', trunk_path, '')
    (tmp_path / 'bad.pth').write_text('no checkpoint')
    with pytest.raises(SystemExit, match='not a readable checkpoint'): LPIPS('squeeze', tmp_path / 'bad.pth', lin_path)
    with pytest.raises(ValueError, match='missing'): LPIPS('alex', trunk_path, lin_path)
    with pytest.raises(ValueError, match='squeeze, alex, vgg'): LPIPS('resnet')
