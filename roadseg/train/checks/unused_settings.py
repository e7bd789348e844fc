"""Warn of settings that were changed but have no effect beside the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from roadseg.train.recipe import Recipe

log = logging.getLogger(__name__)


def warn_unused_settings(
    recipe: Recipe, training: Mapping[str, Any], defaults: Mapping[str, Any], default_backbone_weights: str
) -> None:
    """Warn of each key that is not at its default and changes nothing.

    training, defaults: the config's training section and its default, as plain values.
    """
    if recipe.backbone_weights not in ("none", default_backbone_weights):
        for key in ("init_from", "weights_from"):
            if training[key]:
                log.warning("model.backbone_weights has no effect: training.%s gives the backbone's weights", key)
    for key, why in _unused(recipe, training, defaults):
        log.warning("training.%s has no effect: %s", key, why)


def _unused(recipe: Recipe, t: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, why)."""
    terms = recipe.loss.terms_used
    smoothed = {"cross_entropy", "ohem", "boundary"}
    conditions = {
        "class_weights": ("no term of the loss uses them", not terms & (smoothed | {"focal"})),
        "label_smoothing": ("no term of the loss uses it", not terms & smoothed),
        "ohem_threshold": ("ohem is not a term of the loss", "ohem" not in terms),
        "ohem_keep": ("ohem is not a term of the loss", "ohem" not in terms),
        "focal_gamma": ("focal is not a term of the loss", "focal" not in terms),
        "boundary_px": ("boundary is not a term of the loss", "boundary" not in terms),
        "auxiliary_loss": ("auxiliary_weight is 0", not t["auxiliary_weight"]),
        "distill_from": ("distill_weight is 0", not t["distill_weight"]),
        "distill_weight": ("distill_from is empty", not t["distill_from"]),
        "distill_temperature": ("distill_from is empty", not t["distill_from"]),
        "momentum": (f"it belongs to sgd, not to {t['optimizer']}", t["optimizer"] != "sgd"),
        "poly_power": (f"it belongs to poly, not to {t['scheduler']}", t["scheduler"] != "poly"),
        "backbone_lr_factor": ("the backbone is frozen", "backbone" in recipe.freeze),
    }
    for key, (why, unused) in conditions.items():
        if unused and t[key] != defaults[key]:
            yield key, why
    if recipe.batches.class_mix and recipe.batches.batch_size == 1:
        yield "augment.class_mix", "it pastes between the samples of a batch, which has one"
    for before, phase, section in zip(recipe.phases, recipe.phases[1:], t["phases"], strict=False):
        if (before.crop_px, before.output_stride) == (phase.crop_px, phase.output_stride):
            yield "phases", f"the one after {section['after']:g} changes neither crop nor output stride"
