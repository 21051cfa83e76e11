"""Scans into the box and back: affines, padding, intensities, and every file that must be refused."""
import gzip
import os
import zlib

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from scans import boxed, nifti

def coordinates(shape):
    """Of the voxels of a grid, (3, *shape), from -1 to 1 along every axis."""
    return np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij'))

def head(shape=(40, 44, 36), seed=0):
    """A smooth bright ellipsoid on a background of exactly 0, float32, RAS+."""
    rng = np.random.default_rng(seed)
    grid = coordinates(shape)
    volume = 100 + 40 * np.sin(3 * grid[0] + 2 * grid[1]) + 30 * grid[2] + rng.normal(size=shape)
    return np.where((grid ** 2).sum(0) < 0.7, volume, 0).astype(np.float32)

def store(path, volume, code='RAS', spacing=(1, 1, 1), turn=0.0):
    """A RAS+ volume as a file in another orientation; turn: an oblique affine, radians about the vertical."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-12, 7, 30)
    c, s = np.cos(turn), np.sin(turn)
    affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    ras, other = nib.orientations.axcodes2ornt('RAS'), nib.orientations.axcodes2ornt(code)
    image = nib.Nifti1Image(volume, affine)
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(ras, other)), path)
    return path

# ---------------------------------------------------------------- into the box and back

def in_each_way(test):
    """A test for every orientation, straight and oblique, as a plain and as a compressed file."""
    for name, values in (('code', ['RAS', 'LAS', 'LPS', 'PIR']), ('turn', [0.0, 0.2]),
                         ('suffix', ['.nii', '.nii.gz'])):
        test = pytest.mark.parametrize(name, values)(test)
    return test

@in_each_way
def test_a_file_of_any_orientation_is_read_in_ras(tmp_path, code, turn, suffix):
    volume, _, native = nifti.read(store(str(tmp_path / f'a{suffix}'), head(), code, turn=turn))
    assert native.orientation == code
    np.testing.assert_array_equal(volume, head())

@in_each_way
def test_read_conform_restore_write_overlays_the_input(tmp_path, code, turn, suffix):
    path, out = store(str(tmp_path / f'a{suffix}'), head(), code, turn=turn), str(tmp_path / f'b{suffix}')
    volume, affine, native = nifti.read(path)
    boxes, placement = nifti.conform([volume], [affine], (48, 64, 48))
    low, high = placement.low[0], placement.high[0]
    nifti.write(out, nifti.restore(boxes[0], placement, affine, volume.shape, low, high), native)
    np.testing.assert_allclose(nib.load(path).affine, nib.load(out).affine, atol=1e-5)
    clipped = np.where(volume != 0, np.clip(volume, low, high), 0)
    # 0.05: in the brain's darkest voxels, the floor of 1e-4
    np.testing.assert_allclose(nifti.read(out)[0], clipped, atol=0.05)

def test_a_box_that_holds_the_brain_goes_from_0_to_1_and_loses_nothing():
    boxes, placement = nifti.conform([head()], [np.eye(4)], (48, 64, 48))
    assert boxes[0].min() == 0 and boxes[0].max() == 1
    assert placement.lost == 0

def centre_of_mass_mm(volume, affine):
    voxels = np.indices(volume.shape).reshape(3, -1)
    return affine[:3] @ [*((voxels * volume.ravel()).sum(1) / volume.sum()), 1]

@pytest.mark.parametrize('spacing', [(2, 1, 1), (0.5, 0.5, 3), (0.7, 0.7, 0.7)])
def test_a_point_lands_where_the_affine_says(tmp_path, spacing):
    """The centre of mass of a blob, in millimetres, is the same in the file and on the isotropic grid."""
    lines = [(np.arange(60) - 60 / 2 - 1.5) * s for s in spacing]
    grid = np.stack(np.meshgrid(*lines, indexing='ij'))
    blob = np.exp(-(grid ** 2).sum(0) / (2 * 5 ** 2)).astype(np.float32)
    volume, affine, _ = nifti.read(store(str(tmp_path / 'a.nii'), blob, 'LPS', spacing))
    new_affine, shape = nifti.grid(affine, volume.shape, 1.0)
    np.testing.assert_allclose(nib.affines.voxel_sizes(new_affine), 1, atol=1e-6)
    moved = nifti.resample(volume, affine, new_affine, shape)
    expected = centre_of_mass_mm(volume, affine)
    np.testing.assert_allclose(centre_of_mass_mm(moved, new_affine), expected, atol=0.05)

@pytest.fixture
def coarse_and_fine():
    """Boxes of one head stored twice, the first time with every second voxel alone."""
    fine = head((80, 88, 72))
    affines = [np.diag([2.0, 2, 2, 1]), np.eye(4)]
    return nifti.conform([fine[::2, ::2, ::2], fine], affines, (48, 48, 48), spacing_mm=2.0)[0]

@pytest.mark.parametrize('axis', [0, 2])
def test_thick_slices_come_back_through_a_fine_box_without_a_blur_in_plane(axis):
    shape, spacing = [56, 56, 56], [0.9, 0.9, 0.9, 1.0]
    shape[axis], spacing[axis] = 10, 5.0
    rng = np.random.default_rng(0)
    detail = ndimage.gaussian_filter(rng.normal(size=shape), [2.5 if n == 10 else 1.5 for n in shape])
    inside = (coordinates(shape) ** 2).sum(0) < 0.7
    volume = np.where(inside, 100 + 20 * detail / detail.std(), 0).astype(np.float32)
    affine = np.diag(spacing)
    boxes, placement = nifti.conform([volume], [affine], (64, 64, 64))
    low, high = placement.low[0], placement.high[0]
    back = nifti.restore(boxes[0], placement, affine, volume.shape, low, high)
    inner = (coordinates(shape) ** 2).sum(0) < 0.4
    error = ((back - np.clip(volume, low, high))[inner] / (high - low)) ** 2
    assert -10 * np.log10(error.mean()) > 28  # 17 to 18 where planes are blurred by the thickness

def test_onto_coarser_cubes_every_source_axis_is_blurred_by_its_own_voxels():
    spike = np.zeros((41, 41, 41), np.float32)
    spike[20, 20, 20] = 1
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    affine = np.diag([0.5, 1.0, 2.0, 1.0])
    affine[:3, 3] = (-10, -20, -40)
    cubes = turn @ np.diag([2.0, 2, 2, 1])
    cubes[:3, 3] = -cubes[:3, :3] @ [10, 10, 10]
    blurred = ndimage.gaussian_filter(spike, np.sqrt(np.array([4, 2, 1]) ** 2 - 1) / 2.355)
    to_source = np.linalg.inv(affine) @ cubes
    expected = ndimage.affine_transform(blurred, to_source[:3, :3], to_source[:3, 3], (21,) * 3, order=1)
    np.testing.assert_allclose(nifti.resample(spike, affine, cubes, (21,) * 3), expected, atol=1e-7)

def correlation(a, b):
    inside = (a > 0) & (b > 0)
    return np.corrcoef(a[inside], b[inside])[0, 1]

def test_a_second_scan_lands_on_the_grid_of_the_first(coarse_and_fine):
    first, second = coarse_and_fine
    shifts = ((1, 0, 0), (0, -1, 0), (0, 0, 1))
    shifted = [correlation(first, np.roll(second, shift, (0, 1, 2))) for shift in shifts]
    assert correlation(first, second) > 0.9995 > max(shifted)

def test_a_second_scan_keeps_its_size(coarse_and_fine):
    first, second = coarse_and_fine
    assert (first > 0).sum() == pytest.approx((second > 0).sum(), rel=0.05)

def test_padding_and_cropping_are_undone():
    volume = np.random.default_rng(0).random((7, 9, 5)).astype(np.float32)
    box = nifti.crop_pad(volume, [-2, 3, -1], (12, 4, 9))
    back = nifti.crop_pad(box, [2, -3, 1], volume.shape)
    expected = np.zeros_like(volume)
    expected[:, 3:7] = volume[:, 3:7]
    np.testing.assert_array_equal(back, expected)

def test_a_box_beside_the_volume_is_empty():
    assert nifti.crop_pad(np.ones((7, 9, 5)), [20, 0, 0], (4, 4, 4)).sum() == 0

def test_a_brain_too_high_loses_its_inferior_end_and_reports_it():
    mask = np.zeros((20, 20, 30), bool)
    mask[5:15, 2:18, 4:28] = True
    start, lost = nifti.box_start(mask, (16, 12, 16))
    assert start == [2, 4, 12]  # centred | the middle of 16 kept | the top at 28 kept
    assert lost == pytest.approx(1 - (12 * 16) / (16 * 24))

def test_a_speck_far_from_the_brain_does_not_move_the_box():
    mask = np.zeros((30, 30, 40), bool)
    mask[5:15, 2:18, 4:20] = True
    start, lost = nifti.box_start(mask, (16, 20, 20))
    mask[29, 29, 39] = True
    assert nifti.box_start(mask, (16, 20, 20))[0] == start
    assert lost == 0 and 0 < nifti.box_start(mask, (16, 20, 20))[1] < 1e-3

@pytest.mark.parametrize('thickness', [1.0, 3.0, 6.0])
def test_a_brain_that_fills_its_field_of_view_keeps_its_end_slices(thickness):
    volume = np.zeros((40, 40, 12), np.float32)
    volume[5:35, 5:35] = np.random.default_rng(0).uniform(1, 2, (30, 30, 12))
    affine = np.diag([1, 1, thickness, 1])
    (box,), placement = nifti.conform([volume], [affine], (48, 48, 96))
    assert np.flatnonzero((box > 0).any((0, 1))).size == 12 * thickness
    back = nifti.restore(box, placement, affine, volume.shape)
    assert ((back > 0) == (volume > 0)).all()

def test_scans_that_do_not_overlap_are_told_apart():
    far = np.eye(4)
    far[:3, 3] = 500
    with pytest.raises(ValueError, match='does not overlap') as e:
        nifti.conform([head(), head()], [np.eye(4), far], (48, 48, 48))
    assert e.value.args[1] == 1

# ---------------------------------------------------------------- a field of view stretched over the box

SHAPE, BOX = (46, 54, 46), (32, 64, 32)  # in small, DeCo-VAE's 182x218x182 and 128x256x128

@pytest.fixture
def stretched_ramp():
    """A linear ramp in millimetres, 0 along three sides; its affine; its box and Placement."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = (-40, 12, 7)
    voxels = np.indices(SHAPE, np.float32)
    volume = (voxels.sum(0) + 1) * (voxels > 9).all(0)
    boxes, placement = nifti.conform([volume], [affine], BOX, resize=True, percentiles=(0, 100),
                                     percentiles_of='volume')
    return volume, affine, boxes[0], placement

