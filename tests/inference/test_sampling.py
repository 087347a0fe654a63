"""The next token: filters keep what they should, and the draws follow the distribution."""

import pytest
import torch

from deltanet.inference import GREEDY, Sampling
from deltanet.inference.sampling import Draws, choose

LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()


def counts(sampling, logits=LOGITS, draws=4000):
    """How often each token is chosen."""
    rows = logits.expand(draws, -1)
    return torch.bincount(choose(rows, sampling, Draws(sampling.seed, draws)), minlength=logits.shape[-1]) / draws


def test_samples_follow_the_distribution():
    assert (counts(Sampling()) - LOGITS.exp()).abs().max() < 0.03


def test_temperature_reshapes_the_distribution():
    expected = (LOGITS / 0.5).softmax(-1)
    assert (counts(Sampling(temperature=0.5)) - expected).abs().max() < 0.03
    assert counts(Sampling(temperature=1e-6))[0] == 1
    assert counts(GREEDY)[0] == 1


def test_top_k_keeps_exactly_k():
    found = counts(Sampling(top_k=2))
    assert found[2:].sum() == 0
    assert found[:2].tolist() == pytest.approx([5 / 7, 2 / 7], abs=0.03)
    # With ties, too, and with more than there are.
    tied = torch.zeros(1, 4)
    assert (counts(Sampling(top_k=3), tied) > 0).tolist() == [True, True, True, False]
    assert (counts(Sampling(top_k=9), tied) > 0).all()


def test_top_p_keeps_the_smallest_set_with_that_mass():
    assert (counts(Sampling(top_p=0.6)) > 0).tolist() == [True, True, False, False, False]
    assert (counts(Sampling(top_p=0.4)) > 0).tolist() == [True, False, False, False, False]
    assert (counts(Sampling(top_p=1.0)) > 0).all()
    # The mass is of what top_k has left: 0.5 of 0.7 is more than 0.6.
    assert (counts(Sampling(top_k=2, top_p=0.6)) > 0).tolist() == [True, False, False, False, False]


def test_impossible_tokens_never_come():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])
    assert counts(Sampling(), logits)[[0, 2]].sum() == 0
    for draw in (0.0, 1.0):  # the ends of the range, and what rounding may make of them
        for row in (logits, LOGITS):
            token = choose(row, Sampling(top_p=0.6), lambda draw=draw: torch.tensor([draw]).double()).item()
            assert token in ((1, 3) if row is logits else (0, 1))


def test_the_seed_decides_and_rows_have_their_own():
    rows = torch.zeros(3, 1000)
    first, again = (choose(rows, Sampling(seed=5), Draws(5, 3)) for _ in range(2))
    assert first.equal(again)
    assert len(set(first.tolist())) == 3
    assert choose(rows[:1], Sampling(), Draws(6, 1)).item() == first[1]  # row i has seed + i


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p must lie"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
