"""The whole backward in one launch for Hopper (sm_90a): one program owns a value head of a sequence, from its last chunk to its first.

    P  = tril(Q K^T)                            G' = K D + P^T dO
    H  = G' - X^T (beta G')                     dV = beta H            dbeta_i = E_i . H_i
    dP = scale tril(dO V'^T)                    dL = -strict_tril(dV V'^T)              V' = beta E
    dQ = scale dO S^T + dP K                    dK = V' D^T + dP^T Q - dV S^T + (dL + dL^T) K
    D <- D + Q^T dO - K^T dV                    D is carried divided by scale, so that dO and Q enter the products as they lie in memory

With a gate, decay enters as in triton/chunk_state_gradient.py and triton/chunk_gradients.py, which are this kernel in two.
Warps: two state warpgroups, each with 64 rows of D^T in registers (chunk_backward_state.py); one gradient warpgroup
(chunk_backward_gradients.py); a warp that loads, another for what rounding left of X (chunk_backward_load.py); gated, one more for dg.
docs/kernels.md has the order of events and the map of memory.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from deltanet.kernels.hopper.chunk_backward_ends import cut, segment_ends
from deltanet.kernels.hopper.chunk_backward_gradients import gate_gradient, gradients
from deltanet.kernels.hopper.chunk_backward_load import (
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
    READY_G,
    READY_P,
    READY_V,
    READY_W,
    TAKEN_D,
    TAKEN_G,
    TAKEN_W,
    USED_P,
    find_rows,
    in_32_bits,
    load,
    load_rest,
)
from deltanet.kernels.hopper.chunk_backward_state import state
from deltanet.kernels.hopper.chunk_rest import rest_of_X
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.hopper.tiles import CHUNK
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton import chunk_call
from deltanet.kernels.triton.compiled import launch

__all__ = ["backward", "takes"]

CONFIG = LaunchConfig(warps=4)
STATE_REGISTERS = 144  # of a thread of the state warpgroups; the gradient warpgroup then has 200
STATE_REGISTERS_GATED = 160  # and 168
DIMS = (64, 128)
FEWEST = 32  # programs: with as many (2 x 2048 x 16) 0.158 ms, where the portable backward takes 0.227; fewer were not measured


@gluon.jit(do_not_specialize=["N", "steps", "T", "tokens", "segment", "no_state", "scale", "inverse_scale"])
def backward_kernel(
    q,  # tiles [64, K] of [tokens, H * K]
    k,  # tiles [64, K] of [tokens, H * K]
    do,  # tiles [64, V] of [tokens, HV * V]
    E,  # tiles [64, V] of [tokens, HV * V]
    S,  # tiles [V, K] of [slots * HV * V, K]
    first_S,  # tiles [V, K] of [N * HV * V, K]: the initial states as S, INITIAL only
    dq,  # tiles [64, K] of [tokens, H * K] out; of [tokens, HV * K] where several value heads read one key head: to be summed
    dk,  # the same
    dv,  # tiles [64, V] of [tokens, HV * V], out; until a chunk is written, what rounding left of its X where a beta is above 1 (chunk_rest.py)
    dq_at,  # the same memory as pointers, for the rows of a chunk that is not full
    dk_at,
    dv_at,
    X,  # [HV, tokens * 48]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, GATED only
    dbeta,  # [tokens, HV] out
    dg,  # [tokens, HV] out, GATED only
    dfinal,  # [N, HV, K, V] fp32, of every segment if SPLIT, FINAL only
    dinitial,  # [N, HV, K, V] fp32 out, INITIAL only
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    segment,  # tokens of a segment, a multiple of 64
    no_state,  # a row past the end of S, where a tile reads as zeros
    scale,
    inverse_scale,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    SPLIT: gl.constexpr,  # sequences are cut into segments, one program each
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
    RAGGED: gl.constexpr,  # whether a sequence may end inside a chunk
    INITIAL: gl.constexpr,
    FINAL: gl.constexpr,
    STATE_REGISTERS: gl.constexpr,
):
    head = gl.program_id(0) % HV
    place = gl.program_id(0) // HV
    key_head = head // (HV // H)
    sequence, part, first, rows, _ = find_rows(place, cu_seqlens, N, steps, T, segment, SPLIT, PACKED)
    chunks = gl.cdiv(rows, CHUNK)
    along = head.to(gl.int64) * tokens + first
    strength += along
    G += along
    X += along * 48
    if H == HV:
        key_column, key_stride = key_head * K, H * K
    else:
        key_column, key_stride = head * K, HV * K
    end_at = (place.to(gl.int64) * HV + head) * (K * V)
    state_at = (sequence.to(gl.int64) * HV + head) * (K * V)

    dtype: gl.constexpr = q.dtype
    STATES: gl.constexpr = V // 64  # warpgroups that share D
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sQ = gl.allocate_shared_memory(dtype, [2, CHUNK, K], tile)
    sK = gl.allocate_shared_memory(dtype, [2, CHUNK, K], tile)
    sdO = gl.allocate_shared_memory(dtype, [1, CHUNK, V], tile)
    sE = gl.allocate_shared_memory(dtype, [1, CHUNK, V], tile)
    sX = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], tile)
    sS = gl.allocate_shared_memory(dtype, [1, V, K], tile)
    sD = gl.allocate_shared_memory(dtype, [1, V, K], tile)
    sP = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], tile)
    sdP = gl.allocate_shared_memory(dtype, [1, CHUNK, CHUNK], tile)
    sW = gl.allocate_shared_memory(dtype, [1, CHUNK, V], tile)
    sOut = gl.allocate_shared_memory(dtype, [1, CHUNK, K], tile)
    sB = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain)
    sG = sB
    sN = sB
    sV = sB
    if GATED:
        sG = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain)
        sN = gl.allocate_shared_memory(gl.float32, [2, CHUNK], plain)
        sV = gl.allocate_shared_memory(gl.float32, [2 * STATES, CHUNK], plain)
    sR = gl.allocate_shared_memory(gl.float32, [4 * STATES, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    bar: gl.constexpr = mbarrier.MBarrierLayout()
    bars = gl.allocate_shared_memory(gl.int64, [32, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(bars.index(LOADED_KEYS + i), count=33)  # the tiles, and each lane's copies
        mbarrier.init(bars.index(FREED_KEYS + i), count=1 + STATES)
        mbarrier.init(bars.index(LOADED_QUERIES + i), count=1)
        mbarrier.init(bars.index(FREED_QUERIES + i), count=1 + STATES)
    mbarrier.init(bars.index(LOADED_ERRORS), count=1)
    mbarrier.init(bars.index(FREED_ERRORS), count=1 + STATES)
    mbarrier.init(bars.index(LOADED_OUTS), count=33)
    mbarrier.init(bars.index(FREED_OUTS), count=1 + STATES)
    mbarrier.init(bars.index(LOADED_STATE), count=1)
    mbarrier.init(bars.index(FREED_STATE), count=1 + STATES if GATED else 1)
    mbarrier.init(bars.index(READY_P), count=1)
    mbarrier.init(bars.index(READY_D), count=STATES)
    mbarrier.init(bars.index(TAKEN_D), count=1)
    mbarrier.init(bars.index(READY_W), count=STATES)
    mbarrier.init(bars.index(TAKEN_W), count=2 if GATED else 1)
    mbarrier.init(bars.index(READY_G), count=1)
    mbarrier.init(bars.index(TAKEN_G), count=1)
    mbarrier.init(bars.index(READY_V), count=STATES)
    mbarrier.init(bars.index(USED_P), count=STATES)
    mbarrier.init(bars.index(LOADED_REST), count=32)

    tiles = (sQ, sK, sdO, sE, sS, sX, sB, sG, sP, sD, sW, sR, sN, sV, sdP, sOut)
    outputs = (dq, dk, dv, dq_at, dk_at, dv_at, dbeta + head, dg + head)
    columns = (key_column, key_stride, head)
    states = (dfinal + end_at, dinitial + state_at, part)
    span = (chunks, rows, first)
    before = (first // CHUNK - 1) * HV + head
    sources = (q, k, do, E, S, first_S, X, strength, G)
    places = (head, key_head, part, before * V, no_state, (sequence * HV + head) * V)
    if GATED and STATES == 2:
        gl.warp_specialize([
            (gradients, (tiles, bars, outputs, columns, span, scale, HV, K, V, GATED, RAGGED)),
            (state, (0, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (state, (1, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (load, (sources, tiles, bars, places, span, HV, K, V, GATED, INITIAL)),
            (load_rest, (dv_at, strength, head, sP, bars, span, HV, V)),
            (gate_gradient, (tiles, bars, outputs, span, HV, V)),
        ], [4, 4, 1, 1, 1], [STATE_REGISTERS, STATE_REGISTERS, 24, 24, 24])  # fmt: skip
    elif GATED:
        gl.warp_specialize([
            (gradients, (tiles, bars, outputs, columns, span, scale, HV, K, V, GATED, RAGGED)),
            (state, (0, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (load, (sources, tiles, bars, places, span, HV, K, V, GATED, INITIAL)),
            (load_rest, (dv_at, strength, head, sP, bars, span, HV, V)),
            (gate_gradient, (tiles, bars, outputs, span, HV, V)),
        ], [4, 1, 1, 1], [STATE_REGISTERS, 24, 24, 24])  # fmt: skip
    elif STATES == 2:
        gl.warp_specialize([
            (gradients, (tiles, bars, outputs, columns, span, scale, HV, K, V, GATED, RAGGED)),
            (state, (0, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (state, (1, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (load, (sources, tiles, bars, places, span, HV, K, V, GATED, INITIAL)),
            (load_rest, (dv_at, strength, head, sP, bars, span, HV, V)),
        ], [4, 4, 1, 1], [STATE_REGISTERS, STATE_REGISTERS, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (gradients, (tiles, bars, outputs, columns, span, scale, HV, K, V, GATED, RAGGED)),
            (state, (0, tiles, bars, states, chunks, scale, inverse_scale, K, V, GATED, RAGGED, FINAL, INITIAL)),
            (load, (sources, tiles, bars, places, span, HV, K, V, GATED, INITIAL)),
            (load_rest, (dv_at, strength, head, sP, bars, span, HV, V)),
        ], [4, 1, 1], [STATE_REGISTERS, 24, 24])  # fmt: skip


def takes(call: chunk_call.Call) -> bool:
    """Whether this backward runs a call: what was proven on a GPU, and is faster than the portable one there."""
    programs = (call.parts(call.segment) if call.segment else call.N) * call.HV
    return call.K == call.V and call.K in DIMS and programs >= FEWEST and in_32_bits(call)


def backward(
    call: chunk_call.Call, do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, scale: float, initial_state: Tensor | None,
    X: Tensor, b: Tensor, G: Tensor | None, M: Tensor | None, E: Tensor, S: Tensor, *,
    dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor | None, dinitial: Tensor | None,
) -> None:  # fmt: skip
    """Write every gradient. X to S are what the portable forward saved (chunk_call.unpack); tensors are contiguous and aligned, scale is not 0,
    and this thread has a CUDA context (chunk.py).
    """
    K, V, HV = call.K, call.V, call.HV
    grouped = HV != call.H
    parts = [q.new_empty(*dv.shape[:3], K) for _ in range(2)] if grouped else (dq, dk)
    keys = [tensor_map(x, call.H * K, CHUNK.value, K) for x in (q, k)] + [tensor_map(x, HV * K, CHUNK.value, K) for x in parts]
    values = [tensor_map(x, HV * V, CHUNK.value, V) for x in (do, E, dv)]
    states = tensor_map(S if S.shape[0] else S.new_empty(1, *S.shape[1:]), K, V, K)
    first = None if initial_state is None else tensor_map(initial_state.transpose(2, 3).to(q.dtype).contiguous(), K, V, K)
    ragged = call.packed or call.T % CHUNK.value != 0
    rest_of_X(call, k, b, G, X, dv)
    segment, places, ends = cut(call, q.device), call.N, dfinal
    if segment:
        places, ends = call.parts(segment), segment_ends(call, segment, q, k, do, b, G, X, dv, M, dfinal, scale)
    registers = STATE_REGISTERS if G is None else STATE_REGISTERS_GATED
    args = (
        keys[0], keys[1], values[0], values[1], states, first or states, keys[2], keys[3], values[2], *parts, dv, X, b,
        b if G is None else G, dbeta, b if dg is None else dg, b if ends is None else ends, b if dinitial is None else dinitial,
        *call.place, segment, states.shape[0], scale, 1.0 / scale,
    )  # fmt: skip
    key = ("hopper_backward", call.key, ragged, initial_state is None, ends is None, segment > 0, registers)
    launch(backward_kernel, key, (places * HV, 1, 1), args, CONFIG, lambda: dict(
        GATED=G is not None, RAGGED=ragged, INITIAL=dinitial is not None, FINAL=ends is not None,
        SPLIT=segment > 0, STATE_REGISTERS=registers, **call.sizes,
    ))  # fmt: skip

    if grouped:
        for gradient, part in zip((dq, dk), parts, strict=True):
            torch.sum(part.unflatten(2, (call.H, -1)), 3, out=gradient)
