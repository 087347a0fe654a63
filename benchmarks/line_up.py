"""Folders of `deltanet compare` gathered: models that were trained at different times, each with its commit, in one table and one figure.

    python benchmarks/line_up.py --folder runs/a c1 --folder runs/b c2 --speeds alone.json --out compare.json --figure docs/images/compare

Where several models shared a GPU their own seconds say nothing: `--speeds` are files of benchmarks/models.py, measured alone, and time in the
figure is tokens over that speed. All folders must have been trained alike; only the seed may differ, and further seeds are rows of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from deltanet.evaluation import plots
from deltanet.models import MODELS
from deltanet.training import read_metrics
from deltanet.training.compare import FREE, SETTINGS, Comparison, binary_size, read_comparison, read_row
from deltanet.training.config import config_to_dict
from deltanet.training.resume import differences

LAST = 100  # steps whose mean says what is learned of the training text


def gather(folders: list[tuple[Path, str]]) -> tuple[Comparison, list[dict[str, Any]]]:
    """What all have in common, and a record of each finished model, in the order of the paper's table. ValueError where they differ."""
    comparisons = [read_comparison(path / SETTINGS) for path, _ in folders]
    common, records = comparisons[0], []
    for (path, commit), comparison in zip(folders, comparisons, strict=True):
        seed = comparison.train.seed
        alike = replace(comparison, train=replace(comparison.train, seed=common.train.seed))
        changed = [name for name in differences(common, alike) if name not in (*FREE, "data.cache")]
        if changed:
            raise ValueError(f"'{path}' must have been trained as '{folders[0][0]}', got another {', '.join(changed)}")
        for model in MODELS:
            if (row := read_row(path / model)) is not None:
                records.append({**asdict(row), "seed": seed, "commit": commit, **curves(path / model)})
    if len({(record["model"], record["seed"]) for record in records}) < len(records):
        raise ValueError("every model may be there once for each seed, got one of them twice")
    return common, sorted(records, key=lambda record: (record["seed"], MODELS.index(record["model"])))


def curves(run: Path) -> dict[str, Any]:
    """Every evaluation of a run, and its bits per byte on training text, in tenths of the run and over the last steps."""
    lines = read_metrics(run)
    steps = [line["bits_per_byte"] for line in lines if line["event"] == "step"]
    evaluations = [{name: line[name] for name in ("tokens", "bits_per_byte", "whole")} for line in lines if line["event"] == "evaluation"]
    tenth = max(1, len(steps) // 10)
    return {
        "evaluations": evaluations,
        "training_bits_per_byte": mean(steps[-LAST:]),
        "training_bits_per_byte_by_tenths": [mean(steps[start : start + tenth]) for start in range(0, len(steps), tenth)],
    }


def read_speeds(files: list[Path]) -> dict[str, dict[str, Any]]:
    """By model: tokens a second, peak memory and ms a generated token, each alone on the GPU, and the commit; later files count more."""
    speeds: dict[str, dict[str, Any]] = {}
    for file in files:
        found = json.loads(file.read_text())
        for row in found["rows"]:
            if "tokens_per_second" in row:
                kept = {name: row[name] for name in ("tokens_per_second", "step_ms", "peak_gib", "loss", "loss_evaluated", "paths")}
                speeds[row["model"]] = {**kept, "commit": found["environment"]["commit"]}
        for row in found.get("generation", []):
            speeds.setdefault(row["model"], {})["generation_ms"] = row["generation_ms"]
    return speeds


def markdown(records: list[dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> str:
    head = ["model", "parameters", "state", "validation", "training text", "thousand tokens/s, alone", "peak GiB", "ms a generated token"]
    body = []
    for record in sorted(records, key=lambda record: (record["seed"], record["bits_per_byte"])):
        alone = speeds.get(record["model"], {})
        name = record["model"] + (f", seed {record['seed']}" if record["seed"] else "")
        body.append(
            [
                name,
                f"{record['parameters'] / 1e6:.1f} M",
                binary_size(record["state_bytes"]),
                f"{record['bits_per_byte']:.3f}",
                f"{record['training_bits_per_byte']:.3f}",
                f"{alone['tokens_per_second'] / 1e3:.0f}" if "tokens_per_second" in alone else "",
                f"{alone['peak_gib']:.1f}" if alone.get("peak_gib") else "",
                f"{alone['generation_ms']:.2f}" if "generation_ms" in alone else "",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body))


def figure(stem: Path, records: list[dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> list[Path]:
    """The curves of the first seed; their last point is of the whole validation text, the others of a sample of it."""
    points = {}
    for record in records:
        speed = speeds.get(record["model"], record)["tokens_per_second"]
        if record["seed"] == records[0]["seed"]:
            points[record["model"]] = [(e["tokens"], e["tokens"] / speed, e["bits_per_byte"]) for e in record["evaluations"]]
    return plots.plot_comparison(stem, points)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs=2, action="append", required=True, metavar=("FOLDER", "COMMIT"))
    parser.add_argument("--speeds", nargs="*", type=Path, default=[], help="files of benchmarks/models.py")
    parser.add_argument("--command", default="deltanet compare")
    parser.add_argument("--text", default="", help="what the text was, in words")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, default=None, help="without its ending")
    options = parser.parse_args(args)
    common, records = gather([(Path(path), commit) for path, commit in options.folder])
    speeds = read_speeds(options.speeds)
    record = {
        "what": "deltanet compare; several models may have shared a GPU, so `alone` has their speeds, measured by benchmarks/models.py",
        "command": options.command,
        "text": options.text,
        "settings": config_to_dict(common),
        "rows": records,
        "alone": speeds,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(records, speeds))
    if options.figure:
        figure(options.figure, records, speeds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
