"""MAD: six tasks, a baseline and changes of one setting at a time, 66 configurations (Poli et al. 2024, arXiv 2403.17844, athms/mad-lab).

The model is mixer, SwiGLU, mixer, SwiGLU at width 128 with RMSNorm before each, no positions, untied head with a bias; compression has the
autoencoder. As there, SwiGLU is 352 wide, attention has 16 heads, and matrices begin as mad-lab and fla's layers of 2024 leave them. The paper does
not say how many heads DeltaNet has: here one, as mad-lab's configuration of GLA, by the same authors. Each configuration takes the best of three
learning rates times two weight decays; a task's score is the mean over its configurations, and the last column the mean of the six. A training is
done at 99.9% on the test examples, and its score is that of its best epoch. mad-lab's trainer, as published, measures the checkpoint of lowest test
perplexity; outcomes have its score as "surest". It is far below the paper's numbers for compression (docs/results.md).
"""

from collections.abc import Sequence
from pathlib import Path

from deltanet.data.synthetic.mad import CONFIGURATIONS
from deltanet.data.synthetic.paper import MAD as PAPER
from deltanet.evaluation.suite_plots import plot_bars
from deltanet.training.suites.cell import Cell, Recipe, Test
from deltanet.training.suites.mixers import mixer
from deltanet.training.suites.model import SuiteModelConfig
from deltanet.training.suites.suite import Grid, Suite, with_overrides
from deltanet.training.suites.tables import Row

BETWEEN = 25  # steps between two evaluations, at least: with few examples an epoch is shorter than an evaluation
COPIES = "selective_copying.copies="
SIXTEEN = (
    "When the paper's numbers were made, mad-lab's selective copying had 16 ids in the configurations of 32, 64 and 96 too "
    "(athms/mad-lab, issue 7)."
)
TASKS = {f"{one.task.name}.{one.name}": one for one in CONFIGURATIONS}


class MADSuite(Suite):
    name, measure, rates, counts = "mad", "accuracy, %", "test", "best"

    def grid(self, quick: bool) -> Grid:
        full = Grid(
            tasks=("*",),
            models=("deltanet", "attention", "mamba", "gla"),
            widths=(128,),
            learning_rates=(1e-4, 5e-4, 1e-3),
            weight_decays=(0.0, 0.1),
        )
        if not quick:
            return full
        return Grid(
            tasks=("in_context_recall.baseline", "noisy_recall.baseline"),
            models=("deltanet", "attention"),
            widths=(64,),
            learning_rates=(2e-3,),
            weight_decays=(0.0,),
            epochs=(5,),
            heads=2,
            train_examples=3200,
            test_examples=256,
        )

    def tasks(self) -> tuple[str, ...]:
        return tuple(TASKS)

    def cell(self, grid: Grid, task: str, model: str, width: int, rate: float, decay: float, seed: int) -> Cell:
        one = TASKS[task]
        heads = grid.heads or (16 if model == "attention" else 1)
        recipe = Recipe(
            train_examples=one.train_examples, batch_size=128, epochs=200, final_rate=1e-6, stop_above=0.999,
            evaluate_every=-(-BETWEEN * 128 // one.train_examples),
        )  # fmt: skip
        return Cell(
            suite=self.name, task=task, model=model, learning_rate=rate, weight_decay=decay, seed=seed,
            train=one.task,
            tests={"test": Test(task=one.task, split="test", examples=grid.test_examples or one.test_examples)},
            config=SuiteModelConfig(
                vocab_size=one.task.vocab_size, d_model=width, depth=grid.depth or 2, mixer=mixer(model, heads),
                feed_forward="swiglu", feed_forward_width=16 * -(-(8 * width // 3) // 16), decoder=one.task.reads == "last",
                head_bias=True, init="mad",
            ),
            recipe=with_overrides(recipe, grid),
        )  # fmt: skip

    def paper(self, task: str, model: str, width: int) -> float | None:
        return PAPER.get(model, {}).get(task)  # of whole tasks: one configuration alone has no number there

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """Of each model its mean over a task's configurations, the paper's beside it, and how many configurations that are."""
        names = [*dict.fromkeys(one.task.name for one in CONFIGURATIONS)]
        lines = [f"| model | {' | '.join(names)} | mean |", "|---" * (len(names) + 2) + "|"]
        for model, scores in _means(rows).items():
            counts = {
                name: sum(row.model == model and row.task.startswith(f"{name}.") for row in rows) for name in names
            }
            whole = {name: sum(one.task.name == name for one in CONFIGURATIONS) for name in names}
            ours = [f"{scores[name]:.1f} ({counts[name]} of {whole[name]})" if name in scores else "" for name in names]
            mean = f"{sum(scores.values()) / len(names):.1f}" if len(scores) == len(names) else ""
            lines.append(f"| {model} | {' | '.join(ours)} | {mean} |")
            if theirs := PAPER.get(model):
                paper = [f"{theirs[name]:.1f}" for name in names]
                lines.append(
                    f"| paper | {' | '.join(paper)} | {sum(theirs[name] for name in names) / len(names):.1f} |"
                )
        if any(row.task.startswith(COPIES) for row in rows):
            lines += ["", SIXTEEN]
        return ["", "Means over a task's configurations (how many of them), and the mean of the six:", "", *lines]

    def draw(self, rows: Sequence[Row], stem: Path, note: str) -> list[Path]:
        ours = _means(rows)
        names = [
            name
            for name in dict.fromkeys(one.task.name for one in CONFIGURATIONS)
            if any(name in s for s in ours.values())
        ]
        return plot_bars(stem, "MAD", self.measure, names, ours, PAPER, note)


def _means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By model and task, the mean over the task's configurations that are there."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row.model, {}).setdefault(row.task.partition(".")[0], []).append(row.ours)
    return {model: {name: sum(s) / len(s) for name, s in scores.items()} for model, scores in found.items()}
