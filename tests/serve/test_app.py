"""The real server process over loopback, serving a tiny graph; no torch is needed."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from roadseg.config.sections import Serve
from roadseg.errors import ArchiveError, UsageError
from roadseg.images.decode import Limits, read_image
from roadseg.inference.predictor import Predictor
from roadseg.release.archive import load_release, load_release_folder
from roadseg.serve.app import container_release, container_settings, run
from roadseg.serve.model import Model
from tests.conftest import RGB

MAX_BODY, MAX_PIXELS = 300_000, 60_000

SERVE = """
import sys
from pathlib import Path
from roadseg.config.sections import Serve
from roadseg.serve.app import serve
serve(Path(sys.argv[1]), Serve.model_validate_json(sys.argv[2]), say=lambda text: print(text, flush=True))
"""

# The same server, but loading and every answer wait until the test makes a file.
GATED = """
import sys, time, uuid
from pathlib import Path
from roadseg.config.sections import Serve
from roadseg.serve.app import create_app, run
from roadseg.serve.model import load_predictor

gates = Path(sys.argv[3])

def wait_for(name):
    while not (gates / name).exists():
        time.sleep(0.01)

class Gated:
    def __init__(self, predictor):
        self.predictor, self.release, self.label_set = predictor, predictor.release, predictor.label_set

    def __call__(self, image):
        if image.shape != (64, 64, 3):
            (gates / f"inside-{uuid.uuid4()}").touch()
            wait_for("answer")
        return self.predictor(image)

def load():
    wait_for("load")
    return Gated(load_predictor(Path(sys.argv[1]), 1))

