"""The official Cityscapes downloader with a local server, and unsafe zips."""

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import requests
from cityscapesscripts.download import downloader

from roadseg.errors import RoadsegError
from roadseg.files import lock
from roadseg.ingest.download import cityscapes as download
from roadseg.ingest.download import unpack
from roadseg.ingest.download.cityscapes import NOTES, TREES, download_cityscapes, packages_for

Files = dict[str, bytes]
IMAGES: Files = {f"leftImg8bit/train/ulm/ulm_{i:06d}.png": os.urandom(3000) for i in range(8)}
LABELS: Files = {f"gtFine/train/ulm/ulm_{i:06d}.png": os.urandom(500) for i in range(8)}
IMAGES_ZIP, LABELS_ZIP = "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"


def zipped(path: Path, files: Files, also: Callable[[zipfile.ZipFile], None] = lambda z: None) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"README": b"of " + path.name.encode(), **files}.items():
            archive.writestr(name, data)
        also(archive)
    return path.read_bytes()


@dataclass
class Server:
    """A fake site: its packages, its faults, and the requests it got."""

    packages: dict[str, bytes]
    port: int = 0
    cut: list[int] = field(default_factory=list)  # bytes after which the next responses are cut off
    ranges: bool = True
    status: int = 200  # of downloads
    md5: str = ""
    listing: bytes = b""
    asked: list[str] = field(default_factory=list)
    logins: int = 0


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    names = list(server.packages)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlparse(self.path)
            if url.path == "/downloads/":
                rows = [
                    {"name": n, "packageID": str(i), "size": f"{max(1, len(server.packages[n]) >> 10)}KB"}
                    for i, n in enumerate(names)
                ]
                self.answer(server.listing or json.dumps(rows).encode())
                return
            name = names[int(parse_qs(url.query)["packageID"][0])]
            data = server.packages[name]
            if url.path == "/md5-sum/":
                self.answer(f"{server.md5 or hashlib.md5(data).hexdigest()}  {name}\n".encode())
                return
            wanted = self.headers.get("Range", "")
            server.asked.append(f"{name} {wanted}")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
            if start and start >= len(data):
                self.answer(b"", 416)
            else:
                status = server.status if server.status != 200 else 206 if start else 200
                self.answer(data[start:], status, server.cut.pop(0) if server.cut else None)

        def answer(self, data: bytes, status: int = 200, cut: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data[:cut])
            self.close_connection = True

    return Handler


class Rerouted(requests.Session):
    """Redirect requests for the site to the local server."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.trust_env, self.port = False, port
        self.headers["Connection"] = "close"

    def request(self, method, url, *args, **kwargs):  # type: ignore[no-untyped-def]
        assert kwargs.get("timeout") == download.TIMEOUT_S
        site = "https://www.cityscapes-dataset.com"
        assert url.startswith(site)
        return super().request(method, url.replace(site, f"http://127.0.0.1:{self.port}"), *args, **kwargs)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip os.sync, which waits for all other writes of the machine."""
    monkeypatch.setattr(unpack.os, "sync", lambda: None)  # type: ignore[attr-defined]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = tmp_path.with_name(tmp_path.name + "-made")
    made.mkdir()
    packages = {IMAGES_ZIP: zipped(made / IMAGES_ZIP, IMAGES), LABELS_ZIP: zipped(made / LABELS_ZIP, LABELS)}
    state = Server(packages)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.port = httpd.server_port
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    sessions = []

    def login() -> requests.Session:
        state.logins += 1
        sessions.append(Rerouted(state.port))
        return sessions[-1]

    monkeypatch.setattr(downloader, "login", login)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    yield state
    for session in sessions:
        session.close()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def is_whole(root: Path, files: Files) -> bool:
    return all((root / name).read_bytes() == data for name, data in files.items())


def leftovers(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.name.endswith((".zip", ".part", ".tmp")))


def test_packages_are_downloaded_and_unpacked_once(server, tmp_path):
    root = tmp_path / "data" / "cityscapes"
    download_cityscapes(root, packages_for("cityscapes"))
    assert is_whole(root, {**IMAGES, **LABELS}) and leftovers(root) == []
    assert server.asked == [f"{LABELS_ZIP} bytes=0-", f"{IMAGES_ZIP} bytes=0-"] and server.logins == 1
    download_cityscapes(root, packages_for("cityscapes"))
    assert server.logins == 1 and len(server.asked) == 2
    (root / next(iter(LABELS))).unlink()
    download_cityscapes(root, packages_for("cityscapes"))
    assert is_whole(root, LABELS) and server.asked[2:] == [f"{LABELS_ZIP} bytes=0-"]


def test_a_lost_connection_is_resumed(server, tmp_path):
    server.cut = [0, 1000, 10_000, 5]
    download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert is_whole(tmp_path, IMAGES)
    starts = [int(asked.partition("bytes=")[2].rstrip("-")) for asked in server.asked]
    assert starts[:3] == [0, 0, 0] and all(9_000 < start < 10_000 for start in starts[3:]) and len(starts) == 5


