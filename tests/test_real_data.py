"""All stages on real frames at full size; skipped without ROADSEG_REAL_DATA."""

import json
from pathlib import Path

import cv2
import pytest

from roadseg.cli.main import main


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_real_cityscapes_frames_through_all_stages(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    flags = ["--config", Path(__file__).parent / "micro.yaml", "--workspace", workspace, "--data.source", "cityscapes"]
    flags += ["--data.root", real_data / "cityscapes-mini", "--training.steps", 1, "--training.crop-px", 256, 512]
    assert run("run", *flags) == 0
    metrics = json.loads(next(workspace.glob("stages/evaluate/*/metrics.json")).read_text())
    assert metrics["images"] == 1 and metrics["split"] == "val" and metrics["class_iou"]["road"] is not None
    assert metrics["pixels"] > 1_500_000  # of 2,097,152; the rest is void
    frame = next((real_data / "cityscapes-mini").glob("leftImg8bit/val/*/*.png"))
    assert run("predict", frame, "--out", tmp_path / "out", "--workspace", workspace, "--ids", "labelIds") == 0
    label = cv2.imread(str(tmp_path / "out" / f"{frame.stem}_labelIds.png"), cv2.IMREAD_UNCHANGED)
    assert label.shape == (1024, 2048)
    assert "unchanged" not in capsys.readouterr().out
