"""What the ranks tell one another besides numbers: where rank 0 stands, and why one of them failed.

They lie in the key-value store by which the ranks meet, so that a rank can tell and leave, and another
can read it without either waiting in a collective.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property
from typing import Any

import torch
import torch.distributed as dist

from roadseg import errors
from roadseg.errors import Interrupted, RoadsegError
from roadseg.train.place import Place

log = logging.getLogger(__name__)
MEET_WITHIN = timedelta(minutes=15)  # machines of a cluster start minutes apart
QUIET = timedelta(seconds=10)  # of the others' absence
HEARD_WITHIN_S, FAILURE_HEARD_WITHIN_S = 5.0, 30.0  # of a failure others may learn late: they make data first
ASK_EVERY_S = 0.2
FAILED = "failed"


class PeerLost(RoadsegError):
    """Another rank is gone, and did not say why."""


@contextmanager
def answered() -> Iterator[None]:
    """Around messages between ranks: an error of the connection becomes PeerLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo has no class of its own; NCCL's derive from it
        raise PeerLost(
            f"another rank no longer answers ({_plain(e)})",
            todo="look at what it said last; run again to go on after the last checkpoint",
        ) from e


def _plain(error: Exception) -> str:
    """The first line of what gloo or NCCL says, without the place in their source, and up to the peer's address."""
    text = re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\] *", "", str(error).splitlines()[0])
    return re.sub(r"(\]:\d+)\b.*", r"\1", text)


