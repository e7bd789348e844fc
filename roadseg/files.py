"""Atomic writes, digests and file locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from roadseg.errors import Busy


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """Canonical JSON for digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` has the old or the new bytes, even after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError) and not e.filename:
            e.filename = str(path)  # a failed write does not name its file
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def read_json_lines(path: Path) -> list[Any]:
    """The rows of a JSON-lines file up to the first invalid line; a killed process may leave an incomplete one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def members(folder: Path, leave_out: tuple[str, ...] = ()) -> list[Path]:
    """Every file below `folder`, as sorted relative paths, without the top-level names in `leave_out`."""
    found = []
    for root, folders, names in os.walk(folder):
        relative = Path(root).relative_to(folder)
        if relative == Path("."):
            folders[:] = [d for d in folders if d not in leave_out]
            names = [n for n in names if n not in leave_out]
        found += [relative / n for n in names]
    return sorted(found, key=lambda p: p.as_posix())


def content_digest(folder: Path, leave_out: tuple[str, ...] = ()) -> str:
    """SHA-256 over the sorted (name, SHA-256) of the members."""
    rows = [(p.as_posix(), sha256_file(folder / p)) for p in members(folder, leave_out)]
    return sha256_bytes(json_bytes(rows))


@contextmanager
def lock(path: Path, what: str, *, wait: bool, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold an exclusive flock on `path`; the kernel releases it when this process ends, even if it has forked.

    what: the locked thing, for messages. Raises Busy, naming the owner, if another process holds it and not `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+") as f, _not_in_children(f):
            _acquire(f, what, wait, say)
            if not _is_file_at(path, f):
                continue  # the previous owner removed the file while we waited: a lock on it excludes nobody
            with suppress(OSError):  # a full disk: the lock is held, only the owner's name is missing
                os.ftruncate(f.fileno(), 0)
                os.write(f.fileno(), _owner().encode())
            yield
            return


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


_locks: set[TextIO] = set()  # open in this process


def _close_locks() -> None:
    for f in _locks:
        f.close()
    _locks.clear()


# A flock belongs to all processes that share the open file: a child that outlives its parent would keep it.
os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def _not_in_children(f: TextIO) -> Iterator[None]:
    _locks.add(f)
    try:
        yield
    finally:
        _locks.discard(f)


def _acquire(f: TextIO, what: str, wait: bool, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        owner = f.read().strip() or "another process"
        if not wait:
            raise Busy(f"{what} is being made by {owner}", todo="wait for it, or run again without --no-wait") from None
        say(f"waiting for {what}, which is being made by {owner}")
        fcntl.flock(f, fcntl.LOCK_EX)


def _is_file_at(path: Path, f: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
