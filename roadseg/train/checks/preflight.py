"""What of a config can't be trained, whatever the data: told before hours are spent on that."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

from roadseg.config.sections import Config
from roadseg.data.batches.plan import check_devices
from roadseg.errors import ConfigError, ExportError
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD, Architecture, build
from roadseg.model.dropout import refuse_own_draws
from roadseg.progress import quiet
from roadseg.release.archive import Release
from roadseg.release.export import check_sizes, export_onnx
from roadseg.train.checks.feasible import refuse_strides, refuse_whatever_the_data
from roadseg.train.distributed.environment import place
from roadseg.train.distributed.process_group import ALONE
from roadseg.train.distributed.sync_batch_norm import refuse_unknown_norms
from roadseg.train.distributed.worker import processes
from roadseg.train.initial_weights import CLASSIFIER, refuse_frozen_at_random, starting_network
from roadseg.train.stage import architecture_of, choose_device, device_name, prepared
from roadseg.train.tracking.trackers import refuse_missing

ANY_CLASSES = ("one", "another")  # what they are, the data says
# timm's modules of which tests export a model
EXPORTED = ("efficientnet", "mobilenetv3", "regnet", "resnet")
log = logging.getLogger(__name__)


def refuse_ahead(config: Config, init: Release | None, machines: int = 1) -> None:
    """Raises ConfigError for a device, GPUs or packages that are not here and a network or weights that can't be had.

    And for crops, batches, steps and frozen parts that fit no data, and as refuse_unexportable; ArchiveError for a
    release that can't be read. init: the release to start from. machines: processes that were started together, each
    of which may start more.
    """
    t = config.training
    world = machines * processes(t, machines)
    if world == 1:  # of several each has its own
        choose_device(t.device)
    check_devices(torch.device(device_name(t.device)), t.augment_device, t.frames_on_gpu)
    if place().main:  # it alone writes them
        refuse_missing(t.mirrors)
    architecture = architecture_of(config, len(ANY_CLASSES))
    weights, statistics = config.model.backbone_weights, (IMAGENET_MEAN, IMAGENET_STD)
    with quiet("roadseg.train.initial_weights", "roadseg.weights.foreign"):  # logged when training begins
        start = starting_network(architecture, t.seed, weights, *statistics, init, t.weights_from, ANY_CLASSES)
        known = tuple(part for part in start.made_anew if part != CLASSIFIER)  # it may yet be of the data's classes
        refuse_frozen_at_random(replace(start, made_anew=known), t.freeze)
    refuse_whatever_the_data(t, architecture, world)
    refuse_strides(start.network, t)
    if world > 1:
        refuse_own_draws(start.network)
        if t.sync_batch_norm:
            refuse_unknown_norms(start.network)
    prepared(start.network, t, ALONE)  # to sync batch norms, ranks would have to be connected
    if place().main:  # it alone exports
        refuse_unexportable(config)


def refuse_unexportable(config: Config) -> None:
    """Raises ConfigError for a backbone that can't be exported, or whose graph doesn't take images of any size.

    It is built with a small head (tests export each form of those), exported untrained and run, in 10 to 30 s of one
    core. A model of the timm modules in EXPORTED is not, unless backbone_options change it: each training would pay
    for what concerns few. Once trained, a network is checked in any case. torch's own generator is left as it was.
    """
    m = config.model
    if timm.models.is_model_in_modules(m.backbone, EXPORTED) and not m.backbone_options:
        return
    wanted = replace(architecture_of(config, len(ANY_CLASSES)), auxiliary=False)
    if refused := _refused(replace(wanted, fusion="concat", head="separable", channels=8, atrous_rates=(1,))):
        found = f"{m.backbone} can't be released: {refused.found}"
        raise ConfigError(found, expected=refused.expected, where="model.backbone", todo=refused.todo) from refused


@cache  # once a process: the settings of a sweep share it
def _refused(architecture: Architecture) -> ExportError | None:
    log.info("exporting %s untrained, to know before it is trained that it can be", architecture.backbone)
    network = build(architecture, seed=0)
    with TemporaryDirectory(prefix="roadseg-export-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(network, path)
            check_sizes(path, network)
        except ExportError as e:
            return e
    return None
