"""The delta rule token by token, forward and backward: the paper's own baseline, and what one-token steps reduce to.

    e_t = v_t - a_t S_{t-1}^T k_t        u_t = beta_t e_t        S_t = a_t S_{t-1} + k_t u_t^T        o_t = scale S_t^T q_t

with a_t = e^{g_t}, or 1 for the plain rule. Source: Yang et al. 2024 (arXiv 2406.06484), section 2.2 and appendix (the recurrent
kernel it is compared with); the gate, arXiv 2412.06464. With D_t = dLoss/dS_t the gradients are, t descending in D and ascending in S:

    D_t  = a_{t+1} (D_{t+1} - k_{t+1} dv_{t+1}^T) + scale q_t do_t^T          du_t = D_t^T k_t        dv_t = beta_t du_t
    dbeta_t = e_t . du_t        dk_t = D_t u_t - a_t S_{t-1} dv_t             dq_t = scale S_t do_t
    dg_t = dg_{t+1} + q_t . dq_t - v_t . dv_t,        dg after the last token = <S_T, dLoss/dS_T>

S is never run backwards: undoing a write is exact only on paper, and undoing a decay divides by it. Instead the forward saves e (fp32),
after which S and D are plain sums of outer products that can be rebuilt in either direction, and three passes remain:

    errors_backward   t descending, columns of D: du needs whole columns                          -> dv, dbeta
    keys_descending   t descending, rows of D: dk needs whole rows, dv is known by now            -> the D_t u_t half of dk
    keys_ascending    t ascending, rows of S                                                      -> dq, dk

Every program owns a strip of the state, all of it in the registers of one warp, and shares nothing: no atomics, no partial sums
of dq and dk, the same bits in every run. The strip of [across, along] = [columns that recur on their own, the dimension that is summed]
is held as a 5-D tile so that a lane has a long run of `along` in registers: sums cost two shuffles, and a token costs 3 FMA an element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltanet.kernels.launch import RECURRENT, choose, padded
from deltanet.kernels.triton.decode import decode_step

__all__ = ["recurrent_backward", "recurrent_forward", "recurrent_saved"]

PARTS = tl.constexpr(4)  # sums that a lane carries side by side: one long chain of additions would wait 4 cycles for each
WARP = tl.constexpr(32)  # lanes of a warp: LANES of them share a sum, and WARP / LANES hold different columns


@triton.jit
def place(cu_seqlens, T, HV, STRIPS: tl.constexpr, PACKED: tl.constexpr):
    """The strip, value head and sequence of this program, and the sequence's first token and length."""
    program = tl.program_id(0)
    strip = program % STRIPS
    head = (program // STRIPS) % HV
    n = (program // STRIPS // HV).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
    else:
        begin = n * T
        length = T
    return strip, head, n, begin, length


@triton.jit
def along_index(ALONG: tl.constexpr, LANES: tl.constexpr):
    """[PARTS, run, LANES]: what a lane holds lies together in memory, so that it is read in few wide pieces."""
    RUN: tl.constexpr = ALONG // LANES // PARTS
    part = tl.arange(0, PARTS)[:, None, None] * RUN
    return tl.arange(0, LANES)[None, None, :] * (RUN * PARTS) + part + tl.arange(0, RUN)[None, :, None]


@triton.jit
def across_index(strip, STRIP: tl.constexpr, LANES: tl.constexpr):
    """[STRIP / ACROSS, ACROSS], where ACROSS lanes hold different columns."""
    ACROSS: tl.constexpr = WARP // LANES
    return strip * STRIP + tl.arange(0, STRIP // ACROSS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]


@triton.jit
def state_tile(
    state,
    strip,
    ALONG_STRIDE: tl.constexpr,
    ACROSS_STRIDE: tl.constexpr,
    ALONG: tl.constexpr,
    STRIP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Pointers [PARTS, run, STRIP / ACROSS, LANES, ACROSS] to a strip of one state.

    The hints understate how contiguous memory is. Told the truth, the compiler spreads the tile over lanes for wide accesses to the state,
    which happen once, and keeps that layout in the loop, where every sum then costs 10 to 60 times the shuffles. A hint holds only on
    the operation it is given to, so the indices are spelled out again; Triton 3.7 reads the first pair, 3.6 the second.
    """
    RUN: tl.constexpr = ALONG // LANES // PARTS
    ACROSS: tl.constexpr = WARP // LANES
    part = tl.arange(0, PARTS)[:, None, None] * RUN
    along = tl.arange(0, LANES)[None, None, :] * (RUN * PARTS) + part + tl.arange(0, RUN)[None, :, None]
    along = tl.max_contiguous(tl.multiple_of(along, [1, 1, 1]), [1, 1, 1])
    across = strip * STRIP + tl.arange(0, STRIP // ACROSS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]
    across = tl.max_contiguous(tl.multiple_of(across, [1, 1]), [1, 1])
    pointer = state + (along[:, :, None, :, None] * ALONG_STRIDE + across[None, None, :, None, :] * ACROSS_STRIDE)
    return tl.max_contiguous(tl.multiple_of(pointer, [1, 1, 1, 1, 1]), [1, 1, 1, 2, 4])


@triton.jit
def zeros(ALONG: tl.constexpr, STRIP: tl.constexpr, LANES: tl.constexpr):
    """A strip of the state before the first write."""
    return tl.zeros([PARTS, ALONG // LANES // PARTS, STRIP // (WARP // LANES), LANES, WARP // LANES], tl.float32)


@triton.jit
def wide(x):
    """A vector of the summed dimension against the tile, in fp32."""
    return x.to(tl.float32)[:, :, None, :, None]


@triton.jit
def tall(x):
    """A vector of the strip's own dimension against the tile."""
    return x[None, None, :, None, :]


@triton.jit
def total(x):
    """The sum over the summed dimension: runs, then PARTS of them, in registers, then across LANES."""
    return tl.sum(tl.sum(tl.sum(x, 1), 0), 1)


@triton.jit
def two(pointer, step, offset, mask, left):
    """The vectors of the next two tokens; zero where fewer than two are left.

    A pair at a time, because the compiler packs what it has loaded before the end of the loop body, and waits for it there: one token
    a body would leave less than one token's arithmetic to hide the memory behind.
    """
    first = tl.load(pointer + offset, mask=mask & (left > 0), other=0.0)
    return first, tl.load(pointer + step + offset, mask=mask & (left > 1), other=0.0)


@triton.jit
def two_numbers(pointer, step, left):
    first = tl.load(pointer, mask=left > 0, other=0.0)
    return first, tl.load(pointer + step, mask=left > 1, other=0.0)


@triton.jit
def write_and_read(S, k, q, v, beta, g, scale, o, e, there, GATED: tl.constexpr, SAVE: tl.constexpr, WRITE_O: tl.constexpr):
    """One token of the forward: S after it. A token that is not there has k = 0 and g = 0 and leaves S as it is."""
    key = wide(k)
    if GATED:
        decay = tl.exp(g.to(tl.float32))
        error = v.to(tl.float32) - decay * total(S * key)
        S = S * decay + key * tall(error * beta.to(tl.float32))
    else:
        error = v.to(tl.float32) - total(S * key)
        S += key * tall(error * beta.to(tl.float32))
    if WRITE_O:
        tl.store(o, (total(S * wide(q)) * scale).to(o.dtype.element_ty), mask=there)
    if SAVE:
        tl.store(e, error, mask=there)
    return S


@triton.jit(do_not_specialize=["T", "scale"])
def forward(
    q,  # [tokens, H, K]
    k,  # [tokens, H, K]
    v,  # [tokens, HV, V]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    o,  # [tokens, HV, V] out, unless WRITE_O is false
    e,  # [tokens, HV, V] fp32 out, SAVE only
    initial,  # [N, HV, K, V] fp32, INITIAL only
    final,  # [N, HV, K, V] fp32 out, FINAL only
    cu_seqlens,
    scale,
    T,
    HV,
    group,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    beta_token,
    beta_head,
    g_token,
    g_head,
    K: tl.constexpr,
    V: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    SAVE: tl.constexpr,
    WRITE_O: tl.constexpr,
):
    """e, o and S, t ascending, for a strip of value columns."""
    strip, head, n, begin, length = place(cu_seqlens, T, HV, STRIPS, PACKED)
    key = along_index(ALONG, LANES)
    value = across_index(strip, STRIP, LANES)
    keys, values = key < K, value < V
    tile = keys[:, :, None, :, None] & values[None, None, :, None, :]
    first_state = (n * HV + head) * K * V

    q += begin * q_token + head // group * q_head
    k += begin * k_token + head // group * k_head
    v += begin * v_token + head * v_head
    beta += begin * beta_token + head * beta_head
    g += begin * g_token + head * g_head
    row = (begin * HV + head) * V + value
    k_0, k_1 = two(k, k_token, key, keys, length)
    q_0, q_1 = two(q, q_token, key, keys, length if WRITE_O else 0)
    v_0, v_1 = two(v, v_token, value, values, length)
    beta_0, beta_1 = two_numbers(beta, beta_token, length)
    g_0, g_1 = two_numbers(g, g_token, length if GATED else 0)
    if INITIAL:
        S = tl.load(state_tile(initial + first_state, strip, V, 1, ALONG, STRIP, LANES), mask=tile, other=0.0)
    else:
        S = zeros(ALONG, STRIP, LANES)
    for t in range(0, length, 2):
        a_k, b_k, a_q, b_q, a_v, b_v, a_beta, b_beta, a_g, b_g = k_0, k_1, q_0, q_1, v_0, v_1, beta_0, beta_1, g_0, g_1
        left = length - t - 2
        k += 2 * k_token
        q += 2 * q_token
        v += 2 * v_token
        beta += 2 * beta_token
        g += 2 * g_token
        k_0, k_1 = two(k, k_token, key, keys, left)
        q_0, q_1 = two(q, q_token, key, keys, left if WRITE_O else 0)
        v_0, v_1 = two(v, v_token, value, values, left)
        beta_0, beta_1 = two_numbers(beta, beta_token, left)
        g_0, g_1 = two_numbers(g, g_token, left if GATED else 0)
        S = write_and_read(S, a_k, a_q, a_v, a_beta, a_g, scale, o + row, e + row, values, GATED, SAVE, WRITE_O)
        row += HV * V
        S = write_and_read(S, b_k, b_q, b_v, b_beta, b_g, scale, o + row, e + row, values & (left > -1), GATED, SAVE, WRITE_O)
        row += HV * V
    if FINAL:
        tl.store(state_tile(final + first_state, strip, V, 1, ALONG, STRIP, LANES), S, mask=tile)


@triton.jit
def take_back_write(D, k, q, v, beta, g, do, e, scale, dv, dw, dbeta, v_dv, there, alive, GATED: tl.constexpr):
    """One token of errors_backward: D before it."""
    key, strength = wide(k), beta.to(tl.float32)
    D += wide(q) * tall(do.to(tl.float32) * scale)
    du = total(D * key)
    value_gradient = du * strength
    D -= key * tall(value_gradient)
    tl.store(dbeta, tl.sum(tl.sum(du * e, 1), 0), mask=alive)
    tl.store(dw, value_gradient, mask=there)
    tl.store(dv, value_gradient.to(dv.dtype.element_ty), mask=there)
    if GATED:
        tl.store(v_dv, tl.sum(tl.sum(value_gradient * v.to(tl.float32), 1), 0), mask=alive)
        D *= tl.exp(g.to(tl.float32))
    return D


@triton.jit(do_not_specialize=["T", "tokens", "scale"])
def errors_backward(
    q,  # [tokens, H, K]
    k,  # [tokens, H, K]
    v,  # [tokens, HV, V], gated only
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    do,  # [tokens, HV, V]
    e,  # [tokens, HV, V] fp32
    dv,  # [tokens, HV, V] out
    dw,  # [tokens, HV, V] fp32 out: dv before rounding
    dbeta,  # [STRIPS, tokens, HV] fp32 out: each strip's share
    v_dv,  # [STRIPS, tokens, HV] fp32 out, gated only: each strip's share of v . dv
    dfinal,  # [N, HV, K, V] fp32, FINAL only
    dinitial,  # [N, HV, K, V] fp32 out, INITIAL only
    cu_seqlens,
    scale,
    T,
    tokens,
    HV,
    group,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    beta_token,
    beta_head,
    g_token,
    g_head,
    do_token,
    do_head,
    K: tl.constexpr,
    V: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """du, hence dv and dbeta, t descending, for a strip of value columns of D."""
    strip, head, n, begin, length = place(cu_seqlens, T, HV, STRIPS, PACKED)
    key = along_index(ALONG, LANES)
    value = across_index(strip, STRIP, LANES)
    keys, values = key < K, value < V
    tile = keys[:, :, None, :, None] & values[None, None, :, None, :]
    first_state = (n * HV + head) * K * V

    last = begin + length - 1  # may be -1 for an empty first sequence: nothing is read then
    q += last * q_token + head // group * q_head
    k += last * k_token + head // group * k_head
    v += last * v_token + head * v_head
    do += last * do_token + head * do_head
    beta += last * beta_token + head * beta_head
    g += last * g_token + head * g_head
    row = (last * HV + head) * V + value
    share = (strip.to(tl.int64) * tokens + last) * HV + head
    gates = length if GATED else 0
    k_0, k_1 = two(k, -k_token, key, keys, length)
    q_0, q_1 = two(q, -q_token, key, keys, length)
    v_0, v_1 = two(v, -v_token, value, values, gates)
    do_0, do_1 = two(do, -do_token, value, values, length)
    e_0, e_1 = two(e, -HV * V, row, values, length)
    beta_0, beta_1 = two_numbers(beta, -beta_token, length)
    g_0, g_1 = two_numbers(g, -g_token, gates)
    if FINAL:
        D = tl.load(state_tile(dfinal + first_state, strip, V, 1, ALONG, STRIP, LANES), mask=tile, other=0.0)
    else:
        D = zeros(ALONG, STRIP, LANES)
    for t in range(0, length, 2):
        a_k, b_k, a_q, b_q, a_v, b_v, a_do, b_do, a_e, b_e = k_0, k_1, q_0, q_1, v_0, v_1, do_0, do_1, e_0, e_1
        a_beta, b_beta, a_g, b_g = beta_0, beta_1, g_0, g_1
        left = length - t - 2
        k -= 2 * k_token
        q -= 2 * q_token
        v -= 2 * v_token
        do -= 2 * do_token
        beta -= 2 * beta_token
        g -= 2 * g_token
        gates = left if GATED else 0
        k_0, k_1 = two(k, -k_token, key, keys, left)
        q_0, q_1 = two(q, -q_token, key, keys, left)
        v_0, v_1 = two(v, -v_token, value, values, gates)
        do_0, do_1 = two(do, -do_token, value, values, left)
        e_0, e_1 = two(e - 2 * HV * V, -HV * V, row, values, left)
        beta_0, beta_1 = two_numbers(beta, -beta_token, left)
        g_0, g_1 = two_numbers(g, -g_token, gates)
        D = take_back_write(
            D, a_k, a_q, a_v, a_beta, a_g, a_do, a_e, scale, dv + row, dw + row, dbeta + share, v_dv + share, values, True, GATED
        )  # fmt: skip
        row -= HV * V
        share -= HV
        alive = left > -1
        D = take_back_write(
            D, b_k, b_q, b_v, b_beta, b_g, b_do, b_e, scale, dv + row, dw + row, dbeta + share, v_dv + share, values & alive, alive, GATED
        )  # fmt: skip
        row -= HV * V
        share -= HV
    if INITIAL:
        tl.store(state_tile(dinitial + first_state, strip, V, 1, ALONG, STRIP, LANES), D, mask=tile)


@triton.jit
def read_rows_of_D(D, k, q, beta, g, do, e, dw, scale, dk_half, there, GATED: tl.constexpr):
    """One token of keys_descending: D before it."""
    D += wide(do) * tall(q.to(tl.float32) * scale)
    tl.store(dk_half, total(D * wide(e)) * beta.to(tl.float32), mask=there)
    D -= wide(dw) * tall(k.to(tl.float32))
    if GATED:
        D *= tl.exp(g.to(tl.float32))
    return D


@triton.jit(do_not_specialize=["T", "scale"])
def keys_descending(
    q,  # [tokens, H, K]
    k,  # [tokens, H, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    do,  # [tokens, HV, V]
    e,  # [tokens, HV, V] fp32
    dw,  # [tokens, HV, V] fp32
    dk_half,  # [tokens, HV, K] fp32 out: D_t u_t
    dfinal,  # [N, HV, K, V] fp32, FINAL only
    cu_seqlens,
    scale,
    T,
    HV,
    group,
    q_token,
    q_head,
    k_token,
    k_head,
    beta_token,
    beta_head,
    g_token,
    g_head,
    do_token,
    do_head,
    K: tl.constexpr,
    V: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    FINAL: tl.constexpr,
):
    """The share of dk that comes through u_t = beta_t e_t, t descending, for a strip of key rows of D."""
    strip, head, n, begin, length = place(cu_seqlens, T, HV, STRIPS, PACKED)
    value = along_index(ALONG, LANES)
    key = across_index(strip, STRIP, LANES)
    keys, values = key < K, value < V
    tile = values[:, :, None, :, None] & keys[None, None, :, None, :]
    first_state = (n * HV + head) * K * V

    last = begin + length - 1
    q += last * q_token + head // group * q_head
    k += last * k_token + head // group * k_head
    do += last * do_token + head * do_head
    beta += last * beta_token + head * beta_head
    g += last * g_token + head * g_head
    row = (last * HV + head) * V + value
    out = (last * HV + head) * K + key
    k_0, k_1 = two(k, -k_token, key, keys, length)
    q_0, q_1 = two(q, -q_token, key, keys, length)
    do_0, do_1 = two(do, -do_token, value, values, length)
    e_0, e_1 = two(e, -HV * V, row, values, length)
    dw_0, dw_1 = two(dw, -HV * V, row, values, length)
    beta_0, beta_1 = two_numbers(beta, -beta_token, length)
    g_0, g_1 = two_numbers(g, -g_token, length if GATED else 0)
    if FINAL:
        D = tl.load(state_tile(dfinal + first_state, strip, 1, V, ALONG, STRIP, LANES), mask=tile, other=0.0)
    else:
        D = zeros(ALONG, STRIP, LANES)
    for t in range(0, length, 2):
        a_k, b_k, a_q, b_q, a_do, b_do, a_e, b_e, a_dw, b_dw = k_0, k_1, q_0, q_1, do_0, do_1, e_0, e_1, dw_0, dw_1
        a_beta, b_beta, a_g, b_g = beta_0, beta_1, g_0, g_1
        left = length - t - 2
        k -= 2 * k_token
        q -= 2 * q_token
        do -= 2 * do_token
        beta -= 2 * beta_token
        g -= 2 * g_token
        k_0, k_1 = two(k, -k_token, key, keys, left)
        q_0, q_1 = two(q, -q_token, key, keys, left)
        do_0, do_1 = two(do, -do_token, value, values, left)
        e_0, e_1 = two(e - 2 * HV * V, -HV * V, row, values, left)
        dw_0, dw_1 = two(dw - 2 * HV * V, -HV * V, row, values, left)
        beta_0, beta_1 = two_numbers(beta, -beta_token, left)
        g_0, g_1 = two_numbers(g, -g_token, left if GATED else 0)
        D = read_rows_of_D(D, a_k, a_q, a_beta, a_g, a_do, a_e, a_dw, scale, dk_half + out, keys, GATED)
        out -= HV * K
        D = read_rows_of_D(D, b_k, b_q, b_beta, b_g, b_do, b_e, b_dw, scale, dk_half + out, keys & (left > -1), GATED)
        out -= HV * K
        row -= 2 * HV * V


@triton.jit
def read_rows_of_S(S, k, q, beta, g, do, e, dw, half, scale, dk, dq, q_dq, there, alive, GATED: tl.constexpr):
    """One token of keys_ascending: S after it."""
    if GATED:
        S *= tl.exp(g.to(tl.float32))
    key_gradient = half - total(S * wide(dw))
    S += wide(e) * tall(k.to(tl.float32) * beta.to(tl.float32))
    query_gradient = total(S * wide(do)) * scale
    tl.store(dk, key_gradient.to(dk.dtype.element_ty), mask=there)
    tl.store(dq, query_gradient.to(dq.dtype.element_ty), mask=there)
    if GATED:
        tl.store(q_dq, tl.sum(tl.sum(query_gradient * q.to(tl.float32), 1), 0), mask=alive)
    return S


@triton.jit(do_not_specialize=["T", "N", "tokens", "scale"])
def keys_ascending(
    q,  # [tokens, H, K], gated only
    k,  # [tokens, H, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    do,  # [tokens, HV, V]
    e,  # [tokens, HV, V] fp32
    dw,  # [tokens, HV, V] fp32
    dk_half,  # [tokens, HV, K] fp32
    dq,  # [tokens, HV, K] out
    dk,  # [tokens, HV, K] out
    q_dq,  # [STRIPS, tokens, HV] fp32 out, gated only: each strip's share of q . dq
    last_dg,  # [STRIPS, N, HV] fp32 out, gated only: each strip's share of <S_T, dLoss/dS_T>
    initial,  # [N, HV, K, V] fp32, INITIAL only
    dfinal,  # [N, HV, K, V] fp32, FINAL only
    cu_seqlens,
    scale,
    T,
    N,
    tokens,
    HV,
    group,
    q_token,
    q_head,
    k_token,
    k_head,
    beta_token,
    beta_head,
    g_token,
    g_head,
    do_token,
    do_head,
    K: tl.constexpr,
    V: tl.constexpr,
    ALONG: tl.constexpr,
    LANES: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """dq, and the share of dk that comes through the prediction S^T k, t ascending, for a strip of key rows of S."""
    strip, head, n, begin, length = place(cu_seqlens, T, HV, STRIPS, PACKED)
    value = along_index(ALONG, LANES)
    key = across_index(strip, STRIP, LANES)
    keys, values = key < K, value < V
    tile = values[:, :, None, :, None] & keys[None, None, :, None, :]
    first_state = (n * HV + head) * K * V

    q += begin * q_token + head // group * q_head
    k += begin * k_token + head // group * k_head
    do += begin * do_token + head * do_head
    beta += begin * beta_token + head * beta_head
    g += begin * g_token + head * g_head
    row = (begin * HV + head) * V + value
    out = (begin * HV + head) * K + key
    share = (strip.to(tl.int64) * tokens + begin) * HV + head
    gates = length if GATED else 0
    k_0, k_1 = two(k, k_token, key, keys, length)
    q_0, q_1 = two(q, q_token, key, keys, gates)
    do_0, do_1 = two(do, do_token, value, values, length)
    e_0, e_1 = two(e, HV * V, row, values, length)
    dw_0, dw_1 = two(dw, HV * V, row, values, length)
    half_0, half_1 = two(dk_half, HV * K, out, keys, length)
    beta_0, beta_1 = two_numbers(beta, beta_token, length)
    g_0, g_1 = two_numbers(g, g_token, gates)
    if INITIAL:
        S = tl.load(state_tile(initial + first_state, strip, 1, V, ALONG, STRIP, LANES), mask=tile, other=0.0)
    else:
        S = zeros(ALONG, STRIP, LANES)
    for t in range(0, length, 2):
        a_k, b_k, a_q, b_q, a_do, b_do, a_e, b_e, a_dw, b_dw = k_0, k_1, q_0, q_1, do_0, do_1, e_0, e_1, dw_0, dw_1
        a_half, b_half, a_beta, b_beta, a_g, b_g = half_0, half_1, beta_0, beta_1, g_0, g_1
        left = length - t - 2
        k += 2 * k_token
        q += 2 * q_token
        do += 2 * do_token
        beta += 2 * beta_token
        g += 2 * g_token
        gates = left if GATED else 0
        k_0, k_1 = two(k, k_token, key, keys, left)
        q_0, q_1 = two(q, q_token, key, keys, gates)
        do_0, do_1 = two(do, do_token, value, values, left)
        e_0, e_1 = two(e + 2 * HV * V, HV * V, row, values, left)
        dw_0, dw_1 = two(dw + 2 * HV * V, HV * V, row, values, left)
        half_0, half_1 = two(dk_half + 2 * HV * K, HV * K, out, keys, left)
        beta_0, beta_1 = two_numbers(beta, beta_token, left)
        g_0, g_1 = two_numbers(g, g_token, gates)
        S = read_rows_of_S(
            S, a_k, a_q, a_beta, a_g, a_do, a_e, a_dw, a_half, scale, dk + out, dq + out, q_dq + share, keys, True, GATED
        )  # fmt: skip
        out += HV * K
        share += HV
        alive = left > -1
        S = read_rows_of_S(
            S, b_k, b_q, b_beta, b_g, b_do, b_e, b_dw, b_half, scale, dk + out, dq + out, q_dq + share, keys & alive, alive, GATED
        )  # fmt: skip
        out += HV * K
        share += HV
        row += 2 * HV * V
    if GATED:
        if FINAL:
            D = tl.load(state_tile(dfinal + first_state, strip, 1, V, ALONG, STRIP, LANES), mask=tile, other=0.0)
            tl.store(last_dg + (strip * N + n) * HV + head, tl.sum(tl.sum(total(S * D), 1), 0))
        else:
            tl.store(last_dg + (strip * N + n) * HV + head, 0.0)


def recurrent_saved(v: Tensor, save: str) -> list[Tensor]:
    """What a forward saves, as empty tensors: the prediction errors e `[B, T, HV, V]` in fp32, or nothing to rebuild them in the backward."""
    return [torch.empty(v.shape, dtype=torch.float32, device=v.device)] if save == "states" else []


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    save: str,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The token-by-token forward of docs/conventions.md; a single token without gradients goes to `decode_step`."""
    saved = recurrent_saved(v, save)
    if q.shape[1] == 1 and cu_seqlens is None and not saved:
        o, state = decode_step(q, k, v, beta, g, scale, initial_state)
        return o, state if output_final_state else None, saved
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = _states(q, v, cu_seqlens) if output_final_state else None
    _run_forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, o, saved[0] if saved else None, final)
    return o, final, saved


def recurrent_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The token-by-token backward of docs/conventions.md; without saved errors the forward is run again for them."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N, tokens = _sequences(q, cu_seqlens), B * T
    new = dict(dtype=torch.float32, device=q.device)
    if saved:
        e = saved[0]
    else:
        e = torch.empty(v.shape, **new)
        _run_forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, None, e, None)
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, **new)
    q, k, v, beta, do = (_rows(x) for x in (q, k, v, beta, do))
    gates = beta if g is None else _rows(g)  # where a tensor is missing, another stands in, and is never followed

    config = choose(RECURRENT["errors"], q.element_size(), K)
    strip = min(config.block_v, padded(V))
    strips = triton.cdiv(V, strip)
    dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    dw = dv if v.dtype == torch.float32 else torch.empty(B, T, HV, V, **new)
    dbeta = torch.empty(strips, B, T, HV, **new)
    v_dv = dbeta if g is None else torch.empty(strips, B, T, HV, **new)
    errors_backward[(strips * HV * N,)](
        q,
        k,
        v,
        beta,
        gates,
        do,
        e,
        dv,
        dw,
        dbeta,
        v_dv,
        dfinal,
        dinitial,
        cu_seqlens,
        scale,
        T,
        tokens,
        HV,
        HV // H,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(beta),
        *_strides(gates),
        *_strides(do),
        K=K,
        V=V,
        ALONG=padded(K),
        LANES=_lanes(K),
        STRIP=strip,
        STRIPS=strips,
        PACKED=cu_seqlens is not None,
        GATED=g is not None,
        INITIAL=dinitial is not None,
        FINAL=dfinal is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )

    config = choose(RECURRENT["keys"], q.element_size(), V)
    strip = min(config.block_k, padded(K))
    strips = triton.cdiv(K, strip)
    dk_half = torch.empty(B, T, HV, K, **new)
    dtype = q.dtype if HV == H else torch.float32  # value heads that share a key head are summed below
    dq, dk = (torch.empty(B, T, HV, K, dtype=dtype, device=q.device) for _ in range(2))
    q_dq = dk_half if g is None else torch.empty(strips, B, T, HV, **new)
    last_dg = dk_half if g is None else torch.empty(strips, N, HV, **new)
    shared = dict(
        K=K,
        V=V,
        ALONG=padded(V),
        LANES=_lanes(V),
        STRIP=strip,
        STRIPS=strips,
        PACKED=cu_seqlens is not None,
        GATED=g is not None,
        FINAL=dfinal is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    strides = (*_strides(q), *_strides(k), *_strides(beta), *_strides(gates), *_strides(do))
    keys_descending[(strips * HV * N,)](
        q, k, beta, gates, do, e, dw, dk_half, dfinal, cu_seqlens, scale, T, HV, HV // H, *strides, **shared
    )
    keys_ascending[(strips * HV * N,)](
        q,
        k,
        beta,
        gates,
        do,
        e,
        dw,
        dk_half,
        dq,
        dk,
        q_dq,
        last_dg,
        initial_state,
        dfinal,
        cu_seqlens,
        scale,
        T,
        N,
        tokens,
        HV,
        HV // H,
        *strides,
        INITIAL=initial_state is not None,
        **shared,
    )
    if HV != H:
        dq, dk = (x.unflatten(2, (H, HV // H)).sum(3).to(q.dtype) for x in (dq, dk))
    dg = None
    if g is not None:
        dg = _gate_gradient(q_dq.sum(0) - v_dv.sum(0), last_dg.sum(0), cu_seqlens).to(g.dtype)
    return dq, dk, dv, dbeta.sum(0).to(beta.dtype), dg, dinitial


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor | None,
    e: Tensor | None,
    final: Tensor | None,
) -> None:
    K, V, H, HV = q.shape[-1], v.shape[-1], q.shape[2], v.shape[2]
    config = choose(RECURRENT["errors"], q.element_size(), K)
    strip = min(config.block_v, padded(V))
    strips = triton.cdiv(V, strip)
    T, N = q.shape[1], _sequences(q, cu_seqlens)
    q, k, v, beta = (_rows(x) for x in (q, k, v, beta))
    gates = beta if g is None else _rows(g)  # where a tensor is missing, another stands in, and is never followed
    forward[(strips * HV * N,)](
        q,
        k,
        v,
        beta,
        gates,
        v if o is None else o,
        v if e is None else e,
        initial,
        final,
        cu_seqlens,
        scale,
        T,
        HV,
        HV // H,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(beta),
        *_strides(gates),
        K=K,
        V=V,
        ALONG=padded(K),
        LANES=_lanes(K),
        STRIP=strip,
        STRIPS=strips,
        PACKED=cu_seqlens is not None,
        GATED=g is not None,
        INITIAL=initial is not None,
        FINAL=final is not None,
        SAVE=e is not None,
        WRITE_O=o is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _lanes(along: int) -> int:
    """Lanes that share a sum, so that a lane's run is at most 32: three fp32 vectors of it have to fit beside the tile."""
    return 4 if along <= 128 else 8


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    shape = (_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _rows(x: Tensor) -> Tensor:
    """x `[B, T, H, ...]` such that token (b, t) is row b * T + t and a vector's elements are neighbours; a copy only when it is not so already."""
    B, T = x.shape[:2]
    flat = B == 1 or T == 1 or x.stride(0) == T * x.stride(1)
    return x if flat and (x.ndim == 3 or x.stride(3) == 1) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """From one token to the next, and from one head to the next, of what `_rows` returned."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0), x.stride(2)


def _gate_gradient(terms: Tensor, last: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """dg `[B, T, HV]`: the sum of terms `[B, T, HV]` from t to the end of the sequence, plus last `[N, HV]`.

    In fp64: with strong decay the terms cancel, and packed sequences are one running sum.
    """
    sums = terms.double().cumsum(1)
    if cu_seqlens is None:
        return sums[:, -1:] - sums + terms + last[:, None]
    token = torch.arange(terms.shape[1], device=terms.device)
    n = torch.bucketize(token, cu_seqlens[1:], right=True)
    at_end = torch.nn.functional.pad(sums[0], (0, 0, 1, 0)).index_select(0, cu_seqlens[1:].long())
    return (at_end.index_select(0, n) - sums[0] + terms[0] + last.index_select(0, n))[None]
