"""Write label maps and overlays for image files and folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadseg.errors import ImageError, UsageError
from roadseg.files import write_atomic
from roadseg.images.decode import Limits, encode_jpeg, encode_label_png, read_image
from roadseg.inference.predictor import Predictor
from roadseg.labels import LabelSet
from roadseg.progress import progress

log = logging.getLogger(__name__)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
OURS = ("_labelTrainIds.png", "_labelIds.png", "_overlay.jpg")  # outputs of an earlier run in the same folder


@dataclass(frozen=True)
class Predicted:
    """The result of `predict`. failed: (path, reason) of every image that could not be read."""

    written: list[Path]
    failed: list[tuple[Path, str]]


def predict(
    predictor: Predictor,
    inputs: Sequence[Path],
    out: Path,
    *,
    ids: str = "trainIds",
    overlay: bool = True,
    limits: Limits | None = None,
) -> Predicted:
    """Write <stem>_labelTrainIds.png (or _labelIds.png) and <stem>_overlay.jpg for every image.

    inputs: files, or folders whose images keep their relative paths below `out`; files in
    folders that end like those outputs are skipped. ids: trainIds or labelIds. An unusable image is
    logged, skipped and listed in `failed`. Raises UsageError for inputs that don't exist, contain no
    image, or would write the same file.
    """
    limits = limits or Limits()
    jobs = list(_jobs(inputs))
    _refuse_clashes(jobs)
    written: list[Path] = []
    failed: list[tuple[Path, str]] = []
    with progress(len(jobs), "predict", "image") as bar:
        for path, relative in jobs:
            try:
                image = read_image(path, limits)
            except (ImageError, OSError) as e:
                reason = str(e) if isinstance(e, ImageError) else f"{path}: can't be read ({e.strerror})"
                log.warning("skipped %s", reason)
                failed.append((path, reason))
                bar.update()
                continue
            label = predictor(image)
            written += _write(image, label, predictor.label_set, out / relative, ids, overlay)
            bar.update()
    return Predicted(written, failed)


def blend(image: np.ndarray, label: np.ndarray, label_set: LabelSet, opacity: float = 0.5) -> np.ndarray:
    """uint8 [H, W, 3]: the image [H, W, 3] blended with the colors of its label map [H, W]."""
    mixed = image * (1 - opacity) + label_set.palette[label] * opacity
    return mixed.round().astype(np.uint8)


def _jobs(inputs: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(image, its path below the output folder without suffix)."""
    for source in inputs:
        if source.is_dir():
            found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found = [p for p in found if not p.name.endswith(OURS)]
            if not found:
                raise UsageError("no image in this folder", expected=", ".join(sorted(SUFFIXES)), where=str(source))
            yield from ((p, p.relative_to(source).with_suffix("")) for p in found)
        elif source.is_file():
            yield source, Path(source.stem)
        else:
            raise UsageError("no such file or folder", where=str(source), todo="check the path")


def _refuse_clashes(jobs: Sequence[tuple[Path, Path]]) -> None:
    seen: dict[Path, Path] = {}
    for path, relative in jobs:
        if relative in seen:
            raise UsageError(
                f"{seen[relative]} and {path} would write the same file",
                expected="one image for each relative path and stem",
                todo="rename one, or predict them into different folders",
            )
        seen[relative] = path


def _write(
    image: np.ndarray, label: np.ndarray, label_set: LabelSet, stem: Path, ids: str, overlay: bool
) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if ids == "labelIds":
        label_path, values = stem.with_name(f"{stem.name}_labelIds.png"), label_set.train_to_id[label]
    else:
        label_path, values = stem.with_name(f"{stem.name}_labelTrainIds.png"), label
    write_atomic(label_path, encode_label_png(values))
    if not overlay:
        return [label_path]
    overlay_path = stem.with_name(f"{stem.name}_overlay.jpg")
    write_atomic(overlay_path, encode_jpeg(blend(image, label, label_set)))
    return [label_path, overlay_path]
