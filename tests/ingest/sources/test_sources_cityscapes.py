"""Data sets in the tree of Cityscapes: its coarse labels, IDD and ACDC."""

import json
from pathlib import Path

import numpy as np
import pytest

from roadseg.data.masks.read import read_ids, train_ids
from roadseg.errors import DataError
from roadseg.images.decode import Limits
from roadseg.ingest.sources import acdc, cityscapes, idd
from tests.conftest import codes, pair_rows, touch


def coarse_tree(root: Path, *splits: str) -> None:
    names = {"train_extra": "bamberg_000000_000000", "train": "ulm_000003_000019", "val": "lindau_000001_000019"}
    for split in splits:
        path = f"{split}/{names[split].partition('_')[0]}/{names[split]}"
        touch(root, f"leftImg8bit/{path}_leftImg8bit.png")
        for kind in ("labelIds", "instanceIds", "labelTrainIds", "color"):
            touch(root, f"gtCoarse/{path}_gtCoarse_{kind}.png")


def test_coarse_trains_on_train_extra_and_is_scored_on_fine_labels(tmp_path):
    coarse_tree(tmp_path, "train_extra", "train", "val")
    touch(tmp_path, "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png")
    pairs, findings = cityscapes.coarse_pairs(tmp_path)
    assert findings == []
    assert pair_rows(pairs) == [
        ("train", "bamberg/bamberg_000000_000000", "bamberg_000000"),
        ("val", "lindau/lindau_000001_000019", "lindau_000001"),
    ]
    train, val = pairs
    assert train.label == "gtCoarse/train_extra/bamberg/bamberg_000000_000000_gtCoarse_labelIds.png"
    assert train.instances == train.label.replace("labelIds", "instanceIds")
    assert (val.label, val.instances) == ("gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png", "")


def test_coarse_reports_replacements_for_train_extra_and_fine_val(tmp_path):
    coarse_tree(tmp_path, "train", "val")
    touch(tmp_path, "gtCoarse/train_extra/bamberg/bamberg_000000_000000_gtCoarse_labelIds.png")
    pairs, findings = cityscapes.coarse_pairs(tmp_path)
    assert [p.label.split("/")[:2] for p in pairs] == [["gtCoarse", "train"], ["gtCoarse", "val"]]
    assert [(f.code, f.severity, f.split) for f in findings] == [
        ("source-note", "warning", "train"),
        ("source-note", "warning", "val"),
    ]
    assert "leftImg8bit/train_extra" in findings[0].fix and "gtFine/val" in findings[1].fix


def test_coarse_leaves_out_the_black_frame_and_names_it(tmp_path):
    coarse_tree(tmp_path, "train_extra")
    broken = "train_extra/troisdorf/troisdorf_000000_000073"
    touch(tmp_path, f"leftImg8bit/{broken}_leftImg8bit.png", f"gtCoarse/{broken}_gtCoarse_labelIds.png")
    touch(tmp_path, "leftImg8bit/train_extra/bamberg/b\nd_leftImg8bit.png")
    pairs, findings = cityscapes.coarse_pairs(tmp_path)
    assert [p.name for p in pairs] == ["bamberg/bamberg_000000_000000"]
    assert codes(findings) == [("source-note", "train", 1), ("bad-name", "train", 1)]
    assert findings[0].files == (f"leftImg8bit/{broken}_leftImg8bit.png",)


@pytest.mark.parametrize("missing", ["gtCoarse", "leftImg8bit"])
def test_coarse_without_labels_or_images_is_refused(tmp_path, missing):
    coarse_tree(tmp_path, "train")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError) as e:
        cityscapes.coarse_pairs(tmp_path)
    assert e.value.where == str(tmp_path) and "gtCoarse" in e.value.expected


def acdc_tree(root: Path, images: str = "rgb_anon", labels: str = "gt") -> None:
    for condition, split, sequence in (
        ("night", "train", "GOPR0351"),
        ("fog", "train", "GOPR0475"),
        ("fog", "val", "GOPR0476"),
    ):
        frame = f"{condition}/{split}/{sequence}/{sequence}_frame_000159"
        touch(root, f"{images}/{frame}_rgb_anon.png")
        for kind in ("labelIds", "labelTrainIds", "labelColor", "invIds"):
            touch(root, f"{labels}/{frame}_gt_{kind}.png")
        touch(root, f"{images}/{condition}/{split}_ref/{sequence}/{sequence}_frame_000158_rgb_ref_anon.png")
    touch(root, f"{images}/snow/test/GP010607/GP010607_frame_000001_rgb_anon.png")


@pytest.mark.parametrize(
    ("images", "labels"), [("rgb_anon", "gt"), ("rgb_anon_trainvaltest/rgb_anon", "gt_trainval/gt")]
)
def test_acdc_pairs_conditions_and_leaves_out_references_and_test(tmp_path, images, labels):
    acdc_tree(tmp_path, images, labels)
    pairs, findings = acdc.pairs(tmp_path)
    assert pair_rows(pairs) == [
        ("train", "fog/GOPR0475/GOPR0475_frame_000159", "fog/GOPR0475"),
        ("train", "night/GOPR0351/GOPR0351_frame_000159", "night/GOPR0351"),
        ("val", "fog/GOPR0476/GOPR0476_frame_000159", "fog/GOPR0476"),
    ]
    assert pairs[0].label == f"{labels}/fog/train/GOPR0475/GOPR0475_frame_000159_gt_labelIds.png"
    assert codes(findings) == [("no-labels", "test", 1)]


