"""The release that the server answers with, loaded in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from fastapi import HTTPException, Response

from roadseg.errors import RoadsegError
from roadseg.images.decode import Limits, encode_label_png, probe, read_image
from roadseg.inference.predictor import Predictor
from roadseg.labels import LabelSet
from roadseg.release.archive import load_release, load_release_folder

logger = logging.getLogger(__name__)

Labels = Literal["trainIds", "labelIds"]


def load_predictor(release: Path, threads: int) -> Predictor:
    """Load a model.tar.gz or the folder of an unpacked one. Raises ArchiveError."""
    loaded = load_release_folder(release) if release.is_dir() else load_release(release)
    return Predictor(loaded, threads)


class Model:
    """The predictor, loaded in the background; `state` is "loading", "ready" or "failed"."""

    predictor: Predictor
    palette: np.ndarray  # uint8 [256, 3], color of each id in the answer
    table: np.ndarray  # uint8 [256], train id to the id in the answer

    def __init__(self, load: Callable[[], Predictor], labels: Labels) -> None:
        self.state = "loading"
        self._load, self._labels = load, labels

    def load(self) -> None:
        try:
            began = time.perf_counter()
            self.predictor = self._load()
            self.predictor(
                np.zeros((64, 64, 3), np.uint8)
            )  # fail here, not at the first request, if the graph can't run
            self.table, self.palette = _output_ids(self.predictor.label_set, self._labels)
            self.state = "ready"
            logger.info("model %s loaded in %.1f s", self.predictor.release.digest, time.perf_counter() - began)
        except RoadsegError as e:
            self.state = "failed"
            logger.error("the model could not be loaded: %s", e)
        except Exception:
            self.state = "failed"
            logger.exception("the model could not be loaded")

    def answer(self, body: bytes, limits: Limits) -> Response:
        """The label map of an encoded photograph. Raises ImageError or HTTPException."""
        format_, width, height = probe(body)
        if format_ not in ("jpeg", "png"):
            raise HTTPException(415, f"the body is a {format_}; expected a JPEG or PNG")
        if width * height > limits.max_pixels:
            raise HTTPException(413, f"{width} x {height} pixels; expected at most {limits.max_pixels:,} in all")
        label = self.table[self.predictor(read_image(body, limits))]
        height, width = label.shape
        digest = self.predictor.release.digest
        return Response(
            encode_label_png(label, self.palette),
            media_type="image/png",
            headers={
                "X-Roadseg-Width": str(width),
                "X-Roadseg-Height": str(height),
                "X-Roadseg-Release": digest,
                # The only header of the container's answer that SageMaker passes to the caller.
                "X-Amzn-SageMaker-Custom-Attributes": f"width={width};height={height};release={digest}",
            },
        )


def _output_ids(label_set: LabelSet, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    if labels == "trainIds":
        return np.arange(256, dtype=np.uint8), label_set.palette
    palette = np.zeros((256, 3), np.uint8)
    for c in label_set.classes:
        if 0 <= c.id <= 255:
            palette[c.id] = c.color
    return label_set.train_to_id, palette
