"""Language models: blocks of a mixer and a feed-forward layer, their configuration, the paper's models by size and name.

May import layers (and ops); knows nothing of data or training. The names:
"""

from deltanet.models.language_model import Block, LanguageModel, ModelConfig
from deltanet.models.mix import MIXERS, parse_mix
from deltanet.models.presets import MODELS, SIZES, preset

__all__ = ["MIXERS", "MODELS", "SIZES", "Block", "LanguageModel", "ModelConfig", "parse_mix", "preset"]
