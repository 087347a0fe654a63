"""Runs so small that a step takes milliseconds: a model of one block on a page of text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from deltanet.layers import DeltaNetConfig
from deltanet.models import ModelConfig
from deltanet.training import DataConfig, Evaluation, Header, Result, RunConfig, Step, TrainConfig

settings.register_profile("training", deadline=None, derandomize=True)
settings.load_profile("training")


class Listener:
    """A reporter that keeps what it hears, and may do something after a step."""

    def __init__(self, after_step=lambda step: None) -> None:
        self.after_step = after_step
        self.headers: list[Header] = []
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.samples: list[str] = []
        self.messages: list[str] = []
        self.results: list[Result] = []

    def header(self, header: Header) -> None:
        self.headers.append(header)

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.after_step(step.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def sample(self, text: str) -> None:
        self.samples.append(text)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def end(self, result: Result) -> None:
        self.results.append(result)

    @property
    def losses(self) -> dict[int, float]:
        return {step.step: step.loss for step in self.steps}


@pytest.fixture
def listen() -> type[Listener]:
    return Listener


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {number} says that {number} is {number * number % 97}.\n" for number in range(200)))
    return path


@pytest.fixture
def config(text: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=257, d_model=16, depth=1, layers=(DeltaNetConfig(heads=1),), feed_forward=32),
        data=DataConfig(source=str(text), context=16),
        train=TrainConfig(
            steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=4, evaluate_every=5, evaluate_tokens=64,
            sample_tokens=5, save_every=4,
        ),
    )  # fmt: skip


@pytest.fixture
def change():
    """A config with some fields of its training part changed."""
    return lambda config, **fields: replace(config, train=replace(config.train, **fields))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
