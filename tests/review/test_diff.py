"""`roadseg data diff` and `roadseg data errors`, from the command line to the verdict."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from roadseg.cli.main import main
from roadseg.errors import DataError, RoadsegError
from roadseg.release.archive import load_release
from roadseg.review.data_profile import Profile
from roadseg.review.diff import data_diff
from tests.conftest import MICRO, Micro


@pytest.fixture
def workspace(micro: Micro, tmp_path: Path) -> Path:
    """A copy, because the workspace of `micro` is read-only."""
    return Path(shutil.copytree(micro.workspace, tmp_path / "copy"))


def town(path: Path, **options: object) -> str:
    frames = {"train": 24, "val": 2, "width_px": 96, "height_px": 48, **options}
    path.write_text(yaml.safe_dump({"data": {"source": "town", "town": frames}}))
    return str(path)


def test_a_release_stores_its_data_profile(micro: Micro) -> None:
    release = load_release(micro.result.outputs["train"].folder / "model.tar.gz")
    profile = Profile.from_json(release.model["data_profile"])
    assert profile.images == len(profile.values["exposure"]) == len(profile.embeddings)
    assert set(profile.class_pixels) and profile.embedded_by


def test_a_release_against_its_own_data_and_against_night(micro: Micro, workspace: Path, tmp_path: Path) -> None:
    own = data_diff("champion", str(MICRO), micro.config, workspace=workspace)
    by_name = {r.quantity: r for r in own.rows}
    assert by_name["classes"].score == pytest.approx(0, abs=1e-6) and own.verdict in ("same", "not compared")
    assert "trained" not in own.text and own.text.splitlines()[0].startswith("A  town train, ")
    night = town(tmp_path / "night.yaml", weather="night")
    other = data_diff("champion", night, micro.config, workspace=workspace)
    assert {r.quantity for r in other.rows} == set(by_name)


def test_night_is_a_different_population_than_day(micro: Micro, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    day, again = town(tmp_path / "day.yaml"), town(tmp_path / "again.yaml", seed=1)
    night = town(tmp_path / "night.yaml", seed=1, weather="night")
    workspace = ["--workspace", str(tmp_path / "w")]
    assert main(["data", "diff", day, night, *workspace, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    verdicts = {row["quantity"]: row["verdict"] for row in found["rows"]}
    assert found["verdict"] == "different" and verdicts["exposure"] == "different"
    assert verdicts["backbone's view"] == "not compared"  # no release for embeddings
    assert main(["data", "diff", day, again + ":train", *workspace]) == 0
    text = capsys.readouterr().out
    assert "verdict  " in text and "verdict  different" not in text


def test_wrong_arguments_are_refused(
    micro: Micro, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    empty = ["--workspace", str(tmp_path / "w")]
    assert main(["data", "diff", "one", *empty]) == 2
    assert "roadseg data diff A B" in capsys.readouterr().err
    assert main(["data", "diff", "nonsense", "other", *empty]) != 0
    assert "Traceback" not in capsys.readouterr().err
    day = town(tmp_path / "day.yaml")
    with pytest.raises(DataError) as e:
        data_diff(day + ":test", day, micro.config, workspace=tmp_path / "w")
    assert "'test'" in e.value.found
    with pytest.raises(RoadsegError):
        data_diff(str(tmp_path / "nowhere.yaml"), "champion", micro.config, workspace=workspace)


def test_errors_lists_suspect_labels_and_writes_a_page(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("cleanlab")
    arguments = ["data", "errors", "--config", str(MICRO), "--workspace", str(workspace), "--name", "doubts"]
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr()
    assert re.search(r"^labels of town val by release \w{12}, trained on town; --config, or data.s", output.err, re.M)
    found = json.loads(output.out)
    assert all(0 < row["share"] <= 1 and row["pairs"] for row in found)
    assert (workspace / "runs" / "doubts" / "label_errors.html").read_text().startswith("<!doctype html>")
    assert main([*arguments, "extra"]) == 2
