"""The gradient warpgroup of the Hopper backward: P for the state warpgroups, a chunk ahead of its own work; then dQ, dK and, gated, dg.

It also writes what the state warpgroups leave in shared memory, dV and dbeta.
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

from deltanet.kernels.hopper.chunk_backward_load import (
    ALSO_0,
    ALWAYS_0,
    FREED_ERRORS,
    FREED_KEYS,
    FREED_OUTS,
    FREED_QUERIES,
    FREED_STATE,
    LOADED_ERRORS,
    LOADED_KEYS,
    LOADED_OUTS,
    LOADED_QUERIES,
    LOADED_STATE,
    READY_D,
    READY_G,
    READY_P,
    READY_V,
    READY_W,
    TAKEN_D,
    TAKEN_G,
    TAKEN_W,
    THIRD_0,
    widened,
)
from deltanet.kernels.hopper.tiles import CHUNK, add, clear, masked


@gluon.jit
def clear_last(tiles, bars, rows, K: gl.constexpr, V: gl.constexpr):
    """Zero what q, k, do and E of a sequence's last chunk hold of the next one. The others look at them when P is ready, and no earlier.

    Of a full chunk that is nothing, and no branch: ptxas spills 72 bytes around one.
    """
    sQ, sK, sdO, sE, _, _, _, _, _, _, _, _, _, _, _, _ = tiles
    mbarrier.wait(bars.index(LOADED_OUTS), 0)
    mbarrier.wait(bars.index(LOADED_ERRORS), 0)
    clear(sQ.index(0), rows, K)
    clear(sK.index(0), rows, K)
    clear(sdO.index(0), rows, V)
    clear(sE.index(0), rows, V)


@gluon.jit
def put(descriptor, pointer, tile, at, column, stride, rows, RAGGED: gl.constexpr):
    """A finished tile to memory: all of it, or at a sequence's end the rows that are its own."""
    if RAGGED:
        if rows < CHUNK:
            wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
            r = gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
            c = gl.arange(0, tile.shape[1], gl.SliceLayout(0, wide))
            start = pointer + at.to(gl.int64) * stride + column
            gl.store(start + r[:, None] * stride + c[None, :], tile.load(wide), mask=(r < rows)[:, None])
        else:
            tma.async_copy_shared_to_global(descriptor, [at, column], tile)
    else:
        tma.async_copy_shared_to_global(descriptor, [at, column], tile)


@gluon.jit
def decay_between(G, keep, acc: gl.constexpr):
    """e^(G_row - G_column) where `keep`, else 0. The exponent is masked, not the power, which would overflow."""
    row = G.load(gl.SliceLayout(1, acc))
    column = G.load(gl.SliceLayout(0, acc))
    return gl.exp2(gl.where(keep, row[:, None] - column[None, :], float("-inf")))


