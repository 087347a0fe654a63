"""`deltanet suite`: the paper's synthetic evidence, each with one command: trains a grid of small models, then the table and the figure."""

import datetime
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from deltanet import __version__
from deltanet.cli.options import parse
from deltanet.cli.words import count, duration, printable
from deltanet.evaluation import plots
from deltanet.ops.backends import nearest
from deltanet.training.device import choose_device, device_name
from deltanet.training.run_folder import replace_text
from deltanet.training.suites import (
    SUITES,
    Cell,
    Examined,
    Grid,
    Progress,
    Row,
    Store,
    Suite,
    markdown,
    rows_of,
    run_cells,
)

PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Train small models on synthetic tasks by the protocols of the literature; our numbers beside the paper's, as a table and a figure.

    mqar: recall of many pairs against the model's width. mad: six tasks. regbench: random automata learned in context.
    tracking: parity and permutations. Without options the full protocol on a GPU, --quick on a CPU. What is done is
    kept: the same command again goes on where it stopped.
    """

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")] = "mqar"
    """mqar, mad, regbench or tracking."""
    quick: bool = False
    """A version that takes minutes on a CPU; the default there."""
    full: bool = False
    """The protocol, also on a CPU, where it takes very long."""
    show: bool = False
    """Only show an example of each task."""
    models: tuple[str, ...] | None = None
    """Models, such as deltanet-noconv attention."""
    tasks: tuple[str, ...] | None = None
    """Tasks by name or pattern: 512x64 (mqar: length x pairs), "*.baseline" (mad), 5000 (regbench: examples), ..."""
    widths: tuple[int, ...] | None = None
    """Widths of the model."""
    learning_rates: tuple[float, ...] | None = None
    """Peak learning rates, of which the best counts."""
    weight_decays: tuple[float, ...] | None = None
    """Weight decays, likewise."""
    seeds: tuple[int, ...] | None = None
    """Seeds, over which scores are averaged."""
    heads: int | None = None
    """Heads of the mixers."""
    depth: int | None = None
    """Blocks of the model."""
    epochs: tuple[int, ...] | None = None
    """Times that the training examples are seen; of several the best counts, as of learning rates."""
    patience: int | None = None
    """End a cell after so many epochs without a better score, by validation where there is one; the protocols go on to the last one."""
    train_examples: int | None = None
    """Training examples."""
    test_examples: int | None = None
    """Test examples."""
    batch_size: int | None = None
    """Examples of one step."""
    minutes: float | None = None
    """Stop after so long; what is under way is shown as stopped, and the next call goes on with it."""
    until_solved: bool = False
    """Leave out further learning rates of a model once one has reached the protocol's threshold."""
    together: int | None = None
    """Cells trained side by side on the device; 4 on a GPU, 1 on a CPU if not given."""
    stacked: int | None = None
    """Cells that differ in rate and decay alone, trained as one model where that can be (MAD); 6 on a GPU, 1 on a CPU if not given."""
    cells: str | None = None
    """This process's part of the cells, such as 2/3. Several processes may share a folder, each on its GPU."""
    out: Path | None = None
    """The folder of the suite; by default runs/suites/ and its name."""
    overwrite: bool = False
    """Train the cells anew, also those that are done."""
    no_compile: bool = False
    """On a GPU, do not fuse the models' small operations first, which takes some ten seconds for each shape and halves the time of a step."""
    precision: str = "auto"
    """Of the matrix products: bfloat16 on a GPU and float32 on a CPU if auto."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    backend: str = "auto"
    """Who runs the delta rule: auto, reference, triton or hopper."""
    json: bool = False
    """Report as JSON, one object a line, for programs."""
    quiet: bool = False
    """Report nothing but errors."""


def run(args: list[str]) -> int:
    options = parse(SuiteOptions, args, "suite")
    if options.what not in SUITES:
        known = tuple(SUITES)
        raise ValueError(f"there is no suite {options.what!r}, only {', '.join(known)}{nearest(options.what, known)}")
    suite, device = SUITES[options.what], choose_device(options.device)
    quick = options.quick or (device.type == "cpu" and not options.full)
    if options.quick and options.full:
        raise ValueError("give --quick or --full, not both")
    if options.precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}")
    given = {one.name: value for one in fields(Grid) if (value := getattr(options, one.name)) is not None}
    grid = replace(suite.grid(quick), **given)
    precision = (
        ("bfloat16" if device.type == "cuda" else "float32") if options.precision == "auto" else options.precision
    )
    cells = part_of(suite.cells(grid, precision), options.cells)
    if options.show:
        show(cells)
        return 0
    limits = (("together", options.together, 64), ("stacked", options.stacked, 64), ("minutes", options.minutes, 1e6))
    for name, value, most in limits:
        if value is not None and not 0 < value <= most:
            raise ValueError(f"{name} must be above 0 and at most {most:g}, got {value:g}")
    together = options.together or (4 if device.type == "cuda" else 1)
    stacked = options.stacked or (6 if device.type == "cuda" else 1)
    store = Store(options.out or Path("runs/suites") / (suite.name + ("-quick" if quick else "")), suite.name)
    if options.overwrite:
        for cell in cells:
            store.remove(cell)
    watcher = watcher_for(options, store, device)
    try:
        status = run_cells(
            cells, store, device=device, together=together, stacked=stacked, backend=options.backend, minutes=options.minutes,
            until_solved=options.until_solved, compile=device.type == "cuda" and not options.no_compile,
            environment=environment(device, together), watcher=watcher,
        )  # fmt: skip
    finally:
        watcher.close()
    report(suite, store, options, status)
    if watcher.failures:
        told = "".join(f"\n  {failure}" for failure in watcher.failures)
        print(
            f"deltanet: error: {len(watcher.failures)} of the cells failed; {store.path / 'metrics.jsonl'} says where, "
            f"the same command tries them again:{told}",
            file=sys.stderr,
        )
    return {"interrupted": 130, "failed": 1}.get(status, 0)


def part_of(cells: list[Cell], part: str | None) -> list[Cell]:
    """The k-th of n parts, for `part` "k/n"."""
    if part is None:
        return cells
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"cells must be like 2/3, the second of three parts, got {part!r}")
    return cells[int(match[1]) - 1 :: int(match[2])]


def environment(device: torch.device, together: int) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "deltanet": __version__,
        "together": together,
        "date": datetime.date.today().isoformat(),
    }


def show(cells: Sequence[Cell]) -> None:
    """A test example of each task, with what is asked of it."""
    shown = {cell.task: cell for cell in reversed(cells)}
    for name, cell in reversed(shown.items()):
        task = cell.train
        print(
            f"{name}: {task.length} tokens of {task.vocab_size} ids, {cell.recipe.train_examples:,} training examples"
        )
        print(printable(task.show(task.sample(1, seed=cell.seed, split="test"), 0)) + "\n")


def report(suite: Suite, store: Store, options: SuiteOptions, status: str) -> None:
    """Writes the table and the figure of all that is in the folder, and shows them."""
    rows, paths = write_report(suite, store)
    if options.json:
        print(
            json.dumps(
                {"event": "end", "status": status, "files": [str(p) for p in paths], "rows": [asdict(r) for r in rows]}
            )
        )
    elif not options.quiet:
        words = {
            "finished": "",
            "time": "The time is over",
            "interrupted": "Interrupted",
            "elsewhere": "Other processes go on",
            "failed": "",
        }
        if words[status]:
            print(f"{words[status]}; the same command goes on with what is left.")
        print()
        print(markdown(suite, rows))
        print("\n".join(map(str, paths)))
    if not plots.can_plot() and not options.quiet:
        print(
            "deltanet: the figure needs matplotlib, which is not installed: pip install 'deltanet[plot]'",
            file=sys.stderr,
        )


def write_report(suite: Suite, store: Store) -> tuple[list[Row], list[Path]]:
    outcomes = store.outcomes()
    rows = rows_of(suite, outcomes)
    if not rows:
        return [], []
    devices = sorted({outcome["environment"]["device"] for outcome in outcomes})
    note = ", ".join(
        [*devices, "short of the protocol, see the table" if any(row.reduced for row in rows) else "full protocol"]
    )
    table, data = store.path / "table.md", store.path / "table.json"
    replace_text(table, f"# {suite.name}: {suite.measure}\n\n{note}\n\n{markdown(suite, rows)}")
    replace_text(
        data,
        json.dumps({"suite": suite.name, "measure": suite.measure, "rows": [asdict(row) for row in rows]}, indent=1)
        + "\n",
    )
    # Drawn aside and put in place whole: other processes may share the folder.
    drawn = suite.draw(rows, store.path / f".figure-{os.getpid()}", note) if plots.can_plot() else []
    return rows, [table, data, *(path.replace(store.path / f"figure{path.suffix}") for path in drawn)]


class Quiet:
    """Watches and says nothing: what the others have in common."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def begin(self, progress: Progress, kept: int) -> None: ...

    def tick(self, progress: Progress) -> None: ...

    def examined(self, cell: Cell, found: Examined, progress: Progress) -> None: ...

    def finished(self, cell: Cell, outcome: dict[str, Any], progress: Progress) -> None: ...

    def failed(self, cell: Cell, error: str, progress: Progress) -> None:
        self.failures.append(f"{title(cell)}: {error}")

    def close(self) -> None:
        """Called once at the end, however it came."""


