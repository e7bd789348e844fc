"""Outliers are reported, ordinary images are not; and splits with different class distributions."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadseg.ingest.checks.outliers import FEWEST, histogram_drift, outliers, psi
from roadseg.ingest.image_stats import image_stats
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources import camvid
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import CAMVID, CITYSCAPES
from roadseg.town import render


def measured(image: np.ndarray, path: str, part: str = "", **fields) -> MeasuredPair:
    split, _, name = path.partition("/")
    height, width = image.shape[:2]
    return MeasuredPair(
        Pair(split, name, "", path, "", part=part), (), width, height, stats=image_stats(image), **fields
    )


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Forty frames of the town, uint8 [128, 256, 3]."""
    return [render(9, k, 256, 128).image for k in range(40)]


@pytest.fixture(scope="module")
def ordinary(images) -> list[MeasuredPair]:
    return [measured(i, f"train/{k:02}.png") for k, i in enumerate(images)]


PLANTED = {
    "too-dark": [lambda i: np.zeros_like(i), lambda i: cv2.convertScaleAbs(i, alpha=0.05)],
    "too-bright": [lambda i: np.full_like(i, 255), lambda i: cv2.convertScaleAbs(i, alpha=6)],
    "blurred": [lambda i: cv2.GaussianBlur(i, (0, 0), 2), lambda i: cv2.blur(i, (15, 1))],
    "odd-color": [
        lambda i: cv2.cvtColor(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
        lambda i: np.clip(i * np.array([1.9, 1, 0.4]), 0, 255).astype(np.uint8),
    ],
    "odd-size": [lambda i: np.ascontiguousarray(i[::2, ::2]), lambda i: np.ascontiguousarray(i[:, :128])],
}


def test_ordinary_frames_give_no_warning(ordinary):
    assert outliers(ordinary) == []


@pytest.mark.parametrize("code,which", [(code, k) for code, alters in PLANTED.items() for k in range(len(alters))])
def test_an_outlier_is_reported(images, ordinary, code, which):
    for k in (0, 7, 21):
        planted = measured(PLANTED[code][which](images[k]), "train/odd.png")
        found = {f.code: f for f in outliers([*ordinary, planted])}
        assert code in found and all(len(f.files) == 1 for f in found.values())
        finding = found[code]
        assert finding.files[0].startswith("train/odd.png: ") and finding.message.startswith("1 image of train ")
        assert (finding.severity, finding.split, finding.count) == ("warning", "train", 1)


def test_a_black_image_is_only_too_dark(images, ordinary):
    (finding,) = outliers([*ordinary, measured(np.zeros_like(images[0]), "train/odd.png")])
    assert finding.code == "too-dark" and finding.files == ("train/odd.png: 100 % of it black",)


def test_black_and_white_images_are_reported_in_small_sets(images):
    few = [
        measured(images[0], "train/a.png"),
        measured(images[0] * 0, "train/b.png"),
        measured(images[0] * 0 + 255, "val/c.png"),
    ]
    assert [(f.code, f.split) for f in outliers(few)] == [("too-dark", "train"), ("too-bright", "val")]


@pytest.mark.parametrize("code", ["blurred", "odd-color", "odd-size"])
def test_fewer_than_thirty_images_have_no_outliers(images, ordinary, code):
    planted = measured(PLANTED[code][0](images[0]), "train/odd.png")
    assert outliers([*ordinary[: FEWEST - 2], planted]) == []
    assert [f.code for f in outliers([*ordinary[: FEWEST - 1], planted])] == [code]


def test_frequent_values_are_no_outliers(images, ordinary):
    blurred = [measured(cv2.GaussianBlur(i, (0, 0), 2), f"train/b{k}.png") for k, i in enumerate(images[:8])]
    assert outliers(ordinary + blurred) == []


def test_gray_sets_are_not_odd_and_parts_are_compared_separately(images, ordinary):
    grey = [
        measured(cv2.cvtColor(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), f"train/g{k}.png", "infrared")
        for k, i in enumerate(images)
    ]
    assert outliers(grey) == []
    assert outliers(ordinary + grey) == []
    same_part = [replace(s, pair=replace(s.pair, part="")) for s in grey[:3]]
    (finding,) = outliers(ordinary + same_part)
    assert finding.code == "odd-color" and finding.count == 3


def test_sets_of_many_sizes_are_compared_by_aspect(images):
    def varied(k: int) -> np.ndarray:
        return cv2.resize(images[k], (200 + 8 * k, 100 + 4 * k + k % 7))

    frames = [measured(varied(k), f"train/{k:02}.png") for k in range(40)]
    assert outliers(frames) == []
    (finding,) = outliers([*frames, measured(np.ascontiguousarray(images[0][:, :64]), "train/tall.png")])
    assert finding.code == "odd-size" and finding.files[0].startswith("train/tall.png: 64x128")


def test_exif_rotated_images_are_listed(images):
    frames = [measured(images[k], f"val/{k}.jpg", orientation=o) for k, o in enumerate((1, 6, 8))]
    (finding,) = outliers(frames)
    assert (finding.code, finding.severity, finding.split, finding.count) == ("exif-rotated", "warning", "val", 2)
    assert finding.files == ("val/1.jpg: EXIF orientation 6", "val/2.jpg: EXIF orientation 8")
    assert "masks are taken as they are stored" in finding.fix


def test_unreadable_images_are_skipped(ordinary):
    assert outliers([*ordinary, MeasuredPair(Pair("train", "x", "", "train/x.png", ""), ())]) == []


def labelled(split: str, shares: list[float], count: int, void: int = 0) -> list[MeasuredPair]:
    histogram = (*(round(10_000 * s) for s in shares), void)
    return [
        MeasuredPair(Pair(split, str(k), "", f"{split}/{k}.png", ""), (), histogram=histogram) for k in range(count)
    ]


def test_psi_is_the_sum_over_classes_of_difference_times_log_ratio():
    a, b = np.array([60.0, 30.0, 10.0]), np.array([200.0, 500.0, 300.0])
    # (.6 - .2) ln(3) + (.3 - .5) ln(.6) + (.1 - .3) ln(1/3)
    assert psi(a, b).sum() == pytest.approx(0.439445 + 0.102165 + 0.219722, abs=1e-5)
    assert psi(a, a).sum() == 0 and psi(a, b).sum() == pytest.approx(psi(b, a).sum())
    assert np.isfinite(psi(np.array([1.0, 0.0]), np.array([0.0, 1.0]))).all()


def test_classes_that_differ_between_splits_are_named_with_their_shares():
    even = [0.05] * 10 + [0.5] + [0.0] * 8
    shifted = [0.4] + [0.05] * 9 + [0.15] + [0.0] * 8
    (finding,) = histogram_drift(labelled("train", even, 40) + labelled("val", shifted, 40), CITYSCAPES)
    assert (finding.code, finding.severity, finding.split) == ("class-drift", "warning", "train and val")
    expected = (0.35 * np.log(8)) + 0.35 * np.log(0.5 / 0.15)
    assert f"PSI {expected:.2f}, above 0.25" in finding.message
    first, last = CITYSCAPES.names[0], CITYSCAPES.names[10]
    assert f"{first} 5 % and 40 %" in finding.message and f"{last} 50 % and 15 %" in finding.message
    assert finding.count == 2


def test_void_small_shifts_and_small_splits_are_not_drift():
    even, shifted = [0.5, 0.5] + [0.0] * 17, [0.6, 0.4] + [0.0] * 17
    train = labelled("train", even, 40)
    assert histogram_drift(train + labelled("val", even, 40, void=90_000), CITYSCAPES) == []
    assert histogram_drift(train + labelled("val", shifted, 40), CITYSCAPES) == []
    assert histogram_drift(train + labelled("val", [0.0, 1.0] + [0.0] * 17, FEWEST - 1), CITYSCAPES) == []
    assert histogram_drift(train + labelled("val", [0.0, 1.0] + [0.0] * 17, FEWEST), CITYSCAPES) != []
    assert histogram_drift([], CITYSCAPES) == []


def test_camvid_has_no_odd_images_and_no_drift(real_data: Path):
    root = real_data / "camvid"
    pairs, _ = camvid.pairs(root)
    frames = []
    for p in pairs:
        image = cv2.cvtColor(cv2.imread(str(root / p.image)), cv2.COLOR_BGR2RGB)
        label = cv2.imread(str(root / p.label), cv2.IMREAD_UNCHANGED)
        histogram = tuple(np.bincount(label.ravel(), minlength=12).tolist())
        frames.append(replace(measured(image, p.image), histogram=histogram))
    assert len(frames) == 468 and outliers(frames) == []
    assert histogram_drift(frames, CAMVID) == []
