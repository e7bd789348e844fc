"""A data set's profile, small enough for a release; `roadseg data diff` compares two of them.

Frames are first reduced to at most WIDTH_PX columns, so that camera resolution alone makes no difference.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from roadseg.errors import DataError
from roadseg.labels import LabelSet

FRAMES = 256  # a profile uses at most this many frames, evenly spaced
WIDTH_PX = 512
QUANTITIES = {
    "exposure": "mean luma of a frame, 0..255",
    "contrast": "standard deviation of a frame's luma",
    "sharpness": "variance of the luma's Laplacian, natural logarithm",
    "saturation": "mean of a frame's HSV saturation, 0..255",
    "warmth": "mean red less mean blue, -255..255",
}
SCHEMA = 1
Embed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Profile:
    """Profile of one split. class_pixels: pixels by class name in all its frames, without void.

    values: float32 [N], one per sampled frame, by the names in QUANTITIES. embeddings: float32 [N, D] from the
    backbone with the digest `embedded_by`; [0, 0] without a network.
    """

    title: str
    images: int
    class_pixels: dict[str, int]
    values: dict[str, np.ndarray]
    embeddings: np.ndarray
    embedded_by: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "title": self.title,
            "images": self.images,
            "class_pixels": self.class_pixels,
            "values": {name: [round(float(v), 3) for v in values] for name, values in self.values.items()},
            "embeddings": {
                "by": self.embedded_by,
                "shape": list(self.embeddings.shape),
                "float16": base64.b64encode(self.embeddings.astype("<f2").tobytes()).decode(),
            },
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Profile:
        """Raises DataError for anything that `to_json` cannot have written."""
        try:
            if data["schema"] > SCHEMA:
                raise DataError(f"a data profile of schema {data['schema']}", todo="update roadseg")
            e = data["embeddings"]
            rows, columns = (int(n) for n in e["shape"])
            packed = np.frombuffer(base64.b64decode(e["float16"], validate=True), "<f2")
            return Profile(
                str(data["title"]),
                int(data["images"]),
                {str(k): int(v) for k, v in data["class_pixels"].items()},
                {name: np.array(data["values"][name], np.float32).reshape(-1) for name in QUANTITIES},
                packed.astype(np.float32).reshape(rows, columns),
                str(e["by"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DataError(f"not a readable data profile ({type(e).__name__}: {e})", todo="train again") from None


def sampled_indexes(frames: int) -> list[int]:
    """Indexes of at most FRAMES of `frames` frames, evenly spaced."""
    return [int(i) for i in np.linspace(0, frames - 1, min(FRAMES, frames)).round()]


def make_profile(
    title: str,
    images: Iterable[np.ndarray],
    count: int,
    class_pixels: Iterable[int],
    label_set: LabelSet,
    embed: Embed | None = None,
    embedded_by: str = "",
) -> Profile:
    """Profile a split of `count` frames. images: the sampled frames, uint8 [H, W, 3] RGB.

    class_pixels: by train id; a void entry after the classes is ignored. embed: maps a reduced image to float32 [D].
    """
    rows: list[list[float]] = []
    embeddings: list[np.ndarray] = []
    for image in images:
        small = shrink(image)
        rows.append(_quantities(small))
        if embed:
            embeddings.append(embed(small))
    columns = np.array(rows, np.float32).reshape(-1, len(QUANTITIES)).T
    return Profile(
        title,
        count,
        dict(zip(label_set.names, (int(n) for n in class_pixels), strict=False)),
        {name: column for name, column in zip(QUANTITIES, columns, strict=True)},
        np.stack(embeddings).astype(np.float32) if embeddings else np.zeros((0, 0), np.float32),
        embedded_by if embeddings else "",
    )


def shrink(image: np.ndarray) -> np.ndarray:
    """Reduce the image to WIDTH_PX columns by area averaging, if it has more."""
    height, width = image.shape[:2]
    if width <= WIDTH_PX:
        return image
    return cv2.resize(image, (WIDTH_PX, max(1, round(height * WIDTH_PX / width))), interpolation=cv2.INTER_AREA)


def _quantities(image: np.ndarray) -> list[float]:
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    mean = image.reshape(-1, 3).mean(axis=0)
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]
    sharpness = float(cv2.Laplacian(luma, cv2.CV_32F).var())
    return [
        float(luma.mean()), float(luma.std()), float(np.log(sharpness + 1e-3)), float(saturation.mean()),
        float(mean[0] - mean[2]),
    ]  # fmt: skip