def test_acdc_names_a_label_that_is_missing_in_one_condition(tmp_path):
    acdc_tree(tmp_path)
    label = "gt/night/train/GOPR0351/GOPR0351_frame_000159_gt_labelIds.png"
    (tmp_path / label).unlink()
    touch(tmp_path, "gt/fog/val/GOPR0476/GOPR0476_frame_000200_gt_labelIds.png")
    pairs, findings = acdc.pairs(tmp_path)
    assert len(pairs) == 2
    assert codes(findings)[:2] == [("missing-label", "train", 1), ("missing-image", "val", 1)]
    assert findings[0].files == ("rgb_anon/night/train/GOPR0351/GOPR0351_frame_000159_rgb_anon.png",)
    with pytest.raises(DataError) as e:
        acdc.pairs(tmp_path / "gt")
    assert e.value.expected == acdc.LOOKED_FOR


def idd_tree(root: Path, *kinds: str, base: str = "", ending: str = "png") -> None:
    for split, drive, frame in (("train", "0", "005506"), ("train", "7", "000104"), ("val", "102", "502304")):
        touch(root, f"{base}leftImg8bit/{split}/{drive}/{frame}_leftImg8bit.{ending}")
        for kind in kinds:
            touch(root, f"{base}gtFine/{split}/{drive}/{frame}_gtFine_{kind}")
    touch(root, f"{base}leftImg8bit/test/300/000001_leftImg8bit.{ending}")


def test_idd_reads_polygons_and_leaves_out_test(tmp_path):
    idd_tree(tmp_path, "polygons.json", "instanceids.png")
    pairs, findings = idd.pairs(tmp_path)
    assert pair_rows(pairs) == [("train", "0/005506", "0"), ("train", "7/000104", "7"), ("val", "102/502304", "102")]
    assert pairs[0].label == "gtFine/train/0/005506_gtFine_polygons.json" and pairs[0].instances == ""
    assert codes(findings) == [("no-labels", "test", 1)]
    form = idd.form(tmp_path)
    assert (form.kind, form.label_set, form.background) == ("polygons", idd.LABEL_SET, 35)
    assert form.label_set.id_to_train[form.background] == 255


def test_idd_polygons_are_drawn_with_its_names(tmp_path):
    idd_tree(tmp_path, "polygons.json")
    left, right = [[0, 0], [15, 0], [15, 15], [0, 15]], [[16, 0], [31, 0], [31, 15], [16, 15]]
    plate = [[4, 4], [10, 4], [10, 10], [4, 10]]  # void, and drawn over what it is on, as IDD's tool does
    shapes = {"drivable fallback": left, "autorickshaw": right, "license plate": plate}
    objects = [{"label": name, "polygon": polygon} for name, polygon in shapes.items()]
    data = json.dumps({"imgHeight": 16, "imgWidth": 40, "objects": objects}).encode()
    form = idd.form(tmp_path)
    ids = read_ids(data, form, Limits())
    assert ids.shape == (16, 40) and [ids[12, x] for x in (5, 25, 36)] == [2, 11, 35]
    assert [train_ids(ids, form)[8, x] for x in (1, 5, 25, 36)] == [1, 255, 8, 255]
    assert np.unique(ids).tolist() == [2, 11, 35, 39]


@pytest.mark.parametrize(
    ("kinds", "label_set"),
    [
        (("polygons.json", "labelids.png", "labellevel3Ids.png"), idd.LABEL_SET),
        (("polygons.json", "labelcsTrainIds.png", "labelLevel3Ids.png"), idd.LEVEL3),
        (("labelcsTrainIds.png",), idd.TRAIN_IDS),
    ],
)
def test_idd_reads_masks_made_by_the_tool(tmp_path, kinds, label_set):
    idd_tree(tmp_path, *kinds)
    form = idd.form(tmp_path)
    assert (form.kind, form.label_set) == ("ids", label_set)
    pairs, _ = idd.pairs(tmp_path)
    assert len(pairs) == 3 and {p.label.rpartition("_")[2] for p in pairs} <= set(kinds)


def test_idd_reads_the_most_frequent_kind_of_label(tmp_path):
    idd_tree(tmp_path, "polygons.json")
    touch(tmp_path, "gtFine/train/0/005506_gtFine_labelids.png")
    assert idd.form(tmp_path).kind == "polygons"
    (tmp_path / "gtFine/val/102/502304_gtFine_polygons.json").unlink()
    pairs, findings = idd.pairs(tmp_path)
    assert len(pairs) == 2 and codes(findings)[0] == ("missing-label", "val", 1)


def test_idd_joins_its_two_parts(tmp_path):
    idd_tree(tmp_path, "polygons.json", base="IDD_Segmentation/")
    idd_tree(tmp_path, "polygons.json", base="idd20kII/", ending="jpg")
    touch(tmp_path, "notes/readme.txt")
    pairs, findings = idd.pairs(tmp_path)
    assert len(pairs) == 6 and len({p.name for p in pairs}) == 6
    assert pair_rows(pairs)[3] == ("train", "idd20kII/7/000104", "idd20kII/7")
    assert pairs[3].image == "idd20kII/leftImg8bit/train/7/000104_leftImg8bit.jpg"
    assert codes(findings) == [("no-labels", "test", 2)]
    for wrong in (tmp_path / "notes", tmp_path / "nowhere", tmp_path / "notes/readme.txt"):
        with pytest.raises(DataError) as e:
            idd.pairs(wrong)
        assert e.value.where == str(wrong) and e.value.expected == idd.LOOKED_FOR


def test_idd_without_labels_lists_the_missing_ones(tmp_path):
    idd_tree(tmp_path)
    pairs, findings = idd.pairs(tmp_path)
    assert pairs == [] and codes(findings)[:2] == [("missing-label", "train", 2), ("missing-label", "val", 1)]
