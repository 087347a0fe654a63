"""MQAR's suite: what its models are made of, and that weights set by hand solve it through all that a cell's evaluation does."""

from dataclasses import replace

import pytest
import torch

from deltanet.data.synthetic import IGNORED, MQAR
from deltanet.training.suites import SUITES, Cell, Trial, prepare
from deltanet.training.suites.model import SuiteModel, SuiteModelConfig

CPU = torch.device("cpu")


def cell(task: str, model: str, width: int) -> Cell:
    grid = replace(SUITES["mqar"].grid(quick=False), tasks=(task,), models=(model,), widths=(width,), learning_rates=(1e-3,))
    return SUITES["mqar"].cells(grid, "float32")[0]


@pytest.mark.parametrize(
    ("model", "depth", "heads", "norm", "feed_forward", "dropout", "positions"),
    [
        ("deltanet-noconv", 4, 2, "layer", "identity", 0.1, 0),
        ("gla", 2, 2, "layer", "identity", 0.1, 0),
        ("retnet", 2, 2, "layer", "identity", 0.1, 0),
        ("attention", 2, 1, "layer", "identity", 0.1, 512),
        ("mamba", 2, None, "rms", "none", 0.0, 0),
    ],
)
def test_models_of_the_protocol(model, depth, heads, norm, feed_forward, dropout, positions) -> None:
    config = cell("512x64", model, 64).config
    assert (config.depth, getattr(config.mixer, "heads", None), config.norm) == (depth, heads, norm)
    assert (config.feed_forward, config.dropout, config.positions) == (feed_forward, dropout, positions)
    assert config.attention_dropout == (0.1 if model == "attention" else 0.0)
    assert config.tie_embeddings
    assert config.init == ("mamba" if model == "mamba" else "scaled")
    assert not getattr(config.mixer, "rotary", False)
    if model in ("gla", "retnet"):  # the widths of both layers when the paper's figure was made: keys as wide as the model, values twice
        assert (config.mixer.expand_k, config.mixer.expand_v) == (1.0, 2.0)
    assert getattr(config.mixer, "gate_divisor", 128.0) == 128.0


def test_mamba_begins_as_its_authors_do() -> None:
    """state-spaces/mamba: nn.Linear's own beginning, what is written to the residual stream divided by sqrt(depth), embeddings N(0, 0.02)."""
    model = SuiteModel(replace(cell("64x4", "mamba", 64).config, depth=4))
    model.init_weights(torch.Generator().manual_seed(0))
    layer = model.layers[3].mixer
    for module, limit in ((layer.in_proj, 64**-0.5), (layer.x_proj, 128**-0.5), (layer.o_proj, (4 * 128) ** -0.5)):
        assert module.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert layer.dt_proj.weight.abs().max().item() == pytest.approx(layer.step_rank**-0.5, rel=0.05)
    assert 1e-3 <= torch.nn.functional.softplus(layer.dt_proj.bias).min() <= torch.nn.functional.softplus(layer.dt_proj.bias).max() <= 0.1
    assert model.lm_head.weight is model.embeddings.weight
    assert model.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_the_identity_adds_the_normalised_stream() -> None:
    config = cell("64x4", "attention", 16).config
    model = SuiteModel(replace(config, vocab_size=8, depth=1))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.layers[0].mixer.o_proj.weight.zero_()
        model.layers[0].feed_forward_norm.weight.fill_(2.0)
        x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))
        y = x + model.positions.weight[:4]
        expected = y + 2 * torch.nn.functional.layer_norm(y, (16,))
        torch.testing.assert_close(model.body(x), expected)


@pytest.mark.parametrize("rotary", [False, True])
def test_dropout_of_attention_is_of_its_weights(rotary: bool) -> None:
    config = replace(cell("64x4", "attention", 16).config, vocab_size=8, depth=1, attention_dropout=0.25)
    config = replace(config, mixer=replace(config.mixer, rotary=rotary))
    block = SuiteModel(config).layers[0].double()
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    every = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    layer = block.mixer
    torch.testing.assert_close(block._attend(x, every), layer(x)[0] / 0.75)  # those kept count for those that are not
    kept = torch.rand(2, 1, 64, 64) < 0.75
    only = [torch.zeros(2, 1, 64, 64, dtype=torch.bool).index_fill(3, torch.tensor([j]), True) for j in range(64)]
    parts = sum(block._attend(x, one) * kept[:, 0, :, j, None] for j, one in enumerate(only))  # what each place gives, if kept
    torch.testing.assert_close(block._attend(x, kept), parts)


