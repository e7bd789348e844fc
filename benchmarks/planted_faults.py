"""Plant faults in a rendered town and in CamVid; check that all are found and that there are no false errors.

Renders a town in the Cityscapes tree, plants faults in copies of it (hard links) and of CamVid, checks
them as `roadseg ingest` does, and prints for each fault whether it was found: a finding of the expected code
that names the planted file. Faults that exclude each other are in different copies. Also checks the clean trees,
and that no error names a file without a fault. Exits with 1 if a fault is missed or an error is false. Usage:

    python benchmarks/planted_faults.py [--frames 500] [--camvid DIR] [--cityscapes DIR] [--workers 0]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import plants
from machine import cpu_name
from plants import Plant, Tree
from plants_pictures import PICTURES

from roadseg.config.sections import Data
from roadseg.images.decode import Limits, read_label
from roadseg.ingest.checks.findings import Finding
from roadseg.ingest.checks.judge import check
from roadseg.ingest.sources.pairs import Pair
from roadseg.ingest.sources.select import find
from roadseg.labels import CITYSCAPES, IGNORE
from roadseg.processes import cores
from roadseg.town.tree import write_tree

WIDTH, HEIGHT = 256, 128
_SPLITS = ("train", "val", "test")


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a tree as hard links; `Tree.write` replaces a link by a new file."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def open_tree(root: Path, data: Data) -> Tree:
    free: dict[str, list[Pair]] = {}
    for pair in find(data, root).pairs:
        free.setdefault(pair.split, []).append(pair)
    return Tree(root, data, free)


def trees(town: Path, camvid: Path | None, work: Path, times: int) -> Iterator[tuple[str, Tree]]:
    """Every planted tree. times: how often each fault of single files is planted in the town, 1..3."""
    yield "town, files", town_files(copy_tree(town, work / "files"), times)
    yield "town, pictures", pictures(copy_tree(town, work / "pictures"), Data(source="cityscapes"), times)
    for split in _SPLITS[:times]:
        yield f"town, train ids in {split}", town_train_ids(copy_tree(town, work / f"train-ids-{split}"), split)
    for split in ("val", "test"):
        yield f"town, other classes in {split}", town_classes(copy_tree(town, work / f"classes-{split}"), split)
    yield "town as a folder of train ids", folder_ids(town, work / "ids", times)
    yield "town as a folder, 255 not declared", folder_undeclared(town, work / "undeclared")
    yield "town as a folder of 0/255", folder_binary(town, work / "binary")
    yield "town as a folder of colours", folder_colors(town, work / "colors", times)
    yield "town as a folder, images and masks exchanged", folder_exchanged(town, work / "exchanged")
    for k, side in enumerate(("left", "top", "right")[:times]):
        yield f"town as a folder, 0 along the {side}", folder_padded(town, work / f"padded-{k}", side)
    if camvid:
        yield "CamVid, files", camvid_files(copy_tree(camvid, work / "camvid-files"))
        yield "CamVid, pictures", pictures(copy_tree(camvid, work / "camvid-pictures"), Data(source="camvid"), 1)
        yield "CamVid, void as 0", camvid_void(copy_tree(camvid, work / "camvid-void"))
        yield "CamVid, other classes in val", camvid_classes(copy_tree(camvid, work / "camvid-classes"))
        yield "CamVid, folders exchanged", camvid_exchanged(copy_tree(camvid, work / "camvid-exchanged"))


# --- the town as Cityscapes ---------------------------------------------------------------------------


def town_files(root: Path, times: int) -> Tree:
    t = open_tree(root, Data(source="cityscapes", root=root))
    for fault in (*plants.ANY_FILE, *plants.CITYSCAPES_FILE):
        for _ in range(times):
            fault(t)
    for _ in range(times):
        plants.same_sequence(t)
    used = {t.free["train"][-1].sequence.partition("_")[0]}  # the city of the shared sequences
    for a, b in (("train", "val"), ("train", "val"), ("val", "test"))[:times]:
        plants.same_city(t, a, b, used)
    return t


def pictures(root: Path, data: Data, times: int) -> Tree:
    t = open_tree(root, data)
    for fault in PICTURES:
        for _ in range(times):
            fault(t)
    return t


def town_train_ids(root: Path, split: str) -> Tree:
    """Without 255, so that only the range of ids reveals the fault."""
    t = open_tree(root, Data(source="cityscapes", root=root))
    for p in t.free[split]:
        train = to_train(t.label(p))
        t.set_label(p, np.where(train == IGNORE, 0, train).astype(np.uint8))
        t.touched.add(p.label)
    t.expect("train ids throughout, void as 0", "train-ids", f"all {len(t.free[split])} labels of {split} ")
    return t


def town_classes(root: Path, split: str) -> Tree:
    t = open_tree(root, Data(source="cityscapes", root=root))
    for p in t.free[split]:
        label = t.label(p)
        label[np.isin(label, (27, 28, 31))] = 7  # road instead of truck, bus and train
        label[label == 11] = 21
        t.set_label(p, label)
    t.expect("classes missing from a split", "class-missing", f"{split} has no pixel of", "truck")
    t.expect("classes distributed differently", "class-drift", split)
    return t


# --- the town as a folder -----------------------------------------------------------------------------


def to_train(label: np.ndarray) -> np.ndarray:
    return CITYSCAPES.id_to_train[label]


def to_colors(label: np.ndarray) -> np.ndarray:
    """BGR for OpenCV; void is white."""
    train = to_train(label)
    return np.where((train == IGNORE)[..., None], 255, CITYSCAPES.palette[train])[..., ::-1].astype(np.uint8)


def to_binary(label: np.ndarray) -> np.ndarray:
    return np.where(label == 7, 255, 0).astype(np.uint8)


def folder_tree(town: Path, root: Path, mask: Callable[[np.ndarray], np.ndarray], yaml: str) -> Tree:
    """The town as images/<split>/ and masks/<split>/, with its label ids converted to another mask form."""
    for split in _SPLITS:
        (root / "images" / split).mkdir(parents=True)
        (root / "masks" / split).mkdir(parents=True)
        for image in (town / "leftImg8bit" / split).glob("*/*.png"):
            stem = image.name.removesuffix("_leftImg8bit.png")
            label = town / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
            os.link(image, root / "images" / split / f"{stem}.png")
            (root / "masks" / split / f"{stem}.png").write_bytes(plants.png(mask(read_label(label.read_bytes()))))
    folders = "".join(f"  {s}: {{images: images/{s}, labels: masks/{s}}}\n" for s in _SPLITS)
    path = root / "labels.yaml"
    path.write_text(f"name: town\n{yaml}splits:\n{folders}sequence: '^(.+)_\\d+$'\n")
    return open_tree(root, Data(source="folder", labels=path, root=root))


def yaml_classes(*more: str, by_color: bool = False) -> str:
    """The 19 classes of Cityscapes by train id or by color."""
    rows = [f"{{id: {c.train_id}, name: {c.name}, color: {list(c.color)}}}" for c in CITYSCAPES.trained]
    return ("masks: colors\n" if by_color else "") + "classes:\n" + "".join(f"  - {r}\n" for r in (*rows, *more))


_VOID = "{id: 255, name: void, color: [255, 255, 255], ignore: true}"


def folder_ids(town: Path, root: Path, times: int) -> Tree:
    t = folder_tree(town, root, to_train, yaml_classes(_VOID))
    for _ in range(times):
        p = t.take()
        original = next((town / "gtFine").glob(f"*/*/{Path(p.image).stem}_gtFine_labelIds.png"))
        t.write(p.label, original.read_bytes())
        t.expect("label ids for train ids", "label-ids", p.label)
    return t


def folder_undeclared(town: Path, root: Path) -> Tree:
    t = folder_tree(town, root, to_train, yaml_classes())
    t.touched.add("masks/")
    t.expect("255 for void throughout, not declared", "undeclared-void", "of train")
    return t


def folder_binary(town: Path, root: Path) -> Tree:
    """Road stored as 255, in a label set that declares 255 as void."""
    t = folder_tree(town, root, to_binary, yaml_classes(_VOID))
    t.touched.add("masks/")
    for split in _SPLITS:
        t.expect("0/255 masks throughout, 255 ignored", "binary-mask", f"of {split} ")
    return t


def folder_colors(town: Path, root: Path, times: int) -> Tree:
    t = folder_tree(town, root, to_colors, yaml_classes(_VOID, by_color=True))
    for fault in plants.COLORS:
        for _ in range(times):
            fault(t)
    return t


def folder_exchanged(town: Path, root: Path) -> Tree:
    t = folder_tree(town, root, to_train, yaml_classes(_VOID))
    for split in _SPLITS:
        exchange(root / "images" / split, root / "masks" / split)
        t.expect("folders of images and labels exchanged", "swapped", f"of {split} ", "the folders are")
    t.touched.add("images/")
    return t


def exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def folder_padded(town: Path, root: Path, side: str) -> Tree:
    """A twelfth of the image black and 0 (road) in the label; other void stays."""
    t = folder_tree(town, root, to_train, yaml_classes(_VOID))
    for p in t.free["val"]:
        image, label = t.image(p), t.label(p)
        for pixels in (image, label):  # rot90 returns views, so this draws on the original arrays
            across = np.rot90(pixels, {"top": 0, "right": 1, "left": 3}[side])
            across[: len(across) // 12] = 0
        t.set_image(p, image)
        t.set_label(p, label)
        t.touched |= {p.image, p.label}
    t.expect("padding with 0, which is a class", "void-as-class", f"{side} edge of all {len(t.free['val'])} labels")
    return t


# --- CamVid -------------------------------------------------------------------------------------------


def camvid_files(root: Path) -> Tree:
    t = open_tree(root, Data(source="camvid", root=root))
    for fault in (*plants.ANY_FILE, plants.label_ids, plants.label_ids):
        fault(t)
    t.expect("a sequence in two splits", "same-sequence", "0016E5")  # true for the original CamVid
    return t


def camvid_void(root: Path) -> Tree:
    t = open_tree(root, Data(source="camvid", root=root))
    for split in ("train", "val"):
        for p in t.free[split]:
            label = t.label(p)
            label[label == 11] = 0
            t.set_label(p, label)
        t.expect("void written as 0, which is sky", "void-as-class", f"of {split} ")
    return t


def camvid_classes(root: Path) -> Tree:
    t = open_tree(root, Data(source="camvid", root=root))
    for p in t.free["val"]:
        label = t.label(p)
        label[label == 8] = 3
        label[label == 1] = 5
        t.set_label(p, label)
    t.expect("classes missing from a split", "class-missing", "val has no pixel of", "car")
    t.expect("classes distributed differently", "class-drift", "val")
    return t


def camvid_exchanged(root: Path) -> Tree:
    t = open_tree(root, Data(source="camvid", root=root))
    exchange(root / "val", root / "valannot")
    t.touched.add("val/")
    t.expect("folders of images and labels exchanged", "swapped", "of val ", "the folders are")
    return t


# --- judging ------------------------------------------------------------------------------------------


def findings_of(root: Path, data: Data, workers: int) -> list[Finding]:
    found = find(data, root)
    limits = Limits(data.max_file_bytes, data.max_image_pixels)
    return [*found.findings, *check(root, found.pairs, found.label_set, found.forms, limits, workers).findings]


def is_found(plant: Plant, findings: list[Finding]) -> bool:
    """True if a finding of the code has the text in one entry or in its message."""
    texts = [text for f in findings if f.code == plant.code for text in (*f.files, f.message)]
    return any(plant.named in text and plant.says in text for text in texts)


def false_errors(tree: Tree, findings: list[Finding]) -> list[str]:
    """Entries of errors that name no planted fault."""
    errors = [f for f in findings if f.severity == "error"]
    entries = [f"{f.code}: {entry}" for f in errors for entry in f.files]
    wrong = [e for e in entries if not any(name in e for name in tree.touched)]
    return wrong + [f"{f.code}: {f.message}" for f in errors if not f.files]


def judge(name: str, tree: Tree, workers: int) -> tuple[list[Plant], list[Plant], list[str]]:
    """Print and return (planted, missed, false errors) of one tree."""
    findings = findings_of(tree.root, tree.data, workers)
    missed = [p for p in tree.plants if not is_found(p, findings)]
    wrong = false_errors(tree, findings)
    print(f"\n{name}: {len(tree.plants) - len(missed)} of {len(tree.plants)} found, {len(wrong)} false errors")
    for p in tree.plants:
        print(f"  {'MISSED' if p in missed else 'found '} {p.code:24s} {p.kind}: {p.named!r}")
    for text in wrong:
        print(f"  FALSE  {text}")
    return tree.plants, missed, wrong


def clean(name: str, root: Path, data: Data, workers: int) -> list[str]:
    """The errors of a tree without planted faults; prints all its findings."""
    findings = findings_of(root, data, workers)
    print(f"\n{name}, clean: {len(findings)} findings")
    for f in findings:
        print(f"  {f.severity:7s} {f.code:24s} {f.message}")
    return [f"{f.code}: {f.message}" for f in findings if f.severity == "error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--cityscapes", type=Path, help="real frames, only checked for false errors")
    parser.add_argument("--workers", type=int, default=0)
    a = parser.parse_args()
    cv2.setNumThreads(0)
    print(f"{cpu_name()}; {a.frames} town frames of {WIDTH}x{HEIGHT}", flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        train, val = a.frames * 3 // 5, a.frames // 4
        splits = {"train": train, "val": val, "test": a.frames - train - val}
        write_tree(work / "town", splits, 0, WIDTH, HEIGHT, "clear", a.workers or cores())
        wrong = clean("town", work / "town", Data(source="cityscapes", root=work / "town"), a.workers)
        camvid = a.camvid and copy_of(a.camvid, work / "camvid")
        if camvid:
            wrong += clean("CamVid", camvid, Data(source="camvid", root=camvid), a.workers)
        if a.cityscapes:
            wrong += clean("Cityscapes", a.cityscapes, Data(source="cityscapes", root=a.cityscapes), a.workers)
        planted: list[Plant] = []
        missed: list[Plant] = []
        for name, tree in trees(work / "town", camvid, work, 3):
            planted_here, missed_here, wrong_here = judge(name, tree, a.workers)
            planted, missed, wrong = planted + planted_here, missed + missed_here, wrong + wrong_here
            shutil.rmtree(tree.root)
    by_code, lost = Counter(p.code for p in planted), Counter(p.code for p in missed)
    print(f"\n{'code':26s}{'planted':>9s}{'found':>9s}")
    for code in sorted(by_code):
        print(f"{code:26s}{by_code[code]:9d}{by_code[code] - lost[code]:9d}")
    print(f"{len(planted)} faults planted, {len(missed)} missed, {len(wrong)} false errors", end="; ")
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(1 if missed or wrong else 0)


def copy_of(source: Path, target: Path) -> Path:
    """Copy files: real data may be on another file system, where hard links are impossible."""
    shutil.copytree(source, target)
    return target


if __name__ == "__main__":
    main()
