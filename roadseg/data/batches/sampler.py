"""Order of the samples: a function of (seed, position), so a resumed run continues exactly.

A position counts samples of an endless stream. Each sample belongs to one part of the data set (a single part unless
sources are mixed) and is either the part's next frame or its next crop around a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from roadseg.data.augment.cpu import generator
from roadseg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """One crop to make. epoch: in its part's stream. index: of the frame in its split.

    turn: for a crop around a class, its number among such crops of its part, from 1; else 0. center: the frame
    pixel (y, x) that such a crop covers.
    """

    epoch: int
    index: int
    turn: int = 0
    center: tuple[int, int] | None = None

    def generator(self, seed: int) -> np.random.Generator:
        """Random generator for the crop's parameters."""
        return generator(seed, 2, self.epoch, self.index, *((self.turn,) if self.turn else ()))


class FrameInfo(Protocol):
    """The fields of shards.index.Frame that the order needs."""

    @property
    def part(self) -> str: ...
    @property
    def centroids(self) -> tuple[tuple[int, int, int], ...]: ...


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """int64 [samples]: every sample once, in the order of this epoch."""
    return _permutation(samples, seed, 1, epoch)


@lru_cache(maxsize=128)
def _permutation(n: int, seed: int, *index: int) -> np.ndarray:
    return generator(seed, *index).permutation(n)


