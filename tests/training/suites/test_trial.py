"""A cell's training: which places it learns, by which rates, and that the same cell gives the same bits."""

import itertools
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support import relative_error

from deltanet.data.synthetic import IGNORED, Examples
from deltanet.training.suites import MODELS, SUITES, Cell, Recipe, Trial, prepare
from deltanet.training.suites import trial as trial_module
from deltanet.training.suites.model import SuiteModel
from deltanet.training.suites.trial import is_diverged

from .conftest import tiny

CPU = torch.device("cpu")


def trial(cell: Cell, device: torch.device = CPU, graph: bool | None = None, compile: bool = False) -> Trial:
    train = prepare(cell.train, cell.recipe.train_examples, seed=cell.seed, split="train", device=device)
    tests = {
        name: prepare(test.task, test.examples, seed=cell.seed, split=test.split, device=device)
        for name, test in cell.tests.items()
    }
    return Trial(cell, train, tests, device=device, graph=graph, compile=compile)


def weights(trial: Trial) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trial.model.parameters()])


def test_rates_of_the_protocols() -> None:
    zoology = Recipe(train_examples=10, batch_size=2, epochs=4)
    rates = zoology.learning_rates(1.0)
    assert len(rates) == 20
    assert rates[:5] == [1.0] * 5
    assert rates[10:15] == pytest.approx([0.5] * 5)  # half of the cosine, and constant within an epoch
    regbench = replace(zoology, schedule="step", warmup_epochs=2, final_share=0.1, epochs=10)
    rates = regbench.learning_rates(1.0)
    assert rates[0] == 1e-6
    assert rates[5] == pytest.approx(0.5, abs=1e-5)
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=2e-3)
    assert min(replace(zoology, schedule="step", epochs=100, final_rate=0.3).learning_rates(1.0)) == pytest.approx(0.3, abs=1e-3)


def test_the_head_is_computed_where_something_is_asked() -> None:
    cell = tiny()[0]
    cell = replace(cell, config=replace(cell.config, dropout=0.0))
    one = trial(cell)
    assert one.train.places is not None
    assert one.train.places.shape == (64, 2)
    rows = torch.tensor([3, 0, 7])
    logits = one.model(one.train.inputs[rows])
    examples = cell.train.sample(64, seed=0)
    expected = F.cross_entropy(logits.flatten(0, 1), examples.targets[rows].flatten(), ignore_index=IGNORED)
    assert relative_error(one._loss(rows), expected) < 1e-6


