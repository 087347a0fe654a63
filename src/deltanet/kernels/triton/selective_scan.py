"""Mamba's selective scan, fused: the S numbers of a channel live in registers and never go to memory but at the end.

    h_t = a_t h_{t-1} + b_t,    y_t = C_t . h_t             a_t = e^{dt_t A},  b_t = dt_t u_t B_t           per channel, h in R^S
    dh_t = C_t dy_t + a_{t+1} dh_{t+1},    dC_t = sum_d dy_t h_t,    dB_t = sum_d dh_t dt_t u_t,    d(dt_t u_t) = dh_t . B_t
    d(dt_t A) = (a_t dh_t) h_{t-1}                           so nothing is divided by a decay

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.3.2. A program is one warp with one sequence and a few channels, token after token; tokens are
taken some at a time so that their loads are under way together. Nothing but the inputs is kept for the backward: the forward runs once more and
leaves the states before every few tokens, from which the backward, going from the end, makes those between. What is summed over channels (dB, dC)
and over sequences (dA) leaves in one share per program and is added up outside.

What costs is the sums: over numbers for y, du and ddt, over channels for dB and dC. The tile [pair, run, lane, lane] is laid so that a lane holds
a run of both, and each sum begins in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scan_backward", "scan_forward"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
PAIR: tl.constexpr = tl.constexpr(2)  # neighbouring channels of a lane
ACROSS: tl.constexpr = tl.constexpr(8)  # lanes that share the channels
ALONG: tl.constexpr = tl.constexpr(4)  # lanes that share the numbers of a channel
STRIP: tl.constexpr = tl.constexpr(16)  # channels of a program: PAIR * ACROSS


@dataclass(frozen=True)
class Tokens:
    """How many tokens a program takes at a time."""

    forward: int
    backward: int


# By numbers of a channel, up to so many. More tokens in the backward write and read fewer states, until registers run out.
TOKENS = {16: Tokens(forward=8, backward=8), 32: Tokens(forward=8, backward=4)}


@triton.jit
def _span(cu_seqlens, n, T, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        return n.to(tl.int64) * T, n.to(tl.int64) * T + T


@triton.jit
def _channels(strip):
    """[PAIR, ACROSS], of one strip."""
    return strip * STRIP + tl.arange(0, ACROSS)[None, :] * PAIR + tl.arange(0, PAIR)[:, None]


@triton.jit
def _numbers(BS: tl.constexpr):
    """[run, ALONG]"""
    RUN: tl.constexpr = BS // ALONG
    return tl.arange(0, ALONG)[None, :] * RUN + tl.arange(0, RUN)[:, None]


@triton.jit
def _wide(x):
    """Of each channel, against the tile [PAIR, run, ALONG, ACROSS]."""
    return x[:, None, None, :]


@triton.jit
def _tall(x):
    """Of each number, against the tile."""
    return x[None, :, :, None]


@triton.jit
def _tile(x, channel, channel_stride, number, number_stride):
    """Pointers [PAIR, run, ALONG, ACROSS] to a matrix. The hints understate how contiguous memory is, see recurrent_tiles.state_tile."""
    pointer = x + (_wide(channel) * channel_stride + _tall(number) * number_stride)
    return tl.max_contiguous(tl.multiple_of(pointer, [1, 1, 1, 1]), [1, 1, 2, 4])


@triton.jit
def _over_numbers(x):
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit
def _over_channels(x):
    return tl.sum(tl.sum(x, 0), 2)


@triton.jit
def _tokens(x, width: tl.constexpr, index, mask, left, G: tl.constexpr):
    """The values of the next G tokens in x [tokens, width], as a tuple; zeros where masked and where fewer than G are left.

    All loads of some tokens come before their first store: the compiler must take the two for neighbours, and would have every load wait.
    """
    values = ()
    for i in tl.static_range(G):
        values = values + (tl.load(x + i * width + index, mask=mask & (i < left), other=0.0),)  # noqa: RUF005
    return values


@triton.jit
def _forward(
    u,  # [tokens, D]
    dt,  # [tokens, D]
    A,  # [D, S] fp32
    B,  # [tokens, S]
    C,  # [tokens, S], unless SAVE
    initial,  # [N, S, D] fp32, INITIAL only
    cu_seqlens,  # [N + 1], PACKED only
    y,  # [tokens, D] out, unless SAVE
    final,  # [N, S, D] fp32 out
    starts,  # [tokens // G + N, S, D] fp32 out, SAVE only: sequence n's begin at cu_seqlens[n] // G + n
    T,
    D: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    G: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    SAVE: tl.constexpr,
):
    n = tl.program_id(1)
    begin, end = _span(cu_seqlens, n, T, PACKED)
    channel, number = _channels(tl.program_id(0)), _numbers(BS)
    in_d, in_s = channel < D, number < S
    tile = _wide(in_d) & _tall(in_s)
    rate = tl.load(_tile(A, channel, S, number, 1), mask=tile, other=0.0) * LOG2_E
    own = n.to(tl.int64) * S * D
    if INITIAL:
        h = tl.load(_tile(initial + own, channel, 1, number, D), mask=tile, other=0.0)
    else:
        h = tl.zeros([PAIR, BS // ALONG, ALONG, ACROSS], tl.float32)
    start = starts + (begin // G + n) * S * D
    for t in range(begin, end, G):
        if SAVE:
            tl.store(_tile(start, channel, 1, number, D), h, mask=tile)
            start += S * D
        left = end - t  # beyond it a decay of 1 and no input
        steps, inputs = _tokens(dt + t * D, D, channel, in_d, left, G), _tokens(u + t * D, D, channel, in_d, left, G)
        keys = _tokens(B + t * S, S, number, in_s, left, G)
        queries = keys if SAVE else _tokens(C + t * S, S, number, in_s, left, G)
        for i in tl.static_range(G):
            step = steps[i].to(tl.float32)
            written = step * inputs[i].to(tl.float32)
            h = tl.exp2(_wide(step) * rate) * h + _wide(written) * _tall(keys[i].to(tl.float32))
            if not SAVE:
                read = _over_numbers(h * _tall(queries[i].to(tl.float32)))
                tl.store(y + t * D + i * D + channel, read.to(y.dtype.element_ty), mask=in_d & (i < left))
    tl.store(_tile(final + own, channel, 1, number, D), h, mask=tile)


@triton.jit
def _backward(
    u,  # [tokens, D]
    dt,  # [tokens, D]
    A,  # [D, S] fp32
    B,  # [tokens, S]
    C,  # [tokens, S]
    starts,  # [tokens // G + N, S, D] fp32
    cu_seqlens,  # [N + 1], PACKED only
    dy,  # [tokens, D]
    dfinal,  # [N, S, D] fp32
    du,  # [tokens, D] out
    ddt,  # [tokens, D] out
    dA,  # [N, S, D] fp32 out
    dB,  # [strips of D, tokens, S] fp32 out
    dC,  # [strips of D, tokens, S] fp32 out
    dinitial,  # [N, S, D] fp32 out
    T,
    tokens,
    D: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    G: tl.constexpr,
    PACKED: tl.constexpr,
):
    n = tl.program_id(1)
    begin, end = _span(cu_seqlens, n, T, PACKED)
    channel, number = _channels(tl.program_id(0)), _numbers(BS)
    in_d, in_s = channel < D, number < S
    tile = _wide(in_d) & _tall(in_s)
    rate = tl.load(_tile(A, channel, S, number, 1), mask=tile, other=0.0) * LOG2_E
    own, share = n.to(tl.int64) * S * D, tl.program_id(0).to(tl.int64) * tokens * S
    later = tl.load(_tile(dfinal + own, channel, 1, number, D), mask=tile, other=0.0)  # a_{t+1} dh_{t+1}
    sum_A = tl.zeros([PAIR, BS // ALONG, ALONG, ACROSS], tl.float32)
    pieces = tl.cdiv(end - begin, G)
    start = starts + (begin // G + n + pieces - 1) * S * D
    for piece in range(0, pieces):
        t = begin + (pieces - 1 - piece) * G
        left = end - t
        h = tl.load(_tile(start, channel, 1, number, D), mask=tile, other=0.0)
        start -= S * D
        steps, inputs = _tokens(dt + t * D, D, channel, in_d, left, G), _tokens(u + t * D, D, channel, in_d, left, G)
        keys, outputs = _tokens(B + t * S, S, number, in_s, left, G), _tokens(dy + t * D, D, channel, in_d, left, G)
        queries = _tokens(C + t * S, S, number, in_s, left, G)
        # The states of these tokens again, with the one before them.
        states, decays = (h,), ()
        for i in tl.static_range(G):
            step = steps[i].to(tl.float32)
            decay = tl.exp2(_wide(step) * rate)
            h = decay * h + _wide(step * inputs[i].to(tl.float32)) * _tall(keys[i].to(tl.float32))
            states, decays = states + (h,), decays + (decay,)  # noqa: RUF005
        # From the last token to the first.
        for i in tl.static_range(G - 1, -1, -1):
            step, x, key, out = steps[i].to(tl.float32), inputs[i].to(tl.float32), keys[i].to(tl.float32), outputs[i].to(tl.float32)
            dh = later + _tall(queries[i].to(tl.float32)) * _wide(out)
            later = decays[i] * dh
            d_exponent = later * states[i]
            at_s, at_d = t * S + i * S + number, t * D + i * D + channel
            tl.store(dC + share + at_s, _over_channels(states[i + 1] * _wide(out)), mask=in_s & (i < left))
            tl.store(dB + share + at_s, _over_channels(dh * _wide(step * x)), mask=in_s & (i < left))
            written = _over_numbers(dh * _tall(key))
            d_step = written * x + _over_numbers(d_exponent * rate) * LN_2
            tl.store(du + at_d, (written * step).to(du.dtype.element_ty), mask=in_d & (i < left))
            tl.store(ddt + at_d, d_step.to(ddt.dtype.element_ty), mask=in_d & (i < left))
            sum_A += d_exponent * _wide(step)
    tl.store(_tile(dA + own, channel, 1, number, D), sum_A, mask=tile)
    tl.store(_tile(dinitial + own, channel, 1, number, D), later, mask=tile)


def scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y `[B, T, D]` in u's dtype and the final states `[N, S, D]` fp32.

    u, dt `[B, T, D]`, A `[D, S]` fp32, B, C `[B, T, S]`, initial `[N, S, D]` fp32, all contiguous.
    """
    y, final, _ = _run_forward(u, dt, A, B, C, initial, cu_seqlens, _tokens_at_once(A).forward, save=False)
    return y, final


