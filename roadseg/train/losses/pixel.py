"""Per-pixel losses over logits that are coarser than the labels, and class weights.

Sums, not means: the divisor is counted over the whole batch (criterion.py). All compute in float32 or finer, in a
fixed order and without synchronizing with the CPU, so that a CUDA graph can contain them.

Shapes: B images, K classes, H W the label, h w the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roadseg.data.augment.gpu_probe import kernels_run
from roadseg.labels import IGNORE
from roadseg.model.resize import interpolation

MOST_CLASSES = 64  # of the kernel: registers hold about 35, and compiling 64 takes half a minute
ELEMENTS_AT_ONCE = 1 << 26  # of a map [images, K, H, W]: 256 MiB in float32


def upsample(logits_BKhw: Tensor, height_px: int, width_px: int) -> Tensor:
    """Bilinear, align_corners=False: F.interpolate as two matrix products, whose gradient is fast.

    On an H100 the gradient of F.interpolate alone took a quarter of a step's kernel time (docs/experiments.md).
    """
    if not (torch.is_grad_enabled() and logits_BKhw.requires_grad):
        return F.interpolate(logits_BKhw, (height_px, width_px), mode="bilinear", align_corners=False)
    rows = interpolation(logits_BKhw.shape[2], height_px, logits_BKhw.device).to(logits_BKhw.dtype)
    columns = interpolation(logits_BKhw.shape[3], width_px, logits_BKhw.device).to(logits_BKhw.dtype)
    with torch.autocast(logits_BKhw.device.type, enabled=False):  # it would multiply in bf16
        return rows @ (logits_BKhw @ columns.T)


def plain_cross_entropy_sum(
    logits_BKhw: Tensor,
    label_BHW: Tensor,
    class_weights_K: Tensor | None,
    label_smoothing: float,
    pixel_weights_BHW: Tensor | None = None,
) -> Tensor:
    """Sum over valid pixels of (class weight x pixel weight) x cross-entropy of the bilinearly upsampled logits.

    label: uint8 or int64 of train ids; IGNORE counts nowhere. A pixel's class weight is its true
    class's, also in the smoothed part of its target (torch weighs that part by the other classes, so
    that a common class's pixels would give a quarter of their target to rare ones). pixel_weights: no
    gradient goes there. Scalar in float32, or in float64 for float64 logits.
    """
    log_p = F.log_softmax(upsample(at_least_float32(logits_BKhw), *label_BHW.shape[1:]), dim=1)
    weights = class_weight_of(label_BHW, class_weights_K)
    if pixel_weights_BHW is not None:
        weights = weights * pixel_weights_BHW.detach()
    # Without a reduction: nll_loss adds up by atomics on CUDA, another sum in every run.
    loss = F.nll_loss(log_p, label_BHW.long(), ignore_index=IGNORE, reduction="none")
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    return (loss * weights).sum()


def cross_entropy_sum(
    logits_BKhw: Tensor,
    label_BHW: Tensor,
    class_weights_K: Tensor | None,
    label_smoothing: float,
    pixel_weights_BHW: Tensor | None = None,
) -> Tensor:
    """plain_cross_entropy_sum, on CUDA by a kernel that never writes a [B, K, H, W] map."""
    if by_kernel(logits_BKhw):
        from roadseg.train.losses.pixel_kernel import upsampled_cross_entropy

        return upsampled_cross_entropy(logits_BKhw, label_BHW, class_weights_K, label_smoothing, pixel_weights_BHW)

    def some(logits: Tensor, images: slice) -> Tensor:
        weights = None if pixel_weights_BHW is None else pixel_weights_BHW[images]
        return plain_cross_entropy_sum(logits, label_BHW[images], class_weights_K, label_smoothing, weights)

    at_once = images_at_once(logits_BKhw, label_BHW)
    if at_once >= len(logits_BKhw):
        return some(logits_BKhw, slice(None))
    return sum_over_images(some, logits_BKhw, at_once)


def by_kernel(logits_BKhw: Tensor) -> bool:
    """Whether pixel_kernel.py is used: it compiles for each number of classes, which takes minutes for many classes."""
    return logits_BKhw.is_cuda and logits_BKhw.shape[1] <= MOST_CLASSES and kernels_run()


def class_weight_of(label_BHW: Tensor, class_weights_K: Tensor | None) -> Tensor:
    """float32 [B, H, W]: the weight of each pixel's class (1 without weights), 0 for void."""
    valid = (label_BHW != IGNORE).float()
    if class_weights_K is None:
        return valid
    return valid * class_weights_K[label_BHW.long().clamp(max=len(class_weights_K) - 1)]


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32; float64, which only tests use, as it is."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(
    logits_BKhw: Tensor, label_BHW: Tensor, class_weights_K: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of plain_cross_entropy_sum's losses over the valid pixels' weights; 0 for a batch of void alone."""
    total = plain_cross_entropy_sum(logits_BKhw, label_BHW, class_weights_K, label_smoothing)
    return total / positive_or_1(class_weight_of(label_BHW, class_weights_K).sum())


def positive_or_1(count: Tensor) -> Tensor:
    """What to divide a sum by that is 0 wherever its count is 0."""
    return torch.where(count > 0, count, torch.ones_like(count))


def focal_sum(logits_BKhw: Tensor, label_BHW: Tensor, class_weights_K: Tensor | None, gamma: float) -> Tensor:
    """Sum over valid pixels of class weight x -(1 - p)^gamma log p, p of the true class (Lin et al. 2017).

    Of the bilinearly upsampled logits, without label smoothing.
    """
    weights_BHW = class_weight_of(label_BHW, class_weights_K)

    def loss_of(logits: Tensor, images: slice) -> Tensor:
        loss = true_class_loss(logits, label_BHW[images])
        # Below the clamp the loss is 0 to rounding; without it a gamma under 1 has slope 0 x infinity at p = 1.
        miss = -torch.expm1(-loss)
        return (miss.clamp(min=1e-7) ** gamma * loss * weights_BHW[images]).sum()

    return sum_over_images(loss_of, logits_BKhw, images_at_once(logits_BKhw, label_BHW))


def true_class_loss(logits_BKhw: Tensor, label_BHW: Tensor) -> Tensor:
    """[B, H, W]: -log p of the true class under the upsampled logits, +0 or more; 0 for void."""
    log_p = F.log_softmax(upsample(at_least_float32(logits_BKhw), *label_BHW.shape[1:]), dim=1)
    return F.nll_loss(log_p, label_BHW.long(), ignore_index=IGNORE, reduction="none")


def true_class_losses(logits_BKhw: Tensor, label_BHW: Tensor) -> Tensor:
    """float32 [B, H, W] without gradient: true_class_loss, some images at once or by the kernel."""
    if by_kernel(logits_BKhw):
        from roadseg.train.losses.pixel_kernel import upsampled_losses

        return upsampled_losses(logits_BKhw, label_BHW)
    with torch.no_grad():
        pieces = (x.split(images_at_once(logits_BKhw, label_BHW)) for x in (logits_BKhw, label_BHW))
        return torch.cat([true_class_loss(*piece).float() for piece in zip(*pieces, strict=True)])


def images_at_once(logits_BKhw: Tensor, label_BHW: Tensor) -> int:
    """How many images' upsampled logits fit ELEMENTS_AT_ONCE; at least one."""
    return max(1, ELEMENTS_AT_ONCE // max(1, logits_BKhw.shape[1] * label_BHW[0].numel()))


def sum_over_images(loss_of: Callable[[Tensor, slice], Tensor], logits_BKhw: Tensor, at_once: int) -> Tensor:
    """The sum of loss_of(logits of some images, which images) over runs of `at_once` images.

    Memory is that of one run: the gradient is taken run by run together with the value (once
    differentiable) and kept in float32 at the logits' resolution.
    """
    total: Tensor = _SumOverImages.apply(logits_BKhw, loss_of, at_once)  # type: ignore[no-untyped-call]
    return total


class _SumOverImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss_of: Callable[[Tensor, slice], Tensor], at_once: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        fine = at_least_float32(logits.detach())
        total = fine.new_zeros(())
        gradients: list[Tensor] = []
        for start in range(0, len(fine), at_once):
            images = slice(start, start + at_once)
            piece = fine[images].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = loss_of(piece, images)
            if wanted:
                gradients += torch.autograd.grad(loss, piece)
            total = total + loss.detach()
        ctx.dtype = logits.dtype
        ctx.save_for_backward(*([torch.cat(gradients)] if wanted else []))
        return total

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * seed).to(ctx.dtype), None, None


def enet_weights(class_pixels: Sequence[int]) -> list[float]:
    """1 / ln(1.02 + frequency) of each class (Paszke et al. 2016, ENet)."""
    pixels = np.asarray(class_pixels, np.float64)
    frequency = pixels / max(pixels.sum(), 1)
    return [float(w) for w in 1 / np.log(1.02 + frequency)]


def median_frequency_weights(class_pixels: Sequence[int]) -> list[float]:
    """Median of the classes' frequencies over each class's (Eigen and Fergus 2015).

    Frequencies are over all pixels of the split, not over the frames that show the class as in the
    paper: a class in few frames weighs more here. Classes without a pixel have no part in the median
    and weigh 1.
    """
    pixels = np.asarray(class_pixels, np.float64)
    seen = pixels[pixels > 0]
    median = np.median(seen) if len(seen) else 1.0
    return [float(median / n) if n > 0 else 1.0 for n in pixels]
