"""Pairing by name, in every source."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.errors import ConfigError, DataError
from roadseg.ingest.sources import camvid, cityscapes, folder
from roadseg.ingest.sources.folder import read_description
from roadseg.labels import IGNORE
from tests.conftest import touch


def frame(split: str, name: str, *kinds: str) -> list[str]:
    city = name.partition("_")[0]
    known = {"image": "leftImg8bit/{s}/{c}/{n}_leftImg8bit.png", "color": "gtFine/{s}/{c}/{n}_gtFine_color.png"}
    gt = {k: "gtFine/{s}/{c}/{n}_gtFine_" + k + ".png" for k in ("labelIds", "instanceIds", "labelTrainIds")}
    return [{**known, **gt}[k].format(s=split, c=city, n=name) for k in kinds]


def codes(findings) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(f.code, f.split, f.files) for f in findings]


def test_cityscapes_pairs_images_with_ids_and_instances(tmp_path):
    everything = ("image", "labelIds", "instanceIds", "labelTrainIds", "color")
    touch(tmp_path, *frame("train", "ulm_000003_000019", *everything), *frame("val", "bonn_000001_000019", *everything))
    touch(tmp_path, "leftImg8bit/train/ulm/.DS_Store", "leftImg8bit/train/ulm/notes.txt", "README")
    pairs, findings = cityscapes.pairs(tmp_path)
    assert findings == []
    train, val = pairs
    assert (train.split, train.name, train.sequence) == ("train", "ulm/ulm_000003_000019", "ulm_000003")
    assert [train.image, train.label, train.instances] == frame("train", "ulm_000003_000019", *everything[:3])
    assert (val.split, val.name) == ("val", "bonn/bonn_000001_000019")


def test_cityscapes_lists_unpaired_files(tmp_path):
    touch(tmp_path, *frame("train", "ulm_000000_000019", "image", "labelIds", "instanceIds"))
    touch(tmp_path, *frame("train", "ulm_000001_000019", "image"), *frame("train", "ulm_000002_000019", "labelIds"))
    touch(tmp_path, *frame("train", "ulm_000004_000019", "image", "labelIds"))
    pairs, findings = cityscapes.pairs(tmp_path)
    assert [p.name for p in pairs] == ["ulm/ulm_000000_000019", "ulm/ulm_000004_000019"]
    assert codes(findings) == [
        ("missing-label", "train", tuple(frame("train", "ulm_000001_000019", "image"))),
        ("missing-image", "train", tuple(frame("train", "ulm_000002_000019", "labelIds"))),
        ("missing-instances", "train", tuple(frame("train", "ulm_000004_000019", "labelIds"))),
    ]


def test_cityscapes_test_split_without_labels_is_left_out(tmp_path):
    touch(tmp_path, *frame("val", "ulm_000000_000019", "image", "labelIds"))
    touch(tmp_path, *frame("test", "bonn_000000_000019", "image"))
    pairs, findings = cityscapes.pairs(tmp_path)
    assert [p.split for p in pairs] == ["val"]
    assert [(f.code, f.severity, f.split) for f in findings] == [("no-labels", "warning", "test")]


@pytest.mark.parametrize("pairs", [cityscapes.pairs, camvid.pairs])
def test_a_wrong_root_lists_expected_paths_and_contents(pairs, tmp_path):
    touch(tmp_path, "holiday.png", "other/a.png")
    with pytest.raises(DataError) as e:
        pairs(tmp_path)
    assert "holiday.png, other/" in e.value.found and "train" in e.value.expected
    with pytest.raises(DataError) as e:
        pairs(tmp_path / "nowhere")
    assert e.value.where == str(tmp_path / "nowhere") and e.value.exit_code == 3
    with pytest.raises(DataError) as e:
        pairs(tmp_path / "holiday.png")
    assert e.value.where == str(tmp_path / "holiday.png")


def test_camvid_pairs_by_name_and_not_by_order(tmp_path):
    touch(tmp_path, "train/0001TP_1.png", "train/0006R0_f2.jpg", "train/Seq05VD_f9.png")
    touch(tmp_path, "trainannot/0006R0_f2.png", "trainannot/Seq05VD_f9.png", "trainannot/Seq05VD_g0.png", "train.txt")
    pairs, findings = camvid.pairs(tmp_path)
    assert [(p.image, p.label, p.sequence) for p in pairs] == [
        ("train/0006R0_f2.jpg", "trainannot/0006R0_f2.png", "0006R0"),
        ("train/Seq05VD_f9.png", "trainannot/Seq05VD_f9.png", "Seq05VD"),
    ]
    assert codes(findings) == [
        ("missing-label", "train", ("train/0001TP_1.png",)),
        ("missing-image", "train", ("trainannot/Seq05VD_g0.png",)),
    ]


def test_ambiguous_names_are_errors(tmp_path):
    touch(tmp_path, "val/a.png", "val/a.JPG", "valannot/a.png", "val/b.png", "valannot/b.png", "valannot/b.bmp")
    pairs, findings = camvid.pairs(tmp_path)
    assert pairs == []
    assert codes(findings) == [("doubled-file", "val", ("val/a.JPG = val/a.png", "valannot/b.bmp = valannot/b.png"))]


def test_an_empty_split_and_a_bad_name_are_errors(tmp_path):
    (tmp_path / "val").mkdir()
    touch(tmp_path, "train/a\x1b[31m.png", "train/b.png", "trainannot/b.png")
    pairs, findings = camvid.pairs(tmp_path)
    assert [p.name for p in pairs] == ["b"]
    assert [(f.code, f.split, f.severity) for f in findings] == [
        ("bad-name", "train", "error"),
        ("empty-split", "val", "error"),
    ]
    assert findings[0].files == (r"'train/a\x1b[31m.png'",)


def test_circular_links_are_followed_once(tmp_path):
    touch(tmp_path, "train/a.png", "trainannot/a.png")
    (tmp_path / "train" / "again").symlink_to(tmp_path / "train")
    assert [p.name for p in camvid.pairs(tmp_path)[0]] == ["a"]


YAML = """
name: yard
classes:
  - {id: 7, name: road, color: [128, 64, 128], category: flat}
  - {id: 9, name: car}
  - {id: 3, name: bonnet, ignore: true}
