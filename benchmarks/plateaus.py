"""Draws when the models of MQAR leave their plateau: test accuracy after every epoch of the runs that did, by model and width.

    python benchmarks/plateaus.py --results benchmarks/results/mqar-variants-nvidia-h200-2026-11-22.json --figure docs/images/mqar-plateaus

Only runs of 512 tokens and 64 pairs, with a cosine over 64 epochs and nothing else changed; one that did not get above `--above` percent is left out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltanet.evaluation import plots
from deltanet.evaluation.suite_plots import STYLES

DASHES: dict[int, Any] = {64: "-", 128: (0, (6, 2)), 256: (0, (3, 2)), 512: (0, (1, 1.5))}  # by width
EPOCHS = 64


def left(runs: Sequence[dict[str, Any]], above: float) -> list[dict[str, Any]]:
    """The runs to draw, by model, width and rate."""
    found = [
        run
        for run in runs
        if not run["changed"] and run["epochs"] == EPOCHS and max(point[2] for point in run["curve"]) > above
    ]
    return sorted(found, key=lambda run: (run["model"], run["width"], run["learning_rate"], run["seed"]))


def draw(runs: Sequence[dict[str, Any]], stem: Path) -> list[Path]:
    """One line for each run, coloured by model, dashed by width; writes `stem`.png and .svg and returns their paths."""
    title, many = "MQAR: when a model leaves its plateau", [(run["model"], run["width"]) for run in runs]
    with plots.figure_with_axes(title, "epochs", "accuracy on queries, %") as (figure, axes):
        for i, run in enumerate(runs):
            model, width = many[i]
            rate, seed = f", rate {run['learning_rate']:.3g}", f", seed {run['seed']}"
            label = f"{model}, {width} wide" + rate * (many.count((model, width)) > 1) + seed * (run["seed"] > 0)
            epochs, _, accuracies = zip(*run["curve"], strict=True)
            axes.plot(
                epochs, accuracies, color=STYLES[model][0], linestyle=DASHES[width], label=label, linewidth=1.8,
                marker="o", markersize=4, markevery=[-1], clip_on=False,
            )  # fmt: skip
        axes.set_xlim(0, EPOCHS)
        axes.set_ylim(0, 104)
        figure.set_size_inches(9.6, 4.8)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
        return plots.save(figure, stem)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the JSON file of runs with their curves")
    parser.add_argument("--figure", type=Path, required=True, help="the figure, without .png or .svg")
    parser.add_argument("--above", type=float, default=3.0, help="percent that a run must have got above")
    options = parser.parse_args(arguments)
    runs = left(json.loads(options.results.read_text())["runs"], options.above)
    if not runs:
        parser.error(f"--results must have a run above {options.above}%, got none in {options.results}: give a smaller --above")
    print("\n".join(map(str, draw(runs, options.figure))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
