"""Cityscapes from its owner: by the official downloader, with the user's own account.

The official package logs in (it asks for the account, or takes what `csDownload` stored; nothing of it
passes through here), fetches with resume, and compares the MD5 that the server lists. What is added: a
package that is there already is left alone, without a login; a cut connection is gone on with; room on
the disk is looked at first; the zip is unpacked as what it is, a stranger's. While unpacking, every
file's CRC-32 is compared, and what is right already is not written again. The zips are removed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from roadseg.errors import RoadsegError
from roadseg.files import lock, sha256_file, write_atomic
from roadseg.ingest.download.unpack import Member, unpack

PACKAGES = {
    "cityscapes": ("gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"),
    "cityscapes-coarse": ("gtCoarse.zip", "leftImg8bit_trainvaltest.zip", "leftImg8bit_trainextra.zip"),
}
TREES = ("leftImg8bit", "gtFine", "gtCoarse", "license.txt", "README")  # what packages may hold at the top
NOTES = ".roadseg-download"  # below the root: zips on their way, and for each package what it put where
TIMEOUT_S = (15.0, 60.0)  # to connect, between two pieces; the official session waits for ever
ATTEMPTS = 5  # in a row that bring nothing
PAUSE_S = 2.0  # after the second of them twice that, and so on
_SERVER = "the Cityscapes server"
_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}

log = logging.getLogger(__name__)


def packages_for(source: str) -> tuple[str, ...]:
    """The packages that a source needs. KeyError for one that is not Cityscapes'."""
    return PACKAGES[source]


def download_cityscapes(root: Path, packages: Sequence[str]) -> None:
    """Brings the packages' files below `root`, whole; those that are there are not fetched again.

    A run that was stopped goes on where it was. Raises RoadsegError without the extra, offline, for a
    wrong account or one without access, for a full disk, for sums that differ and for a hostile zip.
    """
    try:
        notes = root / NOTES
        notes.mkdir(parents=True, exist_ok=True)
        with lock(notes / "lock", "the download", wait=True, say=log.warning):
            missing = [name for name in packages if not _is_there(root, name)]
            if missing:
                _fetch_all(root, missing)
    except OSError as e:
        raise RoadsegError(
            f"can't be written ({e.strerror or type(e).__name__})",
            where=str(root),
            todo="make room, or set data.root to a folder that can be written; the download goes on where it was",
        ) from None


