"""Masks of every kind to ids and train ids; what a mask's values mean."""

import pickle
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from roadseg.data.masks.form import UNKNOWN, MaskForm
from roadseg.data.masks.read import MOST_COLORS, mask_bytes, mask_path, read_ids, train_ids, unknown_colors
from roadseg.errors import ImageError
from roadseg.images.decode import Limits, encode_label_png
from roadseg.labels import IGNORE, LabelClass, LabelSet

SET = LabelSet(
    "few",
    (
        LabelClass("road", 7, 0, (128, 64, 128)),
        LabelClass("car", 255, 1, (0, 0, 142)),
        LabelClass("void", 0, IGNORE, (0, 0, 0)),
        LabelClass("also void", 9, IGNORE, (0, 0, 0)),
    ),
)
IDS, COLORS = MaskForm("ids", SET), MaskForm("colors", SET)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


def some(ids=(0, 7, 255), shape=(20, 30)) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array(ids, np.uint8), shape)


def painted(ids: np.ndarray) -> np.ndarray:
    out = np.zeros((*ids.shape, 3), np.uint8)
    for c in SET.classes:
        out[ids == c.id] = c.color
    return out


def slow_train_ids(ids: np.ndarray, label_set: LabelSet) -> np.ndarray:
    known = {c.id: c.train_id for c in label_set.classes}
    return np.array([[known.get(int(i), IGNORE) for i in row] for row in ids], np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_become_train_ids_and_unknown_ids_void(dtype):
    ids = some((0, 7, 9, 33, 255)).astype(dtype)
    if dtype == np.uint16:
        ids[0, 0] = UNKNOWN
        ids[0, 1] = 7000
    assert train_ids(ids, IDS).dtype == np.uint8
    np.testing.assert_array_equal(train_ids(ids, IDS), slow_train_ids(ids, SET))


def test_255_can_be_a_class_id():
    ids = read_ids(png(some((0, 255))), IDS, Limits())
    np.testing.assert_array_equal(train_ids(ids, IDS), np.where(some((0, 255)) == 255, 1, IGNORE))


@pytest.mark.parametrize("mode", ["grey", "palette", "two bits"])
def test_ids_are_read_as_stored(mode, tmp_path):
    label = some((0, 1, 3))
    if mode == "two bits":
        Image.fromarray(label).convert("P").save(tmp_path / "a.png", bits=2)
        data = (tmp_path / "a.png").read_bytes()
    else:
        palette = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
        data = encode_label_png(label, palette if mode == "palette" else None)
    np.testing.assert_array_equal(read_ids(data, IDS, Limits()), label)


def test_rgb_rgba_and_palette_colors_become_ids(tmp_path):
    ids = some()
    rgb = painted(ids)
    palette = np.zeros((256, 3), np.uint8)
    palette[[1, 2]] = [(128, 64, 128), (0, 0, 142)]
    indexes = np.select([ids == 7, ids == 255], [1, 2], 0).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, ids])).save(tmp_path / "rgba.png")
    for data in (png(rgb), encode_label_png(indexes, palette), (tmp_path / "rgba.png").read_bytes()):
        found = read_ids(data, COLORS, Limits())
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, ids)


def test_adjacent_colors_are_distinguished():
    rng = np.random.default_rng(2)
    classes = tuple(
        LabelClass(f"c{i}", i, i, tuple(rgb)) for i, rgb in enumerate(rng.integers(0, 256, (40, 3)).tolist())
    )
    form = MaskForm("colors", LabelSet("many", classes))
    image = np.array([[c.color for c in classes]], np.int16)
    for step in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]):
        moved = np.clip(image + np.array(step), 0, 255).astype(np.uint8)
        expected = [next((c.id for c in classes if c.color == tuple(rgb)), UNKNOWN) for rgb in moved[0].tolist()]
        np.testing.assert_array_equal(read_ids(png(moved), form, Limits())[0], expected)


def test_the_first_of_two_classes_with_the_same_color_wins():
    assert read_ids(png(np.zeros((2, 2, 3), np.uint8)), COLORS, Limits()).max() == 0


def test_unknown_colors_are_listed_with_their_pixel_counts():
    rgb = painted(some())
    rgb[:2, :5] = (1, 2, 3)
    rgb[5, 5:8] = (128, 64, 127)
    data = png(rgb)
    ids = read_ids(data, COLORS, Limits())
    assert ids.dtype == np.uint16 and (ids == UNKNOWN).sum() == 13
    colors, count = unknown_colors(data, COLORS, Limits())
    assert list(colors.items()) == [("#010203", 10), ("#80407f", 3)] and count == 2
    assert (train_ids(ids, COLORS)[:2, :5] == IGNORE).all()
    assert unknown_colors(png(painted(some())), COLORS, Limits()) == ({}, 0)


def test_lossy_masks_are_refused_in_every_form():
    data = cv2.imencode(".jpg", painted(some()))[1].tobytes()
    for form in (IDS, COLORS):
        with pytest.raises(ImageError):
            read_ids(data, form, Limits())


def test_every_form_respects_the_limits():
    for form, data in ((IDS, png(some())), (COLORS, png(painted(some())))):
        with pytest.raises(ImageError):
            read_ids(data, form, Limits(max_pixels=599))


@pytest.mark.parametrize(
    ("label", "kind", "expected"),
    [
        ("masks/a#1.png", "ids", ("masks/a#1.png", "")),
        ("all.json#12", "coco", ("all.json", "12")),
        ("x#y/all.JSON#a#b", "coco", ("x#y/all.JSON", "a#b")),
        ("a.json", "coco", ("a.json", "")),
    ],
)
def test_a_coco_label_names_file_and_image(label, kind, expected):
    assert mask_path(label, MaskForm(kind, SET)) == expected


def test_mask_bytes_are_the_bytes_of_the_file(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(some()))
    assert mask_bytes(tmp_path, "a.png", IDS, Limits()) == png(some())


def test_the_digest_changes_with_the_meaning_of_values():
    forms = [
        IDS,
        COLORS,
        MaskForm("polygons", SET),
        MaskForm("polygons", SET, 9),
        MaskForm("coco", SET),
        MaskForm("coco", SET, 0, "order"),
        MaskForm("colors", LabelSet("few", (*SET.classes[:-1], LabelClass("also void", 9, IGNORE, (1, 1, 1))))),
    ]
    assert len({form.digest for form in forms}) == len(forms)
    assert IDS.digest == SET.mapping_digest


def test_forms_survive_json_and_pickling_without_their_tables():
    form = MaskForm("coco", SET, 9, "order")
    assert MaskForm.from_json(form.to_json()) == form
    read_ids(png(painted(some())), COLORS, Limits())
    assert len(pickle.dumps(COLORS)) < 2_000
    for broken in ({"kind": "tiff"}, {"overlap": "alphabet"}, {"background": "0"}):
        with pytest.raises(ValueError, match="unknown mask form"):
            MaskForm.from_json({**form.to_json(), **broken})


def test_only_the_most_common_unknown_colors_are_listed_but_all_counted():
    rgb = np.random.default_rng(0).integers(1, 7, (60, 80, 3)).astype(np.uint8)
    rgb[:10] = (200, 0, 9)
    expected = Counter("#" + bytes(p).hex() for p in rgb.reshape(-1, 3))
    colors, count = unknown_colors(png(rgb), COLORS, Limits())
    assert count == len(expected) > MOST_COLORS == len(colors) and next(iter(colors)) == "#c80009"
    assert list(colors.values()) == [n for _, n in expected.most_common(MOST_COLORS)]
    assert all(expected[c] == n for c, n in colors.items())
