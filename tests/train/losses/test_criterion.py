from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from roadseg.labels import IGNORE
from roadseg.model.deeplab import TrainingOutput
from roadseg.train.losses.criterion import Criterion, Terms
from roadseg.train.losses.hard_pixels import hardest, near_another_class
from roadseg.train.losses.pixel import cross_entropy, focal_sum, plain_cross_entropy_sum
from roadseg.train.losses.region import lovasz_softmax, region_mutual_information, soft_dice, truth_on_grid

NONE = Terms(cross_entropy=0.0)
TERMS = [f.name for f in fields(Terms)]
PIXEL_TERMS = ["cross_entropy", "focal", "boundary"]
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0])
K = 4


def only(name: str, weight: float = 1.0) -> Terms:
    return Terms(**{"cross_entropy": 0.0, name: weight})


def criterion(main: Terms, auxiliary: Terms = NONE, weights: Tensor | None = WEIGHTS) -> Criterion:
    return Criterion(
        main=main,
        auxiliary=auxiliary,
        auxiliary_weight=0.4,
        class_weights_K=weights,
        label_smoothing=0.1,
        ohem_threshold=0.3,
        ohem_keep=0.25,
        focal_gamma=2.0,
        boundary_px=2,
    )


def loss(c: Criterion, output: Tensor | TrainingOutput, label: Tensor, parts: int = 1) -> Tensor:
    return c(output, label, c.counts(label), parts)


