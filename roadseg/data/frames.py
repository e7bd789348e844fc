"""Originals as ingest saw them, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from roadseg.data.manifest import Sample
from roadseg.errors import DataError
from roadseg.files import sha256_bytes
from roadseg.images import Limits, naming, read_bytes, read_image, read_label
from roadseg.labels import LabelSet


def read_frame(root: Path, sample: Sample, label_set: LabelSet, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [H, W, 3] RGB, train ids uint8 [H, W]) of a sample whose paths start at `root`.

    Raises DataError if a file is gone or its SHA-256 is not the manifest's: fingerprints would lie.
    """
    with naming(sample.image):
        image = read_image(_unchanged(root, sample.image, sample.image_sha256, limits), limits)
    with naming(sample.label):
        ids = read_label(_unchanged(root, sample.label, sample.label_sha256, limits), limits)
    return image, label_set.id_to_train[ids]


def _unchanged(root: Path, path: str, sha256: str, limits: Limits) -> bytes:
    try:
        data = read_bytes(root / path, limits)
    except OSError as e:
        raise DataError(f"can't be read ({e.strerror})", where=path, todo="run ingest again") from e
    if sha256_bytes(data) != sha256:
        raise DataError("changed since ingest", expected=f"SHA-256 {sha256}", where=path, todo="run ingest again")
    return data
