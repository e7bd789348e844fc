"""The folder source: every form of masks from a short YAML, and errors in the YAML."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.data.masks.read import mask_bytes, read_ids, train_ids
from roadseg.errors import ConfigError
from roadseg.images.decode import Limits, encode_label_png
from roadseg.ingest.sources import folder
from roadseg.ingest.sources.folder import Description, read_description
from roadseg.labels import IGNORE, in_cityscapes

SPLITS = "splits:\n  train: {images: images, labels: masks}\n"
NAMES = "classes:\n  - {name: road}\n  - {name: car}\n"


def described(tmp_path: Path, text: str) -> Description:
    (tmp_path / "labels.yaml").write_text(text)
    return read_description(tmp_path / "labels.yaml")


def write(path: Path, data: bytes | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", data)[1].tobytes() if isinstance(data, np.ndarray) else data)


def learned(root: Path, description: Description) -> dict[str, np.ndarray]:
    """Train ids by pair name, as later stages read them."""
    pairs, findings = folder.pairs(root, description)
    assert findings == []
    form = description.form
    return {p.name: train_ids(read_ids(mask_bytes(root, p.label, form, Limits()), form, Limits()), form) for p in pairs}


EXPECTED = np.full((8, 10), IGNORE, np.uint8)
EXPECTED[4:] = 0
EXPECTED[5:7, 2:6] = 1
IMAGE = np.zeros((8, 10, 3), np.uint8)
PICTURE = cv2.imencode(".jpg", IMAGE)[1].tobytes()


def values(void: int, road: int, car: int) -> np.ndarray:
    return np.select([EXPECTED == 0, EXPECTED == 1], [road, car], void).astype(np.uint8)


def test_masks_of_ids(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a.png", values(0, 3, 9))
    description = described(tmp_path, f"classes: [{{id: 3, name: road}}, {{id: 9, name: car}}]\nignore: [0]\n{SPLITS}")
    np.testing.assert_array_equal(learned(tmp_path, description)["a"], EXPECTED)
    assert description.form.kind == "ids" and description.label_set.names == ("road", "car")


def test_masks_of_0_and_255(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a.png", values(0, 255, 255))
    text = f"classes: [{{id: 0, name: background}}, {{id: 255, name: road}}]\n{SPLITS}"
    np.testing.assert_array_equal(learned(tmp_path, described(tmp_path, text))["a"], EXPECTED != IGNORE)


def test_palette_masks_by_index_and_by_color(tmp_path):
    palette = np.zeros((256, 3), np.uint8)
    palette[[3, 9]] = [(128, 64, 128), (0, 0, 142)]
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a.png", encode_label_png(values(0, 3, 9), palette))
    indexes = f"masks: palette\nclasses: [{{id: 3, name: road}}, {{id: 9, name: car}}]\nignore: [0]\n{SPLITS}"
    np.testing.assert_array_equal(learned(tmp_path, described(tmp_path, indexes))["a"], EXPECTED)
    colours = f"""
masks: colors
classes: [{{name: road, color: [128, 64, 128]}}, {{name: car, color: '#00008E'}}]
ignore: ['#000000']
{SPLITS}"""
    description = described(tmp_path, colours)
    np.testing.assert_array_equal(learned(tmp_path, description)["a"], EXPECTED)
    assert [c.id for c in description.label_set.classes] == [0, 1, 2]


def test_rgb_color_masks(tmp_path):
    rgb = np.zeros((8, 10, 3), np.uint8)
    rgb[EXPECTED == 0], rgb[EXPECTED == 1] = (10, 20, 30), (10, 20, 31)
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a_color.png", rgb[..., ::-1])
    text = f"""
