"""The short convolution and what follows it in one kernel: a warp carries a window of inputs along the tokens of some channels.

    p_t = b + sum_j w_j x_{t-P+j},    h_t = activation(p_t),    y_t = h_t,  or  h_t r_t  with  r_t = (|h_t|^2 + eps)^{-1/2}  over a unit of channels
    dp_t = activation'(p_t) dh_t,     dh_t = dy_t,  or  r_t (dy_t - y_t (y_t . dy_t))
    dx_s = sum_j w_j dp_{s+P-j},      dw_j = sum_t dp_t x_{t-P+j},    db = sum_t dp_t                    P = width - 1, j = 0 .. P

x before a sequence's start is its tail, or zero. Nothing but x is kept for the backward, which makes p again. Inside a sequence every input is
read once by each kernel (and P tokens of every part once more) and every number computed once; all arithmetic is fp32, and rounded at the end.
dw leaves as one share per part of a sequence and is added up outside, in the same order every time.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton.compiled import launch, on_its_device
from deltanet.kernels.triton.tiles import find_part

__all__ = ["short_conv_backward", "short_conv_forward", "short_conv_step"]

# Tokens of one program: few, so that 512 channels make programs for every multiprocessor. Its first P inputs are read twice, P tokens of gradients
# made twice (10%), and a share of dw written (8% of the traffic). One H200, 32,768 tokens, backward, ms at 2,048 and 512 channels (packed):
# parts of 32 0.187 and 0.064, of 64 0.182 and 0.079, of 128 0.169 and 0.080.
PART = 32
# Tokens whose loads are under way at once; the backward asks for the next ones before it works on these: 0.187 and 0.064, without 0.200 and 0.066.
FORWARD_ROWS = 8
BACKWARD_ROWS = 2
# Channels of a warp: 4 a lane, so that 16-bit loads are 8 bytes wide and windows fit. Wider units take more warps, whose sums meet in shared memory.
CHANNELS = 128
CONFIGS = {warps: LaunchConfig(warps=warps) for warps in (1, 2, 4, 8)}


@triton.jit
def _sigmoid(p):
    """1 / (1 + e^-p) by two approximations that need no care for small and large numbers: 5 instructions, where a division makes it 12."""
    root = tl.rsqrt(1 + tl.math.exp2(p * -1.4426950408889634))
    return root * root


@triton.jit
def _activate(p, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return p * _sigmoid(p)
    elif ACTIVATION == "relu":
        return tl.maximum(p, 0.0)
    elif ACTIVATION == "elu1":
        return tl.where(p > 0, p + 1, tl.exp(p))
    else:
        return p


@triton.jit
def _slope(p, h, ACTIVATION: tl.constexpr):
    """activation'(p), where h = activation(p)."""
    if ACTIVATION == "silu":
        s = _sigmoid(p)
        return s + h * (1 - s)
    elif ACTIVATION == "relu":
        return tl.where(p > 0, 1.0, 0.0)
    elif ACTIVATION == "elu1":
        return tl.where(p > 0, 1.0, h)
    else:
        return 1.0


@triton.jit
def _inverse_norm(h, in_d, eps, ACTIVATION: tl.constexpr):
    if ACTIVATION == "elu1":  # the others are 0 where there is no channel
        h = tl.where(in_d, h, 0.0)
    return tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) + eps)


