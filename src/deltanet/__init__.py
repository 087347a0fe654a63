"""DeltaNet: linear transformers that write to their memory by the delta rule, trained in parallel over the sequence."""

from deltanet.ops import BackendError, chunk_delta_rule, explain, recurrent_delta_rule

__all__ = ["BackendError", "chunk_delta_rule", "explain", "recurrent_delta_rule"]
