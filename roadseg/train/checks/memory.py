"""What a training step takes of a device's memory, estimated without the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build
from roadseg.model.surgery import blocks

MEASURED_PX = 256  # side of the crops that are measured
# Peaks of 10 networks and batches on an H100, eager, fp32 and bf16, were 1.03 to 1.25 times what forward kept
# (median 1.08); compiled, the default network's was 0.73 times that.
BACKWARD = 1.15
COPIES = 5  # of the weights in float32: themselves, gradients, two moments, the average
CONTEXT_BYTES = 2 << 30  # of CUDA, cuDNN and cuBLAS, what the allocator can't fill, and the loss


def activation_bytes(
    architecture: Architecture, crop_px: tuple[int, int], batch: int, bf16: bool, recomputed: bool = False
) -> int:
    """Bytes that a training forward of `batch` crops keeps for its backward; weights in float32 don't count.

    Measured on the CPU with small crops, and scaled by area: convolutions keep what they are given. What
    does not grow with the batch (bf16 copies of weights) is measured by one crop against two.
    recomputed: with activation checkpointing, of which one block at a time is there.
    """
    network = build(architecture, seed=0).train()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # it keeps as much, and takes one image wherever it stands
    one, two = (_kept_bytes(network, images, bf16, recomputed) for images in (1, 2))
    pixels = batch * crop_px[0] * crop_px[1]
    return round((two - one) / MEASURED_PX**2 * pixels) + 2 * one - two


def step_bytes(
    architecture: Architecture, crop_px: tuple[int, int], batch: int, bf16: bool, recomputed: bool = False
) -> int:
    """About what training with micro-batches of `batch` crops takes of a GPU; frames held there don't count."""
    weights = sum(p.numel() for p in build(architecture, seed=0).parameters())
    kept = activation_bytes(architecture, crop_px, batch, bf16, recomputed)
    return round(BACKWARD * kept) + 4 * COPIES * weights + CONTEXT_BYTES


def _kept_bytes(network: DeepLabV3Plus, images: int, bf16: bool, recomputed: bool) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}
    within: list[dict[int, int]] = []  # of each block that is computed again; what is kept there lies beside `kept`
    inside = [kept]
    held: list[Tensor] = []  # so that no storage's address is used twice

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            inside[-1][storage.data_ptr()] = storage.nbytes()
        return t

    def enter(_: nn.Module, given: tuple[Any, ...]) -> None:
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]  # some blocks take lists
        held.extend(tensors)
        for t in tensors:
            keep(t)
        inside.append({})

    def leave(*_: object) -> None:
        within.append(inside.pop())

    units = list(blocks(network.backbone)) if recomputed else []
    hooks = [h for u in units for h in (u.register_forward_pre_hook(enter), u.register_forward_hook(leave))]
    image_BCHW = torch.zeros((images, 3, MEASURED_PX, MEASURED_PX), dtype=torch.uint8)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        output = network(image_BCHW)
    del output
    for hook in hooks:
        hook.remove()
    largest = max((sum(size for at, size in block.items() if at not in kept) for block in within), default=0)
    return sum(kept.values()) + largest
