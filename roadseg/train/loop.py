"""The training loop: from a step to the last, on one device or on several ranks.

Shapes: B samples, H W the crop, K classes. Every draw is a function of (seed, epoch, sample) or
(seed, step), so a run that was stopped goes on bit for bit where its checkpoint stands.
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
from torch import nn

from roadseg.data.augment.cpu import generator
from roadseg.data.batches.loader import Batch
from roadseg.data.shards.index import Split
from roadseg.errors import Interrupted
from roadseg.labels import LabelSet
from roadseg.metrics.iou import scores
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
from roadseg.train.step import Taken, mark, non_finite, on_its_way
from roadseg.train.tracking.history import History
from roadseg.train.tracking.timing import Timing, spared
from roadseg.train.tracking.trackers import Mirrors
from roadseg.train.validation import validate

log = logging.getLogger(__name__)
CHECKPOINT_EVERY_S = 60.0
STEERED_BY = "val"  # the split that may end training early; never a held-out one
Source = Callable[[int, Callable[[], object]], Generator[Batch, None, None]]


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


@dataclass(frozen=True)
class Stretch:
    """Steps first..last-1 of a run, all of one crop size and output stride.

    batches(step, stopped): those of this rank from 0-based `step` on, ending early once `stopped`
    while none comes.
    """

    first: int
    last: int
    output_stride: int
    batches: Source


@contextmanager
def no_mirrors(step: int) -> Iterator[Mirrors]:
    yield Mirrors(())


def train(
    network: DeepLabV3Plus,
    stretches: Sequence[Stretch],
    validation: Mapping[str, Split],
    label_set: LabelSet,
    objective: Objective,
    s: Settings,
    device: torch.device,
    work: Path,
    *,
    ranks: Ranks = ALONE,
    mirrors: Callable[[int], AbstractContextManager[Mirrors]] = no_mirrors,
    draw: Callable[[nn.Module, int], object] | None = None,
    terms: str = "",
    name_of: Callable[[int], str] = "frame {}".format,
) -> tuple[DeepLabV3Plus, int]:
    """Train `network` in place; return its average (EMA) on `device`, and the steps it took.

    validation: splits scored every `s.validate_every` steps. mirrors(step): opens where losses and scores
    are shown besides history.jsonl, for a run that goes on after `step`. draw(average, step): called
    after each validation, for pictures. terms: of the data behind the weights, for who starts from a checkpoint.
    name_of: the name of the frame of that index, for errors.
    Checkpoints and history.jsonl lie in `work`, written by the main rank; what is there is gone on from. The
    average has the output stride that training ended at: the last stretch's, or an earlier one's if early
    stopping came before it. Raises NonFiniteLoss at most a step after the loss that would spoil the weights,
    nothing of it saved, Interrupted after a signal to any rank, with a checkpoint saved; a validation that it
    cut short comes first when the run goes on.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()  # crops are all of one size
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    draw_part(network, ranks.rank, ranks.world)
    ranks.same_weights(network)
    average = EMA(network, s.ema_decay)
    optimizer = make_optimizer(network, s.optimizer, s.learning_rate, s.backbone_lr_factor, s.weight_decay, s.momentum)
    folder = work / "checkpoints"
    # One of several ranks must not leave the others waiting: it goes on until all have heard of a signal.
    alone = ranks.world == 1
    start = 0
    if found := ranks.from_main(checkpoint.newest(folder) if ranks.main and folder.exists() else None):
        start, tensors = found
        checkpoint.restore(tensors, network, average.network, optimizer)
        log.info("going on after step %d of %d", start, s.steps)
    history = History(work / "history.jsonl" if ranks.main else None, start)
    timing = Timing(work / "log" if ranks.main else work / "log" / "ranks" / str(ranks.rank), device)

    def save(step: int) -> None:
        if ranks.main:
            history.flush()
            of = checkpoint.Of(label_set.names, average.network.architecture.to_json(), terms)
            checkpoint.save(folder, step, network, average.network, optimizer, of)

    def early(step: int) -> bool:
        """Has the steering split's score stood still for too long? The main rank knows."""
        if not s.patience or step % s.validate_every:
            return False
        waited = ranks.main and history.validations_without_gain(STEERED_BY) >= s.patience
        return bool(ranks.sum_(torch.tensor(float(waited), device=device)))

    def stride(output_stride: int) -> None:
        if output_stride != network.architecture.output_stride:
            set_output_stride(network, output_stride)
            set_output_stride(average.network, output_stride)

    def settle(taken: Taken, mirror: Mirrors, bar: Any) -> bool:
        """Note a step's loss and speed, once; whether any rank had been sent a signal when it was begun.

        Raises NonFiniteLoss. What steps after it did to the weights is never saved.
        """
        if not taken.noted:
            taken.noted, number = True, taken.step + 1
            if not taken.finite():
                history.flush()
                samples = [sample for part in ranks.gathered(taken.samples) for sample in part]
                raise non_finite(taken.loss, taken.norm, taken.step, samples, name_of)
            history.add(step=number, loss=round(taken.loss, 6), learning_rate=taken.learning_rate)
            mirror.mean(number, {"loss": taken.loss, "learning_rate": taken.learning_rate})
            images = len(taken.samples) * ranks.world
            if row := timing.step(number, taken.waited(), images, bar, taken.loss):
                mirror.scalars(number, {k: row[k] for k in ("images_per_s", "waiting_share")})
        return taken.signalled

    def stride_after(step: int) -> int:
        return next(part.output_stride for part in stretches if step <= part.last)

    def validation_due(step: int) -> bool:
        return step > 0 and (step % s.validate_every == 0 or step == s.steps)

    def score(step: int, stopped: Callable[[], int], mirror: Mirrors) -> bool:
        """Validate after `step`; False, with nothing noted, if a signal cut it short.

        What is scored is what ships: the average on rank 0, as without sync-BN each has running statistics of its own.
        """
        ranks.same_weights(average.network)
        results = {}
        for split, frames in validation.items():
            matrix = validate(average.network, frames, label_set.num_classes, device, s.bf16, stopped, ranks)
            if matrix is None:
                return False
            results[split] = scores(matrix.numpy(), label_set)
        for split, result in results.items():
            history.add(step=step, split=split, miou=result["miou"], pixel_accuracy=result["pixel_accuracy"])
            mirror.scalars(step, {f"{split}/miou": result["miou"]})
            log.info("step %d: %s mIoU %.4f", step, split, result["miou"] or 0.0)
        if draw and ranks.main:
            with spared("a picture in log/pictures"):
                draw(average.network, step)
        return True

    def steps(stopped: Callable[[], int]) -> Generator[tuple[int, Batch | None, Gradients, float], None, None]:
        """(step, its batch or None when it was stopped, what computes its gradients, when it began)."""
        for stretch in stretches:
            if (first := max(start, stretch.first)) >= stretch.last:
                continue
            stride(stretch.output_stride)
            torch._dynamo.reset()  # of one function it compiles eight forms, then no more
            gradients = Gradients(
                network, objective, device, s.bf16, s.cuda_graph,
                compiled=s.compiled, accumulate=s.accumulate, ranks=ranks,
            )  # fmt: skip
            with closing(gradients), closing(stretch.batches(first, stopped if alone else bool)) as source:
                for step in range(first, stretch.last):
                    began = time.monotonic()
                    yield step, next(source, None), gradients, began

    done, last_save, ends = start, time.monotonic(), {stretch.last for stretch in stretches}
    with (
        stop_signals() as stopped,
        mirrors(start) as mirror,
        progress(s.steps, "train", "step", initial=start) as bar,
        closing(steps(stopped)) as source,
    ):
        if ranks.from_main(validation_due(start) and not history.validated(start)):
            stride(stride_after(start))
            if not score(start, stopped, mirror):
                raise _interrupted(stopped(), start)
            save(start)
        ended, last = early(start), None
        timing.begin()
        for step, batch, gradients, began in () if ended else source:
            if batch is None:
                if last:
                    settle(last, mirror, bar)
                save(step)
                raise _interrupted(stopped(), step)
            waited, begun = time.monotonic() - began, mark(device)
            torch.manual_seed(int(generator(s.seed, 3, step).integers(1 << 62)))  # dropout
            factor = lr_factor(step, s.steps, s.scheduler, s.warmup_steps, s.poly_power)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            if alone and gradients.compiles:  # for minutes; what came before the stretch is saved
                if stopped():
                    raise _interrupted(stopped(), step)
                with stopped_at_once(f"while the network was compiled, after step {step}"):
                    loss = gradients(batch)
            else:
                loss = gradients(batch)
            norm = nn.utils.clip_grad_norm_(network.parameters(), s.clip_norm or math.inf)
            optimizer.step()
            average.update(step)
            values = on_its_way(loss, norm, stopped(), ranks)
            before, arrived = last.arrived if last else None, mark(device)
            taken = Taken(step, s.learning_rate * factor, batch.samples, values, waited, before, begun, arrived)
            done = step + 1
            # Reading a loss waits for it: that of the step before, while the device is busy with this one.
            signalled = settle(last, mirror, bar) if last else False
            last = taken
            due = validation_due(done)
            kept = due or done in ends
            if kept or signalled or last.arrived is None or (alone and stopped()):
                signalled = settle(last, mirror, bar) or signalled
            bar.update()
            cut_short = due and not signalled and not score(done, stopped, mirror)
            if kept or signalled or (ranks.main and _due(done, last_save, s) and last.finite()):
                settle(last, mirror, bar)  # of a loss that is not finite all ranks tell together, in the next step
                save(done)
                last_save = time.monotonic()
                timing.begin()
            if signalled or cut_short:
                raise _interrupted(stopped(), done)
            if ended := early(done):
                break
    if ranks.sum_(torch.tensor(float(bool(stopped())), device=device)):  # it came after the last step's question
        raise _interrupted(stopped(), done)
    stride(stride_after(done) if ended else stretches[-1].output_stride)
    if ended:
        stood_still = f"{s.patience} validation{'s' * (s.patience > 1)}"
        log.info("ended after step %d: val mIoU stood still for %s", done, stood_still)
    timing.verdict()
    history.flush()
    if ranks.main:
        checkpoint.prune(folder, 1)
    return average.network, done


def _due(step: int, last_save_s: float, s: Settings) -> bool:
    if s.checkpoint_every:
        return step % s.checkpoint_every == 0
    return time.monotonic() - last_save_s > CHECKPOINT_EVERY_S


def _interrupted(number: int, step: int) -> Interrupted:
    name = signal.Signals(number).name if number else "another rank's signal"
    text = f"stopped by {name} after step {step}; run again to go on"
    return Interrupted(text, signal_number=number or signal.SIGTERM)
