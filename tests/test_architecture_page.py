"""docs/architecture.md lists every file of the package, each with the first line of its docstring.

`python tests/test_architecture_page.py --write` (make docs) brings the list up to date.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: made by `make docs` -->\n", "<!-- end of files -->\n"
LONGEST = 120  # characters of a line of the list
ROOMS = (
    "", "cli", "config", "pipeline", "ingest", "transform", "train", "evaluate", "push", "deploy", "inference", "serve",
    "data", "model", "metrics", "release", "report", "town", "sweep", "profile", "review", "weights", "images",
)  # fmt: skip


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def files() -> dict[str, str]:
    """The first docstring line of every file that has code, by its path below roadseg/."""
    paths = sorted((ROOT / "roadseg").rglob("*.py"))
    return {p.relative_to(ROOT / "roadseg").as_posix(): first_line(p) for p in paths if p.read_text().strip()}


def rows(room: str) -> list[str]:
    """One line a file, its path below the room."""
    found = {f: line for f, line in files().items() if (f.split("/")[0] if "/" in f else "") == room}
    return [f"- `{f.removeprefix(f'{room}/')}`: {line}" for f, line in found.items()]


def listing() -> str:
    parts = []
    for room in ROOMS:
        title = f"### `roadseg/{room}/`" if room else "### `roadseg/`"
        parts.append("\n".join([title, "", *rows(room), ""]))
    return "\n".join(parts)


def test_every_room_is_known():
    assert {f.split("/")[0] for f in files() if "/" in f} == set(ROOMS) - {""}


def test_every_file_says_what_it_is_in_one_short_line():
    assert [f for f, line in files().items() if not line] == []
    assert [row for room in ROOMS for row in rows(room) if len(row) > LONGEST] == []


def test_the_page_lists_the_files_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    listed = page.partition(BEGIN)[2].partition(END)[0]
    assert listed == listing(), "run `make docs`"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_architecture_page.py --write")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + listing() + END + rest.partition(END)[2], encoding="utf-8")
