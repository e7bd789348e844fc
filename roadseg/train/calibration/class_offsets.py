"""Fit an offset for each class's logit that maximizes mIoU, after training.

The most likely class gives the best pixel accuracy. Mean IoU counts a rare class as much as road, so its best decision
is another one: the largest logit after adding an offset for each class (Koyejo et al., "Consistent Binary
Classification with Generalized Performance Metrics", 2014, for two classes; Narasimhan et al., "Consistent Multiclass
Algorithms for Complex Performance Measures", 2015). A loss that follows IoU is no exception: trained with
Lovász-softmax, CamVid's network left out four poles of five on val (docs/experiments.md).

The offsets are added to the classifier's bias, so that network and graph need nothing new. Code that needs
probabilities subtracts them again (Release.class_offsets), because they make probabilities wrong.

Shapes: N pixels, K classes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roadseg.data.shards.index import Split
from roadseg.errors import RoadsegError
from roadseg.files import write_json
from roadseg.labels import LabelSet
from roadseg.metrics.confusion import confusion
from roadseg.metrics.iou import scores
from roadseg.model.deeplab import DeepLabV3Plus
from roadseg.progress import progress
from roadseg.train.calibration.sampled_pixels import sampled_pixels
from roadseg.train.checks.memory_errors import first_line, is_out_of_memory
from roadseg.train.distributed.process_group import ALONE
from roadseg.train.validation import validate

FRAMES, PIXELS_A_FRAME = 200, 8000
MOST_LOGITS = 50_000_000  # N x K: 200 MB
CANDIDATES = 255  # offsets tried per class and round
ROUNDS = 6
NEGLIGIBLE = 1e-5  # of mIoU, which is in 0..1
LEAST_GAIN = 1e-4  # least gain of mIoU on frames that the offsets were not fitted to
log = logging.getLogger(__name__)


def add_class_offsets(
    network: DeepLabV3Plus,
    frames: Split,
    validation: Mapping[str, Split],
    label_set: LabelSet,
    bf16: bool,
    path: Path,
) -> dict[str, float]:
    """Fit offsets on `frames` and add them to `network`, in place. Returns {class: offset} for offsets other than 0.

    network: for inference, on the device that runs it, in bf16 if asked. frames: of train, of which at most FRAMES are
    used: offsets are fitted to every second one, and kept only if mIoU on the others rises by LEAST_GAIN. Writes to
    `path` the mIoU before and after on those others, and after on each split of `validation`, which does not affect
    the fit.
    """
    if len(frames) < 2 or label_set.num_classes < 2:
        log.warning("class offsets: none, which takes two classes, and two frames of train: to fit to and to judge by")
        return {}
    run, device = network, network.mean.device
    try:
        offsets_K, before, after = _fitted(run, frames, label_set, device, bf16)
    except (RuntimeError, MemoryError) as e:  # a finished training must not fail because of this
        if not is_out_of_memory(e):
            raise
        log.warning("no memory on %s for class offsets: they are fitted on the CPU", device)
        device, bf16 = torch.device("cpu"), False
        run = copy.deepcopy(network).to(device)
        try:
            offsets_K, before, after = _fitted(run, frames, label_set, device, bf16)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise RoadsegError(
                f"no memory for class offsets ({first_line(e)})",
                where="training.class_offsets",
                todo="run again with more free memory: the training is finished and continues from here",
            ) from e
    if after <= before + LEAST_GAIN:
        log.info("class offsets: none, as they gain nothing on frames of train that they were not fitted to")
        offsets_K = np.zeros_like(offsets_K)
    add_to_logits(network, offsets_K)
    if run is not network:
        add_to_logits(run, offsets_K)
    offsets = {name: round(float(x), 4) for name, x in zip(label_set.names, offsets_K, strict=True) if x}
    found: dict[str, Any] = {"offsets": offsets, "train": {"before": before, "after": after}, "miou": {}}
    if offsets:
        listing = ", ".join(f"{name} {x:+.2f}" for name, x in sorted(offsets.items(), key=lambda item: -abs(item[1])))
        log.info("class offsets: %s", listing)
        log.info("... mIoU of frames of train that they were not fitted to: %.4f, was %.4f", after, before)
        for name, split in validation.items():
            matrix = validate(run, split, label_set.num_classes, device, bf16, int, ALONE)
            assert matrix is not None  # nobody stops it
            found["miou"][name] = scores(matrix.numpy(), label_set)["miou"]
            log.info("... %s mIoU %.4f", name, found["miou"][name] or 0.0)
    write_json(path, found)
    return offsets


def add_to_logits(network: DeepLabV3Plus, offsets_K: np.ndarray) -> None:
    """Add offsets to the classifier's bias, in place."""
    bias = network.decoder.classifier.bias
    assert bias is not None
    bias.data += torch.from_numpy(offsets_K).to(bias)


