"""Trackers take what they can and never hold up or end a run."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from roadseg.errors import ConfigError, Interrupted
from roadseg.files import read_json
from roadseg.train.tracking import sinks, trackers
from roadseg.train.tracking.sinks import Row

CONFIG = {"training": {"learning_rate": 0.001, "loss": {"dice": 0.5}}, "model": {"backbone": "mobilenetv2_100"}}


class Kept:
    """A sink that keeps what it is given; `act` may fail or take its time."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.rows: list[Row] = []
        self.status, self.act = "", act

    def write(self, rows: Sequence[Row]) -> None:
        self.act()
        self.rows += rows

    def close(self, status: str) -> None:
        self.status = status

    @property
    def values(self) -> list[tuple[int, dict[str, float]]]:
        return [(row.step, dict(row.values)) for row in self.rows if not row.text]


@pytest.fixture
def into(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Puts what the function returns in the place of TensorBoard."""
    return lambda opens: monkeypatch.setattr(sinks, "tensorboard", lambda folder, start: opens)


def test_nothing_is_kept_and_no_thread_started_without_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    with trackers.open_trackers((), tmp_path, "run", CONFIG) as told:
        for step in range(100):
            told.mean(step, {"train/loss": 1.0})
        told.scalars(1, {"val/miou": 0.5})
        assert threading.active_count() == before and told._sums == {}
    assert list(tmp_path.iterdir()) == []


def test_means_are_of_every_window_and_the_last_may_be_short(tmp_path: Path, into: Any) -> None:
    into(lambda: sink)
    sink = Kept()
    with trackers.open_trackers(["tensorboard"], tmp_path, "run", CONFIG, start=37) as told:
        for step in range(38, 66):
            told.mean(step, {"train/loss": float(step)})
        told.scalars(65, {"val/miou": 0.5, "holdout/miou": None})
    want = [(40, 39.0), (60, 50.5)]  # means of 38..40 and 41..60
    assert sink.values == [
        *[(step, {"train/loss": value}) for step, value in want],
        (65, {"val/miou": 0.5}), (65, {"train/loss": 63.0}),
    ]  # fmt: skip
    assert sink.status == "FINISHED"


def test_it_is_said_how_to_look_at_it(
    tmp_path: Path, into: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    into(Kept)
    with (
        caplog.at_level(logging.INFO, "roadseg"),
        trackers.open_trackers(["tensorboard"], tmp_path / "k.partial" / "log", "r", {}),
    ):
        pass
    (said,) = caplog.messages  # once, with the folder that will stand
    done, before = (f"{tmp_path / k}/log/tensorboard" for k in ("k", "k.partial"))
    assert said.rpartition("run: ")[2] == f"tensorboard --logdir {done} (until training is done: {before})"
    clean(monkeypatch)
    store = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri '{tmp_path}/a b/mlruns'"
    monkeypatch.setattr(sinks, "find_spec", lambda name: name)
    done, before = tmp_path / "a b", tmp_path / "a b.partial"
    assert sinks.open_command("mlflow", done, done) == store
    both = sinks.open_command("mlflow", done, before)
    assert both == f"{store} (until training is done: '{before}/mlruns')"
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)  # of mlflow-skinny, which has no pages
    needs = sinks.open_command("mlflow", done, done)
    assert needs.startswith(f"{store}; the page needs the whole mlflow") and "pip install mlflow" in needs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p@ss@server:5000/x")
    assert sinks.open_command("mlflow", done, before) == "https://server:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///shared/runs")  # it stays where it is
    assert "--backend-store-uri file:///shared/runs; the page" in sinks.open_command("mlflow", done, before)
    assert "shared" not in sinks.open_command("tensorboard", done, before)


def test_the_config_is_told_once_not_by_a_run_that_goes_on(tmp_path: Path, into: Any) -> None:
    into(lambda: sink)
    for start, texts in ((0, ["config"]), (5, [])):
        sink = Kept()
        with trackers.open_trackers(["tensorboard"], tmp_path, "run", CONFIG, start):
            pass
        assert [row.text[0] for row in sink.rows if row.text] == texts
        assert all("training.loss.dice: 0.5" in row.text[1] for row in sink.rows if row.text)


@pytest.mark.parametrize(
    ("raised", "status"), [(Interrupted("stopped", signal_number=15), "KILLED"), (MemoryError(), "FAILED")]
)
def test_how_a_run_ended_is_told(tmp_path: Path, into: Any, raised: BaseException, status: str) -> None:
    into(lambda: sink)
    sink = Kept()
    with pytest.raises(type(raised)), trackers.open_trackers(["tensorboard"], tmp_path, "run", CONFIG):
        raise raised
    assert sink.status == status


@pytest.mark.fault
def test_a_failure_is_said_once_without_passwords_and_tried_again(
    tmp_path: Path, into: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "RETRY_S", 0.0)
    monkeypatch.setattr(trackers, "ROWS_AT_ONCE", 1)
    down = [True]

    def act() -> None:
        if down:
            raise ConnectionError("no answer from https://me:sec@ret@server/api\nand more")

    into(lambda: sink)
    sink = Kept(act)
    with (
        caplog.at_level(logging.WARNING, "roadseg"),
        trackers.open_trackers(["tensorboard"], tmp_path, "r", {}, 1) as told,
    ):
        for step in range(1, 6):
            told.scalars(step, {"a": 1.0})
        until_empty(told)
        down.clear()
        told.scalars(6, {"a": 2.0})
    assert sink.values == [(6, {"a": 2.0})] and sink.status == "FINISHED"
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "ConnectionError: no answer from https://server/api" in said[0]
    assert "ret@" not in caplog.text and said[1] == "tensorboard: 5 of 6 rows were dropped"


def until_empty(told: trackers.Trackers) -> None:
    until = time.monotonic() + 10
    while not told._threads[0]._rows.empty() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)  # what was taken is tried


@pytest.mark.fault
def test_a_failed_tracker_is_left_alone_for_a_while(tmp_path: Path, into: Any) -> None:
    tries = []

    def opens() -> Kept:
        tries.append(1)
        raise OSError("no space")

    into(opens)
    with trackers.open_trackers(["tensorboard"], tmp_path, "run", {}) as told:
        for step in range(50):
            told.scalars(step, {"a": 1.0})
            time.sleep(0.002)
    assert len(tries) == 1


@pytest.mark.fault
def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end(
    tmp_path: Path, into: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.3)
    hangs, stuck = threading.Event(), threading.Event()
    into(lambda: Kept(lambda: hangs.set() or (stuck.wait(30) and None)))
    with (
        caplog.at_level(logging.WARNING, "roadseg"),
        trackers.open_trackers(["tensorboard"], tmp_path, "run", {}, 1) as told,
    ):
        told.scalars(0, {"a": 1.0})
        assert hangs.wait(20)  # else, on a busy machine, it takes its first rows late, and a full queue has room again
        began = time.monotonic()
        for step in range(1, 5 * trackers.WAITING_ROWS):
            told.scalars(step, {"a": 1.0})
    assert time.monotonic() - began < 5
    assert told._threads[0]._rows.qsize() == trackers.WAITING_ROWS
    assert "tensorboard: 5000 of 5000 rows were dropped" in caplog.text
    stuck.set()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")]
)  # fmt: skip
def test_a_package_that_is_not_there_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    clean(monkeypatch)
    refused = pytest.raises(ConfigError, match=rf"training.mirrors: .*{name}.*pip install 'roadseg\[{name}\]'")
    with refused, trackers.open_trackers([name], tmp_path, "run", CONFIG):
        raise AssertionError("training began")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=f"the tracker {name} needs a package"):
        trackers.refuse_missing([name])


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracker sets in the environment is gone after the test."""
    for name, value in sinks._MLFLOW_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


# ---- the packages themselves, where they are installed --------------------------------------


def told_run(names: list[str], folder: Path, start: int = 0, steps: int = 40) -> None:
    with trackers.open_trackers(names, folder, "run of today", CONFIG, start) as told:
        for step in range(start + 1, start + steps + 1):
            told.mean(step, {"train/loss": 1 / step})
        told.scalars(start + steps, {"val/miou": 0.25 + start / 1000})


@pytest.mark.filterwarnings("default")  # what the packages say of each other is not ours
def test_tensorboard_reads_what_was_written_and_hides_what_a_killed_run_left(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told_run(["tensorboard"], tmp_path, 0, 80)
    told_run(["tensorboard"], tmp_path, 40, 20)  # its checkpoint was at 40
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"train/loss", "val/miou"}
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    assert list(losses) == [20, 40, 60]
    assert losses[60] == pytest.approx(sum(1 / s for s in range(41, 61)) / 20)
    assert [(e.step, e.value) for e in read.Scalars("val/miou")] == [(60, pytest.approx(0.29))]
    assert b"training.loss.dice: 0.5" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("default")
def test_tensorboard_hides_what_was_written_before_the_first_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import plugin_event_accumulator as page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (60, 40):  # killed, then from the start again
        told_run(["tensorboard"], tmp_path, 0, steps)
        read = EventAccumulator(str(tmp_path / "tensorboard"))
        read.Reload()
        assert [event.step for event in read.Scalars("train/loss")] == list(range(20, steps + 1, 20))
        shown = page.EventAccumulator(str(tmp_path / "tensorboard"))
        shown.Reload()
        assert [event.step for event in shown.Tensors("config/text_summary")] == [0]  # once


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_one_run_in_the_log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_class = pytest.importorskip("mlflow").MlflowClient
    clean(monkeypatch)
    told_run(["mlflow"], tmp_path)
    told_run(["mlflow"], tmp_path, 40)
    client = client_class(tracking_uri=(tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "roadseg"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == read_json(tmp_path / "mlflow_run.json")["run_id"]
    assert run.info.run_name == "run of today" and run.info.status == "FINISHED"
    assert run.data.params["training.loss.dice"] == "0.5" and len(run.data.params) == 3
    history = client.get_metric_history(run.info.run_id, "val/miou")
    assert [(m.step, m.value) for m in history] == [(40, 0.25), (80, 0.29)]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [20, 40, 60, 80]


class Server(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as a run uses; keeps every request."""

    calls: list[tuple[str, dict[str, Any]]]

    def answer(self, body: dict[str, Any]) -> None:
        name = self.path.split("?")[0].removeprefix("/api/2.0/mlflow/")
        self.calls.append((name, body))
        info = {"run_id": "abc", "run_uuid": "abc", "status": "RUNNING", "lifecycle_stage": "active"}
        run = {"run": {"info": {**info, "experiment_id": "7", "start_time": 0, "artifact_uri": ""}, "data": {}}}
        answers = {
            "experiments/get-by-name": (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}),
            "experiments/create": (200, {"experiment_id": "7"}),
            "runs/create": (200, run),
            "runs/get": (200, run),
            "runs/update": (200, {"run_info": info}),
        }
        code, answer = answers.get(name, (200, {}))
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    do_PATCH = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    handler = type("Handler", (Server,), {"calls": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield f"http://user:p@secret@127.0.0.1:{made.server_port}", handler.calls  # type: ignore[attr-defined]
        finally:
            made.shutdown()
            thread.join()


@pytest.mark.filterwarnings("default")
def test_mlflow_server_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    clean(monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server() as (address, calls):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        told_run(["mlflow"], tmp_path)
        told_run(["mlflow"], tmp_path, 40)
    metrics = [m for name, body in calls if name == "runs/log-batch" for m in body.get("metrics", ())]
    assert [(m["key"], m["step"]) for m in metrics] == [
        ("train/loss", 20), ("train/loss", 40), ("val/miou", 40), ("train/loss", 60), ("train/loss", 80),
        ("val/miou", 80),
    ]  # fmt: skip
    assert [name for name, _ in calls].count("runs/create") == 1 and "runs/get" in [name for name, _ in calls]
    assert "secret" not in (tmp_path / "mlflow_run.json").read_text()

    with caplog.at_level(logging.WARNING, "roadseg"):  # the server is gone
        told_run(["mlflow"], tmp_path, 80)
    assert "mlflow does not take the figures of this run" in caplog.text and "secret" not in caplog.text
    assert "3 of 3 rows were dropped" in caplog.text


@pytest.mark.filterwarnings("default")
def test_an_address_mlflow_can_not_use_is_refused_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    clean(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://me:secret@loft/1")
    refused = pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI: .* carrier-pigeon")
    with refused as caught, trackers.open_trackers(["mlflow"], tmp_path, "run", CONFIG):
        raise AssertionError("training began")
    assert "secret" not in str(caught.value)
