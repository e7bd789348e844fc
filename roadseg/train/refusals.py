"""What can't be trained, told before the first step; and what would have fitted, once memory ran out."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import floor, sqrt

import numpy as np
import torch

from roadseg.config_training import Training
from roadseg.data.shards import Shards, Split
from roadseg.errors import ConfigError, RoadsegError
from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build
from roadseg.model.surgery import blocks, set_output_stride
from roadseg.train.memory import step_bytes

log = logging.getLogger(__name__)
LEAST_IMAGE = 0.5  # of what crops show, over frames and drawn scales; the rest is padding
STEERED_BY = "val"  # the split that early stopping looks at
FILLED = 0.9  # of a GPU, by an estimate that may be off
CROP_STEP_PX = 32
MISSING = "class-missing"  # ingest's code for it
_RAN_OUT = ("can't allocate memory", "out of memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED")


def refuse_impossible(
    t: Training, architecture: Architecture, shards: Shards, frames: Split, world: int = 1, allow: Collection[str] = ()
) -> None:
    """Raises one ConfigError that lists all that can't be trained, each with what to change.

    architecture: of the first phase. frames: of train. world: processes that share a batch. allow: codes of
    the data's faults that are accepted. Warns of classes without a pixel in train, or in any split.
    """
    crops = dict.fromkeys(crop_px for crop_px, _ in _crops(t, architecture))
    problems = [p for crop_px in crops for p in _padding(t, frames, crop_px)]
    problems += [*_classes(shards, MISSING in allow), *_early_stopping(t, shards, steps_of(t, len(frames)))]
    problems += _empty_phases(t, len(frames))
    _refuse([*problems, *_whatever_the_data(t, architecture, world)])


def refuse_whatever_the_data(t: Training, architecture: Architecture, world: int = 1) -> None:
    """As `refuse_impossible`, for what can be told without the data."""
    _refuse([*_whatever_the_data(t, architecture, world)])


def _whatever_the_data(t: Training, architecture: Architecture, world: int) -> Iterator[str]:
    for crop_px, stride in dict.fromkeys(_crops(t, architecture)):
        yield from _single_cell(crop_px, stride)
    yield from [*_shares(t, world)] or _batch_norm(t, world)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} thing{'s' * (len(problems) > 1)} that can't be trained"
        raise ConfigError(f"{count}:\n" + "\n".join(f"  {p}" for p in problems))


def _crops(t: Training, architecture: Architecture) -> Iterator[tuple[tuple[int, int], int]]:
    """(crop, output stride) of the run's start and of each phase."""
    crop_px, stride = t.crop_px, architecture.output_stride
    yield crop_px, stride
    for phase in t.phases:
        crop_px, stride = phase.crop_px or crop_px, phase.output_stride or stride
        yield crop_px, stride


def image_share(frame_sizes: Counter[tuple[int, int]], crop_px: tuple[int, int], scale: tuple[float, float]) -> float:
    """Mean share of crops that shows image, over frames (height, width) and scales drawn uniformly."""
    drawn = np.linspace(*scale, 64)
    shares = [
        number * np.minimum(1, drawn * height / crop_px[0]) * np.minimum(1, drawn * width / crop_px[1])
        for (height, width), number in frame_sizes.items()
    ]
    return float(np.mean(sum(shares)) / frame_sizes.total())


def _padding(t: Training, frames: Split, crop_px: tuple[int, int]) -> Iterator[str]:
    """A crop may be larger than a frame, and is padded then; when most of it is, the crop is a mistake."""
    sizes = Counter((frame.height, frame.width) for frame in frames.frames)
    share, (low, high) = image_share(sizes, crop_px, t.augment.scale), t.augment.scale
    if share < LEAST_IMAGE:
        (height, width), _ = sizes.most_common(1)[0]
        yield (
            f"training.crop_px: {1 - share:.0%} of what crops of {_px(crop_px)} show would be padding, as frames are "
            f"{_px((height, width))} (most of them) and drawn at {low:g} to {high:g} times that; set at most "
            f"{height} {width}, or raise training.augment.scale"
        )


