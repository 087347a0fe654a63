"""Steps of generation as a CUDA graph: the same bits as launched one by one, whatever mixes the tokens."""

import pytest
import torch
from torch import Tensor

from deltanet.inference import Step, prefill
from deltanet.layers import state_bytes
from deltanet.models import LanguageModel, ModelConfig, parse_mix

MIXES = ["delta", "gated_delta", "delta_product", "delta(short_conv=0)", "delta,swa(window=9)", "gla", "gla(short_conv=3)", "retnet", "mamba"]
GROWING = ["attention", "delta,attention"]


def model_of(mix: str, device: str, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    layers = parse_mix(mix, d_model=128, depth=2)
    return LanguageModel(ModelConfig(vocab_size=50, d_model=128, depth=2, layers=layers, init_std=0.1)).to(device, dtype).eval()


def run(model: LanguageModel, state, tokens: Tensor, count: int, *, graph: bool = True) -> tuple[list[Tensor], Step]:
    step, found = Step(model, state, graph=graph), []
    for _ in range(count):
        found.append(step(tokens).clone())
        tokens = found[-1].argmax(-1)
    return found, step


def test_steps_go_on_from_a_state_and_leave_it_as_it_is() -> None:
    model = model_of("delta", "cpu", torch.float32)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    state = prefill(model, list(ids)).state
    first, _ = run(model, state, ids[:, -1], 12)
    again, step = run(model, state, ids[:, -1], 12)
    assert step._graph is None
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [*MIXES, *GROWING])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_gives_the_same_bits(mix: str, batch: int) -> None:
    model = model_of(mix, "cuda", torch.bfloat16)
    ids = torch.randint(50, (batch, 9), generator=torch.Generator().manual_seed(0)).cuda()
    state = prefill(model, list(ids)).state
    captured, step = run(model, state, ids[:, -1], 30)
    assert (step._graph is None) == (mix in GROWING)
    before = state_bytes(state)
    eager, step = run(model, state, ids[:, -1], 30, graph=False)
    assert step._graph is None
    assert state_bytes(state) == before
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_graph_reads_the_weights_of_today_under_autocast() -> None:
    """Training writes samples under autocast, and the weights change between them."""
    model = model_of("delta", "cuda", torch.float32)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        state = prefill(model, list(ids)).state
        _, step = run(model, state, ids[:, -1], 20)
    assert step._graph is not None
    first = step(ids[:, 0]).clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    second = step(ids[:, 0])
    assert not torch.equal(first, second)
    assert second.isfinite().all()
