"""What a token costs: the model's state stays as large as it is, attention's cache grows; both really decode."""

import pytest
import torch

from deltanet.evaluation.decoding import AttentionModel, AttentionStep, Cache, decoding_costs
from deltanet.layers import DeltaNetConfig
from deltanet.models import LanguageModel, ModelConfig


@pytest.fixture(scope="module")
def config():
    return ModelConfig(vocab_size=50, d_model=128, depth=2, layers=(DeltaNetConfig(heads=2),), feed_forward=64)


def test_costs_are_measured_and_counted(config):
    model = LanguageModel(config)
    costs = decoding_costs(model, [8, 16, 100])
    assert [cost.context for cost in costs] == [8, 16, 100]
    assert all(0 < cost.model_ms < 1000 and 0 < cost.attention_ms < 1000 for cost in costs)
    assert {cost.model_bytes for cost in costs} == {model.state_bytes()}
    # Keys and values, of every layer and token, in fp32.
    assert [cost.attention_bytes for cost in costs] == [2 * config.depth * n * config.d_model * 4 for n in (8, 16, 100)]


def test_the_model_reads_the_context_once(config, monkeypatch):
    read = []
    hidden = LanguageModel.hidden
    monkeypatch.setattr(
        LanguageModel, "hidden", lambda self, ids, *a, **k: read.append(ids.shape[1]) or hidden(self, ids, *a, **k)
    )
    decoding_costs(LanguageModel(config), [8, 16, 100])
    assert [width for width in read if width > 1] == [8, 8, 84]


def test_attention_with_a_cache_is_attention(config):
    """Token by token with the cache equals causal attention over the whole sequence, written out."""
    torch.manual_seed(0)
    model = AttentionModel(config).double()
    heads, tokens = model.heads, torch.randint(50, (1, 9))
    empty = [
        Cache(keys=torch.zeros(1, heads, 9, 64).double(), values=torch.zeros(1, heads, 9, 64).double(), length=0)
        for _ in range(2)
    ]
    stepped = torch.cat([model(tokens[:, t : t + 1], empty) for t in range(9)], dim=1)

    x = model.embeddings(tokens)
    for layer in model.layers:
        q, k, v = layer.qkv_proj(layer.mixer_norm(x)).unflatten(-1, (3, heads, 64)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 8).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        x = x + layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    torch.testing.assert_close(stepped, model.lm_head(model.norm(x)), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_attention_remembers_what_it_makes(config):
    model = AttentionModel(config)
    cache = model.init_cache(20)
    for layer in cache:
        layer.length = 15
    step, token = AttentionStep(model, cache), torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(3):
        token = step(token)
    assert token.shape == (1, 1)
    assert [layer.length for layer in cache] == [18, 18]


@pytest.mark.parametrize("contexts", [[], [0], [8, 8], [16, 8]])
def test_lengths_must_increase(config, contexts):
    with pytest.raises(ValueError, match="contexts must be lengths that increase from at least 1"):
        decoding_costs(LanguageModel(config), contexts)
