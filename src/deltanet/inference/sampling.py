"""How the next token is chosen: one uniform number per row, read off the cumulative distribution.

Drawing the number on the CPU, from a generator of the row's own, makes a sample depend on nothing but the logits and the
seed: not on the device, and not on what else is in the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. Temperature comes first, then `top_k`, then `top_p`; ties go to the smaller id."""

    temperature: float = 1.0
    """Divides the logits; below 1 is safer, above 1 is wilder, 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among this many likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens only, as few as together have this probability."""
    seed: int = 0
    """Row i of a batch draws from a generator seeded with `seed + i`."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be a finite number >= 0, got {self.temperature}: 0 is greedy, 1 samples"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}: leave it out to choose among all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}: leave it out to choose among all tokens")


GREEDY = Sampling(temperature=0.0)


class Draws:
    """Uniform numbers in [0, 1), one per row and call: float64 `[B]` on the CPU."""

    def __init__(self, seed: int, rows: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]

    def __call__(self) -> Tensor:
        return torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])


def choose(logits: Tensor, sampling: Sampling, draws: Draws) -> Tensor:
    """The next token of each row: int64 `[B]` from logits `[B, vocabulary]`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # fp64 costs nothing here and keeps a sum over a large vocabulary honest. Shifting first keeps a tiny temperature finite.
    shifted = logits.double() - logits.amax(dim=-1, keepdim=True).double()
    probability, token = (shifted / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probability = probability[:, : sampling.top_k]
    if sampling.top_p is not None:
        total = probability.sum(dim=-1, keepdim=True)
        before = probability.cumsum(dim=-1) - probability
        probability = probability.where(before < sampling.top_p * total, 0.0)
    cumulative = probability.cumsum(dim=-1)
    target = draws().to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token at or above the target: one of probability 0 is never hit, whichever way the target was rounded.
    index = torch.searchsorted(cumulative, target)
    return token.gather(-1, index).squeeze(-1)
