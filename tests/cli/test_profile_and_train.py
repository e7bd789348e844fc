"""`roadseg profile`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from roadseg.cli.main import COMMANDS, Command, main
from roadseg.cli.profile import profile, profile_arguments
from roadseg.config.sections import load_config
from roadseg.config.yaml_file import parse_yaml
from roadseg.files import read_json
from roadseg.ingest.sources.select import label_set_of
from roadseg.profile import latency as profile_speed
from tests.conftest import MICRO, Micro, channel_graph

pytestmark = pytest.mark.usefixtures("quiet_log")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(COMMANDS, "profile", Command("what a model costs", profile, profile_arguments))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["profile", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_config_is_counted_and_measured(call, tmp_path: Path) -> None:
    code, out, _ = call(
        "--config", MICRO, "--size", "64x96", "--batch", "2", "--runs", "3", "--no-onnx", "--json", "f.json"
    )
    figures = read_json(tmp_path / "f.json")
    assert code == 0 and figures["image_BHW"] == [2, 64, 96] and figures["crops_BHW"] == [2, 48, 96]
    for part in figures["parts"]:
        assert part["name"] in out and f"{part['parameters']:,}" in out
    assert f"{figures['parameters']:,}" in out and "GMAC, 2 x 64x96" in out
    printed = re.findall(r"\d+\.\d+", out)
    assert printed and all(float(number) for number in printed)  # of the smallest part too
    (m,) = figures["latency"]
    assert 0 < m["p50_ms"] <= m["p90_ms"] <= m["p99_ms"] and m["runs"] == 3 and m["threads"] >= 1
    assert m["images_per_s"] == pytest.approx(2000 / m["p50_ms"]) and m["runtime"] in out
    assert figures["machine"] in out and figures["architecture"]["num_classes"] == 19


def test_without_a_size_it_is_that_of_the_last_crops(call, tmp_path: Path) -> None:
    text, later = MICRO.read_text(), "[48, 80]\n  phases: [{after: 0.5, crop_px: [32, 64]}]"
    for crops, expected, source in (("[48, 80]", "48x80", "crop_px"), (later, "32x64", "phases")):
        (tmp_path / "c.yaml").write_text(text.replace("crop_px: [48, 96]", f"crop_px: {crops}"))
        code, out, _ = call("--config", "c.yaml", "--runs", "0", "--json", "f.json")
        assert code == 0 and f"size      {expected}, from training.{source}; --size HxW takes another" in out
        assert "x".join(map(str, read_json(tmp_path / "f.json")["image_BHW"])) == f"1x{expected}"


def test_a_release_brings_the_size_of_its_training(call, micro: Micro, tmp_path: Path) -> None:
    archive = micro.result.outputs["train"].folder / "model.tar.gz"
    code, out, _ = call("--release", archive, "--runs", "0", "--json", "f.json")
    assert code == 0 and "size      48x96, from the release's training; " in out
    assert read_json(tmp_path / "f.json")["image_BHW"] == [1, 48, 96]


def test_what_bf16_takes_on_cuda_is_said_where_the_machine_computes_in_fp32(call, tmp_path: Path) -> None:
    def figures(precision: str) -> tuple[str, dict]:
        code, out, _ = call("--config", MICRO, "--runs", "0", "--json", "f.json", "--training.precision", precision)
        assert code == 0
        return out, read_json(tmp_path / "f.json")

    (said, auto), (other, half), (_, plain) = (figures(precision) for precision in ("auto", "bf16", "fp32"))
    for key in ("inference_peak_bytes", "training_saved_bytes"):
        assert auto["cuda_bf16"][key] == half[key] < auto[key] == plain[key]
    assert half["cuda_bf16"] is None and plain["cuda_bf16"] is None
    assert "2 x 48x96, fp32" in said and "2 x 48x96, bf16" in other
    (line,) = [line for line in said.splitlines() if "on CUDA" in line]
    assert f"{half['training_saved_bytes'] / 1e6:.3g} MB" in line and "on CUDA" not in other


def test_slow_inferences_are_timed_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(profile_speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def once(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    counts = [len(profile_speed._times(once(seconds), 30, 0, "x")) for seconds in (0.1, 2.0, 60.0)]
    assert counts == [30, 10, profile_speed.LEAST_RUNS]


def test_a_release_brings_its_own_network_and_graph(call, micro: Micro, tmp_path: Path) -> None:
    archive = micro.result.outputs["train"].folder / "model.tar.gz"
    code, out, err = call("--release", archive, "--size", "32x64", "--runs", "1", "--json", "f.json")
    figures = read_json(tmp_path / "f.json")
    assert code == 0 and figures["architecture"]["backbone"] == "test_efficientnet"
    assert figures["parameters"] == micro.result.evaluation["model"]["parameters"]  # type: ignore[index]
    assert [m["runtime"].split()[0] for m in figures["latency"]] == ["torch", "onnxruntime"]
    assert all(m["runtime"] in out and m["images_per_s"] > 0 for m in figures["latency"])
    assert "auxiliary_heads" not in out


def test_counting_alone_follows_the_configs_training_section(call, tmp_path: Path) -> None:
    def figures(*flags: str) -> dict:
        assert call("--config", MICRO, "--size", "32x64", "--runs", "0", "--json", "f.json", *flags)[0] == 0
        return read_json(tmp_path / "f.json")

    plain = figures("--training.batch-size", "8")
    assert plain["latency"] == [] and plain["precision"] == "fp32" and plain["crops_BHW"] == [8, 48, 96]
    parts = figures("--training.batch-size", "8", "--training.accumulate", "4")
    assert parts["crops_BHW"] == [2, 48, 96] and parts["training_saved_bytes"] < plain["training_saved_bytes"] / 3
    half = figures("--training.batch-size", "8", "--training.precision", "bf16")
    assert half["training_saved_bytes"] < 0.75 * plain["training_saved_bytes"] and half["macs"] == plain["macs"]
    sgd = figures("--training.optimizer", "sgd")
    assert sgd["training_state_bytes"] * 5 == plain["training_state_bytes"] * 4
    assert figures("--classes", "7")["architecture"]["num_classes"] == 7


def test_the_last_phase_ships_and_the_costliest_one_needs_the_memory(call, tmp_path: Path) -> None:
    def figures(stride: int = 16, **training: object) -> dict:
        raw = parse_yaml(MICRO.read_text(), "")
        raw["training"] |= training
        raw["model"] |= {"atrous_rates": [16 * r // stride for r in (2, 4, 6)], "output_stride": stride}
        (tmp_path / "c.yaml").write_text(json.dumps(raw))
        assert call("--config", "c.yaml", "--size", "64x64", "--runs", "0", "--json", "f.json")[0] == 0
        return read_json(tmp_path / "f.json")

    fine = figures(8)
    later = figures(phases=[{"after": 0.5, "output_stride": 8}])
    assert later["macs"] == fine["macs"] and later["training_saved_bytes"] == fine["training_saved_bytes"]
    assert later["architecture"]["output_stride"] == 8 and later["architecture"]["atrous_rates"] == [4, 8, 12]
    plain = figures()
    assert plain["macs"] < fine["macs"] and plain["training_saved_bytes"] < fine["training_saved_bytes"]
    # Fine first: it ships coarse and needs the memory of the first phase.
    first = figures(8, phases=[{"after": 0.5, "output_stride": 16}])
    assert first["macs"] == plain["macs"] and first["training_saved_bytes"] == fine["training_saved_bytes"]
    assert first["training_output_stride"] == 8
    larger = figures(
        crop_px=[32, 32], phases=[{"after": 0.2, "crop_px": [48, 96]}, {"after": 0.5, "crop_px": [32, 64]}]
    )
    assert larger["crops_BHW"] == [2, 48, 96] and larger["training_saved_bytes"] == plain["training_saved_bytes"]


def test_no_number_of_gpus_means_all_that_are_there(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = ["--config", MICRO, "--size", "32x64", "--runs", "0", "--json", "f.json", "--training.batch-size", "8"]
    for flags, crops in ((["--training.gpus", "0"], 8), (["--training.gpus", "4"], 2)):  # on a CPU one process
        assert call(*asked, *flags)[0] == 0 and read_json(tmp_path / "f.json")["crops_BHW"][0] == crops
    monkeypatch.setattr("roadseg.train.device.processes_per_machine", lambda gpus, device: 2)
    assert call(*asked, "--training.gpus", "0")[0] == 0 and read_json(tmp_path / "f.json")["crops_BHW"][0] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "1024"], "--size '1024'; expected height x width"),
        (["--size", "0x64"], "--size '0x64'"),
        (["--size", "64 x 64"], "--size '64 x 64'"),
        (["--size", "9000000x9000000"], "81,000,000,000,000 pixels; expected at most 64,000,000"),
        (["--batch", "0"], "--batch 0; expected 1 or more"),
        (["--runs", "-1"], "--runs -1; expected 0 or more"),
        (["--size", "64x64", "--classes", "0"], "--classes 0; expected 1 to 255"),
        (["--classes", "3", "--release", "champion"], "--release or --classes"),
        (["--size", "64x64", "--model.backbone", "mobilenet9"], "no model 'mobilenet9'"),
        (["--size", "64x64", "--training.device", "gpu9"], "training.device"),
        (["--size", "4096x8192", "--batch", "9999"], "one inference needs"),
    ],
)
def test_what_can_not_be_is_refused(call, arguments: list[str], said: str) -> None:
    code, out, err = call("--config", MICRO, *arguments)
    assert code == 2 and said in err and out == ""


def test_how_many_classes_a_source_has() -> None:
    def classes(**data: object) -> int:
        return label_set_of(load_config(None, {"data": data}).data).num_classes

    assert classes(source="town") == 19 and classes(source="camvid") == 11
    assert classes(source="camvid", taxonomy="cityscapes") == 19
    parts = {name: {"source": "camvid", "root": "somewhere"} for name in "ab"}
    assert classes(source="mix", mix=parts) == 19 and classes(source="mix", taxonomy="native", mix=parts) == 11


def test_a_config_without_a_graph_exports_one(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The export itself, which takes seconds, is tested where it lives."""
    graph = channel_graph()
    monkeypatch.setattr("roadseg.release.export.export_onnx", lambda network, path: path.write_bytes(graph))
    assert call("--config", MICRO, "--size", "32x64", "--runs", "2", "--json", "f.json")[0] == 0
    assert [m["runtime"].split()[0] for m in read_json(tmp_path / "f.json")["latency"]] == ["torch", "onnxruntime"]
