"""What a generated token costs after more and more context, beside softmax attention of the same size with a cache.

Both are measured, greedy and one sequence at a time. DeltaNet carries a state of constant size; attention reads the keys
and values of every token before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.inference import Step, prefill
from deltanet.inference.step import EAGER
from deltanet.layers import FeedForward, RMSNorm, state_bytes
from deltanet.models import LanguageModel, ModelConfig

ROUNDS, WARM_UP, TIMED = 3, EAGER + 2, 12  # tokens at each length; the fastest timed one counts: whatever else runs only adds


@dataclass(frozen=True, kw_only=True)
class DecodingCost:
    """One token's cost after `context` tokens: milliseconds, and the bytes that are remembered of the sequence."""

    context: int
    model_ms: float
    model_bytes: int
    attention_ms: float
    attention_bytes: int


@torch.no_grad()
def decoding_costs(model: LanguageModel, contexts: Sequence[int]) -> list[DecodingCost]:
    """Milliseconds per generated token of `model`, and of its twin with softmax attention, after each of `contexts`.

    `model` reads random tokens up to each length. The twin's cache is filled with random keys and values, since their
    values do not change its cost. `contexts` must increase; ValueError if not.
    """
    if not contexts or contexts[0] < 1 or any(b <= a for a, b in pairwise(contexts)):
        raise ValueError(f"contexts must be lengths that increase from at least 1, got {list(contexts)}")
    model.check_room(contexts[-1] + WARM_UP + TIMED)
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.config.vocab_size, (contexts[-1],), generator=generator)
    # The meta device first: initialising weights that are only timed would cost more than timing them.
    with torch.device("meta"):
        twin = AttentionModel(model.config)
    twin = twin.to_empty(device=weight.device).to(weight.dtype)
    for parameter in twin.parameters():
        parameter.normal_(std=0.02)
    cache = twin.init_cache(contexts[-1] + WARM_UP + TIMED)
    states: list[Any] = []
    read = 0
    for context in contexts:
        states.append(prefill(model, [text[read:context]], states[-1] if states else None).state)
        read = context
    # Several rounds over all lengths, so that a busy moment of the machine does not fall on one length alone.
    best = [(math.inf, math.inf)] * len(contexts)
    for _ in range(ROUNDS):
        for i, (context, state) in enumerate(zip(contexts, states, strict=True)):
            for layer in cache:
                layer.length = context
            # No CUDA graph: attention's cache grows, so its step cannot be one.
            own, other = ModelStep(model, state, graph=False), AttentionStep(twin, cache)
            times = (_milliseconds(own, weight.device), _milliseconds(other, weight.device))
            best[i] = (min(best[i][0], times[0]), min(best[i][1], times[1]))
    token_bytes = sum(2 * layer.keys[:, :, 0].nbytes for layer in cache)
    return [
        DecodingCost(
            context=context,
            model_ms=model_ms,
            model_bytes=state_bytes(state),
            attention_ms=attention_ms,
            attention_bytes=context * token_bytes,
        )
        for context, state, (model_ms, attention_ms) in zip(contexts, states, best, strict=True)
    ]


@torch.no_grad()
def token_ms(model: LanguageModel, context: int, batch: int = 1) -> float:
    """Milliseconds until each of `batch` sequences has its next token, greedy, after `context` random ones; the fastest of several counts."""
    text = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    return _milliseconds(ModelStep(model, prefill(model, list(text)).state), model.lm_head.weight.device, batch)


class ModelStep:
    """One greedy step after another, from a state."""

    def __init__(self, model: LanguageModel, state: tuple, *, graph: bool = True) -> None:
        self._step = Step(model, state, graph=graph)

    def __call__(self, token: Tensor) -> Tensor:
        return self._step(token[:, 0]).argmax(-1, keepdim=True)


class Cache:
    """The keys and values `[1, heads, capacity, dim]` of one layer, of which the first `length` are filled."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values `[1, heads, n, dim]`, those of the new token included."""
        self.keys[:, :, self.length] = key[:, :, 0]
        self.values[:, :, self.length] = value[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class AttentionStep:
    """The same for the attention model, from a cache."""

    def __init__(self, model: "AttentionModel", cache: list[Cache]) -> None:
        self._model, self._cache = model, cache

    def __call__(self, token: Tensor) -> Tensor:
        return self._model(token, self._cache)[:, -1].argmax(-1, keepdim=True)


class AttentionModel(nn.Module):
    """The same language model with softmax attention for a mixer, as small as it can be: it decodes, and is not trained.

    Without position embeddings and convolutions it does a little less than a real one, which is to its advantage.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.d_model // 64 if config.d_model % 64 == 0 else 1  # 64 wide, whatever the mixers have
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(AttentionBlock(config, self.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, token: Tensor, cache: list[Cache]) -> Tensor:
        """Logits `[1, 1, vocabulary]` after `token` `[1, 1]`; `cache` takes it in."""
        x = self.embeddings(token)
        for layer, past in zip(self.layers, cache, strict=True):
            x = layer(x, past)
        return self.lm_head(self.norm(x))

    def init_cache(self, capacity: int) -> list[Cache]:
        """One cache per layer with room for `capacity` tokens, random ones to begin with."""
        weight = self.lm_head.weight
        shape = (2, len(self.layers), 1, self.heads, capacity, weight.shape[1] // self.heads)
        keys, values = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        return [Cache(k, v, capacity) for k, v in zip(keys, values, strict=True)]


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), for one new token."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward)

    def forward(self, x: Tensor, past: Cache) -> Tensor:
        q, k, v = self.qkv_proj(self.mixer_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, *past.append(k, v))
        x = x + self.o_proj(o.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))


def _milliseconds(step: Callable[[Tensor], Tensor], device: torch.device, batch: int = 1) -> float:
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    times = []
    for count in range(WARM_UP + TIMED):
        _wait(device)
        start = time.perf_counter()
        token = step(token)
        _wait(device)
        if count >= WARM_UP:
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
