"""The training loop: one process, one device, from a step to the last.

Shapes: B samples, H W the crop, K classes. Every draw is a function of (seed, epoch, sample) or
(seed, step), so a run that was stopped goes on bit for bit where its checkpoint stands.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.data.augment import generator
from roadseg.data.loader import Batch
from roadseg.data.shards import Split
from roadseg.errors import Interrupted, NonFiniteLoss, RoadsegError
from roadseg.files import read_json_lines, write_atomic
from roadseg.labels import IGNORE, LabelSet
from roadseg.metrics.iou import scores
from roadseg.progress import progress
from roadseg.train import checkpoint
from roadseg.train.ema import EMA
from roadseg.train.gradients import Gradients
from roadseg.train.losses import cross_entropy
from roadseg.train.schedule import lr_factor
from roadseg.train.timing import Timing

log = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Settings:
    """What the loop itself needs to know; meanings as in the config's training section."""

    steps: int
    optimizer: str
    learning_rate: float
    backbone_lr_factor: float
    weight_decay: float
    momentum: float
    scheduler: str
    poly_power: float
    warmup_steps: int
    label_smoothing: float
    auxiliary_weight: float
    ema_decay: float
    clip_norm: float
    seed: int
    bf16: bool
    validate_every: int
    checkpoint_every: int = 0
    cuda_graph: bool = True


def make_optimizer(network: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """Four groups: backbone or not, decayed (weights of two dimensions and more) or not."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        groups.setdefault((name.startswith("backbone."), p.ndim > 1), []).append(p)
    parameters = [
        {
            "params": params,
            "peak_lr": s.learning_rate * (s.backbone_lr_factor if backbone else 1.0),
            "weight_decay": s.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), params in sorted(groups.items(), key=lambda item: item[0])
    ]
    fused = next(network.parameters()).is_cuda
    if s.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=s.learning_rate, momentum=s.momentum, nesterov=s.momentum > 0)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer]
    return kind(parameters, lr=s.learning_rate, fused=fused)


def batch_loss(output: Any, label_BHW: Tensor, class_weights: Tensor | None, s: Settings) -> Tensor:
    heads = [output] if isinstance(output, Tensor) else [output.logits, *output.auxiliary]
    losses = [cross_entropy(head, label_BHW, class_weights, s.label_smoothing) for head in heads]
    return losses[0] + s.auxiliary_weight * sum(losses[1:], start=torch.zeros_like(losses[0]))


@torch.inference_mode()
def validate(
    network: nn.Module, split: Split, num_classes: int, device: torch.device, bf16: bool, stopped: Callable[[], int]
) -> Tensor:
    """int64 [K, K] confusion (rows truth) of whole frames, one at a time, on the CPU; cut short once `stopped`."""
    matrix = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    for index in range(len(split)):
        if stopped():
            break
        image, label = split.read(index)
        image_BHWC, label_HW = (
            torch.from_numpy(image.copy())[None].to(device),
            torch.from_numpy(label.copy()).to(device),
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(image_BHWC.permute(0, 3, 1, 2))
        prediction_HW = F.interpolate(logits.float(), label.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        valid = label_HW != IGNORE
        joint = label_HW[valid].long() * num_classes + prediction_HW[valid]
        matrix += torch.bincount(joint, minlength=len(matrix))
    return matrix.reshape(num_classes, num_classes).cpu()


class History:
    """history.jsonl: a row a step and a row a validation; no times, so that it is the same for every run."""

    def __init__(self, path: Path, step: int) -> None:
        """Go on after `step`: rows of later steps, written by a run that was killed, are dropped."""
        self._path, self._rows = path, ""
        kept = [row for row in read_json_lines(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, **row: Any) -> None:
        self._rows += json.dumps(row) + "\n"

    def flush(self) -> None:
        """Must come before a checkpoint is saved: its step's rows are never written again."""
        with open(self._path, "a", encoding="utf-8") as f:
            f.write(self._rows)
            f.flush()
            os.fsync(f.fileno())
        self._rows = ""


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGTERM and SIGINT are only noted; the yielded function returns the signal, or 0.

    Python lets only the main thread handle signals; elsewhere they stay as they are.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    old = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    network: nn.Module,
    batches: Callable[[int, Callable[[], int]], Generator[Batch, None, None]],
    validation: dict[str, Split],
    label_set: LabelSet,
    class_weights: Sequence[float] | None,
    s: Settings,
    device: torch.device,
    work: Path,
) -> nn.Module:
    """Train `network` in place and return its average (EMA), on `device`.

    batches(step, stopped): the batches from 0-based `step` on, ending early once `stopped` while none
    comes. validation: splits scored every `s.validate_every` steps. Checkpoints and history.jsonl lie in
    `work`; what is there is gone on from. Raises NonFiniteLoss before the step that would spoil the
    weights, Interrupted after a signal, with a checkpoint saved; during a validation the one before it
    stands.
    """
    torch.backends.cudnn.benchmark = True  # crops are all of one size
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = EMA(network, s.ema_decay)
    optimizer = make_optimizer(network, s)
    folder = work / "checkpoints"
    start = 0
    if found := checkpoint.newest(folder) if folder.exists() else None:
        start, tensors = found
        checkpoint.restore(tensors, network, average.network, optimizer)
        log.info("going on after step %d of %d", start, s.steps)
    history = History(work / "history.jsonl", start)
    weights = torch.tensor(class_weights, device=device) if class_weights else None
    gradients = Gradients(
        network, lambda output, label: batch_loss(output, label, weights, s), device, s.bf16, s.cuda_graph
    )
    timing = Timing(work / "log")

    def save(step: int) -> None:
        history.flush()
        checkpoint.save(folder, step, network, average.network, optimizer)

    last_save = time.monotonic()
    with (
        stop_signals() as stopped,
        progress(s.steps, "train", "step", initial=start) as bar,
        _loader_failures(),
        closing(batches(start, stopped)) as source,
    ):
        for step in range(start, s.steps):
            began = time.monotonic()
            batch = next(source, None)
            if batch is None:  # only when stopped while no batch came
                save(step)
                raise _interrupted(stopped(), step)
            waited = time.monotonic() - began
            torch.manual_seed(int(generator(s.seed, 3, step).integers(1 << 62)))  # dropout
            factor = lr_factor(step, s.steps, s.scheduler, s.warmup_steps, s.poly_power)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            loss = gradients(batch)
            norm = nn.utils.clip_grad_norm_(network.parameters(), s.clip_norm or math.inf)
            loss_value, norm_value = torch.stack([loss, norm]).tolist()
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                history.flush()
                raise _non_finite(loss_value, norm_value, step, batch)
            optimizer.step()
            average.update(step)
            history.add(step=step + 1, loss=round(loss_value, 6), learning_rate=s.learning_rate * factor)
            done = step + 1
            bar.update()
            timing.step(done, began, waited, len(batch.samples), bar)
            validated = done % s.validate_every == 0 or done == s.steps
            if validated:
                for split, frames in validation.items():
                    matrix = validate(average.network, frames, label_set.num_classes, device, s.bf16, stopped)
                    if stopped():
                        break
                    result = scores(matrix.numpy(), label_set)
                    history.add(step=done, split=split, miou=result["miou"], pixel_accuracy=result["pixel_accuracy"])
                    log.info("step %d: %s mIoU %.4f", done, split, result["miou"] or 0.0)
            # A validation that was cut short has no scores to save; the checkpoint before it stands.
            cut_short = validated and stopped()
            if (validated or stopped() or _due(done, last_save, s)) and not cut_short:
                save(done)
                last_save = time.monotonic()
            if stopped():
                raise _interrupted(stopped(), done)
    timing.verdict()
    history.flush()
    checkpoint.prune(folder, 1)
    return average.network


