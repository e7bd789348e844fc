"""Originals as ingest saw them, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from roadseg.data.manifest import Sample
from roadseg.data.masks import MaskForm, mask_digest, mask_path, read_ids, train_ids
from roadseg.errors import DataError
from roadseg.files import sha256_bytes
from roadseg.images import Limits, naming, read_bytes, read_image


def read_frame(root: Path, sample: Sample, form: MaskForm, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [H, W, 3] RGB, train ids uint8 [H, W]) of a sample whose paths start at `root`.

    form: of the sample's part. Raises DataError if a file is gone or its SHA-256 is not the
    manifest's: fingerprints would lie.
    """
    with naming(sample.image):
        data = _read(root, sample.image, limits)
        _unchanged(sample.image, sha256_bytes(data), sample.image_sha256)
        image = read_image(data, limits)
    with naming(sample.label):
        path, key = mask_path(sample.label, form)
        data = _read(root, path, limits)
        _unchanged(sample.label, mask_digest(data, form, key), sample.label_sha256)
        ids = read_ids(data, form, limits, key)
    return image, train_ids(ids, form)


def _read(root: Path, path: str, limits: Limits) -> bytes:
    try:
        return read_bytes(root / path, limits)
    except OSError as e:
        raise DataError(f"can't be read ({e.strerror})", where=path, todo="run ingest again") from e


def _unchanged(path: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError("changed since ingest", expected=f"SHA-256 {expected}", where=path, todo="run ingest again")
