"""COCO JSON: the file's index, polygons and run lengths pixel for pixel, overlaps."""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from roadseg.data.masks import coco
from roadseg.data.masks.coco import open_annotations
from roadseg.data.masks.form import UNKNOWN, MaskForm
from roadseg.data.masks.read import mask_bytes, mask_path, read_ids, unknown_names
from roadseg.data.masks.rle import fill_polygon
from roadseg.errors import ImageError
from roadseg.images.decode import Limits
from roadseg.labels import IGNORE, LabelClass, LabelSet

CLASSES = (
    LabelClass("road", 1, 0, (0, 0, 0)),
    LabelClass("car", 2, 1, (0, 0, 0)),
    LabelClass("straße", 3, 2, (0, 0, 0)),
    LabelClass("unlabeled", 255, IGNORE, (0, 0, 0)),
)
FORM = MaskForm("coco", LabelSet("few", CLASSES), 255)
CATEGORIES = [{"id": 10, "name": "road"}, {"id": 20, "name": "car"}, {"id": 30, "name": "moose"}]


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def annotation(category, segmentation, image=1, **more):
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "bbox": [0, 0, 1, 1], **more}


def file(annotations, width=16, height=12, categories=CATEGORIES, **more) -> bytes:
    images = [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}, *more.pop("images", [])]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories, **more}).encode()


def part(data: bytes, key="1") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.json", data)
        return mask_bytes(path.parent, f"a.json#{key}", FORM, Limits())


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def drawn(annotations, form=FORM, **more) -> np.ndarray:
    return read_ids(part(file(annotations, **more)), form, Limits())


def slow_polygon(points, width, height) -> np.ndarray:
    """COCO's rule, point by point: walk the outline on a grid 5 times as fine; each time it passes from
    the left to the right half of a column of pixels, or back, all pixels below change sides."""
    grid = [(int(5 * x + 0.5), int(5 * y + 0.5)) for x, y in points]
    walk = []
    for (x0, y0), (x1, y1) in zip(grid, grid[1:] + grid[:1], strict=True):
        dx, dy = x1 - x0, y1 - y0
        n = max(abs(dx), abs(dy))
        swap = (dx < 0) if abs(dx) >= abs(dy) else (dy < 0)
        ax, ay, bx, by = (x1, y1, x0, y0) if swap else (x0, y0, x1, y1)
        for i in range(n + 1):
            t = n - i if swap else i
            if n == 0:
                walk.append((ax, ay))
            elif abs(dx) >= abs(dy):
                walk.append((ax + t, int(ay + (by - ay) / n * t + 0.5)))
            else:
                walk.append((int(ax + (bx - ax) / n * t + 0.5), ay + t))
    mask = np.zeros((height, width), bool)
    for (u0, v0), (u1, v1) in zip(walk, walk[1:], strict=False):
        column = (min(u0, u1) - 2) / 5
        if u0 != u1 and column == int(column) and 0 <= column < width:
            top = math.ceil(min(max((min(v0, v1) + 0.5) / 5 - 0.5, 0), height))
            mask[top:, int(column)] ^= True
    return mask


def slow_runs(text: str) -> list[int]:
    """One number after the other, as the format's description has it."""
    numbers: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[at]) - 48
            value |= (code & 31) << shift
            more, shift, at = bool(code & 32), shift + 5, at + 1
            if not more and code & 16:
                value -= 1 << shift
        numbers.append(value + numbers[-2] if len(numbers) > 2 else value)
    return numbers


def compressed(counts: list[int]) -> str:
    text = ""
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text += chr(48 + (code | 32 if more else code))
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *edges.tolist(), flat.size]
    runs = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return [0, *runs] if flat[0] else runs


# Made with pycocotools 2.0.11: mask.merge(mask.frPyObjects([polygon], height, width))["counts"].
PYCOCOTOOLS = [
    ([1.0, 1.0, 11.5, 2.2, 9.9, 9.1, 3.3, 7.7], 12, 16, "=1;3M3M0001O01O0000N2Lb1"),
    ([-3.2, 4.4, 20.7, -2.5, 14.1, 15.9], 12, 16, "348001O1N101O1N101O00l1"),
    ([2, 2, 13, 10, 13, 2, 2, 10], 12, 16, "j085N2N1O2O<0C101N2N2Q1"),
    ([0, 0, 16, 0, 16, 12, 0, 12], 12, 16, "0P6"),
    ([5.5, 0.5, 5.5, 11.5, 6.49, 11.5, 6.51, 0.5], 12, 16, "Y25b3"),
    ([20, 20, 30, 20, 30, 30], 12, 16, "P6"),
    ([10.25, 1.5, 3.75, 9.0, 17.5, 4.25, 1.0, 2.0, 12.0, 11.75], 12, 16, "j01;1O1IN32KN62JN6170GOO161K0NO20500O10L"),
]


