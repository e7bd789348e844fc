import numpy as np
import pytest
import torch

from roadseg.labels import IGNORE
from roadseg.train.losses import cross_entropy, enet_weights, upsample


def reference(logits: np.ndarray, label: np.ndarray, weights: np.ndarray | None, smoothing: float) -> float:
    """Plain loops over pixels in float64; logits [B, K, H, W] at the label's size."""
    total = count = 0.0
    k = logits.shape[1]
    w = np.ones(k) if weights is None else weights
    for b, y, x in np.ndindex(label.shape):
        truth = label[b, y, x]
        if truth == IGNORE:
            continue
        z = logits[b, :, y, x].astype(np.float64)
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        target = np.full(k, smoothing / k)
        target[truth] += 1 - smoothing
        total += -w[truth] * (target * log_p).sum()
        count += w[truth]
    return total / count if count else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_loops(smoothing: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    label = rng.integers(0, 4, (2, 5, 6)).astype(np.uint8)
    label[0, :2] = IGNORE
    weights = rng.uniform(0.5, 3, 4) if weighted else None
    got = cross_entropy(
        torch.from_numpy(logits),
        torch.from_numpy(label),
        None if weights is None else torch.tensor(weights, dtype=torch.float32),
        smoothing,
    )
    assert float(got) == pytest.approx(reference(logits, label, weights, smoothing), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "to"), [((5, 7), (20, 28)), ((23, 30), (360, 480)), ((1, 1), (9, 4)), ((9, 8), (4, 3))]
)
def test_upsampling_is_torchs(size: tuple[int, int], to: tuple[int, int]) -> None:
    logits = torch.randn(2, 3, *size, requires_grad=True)
    expected = torch.nn.functional.interpolate(logits, to, mode="bilinear", align_corners=False)
    got = upsample(logits, *to)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(expected)
    (wanted,), (gradient,) = (torch.autograd.grad(x, logits, seed) for x in (expected, got))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_of_void_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 8, 8), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_void_changes_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4)
    label = torch.randint(0, 3, (1, 4, 4), dtype=torch.uint8)
    half = label.clone()
    half[:, 2:] = IGNORE
    assert torch.allclose(cross_entropy(logits, half), cross_entropy(logits[:, :, :2], label[:, :2]))


def test_enet_weights_are_the_papers_and_finite_for_absent_classes() -> None:
    weights = enet_weights([750, 250, 0])
    assert weights == pytest.approx([1 / np.log(1.77), 1 / np.log(1.27), 1 / np.log(1.02)])
    assert all(np.isfinite(enet_weights([0, 0])))
