"""What many tests need: a small label set, shards in memory's size, a release without training, a bucket's server."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from roadseg.config.sections import Config, load_config
from roadseg.data.manifest import Manifest, Sample
from roadseg.data.shards.index import Shard, Shards, write_frame
from roadseg.files import sha256_file
from roadseg.images.decode import encode_label_png
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import Pair
from roadseg.labels import IGNORE, LabelClass, LabelSet
from roadseg.pipeline.run import RunResult, run
from roadseg.release.archive import write_archive

cv2.setNumThreads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the networks of the tests are too small for more

THREE = LabelSet(
    "three",
    (
        LabelClass("road", 7, 0, (128, 64, 128), "flat"),
        LabelClass("sky", 23, 1, (70, 130, 180), "sky"),
        LabelClass("car", 26, 2, (0, 0, 142), "vehicle"),
        LabelClass("void", 0, IGNORE, (0, 0, 0)),
    ),
    terms="made by a test",
)


RGB = LabelSet(
    "three",
    (
        LabelClass("void", 4, IGNORE, (9, 9, 9)),
        LabelClass("red", 7, 0, (200, 0, 0)),
        LabelClass("green", 11, 1, (0, 200, 0)),
        LabelClass("blue", 26, 2, (0, 0, 200)),
    ),
)


def channel_graph(stride: int = 2) -> bytes:
    """logits [B, 3, H/stride, W/stride] = the image's channels, averaged: the brightest channel wins."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 3, "H", "W"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 3, "h", "w"])
    size = [stride, stride]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["pixels"], ["logits"], kernel_shape=size, strides=size, ceil_mode=1),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "channels", [image], [logits]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def write_release(
    path: Path, label_set: LabelSet = RGB, graph: bytes = b"", weights: bytes = b"weights", **changes: Any
) -> Path:
    """An archive whose model.json says all that a trained one's does; `changes` replace its keys."""
    counts = [100 + i for i in range(label_set.num_classes)] + [7]
    model = {
        "label_set": label_set.to_json(),
        "temperature": 1.0,
        "preprocessing": {"input": "image: uint8 [B, 3, H, W], RGB", "normalisation": "inside the graph"},
        "architecture": {"backbone": "none", "output_stride": 2, "fusion": "concat"},
        "parameters": 0,
        "config": {},
        "training": {"source": "test", "steps": 1, "data_fingerprints": {"train": "f" * 64}},
        "train_class_pixels": counts,
        "package_version": "0",
        "code_commit": "",
    }
    write_archive(path, {**model, **changes}, graph or channel_graph(), weights, "terms of the test")
    return path


@pytest.fixture(scope="session")
def release_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "model.tar.gz")


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """The command line sets up the package's logger for a process of its own; put it back."""
    log = logging.getLogger("roadseg")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


MICRO = Path(__file__).parent / "micro.yaml"


@dataclass(frozen=True)
class Micro:
    """A finished run of micro.yaml. Its workspace is for reading only."""

    config: Config
    workspace: Path
    result: RunResult

    @property
    def contents(self) -> dict[str, str]:
        return {stage: output.content for stage, output in self.result.outputs.items()}


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    config, workspace = load_config(MICRO), tmp_path_factory.mktemp("micro")
    return Micro(config, workspace, run(config, workspace=workspace, name="first"))


def scene(seed: int, height: int = 48, width: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colours follow its label of three classes and some void, with noise."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    label[: height // 2] = 1
    x, y = rng.integers(0, width - 20), rng.integers(height // 3, height - 12)
    label[y : y + 10, x : x + 18] = 2
    label[-2:] = IGNORE
    colours = np.array([[90, 90, 90], [150, 180, 220], [200, 30, 30]] + [[0, 0, 0]] * 253, np.int16)
    image = colours[label] + rng.integers(-20, 20, (height, width, 3), dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8), label


def write_frames(root: Path, label_set: LabelSet, splits: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> Manifest:
    """PNG files below `root` of (image, train ids) by split, and their manifest; the masks hold ids."""
    samples = []
    for split, frames in sorted(splits.items()):
        for i, (image, label) in enumerate(frames):
            paths = f"{split}/{i}.png", f"{split}/{i}_ids.png"
            data = cv2.imencode(".png", image[..., ::-1])[1].tobytes(), encode_label_png(label_set.train_to_id[label])
            for path, content in zip(paths, data, strict=True):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content)
            void = label_set.num_classes
            histogram = np.bincount(np.minimum(label.ravel(), void), minlength=void + 1).tolist()
            height, width = label.shape
            digests = [hashlib.sha256(content).hexdigest() for content in data]
            samples.append(
                Sample(
                    split=split, name=str(i), sequence="", image=paths[0], label=paths[1], instances="", width=width,
                    height=height, image_sha256=digests[0], label_sha256=digests[1], image_bytes=1, label_bytes=1,
                    histogram=tuple(histogram),
                )
            )  # fmt: skip
    return Manifest("test", label_set, tuple(samples))


def write_shards(folder: Path, train: int = 6, val: int = 3) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        path = folder / f"{split}-00000.bin"
        with open(path, "wb") as f:
            frames = tuple(write_frame(f, f"{split}{i}", "s", *scene(first + i)) for i in range(count))
        shards[split] = (Shard(path.name, sha256_file(path), frames),)
    made = Shards(
        folder=folder,
        source="test",
        label_set=THREE,
        mean=(120.0, 120.0, 120.0),
        std=(60.0, 60.0, 60.0),
        class_pixels={"train": [500, 400, 60, 40], "val": [500, 400, 60, 40]},
        fingerprints={"train": "t" * 64, "val": "v" * 64},
        shards=shards,
    )
    made.save()
    return made


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "shards")


def touch(root: Path, *paths: str) -> None:
    """Empty files, for what only looks at names."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def codes(findings: list[Finding]) -> list[tuple[str, str, int]]:
    return [(f.code, f.split, f.count) for f in findings]


def pair_rows(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(p.split, p.name, p.sequence) for p in pairs]


AWS_SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """Address of moto's S3 over HTTP on loopback."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    # One request at a time: moto's own check of If-Match is not safe between threads.
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=False, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


@pytest.fixture
def aws_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody's, and nothing of the machine's own settings."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not os.environ.get("ROADSEG_REAL_DATA"):
        pytest.skip("ROADSEG_REAL_DATA is not set")
    return Path(os.environ["ROADSEG_REAL_DATA"])
