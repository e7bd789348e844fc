import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roadseg.errors import DataError, UsageError
from roadseg.metrics import confusion as module
from roadseg.metrics.confusion import ForeignId, confusion


def count_by_hand(label, prediction, num_classes, ignore=255):
    table = [[0] * num_classes for _ in range(num_classes)]
    for truth, guess in zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if truth != ignore:
            table[truth][guess] += 1
    return table


@st.composite
def pairs(draw):
    """(label, prediction, num_classes), with void, and with all pixels void now and then."""
    num_classes = draw(st.integers(1, 256))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=12))
    void = 255 if num_classes < 256 else 0
    ids = st.one_of(st.integers(0, num_classes - 1), st.just(void))
    label = draw(st.one_of(hnp.arrays(np.uint8, shape, elements=ids), st.just(np.full(shape, void, np.uint8))))
    prediction = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, num_classes - 1)))
    return label, prediction, num_classes, void


@settings(deadline=None, max_examples=150)
@given(pairs())
def test_equals_counting_pixel_by_pixel(pair):
    label, prediction, num_classes, void = pair
    counts = confusion(label, prediction, num_classes, void)
    assert counts.dtype == np.int64
    assert counts.tolist() == count_by_hand(label, prediction, num_classes, void)


def test_rows_are_truth_and_void_is_nowhere():
    label = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 2, 2, 1]], np.uint8)
    assert confusion(label, prediction, 3).tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_void_may_be_one_of_the_ids():
    label = np.array([[0, 1, 1]], np.uint8)
    assert confusion(label, np.array([[0, 0, 1]], np.uint8), 2, ignore=1).tolist() == [[1, 0], [0, 0]]


def test_cut_and_strided_views():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 5, (2, 40, 60), dtype=np.uint8)
    label, prediction = label[3:33:2, 5:50][:, ::-1], prediction[1:31:2, 9:54]
    assert confusion(label, prediction, 5).tolist() == count_by_hand(label, prediction, 5)


def test_parts_add_up_to_the_whole(monkeypatch):
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 7, (2, 33, 65), dtype=np.uint8)
    whole = confusion(label, prediction, 7)
    monkeypatch.setattr(module, "_EXACT_PIXELS", 100)
    assert np.array_equal(confusion(label, prediction, 7), whole)


def test_exact_above_what_a_float32_holds():
    pixels = (1 << 24) + 3
    label = np.zeros((1, pixels), np.uint8)
    assert confusion(label, label, 2).tolist() == [[pixels, 0], [0, 0]]


@pytest.mark.parametrize("bad", [19, 200, 254])
def test_a_foreign_label_id_is_named(bad):
    label = np.zeros((4, 4), np.uint8)
    label[1, :3] = bad
    with pytest.raises(ForeignId, match=f"label holds id {bad} at 3 pixels") as caught:
        confusion(label, np.zeros_like(label), 19)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DataError)


@pytest.mark.parametrize("bad", [19, 255])
def test_a_foreign_prediction_is_named_also_on_void(bad):
    prediction = np.zeros((4, 4), np.uint8)
    prediction[0, 0] = bad
    with pytest.raises(ForeignId, match=f"prediction holds id {bad} at 1 pixels"):
        confusion(np.full((4, 4), 255, np.uint8), prediction, 19)


@pytest.mark.parametrize(
    "label, prediction",
    [
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)),
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 3), np.uint8), np.zeros((2, 3), bool)),
        (np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3, 1), np.uint8)),
    ],
)
def test_other_shapes_and_types_are_refused(label, prediction):
    with pytest.raises(UsageError):
        confusion(label, prediction, 2)


@pytest.mark.parametrize("num_classes", [0, 257])
def test_class_counts_that_a_byte_cannot_hold(num_classes):
    with pytest.raises(UsageError):
        confusion(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8), num_classes)
