"""One contract for both stores; and what only the S3 store does. S3 is moto over HTTP on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.httpsession import URLLib3Session

from roadseg.aws import aws_client
from roadseg.errors import ConfigError, PointerMoved, RoadsegError, StoreError
from roadseg.files import sha256_bytes
from roadseg.release.store.base import ARCHIVE, Champion, FolderStore, Store, champion_bytes, read_document
from roadseg.release.store.resolve import open_store, resolve
from roadseg.release.store.s3 import S3Store
from tests.conftest import AWS_SECRET

pytestmark = [pytest.mark.aws, pytest.mark.usefixtures("aws_credentials")]
BUCKET = "models"


class Backdoor:
    """Changes a store's objects behind its back."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def put(self, name: str, data: bytes) -> None:
        if isinstance(self.store, S3Store):
            self.store.client.put_object(Bucket=BUCKET, Key=f"a/b/{name}", Body=data)
        else:
            (Path(self.store.address) / name).write_bytes(data)

    def get(self, name: str) -> bytes:
        if isinstance(self.store, S3Store):
            return self.store.client.get_object(Bucket=BUCKET, Key=f"a/b/{name}")["Body"].read()
        return (Path(self.store.address) / name).read_bytes()

    def delete(self, name: str) -> None:
        if isinstance(self.store, S3Store):
            self.store.client.delete_object(Bucket=BUCKET, Key=f"a/b/{name}")
        else:
            (Path(self.store.address) / name).unlink()


def s3_store(endpoint: str, prefix: str = "a/b") -> S3Store:
    return S3Store(f"s3://{BUCKET}/{prefix}", region="us-east-1", endpoint_url=endpoint)


@pytest.fixture
def s3(s3_endpoint: str) -> Iterator[S3Store]:
    own = s3_store(s3_endpoint).client  # tests spoil the store's
    own.create_bucket(Bucket=BUCKET)
    yield s3_store(s3_endpoint)
    for item in own.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        own.delete_object(Bucket=BUCKET, Key=item["Key"])
    own.delete_bucket(Bucket=BUCKET)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "model.tar.gz"
    path.write_bytes(b"an archive" * 1000)
    return path


def again(store: Store) -> Store:
    """The same store, as another process would open it."""
    if isinstance(store, S3Store):
        return s3_store(store.client.meta.endpoint_url)
    return FolderStore(Path(store.address))


def champion(serial: int, miou: float = 0.5, name: str = "") -> Champion:
    return Champion(sha256_bytes(f"{name}{serial}".encode()), miou, "fingerprint", serial, promoted_at="2025-01-01")


# ── both stores ─────────────────────────────────────────────────────────────────────────────────


def test_an_empty_store(store: Store, tmp_path: Path) -> None:
    digest = "0" * 64
    assert store.champion() is None
    assert store.releases() == [] and store.history() == []
    assert store.document(digest, "card.md") is None
    with pytest.raises(StoreError, match=f"no release {digest}"):
        store.fetch(digest, tmp_path / "cache")
    with pytest.raises(StoreError, match="no champion yet"):
        resolve("champion", store, tmp_path / "cache")


def test_a_published_release_comes_back(store: Store, archive: Path, tmp_path: Path) -> None:
    digest = store.publish(archive, {"card.md": b"# card", "evaluation.json": b"{}"})
    assert digest == sha256_bytes(archive.read_bytes())
    other = again(store)
    assert other.releases() == [digest]
    fetched = other.fetch(digest, tmp_path / "cache")
    assert fetched.name == ARCHIVE and fetched.read_bytes() == archive.read_bytes()
    assert other.document(digest, "card.md") == b"# card"
    assert other.document(digest, "decision.json") is None
    assert resolve(digest[:8], other, tmp_path / "cache") == fetched
    assert other.champion() is None and other.history() == []


def test_a_release_is_immutable(store: Store, archive: Path) -> None:
    digest = store.publish(archive, {"card.md": b"first"})
    assert store.publish(archive, {"card.md": b"second", "decision.json": b"{}"}) == digest
    assert store.document(digest, "card.md") == b"first"
    assert store.document(digest, "decision.json") == b"{}"
    assert store.releases() == [digest]


