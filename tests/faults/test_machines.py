"""Several machines of a SageMaker cluster, each with several ranks; here all are this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from test_dead_ranks import ranks_of  # type: ignore[import-not-found]

from roadseg.files import read_json_lines
from roadseg.train.distributed import environment as place
from tests.conftest import MICRO, Micro
from tests.faults.processes import DEADLINE_S, gone, running, when

pytestmark = [pytest.mark.fault, pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 and /proc")]
HOSTS = ["127.0.0.1", "127.0.0.2"]
MACHINE = """
import sys
from test_machines import on_this_machine
from roadseg.cli.main import main

if __name__ == "__main__":
    on_this_machine()
    config, workspace, *flags = sys.argv[1:]
    flags += ["--config", config, "--workspace", workspace, "--training.batch-size", "4"]
    sys.exit(main(["train", *flags]))
"""


def on_this_machine() -> None:
    """For the start of its process: the first two arguments are where its resourceconfig.json lies, and a port."""
    resources, port = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    of_host = place._of_host
    place._of_host = lambda _: replace(of_host(resources), port=port)
    place.place.__defaults__ = (os.environ, resources)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def cluster(
    micro: Micro, folder: Path, *flags: list[str], script: str = MACHINE
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`script` on each machine, with a workspace of its own in which nothing is left to do but train."""
    folder.mkdir(exist_ok=True)
    path, port = folder / "machine.py", str(free_port())
    path.write_text(script)
    with ExitStack() as stack:
        started = []
        for host, own in zip(HOSTS, flags, strict=True):
            resources, workspace = folder / f"{host}.json", folder / host
            resources.write_text(json.dumps({"current_host": host, "hosts": HOSTS}))
            for stage in ("ingest", "transform"):
                if not (workspace / "stages" / stage).exists():
                    shutil.copytree(micro.workspace / "stages" / stage, workspace / "stages" / stage)
            command = [sys.executable, str(path), str(resources), port, str(MICRO), str(workspace), *own]
            here = Path(__file__).parent
            started.append(stack.enter_context(running(command, folder / f"{host}.log", here, here.parent)))
        yield started


def losses(workspace: Path) -> list[float]:
    (history,) = workspace.glob("stages/train/*/history.jsonl")
    return [row["loss"] for row in read_json_lines(history) if "loss" in row]


