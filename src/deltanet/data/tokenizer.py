"""Text to token ids and back: the protocol that the rest of the room speaks, and the byte tokenizer."""

import codecs
import hashlib
from typing import Any, Protocol

import numpy as np


class Decoder(Protocol):
    """Turns tokens into text as they arrive; a character split across tokens waits for its last byte."""

    def feed(self, tokens: Any) -> str:
        """The text that became complete with these tokens (any integer sequence), possibly empty."""

    def flush(self) -> str:
        """What is left at the end: empty, or U+FFFD for an unfinished character."""


class Tokenizer(Protocol):
    """What a tokenizer offers. `separator` starts every document, stands for no bytes and never leaves `encode`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def separator(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes; checkpoints and token shards keep it."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n] of a text, without a separator."""

    def decode(self, tokens: Any) -> str:
        """The text of an integer sequence; separators vanish, bytes that are not UTF-8 become U+FFFD."""

    def decoder(self) -> Decoder: ...

    def count_bytes(self, tokens: Any) -> int:
        """How many bytes of text these tokens stand for; negative ids (masked targets) stand for none."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 starts a document."""

    vocab_size = 257
    separator = 256
    fingerprint = hashlib.sha256(b"bytes 0-255, separator 256").hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids uint16 [n], one per byte of `text` in UTF-8."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Any) -> str:
        """The text of an integer sequence; separators vanish, bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        decoder = self.decoder()
        return decoder.feed(tokens) + decoder.flush()

    def decoder(self) -> "ByteDecoder":
        """A fresh decoder for text that arrives token by token; in total it gives what `decode` gives."""
        return ByteDecoder()

    def count_bytes(self, tokens: Any) -> int:
        """How many bytes these tokens stand for: one each, none for separators and negative ids (masked targets)."""
        ids = np.asarray(tokens)
        return int(np.count_nonzero((ids >= 0) & (ids < self.separator)))


class ByteDecoder:
    """The incremental half of `ByteTokenizer.decode`."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Any) -> str:
        """The text completed by `tokens`, an integer or several. A separator ends an unfinished character."""
        ids = np.atleast_1d(np.asarray(tokens)).ravel()
        if ids.size == 0:
            return ""
        if ids.dtype.kind not in "iu":
            raise TypeError(f"tokens must be integers, got {ids.dtype}: pass ids as the tokenizer gives them")
        wrong = ids[(ids < 0) | (ids >= ByteTokenizer.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"token ids must be in [0, {ByteTokenizer.vocab_size}), got {wrong[0]}: "
                "decode with the tokenizer that the tokens came from"
            )
        pieces = np.split(ids, np.flatnonzero(ids == ByteTokenizer.separator))
        text = self._utf8.decode(pieces[0].astype(np.uint8).tobytes())
        for piece in pieces[1:]:
            text += self.flush() + self._utf8.decode(piece[1:].astype(np.uint8).tobytes())
        return text

    def flush(self) -> str:
        """U+FFFD if a character is unfinished, else nothing; the decoder then starts afresh."""
        return self._utf8.decode(b"", final=True)
