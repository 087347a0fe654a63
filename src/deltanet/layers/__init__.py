"""Layers: the DeltaNet mixer and what a block is made of. May import ops; `models` builds language models of them.

A mixer is `Mixer(d_model, config)`, called as `y, state = mixer(x, state, cu_seqlens=..., mask=...)`. The names:
"""

from deltanet.layers.delta_net import DeltaNet, DeltaNetConfig, DeltaNetState
from deltanet.layers.feed_forward import FeedForward
from deltanet.layers.norm import RMSNorm, l2_normalize, widen
from deltanet.layers.short_conv import ShortConv
from deltanet.layers.state import concatenate, reorder, snapshot, state_bytes

__all__ = [
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaNetState",
    "FeedForward",
    "RMSNorm",
    "ShortConv",
    "concatenate",
    "l2_normalize",
    "reorder",
    "snapshot",
    "state_bytes",
    "widen",
]
