"""Weights of other projects: every part that is taken computes here what it does there."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.model import Architecture, DeepLabV3Plus, build
from roadseg.weights.foreign import LoadedWeights, load_foreign
from tests.weights.foreign_forms import MOBILENET, RATES, RESNET, SMP, WIDTH, ForeignASPP, VainF, conv_bn


def lived_in(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that no two layers share, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
            m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                m.weight.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.bias.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
    return net.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def saved(net: nn.Module, folder: Path) -> Path:
    path = folder / "foreign.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return path


def loaded(net: nn.Module, a: Architecture, folder: Path) -> tuple[DeepLabV3Plus, LoadedWeights]:
    ours = build(a, seed=3, mean=(1, 2, 3), std=(4, 5, 6))
    taken = load_foreign(ours, saved(net, folder))
    return ours.eval(), taken


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- VainF ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), [("", "dense"), ("body", "separable")])
def test_vainf_as_a_whole(kind: str, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = lived_in(VainF(kind))
    ours, taken = loaded(theirs, Architecture(**{**vars(RESNET), "head": head}), tmp_path)
    image = torch.randint(0, 256, (2, 3, 96, 128), generator=torch.Generator().manual_seed(1)).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        expected = theirs((image / 255 - mean) / std)
        assert expected.std() > 0.05
        same(ours(image), expected)
        assert ours(image).argmax(1).equal(expected.argmax(1))
    assert taken.made_anew == ("decoder.refinements.0",)
    assert taken.parts[:3] == ("aspp.branches.0", "aspp.branches.1", "aspp.branches.2")
    assert {"backbone", "decoder.classifier", "decoder.fusions.0", "aspp.pooling"} <= set(taken.parts)


def test_the_layer_that_vainf_lacks_hands_on_its_map_in_training_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, _ = loaded(lived_in(VainF("")), RESNET, tmp_path)
    project, refine = ours.decoder.fusions[0].project, ours.decoder.refinements[0]
    scale, shift = project[1].weight, project[1].bias
    before = normal(4, WIDTH, 48, 48) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    with torch.no_grad():
        handed = before.relu()
        torch.testing.assert_close(refine.eval()(handed), handed, rtol=1e-5, atol=1e-5)
        after = copy.deepcopy(refine).train()(handed)
    assert (after - handed).abs().mean() < 0.03 * handed.mean()


def test_vainf_mobilenet_names(tmp_path: Path) -> None:
    """Its backbone is torchvision's in two parts; what pads elsewhere has the same weights."""
    torch.manual_seed(0)
    features = torchvision.models.mobilenet_v2().features
    theirs = VainF("body")
    theirs.backbone = nn.ModuleDict({"low_level_features": features[:4], "high_level_features": features[4:-1]})
    theirs.classifier["project"] = nn.Sequential(*conv_bn(24, 48))
    theirs.classifier["aspp"] = ForeignASPP(320, "body")
    ours, taken = loaded(lived_in(theirs), MOBILENET, tmp_path)
    check_mobilenet(ours, features)
    assert "backbone" in taken.parts and "backbone.low_level_features.3.conv.2.weight" in theirs.state_dict()


def check_mobilenet(ours: DeepLabV3Plus, features: nn.Sequential) -> None:
    image = normal(1, 3, 64, 96)
    with torch.inference_mode():
        maps, x = ours.backbone(image), image
        for i, m in enumerate(features.eval()[:18]):
            x = m(x)
            for index, at in enumerate((1, 3, 6, 13, 17)):
                if i == at:
                    same(maps[index], x)


# ---- segmentation_models.pytorch ------------------------------------------------------------


def check_heads(ours: DeepLabV3Plus, theirs: SMP, low: int, high: int) -> None:
    with torch.inference_mode():
        if high:
            same(ours.aspp(normal(2, high, 5, 7)), theirs.decoder["aspp"][0](normal(2, high, 5, 7)))
        low_map, high_map = normal(2, low, 9, 11), normal(2, WIDTH, 9, 11)
        joined = torch.cat([high_map, theirs.decoder["block1"](low_map)], 1)
        expected = theirs.segmentation_head(theirs.decoder["block2"](joined))
        same(ours.decoder(high_map, [low_map]), expected)


