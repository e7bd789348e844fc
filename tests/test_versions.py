"""Whether a stage's code changed and nobody decided if its outputs are still good.

Each stage's VERSION is part of its outputs' keys. The files below decide what comes out of a stage;
when one changes, so may the result, and then VERSION has to move. `python tests/test_versions.py
--record` (make versions) writes the hashes as they are now into stage_sources.json.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from roadseg.files import json_bytes, read_json, sha256_bytes, write_json

PACKAGE = Path(__file__).parents[1] / "roadseg"
RECORDED = Path(__file__).parent / "stage_sources.json"
READING = (
    "images/*.py",
    "labels.py",
    "data/manifest.py",
    "data/frames.py",
    "data/masks/*.py",
)
SOURCES: dict[str, tuple[str, ...]] = {
    "ingest": ("ingest/**/*.py", "ingest/**/*.html", "town/*.py", *READING),
    "transform": ("transform/*.py", "data/shards/*.py", *READING),
    "train": (
        "train/**/*.py", "model/*.py", "weights/*.py", "data/augment/*.py", "data/batches/*.py", "data/shards/*.py",
        "review/data_profile.py", "metrics/*.py", "release/archive.py", "release/export.py", "labels.py",
    ),
    "evaluate": (
        "evaluate/*.*", "report/*.*", "metrics/*.py", "inference/predictor.py", "inference/upsample.py", *READING,
    ),
}  # fmt: skip
MODULE = {"train": "roadseg.train.version"}  # where not in its stage.py
NO_OUTPUT = {"push"}  # never cached: its decision is about the champion of the moment


def files(stage: str) -> list[Path]:
    """The stage's source files. A pattern without a match would hide a renamed file: it is an error."""
    found: set[Path] = set()
    for pattern in SOURCES[stage]:
        matches = {p for p in PACKAGE.glob(pattern) if p.is_file()}
        assert matches, f"{stage}: nothing matches roadseg/{pattern}; correct SOURCES in {Path(__file__).name}"
        found |= matches
    return sorted(found)


def source_hash(stage: str) -> str:
    """Hash of the code itself: comments, docstrings, formatting and the place of a file do not count."""
    return sha256_bytes(json_bytes(sorted(code_hash(path) for path in files(stage))))


def code_hash(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return sha256_bytes((code_of(text) if path.suffix == ".py" else text).encode())


def code_of(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty parts to some f-strings
            node.values = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value == "")]
    return plain_dump(tree)


def plain_dump(node: object) -> str:
    """As ast.dump, without the fields that are empty: Python versions differ in those."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={plain_dump(v)}" for name, v in ast.iter_fields(node) if v is not None and v != [])
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(plain_dump, node))}]"
    return repr(node)


def test_comments_docstrings_and_formatting_do_not_change_the_hash():
    plain = "def area(w, h):\n    return w * h\n"
    dressed = '"""Areas."""\n\ndef area(\n    w,\n    h,\n):\n    """In pixels."""\n    return w * h  # both sides\n'
    assert code_of(plain) == code_of(dressed)
    assert code_of(plain) != code_of(plain.replace("w * h", "w + h"))
    assert code_of(plain) != code_of(plain.replace("w, h", "h, w"))


def test_the_hash_is_the_same_in_every_python() -> None:
    assert code_of("def area(w):\n    return w\n") == (
        "Module(body=[FunctionDef(name='area', args=arguments(args=[arg(arg='w')]), "
        "body=[Return(value=Name(id='w', ctx=Load()))])])"
    )


def module(stage: str) -> str:
    return MODULE.get(stage, f"roadseg.{stage}.stage")


def version(stage: str) -> int:
    number = importlib.import_module(module(stage)).VERSION
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize("stage", SOURCES)
def test_a_changed_stage_had_its_version_looked_at(stage: str) -> None:
    recorded = read_json(RECORDED)[stage]
    if [version(stage), source_hash(stage)] != [recorded["version"], recorded["sources"]]:
        pytest.fail(
            f"the code that decides what `{stage}` makes has changed since its VERSION ({version(stage)}) was last "
            f"looked at. Decide whether VERSION of {stage} moves (in {module(stage)}; it does if the same "
            "inputs can now give other bytes), then run `make versions`",
            pytrace=False,
        )


def test_every_stage_is_looked_after() -> None:
    from roadseg.pipeline.run import STAGES

    assert set(STAGES) == set(SOURCES) | NO_OUTPUT
    assert set(read_json(RECORDED)) == set(SOURCES)


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python tests/test_versions.py --record")
    write_json(RECORDED, {stage: {"version": version(stage), "sources": source_hash(stage)} for stage in SOURCES})
    print(f"recorded in {RECORDED}")
