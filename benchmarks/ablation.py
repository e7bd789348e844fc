"""The ablation on CamVid: single changes to a base config, planned as `roadseg sweep` does, and one table of them.

    python benchmarks/ablation.py --data CAMVID [--steps 2000] [--seeds 3] [--budget-s 560] [--only fusion loss]
    python benchmarks/ablation.py --data CAMVID --recipe --only base     the config as it is, at full length, its seeds
    python benchmarks/ablation.py --data CAMVID --recipe --steps 5000    changes to the config, at another length
    python benchmarks/ablation.py --cpu-latency | --gpu-latency | --table | --list

Start it again and again: results lie in STATE/ablation.json (small, to be carried between machines), and a run
that the budget stopped goes on from its checkpoint where WORKSPACE is still there. Order: the base with every seed,
every change with the first, then more seeds for changes within --close points of the base. A run counts for its
config, so a changed base starts anew; changed code does not: take another --state for that. On several GPUs
start it once for each, with one --state and --workspace: they share the runs out (CUDA_VISIBLE_DEVICES=0 ... & ...).

The base is --config with what suits a short run (PROXY), or as it is (--recipe); at another length its weights are
forgotten over the same share of the run, by another weight decay. Nothing is exported: that would take a fifth of a
short run's time. Scores are the training loop's own at its last step (history.jsonl): the averaged
network on whole frames, single scale, bf16 on CUDA, val and the held-out drive. Where the config asks for class
offsets, ablation.json and the lines of the runs have the scores with them beside; the table is without. Latency is
that of the network from uint8 image to logits, batch 1, random weights: on the GPU in fp16, channels last; on the
CPU by onnxruntime with one thread.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import math
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import cpu_name
from model_table import gmac

import roadseg
from roadseg.config.sections import Config, load_config, merge
from roadseg.config.training import Loss
from roadseg.data.shards.index import Shards
from roadseg.errors import Interrupted, RoadsegError
from roadseg.files import json_bytes, read_json, read_json_lines, sha256_bytes, write_atomic, write_json
from roadseg.model import Architecture, DeepLabV3Plus, build
from roadseg.release.export import export_onnx
from roadseg.sweep.plan import BASE, Plan, Point, Setting, plan
from roadseg.sweep.run import forget, interruptible
from roadseg.sweep.table import Result, Row, Spread, rows, spread_text
from roadseg.train import stage
from roadseg.train.version import VERSION

HEIGHT, WIDTH, CLASSES = 360, 480, 11
HOLDOUT = "holdout"
ROUNDS = 5
EXTRA_TERMS = {"cross_entropy": 1.0, "ohem": 1.0, "focal": 1.0, "lovasz": 0.5, "dice": 0.5, "boundary": 0.5, "rmi": 0.5}

# What a run of 2,000 steps has otherwise than the recipe: the default backbone with the full halvings, as finer maps
# take three times as long a step; weights that are forgotten over a quarter of the run; no mixing of classes, which
# asks for a longer one; and cross-entropy beside Lovász, so that what either is worth can be seen.
PROXY: dict[str, Any] = {
    "model": {
        "backbone": "mobilenetv2_100",
        "early_strides": [2, 2],
        "output_stride": 16,
        "atrous_rates": [3, 6, 9],
        "low_levels": [8, 4],
    },
    "training": {
        "weight_decay": 0.5,
        "loss": {"cross_entropy": 1, "lovasz": 0.5},
        "augment": {"class_mix": 0},
        "class_offsets": False,
    },
}

# What is the base's own already is left out of the plan.
CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"fusion {name}", {"model.fusion": name}) for name in ("concat", "mean", "sknet", "dense", "skfusion")),
    ("EMA off", {"training.ema_decay": 0}),
    *((f"class weights {name}", {"training.class_weights": name}) for name in ("none", "enet", "median")),
    ("label smoothing off", {"training.label_smoothing": 0}),
    ("label smoothing 0.1", {"training.label_smoothing": 0.1}),
    ("auxiliary heads off", {"training.auxiliary_weight": 0}),
    *((f"low levels {' '.join(map(str, s))}", {"model.low_levels": s}) for s in ([8, 4, 2], [8, 4], [4])),
    *((f"rates {' '.join(map(str, r))}", {"model.atrous_rates": r}) for r in ([3, 6, 9], [6, 12, 18])),
    *((f"head {name}", {"model.head": name}) for name in ("separable", "dense")),
    *(
        (f"backbone {name}", {"model.backbone": name})
        for name in ("lcnet_100", "tinynet_b", "mixnet_s", "semnasnet_075")
    ),
    (
        "backbone mobilenetv2_100, early strides 1 2, output stride 8, low levels 4",
        {
            "model.backbone": "mobilenetv2_100",
            "model.early_strides": [1, 2],
            "model.output_stride": 8,
            "model.atrous_rates": [6, 12, 18],
            "model.low_levels": [4],
        },
    ),
    (
        "backbone resnet18 of widths 64 96 144 192",
        {"model.backbone": "resnet18", "model.backbone_options": {"channels": [64, 96, 144, 192]}},
    ),
    *((f"drop path {rate}", {"model.backbone_options": {"drop_path_rate": rate}}) for rate in (0.1, 0.2)),
    ("resolution: crops of 240x320", {"training.crop_px": [240, 320]}),
    (
        "resolution: crops of 240x320, then 360x480 for the last half",
        {"training.crop_px": [240, 320], "training.phases": [{"after": 0.5, "crop_px": [360, 480]}]},
    ),
    ("output stride 8, rates 6 12 18", {"model.output_stride": 8, "model.atrous_rates": [6, 12, 18]}),
    *(
        (
            f"early strides {' '.join(map(str, early))}, output stride 8, low levels {low}",
            {
                "model.early_strides": early,
                "model.output_stride": 8,
                "model.atrous_rates": [6, 12, 18],
                "model.low_levels": [low],
            },
        )
        for early, low in (([2, 1], 4), ([1, 2], 4), ([1, 1], 2))
    ),
    ("output stride 8 for the last quarter", {"training.phases": [{"after": 0.75, "output_stride": 8}]}),
    *((f"class_mix {share:g}", {"training.augment": {"class_mix": share}}) for share in (0.5, 1)),
    ("class_uniform 0.5", {"training.class_uniform": 0.5}),
    ("rotation off", {"training.augment": {"rotate_deg": 0}}),
    ("learning rate 0.002, weight decay 1", {"training.learning_rate": 0.002, "training.weight_decay": 1.0}),
    ("cosine", {"training.scheduler": "cosine"}),
)


def changes(base: Config) -> list[Setting]:
    """The base, CHANGES, and what is told by the base's own values.

    That is each term of the loss, added where the base lacks it and left out where it has it; cross-entropy and
    weight decay doubled; and a learning rate that stays at its mean, averaged over the run's last eighth.
    """
    t = base.training
    loss = {name: getattr(t.loss, name) for name in Loss.model_fields}
    terms = []
    for term, weight in loss.items():
        if not weight:
            terms.append(Setting(f"loss + {EXTRA_TERMS[term]:g} {term}", {"training.loss": {term: EXTRA_TERMS[term]}}))
        elif sum(map(bool, loss.values())) > 1:
            terms.append(Setting(f"loss without {term}", {"training.loss": {term: 0}}))
    stays = [{"after": 0.75, "output_stride": base.model.output_stride}]  # a phase at the base's own stride
    named = [Setting(name, values) for name, values in CHANGES if values.get("training.phases") != stays]
    steady: dict[str, Any] = {"training.scheduler": "constant", "training.learning_rate": t.learning_rate / 2}
    steady["training.ema_decay"] = max(0.0, round(1 - 8 / t.steps, 6)) if t.steps else t.ema_decay
    scaled = [
        Setting("cross_entropy doubled", {"training.loss": {"cross_entropy": 2 * t.loss.cross_entropy}}),
        Setting("weight decay doubled", {"training.weight_decay": 2 * t.weight_decay}),
        Setting("half the learning rate, constant, EMA over an eighth of the run", steady),
    ]
    return [Setting(BASE), *terms, *named, *scaled]


def base_config(a: argparse.Namespace) -> Config:
    training: dict[str, Any] = {"pictures": 0, "compile": a.compile}
    if a.steps:
        training |= {"steps": a.steps, "epochs": None, "validate_every": a.steps}
    if a.steps and a.recipe:
        shipped = load_config(a.config).training
        if not shipped.steps:
            raise SystemExit(f"{a.config} counts epochs: for another length it has to say training.steps")
        training["weight_decay"] = round(shipped.weight_decay * shipped.steps / a.steps, 4)
    given = {"data": {"root": a.data, "holdout_sequences": [a.holdout]}, "training": training}
    return load_config(a.config, given if a.recipe else merge(PROXY, given))


# ---- what was found so far ------------------------------------------------------------------


class State:
    """ablation.json: results by the digest of their config, figures of networks by that of their architecture."""

    def __init__(self, folder: Path, out: Path | None) -> None:
        self._folder, self._out = folder, out
        folder.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Take in what other processes found meanwhile."""
        path = self._folder / "ablation.json"
        known = read_json(path) if path.exists() else {}
        for key, run in known.get("runs", {}).items():
            if key not in self.runs or self.runs[key]["error"]:
                self.runs[key] = run
        self.networks = {**known.get("networks", {}), **self.networks}

    def save(self) -> None:
        with self._locked("writing", wait=True):
            self.read()
            for folder in (self._folder, *([self._out] if self._out else [])):
                write_json(folder / "ablation.json", {"runs": self.runs, "networks": self.networks})

    @contextmanager
    def claimed(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Inside, no other process claims `key`; False if one does now and we are not to wait."""
        try:
            with self._locked(key, wait=wait):
                yield True
        except BlockingIOError:
            yield False

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[None]:
        (self._folder / "locks").mkdir(exist_ok=True)
        with open(self._folder / "locks" / name, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its holder
            yield

    def results(self, points: Mapping[tuple[str, int], Point]) -> list[Result]:
        """Of these points; a result counts for its config, whatever it was called when it was made."""
        found = ((point, self.runs.get(digest(point.config))) for point in points.values())
        known = {f.name for f in fields(Result)} - {"name", "setting", "seed"}
        return [Result(p.name, p.setting, p.seed, **{k: run[k] for k in known}) for p, run in found if run]


def digest(config: Config) -> str:
    key = config.key_fields()
    about = [VERSION, key["model"], key["training"], key["transform"], config.data.source, key["data"]]
    return sha256_bytes(json_bytes(about))[:16]


def architecture_of(config: Config) -> Architecture:
    """Of the network that ships: at the last phase's output stride, without auxiliary heads.

    Rates follow the stride, as in set_output_stride; where they can't, the training refuses the config.
    """
    given = {f.name: getattr(config.model, f.name) for f in fields(Architecture) if hasattr(config.model, f.name)}
    stride: int = config.model.output_stride
    rates: tuple[int, ...] = config.model.atrous_rates
    for to in (phase.output_stride for phase in config.training.phases if phase.output_stride):
        stride, rates = to, tuple(rate * stride // to for rate in rates)
    return Architecture(**{**given, "num_classes": CLASSES, "output_stride": stride, "atrous_rates": rates})


def network_key(architecture: Architecture) -> str:
    return sha256_bytes(json_bytes(architecture.to_json()))[:16]


# ---- training -------------------------------------------------------------------------------


def queue(
    made: Plan, points: Mapping[tuple[str, int], Point], state: State, close_points: float, every_seed: bool
) -> Iterator[Point]:
    """What is to be trained next, most wanted first; asked anew after every run, as later ones depend on it.

    What failed in an earlier start is tried again, once a start.
    """
    first = made.seeds[0]
    tried: set[str] = set()

    def wanted() -> Iterator[tuple[str, int]]:
        yield from ((made.base, seed) for seed in made.seeds)
        yield from ((setting.label, first) for setting in made.settings)
        table = {row.setting: row for row in rows(state.results(points), made.base, HOLDOUT)}
        for seed in made.seeds[1:]:
            for setting in made.settings:
                row = table.get(setting.label)
                if every_seed or (row and near(row, close_points)):
                    yield setting.label, seed

    def done(key: str) -> bool:
        return key in tried or (key in state.runs and not state.runs[key]["error"])

    while True:
        state.read()
        left = (points[key] for key in wanted() if not done(digest(points[key].config)))
        if (point := next(left, None)) is None:
            return
        tried.add(digest(point.config))
        yield point


def near(row: Row, close_points: float) -> bool:
    """Is it within so many points of the base on the held-out drive, which --holdout always makes?"""
    found = row.difference.get(HOLDOUT)
    return found is not None and abs(found.mean) * 100 < close_points


def train_all(made: Plan, a: argparse.Namespace, state: State, began_s: float) -> None:
    """Train what the budget allows. A run that it cuts short keeps its checkpoint in the workspace."""
    points = {(point.setting, point.seed): point for point in made.points}
    with state.claimed("data", wait=True):
        data = roadseg.run(made.points[0].config, until="transform", workspace=a.workspace).outputs["transform"]
    shards = Shards.load(data.folder)
    timer = threading.Timer(max(0.0, began_s + a.budget_s - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        with interruptible():
            for point in queue(made, points, state, a.close, a.every_seed):
                left_s = began_s + a.budget_s - time.monotonic()
                longest_s = max((run["wall_s"] for run in state.runs.values() if not run["error"]), default=0.0)
                if a.whole and left_s < 1.1 * longest_s:
                    print(f"{left_s:.0f} s are left, a run takes {longest_s:.0f} s: not started", flush=True)
                    return
                with state.claimed(key := digest(point.config)) as mine:
                    state.read()
                    if not mine or (key in state.runs and not state.runs[key]["error"]):
                        continue
                    print(f"{point.name} {point.setting}, seed {point.seed} ({left_s:.0f} s left)", flush=True)
                    started = time.monotonic()
                    result = trained(point, shards, a.workspace / "ablation" / key)
                    state.runs[key] = {**asdict(result), "wall_s": round(time.monotonic() - started, 1)}
                    state.save()
                    print(f"  {point.setting}, seed {point.seed}: {result.error or scored(result)}", flush=True)
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"stopped ({str(e) or 'by a signal'}); start it again to go on", flush=True)
    finally:
        timer.cancel()


def trained(point: Point, shards: Shards, work: Path) -> Result:
    """What the training of `point` gave. What can't be trained is recorded; a signal raises Interrupted."""
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with patch.object(stage, "write_candidate", lambda *_: None):
            stage.train_candidate(point.config, shards, work)
    except Interrupted:
        raise
    except RoadsegError as e:
        return Result(point.name, point.setting, point.seed, error=str(e))
    finally:
        forget()
    last = {row["split"]: row["miou"] for row in read_json_lines(work / "history.jsonl") if "split" in row}
    fingerprints = {split: shards.fingerprints[split] for split in last}
    if (offsets := work / "log" / "class_offsets.json").exists():
        for split, miou in read_json(offsets)["miou"].items():
            last[f"{split}, offsets"], fingerprints[f"{split}, offsets"] = miou, shards.fingerprints[split]
    timing = work / "log" / "bottleneck.json"  # not there if the last start had no step left, only the validation
    return Result(
        point.name,
        point.setting,
        point.seed,
        train_key=digest(point.config),
        miou=last,
        fingerprints=fingerprints,
        train_seconds=time.monotonic() - started,
        images_per_s=read_json(timing)["images_per_s"] if timing.exists() else None,
    )


def scored(result: Result) -> str:
    mious = ", ".join(f"{split} {100 * (miou or 0):.2f} %" for split, miou in sorted(result.miou.items()))
    return f"mIoU: {mious}; {result.images_per_s or '?'} images/s, {result.train_seconds or 0:.0f} s"


# ---- figures of the networks ----------------------------------------------------------------


def sizes(made: Plan, state: State) -> None:
    """Parameters and GMAC of every distinct network that is not known yet."""
    for architecture in distinct(made):
        known = state.networks.setdefault(network_key(architecture), {})
        if "gmac" not in known:
            network = build(architecture, seed=0).inference_network()
            known |= {"parameters": network.count_parameters(), "gmac": round(gmac(network, HEIGHT, WIDTH), 3)}


def distinct(made: Plan) -> list[Architecture]:
    return list({network_key(a): a for point in made.points if (a := architecture_of(point.config))}.values())


def gpu_latency(made: Plan, state: State) -> None:
    """Milliseconds of one image, launched eagerly and as one CUDA graph: medians of interleaved rounds."""
    image = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8, device="cuda")
    image = image.contiguous(memory_format=torch.channels_last)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    with torch.inference_mode():
        for architecture in distinct(made):
            network = build(architecture, seed=0).inference_network().cuda().half()
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            calls[network_key(architecture), "gpu_eager_ms"] = lambda network=network: network(image)  # type: ignore[misc]
            calls[network_key(architecture), "gpu_graph_ms"] = captured(network, image)
        keep_medians(calls, state, runs=50, wait=torch.cuda.synchronize)
    for key, _ in calls:
        state.networks[key]["gpu"] = torch.cuda.get_device_name()


