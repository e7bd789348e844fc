"""Which weights a training starts from, and what of the network is new."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save, save_file
from torch import nn

from roadseg.cli.flags import parse_flags
from roadseg.errors import ArchiveError, ConfigError
from roadseg.files import sha256_file
from roadseg.labels import LabelSet
from roadseg.model import Architecture, DeepLabV3Plus, build
from roadseg.release.archive import Release, load_release
from roadseg.train import checkpoint
from roadseg.train.initial_weights import Start, _advice, refuse_frozen_at_random, starting_network
from tests.conftest import RGB, THREE, write_release

A = Architecture(
    num_classes=3, backbone="test_efficientnet", channels=8, head="separable", atrous_rates=(1, 2), low_levels=(4,)
)
MEAN, STD = (10.0, 20.0, 30.0), (1.0, 2.0, 3.0)
OTHER_THREE = LabelSet("others", (*THREE.classes[:2], replace(THREE.classes[2], name="sign")))
FOUR = LabelSet("four", (*THREE.classes, replace(THREE.classes[0], name="sign", id=9, train_id=3)))


def start(a: Architecture = A, init: Release | None = None, labels: LabelSet = THREE, **given: Any) -> Start:
    options = {"weights": "none", "weights_from": "", "mean": MEAN, "std": STD, "seed": 5, **given}
    return starting_network(a, init=init, classes=labels.names, **options)


@pytest.fixture(scope="module")
def trained() -> DeepLabV3Plus:
    net = build(A, seed=1, mean=(7, 8, 9))
    net.train()(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    return net


@pytest.fixture(scope="module")
def release(trained: DeepLabV3Plus, tmp_path_factory: pytest.TempPathFactory) -> Release:
    path = tmp_path_factory.mktemp("release") / "model.tar.gz"
    return load_release(
        write_release(path, THREE, weights=save(trained.state_dict()), architecture=trained.architecture.to_json())
    )


def equal(net: nn.Module, other: nn.Module) -> set[str]:
    """Names of the tensors that both have with equal values."""
    state = other.state_dict()
    return {k for k, v in net.state_dict().items() if k in state and torch.equal(v, state[k])}


def test_from_nothing_it_is_a_function_of_the_seed() -> None:
    made = start()
    assert made.words == "none" and made.made_anew == ()
    assert equal(made.network, build(A, seed=5, mean=MEAN, std=STD)) == set(made.network.state_dict())
    assert "decoder.classifier.weight" not in equal(made.network, start(seed=6).network)


def test_a_backbones_file_is_named_by_its_digest(trained: DeepLabV3Plus, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_file(trained.backbone.state_dict(), path)
    made = start(weights=str(path))
    assert made.words == f"backbone weights {sha256_file(path)}" and made.made_anew == ()
    assert equal(made.network.backbone, trained.backbone) == set(trained.backbone.state_dict())
    assert made.network.mean.flatten().tolist() == list(MEAN)


def test_a_release_of_the_same_classes_is_taken_whole(trained: DeepLabV3Plus, release: Release) -> None:
    made = start(init=release)
    assert made.words == f"release {release.digest}" and made.made_anew == ()
    assert equal(made.network, trained) == set(trained.state_dict())  # its mean and std too
    assert made.network.mean.flatten().tolist() == [7, 8, 9]
    with_heads = start(replace(A, auxiliary=True), release)
    assert with_heads.made_anew == ("auxiliary_heads",)
    assert equal(with_heads.network, trained) == set(trained.state_dict())


@pytest.mark.parametrize(
    "labels",
    [
        FOUR,
        RGB,
        LabelSet(
            "turned", (replace(THREE.classes[0], train_id=1), replace(THREE.classes[1], train_id=0), *THREE.classes[2:])
        ),
    ],
)
def test_other_classes_get_a_classifier_of_their_own(
    labels: LabelSet, trained: DeepLabV3Plus, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    """Also as many, and the same in another order: no row is known to mean the same."""
    a = replace(A, num_classes=labels.num_classes, auxiliary=True)
    with caplog.at_level(logging.INFO, "roadseg"):
        made = start(a, release, labels)
    assert made.made_anew == ("decoder.classifier", "auxiliary_heads")
    new = {"decoder.classifier.weight", "decoder.classifier.bias"}
    assert new.isdisjoint(equal(made.network, trained) - {"decoder.classifier.bias"})  # biases start at 0 in both
    assert set(trained.state_dict()) - equal(made.network, trained) <= new
    scratch = build(a, seed=5)
    assert new <= equal(made.network, scratch)
    (line,) = caplog.messages
    assert line.startswith(f"release {release.digest[:12]} knows other classes (road, sky, car); made anew for ")
    assert line.endswith(f"{', '.join(labels.names)}: decoder.classifier, auxiliary_heads")


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 16},
        {"fusion": "concat"},
        {"head": "dense"},
        {"low_levels": (8, 4)},
        {"early_strides": (2, 1)},  # the map at stride 4 is another then
    ],
)
@pytest.mark.parametrize("labels", [THREE, FOUR])
def test_another_architecture_is_refused(change: dict[str, Any], labels: LabelSet, release: Release) -> None:
    with pytest.raises(ConfigError, match=f"release {release.digest[:12]} has another architecture") as caught:
        start(replace(A, num_classes=labels.num_classes, **change), release, labels)
    assert caught.value.where == "training.init_from"
    flags = {"channels": "8", "fusion": "skfusion", "head": "separable", "low-levels": "4", "early-strides": "2 2"}
    (key,) = (name.replace("_", "-") for name in change)
    advice = caught.value.todo.split(": ", 1)[1]
    assert advice == f"--model.{key} {flags[key]}"  # what differs, and nothing that is no key of the config
    m = parse_flags(None, advice.split(), "roadseg", "").model
    ((name, given),) = ((name, getattr(m, name)) for name in change)
    assert given == getattr(A, name)


def test_a_release_may_go_on_at_another_stride(
    trained: DeepLabV3Plus, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    assert A.output_stride == 16
    made = start(replace(A, output_stride=8, atrous_rates=tuple(2 * rate for rate in A.atrous_rates)), release)
    assert equal(made.network, trained) == set(trained.state_dict())
    assert caplog.messages == []  # as many pixels of the image apart as before


def test_other_rates_than_the_releases_are_warned_of(release: Release, caplog: pytest.LogCaptureFixture) -> None:
    theirs = " ".join(map(str, A.atrous_rates))
    start(replace(A, atrous_rates=(5, 7)), release)
    (line,) = caplog.messages
    flags = f"--model.atrous-rates {theirs} --model.output-stride 16 --model.early-strides 2 2"
    assert line.endswith(f"was trained with {flags}; here they are 5 7, 16, 2 2")
    with pytest.raises(ConfigError) as caught:  # who makes the tensors fit is told the rates too
        start(replace(A, channels=16, atrous_rates=(5, 7)), release)
    assert caught.value.todo.endswith(f"--model.channels 8 --model.atrous-rates {theirs}")


def test_other_early_strides_than_the_releases_are_warned_of(
    release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    start(replace(A, early_strides=(2, 1), low_levels=(2,)), release)
    (line,) = caplog.messages
    assert line.endswith(f"--model.early-strides 2 2; here they are {' '.join(map(str, A.atrous_rates))}, 16, 2 1")


def test_other_backbone_options_are_told_as_what_differs() -> None:
    made = tell_apart({"backbone_options": {"channels": [8, 16, 24, 32]}, "head": "dense"}, {"head": "dense"})
    assert made == "to go on with that release's: backbone_options: {} in the YAML's model section"
    made = tell_apart({}, {"backbone_options": {"drop_path_rate": 0.1}, "channels": 16})
    assert made.endswith('options: {"drop_path_rate": 0.1} in the YAML\'s model section --model.channels 16')


def tell_apart(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return _advice(replace(A, **ours).to_json(), replace(A, **theirs).to_json())


@pytest.mark.parametrize("frozen", [["decoder"], ["decoder", "batch_norm"]])
def test_what_is_new_may_not_be_frozen(release: Release, frozen: list[str]) -> None:
    made = start(replace(A, num_classes=4), release, FOUR)
    with pytest.raises(ConfigError, match=r"decoder, in which decoder\.classifier is new and random") as caught:
        refuse_frozen_at_random(made, frozen)
    assert caught.value.where == "training.freeze"
    refuse_frozen_at_random(made, ["backbone", "aspp", "batch_norm"])
    refuse_frozen_at_random(start(init=release), frozen)  # of its own classes


def test_parts_frozen_at_random_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    refuse_frozen_at_random(start(), ["backbone", "aspp"])
    assert caplog.messages == [
        "training.freeze: backbone, aspp keeps random weights, as nothing is given to start from"
    ]


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepLabV3Plus]:
    """A checkpoint of a training with auxiliary heads, and its averaged network."""
    folder = tmp_path_factory.mktemp("checkpoints")
    net, average = (build(replace(A, auxiliary=True), seed=s, mean=(7, 8, 9)) for s in (1, 2))
    of = checkpoint.Origin(THREE.names, average.architecture.to_json(), "Some data: research use.")
    checkpoint.save(folder, 12, net, average, torch.optim.AdamW(net.parameters()), of)
    return folder / "step-00000012.safetensors", average


@pytest.mark.parametrize(
    ("change", "labels", "anew"),
    [
        ({"auxiliary": True}, THREE, ()),
        ({}, THREE, ()),
        ({"auxiliary": True}, FOUR, ("decoder.classifier", "auxiliary_heads")),
        ({}, FOUR, ("decoder.classifier",)),
        ({}, OTHER_THREE, ("decoder.classifier",)),  # as many, of another meaning
    ],
)
def test_a_checkpoints_average_is_taken(
    checkpointed: tuple[Path, DeepLabV3Plus], change: dict[str, Any], labels: LabelSet, anew: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, average = checkpointed
    change = {"num_classes": labels.num_classes, **change}
    with caplog.at_level(logging.INFO, "roadseg"):
        made = start(replace(A, **change), labels=labels, weights_from=str(path))
    assert made.terms == "Some data: research use."
    assert made.words == f"checkpoint {sha256_file(path)}" and made.made_anew == anew and not made.random
    state = made.network.state_dict()
    new = {k for k in state if k.startswith(tuple(part + "." for part in anew))}
    assert set(state) - equal(made.network, average) <= new
    assert new <= equal(made.network, build(replace(A, **change), seed=5))
    assert made.network.mean.flatten().tolist() == [7, 8, 9]
    known = f"checkpoint step-00000012.safetensors knows other classes ({', '.join(THREE.names)}); made anew for "
    assert caplog.messages == ([f"{known}{', '.join(labels.names)}: {', '.join(anew)}"] if anew else [])


def test_a_checkpoint_of_another_network_or_a_damaged_one_is_refused(
    checkpointed: tuple[Path, DeepLabV3Plus], tmp_path: Path
) -> None:
    path, _ = checkpointed
    with pytest.raises(
        ConfigError, match="has another architecture .*go on with that checkpoint's: --model.channels 8"
    ):
        start(replace(A, channels=16), weights_from=str(path))
    alone = tmp_path / "best.safetensors"  # under a name of its own, as checkpoints are pruned
    alone.write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="is damaged or lacks its .json"):
        start(weights_from=str(alone))
    alone.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    assert start(weights_from=str(alone)).words.startswith("checkpoint ")
    with alone.open("r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([last[0] ^ 1]))
    with pytest.raises(ConfigError, match="its SHA-256 differs from what was saved") as caught:
        start(weights_from=str(alone))
    assert caught.value.where == "training.weights_from" and "name the one before" in caught.value.todo
    alone.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="is damaged"):
        start(weights_from=str(alone))


def test_rates_that_a_checkpoint_was_trained_with_are_warned_of(
    checkpointed: tuple[Path, DeepLabV3Plus], caplog: pytest.LogCaptureFixture
) -> None:
    start(replace(A, atrous_rates=(5, 7)), weights_from=str(checkpointed[0]))
    assert (
        "--model.atrous-rates 1 2 --model.output-stride 16 --model.early-strides 2 2; here they are 5 7" in caplog.text
    )


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path: Path) -> None:
    net, average = build(A, seed=1), build(A, seed=2)
    checkpoint.save(tmp_path, 3, net, average, torch.optim.AdamW(net.parameters()))
    with pytest.raises(ConfigError, match="does not say what its network is of.*start from its release"):
        start(weights_from=str(tmp_path / "step-00000003.safetensors"))


def test_bare_weights_of_our_own_are_told_apart_from_a_release(tmp_path: Path) -> None:
    save_file(build(A, seed=1).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="bare weights of a roadseg network.*model.tar.gz, as training.init_from"):
        start(weights_from=str(tmp_path / "weights.safetensors"))


def test_an_archive_as_weights_is_told_where_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "model.tar.gz"
    path.write_bytes(b"\x1f\x8b")
    with pytest.raises(ConfigError, match="is an archive.*give a release as training.init_from"):
        start(weights_from=str(path))


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    broken = load_release(write_release(tmp_path / "model.tar.gz", THREE, weights=b"\x80\x04N."))
    with pytest.raises(ArchiveError, match="weights.safetensors is not readable"):
        start(init=broken)


def test_weights_of_another_project(tmp_path: Path) -> None:
    """VainF's names around torchvision's ResNet-18; what they compute is tested beside the translation."""
    a = Architecture(
        num_classes=3,
        backbone="resnet18",
        output_stride=16,
        fusion="concat",
        head="dense",
        channels=48,
        atrous_rates=(6, 12, 18),
        low_levels=(4,),
        auxiliary=True,
    )
    ours = build(a, seed=8)
    state = {f"backbone.{k}": v for k, v in torchvision.models.resnet18().state_dict().items() if "fc." not in k}
    for key, value in ours.state_dict().items():
        for own, theirs in (
            ("aspp.branches.", "classifier.aspp.convs."),
            ("aspp.fusion.project.", "classifier.aspp.project."),
            ("decoder.laterals.0.", "classifier.project."),
            ("decoder.fusions.0.project.", "classifier.classifier."),
            ("decoder.classifier.", "classifier.classifier.3."),
        ):
            if key.startswith(own):
                state[theirs + key[len(own) :]] = value
    state["classifier.aspp.convs.4.1.weight"] = torch.zeros(48, 512, 1, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"classifier.aspp.convs.4.2.{name}"] = torch.ones(48)
    path = tmp_path / "vainf.safetensors"
    save_file(state, path)
    made = start(a, weights_from=str(path))
    assert made.words == f"VainF/DeepLabV3Plus-Pytorch weights {sha256_file(path)}"
    assert made.made_anew == ("auxiliary_heads", "decoder.refinements.0")
    refuse_frozen_at_random(made, ["backbone", "aspp", "decoder"])  # what the decoder has beside hands on its input
    assert {"decoder.classifier.weight", "aspp.fusion.project.0.weight"} <= equal(made.network, ours)
    assert made.network.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
