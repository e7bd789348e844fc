"""What of a config can't be trained, whatever the data: told before hours are spent on that."""

from __future__ import annotations

from dataclasses import replace

import torch

from roadseg.config import Config
from roadseg.data.feed import refuse_places
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD
from roadseg.model.dropout import refuse_own_draws
from roadseg.progress import quiet
from roadseg.release.archive import Release
from roadseg.train.job import processes
from roadseg.train.mirrors import refuse_missing
from roadseg.train.place import place
from roadseg.train.ranks import ALONE
from roadseg.train.refusals import refuse_strides, refuse_whatever_the_data
from roadseg.train.stage import architecture_of, choose_device, device_name, prepared
from roadseg.train.start import CLASSIFIER, refuse_frozen_at_random, starting_network
from roadseg.train.synced_norm import refuse_unknown_norms

ANY_CLASSES = ("one", "another")  # what they are, the data says


def refuse_ahead(config: Config, init: Release | None, machines: int = 1) -> None:
    """Raises ConfigError for a device, GPUs or packages that are not here and a network or weights that can't be had.

    And for crops, batches, steps and frozen parts that fit no data; ArchiveError for a release that can't be read.
    init: the release to start from. machines: processes that were started together, each of which may start more.
    """
    t = config.training
    world = machines * processes(t, machines)
    if world == 1:  # of several each has its own
        choose_device(t.device)
    refuse_places(torch.device(device_name(t.device)), t.augment_device, t.frames_on_gpu)
    if place().main:  # it alone writes them
        refuse_missing(t.mirrors)
    architecture = architecture_of(config, len(ANY_CLASSES))
    weights, statistics = config.model.backbone_weights, (IMAGENET_MEAN, IMAGENET_STD)
    with quiet("roadseg.train.start", "roadseg.model.foreign"):  # what they say is said when training begins
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
