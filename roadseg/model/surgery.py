"""Change a built network in place: freeze parts, set the output stride, checkpoint activations.

All functions keep the same parameter objects and names, so that an optimizer, an average and a checkpoint of the
network stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from roadseg.errors import ConfigError
from roadseg.model.deeplab import DeepLabV3Plus, build

PARTS = ("backbone", "aspp", "decoder")
BATCH_NORM = "batch_norm"
LAYERS = (nn.Conv2d, nn.Linear)

# ---- freezing -------------------------------------------------------------------------------


def freeze(network: DeepLabV3Plus, parts: Sequence[str]) -> None:
    """Freeze the parameters of `parts`; "batch_norm" freezes the statistics of the whole network.

    Frozen parameters get no gradient; a frozen part's batch norms still update their statistics unless
    "batch_norm" is given. With it they stay in eval mode while the network trains, and their scale and
    shift keep learning. Raises ConfigError for unknown parts, and if no parameter that ships would be
    left to train.
    """
    if unknown := [part for part in parts if part not in (*PARTS, BATCH_NORM)]:
        raise ConfigError(
            f"unknown part {unknown[0]!r}", expected=", ".join((*PARTS, BATCH_NORM)), where="training.freeze"
        )
    if set(PARTS) <= set(parts):
        raise ConfigError(
            f"{', '.join(PARTS)} are all frozen",
            expected="one of them left to train",
            where="training.freeze",
            todo="leave out decoder to train the classifier alone with what is around it",
        )
    for part in parts:
        if part == BATCH_NORM:
            # Set on the object, not the class: it survives a deep copy, and other networks are unaffected.
            network.train = MethodType(_train_but_statistics, network)  # type: ignore[method-assign]
            network.train(network.training)
        else:
            getattr(network, part).requires_grad_(False)


def _train_but_statistics(network: DeepLabV3Plus, mode: bool = True) -> DeepLabV3Plus:
    type(network).train(network, mode)
    for norm in _norms(network):
        norm.eval()
    return network


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    """Batch norms of every class: timm's include an activation, and several ranks use their own."""
    return (m for m in module.modules() if "running_mean" in m._buffers)


# ---- output stride --------------------------------------------------------------------------


def set_output_stride(network: DeepLabV3Plus, output_stride: int) -> None:
    """Change `network` to `output_stride`, as if it had been built for it with these weights.

    The backbone's strides and dilations become those of timm's model at that stride; the ASPP's rates follow
    (`Architecture.at_output_stride`). The averaged network needs the same call, and a graph that was captured or
    compiled before still computes the old function. Raises ConfigError, and changes nothing, if a rate would not
    be a whole number, or if the decoder's levels or the backbone do not support that stride.
    """
    a = network.architecture
    if output_stride == a.output_stride:
        return
    fresh = build(a.at_output_stride(output_stride), seed=0)
    _check_same_weights(network, fresh)
    _take_form(network, fresh)
    network.backbone.feature_info = fresh.backbone.feature_info
    network.architecture = fresh.architecture


def _check_same_weights(network: DeepLabV3Plus, fresh: DeepLabV3Plus) -> None:
    ours = {name: t.shape for name, t in network.state_dict().items()}
    theirs = {name: t.shape for name, t in fresh.state_dict().items()}
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"{network.architecture.backbone} has other weights at output stride {fresh.architecture.output_stride} "
            f"({differing[0]})",
            where="model.backbone",
            todo="train at one output stride, or choose another backbone",
        )


