"""Store the ONNX graph without weights, which the archive holds once, in weights.safetensors.

Halves the archive, and graph and network can't have different weights. This uses ONNX's external data
format (onnx.ai, "External Data"), so any ONNX reader can load the files of an unpacked archive.
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
class _StoredTensor:
    """A float32 tensor in the bytes of a safetensors file."""

    shape: list[int]
    start: int
    length: int


def without_weights(graph: bytes, weights: bytes) -> bytes:
    """`graph`, an ONNX model, with references in place of the initializers that `weights`, a safetensors file, holds.

    Only float32 tensors of equal name, shape and content are replaced; others stay inside.
    """
    stored = _tensors(weights)
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

    Raises ArchiveError if `graph` is not an ONNX model or refers to anything outside `weights`.
    """
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError as e:
        raise ArchiveError("model.onnx is not an ONNX model", where=where, todo="fetch the release again") from e
    external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not external:
        return graph
    for tensor in external:
        location = {entry.key: entry.value for entry in tensor.external_data}
        tensor.raw_data = _part(weights, location, tensor.name, where)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return model.SerializeToString(deterministic=True)


def _part(weights: bytes, location: dict[str, str], name: str, where: str) -> bytes:
    start, length = (int(n) if (n := location.get(key, "")).isdecimal() else -1 for key in ("offset", "length"))
    if location.get("location") != WEIGHTS or start < 0 or not 0 <= length <= len(weights) - start:
        raise ArchiveError(
            f"tensor {name!r} of model.onnx points to {location}",
            expected=f"a part of {WEIGHTS}, {len(weights)} bytes",
            where=where,
            todo="do not use it: it was not made by roadseg, or was changed",
        )
    return weights[start : start + length]


def _tensors(weights: bytes) -> dict[str, _StoredTensor]:
    """The float32 tensors by name. File layout: header length (little-endian uint64), JSON header, tensor bytes."""
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    return {
        name: _StoredTensor(
            entry["shape"], 8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }
