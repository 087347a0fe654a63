"""The gradients of q, k and g of heads of 256 on Hopper, from the states and state gradients at a chunk's ends: triton/chunk_gradients.py.

    dP = scale tril(dO V'^T e^(G_i - G_j))          dL = -strict_tril(dV V'^T e^(G_i - G_j))          V' = beta E
    dQ = scale e^G (dO S^T) + dP K
    dK = dP^T Q + dL^T K + (e^(G_last - G) V') D^T + dL K - e^G (dV S^T)         three terms as a place of writing, two as one of reading

    dg_t = sum of (q . dQ - k . dK as a place of writing + k . dK as one of reading)_i over i >= t
           + sum of k_i . (e^(G_last - G) V' D^T)_i over all i + e^G_last <S, D>

What bounds it is memory: S and D of a chunk are 256 KiB, eight times its q. So programs stay, as many as there are multiprocessors; each
takes every so many-th piece of work, 128 columns of K of a chunk of a value head, and one warp always has the tiles of the next pieces under way.

    load (1 warp)       per piece four slots of 64 rows of V (do, E, dv, S, D), one of q and k         freed -> loaded
    queries (4 warps)   dP, for the keys too; dQ                                                        loaded -> freed, ready
    keys (4 warps)      dL; dK                                                                          loaded, ready -> freed, taken
    gate (1 warp)       gated only: dg out of the rows' sums that both leave                            summed -> noted
"""

import torch
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

from deltanet.kernels.hopper.chunk_backward_gradients import add, put
from deltanet.kernels.hopper.chunk_backward_load import widened
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.hopper.tiles import CHUNK, clear, find_part, masked
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton import chunk_call
from deltanet.kernels.triton.compiled import launch

__all__ = ["gradients"]

CONFIG = LaunchConfig(warps=4)
KEYS_REGISTERS = 232  # of a thread of the keys' warpgroup; the queries' one then has 248
KEYS_REGISTERS_GATED = 240  # and 240
COLUMNS = gl.constexpr(128)  # of K, of a piece of work
ROWS = gl.constexpr(64)  # of V, of a slot
SLOTS = gl.constexpr(3)
# Barriers, by their place in one array
LOADED = gl.constexpr(0)
FREED = gl.constexpr(SLOTS.value)
READY = gl.constexpr(2 * SLOTS.value)  # dP, and q and k without rows of the next sequence: queries -> keys
TAKEN = gl.constexpr(2 * SLOTS.value + 1)
SUMMED = gl.constexpr(2 * SLOTS.value + 2)  # terms of dg: queries, keys -> gate
NOTED = gl.constexpr(2 * SLOTS.value + 3)


