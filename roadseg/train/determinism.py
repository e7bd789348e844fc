"""Deterministic training: the same bits in every run on one GPU, also after a resume.

What differs on CUDA between two runs of a training step, and how it is avoided:

| operation | why | here |
|---|---|---|
| convolutions | cuDNN may add by atomics; its benchmark picks by timing | deterministic algorithms, no benchmark |
| matrix products | cuBLAS splits sums by the workspace that is free | a fixed CUBLAS_WORKSPACE_CONFIG |
| gradient of F.interpolate | adds by atomics | matrix products (model/resize.py, losses/pixel.py) |
| nll_loss, reduced | adds by atomics | summed outside (losses/pixel.py) |
| scatter_add, index_put, index_add, gather's gradient, cumsum | atomics, scans in any order | PyTorch's slower forms |
| torch.compile | picks kernels by timing | PyTorch makes Inductor choose without it; the stage compiles only if asked |
| bincount, argmax, max_pool2d of labels | whole numbers, or no gradient | are deterministic |
| kernels of our own | | no atomic additions (pixel_kernel.py, gpu_kernel.py) |

Operations without a deterministic form raise: see the documentation of torch.use_deterministic_algorithms. This
holds for one machine: another GPU, driver or PyTorch may round differently. Between GPUs, NCCL sums in the
same order as long as their number and links are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from roadseg.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # as PyTorch's notes on reproducibility have it: 24 MiB


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, PyTorch computes the same bits on CUDA in every run; no effect if not `enabled`.

    Enter it before the first matrix product on CUDA of this process: PyTorch reads cuBLAS's environment variable only
    once. Raises ConfigError if an operation has no deterministic form.
    """
    if not enabled:
        yield
        return
    workspace, cudnn = os.environ.get(CUBLAS), torch.backends.cudnn
    filled: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, filled.fill_uninitialized_memory
    os.environ.setdefault(CUBLAS, WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    filled.fill_uninitialized_memory = False  # it is for debugging reads of uninitialized memory
    try:
        yield
    except RuntimeError as e:
        if "deterministic" not in str(e):
            raise
        raise ConfigError(
            f"an operation of this network has no deterministic form ({str(e).splitlines()[0]})",
            where="training.deterministic",
            todo="set it to false, or choose another model.backbone or loss",
        ) from e
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic, filled.fill_uninitialized_memory = flags
        if workspace is None:
            os.environ.pop(CUBLAS, None)
