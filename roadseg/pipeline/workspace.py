"""The workspace: immutable stage outputs named by key, made once, complete or not at all.

stages/<stage>/<key>/          finished: stage.json says how it was made and what came out
stages/<stage>/<key>.partial/  being made, or left by a run that was killed
stages/<stage>/<key>.lock      held by the process that makes it
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadseg.errors import Busy, UsageError
from roadseg.files import content_digest, json_bytes, lock, read_json, sha256_bytes, write_atomic, write_json
from roadseg.version import __version__

log = logging.getLogger(__name__)
RECORD = "stage.json"
LEAVE_OUT = (RECORD, "log")  # what differs between two runs that made the same: times, hosts


@dataclass(frozen=True)
class Output:
    """A finished stage output. key: hash of its inputs; content: digest of its files."""

    stage: str
    key: str
    content: str
    folder: Path
    cached: bool


@dataclass(frozen=True)
class Workspace:
    """wait: whether to wait for another run that is making a needed output, or raise Busy."""

    path: Path
    wait: bool = True

    def make(
        self,
        stage: str,
        version: int,
        fields: dict[str, Any],
        inputs: dict[str, str],
        build: Callable[[Path], Any],
        resumes: bool = False,
    ) -> Output:
        """The output of this key, made by `build(folder)` unless it exists.

        fields: what of the config changes the result. inputs: content digests by name. resumes:
        whether `build` continues from what a killed run left; otherwise it gets an empty folder.
        """
        if found := self.find(stage, version, fields, inputs):
            return _logged(found)
        named, key, folder = self._named_folder(stage, version, fields, inputs)
        with lock(folder.with_suffix(".lock"), f"{stage} {key}", wait=self.wait, say=log.warning):
            if (folder / RECORD).exists():
                return _logged(_finished(stage, key, folder))
            log.info("%-9s making   %s", stage, folder)
            partial = folder.with_suffix(".partial")
            _make_room(folder, partial, resumes)
            sessions = Sessions(partial)
            try:
                build(partial)
            except UsageError:  # refused before anything was made
                sessions.forget()
                for empty in (partial / "log", partial):
                    with suppress(OSError):
                        empty.rmdir()
                raise
            seconds = sessions.finish()
            content = content_digest(partial, LEAVE_OUT)
            about = {
                **named,
                "key": key,
                "content": content,
                "seconds": round(seconds, 1),
                "sessions": sessions.number,
                "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "host": socket.gethostname(),
                "package_version": __version__,
            }
            write_json(partial / RECORD, about)
            os.sync()  # the name must not reach the disk before the bytes
            os.replace(partial, folder)
        folder.with_suffix(".lock").unlink(missing_ok=True)
        over = f" over {sessions.number} sessions" if sessions.number > 1 else ""
        log.info("%-9s made     %s in %.1f s%s", stage, folder, seconds, over)
        return Output(stage, key, content, folder, cached=False)

    def find(self, stage: str, version: int, fields: dict[str, Any], inputs: dict[str, str]) -> Output | None:
        """The output of this key, or None."""
        _, key, folder = self._named_folder(stage, version, fields, inputs)
        return _finished(stage, key, folder) if (folder / RECORD).exists() else None

    def key(self, stage: str, version: int, fields: dict[str, Any], inputs: dict[str, str]) -> str:
        return self._named_folder(stage, version, fields, inputs)[1]

    def _named_folder(
        self, stage: str, version: int, fields: dict[str, Any], inputs: dict[str, str]
    ) -> tuple[dict[str, Any], str, Path]:
        named = {"stage": stage, "version": version, "fields": fields, "inputs": inputs}
        key = sha256_bytes(json_bytes(named))[:16]
        return named, key, self.path / "stages" / stage / key


def _finished(stage: str, key: str, folder: Path) -> Output:
    return Output(stage, key, read_json(folder / RECORD)["content"], folder, cached=True)


def _logged(found: Output) -> Output:
    log.info("%-9s found    %s", found.stage, found.folder)
    return found


def _make_room(folder: Path, partial: Path, resumes: bool) -> None:
    """`partial` as the build may find it, and nothing in the way of the finished folder."""
    if folder.exists():  # its record is gone: a removal was killed halfway
        shutil.rmtree(folder)
    if partial.exists() and not resumes:
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    for path in partial.rglob(".*.tmp"):  # of write_atomic, when it was killed; they would count as members
        path.unlink()


class Sessions:
    """For how long an output has been in the making, also by runs that were stopped or killed: log/sessions.json.

    The end of a session that was killed is the time of the newest file it wrote.
    """

    def __init__(self, partial: Path) -> None:
        self._path = partial / "log" / "sessions.json"
        self._before = self._path.read_bytes() if self._path.exists() else None
        earlier: list[float] = []
        if self._path.exists():
            times = (p.stat().st_mtime for p in partial.rglob("*") if p.is_file() and p != self._path)
            with suppress(ValueError, KeyError, TypeError):  # it is spoilt: nothing but a figure is lost
                known = read_json(self._path)
                earlier = [*known["earlier_s"], max(0.0, max(times, default=0.0) - known["began"])]
        self._earlier, self._began = earlier, time.monotonic()
        self.number = len(earlier) + 1
        self._path.parent.mkdir(exist_ok=True)
        write_json(self._path, {"earlier_s": earlier, "began": time.time()})

    def forget(self) -> None:
        """This one never was."""
        if self._before is None:
            self._path.unlink(missing_ok=True)
        else:
            write_atomic(self._path, self._before)

    def finish(self) -> float:
        """Seconds of all sessions."""
        self._path.unlink()
        with suppress(OSError):
            self._path.parent.rmdir()  # if nothing else is in it
        return sum(self._earlier) + time.monotonic() - self._began


@dataclass(frozen=True)
class Leftover:
    """Something in the workspace that no run needs."""

    path: Path
    size_bytes: int
    why: str


def leftovers(workspace: Path) -> list[Leftover]:
    """Stage outputs that no run record names, and partial ones that no process is making."""
    needed = set()
    for record in workspace.glob("runs/*/run.json"):
        for output in read_json(record).get("outputs", {}).values():
            needed.add((output["stage"], output["key"]))
    found = []
    for path in sorted(workspace.glob("stages/*/*")):
        if path.suffix == ".lock":
            continue
        if path.suffix == ".partial":
            if not _held(path.with_suffix(".lock")):
                found.append(Leftover(path, _size(path), "left by a run that was stopped"))
        elif (path.parent.name, path.name) not in needed:
            found.append(Leftover(path, _size(path), "no run needs it"))
    return found


def remove(leftover: Leftover) -> None:
    """Remove it; one that a run took up again in the meantime is left alone."""
    if leftover.path.suffix == ".partial" and _held(leftover.path.with_suffix(".lock")):
        return
    (leftover.path / RECORD).unlink(missing_ok=True)  # first: what has a record counts as whole
    shutil.rmtree(leftover.path)
    leftover.path.with_suffix(".lock").unlink(missing_ok=True)


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with lock(path, "", wait=False):
            return False
    except Busy:
        return True


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
