"""The paper's line-up by name: its parameters and states, where a hybrid's layers lie, and that every one of them runs."""

import re
import tomllib

import pytest
import torch

from deltanet.inference import GREEDY, generate, prefill
from deltanet.layers import Attention, AttentionConfig, DeltaNetConfig
from deltanet.models import MODELS, SIZES, LanguageModel, ModelConfig, preset
from deltanet.training.config import RunConfig, TrainConfig, config_from_dict, config_to_toml

# model: parameters at nano (257 bytes), 340m and 1.3b (32,000 tokens, untied).
COUNTS = {
    "transformer++": (853_120, 373_867_520, 1_364_297_728),
    "retnet": (755_200, 380_171_264, 1_351_727_104),
    "mamba": (765_568, 385_565_696, 1_400_276_992),
    "gla": (862_624, 374_475_776, 1_365_514_240),
    "gla+conv": (865_696, 374_672_384, 1_365_907_456),
    "deltanet-noconv": (854_080, 374_067_200, 1_365_087_232),
    "deltanet": (858_688, 374_362_112, 1_365_677_056),
    "deltanet+swa": (856_832, 374_114_816, 1_364_987_392),
    "deltanet+global": (856_832, 374_320_896, 1_365_562_112),
    "deltanet-l1-elu": (858_688, 374_362_112, 1_365_677_056),
    "deltanet-l2-elu": (858_688, 374_362_112, 1_365_677_056),
    "deltanet-l2-relu": (858_688, 374_362_112, 1_365_677_056),
    "deltanet-negative": (858_688, 374_362_112, 1_365_677_056),
    "gated-deltanet": (960_772, 379_888_124, 1_387_859_704),
    "deltaproduct": (960_832, 380_143_232, 1_388_544_640),
}


def on_meta(size: str, model: str) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(preset(size, 257 if size == "nano" else 32000, model=model))


@pytest.mark.parametrize("model", MODELS)
def test_parameters(model: str) -> None:
    counts = tuple(on_meta(size, model).parameter_count() for size in ("nano", "340m", "1.3b"))
    assert counts == COUNTS[model]


@pytest.mark.parametrize("model", MODELS)
def test_every_size_is_near_deltanets(model: str) -> None:
    for size in SIZES:
        ratio = on_meta(size, model).parameter_count() / on_meta(size, "deltanet").parameter_count()
        assert 0.87 < ratio < 1.13, size


def memory(state: object) -> int:
    """Numbers of the memory or cache alone, as the paper counts: without the convolution's tails."""
    if hasattr(state, "memory"):
        return state.memory.numel()
    return state.keys.numel() + state.values.numel() if hasattr(state, "keys") else sum(map(memory, state))


# The paper's column "State exp.": numbers remembered per layer and unit of width, at 340m and 1.3b (section 4.2, table 1).
STATES = {
    "retnet": (512, 512),
    "mamba": (64, 64),
    "gla": (128, 256),
    "gla+conv": (128, 256),
    "deltanet-noconv": (128, 128),
    "deltanet": (128, 128),
    "deltanet+swa": (1087, 1087),  # "about 1000": (128 + 2 * 1023) / 2, the window's last token not being kept
}


@pytest.mark.parametrize("model", STATES)
def test_states_are_the_papers(model: str) -> None:
    for size, expected in zip(("340m", "1.3b"), STATES[model], strict=True):
        built = on_meta(size, model)
        units = built.config.depth * built.config.d_model
        assert memory(built.init_state(1, torch.device("meta"))) == expected * units


def test_a_cache_grows_and_a_memory_does_not() -> None:
    """Bytes of the state after 4,096 tokens over those at the start, in fp32."""
    for model, growth in {"transformer++": 24 * 2, "deltanet+global": 2 * 2, "deltanet": 0, "deltanet+swa": 0}.items():
        built = on_meta("340m", model)
        assert built.state_bytes(3, 4096) - built.state_bytes(3) == 3 * growth * 4096 * 1024 * 4