ignore: [0, 255]
splits:
  train: {images: pictures/train, labels: masks/train}
  val: {images: pictures/val, labels: pictures/val}
label_suffix: _mask.png
sequence: '^([^/]+)/'
"""


def described(tmp_path: Path, text: str) -> folder.Description:
    (tmp_path / "labels.yaml").write_text(text)
    return read_description(tmp_path / "labels.yaml")


def test_folder_reads_its_description(tmp_path):
    description = described(tmp_path, YAML)
    labels = description.label_set
    assert (labels.name, labels.names) == ("yard", ("road", "car"))
    assert [int(labels.id_to_train[i]) for i in (7, 9, 3, 0, 255)] == [0, 1, IGNORE, IGNORE, IGNORE]
    assert labels.known_ids == {0, 3, 7, 9, 255}
    assert labels.trained[0].color == (128, 64, 128) and labels.categories == {"flat": [0]}
    assert labels.trained[1].color == (192, 0, 0)  # PASCAL VOC's colour 9


def test_folder_pairs_by_stem_and_suffix(tmp_path):
    touch(tmp_path, "pictures/train/monday/a.jpg", "masks/train/monday/a_mask.png", "masks/train/monday/a_color.png")
    touch(tmp_path, "pictures/train/tuesday/a.jpg", "masks/train/tuesday/a_mask.png", "masks/train/tuesday/b_mask.png")
    pairs, findings = folder.pairs(tmp_path, described(tmp_path, YAML))
    assert [(p.name, p.sequence, p.label) for p in pairs] == [
        ("monday/a", "monday", "masks/train/monday/a_mask.png"),
        ("tuesday/a", "tuesday", "masks/train/tuesday/a_mask.png"),
    ]
    assert codes(findings) == [
        ("empty-split", "val", ()),
        ("missing-image", "train", ("masks/train/tuesday/b_mask.png",)),
    ]
    with pytest.raises(DataError) as e:
        folder.pairs(tmp_path / "masks", described(tmp_path, YAML))
    assert e.value.expected.startswith("pictures/train/ with masks/train/, pictures/val/")


def test_folder_with_images_and_masks_side_by_side(tmp_path):
    touch(tmp_path, "pictures/val/x/a_rgb.png", "pictures/val/x/a_mask.png")
    description = described(tmp_path, YAML + "image_suffix: _rgb\n")
    pairs, findings = folder.pairs(tmp_path, description)
    assert codes(findings) == [("empty-split", "train", ())]
    assert [(p.name, p.image, p.label) for p in pairs] == [
        ("x/a", "pictures/val/x/a_rgb.png", "pictures/val/x/a_mask.png")
    ]


def test_folder_reports_all_errors_of_its_description_at_once(tmp_path):
    text = """