@dataclass(frozen=True)
class Words:
    """Of one training. `name` tells it from others of the same processes; all ranks count alike.

    above: the name of the Words of the processes that started these, whose failures are heard here too.
    """

    here: Place
    name: str
    above: str = ""

    @cached_property
    def store(self) -> dist.Store:
        return self._named(self.name)

    def _named(self, name: str) -> dist.Store:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"roadseg/{attempt}/{name}", _store(self.here))

    def tell(self, word: str, how: str = "said") -> None:
        self.store.set(word, how)

    def told(self, word: str) -> str:
        """How a word was told, waited for."""
        how: bytes = self.store.get(word)
        return how.decode()

    def fail(self, error: BaseException) -> None:
        """Say why; the first of several counts. That the store is gone must not hide the error itself."""
        try:
            self.store.compare_set(FAILED, "", json.dumps(packed(error, self.here.rank)))
            self.heard()
            self._stay(FAILURE_HEARD_WITHIN_S)
        except RuntimeError:
            return

    def cause(self, within_s: float) -> Exception | None:
        """What another rank failed with, waited for."""
        until = time.monotonic() + within_s
        while (told := self.failure()) is None and time.monotonic() < until:
            time.sleep(ASK_EVERY_S)
        return told

    def failure(self) -> Exception | None:
        """What the first rank to fail said, if any did."""
        try:
            for store in (self.store, self._named(self.above)) if self.above else (self.store,):
                if store.check([FAILED]):
                    self.heard()
                    return unpacked(json.loads(store.get(FAILED)))
        except RuntimeError:
            return None
        return None

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Around all that this process does: what ends it ends those that wait for it."""
        try:
            yield
        except BaseException as e:
            self.fail(e)
            raise

    def wait(self, *words: str, within: timedelta | None = None) -> str:
        """The first of these that is told; "" after `within`. Raises what another rank failed with."""
        until = time.monotonic() + within.total_seconds() if within else math.inf
        while time.monotonic() < until:
            try:
                for word in words:
                    if self.store.check([word]):
                        return word
            except dist.DistError as e:
                raise PeerLost(
                    "rank 0 is gone without a word",
                    where=f"{self.here.address}:{self.here.port}",
                    todo="look at its output; run again to go on after the last checkpoint",
                ) from e
            if error := self.failure():
                raise error
            time.sleep(ASK_EVERY_S)
        return ""

    def meet(self) -> None:
        """Wait for all ranks. Raises PeerLost if one does not come."""
        self.tell(f"rank {self.here.rank}")
        for rank in range(self.here.world):
            if self.wait(f"rank {rank}", within=QUIET):
                continue
            log.warning("waiting at %s:%d for rank %d of %d", self.here.address, self.here.port, rank, self.here.world)
            if not self.wait(f"rank {rank}", within=MEET_WITHIN):
                raise PeerLost(
                    f"rank {rank} of {self.here.world} did not come",
                    expected=f"all of them within {MEET_WITHIN.seconds // 60} minutes",
                    where=f"{self.here.address}:{self.here.port}",
                    todo="look at what it said; all need the same command, on one machine also the same workspace",
                )

    def finish(self, await_others: bool) -> None:
        """As rank 0, say that all is done; where others may yet ask this process, stay until they have.

        Machines of a cluster may come late, and find nobody to ask once the first one has ended.
        """
        self.tell("trained")
        if await_others:
            self._stay(HEARD_WITHIN_S)
        elif self.here.host:
            self._stay(MEET_WITHIN.total_seconds())

    def heard(self) -> None:
        """Let rank 0 go, if it waits for that."""
        self.tell(f"heard by {self.here.rank}")

    def _stay(self, within_s: float) -> None:
        """While this process keeps the store, until the others have read the last word in it."""
        until = time.monotonic() + (within_s if self.here.main and not self.here.hosted else 0.0)
        others = [f"heard by {rank}" for rank in range(1, self.here.world)]
        quiet_until = time.monotonic() + QUIET.total_seconds()
        while time.monotonic() < until and not self.store.check(others):
            time.sleep(ASK_EVERY_S)
            if time.monotonic() > quiet_until:
                log.warning("it has ended here; waiting until the other machines have heard how")
                quiet_until = math.inf


@cache
def _store(here: Place) -> dist.TCPStore:
    host = here.main and not here.hosted
    try:  # for several tenants: elastic's agents meet there too
        return dist.TCPStore(
            here.address, here.port, None, host, MEET_WITHIN, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as e:
        raise RoadsegError(
            f"the processes can't meet there ({str(e).splitlines()[0]})",
            expected="an address that all reach and a port that is free on the first machine",
            where=f"MASTER_ADDR and MASTER_PORT, {here.address}:{here.port}",
            todo="set another MASTER_PORT for all of them, or start them with torchrun",
        ) from e


def packed(error: BaseException, rank: int) -> dict[str, Any]:
    """An error as JSON: a four-part one whole, another as its text and traceback."""
    row: dict[str, Any] = {"rank": rank, "class": type(error).__name__, "text": str(error)}
    if isinstance(error, RoadsegError):
        row["parts"] = {name: getattr(error, name) for name in ("found", "expected", "where", "todo")}
        row["exit_code"] = error.exit_code
    elif isinstance(error, OSError) and error.errno:
        row["system"] = [error.errno, error.strerror, str(error.filename) if error.filename else None]
    if not isinstance(error, RoadsegError):
        row["traceback"] = "".join(traceback.format_exception(error))
    return row


def unpacked(row: dict[str, Any]) -> Exception:
    """The error that `packed` took; of one that is not ours an OSError or RuntimeError, its traceback as a note."""
    if "parts" not in row:
        text = f"{row['class']} in rank {row['rank']}: {row['text']}"
        error = OSError(*row["system"]) if "system" in row else RuntimeError(text)
        error.add_note(row["traceback"])
        return error
    parts = row["parts"]
    kind = PeerLost if row["class"] == PeerLost.__name__ else getattr(errors, row["class"], RoadsegError)
    if kind is Interrupted:
        return Interrupted(parts["found"], signal_number=row["exit_code"] - 128)
    made: RoadsegError = kind(parts.pop("found"), **parts)
    made.exit_code = row["exit_code"]
    return made