class Order:
    """Calling it with a position of the endless stream returns that position's sample.

    An epoch has as many samples as there are frames. A share `class_uniform` of them iterates over the classes
    uniformly: a frame that has the class, one of its centroids, and a crop that covers it (Zhu et al., Improving
    Semantic Segmentation via Video Propagation and Label Relaxation, 2019). The rest iterates over the frames. Frames
    (also those of a class) are all used once before any is used again, across epochs. part_weights: {part: share}
    with any sum; without them all frames are one part. Every part keeps its share and is an independent stream.
    """

    def __init__(
        self,
        frames: Sequence[FrameInfo],
        seed: int,
        class_uniform: float = 0.0,
        part_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Raises ConfigError if weights do not match the parts, or if class_uniform is set without any centroids."""
        if class_uniform > 0 and not any(frame.centroids for frame in frames):
            raise ConfigError(
                f"{class_uniform:g}, but the shards have no class centroids",
                expected="frames with labeled pixels",
                where="training.class_uniform",
                todo="check the labels of train, or set it to 0",
            )
        self._samples, self._seed = len(frames), seed
        if not part_weights:
            self._parts = [_Part(range(len(frames)), frames, seed, class_uniform, ())]
            return
        shares = _part_shares(frames, part_weights)
        members = [[i for i, frame in enumerate(frames) if frame.part == name] for name in shares]
        self._parts = [_Part(m, frames, seed, class_uniform, (number,)) for number, m in enumerate(members, 1)]
        self._counts = _whole_shares(list(shares.values()), len(frames))

    def __call__(self, position: int) -> Sample:
        if len(self._parts) == 1:
            return self._parts[0].sample(position)
        block, slot = divmod(position, self._samples)
        part, rank = _mixture(self._counts, self._seed, block)
        number = int(part[slot])
        return self._parts[number].sample(block * self._counts[number] + int(rank[slot]))


def _part_shares(frames: Sequence[FrameInfo], weights: Mapping[str, float]) -> dict[str, float]:
    parts = {frame.part for frame in frames}
    shares = {name: weights.get(name, -1.0) for name in sorted(parts)}
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf"):
        raise ConfigError(
            f"weights {dict(weights)}",
            expected=f"a number of 0 or more, not all 0, for each of {', '.join(sorted(parts))}",
            where="the parts of the data set",
        )
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items() if share > 0}


def _whole_shares(shares: list[float], samples: int) -> tuple[int, ...]:
    """Samples per part by largest remainder, at least 1 each."""
    exact = np.array(shares) * samples
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: samples - counts.sum()]] += 1
    for empty in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[empty] = 1
    return tuple(counts.tolist())


@lru_cache(maxsize=8)
def _mixture(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, number of earlier positions with that part) of each position in a block of sum(counts)."""
    order = generator(seed, 8, block).permutation(sum(counts))
    part = np.repeat(np.arange(len(counts)), counts)[order]
    rank = np.empty(len(part), np.int64)
    for number, count in enumerate(counts):
        rank[part == number] = np.arange(count)
    return part, rank


class _Part:
    """The sample stream of one part. key: makes its random choices differ from those of other parts."""

    def __init__(
        self, indices: Sequence[int], frames: Sequence[FrameInfo], seed: int, class_uniform: float, key: tuple[int, ...]
    ) -> None:
        self._indices, self._frames, self._seed, self._key = indices, frames, seed, key
        holders: dict[int, list[int]] = {}
        for index in indices:
            for train_id in {c[0] for c in frames[index].centroids}:
                holders.setdefault(train_id, []).append(index)
        self._holders = sorted(holders.items()) if class_uniform > 0 else []
        self._share = class_uniform if self._holders else 0.0

    def sample(self, position: int) -> Sample:
        n = len(self._indices)
        if not self._share:
            return self._frame(position)
        epoch, slot = divmod(position, n)
        before = self._classes_before(epoch)
        is_class, rank = _class_slots(self._classes_before(epoch + 1) - before, n, self._seed, 4, epoch, *self._key)
        if is_class[slot]:
            return self._class(epoch, before + int(rank[slot]))
        return self._frame(epoch * n - before + int(rank[slot]))

    def _classes_before(self, epoch: int) -> int:
        return int(epoch * len(self._indices) * self._share + 1e-9)

    def _frame(self, turn: int) -> Sample:
        epoch, slot = divmod(turn, len(self._indices))
        return Sample(epoch, self._indices[_permutation(len(self._indices), self._seed, 1, epoch, *self._key)[slot]])

    def _class(self, epoch: int, turn: int) -> Sample:
        tour, slot = divmod(turn, len(self._holders))
        number = int(_permutation(len(self._holders), self._seed, 5, tour, *self._key)[slot])
        train_id, holders = self._holders[number]
        again, slot = divmod(tour, len(holders))
        index = holders[_permutation(len(holders), self._seed, 6, train_id, again, *self._key)[slot]]
        spots = [(y, x) for c, y, x in self._frames[index].centroids if c == train_id]
        pick = int(generator(self._seed, 7, turn, *self._key).integers(len(spots))) if len(spots) > 1 else 0
        return Sample(epoch, index, turn + 1, spots[pick])


@lru_cache(maxsize=8)
def _class_slots(classes: int, samples: int, seed: int, *index: int) -> tuple[np.ndarray, np.ndarray]:
    """(is a class crop, number of earlier samples of the same kind) of each sample of an epoch."""
    is_class = np.zeros(samples, bool)
    is_class[generator(seed, *index).permutation(samples)[:classes]] = True
    return is_class, np.where(is_class, np.cumsum(is_class), np.cumsum(~is_class)) - 1


class Batches:
    """Batches of samples for the steps first..last-1.

    Step s has batch_size positions from s * batch_size on; rank r of `world` gets the r-th of `world` equal slices, so
    the ranks together see the same samples as a single one. A batch may span two epochs; no sample is dropped.
    Raises ConfigError if batch_size is not a multiple of `world`.
    """

    def __init__(self, order: Order, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1) -> None:
        if batch_size % world or not 0 <= rank < world:
            raise ConfigError(
                f"a batch of {batch_size} for rank {rank} of {world} processes",
                expected=f"a multiple of {world}",
                where="training.batch_size",
                todo="set the samples per step over all processes",
            )
        self._order, self.first, self.last = order, first, last
        self.batch_size, self._rank, self._world = batch_size, rank, world

    @property
    def rows(self) -> int:
        """Samples per step of this rank."""
        return self.batch_size // self._world

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in range(self.first, self.last):
            start = step * self.batch_size + self._rank * self.rows
            yield [self._order(position) for position in range(start, start + self.rows)]
