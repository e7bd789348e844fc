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
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from roadseg import errors
from roadseg.errors import Interrupted, RoadsegError
from roadseg.train.distributed.environment import Place

log = logging.getLogger(__name__)
MEET_WITHIN = timedelta(minutes=15)  # machines of a cluster start minutes apart
QUIET = timedelta(seconds=10)  # of the others' absence
HEARD_WITHIN_S, FAILURE_HEARD_WITHIN_S = 5.0, 30.0  # of a failure others may learn late: they may have yet to start
ASK_EVERY_S = 0.2
BEAT_EVERY_S, SILENCE = 5.0, timedelta(minutes=1)  # a process that lives shows it; one that was silent so long is gone
CONNECT_WITHIN_S = 5.0  # once there is somebody
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
    _heard: list[Exception] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def store(self) -> dist.Store:  # type: ignore[name-defined]
        """Raises RoadsegError if it can't be reached within MEET_WITHIN."""
        return self._named(self.name, MEET_WITHIN.total_seconds())

    def _named(self, name: str, within_s: float) -> dist.Store:  # type: ignore[name-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"roadseg/{attempt}/{name}", _store(self.here, within_s))  # type: ignore[attr-defined]

    def tell(self, word: str, how: str = "said") -> None:
        self.store.set(word, how)

    def told(self, word: str) -> str:
        """How a word was told, waited for."""
        how: bytes = self.store.get(word)
        return how.decode()

    def fail(self, error: BaseException) -> None:
        """Say why; the first of several counts. That there is no store must not hide the error itself, nor for long."""
        within_s = HEARD_WITHIN_S if isinstance(error, Interrupted) else FAILURE_HEARD_WITHIN_S
        try:
            store = self._named(self.name, within_s)
            store.compare_set(FAILED, "", json.dumps(packed(error, self.here.rank)))
            self.heard()
            self._stay(FAILURE_HEARD_WITHIN_S)
        except (RuntimeError, RoadsegError):
            return

    def cause(self, within_s: float) -> Exception | None:
        """What another rank failed with, waited for."""
        until = time.monotonic() + within_s
        while (told := self.failure()) is None and time.monotonic() < until:
            time.sleep(ASK_EVERY_S)
        return told

    def failure(self) -> Exception | None:
        """What the first rank to fail said, if any did; also when the store has gone since this process heard it."""
        if self._heard:
            return self._heard[0]
        try:
            for name in filter(None, (self.name, self.above)):
                store = self._named(name, MEET_WITHIN.total_seconds())
                if store.check([FAILED]):
                    self._heard.append(unpacked(json.loads(store.get(FAILED))))
                    self.heard()
                    return self._heard[0]
        except RuntimeError:
            return None
        return None

    @contextmanager
    def present(self) -> Iterator[None]:
        """Around all that this process does: the others see that it lives, and what ends it ends all that wait for it.

        Rank 0 keeps the store from here on. The others look for it beside what they do, and need it only when they
        have something to say or to ask. Raises RoadsegError if rank 0 can't keep it.
        """
        if self.here.main:
            _store(self.here, MEET_WITHIN.total_seconds())
        ended = threading.Event()
        life = threading.Thread(target=self._show_life, args=(ended,), name="shows that it lives", daemon=True)
        life.start()
        try:
            yield
        except BaseException as e:
            self.fail(e)
            raise
        finally:
            ended.set()
            life.join(CONNECT_WITHIN_S)

    def _show_life(self, ended: threading.Event) -> None:
        """And hear of a failure, as the rank that tells it may be gone when this one would ask."""
        while not ended.is_set():
            try:
                self._named(self.name, 0.0).add(f"life of {self.here.rank}", 1)
                if self.failure():
                    return
            except RoadsegError:  # rank 0 is not there yet
                pass
            except RuntimeError:  # or no more: who asks it something is told
                return
            ended.wait(BEAT_EVERY_S)

    def _life(self, rank: int) -> int:
        """Another number than before if it lives; 0 if it was never here, or shows nothing."""
        with answered():
            return self.store.add(f"life of {rank}", 0)

    def wait(self, *words: str, within: timedelta | None = None) -> str:
        """The first of these that is told; "" after `within`. Raises what another rank failed with."""
        until = time.monotonic() + within.total_seconds() if within else math.inf
        while time.monotonic() < until:
            try:
                for word in words:
                    if self.store.check([word]):
                        return word
            except dist.DistError as e:
                raise self.failure() or PeerLost(
                    "rank 0 is gone without a word",
                    where=f"{self.here.address}:{self.here.port}",
                    todo="look at its output; run again to go on after the last checkpoint",
                ) from e
            if error := self.failure():
                raise error
            time.sleep(ASK_EVERY_S)
        return ""

    def meet(self) -> None:
        """Wait for all ranks: for each as long as it is seen to live. Raises PeerLost for one that is not."""
        self.tell(f"rank {self.here.rank}")
        for rank in range(self.here.world):
            if self.wait(f"rank {rank}", within=QUIET):
                continue
            log.warning("waiting at %s:%d for rank %d of %d", self.here.address, self.here.port, rank, self.here.world)
            life = self._life(rank)
            while not self.wait(f"rank {rank}", within=SILENCE if life else MEET_WITHIN):
                before, life = life, self._life(rank)
                if life == before:
                    raise self._lost(rank, life > 0)

    def _lost(self, rank: int, came: bool) -> PeerLost:
        who = f"rank {rank} of {self.here.world}"
        if came:
            found, expected = f"{who} is gone without a word", f"a sign of life within {SILENCE.seconds} s"
            todo = "look at what it said; unless somebody killed it, memory ran out over its data; then run again"
        else:
            found, expected = f"{who} did not come", f"all of them within {MEET_WITHIN.seconds // 60} minutes"
            todo = "look at what it said; all need the same command, on one machine also the same workspace"
        return PeerLost(found, expected=expected, where=f"{self.here.address}:{self.here.port}", todo=todo)

    def finish(self, await_others: bool) -> None:
        """As rank 0, say that all is done; where others may yet ask this process, stay until they have.

        Machines of a cluster may come late, and find nobody to ask once the first one has ended.
        """
        self.tell("trained")
        if await_others:
            self._stay(HEARD_WITHIN_S)
        elif self.here.host:
            self._stay(MEET_WITHIN.total_seconds(), of_silence=True)

    def heard(self) -> None:
        """Let rank 0 go, if it waits for that."""
        self.tell(f"heard by {self.here.rank}")

    def _stay(self, within_s: float, of_silence: bool = False) -> None:
        """While this process keeps the store, until the others have read the last word in it.

        of_silence: count from the last sign of life of one of them.
        """
        if not _keeps_store(self.here):
            return
        others = range(1, self.here.world)
        until, lives = time.monotonic() + within_s, 0
        quiet_until = time.monotonic() + QUIET.total_seconds()
        while time.monotonic() < until and not self.store.check([f"heard by {rank}" for rank in others]):
            time.sleep(ASK_EVERY_S)
            if of_silence and (now := sum(map(self._life, others))) != lives:
                until, lives = time.monotonic() + within_s, now
            if time.monotonic() > quiet_until:
                log.warning("it has ended here; waiting until the other machines have heard how")
                quiet_until = math.inf


