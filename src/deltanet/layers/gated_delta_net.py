"""Gated DeltaNet: DeltaNet that also forgets, each head at a rate that depends on the token, and gates its output.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T,    g_t = -exp(A_log) softplus(x_t W_a + dt_bias)

Source: Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), sections 3.1 and 3.4; the gate is Mamba-2's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.delta_net import DeltaNet, DeltaNetConfig
from deltanet.layers.norm import widen
from deltanet.layers.step_size import reset_step_bias

__all__ = ["GatedDeltaNet", "GatedDeltaNetConfig"]


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaNetConfig):
    """What a Gated DeltaNet layer is made of: DeltaNet's options, with that paper's defaults, and the decay."""

    kind: ClassVar[str] = "gated_delta"

    expand_v: float = 2.0
    """Width of a value head as a multiple of head_dim."""
    output_gate: bool = True
    """Whether silu(x W_g) scales the normalised output."""

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "GatedDeltaNet":
        """The layer for a model of width `d_model`."""
        return GatedDeltaNet(d_model, self, backend=backend, memory=memory)


class GatedDeltaNet(DeltaNet):
    """The Gated DeltaNet token mixer; its state is DeltaNet's."""

    def __init__(
        self, d_model: int, config: GatedDeltaNetConfig | None = None, *, backend: str = "auto", memory: str = "states"
    ) -> None:
        super().__init__(d_model, config or GatedDeltaNetConfig(), backend=backend, memory=memory)
        self.a_proj = nn.Linear(d_model, self.value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Rates uniform up to 16 (from 1e-4, whose logarithm is finite), steps between 1e-3 and 1e-1, as in Mamba-2."""
        self.A_log.uniform_(1e-4, 16, generator=generator).log_()
        reset_step_bias(self.dt_bias, generator)

    def log_decay(self, x: Tensor) -> Tensor:
        return -widen(self.A_log).exp() * F.softplus(widen(self.a_proj(x)) + self.dt_bias)
