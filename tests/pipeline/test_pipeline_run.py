"""The whole way on micro.yaml: what is made, what is made again, what is refused."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from roadseg.cli.main import main
from roadseg.config.sections import Config, load_config
from roadseg.data.manifest import HOLDOUT
from roadseg.data.shards.index import Shards
from roadseg.errors import Busy, ConfigError, DataError, GateRefused, Interrupted, StoreError, UsageError
from roadseg.files import lock, read_json, sha256_file
from roadseg.pipeline.context import Context
from roadseg.pipeline.run import Stage, evaluate_release, run, run_folder
from roadseg.pipeline.stages import train_key
from roadseg.pipeline.workspace import Workspace, leftovers
from roadseg.push.stage import promote_by_hand
from roadseg.release.archive import load_release
from roadseg.release.store.resolve import find_release, store_of
from roadseg.train.checks import preflight as ahead
from roadseg.train.checks.preflight import ANY_CLASSES, refuse_impossible_training, refuse_unexportable
from roadseg.train.distributed.environment import ALONE, Cluster
from roadseg.train.inputs import Inputs
from roadseg.train.recipe import Recipe, recipe_of
from roadseg.weights.foreign import LoadedWeights
from tests.conftest import MICRO, Micro

LATER = {"push": {"min_gain": 0.9}, "training": {"seed": 5}}  # no six steps gain 0.9


def config_of(**sections: dict[str, Any]) -> Config:
    return load_config(MICRO, sections)


def made(workspace: Path, stage: str) -> set[str]:
    return {p.name for p in (workspace / "stages" / stage).iterdir()}


# ---- before the data ------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        pytest.param({"training": {"device": "cuda"}}, "training.device: cuda", marks=no_gpu),
        pytest.param({"training": {"device": "cuda", "gpus": 2}}, "training.gpus: 2 GPUs", marks=no_gpu),
        ({"training": {"crop_px": [8, 8]}}, "one cell of the map at output stride 16"),
        ({"training": {"batch_size": 1}}, "statistics from one image"),
        ({"training": {"gpus": 2, "batch_size": 3}}, "3 samples can't be shared evenly by 2 processes"),
        ({"training": {"steps": 20, "patience": 20}}, "a run of 20 steps never ends early"),
        (
            {"training": {"phases": [{"after": 0.05, "crop_px": [32, 96]}]}},
            "first phase has none of the 6 steps",
        ),
        ({"training": {"freeze": ["backbone", "aspp", "decoder"]}}, "training.freeze: backbone, aspp, decoder are all"),
        ({"training": {"frames_on_gpu": "always"}}, "training.frames_on_gpu: always, but training runs on cpu"),
        ({"training": {"augment_device": "cuda"}}, "training.augment_device: cuda, but training runs on cpu"),
        ({"training": {"gpus": 2, "batch_size": 6, "augment": {"class_mix": 0.5}}}, "set 4 or 8, or training.augment"),
        ({"training": {"phases": [{"after": 0.5, "output_stride": 32}]}}, "rates 1/2/3 at output stride 16 would be"),
        ({"model": {"backbone": "no_such_model"}}, "no model 'no_such_model'"),
        ({"model": {"backbone": "ghostnet_100"}}, "no feature maps at output stride 16"),
        ({"model": {"backbone_options": {"no_such": 1}}}, "no_such"),
        ({"model": {"low_levels": [3]}}, "no map at stride 3"),
    ],
)
@pytest.mark.parametrize("until", ["train", "push"])
def test_what_fits_no_data_is_told_before_there_is_any(
    section: dict[str, Any], said: str, until: Stage, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(config_of(**section), until, workspace=tmp_path)
    assert not [path for path in (tmp_path / "stages").glob("*/*") if path.is_dir()]


def test_weights_that_do_not_fit_are_told_before_there_is_data(micro: Micro, tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, weights := tmp_path / "other.safetensors")
    sections: dict[str, dict[str, dict[str, Any]]] = {
        "tensors do not fit the backbone": {"model": {"backbone_weights": str(weights)}},
        "has another architecture": {"model": {"channels": 24}, "training": {"init_from": str(micro.result.release)}},
        "training.weights_from": {"training": {"weights_from": str(weights)}},
    }
    for said, section in sections.items():
        with pytest.raises(ConfigError, match=said):
            run(config_of(**section), "train", workspace=tmp_path / "w")
        assert not [path for path in (tmp_path / "w" / "stages").glob("*/*") if path.is_dir()]


def recipe(**sections: Any) -> Recipe:
    return recipe_of(config_of(**sections), num_classes=len(ANY_CLASSES), device_type="cpu")


def refuse_ahead(cluster: Cluster = ALONE, **sections: Any) -> None:
    refuse_impossible_training(recipe(**sections), None, device="cpu", gpus=1, cluster=cluster)


@pytest.mark.slow
def test_backbone_whose_graph_does_not_take_any_size_is_told_before_there_is_data_and_when_there_is(
    tmp_path: Path,
) -> None:
    of_one_size = config_of(model={"backbone": "mobilevit_xxs"})
    drawn = torch.get_rng_state()
    with pytest.raises(ConfigError) as caught:
        run(of_one_size, "push", workspace=tmp_path)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not [path for path in (tmp_path / "stages").glob("*/*") if path.is_dir()]
    e = caught.value
    assert e.where == "model.backbone" and e.exit_code == 2
    assert e.found.startswith(
        "mobilevit_xxs can't be released: onnxruntime can't run the network on an image of 112x80"
    )
    assert e.expected == "images of any size, which a release must take"
    assert e.todo.startswith("choose another model.backbone, such as mobilenetv2_100")
    run(of_one_size, "transform", workspace=tmp_path)
    with pytest.raises(ConfigError, match="mobilevit_xxs can't be released"):
        run(of_one_size, "train", workspace=tmp_path)
    assert not list((tmp_path / "stages" / "train").rglob("history.jsonl"))  # not a step


def test_only_backbones_whose_like_no_test_exports_are_exported_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(ahead, "_export_error", lambda architecture: tried.append(architecture.backbone))
    for backbone in ("test_efficientnet", "mobilenetv2_100", "lcnet_100", "resnet18", "regnety_002"):
        refuse_unexportable(recipe(model={"backbone": backbone}).architecture)
    refuse_ahead()
    assert tried == []
    refuse_unexportable(recipe(model={"backbone": "resnet26", "backbone_options": {"aa_layer": "blur"}}).architecture)
    refuse_unexportable(recipe(model={"backbone": "resnest14d"}).architecture)
    assert tried == ["resnet26", "resnest14d"]
    refuse_ahead(cluster=Cluster(rank=1, world=2, local_rank=1), model={"backbone": "resnest14d"})
    assert tried == ["resnet26", "resnest14d"]  # rank 0 alone does


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mobilenetv2_100", "lcnet_100", "resnet18", "regnety_002"])
def test_one_of_each_module_that_is_not_tried_ahead_can_be_exported(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "EXPORTED", ())
    refuse_unexportable(recipe(model={"backbone": backbone}).architecture)


@pytest.mark.parametrize(
    ("module", "name", "training"),
    [
        ("roadseg.train.stage", "checkpoint_activations", {"activation_checkpointing": True}),
        ("roadseg.train.tracking.trackers", "_opener", {"mirrors": ["tensorboard"]}),
        ("roadseg.train.checks.preflight", "refuse_unknown_norms", {"sync_batch_norm": True, "gpus": 2}),
    ],
)
def test_so_are_a_backbone_without_blocks_or_of_other_norms_and_a_mirror_without_its_package(
    module: str, name: str, training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("not here", where=f"training.{next(iter(training))}")

    monkeypatch.setattr(f"{module}.{name}", refuse)
    with pytest.raises(ConfigError, match="not here"):
        run(config_of(training=training), "train", workspace=tmp_path)
    assert not [path for path in (tmp_path / "stages").glob("*/*") if path.is_dir()]


def test_parts_of_another_project_that_are_new_may_not_be_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number of classes is of the data: a classifier that would be made anew for two may yet be taken."""
    new = ("decoder.classifier", "decoder.refinements.0")
    monkeypatch.setattr("roadseg.train.initial_weights.load_foreign", lambda *_: LoadedWeights("smp", (), new))
    save_file({"encoder.weight": torch.zeros(1)}, weights := tmp_path / "smp.safetensors")
    training = {"weights_from": str(weights), "freeze": ["decoder"]}
    with pytest.raises(ConfigError, match=r"decoder, in which decoder\.refinements\.0 is new and random"):
        refuse_ahead(training=training)
    new = new[:1]
    refuse_ahead(training=training)


