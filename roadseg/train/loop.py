"""The training loop: from a step to the last, on one device or on several ranks.

Shapes: B samples, H W the crop, K classes. Every random draw is a function of (seed, epoch, sample) or
(seed, step), so a resumed run continues bit for bit from its checkpoint.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadseg.data.augment.cpu import generator
from roadseg.data.batches.loader import Batch
from roadseg.data.shards.index import Split
from roadseg.errors import Interrupted
from roadseg.labels import LabelSet
from roadseg.model.deeplab import DeepLabV3Plus
from roadseg.model.dropout import draw_part
from roadseg.model.surgery import set_output_stride
from roadseg.progress import progress
from roadseg.train import checkpoint
from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.ema import EMA
from roadseg.train.gradients import Gradients
from roadseg.train.losses.objective import Objective
from roadseg.train.optimizer import make_optimizer
from roadseg.train.schedule import lr_factor
from roadseg.train.signals import stop_signals, stopped_at_once
from roadseg.train.step import Step, non_finite, record_event, send_to_host
from roadseg.train.tracking.history import History
from roadseg.train.tracking.timing import Timing, warn_if_disk_full
from roadseg.train.tracking.trackers import Trackers
from roadseg.train.validation import score_splits

log = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 60.0
EARLY_STOPPING_SPLIT = "val"  # never a held-out one
BatchSource = Callable[[int, Callable[[], object]], Generator[Batch, None, None]]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop needs to know; meanings as in the config's training section."""

    steps: int
    optimizer: str
    learning_rate: float
    backbone_lr_factor: float
    weight_decay: float
    momentum: float
    scheduler: str
    poly_power: float
    warmup_steps: int
    ema_decay: float
    clip_norm: float
    seed: int
    bf16: bool
    validate_every: int
    checkpoint_every: int = 0
    cuda_graph: bool = True
    compiled: bool = False
    accumulate: int = 1
    patience: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingPhase:
    """Steps first..last-1 of a run, all with one crop size and output stride.

    batches(step, stopped): this rank's batches from 0-based `step` on; they end early if `stopped` becomes true while
    none arrives.
    """

    first: int
    last: int
    output_stride: int
    batches: BatchSource


@contextmanager
def no_trackers(step: int) -> Iterator[Trackers]:
    yield Trackers(())


