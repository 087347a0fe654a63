"""State tracking: words of groups, learned at one length and asked at longer ones.

Parity and modular addition after Grazzi et al. 2024 (arXiv 2411.12537): 40 steps in training, here 400 at test; S3, S4, A5 and S5 after
Siems et al. 2025 (arXiv 2502.10297, automl/DeltaProduct): 128 in training, 512 at test. The model is one layer of mixer and SwiGLU at width
128, eight heads of 32, without convolutions, so that each token is one transition of the state and no more.

    transition of a token:    beta in (0, 1)                     nothing that changes sign
                              beta in (0, 2)                     one reflection: a swap of two
                              beta in (0, 2), n of them          any permutation of n + 1
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltanet.data.synthetic import ModularAddition, Parity, PermutationGroup
from deltanet.data.synthetic.state_tracking import GROUPS, GroupWords
from deltanet.evaluation.suite_plots import plot_bars
from deltanet.layers import DeltaNetConfig
from deltanet.training.suites.cell import Cell, Recipe, Test
from deltanet.training.suites.mixers import mixer
from deltanet.training.suites.model import SuiteModelConfig
from deltanet.training.suites.suite import Grid, Suite, with_overrides
from deltanet.training.suites.tables import Row

# Looked at every 50 steps: what is right at 40 is right at 400 within the first 150 steps or, with nothing left to learn, never (docs/log.md).
SUMS = Recipe(
    train_examples=12_800,
    batch_size=256,
    epochs=20,
    schedule="step",
    warmup_epochs=2,
    final_share=1e-3,
    stop_above=0.999,
)
PERMUTATIONS = Recipe(
    train_examples=100_000, batch_size=2048, epochs=100, evaluate_every=5, schedule="step", stop_above=0.99
)
# Of permutations, parity, and sums modulo more than two, which need a lower rate and twice the steps (docs/results.md).
RATES, RATES_OF_PARITY, RATES_OF_SUMS = (1e-3,), (2e-2,), (5e-3,)


class TrackingSuite(Suite):
    name, measure, rates = "tracking", "positions right at the test length, %", "validation"

    def grid(self, quick: bool) -> Grid:
        full = Grid(
            tasks=("parity", "S3", "S4", "A5", "S5"),
            models=(
                "deltanet-noconv",
                "deltanet-negative-noconv",
                "deltaproduct2-positive-noconv",
                "deltaproduct2-noconv",
                "deltaproduct3-noconv",
                "deltaproduct4-noconv",
            ),
            widths=(128,),
            learning_rates=RATES,
            weight_decays=(0.0,),
        )
        if not quick:
            return full
        return Grid(
            tasks=("parity",),
            models=("deltanet-negative-noconv", "deltanet-noconv"),
            widths=(32,),
            heads=2,
            learning_rates=RATES,
            weight_decays=(0.0,),
            train_examples=3200,
            test_examples=256,
            batch_size=64,
            epochs=(12,),
        )

    def learning_rates(self, grid: Grid, task: str, model: str) -> tuple[float, ...]:
        if grid.learning_rates is not RATES or task in GROUPS:
            return grid.learning_rates
        return RATES_OF_PARITY if task == "parity" else RATES_OF_SUMS

    def tasks(self) -> tuple[str, ...]:
        return ("parity", "mod3", "mod5", *GROUPS)

    def _named(self, asked: str) -> list[str]:
        return [asked] if re.fullmatch(r"mod\d{1,4}", asked) else list(super()._named(asked))

    def cell(self, grid: Grid, task: str, model: str, width: int, rate: float, decay: float, seed: int) -> Cell:
        train, long = _words(task)
        layer = mixer(model, grid.heads or 8)
        if isinstance(layer, DeltaNetConfig) and grid.heads is None:
            layer = replace(layer, head_dim=32)
        examples = grid.test_examples or 1024
        sums = SUMS if task == "parity" else replace(SUMS, epochs=2 * SUMS.epochs)
        recipe = with_overrides(PERMUTATIONS if task in GROUPS else sums, grid)
        recipe = replace(
            recipe, warmup_epochs=recipe.epochs * SUMS.warmup_epochs / SUMS.epochs if task not in GROUPS else 0.0
        )
        return Cell(
            suite=self.name, task=task, model=model, learning_rate=rate, weight_decay=decay, seed=seed,
            train=train,
            tests={
                "validation": Test(task=long, split="validation", examples=examples),
                "test": Test(task=long, split="test", examples=examples),
                "whole words": Test(task=replace(long, counts="examples"), split="test", examples=examples),  # type: ignore[type-var]
                f"{train.steps} steps": Test(task=train, split="test", examples=examples),
            },
            config=SuiteModelConfig(
                vocab_size=train.vocab_size, d_model=width, depth=grid.depth or 1, mixer=layer, feed_forward="swiglu",
                # From 0.02 sums are learned as well, but kept time with less well (docs/log.md).
                init_std=0.02 if task in GROUPS and width >= 128 else 0.006,
            ),
            recipe=recipe,
        )  # fmt: skip

    def paper(self, task: str, model: str, width: int) -> float | None:
        return None  # the DeltaNet paper has none of this; docs/synthetic.md says what its successors claim

    def draw(self, rows: Sequence[Row], stem: Path, note: str) -> list[Path]:
        scores: dict[str, dict[str, float]] = {}
        for row in rows:
            scores.setdefault(row.model, {})[row.task] = row.ours
        names = list(dict.fromkeys(row.task for row in rows))
        chance = {name: 100 / _words(name)[0].order for name in names}
        return plot_bars(stem, "State tracking", self.measure, names, scores, {}, note, chance)


def _words(task: str) -> tuple[GroupWords, GroupWords]:
    """The words of training and the longer ones of the test."""
    if task in GROUPS:
        return PermutationGroup(group=task, steps=128), PermutationGroup(group=task, steps=512)
    if task == "parity":
        return Parity(steps=40), Parity(steps=400)
    modulus = int(task.removeprefix("mod"))
    return ModularAddition(modulus=modulus, steps=40), ModularAddition(modulus=modulus, steps=400)
