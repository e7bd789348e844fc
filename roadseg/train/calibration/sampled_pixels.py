"""Sample logits and labels of pixels of whole frames, for fits after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadseg.data.augment.cpu import generator
from roadseg.data.shards.index import Split
from roadseg.labels import IGNORE


@torch.inference_mode()
def sampled_pixels(
    network: nn.Module,
    split: Split,
    frames: Sequence[int] | np.ndarray,
    pixels_a_frame: int,
    device: torch.device | None = None,
    bf16: bool = False,
    done: Callable[[], object] = int,
) -> tuple[Tensor, Tensor]:
    """(logits, float32 [N, K]; labels, int64 [N]) on the CPU, of a limited number of valid pixels of each frame; the
    same pixels in every run, with bilinearly upsampled logits.

    network: in eval mode on `device`, the CPU if None. frames: at least one. bf16: run it in that precision. done:
    called after each frame. N is 0 where the frames hold no valid pixel.
    """
    device = device or torch.device("cpu")
    logits_NK, labels_N = [], []
    for index in frames:
        image, label = split.read(int(index))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits_1Khw = network(torch.from_numpy(image.copy()).to(device).permute(2, 0, 1)[None])
        valid = np.flatnonzero(label.ravel() != IGNORE)
        chosen = generator(0, 4, int(index)).choice(valid, min(pixels_a_frame, len(valid)), replace=False)
        row_column_2N = np.stack(np.divmod(chosen, label.shape[1]))
        # Sample where F.interpolate would: the whole upsampled map may take gigabytes.
        places = 2 * (row_column_2N + 0.5) / np.array(label.shape)[:, None] - 1
        grid_11N2 = torch.from_numpy(places[::-1].T.astype(np.float32).copy())[None, None]
        # On the CPU: Apple's MPS has no "border" before PyTorch 2.13.
        found_1K1N = F.grid_sample(
            logits_1Khw.float().cpu(), grid_11N2, mode="bilinear", padding_mode="border", align_corners=False
        )
        logits_NK.append(found_1K1N[0, :, 0].T)
        labels_N.append(torch.from_numpy(label.ravel()[chosen].astype(np.int64)))
        done()
    return torch.cat(logits_NK), torch.cat(labels_N)
