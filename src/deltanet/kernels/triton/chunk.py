"""The chunked operator: which kernels run, in what order, over which memory. Two launches forward, two backward (16 bits: three), none per chunk.

    forward     transform -> X, beta in fp32, G;     forward -> o, final state, and for the backward E and the chunk states S
    backward    (16 bits) transform again -> what rounding X left, where betas are above 1
                state_gradient -> dv, dbeta, D, dinitial_state;     gradients -> dq, dk, dg

What is saved, in this order: X; beta in fp32 and, if gated, G; M, if sequences are cut into segments; E; S under "states". Under "lean"
S is computed again in the backward from k and E, one more launch. D, the state gradients, take no memory of their own when V <= 128 and
every key head has one value head: a chunk's D fits where its dq and dk will be written by the one program that reads it.

Few heads and long sequences leave most of the GPU idle; then the passes over states run on segments (chunk_segments.py).
"""

import torch
from torch import Tensor

from deltanet.kernels.launch import (
    CHUNK_FORWARD,
    CHUNK_GRADIENTS,
    CHUNK_GRADIENTS_GATED,
    CHUNK_STATE_GRADIENT,
    CHUNK_TRANSFORM,
    SEGMENT_CHAIN,
)
from deltanet.kernels.triton.chunk_call import CHUNK, ROUNDING_COUNTS, Call, or_stand_in, plain, saved, unpack
from deltanet.kernels.triton.chunk_gradients import gradients
from deltanet.kernels.triton.chunk_segments import chain
from deltanet.kernels.triton.chunk_state import forward
from deltanet.kernels.triton.chunk_state_gradient import state_gradient
from deltanet.kernels.triton.chunk_transform import transform
from deltanet.kernels.triton.compiled import launch, on_its_device, together

__all__ = ["chunk_backward", "chunk_forward", "saved"]

PRECISION = "tf32x3"  # of products with fp32 operands; 16-bit operands do not look at it


@on_its_device
def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    save: str,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """o `[B, T, HV, V]`, the final states or None, and what the backward needs (docs/conventions.md)."""
    q, k, v, beta, g, initial_state = (plain(x) for x in (q, k, v, beta, g, initial_state))
    call = Call.of(q, v, beta, g, cu_seqlens)
    if q.is_cuda:
        _compile_once(call, q, k, v, beta, g, initial_state, cu_seqlens, output_final_state, save)
    o = torch.empty_like(v)
    final = q.new_empty(call.states, dtype=torch.float32) if output_final_state else None
    kept, (X, b, G, M, E, S) = call.memory(q, v, g, save)
    if call.tokens == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return o, final, kept
    # bf16 keeps 8 bits of X and fp16 11, too few for long runs of alike keys at beta 2; here those that follow are read too
    X_low = torch.empty_like(X) if q.dtype in ROUNDING_COUNTS else None
    _transform(call, k, beta, g, b, G, X, X_low)
    starts = _segment_starts(call, k, v, b, G, X, X_low, M, initial_state)
    run_forward(
        call, q, k, v, b, G, X, X_low, initial_state if starts is None else starts, o, E, S, final, scale,
        split=starts is not None, final_of=0 if final is None else 1 if starts is None else 2,
    )  # fmt: skip
    return o, final, kept


