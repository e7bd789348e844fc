"""Read original images and labels, and refuse files that changed since ingest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from roadseg.data.manifest import Sample
from roadseg.data.masks.form import MaskForm
from roadseg.data.masks.read import mask_bytes, read_ids, train_ids
from roadseg.errors import DataError
from roadseg.files import sha256_bytes
from roadseg.images.decode import Limits, errors_with_path, read_bytes, read_image


def read_frame(root: Path, sample: Sample, form: MaskForm, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [H, W, 3] RGB, train ids uint8 [H, W]) of a sample whose paths start at `root`.

    form: of the sample's part. Raises DataError if a file is missing, or if its SHA-256 differs from the
    manifest's: the data fingerprint would be wrong.
    """
    image = read_picture(root, sample, limits)
    with errors_with_path(sample.label), _readable(sample.label):
        data = mask_bytes(root, sample.label, form, limits)
        _unchanged(sample.label, data, sample.label_sha256)
        ids = read_ids(data, form, limits)
    return image, train_ids(ids, form)


def read_picture(root: Path, sample: Sample, limits: Limits) -> np.ndarray:
    """The image alone, uint8 [H, W, 3] RGB. Raises like `read_frame`."""
    with errors_with_path(sample.image), _readable(sample.image):
        data = read_bytes(root / sample.image, limits)
        _unchanged(sample.image, data, sample.image_sha256)
        return read_image(data, limits)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise DataError(f"can't be read ({e.strerror})", where=path, todo="run ingest again") from e


def _unchanged(path: str, data: bytes, expected: str) -> None:
    if sha256_bytes(data) != expected:
        raise DataError("changed since ingest", expected=f"SHA-256 {expected}", where=path, todo="run ingest again")