@pytest.mark.parametrize(("kind", "head"), [("pair", "separable"), ("", "dense")])
def test_smp_with_a_timm_encoder(kind: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    a = Architecture(
        num_classes=5,
        backbone="mobilenetv2_035",
        output_stride=16,
        fusion="concat",
        head=head,
        channels=WIDTH,
        atrous_rates=RATES,
        low_levels=(4,),
        auxiliary=True,
    )
    backbone = build(a, seed=0).backbone
    theirs = lived_in(SMP(nn.ModuleDict({"model": backbone}), 8, 112, kind))
    with caplog.at_level(logging.INFO, "roadseg"):
        ours, taken = loaded(theirs, a, tmp_path)
    check_heads(ours, theirs, 8, 112)
    with torch.inference_mode():
        for x, y in zip(ours.backbone(normal(1, 3, 64, 64)), backbone(normal(1, 3, 64, 64)), strict=True):
            assert torch.equal(x, y)
    assert taken.made_anew == ("auxiliary_heads", "decoder.refinements.0")
    assert len(caplog.messages) == 1
    assert "not loaded auxiliary_heads (they have none), decoder.refinements.0" in caplog.text
    assert "separable convolution between ASPP and decoder has no place here" in caplog.text
    of_classes = "the file does not say which 5 classes its classifier tells apart: taken to be the data's, in the same"
    assert of_classes in caplog.text
    assert [round(v, 2) for v in ours.mean.flatten().tolist()] == [123.68, 116.28, 103.53]


def test_smp_with_torchvisions_mobilenet(tmp_path: Path) -> None:
    """Its last layer, 1280 channels of the classifier, is what its ASPP reads."""
    torch.manual_seed(0)
    features = torchvision.models.mobilenet_v2().features
    theirs = lived_in(SMP(nn.ModuleDict({"features": features}), 24, 1280))
    before = build(MOBILENET, seed=3).state_dict()
    ours, taken = loaded(theirs, MOBILENET, tmp_path)
    check_mobilenet(ours, features)
    check_heads(ours, theirs, 24, 0)
    aspp = ("aspp.branches.0", "aspp.branches.1", "aspp.branches.2", "aspp.branches.3", "aspp.fusion", "aspp.pooling")
    assert taken.made_anew == (*aspp, "decoder.refinements.0")
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items() if k.startswith("aspp."))


def test_real_smp(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    for encoder, a in (
        (
            "tu-mobilenetv2_100",
            Architecture(
                num_classes=5,
                backbone="mobilenetv2_100",
                output_stride=16,
                fusion="concat",
                head="separable",
                channels=256,
                atrous_rates=(12, 24, 36),
                low_levels=(4,),
            ),
        ),
        (
            "resnet18",
            Architecture(
                num_classes=5,
                backbone="resnet18",
                output_stride=16,
                fusion="concat",
                head="separable",
                channels=256,
                atrous_rates=(12, 24, 36),
                low_levels=(4,),
            ),
        ),
    ):
        torch.manual_seed(0)
        theirs = lived_in(smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=5))
        ours, taken = loaded(theirs, a, tmp_path)
        maps, expected = ours.backbone(normal(1, 3, 64, 64)), theirs.encoder(normal(1, 3, 64, 64))[1:]
        count = 5 if encoder.startswith("tu-") else 4  # their ResNets dilate the last stage's first block, too
        for x, y in list(zip(maps, expected, strict=True))[:count]:
            same(x, y)
        high = maps[-1].shape[1]
        with torch.inference_mode():
            same(ours.aspp(normal(1, high, 5, 7)), theirs.decoder.aspp[0](normal(1, high, 5, 7)))
        assert taken.made_anew == ("decoder.refinements.0",)