def _single_cell(crop_px: tuple[int, int], stride: int) -> Iterator[str]:
    if max(crop_px) <= stride:
        yield (
            f"training.crop_px: a crop of {_px(crop_px)} is one cell of the map at output stride {stride}; "
            f"set sides of {4 * stride} or more, as far as frames reach, or a smaller model.output_stride"
        )


def _empty_phases(t: Training, frames: int) -> Iterator[str]:
    steps = steps_of(t, frames)
    starts = [0, *(round(phase.after * steps) for phase in t.phases), steps]
    for number, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        if first == last:
            what = f"the phase after {t.phases[number - 1].after:g}" if number else "what comes before the first phase"
            yield f"training.phases: {what} has none of the {steps} steps; set more training.steps or leave it out"


def steps_of(t: Training, frames: int) -> int:
    """Steps of the run over so many frames of train."""
    return t.steps or -(-(t.epochs or 60) * frames // t.batch_size)


def _shares(t: Training, world: int) -> Iterator[str]:
    parts = t.accumulate * world
    if t.batch_size % parts:
        less, more = t.batch_size // parts * parts, (t.batch_size // parts + 1) * parts
        yield (
            f"training.batch_size: {t.batch_size} can't be shared by {world} processes in {t.accumulate} "
            f"micro-batches each; set {f'{less} or ' if less else ''}{more}"
        )


def _classes(shards: Shards, accepted: bool) -> Iterator[str]:
    names, pixels = shards.label_set.names, shards.class_pixels
    seen, absent = ([n for n, count in zip(names, pixels["train"], strict=False) if bool(count) == s] for s in (1, 0))
    scored = {
        split: [name for name, count in zip(names, counts, strict=False) if name in absent and count]
        for split, counts in pixels.items()
    }  # fmt: skip
    if len(seen) < 2:
        what = f"no class but {seen[0]}" if seen else "no class"
        yield f"data: {what} has a pixel in train: nothing can be told apart; check the labels and data.classes"
    elif any(scored.values()) and not accepted:
        there = "; ".join(f"{split} has {', '.join(found)}" for split, found in scored.items() if found)
        yield (
            f"data: classes that train has no pixel of can't be learned and count 0 where they are scored ({there}); "
            f"add frames that show them, split the data otherwise, or accept it with data.allow {MISSING}"
        )
    elif absent:
        log.warning(
            "no pixel of train is %s: that can't be learned; add frames that show it (data.forbid: [class-missing] "
            "refuses to train without)", " or ".join(absent),
        )  # fmt: skip


def _early_stopping(t: Training, shards: Shards, steps: int) -> Iterator[str]:
    if t.patience and STEERED_BY not in shards.shards:
        there = ", ".join(name for name in shards.shards if name != "train") or "none"
        yield (
            f"training.patience: it looks at the split {STEERED_BY}, which is not there (besides train: {there}); "
            "set it to 0, or make such a split"
        )
    # The first validation sets the mark, and what the last one says changes nothing any more.
    elif t.patience and (every := validation_steps(t, steps)) * (t.patience + 1) >= steps:
        most = max((steps - 1) // every - 1, 0)
        waits = f"{t.patience} validation{'s' * (t.patience > 1)} after the first, {every} steps apart"
        yield (
            f"training.patience: with {waits}, a run of {steps} steps never ends early; set it to "
            f"{f'{most} at most' if most else '0'}, or validate more often"
        )


def validation_steps(t: Training, steps: int) -> int:
    """Steps between validations."""
    return t.validate_every or max(1, -(-steps // 10))


def _batch_norm(t: Training, world: int) -> Iterator[str]:
    """Statistics of one image are no other image's: what is learned with them does not hold once they are averaged."""
    if t.batch_size // (world * t.accumulate) < _least_rows(t, world):
        yield (
            f"training.batch_size: batch norm would take its statistics from one image at a time ({t.batch_size} a "
            f"step, over {world} process{'es' * (world > 1)} in {t.accumulate} micro-batch{'es' * (t.accumulate > 1)} "
            "each); set a larger training.batch_size, a smaller training.accumulate, or training.freeze batch_norm"
        )


def _least_rows(t: Training, world: int) -> int:
    """Images that a forward of one process needs, for its batch norm."""
    together = world if t.sync_batch_norm else 1
    return 1 if together > 1 or "batch_norm" in t.freeze else 2


def refuse_strides(network: DeepLabV3Plus, t: Training) -> None:
    """Raises ConfigError for a phase whose output stride this network can't take; it is left as it is."""
    trial = copy.deepcopy(network)
    for phase in t.phases:
        if phase.output_stride:
            set_output_stride(trial, phase.output_stride)


def ran_out(error: BaseException) -> bool:
    """Does it say that memory was not enough? CPU and MPS raise plain RuntimeErrors."""
    if isinstance(error, RoadsegError):
        return False
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in told for words in _RAN_OUT)


def out_of_memory(
    error: BaseException, architecture: Architecture, t: Training, world: int, bf16: bool, device: torch.device
) -> RoadsegError:
    """The error to raise from `error`: what was tried, and which changes would fit by the estimate of memory.py."""
    rows, crop_px = t.batch_size // (world * t.accumulate), max((c for c, _ in _crops(t, architecture)), key=_area)
    there = _memory_bytes(device)
    stride = min(s for _, s in _crops(t, architecture))
    costliest = replace(architecture, output_stride=stride)
    again = t.activation_checkpointing
    needs = [step_bytes(costliest, crop_px, n, bf16, again) for n in (0, rows)]
    forms = {"training.precision bf16": (True, again)} if not bf16 else {}
    if not again and any(blocks(build(architecture, seed=0).backbone)):
        forms["training.activation_checkpointing True"] = (bf16, True)
    fitting = [
        change
        for change, form in forms.items()
        if not there or step_bytes(costliest, crop_px, rows, *form) < FILLED * there
    ]
    changes = what_fits(t, world, rows, crop_px, (needs[0], needs[1]), there) + fitting
    precision = "bf16" if bf16 else "fp32"
    estimate = f"; about {needs[1] / 2**30:.0f} GiB are needed, of {there / 2**30:.0f}" if there else ""
    if there > needs[1]:
        estimate += ", so frames, a teacher or other processes hold the rest"
    return RoadsegError(
        f"no memory for {rows} crops of {_px(crop_px)} at once in {precision} on {device}{estimate} "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        todo=f"set one of: {'; '.join(changes or ['a smaller model.backbone'])}",
    )


def what_fits(
    t: Training,
    world: int,
    rows: int,
    crop_px: tuple[int, int],
    needs_bytes: tuple[int, int],
    there_bytes: int,
) -> list[str]:
    """Single changes of batch or crop that should fit, best first.

    rows: crops a forward, that did not fit. needs_bytes: of a step without crops, and with `rows`.
    there_bytes: of the GPU; 0 where that is not known, and half of it all is advised.
    """
    without, with_rows = needs_bytes
    # What failed needs more than there is, whatever the estimate says: frames, or others, may be there too.
    a_row = max(with_rows - without, there_bytes - without, 1) / rows
    fit = (FILLED * there_bytes - without) / a_row if there_bytes else rows / 2
    changes = []
    share, most, least = t.batch_size // world, min(floor(fit), rows - 1), _least_rows(t, world)
    if most >= least:
        parts = [n for n in range(1, share + 1) if share % n == 0 and least <= share // n <= most]
        changes += [f"training.accumulate {n} (the same batch in parts)" for n in parts[:1]]
        changes.append(f"training.batch_size {most * world * t.accumulate}")
    side = sqrt(min(max(fit, 0) / rows, FILLED))
    smaller = [floor(px * side / CROP_STEP_PX) * CROP_STEP_PX for px in crop_px]
    if min(smaller) > 0:
        changes.append(f"training.crop_px {smaller[0]} {smaller[1]}" + " (and those of phases)" * bool(t.phases))
    return changes


def _memory_bytes(device: torch.device) -> int:
    """Of a GPU, without what other processes hold there; 0 of other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _area(crop_px: tuple[int, int]) -> int:
    return crop_px[0] * crop_px[1]


def _px(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
