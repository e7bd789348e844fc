"""Backbones: timm's feature extractors and their initial weights.

Weights come only as safetensors: a torch pickle can run code when it is read.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.model.depthwise import speed_up_dilated
from roadseg.model.dropout import share_draws
from roadseg.progress import quiet

log = logging.getLogger(__name__)
HUB_FILE = "model.safetensors"
# Arguments that create_backbone sets itself, and those that would read files: a checkpoint_path may be a pickle.
NOT_OPTIONS = frozenset(
    {
        "features_only", "pretrained", "output_stride", "out_indices", "feature_cfg", "num_classes", "in_chans",
        "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable",
        "no_jit",
    }
)  # fmt: skip


# timm's default: the stem halves the image, and so does the first stage or the pooling before it.
EARLY_STRIDES = (2, 2)
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def create_backbone(
    name: str,
    output_stride: int,
    arguments: Mapping[str, Any] | None = None,
    early_strides: tuple[int, int] = EARLY_STRIDES,
) -> nn.Module:
    """timm's `name` without its classifier: image [B, 3, H, W] to a list of maps, fine to coarse.

    arguments: further arguments of the timm model, such as widths and depths of its stages. early_strides: strides of
    the two layers (or groups of parallel layers) that halve the image first; 1 skips a halving, so that every later
    map is twice as fine with the same weights. `feature_info.reduction()` and `.channels()` are the maps' strides
    and widths. Initialized from torch's generator. Raises ConfigError if timm has no such model, if it has no feature
    maps, does not support this output stride, these early strides or these arguments, or takes images of one size
    only.
    """
    if refused := sorted(NOT_OPTIONS & set(arguments or {})):
        raise ConfigError(
            f"{', '.join(refused)} can't be set here",
            expected="arguments that change the layers, such as channels, layers or drop_path_rate",
            where="model.backbone_options",
        )
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"timm {timm.__version__} has no model {name!r}",
            expected="a model name of timm" + (f", perhaps {' or '.join(near)}" if near else ""),
            where="model.backbone",
        )
    try:
        backbone = _create(name, output_stride, arguments or {}, early_strides)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError, IndexError) as e:
        if arguments:
            raise ConfigError(
                f"timm's {name} can't be made with {_describe(arguments)} at output stride {output_stride} "
                f"({type(e).__name__}: {e})".replace(": )", ")"),
                expected=f"arguments of timm's {name}",
                where="model.backbone_options",
                todo="see the class of that model in timm's source; leave them out to have it as it is",
            ) from e
        todo = _other_strides(name, output_stride, early_strides)
        raise _unfit(name, output_stride, f"timm says {type(e).__name__}: {e}".rstrip(": "), todo) from e
    strides = backbone.feature_info.reduction()  # type: ignore[union-attr,operator]
    if strides[-1] != output_stride:
        todo = _other_strides(name, output_stride, early_strides)
        raise _unfit(name, output_stride, f"its maps have strides {', '.join(map(str, strides))}", todo)
    if getattr(backbone, "output_fmt", "NCHW") != "NCHW":
        raise _unfit(name, output_stride, "its maps are not channels-first")
    if backbone.pretrained_cfg.get("fixed_input_size"):  # type: ignore[union-attr,operator]
        raise _unfit(name, output_stride, "it takes images of one size only")
    if not _takes_any_size(name, output_stride, json.dumps(dict(arguments or {}), sort_keys=True), early_strides):
        raise _unfit(name, output_stride, "it takes only images whose sides are multiples of its stride")
    speed_up_dilated(backbone)
    share_draws(backbone)
    return backbone


def _create(name: str, output_stride: int, arguments: Mapping[str, Any], early_strides: tuple[int, int]) -> nn.Module:
    finer = math.prod(EARLY_STRIDES) // math.prod(early_strides)
    wanted = output_stride * finer  # in timm's count
    if wanted > 32:
        raise ConfigError(
            f"{_spaced(early_strides)}: the coarsest map of {name} would then be finer than output stride "
            f"{output_stride}",
            expected=f"an output stride of {32 // finer} at most with these",
            where="model.early_strides",
            todo="set a smaller output_stride, of the model or of the phase that asks for it, or leave out less",
        )
    # 32 is timm's default stride; not passing it admits models that don't accept output_stride.
    stride: dict[str, Any] = {} if wanted == 32 else {"output_stride": wanted}
    made: nn.Module = timm.create_model(name, features_only=True, pretrained=False, **stride, **arguments)
    if early_strides != EARLY_STRIDES:
        _leave_out_halvings(made, name, early_strides)
    return made


def _leave_out_halvings(backbone: nn.Module, name: str, early_strides: tuple[int, int]) -> None:
    """Set the stride of the first or second halving layer to 1, in place, where early_strides says so.

    They are found by their input's size. Raises ConfigError if there are none, or if the maps do not become finer.
    """
    strides = backbone.feature_info.reduction()  # type: ignore[union-attr,operator]
    side_px = 2 * math.lcm(*strides)
    trial = copy.deepcopy(backbone).to("meta").eval()
    input_px: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, key=key: input_px.update({key: given[0].shape[-1]}))  # type: ignore[misc]
        for key, module in trial.named_modules()
        if isinstance(module, _STRIDED) and module.stride in (2, (2, 2))
    ]
    image = torch.empty(1, 3, side_px, side_px, device="meta")
    with torch.no_grad():
        trial(image)
        for hook in hooks:
            hook.remove()
        left_out = [side_px >> halving for halving, stride in enumerate(early_strides) if stride == 1]
        for key in [key for key, px in input_px.items() if px in left_out]:
            for network in (backbone, trial):
                layer: Any = network.get_submodule(key)
                layer.stride = (1, 1) if isinstance(layer.stride, tuple) else 1
        try:
            sizes_px = [m.shape[-1] for m in trial(image)]
        except RuntimeError:  # branches whose sizes differ
            sizes_px = []
    ours = [s // math.prod(2 // early for early in early_strides[: s.bit_length() - 1]) for s in strides]
    if sizes_px != [side_px // stride for stride in ours]:
        raise ConfigError(
            f"{_spaced(early_strides)} can't be had of {name}: what halves the image there is more than convolutions "
            f"and poolings of stride 2 that keep the size without it",
            expected="2 2 for this backbone",
            where="model.early_strides",
        )
    for info in backbone.feature_info.info:  # type: ignore[union-attr]
        info["reduction"] = dict(zip(strides, ours, strict=True)).get(info["reduction"], info["reduction"])


@cache
def _takes_any_size(name: str, output_stride: int, arguments: str, early_strides: tuple[int, int]) -> bool:
    """Whether images of any size work. Shapes only are computed: branches of some models round sizes differently."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = _create(name, output_stride, json.loads(arguments), early_strides).eval()
        side = max(backbone.feature_info.reduction()) + 1  # type: ignore[union-attr,operator]
        try:
            backbone(torch.empty(1, 3, side, side))
        except NotImplementedError:  # an operation without a shape-only form
            return True
        except RuntimeError:
            return False
    return True


