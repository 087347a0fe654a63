"""The training of one cell. Nothing in it waits for the device except the reading of a score, so that several can run side by side.

On a GPU the whole step (batch, forward, backward, AdamW, learning rate) is one CUDA graph: such a model is a few hundred small kernels a
step, and launching them one by one takes longer than they run. The graph finds its batch and its learning rate by counters on the device,
so a step is a replay and nothing else. On a CPU the same step is run as it stands.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.data.synthetic import IGNORED, Examples, Task
from deltanet.training.suites.cell import Cell
from deltanet.training.suites.model import SuiteModel

__all__ = ["Examined", "Prepared", "Trial", "prepare"]

EAGER_STEPS = 3  # before a graph is captured: kernels are compiled, and the optimizer makes its tensors
BURST = 25  # steps handed to the device at a time, so that trials side by side have their turns
LOGITS = 2**26  # most logits of one piece of an evaluation
PIECE = 2**17  # most tokens of one
MEANS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight's gradients
MANY_IDS = 1024  # from so many on a softmax costs enough to be fused


@dataclass(frozen=True)
class Prepared:
    """Examples as a trial reads them, on its device."""

    inputs: Tensor  # int32 [N, T]
    places: (
        Tensor | None
    )  # int64 [N, K] where the targets are, if all examples have K and that is less than half; None: anywhere
    labels: Tensor  # int64 [N, K] the targets there, or all [N, T]
    examples: Examples | None  # as they were made, for a score
    common: int | None = None  # the token at more than a quarter of all places, on a GPU, where that matters (`SuiteModel.embedded`)


def prepare(task: Task, count: int, *, seed: int, split: str, device: torch.device) -> Prepared:
    """Makes examples and finds the places that count: where they are few, the head need not be computed elsewhere."""
    examples = task.sample(count, seed=seed, split=split, device=device)  # type: ignore[arg-type]
    inputs, targets = examples.inputs.int(), examples.targets
    common = _common(inputs) if device.type == "cuda" else None
    asked = targets != IGNORED
    counts = asked.sum(1)
    most = int(counts.max())
    kept = examples if split != "train" else None
    if int(counts.min()) != most or 2 * most > targets.shape[1]:
        return Prepared(inputs, None, targets, kept, common)
    places = asked.nonzero()[:, 1].view(-1, most)
    return Prepared(inputs, places, targets.gather(1, places), kept, common)


def _common(inputs: Tensor) -> int | None:
    """The token at more than a quarter of all places, if there is one."""
    counts = torch.bincount(inputs.flatten())
    share, token = counts.max(0)
    return int(token) if 4 * int(share) > inputs.numel() else None


@dataclass(frozen=True)
class Examined:
    """How a trial stands after an epoch."""

    epoch: int
    loss: float  # mean over the steps since the last evaluation, in nats
    scores: dict[str, float]  # of each of the cell's tests, 0 to 1
    seconds: float  # since the trial began
    losses: dict[str, float] = field(default_factory=dict)  # on each test, mean over what is asked, in nats

    def record(self) -> dict[str, Any]:
        """As plain JSON, which has no number for a loss that is none."""
        losses = {name: None if math.isnan(loss) else loss for name, loss in self.losses.items()}
        return {**asdict(self), "loss": None if math.isnan(self.loss) else self.loss, "losses": losses}


class Answers(NamedTuple):
    """What a model, or each of G, says in a test."""

    tokens: Tensor  # int64 [N, T] or [G, N, T] the likeliest; where nothing is asked, IGNORED or whatever it says
    loss: Tensor  # fp32 [] or [G] mean cross-entropy over what is asked, in nats


class Trial:
    """The training of `cell`: `run()` hands out work to the device and yields whenever others may have their turn."""

    def __init__(
        self,
        cell: Cell,
        train: Prepared,
        tests: dict[str, Prepared],
        *,
        others: Sequence[Cell] = (),
        device: torch.device,
        backend: str = "auto",
        graph: bool | None = None,
        compile: bool = False,
    ) -> None:
        """`tests` are the examples of the cell's tests by their names; `others` those of a `Group`; `graph` is whether steps are replayed,
        on a GPU if not given; `compile` is whether the model's small operations are fused, which takes some seconds for each model and shape.
        """
        self.cell, self.recipe, self.device = cell, cell.recipe, device
        self.cells = (cell, *others)
        self.histories: list[list[Examined]] = [[] for _ in self.cells]
        self.train, self.tests = train, tests
        self.uses_graph = device.type == "cuda" if graph is None else graph
        self.compiles = compile
        if compile:  # each model and shape is one more compilation of the same function, up to this many
            torch._dynamo.config.recompile_limit = 1024
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.model = self._make_model(backend)
        with self._on_stream():
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(device))
            self.model.to(device)
            self.generator = torch.Generator(device).manual_seed(cell.seed + 1)
            self.rates = self._make_rates()
            self.rate = self.rates[0].clone()
            self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the step in its epoch
            self.step = torch.zeros(1, dtype=torch.int64, device=device)  # in all
            self.order = torch.arange(len(train.inputs), device=device)
            self.rows = torch.arange(self.recipe.batch_size, device=device)
            self.loss = torch.zeros_like(self.rate)
        groups = self._make_groups()
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, self.recipe.beta2), fused=True, capturable=device.type == "cuda"
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.evaluations: dict[str, tuple[torch.cuda.CUDAGraph, Answers]] = {}  # by test: its replay, and where that puts answers
        self.eager = 0  # steps that were no replay
        self.predicted: set[str] = set()  # tests for which all kernels are compiled
        self.done = 0  # steps
        self.began = time.monotonic()

    def _make_model(self, backend: str) -> SuiteModel:
        return begun(self.cell, backend)

    def _make_rates(self) -> Tensor:
        """The rate of every step."""
        return torch.tensor(self.recipe.learning_rates(self.cell.learning_rate), device=self.device)

    def _make_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters, one for each cell."""
        return [{"params": list(self.model.parameters()), "lr": self.rate, "weight_decay": self.cell.weight_decay}]

    @property
    def history(self) -> list[Examined]:
        """What the evaluations found."""
        return self.histories[0]

    def run(self) -> Iterator[Any]:
        """Trains on; yields None after each burst of steps and while a score is awaited, and what an evaluation found."""
        per_epoch, epochs = self.recipe.steps_per_epoch, self.recipe.epochs
        while True:
            epoch, first = divmod(self.done, per_epoch)
            last = max(history[-1].epoch if history else 0 for history in self.histories)
            if first == 0 and epoch > last and (epoch % self.recipe.evaluate_every == 0 or epoch == epochs):
                answers = {name: self._predict(name) for name in self.tests}
                ready = self._mark()
                while ready is not None and not ready.query():
                    yield None
                loss, scores = self._take_loss((epoch - last) * per_epoch), self._scores(answers)
                yield self._examine(epoch, loss, scores, {name: said.loss.tolist() for name, said in answers.items()})
                if all(is_over(history, self.cell) for history in self.histories):
                    return
            if epoch == epochs:
                return
            if first == 0:
                self._begin_epoch()
            for step in range(first, per_epoch, BURST):
                self._steps(min(BURST, per_epoch - step))
                yield None

    def _examine(self, epoch: int, loss: Any, scores: dict[str, Any], losses: dict[str, Any]) -> Any:
        """Writes down what an evaluation found."""
        self.history.append(Examined(epoch, loss, scores, time.monotonic() - self.began, losses))
        return self.history[-1]

    def state(self, g: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the training of cell `g` stands: tensors on the host, and plain JSON. To be asked for between two turns of `run`."""
        with self._on_stream():
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors(g).items()}
        tensors["generator"] = self.generator.get_state()
        history = [asdict(found) for found in self.histories[g]]
        return tensors, {"done": self.done, "seconds": time.monotonic() - self.began, "history": history}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any], g: int = 0) -> None:
        """Goes on from what `state` of a trial of the same cell gave, to the same bits. For a trial that has not begun.

        Raises ValueError, which names what differs, for the state of another one; then nothing has changed.
        """
        done, seconds = values.get("done"), values.get("seconds")
        if not isinstance(done, int) or not 0 < done <= self.recipe.steps or not isinstance(seconds, float | int):
            raise ValueError(f"done must be between 1 and {self.recipe.steps} steps, got {done!r} after {seconds!r} seconds")
        try:
            history = [Examined(**found) for found in values["history"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"history must be evaluations, got {error!r}") from None
        mine = self._tensors(g)
        wanted = {name: (list(x.shape), x.dtype) for name, x in mine.items()}
        found = {name: (list(x.shape), x.dtype) for name, x in tensors.items() if name != "generator"}
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{name} must be {wanted.get(name)}, got {found.get(name)}")
        try:
            self.generator.set_state(tensors["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"generator must be the state of one on {self.device}, got {error}") from None
        with self._on_stream(), torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
            self.at.fill_(done % self.recipe.steps_per_epoch)
            self.step.fill_(done)
            for state in self.optimizer.state.values():
                state["step"].fill_(done)
        self.done, self.histories[g], self.began = done, history, time.monotonic() - seconds

    def _tensors(self, g: int) -> dict[str, Tensor]:
        """What changes of cell `g` with a step and no counter tells, by name; AdamW's means are made if they are not there yet."""
        found = {"loss": self.loss.view(-1)[g], **({"order": self.order} if self.recipe.shuffle else {})}
        names = [name for name, _ in self.model.named_parameters()]
        for name, weight in zip(names, self.optimizer.param_groups[g]["params"], strict=True):
            means = self.optimizer.state[weight]
            if not means:  # as torch.optim.AdamW begins them
                means["step"] = torch.zeros((), device=weight.device)
                means.update({mean: torch.zeros_like(weight, memory_format=torch.preserve_format) for mean in MEANS})
            found |= {f"weights.{name}": weight, **{f"{mean}.{name}": means[mean] for mean in MEANS}}
        return found

    def close(self) -> None:
        """Gives the memory of the graphs back."""
        if self.stream is not None:
            self.stream.synchronize()
        if self.graph is not None:
            self.graph.reset()
            self.graph = None
        for graph, _ in self.evaluations.values():
            graph.reset()
        self.evaluations.clear()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _mark(self) -> Any:
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def _take_loss(self, steps: int) -> Any:
        with self._on_stream():
            loss = (self.loss.double() / steps).tolist()
            self.loss.zero_()
        return loss

    def _scores(self, answers: dict[str, Answers]) -> dict[str, Any]:
        with self._on_stream():
            return {
                name: self.cell.tests[name].task.score(said.tokens, cast(Examples, self.tests[name].examples)).tolist()
                for name, said in answers.items()
            }

    def _begin_epoch(self) -> None:
        with self._on_stream():
            self.at.zero_()
            if self.recipe.shuffle:
                self.order.copy_(torch.randperm(len(self.order), device=self.device, generator=self.generator))

    def _steps(self, count: int) -> None:
        with self._on_stream():
            for _ in range(count):
                if self.graph is not None:
                    self.graph.replay()
                elif self.uses_graph and self.eager >= EAGER_STEPS:
                    self._capture()
                    assert self.graph is not None
                    self.graph.replay()
                else:
                    self._step()
                    self.eager += 1
                self.done += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        self.graph = graph

    def _step(self) -> None:
        """One update. Reads and moves the counters on the device; no number of it is seen by the host."""
        rows = self.order.index_select(0, self.rows + self.at * self.recipe.batch_size)
        self.rate.copy_(self.rates.index_select(0, self.step).squeeze(0))
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(rows)
        self._backward(loss)
        if self.recipe.max_grad_norm is not None:
            for group in self.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], self.recipe.max_grad_norm)
        self.optimizer.step()
        self.loss += loss.detach()
        self.at += 1
        self.step += 1

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _loss(self, rows: Tensor) -> Tensor:
        tokens, labels, places = self._batch(rows)
        compiles_loss = self.compiles and self.model.config.vocab_size >= MANY_IDS
        return (compiled(_loss) if compiles_loss else _loss)(self.model, self._body(tokens), labels, places)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, labels and their places of these examples."""
        tokens, labels = (x.index_select(0, rows) for x in (self.train.inputs, self.train.labels))
        return tokens, labels, None if self.train.places is None else self.train.places.index_select(0, rows)

    def _body(self, tokens: Tensor) -> Tensor:
        """What the blocks make of the tokens of a training step.

        Embeddings are looked up outside what is compiled: the compiler would add their gradients up by atomics, in another order and so to other
        bits each time. Blocks are compiled one by one: all of a model's are alike, and so are those of tasks that differ in their ids or in what
        is asked.
        """
        kept = self.model.kept(tokens, self.generator)
        return self.model.body(self.model.embedded(tokens, self.train.common), kept, compiled(_block) if self.compiles else None)

    def _predict(self, name: str) -> Answers:
        """What the model says in that test.

        On a GPU the second call makes a graph of it, which later ones replay: as one kernel after the other it keeps the host, and so all trials,
        busy for 40 ms. The first, after which many are done, compiles what kernels it takes.
        """
        if name in self.evaluations:
            with self._on_stream():
                graph, out = self.evaluations[name]
                graph.replay()
            return out
        if self.graph is None or name not in self.predicted:
            self.predicted.add(name)
            return self._predict_now(self.tests[name])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            out = self._predict_now(self.tests[name])
        self.evaluations[name] = graph, out
        return self._predict(name)

    @torch.no_grad()
    def _predict_now(self, prepared: Prepared) -> Answers:
        inputs, places, models = prepared.inputs, prepared.places, self.loss.shape
        asked = inputs.shape[1] if places is None else places.shape[1]
        piece = min(PIECE // inputs.shape[1], LOGITS // (asked * self.model.config.vocab_size)) // self.loss.numel()
        with self._on_stream(), self._autocast():
            tokens = torch.full((*models, *inputs.shape), IGNORED, dtype=torch.int64, device=inputs.device)
            loss = torch.zeros_like(self.loss)
            for first in range(0, len(inputs), max(1, piece)):
                part = slice(first, first + max(1, piece))
                at = None if places is None else places[part]
                logits = self._logits(inputs[part], at)
                loss += self._cross_entropies(logits, prepared.labels[part])
                found = logits.argmax(-1)
                found = found if at is None else tokens[..., part, :].scatter(-1, at.expand_as(found), found)
                tokens[..., part, :] = found
        return Answers(tokens, loss / (prepared.labels != IGNORED).sum())

    def _logits(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        """`[B, T, V]`, or `[B, K, V]` at the places alone, of each model if there are several."""
        return self.model.logits(self.model.body(self.model.embeddings(tokens)), places)

    def _cross_entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Their sum over what is asked, of each model if there are several."""
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def begun(cell: Cell, backend: str = "auto") -> SuiteModel:
    """The model of the cell as its training begins."""
    model = SuiteModel(cell.config, backend=backend)
    model.init_weights(torch.Generator().manual_seed(cell.seed))
    return model


