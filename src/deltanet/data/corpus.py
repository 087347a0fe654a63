"""Where text comes from: the bundled novels, what is installed with torch, and the user's own files."""

import difflib
import hashlib
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from deltanet.data import python_text
from deltanet.data.files import BadLines, read_documents

AUSTEN_SHA256 = "db2cdbf60584de5e99d05bf89964819ec32e0b9968920e12c4f1217bd63cf87f"
AUSTEN_NOVELS = (
    "EMMA",
    "MANSFIELD PARK",
    "NORTHANGER ABBEY",
    "Persuasion",
    "PRIDE AND PREJUDICE",
    "SENSE AND SENSIBILITY",
)
COLLECTED: dict[str, Literal["docstrings", "source"]] = {"pydocs": "docstrings", "pycode": "source"}
NAMES = ("austen", *COLLECTED)
HELD_OUT = 20  # one document in twenty, or the last twentieth of each


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents for training and for validation, with where they come from. Both may be iterated again and again."""

    name: str
    source: str
    licence: str
    split: str  # a sentence: what is held out for validation
    train: Iterable[str]
    validation: Iterable[str]
    documents: int  # before the split
    bytes: int  # of all documents, in UTF-8
    sha256: str  # of the unpacked file, or of your documents, each ended by NUL
    skipped: int = 0  # bad lines left out

    def record(self) -> dict[str, str | int]:
        """All but the text itself, as plain JSON, for a run's record."""
        return {name: value for name, value in vars(self).items() if name not in ("train", "validation")}


def load_corpus(
    source: str | Path, bad_lines: Literal["error", "skip"] = "error", *, cache: Path | None = None
) -> Corpus:
    """The corpus called `source`, or the user's text at the path `source`.

    "austen" comes with the package. "pydocs" and "pycode" are the docstrings and the source of Python, torch, sympy and
    networkx as installed here, collected once into the folder `cache`; they differ between versions, which `source` names.

    A path is a .txt file (one document), a .jsonl or .jsonl.gz file (one document a line, under "text"), or a folder of
    those, read recursively in sorted order. Every file is read and checked once here, before any compute; the documents
    are read again whenever they are iterated, so text need not fit into memory.

    For validation every twentieth document is held out whole; where that would not be 2 % to 15 % of the bytes (few
    documents, or very unequal ones), the last twentieth of each document, cut at the end of a line where one is near.

    `bad_lines="skip"` leaves out lines that cannot be used and counts them; the default raises ValueError with file and
    line. Text too short to hold any out, and names that are neither corpus nor path, raise ValueError.
    """
    if bad_lines not in ("error", "skip"):
        raise ValueError(f'bad_lines must be "error" or "skip", got {bad_lines!r}')
    if source == "austen":
        return _austen()
    if source in COLLECTED:
        return _collected(str(source), cache)
    path = Path(source)
    if not path.exists():
        near = difflib.get_close_matches(str(source), NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ValueError(
            f"data must be a corpus ({', '.join(NAMES)}) or a path to .txt, .jsonl, .jsonl.gz or a folder of those, "
            f"but nothing is at '{source}': {hint}"
        )
    return _from_files(path, bad_lines, name=path.name, source=str(path), licence="your own text")


def _austen() -> Corpus:
    packed = resources.files("deltanet.data").joinpath("text", "austen.txt.xz").read_bytes()
    novels = _split_novels(_unpack(packed, AUSTEN_SHA256))
    held_out = AUSTEN_NOVELS.index("Persuasion")
    return Corpus(
        name="austen",
        source="the six novels of Jane Austen, from Debian's r-cran-janeaustenr 1.0.0-1",
        licence="public domain",
        split="Persuasion is held out whole",
        train=tuple(novel for i, novel in enumerate(novels) if i != held_out),
        validation=(novels[held_out],),
        documents=len(novels),
        bytes=sum(len(novel.encode()) for novel in novels),
        sha256=AUSTEN_SHA256,
    )


def _unpack(packed: bytes, sha256: str) -> str:
    try:
        raw = lzma.decompress(packed)
    except lzma.LZMAError as error:
        raise ValueError(f"the bundled corpus must be an xz file, got {error}: install deltanet again") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ValueError(f"the bundled corpus must have sha256 {sha256}, got {found}: install deltanet again")
    return raw.decode()


def _split_novels(text: str) -> list[str]:
    """One string per novel, each from its title (alone on its line) up to the next; together they are `text`."""
    titles = [f"{title}\n" for title in AUSTEN_NOVELS]
    starts = [0] + [text.index("\n" + title) + 1 for title in titles[1:]]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


@dataclass(frozen=True)
class Part:
    """One side of a split: what `keep(index, text)` leaves of each document, read anew at every iteration."""

    read: Callable[[], Iterator[str]]
    keep: Callable[[int, str], str]

    def __iter__(self) -> Iterator[str]:
        for index, text in enumerate(self.read()):
            if kept := self.keep(index, text):
                yield kept


def _collected(name: str, cache: Path | None) -> Corpus:
    if cache is None:
        raise ValueError(f"{name} needs a folder to be collected into, got none: give cache=FOLDER")
    kind = COLLECTED[name]
    return _from_files(
        python_text.collect(kind, cache),
        "error",
        name=name,
        source=f"{kind} of {python_text.versions()}",
        licence=python_text.LICENCES,
    )


def _from_files(path: Path, bad_lines: Literal["error", "skip"], *, name: str, source: str, licence: str) -> Corpus:
    bad = BadLines(bad_lines)
    documents = size = wholes = tails = 0
    digest = hashlib.sha256()
    for index, text in enumerate(read_documents(path, bad)):
        raw = text.encode()
        documents, size = documents + 1, size + len(raw)
        wholes += len(raw) if _is_held_out(index) else 0
        tails += len(text[_tail(text) :].encode())
        digest.update(raw + b"\0")
    if not documents:
        raise ValueError(
            f"'{path}' must hold some text, got none ({bad.count} bad lines skipped): check that this is the right file"
        )
    by_document = 0.02 <= wholes / size <= 0.15
    if not by_document and not tails:
        raise ValueError(f"'{path}' must have enough text to hold out a {HELD_OUT}th, got {size} bytes: give more text")

    def read() -> Iterator[str]:
        return read_documents(path, BadLines(bad_lines))

    if by_document:
        split = f"every {HELD_OUT}th document is held out whole"
        train = Part(read, lambda index, text: "" if _is_held_out(index) else text)
        validation = Part(read, lambda index, text: text if _is_held_out(index) else "")
    else:
        split = f"the last {HELD_OUT}th of each document is held out"
        train = Part(read, lambda _, text: text[: _tail(text)])
        validation = Part(read, lambda _, text: text[_tail(text) :])
    return Corpus(
        name=name,
        source=source,
        licence=licence,
        split=split,
        train=train,
        validation=validation,
        documents=documents,
        bytes=size,
        sha256=digest.hexdigest(),
        skipped=bad.count,
    )


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT == HELD_OUT - 1


def _tail(text: str) -> int:
    """Where the last twentieth of `text` starts: after the first line that ends in its first half, else right there."""
    size = len(text) // HELD_OUT
    start = len(text) - size
    return text.find("\n", start, start + size // 2) + 1 or start
