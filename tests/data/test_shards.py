from pathlib import Path

import numpy as np
import pytest
from conftest import THREE, scene

from roadseg.data.shards import Shards
from roadseg.errors import DataError


def test_frames_come_back_bit_for_bit(shards: Shards) -> None:
    loaded = Shards.load(shards.folder)
    assert loaded == shards and loaded.label_set == THREE
    split = loaded.split("train")
    assert len(split) == 6
    for i in range(6):
        image, label = split.read(i)
        expected_image, expected_label = scene(i)
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(label, expected_label)
        assert split.frames[i].name == f"train{i}"


def test_every_flipped_bit_is_found(shards: Shards) -> None:
    path = shards.folder / "train-00000.bin"
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 20):
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        assert shards.damaged() == [("train", 0)]
    path.unlink()
    assert shards.damaged() == [("train", 0)]
    path.write_bytes(whole)
    assert shards.damaged() == []


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema_version": 99}', "[]"])
def test_a_broken_index_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(DataError, match="shards.json"):
        Shards.load(tmp_path)
