import itertools

import numpy as np
import pytest
import torch

from roadseg.labels import IGNORE
from roadseg.train.losses.region import (
    CELL_PX,
    RIDGE,
    lovasz_softmax,
    region_mutual_information,
    soft_dice,
    truth_on_grid,
)


def one_hot(label: np.ndarray, k: int) -> torch.Tensor:
    return torch.from_numpy((label[:, None] == np.arange(k)[:, None, None]).astype(np.float32))


def random_p(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    z = np.random.default_rng(seed).normal(size=shape)
    return torch.softmax(torch.from_numpy(2 * z), dim=1)


def jaccard_loss(truth: np.ndarray, wrong: np.ndarray) -> float:
    """1 - |truth & predicted| / |truth | predicted| where the cells `wrong` are predicted wrongly."""
    predicted = truth ^ wrong
    either = (truth | predicted).sum()
    return 1 - (truth & predicted).sum() / either if either else 0.0


def lovasz_extension(truth: np.ndarray, errors: np.ndarray) -> float:
    """The definition: integral over thresholds t of the set function at {errors > t}."""
    levels = np.unique(np.concatenate([[0.0], errors]))
    return sum((b - a) * jaccard_loss(truth, errors > a) for a, b in itertools.pairwise(levels))


def test_lovasz_is_the_extension_of_the_jaccard_loss() -> None:
    label = np.array([[[0, 1, 1, IGNORE], [2, 0, 1, 0], [2, 2, IGNORE, 0]]], np.uint8)
    p = random_p(0, (1, 5, 3, 4))  # classes 3 and 4 are absent
    valid = label != IGNORE
    wanted = [lovasz_extension((label == c)[valid], np.abs((label == c) - p[:, c].numpy())[valid]) for c in range(3)]
    assert float(lovasz_softmax(p, one_hot(label, 5))) == pytest.approx(np.mean(wanted), rel=1e-6)


def test_lovasz_at_one_hot_predictions_is_the_jaccard_loss() -> None:
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 3, (2, 2, 6, 5)).astype(np.uint8)
    wanted = [jaccard_loss(label == c, (label == c) ^ (predicted == c)) for c in range(3)]
    assert float(lovasz_softmax(one_hot(predicted, 3), one_hot(label, 3))) == pytest.approx(np.mean(wanted), rel=1e-6)
    assert float(lovasz_softmax(one_hot(label, 3), one_hot(label, 3))) == 0


def test_dice_as_in_numpy() -> None:
    label = np.random.default_rng(2).integers(0, 3, (2, 4, 5)).astype(np.uint8)
    label[0, :2] = IGNORE
    p = random_p(3, (2, 4, 4, 5))
    wanted, valid = [], label != IGNORE
    for c in range(3):  # class 3 is absent
        q, t = p[:, c].numpy()[valid], (label == c)[valid]
        wanted.append(1 - 2 * (q * t).sum() / (q.sum() + t.sum()))
    assert float(soft_dice(p, one_hot(label, 4))) == pytest.approx(np.mean(wanted), rel=1e-6)


def papers_rmi(p: np.ndarray, truth: np.ndarray, pool: int) -> float:
    """Mean over images of the sum over classes of log det(M) / 2 / 9, from the covariances themselves."""
    total = 0.0
    images, classes, rows, columns = p.shape
    for b, c in np.ndindex(images, classes):
        maps = []
        for source in (p[b, c], truth[b, c]):
            cropped = source[: rows // pool * pool, : columns // pool * pool]
            maps.append(cropped.reshape(rows // pool, pool, columns // pool, pool).mean((1, 3)))
        height, width = maps[0].shape
        samples = np.array(
            [
                np.concatenate([m[y : y + 3, x : x + 3].ravel() for m in maps])
                for y in range(height - 2)
                for x in range(width - 2)
            ]
        )
        cov = np.cov(samples.T, bias=True)
        pp, py, yy = cov[:9, :9] + RIDGE * np.eye(9), cov[:9, 9:], cov[9:, 9:]
        m = yy - py.T @ np.linalg.inv(pp) @ py
        total += np.linalg.slogdet(m + RIDGE * np.eye(9))[1] / 2 / 9
    return total / images


@pytest.mark.parametrize("stride", [4.0, 8.0])
def test_rmi_is_the_papers_formula_but_for_its_constant(stride: float) -> None:
    rng = np.random.default_rng(4)
    label = np.kron(rng.integers(0, 3, (2, 9, 8)), np.ones((1, 3, 3))).astype(np.uint8)
    label[0, :5] = IGNORE
    truth = one_hot(label, 4)
    logits = torch.from_numpy(rng.normal(size=(2, 4, 27, 24)) + 2 * truth.numpy())
    p = torch.softmax(logits, 1).numpy() * (label != IGNORE)[:, None]
    wanted = papers_rmi(p, truth.numpy().astype(float), round(CELL_PX / stride)) - 4 * np.log(RIDGE) / 2
    assert float(region_mutual_information(logits, truth, stride)) == pytest.approx(wanted, rel=1e-7)


def test_rmi_falls_to_its_least_as_the_prediction_becomes_the_truth() -> None:
    label = np.kron(np.random.default_rng(5).integers(0, 3, (1, 8, 8)), np.ones((1, 4, 4))).astype(np.uint8)
    truth = one_hot(label, 4)  # class 3 is absent
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=truth.shape))
    values = [float(region_mutual_information(noise + truth * sure, truth, 4.0)) for sure in (0.0, 4.0, 8.0, 1e3)]
    assert values[0] > values[1] > values[2] > values[3] == pytest.approx(3 * np.log(2) / 2, rel=1e-3)
    assert float(region_mutual_information(truth[..., :5, :5], truth[..., :5, :5], 4.0)) == 0  # no 3x3 cells


@pytest.mark.parametrize("term", ["lovasz", "dice", "rmi"])
def test_gradients(term: str) -> None:
    rng = np.random.default_rng(6)
    label = rng.integers(0, 2, (2, 5, 4)).astype(np.uint8)
    label[1, 3:] = IGNORE
    truth = one_hot(label, 3)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 5, 4))).requires_grad_()

    def loss(z: torch.Tensor) -> torch.Tensor:
        if term == "rmi":
            return region_mutual_information(z, truth, 8.0)
        return {"lovasz": lovasz_softmax, "dice": soft_dice}[term](z.softmax(1), truth)

    assert torch.autograd.gradcheck(loss, logits, rtol=1e-3 if term == "rmi" else 1e-4, atol=1e-5)


def test_the_grid_takes_the_pixel_at_each_cells_centre() -> None:
    label = np.arange(2 * 7 * 9).reshape(2, 7, 9) % 5
    got = truth_on_grid(torch.from_numpy(label), 3, 4, 5).argmax(1).numpy()
    rows = [int((i + 0.5) * 7 / 3) for i in range(3)]
    columns = [int((i + 0.5) * 9 / 4) for i in range(4)]
    np.testing.assert_array_equal(got, label[:, rows][:, :, columns])
    nearest = torch.nn.functional.interpolate(torch.from_numpy(label)[None].float(), (3, 4), mode="nearest-exact")
    np.testing.assert_array_equal(got, nearest[0].numpy())
