"""The folder of a suite: one file for each cell that is done, what the trainings told on the way, and what is drawn from them.

    suite.json       which suite it is
    cells/NAME.json  the outcome of a cell and everything it depends on, written at once when the cell is done
    cells/NAME.safetensors  where a cell stands that is not done; goes when it is
    metrics.jsonl    every evaluation of every cell, as it came
    table.md, table.json, figure.png, figure.svg

Several processes may share a folder: a cell is trained by whoever has its lock.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltanet.training.run_folder import replace_text
from deltanet.training.suites.cell import Cell, Recipe
from deltanet.training.suites.model import SuiteModelConfig

__all__ = ["Claim", "Store"]

FORMAT = 1
STATUSES = ("finished", "diverged", "stopped")
COUNTED = ("scores", "best", "chosen")
NEEDED: dict[str, Any] = {  # what an outcome must have, for the table, and of which type
    "cell": dict, "status": str, **dict.fromkeys(COUNTED, dict), "epochs": int, "seconds": int | float,
    "cell.task": str, "cell.model": str, "cell.learning_rate": int | float, "cell.weight_decay": int | float,
    "cell.config": dict, "cell.config.d_model": int, "cell.config.depth": int, "cell.config.mixer": dict,
    "cell.recipe": dict, "cell.recipe.epochs": int, "cell.recipe.train_examples": int, "cell.recipe.batch_size": int,
}  # fmt: skip


class Claim:
    """The right to train a cell. The system takes it back when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            return False
        return True

    def release(self) -> None:
        self._file.close()


class Store:
    """The folder `path` of the suite of that name: a new or empty one, or one that it made before.

    Raises ValueError for a file, a folder of other things, and one of another suite.
    """

    def __init__(self, path: Path, suite: str) -> None:
        self.path, self.cells = path, path / "cells"
        if path.is_file():
            raise ValueError(f"out must be a folder, got the file '{path}': choose another name")
        mark = path / "suite.json"
        if mark.exists():
            found = _json(mark)
            if found.get("suite") != suite:
                raise ValueError(
                    f"out must be a folder of the suite {suite}, got '{path}' of {found.get('suite')!r}: choose another"
                )
            if found.get("format") != FORMAT:
                raise ValueError(
                    f"'{mark}' must be of format {FORMAT}, got {found.get('format')!r}: choose another out"
                )
        elif path.exists() and any(path.iterdir()):
            raise ValueError(
                f"out must be a new folder or that of a suite, got '{path}' with other things: choose another"
            )
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                replace_text(mark, json.dumps({"suite": suite, "format": FORMAT}) + "\n")
        except OSError as error:
            raise ValueError(f"out must be a folder that can be written, got {error}: choose another") from None

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The outcome of `cell`, or None. ValueError, which names what differs, where the file tells of another training."""
        path = self._file(cell)
        if not path.exists():
            return None
        outcome = _outcome(path)
        self._refuse_another(path, cell, outcome["cell"])
        return outcome

    def write(self, cell: Cell, outcome: dict[str, Any]) -> None:
        replace_text(self._file(cell), json.dumps({"cell": cell.record(), **outcome}, indent=1) + "\n")

    def remove(self, cell: Cell) -> None:
        self._file(cell).unlink(missing_ok=True)
        self.forget(cell)

    def keep(self, cell: Cell, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Writes down where the training of `cell` stands, in place of what was there before."""
        path = self._standing(cell)
        partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            save_file(tensors, partial, {"cell": json.dumps(cell.record()), "values": json.dumps(values)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def standing(self, cell: Cell) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep` was given last, or None. ValueError for a file of another training, and for one that is broken."""
        path = self._standing(cell)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                record, values = json.loads(told["cell"]), json.loads(told["values"])
                self._refuse_another(path, cell, _record(record))
                return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118, it is no dict
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError, OSError) as error:
            raise ValueError(
                f"'{path}' must be where a cell stands, got {error!r}: put it back, or remove it to begin the cell anew"
            ) from None

    def forget(self, cell: Cell) -> None:
        """Removes what `keep` has written."""
        self._standing(cell).unlink(missing_ok=True)

    def claim(self, cell: Cell) -> Claim | None:
        """The right to train `cell`, or None if another process has it."""
        claim = Claim(self.cells / f".{cell.name}.lock")
        return claim if claim.take() else None

    def outcomes(self) -> list[dict[str, Any]]:
        """Of all cells in the folder, whoever trained them; in the order of their names."""
        return [_outcome(path) for path in sorted(self.cells.glob("*.json"))]

    def note(self, values: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl; a whole one, also where several processes write."""
        with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(values).encode() + b"\n")

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"

    def _standing(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.safetensors"

    def _refuse_another(self, path: Path, cell: Cell, record: Any) -> None:
        wanted = json.loads(json.dumps(cell.record()))
        if difference := next(_differences(wanted, record), None):
            name, asked, found = difference
            raise ValueError(
                f"'{path}' must have {name} = {asked!r} as asked for now, got {found!r}: "
                "choose another --out, or --overwrite to train it anew"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' must be a JSON object, got something else: put it back, or remove it")
    return found


def _outcome(path: Path) -> dict[str, Any]:
    found = _json(path)
    found.setdefault("chosen", found.get("scores"))  # before it was written down
    for name, kind in NEEDED.items():
        if not isinstance(_at(found, name), kind):
            raise ValueError(f"'{path}' must be the outcome of a cell, got no {name}: put it back, or remove it")
    if found["status"] not in STATUSES:
        raise ValueError(
            f"'{path}' must be of status {', '.join(STATUSES[:-1])} or {STATUSES[-1]}, got {found['status']!r}: put it back, or remove it"
        )
    for name in COUNTED:
        if "test" not in found[name]:
            raise ValueError(f"'{path}' must have a score of the test, got none in {name}: put it back, or remove it")
        for test, score in found[name].items():
            if not (isinstance(score, int | float) and 0 <= score <= 1):
                raise ValueError(f"'{path}' must have scores between 0 and 1, got {score!r} for {name}.{test}: put it back, or remove it")
    found["cell"] = _record(found["cell"])
    return found


def _at(found: Any, name: str) -> Any:
    """What is under a name such as cell.config.depth; None where there is nothing."""
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _record(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's record as written down, perhaps by an earlier version: before a field was there, it was at its default."""
    cell = dict(cell)
    for name, kind in {"config": SuiteModelConfig, "recipe": Recipe}.items():
        if isinstance(known := cell.get(name), dict):
            defaults = {one.name: one.default for one in fields(kind) if one.default is not MISSING}
            cell[name] = {**defaults, **known}
    return cell


def _differences(wanted: Any, found: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, wanted, found) wherever two records differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*wanted, *found]):
            inner = f"{name}.{key}" if name else key
            yield from _differences(wanted.get(key), found.get(key), inner)
    elif wanted != found:
        yield name, wanted, found
