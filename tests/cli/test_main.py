"""The commands: exit codes, messages, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import roadseg
from roadseg.cli.main import COMMANDS, main
from roadseg.config.sections import Config
from roadseg.files import lock, read_json, read_json_lines
from tests.conftest import MICRO, Micro

pytestmark = pytest.mark.usefixtures("quiet_log")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def roadseg_(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Said:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as e:  # argparse and tyro leave by themselves
            code = int(e.code or 0)
        return Said(code, *capsys.readouterr())

    return call


def process(*arguments: str | Path, cwd: Path, **environment: str) -> Said:
    command: Sequence[str] = [sys.executable, "-m", "roadseg.cli", *map(str, arguments)]
    root = str(Path(roadseg.__file__).parents[2])
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, text=True
    )
    return Said(done.returncode, done.stdout, done.stderr)


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# ---- wrong usage: 2 -------------------------------------------------------------------------


def test_no_command_prints_the_usage(roadseg_) -> None:
    said = roadseg_()
    assert said.code == 2 and all(f"\n  {name} " in said.out for name in COMMANDS)
    assert roadseg_("--help").out == said.out and roadseg_("--help").code == 0
    assert roadseg_("--version") == Said(0, f"roadseg {roadseg.__version__}\n", "")


def test_an_unknown_command_names_the_nearest(roadseg_) -> None:
    said = roadseg_("trian")
    assert said.code == 2 and "no command 'trian', perhaps you meant train" in one_line(said.err)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "--nmae", "x"], ["--nmae"]),
        (["run", "--training.epoch", "3"], ["--training.epoch", "--training.epochs"]),
        (["run", "--training.epochs", "many"], ["training.epochs: input should be a valid integer", "(found 'many')"]),
        (["run", "--training.batch-size", "0"], ["training.batch_size", "greater than 0 (found 0)"]),
        (["run", "--config", "absent.yaml"], ["absent.yaml", "no such file"]),
        (["train", "--steps", "20"], ["unknown flag --steps, perhaps you meant --training.steps"]),
        (["train", "--xyzzy"], ["roadseg train: unknown flag --xyzzy; roadseg train --help lists every flag"]),
        (["run", "--name", "../else"], ["'../else'", "--name"]),
        (["predict", "x.png"], ["--out"]),
        (["predict", "--out", "o"], ["INPUT"]),
        (["predict", "x.png", "--out", "o", "--ids", "colours"], ["colours", "trainIds", "labelIds"]),
        (["promote"], ["R"]),
        (["config"], ["show", "schema"]),
        (["run", "--data.source", "camvid"], ["data.root"]),
        (["run", "--model.backbone-weights", "w.safetensors"], ["model.backbone_weights", "w.safetensors"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2_and_names_what_is_wrong(roadseg_, arguments: list[str], parts: list[str]) -> None:
    if "w.safetensors" in arguments:
        arguments = [*arguments, "--config", str(MICRO)]
    said = roadseg_(*arguments)
    assert said.code == 2, said
    assert all(part in said.err for part in parts) and "Traceback" not in said.err, said.err


def test_an_unknown_key_of_the_file_is_named_with_its_path(roadseg_, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {lerning_rate: 1}\nsotre: {}\n")
    said = roadseg_("run", "--config", "c.yaml")
    assert said.code == 2 and "2 wrong values in c.yaml" in said.err
    assert "training.lerning_rate: unknown key; perhaps you meant learning_rate" in said.err
    assert "sotre: unknown key; perhaps you meant store" in said.err
    said = roadseg_("run", "--config", "c.yaml", "--training.loss.focal", "-1")
    assert "3 wrong values in c.yaml and the flags" in said.err and "training.loss.focal: " in said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(roadseg_, name: str) -> None:
    said = roadseg_(name, "--help")
    assert said.code == 0 and "--workspace" in said.out and "--training.learning-rate" in said.out
    assert COMMANDS[name].about.replace("...", "all stages before,") in said.out


def test_help_shows_the_file_s_values_as_defaults(roadseg_) -> None:
    for config in (["--config", str(MICRO)], [f"--config={MICRO}"]):
        assert "test_efficientnet" in roadseg_("run", *config, "--help").out


# ---- the house ------------------------------------------------------------------------------


def test_config_show_is_a_config_again_and_schema_a_schema(roadseg_) -> None:
    said = roadseg_("config", "show", "--config", MICRO, "--training.seed", "9")
    assert said.code == 0
    shown = Config.model_validate(yaml.safe_load(said.out))
    assert (shown.training.seed, shown.data.town.width_px) == (9, 96)
    schema = json.loads(roadseg_("config", "schema").out)
    assert schema["properties"].keys() == Config.model_fields.keys()


def test_ingest_alone_loads_no_torch_and_logs_into_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from roadseg.cli.main import main; code = main(sys.argv[1:]);"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "ingest", "--config", str(MICRO), "--data.town.train", "3", "--name", "n"]
    environment = {**os.environ, "PYTHONPATH": str(Path(roadseg.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.endswith("False\n"), done.stderr
    assert done.stdout.startswith("ingest    workspace/stages/ingest/")
    rows = read_json_lines(tmp_path / "workspace" / "runs" / "n" / "log.jsonl")
    assert rows and all(set(r) == {"time", "level", "logger", "message"} for r in rows)
    assert read_json(tmp_path / "workspace" / "runs" / "n" / "run.json")["outputs"].keys() == {"ingest"}


# ---- 1, 3, 4, 5 -----------------------------------------------------------------------------


def test_a_failed_data_check_is_3(roadseg_, tmp_path: Path) -> None:
    said = roadseg_("ingest", "--data.source", "camvid", "--data.root", tmp_path)
    assert said.code == 3 and str(tmp_path) in said.err and "Traceback" not in said.err


def test_no_wait_exits_5_at_once_and_names_the_owner(roadseg_, tmp_path: Path) -> None:
    assert roadseg_("ingest", "--config", MICRO, "--workspace", "w").code == 0
    made = next((tmp_path / "w" / "stages" / "ingest").glob("*/stage.json")).parent
    made.rename(made.with_suffix(".partial"))
    with lock(made.with_suffix(".lock"), "", wait=True):
        started = time.monotonic()
        said = roadseg_("ingest", "--config", MICRO, "--workspace", "w", "--no-wait")
        assert said.code == 5 and time.monotonic() - started < 2
        assert f"process {os.getpid()} on " in said.err and "--no-wait" in said.err
    assert roadseg_("ingest", "--config", MICRO, "--workspace", "w", "--no-wait").code == 0


def test_no_release_is_1_and_says_what_to_do(roadseg_, tmp_path: Path) -> None:
    for command in (["predict", "x.png", "--out", "o"], ["evaluate", "--release", "champion"], ["rollback"]):
        said = roadseg_(*command)
        assert said.code == 1 and "champion" in one_line(said.err) and "roadseg r" in said.err
    said = roadseg_("promote", "0123456789")
    assert said.code == 1 and "0 releases match '0123456789'" in one_line(said.err)
    assert roadseg_("releases") == Said(0, "no champion yet in workspace/store\n", "")
    assert not (tmp_path / "workspace").exists()  # asking makes nothing


def test_a_full_or_closed_disk_is_one_sentence(roadseg_, tmp_path: Path) -> None:
    (tmp_path / "workspace").touch()
    said = roadseg_("ingest", "--config", MICRO)
    assert said.code == 1 and "workspace" in one_line(said.err)


def test_an_unexpected_error_asks_for_a_report(roadseg_, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("roadseg.pipeline.run.run", broken)
    said = roadseg_("run", "--config", MICRO)
    assert said.code == 1 and "unexpected ZeroDivisionError: oops; this is a bug in roadseg" in one_line(said.err)
    monkeypatch.setenv("ROADSEG_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        roadseg_("run", "--config", MICRO)


def test_ctrl_c_is_130(roadseg_, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("roadseg.pipeline.run.run", interrupted)
    said = roadseg_("run", "--config", MICRO)
    assert said.code == 130 and said.err == "roadseg run: interrupted\n"


def test_a_closed_pipe_gives_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m roadseg.cli config schema | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(roadseg.__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "{" and done.stderr == ""


def test_running_again_leaves_the_champion_unchanged(roadseg_, micro: Micro) -> None:
    said = roadseg_("run", "--config", MICRO, "--workspace", micro.workspace, "--name", "again")
    assert said.code == 0 and "unchanged: the candidate is the champion already" in said.out
    for stage in ("ingest", "transform", "train", "evaluate", "report"):
        assert f"\n{stage:<9} {micro.workspace}" in "\n" + said.out
    releases = roadseg_("releases", "--workspace", micro.workspace).out.splitlines()
    digest = read_json(micro.workspace / "store" / "champion.json")["digest"]
    assert releases[0].startswith(f"{digest[:16]}  champion  mIoU ") and releases[-1].split()[0] == "1"


# ---- predict --------------------------------------------------------------------------------


def photograph(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((21, 33, 3), np.uint8)
    pixels[:, 16:, 1] = 200
    pixels[:, :16, 2] = 200
    Image.fromarray(pixels).save(path)
    return path


def test_predict_writes_label_maps_and_overlays(roadseg_, release_path: Path, tmp_path: Path) -> None:
    photograph(tmp_path / "in" / "a" / "b.png")
    said = roadseg_("predict", "in", "--release", release_path, "--out", "out")
    assert said.code == 0 and "2 files below out" in said.out
    label = np.array(Image.open(tmp_path / "out" / "a" / "b_labelTrainIds.png"))
    assert label.shape == (21, 33) and set(np.unique(label)) == {1, 2}
    assert (tmp_path / "out" / "a" / "b_overlay.jpg").exists()


def test_predict_label_ids_without_overlay(roadseg_, release_path: Path, tmp_path: Path) -> None:
    path = photograph(tmp_path / "b.png")
    flags = ["--release", release_path, "--out", "out", "--ids", "labelIds", "--no-overlay"]
    assert roadseg_("predict", path, *flags).code == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b_labelIds.png"]
    assert set(np.unique(np.array(Image.open(tmp_path / "out" / "b_labelIds.png")))) == {11, 26}


def test_predict_names_and_skips_bad_files_and_ends_with_1(roadseg_, release_path: Path, tmp_path: Path) -> None:
    whole = photograph(tmp_path / "in" / "good.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[:-20])
    (tmp_path / "in" / "no.jpg").write_bytes(b"#!/bin/sh")
    said = roadseg_("predict", "in", "--release", release_path, "--out", "out")
    assert said.code == 1 and "2 unusable images" in said.out and "Traceback" not in said.err
    assert "in/cut.png: the png is truncated" in said.out and "in/no.jpg: the content is something else" in said.out
    assert (tmp_path / "out" / "good_overlay.jpg").exists()


def test_predict_keeps_to_the_config_s_limits(roadseg_, release_path: Path, tmp_path: Path) -> None:
    path = photograph(tmp_path / "b.png")
    said = roadseg_("predict", path, "--release", release_path, "--out", "out", "--data.max-image-pixels", "100")
    assert said.code == 1 and "at most 100" in said.out


def test_predict_refuses_a_changed_release(roadseg_, release_path: Path, tmp_path: Path) -> None:
    path, whole = photograph(tmp_path / "b.png"), bytearray(release_path.read_bytes())
    whole[len(whole) // 2] ^= 4
    (tmp_path / "bad.tar.gz").write_bytes(whole)
    said = roadseg_("predict", path, "--release", "bad.tar.gz", "--out", "out")
    assert said.code == 1 and "bad.tar.gz: not a readable .tar.gz" in one_line(said.err)


def test_predict_loads_no_torch(release_path: Path, tmp_path: Path) -> None:
    photograph(tmp_path / "b.png")
    code = (
        "import sys; from roadseg.cli.main import main; code = main(sys.argv[1:]);"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "predict", "b.png", "--release", str(release_path), "--out", "o"]
    environment = {**os.environ, "PYTHONPATH": str(Path(roadseg.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_clean_lists_and_removes_what_no_run_needs(roadseg_, tmp_path: Path) -> None:
    assert "nothing to remove" in roadseg_("clean").out
    roadseg_("ingest", "--config", MICRO, "--data.town.train", "3", "--name", "kept")
    roadseg_("ingest", "--config", MICRO, "--data.town.train", "4", "--name", "other")
    assert "nothing to remove" in roadseg_("clean").out
    (tmp_path / "workspace" / "runs" / "other" / "run.json").unlink()
    stages = tmp_path / "workspace" / "stages" / "ingest"
    (stages / "0123456789abcdef.partial").mkdir()
    listed = roadseg_("clean")
    assert "no run needs it" in listed.out and "left by a run that was stopped" in listed.out
    assert "run again with --remove" in listed.out and len(list(stages.glob("*"))) == 3
    assert "removed" in roadseg_("clean", "--remove").out and len(list(stages.glob("*"))) == 1
    assert "nothing to remove" in roadseg_("clean").out
