"""What of a scan is brain, whatever its offset; headers that contradict themselves; damaged files."""
import gzip
import os

import nibabel as nib
import numpy as np
import pytest

from conftest import ROOT
from scans import brain, nifti
from test_nifti import coordinates, head, save

DATA = os.path.join(ROOT, '..', 'shared', 'data')
MM = (5.0, 5.0, 5.0)
AFFINE = np.diag([*MM, 1.0])

def adult(seed=0, shape=(36, 44, 36)):
    """A brain of about 140 x 175 x 140 mm in voxels of 5 mm, on 0."""
    return head(shape, seed)

def layered(scale=1.0, scalp=200.0, skull=15.0):
    """A head of 4 mm on 0, a brain within dark bone within bright fat; and the brain's mask."""
    grid = coordinates((52, 60, 52)) * np.array([104, 120, 104]).reshape(3, 1, 1, 1)
    depth = np.sqrt((grid ** 2).sum(0)) - 78 * scale
    inside = 100 + 20 * np.sin(grid[0] / 20)
    volume = np.select([depth < -16, depth < -7, depth < 0], [inside, skull, scalp])
    return volume.astype(np.float32), depth < -16

def noise(shape, seed=0):
    return np.abs(4 * np.random.default_rng(seed).normal(size=shape)) + 1

# ---------------------------------------------------------------- background

@pytest.mark.parametrize('offset, scale', [(0, 1), (-1, 0.01), (-1024, 1), (1000, 1), (7, 3000)])
def test_a_stripped_brain_keeps_its_mask_on_a_background_of_any_value(offset, scale):
    mask, estimated = brain.brain_mask((adult() * scale + offset).astype(np.float32), MM)
    assert not estimated and (mask == (adult() != 0)).all()

def test_z_scores_within_the_brain_keep_their_mask():
    volume, inside = adult(), adult() != 0
    volume[inside] = (volume[inside] - volume[inside].mean()) / volume[inside].std()
    mask, estimated = brain.brain_mask(volume, MM)
    assert not estimated and (mask == inside).all()

@pytest.mark.parametrize('offset, scale', [(0, 1), (100, 1), (1000, 1), (-1024, 1), (5, 0.001)])
def test_the_mask_of_a_head_in_noise_does_not_depend_on_offset_or_scale(offset, scale):
    volume = np.maximum(adult(), noise(adult().shape))
    expected, _ = brain.brain_mask(volume, MM)
    mask, estimated = brain.brain_mask((volume * scale + offset), MM)
    assert estimated and np.mean(mask != expected) < 1e-3
    assert mask.sum() == pytest.approx((adult() > 0).sum(), rel=0.1)

@pytest.mark.parametrize('offset', [0, 1000])
def test_padding_around_a_field_of_view_is_not_its_air(offset):
    padded = np.pad(np.maximum(adult(), noise(adult().shape)) + offset, ((6, 6), (6, 6), (3, 3)))
    mask, estimated = brain.brain_mask(padded.astype(np.float32), MM)
    assert estimated and mask.sum() == pytest.approx((adult() > 0).sum(), rel=0.1)

@pytest.mark.parametrize('sd', [0.45, 0.6, 1.0, 1.5, 6.0])
def test_air_of_zeros_and_specks_is_no_brain(sd):
    inside = adult() > 0
    air = np.floor(np.abs(sd * np.random.default_rng(1).normal(size=inside.shape)))
    mask, estimated = brain.brain_mask(np.where(inside, 3 * adult(), air).astype(np.float32), MM)
    assert estimated and mask.sum() == pytest.approx(inside.sum(), rel=0.1)

# ---------------------------------------------------------------- head or brain

@pytest.mark.parametrize('scale', [1.15, 1.0, 0.85])
@pytest.mark.parametrize('scalp', [200.0, 60.0])
def test_a_head_in_air_of_zeros_is_no_brain(scale, scalp):
    volume, _ = layered(scale, scalp)
    assert brain.brain_mask(volume, (4, 4, 4))[1]