def outer_corner_mm(affine, shape, side):
    """The outer corner of a grid's first (side 0) or last (1) voxel."""
    return (affine @ [*(np.array(shape) * side - 0.5), 1])[:3]

@pytest.mark.parametrize('side', [0, 1])
def test_resize_keeps_the_outer_edges(stretched_ramp, side):
    _, affine, box, placement = stretched_ramp
    assert box.shape == BOX and placement.lost == 0
    expected = outer_corner_mm(affine, SHAPE, side)
    np.testing.assert_allclose(outer_corner_mm(placement.affine, BOX, side), expected, atol=1e-4)

def test_resize_is_undone(stretched_ramp):
    volume, affine, box, placement = stretched_ramp
    back = nifti.restore(box, placement, affine, SHAPE, placement.low[0], placement.high[0])
    inner = (slice(14, -4),) * 3
    assert np.abs(back[inner] - volume[inner]).max() < 1.0

# ---------------------------------------------------------------- brain and intensities

def test_brain_mask_keeps_negative_voxels():
    volume = head()
    volume[20, 20, 20] = -3
    mask, estimated = nifti.brain_mask(volume)
    assert mask[20, 20, 20] and not estimated

def test_brain_mask_finds_a_head_in_noisy_air():
    truth = head() != 0
    noise = np.abs(np.random.default_rng(0).normal(size=truth.shape)).astype(np.float32)
    mask, estimated = nifti.brain_mask(head() + noise)
    assert estimated
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95

