"""Files whose tensors are of no form or of no values that can be translated, and what is said of their encoders."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.model import Architecture, build
from roadseg.weights.foreign import load_foreign
from roadseg.weights.foreign_names import _torchvision_backbone
from tests.weights.foreign_forms import RESNET, SMP, WIDTH, VainF


def refused(state: dict[str, Tensor], a: Architecture, folder: Path) -> ConfigError:
    """What is said of a file of `state`; the network keeps its values."""
    path = folder / "wrong.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    ours = build(a, seed=3)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_foreign(ours, path)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert caught.value.where == "training.weights_from" and caught.value.todo
    return caught.value


ASPP, LAST = "classifier.aspp.convs", "classifier.classifier"


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        ("", f"{ASPP}.4.2.running_var", (3,)),
        ("", f"{ASPP}.4.1.weight", (WIDTH,)),
        ("", f"{ASPP}.1.0.weight", ()),
        ("", f"{ASPP}.1.0.weight", (WIDTH,)),
        ("", f"{ASPP}.0.1.bias", ()),
        ("", f"{ASPP}.0.1.num_batches_tracked", (2,)),
        ("", "classifier.project.1.running_mean", (48, 1)),
        ("", f"{LAST}.1.bias", (7,)),
        ("", f"{LAST}.1.weight", ()),
        ("", f"{LAST}.3.weight", ()),
        ("", f"{LAST}.3.bias", (1,)),
        ("body", f"{LAST}.0.body.0.weight", (3, 1, 3, 3)),
        ("body", f"{LAST}.0.body.1.weight", (WIDTH, 48 + WIDTH)),
        ("body", f"{LAST}.0.body.1.weight", (WIDTH, 48 + WIDTH, 2, 2)),
    ],
)
def test_tensors_of_another_rank_or_length_are_named(
    kind: str, key: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = VainF(kind).state_dict()
    state[key] = torch.zeros(shape, dtype=state[key].dtype)
    error = refused(state, Architecture(**{**vars(RESNET), "head": "separable" if kind else "dense"}), tmp_path)
    near = {key, key.replace("body.0", "body.1")}  # of two that don't go together either may be the wrong one
    assert any(name in error.found for name in near) and "has the shape [" in error.found


def test_a_norm_of_another_length_than_its_convolution_is_named(tmp_path: Path) -> None:
    state = VainF("").state_dict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"{ASPP}.4.2.{name}"] = torch.ones(3)
    assert f"the tensor {ASPP}.4.2.weight has the shape [3]" in str(refused(state, RESNET, tmp_path))


def test_a_separable_pair_that_does_not_go_together_in_smp(tmp_path: Path) -> None:
    """Its decoder's is made dense where the ASPP is."""
    backbone = build(RESNET, seed=0).backbone
    state = SMP(nn.ModuleDict({"model": backbone}), 64, 512, "").state_dict()
    state["decoder.block2.0.1.weight"] = torch.zeros(WIDTH, 9, 1, 1)
    assert "the tensor decoder.block2.0.1.weight has the shape [64, 9, 1, 1]" in str(refused(state, RESNET, tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("backbone.layer2.0.conv1.weight", float("nan"), "holds NaN or infinity"),
        (f"{LAST}.3.bias", float("-inf"), "holds NaN or infinity"),
        ("backbone.bn1.running_var", -1e-3, "holds a negative variance"),
        (f"{ASPP}.4.2.running_var", -1.0, "holds a negative variance"),
    ],
)
def test_values_that_no_training_leaves_are_refused(key: str, value: float, words: str, tmp_path: Path) -> None:
    state = VainF("").state_dict()
    state[key].view(-1)[-1] = value
    assert refused(state, RESNET, tmp_path).found == f"the tensor {key} {words}"


def test_numbers_that_become_infinite_are_refused(tmp_path: Path) -> None:
    state = VainF("").state_dict()
    state[f"{LAST}.1.weight"][:] = 3e38  # its square is a variance
    assert "the tensor decoder.refinements.0" in refused(state, RESNET, tmp_path).found


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    state = {k: v.to(torch.int32) for k, v in VainF("").state_dict().items()}
    assert "is torch.int32" in refused(state, RESNET, tmp_path).found
    halves = {k: v.half() if v.is_floating_point() else v for k, v in VainF("").state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    assert "backbone" in load_foreign(build(RESNET, seed=0), tmp_path / "half.safetensors").parts


def with_encoder(name: str, **options: int) -> dict[str, Tensor]:
    encoder = timm.create_model(name, num_classes=0, **options)
    return SMP(encoder, 64, 512).state_dict()


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("resnet26", ""),
        ("resnext50_32x4d", ""),
        ("seresnet18", ""),
        ("skresnet18", ""),
        ("resnet18d", ""),
        ("resnet34", "resnet34"),
        ("resnet50", "resnet50"),
        ("resnet50c", "resnet50c"),
        ("mobilenetv2_100", None),
    ],
)
def test_a_resnet_is_named_only_if_it_is_one(name: str, guess: str | None) -> None:
    encoder = timm.create_model(name, num_classes=0).state_dict()
    assert _torchvision_backbone(encoder)[0] == guess


def test_advice_on_the_encoder_does_not_go_in_circles(tmp_path: Path) -> None:
    a = Architecture(**{**vars(RESNET), "head": "separable"})
    error = refused(with_encoder("skresnet18"), a, tmp_path)
    told = "backbone: the timm model that it was trained with, which is not resnet18"
    assert error.todo == f"set in the model section {told}"
    state = with_encoder("resnet18")
    state["encoder.layer4.0.conv1.weight"] = torch.zeros(512, 128, 3, 3)
    error = refused(state, a, tmp_path)
    assert "is not as timm's resnet18 (backbone.layer4.0.conv1.weight differs)" in error.found
    assert "backbone: resnet18" not in error.todo and error.expected.startswith("MobileNetV2, a ResNet")
    other = refused(state, Architecture(**{**vars(a), "backbone": "resnet34"}), tmp_path)
    assert other.todo == "set in the model section backbone: resnet18"