@gluon.jit
def gradients(
    tiles, bars, outputs, columns, span, scale,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GATED: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    if GATED:
        gradients_gated(tiles, bars, outputs, columns, span, scale, HV, K, V, RAGGED)
    else:
        gradients_plain(tiles, bars, outputs, columns, span, scale, HV, K, V, RAGGED)


@gluon.jit
def gradients_plain(
    tiles, bars, outputs, columns, span, scale, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, RAGGED: gl.constexpr
):  # fmt: skip
    """One warpgroup: P for the state warpgroups, a chunk ahead of its own work; then dQ, dK, and what the others left to write."""
    sQ, sK, all_dO, all_E, all_S, _, sB, _, all_P, all_D, all_W, sR, _, _, all_dP, all_Out = tiles
    dq, dk, dv, dq_at, dk_at, dv_at, dbeta, _ = outputs
    key_column, key_stride, head = columns
    chunks, rows, first = span
    dtype: gl.constexpr = sK.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, acc_c))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, acc_c))
    none_c = gl.zeros([CHUNK, CHUNK], gl.float32, acc_c)
    none_k = gl.zeros([CHUNK, K], gl.float32, acc_k)
    rows_layout: gl.constexpr = gl.BlockedLayout([V // 16, 1], [1, 32], [1, 4], [0, 1])
    t = gl.arange(0, CHUNK, gl.SliceLayout(0, rows_layout))

    if chunks > 0:
        mbarrier.wait(bars.index(LOADED_KEYS + 0), 0)
        mbarrier.wait(bars.index(LOADED_QUERIES + 0), 0)
        if RAGGED:
            clear_last(tiles, bars, rows - (chunks - 1) * CHUNK, K, V)
        P = warpgroup_mma(sQ.index(0), sK.index(0).permute((1, 0)), none_c, use_acc=False, is_async=True)
        P = warpgroup_mma_wait(0, deps=[P])
        all_P.index(0).store(masked(r[:, None] >= c[None, :], P, dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_P), count=1)

    for back in range(chunks):
        i = chunks - 1 - back
        at = first + i * CHUNK
        left = rows - i * CHUNK
        phase = back & 1
        stage = back & 1
        keys = sK.index(stage)
        here = back >> ALWAYS_0
        queries = sQ.index(stage)
        sdO, sE, sS, sP, sD = (
            all_dO.index(here),
            all_E.index(here),
            all_S.index(here),
            all_P.index(here),
            all_D.index(here),
        )
        sW, sdP, sOut = all_W.index(here), all_dP.index(here), all_Out.index(here)
        strength = sB.index(stage)
        mbarrier.wait(bars.index(LOADED_OUTS), phase)
        mbarrier.wait(bars.index(LOADED_ERRORS), phase)
        dP = warpgroup_mma(sdO, sE.permute((1, 0)), none_c, use_acc=False, is_async=True)
        b_c = strength.load(gl.SliceLayout(0, acc_c))
        dP = warpgroup_mma_wait(0, deps=[dP])
        sdP.store(masked(r[:, None] >= c[None, :], dP * b_c[None, :], dtype))
        fence_async_shared()
        mbarrier.wait(bars.index(LOADED_STATE), phase)
        dQ = warpgroup_mma(sdO, sS, none_k, use_acc=False, is_async=True)
        dQ = warpgroup_mma(sdP, keys, dQ, is_async=True)
        dQ = warpgroup_mma_wait(0, deps=[dQ])
        mbarrier.arrive(bars.index(FREED_OUTS), count=1)

        there = back >> ALSO_0
        sE, sdP = all_E.index(there), all_dP.index(there)
        # dK is summed with its sign turned, so that dV enters as it lies in memory
        mbarrier.wait(bars.index(READY_D), phase)
        dK = warpgroup_mma(sE, sD, none_k, use_acc=False, is_async=True)
        tma.store_wait(0)
        sOut.store((dQ * scale).to(dtype))
        fence_async_shared()
        put(dq, dq_at, sOut, at, key_column, key_stride, left, RAGGED)
        b_r = strength.load(gl.SliceLayout(1, acc_k))
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(TAKEN_D), count=1)
        dK = dK * b_r[:, None]
        dK = warpgroup_mma(sdP.permute((1, 0)), queries, dK, is_async=True)
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(FREED_QUERIES + stage), count=1)
        dK = dK * -scale

        mbarrier.wait(bars.index(READY_W), phase)
        put(dv, dv_at, sW, at, head * V, HV * V, left, RAGGED)
        dL = warpgroup_mma(sW, sE.permute((1, 0)), none_c, use_acc=False, is_async=True)
        following = 1 - stage
        mbarrier.wait(bars.index(LOADED_KEYS + following), ((back + 1) >> 1) & 1, pred=back + 1 < chunks)
        mbarrier.wait(bars.index(LOADED_QUERIES + following), ((back + 1) >> 1) & 1, pred=back + 1 < chunks)
        P = warpgroup_mma(
            sQ.index(following), sK.index(following).permute((1, 0)), none_c, use_acc=False, is_async=True
        )
        dK = warpgroup_mma(sW, all_S.index(there), dK, is_async=True)
        dL = warpgroup_mma_wait(2, deps=[dL])
        mbarrier.arrive(bars.index(FREED_ERRORS), count=1)
        sdP.store(masked(r[:, None] > c[None, :], dL * strength.load(gl.SliceLayout(0, acc_c))[None, :], dtype))
        P = warpgroup_mma_wait(1, deps=[P])
        sP.store(masked(r[:, None] >= c[None, :], P, dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_P), count=1)
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(FREED_STATE), count=1)
        db = gl.sum(sR.load(rows_layout), 0)
        gl.store(dbeta + (at.to(gl.int64) + t) * HV, db.to(dbeta.dtype.element_ty), mask=t < left)
        keys, sdP = sK.index(stage + there), all_dP.index(here)
        dK = warpgroup_mma(sdP, keys, dK, is_async=True)
        dK = warpgroup_mma(sdP.permute((1, 0)), keys, dK, is_async=True)
        tma.store_wait(0)
        mbarrier.arrive(bars.index(TAKEN_W), count=1)
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(FREED_KEYS + stage), count=1)
        sOut.store((-dK).to(dtype))
        fence_async_shared()
        put(dk, dk_at, sOut, at, key_column, key_stride, left, RAGGED)
    tma.store_wait(0)


