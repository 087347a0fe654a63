"""The small models of the synthetic suites: embeddings, a few blocks around one kind of mixer, a head.

    x = dropout(embed(tokens) [+ position]);   x <- x + mixer(norm(x));   [x <- x + feed_forward(norm(x));]   logits = head(norm(x))

Unlike `LanguageModel` they follow the protocols of others: MQAR's has LayerNorm and for feed-forward layers the identity (HazyResearch/zoology:
x <- x + norm(x), which brings the small embeddings to unit size at once), MAD's is
RMSNorm and SwiGLU, for compression with a decoder that reads one position (athms/mad-lab), RegBench's has a plain feed-forward layer of
four times the width (berlino/seq_icl).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltanet.layers import Attention, AttentionConfig, FeedForward, Mixer, RMSNorm
from deltanet.layers.rotary import positions, rotate
from deltanet.models.language_model import MixerConfig, check_fits, init_weights

__all__ = ["Kept", "SuiteModel", "SuiteModelConfig"]

NORMS = ("layer", "rms")
FEED_FORWARDS = ("none", "identity", "swiglu", "gelu")
INITS = ("scaled", "mad", "mamba")
FLA = ("delta", "gated_delta", "delta_product", "gla", "retnet")  # kinds of mixers that are fla's in MAD's harness


@dataclass(frozen=True, kw_only=True)
class SuiteModelConfig:
    """What a suite's model is made of."""

    vocab_size: int
    """Number of token ids."""
    d_model: int
    """Width of the residual stream."""
    depth: int
    """Number of blocks, all with the same mixer."""
    mixer: MixerConfig
    """The mixer."""
    norm: str = "rms"
    """Before each half of a block and at the end: layer (LayerNorm) or rms (RMSNorm)."""
    feed_forward: str = "none"
    """The other half of a block: none, identity (the normalised stream itself), swiglu, or gelu (two matrices)."""
    feed_forward_width: int | None = None
    """Its hidden width; 8/3 (swiglu) or 4 (gelu) times d_model if not given."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding matrix."""
    head_bias: bool = False
    """Whether the head has a bias."""
    dropout: float = 0.0
    """Share of the embeddings' numbers that are zero in a training step."""
    attention_dropout: float = 0.0
    """Share of the weights of attention without window and grouped heads that are zero in a training step."""
    positions: int = 0
    """Longest sequence for which positions are learned; 0: none are."""
    decoder: bool = False
    """Whether all tokens are read from the last position alone (MAD's compression)."""
    init: str = "scaled"
    """How matrices begin: scaled (normal, those that write to the residual stream smaller by 1/sqrt(2 * depth)), mad (as mad-lab's) or
    mamba (those of mixers as nn.Linear begins, the ones that write to the residual stream smaller by 1/sqrt(depth))."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices; in mad, of the embeddings."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "depth"):
            if not 1 <= getattr(self, name) <= 2**24:
                raise ValueError(f"{name} must be between 1 and 2^24, got {getattr(self, name)}")
        for name, known in {"norm": NORMS, "feed_forward": FEED_FORWARDS, "init": INITS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.attention_dropout:
            layer = self.mixer
            if not isinstance(layer, AttentionConfig) or layer.window or layer.kv_heads not in (None, layer.heads):
                raise ValueError(
                    f"attention_dropout must be 0 but for attention without window and kv_heads, got {layer}"
                )
        check_fits(self.mixer, self.d_model)


def _norm(config: SuiteModelConfig) -> nn.Module:
    return nn.LayerNorm(config.d_model) if config.norm == "layer" else RMSNorm(config.d_model)


def _feed_forward(config: SuiteModelConfig) -> nn.Module:
    if config.feed_forward == "identity":
        return nn.Identity()
    if config.feed_forward == "swiglu":
        return FeedForward(config.d_model, config.feed_forward_width)
    width = config.feed_forward_width or 4 * config.d_model
    return nn.Sequential(nn.Linear(config.d_model, width), nn.GELU(), nn.Linear(width, config.d_model))


class Kept(NamedTuple):
    """What a training step keeps, by chance, where there is dropout; None for all."""

    embeddings: Tensor | None  # bool [B, T, d_model]
    weights: tuple[Tensor, ...] | None  # of attention, for each block: bool [B, H, T, T]


class _Block(nn.Module):
    def __init__(self, config: SuiteModelConfig, backend: str) -> None:
        super().__init__()
        self.mixer_norm = _norm(config)
        self.mixer: Mixer = config.mixer.build(config.d_model, backend=backend)
        self.share_kept = 1 - config.attention_dropout
        self.has_feed_forward = config.feed_forward != "none"
        if self.has_feed_forward:
            self.feed_forward_norm, self.feed_forward = _norm(config), _feed_forward(config)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x `[B, T, d_model]` through the block; `kept` bool `[B, H, T, T]` are the weights of attention that count, where that is given."""
        h = _narrow(self.mixer_norm(x))
        x = x + (self.mixer(h)[0] if kept is None else self._attend(h, kept))
        if not self.has_feed_forward:
            return x
        h = self.feed_forward_norm(x)
        return x + (h if isinstance(self.feed_forward, nn.Identity) else self.feed_forward(_narrow(h)))

    def _attend(self, x: Tensor, kept: Tensor) -> Tensor:
        """The mixer, an attention, written out: torch's own draws what it drops by a generator that all trials share."""
        layer = self.mixer
        assert isinstance(layer, Attention)
        q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        if layer.config.rotary:
            place = positions(x.shape[1], None, None, x.device)
            q, k = (rotate(z, place, layer.config.rope_theta) for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT).float().masked_fill(later, -torch.inf) * layer.head_dim**-0.5
        weights = scores.softmax(-1) * kept / self.share_kept
        return layer.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(-2))