@pytest.mark.parametrize("damaged", [b'{"outcome": "prom', b"[]", b"\xff"])
def test_a_damaged_document_is_reported(store: Store, archive: Path, damaged: bytes) -> None:
    digest = store.publish(archive, {"decision.json": b'{"outcome": "promoted"}', "evaluation.json": damaged})
    assert read_document(store, digest, "decision.json") == {"outcome": "promoted"}
    assert read_document(store, "0" * 64, "decision.json") is None
    with pytest.raises(StoreError, match=f"evaluation.json of release {digest[:12]} is damaged.*restore it"):
        read_document(store, digest, "evaluation.json")


def test_a_damaged_archive_is_not_handed_out(store: Store, archive: Path, tmp_path: Path) -> None:
    digest = store.publish(archive, {})
    Backdoor(store).put(f"releases/{digest}/{ARCHIVE}", b"changed")
    with pytest.raises(StoreError, match=f"release {digest} is damaged"):
        store.fetch(digest, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_champions_replace_each_other(store: Store) -> None:
    first, second = champion(1), replace(champion(2, 0.6), previous=champion(1).digest)
    store.promote(first, None)
    read = again(store).champion()
    assert read and read.version and replace(read, version="") == first
    store.promote(second, read)
    now = again(store).champion()
    assert now and replace(now, version="") == second and now.version != read.version
    assert [replace(c, version="") for c in again(store).history()] == [first, second]


def test_a_stale_pointer_is_refused(store: Store) -> None:
    store.promote(champion(1), None)
    read = store.champion()
    store.promote(champion(2), read)
    before = store.champion()
    for stale in (read, None):
        with pytest.raises(PointerMoved):
            store.promote(champion(2, name="loser"), stale)
    assert store.champion() == before
    assert [c.digest for c in store.history()] == [champion(1).digest, champion(2).digest]


def test_replacing_an_unknown_champion_is_refused(store: Store) -> None:
    with pytest.raises(PointerMoved):
        store.promote(champion(2), replace(champion(1), version='"0123"'))
    assert store.champion() is None and store.history() == []


def test_history_heals_after_a_kill_between_pointer_and_history(store: Store) -> None:
    store.promote(champion(1), None)
    Backdoor(store).delete("history/000001.json")
    assert [c.serial for c in store.history()] == [1]
    store.promote(champion(2), store.champion())
    assert [c.serial for c in store.history()] == [1, 2]
    assert json.loads(Backdoor(store).get("history/000001.json"))["digest"] == champion(1).digest


def test_a_missing_pointer_is_not_an_empty_store(store: Store) -> None:
    store.promote(champion(1), None)
    Backdoor(store).delete("champion.json")
    for act in (store.champion, lambda: store.promote(champion(2), None)):
        with pytest.raises(StoreError, match="pointer is missing") as e:
            act()
        assert not isinstance(e.value, PointerMoved)


def test_a_first_champion_written_between_two_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer isn't there, then another process promotes, then there is a history."""
    one, look = again(store), "_get" if isinstance(store, S3Store) else "_read_pointer"
    first_look = getattr(one, look)
    looks = []

    def look_then_wait(*name: str) -> Any:
        found = first_look(*name)
        if not looks:
            looks.append(found)
            store.promote(champion(1), None)
        return found

    monkeypatch.setattr(one, look, look_then_wait)
    found = one.champion()
    assert looks == [None] and found and found.digest == champion(1).digest


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": "x"}', champion_bytes(champion(1))[:-30]])
def test_an_unreadable_pointer_is_refused_and_kept(store: Store, content: bytes) -> None:
    store.promote(champion(1), None)
    Backdoor(store).put("champion.json", content)
    with pytest.raises(StoreError, match="pointer is not readable"):
        store.champion()
    with pytest.raises(StoreError, match="pointer is not readable"):
        store.promote(champion(2), None)
    assert Backdoor(store).get("champion.json") == content


def test_one_of_eight_concurrent_promotions_wins(store: Store) -> None:
    store.promote(champion(1), None)
    read = store.champion()
    stores = [again(store) for _ in range(8)]
    together = threading.Barrier(8)

    def race(i: int) -> bool:
        together.wait()
        try:
            stores[i].promote(champion(2, name=f"racer {i}"), read)
            return True
        except PointerMoved:
            return False

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert sum(won) == 1
    winner = champion(2, name=f"racer {won.index(True)}")
    now = store.champion()
    assert now and now.digest == winner.digest
    assert [c.digest for c in store.history()] == [champion(1).digest, winner.digest]


def test_one_of_two_first_champions_wins(store: Store) -> None:
    """Both have read that there is none before either writes."""
    stores = [again(store), again(store)]
    read_both = threading.Barrier(2)

    def race(i: int) -> bool:
        read = stores[i].champion()
        read_both.wait()
        try:
            stores[i].promote(champion(1, name=f"racer {i}"), read)
            return True
        except PointerMoved:
            return False

    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(race, range(2)))
    assert sorted(won) == [False, True]
    assert [c.digest for c in store.history()] == [champion(1, name=f"racer {won.index(True)}").digest]


