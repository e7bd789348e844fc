"""What was set and does nothing in this training: told, as somebody believes that it does."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from roadseg.config.sections import Model
from roadseg.config.training import Loss, Training

log = logging.getLogger(__name__)


def warn_without_effect(m: Model, t: Training) -> None:
    """A warning for each key that is not at its default and changes nothing beside the others."""
    if m.backbone_weights not in ("none", Model().backbone_weights):
        for key in ("init_from", "weights_from"):
            if getattr(t, key):
                log.warning("model.backbone_weights has no effect: training.%s gives the backbone's weights", key)
    for key, why in _without_effect(m, t):
        log.warning("training.%s has no effect: %s", key, why)


def _without_effect(m: Model, t: Training) -> Iterator[tuple[str, str]]:
    """(key, why)."""
    default = Training()
    terms = terms_used(t)
    smoothed = {"cross_entropy", "ohem", "boundary"}
    idle = {
        "class_weights": ("no term of the loss takes them", not terms & (smoothed | {"focal"})),
        "label_smoothing": ("no term of the loss takes it", not terms & smoothed),
        "ohem_threshold": ("ohem is no term of the loss", "ohem" not in terms),
        "ohem_keep": ("ohem is no term of the loss", "ohem" not in terms),
        "focal_gamma": ("focal is no term of the loss", "focal" not in terms),
        "boundary_px": ("boundary is no term of the loss", "boundary" not in terms),
        "auxiliary_loss": ("auxiliary_weight is 0", not t.auxiliary_weight),
        "distill_from": ("distill_weight is 0", not t.distill_weight),
        "distill_weight": ("distill_from is empty", not t.distill_from),
        "distill_temperature": ("distill_from is empty", not t.distill_from),
        "momentum": (f"it is of sgd, not of {t.optimizer}", t.optimizer != "sgd"),
        "poly_power": (f"it is of poly, not of {t.scheduler}", t.scheduler != "poly"),
        "backbone_lr_factor": ("the backbone is frozen", "backbone" in t.freeze),
    }
    for key, (why, unused) in idle.items():
        if unused and getattr(t, key) != getattr(default, key):
            yield key, why
    if t.augment.class_mix and t.batch_size == 1:
        yield "augment.class_mix", "it pastes between the samples of a batch, which has one"
    crop_px, stride = t.crop_px, m.output_stride
    for phase in t.phases:
        if phase.crop_px in (None, crop_px) and phase.output_stride in (None, stride):
            yield "phases", f"the one after {phase.after:g} changes neither crop nor output stride"
        crop_px, stride = phase.crop_px or crop_px, phase.output_stride or stride


def terms_used(t: Training) -> set[str]:
    """Names of the terms that have a weight, in whichever head's loss."""
    return _terms(t.loss) | (_terms(t.auxiliary_loss) if t.auxiliary_weight else set())


def _terms(loss: Loss) -> set[str]:
    return {name for name in Loss.model_fields if getattr(loss, name)}
