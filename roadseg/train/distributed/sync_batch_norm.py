"""Batch norm over the whole batch where several ranks hold parts of it.

Conversion changes only a module's class: parameters, buffers and mode stay, so that optimizer, average, checkpoints and
frozen parts are unaffected. There are three forms of the same arithmetic: on the CPU; on CUDA by the kernels of
nn.SyncBatchNorm, without the counts that it sends for ranks with unequal batches; and in a compiled network plain
operations around one collective.

Shapes: B samples of this rank, C channels, H W the map; R ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from roadseg.errors import ConfigError
from roadseg.train.distributed.process_group import answered
from roadseg.train.losses.pixel import at_least_float32

if TYPE_CHECKING:
    from roadseg.train.distributed.process_group import Ranks

Network = TypeVar("Network", bound=nn.Module)


class _Normalised(torch.autograd.Function):
    """Batch normalization (Ioffe and Szegedy, 2015) with sums over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, mean_C: Tensor, var_C: Tensor,
        count: int, eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, torch.rsqrt(var_C + eps))
        ctx.count = count
        return F.batch_norm(x_BCHW, mean_C, var_C, weight_C, bias_C, False, 0.0, eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_C, invstd_C = ctx.saved_tensors
        dy = at_least_float32(dy_BCHW)
        xhat = (at_least_float32(x_BCHW) - _wide(mean_C)) * _wide(invstd_C)
        own_2C = torch.stack([dy.sum((0, 2, 3)), (dy * xhat).sum((0, 2, 3))])
        dx = None
        if ctx.needs_input_grad[0]:
            all_2C = own_2C.clone()
            with answered():
                dist.all_reduce(all_2C)
            sum_dy_C, sum_dy_xhat_C = all_2C / ctx.count
            dx = dy - _wide(sum_dy_C) - xhat * _wide(sum_dy_xhat_C)
            dx = (dx * _wide(invstd_C if weight_C is None else invstd_C * weight_C)).to(x_BCHW.dtype)
        # The gradients of weight and bias are this rank's part: the loop sums those of all.
        dweight, dbias = (
            g if needed else None for g, needed in zip((own_2C[1], own_2C[0]), ctx.needs_input_grad[1:3], strict=True)
        )
        return dx, dweight, dbias, None, None, None, None


def _wide(value_C: Tensor) -> Tensor:
    return value_C[:, None, None]


def batch_statistics(x_BCHW: Tensor) -> tuple[Tensor, Tensor, int]:
    """(mean, biased variance: [C], float32, or float64 of that; values a channel) over all ranks.

    Ranks may hold different numbers of samples. Means and squared deviations are combined as by Chan et al. (1979), in
    double precision and in the order of ranks, so that all ranks get the same bits.
    """
    x = at_least_float32(x_BCHW)
    channels, values = x.shape[1], x.numel() // x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if values:
        var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0)
        own[:channels], own[channels:-1], own[-1] = mean_C, var_C, values
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with answered():
        dist.all_gather(rows, own)
    all_R = torch.stack(rows)
    mean_RC, var_RC, count_R1 = all_R[:, :channels], all_R[:, channels:-1], all_R[:, -1:]
    count = count_R1.sum()
    mean_C = (mean_RC * count_R1).sum(0) / count
    var_C = ((var_RC + (mean_RC - mean_C) ** 2) * count_R1).sum(0) / count
    return mean_C.to(x.dtype), var_C.to(x.dtype), int(count)


