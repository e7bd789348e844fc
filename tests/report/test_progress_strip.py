"""The same frames over a training, as a strip within a limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from roadseg.images.decode import encode_jpeg, read_image
from roadseg.report.progress_strip import grid, name_of, progress_strip


def panel(color: tuple[int, int, int], noise: int = 0, size: tuple[int, int] = (40, 80)) -> np.ndarray:
    rng = np.random.default_rng(sum(color))
    base = np.full((*size, 3), color, np.int16)
    return (base + rng.integers(-noise, noise + 1, base.shape)).clip(0, 255).astype(np.uint8)


def save(folder: Path, step: int, color: tuple[int, int, int], **how: object) -> None:
    rows = [[panel((90, 90, 90), **how), panel((0, 200, 0), **how), panel(color, **how)] for _ in range(2)]  # type: ignore[arg-type]
    (folder / name_of(step)).write_bytes(encode_jpeg(grid(rows), 95))


def test_frames_and_truth_once_and_a_prediction_a_step(tmp_path: Path) -> None:
    save(tmp_path, 10, (200, 0, 0))
    save(tmp_path, 1200, (0, 0, 200))
    shown = progress_strip(tmp_path)
    assert [caption for caption, _ in shown] == ["Frame", "Truth", "Step 10", "Step 1,200"]
    for (_, data), color in zip(shown, ((90, 90, 90), (0, 200, 0), (200, 0, 0), (0, 0, 200)), strict=True):
        image = read_image(data)
        assert image.shape == (2 * 40 + 4, 80, 3)
        for top in (0, 44):
            assert np.abs(image[top + 4 : top + 36, 6:74].mean((0, 1)) - color).max() < 6


def test_no_pictures_no_strip(tmp_path: Path) -> None:
    assert progress_strip(tmp_path / "none") == [] and progress_strip(tmp_path) == []


def test_a_damaged_picture_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, 1, (9, 9, 9))
    save(tmp_path, 2, (9, 9, 9))
    (tmp_path / name_of(2)).write_bytes((tmp_path / name_of(2)).read_bytes()[:200])
    assert [caption for caption, _ in progress_strip(tmp_path)] == ["Frame", "Truth", "Step 1"]


def test_a_smaller_limit_means_narrower_columns_then_fewer_steps(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step, (step, 100, 100), noise=60, size=(100, 400))
    limit, seen = 10**9, []
    while shown := progress_strip(tmp_path, limit):
        size = sum(len(data) for _, data in shown)
        assert size <= limit
        seen.append((read_image(shown[0][1]).shape[1], [caption.removeprefix("Step ") for caption, _ in shown[2:]]))
        limit = size - 1
    every = list("123456789")
    assert seen == [(360, every), (240, every), (160, every), (160, list("13579")), (160, list("159")),
                    (160, list("19")), (160, ["9"])]  # fmt: skip
