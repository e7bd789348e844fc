from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from roadseg.errors import ConfigError
from roadseg.model.backbone import create_backbone, level, load_backbone_weights

NAME = "mobilenetv2_035"


@pytest.fixture(scope="module")
def whole_model() -> torch.nn.Module:
    torch.manual_seed(11)
    return timm.create_model(NAME, pretrained=False)


@pytest.fixture
def weights_file(whole_model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(whole_model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "output_stride", "words"),
    [
        ("mobilenetv2_10", 16, ["no model 'mobilenetv2_10'", "mobilenetv2_100"]),
        ("vit_tiny_patch16_224", 16, ["vit_tiny_patch16_224", "output stride 16"]),
        ("vit_tiny_patch16_224", 32, ["strides 16, 16"]),
        ("swin_tiny_patch4_window7_224", 32, ["channels-first"]),
        ("vgg11", 16, ["vgg11", "AssertionError"]),
        ("dla46_c", 32, ["dla46_c", "multiples of its stride"]),
    ],
)
def test_unfit_backbones_are_named(name: str, output_stride: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        create_backbone(name, output_stride)
    assert caught.value.where == "model.backbone"
    for word in words:
        assert word in str(caught.value)
    assert "early_strides" not in str(caught.value)  # which would not help any of these


@pytest.mark.parametrize(("output_stride", "early"), [(16, "1 2 or 2 1"), (8, "1 1")])
def test_a_backbone_that_stands_at_32_alone_is_told_how_it_may_be_finer(output_stride: int, early: str) -> None:
    with pytest.raises(ConfigError, match=f"with model.early_strides {early} it has maps of that stride, or choose"):
        create_backbone("hgnetv2_b0", output_stride)


@pytest.mark.parametrize(("output_stride", "indices"), [(8, [0, 1, 2]), (16, [0, 1, 2]), (32, [0, 1, 2])])
def test_levels_are_found_by_stride(output_stride: int, indices: list[int]) -> None:
    backbone = create_backbone(NAME, output_stride).eval()
    assert [level(backbone, stride, NAME) for stride in (2, 4, 8)] == indices
    with torch.inference_mode():
        maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [64 // maps[i].shape[-1] for i in indices] == [2, 4, 8]
    assert 64 // maps[-1].shape[-1] == output_stride


def test_missing_level_is_named() -> None:
    with pytest.raises(ConfigError, match="no map at stride 2.*one of 4, 8, 16"):
        level(create_backbone("convnext_atto", 32), 2, "convnext_atto")


@pytest.mark.parametrize(
    ("name", "early_strides", "changed"),
    [
        ("mobilenetv2_035", (1, 2), ["conv_stem"]),
        ("mobilenetv2_035", (2, 1), ["blocks.1.0.conv_dw"]),
        ("mobilenetv2_035", (1, 1), ["conv_stem", "blocks.1.0.conv_dw"]),
        ("resnet18", (2, 1), ["maxpool"]),
        ("regnety_002", (2, 1), ["s1.b1.conv2.conv", "s1.b1.downsample.conv"]),
        ("hgnetv2_b0", (2, 1), ["stem.stem3.conv"]),  # its first map is of stride 4: nothing lies between the two
    ],
)
def test_an_early_halving_left_out_makes_every_later_map_finer(
    name: str, early_strides: tuple[int, int], changed: list[str]
) -> None:
    """The same layers and weights; only those that halved don't any more."""
    finer = 4 // (early_strides[0] * early_strides[1])
    usual, fine = create_backbone(name, 32).eval(), create_backbone(name, 32 // finer, None, early_strides).eval()
    assert [
        k for k, m in fine.named_modules() if getattr(m, "stride", 0) != getattr(usual.get_submodule(k), "stride", 0)
    ] == (changed)
    fine.load_state_dict(usual.state_dict())
    strides, expected = fine.feature_info.reduction(), usual.feature_info.reduction()
    assert strides == [s // (2 // early_strides[0] if s == 2 else finer) for s in expected]
    assert fine.feature_info.channels() == usual.feature_info.channels()
    with torch.inference_mode():
        for side in (64, 75):
            maps = fine(torch.zeros(1, 3, side, side))
            assert [m.shape[-1] for m in maps] == [-(-side // s) for s in strides]
    assert [level(fine, s, name) for s in strides[1:]] == [level(usual, s, name) for s in expected[1:]]


@pytest.mark.parametrize(
    ("name", "output_stride", "words"),
    [
        (
            "convnext_atto",
            16,
            "2 1 can't be had of convnext_atto: what halves the image there is more than convolutions",
        ),
        ("nf_regnet_b0", 8, "2 1 can't be had of nf_regnet_b0: what halves"),  # by an average over two pixels, too
        ("mobilenetv2_035", 32, "2 1: the coarsest map of mobilenetv2_035 would then be finer than output stride 32"),
    ],
)
def test_early_strides_that_a_backbone_can_not_have(name: str, output_stride: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create_backbone(name, output_stride, None, (2, 1))
    assert caught.value.where == "model.early_strides" and words in str(caught.value)


def test_only_feature_layers_are_built(whole_model: torch.nn.Module) -> None:
    names = set(create_backbone(NAME, 16).state_dict())
    assert names < set(whole_model.state_dict())
    assert not any(name.startswith(("classifier", "conv_head")) for name in names)


def test_local_weights_with_a_classifier_fill_the_backbone(weights_file: Path, whole_model: torch.nn.Module) -> None:
    backbone = create_backbone(NAME, 16)
    load_backbone_weights(backbone, weights_file)
    expected = whole_model.state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_of_a_model_whose_layers_timm_renames(tmp_path: Path) -> None:
    source = timm.create_model("convnext_atto", pretrained=False)
    save_file(source.state_dict(), tmp_path / "convnext.safetensors")
    backbone = create_backbone("convnext_atto", 16)
    load_backbone_weights(backbone, tmp_path / "convnext.safetensors")
    expected = source.get_parameter("stages.2.blocks.1.mlp.fc1.weight")
    assert torch.equal(backbone.get_parameter("stages_2.blocks.1.mlp.fc1.weight"), expected)


def test_none_leaves_the_weights() -> None:
    backbone = create_backbone(NAME, 16)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    load_backbone_weights(backbone, "none")
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(weights_file: Path, tmp_path: Path) -> None:
    state = load_file(weights_file)
    del state["blocks.0.0.bn1.weight"]
    state["blocks.1.0.bn1.weight"] = torch.zeros(3)
    state["somebody.else"] = torch.zeros(1)
    save_file(state, tmp_path / "broken.safetensors")
    backbone = create_backbone(NAME, 16)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_backbone_weights(backbone, tmp_path / "broken.safetensors")
    for words in (
        "1 missing (blocks.0.0.bn1.weight)",
        "1 unexpected (somebody.else)",
        "1 of another shape (blocks.1.0.bn1.weight [3] for [",
        "broken.safetensors",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_pickles_and_junk_are_refused(tmp_path: Path) -> None:
    backbone = create_backbone(NAME, 16)
    pickle = tmp_path / "weights.pth"
    torch.save(backbone.state_dict(), pickle)
    with pytest.raises(ConfigError, match="pickles are never read"):
        load_backbone_weights(backbone, pickle)
    disguised = pickle.rename(tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        load_backbone_weights(backbone, disguised)
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        load_backbone_weights(backbone, tmp_path / "absent.safetensors")


def test_without_a_network_the_file_and_the_key_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_backbone_weights(create_backbone("mobilenetv2_100", 16), "imagenet")
    for words in ("model.safetensors", "timm/mobilenetv2_100.ra_in1k", "model.backbone_weights: PATH"):
        assert words in str(caught.value)


def test_imagenet_asks_timm_for_safetensors(monkeypatch: pytest.MonkeyPatch, weights_file: Path) -> None:
    asked = []

    def hub(model_id: str, filename: str) -> dict[str, torch.Tensor]:
        asked.append((model_id, filename))
        return load_file(weights_file)

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", hub)
    backbone = create_backbone(NAME, 16)
    backbone.pretrained_cfg["hf_hub_id"] = "timm/some.weights"
    load_backbone_weights(backbone, "imagenet")
    assert asked == [("timm/some.weights", "model.safetensors")]
    assert torch.equal(backbone.get_parameter("conv_stem.weight"), load_file(weights_file)["conv_stem.weight"])


def test_models_without_published_weights_are_named() -> None:
    backbone = create_backbone("mobilenetv2_075", 16)
    backbone.pretrained_cfg["hf_hub_id"] = None
    with pytest.raises(ConfigError, match="timm names no pretrained weights for mobilenetv2_075"):
        load_backbone_weights(backbone, "imagenet")


def test_arguments_of_timms_model_change_its_layers() -> None:
    narrow = create_backbone("resnet18", 16, {"channels": [16, 24, 32, 48], "layers": [1, 1, 1, 1]})
    assert narrow.feature_info.channels() == [64, 16, 24, 32, 48]
    maps = narrow(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps][-2:] == [(32, 4, 6), (48, 4, 6)]
    assert sum(p.numel() for p in narrow.parameters()) < 0.05 * 11e6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chanels": [1]}, "timm's resnet18 can't be made with chanels=\\[1\\] at output stride 16 .TypeError"),
        ({"channels": [8]}, "timm's resnet18 can't be made with channels=\\[8\\]"),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path can't be set here"),
        ({"features_only": False, "in_chans": 1}, "features_only, in_chans can't be set here"),
    ],
)
def test_arguments_that_it_does_not_take_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        create_backbone("resnet18", 16, arguments)
    assert caught.value.where == "model.backbone_options"


def test_the_look_at_sizes_draws_nothing() -> None:
    torch.manual_seed(5)
    one = create_backbone("mobilenetv2_050", 32).state_dict()
    torch.manual_seed(5)
    again = create_backbone("mobilenetv2_050", 32).state_dict()  # what was found the first time is kept
    assert all(torch.equal(one[key], again[key]) for key in one)
