"""What of a config can't be trained, whatever the data: told before hours are spent on that."""

from __future__ import annotations

from roadseg.config import Config
from roadseg.model.deeplab import IMAGENET_MEAN, IMAGENET_STD
from roadseg.progress import quiet
from roadseg.release.archive import Release
from roadseg.train.job import processes
from roadseg.train.refusals import refuse_strides, refuse_whatever_the_data
from roadseg.train.stage import architecture_of, choose_device
from roadseg.train.start import starting_network

ANY_CLASSES = ("one", "another")  # what they are, the data says


def refuse_ahead(config: Config, init: Release | None, machines: int = 1) -> None:
    """Raises ConfigError for a device or GPUs that are not here and a network or weights that can't be had.

    And for crops and batches that fit no data; ArchiveError for a release that can't be read. init: the release to
    start from. machines: processes that were started together, each of which may start more.
    """
    t = config.training
    world = machines * processes(t, machines)
    if world == 1:  # of several each has its own
        choose_device(t.device)
    architecture = architecture_of(config, len(ANY_CLASSES))
    weights, statistics = config.model.backbone_weights, (IMAGENET_MEAN, IMAGENET_STD)
    with quiet("roadseg.train.start", "roadseg.model.foreign"):  # what they say is said when training begins
        network = starting_network(
            architecture, t.seed, weights, *statistics, init, t.weights_from, ANY_CLASSES
        ).network
    refuse_whatever_the_data(t, architecture, world)
    refuse_strides(network, t)
