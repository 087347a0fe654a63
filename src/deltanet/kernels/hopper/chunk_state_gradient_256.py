"""The state gradient of heads of 256 on Hopper, and with it the gradients of v and beta: the algebra of triton/chunk_state_gradient.py.

    P  = tril(Q K^T e^(G_i - G_j))              G' = e^(G_last - G) (K D) + P^T dO
    H  = G' - X^T (beta G')                     dV = beta H            dbeta_i = E_i . H_i
    D <- e^(G_last) D + Q^T (e^G dO) - K^T (e^G dV)

D is carried divided by scale, so that dO and Q enter the products as they lie in memory; D of every chunk's end goes to memory so, for
chunk_gradients_256.py, which makes dq, dk and dg out of it. All of a head's gradients in one launch, as heads of 64 and 128 have
them (chunk_backward_kernel.py), would need 500 KiB of shared memory here.

One program owns 128 columns of V of a value head of a sequence, from its last chunk to its first. Two state warpgroups have 64 rows of D^T
each in registers; an auxiliary one makes P and adds up what makes dbeta; a warp loads, another one what rounding left of X.
docs/kernels.md has the order of events and the map of memory.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from deltanet.kernels.hopper.chunk_backward_gradients import decay_between
from deltanet.kernels.hopper.chunk_backward_load import (
    ALSO_0,
    ALWAYS_0,
    FREED_ERRORS,
    FREED_KEYS,
    FREED_OUTS,
    FREED_QUERIES,
    LOADED_ERRORS,
    LOADED_KEYS,
    LOADED_OUTS,
    LOADED_QUERIES,
    LOADED_REST,
    READY_P,
    READY_W,
    TAKEN_W,
    USED_P,
    find_rows,
    load_keys,
    load_rest,
    load_X,
    widened,
)
from deltanet.kernels.hopper.chunk_backward_state import by_beta
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.hopper.tiles import CHUNK, any_of_warp, clear, masked
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton import chunk_call
from deltanet.kernels.triton.compiled import launch

__all__ = ["COLUMNS", "state_gradient"]

CONFIG = LaunchConfig(warps=4)
STATE_REGISTERS = 208  # of a thread of the state warpgroups; the auxiliary one then has 72. At 200 their products are serialised (C7512)
COLUMNS = gl.constexpr(128)  # of V, of one program
ROWS = gl.constexpr(64)  # of D^T, of one state warpgroup
FREED_REST = USED_P  # what rounding left of X has a place of its own here, free from the beginning


@gluon.jit
def load(sources, tiles, bars, key_head, column, span, K: gl.constexpr, GATED: gl.constexpr, OUTPUT: gl.constexpr):
    """One warp. Tiles arrive by TMA; X and beta, whose places in memory no tile fits, by copies of 16 and 4 bytes."""
    q, k, do, E, X, strength, G = sources
    sQ, sK, sdO, sE, sX, sB, sG, _, _, _, _ = tiles
    chunks, rows, first = span
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    r = gl.arange(0, 32, gl.SliceLayout(1, wide))
    c = gl.arange(0, 64, gl.SliceLayout(0, wide))
    t = gl.arange(0, CHUNK, line)
    size: gl.constexpr = q.dtype.primitive_bitwidth // 8
    for back in range(chunks):
        i = chunks - 1 - back
        at = first + i * CHUNK
        load_keys(k, strength, G, sK, sB, sG, bars, back, at, key_head * K, i * CHUNK, t, rows, K, GATED)

        mbarrier.wait(bars.index(FREED_QUERIES), (back & 1) ^ 1)
        mbarrier.expect(bars.index(LOADED_QUERIES), size * CHUNK * K)
        tma.async_copy_global_to_shared(q, [at, key_head * K], bars.index(LOADED_QUERIES), sQ.index(0))

        mbarrier.wait(bars.index(FREED_OUTS), (back & 1) ^ 1)
        mbarrier.expect(bars.index(LOADED_OUTS), size * CHUNK * COLUMNS)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(do, [at, column + half * ROWS], bars.index(LOADED_OUTS), sdO.index(half))
        load_X(X + i * (48 * CHUNK), sX.index(0), bars, r, c, rows - i * CHUNK)

        if OUTPUT:
            mbarrier.wait(bars.index(FREED_ERRORS), (back & 1) ^ 1)
            mbarrier.expect(bars.index(LOADED_ERRORS), size * CHUNK * COLUMNS)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(E, [at, column + half * ROWS], bars.index(LOADED_ERRORS), sE.index(half))


@gluon.jit
def auxiliary(tiles, bars, partial, span, K: gl.constexpr, GATED: gl.constexpr, RAGGED: gl.constexpr, OUTPUT: gl.constexpr):
    """One warpgroup: P of each chunk; and the sums of both state warpgroups over V, which make dbeta."""
    sQ, sK, sdO, _, _, _, sG, all_P, _, sR, _ = tiles
    chunks, rows, _ = span
    dtype: gl.constexpr = sK.dtype
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, acc))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, acc))
    none = gl.zeros([CHUNK, CHUNK], gl.float32, acc)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows_layout: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 4], [0, 1])
    t = gl.arange(0, CHUNK, gl.SliceLayout(0, rows_layout))
    if RAGGED:  # of the last chunk what is the next sequence's; no chunk: none
        left = rows - (chunks - 1) * CHUNK
        if left < CHUNK:
            mbarrier.wait(bars.index(LOADED_KEYS), 0)
            mbarrier.wait(bars.index(LOADED_QUERIES), 0)
            mbarrier.wait(bars.index(LOADED_OUTS), 0)
            clear(sK.index(0), left, K)
            clear(sQ.index(0), left, K)
            for half in gl.static_range(2):
                clear(sdO.index(half), left, ROWS)
    for back in range(chunks):
        i = chunks - 1 - back
        stage = back & 1
        sP = all_P.index(back >> ALWAYS_0)
        mbarrier.wait(bars.index(LOADED_KEYS + stage), (back >> 1) & 1)
        mbarrier.wait(bars.index(LOADED_QUERIES), back & 1)
        P = warpgroup_mma(sQ.index(back >> ALWAYS_0), sK.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        P = warpgroup_mma_wait(0, deps=[P])
        if GATED:
            sP.store((P * decay_between(sG.index(stage), r[:, None] >= c[None, :], acc)).to(dtype))
            into = gl.exp2(sG.index(stage).load(gl.SliceLayout(1, wide)))
            for column in gl.static_range(0, K, 64):  # P is made: from here on Q is e^G Q
                part = sQ.index(back >> ALSO_0).slice(column, 64, 1)
                part.store((widened(part.load(wide)) * into[:, None]).to(dtype))
        else:
            sP.store(masked(r[:, None] >= c[None, :], P, dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_P), count=1)
        mbarrier.arrive(bars.index(FREED_QUERIES), count=1)
        mbarrier.arrive(bars.index(FREED_KEYS + stage), count=1)
        # the state warpgroups need P no more when their gradients of the new values are there
        mbarrier.wait(bars.index(READY_W), back & 1)
        if OUTPUT:
            sums = gl.sum(sR.load(rows_layout), 0)
            mbarrier.arrive(bars.index(TAKEN_W), count=1)
            gl.store(partial + i * CHUNK + t, sums, mask=t < rows - i * CHUNK)


@gluon.jit
def state(
    half: gl.constexpr, tiles, bars, outputs, places, states, span, scale, inverse_scale,
    K: gl.constexpr, V: gl.constexpr, HV: gl.constexpr, GATED: gl.constexpr, RAGGED: gl.constexpr, FINAL: gl.constexpr,
    INITIAL: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of D^T, the gradients of the new values, and what they do to D."""
    all_Q, sK, sdO, sE, all_X, sB, sG, all_P, sD, sR, sX_low = tiles
    D_out, dv, dv_at = outputs
    column, slot, stored, past = places
    dfinal, dinitial, part = states
    chunks, rows, first = span
    dtype: gl.constexpr = sK.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    left_c: gl.constexpr = gl.DotOperandLayout(0, acc_c, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, acc_k, 2)
    tokens: gl.constexpr = gl.SliceLayout(0, acc_c)
    e = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc_k))
    d = gl.arange(0, K, gl.SliceLayout(0, acc_k))
    if FINAL:
        D = gl.load(dfinal + d[None, :] * V + e[:, None]) * inverse_scale
    else:
        D = gl.zeros([ROWS, K], gl.float32, acc_k)
    none = gl.zeros([ROWS, CHUNK], gl.float32, acc_c)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
    c = gl.arange(0, ROWS, gl.SliceLayout(0, wide))
    rests = 0  # chunks so far with a beta above 1
    mbarrier.arrive(bars.index(FREED_REST), count=1)
    if RAGGED:  # rows of the next sequence are cleared by then
        mbarrier.wait(bars.index(READY_P), 0, pred=chunks > 0)
    for back in range(chunks):
        i = chunks - 1 - back
        phase = back & 1
        stage = back & 1
        here = back >> ALWAYS_0
        keys, queries, sP, sX = sK.index(stage), all_Q.index(here), all_P.index(here), all_X.index(here)
        outs = sdO.index(half + here).permute((1, 0))
        my_D = sD.index(half + here)
        my_E = sE.index(half + here)
        my_D.store(D.to(dtype))
        fence_async_shared()
        if OUTPUT:
            if i < stored:  # what D is at the sequence's end is given, or zero
                tma.async_copy_shared_to_global(D_out, [slot + i * (HV * V) + half * ROWS, 0], my_D)
        mbarrier.wait(bars.index(LOADED_KEYS + stage), (back >> 1) & 1)
        G = warpgroup_mma(my_D, keys.permute((1, 0)), none, use_acc=False, is_async=True)
        if GATED:
            decay = sG.index(stage)
            last = gl.sum(decay.slice(63, 1, 0).load(tokens), 0)
            G = warpgroup_mma_wait(0, deps=[G])
            G = G * gl.exp2(last - decay.load(tokens))[None, :]
        mbarrier.wait(bars.index(LOADED_OUTS), phase)
        mbarrier.wait(bars.index(LOADED_QUERIES), phase)
        mbarrier.wait(bars.index(READY_P), phase)
        fence_async_shared()  # X was written by ordinary copies
        G = warpgroup_mma(outs, sP, G, is_async=True)
        if GATED:
            D = D * gl.exp2(last)
        D = warpgroup_mma(outs, queries, D, is_async=True)
        b = sB.index(stage).load(tokens)
        G = warpgroup_mma_wait(1, deps=[G])
        careful = any_of_warp(gl.max(b, 0) > 1.0)
        bG = gl.convert_layout((G * -b[None, :]).to(dtype), left_c)
        H = warpgroup_mma(bG, sX, G, is_async=True)
        if OUTPUT:
            mbarrier.wait(bars.index(LOADED_ERRORS), phase)
        H, D = warpgroup_mma_wait(0, deps=[H, D])
        if careful:
            mbarrier.wait(bars.index(LOADED_REST), rests & 1)
            fence_async_shared()
            H = warpgroup_mma(bG, sX_low.index(here), H, is_async=True)
            H = warpgroup_mma_wait(0, deps=[H])
            mbarrier.arrive(bars.index(FREED_REST), count=1)
            rests += 1
        mbarrier.arrive(bars.index(FREED_OUTS), count=1)
        mbarrier.arrive(bars.index(FREED_QUERIES), count=1)
        if OUTPUT:
            sums = by_beta(my_E.permute((1, 0)), H, scale)
            mbarrier.wait(bars.index(TAKEN_W), phase ^ 1)
            sR.slice(half * 4, 4, 0).store(sums)
        dW = H * sB.index(stage).load(tokens)[None, :]
        if GATED:
            new = gl.convert_layout((dW * -gl.exp2(decay.load(tokens))[None, :]).to(dtype), left_k)
        else:
            new = gl.convert_layout((-dW).to(dtype), left_k)
        D = warpgroup_mma(new, keys, D, is_async=True)
        if OUTPUT:
            my_E.permute((1, 0)).store((dW * scale).to(dtype))  # E is used: dV leaves from its place
            fence_async_shared()
        mbarrier.arrive(bars.index(READY_W), count=1)
        if OUTPUT:
            # of a chunk that is not full, its own rows; without a branch, which would cost registers: what is not wanted is masked, or written
            # past the end of dv, which is nowhere
            at = first + i * CHUNK
            left = rows - i * CHUNK
            if RAGGED:
                mine = (r < left) & (left < CHUNK)
                to = dv_at + (at.to(gl.int64) * (HV * V) + column + half * ROWS) + (r * (HV * V))[:, None] + c[None, :]
                gl.store(to, my_E.load(wide), mask=mine[:, None])
                at = gl.where(left < CHUNK, past, at)
            tma.async_copy_shared_to_global(dv, [at, column + half * ROWS], my_E)
        D = warpgroup_mma_wait(0, deps=[D])
        if OUTPUT:
            tma.store_wait(0)
            mbarrier.arrive(bars.index(FREED_ERRORS), count=1)
        mbarrier.arrive(bars.index(FREED_KEYS + stage), count=1)
    if INITIAL:
        if (part == 0) | (not OUTPUT):
            e += chunks >> ALWAYS_0
            gl.store(dinitial + d[None, :] * V + e[:, None], D * scale)


