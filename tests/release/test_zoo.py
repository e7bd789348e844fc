"""zoo/: the releases that ship with the project are what their cards, the table and the config say."""

import json
import re
from pathlib import Path

import pytest

from roadseg.cli.main import main
from roadseg.config.sections import load_config
from roadseg.release.archive import load_release

ROOT = Path(__file__).parents[2]
RELEASES = sorted((ROOT / "zoo").glob("*.tar.gz"))


def scored(path: Path) -> str:
    """mIoU in percent, as the card says."""
    found = re.search(r"mIoU \*\*([\d.]+) %\*\*", path.with_name(path.name.replace(".tar.gz", ".md")).read_text())
    assert found
    return found[1]


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.name)
def test_a_release_is_what_its_card_and_the_table_say(path: Path) -> None:
    release, card = load_release(path), path.with_name(path.name.replace(".tar.gz", ".md")).read_text()
    assert f"`{release.digest}`" in card and f"commit `{release.model['code_commit']}`" in card
    row = next(line for line in (path.parent / "README.md").read_text().splitlines() if f"]({path.name})" in line)
    size_mb = path.stat().st_size / 1e6
    assert size_mb <= 16 and f"| {float(scored(path)):.1f} % mIoU" in row and f"| {size_mb:.1f} MB |" in row
    assert f"| {release.model['parameters'] / 1e6:.2f} M |" in row and len(release.onnx) > 1_000_000


def test_camvid_from_scratch_was_made_by_its_config() -> None:
    made = load_release(ROOT / "zoo" / "camvid-scratch.tar.gz").model["config"]
    recipe = load_config(ROOT / "configs" / "camvid.yaml").key_fields()
    for section in ("model", "training"):  # a key that came later has a default
        assert made[section] == {key: recipe[section][key] for key in made[section]}


def test_camvid_from_scratch_scores_what_its_card_says(real_data: Path, tmp_path: Path) -> None:
    path = ROOT / "zoo" / "camvid-scratch.tar.gz"
    flags = ["--data.source", "camvid", "--data.root", str(real_data / "camvid"), "--workspace", str(tmp_path)]
    assert main(["evaluate", "--release", str(path), *flags]) == 0
    metrics = json.loads(next(tmp_path.glob("stages/evaluate/*/metrics.json")).read_text())
    assert 100 * metrics["miou"] == pytest.approx(float(scored(path)), abs=0.05)  # processors round differently
