"""Scoring a release whose answers are known: the brightest channel wins."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from roadseg.data.manifest import Manifest
from roadseg.errors import DataError, ImageError
from roadseg.evaluate.stage import DECODED_AHEAD, Images, evaluate, read_ahead, read_scenes
from roadseg.files import content_digest, read_json
from roadseg.images.decode import Limits
from roadseg.inference.predictor import Predictor
from roadseg.labels import IGNORE
from roadseg.release.archive import load_release
from tests.conftest import RGB, THREE, channel_graph, write_frames, write_release


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """At stride 1 the label map is the argmax of the pixels, so that a reference takes one line."""
    path = write_release(tmp_path_factory.mktemp("release") / "m.tar.gz", graph=channel_graph(stride=1))
    return Predictor(load_release(path), threads=1)


def frame(seed: int, wrong: float, void: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """An image and its brightest channel, on a share of pixels `wrong` another one, on a share `void` none."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, 30, 2)
    image = np.stack([rng.permutation(3) for _ in range(height * width)]).reshape(height, width, 3).astype(np.uint8)
    image *= 60
    label = image.argmax(-1).astype(np.uint8)
    label = np.where(rng.random(label.shape) < wrong, rng.integers(0, 3, label.shape), label).astype(np.uint8)
    label[rng.random(label.shape) < void] = IGNORE
    return image, label


SHARES = (0.0, 0.9, 0.3, 0.6, 0.1)
FRAMES = {"val": [frame(i, share) for i, share in enumerate(SHARES)], "holdout": [frame(9, 0.5)]}


def scored(predictor: Predictor, folder: Path, frames: dict = FRAMES, scenes: int = 2, **limits: int) -> dict:
    manifest = write_frames(folder / "data", RGB, frames)
    (folder / "work").mkdir()
    images = Images(manifest, folder / "data", Limits(**limits))
    return evaluate(predictor, images, list(frames), scenes, folder / "work")


def test_the_matrix_and_the_scores_are_numpy_s(predictor: Predictor, tmp_path: Path) -> None:
    result = scored(predictor, tmp_path)
    assert result == read_json(tmp_path / "work" / "metrics.json")
    matrix = np.zeros((3, 3), np.int64)
    for image, label in FRAMES["val"]:
        valid = label != IGNORE
        np.add.at(matrix, (label[valid], image.argmax(-1)[valid]), 1)
    assert result["confusion"] == matrix.tolist()
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert list(result["class_iou"].values()) == pytest.approx(iou, abs=1e-15)
    assert result["miou"] == pytest.approx(iou.mean()) and result["pixels"] == matrix.sum()
    assert (result["images"], result["split"], result["release"]) == (5, "val", predictor.release.digest)
    other = result["other_splits"]["holdout"]
    assert other["images"] == 1 and other["data_fingerprint"] != result["data_fingerprint"]


def test_best_and_worst_are_the_right_ones_and_the_page_is_whole(predictor: Predictor, tmp_path: Path) -> None:
    scored(predictor, tmp_path)
    best, worst = read_scenes(tmp_path / "work")
    assert [s.name for s in best] == ["0", "4"] and [s.name for s in worst] == ["1", "3"]
    assert best[0].miou == 1.0 and all(s.image.startswith(b"\xff\xd8") for s in best + worst)
    page = (tmp_path / "work" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 16 and "http" not in page.replace("http-equiv", "")


def test_the_same_data_elsewhere_gives_the_same_bytes(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("here", "there"):
        scored(predictor, tmp_path / name)
    assert content_digest(tmp_path / "here" / "work") == content_digest(tmp_path / "there" / "work")


@pytest.mark.parametrize("scenes", [0, 50])
def test_a_scene_is_shown_once(predictor: Predictor, tmp_path: Path, scenes: int) -> None:
    scored(predictor, tmp_path, scenes=scenes)
    best, worst = read_scenes(tmp_path / "work")
    assert len(best) == len(worst) == min(scenes, 2)
    assert not {s.name for s in best} & {s.name for s in worst}


def test_void_images_count_as_images_and_are_no_scenes(predictor: Predictor, tmp_path: Path) -> None:
    void = frame(5, 0)[0], np.full(frame(5, 0)[1].shape, IGNORE, np.uint8)
    result = scored(predictor, tmp_path, {"val": [void, frame(1, 0.9), frame(2, 0.5)]}, scenes=5)
    assert result["images"] == 3 and result["per_image"]["maximum"] < 1
    best, worst = read_scenes(tmp_path / "work")
    assert {s.name for s in best + worst} == {"1", "2"}


def test_nothing_but_void_has_no_score(predictor: Predictor, tmp_path: Path) -> None:
    image, label = frame(5, 0)
    result = scored(predictor, tmp_path, {"val": [(image, np.full_like(label, IGNORE))]})
    assert result["miou"] is None and result["pixels"] == 0 and result["per_image"] == {}
    assert (tmp_path / "work" / "report.html").exists()


def test_a_release_of_other_classes(predictor: Predictor, tmp_path: Path) -> None:
    manifest = write_frames(tmp_path, THREE, {"val": [frame(0, 0)]})
    with pytest.raises(DataError, match=r"the release predicts 3 classes \(red, green, blue\).*road, sky, car"):
        evaluate(predictor, Images(manifest, tmp_path, Limits()), ["val"], 1, tmp_path)


def test_an_unknown_split_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    manifest = Manifest("test", RGB, write_frames(tmp_path, RGB, {"val": [frame(0, 0)]}).samples)
    with pytest.raises(DataError, match="no split 'test'; expected one of val"):
        evaluate(predictor, Images(manifest, tmp_path, Limits()), ["test"], 1, tmp_path)


def test_files_that_changed_since_ingest_or_are_too_large(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="val/0.png"):
        scored(predictor, tmp_path, max_pixels=10)
    manifest = write_frames(tmp_path / "data", RGB, {"val": [frame(0, 0)]})
    write_frames(tmp_path / "data", RGB, {"val": [frame(1, 0)]})
    with pytest.raises(DataError, match="val/0.png: changed since ingest"):
        evaluate(predictor, Images(manifest, tmp_path / "data", Limits()), ["val"], 1, tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 10])
def test_read_ahead_keeps_the_order_and_never_runs_far_ahead(count: int) -> None:
    samples = [f"s{i}" for i in range(count)]
    given, lock, furthest = [0], threading.Lock(), [0]

    def read(sample: object) -> tuple[np.ndarray, np.ndarray]:
        with lock:
            given[0] += 1
        return np.array(given[0]), np.array(0)

    taken = 0
    for sample, (number, _) in read_ahead(samples, read):  # type: ignore[arg-type]
        assert sample == samples[taken] and number == taken + 1
        taken += 1
        time.sleep(0.005)
        furthest[0] = max(furthest[0], given[0] - taken)
    assert taken == count and furthest[0] <= DECODED_AHEAD


def test_a_read_error_is_raised_at_its_sample() -> None:
    def read(sample: str) -> tuple[np.ndarray, np.ndarray]:
        if sample == "s2":
            raise ImageError("broken")
        return np.array(0), np.array(0)

    seen = []
    with pytest.raises(ImageError, match="broken"):
        for sample, _ in read_ahead([f"s{i}" for i in range(9)], read):  # type: ignore[arg-type, misc]
            seen.append(sample)
    assert seen == ["s0", "s1"]
