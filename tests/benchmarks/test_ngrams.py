"""Counting on RegBench: what is looked up, and where words begin."""

import importlib.util
from pathlib import Path

import pytest
import torch

from deltanet.data.synthetic import IGNORED, Examples, RegularLanguages

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "ngrams.py"
spec = importlib.util.spec_from_file_location("benchmarks_ngrams", PATH)
ngrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ngrams)

S = 18  # the separator


def example(tokens: list[int]) -> Examples:
    line = torch.tensor([tokens])
    targets = line[:, 1:].clone()
    targets[targets == S] = IGNORED
    return Examples(line[:, :-1], targets)


@pytest.mark.parametrize(
    ("back", "expected"),
    [
        (0, [1, 1, 0, 1, 1, 1]),  # the letter most often seen
        (1, [1, 1, 0, 1, 2, 3]),  # after 1 came 2; at a word's beginning 1; after 2 came 3
        (2, [1, 1, 0, 1, 2, 3]),
    ],
)
def test_the_most_frequent_continuation_is_predicted(back: int, expected: list[int]) -> None:
    found = ngrams.predict(example([1, 2, 3, S, 1, 2, 3]), S, back)
    assert found.tolist() == [expected]


def test_as_many_tokens_are_looked_back_as_were_seen_before() -> None:
    one = example([1, 2, 3, S, 4, 2, 5, S, 4, 2, 5])  # after 2 comes 3 or 5: what stands before the 2 decides
    assert ngrams.predict(one, S, 1)[0, -1] == 3
    assert ngrams.predict(one, S, 2)[0, -1] == 5


def test_a_word_begins_anew_after_the_separator() -> None:
    assert ngrams.predict(example([2, 1, 1, S, 2]), S, 1).tolist() == [[2, 2, 0, 2]]


def test_more_tokens_score_higher() -> None:
    task = RegularLanguages(truncate=128)
    examples = task.sample(40, seed=0, split="test")
    scores = [float(task.score(ngrams.predict(examples, S, back), examples)) for back in (0, 1, 2)]
    assert scores[0] < scores[1] < scores[2]
