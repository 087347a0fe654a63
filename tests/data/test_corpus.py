"""The bundled novels, how the user's text is split, and names that are neither."""

import hashlib
import json
import lzma

import pytest

from deltanet.data import corpus, load_corpus


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def austen():
    return load_corpus("austen")


def test_the_novels_together_are_the_file_that_was_bundled(austen):
    train, (persuasion,) = list(austen.train), austen.validation
    whole = "".join([*train[:3], persuasion, *train[3:]]).encode()
    assert len(whole) == austen.bytes == 4_025_035
    assert hashlib.sha256(whole).hexdigest() == austen.sha256


def test_persuasion_is_held_out_whole(austen):
    (persuasion,) = austen.validation
    assert persuasion.startswith("Persuasion\n\n\nby\n\nJane Austen")
    assert "Kellynch" in persuasion
    assert not any("Kellynch" in novel for novel in austen.train)
    openings = [novel.partition("\n")[0] for novel in austen.train]
    assert openings == ["EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY"]


def test_a_damaged_bundle_is_refused():
    with pytest.raises(ValueError, match=r"the bundled corpus must be an xz file, got .*: install deltanet again"):
        corpus._unpack(b"no xz at all", corpus.AUSTEN_SHA256)
    with pytest.raises(ValueError, match=r"the bundled corpus must have sha256 db2cdb\w+, got \w+: install"):
        corpus._unpack(lzma.compress(b"EMMA, abridged"), corpus.AUSTEN_SHA256)


def test_a_record_is_plain_json_without_the_text(austen):
    record = austen.record()
    assert json.loads(json.dumps(record)) == record
    assert record["licence"] == "public domain"
    assert "train" not in record


def test_of_many_documents_every_twentieth_is_held_out_whole(tmp_path):
    texts = [f"document {i:03d}" for i in range(100)]
    found = load_corpus(write_jsonl(tmp_path / "many.jsonl", texts))
    assert list(found.validation) == texts[19::20]
    assert sorted([*found.train, *found.validation]) == texts
    assert (found.documents, found.bytes) == (100, 1200)
    assert found.split == "every 20th document is held out whole"
    assert list(found.train) == list(found.train), "a corpus may be iterated again"


def test_of_one_document_the_last_lines_are_held_out(tmp_path):
    text = "".join(f"line {i:04d}\n" for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    found = load_corpus(tmp_path / "one.txt")
    (train,), (validation,) = found.train, found.validation
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.045 < len(validation) / len(text) <= 0.05
    assert found.split == "the last 20th of each document is held out"


def test_very_unequal_documents_are_each_split(tmp_path):
    texts = ["small"] * 19 + ["large " * 1000]
    found = load_corpus(write_jsonl(tmp_path / "unequal.jsonl", texts))
    assert sum(map(len, found.validation)) == 300
    assert sum(map(len, found.train)) == 19 * 5 + 5700


def test_a_text_without_lines_is_split_too(tmp_path):
    (tmp_path / "flat.txt").write_text("é" * 100)
    found = load_corpus(str(tmp_path / "flat.txt"))
    assert (list(found.train), list(found.validation)) == (["é" * 95], ["é" * 5])


def test_the_hash_knows_where_documents_end(tmp_path):
    first = load_corpus(write_jsonl(tmp_path / "a.jsonl", ["ab", "c" * 40]))
    second = load_corpus(write_jsonl(tmp_path / "b.jsonl", ["a", "b" + "c" * 40]))
    assert first.bytes == second.bytes
    assert first.sha256 != second.sha256


def test_text_too_short_to_hold_any_out_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    with pytest.raises(
        ValueError, match=r"short.txt' must have enough text to hold out a 20th, got 16 bytes: give more"
    ):
        load_corpus(tmp_path / "short.txt")


def test_skipped_lines_are_counted_and_nothing_left_is_an_error(tmp_path):
    good, bad = '{"text": "some text of forty characters, or more"}\n', "not json\n"
    (tmp_path / "mixed.jsonl").write_text(good + bad + good + bad)
    assert load_corpus(tmp_path / "mixed.jsonl", bad_lines="skip").skipped == 2
    (tmp_path / "bad.jsonl").write_text(bad * 3)
    with pytest.raises(ValueError, match=r"bad.jsonl' must hold some text, got none \(3 bad lines skipped\): check"):
        load_corpus(tmp_path / "bad.jsonl", bad_lines="skip")


def test_what_is_neither_corpus_nor_path_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is at 'austin': did you mean 'austen'\?"):
        load_corpus("austin")
    with pytest.raises(ValueError, match=r"nothing is at '.*gone.txt': check the path"):
        load_corpus(tmp_path / "gone.txt")


def test_unknown_ways_with_bad_lines_are_refused(tmp_path):
    with pytest.raises(ValueError, match='bad_lines must be "error" or "skip", got \'ignore\''):
        load_corpus(tmp_path, bad_lines="ignore")


def test_collected_text_needs_a_folder_and_says_its_versions(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pydocs needs a folder to be collected into, got none: give cache=FOLDER"):
        load_corpus("pydocs")
    monkeypatch.setattr(corpus.python_text, "_roots", lambda: [tmp_path / "package"])
    (tmp_path / "package").mkdir()
    for name in "ab":
        (tmp_path / "package" / f"{name}.py").write_text(f'"""{name * 500}"""')
    found = load_corpus("pydocs", cache=tmp_path / "cache")
    assert (found.name, found.bytes, found.documents) == ("pydocs", 1000, 2)
    assert found.source.startswith("docstrings of Python 3.")
    assert load_corpus("pycode", cache=tmp_path / "cache").bytes == 1012