def captured(network: DeepLabV3Plus, image: torch.Tensor) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            network(image)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(image)
    return graph.replay


def cpu_latency(made: Plan, state: State) -> None:
    """Milliseconds of one image in onnxruntime with one thread: medians of interleaved rounds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    image = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8).numpy()
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in distinct(made):
            path = Path(folder) / f"{network_key(architecture)}.onnx"
            export_onnx(build(architecture, seed=0).inference_network(), path)
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            calls[path.stem, "cpu_ms"] = lambda session=session: session.run(None, {"image": image})  # type: ignore[misc]
        keep_medians(calls, state, runs=4, wait=lambda: None)
    for key, _ in calls:
        state.networks[key]["cpu"] = cpu_name()


def keep_medians(
    calls: Mapping[tuple[str, str], Callable[[], object]], state: State, runs: int, wait: Callable[[], object]
) -> None:
    took: dict[tuple[str, str], list[float]] = {form: [] for form in calls}
    for round_ in range(ROUNDS + 1):
        for form, call in calls.items():
            for _ in range(runs):
                wait()
                start = time.perf_counter()
                call()
                wait()
                if round_:  # the first only warms up
                    took[form].append(1000 * (time.perf_counter() - start))
    for (key, name), milliseconds in took.items():
        state.networks[key][name] = round(statistics.median(milliseconds), 3)


# ---- the table ------------------------------------------------------------------------------


def table(made: Plan, state: State) -> str:
    points = {(point.setting, point.seed): point for point in made.points}
    known = {row.setting: row for row in rows(state.results(points), made.base, HOLDOUT)}
    order = [*known, *(s.label for s in made.settings if s.label not in known)]
    heads = ["change", "parameters", f"GMAC at {HEIGHT}x{WIDTH}", "GPU eager ms", "GPU graph ms", "CPU ms"]
    heads += [f"mIoU of {HOLDOUT}", "to the base", "mIoU of val", "to the base", "images/s in training", "seeds"]
    machines = sorted({str(n[k]) for n in state.networks.values() for k in ("gpu", "cpu") if k in n})
    lines = [
        f"{made.points[0].config.training.steps} steps a run. Scores: the training loop's at the last step "
        "(history.jsonl): averaged network, whole frames, single scale. Latency: "
        f"{', '.join(machines) or 'not measured'}; batch 1, GPU fp16, CPU one thread. Differences of means, in "
        "points; bold: more than twice their standard error, taking the base's deviation for all.\n",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for label in order:
        network = state.networks.get(network_key(architecture_of(points[label, made.seeds[0]].config)), {})
        lines.append("| " + " | ".join([label, *cells(network, known.get(label), known.get(made.base))]) + " |")
    failed = [run for row in known.values() for run in row.runs if run.error]
    return "\n".join([*lines, *(f"\nfailed: {r.setting}, seed {r.seed}: {r.error}" for r in failed)]) + "\n"


def cells(network: Mapping[str, Any], row: Row | None, base: Row | None) -> list[str]:
    size = [f"{network['parameters'] / 1e6:.2f}M", f"{network['gmac']:.2f}"] if "gmac" in network else ["", ""]
    times = [f"{network[k]:.2f}" if k in network else "" for k in ("gpu_eager_ms", "gpu_graph_ms", "cpu_ms")]
    if row is None:
        return [*size, *times, "", "", "", "", "", "0"]
    scores = []
    for split in (HOLDOUT, "val"):
        ours = row.miou.get(split)
        scores += [spread_text(ours), against(ours, base.miou.get(split)) if base and base is not row else ""]
    rate = f"{row.images_per_s.mean:.0f}" if row.images_per_s else ""
    return [*size, *times, *scores, rate, str(sum(not run.error for run in row.runs))]


def against(ours: Spread | None, base: Spread | None) -> str:
    """The difference of the means in points. Paired seeds would carry one base run's noise into all of its seed."""
    if ours is None or base is None:
        return ""
    points = 100 * (ours.mean - base.mean)
    error = 100 * (base.deviation or math.inf) * math.sqrt(1 / ours.n + 1 / base.n)
    text = f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if abs(points) > 2 * error else text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("camvid"), help="CamVid: train/, trainannot/, val/, ...")
    parser.add_argument("--config", type=Path, default=Path("configs/camvid.yaml"))
    parser.add_argument("--holdout", default="0006R0", help="sequence taken out of train")
    parser.add_argument("--steps", type=int, help="of a run; 2000 if not told, the config's with --recipe")
    parser.add_argument("--recipe", action="store_true", help="the config as it is; compiles if not told")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, help="the config's if not told")
    parser.add_argument("--budget-s", type=float, default=560.0, help="stop after so many seconds")
    parser.add_argument("--whole", action="store_true", help="start no run that the budget would cut short")
    parser.add_argument("--close", type=float, default=1.0, help="points within which a change gets every seed")
    parser.add_argument("--every-seed", action="store_true", help="every seed for every change")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="changes whose name holds one of these")
    parser.add_argument("--compile", help="training.compile; never for short runs: it takes longer than they gain")
    parser.add_argument("--state", type=Path, default=Path("workspace/ablation"), help="folder of ablation.json")
    parser.add_argument("--out", type=Path, help="a second folder to write ablation.json and ablation.md into")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    for name in ("cpu-latency", "gpu-latency", "table", "list"):
        parser.add_argument(f"--{name}", action="store_true")
    a = parser.parse_args()
    a.steps = a.steps or (None if a.recipe else 2000)
    a.compile = a.compile or ("auto" if a.recipe else "never")
    return a


def main() -> None:
    began_s, a = time.monotonic(), arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    base = base_config(a)
    chosen = [s for s in changes(base) if s.label == BASE or not a.only or any(t in s.label for t in a.only)]
    first = base.training.seed if a.first_seed is None else a.first_seed
    made = plan("ablation", base, chosen, range(first, first + a.seeds))
    if a.list:
        print(*(setting.label for setting in made.settings), sep="\n")
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{gpu}, {cpu_name()}, PyTorch {torch.__version__}, Python {platform.python_version()}", flush=True)
    state = State(a.state, a.out)
    sizes(made, state)
    if a.cpu_latency:
        cpu_latency(made, state)
    if a.gpu_latency:
        gpu_latency(made, state)
    if not (a.cpu_latency or a.gpu_latency or a.table):
        train_all(made, a, state, began_s)
    state.save()
    text = table(made, state)
    for folder in (a.state, *([a.out] if a.out else [])):
        write_atomic(folder / "ablation.md", text.encode())
    print("\n" + text)


if __name__ == "__main__":
    main()
