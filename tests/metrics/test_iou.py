from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roadseg.errors import UsageError
from roadseg.labels import CAMVID, CITYSCAPES, IGNORE, LabelClass, LabelSet
from roadseg.metrics.confusion import confusion
from roadseg.metrics.iou import scores


def tiny_set(categories):
    return LabelSet("tiny", tuple(LabelClass(f"c{i}", i, i, (i, i, i), c) for i, c in enumerate(categories)))


def iou_of_sets(label, prediction, ids):
    """Exact IoU of the pixels in `ids` by sets of positions; None when the truth has none."""
    valid = {p for p, v in enumerate(label) if v != IGNORE}
    truth = {p for p in valid if label[p] in ids}
    guess = {p for p in valid if prediction[p] in ids}
    return Fraction(len(truth & guess), len(truth | guess)) if truth else None


def mean(values):
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def same(got, want):
    return got is None if want is None else got == pytest.approx(float(want), abs=1e-12)


@st.composite
def scenes(draw):
    categories = draw(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=7))
    k = len(categories)
    used = draw(st.lists(st.sampled_from([*range(k), IGNORE]), min_size=1, unique=True))  # the rest is absent
    pixels = draw(st.integers(0, 40))
    label = draw(hnp.arrays(np.uint8, (1, pixels), elements=st.sampled_from(used)))
    prediction = draw(hnp.arrays(np.uint8, (1, pixels), elements=st.integers(0, k - 1)))
    return tiny_set(categories), label, prediction


@settings(deadline=None, max_examples=200)
@given(scenes())
def test_equals_a_reference_in_fractions(scene):
    label_set, label_map, prediction_map = scene
    got = scores(confusion(label_map, prediction_map, label_set.num_classes), label_set)
    label, prediction = label_map.ravel().tolist(), prediction_map.ravel().tolist()
    valid = [(t, g) for t, g in zip(label, prediction, strict=True) if t != IGNORE]

    iou = [iou_of_sets(label, prediction, {i}) for i in range(label_set.num_classes)]
    accuracy = []
    for i in range(label_set.num_classes):
        of_class = [g for t, g in valid if t == i]
        accuracy.append(Fraction(of_class.count(i), len(of_class)) if of_class else None)
    assert all(same(a, b) for a, b in zip(got["class_iou"].values(), iou, strict=True))
    assert all(same(a, b) for a, b in zip(got["class_accuracy"].values(), accuracy, strict=True))
    assert same(got["miou"], mean(iou)) and same(got["mean_accuracy"], mean(accuracy))
    assert same(got["pixel_accuracy"], Fraction(sum(t == g for t, g in valid), len(valid)) if valid else None)
    assert got["pixels"] == len(valid)
    assert got["category_iou"].keys() == label_set.categories.keys()
    for category, ids in label_set.categories.items():
        assert same(got["category_iou"][category], iou_of_sets(label, prediction, set(ids)))


def test_all_void_has_no_score():
    label = np.full((3, 3), IGNORE, np.uint8)
    got = scores(confusion(label, np.zeros_like(label), 19), CITYSCAPES)
    assert (got["miou"], got["pixel_accuracy"], got["mean_accuracy"], got["pixels"]) == (None, None, None, 0)
    assert set(got["class_iou"].values()) == {None} and set(got["category_iou"].values()) == {None}


def test_absent_classes_are_excluded_and_not_counted_as_zero():
    table = np.zeros((3, 3), np.int64)
    table[0, 0], table[0, 2], table[1, 1] = 8, 2, 10  # class 2 is nowhere in the truth, but predicted twice
    got = scores(table, tiny_set(["", "", ""]))
    assert got["class_iou"] == {"c0": 0.8, "c1": 1.0, "c2": None}
    assert got["miou"] == pytest.approx(0.9) and got["mean_accuracy"] == pytest.approx(0.9)
    assert got["pixel_accuracy"] == 0.9 and got["absent_predicted"] == {"c2": 2}
    assert got["category_iou"] == {}


def test_a_present_class_that_was_never_predicted_is_zero():
    table = np.array([[5, 0], [5, 0]], np.int64)
    assert scores(table, tiny_set(["", ""]))["class_iou"] == {"c0": 0.5, "c1": 0.0}


def test_confusion_inside_a_category_is_right_there():
    table = np.zeros((19, 19), np.int64)
    car, bus, road = (CITYSCAPES.names.index(n) for n in ("car", "bus", "road"))
    table[car, bus], table[bus, bus], table[road, car] = 30, 10, 10
    got = scores(table, CITYSCAPES)
    assert got["class_iou"]["car"] == 0.0 and got["category_iou"]["vehicle"] == 0.8
    assert got["category_iou"]["flat"] == 0.0 and got["category_iou"]["sky"] is None


def test_counts_beyond_what_a_float_holds():
    big = 1 << 60
    got = scores(np.array([[big, 1], [1, big]], np.int64), tiny_set(["", ""]))
    assert got["pixels"] == 2 * big + 2 and got["miou"] == 1.0


@pytest.mark.parametrize("table", [np.zeros((10, 10), np.int64), np.zeros((11, 11))])
def test_a_matrix_that_does_not_fit_is_refused(table):
    with pytest.raises(UsageError):
        scores(table, CAMVID)


def test_agrees_with_the_official_script():
    """On every class that is present; and its mean follows from ours where an absent class was predicted."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    rng = np.random.default_rng(3)
    label = rng.integers(0, 19, (64, 64), dtype=np.uint8)
    label[rng.random(label.shape) < 0.1] = IGNORE
    label[label == 16] = IGNORE  # train: absent, but predicted
    label[label == 3] = IGNORE  # wall: neither
    prediction = np.where((rng.random(label.shape) < 0.7) & (label != IGNORE), label, rng.integers(0, 19, label.shape))
    prediction = np.where(prediction == 3, 0, prediction).astype(np.uint8)
    ours = scores(confusion(label, prediction, 19), CITYSCAPES)

    table = official.generateMatrix(official.args)
    ids = CITYSCAPES.train_to_id
    np.add.at(table, (ids[label].ravel(), ids[prediction].ravel()), 1)
    theirs = {c.name: official.getIouScoreForLabel(c.id, table, official.args) for c in CITYSCAPES.trained}
    for name, value in ours["class_iou"].items():
        assert (name in ("train", "wall")) == (value is None)
        assert value is None or value == pytest.approx(theirs[name], abs=1e-12)
    for category, value in ours["category_iou"].items():
        assert value == pytest.approx(official.getIouScoreForCategory(category, table, official.args), abs=1e-12)
    assert set(ours["absent_predicted"]) == {"train"} and theirs["train"] == 0 and np.isnan(theirs["wall"])
    assert ours["miou"] * 17 / 18 == pytest.approx(official.getScoreAverage(theirs, official.args), abs=1e-12)
