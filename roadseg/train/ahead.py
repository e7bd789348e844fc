"""What of a config can't be trained, whatever the data: told before hours are spent on that."""

from __future__ import annotations

from roadseg.config import Config
from roadseg.model.backbone import load_backbone_weights
from roadseg.model.deeplab import build
from roadseg.train.job import processes
from roadseg.train.refusals import refuse_strides, refuse_whatever_the_data
from roadseg.train.stage import architecture_of, choose_device

ANY_CLASSES = 2  # what they are, the data says


def refuse_ahead(config: Config, machines: int = 1) -> None:
    """Raises ConfigError for a device or GPUs that are not here and a network or backbone weights that can't be had.

    And for crops and batches that fit no data. machines: processes that were started together, each of which may
    start more. Whether a whole network's weights (init_from, weights_from) fit is told when it trains.
    """
    t = config.training
    world = machines * processes(t, machines)
    if world == 1:  # of several each has its own
        choose_device(t.device)
    architecture = architecture_of(config, ANY_CLASSES)
    network = build(architecture, seed=t.seed)
    refuse_whatever_the_data(t, architecture, world)
    refuse_strides(network, t)
    if not (t.init_from or t.weights_from):
        load_backbone_weights(network.backbone, config.model.backbone_weights)
