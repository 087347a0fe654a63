"""How well a model predicts text, in bits per byte: the one measure that no tokenizer and no vocabulary can flatter.

bits per byte = (sum of the losses in nats) / ln 2 / (bytes of text that the targets stand for)
"""

import gzip
import lzma
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from deltanet.data import Batch, SequentialWindows, Tokenizer, TokenStream
from deltanet.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model made of a text, counted by how many tokens of context each target had (position 0: one token).

    nats     float64 `[T]`: the sum of the losses at that position
    tokens   int64 `[T]`: how many targets there were
    bytes    int64 `[T]`: how many bytes of text these stand for
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Per token; infinite where the loss is beyond what a float's exponential holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    def by_position(self, bins_per_octave: int = 2) -> list[tuple[int, int, float]]:
        """(first, last, bits per byte) of ranges of positions that grow with the position; ranges without text are left out.

        Early positions differ most and late ones are many, so the ranges grow by a factor of 2 ** (1 / bins_per_octave).
        After a power of two of tokens a new range begins, so a training window of that many ends with one.
        """
        length = len(self.nats)
        octaves = range(bins_per_octave * length.bit_length())
        edges = sorted({0, length} | {min(round(2 ** (i / bins_per_octave)), length) for i in octaves})
        rows = []
        for first, end in pairwise(edges):
            size = int(self.bytes[first:end].sum())
            if size:
                rows.append((first, end - 1, float(self.nats[first:end].sum() / math.log(2) / size)))
        return rows


@torch.no_grad()
def evaluate(
    model: LanguageModel, windows: SequentialWindows, *, batch_size: int = 16, max_tokens: int | None = None
) -> Score:
    """Reads `windows` in order, `batch_size` at a time, on the model's device; every window and document starts afresh.

    Args:
        model: any dtype; the losses are added up in fp64.
        windows: each target counts once, and masked ones not at all, so that the bytes are exactly those of the text.
        batch_size: windows at once: a matter of memory and speed only.
        max_tokens: read only as many windows as hold this many tokens (at least one), evenly spread over the text.

    Raises ValueError if the losses are not finite.
    """
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
    device = next(model.parameters()).device
    length = windows.context
    totals = torch.zeros(2, length, dtype=torch.float64)  # nats, and targets
    text_bytes = torch.zeros(length, dtype=torch.int64)
    lengths = _bytes_of_tokens(windows.stream.tokenizer)
    count = len(windows) if max_tokens is None else min(len(windows), -(-max_tokens // length))
    chosen = np.arange(count) * len(windows) // count
    for batch in (windows.at(part) for part in np.split(chosen, range(batch_size, count, batch_size))):
        nats = token_losses(model, batch.to(device)).double().flatten().cpu()
        targets, position = batch.targets.flatten(), _positions(batch)
        real = targets >= 0
        totals[0].index_add_(0, position, nats)
        totals[1].index_add_(0, position, real.double())
        text_bytes.index_add_(0, position, torch.where(real, lengths[targets.clamp(min=0)], 0))
    if not torch.isfinite(totals[0]).all():
        raise ValueError("the losses of an evaluation must be finite, got NaN or infinity: the model diverged")
    return Score(nats=totals[0], tokens=totals[1].long(), bytes=text_bytes)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """What general compressors need for the same text (level 9): {"gzip": ..., "xz": ...} in bits per byte.

    They start knowing nothing of the language and pack the whole text; a model has read other text before.
    """
    if not text:
        raise ValueError("compression needs some text to measure, got none")
    packed = {"gzip": gzip.compress(text, 9, mtime=0), "xz": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}


def text_of(stream: TokenStream) -> bytes:
    """The bytes of all documents of `stream`, one after the other."""
    return stream.tokenizer.decode(stream.read(0, len(stream))).encode()


def token_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats `[B, T]`. Rows with documents inside go through the model packed, so that none sees the one before."""
    if batch.cu_seqlens is None:
        return model.losses(batch.inputs, batch.targets)
    packed = model.losses(batch.inputs.view(1, -1), batch.targets.view(1, -1), cu_seqlens=batch.cu_seqlens)
    return packed.view(batch.inputs.shape)


def _positions(batch: Batch) -> Tensor:
    """How many tokens stand before each input in its sequence, int64 `[B * T]`."""
    rows, length = batch.inputs.shape
    place = torch.arange(rows * length)
    if batch.cu_seqlens is None:
        return place % length
    starts = batch.cu_seqlens.long()
    return place - starts[torch.searchsorted(starts, place, right=True) - 1]


def _bytes_of_tokens(tokenizer: Tokenizer) -> Tensor:
    """How many bytes each id stands for: int64 `[vocabulary]`."""
    return torch.tensor([tokenizer.count_bytes(np.array([token])) for token in range(tokenizer.vocab_size)])
