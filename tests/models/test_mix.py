"""Patterns of mixers in one line: what they mean, and what is refused by name before anything is built."""

import re

import pytest

from deltanet.layers import AttentionConfig, DeltaNetConfig, GatedLinearAttentionConfig, MambaConfig
from deltanet.models import MIXERS, ModelConfig, parse_mix


def test_names_counts_and_fields() -> None:
    delta, swa = DeltaNetConfig(heads=2), AttentionConfig(heads=2, window=1024)
    assert parse_mix("delta*3,swa", d_model=128, depth=8) == (delta, delta, delta, swa)
    assert parse_mix(" delta , swa( window = 8 ) * 2 ", d_model=128, depth=3) == (
        delta,
        AttentionConfig(heads=2, window=8),
        AttentionConfig(heads=2, window=8),
    )
    mixed = "mamba,gla(short_conv=4,gate_divisor=2),delta(negative_eigenvalues=true,feature_map=relu,head_dim=none)"
    assert parse_mix(mixed, d_model=128, depth=3) == (
        MambaConfig(),
        GatedLinearAttentionConfig(short_conv=4, gate_divisor=2.0),
        DeltaNetConfig(heads=2, negative_eigenvalues=True, feature_map="relu"),
    )


def test_heads_follow_the_width() -> None:
    heads = {d: parse_mix("delta,attention,retnet", d_model=d, depth=3) for d in (128, 256, 512, 1024, 2048)}
    assert {d: tuple(mixer.heads for mixer in layers) for d, layers in heads.items()} == {
        128: (2, 2, 2),
        256: (4, 4, 2),
        512: (4, 8, 2),
        1024: (8, 16, 4),
        2048: (16, 32, 8),
    }


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_fits_any_preset_width(name: str) -> None:
    for d_model in (128, 256, 512, 768, 1024, 2048):
        ModelConfig(vocab_size=9, d_model=d_model, depth=2, layers=parse_mix(name, d_model=d_model, depth=2))


BAD = [
    ("", "mix must be mixers like \"delta*3,swa(window=512)\", got ''"),
    ("delta,,swa", "got '' in 'delta,,swa'"),
    ("delta swa", "got 'delta swa' in 'delta swa'"),
    (
        "dleta",
        "mix must name mixers of delta, gated_delta, delta_product, gla, retnet, mamba, attention, swa, got 'dleta'. Did you mean 'delta'?",
    ),
    ("delta*3", "mix must have a number of layers that divides depth = 8, got 3 in 'delta*3'"),
    ("delta*0", "mix must repeat delta between 1 and depth = 8 times, got '0'"),
    ("delta*x", "mix must repeat delta between 1 and depth = 8 times, got 'x'"),
    ("delta*1000000000", "mix must repeat delta between 1 and depth = 8 times"),
    ("delta,swa(window=0)", "mix 'swa(window=0)': window must be between 1 and 2147483648, got 0"),
    ("delta(heads=3)", "mix 'delta(heads=3)': heads must divide d_model = 128, got 3; or give head_dim"),
    ("gla(heads=3)", "mix 'gla(heads=3)': heads must divide the width of the keys, 64, and of the values, 128, got 3"),
    ("retnet(heads=128)", "heads must be at most 19, got 128"),
    ("attention(heads=128)", "heads must leave an even width, got 128 of 1"),
    ("delta(head=3)", "options must be like field=value, with a field of delta, got 'head=3'. Did you mean 'heads'?"),
    ("swa(8)", "options must be like field=value, with a field of attention, got '8'"),
    ("delta(short_conv=four)", "short_conv must be int, got 'four'"),
    ("delta(negative_eigenvalues=yes)", "negative_eigenvalues must be true or false, got 'yes'"),
]


@pytest.mark.parametrize(("mix", "message"), BAD)
def test_is_refused(mix: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_mix(mix, d_model=128, depth=8)


def test_a_model_refuses_a_mixer_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="heads must divide d_model = 128, got 3"):
        ModelConfig(vocab_size=9, d_model=128, depth=1, layers=(AttentionConfig(heads=3),))
