"""Phantoms: reproducible, in anatomical order, with a sex that can be found; and images of label maps."""
import numpy as np
import pytest

from synth import GROUPS, LABELS, TISSUE, images_from_labels, phantom, phantom_labels

SHAPE = (48, 64, 48)

@pytest.fixture(scope='module')
def subject():
    return phantom(1, SHAPE, 0, ('T1w', 'T2w', 'FLAIR', 'PD'))

@pytest.fixture(scope='module')
def fine_subject():
    return phantom(1, (96, 128, 96), 0, ('T1w', 'T2w', 'FLAIR', 'PD'))

def labels_of(index, seed=0, shape=SHAPE):
    return phantom(index, shape, seed, ())['labels']

# ---------------------------------------------------------------- draws

def test_a_phantom_does_not_depend_on_the_modalities_asked_for(subject):
    again = phantom(1, SHAPE, 0, ('T1w',))
    np.testing.assert_array_equal(subject['labels'], again['labels'])
    np.testing.assert_array_equal(subject['images']['T1w'], again['images']['T1w'])

def test_another_index_is_another_subject(subject):
    assert (labels_of(2) != subject['labels']).mean() > 0.05

def test_another_seed_is_another_cohort(subject):
    assert (labels_of(1, seed=1) != subject['labels']).mean() > 0.05

# ---------------------------------------------------------------- anatomy

def test_every_label_is_there(subject):
    assert set(np.unique(subject['labels'])) == set(LABELS)

def test_a_coarse_grid_may_lose_only_the_smallest_structures():
    lost = set(LABELS) - set(np.unique(labels_of(3, shape=(32, 48, 32))))
    assert lost <= {13, 52, 15}

def test_every_label_has_a_tissue():
    assert {0}.union(*GROUPS.values()) >= set(LABELS)

@pytest.fixture(scope='module')
def centres(subject):
    """{name of a structure: its centre in voxels}."""
    return {name: np.argwhere(subject['labels'] == label).mean(0) for label, name in LABELS.items()}

@pytest.mark.parametrize('name', [name[5:] for name in LABELS.values() if name.startswith('left ')])
def test_left_lies_left(name, centres):
    assert centres[f'left {name}'][0] < centres[f'right {name}'][0]

def test_front_lies_in_front(centres):
    names = ('left caudate', 'left thalamus', 'left cerebellum cortex')
    caudate, thalamus, cerebellum = (centres[name][1] for name in names)
    assert caudate > thalamus > cerebellum

def test_top_lies_on_top(centres):
    names = ('left cerebral cortex', 'left thalamus', 'left cerebellum cortex')
    cortex, thalamus, cerebellum = (centres[name][2] for name in names)
    assert cortex > thalamus > cerebellum
    assert centres['brain stem'][2] < thalamus
    assert cerebellum < centres['4th ventricle'][2] + 8

def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())

def test_brains_share_their_place_but_not_their_cortex():
    a, b = labels_of(1), labels_of(2)
    assert dice(a > 0, b > 0) > 0.7
    assert dice(np.isin(a, (3, 42)), np.isin(b, (3, 42))) < 0.75

def surface(mask):
    """Faces between voxels in and out of a mask."""
    return sum((np.diff(mask.astype(np.int8), axis=axis) != 0).sum() for axis in range(3))

def test_cortex_is_folded(fine_subject):
    """The boundary of grey and white matter is far larger than the brain's outline."""
    labels = fine_subject['labels']
    assert surface(np.isin(labels, (2, 41))) > 1.5 * surface(labels > 0)

def test_sex_can_be_found_from_volumes_of_structures():
    """Fisher's discriminant on standardised log volumes, trained on half of 64 subjects."""
    people = [phantom(i, (60, 76, 60), 0, ()) for i in range(1, 65)]
    groups = [(2, 41), (3, 42), (4, 43), (10, 49), (11, 50), (12, 51), (17, 53), (8, 47), (16,)]
    volumes = []
    for person in people:
        volumes.append([np.isin(person['labels'], group).sum() + 1 for group in groups])
    x = np.log(volumes)
    female = np.array([person['sex'] == 'F' for person in people])
    assert 0.35 < female.mean() < 0.65
    train = np.arange(64) < 32
    x = (x - x[train].mean(0)) / x[train].std(0)
    women, men = x[train & female], x[train & ~female]
    within = np.cov(np.concatenate([men - men.mean(0), women - women.mean(0)]).T)
    direction = np.linalg.solve(within + 0.1 * np.eye(len(groups)), women.mean(0) - men.mean(0))
    guess = x @ direction > (women.mean(0) + men.mean(0)) @ direction / 2
    assert 0.7 < (guess == female)[~train].mean() < 1.0

def test_an_unknown_sex_is_refused():
    with pytest.raises(ValueError, match="'X'"):
        phantom_labels((16, 16, 16), np.random.default_rng(0), 'X')

# ---------------------------------------------------------------- images

CONTRASTS = [('T1w', ('white', 'thalamus', 'cortex', 'csf')), ('T2w', ('csf', 'cortex', 'white')),
             ('FLAIR', ('cortex', 'white', 'csf')), ('PD', ('csf', 'cortex', 'white'))]

@pytest.mark.parametrize('modality, order', CONTRASTS)
def test_tissues_have_the_order_of_their_contrast(modality, order, fine_subject):
    image, labels = fine_subject['images'][modality], fine_subject['labels']
    medians = [np.median(image[np.isin(labels, GROUPS[group])]) for group in order]
    assert all(a > b + 0.03 for a, b in zip(medians, medians[1:]))

@pytest.mark.parametrize('modality', ['T1w', 'T2w', 'FLAIR', 'PD'])
def test_background_is_exactly_zero_and_the_brain_above(modality, subject):
    image = subject['images'][modality]
    assert (image[subject['labels'] == 0] == 0).all()
    assert (image[subject['labels'] > 0] > 0).all()
    assert image.dtype == np.float32 and np.isfinite(image).all()

def cube_of(label):
    labels = np.zeros((8, 9, 10), int)
    labels[2:6, 2:6, 2:6] = label
    return labels

def test_the_image_of_any_label_map_has_its_tissues_mean():
    image = images_from_labels(cube_of(41), ['T1w'], np.random.default_rng(0), noise=0, bias=0)['T1w']
    white = dict(zip(GROUPS, TISSUE['T1w']))['white']
    assert image[3:5, 3:5, 3:5].mean() == pytest.approx(white, abs=0.1)

def test_an_unknown_modality_is_refused():
    with pytest.raises(ValueError, match="'CT'.*T1w"):
        images_from_labels(cube_of(41), ['CT'], np.random.default_rng(0))

def test_an_unknown_label_is_refused():
    with pytest.raises(ValueError, match='999'):
        images_from_labels(cube_of(999), ['T1w'], np.random.default_rng(0))
