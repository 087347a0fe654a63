"""The state warpgroups of the Hopper backward: D, and with it dV and what makes dbeta, chunk after chunk from the last."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from deltanet.kernels.hopper.chunk_backward_load import (
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
    LOADED_REST,
    LOADED_STATE,
    READY_D,
    READY_P,
    READY_V,
    READY_W,
    TAKEN_D,
    TAKEN_W,
    USED_P,
    widened,
)
from deltanet.kernels.hopper.tiles import CHUNK, any_of_warp


@gluon.jit
def by_beta(errors, H, scale):
    """E_i . H_i over 16 rows of V, one sum a warp: the gradient of beta, in four."""
    terms = widened(errors.load(H.type.layout)) * H
    return gl.sum(terms.reshape([4, 16, CHUNK]), 1) * scale


@gluon.jit
def state(
    half: gl.constexpr, tiles, bars, states, chunks, scale, inverse_scale,
    K: gl.constexpr, V: gl.constexpr, GATED: gl.constexpr, RAGGED: gl.constexpr, FINAL: gl.constexpr, INITIAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of D^T, the gradients of the new values, and what they do to D."""
    sQ, sK, all_dO, all_E, all_S, all_X, sB, sG, all_P, all_D, all_W, sR, _, sV, _, _ = tiles
    dfinal, dinitial, part = states
    dtype: gl.constexpr = sK.dtype
    acc_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    acc_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    left_c: gl.constexpr = gl.DotOperandLayout(0, acc_c, 2)
    left_k: gl.constexpr = gl.DotOperandLayout(0, acc_k, 2)
    tokens: gl.constexpr = gl.SliceLayout(0, acc_c)
    e = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, acc_k))
    d = gl.arange(0, K, gl.SliceLayout(0, acc_k))
    if FINAL:
        D = gl.load(dfinal + d[None, :] * V + e[:, None]) * inverse_scale
    else:
        D = gl.zeros([64, K], gl.float32, acc_k)
    none = gl.zeros([64, CHUNK], gl.float32, acc_c)
    rests = 0  # chunks so far with a beta above 1
    if RAGGED:  # rows of the next sequence are cleared by then
        mbarrier.wait(bars.index(READY_P), 0, pred=chunks > 0)
    for back in range(chunks):
        phase = back & 1
        stage = back & 1
        keys = sK.index(stage)
        here = back >> ALWAYS_0
        sP, sX = all_P.index(here), all_X.index(here)
        outs = all_dO.index(here).slice(half * 64, 64, 1).permute((1, 0))
        errors = all_E.index(here).slice(half * 64, 64, 1).permute((1, 0))
        queries = sQ.index(stage)
        my_D = all_D.index(here).slice(half * 64, 64, 0)
        my_W = all_W.index(here).slice(half * 64, 64, 1).permute((1, 0))
        Db = D.to(dtype)
        if GATED:
            left = gl.convert_layout(Db, left_c)
            mbarrier.wait(bars.index(LOADED_KEYS + stage), (back >> 1) & 1)
            G = warpgroup_mma(left, keys.permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(bars.index(TAKEN_D), phase ^ 1)
            my_D.store(Db)
            fence_async_shared()
            mbarrier.arrive(bars.index(READY_D), count=1)
        else:
            mbarrier.wait(bars.index(TAKEN_D), phase ^ 1)
            my_D.store(Db)
            fence_async_shared()
            mbarrier.arrive(bars.index(READY_D), count=1)
            mbarrier.wait(bars.index(LOADED_KEYS + stage), (back >> 1) & 1)
            G = warpgroup_mma(my_D, keys.permute((1, 0)), none, use_acc=False, is_async=True)
        if GATED:
            decay = sG.index(stage)
            last = gl.sum(decay.slice(63, 1, 0).load(tokens), 0)
            G = warpgroup_mma_wait(0, deps=[G])
            G = G * gl.exp2(last - decay.load(tokens))[None, :]
        mbarrier.wait(bars.index(LOADED_OUTS), phase)
        mbarrier.wait(bars.index(LOADED_QUERIES + stage), (back >> 1) & 1)
        mbarrier.wait(bars.index(READY_P), phase)
        fence_async_shared()  # X was written by ordinary copies
        G = warpgroup_mma(outs, sP, G, is_async=True)
        if GATED:
            into = gl.exp2(decay.load(gl.SliceLayout(0, left_k)))
            scaled = (widened(outs.load(left_k)) * into[None, :]).to(dtype)
            D = D * gl.exp2(last)
            D = warpgroup_mma(scaled, queries, D, is_async=True)
        else:
            D = warpgroup_mma(outs, queries, D, is_async=True)
        b = sB.index(stage).load(tokens)
        G = warpgroup_mma_wait(1, deps=[G])
        careful = any_of_warp(gl.max(b, 0) > 1.0)
        mbarrier.arrive(bars.index(USED_P), count=1, pred=careful)
        bG = gl.convert_layout((G * -b[None, :]).to(dtype), left_c)
        H = warpgroup_mma(bG, sX, G, is_async=True)
        mbarrier.wait(bars.index(LOADED_ERRORS), phase)
        H, D = warpgroup_mma_wait(0, deps=[H, D])
        if careful:
            mbarrier.wait(bars.index(LOADED_REST), rests & 1)
            fence_async_shared()
            H = warpgroup_mma(bG, sP, H, is_async=True)
            H = warpgroup_mma_wait(0, deps=[H])
            rests += 1
        mbarrier.arrive(bars.index(FREED_OUTS), count=1)
        mbarrier.arrive(bars.index(FREED_QUERIES + stage), count=1)
        if not GATED:
            sums = by_beta(errors, H, scale)
        mbarrier.wait(bars.index(TAKEN_W), phase ^ 1)
        if not GATED:
            sR.slice(half * 4, 4, 0).store(sums)
        dW = H * sB.index(stage).load(tokens)[None, :]
        my_W.store((dW * scale).to(dtype))
        fence_async_shared()
        mbarrier.arrive(bars.index(READY_W), count=1)
        if GATED:
            dW = dW * gl.exp2(decay.load(tokens))[None, :]
        D = warpgroup_mma(gl.convert_layout((-dW).to(dtype), left_k), keys, D, is_async=True)
        if GATED:  # in the product's shadow; without a gate there are fewer registers
            sR.slice(half * 4, 4, 0).store(by_beta(errors, H, scale))
        mbarrier.arrive(bars.index(FREED_ERRORS), count=1)
        if GATED:  # e^G_last <S, D>, S of the chunk's start and D of its end: a term of dg
            mbarrier.wait(bars.index(LOADED_STATE), phase)
            kept = widened(all_S.index(here).slice(half * 64, 64, 0).load(acc_k))
            overlap = gl.sum(kept * widened(my_D.load(acc_k)), 1) * (scale * gl.exp2(last))
            sV.index(phase * (V // 64) + half).store(overlap)
            mbarrier.arrive(bars.index(FREED_STATE), count=1)
            mbarrier.arrive(bars.index(READY_V), count=1)
        D = warpgroup_mma_wait(0, deps=[D])
        mbarrier.arrive(bars.index(FREED_KEYS + stage), count=1)
    if INITIAL:
        if part == 0:
            e += chunks >> ALWAYS_0
            gl.store(dinitial + d[None, :] * V + e[:, None], D * scale)
