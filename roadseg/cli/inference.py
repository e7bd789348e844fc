"""`roadseg predict` and `roadseg serve`: use a release on images."""

from __future__ import annotations

import argparse
from pathlib import Path

from roadseg.cli.releases import release_argument
from roadseg.config.sections import Config, load_config


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="images and folders of images")
    release_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for label maps and overlays")
    parser.add_argument("--ids", choices=("trainIds", "labelIds"), default="trainIds", help="ids in the label maps")
    parser.add_argument("--no-overlay", action="store_true", help="write label maps only")


def predict(a: argparse.Namespace, config: Config) -> int:
    from roadseg.images.decode import Limits
    from roadseg.inference.predict import predict
    from roadseg.inference.predictor import Predictor
    from roadseg.release.archive import load_release
    from roadseg.release.store.resolve import find_release

    release = load_release(find_release(config, a.workspace, a.release))
    predictor = Predictor(release, config.evaluation.threads)
    limits = Limits(config.data.max_file_bytes, config.data.max_image_pixels)
    done = predict(predictor, a.inputs, a.out, ids=a.ids, overlay=not a.no_overlay, limits=limits)
    print(f"{'written':<9} {len(done.written)} files below {a.out}")
    if done.failed:
        print(
            f"{'skipped':<9} {len(done.failed)} unusable image{'s' * (len(done.failed) > 1)}:",
            *(f"  {reason}" for _, reason in done.failed),
            sep="\n",
        )
    return 1 if done.failed else 0


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="N", help="the same as --serve.port")
    parser.add_argument(
        "--release", metavar="R", help="champion (default; in a container the release in /opt/ml/model)"
    )
    parser.add_argument("--ids", choices=("trainIds", "labelIds"), default="trainIds", help="ids in the answers")


def serve(a: argparse.Namespace, config: Config) -> int:
    from roadseg.release.store.resolve import find_release
    from roadseg.serve.app import container_release, container_settings, serve

    if a.port is not None:
        serve_section = {**config.serve.model_dump(), "port": a.port}
        config = load_config(None, {**config.model_dump(mode="json"), "serve": serve_section})
    if a.release is None and (unpacked := container_release()):
        serve(unpacked, container_settings(config.serve), labels=a.ids, say=print)
    else:
        archive = find_release(config, a.workspace, a.release or "champion")
        serve(archive, config.serve, labels=a.ids, say=print)
    return 0