class JsonWatcher(Quiet):
    """One JSON object a line, its kind under "event"."""

    def begin(self, progress: Progress, kept: int) -> None:
        print(json.dumps({"event": "begin", "cells": progress.cells, "kept": kept}), flush=True)

    def examined(self, cell: Cell, found: Examined, progress: Progress) -> None:
        print(json.dumps({"event": "examined", "cell": cell.name, **found.record()}), flush=True)

    def finished(self, cell: Cell, outcome: dict[str, Any], progress: Progress) -> None:
        print(json.dumps({"event": "finished", "cell": cell.name, **outcome}), flush=True)

    def failed(self, cell: Cell, error: str, progress: Progress) -> None:
        super().failed(cell, error, progress)
        print(json.dumps({"event": "failed", "cell": cell.name, "error": error}), flush=True)


class TextWatcher(Quiet):
    """For people: a line for each cell that is done; meanwhile on a terminal one live line, in a pipe a plain line now and then."""

    EVERY = 10.0  # seconds between plain lines

    def __init__(self, console: Console, minutes: float | None) -> None:
        super().__init__()
        self._console, self._minutes = console, minutes
        self._live: Live | None = None
        self._told = 0.0
        self._latest = ""

    def begin(self, progress: Progress, kept: int) -> None:
        self._told = time.monotonic()
        done = f", {kept} done before" if kept else ""
        self._console.print(Text(f"{progress.cells} cells to train{done}"))

    def tick(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._told < (0.2 if self._console.is_terminal else self.EVERY):
            return
        self._told = now
        left = progress.left(self._minutes)
        line = f"{progress.done}/{progress.cells} cells · {self._latest}{count(progress.tokens / progress.seconds)} tokens/s"
        line += "" if left is None else f" · at most {duration(left)} left"
        if not self._console.is_terminal:
            self._console.print(Text(line))
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        self._live.update(Text(line, style="bold", no_wrap=True, overflow="ellipsis"))

    def examined(self, cell: Cell, found: Examined, progress: Progress) -> None:
        score = 100 * found.scores["test"]
        self._latest = f"{title(cell)}: epoch {found.epoch}/{cell.recipe.epochs}, {score:.1f}% · "

    def finished(self, cell: Cell, outcome: dict[str, Any], progress: Progress) -> None:
        score, epochs = 100 * outcome["scores"]["test"], outcome["epochs"]
        status = "" if outcome["status"] == "finished" else f" ({outcome['status']})"
        beside = "".join(f", {name} {100 * value:.1f}%" for name, value in outcome["scores"].items() if name != "test")
        text = f"{title(cell)}: {score:.1f}%{beside} after {epochs} epochs, {duration(outcome['seconds'])}{status}"
        if cell.judge != "test" and outcome["chosen"] != outcome["scores"]:
            text += f"; {100 * outcome['chosen']['test']:.1f}% where validation likes it best"
        self._console.print(Text(text, style="green" if not status else "yellow"))

    def failed(self, cell: Cell, error: str, progress: Progress) -> None:
        super().failed(cell, error, progress)
        self._console.print(Text(f"{title(cell)}: failed, {error}", style="red"))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def title(cell: Cell) -> str:
    return f"{cell.task} {cell.model} d{cell.config.d_model} lr {cell.learning_rate:.3g} wd {cell.weight_decay:g} seed {cell.seed}"


def watcher_for(options: SuiteOptions, store: Store, device: torch.device) -> Quiet:
    if options.quiet:
        return Quiet()
    if options.json:
        return JsonWatcher()
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{options.what} on {device_name(device)}, in {store.path}"))
    return TextWatcher(console, options.minutes)
