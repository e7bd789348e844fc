"""Cut all crops of a batch from uint8 frames on one device; does the same as `cpu.apply` for one crop.

Scale, crop, flip and rotation are one affine sampling, bilinear for images and nearest for labels; color is one 3x4
matrix; memory is read and written only as uint8. On CUDA this is one Triton kernel. The same in plain PyTorch is
used without Triton, and as a reference in tests.

Frames are in one flat uint8 buffer, either boxes from loader processes or all frames of a split. Crops differ from
OpenCV's by rounding only, except at the frame's border in rotated crops (the last pixel is repeated; OpenCV fades
into the fill).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roadseg.data.augment.cpu import CropParams
from roadseg.data.augment.gpu_probe import kernels_run
from roadseg.labels import IGNORE

BLUR_RADIUS = 5  # OpenCV's kernel radius for the largest sigma, 1.5 px


@dataclass(frozen=True)
class BatchParams:
    """Crop parameters of a batch as arrays.

    layout: int64 [B, 6], byte offsets of the image's and of the label's box in the flat buffer, height and width of
    the box, pixels from one row to the next, taps. transforms: float32 [B, 18], affine [2, 3] and color [3, 4].
    blur_px: float32 [B], 0 for none.
    """

    layout: np.ndarray
    transforms: np.ndarray
    blur_px: np.ndarray


def batch_params(
    params: Sequence[CropParams], image_at: Sequence[int], label_at: Sequence[int], row_px: Sequence[int]
) -> BatchParams:
    layout = [
        (image, label, d.box[2], d.box[3], row, d.taps)
        for d, image, label, row in zip(params, image_at, label_at, row_px, strict=True)
    ]
    transforms = np.empty((len(params), 18), np.float32)
    for row, d in zip(transforms, params, strict=True):
        row[:6], row[6:] = d.affine.ravel(), d.color.ravel()
    return BatchParams(np.array(layout, np.int64), transforms, np.array([d.blur_px for d in params], np.float32))


def cut_crops(
    flat: Tensor, s: BatchParams, crop_px: tuple[int, int], fill: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """(image uint8 [B, H, W, 3] RGB, label uint8 [B, H, W]) on the device of `flat`, uint8 [bytes].

    Outside the frame, the image is `fill` and the label void. On CUDA the work is only queued on the current stream.
    """
    layout = torch.from_numpy(s.layout).to(flat.device, non_blocking=True)
    transforms = torch.from_numpy(s.transforms).to(flat.device, non_blocking=True)
    if flat.is_cuda and kernels_run():
        from roadseg.data.augment import gpu_kernel

        image, label = gpu_kernel.cut_crops(flat, layout, transforms, crop_px, fill)
    else:
        image, label = cut_crops_plain(flat, layout, transforms, crop_px, fill)
    if (chosen := np.flatnonzero(s.blur_px)).size:
        rows = torch.from_numpy(chosen).to(flat.device)
        image[rows] = blurred(image[rows], s.blur_px[chosen])
    return image, label


def cut_crops_plain(
    flat: Tensor, layout: Tensor, transforms: Tensor, crop_px: tuple[int, int], fill: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """`cut_crops` without blur in plain PyTorch; layout, transforms: those of a BatchParams as tensors."""
    device = flat.device
    y = torch.arange(crop_px[0], device=device, dtype=torch.float32)[:, None]
    x = torch.arange(crop_px[1], device=device, dtype=torch.float32)
    image_at, label_at, height, width, row_px, taps = layout[:, :, None, None].unbind(1)
    xx, xy, x0, yx, yy, y0 = transforms[:, :6, None, None].unbind(1)
    u, v = xx * x + xy * y + x0, yx * x + yy * y + y0

    column, row = torch.floor(u + 0.5).long(), torch.floor(v + 0.5).long()
    covered = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    label = torch.where(covered, flat[torch.where(covered, label_at + row * row_px + column, 0)], IGNORE)

    mean = torch.zeros((*u.shape, 3), device=device)
    channel = torch.arange(3, device=device)
    most = int(taps.max()) if len(taps) else 0
    for i in range(most):
        for j in range(most):
            dx, dy = (j + 0.5) / taps - 0.5, (i + 0.5) / taps - 0.5
            su = torch.minimum((u + xx * dx + xy * dy).clamp(min=0), width - 1)
            sv = torch.minimum((v + yx * dx + yy * dy).clamp(min=0), height - 1)
            left, top = su.long(), sv.long()
            right, bottom = torch.minimum(left + 1, width - 1), torch.minimum(top + 1, height - 1)
            share = ((i < taps) & (j < taps)) / taps.float() ** 2
            for from_y, wy in ((top, 1 - (sv - top)), (bottom, sv - top)):
                for from_x, wx in ((left, 1 - (su - left)), (right, su - left)):
                    at = image_at + (from_y * row_px + from_x) * 3
                    mean += (share * wy * wx)[..., None] * flat[at[..., None] + channel]
    color = transforms[:, 6:].reshape(-1, 1, 3, 4)
    tinted = (mean[..., None, :] * color[:, None, :, :, :3]).sum(-1) + color[:, None, :, :, 3]
    pixels = torch.floor(tinted.clamp(0, 255) + 0.5).to(torch.uint8)
    return torch.where(covered[..., None], pixels, torch.tensor(fill, dtype=torch.uint8, device=device)), label


def blurred(image_BHWC: Tensor, sigma_px: np.ndarray) -> Tensor:
    """Gaussian blur of uint8 images, each with its own sigma; kernel size as in OpenCV, replicated borders."""
    distance = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    sigma = sigma_px[:, None].astype(np.float64)
    weights = np.exp(-0.5 * (distance / sigma) ** 2) * (
        np.abs(distance) <= (np.rint(6 * sigma + 1).astype(int) | 1) // 2
    )
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    w = torch.from_numpy(weights).to(image_BHWC.device)[:, :, None, None, None]
    height, width = image_BHWC.shape[1:3]
    pixels = image_BHWC.permute(0, 3, 1, 2).float()
    for dim, length in ((2, height), (3, width)):
        edges = (0, 0, BLUR_RADIUS, BLUR_RADIUS) if dim == 2 else (BLUR_RADIUS, BLUR_RADIUS, 0, 0)
        padded = F.pad(pixels, edges, mode="replicate")
        pixels = sum(w[:, k] * padded.narrow(dim, k, length) for k in range(len(distance)))  # type: ignore[assignment]
    return torch.floor(pixels.clamp(0, 255) + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
