import numpy as np
import pytest
import torch
from torch.nn import functional as F

from roadseg.inference.upsample import upsample_argmax

SIZES = [
    (16, 32, 64, 128),
    (9, 13, 65, 97),
    (12, 7, 89, 53),
    (1, 1, 5, 7),
    (3, 2, 1, 1),
    (24, 24, 24, 24),
    (5, 8, 19, 8),
]


def smooth(classes: int, height: int, width: int) -> np.ndarray:
    """float32 [K, h, w]: logits with regions and borders, as a network's have."""
    rng = np.random.default_rng([classes, height, width])
    coarse = torch.from_numpy(rng.normal(0, 3, (1, classes, 4, 5)))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].float().numpy()


@pytest.mark.parametrize("classes", [1, 2, 19, 255])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_torch_s_interpolate_and_argmax(size: tuple[int, int, int, int], classes: int) -> None:
    h, w, height, width = size
    logits = smooth(classes, h, w)
    label = upsample_argmax(logits, height, width)
    assert label.dtype == np.uint8 and label.shape == (height, width)
    full = F.interpolate(torch.from_numpy(logits)[None], (height, width), mode="bilinear", align_corners=False)[0]
    differ = label != full.argmax(0).numpy()
    assert differ.mean() <= 1e-4 or differ.sum() <= 1
    # where they differ the two best classes are equal but for rounding
    top = full.topk(min(2, classes), dim=0).values.numpy()
    assert np.all(top[0][differ] - top[-1][differ] < 1e-4)


def test_ties_go_to_the_lower_class() -> None:
    assert not upsample_argmax(np.zeros((3, 4, 4), np.float32), 9, 9).any()


def test_the_logits_are_left_alone() -> None:
    logits = smooth(3, 8, 8)
    before = logits.copy()
    upsample_argmax(logits, 8, 8)
    assert np.array_equal(logits, before)
