"""Normalisation, computed in fp32 whatever comes in (fp64 stays fp64)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["L2_EPS", "RMSNorm", "l2_normalize", "sum_normalize", "widen"]

L2_EPS = 1e-6  # under the root of an L2 norm, so that a zero vector has a gradient


def widen(x: Tensor) -> Tensor:
    """x in the dtype in which sums and exponentials are taken."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. `[..., dim]` -> `[..., dim]` in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, which widens inside
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = widen(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + L2_EPS) over the last dimension."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def sum_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / (sum(x) + eps) over the last dimension, for positive features (Schlag et al. 2021, arXiv 2102.11174, section 4.2)."""
    wide = widen(x)
    return (wide / (wide.sum(-1, keepdim=True) + eps)).to(x.dtype)
