"""Text out of a model: the prompt read in pieces, then one token at a time at constant cost, sampled or greedy.

May import models, data and below. Used by evaluation, training (samples during a run) and the command line.
"""

from deltanet.inference.generate import Ready, decode, generate, prefill, stream_text
from deltanet.inference.sampling import GREEDY, Sampling
from deltanet.inference.step import Step

__all__ = ["GREEDY", "Ready", "Sampling", "Step", "decode", "generate", "prefill", "stream_text"]
