"""The state gradient at the ends of segments, for the backward: D alone, from the last chunk to the first, without what hangs on it.

    G' = e^(G_last - G) (K D) + P^T dO          P = tril(Q K^T e^(G_i - G_j))
    H  = G' - X^T (beta G')                     dV = beta H
    D <- e^(G_last) D + (e^G Q)^T dO - K^T (e^G dV)

A quarter of the backward's work (chunk_backward_kernel.py), so that it pays to find D in the middle of a sequence first and to run the rest
side by side. Two ways. Where the forward was cut into segments and left what each does to a state, M, a program takes a segment, from zero,
and the chain follows (kernels/triton/chunk_segments.py). Elsewhere a program walks a whole sequence but its first segment, and leaves D at
each boundary as it passes. D is carried divided by `scale`; what is written is D.

Warps as in chunk_state.py, transposed as there: 64 columns of V a state warpgroup, D^T in registers.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from deltanet.kernels.hopper.chunk_backward_load import ALWAYS_0, widened
from deltanet.kernels.hopper.chunk_state import ROWS, loader, prepare
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.hopper.tiles import (
    CHUNK,
    SWIZZLED,
    allocate_barriers,
    allocate_vectors,
    any_of_warp,
    find_part,
    remembered,
)
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton import chunk as portable
from deltanet.kernels.triton import chunk_call
from deltanet.kernels.triton.compiled import launch

__all__ = ["cut", "find_ends", "segment_ends"]

CONFIG = LaunchConfig(warps=4, stages=2)
REGISTERS = dict(STATE_REGISTERS=192, AUXILIARY_REGISTERS=104)  # as in the forward (chunk.py)
SHORTEST = 512  # tokens of a segment that is walked to


@gluon.jit
def state(
    half: gl.constexpr, tiles, shared, vectors, barriers, given, out, back_to, row, chunks, segment, inverse_scale, scale,
    STAGES: gl.constexpr, GATED: gl.constexpr, WALK: gl.constexpr, FINAL: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    """64 columns of V: D^T `[64, K]`, to `out` at its end or, walking, at every boundary on the way."""
    q_s, k_s, do_s = tiles
    P_s, X_s, X_low_s = shared
    b_s, _, into_s, onward_s, last_s = vectors
    loaded, freed, ready, taken = barriers
    by_token: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    first_token: gl.constexpr = gl.DotOperandLayout(0, by_token, 2)
    first_key: gl.constexpr = gl.DotOperandLayout(0, by_key, 2)
    columns: gl.constexpr = gl.SliceLayout(0, by_token)
    dtype: gl.constexpr = k_s.dtype
    e = gl.arange(0, ROWS, gl.SliceLayout(1, by_key))
    d = gl.arange(0, K, gl.SliceLayout(0, by_key))
    at = d[None, :] * V + e[:, None]  # D^T as it lies in [K, V]
    if FINAL:
        D = gl.load(given + at)
        if WALK:
            gl.store(out + at, D)
        D = D * inverse_scale
    else:
        D = gl.zeros([ROWS, K], gl.float32, by_key)
        if WALK:
            gl.store(out + at, D)
    none = gl.zeros([ROWS, CHUNK], gl.float32, by_token)

    for t in range(chunks):
        i = t % STAGES
        j = t % 2
        mbarrier.wait(loaded.index(i), (t // STAGES) & 1)
        mbarrier.wait(ready.index(j), (t // 2) & 1)
        outs = do_s.index(i).slice(half * ROWS, ROWS, 1).permute((1, 0))
        Da = gl.convert_layout(D.to(dtype), first_token)
        A = warpgroup_mma(outs, P_s.index(j), none, use_acc=False, is_async=True)
        if GATED:
            B = warpgroup_mma(Da, k_s.index(i).permute((1, 0)), none, use_acc=False, is_async=True)
            onward = onward_s.index(j).load(columns)
            A, B = warpgroup_mma_wait(0, deps=[A, B])
            A = A + B * onward[None, :]
            into = into_s.index(j).load(gl.SliceLayout(0, first_key))
            scaled = (widened(outs.load(first_key)) * into[None, :]).to(dtype)
            D = D * last_s.index(j).load(gl.SliceLayout(1, by_key))[:, None]
            D = warpgroup_mma(scaled, q_s.index(i), D, is_async=True)
        else:
            A = warpgroup_mma(Da, k_s.index(i).permute((1, 0)), A, is_async=True)
            D = warpgroup_mma(outs, q_s.index(i), D, is_async=True)
            A = warpgroup_mma_wait(1, deps=[A])
        b = b_s.index(j).load(columns)
        bA = gl.convert_layout((A * -b[None, :]).to(dtype), first_token)
        H = warpgroup_mma(bA, X_s.index(j), A, is_async=True)
        above_one = any_of_warp(gl.max(b, 0) > 1.0)
        H, D = warpgroup_mma_wait(0, deps=[H, D])
        if above_one:
            H = warpgroup_mma(bA, X_low_s.index(j), H, is_async=True)
            H = warpgroup_mma_wait(0, deps=[H])
        dW = H * -b[None, :]
        if GATED:
            dW = dW * into_s.index(j).load(columns)[None, :]
        D = warpgroup_mma(gl.convert_layout(dW.to(dtype), first_key), k_s.index(i), D, is_async=True)
        D = warpgroup_mma_wait(0, deps=[D])
        mbarrier.arrive(freed.index(i), count=1)
        mbarrier.arrive(taken.index(j), count=1)
        if WALK:
            row -= CHUNK
            if row % segment == 0:
                out -= back_to
                gl.store(out + at, D * scale)
    if not WALK:
        e += chunks >> ALWAYS_0  # else 64 addresses wait for this in local memory
        gl.store(out + d[None, :] * V + e[:, None], D * scale)


@gluon.jit(do_not_specialize=["T", "N", "steps", "tokens", "segment", "scale", "inverse_scale"])
def ends_kernel(
    q,  # descriptor of [tokens, H * K], blocks [64, K]
    k,  # the same
    do,  # descriptor of [tokens, HV * V], blocks [64, COLUMNS]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, GATED only
    X,  # [HV, tokens * 48]
    X_low,  # [tokens, HV, V]: what rounding left of X, of chunks with a beta above 1, in the first 64 columns
    dfinal,  # [N, HV, K, V] fp32, FINAL only
    out,  # [segments, HV, K, V] fp32 out: walking, D at the end of each segment; else D at the start of each but a sequence's first, from zero
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
    COLUMNS: gl.constexpr,  # columns of V of one program: 64 or 128
    STAGES: gl.constexpr,
    WALK: gl.constexpr,  # a program a sequence, else one a segment
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    FINAL: gl.constexpr,  # walking only
    STATE_REGISTERS: gl.constexpr,
    AUXILIARY_REGISTERS: gl.constexpr,
):
    TILES: gl.constexpr = V // COLUMNS
    tile = gl.program_id(0) % TILES
    head = (gl.program_id(0) // TILES) % HV
    place = gl.program_id(0) // (TILES * HV)
    if WALK:
        sequence = place
        if PACKED:
            begin = gl.load(cu_seqlens + place).to(gl.int64)
            end = gl.load(cu_seqlens + place + 1).to(gl.int64)
            place = (begin // segment).to(gl.int32) + sequence
        else:
            begin = place.to(gl.int64) * T
            end = begin + T
            place = sequence * gl.cdiv(T, segment)
        segments = gl.maximum(gl.cdiv((end - begin).to(gl.int32), segment), 1)
        place += segments - 1
        begin += gl.minimum(segment, end - begin)  # the first is not walked
        chunks = gl.cdiv((end - begin).to(gl.int32), CHUNK)
        further = gl.maximum(segments - 2, 0) * (segment // CHUNK)  # chunks before the last segment
    else:
        sequence, part, begin, end = find_part(place, cu_seqlens, N, steps, T, segment, PACKED)
        begin += part * segment
        chunks = gl.minimum(gl.cdiv((end - begin).to(gl.int32), CHUNK), segment // CHUNK)
        chunks = gl.where((part == 0) | (begin >= end), 0, chunks)
        further = chunks * 0
    if GATED:
        start = begin + further * CHUNK
        kept, _ = remembered(G + head.to(gl.int64) * tokens + start, (end - start).to(gl.int32), chunks - further, True)
        inverse_scale = gl.where(kept < chunks - further, 0.0, inverse_scale)  # of dfinal nothing is left
        chunks = further + kept
    length = (end - begin).to(gl.int32)
    along = head.to(gl.int64) * tokens + begin
    row0 = begin.to(gl.int32)
    key_col = (head // (HV // H)) * K
    value_col = head * V + tile * COLUMNS
    given = dfinal + (sequence.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS
    out += (place.to(gl.int64) * HV + head) * (K * V) + tile * COLUMNS

    dtype: gl.constexpr = k.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, K], SWIZZLED)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, CHUNK, COLUMNS], SWIZZLED)
    P_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    X_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    X_low_s = gl.allocate_shared_memory(dtype, [2, CHUNK, CHUNK], SWIZZLED)
    vectors = allocate_vectors(2, GATED)
    loaded = allocate_barriers(STAGES, 1)
    freed = allocate_barriers(STAGES, COLUMNS // ROWS + 1)
    ready = allocate_barriers(2, 1)
    taken = allocate_barriers(2, COLUMNS // ROWS)

    tiles = (q_s, k_s, do_s)
    shared = (P_s, X_s, X_low_s)
    barriers = (loaded, freed, ready, taken)
    X_low += (begin * HV + head) * V
    row = chunks * CHUNK
    back_to = HV * K * V
    if COLUMNS == 128:
        gl.warp_specialize(
            [
                (state, (0, tiles, shared, vectors, barriers, given, out, back_to, row, chunks, segment, inverse_scale, scale,
                         STAGES, GATED, WALK, FINAL, K, V)),
                (state, (1, tiles, shared, vectors, barriers, given + ROWS, out + ROWS, back_to, row, chunks, segment, inverse_scale, scale,
                         STAGES, GATED, WALK, FINAL, K, V)),
                (prepare, (tiles, shared, vectors, barriers, strength + along, G + along, X + along * 48, X_low,
                             length, chunks, 1.0, STAGES, GATED, True, K, COLUMNS, True, HV * V)),
                (loader, (q, k, do, tiles, (loaded, freed), row0, key_col, value_col, chunks, STAGES, True, True)),
            ],
            [4, 4, 1],
            [STATE_REGISTERS, AUXILIARY_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (state, (0, tiles, shared, vectors, barriers, given, out, back_to, row, chunks, segment, inverse_scale, scale,
                         STAGES, GATED, WALK, FINAL, K, V)),
                (prepare, (tiles, shared, vectors, barriers, strength + along, G + along, X + along * 48, X_low,
                             length, chunks, 1.0, STAGES, GATED, True, K, COLUMNS, True, HV * V)),
                (loader, (q, k, do, tiles, (loaded, freed), row0, key_col, value_col, chunks, STAGES, True, True)),
            ],
            [4, 1],
            [AUXILIARY_REGISTERS, 24],
        )  # fmt: skip


def cut(call: chunk_call.Call, device: torch.device) -> int:
    """Tokens of a segment of the backward, or 0: the forward's segments, or where whole sequences leave half of the GPU idle a share of it each."""
    if call.segment:
        return call.segment
    share = chunk_call.multiprocessors(device) // max(call.N * call.HV, 1)
    length = call.tokens // max(call.N, 1)
    if share < 2 or length < 2 * SHORTEST:
        return 0
    return max(-(-length // (share * CHUNK.value)) * CHUNK.value, SHORTEST)


def segment_ends(
    call: chunk_call.Call, segment: int, q: Tensor, k: Tensor, do: Tensor, b: Tensor, G: Tensor | None, X: Tensor, X_low: Tensor,
    M: Tensor | None, dfinal: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """D at the end of each segment `[segments, HV, K, V]` fp32. X_low lies where dv will (chunk_rest.py)."""
    out = find_ends(call, segment, q, k, do, b, G, X, X_low, dfinal if M is None else None, scale, walk=M is None)
    return out if M is None else portable.chain_segments(call, M, out, dfinal, backwards=True)


def find_ends(
    call: chunk_call.Call, segment: int, q: Tensor, k: Tensor, do: Tensor, b: Tensor, G: Tensor | None, X: Tensor,
    X_low: Tensor, dfinal: Tensor | None, scale: float, *, walk: bool,
) -> Tensor:  # fmt: skip
    """Walking, D at the end of each segment; else what each makes of a D of zero."""
    H, HV, K, V = call.H, call.HV, call.K, call.V
    columns = 64 if walk else V  # whoever walks has half of the GPU to itself (cut)
    programs = (call.N if walk else call.parts(segment)) * HV * (V // columns)
    out = q.new_empty(call.parts(segment), HV, K, V, dtype=torch.float32)
    args = (
        tensor_map(q, H * K, CHUNK.value, K), tensor_map(k, H * K, CHUNK.value, K), tensor_map(do, HV * V, CHUNK.value, columns),
        b, b if G is None else G, X, X_low, b if dfinal is None else dfinal, out,
        b if call.place[0] is None else call.place[0], *call.place[1:], segment, scale, 1.0 / scale,
    )  # fmt: skip
    key = ("hopper ends", call.key, dfinal is None, walk)
    launch(ends_kernel, key, (programs, 1, 1), args, CONFIG, lambda: dict(
        COLUMNS=columns, STAGES=CONFIG.stages, WALK=walk, GATED=G is not None, FINAL=dfinal is not None,
        **REGISTERS, **call.sizes,
    ))  # fmt: skip
    return out
