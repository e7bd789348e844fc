"""Frame, truth and prediction at every validation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from roadseg.data.shards.index import Shards
from roadseg.labels import IGNORE
from roadseg.model import Architecture, build
from roadseg.report.progress_strip import step_of
from roadseg.train.tracking.pictures import KEPT, PANEL_PX, Pictures, evenly, panels, thinned
from tests.conftest import THREE

CPU = torch.device("cpu")


class Says(nn.Module):
    """One class everywhere, at half the image's size."""

    def __init__(self, train_id: int) -> None:
        super().__init__()
        self.train_id = train_id
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.uint8 and image.shape[1] == 3
        logits = torch.zeros(len(image), 3, image.shape[2] // 2, image.shape[3] // 2)
        logits[:, self.train_id] = 5
        return logits


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1].astype(int)


def test_a_row_a_frame_with_frame_truth_and_prediction(shards: Shards, tmp_path: Path) -> None:
    split = shards.split("val")
    path = Pictures(split, THREE, [0, 2], tmp_path / "log" / "pictures").draw(Says(2), 1200, CPU, False)
    assert path == tmp_path / "log" / "pictures" / "step-00001200.jpg"
    picture = read(path)
    assert picture.shape == (48 + 4 + 48, 3 * 96 + 2 * 4, 3)
    for top, index in ((0, 0), (52, 2)):
        image, label = split.read(index)
        sky, void = np.nonzero(label[:20] == 1)[0].max(), label[-1, 0]
        assert void == IGNORE and sky
        cells = [picture[top : top + 48, 100 * i : 100 * i + 96] for i in range(3)]
        assert np.abs(cells[0][:40].mean((0, 1)) - image[:40].mean((0, 1))).max() < 4
        assert np.abs(cells[1][:20].mean((0, 1)) - THREE.palette[1]).max() < 8
        assert np.abs(cells[2][:40].mean((0, 1)) - THREE.palette[2]).max() < 8
        assert cells[1][-1].mean() < 60


def test_panels_are_shrunk_and_void_is_dark() -> None:
    image = np.full((600, 1920, 3), 200, np.uint8)
    label = np.zeros((600, 1920), np.uint8)
    label[300:] = IGNORE
    shown, truth, predicted = panels(image, label, np.full_like(label, 2), THREE.palette)
    assert shown.shape == truth.shape == predicted.shape == (150, PANEL_PX, 3)
    assert all(p.dtype == np.uint8 for p in (shown, truth, predicted)) and (shown == 200).all()
    assert (truth[:75] == THREE.palette[0]).all() and (truth[75:] == 40).all()
    assert (predicted[:75] == THREE.palette[2]).all() and (predicted[75:] == THREE.palette[2] // 3).all()


def test_frames_of_several_sizes_stand_in_one_grid(tmp_path: Path) -> None:
    class Two:
        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            height, width = ((20, 60), (1000, 30))[index]
            return np.full((height, width, 3), 90, np.uint8), np.zeros((height, width), np.uint8)

    path = Pictures(Two(), THREE, [0, 1], tmp_path).draw(Says(0), 1, CPU, False)  # type: ignore[arg-type]
    assert path and read(path).shape == (2 * PANEL_PX + 4, 3 * 60 + 8, 3)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_weights_give_the_same_bytes_and_keep_their_statistics(
    shards: Shards, tmp_path: Path, bf16: bool
) -> None:
    architecture = Architecture(
        num_classes=3, backbone="test_efficientnet", channels=16, head="separable", atrous_rates=(1, 2)
    )
    network = build(architecture, seed=0).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    made = Pictures(shards.split("val"), THREE, evenly(3, 2), tmp_path)
    files = [made.draw(network, step, CPU, bf16) for step in (1, 2)]
    assert files[0] and files[1] and files[0].read_bytes() == files[1].read_bytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(AssertionError):
        made.draw(network.train(), 3, CPU, bf16)


def test_the_first_the_last_and_ten_between_are_kept(shards: Shards, tmp_path: Path) -> None:
    made = Pictures(shards.split("val"), THREE, [0], tmp_path / "p")
    for step in range(100, 4100, 100):
        made.draw(Says(0), step, CPU, False)
        steps = sorted(step_of(p) for p in (tmp_path / "p").iterdir())
        assert len(steps) <= KEPT and steps[0] == 100 and steps[-1] == step
    gaps = np.diff(steps)
    assert gaps[:-1].max() <= 3 * gaps[:-1].min()


def test_pictures_of_steps_that_were_lost_go(shards: Shards, tmp_path: Path) -> None:
    made = Pictures(shards.split("val"), THREE, [0], tmp_path / "p")
    for step in (3, 6, 9, 6):  # killed after 9, its newest checkpoint was before 6
        made.draw(Says(0), step, CPU, False)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["step-00000003.jpg", "step-00000006.jpg"]


def test_no_frames_no_picture(shards: Shards, tmp_path: Path) -> None:
    assert Pictures(shards.split("val"), THREE, [], tmp_path / "p").draw(Says(0), 1, CPU, False) is None
    assert not (tmp_path / "p").exists()


def test_evenly() -> None:
    assert evenly(101, 5) == [0, 25, 50, 75, 100]
    assert evenly(3, 16) == [0, 1, 2] and evenly(1, 4) == [0] and evenly(0, 4) == [] and evenly(9, 0) == []


def test_thinning_takes_the_picture_nearest_to_its_neighbours() -> None:
    assert thinned([1, 2, 3, 10], 3) == [1, 3, 10] and thinned([5], 3) == [5]
    assert thinned(list(range(0, 130, 10)), 12) == [0, *range(20, 130, 10)]
