"""Whether this machine can run our own GPU kernels."""

from __future__ import annotations

import logging
import subprocess
from functools import cache

log = logging.getLogger(__name__)


@cache
def kernels_run() -> bool:
    """Tries one. Triton may be missing, or find no C compiler to build its launcher with; it is said once."""
    try:
        from roadseg.data.augment import gpu_kernel

        if gpu_kernel.probe("cuda"):
            return True
        why = "a kernel wrote nothing"
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    log.warning("training on the GPU is slower than it could be: Triton kernels don't run here (%s)", why)
    return False
