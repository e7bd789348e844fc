"""Score of per-pixel classifiers that use only color and position on the rendered town.

Trained on train, scored on val: a small MLP on (R, G, B, x, y), plain and with class weights 1 / sqrt(frequency),
and a histogram (Bayes) over quantized (R, G, B, x, y). If colors revealed the classes, these would score well.

    python benchmarks/town_difficulty.py [--train 200] [--val 60] [--steps 6000]
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np
import torch
from machine import cpu_name

from roadseg.labels import IGNORE, TOWN
from roadseg.town import render
from roadseg.town.tree import places

WIDTH, HEIGHT = 256, 128
COLOUR_BINS, X_BINS, Y_BINS = 10, 6, 16


def pixels(seed: int, split: str, splits: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, 5] of R, G, B, x, y in 0..1, and uint8 [N] train ids, of all pixels that are not void."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    place = np.stack([u / WIDTH, v / HEIGHT], axis=-1)
    inputs, targets = [], []
    for p in places(splits):
        if p.split == split:
            frame = render(seed, p.index, WIDTH, HEIGHT)
            target = TOWN.id_to_train[frame.label_ids]
            kept = target != IGNORE
            inputs.append(np.concatenate([frame.image.astype(np.float32) / 255, place], axis=-1)[kept])
            targets.append(target[kept])
    return np.concatenate(inputs), np.concatenate(targets)


def class_iou(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64 [19]; every class occurs in val, so none is undefined."""
    n = TOWN.num_classes
    matrix = np.bincount(target.astype(np.int64) * n + predicted, minlength=n * n).reshape(n, n)
    hit = np.diag(matrix)
    return hit / (matrix.sum(0) + matrix.sum(1) - hit)


def histogram(train: tuple[np.ndarray, np.ndarray], val_x: np.ndarray) -> np.ndarray:
    bins = np.array([COLOUR_BINS] * 3 + [X_BINS, Y_BINS])

    def cell(x: np.ndarray) -> np.ndarray:
        digits = np.minimum((x * bins).astype(np.int64), bins - 1)
        return np.ravel_multi_index(digits.T, bins)

    n, size = TOWN.num_classes, int(bins.prod())
    counts = np.bincount(cell(train[0]) * n + train[1], minlength=size * n).reshape(size, n)
    prior = np.bincount(train[1], minlength=n) / len(train[1])
    return (counts + prior).argmax(axis=1)[cell(val_x)]


def mlp(train: tuple[np.ndarray, np.ndarray], val_x: np.ndarray, steps: int, balance: float) -> np.ndarray:
    """Predictions of 5-192-192-192-19 units after `steps` steps of 4,096 pixels, the rate falling to 0."""
    torch.manual_seed(0)
    n = TOWN.num_classes
    layers: list[torch.nn.Module] = []
    for a, b in ((5, 192), (192, 192), (192, 192)):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(192, n))
    frequency = np.bincount(train[1], minlength=n) / len(train[1])
    loss = torch.nn.CrossEntropyLoss(torch.tensor(frequency**-balance, dtype=torch.float32))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        pick = rng.integers(0, len(train[1]), 4096)
        x = torch.from_numpy(train[0][pick] * 2 - 1)
        y = torch.from_numpy(train[1][pick].astype(np.int64))
        value = loss(net(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            print(f"  step {step + 1}: loss {value.item():.3f}", flush=True)
    with torch.no_grad():
        return np.concatenate([net(torch.from_numpy(p * 2 - 1)).argmax(1).numpy() for p in np.array_split(val_x, 64)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--val", type=int, default=60)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    cv2.setNumThreads(0)
    print(f"{cpu_name()}; {a.train} train and {a.val} val frames of {WIDTH}x{HEIGHT}, seed {a.seed}", flush=True)
    splits = {"train": a.train, "val": a.val}
    train, (val_x, val_y) = pixels(a.seed, "train", splits), pixels(a.seed, "val", splits)
    scores = {
        "histogram": class_iou(histogram(train, val_x), val_y),
        "MLP": class_iou(mlp(train, val_x, a.steps, 0.0), val_y),
        "MLP, weighed": class_iou(mlp(train, val_x, a.steps, 0.5), val_y),
    }
    print(f"{'class':16s}" + "".join(f"{name:>14s}" for name in scores))
    for k, name in enumerate(TOWN.names):
        print(f"{name:16s}" + "".join(f"{s[k]:14.3f}" for s in scores.values()))
    print(f"{'mIoU':16s}" + "".join(f"{s.mean():14.3f}" for s in scores.values()))


if __name__ == "__main__":
    main()