def test_dropout_of_attention_is_drawn_in_training_alone() -> None:
    one = cell("64x4", "attention", 16)
    one = replace(one, config=replace(one.config, dropout=0.0, attention_dropout=0.5))
    sets = prepare(one.train, 128, seed=0, split="train", device=CPU)
    trial = Trial(one, sets, {}, device=CPU)
    rows = torch.arange(8)
    assert trial._loss(rows) != trial._loss(rows)
    kept = trial.model.kept(sets.inputs[rows], trial.generator)
    assert kept is not None
    assert kept.embeddings is None
    assert [w.shape for w in kept.weights] == [(8, 1, 64, 64)] * 2
    assert torch.stack(kept.weights).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(trial.model(sets.inputs[rows]), trial.model(sets.inputs[rows]))


@pytest.mark.parametrize("other", [{"window": 3}, {"heads": 2, "kv_heads": 1}, None])
def test_dropout_of_attention_is_refused_where_it_would_do_nothing(other) -> None:
    config = cell("64x4", "attention", 16).config
    mixer = replace(config.mixer, **other) if other else cell("64x4", "gla", 16).config.mixer
    with pytest.raises(ValueError, match="attention_dropout must be 0 but for"):
        replace(config, mixer=mixer)


@torch.no_grad()
def solve_by_hand(model: SuiteModel, config: SuiteModelConfig) -> None:
    """Sets two layers of attention to the recall circuit: the first tells each token the one before it, the second finds the
    place whose token before is the query and adds the token there, loudly, to what the head reads.

    Channels: V of the token, T of the place, V of the token before.
    """
    V, T = config.vocab_size, config.positions
    token, place, before = slice(0, V), slice(V, V + T), slice(V + T, 2 * V + T)
    for parameter in (p for name, p in model.named_parameters() if not name.endswith("norm.weight")):
        parameter.zero_()
    model.embeddings.weight[:, token] = torch.eye(V)
    model.positions.weight[:, place] = 2 * torch.eye(T)
    first, second = (block.mixer for block in model.layers)
    first.q_proj.weight[place, place] = 100 * torch.eye(T).roll(-1, 0)  # place t asks for place t - 1
    first.k_proj.weight[place, place] = torch.eye(T)
    first.v_proj.weight[token, token] = torch.eye(V)
    first.o_proj.weight[before, token] = torch.eye(V)
    second.q_proj.weight[token, token] = 100 * torch.eye(V)
    second.k_proj.weight[token, before] = torch.eye(V)
    second.q_proj.weight[V, place] = 100  # the first place has none before it and sees itself: nobody shall look there
    second.k_proj.weight[V, V] = -1
    second.v_proj.weight[token, token] = torch.eye(V)
    second.o_proj.weight[token, token] = 100 * torch.eye(V)
    model.norm.weight.fill_(10)


def test_two_layers_of_attention_set_by_hand_solve_it() -> None:
    one = cell("64x8x64", "attention", 64 + 64 + 64)
    one = replace(one, config=replace(one.config, dropout=0.0, attention_dropout=0.0))
    tests = {"test": prepare(one.train, 200, seed=0, split="test", device=CPU)}
    trial = Trial(one, prepare(one.train, 128, seed=0, split="train", device=CPU), tests, device=CPU)
    solve_by_hand(trial.model, one.config)
    assert trial._scores({"test": trial._predict("test")}) == {"test": 1.0}
    assert trial._loss(torch.arange(16)).item() < 0.05  # the targets of training stand where those of the test do


@pytest.mark.parametrize("filler", ["zero", "random"])
@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (512, 64)])
def test_looking_keys_up_in_the_pairs_solves_it(length: int, pairs: int, filler: str) -> None:
    task = MQAR(length=length, pairs=pairs, filler=filler)
    examples = task.sample(50, seed=3, split="test")
    keys, values = examples.inputs[:, 0 : 2 * pairs : 2], examples.inputs[:, 1 : 2 * pairs : 2]
    same = examples.inputs[:, :, None] == keys[:, None]  # [N, T, K]
    found = torch.where(same.any(-1), values.gather(1, same.int().argmax(-1)), 0)
    assert float(task.score(found, examples)) == 1.0
    assert (found[examples.targets != IGNORED] >= task.vocab_size // 2).all()
