"""Prefill, then decode: a model's state after the prompt is all it needs to go on, so a token costs the same at any length."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltanet.data import Tokenizer
from deltanet.inference.sampling import Draws, Sampling, choose
from deltanet.inference.step import Step
from deltanet.models import LanguageModel

PREFILL_TOKENS = (
    2048  # read at once and row: bounds the memory that a long prompt takes, and keeps the chunked form busy
)


class Ready(NamedTuple):
    """A model that has read its prompts: the logits of the next token `[B, vocabulary]`, and the state to go on from.

    Nothing that reads it changes it, so several continuations may start from the same one.
    """

    logits: Tensor
    state: Any


@torch.no_grad()
def prefill(
    model: LanguageModel, prompts: Sequence[Tensor | Sequence[int]], state: Any = None, *, at_once: int = PREFILL_TOKENS
) -> Ready:
    """Reads `prompts`, B sequences of token ids of any lengths, `at_once` tokens of each at a time.

    Args:
        prompts: integer ids, each 1-D and at least one token long.
        state: of these B sequences, to go on from; by default they start.
        at_once: tokens per row in one call of the model. The result does not depend on it beyond rounding.

    Raises:
        ValueError: no prompt, an empty prompt, an id outside the vocabulary, more tokens than an attention cache takes, or logits that
            are not finite.
    """
    rows = _check_prompts(prompts, model.config.vocab_size)
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1 token, got {at_once}")
    device = next(model.parameters()).device
    length = max(len(row) for row in rows)
    model.check_room(length)
    # Padding goes to the left, so that all prompts end together: the last column holds everyone's last token.
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    equal = bool(mask.all())
    tokens, mask = tokens.to(device), mask.to(device)
    if state is None:
        state = model.init_state(len(rows))
    for start in range(0, length, at_once):
        piece = slice(start, start + at_once)
        hidden, state = model.hidden(tokens[:, piece], state, mask=None if equal else mask[:, piece])
    logits = model.lm_head(hidden[:, -1:]).squeeze(1)
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model's logits must be finite, got NaN or infinity: its weights are damaged or it diverged"
        )
    return Ready(logits, state)


def decode(
    model: LanguageModel,
    ready: Ready,
    sampling: Sampling | None = None,
    *,
    max_tokens: int,
    stop: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Yields the next token of each row, int64 `[B]` on the model's device, up to `max_tokens` times.

    A row that has yielded a token of `stop` repeats it; when all have, the iteration ends. Time and memory per token do
    not depend on how many there were before. `sampling` defaults to `Sampling()`.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be >= 0, got {max_tokens}")
    return _steps(model, ready, sampling or Sampling(), max_tokens, stop)


@torch.no_grad()
def _steps(
    model: LanguageModel, ready: Ready, sampling: Sampling, max_tokens: int, stop: Sequence[int]
) -> Iterator[Tensor]:
    logits, step = ready.logits, Step(model, ready.state)
    draws = Draws(sampling.seed, logits.shape[0])
    stops = torch.tensor(list(stop), dtype=torch.int64, device=logits.device)
    done = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    tokens = torch.empty(0)
    for count in range(max_tokens):
        if count:
            logits = step(tokens)
        chosen = choose(logits, sampling, draws)
        tokens = torch.where(done, tokens, chosen) if count else chosen
        yield tokens
        if len(stops):
            done |= torch.isin(tokens, stops)
            if done.all():
                return


def generate(
    model: LanguageModel,
    prompts: Sequence[Tensor | Sequence[int]],
    sampling: Sampling | None = None,
    *,
    max_tokens: int,
    stop: Sequence[int] = (),
) -> list[Tensor]:
    """What comes after each prompt: int64 `[n]` on the CPU, n at most `max_tokens`, cut before the first token of `stop`.

    Raises ValueError as `prefill` does, and before anything is read where the cache has no room for `max_tokens` more.
    """
    model.check_room(max(map(len, prompts), default=0) + max_tokens - 1)
    steps = list(decode(model, prefill(model, prompts), sampling, max_tokens=max_tokens, stop=stop))
    if not steps:
        return [torch.empty(0, dtype=torch.int64) for _ in prompts]
    rows = torch.stack(steps, dim=1).cpu()
    ends = torch.isin(rows, torch.tensor(list(stop), dtype=torch.int64))
    return [row[: int(end.int().argmax())] if end.any() else row for row, end in zip(rows, ends, strict=True)]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    max_tokens: int,
) -> Iterator[str]:
    """The text after `prompt`, piece by piece as its characters become complete, until the document ends.

    The prompt is read as the beginning of a document. Raises ValueError, before anything is read, if it is empty or, with
    `max_tokens`, more than an attention cache takes.
    """
    if not prompt:
        raise ValueError("the prompt must hold some text, got an empty one: give at least one character to go on from")
    ids = torch.cat([torch.tensor([tokenizer.separator]), torch.as_tensor(tokenizer.encode(prompt).astype("int64"))])
    model.check_room(len(ids) + max_tokens - 1)
    ready = prefill(model, [ids])
    return _text(tokenizer, decode(model, ready, sampling, max_tokens=max_tokens, stop=[tokenizer.separator]))


def _text(tokenizer: Tokenizer, steps: Iterator[Tensor]) -> Iterator[str]:
    decoder = tokenizer.decoder()
    for tokens in steps:
        token = int(tokens)
        if token == tokenizer.separator:
            break
        if piece := decoder.feed([token]):
            yield piece
    if rest := decoder.flush():
        yield rest


def _check_prompts(prompts: Sequence[Tensor | Sequence[int]], vocab_size: int) -> list[Tensor]:
    if not len(prompts):
        raise ValueError("generation needs at least one prompt, got none")
    rows = [torch.as_tensor(prompt).cpu() for prompt in prompts]
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"prompt {i} must be a sequence of token ids [n], got shape {list(row.shape)}")
        if not len(row):
            raise ValueError(f"prompt {i} must hold at least one token, got an empty one")
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(f"prompt {i} must hold integer token ids, got {row.dtype}")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"prompt {i} must hold ids in [0, {vocab_size}), got {int(row.min())} to {int(row.max())}: "
                "encode it with the tokenizer that the model was trained with"
            )
    return rows
