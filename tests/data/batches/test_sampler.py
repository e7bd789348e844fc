"""Positions to samples: complete, even, the same for every way of asking."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadseg.data.batches.sampler import Batches, Order, Sample, epoch_order
from roadseg.errors import ConfigError


@dataclass(frozen=True)
class Frame:
    part: str = ""
    centroids: tuple[tuple[int, int, int], ...] = ()


def plain(n: int) -> list[Frame]:
    return [Frame()] * n


frames_of_classes = st.lists(
    st.builds(
        Frame,
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 90)), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 99), cut=st.integers(0, 15))
def test_every_epoch_holds_every_sample_once_and_a_resumed_stream_is_the_same(
    samples: int, batch: int, seed: int, cut: int
) -> None:
    order = Order(plain(samples), seed)
    whole = list(Batches(order, batch, 0, 20))
    assert list(Batches(Order(plain(samples), seed), batch, cut, 20)) == whole[cut:]
    stream = [sample for rows in whole for sample in rows]
    for epoch in range(len(stream) // samples):
        part = stream[epoch * samples : (epoch + 1) * samples]
        assert {s.epoch for s in part} == {epoch} and {s.turn for s in part} == {0}
        assert sorted(s.index for s in part) == list(range(samples))


def test_the_order_of_a_seed_never_changes() -> None:
    """Recorded from the first version: a run started with it continues with the same samples."""
    order = Order(plain(6), 3)
    expected = [1, 2, 0, 4, 5, 3, 4, 3, 0, 2, 5, 1]
    assert [order(p).index for p in range(12)] == expected
    want = np.random.default_rng(np.random.SeedSequence((3, 2, 1, 4)))
    assert Sample(1, 4).generator(3).bit_generator.state == want.bit_generator.state


def test_epochs_differ_in_order() -> None:
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(0, 1, 50))
    assert not np.array_equal(epoch_order(0, 0, 50), epoch_order(1, 0, 50))


@settings(max_examples=60, deadline=None)
@given(
    frames=frames_of_classes, share=st.sampled_from([0.0, 0.3, 1.0]), mixed=st.booleans(), seed=st.integers(0, 99),
    world=st.sampled_from([1, 2, 3, 4, 6, 12]), cut=st.integers(0, 7),
)  # fmt: skip
def test_ranks_share_every_step_disjointly_and_completely(
    frames: list[Frame], share: float, mixed: bool, seed: int, world: int, cut: int
) -> None:
    share = share if any(f.centroids for f in frames) else 0.0
    weights = {"a": 1.0, "b": 2.0, "c": 0.5} if mixed else None
    alone = list(Batches(Order(frames, seed, share, weights), 12, 0, 8))
    ranks = [list(Batches(Order(frames, seed, share, weights), 12, cut, 8, r, world)) for r in range(world)]
    assert [sum(rows, start=[]) for rows in zip(*ranks, strict=True)] == alone[cut:]
    # No two samples of the stream draw the same crop.
    stream = [s for rows in alone for s in rows]
    assert len({(s.epoch, s.index, s.turn) for s in stream}) == len(stream)


@settings(max_examples=60, deadline=None)
@given(frames=frames_of_classes, share=st.sampled_from([0.25, 0.5, 1.0]), seed=st.integers(0, 99))
def test_a_share_iterates_over_classes_and_the_rest_over_frames(frames: list[Frame], share: float, seed: int) -> None:
    present = {c for f in frames for c, _, _ in f.centroids}
    if not present:
        with pytest.raises(ConfigError, match="training.class_uniform"):
            Order(frames, seed, share)
        return
    order, epochs = Order(frames, seed, share), 9
    stream = [order(p) for p in range(epochs * len(frames))]
    around = [s for s in stream if s.turn]
    assert abs(len(around) - share * len(stream)) < 1
    assert [s.turn for s in around] == list(range(1, len(around) + 1))
    whole_frames = Counter({i: 0 for i in range(len(frames))})
    whole_frames.update(s.index for s in stream if not s.turn)
    assert max(whole_frames.values()) - min(whole_frames.values()) <= 1  # each once before any twice
    for sample in around:
        assert sample.center in [(y, x) for _, y, x in frames[sample.index].centroids]


def test_classes_are_drawn_evenly_however_rare_they_are() -> None:
    frames = [Frame(centroids=((0, i, 1), (0, i, 2)) + (((1, i, 3),) if i % 10 == 0 else ())) for i in range(40)]
    frames[7] = Frame(centroids=((2, 5, 5),))
    order = Order(frames, 1, 0.5)
    around = [s for s in map(order, range(40 * 30)) if s.turn]
    classes = Counter(c for s in around for c, y, x in frames[s.index].centroids if (y, x) == s.center)
    assert len(around) == 600 and set(classes.values()) == {200}
    rare = Counter(s.index for s in around if s.center and s.center[1] == 3)
    assert set(rare) == {0, 10, 20, 30} and set(rare.values()) == {50}
    assert {s.index for s in around if s.center == (5, 5)} == {7}
    assert {s.center[1] for s in around if s.center} == {1, 2, 3, 5}  # every centroid of a class has its turn
    # Unlike its neighbours, a frame that comes again has other draws.
    again = [s for s in around if s.index == 7]
    states = {str(s.generator(0).bit_generator.state) for s in again}
    assert len(states) == len(again) == 200


def test_parts_keep_their_share_and_are_used_up_before_they_repeat() -> None:
    frames = [Frame("small")] * 10 + [Frame("large")] * 90
    order = Order(frames, 5, part_weights={"small": 1, "large": 3, "elsewhere": 7})
    stream = [order(p) for p in range(400)]
    assert sum(s.index < 10 for s in stream) == 100
    for end in range(1, 401, 13):
        for members in (range(10), range(10, 100)):
            seen = Counter({i: 0 for i in members})
            seen.update(s.index for s in stream[:end] if s.index in members)
            assert max(seen.values()) - min(seen.values()) <= 1
    both = Order([Frame("a", ((0, 1, 1),)), Frame("b", ((1, 2, 2),))] * 5, 5, 0.5, {"a": 1, "b": 4})
    stream = [both(p) for p in range(100)]
    assert Counter((s.index % 2, s.turn > 0) for s in stream) == {
        (0, False): 10, (0, True): 10, (1, False): 40, (1, True): 40
    }  # fmt: skip


def test_a_part_with_a_small_share_gets_samples() -> None:
    order = Order([Frame("a")] * 3 + [Frame("b")], 0, part_weights={"a": 1000, "b": 1})
    assert Counter(order(p).index == 3 for p in range(8)) == {False: 6, True: 2}
    assert all(Order([Frame("a"), Frame("b")], 0, part_weights={"a": 1, "b": 0})(p).index == 0 for p in range(9))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1, "b": -1}, {"a": 0, "b": 0}, {"a": 1, "b": float("inf")}])
def test_weights_that_do_not_match_the_parts(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="for each of a, b"):
        Order([Frame("a"), Frame("b")], 0, part_weights=weights)


def test_a_batch_size_that_ranks_can_not_share() -> None:
    with pytest.raises(ConfigError) as e:
        Batches(Order(plain(5), 0), 8, 0, 1, 0, 3)
    assert e.value.where == "training.batch_size" and "multiple of 3" in e.value.expected
