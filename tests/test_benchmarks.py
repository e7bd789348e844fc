"""The scripts of benchmarks/ take from the package what is there."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_what_a_script_imports_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roadseg":
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if not hasattr(module, a.name) and not is_module(node.module, a.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


def is_module(package: str, name: str) -> bool:
    return find_spec(f"{package}.{name}") is not None