def placed(ring, width, height):
    out = np.zeros((height, width), bool)
    x, y, mask = fill_polygon(np.array(ring, float).reshape(-1, 2), width, height)
    out[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    return out


@pytest.mark.parametrize(("polygon", "height", "width", "counts"), PYCOCOTOOLS)
def test_polygons_cover_the_same_pixels_as_by_pycocotools(polygon, height, width, counts):
    mask = placed(polygon, width, height)
    assert compressed(runs_of(mask)) == counts
    np.testing.assert_array_equal(drawn([annotation(10, [polygon])], width=width, height=height) == 1, mask)


def test_polygons_are_filled_by_cocos_rule():
    rng = np.random.default_rng(3)
    for i in range(150):
        width, height = (int(v) for v in rng.integers(1, 30, 2))
        points = rng.uniform(-12, 40, (rng.integers(3, 9), 2))
        points = np.round(points * 2) / 2 if i % 2 else points
        np.testing.assert_array_equal(
            placed(points, width, height), slow_polygon(points.tolist(), width, height), err_msg=str(points.tolist())
        )


def test_compressed_and_plain_run_lengths_are_read():
    rng = np.random.default_rng(1)
    for share in (0, 0.03, 0.5, 0.97, 1) * 6:
        mask = rng.random((12, 16)) < share
        counts = runs_of(mask)
        assert slow_runs(compressed(counts)) == counts
        for form in (counts, compressed(counts)):
            ids = drawn([annotation(20, {"size": [12, 16], "counts": form}, iscrowd=1)])
            np.testing.assert_array_equal(ids, np.where(mask, 2, 255))


def test_several_polygons_are_one_shape_and_the_rest_is_background():
    ids = drawn([annotation(10, [square(1, 1, 4), square(3, 3, 5), square(12, 9, 9)])])
    expected = np.full((12, 16), 255, np.uint8)
    expected[1:5, 1:5] = expected[3:8, 3:8] = expected[9:, 12:] = 1
    np.testing.assert_array_equal(ids, expected)
    assert (drawn([], form=MaskForm("coco", FORM.label_set, 2)) == 2).all()


def test_smaller_areas_are_drawn_over_larger_ones_and_all_over_crowds():
    small, large = annotation(20, [square(2, 2, 4)]), annotation(10, [square(0, 0, 10)])
    crowd = annotation(20, {"size": [12, 16], "counts": [0, 36, 156]}, iscrowd=1)  # three columns
    for order in ([small, large, crowd], [crowd, large, small], [large, crowd, small]):
        ids = drawn(order)
        assert (ids[2:6, 2:6] == 2).all() and (ids[7:10, :3] == 1).all() and (ids[11, :3] == 2).all()
    twins = [annotation(10, [square(2, 2, 4)]), annotation(20, [square(2, 2, 4)])]
    assert drawn(twins)[3, 3] == 2 and drawn(twins[::-1])[3, 3] == 1  # of equal ones the later is above


def test_overlap_order_draws_in_file_order():
    form = MaskForm("coco", FORM.label_set, 255, "order")
    small, large = annotation(20, [square(2, 2, 4)]), annotation(10, [square(0, 0, 10)])
    assert drawn([small, large], form)[3, 3] == 1 and drawn([large, small], form)[3, 3] == 2
    assert form.digest != FORM.digest and MaskForm.from_json(form.to_json()) == form


def test_categories_are_matched_by_name_or_by_id_if_unnamed():
    both = [annotation(20, [square(1, 1, 3)]), annotation(2, [square(8, 1, 3)])]
    ids = drawn(both)
    assert ids[2, 2] == 2 and ids[2, 9] == 2
    strange = [
        annotation(30, [square(1, 1, 3)]),
        annotation(77, [square(8, 1, 3)]),
        annotation(None, [square(5, 5, 3)]),
    ]
    ids = drawn(strange)
    assert ids.dtype == np.uint16 and ids[2, 2] == ids[2, 9] == ids[6, 6] == UNKNOWN
    assert unknown_names(part(file(strange)), FORM) == {"moose": 1, "id 77": 1, "id null": 1}


def test_one_images_part_is_read_without_the_rest(tmp_path):
    other = {"id": "b-2", "file_name": "b.jpg", "width": 4, "height": 3}
    rows = [
        annotation(20, [square(0, 0, 2)], image="b-2"),
        annotation(10, [square(1, 1, 3)]),
        annotation(20, [square(0, 0, 1)], image="b-2"),
    ]
    data = file(rows, images=[other], info={"contributor": 'Ä, ] } " \\'})
    write(tmp_path / "train.json", data)
    assert mask_path("x/train.json#b-2", FORM) == ("x/train.json", "b-2")
    entry = json.loads(mask_bytes(tmp_path, "train.json#b-2", FORM, Limits()))
    assert (entry["width"], entry["height"]) == (4, 3)
    assert [a["segmentation"] for a in entry["annotations"]] == [[square(0, 0, 2)], [square(0, 0, 1)]]
    with pytest.raises(ImageError, match="no image with the id 3"):
        mask_bytes(tmp_path, "train.json#3", FORM, Limits())


def test_formatting_does_not_change_the_bytes_of_a_part():
    rows = [annotation(20, [square(0, 0, 2)])]
    first = file(rows, info={"year": 2020})
    spread = json.dumps(json.loads(first), indent=4, ensure_ascii=False, sort_keys=True).encode()
    assert part(first) == part(spread) == part(b"\xef\xbb\xbf" + first)
    assert part(first) != part(file([annotation(10, [square(0, 0, 2)])]))
    assert part(first) != part(file(rows, width=17))


@pytest.mark.parametrize("ascii_only", [True, False])
def test_non_ascii_names_do_not_shift_byte_offsets(tmp_path, ascii_only):
    content = json.loads(file([annotation(40, [square(1, 1, 3)], note="日本")]))
    content["categories"] = [{"id": 40, "name": "straße"}]
    content["images"][0]["file_name"] = "größe/a.jpg"
    path = write(tmp_path / "a.json", json.dumps(content, ensure_ascii=ascii_only).encode())
    assert open_annotations(path, Limits()).file_names == {"1": "größe/a.jpg"}
    assert read_ids(mask_bytes(tmp_path, "a.json#1", FORM, Limits()), FORM, Limits())[2, 2] == 3


def test_a_file_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", file([annotation(20, [square(0, 0, 2)])]))
    scans = []
    index = coco._index
    monkeypatch.setattr(coco, "_index", lambda *args: scans.append(1) or index(*args))
    first = [mask_bytes(tmp_path, "a.json#1", FORM, Limits()) for _ in range(5)]
    assert len(scans) == 1 and len(set(first)) == 1
    write(path, file([annotation(10, [square(0, 0, 2)])]))
    os.utime(path, ns=(1, 1))
    assert mask_bytes(tmp_path, "a.json#1", FORM, Limits()) != first[0] and len(scans) == 2


def test_a_large_file_leaves_only_its_index_in_memory(tmp_path):
    rows = [annotation(20, [square(i % 9, 0, 2)], image=1 + i % 500, id=i) for i in range(20_000)]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 16, "height": 12} for i in range(2, 501)]
    path = write(tmp_path / "a.json", file(rows, images=images))
    index = open_annotations(path, Limits())
    assert sum(len(spans) for spans in index.annotations.values()) == 20_000
    assert sum(spans.nbytes for spans in index.annotations.values()) < path.stat().st_size / 5
    assert len(json.loads(mask_bytes(tmp_path, "a.json#500", FORM, Limits()))["annotations"]) == 40