@gluon.jit
def gradients_gated(
    tiles,
    bars,
    outputs,
    columns,
    span,
    scale,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    RAGGED: gl.constexpr,
):
    """The same with decay, and for the gate's gradient q . dq - k . (dk as a place of writing) + k . (dk as a place of reading), row by row.

    There dL is larger than what is left of it where keys are alike, so what rounding leaves of it is used as well.
    """
    sQ, sK, all_dO, all_E, all_S, _, sB, sG, all_P, all_D, all_W, _, sN, _, all_dP, all_Out = tiles
    dq, dk, dv, dq_at, dk_at, dv_at, _, _ = outputs
    key_column, key_stride, head = columns
    chunks, rows, first = span
    dtype: gl.constexpr = sK.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left_k: gl.constexpr = gl.DotOperandLayout(0, acc_k, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, left_k)
    rows_k: gl.constexpr = gl.SliceLayout(1, acc_k)
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, acc_c))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, acc_c))
    none_c = gl.zeros([CHUNK, CHUNK], gl.float32, acc_c)
    none_k = gl.zeros([CHUNK, K], gl.float32, acc_k)

    if chunks > 0:
        mbarrier.wait(bars.index(LOADED_KEYS + 0), 0)
        mbarrier.wait(bars.index(LOADED_QUERIES + 0), 0)
        if RAGGED:
            clear_last(tiles, bars, rows - (chunks - 1) * CHUNK, K, V)
        P = warpgroup_mma(sQ.index(0), sK.index(0).permute((1, 0)), none_c, use_acc=False, is_async=True)
        P = warpgroup_mma_wait(0, deps=[P])
        all_P.index(0).store((P * decay_between(sG.index(0), r[:, None] >= c[None, :], acc_c)).to(dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_P), count=1)

    for back in range(chunks):
        i = chunks - 1 - back
        at = first + i * CHUNK
        left = rows - i * CHUNK
        phase = back & 1
        stage = back & 1
        keys = sK.index(stage)
        here = back >> ALWAYS_0
        queries = sQ.index(stage)
        sdO, sE, sS, sP, sD = (
            all_dO.index(here),
            all_E.index(here),
            all_S.index(here),
            all_P.index(here),
            all_D.index(here),
        )
        sW, sdP, sOut = all_W.index(here), all_dP.index(here), all_Out.index(here)
        strength = sB.index(stage)
        decay = sG.index(stage)
        last = gl.sum(decay.slice(63, 1, 0).load(gl.SliceLayout(1, acc_k)), 0)
        mbarrier.wait(bars.index(LOADED_OUTS), phase)
        mbarrier.wait(bars.index(LOADED_ERRORS), phase)
        dP = warpgroup_mma(sdO, sE.permute((1, 0)), none_c, use_acc=False, is_async=True)
        among = (
            decay_between(decay, r[:, None] >= c[None, :], acc_c)
            * (strength.load(gl.SliceLayout(0, acc_c)) * scale)[None, :]
        )
        dP = warpgroup_mma_wait(0, deps=[dP])
        sdP.store((dP * among).to(dtype))
        fence_async_shared()
        mbarrier.wait(bars.index(LOADED_STATE), phase)
        dQ = warpgroup_mma(sdO, sS, none_k, use_acc=False, is_async=True)
        into = gl.exp2(decay.load(gl.SliceLayout(1, acc_k))) * scale
        dQ = warpgroup_mma_wait(0, deps=[dQ])
        mbarrier.arrive(bars.index(FREED_OUTS), count=1)
        dQ = dQ * into[:, None]
        dQ = warpgroup_mma(sdP, keys, dQ, is_async=True)
        there = back >> ALSO_0
        sE, sdP, queries = all_E.index(there), all_dP.index(there), sQ.index(stage + there)
        dQ = warpgroup_mma_wait(0, deps=[dQ])
        tma.store_wait(0)
        sOut.store(dQ.to(dtype))
        fence_async_shared()
        put(dq, dq_at, sOut, at, key_column, key_stride, left, RAGGED)
        # dK as a place of writing: V' D^T + dP^T Q + dL^T K
        mbarrier.wait(bars.index(READY_D), phase)
        dK = warpgroup_mma(sE, sD, none_k, use_acc=False, is_async=True)
        dG = gl.sum(widened(queries.load(acc_k)) * dQ, 1)
        onward = gl.exp2(last - decay.load(rows_k)) * strength.load(rows_k) * scale
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(TAKEN_D), count=1)
        dK = dK * onward[:, None]
        mbarrier.wait(bars.index(READY_W), phase)
        put(dv, dv_at, sW, at, head * V, HV * V, left, RAGGED)
        yonder = back >> THIRD_0
        dL = warpgroup_mma(sW, all_E.index(yonder).permute((1, 0)), none_c, use_acc=False, is_async=True)
        dG_new = gl.sum(widened(sK.index(stage + there).load(acc_k)) * dK, 1)
        dK = warpgroup_mma(sdP.permute((1, 0)), queries, dK, is_async=True)
        among = decay_between(decay, r[:, None] > c[None, :], acc_c) * -strength.load(gl.SliceLayout(0, acc_c))[None, :]
        dL = warpgroup_mma_wait(1, deps=[dL])
        mbarrier.arrive(bars.index(FREED_ERRORS), count=1)
        dL = dL * among
        high = dL.to(dtype)
        low = all_Out.index(yonder).slice(0, CHUNK, 1)
        tma.store_wait(1)  # dq has left
        low.store((dL - widened(high)).to(dtype))
        following = 1 - stage
        mbarrier.wait(bars.index(LOADED_KEYS + following), ((back + 1) >> 1) & 1, pred=back + 1 < chunks)
        mbarrier.wait(bars.index(LOADED_QUERIES + following), ((back + 1) >> 1) & 1, pred=back + 1 < chunks)
        P = warpgroup_mma(
            sQ.index(following), sK.index(following).permute((1, 0)), none_c, use_acc=False, is_async=True
        )
        dK = warpgroup_mma_wait(1, deps=[dK])
        mbarrier.arrive(bars.index(FREED_QUERIES + stage), count=1)
        sdP.store(high)
        fence_async_shared()
        keys = sK.index(stage + there)
        dK = warpgroup_mma(all_dP.index(yonder).permute((1, 0)), keys, dK, is_async=True)
        dK = warpgroup_mma(low.permute((1, 0)), keys, dK, is_async=True)
        P = warpgroup_mma_wait(2, deps=[P])
        sP.store((P * decay_between(sG.index(following), r[:, None] >= c[None, :], acc_c)).to(dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_P), count=1)
        read = (widened(sW.load(left_k)) * -gl.exp2(decay.load(by_row))[:, None]).to(dtype)
        dK = warpgroup_mma_wait(0, deps=[dK])
        dG -= 2 * gl.sum(widened(keys.load(acc_k)) * dK, 1)

        # and as a place of reading: dL K - e^G dV S^T
        dK = warpgroup_mma(all_dP.index(here), sK.index(stage + yonder), dK, is_async=True)
        dK = warpgroup_mma(low, sK.index(stage + yonder), dK, is_async=True)
        dK = warpgroup_mma(read, all_S.index(there), dK, is_async=True)
        dK = warpgroup_mma_wait(0, deps=[dK])
        mbarrier.arrive(bars.index(FREED_STATE), count=1)
        dG += gl.sum(widened(keys.load(acc_k)) * dK, 1)
        mbarrier.arrive(bars.index(FREED_KEYS + stage), count=1)
        mbarrier.wait(bars.index(TAKEN_G), phase ^ 1)
        sN.index(0).store(dG)
        sN.index(1).store(dG_new)
        mbarrier.arrive(bars.index(READY_G), count=1)
        tma.store_wait(0)
        mbarrier.arrive(bars.index(TAKEN_W), count=1)
        sOut.store(dK.to(dtype))
        fence_async_shared()
        put(dk, dk_at, sOut, at, key_column, key_stride, left, RAGGED)
    tma.store_wait(0)


