"""A model store in an S3 bucket.

S3 can't change two objects atomically, so everything that must agree is in the pointer, which changes
by one conditional write.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from pathlib import Path

from roadseg.aws import aws_client, aws_errors, error_code
from roadseg.errors import ConfigError, PointerMoved, ReleaseNotFound, StoreError
from roadseg.files import sha256_bytes, sha256_file, write_atomic
from roadseg.release.archive import LIMIT_BYTES
from roadseg.release.store.base import ARCHIVE, Champion, champion_bytes, parse_champion

_CONFLICTS = 6  # attempts when S3 answers 409, about 3 s in total


class S3Store:
    """A store below s3://bucket/prefix, laid out as a folder store. See `Store` for what each method does."""

    def __init__(self, url: str, *, region: str = "", endpoint_url: str = "") -> None:
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not url.startswith("s3://") or not self.bucket:
            raise ConfigError(f"{url!r} names no bucket", expected="s3://bucket/prefix", where="store.url")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.client = aws_client("s3", region=region, endpoint_url=endpoint_url)

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def archive_url(self, digest: str) -> str:
        """The s3:// address of a release's archive, for services that read it themselves."""
        return f"{self.address}/releases/{digest}/{ARCHIVE}"

    def champion(self) -> Champion | None:
        where = f"{self.address}/champion.json"
        answer = self._get("champion.json")
        if answer is None and self._names("history/"):
            answer = self._get("champion.json")  # the first champion may have been written between the two reads
            if answer is None:
                raise StoreError(
                    "the champion pointer is missing, but a history exists",
                    where=where,
                    todo="restore it from the newest file in history/",
                )
        return None if answer is None else parse_champion(answer[0], where, answer[1])

    def promote(self, champion: Champion, replacing: Champion | None) -> None:
        now = self.champion()
        if (now.version if now else "") != (replacing.version if replacing else ""):
            raise PointerMoved("the champion changed since it was read", where=self.address)
        if now:  # an earlier run may have lost the connection before it wrote the history
            self._remember(now)
        condition = {"IfMatch": now.version} if now else {"IfNoneMatch": "*"}
        mark = secrets.token_hex(16)
        if not self._put("champion.json", champion_bytes(champion), condition, mark) and not self._is_marked(mark):
            raise PointerMoved("the champion changed since it was read", where=self.address)
        self._remember(champion)

    def publish(self, archive: Path, documents: dict[str, bytes]) -> str:
        data = archive.read_bytes()
        digest = sha256_bytes(data)
        name = f"releases/{digest}/{ARCHIVE}"
        if not self._put(name, data, {"IfNoneMatch": "*"}) and self._stored_sha256(name) != digest:
            raise _damaged(digest, f"{self.address}/{name}")
        for document, content in documents.items():
            self._put(f"releases/{digest}/{document}", content, {"IfNoneMatch": "*"})
        return digest

    def fetch(self, digest: str, cache: Path) -> Path:
        path = cache / digest / ARCHIVE
        if path.exists() and sha256_file(path) == digest:
            return path
        name = f"releases/{digest}/{ARCHIVE}"
        answer = self._get(name)
        if answer is None:
            raise ReleaseNotFound(f"no release {digest}", where=self.address, todo="see `roadseg releases`")
        if sha256_bytes(answer[0]) != digest:
            raise _damaged(digest, f"{self.address}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, answer[0])
        return path

    def document(self, digest: str, name: str) -> bytes | None:
        answer = self._get(f"releases/{digest}/{name}")
        return answer[0] if answer else None

    def releases(self) -> list[str]:
        names = (name.split("/") for name in self._names("releases/"))
        return sorted(parts[1] for parts in names if len(parts) == 3 and parts[2] == ARCHIVE)

    def history(self) -> list[Champion]:
        past = {}
        for name in self._names("history/"):
            answer = self._get(name)
            if answer and name.endswith(".json"):
                champion = parse_champion(answer[0], f"{self.address}/{name}", "")
                past[champion.serial] = champion
        if now := self.champion():
            past[now.serial] = now
        return [past[n] for n in sorted(past)]

    def _remember(self, champion: Champion) -> None:
        self._put(f"history/{champion.serial:06d}.json", champion_bytes(champion), {})

    def _put(self, name: str, data: bytes, condition: dict[str, str], mark: str = "") -> bool:
        """Write an object whose SHA-256 S3 checks; False when the condition does not hold."""
        from botocore.exceptions import ClientError

        sha256 = base64.b64encode(hashlib.sha256(data).digest()).decode()
        with aws_errors(self.address):
            for attempt in range(_CONFLICTS):
                try:
                    self.client.put_object(
                        Bucket=self.bucket,
                        Key=self._prefix + name,
                        Body=data,
                        ChecksumAlgorithm="SHA256",
                        ChecksumSHA256=sha256,
                        Metadata={"mark": mark} if mark else {},
                        **condition,
                    )
                    return True
                except ClientError as e:
                    code = error_code(e)
                    if code in ("PreconditionFailed", "412") or (code == "NoSuchKey" and "IfMatch" in condition):
                        return False
                    if code not in ("ConditionalRequestConflict", "409"):
                        raise
                    time.sleep(0.05 * 2**attempt)  # another write to the same key is under way
        raise StoreError(f"another write to {name} keeps conflicting", where=self.address, todo="run again")

    def _is_marked(self, mark: str) -> bool:
        """Whether the pointer is our own write: botocore repeats a write whose answer was lost, and that conflicts."""
        with aws_errors(self.address):
            head = self.client.head_object(Bucket=self.bucket, Key=f"{self._prefix}champion.json")
        return bool(head["Metadata"].get("mark") == mark)

    def _stored_sha256(self, name: str) -> str:
        """Hex SHA-256 of an object: S3's checksum if it covers the whole object, else computed from the bytes."""
        with aws_errors(self.address):
            head = self.client.head_object(Bucket=self.bucket, Key=self._prefix + name, ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256", "")
        if checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            return base64.b64decode(checksum).hex()
        answer = self._get(name)
        return sha256_bytes(answer[0]) if answer else ""

    def _get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, ETag) of an object, None when it does not exist."""
        from botocore.exceptions import ClientError

        with aws_errors(self.address):
            try:
                answer = self.client.get_object(Bucket=self.bucket, Key=self._prefix + name)
            except ClientError as e:
                if error_code(e) == "NoSuchKey":
                    return None
                raise
            if answer["ContentLength"] > LIMIT_BYTES:
                raise StoreError(f"{name} has more than {LIMIT_BYTES} bytes", where=self.address)
            return answer["Body"].read(), answer["ETag"]

    def _names(self, below: str) -> list[str]:
        """Names of all objects below, sorted."""
        start = self._prefix + below
        with aws_errors(self.address):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            return [o["Key"].removeprefix(self._prefix) for page in pages for o in page.get("Contents", ())]


def _damaged(digest: str, where: str) -> StoreError:
    return StoreError(
        f"release {digest} is damaged: the archive's SHA-256 differs",
        where=where,
        todo="restore the object, or remove the folder and push again",
    )