def test_intensities_follow_the_percentiles_inside_the_brain_and_keep_its_mask():
    volume, mask = head() - 20, head() != 0
    scaled, low, high = nifti.scale_intensity(volume, mask)
    assert (low, high) == tuple(np.percentile(volume[mask], [0.5, 99.5]))
    expected = np.clip((volume[mask] - low) / (high - low), 1e-4, 1)
    np.testing.assert_allclose(scaled[mask], expected, atol=1e-6)
    assert ((scaled > 0) == mask).all() and (scaled[~mask] == 0).all()

def test_a_uniform_brain_cannot_be_scaled():
    with pytest.raises(ValueError, match='nothing to scale'):
        nifti.scale_intensity(np.ones((4, 4, 4)), np.ones((4, 4, 4), bool))

@pytest.mark.parametrize('percentiles, of', [
    ((0.5, 99.5), 'brain'), ((0, 99.5), 'volume'), ((2, 98), 'brain')])
def test_percentiles_of_brain_or_volume(percentiles, of):
    volume = np.zeros((20, 20, 20), np.float32)
    volume[5:15, 5:15, 5:15] = np.arange(1, 1001).reshape(10, 10, 10)
    mask = volume > 0
    scaled, low, high = nifti.scale_intensity(volume, mask, percentiles, of)
    values = volume[mask] if of == 'brain' else volume
    assert [low, high] == pytest.approx(np.percentile(values, percentiles))
    inside = (volume > low) & (volume < high)
    expected = np.maximum((volume[inside] - low) / (high - low), 1e-4)
    np.testing.assert_allclose(scaled[inside], expected, rtol=1e-5)