def test_a_token_of_many_places_is_found_and_its_row_is_learned_apart() -> None:
    cell = tiny()[0]
    inputs = prepare(cell.train, 64, seed=0, split="train", device=CPU).inputs
    assert trial_module._common(inputs) == 0  # MQAR's filler: 6 of 12 places
    assert trial_module._common(inputs.clamp(min=1) + torch.arange(12, dtype=torch.int32)) is None
    gradients = []
    for common in (None, 0, 3):
        model = SuiteModel(cell.config).double()
        model.init_weights(torch.Generator().manual_seed(0))
        x = model.embedded(inputs, common)
        assert torch.equal(x, model.embeddings(inputs))
        x.backward(torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)))
        gradients.append(model.embeddings.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert gradients[0][0].abs().sum() > 0


def test_targets_everywhere_are_learned_everywhere() -> None:
    grid = replace(SUITES["mad"].grid(quick=False), tasks=("in_context_recall.baseline",), models=("attention",))
    cell = SUITES["mad"].cells(grid, "float32")[0]
    train = prepare(cell.train, 8, seed=0, split="train", device=CPU)
    assert train.places is None
    assert train.labels.shape == train.inputs.shape


def test_predictions_stand_where_they_are_asked() -> None:
    one = trial(tiny()[0])
    prepared = one.tests["test"]
    found = one._predict("test").tokens
    assert isinstance(prepared.examples, Examples)
    asked = prepared.examples.targets != IGNORED
    expected = one.model(prepared.inputs).argmax(-1)
    assert torch.equal(found[asked], expected[asked])
    assert (found[~asked] == IGNORED).all()
    loss = F.cross_entropy(one.model(prepared.inputs).flatten(0, 1), prepared.examples.targets.flatten(), ignore_index=IGNORED)
    assert one._predict("test").loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_same_cell_gives_the_same_bits_and_another_seed_others() -> None:
    def end(cell: Cell) -> torch.Tensor:
        one = trial(cell)
        list(one.run())
        return weights(one)

    cell = tiny(shuffle=True)[0]
    first, again, other = end(cell), end(cell), end(replace(cell, seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(weights(trial(cell)), weights(trial(replace(cell, seed=1))))  # from the first values on


def test_every_step_counts_and_takes_its_own_batch() -> None:
    cell = tiny(shuffle=False)[0]
    one, seen = trial(cell), list[list[int]]()
    original = one._loss
    one._loss = lambda rows: (seen.append(rows.tolist()), original(rows))[1]  # type: ignore[method-assign]
    found = [x for x in one.run() if x is not None]
    assert [x.epoch for x in found] == [1, 2]
    assert sorted(row for rows in seen[:4] for row in rows) == list(range(64))
    assert seen[:4] == seen[4:]
    assert one.done == one.recipe.steps == 8
    assert float(one.rate) == pytest.approx(one.recipe.learning_rates(cell.learning_rate)[-1])


def test_it_stops_above_the_threshold_and_when_the_loss_is_lost() -> None:
    assert len([x for x in trial(tiny(stop_above=-1.0)[0]).run() if x]) == 1
    lost = trial(tiny(rates=(1.0,))[0])
    with torch.no_grad():
        lost.model.embeddings.weight[3] = float("nan")
    assert len([x for x in lost.run() if x]) == 1
    assert is_diverged(lost.history)


def test_patience_ends_what_gets_no_better() -> None:
    cell = tiny(epochs=9, patience=2)[0]
    one = trial(cell)
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    one._scores = lambda predictions: {"test": next(scores)}  # type: ignore[method-assign]
    assert [x.epoch for x in one.run() if x] == [1, 2, 3, 4]  # 0.3 again is no better


def test_a_small_task_is_learned() -> None:
    """Each token's answer is written in the weights: the whole step, from batch to AdamW, must be right for it."""
    cell = tiny(models=("attention",))[0]
    config = replace(cell.config, dropout=0.0, attention_dropout=0.0)
    one = trial(replace(cell, recipe=replace(cell.recipe, epochs=60, shuffle=True), config=config))
    *_, last = [x for x in one.run() if x]
    assert last.loss < 0.2


def ends(one: Trial) -> tuple[torch.Tensor, list[tuple[float, dict[str, float]]]]:
    """Trains on to the end: the weights, and what the evaluations found."""
    list(one.run())
    return weights(one), [(found.loss, found.scores) for found in one.history]


@pytest.mark.parametrize("turns", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_trial_goes_on_where_another_stood(monkeypatch, turns: int, shuffle: bool) -> None:
    """Three turns an epoch: amid one, between its last step and its evaluation, after that, and at the end."""
    monkeypatch.setattr("deltanet.training.suites.trial.BURST", 2)
    cell = tiny(shuffle=shuffle, epochs=3)[0]
    first = trial(cell)
    run = first.run()
    for _ in range(turns):
        next(run)
    tensors, values = first.state()
    second = trial(cell)
    second.restore(tensors, json.loads(json.dumps(values)))
    assert second.done == first.done == sum(x.epoch < 3 for x in first.history) * 4 + {1: 2, 3: 0, 4: 2, 5: 4, 7: 2}[turns]
    whole, gone_on = ends(trial(cell)), ends(second)
    assert torch.equal(gone_on[0], whole[0])
    assert gone_on[1] == whole[1]
    assert torch.equal(first.state()[0]["weights.embeddings.weight"], tensors["weights.embeddings.weight"])  # a copy of its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, values: values.update(done=10**9), "done must be between 1 and 8 steps, got 1000000000"),
        (lambda tensors, values: values.update(history=[{"epoch": 1}]), "history must be evaluations"),
        (lambda tensors, values: values.pop("history"), "history must be evaluations"),
        (lambda tensors, values: tensors.pop("exp_avg.norm.weight"), "exp_avg.norm.weight must be"),
        (lambda tensors, values: tensors.update({"weights.norm.weight": torch.ones(3)}), "weights.norm.weight must be"),
        (lambda tensors, values: tensors.update({"weights.other": torch.ones(3)}), "weights.other must be None"),
        (lambda tensors, values: tensors.update(generator=torch.ones(3)), "generator must be the state of one on cpu"),
        (lambda tensors, values: tensors.pop("generator"), "generator must be the state of one on cpu"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message: str) -> None:
    cell = tiny()[0]
    first, second = trial(cell), trial(cell)
    next(first.run())
    tensors, values = first.state()
    change(tensors, values)
    before = weights(second)
    with pytest.raises(ValueError, match=message):
        second.restore(tensors, values)
    assert second.done == 0
    assert torch.equal(weights(second), before)


@pytest.mark.slow
@pytest.mark.parametrize(("many", "graphs"), [(1, 2), (1024, 1)])
def test_compiled_steps_are_the_same_and_compiled_once(monkeypatch, many: int, graphs: int) -> None:
    """One block for both of a model's, and for both seeds; the loss where there are many ids."""
    compiled = cache(lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager"))
    monkeypatch.setattr(trial_module, "compiled", compiled)
    monkeypatch.setattr(trial_module, "MANY_IDS", many)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in (0, 1):
        ends = []
        for compile in (False, True):
            one = trial(replace(tiny(models=("attention",))[0], seed=seed), compile=compile)
            list(one.run())
            ends.append(weights(one))
        assert relative_error(ends[1], ends[0]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(model: str) -> None:
    one = trial(tiny(models=(model,))[0])
    before = weights(one).clone()
    one._begin_epoch()
    one._steps(2)
    assert torch.isfinite(one.loss)
    assert not torch.equal(before, weights(one))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.model.parameters())


def test_mads_decoder_reads_one_position_and_answers_for_all() -> None:
    grid = replace(SUITES["mad"].grid(quick=False), tasks=("compression.baseline",), models=("deltanet",))
    model = SuiteModel(SUITES["mad"].cells(grid, "float32")[0].config)
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert logits.shape == (2, 32, 16)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 0  # places are told apart
    read = []
    model.decoder.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape))
    model(tokens)
    assert read == [(2, 128)]


def mad_model(task: str, model: str) -> SuiteModel:
    grid = replace(SUITES["mad"].grid(quick=False), tasks=(task,), models=(model,))
    one = SuiteModel(SUITES["mad"].cells(grid, "float32")[0].config)
    one.init_weights(torch.Generator().manual_seed(0))
    return one


def test_mads_matrices_begin_as_in_its_harness() -> None:
    """mad-lab's: N(0, 0.02) in the autoencoder; else embeddings N(0, 0.02), nn.Linear's own, and fla's layers Xavier-uniform with gain 2^-2.5."""

    def largest(module: torch.nn.Module) -> list[float]:
        return [m.weight.detach().abs().max().item() for m in module.modules() if isinstance(m, torch.nn.Linear)]

    own, wide = 128**-0.5, 352**-0.5  # nn.Linear's limit, by the width that it reads
    xavier = [2**-2.5 * (6 / (128 + out)) ** 0.5 for out in (128, 1)]
    model = mad_model("in_context_recall.baseline", "deltanet")
    block = model.layers[1]
    assert sorted(largest(block.mixer)) == pytest.approx([xavier[0]] * 4 + [xavier[1]], rel=0.05)
    assert largest(block.feed_forward) == pytest.approx([own, own, wide], rel=1e-2)
    assert largest(model.lm_head) == pytest.approx([own], rel=1e-2)
    assert model.lm_head.bias is not None
    assert not model.lm_head.bias.any()
    assert model.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert largest(mad_model("in_context_recall.baseline", "attention").layers[0].mixer)[0] == pytest.approx(own, rel=1e-2)
    for module in mad_model("compression.baseline", "deltanet").modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() > 1000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    steps = mad_model("in_context_recall.baseline", "mamba").layers[0].mixer.dt_proj.weight  # has a beginning of its own
    assert steps.abs().max().item() == pytest.approx(steps.shape[1] ** -0.5, rel=0.05)


def test_the_head_has_a_bias_where_it_is_asked_for() -> None:
    model = mad_model("memorization.baseline", "deltanet")
    tokens = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    with torch.no_grad():
        model.lm_head.bias[7] = 3.0
    assert relative_error(model(tokens)[..., 7], before[..., 7] + 3.0) < 1e-6


GPU_MODELS = ["deltanet", "deltanet-noconv", "attention", "gla", "mamba", "gated-deltanet", "deltaproduct"]


def on_a_gpu(model: str) -> Cell:
    cell = tiny(models=(model,), shuffle=True)[0]
    config = replace(cell.config, d_model=64, dropout=0.0, attention_dropout=0.0)
    return replace(cell, config=config, recipe=replace(cell.recipe, precision="bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("model", GPU_MODELS)
def test_a_graph_does_what_the_steps_do(model: str) -> None:
    ends = []
    for graph in (False, True):
        one = trial(on_a_gpu(model), torch.device("cuda"), graph)
        list(one.run())
        ends.append(weights(one))
        assert (one.graph is not None) == graph
        one.close()
    assert relative_error(ends[1], ends[0]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("model", GPU_MODELS)
def test_compiled_blocks_have_the_same_gradient_and_learn_as_well(model: str) -> None:
    """Weights after some steps would say little: AdamW's first steps make as much of a gradient that is rounding as of a large one."""
    gradients, losses = [], []
    for compile in (False, True):
        one = trial(on_a_gpu(model), torch.device("cuda"), False, compile=compile)
        one._begin_epoch()
        one._steps(1)
        one.close()
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None]))
        one = trial(on_a_gpu(model), torch.device("cuda"), compile, compile=compile)
        list(one.run())
        losses.append(one.history[-1].loss)
        one.close()
    assert relative_error(gradients[1], gradients[0]) < 3e-2
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["deltanet", "attention"])
def test_an_evaluation_is_replayed_with_the_weights_of_the_moment(model: str) -> None:
    cell = on_a_gpu(model)
    one = trial(replace(cell, recipe=replace(cell.recipe, epochs=4)), torch.device("cuda"), True)
    seen = []
    for _ in filter(None, one.run()):  # after the second evaluation there is a graph of it
        with one._on_stream():  # where both are made, and so when they are there
            found, expected = one._predict("test").tokens.clone(), one._predict_now(one.tests["test"]).tokens
            assert torch.equal(found, expected)
        seen.append(found)
    assert set(one.evaluations) == {"test"}
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    one.close()


@pytest.mark.gpu
def test_a_graph_goes_on_where_another_stood() -> None:
    cell = tiny(shuffle=True, epochs=4)[0]
    cell = replace(cell, config=replace(cell.config, d_model=64, dropout=0.5))
    whole, first, second = (trial(cell, torch.device("cuda")) for _ in range(3))
    list(whole.run())
    run = first.run()
    while len(first.history) < 2:
        next(run)
    next(run)
    second.restore(*first.state())
    list(second.run())
    assert second.graph is not None
    assert torch.equal(weights(second), weights(whole))
    assert [found.loss for found in second.history] == [found.loss for found in whole.history]
    for one in (whole, first, second):
        one.close()


@pytest.mark.gpu
def test_dropout_differs_from_replay_to_replay() -> None:
    cell = tiny(shuffle=False, epochs=4)[0]
    one = trial(replace(cell, config=replace(cell.config, d_model=64, dropout=0.5), learning_rate=1e-12), torch.device("cuda"))
    losses = []
    one._begin_epoch()
    for _ in range(4):  # the same batch each time, with weights that stand still
        one.at.zero_()
        before = float(one.loss)
        one._steps(1)
        losses.append(float(one.loss) - before)
    one.close()
    assert len(set(losses)) == 4


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("model", ["deltanet", "deltanet-noconv", "attention", "mamba", "gla"])
def test_every_suite_takes_the_line_up(suite: str, model: str) -> None:
    grid = replace(SUITES[suite].grid(quick=False), models=(model,), test_examples=4)
    cell = SUITES[suite].cells(grid, "float32")[0]
    one = SuiteModel(cell.config)
    one.init_weights(torch.Generator().manual_seed(0))
    tokens = cell.train.sample(2, seed=0).inputs[:, :70]
    with torch.no_grad():
        logits = one(tokens)
    assert logits.shape == (*tokens.shape, cell.train.vocab_size)
    assert torch.isfinite(logits).all()
    assert cell.train.score(cell.train.sample(2, seed=0).targets.clamp(min=0), cell.train.sample(2, seed=0)) == 1
