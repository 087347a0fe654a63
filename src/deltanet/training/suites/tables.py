"""The table of a suite: for each entry the best learning rate's score, the paper's number, and their difference."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltanet.training.suites.suite import Suite

Curve = list[tuple[float, float]]

__all__ = ["Row", "curves", "markdown", "rows_of"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An entry of the table. Scores are in percent."""

    task: str
    model: str
    width: int
    ours: float  # mean over the seeds, at the learning rate, decay and epochs that do best
    spread: float | None  # largest less smallest over the seeds; None with one
    paper: float | None
    learning_rate: float
    weight_decay: float
    seeds: int
    rates: int  # how many combinations of learning rate, decay and epochs were tried to the end
    epochs: int  # until that rate was done
    seconds: float  # of all cells together, which may have run side by side
    others: dict[str, float]  # the cell's further tests, in percent
    reduced: str  # in what it falls short of the protocol; empty where in nothing

    @property
    def difference(self) -> float | None:
        return None if self.paper is None else self.ours - self.paper


def rows_of(suite: "Suite", outcomes: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each entry that has an outcome, in the order of the suite's tasks and of widths."""
    entries: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        cell = outcome["cell"]
        entries.setdefault((cell["task"], cell["model"], cell["config"]["d_model"]), []).append(outcome)
    known = suite.tasks()
    order = sorted(entries, key=lambda e: (known.index(e[0]) if e[0] in known else len(known), e[0], e[1], e[2]))
    return [_row(suite, *entry, entries[entry]) for entry in order]


def _row(suite: "Suite", task: str, model: str, width: int, outcomes: list[dict[str, Any]]) -> Row:
    by_rate: dict[tuple[float, float, int], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        by_rate.setdefault(_setting(outcome), []).append(outcome)
    # Rates are compared on as many seeds each: the most that any of them has.
    most = max(map(len, by_rate.values()))
    full = {rate: found for rate, found in by_rate.items() if len(found) == most}
    best = max(full, key=lambda rate: _mean(outcome[suite.counts][suite.rates] for outcome in full[rate]))
    chosen = full[best]
    scores = [100 * outcome[suite.counts]["test"] for outcome in chosen]
    names = [name for name in chosen[0][suite.counts] if name != "test"]
    return Row(
        task=task,
        model=model,
        width=width,
        ours=_mean(scores),
        spread=max(scores) - min(scores) if len(scores) > 1 else None,
        paper=suite.paper(task, model, width),
        learning_rate=best[0],
        weight_decay=best[1],
        seeds=len(chosen),
        rates=sum(any(outcome["status"] != "stopped" for outcome in found) for found in by_rate.values()),
        epochs=max(outcome["epochs"] for outcome in chosen),
        seconds=sum(outcome["seconds"] for outcome in outcomes),
        others={name: 100 * _mean(outcome[suite.counts][name] for outcome in chosen) for name in names},
        reduced=_reduced(suite, outcomes, chosen),
    )


def _reduced(suite: "Suite", outcomes: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]]) -> str:
    """What of the protocol was not done: rates, epochs, examples."""
    full, cell = suite.grid(quick=False), chosen[0]["cell"]
    if cell["task"] not in suite.tasks():
        return "a task of its own"
    notes = []
    tried = {_setting(outcome) for outcome in outcomes if outcome["status"] != "stopped"}
    lengths = full.epochs or (cell["recipe"]["epochs"],)
    asked = [*product(suite.learning_rates(full, cell["task"], cell["model"]), full.weight_decays, lengths)]
    if missing := sum(setting not in tried for setting in asked):
        notes.append(f"{len(asked) - missing} of {len(asked)} {'rates and epochs' if full.epochs else 'rates'}")
    standard = suite.cell(
        replace(full, epochs=None),
        cell["task"],
        cell["model"],
        cell["config"]["d_model"],
        cell["learning_rate"],
        cell["weight_decay"],
        0,
    )
    for name in ("epochs", "train_examples", "batch_size"):
        mine, yours = cell["recipe"][name], getattr(standard.recipe, name)
        if mine != yours and not (name == "epochs" and full.epochs):
            notes.append(f"{mine:,} of {yours:,} {name.replace('_', ' ')}")
    if patience := cell["recipe"].get("patience"):
        notes.append(f"ended after {patience} epochs without a better one")
    ours, theirs = cell["config"], asdict(standard.config)
    for what, mine, yours in (
        ("layers", ours["depth"], theirs["depth"]),
        ("heads", ours["mixer"].get("heads"), theirs["mixer"].get("heads")),
        ("for a feed-forward layer", ours["feed_forward"], theirs["feed_forward"]),
    ):
        if mine != yours:
            notes.append(f"{mine} {what}, not {yours}")
    if ours["init"] != theirs["init"]:
        notes.append("another beginning of the matrices")
    if any(outcome["status"] == "stopped" for outcome in chosen):
        notes.append(f"stopped after epoch {chosen[0]['epochs']}")
    return ", ".join(notes)


def _setting(outcome: dict[str, Any]) -> tuple[float, float, int]:
    """Learning rate, decay and epochs of an outcome's cell: what the best is chosen of."""
    cell = outcome["cell"]
    return cell["learning_rate"], cell["weight_decay"], cell["recipe"]["epochs"]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def markdown(suite: "Suite", rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [
        "| task | model | width | ours | paper | difference | rate | decay | seeds | epochs | short of the protocol |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if row.spread is None else f" (spread {row.spread:.1f})"
        paper = "" if row.paper is None else f"{row.paper:.1f}"
        difference = "" if row.difference is None else f"{row.difference:+.1f}"
        lines.append(
            f"| {row.task} | {row.model} | {row.width} | {row.ours:.1f}{spread} | {paper} | {difference} "
            f"| {row.learning_rate:.3g} | {row.weight_decay:g} | {row.seeds} | {row.epochs} | {row.reduced} |"
        )
    return "\n".join([*lines, *suite.summary(rows)]) + "\n"


def curves(rows: Iterable[Row], x: Callable[[Row], float]) -> dict[str, Curve]:
    """Our scores by model, as points (x, percent) in order."""
    found: dict[str, Curve] = {}
    for row in sorted(rows, key=x):
        found.setdefault(row.model, []).append((x(row), row.ours))
    return found
