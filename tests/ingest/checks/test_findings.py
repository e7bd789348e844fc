"""Finding codes: all that are used are defined and documented, and the config changes their severity."""

import ast
import re
from pathlib import Path

import pytest

import roadseg.ingest
from roadseg.errors import ConfigError
from roadseg.ingest.checks.findings import CODES, Finding, plural, require_codes, severity_of, with_severity

SOURCES = Path(roadseg.ingest.__file__).parent
GUIDE = Path(__file__).parents[3] / "docs/data-doctor.md"


def made_in_code() -> set[tuple[str, str]]:
    """(code, severity) of every Finding that is written out in roadseg/ingest."""
    made = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                values = [str(a.value) for a in node.args[:2] if isinstance(a, ast.Constant)]
                if len(values) == 2:
                    made.add((values[0], values[1]))
    return made


def test_every_finding_has_a_code_with_its_severity():
    made = made_in_code()
    assert len(made) > 15
    assert {(code, CODES[code].severity) for code, _ in made} == made


def test_every_code_is_used_somewhere():
    text = "".join(p.read_text(encoding="utf-8") for p in SOURCES.rglob("*.py") if p.name != "findings.py")
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_the_guide_has_a_row_for_every_code():
    rows = re.findall(
        r"^\| `([a-z-]+)` \| (error|warning) \| (.+) \| (.+) \| (.*) \|$", GUIDE.read_text(encoding="utf-8"), re.M
    )
    assert {code: (severity, means) for code, severity, means, _, _ in rows} == {
        code: (c.severity, c.means) for code, c in CODES.items()
    }
    leaves = {"pair": "the pair", "train": "of train", "pixels": "void", "instances": "instance map", "file": "no pair"}
    for code, severity, _, _, allowed in rows:
        assert leaves.get(CODES[code].leaves_out, "stay") in allowed if severity == "error" else not allowed


def test_warnings_leave_nothing_out():
    assert all(c.leaves_out == "nothing" for c in CODES.values() if c.severity == "warning")


def test_config_allows_and_forbids():
    assert severity_of("swapped") == "error" and severity_of("swapped", {"swapped"}) == "warning"
    assert severity_of("one-class") == "warning" and severity_of("one-class", (), {"one-class"}) == "error"
    error = Finding("swapped", "error", "val", ("a",), 1, "m", "f")
    warning = Finding("one-class", "warning", "val", ("a",), 1, "m", "f")
    assert with_severity([error, warning]) == [error, warning]
    assert [f.severity for f in with_severity([error, warning], {"swapped"}, {"one-class"})] == ["warning", "error"]
    assert [f.severity for f in with_severity([error, warning], {"one-class"}, {"swapped"})] == ["error", "warning"]


def test_all_wrong_codes_are_listed():
    with pytest.raises(ConfigError) as caught:
        require_codes(["near-duplicates", "swapped", "xyzzy"], ["swapped"])
    assert caught.value.exit_code == 2
    for part in (
        "data.allow: unknown code 'near-duplicates', perhaps you meant near-duplicate",
        "data.allow: unknown code 'xyzzy'; ",
        "swapped is both in data.allow and in data.forbid",
    ):
        assert part in str(caught.value)
    require_codes(CODES, ())


def test_plural():
    assert [plural(1, "label"), plural(2000, "label"), plural(0, "class", "classes")] == [
        "1 label", "2,000 labels", "0 classes",
    ]  # fmt: skip