def _take_form(module: nn.Module, fresh: nn.Module) -> None:
    """Copy everything but weights from `fresh` to `module`: strides, dilations, paddings, poolings, skips."""
    for name, value in vars(fresh).items():
        plain = not name.startswith("_") and name != "training" and _is_plain(value)
        if plain and getattr(module, name, None) != value:
            setattr(module, name, value)
    for name, theirs in fresh.named_children():
        ours = getattr(module, name, None)
        if ours is None:  # without weights, which were compared before
            setattr(module, name, theirs.train(module.training))
        elif not _has_state(theirs):
            # A pooling may stand where nothing stood, or have another stride. What prints alike is left:
            # it may hold what others set, such as the dropout's share of the batch.
            if type(ours) is not type(theirs) or repr(ours) != repr(theirs):
                setattr(module, name, theirs.train(ours.training))
        elif "running_mean" in theirs._buffers:
            continue  # norms don't depend on strides, and may have been converted to synchronized ones
        elif type(ours) is not type(theirs) and not theirs._modules:
            # "same" padding is a layer of its own class where the stride makes it depend on the size
            theirs._parameters, theirs._buffers = ours._parameters, ours._buffers
            setattr(module, name, theirs.train(ours.training))
        else:
            _take_form(ours, theirs)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


# ---- activation checkpointing ---------------------------------------------------------------


def checkpoint_activations(backbone: nn.Module) -> int:
    """Recompute the backbone's blocks in backward instead of keeping their activations; returns the number of blocks.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016). Weights, gradients and batch
    norm's statistics are the same as without it, and statistics are updated once a step. Eval mode, no_grad
    and deep copies are not affected. Raises ConfigError if the backbone has no block that can be recomputed
    on its own.
    """
    units = list(blocks(backbone))
    if not units:
        raise ConfigError(
            f"no blocks are known in {type(backbone).__name__}",
            expected="a backbone of repeated blocks, such as a MobileNet, ResNet or RegNet",
            where="training.activation_checkpointing",
            todo="set it to false, or choose another model.backbone",
        )
    for unit in units:
        if not isinstance(vars(unit).get("forward"), _Recomputed):
            unit.forward = _Recomputed(unit)
    return len(units)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks that checkpoint_activations recomputes: modules with several layers, at least one of which is not part of
    a smaller block.

    In a MobileNetV2 that is the inverted residual: its input has few channels and its inner maps many. Blocks with
    forward hooks inside are left as they are, because the hooks would run twice; timm takes features by hooks.
    """
    for child in module.children():
        if _layers(child) < 2:
            continue
        parts = list(child.children())
        row = isinstance(child, nn.Sequential) and not any(isinstance(part, LAYERS) for part in parts)
        if row or not any(_layers(part) == 1 for part in parts):
            yield from blocks(child)
        elif not any(m._forward_hooks or m._forward_pre_hooks for m in child.modules() if m is not child):
            yield child


def _layers(module: nn.Module) -> int:
    return sum(isinstance(m, LAYERS) for m in module.modules())


class _Recomputed:
    """Replaces a module's `forward`; hooks and state dict are unaffected."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Its state can't be read while a CUDA graph is captured, and most backbones draw nothing.
        self.draws = any(getattr(m, "p", 0) or getattr(m, "drop_prob", 0) for m in module.modules())

    def __call__(self, *inputs: Any) -> Any:
        plain = partial(type(self.module).forward, self.module)
        if not (self.module.training and torch.is_grad_enabled()):
            return plain(*inputs)
        if torch.compiler.is_compiling():  # a compiled graph updates its buffers once by itself
            return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=self.draws)
        tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]  # some blocks take lists
        versions = [t._version for t in tensors]
        contexts = partial(_contexts, self.module)
        output = checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=self.draws, context_fn=contexts)
        if [t._version for t in tensors] != versions:
            raise ConfigError(
                f"{type(self.module).__name__} changes its input in place: it can't be computed again",
                where="training.activation_checkpointing",
                todo="set it to false, or choose another model.backbone",
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return MethodType(type(self.module).forward, copy.deepcopy(self.module, memo))


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _on_copied_statistics(module)


@contextmanager
def _on_copied_statistics(module: nn.Module) -> Iterator[None]:
    """Around the recomputation: batch norms update copies of their buffers, which are discarded."""
    kept = [(norm, dict(norm._buffers)) for norm in _norms(module)]
    for norm, buffers in kept:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
