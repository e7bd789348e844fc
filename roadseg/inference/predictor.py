"""Predict label maps with a release through onnxruntime. Needs neither torch nor a stage.

Shapes: B images, K classes, h w the network's output, H W the image.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from roadseg.errors import ArchiveError, ImageError
from roadseg.inference.upsample import upsample_argmax
from roadseg.labels import LabelSet
from roadseg.processes import cores
from roadseg.release.archive import Release


class Predictor:
    """Scores images with a release. Safe to call from several threads.

    threads: of the runtime; 0 means one per core. Raises ArchiveError when the runtime rejects the graph, or
    the graph does not map `image` to `logits` of the release's classes.
    """

    def __init__(self, release: Release, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(release.onnx, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's exception classes can't be imported
            raise ArchiveError(f"onnxruntime rejected the graph ({e})", where=release.digest) from e
        self.release = release
        self._check()

    def _check(self) -> None:
        where = f"release {self.release.digest[:12]}"
        takes, gives = self._session.get_inputs(), self._session.get_outputs()
        names = [v.name for v in takes], [v.name for v in gives]
        if names != (["image"], ["logits"]):
            found = f"its graph takes {', '.join(names[0])} and gives {', '.join(names[1])}"
            raise ArchiveError(found, expected="image and logits", where=where)
        shape, classes = gives[0].shape, self.label_set.num_classes
        if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != classes):
            found = f"its graph gives logits of {shape[1] if len(shape) == 4 else 'no'} classes"
            raise ArchiveError(found, expected=f"{classes}, those of its label set", where=where)

    @property
    def label_set(self) -> LabelSet:
        return self.release.label_set

    @property
    def runtime(self) -> str:
        return f"onnxruntime {ort.__version__} CPU"

    def logits(self, image: np.ndarray) -> np.ndarray:
        """float32 [K, h, w] of one uint8 RGB image [H, W, 3]. Raises ImageError for another array."""
        if not isinstance(image, np.ndarray):
            raise ImageError(f"a {type(image).__name__}", expected="a NumPy array: uint8 RGB [H, W, 3]")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"an array of {image.dtype} {list(image.shape)}", expected="an image: uint8 RGB [H, W, 3]")
        batch_B3HW = np.ascontiguousarray(image.transpose(2, 0, 1))[None]
        return self._session.run(["logits"], {"image": batch_B3HW})[0][0]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Train ids, uint8 [H, W], of one uint8 RGB image [H, W, 3] of any size. Raises as `logits` does."""
        logits = self.logits(image)
        height, width = image.shape[:2]
        return upsample_argmax(logits, height, width)
