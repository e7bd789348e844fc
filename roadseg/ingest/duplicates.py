"""The same picture twice: inside a split it wastes, across splits it makes a score a lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from roadseg.ingest.findings import Finding, plural
from roadseg.ingest.pairs import split_order
from roadseg.ingest.reading import Seen

# Of the 242 bits of `reading.look`. Measured on 468 frames of CamVid: re-encoded (JPEG quality 20 and
# 50), resized, noisy, blurred, brightened and 1 % cropped copies differ in 15 bits at most for 95 % of
# frames, copies cropped by 2 % a side in 25; frames of different drives differ in 62 at least.
NEAR_BITS = 24
_BLOCK_PAIRS = 1 << 20  # comparisons at a time: 32 MB


def duplicates(seen: Sequence[Seen]) -> list[Finding]:
    readable: dict[str, list[Seen]] = {}
    for one in seen:
        if one.pixels_sha256:
            readable.setdefault(one.pair.split, []).append(one)
    splits = split_order(readable)
    findings = [f for split in splits for f in _inside(split, readable[split])]
    for a, b in combinations(splits, 2):
        findings += _across(a, readable[a], b, readable[b])
    return findings


def _inside(split: str, seen: Sequence[Seen]) -> Iterator[Finding]:
    groups: dict[str, list[str]] = {}
    for one in seen:
        groups.setdefault(one.pixels_sha256, []).append(one.pair.image)
    entries = tuple(sorted(" = ".join(sorted(paths)) for paths in groups.values() if len(paths) > 1))
    if entries:
        message = f"{plural(len(entries), 'image')} of {split} stored more than once, pixel for pixel the same"
        fix = "take the copies out: they count twice"
        yield Finding("duplicate-in-split", "warning", split, entries, len(entries), message, fix)


def _across(a: str, seen_a: Sequence[Seen], b: str, seen_b: Sequence[Seen]) -> Iterator[Finding]:
    where = f"{a} and {b}"
    first = {one.pixels_sha256: one.pair.image for one in seen_a}
    exact = tuple(f"{s.pair.image} = {first[s.pixels_sha256]}" for s in seen_b if s.pixels_sha256 in first)
    if exact:
        message = f"{plural(len(exact), 'image')} of {b} also in {a}, pixel for pixel the same"
        fix = f"take them out of {a} or of {b}: a score on {b} would be false"
        yield Finding("duplicate-across-splits", "error", where, exact, len(exact), message, fix)
    others = [s for s in seen_b if s.pixels_sha256 not in first]
    near = [
        f"{one.pair.image} ~ {seen_a[i].pair.image}: {bits} of 242 bits differ"
        for one, (i, bits) in zip(others, nearest(_looks(others), _looks(seen_a)), strict=True)
        if bits <= NEAR_BITS
    ]
    if near:
        message = f"{plural(len(near), 'image')} of {b} that look{'s' if len(near) == 1 else ''} almost like one of {a}"
        fix = (
            f"look at some; a score on {b} flatters if they show the same scene. Holding out whole sequences avoids it"
        )
        yield Finding("near-duplicate", "warning", where, tuple(near), len(near), message, fix)


def _looks(seen: Sequence[Seen]) -> np.ndarray:
    return np.array([s.look for s in seen], np.uint64).reshape(-1, 4)


def nearest(queries: np.ndarray, among: np.ndarray) -> list[tuple[int, int]]:
    """For each hash of uint64 [Q, 4] the (row, differing bits) of the nearest of uint64 [N, 4], N > 0."""
    found = []
    step = max(1, _BLOCK_PAIRS // len(among))
    for start in range(0, len(queries), step):
        bits = np.bitwise_count(queries[start : start + step, None] ^ among).sum(axis=2, dtype=np.uint16)
        rows = bits.argmin(axis=1)
        found += [(int(i), int(row[i])) for i, row in zip(rows, bits, strict=True)]
    return found
