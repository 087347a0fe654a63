"""From a corpus to its two token streams, in memory or kept in a folder."""

from pathlib import Path
from typing import NamedTuple

from deltanet.data.corpus import Corpus
from deltanet.data.shards import open_shards, read_index, write_shards
from deltanet.data.stream import TokenStream, tokenize
from deltanet.data.tokenizer import Tokenizer


class Streams(NamedTuple):
    """The tokens of a corpus: what to train on, and what is held out."""

    train: TokenStream
    validation: TokenStream


def prepare(corpus: Corpus, tokenizer: Tokenizer, folder: Path | None = None) -> Streams:
    """Both sides of `corpus` as tokens: in memory, or as memory-mapped shards in train/ and validation/ of `folder`.

    Shards already there are checked and used; what an interrupted call left out is made. They must be of the same text,
    split the same way, by the same tokenizer, else ValueError. Either way the stream is the same, so runs can change over.
    """
    if folder is None:
        return Streams(tokenize(corpus.train, tokenizer), tokenize(corpus.validation, tokenizer))
    for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
        target = folder / name
        if not target.exists():
            write_shards(target, documents, tokenizer, record=corpus.record())
            continue
        record = read_index(target)["record"]
        if (record["sha256"], record["split"]) != (corpus.sha256, corpus.split):
            raise ValueError(
                f"'{target}' must hold tokens of {corpus.source} as it is now, got those of {record['source']} "
                "with other contents: remove the folder, or give another"
            )
    return Streams(open_shards(folder / "train", tokenizer), open_shards(folder / "validation", tokenizer))
