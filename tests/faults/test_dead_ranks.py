"""Two ranks on the CPU: what one would compute; one dies, all end with its message; and the next start goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from roadseg.config.sections import load_config
from roadseg.config.training import Loss
from roadseg.errors import ConfigError, NonFiniteLoss
from roadseg.files import content_digest, read_json_lines
from roadseg.pipeline.run import run
from roadseg.pipeline.workspace import LEAVE_OUT
from roadseg.train import checkpoint
from roadseg.train.distributed.launch import launch
from roadseg.train.distributed.process_group import Ranks, joined
from roadseg.train.distributed.run_store import RunStore
from tests.conftest import MICRO, Micro
from tests.faults.processes import DEADLINE_S, gone, running, when

CPU = torch.device("cpu")
TRAIN = ["roadseg.cli", "train", "--config", str(MICRO)]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


# ---- without a network: what holds for anything that is launched ----------------------------


def rounds(ranks: Ranks, folder: str) -> None:
    """Rank 1 fails in its third round; with no folder left to write to, none does."""
    with joined(ranks, CPU):
        for round_ in range(10_000):
            ranks.sum_(torch.ones(1))
            if round_ == 2:
                Path(folder, f"{ranks.rank}.pid").write_text(str(os.getpid()))
                if ranks.rank == 1 and not Path(folder, "endless").exists():
                    Path(folder, "time").write_text(str(time.time()))
                    raise NonFiniteLoss("loss nan", expected="finite numbers", where="train samples 7", todo="look")
            time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("*.pid")) if path.read_text()]


@pytest.mark.fault
def test_what_one_rank_raises_ends_all_within_seconds(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="train samples 7: loss nan; expected finite numbers; look") as caught:
        launch(rounds, (str(tmp_path),), 2)
    assert caught.value.exit_code == 1
    assert time.time() - float((tmp_path / "time").read_text()) < 30
    assert len(pids(tmp_path)) == 2 and gone(pids(tmp_path), 0)


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "endless").touch()
    code = f"from test_dead_ranks import *\nif __name__ == '__main__': launch(rounds, ({str(tmp_path)!r},), 2)"
    script = tmp_path / "script.py"
    script.write_text(code)
    tests = Path(__file__).parent
    with running([sys.executable, str(script)], tmp_path / "log", tests, tests.parent) as process:
        assert when(process, lambda: len(pids(tmp_path)) == 2), (tmp_path / "log").read_text()
        process.kill()
        process.wait(30)
        assert gone(pids(tmp_path), 10)


# ---- the whole way --------------------------------------------------------------------------


def train(workspace: Path, *flags: str, by: Sequence[str] = ()) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", *by, *TRAIN, "--workspace", str(workspace), *flags]
    return running(command, workspace.with_suffix(".log"))


def finished(workspace: Path, *flags: str, by: Sequence[str] = ()) -> Path:
    """The train stage's output."""
    with train(workspace, *flags, by=by) as process:
        code = process.wait(DEADLINE_S)
    assert code == 0, workspace.with_suffix(".log").read_text()
    (record,) = workspace.glob("stages/train/*/stage.json")
    return record.parent


def with_data(micro: Micro, workspace: Path) -> Path:
    """A workspace in which nothing is left to do but train."""
    for stage in ("ingest", "transform"):
        shutil.copytree(micro.workspace / "stages" / stage, workspace / "stages" / stage)
    return workspace


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of rank 0, 1, ...: they are started in this order."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture(scope="module")
def two(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The train stage's output of two ranks that nothing disturbed."""
    yield finished(with_data(micro, tmp_path_factory.mktemp("two") / "w"), "--training.gpus", "2")


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(output / "history.jsonl") if "loss" in row]


