"""Short convolution: each channel mixes its last `width` inputs. Causal, depthwise; streams, and never crosses packed sequences.

    y_t = norm(activation(b + sum_j w_j x_{t - width + 1 + j})),    j = 0 .. width - 1     x before the sequence's start is its tail, or zero

On a GPU this is one kernel forward and one backward (`kernels/triton/short_conv.py`) for widths of 2 to 8, otherwise PyTorch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers.norm import L2_EPS, l2_normalize
from deltanet.layers.rotary import positions
from deltanet.ops.short_conv import fused_short_conv, fused_short_conv_step, refuse_short_conv

__all__ = ["ACTIVATIONS", "ShortConv", "activate"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


def activate(x: Tensor, activation: str, unit: int | None) -> Tensor:
    """What follows a convolution, or stands in its place: x `[..., D]` through ACTIVATIONS, then every `unit` channels L2-normalised, if given."""
    x = ACTIVATIONS[activation](x)
    return x if unit is None else l2_normalize(x.unflatten(-1, (-1, unit))).flatten(-2)


class ShortConv(nn.Module):
    """`[B, T, D]` -> `[B, T, D]`. The tail `[N, width - 1, D]` holds the last inputs of each sequence.

    The weight is `[D, 1, width]`, as a depthwise `nn.Conv1d` has it.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, 1, width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform within 1/sqrt(width), as nn.Conv1d."""
        with torch.no_grad():
            self.weight.uniform_(-(self.width**-0.5), self.width**-0.5, generator=generator)

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        activation: str = "identity",
        bias: Tensor | None = None,
        unit: int | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The convolved sequence, and the new tail if one was given. With `cu_seqlens` `[N + 1]`, x is `[1, T, D]`.

        Args:
            activation: what the sums pass through, a name of ACTIVATIONS.
            bias: `[D]`, added to the sums.
            unit: so many channels, which must divide D, are L2-normalised together at the end; none if not given.
            overwrite: where one token of each sequence is a kernel's step, its new tail may take the old one's place.
        """
        if unit is not None and x.shape[-1] % unit:
            raise ValueError(f"unit must divide D = {x.shape[-1]}, got {unit}: channels are normalised in whole units")
        tail = None if tail is None else tail.to(x.dtype)
        if refuse_short_conv(x, self.width, unit or 0) is None:
            if tail is not None and x.shape[1] == 1 and cu_seqlens is None:
                step = fused_short_conv_step(x, self.weight, bias, tail, activation, unit or 0, L2_EPS, inplace=overwrite)
                if step is not None:
                    return step
            y = fused_short_conv(x, self.weight, bias, tail, cu_seqlens, activation, unit or 0, L2_EPS)
        else:
            y = self._sum(x, tail, cu_seqlens)
            y = activate(y if bias is None else y + bias.to(y.dtype), activation, unit)
        return y, None if tail is None else self._new_tail(x, tail, cu_seqlens)

    def _sum(self, x: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """sum_j w_j x_{t - width + 1 + j} in PyTorch."""
        past, T = self.width - 1, x.shape[1]
        if cu_seqlens is not None and tail is not None:
            token = torch.arange(T, device=x.device)
            sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
            place = (token - cu_seqlens[sequence])[:, None] - past + torch.arange(self.width, device=x.device)
            windows = self._inputs(x, tail, cu_seqlens, sequence[:, None].expand_as(place), place)[None].unbind(2)
        else:
            joined = F.pad(x, (0, 0, past, 0)) if tail is None else torch.cat([tail, x], 1)
            if T == 1:  # generation: every operation is a call, and a call takes longer than its work
                return (joined * self.weight[:, 0].t().to(x.dtype)).sum(1, keepdim=True)
            windows = tuple(joined[:, j : j + T] for j in range(self.width))
        if cu_seqlens is not None and tail is None:
            # Whatever lies before a token's own sequence is zero. Gathers nothing, so its gradient scatters nothing.
            place = positions(T, None, cu_seqlens, x.device)[..., None]
            windows = tuple(window * (place >= past - j) for j, window in enumerate(windows))
        taps = self.weight[:, 0].to(x.dtype).unbind(-1)
        y = windows[0] * taps[0]
        for window, tap in zip(windows[1:], taps[1:], strict=True):
            y = torch.addcmul(y, window, tap)
        return y

    def _new_tail(self, x: Tensor, tail: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The last inputs of every sequence, which may reach back into its old tail."""
        past, T = self.width - 1, x.shape[1]
        if cu_seqlens is None:  # a copy: a view would keep all of x in memory
            return x[:, T - past :].clone() if past <= T else torch.cat([tail[:, T:], x], 1)
        every, slot = (torch.arange(n, device=x.device) for n in (len(cu_seqlens) - 1, past))
        place = cu_seqlens.diff().to(torch.int64)[:, None] - past + slot
        return self._inputs(x, tail, cu_seqlens, every[:, None].expand_as(place), place)

    def _inputs(self, x: Tensor, tail: Tensor, cu_seqlens: Tensor, sequence: Tensor, place: Tensor) -> Tensor:
        """The inputs `[..., D]` at `place` `[...]` of `sequence` `[...]`; places below 0 are in the tail."""
        rows = torch.cat([x[0], tail.flatten(0, 1)])  # slot s of sequence n's tail is row T + n * past + s
        in_tail = x.shape[1] + (sequence + 1) * (self.width - 1) + place
        return rows[torch.where(place >= 0, cu_seqlens.to(torch.int64)[sequence] + place, in_tail)]

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token."""
        return 2 * self.weight.numel()
