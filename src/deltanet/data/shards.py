"""A token stream on disk: memory-mapped shards of plain integers, and an index that vouches for every byte of them.

A folder holds shard-00000.bin, shard-00001.bin, ... (little-endian uint16 or uint32) and index.json. It appears under
its name only when it is complete, and opening it reads it through once: sizes, hashes, and every id in the vocabulary.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltanet.data.stream import TokenStream, encode_document, token_dtype
from deltanet.data.tokenizer import Tokenizer

FORMAT = "deltanet token shards"
VERSION = 1
READ_AT_ONCE = 1 << 22  # tokens, while checking


def write_shards(
    folder: Path,
    documents: Iterable[str | bytes],
    tokenizer: Tokenizer,
    *,
    record: Mapping[str, Any],
    shard_tokens: int = 1 << 26,
) -> None:
    """Tokenizes `documents` into `folder`, with `record` (plain JSON: what text this is) kept in the index.

    Documents are taken one by one and may go on in the next shard; one shard of `shard_tokens` tokens is in memory at a
    time. A leftover of an interrupted call is replaced. Raises ValueError if `folder` exists or there are no documents;
    whatever is raised, no half-written folder stays.
    """
    if folder.exists():
        raise ValueError(f"token shards need a new folder, but '{folder}' exists: open it, or remove it first")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _fill(partial, _cut((encode_document(text, tokenizer) for text in documents), shard_tokens), tokenizer, record)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_shards(folder: Path, tokenizer: Tokenizer) -> TokenStream:
    """The stream in `folder`, memory-mapped, after checking all of it.

    Raises ValueError for a missing, foreign, newer, truncated or altered folder, for tokens of another tokenizer, and
    for ids outside the vocabulary, with the shard and the offset in it.
    """
    index = read_index(folder)
    if index["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"'{folder}' must hold tokens of the tokenizer {tokenizer.fingerprint[:12]}, got those of "
            f"{index['tokenizer'][:12]}: use that tokenizer, or prepare the text again in a new folder"
        )
    dtype = token_dtype(tokenizer)
    paths = [_shard_path(folder, number) for number in range(len(index["shards"]))]
    for path, shard in zip(paths, index["shards"], strict=True):
        expected, size = shard["tokens"] * dtype.itemsize, path.stat().st_size if path.exists() else 0
        if size != expected:
            raise ValueError(f"{path} must have {expected} bytes, got {size}: remove the folder and prepare again")
    shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
    for path, tokens, shard in zip(paths, shards, index["shards"], strict=True):
        _check(path, tokens, shard["sha256"], tokenizer)
    return TokenStream(
        shards, tokenizer, documents=index["documents"], bytes=index["bytes"], sha256=index["tokens_sha256"]
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The index of `folder`, complete and unaltered; its "record" is what `write_shards` was given.

    Raises ValueError for what is not such a folder, or one from a newer version.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
    except OSError:
        raise ValueError(f"'{folder}' must hold token shards, but there is no index.json: check the path") from None
    except ValueError:
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(
            f'{path} must be an index of "{FORMAT}", got something else: remove the folder and prepare again'
        )
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path} must have version {VERSION}, got {index.get('version')}: upgrade deltanet, or prepare the text "
            "again in a new folder"
        )
    if index.pop("sha256", None) != _index_sha256(index):
        raise ValueError(f"{path} was altered after it was written: remove the folder and prepare again")
    return index


def _cut(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same tokens in arrays of exactly `size`, the last one of what is left."""
    held: list[np.ndarray] = []
    room = size
    for piece in pieces:
        while len(piece) >= room:
            yield np.concatenate([*held, piece[:room]])
            held, piece, room = [], piece[room:], size
        held.append(piece)
        room -= len(piece)
    rest = np.concatenate(held) if held else np.empty(0)
    if rest.size:
        yield rest


def _fill(folder: Path, shards: Iterable[np.ndarray], tokenizer: Tokenizer, record: Mapping[str, Any]) -> None:
    whole = hashlib.sha256()
    entries: list[dict[str, Any]] = []
    documents = text_bytes = 0
    for number, tokens in enumerate(shards):
        _write_synced(_shard_path(folder, number), tokens.data)
        entries.append({"tokens": len(tokens), "sha256": hashlib.sha256(tokens.data).hexdigest()})
        whole.update(tokens.data)
        documents += int(np.count_nonzero(tokens == tokenizer.separator))
        text_bytes += tokenizer.count_bytes(tokens)
    if not entries:
        raise ValueError("token shards must hold at least one document, got none: give some text")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": token_dtype(tokenizer).name,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": documents,
        "bytes": text_bytes,
        "tokens_sha256": whole.hexdigest(),
        "shards": entries,
        "record": dict(record),
    }
    index["sha256"] = _index_sha256(index)
    _write_synced(folder / "index.json", json.dumps(index, indent=1).encode())


def _check(path: Path, tokens: np.ndarray, sha256: str, tokenizer: Tokenizer) -> None:
    digest = hashlib.sha256()
    for offset in range(0, len(tokens), READ_AT_ONCE):
        part = tokens[offset : offset + READ_AT_ONCE]
        if part.max() >= tokenizer.vocab_size:
            where = int(np.argmax(part >= tokenizer.vocab_size))
            raise ValueError(
                f"{path} must hold ids below {tokenizer.vocab_size}, got {part[where]} at offset {offset + where}: "
                "remove the folder and prepare again"
            )
        digest.update(part.data)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{path} was altered after it was written (its sha256 differs): remove the folder and prepare again"
        )


def _write_synced(path: Path, data: Any) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _index_sha256(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"
