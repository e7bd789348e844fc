"""The loop on a three-class set: it learns, it stops in time, and it goes on bit for bit."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from roadseg.data.augment.cpu import Augmentation
from roadseg.data.batches.loader import Batch, Crops, batches_from_workers
from roadseg.data.batches.sampler import Batches, Order
from roadseg.data.shards.index import Shards
from roadseg.errors import Interrupted, NonFiniteLoss, RoadsegError
from roadseg.files import read_json_lines
from roadseg.metrics.iou import scores
from roadseg.model.deeplab import DeepLabV3Plus, build
from roadseg.model.surgery import freeze
from roadseg.train import checkpoint, loop
from roadseg.train.distributed.launch import launch
from roadseg.train.distributed.process_group import ALONE, Ranks, joined
from roadseg.train.gradients import Gradients
from roadseg.train.loop import LoopSettings, TrainingPhase, train
from roadseg.train.losses.objective import Objective
from roadseg.train.optimizer import make_optimizer
from roadseg.train.validation import validate
from tests.conftest import THREE
from tests.train.small import plain_criterion, small_architecture

SETTINGS = LoopSettings(
    steps=6, optimizer="adamw", learning_rate=0.003, backbone_lr_factor=1.0, weight_decay=0.01, momentum=0.9,
    scheduler="poly", poly_power=0.9, warmup_steps=2, ema_decay=0.9, clip_norm=5.0, seed=3, bf16=False,
    validate_every=3, checkpoint_every=1,
)  # fmt: skip
CPU = torch.device("cpu")
Source = Callable[..., Generator[Batch, None, None]]


def network() -> DeepLabV3Plus:
    return build(small_architecture(backbone="mobilenetv2_035"), seed=0, mean=(120.0,) * 3, std=(60.0,) * 3)


def source(shards: Shards, steps: int = SETTINGS.steps, workers: int = 0) -> Source:
    crops = Crops(shards.split("train"), Augmentation((32, 64)), SETTINGS.seed, (120, 120, 120))
    order = Order(crops.split.frames, SETTINGS.seed)
    return lambda step, stopped=bool: batches_from_workers(
        crops, Batches(order, 4, step, steps), workers, CPU, stopped=stopped
    )


def criterion() -> Objective:
    return Objective(plain_criterion())


def run(
    shards: Shards,
    work: Path,
    settings: LoopSettings = SETTINGS,
    batches: Source | None = None,
    objective: Objective | None = None,
    stretches: list[TrainingPhase] | None = None,
    split: str = "val",
    net: DeepLabV3Plus | None = None,
) -> DeepLabV3Plus:
    work.mkdir(exist_ok=True)
    stretches = stretches or [
        TrainingPhase(first=0, last=settings.steps, output_stride=16, batches=batches or source(shards, settings.steps))
    ]
    validation = {split: shards.split("val")}
    average, _ = train(net or network(), stretches, validation, THREE, objective or criterion(), settings, CPU, work)
    return average


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def unlike_ranks(ranks: Ranks, data: str, folder: str) -> None:
    """Two ranks without sync-BN, so that each has running statistics of its own."""
    shards = Shards.load(Path(data))
    crops = Crops(shards.split("train"), Augmentation((32, 64)), SETTINGS.seed, (120, 120, 120))
    order = Order(crops.split.frames, SETTINGS.seed)

    def batches(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        mine = Batches(order, 4, step, SETTINGS.steps, ranks.rank, ranks.world)
        yield from batches_from_workers(crops, mine, 0, CPU, stopped=stopped)

    stretches = [TrainingPhase(first=0, last=SETTINGS.steps, output_stride=16, batches=batches)]
    settings = replace(SETTINGS, learning_rate=0.02)
    with joined(ranks, CPU):
        (work := Path(folder) / str(ranks.rank)).mkdir()
        objective = Objective(plain_criterion(ranks=ranks))
        average, _ = train(
            network(), stretches, {"val": shards.split("val")}, THREE, objective, settings, CPU, work, ranks=ranks
        )
        if ranks.main:
            matrix = validate(average, shards.split("val"), 3, CPU, False, int, ALONE)
            assert matrix is not None
            (work / "shipped").write_text(str(scores(matrix.numpy(), THREE)["miou"]))


def test_of_ranks_with_statistics_of_their_own_that_is_scored_which_ships(shards: Shards, tmp_path: Path) -> None:
    launch(unlike_ranks, (str(shards.folder), str(tmp_path)), 2)
    last = [row["miou"] for row in read_json_lines(tmp_path / "0" / "history.jsonl") if "split" in row][-1]
    assert last == pytest.approx(float((tmp_path / "0" / "shipped").read_text()), abs=1e-9)


class Killed(Exception):
    pass


def dying(batches: Source, at: int) -> Source:
    """Batches of a process that is killed when it asks for the one of step `at`."""

    def start(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        for number, batch in enumerate(batches(step, stopped), step):
            if number == at:
                raise Killed
            yield batch

    return start


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_resumed_is_bit_identical_to_uninterrupted(shards: Shards, tmp_path: Path, optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, checkpoint_every=2)
    whole = run(shards, tmp_path / "whole", settings)
    for at in (1, 3, 5):  # between, at and after checkpoints
        with pytest.raises(Killed):
            run(shards, tmp_path / "cut", settings, dying(source(shards), at))
    resumed = run(shards, tmp_path / "cut", settings)
    assert same(whole, resumed)
    for name in ("history.jsonl", "checkpoints/step-00000006.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_it_learns(shards: Shards, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=60, validate_every=60, checkpoint_every=60, learning_rate=0.01)
    run(shards, tmp_path, settings, source(shards, 60))
    rows = read_json_lines(tmp_path / "history.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert rows[-1]["split"] == "val" and rows[-1]["miou"] > 0.5


@pytest.mark.fault
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_network_ends_the_run_unsaved_and_names_the_samples(
    shards: Shards, tmp_path: Path, value: float
) -> None:
    sound, calls = criterion(), []

    class Spoilt(Objective):
        def __call__(self, *arguments: Any) -> torch.Tensor:
            calls.append(1)
            return sound(*arguments) * (value if len(calls) == 4 else 1.0)

    with pytest.raises(NonFiniteLoss, match="at step 4,") as caught:
        run(shards, tmp_path / "spoilt", objective=Spoilt(sound.criterion))
    samples = next(iter(Batches(Order(shards.split("train").frames, SETTINGS.seed), 4, 3, 4)))
    assert caught.value.where == "train, " + ", ".join(f"frame {s.index} (epoch {s.epoch})" for s in samples)
    step, tensors = checkpoint.newest(tmp_path / "spoilt" / "checkpoints") or (None, {})
    assert step == 3
    with pytest.raises(Killed):
        run(shards, tmp_path / "sound", SETTINGS, dying(source(shards), 3))
    _, expected = checkpoint.newest(tmp_path / "sound" / "checkpoints") or (None, {})
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)


@pytest.mark.fault
def test_sigterm_saves_and_says_so(shards: Shards, tmp_path: Path) -> None:
    def terminating(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        for number, batch in enumerate(source(shards)(step), step):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    settings = replace(SETTINGS, checkpoint_every=100, validate_every=100)
    with pytest.raises(Interrupted, match="SIGTERM after step 3") as caught:
        run(shards, tmp_path, settings, terminating)
    assert caught.value.exit_code == 143
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found and found[0] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.fault
def test_a_damaged_checkpoint_is_passed_over(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(shards, tmp_path / "whole")
    with pytest.raises(Killed):
        run(shards, tmp_path / "cut", SETTINGS, dying(source(shards), 5))
    newest = max((tmp_path / "cut" / "checkpoints").glob("*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resumed = run(shards, tmp_path / "cut")
    assert "is damaged" in caplog.text and same(whole, resumed)


def test_a_checkpoint_without_its_json_was_never_saved(shards: Shards, tmp_path: Path) -> None:
    run(shards, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000006.json").unlink()
    assert checkpoint.newest(folder) is None
    checkpoint.prune(folder, 2)
    assert list(folder.iterdir()) == []


def test_norms_and_biases_are_not_decayed_and_the_backbone_has_its_own_rate() -> None:
    optimizer = make_optimizer(network(), "adamw", 0.003, 0.1, 0.01, 0.9)
    groups = optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(network().parameters()))
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert {round(g["peak_lr"], 6) for g in groups} == {0.003, 0.0003}


@pytest.mark.fault
def test_a_killed_loader_process_is_a_clear_failure(shards: Shards, tmp_path: Path) -> None:
    def murderous(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        before = {p.pid for p in multiprocessing.active_children()}
        for number, batch in enumerate(source(shards, 10_000, workers=2)(step), step):
            if number == 2:
                workers = [p for p in multiprocessing.active_children() if p.pid not in before]
                assert len(workers) == 2
                workers[0].kill()
            yield batch

    start = time.monotonic()
    with pytest.raises(RoadsegError, match="a loader process died; memory or /dev/shm may be full.*run again to go on"):
        run(shards, tmp_path, replace(SETTINGS, steps=10_000, validate_every=10_000), murderous)
    assert time.monotonic() - start < 60
    assert checkpoint.newest(tmp_path / "checkpoints")


def test_timing_is_kept_apart_from_history(shards: Shards, tmp_path: Path) -> None:
    run(shards, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert all(set(r) <= {"step", "loss", "learning_rate", "split", "miou", "pixel_accuracy"} for r in rows)
    verdict = json.loads((tmp_path / "log" / "bottleneck.json").read_text())
    assert verdict["steps"] == SETTINGS.steps - 1 and verdict["bottleneck"] in ("compute", "data")


def losses(work: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(work / "history.jsonl") if "loss" in row]


def plain(net: DeepLabV3Plus) -> DeepLabV3Plus:
    """Batch norm by its running statistics and no dropout: a micro-batch sees what the whole batch sees."""
    freeze(net, ("batch_norm",))
    net.dropout.share = 0.0
    return net


def test_micro_batches_give_the_steps_of_the_whole_batch(shards: Shards, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=4, learning_rate=0.001)
    for parts in (1, 2, 4):
        run(shards, tmp_path / str(parts), replace(settings, accumulate=parts), net=plain(network()))
    whole = losses(tmp_path / "1")
    assert len(whole) == 4
    for parts in ("2", "4"):
        assert losses(tmp_path / parts) == pytest.approx(whole, rel=2e-4)


def two_stretches(shards: Shards) -> list[TrainingPhase]:
    """Crops of 32x64 at stride 16, then of 48x64 at stride 8."""

    def crops(size: tuple[int, int], last: int) -> Source:
        made = Crops(shards.split("train"), Augmentation(size), SETTINGS.seed, (120, 120, 120))
        order = Order(made.split.frames, SETTINGS.seed)
        return lambda step, stopped=bool: batches_from_workers(
            made, Batches(order, 4, step, last), 0, CPU, stopped=stopped
        )

    return [
        TrainingPhase(first=0, last=4, output_stride=16, batches=crops((32, 64), 4)),
        TrainingPhase(first=4, last=6, output_stride=8, batches=crops((48, 64), 6)),
    ]


def test_a_later_stretch_has_its_own_crops_and_stride_and_is_resumed(shards: Shards, tmp_path: Path) -> None:
    whole = run(shards, tmp_path / "whole", stretches=two_stretches(shards))
    assert whole.architecture.output_stride == 8
    for at in (2, 5):
        parts = [replace(p, batches=dying(p.batches, at)) for p in two_stretches(shards)]
        with pytest.raises(Killed):
            run(shards, tmp_path / "cut", stretches=parts)
    resumed = run(shards, tmp_path / "cut", stretches=two_stretches(shards))
    assert resumed.architecture == whole.architecture and same(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize("at", [None, 1, 5], ids=["to the end", "ended in the first stretch", "in the second"])
def test_every_stretchs_graph_is_freed_however_it_ends(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | None
) -> None:
    """NCCL waits for ever to be left while a graph with its messages in it stands."""
    made: list[Any] = []

    class Watched(Gradients):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)
            self._graph = self.graph = Graph()  # type: ignore[assignment]

        def _part(self, *arguments: Any) -> torch.Tensor:
            assert self._graph is not None
            return self._compute(*arguments)

    class Graph:
        freed = 0

        def reset(self) -> None:
            self.freed += 1

    monkeypatch.setattr(loop, "Gradients", Watched)
    parts = [p if at is None else replace(p, batches=dying(p.batches, at)) for p in two_stretches(shards)]
    with nullcontext() if at is None else pytest.raises(Killed):
        run(shards, tmp_path, stretches=parts)
    assert [gradients.graph.freed for gradients in made] == [1] * (1 if at == 1 else 2)


@pytest.mark.parametrize("early", [False, True], ids=["while it compiles", "before"])
def test_a_signal_to_what_compiles_ends_it_at_once_and_loses_nothing(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    whole = run(shards, tmp_path / "whole", stretches=two_stretches(shards))
    compiled: list[int] = []

    def kill_self() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def slow_compile(net: DeepLabV3Plus, dynamic: bool) -> Callable[[torch.Tensor], Any]:
        def forward(image: torch.Tensor) -> Any:
            compiled.append(net.architecture.output_stride)
            if not early and compiled == [16] * 4 + [8]:
                kill_self()
                time.sleep(20)
            return net(image)

        return forward

    def save(folder: Path, step: int, *rest: Any) -> None:
        saved(folder, step, *rest)
        if early and step == 4:
            kill_self()

    saved = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(torch, "compile", slow_compile)
    settings, began = replace(SETTINGS, compiled=True, checkpoint_every=100, validate_every=100), time.monotonic()
    said = (
        "SIGTERM after step 4" if early else "SIGTERM while the network was compiled, after step 4; run again to go on"
    )
    with pytest.raises(Interrupted, match=said) as caught:
        run(shards, tmp_path / "cut", settings, stretches=two_stretches(shards))
    assert caught.value.exit_code == 143 and time.monotonic() - began < 15
    assert len(compiled) == (4 if early else 5) and (found := checkpoint.newest(tmp_path / "cut" / "checkpoints"))
    assert found[0] == 4
    assert same(whole, run(shards, tmp_path / "cut", settings, stretches=two_stretches(shards)))


def test_run_again_after_its_last_step_it_has_the_last_stride(shards: Shards, tmp_path: Path) -> None:
    first = run(shards, tmp_path, stretches=two_stretches(shards))
    again = run(shards, tmp_path, stretches=two_stretches(shards))  # killed before the archive was written
    assert again.architecture == first.architecture and again.architecture.output_stride == 8
    still = replace(SETTINGS, learning_rate=1e-12, ema_decay=0.0, validate_every=1, patience=1)
    for _ in range(2):  # ends in the first stretch: what ships has the stride that it was trained and scored at
        ended = run(shards, tmp_path / "ended", still, stretches=two_stretches(shards))
        assert len(losses(tmp_path / "ended")) == 2 and ended.architecture.output_stride == 16


@pytest.mark.fault
def test_a_signal_in_a_validation_loses_neither_steps_nor_the_validation(shards: Shards, tmp_path: Path) -> None:
    settings = replace(SETTINGS, checkpoint_every=100)
    whole = run(shards, tmp_path / "whole", settings)
    val = shards.split("val")

    class Terminating:
        def __len__(self) -> int:
            return len(val)

        def read(self, index: int) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return val.read(index)

    stretches = [TrainingPhase(first=0, last=6, output_stride=16, batches=source(shards))]
    with pytest.raises(Interrupted, match="SIGTERM after step 3"):
        (tmp_path / "cut").mkdir()
        frames: Any = Terminating()
        train(network(), stretches, {"val": frames}, THREE, criterion(), settings, CPU, tmp_path / "cut")
    found = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert found and found[0] == 3
    resumed = run(shards, tmp_path / "cut", settings)
    assert same(whole, resumed)
    assert (tmp_path / "whole" / "history.jsonl").read_bytes() == (tmp_path / "cut" / "history.jsonl").read_bytes()


def test_it_ends_when_val_stands_still_and_never_for_a_held_out_split(shards: Shards, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=8, learning_rate=1e-12, ema_decay=0.0, validate_every=2, patience=2)
    run(shards, tmp_path / "val", settings)
    assert len(losses(tmp_path / "val")) == 6  # the first score, and two that are no better
    run(shards, tmp_path / "val", settings)  # run again, it knows that it has ended
    assert len(losses(tmp_path / "val")) == 6
    run(shards, tmp_path / "held", settings, split="holdout")
    assert len(losses(tmp_path / "held")) == 8


STALLS = """
import sys, time
from pathlib import Path
import torch
sys.path[:0] = {paths!r}
from test_loop import *
from roadseg.errors import DataError, RoadsegError
from roadseg.data.batches.loader import Crops
from roadseg.data.shards.index import Shards

