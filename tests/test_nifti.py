"""Scans into the box and back: affines, padding, intensities, and every file that must be refused."""
import gzip

import nibabel as nib
import numpy as np
import pytest

from scans import nifti

def head(shape=(40, 44, 36), seed=0):
    """A smooth bright ellipsoid on a background of exactly 0, float32, RAS+."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij'))
    volume = 100 + 40 * np.sin(3 * grid[0] + 2 * grid[1]) + 30 * grid[2] + rng.normal(size=shape)
    return np.where((grid ** 2).sum(0) < 0.7, volume, 0).astype(np.float32)

def store(path, volume, code='RAS', spacing=(1, 1, 1), turn=0.0):
    """A RAS+ volume as a file in another orientation; turn: an oblique affine, radians about the vertical."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-12, 7, 30)
    c, s = np.cos(turn), np.sin(turn)
    affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    to_code = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(code)
    )
    nib.save(nib.Nifti1Image(volume, affine).as_reoriented(to_code), path)
    return path

@pytest.mark.parametrize('code', ['RAS', 'LAS', 'LPS', 'PIR'])
@pytest.mark.parametrize('turn', [0.0, 0.2])
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_read_conform_restore_write_overlays_the_input_exactly(tmp_path, code, turn, suffix):
    original = head()
    path = store(str(tmp_path / f'a{suffix}'), original, code, turn=turn)
    volume, affine, native = nifti.read(path)
    assert native.orientation == code
    np.testing.assert_array_equal(volume, original)
    boxes, placement = nifti.conform([volume], [affine], (48, 64, 48))
    assert boxes[0].min() == 0 and boxes[0].max() == 1 and placement.lost == 0
    out = str(tmp_path / f'b{suffix}')
    nifti.write(
        out,
        nifti.restore(boxes[0], placement, affine, volume.shape, placement.low[0], placement.high[0]),
        native,
    )
    a, b = nib.load(path), nib.load(out)
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    clipped = np.where(original != 0, np.clip(original, placement.low[0], placement.high[0]), 0)
    again = nifti.read(out)[0]
    np.testing.assert_allclose(again, clipped, atol=0.05)  # in the brain's darkest voxels, the floor of 1e-4

@pytest.mark.parametrize('spacing', [(2, 1, 1), (0.5, 0.5, 3), (0.7, 0.7, 0.7)])
def test_a_point_lands_where_the_affine_says(tmp_path, spacing):
    """The centre of mass of a blob, in millimetres, is the same in the file and on the isotropic grid."""
    grid = np.stack(
        np.meshgrid(*[(np.arange(n) - n / 2 - 1.5) * s for n, s in zip((60, 60, 60), spacing)], indexing='ij')
    )
    volume = np.exp(-(grid ** 2).sum(0) / (2 * 5 ** 2)).astype(np.float32)
    volume, affine, _ = nifti.read(store(str(tmp_path / 'a.nii'), volume, 'LPS', spacing))
    new_affine, shape = nifti.grid(affine, volume.shape, 1.0)
    np.testing.assert_allclose(nib.affines.voxel_sizes(new_affine), 1, atol=1e-6)
    moved = nifti.resample(volume, affine, new_affine, shape)
    def centre(v, a):
        return a[:3] @ [*((np.indices(v.shape).reshape(3, -1) * v.ravel()).sum(1) / v.sum()), 1]
    np.testing.assert_allclose(centre(volume, affine), centre(moved, new_affine), atol=0.05)

def test_a_second_scan_lands_on_the_grid_of_the_first(tmp_path):
    """The same head stored finer, shifted and turned comes to lie on the first scan's voxels."""
    fine = head((80, 88, 72))
    affine = np.diag([1.0, 1, 1, 1])
    first = fine[::2, ::2, ::2]
    first_affine = affine @ np.diag([2.0, 2, 2, 1])
    boxes, placement = nifti.conform([first, fine], [first_affine, affine], (48, 48, 48), spacing_mm=2.0)
    def agreement(shift):
        moved = np.roll(boxes[1], shift, (0, 1, 2))
        inside = (boxes[0] > 0) & (moved > 0)
        return np.corrcoef(boxes[0][inside], moved[inside])[0, 1]
    assert agreement((0, 0, 0)) > 0.9995 > max(agreement(s) for s in ((1, 0, 0), (0, -1, 0), (0, 0, 1)))
    assert (boxes[0] > 0).sum() == pytest.approx((boxes[1] > 0).sum(), rel=0.05)

