"""Labels that a trained model doubts: `roadseg data errors`, by confident learning (cleanlab).

Northcutt et al., "Confident Learning" (JAIR 2021): a pixel is suspect when the model is surer of
another class than it usually is of that class. The model must not have learned these labels by heart:
score a split that it was not trained on.
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

GRID_PX = 128  # a label is judged on at most so many columns: a wrong object is larger than one of them
EDGE_PX = 1  # of that grid: where classes meet, every model and every annotator is unsure
SHOWN_PAIRS = 3
SHOWN = 50  # images on the page
PICTURE_PX = 480
_TEMPLATE = Path(__file__).parents[1] / "report" / "label_errors.html"


@dataclass(frozen=True)
class Suspect:
    """One image whose label is doubted. share: of its judged pixels, 0..1.

    pairs: (class as labelled, class as seen, share of judged pixels), the largest first. mask: bool
    [h, w] of the doubted pixels on the grid.
    """

    sample: Sample
    share: float
    pairs: tuple[tuple[str, str, float], ...]
    mask: np.ndarray

    def to_json(self) -> dict[str, Any]:
        pairs = [{"labelled": a, "seen": b, "share": round(s, 4)} for a, b, s in self.pairs]
        return {"name": self.sample.name, "label": self.sample.label, "share": round(self.share, 4), "pairs": pairs}


@dataclass(frozen=True)
class _Judged:
    """What is kept of an image: labels uint8 [n] of judged pixels, their flat grid positions, the grid's size."""

    sample: Sample
    labels: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]


def find_suspects(
    predictor: Predictor, manifest: Manifest, root: Path, limits: Limits, split: str, most: int = 50
) -> list[Suspect]:
    """The images of `split` with the largest share of doubted pixels, at most `most`.

    Memory does not grow with images x classes: probabilities lie in a temporary file between the two
    passes. Raises UsageError without cleanlab or when the release knows other classes.
    """
    inspector_type = _inspector()
    classes = manifest.label_set.names
    if predictor.label_set.names != classes:
        raise UsageError(
            f"the release knows {', '.join(predictor.label_set.names)}",
            expected=f"the data's classes {', '.join(classes)}",
            where=f"{manifest.source} {split}",
            todo="name other data (--config, or data.source and data.root), choose a release of the same classes, "
            "or set data.taxonomy",
        )
    inspector = inspector_type(num_class=len(classes), n_jobs=1, verbose=False)
    with tempfile.TemporaryFile() as kept:
        judged, seen = [], []
        for sample, labels, probabilities, positions, shape in _judgements(predictor, manifest, root, limits, split):
            judged.append(_Judged(sample, labels, positions, shape))
            seen.append(probabilities.argmax(axis=1).astype(np.uint8))
            kept.write(probabilities.astype(np.float16).tobytes())
            if len(labels):
                inspector.update_confident_thresholds(labels.astype(np.int64), probabilities)
        if not any(len(j.labels) for j in judged):
            return []
        _score_again(inspector, judged, kept, len(classes))
    return _suspects(judged, seen, np.asarray(inspector.get_label_issues(), np.int64), classes, most)


def _inspector() -> Any:
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError as e:
        raise UsageError("cleanlab is not installed", todo="pip install 'roadseg[doctor]'") from e
    return LabelInspector