def _due(step: int, last_save_s: float, s: Settings) -> bool:
    if s.checkpoint_every:
        return step % s.checkpoint_every == 0
    return time.monotonic() - last_save_s > CHECKPOINT_EVERY_S


def _interrupted(number: int, step: int) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name} after step {step}; run again to go on", signal_number=number)


@contextmanager
def _loader_failures() -> Iterator[None]:
    """PyTorch raises wherever the loop is when a loader process dies, not only where it waits for a batch."""
    try:
        yield
    except RuntimeError as e:
        if "DataLoader worker (pid" not in str(e):
            raise
        raise RoadsegError(
            "a loader process died",
            todo="memory or /dev/shm may be full: lower training.workers or training.batch_size; "
            "or a shard was shortened while it was read; run again to go on",
        ) from e


def _non_finite(loss: float, norm: float, step: int, batch: Batch) -> NonFiniteLoss:
    rows = ", ".join(f"{sample.index} (epoch {sample.epoch})" for sample in batch.samples)
    return NonFiniteLoss(
        f"loss {loss}, gradient norm {norm} at step {step + 1}, which was not taken; nothing of it was saved",
        expected="finite numbers",
        where=f"train samples {rows}",
        todo="look at these samples; a lower training.learning_rate, a longer training.warmup_steps or "
        "training.precision fp32 often helps",
    )
