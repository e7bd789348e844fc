from typing import Any

import numpy as np
import pytest
import torch

from roadseg.labels import IGNORE
from roadseg.train.losses import pixel as losses
from roadseg.train.losses.pixel import (
    cross_entropy,
    enet_weights,
    focal_sum,
    median_frequency_weights,
    plain_cross_entropy_sum,
    sum_over_images,
    upsample,
)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def reference_sum(
    logits: np.ndarray, label: np.ndarray, weights: np.ndarray, smoothing: float, pixels: np.ndarray, gamma: float = 0
) -> float:
    """Plain loops over pixels in float64; logits [B, K, H, W] at the label's size."""
    total, k = 0.0, logits.shape[1]
    for b, y, x in np.ndindex(label.shape):
        truth = label[b, y, x]
        if truth == IGNORE:
            continue
        log_p = log_softmax(logits[b, :, y, x].astype(np.float64))
        target = np.full(k, smoothing / k)
        target[truth] += 1 - smoothing
        focus = (1 - np.exp(log_p[truth])) ** gamma
        total += -weights[truth] * pixels[b, y, x] * focus * (target * log_p).sum()
    return total


def reference(logits: np.ndarray, label: np.ndarray, weights: np.ndarray | None, smoothing: float) -> float:
    w = np.ones(logits.shape[1]) if weights is None else weights
    count = w[label[label != IGNORE]].sum()
    return reference_sum(logits, label, w, smoothing, np.ones(label.shape)) / count if count else 0.0


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


def scene(seed: int, k: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits float64 [2, k, 5, 6], label with void, class weights, pixel weights."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, (2, 5, 6)).astype(np.uint8)
    label[1, 3:] = IGNORE
    return 3 * rng.normal(size=(2, k, 5, 6)), label, rng.uniform(0.5, 3, k), rng.uniform(0, 2, label.shape)


def test_pixel_weights_multiply_class_weights() -> None:
    logits, label, weights, pixels = scene(1)
    inputs = [torch.from_numpy(a) for a in (logits, label, weights)]
    got = plain_cross_entropy_sum(*inputs, 0.1, torch.from_numpy(pixels))  # type: ignore[call-arg]
    assert float(got) == pytest.approx(reference_sum(logits, label, weights, 0.1, pixels), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_plain_loops(gamma: float) -> None:
    logits, label, weights, _ = scene(2)
    got = focal_sum(*(torch.from_numpy(a) for a in (logits, label, weights)), gamma)  # type: ignore[call-arg]
    assert float(got) == pytest.approx(reference_sum(logits, label, weights, 0, np.ones(label.shape), gamma), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_at_certainty(gamma: float) -> None:
    logits = (
        torch.tensor([20.0, -20, 60, -60]).view(1, 1, 2, 2).repeat(1, 2, 1, 1) * torch.tensor([1.0, -1])[:, None, None]
    )
    logits.requires_grad_()
    loss = focal_sum(logits, torch.zeros(1, 2, 2, dtype=torch.uint8), None, gamma)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    assert (
        logits.grad[0, 0, 0, 0].abs() < 1e-3 and logits.grad[0, 0, 1, 1] < -0.4
    )  # certain and right, certain and wrong


@pytest.mark.parametrize("term", ["cross_entropy", "focal"])
def test_gradients_at_coarse_logits(term: str) -> None:
    logits, label, weights, pixels = (torch.from_numpy(a) for a in scene(3))
    coarse = logits[:, :, :3, :2].clone().requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        if term == "focal":
            return focal_sum(z, label, weights, 1.5)
        return plain_cross_entropy_sum(z, label, weights, 0.1, pixels)

    assert torch.autograd.gradcheck(loss, coarse)


def test_images_may_be_summed_in_any_runs() -> None:
    logits = torch.randn(5, 3, 2, 2, requires_grad=True)
    factors = torch.arange(5.0)[:, None, None, None]
    wanted = (logits**3 * factors).sum()
    (wanted_gradient,) = torch.autograd.grad(2 * wanted, logits)
    for at_once in (1, 2, 5, 9):
        got = sum_over_images(lambda z, images: (z**3 * factors[images]).sum(), logits, at_once)
        (gradient,) = torch.autograd.grad(2 * got, logits)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradient, wanted_gradient)
    with torch.no_grad():
        assert not sum_over_images(lambda z, _: z.sum(), logits, 2).requires_grad


def test_autocast_lowers_no_precision() -> None:
    logits, label, weights, _ = (torch.from_numpy(a) for a in scene(4))
    logits = logits.float().requires_grad_()
    plain = [cross_entropy(logits, label, weights), focal_sum(logits, label, weights, 2.0)]
    with torch.autocast("cpu", torch.bfloat16):
        lowered = [cross_entropy(logits, label, weights), focal_sum(logits, label, weights, 2.0)]
    assert plain == lowered


def test_median_frequency_weights() -> None:
    assert median_frequency_weights([800, 100, 0, 50]) == [0.125, 1.0, 1.0, 2.0]
    assert median_frequency_weights([0, 0]) == [1.0, 1.0]


def test_enet_weights_are_the_papers_and_finite_for_absent_classes() -> None:
    weights = enet_weights([750, 250, 0])
    assert weights == pytest.approx([1 / np.log(1.77), 1 / np.log(1.27), 1 / np.log(1.02)])
    assert all(np.isfinite(enet_weights([0, 0])))


def test_the_kernel_takes_neither_many_classes_nor_a_machine_that_can_not_run_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnCuda:
        is_cuda = True

        def __init__(self, classes: int) -> None:
            self.shape = (1, classes, 4, 4)

    answers: list[Any] = []
    monkeypatch.setattr(losses, "kernels_run", lambda: answers.append(1) or True)
    assert losses.by_kernel(OnCuda(19)) and losses.by_kernel(OnCuda(losses.MOST_CLASSES))  # type: ignore[arg-type]
    assert not losses.by_kernel(OnCuda(losses.MOST_CLASSES + 1))  # type: ignore[arg-type]
    assert len(answers) == 2 and not losses.by_kernel(torch.zeros(1, 3, 4, 4)) and len(answers) == 2
    monkeypatch.setattr(losses, "kernels_run", lambda: False)
    assert not losses.by_kernel(OnCuda(19))  # type: ignore[arg-type]


def test_many_images_at_once_or_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, 4, 6, generator=draw)
    label = torch.randint(0, 7, (5, 16, 24), dtype=torch.uint8, generator=draw)
    pixel_weights = torch.rand(5, 16, 24, generator=draw)
    made = []
    for elements in (1 << 26, 7 * 16 * 24 * 2, 1):
        monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", elements)
        x = logits.clone().requires_grad_()
        total = losses.cross_entropy_sum(x, label, torch.linspace(1, 2, 7), 0.1, pixel_weights)
        made.append((total, *torch.autograd.grad(total, x)))
    for others in made[1:]:
        for a, b in zip(others, made[0], strict=True):
            torch.testing.assert_close(a, b)
