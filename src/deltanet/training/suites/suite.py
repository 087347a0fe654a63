"""What a suite is: a protocol with its grid of cells, and what the paper says about each entry of its table."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from deltanet.ops.backends import nearest
from deltanet.training.suites.cell import Cell, Recipe
from deltanet.training.suites.mixers import mixer
from deltanet.training.suites.tables import Row

__all__ = ["Grid", "Suite", "with_overrides"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which cells there are. Where a number is None, the protocol's own stands."""

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0,)
    heads: int | None = None
    depth: int | None = None
    epochs: tuple[int, ...] | None = None
    patience: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "models", "widths", "learning_rates", "weight_decays", "seeds", "epochs"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ValueError(f"{name} must be at least one, got none")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must be given once each, got {' '.join(map(str, values))}")
        for model in self.models:
            mixer(model, 1)  # refuses what is unknown
        for width in self.widths:
            if not 1 <= width <= 2**16:
                raise ValueError(f"widths must be between 1 and 65536, got {width}")
        for rate in self.learning_rates:
            if not 0 < rate <= 10:
                raise ValueError(f"learning_rates must be above 0 and at most 10, got {rate:g}")
        for decay in self.weight_decays:
            if not 0 <= decay <= 10:
                raise ValueError(f"weight_decays must be between 0 and 10, got {decay:g}")
        for seed in self.seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"seeds must be between 0 and 2^31 - 1, got {seed}")
        for epochs in self.epochs or ():
            if not 1 <= epochs <= 10**6:
                raise ValueError(f"epochs must be between 1 and 1000000, got {epochs}")
        for name in ("heads", "depth", "patience", "train_examples", "test_examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 2**31:
                raise ValueError(f"{name} must be between 1 and 2^31, got {value}")


class Suite(ABC):
    """A suite by its name on the command line."""

    name: ClassVar[str]
    measure: ClassVar[str]  # what the scores are, for the axis of a figure
    rates: ClassVar[str]  # by what the learning rate is chosen: the name of a test
    # Which evaluation counts: the last, the best of all for each test by itself, or the one that the cell's judge likes best.
    counts: ClassVar[Literal["scores", "best", "chosen"]] = "scores"

    @abstractmethod
    def grid(self, quick: bool) -> Grid:
        """The protocol's grid, or the one that takes minutes on a CPU."""

    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks that the protocol has."""

    @abstractmethod
    def cell(self, grid: Grid, task: str, model: str, width: int, rate: float, decay: float, seed: int) -> Cell:
        """One cell, of a grid with one number of epochs or none. ValueError, which names the field, where it is impossible."""

    def learning_rates(self, grid: Grid, task: str, model: str) -> tuple[float, ...]:
        """The rates of that task and model: the grid's, unless the protocol has others for them and the grid is the protocol's."""
        return grid.learning_rates

    @abstractmethod
    def paper(self, task: str, model: str, width: int) -> float | None:
        """What the paper has for that entry, in percent; None where it has nothing."""

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """Further lines of Markdown below the table."""
        return []

    @abstractmethod
    def draw(self, rows: Sequence[Row], stem: Path, note: str) -> list[Path]:
        """Draws the paper's figure with our numbers as `stem`.png and .svg; returns their paths."""

    def cells(self, grid: Grid, precision: str) -> list[Cell]:
        """All cells of the grid, the rates, epochs and seeds of an entry beside each other. `tasks` may be patterns as in a shell."""
        names = tuple(dict.fromkeys(name for asked in grid.tasks for name in self._named(asked)))
        found = []
        for task, width, model in product(names, grid.widths, grid.models):
            rates = self.learning_rates(grid, task, model)
            every = product(grid.seeds, grid.weight_decays, grid.epochs or (None,), rates)
            for seed, decay, epochs, rate in every:
                try:
                    one = replace(grid, epochs=None if epochs is None else (epochs,))
                    cell = self.cell(one, task, model, width, rate, decay, seed)
                except ValueError as error:
                    raise ValueError(f"{self.name} {task}, {model} at width {width}: {error}") from None
                found.append(replace(cell, recipe=replace(cell.recipe, precision=precision)))
        return found

    def _named(self, asked: str) -> Iterable[str]:
        known = self.tasks()
        found = [name for name in known if fnmatchcase(name, asked)]
        if not found:
            some = ", ".join(known) if len(known) < 12 else f"{', '.join(known[:4])} and {len(known) - 4} more"
            raise ValueError(f"tasks must be of {some}, got {asked!r}{nearest(asked, known)}")
        return found


def with_overrides(recipe: Recipe, grid: Grid) -> Recipe:
    """`recipe` with what the grid says otherwise."""
    names = {one.name for one in fields(recipe)} & {one.name for one in fields(grid)}
    given: dict[str, Any] = {name: value for name in names if (value := getattr(grid, name)) is not None}
    if grid.epochs is not None:
        given["epochs"] = grid.epochs[0]
    return replace(recipe, **given)
