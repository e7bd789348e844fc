"""Wrong label values have one cause, right ones have none."""

from dataclasses import replace

import pytest

from roadseg.data.masks.form import UNKNOWN, Kind, MaskForm
from roadseg.ingest.checks.label_values import causes, value_findings
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CAMVID, CITYSCAPES, IGNORE, LabelClass, LabelSet, in_cityscapes

TRAIN_IDS = LabelSet("bdd", tuple(replace(c, id=c.train_id) for c in CITYSCAPES.trained))
TRAIN_IDS_AND_VOID = replace(TRAIN_IDS, classes=(*TRAIN_IDS.classes, LabelClass("void", IGNORE, IGNORE, (0, 0, 0))))
ONE_BASED = LabelSet("mine", tuple(LabelClass(f"c{i}", i, i - 1, (i, i, i)) for i in range(1, 21)))


def measured(*ids: int, name: str = "a", pixels: dict[int, int] | None = None, **fields: object) -> MeasuredPair:
    """A label with 100 pixels of every id, except those in `pixels`."""
    counts = tuple(sorted(((i, (pixels or {}).get(i, 100)) for i in ids), key=lambda pair: -pair[1]))
    pair = Pair("train", name, "", f"{name}.png", f"{name}_ids.png")
    return MeasuredPair(pair, **{"problems": (), "id_pixels": counts, "mask_mode": "grey", **fields})  # type: ignore[arg-type]


def cause(one: MeasuredPair, label_set: LabelSet, kind: Kind = "ids") -> str:
    return causes([one], MaskForm(kind, label_set)).get(one.pair.label, "")


ORDINARY = (1, 3, 4, 7, 8, 11, 17, 20, 21, 23, 26)  # ids of a frame of Cityscapes


@pytest.mark.parametrize(
    ("label_set", "ids", "code"),
    [
        (CITYSCAPES, ORDINARY, ""),
        (CITYSCAPES, range(34), ""),
        (CITYSCAPES, (0, 7, 11, 21), ""),
        (CITYSCAPES, (0, 1, 3), ""),  # the placeholders of the test split
        (CITYSCAPES, (1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 17), ""),  # a tunnel without a car
        (CITYSCAPES, (0, 1, 2, 8, 10, 13, 255), "train-ids"),
        (CITYSCAPES, (0, 1, 2, 5, 6, 7, 8, 10, 11, 13), "train-ids"),
        (CITYSCAPES, (*ORDINARY, 255), "undeclared-void"),
        (CITYSCAPES, (0, 255), "binary-mask"),
        (CITYSCAPES, (*ORDINARY, 40, 50), ""),  # unknown, without a cause
        (CITYSCAPES, (7, 11, 26001, 26002), "instance-ids"),
        (TRAIN_IDS_AND_VOID, (*range(19), 255), ""),
        (TRAIN_IDS, range(19), ""),
        (TRAIN_IDS, (*range(19), 255), "undeclared-void"),
        (TRAIN_IDS_AND_VOID, ORDINARY, "label-ids"),
        (TRAIN_IDS_AND_VOID, (0, 1, 2, 19), ""),
        (CAMVID, range(12), ""),
        (CAMVID, ORDINARY, "label-ids"),
        (CAMVID, (*range(11), 255), "undeclared-void"),
        (CAMVID, (0, 255), "binary-mask"),
        (ONE_BASED, range(1, 20), ""),  # not train ids, although the last class is missing
        (ONE_BASED, (*range(1, 20), 255), "undeclared-void"),
        (in_cityscapes(CITYSCAPES), (0, 1, 2, 8, 10, 13, 255), "train-ids"),  # as a part of a mix
    ],
)
def test_the_cause_of_ids(label_set, ids, code):
    zero_is_road = {0: 900, 7: 10} if code == "train-ids" else {}
    assert cause(measured(*ids, pixels=zero_is_road), label_set) == code


def test_train_ids_without_255_are_detected_by_road_pixels():
    ids = (0, 1, 2, 5, 6, 7, 8, 10, 11, 13)
    assert cause(measured(*ids, pixels={0: 900, 7: 10}), CITYSCAPES) == "train-ids"
    assert cause(measured(*ids, pixels={0: 100, 7: 900}), CITYSCAPES) == ""


def test_train_ids_of_a_split_are_detected_from_all_labels():
    halves = [measured(0, 1, 2, 3, 4, name="a"), measured(5, 6, 7, 8, 9, 10, name="b")]
    assert set(causes(halves, MaskForm("ids", CITYSCAPES)).values()) == {"train-ids"}
    assert causes([*halves, measured(7, 23, name="c")], MaskForm("ids", CITYSCAPES)) == {}
    assert causes(halves, MaskForm("ids", ONE_BASED)) == {}


