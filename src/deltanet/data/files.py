"""Reading the user's text: .txt, .jsonl, .jsonl.gz and folders of them, with every fault named by file and line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


class BadLines:
    """What becomes of a line that cannot be used: `"error"` raises ValueError, `"skip"` counts it in `count`."""

    def __init__(self, action: Literal["error", "skip"]) -> None:
        self.action = action
        self.count = 0

    def __call__(self, message: str) -> None:
        if self.action == "error":
            raise ValueError(message)
        self.count += 1


def read_documents(path: Path, bad: BadLines) -> Iterator[str]:
    """The documents at `path`, a file or a folder: not empty, free of NUL, and encodable in UTF-8.

    A .txt file is one document, and so is each line of a .jsonl file, under "text". Blank lines of JSON and empty texts
    are passed over, and so are hidden files and files of other kinds in a folder. A byte order mark is dropped, line
    ends stay. Raises ValueError for a file of another kind, a folder without text, and damaged compression; `bad` hears
    of the rest.
    """
    for file in _files(path):
        if file.stat().st_size == 0:
            bad(f"'{file}' must hold text, got an empty file: remove it or fill it")
        elif file.name.endswith(".txt"):
            yield from _read_txt(file, bad)
        else:
            yield from _read_jsonl(file, bad)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"data must be {', '.join(SUFFIXES)} or a folder of those, got '{path}': "
                "convert it, or rename it to .txt if it is plain text"
            )
        return [path]
    files = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and _is_visible(file, path)]
    if not files:
        raise ValueError(f"the folder '{path}' must hold {', '.join(SUFFIXES)} files, got none: check the path")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _is_visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_txt(file: Path, bad: BadLines) -> Iterator[str]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        clean = "\0" not in text
    except UnicodeDecodeError:
        clean = False
    if not clean:
        lines = (_decode(line, file, number, bad) for number, line in enumerate(raw.splitlines(keepends=True), start=1))
        text = "".join(line for line in lines if line is not None)
    if text:
        yield text


def _read_jsonl(file: Path, bad: BadLines) -> Iterator[str]:
    for number, line in _lines(file):
        decoded = _decode(line, file, number, bad)
        if decoded is None or not decoded.strip():
            continue
        text = _text_of(decoded, file, number, bad)
        if text:
            yield text


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}:{number + 1}: expected gzip data, got {error}: compress the file again") from None


def _decode(line: bytes, file: Path, number: int, bad: BadLines) -> str | None:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad(
            f"{file}:{number}: expected UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}: "
            'convert the file to UTF-8, or skip bad lines with bad_lines="skip"'
        )
        return None
    if "\0" in text:
        bad(f'{file}:{number}: expected text, got a NUL byte: is it binary? Skip bad lines with bad_lines="skip"')
        return None
    return text


def _text_of(line: str, file: Path, number: int, bad: BadLines) -> str | None:
    advice = 'correct the line, or skip bad lines with bad_lines="skip"'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        bad(f"{file}:{number}: expected one JSON object on the line, got {error}: {advice}")
        return None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        got = f"the fields {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        if isinstance(value, dict) and "text" in value:
            got = f'{type(value["text"]).__name__} in "text"'
        bad(f'{file}:{number}: expected a JSON object with a string under "text", got {got}: {advice}')
        return None
    text = value["text"]
    if "\0" in text:
        bad(f"{file}:{number}: expected text, got a NUL character: {advice}")
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad(f"{file}:{number}: expected text, got a lone surrogate at character {error.start}: {advice}")
        return None
    return text
