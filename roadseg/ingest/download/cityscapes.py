"""Download Cityscapes with the official downloader and the user's own account.

The official package (`cityscapesscripts`) logs in, downloads with resume, and checks the MD5 that the server lists.
It asks for the account or reads what `csDownload` stored; no credentials pass through this module. Added here:
- complete packages are skipped, without a login;
- an interrupted connection is resumed;
- free disk space is checked before;
- zips are unpacked defensively (unpack.py) with a CRC-32 check of every file, and removed afterwards.
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
TREES = ("leftImg8bit", "gtFine", "gtCoarse", "license.txt", "README")  # allowed top-level names in a package
NOTES = ".roadseg-download"  # below the root: partial zips, and a record of each unpacked package's files
TIMEOUT_S = (15.0, 60.0)  # (connect, read); the official session has no timeout
ATTEMPTS = 5  # attempts in a row that receive nothing
PAUSE_S = 2.0  # times the number of such attempts so far
_SERVER = "the Cityscapes server"

log = logging.getLogger(__name__)


def packages_for(source: str) -> tuple[str, ...]:
    """The packages that a source needs. Raises KeyError for a source other than Cityscapes."""
    return PACKAGES[source]


def download_cityscapes(root: Path, packages: Sequence[str]) -> None:
    """Download and unpack the packages below `root`; complete packages are skipped, partial ones resumed.

    Raises RoadsegError if the extra is not installed, the server is unreachable, the account is wrong or lacks
    access, the disk is full, a checksum differs, or a zip is unsafe.
    """
    try:
        notes = root / NOTES
        notes.mkdir(parents=True, exist_ok=True)
        with lock(notes / "lock", "the download", wait=True, say=log.warning):
            missing = [name for name in packages if not _is_complete(root, name)]
            if missing:
                _fetch_all(root, missing)
    except OSError as e:
        raise RoadsegError(
            f"cannot be written ({e.strerror or type(e).__name__})",
            where=str(root),
            todo="free disk space, or set data.root to a writable folder; the next run resumes the download",
        ) from None


def _is_complete(root: Path, package: str) -> bool:
    """True if every file unpacked from the package exists with its recorded size."""
    try:
        files = json.loads((root / NOTES / f"{package}.json").read_bytes())["files"]
        return all((root / path).stat().st_size == size for path, size in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fetch_all(root: Path, packages: Sequence[str]) -> None:
    official, requests = _import_official()
    session = _log_in(official, requests)
    sizes = _package_sizes(official, requests, session)
    if lacking := [name for name in packages if name not in sizes]:
        raise RoadsegError(
            f"{_SERVER} lists no {', '.join(lacking)} for this account",
            expected="access to the packages",
            todo="request access on www.cityscapes-dataset.com",
        )
    _require_disk_space(root, {name: sizes[name] for name in packages})
    for name in packages:
        path = root / NOTES / name
        _fetch(official, requests, session, path)
        sha256 = sha256_file(path)
        members = unpack(path, root, TREES)
        _record(root, name, sha256, path.stat().st_size, members)
        path.unlink()
        log.info("%s: %s files unpacked, MD5 and CRC-32 verified", name, f"{len(members):,}")


def _import_official() -> tuple[Any, Any]:
    """(the official downloader, requests), imported lazily because they are an extra."""
    try:
        return importlib.import_module("cityscapesscripts.download.downloader"), importlib.import_module("requests")
    except ImportError:
        raise RoadsegError(
            "the official downloader is not installed",
            expected="the extra cityscapes",
            todo="pip install 'roadseg[cityscapes]'",
        ) from None


def _log_in(official: Any, requests: Any) -> Any:
    """Return a logged-in session. Errors omit the package's own text, which may quote the password."""
    try:
        session = official.login()
    except requests.RequestException as e:
        raise _unreachable(e) from None
    except EOFError:
        raise RoadsegError(
            "no stored account, and no terminal to ask for it",
            todo="run `csDownload -l` in a terminal once and let it store the account",
        ) from None
    except Exception as e:  # the package raises bare Exception
        if str(e) != "Bad credentials.":
            raise RoadsegError(
                f"the login failed ({type(e).__name__})", where=_SERVER, todo="try `csDownload -l`"
            ) from None
        raise RoadsegError(
            "the account or its password is wrong",
            where=_SERVER,
            todo="run again; the password can be reset on www.cityscapes-dataset.com",
        ) from None
    session.request = partial(session.request, timeout=TIMEOUT_S)
    return session


