"""Messages between ranks besides tensors: that data is ready, and why a rank failed.

It lies in the key-value store through which torchrun's processes meet, so that a rank can write and leave, and another
can read without a collective.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from roadseg import errors
from roadseg.errors import Interrupted, PeerFailed, PeerLost, RoadsegError
from roadseg.train.distributed.environment import Cluster

MEET_WITHIN = timedelta(minutes=15)  # machines of a cluster start minutes apart
DATA_WITHIN_S = 24 * 3600.0  # rank 0 may download and check a large data set while the others wait
ASK_EVERY_S = 0.2
FAILED = "failed"


@dataclass(frozen=True)
class RunStore:
    """The store of one run; every rank must use the same `name`."""

    cluster: Cluster
    name: str

    @property
    def store(self) -> dist.Store:  # type: ignore[name-defined]
        """Raises RoadsegError if rank 0 can't be reached."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"roadseg/{attempt}/{self.name}", _connected())  # type: ignore[attr-defined]

    def publish(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def wait(self, *keys: str, within_s: float = DATA_WITHIN_S) -> str:
        """The value once all `keys` exist, the last one's.

        Raises PeerFailed when another rank has failed, PeerLost when the store is gone or the time is up.
        """
        until = time.monotonic() + within_s
        try:
            while not self.store.check(list(keys)):
                self.raise_failure()
                if time.monotonic() > until:
                    raise PeerLost(f"no {keys[-1]!r} within {within_s:.0f} s", todo="check what the other ranks do")
                time.sleep(ASK_EVERY_S)
            value: bytes = self.store.get(keys[-1])
        except RuntimeError as e:
            raise PeerLost("rank 0 is gone", todo="check its output; run again to go on") from e
        return value.decode()

    def barrier(self, name: str, within_s: float = DATA_WITHIN_S) -> None:
        """Wait until every rank is here."""
        self.publish(f"{name} {self.cluster.rank}", "")
        self.wait(*(f"{name} {rank}" for rank in range(self.cluster.world)), within_s=within_s)

    def fail(self, error: BaseException) -> None:
        """Record why this rank fails; the first of several counts. Never raises: `error` itself must get through."""
        try:
            self.store.compare_set(FAILED, "", json.dumps({"rank": self.cluster.rank, "text": str(error)}))
        except (RuntimeError, RoadsegError):
            return

    def raise_failure(self, within_s: float = 0.0) -> None:
        """Raise PeerFailed if another rank has recorded why it failed, now or `within_s`."""
        until = time.monotonic() + within_s
        while True:
            try:
                if self.store.check([FAILED]):
                    row = json.loads(self.store.get(FAILED))
                    raise PeerFailed(f"rank {row['rank']} failed: {row['text']}")
            except RuntimeError:  # the store is gone
                return
            if time.monotonic() >= until:
                return
            time.sleep(ASK_EVERY_S)


@cache
def _connected() -> dist.TCPStore:  # type: ignore[name-defined]
    """The store of this process, which lives to its end; torchrun hosts it, or rank 0 does."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=MEET_WITHIN)))  # type: ignore[attr-defined]
    except (OSError, RuntimeError) as e:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RoadsegError(
            f"the processes can't meet there ({str(e).splitlines()[0]})",
            expected="an address that all processes reach and a free port on the first machine",
            where=f"MASTER_ADDR and MASTER_PORT, {address}",
            todo="set another MASTER_PORT for all of them, or start them with torchrun",
        ) from e
    return store


# ---- errors as JSON, in the error file that elastic gives each process ----------------------


def write_error_file(error: BaseException, rank: int) -> None:
    """Write `error` to elastic's error file, if there is one: text and time for torchrun, the four parts for us."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    row: dict[str, Any] = {"rank": rank, "class": type(error).__name__, "text": str(error)}
    if isinstance(error, RoadsegError):
        row["parts"] = {name: getattr(error, name) for name in ("found", "expected", "where", "todo")}
        row["exit_code"] = error.exit_code
    else:
        row["traceback"] = "".join(traceback.format_exception(error))
        if isinstance(error, OSError) and error.errno:
            row["os_error"] = [error.errno, error.strerror, str(error.filename) if error.filename else None]
    extra = {"py_callstack": row.get("traceback", ""), "timestamp": str(int(time.time())), "roadseg": row}
    try:
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"message": {"message": f"{row['class']}: {row['text']}", "extraInfo": extra}}, f)
    except OSError:  # a full disk must not hide the error itself
        return


def read_error(row: dict[str, Any]) -> Exception:
    """The error that `write_error_file` wrote; one that is not ours as an OSError or RuntimeError with a note."""
    if "parts" not in row:
        text = f"{row['class']} in rank {row['rank']}: {row['text']}"
        error = OSError(*row["os_error"]) if "os_error" in row else RuntimeError(text)
        error.add_note(row["traceback"])
        return error
    parts = row["parts"]
    kind = getattr(errors, row["class"], RoadsegError)
    if kind is Interrupted:
        return Interrupted(parts["found"], signal_number=row["exit_code"] - 128)
    made: RoadsegError = kind(parts.pop("found"), **parts)
    made.exit_code = row["exit_code"]
    return made
