"""Count a network's parameters, multiply-adds and memory by part, without computing anything.

The network runs on tensors with shapes, dtypes and storages but no data, so that a batch of 64 images of 2048x1024 can
be counted on a laptop. The result is the same for every machine with that precision.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

AUXILIARY = "auxiliary_heads"
LOSS = "loss"


@dataclass(frozen=True)
class Part:
    """parameters: numbers, not bytes. macs: of one inference batch, of an auxiliary head of one in training.

    saved_bytes: what the forward pass of a training step keeps for the backward pass, first kept in this part.
    """

    name: str
    parameters: int = 0
    macs: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """peak_bytes: of tensors that live at the same time in inference, the image included, workspaces not.

    state_bytes: float32 weights, gradients, the optimizer's moments and the average in training.
    """

    parts: tuple[Part, ...]
    peak_bytes: int
    state_bytes: int

    @property
    def parameters(self) -> int:
        """Of the inference network."""
        return sum(p.parameters for p in self.parts if p.name != AUXILIARY)

    @property
    def macs(self) -> int:
        """Of the inference network."""
        return sum(p.macs for p in self.parts if p.name != AUXILIARY)

    @property
    def saved_bytes(self) -> int:
        return sum(p.saved_bytes for p in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [asdict(p) for p in self.parts],
            "parameters": self.parameters,
            "macs": self.macs,
            "inference_peak_bytes": self.peak_bytes,
            "training_saved_bytes": self.saved_bytes,
            "training_state_bytes": self.state_bytes,
        }


def three_digits(value: float) -> str:
    """A non-negative number as text with at least three significant digits and no exponent."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(decimals, 0)}f}"


def cost(
    network: nn.Module,
    image_BHW: tuple[int, int, int],
    crops_BHW: tuple[int, int, int],
    bf16: bool,
    moments: int,
    trained: nn.Module | None = None,
) -> Cost:
    """Inference on a batch of images and a training step on a batch of crops. `network` stays as it is.

    moments: numbers that the optimizer keeps for each weight (Adam 2, SGD with momentum 1). trained: the form of
    `network` that takes the training step, if it is another one.
    """
    macs = macs_by_part(network, image_BHW)
    saved = saved_by_part(trained or network, crops_BHW, bf16)
    counted = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    names = [name for name in dict.fromkeys([*counted, *macs, *saved]) if name != LOSS]
    parts = [Part(name, counted.get(name, 0), macs.get(name, 0), saved.get(name, 0)) for name in names]
    weights = sum(counted.values())
    return Cost(
        tuple(p for p in [*parts, Part(LOSS, saved_bytes=saved[LOSS])] if p.parameters or p.macs or p.saved_bytes),
        peak_bytes(network, image_BHW, bf16),
        4 * weights * (3 + moments),
    )


def macs_by_part(network: nn.Module, image_BHW: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-adds of convolutions and matrix products, by direct child; auxiliary heads counted too."""
    network = copy.deepcopy(network).eval()
    network.training = True  # itself alone: it calls its auxiliary heads, and its batch norms take one image
    with _unreal(network) as image, FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image(image_BHW))
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(network).__name__
    return {
        name: sum(flops.get(f"{root}.{path}", 0) for path in _called_paths(name, child)) // 2
        for name, child in network.named_children()
    }


def saved_by_part(network: nn.Module, crops_BHW: tuple[int, int, int], bf16: bool) -> dict[str, int]:
    """Bytes that a training step's forward pass keeps, by direct child, and for LOSS.

    Parameters don't count; a tensor that two parts keep counts in the first. The loss is plain cross-entropy over
    every head's upsampled logits; other terms keep more, the fused kernel keeps less.
    """
    network = copy.deepcopy(network).train()
    kept: dict[str, int] = {LOSS: 0}
    seen: dict[int, Any] = {p.untyped_storage()._cdata: p for p in network.parameters()}
    where = LOSS

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal where
            where = name

        return hook

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # kept alive, so that its address is not reused
            kept[where] = kept.get(where, 0) + storage.nbytes()
        return tensor

    for name, child in network.named_children():
        for path in _called_paths(name, child):
            module = network.get_submodule(path)
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(enter(LOSS))
    with _unreal(network) as image, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(image(crops_BHW))
        label = torch.zeros(crops_BHW, dtype=torch.int64)
        for head in [output] if isinstance(output, Tensor) else [output.logits, *output.auxiliary]:
            F.cross_entropy(F.interpolate(head.float(), label.shape[1:], mode="bilinear"), label)
    return kept


def peak_bytes(network: nn.Module, image_BHW: tuple[int, int, int], bf16: bool) -> int:
    """Peak bytes of tensors during one inference.

    The image counts and, with bf16, the copies of weights in it; weights themselves don't.
    """
    network = copy.deepcopy(network).eval()
    live = _Live()
    with _unreal(network) as image, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), live:
        network(image(image_BHW))
    return live.peak


class _Live(TorchDispatchMode):
    """Tracks storages from their creation until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def _called_paths(name: str, child: nn.Module) -> Iterator[str]:
    """A list of modules is never called itself; its members are."""
    if isinstance(child, nn.ModuleList):
        yield from (f"{name}.{i}" for i in range(len(child)))
    else:
        yield name


@contextmanager
def _unreal(network: nn.Module) -> Iterator[Callable[[tuple[int, int, int]], Tensor]]:
    """Inside, tensors have no data; the yielded function makes a uint8 batch [B, 3, H, W]."""
    network.cpu()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield lambda bhw: torch.zeros(bhw[0], 3, bhw[1], bhw[2], dtype=torch.uint8)