class _NormalisedOnCuda(torch.autograd.Function):
    """`_Normalised` by PyTorch's kernels, running statistics included; every rank has the same number of values.

    A network has about 60 norms with two collectives each; they are the cost of several GPUs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, running_mean_C: Tensor | None,
        running_var_C: Tensor | None, momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        x_BCHW, values = _packed(x_BCHW), x_BCHW.numel() // x_BCHW.shape[1]
        own_2C = torch.cat(torch.batch_norm_stats(x_BCHW, eps))
        mean_RC, invstd_RC = _all_rows(own_2C, dist.get_world_size()).chunk(2, 1)
        mean_C, invstd_C = torch.batch_norm_gather_stats_with_counts(
            x_BCHW, mean_RC, invstd_RC, running_mean_C, running_var_C, momentum, eps,
            _counts(values, mean_RC.dtype, x_BCHW.device),
        )  # fmt: skip
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, invstd_C)
        ctx.counts = _counts(values, torch.int32, x_BCHW.device)
        return torch.batch_norm_elemt(x_BCHW, weight_C, bias_C, mean_C, invstd_C, eps)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_C, invstd_C = ctx.saved_tensors
        dy_BCHW = _packed(dy_BCHW)
        sum_dy_C, sum_dy_xmu_C, dweight_C, dbias_C = torch.batch_norm_backward_reduce(
            dy_BCHW, x_BCHW, mean_C, invstd_C, weight_C, *ctx.needs_input_grad[:3]
        )
        dx = None
        if ctx.needs_input_grad[0]:
            all_2C = torch.cat([sum_dy_C, sum_dy_xmu_C])
            with answered():
                dist.all_reduce(all_2C)
            sum_dy_C, sum_dy_xmu_C = all_2C.chunk(2)
            dx = torch.batch_norm_backward_elemt(
                dy_BCHW, x_BCHW, mean_C, invstd_C, weight_C, sum_dy_C, sum_dy_xmu_C, ctx.counts
            )
        # As above, this rank's part.
        dweight, dbias = (
            g if needed else None for g, needed in zip((dweight_C, dbias_C), ctx.needs_input_grad[1:3], strict=True)
        )
        return dx, dweight, dbias, None, None, None, None


def _packed(x_BCHW: Tensor) -> Tensor:
    """Make it channels last: the kernels for other layouts round bfloat16 sums at every addition."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


