"""A small benchmarks/planted_faults.py: 126 town frames, every kind of fault once, all found, no false errors."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from roadseg.config.sections import Data
from roadseg.town.tree import write_tree

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPLITS = {"train": 66, "val": 30, "test": 30}  # two sequences per city in train; enough to compare splits


@pytest.fixture(scope="module")
def planted_faults() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("planted_faults")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("town") / "tree"
    write_tree(root, SPLITS, 0, 128, 64, "clear", 1)
    return root


def test_the_clean_town_has_no_errors(planted_faults, town):
    found = planted_faults.findings_of(town, Data(source="cityscapes", root=town), 1)
    assert [f for f in found if f.severity == "error"] == []
    assert {f.code for f in found} <= {"near-duplicate-in-split", "class-missing"}


def test_every_planted_fault_is_found_and_nothing_else(planted_faults, town, tmp_path):
    planted, kinds = 0, set()
    for name, tree in planted_faults.trees(town, None, tmp_path, 1):
        plants, missed, wrong = planted_faults.judge(name, tree, 1)
        assert (name, missed, wrong) == (name, [], [])
        planted += len(plants)
        kinds |= {p.code for p in plants}
    assert planted >= 60 and len(kinds) >= 40


def test_a_missing_fault_is_reported_as_missed(planted_faults, town):
    """The benchmark itself can fail."""
    found = planted_faults.findings_of(town, Data(source="cityscapes", root=town), 1)
    assert not planted_faults.is_found(planted_faults.Plant("none", "swapped", "leftImg8bit"), found)
    tree = planted_faults.Tree(town, Data(source="cityscapes", root=town), {})
    error = planted_faults.Finding("swapped", "error", "val", ("a.png: is no image",), 1, "m", "f")
    assert planted_faults.false_errors(tree, [error]) == ["swapped: a.png: is no image"]
    tree.touched.add("a.png")
    assert planted_faults.false_errors(tree, [error]) == []


def test_planted_faults_in_camvid(planted_faults, real_data, tmp_path):
    camvid = planted_faults.copy_of(real_data / "camvid", tmp_path / "camvid")
    found = planted_faults.findings_of(camvid, Data(source="camvid", root=camvid), 2)
    assert [f.code for f in found if f.severity == "error"] == []
    assert "same-sequence" in {f.code for f in found}
    tree = planted_faults.camvid_files(planted_faults.copy_tree(camvid, tmp_path / "planted"))
    _, missed, wrong = planted_faults.judge("CamVid", tree, 2)
    assert missed == wrong == []