def _judgements(predictor: Predictor, manifest: Manifest, root: Path, limits: Limits, split: str) -> Any:
    """Yields (sample, labels [n], probabilities float32 [n, K], positions [n], grid shape) for each image."""
    samples = manifest.split(split)
    with progress(len(samples), f"judge {split}", "image") as bar:
        for sample in samples:
            image, label = read_frame(root, sample, manifest.forms[sample.part], limits)
            release = predictor.release
            logits_Khw = (predictor.logits(image) - release.class_offsets[:, None, None]) / release.temperature
            width = min(GRID_PX, logits_Khw.shape[2])
            shape = max(1, round(width * label.shape[0] / label.shape[1])), width
            grid = cv2.resize(label, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            planes = [cv2.resize(p, shape[::-1], interpolation=cv2.INTER_AREA) for p in logits_Khw]
            positions = np.flatnonzero(_inside(grid)).astype(np.int32)
            yield sample, grid.ravel()[positions], _softmax(np.stack(planes), positions), positions, shape
            bar.update()


def _inside(grid: np.ndarray) -> np.ndarray:
    """bool [h, w]: valid pixels whose neighbours all have the same label."""
    kernel = np.ones((2 * EDGE_PX + 1,) * 2, np.uint8)
    same = cv2.dilate(grid, kernel) == cv2.erode(grid, kernel)
    return same & (grid != IGNORE)


def _softmax(logits_Khw: np.ndarray, positions: np.ndarray) -> np.ndarray:
    z = logits_Khw.reshape(len(logits_Khw), -1)[:, positions].T
    e = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=1, keepdims=True)


def _score_again(inspector: Any, judged: Sequence[_Judged], kept: Any, num_classes: int) -> None:
    kept.seek(0)
    for one in judged:
        size = len(one.labels) * num_classes * 2
        data = kept.read(size)
        if len(data) != size:
            raise RoadsegError("the temporary file was cut off", todo="free some disk space for TMPDIR")
        if size:
            probabilities = np.frombuffer(data, np.float16).reshape(-1, num_classes).astype(np.float32)
            inspector.score_label_quality(one.labels.astype(np.int64), probabilities)


def _suspects(
    judged: Sequence[_Judged], seen: Sequence[np.ndarray], issues: np.ndarray, classes: Sequence[str], most: int
) -> list[Suspect]:
    """issues: positions in the concatenation of all judged pixels."""
    flagged = np.zeros(sum(len(j.labels) for j in judged), bool)
    flagged[issues] = True
    found, start = [], 0
    for one, predicted in zip(judged, seen, strict=True):
        mine = flagged[start : start + len(one.labels)] & (predicted != one.labels)
        start += len(one.labels)
        if not mine.any():
            continue
        pairs = Counter(zip(one.labels[mine].tolist(), predicted[mine].tolist(), strict=True)).most_common(SHOWN_PAIRS)
        mask = np.zeros(one.shape[0] * one.shape[1], bool)
        mask[one.positions[mine]] = True
        named = tuple((classes[a], classes[b], n / len(mine)) for (a, b), n in pairs)
        found.append(Suspect(one.sample, float(mine.mean()), named, mask.reshape(one.shape)))
    return sorted(found, key=lambda s: (-s.share, s.sample.name))[:most]


def render(title: str, suspects: Sequence[Suspect], manifest: Manifest, root: Path, limits: Limits) -> str:
    """An offline HTML page: image, and its label with the doubted places left in full colour."""
    palette = manifest.label_set.palette
    shown = []
    for s in suspects[:SHOWN]:
        image, label = read_frame(root, s.sample, manifest.forms[s.sample.part], limits)
        doubted = cv2.resize(s.mask.astype(np.uint8), label.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT) > 0
        colours = palette[label]
        marked = np.where(doubted[..., None], colours, (0.25 * colours + 0.35 * image).astype(np.uint8))
        shown.append((s, picture(image, PICTURE_PX), picture(marked, PICTURE_PX)))
    legend = [(c.name, css_color(c.color)) for c in manifest.label_set.trained]
    return fill(_TEMPLATE, title=title, shown=shown, total=len(suspects), legend=legend)


def table(suspects: Sequence[Suspect]) -> str:
    """One line an image: share of doubted pixels, name, and what was taken for what."""
    lines = [
        f"{s.share:6.1%}  {s.sample.label}  " + "; ".join(f"labelled {a}, seen {b} {n:.1%}" for a, b, n in s.pairs)
        for s in suspects
    ]
    return "\n".join(lines)