def test_padding_and_cropping_are_undone():
    volume = np.random.default_rng(0).random((7, 9, 5)).astype(np.float32)
    box = nifti.crop_pad(volume, [-2, 3, -1], (12, 4, 9))
    back = nifti.crop_pad(box, [2, -3, 1], volume.shape)
    expected = np.zeros_like(volume)
    expected[:, 3:7] = volume[:, 3:7]
    np.testing.assert_array_equal(back, expected)
    assert nifti.crop_pad(volume, [20, 0, 0], (4, 4, 4)).sum() == 0

def test_a_brain_too_high_loses_its_inferior_end_and_reports_it():
    mask = np.zeros((20, 20, 30), bool)
    mask[5:15, 2:18, 4:28] = True
    start, lost = nifti.box_start(mask, (16, 12, 16))
    assert start == [2, 4, 12]  # centred | the middle of 16 kept | the top at 28 kept
    assert lost == pytest.approx(1 - (12 * 16) / (16 * 24))

def test_intensities_follow_the_percentiles_inside_the_brain_and_keep_its_mask():
    volume = head() - 20
    mask = head() != 0
    scaled, low, high = nifti.scale_intensity(volume, mask)
    assert (low, high) == tuple(np.percentile(volume[mask], [0.5, 99.5]))
    np.testing.assert_allclose(scaled[mask], np.clip((volume[mask] - low) / (high - low), 1e-4, 1), atol=1e-6)
    assert (scaled[~mask] == 0).all() and ((scaled > 0) == mask).all()
    with pytest.raises(ValueError, match='nothing to scale'):
        nifti.scale_intensity(np.ones((4, 4, 4)), np.ones((4, 4, 4), bool))

def test_brain_mask_keeps_negative_voxels_and_finds_a_head_in_noisy_air():
    volume = head()
    volume[20, 20, 20] = -3
    mask, estimated = nifti.brain_mask(volume)
    assert mask[20, 20, 20] and not estimated
    noisy = head() + np.abs(np.random.default_rng(0).normal(size=volume.shape)).astype(np.float32)
    mask, estimated = nifti.brain_mask(noisy)
    overlap = 2 * (mask & (head() != 0)).sum() / (mask.sum() + (head() != 0).sum())
    assert estimated and overlap > 0.95

# ---------------------------------------------------------------- refusals

def save(path, data, dtype=None):
    nib.save(nib.Nifti1Image(np.asarray(data, dtype), np.eye(4)), path)

def truncated(path):
    save(path, head())
    data = open(path, 'rb').read()
    open(path, 'wb').write(data[:len(data) // 2])

def absurd_header(path):
    """A header that claims 30000^3 voxels, in a tiny file."""
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4))
    raw = bytearray(image.to_bytes())
    raw[42:48] = np.array([30000] * 3, np.int16).tobytes()
    (gzip.open if path.endswith('.gz') else open)(path, 'wb').write(bytes(raw))

def singular(path):
    """sform_code 1 with two equal rows, written into the header's bytes."""
    raw = bytearray(nib.Nifti1Image(head(), np.eye(4)).to_bytes())
    raw[252:256] = np.array([0, 1], np.int16).tobytes()
    raw[280:328] = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], np.float32).tobytes()
    (gzip.open if path.endswith('.gz') else open)(path, 'wb').write(bytes(raw))

def nans(path):
    volume = head()
    volume[3, 3, :5] = np.nan
    volume[3, 4, 0] = np.inf
    save(path, volume)

BAD = {
    'missing': (lambda p: None, 'no such file'),
    'text': (lambda p: open(p, 'w').write('hello'), 'not a readable NIfTI'),
    'empty file': (lambda p: open(p, 'w').close(), 'not a readable NIfTI'),
    'truncated': (truncated, 'cannot be read'),
    '2d': (lambda p: save(p, np.ones((8, 8)), np.float32), r'\(8, 8\)'),
    'flat': (lambda p: save(p, np.ones((8, 8, 1)), np.float32), r'\(8, 8, 1\)'),
    '4d': (lambda p: save(p, np.ones((8, 8, 8, 3)), np.float32), 'split the series'),
    'nan': (nans, '6 voxels are NaN'),
    'constant': (lambda p: save(p, np.full((8, 8, 8), 5), np.float32), 'every voxel is 5'),
    'zeros': (lambda p: save(p, np.zeros((8, 8, 8)), np.int16), 'every voxel is 0'),
    'absurd': (absurd_header, '30000'),
    'complex': (lambda p: save(p, np.ones((8, 8, 8)), np.complex64), 'complex'),
    'affine': (singular, 'inverted'),
}