masks: colors
classes: [{{name: road, color: [10, 20, 30]}}, {{name: car, color: [10, 20, 31]}}]
ignore: [[0, 0, 0]]
label_suffix: _color
{SPLITS}"""
    np.testing.assert_array_equal(learned(tmp_path, described(tmp_path, text))["a"], EXPECTED)


def polygons() -> bytes:
    rows = [("sky", [[0, 0], [9, 0], [9, 2], [0, 2]]), ("road", [[0, 4], [9, 4], [9, 7], [0, 7]])]
    rows += [("cargroup", [[2, 5], [5, 5], [5, 6], [2, 6]])]
    objects = [{"label": name, "polygon": points} for name, points in rows]
    return json.dumps({"imgWidth": 10, "imgHeight": 8, "objects": objects}).encode()


def test_polygons_as_cityscapes_writes_them(tmp_path):
    write(tmp_path / "images/ulm/a_leftImg8bit.png", IMAGE)
    write(tmp_path / "masks/ulm/a_gtFine_polygons.json", polygons())
    write(tmp_path / "masks/ulm/a_gtFine_labelIds.png", EXPECTED)  # no label here
    ends = "image_suffix: _leftImg8bit\nlabel_suffix: _gtFine_polygons\n"
    description = described(tmp_path, f"masks: polygons\n{NAMES}ignore: [sky]\n{ends}{SPLITS}")
    found = learned(tmp_path, description)
    assert list(found) == ["ulm/a"]
    np.testing.assert_array_equal(found["ulm/a"], EXPECTED)
    assert description.label_set.classes[-1].name == "unlabeled" and description.background == 255


def coco_file(*images: dict, rows: tuple[tuple[int, list[float]], ...] = ()) -> bytes:
    annotations = [{"image_id": 7, "category_id": c, "segmentation": [ring]} for c, ring in rows]
    categories = [{"id": 4, "name": "road"}, {"id": 2, "name": "car"}]
    images = tuple({"width": 10, "height": 8, **i} for i in images)
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode()


COCO = f"masks: coco\n{NAMES}splits:\n  train: {{images: images, annotations: coco/train.json}}\n"
ROWS = ((2, [2, 5, 6, 5, 6, 7, 2, 7]), (4, [0, 4, 10, 4, 10, 8, 0, 8]))


def test_coco_json(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "coco/train.json", coco_file({"id": 7, "file_name": "a.jpg"}, rows=ROWS))
    np.testing.assert_array_equal(learned(tmp_path, described(tmp_path, COCO))["a"], EXPECTED)
    assert folder.pairs(tmp_path, described(tmp_path, COCO))[0][0].label == "coco/train.json#7"
    ordered = learned(tmp_path, described(tmp_path, COCO + "overlap: order\n"))["a"]
    np.testing.assert_array_equal(ordered, np.where(EXPECTED == 1, 0, EXPECTED))
    filled = learned(tmp_path, described(tmp_path, COCO + "background: car\n"))["a"]
    np.testing.assert_array_equal(filled, np.where(EXPECTED == IGNORE, 1, EXPECTED))


@pytest.mark.parametrize("written", ["x/a.jpg", "./x/a.jpg", "images/x/a.jpg", "C:\\data\\x\\a.jpg", "x/a.png", "x/a"])
def test_coco_file_names_may_differ_in_folders_and_extension(tmp_path, written):
    write(tmp_path / "images/x/a.jpg", PICTURE)
    write(tmp_path / "coco/train.json", coco_file({"id": 7, "file_name": written}))
    pairs, findings = folder.pairs(tmp_path, described(tmp_path, COCO))
    assert findings == [] and [(p.name, p.label) for p in pairs] == [("x/a", "coco/train.json#7")]


def test_unmatched_coco_images_are_listed(tmp_path):
    for name in ("a", "b", "twice"):
        write(tmp_path / f"images/{name}.jpg", PICTURE)
    images = [(7, "a.jpg"), (8, "gone.jpg"), (9, "bad\x1b.jpg"), (10, "twice.jpg"), (11, "y/twice.jpg")]
    write(tmp_path / "coco/train.json", coco_file(*({"id": i, "file_name": name} for i, name in images)))
    pairs, findings = folder.pairs(tmp_path, described(tmp_path, COCO))
    assert [p.name for p in pairs] == ["a"]
    assert {f.code: f.files for f in findings} == {
        "missing-label": ("images/b.jpg",),
        "missing-image": ("coco/train.json#8: gone.jpg", "coco/train.json#9: bad\\x1b.jpg"),
        "doubled-file": ("coco/train.json#10 = coco/train.json#11",),
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [(None, "No such file"), (b"{", "cut off"), (b" " * 5000, "5,000 bytes; expected at most 4,000")],
)
def test_an_unreadable_coco_file_is_a_finding(tmp_path, data, expected):
    write(tmp_path / "images/a.jpg", PICTURE)
    if data is not None:
        write(tmp_path / "coco/train.json", data)
    pairs, findings = folder.pairs(tmp_path, described(tmp_path, COCO), Limits(max_bytes=4000))
    assert pairs == [] and [(f.code, f.severity, f.split) for f in findings] == [("unreadable-label", "error", "train")]
    assert findings[0].files[0].startswith("coco/train.json: ") and expected in findings[0].files[0]


def test_the_background_is_void_by_default(tmp_path):
    text = f"masks: polygons\n{NAMES}{SPLITS}"
    for more, id_, train_id in (("", 255, IGNORE), ("background: car\n", 1, 1), ("background: 0\n", 0, 0)):
        description = described(tmp_path, text + more)
        assert (description.background, int(description.form.id_to_train[description.background])) == (id_, train_id)
    own = described(tmp_path, text + "ignore: [unlabeled]\n")
    assert own.background == 2 and [c.name for c in own.label_set.classes] == ["road", "car", "unlabeled"]


def test_ids_are_optional_for_masks_without_ids(tmp_path):
    text = (
        f"masks: coco\nclasses: [{{name: road}}, {{id: 0, name: car}}, {{id: 2, name: van}}, {{name: bus}}]\n{SPLITS}"
    )
    classes = described(tmp_path, text.replace("labels: masks", "annotations: a.json")).label_set.classes
    assert [(c.name, c.id) for c in classes] == [("road", 1), ("car", 0), ("van", 2), ("bus", 3), ("unlabeled", 255)]


def test_classes_name_their_counterparts_in_cityscapes(tmp_path):
    text = f"""
