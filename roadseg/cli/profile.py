"""`roadseg profile`: parameters, MACs, memory and latency of a config's or a release's network."""

from __future__ import annotations

import argparse
import copy
import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadseg.config.sections import Config
from roadseg.config.training import Training
from roadseg.errors import UsageError
from roadseg.files import write_json

if TYPE_CHECKING:
    import torch

    from roadseg.model.deeplab import DeepLabV3Plus
    from roadseg.profile.cost import Cost
    from roadseg.profile.latency import Latency
    from roadseg.release.archive import Release
    from roadseg.train.recipe import Recipe

log = logging.getLogger(__name__)
MOST_CLASSES = 255  # then comes void


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", metavar="HxW", help="of an image, in px; default: the recipe's own crop, its last")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images that are inferred at once")
    parser.add_argument(
        "--runs", type=int, default=30, metavar="N", help="timed, fewer if they take over 20 s; 0: count only"
    )
    parser.add_argument("--classes", type=int, metavar="K", help="default: those of data.source")
    parser.add_argument("--release", metavar="R", help="champion, a digest or a path: it instead of the config's model")
    parser.add_argument("--no-onnx", action="store_true", help="don't export and time the graph by onnxruntime")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def profile(a: argparse.Namespace, config: Config) -> int:
    for name, value, least in (("--batch", a.batch, 1), ("--runs", a.runs, 0)):
        if value < least:
            raise UsageError(f"{name} {value}", expected=f"{least} or more")
    release = _release(a, config)
    classes = _classes(a, config, release)
    from roadseg.profile.cost import cost
    from roadseg.profile.latency import machine
    from roadseg.train.device import choose_device
    from roadseg.train.recipe import recipe_of

    t = config.training
    device = choose_device(t.device)
    recipe = recipe_of(config, num_classes=classes, device_type=device.type)
    bf16 = recipe.loop.bf16
    (height, width), size_from = _size(a.size, config, release, recipe.phases[-1].crop_px)
    image_BHW = (a.batch, height, width)
    network, graph = _network(recipe, release)
    phases = [(phase.crop_px, None if release else phase.output_stride) for phase in recipe.phases]
    trained, crops_BHW = _costliest(network, phases, t, bf16)
    moments = 2 if t.optimizer != "sgd" else int(t.momentum > 0)
    counted = cost(network, image_BHW, crops_BHW, bf16, moments, trained)
    _require_memory(counted, device)
    inference = network.inference_network()
    measured = _measure(a, config, inference, graph, image_BHW, device, bf16) if a.runs else []
    figures: dict[str, Any] = {
        "machine": machine(device),
        "device": str(device),
        "precision": "bf16" if bf16 else "fp32",
        "architecture": network.architecture.to_json(),
        "image_BHW": image_BHW,
        "size_from": size_from,
        "crops_BHW": crops_BHW,
        "training_output_stride": trained.architecture.output_stride,
        **counted.to_json(),
        "cuda_bf16": _on_cuda(network, image_BHW, trained, crops_BHW) if t.precision == "auto" and not bf16 else None,
        "latency": [latency.to_json() for latency in measured],
    }
    print(_page(figures, counted, measured, t))
    if a.json:
        write_json(a.json, figures)
        print(f"{'figures':<9} {a.json}")
    return 0


def _release(a: argparse.Namespace, config: Config) -> Release | None:
    if a.release is None:
        return None
    if a.classes is not None:
        raise UsageError(f"--classes {a.classes} of a release", expected="--release or --classes")
    from roadseg.release.archive import load_release
    from roadseg.release.store.resolve import find_release

    return load_release(find_release(config, a.workspace, a.release))


