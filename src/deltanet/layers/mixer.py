"""What every token mixer is: one call, one door, and padding turned into packed sequences before the mixer sees it."""

from typing import Any

import torch
from torch import Tensor, nn

from deltanet.layers.state import state_bytes
from deltanet.ops import pack
from deltanet.ops.segments import check_boundaries

__all__ = ["Mixer"]


class Mixer(nn.Module):
    """A causal token mixer, `[B, T, d_model]` -> `[B, T, d_model]`. A kind of mixer gives `mix`, `init_state` and `flops_per_token`.

    >>> y, _ = mixer(x)                                          # training, or a whole prompt
    >>> y, state = mixer(x[:, :100], mixer.init_state(len(x)))   # streaming: give a state and the new one comes back
    >>> y, state = mixer(x[:, 100:101], state)
    """

    config: Any
    overwrite = False  # whether a step of one token may write the new state over the one it is given, where a kernel can

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(
        self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Mix tokens `x` `[B, T, d_model]`.

        Args:
            state: where the sequences stand, from `init_state` or an earlier call; None starts afresh and returns none.
            cu_seqlens: `[N + 1]` boundaries of packed sequences (then B = 1); nothing passes between them.
            mask: `[B, T]` bool, true at real tokens. Padding anywhere changes nothing: it is skipped, and comes out as zero.

        Returns:
            y `[B, T, d_model]`, and the new state if one was given.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be [B, T, d_model] = [B, T, {self.d_model}], got {list(x.shape)}")
        if cu_seqlens is not None:
            if x.shape[0] != 1:
                raise ValueError(f"packed sequences lie in one row: with cu_seqlens B must be 1, got {x.shape[0]}")
            if not torch.compiler.is_compiling():
                check_boundaries(cu_seqlens, x.shape[1])
        if mask is None:
            return self.mix(x, state, cu_seqlens)
        if cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed sequences have no padding")
        packed = pack(mask, (x.shape[0], x.shape[1]))
        y, state = self.mix(packed.gather(x), state, packed.cu_seqlens)
        return packed.scatter(y), state

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """`forward` without padding, its arguments checked."""
        raise NotImplementedError

    def init_state(self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The state of `batch` sequences that have not begun."""
        raise NotImplementedError

    def state_bytes(self, batch: int = 1, context: int = 0) -> int:
        """Bytes that the state of `batch` sequences takes after `context` tokens; most mixers' does not grow."""
        return state_bytes(self.init_state(batch, torch.device("meta")))

    @property
    def max_context(self) -> int | None:
        """Most tokens of a sequence that a state takes in; None where there is no end to it."""
        return None

    def path(self, x: Tensor) -> str | None:
        """Which way a training step on tokens like `x` goes, and why no faster one; None where there is but one, or the operator chooses."""
        return None

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token in sequences of `context` tokens."""
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """First values of the parameters that are no matrix, norm or convolution. Most mixers have none."""
