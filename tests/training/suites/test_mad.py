"""MAD's table: what stands below it."""

import pytest

from deltanet.training.suites import SUITES, Row


def row(task: str, ours: float) -> Row:
    return Row(
        task=task, model="deltanet", width=128, ours=ours, spread=None, paper=None, learning_rate=1e-3, weight_decay=0.1,
        seeds=1, rates=1, epochs=1, seconds=1.0, others={}, reduced="",
    )  # fmt: skip


def test_means_stand_beside_the_papers() -> None:
    rows = [row("compression.baseline", 80.0), row("compression.vocab_size=32", 60.0), row("memorization.baseline", 99.0)]
    lines = SUITES["mad"].summary(rows)
    assert "| deltanet | 70.0 (2 of 11) |  |  | 99.0 (1 of 6) |  |  |  |" in lines
    assert "| paper | 42.2 | 35.7 | 100.0 | 52.8 | 100.0 | 100.0 | 71.8 |" in lines


@pytest.mark.parametrize(("task", "told"), [("selective_copying.copies=64", True), ("selective_copying.baseline", False)])
def test_what_the_papers_copying_was_is_told_where_ours_differs(task: str, told: bool) -> None:
    assert any("issue 7" in line for line in SUITES["mad"].summary([row(task, 50.0)])) == told
