"""Shards read by range from S3, which is moto over HTTP on loopback."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ConnectionClosedError
from botocore.httpsession import URLLib3Session
from test_index import FORMS, smooth, written  # type: ignore[import-not-found]

from roadseg.aws import aws_client
from roadseg.data.shards.files import RangedFiles
from roadseg.data.shards.index import Shards, Split
from roadseg.errors import ConfigError, DataError
from tests.conftest import AWS_SECRET, scene, write_shards

pytestmark = [pytest.mark.aws, pytest.mark.usefixtures("aws_credentials")]
BUCKET = "shards"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadseg.data.shards.files.time.sleep", lambda seconds: None)


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[Any]:
    client = aws_client("s3", region="us-east-1", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


def uploaded(shards: Shards, client: Any) -> Shards:
    assert isinstance(shards.folder, Path)
    for path in shards.folder.glob("*.*"):
        client.put_object(Bucket=BUCKET, Key=f"a/b/{path.name}", Body=path.read_bytes())
    return Shards.load(f"s3://{BUCKET}/a/b/", region="us-east-1", endpoint_url=client.meta.endpoint_url)


def answers(split: Split, change: Any) -> list[str]:
    """Let `change(request)` answer the split's GETs; returns the list of requested ranges."""
    files, asked = split._files, []
    assert isinstance(files, RangedFiles)

    def before_send(request: Any, **_: Any) -> Any:
        asked.append(request.headers.get("Range", b"").decode())
        return change(request)

    files.client().meta.events.register("before-send.s3.GetObject", before_send)
    return asked


@pytest.mark.parametrize("form", FORMS)
def test_boxes_are_those_of_the_folder_in_one_request_each(tmp_path: Path, bucket: Any, form: Any) -> None:
    local = written(tmp_path, form, [smooth(200, 530), smooth(300, 140, 1)])
    remote = uploaded(local, bucket)
    assert remote.shards == local.shards and remote.form == form and remote.damaged() == []
    here, there = local.split("train"), remote.split("train")
    asked = answers(there, lambda request: None)
    for number, box in enumerate([(3, 5, 100, 200), (100, 0, 60, 530), (0, 0, 200, 530)]):
        for got, want in zip(there.read_box(0, *box), here.read_box(0, *box), strict=True):
            np.testing.assert_array_equal(got, want)
        assert len(asked) == 2 + number  # the frame's table once
    frame = there.frames[0]
    first, last = (int(x) for x in asked[1].removeprefix("bytes=").split("-"))
    assert first == frame.label_offset and last < frame.image_offset + (300 if form == "raw" else 600) * 530 * 3
    np.testing.assert_array_equal(there.read(1)[1], here.read(1)[1])


