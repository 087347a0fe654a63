"""Language models: blocks of a mixer and a feed-forward layer, their configuration, and the presets on one dial.

May import layers (and ops); knows nothing of data or training. The names:
"""

from deltanet.models.language_model import Block, LanguageModel, ModelConfig
from deltanet.models.presets import SIZES, preset

__all__ = ["SIZES", "Block", "LanguageModel", "ModelConfig", "preset"]
