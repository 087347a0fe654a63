"""Targets and boundaries of packed documents, token by token."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltanet.data import IGNORED, ByteTokenizer, tokenize
from deltanet.data.packing import pack

TOKENIZER = ByteTokenizer()
SEPARATOR = TOKENIZER.separator


def packed(documents, starts, context, *, wrap=True):
    stream = tokenize(documents, TOKENIZER)
    return pack(stream, np.array(starts), context, np.arange(len(starts)), wrap=wrap)


def test_a_row_inside_one_document_has_no_boundaries():
    batch = packed([b"abcdefgh"], [0, 4], 4)
    assert batch.inputs.tolist() == [[SEPARATOR, *b"abc"], [*b"defg"]]
    assert batch.targets.tolist() == [[*b"abcd"], [*b"efgh"]]
    assert batch.cu_seqlens is None
    assert batch.bytes == 8
    assert batch.inputs.dtype == batch.targets.dtype == batch.samples.dtype == torch.int64


def test_the_first_token_of_the_next_document_is_no_target_and_starts_a_sequence():
    batch = packed([b"abc", b"de"], [0], 6)
    assert batch.inputs.tolist() == [[SEPARATOR, *b"abc", SEPARATOR, *b"d"]]
    assert batch.targets.tolist() == [[*b"abc", IGNORED, *b"de"]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.bytes == 5


def test_a_document_that_starts_with_its_row_adds_no_boundary():
    batch = packed([b"abc", b"def"], [0, 4], 4)
    assert batch.cu_seqlens is None
    assert batch.targets[0, -1] == IGNORED


def test_one_boundary_anywhere_makes_every_row_a_sequence():
    batch = packed([b"abcdefgh", b"x", b"", b"y"], [1, 7], 6)
    assert batch.inputs.tolist() == [[*b"abcdef"], [*b"gh", SEPARATOR, *b"x", SEPARATOR, SEPARATOR]]
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 10, 11, 12]


def test_the_end_of_the_stream_is_a_boundary_when_it_wraps_and_the_last_target_when_not():
    wrapped, ended = (packed([b"abc"], [2], 4, wrap=wrap) for wrap in (True, False))
    assert wrapped.inputs.tolist() == [[*b"bc", SEPARATOR, *b"a"]]
    assert wrapped.targets.tolist() == [[*b"c", IGNORED, *b"ab"]]
    assert wrapped.cu_seqlens.tolist() == [0, 2, 4]
    assert ended.inputs.tolist() == [[*b"bc", SEPARATOR, SEPARATOR]]
    assert ended.targets.tolist() == [[*b"c", IGNORED, IGNORED, IGNORED]]
    assert ended.cu_seqlens is None
    assert ended.bytes == 1


@given(
    st.lists(st.binary(max_size=12), min_size=1, max_size=6),
    st.lists(st.integers(0, 100), min_size=1, max_size=4),
    st.integers(1, 20),
)
def test_every_packed_sequence_is_a_piece_of_one_document(documents, starts, context):
    batch = packed(documents, starts, context)
    inputs, targets = batch.inputs.flatten().tolist(), batch.targets.flatten().tolist()
    bounds = range(0, len(inputs) + 1, context) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(inputs)
    assert set(range(0, len(inputs), context)) <= set(bounds)
    for begin, end in pairwise(bounds):
        assert begin < end
        assert SEPARATOR not in inputs[begin + 1 : end], "a document starts inside a sequence"
        piece = bytes(token for token in inputs[begin:end] if token != SEPARATOR)
        rest = bytes(token for token in targets[end - 1 : end] if token != IGNORED)
        assert any(piece + rest in document for document in documents)
        for position in range(begin, end - 1):
            assert targets[position] == inputs[position + 1]
    assert batch.bytes == sum(target != IGNORED for target in targets)


def test_a_batch_moves_to_a_device_whole():
    batch = packed([b"abc", b"de"], [0], 6).to("meta")
    assert batch.inputs.device.type == batch.targets.device.type == batch.cu_seqlens.device.type == "meta"
    assert packed([b"abcdef"], [0], 3).to("cpu").cu_seqlens is None
