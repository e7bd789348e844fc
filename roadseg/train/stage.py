"""Stage 3: from shards to a candidate archive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from roadseg.config.sections import Config
from roadseg.config.training import Loss, Training
from roadseg.data.augment.class_mix import class_mixed
from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches.gpu_frames import split_bytes
from roadseg.data.batches.loader import Batch, Crops
from roadseg.data.batches.plan import LoaderPlan, batches_of, choose_loader
from roadseg.data.batches.sampler import Batches, Order, Sample
from roadseg.data.manifest import HOLDOUT
from roadseg.data.shards.index import Shards, Split
from roadseg.errors import ConfigError
from roadseg.images.decode import encode_jpeg
from roadseg.labels import IGNORE, LabelSet
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, Architecture, DeepLabV3Plus
from roadseg.model.surgery import checkpoint_activations, freeze
from roadseg.release.archive import TERMS, Release
from roadseg.release.graph import WEIGHTS
from roadseg.release.network import load_network
from roadseg.train.calibration.class_offsets import add_class_offsets, add_to_logits
from roadseg.train.checks.feasible import (
    out_of_memory,
    ran_out,
    refuse_impossible,
    refuse_strides,
    steps_of,
    validation_steps,
)
from roadseg.train.checks.unused_settings import warn_without_effect
from roadseg.train.determinism import deterministic
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.distributed.sync_batch_norm import plain_batch_norm, sync_batch_norm
from roadseg.train.initial_weights import Start, refuse_frozen_at_random, starting_network
from roadseg.train.loop import Settings, Source, Stretch, no_mirrors, train
from roadseg.train.losses.criterion import Criterion, Terms
from roadseg.train.losses.distillation import Distillation, refuse_other_classes
from roadseg.train.losses.objective import Objective
from roadseg.train.losses.pixel import enet_weights, median_frequency_weights
from roadseg.train.package import write_candidate
from roadseg.train.signals import stopped_at_once
from roadseg.train.tracking.pictures import Pictures, evenly
from roadseg.train.tracking.trackers import mirrors

COMPILED_FROM_STEPS = 2000  # compilation takes a minute or two
log = logging.getLogger(__name__)


def train_candidate(
    config: Config,
    shards: Shards,
    work: Path,
    init: Release | None = None,
    teacher: Release | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train, export, check and pack; or go on with a run that left its checkpoints in `work`.

    Leaves model.tar.gz, history.jsonl, contact_sheet.jpg and the last checkpoint, all written by the
    main rank. init: the release to start from; teacher: the one to learn from. Raises ConfigError for
    what can't be trained, ExportError if the exported graph is not the network.
    """
    t = config.training
    device = choose_device(t.device, ranks)
    frames = shards.split("train") if "train" in shards.shards else None
    if not frames or not len(frames):
        raise ConfigError("the data set has no train split", where="data", todo="evaluate a release on it instead")
    steps = steps_of(t, len(frames))
    architecture = architecture_of(config, shards.label_set.num_classes)
    refuse_impossible(t, architecture, shards, frames, ranks.world, config.data.allow)
    start = _start(config, architecture, shards, init)
    refuse_strides(start.network, t)
    refuse_frozen_at_random(start, t.freeze)
    if ranks.main:
        warn_without_effect(config.model, t)
    network = prepared(start.network, t, ranks)
    settings = _settings(t, steps, device)
    validation = {name: shards.split(name) for name in shards.shards if name != "train"}
    # A held-out split is for scoring alone.
    shown = validation.get("val") or next((s for name, s in validation.items() if name != HOLDOUT), frames)
    if ranks.main:
        write_contact_sheet(_crops(t, frames, t.crop_px, shards), shards.label_set, work / "contact_sheet.jpg")
    folder = work / "log"
    opened = no_mirrors
    if ranks.main and t.mirrors:
        fields = {k: config.key_fields()[k] for k in ("model", "training")}
        opened = partial(mirrors, t.mirrors, folder, work.name.removesuffix(".partial"), fields)
    draw = None
    if ranks.main and t.pictures:
        pictures = Pictures(shown, shards.label_set, evenly(len(shown), t.pictures), folder / "pictures")
        draw = partial(pictures.draw, device=device, bf16=settings.bf16)
    terms = _terms(shards.label_set.terms, start, teacher)
    with deterministic(t.deterministic):
        try:
            average, taken = train(
                network, _stretches(t, frames, shards, architecture, steps, device, ranks), validation,
                shards.label_set, _objective(t, shards, teacher, device, settings.bf16, ranks), settings, device, work,
                ranks=ranks, mirrors=opened, draw=draw, terms=terms, name_of=lambda index: frames.frames[index].name,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            frames_bytes = split_bytes(frames) if _feed(t, frames, device, ranks).frames_on_gpu else 0
            teacher_bytes = len(teacher.members[WEIGHTS]) if teacher else 0
            raise out_of_memory(
                e, architecture, t, ranks.world, settings.bf16, device, frames_bytes, teacher_bytes
            ) from e
        if ranks.main:
            final, offsets = plain_batch_norm(average.inference_network()), {}
            if t.class_offsets:
                with stopped_at_once("while class offsets were fitted"):
                    path = folder / "class_offsets.json"
                    offsets = add_class_offsets(final, frames, validation, shards.label_set, settings.bf16, path)
    if ranks.main:
        trained: dict[str, Any] = {"steps": taken, "started_from": start.words}
        if offsets:
            trained["class_offsets"] = offsets
        if start.made_anew:
            trained["made_anew"] = list(start.made_anew)
        if teacher:
            trained["taught_by"] = f"release {teacher.digest}"
        with stopped_at_once("while the archive was written"):
            profiled_on = torch.device("cpu") if t.deterministic else device
            write_candidate(config, shards, final.cpu(), trained, shown, terms, work, profiled_on)


def device_name(name: str) -> str:
    """auto: CUDA, else Apple's MPS, else the CPU."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """As `device_name`; of several ranks each has its own GPU.

    Raises ConfigError if a named one is not there.
    """
    name = device_name(name)
    if name == "cuda" and ranks.world > 1:
        name = f"cuda:{ranks.local_rank}"
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
        raise ConfigError(
            f"{name}, and PyTorch finds {there or 'no'} such device{'s' * (there > 1)} here",
            where="training.device",
            todo="set it to auto, or look why (nvidia-smi; a PyTorch that was built for this GPU's driver)",
        ) from e
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def architecture_of(config: Config, num_classes: int) -> Architecture:
    """Of the network that is trained, with its auxiliary heads; of the first phase."""
    m = config.model
    return Architecture(
        num_classes,
        m.backbone,
        m.output_stride,
        m.fusion,
        m.head,
        m.channels,
        m.atrous_rates,
        m.low_levels,
        config.training.auxiliary_weight > 0,
        m.dropout,
        m.backbone_options,
        m.early_strides,
    )


def _start(config: Config, architecture: Architecture, shards: Shards, init: Release | None) -> Start:
    weights, t = config.model.backbone_weights, config.training
    own = weights == "none"
    mean, std = (shards.mean, shards.std) if own else (IMAGENET_MEAN, IMAGENET_STD)
    return starting_network(architecture, t.seed, weights, mean, std, init, t.weights_from, shards.label_set.names)


def prepared(network: DeepLabV3Plus, t: Training, ranks: Ranks) -> DeepLabV3Plus:
    """`network`, changed in place to what is trained. Raises ConfigError where that can't be made of it."""
    freeze(network, t.freeze)
    if t.activation_checkpointing:
        checkpoint_activations(network.backbone)
    if ranks.world > 1 and t.sync_batch_norm:
        sync_batch_norm(network, ranks)
    return network


def _settings(t: Training, steps: int, device: torch.device) -> Settings:
    same = {k: getattr(t, k) for k in Settings.__dataclass_fields__ if k in Training.model_fields}
    bf16 = t.precision == "bf16" or (t.precision == "auto" and device.type == "cuda")
    every = validation_steps(t, steps)
    worth = device.type == "cuda" and steps >= COMPILED_FROM_STEPS and not t.deterministic
    compiled = t.compile == "always" or (t.compile == "auto" and worth)
    return Settings(**{**same, "steps": steps, "bf16": bf16, "validate_every": every, "compiled": compiled})


def _stretches(
    t: Training,
    frames: Split,
    shards: Shards,
    architecture: Architecture,
    steps: int,
    device: torch.device,
    ranks: Ranks,
) -> list[Stretch]:
    """The run cut where a phase begins, each part with its crops."""
    order = Order(frames.frames, t.seed, t.class_uniform, shards.part_weights)
    chosen = _feed(t, frames, device, ranks)
    log.info("data: %s", chosen.why)
    crop_px, stride, stretches = t.crop_px, architecture.output_stride, []
    bounds = [0, *(round(phase.after * steps) for phase in t.phases), steps]
    for number, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if number:
            crop_px = t.phases[number - 1].crop_px or crop_px
            stride = t.phases[number - 1].output_stride or stride
        source = _source(t, _crops(t, frames, crop_px, shards), order, last, chosen, device, ranks)
        stretches.append(Stretch(first, last, stride, source))
    return stretches


def _source(
    t: Training, crops: Crops, order: Order, last: int, chosen: LoaderPlan, device: torch.device, ranks: Ranks
) -> Source:
    """This rank's batches up to step `last`."""

    def batches(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        mine = Batches(order, t.batch_size, step, last, ranks.rank, ranks.world)
        with closing(batches_of(chosen, crops, mine, device, stopped)) as made:
            if t.augment.class_mix:
                yield from class_mixed(made, t.augment.class_mix, t.seed, step, ranks.rank * mine.rows, t.batch_size)
            else:
                yield from made

    return batches


def _feed(t: Training, frames: Split, device: torch.device, ranks: Ranks) -> LoaderPlan:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return choose_loader(
        split_bytes(frames), device, memory, t.augment_device, t.frames_on_gpu, t.workers, ranks.on_this_machine
    )


def _crops(t: Training, frames: Split, crop_px: tuple[int, int], shards: Shards) -> Crops:
    own = {k: getattr(t.augment, k) for k in Augmentation.__dataclass_fields__ if k in type(t.augment).model_fields}
    augmentation = Augmentation(crop_px, **own)
    r, g, b = (round(m) for m in shards.mean)
    return Crops(frames, augmentation, t.seed, (r, g, b))


def _objective(
    t: Training, shards: Shards, teacher: Release | None, device: torch.device, bf16: bool, ranks: Ranks
) -> Objective:
    pixels = shards.class_pixels["train"][:-1]
    weights = {"none": lambda _: None, "enet": enet_weights, "median": median_frequency_weights}[t.class_weights](
        pixels
    )
    criterion = Criterion(
        _terms_of(t.loss),
        _terms_of(t.auxiliary_loss),
        t.auxiliary_weight,
        torch.tensor(weights, device=device) if weights else None,
        t.label_smoothing,
        t.ohem_threshold,
        t.ohem_keep,
        t.focal_gamma,
        t.boundary_px,
        ranks,
    )
    if teacher is None:
        return Objective(criterion)
    refuse_other_classes(teacher, shards.label_set)
    network = load_network(teacher)
    add_to_logits(network, -teacher.class_offsets)  # its scores are to be learned, not what suits its mIoU
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Objective(criterion, Distillation(network, t.distill_weight, t.distill_temperature), bf16)


def _terms_of(loss: Loss) -> Terms:
    return Terms(**loss.model_dump())


def _terms(own: str, start: Start, teacher: Release | None) -> str:
    """The data's terms, and those of what had a part in the weights."""
    if start.terms is not None:
        own += f"\n\nStarted from {start.words}, whose data terms are:\n{start.terms}"
    if teacher:
        theirs = teacher.members[TERMS].decode(errors="replace")
        own += f"\n\nTaught by release {teacher.digest}, whose data terms are:\n{theirs}"
    return own


def write_contact_sheet(crops: Crops, label_set: LabelSet, path: Path, samples: int = 12) -> None:
    """A JPEG of the first frames as epoch 0 augments them, image over coloured label, at 240 px width."""
    tiles = []
    for index in range(min(samples, len(crops.split))):
        image, label = crops.crop(Sample(0, index))
        width = 240
        size = (width, max(1, round(label.shape[0] * width / label.shape[1])))
        coloured = np.where(label[..., None] == IGNORE, 40, label_set.palette[label]).astype(np.uint8)
        pair = [cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (image, coloured)]
        tiles.append(np.vstack(pair))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 4)
    rows = [np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    path.write_bytes(encode_jpeg(np.vstack(rows), 85))
