"""Pixels drawn from frames have the logits that the whole map, enlarged, would have there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.labels import IGNORE
from roadseg.train.drawn import drawn_pixels


class Frames:
    """Two frames of odd sizes: the second one all void."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        label = np.full((37, 53), IGNORE, np.uint8)
        if index == 0:
            label[3:30, 5:] = np.arange(27 * 48).reshape(27, 48) % 200
        return rng.integers(0, 255, (37, 53, 3), dtype=np.uint8), label


class Coarse(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image.float(), 4, 4, ceil_mode=True)


@pytest.mark.parametrize("most", [50, 10_000])
def test_they_are_those_of_the_enlarged_map(most: int) -> None:
    logits_NK, labels_N = drawn_pixels(Coarse(), Frames(), [0, 1], most)  # type: ignore[arg-type]
    assert len(labels_N) == len(logits_NK) == min(most, 27 * 48) and (labels_N != IGNORE).all()
    image, label = Frames().read(0)
    full_3HW = F.interpolate(Coarse()(torch.from_numpy(image).permute(2, 0, 1)[None]), label.shape, mode="bilinear")[0]
    everywhere = {}
    for y, x in np.argwhere(label != IGNORE):
        everywhere.setdefault(int(label[y, x]), []).append(full_3HW[:, y, x])
    for logits_K, label_ in zip(logits_NK, labels_N.tolist(), strict=True):
        assert min((logits_K - there).abs().max() for there in everywhere[label_]) < 1e-3
    again = drawn_pixels(Coarse(), Frames(), [0, 1], most)  # type: ignore[arg-type]
    assert torch.equal(again[0], logits_NK) and torch.equal(again[1], labels_N)


def test_frames_without_a_valid_pixel_give_none() -> None:
    logits_NK, labels_N = drawn_pixels(Coarse(), Frames(), [1], 10)  # type: ignore[arg-type]
    assert logits_NK.shape == (0, 3) and labels_N.shape == (0,)
