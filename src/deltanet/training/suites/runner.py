"""Works through the cells of a grid, several side by side where the device has room, and writes each down when it is done."""

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
from deltanet.training.suites.store import Claim, Store
from deltanet.training.suites.trial import Examined, Prepared, Trial, prepare

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
    cell: Cell
    trial: Trial
    run: Iterator[Examined | None]
    claim: Claim
    work: float  # what is left of the cell's for this call
    counted: float = 0.0
    kept: float = field(default_factory=time.monotonic)


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
    backend: str = "auto",
    minutes: float | None = None,
    until_solved: bool = False,
    compile: bool = False,
    environment: dict[str, Any],
    watcher: Watcher,
) -> str:
    """Trains the cells that are not done yet, in their order, `together` at a time. One that raises an error is left, and the others go on.

    Args:
        minutes: stop after so long; cells under way are then written down as stopped, and the next call goes on with them.
        until_solved: leave out an entry's other rates once one is above the recipe's `stop_above`.
        compile: whether the models' small operations are fused first, see `Trial`.
        environment: what is written down beside every outcome.

    Returns "finished"; "time" or "interrupted" where cells are left, "elsewhere" where other processes are at the last of them; "failed" where
    one raised an error, unless interrupted. An error of the device itself (torch.AcceleratorError) ends the run, for nothing works there after it.
    """
    outcomes = {cell: store.read(cell) for cell in cells}
    solved = {cell.entry for cell, outcome in outcomes.items() if outcome and _solves(cell, outcome)}
    waiting = deque(cell for cell, outcome in outcomes.items() if outcome is None or outcome["status"] == "stopped")
    progress = Progress(cells=len(waiting), work=sum(cell.work for cell in waiting))
    watcher.begin(progress, len(cells) - len(waiting))
    sets, slots, ending = Sets(device), list[_Slot](), "finished"

    def fail(cell: Cell, error: Exception, work: float, counted: float = 0.0) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise error
        progress.failed += 1
        progress.work -= work
        progress.work_done -= counted
        store.note({"cell": cell.name, "error": "".join(traceback.format_exception(error))})
        watcher.failed(cell, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", progress)

    with Interrupts() as interrupts:
        while (waiting or slots) and ending == "finished":
            while waiting and len(slots) < together:
                cell = waiting.popleft()
                if until_solved and cell.entry in solved:
                    progress.left_out += 1
                    progress.work -= cell.work
                    continue
                try:
                    slot = _begin(cell, store, sets, device, backend, compile)
                except Exception as error:
                    fail(cell, error, cell.work)
                    continue
                if slot is None:
                    progress.elsewhere += 1
                    progress.work -= cell.work
                else:
                    progress.work -= cell.work - slot.work
                    slots.append(slot)
            for slot in list(slots):
                try:
                    found = next(slot.run, slot)
                except Exception as error:
                    slots.remove(slot)
                    fail(slot.cell, error, slot.work, slot.counted)
                    slot.trial.close()
                    slot.claim.release()
                    continue
                _count(slot, progress)
                if found is slot:
                    slots.remove(slot)
                    outcome = _end(slot, store, "diverged" if slot.trial.is_diverged else "finished", environment)
                    progress.done += 1
                    progress.work_done += slot.work - slot.counted
                    if _solves(slot.cell, outcome):
                        solved.add(slot.cell.entry)
                    watcher.finished(slot.cell, outcome, progress)
                elif isinstance(found, Examined):
                    store.note({"cell": slot.cell.name, **found.record()})
                    watcher.examined(slot.cell, found, progress)
                    if time.monotonic() - slot.kept > KEEP_EVERY:
                        store.keep(slot.cell, *slot.trial.state())
                        slot.kept = time.monotonic()
            watcher.tick(progress)
            if until_solved:
                for slot in [slot for slot in slots if slot.cell.entry in solved]:
                    slots.remove(slot)
                    slot.trial.close()
                    slot.claim.release()
                    progress.left_out += 1
                    progress.work -= slot.work
                    progress.work_done -= slot.counted
            if interrupts.received:
                ending = "interrupted"
            elif minutes is not None and progress.seconds > 60 * minutes:
                ending = "time"
    for slot in slots:
        if slot.trial.done:
            store.keep(slot.cell, *slot.trial.state())
        if slot.trial.history:
            watcher.finished(slot.cell, _end(slot, store, "stopped", environment), progress)
        else:
            slot.trial.close()
            slot.claim.release()
    if progress.failed and ending != "interrupted":
        return "failed"
    if not (waiting or slots):
        return "elsewhere" if progress.elsewhere else "finished"
    return ending


def _begin(cell: Cell, store: Store, sets: Sets, device: torch.device, backend: str, compile: bool) -> _Slot | None:
    """`cell` under way; None where another process is at it, or was before us."""
    claim = store.claim(cell)
    if claim is None:
        return None
    outcome = store.read(cell)
    if outcome is not None and outcome["status"] != "stopped":
        claim.release()
        return None
    try:
        train = sets.get(cell.train, cell.recipe.train_examples, cell.seed, "train")
        tests = {name: sets.get(test.task, test.examples, cell.seed, test.split) for name, test in cell.tests.items()}
        trial = Trial(cell, train, tests, device=device, backend=backend, compile=compile)
        if (standing := store.standing(cell)) is not None:
            try:
                trial.restore(*standing)
            except ValueError as error:
                raise ValueError(f"where {cell.name} stands is not told right, {error}: --overwrite begins it anew") from None
    except BaseException:
        claim.release()
        raise
    return _Slot(cell, trial, trial.run(), claim, cell.work * (1 - trial.done / cell.recipe.steps))


def _end(slot: _Slot, store: Store, status: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Writes the outcome down and gives the cell's place free."""
    history = slot.trial.history
    outcome = {
        "status": status,
        "scores": history[-1].scores,
        "best": {name: max(found.scores[name] for found in history) for name in slot.cell.tests},
        "chosen": max(history, key=lambda found: found.scores[slot.cell.judge]).scores,
        "loss": None if slot.trial.is_diverged else history[-1].loss,
        "epochs": history[-1].epoch,
        "steps": slot.trial.done,
        "seconds": round(history[-1].seconds, 3),
        "environment": environment,
    }
    store.write(slot.cell, outcome)
    if status != "stopped":
        store.forget(slot.cell)
    slot.trial.close()
    slot.claim.release()
    return outcome


def _solves(cell: Cell, outcome: dict[str, Any]) -> bool:
    limit = cell.recipe.stop_above
    return limit is not None and outcome["status"] == "finished" and outcome["scores"]["test"] > limit


def _count(slot: _Slot, progress: Progress) -> None:
    """Adds to the work done what the slot has handed to the device since the last time."""
    cell = slot.cell
    counted = slot.work - cell.work * (1 - slot.trial.done / cell.recipe.steps)
    progress.tokens += round((counted - slot.counted) / cell.work * cell.recipe.steps) * cell.recipe.batch_size * cell.train.length
    progress.work_done += counted - slot.counted
    slot.counted = counted
