"""Pairing by name: unpaired files, ambiguous names, and names that differ only in case."""

from hypothesis import given
from hypothesis import strategies as st

from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.pairs import match


def named(folder: str, *names: str) -> dict[str, list[str]]:
    return {name: [f"{folder}/{name}.png"] for name in names}


def matched(images: dict[str, list[str]], labels: dict[str, list[str]]) -> dict[str, Finding]:
    return {f.code: f for f in match("val", images, labels)[1]}


def test_all_unpaired_files_are_listed():
    found = matched(named("i", "a", "b", "c"), named("l", "b", "d"))
    assert {code: f.files for code, f in found.items()} == {
        "missing-label": ("i/a.png", "i/c.png"), "missing-image": ("l/d.png",),
    }  # fmt: skip
    assert found["missing-label"].message == "2 images of val without a label"
    assert found["missing-image"].message == "1 label of val without an image"


def test_a_counterpart_that_differs_in_case_is_named():
    found = matched(named("i", "Ulm_1", "b"), named("l", "ulm_1", "b"))
    assert found["missing-label"].files == ("i/Ulm_1.png: but for upper and lower case, l/ulm_1.png",)
    assert found["missing-image"].files == ("l/ulm_1.png: but for upper and lower case, i/Ulm_1.png",)


def test_if_no_name_matches_the_fix_mentions_suffixes():
    fix = matched(named("i", "a", "b"), named("l", "a_mask", "b_mask"))["missing-label"].fix
    assert "as in i/a.png and l/a_mask.png" in fix and "label_suffix" in fix
    assert "label_suffix" not in matched(named("i", "a", "b"), named("l", "a"))["missing-label"].fix


def test_names_that_differ_only_in_case_or_unicode_form():
    names = ("Ulm", "ulm", "stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE", "caf\u00e9", "cafe\u0301", "other")
    f = matched(named("i", *names), named("l", *names))["case-clash"]
    assert f.severity == "warning" and f.count == 6
    assert "i/Ulm.png ~ i/ulm.png" in f.files and "l/cafe\u0301.png ~ l/caf\u00e9.png" in f.files


NAMES = st.dictionaries(st.text("abAB", max_size=3), st.integers(1, 3), max_size=8)


@given(NAMES, NAMES)
def test_every_file_is_in_a_pair_or_in_a_finding(images, labels):
    of_images = {k: [f"i/{k}.{n}" for n in range(count)] for k, count in images.items()}
    of_labels = {k: [f"l/{k}.{n}" for n in range(count)] for k, count in labels.items()}
    pairs, findings = match("val", of_images, of_labels)
    reported = {
        part.partition(": ")[0] for f in findings if f.code != "case-clash" for e in f.files for part in e.split(" = ")
    }
    doubled = {k for k in images.keys() & labels.keys() if images[k] != 1 or labels[k] != 1}
    spared = {path for group in (of_images, of_labels) for k in doubled for path in group[k] if len(group[k]) == 1}
    every = {path for group in (of_images, of_labels) for paths in group.values() for path in paths}
    paired = {path for _, image, label in pairs for path in (image, label)}
    assert paired | reported | spared == every and not paired & reported
    assert [k for k, _, _ in pairs] == sorted(images.keys() & labels.keys() - doubled)