_stores: dict[Place, dist.TCPStore] = {}  # type: ignore[name-defined]  # to the process's end
_opening = threading.Lock()


def _keeps_store(here: Place) -> bool:
    return here.main and not here.hosted


def _store(here: Place, within_s: float) -> dist.TCPStore:  # type: ignore[name-defined]
    """The one of this process. Raises RoadsegError if rank 0 can't keep it, or is not there within so long."""
    until = time.monotonic() + within_s
    while True:
        try:
            with _opening:
                if here not in _stores:
                    _stores[here] = _opened(here)
                return _stores[here]
        except (OSError, dist.DistError) as e:
            if _keeps_store(here) or time.monotonic() >= until:
                raise RoadsegError(
                    f"the processes can't meet there ({str(e).splitlines()[0]})",
                    expected="an address that all reach and a port that is free on the first machine",
                    where=f"MASTER_ADDR and MASTER_PORT, {here.address}:{here.port}",
                    todo="set another MASTER_PORT for all of them, or start them with torchrun",
                ) from e
        time.sleep(ASK_EVERY_S)


def _opened(here: Place) -> dist.TCPStore:  # type: ignore[name-defined]
    """Raises OSError where nobody listens yet: of that PyTorch would print a page each time."""
    keeps = _keeps_store(here)
    if not keeps:
        socket.create_connection((here.address, here.port), CONNECT_WITHIN_S).close()
    within = timedelta(seconds=CONNECT_WITHIN_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # for several tenants: elastic's agents meet there too
        here.address, here.port, None, keeps, within, wait_for_workers=False, multi_tenant=True
    )
    store.set_timeout(MEET_WITHIN)
    return store


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
