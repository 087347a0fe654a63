"""What is written is what is read; what was damaged in between is found before it is used."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltanet.data import ByteTokenizer, open_shards, shards, tokenize, write_shards

TOKENIZER = ByteTokenizer()
DOCUMENTS = ["It is a truth", "", "universally acknowledged", "that"]


class OtherTokenizer(ByteTokenizer):
    fingerprint = "f" * 64


class WideTokenizer(ByteTokenizer):
    """Needs four bytes a token."""

    vocab_size = 1 << 17
    separator = 70_000
    fingerprint = "e" * 64


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "tokens", DOCUMENTS, TOKENIZER, record={"name": "test"}, shard_tokens=10)
    return tmp_path / "tokens"


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def seal(index):
    """Makes an edited index look untouched."""
    del index["sha256"]
    index["sha256"] = shards._index_sha256(index)


@settings(max_examples=30)
@given(documents=st.lists(st.binary(max_size=30), min_size=1, max_size=8), size=st.integers(1, 40))
def test_shards_are_the_stream_that_memory_holds(documents, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "tokens"
    write_shards(folder, documents, TOKENIZER, record={}, shard_tokens=size)
    stored, held = open_shards(folder, TOKENIZER), tokenize(documents, TOKENIZER)
    assert stored.read(0, len(held)).tolist() == held.read(0, len(held)).tolist()
    assert len(stored) == len(held)
    assert (stored.documents, stored.bytes, stored.sha256) == (held.documents, held.bytes, held.sha256)
    assert len(list(folder.glob("*.bin"))) == -(-len(held) // size)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    write_shards(tmp_path / "wide", ["ab"], WideTokenizer(), record={})
    assert (tmp_path / "wide" / "shard-00000.bin").stat().st_size == 12
    assert open_shards(tmp_path / "wide", WideTokenizer()).read(0, 3).tolist() == [70_000, 97, 98]


def test_the_index_tells_what_the_text_is(folder):
    index = shards.read_index(folder)
    assert index["record"] == {"name": "test"}
    assert (index["tokens"], index["documents"], index["bytes"]) == (45, 4, 41)


@pytest.mark.parametrize("shard", range(5))
def test_a_flipped_bit_is_found(folder, shard):
    path = folder / f"shard-{shard:05d}.bin"
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"shard-{shard:05d}.bin was altered after it was written .*prepare again"):
        open_shards(folder, TOKENIZER)


def test_a_truncated_or_missing_shard_is_found(folder):
    path = folder / "shard-00004.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"shard-00004.bin must have 10 bytes, got 8: remove the folder"):
        open_shards(folder, TOKENIZER)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00004.bin must have 10 bytes, got 0: remove the folder"):
        open_shards(folder, TOKENIZER)


def test_an_id_outside_the_vocabulary_is_found_even_under_a_right_hash(folder, monkeypatch):
    monkeypatch.setattr(shards, "READ_AT_ONCE", 4)
    path = folder / "shard-00001.bin"
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[7] = 300
    path.write_bytes(tokens.tobytes())

    def vouch(index):
        index["shards"][1]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
        seal(index)

    edit_index(folder, vouch)
    with pytest.raises(ValueError, match=r"shard-00001.bin must hold ids below 257, got 300 at offset 7"):
        open_shards(folder, TOKENIZER)


def test_an_edited_index_is_found(folder):
    edit_index(folder, lambda index: index["shards"].pop())
    with pytest.raises(ValueError, match=r"index.json was altered after it was written: remove the folder"):
        open_shards(folder, TOKENIZER)


def test_a_newer_format_is_refused(folder):
    edit_index(folder, lambda index: index.update(version=2))
    with pytest.raises(ValueError, match=r"index.json must have version 1, got 2: upgrade deltanet"):
        open_shards(folder, TOKENIZER)


def test_what_is_no_folder_of_shards_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gone' must hold token shards, but there is no index.json: check the path"):
        open_shards(tmp_path / "gone", TOKENIZER)
    for foreign in ('{"torn": ', "[1, 2]", '{"format": "something"}'):
        (folder / "index.json").write_text(foreign)
        with pytest.raises(ValueError, match=r'index.json must be an index of "deltanet token shards", got something'):
            open_shards(folder, TOKENIZER)


def test_tokens_of_another_tokenizer_are_refused(folder):
    with pytest.raises(ValueError, match=r"must hold tokens of the tokenizer ffffffffffff, got those of 437a72d8fc5e"):
        open_shards(folder, OtherTokenizer())


def test_a_folder_is_never_overwritten(folder):
    with pytest.raises(ValueError, match=r"token shards need a new folder, but '.*tokens' exists"):
        write_shards(folder, ["other"], TOKENIZER, record={})
    assert open_shards(folder, TOKENIZER).documents == 4


def test_an_interrupted_call_leaves_nothing_and_a_killed_one_is_no_obstacle(tmp_path):
    def interrupted():
        yield "a" * 50
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "tokens", interrupted(), TOKENIZER, record={}, shard_tokens=10)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".tokens.partial").mkdir()
    (tmp_path / ".tokens.partial" / "shard-00007.bin").write_bytes(b"left behind")
    write_shards(tmp_path / "tokens", ["a"], TOKENIZER, record={})
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["shard-00000.bin"]


def test_no_document_is_refused(tmp_path):
    with pytest.raises(ValueError, match="token shards must hold at least one document, got none"):
        write_shards(tmp_path / "tokens", [], TOKENIZER, record={})
    assert list(tmp_path.iterdir()) == []
