"""The delta rule as one matrix over the whole sequence, the way attention is written: for looking at, not for training.

    T = (I + strict_tril(diag(beta) K K^T))^-1 diag(beta),    A = scale * tril(Q K^T) T,    O = A V

A_ij says how much token i reads of what token j wrote. Rows need not sum to 1 and entries can be negative. Cubic in T.
Source: Yang et al. 2024 (arXiv 2406.06484), section 3.2; with a gate both matrices carry the decay e^{G_i - G_j}.
"""

import torch
from torch import Tensor

from deltanet.reference.chunkwise import Decay
from deltanet.reference.recurrent import work_dtype

__all__ = ["attention_matrix", "parallel_delta_rule"]


def attention_matrix(q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None = None, scale: float | None = None) -> Tensor:
    """A `[B, HV, T, T]`, lower triangular. q, k `[B, T, H, K]`, beta, g `[B, T, HV]`; fp32, or fp64 for fp64 inputs."""
    work, group = work_dtype(q.dtype), beta.shape[2] // q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.to(work).repeat_interleave(group, dim=2).transpose(1, 2) for x in (q, k))
    b = beta.to(work).transpose(1, 2)
    decay = Decay.of(None if g is None else g.to(work).transpose(1, 2))
    reads, keys = q @ k.mT, k @ k.mT
    if decay is not None:
        reads, keys = reads * decay.pairs, keys * decay.pairs
    lower = b[..., None] * keys.tril(-1)
    eye = torch.eye(keys.shape[-1], dtype=work, device=q.device)
    inverse = torch.linalg.solve_triangular(lower + eye, eye, upper=False, unitriangular=True)
    return scale * (reads.tril() @ (inverse * b[..., None, :]))


def parallel_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """o `[B, T, HV, V]` = A v, from a zero state."""
    A = attention_matrix(q, k, beta, g, scale)
    return (A @ v.to(A.dtype).transpose(1, 2)).transpose(1, 2).to(v.dtype)
