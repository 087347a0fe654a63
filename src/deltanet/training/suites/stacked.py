"""Several models of a suite as one wide one: they share tokens and kernels and nothing else.

Side by side in their channels they are a model whose matrices are block-diagonal: G models of width C have `[B, T, G * C]`, channels of one
model beside each other, and so have their heads and convolutions. Only matrices, norms and embeddings need to be told where a model ends.
A model of width 128 leaves a GPU idle between its few hundred kernels a step; G of them take as many kernels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltanet.layers import AttentionConfig, DeltaNetConfig, RMSNorm
from deltanet.layers.norm import widen
from deltanet.training.suites.model import SuiteModel, SuiteModelConfig

__all__ = ["can_stack", "stack"]


class _Linears(nn.Module):
    """`[..., G * in]` -> `[..., G * out]`, weight `[G, out, in]`, bias `[G, out]` or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        G, out, width = self.weight.shape
        rows = x.reshape(-1, G, width).transpose(0, 1)
        y = torch.bmm(rows, self.weight.mT).transpose(0, 1)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], G * out)


class _Norms(nn.Module):
    """RMSNorm of each model, weight `[G, dim]`: of `[..., G * dim]`, or of `[..., G * heads, dim]` where heads are normalised."""

    def __init__(self, weight: Tensor, eps: float, heads: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.heads = nn.Parameter(weight), eps, heads

    def forward(self, x: Tensor) -> Tensor:
        G, dim = self.weight.shape
        wide = widen(x)
        parts = wide.unflatten(-2, (G, -1)) if self.heads else wide.unflatten(-1, (G, dim))
        weight = self.weight[:, None] if self.heads else self.weight
        return (F.rms_norm(parts, (dim,), None, self.eps) * weight).reshape(x.shape).to(x.dtype)


class _Embeddings(nn.Module):
    """tokens `[B, T]` -> `[B, T, G * C]`, weight `[G, V, C]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight.transpose(0, 1).flatten(1))


def can_stack(config: SuiteModelConfig) -> bool:
    """Whether models of that configuration can be one: DeltaNet or attention between RMSNorm and SwiGLU, as in MAD, without dropout."""
    plain = not (config.tie_embeddings or config.positions or config.dropout or config.attention_dropout)
    return plain and config.norm == "rms" and config.feed_forward == "swiglu" and config.mixer.kind in ("delta", "attention")


def stack(models: Sequence[SuiteModel], *, backend: str = "auto") -> SuiteModel:
    """The models, all of one configuration that `can_stack`, as one, with copies of their weights.

    Its parameters have the model in front (`[G, ...]`; those of convolutions `[G * C, 1, width]`), and what it returns are logits `[B, T, G * V]`.
    """
    config, G = models[0].config, len(models)
    mixer, width = config.mixer, config.feed_forward_width
    alike = can_stack(config) and all(model.config == config for model in models)
    if not alike or not isinstance(mixer, DeltaNetConfig | AttentionConfig):
        raise ValueError(f"models must be alike, of DeltaNet or attention, RMSNorm and SwiGLU without dropout, got {config}")
    wide = replace(
        config, d_model=G * config.d_model, mixer=replace(mixer, heads=G * mixer.heads),
        feed_forward_width=None if width is None else G * width,
    )  # fmt: skip
    with torch.device("meta"):
        one = SuiteModel(wide, backend=backend)
    one.config = config
    parts = [dict(model.named_modules()) for model in models]

    def of(name: str, field: str) -> Tensor | None:
        found = [getattr(part[name], field) for part in parts]
        return None if found[0] is None else torch.stack([x.detach() for x in found])

    for name, module in list(one.named_modules()):
        own = {key for key, value in module.named_parameters(recurse=False)}
        if not own:
            continue
        weight = of(name, "weight")
        assert weight is not None
        where, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear):
            new: nn.Module = _Linears(weight, of(name, "bias"))
        elif isinstance(module, RMSNorm):
            new = _Norms(weight, module.eps, heads=last == "o_norm")
        elif isinstance(module, nn.Embedding):
            new = _Embeddings(weight)
        else:  # a convolution, which knows channels alone
            module.weight = nn.Parameter(weight.flatten(0, 1))
            continue
        setattr(one.get_submodule(where), last, new)
    if config.decoder:
        one.decoder.models = G
    return one
