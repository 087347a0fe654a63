"""The chunked operator: which kernels run, in what order, over which memory. Four launches forward and backward, none of them per chunk.

    forward     chunk_transform -> X (and G);     forward -> o, final state, and for the backward E and the chunk states S
    backward    state_gradient -> dv, dbeta, D, dinitial_state;     gradients -> dq, dk, dg

What is saved, in this order: X; beta in fp32 and, if gated, G; E; S under "states".
Under "lean" S is computed again in the backward from k and E, one more launch.
D, the state gradients, take no memory of their own when V <= 128 and every key head has one value head: a chunk's D fits where its
dq and dk will be written by the one program that reads it.
"""

import torch
import triton
from torch import Tensor

from deltanet.kernels.launch import (
    CHUNK_BACKWARD,
    CHUNK_FORWARD,
    CHUNK_GRADIENTS,
    CHUNK_TRANSFORM,
    LaunchConfig,
    Table,
)
from deltanet.kernels.triton.chunk_backward import state_gradient
from deltanet.kernels.triton.chunk_forward import forward
from deltanet.kernels.triton.chunk_gradients import gradients
from deltanet.kernels.triton.chunk_transform import transform

__all__ = ["chunk_backward", "chunk_forward", "saved"]

CHUNK = 64
PACKED_ROW = 48  # elements of X per token: of a chunk's 64 x 64, the upper right quarter is zero and not stored
PRECISION = "tf32x3"  # of products with fp32 operands; 16-bit operands do not look at it


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
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    g = None if g is None else g.contiguous()
    shape = _Shape(q, v, cu_seqlens)
    o = torch.empty_like(v)
    final = q.new_empty(shape.states, dtype=torch.float32) if output_final_state else None
    kept = saved(q, v, g, save)
    if shape.tokens == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return o, final, kept
    X, b, E, G, S = _unpack(kept if save != "nothing" else saved(q, v, g, save, X_only=True), g)
    _transform(shape, k, beta, g, b, G, X)
    _forward(shape, q, k, v, b, G, X, initial_state, o, E, S, final, scale)
    return o, final, kept


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
    q, k, beta, do = (x.contiguous() for x in (q, k, beta, do))
    dfinal_state = None if dfinal_state is None else dfinal_state.to(torch.float32).contiguous()
    shape = _Shape(q, v, cu_seqlens)
    dq, dk, dbeta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(beta)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dg = None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    if shape.tokens == 0:
        if dinitial is not None:
            dinitial.zero_() if dfinal_state is None else dinitial.copy_(dfinal_state)
        return dq, dk, dv, dbeta, dg, dinitial
    if scale == 0.0:  # D is carried divided by scale; with no output there is nothing to divide
        do, scale = torch.zeros_like(do), 1.0
    X, b, E, G, S = _unpack(saved, g)
    if S is None:
        S = q.new_empty(shape.slots)
        _forward(shape, None, k, None, b, G, X, initial_state, None, E, S, None, scale, replay=True)

    block_v = min(_pick(CHUNK_BACKWARD, q).block_v, _width(shape.V))
    partial = q.new_empty((-(-shape.V // block_v), shape.HV, shape.tokens), dtype=torch.float32)
    borrow = shape.H == shape.HV and shape.V <= 2 * CHUNK
    D, D_high = (dq, dk) if borrow else (q.new_empty(shape.slots), dk)
    _state_gradient(
        shape, q, k, do, E, b, G, X, dfinal_state, dv, partial, D, D_high, dinitial, scale, block_v, borrow
    )
    dg_parts = _gradients(
        shape, q, k, do, E, dv, b, G, S, D, D_high, initial_state, dfinal_state, partial, dq, dk, dbeta, scale, borrow
    )
    if dg is not None:
        dg.copy_(dg_parts[0] if dg_parts.shape[0] == 1 else dg_parts.sum(0))
    return dq, dk, dv, dbeta, dg, dinitial


def saved(q: Tensor, v: Tensor, g: Tensor | None, save: str, *, X_only: bool = False) -> list[Tensor]:
    """What a forward keeps under `save`, as empty tensors; with X_only, what it needs in between when it keeps nothing."""
    if save == "nothing" and not X_only:
        return []
    tokens, HV = v.shape[0] * v.shape[1], v.shape[2]
    # |X| <= 1, so of two 16-bit formats fp16 holds it better: 3 bits more, which long runs of alike keys at beta 2 do need
    X = q.new_empty(HV, tokens * PACKED_ROW, dtype=torch.float16 if q.element_size() == 2 else q.dtype)
    b_G = [q.new_empty(HV, tokens, dtype=torch.float32) for _ in range(1 + (g is not None))]
    if X_only:
        return [X, *b_G]
    E = torch.empty_like(v, memory_format=torch.contiguous_format)
    return [X, *b_G, E, *([q.new_empty(_slots(q, v))] if save == "states" else [])]


def _unpack(kept: list[Tensor], g: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """X, b, E, G, S of a list that `saved` made; None for what is not there."""
    rest = iter(kept)
    X = next(rest)
    b = next(rest)
    G = None if g is None else next(rest)
    E = next(rest, None)
    return X, b, E, G, next(rest, None)


def _slots(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Shape of the chunk states: at most one for every 64 tokens, however these divide into sequences (tiles.py)."""
    return (q.shape[0] * q.shape[1] - 1) // CHUNK, v.shape[2], v.shape[3], q.shape[3]


class _Shape:
    """Sizes of one call, and the scalars by which a kernel finds its place."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None):
        B, T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2], v.shape[3]
        self.tokens = B * T
        self.packed = cu_seqlens is not None
        self.N = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else B
        self.states = (self.N, self.HV, self.K, self.V)
        self.slots = _slots(q, v)
        self.chunks = T // CHUNK + self.N if self.packed else B * -(-T // CHUNK)
        self.place = (cu_seqlens, self.N, self.N.bit_length(), T)


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with a pointer that no kernel will follow where there is none."""
    return [stand_in if x is None else x for x in tensors]


def _width(dim: int) -> int:
    return max(64, 1 << (dim - 1).bit_length())


def _pick(table: Table, q: Tensor) -> LaunchConfig:
    return table[q.element_size(), _width(q.shape[-1])]


def _options(config: LaunchConfig) -> dict[str, int]:
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers:
        options["maxnreg"] = config.registers
    return options


def _transform(shape: _Shape, k, beta, g, b, G, X) -> None:
    transform[(shape.chunks, shape.HV)](
        k, beta, *_or(k, g), b, *_or(k, G), X, *shape.place, shape.tokens,
        H=shape.H, HV=shape.HV, K=shape.K, WIDTH=_pick(CHUNK_TRANSFORM, k).block_k, ALWAYS_PRECISE=k.element_size() == 4, PACKED=shape.packed, GATED=g is not None,
        PRECISION=PRECISION, **_options(_pick(CHUNK_TRANSFORM, k)),
    )  # fmt: skip


def _forward(shape: _Shape, q, k, v, b, G, X, initial, o, E, S, final, scale, *, replay: bool = False) -> None:
    config = _pick(CHUNK_FORWARD, k)
    block_v = min(config.block_v, _width(shape.V))
    forward[(shape.N * -(-shape.V // block_v), shape.HV)](
        *_or(k, q, k, v, b, G, X, initial, o, E, S, final), *shape.place, shape.tokens, scale,
        H=shape.H, HV=shape.HV, K=shape.K, V=shape.V, BK=_width(shape.K), BV=block_v, SEGMENT=0, PACKED=shape.packed,
        GATED=G is not None, INITIAL=initial is not None, TRANSITION=False, REPLAY=replay,
        OUTPUT=o is not None, SAVE_E=E is not None and not replay, SAVE_S=S is not None, FINAL=final is not None,
        PRECISION=PRECISION, **_options(config),
    )  # fmt: skip


def _state_gradient(
    shape: _Shape, q, k, do, E, b, G, X, dfinal, dv, partial, D, D_high, dinitial, scale, block_v: int, borrow: bool
) -> None:  # fmt: skip
    state_gradient[(shape.N * partial.shape[0], shape.HV)](
        q, k, do, E, b, *_or(k, G), X, *_or(k, dfinal), dv, partial, D, D_high, *_or(k, dinitial),
        *shape.place, shape.tokens, scale, 1.0 / scale,
        H=shape.H, HV=shape.HV, K=shape.K, V=shape.V, BK=_width(shape.K), BV=block_v, SEGMENT=0, PACKED=shape.packed,
        GATED=G is not None, FINAL=dfinal is not None, INITIAL=dinitial is not None, OUTPUT=True,
        BORROW=borrow, PRECISION=PRECISION, **_options(_pick(CHUNK_BACKWARD, q)),
    )  # fmt: skip


def _gradients(
    shape: _Shape, q, k, do, E, dv, b, G, S, D, D_high, initial, dfinal, partial, dq, dk, dbeta, scale, borrow: bool
) -> Tensor | None:  # fmt: skip
    config = _pick(CHUNK_GRADIENTS, q)
    block_k = min(config.block_k, _width(shape.K))
    tiles = -(-shape.K // block_k)
    first_S = None if initial is None else initial.transpose(2, 3).to(q.dtype).contiguous()
    last_D = None if dfinal is None else (dfinal / scale).transpose(2, 3).to(q.dtype).contiguous()
    dg = None if G is None else q.new_empty((tiles, *dbeta.shape), dtype=torch.float32)
    gradients[(tiles * shape.chunks, shape.H)](
        q, k, do, E, dv, b, *_or(k, G), S, D, D_high, *_or(k, first_S, last_D), partial, dq, dk, dbeta, *_or(k, dg),
        *shape.place, shape.tokens, scale,
        H=shape.H, HV=shape.HV, K=shape.K, V=shape.V, BK=block_k, BV=min(config.block_v, _width(shape.V)),
        PARTIALS=partial.shape[0], PACKED=shape.packed, GATED=G is not None, INITIAL=initial is not None,
        FINAL=dfinal is not None, BORROW=borrow, APART=config.apart, PRECISION=PRECISION, **_options(config),
    )  # fmt: skip
    return dg
