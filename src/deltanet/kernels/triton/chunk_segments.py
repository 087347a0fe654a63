"""Long sequences on few heads: cut into segments that run side by side, then chained by what each does to the state.

    a segment maps the state at its start to the state at its end:      S_end = M S_start + N
    and the gradient of the latter to that of the former:               D_start = M^T D_end + d

N is the segment's final state from zero, d its first gradient from zero; M, K x K, is its final state from the identity with v = 0:
the same kernels, run without outputs. The chain over segments is in fp32: bf16 there would cost digits at every link.
Exact for the plain rule too, where nothing decays and no link may be dropped.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "segment"])
def chain(
    M,  # [segments, HV, K, K] fp32
    N,  # [segments, HV, K, V] fp32: N forwards, d backwards
    given,  # [sequences, HV, K, V] fp32: the state that the chain starts from, GIVEN only
    out,  # [segments, HV, K, V] fp32 out: the state that each segment starts from, or the gradient that it ends with
    cu_seqlens,
    T,
    segment,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STEP: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile = tl.program_id(0) % TILES
    sequence = tl.program_id(0) // TILES
    head = tl.program_id(1)
    if PACKED:
        begin = tl.load(cu_seqlens + sequence)
        first = (begin // segment).to(tl.int32) + sequence
        count = tl.maximum(1, tl.cdiv((tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32), segment))
    else:
        count = tl.cdiv(T, segment)
        first = sequence * count
    d = tl.arange(0, BK)[:, None]
    e = tile * BV + tl.arange(0, BV)[None, :]
    inner = tl.arange(0, STEP)
    whole = tl.arange(0, BK)[None, :]
    inside = (d < K) & (e < V)
    begin = 0
    if GIVEN:
        state = tl.load(given + (sequence.to(tl.int64) * HV + head) * (K * V) + d * V + e, mask=inside, other=0.0)
    else:  # from zero: no product for the first link
        edge = ((first + (count - 1 if BACKWARDS else 0)).to(tl.int64) * HV + head) * (K * V) + d * V + e
        tl.store(out + edge, tl.zeros([BK, BV], tl.float32), mask=inside)
        state = tl.load(N + edge, mask=inside & (count > 1), other=0.0)
        begin = 1
    for i in range(begin, count - 1):
        place = first + (count - 1 - i if BACKWARDS else i)
        at = (place.to(tl.int64) * HV + head) * (K * V)
        at_M = (place.to(tl.int64) * HV + head) * (K * K)
        tl.store(out + at + d * V + e, state, mask=inside)
        after = tl.load(N + at + d * V + e, mask=inside, other=0.0)
        if STEP >= BK:
            m_at = whole * K + d if BACKWARDS else d * K + whole
            m = tl.load(M + at_M + m_at, mask=(d < K) & (whole < K), other=0.0)
            state = tl.dot(m, state, after, input_precision=PRECISION)
        else:  # M is too large to be held at once, and a slice of the state can be had from memory alone
            state = after
            tl.debug_barrier()
            for j in range(0, K, STEP):
                rows = (j + inner)[:, None]
                cols = (j + inner)[None, :]
                m_at = cols * K + d if BACKWARDS else d * K + cols
                m = tl.load(M + at_M + m_at, mask=(d < K) & (cols < K), other=0.0)
                s = tl.load(out + at + rows * V + e, mask=(rows < K) & (e < V), other=0.0)
                state = tl.dot(m, s, state, input_precision=PRECISION)
    if count > begin:
        edge = ((first + (0 if BACKWARDS else count - 1)).to(tl.int64) * HV + head) * (K * V) + d * V + e
        tl.store(out + edge, state, mask=inside)
