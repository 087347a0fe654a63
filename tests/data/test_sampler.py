"""The order of windows: a bijection, a pure function of integers, whatever the split."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltanet.data import IGNORED, ByteTokenizer, SequentialWindows, ShuffledWindows, TokenStream, tokenize
from deltanet.data.sampler import permute

TOKENIZER = ByteTokenizer()


def numbered(tokens):
    """A stream whose tokens say where they stand: its separator never appears."""
    return TokenStream([np.arange(1000, 1000 + tokens)], TOKENIZER, documents=1, bytes=tokens, sha256="")


def order(size, key):
    return permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, dtype=np.uint64)).astype(int)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_a_bijection(size, key):
    assert sorted(order(size, key)) == list(range(size))


def test_a_permutation_of_many_stays_in_range():
    size = 2**40 + 12345
    index = np.arange(size - 5000, size, dtype=np.uint64)
    moved = permute(index, size, np.full_like(index, 7))
    assert moved.max() < size
    assert len(set(moved.tolist())) == 5000


def test_permutations_look_random():
    """Where each index goes, how often it is followed by its neighbour, and how like the plain order a long one is."""
    orders = np.array([order(10, key) for key in range(2000)])
    for index in range(10):
        counts = np.bincount(orders[:, index], minlength=10)
        assert abs(counts - 200).max() < 5 * np.sqrt(200), "each place equally likely"
    neighbours = np.count_nonzero(np.diff(orders) == 1, axis=1)
    assert neighbours.mean() == pytest.approx(0.9, abs=0.1), "neighbours meet as often as chance has it"
    large = order(10_000, 3)
    assert abs(np.corrcoef(large, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.05


@given(st.integers(5, 400), st.integers(1, 20), st.integers(0, 3), st.integers())
def test_every_token_is_a_target_once_an_epoch_up_to_the_tail(tokens, context, epoch, seed):
    if tokens < context:
        tokens = context
    sampler = ShuffledWindows(numbered(tokens), context, seed=seed)
    windows = sampler.windows_per_epoch
    seen = Counter(sampler.batch_at(epoch * windows, windows).targets.flatten().tolist())
    assert set(seen.values()) == {1}
    assert tokens - len(seen) == tokens % context


def test_epochs_differ_in_order_and_in_phase():
    sampler = ShuffledWindows(numbered(1000), 10, seed=0)
    epochs = [sampler.batch_at(epoch * 100, 100).inputs[:, 0] for epoch in range(20)]
    phases = {int(epoch.min()) % 10 for epoch in epochs}
    assert len(phases) > 5, "the grid of windows moves"
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 20


def test_seeds_differ():
    first, second = (ShuffledWindows(numbered(1000), 10, seed=seed).batch_at(0, 50).inputs for seed in (0, 1))
    assert not torch.equal(first, second)


@given(st.data())
def test_any_split_of_the_sequence_gives_the_same_windows(data):
    """Batch size, gradient accumulation and ranks are ways to cut one sequence; resuming is starting in its middle."""
    make = lambda: ShuffledWindows(numbered(100), 7, seed=3)  # noqa: E731
    start, end = 5, 65  # more than four epochs
    whole = make().batch_at(start, end - start)
    position, rows = start, []
    while position < end:
        size = data.draw(st.integers(1, min(20, end - position)))
        world = data.draw(st.sampled_from([world for world in (1, 2, 3, 4) if size % world == 0]))
        for rank in range(world):
            rows.append(make().batch_at(position + rank * size // world, size // world))
        position += size
    assert torch.equal(torch.cat([batch.inputs for batch in rows]), whole.inputs)
    assert torch.equal(torch.cat([batch.targets for batch in rows]), whole.targets)
    assert torch.cat([batch.samples for batch in rows]).tolist() == list(range(start, end))


def test_samples_bring_a_batch_back():
    sampler = ShuffledWindows(tokenize([b"abc" * 50, b"xyz" * 30], TOKENIZER), 9)
    batch = sampler.batch_at(1234, 26)
    again = sampler.at(batch.samples.numpy())
    assert torch.equal(again.inputs, batch.inputs)
    assert torch.equal(again.cu_seqlens, batch.cu_seqlens)


def test_the_order_never_changes():
    """A checkpoint holds one integer: with another order it would mean another place."""
    sampler = ShuffledWindows(numbered(1000), 10, seed=42)
    assert sampler.batch_at(97, 6).inputs[:, 0].tolist() == [1610, 1460, 1760, 1491, 1221, 1581]


def test_text_shorter_than_a_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"one batch of 16 windows of 10 tokens needs 160 tokens, the training text has 159: give more"
    ):
        ShuffledWindows(numbered(159), 10, batch_size=16)
    ShuffledWindows(numbered(160), 10, batch_size=16)


@pytest.mark.parametrize(("context", "batch_size"), [(0, 1), (-1, 1), (4, 0)])
def test_sizes_must_be_positive(context, batch_size):
    with pytest.raises(ValueError, match=rf"context and batch_size must be at least 1, got {context} and {batch_size}"):
        ShuffledWindows(numbered(100), context, batch_size=batch_size)
    if context < 1:
        with pytest.raises(ValueError, match="context and batch_size must be at least 1"):
            SequentialWindows(numbered(100), context)


def test_positions_must_not_be_negative():
    with pytest.raises(ValueError, match="position must be >= 0 and batch_size >= 1, got -1 and 4"):
        ShuffledWindows(numbered(100), 4).batch_at(-1, 4)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5).filter(any), st.integers(1, 30), st.integers(1, 5))
def test_in_order_every_byte_is_a_target_exactly_once(documents, context, batch_size):
    stream = tokenize(documents, TOKENIZER)
    windows = SequentialWindows(stream, context)
    batches = list(windows.batches(batch_size))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert bytes(targets[targets != IGNORED].tolist()) == b"".join(documents)
    assert sum(batch.bytes for batch in batches) == stream.bytes
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(len(windows)))
    assert all(batch.inputs.shape == (batch_size, context) for batch in batches[:-1])


def test_windows_in_order_end():
    windows = SequentialWindows(tokenize([b"abcdef"], TOKENIZER), 4)
    assert len(windows) == 2
    assert windows.batch_at(1, 5).inputs.tolist() == [[*b"def", TOKENIZER.separator]]
    with pytest.raises(IndexError, match=r"position must be in \[0, 2\), got 2: the stream has no more windows"):
        windows.batch_at(2, 1)


def test_a_stream_without_text_cannot_be_evaluated():
    with pytest.raises(ValueError, match="a stream to evaluate must hold text, got only separators"):
        SequentialWindows(tokenize([b"", b""], TOKENIZER), 4)