@gluon.jit
def gate_gradient(tiles, bars, outputs, span, HV: gl.constexpr, V: gl.constexpr):
    """One warp: dg of a chunk, and dbeta. With dG_i as the gradient warpgroup gives it, what is written onward counted as taken,

        dg_t = sum of dG_i over i >= t + sum of k_i . (e^(G_last - G) V' D^T)_i over all i + e^G_last <S, D>

    Under strong decay all three are far larger than dg. They cancel because the same rounded numbers stand in each.
    """
    _, _, _, _, _, _, _, _, _, _, _, sR, sN, sV, _, _ = tiles
    _, _, _, _, _, _, dbeta, dg = outputs
    chunks, rows, first = span
    STATES: gl.constexpr = V // 64
    line: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    columns: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 1], [1, 0])
    t = gl.arange(0, CHUNK, line)
    s = gl.arange(0, CHUNK, gl.SliceLayout(0, columns))
    for back in range(chunks):
        i = chunks - 1 - back
        at = (first + i * CHUNK).to(gl.int64)
        left = rows - i * CHUNK
        phase = back & 1
        mbarrier.wait(bars.index(READY_V), phase)
        db = gl.sum(sR.load(columns), 0)
        gl.store(dbeta + (at + s) * HV, db.to(dbeta.dtype.element_ty), mask=s < left)
        onward = sV.index(phase * STATES).load(line)
        if STATES == 2:
            onward += sV.index(phase * STATES + 1).load(line)
        mbarrier.arrive(bars.index(TAKEN_W), count=1)
        mbarrier.wait(bars.index(READY_G), phase)
        dG = sN.index(0).load(line)
        onward += sN.index(1).load(line)
        mbarrier.arrive(bars.index(TAKEN_G), count=1)
        sums = gl.associative_scan(dG, 0, add, reverse=True) + gl.sum(onward, 0)
        gl.store(dg + (at + t) * HV, sums.to(dg.dtype.element_ty), mask=t < left)
