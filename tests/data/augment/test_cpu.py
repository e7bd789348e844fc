from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadseg.data.augment.cpu import Augmentation, apply, augment, color_matrix, generator, sample_params
from roadseg.labels import IGNORE
from tests.conftest import scene

PLAIN = Augmentation((48, 96), (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0)
FILL = (1, 2, 3)


def test_no_augmentation_changes_nothing() -> None:
    image, label = scene(0)
    got_image, got_label = augment(image, label, PLAIN, generator(0), FILL)
    np.testing.assert_array_equal(got_image, image)
    np.testing.assert_array_equal(got_label, label)


def test_a_sample_is_a_function_of_seed_epoch_and_index() -> None:
    image, label = scene(0)
    a = Augmentation((32, 40), blur=0.5)
    one = augment(image, label, a, generator(5, 2, 3, 4), FILL)
    again = augment(image, label, a, generator(5, 2, 3, 4), FILL)
    other = augment(image, label, a, generator(5, 2, 3, 5), FILL)
    np.testing.assert_array_equal(one[0], again[0])
    assert not np.array_equal(one[0], other[0])


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), crop_h=st.integers(1, 60), crop_w=st.integers(1, 60),
    seed=st.integers(0, 10_000), rotate=st.sampled_from([0.0, 10.0]),
)  # fmt: skip
def test_crops_have_the_requested_size_for_any_frame(
    height: int, width: int, crop_h: int, crop_w: int, seed: int, rotate: float
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = rng.integers(0, 3, (height, width), dtype=np.uint8)
    got_image, got_label = augment(
        image, label, Augmentation((crop_h, crop_w), rotate_deg=rotate, blur=0.5), generator(seed), FILL
    )
    assert got_image.shape == (crop_h, crop_w, 3) and got_image.dtype == np.uint8
    assert got_label.shape == (crop_h, crop_w)
    assert set(np.unique(got_label)) <= {0, 1, 2, IGNORE}


@pytest.mark.parametrize("rotate_deg", [0.0, 8.0])
def test_image_and_label_stay_aligned(rotate_deg: float) -> None:
    """Where colors follow the label, they still do after scale, crop and flip, two pixels from an edge."""
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 3, (6, 12)), np.ones((16, 16), int)).astype(np.uint8)
    image = np.repeat((label * 100)[..., None], 3, axis=2)
    for seed in range(30):
        a = replace(PLAIN, crop_px=(64, 96), scale=(0.6, 1.8), rotate_deg=rotate_deg, flip=0.5)
        got_image, got_label = augment(image, label, a, generator(seed), FILL)
        kernel = np.ones((5, 5), np.uint8)
        inside = (got_label != IGNORE) & (cv2.dilate(got_label, kernel) == cv2.erode(got_label, kernel))
        inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False  # pixels beyond the crop are unknown
        assert inside.mean() > 0.3
        assert (np.abs(got_image[..., 0].astype(int) - got_label * 100)[inside] <= 2).all()


def test_void_fills_the_area_outside_the_frame() -> None:
    image, label = scene(0)
    got_image, got_label = augment(image, label, replace(PLAIN, crop_px=(60, 120)), generator(3), FILL)
    assert (got_label == IGNORE).sum() >= 60 * 120 - 48 * 96
    assert (got_image.reshape(-1, 3) == FILL).all(axis=1).sum() >= 60 * 120 - 48 * 96


def test_the_matrix_is_brightness_contrast_and_saturation() -> None:
    a = Augmentation((1, 1))
    matrix = color_matrix(generator(1), a)
    rng = generator(1)
    b, c, s = (rng.uniform(0.6, 1.4) for _ in range(3))
    rgb = np.array([10.0, 200.0, 90.0])
    grey = rgb @ [0.299, 0.587, 0.114]
    expected = (s * rgb + (1 - s) * grey) * b * c + 127.5 * (1 - c)
    np.testing.assert_allclose(matrix @ np.append(rgb, 1), expected, rtol=1e-5)


def test_tint_is_a_final_factor_per_channel() -> None:
    plain, tinted = (color_matrix(generator(1), Augmentation((1, 1), tint=tint)) for tint in (0.0, 0.3))
    rng = generator(1)
    rng.random(3)
    factors = [rng.uniform(0.7, 1.3) for _ in range(3)]
    np.testing.assert_allclose(tinted, plain * np.array(factors)[:, None], rtol=1e-5)
    assert max(factors) - min(factors) > 0.1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_is_a_mirror(flip: float) -> None:
    image, label = scene(0)
    got, _ = augment(image, label, replace(PLAIN, flip=flip), generator(0), FILL)
    np.testing.assert_array_equal(got, image[:, ::-1] if flip else image)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_rotation_by_zero_equals_the_resize(flip: float) -> None:
    image, label = scene(0)
    plain = replace(PLAIN, crop_px=(24, 60), flip=flip)
    still, still_label = augment(image, label, plain, generator(4), FILL)
    turned, turned_label = augment(image, label, replace(plain, rotate_deg=1e-9), generator(4), FILL)
    # the affine sample may start between two pixels where the resize starts at one
    assert np.abs(still.astype(int) - turned).mean() < 20
    assert (still_label == turned_label).mean() > 0.9


