"""Releases and files that a training starts from, and what is said of those that are not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roadseg.cli.main import main
from roadseg.config.sections import Config, load_config
from roadseg.errors import ArchiveError, ConfigError, StoreError
from roadseg.files import sha256_file
from roadseg.release.store.base import FolderStore
from roadseg.release.store.resolve import find_release
from roadseg.train.inputs import Inputs, training_inputs
from tests.conftest import MICRO, write_release

RELEASES = ("init_from", "distill_from")


def config(**training: str) -> Config:
    return load_config(None, {"data": {"source": "town"}, "training": training})


def finder(config: Config, workspace: Path) -> Callable[[str], Path]:
    return lambda reference: find_release(config, workspace, reference)


def read_inputs(config: Config, find: Callable[[str], Path]) -> Inputs:
    t = config.training
    return training_inputs(
        find,
        backbone_weights=config.model.backbone_weights,
        weights_from=t.weights_from,
        init_from=t.init_from,
        distill_from=t.distill_from,
    )


def refused(kind: type[Exception], workspace: Path, **training: str) -> Any:
    c = config(**training)
    with pytest.raises(kind) as caught:
        read_inputs(c, finder(c, workspace))
    return caught.value


def test_what_is_named_is_read_and_counts_by_content(tmp_path: Path, release_path: Path) -> None:
    digest = FolderStore(tmp_path / "store").publish(release_path, {})
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    c = config(init_from=digest[:8], distill_from=str(release_path))
    inputs = read_inputs(c, finder(c, tmp_path))
    assert inputs.init is not None and inputs.teacher is not None
    assert inputs.init.release.digest == inputs.teacher.release.digest == digest == sha256_file(inputs.init.archive)
    assert inputs.digests == {"weights": "imagenet", "weights_from": "", "init_from": digest, "distill_from": digest}
    c = config(weights_from=str(tmp_path / "w.safetensors"))
    weights = read_inputs(c, finder(c, tmp_path)).digests["weights_from"]
    assert weights == sha256_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("key", RELEASES)
@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("champion", "there is no champion yet in {store}"),
        ("0123456789", "0 releases match '0123456789' in {store}"),
        ("absent/model.tar.gz", "there is no file 'absent/model.tar.gz'"),
        (".", "'.' is a folder"),
        (__file__, f"{__file__!r} is no archive of a release"),
    ],
)
def test_a_release_that_is_not_there_is_a_wrong_setting(key: str, reference: str, found: str, tmp_path: Path) -> None:
    error = refused(ConfigError, tmp_path, **{key: reference})
    assert error.found == found.format(store=tmp_path / "store")
    assert error.where == f"training.{key}" and "model.tar.gz" in error.expected and error.todo
    assert error.exit_code == 2


def test_a_pickle_in_place_of_a_release_is_told_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    error = refused(ConfigError, tmp_path, init_from=str(tmp_path / "a.pth"))
    assert f"roadseg convert-checkpoint {tmp_path / 'a.pth'} makes" in error.todo and "weights_from" in error.todo


@pytest.mark.parametrize("key", RELEASES)
def test_a_store_that_fails_is_no_wrong_setting(key: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "champion.json").write_text("{")
    error = refused(StoreError, tmp_path, **{key: "champion"})
    assert error.where == str(tmp_path / "store" / "champion.json") and error.exit_code == 1

    def unreachable(reference: str) -> Path:
        try:
            raise OSError
        except OSError:
            raise StoreError("AWS could not be reached", where="s3://bucket") from None  # as aws_errors does

    with pytest.raises(StoreError, match="could not be reached"):
        read_inputs(config(**{key: "s3://bucket"}), unreachable)


def test_an_archive_that_is_damaged_is_no_wrong_setting(tmp_path: Path) -> None:
    path = write_release(tmp_path / "model.tar.gz")
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(ArchiveError, tmp_path, init_from=str(path)).where == str(path)


def test_a_file_of_weights_that_is_not_there(tmp_path: Path) -> None:
    error = refused(ConfigError, tmp_path, weights_from=str(tmp_path / "absent.safetensors"))
    assert error.where == "training.weights_from" and error.expected == "a .safetensors file"
    assert error.found == f"no file '{tmp_path / 'absent.safetensors'}'" and error.todo.startswith("check the name")
    error = refused(ConfigError, tmp_path, weights_from=str(tmp_path))
    assert error.found == f"'{tmp_path}' is a folder" and error.todo == "name the file in it"


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize("key", [*RELEASES, "weights_from"])
def test_it_is_told_before_any_data_is_looked_at(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(MICRO), "--workspace", str(tmp_path), f"--training.{key}", "absent"]
    assert main(["train", *flags]) == 2
    assert f"training.{key}: " in capsys.readouterr().err
    assert not list(tmp_path.glob("stages/*/*"))
