"""The gradients of q, k and g of one chunk, from the states and state gradients at its ends. All chunks run at once.

    dP = scale tril(dO V'^T e^(G_i - G_j))          dL = -strict_tril(dV V'^T e^(G_i - G_j))
    dQ = scale e^G (dO S^T) + dP K
    dK = dP^T Q + (dL + dL^T) K - e^G (dV S^T) + (e^(G_last - G) V') D^T

    dG_i = sum_j (M_ij - M_ji) + q_i . (scale e^G dO S^T)_i - k_i . (e^G dV S^T)_i - k_i . (e^(G_last - G) V' D^T)_i
    M = dP * (Q K^T) + dL * (K K^T) below the diagonal
    dG_last += sum_i k_i . (e^(G_last - G) V' D^T)_i + e^(G_last) <S, D>,          dg_t = sum of dG_i over i >= t

M has the decay in every entry, so strong decay gives a small dg and not the difference of large numbers.
dP and dL are finished, then transposed in registers, and the transposed is scaled or added to: never handed to a product as it is, which
Triton 3.4 to 3.7.0 gets wrong on Hopper. Two products and half the accumulators of the C x C part are saved. dL is done with before dP is
begun and each gives its share of dG at once: what lives side by side decides whether registers suffice.
One program owns a chunk of a key head and BLOCK_K of its columns, and sums over the value heads of its group: no atomics, one order.
"""

import triton
import triton.language as tl

from deltanet.kernels.triton.tiles import CHUNK, decay_between, find_part