@gluon.jit(do_not_specialize=["N", "steps", "T", "tokens", "segment", "scale", "inverse_scale"])
def state_gradient_kernel(
    q,  # tiles [64, K] of [tokens, H * K]
    k,  # the same
    do,  # tiles [64, 64] of [tokens, HV * V]
    E,  # the same
    D,  # tiles [64, K] of [slots * HV * V, K] out: D / scale between chunks c and c + 1, in the slot of c + 1
    dv,  # tiles [64, 64] of [tokens, HV * V] out
    dv_at,  # the same memory as pointers, for the rows of a chunk that is not full
    X_low,  # [tokens, HV, V]: what rounding left of X, of chunks with a beta above 1, 64 columns at the start of each 128
    X,  # [HV, tokens * 48]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, GATED only
    partial,  # [V / 128, HV, tokens] fp32 out: sums over 128 columns that make dbeta
    dfinal,  # [N, HV, K, V] fp32, of every segment if SPLIT, FINAL only
    dinitial,  # [N, HV, K, V] fp32 out, INITIAL only; of every segment unless OUTPUT
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    segment,  # tokens of a segment, a multiple of 64
    scale,
    inverse_scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    SPLIT: gl.constexpr,  # sequences are cut into segments
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    RAGGED: gl.constexpr,  # whether a sequence may end inside a chunk
    INITIAL: gl.constexpr,
    FINAL: gl.constexpr,
    OUTPUT: gl.constexpr,  # else only what becomes of D
    STATE_REGISTERS: gl.constexpr,
):
    TILES: gl.constexpr = V // COLUMNS
    tile = gl.program_id(0) % TILES  # those of a head side by side: its q and k come from L2
    head = (gl.program_id(0) // TILES) % HV
    place = gl.program_id(0) // (TILES * HV)
    key_head = head // (HV // H)
    sequence, part, first, rows, left = find_rows(place, cu_seqlens, N, steps, T, segment, SPLIT, PACKED)
    chunks = gl.cdiv(rows, CHUNK)
    stored = gl.cdiv(left, CHUNK) - 1  # chunks before the sequence's last
    along = head.to(gl.int64) * tokens + first
    strength += along
    G += along
    X += along * 48
    partial += (tile * HV + head).to(gl.int64) * tokens + first
    column = head * V + tile * COLUMNS
    end_at = (place.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS
    state_at = end_at
    if OUTPUT:
        state_at = (sequence.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS

    dtype: gl.constexpr = q.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sQ = gl.allocate_shared_memory(dtype, [1, CHUNK, K], swizzled)
    sK = gl.allocate_shared_memory(dtype, [2, CHUNK, K], swizzled)
    sdO = gl.allocate_shared_memory(dtype, [2, CHUNK, ROWS], swizzled)  # by state warpgroup, as E and D
    sE = gl.allocate_shared_memory(dtype, [2, CHUNK, ROWS], swizzled)
    sD = gl.allocate_shared_memory(dtype, [2, ROWS, K], swizzled)
    sX = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], swizzled)
    sP = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], swizzled)
    sX_low = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], swizzled)
    sB = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain)
    sG = sB
    if GATED:
        sG = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain)
    sR = gl.allocate_shared_memory(gl.float32, [8, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    bars = gl.allocate_shared_memory(gl.int64, [32, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(LOADED_KEYS + i), count=33)  # the tiles, and each lane's copies
        mbarrier.init(bars.index(FREED_KEYS + i), count=3)
    mbarrier.init(bars.index(LOADED_QUERIES), count=1)
    mbarrier.init(bars.index(FREED_QUERIES), count=3)
    mbarrier.init(bars.index(LOADED_OUTS), count=33)
    mbarrier.init(bars.index(FREED_OUTS), count=2)
    mbarrier.init(bars.index(LOADED_ERRORS), count=1)
    mbarrier.init(bars.index(FREED_ERRORS), count=2)
    mbarrier.init(bars.index(READY_P), count=1)
    mbarrier.init(bars.index(READY_W), count=2)
    mbarrier.init(bars.index(TAKEN_W), count=1)
    mbarrier.init(bars.index(FREED_REST), count=2)
    mbarrier.init(bars.index(LOADED_REST), count=32)

    tiles = (sQ, sK, sdO, sE, sX, sB, sG, sP, sD, sR, sX_low)
    span = (chunks, rows, first)
    sources = (q, k, do, E, X, strength, G)
    outputs = (D, dv, dv_at)
    places = (column, ((first // CHUNK) * HV + head) * V + tile * COLUMNS, stored, tokens)
    states = (dfinal + end_at, dinitial + state_at, part)
    gl.warp_specialize([
        (auxiliary, (tiles, bars, partial, span, K, GATED, RAGGED, OUTPUT)),
        (state, (0, tiles, bars, outputs, places, states, span, scale, inverse_scale, K, V, HV, GATED, RAGGED, FINAL, INITIAL, OUTPUT)),
        (state, (1, tiles, bars, outputs, places, states, span, scale, inverse_scale, K, V, HV, GATED, RAGGED, FINAL, INITIAL, OUTPUT)),
        (load, (sources, tiles, bars, key_head, column, span, K, GATED, OUTPUT)),
        (load_rest, (X_low + tile * COLUMNS, strength, head, sX_low, bars, span, HV, V)),
    ], [4, 4, 1, 1], [STATE_REGISTERS, STATE_REGISTERS, 24, 24])  # fmt: skip


def state_gradient(
    call: chunk_call.Call, q: Tensor, k: Tensor, do: Tensor, E: Tensor, b: Tensor, G: Tensor | None, X: Tensor, X_low: Tensor,
    dfinal: Tensor | None, dv: Tensor | None, partial: Tensor | None, D: Tensor | None, dinitial: Tensor | None, scale: float, *, split: bool,
) -> None:  # fmt: skip
    """Write dv, the sums over 128 columns of V that make dbeta, D of every chunk's end but a sequence's, and dinitial.

    dfinal is of every segment if `split`; without dv only dinitial is written, and it is of every segment, too. X_low lies where dv will, once
    for each 128 columns. Tensors are contiguous and aligned, scale is not 0.
    """
    K, V, HV = call.K, call.V, call.HV
    keys = [tensor_map(x, call.H * K, CHUNK.value, K) for x in (q, k)]
    values = [tensor_map(x, HV * V, CHUNK.value, 64) for x in (do, E)]
    states = keys[0] if D is None or D.shape[0] == 0 else tensor_map(D, K, CHUNK.value, K)
    ragged = call.packed or call.T % CHUNK.value != 0
    places = call.parts(call.segment) if split else call.N
    args = (
        *keys, *values, states, values[0] if dv is None else tensor_map(dv, HV * V, CHUNK.value, 64), *chunk_call.or_stand_in(do, dv), X_low, X, b,
        *chunk_call.or_stand_in(b, G, partial, dfinal, dinitial, call.place[0]), *call.place[1:], call.segment if split else 0, scale, 1.0 / scale,
    )  # fmt: skip
    key = ("hopper state gradient", call.key, ragged, dfinal is None, dinitial is None, split, dv is None)
    launch(state_gradient_kernel, key, (places * HV * (V // COLUMNS.value), 1, 1), args, CONFIG, lambda: dict(
        GATED=G is not None, RAGGED=ragged, INITIAL=dinitial is not None, FINAL=dfinal is not None, SPLIT=split, OUTPUT=dv is not None,
        STATE_REGISTERS=STATE_REGISTERS, **call.sizes,
    ))  # fmt: skip
