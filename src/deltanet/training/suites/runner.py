"""Works through the cells of a grid, several side by side where the device has room, and writes each down when it is done."""

import math
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deltanet.data.synthetic import Task
from deltanet.training.interrupts import Interrupts
from deltanet.training.suites.cell import Cell
from deltanet.training.suites.group import Group, grouped
from deltanet.training.suites.store import Claim, Store
from deltanet.training.suites.trial import Examined, Prepared, Trial, is_diverged, is_over, prepare

__all__ = ["Progress", "Watcher", "run_cells"]

KEEP_EVERY = 300.0  # seconds, after which an evaluation is a time to write down where its cell stands
KEPT = 6  # sets of examples on the device at a time, beside those in use


@dataclass
class Progress:
    """How far a call is. Work is in the cells' own measure, at most: a cell may be done early."""

    cells: int
    done: int = 0
    left_out: int = 0  # because their entry was solved by another rate
    elsewhere: int = 0  # trained by another process
    failed: int = 0  # raised an error
    work: float = 0.0
    work_done: float = 0.0
    began: float = field(default_factory=time.monotonic)
    tokens: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def left(self, minutes: float | None) -> float | None:
        """Seconds until the last cell is done or the time is over, at most; None where nothing was measured yet."""
        limit = None if minutes is None else max(0.0, 60 * minutes - self.seconds)
        if not self.work_done:
            return limit
        left = self.seconds * (self.work - self.work_done) / self.work_done
        return left if limit is None else min(left, limit)


class Watcher(Protocol):
    """Who looks on."""

    def begin(self, progress: Progress, kept: int) -> None:
        """Before the first cell; `kept` cells were done before."""

    def tick(self, progress: Progress) -> None:
        """Often, while cells are trained."""

    def examined(self, cell: Cell, found: Examined, progress: Progress) -> None:
        """After an evaluation."""

    def finished(self, cell: Cell, outcome: dict[str, Any], progress: Progress) -> None:
        """After a cell was written down."""

    def failed(self, cell: Cell, error: str, progress: Progress) -> None:
        """After a cell raised an error, told in one line; metrics.jsonl has all of it."""


@dataclass(eq=False)
class _Slot:
    """What is trained as one: a cell, or several as one model."""

    open: dict[Cell, Claim]  # the cells that are not over
    trial: Trial
    run: Iterator[Any]
    cells_work: float
    work: float  # what is left of it for this call
    counted: float = 0.0
    kept: float = field(default_factory=time.monotonic)

    @property
    def entry(self) -> tuple[str, str, int]:
        return self.trial.cell.entry

    def histories(self) -> Iterator[tuple[int, Cell, list[Examined]]]:
        """Of the cells that are not over: the number in the trial, and what its evaluations found."""
        for g, (cell, history) in enumerate(zip(self.trial.cells, self.trial.histories, strict=True)):
            if cell in self.open:
                yield g, cell, history

    def keep(self, store: Store) -> None:
        for g, cell, _ in self.histories():
            store.keep(cell, *self.trial.state(g))
        self.kept = time.monotonic()

    def close(self) -> None:
        self.trial.close()
        for claim in self.open.values():
            claim.release()


