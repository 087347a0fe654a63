"""Gathers folders of `deltanet suite`, of several calls and machines, into one file of results, its tables and its figure.

    python benchmarks/suites.py --folder runs/suites/mqar d5ee305 --folder elsewhere/mqar-heads1 d5ee305 "one head" \
        --command "deltanet suite mqar" --out benchmarks/results/mqar-nvidia-h200-2026-11-22.json --figure docs/images/mqar

A folder comes with the commit that it was made at, and with a name for its setting where that is not the protocol's: entries are
compared within a setting only. Where two folders of a setting hold the same cell, the one that was trained longer counts. Prints Markdown.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltanet.training.suites import SUITES, Store, Suite, markdown, rows_of

PROTOCOL = "protocol"
CELL = ("task", "model", "learning_rate", "weight_decay", "seed")
OUTCOME = ("status", "epochs", "steps", "seconds", "stacked", "scores", "best", "chosen", "surest", "loss")


def gather(folders: Sequence[Sequence[str]]) -> tuple[Suite, dict[str, list[dict[str, Any]]]]:
    """The suite of the folders, and by setting the outcomes of their cells, each with the commit under "commit"."""
    names = {json.loads((Path(folder[0]) / "suite.json").read_text())["suite"] for folder in folders}
    if len(names) > 1:
        raise ValueError(f"folders must be of one suite, got {', '.join(sorted(names))}: give those of one")
    suite = SUITES[names.pop()]
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for path, commit, *setting in folders:
        cells = found.setdefault(setting[0] if setting else PROTOCOL, {})
        for outcome in Store(Path(path), suite.name).outcomes():
            cell = outcome["cell"]
            key = (*(cell[name] for name in CELL), cell["config"]["d_model"], cell["recipe"]["epochs"])
            before = cells.get(key)
            if before is not None and before["cell"] != cell:
                raise ValueError(
                    f"{path} must have the cell {key} as the folders before, got other settings: name a setting"
                )
            if before is None or before["epochs"] < outcome["epochs"]:
                cells[key] = {**outcome, "commit": commit}
    return suite, {setting: list(cells.values()) for setting, cells in found.items()}


def report(suite: Suite, settings: dict[str, list[dict[str, Any]]], commands: Sequence[str]) -> dict[str, Any]:
    """What is written down: rows of the tables, and below them every cell."""
    outcomes = [outcome for of_setting in settings.values() for outcome in of_setting]
    return {
        "suite": suite.name,
        "measure": suite.measure,
        "devices": sorted({outcome["environment"]["device"] for outcome in outcomes}),
        "torch": sorted({outcome["environment"]["torch"] for outcome in outcomes}),
        "dates": sorted({outcome["environment"]["date"] for outcome in outcomes}),
        "commits": sorted({outcome["commit"] for outcome in outcomes}),
        "commands": list(commands),
        "settings": [
            {
                "setting": setting,
                "rows": [{**asdict(row), "difference": row.difference} for row in rows_of(suite, of_setting)],
                "cells": [
                    {name: outcome["cell"][name] for name in CELL}
                    | {"width": outcome["cell"]["config"]["d_model"], "config": outcome["cell"]["config"]}
                    | {"recipe": outcome["cell"]["recipe"], "commit": outcome["commit"]}
                    | {name: outcome[name] for name in OUTCOME if name in outcome}
                    for outcome in of_setting
                ],
            }
            for setting, of_setting in settings.items()
        ],
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs="+", action="append", required=True, metavar="PATH COMMIT [SETTING]")
    parser.add_argument("--command", action="append", default=[], help="how the numbers were made")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--figure", type=Path, help="the figure of one setting, without .png or .svg")
    parser.add_argument(
        "--figure-of", default=PROTOCOL, metavar="SETTING", help="which setting; the protocol's if not given"
    )
    options = parser.parse_args(arguments)
    for folder in options.folder:
        if len(folder) not in (2, 3):
            parser.error(f"--folder must be PATH COMMIT [SETTING], got {' '.join(folder)}")
    suite, settings = gather(options.folder)
    result = report(suite, settings, options.command)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for setting, outcomes in settings.items():
        rows = rows_of(suite, outcomes)
        print(f"\n{suite.name}, {setting}: {suite.measure}; {', '.join(result['devices'])}\n\n{markdown(suite, rows)}")
        if options.figure and setting == options.figure_of:
            note = ", ".join(
                [
                    *result["devices"],
                    "short of the protocol, see the table" if any(r.reduced for r in rows) else "full protocol",
                ]
            )
            print("\n".join(map(str, suite.draw(rows, options.figure, note))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
