"""Measure the latency of an inference on this machine, and describe the machine."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import nn

from roadseg.processes import cores
from roadseg.progress import progress

_WARM_UP = {"cuda": 10}  # runs; elsewhere 2
ENOUGH_S, LEAST_RUNS = 20.0, 5
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch, image to logits, by percentile of the runs; images/s is of the median.

    peak_bytes: what PyTorch's allocator had in use at most beyond the weights, on CUDA; else None.
    """

    runtime: str
    threads: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def torch_latency(
    network: nn.Module, image_BHW: tuple[int, int, int], device: torch.device, bf16: bool, runs: int
) -> Latency:
    """PyTorch without compilation, channels last, the image on the device already. `network` stays as it is."""
    network = copy.deepcopy(network).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.from_numpy(_images(image_BHW)).to(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0

    def once() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            network(batch)
        if cuda:
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    name = f"torch {torch.__version__} eager, {device}, {'bf16' if bf16 else 'fp32'}"
    times = _times(once, runs, _WARM_UP.get(device.type, 2), name)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    return _latency(name, torch.get_num_threads(), times, image_BHW[0], peak)


def onnx_latency(graph: bytes, image_BHW: tuple[int, int, int], threads: int, runs: int) -> Latency:
    """onnxruntime on the CPU. graph: an ONNX file from uint8 `image` to `logits`; threads: 0 for one a core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {"image": _images(image_BHW)}
    name = f"onnxruntime {onnxruntime.__version__}, cpu, fp32"
    times = _times(lambda: session.run(["logits"], feed), runs, 2, name)
    return _latency(name, options.intra_op_num_threads, times, image_BHW[0])


def _images(image_BHW: tuple[int, int, int]) -> np.ndarray:
    batch, height, width = image_BHW
    return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


def _times(once: Callable[[], Any], runs: int, warm_up: int, what: str) -> np.ndarray:
    """Seconds of each of `runs` calls, after warm-up calls in which libraries choose their algorithms.

    At least LEAST_RUNS calls; no more once they took ENOUGH_S.
    """
    for _ in range(warm_up):
        once()
    times: list[float] = []
    with progress(runs, what, "run") as bar:
        while len(times) < runs and (len(times) < LEAST_RUNS or sum(times) < ENOUGH_S):
            began = time.perf_counter()
            once()
            times.append(time.perf_counter() - began)
            bar.update()
    return np.array(times)


def _latency(name: str, threads: int, times_s: np.ndarray, batch: int, peak: int | None = None) -> Latency:
    p50, p90, p99 = (float(np.percentile(times_s, q)) for q in PERCENTILES)
    return Latency(name, threads, len(times_s), 1e3 * p50, 1e3 * p90, 1e3 * p99, batch / p50, peak)


def memory_bytes(device: torch.device) -> int:
    """Memory of the device or the machine; 0 if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def machine(device: torch.device) -> str:
    """Processor, cores that this process may use, and the GPU if that is the device."""
    text = f"{_cpu_name()}, {cores()} cores"
    return f"{text}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else text


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
