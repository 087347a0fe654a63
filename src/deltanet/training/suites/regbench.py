"""RegBench: the language of a random automaton learned in context (Akyürek et al. 2024, arXiv 2401.12973, berlino/seq_icl).

The setting is that of the DeltaNet paper's second author (berlino/seq-test, zoology/experiments/regbench): width 128, four layers of LayerNorm,
mixer and SwiGLU (320 wide), two heads, tied embeddings with dropout 0.1, examples cut at 512 tokens, batch 32, learning rate 2.54e-4, cosine
per epoch to 0 over 30, 60, 90 or 120 epochs, 1,000 test examples; attention has a SwiGLU of 512 and rate 3e-4, and here rotary positions, as the
paper's Transformer++, and the warm-up of the original (berlino/seq_icl): in a line over a sixth of the epochs, then a cosine with every step to a
tenth of the rate. Without, none of three trainings on 5,000 examples looked further back than one token (docs/results.md).
What keeps it from learning its examples by heart is that the epoch counts which validation likes best, as in the original (berlino/seq_icl tests
its best checkpoint); the number of epochs, that is how fast the rate falls, is chosen by validation too, and with several widths the width.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltanet.data.synthetic import RegularLanguages
from deltanet.data.synthetic.paper import REGBENCH as PAPER
from deltanet.evaluation.suite_plots import plot_curves
from deltanet.training.suites.cell import Cell, Recipe, Test
from deltanet.training.suites.mixers import mixer
from deltanet.training.suites.model import SuiteModelConfig
from deltanet.training.suites.suite import Grid, Suite, with_overrides
from deltanet.training.suites.tables import Row, curves

RATES, RATES_OF_ATTENTION = (2.54e-4,), (3e-4,)


class RegBenchSuite(Suite):
    name, measure, rates, counts = "regbench", "predictions that are allowed, %", "validation", "chosen"

    def grid(self, quick: bool) -> Grid:
        full = Grid(
            tasks=("2500", "5000", "10000", "20000"),
            models=("deltanet", "deltanet-noconv", "attention", "mamba", "gla"),
            widths=(128,),
            learning_rates=RATES,
            epochs=(30, 60, 90, 120),
        )
        if not quick:
            return full
        return Grid(
            tasks=("250", "1000"),
            models=("deltanet",),
            widths=(32,),
            learning_rates=(3e-3,),
            depth=2,
            epochs=(8,),
            test_examples=100,
        )

    def learning_rates(self, grid: Grid, task: str, model: str) -> tuple[float, ...]:
        return RATES_OF_ATTENTION if grid.learning_rates is RATES and model == "attention" else grid.learning_rates

    def tasks(self) -> tuple[str, ...]:
        return ("1000", "2500", "5000", "10000", "20000", "40000")

    def _named(self, asked: str) -> list[str]:
        return [asked] if asked.isdecimal() and 32 <= int(asked) <= 10**7 else list(super()._named(asked))

    def cell(self, grid: Grid, task: str, model: str, width: int, rate: float, decay: float, seed: int) -> Cell:
        train = RegularLanguages(truncate=512)
        recipe = with_overrides(Recipe(train_examples=int(task), batch_size=32, epochs=120, evaluate_every=5), grid)
        if model == "attention":
            recipe = replace(recipe, schedule="step", warmup_epochs=recipe.epochs / 6, final_share=0.1)
        examples = grid.test_examples or 1000
        return Cell(
            suite=self.name, task=task, model=model, learning_rate=rate, weight_decay=decay, seed=seed,
            train=train,
            tests={split: Test(task=train, split=split, examples=examples) for split in ("validation", "test")},
            config=SuiteModelConfig(
                vocab_size=train.vocab_size, d_model=width, depth=grid.depth or 4, mixer=mixer(model, grid.heads or 2),
                norm="layer", feed_forward="swiglu", feed_forward_width=(8 if model == "attention" else 5) * width // 2,
                tie_embeddings=True, dropout=0.1,
            ),
            recipe=recipe,
        )  # fmt: skip

    def paper(self, task: str, model: str, width: int) -> float | None:
        return PAPER.get(model, {}).get(int(task))

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """Of each model its best width, chosen by validation, for each number of examples."""
        tasks = sorted({row.task for row in rows}, key=int)
        best = {(row.model, row.task): row for row in self._best(rows)}
        lines = [f"| model | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
        for model in dict.fromkeys(row.model for row in rows):
            found = [best.get((model, task)) for task in tasks]
            lines.append(f"| {model} | {' | '.join(f'{row.ours:.1f}' if row else '' for row in found)} |")
            theirs = [PAPER.get(model, {}).get(int(task)) for task in tasks]
            if any(theirs):
                lines.append(f"| paper | {' | '.join('' if score is None else f'{score:.1f}' for score in theirs)} |")
        return ["", "The best width by validation, against the number of training examples:", "", *lines]

    def draw(self, rows: Sequence[Row], stem: Path, note: str) -> list[Path]:
        ours = curves(self._best(rows), lambda row: int(row.task))
        paper = {model: [*points.items()] for model, points in PAPER.items()} if any(row.paper for row in rows) else {}
        return plot_curves(stem, "RegBench", "training examples", self.measure, ours, paper, note)

    def _best(self, rows: Sequence[Row]) -> list[Row]:
        best: dict[tuple[str, str], Row] = {}
        for row in rows:
            held = best.get((row.model, row.task))
            if held is None or row.others["validation"] > held.others["validation"]:
                best[row.model, row.task] = row
        return list(best.values())
