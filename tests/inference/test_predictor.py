from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from roadseg.errors import ArchiveError, ImageError
from roadseg.inference.predictor import Predictor
from roadseg.release.archive import load_release
from tests.conftest import channel_graph, write_release


@pytest.fixture(scope="module")
def predictor(release_path: Path) -> Predictor:
    return Predictor(load_release(release_path), threads=1)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (63, 95), (5, 200), (2, 2), (1, 1)])
def test_a_label_of_the_image_s_size(predictor: Predictor, size: tuple[int, int]) -> None:
    pixels = image(*size)
    label = predictor(pixels)
    assert label.shape == size and label.dtype == np.uint8
    channels = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    logits = F.avg_pool2d(channels, 2, 2, ceil_mode=True)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    assert (label == expected).mean() >= 0.999 or (label != expected).sum() <= 1
    assert predictor.logits(pixels).shape == tuple(logits.shape[1:])


def test_strided_views_are_accepted(predictor: Predictor) -> None:
    whole = image(40, 60)
    for view in (whole[::-1], whole[:, ::2], whole[4:20, 3:33]):
        assert np.array_equal(predictor(view), predictor(view.copy()))


def test_several_threads_get_their_own_answers(predictor: Predictor) -> None:
    images = [image(30 + i, 50, i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predictor, images))
    assert all(np.array_equal(label, predictor(pixels)) for label, pixels in zip(found, images, strict=True))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_arrays_that_are_not_images_are_refused(predictor: Predictor, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"an array of \w+ \[4, 4.*expected an image: uint8 RGB \[H, W, 3\]"):
        predictor(array)


def test_a_file_name_is_not_an_image(predictor: Predictor) -> None:
    with pytest.raises(ImageError, match=r"a str; expected a NumPy array: uint8 RGB \[H, W, 3\]"):
        predictor("photo.jpg")  # type: ignore[arg-type]


def test_it_names_its_runtime(predictor: Predictor) -> None:
    assert predictor.runtime.startswith("onnxruntime 1.") and predictor.runtime.endswith(" CPU")


def renamed(old: str, new: str) -> bytes:
    model = onnx.load_model_from_string(channel_graph())
    for node in model.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    return model.SerializeToString()


def two_classes() -> bytes:
    model = onnx.load_model_from_string(channel_graph())
    starts, ends, axes = (
        helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in zip("sea", (0, 2, 1), strict=True)
    )
    model.graph.initializer.extend([starts, ends, axes])
    model.graph.node[-1].output[:] = ["all"]
    model.graph.node.append(helper.make_node("Slice", ["all", "s", "e", "a"], ["logits"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"no graph", "onnxruntime rejected the graph"),
        (renamed("image", "picture"), "takes picture"),
        (renamed("logits", "scores"), "gives scores"),
        (two_classes(), "gives logits of 2 classes; expected 3"),
    ],
    ids=["garbage", "input", "output", "classes"],
)
def test_a_graph_that_is_not_one_of_ours_is_refused(tmp_path: Path, graph: bytes, message: str) -> None:
    release = load_release(write_release(tmp_path / "model.tar.gz", graph=graph))
    with pytest.raises(ArchiveError, match=message):
        Predictor(release, threads=1)


def with_weight(weight: TensorProto) -> bytes:
    """The channels plus the largest number of `weight`."""
    model = onnx.load_model_from_string(channel_graph())
    model.graph.initializer.append(weight)
    model.graph.node[-1].output[:] = ["pooled"]
    model.graph.node.append(helper.make_node("ReduceMax", [weight.name], ["most"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["pooled", "most"], ["logits"]))
    return model.SerializeToString()


def test_a_graph_reads_no_file_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """External data: a hostile graph must not take its weights from elsewhere."""
    inside = with_weight(helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0, 1.0, 2.0, 3.0]))
    release = load_release(write_release(tmp_path / "model.tar.gz", graph=inside))
    assert Predictor(release, threads=1).logits(np.zeros((8, 8, 3), np.uint8)).max() == 3
    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    for location in ("secret", str(tmp_path / "secret"), "../" * 9 + str(tmp_path / "secret")[1:]):
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=location)
        path = write_release(tmp_path / "model.tar.gz", graph=with_weight(weight))
        with pytest.raises(ArchiveError):
            Predictor(load_release(path), threads=1)