def test_rotation_turns_about_the_crops_centre() -> None:
    label = np.zeros((101, 101), np.uint8)
    label[:, 50] = 1  # a pole
    image = np.repeat(label[..., None] * 200, 3, axis=2)
    a = replace(PLAIN, crop_px=(101, 101), rotate_deg=10.0)
    _, turned = augment(image, label, a, generator(1), FILL)
    rows, columns = np.nonzero(turned == 1)
    slope, offset = np.polyfit(rows, columns, 1)
    assert 0.01 < abs(slope) <= np.tan(np.deg2rad(10)) + 0.01
    assert abs(slope * 50 + offset - 50) < 1.5


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), crop_h=st.integers(1, 60), crop_w=st.integers(1, 60),
    seed=st.integers(0, 10_000), rotate=st.sampled_from([0.0, 30.0]), data=st.data(),
)  # fmt: skip
def test_a_crop_covers_the_requested_center(
    height: int, width: int, crop_h: int, crop_w: int, seed: int, rotate: float, data: st.DataObject
) -> None:
    center = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    d = sample_params(Augmentation((crop_h, crop_w), rotate_deg=rotate), generator(seed), height, width, center)
    top, left, box_h, box_w = d.box
    assert 0 <= top <= center[0] < top + box_h <= height and 0 <= left <= center[1] < left + box_w <= width
    # Where the pixel comes to lie: within the crop, to half a pixel of the coarser of the two.
    position = np.linalg.solve(d.affine[:, :2], [center[1] - left, center[0] - top] - d.affine[:, 2])
    slack = 0.5 + 0.5 / np.abs(np.linalg.det(d.affine[:, :2])) ** 0.5
    assert -slack <= position[0] <= crop_w - 1 + slack and -slack <= position[1] <= crop_h - 1 + slack


def test_a_centre_lies_anywhere_in_its_crops() -> None:
    a = Augmentation((40, 40), (1.0, 1.0))
    tops = [sample_params(a, generator(i), 200, 200, (100, 100)).box[0] for i in range(300)]
    assert min(tops) < 65 and max(tops) > 96 and set(tops) <= set(range(61, 101))
    corner = [sample_params(a, generator(i), 200, 200, (0, 199)).box[:2] for i in range(20)]
    assert set(corner) == {(0, 160)}


def test_only_the_box_is_needed() -> None:
    """What lies outside of it can be anything: shards decode only what is in it."""
    image, label = scene(1, 80, 120)
    for rotate_deg in (0.0, 25.0):
        for seed in range(20):
            d = sample_params(Augmentation((30, 44), rotate_deg=rotate_deg), generator(seed), 80, 120)
            top, left, height, width = d.box
            box = slice(top, top + height), slice(left, left + width)
            whole = replace(d, box=(0, 0, 80, 120), affine=d.affine + [[0, 0, left], [0, 0, top]])
            if rotate_deg:
                np.testing.assert_allclose(apply(d, image[box], label[box], FILL)[0],
                                           apply(whole, image, label, FILL)[0], atol=2)  # fmt: skip
            else:
                kept = apply(d, image[box].copy(), label[box].copy(), FILL)
                np.testing.assert_array_equal(
                    kept[0], augment(image, label, Augmentation((30, 44)), generator(seed), FILL)[0]
                )


def test_half_the_size_and_more_is_bilinear_and_less_is_the_areas_mean() -> None:
    image, label = scene(0)
    for scale, taps, how in ((0.5, 1, cv2.INTER_LINEAR), (0.49, 2, cv2.INTER_AREA), (0.2, 3, cv2.INTER_AREA)):
        a = replace(PLAIN, crop_px=(8, 16), scale=(scale, scale))
        d = sample_params(a, generator(0), *label.shape)
        top, left, height, width = d.box
        assert d.taps == taps
        got, _ = augment(image, label, a, generator(0), FILL)
        want = cv2.resize(image[top : top + height, left : left + width], (16, 8), interpolation=how)
        np.testing.assert_array_equal(got, want)


def test_a_crop_is_written_to_given_arrays() -> None:
    """In the middle of other memory, padded and not, turned and not."""
    image, label = scene(0)
    for seed in range(12):
        a = Augmentation((40, 70), (0.5, 2.0), rotate_deg=9.0 * (seed % 2), blur=0.5)
        d = sample_params(a, generator(seed), *label.shape)
        box = slice(d.box[0], d.box[0] + d.box[2]), slice(d.box[1], d.box[1] + d.box[3])
        memory, ids = np.full((3, 40, 70, 3), 77, np.uint8), np.full((3, 40, 70), 77, np.uint8)
        got = apply(d, image[box], label[box], FILL, (memory[1], ids[1]))
        want = apply(d, image[box], label[box], FILL)
        for written, made, wanted in zip((memory, ids), got, want, strict=True):
            assert np.shares_memory(written, made) and (written[[0, 2]] == 77).all()
            np.testing.assert_array_equal(written[1], wanted)