settings = Serve.model_validate_json(sys.argv[2])
app = create_app(load, settings, workers=1, body_deadline_s=1.0)
run(app, settings, lambda text: print(text, flush=True))
"""


@pytest.fixture(scope="session")
def archive(release_path: Path) -> Path:
    return release_path


@pytest.fixture(scope="module")
def predictor(archive: Path) -> Predictor:
    return Predictor(load_release(archive), threads=1)


class Server:
    def __init__(self, script: str, archive: Path, log: Path, *more: str, **settings: int) -> None:
        wanted = Serve(port=0, threads=1, **settings)
        self.log_path = log
        self._log = open(log, "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(archive), wanted.model_dump_json(), *more],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.process.stdout
        said = self.process.stdout.readline().strip()
        assert said.startswith("listening on http://127.0.0.1:"), self.log
        self.port = int(said.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ask(
        self, method: str = "GET", path: str = "/ping", body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Headers come back with lower-case names."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def send(self, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask("POST", "/invocations", body, **{"Content_Type": "image/png", **headers})

    def wait_for_ping(self, status: int) -> None:
        until = time.monotonic() + 30
        while (found := self.ask()[0]) != status:
            assert time.monotonic() < until, f"/ping stays {found}\n{self.log}"
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._log.close()


@contextmanager
def started(*args: str | Path, **settings: int) -> Iterator[Server]:
    server = Server(*args, **settings)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with started(SERVE, archive, log, max_body_bytes=MAX_BODY, max_pixels=MAX_PIXELS, max_queue=32) as server:
        server.wait_for_ping(200)
        yield server


def photo(width: int = 90, height: int = 61, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])


def encoded(pixels: np.ndarray, format_: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format_, **options)
    return out.getvalue()


def decoded(png: bytes) -> tuple[np.ndarray, list[int]]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "P" and image.format == "PNG"
        return np.array(image), image.getpalette() or []


def upright(body: bytes) -> np.ndarray:
    return read_image(body, Limits())


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format_", ["png", "jpeg"])
def test_answer_is_the_predictors(server: Server, predictor: Predictor, format_: str) -> None:
    body = encoded(photo(), format_)
    status, headers, png = server.send(body, Content_Type=f"image/{format_}")
    label, palette = decoded(png)
    assert status == 200 and headers["content-type"] == "image/png"
    assert np.array_equal(label, predictor(upright(body)))
    assert len(np.unique(label)) == 3
    assert palette[:9] == [200, 0, 0, 0, 200, 0, 0, 0, 200] and not any(palette[9:])
    assert (headers["x-roadseg-width"], headers["x-roadseg-height"]) == ("90", "61")
    digest = predictor.release.digest
    assert headers["x-roadseg-release"] == digest
    assert headers["x-amzn-sagemaker-custom-attributes"] == f"width=90;height=61;release={digest}"


def test_rotated_photo_is_answered_upright(server: Server, predictor: Predictor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(photo(80, 40), "jpeg", exif=exif)
    status, headers, png = server.send(body)
    label, _ = decoded(png)
    assert status == 200 and label.shape == (80, 40)
    assert (headers["x-roadseg-width"], headers["x-roadseg-height"]) == ("40", "80")
    assert np.array_equal(label, predictor(upright(body)))


def test_label_ids(predictor: Predictor) -> None:
    model = Model(lambda: predictor, "labelIds")
    model.load()
    body = encoded(photo())
    label, palette = decoded(bytes(model.answer(body, Limits()).body))
    expected = predictor(photo())
    for train_id, c in enumerate(RGB.trained):
        assert np.array_equal(label == c.id, expected == train_id)
    for c in RGB.classes:
        assert tuple(palette[3 * c.id : 3 * c.id + 3]) == c.color


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "IMAGE/PNG; q=1", "image/*", "application/octet-stream", "application/x-image", ""]
)
def test_accepted_types(server: Server, content_type: str) -> None:
    headers = {"Content_Type": content_type} if content_type else {}
    assert server.ask("POST", "/invocations", encoded(photo()), **headers)[0] == 200


# ── refusals ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "content_type"),
    [
        (400, "POST", "/invocations", b"", "image/png"),
        (400, "POST", "/invocations", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "application/octet-stream"),
        (400, "POST", "/invocations", encoded(photo())[:-100], "image/png"),
        (400, "POST", "/invocations", encoded(photo(), "jpeg")[:300], "image/jpeg"),
        (415, "POST", "/invocations", encoded(photo(), "bmp"), "image/bmp"),
        (415, "POST", "/invocations", encoded(photo()), "multipart/form-data; boundary=x"),
        (415, "POST", "/invocations", b"{}", "application/json"),
        (413, "POST", "/invocations", encoded(np.zeros((300, 300, 3), np.uint8)), "image/png"),
        (413, "POST", "/invocations", bytes(MAX_BODY + 1), "image/png"),
        (405, "GET", "/invocations", None, ""),
        (405, "POST", "/ping", b"", ""),
        (404, "GET", "/docs", None, ""),
        (404, "GET", "/openapi.json", None, ""),
        (404, "POST", "/invocations/", b"", ""),
    ],
)
def test_refused(server: Server, status: int, method: str, path: str, body: bytes | None, content_type: str) -> None:
    found, headers, answer = server.ask(method, path, body, **({"Content_Type": content_type} if content_type else {}))
    assert found == status
    assert headers["content-type"] == "application/json"
    reason = json.loads(answer)
    assert list(reason) == ["error"] and len(reason["error"]) > 8
    assert not any(leak in reason["error"] for leak in ("Traceback", "0x", ".py", "/tmp", "site-packages"))
    assert status != 405 or headers["allow"] in ("GET", "POST")


def test_compressed_body_is_refused(server: Server) -> None:
    assert server.send(encoded(photo()), Content_Encoding="gzip")[0] == 415


def test_a_body_at_the_limit_is_read(server: Server) -> None:
    body = encoded(photo())
    padded = body + bytes(MAX_BODY - len(body))
    status, _, answer = server.send(padded)
    assert status != 413, answer


def raw(server: Server, head: str) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    s.sendall(f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{head}\r\n".encode())
    return s


def test_too_long_a_content_length_is_refused_before_the_body(server: Server) -> None:
    with raw(server, "Content-Length: 10000000000\r\n") as s:
        assert s.recv(100).startswith(b"HTTP/1.1 413 ")


def memory_kib(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_endless_chunked_body_is_refused_without_being_kept(server: Server) -> None:
    before = memory_kib(server)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with raw(server, "Transfer-Encoding: chunked\r\n") as s:
        for _ in range(1024):  # 64 MiB
            s.sendall(chunk)
        s.sendall(b"0\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 413 ")
    assert memory_kib(server) - before < 32 * 1024


def test_disconnected_clients_free_their_slots(server: Server) -> None:
    for _ in range(60):  # more than there are places
        with raw(server, "Content-Length: 1000\r\n") as s:
            s.sendall(b"\x89PNG")
    until = time.monotonic() + 10
    while '"status": 499' not in server.log and time.monotonic() < until:
        time.sleep(0.05)
    assert server.send(encoded(photo()))[0] == 200


# ── load ────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_at_once(server: Server, predictor: Predictor) -> None:
    photos = [photo(100 + i, 90, seed=i) for i in range(20)]
    slowest_ping_s, done = 0.0, threading.Event()

    def ping() -> None:
        nonlocal slowest_ping_s
        while not done.is_set():
            began = time.monotonic()
            assert server.ask()[0] == 200
            slowest_ping_s = max(slowest_ping_s, time.monotonic() - began)

    with ThreadPoolExecutor(21) as pool:
        pinging = pool.submit(ping)
        answers = list(pool.map(lambda p: server.send(encoded(p)), photos))
        done.set()
        pinging.result(timeout=30)
    for pixels, (status, _, png) in zip(photos, answers, strict=True):
        assert status == 200 and np.array_equal(decoded(png)[0], predictor(pixels))
    assert 0 < slowest_ping_s < 2


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    folder = tmp_path / "gates"
    folder.mkdir()
    return folder


def wait_until_full(server: Server) -> tuple[int, dict[str, str], bytes]:
    """Until every place is taken; the refusal. The empty bodies sent meanwhile never wait."""
    until = time.monotonic() + 30
    while (refusal := server.send(b""))[0] != 503:
        assert time.monotonic() < until
        time.sleep(0.01)
    return refusal


def send_until_taken(server: Server, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer; one of the empty bodies may hold the place that this one asks for, for a moment."""
    while (answer := server.send(body))[0] == 503:
        time.sleep(0.01)
    return answer