def test_eight_writers_that_retry_all_succeed(store: Store) -> None:
    """Every racer raises the mIoU a little: none is lost, and none goes back."""

    def race(i: int) -> None:
        mine = again(store)
        while True:
            now = mine.champion()
            serial = now.serial + 1 if now else 1
            miou = now.miou + 0.01 if now else 0.01
            try:
                mine.promote(champion(serial, miou, f"racer {i}"), now)
                return
            except PointerMoved:
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(race, range(8)))
    past = store.history()
    assert [c.serial for c in past] == list(range(1, 9))
    assert [round(c.miou, 2) for c in past] == [round(0.01 * n, 2) for n in range(1, 9)]


# ── only S3 ─────────────────────────────────────────────────────────────────────────────────────


def sent(store: S3Store) -> list[tuple[str, dict[str, Any]]]:
    """Grows by (operation, headers) for each request that the store sends."""
    seen: list[tuple[str, dict[str, Any]]] = []
    store.client.meta.events.register(
        "before-send.s3", lambda request, event_name, **_: seen.append((event_name.split(".")[-1], request.headers))
    )
    return seen


def answer(status: int, code: str, message: str = "") -> AWSResponse:
    response = AWSResponse("http://x", status, {}, None)
    response._content = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return response


def test_writes_are_conditional_and_checksummed(s3: S3Store, archive: Path) -> None:
    seen = sent(s3)
    digest = s3.publish(archive, {"card.md": b"#"})
    s3.promote(champion(1), None)
    s3.promote(champion(2), s3.champion())
    puts = [headers for operation, headers in seen if operation == "PutObject"]
    conditions = [(h.get("If-None-Match"), bool(h.get("If-Match"))) for h in puts]
    once, swap, plain = (b"*", False), (None, True), (None, False)
    assert conditions == [once, once, once, plain, plain, swap, plain]
    assert all(h["x-amz-checksum-sha256"] for h in puts)
    head = s3.client.head_object(Bucket=BUCKET, Key=f"a/b/releases/{digest}/{ARCHIVE}", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"]
    assert s3.archive_url(digest) == f"s3://{BUCKET}/a/b/releases/{digest}/{ARCHIVE}"


def test_an_archive_that_is_there_already_is_verified(s3: S3Store, archive: Path) -> None:
    digest = s3.publish(archive, {})
    name = f"releases/{digest}/{ARCHIVE}"
    Backdoor(s3).put(name, archive.read_bytes())  # by another tool, without a SHA-256
    assert s3.publish(archive, {}) == digest
    Backdoor(s3).put(name, b"changed")
    with pytest.raises(StoreError, match="is damaged"):
        s3.publish(archive, {})


def test_fetch_caches(s3: S3Store, archive: Path, tmp_path: Path) -> None:
    digest = s3.publish(archive, {})
    path = s3.fetch(digest, tmp_path / "cache")
    seen = sent(s3)
    assert s3.fetch(digest, tmp_path / "cache") == path and not seen
    path.write_bytes(b"a flipped bit")
    assert s3.fetch(digest, tmp_path / "cache").read_bytes() == archive.read_bytes() and seen


def test_a_conflict_is_tried_again(s3: S3Store) -> None:
    conflicts = [answer(409, "ConditionalRequestConflict") for _ in range(2)]
    s3.client.meta.events.register("before-send.s3.PutObject", lambda **_: conflicts.pop() if conflicts else None)
    s3.promote(champion(1), None)
    assert not conflicts and s3.champion()


def test_a_promotion_with_a_lost_answer_is_recognized(s3: S3Store) -> None:
    """S3 did it and the answer is lost; botocore sends it again and is told 412."""
    lost = [1]

    def lose(request: Any, **_: Any) -> AWSResponse | None:
        if lost and "champion.json" in request.url:
            lost.pop()
            assert URLLib3Session().send(request).status_code == 200
            return answer(500, "InternalError")
        return None

    s3.client.meta.events.register("before-send.s3.PutObject", lose)
    s3.promote(champion(1), None)
    assert not lost
    assert [c.serial for c in s3.history()] == [1]


def test_stores_of_one_bucket_do_not_mix(s3: S3Store, s3_endpoint: str, archive: Path) -> None:
    digest = s3.publish(archive, {})
    root = S3Store(f"s3://{BUCKET}", region="us-east-1", endpoint_url=s3_endpoint)
    assert s3.releases() == [digest] and root.releases() == []
    assert (root.address, s3.address) == (f"s3://{BUCKET}", f"s3://{BUCKET}/a/b")
    opened = open_store(f"s3://{BUCKET}/a/b/", Path("unused"), region="us-east-1", endpoint_url=s3_endpoint)
    assert opened.releases() == [digest]


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "models/x"])
def test_an_address_without_a_bucket(url: str) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        S3Store(url)