def test_two_machines_of_two_ranks_compute_what_one_process_does(micro: Micro, tmp_path: Path) -> None:
    """One of the ranks of the second machine is killed first; both machines say so and go on when run again."""
    flags = ["--training.gpus", "2"]
    first, second = (tmp_path / "c" / host for host in HOSTS)
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        saved = "stages/train/*.partial/checkpoints/step-00000001.json"
        assert when(machines[0], lambda: any(first.glob(saved)))
        ranks = [ranks_of(machine) for machine in machines]
        assert [len(r) for r in ranks] == [2, 2]
        os.kill(ranks[1][1], signal.SIGKILL)
        assert [machine.wait(90) for machine in machines] == [1, 1]
    told = [(tmp_path / "c" / f"{host}.log").read_text() for host in HOSTS]
    for log in told:  # on both
        assert f"training.gpus: rank 3 (process {ranks[1][1]}) was killed by SIGKILL; " in log
        assert "run again to go on after the last checkpoint" in log
        assert "Traceback" not in log and "frame #" not in log
    assert gone([pid for machine in ranks for pid in machine], 5)
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        assert [machine.wait(DEADLINE_S) for machine in machines] == [0, 0], told
    assert "going on after step" in (tmp_path / "c" / f"{HOSTS[0]}.log").read_text()
    assert not list(second.glob("stages/train/*/model.tar.gz"))  # the first machine's is the run
    alone = tmp_path / "alone"
    for stage in ("ingest", "transform"):
        shutil.copytree(micro.workspace / "stages" / stage, alone / "stages" / stage)
    command = [sys.executable, "-m", "roadseg.cli", "train", "--config", str(MICRO), "--workspace", str(alone)]
    with running([*command, "--training.batch-size", "4"], tmp_path / "alone.log") as process:
        assert process.wait(DEADLINE_S) == 0
    assert losses(first) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_machine_stops_all_after_the_same_step(micro: Micro, tmp_path: Path, signalled: int) -> None:
    flags = ["--training.gpus", "2"]
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        saved = f"{HOSTS[0]}/stages/train/*.partial/checkpoints/step-00000001.json"
        assert when(machines[0], lambda: any((tmp_path / "c").glob(saved)))
        machines[signalled].send_signal(signal.SIGTERM)
        assert [machine.wait(90) for machine in machines] == [143, 143]
    ends = [(tmp_path / "c" / f"{host}.log").read_text().splitlines()[-1] for host in HOSTS]
    assert ends[signalled].startswith("roadseg train: stopped by SIGTERM after step ")
    assert ends[1 - signalled] == ends[signalled].replace("SIGTERM", "another rank's signal")
    last = max(tmp_path.glob(f"c/{HOSTS[0]}/stages/train/*.partial/checkpoints/*.json"))
    assert f"after step {int(last.stem.removeprefix('step-'))};" in ends[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--training.gpus", "1"],
            "training.gpus: process 1 of 2 would start 1 to train, and the first one 2; expected",
        ),
        (["--training.learning-rate", "1"], "the config and the data: process 1 of 2 would make the training "),
    ],
)
def test_machines_that_would_train_otherwise_are_refused(
    micro: Micro, tmp_path: Path, flags: list[str], told: str
) -> None:
    two = ["--training.gpus", "2"]
    with cluster(micro, tmp_path / "c", two, [*two, *flags] if "gpus" not in flags[0] else flags) as machines:
        assert [machine.wait(90) for machine in machines] == [2, 2]
    for host in HOSTS:
        assert told in (tmp_path / "c" / f"{host}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_before_it_joins_ends_both_machines(micro: Micro, tmp_path: Path, killed: int) -> None:
    flags = ["--training.gpus", "2"]
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        assert when(machines[killed], lambda: len(ranks_of(machines[killed])) == 2)
        os.kill(ranks_of(machines[killed])[1], signal.SIGKILL)
        assert [machine.wait(60) for machine in machines] == [1, 1]
    for host in HOSTS:
        log = (tmp_path / "c" / f"{host}.log").read_text()
        assert f"training.gpus: rank {2 * killed + 1} (process " in log and "was killed by SIGKILL" in log
        assert "Traceback" not in log and "frame #" not in log


@pytest.mark.slow
def test_the_first_machine_waits_for_those_that_come_late_to_what_is_done(micro: Micro, tmp_path: Path) -> None:
    flags = ["--training.gpus", "1"]
    with cluster(micro, tmp_path / "c", flags, flags) as machines:
        assert [machine.wait(DEADLINE_S) for machine in machines] == [0, 0]
    with cluster(micro, tmp_path / "c", flags, flags) as machines:  # all is there on the first
        machines[1].send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            machines[0].wait(20)
        machines[1].send_signal(signal.SIGCONT)
        assert [machine.wait(60) for machine in machines] == [0, 0]


SLOW = MACHINE.replace(
    "    on_this_machine()",
    """    slow = sys.argv.pop() == "slow"
    on_this_machine()
    words.MEET_WITHIN, words.QUIET, words.BEAT_EVERY_S = timedelta(seconds=8), timedelta(seconds=1), 1.0
    shards = Stages._shards
    Stages._shards = lambda this: (time.sleep(25 * slow), shards(this))[1]""",
).replace(
    "import sys",
    """import sys
import time
from datetime import timedelta
from roadseg.pipeline.stages import Stages
from roadseg.train import words""",
)


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_machine_may_take_longer_over_its_data_than_others_wait_for_it_to_start(
    micro: Micro, tmp_path: Path, slow: int
) -> None:
    flags = [["slow" if i == slow else "fast"] for i in range(2)]
    with cluster(micro, tmp_path / "c", *flags, script=SLOW) as machines:
        codes = [machine.wait(DEADLINE_S) for machine in machines]
    assert codes == [0, 0], [(tmp_path / "c" / f"{host}.log").read_text() for host in HOSTS]


TWICE = """
import sys
from test_machines import on_this_machine
from roadseg import load_config, run

if __name__ == "__main__":
    on_this_machine()
    for seed in (1, 2):
        config = load_config(sys.argv[1], {"training": {"gpus": 2, "batch_size": 4, "seed": seed}})
        run(config, "train", workspace=sys.argv[2])
"""


@pytest.mark.slow
def test_two_runs_of_one_process(micro: Micro, tmp_path: Path) -> None:
    with cluster(micro, tmp_path / "c", [], [], script=TWICE) as machines:
        codes = [machine.wait(DEADLINE_S) for machine in machines]
    assert codes == [0, 0], (tmp_path / "c" / f"{HOSTS[0]}.log").read_text()
    assert len(list(tmp_path.glob(f"c/{HOSTS[0]}/stages/train/*/model.tar.gz"))) == 2
