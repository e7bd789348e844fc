import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from roadseg.errors import ExportError, NonFiniteLoss
from roadseg.model import Architecture, DeepLabV3Plus, build
from roadseg.model.sk_fusion import FUSIONS
from roadseg.release import export
from roadseg.release.export import check_export, check_sizes, export_onnx

SIZES = [(64, 96), (33, 65), (1, 1), (2, 3), (97, 131), (180, 240)]  # the first is the traced one


@dataclass(frozen=True)
class Exported:
    network: DeepLabV3Plus
    path: Path


EXPORTED_BY_DEFAULT = ("skfusion", "concat")  # an export takes seconds; the other forms run on demand


@pytest.fixture(
    scope="module",
    params=[
        fusion if fusion in EXPORTED_BY_DEFAULT else pytest.param(fusion, marks=pytest.mark.slow) for fusion in FUSIONS
    ],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """On timm's smallest model: an export takes a time for each layer."""
    fusion = request.param
    head = "dense" if fusion in ("skfusion", "sknet") else "separable"
    a = Architecture(num_classes=7, backbone="test_efficientnet", channels=16, fusion=fusion, head=head, auxiliary=True)
    network = build(a, seed=2).train().to(memory_format=torch.channels_last)
    _settle(network)
    path = tmp_path_factory.mktemp(fusion) / "model.onnx"
    export_onnx(network, path)
    assert network.training  # left as it was
    return Exported(network, path)


def _settle(network: DeepLabV3Plus) -> None:
    """Classes that differ from pixel to pixel: real batch statistics and a classifier that is not near zero."""
    with torch.no_grad():
        network.decoder.classifier.weight.mul_(50)
        for step in range(3):
            network(torch.from_numpy(scene(65, 97, step).transpose(2, 0, 1)[None].repeat(2, 0)))


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth blobs with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40.0
    waves = [np.sin(x * rng.uniform(0.5, 2) + rng.uniform(0, 6)) * np.cos(y * rng.uniform(0.5, 2)) for _ in range(3)]
    return np.clip(128 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def test_agrees_with_pytorch_at_other_sizes_than_the_traced(exported: Exported) -> None:
    samples = [scene(*size, seed) for seed, size in enumerate(SIZES)]
    assert check_export(exported.path, exported.network, samples) >= 0.9999
    with torch.inference_mode():
        logits = exported.network.inference_network()(torch.from_numpy(samples[-1].transpose(2, 0, 1)[None].copy()))
    assert len(logits.argmax(1).unique()) > 2  # agreement on a constant would prove nothing


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_of_a_batch_are_pytorchs(exported: Exported, batch: int) -> None:
    images = np.stack([scene(50, 75, seed).transpose(2, 0, 1) for seed in range(batch)])
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    with torch.inference_mode():
        expected = exported.network.inference_network()(torch.from_numpy(images)).numpy()
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_file_is_self_contained_without_local_paths(exported: Exported) -> None:
    model = onnx.load(exported.path, load_external_data=False)
    assert [p.name for p in exported.path.parent.iterdir()] == ["model.onnx"]
    assert not any(t.external_data for t in model.graph.initializer)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    image_dims, logits_dims = (
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (image, logits)
    )
    assert image_dims == ["batch", 3, "height", "width"]
    assert logits_dims[:2] == ["batch", 7] and all(isinstance(d, str) for d in logits_dims[2:])
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any("auxiliary" in tensor.name for tensor in model.graph.initializer)
    del model.graph.initializer[:]  # random bytes can spell anything
    text = model.SerializeToString()
    for word in (os.getcwd(), str(Path(torch.__file__).parents[1]), "site-packages", ".py"):
        assert word.encode() not in text


def test_same_network_same_bytes(exported: Exported, tmp_path: Path) -> None:
    if exported.network.architecture.fusion != "skfusion":
        pytest.skip("each export takes seconds; one form is enough")
    export_onnx(exported.network.inference_network(), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.path.read_bytes()


def test_a_different_network_is_refused_with_its_agreement(exported: Exported) -> None:
    other = build(exported.network.architecture, seed=9)
    with pytest.raises(ExportError, match=r"agree on 0\.\d+ of 4375 pixels, worst 0\.\d+ on an image of 6[05]x35"):
        check_export(exported.path, other, [scene(35, 65), scene(35, 60)])


def test_logits_that_are_not_finite_are_refused(exported: Exported, tmp_path: Path) -> None:
    if exported.network.architecture.fusion != "skfusion":
        pytest.skip("each export takes seconds; one form is enough")
    sound, broken = exported.network.inference_network(), exported.network.inference_network()
    with torch.no_grad():
        broken.decoder.classifier.bias[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="scores of an image of 40x32 are not finite numbers; .* diverged"):
        check_export(exported.path, broken, [scene(32, 40)])
    export_onnx(broken, tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match="ONNX's are not finite"):
        check_export(tmp_path / "broken.onnx", sound, [scene(32, 40)])


def test_no_samples_is_an_error(exported: Exported) -> None:
    with pytest.raises(ExportError, match="no sample"):
        check_export(exported.path, exported.network, [])


class Undecided(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.float() if image.sum() > 0 else -image.float()


def test_network_that_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exporter rejected"):
        export_onnx(Undecided(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


class InPairs(torch.nn.Module):
    """As MobileViT, it resizes maps of odd sides before it cuts them: the graph, traced at even ones, does not."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        b, c, height, width = image.shape
        even = math.ceil(height / 2) * 2, math.ceil(width / 2) * 2
        x = image.float()
        if even != (height, width):
            x = F.interpolate(x, size=even, mode="bilinear")
        cut = x.reshape(b * c * (even[0] // 2), 2, even[1] // 2, 2).flip(1)
        x = cut.reshape(b, c, *even)
        return x if even == (height, width) else F.interpolate(x, size=(height, width), mode="bilinear")


@pytest.mark.parametrize(("frame", "failed"), [((64, 96), "77x51"), ((80, 112), "77x51"), ((35, 60), "60x35")])
def test_graph_that_does_not_take_any_size_is_refused(
    frame: tuple[int, int], failed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_onnx(InPairs(), path := tmp_path / "model.onnx")
    with pytest.raises(ExportError) as caught:
        check_export(path, InPairs(), [scene(*frame)])
    e = caught.value
    assert e.found.startswith(f"onnxruntime can't run the network on an image of {failed} (Non-zero status code")
    assert "Reshape node" in e.found and "reshaped to the requested shape" in e.found and "/" not in e.found
    assert e.expected == "images of any size, which a release must take" and e.where == str(path)
    assert e.todo.startswith("choose another model.backbone") and e.exit_code == 1
    assert capfd.readouterr() == ("", "")  # onnxruntime's own lines


class Of32(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[2:]
        return image.float().view(-1, 3, height // 32, 32, width).flatten(2, 3)


def test_other_sizes_are_checked_without_a_frame(exported: Exported, tmp_path: Path) -> None:
    check_sizes(exported.path, exported.network)
    with pytest.raises(ExportError, match=r"PyTorch itself can't run the network on .* 112x80 \(RuntimeError: shape"):
        check_sizes(exported.path, Of32())
    with pytest.raises(ExportError, match=r"logits are up to \S+ from PyTorch's, .*; expected the same function"):
        check_sizes(exported.path, build(exported.network.architecture, seed=9))
    with pytest.raises(ExportError, match=r"from ONNX, \[1, 3, 80, 112\] from PyTorch; expected the same"):
        check_sizes(exported.path, Undecided())
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="onnxruntime rejected the graph"):
        check_sizes(tmp_path / "no.onnx", exported.network)


class WithoutMemory:
    def run(self, *_: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for a buffer of 9")


def test_out_of_memory_does_not_blame_the_backbone(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_session", lambda _: WithoutMemory())
    with pytest.raises(ExportError, match=r"40x32 \(Failed to allocate memory .*; free some, run again$"):
        check_export(exported.path, exported.network, [scene(32, 40)])
