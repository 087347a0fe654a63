"""The tracking suite: its cells are what their names say, and one layer solves parity where beta may reach 2."""

from dataclasses import replace

import pytest

from deltanet.evaluation.plots import can_plot
from deltanet.layers import DeltaNetConfig, DeltaProductConfig
from deltanet.training.suites import SUITES, Store, rows_of

from .conftest import Watching, train

SUITE = SUITES["tracking"]


def test_the_protocol() -> None:
    cells = SUITE.cells(SUITE.grid(quick=False), "float32")
    assert {cell.task for cell in cells} == {"parity", "S3", "S4", "A5", "S5"}
    for cell in cells:
        mixer = cell.config.mixer
        assert isinstance(mixer, DeltaNetConfig)
        assert (cell.config.depth, cell.config.d_model, mixer.heads, mixer.head_dim, mixer.short_conv) == (
            1,
            128,
            8,
            32,
            0,
        )
        assert cell.config.vocab_size == cell.train.vocab_size
        steps = (40, 400) if cell.task == "parity" else (128, 512)
        assert cell.train.length == steps[0] + 1
        assert cell.tests["test"].task.length == cell.tests["validation"].task.length == steps[1] + 1
        assert cell.tests[f"{steps[0]} steps"].task == cell.train
        assert mixer.negative_eigenvalues == (cell.model not in ("deltanet-noconv", "deltaproduct2-positive-noconv"))
        steps_of = mixer.steps if isinstance(mixer, DeltaProductConfig) else 1
        assert str(steps_of) in cell.model or steps_of == 1


def test_tasks_by_name() -> None:
    grid = replace(SUITE.grid(quick=True), tasks=("mod7", "A4"), models=("deltaproduct4-noconv",))
    seventh, even = SUITE.cells(grid, "float32")
    assert (seventh.train.vocab_size, even.train.vocab_size) == (8, 13)
    with pytest.raises(ValueError, match=r"tasks must be of parity, .*got 'S6'"):
        SUITE.cells(replace(grid, tasks=("S6",)), "float32")
    with pytest.raises(ValueError, match="modulus must be an integer between 2"):
        SUITE.cells(replace(grid, tasks=("mod1",)), "float32")


@pytest.mark.slow
def test_parity_needs_a_beta_beyond_one(tmp_path) -> None:
    """At ten times the length of training: the quick version, with fewer steps for the one that does not get there."""
    negative, positive = SUITE.cells(replace(SUITE.grid(quick=True), test_examples=64), "float32")
    positive = replace(positive, recipe=replace(positive.recipe, epochs=2))
    watcher = Watching()
    assert train([positive, negative], Store(tmp_path / "suite", "tracking"), watcher) == "finished"
    assert watcher.outcomes[negative.name]["scores"]["test"] > 0.999
    assert watcher.outcomes[positive.name]["scores"]["test"] < 0.6
    rows = rows_of(SUITE, Store(tmp_path / "suite", "tracking").outcomes())
    drawn = SUITE.draw(rows, tmp_path / "figure", "") if can_plot() else []
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_sums_have_a_rate_of_their_own_unless_one_is_asked_for() -> None:
    suite = SUITES["tracking"]
    grid = replace(suite.grid(quick=False), models=("deltanet-negative-noconv",), tasks=("parity", "S3"))
    assert [cell.learning_rate for cell in suite.cells(grid, "float32")] == [2e-2, 1e-3]
    asked = replace(grid, learning_rates=(1e-3,))
    assert [cell.learning_rate for cell in suite.cells(asked, "float32")] == [1e-3, 1e-3]