def _fitted(
    network: DeepLabV3Plus, frames: Split, label_set: LabelSet, device: torch.device, bf16: bool
) -> tuple[np.ndarray, float, float]:
    """(offsets, float32 [K]; mIoU without them, with them, on the frames that they were not fitted to)."""
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)
    pixels = max(1, min(PIXELS_A_FRAME, MOST_LOGITS // (label_set.num_classes * len(chosen))))

    def pixels_of(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits_NK, labels_N = sampled_pixels(network, frames, some, pixels, device, bf16, bar.update)
        return logits_NK.numpy(), labels_N.numpy()

    with progress(len(chosen), "class offsets", "frame") as bar:
        offsets_K = fit_offsets(*pixels_of(chosen[::2]), label_set)
        logits_NK, labels_N = pixels_of(chosen[1::2])
    before, after = (_miou(logits_NK + offset_K, labels_N, label_set) for offset_K in (0 * offsets_K, offsets_K))
    return offsets_K, before, after


def fit_offsets(logits_NK: np.ndarray, labels_N: np.ndarray, label_set: LabelSet) -> np.ndarray:
    """float32 [K]: offsets that raise the mIoU of argmax(logits + offsets), found class by class until none helps.

    Each change is the smallest that reaches the best score. 0 for classes without a pixel.
    """
    offsets_K = np.zeros(label_set.num_classes, np.float32)
    reached = _miou(logits_NK, labels_N, label_set)
    held, pixels = np.unique(labels_N, return_counts=True)
    for _ in range(ROUNDS):
        before = reached
        for k in held[np.argsort(pixels, kind="stable")]:  # the rarest class first, as it needs the largest change
            changed_K = offsets_K.copy()
            changed_K[k] += _rise(logits_NK + offsets_K, labels_N, int(k))
            # Count again: candidates are compared by pixel counts, and two logits may be equal.
            if (miou := _miou(logits_NK + changed_K, labels_N, label_set)) > reached + NEGLIGIBLE:
                offsets_K, reached = changed_K, miou
        if reached - before <= NEGLIGIBLE:
            break
    return offsets_K


def _rise(logits_NK: np.ndarray, labels_N: np.ndarray, k: int) -> float:
    """The change of class k's offset that gives the best mIoU over the classes in the labels; 0 if none helps.

    Class k occurs in the labels. Candidates are CANDIDATES gaps of k's own pixels and as many of all pixels; with few
    pixels, all of them. A pixel becomes k if the change exceeds its gap, the largest other logit minus k's. So all
    candidates are scored from counts of pixels by their gap.
    """
    classes = logits_NK.shape[1]
    others_NK = logits_NK.copy()
    others_NK[:, k] = -np.inf
    other_N = others_NK.argmax(1)
    gap_N = np.take_along_axis(others_NK, other_N[:, None], 1)[:, 0] - logits_NK[:, k]
    shares = np.linspace(0, 1, CANDIDATES)
    gaps = [np.quantile(some_N, shares, method="nearest") for some_N in (gap_N[labels_N == k], gap_N)]
    above = 1e-5 * float(np.subtract(*np.quantile(gap_N, [0.75, 0.25])))  # a gap, to win that pixel
    candidates_C = np.unique([float(gap_N.min()) - above, *(np.concatenate(gaps) + above), 0.0])
    # The first candidate that a pixel's gap is below: from that one on it is of class k.
    first_N = np.searchsorted(candidates_C, gap_N, side="right")

    def taken(of_N: np.ndarray) -> np.ndarray:
        """int64 [C, K]: of some pixels, how many candidate c gives to k, by what they would be otherwise."""
        joint = first_N[of_N] * classes + other_N[of_N]
        counts = np.bincount(joint, minlength=(len(candidates_C) + 1) * classes)
        return counts.reshape(-1, classes)[:-1].cumsum(0)

    truth_K = np.bincount(labels_N, minlength=classes)
    everywhere = np.ones(len(labels_N), bool)
    taken_CK, right_taken_CK = taken(everywhere), taken(labels_N == other_N)
    predicted_CK = np.bincount(other_N, minlength=classes) - taken_CK
    right_CK = np.bincount(other_N[labels_N == other_N], minlength=classes) - right_taken_CK
    predicted_CK[:, k] = taken_CK.sum(1)
    right_CK[:, k] = taken(labels_N == k).sum(1)
    held = truth_K > 0
    iou_CK = right_CK[:, held] / (truth_K + predicted_CK - right_CK)[:, held]
    miou_C = iou_CK.mean(1)
    near = miou_C >= miou_C.max() - NEGLIGIBLE
    return float(min(candidates_C[near], key=abs))


def _miou(logits_NK: np.ndarray, labels_N: np.ndarray, label_set: LabelSet) -> float:
    if not len(labels_N):
        return 0.0
    label_1N, prediction_1N = (ids_N.astype(np.uint8)[None] for ids_N in (labels_N, logits_NK.argmax(1)))
    return float(scores(confusion(label_1N, prediction_1N, label_set.num_classes), label_set)["miou"])
