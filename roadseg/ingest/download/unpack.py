"""Unpack an untrusted zip below a folder: no paths outside, no links, no zip bombs, all verified."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from roadseg.errors import RoadsegError
from roadseg.progress import progress

MAX_FILES = 500_000
MAX_RATIO = 30  # unpacked bytes per byte of the zip; Cityscapes' PNG and JSON stay below 10
_CHUNK = 1 << 20
# All that zipfile raises for a damaged zip, while opening it or reading a member.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, IndexError, OverflowError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A file of a zip: its relative posix path and its size in bytes."""

    path: str
    size: int


def unpack(path: Path, root: Path, tops: Collection[str]) -> list[Member]:
    """Write every file below `root` atomically, check its CRC-32, and return the members sorted by path.

    An existing file with the same size and CRC is kept, so an interrupted run continues; so is any file directly in
    `root`, as a README may be the user's. tops: allowed first parts of paths. Raises RoadsegError before writing
    anything for absolute paths, "..", links, encryption, duplicate names, too many files, or too many bytes for
    the disk or for the ratio; and for a damaged member, which is removed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            _refuse(path, infos, tops)
            _require_room(path, root, infos)
            with progress(len(infos), f"unpack {path.name}", "files") as bar:
                for info in infos:
                    _write(archive, info, root)
                    bar.update()
            os.sync()  # one sync before the record is written; 25,000 single syncs would take minutes
            return sorted((Member(i.filename, i.file_size) for i in infos), key=lambda m: m.path)
    except _DAMAGED as e:
        raise _damaged(path, e) from None
    except OSError as e:
        if (
            e.errno == errno.EINVAL and e.filename is None
        ):  # seeking to a position from a damaged zip; a full disk has another errno
            raise _damaged(path, e) from None
        raise


def _damaged(path: Path, e: Exception) -> RoadsegError:
    return RoadsegError(f"is damaged ({type(e).__name__})", expected="a complete zip", where=str(path))


def _refuse(path: Path, infos: list[zipfile.ZipInfo], tops: Collection[str]) -> None:
    wrong = next((f"{ascii(i.filename)[:80]} {why}" for i in infos if (why := _why_not(i, tops))), "")
    names = [i.filename.casefold() for i in infos]
    if not wrong and len(set(names)) < len(names):
        wrong = "contains a name twice"
    if not wrong and len(infos) > MAX_FILES:
        wrong = f"contains {len(infos):,} files"
    total, packed = sum(i.file_size for i in infos), path.stat().st_size
    if not wrong and total > MAX_RATIO * packed + 1_000_000:
        wrong = f"unpacks {packed:,} bytes to {total:,}"
    if wrong:
        raise RoadsegError(
            f"unsafe zip: {wrong}", expected="the package as published", where=str(path),
            todo="delete it; nothing was unpacked",
        )  # fmt: skip


def _why_not(info: zipfile.ZipInfo, tops: Collection[str]) -> str:
    name, parts = info.filename, PurePosixPath(info.filename).parts
    mode = info.external_attr >> 16
    if not name.isprintable() or "\\" in name or ":" in name or name.startswith("/") or not parts or ".." in parts:
        return "is not a path below the folder"
    if PurePosixPath(name).as_posix() != name or parts[0] not in tops:
        return f"is outside of {', '.join(tops)}"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is a link or a device"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is encrypted, or compressed in an unusual way"
    return ""


def _require_room(path: Path, root: Path, infos: list[zipfile.ZipInfo]) -> None:
    to_come = sum(i.file_size for i in infos if not _has_size(root / i.filename, i.file_size))
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if to_come > free:
        raise RoadsegError(
            f"{free / 1e9:.1f} GB are free", expected=f"{to_come / 1e9:.1f} GB to unpack {path.name}", where=str(root),
            todo="free disk space and run again: the download is kept",
        )  # fmt: skip


def _has_size(path: Path, size: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, root: Path) -> None:
    target = root / info.filename
    if _has_size(target, info.file_size) and _crc(target) == info.CRC:
        return
    if target.parent == root and target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    try:
        with archive.open(info) as source, open(partial, "wb") as f:
            left = info.file_size + 1  # zipfile stops at the declared size; checked independently
            while chunk := source.read(min(_CHUNK, left)):
                f.write(chunk)
                left -= len(chunk)
            if left != 1:
                raise zipfile.BadZipFile("a member's size differs from the declared size")
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
