"""Polygons of Cityscapes, drawn as the data set's own tool draws them."""

import json
import math

import numpy as np
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import labels as OFFICIAL
from cityscapesscripts.preparation.json2labelImg import createLabelImage

from roadseg.data.masks import polygons
from roadseg.data.masks.form import UNKNOWN, MaskForm
from roadseg.data.masks.polygons import MAX_JSON_BYTES
from roadseg.data.masks.read import mask_bytes, read_ids, train_ids, unknown_names
from roadseg.errors import ImageError
from roadseg.images.decode import Limits
from roadseg.labels import CITYSCAPES, IGNORE, LabelClass, LabelSet

FORM = MaskForm("polygons", CITYSCAPES)
FEW = MaskForm(
    "polygons", LabelSet("few", (LabelClass("road", 3, 0, (0, 0, 0)), LabelClass("car", 5, 1, (0, 0, 0)))), 9
)


def text(objects, width=40, height=30) -> bytes:
    return json.dumps({"imgWidth": width, "imgHeight": height, "objects": objects}).encode()


def thing(label, polygon, **more):
    return {"label": label, "polygon": polygon, **more}


def official(data: bytes) -> np.ndarray:
    annotation = Annotation()
    annotation.fromJsonText(data.decode())
    return np.array(createLabelImage(annotation, "ids"))


def drawn(data: bytes, form: MaskForm = FORM) -> np.ndarray:
    return read_ids(data, form, Limits())


