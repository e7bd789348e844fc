"""IoU and accuracy from a confusion matrix: by class, by category and averaged.

A class is *present* when at least one valid pixel of the truth has it. The scores of an absent class are None and
are left out of the means, even where the network predicted it. So the averaged classes depend on the data alone,
and two models scored on the same images are averaged over the same classes. Its false positives still count, as
misses of the classes they cover.

cityscapesScripts differs in that case: it leaves a class out only if it is neither in the truth nor predicted,
and scores an absent but predicted class as 0. `absent_predicted` lists those, so its mean follows exactly:
miou * present / (present + len(absent_predicted)). On data with every class, such as Cityscapes val, both agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from roadseg.errors import UsageError
from roadseg.labels import LabelSet


def scores(confusion: np.ndarray, label_set: LabelSet) -> dict[str, Any]:
    """The scores of `confusion` (int64 [K, K], rows truth), as plain JSON values in 0..1.

    miou: mean over the present classes of TP / (TP + FP + FN), each summed over all pixels of the set (not a mean
    over images). pixel_accuracy: right pixels / valid pixels. mean_accuracy: mean of the class accuracies.
    class_iou, class_accuracy: {name: value, None when absent}; accuracy of a class is TP / (TP + FN), its recall.
    category_iou: {category: value, None when absent} with the classes of a category merged, confusions inside it
    being right; {} where the set has no categories. pixels: valid pixels. absent_predicted: {name: pixels predicted}
    of absent classes that were predicted. Without any valid pixel the three averages are None.
    Raises UsageError when the matrix doesn't fit the label set.
    """
    k = label_set.num_classes
    if confusion.shape != (k, k) or not np.issubdtype(confusion.dtype, np.integer):
        raise UsageError(
            f"a confusion matrix {confusion.dtype} {list(confusion.shape)}",
            expected=f"integers [{k}, {k}] for the {k} classes of the label set {label_set.name}",
        )
    # Python integers: no overflow, and each score is one correctly rounded division.
    right = [int(n) for n in np.diagonal(confusion)]
    truth = [int(n) for n in confusion.sum(axis=1)]
    predicted = [int(n) for n in confusion.sum(axis=0)]
    names = label_set.names
    class_iou = {n: _iou(right[i], truth[i], predicted[i]) for i, n in enumerate(names)}
    class_accuracy = {n: right[i] / truth[i] if truth[i] else None for i, n in enumerate(names)}
    category_iou = {}
    for category, ids in label_set.categories.items():
        inside = int(confusion[np.ix_(ids, ids)].sum())
        category_iou[category] = _iou(inside, sum(truth[i] for i in ids), sum(predicted[i] for i in ids))
    pixels = sum(truth)
    return {
        "miou": _mean(class_iou),
        "pixel_accuracy": sum(right) / pixels if pixels else None,
        "mean_accuracy": _mean(class_accuracy),
        "class_iou": class_iou,
        "class_accuracy": class_accuracy,
        "category_iou": category_iou,
        "pixels": pixels,
        "absent_predicted": {n: predicted[i] for i, n in enumerate(names) if predicted[i] and not truth[i]},
    }


def _iou(right: int, truth: int, predicted: int) -> float | None:
    return right / (truth + predicted - right) if truth else None


def _mean(values: dict[str, float | None]) -> float | None:
    present = [v for v in values.values() if v is not None]
    return sum(present) / len(present) if present else None