def _is_there(root: Path, package: str) -> bool:
    """True if every file that the package put below `root` still has its size."""
    try:
        files = json.loads((root / NOTES / f"{package}.json").read_bytes())["files"]
        return all((root / path).stat().st_size == size for path, size in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fetch_all(root: Path, packages: Sequence[str]) -> None:
    official, requests = _official()
    session = _session(official, requests)
    listed = _listed(official, requests, session)
    if lacking := [name for name in packages if name not in listed]:
        raise RoadsegError(
            f"{_SERVER} lists no {', '.join(lacking)} for this account",
            expected="access to the packages",
            todo="ask for it on www.cityscapes-dataset.com",
        )
    _require_room(root, {name: listed[name] for name in packages})
    for name in packages:
        path = root / NOTES / name
        _fetch(official, requests, session, path)
        sha256 = sha256_file(path)
        members = unpack(path, root, TREES)
        _note(root, name, sha256, path.stat().st_size, members)
        path.unlink()
        log.info("%s: %s files; MD5 as the server lists it, CRC-32 of every file", name, f"{len(members):,}")


def _official() -> tuple[Any, Any]:
    """(the official downloader, requests). Imported here only: an extra."""
    try:
        return importlib.import_module("cityscapesscripts.download.downloader"), importlib.import_module("requests")
    except ImportError:
        raise RoadsegError(
            "the official downloader is not installed",
            expected="the extra cityscapes",
            todo="pip install 'roadseg[cityscapes]'",
        ) from None


def _session(official: Any, requests: Any) -> Any:
    """A session that is logged in. Its errors carry no text of the package's: it may quote what was typed."""
    try:
        session = official.login()
    except requests.RequestException as e:
        raise _unreachable(e) from None
    except EOFError:
        raise RoadsegError(
            "no account to log in with, and nobody to ask",
            todo="run `csDownload -l` in a terminal once, and let it store",
        ) from None
    except Exception as e:  # the package raises bare Exception
        if str(e) != "Bad credentials.":
            raise RoadsegError(
                f"the login failed ({type(e).__name__})", where=_SERVER, todo="try `csDownload -l`"
            ) from None
        raise RoadsegError(
            "the account or its password is wrong",
            where=_SERVER,
            todo="run again; www.cityscapes-dataset.com resets it",
        ) from None
    session.request = partial(session.request, timeout=TIMEOUT_S)
    return session


def _unreachable(e: Exception) -> RoadsegError:
    said = f"answers {_status(e)}" if _status(e) else f"can't be reached ({type(e).__name__})"
    return RoadsegError(
        f"{_SERVER} {said}", todo="look at the network and run again: the download goes on where it was"
    )


def _status(e: Exception) -> int:
    """Of an answer, as 403; 0 where there was none."""
    return getattr(getattr(e, "response", None), "status_code", 0)


def _listed(official: Any, requests: Any, session: Any) -> dict[str, int]:
    """Package to its bytes as far as the server's rounded text says them."""
    try:
        rows = official.get_available_packages(session=session)
        return {row["name"]: _bytes_of(row["size"]) for row in rows}
    except (KeyError, TypeError, ValueError):  # a page instead of the list among them
        raise RoadsegError(f"the list of {_SERVER} is none", todo="update cityscapesscripts, or try later") from None
    except requests.RequestException as e:
        raise _unreachable(e) from None


def _bytes_of(size: str) -> int:
    return int(float(size[:-2]) * _UNITS[size[-2:].upper()])


def _require_room(root: Path, sizes: dict[str, int]) -> None:
    """For all that is still to come, and the largest zip beside it; a package unpacks to about its own size."""
    zips = [root / NOTES / name for name in sizes]
    there = sum(path.stat().st_size for path in zips if path.exists())
    needed = int(1.1 * sum(sizes.values())) + max(sizes.values()) - there
    free = shutil.disk_usage(root).free
    if free < needed:
        raise RoadsegError(
            f"{free / 1e9:.1f} GB are free",
            expected=f"about {needed / 1e9:.1f} GB for {', '.join(sizes)}",
            where=str(root),
            todo="make room, or set data.root to another disk",
        )


def _fetch(official: Any, requests: Any, session: Any, path: Path) -> None:
    """The whole zip, its MD5 compared. Goes on after cuts as long as more comes; once anew if the sum differs."""
    failures, again = 0, False
    while True:
        before = _shorten(path)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the package prints; our stdout is for programs
                official.download_packages(
                    session=session, package_names=[path.name], destination_path=str(path.parent), resume=True
                )
            return
        except requests.RequestException as e:
            if _status(e) == 416 and before and not again:  # more is here than the package has
                again = _anew(path)
                continue
            failures = 0 if path.exists() and path.stat().st_size > before + 1 else failures + 1
            if failures == ATTEMPTS or 400 <= _status(e) < 500:
                raise _unreachable(e) from None
            log.warning("%s: cut off (%s); going on", path.name, type(e).__name__)
            time.sleep(PAUSE_S * failures)
        except OSError:
            raise
        except Exception as e:  # the package raises bare Exception
            if "MD5" not in str(e):
                raise RoadsegError(f"the download failed ({type(e).__name__})", where=path.name) from None
            if again or not before:
                path.unlink()
                raise RoadsegError(
                    "the MD5 sum is not the one that the server lists", where=path.name, todo="run again, or report it"
                ) from None
            again = _anew(path)


def _anew(path: Path) -> bool:
    log.warning("%s: what was there did not fit; fetching it anew", path.name)
    path.unlink()
    return True


def _shorten(path: Path) -> int:
    """Bytes that are there, less the last one: a server answers 416 to who asks for nothing more."""
    size = path.stat().st_size if path.exists() else 0
    if size:
        with open(path, "r+b") as f:
            f.truncate(size - 1)
    return max(0, size - 1)


def _note(root: Path, package: str, sha256: str, size: int, members: Sequence[Member]) -> None:
    files = [[m.path, m.size] for m in members if "/" in m.path]  # not README, which every package has its own of
    record = {"package": package, "sha256": sha256, "bytes": size, "files": files}
    write_atomic(root / NOTES / f"{package}.json", json.dumps(record).encode())
