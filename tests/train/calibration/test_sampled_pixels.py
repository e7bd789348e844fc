"""Pixels drawn from frames have the logits that the whole map, enlarged, would have there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.labels import IGNORE
from roadseg.train.calibration.sampled_pixels import sampled_pixels


class Frames:
    """The first of odd sizes, the second of others and all void, the third of others again."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        height, width = ((37, 53), (20, 30), (16, 64))[index]
        label = np.full((height, width), IGNORE, np.uint8)
        if index == 0:
            label[3:30, 5:] = np.arange(27 * 48).reshape(27, 48) % 200
        if index == 2:
            label[:] = 201
        return rng.integers(0, 255, (height, width, 3), dtype=np.uint8), label


class Coarse(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image.float(), 4, 4, ceil_mode=True)


@pytest.mark.parametrize("most", [50, 10_000])
def test_they_are_those_of_the_enlarged_map(most: int) -> None:
    logits_NK, labels_N = sampled_pixels(Coarse(), Frames(), [0, 1], most)  # type: ignore[arg-type]
    assert len(labels_N) == len(logits_NK) == min(most, 27 * 48) and (labels_N != IGNORE).all()
    image, label = Frames().read(0)
    full_3HW = F.interpolate(Coarse()(torch.from_numpy(image).permute(2, 0, 1)[None]), label.shape, mode="bilinear")[0]
    everywhere = {}
    for y, x in np.argwhere(label != IGNORE):
        everywhere.setdefault(int(label[y, x]), []).append(full_3HW[:, y, x])
    for logits_K, label_ in zip(logits_NK, labels_N.tolist(), strict=True):
        assert min((logits_K - there).abs().max() for there in everywhere[label_]) < 1e-3
    both, labels_both_N = sampled_pixels(Coarse(), Frames(), [0, 2], most)  # type: ignore[arg-type]
    assert torch.equal(both[: len(logits_NK)], logits_NK) and (labels_both_N == 201).sum() == min(most, 16 * 64)
    again = sampled_pixels(Coarse(), Frames(), [0, 1], most)  # type: ignore[arg-type]
    assert torch.equal(again[0], logits_NK) and torch.equal(again[1], labels_N)


def test_frames_without_a_valid_pixel_give_none() -> None:
    logits_NK, labels_N = sampled_pixels(Coarse(), Frames(), [1], 10)  # type: ignore[arg-type]
    assert logits_NK.shape == (0, 3) and labels_N.shape == (0,)


def test_they_are_computed_as_asked() -> None:
    class Rounded(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            weight = torch.full((1, 3, 1, 1), 1 / 3)
            return F.conv2d(image.float(), weight)

    counted: list[int] = []
    exact, rounded = (
        sampled_pixels(Rounded(), Frames(), [2], 500, None, bf16, lambda: counted.append(1))[0]  # type: ignore[arg-type]
        for bf16 in (False, True)
    )
    assert exact.dtype == rounded.dtype == torch.float32 and len(counted) == 2
    assert 0 < (exact - rounded).abs().max() < 2
