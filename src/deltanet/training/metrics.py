"""What a run tells: to the one who watches (`Reporter`), and to its folder (metrics.jsonl, status.json)."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Header:
    """What there is to know before the first step."""

    out: Path  # the run folder
    device: str  # "cpu, 2 threads" or the GPU's name
    precision: str  # of the matrix products: "float32" or "bfloat16"
    backend: str  # who runs the delta rule: "reference"
    backend_reason: str  # why, one line per family
    parameters: int
    data: str  # the corpus: name and where it comes from
    licence: str
    split: str  # a sentence: what is held out for validation
    train_tokens: int  # of the text
    validation_bytes: int
    tokens_per_step: int
    steps: int | None  # in all; None: planned from the minutes once the speed is known
    resumed_step: int  # 0 for a new run
    flops_per_token: int
    state_bytes: int  # of one sequence in generation


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step. The rate and the times are the only numbers that another machine would have different."""

    step: int  # counted from 1
    steps: int | None
    tokens: int  # trained on since the beginning
    loss: float  # nats per token of this batch
    bits_per_byte: float  # the same loss per byte of text
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float  # of training since the beginning, over all calls
    tokens_per_second: float  # lately
    seconds_left: float | None  # until the end or the time limit, None where not known yet
    memory_bytes: int  # the most that was in use: of the GPU, or of the process


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation bits per byte after a step."""

    step: int
    tokens: int
    bits_per_byte: float
    bytes: int  # how much text was read
    whole: bool  # the whole validation text, or its beginning
    seconds: float  # that it took


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `train` ended."""

    status: str  # "finished": all steps done; "interrupted": by a signal; "time": the minutes are over
    out: Path
    step: int
    steps: int | None
    tokens: int
    seconds: float  # of training since the beginning, over all calls
    bits_per_byte: float | None  # of the whole validation text, where it was evaluated
    checkpoint: Path
    skipped: int  # batches left out because their loss or gradient was not finite

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "out": str(self.out), "checkpoint": str(self.checkpoint)}


class Reporter(Protocol):
    """Who watches a run. The trainer calls these in order and waits for each; it prints nothing itself."""

    def header(self, header: Header) -> None:
        """Once, before the first step."""

    def step(self, step: Step) -> None:
        """After every optimizer step."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """After every evaluation."""

    def sample(self, text: str) -> None:
        """A sample of the model's text, after an evaluation."""

    def message(self, text: str) -> None:
        """One line worth reading: resumed, saved, warned."""

    def end(self, result: Result) -> None:
        """Once, unless an exception ends the run."""


class Silent:
    """A reporter that says nothing."""

    def header(self, header: Header) -> None: ...

    def step(self, step: Step) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def sample(self, text: str) -> None: ...

    def message(self, text: str) -> None: ...

    def end(self, result: Result) -> None: ...


class Metrics:
    """metrics.jsonl of a run: one JSON object a line, its kind under "event", written through at once.

    Opening it for a run that goes on after `resumed_step` drops what a lost part of the run had written beyond, and a
    line that was cut off, so no curve is drawn twice.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= resumed_step] if resumed_step else []
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """`values` must have a `step`."""
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a last line that was cut off is left out."""
    return _lines(run / "metrics.jsonl")


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` such that a reader, or a crash, sees the old or the new text and nothing between."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
