"""Stage 3: from shards to a candidate archive."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from roadseg.config.sections import Config, Model
from roadseg.config.training import Training
from roadseg.data.augment.class_mix import class_mixed
from roadseg.data.batches.gpu_frames import split_bytes
from roadseg.data.batches.loader import Batch, Crops
from roadseg.data.batches.plan import LoaderPlan, batches_of, choose_loader
from roadseg.data.batches.sampler import Batches, Order, Sample
from roadseg.data.manifest import HOLDOUT
from roadseg.data.shards.index import Shards, Split
from roadseg.errors import ConfigError
from roadseg.images.decode import encode_jpeg
from roadseg.labels import IGNORE, LabelSet
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, DeepLabV3Plus
from roadseg.model.surgery import checkpoint_activations, freeze
from roadseg.release.archive import TERMS, Release
from roadseg.release.network import load_network
from roadseg.train.calibration.class_offsets import add_class_offsets, add_to_logits
from roadseg.train.checks.feasible import refuse_strides, refuse_untrainable
from roadseg.train.checks.memory import out_of_memory
from roadseg.train.checks.memory_errors import is_out_of_memory
from roadseg.train.checks.unused_settings import warn_unused_settings
from roadseg.train.determinism import deterministic
from roadseg.train.device import choose_device
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.distributed.sync_batch_norm import plain_batch_norm, sync_batch_norm
from roadseg.train.initial_weights import Start, refuse_frozen_at_random, starting_network
from roadseg.train.loop import BatchSource, TrainingPhase, no_trackers, train
from roadseg.train.losses.criterion import Criterion
from roadseg.train.losses.distillation import Distillation, refuse_other_classes
from roadseg.train.losses.objective import Objective
from roadseg.train.losses.pixel import enet_weights, median_frequency_weights
from roadseg.train.package import write_candidate
from roadseg.train.recipe import Recipe, recipe_of
from roadseg.train.signals import stopped_at_once
from roadseg.train.tracking.pictures import Pictures, evenly
from roadseg.train.tracking.trackers import open_trackers as open_all_trackers

log = logging.getLogger(__name__)


def train_candidate(
    config: Config,
    shards: Shards,
    work: Path,
    init: Release | None = None,
    teacher: Release | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Train, export, check and pack; or continue a run that left its checkpoints in `work`.

    Leaves model.tar.gz, history.jsonl, contact_sheet.jpg and the last checkpoint, all written by the
    main rank. init: the release to start from; teacher: the one to learn from. Raises ConfigError for
    what can't be trained, ExportError if the exported graph is not the network.
    """
    frames = shards.split("train") if "train" in shards.shards else None
    if not frames or not len(frames):
        raise ConfigError("the data set has no train split", where="data", todo="evaluate a release on it instead")
    device = choose_device(config.training.device, ranks)
    recipe = recipe_of(config, num_classes=shards.label_set.num_classes, device_type=device.type, frames=len(frames))
    refuse_untrainable(recipe, shards, frames, ranks.world, config.data.allow)
    start = _start(recipe, shards, init)
    refuse_strides(start.network, recipe.phases)
    refuse_frozen_at_random(start, recipe.freeze)
    if ranks.main:
        _warn_unused_settings(config, recipe)
    network = prepared(start.network, recipe, ranks)
    validation = {name: shards.split(name) for name in shards.shards if name != "train"}
    # A held-out split is for scoring alone.
    shown = validation.get("val") or next((s for name, s in validation.items() if name != HOLDOUT), frames)
    log_folder = work / "log"
    open_trackers, draw = no_trackers, None
    if ranks.main:
        write_contact_sheet(_crops(recipe, frames, shards), shards.label_set, work / "contact_sheet.jpg")
        if recipe.trackers:
            fields = {k: config.key_fields()[k] for k in ("model", "training")}
            name = work.name.removesuffix(".partial")
            open_trackers = partial(open_all_trackers, recipe.trackers, log_folder, name, fields)
        if recipe.pictures:
            pictures = Pictures(shown, shards.label_set, evenly(len(shown), recipe.pictures), log_folder / "pictures")
            draw = partial(pictures.draw, device=device, bf16=recipe.loop.bf16)
    terms = _terms(shards.label_set.terms, start, teacher)
    chosen = _loader_plan(recipe, frames, device, ranks)
    with deterministic(recipe.deterministic):
        try:
            average, steps = train(
                network, _training_phases(recipe, frames, shards, chosen, device, ranks), validation, shards.label_set,
                _objective(recipe, shards, teacher, device, ranks), recipe.loop, device, work,
                ranks=ranks, trackers=open_trackers, draw=draw, terms=terms,
                name_of=lambda index: frames.frames[index].name,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise out_of_memory(
                e, recipe, ranks.world, device, split_bytes(frames) if chosen.frames_on_gpu else 0
            ) from e
        if not ranks.main:
            return
        final, offsets = plain_batch_norm(average.inference_network()), {}
        if recipe.class_offsets:
            with stopped_at_once("while class offsets were fitted"):
                path = log_folder / "class_offsets.json"
                offsets = add_class_offsets(final, frames, validation, shards.label_set, recipe.loop.bf16, path)
    trained: dict[str, Any] = {"steps": steps, "started_from": start.words}
    if offsets:
        trained["class_offsets"] = offsets
    if start.made_anew:
        trained["made_anew"] = list(start.made_anew)
    if teacher:
        trained["taught_by"] = f"release {teacher.digest}"
    with stopped_at_once("while the archive was written"):
        profiled_on = torch.device("cpu") if recipe.deterministic else device
        fields = {k: config.key_fields()[k] for k in ("model", "training")}
        write_candidate(fields, shards, final.cpu(), trained, shown, terms, work, profiled_on)


def _warn_unused_settings(config: Config, recipe: Recipe) -> None:
    training, defaults = config.training.model_dump(), Training().model_dump()
    warn_unused_settings(recipe, training, defaults, Model().backbone_weights)


def _start(recipe: Recipe, shards: Shards, init: Release | None) -> Start:
    from_scratch = recipe.backbone_weights == "none"
    mean, std = (shards.mean, shards.std) if from_scratch else (IMAGENET_MEAN, IMAGENET_STD)
    return starting_network(
        recipe.architecture, recipe.loop.seed, recipe.backbone_weights, mean, std, init, recipe.weights_from,
        shards.label_set.names,
    )  # fmt: skip


def prepared(network: DeepLabV3Plus, recipe: Recipe, ranks: Ranks) -> DeepLabV3Plus:
    """Prepare `network` for training, in place: frozen parts, checkpointing, synchronized norms. Raises ConfigError."""
    freeze(network, recipe.freeze)
    if recipe.activation_checkpointing:
        checkpoint_activations(network.backbone)
    if ranks.world > 1 and recipe.sync_batch_norm:
        sync_batch_norm(network, ranks)
    return network


def _training_phases(
    recipe: Recipe, frames: Split, shards: Shards, chosen: LoaderPlan, device: torch.device, ranks: Ranks
) -> list[TrainingPhase]:
    """The phases of the run, each with its batches."""
    order = Order(frames.frames, recipe.loop.seed, recipe.batches.class_uniform, shards.part_weights)
    log.info("data: %s", chosen.why)
    return [
        TrainingPhase(
            first=phase.first,
            last=phase.last,
            output_stride=phase.output_stride,
            batches=_batches(
                recipe, _crops(recipe, frames, shards, phase.crop_px), order, phase.last, chosen, device, ranks
            ),
        )
        for phase in recipe.phases
    ]


def _batches(
    recipe: Recipe, crops: Crops, order: Order, last: int, chosen: LoaderPlan, device: torch.device, ranks: Ranks
) -> BatchSource:
    """This rank's batches up to step `last`."""
    plan, seed = recipe.batches, recipe.loop.seed

    def batches(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        mine = Batches(order, plan.batch_size, step, last, ranks.rank, ranks.world)
        with closing(batches_of(chosen, crops, mine, device, stopped)) as made:
            if plan.class_mix:
                yield from class_mixed(made, plan.class_mix, seed, step, ranks.rank * mine.rows, plan.batch_size)
            else:
                yield from made

    return batches


def _loader_plan(recipe: Recipe, frames: Split, device: torch.device, ranks: Ranks) -> LoaderPlan:
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    plan = recipe.batches
    return choose_loader(
        split_bytes(frames), device, memory, plan.augment_device, plan.frames_on_gpu, plan.workers,
        ranks.on_this_machine,
    )  # fmt: skip


def _crops(recipe: Recipe, frames: Split, shards: Shards, crop_px: tuple[int, int] | None = None) -> Crops:
    augmentation = replace(recipe.augmentation, crop_px=crop_px or recipe.augmentation.crop_px)
    r, g, b = (round(m) for m in shards.mean)
    return Crops(frames, augmentation, recipe.loop.seed, (r, g, b))


def _objective(
    recipe: Recipe, shards: Shards, teacher: Release | None, device: torch.device, ranks: Ranks
) -> Objective:
    options, pixels = recipe.loss, shards.class_pixels["train"][:-1]
    rules = {"none": lambda _: None, "enet": enet_weights, "median": median_frequency_weights}
    weights = rules[options.class_weights](pixels)
    criterion = Criterion(
        main=options.main,
        auxiliary=options.auxiliary,
        auxiliary_weight=options.auxiliary_weight,
        class_weights_K=torch.tensor(weights, device=device) if weights else None,
        label_smoothing=options.label_smoothing,
        ohem_threshold=options.ohem_threshold,
        ohem_keep=options.ohem_keep,
        focal_gamma=options.focal_gamma,
        boundary_px=options.boundary_px,
        ranks=ranks,
    )
    if teacher is None:
        return Objective(criterion)
    refuse_other_classes(teacher, shards.label_set)
    network = load_network(teacher)
    add_to_logits(network, -teacher.class_offsets)  # learn its scores, not the decision that suits its mIoU
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    distillation = Distillation(network, options.distill_weight, options.distill_temperature)
    return Objective(criterion, distillation, recipe.loop.bf16)


def _terms(own: str, start: Start, teacher: Release | None) -> str:
    """Terms of the data, and of the data behind the initial weights and the teacher."""
    if start.terms is not None:
        own += f"\n\nStarted from {start.words}, whose data terms are:\n{start.terms}"
    if teacher:
        theirs = teacher.members[TERMS].decode(errors="replace")
        own += f"\n\nTaught by release {teacher.digest}, whose data terms are:\n{theirs}"
    return own


def write_contact_sheet(crops: Crops, label_set: LabelSet, path: Path, samples: int = 12) -> None:
    """A JPEG of the first frames as epoch 0 augments them, image over colored label, at 240 px width."""
    tiles = []
    for index in range(min(samples, len(crops.split))):
        image, label = crops.crop(Sample(epoch=0, index=index))
        width = 240
        size = (width, max(1, round(label.shape[0] * width / label.shape[1])))
        colored = np.where(label[..., None] == IGNORE, 40, label_set.palette[label]).astype(np.uint8)
        pair = [cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (image, colored)]
        tiles.append(np.vstack(pair))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 4)
    rows = [np.hstack(tiles[i : i + 4]) for i in range(0, len(tiles), 4)]
    path.write_bytes(encode_jpeg(np.vstack(rows), 85))