classes:
  - {{id: 0, name: Strasse, cityscapes: road}}
  - {{id: 1, name: car}}
  - {{id: 2, name: bus, cityscapes: ''}}
  - {{id: 3, name: lamp, cityscapes: traffic light, ignore: true}}
{SPLITS}"""
    mapped = in_cityscapes(described(tmp_path, text).label_set)
    assert [c.train_id for c in mapped.classes] == [0, 13, IGNORE, 6]


WRONG = {
    "masks: color": "masks: is the text 'color'; perhaps you meant colors",
    "masks: [1]": "masks: is a list; expected one of ids, palette, colors, polygons, coco",
    "masks: coco\nlabel_suffix: _x": "label_suffix: not for masks: coco",
    "masks: coco": "splits.train.labels: unknown key\n  splits.train.annotations: is empty; expected a .json file",
    "masks: ids\nbackground: 0": "background: only for masks: polygons or coco",
    "masks: polygons\nbackground: raod": "background: is the text 'raod', not a class; perhaps you meant road",
    "masks: polygons\nbackground: [1]": "background: is a list, not a class",
    "masks: polygons\nignore: [3]": "ignore: is [3]; expected a list of names",
    "masks: polygons\nignore: [road]": "the name road is given 2 times",
    "masks: colors": "classes.0.color: is empty; expected the class's colour in the masks",
    "masks: colors\nignore: [0]": "ignore: is [0]; expected a list of colours",
    "overlap: order": "overlap: is the text 'order'; expected area or order, with masks: coco",
    "masks: coco\noverlap: size": "overlap: is the text 'size'; expected area or order",
    "mask: ids": "mask: unknown key; perhaps you meant masks",
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_state_what_was_expected(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        described(tmp_path, text + f"\nclasses: [{{id: 0, name: road}}, {{id: 1, name: car}}]\n{SPLITS}")
    assert WRONG[text] in str(caught.value)


def test_all_errors_are_listed_at_once(tmp_path):
    text = """
masks: colors
classes:
  - {name: road, color: [1, 2, 3], cityscapes: raod}
  - {name: car, color: '#010203', cityscapes: [car]}
  - {name: sky, color: '#01020'}
  - {name: sign, color: [1, 2, 3], id: 256}
  - {name: pole, color: '#010203', cityscapes: starship}
  - {name: tree, color: [1, 2, 3]}
  - {name: bush, color: '#010203'}
