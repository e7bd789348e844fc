"""`roadseg data diff` and `roadseg data errors`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict

from roadseg.config.sections import Config
from roadseg.errors import UsageError
from roadseg.files import write_atomic

log = logging.getLogger(__name__)
PAGE = "label_errors.html"


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("diff", "errors"),
        help="diff A B: how B differs from A; errors: labels that are probably wrong",
    )
    parser.add_argument("sides", nargs="*", metavar="A B", help="config.yaml, config.yaml:SPLIT, or a release")
    parser.add_argument(
        "--release", metavar="R", help="release that predicts; default: the one compared, else champion"
    )
    parser.add_argument("--most", type=int, default=50, metavar="N", help="errors: list at most N labels")
    parser.add_argument("--name", default="default", help="errors: write the page to WORKSPACE/runs/NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")


def data(a: argparse.Namespace, config: Config) -> int:
    if a.what == "diff":
        if len(a.sides) != 2:
            raise UsageError(f"{len(a.sides)} data sets to compare", expected="two: roadseg data diff A B")
        return _diff(a, config)
    if a.most < 1:
        raise UsageError(f"--most {a.most}", expected="1 or more")
    if a.sides:
        raise UsageError(
            f"unexpected argument {a.sides[0]!r}", expected="the data set in --config, the split in --data.split"
        )
    return _errors(a, config)


def _diff(a: argparse.Namespace, config: Config) -> int:
    from roadseg.review.diff import data_diff

    left, right = a.sides
    diff = data_diff(left, right, config, workspace=a.workspace, release=a.release)
    if a.json:
        print(json.dumps({"verdict": diff.verdict, "rows": [asdict(row) for row in diff.rows]}, indent=1))
    else:
        print(diff.text)
    return 0


def _errors(a: argparse.Namespace, config: Config) -> int:
    from roadseg.inference.predictor import Predictor
    from roadseg.pipeline.run import dataset, run_folder
    from roadseg.release.archive import load_release
    from roadseg.release.store.resolve import find_release
    from roadseg.review.label_errors import find_suspects, render, table

    release = load_release(find_release(config, a.workspace, a.release or "champion"))
    found = dataset(config, a.workspace)
    manifest, root, limits = found.manifest, found.root, found.limits
    title = f"labels of {manifest.source} {config.data.split} by release {release.digest[:12]}"
    trained = release.model["training"]
    log.info("%s, trained on %s; --config, or data.source and data.root, name other data", title, trained["source"])
    predictor = Predictor(release, config.evaluation.threads)
    suspects = find_suspects(predictor, manifest, root, limits, config.data.split, a.most)
    folder = run_folder(a.workspace, a.name)
    write_atomic(folder / PAGE, render(title, suspects, manifest, root, limits).encode())
    if a.json:
        print(json.dumps([s.to_json() for s in suspects], indent=1))
    elif suspects:
        print(table(suspects))
    else:
        print(f"no suspect label in {config.data.split}")
    if not a.json:
        print(f"{'page':<9} {folder / PAGE}")
    if trained["data_fingerprints"].get("train") == manifest.fingerprint(config.data.split):
        log.warning(
            "the release was trained on these labels, so few look wrong to it; use a split it was not trained on"
        )
    return 0
