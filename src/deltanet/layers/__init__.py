"""Layers: the token mixers, DeltaNet and those it is compared with, and what else a block is made of.

May import ops; `models` builds language models of them.

A mixer is built as `DeltaNet(d_model, config)` and called as `y, state = mixer(x, state, cu_seqlens=..., mask=...)`. The names:
"""

from deltanet.layers.attention import Attention, AttentionConfig, AttentionState
from deltanet.layers.delta_net import DeltaNet, DeltaNetConfig, DeltaNetState
from deltanet.layers.delta_product import DeltaProduct, DeltaProductConfig
from deltanet.layers.feed_forward import FeedForward
from deltanet.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from deltanet.layers.gated_linear_attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    GatedLinearAttentionState,
    RetNet,
    RetNetConfig,
    RetNetState,
)
from deltanet.layers.mamba import Mamba, MambaConfig, MambaState
from deltanet.layers.mixer import Mixer
from deltanet.layers.norm import RMSNorm, l2_normalize, widen
from deltanet.layers.short_conv import ShortConv
from deltanet.layers.state import concatenate, reorder, snapshot, state_bytes

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "DeltaNet",
    "DeltaNetConfig",
    "DeltaNetState",
    "DeltaProduct",
    "DeltaProductConfig",
    "FeedForward",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "GatedLinearAttentionState",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "Mixer",
    "RMSNorm",
    "RetNet",
    "RetNetConfig",
    "RetNetState",
    "ShortConv",
    "concatenate",
    "l2_normalize",
    "reorder",
    "snapshot",
    "state_bytes",
    "widen",
]