def _spaced(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _describe(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def _other_strides(name: str, output_stride: int, early_strides: tuple[int, int]) -> str:
    """Advice for a backbone that timm builds at stride 32 only; "" for others."""
    if output_stride == 32 or early_strides != EARLY_STRIDES:
        return ""
    early = {16: "1 2 or 2 1", 8: "1 1"}[output_stride]
    try:
        create_backbone(name, output_stride, None, (1, 1) if output_stride == 8 else (1, 2))
    except ConfigError:
        return ""
    return f"with model.early_strides {early} it has maps of that stride, or "


def _unfit(name: str, output_stride: int, why: str, todo: str = "") -> ConfigError:
    return ConfigError(
        f"{name} gives no feature maps at output stride {output_stride} ({why})",
        expected="a convolutional model of timm with features_only, such as mobilenetv2_100, resnet18 or regnety_002",
        where="model.backbone",
        todo=f"{todo}choose another backbone or another model.output_stride (8, 16 or 32)",
    )


def level(backbone: nn.Module, stride: int, name: str) -> int:
    """Index of the backbone's last map at `stride`, before the next coarser one or the dilated ones.

    Raises ConfigError if there is none.
    """
    strides = backbone.feature_info.reduction()  # type: ignore[union-attr,operator]
    if stride not in strides:
        raise ConfigError(
            f"{name} has no map at stride {stride}",
            expected=f"one of {', '.join(map(str, sorted(set(strides[:-1]))))}",
            where="model.low_levels",
        )
    if stride == strides[-1]:  # dilated stages share the last stride; the first of them is the lowest level
        return strides.index(stride)
    return len(strides) - 1 - strides[::-1].index(stride)


def load_backbone_weights(backbone: nn.Module, weights: str | Path) -> None:
    """Fill `backbone` (made by create_backbone) in place.

    weights: "none" (leave as it is), "imagenet" (the file that timm names for this model, from the
    Hugging Face hub or its cache) or the path of a local .safetensors file with timm's names; the
    classifier's layers are ignored. Raises ConfigError if the file can't be read or its tensors do not
    fit the backbone.
    """
    if str(weights) == "none":
        return
    if str(weights) == "imagenet":
        state, source = _from_hub(backbone)
    else:
        state, source = _from_file(Path(weights), backbone), str(weights)
    own = backbone.state_dict()
    # timm flattens the first level of some models ("stages.0.x" becomes "stages_0.x")
    flat = {key if key in own else key.replace(".", "_", 1): key for key in state}
    given = {key: state[flat[key]] for key in own if key in flat}
    # batch norm's step counter is absent from old files and changes nothing
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    surplus = [original for key, original in flat.items() if key not in own]
    if surplus:
        classifier = _classifier_keys(backbone)
        surplus = [key for key in surplus if key not in classifier]
    misshapen = [f"{k} {list(v.shape)} for {list(own[k].shape)}" for k, v in given.items() if v.shape != own[k].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
        for what, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise ConfigError(
            f"tensors do not fit the backbone: {'; '.join(problems)}",
            expected=f"the weights of timm's {_hub_name(backbone)}",
            where=source,
            todo="check that model.backbone is the model these weights are of",
        )
    backbone.load_state_dict(given, strict=False)


def _hub_name(backbone: nn.Module) -> str:
    cfg = backbone.pretrained_cfg
    assert isinstance(cfg, dict)
    return str(cfg.get("hf_hub_id") or cfg.get("architecture"))


@cache  # once per process: preflight reads them before the data is made, training when it begins
def _tell_source(hub_id: str) -> None:
    log.info("ImageNet weights: %s of %s, from the Hugging Face hub or its cache", HUB_FILE, hub_id)


def _from_hub(backbone: nn.Module) -> tuple[dict[str, Tensor], str]:
    hub_id = backbone.pretrained_cfg.get("hf_hub_id")  # type: ignore[union-attr,operator]
    if not hub_id:
        raise ConfigError(
            f"timm names no pretrained weights for {_hub_name(backbone)}",
            where="model.backbone_weights",
            todo="set it to none, or to the path of a .safetensors",
        )
    _tell_source(hub_id)
    try:
        with quiet("huggingface_hub"):  # without a network it logs every retry
            state = timm.models.load_state_dict_from_hf(hub_id, filename=HUB_FILE)
    except OSError as e:
        raise ConfigError(
            f"the ImageNet weights could not be fetched ({type(e).__name__})",
            expected=f"file {HUB_FILE} of the Hugging Face repository {hub_id}, from the network or the hub's cache",
            where="model.backbone_weights",
            todo="fetch that file where there is a network, copy it here and set model.backbone_weights: PATH to it; "
            "or set model.backbone_weights: none to train from scratch",
        ) from e
    return state, f"{hub_id}/{HUB_FILE}"


def _from_file(path: Path, backbone: nn.Module) -> dict[str, Tensor]:
    todo = f"pass {HUB_FILE} of the Hugging Face repository {_hub_name(backbone)}, or none, or imagenet"
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is no .safetensors",
            expected="none, imagenet, or the path of a .safetensors (torch pickles are never read)",
            where="model.backbone_weights",
            todo=todo,
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"can't be read as safetensors ({e})", where=str(path), todo=todo) from e


def _classifier_keys(backbone: nn.Module) -> set[str]:
    """Names of all tensors of the whole classification model, head included."""
    architecture: Any = backbone.pretrained_cfg["architecture"]  # type: ignore[index]
    with torch.random.fork_rng(devices=[]):
        return set(timm.create_model(architecture, pretrained=False).state_dict())
