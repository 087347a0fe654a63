"""Options by tyro over dataclasses; whatever does not fit becomes one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

Options = TypeVar("Options")

LATEST = "runs/latest"
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a run folder, the newest if not given


def parse(kind: type[Options], args: Sequence[str], prog: str, default: Options | None = None) -> Options:
    """`kind` filled from `args`, by tyro. ValueError, one line of it, for what does not fit."""
    boxes = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(
                kind, args=list(args), prog=f"deltanet {prog}", config=(tyro.conf.FlagCreatePairsOff,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(one_line(boxes.getvalue())) from None


def one_line(box: str) -> str:
    """What tyro says in a box on several lines, in one: the fault, and the nearest option it found."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        inner = line.strip("│ ")
        if set(inner) <= set("─"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(inner)
    said = [" ".join(section) for section in sections]
    fault = re.split(r" Got errors:", said[0])[0].strip().rstrip(".")
    if fault.startswith("Unrecognized options:"):
        near = re.search(r"Perhaps you meant: (--\S+)", " ".join(said[1:]))
        fault = "there is no option " + fault.removeprefix("Unrecognized options:").strip()
        return fault + (f": did you mean {near[1]}?" if near else "")
    if value := re.fullmatch(r"Error parsing (--\S+): no type matching (\S+) could be .*? from \[(.*)\]", fault):
        return f"{value[1]} must be {value[2]}, got {value[3]}"
    if value := re.fullmatch(r"Error parsing (?:run\.)?(\S+): (.*)", fault):
        return f"{value[1]}: {value[2]}" if value[1].startswith("--") else f"[{value[1]}] {value[2]}"
    return fault
