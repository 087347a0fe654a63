"""The Mamba layer: a convolution, a selective scan with a small memory for every channel, and a gate, in one mixer of twice the width.

    u, z = x W_in;   u = silu(conv(u) + b);   r, B, C = u W_x;   dt = softplus(r W_dt + b_dt);   A = -exp(A_log)
    y = ((selective_scan(u, dt, A, B, C) + D * u) * silu(z)) W_o

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4. A block holds two of these and no feed-forward layer, which has as many parameters.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.mixer import Mixer
from deltanet.layers.norm import widen
from deltanet.layers.selective_scan import selective_scan
from deltanet.layers.short_conv import ShortConv
from deltanet.layers.step_size import reset_step_bias
from deltanet.ops.selective_scan import refuse_scan

__all__ = ["Mamba", "MambaConfig", "MambaState"]


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """What a Mamba layer is made of. The defaults are the paper's."""

    kind: ClassVar[str] = "mamba"

    state: int = 16
    """Numbers that each channel remembers."""
    expand: float = 2.0
    """Channels as a multiple of d_model."""
    step_rank: int | None = None
    """Rank of the matrix that makes the step sizes; d_model / 16, rounded up, if not given."""
    short_conv: int = 4
    """Width of the convolution; 0 for none."""

    def __post_init__(self) -> None:
        if not 1 <= self.state <= 4096:
            raise ValueError(f"state must be between 1 and 4096, got {self.state}")
        if not 0 < self.expand <= 64:
            raise ValueError(f"expand must be above 0 and at most 64, got {self.expand}")
        if self.step_rank is not None and not 1 <= self.step_rank <= 2**16:
            raise ValueError(f"step_rank must be between 1 and 65536, got {self.step_rank}")
        if not 0 <= self.short_conv <= 64:
            raise ValueError(f"short_conv must be a width between 0 (none) and 64, got {self.short_conv}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "Mamba":
        """The layer for a model of width `d_model`; `backend` and `memory` are the delta rule's."""
        return Mamba(d_model, self)


class MambaState(NamedTuple):
    """What a Mamba layer remembers of N sequences: constant in size, however long they were."""

    tail: Tensor  # [N, short_conv - 1, D] last inputs of the convolution; no rows without
    memory: Tensor  # [N, S, D] fp32


class Mamba(Mixer):
    """The Mamba token mixer, `[B, T, d_model]` -> `[B, T, d_model]`."""

    def __init__(self, d_model: int, config: MambaConfig | None = None) -> None:
        super().__init__(d_model)
        config = MambaConfig() if config is None else config
        self.config = config
        self.channels = round(d_model * config.expand)
        if self.channels < 1:
            raise ValueError(f"expand = {config.expand} leaves no channel for d_model {d_model}")
        self.step_rank = config.step_rank or -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * self.channels, bias=False)
        if config.short_conv:
            self.conv = ShortConv(self.channels, config.short_conv)
            self.conv_bias = nn.Parameter(torch.empty(self.channels))
        self.x_proj = nn.Linear(self.channels, self.step_rank + 2 * config.state, bias=False)
        self.dt_proj = nn.Linear(self.step_rank, self.channels)
        self.A_log = nn.Parameter(torch.empty(self.channels, config.state))
        self.D = nn.Parameter(torch.empty(self.channels))
        self.o_proj = nn.Linear(self.channels, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Steps between 1e-3 and 1e-1, decays 1 to S for the S numbers of a channel (the paper's section 3.6), D 1."""
        bound = self.step_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        reset_step_bias(self.dt_proj.bias, generator)
        rates = torch.arange(1, self.config.state + 1, device=self.A_log.device, dtype=self.A_log.dtype)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        self.D.fill_(1)
        if self.config.short_conv:
            self.conv_bias.zero_()

    def mix(self, x: Tensor, state: MambaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MambaState | None]:
        u, z = self.in_proj(x).chunk(2, -1)
        tail = None if state is None else state.tail
        if self.config.short_conv:
            u, tail = self.conv(u, tail, cu_seqlens, activation="silu", bias=self.conv_bias, overwrite=self.overwrite)
        else:
            u = F.silu(u)
        rank, S = self.step_rank, self.config.state
        r, B, C = self.x_proj(u).split([rank, S, S], -1)
        # The bias is added in fp32: it alone tells small steps apart.
        dt = F.softplus(widen(F.linear(r, self.dt_proj.weight)) + self.dt_proj.bias)
        y, memory = selective_scan(
            u, dt, -widen(self.A_log).exp(), B, C,
            initial_state=None if state is None else state.memory, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = (y + self.D.to(y.dtype) * u) * F.silu(z)
        return self.o_proj(y), None if tail is None else MambaState(tail, memory)

    def path(self, x: Tensor) -> str:
        why = refuse_scan(x, self.A_log)
        return "one fused kernel" if why is None else f"PyTorch, chunk by chunk: the fused kernel refuses, {why}"

    def init_state(
        self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """The state of `batch` sequences that have not begun: zeros. `dtype` is that of the tail (the weights' by default)."""
        weight = self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        memory = torch.float64 if dtype == torch.float64 else torch.float32
        return MambaState(
            torch.zeros(batch, max(self.config.short_conv - 1, 0), self.channels, device=device, dtype=dtype),
            torch.zeros(batch, self.config.state, self.channels, device=device, dtype=memory),
        )

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token: matrices, the convolution, and six for each number remembered (decay 2, input 2, output 2)."""
        linears = 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        conv = self.conv.flops_per_token(context) if self.config.short_conv else 0
        return linears + conv + 6 * self.channels * self.config.state