def test_the_brain_within_that_head_is_one():
    volume, inside = layered()
    mask, estimated = brain.brain_mask(np.where(inside, volume, 0), (4, 4, 4))
    assert not estimated and (mask == inside).all()

def test_intensities_of_a_head_are_those_of_its_brain():
    """Fat, twice as bright as the brain, does not make it dark."""
    volume, inside = layered()
    _, placement = nifti.conform([volume], [np.diag([4.0, 4, 4, 1])], (52, 60, 52), 4.0)
    assert placement.estimated == [True]
    assert placement.high[0] == pytest.approx(np.percentile(volume[inside], 99.5), rel=0.02)

@pytest.mark.skipif(not os.path.isdir(DATA), reason='no real scans beside the project')
def test_real_heads_and_brains_are_told_apart():
    for subject, is_head in (('long01', True), ('ms07', False), ('mni152', False)):
        folder = f'{DATA}/realmri/sub-{subject}'
        folder = f'{folder}/ses-01/anat' if is_head else f'{folder}/anat'
        for name in sorted(os.listdir(folder)):
            volume, affine, _ = nifti.read(f'{folder}/{name}')
            mask, estimated = brain.brain_mask(volume, nifti.voxel_sizes(affine))
            assert estimated == is_head, name
            assert is_head or (mask == (volume != 0)).all()

# ---------------------------------------------------------------- sizes and slabs

def test_a_brain_ten_times_too_small_is_doubted():
    _, placement = nifti.conform([adult()], [np.diag([0.5, 0.5, 0.5, 1])], (32, 32, 32), 1.0)
    assert 'voxel sizes' in placement.doubts[0][0]
    _, placement = nifti.conform([adult()], [AFFINE], (32, 48, 32), 5.0)
    assert placement.doubts == [[]]

def test_a_slab_is_named_with_its_coverage_and_left_out_below_a_key():
    slab = adult().copy()
    slab[:, :, :18] = 0
    scans, affines = [adult(), slab], [AFFINE, AFFINE]
    _, placement = nifti.conform(scans, affines, (32, 48, 32), 5.0, min_coverage=0.4)
    assert 'covers 50% of the brain' in ' '.join(placement.doubts[1])
    with pytest.raises(ValueError, match='a slab: it covers 50%') as e:
        nifti.conform(scans, affines, (32, 48, 32), 5.0, min_coverage=0.6)
    assert e.value.args[1] == 1

def test_a_slab_alone_is_named():
    _, placement = nifti.conform([adult()[:, :, :20]], [AFFINE], (32, 48, 32), 5.0)
    assert 'ends within the brain at its top' in ' '.join(placement.doubts[0])

def test_a_field_of_view_that_no_memory_holds_is_refused():
    with pytest.raises(ValueError, match='voxels of 1 mm') as e:
        nifti.conform([adult()], [np.diag([5000.0, 5000, 5000, 1])], (32, 48, 32))
    assert e.value.args[1] == 0

def test_a_brain_outside_the_box_is_refused_with_what_to_do():
    _, placement = nifti.conform([adult()], [AFFINE], (16, 16, 16), 5.0)
    with pytest.raises(ValueError, match='a.nii: 77% of its brain lies outside.*strip'):
        nifti.check_inside('a.nii', placement)

# ---------------------------------------------------------------- headers

def image_of(volume=None, affine=AFFINE, unit='mm'):
    image = nib.Nifti1Image(adult() if volume is None else volume, affine)
    image.header.set_xyzt_units(unit)
    return image

@pytest.mark.parametrize('unit, factor', [('meter', 1e-3), ('micron', 1e3)])
def test_other_units_are_read_as_mm_and_named(tmp_path, unit, factor):
    nib.save(image_of(affine=np.diag([*np.multiply(MM, factor), 1]), unit=unit), tmp_path / 'a.nii')
    _, affine, native = nifti.read(str(tmp_path / 'a.nii'))
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    assert 'metre' in native.doubts[0]

def test_a_wrong_unit_does_not_spoil_likely_voxels(tmp_path):
    nib.save(image_of(unit='meter'), tmp_path / 'a.nii')
    _, affine, native = nifti.read(str(tmp_path / 'a.nii'))
    np.testing.assert_allclose(affine, AFFINE)
    assert 'taken as mm' in native.doubts[0]

