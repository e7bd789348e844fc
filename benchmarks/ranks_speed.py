"""Images a second of training on 1 and on several GPUs, and whether both compute the same.

    PYTHONPATH=. python benchmarks/ranks_speed.py [--gpus 2] [--size 768x768] [--batch 16] [--rounds 2] [--only speed]

Everything goes through the command line, as a user would: `roadseg transform` renders town frames and
makes their shards, `roadseg train` trains the default model on them from files.
1. Equality: the same batch over all GPUs, fp32 (without TF32) and bf16, in crops of --compared-size and in
   deterministic mode, with the terms of the loss that are defined on a whole batch, so that one GPU does the same again
   and all differ by rounding alone; the largest relative difference of the losses up to some steps of SGD. What
   rounding comes to is told by one GPU whose backbone starts with each weight a last bit up or down; beside
   it all GPUs without sync-BN, which is another computation.
2. Speed: the batch of each GPU is kept. Runs with 1 and with all GPUs in turn, and one without sync-BN, to see
   what its messages cost; images/s are the medians of training's own rows (log/timing.jsonl, one every ten
   seconds), the first of each run left out, in which steps are eager and the CUDA graph is captured. Then SIGTERM
   ends the run: nothing is exported.
On two H200s the frames take 14 s, a run of the speed part 65 s and the equality part 90 s. That part also runs on the
CPU: --device cpu --size 48x96 --compared-size 48x96 --batch 2 --backbone test_efficientnet --only curves.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import cpu_name
from safetensors.torch import load_file, save_file

from roadseg.files import read_json_lines
from roadseg.model.backbone import create_backbone

NO_SYNC = ("--training.sync-batch-norm", "False")
LIMIT_S = {"never": 150.0, "always": 400.0}  # for one run, start and compilation included


class Training:
    """`roadseg train` in a workspace of its own below `folder`, the data's outputs linked into it."""

    def __init__(
        self, a: argparse.Namespace, folder: Path, name: str, gpus: int, *flags: str, tf32: bool = True
    ) -> None:
        self.workspace, self.log = folder / name, folder / f"{name}.log"
        (self.workspace / "stages").mkdir(parents=True)
        for stage in ("ingest", "transform"):
            (self.workspace / "stages" / stage).symlink_to(a.frames_in / "stages" / stage)
        self.limit_s = LIMIT_S[a.compile]
        command = [*roadseg(a, "train", self.workspace), "--training.gpus", str(gpus), *flags]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(tf32))

    def rows(self, name: str) -> list[dict[str, float]]:
        path = next(self.workspace.glob(f"stages/train/*.partial/{name}"), None)
        return read_json_lines(path) if path else []

    def until(self, enough: Callable[[], bool]) -> None:
        """Wait, then stop it politely; say what it said if it ends by itself."""
        end = time.monotonic() + self.limit_s
        while not enough() and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.2)
        met = enough()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        said = self.log.read_text()
        if not met or code != 128 + signal.SIGTERM:
            raise SystemExit(f"{self.workspace.name} ended with {code}:\n{said[-3000:]}")
        for line in said.splitlines():
            if any(words in line for words in ("steps stay eager", "is not compiled", "recompile_limit")):
                print(f"{self.workspace.name}: {line}", flush=True)


def environment(tf32: bool = True) -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return {**os.environ, **own, **({} if tf32 else {"NVIDIA_TF32_OVERRIDE": "0"})}


def roadseg(a: argparse.Namespace, command: str, workspace: Path) -> list[str]:
    height, width = map(int, a.size.split("x"))
    section = {
        "data.source": "town", "data.town.train": a.frames, "data.town.val": 2, "data.town.seed": 1,
        "data.town.width-px": width * 4 // 3, "data.town.height-px": height * 4 // 3,
        "model.backbone": a.backbone, "training.device": a.device,
        "training.class-weights": "enet", "training.pictures": 0, "training.compile": a.compile,
    }  # fmt: skip
    flags = [word for key, value in section.items() for word in (f"--{key}", str(value))]
    if command == "train":
        flags += ["--model.backbone-weights", str(a.weights)]
    return [sys.executable, "-m", "roadseg.cli", command, "--workspace", str(workspace), *flags]


def random_weights(a: argparse.Namespace, path: Path) -> Path:
    torch.manual_seed(0)
    save_file(create_backbone(a.backbone, 16).state_dict(), path)
    return path


def nudged_weights(path: Path) -> Path:
    """The same with every weight's last bit up or down, by chance."""
    torch.manual_seed(1)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = torch.nextafter(tensor, (torch.rand_like(tensor) - 0.5).sign() * torch.inf)
    save_file(tensors, to := path.with_stem("nudged"))
    return to


def crop(size: str) -> list[str]:
    return ["--training.crop-px", *size.split("x")]


