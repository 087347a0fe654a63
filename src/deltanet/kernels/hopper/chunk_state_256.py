"""chunk_state and chunk_output for Hopper at K = V = 256: the algebra of chunk_state.py, other hands for it.

    W = V - e^G (K S)          E = W - X (beta W)
    O = scale e^G (Q S) + P E,  P = scale tril(Q K^T e^(G_i - G_j)) diag(beta)
    S <- e^(G_last) S + K^T (e^(G_last - G) beta E)

A program owns 64 columns of V of a head of a segment. S^T is 128 registers a thread in fp32 and 64 more as an operand, which leaves room
for one product of it and no more. So the warpgroup that has it makes W, E and the new S, the chain, and puts S and E in 16 bits into shared
memory; another one makes P and O out of these, and everything that goes to memory goes from there.

    loader (1 warp)     q, k, v of chunk t + 1 by TMA                         freed -> loaded
    output (4 warps)    X, beta and the decays, to shared; P and O;           loaded, state_made, error_made -> ready, freed, state_used, error_used
                        o, E and S to memory, by TMA
    state (4 warps)     S^T in registers, W, E, the new S                     loaded, ready, state_used, error_used -> state_made, error_made, freed

X and the vectors have as many places as q, k and v: a place is free when the next tiles have come, so nobody says that he has taken them.
The products of `state` are transposed, columns of V by tokens, so that S, beta W and V' are first operands and never leave the registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from deltanet.kernels.hopper.chunk_state import loader, store_tile
from deltanet.kernels.hopper.tiles import CHUNK, any_of_warp, clear, find_chunks, needed, power_of_2, without_forgotten

ROWS = gl.constexpr(64)  # columns of V of a program: rows of S^T


@gluon.jit
def state(
    tiles, shared, vectors, barriers, handed, initial, identity, final, ends, length, chunks,
    STAGES: gl.constexpr, GATED: gl.constexpr, REST: gl.constexpr, INITIAL: gl.constexpr, OUTPUT: gl.constexpr, FINAL: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """The chain: S^T `[64, K]` in registers from the first chunk to the last."""
    _, k_s, v_s = tiles
    X_s, X_low_s, S0_s, S1_s, E_s = shared
    b_s, _, into_s, onward_s, last_s = vectors
    loaded, freed, ready = barriers
    state_made, state_used, error_made, error_used = handed
    HALF: gl.constexpr = K // 2
    by_token: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    first_token: gl.constexpr = gl.DotOperandLayout(0, by_token, 2)
    first_key: gl.constexpr = gl.DotOperandLayout(0, by_key, 2)
    columns: gl.constexpr = gl.SliceLayout(0, by_token)
    dtype: gl.constexpr = k_s.dtype

    e_row = gl.arange(0, ROWS, gl.SliceLayout(1, by_key))
    d_col = gl.arange(0, HALF, gl.SliceLayout(0, by_key))
    at_state = d_col[None, :] * V + e_row[:, None]  # S^T as it lies in [K, V]
    if INITIAL:
        gdc_wait()
        S0 = gl.load(initial + at_state)
        S1 = gl.load(initial + HALF * V + at_state)
    else:
        S0 = gl.zeros([ROWS, HALF], gl.float32, by_key)
        S1 = gl.zeros([ROWS, HALF], gl.float32, by_key)
        if not OUTPUT:
            S0 = gl.where(d_col[None, :] == identity + e_row[:, None], 1.0, S0)
            S1 = gl.where(d_col[None, :] + HALF == identity + e_row[:, None], 1.0, S1)
    zero = gl.zeros([ROWS, CHUNK], gl.float32, by_token)

    for t in range(chunks):
        i = t % STAGES
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        if length - t * CHUNK < CHUNK:  # rows of the next sequence are cleared before it says so
            mbarrier.wait(ready.index(i), (t // STAGES) & 1)
        k0 = k_s.index(i).slice(0, HALF, 1)
        k1 = k_s.index(i).slice(HALF, HALF, 1)
        Sb = S0.to(dtype)
        W = warpgroup_mma(gl.convert_layout(Sb, first_token), k0.permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUTPUT:
            mbarrier.wait(state_used, (t & 1) ^ 1)
            S0_s.store(Sb)
        S1_s.store(S1.to(dtype))
        fence_async_shared()
        W = warpgroup_mma(S1_s, k1.permute((1, 0)), W, is_async=True)
        if OUTPUT:
            mbarrier.arrive(state_made, count=1)
        W = warpgroup_mma_wait(0, deps=[W])
        values = v_s.index(i).permute((1, 0)).load(by_token).to(gl.float32)
        if not OUTPUT:
            values = gl.where(identity >= 0, 0.0, values)
        mbarrier.wait(ready.index(i), (t // STAGES) & 1)
        b = b_s.index(i).load(columns)
        if GATED:
            W = values - W * into_s.index(i).load(columns)[None, :]
        else:
            W = values - W
        bW = gl.convert_layout((W * -b[None, :]).to(dtype), first_token)
        Et = warpgroup_mma(bW, X_s.index(i).permute((1, 0)), W, is_async=True)
        if REST:
            above_one = any_of_warp(gl.max(b, 0) > 1.0)
        Et = warpgroup_mma_wait(0, deps=[Et])
        if REST:
            if above_one:  # where errors may grow, what rounding left of X counts
                Et = warpgroup_mma(bW, X_low_s.index(i).permute((1, 0)), Et, is_async=True)
                Et = warpgroup_mma_wait(0, deps=[Et])
        if GATED:
            last = last_s.index(i).load(gl.SliceLayout(1, by_key))
            S0 = S0 * last[:, None]
            S1 = S1 * last[:, None]
            new = Et * onward_s.index(i).load(columns)[None, :]
        else:
            new = Et * b[None, :]
        new = gl.convert_layout(new.to(dtype), first_key)
        S0 = warpgroup_mma(new, k0, S0, is_async=True)
        S1 = warpgroup_mma(new, k1, S1, is_async=True)
        if OUTPUT:
            mbarrier.wait(error_used, (t & 1) ^ 1)
            E_s.permute((1, 0)).store(Et.to(dtype))
            fence_async_shared()
            mbarrier.arrive(error_made, count=1)
        S0, S1 = warpgroup_mma_wait(0, deps=[S0, S1])
        mbarrier.arrive(freed.index(i), count=1)

    if FINAL:
        if ends:
            gl.store(final + at_state, S0)
            gl.store(final + HALF * V + at_state, S1)


@gluon.jit
def output(
    tiles, shared, o_s, vectors, barriers, handed, descs, pointers, strength, G, X, X_low,
    row0, value_col, state_row, first_slot, no_slot, length, chunks, scale,
    STAGES: gl.constexpr, GATED: gl.constexpr, REST: gl.constexpr, OUTPUT: gl.constexpr, SAVE_E: gl.constexpr, SAVE_S: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, HV: gl.constexpr,
):  # fmt: skip
    """What nobody waits for long: O; and what of a chunk does not depend on the state."""
    q_s, k_s, v_s = tiles
    X_s, X_low_s, S0_s, S1_s, E_s = shared
    b_s, G_s, into_s, onward_s, last_s = vectors
    loaded, freed, ready = barriers
    state_made, state_used, error_made, error_used = handed
    o_desc, E_desc, S_desc = descs
    o, E = pointers
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp holds all 64
    xr = gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
    xc = gl.arange(0, CHUNK, gl.SliceLayout(0, wide))
    x_at = gl.where(xr < 32, xr * 32, xr * 64 - 1024)[:, None] + xc[None, :]
    x_in = (xr[:, None] >= 32) | (xc[None, :] < 32)
    t1 = gl.arange(0, CHUNK, line)
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, mma))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, mma))
    zero = gl.zeros([CHUNK, CHUNK], gl.float32, mma)

    gdc_wait()
    # what comes from memory without TMA is loaded a chunk ahead
    x_next = gl.load(X + x_at, mask=x_in & (xr < length)[:, None], other=0.0)
    b_next = gl.load(strength + t1, mask=t1 < length, other=0.0)
    if GATED:
        last_next = gl.load(G + gl.minimum(length, CHUNK) - 1, mask=length > 0, other=0.0)
        G_next = gl.load(G + t1, mask=t1 < length, other=0.0)

    for t in range(chunks):
        i = t % STAGES
        at = t * CHUNK
        rows = length - at
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        if rows < CHUNK:  # what q has there reaches no row that is kept
            clear(k_s.index(i), rows, K)
            clear(v_s.index(i), rows, ROWS)
        if OUTPUT:
            P = warpgroup_mma(q_s.index(i), k_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        X_s.index(i).store(x_next)
        b_s.index(i).store(b_next)
        if REST:
            if any_of_warp(gl.max(b_next, 0) > 1.0):
                low = gl.load(X_low + at * 48 + x_at, mask=x_in & (xr < rows)[:, None], other=0.0)
                X_low_s.index(i).store(low)
        if GATED:
            Gc = gl.where(t1 < rows, G_next, last_next)
            G_s.store(Gc)
            into_s.index(i).store(power_of_2(Gc))
            onward_s.index(i).store(b_next * power_of_2(last_next - Gc))
            last_s.index(i).store(power_of_2(gl.zeros_like(Gc) + last_next))
        fence_async_shared()
        mbarrier.arrive(ready.index(i), count=1)

        if OUTPUT:
            mbarrier.wait(state_made, t & 1)
            O = warpgroup_mma(q_s.index(i).slice(0, K // 2, 1), S0_s.permute((1, 0)), zero, use_acc=False, is_async=True)
            O = warpgroup_mma(q_s.index(i).slice(K // 2, K // 2, 1), S1_s.permute((1, 0)), O, is_async=True)
        if SAVE_S:
            if first_slot + t > no_slot:
                tma.async_copy_shared_to_global(S_desc, [(first_slot + t) * (HV * V) + state_row, 0], S0_s)
                tma.async_copy_shared_to_global(S_desc, [(first_slot + t) * (HV * V) + state_row, K // 2], S1_s)
        at += CHUNK
        x_next = gl.load(X + at * 48 + x_at, mask=x_in & (xr < rows - CHUNK)[:, None], other=0.0)
        b_next = gl.load(strength + at + t1, mask=t1 < rows - CHUNK, other=0.0)
        if GATED:
            last_next = gl.load(G + gl.minimum(length, at + CHUNK) - 1)
            G_next = gl.load(G + at + t1, mask=t1 < rows - CHUNK, other=0.0)
        if OUTPUT:
            P = warpgroup_mma_wait(2, deps=[P])
            b_col = b_s.index(i).load(gl.SliceLayout(0, mma)) * scale
            if GATED:
                G_row = G_s.load(gl.SliceLayout(1, mma))
                G_col = G_s.load(gl.SliceLayout(0, mma))
                # the exponent is masked, not the power: above the diagonal it would overflow
                P = P * b_col[None, :] * power_of_2(gl.where(r[:, None] >= c[None, :], G_row[:, None] - G_col[None, :], float("-inf")))
            else:
                P = gl.where(r[:, None] >= c[None, :], P * b_col[None, :], 0.0)
            Pa = gl.convert_layout(P.to(k_s.dtype), gl.DotOperandLayout(0, mma, 2))
            O = warpgroup_mma_wait(0, deps=[O])
            tma.store_wait(0)  # o of the chunk before, and S
            mbarrier.arrive(state_used, count=1)
            mbarrier.arrive(freed.index(i), count=1)
            if GATED:
                O = O * (into_s.index(i).load(gl.SliceLayout(1, mma)) * scale)[:, None]
            else:
                O = O * scale
            mbarrier.wait(error_made, t & 1)
            O = warpgroup_mma(Pa, E_s, O, is_async=True)
            if SAVE_E:
                store_tile(E_desc, E_s, E, row0 + at - CHUNK, value_col, rows, HV * V, wide)
            O = warpgroup_mma_wait(0, deps=[O])
            o_s.store(O.to(o_s.dtype))
            fence_async_shared()
            if SAVE_E:
                tma.store_wait(0)
            mbarrier.arrive(error_used, count=1)
            store_tile(o_desc, o_s, o, row0 + at - CHUNK, value_col, rows, HV * V, wide)
        else:
            mbarrier.arrive(freed.index(i), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "steps", "tokens", "segment", "starts_used", "ends_used", "scale"])
def forward_256(
    q,  # descriptor of [tokens, H * K], blocks [64, K]
    k,  # the same
    v,  # descriptor of [tokens, HV * V], blocks [64, 64]
    o_desc,  # descriptor of o, blocks [64, 64]
    E_desc,  # descriptor of E, blocks [64, 64]
    S_desc,  # descriptor of S, [slots * HV * V, K], blocks [64, K / 2]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, gated only
    X,  # [HV, tokens * 48]
    X_low,  # the same shape: what rounding X left over, of chunks with a beta above 1, REST only
    initial,  # [segments, HV, K, V] fp32, INITIAL only
    o,  # [tokens, HV, V] out
    E,  # [tokens, HV, V] out, SAVE_E only
    final,  # [segments or N, HV, K, V] fp32 out, FINAL only
    transition,  # [segments, HV, K, K] fp32 out, unless OUTPUT: what a segment does to a state, its final state from the identity with v = 0
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    segment,  # tokens of a segment, a multiple of 64
    starts_used,  # whether what a sequence's first segment does to a state is asked for (1 or 0), unless OUTPUT
    ends_used,  # and its last
    scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    REST: gl.constexpr,
    INITIAL: gl.constexpr,
    OUTPUT: gl.constexpr,  # else only what segments do to states: final from zero, and transition, whose columns follow those of V
    SAVE_E: gl.constexpr,
    SAVE_S: gl.constexpr,  # S out: the state at the start of each chunk but a sequence's first
    FINAL: gl.constexpr,  # 1: of every segment, 2: of every sequence, by its last segment
    OUTPUT_REGISTERS: gl.constexpr,
):
    TILES: gl.constexpr = V // ROWS if OUTPUT else (V + K) // ROWS
    # the programs of a head run side by side and read q and k together; heads lie side by side in memory
    tile = gl.program_id(0) % TILES
    head = (gl.program_id(0) // TILES) % HV
    place = gl.program_id(0) // (TILES * HV)
    identity = place * 0 - K
    if not OUTPUT:
        if tile >= V // ROWS:
            tile -= V // ROWS
            identity = tile * ROWS
            final = transition
    sequence, part, before, begin, end, chunks = find_chunks(place, cu_seqlens, N, steps, T, segment, SPLIT, PACKED)
    if not OUTPUT:
        chunks = needed(chunks, part, begin, end, before, identity, starts_used, ends_used)
    no_slot = (begin // CHUNK).to(gl.int32) - 1
    first_slot = no_slot + before
    begin += before * CHUNK
    if GATED and not OUTPUT:
        gdc_wait()
        begin, chunks, identity = without_forgotten(G + head.to(gl.int64) * tokens, begin, end, chunks, identity)
    length = (end - begin).to(gl.int32)
    along = head.to(gl.int64) * tokens + begin
    given = (place.to(gl.int64) * HV + head) * (K * V) + tile * ROWS
    initial += given
    if FINAL == 2:
        final += (sequence.to(gl.int64) * HV + head) * (K * V) + tile * ROWS
        ends = (length <= chunks * CHUNK) & ((chunks > 0) | (before == 0))
    else:
        final += given
        ends = chunks == chunks

    dtype: gl.constexpr = k.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], swizzled)
    q_s = k_s
    if OUTPUT:
        q_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], swizzled)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, ROWS], swizzled)
    X_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, CHUNK], swizzled)
    X_low_s = X_s
    if REST:
        X_low_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, CHUNK], swizzled)
    S0_s = gl.allocate_shared_memory(dtype, [ROWS, K // 2], swizzled)  # two arrays: places in one get barriers between them
    S1_s = gl.allocate_shared_memory(dtype, [ROWS, K // 2], swizzled)
    E_s = gl.allocate_shared_memory(dtype, [CHUNK, ROWS], swizzled)
    o_s = gl.allocate_shared_memory(dtype, [CHUNK, ROWS], swizzled)
    b_s = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK], plain)
    G_s = b_s.index(0)
    into_s = b_s
    onward_s = b_s
    last_s = b_s
    if GATED:
        G_s = gl.allocate_shared_memory(gl.float32, [CHUNK], plain)
        into_s = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK], plain)
        onward_s = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK], plain)
        last_s = gl.allocate_shared_memory(gl.float32, [STAGES, CHUNK], plain)

    line: gl.constexpr = mbarrier.MBarrierLayout()
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(freed.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
    state_made = gl.allocate_shared_memory(gl.int64, [1], line)
    state_used = gl.allocate_shared_memory(gl.int64, [1], line)
    error_made = gl.allocate_shared_memory(gl.int64, [1], line)
    error_used = gl.allocate_shared_memory(gl.int64, [1], line)
    mbarrier.init(state_made, count=1)
    mbarrier.init(state_used, count=1)
    mbarrier.init(error_made, count=1)
    mbarrier.init(error_used, count=1)

    tiles = (q_s, k_s, v_s)
    shared = (X_s, X_low_s, S0_s, S1_s, E_s)
    vectors = (b_s, G_s, into_s, onward_s, last_s)
    barriers = (loaded, freed, ready)
    handed = (state_made, state_used, error_made, error_used)
    row0 = begin.to(gl.int32)
    value_col = head * V + tile * ROWS
    # the first partition has what registers the others leave; their arguments must be literal: a constexpr put in a variable is one no longer
    gl.warp_specialize(
        [
            (state, (tiles, shared, vectors, barriers, handed, initial, identity, final, ends, length, chunks,
                     STAGES, GATED, REST, INITIAL, OUTPUT, FINAL, K, V)),
            (output, (tiles, shared, o_s, vectors, barriers, handed, (o_desc, E_desc, S_desc), (o, E),
                      strength + along, G + along, X + along * 48, X_low + along * 48, row0, value_col, value_col, first_slot, no_slot,
                      length, chunks, scale, STAGES, GATED, REST, OUTPUT, SAVE_E, SAVE_S, K, V, HV)),
            (loader, (q, k, v, tiles, (loaded, freed), row0, (head // (HV // H)) * K, value_col, chunks, STAGES, OUTPUT)),
        ],
        [4, 1],
        [OUTPUT_REGISTERS, 24],
    )  # fmt: skip
