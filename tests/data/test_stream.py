"""Documents become one ring of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltanet.data import ByteTokenizer, TokenStream, tokenize

TOKENIZER = ByteTokenizer()


class FaultyTokenizer(ByteTokenizer):
    """Gives ids that it may not give."""

    def __init__(self, ids):
        self.ids = ids

    def encode(self, text):
        return np.array(self.ids)


def test_every_document_starts_with_the_separator():
    stream = tokenize(["Hi", b"", "é"], TOKENIZER)
    assert stream.read(0, 7).tolist() == [256, 72, 105, 256, 256, 0xC3, 0xA9]
    assert (len(stream), stream.documents, stream.bytes) == (7, 3, 4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 100), st.integers(0, 60))
def test_reading_goes_round_and_across_shards(sizes, start, length):
    tokens = np.arange(sum(sizes))
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    stream = TokenStream(shards, TOKENIZER, documents=1, bytes=0, sha256="")
    assert len(stream) == len(tokens)
    assert stream.read(start, length).tolist() == [(start + i) % len(tokens) for i in range(length)]


def test_no_document_is_refused():
    with pytest.raises(ValueError, match="a token stream must hold at least one document, got none"):
        tokenize([], TOKENIZER)


@pytest.mark.parametrize("ids", [[1, 257], [-1, 5], [3, 256, 3]])
def test_a_tokenizer_that_breaks_its_promise_is_refused(ids):
    with pytest.raises(ValueError, match=r"a tokenizer must give ids in \[0, 257\) without the separator 256, got"):
        tokenize(["x"], FaultyTokenizer(ids))