def test_splits_of_0_and_255_are_binary_masks_even_with_void_255():
    split = [measured(0, 255, name=str(i)) for i in range(9)]
    form = MaskForm("ids", TRAIN_IDS_AND_VOID)
    assert set(causes(split, form).values()) == {"binary-mask"}
    assert causes([*split, measured(0, 1, name="x"), measured(0, 2, name="y")], form) == {}
    assert causes(split[:2], form) == {}
    thing = LabelSet("mask", (LabelClass("else", 0, 0, (0, 0, 0)), LabelClass("road", 255, 1, (9, 9, 9))))
    assert causes(split, MaskForm("ids", thing)) == {}


def unreadable(text: str) -> dict[str, object]:
    return {"problems": (("unreadable-label", "a_ids.png", text),)}


def test_the_cause_of_masks_in_another_form():
    assert cause(measured(mask_mode="rgb", **unreadable("a mask of RGB colours")), CAMVID) == "color-mask"
    assert cause(measured(mask_mode="rgba", **unreadable("a mask of RGBA colours")), CAMVID) == "color-mask"
    assert (
        cause(measured(mask_mode="grey", **unreadable("a mask saved as jpeg; expected")), CAMVID) == "interpolated-mask"
    )
    assert cause(measured(mask_mode="grey", **unreadable("the png is truncated")), CAMVID) == ""
    assert cause(measured(*range(12), interpolated=0.3), CAMVID) == "interpolated-mask"
    swapped = ("swapped", "a.png", "holds only classes")
    photo = unreadable("a mask of RGB colours")["problems"]
    assert cause(measured(problems=(*photo, swapped), mask_mode="rgb"), CAMVID) == ""  # type: ignore[misc]


def test_the_cause_of_colors():
    few = (("unknown-color", "a_ids.png", "#010203 on 9 pixels"),)
    many = (("unknown-color", "a_ids.png", "#010203 on 9 pixels, #010204 on 8 pixels and 1,312 more colours"),)
    for problems, mode, interpolated, code in (
        (few, "rgb", 0.0, ""),
        (few, "grey", 0.0, "id-mask"),
        (few, "palette", 0.0, "id-mask"),
        (many, "rgb", 0.0, "interpolated-mask"),
        (few, "rgb", 0.4, "interpolated-mask"),
        ((), "palette", 0.0, ""),
    ):
        one = measured(1, UNKNOWN, problems=problems, mask_mode=mode, interpolated=interpolated)
        assert cause(one, CAMVID, "colors") == code


def test_findings_have_message_files_and_fix():
    labels = [measured(*ORDINARY, name="a"), measured(*ORDINARY, name="b"), measured(*range(12), name="c")]
    (f,), explained = value_findings("train of x", "train", labels, MaskForm("ids", CAMVID))
    assert (f.code, f.severity, f.split, f.count) == ("label-ids", "error", "train", 2)
    assert f.message == "2 labels of train of x hold ids as Cityscapes' labelIds do, where camvid has 0..10"
    assert f.files[0] == "a_ids.png: ids 1, 3, 4, 7, 8, 11, 17, 20, 21, 23, 26"
    assert explained == {"a_ids.png": "label-ids", "b_ids.png": "label-ids"}


def test_unknown_ids_name_the_known_ones_and_hint_at_palettes():
    text = "id 40 on 100 pixels"
    label = measured(1, 40, problems=(("unknown-id", "a_ids.png", text),), mask_mode="palette")
    (f,), explained = value_findings("val", "val", [label], MaskForm("ids", CAMVID))
    assert (f.code, f.files, explained) == ("unknown-id", (f"a_ids.png: {text}",), {})
    assert "camvid has the ids 0..11" in f.fix and "`masks: colors`" in f.fix


def test_palettes_among_gray_masks():
    labels = [measured(1, 2, name=str(i)) for i in range(5)]
    labels[3] = replace(labels[3], mask_mode="palette")
    (f,), _ = value_findings("val", "val", labels, MaskForm("ids", CAMVID))
    assert (f.code, f.severity, f.files) == ("mixed-masks", "warning", ("3_ids.png",))
    every = [replace(s, mask_mode="palette") for s in labels]
    assert value_findings("val", "val", every, MaskForm("ids", CAMVID)) == ([], {})
    assert value_findings("val", "val", labels, MaskForm("colors", CAMVID)) == ([], {})


def test_void_255_with_another_class_is_no_binary_mask():
    split = [measured(0, 255, name=str(i)) for i in range(30)]
    form = MaskForm("ids", TRAIN_IDS_AND_VOID)
    assert causes([*split, measured(0, 1, 255, name="x")], form) == {}
    assert set(causes([*split, measured(0, 77, 255, name="x")], form).values()) == {"binary-mask"}  # 77 is not a class
