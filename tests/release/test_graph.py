"""Weights lie in an archive once, and the graph finds them there and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from roadseg.errors import ArchiveError
from roadseg.release.archive import ONNX, load_release
from roadseg.release.graph import WEIGHTS, with_weights, without_weights
from tests.conftest import write_release

KERNEL = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
BIAS = np.arange(4, dtype=np.float32)


def convolution(kernel: np.ndarray = KERNEL) -> bytes:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])
    inside = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(BIAS, "bias")]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "kernel", "bias"], ["y"])], "g", [image], [out], inside)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString(deterministic=True)


def answer(model: bytes | str) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def outside(graph: bytes) -> set[str]:
    found = onnx.load_model_from_string(graph).graph.initializer
    return {tensor.name for tensor in found if tensor.data_location == TensorProto.EXTERNAL}


def test_shared_weights_are_stored_once_and_restored(tmp_path: Path) -> None:
    whole, weights = convolution(), save({"another": KERNEL[:1], "bias": BIAS, "kernel": KERNEL})
    graph = without_weights(whole, weights)
    assert outside(graph) == {"bias", "kernel"} and KERNEL[0].tobytes() not in graph
    np.testing.assert_array_equal(answer(with_weights(graph, weights, "")), answer(whole))
    # Any reader of ONNX files finds them in the folder of an unpacked archive.
    (tmp_path / ONNX).write_bytes(graph)
    (tmp_path / WEIGHTS).write_bytes(weights)
    np.testing.assert_array_equal(answer(str(tmp_path / ONNX)), answer(whole))


@pytest.mark.parametrize(
    "other",
    [{}, {"kernel": KERNEL + 1}, {"kernel": KERNEL.reshape(4, 27)}, {"kernel": KERNEL.view(np.int32)}],
    ids=["none", "of another content", "of another shape", "of another type"],
)
def test_weights_that_differ_stay_in_the_graph(other: dict[str, np.ndarray]) -> None:
    whole, weights = convolution(), save(other)
    graph = without_weights(whole, weights)
    assert not outside(graph) and with_weights(graph, weights, "") == graph
    np.testing.assert_array_equal(answer(graph), answer(whole))


def test_a_release_gives_the_whole_graph(tmp_path: Path) -> None:
    whole, weights = convolution(), save({"kernel": KERNEL, "bias": BIAS})
    release = load_release(
        write_release(tmp_path / "model.tar.gz", graph=without_weights(whole, weights), weights=weights)
    )
    assert outside(release.members[ONNX]) == {"bias", "kernel"}
    np.testing.assert_array_equal(answer(release.onnx), answer(whole))


@pytest.mark.parametrize(
    "place",
    [
        {"location": "/etc/passwd", "offset": "0", "length": "4"},
        {"location": "../weights.safetensors", "offset": "0", "length": "4"},
        {"location": WEIGHTS, "offset": "-1", "length": "4"},
        {"location": WEIGHTS, "offset": "0", "length": "1000000"},
        {"location": WEIGHTS, "offset": "1000000", "length": "0"},
        {"location": WEIGHTS, "offset": "x", "length": "4"},
        {"location": WEIGHTS, "length": "4"},
        {},
    ],
    ids=lambda place: " ".join(place.values()) or "nothing",
)
def test_references_outside_the_weights_are_refused(place: dict[str, str]) -> None:
    model, weights = onnx.load_model_from_string(convolution()), save({"bias": BIAS})
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(ArchiveError, match="tensor 'bias' of model.onnx points to .* a part of weights.safetensors"):
        with_weights(model.SerializeToString(), weights, "release 0")


def test_bytes_that_are_not_onnx_are_refused() -> None:
    with pytest.raises(ArchiveError, match="is not an ONNX model"):
        with_weights(b"\xff" * 40, save({}), "release 0")