# ── failures in a sentence ──────────────────────────────────────────────────────────────────────


def every_method(store: S3Store, archive: Path, cache: Path) -> list[Any]:
    return [
        store.champion,
        store.releases,
        store.history,
        lambda: store.promote(champion(1), None),
        lambda: store.publish(archive, {}),
        lambda: store.fetch("0" * 64, cache),
        lambda: store.document("0" * 64, "card.md"),
    ]


@pytest.mark.parametrize(
    ("status", "code", "said", "todo"),
    [
        (404, "NoSuchBucket", "the bucket does not exist", "store.url"),
        (403, "AccessDenied", "access denied to", "docs/deploy.md"),
        (400, "ExpiredToken", "credentials have expired", "aws sso login"),
        (403, "InvalidAccessKeyId", "credentials are not valid", "AWS_PROFILE"),
        (403, "SignatureDoesNotMatch", "credentials are not valid", "AWS_PROFILE"),
        (503, "SlowDown", "asks to slow down", "again"),
        (400, "Strange", "failed (Strange: ", ""),
    ],
)
def test_refusals(s3: S3Store, archive: Path, tmp_path: Path, status: int, code: str, said: str, todo: str) -> None:
    s3.client.meta.events.register("before-send.s3", lambda **_: answer(status, code, "you may not"))
    for act in every_method(s3, archive, tmp_path) if status < 500 else [s3.champion]:
        with pytest.raises(StoreError) as e:
            act()
        assert said in str(e.value) and todo in str(e.value) and e.value.where == s3.address
        assert AWS_SECRET not in str(e.value) and "AKIA" not in str(e.value)


def test_a_bucket_that_does_not_exist(s3_endpoint: str) -> None:
    store = S3Store("s3://nowhere/x", region="us-east-1", endpoint_url=s3_endpoint)
    for act in (store.champion, store.releases, lambda: store.promote(champion(1), None)):
        with pytest.raises(StoreError, match="the bucket does not exist"):
            act()


def test_missing_credentials_are_reported_at_once(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    # An address that swallows packets, as the metadata service's does away from EC2.
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://203.0.113.1")
    began = time.monotonic()
    with pytest.raises(StoreError, match="no AWS credentials were found.*aws sso login"):
        s3_store(s3_endpoint).champion()
    assert time.monotonic() - began < 5


def test_an_unreachable_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    store = s3_store(f"http://127.0.0.1:{port}")
    with pytest.raises(StoreError, match="AWS could not be reached .*check the network"):
        store.champion()


def test_a_download_that_breaks_off(s3: S3Store, archive: Path, tmp_path: Path) -> None:
    digest = s3.publish(archive, {})

    def cut(request: Any, **_: Any) -> AWSResponse:
        whole = URLLib3Session().send(request)
        whole.headers["Content-Length"] = "10001"
        return whole

    s3.client.meta.events.register("before-send.s3.GetObject", cut)
    with pytest.raises(StoreError):
        s3.fetch(digest, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))


def test_invalid_profiles_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="aws.endpoint_url"):
        aws_client("s3", endpoint_url="nonsense")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(StoreError, match="no AWS region is set"):
        aws_client("sagemaker")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="AWS_PROFILE"):
        aws_client("s3")


def test_without_boto3() -> None:
    code = """
import sys
sys.modules["boto3"] = None
from pathlib import Path
from roadseg.errors import RoadsegError
from roadseg.release.store.resolve import open_store
try:
    open_store("s3://models", Path("x"))
except RoadsegError as e:
    print(e)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'roadseg[aws]'" in said
    assert issubclass(StoreError, RoadsegError)
