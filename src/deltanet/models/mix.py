"""A pattern of mixers in one line: `delta*3,swa(window=512)` is three DeltaNet layers and a sliding window, repeated over the depth.

    mix  = item , item , ...        item = name [ (field=value, ...) ] [ *count ]

A name stands for the mixer as the paper has it at the model's width; fields are those of the mixer's configuration.
"""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

from deltanet.layers import (
    AttentionConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedLinearAttentionConfig,
    MambaConfig,
    RetNetConfig,
)
from deltanet.models.language_model import MixerConfig, check_fits
from deltanet.ops.backends import nearest

__all__ = ["MIXERS", "WINDOW", "parse_mix"]

WINDOW = 1024  # of the paper's hybrid; inferred from its state size, about 1000 times the width: (128 + 2 * 1024) / 2 for two layers


def _heads(d_model: int, width: int) -> int:
    """As many heads as fit at that width; in small models narrower ones, so that there are two."""
    return max(d_model // (width if d_model > 2 * width else 64), 1)


# Each mixer at width d. Heads: DeltaNet 128 wide and attention 64, as in the paper's models; RetNet 256 and GLA four, as in those
# papers; Gated DeltaNet's keys take 3/4 of the width (its paper's 6 d^2 parameters) at 128 a head.
_AT_WIDTH: dict[str, Callable[[int], MixerConfig]] = {
    "delta": lambda d: DeltaNetConfig(heads=_heads(d, 128)),
    "gated_delta": lambda d: GatedDeltaNetConfig(
        heads=6 * max(d // 1024, 1), head_dim=max(d // (8 * max(d // 1024, 1)), 1)
    ),
    "delta_product": lambda d: DeltaProductConfig(heads=_heads(d, 128)),
    "gla": lambda d: GatedLinearAttentionConfig(heads=4),
    "retnet": lambda d: RetNetConfig(heads=max(d // 256, 2)),
    "mamba": lambda d: MambaConfig(),
    "attention": lambda d: AttentionConfig(heads=_heads(d, 64)),
    "swa": lambda d: AttentionConfig(heads=_heads(d, 64), window=WINDOW),
}
MIXERS = tuple(_AT_WIDTH)
_ITEM = re.compile(r"\s*(?P<name>[^\s(*,]+)\s*(\((?P<options>[^()]*)\))?\s*(\*\s*(?P<count>[^\s,]+))?\s*")


def parse_mix(mix: str, *, d_model: int, depth: int) -> tuple[MixerConfig, ...]:
    """The mixers of `mix` for a model of that width and depth: `ModelConfig.layers`.

    Raises ValueError, which names the item, for an unknown mixer, field or value, a pattern that does not divide the depth, and a mixer
    that does not fit the width.
    """
    layers: list[MixerConfig] = []
    for item in re.split(r",(?![^(]*\))", mix):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f'mix must be mixers like "delta*3,swa(window=512)", got {item!r} in {mix!r}: correct it')
        name, count = match["name"], match["count"] or "1"
        if name not in MIXERS:
            raise ValueError(f"mix must name mixers of {', '.join(MIXERS)}, got {name!r}{nearest(name, MIXERS)}")
        if not count.isdecimal() or not 1 <= int(count) <= depth:
            raise ValueError(f"mix must repeat {name} between 1 and depth = {depth} times, got {count!r}: correct it")
        try:
            config = _AT_WIDTH[name](d_model)
            config = replace(config, **_options(config, match["options"] or ""))
            check_fits(config, d_model)
        except ValueError as error:
            raise ValueError(f"mix {item.strip()!r}: {error}") from None
        layers += [config] * int(count)
    if depth % len(layers):
        raise ValueError(f"mix must have a number of layers that divides depth = {depth}, got {len(layers)} in {mix!r}")
    return tuple(layers)


def _options(config: MixerConfig, text: str) -> dict[str, Any]:
    known, hints = tuple(one.name for one in fields(config)), get_type_hints(type(config))
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in known:
            advice = nearest(name, known) or f": they are {', '.join(known)}"
            raise ValueError(f"options must be like field=value, with a field of {config.kind}, got {part!r}{advice}")
        options[name] = _value(name, value, get_args(hints[name]) or (hints[name],))
    return options


def _value(name: str, text: str, kinds: tuple[type, ...]) -> Any:
    """`text` as the first of `kinds` that it can be."""
    if NoneType in kinds and text == "none":
        return None
    if bool in kinds:
        if text in ("true", "false"):
            return text == "true"
        raise ValueError(f"{name} must be true or false, got {text!r}: correct it")
    for kind in kinds:
        if kind is not NoneType:
            try:
                return kind(text)
            except ValueError:
                pass
    raise ValueError(
        f"{name} must be {' or '.join(kind.__name__ for kind in kinds if kind is not NoneType)}, got {text!r}"
    )
