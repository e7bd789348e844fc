"""Triton kernels for cross-entropy of bilinearly upsampled logits without the upsampled map.

Shapes: B images, K classes, H W the label, h w the logits. The pixels between two neighbouring rows (or columns) of
logits are a cell; pixels beyond the outermost logits belong to the outermost cells, so there are max(h - 1, 1).

One lane owns a column of pixels and walks down the rows of a few cells. It holds, in registers, K logits of the
cell's upper row at its column, their rise to the lower row, and the gradients of both: a pixel costs some fifteen
instructions a class, no two lanes talk, and no class is padded. Below each row of logits the gradients of the
pixel columns of a cell are summed by shuffles into what goes to its left and its right logit. Only these sums are
written: [strips, cells of a strip + 1, K, B, groups of columns, 2]. A second kernel adds the two to six of them
that a logit has, when the factor of the loss is known. Nothing is added atomically: equal inputs give equal bits.

Imported only where there is a GPU, as Triton comes with PyTorch's CUDA wheels alone.
"""

# Kernels build tuples item by item.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor
from torch.nn import functional as F

from roadseg.labels import IGNORE

LANES, WARPS = 64, 2  # pixel columns of a program of the first kernel, a power of two of at least 32; one a thread
ROWS = 16  # pixel rows it walks down, about: fewer fill a GPU with small batches, more write fewer sums
COLUMNS, COLUMN_WARPS = 32, 4  # columns of logits of a program of the second kernel: a power of two

_IGNORE = tl.constexpr(IGNORE)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


# One compilation a form of loss, layout and number of classes, whatever the sizes.
_SIZES = ["batch", "groups", "low_height", "low_width", "stride_b", "stride_h", "cells"]


@triton.jit
def _at_columns(at, step, stride_k, share, inside, K: tl.constexpr):
    """K vectors: a row of logits at the lanes' columns, as powers of two, as the hardware has exp2 and no exp."""
    row = ()
    for k in tl.static_range(K):
        left = tl.load(at + k * stride_k, mask=inside, other=0).to(tl.float32)
        right = tl.load(at + k * stride_k + step, mask=inside, other=0).to(tl.float32)
        row = row + (((1 - share) * left + share * right) * _LOG2_E,)
    return row


@triton.jit
def _softmax(z, ids, K: tl.constexpr):
    """The largest of z, the logit of the lane's class (NaN if it is none), exp2(z - largest) and their sum."""
    largest = z[0]
    for k in tl.static_range(1, K):
        largest = tl.maximum(largest, z[k])
    true = tl.full(largest.shape, float("nan"), tl.float32)
    total = tl.zeros(largest.shape, tl.float32)
    powers = ()
    for k in tl.static_range(K):
        power = tl.exp2(z[k] - largest)
        powers = powers + (power,)
        total += power
        true = tl.where(ids == k, z[k], true)
    return largest, true, powers, total