def test_what_is_taken_of_a_release_is_said_once(
    micro: Micro, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(config_of(training={"init_from": str(micro.result.release), "steps": 1}), "train", workspace=tmp_path)
    assert caplog.text.count("auxiliary heads: they are new") == 1


@no_gpu
def test_who_wants_only_data_is_not_asked_for_a_gpu(tmp_path: Path) -> None:
    result = run(config_of(training={"device": "cuda"}), "transform", workspace=tmp_path)
    assert list(result.outputs) == ["ingest", "transform"]


# ---- a run, and again -----------------------------------------------------------------------


def test_the_five_stages_leave_what_they_promise(micro: Micro) -> None:
    result = micro.result
    assert list(result.outputs) == ["ingest", "transform", "train", "evaluate"]
    for stage, names in {
        "ingest": ["manifest.jsonl", "dataset.json", "findings.json", "tree"],
        "transform": ["shards.json", "train-00000.bin", "train-00001.bin", "val-00000.bin"],
        "train": ["model.tar.gz", "history.jsonl", "contact_sheet.jpg", "checkpoints"],
        "evaluate": ["metrics.json", "report.html", "scenes"],
    }.items():
        output = result.outputs[stage]
        assert not output.cached and output.folder == micro.workspace / "stages" / stage / output.key
        assert all((output.folder / name).exists() for name in [*names, "stage.json"])
    checkpoints = result.outputs["train"].folder / "checkpoints"
    assert [p.name for p in checkpoints.glob("*.safetensors")] == ["step-00000006.safetensors"]
    assert made(micro.workspace, "train") == {result.outputs["train"].key}  # no lock, nothing partial
    assert result.decision and result.decision.outcome == "promoted" and result.release


def test_metrics_are_of_the_archive_that_ships(micro: Micro) -> None:
    assert micro.result.release and micro.result.evaluation and micro.result.decision
    metrics = read_json(micro.result.outputs["evaluate"].folder / "metrics.json")
    assert metrics == micro.result.evaluation
    digest = sha256_file(micro.result.release)
    assert metrics["release"] == digest == micro.result.decision.candidate
    assert metrics["images"] == 4 and 0 <= metrics["miou"] <= 1 and len(metrics["class_iou"]) == 19
    assert metrics["model"]["parameters"] > 0 and metrics["training"]["steps"] == 6
    store = store_of(micro.config, micro.workspace)
    champion = store.champion()
    assert champion and (champion.digest, champion.miou, champion.serial) == (digest, metrics["miou"], 1)
    for name in ("evaluation.json", "card.md", "decision.json"):
        assert store.document(digest, name)


def test_the_run_is_recorded(micro: Micro) -> None:
    folder = micro.result.folder
    record = read_json(folder / "run.json")
    assert {s: o["content"] for s, o in record["outputs"].items()} == micro.contents
    assert Config.model_validate(record["config"]) == micro.config
    page = (folder / "report.html").read_text()
    assert "learning rate" in page.lower() and "promoted" in page and page.count("data:image/jpeg") >= 9
    assert read_json(folder / "decision.json")["outcome"] == "promoted"


def test_a_second_run_makes_nothing_and_is_quick(micro: Micro, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = {p: p.stat().st_mtime_ns for p in (micro.workspace / "stages").rglob("*")}
    started = time.monotonic()
    again = run(micro.config, workspace=micro.workspace, name="second")
    assert time.monotonic() - started < 3
    assert all(o.cached for o in again.outputs.values())
    assert sum(" found " in line for line in caplog.messages) == len(again.outputs)  # each is logged once
    assert {s: o.content for s, o in again.outputs.items()} == micro.contents
    assert {p: p.stat().st_mtime_ns for p in (micro.workspace / "stages").rglob("*")} == before
    assert again.decision and again.decision.outcome == "unchanged"
    assert len(store_of(micro.config, micro.workspace).history()) == 1
    first, second = (r.folder / "report.html" for r in (micro.result, again))
    assert second.read_bytes() == first.read_bytes()  # it goes on telling why the release was let through
    assert read_json(again.folder / "decision.json")["outcome"] == "unchanged"


def test_elsewhere_with_other_workers_the_same_comes_out(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(data={"workers": 2}, training={"checkpoint_every": 4})
    result = run(config, workspace=Path("elsewhere"), name="other")
    assert {s: o.content for s, o in result.outputs.items()} == micro.contents
    assert {s: o.key for s, o in result.outputs.items()} == {s: o.key for s, o in micro.result.outputs.items()}


# ---- another candidate, on a damaged shard --------------------------------------------------


@dataclass(frozen=True)
class Two:
    """A copy of micro's workspace in which another seed was trained and refused."""

    workspace: Path
    config: Config
    refusal: GateRefused
    log: str
    damaged: Path
    pointer: bytes


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def two(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Two:
    workspace = tmp_path_factory.mktemp("two") / "w"
    shutil.copytree(micro.workspace, workspace)
    damaged = workspace / "stages" / "transform" / micro.result.outputs["transform"].key / "train-00001.bin"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 16
    damaged.write_bytes(data)
    pointer = (workspace / "store" / "champion.json").read_bytes()
    config, handler, log = config_of(**LATER), _Lines(), logging.getLogger("roadseg")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(GateRefused) as caught:
            run(config, workspace=workspace, name="later")
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return Two(workspace, config, caught.value, "\n".join(handler.lines), damaged, pointer)


@pytest.fixture
def copy_of_two(two: Two, tmp_path: Path) -> Iterator[Two]:
    shutil.copytree(two.workspace, tmp_path / "w")
    yield replace(two, workspace=tmp_path / "w")


def test_a_changed_training_key_makes_train_again_but_not_what_is_before_it(two: Two, micro: Micro) -> None:
    outputs = read_json(two.workspace / "runs" / "later" / "run.json")["outputs"]
    assert {s: o["cached"] for s, o in outputs.items()} == {
        "ingest": True, "transform": True, "train": False, "evaluate": False,
    }  # fmt: skip
    assert outputs["train"]["key"] != micro.result.outputs["train"].key
    assert outputs["transform"]["content"] == micro.contents["transform"]


def test_a_damaged_shard_is_said_and_made_again(two: Two, micro: Micro) -> None:
    assert f"shard {two.damaged.name} is damaged; rebuilding it" in two.log
    original = micro.result.outputs["transform"].folder / two.damaged.name
    assert two.damaged.read_bytes() == original.read_bytes()
    assert Shards.load(two.damaged.parent).damaged() == [] and not list(two.damaged.parent.glob("*.tmp"))


def test_a_lesser_candidate_is_refused_with_the_table(two: Two) -> None:
    assert two.refusal.exit_code == 4 and "stays: mIoU" in str(two.refusal)
    assert "champion  candidate" in two.log and "\nroad " in two.log
    assert (two.workspace / "store" / "champion.json").read_bytes() == two.pointer
    folder = two.workspace / "runs" / "later"
    decision = read_json(folder / "decision.json")
    assert decision["outcome"] == "refused" and "refused" in (folder / "report.html").read_text()
    assert store_of(two.config, two.workspace).releases() == [decision["champion"]]


@pytest.mark.usefixtures("quiet_log")
def test_on_the_command_line_that_is_4(two: Two, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--training.seed", "5", "--push.min-gain", "0.9", "--workspace", str(two.workspace)]
    assert main(["run", "--config", str(MICRO), *flags]) == 4
    err = capsys.readouterr().err
    assert "roadseg run: the champion" in err and "champion  candidate" in err


def test_promoted_then_rolled_back_and_forth_by_hand(copy_of_two: Two, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = copy_of_two.workspace
    config = config_of(**{**LATER, "push": {"min_gain": -1}})
    store = store_of(config, workspace)
    first = store.champion()
    result = run(config, workspace=workspace)
    assert result.decision and result.decision.outcome == "promoted" and result.outputs["train"].cached
    second = store.champion()
    assert first and second and (second.serial, second.previous) == (2, first.digest)
    assert promote_by_hand(store, None, workspace / "cache").digest == first.digest
    assert promote_by_hand(store, second.digest[:10], workspace / "cache").digest == second.digest
    assert promote_by_hand(store, second.digest[:10], workspace / "cache").serial == 4  # it is champion: nothing to do
    assert [c.digest for c in store.history()] == [first.digest, second.digest, first.digest, second.digest]
    assert promote_by_hand(store, None, workspace / "cache").digest == first.digest
    for reference in ("champion", first.digest, first.digest[:8], str(result.release)):
        release = load_release(find_release(config, workspace, reference))
        assert release.digest == (second.digest if reference == str(result.release) else first.digest)
    with pytest.raises(StoreError, match="0 releases match"):
        find_release(config, workspace, first.digest[:7])
    assert main(["promote", second.digest, "--workspace", str(workspace)]) == 0
    assert capsys.readouterr().out.endswith(f"was {first.digest[:16]}\n")
    assert main(["rollback", "--workspace", str(workspace)]) == 0
    assert capsys.readouterr().out.endswith(f"was {second.digest[:16]}\n")


def test_a_training_that_is_there_is_found_at_once(micro: Micro, tmp_path: Path) -> None:
    """Loading torch takes seconds: neither what is there nor who is making it is asked for with it."""
    shutil.copytree(micro.workspace, workspace := tmp_path / "w")
    script = f"""
import sys
from roadseg.config.sections import load_config
from roadseg.pipeline.run import run
found = run(load_config({str(MICRO)!r}), "train", workspace={str(workspace)!r})
assert found.outputs["train"].cached and "torch" not in sys.modules, sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_damaged_decision_in_the_store_ends_no_run(
    micro: Micro, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = shutil.copytree(micro.workspace, tmp_path / "w")
    next((workspace / "store").glob("releases/*/decision.json")).write_text("{")
    result = run(micro.config, workspace=workspace, name="again")
    assert result.decision and result.decision.outcome == "unchanged"
    assert "decision.json of release" in caplog.text and "is damaged" in caplog.text
    assert "the candidate is the champion already" in (result.folder / "report.html").read_text()


def test_the_number_of_ranks_is_in_the_key_where_it_changes_the_result(micro: Micro) -> None:
    def key(**training: Any) -> str:
        context = Context(
            config=config_of(training={"device": "cpu", **training}), workspace=Workspace(micro.workspace)
        )
        shards = micro.result.outputs["transform"].content
        digests = {"weights": "none", "weights_from": "", "init_from": "", "distill_from": ""}
        return context.workspace.key("train", *train_key(context, shards, Inputs(None, None, digests)))

    assert key(gpus=1) == key(gpus=2) == micro.result.outputs["train"].key
    for parts in ({"sync_batch_norm": False}, {"batch_size": 8, "accumulate": 2}):
        one, two, again = (key(gpus=gpus, **parts) for gpus in (1, 2, 2))
        assert one != two == again
        assert key(gpus=0, **parts) == one  # of a CPU: one process


def test_a_report_on_other_data_does_not_tell_why_the_champion_was_let_through(copy_of_two: Two) -> None:
    result = run(config_of(data={"split": "train"}), workspace=copy_of_two.workspace, name="other")
    page = (result.folder / "report.html").read_text()
    assert "the candidate is the champion already" in page and "there was no champion" not in page


# ---- a champion that can't be compared with -------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"digest": "x"}'], ids=repr)
def test_an_unreadable_pointer_is_refused_and_left_as_it_is(copy_of_two: Two, content: bytes) -> None:
    pointer = copy_of_two.workspace / "store" / "champion.json"
    pointer.write_bytes(content)
    for config in (config_of(), copy_of_two.config):  # the candidate that is champion, and another
        with pytest.raises(GateRefused, match="the champion can't be read") as caught:
            run(config, workspace=copy_of_two.workspace, name="r")
        assert caught.value.exit_code == 4
        assert pointer.read_bytes() == content
    assert not (copy_of_two.workspace / "runs" / "r" / "run.json").exists()  # told before any stage ran


@pytest.mark.fault
@pytest.mark.parametrize("until", ["train", "evaluate", "push"])
@pytest.mark.parametrize("key", ["init_from", "distill_from"])
def test_a_release_to_learn_from_that_is_not_there_is_told_before_any_stage(
    tmp_path: Path, until: Stage, key: str
) -> None:
    config = config_of(training={key: "0123456789ab"})
    with pytest.raises(ConfigError, match="0123456789ab") as caught:
        run(config, until, workspace=tmp_path)
    assert caught.value.where == f"training.{key}" and not (tmp_path / "stages").exists()


@pytest.mark.fault
@pytest.mark.parametrize("how", ["gone", "archive flipped", "archive gone", "pointer to nothing"])
def test_a_broken_champion_is_refused_and_left_as_it_is(copy_of_two: Two, how: str) -> None:
    store = copy_of_two.workspace / "store"
    pointer, archive = store / "champion.json", next(store.glob("releases/*/model.tar.gz"))
    if how == "gone":
        pointer.unlink()
    elif how == "archive flipped":
        data = bytearray(archive.read_bytes())
        data[1000] ^= 1
        archive.write_bytes(data)
    elif how == "archive gone":
        archive.unlink()
    else:
        pointer.write_bytes(pointer.read_bytes().replace(archive.parent.name.encode(), b"0" * 64))
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    with pytest.raises(GateRefused, match="the champion"):
        run(copy_of_two.config, workspace=copy_of_two.workspace)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


# ---- any release on any data ----------------------------------------------------------------


def test_a_release_is_scored_on_a_root_with_one_split_alone(micro: Micro, tmp_path: Path) -> None:
    tree = micro.result.outputs["ingest"].folder / "tree"
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(tree / kind / "val", tmp_path / "data" / kind / "val")
    config = config_of(data={"source": "cityscapes", "root": str(tmp_path / "data")})
    metrics, folder = evaluate_release(config, str(micro.result.release), workspace=tmp_path / "w")
    ours = micro.result.evaluation
    assert ours and metrics["source"] == "cityscapes" and metrics["confusion"] == ours["confusion"]
    assert metrics["data_fingerprint"] == ours["data_fingerprint"] and metrics["release"] == ours["release"]
    assert (folder / "report.html").exists() and not (tmp_path / "w" / "runs").exists()
    absent = config_of(data={"source": "cityscapes", "root": str(tmp_path / "data"), "split": "test"})
    with pytest.raises(DataError, match="test"):
        evaluate_release(absent, str(micro.result.release), workspace=tmp_path / "w")


def test_the_champion_is_the_default_and_the_evaluation_is_shared(two: Two, micro: Micro) -> None:
    metrics, _ = evaluate_release(micro.config, workspace=two.workspace)
    assert metrics == micro.result.evaluation


def test_a_champion_of_other_classes_refuses_the_candidate(micro: Micro, release_path: Path, tmp_path: Path) -> None:
    """A store that was used for another data set."""
    from roadseg.release.store.base import Champion, FolderStore

    shutil.copytree(micro.workspace / "stages", tmp_path / "stages")
    store = FolderStore(tmp_path / "store")
    digest = store.publish(release_path, {})
    store.promote(Champion(digest, 0.5, "f" * 64, 1), None)
    with pytest.raises(GateRefused, match="can't be compared on this data .*choose another store") as caught:
        run(micro.config, workspace=tmp_path)
    assert "the release predicts 3 classes" in str(caught.value) and store.releases() == [digest]


def test_held_out_sequences_are_a_split_of_their_own(micro: Micro, tmp_path: Path) -> None:
    shutil.copytree(micro.workspace / "stages", tmp_path / "stages")
    rows = (micro.result.outputs["ingest"].folder / "manifest.jsonl").read_text()
    sequence = next(s for s in ("ahlfurt_000000", "ahlfurt") if f'"sequence":"{s}"' in rows)
    config = config_of(data={"holdout_sequences": [sequence]}, training={"steps": 1})
    result = run(config, "evaluate", workspace=tmp_path)
    assert result.evaluation and result.evaluation["split"] == "val"
    other = result.evaluation["other_splits"]
    assert other.keys() == {HOLDOUT} and other[HOLDOUT]["images"] == 3
    assert set(Shards.load(result.outputs["transform"].folder).shards) == {"train", "val", HOLDOUT}
    only = config_of(data={"holdout_sequences": [sequence], "split": HOLDOUT}, training={"steps": 1})
    again = run(only, "evaluate", workspace=tmp_path)
    assert again.outputs["train"].cached and again.evaluation and again.evaluation["miou"] == other[HOLDOUT]["miou"]


# ---- two runs, and what a run leaves --------------------------------------------------------


def test_two_runs_at_once_make_everything_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "roadseg")
    results: list[Any] = []
    start = threading.Barrier(2)

    def one(name: str) -> None:
        start.wait()
        results.append(run(config_of(), "transform", workspace=tmp_path, name=name))

    threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [o.content for o in results[0].outputs.values()] == [o.content for o in results[1].outputs.values()]
    for stage in ("ingest", "transform"):
        assert sorted(r.outputs[stage].cached for r in results) == [False, True]
    assert "waiting for ingest" in caplog.text


def test_what_another_run_makes_is_busy_at_once(micro: Micro) -> None:
    output = micro.result.outputs["train"]
    away = output.folder.with_suffix(".away")
    output.folder.rename(away)
    try:
        with lock(output.folder.with_suffix(".lock"), "", wait=True):
            started = time.monotonic()
            with pytest.raises(Busy, match=f"train {output.key} is being made by process"):
                run(micro.config, "train", workspace=micro.workspace, name="busy", wait=False)
            assert time.monotonic() - started < 2
    finally:
        output.folder.with_suffix(".lock").unlink()
        away.rename(output.folder)


def test_what_a_run_still_going_has_made_is_no_leftover(micro: Micro, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []

    def spying(*_: object) -> None:
        seen.extend(leftovers(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr("roadseg.transform.stage.transform", spying)
    with pytest.raises(KeyboardInterrupt):
        run(micro.config, workspace=tmp_path)
    assert seen == []
    assert [left.path.name for left in leftovers(tmp_path)] == [f"{micro.result.outputs['transform'].key}.partial"]


def test_clean_takes_what_no_run_names(copy_of_two: Two) -> None:
    assert leftovers(copy_of_two.workspace) == []
    for record in copy_of_two.workspace.glob("runs/*/run.json"):
        if record.parent.name != "first":
            record.unlink()
    assert [left.path.parent.name for left in leftovers(copy_of_two.workspace)] == ["evaluate", "train"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "x\n"])
def test_a_run_s_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        run_folder(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_there_are_five_stages(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stage 'deploy'; expected ingest, transform"):
        run(config_of(), "deploy", workspace=tmp_path)  # type: ignore[arg-type]


def test_given_shards_stand_in_for_the_transform_stage(micro: Micro, tmp_path: Path) -> None:
    shards = tmp_path / "copied"
    shutil.copytree(micro.result.outputs["transform"].folder, shards)
    given = micro.config.transform.model_copy(update={"shards": str(shards)})
    config = micro.config.model_copy(update={"transform": given})
    workspace = Path(shutil.copytree(micro.workspace, tmp_path / "w"))  # that of `micro` is for reading only
    result = run(config, until="train", workspace=workspace, name="given")
    assert list(result.outputs) == ["train"] and result.outputs["train"].cached
    assert result.outputs["train"].key == micro.result.outputs["train"].key


def test_sigterm_before_the_first_step_is_told(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ingest(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("roadseg.pipeline.stages.ingested", ingest)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; run again to go on") as caught:
        run(micro.config, until="train", workspace=tmp_path / "w")
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_damaged_given_shards_are_refused(micro: Micro, tmp_path: Path) -> None:
    shards = tmp_path / "copied"
    shutil.copytree(micro.result.outputs["transform"].folder, shards)
    victim = next(shards.glob("train-*.bin"))
    victim.write_bytes(victim.read_bytes()[:-1])
    given = micro.config.transform.model_copy(update={"shards": str(shards)})
    config = micro.config.model_copy(update={"transform": given})
    with pytest.raises(DataError, match="1 of its shards are missing or damaged"):
        run(config, until="train", workspace=tmp_path / "w")
    with pytest.raises(ConfigError, match="transform.shards: no shards.json in .*nowhere"):
        nowhere = given.model_copy(update={"shards": str(tmp_path / "nowhere")})
        run(config.model_copy(update={"transform": nowhere}), until="train", workspace=tmp_path / "w")
    (shards / "shards.json").write_text("{")
    with pytest.raises(DataError, match="not a readable shard index"):
        run(config, until="train", workspace=tmp_path / "w")
