"""CamVid in 32 colors, BDD100K, Mapillary Vistas, KITTI and comma10k."""

import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from roadseg.data.masks.form import MaskForm
from roadseg.data.masks.read import read_ids, train_ids, unknown_colors
from roadseg.errors import DataError
from roadseg.images.decode import Limits
from roadseg.ingest.sources import bdd100k, camvid_colors, comma10k, kitti, mapillary
from roadseg.ingest.sources.camvid_colors import segnet_split
from tests.conftest import codes, pair_rows, touch


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


FRAMES = ("0001TP_008520", "0001TP_008550", "0006R0_f00930", "0016E5_07959", "0016E5_07960", "Seq05VD_f00000")
SPLITS = ("train", "test", "train", "val", "train", "test")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("701_StillsRaw_full", "LabeledApproved_full"),
        ("images/701_StillsRaw_full", "labels/LabeledApproved_full"),
        ("images/701_StillsRaw_full", "labels"),
        ("images", "labels"),
    ],
)
def test_camvid_in_colors_is_split_by_name_as_segnet_did(tmp_path, images, labels):
    for frame in FRAMES:
        touch(tmp_path, f"{images}/{frame}.png", f"{labels}/{frame}_L.png")
    pairs, findings = camvid_colors.pairs(tmp_path)
    assert findings == []
    assert {p.name: p.split for p in pairs} == dict(zip(FRAMES, SPLITS, strict=True))
    assert {(p.split, p.sequence) for p in pairs if p.split == "test"} == {("test", "0001TP"), ("test", "Seq05VD")}
    assert pairs[0].label == f"{labels}/0001TP_008520_L.png"


def test_camvid_in_colors_keeps_the_split_of_folders(tmp_path):
    touch(tmp_path, "train/0016E5_07959.png", "train_labels/0016E5_07959_L.png")
    touch(tmp_path, "test/0016E5_07961.png", "test_labels/0016E5_07963_L.png", "class_dict.csv", "val/x.png")
    pairs, findings = camvid_colors.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", "0016E5_07959", "0016E5")]
    assert codes(findings) == [("missing-label", "test", 1), ("missing-image", "test", 1)]


def test_camvid_in_colors_lists_missing_and_unknown_frames(tmp_path):
    touch(tmp_path, "images/0006R0_f00930.png", "images/holiday.png", "labels/holiday_L.png")
    touch(tmp_path, "labels/Seq05VD_f00000_L.png", "images/b\nd.png", "images/0001TP_006690.png")
    touch(tmp_path, "labels/0001TP_006690_L.png")
    pairs, findings = camvid_colors.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", "0001TP_006690", "0001TP")]
    assert codes(findings) == [
        ("source-note", "train", 1),
        ("bad-name", "train", 1),
        ("missing-label", "train", 1),
        ("empty-split", "test", 0),
    ]
    assert findings[0].files == ("images/holiday.png",)
    with pytest.raises(DataError) as e:
        camvid_colors.pairs(tmp_path / "images")
    assert e.value.expected == camvid_colors.LOOKED_FOR


def test_camvid_in_colors_without_camvid_frames_is_an_empty_split(tmp_path):
    touch(tmp_path, "images/a.png", "labels/a_L.png")
    pairs, findings = camvid_colors.pairs(tmp_path)
    assert pairs == [] and codes(findings) == [("source-note", "train", 1), ("empty-split", "train", 0)]


@pytest.mark.skipif(not os.environ.get("ROADSEG_REAL_DATA"), reason="ROADSEG_REAL_DATA is not set")
def test_the_name_rule_reproduces_segnets_lists():
    root = Path(os.environ["ROADSEG_REAL_DATA"]) / "camvid"
    for split, count in (("train", 367), ("val", 101)):
        names = [p.stem for p in (root / split).glob("*.png")]
        assert Counter(map(segnet_split, names)) == {split: count}


