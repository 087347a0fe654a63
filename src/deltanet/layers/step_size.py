"""Step sizes that are learned through softplus: their first values, spread evenly in the logarithm (Gu and Dao 2023, arXiv 2312.00752)."""

import math

import torch
from torch import Tensor

__all__ = ["reset_step_bias"]


@torch.no_grad()
def reset_step_bias(
    bias: Tensor, generator: torch.Generator | None = None, low: float = 1e-3, high: float = 1e-1
) -> None:
    """Makes softplus(bias) log-uniform between `low` and `high`."""
    bias.uniform_(math.log(low), math.log(high), generator=generator).exp_()
    bias.add_(torch.log(-torch.expm1(-bias)))  # the inverse of softplus
