"""The delta rule by chunks: the WY/UT form in three stages, vectorised over chunks and heads, with the backward written out.

Per chunk, rows are tokens, S is the state at the chunk's start (K x V), b = beta, G the running sum of g inside the chunk, D = dLoss/dS at its end:

    chunk_transform  L = strict_tril(K K^T e^{G_i - G_j}),   X = (I + L diag(b))^-1 L
    chunk_state      W = V - e^G (K S),   E = W - X (b W),   S <- e^{G_C} S + (e^{G_C - G} K)^T (b E)
    chunk_output     P = tril(Q K^T e^{G_i - G_j}),   O = scale (e^G (Q S) + P (b E))

X carries no beta, so its entries stay within [-1, 1] for normalised keys and beta in [0, 2], and the backward needs no division by beta.
E is the prediction error of each token, which the backward reuses instead of v. Derivation, backward included: docs/math.md.
Source: Yang et al. 2024 (arXiv 2406.06484), equations 8-11, rearranged.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deltanet.reference.recurrent import work_dtype

__all__ = ["CHUNK", "backward", "chunk_output", "chunk_state", "chunk_transform", "forward", "saved"]

CHUNK = (
    64  # the kernels' chunk length, so that both have the same stages; on a CPU 32 to 128 run within 10% of each other
)


def count_chunks(batch: int, tokens: int, packed: int | None, chunk: int = CHUNK) -> int:
    """M: chunks of a dense batch, or the most that `packed` sequences of `tokens` tokens in all can have."""
    return batch * -(-tokens // chunk) if packed is None else (tokens + packed * (chunk - 1)) // chunk


Step = tuple[slice | Tensor, slice]  # (the c-th chunk of every sequence that has one, those sequences)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the chunks of a batch lie. Chunks never cross sequences; the last one of a sequence is filled up with empty tokens.

    `index` [M, C] names the token of every chunk row, or -1; None when the sequences are dense and equally long.
    M is an upper bound that shapes alone decide, so that what the backward needs has a shape that tracing can know.
    """

    batch: int
    tokens: int
    index: Tensor | None
    steps: list[Step]
    order: Tensor | None  # sequences from longest to shortest, the order in which `steps` counts them
    chunk: int = CHUNK

    @staticmethod
    def of(batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device, chunk: int = CHUNK) -> "Layout":
        if cu_seqlens is None:
            count = -(-tokens // chunk)
            return Layout(
                batch, tokens, None, [(slice(c, None, count), slice(None)) for c in range(count)], None, chunk
            )
        bounds = cu_seqlens.to("cpu", torch.int64)
        lengths = bounds.diff()
        counts = (lengths + chunk - 1) // chunk
        order = counts.argsort(descending=True, stable=True)
        first = counts.cumsum(0) - counts
        total = int(counts.sum())
        bound = count_chunks(batch, tokens, len(lengths), chunk)
        row = torch.arange(total) - first.repeat_interleave(counts)  # each chunk's place within its sequence
        index = (bounds[:-1].repeat_interleave(counts) + row * chunk)[:, None] + torch.arange(chunk)
        index = torch.where(index < bounds[1:].repeat_interleave(counts)[:, None], index, -1)
        index = torch.nn.functional.pad(index, (0, 0, 0, bound - total), value=-1)
        steps: list[Step] = []
        for c in range(int(counts.max()) if len(counts) else 0):
            active = int((counts > c).sum())
            steps.append(((first[order[:active]] + c).to(device), slice(0, active)))
        return Layout(batch, tokens, index.to(device), steps, order.to(device), chunk)

    @cached_property
    def sequences(self) -> int:
        return self.batch if self.order is None else len(self.order)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, H, ...]` -> `[M, H, C, ...]`, empty tokens zero."""
        if self.index is None:
            fill = len(self.steps) * self.chunk - self.tokens
            x = torch.nn.functional.pad(x.to(dtype), (0, 0) * (x.ndim - 2) + (0, fill))
            x = x.reshape(self.batch * len(self.steps), self.chunk, *x.shape[2:])
        else:
            x = torch.cat([x[0].to(dtype), x.new_zeros(1, *x.shape[2:], dtype=dtype)])[self.index]
        return x.transpose(1, 2)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[M, H, C, ...]` -> `[B, T, H, ...]`, the inverse of `split`."""
        x = x.transpose(1, 2)
        if self.index is None:
            x = x.reshape(self.batch, len(self.steps) * self.chunk, *x.shape[2:])[:, : self.tokens]
        else:
            rows = x.reshape(-1, *x.shape[2:])[self.index.reshape(-1) >= 0]  # chunks are in token order
            x = rows[None]
        return x.to(dtype).contiguous()

    def sort(self, state: Tensor) -> Tensor:
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)


@dataclass(frozen=True, eq=False)
class Decay:
    """The decays inside a chunk, from g `[M, H, C]`; every exponent is a difference that is at most 0, taken before exp."""

    pairs: Tensor  # [M, H, C, C]  e^{G_i - G_j} for i >= j, else 0
    start: Tensor  # [M, H, C, 1]  e^{G_i}: from the chunk's start to the token
    end: Tensor  # [M, H, C, 1]    e^{G_C - G_i}: from the token to the chunk's end
    whole: Tensor  # [M, H, 1, 1]  e^{G_C}

    @staticmethod
    def of(g: Tensor | None) -> "Decay | None":
        if g is None:
            return None
        G = g.cumsum(-1)
        below = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
        pairs = (G[..., :, None] - G[..., None, :]).masked_fill(~below, -torch.inf).exp()
        last = G[..., -1:]
        return Decay(pairs, G.exp()[..., None], (last - G).exp()[..., None], last.exp()[..., None])


def _start(x: Tensor, decay: Decay | None) -> Tensor:
    return x if decay is None else x * decay.start


def _end(x: Tensor, decay: Decay | None, at: slice | Tensor) -> Tensor:
    return x if decay is None else x * decay.end[at]


def _tril(x: Tensor, decay: Decay | None, diagonal: int = 0) -> Tensor:
    return (x if decay is None else x * decay.pairs).tril(diagonal)


def chunk_transform(k: Tensor, beta: Tensor, decay: Decay | None) -> Tensor:
    """X = (I + L diag(beta))^-1 L `[M, H, C, C]`, strictly lower. k `[M, H, C, K]`, beta `[M, H, C, 1]`. math.md 3.1"""
    L = _tril(k @ k.mT, decay, -1)
    return torch.linalg.solve_triangular(L * beta.mT, L, upper=False, unitriangular=True)


def chunk_state(
    k: Tensor, v: Tensor, beta: Tensor, X: Tensor, decay: Decay | None, state: Tensor, steps: list[Step]
) -> tuple[Tensor, Tensor, Tensor]:
    """The only pass that is sequential, over chunks: errors E `[M, H, C, V]`, states at chunk starts `[M, H, K, V]`, final states. math.md 3.2"""
    E = torch.zeros_like(v, memory_format=torch.contiguous_format)
    states = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
    state = state.clone()
    for at, active in steps:
        S = states[at] = state[active]
        read = k[at] @ S
        W = v[at] - (read if decay is None else decay.start[at] * read)
        error = E[at] = W - X[at] @ (beta[at] * W)
        S = S if decay is None else decay.whole[at] * S
        state[active] = S + _end(k[at], decay, at).mT @ (beta[at] * error)
    return E, states, state


def chunk_output(
    q: Tensor, k: Tensor, E: Tensor, beta: Tensor, decay: Decay | None, states: Tensor, scale: float
) -> Tensor:
    """o `[M, H, C, V]`, every chunk at once. math.md 3.3"""
    P = _tril(q @ k.mT, decay)
    return scale * (_start(q @ states, decay) + P @ (beta * E))


def _chunked(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Decay | None]:
    work, group = work_dtype(q.dtype), v.shape[2] // q.shape[2]
    q, k = (layout.split(x if group == 1 else x.repeat_interleave(group, dim=2), work) for x in (q, k))
    gate = None if g is None else layout.split(g, work)
    return q, k, layout.split(v, work), layout.split(beta, work)[..., None], gate, Decay.of(gate)


def _initial(layout: Layout, k: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return v.new_zeros(layout.sequences, v.shape[1], k.shape[-1], v.shape[-1])
    return layout.sort(initial_state.to(v.dtype))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool = True,
    save: str = "nothing",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """o `[B, T, HV, V]`, the final states, and what `backward` needs: X, E and, unless `save` is "lean", the chunk states."""
    layout = Layout.of(q.shape[0], q.shape[1], cu_seqlens, q.device, chunk)
    Q, Kc, Vc, b, _, decay = _chunked(layout, q, k, v, beta, g)
    X = chunk_transform(Kc, b, decay)
    E, states, final = chunk_state(Kc, Vc, b, X, decay, _initial(layout, Kc, Vc, initial_state), layout.steps)
    o = layout.join(chunk_output(Q, Kc, E, b, decay, states, scale), v.dtype)
    saved = {"nothing": [], "lean": [X, E], "states": [X, E, states]}[save]
    return o, layout.unsort(final) if output_final_state else None, [x.contiguous() for x in saved]


def backward(
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
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, beta, g, initial_state. One pass over chunks in reverse for the state, the rest at once. math.md 4"""
    layout = Layout.of(q.shape[0], q.shape[1], cu_seqlens, q.device, chunk)
    Q, Kc, Vc, b, gate, decay = _chunked(layout, q, k, v, beta, g)
    X, E, *rest = saved
    if rest:
        states = rest[0]
    else:
        _, states, _ = chunk_state(Kc, Vc, b, X, decay, _initial(layout, Kc, Vc, initial_state), layout.steps)
    dO = scale * layout.split(do, Q.dtype)

    # The state's gradient, from the last chunk to the first; D_end[c] is dLoss/d(state after chunk c).
    D = _initial(layout, Kc, Vc, dfinal_state).clone()
    D_end, dV, dbeta = torch.zeros_like(states), torch.zeros_like(E), torch.zeros_like(b)
    Q_start, K_start, dV_out = _start(Q, decay), _start(Kc, decay), _tril(Q @ Kc.mT, decay).mT @ dO
    for at, active in reversed(layout.steps):
        D_end[at] = D[active]
        adjoint = _end(Kc[at] @ D[active], decay, at) + dV_out[at]  # dLoss/d(b E)
        H = adjoint - X[at].mT @ (b[at] * adjoint)  # the solve's adjoint: the same X, transposed
        dbeta[at] = (E[at] * H).sum(-1, keepdim=True)
        dV[at] = b[at] * H
        kept = D[active] if decay is None else decay.whole[at] * D[active]
        D[active] = kept + Q_start[at].mT @ dO[at] - K_start[at].mT @ dV[at]

    written = b * E
    dP, dL = _tril(dO @ written.mT, decay), -_tril(dV @ written.mT, decay, -1)
    dQ = _start(dO @ states.mT, decay) + dP @ Kc
    dK = dP.mT @ Q + (dL + dL.mT) @ Kc - _start(dV @ states.mT, decay)
    to_end = written @ D_end.mT
    dK = dK + (to_end if decay is None else decay.end * to_end)

    dg = None
    if gate is not None and g is not None:
        dG = (Q * dQ).sum(-1) - (Vc * dV).sum(-1)
        dG[..., -1] += _final_product(layout, Kc, E, b, decay, states, D_end)
        dg = layout.join(dG.flip(-1).cumsum(-1).flip(-1), g.dtype)
    dstate = None if initial_state is None else layout.unsort(D).to(initial_state.dtype)
    group = v.shape[2] // q.shape[2]
    dq, dk = (_fold(layout.join(x, q.dtype if group == 1 else x.dtype), group, q.dtype) for x in (dQ, dK))
    return dq, dk, layout.join(dV, v.dtype), layout.join(dbeta[..., 0], beta.dtype), dg, dstate


def saved(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, save: str) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that `forward` saves: X `[M, HV, C, C]`, E `[M, HV, C, V]`, states `[M, HV, K, V]`."""
    M = count_chunks(q.shape[0], q.shape[1], None if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    shapes = {"nothing": [], "lean": [(CHUNK, CHUNK), (CHUNK, v.shape[3])]}
    shapes["states"] = [*shapes["lean"], (q.shape[3], v.shape[3])]
    return [v.new_empty(M, v.shape[2], *shape, dtype=work_dtype(q.dtype)) for shape in shapes[save]]


def _final_product(
    layout: Layout, k: Tensor, E: Tensor, b: Tensor, decay: Decay | None, states: Tensor, D_end: Tensor
) -> Tensor:
    """<state after the chunk, its gradient> `[M, H]`: how the loss depends on the chunk's whole decay."""
    assert decay is not None
    after = decay.whole * states + (decay.end * k).mT @ (b * E)
    return (after * D_end).sum((-2, -1))


def _fold(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of the value heads that share a key head: `[B, T, HV, K]` -> `[B, T, H, K]`."""
    return x if group == 1 else x.unflatten(2, (-1, group)).sum(3).to(dtype)
