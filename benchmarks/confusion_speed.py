"""Time of one confusion matrix at 2048x1024, 19 classes: roadseg compared with the usual implementations.

    python benchmarks/confusion_speed.py

Each implementation is checked for equal results before it is timed; scikit-learn runs if installed.
Prints the median of 15 runs (of 3 for those that take over half a second).
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch

from roadseg.labels import IGNORE
from roadseg.metrics.confusion import confusion

K = 19


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A label map of blobs with 4 % void, and a prediction wrong on about 10 % of the pixels, mostly at edges."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.random((17, 33)).astype(np.float32), (2048, 1024), interpolation=cv2.INTER_CUBIC)
    label = np.clip(coarse * K, 0, K - 1).astype(np.uint8)
    prediction = np.roll(label, (3, 7), (0, 1))
    noise = rng.random(label.shape) < 0.03
    prediction[noise] = rng.integers(0, K, int(noise.sum()), dtype=np.uint8)
    label[-40:] = IGNORE
    return label, prediction


def python_loops(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    table = [[0] * K for _ in range(K)]
    for row_t, row_p in zip(label.tolist(), prediction.tolist(), strict=True):
        for t, p in zip(row_t, row_p, strict=True):
            if t != IGNORE:
                table[t][p] += 1
    return np.array(table)


def class_by_class(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    masks = [prediction == p for p in range(K)]
    return np.array([[np.count_nonzero((label == t) & m) for m in masks] for t in range(K)])


def add_at(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    table = np.zeros((K, K), np.int64)
    valid = label != IGNORE
    np.add.at(table, (label[valid], prediction[valid]), 1)
    return table


def bincount_int64(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    valid = label != IGNORE
    return np.bincount(label[valid].astype(np.int64) * K + prediction[valid], minlength=K * K).reshape(K, K)


def bincount_uint16(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    joint = label.astype(np.uint16) << 8
    joint |= prediction
    return np.bincount(joint.ravel(), minlength=65536).reshape(256, 256)[:K, :K]


def torch_bincount(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    t, p = torch.from_numpy(label), torch.from_numpy(prediction)
    valid = t != IGNORE
    return torch.bincount(t[valid].long() * K + p[valid], minlength=K * K).reshape(K, K).numpy()


def scikit_learn(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    from sklearn.metrics import confusion_matrix

    valid = label != IGNORE
    return confusion_matrix(label[valid], prediction[valid], labels=range(K))


def roadseg_confusion(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    return confusion(label, prediction, K)


def median_ms(way: Callable[[np.ndarray, np.ndarray], np.ndarray], label: np.ndarray, prediction: np.ndarray) -> float:
    times: list[float] = []
    while len(times) < (3 if times and times[0] > 0.5 else 15):
        start = time.perf_counter()
        way(label, prediction)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    label, prediction = scene()
    reference = python_loops(label, prediction)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; numpy {np.__version__},")
    print(f"OpenCV {cv2.__version__}, torch {torch.__version__}; 2048x1024, {K} classes, median ms")
    ways = (roadseg_confusion, bincount_uint16, bincount_int64, torch_bincount, add_at, class_by_class, scikit_learn)
    for way in (*ways, python_loops):
        try:
            assert np.array_equal(way(label, prediction), reference), f"{way.__name__} counts differently"
        except ImportError:
            print(f"{way.__name__:18} not installed")
            continue
        print(f"{way.__name__:18} {median_ms(way, label, prediction):9.2f}")


if __name__ == "__main__":
    main()