def _size(
    given: str | None, config: Config, release: Release | None, crop_px: tuple[int, int]
) -> tuple[tuple[int, int], str]:
    """Height and width, and their origin: --size, or the last crop size of the release's training, else crop_px."""
    if given is not None:
        return _parsed(given, config.data.max_image_pixels), "--size"
    own = release.model.get("config", {}).get("training", {}) if release else {}
    crops = [crop for place in (own, *own.get("phases", ())) if (crop := place.get("crop_px"))]
    source = "the release's training"
    if not crops:
        crops = [crop_px]
        source = "training.phases" if any(p.crop_px for p in config.training.phases) else "training.crop_px"
    return _parsed("x".join(map(str, crops[-1])), config.data.max_image_pixels), source


def _parsed(text: str, most_pixels: int) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if not found:
        raise UsageError(f"--size {text!r}", expected="height x width in px, such as 1024x2048")
    height, width = int(found[1]), int(found[2])
    if height * width > most_pixels:
        raise UsageError(
            f"--size {text}: {height * width:,} pixels", expected=f"at most {most_pixels:,} (data.max_image_pixels)"
        )
    return height, width


def _network(recipe: Recipe, release: Release | None) -> tuple[DeepLabV3Plus, bytes]:
    """What ships, so after the last phase. Random weights cost what trained ones do.

    A release brings its graph, "" means that it is to be exported.
    """
    from roadseg.model.deeplab import build
    from roadseg.model.surgery import set_output_stride

    if release:
        from roadseg.release.network import load_network

        return load_network(release), release.onnx
    network = build(recipe.architecture, seed=0)
    set_output_stride(network, recipe.phases[-1].output_stride)
    return network, b""


def _costliest(
    network: DeepLabV3Plus, phases: list[tuple[tuple[int, int], int | None]], t: Training, bf16: bool
) -> tuple[DeepLabV3Plus, tuple[int, int, int]]:
    """The network and the crops, BHW, of the phase whose training step needs the most memory."""
    from roadseg.model.surgery import set_output_stride
    from roadseg.profile.cost import saved_by_part

    batch, forms = _micro_batch(t), []
    for (height, width), stride in dict.fromkeys(phases):
        form = copy.deepcopy(network)
        if stride is not None:
            set_output_stride(form, stride)
        forms.append((form, (batch, height, width)))
    if len(forms) == 1:
        return forms[0]
    return max(forms, key=lambda form: sum(saved_by_part(form[0], form[1], bf16).values()))


def _on_cuda(
    network: DeepLabV3Plus, image_BHW: tuple[int, int, int], trained: DeepLabV3Plus, crops_BHW: tuple[int, int, int]
) -> dict[str, int]:
    """What the recipe's memory is where it is trained in bf16, as this machine's own precision is another."""
    from roadseg.profile.cost import peak_bytes, saved_by_part

    return {
        "inference_peak_bytes": peak_bytes(network, image_BHW, True),
        "training_saved_bytes": sum(saved_by_part(trained, crops_BHW, True).values()),
    }


def _classes(a: argparse.Namespace, config: Config, release: Release | None) -> int:
    if release:
        return release.label_set.num_classes
    if a.classes is None:
        from roadseg.ingest.sources.select import label_set_of

        return label_set_of(config.data).num_classes
    if not 1 <= a.classes <= MOST_CLASSES:
        raise UsageError(f"--classes {a.classes}", expected=f"1 to {MOST_CLASSES}")
    classes: int = a.classes
    return classes


