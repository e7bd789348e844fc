"""0 in impossible places is reported; real roads, skies and hoods are not."""

import numpy as np
import pytest

from roadseg.data.masks.form import MaskForm
from roadseg.ingest.checks.void_as_class import void_as_class
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CITYSCAPES, IGNORE, LabelClass, LabelSet


def label_set(first: str, void: int = 255) -> LabelSet:
    rows = [(first, 0, 0), ("building", 1, 1), ("car", 2, 2), ("void", void, IGNORE)]
    return LabelSet("mine", tuple(LabelClass(name, i, t, (i, 1, 1)) for name, i, t in rows))


def scene(seed: int, first: str) -> np.ndarray:
    """uint8 [16, 32] train ids: a wedge of road below or of sky above, and some void."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:16, 0:32]
    depth = row - rng.integers(7, 10) if first == "road" else rng.integers(5, 8) - row
    places = np.where(abs(column - rng.integers(10, 22)) < 3 * depth, 0, 1).astype(np.uint8)
    places[rng.integers(0, 16, 6), rng.integers(0, 32, 6)] = IGNORE
    return places


def measured(places: np.ndarray, name: str) -> MeasuredPair:
    counts = [int((places == t).sum()) for t in (0, 1, 2, IGNORE)]
    return MeasuredPair(
        Pair("val", name, "", f"{name}.png", f"{name}_ids.png"), (), histogram=(*counts,), places=places.tobytes()
    )


def judge(scenes: list[np.ndarray], first: str, form: MaskForm | None = None) -> list[str]:
    form = form or MaskForm("ids", label_set(first))
    found = void_as_class("val", "val", [measured(s, str(i)) for i, s in enumerate(scenes)], form)
    assert all((f.code, f.severity, f.split) == ("void-as-class", "warning", "val") for f in found)
    return [f.message for f in found]


@pytest.mark.parametrize("first", ["road", "sky"])
def test_clean_scenes_give_no_warning(first):
    assert judge([scene(i, first) for i in range(20)], first) == []


@pytest.mark.parametrize("first", ["road", "sky", "building"])
@pytest.mark.parametrize(
    ("side", "at"),
    [("top", np.s_[:1]), ("bottom", np.s_[-2:]), ("left", np.s_[:, :1]), ("right", np.s_[:, -3:])],
)
def test_padding_is_reported(side, at, first):
    scenes = [scene(i, "sky" if first == "sky" else "road") for i in range(20)]
    for s in scenes:
        s[at] = 0
    if (first, side) in (("road", "bottom"), ("sky", "top")):
        assert judge(scenes, first) == []  # as on a motorway
        return
    (message,) = judge(scenes, first)
    assert message.startswith(
        f"{first}, whose value in the masks is 0, lies along the {side} edge of all 20 labels of val"
    )
    assert judge(scenes[:7], first) == []  # with few labels it may be a coincidence
    scenes[3][at] = 1
    assert judge(scenes, first) == []


@pytest.mark.parametrize(("first", "zone"), [("road", "top"), ("sky", "bottom")])
def test_void_written_as_0_is_found_in_impossible_places(first, zone):
    scenes = [np.where(s == IGNORE, 0, s) for s in (scene(i, first) for i in range(20))]
    (message,) = judge(scenes, first)
    assert "without void" in message and f"at the {zone} of the picture" in message
    assert judge(scenes, "building") == []  # may be anywhere
    with_void = [s.copy() for s in scenes]
    for s in with_void:
        s[8, 8] = IGNORE  # void is stored as void
    assert judge(with_void, first) == []


def test_only_if_0_is_a_learned_class():
    scenes = [scene(i, "road") for i in range(20)]
    for s in scenes:
        s[:1] = 0
    assert judge(scenes, "road", MaskForm("ids", CITYSCAPES)) == []
    assert judge(scenes, "road", MaskForm("ids", label_set("road", void=0))) != []  # the class takes precedence
    assert judge(scenes, "road", MaskForm("polygons", label_set("road"), background=255)) == []
    assert judge(scenes, "road", MaskForm("polygons", label_set("road"), background=0)) != []
    assert judge(scenes, "road", MaskForm("colors", label_set("road"))) == []  # black is not a class
