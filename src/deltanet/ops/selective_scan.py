"""Mamba's selective scan as torch sees it where a kernel can run it: registered with torch.library, so that it compiles whole."""

import torch
from torch import Tensor

from deltanet.kernels import triton as kernels

__all__ = ["fused_selective_scan", "refuse_scan"]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_NUMBERS = 32  # of a channel: the states of a few tokens must fit into the registers of one warp
_MISSING = kernels.missing()  # found out once, and not under a compiler's eyes


def refuse_scan(u: Tensor, A: Tensor) -> str | None:
    """None when the kernel can run the scan of u `[B, T, D]` with A `[D, S]`, else what is missing."""
    if _MISSING is not None:
        return _MISSING
    if not u.is_cuda and (torch.compiler.is_compiling() or not kernels.interpreting()):
        return f"it needs a CUDA GPU, and the tensors are on {u.device.type}"
    if u.dtype not in DTYPES:
        return f"it runs {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, not {str(u.dtype).removeprefix('torch.')}"
    numbers = A.shape[1]
    return f"it keeps up to {MOST_NUMBERS} numbers a channel, got {numbers}" if numbers > MOST_NUMBERS else None


@torch.library.custom_op("deltanet::selective_scan", mutates_args=())
def fused_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y `[B, T, D]` in u's dtype and the final states `[N, S, D]` in fp32; shapes as in `layers.selective_scan`."""
    from deltanet.kernels.triton.selective_scan import scan_forward

    return scan_forward(*_ready(u, dt, A, B, C, initial), cu_seqlens)


@fused_selective_scan.register_fake
def _(u, dt, A, B, C, initial, cu_seqlens):
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(sequences, A.shape[1], u.shape[2], dtype=torch.float32)


@torch.library.custom_op("deltanet::selective_scan_backward", mutates_args=())
def _gradients(
    dy: Tensor,
    dfinal: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from deltanet.kernels.triton.selective_scan import scan_backward

    dy, dfinal = dy.contiguous(), dfinal.contiguous()
    du, ddt, dA, dB, dC, dinitial = scan_backward(dy, dfinal, *_ready(u, dt, A, B, C, initial), cu_seqlens)
    return du, ddt, dA.to(A.dtype), dB, dC, dinitial


@_gradients.register_fake
def _(dy, dfinal, u, dt, A, B, C, initial, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, A, B, C, dfinal))


def _ready(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As the kernels take them: contiguous, A in fp32."""
    initial = None if initial is None else initial.contiguous()
    return u.contiguous(), dt.contiguous(), A.float().contiguous(), B.contiguous(), C.contiguous(), initial


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.states = output[1].shape


def _backward(ctx, dy, dfinal):
    u, *_, initial, _ = inputs = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    dfinal = u.new_zeros(ctx.states, dtype=torch.float32) if dfinal is None else dfinal
    *gradients, dinitial = _gradients(dy, dfinal, *inputs)
    return *gradients, dinitial if initial is not None else None, None


fused_selective_scan.register_autograd(_backward, setup_context=_setup_context)
