"""THE DEFINITION of the delta rule, one token at a time. Everything else in this project is checked against this file.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T        S in R^{K x V}
    o_t = scale * S_t^T q_t                                                     read after the write

Source: Yang et al. 2024 (arXiv 2406.06484), section 2.2; with the gate, Yang et al. 2024 (arXiv 2412.06464), eq. 10.
Any float dtype: fp64 computes and keeps its state in fp64 (for proofs), every other dtype in fp32.
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["backward", "delta_rule", "delta_step", "work_dtype"]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and sums are kept in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: q, k `[..., K]`, v `[..., V]`, beta, g `[...]`, state `[..., K, V]` -> o `[..., V]`, the new state."""
    if g is not None:
        state = state * g.exp()[..., None, None]
    predicted = (k[..., None, :] @ state).squeeze(-2)
    state = state + k[..., :, None] * (beta[..., None] * (v - predicted))[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, differentiable by autograd to any order.

    Shapes as in docs/conventions.md: q, k `[B, T, H, K]`, v `[B, T, HV, V]`, beta, g `[B, T, HV]`, initial_state `[N, HV, K, V]`.
    Returns o `[B, T, HV, V]` in v's dtype and the final states `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs).
    """
    work = work_dtype(q.dtype)
    group = v.shape[2] // q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.to(work).repeat_interleave(group, dim=2) for x in (q, k))
    values, beta = v.to(work), beta.to(work)
    g = None if g is None else g.to(work)
    if cu_seqlens is None:
        state = _zeros_or(initial_state, (v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]), values)
        o, state = _run(q, k, values, beta, g, scale, state)
        return o.to(v.dtype), state

    bounds = cu_seqlens.tolist()
    states = _zeros_or(initial_state, (len(bounds) - 1, v.shape[2], q.shape[-1], v.shape[-1]), values)
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        part = slice(start, end)
        gate = None if g is None else g[:, part]
        o, state = _run(q[:, part], k[:, part], values[:, part], beta[:, part], gate, scale, states[n : n + 1])
        outputs.append(o)
        finals.append(state)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(finals)


def _zeros_or(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if state is None else state.to(like.dtype)


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    state = state.clone()  # the result is new even when there is no token
    for t in range(q.shape[1]):
        o, state = delta_step(q[:, t], k[:, t], v[:, t], beta[:, t], None if g is None else g[:, t], scale, state)
        outputs.append(o)
    return torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape), state


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, beta, g, initial_state, token by token in reverse. D is dLoss/dS_t, e_t the prediction error. math.md 2

    Keeps the state of every token, so it is for short sequences; autograd through `delta_rule` gives the same.
    """
    work, group = work_dtype(q.dtype), v.shape[2] // q.shape[2]
    Q, K = (x.to(work).repeat_interleave(group, dim=2) for x in (q, k))
    V, b, dO = v.to(work), beta.to(work)[..., None], scale * do.to(work)
    decay = torch.ones_like(b) if g is None else g.to(work).exp()[..., None]
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    shape = (v.shape[0] if cu_seqlens is None else len(bounds) - 1, v.shape[2], q.shape[-1], v.shape[-1])
    starts, D_all = _zeros_or(initial_state, shape, V), _zeros_or(dfinal_state, shape, V).clone()
    dQ, dK, dV, dbeta, dg = (torch.zeros_like(x) for x in (Q, K, V, b, b))
    for n, (start, end) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        S, D = starts[rows], D_all[rows]
        decayed, errors = [], []
        for t in range(start, end):
            S = decay[:, t, :, :, None] * S
            e = V[:, t] - (K[:, t, :, None] @ S).squeeze(-2)
            decayed.append(S)
            errors.append(e)
            S = S + K[:, t, :, :, None] * (b[:, t] * e)[..., None, :]
        for t in reversed(range(start, end)):
            k_t, e, before = K[:, t], errors[t - start], decayed[t - start]
            dQ[:, t] = (S @ dO[:, t, :, :, None]).squeeze(-1)
            D = D + Q[:, t, :, :, None] * dO[:, t, :, None, :]
            H = (k_t[..., None, :] @ D).squeeze(-2)  # dLoss/d(beta e)
            dbeta[:, t] = (e * H).sum(-1, keepdim=True)
            dV[:, t] = b[:, t] * H  # the error's gradient is the value's
            dK[:, t] = (D @ (b[:, t] * e)[..., None]).squeeze(-1) - (before @ dV[:, t, :, :, None]).squeeze(-1)
            D = D - k_t[..., None] * dV[:, t, :, None, :]
            dg[:, t] = (D * before).sum((-2, -1))[..., None]
            D = decay[:, t, :, :, None] * D
            S = (
                starts[rows]
                if t == start
                else decayed[t - start - 1]
                + K[:, t - 1, :, :, None] * (b[:, t - 1] * errors[t - start - 1])[..., None, :]
            )
        D_all[rows] = D
    dQ, dK = (x if group == 1 else x.unflatten(2, (-1, group)).sum(3) for x in (dQ, dK))
    gate = None if g is None else dg[..., 0].to(g.dtype)
    dstate = None if initial_state is None else D_all.to(initial_state.dtype)
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), dbeta[..., 0].to(beta.dtype), gate, dstate
