"""The forward, token by token: o, the errors e for the backward, the final state. Formulas in recurrent.py."""

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