def _micro_batch(t: Training) -> int:
    """Crops that one GPU takes at once; of given GPUs, so many need not be here to be counted for."""
    from roadseg.train.device import processes_per_machine

    return -(-t.batch_size // (t.accumulate * (t.gpus or processes_per_machine(t.gpus, t.device))))


def _require_memory(counted: Cost, device: torch.device) -> None:
    from roadseg.profile.latency import memory_bytes

    there = memory_bytes(device)
    if there and counted.peak_bytes > there:
        raise UsageError(
            f"one inference needs {counted.peak_bytes / 1e9:.1f} GB",
            expected=f"at most the {there / 1e9:.1f} GB of {device}",
            where="--size and --batch",
            todo="take smaller ones, or --runs 0 to count only",
        )


def _measure(
    a: argparse.Namespace,
    config: Config,
    network: DeepLabV3Plus,
    graph: bytes,
    image_BHW: tuple[int, int, int],
    device: torch.device,
    bf16: bool,
) -> list[Latency]:
    from roadseg.profile.latency import onnx_latency, torch_latency

    measured = [torch_latency(network, image_BHW, device, bf16, a.runs)]
    if a.no_onnx:
        return measured
    if not graph:
        from roadseg.release.export import export_onnx

        with tempfile.TemporaryDirectory() as folder:
            export_onnx(network, Path(folder) / "model.onnx")
            graph = (Path(folder) / "model.onnx").read_bytes()
    return [*measured, onnx_latency(graph, image_BHW, config.evaluation.threads, a.runs)]


def _page(figures: dict[str, Any], counted: Cost, measured: list[Latency], t: Training) -> str:
    from roadseg.profile.cost import AUXILIARY, LOSS

    batch, height, width = figures["image_BHW"]
    crops, crop_height, crop_width = figures["crops_BHW"]
    costliest = f", stride {figures['training_output_stride']}" * bool(t.phases)
    rows = [
        [
            "",
            "parameters",
            f"GMAC, {batch} x {height}x{width}",
            f"MB kept, {crops} x {crop_height}x{crop_width}{costliest}, {figures['precision']}",
        ]
    ]
    for p in counted.parts:
        if p.name == AUXILIARY:
            continue
        parameters = f"{p.parameters:,}" if p.name != LOSS else ""
        rows.append([p.name, parameters, _giga(p.macs) if p.macs else "", _mega(p.saved_bytes)])
    rows.append(["inference", f"{counted.parameters:,}", _giga(counted.macs), ""])
    rows += [
        [f"+ {AUXILIARY}", f"{p.parameters:,}", _giga(p.macs), _mega(p.saved_bytes)]
        for p in counted.parts
        if p.name == AUXILIARY
    ]
    rows.append(["training step", "", "", _mega(counted.saved_bytes)])
    notes = _memory(figures, counted, t)
    if measured:
        speed = [["latency, image to logits", "threads", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"]]
        for m in measured:
            ms = [f"{v:.2f}" for v in (m.p50_ms, m.p90_ms, m.p99_ms)]
            speed.append([m.runtime, str(m.threads), str(m.runs), *ms, f"{m.images_per_s:.2f}"])
        notes += ["", _columns(speed), f"          on {figures['machine']}"]
        notes += [f"          at most {_mega(m.peak_bytes)} MB beyond the weights" for m in measured if m.peak_bytes]
    model = ", ".join(f"{key} {value}" for key, value in figures["architecture"].items() if key != "auxiliary")
    another = "" if figures["size_from"] == "--size" else "; --size HxW takes another"
    size = f"size      {height}x{width}, from {figures['size_from']}{another}"
    return "\n".join([f"model     {model}", size, "", _columns(rows), "", *notes])


def _memory(figures: dict[str, Any], counted: Cost, t: Training) -> list[str]:
    notes = [
        f"memory    inference {_mega(counted.peak_bytes)} MB of maps at its peak; training "
        f"{_mega(counted.saved_bytes)} MB kept for backward + {_mega(counted.state_bytes)} MB of weights, "
        f"gradients, {t.optimizer}'s state and average ({figures['precision']}; libraries' workspaces not counted)"
    ]
    if cuda := figures["cuda_bf16"]:
        notes.append(
            "          on CUDA, where training.precision auto is bf16: inference "
            f"{_mega(cuda['inference_peak_bytes'])} MB; training {_mega(cuda['training_saved_bytes'])} MB kept"
        )
    if t.activation_checkpointing:
        notes.append("          training.activation_checkpointing keeps less of the backbone than is counted here")
    return notes


def _mega(count: float) -> str:
    from roadseg.profile.cost import three_digits

    return three_digits(count / 1e6)


def _giga(count: float) -> str:
    return _mega(count / 1000)


def _columns(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
    )
