"""The language model: embeddings, pre-norm blocks of a mixer and SwiGLU, a final norm, a linear head. No training in here.

    x <- x + mixer(RMSNorm(x));   x <- x + feed_forward(RMSNorm(x))

Source: the Llama block with its attention replaced (Yang et al. 2024, arXiv 2406.06484, section 3.3). There are no position embeddings.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltanet.layers import DeltaNetConfig, FeedForward, RMSNorm, ShortConv, state_bytes, widen
from deltanet.ops import pack

__all__ = ["Block", "LanguageModel", "MixerConfig", "ModelConfig"]

LOGITS = 2**24  # most logits held at a time when losses are computed: 64 MiB in fp32

State: TypeAlias = tuple[Any, ...]  # one mixer state per block


class MixerConfig(Protocol):
    """The configuration of a token mixer: a name for files and the command line, and how to build one."""

    kind: ClassVar[str]

    def build(self, d_model: int, **options: str) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a language model is made of."""

    vocab_size: int
    """Number of token ids."""
    d_model: int = 128
    """Width of the residual stream."""
    depth: int = 3
    """Number of blocks."""
    layers: tuple[DeltaNetConfig, ...] = (DeltaNetConfig(heads=2),)
    """Mixers of the blocks: a pattern that is repeated over depth, which must be a multiple of its length."""
    feed_forward: int | None = None
    """Hidden width of the SwiGLU layers; 8/3 of d_model rounded up to a multiple of 256 if not given."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding matrix."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices."""

    def __post_init__(self) -> None:
        limits = {"vocab_size": 2**24, "d_model": 2**16, "depth": 1024, "feed_forward": 2**20}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise ValueError(f"{name} must be between 1 and {limit}, got {value}")
        if not self.layers or self.depth % len(self.layers):
            raise ValueError(f"depth must be a multiple of the pattern's {len(self.layers)} layers, got {self.depth}")
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, **options: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Any = mixer.build(config.d_model, **options)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward)

    def forward(self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class LanguageModel(nn.Module):
    """A causal language model over token ids.

    >>> model = LanguageModel(preset("nano", vocab_size=257))
    >>> logits, _ = model(tokens)                                      # [B, T] -> [B, T, vocab_size]
    >>> logits, state = model(tokens, model.init_state(len(tokens)))   # and go on from there
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto", memory: str = "states") -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # recompute each block in the backward: less memory, about a third more time
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        pattern = [config.layers[i % len(config.layers)] for i in range(config.depth)]
        self.layers = nn.ModuleList(Block(config, mixer, backend=backend, memory=memory) for mixer in pattern)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
        if self.embeddings.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """All matrices N(0, init_std), those that write to the residual stream scaled by 1/sqrt(2 * depth); norms 1; convolutions as nn.Conv1d.

        The scaling keeps the residual stream's variance independent of depth (Radford et al. 2019, GPT-2).
        """
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, ShortConv):
                module.reset_parameters(generator)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_((2 * self.config.depth) ** -0.5)

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """`forward` without the head: `[B, T, d_model]`, normalised, and the new state if one was given."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be integer ids [B, T], got {tokens.dtype} {list(tokens.shape)}")
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give mask or cu_seqlens, not both: packed sequences have no padding")
            packed = pack(mask, (tokens.shape[0], tokens.shape[1]))
            x, state = self.hidden(packed.gather(tokens), state, cu_seqlens=packed.cu_seqlens)
            return packed.scatter(x), state
        x = self.embeddings(tokens)
        states = []
        for i, block in enumerate(self.layers):
            if self.checkpoint_blocks and torch.is_grad_enabled() and state is None:
                x, _ = checkpoint(block, x, None, cu_seqlens, use_reentrant=False)
            else:
                x, new = block(x, None if state is None else state[i], cu_seqlens)
                states.append(new)
        return self.norm(x), None if state is None else tuple(states)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Logits `[B, T, vocab_size]` of the token after each of `tokens` `[B, T]`.

        Args:
            state: where the sequences stand, from `init_state` or an earlier call; None starts afresh and returns none.
            cu_seqlens: `[N + 1]` boundaries of packed sequences (then B = 1); nothing passes between them.
            mask: `[B, T]` bool, true at real tokens; padding may lie left, right or inside and changes nothing.
        """
        x, state = self.hidden(tokens, state, cu_seqlens=cu_seqlens, mask=mask)
        return self.lm_head(x), state

    def losses(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of each target `[B, T]`, in fp32; 0 where the target is -100.

        Logits of long batches are made in pieces, and again in the backward, so that they are never all in memory.
        """
        x = self.hidden(tokens, cu_seqlens=cu_seqlens)[0].flatten(0, 1)
        flat = targets.flatten()
        piece = max(1, LOGITS // self.config.vocab_size)
        if len(x) <= piece:
            losses = self._cross_entropy(x, flat)
        else:
            parts = zip(x.split(piece), flat.split(piece), strict=True)
            losses = torch.cat([checkpoint(self._cross_entropy, *part, use_reentrant=False) for part in parts])
        return losses.view(targets.shape)

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(widen(self.lm_head(x)), targets, reduction="none", ignore_index=-100)

    def init_state(self, batch: int = 1, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """The state of `batch` sequences that have not begun."""
        return tuple(block.mixer.init_state(batch, device, dtype) for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def parameter_count(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context: int) -> int:
        """FLOPs of training on one token, forward and backward (twice the forward), in sequences of `context` tokens."""
        blocks = sum(b.mixer.flops_per_token(context) + b.feed_forward.flops_per_token(context) for b in self._blocks())
        return 3 * (blocks + 2 * self.lm_head.weight.numel())

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes that the state of `batch` sequences takes, however long they are."""
        return state_bytes(self.init_state(batch, torch.device("meta")))
