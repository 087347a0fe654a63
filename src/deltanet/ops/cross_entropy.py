"""A linear head and the cross-entropy of its logits, fused where a kernel can run it: the logits are made in pieces, and again in the backward."""

import torch
from torch import Tensor

from deltanet.kernels import triton as kernels
from deltanet.ops.autograd import plain

__all__ = ["fused_linear_cross_entropy", "refuse_cross_entropy"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS = 2**28  # most logits held at a time, 512 MiB in 16 bits: pieces of 8,192 tokens at a vocabulary of 32,768


def refuse_cross_entropy(x: Tensor) -> str | None:
    """None when the kernel can run on hidden states x `[M, D]`, else what is missing."""
    if (lacking := kernels.missing()) is not None:
        return lacking
    if not x.is_cuda and not kernels.interpreting():
        return f"it needs a CUDA GPU, and the tensors are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it runs {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, not {str(x.dtype).removeprefix('torch.')}"
    return None if plain(x) else "it runs eagerly alone, and something looks on: a compiler, tracing, a dispatch mode"


def fused_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses `[M]` fp32 of x `[M, D]` with weight `[V, D]` and targets `[M]` int64, 0 where these are -100. Under autocast in its dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Nothing of the size of the logits is kept: the backward multiplies again and overwrites the logits with their gradients."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        from deltanet.kernels.triton.cross_entropy import cross_entropy_forward

        narrow, narrow_weight = x.to(dtype), weight.to(dtype)
        losses, lse = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        for piece in _pieces(len(x), len(weight)):
            cross_entropy_forward(narrow[piece] @ narrow_weight.mT, targets[piece], losses[piece], lse[piece])
        ctx.save_for_backward(narrow, weight, targets, lse)
        ctx.dtype = x.dtype
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses):
        from deltanet.kernels.triton.cross_entropy import cross_entropy_backward

        x, weight, targets, lse = ctx.saved_tensors
        narrow_weight, dlosses = weight.to(x.dtype), dlosses.to(torch.float32).contiguous()
        dx = torch.empty(x.shape, dtype=ctx.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[1] else None
        for piece in _pieces(len(x), len(weight)):
            dz = x[piece] @ narrow_weight.mT
            cross_entropy_backward(dz, targets[piece], lse[piece], dlosses[piece])
            if dx is not None:
                dx[piece] = dz @ narrow_weight
            if dweight is not None:
                dweight += dz.mT @ x[piece]
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def _pieces(rows: int, vocabulary: int) -> list[slice]:
    """Slices of the rows, as many at a time as LOGITS allows: a multiple of 128, since matrices are multiplied in such tiles."""
    most = max(1, LOGITS // vocabulary)
    most -= most % 128 if most > 128 else 0
    return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]
