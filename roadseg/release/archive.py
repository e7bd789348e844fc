"""model.tar.gz: the one file a release is. Byte-reproducible, read in memory, verified member by member."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from roadseg.errors import ArchiveError
from roadseg.files import sha256_bytes, write_atomic
from roadseg.labels import LabelSet

SCHEMA_VERSION = 1
MODEL, ONNX, WEIGHTS, TERMS = "model.json", "model.onnx", "weights.safetensors", "LICENSE-DATA"
MEMBERS = frozenset({MODEL, ONNX, WEIGHTS, TERMS})
LIMIT_BYTES = 2 << 30


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

    @property
    def onnx(self) -> bytes:
        return self.members[ONNX]

    @property
    def temperature(self) -> float:
        """Divides logits before softmax; fitted on validation."""
        return float(self.model["temperature"])


def write_archive(path: Path, model: dict[str, Any], onnx: bytes, weights: bytes, terms: str) -> str:
    """Write model.tar.gz atomically and return its SHA-256. The same arguments give the same bytes.

    model: what model.json says beyond schema version and digests, which are added here.
    """
    members = {ONNX: onnx, WEIGHTS: weights, TERMS: terms.encode()}
    digests = {name: sha256_bytes(data) for name, data in members.items()}
    described = {**model, "schema_version": SCHEMA_VERSION, "members": digests}
    members[MODEL] = json.dumps(described, indent=1, sort_keys=True).encode() + b"\n"
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)  # mtime, owner and mode are constants
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))
    data = gzip.compress(plain.getvalue(), compresslevel=6, mtime=0)
    write_atomic(path, data)
    return sha256_bytes(data)


def load_release(path: Path, expected_digest: str = "") -> Release:
    """Read and verify a model.tar.gz; nothing is unpacked to disk and nothing is unpickled.

    Raises ArchiveError when it is unreadable, holds other members than a release has, is of a newer
    schema, or when a digest (a member's, or `expected_digest` of the whole) does not match.
    """
    where = str(path)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise ArchiveError("no such file", expected="a model.tar.gz", where=where, todo="check the path") from None
    digest = sha256_bytes(data)
    if expected_digest and digest != expected_digest:
        raise ArchiveError(
            f"its SHA-256 is {digest}",
            expected=expected_digest,
            where=where,
            todo="the file was changed or damaged; fetch it again",
        )
    members = _read_members(data, where)
    model = _read_model(members, where)
    for name, sha256 in model["members"].items():
        if sha256_bytes(members.get(name, b"")) != sha256:
            raise ArchiveError(f"{name} does not match its digest", where=where, todo="fetch the release again")
    return Release(digest, model, members)


def _read_members(data: bytes, where: str) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            for member in tar:
                total += member.size
                if not member.isreg() or member.name not in MEMBERS or member.name in members:
                    raise ArchiveError(
                        f"member {member.name!r} is not allowed",
                        expected=f"the plain files {', '.join(sorted(MEMBERS))}, each once",
                        where=where,
                        todo="do not use it: it was not made by roadseg, or was changed",
                    )
                if total > LIMIT_BYTES:
                    raise ArchiveError(f"unpacks to more than {LIMIT_BYTES} bytes", where=where)
                source = tar.extractfile(member)
                assert source is not None
                members[member.name] = source.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        raise ArchiveError(f"not a readable .tar.gz ({e})", where=where, todo="fetch it again") from e
    if missing := MEMBERS - members.keys():
        raise ArchiveError(f"lacks {', '.join(sorted(missing))}", where=where, todo="fetch the release again")
    return members


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
        LabelSet.from_json(model["label_set"])
        float(model["temperature"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArchiveError(f"model.json is not readable ({type(e).__name__}: {e})", where=where) from e
    return model
