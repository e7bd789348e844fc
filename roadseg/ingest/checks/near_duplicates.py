"""Find equal and nearly equal images, within a split and across splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

from roadseg.ingest.checks.findings import Finding, plural
from roadseg.ingest.image_stats import DESCRIPTOR_PX, DESCRIPTOR_ZERO
from roadseg.ingest.measure import MeasuredPair
from roadseg.ingest.sources.pairs import split_order
from roadseg.progress import progress

# Two frames of at least this similarity are near-duplicates; benchmarks/near_duplicates.py shows how it was chosen
# and what it finds.
NEAR = 0.73
# (zoom, shift in widths) applied before a comparison: driving ahead zooms, turning shifts.
_MOVES = tuple((zoom, shift) for zoom in (1.0, 1.05, 1 / 1.05) for shift in (0.0, -0.02, 0.02))
_VANISHING_ROW = 0.45  # as a share of the height: fixed point of the zoom when a car drives ahead
_QUERIES, _AMONG = 256, 4096  # frames compared at a time: 9 x 256 x 4096 similarities, 38 MB


@dataclass(frozen=True)
class NearPair:
    """Two images with equal pixels (exact) or nearly equal ones; similarity 0..1, 1 if exact.

    Image a is from the earlier split (train, val, test, others); within one split it is the first by path.
    """

    image_a: str
    image_b: str
    split_a: str
    split_b: str
    sequence_a: str
    sequence_b: str
    exact: bool
    similarity: float

    @property
    def same_sequence(self) -> bool:
        """True if both are from the same known sequence, where neighboring frames look alike anyway."""
        return self.sequence_a == self.sequence_b != ""


def duplicates(measured: Sequence[MeasuredPair], near: Sequence[NearPair] | None = None) -> list[Finding]:
    """Findings of copies and near-copies, within and across splits. near: the result of `near_pairs`, if known."""
    readable = [s for s in measured if s.pixels_digest]
    pairs = near_pairs(measured) if near is None else near
    splits = split_order({s.pair.split for s in readable})
    groups = _copies(readable)
    findings = list(_contradicting(groups))
    for split in splits:
        findings += _copied_inside(split, groups)
        of_split = [s for s in readable if s.pair.split == split]
        findings += _alike_inside(split, of_split, [p for p in pairs if p.split_a == p.split_b == split])
    for a, b in combinations(splits, 2):
        findings += _copied_across(a, b, groups)
        findings += _alike_across(a, b, [p for p in pairs if (p.split_a, p.split_b) == (a, b)])
    return findings


def _copies(measured: Iterable[MeasuredPair]) -> list[list[MeasuredPair]]:
    groups: dict[str, list[MeasuredPair]] = {}
    for one in sorted(measured, key=lambda s: s.pair.image):
        groups.setdefault(one.pixels_digest, []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def _contradicting(groups: Sequence[Sequence[MeasuredPair]]) -> Iterator[Finding]:
    entries = []
    for group in groups:
        # Compare decoded labels, not bytes: one mask may be compressed in two ways.
        labels = {(s.histogram, s.places): s.pair for s in reversed(group) if s.histogram}
        if len(labels) > 1:
            entries.append(" = ".join(s.pair.image for s in group) + ": " + ", ".join(s.pair.label for s in group))
    if entries:
        one = len(entries) == 1
        message = f"{plural(len(entries), 'image')} stored more than once, with labels that differ"
        fix = f"keep the right label of {'it' if one else 'each'}, take the other{' ' if one else 's '}out"
        yield Finding("contradicting-labels", "error", "", tuple(entries), len(entries), message, fix)


def _copied_inside(split: str, groups: Sequence[Sequence[MeasuredPair]]) -> Iterator[Finding]:
    of_split = [[s.pair.image for s in group if s.pair.split == split] for group in groups]
    entries = tuple(sorted(" = ".join(paths) for paths in of_split if len(paths) > 1))
    if entries:
        message = f"{plural(len(entries), 'image')} of {split} stored more than once, pixel for pixel the same"
        fix = "take the copies out: they count twice"
        yield Finding("duplicate-in-split", "warning", split, entries, len(entries), message, fix)


def _copied_across(a: str, b: str, groups: Sequence[Sequence[MeasuredPair]]) -> Iterator[Finding]:
    entries = []
    for group in groups:
        first = next((s.pair for s in group if s.pair.split == a), None)
        if first:
            copies = [s.pair for s in group if s.pair.split == b]
            entries += [f"{p.image} = {first.image}{_sequences(first.sequence, p.sequence)}" for p in copies]
    if entries:
        message = f"{plural(len(entries), 'image')} of {b} also in {a}, pixel for pixel the same"
        fix = f"take them out of {a} or of {b}: a score on {b} would be false"
        where = f"{a} and {b}"
        yield Finding("duplicate-across-splits", "error", where, tuple(sorted(entries)), len(entries), message, fix)


def _alike_across(a: str, b: str, pairs: Sequence[NearPair]) -> Iterator[Finding]:
    copied = {p.image_b for p in pairs if p.exact}
    best: dict[str, NearPair] = {}
    for pair in pairs:  # sorted, the most similar first
        if pair.image_b not in copied:
            best.setdefault(pair.image_b, pair)
    if best:
        entries = tuple(_entry(best[image], swapped=True) for image in sorted(best))
        verb = "looks" if len(best) == 1 else "look"
        shared = sum(p.same_sequence for p in best.values())
        drives = f"; {shared:,} of them like one of the same sequence" if shared else ""
        message = f"{plural(len(best), 'image')} of {b} that {verb} almost like one of {a}{drives}"
        fix = (
            f"look at some; a score on {b} flatters if they show the same scene. Holding out whole sequences avoids it"
        )
        yield Finding("near-duplicate", "warning", f"{a} and {b}", entries, len(best), message, fix)


def _alike_inside(split: str, measured: Sequence[MeasuredPair], pairs: Sequence[NearPair]) -> Iterator[Finding]:
    near = [p for p in pairs if not p.exact]
    if not near:
        return
    inside, between = [p for p in near if p.same_sequence], [p for p in near if not p.same_sequence]
    alike = {image for p in near for image in (p.image_a, p.image_b)}
    of_other = {image for p in between for image in (p.image_a, p.image_b)}
    if not of_other:
        where = "all within their own sequence"
    elif all(not p.sequence_a for p in between):
        where = "their sequences are not known"
    else:
        where = f"{len(alike - of_other):,} only within their own sequence, {len(of_other):,} also like one of another"
    message = f"{len(alike):,} of {plural(len(measured), 'image')} of {split} look almost like another: {where}"
    fix = "nothing for neighbours of one drive; frames of different sequences that show one scene count twice"
    entries = (*(_entry(p) for p in between), *_by_sequence(measured, inside))
    yield Finding("near-duplicate-in-split", "warning", split, entries, len(alike), message, fix)


def _by_sequence(measured: Sequence[MeasuredPair], pairs: Sequence[NearPair]) -> Iterator[str]:
    """One entry per sequence: its most similar pair, and how many of its frames look like another one of it."""
    groups: dict[str, list[NearPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.sequence_a, []).append(pair)
    for sequence, of_it in sorted(groups.items()):
        alike = len({image for p in of_it for image in (p.image_a, p.image_b)})
        total = sum(s.pair.sequence == sequence for s in measured)
        yield f"{_entry(of_it[0])}; {alike:,} of the {total:,} images of {sequence} look almost like another of it"


def _entry(pair: NearPair, *, swapped: bool = False) -> str:
    a, b = (pair.image_b, pair.image_a) if swapped else (pair.image_a, pair.image_b)
    names = (pair.sequence_b, pair.sequence_a) if swapped else (pair.sequence_a, pair.sequence_b)
    return f"{a} ~ {b}: {100 * pair.similarity:.0f} % alike{_sequences(*names)}"


def _sequences(a: str, b: str) -> str:
    if not a and not b:
        return ""
    return f" (both of sequence {a})" if a == b else f" (sequences {a or 'not known'} and {b or 'not known'})"


def near_pairs(measured: Sequence[MeasuredPair]) -> list[NearPair]:
    """Pairs of equal or nearly equal images, the most similar first.

    For every image: its best match in each other split, and in its own split the best match of its own sequence
    and of other sequences. So there are few pairs per image, however often a scene was recorded. Exact copies are
    paired with the first of them. Flat images (all black) match nothing.
    """
    readable = sorted((s for s in measured if s.pixels_digest and s.stats), key=lambda s: s.pair.image)
    order = {split: k for k, split in enumerate(split_order({s.pair.split for s in readable}))}
    found: dict[tuple[int, int], float] = {}
    for i, j, similarity in _nearest(readable, order):
        i, j = sorted((i, j), key=lambda k: (order[readable[k].pair.split], k))
        found[i, j] = max(found.get((i, j), 0.0), similarity)
    pairs = [_near_pair(readable[i], readable[j], similarity) for (i, j), similarity in found.items()]
    for group in _copies(readable):
        first, *rest = sorted(group, key=lambda s: order[s.pair.split])
        pairs += [_near_pair(first, one, 1.0, exact=True) for one in rest]
    return sorted(pairs, key=lambda p: (-p.similarity, not p.exact, p.image_a, p.image_b))


def _near_pair(a: MeasuredPair, b: MeasuredPair, similarity: float, *, exact: bool = False) -> NearPair:
    p, q = a.pair, b.pair
    return NearPair(p.image, q.image, p.split, q.split, p.sequence, q.sequence, exact, similarity)


def _nearest(measured: Sequence[MeasuredPair], order: dict[str, int]) -> Iterator[tuple[int, int, float]]:
    """(i, j, similarity): for every frame i the best j of each kind with similarity NEAR or more; no exact copies."""
    descriptors = np.frombuffer(b"".join(s.stats.descriptor for s in measured if s.stats), np.uint8)
    pixels = _numbered(s.pixels_digest for s in measured)
    sequence = _numbered(s.pair.sequence or str(k) for k, s in enumerate(measured))
    split = np.array([order[s.pair.split] for s in measured], np.int64)
    # Kind of match: the split of j, and within one split whether the sequence is the same.
    kinds = 2 * len(order)
    best = np.zeros((len(measured), kinds), np.float32)
    match = np.full((len(measured), kinds), -1, np.int64)

    def keep(i: np.ndarray, j: np.ndarray, similarity: np.ndarray) -> None:
        kind = 2 * split[j] + ((split[i] == split[j]) & (sequence[i] != sequence[j]))
        better = similarity > best[i, kind]
        i, j, kind, similarity = i[better], j[better], kind[better], similarity[better]
        last = np.lexsort((-j, similarity))  # if several are written to one position, the last one stays
        best[i[last], kind[last]] = similarity[last]
        match[i[last], kind[last]] = j[last]

    for i, j, similarity in alike(descriptors.reshape(-1, DESCRIPTOR_PX[1], DESCRIPTOR_PX[0])):
        other = pixels[i] != pixels[j]
        keep(i[other], j[other], similarity[other])
        keep(j[other], i[other], similarity[other])
    for row, kind in np.argwhere(match >= 0).tolist():
        yield row, int(match[row, kind]), float(best[row, kind])


def _numbered(names: Iterable[str]) -> np.ndarray:
    """int64: equal numbers for equal names."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def alike(descriptors: np.ndarray, least: float = NEAR) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For descriptors uint8 [N, 24, 48], blocks of (i, j, similarity), i < j, of all pairs with at least `least`.

    Similarity is the correlation of the descriptors at half their size, the maximum over the moves of one of them,
    rounded to 1/1000 so that it does not depend on the machine's order of summation. Memory: 1.2 kB per frame
    and 80 MB.
    """
    plain = _vectors(descriptors, 1.0, 0.0)
    with progress(len(descriptors), "compare", "images") as bar:
        for start in range(0, len(descriptors), _QUERIES):
            queries = descriptors[start : start + _QUERIES]
            moved = np.concatenate([_vectors(queries, zoom, shift) for zoom, shift in _MOVES])
            for among in range(start, len(descriptors), _AMONG):
                products = (moved @ plain[among : among + _AMONG].T).reshape(len(_MOVES), len(queries), -1)
                exact = products.max(axis=0)
                i, j = np.nonzero(exact > least - 0.0005)
                later = i + start < j + among
                i, j = i[later], j[later]
                yield i + start, j + among, np.minimum(np.round(exact[i, j], 3), 1.0)
            bar.update(len(queries))


def _vectors(descriptors: np.ndarray, zoom: float, shift: float) -> np.ndarray:
    """float32 [N, 288]: the moved descriptors at half their size, with mean 0 and length 1 (0 if flat)."""
    width, height = DESCRIPTOR_PX
    x, y = (width - 1) / 2, _VANISHING_ROW * height
    matrix = np.array([[zoom, 0, (1 - zoom) * x + shift * width], [0, zoom, (1 - zoom) * y]], np.float32)
    vectors = np.zeros((len(descriptors), width * height // 4), np.float32)
    for row, descriptor in zip(vectors, descriptors, strict=True):
        picture = descriptor.astype(np.float32) - DESCRIPTOR_ZERO
        if (zoom, shift) != (1.0, 0.0):
            picture = cv2.warpAffine(picture, matrix, DESCRIPTOR_PX, borderMode=cv2.BORDER_REPLICATE)
        row[:] = cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA).ravel()
    vectors -= vectors.mean(axis=1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1.0)
