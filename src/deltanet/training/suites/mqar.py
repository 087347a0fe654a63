"""MQAR as in the paper's figure 4: accuracy at 512 tokens and 64 pairs against the model's width (Yang et al. 2024, arXiv 2406.06484).

The protocol is that of Arora et al. 2023 (arXiv 2312.04927, figure 2, HazyResearch/zoology): LayerNorm, mixer, and for a feed-forward layer
the identity (x <- x + norm(x)), tied embeddings with dropout 0.1, 100,000 examples in the same order in each of up to 64 epochs, four learning
rates of which the best counts, done above 99%. Attention has one head, learns positions and drops a tenth of its weights; the others have two heads
and no positions; Mamba's blocks are its own, RMSNorm and mixer, without dropout, and begin as its authors' do (yzhangcs/zoology, a third author).
DeltaNet has four layers, as in the set-up of the paper's second author (berlino/seq-test, zoology/experiments/mqar); the others have two, as in the
first author's (sustcsonglin/zoology, zoology/experiments/paper/figure2.py), which has GLA, its gates' logs divided by 128, RetNet and Mamba.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltanet.data.synthetic import MQAR
from deltanet.data.synthetic.paper import MQAR as PAPER
from deltanet.evaluation.suite_plots import plot_curves
from deltanet.layers import AttentionConfig, GatedLinearAttentionConfig, MambaConfig, RetNetConfig
from deltanet.training.suites.cell import Cell, Recipe, Test
from deltanet.training.suites.mixers import mixer
from deltanet.training.suites.model import SuiteModelConfig
from deltanet.training.suites.suite import Grid, Suite, with_overrides
from deltanet.training.suites.tables import Row, curves

# Length x pairs, and where they differ from the protocol's, x ids and w writes of each key: 512x64, 64x8x128w2.
SETTING = re.compile(r"(\d+)x(\d+)(?:x(\d+))?(?:w(\d+))?")
BATCH = {64: 512, 128: 512, 256: 256, 512: 128}  # by length; at most 64k tokens elsewhere


def _setting(task: str) -> tuple[int, int, int, int]:
    """Length, pairs, ids and writes of the task of that name."""
    match = SETTING.fullmatch(task)
    assert match is not None, task
    return int(match[1]), int(match[2]), int(match[3] or 8192), int(match[4] or 1)


class MQARSuite(Suite):
    name, measure, rates = "mqar", "accuracy on queries, %", "test"

    def grid(self, quick: bool) -> Grid:
        if quick:
            return QUICK
        return Grid(
            tasks=("512x64",),
            models=("deltanet-noconv", "attention", "mamba", "gla", "retnet"),
            widths=(64, 128, 256, 512),
            learning_rates=(1e-4, 4.64e-4, 2.15e-3, 1e-2),
        )

    def tasks(self) -> tuple[str, ...]:
        return ("64x4", "128x8", "256x16", "512x64")

    def _named(self, asked: str) -> list[str]:
        return [asked] if SETTING.fullmatch(asked) else list(super()._named(asked))

    def cell(self, grid: Grid, task: str, model: str, width: int, rate: float, decay: float, seed: int) -> Cell:
        length, pairs, vocabulary, writes = _setting(task)
        train = MQAR(length=length, pairs=pairs, vocab_size=vocabulary, writes=writes)
        layer = mixer(model, grid.heads or (1 if model == "attention" else 2))
        attends, own = isinstance(layer, AttentionConfig), isinstance(layer, MambaConfig)
        shallow = isinstance(layer, AttentionConfig | MambaConfig | GatedLinearAttentionConfig | RetNetConfig)
        if isinstance(layer, AttentionConfig):
            layer = replace(layer, rotary=False)
        if isinstance(layer, GatedLinearAttentionConfig):
            # As the first author's: by 16, a new layer would forget the first pairs before the first query; widths as in fla's layer of early 2024.
            layer = replace(layer, gate_divisor=128.0, expand_k=1.0, expand_v=2.0)
        recipe = Recipe(
            train_examples=100_000,
            batch_size=BATCH.get(length, max(1, 2**16 // length)),
            epochs=64,
            shuffle=False,
            stop_above=0.99,
        )
        return Cell(
            suite=self.name, task=task, model=model, learning_rate=rate, weight_decay=decay, seed=seed,
            train=train,
            tests={"test": Test(task=train, split="test", examples=grid.test_examples or 3000)},
            config=SuiteModelConfig(
                vocab_size=train.vocab_size, d_model=width, depth=grid.depth or (2 if shallow else 4), mixer=layer,
                norm="rms" if own else "layer", feed_forward="none" if own else "identity", tie_embeddings=True,
                dropout=0.0 if own else 0.1, attention_dropout=0.1 if attends else 0.0, positions=length if attends else 0,
                init="mamba" if own else "scaled",
            ),
            recipe=with_overrides(recipe, grid),
        )  # fmt: skip

    def paper(self, task: str, model: str, width: int) -> float | None:
        return PAPER.get(model, {}).get(width) if task == "512x64" else None

    def draw(self, rows: Sequence[Row], stem: Path, note: str) -> list[Path]:
        task = rows[0].task
        length, pairs, _, writes = _setting(task)
        title = f"MQAR: {length} tokens, {pairs} pairs" + (f", each key written {writes} times" if writes > 1 else "")
        ours = curves((row for row in rows if row.task == task), lambda row: row.width)
        paper = {model: [*points.items()] for model, points in PAPER.items()} if task == "512x64" else {}
        return plot_curves(stem, title, "width of the model", self.measure, ours, paper, note)


# Each key is written twice, and the second value counts: two cores learn it in minutes with the delta rule, which overwrites. A memory of
# the same size that only adds up cannot know which value came last, and is right at most half of the time.
QUICK = Grid(
    tasks=("64x8x128w2",),
    models=("deltanet", "linear-attention"),
    widths=(16, 32),
    learning_rates=(1e-2,),
    heads=1,
    depth=1,
    train_examples=8192,
    test_examples=512,
    batch_size=64,
    epochs=(12,),
)
