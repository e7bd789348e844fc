"""Settings that do nothing beside others."""

import logging
from pathlib import Path
from typing import Any

import pytest

from roadseg.config.sections import Config, Model, load_config
from roadseg.config.training import Phase, Training
from roadseg.train.checks.unused_settings import warn_unused_settings
from roadseg.train.recipe import recipe_of

LOVASZ = {"cross_entropy": 0, "lovasz": 1}
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def warn(model: Model, training: Training) -> None:
    recipe = recipe_of(Config(model=model, training=training), num_classes=3, device_type="cpu")
    warn_unused_settings(recipe, training.model_dump(), Training().model_dump(), Model().backbone_weights)


@pytest.mark.parametrize(
    ("idle", "rest", "used"),
    [
        ({"class_weights": "enet"}, {"loss": LOVASZ, "auxiliary_weight": 0}, {"loss": LOVASZ}),
        ({"augment": {"class_mix": 0.5}}, {"batch_size": 1}, {"batch_size": 2}),
        ({"label_smoothing": 0.1}, {"loss": LOVASZ, "auxiliary_loss": LOVASZ}, {"auxiliary_loss": LOVASZ}),
        ({"ohem_keep": 0.5}, {}, {"auxiliary_loss": {"ohem": 1}}),
        ({"ohem_threshold": 0.5}, {"auxiliary_weight": 0, "auxiliary_loss": {}}, {"loss": {"ohem": 1}}),
        ({"focal_gamma": 1}, {}, {"loss": {"focal": 1}}),
        ({"boundary_px": 5}, {}, {"loss": {"boundary": 1}}),
        ({"auxiliary_loss": LOVASZ}, {"auxiliary_weight": 0}, {}),
        ({"distill_from": "champion"}, {"distill_weight": 0}, {}),
        ({"distill_temperature": 2}, {}, {"distill_from": "champion"}),
        ({"momentum": 0.8}, {"optimizer": "adamw"}, {"optimizer": "sgd"}),
        ({"poly_power": 1}, {"scheduler": "cosine"}, {}),
        ({"backbone_lr_factor": 0.1}, {"freeze": ["backbone"]}, {"freeze": ["aspp"]}),
    ],
)
def test_what_does_nothing_is_told(
    idle: dict[str, Any], rest: dict[str, Any], used: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (key,) = idle
    warn(Model(), Training.model_validate({**idle, **used}))
    assert not caplog.messages
    warn(Model(), Training.model_validate({**idle, **rest}))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"training.{key}")
    assert " has no effect: " in caplog.messages[0]


def test_weights_of_a_backbone_that_others_fill_are_told(caplog: pytest.LogCaptureFixture) -> None:
    given = Model(backbone_weights="mine.safetensors")
    warn(given, Training())
    assert not caplog.messages
    for model in (given, Model()):
        warn(model, Training(init_from="champion"))
    (line,) = caplog.messages
    assert line == "model.backbone_weights has no effect: training.init_from gives the backbone's weights"


def test_a_phase_that_changes_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    crop = (256, 256)
    phases = (Phase(after=0.2, crop_px=crop), Phase(after=0.4, output_stride=8), Phase(after=0.6, crop_px=crop))
    warn(Model(), Training(phases=phases))
    warn(Model(output_stride=8), Training(phases=(Phase(after=0.5, output_stride=8),)))
    assert caplog.messages == [
        f"training.phases has no effect: the one after {after} changes neither crop nor output stride"
        for after in (0.6, 0.5)
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_set_nothing_in_vain(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = load_config(path)
        warn(config.model, config.training)
    assert not caplog.messages