def speed(
    a: argparse.Namespace, folder: Path, name: str, gpus: int, flags: tuple[str, ...]
) -> tuple[list[float], list[float]]:
    """(images/s, share of time waiting for data) of each ten seconds after the first."""
    steps = ["--training.steps", "1000000", "--training.validate-every", "1000000"]
    run = Training(a, folder, name, gpus, "--training.batch-size", str(a.batch * gpus), *crop(a.size), *steps, *flags)
    run.until(lambda: len(run.rows("log/timing.jsonl")) > a.rows)
    rows = run.rows("log/timing.jsonl")[1:]
    return [row["images_per_s"] for row in rows], [row["waiting_share"] for row in rows]


def curves(a: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, list[float]]]:
    """(precision, way, losses), one GPU's first; the runs of a precision at once, as nobody looks at their speed."""
    nudged = ("--model.backbone-weights", str(nudged_weights(a.weights)))
    ways = {"1 GPU": (1, ()), "1 GPU again": (1, ()), "1 GPU, a bit off": (1, nudged)}
    ways |= {"all": (a.gpus, ()), "all, no sync-BN": (a.gpus, NO_SYNC)}
    steps = ["--training.steps", "1000000", "--training.validate-every", "1000000", "--training.warmup-steps", "5"]
    steps += ["--training.checkpoint-every", str(a.compared)]
    steps += [*crop(a.compared_size), "--training.deterministic", "True"]
    # Not Adam: of a gradient that is nothing but rounding it makes a whole step, to either side.
    steps += ["--training.optimizer", "sgd", "--training.learning-rate", "0.01"]
    steps += [word for term in ("ohem", "lovasz", "dice") for word in (f"--training.loss.{term}", "0.5")]
    for precision in ("fp32", "bf16") if a.device != "cpu" else ("fp32",):
        batch = ["--training.batch-size", str(a.batch * a.gpus), "--training.precision", precision]
        runs = {}
        try:
            for way, (gpus, flags) in ways.items():
                name = f"{precision} {way}".replace(" ", "-")
                runs[way] = Training(a, folder, name, gpus, *steps, *batch, *flags, tf32=False)
            for way, run in runs.items():
                run.until(lambda run=run: len(run.rows("history.jsonl")) >= a.compared)  # type: ignore[misc]
                yield precision, way, [row["loss"] for row in run.rows("history.jsonl") if "loss" in row][: a.compared]
        finally:
            for run in runs.values():
                run.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--size", default="768x768", help="height x width of a crop; 360x480 is the other one reported")
    parser.add_argument("--batch", type=int, default=16, help="samples of a GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="ten-second rows that count in a run")
    parser.add_argument("--compared", type=int, default=20, help="steps whose losses are compared")
    parser.add_argument("--compared-size", default="256x256", help="crops of those steps")
    parser.add_argument("--only", choices=("curves", "speed"))
    parser.add_argument("--sync-bn", choices=("both", "on", "off"), default="both", help="speed is measured with it")
    parser.add_argument("--frames-in", type=Path, help="workspace of the frames, to have them made once")
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--compile", default="never", choices=("never", "always"))
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    began = time.monotonic()
    what = cpu_name() if a.device == "cpu" else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(f"{what}, PyTorch {torch.__version__}, Python {platform.python_version()}, {a.batch} x {a.size} a GPU")
    with tempfile.TemporaryDirectory(prefix="ranks-speed-") as text:
        folder = Path(text)
        a.frames_in = (a.frames_in or folder / "data").absolute()
        a.weights = random_weights(a, folder / "random.safetensors")
        subprocess.run(roadseg(a, "transform", a.frames_in), check=True, capture_output=True, env=environment())
        print(f"{a.frames} frames and their shards: {time.monotonic() - began:.0f} s", flush=True)
        alone: list[float] = []
        for precision, way, losses in () if a.only == "speed" else curves(a, folder):
            alone = losses if way == "1 GPU" else alone
            apart = [abs(x - y) / abs(y) for x, y in zip(losses, alone, strict=True)]
            upto = ", ".join(f"{max(apart[:n]):.1e} in {n}" for n in (1, 5, a.compared))
            print(
                f"{precision}, {way:<16} loss {losses[0]:.5f} to {losses[-1]:.5f}; differs by up to {upto} steps",
                flush=True,
            )
        print(f"{time.monotonic() - began:.0f} s so far", flush=True)
        if a.only == "curves":
            return
        ways: dict[str, tuple[int, tuple[str, ...]]] = {"1": (1, ()), f"{a.gpus}": (a.gpus, ())}
        ways[f"{a.gpus}, no sync-BN"] = (a.gpus, NO_SYNC)
        if a.sync_bn != "both":
            del ways[f"{a.gpus}" if a.sync_bn == "off" else f"{a.gpus}, no sync-BN"]
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(a.rounds):
            for i, (way, (gpus, flags)) in enumerate(ways.items()):
                images, waiting = speed(a, folder, f"speed-{i}-{round_}", gpus, flags)
                rates[way] += images
                print(f"{way} GPU: {images} images/s, {max(waiting):.1%} waiting for data", flush=True)
    print("| GPUs | images/s | times one GPU |\n|---|---|---|")
    for way, images in rates.items():
        rate, one = statistics.median(images), statistics.median(rates["1"])
        print(f"| {way} | {rate:.0f} | {rate / one:.3f} |")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