def test_intensities_above_one_are_kept_on_request():
    volume = np.arange(1, 1001, dtype=np.float32).reshape(10, 10, 10)
    clipped, low, high = nifti.scale_intensity(volume, volume > 0, (0, 90))
    kept, *same = nifti.scale_intensity(volume, volume > 0, (0, 90), clip=False)
    assert [low, high] == same
    assert clipped.max() == 1 and kept.max() == pytest.approx((1000 - low) / (high - low))
    np.testing.assert_array_equal(np.minimum(kept, 1), clipped)

# ---------------------------------------------------------------- refusals

def save(path, data, dtype=None):
    nib.save(nib.Nifti1Image(np.asarray(data, dtype), np.eye(4)), path)

def write_raw(path, raw):
    """Bytes as a file, compressed if its name says so."""
    with (gzip.open if path.endswith('.gz') else open)(path, 'wb') as f:
        f.write(bytes(raw))

def text(path):
    with open(path, 'w') as f:
        f.write('hello')

def truncated(path):
    save(path, head())
    os.truncate(path, os.path.getsize(path) // 2)

def absurd_header(path):
    """A header that claims 30000^3 voxels, in a tiny file."""
    raw = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)).to_bytes())
    raw[42:48] = np.array([30000] * 3, np.int16).tobytes()
    write_raw(path, raw)

def singular(path):
    """sform_code 1 with two equal rows, written into the header's bytes."""
    raw = bytearray(nib.Nifti1Image(head(), np.eye(4)).to_bytes())
    raw[252:256] = np.array([0, 1], np.int16).tobytes()
    raw[280:328] = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], np.float32).tobytes()
    write_raw(path, raw)

def nans(path):
    volume = head()
    volume[3, 3, :5] = np.nan
    volume[3, 4, 0] = np.inf
    save(path, volume)

BAD = {  # kind: (what makes such a file, what its refusal says)
    'missing': (lambda path: None, 'no such file'),
    'text': (text, 'not a readable NIfTI'),
    'empty file': (lambda path: open(path, 'w').close(), 'not a readable NIfTI'),
    'truncated': (truncated, 'cannot be read'),
    '2d': (lambda path: save(path, np.ones((8, 8)), np.float32), r'\(8, 8\)'),
    'flat': (lambda path: save(path, np.ones((8, 8, 1)), np.float32), r'\(8, 8, 1\)'),
    '4d': (lambda path: save(path, np.ones((8, 8, 8, 3)), np.float32), 'split the series'),
    'nan': (nans, '6 voxels are NaN'),
    'constant': (lambda path: save(path, np.full((8, 8, 8), 5), np.float32), 'every voxel is 5'),
    'zeros': (lambda path: save(path, np.zeros((8, 8, 8)), np.int16), 'every voxel is 0'),
    'absurd': (absurd_header, '30000'),
    'complex': (lambda path: save(path, np.ones((8, 8, 8)), np.complex64), 'complex'),
    'affine': (singular, 'inverted'),
}

@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_bad_files_are_refused_in_one_line_with_their_name(tmp_path, kind, suffix):
    make, reason = BAD[kind]
    path = str(tmp_path / f'scan{suffix}')
    make(path)
    with pytest.raises(ValueError, match=reason) as e:
        nifti.read(path)
    assert str(e.value).startswith(path) and '\n' not in str(e.value)

def test_a_path_may_be_a_pathlib_path(tmp_path):
    store(str(tmp_path / 'a.nii.gz'), head())
    np.testing.assert_array_equal(nifti.read(tmp_path / 'a.nii.gz')[0], head())
    scan = boxed.Scan(tmp_path / 'a.nii.gz', {'shape': (48, 48, 48)})
    assert scan.box.shape == (1, 1, 48, 48, 48)
    with pytest.raises(ValueError, match='none.nii: no such file'):
        nifti.read(tmp_path / 'none.nii')

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

def test_an_array_is_stored_under_its_name_alone_and_its_checksum_is_of_its_voxels(tmp_path):
    volume = head()[::-1]
    checksum = nifti.save_npy(str(tmp_path / 'a.npy'), volume)
    assert os.listdir(tmp_path) == ['a.npy']
    np.testing.assert_array_equal(np.load(tmp_path / 'a.npy'), volume)
    assert checksum == zlib.crc32(volume.tobytes())