# ---- refusals -------------------------------------------------------------------------------


def test_another_number_of_classes_makes_the_classifier_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    theirs = VainF("", classes=19)
    with caplog.at_level(logging.INFO, "roadseg"):
        ours, taken = loaded(theirs, RESNET, tmp_path)
    assert taken.made_anew == ("decoder.classifier", "decoder.refinements.0")
    assert torch.equal(ours.decoder.classifier.weight, build(RESNET, seed=3).decoder.classifier.weight)
    assert torch.equal(ours.decoder.laterals[0][0].weight, theirs.classifier["project"][0].weight)
    assert "decoder.classifier (19 classes there, 5 here)" in caplog.text and "tells apart" not in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "resnet34"}, "backbone: resnet18"),
        ({"fusion": "skfusion"}, "fusion: concat"),
        ({"fusion": "dense"}, "fusion: concat"),
        ({"head": "separable"}, "head: dense"),
        ({"channels": 32}, "channels: 64"),
        ({"low_levels": (8, 4)}, "low_levels: [4]"),
        ({"atrous_rates": (6, 12)}, "atrous_rates: the three that it was trained with"),
        ({"backbone": "mobilenetv2_035", "channels": 8}, "backbone: resnet18, channels: 64"),
    ],
)
def test_another_model_section_is_refused_and_the_right_one_named(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = saved(VainF("").eval(), tmp_path)
    ours = build(Architecture(**{**vars(RESNET), **change}), seed=3)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        load_foreign(ours, path)
    assert (
        caught.value.where == "training.weights_from"
        and caught.value.todo == f"set in the model section {words}"
        or (words in caught.value.todo and "atrous" in words)
    )
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_names_inside_a_trainers_module(tmp_path: Path) -> None:
    theirs = nn.ModuleDict({"model": VainF("")})
    theirs.register_buffer("std", torch.ones(3))
    ours = build(RESNET, seed=3)
    assert "backbone" in load_foreign(ours, saved(theirs, tmp_path)).parts
    assert torch.equal(ours.backbone.conv1.weight, theirs["model"].backbone["conv1"].weight)


def test_files_of_nothing_known_are_refused(tmp_path: Path) -> None:
    ours = build(RESNET, seed=0)
    path = saved(torchvision.models.resnet18(), tmp_path)
    with pytest.raises(ConfigError, match=r"its tensors begin with bn1, conv1, fc, .*; expected a DeepLabv3\+ of seg"):
        load_foreign(ours, path)
    strange = saved(SMP(nn.ModuleDict({"_conv_stem": nn.Conv2d(3, 8, 3)}), 8, 8), tmp_path)
    with pytest.raises(
        ConfigError, match="the encoder of .*, a segmentation_models.pytorch, is none of timm's.*; leave it out"
    ):
        load_foreign(ours, strange)
    state = VainF("").state_dict()
    del state["classifier.aspp.convs.4.2.running_var"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match="lacks the tensor 'classifier.aspp.convs.4.2.running_var'.*; fetch it again"):
        load_foreign(ours, tmp_path / "part.safetensors")
    pickle = tmp_path / "model.pth"
    torch.save(state, pickle)
    with pytest.raises(ConfigError, match="roadseg convert-checkpoint .*model.pth --out .*model.safetensors"):
        load_foreign(ours, pickle)
    with pytest.raises(ConfigError, match="can't be read as safetensors .*; fetch it again"):
        load_foreign(ours, pickle.rename(tmp_path / "lie.safetensors"))
    for folder in (tmp_path, tmp_path / "folder.safetensors"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=f"{folder} is a folder"):
            load_foreign(ours, folder)


def test_weights_of_mmsegmentation_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"decode_head.conv_seg.weight": torch.zeros(5, 8, 1, 1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(ConfigError) as e:
        load_foreign(build(MOBILENET, seed=0), tmp_path / "theirs.safetensors")
    assert "mmsegmentation" in e.value.found and e.value.where == "training.weights_from"
