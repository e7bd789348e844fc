"""What can't be trained, told before the first step; and what would have fitted, once memory ran out."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import floor, lcm, sqrt

import numpy as np
import torch

from roadseg.config.training import Training
from roadseg.data.shards.index import Shards, Split
from roadseg.errors import ConfigError, RoadsegError
from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build
from roadseg.model.surgery import blocks, set_output_stride
from roadseg.train.checks.memory import step_bytes
from roadseg.train.checks.unused_settings import terms_used
from roadseg.train.distributed.environment import nearest_multiples, refuse_uneven

log = logging.getLogger(__name__)
LEAST_IMAGE = 0.5  # of what crops show, over frames and drawn scales; the rest is padding
STEERED_BY = "val"  # the split that early stopping looks at
FILLED = 0.9  # of a GPU, by an estimate that may be off
CROP_STEP_PX = 32
MISSING = "class-missing"  # ingest's code for it
OF_A_PART = ("ohem", "lovasz", "dice")  # terms of the loss that are no sum over micro-batches
_RAN_OUT = ("can't allocate memory", "out of memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED")


def refuse_impossible(
    t: Training, architecture: Architecture, shards: Shards, frames: Split, world: int = 1, allow: Collection[str] = ()
) -> None:
    """Raises one ConfigError that lists all that can't be trained, each with what to change.

    architecture: of the first phase. frames: of train. world: processes that share a batch. allow: codes of
    the data's faults that are accepted. Warns of classes without a pixel in train, or in any split, and of crops that
    no frame fills.
    """
    crops = dict.fromkeys(crop_px for crop_px, _ in _crops(t, architecture))
    problems = [p for crop_px in crops for p in _padding(t, frames, crop_px)]
    problems += [*_classes(shards, MISSING in allow), *_no_steering_split(t, shards)]
    _refuse([*problems, *_whatever_the_data(t, architecture, world, steps_of(t, len(frames)))])


def refuse_whatever_the_data(t: Training, architecture: Architecture, world: int = 1) -> None:
    """As `refuse_impossible`, for what can be told without the data."""
    _refuse([*_whatever_the_data(t, architecture, world, t.steps)])


def _whatever_the_data(t: Training, architecture: Architecture, world: int, steps: int | None) -> Iterator[str]:
    """steps: of the run; None where the number of frames decides."""
    for crop_px, stride in dict.fromkeys(_crops(t, architecture)):
        yield from _single_cell(crop_px, stride)
    if steps is not None:
        yield from [*_endless_patience(t, steps), *_empty_phases(t, steps)]
    try:
        refuse_uneven(t, world)
    except ConfigError as e:
        yield str(e)
    else:
        yield from [*_batch_norm(t, world), *_parted_neighbours(t, world)]


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
    (height, width), _ = sizes.most_common(1)[0]
    if share < LEAST_IMAGE:
        yield (
            f"training.crop_px: {1 - share:.0%} of what crops of {_px(crop_px)} show would be padding, as frames are "
            f"{_px((height, width))} (most of them) and drawn at {low:g} to {high:g} times that; set at most "
            f"{height} {width}, or raise training.augment.scale"
        )
    elif crop_px[0] > max(h for h, _ in sizes) or crop_px[1] > max(w for _, w in sizes):
        log.warning(
            "training.crop_px: crops of %s reach beyond frames of %s: %.0f %% of what they show is padding; "
            "%d %d has it only where frames are drawn smaller",
            *(_px(crop_px), _px((height, width)), 100 * (1 - share), height, width),
        )


def _single_cell(crop_px: tuple[int, int], stride: int) -> Iterator[str]:
    if max(crop_px) <= stride:
        yield (
            f"training.crop_px: a crop of {_px(crop_px)} is one cell of the map at output stride {stride}; "
            f"set sides of {4 * stride} or more, as far as frames reach, or a smaller model.output_stride"
        )


def _empty_phases(t: Training, steps: int) -> Iterator[str]:
    starts = [0, *(round(phase.after * steps) for phase in t.phases), steps]
    for number, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        if first == last:
            what = f"the phase after {t.phases[number - 1].after:g}" if number else "what comes before the first phase"
            yield f"training.phases: {what} has none of the {steps} steps; set more training.steps or leave it out"


def steps_of(t: Training, frames: int) -> int:
    """Steps of the run over so many frames of train."""
    return t.steps or -(-(t.epochs or 60) * frames // t.batch_size)


def _classes(shards: Shards, accepted: bool) -> Iterator[str]:
    names, pixels = shards.label_set.names, shards.class_pixels
    seen, absent = ([n for n, count in zip(names, pixels["train"], strict=False) if bool(count) == s] for s in (1, 0))
    scored = {
        split: [name for name, count in zip(names, counts, strict=False) if name in absent and count]
        for split, counts in pixels.items()
    }  # fmt: skip
    if len(seen) < 2:
        what = f"no class but {seen[0]}" if seen else "no class"
        yield (
            f"data: {what} has a pixel in train: nothing can be told apart; check the masks, and which classes they "
            "become (data.taxonomy; of source folder, the YAML that data.labels names)"
        )
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


def _no_steering_split(t: Training, shards: Shards) -> Iterator[str]:
    if t.patience and STEERED_BY not in shards.shards:
        there = ", ".join(name for name in shards.shards if name != "train") or "none"
        yield (
            f"training.patience: it looks at the split {STEERED_BY}, which is not there (besides train: {there}); "
            "set it to 0, or make such a split"
        )


def _endless_patience(t: Training, steps: int) -> Iterator[str]:
    # The first validation sets the mark, and what the last one says changes nothing any more.
    if t.patience and (every := validation_steps(t, steps)) * (t.patience + 1) >= steps:
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


def _parted_neighbours(t: Training, world: int) -> Iterator[str]:
    """class_mix pastes between the crops 2k and 2k + 1 of a batch."""
    if _parts_neighbours(t, world, t.batch_size):
        yield (
            f"training.batch_size: {t.batch_size} samples are {t.batch_size // world} for each of {world} processes; "
            "expected an even number for each, as class_mix pastes between neighbours; set "
            f"{nearest_multiples(t.batch_size, lcm(2, t.accumulate) * world)}, or training.augment.class_mix 0"
        )


def _parts_neighbours(t: Training, world: int, batch_size: int) -> bool:
    return t.augment.class_mix > 0 and world > 1 and batch_size // world % 2 == 1


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


def first_line(error: BaseException) -> str:
    """Of what it says; its class if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def out_of_memory(
    error: BaseException,
    architecture: Architecture,
    t: Training,
    world: int,
    bf16: bool,
    device: torch.device,
    frames_bytes: int = 0,
    teacher_bytes: int = 0,
) -> RoadsegError:
    """The error to raise from `error`: what was tried, and which changes would fit by the estimate of memory.py.

    frames_bytes, teacher_bytes: what lies on `device` for as long as training lasts, beside what that estimates.
    """
    rows, crop_px = t.batch_size // (world * t.accumulate), max((c for c, _ in _crops(t, architecture)), key=_area)
    whole = _memory_bytes(device)
    there = max(1, whole - frames_bytes - teacher_bytes) if whole else 0
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
    changes = what_fits(t, world, rows, crop_px, (needs[0], needs[1]), there, frames_bytes) + fitting
    precision = "bf16" if bf16 else "fp32"
    estimate = ""
    if whole:
        held = {"of train's frames": frames_bytes, "of the teacher's weights": teacher_bytes}
        beside = " and ".join(f"{size / 2**30:.1f} GiB {what}" for what, size in held.items() if size > 1 << 26)
        estimate = f"; about {needs[1] / 2**30:.0f} GiB are needed{' beside ' * bool(beside)}{beside}"
        estimate += f", of {whole / 2**30:.0f}" + ", so the estimate is too low" * (there > needs[1])
    return RoadsegError(
        f"no memory for {rows} crops of {_px(crop_px)} at once in {precision} on {device}{estimate} "
        f"({first_line(error)})",
        todo=f"set one of: {'; '.join(changes or ['a smaller model.backbone'])}",
    )


