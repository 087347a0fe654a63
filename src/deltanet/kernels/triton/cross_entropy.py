"""Cross-entropy of rows of logits, and its gradient in their place: a row is read once forward, and read and written once backward.

    lse_m = log sum_v e^{z_mv},    loss_m = lse_m - z_{m, target_m},  0 where the target is IGNORED, NaN where there is no such column
    dz_mv = dloss_m (e^{z_mv - lse_m} - [v = target_m])              written over z_mv

Sums are fp32. Forward a program takes a row, keeping a maximum and a sum for every column of its tile, which meet at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_backward", "cross_entropy_forward"]

IGNORED = tl.constexpr(-100)  # as torch has it
# Columns of a program: 8 16-bit numbers a thread, so that a load is 16 bytes wide; 8 warps, since a row is long and few programs fit otherwise.
COLUMNS, WARPS = 2048, 8


@triton.jit
def forward(
    z,  # [M, V]
    targets,  # [M] int64
    losses,  # [M] fp32 out
    lse,  # [M] fp32 out
    V,
    BV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * V
    column = tl.arange(0, BV)
    most = tl.full([BV], -1e30, tl.float32)  # finite, so that columns beyond V stay 0 and not NaN
    total = tl.zeros([BV], tl.float32)
    for v in range(0, V, BV):
        b_z = tl.load(z + v + column, mask=v + column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(most, b_z)
        total = total * tl.exp(most - new) + tl.exp(b_z - new)
        most = new
    peak = tl.max(most, 0)
    b_lse = peak + tl.log(tl.sum(total * tl.exp(most - peak), 0))
    target = tl.load(targets + row)
    hit = tl.load(z + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    tl.store(lse + row, b_lse)
    tl.store(losses + row, tl.where(target == IGNORED, 0.0, b_lse - hit))


@triton.jit
def backward(
    z,  # [M, V] in: logits, out: their gradients
    targets,  # [M] int64
    lse,  # [M] fp32
    dlosses,  # [M] fp32
    V,
    BV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    at, inside = z + row * V + column, column < V
    target = tl.load(targets + row)
    scale = tl.where(target != IGNORED, tl.load(dlosses + row), 0.0)
    b_z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(b_z - tl.load(lse + row))
    dz = scale * tl.where(column == target, share - 1, share)
    tl.store(at, dz.to(z.dtype.element_ty), mask=inside)


def cross_entropy_forward(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor) -> None:
    """Writes `losses` and `lse` `[M]` fp32 of logits `[M, V]`, contiguous, and targets `[M]` int64."""
    if len(logits):
        with torch.cuda.device_of(logits):
            forward[(len(logits),)](logits, targets, losses, lse, logits.shape[1], BV=COLUMNS, num_warps=WARPS)


def cross_entropy_backward(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor) -> None:
    """Writes their gradients over the logits `[M, V]`; lse and dlosses `[M]` fp32."""
    (M, V) = logits.shape
    if M:
        with torch.cuda.device_of(logits):
            backward[(M, triton.cdiv(V, COLUMNS))](logits, targets, lse, dlosses, V, BV=COLUMNS, num_warps=WARPS)