def scene(seed: int, images: int = 2) -> tuple[Tensor, Tensor]:
    """Logits [images, K, 16, 14] and labels [images, 64, 56] of blocks and void; class 3 occurs nowhere."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, 3, (images, 8, 7)), np.ones((1, 8, 8))).astype(np.uint8)
    label[0, :12] = IGNORE
    return torch.from_numpy(rng.normal(size=(images, K, 16, 14))).float(), torch.from_numpy(label)


def test_each_term_is_the_mean_it_says() -> None:
    logits, label = scene(0)
    valid = label != IGNORE
    weight_of = torch.where(valid, WEIGHTS[torch.where(valid, label, 0).long()], 0.0)
    truth = truth_on_grid(label, 16, 14, K)
    near, hard = near_another_class(label, 2), hardest(logits, label, 0.3, 0.25)
    wanted = {
        "cross_entropy": cross_entropy(logits, label, WEIGHTS, 0.1),
        "focal": focal_sum(logits, label, WEIGHTS, 2.0) / weight_of.sum(),
        "boundary": plain_cross_entropy_sum(logits, label, WEIGHTS, 0.1, near) / (weight_of * near).sum(),
        "ohem": plain_cross_entropy_sum(logits, label, WEIGHTS, 0.1, hard) / (weight_of * hard).sum(),
        "lovasz": lovasz_softmax(logits.softmax(1), truth),
        "dice": soft_dice(logits.softmax(1), truth),
        "rmi": region_mutual_information(logits, truth, 4.0),
    }
    assert sorted(wanted) == sorted(TERMS)
    for name, value in wanted.items():
        assert value > 0
        torch.testing.assert_close(loss(criterion(only(name)), logits, label), value, rtol=1e-5, atol=1e-6)
    every = Terms(**{name: 0.1 * (i + 1) for i, name in enumerate(TERMS)})
    weighted = sum(getattr(every, name) * value for name, value in wanted.items())
    torch.testing.assert_close(loss(criterion(every), logits, label), weighted, rtol=1e-5, atol=1e-6)


def test_heads_have_their_own_terms() -> None:
    logits, label = scene(1)
    coarse, coarser = logits[:, :, ::2, ::2] * 2, logits[:, :, ::4, ::4] * 3
    got = loss(criterion(only("dice"), Terms(0.5, lovasz=2.0)), TrainingOutput(logits, (coarse, coarser)), label)
    wanted = loss(criterion(only("dice")), logits, label)
    for head in (coarse, coarser):
        wanted = wanted + 0.4 * loss(criterion(Terms(0.5, lovasz=2.0)), head, label)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", PIXEL_TERMS)
def test_parts_add_up_to_the_whole_batch(name: str) -> None:
    logits, label = scene(2, images=4)
    label[:2, 25:] = IGNORE  # parts of unequal counts, one image of void alone
    label[3] = IGNORE
    whole_logits, part_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    c = criterion(only(name))
    whole = loss(c, whole_logits, label)
    total = torch.stack([c.counts(x) for x in label.split(1)]).sum(0)
    parts = [c(z, x, total, 4) for z, x in zip(part_logits.split(1), label.split(1), strict=True)]
    torch.testing.assert_close(sum(parts, torch.zeros(())), whole, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(v, z)[0] for v, z in ((whole, whole_logits), (sum(parts), part_logits))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(TERMS) - set(PIXEL_TERMS)))
def test_terms_of_whole_batches_are_meant_over_parts(name: str) -> None:
    logits, label = scene(3, images=4)
    c = criterion(only(name))
    total = c.counts(label)
    parts = [c(z, x, total, 2) for z, x in zip(logits.split(2), label.split(2), strict=True)]
    alone = [loss(c, z, x) for z, x in zip(logits.split(2), label.split(2), strict=True)]
    torch.testing.assert_close(sum(parts, torch.zeros(())), sum(alone, torch.zeros(())) / 2)


def labels(kind: str, label: Tensor) -> Tensor:
    if kind == "void":
        return torch.full_like(label, IGNORE)
    if kind == "one class":
        return torch.full_like(label, 2)
    if kind == "one pixel":
        alone = torch.full_like(label, IGNORE)
        alone[0, 30, 30] = 1
        return alone
    return label


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kind", ["void", "one class", "one pixel", "absent classes"])
@pytest.mark.parametrize("extreme", [False, True])
def test_finite_whatever_the_batch(name: str, kind: str, extreme: bool) -> None:
    logits, label = scene(4)
    label = labels(kind, label)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        z = (logits.sign() * 65504 if extreme else logits).to(dtype).requires_grad_()
        value = loss(criterion(only(name)), z, label)
        (gradient,) = torch.autograd.grad(value, z)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert value.isfinite() and gradient.isfinite().all()
        if kind == "void":
            assert value == 0 and not gradient.any()
        elif not extreme and name not in ("boundary", "rmi"):
            assert value > 0 and gradient.any()


@pytest.mark.parametrize("name", TERMS)
def test_same_numbers_every_time(name: str) -> None:
    logits, label = scene(5)
    logits.requires_grad_()
    runs = [loss(criterion(only(name)), logits, label) for _ in range(2)]
    gradients = [torch.autograd.grad(value, logits)[0] for value in runs]
    assert torch.equal(*runs) and torch.equal(*gradients)


def test_autocast_lowers_no_precision() -> None:
    logits, label = scene(6)
    logits.requires_grad_()
    c = criterion(Terms(*[1.0] * len(TERMS)))
    plain = loss(c, logits, label)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(c, logits, label), plain)


@pytest.mark.parametrize("name", TERMS)
def test_learning_by_any_term_finds_the_labels(name: str) -> None:
    _, label = scene(7)
    logits = torch.zeros(2, K, 16, 14).normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.3)
    c = criterion(only(name), weights=None)
    truth = truth_on_grid(label, 16, 14, K)

    def right() -> float:
        return float((logits.detach().softmax(1) * truth).sum() / truth.sum())

    before, first = right(), float(loss(c, logits, label).detach())
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(c, logits, label)
        value.backward()
        optimizer.step()
    assert float(value.detach()) < first
    if name != "rmi":  # information is blind to sign: alone it may learn to tell a class by its lack
        assert right() > before + 0.1


@pytest.mark.parametrize("name", TERMS)
def test_nothing_depends_on_values(name: str) -> None:
    """Tensors without data raise where a value is asked for or decides a shape: what a CUDA graph can't hold."""
    logits, label = scene(8)
    c = criterion(only(name))
    loss(c, logits, label)  # the matrices of upsample() are made once
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, label = mode.from_tensor(logits).requires_grad_(), mode.from_tensor(label)
        value = loss(c, logits, label)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.shape == () and gradient.shape == logits.shape
        with pytest.raises(DataDependentOutputException):
            float(value.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("name", TERMS)
def test_a_cuda_graph_holds_it(name: str) -> None:
    device = torch.device("cuda")
    c = criterion(only(name), only(name), WEIGHTS.to(device))
    scenes = [scene(seed, images=3) for seed in (8, 9)]
    logits, label = (x.to(device) for x in scenes[0])
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(c, TrainingOutput(logits, (logits[:, :, ::2, ::2],)), label)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for new_logits, new_label in scenes:
        with torch.no_grad():
            logits.copy_(new_logits)
            label.copy_(new_label)
        graph.replay()
        on_cpu = new_logits.clone().requires_grad_()
        plain = loss(criterion(only(name), only(name)), TrainingOutput(on_cpu, (on_cpu[:, :, ::2, ::2],)), new_label)
        torch.testing.assert_close(held[0].cpu(), plain.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held[1].cpu(), torch.autograd.grad(plain, on_cpu)[0], rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TERMS)
def test_same_bits_on_cuda_in_deterministic_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("roadseg.train.losses.pixel.kernels_run", lambda: False)
    device = torch.device("cuda")
    c = criterion(only(name), weights=WEIGHTS.to(device))
    logits, label = (x.to(device) for x in scene(10, images=8))
    logits.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [loss(c, logits, label) for _ in range(2)]
        gradients = [torch.autograd.grad(value, logits)[0] for value in runs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs) and torch.equal(*gradients)
