"""`roadseg data errors`: find likely label errors by a model and confident learning (cleanlab).

Northcutt et al., "Confident Learning" (JAIR 2021): a pixel is suspect if the model is more confident of another
class than it is on average for that class. Use a split that the model was not trained on.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from roadseg.data.frames import read_frame
from roadseg.errors import RoadsegError, UsageError
from roadseg.labels import IGNORE
from roadseg.progress import progress
from roadseg.report.page import css_color, fill, picture

if TYPE_CHECKING:
    from roadseg.data.manifest import Manifest, Sample
    from roadseg.images.decode import Limits
    from roadseg.inference.predictor import Predictor

GRID_PX = 128  # labels are compared on a grid of at most this many columns: wrong objects are larger than a cell
EDGE_PX = 1  # grid cells ignored at class borders, where models and annotators are unsure
MAX_CLASS_PAIRS = 3
MAX_IMAGES = 50  # images on the page
PICTURE_PX = 480
_TEMPLATE = Path(__file__).parents[1] / "report" / "label_errors.html"


@dataclass(frozen=True)
class Suspect:
    """An image with suspect pixels. share: of its scored pixels, 0..1.

    pairs: (labeled class, predicted class, share of scored pixels), the largest first. mask: bool [h, w], the
    suspect pixels on the grid.
    """

    sample: Sample
    share: float
    pairs: tuple[tuple[str, str, float], ...]
    mask: np.ndarray

    def to_json(self) -> dict[str, Any]:
        pairs = [{"labelled": a, "seen": b, "share": round(s, 4)} for a, b, s in self.pairs]
        return {"name": self.sample.name, "label": self.sample.label, "share": round(self.share, 4), "pairs": pairs}


@dataclass(frozen=True)
class _ScoredImage:
    """labels: uint8 [n] of the scored pixels. positions: their flat positions on the grid. shape: of the grid."""

    sample: Sample
    labels: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]


def find_suspects(
    predictor: Predictor, manifest: Manifest, root: Path, limits: Limits, split: str, most: int = 50
) -> list[Suspect]:
    """The images of `split` with the largest share of suspect pixels, at most `most`.

    Probabilities are stored in a temporary file between the two passes, so memory does not grow with images x
    classes. Raises UsageError if cleanlab is not installed or the release has other classes.
    """
    inspector_type = _inspector_type()
    classes = manifest.label_set.names
    if predictor.label_set.names != classes:
        raise UsageError(
            f"the release has the classes {', '.join(predictor.label_set.names)}",
            expected=f"those of the data, {', '.join(classes)}",
            where=f"{manifest.source} {split}",
            todo="choose other data (--config, or data.source and data.root), or a release with the same classes, "
            "or set data.taxonomy",
        )
    inspector = inspector_type(num_class=len(classes), n_jobs=1, verbose=False)
    with tempfile.TemporaryFile() as probability_file:
        scored, predictions = [], []
        for sample, labels, probabilities, positions, shape in _predictions(predictor, manifest, root, limits, split):
            scored.append(_ScoredImage(sample, labels, positions, shape))
            predictions.append(probabilities.argmax(axis=1).astype(np.uint8))
            probability_file.write(probabilities.astype(np.float16).tobytes())
            if len(labels):
                inspector.update_confident_thresholds(labels.astype(np.int64), probabilities)
        if not any(len(j.labels) for j in scored):
            return []
        _score_quality(inspector, scored, probability_file, len(classes))
    return _suspects(scored, predictions, np.asarray(inspector.get_label_issues(), np.int64), classes, most)


def _inspector_type() -> Any:
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError as e:
        raise UsageError("cleanlab is not installed", todo="pip install 'roadseg[doctor]'") from e
    return LabelInspector


def _predictions(predictor: Predictor, manifest: Manifest, root: Path, limits: Limits, split: str) -> Any:
    """Yields (sample, labels [n], probabilities float32 [n, K], positions [n], grid shape) for each image."""
    samples = manifest.split(split)
    with progress(len(samples), f"predict {split}", "image") as bar:
        for sample in samples:
            image, label = read_frame(root, sample, manifest.forms[sample.part], limits)
            release = predictor.release
            logits_Khw = (predictor.logits(image) - release.class_offsets[:, None, None]) / release.temperature
            width = min(GRID_PX, logits_Khw.shape[2])
            shape = max(1, round(width * label.shape[0] / label.shape[1])), width
            grid = cv2.resize(label, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            planes = [cv2.resize(p, shape[::-1], interpolation=cv2.INTER_AREA) for p in logits_Khw]
            positions = np.flatnonzero(_interior(grid)).astype(np.int32)
            yield sample, grid.ravel()[positions], _softmax(np.stack(planes), positions), positions, shape
            bar.update()


def _interior(grid: np.ndarray) -> np.ndarray:
    """bool [h, w]: valid pixels whose neighbors all have the same label."""
    kernel = np.ones((2 * EDGE_PX + 1,) * 2, np.uint8)
    same = cv2.dilate(grid, kernel) == cv2.erode(grid, kernel)
    return same & (grid != IGNORE)


def _softmax(logits_Khw: np.ndarray, positions: np.ndarray) -> np.ndarray:
    z = logits_Khw.reshape(len(logits_Khw), -1)[:, positions].T
    e = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=1, keepdims=True)


def _score_quality(inspector: Any, scored: Sequence[_ScoredImage], probability_file: Any, num_classes: int) -> None:
    probability_file.seek(0)
    for one in scored:
        size = len(one.labels) * num_classes * 2
        data = probability_file.read(size)
        if len(data) != size:
            raise RoadsegError("the temporary file is truncated", todo="free disk space in TMPDIR")
        if size:
            probabilities = np.frombuffer(data, np.float16).reshape(-1, num_classes).astype(np.float32)
            inspector.score_label_quality(one.labels.astype(np.int64), probabilities)


def _suspects(
    scored: Sequence[_ScoredImage],
    predictions: Sequence[np.ndarray],
    issues: np.ndarray,
    classes: Sequence[str],
    most: int,
) -> list[Suspect]:
    """issues: positions in the concatenation of all scored pixels."""
    flagged = np.zeros(sum(len(j.labels) for j in scored), bool)
    flagged[issues] = True
    found, start = [], 0
    for one, predicted in zip(scored, predictions, strict=True):
        mine = flagged[start : start + len(one.labels)] & (predicted != one.labels)
        start += len(one.labels)
        if not mine.any():
            continue
        confused = Counter(zip(one.labels[mine].tolist(), predicted[mine].tolist(), strict=True))
        mask = np.zeros(one.shape[0] * one.shape[1], bool)
        mask[one.positions[mine]] = True
        named = tuple((classes[a], classes[b], n / len(mine)) for (a, b), n in confused.most_common(MAX_CLASS_PAIRS))
        found.append(Suspect(one.sample, float(mine.mean()), named, mask.reshape(one.shape)))
    return sorted(found, key=lambda s: (-s.share, s.sample.name))[:most]


def render(title: str, suspects: Sequence[Suspect], manifest: Manifest, root: Path, limits: Limits) -> str:
    """An offline HTML page: each image, and its label with the suspect pixels in full color."""
    palette = manifest.label_set.palette
    examples = []
    for s in suspects[:MAX_IMAGES]:
        image, label = read_frame(root, s.sample, manifest.forms[s.sample.part], limits)
        suspect = cv2.resize(s.mask.astype(np.uint8), label.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0
        colours = palette[label]
        marked = np.where(suspect[..., None], colours, (0.25 * colours + 0.35 * image).astype(np.uint8))
        examples.append((s, picture(image, PICTURE_PX), picture(marked, PICTURE_PX)))
    legend = [(c.name, css_color(c.color)) for c in manifest.label_set.trained]
    return fill(_TEMPLATE, title=title, shown=examples, total=len(suspects), legend=legend)


def table(suspects: Sequence[Suspect]) -> str:
    """One line per image: share of suspect pixels, label path, and the confused classes."""
    lines = [
        f"{s.share:6.1%}  {s.sample.label}  " + "; ".join(f"labeled {a}, predicted {b} {n:.1%}" for a, b, n in s.pairs)
        for s in suspects
    ]
    return "\n".join(lines)
