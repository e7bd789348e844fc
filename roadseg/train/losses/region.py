"""Region losses: Lovasz-softmax, soft Dice, region mutual information.

All three use softmax probabilities on the logits' own grid (at stride 4 a sixteenth of the pixels) with the label of
the pixel at each cell's center: sorted or unfolded, full-resolution maps of all classes would take gigabytes. Random
crops move the grid, so that every pixel is used. None waits for the device, and shapes never depend on values.

Lovasz-softmax and Dice are computed over the images of all ranks; each rank returns its share, and the gradients add
up to the gradient of the whole.

Shapes: B images of this rank, K classes, H W the label, h w the logits, N cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from roadseg.train.distributed.process_group import ALONE, Ranks
from roadseg.train.losses.pixel import at_least_float32, positive_or_1, sum_over_images

REGION = 3  # cells on a side of RMI's regions
CELL_PX = 8  # pixels on a side of one of its cells; the paper's best is 4, at four times the arithmetic
RIDGE = 1e-6  # added to its covariances' diagonals
REGION_VALUES_AT_ONCE = 1 << 25  # 256 MiB in float64


def truth_on_grid(label_BHW: Tensor, rows: int, columns: int, num_classes: int) -> Tensor:
    """float32 one-hot [B, K, rows, columns] of the pixels at the cells' centers; void is 0 for every class."""
    for dim, cells in ((1, rows), (2, columns)):
        centres = (2 * torch.arange(cells, device=label_BHW.device) + 1) * label_BHW.shape[dim] // (2 * cells)
        label_BHW = label_BHW.index_select(dim, centres)
    classes = torch.arange(num_classes, device=label_BHW.device)[:, None, None]
    return (label_BHW[:, None] == classes).float()


