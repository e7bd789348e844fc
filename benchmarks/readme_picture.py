"""The README's picture: a rendered frame, the champion's label map over it, and the truth.

python benchmarks/readme_picture.py WORKSPACE FRAME_NAME docs/town-prediction.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from roadseg.images.decode import encode_jpeg, read_image, read_label
from roadseg.inference.predict import blend
from roadseg.inference.predictor import Predictor
from roadseg.labels import CITYSCAPES, IGNORE
from roadseg.release.archive import load_release
from roadseg.release.store.base import FolderStore
from roadseg.release.store.resolve import resolve


def main(workspace: Path, name: str, out: Path) -> None:
    release = load_release(resolve("champion", FolderStore(workspace / "store"), workspace / "cache"))
    photo = next(workspace.glob(f"stages/ingest/*/tree/leftImg8bit/val/*/{name}_leftImg8bit.png"))
    truth = Path(str(photo).replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit.png", "_gtFine_labelIds.png"))
    image, ids = read_image(photo), read_label(truth)
    label = CITYSCAPES.id_to_train[ids]
    colored = np.where(label[..., None] == IGNORE, 0, CITYSCAPES.palette[label]).astype(np.uint8)
    parts = [image, blend(image, Predictor(release)(image), release.label_set, 0.65), colored]
    large = [cv2.resize(p, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC) for p in parts]
    out.write_bytes(encode_jpeg(np.hstack(large), 88))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("name", help="name of a val frame of the town")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    main(a.workspace, a.name, a.out)
