"""Export the network to ONNX and check that the graph computes the same function.

Shapes: B images, K classes, H x W pixels of the image, h x w at the decoder's stride.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime  # type: ignore[import-untyped]
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.nn import functional as F

from roadseg.errors import ExportError, NonFiniteLoss
from roadseg.files import write_atomic
from roadseg.progress import quiet

INPUT, OUTPUT = "image", "logits"

# Not 1, which the exporter would treat as a constant, nor a size that layers treat specially.
TRACED_BHW = (2, 64, 96)
# (height, width), smaller and larger than the traced size, not multiples of it: odd map sizes at every stride.
OTHER_SIZES = ((80, 112), (51, 77), (129, 161))
CLOSE = 0.01  # of the largest logit: rounding errors are far smaller, a wrong graph differs by more
ADVICE = "choose another model.backbone, such as mobilenetv2_100 or resnet18"


def export_onnx(network: nn.Module, path: Path) -> None:
    """Write `network` in eval mode: `image` uint8 [B, 3, H, W] RGB to `logits` float32 [B, K, h, w].

    B, H and W are dynamic. One file, weights inside; its bytes depend only on the network and the
    installed packages, and it contains no local path. `network` is not modified.
    Raises ExportError if a layer can't be exported.
    """
    batch, height, width = TRACED_BHW
    sample = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    try:
        # The exporter logs its internals; real failures raise an exception.
        with quiet("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _plain_copy(network),
                (sample,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        raise ExportError(
            f"the ONNX exporter rejected this network ({str(e).strip().splitlines()[0]})",
            expected="layers that export with dynamic batch, height and width",
            todo=ADVICE,
        ) from e
    assert program is not None
    _simplify(program.model)
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model)
    write_atomic(path, model.SerializeToString(deterministic=True))


def _simplify(model: onnx_ir.Model) -> None:
    """The exporter's own optimization without folding batch norms into convolutions, so that the weights in
    the graph stay those of the network. Runtimes fold batch norms when they load the graph.
    """
    passes.InlinePass()(model)
    fold_constants(model)
    for simplification in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        simplification(model)


def _plain_copy(network: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, eval mode and contiguous memory format."""
    plain = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    for module in plain.modules():
        # In-place activations go through symbolic decompositions, which took more than half of the
        # export's time (17 s against 8 s for a MobileNetV2); the values are the same.
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return plain


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, module names and the inferred shapes between layers."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
    for function in model.functions:
        del function.value_info[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def check_export(
    path: Path, network: nn.Module, samples: Sequence[np.ndarray], minimum_agreement: float = 0.9999
) -> float:
    """Share of pixels to which onnxruntime with `path` and PyTorch with `network` assign the same class.

    samples: RGB images uint8 [H, W, 3], sizes may differ. The class is the argmax after upsampling
    (bilinear, align_corners=False) to H x W. Raises ExportError below `minimum_agreement`, on logits
    that are not finite, if onnxruntime can't run the graph, and like check_sizes; NonFiniteLoss if the
    network's own logits are not finite.
    """
    session, plain = _session(path), _plain_copy(network)
    equal = total = 0
    worst, worst_size = 1.0, (0, 0)
    for image_HWC in samples:
        image_1CHW = np.ascontiguousarray(image_HWC.transpose(2, 0, 1)[None])
        with torch.inference_mode():
            ours = plain(torch.from_numpy(image_1CHW))
            theirs = _run(session, image_1CHW, path)
            size = image_HWC.shape[:2]
            if not ours.isfinite().all():
                raise NonFiniteLoss(
                    f"the trained network's scores of an image of {size[1]}x{size[0]} are not finite numbers",
                    expected="finite numbers, as the losses still were",
                    todo="training diverged: a lower training.learning_rate or longer training.warmup_steps often help",
                )
            if ours.shape != theirs.shape or not theirs.isfinite().all():
                raise ExportError(
                    f"logits {list(theirs.shape)} from ONNX, {list(ours.shape)} from PyTorch, or ONNX's are not finite",
                    expected="finite logits of equal shape",
                    where=f"{path}, image of {size[1]}x{size[0]}",
                )
            same = int((_classes(ours, size) == _classes(theirs, size)).sum())
        equal, total = equal + same, total + size[0] * size[1]
        if same / (size[0] * size[1]) < worst:
            worst, worst_size = same / (size[0] * size[1]), size
    if total == 0:
        raise ExportError("no sample image to check the export with", expected="one image or more", where=str(path))
    if equal / total < minimum_agreement:
        raise ExportError(
            f"ONNX and PyTorch agree on {equal / total:.6f} of {total} pixels, "
            f"worst {worst:.6f} on an image of {worst_size[1]}x{worst_size[0]}",
            expected=f"{minimum_agreement} or more",
            where=str(path),
            todo="the file is not the network that was trained: do not ship it; choose another model.backbone or "
            "other versions of torch, onnxscript and onnxruntime",
        )
    _check_sizes(session, plain, path)
    return equal / total


def check_sizes(path: Path, network: nn.Module) -> None:
    """Check on random pixels that `path` computes the same as `network` at OTHER_SIZES; also for untrained networks.

    Logits are compared, not classes: only a few pixels of noise are checked, and hardly any lie at a class boundary.
    Raises ExportError if they differ, or if onnxruntime or PyTorch can't run such a size.
    """
    _check_sizes(_session(path), _plain_copy(network), path)


def _check_sizes(session: onnxruntime.InferenceSession, plain: nn.Module, path: Path) -> None:
    random = np.random.default_rng(0)
    for height, width in OTHER_SIZES:
        image_1CHW = random.integers(0, 256, (1, 3, height, width), dtype=np.uint8)
        try:
            with torch.inference_mode():
                ours = plain(torch.from_numpy(image_1CHW))
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as e:
            raise _cannot_run("PyTorch itself", image_1CHW, path, f"{type(e).__name__}: {e}") from e
        theirs = _run(session, image_1CHW, path)
        found = f"logits {list(theirs.shape)} from ONNX, {list(ours.shape)} from PyTorch"
        if ours.shape == theirs.shape:
            apart, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
            if apart <= CLOSE * largest or not ours.isfinite().all():  # an untrained network may give these
                continue
            found = f"ONNX's logits are up to {apart:.3g} from PyTorch's, the largest of which is {largest:.3g}"
        raise ExportError(
            found,
            expected="the same function for images of any size, which a release must take",
            where=f"{path}, image of {width}x{height}",
            todo=ADVICE,
        )


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures raise exceptions
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exception classes can't be imported
        found = f"onnxruntime rejected the graph ({_cause(str(e))})"
        raise ExportError(found, expected="a graph that it can run", where=str(path), todo=ADVICE) from e


def _run(session: onnxruntime.InferenceSession, image_1CHW: np.ndarray, path: Path) -> Tensor:
    try:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: image_1CHW})[0])
    except Exception as e:  # as in _session
        raise _cannot_run("onnxruntime", image_1CHW, path, str(e)) from e


def _cannot_run(runtime: str, image_1CHW: np.ndarray, path: Path, message: str) -> ExportError:
    height, width = image_1CHW.shape[2:]
    found, cause = f"{runtime} can't run the network on an image of {width}x{height}", _cause(message)
    if "alloc" in cause:
        return ExportError(f"{found} ({cause})", expected="memory for it", where=str(path), todo="free some, run again")
    return ExportError(
        f"{found} ({cause})", expected="images of any size, which a release must take", where=str(path), todo=ADVICE
    )


def _cause(message: str) -> str:
    """The first line without onnxruntime's error codes and source locations."""
    line = (message.strip().splitlines() or [""])[0]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return re.sub(r" Status Message: /\S+ .* was false\.", ":", line).strip()


def _classes(logits_1Khw: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits_1Khw, size=size, mode="bilinear", align_corners=False).argmax(dim=1)