def test_a_stopped_download_is_resumed_and_a_complete_zip_is_kept(server, tmp_path):
    whole = server.packages[IMAGES_ZIP]
    for present in (whole[:9000], whole):
        root = tmp_path / str(len(present))
        (root / NOTES).mkdir(parents=True)
        (root / NOTES / IMAGES_ZIP).write_bytes(present)
        download_cityscapes(root, [IMAGES_ZIP])
        assert is_whole(root, IMAGES) and server.asked[-1] == f"{IMAGES_ZIP} bytes={len(present) - 1}-"


@pytest.mark.parametrize("why", ["other bytes", "longer", "a server without ranges"])
def test_a_partial_file_that_does_not_match_is_downloaded_again(server, tmp_path, why):
    (tmp_path / NOTES).mkdir()
    whole = server.packages[IMAGES_ZIP]
    present = {"other bytes": b"x" * 500, "longer": whole + b"more", "a server without ranges": whole[:500]}[why]
    server.ranges = why != "a server without ranges"
    (tmp_path / NOTES / IMAGES_ZIP).write_bytes(present)
    download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert is_whole(tmp_path, IMAGES) and server.asked[-1] == f"{IMAGES_ZIP} bytes=0-"


def test_a_wrong_md5_is_refused_before_unpacking(server, tmp_path):
    server.md5 = "0" * 32
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert e.value.where == IMAGES_ZIP and "MD5" in e.value.found
    assert not (tmp_path / "leftImg8bit").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("status", [403, 500])
def test_server_errors_are_reported(server, tmp_path, status):
    server.status = status
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert str(status) in e.value.found
    assert len(server.asked) == (1 if status == 403 else download.ATTEMPTS)


def test_missing_access_and_malformed_lists_are_reported(server, tmp_path):
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path, packages_for("cityscapes-coarse"))
    assert "gtCoarse.zip, leftImg8bit_trainextra.zip" in e.value.found
    for listing in (b"<html>", b"{}x", b'[{"name": 1}]', b'[{"name": "a", "size": "3 km"}]'):
        server.listing = listing
        with pytest.raises(RoadsegError) as e:
            download_cityscapes(tmp_path, [IMAGES_ZIP])
        assert "cityscapesscripts" in e.value.todo


def raising(error: BaseException) -> Callable[[], None]:
    def login() -> None:
        raise error

    return login


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (requests.ConnectionError("password=secret"), r"ConnectionError"),
        (requests.Timeout("secret"), "cannot be reached (Timeout)"),
        (EOFError(), "no stored account"),
        (Exception("Bad credentials."), "the account or its password is wrong"),
        (Exception("secret"), "the login failed (Exception)"),
    ],
)
def test_a_failed_login_is_reported_without_credentials(server, tmp_path, monkeypatch, error, expected):
    monkeypatch.setattr(downloader, "login", raising(error))
    with pytest.raises(RoadsegError) as caught:
        download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert expected in caught.value.found and "secret" not in str(caught.value) and caught.value.__suppress_context__


def test_a_missing_extra_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cityscapesscripts.download.downloader", None)
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert "roadseg[cityscapes]" in e.value.todo


def test_complete_packages_need_no_network(server, tmp_path, monkeypatch):
    download_cityscapes(tmp_path, [LABELS_ZIP])
    monkeypatch.setattr(downloader, "login", raising(requests.ConnectionError()))
    download_cityscapes(tmp_path, [LABELS_ZIP])


def test_disk_space_is_checked_before_downloading(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path, [IMAGES_ZIP])
    assert e.value.where == str(tmp_path) and IMAGES_ZIP in e.value.expected
    assert server.asked == []


def test_an_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RoadsegError) as e:
        download_cityscapes(tmp_path / "file", [IMAGES_ZIP])
    assert e.value.where == str(tmp_path / "file") and e.value.todo


def test_two_runs_download_once(server, tmp_path):
    waiting = threading.Thread(target=download_cityscapes, args=(tmp_path, [LABELS_ZIP]))
    (tmp_path / NOTES).mkdir()
    with lock(tmp_path / NOTES / "lock", "the download", wait=False):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and server.asked == []
    waiting.join()
    download_cityscapes(tmp_path, [LABELS_ZIP])
    assert len(server.asked) == 1


