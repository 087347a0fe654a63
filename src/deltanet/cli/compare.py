"""`deltanet compare`: a process for each model, as many at a time as there are GPUs to use; then one table and one plot."""

import contextlib
import dataclasses
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from deltanet.cli.options import parse
from deltanet.cli.runs import read_status
from deltanet.cli.screen import JsonScreen, Screen, TextScreen
from deltanet.cli.train import implied, last_value, with_sections
from deltanet.training import default_run
from deltanet.training.compare import (
    LINE_UP,
    SETTINGS,
    TABLE,
    Comparison,
    begin,
    read_comparison,
    read_row,
    train_and_measure,
    write_table,
)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Train several models on the same tokens, in the same order, for as long, and see them side by side.

    The same command again goes on where it stopped, and with more models adds them; one that is finished is left as it is. Each model
    has a run folder in --out, which `deltanet generate`, `evaluate` and `plot` take. All fields of the data and the training can be
    set, as with `deltanet train`; without them they are those of the size, at nano with 150 steps.
    """

    models: tuple[str, ...] = LINE_UP
    """Which ones, by name; by default those of the paper's main table."""
    config: Path | None = None
    """What is the same for all, as a TOML file such as recipes/line-up-42m.toml or a folder's comparison.toml. Options override it."""
    out: Path | None = None
    """The folder; by default runs/compare-austen-nano, or whatever text and size there are."""
    gpus: int = 1
    """How many models train side by side, each on a GPU of its own."""
    data: str | None = None
    """The text: a bundled corpus or your own .txt, .jsonl, .jsonl.gz or folder of those. Short for --data.source."""
    only: str | None = None
    """Train this one of the models in this process, and make no table: what the command does for each of them."""
    json: bool = False
    """Report as JSON, one object a line, for programs; the last one is the table."""
    quiet: bool = False
    """Report nothing but errors."""


STEPS = 150  # at nano, so that a laptop has the table in minutes


def run(args: list[str]) -> int:
    args = with_sections(args, Comparison, CompareOptions)
    options, comparison = compare_options(args)
    out = options.out or Path("runs") / f"compare-{Path(comparison.data.source).name.split('.')[0] or 'text'}-{comparison.size}"
    if options.only is not None:
        return train_here(comparison, options, out)
    if options.gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {options.gpus}")
    if options.gpus > max(1, torch.cuda.device_count()):
        raise ValueError(f"gpus must be at most the {torch.cuda.device_count()} that are there, got {options.gpus}")
    if options.gpus > 1 and comparison.train.device not in ("auto", "cuda"):
        raise ValueError(f"with gpus above 1 every model has a GPU of its own, got device {comparison.train.device!r} too: leave one of them out")
    new = not (out / SETTINGS).exists()
    begin(comparison, options.models, out)
    left = [model for model in options.models if read_row(out / model) is None]
    codes = train_side_by_side(args, options, left, out) if left else [0]
    if 130 in codes:
        return 130
    if new and max(codes) and not any((out / model / "config.toml").exists() for model in left):
        forget(out, left)
        return max(codes)
    rows, paths = write_table(comparison, out)
    if options.json:
        print((out / f"{TABLE}.json").read_text(encoding="utf-8").replace("\n", ""))
    elif not options.quiet:
        print((out / f"{TABLE}.md").read_text(encoding="utf-8"))
        print("\n".join(map(str, paths)))
    missing = [model for model in options.models if model not in {row.model for row in rows}]
    if missing:
        print(f"deltanet: not finished: {', '.join(missing)}; the same command goes on with them", file=sys.stderr)
    return max(1, *codes) if missing else 0


def forget(out: Path, models: list[str]) -> None:
    """Leaves the folder as it was when no model could begin, so that nothing holds the next call to settings that did not fit."""
    (out / SETTINGS).unlink()
    with contextlib.suppress(OSError):  # it is not empty: not all of it is ours
        for folder in (out / model for model in models if (out / model).exists()):
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()
        out.rmdir()


def compare_options(args: list[str]) -> tuple[CompareOptions, Comparison]:
    """The options of `deltanet compare` and what they say is the same for all models: the size first, then everything else."""

    @dataclass(frozen=True, kw_only=True)
    class WithComparison(CompareOptions):
        comparison: Annotated[Comparison, tyro.conf.arg(name="")]

    WithComparison.__doc__ = CompareOptions.__doc__
    file = last_value(args, "--config")
    base = usual(last_value(args, "--size") or "nano") if file is None else read_comparison(Path(file))
    parsed = parse(WithComparison, [*implied(args), *args], "compare", WithComparison(comparison=base))
    return parsed, parsed.comparison


def usual(size: str) -> Comparison:
    """A comparison of models of that size on the bundled novels."""
    run = default_run(size)
    steps = STEPS if size == "nano" else run.train.steps
    return Comparison(size=size, data=run.data, train=dataclasses.replace(run.train, steps=steps, sample_tokens=0))


def train_here(comparison: Comparison, options: CompareOptions, out: Path) -> int:
    """One model, in this process; begin() was called by the one that started it."""
    model = str(options.only)
    begin(comparison, [model], out)
    if options.json:
        screen: Screen = JsonScreen()
    else:
        screen = Screen() if options.quiet else TextScreen(comparison.run(model), Console(highlight=False, soft_wrap=True))
    try:
        row = train_and_measure(comparison, model, out, screen)
    finally:
        screen.close()
    return 130 if row is None and read_status(out / model).get("status") == "interrupted" else 0  # else time was over


def train_side_by_side(args: list[str], options: CompareOptions, models: list[str], out: Path) -> list[int]:
    """The exit code of each model's process. A process of its own for each, so that its memory is its own too; of several GPUs it sees one."""
    devices: queue.Queue[str | None] = queue.Queue()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for index in range(options.gpus):
        devices.put(None if options.gpus == 1 else seen[index] if seen != [""] else str(index))
    failed = threading.Event()

    def train_one(model: str) -> int:
        device = devices.get()
        try:
            if failed.is_set():
                return 0
            command = [sys.executable, "-m", "deltanet", "compare", *args, "--out", str(out), "--only", model]
            if not (options.json or options.quiet):
                print(f"== {model}" + (f" on GPU {device}" if device else ""), flush=True)
            code = follow(command, model if options.gpus > 1 and not options.json else None, device)
            if code in (2, 130):  # bad input, which the others would meet too, or Ctrl-C
                failed.set()
            return code
        finally:
            devices.put(device)

    with ThreadPoolExecutor(options.gpus) as pool:
        return list(pool.map(train_one, models))


def follow(command: list[str], prefix: str | None, gpu: str | None = None) -> int:
    """Runs `command` to its end, its lines behind `prefix` if others run beside it; it sees no GPU but `gpu`, if given.

    Passes Ctrl-C on by waiting for it to save.
    """
    environment = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    with subprocess.Popen(command, stdout=None if prefix is None else subprocess.PIPE, text=True, env=environment) as process:
        while True:
            try:
                for line in process.stdout or ():
                    print(f"{prefix:<16} {line}", end="", flush=True)
                return process.wait()
            except KeyboardInterrupt:  # the terminal has told the process too; it saves and ends
                continue