@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_bad_files_are_refused_in_one_line_with_their_name(tmp_path, kind, suffix):
    path, (make, reason) = str(tmp_path / f'scan{suffix}'), BAD[kind]
    make(path)
    with pytest.raises(ValueError, match=reason) as e:
        nifti.read(path)
    assert str(e.value).startswith(path) and '\n' not in str(e.value)

def test_a_4d_file_with_one_volume_and_slope_and_intercept_is_read(tmp_path):
    image = nib.Nifti1Image((head()[..., None] * 10).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.1, 5)
    path = str(tmp_path / 'a.nii.gz')
    nib.save(image, path)
    volume = nifti.read(path)[0]
    assert volume.shape == (40, 44, 36)
    np.testing.assert_allclose(volume, np.asarray(nib.load(path).dataobj)[..., 0], atol=1e-4)

def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    volume, _, native = nifti.read(store(str(tmp_path / 'a.nii'), head()))
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='file/b.nii: cannot write'):
        nifti.write(str(tmp_path / 'file' / 'b.nii'), volume, native)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.nii', 'file']

def test_scans_that_do_not_overlap_are_told_apart():
    far = np.eye(4)
    far[:3, 3] = 500
    with pytest.raises(ValueError) as e:
        nifti.conform([head(), head()], [np.eye(4), far], (48, 48, 48))
    assert 'does not overlap' in e.value.args[0] and e.value.args[1] == 1

def test_resize_stretches_the_field_of_view_over_the_box_and_back():
    """DeCo-VAE's grid: 182x218x182 becomes 128x256x128 in small; outer edges stay, so a linear ramp stays that ramp in mm."""
    shape, box = (46, 54, 46), (32, 64, 32)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (-40, 12, 7)
    ramp = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing='ij')).sum(0) + 1
    volume = ramp * (np.indices(shape) > 9).all(0)
    boxes, placement = nifti.conform(
        [volume], [affine], box, resize=True, percentiles=(0, 100), percentiles_of='volume'
    )
    assert boxes[0].shape == box and placement.lost == 0
    corner = lambda a, n, side: (a @ np.array([*(np.array(n) * side - 0.5), 1]))[:3]
    for side in (0, 1):
        np.testing.assert_allclose(
            corner(placement.affine, box, side), corner(affine, shape, side), atol=1e-4
        )
    back = nifti.restore(boxes[0], placement, affine, shape, placement.low[0], placement.high[0])
    inner = (slice(14, -4),) * 3
    assert np.abs(back[inner] - volume[inner]).max() < 1.0

def test_percentiles_of_brain_or_volume():
    volume = np.zeros((20, 20, 20), np.float32)
    volume[5:15, 5:15, 5:15] = np.arange(1, 1001).reshape(10, 10, 10)
    mask = volume > 0
    for percentiles, of in (((0.5, 99.5), 'brain'), ((0, 99.5), 'volume'), ((2, 98), 'brain')):
        scaled, low, high = nifti.scale_intensity(volume, mask, percentiles, of)
        assert [low, high] == pytest.approx(
            np.percentile(volume[mask] if of == 'brain' else volume, percentiles)
        )
        inside = (volume > low) & (volume < high)
        np.testing.assert_allclose(
            scaled[inside], np.maximum((volume[inside] - low) / (high - low), 1e-4), rtol=1e-5
        )

def test_intensities_above_one_are_kept_on_request():
    volume = np.arange(1, 1001, dtype=np.float32).reshape(10, 10, 10)
    clipped, low, high = nifti.scale_intensity(volume, volume > 0, (0, 90))
    kept, *same = nifti.scale_intensity(volume, volume > 0, (0, 90), clip=False)
    assert (
        [low, high] == same
        and clipped.max() == 1
        and kept.max() == pytest.approx((1000 - low) / (high - low))
    )
    np.testing.assert_array_equal(np.minimum(kept, 1), clipped)
