"""One cell of a suite's grid: a task, a model, a learning rate, a seed; and the recipe by which the suite trains it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from deltanet.data.synthetic import Task
from deltanet.training.suites.model import SuiteModelConfig

__all__ = ["Cell", "Recipe", "Test"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a cell is trained. AdamW decays all parameters alike, as in the protocols' own code."""

    train_examples: int
    batch_size: int
    epochs: int
    evaluate_every: int = 1  # epochs; the last is always evaluated
    shuffle: bool = True  # anew in every epoch; a last batch that is not full is left out
    schedule: str = "epoch"  # the cosine goes down once an "epoch", or with every "step"
    warmup_epochs: float = 0.0  # in a line up from 1e-6, with every step
    final_rate: float = 0.0  # the cosine ends at this rate ...
    final_share: float = 0.0  # ... or at this share of the peak, whichever is larger
    beta2: float = 0.999
    max_grad_norm: float | None = None
    stop_above: float | None = None  # done once the accuracy is above this ...
    patience: int | None = None  # ... or after so many epochs without a better one, by validation where there is one
    precision: str = "float32"  # of the matrix products

    def __post_init__(self) -> None:
        for name in ("train_examples", "batch_size", "epochs", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.batch_size > self.train_examples:
            raise ValueError(
                f"train_examples must fill a batch of {self.batch_size}, got {self.train_examples}: give more of them"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.train_examples // self.batch_size

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def learning_rates(self, peak: float) -> list[float]:
        """The rate of every step."""
        per_epoch, warmup = self.steps_per_epoch, round(self.steps_per_epoch * self.warmup_epochs)
        low, end = max(self.final_rate, self.final_share * peak), max(self.steps - warmup, 1)
        rates = [1e-6 + (peak - 1e-6) * step / warmup for step in range(warmup)]
        for step in range(self.steps - warmup):
            at = step if self.schedule == "step" else step // per_epoch * per_epoch
            rates.append(low + (peak - low) * 0.5 * (1 + math.cos(math.pi * at / end)))
        return rates


@dataclass(frozen=True, kw_only=True)
class Test:
    """Examples on which a cell is measured."""

    task: Task
    split: str
    examples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One training. Cells alike but for rate, decay, epochs and seed make up one entry of the suite's table."""

    suite: str
    task: str  # its name in the table
    model: str  # likewise
    learning_rate: float
    weight_decay: float
    seed: int
    train: Task
    tests: dict[
        str, Test
    ]  # "test", the one that counts; "validation", which chooses the rate; others are told beside it
    config: SuiteModelConfig
    recipe: Recipe

    @property
    def name(self) -> str:
        """Tells the cell from all others of its suite, and is a good name for a file."""
        rate = f"lr{self.learning_rate:.3g}_wd{self.weight_decay:g}_epochs{self.recipe.epochs}_seed{self.seed}"
        return f"{self.task}_{self.model}_d{self.config.d_model}_{rate}"

    @property
    def judge(self) -> str:
        """The test by which evaluations are compared."""
        return "validation" if "validation" in self.tests else "test"

    @property
    def entry(self) -> tuple[str, str, int]:
        """The entry of the table to which it belongs."""
        return self.task, self.model, self.config.d_model

    @property
    def work(self) -> float:
        """About how long it takes at most, in no unit: to tell what part of the cells is done."""
        return self.recipe.steps * self.recipe.batch_size * self.train.length * (self.config.d_model + 64.0)

    def record(self) -> dict[str, Any]:
        """As plain JSON, with everything on which the outcome depends."""
        record = asdict(self)
        record["config"]["mixer"]["kind"] = self.config.mixer.kind
        return record
