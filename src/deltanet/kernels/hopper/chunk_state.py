"""chunk_state and chunk_output for Hopper: the algebra of kernels/triton/chunk_state.py, warp-specialised.

    W = V - e^G (K S)          E = W - X (beta W)          V' = beta E
    O = scale (e^G (Q S) + tril(Q K^T e^(G_i - G_j)) V')
    S <- e^(G_last) S + K^T (e^(G_last - G) V')

One program owns 64 or 128 columns of V of one head of one segment, chunk after chunk. Who does what (docs/kernels.md has the map):

    loader (1 warp)              q, k, v of chunk t + 1 by TMA                    freed -> loaded
    auxiliary (4 warps)          tril(Q K^T), X, beta and the decays, to shared   loaded, taken -> ready
    state (4 warps a 64 columns) S^T in registers, W, E, O, the new S             loaded, ready -> freed, taken

Every barrier is named after what it announces. Products are transposed, columns of V by tokens, so that S, beta W and V' are always first
operands and never leave the registers.
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

from deltanet.kernels.hopper.tiles import (
    CHUNK,
    SWIZZLED,
    WIDE,
    allocate_barriers,
    allocate_vectors,
    any_of_warp,
    ask,
    clear,
    find_chunks,
    in_X,
    masked,
    needed,
    power_of_2,
    put_vectors,
    store_tile,
    without_forgotten,
)

ROWS = gl.constexpr(64)  # columns of V that one state warpgroup owns: rows of S^T


@gluon.jit
def loader(q, k, v, tiles, barriers, row0, key_col, value_col, chunks, STAGES: gl.constexpr, with_q, BACKWARDS: gl.constexpr = False):
    """Brings q, k and v of each chunk to shared memory. Rows past the end of the sequence belong to the next one: the auxiliary clears them."""
    q_s, k_s, v_s = tiles
    loaded, freed = barriers
    for t in range(chunks):
        i = t % STAGES
        mbarrier.wait(freed.index(i), ((t // STAGES) & 1) ^ 1)
        arrived = loaded.index(i)
        if with_q:
            mbarrier.expect(arrived, q.block_type.nbytes + k.block_type.nbytes + v.block_type.nbytes)
        else:
            mbarrier.expect(arrived, k.block_type.nbytes + v.block_type.nbytes)
        if BACKWARDS:
            row = row0 + (chunks - 1 - t) * CHUNK
        else:
            row = row0 + t * CHUNK
        tma.async_copy_global_to_shared(k, [row, key_col], arrived, k_s.index(i))
        if with_q:
            tma.async_copy_global_to_shared(q, [row, key_col], arrived, q_s.index(i))
        tma.async_copy_global_to_shared(v, [row, value_col], arrived, v_s.index(i))


@gluon.jit
def auxiliary(
    tiles, shared, vectors, barriers, strength, G, X, X_low, length, chunks, scale, whole,
    STAGES: gl.constexpr, GATED: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr, K: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """prepare, with or without outputs: as the launch has it, or as this program does."""
    if FIRST:
        if any_of_warp(whole):
            prepare(tiles, shared, vectors, barriers, strength, G, X, X_low, length, chunks, scale, STAGES, GATED, True, K, VALUES)
        else:
            prepare(tiles, shared, vectors, barriers, strength, G, X, X_low, length, chunks, scale, STAGES, GATED, False, K, VALUES)
    else:
        prepare(tiles, shared, vectors, barriers, strength, G, X, X_low, length, chunks, scale, STAGES, GATED, OUTPUT, K, VALUES)


@gluon.jit
def prepare(
    tiles, shared, vectors, barriers, strength, G, X, X_low, length, chunks, scale,
    STAGES: gl.constexpr, GATED: gl.constexpr, OUTPUT: gl.constexpr, K: gl.constexpr, VALUES: gl.constexpr,
    BACKWARDS: gl.constexpr = False, LOW_ROW: gl.constexpr = 0,
):  # fmt: skip
    """What of a chunk does not depend on the state: P = scale tril(Q K^T e^(G_i - G_j)), X, and beta and the decays as vectors.

    Backwards the last chunk comes first, `onward` is without beta, and X_low lies as 64 columns of rows of LOW_ROW (chunk_rest.py).
    """
    q_s, k_s, v_s = tiles
    P_s, X_s, X_low_s = shared
    _, G_s, _, _, _ = vectors
    loaded, freed, ready, taken = barriers
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, mma))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, mma))
    if BACKWARDS:
        token = gl.maximum(chunks - 1, 0) * CHUNK
    else:
        gdc_wait()
        token = chunks * 0
    x, b, decay, last = ask(X, strength, G, token, length, GATED)

    for t in range(chunks):
        i = t % STAGES
        j = t % 2
        rows = length - token
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        if rows < CHUNK:
            clear(k_s.index(i), rows, K)
            if OUTPUT:
                clear(q_s.index(i), rows, K)
            clear(v_s.index(i), rows, VALUES)
        if OUTPUT:
            P = warpgroup_mma(
                q_s.index(i), k_s.index(i).permute((1, 0)), gl.zeros([CHUNK, CHUNK], gl.float32, mma), use_acc=False, is_async=True
            )
        mbarrier.wait(taken.index(j), ((t // 2) & 1) ^ 1)
        X_s.index(j).store(x)
        if any_of_warp(gl.max(b, 0) > 1.0):
            if BACKWARDS:
                xr = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
                xc = gl.arange(0, CHUNK, gl.SliceLayout(0, WIDE))
                low = gl.load(X_low + (token + xr).to(gl.int64)[:, None] * LOW_ROW + xc[None, :], mask=(xr < rows)[:, None], other=0.0)
            else:
                at, inside = in_X(token, rows)
                low = gl.load(X_low + at, mask=inside, other=0.0)
            X_low_s.index(j).store(low)
        put_vectors(vectors, j, b, decay, last, rows, GATED, not BACKWARDS)
        if OUTPUT:
            P = warpgroup_mma_wait(0, deps=[P])
            if GATED:
                G_row = G_s.load(gl.SliceLayout(1, mma))
                G_col = G_s.load(gl.SliceLayout(0, mma))
                # the exponent is masked, not the power: above the diagonal it would overflow
                P = P * scale * power_of_2(gl.where(r[:, None] >= c[None, :], G_row[:, None] - G_col[None, :], float("-inf")))
                P_s.index(j).store(P.to(P_s.dtype))
            else:
                P_s.index(j).store(masked(r[:, None] >= c[None, :], P * scale, P_s.dtype))
        fence_async_shared()
        mbarrier.arrive(ready.index(j), count=1)
        mbarrier.arrive(freed.index(i), count=1)

        if BACKWARDS:
            token = gl.maximum(token - CHUNK, 0)
        else:
            token += CHUNK
        x, b, decay, last = ask(X, strength, G, token, length, GATED)


@gluon.jit
def state(
    half: gl.constexpr, tiles, shared, vectors, barriers, staging, descs, pointers,
    initial, identity, final, ends, row0, value_col, first_slot, no_slot, length, chunks, scale, whole,
    STAGES: gl.constexpr, GATED: gl.constexpr, INITIAL: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr,
    SAVE_E: gl.constexpr, SAVE_S: gl.constexpr, FINAL: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HV: gl.constexpr,
):  # fmt: skip
    """follow, with or without outputs: as the launch has it, or as this program does."""
    if FIRST:
        if any_of_warp(whole):
            follow(half, tiles, shared, vectors, barriers, staging, descs, pointers, initial, identity, final, ends, row0, value_col,
                   first_slot, no_slot, length, chunks, scale, STAGES, GATED, INITIAL, True, SAVE_E, SAVE_S, FINAL, K, V, HV)  # fmt: skip
        else:
            follow(half, tiles, shared, vectors, barriers, staging, descs, pointers, initial, identity, final, ends, row0, value_col,
                   first_slot, no_slot, length, chunks, scale, STAGES, GATED, False, False, False, False, FINAL, K, V, HV)  # fmt: skip
    else:
        follow(half, tiles, shared, vectors, barriers, staging, descs, pointers, initial, identity, final, ends, row0, value_col,
               first_slot, no_slot, length, chunks, scale, STAGES, GATED, INITIAL, OUTPUT, SAVE_E, SAVE_S, FINAL, K, V, HV)  # fmt: skip


@gluon.jit
def follow(
    half: gl.constexpr, tiles, shared, vectors, barriers, staging, descs, pointers,
    initial, identity, final, ends, row0, value_col, first_slot, no_slot, length, chunks, scale,
    STAGES: gl.constexpr, GATED: gl.constexpr, INITIAL: gl.constexpr, OUTPUT: gl.constexpr,
    SAVE_E: gl.constexpr, SAVE_S: gl.constexpr, FINAL: gl.constexpr, K: gl.constexpr, V: gl.constexpr, HV: gl.constexpr,
):  # fmt: skip
    """64 columns of V: S^T `[64, K]` in registers, everything else passes through."""
    q_s, k_s, v_s = tiles
    P_s, X_s, X_low_s = shared
    b_s, _, into_s, onward_s, last_s = vectors
    loaded, freed, ready, taken = barriers
    o_s, E_s, S_s = staging
    o_desc, E_desc, S_desc = descs
    o, E = pointers
    by_token: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    first_token: gl.constexpr = gl.DotOperandLayout(0, by_token, 2)
    first_key: gl.constexpr = gl.DotOperandLayout(0, by_key, 2)
    columns: gl.constexpr = gl.SliceLayout(0, by_token)
    dtype: gl.constexpr = k_s.dtype

    e_row = gl.arange(0, ROWS, gl.SliceLayout(1, by_key))
    d_col = gl.arange(0, K, gl.SliceLayout(0, by_key))
    at_state = d_col[None, :] * V + e_row[:, None]  # S^T as it lies in [K, V]
    if INITIAL:
        gdc_wait()
        St = gl.load(initial + at_state)
    elif OUTPUT:
        St = gl.zeros([ROWS, K], gl.float32, by_key)
    else:
        St = gl.where((d_col[None, :] == identity + e_row[:, None]), 1.0, gl.zeros([ROWS, K], gl.float32, by_key))
    zero = gl.zeros([ROWS, CHUNK], gl.float32, by_token)
    o_last = zero.to(dtype)

    for t in range(chunks):
        i = t % STAGES
        j = t % 2
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        mbarrier.wait(ready.index(j), (t // 2) & 1)
        Sb = St.to(dtype)
        Sa = gl.convert_layout(Sb, first_token)
        W = warpgroup_mma(Sa, k_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        if OUTPUT:
            O = warpgroup_mma(Sa, q_s.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
        # while the tensor cores work: what the chunk before left to be written, the state, and this chunk's values
        if OUTPUT:
            tma.store_wait(0)
            if t > 0:
                o_s.index(half).permute((1, 0)).store(o_last)
                fence_async_shared()
                tma.async_copy_shared_to_global(o_desc, [row0 + (t - 1) * CHUNK, value_col], o_s.index(half))
        if SAVE_S:
            if first_slot + t > no_slot:
                S_s.index(half).store(Sb)
                fence_async_shared()
                tma.async_copy_shared_to_global(S_desc, [(first_slot + t) * (HV * V) + value_col, 0], S_s.index(half))
        # both at once: until O is there the fragments of S stay in registers, and there is no room for what follows beside them
        if OUTPUT:
            W, O = warpgroup_mma_wait(0, deps=[W, O])
        else:
            W = warpgroup_mma_wait(0, deps=[W])
        values = v_s.index(i).slice(half * ROWS, ROWS, 1).permute((1, 0)).load(by_token)
        b = b_s.index(j).load(columns)
        values = values.to(gl.float32)
        if not OUTPUT:
            values = gl.where(identity >= 0, 0.0, values)
        if GATED:
            into = into_s.index(j).load(columns)
            W = values - W * into[None, :]
        else:
            W = values - W
        bW = gl.convert_layout((W * -b[None, :]).to(dtype), first_token)
        Et = warpgroup_mma(bW, X_s.index(j).permute((1, 0)), W, is_async=True)
        above_one = any_of_warp(gl.max(b, 0) > 1.0)
        Et = warpgroup_mma_wait(0, deps=[Et])
        if above_one:  # where errors may grow, what rounding left of X counts
            Et = warpgroup_mma(bW, X_low_s.index(j).permute((1, 0)), Et, is_async=True)
            Et = warpgroup_mma_wait(0, deps=[Et])
        new = (Et * b[None, :]).to(dtype)
        if GATED:
            onward = onward_s.index(j).load(columns)
            last = last_s.index(j).load(gl.SliceLayout(1, by_key))
            St = St * last[:, None]
            new_k = gl.convert_layout((Et * onward[None, :]).to(dtype), first_key)
        else:
            new_k = gl.convert_layout(new, first_key)
        St = warpgroup_mma(new_k, k_s.index(i), St, is_async=True)
        if OUTPUT:
            if GATED:
                O = O * (into * scale)[None, :]
            else:
                O = O * scale
            O = warpgroup_mma(gl.convert_layout(new, first_token), P_s.index(j).permute((1, 0)), O, is_async=True)
        if SAVE_E:
            E_s.index(half).permute((1, 0)).store(Et.to(dtype))
            fence_async_shared()
            store_tile(E_desc, E_s.index(half), E, row0 + t * CHUNK, value_col, length - t * CHUNK, HV * V)
        if OUTPUT:
            O, St = warpgroup_mma_wait(0, deps=[O, St])
            o_last = O.to(dtype)
        else:
            St = warpgroup_mma_wait(0, deps=[St])
        mbarrier.arrive(freed.index(i), count=1)
        mbarrier.arrive(taken.index(j), count=1)

    if OUTPUT:
        if chunks > 0:
            tma.store_wait(0)
            o_s.index(half).permute((1, 0)).store(o_last)
            fence_async_shared()
            end = (chunks - 1) * CHUNK
            store_tile(o_desc, o_s.index(half), o, row0 + end, value_col, length - end, HV * V)
    if FINAL:
        if ends:
            e_row += chunks >> 30  # 0, but the compiler cannot know that: else 64 addresses wait for this in local memory
            gl.store(final + d_col[None, :] * V + e_row[:, None], St)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "steps", "tokens", "segment", "starts_used", "ends_used", "first_part", "scale"])
def forward(
    q,  # descriptor of [tokens, H * K], blocks [64, K]
    k,  # the same
    v,  # descriptor of [tokens, HV * V], blocks [64, COLUMNS]
    o_desc,  # descriptor of o, blocks [64, 64]
    E_desc,  # descriptor of E, blocks [64, 64]
    S_desc,  # descriptor of S, [slots * HV * V, K], blocks [64, K]
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
    first_part,  # 1 where the launch before has run each sequence's first segment, OUTPUT only
    scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    COLUMNS: gl.constexpr,  # columns of V of one program: 64 or 128
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    INITIAL: gl.constexpr,
    OUTPUT: gl.constexpr,  # else only what segments do to states: final from zero, and transition, whose columns follow those of V
    FIRST: gl.constexpr,  # but outputs of a sequence's first segment, which starts from zero
    SAVE_E: gl.constexpr,
    SAVE_S: gl.constexpr,  # S out: the state at the start of each chunk but a sequence's first
    FINAL: gl.constexpr,  # 1: of every segment, 2: of every sequence, by its last segment
    STATE_REGISTERS: gl.constexpr,
    AUXILIARY_REGISTERS: gl.constexpr,
):
    TILES: gl.constexpr = V // COLUMNS if OUTPUT else (V + K) // COLUMNS
    # heads lie side by side in memory: what runs together reads whole rows of it
    tile = gl.program_id(0) % TILES
    head = (gl.program_id(0) // TILES) % HV
    place = gl.program_id(0) // (TILES * HV)
    identity = place * 0 - K
    whole = place * 0 + 1
    if not OUTPUT:
        if tile >= V // COLUMNS:
            tile -= V // COLUMNS
            identity = tile * COLUMNS
            final = transition
    sequence, part, before, begin, end, chunks = find_chunks(place, cu_seqlens, N, steps, T, segment, SPLIT, PACKED)
    if not OUTPUT:
        chunks = needed(chunks, part, begin, end, before, identity, starts_used, ends_used)
        if FIRST:
            whole = ((part == 0) & (identity < 0)).to(gl.int32)
        else:
            whole = place * 0
    elif SPLIT:
        chunks = gl.where(part < first_part, 0, chunks)
    no_slot = (begin // CHUNK).to(gl.int32) - 1
    first_slot = no_slot + before
    begin += before * CHUNK
    if GATED and not OUTPUT:
        gdc_wait()
        begin, chunks, identity = without_forgotten(G + head.to(gl.int64) * tokens, begin, end, chunks, identity)
    length = (end - begin).to(gl.int32)
    along = head.to(gl.int64) * tokens + begin
    row0 = begin.to(gl.int32)
    key_col = (head // (HV // H)) * K
    value_col = head * V + tile * COLUMNS
    given = (place.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS
    if FINAL == 2:
        final += (sequence.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS
        ends = (length <= chunks * CHUNK) & ((chunks > 0) | (before == 0))
    else:
        final += given
        ends = chunks == chunks
    initial += given

    dtype: gl.constexpr = k.dtype
    k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    q_s = k_s
    if OUTPUT or FIRST:
        q_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, COLUMNS], SWIZZLED)
    P_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    X_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    X_low_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    o_s = gl.allocate_shared_memory(dtype, [COLUMNS // ROWS, CHUNK, ROWS], SWIZZLED)
    E_s = o_s
    if SAVE_E:
        E_s = gl.allocate_shared_memory(dtype, [COLUMNS // ROWS, CHUNK, ROWS], SWIZZLED)
    S_s = o_s
    if SAVE_S:
        S_s = gl.allocate_shared_memory(dtype, [COLUMNS // ROWS, ROWS, K], SWIZZLED)
    vectors = allocate_vectors(2, GATED)
    loaded = allocate_barriers(STAGES, 1)
    freed = allocate_barriers(STAGES, COLUMNS // ROWS + 1)
    ready = allocate_barriers(2, 1)
    taken = allocate_barriers(2, COLUMNS // ROWS)

    tiles = (q_s, k_s, v_s)
    shared = (P_s, X_s, X_low_s)
    barriers = (loaded, freed, ready, taken)
    staging = (o_s, E_s, S_s)
    descs = (o_desc, E_desc, S_desc)
    # the arguments of a partition must be literal here: a constexpr put in a variable is one no longer
    if COLUMNS == 128:
        gl.warp_specialize(
            [
                (state, (0, tiles, shared, vectors, barriers, staging, descs, (o, E), initial, identity, final, ends, row0, value_col,
                         first_slot, no_slot, length, chunks, scale, whole, STAGES, GATED, INITIAL, OUTPUT, FIRST,
                         SAVE_E, SAVE_S, FINAL, K, V, HV)),
                (state, (1, tiles, shared, vectors, barriers, staging, descs, (o, E), initial + ROWS, identity + ROWS, final + ROWS, ends, row0,
                         value_col + ROWS, first_slot, no_slot, length, chunks, scale, whole, STAGES, GATED, INITIAL, OUTPUT,
                         FIRST, SAVE_E, SAVE_S, FINAL, K, V, HV)),
                (auxiliary, (tiles, shared, vectors, barriers, strength + along, G + along, X + along * 48, X_low + along * 48,
                             length, chunks, scale, whole, STAGES, GATED, OUTPUT, FIRST, K, COLUMNS)),
                (loader, (q, k, v, tiles, (loaded, freed), row0, key_col, value_col, chunks, STAGES, whole)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, AUXILIARY_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (state, (0, tiles, shared, vectors, barriers, staging, descs, (o, E), initial, identity, final, ends, row0, value_col,
                         first_slot, no_slot, length, chunks, scale, whole, STAGES, GATED, INITIAL, OUTPUT, FIRST,
                         SAVE_E, SAVE_S, FINAL, K, V, HV)),
                (auxiliary, (tiles, shared, vectors, barriers, strength + along, G + along, X + along * 48, X_low + along * 48,
                             length, chunks, scale, whole, STAGES, GATED, OUTPUT, FIRST, K, COLUMNS)),
                (loader, (q, k, v, tiles, (loaded, freed), row0, key_col, value_col, chunks, STAGES, whole)),
            ],
            [4, 1],
            [AUXILIARY_REGISTERS, 24],
        )  # fmt: skip