ONE = '{"id": 1, "file_name": "a", "width": 4, "height": 4}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"[1]", "not valid JSON"),
        (file([])[:-1], "cut off"),
        (file([])[:40], "not valid JSON|cut off"),
        (b"\x89PNG\r\n\x1a\n", "is an image"),
        (b"{}", "no annotations and no images"),
        (b'{"images": [], "images": []}', "doubled"),
        (b'{"images": [{"id": 1}], "annotations": []}', "image 0 has no usable id or no file_name"),
        (b'{"images": [{"id": 1.5, "file_name": "a"}], "annotations": []}', "image 0 has no usable id"),
        (b'{"images": [{"id": "../a", "file_name": "a"}], "annotations": []}', "image 0 has no usable id"),
        (f'{{"images": [{ONE}, {ONE}], "annotations": []}}'.encode(), "two images have the id 1"),
        (b'{"images": [], "annotations": [5]}', "annotation 0 has no usable image_id"),
        (file([], categories=[{"id": 1}]), "category 0 has no usable id or no name"),
        (file([], categories=CATEGORIES * 2), "two categories have the id 10"),
        (f'{{"images": [{ONE}], "annotations": [{"[" * 100_000}'.encode(), "nested too deep"),
        (f'{{"images": [{ONE}], "annotations": [{{"image_id": NaN}}]}}'.encode(), "NaN is not a number"),
        (f'{{"images": [{ONE[:-1]}, "note": "\xff"}}], "annotations": []}}'.encode("latin-1"), "not valid JSON"),
        (file([], width=9000, height=9000), "9000 x 9000 = 81,000,000 pixels; expected at most"),
        (file([], width="16"), "the size is a string x 12"),
        (file([annotation(10, [])]), r"annotation 0 of the image \(road\) has a box but no outline"),
        (file([annotation(10, None)]), "has a box but no outline"),
        (file([annotation(10, 5)]), "segmentation is 5"),
        (file([annotation(10, [[1, 2, 3, 4]])]), "a polygon of 4 values"),
        (file([annotation(10, [[1, 2, 3, 4, 5, 6, 7]])]), "a polygon of 7 values"),
        (file([annotation(10, [[1, 2, 3, 4, 5, "6"]])]), "a polygon of 6 values"),
        (file([annotation(10, [[1, 2, 3, 4, 5, 1e99]])]), "a polygon of 6 values"),
        (file([annotation(10, [7])]), "has 7"),
        (file([annotation(10, {"size": [16, 12], "counts": [192]})]), "for 12 x 16 pixels; expected the image's"),
        (file([annotation(10, {"counts": [192]})]), "run lengths are for null pixels"),
        (file([annotation(10, {"size": [12, 16], "counts": [191]})]), "do not add up"),
        (file([annotation(10, {"size": [12, 16], "counts": [-1, 193]})]), "counts is a list"),
        (file([annotation(10, {"size": [12, 16], "counts": [192.0]})]), "counts is a list"),
        (file([annotation(10, {"size": [12, 16], "counts": None})]), "counts is null"),
        (file([annotation(10, {"size": [12, 16], "counts": ""})]), "not a compressed run-length string"),
        (file([annotation(10, {"size": [12, 16], "counts": "~é"})]), "not a compressed run-length string"),
        (file([annotation(10, {"size": [12, 16], "counts": "PPPP"})]), "not a compressed run-length string"),
        (file([annotation(10, {"size": [12, 16], "counts": "o" * 20 + "0"})]), "number of over 40 bits"),
        (file([annotation(10, {"size": [12, 16], "counts": "0000"})]), "do not add up"),
    ],
)  # fmt: skip
def test_malformed_files_are_image_errors(data, message):
    with pytest.raises(ImageError, match=message):
        read_ids(part(data), FORM, Limits())


