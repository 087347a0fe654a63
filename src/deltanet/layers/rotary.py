"""Rotary position embedding: each pair of channels of q and k turns with the position, so that their product sees distance alone.

    angle_j = position * theta^{-2j/D};    (x_j, x_{j+D/2}) <- rotated by angle_j,    j = 0 .. D/2 - 1

Source: Su et al. 2021 (arXiv 2104.09864); the halves are paired as in Llama, not neighbours.
"""

import math

import torch
from torch import Tensor

from deltanet.layers.norm import widen

__all__ = ["positions", "rotate"]


def positions(tokens: int, seen: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """The place of each token in its sequence, `[1 or N, T]`, or `[1, T]` when packed; `seen` `[N]` tokens came before."""
    place = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return place[None] if seen is None else seen[:, None] + place
    sequence = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
    place = place - cu_seqlens[sequence]
    return (place if seen is None else place + seen[sequence])[None]


def rotate(x: Tensor, place: Tensor, theta: float) -> Tensor:
    """x `[B, T, H, D]` at places `[B or 1, T]`, in x's dtype; angles are taken in fp32 (fp64 for fp64)."""
    wide = widen(x)
    half = x.shape[-1] // 2
    # As a power of two: the compiler computes it anew for every number of x, where a general power took half of the time of a layer.
    frequency = torch.exp2(torch.arange(half, device=x.device, dtype=wide.dtype) * (-math.log2(theta) / half))
    angle = (place[..., None] * frequency)[..., None, :]
    first, second = wide.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
