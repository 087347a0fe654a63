"""The DeltaNet layer: a token mixer whose memory is one matrix per head, written by the delta rule.

    q, k = norm(feature_map(conv(x W_q))), norm(feature_map(conv(x W_k)));   v = silu(conv(x W_v));   beta = sigmoid(x W_b)
    o = delta_rule(q, k, v, beta);   y = (RMSNorm(o) [* silu(x W_g)]) W_o

Source: Yang et al. 2024 (arXiv 2406.06484), section 3.3; the options are that paper's ablations, and beta in (0, 2) is
Grazzi et al. 2024 (arXiv 2411.12537).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.mixer import Mixer
from deltanet.layers.norm import RMSNorm, sum_normalize, widen
from deltanet.layers.short_conv import ACTIVATIONS, ShortConv, activate
from deltanet.ops import chunk_delta_rule, decode_step, recurrent_delta_rule
from deltanet.ops.segments import times

__all__ = ["DeltaNet", "DeltaNetConfig", "DeltaNetState"]

NORMS = ("l2", "sum")


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """What a DeltaNet layer is made of. The defaults are the paper's."""

    kind: ClassVar[str] = "delta"

    heads: int = 4
    """Query and key heads."""
    head_dim: int | None = None
    """Width K of a query or key head, at most 256 on a GPU; d_model / heads if not given."""
    value_heads: int | None = None
    """Value heads, a multiple of `heads` (each has its own memory); as many as `heads` if not given."""
    expand_v: float = 1.0
    """Width of a value head as a multiple of head_dim."""
    short_conv: int = 4
    """Width of the convolution on q, k and v; 0 for none."""
    feature_map: str = "silu"
    """What q and k pass through before they are normalised: silu, relu, elu1 (1 + elu) or identity."""
    qk_norm: str = "l2"
    """How q and k are normalised: l2, or sum (to a sum of 1; needs the positive features of elu1)."""
    output_gate: bool = False
    """Whether silu(x W_g) scales the normalised output."""
    negative_eigenvalues: bool = False
    """Whether beta ranges over (0, 2) rather than (0, 1), so that a write can flip what is stored."""
    norm_eps: float = 1e-6
    """Added to the mean square in the output's RMSNorm."""

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "value_heads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 4096:
                raise ValueError(f"{name} must be between 1 and 4096, got {value}")
        if self.value_heads is not None and self.value_heads % self.heads:
            raise ValueError(f"value_heads must be a multiple of heads = {self.heads}, got {self.value_heads}")
        if not 0 < self.expand_v <= 64:
            raise ValueError(f"expand_v must be above 0 and at most 64, got {self.expand_v}")
        if not 0 <= self.short_conv <= 64:
            raise ValueError(f"short_conv must be a width between 0 (none) and 64, got {self.short_conv}")
        if self.feature_map not in ACTIVATIONS:
            raise ValueError(f"feature_map must be one of {', '.join(ACTIVATIONS)}, got {self.feature_map!r}")
        if self.qk_norm not in NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(NORMS)}, got {self.qk_norm!r}")
        if self.qk_norm == "sum" and self.feature_map != "elu1":
            raise ValueError(f"qk_norm sum needs positive features: set feature_map to elu1, got {self.feature_map!r}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be between 0 and 1, got {self.norm_eps}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "DeltaNet":
        """The layer for a model of width `d_model`."""
        return DeltaNet(d_model, self, backend=backend, memory=memory)


class DeltaNetState(NamedTuple):
    """What a DeltaNet layer remembers of N sequences: constant in size, however long they were."""

    q_tail: Tensor  # [N, short_conv - 1, H * K] last inputs of the convolutions; no rows without convolution
    k_tail: Tensor  # [N, short_conv - 1, steps * H * K]
    v_tail: Tensor  # [N, short_conv - 1, steps * HV * V]
    memory: Tensor  # [N, HV, K, V] fast weights, fp32


class DeltaNet(Mixer):
    """The DeltaNet token mixer, `[B, T, d_model]` -> `[B, T, d_model]`.

    >>> layer = DeltaNet(512, DeltaNetConfig(heads=4))
    >>> y, _ = layer(x)                                          # training, or a whole prompt
    >>> y, state = layer(x[:, :100], layer.init_state(len(x)))   # streaming: give a state and the new one comes back
    >>> y, state = layer(x[:, 100:101], state)

    Args:
        d_model: width of the tokens.
        config: the layer's options.
        backend: who runs the delta rule, see `deltanet.explain`.
        memory: "states" or "lean", see `chunk_delta_rule`.
        steps: delta-rule steps of one token, each with its own k, v and beta (`DeltaProduct`).
    """

    def __init__(
        self,
        d_model: int,
        config: DeltaNetConfig | None = None,
        *,
        backend: str = "auto",
        memory: str = "states",
        steps: int = 1,
    ) -> None:
        super().__init__(d_model)
        config = DeltaNetConfig() if config is None else config
        if config.head_dim is None and d_model % config.heads:
            raise ValueError(f"heads must divide d_model = {d_model}, got {config.heads}; or give head_dim")
        self.config, self.backend, self.memory = config, backend, memory
        self.heads, self.steps = config.heads, steps
        self.value_heads = config.value_heads or config.heads
        self.key_dim = config.head_dim or d_model // config.heads
        self.value_dim = round(self.key_dim * config.expand_v)
        if self.value_dim < 1:
            raise ValueError(f"expand_v = {config.expand_v} leaves no value dimension for head_dim {self.key_dim}")
        keys, values = self.heads * self.key_dim, self.value_heads * self.value_dim
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, steps * keys, bias=False)
        self.v_proj = nn.Linear(d_model, steps * values, bias=False)
        self.b_proj = nn.Linear(d_model, steps * self.value_heads, bias=False)
        if config.short_conv:
            self.q_conv = ShortConv(keys, config.short_conv)
            self.k_conv = ShortConv(steps * keys, config.short_conv)
            self.v_conv = ShortConv(steps * values, config.short_conv)
        if config.output_gate:
            self.g_proj = nn.Linear(d_model, values, bias=False)
        self.o_norm = RMSNorm(self.value_dim, config.norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def mix(
        self, x: Tensor, state: DeltaNetState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, DeltaNetState | None]:
        tails: tuple[Tensor | None, ...] = state or (None, None, None, None)
        features, l2 = self.config.feature_map, self.key_dim if self.config.qk_norm == "l2" else None
        q, q_tail = self._convolve("q_conv", self.q_proj(x), tails[0], cu_seqlens, features, l2)
        k, k_tail = self._convolve("k_conv", self.k_proj(x), tails[1], cu_seqlens, features, l2)
        v, v_tail = self._convolve("v_conv", self.v_proj(x), tails[2], cu_seqlens, "silu", None)
        q, k, v = (z.unflatten(-1, (-1, dim)) for z, dim in ((q, self.key_dim), (k, self.key_dim), (v, self.value_dim)))
        if self.config.qk_norm == "sum":
            q, k = sum_normalize(q), sum_normalize(k)
        beta = widen(self.b_proj(x)).sigmoid()
        if self.config.negative_eigenvalues:
            beta = 2 * beta
        o, memory = self._apply_rule(q, k, v, beta, self.log_decay(x), tails[3], state is not None, cu_seqlens)
        o = self.o_norm(o)
        if self.config.output_gate:
            o = o * F.silu(self.g_proj(x)).unflatten(-1, (self.value_heads, self.value_dim))
        y = self.o_proj(o.flatten(-2))
        if q_tail is None or k_tail is None or v_tail is None or memory is None:
            return y, None
        return y, DeltaNetState(q_tail, k_tail, v_tail, memory)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """g `[B, T, HV]` of the gated rule; None, as here, for the plain one."""
        return None

    def _apply_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        memory: Tensor | None,
        remember: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """o `[B, T, HV, V]` and the new memory. k, v and beta hold the heads of a token's first step, then of its second, ..."""
        T, steps = q.shape[1], self.steps
        if self.overwrite and memory is not None and T == steps == 1 and cu_seqlens is None:
            return decode_step(q, k, v, beta, g, state=memory, backend=self.backend), memory
        # One token is a step of the recurrence; everything longer goes by chunks.
        rule = recurrent_delta_rule if T == 1 and cu_seqlens is None else chunk_delta_rule
        if steps > 1:  # a token becomes `steps` tokens, of which the last has the query and is read
            q = F.pad(q[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
            k, v, beta = (z.unflatten(2, (steps, -1)).flatten(1, 2) for z in (k, v, beta))
            cu_seqlens = None if cu_seqlens is None else times(cu_seqlens, steps)
        o, memory = rule(
            q, k, v, beta, g,
            initial_state=memory, output_final_state=remember,
            cu_seqlens=cu_seqlens, memory=self.memory, backend=self.backend,
        )  # fmt: skip
        return (o[:, steps - 1 :: steps] if steps > 1 else o), memory

    def _convolve(
        self, name: str, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None, activation: str, unit: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """x `[B, T, D]` convolved, activated and, in units of so many channels, L2-normalised; and the new tail."""
        if not self.config.short_conv:
            return activate(x, activation, unit), tail
        return getattr(self, name)(x, tail, cu_seqlens, activation=activation, unit=unit, overwrite=self.overwrite)

    def init_state(
        self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DeltaNetState:
        """The state of `batch` sequences that have not begun: zeros. `dtype` is that of the tails (the weights' by default)."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        past = max(self.config.short_conv - 1, 0)
        keys, values = self.heads * self.key_dim, self.value_heads * self.value_dim
        memory = torch.float64 if dtype == torch.float64 else torch.float32
        return DeltaNetState(
            torch.zeros(batch, past, keys, device=device, dtype=dtype),
            torch.zeros(batch, past, self.steps * keys, device=device, dtype=dtype),
            torch.zeros(batch, past, self.steps * values, device=device, dtype=dtype),
            torch.zeros(batch, self.value_heads, self.key_dim, self.value_dim, device=device, dtype=memory),
        )

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token: projections, convolutions, and the chunked rule with chunks of 64 (docs/math.md 5)."""
        linears = 2 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        convs = sum(m.flops_per_token(context) for m in self.modules() if isinstance(m, ShortConv))
        C, K, V = 64, self.key_dim, self.value_dim
        rule = self.steps * self.value_heads * (4 * C * K + 4 * C * V + 6 * K * V)
        return linears + convs + rule
