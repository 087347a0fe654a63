"""One long stream of tokens: documents one after the other, each begun by the tokenizer's separator."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from deltanet.data.tokenizer import Tokenizer


class TokenStream:
    """A sequence of tokens read by position, in memory or memory-mapped, in one piece or several shards.

    A document starts wherever the separator stands; the first token is one. The stream is a ring for `read`: after the
    last token comes the first again.

    tokenizer    made the tokens
    documents    how many there are
    bytes        of text, all documents together; separators stand for none
    sha256       of all tokens as they lie in memory or on disk; the same text gives the same hash, whatever the shards
    """

    def __init__(
        self, shards: Sequence[np.ndarray], tokenizer: Tokenizer, *, documents: int, bytes: int, sha256: str
    ) -> None:
        self.tokenizer = tokenizer
        self.documents = documents
        self.bytes = bytes
        self.sha256 = sha256
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens int64 [length] from position `start` on, going round at the end as often as it takes."""
        out = np.empty(length, dtype=np.int64)
        filled = 0
        while filled < length:
            position = (start + filled) % len(self)
            shard = int(np.searchsorted(self._ends, position, side="right"))
            offset = position - int(self._ends[shard]) + len(self._shards[shard])
            piece = self._shards[shard][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type that tokens are stored in: little-endian uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encode_document(text: str | bytes, tokenizer: Tokenizer) -> np.ndarray:
    """The separator and the tokens of one document, [1 + n]. Raises ValueError for ids that no document may hold."""
    ids = tokenizer.encode(text)
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size or (ids == tokenizer.separator).any()):
        raise ValueError(
            f"a tokenizer must give ids in [0, {tokenizer.vocab_size}) without the separator {tokenizer.separator}, "
            f"got {ids.min()} to {ids.max()}: correct its encode"
        )
    tokens = np.empty(1 + len(ids), dtype=token_dtype(tokenizer))
    tokens[0], tokens[1:] = tokenizer.separator, ids
    return tokens


def tokenize(documents: Iterable[str | bytes], tokenizer: Tokenizer) -> TokenStream:
    """The stream of these documents, in memory: two bytes a token. Raises ValueError if there are none."""
    pieces = [encode_document(document, tokenizer) for document in documents]
    if not pieces:
        raise ValueError("a token stream must hold at least one document, got none: give some text")
    tokens = np.concatenate(pieces)
    return TokenStream(
        [tokens],
        tokenizer,
        documents=len(pieces),
        bytes=tokenizer.count_bytes(tokens),
        sha256=hashlib.sha256(tokens.data).hexdigest(),
    )