def train(
    network: DeepLabV3Plus,
    phases: Sequence[TrainingPhase],
    validation: Mapping[str, Split],
    label_set: LabelSet,
    objective: Objective,
    s: LoopSettings,
    device: torch.device,
    work: Path,
    *,
    ranks: Ranks = ALONE,
    trackers: Callable[[int], AbstractContextManager[Trackers]] = no_trackers,
    draw: Callable[[nn.Module, int], object] | None = None,
    terms: str = "",
    name_of: Callable[[int], str] = "frame {}".format,
) -> tuple[DeepLabV3Plus, int]:
    """Train `network` in place; return its average (EMA) on `device`, and the number of steps.

    validation: splits scored every `s.validate_every` steps. trackers(step): opens the trackers of a run that continues
    after `step`. draw(average, step): called after each validation. terms: of the data behind the weights. name_of: the
    name of a frame by its index, for errors. The main rank writes checkpoints and history.jsonl into `work`, and a run
    continues from them. The average has the output stride of the last phase that was reached.

    Raises NonFiniteLoss at most one step after the loss, with nothing of it saved; Interrupted after a signal to any
    rank, with a checkpoint saved. A validation cut short by a signal runs first when the run continues.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()  # crops are all of one size
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    draw_part(network, ranks.rank, ranks.world)
    ranks.same_weights(network)
    average = EMA(network, s.ema_decay)
    optimizer = make_optimizer(network, s.optimizer, s.learning_rate, s.backbone_lr_factor, s.weight_decay, s.momentum)
    alone = ranks.world == 1  # several ranks stop after the same step: none may leave the others waiting

    folder = work / "checkpoints"
    start = _restore(folder, network, average.network, optimizer, ranks, s.steps)
    history = History(work / "history.jsonl" if ranks.main else None, start)
    timing = Timing(work / "log" if ranks.main else work / "log" / "ranks" / str(ranks.rank), device)
    run = _Run(network, average.network, optimizer, history, timing, ranks, folder, label_set, terms, name_of)
    validator = _Validator(average.network, validation, label_set, device, s.bf16, ranks, history, draw)

    done, last_save_s, ended = start, time.monotonic(), False
    with (
        stop_signals() as stopped,
        trackers(start) as tracker,
        progress(s.steps, "train", "step", initial=start) as bar,
    ):
        if ranks.from_main(_validation_due(start, s) and not history.validated(start)):
            run.set_output_stride(_stride_after(phases, start))
            if not validator(start, stopped, tracker):
                raise _interrupted(stopped(), start)
            run.save(start)
        ended = _stands_still(start, s, history, ranks, device)
        pending: Step | None = None  # its loss is read while the device computes the next step
        timing.begin()
        for phase in phases:
            first = max(start, phase.first)
            if ended or first >= phase.last:
                continue
            run.set_output_stride(phase.output_stride)
            torch._dynamo.reset()  # it compiles at most eight forms of one function
            gradients = Gradients(
                network, objective, device, s.bf16, s.cuda_graph,
                compiled=s.compiled, accumulate=s.accumulate, ranks=ranks,
            )  # fmt: skip
            with closing(gradients), closing(phase.batches(first, stopped if alone else bool)) as batches:
                for step in range(first, phase.last):
                    asked_s = time.monotonic()
                    batch = next(batches, None)
                    if batch is None:  # stopped while waiting for data
                        if pending:
                            run.settle(pending, tracker, bar)
                        run.save(step)
                        raise _interrupted(stopped(), step)
                    waited_s, begun = time.monotonic() - asked_s, record_event(device)

                    torch.manual_seed(int(generator(s.seed, 3, step).integers(1 << 62)))  # dropout
                    factor = lr_factor(step, s.steps, s.scheduler, s.warmup_steps, s.poly_power)
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * factor
                    loss = _loss(gradients, batch, step, stopped, alone)
                    norm = nn.utils.clip_grad_norm_(network.parameters(), s.clip_norm or math.inf)
                    optimizer.step()
                    average.update(step)
                    values = send_to_host(loss, norm, stopped(), ranks)
                    previous, pending = pending, Step(
                        step=step, learning_rate=s.learning_rate * factor, samples=batch.samples, values=values,
                        waited_s=waited_s, before=pending.arrived if pending else None, begun=begun,
                        arrived=record_event(device),
                    )  # fmt: skip
                    done = step + 1

                    signalled = run.settle(previous, tracker, bar) if previous else False
                    validation_due = _validation_due(done, s)
                    boundary = validation_due or done == phase.last
                    if boundary or signalled or pending.arrived is None or (alone and stopped()):
                        signalled = run.settle(pending, tracker, bar) or signalled
                    bar.update()
                    cut_short = validation_due and not signalled and not validator(done, stopped, tracker)
                    if boundary or signalled or (ranks.main and should_save(done, last_save_s, s) and pending.finite()):
                        run.settle(pending, tracker, bar)
                        run.save(done)
                        last_save_s = time.monotonic()
                        timing.begin()
                    if signalled or cut_short:
                        raise _interrupted(stopped(), done)
                    if ended := _stands_still(done, s, history, ranks, device):
                        break
    if ranks.sum_(torch.tensor(float(bool(stopped())), device=device)):  # it came after the last step's check
        raise _interrupted(stopped(), done)
    run.set_output_stride(_stride_after(phases, done) if ended else phases[-1].output_stride)
    if ended:
        log.info("ended after step %d: val mIoU did not rise within training.patience = %d", done, s.patience)
    timing.verdict()
    history.flush()
    if ranks.main:
        checkpoint.prune(folder, 1)
    return average.network, done


def should_save(step: int, last_save_s: float, s: LoopSettings) -> bool:
    """Whether a checkpoint is due after `step`, apart from those at validations, ends of phases and signals."""
    if s.checkpoint_every:
        return step % s.checkpoint_every == 0
    return time.monotonic() - last_save_s > CHECKPOINT_EVERY_S


def _validation_due(step: int, s: LoopSettings) -> bool:
    return step > 0 and (step % s.validate_every == 0 or step == s.steps)


def _stride_after(phases: Sequence[TrainingPhase], step: int) -> int:
    return next(phase.output_stride for phase in phases if step <= phase.last)


def _restore(
    folder: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, steps: int
) -> int:
    """The step of the newest valid checkpoint, restored on every rank; 0 without one."""
    found = ranks.from_main(checkpoint.newest(folder) if ranks.main and folder.exists() else None)
    if not found:
        return 0
    start, tensors = found
    checkpoint.restore(tensors, network, average, optimizer)
    log.info("going on after step %d of %d", start, steps)
    return start


def _loss(gradients: Gradients, batch: Batch, step: int, stopped: Callable[[], int], alone: bool) -> Tensor:
    """Run forward and backward. Compilation takes minutes; a single process may end at once during it."""
    if not (alone and gradients.compiles):
        return gradients(batch)
    if stopped():  # what came before this phase is saved
        raise _interrupted(stopped(), step)
    with stopped_at_once(f"while the network was compiled, after step {step}"):
        return gradients(batch)


def _stands_still(step: int, s: LoopSettings, history: History, ranks: Ranks, device: torch.device) -> bool:
    """Whether val's score has not risen for `patience` validations; only the main rank knows."""
    if not s.patience or step % s.validate_every:
        return False
    waited = ranks.main and history.validations_without_gain(EARLY_STOPPING_SPLIT) >= s.patience
    return bool(ranks.sum_(torch.tensor(float(waited), device=device)))