def member(name: str, mode: int = 0o100644, **more: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in more.items():
        setattr(info, key, value)
    return info


HOSTILE = {
    "above": (member("gtFine/../../x"), "is not a path below"),
    "absolute": (member("/gtFine/x"), "is not a path below"),
    "backslash": (member("gtFine\\..\\..\\x"), "is not a path below"),
    "drive": (member("C:gtFine/x"), "is not a path below"),
    "control": (member("gtFine/\x1b[31m"), "is not a path below"),
    "elsewhere": (member("etc/passwd"), "is outside of leftImg8bit, gtFine"),
    "hidden notes": (member(f"{NOTES}/gtFine_trainvaltest.zip.json"), "is outside of"),
    "crooked": (member("gtFine//x"), "is outside of"),
    "link": (member("gtFine/x", stat.S_IFLNK | 0o777), "is a link or a device"),
    "device": (member("gtFine/x", stat.S_IFCHR), "is a link or a device"),
    "doubled": (member("gtFine/train/ulm/ULM_000000.png"), "contains a name twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_unsafe_zips_are_refused_before_writing(tmp_path, name):
    info, expected = HOSTILE[name]
    path, root = tmp_path / "a.zip", tmp_path / "root"
    root.mkdir()
    zipped(path, LABELS, lambda z: z.writestr(info, b"bad"))
    with pytest.raises(RoadsegError) as e:
        unpack.unpack(path, root, TREES)
    assert e.value.where == str(path) and expected in e.value.found
    assert list(root.iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "root"]


def test_zip_bombs_are_refused(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", {"gtFine/a.png": b"\0" * 50_000_000})
    (tmp_path / "root").mkdir()
    with pytest.raises(RoadsegError) as e:
        unpack.unpack(tmp_path / "a.zip", tmp_path / "root", TREES)
    assert "50,000,008" in e.value.found
    monkeypatch.setattr(unpack, "MAX_FILES", 5)
    zipped(tmp_path / "b.zip", LABELS)
    with pytest.raises(RoadsegError) as e:
        unpack.unpack(tmp_path / "b.zip", tmp_path / "root", TREES)
    assert "9 files" in e.value.found
    assert list((tmp_path / "root").iterdir()) == []


def test_a_member_larger_than_declared_is_not_written(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gtFine/a.png", bytes(range(256)) * 200)
    data = path.read_bytes()
    path.write_bytes(data.replace((51_200).to_bytes(4, "little"), (512).to_bytes(4, "little")))
    with pytest.raises(RoadsegError) as e:
        unpack.unpack(path, tmp_path, TREES)
    assert e.value.where == str(path)
    assert [p.name for p in (tmp_path / "gtFine").iterdir()] == []


@pytest.mark.parametrize("at", [100, 2000, -3000, -200])
def test_a_damaged_member_is_not_written(tmp_path, at):
    path = tmp_path / "a.zip"
    data = bytearray(zipped(path, IMAGES))
    data[at] ^= 4
    path.write_bytes(data)
    try:
        unpack.unpack(path, tmp_path, TREES)
    except RoadsegError as e:
        assert "damaged" in str(e) or "refused" in str(e)
    assert leftovers(tmp_path) == ["a.zip"]
    assert all(p.read_bytes() == IMAGES.get(str(p.relative_to(tmp_path))) for p in tmp_path.rglob("*.png"))


def test_only_missing_and_differing_files_are_written(tmp_path):
    zipped(tmp_path / "a.zip", LABELS)
    same, other, *_ = LABELS
    for name, data in ((same, LABELS[same]), (other, b"x" * len(LABELS[other])), ("README", b"mine")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    before = (tmp_path / same).stat()
    unpack.unpack(tmp_path / "a.zip", tmp_path, TREES)
    assert is_whole(tmp_path, LABELS) and (tmp_path / "README").read_bytes() == b"mine"
    assert (tmp_path / same).stat().st_ino == before.st_ino


def test_disk_space_is_checked_before_unpacking(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", LABELS)
    monkeypatch.setattr(unpack.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=512))  # type: ignore[attr-defined]
    with pytest.raises(RoadsegError) as e:
        unpack.unpack(tmp_path / "a.zip", tmp_path, TREES)
    assert e.value.where == str(tmp_path) and "a.zip" in e.value.expected
    assert not (tmp_path / "gtFine").exists()


def test_any_damage_of_a_zip_is_a_roadseg_error(tmp_path):
    whole = zipped(tmp_path / "a.zip", {"gtFine/a.png": bytes(range(200)), "gtFine/b.png": b"b"})
    rng, reported = np.random.default_rng(0), Counter[str]()
    for i in range(400):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 1 + i % 3):
            data[at] = rng.choice([0, 1, 127, 255, data[at] ^ 1])
        (tmp_path / "a.zip").write_bytes(data)
        (tmp_path / f"{i}").mkdir()
        try:
            unpack.unpack(tmp_path / "a.zip", tmp_path / f"{i}", TREES)
        except RoadsegError as e:
            reported[e.found.split(" (")[0].split(":")[0]] += 1
    assert reported["is damaged"] > 100 and set(reported) <= {"is damaged", "unsafe zip"}


def test_disk_errors_are_not_reported_as_damage(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", LABELS)

    def write(error: Exception) -> Callable[..., None]:
        def fails(*args: object) -> None:
            raise error

        return fails

    for error in (OSError(errno.EINVAL, "Invalid argument"), IndexError(), struct.error(), ValueError()):
        monkeypatch.setattr(unpack, "_write", write(error))
        with pytest.raises(RoadsegError) as e:
            unpack.unpack(tmp_path / "a.zip", tmp_path, TREES)
        assert e.value.where == str(tmp_path / "a.zip")
    for errno_, name in ((errno.ENOSPC, None), (errno.EINVAL, "a:b")):
        monkeypatch.setattr(unpack, "_write", write(OSError(errno_, "no", name)))
        with pytest.raises(OSError) as caught:
            unpack.unpack(tmp_path / "a.zip", tmp_path, TREES)
        assert caught.value.errno == errno_
