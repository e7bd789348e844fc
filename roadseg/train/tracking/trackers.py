"""Send losses and scores to TensorBoard and MLflow in threads that training never waits for.

The run's own record is history.jsonl and log/; a tracker gets a copy. So it may fail: a warning is logged once, its
rows are dropped and counted, it is tried again every RETRY_S, and training continues.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roadseg.errors import ConfigError, Interrupted
from roadseg.train.tracking import sinks
from roadseg.train.tracking.sinks import Row, Sink

log = logging.getLogger(__name__)
EVERY_STEPS = 20  # window of the values that are sent as a mean
WAITING_ROWS = 1000  # rows that may wait for a slow tracker; more are dropped
ROWS_AT_ONCE = 100
RETRY_S = 30.0
CLOSE_S = 10.0  # longest wait for all trackers at the end: after a signal the run has 30 s in all


class Trackers:
    """Takes values from the loop; every call returns at once. Without trackers nothing is kept."""

    def __init__(self, threads: Sequence[_TrackerThread]) -> None:
        self._threads = threads
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last = 0

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Values of this step, such as {"val/miou": 0.61}; None, such as the score of no class, is left out."""
        if given := {name: float(value) for name, value in values.items() if value is not None}:
            self._send(Row(step, time.time(), given))

    def mean(self, step: int, values: Mapping[str, float]) -> None:
        """Values of every step, sent as their mean since the last multiple of EVERY_STEPS."""
        if not self._threads:
            return
        self._last = step
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if step % EVERY_STEPS == 0:
            self.flush()

    def flush(self) -> None:
        """Send the means of a window that has not ended."""
        self.scalars(self._last, {name: total / self._counts[name] for name, total in self._sums.items()})
        self._sums, self._counts = {}, {}

    def text(self, name: str, text: str) -> None:
        self._send(Row(0, time.time(), {}, (name, text)))

    def _send(self, row: Row) -> None:
        for thread in self._threads:
            thread.send(row)


class _TrackerThread(threading.Thread):
    """Writes rows to a sink that it opens itself, because opening may take as long as writing."""

    def __init__(self, name: str, opens: Callable[[], Sink]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)  # a hanging thread must not keep the process alive
        self.tracker, self._opens = name, opens
        self._rows: queue.Queue[Row] = queue.Queue(WAITING_ROWS)
        self._status = ""  # set when no row follows
        self._sink: Sink | None = None
        self._retry_at = 0.0
        self._sent = self._written = 0
        self._warned = False

    def send(self, row: Row) -> None:
        self._sent += 1
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(row)

    def end(self, status: str, within_s: float) -> None:
        """Write waiting rows for at most `within_s`; then report how many were lost."""
        self._status = status
        self.join(within_s)
        if lost := self._sent - self._written:
            log.warning("%s: %d of %d rows were dropped", self.tracker, lost, self._sent)

    def run(self) -> None:
        while True:
            status = self._status  # read before the queue, so that rows sent before it was set are still written
            if rows := self._next_rows():
                self._write(rows)
            elif status:
                break
        if self._sink:
            self._try(lambda sink: sink.close(status))

    def _next_rows(self) -> list[Row]:
        rows: list[Row] = []
        with contextlib.suppress(queue.Empty):
            rows.append(self._rows.get(timeout=0.1))
            while len(rows) < ROWS_AT_ONCE:
                rows.append(self._rows.get_nowait())
        return rows

    def _write(self, rows: list[Row]) -> None:
        if time.monotonic() >= self._retry_at and self._try(lambda sink: sink.write(rows)):
            self._written += len(rows)

    def _try(self, act: Callable[[Sink], None]) -> bool:
        try:
            self._sink = self._sink or self._opens()
            act(self._sink)
            return True
        except Exception as e:  # clients raise anything, and none of it may end a training
            self._sink, self._retry_at = None, time.monotonic() + RETRY_S
            if not self._warned:
                self._warned = True
                log.warning(
                    "%s does not take the figures of this run, which goes on without it: %s", self.tracker, _plain(e)
                )
            return False


def _plain(e: Exception) -> str:
    """The first line of an error, without user names and passwords of URLs."""
    text = sinks.without_password(str(e).strip().split("\n")[0])
    return f"{type(e).__name__}: {text}"[:300]


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, run_name: str, config_fields: Mapping[str, Any], start: int = 0
) -> Iterator[Trackers]:
    """Open "tensorboard" (events in `folder`/tensorboard) and "mlflow" (MLFLOW_TRACKING_URI, else `folder`/mlruns).

    folder: the run's log folder. config_fields: nested; written as text or parameters, so nothing secret.
    start: the step that a resumed run continues after; it writes to the same files and the same MLflow run. Raises
    ConfigError, before anything is written, if a package is missing or can't use that address.
    """
    opens = {name: _opener(name, folder, run_name, flat(config_fields), start) for name in names}
    running = [_TrackerThread(name, open_sink) for name, open_sink in opens.items()]
    for thread in running:
        thread.start()
        how = sinks.open_command(thread.tracker, _finished(folder), folder)
        log.info("%s: to look at this run: %s", thread.tracker, how)
    trackers, status = Trackers(running), "FAILED"
    try:
        if start == 0:
            trackers.text("config", "\n".join(f"{key}: {value}" for key, value in flat(config_fields).items()))
        yield trackers
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        trackers.flush()
        until = time.monotonic() + CLOSE_S
        for thread in running:
            thread.end(status, max(0.0, until - time.monotonic()))


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ConfigError for trackers whose package is missing or can't use its address, as `open_trackers` does."""
    with tempfile.TemporaryDirectory(prefix="roadseg-trackers-") as folder:
        for name in names:
            _opener(name, Path(folder), "", {}, 0)


def _finished(folder: Path) -> Path:
    """The path of a log folder once its stage is finished (see workspace.py)."""
    return folder.parent.with_name(folder.parent.name.removesuffix(".partial")) / folder.name


def _opener(name: str, folder: Path, run_name: str, fields: dict[str, str], start: int) -> Callable[[], Sink]:
    """A function that opens the sink. The package is imported now, not in the middle of the run."""
    try:
        if name == "tensorboard":
            return sinks.tensorboard(folder / "tensorboard", start)
        return sinks.mlflow(folder, run_name, fields)
    except ImportError as e:
        raise ConfigError(
            f"the tracker {name} needs a package that is not installed ({e.name or e})",
            where="training.mirrors",
            todo=f"pip install 'roadseg[{name}]', or leave {name} out",
        ) from e


def flat(fields: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """{"training": {"seed": 0}} as {"training.seed": "0"}."""
    rows: dict[str, str] = {}
    for key, value in fields.items():
        path = f"{above}.{key}" if above else str(key)
        rows |= flat(value, path) if isinstance(value, Mapping) else {path: str(value)}
    return rows
