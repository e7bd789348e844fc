"""Refuse trainings that are impossible on any data, before the data is made."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

from roadseg.data.batches.plan import check_devices
from roadseg.errors import ConfigError, ExportError
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, Architecture, build
from roadseg.model.dropout import refuse_unshared_draws
from roadseg.progress import quiet
from roadseg.release.archive import Release
from roadseg.release.export import check_sizes, export_onnx
from roadseg.train.checks.feasible import refuse_strides, refuse_untrainable_on_any_data
from roadseg.train.device import choose_device, device_name, processes_per_machine
from roadseg.train.distributed.environment import ALONE, Cluster
from roadseg.train.distributed.process_group import ALONE as ONE_RANK
from roadseg.train.distributed.sync_batch_norm import refuse_unknown_norms
from roadseg.train.initial_weights import CLASSIFIER, refuse_frozen_at_random, starting_network
from roadseg.train.recipe import Recipe
from roadseg.train.stage import prepared
from roadseg.train.tracking.trackers import refuse_missing

ANY_CLASSES = ("one", "another")  # stand for the data's classes, which are not known yet
# timm's modules of which tests export a model
EXPORTED = ("efficientnet", "mobilenetv3", "regnet", "resnet")
log = logging.getLogger(__name__)


def refuse_impossible_training(
    recipe: Recipe, init: Release | None, *, device: str, gpus: int, cluster: Cluster = ALONE
) -> None:
    """Raise ConfigError for what can't be trained on any data.

    That is a device, GPUs or packages that this machine lacks; a network that can't be built, or that the weights don't
    fit; crops, batches, steps and frozen parts that fit no data; and what `refuse_unexportable` refuses. Raises
    ArchiveError for a release that can't be read. recipe: for ANY_CLASSES. init: the release to start from. device,
    gpus: training.device and training.gpus.
    """
    world = cluster.world if cluster.world > 1 else processes_per_machine(gpus, device)
    if world == 1:  # each of several takes its own
        choose_device(device)
    check_devices(torch.device(device_name(device)), recipe.batches.augment_device, recipe.batches.frames_on_gpu)
    if cluster.main:  # only it writes to them
        refuse_missing(recipe.trackers)
    weights, statistics = recipe.backbone_weights, (IMAGENET_MEAN, IMAGENET_STD)
    with quiet("roadseg.train.initial_weights", "roadseg.weights.foreign"):  # logged when training begins
        start = starting_network(
            recipe.architecture, recipe.loop.seed, weights, *statistics, init, recipe.weights_from, ANY_CLASSES
        )
        known = tuple(part for part in start.made_anew if part != CLASSIFIER)  # the data's classes may match it
        refuse_frozen_at_random(replace(start, made_anew=known), recipe.freeze)
    refuse_untrainable_on_any_data(recipe, world)
    refuse_strides(start.network, recipe.phases)
    if world > 1:
        refuse_unshared_draws(start.network)
        if recipe.sync_batch_norm:
            refuse_unknown_norms(start.network)
    prepared(start.network, recipe, ONE_RANK)  # synchronized batch norms would need connected ranks
    if cluster.main:  # only it exports
        refuse_unexportable(recipe.architecture)


def refuse_unexportable(a: Architecture) -> None:
    """Raise ConfigError for a backbone that can't be exported, or whose graph doesn't take images of any size.

    It is built with a small head (tests export each form of those), exported untrained and run, in 10 to 30 s of one
    core. A model of the timm modules in EXPORTED is not, unless backbone_options change it: each training would pay
    for what concerns few. A trained network is checked in any case. torch's own generator is left as it was.
    """
    if timm.models.is_model_in_modules(a.backbone, EXPORTED) and not a.backbone_options:
        return
    small = replace(a, auxiliary=False, fusion="concat", head="separable", channels=8, atrous_rates=(1,))
    if error := _export_error(small):
        found = f"{a.backbone} can't be released: {error.found}"
        raise ConfigError(found, expected=error.expected, where="model.backbone", todo=error.todo) from error


@cache  # once a process: the settings of a sweep share it
def _export_error(architecture: Architecture) -> ExportError | None:
    log.info("exporting %s untrained, to check before training that it can be exported", architecture.backbone)
    network = build(architecture, seed=0)
    with TemporaryDirectory(prefix="roadseg-export-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(network, path)
            check_sizes(path, network)
        except ExportError as e:
            return e
    return None
