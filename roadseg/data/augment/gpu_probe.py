"""Check whether this machine can run Triton kernels."""

from __future__ import annotations

import logging
import subprocess
from functools import cache

log = logging.getLogger(__name__)


@cache
def kernels_run() -> bool:
    """Run a minimal kernel, once per process. Triton may be missing, or may find no C compiler for its launcher."""
    try:
        from roadseg.data.augment import gpu_kernel

        if gpu_kernel.probe("cuda"):
            return True
        reason = "a kernel wrote a wrong result"
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    log.warning("Triton kernels do not run here, so training on the GPU is slower (%s)", reason)
    return False