@on_its_device
def chunk_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, beta, g and initial_state, each in the dtype of its tensor."""
    q, k, do = (plain(x) for x in (q, k, do))
    dfinal = None if dfinal_state is None else plain(dfinal_state.to(torch.float32))
    call = Call.of(q, v, beta, g, cu_seqlens)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, beta))
    dg = None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    if call.tokens == 0:
        if dinitial is not None:
            dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        return dq, dk, dv, dbeta, dg, dinitial
    if scale == 0.0:  # D is carried divided by scale; with no output there is nothing to divide
        do, scale = torch.zeros_like(do), 1.0
    X, b, G, M, E, S = unpack(saved, call, g)
    if S is None:
        S = q.new_empty(call.slots)
        run_forward(call, None, k, None, b, G, X, None, initial_state, None, E, S, None, scale, replay=True)

    block_v = min(call.pick(CHUNK_STATE_GRADIENT).block_v, call.BV)
    partial = q.new_empty((-(-call.V // block_v), call.HV, call.tokens), dtype=torch.float32)
    borrow = call.H == call.HV and call.V <= 2 * CHUNK
    D = (dq, dk) if borrow else (q.new_empty(call.slots), dk)
    X_low = _rest_of_X(call, k, beta, b, G, X, dv) if q.dtype in ROUNDING_COUNTS else None
    ends = segment_ends(call, q, k, v, do, b, G, X, X_low, M, dfinal, scale)
    _state_gradient(
        call, q, k, do, E, b, G, X, X_low, dfinal if ends is None else ends, dv, partial, D, dinitial, scale,
        borrow=borrow, split=ends is not None, initial_of=0 if dinitial is None else 1 if ends is None else 2,
    )  # fmt: skip
    parts = run_gradients(call, q, k, do, E, dv, b, G, S, D, initial_state, dfinal, partial, dq, dk, dbeta, scale, borrow=borrow)
    if dg is not None:
        dg.copy_(parts[0] if parts.shape[0] == 1 else parts.sum(0))
    return dq, dk, dv, dbeta, dg, dinitial


_compiled: set[tuple] = set()  # what has been compiled, forward and backward


def _compile_once(call: Call, q, k, v, beta, g, initial_state, cu_seqlens, output_final_state: bool, save: str) -> None:
    """On the first call of a kind, compile its kernels side by side, those of the coming backward too."""
    key = (call.key, initial_state is not None, output_final_state, save, call.segment > 0)
    if key in _compiled or torch.cuda.is_current_stream_capturing():
        return
    _compiled.add(key)

    def run() -> None:
        o, final, kept = chunk_forward(
            q, k, v, beta, g, 1.0, initial_state, cu_seqlens, output_final_state=output_final_state, save=save
        )
        if save != "nothing":
            chunk_backward(o, final, q, k, v, beta, g, 1.0, initial_state, cu_seqlens, kept)

    together(run)


def _transform(call: Call, k, beta, g, b, G, X, X_low) -> None:
    config = call.pick(CHUNK_TRANSFORM)
    args = (k, beta, *or_stand_in(k, g), b, *or_stand_in(k, G), X, *or_stand_in(X, X_low), *call.place)
    key = ("transform", call.key, X_low is None)
    launch(transform, key, (call.parts(CHUNK), call.HV, 1), args, config, lambda: dict(
        H=call.H, HV=call.HV, K=call.K, PACKED=call.packed, GATED=g is not None, REST=X_low is not None, LOW=0, TILE=0,
        ALWAYS_PRECISE=call.itemsize == 4, WIDTH=config.block_k, PRECISION=PRECISION,
    ))  # fmt: skip


def _rest_of_X(call: Call, k, beta, b, G, X, dv) -> Tensor:
    """What rounding left of X in chunks with a beta above 1, solved for again rather than kept: elsewhere the launch costs next to nothing.

    It needs no memory where tiles of V are whole: each program of state_gradient has its own copy where it will write dv of the same chunk.
    """
    config, block_v = call.pick(CHUNK_TRANSFORM), min(call.pick(CHUNK_STATE_GRADIENT).block_v, call.BV)
    tile = max(block_v, CHUNK)
    low = dv if block_v == tile and call.V % tile == 0 else dv.new_empty(call.tokens, call.HV, -(-call.V // block_v) * tile)
    args = (k, plain(beta), k, b, *or_stand_in(k, G), X, low, *call.place)
    launch(transform, ("rest of X", call.key), (call.parts(CHUNK), call.HV, 1), args, config, lambda: dict(
        H=call.H, HV=call.HV, K=call.K, PACKED=call.packed, GATED=G is not None, REST=True, LOW=low.shape[-1], TILE=tile,
        ALWAYS_PRECISE=True, WIDTH=config.block_k, PRECISION=PRECISION,
    ))  # fmt: skip
    return low


def run_forward(
    call: Call, q, k, v, b, G, X, X_low, initial, o, E, S, final, scale, *,
    split: bool = False, final_of: int = 0, replay: bool = False, transition: bool = False,
) -> None:  # fmt: skip
    config = call.pick(CHUNK_FORWARD)
    V, BV = (call.K, call.BK) if transition else (call.V, call.BV)
    BV = min(config.block_v, BV)
    segment = call.segment if split else 0
    programs = (call.parts(segment) if split else call.N) * -(-V // BV)
    flags = (X_low is None, initial is None, o is None, E is None, S is None, final_of, split, replay, transition)
    args = (*or_stand_in(k, q, k, v, b, G, X, X_low, initial, o, E, S, final), *call.place, segment, scale)
    launch(forward, ("forward", call.key, flags), (programs, call.HV, 1), args, config, lambda: dict(
        H=call.H, HV=call.HV, K=call.K, V=V, BK=call.BK, BV=BV, SPLIT=split, PACKED=call.packed, GATED=G is not None,
        REST=X_low is not None, INITIAL=initial is not None, TRANSITION=transition, REPLAY=replay, OUTPUT=o is not None,
        SAVE_E=E is not None and not replay, SAVE_S=S is not None, FINAL=final_of, PRECISION=PRECISION,
    ))  # fmt: skip


def _state_gradient(
    call: Call, q, k, do, E, b, G, X, X_low, dfinal, dv, partial, D, dinitial, scale, *,
    borrow: bool = False, split: bool = False, initial_of: int = 0,
) -> None:  # fmt: skip
    config = call.pick(CHUNK_STATE_GRADIENT)
    BV = min(config.block_v, call.BV)
    segment = call.segment if split else 0
    programs = (call.parts(segment) if split else call.N) * -(-call.V // BV)
    flags = (X_low is None, dfinal is None, dv is None, initial_of, split, borrow)
    args = (*or_stand_in(k, q, k, do, E, b, G, X, X_low, dfinal, dv, partial, *D, dinitial), *call.place, segment, scale, 1.0 / scale)
    launch(state_gradient, ("state_gradient", call.key, flags), (programs, call.HV, 1), args, config, lambda: dict(
        BK=call.BK, BV=BV, SPLIT=split, GATED=G is not None, FINAL=dfinal is not None, INITIAL=initial_of,
        OUTPUT=dv is not None, LOW=0 if X_low is None else X_low.shape[-1], BORROW=borrow, PRECISION=PRECISION, **call.sizes,
    ))  # fmt: skip


def run_gradients(
    call: Call, q, k, do, E, dv, b, G, S, D, initial, dfinal, partial, dq, dk, dbeta, scale, *, borrow: bool
) -> Tensor | None:  # fmt: skip
    """Writes dq, dk, dbeta; returns dg as `[tiles of K, B, T, HV]`, to be summed."""
    config = call.pick(CHUNK_GRADIENTS if G is None else CHUNK_GRADIENTS_GATED)
    BK, BV = min(config.block_k, call.BK), min(config.block_v, call.BV)
    tiles = -(-call.K // BK)
    first_S = None if initial is None else initial.transpose(2, 3).to(q.dtype).contiguous()
    last_D = None if dfinal is None else (dfinal / scale).transpose(2, 3).to(q.dtype).contiguous()
    dg = None if G is None else q.new_empty((tiles, *dbeta.shape), dtype=torch.float32)
    flags = (initial is None, dfinal is None, partial.shape[0], borrow)
    args = (*or_stand_in(k, q, k, do, E, dv, b, G, S, *D, first_S, last_D, partial, dq, dk, dbeta, dg), *call.place, scale)
    launch(gradients, ("gradients", call.key, flags), (tiles * call.parts(CHUNK), call.H, 1), args, config, lambda: dict(
        BK=BK, BV=BV, PARTIALS=partial.shape[0], GATED=G is not None, INITIAL=initial is not None, FINAL=dfinal is not None,
        BORROW=borrow, PRECISION=PRECISION, **call.sizes,
    ))  # fmt: skip
    return dg


def _segment_starts(call: Call, k, v, b, G, X, X_low, M, initial) -> Tensor | None:
    """The state at the start of each segment, or None where sequences are not cut. Fills M, what each segment does to a state."""
    if M is None:
        return None
    N = k.new_empty((call.parts(call.segment), *call.states[1:]), dtype=torch.float32)
    run_forward(call, None, k, v, b, G, X, X_low, None, None, None, None, N, 1.0, split=True, final_of=1)
    run_forward(call, None, k, None, b, G, X, X_low, None, None, None, None, M, 1.0, split=True, final_of=1, transition=True)
    return chain_segments(call, M, N, initial, backwards=False)


def segment_ends(call: Call, q, k, v, do, b, G, X, X_low, M, dfinal, scale) -> Tensor | None:
    """The state gradient at the end of each segment, or None where sequences are not cut."""
    if M is None:
        return None
    d = k.new_empty((call.parts(call.segment), *call.states[1:]), dtype=torch.float32)
    _state_gradient(call, q, k, do, None, b, G, X, X_low, None, None, None, (None, None), d, scale, split=True, initial_of=1)
    return chain_segments(call, M, d, dfinal, backwards=True)


def chain_segments(call: Call, M, N, given, *, backwards: bool) -> Tensor:
    out = torch.empty_like(N)
    config = SEGMENT_CHAIN[call.BK]
    args = (M, N, *or_stand_in(N, given), out, call.place[0], call.T, call.segment)
    key = ("chain", call.key, given is None, backwards)
    launch(chain, key, (call.N * -(-call.V // config.block_v), call.HV, 1), args, config, lambda: dict(
        HV=call.HV, K=call.K, V=call.V, BK=call.BK, BV=config.block_v, STEP=config.block_k, PACKED=call.packed,
        GIVEN=given is not None, BACKWARDS=backwards, PRECISION=PRECISION,
    ))  # fmt: skip
    return out
