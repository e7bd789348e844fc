"""Write rows to TensorBoard and MLflow."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from roadseg.errors import ConfigError
from roadseg.files import read_json, write_json

RUN = "mlflow_run.json"  # in the log folder: the run that a resumed training continues
EXPERIMENT = "roadseg"  # unless MLFLOW_EXPERIMENT_NAME is set
_PARAMETERS_AT_ONCE, _METRICS_AT_ONCE, _PARAMETER_CHARACTERS = 100, 1000, 500  # what every MLflow server takes
_NEEDS = "; the page needs the whole mlflow, not mlflow-skinny: pip install mlflow, in an environment of its own"
# Set unless the user has set them, before the package is imported:
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it would send usage data to its developers
    "MLFLOW_ALLOW_FILE_STORE": "true",  # since 3.x a folder without a database must be enabled
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s; 120 and 7 retries would lose minutes of rows to a server that is gone
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


@dataclass(frozen=True)
class Row:
    """Values at a step, or a text of its own."""

    step: int
    time_s: float
    values: Mapping[str, float]
    text: tuple[str, str] | None = None


class Sink(Protocol):
    """A destination of rows; any exception means that they were not written."""

    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self, status: str) -> None:
        """status: FINISHED, KILLED (by a signal) or FAILED."""


def tensorboard(folder: Path, start: int) -> Callable[[], Sink]:
    """Raises ImportError without the package."""
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides rows of later steps that a killed run wrote; without a checkpoint to resume from it hides all of
    # them, also the config at step 0, which is written again.
    purge = [start + 1 if start else 0]

    def opens() -> Sink:
        return _TensorBoard(SummaryWriter(str(folder), purge_step=purge.pop() if purge else None))

    return opens


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.values.items():
                self._writer.add_scalar(name, value, row.step, walltime=row.time_s)
            if row.text:
                # Markdown: indented lines stay as they are
                text = "\n".join(f"    {line}" for line in row.text[1].split("\n"))
                self._writer.add_text(row.text[0], text, row.step, walltime=row.time_s)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


def mlflow(folder: Path, run_name: str, fields: Mapping[str, str]) -> Callable[[], Sink]:
    """Raises ImportError without the package, ConfigError if it can't use MLFLOW_TRACKING_URI."""
    for name, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
    try:
        client = MlflowClient(tracking_uri=uri)  # makes no connection yet
    except MlflowException as e:
        scheme = urlsplit(uri).scheme or "no scheme"
        raise ConfigError(  # not the text of `e`: it quotes the address, perhaps with a password
            f"the installed mlflow can't write to an address of {scheme}",
            expected="http://, https:// or file://; a database only through a server, or with the whole mlflow",
            where="MLFLOW_TRACKING_URI",
            todo="start `mlflow server` on that database and set its address",
        ) from e
    return lambda: _Mlflow(client, _run(client, folder / RUN, uri, run_name, fields))


def open_command(name: str, folder: Path, until_done: Path) -> str:
    """The command, or the server's address without its password.

    folder: the run's log folder once its stage is finished; until_done: its folder before.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") if name == "mlflow" else None
    if address and address.startswith(("http://", "https://")):
        return without_password(address)
    below = {"mlflow": "mlruns"}.get(name, name)
    place, before = (
        shlex.quote(without_password(address or str((log / below).resolve()))) for log in (folder, until_done)
    )
    until = f" (until training is done: {before})" if before != place else ""
    if name == "tensorboard":
        return f"tensorboard --logdir {place}{until}"
    allowed = "MLFLOW_ALLOW_FILE_STORE=true " if not address or urlsplit(address).scheme in ("", "file") else ""
    return f"{allowed}mlflow ui --backend-store-uri {place}{until}{'' if find_spec('sqlalchemy') else _NEEDS}"


def without_password(text: str) -> str:
    """Remove user names and passwords from URLs: up to the last @, as a password may contain one."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _run(client: Any, kept: Path, uri: str, run_name: str, fields: Mapping[str, str]) -> str:
    """The id of the run that is continued, or of a new one."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    address = without_password(uri)
    known = read_json(kept) if kept.exists() else {}
    if known.get("address") == address:
        try:
            if client.get_run(known["run_id"]).info.lifecycle_stage == "active":
                client.update_run(known["run_id"], status="RUNNING")
                return str(known["run_id"])
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    run_id = str(client.create_run(experiment, run_name=run_name).info.run_id)
    write_json(kept, {"address": address, "run_id": run_id})
    rows = [Param(key, value[:_PARAMETER_CHARACTERS]) for key, value in fields.items()]
    for i in range(0, len(rows), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=rows[i : i + _PARAMETERS_AT_ONCE])
    return run_id


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def write(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(row.time_s * 1000), row.step) for row in rows for name, value in row.values.items()
        ]
        for i in range(0, len(metrics), _METRICS_AT_ONCE):  # texts are the parameters that the run began with
            self._client.log_batch(self._run_id, metrics=metrics[i : i + _METRICS_AT_ONCE])

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status)