def read_in_worker(split: Split, out: Any) -> None:
    out.put([split.read(i)[1].sum() for i in range(3)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forked beside the server's thread
def test_workers_make_their_own_connections(tmp_path: Path, bucket: Any, method: str) -> None:
    split = uploaded(write_shards(tmp_path / "x"), bucket).split("train")
    split.read(0)
    mine = split._files.client()  # type: ignore[union-attr]
    context: Any = multiprocessing.get_context(method)
    out = context.Queue()
    workers = [context.Process(target=read_in_worker, args=(split, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [out.get(timeout=60) for _ in workers] == [[scene(i)[1].sum() for i in range(3)]] * 2
    for worker in workers:
        worker.join(timeout=60)
    assert split._files.client() is mine and b"client" in pickle.dumps(split)  # type: ignore[union-attr]


def test_transient_failures_are_retried(tmp_path: Path, bucket: Any) -> None:
    split = uploaded(write_shards(tmp_path / "x"), bucket).split("train")
    troubles = ["500", "503", "cut", "short", "500", "reset"]

    def trouble(request: Any) -> AWSResponse | None:
        if not troubles:
            return None
        kind = troubles.pop()
        if kind == "reset":
            raise ConnectionClosedError(endpoint_url=request.url)
        if kind.isdigit():
            return AWSResponse(request.url, int(kind), {}, Raw(b"<Error><Code>SlowDown</Code></Error>"))
        whole = URLLib3Session().send(request)
        data = whole.content[:-3]
        length = len(data) + (3 if kind == "cut" else 0)
        return AWSResponse(request.url, 206, {"Content-Length": str(length)}, Raw(data))

    answers(split, trouble)
    np.testing.assert_array_equal(split.read(2)[0], scene(2)[0])
    assert not troubles


class Raw:
    """The body of a response, with urllib3's interface."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.data

    def read(self, amt: int | None = None) -> bytes:
        out, self.data = self.data[:amt], self.data[len(self.data) if amt is None else amt :]
        return out


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied"),
        (400, "ExpiredToken", "credentials have expired"),
        (404, "NoSuchKey", "no such object"),
        (503, "SlowDown", "asks to slow down"),
    ],
)
def test_refusals_have_no_secrets(tmp_path: Path, bucket: Any, status: int, code: str, message: str) -> None:
    split = uploaded(write_shards(tmp_path / "x"), bucket).split("train")
    body = f"<Error><Code>{code}</Code><Message>you may not</Message></Error>".encode()
    asked = answers(split, lambda request: AWSResponse(request.url, status, {}, Raw(body)))
    with pytest.raises(DataError, match=message) as e:
        split.read(0)
    assert f"s3://{BUCKET}/a/b/train-00000.bin" in str(e.value)
    assert AWS_SECRET not in str(e.value) and "Signature" not in str(e.value)
    assert len(asked) == (1 if status < 500 else 12)


@pytest.mark.fault
def test_damage_is_found(tmp_path: Path, bucket: Any) -> None:
    remote = uploaded(written(tmp_path, "raw", [smooth(200, 300), smooth(200, 300, 1)]), bucket)
    whole = (tmp_path / "train-00000.bin").read_bytes()
    frame, rng = remote.split("train").frames[1], np.random.default_rng(0)
    for start, stop in (
        (frame.image_offset, len(whole)),
        (frame.label_offset, frame.label_offset + frame.label_bytes),
        (frame.label_offset - frame.table_bytes, frame.label_offset),
    ):
        for position in rng.integers(start, stop, 4):
            broken = bytearray(whole)
            broken[position] ^= 1 << int(rng.integers(8))
            bucket.put_object(Bucket=BUCKET, Key="a/b/train-00000.bin", Body=bytes(broken))
            with pytest.raises(DataError, match="s3://shards/a/b/train-00000.bin: frame f1"):
                remote.split("train").read(1)
    bucket.put_object(Bucket=BUCKET, Key="a/b/train-00000.bin", Body=whole[:-7])
    assert remote.damaged() == [("train", 0)]
    with pytest.raises(DataError, match="a/b/train-00000.bin: received"):
        remote.split("train").read(1)
    bucket.delete_object(Bucket=BUCKET, Key="a/b/train-00000.bin")
    assert remote.damaged() == [("train", 0)]


def test_missing_shards(bucket: Any) -> None:
    address = bucket.meta.endpoint_url
    with pytest.raises(DataError, match=f"s3://{BUCKET}/none/shards.json"):
        Shards.load(f"s3://{BUCKET}/none", region="us-east-1", endpoint_url=address)
    with pytest.raises(DataError, match="the bucket does not exist"):
        Shards.load("s3://nowhere/x", region="us-east-1", endpoint_url=address)
    bucket.put_object(Bucket=BUCKET, Key="x/shards.json", Body=b"{}")
    with pytest.raises(DataError, match=f"s3://{BUCKET}/x/shards.json"):
        Shards.load(f"s3://{BUCKET}/x", region="us-east-1", endpoint_url=address)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3:/bucket/x"])
def test_an_address_without_a_bucket(url: str) -> None:
    with pytest.raises(ConfigError, match="no bucket in"):
        Shards.load(url)


def test_an_unreachable_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with pytest.raises(DataError, match="AWS could not be reached"):
        Shards.load(f"s3://{BUCKET}/x", region="us-east-1", endpoint_url=f"http://127.0.0.1:{port}")
