"""Softmax attention: the Transformer++ mixer, and the window of the hybrids.

    q, k = rope(x W_q), rope(x W_k);   v = x W_v;   o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j,   i - window < j <= i;   y = o W_o

Source: Vaswani et al. 2017 with rotary positions and grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245), as in Llama.
What one token costs grows with its sequence, or with the window; so does the state, a cache of keys and values.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.mixer import Mixer
from deltanet.layers.rotary import positions, rotate
from deltanet.ops.segments import bounds, longest

__all__ = ["Attention", "AttentionConfig", "AttentionState"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What a softmax attention layer is made of."""

    kind: ClassVar[str] = "attention"

    heads: int = 4
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads, a divisor of `heads`: each serves several queries and shrinks the cache; as many if not given."""
    head_dim: int | None = None
    """Width of a head, an even number; d_model / heads if not given."""
    window: int | None = None
    """Tokens that a token sees, itself included; none: all before it."""
    rotary: bool = True
    """Whether q and k turn with the position; without, the model must bring positions of its own."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    max_context: int = 1 << 20
    """Most tokens that the cache takes in while streaming without a window; it grows with them, and beyond it says no."""

    def __post_init__(self) -> None:
        for name, limit in {
            "heads": 4096,
            "kv_heads": 4096,
            "head_dim": 4096,
            "window": 2**31,
            "max_context": 2**31,
        }.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise ValueError(f"{name} must be between 1 and {limit}, got {value}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}: rotary positions turn pairs of channels")
        if not 1 < self.rope_theta <= 1e12:
            raise ValueError(f"rope_theta must be above 1 and at most 1e12, got {self.rope_theta}")

    def build(self, d_model: int, *, backend: str = "auto", memory: str = "states") -> "Attention":
        """The layer for a model of width `d_model`; `backend` and `memory` are the delta rule's."""
        return Attention(d_model, self)


class AttentionState(NamedTuple):
    """The cache of N sequences. Rows end with the newest token; of L rows only the last min(seen, L) are filled.

    With a window L is window - 1, always; without, it is the length of the longest sequence.
    """

    keys: Tensor  # [N, L, HKV, D] rotated
    values: Tensor  # [N, L, HKV, D]
    seen: Tensor  # [N] int64 tokens so far