@triton.jit
def _before(x, tail, part, tokens, stride, D, channel, in_d, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """The P inputs before a part whose first token is at `x`, oldest first; before a sequence's first part they are the tail that ends at `tail`."""
    window = ()
    inside = in_d & (part > 0) & (tokens > 0)  # a place without a part may lie beyond all tokens
    for i in tl.static_range(WIDTH - 1):
        value = tl.load(x + (i - (WIDTH - 1)) * stride + channel, mask=inside, other=0.0).to(tl.float32)
        if TAIL:
            value += tl.load(tail + (i - (WIDTH - 1)) * D + channel, mask=in_d & (part == 0), other=0.0).to(tl.float32)
        window += (value,)
    return window


@triton.jit
def _rows(x, t, tokens, stride, channel, in_d, ROWS: tl.constexpr):
    """Tokens t to t + ROWS - 1 of those at `x`, zeros from `tokens` on."""
    rows = ()
    for i in tl.static_range(ROWS):
        rows += (tl.load(x + (t + i) * stride + channel, mask=in_d & (t + i < tokens), other=0.0),)
    return rows


@triton.jit
def _taps(w, channel, in_d, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        taps += (tl.load(w + channel * WIDTH + j, mask=in_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _channels(D, UNIT: tl.constexpr, BK: tl.constexpr, UNITS: tl.constexpr):
    """Channels `[UNITS, BK]` of a program, a row to a unit, and which of them exist."""
    inside = tl.arange(0, BK)[None, :]
    channel = (tl.program_id(1) * UNITS + tl.arange(0, UNITS)[:, None]) * UNIT + inside
    return channel, (inside < UNIT) & (channel < D)


@triton.jit(do_not_specialize=["T", "N", "steps", "eps"])
def forward(
    x,  # [tokens, D], rows `stride` apart
    w,  # [D, WIDTH]
    b,  # [D], BIAS only
    tail,  # [N, P, D], TAIL only
    cu_seqlens,  # [N + 1], PACKED only
    y,  # [tokens, D] out
    new_tail,  # [N, P, D] out, STEP only: one token a sequence; may be `tail`
    T,
    N,
    steps,
    eps,
    D,
    stride,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BK: tl.constexpr,
    UNITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    PACKED: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    n, part, begin, end = find_part(tl.program_id(0), cu_seqlens, N, steps, T, PART, PACKED)
    first = begin + part * PART
    tokens = tl.minimum(end - first, PART).to(tl.int32)
    channel, in_d = _channels(D, UNIT, BK, UNITS)
    x += first * stride
    y += first * D
    tail += (n.to(tl.int64) + 1) * (WIDTH - 1) * D
    taps = _taps(w, channel, in_d, WIDTH)
    start = tl.zeros([UNITS, BK], tl.float32)
    if BIAS:
        start += tl.load(b + channel, mask=in_d, other=0.0).to(tl.float32)
    window = _before(x, tail, part, tokens, stride, D, channel, in_d, WIDTH, TAIL)
    for t in range(0, tokens, ROWS):
        inputs = _rows(x, t, tokens, stride, channel, in_d, ROWS)
        for i in tl.static_range(ROWS):
            window += (inputs[i].to(tl.float32),)
            p = start
            for j in tl.static_range(WIDTH):
                p += taps[j] * window[j]
            h = _activate(p, ACTIVATION)
            if NORMALIZE:
                h *= _inverse_norm(h, in_d, eps, ACTIVATION)
            tl.store(y + (t + i) * D + channel, h.to(y.dtype.element_ty), mask=in_d & (t + i < tokens))
            window = window[1:]
    if STEP:
        new_tail += n.to(tl.int64) * (WIDTH - 1) * D
        for i in tl.static_range(WIDTH - 1):
            tl.store(new_tail + i * D + channel, window[i].to(new_tail.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["T", "N", "steps", "eps"])
def backward(
    dy,  # [tokens, D]
    x,  # [tokens, D], rows `stride` apart
    w,  # [D, WIDTH]
    b,  # [D], BIAS only
    tail,  # [N, P, D], TAIL only
    cu_seqlens,  # [N + 1], PACKED only
    dx,  # [tokens, D] out
    dw,  # [places, WIDTH + BIAS, D] fp32 out: a part's share of dw, and of db
    dtail,  # [N, P, D] out, TAIL only
    T,
    N,
    steps,
    eps,
    D,
    stride,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    BK: tl.constexpr,
    UNITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    PACKED: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    P: tl.constexpr = WIDTH - 1
    n, part, begin, end = find_part(tl.program_id(0), cu_seqlens, N, steps, T, PART, PACKED)
    first = begin + part * PART
    tokens = tl.minimum(end - first, PART).to(tl.int32)
    seen = tl.minimum(end - first, PART + P).to(tl.int32)  # tokens whose gradients reach this part's inputs
    channel, in_d = _channels(D, UNIT, BK, UNITS)
    x += first * stride
    dy += first * D
    dx += first * D
    tail += (n.to(tl.int64) + 1) * P * D
    dtail += (n.to(tl.int64) + 1) * P * D
    taps = _taps(w, channel, in_d, WIDTH)
    zero = tl.zeros([UNITS, BK], tl.float32)
    start = zero
    if BIAS:
        start += tl.load(b + channel, mask=in_d, other=0.0).to(tl.float32)
    window = _before(x, tail, part, tokens, stride, D, channel, in_d, WIDTH, TAIL)
    dps = (zero,) * P  # of the P tokens before, oldest first
    sums = (zero,) * WIDTH
    sum_b = zero
    next_inputs, next_gradients = _rows(x, 0, seen, stride, channel, in_d, ROWS), _rows(dy, 0, seen, D, channel, in_d, ROWS)
    for t in range(0, tokens + P, ROWS):
        inputs, gradients = next_inputs, next_gradients
        next_inputs = _rows(x, t + ROWS, seen, stride, channel, in_d, ROWS)
        next_gradients = _rows(dy, t + ROWS, seen, D, channel, in_d, ROWS)
        for i in tl.static_range(ROWS):
            window += (inputs[i].to(tl.float32),)
            p = start
            for j in tl.static_range(WIDTH):
                p += taps[j] * window[j]
            h = _activate(p, ACTIVATION)
            dh = gradients[i].to(tl.float32)
            if NORMALIZE:
                r = _inverse_norm(h, in_d, eps, ACTIVATION)
                dh = r * (dh - r * r * h * tl.sum(h * dh, 1, keep_dims=True))
            dp = dh * _slope(p, h, ACTIVATION)
            dps += (dp,)
            own = tl.where(t + i < tokens, dp, 0.0)  # later tokens are another part's
            added = ()
            b_dx = zero
            for j in tl.static_range(WIDTH):
                added += (sums[j] + own * window[j],)
                b_dx += taps[j] * dps[P - j]
            sums = added
            if BIAS:
                sum_b += own
            done = t + i - P  # this input's gradient is complete
            tl.store(dx + done * D + channel, b_dx.to(dx.dtype.element_ty), mask=in_d & (done >= 0) & (done < tokens))
            if TAIL:
                tl.store(dtail + done * D + channel, b_dx.to(dtail.dtype.element_ty), mask=in_d & (done < 0) & (part == 0))
            window, dps = window[1:], dps[1:]
    share = dw + tl.program_id(0).to(tl.int64) * (WIDTH + BIAS) * D + channel
    for j in tl.static_range(WIDTH):
        tl.store(share + j * D, sums[j], mask=in_d)
    if BIAS:
        tl.store(share + WIDTH * D, sum_b, mask=in_d)


class _Call:
    """Sizes of one call, and how its programs lie."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, cu_seqlens: Tensor | None, activation: str, unit: int
    ):
        (B, T, D), packed = x.shape, cu_seqlens is not None
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.D, self.places = D, T // PART + N if packed else N * -(-T // PART)
        stride = x.stride(1) if T > 1 else x.stride(0)
        self.sizes = (T, N, N.bit_length()), (D, stride)
        self.columns, self.config, self.constants = _plan(
            D, weight.shape[-1], activation, unit, bias is not None, tail is not None, packed, PART
        )
        # what decides the code, beside dtypes and alignments
        self.key = (x.device, D, stride, max(B * T, N) >= 2**31, weight.shape[-1], activation, unit, bias is None, tail is None, packed, PART)

    def run(self, kernel, name: str, tensors: tuple, eps: float, **constants: int) -> None:
        stand_in = tensors[0]  # where a tensor is missing, another stands in, and is never followed
        tensors = tuple([stand_in if tensor is None else tensor for tensor in tensors])
        key = (name, *self.key, *[(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
        places, sizes = self.sizes
        grid = (self.places, self.columns, 1)
        launch(kernel, key, grid, (*tensors, *places, eps, *sizes), self.config, lambda: self.constants | constants)


@cache
def _plan(D: int, width: int, activation: str, unit: int, bias: bool, tail: bool, packed: bool, part: int) -> tuple[int, LaunchConfig, dict]:
    """Programs side by side over D channels, their warps, and the kernels' constants."""
    BK = max(16, triton.next_power_of_2(unit)) if unit else CHANNELS
    units = max(1, CHANNELS // BK)
    constants = dict(
        WIDTH=width, UNIT=unit or BK, BK=BK, UNITS=units, ACTIVATION=activation, NORMALIZE=bool(unit), BIAS=bias, TAIL=tail, PACKED=packed,
        PART=part,
    )  # fmt: skip
    return triton.cdiv(D, units * (unit or BK)), CONFIGS[max(1, BK // CHANNELS)], constants


def _ready(x: Tensor) -> Tensor:
    """`[B, T, D]` as rows of contiguous channels, all as far apart."""
    B, T, _ = x.shape
    return x if x.stride(2) == 1 and (B == 1 or T == 1 or x.stride(0) == T * x.stride(1)) else x.contiguous()


@on_its_device
def short_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    unit: int,
    eps: float,
) -> Tensor:
    """y `[B, T, D]` in x's dtype, every `unit` channels of it normalised together.

    x `[B, T, D]`, weight `[D, 1, width]`, bias `[D]`, tail `[N, width - 1, D]`, all but x contiguous or made so.
    """
    x, tail = _ready(x), None if tail is None else tail.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = _Call(x, weight, bias, tail, cu_seqlens, activation, unit)
    if y.numel():
        tensors = (x, weight.contiguous(), bias, tail, cu_seqlens, y, None)
        call.run(forward, "short_conv", tensors, eps, ROWS=FORWARD_ROWS, STEP=False)
    return y


@on_its_device
def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, activation: str, unit: int, eps: float, *, inplace: bool
) -> tuple[Tensor, Tensor]:
    """One token `[N, 1, D]` of each sequence, as `short_conv_forward`, and the new tail, which is `tail` where that is `inplace`. No gradient."""
    x, contiguous = _ready(x), tail.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_tail = contiguous if inplace and contiguous is tail else torch.empty_like(contiguous)
    call = _Call(x, weight, bias, contiguous, None, activation, unit)
    if y.numel():
        call.run(forward, "short_conv_step", (x, weight.contiguous(), bias, contiguous, None, y, new_tail), eps, ROWS=1, STEP=True)
    return y, new_tail


@on_its_device
def short_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    unit: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dtail, each in the dtype of its tensor, None for what was not given."""
    x, tail = _ready(x), None if tail is None else tail.contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtail = None if tail is None else torch.empty_like(tail)
    call = _Call(x, weight, bias, tail, cu_seqlens, activation, unit)
    width = weight.shape[-1]
    shares = torch.empty(call.places, width + (bias is not None), call.D, dtype=torch.float32, device=x.device)
    if x.shape[2] and call.places:
        tensors = (dy.contiguous(), x, weight.contiguous(), bias, tail, cu_seqlens, dx, shares, dtail)
        call.run(backward, "short_conv_backward", tensors, eps, ROWS=BACKWARD_ROWS)
    elif dtail is not None:
        dtail.zero_()
    sums = shares.sum(0)
    dweight = sums[:width].T.contiguous().view_as(weight).to(weight.dtype)
    return dx, dweight, None if bias is None else sums[width].to(bias.dtype), dtail