def test_two_ranks_compute_what_one_does(micro: Micro, two: Path) -> None:
    alone = micro.result.outputs["train"].folder
    assert two.name == alone.name  # how many compute it is no part of the key
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    scores = [[r["miou"] for r in read_json_lines(o / "history.jsonl") if "miou" in r] for o in (alone, two)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)  # an argmax here and there


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_a_killed_rank_ends_the_job_and_torchrun_goes_on_to_the_same_bytes(
    micro: Micro, two: Path, tmp_path: Path
) -> None:
    workspace = with_data(micro, tmp_path / "w")
    with train(workspace, "--training.gpus", "2") as process:
        assert when(process, lambda: any(workspace.glob("stages/train/*.partial/checkpoints/step-00000001.json")))
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(60) == 1
    log = workspace.with_suffix(".log").read_text()
    assert f"roadseg train: training.gpus: rank 1 (process {ranks[1]}) was killed by SIGKILL; " in log
    assert "Traceback" not in log
    assert gone(ranks, 0)
    found = checkpoint.newest(next(workspace.glob("stages/train/*.partial")) / "checkpoints")
    assert found and 1 <= found[0] < 6
    output = finished(workspace, by=TORCHRUN)
    log = workspace.with_suffix(".log").read_text()
    assert log.count(f"going on after step {found[0]} of 6") == 1  # rank 0 speaks for all
    assert content_digest(output, LEAVE_OUT) == content_digest(two, LEAVE_OUT)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_all_ranks_after_the_same_step(micro: Micro, tmp_path: Path, number: signal.Signals) -> None:
    workspace = with_data(micro, tmp_path / "w")
    with train(workspace, "--training.gpus", "2", "--training.workers", "1") as process:
        assert when(process, lambda: any(workspace.glob("stages/train/*.partial/checkpoints/step-00000001.json")))
        ranks = ranks_of(process)
        # a terminal sends SIGINT to the whole group, so that ranks get it twice
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait(60) == 128 + number, workspace.with_suffix(".log").read_text()
    log = workspace.with_suffix(".log").read_text()
    assert f"roadseg train: stopped by {number.name} after step" in log and "Traceback" not in log
    assert len(ranks) == 2 and gone(ranks, 0)
    found = checkpoint.newest(next(workspace.glob("stages/train/*.partial")) / "checkpoints")
    assert found and f"after step {found[0]};" in log


@pytest.mark.fault
def test_nobody_waits_for_what_is_there(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_log: None
) -> None:
    """As the second of two processes."""
    set_rank_1_of_2(monkeypatch)
    monkeypatch.setattr(RunStore, "wait", lambda *_: "")  # rank 0 says that nothing is left to train
    shutil.copytree(micro.workspace / "stages", tmp_path / "stages")
    assert run(micro.config, "push", workspace=tmp_path).outputs == {}
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob("runs/*/*"))
    with pytest.raises(ConfigError) as e:
        run(load_config(MICRO, {"training": {"gpus": 3}}), "train", workspace=tmp_path)
    assert e.value.where == "training.gpus"


def set_rank_1_of_2(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.fault
def test_a_wrong_setting_is_refused_before_waiting_for_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_log: None
) -> None:
    set_rank_1_of_2(monkeypatch)
    monkeypatch.setattr(RunStore, "fail", lambda *_: None)
    with pytest.raises(ConfigError) as e:
        run(load_config(MICRO, {"training": {"batch_size": 3}}), "train", workspace=tmp_path)
    assert e.value.where == "training.batch_size"


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_batch_on_one_two_and_four_ranks(micro: Micro, tmp_path: Path) -> None:
    flags = ["--training.batch-size", "8", "--training.steps", "8", "--training.validate-every", "8"]
    flags += ["--training.optimizer", "sgd", "--training.learning-rate", "0.02"]  # Adam makes steps of rounding errors
    for term in Loss.model_fields:
        flags += [f"--training.loss.{term}", "0.5"]
    curves = {}
    for gpus in ("1", "2", "4"):
        curves[gpus] = losses(finished(with_data(micro, tmp_path / gpus), *flags, "--training.gpus", gpus))
    for gpus in ("2", "4"):
        assert curves[gpus][:4] == pytest.approx(curves["1"][:4], rel=1e-6)
        assert curves[gpus] == pytest.approx(curves["1"], rel=1e-4)  # what rounding has grown to
    flags += ["--training.gpus", "2", "--training.sync-batch-norm", "False"]
    apart = losses(finished(with_data(micro, tmp_path / "apart"), *flags))
    assert abs(apart[0] / curves["1"][0] - 1) > 1e-5  # ten times the tolerance above: the test can see it
