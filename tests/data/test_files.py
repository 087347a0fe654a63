"""Every kind of file that is read, and every fault in one, named by file and line."""

import gzip
import json

import pytest

from deltanet.data.files import BadLines, read_documents


def read(path):
    return list(read_documents(path, BadLines("error")))


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_txt_file_is_one_document_with_its_line_ends(tmp_path):
    assert read(write(tmp_path, "a.txt", "one\r\n\ntwo é".encode())) == ["one\r\n\ntwo é"]


def test_a_line_of_json_is_a_document_blank_lines_and_empty_texts_are_none(tmp_path):
    lines = b'{"text": "one", "id": 1}\n\n{"text": ""}\r\n  \n{"text": "t\\nwo"}'
    assert read(write(tmp_path, "a.jsonl", lines)) == ["one", "t\nwo"]
    assert read(write(tmp_path, "a.jsonl.gz", gzip.compress(lines))) == ["one", "t\nwo"]


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert read(write(tmp_path, "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert read(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}')) == ["one"]


def test_a_folder_is_read_in_sorted_order_without_hidden_and_other_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "c.jsonl", ".hidden.txt", ".git/x.txt", "notes.md"):
        write(tmp_path, name, b'{"text": "c.jsonl"}' if name.endswith("jsonl") else name.encode())
    assert read(tmp_path) == ["a/z.txt", "b.txt", "c.jsonl"]


FAULTS = {
    "empty.txt": (b"", r"empty.txt' must hold text, got an empty file"),
    "latin.txt": (b"fine\ncaf\xe9\n", r"latin.txt:2: expected UTF-8, got byte 0xe9 at column 4: convert"),
    "binary.txt": (b"fine\nfine\nno\0t\n", r"binary.txt:3: expected text, got a NUL byte"),
    "utf16.txt": ("text".encode("utf-16"), r"utf16.txt:1: expected UTF-8, got byte 0xff at column 1"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', r"latin.jsonl:1: expected UTF-8, got byte 0xe9 at column 14"),
    "torn.jsonl": (b'{"text": "a"}\n{"text": "b', r"torn.jsonl:2: expected one JSON object on the line, got Untermin"),
    "deep.jsonl": (b"[" * 100_000, r"deep.jsonl:1: expected one JSON object on the line"),
    "list.jsonl": (b'["text"]', r'list.jsonl:1: expected a JSON object with a string under "text", got list'),
    "other.jsonl": (b'{"txt": "a", "id": 1}', r"other.jsonl:1: .* under \"text\", got the fields \['id', 'txt'\]"),
    "number.jsonl": (b'{"text": 7}', r'number.jsonl:1: .* got int in "text": correct the line'),
    "null.jsonl": (b'\n{"text": null}', r'null.jsonl:2: .* got NoneType in "text"'),
    "nul.jsonl": (b'{"text": "a\\u0000"}', r"nul.jsonl:1: expected text, got a NUL character"),
    "half.jsonl": (b'{"text": "ab\\ud800"}', r"half.jsonl:1: expected text, got a lone surrogate at character 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_file_and_line(name, tmp_path):
    content, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, content))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_skipped_and_is_counted(name, tmp_path):
    write(tmp_path, name, FAULTS[name][0])
    write(tmp_path, "zz.txt", b"sound")
    bad = BadLines("skip")
    assert list(read_documents(tmp_path, bad))[-1] == "sound"
    assert bad.count == 1


def test_skipping_keeps_the_good_lines_of_the_file(tmp_path):
    path = write(tmp_path, "a.txt", b"one\ncaf\xe9\ntwo\n\0\nthree\n")
    bad = BadLines("skip")
    assert list(read_documents(path, bad)) == ["one\ntwo\nthree\n"]
    assert bad.count == 2


@pytest.mark.parametrize("damage", ["cut", "garbled", "no deflate", "foreign"])
def test_damaged_compression_is_an_error_even_when_bad_lines_are_skipped(damage, tmp_path):
    lines = "".join(json.dumps({"text": f"{i * i}"}) + "\n" for i in range(5000)).encode()
    packed = gzip.compress(lines)
    middle = len(packed) // 2
    content = {
        "cut": packed[:-9],
        "garbled": packed[:middle] + bytes(200) + packed[middle + 200 :],
        "no deflate": packed[:10] + b"\xff" * 100,
        "foreign": lines,
    }[damage]
    path = write(tmp_path, "a.jsonl.gz", content)
    with pytest.raises(ValueError, match=r"a.jsonl.gz:\d+: expected gzip data, got .*: compress the file again"):
        list(read_documents(path, BadLines("skip")))


def test_other_kinds_of_files_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"data must be .txt, .jsonl, .jsonl.gz or a folder of those, got '.*a.parquet'"
    ):
        read(write(tmp_path, "a.parquet", b"PAR1"))
    with pytest.raises(ValueError, match=r"the folder '.*' must hold .txt, .jsonl, .jsonl.gz files, got none"):
        read(tmp_path)
