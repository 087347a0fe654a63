"""DeltaNet: linear transformers that write to their memory by the delta rule, trained in parallel over the sequence."""

from deltanet.layers import DeltaNet, DeltaNetConfig
from deltanet.models import LanguageModel, ModelConfig, preset
from deltanet.ops import BackendError, chunk_delta_rule, explain, recurrent_delta_rule

__all__ = [
    "BackendError",
    "DeltaNet",
    "DeltaNetConfig",
    "LanguageModel",
    "ModelConfig",
    "chunk_delta_rule",
    "explain",
    "preset",
    "recurrent_delta_rule",
]