def test_loading_then_overload(archive: Path, gates: Path, tmp_path: Path) -> None:
    body = encoded(photo())
    with started(GATED, archive, tmp_path / "log", str(gates), max_queue=2) as server:
        assert server.ask()[0] == 503
        status, headers, answer = server.send(body)
        assert status == 503 and headers["retry-after"] and "loaded" in json.loads(answer)["error"]
        (gates / "load").touch()
        server.wait_for_ping(200)

        with ThreadPoolExecutor(3) as pool:
            first = [pool.submit(send_until_taken, server, body) for _ in range(3)]  # one inside, two waiting
            _, headers, answer = wait_until_full(server)
            assert headers["retry-after"] and "waiting" in json.loads(answer)["error"]
            until = time.monotonic() + 30
            while not list(gates.glob("inside-*")):
                assert time.monotonic() < until
                time.sleep(0.01)
            assert len(list(gates.glob("inside-*"))) == 1
            began = time.monotonic()
            assert server.ask()[0] == 200 and time.monotonic() - began < 2
            (gates / "answer").touch()
            assert [f.result(timeout=30)[0] for f in first] == [200] * 3
        assert server.send(body)[0] == 200


def test_a_slow_body_times_out(archive: Path, gates: Path, tmp_path: Path) -> None:
    (gates / "load").touch()
    with started(GATED, archive, tmp_path / "log", str(gates)) as server:
        server.wait_for_ping(200)
        with raw(server, "Content-Length: 1000\r\n") as s:
            s.sendall(b"\x89PNG")
            assert s.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_release_that_cannot_be_loaded_is_never_ready(tmp_path: Path) -> None:
    damaged = tmp_path / "model.tar.gz"
    damaged.write_bytes(b"no archive")
    with started(SERVE, damaged, tmp_path / "log") as server:
        until = time.monotonic() + 30
        while b"could not be loaded" not in (found := server.ask())[2]:
            assert found[0] == 503 and time.monotonic() < until
            time.sleep(0.02)
        status, _, answer = server.send(encoded(photo()))
        assert status == 503 and str(tmp_path) not in answer.decode()
        assert "not a gzip file; expected a model.tar.gz" in server.log


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_admitted_request(
    archive: Path, gates: Path, tmp_path: Path, predictor: Predictor, number: signal.Signals
) -> None:
    (gates / "load").touch()
    with started(GATED, archive, tmp_path / "log", str(gates), max_queue=3) as server:
        server.wait_for_ping(200)
        photos = [photo(seed=i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(send_until_taken, server, encoded(p)) for p in photos]
            wait_until_full(server)
            os.kill(server.process.pid, number)
            until = time.monotonic() + 10
            while time.monotonic() < until:
                try:
                    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
                except ConnectionRefusedError:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("still accepting after the signal")
            time.sleep(0.5)
            assert server.process.poll() is None, "it did not wait for the requests inside"
            (gates / "answer").touch()
            for pixels, answer in zip(photos, answers, strict=True):
                status, _, png = answer.result(timeout=25)
                assert status == 200 and np.array_equal(decoded(png)[0], predictor(pixels))
        assert server.process.wait(timeout=25) == 0, server.log
        assert "Traceback" not in server.log


def test_an_idle_server_ends_at_once(archive: Path, tmp_path: Path) -> None:
    with started(SERVE, archive, tmp_path / "log") as server:
        server.wait_for_ping(200)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0, server.log


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def test_one_line_a_request_without_secrets(server: Server) -> None:
    server.ask("POST", "/invocations?token=s3cret", encoded(photo()), Authorization="s3cret")
    server.ask("GET", "/a%0Aforged")
    until = time.monotonic() + 10
    while "forged" not in server.log and time.monotonic() < until:
        time.sleep(0.02)
    lines = [json.loads(line[line.index("{") :]) for line in server.log.splitlines() if "{" in line]
    assert lines[-2]["path"] == "/invocations" and lines[-2]["status"] == 200 and lines[-2]["sent_bytes"] > 50
    assert lines[-1]["path"] == "/a\nforged" and lines[-1]["status"] == 404 and lines[-1]["ms"] >= 0
    assert "s3cret" not in server.log


def test_the_server_imports_no_torch_and_no_stage() -> None:
    code = "import sys, roadseg.serve.app; print(*sys.modules)"
    found = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "onnxruntime" in found and "roadseg.serve.model" in found
    stages = {f"roadseg.{name}" for name in ("ingest", "transform", "train", "evaluate", "push", "pipeline", "model")}
    assert not found & ({"torch", "torchvision", "timm", "boto3", "tyro", "matplotlib"} | stages)


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"can't listen on 127.0.0.1 port {port}"):
            run(None, Serve(port=port), print)  # type: ignore[arg-type]