plain, calls = Crops.crop, [0]
def crop(self, sample, out=None):
    calls[0] += 1
    if calls[0] > 8:
        {trouble}
    return plain(self, sample, out)
Crops.crop = crop
torch.set_num_threads(1)
shards = Shards.load(Path(sys.argv[1]))
settings = replace(SETTINGS, steps=1000, validate_every=1000, checkpoint_every=1000)
try:
    run(shards, Path(sys.argv[2]), settings, source(shards, 1000, workers=2))
except RoadsegError as kept:  # its traceback holds the loader
    print(type(kept).__name__, kept, flush=True)
    sys.exit(kept.exit_code)
"""


def started(trouble: str, shards: Shards, work: Path) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = STALLS.format(trouble=trouble, paths=paths)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(shards.folder), str(work)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.fault
def test_an_error_inside_a_worker_ends_the_run_with_its_own_message(shards: Shards, tmp_path: Path) -> None:
    process = started(
        "raise DataError('the bytes are damaged', where='train-0.bin', todo='run again')", shards, tmp_path
    )
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert out.strip() == "DataError train-0.bin: the bytes are damaged; run again"


@pytest.mark.fault
def test_sigterm_is_answered_with_a_checkpoint_while_workers_are_held_up(shards: Shards, tmp_path: Path) -> None:
    process = started("time.sleep(300)", shards, tmp_path)
    try:
        history = tmp_path / "checkpoints"
        time.sleep(12)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        while not list(history.glob("*.safetensors")) and time.monotonic() - sent < 30:
            time.sleep(0.2)
        assert list(history.glob("*.safetensors")), "no checkpoint within 30 s"
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step" in out


@pytest.mark.fault
def test_a_signal_after_the_last_steps_question_is_answered(shards: Shards, tmp_path: Path) -> None:
    def draw(average: torch.nn.Module, step: int) -> None:
        if step == SETTINGS.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    stretches = [TrainingPhase(first=0, last=SETTINGS.steps, output_stride=16, batches=source(shards))]
    with pytest.raises(Interrupted, match="SIGTERM after step 6"):
        train(
            network(), stretches, {"val": shards.split("val")}, THREE, criterion(), SETTINGS, CPU, tmp_path, draw=draw
        )
    assert (checkpoint.newest(tmp_path / "checkpoints") or (0,))[0] == 6


class Device:
    """Takes STEP_S for each step, one after the other, while the loop goes on."""

    step_s, free_s = 0.05, 0.0

    class Event:
        def __init__(self) -> None:
            self.at_s = max(time.monotonic(), Device.free_s)

        def synchronize(self) -> None:
            time.sleep(max(0.0, self.at_s - time.monotonic()))

        def elapsed_time(self, later: "Device.Event") -> float:
            return 1000 * (later.at_s - self.at_s)

    class Gradients:
        compiles = False

        def __init__(self, *given: Any, **named: Any) -> None:
            pass

        def __call__(self, batch: Batch) -> torch.Tensor:
            Device.free_s = max(time.monotonic(), Device.free_s) + Device.step_s
            return torch.tensor(1.0)

        def close(self) -> None:
            pass


@pytest.mark.parametrize(
    ("loader_s", "least", "most"), [(0.02, 0.0, 0.1), (0.1, 0.25, 0.65)], ids=["loader is faster", "device is faster"]
)
def test_waiting_is_what_the_device_waits(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader_s: float, least: float, most: float
) -> None:
    Device.free_s = 0.0
    monkeypatch.setattr(loop, "Gradients", Device.Gradients)
    monkeypatch.setattr(loop, "record_event", lambda device: Device.Event())
    one = next(source(shards)(0))

    def slow(step: int, stopped: Callable[[], object] = bool) -> Generator[Batch, None, None]:
        ready_s = 0.0
        for _ in range(step, 30):  # one ahead, as by a process of its own
            time.sleep(max(0.0, ready_s - time.monotonic()))
            ready_s = time.monotonic() + loader_s
            yield one

    s = replace(SETTINGS, steps=30, validate_every=100, checkpoint_every=100, clip_norm=0.0, optimizer="sgd")
    work = tmp_path / "work"
    work.mkdir()
    train(
        network(),
        [TrainingPhase(first=0, last=30, output_stride=16, batches=slow)],
        {},
        THREE,
        criterion(),
        s,
        CPU,
        work,
    )
    said = json.loads((work / "log" / "bottleneck.json").read_text())
    assert least <= said["waiting_share"] <= most, said
    per_step_s = 4 / said["images_per_s"]
    assert max(loader_s, Device.step_s) * 0.95 < per_step_s < max(loader_s, Device.step_s) * 3


def test_each_steps_loss_is_told_once(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, real = [], loop.Timing.step  # type: ignore[attr-defined]
    monkeypatch.setattr(loop.Timing, "step", lambda self, *a: told.append((a[0], round(a[4], 6))) or real(self, *a))  # type: ignore[attr-defined]
    run(shards, tmp_path / "work")
    rows = read_json_lines(tmp_path / "work" / "history.jsonl")
    assert told == [(row["step"], row["loss"]) for row in rows if "loss" in row]