_COUNTS: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def _counts(values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[R]. Cached, except during a CUDA graph capture, whose memory is freed with the graph."""
    key = (dist.get_world_size(), values, dtype, device)
    if (kept := _COUNTS.get(key)) is not None:
        return kept
    made = torch.full(key[:1], values, dtype=dtype, device=device)
    if not torch.cuda.is_current_stream_capturing():
        _COUNTS[key] = made
    return made


def _all_rows(own_N: Tensor, ranks: int) -> Tensor:
    """[R, N]: every rank's row, in the order of ranks."""
    all_RN = own_N.new_empty(ranks, len(own_N))
    with answered():
        dist.all_gather_into_tensor(all_RN.view(-1), own_N.contiguous())
    return all_RN


@torch.library.custom_op("roadseg::gathered", mutates_args=())
def _gathered(own_N: Tensor, ranks: int) -> Tensor:
    """`_all_rows` with a gradient, opaque to the compiler.

    The number of ranks is an argument, so that code compiled for another number is not reused.
    """
    return _all_rows(own_N, ranks)


@torch.library.custom_op("roadseg::own_of_sum", mutates_args=())
def _own_share(parts_RN: Tensor) -> Tensor:
    """[N]: this rank's row of the sum over all ranks: the gradient of `_gathered`."""
    sum_RN = parts_RN.clone(memory_format=torch.contiguous_format)
    with answered():
        dist.all_reduce(sum_RN)
    return sum_RN[dist.get_rank()].clone()


_gathered.register_fake(lambda own_N, ranks: own_N.new_empty(ranks, len(own_N)))
_own_share.register_fake(lambda parts_RN: torch.empty_like(parts_RN[0]))
_gathered.register_autograd(lambda _, grad_RN: (_own_share(grad_RN), None))


class _OverRanks(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all ranks. Eval mode needs no collective."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        self._check_input_dim(x_BCHW)
        return self._traced(x_BCHW) if torch.compiler.is_compiling() else self._normalised(x_BCHW)

    def _normalised(self, x_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def _traced(self, x_BCHW: Tensor) -> Tensor:
        """Batch norm in operations that the compiler can fuse, around one collective; ranks have equal batches.

        An autograd function with collectives would break the graph at every norm, and most pieces would stay eager.
        """
        x = at_least_float32(x_BCHW)
        own_2C = torch.cat(torch.var_mean(x, (0, 2, 3), correction=0))
        var_RC, mean_RC = _gathered(own_2C, dist.get_world_size()).chunk(2, 1)
        mean_C = mean_RC.mean(0)
        var_C = (var_RC + (mean_RC - mean_C) ** 2).mean(0)
        self._follow(mean_C.detach(), var_C.detach(), len(mean_RC) * (x.numel() // x.shape[1]))
        y = (x - _wide(mean_C)) * _wide(torch.rsqrt(var_C + self.eps))
        if self.affine:
            y = y * _wide(self.weight) + _wide(self.bias)
        return y.to(x_BCHW.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(var_C * (count / (count - 1)), share)


class _Activated(nn.Module):
    """Mixin for timm's BatchNormAct2d: batch norm followed by drop and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x_BCHW)))  # type: ignore[misc, no-any-return]


class NcclBatchNorm2d(_OverRanks):
    """On CUDA; every rank has the same number of samples."""

    def _normalised(self, x_BCHW: Tensor) -> Tensor:
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1.0 / float(self.num_batches_tracked)
        return _NormalisedOnCuda.apply(  # type: ignore[no-any-return, no-untyped-call]
            x_BCHW, self.weight, self.bias, self.running_mean, self.running_var, share or 0.0, self.eps
        )


class NcclBatchNormAct2d(_Activated, NcclBatchNorm2d):
    """timm's."""


class GlooBatchNorm2d(_OverRanks):
    """On the CPU; unless compiled, ranks may have different numbers of samples."""

    def _normalised(self, x_BCHW: Tensor) -> Tensor:
        mean_C, var_C, count = batch_statistics(x_BCHW.detach())
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count} over all ranks")
        self._follow(mean_C, var_C, count)
        return _Normalised.apply(x_BCHW, self.weight, self.bias, mean_C, var_C, count, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class GlooBatchNormAct2d(_Activated, GlooBatchNorm2d):
    """timm's."""


ON_CPU: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: GlooBatchNorm2d,
    BatchNormAct2d: GlooBatchNormAct2d,
}
ON_CUDA: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: NcclBatchNorm2d,
    BatchNormAct2d: NcclBatchNormAct2d,
}
PLAIN = {synced: plain for kinds in (ON_CPU, ON_CUDA) for plain, synced in kinds.items()}


def sync_batch_norm(network: Network, ranks: Ranks) -> Network:
    """Convert every batch norm of `network`, in place, to one over the batches of all ranks; returns `network`.

    The ranks must be connected, on CUDA by NCCL. Does nothing if this process is alone. Raises as
    `refuse_unknown_norms`.
    """
    if ranks.world == 1:
        return network
    refuse_unknown_norms(network)
    kinds = ON_CUDA if dist.get_backend() == "nccl" else ON_CPU
    for module in network.modules():
        if synced := kinds.get(type(module)):
            module.__class__ = synced  # type: ignore[assignment]
    return network


def refuse_unknown_norms(network: nn.Module) -> None:
    """Raise ConfigError for a class of batch norm that `sync_batch_norm` can't convert."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in (*ON_CPU, *PLAIN):
            raise ConfigError(
                f"{type(module).__name__} ({name}) can't be shared by several processes",
                expected=", ".join(kind.__name__ for kind in ON_CPU),
                where="model.backbone",
                todo="choose another, or set training.sync_batch_norm to false",
            )


def plain_batch_norm(network: Network) -> Network:
    """Undo `sync_batch_norm`, in place, for a network that one process runs and exports; returns `network`."""
    for module in network.modules():
        if plain := PLAIN.get(type(module)):
            module.__class__ = plain  # type: ignore[assignment]
    return network
