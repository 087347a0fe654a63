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

from deltanet.kernels.hopper.chunk_state import ROWS, loader
from deltanet.kernels.hopper.tiles import (
    CHUNK,
    SWIZZLED,
    allocate_barriers,
    allocate_vectors,
    any_of_warp,
    ask,
    clear,
    find_chunks,
    in_X,
    needed,
    power_of_2,
    put_vectors,
    store_tile,
    without_forgotten,
)


@gluon.jit
def own_betas(strength, chunk, length):
    """The larger of the two betas of a chunk that are this lane's: a number of its own in every lane, for a vote. A maximum over all of them would
    be five shuffles, and those wait behind the products' operands.
    """
    lane = gl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [chunk], dtype=gl.int32, is_pure=True, pack=1)
    at = chunk * CHUNK + lane * 2
    one = gl.load(strength + at, mask=at < length, other=0.0)
    return gl.maximum(one, gl.load(strength + at + 1, mask=at + 1 < length, other=0.0))


@gluon.jit
def state(
    tiles, shared, vectors, barriers, handed, strength, initial, identity, final, ends, length, chunks,
    STAGES: gl.constexpr, GATED: gl.constexpr, INITIAL: gl.constexpr, OUTPUT: gl.constexpr, FINAL: gl.constexpr,
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
    gdc_wait()
    if INITIAL:
        S0 = gl.load(initial + at_state)
        S1 = gl.load(initial + HALF * V + at_state)
    else:
        S0 = gl.zeros([ROWS, HALF], gl.float32, by_key)
        S1 = gl.zeros([ROWS, HALF], gl.float32, by_key)
        if not OUTPUT:
            S0 = gl.where(d_col[None, :] == identity + e_row[:, None], 1.0, S0)
            S1 = gl.where(d_col[None, :] + HALF == identity + e_row[:, None], 1.0, S1)
    zero = gl.zeros([ROWS, CHUNK], gl.float32, by_token)
    betas = own_betas(strength, chunks * 0, length)

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
        above_one = any_of_warp(betas > 1.0)
        betas = own_betas(strength, t + 1, length)
        Et = warpgroup_mma_wait(0, deps=[Et])
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
def ask_rest(X_low, above_one, token, length):
    """What rounding left of X of the chunk at `token`, where one of its betas is above 1."""
    at, inside = in_X(token, length - token)
    return gl.load(X_low + at, mask=inside & above_one, other=0.0)


@gluon.jit
def output(
    tiles, shared, o_s, vectors, barriers, handed, descs, pointers, strength, G, X, X_low,
    row0, value_col, first_slot, no_slot, length, chunks, scale,
    STAGES: gl.constexpr, GATED: gl.constexpr, OUTPUT: gl.constexpr, SAVE_E: gl.constexpr, SAVE_S: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, HV: gl.constexpr,
):  # fmt: skip
    """O; what of a chunk does not depend on the state, a chunk ahead; and whatever goes to memory."""
    q_s, k_s, v_s = tiles
    X_s, X_low_s, S0_s, S1_s, E_s = shared
    b_s, G_s, into_s, _, _ = vectors
    loaded, freed, ready = barriers
    state_made, state_used, error_made, error_used = handed
    o_desc, E_desc, S_desc = descs
    o, E = pointers
    HALF: gl.constexpr = K // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    in_rows: gl.constexpr = gl.SliceLayout(1, mma)
    in_columns: gl.constexpr = gl.SliceLayout(0, mma)
    r = gl.arange(0, CHUNK, in_rows)
    c = gl.arange(0, CHUNK, in_columns)
    zero = gl.zeros([CHUNK, CHUNK], gl.float32, mma)

    gdc_wait()
    # asked for a chunk before it is put into its place, betas for the vote another one before
    token = chunks * 0
    above_one = any_of_warp(own_betas(strength, token, length) > 1.0)
    x, b, decay, last = ask(X, strength, G, token, length, GATED)
    low = ask_rest(X_low, above_one, token, length)
    betas = own_betas(strength, token + 1, length)

    for t in range(chunks):
        i = t % STAGES
        rows = length - token
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        if rows < CHUNK:  # what q has there reaches no row that is kept
            clear(k_s.index(i), rows, K)
            clear(v_s.index(i), rows, ROWS)
        if OUTPUT:
            P = warpgroup_mma(q_s.index(i), k_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        X_s.index(i).store(x)
        if any_of_warp(above_one):
            X_low_s.index(i).store(low)
        put_vectors(vectors, i, b, decay, last, rows, GATED)
        fence_async_shared()
        mbarrier.arrive(ready.index(i), count=1)

        if OUTPUT:
            mbarrier.wait(state_made, t & 1)
            O = warpgroup_mma(q_s.index(i).slice(0, HALF, 1), S0_s.permute((1, 0)), zero, use_acc=False, is_async=True)
            O = warpgroup_mma(q_s.index(i).slice(HALF, HALF, 1), S1_s.permute((1, 0)), O, is_async=True)
        if SAVE_S:
            if first_slot + t > no_slot:
                tma.async_copy_shared_to_global(S_desc, [(first_slot + t) * (HV * V) + value_col, 0], S0_s)
                tma.async_copy_shared_to_global(S_desc, [(first_slot + t) * (HV * V) + value_col, HALF], S1_s)
        above_one = any_of_warp(betas > 1.0)
        x, b, decay, last = ask(X, strength, G, token + CHUNK, length, GATED)
        low = ask_rest(X_low, above_one, token + CHUNK, length)
        betas = own_betas(strength, t + 2, length)
        if OUTPUT:
            P = warpgroup_mma_wait(2, deps=[P])
            P = P * (b_s.index(i).load(in_columns) * scale)[None, :]
            if GATED:
                G_row = G_s.load(in_rows)
                G_col = G_s.load(in_columns)
                # the exponent is masked, not the power: above the diagonal it would overflow
                P = P * power_of_2(gl.where(r[:, None] >= c[None, :], G_row[:, None] - G_col[None, :], float("-inf")))
            else:
                P = gl.where(r[:, None] >= c[None, :], P, 0.0)
            Pa = gl.convert_layout(P.to(k_s.dtype), gl.DotOperandLayout(0, mma, 2))
            O = warpgroup_mma_wait(0, deps=[O])
            tma.store_wait(0)  # o of the chunk before, and S
            mbarrier.arrive(state_used, count=1)
            mbarrier.arrive(freed.index(i), count=1)
            if GATED:
                O = O * (into_s.index(i).load(in_rows) * scale)[:, None]
            else:
                O = O * scale
            mbarrier.wait(error_made, t & 1)
            O = warpgroup_mma(Pa, E_s, O, is_async=True)
            if SAVE_E:
                store_tile(E_desc, E_s, E, row0 + token, value_col, rows, HV * V)
            O = warpgroup_mma_wait(0, deps=[O])
            o_s.store(O.to(o_s.dtype))
            fence_async_shared()
            if SAVE_E:
                tma.store_wait(0)
            mbarrier.arrive(error_used, count=1)
            store_tile(o_desc, o_s, o, row0 + token, value_col, rows, HV * V)
        else:
            mbarrier.arrive(freed.index(i), count=1)
        token += CHUNK
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
    X_low,  # the same shape: what rounding X left over, of chunks with a beta above 1
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
    k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    q_s = k_s
    if OUTPUT:
        q_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, ROWS], SWIZZLED)
    X_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, CHUNK], SWIZZLED)
    X_low_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, CHUNK], SWIZZLED)
    S0_s = gl.allocate_shared_memory(dtype, [ROWS, K // 2], SWIZZLED)  # two arrays: places in one get barriers between them
    S1_s = gl.allocate_shared_memory(dtype, [ROWS, K // 2], SWIZZLED)
    E_s = gl.allocate_shared_memory(dtype, [CHUNK, ROWS], SWIZZLED)
    o_s = gl.allocate_shared_memory(dtype, [CHUNK, ROWS], SWIZZLED)
    vectors = allocate_vectors(STAGES, GATED)
    loaded = allocate_barriers(STAGES, 1)
    freed = allocate_barriers(STAGES, 2)
    ready = allocate_barriers(STAGES, 1)
    # Not without outputs: barriers that nobody waits for would lie where the roles find their arguments, and be made after these were put there.
    handed = (loaded, loaded, loaded, loaded)
    if OUTPUT:
        made = allocate_barriers(4, 1)
        handed = (made.index(0), made.index(1), made.index(2), made.index(3))  # state_made, state_used, error_made, error_used

    tiles = (q_s, k_s, v_s)
    shared = (X_s, X_low_s, S0_s, S1_s, E_s)
    barriers = (loaded, freed, ready)
    row0 = begin.to(gl.int32)
    value_col = head * V + tile * ROWS
    # the first partition has what registers the others leave; their arguments must be literal: a constexpr put in a variable is one no longer
    gl.warp_specialize(
        [
            (state, (tiles, shared, vectors, barriers, handed, strength + along, initial, identity, final, ends, length, chunks,
                     STAGES, GATED, INITIAL, OUTPUT, FINAL, K, V)),
            (output, (tiles, shared, o_s, vectors, barriers, handed, (o_desc, E_desc, S_desc), (o, E),
                      strength + along, G + along, X + along * 48, X_low + along * 48, row0, value_col, first_slot, no_slot,
                      length, chunks, scale, STAGES, GATED, OUTPUT, SAVE_E, SAVE_S, K, V, HV)),
            (loader, (q, k, v, tiles, (loaded, freed), row0, (head // (HV // H)) * K, value_col, chunks, STAGES, OUTPUT)),
        ],
        [4, 1],
        [OUTPUT_REGISTERS, 24],
    )  # fmt: skip