splits: {train: {images: "a\\nb", labels: m}, val: {images: i, annotations: a.json}}
"""
    with pytest.raises(ConfigError) as caught:
        described(tmp_path, text)
    for text in (
        "classes.0.cityscapes: is the text 'raod', not a train class of Cityscapes; perhaps you meant road",
        "classes.1.cityscapes: is a list",
        "classes.2.color: is '#01020'; expected [red, green, blue] in 0..255, or '#rrggbb'",
        "classes.3.id: is 256",
        "classes.4.cityscapes: is the text 'starship', not a train class of Cityscapes; expected one of road, sidewalk",
        "classes: the color #010203 is given 2 times; expected once",
        "splits.train.images: is 'a\\nb'",
        "splits.val.annotations: unknown key",
        "splits.val.labels: is empty; expected a folder",
    ):
        assert text in str(caught.value)


def test_a_coco_split_names_a_json_file_below_the_root(tmp_path):
    for value in ("../a.json", "/a.json", "a.txt"):
        with pytest.raises(ConfigError) as e:
            described(tmp_path, COCO.replace("coco/train.json", value))
        assert "splits.train.annotations: " in e.value.found


def test_more_than_256_classes_are_refused(tmp_path):
    rows = "".join(f"  - {{name: c{i}}}\n" for i in range(257))
    with pytest.raises(ConfigError) as e:
        described(tmp_path, f"masks: polygons\nclasses:\n{rows}{SPLITS}")
    assert "257" in e.value.found


def test_the_examples_in_the_docs_are_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs/folder.md").read_text()
    examples = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]
    assert len(examples) >= 5
    assert {described(tmp_path, text).masks for text in examples} == {"ids", "palette", "colors", "polygons", "coco"}


def test_annotations_of_no_image_are_a_finding(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    data = json.loads(coco_file({"id": 7, "file_name": "a.jpg"}, rows=ROWS))
    data["annotations"] += [{"image_id": 8, "category_id": 4}] * 3 + [{"image_id": "9: x", "category_id": 4}]
    write(tmp_path / "coco/train.json", json.dumps(data).encode())
    pairs, [finding] = folder.pairs(tmp_path, described(tmp_path, COCO))
    assert [p.name for p in pairs] == ["a"]
    assert (finding.code, finding.severity, finding.split, finding.count) == ("missing-image", "error", "train", 4)
    assert finding.files == ("coco/train.json#8: 3 annotations", "coco/train.json#9: x: 1 annotation")


def test_coco_image_ids_may_contain_separators(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    images = (("a: b", "gone.jpg"), ("a", "A.jpg"), ("c: d", "a.jpg"))
    write(tmp_path / "coco/train.json", coco_file(*({"id": i, "file_name": name} for i, name in images)))
    findings = folder.pairs(tmp_path, described(tmp_path, COCO))[1]
    assert [f.files for f in findings if f.code == "missing-image"] == [
        ("coco/train.json#a: A.jpg", "coco/train.json#a: b: gone.jpg")
    ]


def test_a_missing_split_folder_is_a_finding(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a.png", values(0, 0, 1))
    classes = "classes: [{id: 0, name: road}, {id: 1, name: car}]\n"
    text = f"{classes}{SPLITS}  val: {{images: imagse/val, labels: masks/val}}\n"
    pairs, [finding] = folder.pairs(tmp_path, described(tmp_path, text))
    assert [p.split for p in pairs] == ["train"]
    assert (finding.code, finding.severity, finding.split) == ("empty-split", "error", "val")
    assert "no folder imagse/val/" in finding.message and "splits.val.images" in finding.fix


def test_a_wrong_label_suffix_is_reported_and_case_is_ignored(tmp_path):
    write(tmp_path / "images/a.jpg", PICTURE)
    write(tmp_path / "masks/a_Mask.png", values(0, 0, 1))
    text = f"classes: [{{id: 0, name: road}}, {{id: 1, name: car}}]\n{SPLITS}label_suffix: "
    for suffix in ("_mask", "_MASK", "_mask.PNG"):
        pairs, findings = folder.pairs(tmp_path, described(tmp_path, text + suffix))
        assert [p.name for p in pairs] == ["a"] and findings == []
    [finding] = folder.pairs(tmp_path, described(tmp_path, text + "_label"))[1]
    assert finding.code == "missing-label" and "label_suffix '_label'" in finding.fix
    assert "masks/a_Mask.png" in finding.fix


def test_at_most_255_classes_are_learned(tmp_path):
    def rows(count: int) -> str:
        return "masks: polygons\nclasses:\n" + "".join(f"  - {{name: c{i}}}\n" for i in range(count)) + SPLITS

    assert described(tmp_path, rows(255)).label_set.num_classes == 255
    with pytest.raises(ConfigError) as e:
        described(tmp_path, rows(256))
    assert "256" in e.value.found
    full = rows(255).replace("splits", "  - {name: void, ignore: true}\nsplits")
    with pytest.raises(ConfigError) as e:
        described(tmp_path, full)
    assert "background" in e.value.found
    assert described(tmp_path, full + "background: void\n").background == 255


BOMB = "x: &a0 [z, z, z]\n" + "".join(f"x{i}: &a{i + 1} [{f'*a{i}, ' * 4}]\n" for i in range(15))


@pytest.mark.parametrize(
    "text",
    [
        BOMB
        + "".join(
            f"{key}: *a15\n" for key in ("ignore", "masks", "background", "overlap", "name", "sequence", "splits")
        ),
        f"{BOMB}classes: [{{id: *a15, name: *a15, color: *a15, train_id: *a15, cityscapes: *a15, ignore: *a15}}]",
        f"classes: [{{id: 0x{'f' * 6000}, name: road}}]",
        f"classes: [{{id: 0, name: road, color: 0x{'f' * 6000}}}]",
        f"classes: [{{id: {'1' * 6000}.5, name: {'a' * 6000}, color: {'b' * 6000}, {'c' * 6000}: 1}}]",
        f"masks: coco\nbackground: {'a' * 6000}\nsplits: {{{'a ' * 400}: {{images: {'../' * 6000}}}}}",
        'classes: [{id: 0, name: "a\\eb"}, {id: 1, name: "\\uD800"}]\nname: "\\e"\nignore: ["\\e"]\nmasks: coco',
    ],
)
def test_values_are_printed_short_and_printable(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        described(tmp_path, text)
    text = str(caught.value)
    assert len(text) < 3000 and text.encode() and text.replace("\n", "").isprintable()
