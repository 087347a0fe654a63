"""All that a run works with, from the seed or from its checkpoint: text, model, optimizer, and where it stands."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from deltanet.data import (
    Batch,
    ByteTokenizer,
    SequentialWindows,
    ShuffledWindows,
    Tokenizer,
    prepare,
)
from deltanet.evaluation import evaluate
from deltanet.inference import Sampling, generate
from deltanet.models import LanguageModel
from deltanet.training.checkpoint import Progress, retain, save_checkpoint, weights_of
from deltanet.training.clock import Clock
from deltanet.training.config import RunConfig
from deltanet.training.device import (
    autocast,
    check_memory,
    choose_device,
    device_name,
    explain_backend,
    explain_paths,
    precision,
)
from deltanet.training.optimizer import build_optimizer, optimizer_tensors
from deltanet.training.report import Evaluation, Header, Reporter
from deltanet.training.resume import check_text, find_checkpoint, restore, surroundings, text_hashes
from deltanet.training.run_folder import RunFolder

SAMPLING = Sampling(temperature=0.8, seed=0)  # the same draws every time, so that samples differ by the model alone


class Session:
    """Everything that is ready before the first step. Raises for what cannot be trained, before any compute."""

    def __init__(self, config: RunConfig, run: RunFolder, reporter: Reporter) -> None:
        self.config, self.run = config, run
        self.device = choose_device(config.train.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        check_memory(config, self.device)
        checkpoint = find_checkpoint(run, config, reporter)
        self.clock = Clock(0.0 if checkpoint is None else checkpoint.progress.seconds, config.train.minutes)

        # The text.
        self.tokenizer = ByteTokenizer()
        check_vocabulary(config, self.tokenizer)
        self.corpus = config.data.corpus()
        shards = None if config.data.shards is None else Path(config.data.shards)
        self.streams = prepare(self.corpus, self.tokenizer, shards)
        context, batch_size, seed = config.data.context, config.train.batch_size, config.train.seed
        self.windows = ShuffledWindows(self.streams.train, context, batch_size=batch_size, seed=seed)
        self.validation = SequentialWindows(self.streams.validation, context)

        # The model and its optimizer.
        torch.manual_seed(seed)
        self.model = LanguageModel(config.model, backend=config.train.backend, memory=config.train.memory)
        self.model.init_weights(torch.Generator().manual_seed(seed))
        self.model.check_room(config.train.sample_tokens)
        self.model.recompute = config.train.recompute
        self.model.to(self.device)
        if config.train.compile:
            self.model.compile_blocks()
        self.optimizer = build_optimizer(self.model, config.train)
        self.autocast = autocast(config, self.device)

        # Where the run stands.
        self.progress = Progress()
        self.prepared: tuple[int, list[Batch]] = (-1, [])  # the windows of a step to come, and their position
        self.saved: Path | None = None  # the newest checkpoint
        self.validated: Evaluation | None = None  # the last evaluation
        if checkpoint is not None:
            check_text(checkpoint, self.tokenizer, self.streams)
            self.progress = restore(checkpoint, self.model, self.optimizer)
            self.saved = checkpoint.path
        if config.steps is not None:
            self.progress.steps = config.steps

    def next_batches(self) -> list[Batch]:
        """The windows of the next step, as many at a time as one forward pass takes."""
        position, batches = self.prepared
        return batches if position == self.progress.position else self._batches_at(self.progress.position)

    def prepare_next(self) -> None:
        """Puts the windows of the step after the next one on the device ahead of time."""
        position = self.progress.position + self.config.train.batch_size
        self.prepared = position, self._batches_at(position)

    def _batches_at(self, position: int) -> list[Batch]:
        size, at_once = self.config.train.batch_size, self.rows_at_once
        cuts = range(0, size, at_once)
        batches = [self.windows.batch_at(position + cut, min(at_once, size - cut)) for cut in cuts]
        if self.config.train.compile:  # one way to cut them, so that it is compiled once
            batches = [batch.packed() for batch in batches]
        return [batch.to(self.device) for batch in batches]

    def evaluate(self, max_tokens: int | None) -> Evaluation:
        """Bits per byte of the validation text, the whole of it or windows spread over it."""
        begun = time.monotonic()
        with self.autocast:
            score = evaluate(self.model, self.validation, batch_size=self.rows_at_once, max_tokens=max_tokens)
        self.validated = Evaluation(
            step=self.progress.step,
            tokens=self.progress.tokens,
            loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            bytes=int(score.bytes.sum()),
            whole=max_tokens is None,
            seconds=time.monotonic() - begun,
        )
        return self.validated

    def sample(self) -> str:
        """The beginning of a document as the model would write it."""
        start, length = [self.tokenizer.separator], self.config.train.sample_tokens
        (tokens,) = generate(self.model, [start], SAMPLING, max_tokens=length, stop=start)
        return self.tokenizer.decode(tokens[tokens < self.tokenizer.vocab_size])

    def save(self) -> Path:
        """Writes a checkpoint, then deletes those that are no longer kept. CheckpointError where it cannot be written."""
        progress, now = self.progress, self.validated
        progress.seconds = self.clock.seconds
        best = (progress.best_step, progress.best_bits_per_byte)
        if now and now.step == progress.step and not now.whole and (best[1] is None or now.bits_per_byte < best[1]):
            best = (now.step, now.bits_per_byte)
        self.saved = save_checkpoint(
            self.run.checkpoints,
            self.config,
            replace(progress, best_step=best[0], best_bits_per_byte=best[1]),
            weights_of(self.model),
            optimizer_tensors(self.model, self.optimizer),
            tokenizer=self.tokenizer.fingerprint,
            text=text_hashes(self.streams),
            surroundings=surroundings(),
        )
        progress.best_step, progress.best_bits_per_byte = best
        retain(self.run.checkpoints, self.config.train.keep, progress.best_step)
        return self.saved

    def header(self) -> Header:
        backend, reason = explain_backend(self.model, self.config, self.device)
        return Header(
            out=self.run.path,
            device=device_name(self.device),
            precision=str(precision(self.config, self.device)).removeprefix("torch."),
            backend=backend,
            backend_reason=reason,
            paths=explain_paths(self.model, self.config, self.device),
            parameters=self.model.parameter_count(),
            data=f"{self.corpus.name}: {self.corpus.source}",
            licence=self.corpus.licence,
            split=self.corpus.split,
            train_tokens=len(self.streams.train),
            validation_bytes=self.streams.validation.bytes,
            tokens_per_step=self.config.tokens_per_step,
            steps=self.progress.steps,
            resumed_step=self.progress.step,
            flops_per_token=self.model.flops_per_token(self.config.data.context),
            state_bytes=self.model.state_bytes(context=self.config.data.context),
        )

    @property
    def rows_at_once(self) -> int:
        return min(self.config.train.micro_batch_size or self.config.train.batch_size, self.config.train.batch_size)


def check_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, got {config.model.vocab_size}: "
            "make it larger"
        )
