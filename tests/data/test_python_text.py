"""Docstrings and source of what is installed, from a small package that stands for it."""

import json

import pytest

from deltanet.data import python_text

MODULE = '''"""The module."""

if True:
    class A:
        """A class.

        With a list:
            indented further.
        """

        async def method(self):
            "A method."
            def inner():
                return "not a docstring"

try:
    pass
except ValueError:
    def last(): """A function \\d in a handler."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "package"
    files = {
        "b.py": MODULE,
        "a/x.py": "x = 1  # é\n",
        "tests/t.py": '"""A test."""',
        "site-packages/other.py": '"""Another package."""',
        "broken.py": '"""Torn',
        "surrogate.py": '"""\\ud800"""',
        "nul.py": '"""\\0"""',
        "notes.txt": "no python",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(python_text, "_roots", lambda: [root])
    return root


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_docstrings_come_in_the_order_of_the_source():
    assert python_text.docstrings(MODULE) == [
        "The module.",
        "A class.\n\nWith a list:\n    indented further.",
        "A method.",
        "A function \\d in a handler.",
    ]


def test_one_document_per_file_without_tests_and_broken_files(package, tmp_path):
    assert texts(python_text.collect("docstrings", tmp_path)) == ["\n\n\n".join(python_text.docstrings(MODULE))]
    names = ["a/x.py", "b.py", "broken.py", "nul.py", "surrogate.py"]
    expected = [(package / name).read_text(encoding="utf-8") for name in names]
    assert texts(python_text.collect("source", tmp_path)) == expected


def test_text_is_collected_once_for_these_versions(package, tmp_path, monkeypatch):
    first = python_text.collect("source", tmp_path)
    (package / "b.py").unlink()
    assert python_text.collect("source", tmp_path) == first
    assert len(texts(first)) == 5
    monkeypatch.setattr(python_text, "versions", lambda: "Python 4.0")
    assert python_text.collect("source", tmp_path) != first


def test_an_interrupted_collection_is_not_mistaken_for_a_whole_one(package, tmp_path, monkeypatch):
    def interrupted(kind, root):
        yield "first"
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(python_text, "_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            python_text.collect("source", tmp_path)
    assert len(texts(python_text.collect("source", tmp_path))) == 5


def test_what_is_installed_is_found():
    assert [path.name for path in python_text._roots()][1:2] == ["torch"]
    assert python_text.versions().startswith("Python 3.")
    assert "torch" in python_text.versions()
