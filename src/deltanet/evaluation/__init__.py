"""What a model is worth, measured: bits per byte, and what a generated token costs; and the pictures of it.

May import inference, models, data and below. Used by training (validation during a run) and the command line.
"""

from deltanet.evaluation.language_modeling import Score, compressed_bits_per_byte, evaluate, text_of, token_losses

__all__ = ["Score", "compressed_bits_per_byte", "evaluate", "text_of", "token_losses"]
