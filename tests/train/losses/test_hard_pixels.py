import numpy as np
import pytest
import torch

from roadseg.labels import IGNORE
from roadseg.train.losses.hard_pixels import hardest, near_another_class


def label_with_void(seed: int, shape: tuple[int, ...], k: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, shape).astype(np.uint8)
    label[rng.random(shape) < 0.2] = IGNORE
    return label


@pytest.mark.parametrize(("threshold", "keep"), [(0.01, 0.25), (0.7, 0.0625), (1e-4, 0.5), (0.5, 1.0), (1.0, 0.1)])
def test_the_hardest_are_those_of_a_sort(threshold: float, keep: float) -> None:
    label = label_with_void(0, (2, 9, 11), 4)
    logits = torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(0)) * 3
    got = hardest(logits, torch.from_numpy(label), threshold, keep).numpy()

    p = torch.softmax(logits.double(), 1).numpy()
    valid = label != IGNORE
    p_true = np.take_along_axis(p, np.where(valid, label, 0)[:, None].astype(np.int64), 1)[:, 0][valid]
    k = int(np.ceil(keep * len(p_true)))
    kept = np.zeros(len(p_true))
    kept[np.argsort(p_true)[:k]] = 1
    kept[p_true < threshold] = 1
    np.testing.assert_array_equal(got[valid], kept)
    assert not got[~valid].any()


def test_pixels_that_tie_share_what_is_left() -> None:
    logits = torch.zeros(1, 2, 1, 10)
    logits[0, 0, 0] = torch.tensor([9.0, 9, 1, 1, 1, 1, -2, 9, 9, 9])
    label = torch.zeros(1, 1, 10, dtype=torch.uint8)
    label[0, 0, 9] = IGNORE  # nine valid pixels, of which ceil(9 / 3) are kept: one hard, two of four that tie
    got = hardest(logits, label, 0.01, 1 / 3)
    torch.testing.assert_close(got[0, 0], torch.tensor([0, 0, 0.5, 0.5, 0.5, 0.5, 1, 0, 0, 0]))
    certain = hardest(logits * 1000, label, 0.01, 1.0)  # losses of exactly 0
    assert torch.equal(certain[0, 0], (label[0, 0] != IGNORE).float())


def test_of_void_nothing_is_kept() -> None:
    label = torch.full((1, 4, 4), IGNORE, dtype=torch.uint8)
    assert not hardest(torch.randn(1, 3, 2, 2), label, 0.7, 0.5).any()
    assert not near_another_class(label, 2).any()


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_near_another_class_as_by_search(reach: int) -> None:
    label = np.kron(label_with_void(1, (2, 4, 5), 3), np.ones((1, 4, 3), np.uint8))
    wanted = np.zeros(label.shape, bool)
    for b, y, x in np.ndindex(label.shape):
        around = label[b, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
        wanted[b, y, x] = label[b, y, x] != IGNORE and bool(((around != IGNORE) & (around != label[b, y, x])).any())
    assert 0 < wanted.sum() < wanted.size
    np.testing.assert_array_equal(near_another_class(torch.from_numpy(label), reach).numpy(), wanted)