def test_camvid_colors_become_ids():
    form = MaskForm(camvid_colors.FORM_KIND, camvid_colors.LABEL_SET)
    names = [c.name for c in form.label_set.classes]
    mask = np.array([[[128, 64, 128], [0, 128, 192], [0, 0, 0], [192, 0, 192]]], np.uint8)
    ids = read_ids(png(mask), form, Limits())
    assert [names[i] for i in ids[0]] == ["Road", "Bicyclist", "Void", "MotorcycleScooter"]
    assert train_ids(ids, form)[0, 2] == 255 and len({*train_ids(ids, form)[0]}) == 4


@pytest.mark.parametrize("base", ["", "bdd100k/"])
@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [("images/10k", "labels/sem_seg/masks", ""), ("seg/images", "seg/labels", "_train_id")],
)
def test_bdd100k_in_both_trees(tmp_path, base, images, labels, suffix):
    for split, name in (("train", "0a0a0b1a-7c39d841"), ("val", "7d06fefd-f7be05a6")):
        touch(tmp_path, f"{base}{images}/{split}/{name}.jpg", f"{base}{labels}/{split}/{name}{suffix}.png")
    touch(tmp_path, f"{base}{images}/val/alone.jpg", f"{base}{images}/test/cabc30fc-e7726578.jpg")
    touch(tmp_path, f"{base}labels/sem_seg/colormaps/train/0a0a0b1a-7c39d841.png")
    pairs, findings = bdd100k.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", "0a0a0b1a-7c39d841", ""), ("val", "7d06fefd-f7be05a6", "")]
    assert pairs[0].label == f"{base}{labels}/train/0a0a0b1a-7c39d841{suffix}.png"
    assert codes(findings) == [("missing-label", "val", 1), ("no-labels", "test", 1)]
    with pytest.raises(DataError) as e:
        bdd100k.pairs(tmp_path / base / "labels")
    assert e.value.expected == bdd100k.LOOKED_FOR


def mapillary_tree(root: Path, *labels: str) -> None:
    for folder, name in (("training", "_1Gn_xkw7sa_i9GU4mkxxQ"), ("validation", "-2YGNRm_wFmjZRbC3uJSAw")):
        touch(root, f"{folder}/images/{name}.jpg")
        touch(root, *(f"{folder}/{f}/{name}.png" for f in labels), f"{folder}/v2.0/instances/{name}.png")
    touch(root, "testing/images/__CRfqWAkNAUJpWxA1CfkA.jpg")


def test_mapillary_reads_the_labels_of_the_requested_version(tmp_path):
    mapillary_tree(tmp_path, "v1.2/labels", "v2.0/labels")
    for read, version in ((mapillary.pairs, "v2.0"), (mapillary.pairs_v1_2, "v1.2")):
        pairs, findings = read(tmp_path)
        assert pair_rows(pairs) == [("train", "_1Gn_xkw7sa_i9GU4mkxxQ", ""), ("val", "-2YGNRm_wFmjZRbC3uJSAw", "")]
        assert [p.label.split("/")[1] for p in pairs] == [version] * 2
        assert codes(findings) == [("no-labels", "test", 1)]


def test_an_older_mapillary_package_has_only_v1_2(tmp_path):
    mapillary_tree(tmp_path, "labels")
    touch(tmp_path, "training/labels/stray.png")
    pairs, findings = mapillary.pairs_v1_2(tmp_path)
    assert [p.label.split("/")[:2] for p in pairs] == [["training", "labels"], ["validation", "labels"]]
    assert codes(findings) == [("missing-image", "train", 1), ("no-labels", "test", 1)]
    with pytest.raises(DataError) as e:
        mapillary.pairs(tmp_path)
    assert "v2.0/labels" in e.value.expected


def test_mapillary_labels_are_indexes_of_a_palette(tmp_path):
    label = Image.new("P", (4, 1))
    label.putdata([0, 21, 31, 123])
    label.putpalette([v for c in mapillary.LABEL_SET.classes for v in c.color])
    label.save(tmp_path / "label.png")
    form = MaskForm(mapillary.FORM_KIND, mapillary.LABEL_SET)
    ids = read_ids((tmp_path / "label.png").read_bytes(), form, Limits())
    assert ids.tolist() == [[0, 21, 31, 123]]
    names = form.label_set.names
    assert [names[t] if t < 255 else "" for t in train_ids(ids, form)[0]] == ["Bird", "Road", "", ""]