def what_fits(
    t: Training,
    world: int,
    rows: int,
    crop_px: tuple[int, int],
    needs_bytes: tuple[int, int],
    there_bytes: int,
    frames_bytes: int = 0,
) -> list[str]:
    """Single changes of what lies there, batch or crop that should fit, best first.

    rows: crops a forward, that did not fit. needs_bytes: of a step without crops, and with `rows`.
    there_bytes: of the GPU, for steps; 0 where that is not known, and half of it all is advised.
    frames_bytes: more of it that frames of train take.
    """
    without, with_rows = needs_bytes
    # What failed needs more than there is, whatever the estimate says.
    a_row = max(with_rows - without, there_bytes - without, 1) / rows
    fit = (FILLED * there_bytes - without) / a_row if there_bytes else rows / 2
    changes = []
    if frames_bytes and max(with_rows, there_bytes) < FILLED * (there_bytes + frames_bytes):
        changes.append("training.frames_on_gpu never")
    share, most, least = t.batch_size // world, min(floor(fit), rows - 1), _least_rows(t, world)
    if most >= least:
        parts = [n for n in range(1, share + 1) if share % n == 0 and least <= share // n <= most]
        changes += [f"training.accumulate {n} ({_in_parts(t)})" for n in parts[:1]]
        batches = [n * world * t.accumulate for n in (most, most - 1) if n >= least]
        changes += [f"training.batch_size {n}" for n in batches if not _parts_neighbours(t, world, n)][:1]
    side = sqrt(min(max(fit, 0) / rows, FILLED))
    smaller = [floor(px * side / CROP_STEP_PX) * CROP_STEP_PX for px in crop_px]
    if min(smaller) > 0:
        changes.append(f"training.crop_px {smaller[0]} {smaller[1]}" + " (and those of phases)" * bool(t.phases))
    return changes


def _in_parts(t: Training) -> str:
    """What micro-batches change of a step."""
    changed = ["batch norm"] * ("batch_norm" not in t.freeze) + [n for n in OF_A_PART if n in terms_used(t)]
    if not changed:
        return "the same batch in parts"
    *others, last = changed
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} then see{'s' * (not others)} a part of the batch at a time"


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
