"""Model sizes on one dial. 340m and 1.3b are the paper's (arXiv 2406.06484, section 4.2); the others serve a laptop and a single GPU."""

import difflib

from deltanet.layers import DeltaNetConfig
from deltanet.models.language_model import ModelConfig

__all__ = ["SIZES", "preset"]

# size: (d_model, depth, heads). Heads are 64 wide up to micro, so that a laptop has more than one, and 128 above, as in the paper.
_SHAPES = {
    "nano": (128, 3, 2),
    "micro": (256, 6, 4),
    "small": (512, 8, 4),
    "medium": (768, 12, 6),
    "340m": (1024, 24, 8),
    "1.3b": (2048, 24, 16),
}
SIZES = tuple(_SHAPES)


def preset(size: str, vocab_size: int = 32000) -> ModelConfig:
    """The DeltaNet of that size. With 32,000 tokens and an untied head, 340m has 374,362,112 parameters and 1.3b 1,365,677,056.

    Raises ValueError for a size that is not in `SIZES`.
    """
    if size not in _SHAPES:
        close = difflib.get_close_matches(size.lower(), SIZES, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}{hint}")
    d_model, depth, heads = _SHAPES[size]
    return ModelConfig(vocab_size=vocab_size, d_model=d_model, depth=depth, layers=(DeltaNetConfig(heads=heads),))