def _unreachable(e: Exception) -> RoadsegError:
    problem = f"answers {_status(e)}" if _status(e) else f"cannot be reached ({type(e).__name__})"
    return RoadsegError(f"{_SERVER} {problem}", todo="check the network and run again: the download is resumed")


def _status(e: Exception) -> int:
    """The HTTP status, such as 403; 0 without a response."""
    return getattr(getattr(e, "response", None), "status_code", 0)


def _package_sizes(official: Any, requests: Any, session: Any) -> dict[str, float]:
    """Approximate bytes by package name, from the server's rounded sizes."""
    try:
        rows = official.get_available_packages(session=session)
        return {row["name"]: official.parse_size_to_bytes(row["size"]) for row in rows}
    except (KeyError, TypeError, ValueError, AttributeError):  # such as a login page instead of JSON
        raise RoadsegError(
            f"the package list of {_SERVER} is not readable", todo="update cityscapesscripts, or try later"
        ) from None
    except requests.RequestException as e:
        raise _unreachable(e) from None


def _require_disk_space(root: Path, sizes: dict[str, float]) -> None:
    """Require space for all unpacked packages and the largest zip; a package unpacks to about its own size."""
    zips = [root / NOTES / name for name in sizes]
    downloaded = sum(path.stat().st_size for path in zips if path.exists())
    needed = 1.1 * sum(sizes.values()) + max(sizes.values()) - downloaded
    free = shutil.disk_usage(root).free
    if free < needed:
        raise RoadsegError(
            f"{free / 1e9:.1f} GB are free",
            expected=f"about {needed / 1e9:.1f} GB for {', '.join(sizes)}",
            where=str(root),
            todo="free disk space, or set data.root to another disk",
        )


def _fetch(official: Any, requests: Any, session: Any, path: Path) -> None:
    """Download the complete zip and check its MD5.

    Interrupted connections are resumed as long as data arrives. A partial file that does not fit the package is
    downloaded again once.
    """
    failures, restarted = 0, False
    while True:
        resumed_at = _drop_last_byte(path)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the package prints; our stdout is for programs
                official.download_packages(
                    session=session, package_names=[path.name], destination_path=str(path.parent), resume=True
                )
            return
        except requests.RequestException as e:
            problem = _unreachable(e)
            if _status(e) != 416:  # 416: the partial file is longer than the package
                failures = 0 if path.exists() and path.stat().st_size > resumed_at + 1 else failures + 1
                if failures == ATTEMPTS or 400 <= _status(e) < 500:
                    raise problem from None
                log.warning("%s: connection lost (%s); resuming", path.name, type(e).__name__)
                time.sleep(PAUSE_S * failures)
                continue
        except OSError:
            raise
        except Exception as e:  # the package raises bare Exception
            if "MD5" not in str(e):
                raise RoadsegError(f"the download failed ({type(e).__name__})", where=path.name) from None
            problem = RoadsegError("the MD5 differs from the server's", where=path.name, todo="run again, or report it")
        path.unlink(missing_ok=True)
        if restarted or not resumed_at:
            raise problem
        restarted = True
        log.warning("%s: the partial file does not match the package; downloading it again", path.name)


def _drop_last_byte(path: Path) -> int:
    """Shorten a partial file by one byte and return its size: servers answer 416 to a request for zero bytes."""
    size = path.stat().st_size if path.exists() else 0
    if size:
        with open(path, "r+b") as f:
            f.truncate(size - 1)
    return max(0, size - 1)


def _record(root: Path, package: str, sha256: str, size: int, members: Sequence[Member]) -> None:
    files = [[m.path, m.size] for m in members if "/" in m.path]  # without README, as each package has its own
    record = {"package": package, "sha256": sha256, "bytes": size, "files": files}
    write_atomic(root / NOTES / f"{package}.json", json.dumps(record).encode())