class Sets:
    """The examples that trials share, made once; the ones longest not asked for are dropped."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: OrderedDict[tuple[Task, int, int, str], Prepared] = OrderedDict()

    def get(self, task: Task, count: int, seed: int, split: str) -> Prepared:
        key = (task, count, seed, split)
        if key not in self._kept:
            self._kept[key] = prepare(task, count, seed=seed, split=split, device=self._device)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    *,
    device: torch.device,
    together: int,
    stacked: int = 1,
    backend: str = "auto",
    minutes: float | None = None,
    until_solved: bool = False,
    compile: bool = False,
    environment: dict[str, Any],
    watcher: Watcher,
) -> str:
    """Trains the cells that are not done yet, in their order, `together` at a time. One that raises an error is left, and the others go on.

    Args:
        stacked: so many cells that differ in rate and decay alone are trained as one model, where models of their kind can be.
        minutes: stop after so long; cells under way are then written down as stopped, and the next call goes on with them.
        until_solved: leave out an entry's other rates once one is above the recipe's `stop_above`.
        compile: whether the models' small operations are fused first, see `Trial`.
        environment: what is written down beside every outcome.

    Returns "finished"; "time" or "interrupted" where cells are left, "elsewhere" where other processes are at the last of them; "failed" where
    one raised an error, unless interrupted. An error of the device itself (torch.AcceleratorError) ends the run, for nothing works there after it.
    """
    outcomes = {cell: store.read(cell) for cell in cells}
    solved = {cell.entry for cell, outcome in outcomes.items() if outcome and _solves(cell, outcome)}
    left = [cell for cell, outcome in outcomes.items() if outcome is None or outcome["status"] == "stopped"]
    waiting = deque(grouped(left, stacked))
    progress = Progress(cells=len(left), work=sum(cell.work for cell in left))
    watcher.begin(progress, len(cells) - len(left))
    sets, slots, ending = Sets(device), list[_Slot](), "finished"

    def fail(cells: Sequence[Cell], error: Exception, work: float, counted: float = 0.0) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise error
        progress.work -= work
        progress.work_done -= counted
        for cell in cells:
            progress.failed += 1
            store.note({"cell": cell.name, "error": "".join(traceback.format_exception(error))})
            watcher.failed(cell, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", progress)

    with Interrupts() as interrupts:
        while (waiting or slots) and ending == "finished":
            while waiting and len(slots) < together:
                cells = waiting.popleft()
                if until_solved and cells[0].entry in solved:
                    progress.left_out += len(cells)
                    progress.work -= _work(cells)
                    continue
                try:
                    slot, others = _begin(cells, store, sets, device, backend, compile)
                except Exception as error:
                    fail(cells, error, _work(cells))
                    continue
                if others:  # which stand elsewhere in their training
                    waiting.appendleft(others)
                mine = [] if slot is None else list(slot.open)
                elsewhere = [cell for cell in cells if cell not in mine and cell not in others]
                progress.elsewhere += len(elsewhere)
                progress.work -= _work(elsewhere)
                if slot is not None:
                    progress.work -= slot.cells_work - slot.work
                    slots.append(slot)
            for slot in list(slots):
                try:
                    found: Any = next(slot.run, slot)
                except Exception as error:
                    slots.remove(slot)
                    fail([*slot.open], error, slot.work, slot.counted)
                    slot.close()
                    continue
                _count(slot, progress)
                if found is slot:
                    slots.remove(slot)
                    progress.work_done += slot.work - slot.counted
                    slot.close()
                elif found is not None:
                    told: list[tuple[Cell, Examined]] = found if isinstance(found, list) else [(slot.trial.cell, found)]
                    for cell, one in told:
                        store.note({"cell": cell.name, **one.record()})
                        watcher.examined(cell, one, progress)
                    for _, cell, history in list(slot.histories()):
                        if is_over(history, cell):
                            outcome = _end(slot, cell, history, store, environment)
                            progress.done += 1
                            if _solves(cell, outcome):
                                solved.add(cell.entry)
                            watcher.finished(cell, outcome, progress)
                    if time.monotonic() - slot.kept > KEEP_EVERY:
                        slot.keep(store)
            if until_solved:
                for slot in [slot for slot in slots if slot.open and slot.entry in solved]:
                    slots.remove(slot)
                    progress.left_out += len(slot.open)
                    progress.work -= slot.work
                    progress.work_done -= slot.counted
                    slot.close()
            watcher.tick(progress)
            if interrupts.received:
                ending = "interrupted"
            elif minutes is not None and progress.seconds > 60 * minutes:
                ending = "time"
    for slot in slots:
        if slot.trial.done:
            slot.keep(store)
        for _, cell, history in list(slot.histories()):
            if history:
                watcher.finished(cell, _end(slot, cell, history, store, environment), progress)
        slot.close()
    if progress.failed and ending != "interrupted":
        return "failed"
    if not (waiting or slots):
        return "elsewhere" if progress.elsewhere else "finished"
    return ending


def _begin(
    cells: Sequence[Cell], store: Store, sets: Sets, device: torch.device, backend: str, compile: bool
) -> tuple[_Slot | None, list[Cell]]:
    """Those of the cells that no other process is at or was before us, under way, and the ones among them that stand at another step."""
    claims, standings, others = dict[Cell, Claim](), dict[Cell, Any](), list[Cell]()
    try:
        for cell in cells:
            claim = store.claim(cell)
            if claim is None:
                continue
            claims[cell] = claim
            outcome = store.read(cell)
            if outcome is not None and outcome["status"] != "stopped":
                claims.pop(cell).release()
                continue
            standings[cell] = standing = store.standing(cell)
            if _steps(standing) != _steps(next(iter(standings.values()))):
                others.append(cell)
                claims.pop(cell).release()
        if not claims:
            return None, []
        mine, first = list(claims), next(iter(claims))
        train = sets.get(first.train, first.recipe.train_examples, first.seed, "train")
        tests = {name: sets.get(test.task, test.examples, first.seed, test.split) for name, test in first.tests.items()}
        options: dict[str, Any] = {"device": device, "backend": backend, "compile": compile}
        trial = Trial(first, train, tests, **options) if len(mine) == 1 else Group(mine, train, tests, **options)
        for g, cell in enumerate(mine):
            if standings[cell] is not None:
                try:
                    trial.restore(standings[cell][0], standings[cell][1], g)
                except ValueError as error:
                    raise ValueError(f"where {cell.name} stands is not told right, {error}: --overwrite begins it anew") from None
    except BaseException:
        for claim in claims.values():
            claim.release()
        raise
    work = _work(mine)
    return _Slot(claims, trial, trial.run(), work, work * (1 - trial.done / first.recipe.steps)), others


def _steps(standing: tuple[Any, dict[str, Any]] | None) -> Any:
    return None if standing is None else standing[1].get("done")


def _work(cells: Sequence[Cell]) -> float:
    return sum(cell.work for cell in cells)


def _end(slot: _Slot, cell: Cell, history: list[Examined], store: Store, environment: dict[str, Any]) -> dict[str, Any]:
    """Writes down how far the cell came; if it is over, its place is free."""
    over, lost = is_over(history, cell), is_diverged(history)
    outcome = {
        "status": "diverged" if lost else "finished" if over else "stopped",
        "scores": history[-1].scores,
        "best": {name: max(found.scores[name] for found in history) for name in cell.tests},
        "chosen": max(history, key=lambda found: found.scores[cell.judge]).scores,
        "surest": min(history, key=lambda found: found.losses.get(cell.judge, math.inf)).scores,
        "loss": None if lost else history[-1].loss,
        "epochs": history[-1].epoch,
        "steps": slot.trial.done,
        "seconds": round(history[-1].seconds, 3),
        "stacked": len(slot.trial.cells),
        "environment": environment,
    }
    store.write(cell, outcome)
    if over:
        store.forget(cell)
        slot.open.pop(cell).release()
    return outcome


def _solves(cell: Cell, outcome: dict[str, Any]) -> bool:
    limit = cell.recipe.stop_above
    return limit is not None and outcome["status"] == "finished" and outcome["scores"]["test"] > limit


def _count(slot: _Slot, progress: Progress) -> None:
    """Adds to the work done what the slot has handed to the device since the last time."""
    recipe, length = slot.trial.recipe, slot.trial.cell.train.length
    counted = slot.work - slot.cells_work * (1 - slot.trial.done / recipe.steps)
    steps = round((counted - slot.counted) / slot.cells_work * recipe.steps)
    progress.tokens += steps * recipe.batch_size * length * len(slot.trial.cells)
    progress.work_done += counted - slot.counted
    slot.counted = counted
