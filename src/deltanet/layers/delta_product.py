"""DeltaProduct: several delta-rule steps a token, so that its transition is a product of several Householder matrices.

    for j = 1 .. n:   S <- S + beta_{t,j} k_{t,j} (v_{t,j} - S^T k_{t,j})^T;        o_t = scale * S^T q_t

One step reflects along one direction; n of them reach what one cannot, permutations of n + 1 things for instance.
The steps are laid end to end as n T tokens and go through the same operator; only the last of a token is read.
Source: Siems et al. 2025 (arXiv 2502.10297), section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltanet.layers.delta_net import DeltaNet, DeltaNetConfig

__all__ = ["DeltaProduct", "DeltaProductConfig"]


@dataclass(frozen=True, kw_only=True)
class DeltaProductConfig(DeltaNetConfig):
    """What a DeltaProduct layer is made of: DeltaNet's options, with that paper's defaults, and the number of steps."""

    kind: ClassVar[str] = "delta_product"

    steps: int = 2
    """Householder steps of one token, each with its own k, v and beta."""
    negative_eigenvalues: bool = True
    """Whether beta ranges over (0, 2) rather than (0, 1), so that a step can be a reflection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 64:
            raise ValueError(f"steps must be between 1 and 64, got {self.steps}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "DeltaProduct":
        """The layer for a model of width `d_model`."""
        return DeltaProduct(d_model, self, backend=backend, memory=memory)


class DeltaProduct(DeltaNet):
    """The DeltaProduct token mixer; its state is DeltaNet's, with the tails of all steps side by side."""

    def __init__(
        self, d_model: int, config: DeltaProductConfig | None = None, *, backend: str = "auto", memory: str = "states"
    ) -> None:
        config = DeltaProductConfig() if config is None else config
        super().__init__(d_model, config, backend=backend, memory=memory, steps=config.steps)
