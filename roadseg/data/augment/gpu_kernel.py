"""The Triton kernel of gpu.py: one pass from uint8 frames to uint8 crops with their labels.

Imported only on a GPU: Triton comes only with PyTorch's CUDA wheels.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

TILE = 8, 64  # rows, columns of a crop per program: powers of two
WARPS = 4


@triton.jit
def _crop_tile(
    flat, layout, transforms, image, label, crop_h, crop_w, fill_r, fill_g, fill_b,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    tiles_x = (crop_w + TILE_W - 1) // TILE_W
    i = tl.arange(0, TILE_H * TILE_W)
    y = tl.program_id(0) // tiles_x * TILE_H + i // TILE_W
    x = tl.program_id(0) % tiles_x * TILE_W + i % TILE_W
    inside = (y < crop_h) & (x < crop_w)

    place = layout + b * 6
    from_image = flat + tl.load(place)
    from_label = flat + tl.load(place + 1)
    height = tl.load(place + 2).to(tl.int32)
    width = tl.load(place + 3).to(tl.int32)
    row_px = tl.load(place + 4).to(tl.int32)
    taps = tl.load(place + 5).to(tl.int32)
    number = transforms + b * 18
    xx, xy, x0 = tl.load(number), tl.load(number + 1), tl.load(number + 2)
    yx, yy, y0 = tl.load(number + 3), tl.load(number + 4), tl.load(number + 5)
    u = xx * x + xy * y + x0
    v = yx * x + yy * y + y0

    column, row = tl.floor(u + 0.5).to(tl.int32), tl.floor(v + 0.5).to(tl.int32)
    covered = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    ids = tl.load(from_label + row * row_px + column, mask=covered, other=255)

    r = tl.zeros([TILE_H * TILE_W], tl.float32)
    g = tl.zeros([TILE_H * TILE_W], tl.float32)
    blue = tl.zeros([TILE_H * TILE_W], tl.float32)
    for tap in range(taps * taps):
        dx, dy = (tap % taps + 0.5) / taps - 0.5, (tap // taps + 0.5) / taps - 0.5
        su = tl.minimum(tl.maximum(u + xx * dx + xy * dy, 0.0), (width - 1).to(tl.float32))
        sv = tl.minimum(tl.maximum(v + yx * dx + yy * dy, 0.0), (height - 1).to(tl.float32))
        left, top = su.to(tl.int32), sv.to(tl.int32)
        wx, wy = su - left, sv - top
        right, bottom = tl.minimum(left + 1, width - 1), tl.minimum(top + 1, height - 1)
        nw, ne = from_image + (top * row_px + left) * 3, from_image + (top * row_px + right) * 3
        sw, se = from_image + (bottom * row_px + left) * 3, from_image + (bottom * row_px + right) * 3
        a, c, d, e = (1 - wy) * (1 - wx), (1 - wy) * wx, wy * (1 - wx), wy * wx
        r += a * tl.load(nw, covered, 0) + c * tl.load(ne, covered, 0)
        r += d * tl.load(sw, covered, 0) + e * tl.load(se, covered, 0)
        g += a * tl.load(nw + 1, covered, 0) + c * tl.load(ne + 1, covered, 0)
        g += d * tl.load(sw + 1, covered, 0) + e * tl.load(se + 1, covered, 0)
        blue += a * tl.load(nw + 2, covered, 0) + c * tl.load(ne + 2, covered, 0)
        blue += d * tl.load(sw + 2, covered, 0) + e * tl.load(se + 2, covered, 0)
    share = 1.0 / (taps * taps)
    r, g, blue = r * share, g * share, blue * share

    color = number + 6
    red = r * tl.load(color) + g * tl.load(color + 1) + blue * tl.load(color + 2) + tl.load(color + 3)
    green = r * tl.load(color + 4) + g * tl.load(color + 5) + blue * tl.load(color + 6) + tl.load(color + 7)
    azure = r * tl.load(color + 8) + g * tl.load(color + 9) + blue * tl.load(color + 10) + tl.load(color + 11)
    red = tl.floor(tl.minimum(tl.maximum(red, 0.0), 255.0) + 0.5).to(tl.int32)
    green = tl.floor(tl.minimum(tl.maximum(green, 0.0), 255.0) + 0.5).to(tl.int32)
    azure = tl.floor(tl.minimum(tl.maximum(azure, 0.0), 255.0) + 0.5).to(tl.int32)

    at = (b * crop_h + y).to(tl.int64) * crop_w + x
    tl.store(label + at, ids, mask=inside)
    tl.store(image + at * 3, tl.where(covered, red, fill_r).to(tl.uint8), mask=inside)
    tl.store(image + at * 3 + 1, tl.where(covered, green, fill_g).to(tl.uint8), mask=inside)
    tl.store(image + at * 3 + 2, tl.where(covered, azure, fill_b).to(tl.uint8), mask=inside)


def cut_crops(
    flat: Tensor, layout: Tensor, transforms: Tensor, crop_px: tuple[int, int], fill: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Same as gpu.cut_crops_plain, for CUDA tensors, queued on the current stream."""
    batch, (height, width) = len(layout), crop_px
    image = torch.empty((batch, height, width, 3), dtype=torch.uint8, device=flat.device)
    label = torch.empty((batch, height, width), dtype=torch.uint8, device=flat.device)
    grid = triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1]), batch
    _crop_tile[grid](flat, layout, transforms, image, label, height, width, *fill, *TILE, num_warps=WARPS)
    return image, label


@triton.jit  # type: ignore[untyped-decorator]
def _seven(out):  # type: ignore[no-untyped-def]
    tl.store(out, 7)


def probe(device: str) -> bool:
    """Launch a minimal kernel and check its result."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _seven[(1,)](out)
    return int(out.item()) == 7
