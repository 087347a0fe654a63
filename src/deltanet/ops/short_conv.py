"""The short convolution as torch sees it where a kernel can run it: registered with torch.library for whoever looks on, and eager as a
plain autograd.Function, as the delta rule is (ops/autograd.py says why).
"""

import torch
from torch import Tensor

from deltanet.kernels import triton as kernels
from deltanet.ops.autograd import plain
from deltanet.ops.segments import check_boundaries

__all__ = ["fused_short_conv", "fused_short_conv_step", "refuse_short_conv"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (2, 8)  # the window and its gradients live in registers
MOST_CHANNELS = 1024  # of a unit that is normalised: 8 warps
_MISSING = kernels.missing()  # found out once, and not under a compiler's eyes


def refuse_short_conv(x: Tensor, width: int, unit: int) -> str | None:
    """None when the kernel can run a convolution of that width on x `[B, T, D]` and normalise `unit` channels together, else what is missing."""
    if _MISSING is not None:
        return _MISSING
    if not x.is_cuda and (torch.compiler.is_compiling() or not kernels.interpreting()):
        return f"it needs a CUDA GPU, and the tensors are on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"it runs {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}, not {str(x.dtype).removeprefix('torch.')}"
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        return f"it runs widths of {WIDTHS[0]} to {WIDTHS[1]}, got {width}"
    return f"it normalises up to {MOST_CHANNELS} channels together, got {unit}" if unit > MOST_CHANNELS else None


def fused_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    unit: int,
    eps: float,
) -> Tensor:
    """y `[B, T, D]` in x's dtype; arguments as `layers.ShortConv` has them, `unit` 0 where nothing is normalised."""
    call = (x, weight, bias, tail, cu_seqlens, activation, unit, eps)
    if not plain(x):
        return _short_conv(*call)
    needed = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in call[:4])
    return _Eager.apply(*call) if needed else _forward(*call)


def fused_short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, activation: str, unit: int, eps: float, *, inplace: bool
) -> tuple[Tensor, Tensor] | None:
    """y and the new tail, in place if asked, of one token `[N, 1, D]` of each sequence; None with gradients on, or when something looks on."""
    if not plain(x) or torch.is_grad_enabled():
        return None
    from deltanet.kernels.triton.short_conv import short_conv_step

    return short_conv_step(x, weight, bias, tail, activation, unit, eps, inplace=inplace)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    unit: int,
    eps: float,
) -> Tensor:
    from deltanet.kernels.triton.short_conv import short_conv_forward

    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x.shape[1])
    return short_conv_forward(x, weight, bias, tail, cu_seqlens, activation, unit, eps)


_short_conv = torch.library.custom_op("deltanet::short_conv", _forward, mutates_args=())


@_short_conv.register_fake
def _(x, weight, bias, tail, cu_seqlens, activation, unit, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    unit: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dtail; empty for what was not given, as a registered operator cannot return None."""
    from deltanet.kernels.triton.short_conv import short_conv_backward

    dx, dweight, dbias, dtail = short_conv_backward(dy, x, weight, bias, tail, cu_seqlens, activation, unit, eps)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias, x.new_empty(0) if dtail is None else dtail


_short_conv_backward = torch.library.custom_op("deltanet::short_conv_backward", _gradients, mutates_args=())


@_short_conv_backward.register_fake
def _(dy, x, weight, bias, tail, cu_seqlens, activation, unit, eps):
    def like(z: Tensor | None) -> Tensor:
        return x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)

    return like(x), like(weight), like(bias), like(tail)


def _setup_context(ctx, inputs, output):
    x, weight, bias, tail, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, tail, cu_seqlens)


def _backward(ctx, dy):
    x, weight, bias, tail, cu_seqlens = ctx.saved_tensors
    gradients = _gradients if plain(dy) else _short_conv_backward
    dx, dweight, dbias, dtail = gradients(dy, x, weight, bias, tail, cu_seqlens, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None if tail is None else dtail, None, None, None, None


_short_conv.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _backward(ctx, dy)
