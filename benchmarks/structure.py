"""Figures of the code base: entries, import cycles, lines, long functions, files of train/ that read the config.

    python benchmarks/structure.py [CHECKOUT ...]

Each checkout is a folder with roadseg/ and tests/ (default: this one). Needs only the standard library.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

CONFIG = ("roadseg.config", "roadseg.config_training", "roadseg.config_section")
YAML_ONLY = "roadseg.config.yaml_file"
LONG_FUNCTION = 40


def modules(root: Path) -> dict[str, Path]:
    paths = (root / "roadseg").rglob("*.py")
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return {other for other in found if other in known and other != name}


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach one another."""
    reach = {name: reachable(name, graph) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach[other]}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(graph[name])
    return seen


def functions(path: Path) -> list[int]:
    """Lines of every function, nested ones included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(n.end_lineno or n.lineno) - n.lineno + 1 for n in found]


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def figures(root: Path) -> dict[str, int]:
    known = modules(root)
    graph = {name: imports(name, known) for name in known}
    reading = [
        name
        for name, others in graph.items()
        if name.startswith("roadseg.train") and any(other.startswith(CONFIG) and other != YAML_ONLY for other in others)
    ]
    source = list(known.values())
    lengths = [length for path in source for length in functions(path)]
    return {
        "entries at the top level of roadseg/": sum(p.name != "__pycache__" for p in (root / "roadseg").iterdir()),
        "import cycles": len(cycles(graph)),
        "source files": len(source),
        "source lines": lines(source),
        "test lines": lines(list((root / "tests").rglob("*.py"))),
        "lines of the longest source file": max(lines([path]) for path in source),
        f"functions over {LONG_FUNCTION} lines": sum(length > LONG_FUNCTION for length in lengths),
        "lines of the longest function": max(lengths),
        "files of train/ that import config": len(reading),
    }


def main() -> None:
    roots = [Path(a).resolve() for a in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    found = [figures(root) for root in roots]
    for name in found[0]:
        print(f"{name:<40}" + "".join(f"{row[name]:>10,}" for row in found))


if __name__ == "__main__":
    main()
