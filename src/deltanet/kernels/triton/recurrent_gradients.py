"""The three passes of the token-by-token backward. Formulas, and why three, in recurrent.py."""

import triton
import triton.language as tl

from deltanet.kernels.triton.recurrent_tiles import (
    across_index,
    along_index,
    place,
    state_tile,
    tall,
    total,
    two,
    two_numbers,
    wide,
    zeros,
)


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