nam: yard
classes:
  - {id: 700, name: road, color: [300, 0, 0], train_id: x}
  - {name: 3, ignore: perhaps, categori: a}
  - {id: 1, name: car}
  - {id: 1, name: car}
  - pole
ignore: 255
splits:
  train: {images: /abs, labels: ../masks}
  val: here
  holdout: {images: a}
sequence: '('
terms: [1]
"""
    with pytest.raises(ConfigError) as caught:
        described(tmp_path, text)
    for text in (
        "nam: unknown key; perhaps you meant name",
        "classes.0.id: is 700; expected a whole number in 0..255",
        "classes.0.color: is [300, 0, 0]",
        "classes.0.train_id: is the text 'x'",
        "classes.1.id: is empty",
        "classes.1.name: is 3; expected text",
        "classes.1.ignore: is the text 'perhaps'",
        "classes.1.categori: unknown key; perhaps you meant category",
        "classes.4: is the text 'pole'",
        "classes: the id 1 is given 2 times",
        "classes: the name car is given 2 times",
        "ignore: is 255; expected a list",
        "splits.train.images: is /abs",
        "splits.train.labels: is ../masks",
        "splits.val: is the text 'here'",
        "splits.holdout: not a valid split name",
        "splits.holdout.labels: is empty",
        "sequence: not a regular expression",
        "terms: is a list; expected text",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("train_ids", "expected"),
    [((0, None), "not car; expected all or none"), ((0, 2), "[0, 2]; expected 0..n-1"), ((255, 0), "1 to learn")],
)
def test_folder_train_ids_have_no_gaps(tmp_path, train_ids, expected):
    text = YAML
    for name, train_id in zip(("road", "car"), train_ids, strict=True):
        text = text if train_id is None else text.replace(f"name: {name}", f"name: {name}, train_id: {train_id}")
    with pytest.raises(ConfigError) as e:
        described(tmp_path, text)
    assert expected in e.value.found


def test_folder_classes_may_share_a_train_id(tmp_path):
    text = YAML.replace("name: road", "name: road, train_id: 1").replace("name: car", "name: car, train_id: 0")
    text = text.replace("ignore: [0, 255]", "  - {id: 12, name: van, train_id: 0}\nignore: []")
    labels = described(tmp_path, text).label_set
    assert labels.names == ("car", "road") and int(labels.id_to_train[12]) == 0


@pytest.mark.parametrize(
    "text", ["", "[1]", "a: [", "classes: {}", "splits: {}\nclasses: []", "classes: !!python/tuple [1]"]
)
def test_an_invalid_description_is_a_config_error(tmp_path, text):
    with pytest.raises(ConfigError) as e:
        described(tmp_path, text)
    assert e.value.where == str(tmp_path / "labels.yaml")
    with pytest.raises(ConfigError) as e:
        read_description(tmp_path / "absent.yaml")
    assert e.value.where == str(tmp_path / "absent.yaml")


def test_file_system_order_does_not_matter(tmp_path):
    names = [f"{i:03d}" for i in np.random.default_rng(0).permutation(40)]
    image = cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1].tobytes()
    for name in names:
        touch(tmp_path, f"train/s_{name}.png", f"trainannot/s_{name}.png")
        (tmp_path / f"train/s_{name}.png").write_bytes(image)
    assert [p.name for p in camvid.pairs(tmp_path)[0]] == sorted(f"s_{n}" for n in names)
