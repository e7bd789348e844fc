"""Find images with equal pixels in different files.

Hashing pixels costs a hundredth of decoding, and hardly any image has a copy. So only images whose files differ
but whose statistics and size are equal are decoded again and hashed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

import xxhash

from roadseg.errors import ImageError
from roadseg.images.decode import Limits, read_bytes, read_image
from roadseg.ingest.measure import MeasuredPair


def with_pixel_digests(
    root: Path, limits: Limits, measured: Sequence[MeasuredPair], pool: Executor | None
) -> list[MeasuredPair]:
    """Return the pairs with equal `pixels_digest` for images of equal pixels. pool: decodes, if given."""
    alike: dict[object, dict[str, str]] = defaultdict(dict)  # path by file digest, grouped by size and statistics
    for s in measured:
        if s.pixels_digest:
            alike[s.width, s.height, s.stats].setdefault(s.pixels_digest, s.pair.image)
    doubtful = [file for files in alike.values() if len(files) > 1 for file in files.items()]
    digest = partial(_pixels_digest, root, limits)
    digests = pool.map(digest, doubtful) if pool else map(digest, doubtful)
    of_pixels = dict(zip((file for file, _ in doubtful), digests, strict=True))
    return [replace(s, pixels_digest=of_pixels[d]) if (d := s.pixels_digest) in of_pixels else s for s in measured]


def _pixels_digest(root: Path, limits: Limits, file: tuple[str, str]) -> str:
    """XXH3-128 of the decoded image (digest of the file, path) and its size."""
    try:
        pixels = read_image(read_bytes(root / file[1], limits), limits)
    except (ImageError, OSError):  # the file changed since it was measured: keep the file's digest
        return file[0]
    return f"{xxhash.xxh3_128(pixels.data).hexdigest()}-{pixels.shape[1]}x{pixels.shape[0]}"
