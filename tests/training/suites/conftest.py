"""A grid of cells so small that each takes a fraction of a second."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from deltanet.training.suites import SUITES, Cell, Examined, Progress, Store, run_cells


class Watching:
    """A watcher that keeps what it hears, and may do something after an evaluation."""

    def __init__(self, after: Callable[[Cell, Examined], None] = lambda cell, found: None) -> None:
        self.after = after
        self.kept = -1
        self.evaluations: list[tuple[str, Examined]] = []
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.progress: Progress | None = None

    def begin(self, progress: Progress, kept: int) -> None:
        self.kept = kept

    def tick(self, progress: Progress) -> None:
        self.progress = replace(progress)

    def examined(self, cell: Cell, found: Examined, progress: Progress) -> None:
        self.evaluations.append((cell.name, found))
        self.after(cell, found)

    def finished(self, cell: Cell, outcome: dict[str, Any], progress: Progress) -> None:
        self.outcomes[cell.name] = outcome

    def failed(self, cell: Cell, error: str, progress: Progress) -> None:
        self.failures[cell.name] = error


def tiny(models=("deltanet",), rates=(1e-2,), **recipe: Any) -> list[Cell]:
    """Cells of MQAR with two pairs in 12 tokens."""
    grid = replace(
        SUITES["mqar"].grid(quick=False),
        tasks=("12x2x16",), models=models, widths=(16,), learning_rates=rates,
        train_examples=64, test_examples=16, batch_size=16, epochs=(2,),
    )  # fmt: skip
    cells = SUITES["mqar"].cells(grid, "float32")
    return [replace(cell, recipe=replace(cell.recipe, **recipe)) for cell in cells]


def train(cells: list[Cell], store: Store, watcher: Watching | None = None, **options: Any) -> str:
    options = {"together": 1, **options}
    return run_cells(
        cells, store, device=torch.device("cpu"), environment={"device": "cpu"}, watcher=watcher or Watching(), **options
    )


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "suite", "mqar")
