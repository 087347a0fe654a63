"""chunk_state and chunk_output in one pass: prediction errors, outputs and states, chunk after chunk.

    W = V - e^G (K S)          E = W - X (beta W)          V' = beta E
    O = scale (e^G (Q S) + tril(Q K^T e^(G_i - G_j)) V')
    S <- e^(G_last) S + K^T (e^(G_last - G) V')

S stays in registers as S^T, rows of V by all of K, so that every product with it has its first operand in registers. One program
owns BLOCK_V columns of V of one head of one segment; a segment is a whole sequence, or a run of chunks of it.
"""

import triton
import triton.language as tl

from deltanet.kernels.triton.tiles import CHUNK, decay_between, find_part


@triton.jit(do_not_specialize=["T", "N", "steps", "tokens", "segment", "scale"])
def forward(
    q,  # [tokens, H, K]
    k,  # [tokens, H, K]
    v,  # [tokens, HV, V]; unused when TRANSITION
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, gated only
    X,  # [HV, tokens * 48]
    X_low,  # the same shape: what rounding X left over, REST only
    initial,  # [segments, HV, K, V] fp32, INITIAL only
    o,  # [tokens, HV, V] out, OUTPUT only
    E,  # [tokens, HV, V] out if SAVE_E, in if REPLAY
    S,  # [slots, HV, V, K] out: the state at the start of each chunk but the first, SAVE_S only
    final,  # [segments or N, HV, K, V] fp32 out, FINAL only
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    segment,  # tokens of a segment, a multiple of 64
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPLIT: tl.constexpr,  # sequences are cut into segments, one program each
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    REST: tl.constexpr,
    INITIAL: tl.constexpr,
    TRANSITION: tl.constexpr,  # v = 0 and S starts as the identity: the final state is the segment's transition
    REPLAY: tl.constexpr,  # E is read, not computed: only the states are wanted
    OUTPUT: tl.constexpr,
    SAVE_E: tl.constexpr,
    SAVE_S: tl.constexpr,
    FINAL: tl.constexpr,  # 1: of every segment, 2: of every sequence, by its last segment
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    place = tl.program_id(0) // TILES
    head = tl.program_id(1)
    if not SPLIT:
        sequence = place
        part = 0
        if PACKED:
            begin = tl.load(cu_seqlens + place).to(tl.int64)
            end = tl.load(cu_seqlens + place + 1).to(tl.int64)
        else:
            begin = place.to(tl.int64) * T
            end = begin + T
        chunks = tl.cdiv(end - begin, CHUNK).to(tl.int32)
        c_from = 0
    else:
        sequence, part, begin, end = find_part(place, cu_seqlens, N, steps, T, segment, PACKED)
        c_from = part * (segment // CHUNK)
        chunks = tl.minimum(tl.cdiv(end - begin, CHUNK).to(tl.int32) - c_from, segment // CHUNK)

    state = (place.to(tl.int64) * HV + head) * K * V
    t = tl.arange(0, CHUNK)
    d = tl.arange(0, BK)
    e = tile * BV + tl.arange(0, BV)
    in_k = d < K
    in_v = e < V
    at_state = d[None, :] * V + e[:, None]  # S^T as it lies in [K, V]
    if TRANSITION:
        St = tl.where(d[None, :] == e[:, None], 1.0, 0.0) + tl.zeros([BV, BK], tl.float32)
    elif INITIAL:
        St = tl.load(initial + state + at_state, mask=in_k[None, :] & in_v[:, None], other=0.0)
    else:
        St = tl.zeros([BV, BK], tl.float32)

    begin += c_from * CHUNK
    q += (begin * H + head // (HV // H)) * K
    k += (begin * H + head // (HV // H)) * K
    v += (begin * HV + head) * V
    o += (begin * HV + head) * V
    E += (begin * HV + head) * V
    along = head.to(tl.int64) * tokens + begin
    strength += along
    G += along
    X += along * 48
    X_low += along * 48
    slot = begin // CHUNK - 1
    length = (end - begin).to(tl.int32)
    x_at = tl.where(t < 32, t * 32, t * 64 - 1024)[:, None] + t[None, :]
    x_in = (t[:, None] >= 32) | (t[None, :] < 32)

    for c in range(chunks):
        row = c * CHUNK + t
        valid = row < length
        row = row.to(tl.int64)
        keys = tl.load(k + row[:, None] * (H * K) + d[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
        b = tl.load(strength + row, mask=valid, other=0.0)
        Sb = St.to(keys.dtype)
        if SAVE_S:
            at_slot = ((slot + c) * HV + head) * (K * V)
            keep = in_v[:, None] & in_k[None, :] & (c + c_from > 0)
            tl.store(S + at_slot + e[:, None] * K + d[None, :], Sb, mask=keep)
        if GATED:
            last = tl.load(G + tl.minimum(length, (c + 1) * CHUNK) - 1)
            Gc = tl.where(valid, tl.load(G + row, mask=valid, other=0.0), last)

        if REPLAY:
            errors = tl.load(E + row[:, None] * (HV * V) + e[None, :], mask=valid[:, None] & in_v[None, :], other=0.0)
            Et = tl.trans(errors).to(tl.float32)
        else:
            # E^T = W^T - (beta W)^T X^T
            W = tl.dot(Sb, tl.trans(keys), input_precision=PRECISION)
            if GATED:
                W *= tl.math.exp2(Gc)[None, :]
            if TRANSITION:
                W = -W
            else:
                values = tl.load(v + row[:, None] * (HV * V) + e[None, :], mask=valid[:, None] & in_v[None, :], other=0.0)
                W = tl.trans(values).to(tl.float32) - W
            bW = -(W * b[None, :]).to(keys.dtype)
            x_mask = x_in & valid[:, None]
            x = tl.load(X + c * 3072 + x_at, mask=x_mask, other=0.0)
            Et = tl.dot(bW, tl.trans(x), W, input_precision=PRECISION)
            if REST:
                x = tl.load(X_low + c * 3072 + x_at, mask=x_mask, other=0.0)
                Et = tl.dot(bW, tl.trans(x), Et, input_precision=PRECISION)
        at = row[None, :] * (HV * V) + e[:, None]
        if SAVE_E:
            tl.store(E + at, Et.to(E.dtype.element_ty), mask=valid[None, :] & in_v[:, None])

        if OUTPUT:
            queries = tl.load(q + row[:, None] * (H * K) + d[None, :], mask=valid[:, None] & in_k[None, :], other=0.0)
            new = (Et * b[None, :]).to(keys.dtype)
            P = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # transposed, as the product below wants it
            O = tl.dot(Sb, tl.trans(queries), input_precision=PRECISION)
            if GATED:
                P *= decay_between(Gc[None, :], Gc[:, None], t[:, None] <= t[None, :])
                O *= tl.math.exp2(Gc)[None, :]
            else:
                P = tl.where(t[:, None] <= t[None, :], P, 0.0)
            O = tl.dot(new, P.to(keys.dtype), O, input_precision=PRECISION)
            tl.store(o + at, (O * scale).to(o.dtype.element_ty), mask=valid[None, :] & in_v[:, None])

        if GATED:
            new = (Et * (b * tl.math.exp2(last - Gc))[None, :]).to(keys.dtype)
            St = tl.dot(new, keys, St * tl.math.exp2(last), input_precision=PRECISION)
        else:
            new = (Et * b[None, :]).to(keys.dtype)
            St = tl.dot(new, keys, St, input_precision=PRECISION)
    if FINAL == 1:
        tl.store(final + state + at_state, St, mask=in_k[None, :] & in_v[:, None])
    if FINAL == 2:
        state = (sequence.to(tl.int64) * HV + head) * K * V
        ends = (length <= chunks * CHUNK) & ((chunks > 0) | (part == 0))
        tl.store(final + state + at_state, St, mask=in_k[None, :] & in_v[:, None] & ends)
