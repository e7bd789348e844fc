"""Stage 4: score a release archive on original images and their own labels."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.data.frames import read_frame
from roadseg.data.manifest import Manifest, Sample
from roadseg.errors import DataError
from roadseg.evaluate.report import Scene, panels, render
from roadseg.files import read_json, write_json
from roadseg.images.decode import Limits
from roadseg.inference.predictor import Predictor
from roadseg.metrics.confusion import confusion
from roadseg.metrics.iou import scores
from roadseg.progress import progress
from roadseg.report.page import picture

VERSION = 3
SCHEMA_VERSION = 1
METRICS, SCENES = "metrics.json", "scenes"
PANELS = ("image", "truth", "prediction", "error")
DECODED_AHEAD = 3


@dataclass(frozen=True)
class Images:
    """The frames to score: their manifest, root folder and decoding limits."""

    manifest: Manifest
    root: Path
    limits: Limits

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """(image uint8 [H, W, 3] RGB, train ids uint8 [H, W])."""
        return read_frame(self.root, sample, self.manifest.forms[sample.part], self.limits)


def evaluate(predictor: Predictor, images: Images, splits: Sequence[str], scenes: int, work: Path) -> dict[str, Any]:
    """Score `splits`, the first in full, the others in brief; write metrics.json, scenes/ and report.html.

    Memory does not grow with the number of images. Returns the content of metrics.json. Raises
    DataError when a split is absent or the release was trained on other classes.
    """
    label_set = images.manifest.label_set
    if predictor.label_set.names != label_set.names:
        raise DataError(
            f"the release predicts {len(predictor.label_set.names)} classes ({', '.join(predictor.label_set.names)})",
            expected=f"the data's {len(label_set.names)} ({', '.join(label_set.names)})",
            where=f"release {predictor.release.digest[:12]}",
            todo="evaluate it on data with its classes; data.taxonomy selects the data's classes (cityscapes: its 19)",
        )
    main, *others = splits
    matrix, by_image = _score_split(predictor, images, main)
    model = predictor.release.model
    frequency = np.asarray(model["train_class_pixels"][:-1], float) / max(1, sum(model["train_class_pixels"][:-1]))
    evaluation = {
        "schema_version": SCHEMA_VERSION,
        "release": predictor.release.digest,
        "runtime": predictor.runtime,
        "source": images.manifest.source,
        "split": main,
        "images": len(images.manifest.split(main)),
        "data_fingerprint": images.manifest.fingerprint(main),
        **scores(matrix, label_set),
        "confusion": matrix.tolist(),
        "classes": [
            {"name": c.name, "color": list(c.color), "train_frequency": float(f)}
            for c, f in zip(label_set.trained, frequency, strict=True)
        ],
        "per_image": _quantiles([miou for miou, _ in by_image]),
        "other_splits": {split: _brief(predictor, images, split) for split in others},
        "model": {**model["architecture"], "parameters": model["parameters"], "temperature": model["temperature"]},
        "training": model["training"],
    }
    write_json(work / METRICS, evaluation)
    _write_scenes(predictor, images, by_image, scenes, work / SCENES)
    best, worst = read_scenes(work)
    title = f"roadseg evaluation of {images.manifest.source} {main}"
    (work / "report.html").write_text(render(evaluation, best, worst, title=title), encoding="utf-8")
    return evaluation


def _score_split(predictor: Predictor, images: Images, split: str) -> tuple[np.ndarray, list[tuple[float, Sample]]]:
    """The split's confusion matrix, and (mIoU, sample) of every image that has a valid pixel."""
    samples = images.manifest.split(split)
    label_set = images.manifest.label_set
    total = np.zeros((label_set.num_classes, label_set.num_classes), np.int64)
    by_image = []
    with progress(len(samples), f"evaluate {split}", "image") as bar:
        for sample, (image, label) in read_ahead(samples, images.read):
            matrix = confusion(label, predictor(image), label_set.num_classes)
            total += matrix
            if (miou := scores(matrix, label_set)["miou"]) is not None:
                by_image.append((miou, sample))
            bar.update()
    return total, by_image


def read_ahead(
    samples: Sequence[Sample], read: Callable[[Sample], tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[Sample, tuple[np.ndarray, np.ndarray]]]:
    """Decode up to DECODED_AHEAD frames ahead in a thread, so that memory stays flat."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [(s, pool.submit(read, s)) for s in samples[:DECODED_AHEAD]]
        for following in [*samples[DECODED_AHEAD:], *[None] * min(DECODED_AHEAD, len(samples))]:
            sample, future = waiting.pop(0)
            if following is not None:
                waiting.append((following, pool.submit(read, following)))
            yield sample, future.result()


def _brief(predictor: Predictor, images: Images, split: str) -> dict[str, Any]:
    matrix, _ = _score_split(predictor, images, split)
    kept = ("miou", "pixel_accuracy", "mean_accuracy", "class_iou", "pixels")
    result = scores(matrix, images.manifest.label_set)
    return {
        "images": len(images.manifest.split(split)),
        "data_fingerprint": images.manifest.fingerprint(split),
        **{k: result[k] for k in kept},
    }


def _quantiles(mious: Sequence[float]) -> dict[str, float]:
    names = {"minimum": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "maximum": 1.0}
    return {name: float(np.quantile(mious, q)) for name, q in names.items()} if mious else {}


def _write_scenes(
    predictor: Predictor, images: Images, by_image: list[tuple[float, Sample]], count: int, folder: Path
) -> None:
    """scenes.json and the JPEG panels of the best and worst scenes; a scene is in one list only."""
    folder.mkdir(exist_ok=True)
    count = min(count, len(by_image) // 2)
    ranked = {
        "best": heapq.nlargest(count, by_image, key=lambda row: (row[0], row[1].name)),
        "worst": heapq.nsmallest(count, by_image, key=lambda row: (row[0], row[1].name)),
    }
    index: dict[str, list[dict[str, Any]]] = {}
    for kind, rows in ranked.items():
        for i, (miou, sample) in enumerate(rows):
            image, label = images.read(sample)
            pictures = panels(image, label, predictor(image), images.manifest.label_set.palette)
            for name, panel in zip(PANELS, pictures, strict=True):
                (folder / f"{kind}-{i}-{name}.jpg").write_bytes(picture(panel))
            index.setdefault(kind, []).append({"name": sample.name, "miou": miou})
    write_json(folder / "scenes.json", index)


def read_scenes(folder: Path) -> tuple[list[Scene], list[Scene]]:
    """The best and the worst scenes that `evaluate` left in its output folder."""
    index = read_json(folder / SCENES / "scenes.json")

    def scene(kind: str, i: int, row: dict[str, Any]) -> Scene:
        files = {name: (folder / SCENES / f"{kind}-{i}-{name}.jpg").read_bytes() for name in PANELS}
        return Scene(row["name"], row["miou"], **files)

    best, worst = ([scene(kind, i, row) for i, row in enumerate(index.get(kind, []))] for kind in ("best", "worst"))
    return best, worst
