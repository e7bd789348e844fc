"""model.tar.gz, the archive of a release: byte-reproducible, read in memory, each member verified."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from roadseg.errors import ArchiveError
from roadseg.files import sha256_bytes, write_atomic
from roadseg.labels import LabelSet
from roadseg.release.graph import WEIGHTS, with_weights

SCHEMA_VERSION = 2  # version 1 stored the weights in model.onnx as well
MODEL, ONNX, TERMS = "model.json", "model.onnx", "LICENSE-DATA"
MEMBERS = frozenset({MODEL, ONNX, WEIGHTS, TERMS})
GZIP = b"\x1f\x8b"  # first bytes of a gzip file
LIMIT_BYTES = 2 << 30
LIMIT_RATIO = 20  # unpacked to packed bytes; our archives are uncompressed, and weights hardly compress
SMALL_BYTES = 1 << 20  # no ratio limit below this size: tar's padding compresses well


@dataclass(frozen=True)
class Release:
    """A verified model archive in memory.

    digest: SHA-256 of the archive file, the release's name. model: the content of model.json.
    """

    digest: str
    model: dict[str, Any]
    members: dict[str, bytes] = field(repr=False)

    @cached_property
    def label_set(self) -> LabelSet:
        return LabelSet.from_json(self.model["label_set"])

    @cached_property
    def onnx(self) -> bytes:
        """The graph with its weights. Raises ArchiveError if it refers to weights outside the archive."""
        return with_weights(self.members[ONNX], self.members[WEIGHTS], f"release {self.digest[:12]}")

    @property
    def temperature(self) -> float:
        """Probabilities are softmax((logits - class_offsets) / temperature); fitted on validation."""
        return float(self.model["temperature"])

    @cached_property
    def class_offsets(self) -> np.ndarray:
        """float32 [K]: added to the logits to raise mIoU; subtract before computing probabilities."""
        return offsets_of(self.model.get("training", {}), self.label_set.names)


def offsets_of(training: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """float32 [K] from the `training` section of model.json; 0 for classes without an offset."""
    named = training.get("class_offsets", {})
    return np.array([named.get(name, 0.0) for name in names], np.float32)


def write_archive(path: Path, model: dict[str, Any], onnx: bytes, weights: bytes, terms: str) -> str:
    """Write model.tar.gz atomically and return its SHA-256. The same arguments give the same bytes.

    model: the content of model.json without schema version and digests, which are added here. onnx: the
    graph, with its weights inside or in `weights` (graph.without_weights).
    """
    members = {ONNX: onnx, WEIGHTS: weights, TERMS: terms.encode()}
    digests = {name: sha256_bytes(data) for name, data in members.items()}
    described = {**model, "schema_version": SCHEMA_VERSION, "members": digests}
    members[MODEL] = json.dumps(described, indent=1, sort_keys=True).encode() + b"\n"
    data = _pack(members)
    write_atomic(path, data)
    return sha256_bytes(data)


def _pack(members: dict[str, bytes]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)  # mtime, owner and mode are constants
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))
    return _stored_gzip(plain.getvalue())


def _stored_gzip(data: bytes) -> bytes:
    """A gzip file (RFC 1952) of stored, uncompressed blocks (RFC 1951, 3.2.4).

    Versions of zlib and zlib-ng compress the same data to different bytes, so another machine could not
    reproduce the digest of a compressed archive from its members. Weights hardly compress anyway.
    """
    out = io.BytesIO()
    out.write(GZIP + b"\x08\x00" + bytes(4) + b"\x00\xff")  # deflate, no flags, no time, unknown system
    for start in range(0, len(data), 65535):
        block = data[start : start + 65535]
        is_last = start + 65535 >= len(data)
        out.write(struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF) + block)
    out.write(struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF))
    return out.getvalue()


def load_release(path: Path, expected_digest: str = "") -> Release:
    """Read and verify a model.tar.gz; nothing is unpacked to disk and nothing is unpickled.

    Raises ArchiveError when it is unreadable, has missing or unexpected members, has a newer schema
    version, or when a digest (a member's, or `expected_digest` of the whole) does not match.
    """
    where = str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArchiveError("no such file", expected="a model.tar.gz", where=where, todo="check the path") from None
    except IsADirectoryError:
        raise ArchiveError(
            "a folder", expected="a model.tar.gz", where=where, todo="give the archive inside it"
        ) from None
    if data[:2] != GZIP:
        raise ArchiveError("not a gzip file", expected="a model.tar.gz", where=where, todo="check the path")
    digest = sha256_bytes(data)
    if expected_digest and digest != expected_digest:
        raise ArchiveError(
            f"its SHA-256 is {digest}",
            expected=expected_digest,
            where=where,
            todo="the file was changed or damaged; fetch it again",
        )
    return _verified(digest, _read_members(data, where), where)


def load_release_folder(folder: Path) -> Release:
    """Read and verify the members of an unpacked model.tar.gz, as SageMaker leaves them in /opt/ml/model.

    The digest is that of the archive that `write_archive` would make from these members. Raises
    ArchiveError like `load_release`. Links are followed: nothing is written, and the folder's owner made them.
    """
    where = str(folder)
    try:
        found = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise ArchiveError("no such folder", expected="an unpacked model.tar.gz", where=where) from None
    for path in found:
        if path.name not in MEMBERS or not path.is_file():
            raise _not_allowed(path.name, where)
    if sum(path.stat().st_size for path in found) > LIMIT_BYTES:
        raise ArchiveError(f"holds more than {LIMIT_BYTES} bytes", where=where)
    members = {path.name: path.read_bytes() for path in found}
    _check_complete(members, where)
    return _verified(sha256_bytes(_pack(members)), members, where)


def _verified(digest: str, members: dict[str, bytes], where: str) -> Release:
    model = _read_model(members, where)
    for name, sha256 in model["members"].items():
        if sha256_bytes(members.get(name, b"")) != sha256:
            raise ArchiveError(f"{name} does not match its digest", where=where, todo="fetch the release again")
    return Release(digest, model, members)


def _not_allowed(name: str, where: str) -> ArchiveError:
    return ArchiveError(
        f"member {name!r} is not allowed",
        expected=f"the plain files {', '.join(sorted(MEMBERS))}, each once",
        where=where,
        todo="do not use it: it was not made by roadseg, or was changed",
    )


def _check_complete(members: dict[str, bytes], where: str) -> None:
    if missing := MEMBERS - members.keys():
        raise ArchiveError(f"lacks {', '.join(sorted(missing))}", where=where, todo="fetch the release again")


def _read_members(data: bytes, where: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_inflate(data, where)), mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse() or member.name not in MEMBERS or member.name in members:
                    raise _not_allowed(member.name, where)
                source = tar.extractfile(member)
                assert source is not None
                members[member.name] = source.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as e:
        raise ArchiveError(f"not a readable .tar.gz ({e})", where=where, todo="fetch it again") from e
    _check_complete(members, where)
    return members


def _inflate(data: bytes, where: str) -> bytes:
    """Decompress a gzip file within the size limits. Also raises zlib.error and EOFError."""
    limit = min(LIMIT_BYTES, max(SMALL_BYTES, LIMIT_RATIO * len(data)))
    inflater = zlib.decompressobj(wbits=31)  # gzip, checksum included
    plain = inflater.decompress(data, limit + 1)
    if len(plain) > limit:
        raise ArchiveError(
            f"its {len(data):,} bytes unpack to more than {limit:,}",
            expected=f"at most {LIMIT_RATIO} times as many",
            where=where,
            todo="do not use it: it was not made by roadseg, or was changed",
        )
    if not inflater.eof:
        raise EOFError("it is truncated")
    if inflater.unused_data:
        raise EOFError("unexpected data after its end")
    return plain


def _read_model(members: dict[str, bytes], where: str) -> dict[str, Any]:
    try:
        model = json.loads(members[MODEL])
        version = model["schema_version"]
        if not 1 <= version <= SCHEMA_VERSION:
            raise ArchiveError(
                f"schema version {version}", expected=f"1..{SCHEMA_VERSION}", where=where, todo="update roadseg"
            )
        if set(model["members"]) != MEMBERS - {MODEL}:
            raise ArchiveError("model.json does not list the members' digests", where=where)
        LabelSet.from_json(model["label_set"]).trained  # noqa: B018 (fails here on train ids that are not 0..n-1)
        float(model["temperature"])
        for offset in model.get("training", {}).get("class_offsets", {}).values():
            float(offset)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as e:
        raise ArchiveError(f"model.json is not readable ({type(e).__name__}: {e})", where=where) from e
    return model