def _run_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, tokens: int, *, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Also, with `save`, the states before every so many `tokens`: `[batch * T // tokens + N, S, D]`."""
    (batch, T, D), S = u.shape, A.shape[1]
    N = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, final = torch.empty_like(u), torch.empty(N, S, D, dtype=torch.float32, device=u.device)
    starts = final.new_empty(batch * T // tokens + N if save else 0, S, D)
    if N:
        with torch.cuda.device_of(u):
            _forward[(triton.cdiv(D, STRIP.value), N)](
                u, dt, A, B, C, initial, cu_seqlens, y, final, starts, T, D=D, S=S, BS=_padded(S), G=tokens,
                PACKED=cu_seqlens is not None, INITIAL=initial is not None, SAVE=save, num_warps=1, num_stages=1,
            )  # fmt: skip
    return y, final, starts


def scan_backward(
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
    """du, ddt, dA, dB, dC and the gradient of the initial states, each in the dtype of its tensor; dy and dfinal are contiguous."""
    (batch, T, D), S, N, tokens = u.shape, A.shape[1], dfinal.shape[0], _tokens_at_once(A).backward
    *_, starts = _run_forward(u, dt, A, B, C, initial, cu_seqlens, tokens, save=True)
    strips, fp32 = triton.cdiv(D, STRIP.value), dict(dtype=torch.float32, device=u.device)
    du, ddt, dinitial = torch.empty_like(u), torch.empty_like(dt), torch.empty(N, S, D, **fp32)
    dA, dB, dC = torch.empty(N, S, D, **fp32), *(torch.empty(strips, batch, T, S, **fp32) for _ in "BC")
    if N:
        with torch.cuda.device_of(u):
            _backward[(strips, N)](
                u, dt, A, B, C, starts, cu_seqlens, dy, dfinal, du, ddt, dA, dB, dC, dinitial, T, batch * T, D=D,
                S=S, BS=_padded(S), G=tokens, PACKED=cu_seqlens is not None, num_warps=1, num_stages=1,
            )  # fmt: skip
    return du, ddt, dA.sum(0).mT.contiguous(), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dinitial


def _tokens_at_once(A: Tensor) -> Tokens:
    return TOKENS[16 if A.shape[1] <= 16 else 32]


def _padded(S: int) -> int:
    """A lane's share of the numbers is a power of two."""
    return max(ALONG.value, triton.next_power_of_2(S))
