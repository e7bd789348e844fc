"""Store the ONNX graph without weights, which the archive holds once, in weights.safetensors.

Halves the archive, and graph and network can't differ in a weight. It is what ONNX calls external data
(onnx.ai, "External Data"), so that the files of an unpacked archive are a model to all that reads ONNX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from roadseg.errors import ArchiveError

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class _Stored:
    """A float32 tensor in the bytes of a safetensors file."""

    shape: list[int]
    start: int
    length: int


def without_weights(graph: bytes, weights: bytes) -> bytes:
    """`graph`, an ONNX model, pointing into `weights`, a safetensors file, for each initializer that is in both.

    The same are float32 tensors of one name, shape and content; others stay inside.
    """
    stored = _stored(weights)
    model = onnx.load_model_from_string(graph)
    for tensor in model.graph.initializer:
        found = stored.get(tensor.name)
        if found is None or tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != found.shape:
            continue
        if onnx.numpy_helper.to_array(tensor).tobytes() != weights[found.start : found.start + found.length]:
            continue
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", found.start), ("length", found.length)):
            tensor.external_data.add(key=key, value=str(value))
    return model.SerializeToString(deterministic=True)


def with_weights(graph: bytes, weights: bytes, where: str) -> bytes:
    """The inverse: one ONNX model with everything inside, for runtimes that read it from memory.

    Raises ArchiveError if `graph` is no ONNX model, or points elsewhere than into `weights`.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as e:
        raise ArchiveError("model.onnx is no ONNX model", where=where, todo="fetch the release again") from e
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not outside:
        return graph
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = _part(weights, place, tensor.name, where)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model.SerializeToString(deterministic=True)


def _part(weights: bytes, place: dict[str, str], name: str, where: str) -> bytes:
    start, length = (int(n) if (n := place.get(key, "")).isdecimal() else -1 for key in ("offset", "length"))
    if place.get("location") != WEIGHTS or start < 0 or not 0 <= length <= len(weights) - start:
        raise ArchiveError(
            f"tensor {name!r} of model.onnx points to {place}",
            expected=f"a part of {WEIGHTS}, {len(weights)} bytes",
            where=where,
            todo="do not use it: it was not made by roadseg, or was changed",
        )
    return weights[start : start + length]


def _stored(weights: bytes) -> dict[str, _Stored]:
    """The header's entries by name. Format: its length as a little-endian uint64, JSON, then the tensors' bytes."""
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    return {
        name: _Stored(
            entry["shape"], 8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }
