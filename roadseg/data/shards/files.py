"""Read shard files: memory-mapped from a folder, or by ranges from S3."""

from __future__ import annotations

import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.aws import aws_client, aws_errors
from roadseg.errors import ConfigError, DataError
from roadseg.files import read_json, sha256_file, write_json
from roadseg.processes import cores
from roadseg.progress import progress

VERIFIED = Path("log", "verified.json")  # content digests ignore log/
_ATTEMPTS = 4  # each of up to three attempts by botocore


@dataclass(frozen=True)
class S3Prefix:
    """A folder of shards in a bucket. prefix: "" or ends with a slash."""

    bucket: str
    prefix: str
    region: str = ""
    endpoint_url: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_address(address: Path | str, region: str = "", endpoint_url: str = "") -> Path | S3Prefix:
    """address: a folder or s3://bucket/prefix. Raises ConfigError for an s3:// address without a bucket."""
    if not str(address).startswith("s3:"):
        return Path(address)
    bucket, _, prefix = str(address).removeprefix("s3://").partition("/")
    if not str(address).startswith("s3://") or not bucket:
        raise ConfigError(f"no bucket in {str(address)!r}", expected="s3://bucket/prefix", where="transform.shards")
    return S3Prefix(bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "", region, endpoint_url)


class MappedFiles:
    """Files of a folder, mapped on first use. May be forked and pickled."""

    keeps = True  # the next read of the same range returns the same memory

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_maps": {}}

    def where(self, file: str) -> str:
        return str(self.folder / file)

    def read(self, file: str, start: int, stop: int, ahead: bool = False) -> np.ndarray:
        """uint8 [stop - start], a read-only view of the file. Raises DataError if it has fewer bytes.

        ahead: ask the kernel to read the whole range at once. For raw boxes, whose rows would else be faulted in one
        by one, this halves the time from disk; with the file in memory it costs 5 %.
        """
        if file not in self._maps:
            self._maps[file] = self._map(file)
        mapped, data = self._maps[file]
        if stop > len(data):
            raise DataError(f"has {len(data)} bytes", expected=f"at least {stop}", where=self.where(file))
        if ahead:
            first = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, first, stop - first)
        return data[start:stop]

    def _map(self, file: str) -> tuple[mmap.mmap, np.ndarray]:
        try:
            with open(self.folder / file, "rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # ValueError: an empty file
            raise DataError(
                f"can't be read ({getattr(e, 'strerror', None) or e})", where=self.where(file), todo="run again"
            ) from None
        return mapped, np.frombuffer(mapped, np.uint8)

    def table(self, file: str, start: int, stop: int) -> bytes:
        return self.read(file, start, stop).tobytes()

    def distrust(self, file: str) -> None:
        """Make the next check for damaged shards hash this file even if its size and times are unchanged."""
        stamps = _read_stamps(self.folder)
        if stamps.pop(file, None):
            with suppress(OSError):  # a read-only folder
                _write_stamps(self.folder, stamps)


class RangedFiles:
    """Objects below an S3 prefix; each read is one GET of a range. Each process makes its own client.

    Raises DataError, without secrets or signed URLs, if S3 refuses the request, or fails four times.
    """

    keeps = False

    def __init__(self, prefix: S3Prefix) -> None:
        self.prefix = prefix
        self._owner, self._client = 0, None
        self._tables: dict[tuple[str, int], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "_owner": 0, "_client": None, "_tables": {}}

    def where(self, file: str) -> str:
        return f"{self.prefix}/{file}"

    def read(self, file: str, start: int, stop: int, ahead: bool = False) -> np.ndarray:
        """uint8 [stop - start], read-only."""
        return np.frombuffer(self.get(file, start, stop), np.uint8)

    def table(self, file: str, start: int, stop: int) -> bytes:
        """Cached, so that every box of a frame after the first costs one request."""
        if (file, start) not in self._tables:
            self._tables[file, start] = self.get(file, start, stop)
        return self._tables[file, start]

    def get(self, file: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop-1 of an object; all of it without `stop`."""
        for attempt in range(_ATTEMPTS):
            with aws_errors(self.where(file), DataError):
                data = self._try(file, start, stop, last=attempt == _ATTEMPTS - 1)
            if data is not None and (stop is None or len(data) == stop - start):
                return data
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.5))  # jitter: many workers retry at once
        raise DataError(
            f"received {len(data or b'')} bytes",
            expected=f"{(stop or 0) - start}",
            where=self.where(file),
            todo="copy the object again",
        )

    def _try(self, file: str, start: int, stop: int | None, last: bool) -> bytes | None:
        """None after a transient failure: an incomplete response, a 5xx, throttling. Raises botocore's errors."""
        from botocore import exceptions as b  # type: ignore[import-untyped]

        span = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            response = self.client().get_object(Bucket=self.prefix.bucket, Key=self.prefix.prefix + file, **span)
            data: bytes = response["Body"].read()
            return data
        except b.ClientError as e:
            status = e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if e.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise DataError("no such object", where=self.where(file), todo="copy it again") from None
            if status == 416:
                return b""  # the object ends before the range
            if last or (status < 500 and status != 429):
                raise
        except (b.HTTPClientError, b.IncompleteReadError, b.ResponseStreamingError):
            if last:
                raise
        return None

    def client(self) -> Any:
        if self._owner != os.getpid():  # after a fork: processes must not share connections
            self._client = aws_client("s3", region=self.prefix.region, endpoint_url=self.prefix.endpoint_url)
            self._owner = os.getpid()
        return self._client

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below the prefix."""
        with aws_errors(str(self.prefix), DataError):
            pages = (
                self.client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.prefix.bucket, Prefix=self.prefix.prefix)
            )
            return {o["Key"].removeprefix(self.prefix.prefix): o["Size"] for p in pages for o in p.get("Contents", ())}

    def distrust(self, file: str) -> None:
        """Nothing to do: no object is assumed to be unchanged."""


Files = MappedFiles | RangedFiles


def open_files(folder: Path | S3Prefix) -> Files:
    return MappedFiles(folder) if isinstance(folder, Path) else RangedFiles(folder)


def changed_files(folder: Path, made: dict[str, tuple[str, int]]) -> set[str]:
    """The files that are missing or changed. made: {file: (SHA-256, bytes or 0)}. Records the verified ones."""
    known = _read_stamps(folder)
    stamps = {file: [made[file][0], *_stamp(folder / file)] for file in made if (folder / file).is_file()}
    wrong = {file for file, (_, size) in made.items() if file not in stamps or size not in (0, stamps[file][1])}
    unsure = [file for file in stamps if file not in wrong and known.get(file) != stamps[file]]
    if unsure:
        with ThreadPoolExecutor(cores()) as pool, progress(len(unsure), "verify", "shard") as bar:
            digests = pool.map(sha256_file, (folder / file for file in unsure))
            for file, sha256 in zip(unsure, digests, strict=True):
                bar.update()
                if sha256 != made[file][0]:
                    wrong.add(file)
    trusted = {file: s for file, s in stamps.items() if file not in wrong}
    if trusted != known:
        with suppress(OSError):  # in a read-only folder every check hashes all files
            _write_stamps(folder, trusted)
    return wrong


def _stamp(path: Path) -> list[int]:
    """Changes when a file is written or replaced: programs can't set the change time (ctime)."""
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _read_stamps(folder: Path) -> dict[str, list[Any]]:
    """{file: [SHA-256, *stamp]} of the files that were verified with this stamp."""
    try:
        stamps = read_json(folder / VERIFIED)
        return stamps if isinstance(stamps, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_stamps(folder: Path, stamps: dict[str, list[Any]]) -> None:
    (folder / VERIFIED).parent.mkdir(exist_ok=True)
    write_json(folder / VERIFIED, stamps)
