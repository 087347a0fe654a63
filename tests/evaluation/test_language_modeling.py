"""Bits per byte: every byte counted once, documents kept apart, positions where they belong."""

import gzip
import lzma
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from deltanet.data import ByteTokenizer, SequentialWindows, tokenize
from deltanet.evaluation import compressed_bits_per_byte, evaluate, text_of, token_losses
from deltanet.layers import DeltaNetConfig
from deltanet.models import LanguageModel, ModelConfig

DOCUMENTS = ["It was a bright cold day in April, é€😀.", "", "Short.", "x" * 70]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257, d_model=16, depth=2, layers=(DeltaNetConfig(heads=2),), feed_forward=24, init_std=0.4
    )
    return LanguageModel(config).double()


def windows(documents=DOCUMENTS, context=16):
    return SequentialWindows(tokenize(documents, ByteTokenizer()), context)


def by_hand(model, documents, context):
    """(nats, bytes, per position) of every window, one sequence at a time, from the logits."""
    ids = [token for text in documents for token in (256, *text.encode())]
    nats, sizes = torch.zeros(context, dtype=torch.float64), torch.zeros(context, dtype=torch.int64)
    for start in range(0, len(ids), context):
        window = ids[start : start + context + 1]
        begin = 0
        for end in range(1, len(window) + 1):
            if end < len(window) and window[end] != 256:
                continue
            sequence = torch.tensor([window[begin:end]])
            logits = model(sequence)[0][0, :-1].log_softmax(-1)
            for place, token in enumerate(sequence[0, 1:].tolist()):
                nats[place] -= logits[place, token]
                sizes[place] += 1
            begin = end
    return nats, sizes


@pytest.mark.parametrize("context", [7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_score_is_that_of_every_sequence_alone(model, context, batch_size):
    score = evaluate(model, windows(context=context), batch_size=batch_size)
    nats, sizes = by_hand(model, DOCUMENTS, context)
    assert score.bytes.tolist() == score.tokens.tolist() == sizes.tolist()
    torch.testing.assert_close(score.nats, nats, rtol=1e-5, atol=1e-5)
    assert score.bytes.sum() == sum(len(text.encode()) for text in DOCUMENTS)


def test_units(model):
    score = evaluate(model, windows())
    assert score.loss == pytest.approx(float(score.nats.sum()) / int(score.tokens.sum()))
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2))  # one token is one byte here


def test_a_token_may_stand_for_several_bytes(model):
    class Pairs(ByteTokenizer):
        """Pretends that ids from 128 on are two bytes."""

        def count_bytes(self, tokens):
            return super().count_bytes(tokens) + int(((tokens >= 128) & (tokens < 256)).sum())

    stream = tokenize(["abc é"], Pairs())
    score = evaluate(model, SequentialWindows(stream, 4))
    assert int(score.bytes.sum()) == stream.bytes == 8
    assert int(score.tokens.sum()) == 6
    assert score.bits_per_byte == pytest.approx(score.loss * 6 / 8 / math.log(2))


def test_a_uniform_model_takes_the_logarithm_of_its_vocabulary(model):
    flat = LanguageModel(model.config)
    torch.nn.init.zeros_(flat.lm_head.weight)
    assert evaluate(flat, windows()).bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)


def test_a_part_is_spread_over_the_text(model):
    all_windows = windows()
    part = evaluate(model, all_windows, max_tokens=33, batch_size=2)  # three windows of 16
    chosen = [len(all_windows) * i // 3 for i in range(3)]
    assert chosen[1] > 1
    assert chosen[2] > chosen[1] + 1
    nats = sum(token_losses(model, all_windows.at(np.array([i]))).double().sum().item() for i in chosen)
    assert part.nats.sum().item() == pytest.approx(nats, rel=1e-5)
    assert evaluate(model, windows(), max_tokens=10**9).bytes.sum() == windows().stream.bytes


def test_positions_are_binned_without_gap_or_overlap(model):
    score = evaluate(model, windows(["a" * 999], context=200))
    for per_octave in (1, 2, 4):
        rows = score.by_position(per_octave)
        assert rows[0][0] == 0
        assert rows[-1][1] == 199
        assert all(after[0] == before[1] + 1 for before, after in pairwise(rows))
        sizes = [int(score.bytes[first : last + 1].sum()) for first, last, _ in rows]
        mean = sum(size * bits for size, (_, _, bits) in zip(sizes, rows, strict=True)) / sum(sizes)
        assert mean == pytest.approx(score.bits_per_byte)
    assert [last + 1 for _, last, _ in score.by_position(1)] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    assert {16, 23, 32, 45, 64, 91, 128} <= {last + 1 for _, last, _ in score.by_position(2)}


def test_compressors_are_those_of_the_standard_library():
    text = b"It is a truth universally acknowledged, " * 40
    found = compressed_bits_per_byte(text)
    assert found == {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def test_text_of_a_stream_is_all_its_bytes():
    assert text_of(tokenize(DOCUMENTS, ByteTokenizer())) == "".join(DOCUMENTS).encode()


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match="batch_size and max_tokens must be at least 1, got 0 and None"):
        evaluate(model, windows(), batch_size=0)
    with pytest.raises(ValueError, match="got 16 and 0"):
        evaluate(model, windows(), max_tokens=0)
    with pytest.raises(ValueError, match="compression needs some text"):
        compressed_bits_per_byte(b"")
    broken = LanguageModel(model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="losses of an evaluation must be finite"):
        evaluate(broken, windows())