@pytest.mark.parametrize('factor', [1e-3, 1e3])
def test_voxels_of_other_units_that_are_not_named_are_refused(tmp_path, factor):
    nib.save(image_of(affine=np.diag([*np.multiply(MM, factor), 1])), tmp_path / 'a.nii')
    with pytest.raises(ValueError, match='a.nii: its field of view'):
        nifti.read(str(tmp_path / 'a.nii'))

def test_a_sform_that_contradicts_pixdim_is_named(tmp_path):
    image = image_of()
    image.set_qform(AFFINE, 1)
    image.header['srow_x'][0], image.header['srow_y'][1] = 2.5, 2.5
    image.header['sform_code'] = 1
    header = image.header.copy()
    raw = bytearray(header.binaryblock + bytes(4) + image.get_fdata().astype('<f4').tobytes('F'))
    raw[108:112], raw[344:348] = np.float32(352).tobytes(), b'n+1\0'
    (tmp_path / 'a.nii').write_bytes(raw)
    doubts = nifti.read(str(tmp_path / 'a.nii'))[2].doubts
    assert doubts == ('its sform says voxels of 2.5x2.5x5 mm, its pixdim 5x5x5 mm',)

def test_a_qform_of_other_axes_is_named(tmp_path):
    image = image_of()
    image.set_qform(np.diag([-5.0, 5, 5, 1]), 1)
    nib.save(image, tmp_path / 'a.nii')
    assert nifti.read(str(tmp_path / 'a.nii'))[2].doubts == ('its sform says RAS, its qform LAS',)

def test_a_header_without_orientation_is_named(tmp_path):
    image = image_of()
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / 'a.nii')
    assert 'no orientation codes' in nifti.read(str(tmp_path / 'a.nii'))[2].doubts[0]

@pytest.mark.parametrize('sform, qform', [(1, 1), (2, 0), (0, 1), (4, 1), (0, 0)])
def test_codes_units_and_description_go_back(tmp_path, sform, qform):
    image = image_of(unit='mm')
    image.set_qform(AFFINE, qform)
    image.set_sform(AFFINE, sform)
    image.header['descrip'] = b'scanner 7'
    nib.save(image, tmp_path / 'a.nii.gz')
    volume, _, native = nifti.read(str(tmp_path / 'a.nii.gz'))
    nifti.write(str(tmp_path / 'b.nii.gz'), volume, native)
    before, after = nib.load(tmp_path / 'a.nii.gz'), nib.load(tmp_path / 'b.nii.gz')
    for name in ('sform_code', 'qform_code', 'xyzt_units', 'descrip', 'pixdim'):
        assert (before.header[name] == after.header[name]).all(), name
    np.testing.assert_array_equal(before.affine, after.affine)
    np.testing.assert_array_equal(before.get_fdata(), after.get_fdata())

def test_a_scaled_integer_scan_goes_back_as_plain_numbers(tmp_path):
    image = nib.Nifti1Image((adult() * 10).astype(np.int16)[..., None], AFFINE)
    image.header.set_slope_inter(0.1, 0)
    nib.save(image, tmp_path / 'a.nii')
    volume, _, native = nifti.read(str(tmp_path / 'a.nii'))
    nifti.write(str(tmp_path / 'b.nii'), volume, native)
    np.testing.assert_array_equal(nib.load(tmp_path / 'b.nii').get_fdata(dtype=np.float32), volume)

# ---------------------------------------------------------------- files

@pytest.mark.parametrize('name, kind', [
    ('a.nii', nib.Nifti2Image), ('a.NII.GZ', nib.Nifti1Image), ('a.mgz', nib.MGHImage),
    ('a.img', nib.Nifti1Pair), ('a.hdr', nib.Nifti1Pair)])
def test_other_formats_are_read(tmp_path, name, kind):
    nib.save(kind(adult(), AFFINE), tmp_path / name.lower())
    os.rename(tmp_path / name.lower(), tmp_path / name)
    np.testing.assert_array_equal(nifti.read(str(tmp_path / name))[0], adult())

