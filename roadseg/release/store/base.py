"""Model stores: immutable releases, a champion pointer changed by compare-and-swap, and its history.

The pointer holds everything that must agree (digest, mIoU, data fingerprint, what it replaced) and
changes only by compare-and-swap: a writer that read an older pointer fails and must decide again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from roadseg.errors import PointerMoved, ReleaseNotFound, StoreError
from roadseg.files import lock, sha256_bytes, sha256_file, write_atomic

ARCHIVE, EVALUATION, CARD, DECISION = "model.tar.gz", "evaluation.json", "card.md", "decision.json"


@dataclass(frozen=True)
class Champion:
    """The pointer. serial: counts champions from 1. previous: digest of the one before.

    version: identifies the pointer's content when it was read, for compare-and-swap; never stored.
    """

    digest: str
    miou: float
    data_fingerprint: str
    serial: int
    previous: str = ""
    promoted_at: str = ""
    version: str = ""


class Store(Protocol):
    """A model store. Every method raises StoreError when the store can't be read or written."""

    @property
    def address(self) -> str: ...

    def champion(self) -> Champion | None:
        """The pointer, or None if there never was a champion. Raises StoreError if it is unreadable."""
        ...

    def promote(self, champion: Champion, replacing: Champion | None) -> None:
        """Point to `champion` and add it to the history, if the pointer is still `replacing`.

        Raises PointerMoved otherwise; nothing has changed then.
        """
        ...

    def publish(self, archive: Path, documents: dict[str, bytes]) -> str:
        """Store an archive (named by its SHA-256, returned) and documents beside it.

        Existing files are not overwritten: a release is immutable.
        """
        ...

    def fetch(self, digest: str, cache: Path) -> Path:
        """A verified local file of the release's archive; remote ones are copied below `cache`."""
        ...

    def document(self, digest: str, name: str) -> bytes | None:
        """evaluation.json, card.md or decision.json of a release; None if it has none."""
        ...

    def releases(self) -> list[str]:
        """Digests of all releases, sorted."""
        ...

    def history(self) -> list[Champion]:
        """All champions, oldest first."""
        ...


def read_document(store: Store, digest: str, name: str) -> dict[str, Any] | None:
    """The JSON document `name` of a release, None if it has none. Raises StoreError for a damaged one."""
    data = store.document(digest, name)
    if data is None:
        return None
    try:
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError
    except ValueError as e:
        raise StoreError(
            f"{name} of release {digest[:12]} is damaged",
            expected="a JSON object",
            where=store.address,
            todo="restore it from a backup",
        ) from e
    return found


def parse_champion(data: bytes, where: str, version: str) -> Champion:
    try:
        fields = json.loads(data)
        champion = Champion(**{**fields, "version": version})
        numbers = isinstance(champion.miou, float | int) and isinstance(champion.serial, int)
        if not numbers or not isinstance(champion.digest, str) or len(champion.digest) != 64:
            raise ValueError("digest, miou or serial has a wrong type")
        return champion
    except (ValueError, TypeError) as e:
        raise StoreError(
            f"the champion pointer is not readable ({type(e).__name__})",
            expected="JSON with digest, miou, data_fingerprint",
            where=where,
            todo="restore it from the history beside it; nothing was overwritten",
        ) from e


def champion_bytes(champion: Champion) -> bytes:
    fields = {k: v for k, v in asdict(champion).items() if k != "version"}
    return json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n"


def stamp() -> str:
    """UTC time in ISO 8601, which sorts as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def _store_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StoreError(f"can't be read or written ({e.strerror})", where=str(e.filename or where)) from e


class FolderStore:
    """A store in a folder: releases/<sha256>/..., champion.json, history/<n>.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def address(self) -> str:
        return str(self.folder)

    @property
    def _pointer(self) -> Path:
        return self.folder / "champion.json"

    def champion(self) -> Champion | None:
        data = self._read_pointer()
        if data is None and any((self.folder / "history").glob("*.json")):
            data = self._read_pointer()  # the first champion may have been written between the two reads
            if data is None:
                raise StoreError(
                    "the champion pointer is missing, but a history exists",
                    where=str(self._pointer),
                    todo="restore it from the newest file in history/",
                )
        return None if data is None else parse_champion(data, str(self._pointer), sha256_bytes(data))

    def _read_pointer(self) -> bytes | None:
        with _store_errors(self._pointer):
            return self._pointer.read_bytes() if self._pointer.exists() else None

    def promote(self, champion: Champion, replacing: Champion | None) -> None:
        with _store_errors(self.folder), lock(self.folder / ".lock", "the store's pointer", wait=True):
            now = self.champion()
            if (now.version if now else "") != (replacing.version if replacing else ""):
                raise PointerMoved("the champion changed since it was read", where=self.address)
            if now:  # an earlier run may have been killed before it wrote the history
                self._remember(now)
            write_atomic(self._pointer, champion_bytes(champion))
            self._remember(champion)

    def _remember(self, champion: Champion) -> None:
        history = self.folder / "history"
        history.mkdir(exist_ok=True)
        write_atomic(history / f"{champion.serial:06d}.json", champion_bytes(champion))

    def publish(self, archive: Path, documents: dict[str, bytes]) -> str:
        with _store_errors(self.folder):
            digest = sha256_file(archive)
            folder = self.folder / "releases" / digest
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in {ARCHIVE: archive.read_bytes(), **documents}.items():
                if not (folder / name).exists():
                    write_atomic(folder / name, data)
        self.fetch(digest, self.folder)  # verify an archive that existed already
        return digest

    def fetch(self, digest: str, cache: Path) -> Path:
        path = self.folder / "releases" / digest / ARCHIVE
        if not path.exists():
            raise ReleaseNotFound(f"no release {digest}", where=self.address, todo="see `roadseg releases`")
        with _store_errors(path):
            is_intact = sha256_file(path) == digest
        if not is_intact:
            raise StoreError(
                f"release {digest} is damaged: the archive's SHA-256 differs",
                where=str(path),
                todo="restore the file, or remove the folder and push again",
            )
        return path

    def document(self, digest: str, name: str) -> bytes | None:
        path = self.folder / "releases" / digest / name
        with _store_errors(path):
            return path.read_bytes() if path.exists() else None

    def releases(self) -> list[str]:
        return sorted(p.parent.name for p in self.folder.glob(f"releases/*/{ARCHIVE}"))

    def history(self) -> list[Champion]:
        files = sorted((self.folder / "history").glob("*.json"))
        past = {c.serial: c for c in (parse_champion(p.read_bytes(), str(p), "") for p in files)}
        if now := self.champion():
            past[now.serial] = now
        return [past[n] for n in sorted(past)]
