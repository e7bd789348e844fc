import json
from dataclasses import replace

import pytest
import torch

from roadseg.errors import ConfigError
from roadseg.model import Architecture, build


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 0),
        ("num_classes", 256),
        ("output_stride", 4),
        ("fusion", "attention"),
        ("head", "wide"),
        ("channels", 0),
        ("atrous_rates", ()),
        ("atrous_rates", (6, 0)),
        ("low_levels", ()),
        ("low_levels", (32, 4)),
        ("low_levels", (4, 8)),
        ("low_levels", (4, 4)),
        ("early_strides", (2,)),
        ("early_strides", (2, 3)),
        ("early_strides", (True, 2)),
        ("early_strides", (1.0, 2.0)),
        ("dropout", 1.0),
    ],
)
def test_wrong_values_name_their_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Architecture(**{"num_classes": 19, key: value})
    assert caught.value.where == f"model.{key}"
    assert repr(value) in str(caught.value) and caught.value.expected


def test_no_low_level_is_coarser_than_the_output_stride() -> None:
    with pytest.raises(ConfigError, match=r"none coarser than output_stride 8, such as \[8, 4\]"):
        Architecture(num_classes=19, output_stride=8, low_levels=(16, 4))


def test_a_network_that_was_trained_at_stride_16_may_end_at_8_with_the_same_levels() -> None:
    network = build(
        Architecture(num_classes=3, backbone="mobilenetv2_035", output_stride=8, channels=8, low_levels=(8, 4)), seed=0
    ).eval()
    assert network(torch.zeros(1, 3, 33, 64)).shape == (1, 3, 9, 16)


def test_low_level_that_the_backbone_lacks() -> None:
    with pytest.raises(ConfigError, match="no map at stride 3"):
        build(Architecture(num_classes=19, backbone="mobilenetv2_035", low_levels=(8, 3)), seed=0)


def test_json_round_trip() -> None:
    a = Architecture(
        num_classes=11,
        backbone="resnet18",
        output_stride=32,
        fusion="sknet",
        head="separable",
        channels=64,
        atrous_rates=(3, 6, 9),
        low_levels=(16, 4),
        auxiliary=True,
        dropout=0.0,
    )
    assert Architecture.from_json(json.loads(json.dumps(a.to_json()))) == a
    with_options = replace(a, backbone_options={"channels": [8, 16, 24, 32], "drop_path_rate": 0.1})
    assert Architecture.from_json(json.loads(json.dumps(with_options.to_json()))) == with_options != a
    assert hash(with_options) == hash(a)


def test_auxiliary_heads_stay_at_their_layers() -> None:
    assert [
        Architecture(num_classes=3, output_stride=8, early_strides=e).auxiliary_strides
        for e in ((2, 2), (2, 1), (1, 1))
    ] == [
        (8, 8),
        (4, 8),
        (2, 8),
    ]


@pytest.mark.parametrize("change", [{"num_classes": "19"}, {"extra": 1}, {"low_levels": 4}, {"channels": None}])
def test_json_of_another_form_is_refused(change: dict) -> None:
    with pytest.raises(ConfigError):
        Architecture.from_json(Architecture(num_classes=19).to_json() | change)
    shorter = Architecture(num_classes=19).to_json()
    del shorter["fusion"]
    with pytest.raises(ConfigError):
        Architecture.from_json(shorter)
