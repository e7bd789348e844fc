"""Refuse recipes that can't be trained on the given data, before the first step."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from math import lcm

import numpy as np

from roadseg.data.shards.index import Shards, Split
from roadseg.errors import ConfigError
from roadseg.model.deeplab import DeepLabV3Plus
from roadseg.model.surgery import set_output_stride
from roadseg.train.checks.batch import nearest_multiples, refuse_uneven_batch
from roadseg.train.recipe import Phase, Recipe

log = logging.getLogger(__name__)
LEAST_IMAGE = 0.5  # share of what crops show, over frames and drawn scales; the rest is padding
EARLY_STOPPING_SPLIT = "val"
CLASS_MISSING = "class-missing"  # ingest's code for it


def refuse_untrainable(
    recipe: Recipe, shards: Shards, frames: Split, world: int = 1, allow: Collection[str] = ()
) -> None:
    """Raise one ConfigError that lists everything that can't be trained, each with what to change.

    frames: of train. world: processes that share a batch. allow: codes of the data's findings that are accepted.
    Warns about classes without a pixel in train, and about crops that no frame fills.
    """
    problems = [
        p for crop_px in dict.fromkeys(p.crop_px for p in recipe.phases) for p in _padding(recipe, frames, crop_px)
    ]
    problems += [*_classes(shards, CLASS_MISSING in allow), *_no_early_stopping_split(recipe, shards)]
    _refuse([*problems, *_without_data(recipe, world)])


def refuse_untrainable_on_any_data(recipe: Recipe, world: int = 1) -> None:
    """As `refuse_untrainable`, for what can be checked without the data."""
    _refuse([*_without_data(recipe, world)])


def _without_data(recipe: Recipe, world: int) -> Iterator[str]:
    for phase in dict.fromkeys((p.crop_px, p.output_stride) for p in recipe.phases):
        yield from _single_cell(*phase)
    yield from [*_endless_patience(recipe), *_empty_phases(recipe.phases, recipe.loop.steps)]
    try:
        refuse_uneven_batch(recipe.batches.batch_size, recipe.batches.accumulate, world)
    except ConfigError as e:
        yield str(e)
    else:
        yield from [*_batch_norm(recipe, world), *_class_mix_pairs(recipe, world)]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} thing{'s' * (len(problems) > 1)} that can't be trained"
        raise ConfigError(f"{count}:\n" + "\n".join(f"  {p}" for p in problems))


def image_share(frame_sizes: Counter[tuple[int, int]], crop_px: tuple[int, int], scale: tuple[float, float]) -> float:
    """Mean share of crops that shows image, over frames (height, width) and scales drawn uniformly."""
    scales = np.linspace(*scale, 64)
    shares = [
        number * np.minimum(1, scales * height / crop_px[0]) * np.minimum(1, scales * width / crop_px[1])
        for (height, width), number in frame_sizes.items()
    ]
    return float(np.mean(sum(shares)) / frame_sizes.total())


def _padding(recipe: Recipe, frames: Split, crop_px: tuple[int, int]) -> Iterator[str]:
    """A crop may be larger than a frame and is then padded; a crop that is mostly padding is a mistake."""
    sizes = Counter((frame.height, frame.width) for frame in frames.frames)
    low, high = recipe.augmentation.scale
    share = image_share(sizes, crop_px, (low, high))
    (height, width), _ = sizes.most_common(1)[0]
    if share < LEAST_IMAGE:
        yield (
            f"training.crop_px: {1 - share:.0%} of what crops of {_px(crop_px)} show would be padding, as frames are "
            f"{_px((height, width))} (most of them) and scaled by {low:g} to {high:g}; set at most {height} {width}, "
            "or raise training.augment.scale"
        )
    elif crop_px[0] > max(h for h, _ in sizes) or crop_px[1] > max(w for _, w in sizes):
        log.warning(
            "training.crop_px: crops of %s reach beyond frames of %s: %.0f %% of what they show is padding; "
            "with %d %d only frames that are scaled down are padded",
            *(_px(crop_px), _px((height, width)), 100 * (1 - share), height, width),
        )


def _single_cell(crop_px: tuple[int, int], stride: int) -> Iterator[str]:
    if max(crop_px) <= stride:
        yield (
            f"training.crop_px: a crop of {_px(crop_px)} is one cell of the map at output stride {stride}; "
            f"set sides of {4 * stride} or more, as far as frames reach, or a smaller model.output_stride"
        )


def _empty_phases(phases: Sequence[Phase], steps: int) -> Iterator[str]:
    for number, phase in enumerate(phases):
        if phase.first == phase.last:
            what = f"phase {number}" if number else "the part before the first phase"
            yield f"training.phases: {what} has none of the {steps} steps; set more training.steps or remove it"


def _classes(shards: Shards, accepted: bool) -> Iterator[str]:
    names, pixels = shards.label_set.names, shards.class_pixels
    present, absent = ([n for n, c in zip(names, pixels["train"], strict=False) if bool(c) == p] for p in (True, False))
    scored = {
        split: [name for name, count in zip(names, counts, strict=False) if name in absent and count]
        for split, counts in pixels.items()
    }
    if len(present) < 2:
        what = f"only class {present[0]}" if present else "no class"
        yield (
            f"data: {what} has a pixel in train, so there is nothing to tell apart; check the masks, and which classes "
            "they become (data.taxonomy; for source folder the YAML that data.labels names)"
        )
    elif any(scored.values()) and not accepted:
        found = "; ".join(f"{split} has {', '.join(names)}" for split, names in scored.items() if names)
        yield (
            f"data: classes without a pixel in train can't be learned and count 0 where they are scored ({found}); "
            f"add frames that show them, split the data otherwise, or accept it with data.allow {CLASS_MISSING}"
        )
    elif absent:
        log.warning(
            "no pixel of train is %s, which therefore can't be learned; add frames that show it "
            "(data.forbid: [class-missing] refuses to train without)", " or ".join(absent),
        )  # fmt: skip


def _no_early_stopping_split(recipe: Recipe, shards: Shards) -> Iterator[str]:
    if recipe.loop.patience and EARLY_STOPPING_SPLIT not in shards.shards:
        others = ", ".join(name for name in shards.shards if name != "train") or "none"
        yield (
            f"training.patience: it watches the split {EARLY_STOPPING_SPLIT}, which does not exist (besides train: "
            f"{others}); set it to 0, or make such a split"
        )


def _endless_patience(recipe: Recipe) -> Iterator[str]:
    # The first validation sets the mark, and the last one comes too late to change anything.
    patience, every, steps = recipe.loop.patience, recipe.loop.validate_every, recipe.loop.steps
    if patience and every * (patience + 1) >= steps:
        most = max((steps - 1) // every - 1, 0)
        waits = f"{patience} validation{'s' * (patience > 1)} after the first, {every} steps apart"
        yield (
            f"training.patience: with {waits}, a run of {steps} steps never ends early; set it to "
            f"{f'{most} at most' if most else '0'}, or validate more often"
        )


def _batch_norm(recipe: Recipe, world: int) -> Iterator[str]:
    """Batch norm over one image learns with statistics that differ from the averaged ones used later."""
    b = recipe.batches
    synced = world > 1 and recipe.sync_batch_norm
    least = 1 if synced or "batch_norm" in recipe.freeze else 2
    if b.batch_size // (world * b.accumulate) < least:
        yield (
            f"training.batch_size: batch norm would take its statistics from one image at a time ({b.batch_size} a "
            f"step, over {world} process{'es' * (world > 1)} in {b.accumulate} micro-batch{'es' * (b.accumulate > 1)} "
            "each); set a larger training.batch_size, a smaller training.accumulate, or training.freeze batch_norm"
        )


def _class_mix_pairs(recipe: Recipe, world: int) -> Iterator[str]:
    """class_mix pastes between the crops 2k and 2k + 1 of a batch, which must lie on the same rank."""
    b = recipe.batches
    if b.class_mix > 0 and world > 1 and b.batch_size // world % 2:
        yield (
            f"training.batch_size: {b.batch_size} samples are {b.batch_size // world} for each of {world} processes; "
            "expected an even number for each, as class_mix pastes between neighbors; set "
            f"{nearest_multiples(b.batch_size, lcm(2, b.accumulate) * world)}, or training.augment.class_mix 0"
        )


def refuse_strides(network: DeepLabV3Plus, phases: Sequence[Phase]) -> None:
    """Raise ConfigError for a phase whose output stride this network can't take; the network is left as it is."""
    trial = copy.deepcopy(network)
    for phase in phases:
        set_output_stride(trial, phase.output_stride)


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