def test_where_a_hybrids_attention_is() -> None:
    def attention(config) -> list[int]:
        return [
            i + 1 for i in range(config.depth) if isinstance(config.layers[i % len(config.layers)], AttentionConfig)
        ]

    assert attention(preset("340m", model="deltanet+swa")) == list(range(2, 25, 2))
    assert attention(preset("340m", model="deltanet+global")) == [2, 13]
    assert attention(preset("nano", model="deltanet+swa")) == [2]
    assert attention(preset("micro", model="deltanet+global")) == [2, 4]
    assert preset("1.3b", model="deltanet+swa").layers == (
        DeltaNetConfig(heads=16),
        AttentionConfig(heads=32, window=1024),
    )
    assert preset("nano", model="deltanet+swa", window=8).layers[1].window == 8


@pytest.mark.parametrize("model", MODELS)
def test_runs_learns_and_streams(model: str) -> None:
    """Loss and gradients are finite, every parameter has one, and streaming gives the whole forward's logits."""
    torch.manual_seed(0)
    built = LanguageModel(preset("nano", 257, model=model))
    tokens = torch.randint(257, (2, 40))
    loss = built.losses(tokens[:, :-1], tokens[:, 1:]).mean()
    assert 5 < loss.item() < 6.5  # log(257) = 5.5
    loss.backward()
    for name, parameter in built.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    with torch.no_grad():
        whole, _ = built(tokens)
        state = built.init_state(2)
        for part, expected in zip(tokens.split([33, 1, 6], 1), whole.split([33, 1, 6], 1), strict=True):
            logits, state = built(part, state)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_is_built_on_meta_and_filled_later(model: str) -> None:
    """`init_weights` leaves nothing as it was found, and the same generator gives the same model."""
    models = []
    for _ in range(2):
        built = on_meta("nano", model).to_empty(device="cpu")
        for parameter in built.parameters():
            parameter.data.fill_(torch.nan)
        built.init_weights(torch.Generator().manual_seed(5))
        models.append(built.state_dict())
    assert all(torch.isfinite(x).all() for x in models[0].values())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("model", MODELS)
def test_is_a_value_in_a_file(model: str) -> None:
    config = RunConfig(model=preset("340m", model=model), train=TrainConfig(steps=1))
    assert config_from_dict(tomllib.loads(config_to_toml(config))) == config


def test_is_named_in_a_file() -> None:
    def model(text: str) -> ModelConfig:
        return config_from_dict(tomllib.loads(f"[model]\n{text}\n[train]\nsteps = 1")).model

    assert model('size = "340m"\nname = "gla+conv"') == preset("340m", model="gla+conv")
    assert model('name = "mamba"\nsize = "nano"\nvocab_size = 257') == preset("nano", 257, model="mamba")
    assert model('size = "nano"') == preset("nano")
    with pytest.raises(ValueError, match=r"\[model\] model must be one of .*, got 'mumba'. Did you mean 'mamba'\?"):
        model('size = "nano"\nname = "mumba"')
    with pytest.raises(TypeError, match=r"\[model\] name must be a string, got 3"):
        model('size = "nano"\nname = 3')


def test_a_hybrid_stops_at_its_caches_end() -> None:
    config = preset("nano", 257, model="deltanet+global")
    built = LanguageModel(config)
    layer = next(module for module in built.modules() if isinstance(module, Attention))
    layer.config = AttentionConfig(heads=2, max_context=6)
    for refused in (lambda: generate(built, [[1, 2, 3]], max_tokens=5), lambda: prefill(built, [[1] * 7])):
        with pytest.raises(ValueError, match=re.escape("the attention cache takes max_context = 6 tokens, got 7: ask for fewer")):
            refused()
    assert len(generate(built, [[1, 2, 3]], GREEDY, max_tokens=4)[0]) == 4  # the last one is not read
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    _, state = built(tokens, built.init_state(1))
    _, state = built(tokens[:, :1], state)
    with pytest.raises(ValueError, match=re.escape("the attention cache takes max_context = 6 tokens, got 7")):
        built(tokens[:, :1], state)


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model must be one of transformer\+\+, .*got 'gla\+cov'. Did you mean 'gla\+conv'\?"
    ):
        preset("nano", model="gla+cov")
    with pytest.raises(ValueError, match="window is an option of deltanet\\+swa, got 64 for gla: leave it out"):
        preset("nano", model="gla", window=64)
    with pytest.raises(ValueError, match="window must be between 1 and 2147483648, got 0"):
        preset("nano", model="deltanet+swa", window=0)
