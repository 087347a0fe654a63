"""Options by tyro over dataclasses; whatever does not fit becomes one line."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

Options = TypeVar("Options")

# --flag without --no-flag, except where it is on already; and a choice among dataclasses stays as the default has it.
STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)

LATEST = "runs/latest"
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]  # a run folder, the newest if not given


def parse(kind: type[Options], args: Sequence[str], prog: str, default: Options | None = None) -> Options:
    """`kind` filled from `args`, by tyro. ValueError, one line of it, for what does not fit."""
    boxes = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(kind, args=list(args), prog=f"deltanet {prog}", config=STYLE, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(one_line(boxes.getvalue(), sorted(set(flags(kind))))) from None


def one_line(box: str, known: Sequence[str]) -> str:
    """What tyro says in a box on several lines, in one; for an unknown option the nearest of `known` instead of its hints."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        inner = line.strip("│ ")
        if line.startswith("╭") or set(inner) <= set("─-"):  # the title, or a rule between two parts
            sections.append([])
        elif not line.startswith("╰"):
            sections[-1].append(inner)
    # The title is drawn into the frame or, where there are no frames, stands above a rule. Then comes the fault, then hints.
    said = sections[1]
    fault = " ".join(said).partition(" Got errors:")[0].strip().rstrip(".")
    if unknown := re.fullmatch(r"Unrecognized (?:or misplaced )?options: (.*)", fault):
        tokens = unknown[1].split(", ")
        option = next((token for token in tokens if token.startswith("-")), tokens[0])
        close = difflib.get_close_matches(option.partition("=")[0], known, n=1)
        return f"there is no option {option}" + (f": did you mean {close[0]}?" if close else "; --help lists them")
    if missing := re.match(r"Missing (?:from .*?|value for argument) *:? *\'?.*?(--[\w.-]+)", fault):
        return f"{missing[1]} must be given a value"
    if value := re.fullmatch(r"Error parsing (--\S+): no type matching (\S+) could be .*? from \[(.*)\]", fault):
        return f"{value[1]} must be {value[2]}, got {value[3]}"
    if value := re.fullmatch(r"Error parsing (?:run\.)?(\S+): (.*)", fault):
        return f"{value[1]}: {value[2]}" if value[1].startswith("--") else f"[{value[1]}] {value[2]}"
    return fault


def flags(kind: type, section: str = "") -> Iterator[str]:
    """The options of a dataclass as they are typed: --train.steps, and --steps."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from flags(hint, "" if name == "run" else f"{section}{name}.")  # type: ignore[arg-type]
        else:
            yield from (f"--{section}{name}".replace("_", "-"), f"--{name}".replace("_", "-"))