@gluon.jit
def find(item, place, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, PACKED: gl.constexpr):
    """Of a piece of work: its first token, how many there are, columns, head, chunk of the sequence, whether it is the last one, sequence."""
    cu_seqlens, N, steps, T = place
    tiles: gl.constexpr = K // COLUMNS
    column = (item % tiles) * COLUMNS
    head = (item // tiles) % HV
    sequence, chunk, begin, end = find_part(item // (tiles * HV), cu_seqlens, N, steps, T, CHUNK, PACKED)
    first = (begin + chunk * CHUNK).to(gl.int32)
    return first, end.to(gl.int32) - first, column, head, chunk, sequence


@gluon.jit
def load(
    sources, slots, bars, work, place, edges,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr, INITIAL: gl.constexpr, FINAL: gl.constexpr,
):  # fmt: skip
    """One warp: everything, by TMA."""
    q, k, do, E, dv, S, D, first_S, last_D = sources
    sO, sE, sW, sS, sD = slots
    start, items, step = work
    no_state, no_gradient = edges
    size: gl.constexpr = q.dtype.primitive_bitwidth // 8
    n = 0
    for item in range(start, items, step):
        first, left, column, head, chunk, sequence = find(item, place, H, HV, K, PACKED)
        given = (sequence * HV + head) * V
        slot = (first // CHUNK * HV + head) * V  # of the state gradient at the chunk's end; the slot before it has S at its start
        is_first = chunk == 0
        is_last = left <= CHUNK
        state_row = gl.where(is_first, given if INITIAL else no_state, slot - HV * V)
        gradient_row = gl.where(is_last, given if FINAL else no_gradient, slot)
        for i in range(V // ROWS):
            j = n % SLOTS
            mbarrier.wait(bars.index(FREED + j), ((n // SLOTS) & 1) ^ 1)
            loaded = bars.index(LOADED + j)
            mbarrier.expect(loaded, size * ROWS * (3 * CHUNK + 2 * COLUMNS))
            value = head * V + i * ROWS
            tma.async_copy_global_to_shared(do, [first, value], loaded, sO.index(j))
            tma.async_copy_global_to_shared(E, [first, value], loaded, sE.index(j))
            tma.async_copy_global_to_shared(dv, [first, value], loaded, sW.index(j))
            if INITIAL:
                if is_first:
                    tma.async_copy_global_to_shared(first_S, [state_row + i * ROWS, column], loaded, sS.index(j))
                else:
                    tma.async_copy_global_to_shared(S, [state_row + i * ROWS, column], loaded, sS.index(j))
            else:
                tma.async_copy_global_to_shared(S, [state_row + i * ROWS, column], loaded, sS.index(j))
            if FINAL:
                if is_last:
                    tma.async_copy_global_to_shared(last_D, [gradient_row + i * ROWS, column], loaded, sD.index(j))
                else:
                    tma.async_copy_global_to_shared(D, [gradient_row + i * ROWS, column], loaded, sD.index(j))
            else:
                tma.async_copy_global_to_shared(D, [gradient_row + i * ROWS, column], loaded, sD.index(j))
            n += 1
        j = n % SLOTS
        mbarrier.wait(bars.index(FREED + j), ((n // SLOTS) & 1) ^ 1)
        loaded = bars.index(LOADED + j)
        mbarrier.expect(loaded, size * 2 * CHUNK * COLUMNS)
        key = (head // (HV // H)) * K + column
        tma.async_copy_global_to_shared(q, [first, key], loaded, sS.index(j))  # tiles of the same shape: the states' places
        tma.async_copy_global_to_shared(k, [first, key], loaded, sD.index(j))
        n += 1


@gluon.jit
def rows_of(x, at, left, layout: gl.constexpr):
    """A vector of the chunk `[64]`; past the end of the sequence it stays what it is at the last token. An empty place of the grid has none."""
    t = gl.arange(0, CHUNK, layout)
    return gl.load(x + at + gl.minimum(t, left - 1), mask=(t >= 0) & (left > 0), other=0.0)


@gluon.jit
def queries(
    outputs, slots, sdP, out, sums, bars, vectors, work, place, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr, RAGGED: gl.constexpr, GATED: gl.constexpr,
    PARTIALS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dP and dQ; and dbeta out of its parts."""
    dq, dq_at, dbeta = outputs
    sO, sE, _values, sS, sD = slots
    strength, G, partial, tokens = vectors
    start, items, step = work
    dtype: gl.constexpr = sO.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, acc_c)
    by_column: gl.constexpr = gl.SliceLayout(0, acc_c)
    rows_k: gl.constexpr = gl.SliceLayout(1, acc_k)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    r = gl.arange(0, CHUNK, by_row)
    c = gl.arange(0, CHUNK, by_column)
    t = gl.arange(0, CHUNK, line)
    t_k = gl.arange(0, CHUNK, rows_k)
    n = 0
    for item in range(start, items, step):
        turn = item // step & 1
        first, left, column, head, _chunk, _sequence = find(item, place, H, HV, K, PACKED)
        along = head.to(gl.int64) * tokens + first
        b = gl.load(strength + along + c, mask=c < left, other=0.0) * scale
        if GATED:
            G_row = rows_of(G, along, left, by_row)
            G_column = rows_of(G, along, left, by_column)
            into = gl.exp2(rows_of(G, along, left, rows_k)) * scale
            overlap = gl.zeros([ROWS], gl.float32, rows_k)
        if column == 0:
            db = gl.load(partial + along + t, mask=t < left, other=0.0)
            for i in gl.static_range(1, PARTIALS):
                db += gl.load(partial + i * (HV * tokens.to(gl.int64)) + along + t, mask=t < left, other=0.0)
            gl.store(dbeta + (first + t).to(gl.int64) * HV + head, db.to(dbeta.dtype.element_ty), mask=t < left)
        dP = gl.zeros([CHUNK, CHUNK], gl.float32, acc_c)
        dQ = gl.zeros([CHUNK, COLUMNS], gl.float32, acc_k)
        for _i in range(V // ROWS):
            j = n % SLOTS
            mbarrier.wait(bars.index(LOADED + j), (n // SLOTS) & 1)
            dP = warpgroup_mma(sO.index(j), sE.index(j).permute((1, 0)), dP, is_async=True)
            dQ = warpgroup_mma(sO.index(j), sS.index(j), dQ, is_async=True)
            if GATED:
                overlap += gl.sum(widened(sS.index(j).load(acc_k)) * widened(sD.index(j).load(acc_k)), 1)
            dP, dQ = warpgroup_mma_wait(0, deps=[dP, dQ])
            mbarrier.arrive(bars.index(FREED + j), count=1)
            n += 1
        keep = r[:, None] >= c[None, :]
        if RAGGED:  # rows of the next sequence
            keep = keep & (r < left)[:, None]
        dP = dP * b[None, :]
        if GATED:
            # the exponent is masked, not the power, which would overflow
            dP = dP * gl.exp2(gl.where(keep, G_row[:, None] - G_column[None, :], float("-inf")))
            dQ = dQ * into[:, None]
        else:
            dQ = dQ * scale
        mbarrier.wait(bars.index(TAKEN), turn ^ 1)
        sdP.store(masked(keep, dP, dtype))
        if RAGGED:
            if left < CHUNK:
                mbarrier.wait(bars.index(LOADED + n % SLOTS), (n // SLOTS) & 1)
                clear(sS.index(n % SLOTS), left, COLUMNS)
                clear(sD.index(n % SLOTS), left, COLUMNS)
        fence_async_shared()
        mbarrier.arrive(bars.index(READY), count=1)
        j = n % SLOTS
        mbarrier.wait(bars.index(LOADED + j), (n // SLOTS) & 1)
        dQ = warpgroup_mma(sdP, sD.index(j), dQ, is_async=True)
        dQ = warpgroup_mma_wait(0, deps=[dQ])
        if GATED:
            through = gl.sum(widened(sS.index(j).load(acc_k)) * dQ, 1)
            last = gl.load(G + along + gl.minimum(left, CHUNK) - 1, mask=left > 0, other=0.0)
            mbarrier.wait(bars.index(NOTED), turn ^ 1)
            sums.index(0).store(gl.where(t_k < left, through, 0.0))
            sums.index(1).store(overlap * (gl.exp2(last) * scale))
            mbarrier.arrive(bars.index(SUMMED), count=1)
        mbarrier.arrive(bars.index(FREED + j), count=1)
        n += 1
        tma.store_wait(0)
        out.store(dQ.to(dtype))
        fence_async_shared()
        put(dq, dq_at, out, first, head * K + column, HV * K, left, RAGGED)
    tma.store_wait(0)


@gluon.jit
def keys(
    outputs, slots, sdP, sdL, out, sums, bars, vectors, work, place, scale,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr, RAGGED: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dL and dK."""
    dk, dk_at = outputs
    _outs, sE, sW, sS, sD = slots
    strength, G, _partial, tokens = vectors
    start, items, step = work
    dtype: gl.constexpr = sE.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, acc_c)
    by_column: gl.constexpr = gl.SliceLayout(0, acc_c)
    rows_k: gl.constexpr = gl.SliceLayout(1, acc_k)
    r = gl.arange(0, CHUNK, by_row)
    c = gl.arange(0, CHUNK, by_column)
    t = gl.arange(0, CHUNK, rows_k)
    n = 0
    for item in range(start, items, step):
        turn = item // step & 1
        first, left, column, head, _chunk, _sequence = find(item, place, H, HV, K, PACKED)
        along = head.to(gl.int64) * tokens + first
        b = -gl.load(strength + along + c, mask=c < left, other=0.0)
        onward = gl.load(strength + along + t, mask=t < left, other=0.0) * scale
        if GATED:
            G_row = rows_of(G, along, left, by_row)
            G_column = rows_of(G, along, left, by_column)
            into = rows_of(G, along, left, rows_k)
            onward *= gl.exp2(gl.load(G + along + gl.minimum(left, CHUNK) - 1, mask=left > 0, other=0.0) - into)
            into = gl.exp2(into)
        dL = gl.zeros([CHUNK, CHUNK], gl.float32, acc_c)
        dK = gl.zeros([CHUNK, COLUMNS], gl.float32, acc_k)
        read = gl.zeros([CHUNK, COLUMNS], gl.float32, acc_k)  # dV S^T
        for _i in range(V // ROWS):
            j = n % SLOTS
            mbarrier.wait(bars.index(LOADED + j), (n // SLOTS) & 1)
            dL = warpgroup_mma(sW.index(j), sE.index(j).permute((1, 0)), dL, is_async=True)
            dK = warpgroup_mma(sE.index(j), sD.index(j), dK, is_async=True)
            read = warpgroup_mma(sW.index(j), sS.index(j), read, is_async=True)
            dL, dK, read = warpgroup_mma_wait(0, deps=[dL, dK, read])
            mbarrier.arrive(bars.index(FREED + j), count=1)
            n += 1
        below = r[:, None] > c[None, :]
        if RAGGED:
            below = below & (r < left)[:, None]
        dL = dL * b[None, :]
        if GATED:
            dL = dL * gl.exp2(gl.where(below, G_row[:, None] - G_column[None, :], float("-inf")))
            read = read * into[:, None]
        high = masked(below, dL, dtype)
        sdL.index(0).store(high)
        if GATED:  # dg is what is left of sums by rows and by columns of this, so what rounding left is used as well
            sdL.index(1).store(masked(below, dL - widened(high), dtype))
        fence_async_shared()
        dK = dK * onward[:, None]
        j = n % SLOTS
        mbarrier.wait(bars.index(LOADED + j), (n // SLOTS) & 1)
        if RAGGED:  # k is cleared by then
            mbarrier.wait(bars.index(READY), turn)
        if GATED:
            new = gl.sum(widened(sD.index(j).load(acc_k)) * dK, 1)
        mbarrier.wait(bars.index(READY), turn)
        dK = warpgroup_mma(sdP.permute((1, 0)), sS.index(j), dK, is_async=True)
        dK = warpgroup_mma(sdL.index(0).permute((1, 0)), sD.index(j), dK, is_async=True)
        if GATED:
            dK = warpgroup_mma(sdL.index(1).permute((1, 0)), sD.index(j), dK, is_async=True)
            dK = warpgroup_mma_wait(0, deps=[dK])
            dG = -2 * gl.sum(widened(sD.index(j).load(acc_k)) * dK, 1)
        dK = warpgroup_mma(sdL.index(0), sD.index(j), dK, is_async=True)
        if GATED:
            dK = warpgroup_mma(sdL.index(1), sD.index(j), dK, is_async=True)
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(TAKEN), count=1)
        dK = dK - read
        if GATED:
            dG += gl.sum(widened(sD.index(j).load(acc_k)) * dK, 1)
            mbarrier.wait(bars.index(NOTED), turn ^ 1)
            sums.index(2).store(gl.where(t < left, dG, 0.0))
            sums.index(3).store(gl.where(t < left, new, 0.0))
            mbarrier.arrive(bars.index(SUMMED), count=1)
        mbarrier.arrive(bars.index(FREED + j), count=1)
        n += 1
        tma.store_wait(0)
        out.store(dK.to(dtype))
        fence_async_shared()
        put(dk, dk_at, out, first, head * K + column, HV * K, left, RAGGED)
    tma.store_wait(0)


@gluon.jit
def gate(
    dg, sums, bars, work, place, tokens, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, PACKED: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    """One warp: a tile of K's share of dg. Under strong decay its terms are far larger than it; they cancel because each is made of the same
    rounded numbers.
    """
    if GATED:
        start, items, step = work
        line: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
        t = gl.arange(0, CHUNK, line)
        for item in range(start, items, step):
            turn = item // step & 1
            first, left, column, head, _chunk, _sequence = find(item, place, H, HV, K, PACKED)
            mbarrier.wait(bars.index(SUMMED), turn)
            dG = sums.index(0).load(line) + sums.index(2).load(line)
            everywhere = sums.index(1).load(line) + sums.index(3).load(line)
            mbarrier.arrive(bars.index(NOTED), count=1)
            rows = gl.associative_scan(dG, 0, add, reverse=True) + gl.sum(everywhere, 0)
            at = ((column // COLUMNS) * tokens.to(gl.int64) + first + t) * HV + head
            gl.store(dg + at, rows, mask=t < left)


@gluon.jit(do_not_specialize=["N", "steps", "T", "tokens", "items", "no_state", "no_gradient", "scale"])
def gradients_kernel(
    q,  # tiles [64, 128] of [tokens, H * K]
    k,  # the same
    do,  # tiles [64, 64] of [tokens, HV * V]
    E,  # the same
    dv,  # the same
    S,  # tiles [64, 128] of [slots * HV * V, K]
    D,  # the same: D / scale between chunks c and c + 1, in the slot of c + 1
    first_S,  # tiles [64, 128] of [N * HV * V, K]: the initial states as S, INITIAL only
    last_D,  # the same: the given gradients of the final states as D, FINAL only
    dq,  # tiles [64, 128] of [tokens, HV * K] out: to be summed where several value heads read one key head
    dk,  # the same
    dq_at,  # the same memory as pointers, for the rows of a chunk that is not full
    dk_at,
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, GATED only
    partial,  # [PARTIALS, HV, tokens] fp32: sums that make dbeta
    dbeta,  # [tokens, HV] out
    dg,  # [K / 128, tokens, HV] fp32 out, GATED only: to be summed
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    items,  # pieces of work
    no_state,  # a row past the end of S, where a tile reads as zeros
    no_gradient,  # and of D
    scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    PARTIALS: gl.constexpr,
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    RAGGED: gl.constexpr,  # whether a sequence may end inside a chunk
    INITIAL: gl.constexpr,
    FINAL: gl.constexpr,
    KEYS_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sO = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, ROWS], tile)
    sE = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, ROWS], tile)
    sW = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, ROWS], tile)
    sS = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, COLUMNS], tile)
    sD = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, COLUMNS], tile)
    sdP = gl.allocate_shared_memory(dtype, [CHUNK, CHUNK], tile)
    sdL = gl.allocate_shared_memory(dtype, [2 if GATED else 1, CHUNK, CHUNK], tile)
    q_out = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], tile)
    k_out = gl.allocate_shared_memory(dtype, [CHUNK, COLUMNS], tile)
    sums = gl.allocate_shared_memory(gl.float32, [4, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [2 * SLOTS + 4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(LOADED + i), count=1)
        mbarrier.init(bars.index(FREED + i), count=2)
    mbarrier.init(bars.index(READY), count=1)
    mbarrier.init(bars.index(TAKEN), count=1)
    mbarrier.init(bars.index(SUMMED), count=2)
    mbarrier.init(bars.index(NOTED), count=1)

    slots = (sO, sE, sW, sS, sD)
    work = (gl.program_id(0), items, gl.num_programs(0))
    place = (cu_seqlens, N, steps, T)
    vectors = (strength, G, partial, tokens)
    sources = (q, k, do, E, dv, S, D, first_S, last_D)
    edges = (no_state, no_gradient)
    gl.warp_specialize([
        (queries, ((dq, dq_at, dbeta), slots, sdP, q_out, sums, bars, vectors, work, place, scale, H, HV, K, V, PACKED, RAGGED, GATED, PARTIALS)),
        (keys, ((dk, dk_at), slots, sdP, sdL, k_out, sums, bars, vectors, work, place, scale, H, HV, K, V, PACKED, RAGGED, GATED)),
        (load, (sources, slots, bars, work, place, edges, H, HV, K, V, PACKED, INITIAL, FINAL)),
        (gate, (dg, sums, bars, work, place, tokens, H, HV, K, PACKED, GATED)),
    ], [4, 1, 1], [KEYS_REGISTERS, 24, 24])  # fmt: skip


def gradients(
    call: chunk_call.Call, q: Tensor, k: Tensor, do: Tensor, E: Tensor, dv: Tensor, b: Tensor, G: Tensor | None, S: Tensor, D: Tensor,
    initial: Tensor | None, dfinal: Tensor | None, partial: Tensor, dq: Tensor, dk: Tensor, dbeta: Tensor, dg: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Write dq, dk, dbeta and dg. Tensors are contiguous and aligned, D is divided by scale, which is not 0."""
    H, HV, K, V = call.H, call.HV, call.K, call.V
    grouped = HV != H
    parts = [q.new_empty(*dv.shape[:3], K) for _ in range(2)] if grouped else [dq, dk]
    wide = COLUMNS.value
    dg_parts = None if dg is None else b.new_empty(K // wide, *dg.shape)
    S, D = (x if x.shape[0] else x.new_empty(1, *x.shape[1:]) for x in (S, D))
    # the first chunk's state and the last one's gradient have no slot: they are given, or zero
    first_S = None if initial is None else tensor_map(initial.transpose(2, 3).to(q.dtype).contiguous(), K, CHUNK.value, wide)
    last_D = None if dfinal is None else tensor_map((dfinal / scale).transpose(2, 3).to(q.dtype).contiguous(), K, CHUNK.value, wide)
    states, slopes = (tensor_map(x, K, CHUNK.value, wide) for x in (S, D))
    ragged = call.packed or call.T % CHUNK.value != 0
    items = call.parts(CHUNK.value) * HV * (K // wide)
    args = (
        *(tensor_map(x, H * K, CHUNK.value, wide) for x in (q, k)), *(tensor_map(x, HV * V, CHUNK.value, ROWS.value) for x in (do, E, dv)),
        states, slopes, first_S or states, last_D or slopes, *(tensor_map(x, HV * K, CHUNK.value, wide) for x in parts), *parts,
        b, *chunk_call.or_stand_in(b, G), partial, dbeta, *chunk_call.or_stand_in(b, dg_parts),
        *chunk_call.or_stand_in(b, call.place[0]), *call.place[1:], items, states.shape[0], slopes.shape[0], scale,
    )  # fmt: skip
    registers = KEYS_REGISTERS if G is None else KEYS_REGISTERS_GATED
    key = ("hopper gradients", call.key, ragged, initial is None, dfinal is None, partial.shape[0])
    programs = min(items, chunk_call.multiprocessors(q.device) or items)
    launch(gradients_kernel, key, (programs, 1, 1), args, CONFIG, lambda: dict(
        PARTIALS=partial.shape[0], GATED=G is not None, RAGGED=ragged, INITIAL=initial is not None, FINAL=dfinal is not None,
        KEYS_REGISTERS=registers, **call.sizes,
    ))  # fmt: skip
    if dg is not None:
        torch.sum(dg_parts, 0, out=dg) if dg.dtype == torch.float32 else dg.copy_(dg_parts.sum(0))
    if grouped:
        for gradient, part in zip((dq, dk), parts, strict=True):
            torch.sum(part.unflatten(2, (H, -1)), 3, out=gradient)
