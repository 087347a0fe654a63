"""Which window comes when: shuffled for training, in order for validation. The state of either is one integer."""

import math
from collections.abc import Iterator

import numpy as np

from deltanet.data.packing import Batch, pack
from deltanet.data.stream import TokenStream

ROUNDS = 12  # of the Feistel network; with 6 an index is followed by its neighbour too often, from 10 on by chance
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class ShuffledWindows:
    """Training windows of `context` tokens: an endless sequence that depends on nothing but the stream, `context` and
    `seed`. Batch size, accumulation and world size only cut it into pieces, so training goes on at the same token when
    they change, and all there is to save is the position of the next window.

    An epoch cuts the ring of N tokens into N // T windows from a random phase on and visits each once, in random order.
    All but N % T tokens are a target once per epoch; which ones are left out changes with the phase.

    `batch_size` is the number of windows in one optimiser step. Raises ValueError where the stream has fewer.
    """

    def __init__(self, stream: TokenStream, context: int, *, batch_size: int = 1, seed: int = 0) -> None:
        _check_sizes(context, batch_size)
        self.stream = stream
        self.context = context
        self.seed = seed
        self.windows_per_epoch = len(stream) // context
        if self.windows_per_epoch < batch_size:
            raise ValueError(
                f"one batch of {batch_size} windows of {context} tokens needs {batch_size * context} tokens, "
                f"the training text has {len(stream)}: give more text, or a smaller batch or context"
            )

    def batch_at(self, position: int, batch_size: int) -> Batch:
        """Windows number `position` to `position + batch_size - 1`, counted from the start of training."""
        return self.at(_positions(position, batch_size))

    def at(self, positions: np.ndarray) -> Batch:
        """The windows with these numbers, int [B]: `batch.samples` brings a batch back."""
        samples = np.asarray(positions, dtype=np.int64)
        return pack(self.stream, self._starts(samples), self.context, samples, wrap=True)

    def _starts(self, samples: np.ndarray) -> np.ndarray:
        epoch, index = np.divmod(samples.astype(np.uint64), np.uint64(self.windows_per_epoch))
        key = _mix(_mix(np.full_like(epoch, self.seed % (1 << 64))) + epoch)
        phase = _mix(key) % np.uint64(len(self.stream))
        window = permute(index, self.windows_per_epoch, key)
        return ((phase + window * np.uint64(self.context)) % np.uint64(len(self.stream))).astype(np.int64)


class SequentialWindows:
    """The whole stream in order, once: `len` windows of `context` tokens whose targets together are every byte of text
    exactly once. The last window ends in separators without targets.

    Raises ValueError for a stream without text.
    """

    def __init__(self, stream: TokenStream, context: int) -> None:
        _check_sizes(context, 1)
        if stream.bytes == 0:
            raise ValueError("a stream to evaluate must hold text, got only separators: give some text")
        self.stream = stream
        self.context = context

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.context)

    def batch_at(self, position: int, batch_size: int) -> Batch:
        """Windows number `position` to `position + batch_size - 1`, fewer at the end; IndexError past it."""
        if not 0 <= position < len(self):
            raise IndexError(f"position must be in [0, {len(self)}), got {position}: the stream has no more windows")
        return self.at(_positions(position, min(batch_size, len(self) - position)))

    def at(self, positions: np.ndarray) -> Batch:
        """The windows with these numbers, int [B]."""
        samples = np.asarray(positions, dtype=np.int64)
        return pack(self.stream, samples * self.context, self.context, samples, wrap=False)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order, `batch_size` at a time. Their `bytes` add up to the stream's."""
        for position in range(0, len(self), batch_size):
            yield self.batch_at(position, batch_size)


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a random order of 0 ... size - 1, chosen by `key`, puts each `index`; all uint64 [n], elementwise.

    For one key this is a bijection that needs no table: a Feistel network on the cells of a grid just large enough,
    walked on from the few cells beyond `size` until it comes back.
    """
    columns = math.isqrt(size - 1) + 1 if size > 1 else 1
    rows = -(-size // columns)
    result = _shuffle_grid(index, rows, columns, key)
    while (outside := result >= size).any():
        result[outside] = _shuffle_grid(result[outside], rows, columns, key[outside])
    return result


def _shuffle_grid(cell: np.ndarray, rows: int, columns: int, key: np.ndarray) -> np.ndarray:
    height, width = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(cell, width)
    for step in range(0, ROUNDS, 2):  # the shifts are reduced first: a sum that wraps at 2^64 could not be undone
        row = (row + _mix(column + _mix(key + np.uint64(step))) % height) % height
        column = (column + _mix(row + _mix(key + np.uint64(step + 1))) % width) % width
    return row * width + column


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: each input bit changes half of the 64 output bits. uint64, elementwise."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _positions(position: int, batch_size: int) -> np.ndarray:
    if position < 0 or batch_size < 1:
        raise ValueError(f"position must be >= 0 and batch_size >= 1, got {position} and {batch_size}")
    return np.arange(position, position + batch_size)


def _check_sizes(context: int, batch_size: int) -> None:
    if context < 1 or batch_size < 1:
        raise ValueError(f"context and batch_size must be at least 1, got {context} and {batch_size}")
