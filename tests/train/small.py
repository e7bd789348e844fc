"""A small network and a plain loss for tests of training."""

from __future__ import annotations

from typing import Any

from roadseg.model import Architecture
from roadseg.train.losses.criterion import Criterion, Terms


def small_architecture(**changes: Any) -> Architecture:
    fields: dict[str, Any] = {
        "num_classes": 3,
        "backbone": "test_efficientnet",
        "output_stride": 16,
        "fusion": "skfusion",
        "head": "separable",
        "channels": 8,
        "atrous_rates": (1, 2, 3),
        "low_levels": (8, 4),
        "auxiliary": True,
        "dropout": 0.1,
    }
    return Architecture(**fields | changes)


def plain_criterion(**changes: Any) -> Criterion:
    """Cross-entropy on both heads; the auxiliary one counts 0.4."""
    fields: dict[str, Any] = {
        "main": Terms(),
        "auxiliary": Terms(),
        "auxiliary_weight": 0.4,
        "class_weights_K": None,
        "label_smoothing": 0.0,
        "ohem_threshold": 0.7,
        "ohem_keep": 0.0625,
        "focal_gamma": 2.0,
        "boundary_px": 3,
    }
    return Criterion(**fields | changes)
