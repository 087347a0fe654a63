"""The selective scan of Mamba: every channel has a memory of S numbers, whose decay and input depend on the token.

    h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t,    y_t = C_t . h_t            per channel; A < 0 and h in R^S

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.2 and algorithm 2.

All chunks take their first token at once, then their second, ...: once from zero, for the states that chunks pass on, and once more from
the right start. So T tokens take twice C plus T / C steps; those of a single chunk, C. The states of all tokens fill much memory, so the
backward makes them again.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltanet.layers.chunks import Chunks
from deltanet.layers.norm import widen
from deltanet.ops.selective_scan import fused_selective_scan, refuse_scan

__all__ = ["selective_scan"]

CHUNK = 64
SINGLE = 128  # rows so short are one chunk, which needs no first pass


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u and steps dt >= 0 `[B, T, D]`, A `[D, S]`, B, C `[B, T, S]`, initial_state `[N, S, D]`.

    Returns y `[B, T, D]` in u's dtype and the final states `[N, S, D]`; computed in fp32 (fp64 for fp64), under autocast too.
    """
    with torch.autocast(u.device.type, enabled=False):
        if refuse_scan(u, A) is None:
            return fused_selective_scan(u, dt, A, B, C, initial_state, cu_seqlens)
        chunks = Chunks.of(u, cu_seqlens, CHUNK if u.shape[1] > SINGLE else SINGLE)
        wide = [chunks.split(widen(x)) for x in (u, dt, B, C)]
        if initial_state is None:
            N = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial_state = wide[0].new_zeros(N, A.shape[1], A.shape[0])
        args = (*wide, widen(A).mT, initial_state.to(wide[0].dtype))
        if torch.is_grad_enabled() and any(x.requires_grad for x in args):
            y, final = checkpoint(_scan, chunks, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            y, final = _scan(chunks, *args)
        return chunks.join(y).to(u.dtype), final


def _scan(
    chunks: Chunks, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """y `[M, C, D]` and the final states. u, dt `[M, C, D]`, B, C `[M, C, S]`, A `[S, D]`: states lie [S, D], channels innermost."""
    decays = [(step[:, None] * A).exp() for step in dt.unbind(1)]
    inputs = [b[:, :, None] * w[:, None] for b, w in zip(B.unbind(1), (dt * u).unbind(1), strict=True)]
    single = chunks.index is None and len(chunks.steps) == 1
    if single:
        state = final = initial
    else:
        update = inputs[0]
        for decay, new in zip(decays[1:], inputs[1:], strict=True):
            update = torch.addcmul(new, decay, update)
        state, final = chunks.scan((dt.sum(1)[:, None] * A).exp(), update, initial)
    outputs = []
    for decay, new, c in zip(decays, inputs, C.unbind(1), strict=True):
        state = torch.addcmul(new, decay, state)
        outputs.append((c[:, None] @ state).squeeze(1))
    return torch.stack(outputs, 1), state if single else final
