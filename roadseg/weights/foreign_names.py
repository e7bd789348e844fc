"""Names of other projects' DeepLabv3+ tensors, and their names here.

Only tensors that compute the same in eval mode on the same input are renamed; the rest is reported. Names and forms
are those of segmentation_models.pytorch 0.5.0 and VainF/DeepLabV3Plus-Pytorch (its commit 48f990b).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roadseg.errors import ConfigError

WHERE = "training.weights_from"
State = Mapping[str, Tensor]
SMP, VAINF = "segmentation_models.pytorch", "VainF/DeepLabV3Plus-Pytorch"
MMSEGMENTATION = "decode_head."  # how names of its tensors begin
WRAPPERS = ("model", "net", "module", "_orig_mod")  # a Lightning module's name for its network, and torch's own
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
EPSILON = 1e-5  # of all batch norms, theirs and ours
ASPP_BRANCHES = 5  # 1x1, three rates, image pooling
MOBILENET_STAGES = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals a stage, Sandler et al. (CVPR 2018), table 2
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# He et al. (CVPR 2016), table 1, by the shapes of the first block's convolutions: basic, or bottleneck
BASIC = ((64, 64, 3, 3), (64, 64, 3, 3))
BOTTLENECK = ((64, 64, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1))
RESNETS: dict[tuple[tuple[int, ...], ...], dict[tuple[int, ...], int]] = {
    BASIC: {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34},
    BOTTLENECK: {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152},
}
RESNET_BLOCK = re.compile(r"layer\d\.\d+\.(conv\d\.weight|bn\d\.\w+|downsample\.0\.weight|downsample\.1\.\w+)")


@dataclass(frozen=True)
class Translation:
    """tensors: under DeepLabV3Plus's names. unlike: our parts without an equivalent in the file, and why.

    backbone: timm's name, "" where the file does not show it, None where timm has no equal. head: "" where
    either kind would do.
    identity: weights that make the decoder's second 3x3, which they lack, the identity.
    remarks: where loaded weights compute something else than in their project.
    """

    project: str
    backbone: str | None
    head: str
    tensors: dict[str, Tensor]
    unlike: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Tensor] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def translate(state: State) -> Translation | None:
    """None if the names are of no DeepLabv3+ known here.

    Raises KeyError for a missing tensor, ConfigError for a wrong shape, a dtype that is not floating point, or
    values that no training produces.
    """
    for inner in (state, *(_below(state, wrapper) for wrapper in WRAPPERS)):
        for mark, read in (
            ("decoder.aspp.0.convs.0.0.weight", _segmentation_models),
            ("classifier.aspp.convs.0.0.weight", _vainf),
        ):
            if mark in inner:
                check_values({key: value for key, value in inner.items() if key.endswith(BATCH_NORM[:4])})
                return read(inner)
    return None


def check_values(state: State) -> None:
    """Raise ConfigError that names a tensor with a wrong dtype, non-finite values or a negative variance."""
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in FLOATS:
            raise _refused(key, f"is {tensor.dtype}", "floating numbers")
        if not tensor.isfinite().all():
            raise _refused(key, "holds NaN or infinity", "finite numbers")
        if key.endswith("running_var") and (tensor < 0).any():
            raise _refused(key, "holds a negative variance", "0 or more")


def _refused(key: str, how: str, expected: str) -> ConfigError:
    return ConfigError(
        f"the tensor {key} {how}", expected=expected, where=WHERE, todo="fetch the file again, or take another"
    )


# ---- the two projects -----------------------------------------------------------------------


def _segmentation_models(state: State) -> Translation:
    """DeepLabV3Plus with encoders of timm ("tu-..."), torchvision's MobileNetV2 and ResNets.

    It has one more separable convolution between ASPP and decoder; its decoder concatenates the maps in the other
    order and lacks our second 3x3.
    """
    encoder = _below(state, "encoder")
    unlike = {"decoder.refinements.0": "they have none: it starts as the identity"}
    remarks = ["their separable convolution between ASPP and decoder has no place here and is left out"]
    tensors, head = _aspp(state, "decoder.aspp.0")
    name: str | None = ""
    if any(key.startswith("model.") for key in encoder):
        backbone = _below(encoder, "model")
    else:
        name, backbone = _torchvision_backbone(encoder)
        remarks.append("the first block of a dilated stage is dilated there, and here it is not yet")
    if "features.18.0.weight" in encoder:
        reason = "theirs reads 1280 channels, of a layer that belongs to the classifier here"
        unlike |= dict.fromkeys(sorted({part_of(key) for key in tensors}), reason)
        tensors = {}
    tensors |= {f"backbone.{key}": value for key, value in backbone.items()}
    tensors |= _conv_norm(state, "decoder.block1.0", "decoder.block1.1", "decoder.laterals.0")
    low = tensors["decoder.laterals.0.0.weight"].shape[0]
    fused = _conv3x3(state, "decoder.block2.0", "decoder.block2.1", "decoder.fusions.0.project")
    fused = {key: _low_first(value, low) for key, value in fused.items()}
    if head == "dense":  # their decoder is separable whatever the ASPP is
        fused = _dense(fused, "decoder.fusions.0.project")
    tensors |= fused
    tensors |= _renamed(state, "segmentation_head.0", "decoder.classifier", ("weight", "bias"))
    identity = _identity(fused, "decoder.fusions.0.project", "decoder.refinements.0")
    return Translation(SMP, name, head, tensors, unlike, identity, tuple(remarks))


def _vainf(state: State) -> Translation:
    """deeplabv3plus_mobilenet, _resnet50 and _resnet101, separable or not."""
    backbone = _below(state, "backbone")
    unlike = {"decoder.refinements.0": "they have none: it starts as the identity"}
    remarks: tuple[str, ...] = ()
    tensors, head = _aspp(state, "classifier.aspp")
    if any(key.startswith("low_level_features.") for key in backbone):
        backbone = {re.sub(r"^(low|high)_level_", "", key): value for key, value in backbone.items()}
        remarks = ("their MobileNetV2 pads before a block's first convolution and not in its stem: borders differ",)
    name, renamed = _torchvision_backbone(backbone)
    tensors |= {f"backbone.{key}": value for key, value in renamed.items()}
    tensors |= _conv_norm(state, "classifier.project.0", "classifier.project.1", "decoder.laterals.0")
    fused = _conv3x3(state, "classifier.classifier.0", "classifier.classifier.1", "decoder.fusions.0.project")
    tensors |= fused | _renamed(state, "classifier.classifier.3", "decoder.classifier", ("weight", "bias"))
    identity = _identity(fused, "decoder.fusions.0.project", "decoder.refinements.0")
    return Translation(VAINF, name, head, tensors, unlike, identity, remarks)


# ---- backbones ------------------------------------------------------------------------------


def _torchvision_backbone(state: State) -> tuple[str | None, dict[str, Tensor]]:
    """(timm's name, tensors under timm's names); ResNets have the same names in both."""
    if "features.0.0.weight" not in state:
        return _resnet_name(state), {key: value for key, value in state.items() if not key.startswith("fc.")}
    tensors: dict[str, Tensor] = {}
    for ours, norm, theirs in _mobilenet_layers():
        conv, bn = (f"features.{theirs[0]}.{name}" for name in theirs[1])
        tensors |= _renamed(state, conv, ours, ("weight",)) | _renamed(state, bn, norm, BATCH_NORM)
    return "mobilenetv2_100", tensors


def _mobilenet_layers() -> Iterable[tuple[str, str, tuple[int, tuple[str, str]]]]:
    """(timm's convolution, timm's norm, (index in torchvision's features, its convolution and norm)) of each layer."""
    yield "conv_stem", "bn1", (0, ("0", "1"))
    index = 0
    for stage, blocks in enumerate(MOBILENET_STAGES):
        for block in range(blocks):
            index += 1
            ours = f"blocks.{stage}.{block}"
            names = ("conv_dw", "conv_pw") if stage == 0 else ("conv_pw", "conv_dw", "conv_pwl")
            last = len(names) - 1
            for i, name in enumerate(names):
                theirs = (f"conv.{last}", f"conv.{last + 1}") if i == last else (f"conv.{i}.0", f"conv.{i}.1")
                yield f"{ours}.{name}", f"{ours}.bn{i + 1}", (index, theirs)


def _resnet_name(state: State) -> str | None:
    """ "" where it may be one of timm's many others: wider, grouped, with attention, of another shortcut."""
    deep = "conv1.3.weight" in state
    if not deep and "conv1.weight" not in state:
        return None
    inner = [key for key in state if key.startswith("layer")]
    convs = [state[key] for i in (1, 2, 3) if (key := f"layer1.0.conv{i}.weight") in state]
    blocks = tuple(
        len({key.split(".")[1] for key in inner if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    depth = RESNETS.get(tuple(tuple(conv.shape) for conv in convs), {}).get(blocks)
    plain = depth is not None and all(RESNET_BLOCK.fullmatch(key) for key in inner)
    # timm has no shallow ResNet of a deep stem without averaging
    return f"resnet{depth}" + "c" * deep if plain and not (deep and len(convs) == len(BASIC)) else ""


# ---- layers ---------------------------------------------------------------------------------


def _aspp(state: State, theirs: str) -> tuple[dict[str, Tensor], str]:
    """The ASPP of torchvision, segmentation_models and VainF, which have the same form; and the head's kind."""
    tensors = _conv_norm(state, f"{theirs}.convs.0.0", f"{theirs}.convs.0.1", "aspp.branches.0")
    for i in range(1, ASPP_BRANCHES - 1):
        tensors |= _conv3x3(state, f"{theirs}.convs.{i}.0", f"{theirs}.convs.{i}.1", f"aspp.branches.{i}")
    head = "dense" if tensors["aspp.branches.1.0.weight"].shape[1] > 1 else "separable"
    tensors |= _folded(state, f"{theirs}.convs.4.1", f"{theirs}.convs.4.2", "aspp.pooling.0")
    return tensors | _conv_norm(state, f"{theirs}.project.0", f"{theirs}.project.1", "aspp.fusion.project"), head


def _conv_norm(state: State, conv: str, norm: str, ours: str) -> dict[str, Tensor]:
    tensors = _renamed(state, conv, f"{ours}.0", ("weight",)) | _renamed(state, norm, f"{ours}.1", BATCH_NORM)
    _check_shape(state, f"{norm}.weight", (len(state[f"{conv}.weight"]),))
    return tensors


def _conv3x3(state: State, conv: str, norm: str, ours: str) -> dict[str, Tensor]:
    """A dense 3x3, or a depthwise 3x3 and a 1x1, whichever the file has."""
    for depthwise, pointwise in ((f"{conv}.0", f"{conv}.1"), (f"{conv}.body.0", f"{conv}.body.1")):
        if f"{depthwise}.weight" in state:
            tensors = _renamed(state, depthwise, f"{ours}.0", ("weight",))
            tensors |= _renamed(state, pointwise, f"{ours}.1", ("weight",))
            out, channels = tensors[f"{ours}.1.weight"].shape[0], tensors[f"{ours}.0.weight"].shape[0]
            _check_shape(state, f"{depthwise}.weight", (channels, 1, 3, 3))
            _check_shape(state, f"{pointwise}.weight", (out, channels, 1, 1))
            _check_shape(state, f"{norm}.weight", (out,))
            return tensors | _renamed(state, norm, f"{ours}.2", BATCH_NORM)
    return _conv_norm(state, conv, norm, ours)


def _folded(state: State, conv: str, norm: str, ours: str) -> dict[str, Tensor]:
    """A 1x1 convolution and its batch norm's running statistics as one convolution with a bias."""
    tensors = _conv_norm(state, conv, norm, ours)
    weight, bias, mean, variance = (tensors[f"{ours}.1.{name}"].double() for name in BATCH_NORM[:4])
    scale = weight / torch.sqrt(variance + EPSILON)
    return {
        f"{ours}.weight": (tensors[f"{ours}.0.weight"].double() * scale[:, None, None, None]).float(),
        f"{ours}.bias": (bias - mean * scale).float(),
    }


def _low_first(tensor: Tensor, low: int) -> Tensor:
    """A layer's filters over (high, low) channels, depthwise or not, as filters over (low, high)."""
    return torch.roll(tensor, low, dims=0 if tensor.shape[1] == 1 else 1) if tensor.dim() == 4 else tensor


def _dense(tensors: State, ours: str) -> dict[str, Tensor]:
    """A depthwise 3x3 and its 1x1 multiplied to one dense 3x3."""
    depthwise, pointwise = tensors[f"{ours}.0.weight"], tensors[f"{ours}.1.weight"]
    norm = {key.replace(f"{ours}.2.", f"{ours}.1."): value for key, value in tensors.items() if f"{ours}.2." in key}
    return {f"{ours}.0.weight": pointwise * depthwise.transpose(0, 1)} | norm


def _identity(before: State, theirs: str, ours: str) -> dict[str, Tensor]:
    """A 3x3 convolution, norm and ReLU that pass on the output of layer `theirs` with tensors `before`.

    In eval mode exactly. In training the norm uses batch statistics: its scale and shift are the deviation and mean
    that the map has if the input of the ReLU before is normal with the scale and shift of that layer's norm, so that
    it is still nearly the identity.
    """
    separable = f"{theirs}.2.weight" in before
    norm = f"{theirs}.{2 if separable else 1}"
    shift, scale = before[f"{norm}.bias"].double(), before[f"{norm}.weight"].double().abs().clamp(min=1e-12)
    share = 0.5 * (1 + torch.erf(shift / scale / math.sqrt(2)))
    density = torch.exp(-0.5 * (shift / scale) ** 2) / math.sqrt(2 * math.pi)
    mean = shift * share + scale * density
    variance = ((shift**2 + scale**2) * share + shift * scale * density - mean**2).clamp(min=0)
    width = len(shift)
    centre = torch.zeros(width, 1, 3, 3)
    centre[:, :, 1, 1] = 1
    each = torch.eye(width)[:, :, None, None]
    convs = [centre, each] if separable else [centre.transpose(0, 1) * each]
    tensors = {f"{ours}.{i}.weight": conv for i, conv in enumerate(convs)}
    values = ((variance + EPSILON).sqrt(), mean, mean, variance)
    return tensors | {f"{ours}.{len(convs)}.{n}": v.float() for n, v in zip(BATCH_NORM, values, strict=False)}


def _renamed(state: State, theirs: str, ours: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Rename tensors. Batch norm's step counter is optional: old files lack it, and it has no effect."""
    optional = "num_batches_tracked"
    weight, rank = state[f"{theirs}.weight"], 1 if optional in names else 4
    if weight.dim() != rank:
        raise _refused(f"{theirs}.weight", f"has the shape {list(weight.shape)}", f"{rank} dimensions")
    for name in names:
        if name != "weight" and (name != optional or f"{theirs}.{name}" in state):
            _check_shape(state, f"{theirs}.{name}", () if name == optional else weight.shape[:1])
    return {
        f"{ours}.{name}": state[f"{theirs}.{name}"] for name in names if name != optional or f"{theirs}.{name}" in state
    }


def _check_shape(state: State, key: str, shape: tuple[int, ...]) -> None:
    if state[key].shape != shape:
        raise _refused(key, f"has the shape {list(state[key].shape)}", f"{list(shape)}, as the others have it")


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(prefix + ".")}


def part_of(key: str) -> str:
    """ "aspp.branches.1.0.weight" is of "aspp.branches.1", "decoder.classifier.bias" of "decoder.classifier"."""
    match = re.match(r"(aspp|decoder)\.(branches\.\d+|laterals\.\d+|fusions\.\d+|refinements\.\d+|\w+)", key)
    return match[0] if match else key.split(".")[0]
