"""`deltanet plot`: the pictures of a run, from its metrics and from what `deltanet evaluate` has measured."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from deltanet.cli.options import LATEST, Run, parse
from deltanet.cli.runs import read_report
from deltanet.evaluation import plots
from deltanet.layers import DeltaNetConfig
from deltanet.training import read_config, read_metrics


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw a run, as PNG and SVG in its folder plots: the loss, and what `deltanet evaluate` has measured."""

    run: Run = LATEST
    """The run folder."""
    json: bool = False
    """Report as one JSON object, for programs."""
    quiet: bool = False
    """Report nothing but errors."""


def run(args: list[str]) -> int:
    options = parse(PlotOptions, args, "plot")
    folder = Path(options.run)
    metrics = read_metrics(folder)
    steps = [line for line in metrics if line["event"] == "step"]
    if not steps:
        raise ValueError(
            f"'{folder}' must be the folder of a run with steps in metrics.jsonl, got none: check the path"
        )
    if not plots.can_plot():
        print(f"bits per byte, step {steps[0]['step']} to {steps[-1]['step']}:")
        print(plots.sparkline([line["bits_per_byte"] for line in steps]))
        print("deltanet: plots need matplotlib, which is not installed: pip install 'deltanet[plot]'", file=sys.stderr)
        return 1
    report, config = read_report(folder), read_config(folder / "config.toml")
    pictures = folder / "plots"
    pictures.mkdir(exist_ok=True)
    evaluations = [(line["tokens"], line["bits_per_byte"]) for line in metrics if line["event"] == "evaluation"]
    paths = plots.plot_learning(
        pictures / "learning",
        [line["tokens"] for line in steps],
        [line["bits_per_byte"] for line in steps],
        evaluations,
        report.get("yardsticks", {}),
    )
    if report.get("by_position"):
        paths += plots.plot_positions(pictures / "positions", report["by_position"], config.data.context)
    if report.get("decoding"):
        name = "DeltaNet" if all(isinstance(layer, DeltaNetConfig) for layer in config.model.layers) else "the model"
        costs = [plots.DecodingCost(**cost) for cost in report["decoding"]]
        paths += plots.plot_decoding(pictures / "decoding", costs, name)
    if options.json:
        print(json.dumps({"plots": [str(path) for path in paths]}))
    elif not options.quiet:
        print("\n".join(str(path) for path in paths))
        if not report:
            print(f"for more: deltanet evaluate {folder}, then this again")
    return 0