def lovasz_softmax(p_BKhw: Tensor, truth_BKhw: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Lovasz extension of 1 - Jaccard index (Berman et al. 2018), over all images at once.

    The mean over the classes that occur in truth; void cells count nowhere; 0 where all is void. Each rank
    sorts the cells of some classes for all ranks.
    """
    valid = truth_BKhw.sum(dim=1, keepdim=True)
    errors_KN = ((truth_BKhw - p_BKhw).abs() * valid).transpose(0, 1).flatten(1)
    truth_KN = truth_BKhw.transpose(0, 1).flatten(1)
    with torch.no_grad():
        keys_SM = ranks.gather_rows(torch.where(valid.flatten() > 0, errors_KN, -1.0))
        truth_SM = ranks.gather_rows(truth_KN.to(torch.uint8))
        slopes_KN = ranks.scatter_columns(_jaccard_slopes(keys_SM, truth_SM), len(errors_KN))
    return _mean_of_present((errors_KN * slopes_KN).sum(1), ranks.sum_(truth_KN.sum(1)))


def _jaccard_slopes(errors_KN: Tensor, truth_KN: Tensor) -> Tensor:
    """Increase of 1 - Jaccard index by each cell when cells become wrong in the order of decreasing error.

    Computed in closed form from integer counts: differences of two Jaccard indices would lose most digits.
    """
    order = errors_KN.argsort(dim=1, descending=True, stable=True)
    hits = truth_KN.gather(1, order).int()
    before = hits.cumsum(1, dtype=torch.int32) - hits
    total = hits.sum(1, keepdim=True)
    others_before = torch.arange(hits.shape[1], device=hits.device, dtype=torch.int32) - before
    both, either = (total - before).to(errors_KN.dtype), (total + others_before).clamp(min=1).to(errors_KN.dtype)
    slopes = torch.where(hits > 0, 1 / either, both / (either * (either + 1)))
    return torch.empty_like(slopes).scatter_(1, order, slopes)


def _mean_of_present(losses_K: Tensor, cells_K: Tensor) -> Tensor:
    present = (cells_K > 0).to(losses_K.dtype)
    return (losses_K * present).sum() / positive_or_1(present.sum())


def soft_dice(p_BKhw: Tensor, truth_BKhw: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """1 - 2 sum(p t) / (sum(p) + sum(t)), sums over all images, mean over the classes that occur in truth.

    Void cells count nowhere; 0 where all is void.
    """
    p_KN = (p_BKhw * truth_BKhw.sum(dim=1, keepdim=True)).transpose(0, 1).flatten(1)
    truth_KN = truth_BKhw.transpose(0, 1).flatten(1)
    both_K, p_K, truth_K = ranks.summed(torch.stack([(p_KN * truth_KN).sum(1), p_KN.sum(1), truth_KN.sum(1)]))
    return ranks.share_of(_mean_of_present(1 - 2 * both_K / positive_or_1(p_K + truth_K), truth_K))


def region_mutual_information(logits_BKhw: Tensor, truth_BKhw: Tensor, stride: float) -> Tensor:
    """Region mutual information loss (Zhao et al. 2019), 0 or more.

    Maps are averaged over cells of about CELL_PX pixels (stride: pixels between logits); the 3x3 cells
    around a point, of prediction P and of truth Y, are one sample of 2 x 9 numbers. With M = cov(Y) -
    cov(Y, P) cov(P)^-1 cov(P, Y), cov(P) with RIDGE on its diagonal: the sum over classes of
    (log det(M + RIDGE) - log det(RIDGE)) / 2 / 9, mean over images. The paper's -I_l but for a constant,
    which makes it 0 for absent classes and log(2) / 2 (RIDGE is in it twice) for a perfectly predicted
    one; and with softmax where the authors' code has sigmoids. Information is blind to sign and scale:
    it goes beside cross-entropy. Void cells are 0 in both maps. Covariances and determinants are float64
    (float32 on MPS, which has no other). A map of fewer than 3x3 cells gives 0.
    """
    pool = max(1, round(CELL_PX / stride))
    images, classes = truth_BKhw.shape[:2]
    points = math.prod(size // pool - REGION + 1 for size in truth_BKhw.shape[2:])
    if min(truth_BKhw.shape[2:]) // pool < REGION:
        return at_least_float32(logits_BKhw).sum() * 0
    truth_cells = F.avg_pool2d(truth_BKhw, pool)
    valid = truth_BKhw.sum(dim=1, keepdim=True)

    def hidden(logits: Tensor, some: slice) -> Tensor:
        p_cells = F.avg_pool2d(logits.softmax(dim=1) * valid[some], pool)
        return _unexplained(p_cells, truth_cells[some]).sum()

    at_once = max(1, REGION_VALUES_AT_ONCE // (classes * 2 * REGION**2 * points))
    return sum_over_images(hidden, logits_BKhw, at_once).to(at_least_float32(logits_BKhw).dtype) / images


def _unexplained(p_BKhw: Tensor, truth_BKhw: Tensor) -> Tensor:
    """[B, K]: (log det(M + RIDGE) - log det(RIDGE)) / 2 / 9.

    det(M) is a Schur complement's: the product of the last nine pivots of the joint covariance. The
    eliminations are written out, as cuSOLVER may not be captured in a graph.
    """
    dtype = torch.float32 if p_BKhw.device.type == "mps" else torch.float64
    samples = torch.cat([_regions(p_BKhw.to(dtype)), _regions(truth_BKhw.to(dtype))], dim=2)
    mean = samples.mean(dim=-1, keepdim=True)
    joint = samples @ samples.mT / samples.shape[-1] - mean @ mean.mT
    rest = joint + RIDGE * torch.eye(joint.shape[-1], dtype=dtype, device=joint.device)
    pivots = []
    while rest.shape[-1]:
        pivots.append(rest[..., 0, 0].clamp(min=RIDGE))  # none is smaller, but for rounding
        row = rest[..., :1, 1:] / pivots[-1][..., None, None]
        rest = torch.addcmul(rest[..., 1:, 1:], rest[..., 1:, :1], row, value=-1)
    return (torch.stack(pivots[REGION**2 :], dim=-1) / RIDGE).log().sum(dim=-1) / (2 * REGION**2)


def _regions(map_BKhw: Tensor) -> Tensor:
    """[B, K, 9, N]: the 3x3 cells around each of the N inner cells."""
    rows, columns = (size - REGION + 1 for size in map_BKhw.shape[2:])
    shifted = [map_BKhw[..., y : y + rows, x : x + columns].flatten(2) for y in range(REGION) for x in range(REGION)]
    return torch.stack(shifted, dim=2)
