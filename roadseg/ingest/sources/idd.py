"""IDD, the India Driving Dataset, parts I and II: a Cityscapes-like tree with polygon labels.

leftImg8bit/<split>/<drive>/*_leftImg8bit.<png|jpg> with gtFine/<split>/<drive>/*_gtFine_polygons.json, or with
the masks that the owners' tool makes from them. The root is one such tree or contains several (IDD_Segmentation,
idd20kII), which are joined. Ids, names, colors and levels: AutoNUE/public-code, helpers/anue_labels.py.

The learned classes are the 26 of level 3, as in the challenge. The kind of label that most images have is read; if
several are equally frequent, the first of
- *_labelids.png, ids 0..39;
- *_labellevel3Ids.png, the ids that the challenge scores;
- *_polygons.json, rasterized by the same rule as the tool's;
- *_labelcsTrainIds.png, the 19 Cityscapes classes, which are then the learned ones.
Instance maps are not read: their numbering depends on the tool's options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from roadseg.data.masks.form import Kind, MaskForm
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.sources.cityscapes import train_id_set
from roadseg.ingest.sources.pairs import IMAGE_SUFFIXES, Pair, list_files, missing_data_error
from roadseg.ingest.sources.splits import Folders, gather, pair_up
from roadseg.labels import IGNORE, LabelClass, LabelSet

# name | id | level 3 | Cityscapes train class | category | instances | color. A level-3 class is named after its first
# row. The train class is the owners' csTrainId: "non-drivable fallback" maps to terrain.
_TABLE = """
road                  |  0 |   0 | road          | drivable        | n | 128  64 128
drivable fallback     |  2 |   1 |               | drivable        | n |  81   0  81
parking               |  1 |   1 |               | drivable        | n | 250 170 160
sidewalk              |  3 |   2 | sidewalk      | non-drivable    | n | 244  35 232
non-drivable fallback |  5 |   3 | terrain       | non-drivable    | n | 152 251 152
rail track            |  4 |   3 |               | non-drivable    | n | 230 150 140
person                |  6 |   4 | person        | living-thing    | y | 220  20  60
animal                |  7 |   4 |               | living-thing    | y | 246 198 145
rider                 |  8 |   5 | rider         | living-thing    | y | 255   0   0
motorcycle            |  9 |   6 | motorcycle    | 2-wheeler       | y |   0   0 230
bicycle               | 10 |   7 | bicycle       | 2-wheeler       | y | 119  11  32
autorickshaw          | 11 |   8 |               | autorickshaw    | y | 255 204  54
car                   | 12 |   9 | car           | car             | y |   0   0 142
truck                 | 13 |  10 | truck         | large-vehicle   | y |   0   0  70
bus                   | 14 |  11 | bus           | large-vehicle   | y |   0  60 100
vehicle fallback      | 18 |  12 |               | large-vehicle   | y | 136 143 153
caravan               | 15 |  12 |               | large-vehicle   | y |   0   0  90
trailer               | 16 |  12 |               | large-vehicle   | y |   0   0 110
train                 | 17 |  12 | train         | large-vehicle   | y |   0  80 100
curb                  | 19 |  13 |               | barrier         | n | 220 190  40
wall                  | 20 |  14 | wall          | barrier         | n | 102 102 156
fence                 | 21 |  15 | fence         | barrier         | n | 190 153 153
guard rail            | 22 |  16 |               | barrier         | n | 180 165 180
billboard             | 23 |  17 |               | structures      | n | 174  64  67
traffic sign          | 24 |  18 | traffic sign  | structures      | n | 220 220   0
traffic light         | 25 |  19 | traffic light | structures      | n | 250 170  30
pole                  | 26 |  20 | pole          | structures      | n | 153 153 153
polegroup             | 27 |  20 |               | structures      | n | 153 153 153
obs-str-bar-fallback  | 28 |  21 |               | structures      | n | 169 187 214
building              | 29 |  22 | building      | construction    | n |  70  70  70
bridge                | 30 |  23 |               | construction    | n | 150 100 100
tunnel                | 31 |  23 |               | construction    | n | 150 120  90
vegetation            | 32 |  24 | vegetation    | vegetation      | n | 107 142  35
sky                   | 33 |  25 | sky           | sky             | n |  70 130 180
fallback background   | 34 |  25 |               | object fallback | n | 169 187 214
unlabeled             | 35 | 255 |               | void            | n |   0   0   0
ego vehicle           | 36 | 255 |               | void            | n |   0   0   0
rectification border  | 37 | 255 |               | void            | n |   0   0   0
out of roi            | 38 | 255 |               | void            | n |   0   0   0
license plate         | 39 | 255 |               | vehicle         | n |   0   0 142
"""


def _class(row: str) -> LabelClass:
    name, id_, level3, counts_as, category, instances, color = (cell.strip() for cell in row.split("|"))
    r, g, b = (int(v) for v in color.split())
    return LabelClass(name, int(id_), int(level3), (r, g, b), category, instances == "y", counts_as)


TERMS = "IDD: non-commercial research; the terms one accepts on registering at idd.insaan.iiit.ac.in hold."
LABEL_SET = LabelSet("idd", tuple(_class(row) for row in _TABLE.strip().splitlines()), TERMS)
FORM_KIND: Kind = "polygons"
BACKGROUND = 35
# Merged classes map like their first row: animals to person, pole groups to pole, rail tracks to terrain.
LEVEL3 = LabelSet(
    "idd",
    tuple(replace(c, id=i) for i, c in enumerate(LABEL_SET.trained)) + (LabelClass("void", 255, IGNORE, (0, 0, 0)),),
    TERMS,
)
TRAIN_IDS = train_id_set("idd", TERMS)
LOOKED_FOR = (
    "leftImg8bit/<train|val>/<drive>/*_leftImg8bit.* with gtFine/<train|val>/<drive>/*_gtFine_polygons.json, "
    "or folders IDD_Segmentation and idd20kII that hold these"
)


@dataclass(frozen=True)
class _Labels:
    suffix: str
    endings: tuple[str, ...]
    form: MaskForm


_KINDS = (
    _Labels("_gtFine_labelids", IMAGE_SUFFIXES, MaskForm("ids", LABEL_SET)),
    _Labels("_gtFine_labellevel3Ids", IMAGE_SUFFIXES, MaskForm("ids", LEVEL3)),
    _Labels("_gtFine_polygons", (".json",), MaskForm(FORM_KIND, LABEL_SET, BACKGROUND)),
    _Labels("_gtFine_labelcsTrainIds", IMAGE_SUFFIXES, MaskForm("ids", TRAIN_IDS)),
)


def form(root: Path) -> MaskForm:
    """The form of the masks that `pairs` chooses. Raises DataError for a root without a tree."""
    return _kind(root, _trees(root)).form


def pairs(root: Path) -> tuple[list[Pair], list[Finding]]:
    """The pairs of every split; `sequence` is the drive, like 0 or, with several trees, idd20kII/201.

    test has no public labels and is left out. Raises DataError for a root without a tree.
    """
    trees = _trees(root)
    kind = _kind(root, trees)
    found: list[Pair] = []
    findings: list[Finding] = []
    for split in ("train", "val", "test"):
        present = [t for t in trees if (root / t / "leftImg8bit" / split).is_dir()]
        if not present:
            continue
        folders = [
            Folders(
                f"{t}leftImg8bit/{split}", f"{t}gtFine/{split}", "_leftImg8bit", kind.suffix,
                label_endings=kind.endings, prefix=t,
            )
            for t in present
        ]  # fmt: skip
        looked_for = f"leftImg8bit/{split}/<drive>/ named *_leftImg8bit.png or .jpg"
        pairs_here, findings_here = pair_up(split, gather(root, folders), _drive, looked_for)
        found += pairs_here
        findings += findings_here
    return found, findings


def _trees(root: Path) -> list[str]:
    """[""] if the root itself is a tree, else the subfolders that are, each with a trailing "/"."""
    if any((root / "leftImg8bit" / split).is_dir() for split in ("train", "val", "test")):
        return [""]
    trees = sorted(p.name + "/" for p in root.iterdir() if (p / "leftImg8bit").is_dir()) if root.is_dir() else []
    if not trees:
        raise missing_data_error(root, LOOKED_FOR)
    return trees


def _kind(root: Path, trees: list[str]) -> _Labels:
    paths = [path for t in trees for path in list_files(root, f"{t}gtFine", (*IMAGE_SUFFIXES, ".json"))[0]]
    stems = [path.rpartition(".")[0].lower() for path in paths]
    counts = {kind: sum(stem.endswith(kind.suffix.lower()) for stem in stems) for kind in _KINDS}
    return max(_KINDS, key=lambda kind: counts[kind]) if any(counts.values()) else _KINDS[2]


def _drive(name: str) -> str:
    return name.rpartition("/")[0]
