"""The rate is a function of the step alone; only matrices decay; what AdamW keeps goes through names and comes back."""

import math

import pytest
import torch

from deltanet.layers import DeltaNetConfig
from deltanet.models import LanguageModel, ModelConfig
from deltanet.training import TrainConfig
from deltanet.training.optimizer import build_optimizer, learning_rate, load_optimizer, optimizer_tensors


def test_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    config = TrainConfig(steps=101, learning_rate=3e-4, learning_rate_floor=0.1, warmup_steps=20)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[0] == rates[100] == pytest.approx(3e-5)
    assert rates[20] == max(rates) == pytest.approx(3e-4)
    assert rates[10] == pytest.approx((3e-5 + 3e-4) / 2)  # half way up
    assert rates[60] == pytest.approx((3e-5 + 3e-4) / 2)  # half way down
    assert rates[40] == pytest.approx(3e-5 + 2.7e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(500, 101, config) == pytest.approx(3e-5)


def test_rate_stays_at_the_peak_while_the_length_is_unknown() -> None:
    config = TrainConfig(minutes=1.0, learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(step, None, config) for step in (0, 1, 2, 50)] == pytest.approx([0.1, 0.55, 1, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_decay(tied: bool) -> None:
    config = ModelConfig(vocab_size=9, d_model=8, depth=1, layers=(DeltaNetConfig(heads=1),), tie_embeddings=tied)
    model = LanguageModel(config)
    groups = build_optimizer(model, TrainConfig(steps=1, weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = {name: decay[id(p)] for name, p in model.named_parameters()}
    kept = {name for name, value in names.items() if value == 0}
    assert all(value == 0.3 for name, value in names.items() if name not in kept)
    assert {name for name in names if "norm" in name or "conv" in name or "embeddings" in name} == kept
    assert ("lm_head.weight" in names) is not tied
    assert len(decay) == len(names)


def test_what_adamw_keeps_comes_back() -> None:
    config = ModelConfig(vocab_size=9, d_model=8, depth=1, layers=(DeltaNetConfig(heads=1),), tie_embeddings=True)
    models = [LanguageModel(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, TrainConfig(steps=1, learning_rate=0.1)) for model in models]
    tokens = torch.arange(8)[None]

    def step(which: int) -> None:
        optimizers[which].zero_grad()
        models[which].losses(tokens, tokens + 1).mean().backward()
        optimizers[which].step()

    assert optimizer_tensors(models[0], optimizers[0]) == {}
    step(0)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer(
        models[1], optimizers[1], {k: v.clone() for k, v in optimizer_tensors(models[0], optimizers[0]).items()}
    )
    step(0)
    step(1)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