def kitti_tree(root: Path, count: int = 3) -> None:
    for i in range(count):
        touch(root, f"training/image_2/{i:06d}_10.png", f"training/semantic/{i:06d}_10.png")
        touch(root, f"training/instance/{i:06d}_10.png", f"training/semantic_rgb/{i:06d}_10.png")


def test_kitti_is_all_train_with_a_note(tmp_path):
    kitti_tree(tmp_path)
    touch(tmp_path, "testing/image_2/000000_10.png", "training/semantic/000009_10.png")
    pairs, findings = kitti.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", f"{i:06d}_10", f"{i:06d}") for i in range(3)]
    assert codes(findings) == [("missing-image", "train", 1), ("source-note", "train", 1), ("no-labels", "test", 1)]
    assert "data.holdout_sequences" in findings[1].fix
    with pytest.raises(DataError) as e:
        kitti.pairs(tmp_path / "training")
    assert e.value.expected == kitti.LOOKED_FOR


@pytest.mark.parametrize("path", kitti.MAPPINGS)
def test_kitti_drives_come_from_the_development_kit(tmp_path, path):
    kitti_tree(tmp_path, 4)
    touch(tmp_path, path)
    drive = "2011_09_26_drive_0009_sync"
    (tmp_path / path).write_text(f"2011_09_26 {drive} 0000000384\n\n2011_09_26 {drive} 0000000390\n")
    pairs, _ = kitti.pairs(tmp_path)
    assert [p.sequence for p in pairs] == [drive, "000001", drive, "000003"]


ROUTE = "0085e9e41513078a_2018-08-19--13-26-08"


def test_comma10k_validates_on_names_that_end_in_9(tmp_path):
    fisheye = "a1fc603d9a8ddfc4_2021-02-14--14-05-48"
    for name in (f"0000_{ROUTE}_11_864", f"0001_{ROUTE}_11_869"):
        touch(tmp_path, f"imgs/{name}.png", f"masks/{name}.png")
    for side in "ef":
        touch(tmp_path, f"imgs2/00012_{side}_{fisheye}_71_129.png", f"masks2/00012_{side}_{fisheye}_71_129.png")
    touch(tmp_path, f"imgs2/00013_e_{fisheye}_43_803.png", "imgsd/0000.png", "masksd/0000.png")
    pairs, findings = comma10k.pairs(tmp_path)
    assert pair_rows(pairs) == [
        ("train", f"0000_{ROUTE}_11_864", ROUTE),
        ("val", f"0001_{ROUTE}_11_869", ROUTE),
        ("val", f"imgs2/00012_e_{fisheye}_71_129", fisheye),
        ("val", f"imgs2/00012_f_{fisheye}_71_129", fisheye),
    ]
    assert codes(findings) == [("source-note", "train", 1)]
    assert findings[0].files == (f"imgs2/00013_e_{fisheye}_43_803.png",)


def test_comma10k_lists_unpaired_files(tmp_path):
    touch(tmp_path, "imgs/0000.png", "masks/0000.png", "imgs/0001.png", "imgs/0009.png", "masks/0019.png")
    pairs, findings = comma10k.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", "0000", "")]
    assert codes(findings) == [("missing-label", "train", 1), ("missing-label", "val", 1), ("missing-image", "val", 1)]
    with pytest.raises(DataError) as e:
        comma10k.pairs(tmp_path / "masks")
    assert e.value.expected == comma10k.LOOKED_FOR


def test_comma10k_masks_are_read_by_color():
    form = MaskForm(comma10k.FORM_KIND, comma10k.LABEL_SET)
    mask = np.array([[[64, 32, 32], [255, 0, 0], [128, 128, 96], [0, 255, 102], [204, 0, 255], [1, 2, 3]]], np.uint8)
    assert read_ids(png(mask), form, Limits())[0, :5].tolist() == [1, 2, 3, 4, 5]
    assert unknown_colors(png(mask), form, Limits()) == ({"#010203": 1}, 1)
