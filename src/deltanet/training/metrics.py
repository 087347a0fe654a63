"""What a run leaves to read: metrics.jsonl, samples, status.json; each is also told to the reporter."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from deltanet.training.report import Evaluation, Reporter, Result, Step
from deltanet.training.run_folder import RunFolder, replace_text


class Journal:
    """Writes down what happens in a run and hands it on to the reporter. Leaving it by an exception notes that too."""

    def __init__(self, run: RunFolder, reporter: Reporter, resumed_step: int) -> None:
        self._run = run
        self._reporter = reporter
        self._metrics = Metrics(run.metrics, resumed_step)
        run.write_status("running", step=resumed_step)

    def step(self, step: Step) -> None:
        self._metrics.write("step", asdict(step))
        self._reporter.step(step)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._metrics.write("evaluation", asdict(evaluation))
        self._reporter.evaluation(evaluation)

    def sample(self, step: int, text: str) -> None:
        with unless_full():
            self._run.samples.mkdir(exist_ok=True)
            replace_text(self._run.samples / f"step-{step:08d}.txt", text)
        self._reporter.sample(text)

    def message(self, step: int, text: str) -> None:
        self._metrics.write("message", {"step": step, "text": text})
        self._reporter.message(text)

    def saved(self, step: int, path: Path) -> None:
        with unless_full():
            self._run.write_status("running", step=step, checkpoint=str(path))

    def nonfinite(self, step: int, loss: float, grad_norm: float, samples: list[int]) -> Path:
        """Notes which windows gave a loss or gradient that is not finite, and returns where."""
        values = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples}
        path = self._run.path / f"nonfinite-{step:08d}.json"
        with unless_full():
            replace_text(path, json.dumps(values) + "\n")
        self._metrics.write("nonfinite", values)
        return path

    def end(self, result: Result) -> None:
        self._run.write_status(**result.record())
        self._reporter.end(result)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        if error is not None:
            with unless_full():
                self._run.write_status("failed", error=str(error) or type(error).__name__)


class Metrics:
    """metrics.jsonl of a run: one JSON object a line, its kind under "event", written through at once.

    Opening it for a run that goes on after `resumed_step` drops what a lost part of the run had written beyond, and a
    line that was cut off, so no curve is drawn twice.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= resumed_step] if resumed_step else []
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""  # lines that a full disk has not taken yet

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """`values` must hold a "step" and nothing that is not finite."""
        self._unwritten += json.dumps({"event": event, **values}, allow_nan=False).encode() + b"\n"
        with unless_full():
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        self._file.close()


@contextmanager
def unless_full() -> Iterator[None]:
    """Passes over what a full disk does not take: the record of a run can wait, and its training need not."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a last line that was cut off is left out."""
    return _lines(run / "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