@triton.jit(do_not_specialize=[*_SIZES, "height", "width", "smoothing"])
def _strip(
    logits, label, class_weights, pixel_weights, row_first, row_share, group_first, group_cell, column_share,
    partial, losses, sums, batch, height, width, low_height, low_width, groups,
    stride_b, stride_k, stride_h, stride_w, smoothing, cells, K: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * LANES + tl.arange(0, LANES)
    group, of_all = n // WIDE, batch * groups
    known = group < of_all
    b, group = (group // groups).to(tl.int64), group % groups
    x = tl.load(group_first + group, mask=known, other=0) + n % WIDE
    inside = known & (x < tl.load(group_first + group + 1, mask=known, other=0))
    left = tl.load(group_cell + group, mask=known, other=0)
    share = tl.load(column_share + x, mask=inside, other=0)
    step = (tl.minimum(left + 1, low_width - 1) - left) * stride_w
    corner = logits + b * stride_b + left * stride_w
    pixel = b * (height * width) + x
    side = tl.arange(0, WIDE)[None, :]  # two lanes of a group store its two sums
    place = (tl.program_id(0) * (LANES // WIDE) + tl.arange(0, LANES // WIDE))[:, None] * 2 + side

    first = tl.program_id(1) * cells
    last = tl.minimum(first + cells, tl.maximum(low_height - 1, 1))
    slot = (tl.program_id(1) * (cells + 1)).to(tl.int64)
    loss = tl.zeros([LANES], tl.float32)
    upper = (tl.zeros([LANES], tl.float32),) * K
    of_upper = upper
    # The first row of logits is only loaded, the one after the last only stores, all in one loop: Triton's compile
    # time grows with the square of the number of loads and stores in its text.
    for row in range(first, last + 2):
        corners = corner + tl.minimum(row, low_height - 1) * stride_h
        lower = _at_columns(corners, step, stride_k, share, inside & (x < tl.where(row <= last, width, 0)), K)
        rise = ()
        mean, mean_rise = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        for k in tl.static_range(K):
            rise = rise + (lower[k] - upper[k],)
            mean += upper[k] / K
            mean_rise += rise[k] / K
        of_lower = (tl.zeros([LANES], tl.float32),) * K
        begin = tl.load(row_first + tl.maximum(row - 1, first))
        for y in range(begin, tl.load(row_first + tl.minimum(row, last))):
            at = pixel + y * width
            down = tl.load(row_share + y)
            ids = tl.load(label + at, mask=inside, other=_IGNORE).to(tl.int32)
            weight = tl.where(ids == _IGNORE, 0.0, 1.0)
            if class_weights is not None:
                weight *= tl.load(class_weights + ids, mask=(ids >= 0) & (ids < K), other=1.0)
            if pixel_weights is not None:
                weight *= tl.load(pixel_weights + at, mask=inside, other=0.0)
            z = ()
            for k in tl.static_range(K):
                z = z + (upper[k] + down * rise[k],)
            largest, true, powers, total = _softmax(z, ids, K)
            far = (1 - smoothing) * (largest - true) + smoothing * (largest - mean - down * mean_rise)
            here = tl.where(ids == _IGNORE, 0.0, weight * (far + tl.log2(total)) * _LN_2)
            loss += here
            if losses is not None:
                tl.store(losses + at, here, mask=inside)
            if sums is not None:
                scale, rest = weight / total, weight * smoothing / K
                hit = rest + weight * (1 - smoothing)
                to_upper, to_lower = (), ()
                for k in tl.static_range(K):
                    slope = powers[k] * scale - tl.where(ids == k, hit, rest)
                    to_upper = to_upper + (of_upper[k] + (1 - down) * slope,)
                    to_lower = to_lower + (of_lower[k] + down * slope,)
                of_upper, of_lower = to_upper, to_lower
        if sums is not None:
            to = sums + (slot + row - 1 - first) * K * of_all * 2 + place
            held = (side < 2) & (place < tl.where(row > first, of_all * 2, 0))
            for k in tl.static_range(K):
                to_right = tl.reshape(of_upper[k] * share, [LANES // WIDE, WIDE])
                to_left = tl.reshape(of_upper[k] * (1 - share), [LANES // WIDE, WIDE])
                to_both = tl.where(side == 0, tl.sum(to_left, 1, keep_dims=True), tl.sum(to_right, 1, keep_dims=True))
                tl.store(to + k * of_all * 2, to_both, mask=held)
        below = ()  # once more instead of `lower`, which would be K registers more in the loop over pixels
        for k in tl.static_range(K):
            below = below + (upper[k] + rise[k],)
        upper, of_upper = below, of_lower
    tl.store(partial + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(loss))


@triton.jit(do_not_specialize=[*_SIZES, "span"])
def _gather(
    sums, factor, gradient, cell_group, batch, groups, low_height, low_width,
    stride_b, stride_k, stride_h, stride_w, cells, span, K: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    inside = n < batch * low_width
    b, column = n // low_width, n % low_width
    column_cells = tl.maximum(low_width - 1, 1)
    begin = tl.load(cell_group + tl.maximum(column - 1, 0), mask=inside, other=0)
    middle = tl.load(cell_group + tl.minimum(column, column_cells), mask=inside, other=0)
    end = tl.load(cell_group + tl.minimum(column + 1, column_cells), mask=inside, other=0)
    strip = tl.minimum(row // cells, (tl.maximum(low_height - 1, 1) - 1) // cells)
    slot = row - strip * cells
    plane = batch * groups * 2
    here = sums + (strip * (cells + 1) + slot).to(tl.int64) * K * plane
    before = here - K * plane  # the last slot of the strip above: what its lowest cell gives to this row
    k = tl.arange(0, PADDED)[:, None]
    total = tl.zeros([PADDED, COLUMNS], tl.float32)
    for i in range(span):
        group = begin + i
        at = k * plane + ((b * groups + group) * 2 + tl.where(group < middle, 1, 0))[None, :]
        held = (inside & (group < end))[None, :] & (k < K)
        total += tl.load(here + at, mask=held, other=0).to(tl.float32)
        if (slot == 0) & (strip > 0):
            total += tl.load(before + at, mask=held, other=0).to(tl.float32)
    total *= tl.load(factor)
    to = b.to(tl.int64) * stride_b + column * stride_w
    tl.store(gradient + row * stride_h + to[None, :] + k * stride_k, total, mask=inside[None, :] & (k < K))


@dataclass(frozen=True)
class _Rows:
    first: Tensor  # int32 [cells + 1], the first pixel of each cell
    share: Tensor  # float32 [pixels], 0..1: where in its cell a pixel lies


@dataclass(frozen=True)
class _Columns:
    """The pixels of a cell are in one or more groups of neighbours; a group's gradients are summed by shuffles."""

    wide: int  # lanes of a group, the most pixels it has
    first: Tensor  # int32 [groups + 1], the first pixel of each group
    cell: Tensor  # int32 [groups]
    share: Tensor  # float32 [pixels]
    cell_group: Tensor  # int32 [cells + 1], the first group of each cell
    span: int  # the most groups that one logit has a part in


def _positions(size: int, to_size: int) -> tuple[Tensor, Tensor]:
    """Of pixel.upsample: the first pixel of each cell, int64 [cells + 1], and each pixel's share, float32."""
    centre = ((torch.arange(to_size, dtype=torch.float64) + 0.5) * size / to_size - 0.5).clamp(0, size - 1)
    left = centre.floor().long().clamp(max=max(size - 2, 0))
    return torch.searchsorted(left, torch.arange(max(size - 1, 1) + 1)), (centre - left).float()


@cache  # never dropped: a captured CUDA graph reads them by address
def _rows(size: int, to_size: int, device: torch.device) -> _Rows:
    first, share = _positions(size, to_size)
    return _Rows(first.int().to(device), share.to(device))


@cache
def _columns(size: int, to_size: int, device: torch.device) -> _Columns:
    first, share = _positions(size, to_size)
    pixels = first.diff()
    # An idle lane costs about half of what the two sums of one more group cost.
    wide = min((2, 4, 8, 16, 32), key=lambda w: int((pixels + w - 1).div(w, rounding_mode="floor").sum()) * (w + 2))
    groups = (pixels + wide - 1).div(wide, rounding_mode="floor")
    cell_group = F.pad(groups.cumsum(0), (1, 0))
    cell = torch.arange(len(groups)).repeat_interleave(groups)
    starts = first[cell] + (torch.arange(len(cell)) - cell_group[cell]) * wide
    logit = torch.arange(size)
    span = cell_group[(logit + 1).clamp(max=len(groups))] - cell_group[(logit - 1).clamp(min=0)]
    first, cell, cell_group = (t.int().to(device) for t in (torch.cat([starts, first[-1:]]), cell, cell_group))
    return _Columns(wide, first, cell, share.to(device), cell_group, int(span.max()))


def _cells_of_a_strip(low_height: int, height: int) -> int:
    return max(1, round(ROWS * low_height / height))


def _forward(
    logits_BKhw: Tensor,
    label_BHW: Tensor,
    class_weights_K: Tensor | None,
    label_smoothing: float,
    pixel_weights_BHW: Tensor | None,
    *,
    gradient: bool = False,
    losses_BHW: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, float32 scalar, and (with gradient) the sums over pixel rows that _gather takes."""
    batch, classes, low_height, low_width = logits_BKhw.shape
    _, height, width = label_BHW.shape
    assert len(label_BHW) == batch and (pixel_weights_BHW is None or pixel_weights_BHW.shape == label_BHW.shape)
    assert class_weights_K is None or class_weights_K.shape == (classes,)
    device = logits_BKhw.device
    rows, columns = _rows(low_height, height, device), _columns(low_width, width, device)
    groups, cells = len(columns.cell), _cells_of_a_strip(low_height, height)
    grid = triton.cdiv(batch * groups * columns.wide, LANES), triton.cdiv(max(low_height - 1, 1), cells)
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=device)
    # The gradient will be bf16 if the logits are; fp16 may be rounded only after the loss scale.
    kind = torch.bfloat16 if logits_BKhw.dtype == torch.bfloat16 else torch.float32
    shape = grid[1], cells + 1, classes, batch, groups, 2
    sums = torch.empty(shape, dtype=kind, device=device) if gradient else None
    _strip[grid](
        logits_BKhw, label_BHW.contiguous(),
        None if class_weights_K is None else class_weights_K.contiguous(),
        None if pixel_weights_BHW is None else pixel_weights_BHW.contiguous(),
        rows.first, rows.share, columns.first, columns.cell, columns.share, partial, losses_BHW, sums,
        batch, height, width, low_height, low_width, groups, *logits_BKhw.stride(), float(label_smoothing), cells,
        K=classes, LANES=LANES, WIDE=columns.wide, num_warps=WARPS,
    )  # fmt: skip
    return partial.sum(), sums


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, label: Tensor, class_weights: Tensor | None, smoothing: float, pixels: Tensor | None
    ) -> Tensor:
        loss, sums = _forward(logits, label, class_weights, smoothing, pixels, gradient=True)
        ctx.save_for_backward(sums)
        ctx.like = torch.empty_like(logits, device="meta")
        ctx.columns = _columns(logits.shape[3], label.shape[2], logits.device)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None, None]:
        (sums,) = ctx.saved_tensors
        batch, classes, low_height, low_width = ctx.like.shape
        gradient = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=ctx.like.dtype, device=sums.device)
        grid = triton.cdiv(batch * low_width, COLUMNS), low_height
        _gather[grid](
            sums, factor, gradient, ctx.columns.cell_group, batch, sums.shape[4], low_height, low_width,
            *gradient.stride(), sums.shape[1] - 1, ctx.columns.span,
            K=classes, PADDED=triton.next_power_of_2(classes), COLUMNS=COLUMNS, num_warps=COLUMN_WARPS,
        )  # fmt: skip
        return gradient, None, None, None, None


def upsampled_cross_entropy(
    logits_BKhw: Tensor,
    label_BHW: Tensor,
    class_weights_K: Tensor | None = None,
    label_smoothing: float = 0.0,
    pixel_weights_BHW: Tensor | None = None,
) -> Tensor:
    """pixel.cross_entropy before its division, float32 scalar: the sum over valid pixels of weight x cross-entropy.

    logits: bf16, fp16 or float32 on a CUDA device, any strides; gradient to them alone, in their dtype and memory
    format. label: uint8 or int64 of train ids, IGNORE counts nowhere; any other id that is no class makes the sum
    NaN. Weights: float32. Nothing waits for the device: it can be captured in a CUDA graph once called with these
    sizes outside of one.
    """
    if torch.is_grad_enabled() and logits_BKhw.requires_grad:
        total: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            logits_BKhw, label_BHW, class_weights_K, label_smoothing, pixel_weights_BHW
        )
        return total
    return _forward(logits_BKhw, label_BHW, class_weights_K, label_smoothing, pixel_weights_BHW)[0]


def upsampled_losses(
    logits_BKhw: Tensor,
    label_BHW: Tensor,
    class_weights_K: Tensor | None = None,
    label_smoothing: float = 0.0,
    pixel_weights_BHW: Tensor | None = None,
) -> Tensor:
    """float32 [B, H, W], without gradient: what upsampled_cross_entropy sums, 0 at void."""
    losses = torch.empty(label_BHW.shape, dtype=torch.float32, device=logits_BKhw.device)
    _forward(logits_BKhw.detach(), label_BHW, class_weights_K, label_smoothing, pixel_weights_BHW, losses_BHW=losses)
    return losses