BOX = [[2, 2], [30, 2], [30, 20], [2, 20]]
ODD = {
    "nothing": [],
    "order": [thing("road", BOX), thing("car", [[5, 5], [9, 5], [9, 9]]), thing("sky", [[6, 6], [20, 6], [20, 12]])],
    "hole by order": [
        thing("building", BOX),
        thing("sky", [[8, 6], [14, 6], [14, 12]]),
        thing("pole", [[9, 7], [9, 11]]),
    ],
    "deleted": [thing("road", BOX), thing("car", BOX, deleted=1), thing("sky", [[1, 1]], deleted=True)],
    "group": [
        thing("cargroup", BOX),
        thing("persongroup", [[3, 3], [12, 3], [12, 18]]),
        thing("polegroup", [[0, 0], [9, 9]]),
    ],
    "not drawn": [thing("road", BOX), thing("license plate", [[3, 3], [12, 3], [12, 18]])],
    "void names": [
        thing("ego vehicle", BOX),
        thing("out of roi", [[0, 0], [40, 0], [40, 3]]),
        thing("dynamic", [[1, 9], [7, 9], [4, 14]]),
    ],
    "two points": [thing("road", BOX), thing("pole", [[0, 29], [39, 0]])],
    "one point twice": [thing("traffic sign", [[7, 7], [7, 7]])],
    "off the canvas": [
        thing("road", [[-50, 10], [90, 15], [90, 60], [-50, 80]]),
        thing("car", [[100, 100], [120, 100], [110, 130]]),
    ],
    "crossing itself": [thing("vegetation", [[2, 2], [35, 25], [35, 2], [2, 25]])],
    "fractions": [
        thing("wall", [[2.4, 2.6], [30.5, 1.49], [17.99, 22.01]]),
        thing("bus", [[-0.5, -0.5], [9.5, -0.5], [4, 9.9]]),
    ],
    "flat": [thing("fence", [[3, 9], [30, 9], [12, 9]]), thing("train", [[5, 1], [5, 29], [5, 12]])],
    "three numbers a point": [thing("road", [[1, 1, 0], [20, 1, 0], [9, 20, 0]])],
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_polygons_are_drawn_as_by_cityscapesscripts(name):
    data = text(ODD[name])
    ids = drawn(data)
    assert ids.dtype == np.uint8 and ids.shape == (30, 40)
    np.testing.assert_array_equal(ids, official(data))


def test_random_polygons_are_drawn_as_by_cityscapesscripts():
    rng = np.random.default_rng(5)
    names = [label.name for label in OFFICIAL] + ["cargroup", "ridergroup"]
    for _ in range(60):
        objects = []
        for _ in range(rng.integers(1, 12)):
            points = rng.integers(-15, 75, (rng.integers(2, 9), 2)).tolist()
            objects.append(thing(str(rng.choice(names)), points, deleted=int(rng.random() < 0.1)))
        data = text(objects, int(rng.integers(1, 64)), int(rng.integers(1, 64)))
        np.testing.assert_array_equal(drawn(data), official(data))


def test_a_polygon_of_one_point_is_refused():
    data = text([thing("road", BOX), thing("car", [[3, 3]])])
    with pytest.raises(TypeError):
        official(data)
    with pytest.raises(ImageError, match=r"object 1 \(car\) has 1 points; expected at least 2"):
        drawn(data)


def test_unknown_names_become_unknown_and_the_background_comes_from_the_form():
    data = text(
        [
            thing("road", BOX),
            thing("moose", [[20, 10], [30, 10], [30, 20]]),
            thing("cargroup", [[2, 2], [5, 2], [5, 5]]),
        ]
    )
    ids = drawn(data, FEW)
    assert ids.dtype == np.uint16 and set(np.unique(ids)) == {3, 5, 9, UNKNOWN}
    known = drawn(text([thing("road", BOX), thing("cargroup", [[2, 2], [5, 2], [5, 5]])]), FEW)
    assert known.dtype == np.uint8
    np.testing.assert_array_equal(np.where(ids == UNKNOWN, 3, ids), known)
    assert train_ids(ids, FEW)[12, 28] == IGNORE and train_ids(ids, FEW)[12, 3] == 0
    assert unknown_names(data, FEW) == {"moose": 1}


def test_the_label_of_a_polygon_file_is_its_bytes(tmp_path):
    (tmp_path / "a.json").write_bytes(text([]))
    data = mask_bytes(tmp_path, "a.json", FORM, Limits())
    assert data == text([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\x89PNG\r\n\x1a\n123", "the content is an image"),
        (b"[]", "no list of objects"),
        (b'{"objects": {}}', "no list of objects"),
        (text([], "40", 30), "the size is a string x 30"),
        (text([], True, 30), "the size is true or false x 30"),
        (text([], 0, 30), "the size is 0 x 30"),
        (text([], -1, 30), "the size is -1 x 30"),
        (text([], None, 30), "the size is null x 30"),
        (text([], 10**30, 1), "the size is a huge number"),
        (text([], 9000, 9000), r"9000 x 9000 = 81,000,000 pixels; expected at most 64,000,000"),
        (text([4]), "object 0 is 4"),
        (text([{"polygon": BOX}]), "object 0 is a mapping without a label"),
        (text([thing("road", None)]), r"object 0 \(road\) has no usable polygon"),
        (text([thing("road", [[1, "2"]])]), "no usable polygon"),
        (text([thing("road", [[1, True]])]), "no usable polygon"),
        (text([thing("road", [[1, 1e9], [2, 2]])]), "no usable polygon"),
        (text([thing("road", [[1], [2, 2]])]), "no usable polygon"),
        (text([thing("car", [[math.nan, 1]])]), "NaN is not a number"),
        (text([thing("car", [[7777, 1]])]).replace(b"7777", b"1e400"), "no usable polygon"),
        (b'{"imgWidth": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"objects": ' + b'{"a":' * 100_000, "nested too deep"),
    ],
)  # fmt: skip
def test_malformed_files_are_image_errors(data, message):
    with pytest.raises(ImageError, match=message):
        drawn(data)


def test_files_crafted_to_take_long_are_refused_before_drawing():
    with pytest.raises(ImageError, match="32,000,000"):
        drawn(b" " * (MAX_JSON_BYTES + 1))
    whole = [[0, 0], [2000, 0], [2000, 2000], [0, 2000]]
    with pytest.raises(ImageError, match="far too long to draw"):
        drawn(text([thing("road", whole)] * 250, 2000, 2000))
    zigzag = [[i % 2 * 200, i % 199] for i in range(20_000)]
    with pytest.raises(ImageError):
        drawn(text([thing("road", zigzag)] * 3, 200, 200))


def test_points_are_bounded(monkeypatch):
    monkeypatch.setattr(polygons, "MAX_POINTS", 8)
    assert drawn(text([thing("road", BOX), thing("car", BOX)])).shape == (30, 40)
    with pytest.raises(ImageError, match=r"up to object 2 \(car\) have 12 points; expected at most 8"):
        drawn(text([thing("road", BOX), thing("car", BOX), thing("car", BOX)]))


@pytest.mark.parametrize("name", ["\ud800", "a\x1b[2J", "a\nb", "x" * 1000])
def test_names_in_messages_are_printable(name):
    with pytest.raises(ImageError, match="no usable polygon") as caught:
        drawn(text([thing(name, None)]))
    message = str(caught.value)
    assert message.isprintable() and message.encode() and len(message) < 200


def test_outlines_with_too_many_row_crossings_are_refused():
    zigzag = [[i % 2000, i % 2 * 1999] for i in range(20_000)]  # far less work than layers and points allow
    with pytest.raises(ImageError):
        drawn(text([thing("road", zigzag)], 2000, 2000))
    outside = [[i % 2000, -9 - i % 2 * 1999] for i in range(20_000)]
    assert drawn(text([thing("road", outside)], 2000, 2000)).shape == (2000, 2000)
