"""model.tar.gz: the same bytes for the same model, and nothing that was tampered with gets in."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from roadseg.errors import ArchiveError
from roadseg.files import sha256_file
from roadseg.release import archive
from roadseg.release.archive import MEMBERS, MODEL, ONNX, load_release, load_release_folder
from roadseg.release.graph import WEIGHTS
from tests.conftest import RGB, write_release

Members = list[tuple[tarfile.TarInfo, bytes]]


def unpacked(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def packed(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=form) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def named(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def described(members: Members, change: Callable[[dict], object]) -> Members:
    """With model.json changed in place by `change`, or replaced by what it returns."""
    out = []
    for info, data in members:
        if info.name == MODEL:
            model = json.loads(data)
            result = change(model)
            data = result if isinstance(result, bytes) else json.dumps(model).encode()
        out.append((info, data))
    return out


def test_the_same_model_gives_the_same_bytes_in_another_process_and_place(release_path: Path, tmp_path: Path) -> None:
    again = write_release(tmp_path / "again.tar.gz")
    assert again.read_bytes() == release_path.read_bytes()
    code = "import sys; from pathlib import Path; from conftest import write_release; write_release(Path(sys.argv[1]))"
    other = tmp_path / "other.tar.gz"
    here = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{here}:{here.parent}", "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(other)], env=environment, cwd=tmp_path, check=True)
    assert other.read_bytes() == release_path.read_bytes()


def test_a_release_has_what_was_written(release_path: Path) -> None:
    release = load_release(release_path)
    assert release.digest == sha256_file(release_path)
    assert (release.label_set, release.temperature, release.members[WEIGHTS]) == (RGB, 1.0, b"weights")
    assert release.class_offsets.tolist() == [0, 0, 0]
    assert set(release.members) == MEMBERS
    assert load_release(release_path, release.digest).digest == release.digest
    with tarfile.open(release_path) as tar:  # any tar can read it
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_a_repacked_archive_is_readable_with_another_digest(release_path: Path, tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        again = load_release(packed(tmp_path / "again.tar.gz", unpacked(release_path), form))
        assert again.members == load_release(release_path).members and again.digest != sha256_file(release_path)


def test_an_unpacked_release_has_the_archive_s_digest(release_path: Path, tmp_path: Path) -> None:
    with tarfile.open(release_path) as tar:
        tar.extractall(tmp_path, filter="data")
    assert load_release_folder(tmp_path) == load_release(release_path)


def without(name: str) -> Callable[[Members], Members]:
    return lambda members: [m for m in members if m[0].name != name]


def swapped(members: Members) -> Members:
    """The weights of another model, its digest and all left as they are."""
    return [(i, b"other weights" if i.name == WEIGHTS else d) for i, d in members]


TAMPERED: dict[str, tuple[Callable[[Members], Members], str]] = {
    "extra member": (lambda m: [*m, (named("run.py"), b"evil")], "member 'run.py' is not allowed"),
    "in a folder": (lambda m: [*m, (named("a/model.onnx"), b"")], "member 'a/model.onnx' is not allowed"),
    "link out": (
        lambda m: [*without(ONNX)(m), (named(ONNX, tarfile.SYMTYPE, "/etc/passwd"), b"")],
        "'model.onnx' is not allowed",
    ),
    "hard link": (
        lambda m: [*without(ONNX)(m), (named(ONNX, tarfile.LNKTYPE, WEIGHTS), b"")],
        "'model.onnx' is not allowed",
    ),
    "device": (lambda m: [*without(ONNX)(m), (named(ONNX, tarfile.CHRTYPE), b"")], "'model.onnx' is not allowed"),
    "folder": (lambda m: [*m, (named("d", tarfile.DIRTYPE), b"")], "member 'd' is not allowed"),
    "..": (lambda m: [*m, (named("../model.onnx"), b"")], "member '../model.onnx' is not allowed"),
    "absolute": (lambda m: [*m, (named("/tmp/x"), b"")], "member '/tmp/x' is not allowed"),
    "doubled": (lambda m: [*m, m[1]], "is not allowed"),
    "one lacks": (without(WEIGHTS), "lacks weights.safetensors"),
    "swapped": (swapped, "weights.safetensors does not match its digest"),
    "digest of none": (
        lambda m: described(m, lambda model: model["members"].pop(WEIGHTS)),
        "does not list the members' digests",
    ),
    "newer schema": (lambda m: described(m, lambda model: model.update(schema_version=3)), "update roadseg"),
    "schema 0": (lambda m: described(m, lambda model: model.update(schema_version=0)), "schema version 0"),
    "no schema": (lambda m: described(m, lambda model: model.pop("schema_version")), "not readable"),
    "no labels": (lambda m: described(m, lambda model: model.pop("label_set")), "not readable"),
    "train ids with a gap": (
        lambda m: described(m, lambda model: model["label_set"]["classes"].pop(2)),
        "model.json is not readable",
    ),
    "no number": (lambda m: described(m, lambda model: model.update(temperature="hot")), "not readable"),
    "offsets of words": (
        lambda m: described(m, lambda model: model["training"].update(class_offsets={"red": "much"})),
        "not readable",
    ),
    "a list": (lambda m: described(m, lambda model: b"[]"), "not readable"),
    "no text": (lambda m: described(m, lambda model: b"\xff\xfe"), "not readable"),
    "deep": (lambda m: described(m, lambda model: b"[" * 100_000), "not readable"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_tampering_is_refused(release_path: Path, tmp_path: Path, how: str) -> None:
    change, message = TAMPERED[how]
    path = packed(tmp_path / "model.tar.gz", change(unpacked(release_path)))
    with pytest.raises(ArchiveError, match=message) as caught:
        load_release(path)
    assert str(path) in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p != path]  # nothing was unpacked


def test_an_unexpected_digest_is_refused(release_path: Path) -> None:
    with pytest.raises(ArchiveError, match="its SHA-256 is .*expected 0000"):
        load_release(release_path, "0" * 64)


@pytest.mark.parametrize("form", ["stored", "compressed"])
def test_every_cut_and_every_flipped_byte_is_refused(release_path: Path, tmp_path: Path, form: str) -> None:
    whole = release_path.read_bytes()
    if form == "compressed":
        whole = gzip.compress(gzip.decompress(whole))
    path, rng = tmp_path / "model.tar.gz", random.Random(3)
    path.write_bytes(whole)
    load_release(path)
    for cut in [0, 1, 9, 10, 20, len(whole) - 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ArchiveError):
            load_release(path)
    for _ in range(200):
        broken = bytearray(whole)
        at = rng.randrange(10, len(whole))  # before it stands the header, whose time and system mean nothing
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(ArchiveError):
            load_release(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ArchiveError, match="unexpected data after its end"):
        load_release(path)


def bomb(path: Path, name: str, size: int) -> Path:
    """A few kB that unpack to `size` zeros in the member `name`."""
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        info = named(name)
        info.size = size

        class Zeros(io.RawIOBase):
            def read(self, count: int = -1) -> bytes:
                return bytes(count)

        tar.addfile(info, Zeros())  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", [ONNX, "x" * 101])
def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, name: str) -> None:
    path = bomb(tmp_path / "model.tar.gz", name, 64 << 20)
    assert path.stat().st_size < (64 << 20) / 100
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match="unpack to more than"):
            load_release(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_header_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    """tarfile reads the body of an extended header whole, whatever its size."""
    path = tmp_path / "model.tar.gz"
    info = named("././@PaxHeader", tarfile.XHDTYPE)
    info.size = 64 << 20
    path.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20)))
    with pytest.raises(ArchiveError, match="unpack to more than"):
        load_release(path)


def test_more_than_the_limit_is_refused(release_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LIMIT_BYTES", 1000)
    with pytest.raises(ArchiveError, match="more than 1,000"):
        load_release(release_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x1f\x8b", gzip.compress(b""), gzip.compress(b"no tar" * 99)]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ArchiveError):
        load_release(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(
            ArchiveError, match="no such file" if path.name == "absent" else "a folder; .*give the archive"
        ):
            load_release(path)


def test_nothing_is_ever_unpickled(release_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, served and started from with every way into pickle closed, and a pickle for weights."""
    from safetensors.torch import save

    from roadseg.inference.predictor import Predictor
    from roadseg.train import checkpoint

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    Predictor(load_release(release_path), threads=1)
    layer, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    checkpoint.save(tmp_path / "c", 1, layer, average, optimizer)
    found = checkpoint.newest(tmp_path / "c")
    assert found
    checkpoint.restore(found[1], layer, average, optimizer)
    write_release(tmp_path / "real.tar.gz", weights=save({"w": layer.weight.detach()}))
    load_release(tmp_path / "real.tar.gz")
    assert load_release(write_release(tmp_path / "p.tar.gz", weights=b"\x80\x04N.")).members[WEIGHTS] == b"\x80\x04N."
