"""`roadseg convert-checkpoint`: a torch checkpoint as .safetensors, without running its pickle."""

from __future__ import annotations

import argparse
from pathlib import Path

from roadseg.config.sections import Config


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.pth", help="a torch checkpoint; only its tensors are read")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors", help="file to write; must not exist yet"
    )


def convert(a: argparse.Namespace, config: Config) -> int:
    from roadseg.weights.convert import convert_checkpoint

    done = convert_checkpoint(a.file, a.out)
    print(f"{'written':<9} {done.path} ({done.tensors} tensor{'s' * (done.tensors != 1)}, {done.parameters:,} numbers)")
    if done.left_out:
        print(f"{'left out':<9} {', '.join(done.left_out)}")
    print(f"{'use it':<9} roadseg train --training.weights-from {done.path}")
    return 0