def test_analyze_is_read_and_its_orientation_is_named_a_guess(tmp_path):
    nib.save(nib.AnalyzeImage(adult(), AFFINE), tmp_path / 'a.img')
    volume, affine, native = nifti.read(str(tmp_path / 'a.img'))
    np.testing.assert_array_equal(volume[::-1], adult())
    assert nifti.voxel_sizes(affine).tolist() == [5, 5, 5] and 'a guess' in native.doubts[0]

@pytest.mark.parametrize('shape', [(36, 44, 36, 1), (36, 44, 36, 1, 1), (36, 44, 36, 1, 1, 1)])
def test_trailing_axes_of_one_are_dropped(tmp_path, shape):
    nib.save(nib.Nifti1Image(adult().reshape(shape), AFFINE), tmp_path / 'a.nii.gz')
    np.testing.assert_array_equal(nifti.read(str(tmp_path / 'a.nii.gz'))[0], adult())

@pytest.mark.parametrize('folder', ['x.zip', 'x.zip/y.zip', 'a[1]'])
def test_a_folder_may_have_any_name(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    save(str(tmp_path / folder / 'a.nii'), adult())
    assert nifti.read(f'{tmp_path}/{folder}/a.nii')[0].shape == (36, 44, 36)

def test_names_do_not_say_what_is_compressed(tmp_path):
    save(str(tmp_path / 'a.nii'), adult())
    content = (tmp_path / 'a.nii').read_bytes()
    (tmp_path / 'b.nii.gz').write_bytes(content)
    (tmp_path / 'c.nii').write_bytes(gzip.compress(content))
    for name in ('b.nii.gz', 'c.nii'):
        np.testing.assert_array_equal(nifti.read(str(tmp_path / name))[0], adult())

def test_padding_behind_and_streams_in_a_row_are_read(tmp_path):
    save(str(tmp_path / 'a.nii'), adult())
    content = (tmp_path / 'a.nii').read_bytes()
    parts = gzip.compress(content[:1000]) + gzip.compress(content[1000:])
    (tmp_path / 'b.nii.gz').write_bytes(parts + bytes(512))
    np.testing.assert_array_equal(nifti.read(str(tmp_path / 'b.nii.gz'))[0], adult())

def test_a_damaged_bit_is_never_read_as_another_scan(tmp_path):
    path = str(tmp_path / 'a.nii.gz')
    save(path, adult(), np.int16)
    with open(path, 'rb') as f:
        packed = f.read()
    whole, rng = nifti.read(path)[0], np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(packed)
        damaged[rng.integers(10, len(packed))] ^= 1 << int(rng.integers(8))
        with open(path, 'wb') as f:
            f.write(damaged)
        try:
            assert (nifti.read(path)[0] == whole).all()
        except ValueError as e:
            assert str(e).startswith(path)

def test_200_damaged_headers_end_in_a_scan_or_in_one_line(tmp_path):
    path, rng = str(tmp_path / 'a.nii'), np.random.default_rng(7)
    volume, refused = head((16, 18, 14)), 0
    for k in range(200):
        raw = bytearray(image_of(volume, np.diag([9.0, 9, 9, 1])).to_bytes())
        for _ in range(int(rng.integers(1, 5))):
            place = int(rng.integers(0, 348))
            length = int(rng.integers(1, 5))
            raw[place:place + length] = rng.bytes(length)
        if k % 2:
            path = str(tmp_path / 'a.nii.gz')
            raw = gzip.compress(raw, 1)
        with open(path, 'wb') as f:
            f.write(raw)
        try:
            volume_read, affine, _ = nifti.read(path)
        except ValueError as e:
            assert str(e).startswith(path) and '\n' not in str(e)
            refused += 1
            continue
        try:
            nifti.conform([volume_read], [affine], (16, 16, 16), 9.0)
        except ValueError as e:
            assert e.args[1] == 0 and '\n' not in e.args[0]
    assert 20 < refused < 180