@triton.jit(do_not_specialize=["T", "N", "steps", "tokens", "scale"])
def gradients(
    q,  # [tokens, H, K]
    k,  # [tokens, H, K]
    do,  # [tokens, HV, V]
    E,  # [tokens, HV, V]
    dv,  # [tokens, HV, V]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, gated only
    S,  # [slots, HV, V, K]
    D,  # [slots, HV, V, K], or borrowed: dq, rows 0..63 of V
    D_high,  # borrowed: dk, rows 64..127 of V
    first_S,  # [N, HV, V, K]: the initial states as S, INITIAL only
    last_D,  # [N, HV, V, K]: the given gradients of the final states as D, FINAL only
    partial,  # [tiles of V, HV, tokens] fp32: partial sums of dbeta
    dq,  # [tokens, H, K] out
    dk,  # [tokens, H, K] out
    dbeta,  # [tokens, HV] out
    dg,  # [tiles of K, tokens, HV] fp32 out, gated only: partial sums
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTIALS: tl.constexpr,  # tiles of V in `partial`
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    BORROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    KEY_TILES: tl.constexpr = (K + BK - 1) // BK
    GROUP: tl.constexpr = HV // H
    key_tile = tl.program_id(0) % KEY_TILES
    place = tl.program_id(0) // KEY_TILES
    key_head = tl.program_id(1)
    sequence, chunk, begin, end = find_part(place, cu_seqlens, N, steps, T, CHUNK, PACKED)
    first = begin + chunk * CHUNK
    if first >= end:
        return
    rows = tl.minimum(end - first, CHUNK).to(tl.int32)
    is_first = chunk == 0
    is_last = first + CHUNK >= end
    t = tl.arange(0, CHUNK)
    d = key_tile * BK + tl.arange(0, BK)
    in_k = d < K
    valid = t < rows
    keep = t[:, None] >= t[None, :]
    below = t[:, None] > t[None, :]
    slot = first // CHUNK - 1  # of the state at the chunk's start; the slot after it has D at the chunk's end
    at_keys = (first * H + key_head) * K + t[:, None] * (H * K) + d[None, :]
    in_keys = valid[:, None] & in_k[None, :]

    dq_sum = tl.zeros([CHUNK, BK], tl.float32)
    dk_sum = tl.zeros([CHUNK, BK], tl.float32)
    for member in tl.range(GROUP, num_stages=1):
        head = key_head * GROUP + member
        along = head.to(tl.int64) * tokens + first
        b = tl.load(strength + along + t, mask=valid, other=0.0)
        at_values = (first * HV + head) * V + t[:, None] * (HV * V)
        # the first chunk's state and the last one's gradient have no slot: they are given, or zero
        given = (sequence.to(tl.int64) * HV + head) * (K * V)
        S_here = S + (slot * HV + head) * (K * V)
        D_here = D + ((slot + 1) * HV + head) * (K * V)
        has_S = is_first == 0
        has_D = is_last == 0
        if INITIAL:
            S_here = tl.where(is_first, first_S + given, S_here)
            has_S = True
        if FINAL:
            D_here = tl.where(is_last, last_D + given, D_here)
            has_D = True
        if GATED:
            last = tl.load(G + along + rows - 1)
            Gc = tl.where(valid, tl.load(G + along + t, mask=valid, other=0.0), last)
            into = tl.math.exp2(Gc)  # decay from the chunk's start to each token
            onward = tl.math.exp2(last - Gc)  # and from each token to the chunk's end
            overlap = 0.0
        dP = tl.zeros([CHUNK, CHUNK], tl.float32)
        dL = tl.zeros([CHUNK, CHUNK], tl.float32)
        dq_acc = tl.zeros([CHUNK, BK], tl.float32)
        dk_acc = tl.zeros([CHUNK, BK], tl.float32)  # minus dk, so that dV enters as it lies in memory
        dk_new = tl.zeros([CHUNK, BK], tl.float32)  # gated: the part through the new values, which dg needs by itself

        for i in range(0, V, BV):
            e = i + tl.arange(0, BV)
            in_v = e < V
            in_values = valid[:, None] & in_v[None, :]
            in_state = in_v[:, None] & in_k[None, :]
            douts = tl.load(do + at_values + e[None, :], mask=in_values, other=0.0)
            errors = tl.load(E + at_values + e[None, :], mask=in_values, other=0.0)
            dws = tl.load(dv + at_values + e[None, :], mask=in_values, other=0.0)
            state = tl.load(S_here + e[:, None] * K + d[None, :], mask=in_state & has_S, other=0.0)
            if BORROW:
                source = tl.where(is_last, D_here, tl.where(i // CHUNK == 0, D, D_high) + (first * H + key_head) * K)
                at_D = tl.where(is_last, e, e % CHUNK)[:, None] * tl.where(is_last, K, H * K) + d[None, :]
            else:
                source = D_here
                at_D = e[:, None] * K + d[None, :]
            dstate = tl.load(source + at_D, mask=in_state & has_D, other=0.0)

            dL = tl.dot(dws, tl.trans(errors), dL, input_precision=PRECISION)
            dP = tl.dot(douts, tl.trans(errors), dP, input_precision=PRECISION)
            dq_acc = tl.dot(douts, state, dq_acc, input_precision=PRECISION)
            dk_acc = tl.dot(dws, state, dk_acc, input_precision=PRECISION)
            if GATED:
                new = (errors.to(tl.float32) * (-scale * b * onward)[:, None]).to(errors.dtype)
                dk_new = tl.dot(new, dstate, dk_new, input_precision=PRECISION)
                overlap += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
            else:
                new = (errors.to(tl.float32) * (-scale * b)[:, None]).to(errors.dtype)
                dk_acc = tl.dot(new, dstate, dk_acc, input_precision=PRECISION)

        keys = tl.load(k + at_keys, mask=in_keys, other=0.0)
        queries = tl.load(q + at_keys, mask=in_keys, other=0.0)
        if GATED:
            dk_acc *= into[:, None]
            by_keys = tl.sum(keys.to(tl.float32) * dk_acc, 1)
            by_new = -tl.sum(keys.to(tl.float32) * dk_new, 1)
            dk_acc += dk_new
            decay = decay_between(Gc[:, None], Gc[None, :], keep)
            dL = tl.where(below, dL * decay * b[None, :], 0.0)
            M = dL * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
            dG = -by_keys - by_new - tl.sum(M, 1) + tl.sum(M, 0)  # the other order spills three times as much
        else:
            dL = tl.where(below, dL * b[None, :], 0.0)
        dk_acc = tl.dot((dL + tl.trans(dL)).to(keys.dtype), keys, dk_acc, input_precision=PRECISION)
        if GATED:
            dP *= decay * b[None, :]
            M = tl.where(below, scale * dP * tl.dot(queries, tl.trans(keys), input_precision=PRECISION), 0.0)
            dq_acc *= into[:, None]
            by_queries = scale * tl.sum(queries.to(tl.float32) * dq_acc, 1)
            dG += tl.sum(M, 1) - tl.sum(M, 0) + by_queries
            through = tl.sum(by_new, 0) + tl.math.exp2(last) * scale * overlap
            dg_rows = tl.cumsum(dG, 0, reverse=True) + through
            tl.store(dg + (key_tile * tokens.to(tl.int64) + first + t) * HV + head, dg_rows, mask=valid)
        else:
            dP = tl.where(keep, dP * b[None, :], 0.0)
        dk_acc = tl.dot((-scale * tl.trans(dP)).to(keys.dtype), queries, dk_acc, input_precision=PRECISION)
        dq_acc = tl.dot(dP.to(keys.dtype), keys, dq_acc, input_precision=PRECISION)
        dk_sum = dk_acc if GROUP == 1 else dk_sum + dk_acc
        dq_sum = dq_acc if GROUP == 1 else dq_sum + dq_acc

        if key_tile == 0:
            db = tl.zeros([CHUNK], tl.float32)
            for i in range(PARTIALS):
                db += tl.load(partial + i * (tokens.to(tl.int64) * HV) + along + t, mask=valid, other=0.0)
            tl.store(dbeta + (first + t) * HV + head, db.to(dbeta.dtype.element_ty), mask=valid)

    if BORROW:
        tl.debug_barrier()  # every warp has read D before its place is written
    tl.store(dk + at_keys, (-dk_sum).to(dk.dtype.element_ty), mask=in_keys)
    tl.store(dq + at_keys, (dq_sum * scale).to(dq.dtype.element_ty), mask=in_keys)
