"""The same two streams, whether they are held in memory or kept in a folder."""

import pytest

from deltanet.data import ByteTokenizer, load_corpus, prepare

TOKENIZER = ByteTokenizer()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(300)))
    return path


def test_memory_and_folder_hold_the_same(text, tmp_path):
    corpus = load_corpus(text)
    held = prepare(corpus, TOKENIZER)
    for _ in ("made", "found again"):
        kept = prepare(corpus, TOKENIZER, tmp_path / "run" / "data")
        assert [(stream.sha256, stream.bytes) for stream in kept] == [(stream.sha256, stream.bytes) for stream in held]
    assert held.train.bytes + held.validation.bytes == corpus.bytes


def test_what_was_interrupted_is_finished(text, tmp_path):
    corpus = load_corpus(text)
    prepare(corpus, TOKENIZER, tmp_path / "data")
    (tmp_path / "data" / "validation").rename(tmp_path / "data" / ".validation.partial")
    before = (tmp_path / "data" / "train" / "index.json").stat()
    assert prepare(corpus, TOKENIZER, tmp_path / "data").validation.documents == 1
    assert (tmp_path / "data" / "train" / "index.json").stat() == before


def test_shards_of_other_text_are_refused(text, tmp_path):
    prepare(load_corpus(text), TOKENIZER, tmp_path / "data")
    text.write_text(text.read_text() + "one more line\n")
    with pytest.raises(
        ValueError, match=r"train' must hold tokens of .*text.txt as it is now, got those of .*text.txt"
    ):
        prepare(load_corpus(text), TOKENIZER, tmp_path / "data")
