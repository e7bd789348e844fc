"""Bytes of shard files: mapped from a folder, or by range from S3."""

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

VERIFIED = Path("log", "verified.json")  # below log/, which content digests leave out
_ATTEMPTS = 4  # each of them up to three of botocore's


@dataclass(frozen=True)
class S3Prefix:
    """A folder of shards in a bucket. prefix: "" or ending in a slash."""

    bucket: str
    prefix: str
    region: str = ""
    endpoint_url: str = ""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def place(address: Path | str, region: str = "", endpoint_url: str = "") -> Path | S3Prefix:
    """Where shards lie. Raises ConfigError for an s3:// address without a bucket."""
    if not str(address).startswith("s3:"):
        return Path(address)
    bucket, _, prefix = str(address).removeprefix("s3://").partition("/")
    if not str(address).startswith("s3://") or not bucket:
        raise ConfigError(f"{str(address)!r} names no bucket", expected="s3://bucket/prefix", where="transform.shards")
    return S3Prefix(bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "", region, endpoint_url)


class MappedFiles:
    """Files of a folder, mapped on first use, so it may be forked or pickled."""

    keeps = True  # what was read and verified once is the same memory the next time

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_maps": {}}

    def where(self, file: str) -> str:
        return str(self.folder / file)

    def read(self, file: str, start: int, stop: int, ahead: bool = False) -> np.ndarray:
        """uint8 [stop - start], a read-only view of the file. Raises DataError if it has fewer bytes.

        ahead: have the kernel fetch all of it at once, where that is not in memory yet. For the rows of a raw
        box, which it would else meet one by one, that halves the time from a disk; in memory it costs 5 %.
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
        """The next look for damaged shards reads this file, though its size and times have not changed."""
        stamps = _read_stamps(self.folder)
        if stamps.pop(file, None):
            with suppress(OSError):  # the folder was made one for reading only
                _write_stamps(self.folder, stamps)


class RangedFiles:
    """Objects below an S3 prefix, each read one GET of a range. A client is made in each process.

    Raises DataError without a secret or a signed address when S3 refuses, does not answer, or sends
    other bytes than it was asked for, four times.
    """

    keeps = False

    def __init__(self, place: S3Prefix) -> None:
        self.place = place
        self._owner, self._client = 0, None
        self._tables: dict[tuple[str, int], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_owner": 0, "_client": None, "_tables": {}}

    def where(self, file: str) -> str:
        return f"{self.place}/{file}"

    def read(self, file: str, start: int, stop: int, ahead: bool = False) -> np.ndarray:
        """uint8 [stop - start], read-only."""
        return np.frombuffer(self.get(file, start, stop), np.uint8)

    def table(self, file: str, start: int, stop: int) -> bytes:
        """Kept, so that a frame's boxes cost one request each after the first."""
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
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.5))  # many workers ask at once
        found = "no" if data is None else f"{len(data)}"
        raise DataError(
            f"{found} bytes came", expected=f"{(stop or 0) - start}", where=self.where(file), todo="copy it there again"
        )

    def _try(self, file: str, start: int, stop: int | None, last: bool) -> bytes | None:
        """None for what may pass: an answer that broke off, a 5xx, throttling. Raises botocore's errors."""
        from botocore import exceptions as b  # type: ignore[import-untyped]

        span = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            answer = self.client().get_object(Bucket=self.place.bucket, Key=self.place.prefix + file, **span)
            data: bytes = answer["Body"].read()
            return data
        except b.ClientError as e:
            status = e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if e.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise DataError("there is no such object", where=self.where(file), todo="copy it there again") from None
            if status == 416:
                return b""  # the object ends before the range
            if last or (status < 500 and status != 429):
                raise
        except (b.HTTPClientError, b.IncompleteReadError, b.ResponseStreamingError):
            if last:
                raise
        return None

    def client(self) -> Any:
        if self._owner != os.getpid():  # after a fork: connections are not for two processes
            self._client = aws_client("s3", region=self.place.region, endpoint_url=self.place.endpoint_url)
            self._owner = os.getpid()
        return self._client

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below the prefix."""
        with aws_errors(str(self.place), DataError):
            pages = (
                self.client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self.place.bucket, Prefix=self.place.prefix)
            )
            return {o["Key"].removeprefix(self.place.prefix): o["Size"] for p in pages for o in p.get("Contents", ())}

    def distrust(self, file: str) -> None:
        """Nothing is remembered of objects."""


Files = MappedFiles | RangedFiles


def open_files(place: Path | S3Prefix) -> Files:
    return MappedFiles(place) if isinstance(place, Path) else RangedFiles(place)


def not_as_made(folder: Path, made: dict[str, tuple[str, int]]) -> set[str]:
    """Of files with their (SHA-256, bytes or 0) those that are missing or not so; writes down which are."""
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
        with suppress(OSError):  # a folder for reading only is looked at in full the next time too
            _write_stamps(folder, trusted)
    return wrong


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written or replaced: the change time can't be set back by a program."""
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _read_stamps(folder: Path) -> dict[str, list[Any]]:
    """{file: [SHA-256, *stamp]} of the files that had their SHA-256 when they had this stamp."""
    try:
        stamps = read_json(folder / VERIFIED)
        return stamps if isinstance(stamps, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_stamps(folder: Path, stamps: dict[str, list[Any]]) -> None:
    (folder / VERIFIED).parent.mkdir(exist_ok=True)
    write_json(folder / VERIFIED, stamps)
