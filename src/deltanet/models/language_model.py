"""The language model: embeddings, pre-norm blocks of a mixer and SwiGLU, a final norm, a linear head. No training in here.

    x <- x + mixer(RMSNorm(x));   x <- x + feed_forward(RMSNorm(x))        (a Mamba block: x <- x + second_mixer(RMSNorm(x)))

Source: the Llama block with its attention replaced (Yang et al. 2024, arXiv 2406.06484, section 3.3). There are no position embeddings
beside those of a mixer's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deltanet.layers import (
    AttentionConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    FeedForward,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    MambaConfig,
    Mixer,
    RetNetConfig,
    RMSNorm,
    ShortConv,
    widen,
)
from deltanet.ops import pack
from deltanet.ops.cross_entropy import fused_linear_cross_entropy, refuse_cross_entropy
from deltanet.ops.segments import ready_to_compile

__all__ = ["Block", "LanguageModel", "MixerConfig", "ModelConfig", "check_fits", "init_weights"]

LOGITS = 2**24  # most logits held at a time when PyTorch computes losses: 64 MiB in fp32

State: TypeAlias = tuple[Any, ...]  # one state per block

# Each has a `kind`, its name in files, and `build(d_model, backend=..., memory=...)`, which makes the mixer.
MixerConfig: TypeAlias = (
    DeltaNetConfig
    | GatedDeltaNetConfig
    | DeltaProductConfig
    | AttentionConfig
    | GatedLinearAttentionConfig
    | RetNetConfig
    | MambaConfig
)


def check_fits(mixer: MixerConfig, d_model: int) -> None:
    """Raises ValueError, which names the field, for a mixer that cannot be built at that width. Takes no memory."""
    with torch.device("meta"):
        mixer.build(d_model)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a language model is made of."""

    vocab_size: int
    """Number of token ids."""
    d_model: int = 128
    """Width of the residual stream."""
    depth: int = 3
    """Number of blocks."""
    layers: tuple[MixerConfig, ...] = (DeltaNetConfig(heads=2),)
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
        for mixer in set(self.layers):
            check_fits(mixer, self.d_model)
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)); with a Mamba mixer, a second one instead of the feed-forward layer."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig, **options: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Mixer = mixer.build(config.d_model, **options)
        self.paired = isinstance(mixer, MambaConfig)
        if self.paired:
            self.second_mixer_norm = RMSNorm(config.d_model, config.norm_eps)
            self.second_mixer: Mixer = mixer.build(config.d_model, **options)
        else:
            self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
            self.feed_forward = FeedForward(config.d_model, config.feed_forward)

    def forward(self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        first, second = state if self.paired and state is not None else (state, None)
        mixed, first = self.mixer(self.mixer_norm(x), first, cu_seqlens=cu_seqlens)
        x = x + mixed
        if not self.paired:
            return x + self.feed_forward(self.feed_forward_norm(x)), first
        mixed, second = self.second_mixer(self.second_mixer_norm(x), second, cu_seqlens=cu_seqlens)
        return x + mixed, None if state is None else (first, second)

    def init_state(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> Any:
        """The mixer's state; of two mixers, both."""
        first = self.mixer.init_state(batch, device, dtype)
        return (first, self.second_mixer.init_state(batch, device, dtype)) if self.paired else first

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token in sequences of `context` tokens."""
        second = self.second_mixer if self.paired else self.feed_forward
        return self.mixer.flops_per_token(context) + second.flops_per_token(context)


def init_weights(model: nn.Module, *, std: float, depth: int, generator: torch.Generator | None = None) -> None:
    """All matrices N(0, std), those that write to the residual stream of `depth` blocks scaled by 1/sqrt(2 * depth); norms 1; biases 0;
    convolutions as nn.Conv1d; what else a mixer has, its own way.

    The scaling keeps the residual stream's variance independent of depth (Radford et al. 2019, GPT-2).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ShortConv):
            module.reset_parameters(generator)
    for module in model.modules():  # after the matrices, some of which a mixer begins otherwise
        if isinstance(module, Mixer):
            module.reset_parameters(generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * depth) ** -0.5)


# What "cheap" keeps between forward and backward: products of matrices, attention, scans, the delta rule. All else is a pass over memory.
EXPENSIVE = {
    "mm", "addmm", "bmm", "baddbmm", "delta_rule", "selective_scan", "_varlen_attn",
    *(f"_scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")),
}  # fmt: skip


def _keep_expensive(_context: object, op: torch._ops.OpOverload, *_args: object, **_options: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op._opname in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


_RECOMPUTE: dict[str, Any] = {"cheap": {"context_fn": partial(create_selective_checkpoint_contexts, _keep_expensive)}, "blocks": {}}


def _train_block(block: nn.Module, x: Tensor, cu_seqlens: Tensor | None, recompute: str) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return block(x, None, cu_seqlens)[0]

    if recompute == "nothing":
        return forward(x)
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, **_RECOMPUTE[recompute])


class LanguageModel(nn.Module):
    """A causal language model over token ids.

    >>> model = LanguageModel(preset("nano", vocab_size=257))
    >>> logits, _ = model(tokens)                                      # [B, T] -> [B, T, vocab_size]
    >>> logits, state = model(tokens, model.init_state(len(tokens)))   # and go on from there
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto", memory: str = "states") -> None:
        super().__init__()
        self.config = config
        self.recompute: Literal["nothing", "cheap", "blocks"] = "nothing"  # of a block, in the backward (TrainConfig says more)
        self._train_block: Callable[[nn.Module, Tensor, Tensor | None, str], Tensor] = _train_block
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
        """The first values of all parameters, see the function of that name."""
        init_weights(self, std=self.config.init_std, depth=self.config.depth, generator=generator)

    def compile_blocks(self) -> None:
        """From now on blocks train as torch.compile makes them, faster on a GPU once that is done; generation and evaluation stay as they are.

        Compiles once for each kind of block, and again where a batch is cut another way.
        """
        self._train_block = torch.compile(_train_block)

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
        training = torch.is_grad_enabled() and state is None
        if training and cu_seqlens is not None and self._train_block is not _train_block:
            ready_to_compile(cu_seqlens)
        for i, block in enumerate(self.layers):
            if training:
                x = self._train_block(block, x, cu_seqlens, self.recompute)
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
        if refuse_cross_entropy(x) is None:
            return fused_linear_cross_entropy(x, self.lm_head.weight, flat).view(targets.shape)
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
        return tuple(block.init_state(batch, device, dtype) for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def parameter_count(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context: int) -> int:
        """FLOPs of training on one token, forward and backward (twice the forward), in sequences of `context` tokens."""
        blocks = sum(block.flops_per_token(context) for block in self._blocks())
        return 3 * (blocks + 2 * self.lm_head.weight.numel())

    def check_room(self, tokens: int) -> None:
        """ValueError if a state cannot take in so many tokens of a sequence, which attention without a window keeps: before any compute."""
        limits = [module.max_context for module in self.modules() if isinstance(module, Mixer) and module.max_context is not None]
        if limits and tokens > min(limits):
            raise ValueError(
                f"the attention cache takes max_context = {min(limits)} tokens, got {tokens}: ask for fewer, raise max_context, "
                "or give the layer a window"
            )

    def state_bytes(self, batch: int = 1, context: int = 0) -> int:
        """Bytes that the state of `batch` sequences takes after `context` tokens, on which it depends with full attention alone."""
        mixers = [module for module in self.modules() if isinstance(module, Mixer)]
        return sum(mixer.state_bytes(batch, context) for mixer in mixers)