def test_files_made_to_take_long_are_refused():
    with pytest.raises(ImageError):
        drawn([annotation(10, {"size": [12, 16], "counts": [0, 192]})] * 201)
    wild = [v for i in range(50) for v in (i % 2 * 1_000_000, i)]
    with pytest.raises(ImageError):
        drawn([annotation(10, [wild])])


def test_a_whole_coco_file_is_not_a_label():
    with pytest.raises(ImageError):
        read_ids(file([]), FORM, Limits())


def test_the_file_size_is_checked_before_it_is_read(tmp_path):
    write(tmp_path / "a.json", file([]))
    with pytest.raises(ImageError, match="expected at most 10"):
        mask_bytes(tmp_path, "a.json#1", FORM, Limits(max_bytes=10))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, {"a": []}, "text", 3])
def test_what_is_not_a_list_is_refused(tmp_path, key, value):
    data = {"images": [], "annotations": [], "categories": [], key: value}
    with pytest.raises(ImageError, match=f"{key} is not a list"):
        open_annotations(write(tmp_path / "a.json", json.dumps(data).encode()), Limits())


def test_annotations_without_an_image_are_counted(tmp_path):
    ring = [square(1, 1, 3)]
    rows = [annotation(10, ring, image=i) for i in (5, 1, 5, "x", 1)]
    found = open_annotations(write(tmp_path / "a.json", file(rows)), Limits())
    assert found.strays == {"5": 2, "x": 1} and {k: len(v) for k, v in found.annotations.items()} == {"1": 2}


@pytest.mark.parametrize("name", ["\ud800", "a\x1b[2J", "x" * 1000])
def test_category_names_in_messages_are_printable(name):
    more = {"categories": [{"id": 10, "name": name}]}
    with pytest.raises(ImageError, match="no outline") as caught:
        drawn([annotation(10, [])], **more)
    counted = unknown_names(part(file([annotation(10, [square(1, 1, 3)])], **more)), FORM)
    for name in (str(caught.value), *counted):
        assert name.isprintable() and name.encode() and len(name) < 250
