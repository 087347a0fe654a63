"""Linear attention layers that forget: GLA, whose gates depend on the token, and RetNet, whose rates are fixed.

    q, k, v = [silu(conv(] x W_q, x W_k, x W_v [))];   o = linear_attention(q, k, v, g);   y = (RMSNorm(o) * silu(x W_g)) W_o
    GLA:    g = logsigmoid(x W_1 W_2 + b) / 16, a gate for every channel of k
    RetNet: g = log(1 - 2^{-5-h}) for head h, and q, k turn with the position

Sources: Yang et al. 2023 (arXiv 2312.06635), section 4.4; Sun et al. 2023 (arXiv 2307.08621). The convolution is an option of the DeltaNet
paper's tables (arXiv 2406.06484).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.linear_attention import CHUNK, linear_attention, refuse_fla
from deltanet.layers.mixer import Mixer
from deltanet.layers.norm import RMSNorm, widen
from deltanet.layers.rotary import positions, rotate
from deltanet.layers.short_conv import ShortConv

__all__ = [
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GatedLinearAttentionState",
    "RetNet",
    "RetNetConfig",
    "RetNetState",
]


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig:
    """What a GLA layer is made of. The defaults are the GLA paper's."""

    kind: ClassVar[str] = "gla"

    heads: int = 4
    """Heads."""
    expand_k: float = 0.5
    """Width of all keys together as a multiple of d_model."""
    expand_v: float = 1.0
    """Width of all values together as a multiple of d_model."""
    gate_rank: int = 16
    """Rank of the matrix that makes the gates; 0 for none: plain linear attention, which forgets nothing."""
    gate_divisor: float = 16.0
    """What the log of a gate is divided by, so that a new layer remembers for long."""
    short_conv: int = 0
    """Width of the convolution on q, k and v, with a silu after it; 0 for neither."""
    norm_eps: float = 1e-6
    """Added to the mean square in the output's RMSNorm."""

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.gate_rank <= 4096:
            raise ValueError(f"gate_rank must be between 0 (no gates) and 4096, got {self.gate_rank}")
        if not 1 <= self.gate_divisor <= 1e6:
            raise ValueError(f"gate_divisor must be between 1 and 1e6, got {self.gate_divisor}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "GatedLinearAttention":
        """The layer for a model of width `d_model`; `backend` and `memory` are the delta rule's."""
        return GatedLinearAttention(d_model, self)


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """What a RetNet layer is made of. The defaults are the paper's; its heads are 256 wide."""

    kind: ClassVar[str] = "retnet"

    heads: int = 4
    """Heads. Head h, from 0, keeps 1 - 2^{-5-h} of its memory at each token."""
    expand_k: float = 1.0
    """Width of all keys together as a multiple of d_model."""
    expand_v: float = 2.0
    """Width of all values together as a multiple of d_model."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    short_conv: int = 0
    """Width of the convolution on q, k and v, with a silu after it; 0 for neither."""
    norm_eps: float = 1e-6
    """Added to the mean square in the output's RMSNorm."""

    def __post_init__(self) -> None:
        _check(self)
        if self.heads > 19:
            raise ValueError(
                f"heads must be at most 19, got {self.heads}: in fp32 the last ones would not forget at all"
            )
        if not 1 < self.rope_theta <= 1e12:
            raise ValueError(f"rope_theta must be above 1 and at most 1e12, got {self.rope_theta}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "RetNet":
        """The layer for a model of width `d_model`; `backend` and `memory` are the delta rule's."""
        return RetNet(d_model, self)


def _check(config: GatedLinearAttentionConfig | RetNetConfig) -> None:
    if not 1 <= config.heads <= 4096:
        raise ValueError(f"heads must be between 1 and 4096, got {config.heads}")
    for name in ("expand_k", "expand_v"):
        if not 0 < getattr(config, name) <= 64:
            raise ValueError(f"{name} must be above 0 and at most 64, got {getattr(config, name)}")
    if not 0 <= config.short_conv <= 64:
        raise ValueError(f"short_conv must be a width between 0 (none) and 64, got {config.short_conv}")
    if not 0 < config.norm_eps < 1:
        raise ValueError(f"norm_eps must be between 0 and 1, got {config.norm_eps}")


class GatedLinearAttentionState(NamedTuple):
    """What a GLA layer remembers of N sequences: constant in size, however long they were."""

    q_tail: Tensor  # [N, short_conv - 1, H * K] last inputs of the convolutions; no rows without convolution
    k_tail: Tensor  # [N, short_conv - 1, H * K]
    v_tail: Tensor  # [N, short_conv - 1, H * V]
    memory: Tensor  # [N, H, K, V] fp32


class RetNetState(NamedTuple):
    """What a RetNet layer remembers of N sequences: as GLA, and where they stand."""

    q_tail: Tensor
    k_tail: Tensor
    v_tail: Tensor
    memory: Tensor
    seen: Tensor  # [N] int64 tokens so far


class LinearAttentionLayer(Mixer):
    """What GLA and RetNet share: the projections and convolutions of q, k and v, and the gated output."""

    def __init__(self, d_model: int, config: GatedLinearAttentionConfig | RetNetConfig) -> None:
        super().__init__(d_model)
        self.heads = config.heads
        keys, values = round(d_model * config.expand_k), round(d_model * config.expand_v)
        if keys < 1 or values < 1 or keys % self.heads or values % self.heads:
            raise ValueError(
                f"heads must divide the width of the keys, {keys}, and of the values, {values}, got {self.heads}: "
                f"they are expand_k and expand_v times d_model = {d_model}"
            )
        self.key_dim, self.value_dim = keys // self.heads, values // self.heads
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.short_conv = config.short_conv
        if config.short_conv:
            self.q_conv = ShortConv(keys, config.short_conv)
            self.k_conv = ShortConv(keys, config.short_conv)
            self.v_conv = ShortConv(values, config.short_conv)
        self.o_norm = RMSNorm(self.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def _project(
        self, name: str, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """q, k or v `[B, T, H, ...]`, and the new tail of its convolution if one was given."""
        y = getattr(self, f"{name}_proj")(x)
        if self.short_conv:
            y, tail = getattr(self, f"{name}_conv")(y, tail, cu_seqlens, activation="silu", overwrite=self.overwrite)
        return y.unflatten(-1, (self.heads, -1)), tail

    def _read_out(self, x: Tensor, o: Tensor) -> Tensor:
        return self.o_proj((self.o_norm(o) * F.silu(self.g_proj(x)).view_as(o)).flatten(-2))

    def path(self, x: Tensor) -> str:
        why = refuse_fla(x)
        return "fla's kernels" if why is None else f"PyTorch, chunk by chunk: not fla's kernels, {why}"

    def _zeros(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> GatedLinearAttentionState:
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        past, memory = max(self.short_conv - 1, 0), torch.float64 if dtype == torch.float64 else torch.float32
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        return GatedLinearAttentionState(
            torch.zeros(batch, past, keys, device=device, dtype=dtype),
            torch.zeros(batch, past, keys, device=device, dtype=dtype),
            torch.zeros(batch, past, values, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, self.key_dim, self.value_dim, device=device, dtype=memory),
        )

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token: projections, convolutions, and the chunk form with half of a chunk's pairs."""
        linears = 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        convs = sum(m.flops_per_token(context) for m in self.modules() if isinstance(m, ShortConv))
        K, V = self.key_dim, self.value_dim
        return linears + convs + self.heads * (CHUNK * K + CHUNK * V + 4 * K * V)


class GatedLinearAttention(LinearAttentionLayer):
    """The GLA token mixer, `[B, T, d_model]` -> `[B, T, d_model]`."""

    def __init__(self, d_model: int, config: GatedLinearAttentionConfig | None = None) -> None:
        config = GatedLinearAttentionConfig() if config is None else config
        super().__init__(d_model, config)
        self.config = config
        if config.gate_rank:
            self.gate_proj = nn.Sequential(
                nn.Linear(d_model, config.gate_rank, bias=False),
                nn.Linear(config.gate_rank, self.heads * self.key_dim),
            )

    def mix(
        self, x: Tensor, state: GatedLinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, GatedLinearAttentionState | None]:
        before = (None, None, None) if state is None else state[:3]
        (q, q_tail), (k, k_tail), (v, v_tail) = (
            self._project(name, x, tail, cu_seqlens) for name, tail in zip("qkv", before, strict=True)
        )
        if self.config.gate_rank:
            g = (F.logsigmoid(widen(self.gate_proj(x))) / self.config.gate_divisor).view_as(q)
        else:
            g = widen(q).new_zeros(self.heads)  # one decay for all tokens, and it is none
        o, memory = linear_attention(
            q, k, v, g, scale=self.key_dim**-0.5,
            initial_state=None if state is None else state.memory, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self._read_out(x, o)
        if q_tail is None or k_tail is None or v_tail is None:
            return y, None
        return y, GatedLinearAttentionState(q_tail, k_tail, v_tail, memory)

    def init_state(
        self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GatedLinearAttentionState:
        """The state of `batch` sequences that have not begun: zeros. `dtype` is that of the tails (the weights' by default)."""
        return self._zeros(batch, device, dtype)


class RetNet(LinearAttentionLayer):
    """The RetNet token mixer (multi-scale retention), `[B, T, d_model]` -> `[B, T, d_model]`."""

    def __init__(self, d_model: int, config: RetNetConfig | None = None) -> None:
        config = RetNetConfig() if config is None else config
        super().__init__(d_model, config)
        if self.key_dim % 2:
            raise ValueError(
                f"heads must leave keys of even width, got {self.heads} of {self.key_dim}: positions turn pairs of channels"
            )
        self.config = config

    def mix(self, x: Tensor, state: RetNetState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, RetNetState | None]:
        before = (None, None, None) if state is None else state[:3]
        (q, q_tail), (k, k_tail), (v, v_tail) = (
            self._project(name, x, tail, cu_seqlens) for name, tail in zip("qkv", before, strict=True)
        )
        place = positions(x.shape[1], None if state is None else state.seen, cu_seqlens, x.device)
        q, k = (rotate(z, place, self.config.rope_theta) for z in (q, k))
        head = torch.arange(self.heads, device=x.device, dtype=widen(q).dtype)
        g = torch.log1p(-(2.0 ** -(5 + head)))
        o, memory = linear_attention(
            q, k, v, g, scale=self.key_dim**-0.5,
            initial_state=None if state is None else state.memory, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        y = self._read_out(x, o)
        if state is None or q_tail is None or k_tail is None or v_tail is None:
            return y, None
        new = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return y, RetNetState(q_tail, k_tail, v_tail, memory, state.seen + new)

    def init_state(
        self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RetNetState:
        """The state of `batch` sequences that have not begun: zeros. `dtype` is that of the tails (the weights' by default)."""
        zeros = self._zeros(batch, device, dtype)
        return RetNetState(*zeros, torch.zeros(batch, device=zeros.memory.device, dtype=torch.int64))