@dataclass(frozen=True)
class _Run:
    """What saving and logging need of a run."""

    network: DeepLabV3Plus
    average: DeepLabV3Plus
    optimizer: torch.optim.Optimizer
    history: History
    timing: Timing
    ranks: Ranks
    folder: Path
    label_set: LabelSet
    terms: str
    name_of: Callable[[int], str]

    def set_output_stride(self, output_stride: int) -> None:
        if output_stride != self.network.architecture.output_stride:
            set_output_stride(self.network, output_stride)
            set_output_stride(self.average, output_stride)

    def save(self, step: int) -> None:
        if self.ranks.main:
            self.history.flush()
            of = checkpoint.Origin(self.label_set.names, self.average.architecture.to_json(), self.terms)
            checkpoint.save(self.folder, step, self.network, self.average, self.optimizer, of)

    def settle(self, step: Step, tracker: Trackers, bar: Any) -> bool:
        """Wait for a step and log its loss and speed, once; return whether any rank had a signal when it began.

        Raises NonFiniteLoss. What later steps did to the weights is never saved then.
        """
        if not step.settled:
            step.settled, number = True, step.step + 1
            if not step.finite():
                self.history.flush()
                samples = [sample for part in self.ranks.gathered(step.samples) for sample in part]
                raise non_finite(step.loss, step.norm, step.step, samples, self.name_of)
            self.history.add(step=number, loss=round(step.loss, 6), learning_rate=step.learning_rate)
            tracker.mean(number, {"loss": step.loss, "learning_rate": step.learning_rate})
            images = len(step.samples) * self.ranks.world
            if row := self.timing.step(number, step.device_waited_s(), images, bar, step.loss):
                tracker.scalars(number, {k: row[k] for k in ("images_per_s", "waiting_share")})
        return step.signalled


@dataclass(frozen=True)
class _Validator:
    """Scores the average, which is what ships."""

    average: DeepLabV3Plus
    validation: Mapping[str, Split]
    label_set: LabelSet
    device: torch.device
    bf16: bool
    ranks: Ranks
    history: History
    draw: Callable[[nn.Module, int], object] | None

    def __call__(self, step: int, stopped: Callable[[], int], tracker: Trackers) -> bool:
        """Validate after `step`; False, with nothing recorded, if a signal cut it short."""
        self.ranks.same_weights(self.average)  # without sync-BN each rank has running statistics of its own
        results = score_splits(
            self.average, self.validation, self.label_set, self.device, self.bf16, stopped, self.ranks
        )
        if results is None:
            return False
        for split, result in results.items():
            self.history.add(step=step, split=split, miou=result["miou"], pixel_accuracy=result["pixel_accuracy"])
            tracker.scalars(step, {f"{split}/miou": result["miou"]})
            log.info("step %d: %s mIoU %.4f", step, split, result["miou"] or 0.0)
        if self.draw and self.ranks.main:
            with warn_if_disk_full("a picture in log/pictures"):
                self.draw(self.average, step)
        return True


def _interrupted(number: int, step: int) -> Interrupted:
    name = signal.Signals(number).name if number else "another rank's signal"
    text = f"stopped by {name} after step {step}; run again to go on"
    return Interrupted(text, signal_number=number or signal.SIGTERM)
