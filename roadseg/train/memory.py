"""What a training step takes of a device's memory, estimated without the device."""

from __future__ import annotations

import torch
from torch import Tensor

from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build

MEASURED_PX = 256  # side of the crops that are measured
# Peaks of 10 networks and batches on an H100, eager, fp32 and bf16, were 1.03 to 1.25 times what forward kept
# (median 1.08); compiled, the default network's was 0.73 times that.
BACKWARD = 1.15
COPIES = 5  # of the weights in float32: themselves, gradients, two moments, the average
CONTEXT_BYTES = 2 << 30  # of CUDA, cuDNN and cuBLAS, what the allocator can't fill, and the loss


def activation_bytes(architecture: Architecture, crop_px: tuple[int, int], batch: int, bf16: bool) -> int:
    """Bytes that a training forward of `batch` crops keeps for its backward; weights in float32 don't count.

    Measured on the CPU with small crops, and scaled by area: convolutions keep what they are given. What
    does not grow with the batch (bf16 copies of weights) is measured by one crop against two.
    """
    network = build(architecture, seed=0).train()
    one, two = (_kept_bytes(network, images, bf16) for images in (1, 2))
    pixels = batch * crop_px[0] * crop_px[1]
    return round((two - one) / MEASURED_PX**2 * pixels) + 2 * one - two


def step_bytes(architecture: Architecture, crop_px: tuple[int, int], batch: int, bf16: bool) -> int:
    """About what training with micro-batches of `batch` crops takes of a GPU; frames held there don't count."""
    weights = sum(p.numel() for p in build(architecture, seed=0).parameters())
    return round(BACKWARD * activation_bytes(architecture, crop_px, batch, bf16)) + 4 * COPIES * weights + CONTEXT_BYTES


def _kept_bytes(network: DeepLabV3Plus, images: int, bf16: bool) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    image_BCHW = torch.zeros((images, 3, MEASURED_PX, MEASURED_PX), dtype=torch.uint8)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        output = network(image_BCHW)  # held, so that no storage's address is used twice
    del output
    return sum(kept.values())
