"""Phantoms: reproducible, independent of what is asked for, anatomically in order, and with a sex that can be found."""
import numpy as np
import pytest

from synth import GROUPS, LABELS, TISSUE, images_from_labels, phantom, phantom_labels

SHAPE = (48, 64, 48)

@pytest.fixture(scope='module')
def subject():
    return phantom(1, SHAPE, 0, ('T1w', 'T2w', 'FLAIR', 'PD'))

def test_a_phantom_is_a_function_of_index_shape_and_seed(subject):
    again, other = phantom(1, SHAPE, 0, ('T1w',)), phantom(2, SHAPE, 0, ('T1w',))
    np.testing.assert_array_equal(subject['labels'], again['labels'])
    # whichever others are asked for
    np.testing.assert_array_equal(subject['images']['T1w'], again['images']['T1w'])
    assert (subject['labels'] != other['labels']).mean() > 0.05
    assert (phantom(1, SHAPE, 1, ())['labels'] != subject['labels']).mean() > 0.05

def test_every_label_is_there_also_on_a_coarse_grid(subject):
    assert set(np.unique(subject['labels'])) == set(LABELS)
    assert set(LABELS) - set(np.unique(phantom(3, (32, 48, 32), 0, ())['labels'])) <= {13, 52, 15}
    assert {label for group in GROUPS.values() for label in group} | {0} >= set(LABELS)

def test_left_lies_left_front_in_front_and_top_on_top(subject):
    centre = {name: np.argwhere(subject['labels'] == label).mean(0) for label, name in LABELS.items()}
    for name, place in centre.items():
        if name.startswith('left '):
            assert place[0] < centre['right ' + name[5:]][0]
    assert centre['left caudate'][1] > centre['left thalamus'][1] > centre['left cerebellum cortex'][1]
    assert (
        centre['left cerebral cortex'][2] > centre['left thalamus'][2] > centre['left cerebellum cortex'][2]
    )
    assert (
        centre['left cerebellum cortex'][2] < centre['4th ventricle'][2] + 8
        and centre['brain stem'][2] < centre['left thalamus'][2]
    )

@pytest.mark.parametrize('modality, order', [('T1w', ('white', 'thalamus', 'cortex', 'csf')), ('T2w', ('csf', 'cortex', 'white')),
                                             ('FLAIR', ('cortex', 'white', 'csf')), ('PD', ('csf', 'cortex', 'white'))])
def test_contrast_order(subject, modality, order):
    fine = phantom(1, (96, 128, 96), 0, (modality,))
    median = [np.median(fine['images'][modality][np.isin(fine['labels'], GROUPS[group])]) for group in order]
    assert all(a > b + 0.03 for a, b in zip(median, median[1:]))

def test_background_is_exactly_zero_and_the_brain_above(subject):
    for image in subject['images'].values():
        assert (image[subject['labels'] == 0] == 0).all() and (image[subject['labels'] > 0] > 0).all()
        assert image.dtype == np.float32 and np.isfinite(image).all()

def test_brains_share_their_place_but_not_their_cortex():
    a, b = (phantom(i, SHAPE, 0, ())['labels'] for i in (1, 2))
    def dice(p, q):
        return 2 * (p & q).sum() / (p.sum() + q.sum())
    assert dice(a > 0, b > 0) > 0.7
    assert dice(np.isin(a, (3, 42)), np.isin(b, (3, 42))) < 0.75

def test_cortex_is_folded():
    """Far more grey surface than the smooth hull has: the grey-white boundary against the brain's outline."""
    labels = phantom(1, (96, 128, 96), 0, ())['labels']
    def surface(mask):
        return sum((np.diff(mask.astype(np.int8), axis=a) != 0).sum() for a in range(3))
    assert surface(np.isin(labels, (2, 41))) > 1.5 * surface(labels > 0)

def test_sex_can_be_found_from_volumes_of_structures():
    """Fisher's discriminant on standardised log volumes, trained on half of 64 subjects, tested on the others."""
    people = [phantom(i, (60, 76, 60), 0, ()) for i in range(1, 65)]
    groups = [(2, 41), (3, 42), (4, 43), (10, 49), (11, 50), (12, 51), (17, 53), (8, 47), (16,)]
    x = np.log([[np.isin(p['labels'], g).sum() + 1 for g in groups] for p in people])
    y = np.array([p['sex'] == 'F' for p in people])
    assert 0.35 < y.mean() < 0.65
    train, test = np.arange(64) < 32, np.arange(64) >= 32
    x = (x - x[train].mean(0)) / x[train].std(0)
    within = np.cov(np.concatenate([x[train & (y == c)] - x[train & (y == c)].mean(0) for c in (0, 1)]).T)
    w = np.linalg.solve(within + 0.1 * np.eye(len(groups)), x[train & y].mean(0) - x[train & ~y].mean(0))
    guess = x @ w > (x[train & y].mean(0) + x[train & ~y].mean(0)) @ w / 2
    assert 0.7 < (guess == y)[test].mean() < 1.0

def test_images_of_any_label_map_and_refusals():
    labels = np.zeros((8, 9, 10), int)
    labels[2:6, 2:6, 2:6] = 41
    image = images_from_labels(labels, ['T1w'], np.random.default_rng(0), noise=0, bias=0)['T1w']
    assert image[3:5, 3:5, 3:5].mean() == pytest.approx(TISSUE['T1w']['white'], abs=0.1)
    with pytest.raises(ValueError, match="'CT'.*T1w"):
        images_from_labels(labels, ['CT'], np.random.default_rng(0))
    labels[0] = 999
    with pytest.raises(ValueError, match='999'):
        images_from_labels(labels, ['T1w'], np.random.default_rng(0))
    with pytest.raises(ValueError, match="'X'"):
        phantom_labels((16, 16, 16), np.random.default_rng(0), 'X')