# ── in a container ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unpacked(archive: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_an_unpacked_release_is_served_under_its_own_digest(unpacked: Path, archive: Path, tmp_path: Path) -> None:
    digest = load_release(archive).digest
    assert container_release(unpacked) == unpacked
    assert container_release(tmp_path / "elsewhere") is None
    assert load_release_folder(unpacked).digest == digest
    with started(SERVE, unpacked, tmp_path / "log") as server:
        server.wait_for_ping(200)
        assert server.send(encoded(photo()))[1]["x-roadseg-release"] == digest


def test_the_container_address_is_sagemakers() -> None:
    settings = container_settings(Serve(port=1234, max_queue=3))
    assert (settings.host, settings.port, settings.max_queue) == ("0.0.0.0", 8080, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"other"), "model.onnx does not match its digest"),
        (lambda folder: (folder / "evil.pkl").write_bytes(b""), "'evil.pkl' is not allowed"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "lacks weights.safetensors"),
        (lambda folder: (folder / "model.json").write_bytes(b"{}"), "model.json is not readable"),
    ],
)
def test_a_changed_folder_is_refused(unpacked: Path, change: object, said: str) -> None:
    change(unpacked)  # type: ignore[operator]
    with pytest.raises(ArchiveError, match=said):
        load_release_folder(unpacked)