class Attention(Mixer):
    """The softmax attention mixer, `[B, T, d_model]` -> `[B, T, d_model]`.

    Runs on scaled_dot_product_attention; on CUDA in half precision, packed or windowed sequences train on torch's varlen_attn,
    whose work does not grow with what the mask hides.
    """

    def __init__(self, d_model: int, config: AttentionConfig | None = None) -> None:
        super().__init__(d_model)
        config = AttentionConfig() if config is None else config
        if config.head_dim is None and d_model % config.heads:
            raise ValueError(f"heads must divide d_model = {d_model}, got {config.heads}; or give head_dim")
        self.config = config
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or d_model // config.heads
        if self.head_dim % 2:
            raise ValueError(
                f"heads must leave an even width, got {config.heads} of {self.head_dim}: rotary positions turn pairs of channels"
            )
        self.q_proj = nn.Linear(d_model, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=False)

    def mix(
        self, x: Tensor, state: AttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, AttentionState | None]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.rotary:
            place = positions(x.shape[1], None if state is None else state.seen, cu_seqlens, x.device)
            q, k = (rotate(z, place, self.config.rope_theta) for z in (q, k))
        if state is None and self._trains_varlen(q, cu_seqlens):
            o = self._attend_varlen(q, k, v, cu_seqlens)
        elif cu_seqlens is not None:
            o, state = self._attend_packed(q, k, v, state, cu_seqlens)
        elif state is None:
            o = self._attend(q, k, v)
        else:
            o, state = self._attend_cached(q, k, v, state)
        return self.o_proj(o.flatten(-2)), state

    def _hides(self, tokens: int) -> bool:
        """Whether the window hides some of that many tokens from the last of them."""
        return self.config.window is not None and self.config.window < tokens

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None = None) -> Tensor:
        """q `[N, T, H, D]` at the end of k, v `[N, L + T, HKV, D]`, of whose first L rows the last `filled` `[N]` count (None: all)."""
        T, rows = q.shape[1], k.shape[1]
        causal = rows == T and not self._hides(T)
        mask = None
        if not causal:
            key = torch.arange(rows, device=q.device)
            age = torch.arange(rows - T, rows, device=q.device)[:, None] - key
            mask = (age >= 0) if self.config.window is None else (age >= 0) & (age < self.config.window)
            if filled is not None:
                mask = mask & (key >= rows - T - filled[:, None])[:, None, None]
        grouped = self.kv_heads != self.heads
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return o.transpose(1, 2)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        T, past = q.shape[1], state.keys.shape[1]
        keys, values = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        o = self._attend(q, keys, values, state.seen.clamp(max=past))
        if self.config.window is None:
            self._refuse_beyond(past + T)
        else:
            keys, values = keys[:, T:], values[:, T:]
        return o, AttentionState(keys, values, state.seen + T)

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState | None]:
        """One sequence after the other: nothing can leak, and the work is that of their lengths squared."""
        pieces = list(pairwise(bounds(cu_seqlens)))
        outputs, caches = [], []
        past = 0 if state is None else state.keys.shape[1]
        filled = [0] * len(pieces) if state is None else state.seen.clamp(max=past).tolist()
        for n, (start, end) in enumerate(pieces):
            keys, values = k[:, start:end], v[:, start:end]
            if state is not None:
                old = slice(past - filled[n], past)
                keys = torch.cat([state.keys[n : n + 1, old], keys], 1)
                values = torch.cat([state.values[n : n + 1, old], values], 1)
                caches.append((keys, values))
            outputs.append(self._attend(q[:, start:end], keys, values) if end > start else q[:, start:end])
        o = torch.cat(outputs, 1)
        if state is None:
            return o, None
        rows = max(keys.shape[1] for keys, _ in caches)
        if self.config.window is None:
            self._refuse_beyond(rows)
        else:
            rows = self.config.window - 1
        keys, values = (torch.cat([_last(cache[i], rows) for cache in caches]) for i in (0, 1))
        return o, AttentionState(keys, values, state.seen + cu_seqlens.diff())

    def _trains_varlen(self, q: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether torch's kernel for packed sequences can run this, and has less to do than a whole square."""
        half = q.dtype in (torch.bfloat16, torch.float16)
        return q.is_cuda and half and (cu_seqlens is not None or self._hides(q.shape[1]))

    def path(self, x: Tensor) -> str:
        if self._trains_varlen(x, None):
            return "torch's varlen attention"
        packed = ", packed sequences on torch's varlen attention" if x.is_cuda and x.dtype != torch.float32 else ""
        return f"scaled_dot_product_attention{packed}"

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # here: it is slow to import, and CUDA's alone

        B, T = q.shape[:2]
        if cu_seqlens is None:
            places, most = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32), T
        else:
            places, most = cu_seqlens.to(torch.int32), longest(cu_seqlens)
        left = -1 if self.config.window is None else self.config.window - 1
        if self.kv_heads != self.heads:  # by hand: torch 2.11's has no option for it
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 2) for z in (k, v))
        q, k, v = (z.flatten(0, 1) for z in (q, k, v))
        o = varlen_attn(q, k, v, places, places, most, most, window_size=(left, 0))
        assert isinstance(o, Tensor)
        return o.unflatten(0, (B, T))

    def _refuse_beyond(self, tokens: int) -> None:
        if tokens > self.config.max_context:
            raise ValueError(
                f"the attention cache takes max_context = {self.config.max_context} tokens, got {tokens}: "
                "raise max_context, or give the layer a window"
            )

    @property
    def max_context(self) -> int | None:
        return None if self.config.window else self.config.max_context

    def init_state(
        self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """The state of `batch` sequences that have not begun: a window's rows, or no rows yet."""
        weight = self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch, (self.config.window or 1) - 1, self.kv_heads, self.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        return AttentionState(keys, values, torch.zeros(batch, device=device, dtype=torch.int64))

    def state_bytes(self, batch: int = 1, context: int = 0) -> int:
        state = self.init_state(batch, torch.device("meta"))
        row = 2 * batch * self.kv_heads * self.head_dim * state.keys.itemsize
        return super().state_bytes(batch) + (0 if self.config.window else context * row)

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token: projections, and two products with each of the tokens that it sees, on average."""
        linears = 2 * sum(p.numel() for p in self.parameters())
        window = min(self.config.window or context, context)
        pairs = window * context - window * (window - 1) // 2  # of query and key, the diagonal included
        return linears + 4 * self.heads * self.head_dim * pairs // context


def _last(x: Tensor, rows: int) -> Tensor:
    """The last `rows` rows of x `[1, L, H, D]`, zeros in front where there are fewer."""
    return F.pad(x[:, max(x.shape[1] - rows, 0) :], (0, 0, 0, 0, max(rows - x.shape[1], 0), 0))
