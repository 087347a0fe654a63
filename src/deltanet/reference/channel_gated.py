"""The delta rule with a decay for every channel of the key (Kimi Delta Attention), one token at a time. A definition; no kernel computes it.

    S_t = (I - beta_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T,    o_t = scale * S_t^T q_t        S in R^{K x V}

Source: Kimi Team 2025 (arXiv 2510.26692), equation 1, which writes S transposed. With one decay for all channels it is `recurrent`.
"""

import torch
from torch import Tensor

from deltanet.reference.recurrent import delta_step, work_dtype

__all__ = ["channel_gated_delta_rule"]


def channel_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k and log decay g `[B, T, H, K]`, v `[B, T, H, V]`, beta `[B, T, H]`, initial_state `[B, H, K, V]`; differentiable by autograd.

    Returns o `[B, T, H, V]` in v's dtype and the final states `[B, H, K, V]` in fp32 (fp64 for fp64 inputs).
    """
    work = work_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    Q, K, V, b, G = (x.to(work) for x in (q, k, v, beta, g))
    if initial_state is None:
        state = V.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    else:
        state = initial_state.to(work)
    outputs = []
    for t in range(q.shape[1]):
        decayed = G[:, t, :, :, None].exp() * state
        o, state = delta_step(Q[:, t], K[:, t], V[:, t], b[:, t], None, scale, decayed)
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else V).to(v.dtype), state