def is_diverged(history: Sequence[Examined]) -> bool:
    """Whether the loss is no number any more."""
    return bool(history) and math.isnan(history[-1].loss)


def is_over(history: Sequence[Examined], cell: Cell) -> bool:
    """Whether the recipe asks for no more: all epochs are done, the loss is lost, the test solved, or its score was better than now for too long."""
    if not history:
        return False
    judged, last, recipe = [found.scores[cell.judge] for found in history], history[-1], cell.recipe
    since = last.epoch - history[judged.index(max(judged))].epoch
    solved = recipe.stop_above is not None and last.scores["test"] > recipe.stop_above
    lasting = recipe.patience is not None and since >= recipe.patience
    return last.epoch == recipe.epochs or is_diverged(history) or solved or lasting


def _block(block: nn.Module, x: Tensor, kept: Tensor | None) -> Tensor:
    return block(x, kept)


def _loss(model: SuiteModel, x: Tensor, labels: Tensor, places: Tensor | None) -> Tensor:
    """Mean cross-entropy in nats over the labels that are asked for, of what the blocks gave, x `[B, T, d_model]`."""
    logits = model.logits(x, places)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, traced when it is first called for a model's shapes; made on demand, since the compiler brings Triton with it.

    Not as one graph: fla's operations (GLA, RetNet) forbid to be traced and are called between what is compiled.
    The softmax goes over its rows twice: 0.07 ms for 8192 x 8192 (H200); once over them took 0.6, though with another job on the GPU.
    """
    return torch.compile(function, dynamic=False, options={"online_softmax": False})
