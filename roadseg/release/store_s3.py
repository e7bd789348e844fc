"""A store in an S3 bucket, and how roadseg speaks to AWS: one way to connect, every failure a sentence.

S3 can't change two objects at once, so all that must agree stands in the pointer, and the pointer
changes by one conditional write. boto3 is an extra and is imported on first use.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roadseg.errors import ConfigError, PointerMoved, RoadsegError, StoreError
from roadseg.files import sha256_bytes, sha256_file, write_atomic
from roadseg.release.archive import LIMIT_BYTES
from roadseg.release.store import ARCHIVE, Champion, champion_bytes, parse_champion

_NOT_VALID = (
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_CONFLICTS = 6  # attempts when S3 answers 409, some 3 s in all


def aws_session() -> Any:
    """A boto3 session of its own: the shared default one is not safe between threads."""
    try:
        import boto3  # type: ignore[import-untyped]
    except ImportError:
        raise RoadsegError("AWS needs the package boto3", todo="pip install 'roadseg[aws]'") from None
    with said_plainly("AWS"):
        return boto3.session.Session()


def aws_client(service: str, *, region: str = "", endpoint_url: str = "") -> Any:
    """A boto3 client that gives up within seconds where nobody answers."""
    session = aws_session()
    from botocore.config import Config  # type: ignore[import-untyped]

    config = Config(
        connect_timeout=2,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    with said_plainly(f"AWS {service}"):
        try:
            return session.client(service, region_name=region or None, endpoint_url=endpoint_url or None, config=config)
        except ValueError:  # a plain one is botocore's word for an address it can't parse
            raise ConfigError("no address", expected="http(s)://host", where="aws.endpoint_url") from None


@contextmanager
def said_plainly(where: str, error: type[RoadsegError] = StoreError) -> Iterator[None]:
    """Turns botocore's errors into `error`, without secrets, signatures or request ids."""
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield
    except (BotoCoreError, ClientError) as e:
        found, todo = _explained(e)
        raise error(found, where=where, todo=todo) from None


def error_code(e: Any) -> str:
    """S3's name of a ClientError; a HEAD has no body, so there it is the HTTP status."""
    return str(e.response.get("Error", {}).get("Code", ""))


def _explained(e: Exception) -> tuple[str, str]:
    from botocore import exceptions as b  # type: ignore[import-untyped]

    signing_in = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`"
    if isinstance(e, b.ClientError):
        return _refused(e, signing_in)
    if isinstance(e, b.NoCredentialsError | b.PartialCredentialsError):
        return "no AWS credentials were found", signing_in
    if isinstance(e, b.ProfileNotFound | b.CredentialRetrievalError):
        return "the AWS credentials could not be had from the profile", "check AWS_PROFILE and ~/.aws/config"
    if isinstance(e, b.SSOError | b.TokenRetrievalError):
        return "the AWS sign-in has expired", "run `aws sso login`"
    if isinstance(e, b.NoRegionError):
        return "no AWS region is set", "set aws.region or AWS_REGION"
    if isinstance(e, b.ConnectionError | b.HTTPClientError | b.IncompleteReadError):
        return f"AWS could not be reached ({type(e).__name__})", "check the network, aws.region and aws.endpoint_url"
    return f"the request could not be made ({type(e).__name__}: {e})", ""


def _refused(e: Any, signing_in: str) -> tuple[str, str]:
    code, operation = error_code(e), e.operation_name
    if "Expired" in code:
        return "the AWS credentials have expired", signing_in
    if code in _NOT_VALID:
        return "the AWS credentials are not valid", signing_in
    if code == "NoSuchBucket":
        return "the bucket does not exist", "create it, or correct store.url"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException"):
        return "the bucket is in another region", "set aws.region to the bucket's"
    if code in ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequestsException", "503"):
        return f"AWS asks to slow down ({operation})", "run again in a minute"
    message = str(e.response.get("Error", {}).get("Message", ""))[:500]
    if "AccessDenied" in code or code in ("403", "Forbidden", "AllAccessDisabled"):
        return f"access denied to {operation} ({message})", "give this identity the permissions of docs/deploy.md"
    return f"{operation} failed ({code}: {message})", ""


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
        """Where a release's archive lies, for services that read it from S3 themselves."""
        return f"{self.address}/releases/{digest}/{ARCHIVE}"

    def champion(self) -> Champion | None:
        where = f"{self.address}/champion.json"
        answer = self._get("champion.json")
        if answer is None and self._names("history/"):
            answer = self._get("champion.json")  # the first champion may have come between the two looks
            if answer is None:
                raise StoreError(
                    "the champion pointer is gone, but there is a history",
                    where=where,
                    todo="restore it from the newest file in history/",
                )
        return None if answer is None else parse_champion(answer[0], where, answer[1])

    def promote(self, champion: Champion, replacing: Champion | None) -> None:
        now = self.champion()
        if (now.version if now else "") != (replacing.version if replacing else ""):
            raise PointerMoved("the champion changed since it was read", where=self.address)
        if now:  # the connection may have gone between the last two lines the last time
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
            raise StoreError(f"no release {digest}", where=self.address, todo="see `roadseg releases`")
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
        with said_plainly(self.address):
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
        raise StoreError(f"another write to {name} does not end", where=self.address, todo="run again")

    def _is_marked(self, mark: str) -> bool:
        """Whether the pointer is our own write after all: botocore repeats one whose answer got lost."""
        with said_plainly(self.address):
            head = self.client.head_object(Bucket=self.bucket, Key=f"{self._prefix}champion.json")
        return bool(head["Metadata"].get("mark") == mark)

    def _stored_sha256(self, name: str) -> str:
        """Hex SHA-256 of an object: S3's own when it is of the whole, else of the bytes."""
        with said_plainly(self.address):
            head = self.client.head_object(Bucket=self.bucket, Key=self._prefix + name, ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256", "")
        if checksum and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            return base64.b64decode(checksum).hex()
        answer = self._get(name)
        return sha256_bytes(answer[0]) if answer else ""

    def _get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, ETag) of an object, None when it does not exist."""
        from botocore.exceptions import ClientError

        with said_plainly(self.address):
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
        with said_plainly(self.address):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            return [o["Key"].removeprefix(self._prefix) for page in pages for o in page.get("Contents", ())]


def _damaged(digest: str, where: str) -> StoreError:
    return StoreError(
        f"release {digest} is damaged: its archive has another SHA-256",
        where=where,
        todo="restore the object, or remove the folder and push again",
    )
