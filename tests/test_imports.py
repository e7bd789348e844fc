"""How modules may import one another: no cycle, no stage imports a stage, the server is light, config stays on top.

Imports are read from the source, those inside functions and below TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.structure import cycles, imports, modules, reachable

PACKAGE = Path(__file__).parents[1] / "roadseg"
STAGES = ("ingest", "transform", "train", "evaluate", "push")
# Who may read the config: the command line, the pipeline and what runs whole pipelines, each stage's entry point,
# and what a release, a store or a server is opened by.
CONFIG_READERS = (
    "roadseg",
    "roadseg.cli.",
    "roadseg.config.",
    "roadseg.pipeline.",
    "roadseg.sweep.",
    "roadseg.review.diff",
    "roadseg.ingest.stage",
    "roadseg.ingest.sources.select",
    "roadseg.transform.stage",
    "roadseg.train.stage",
    "roadseg.train.recipe",
    "roadseg.train.distributed.worker",
    "roadseg.evaluate.stage",
    "roadseg.push.stage",
    "roadseg.deploy.",
    "roadseg.serve.app",
    "roadseg.release.store.resolve",
)


MODULES = modules(PACKAGE.parent)


def imported(name: str, *, at_run_time: bool = False) -> Iterator[str]:
    """Every module of any package that `name` imports; with `at_run_time` only when it is itself imported."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    nodes = tree.body if at_run_time else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


GRAPH = {name: imports(name, MODULES) for name in MODULES}


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_no_import_cycles():
    assert cycles(GRAPH) == []


def test_no_stage_imports_another_stage():
    crossing = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if (mine := name.split(".")[1:2]) and mine[0] in STAGES
        if (theirs := other.split(".")[1:2]) and theirs[0] in STAGES and theirs != mine
    ]
    assert crossing == []


def test_the_server_imports_neither_torch_nor_a_stage():
    server = {name for name in MODULES if name.startswith("roadseg.serve.")}
    everything = server | {other for name in server for other in reachable(name, GRAPH)}
    stages = {name for name in everything if name.split(".")[1:2] and name.split(".")[1] in STAGES}
    assert stages == set()
    assert {name for name in everything if any(i.split(".")[0] == "torch" for i in imported(name))} == set()


def test_config_is_imported_where_it_may_be():
    def may(name: str) -> bool:
        return any(name == reader or (reader.endswith(".") and name.startswith(reader)) for reader in CONFIG_READERS)

    sections = {name for name in MODULES if name.startswith("roadseg.config.")} - {"roadseg.config.yaml_file"}
    found = {name for name, others in GRAPH.items() if others & sections and not may(name)}
    assert found == set()
