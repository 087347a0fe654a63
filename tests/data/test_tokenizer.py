"""Bytes in, bytes out, also when they come one at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltanet.data import ByteTokenizer

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_text_survives_the_round_trip(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert tokens.dtype == np.uint16
    assert TOKENIZER.count_bytes(tokens) == len(text.encode()) == len(tokens)


@given(st.binary())
def test_any_bytes_are_tokens(raw):
    tokens = TOKENIZER.encode(raw)
    assert tokens.astype(np.uint8).tobytes() == raw
    assert TOKENIZER.decode(tokens) == raw.decode(errors="replace")


@given(st.lists(st.integers(0, 256)), st.data())
def test_streaming_gives_what_decoding_at_once_gives(tokens, data):
    decoder = TOKENIZER.decoder()
    text, position = "", 0
    while position < len(tokens):
        size = data.draw(st.integers(0, 3))
        text += decoder.feed(tokens[position : position + size])
        position += size
    assert text + decoder.flush() == TOKENIZER.decode(tokens)


def test_a_split_character_waits_for_its_last_byte():
    decoder = TOKENIZER.decoder()
    assert [decoder.feed(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert decoder.flush() == ""


def test_an_unfinished_character_becomes_visible_at_the_end_and_at_a_separator():
    decoder = TOKENIZER.decoder()
    assert decoder.feed([0xE2, 0x82]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed([0x41]) == "A"
    assert TOKENIZER.decode([0xE2, 0x82, 256, 0xAC]) == "\ufffd\ufffd"


def test_separators_and_masked_targets_stand_for_no_bytes():
    assert TOKENIZER.decode([256, 72, 105, 256]) == "Hi"
    assert TOKENIZER.count_bytes(torch.tensor([[256, 72], [-100, 105]])) == 2


@pytest.mark.parametrize("wrong", [-1, 257, 70000])
def test_an_id_outside_the_vocabulary_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"token ids must be in \[0, 257\), got {wrong}"):
        TOKENIZER.decode([65, wrong])


def test_tokens_must_be_integers():
    with pytest.raises(TypeError, match="tokens must be integers, got float64"):
        TOKENIZER.decode([1.5])


def test_the_fingerprint_never_changes():
    """Checkpoints and shards hold it: a change would orphan them."""
    assert TOKENIZER.fingerprint == "437a72d8fc5ed8fefdc0ae1b756208ce75de6dd04a9bb45fdd6b8bcc68f3c786"
