"""Cells alike but for rate and decay as one model: each is trained as it would be alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import relative_error

from deltanet.training.suites import SUITES, Cell, Store, Trial, prepare
from deltanet.training.suites.group import Group, grouped
from deltanet.training.suites.stacked import stack
from deltanet.training.suites.trial import begun

from .conftest import Watching, train

CPU = torch.device("cpu")


def small(task: str, model: str = "deltanet", heads: int = 1, precision: str = "float32", **grid: Any) -> list[Cell]:
    """Four cells of MAD at width 16: two rates and two decays, a few steps each."""
    options = {"learning_rates": (1e-3, 5e-3), "weight_decays": (0.0, 0.5), "epochs": (2,), "train_examples": 64, "batch_size": 32, **grid}
    full = replace(SUITES["mad"].grid(quick=False), tasks=(task,), models=(model,), widths=(16,), heads=heads, test_examples=16)
    cells = SUITES["mad"].cells(replace(full, **options), precision)
    return [replace(cell, recipe=replace(cell.recipe, evaluate_every=1)) for cell in cells]


def examples(cell: Cell, device: torch.device = CPU) -> tuple[Any, dict[str, Any]]:
    tests = {name: prepare(test.task, test.examples, seed=0, split="test", device=device) for name, test in cell.tests.items()}
    return prepare(cell.train, cell.recipe.train_examples, seed=0, split="train", device=device), tests


KINDS = [
    ("compression.baseline", "deltanet", 1),  # the decoder, which adds the code of a place
    ("memorization.baseline", "deltanet", 2),  # few places are asked
    ("memorization.vocab_size=512", "attention", 4),
]


@pytest.mark.parametrize(("task", "model", "heads"), KINDS)
def test_each_of_a_group_is_trained_as_alone(task: str, model: str, heads: int) -> None:
    cells = small(task, model, heads)[::3]
    together = Group(cells, *examples(cells[0]), device=CPU)
    list(together.run())
    for g, cell in enumerate(cells):
        alone = Trial(cell, *examples(cell), device=CPU)
        list(alone.run())
        assert [x.scores for x in together.histories[g]] == [x.scores for x in alone.history]
        for found, expected in zip(together.histories[g], alone.history, strict=True):
            assert found.loss == pytest.approx(expected.loss, abs=2e-5)
            assert found.losses["test"] == pytest.approx(expected.losses["test"], abs=2e-5)
        ours, theirs = together.state(g)[0], alone.state()[0]
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name.startswith("weights."):
                assert relative_error(ours[name], theirs[name]) < 1e-3, name


def test_one_that_has_solved_its_task_is_measured_no_more() -> None:
    cells = [replace(cell, recipe=replace(cell.recipe, stop_above=0.02)) for cell in small("memorization.baseline", epochs=(20,))]
    together = Group(cells, *examples(cells[0]), device=CPU)
    list(together.run())
    epochs = [history[-1].epoch for history in together.histories]
    alone = [Trial(cell, *examples(cell), device=CPU) for cell in cells]
    assert epochs == [[*filter(None, one.run())][-1].epoch for one in alone]
    assert min(epochs) < max(epochs) == 20


def test_a_common_token_is_looked_up_in_each_models_embeddings() -> None:
    model = stack([begun(cell) for cell in small("selective_copying.baseline")[:2]])
    tokens = torch.tensor([[14, 14, 3, 14], [14, 5, 14, 15]])
    ends = []
    for common in (None, 14):
        model.zero_grad()
        x = model.embedded(tokens, common)
        x.square().sum().backward()
        ends.append((x.detach(), model.embeddings.weight.grad))
    assert ends[0][0].shape == (2, 4, 32)
    assert torch.equal(ends[0][0], ends[1][0])
    assert relative_error(ends[1][1], ends[0][1]) < 1e-6


def test_what_cannot_be_one_model_stays_apart() -> None:
    cells = small("compression.baseline")
    assert grouped(cells, 6) == [cells]
    assert grouped(cells, 3) == [cells[:3], cells[3:]]
    assert grouped(cells, 1) == [[cell] for cell in cells]
    others = small("compression.vocab_size=32")
    assert grouped([*cells, *others], 6) == [cells, others]
    mamba = small("compression.baseline", "mamba")
    assert grouped(mamba, 6) == [[cell] for cell in mamba]


def test_a_grid_is_the_same_in_groups_and_stopped_groups_go_on(tmp_path) -> None:
    cells = small("memorization.baseline", epochs=(4,))
    ends = []
    for name, stacked, stops in (("alone", 1, 0), ("group", 4, 0), ("stopped", 4, 2)):
        store = Store(tmp_path / name, "mad")
        for _ in range(stops):
            assert train(cells, store, stacked=stacked, minutes=1e-9) == "time"
            assert all(store.standing(cell) is not None for cell in cells)
        watcher = Watching()
        assert train(cells, store, watcher, stacked=stacked) == "finished"
        assert watcher.progress is not None
        assert (watcher.progress.done, watcher.progress.cells) == (4, 4)
        assert watcher.progress.work_done == pytest.approx(watcher.progress.work)
        assert not list(store.cells.glob("*.safetensors*"))
        ends.append(store.outcomes())
    assert [o["stacked"] for o in ends[0] + ends[1]] == [1] * 4 + [4] * 4
    for alone, group, stopped in zip(*ends, strict=True):
        assert group["best"] == alone["best"]
        assert group["loss"] == pytest.approx(alone["loss"], abs=2e-5)
        assert (group["loss"], group["scores"], group["epochs"]) == (stopped["loss"], stopped["scores"], stopped["epochs"])


def test_cells_that_stand_elsewhere_are_gone_on_with_by_themselves(tmp_path) -> None:
    cells = small("memorization.baseline", epochs=(4,))
    store = Store(tmp_path / "mad", "mad")
    assert train(cells[1:2], store, minutes=1e-9) == "time"
    watcher = Watching()
    assert train(cells, store, watcher, stacked=4) == "finished"
    assert [o["stacked"] for o in store.outcomes()].count(3) == 3
    assert sum(name == cells[1].name for name, _ in watcher.evaluations) == 4
    assert watcher.progress is not None
    assert watcher.progress.done == 4


def test_the_others_of_a_group_are_left_out_once_one_has_solved_it(tmp_path) -> None:
    cells = [replace(cell, recipe=replace(cell.recipe, stop_above=0.02)) for cell in small("memorization.baseline", epochs=(40,))]
    store, watcher = Store(tmp_path / "mad", "mad"), Watching()
    assert train(cells, store, watcher, stacked=4, until_solved=True) == "finished"
    assert 1 <= len(store.outcomes()) < 4
    assert watcher.progress is not None
    assert watcher.progress.done + watcher.progress.left_out == 4


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["deltanet", "attention"])
def test_a_group_on_a_gpu_learns_as_each_alone(model: str) -> None:
    device = torch.device("cuda")
    cells = small("memorization.baseline", model, 1, "bfloat16", epochs=(20,))
    together = Group(cells, *examples(cells[0], device), device=device, compile=True)
    list(together.run())
    assert together.graph is not None
    for g, cell in enumerate(cells):
        alone = Trial(cell, *examples(cell, device), device=device)
        list(alone.run())
        for found, expected in zip(together.histories[g], alone.history, strict=True):
            assert found.loss == pytest.approx(expected.loss, rel=0.02)
        alone.close()
    together.close()
