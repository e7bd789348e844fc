"""Preflight: everything that can be refused before data is made, checked once at the start of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from roadseg.errors import ConfigError
from roadseg.pipeline.context import Context
from roadseg.pipeline.stages import find_trained
from roadseg.release.store.resolve import find_release

if TYPE_CHECKING:
    from roadseg.train.inputs import Inputs


def preflight(context: Context, *, train: bool = True, push: bool = False) -> Inputs | None:
    """Raise what is wrong with the config, the weights and releases it names, and the store.

    train, push: whether the run gets that far. Returns what training starts from, None without training. A training
    that exists already, perhaps made on another machine, is not refused because this machine can't do it.
    """
    from roadseg.ingest.stage import locate

    locate(context.config.data, context.cache)
    if not train:
        return None
    inputs = training_inputs(context)
    if not find_trained(context, inputs):
        refuse_impossible(context, inputs)
    if push:
        from roadseg.push.stage import read_champion

        read_champion(context.store)
    return inputs


def training_inputs(context: Context) -> Inputs:
    """The releases and files that training starts from. Raises ConfigError for missing ones."""
    from roadseg.train.inputs import training_inputs as read_inputs

    m, t = context.config.model, context.config.training
    return read_inputs(
        lambda reference: find_release(context.config, context.workspace.path, reference),
        backbone_weights=m.backbone_weights,
        weights_from=t.weights_from,
        init_from=t.init_from,
        distill_from=t.distill_from,
    )


def refuse_impossible(context: Context, inputs: Inputs) -> None:
    """Raise ConfigError for a training that is impossible whatever the data."""
    from roadseg.train.checks.preflight import ANY_CLASSES, refuse_impossible_training
    from roadseg.train.device import device_name
    from roadseg.train.recipe import recipe_of

    t = context.config.training
    device_type = device_name(t.device).partition(":")[0]
    recipe = recipe_of(context.config, num_classes=len(ANY_CLASSES), device_type=device_type)
    init = inputs.init.release if inputs.init else None
    refuse_impossible_training(recipe, init, device=t.device, gpus=t.gpus, cluster=context.cluster)


def refuse_other_training(context: Context, ours: str, rank_0s: str) -> None:
    """Raise ConfigError where this process is about to train something else than rank 0."""
    if ours != rank_0s:
        raise ConfigError(
            f"process {context.cluster.rank} of {context.cluster.world} would make the training {ours}, and process 0 "
            f"makes {rank_0s}",
            expected="the same settings and the same data for all",
            where="the config and the data",
            todo="give all the same command and all of the data",
        )
