"""The feed-forward half of a block: SwiGLU (Shazeer 2020, arXiv 2002.05202), down(silu(gate(x)) * up(x))."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeedForward", "default_width"]


def default_width(d_model: int) -> int:
    """8/3 of the model's width, rounded up to a multiple of 256: as many parameters as a plain block of four times the width."""
    return 256 * -(-(8 * d_model // 3) // 256)


class FeedForward(nn.Module):
    """`[..., d_model]` -> `[..., d_model]` through `width` hidden units."""

    def __init__(self, d_model: int, width: int | None = None) -> None:
        super().__init__()
        width = default_width(d_model) if width is None else width
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token."""
        return 2 * sum(p.numel() for p in self.parameters())