def _narrow(x: Tensor) -> Tensor:
    """x in autocast's type: once here instead of once for every matrix that it meets."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Decoder(nn.Module):
    """Reads the token of every place off one vector `[B, d_model]`: a code for the place is added, then two hidden layers.

    -> `[B, T, d_model]`. Source: MAD's autoencoder (Poli et al. 2024, arXiv 2403.17844, appendix).
    """

    def __init__(self, config: SuiteModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.layers = nn.Sequential(*(part for _ in range(2) for part in (RMSNorm(d), nn.Linear(d, d), nn.GELU())))
        self.models = 1  # so many side by side in the channels of x, see stacked.py

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        waves = _waves(tokens, x.shape[-1] // self.models, x.device).repeat(1, self.models)
        return self.layers(_narrow(x[:, None] + waves))


def _waves(tokens: int, width: int, device: torch.device) -> Tensor:
    """`[T, width]`: sines of the place at wavelengths from 2 pi to 10000 * 2 pi, both included, then their cosines (as mad-lab's)."""
    half = -(-width // 2)
    rates = 10000.0 ** -(torch.arange(half, device=device) / max(half - 1, 1))
    angles = torch.arange(tokens, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]


class SuiteModel(nn.Module):
    """A model of a suite. `model(tokens)` are the logits of all places; in training, `logits` leaves out those not asked for."""

    def __init__(self, config: SuiteModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions:
            self.positions = nn.Embedding(config.positions, config.d_model)
        self.layers = nn.ModuleList(_Block(config, backend) for _ in range(config.depth))
        if config.decoder:
            self.decoder = _Decoder(config)
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As a language model's: matrices N(0, init_std), those that write to the residual stream scaled by 1/sqrt(2 * depth).

        With `init="mad"` as athms/mad-lab and the layers of fla in its time (2024) leave theirs: in mixers of fla's kind Xavier-uniform with gain
        2^-2.5, elsewhere as nn.Linear begins, in the autoencoder N(0, init_std). With `init="mamba"` as state-spaces/mamba does.
        """
        init_weights(self, std=self.config.init_std, depth=self.config.depth, generator=generator)
        if self.config.init == "mad":
            self._init_as_mad(generator)
        if self.config.init == "mamba":
            self._init_as_mamba(generator)

    @torch.no_grad()
    def _init_as_mamba(self, generator: torch.Generator | None) -> None:
        for block in self.layers:
            mixer = block.get_submodule("mixer")
            for name, module in mixer.named_modules():
                if isinstance(module, nn.Linear):
                    limit = (module.in_features * (self.config.depth if name == "o_proj" else 1)) ** -0.5
                    module.weight.uniform_(-limit, limit, generator=generator)
            assert isinstance(mixer, Mixer)
            mixer.reset_parameters(generator)  # what it begins otherwise

    @torch.no_grad()
    def _init_as_mad(self, generator: torch.Generator | None) -> None:
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if self.config.decoder:
                module.weight.normal_(std=self.config.init_std, generator=generator)
            elif ".mixer." in name and self.config.mixer.kind in FLA:
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5, generator=generator)
            else:
                limit = module.in_features**-0.5
                module.weight.uniform_(-limit, limit, generator=generator)
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_parameters(generator)  # what it begins otherwise

    def kept(self, tokens: Tensor, generator: torch.Generator) -> Kept | None:
        """What a training step keeps of its embeddings and of attention's weights; None for all."""

        def draw(share: float, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.bool, device=tokens.device).bernoulli_(share, generator=generator)

        config, (B, T) = self.config, tokens.shape
        embeddings, weights = None, None
        if config.dropout:
            embeddings = draw(1 - config.dropout, B, T, config.d_model)
        if config.attention_dropout:
            assert isinstance(config.mixer, AttentionConfig)
            weights = tuple(draw(1 - config.attention_dropout, B, config.mixer.heads, T, T) for _ in self.layers)
        return None if embeddings is None and weights is None else Kept(embeddings, weights)

    def embedded(self, tokens: Tensor, common: int | None = None) -> Tensor:
        """Embeddings `[B, T, d_model]` of tokens `[B, T]`.

        The row of the token `common` is added apart: on a GPU the gradients of one token's places are added up one after the other, which takes
        longer the more places it has (0.19 ms for the 41,000 of MQAR's filler in a batch). Its places look up others' rows, to no effect.
        """
        if common is None:
            return self.embeddings(tokens)
        other = torch.arange(tokens.numel(), device=tokens.device, dtype=tokens.dtype).view_as(tokens) % self.config.vocab_size
        rows = self.embeddings(torch.where(tokens == common, other, tokens))
        return torch.where((tokens == common)[..., None], self.embeddings(tokens.new_full((1,), common)), rows)

    def body(
        self,
        embedded: Tensor,
        kept: Kept | None = None,
        apply: Callable[[nn.Module, Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """What the blocks make of the tokens' embeddings `[B, T, d_model]`; only what is `kept` counts, where that is given.

        `apply(block, x, kept)` is how a block is applied, if not by calling it.
        """
        x = embedded
        if self.config.positions:
            x = x + self.positions.weight[: x.shape[1]]
        if kept is not None and kept.embeddings is not None:
            x = x * kept.embeddings / (1 - self.config.dropout)
        for i, block in enumerate(self.layers):
            weights = None if kept is None or kept.weights is None else kept.weights[i]
            x = block(x, weights) if apply is None else apply(block, x, weights)
        return x

    def logits(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """`[B, T, vocab_size]` of what `body` gave, or `[B, K, vocab_size]` at `places` `[B, K]` alone."""
        return self.lm_head(self.features(x, places))

    def features(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """What the head reads, `[B, T, d_model]` or `[B, K, d_model]`."""
        if self.config.decoder:
            x = self.decoder(x[:, -1], x.shape[1])
        if places is not None:
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        return _narrow(self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, vocab_size]`."""
        return self.logits(self.body(self.embeddings(tokens)))
