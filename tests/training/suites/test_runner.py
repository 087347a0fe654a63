"""A grid of cells: what is done is kept, what is altered is refused, and several may share the work."""

import json
from dataclasses import replace

import pytest
import torch

from deltanet.training.suites import SUITES, Cell, Store, Trial, rows_of
from deltanet.training.suites.tables import markdown

from .conftest import Watching, tiny, train


def test_done_cells_are_kept(store: Store) -> None:
    cells = tiny(models=("deltanet", "attention"))
    watcher = Watching()
    assert train(cells[:1], store, watcher) == "finished"
    assert watcher.kept == 0
    before = {path: path.read_bytes() for path in store.cells.glob("*.json")}
    watcher = Watching()
    assert train(cells, store, watcher) == "finished"
    assert watcher.kept == 1
    assert list(watcher.outcomes) == [cells[1].name]
    assert {path: path.read_bytes() for path in before} == before
    outcome = json.loads((store.cells / f"{cells[1].name}.json").read_bytes())
    assert (outcome["status"], outcome["epochs"], outcome["steps"]) == ("finished", 2, 8)
    assert outcome["cell"]["config"]["mixer"]["kind"] == "attention"
    lines = [json.loads(line) for line in (store.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 1, 2]


def test_side_by_side_is_as_one_by_one(tmp_path) -> None:
    cells = tiny(rates=(1e-2, 1e-3, 1e-4))
    scores = []
    for together in (1, 3):
        store = Store(tmp_path / str(together), "mqar")
        train(cells, store, together=together)
        scores.append([(o["scores"], o["loss"]) for o in store.outcomes()])
    assert scores[0] == scores[1]


def test_time_over_writes_down_where_cells_stand_and_the_next_call_goes_on(store: Store) -> None:
    cells = tiny(rates=(1e-2, 1e-3), epochs=2000)
    assert train(cells, store, minutes=0.02) == "time"
    (outcome,) = store.outcomes()
    assert outcome["status"] == "stopped"
    assert 0 < outcome["epochs"] < 2000
    standing = store.standing(cells[0])
    assert standing is not None
    assert standing[1]["done"] >= outcome["steps"]
    watcher = Watching()
    assert train(cells, store, watcher, minutes=0.02) == "time"
    assert watcher.kept == 0
    assert watcher.progress is not None
    assert watcher.progress.work == pytest.approx(sum(cell.work for cell in cells) - cells[0].work * outcome["steps"] / 8000)
    assert watcher.progress.tokens <= 8000 * cells[0].recipe.batch_size * 12
    epochs = [found.epoch for name, found in watcher.evaluations if name == cells[0].name]
    assert epochs[0] == outcome["epochs"] + 1


def test_a_cell_that_was_stopped_ends_as_if_it_was_not(tmp_path, monkeypatch) -> None:
    cells = tiny(epochs=6)
    scores = []
    for stops in (0, 3):
        store = Store(tmp_path / str(stops), "mqar")
        for _ in range(stops):
            assert train(cells, store, minutes=1e-9) == "time"  # after one turn
            assert store.standing(cells[0]) is not None
        assert train(cells, store) == "finished"
        scores.append([(o["scores"], o["best"], o["loss"], o["epochs"], o["steps"]) for o in store.outcomes()])
        assert store.standing(cells[0]) is None
        assert not list(store.cells.glob("*.safetensors*"))
    assert scores[0] == scores[1]


def test_the_evaluation_that_validation_likes_best_is_chosen_and_patience_counts_from_it(store: Store, monkeypatch) -> None:
    (cell,) = tiny(epochs=9, patience=2)
    cell = replace(cell, tests={"validation": replace(cell.tests["test"], split="validation"), **cell.tests})
    scores = iter([(0.2, 0.4), (0.5, 0.3), (0.4, 0.6), (0.5, 0.9), (0.9, 0.9)])
    monkeypatch.setattr(Trial, "_scores", lambda self, predictions: dict(zip(("validation", "test"), next(scores), strict=True)))
    train([cell], store)
    (outcome,) = store.outcomes()
    assert outcome["chosen"] == {"validation": 0.5, "test": 0.3}  # the first of those it likes best
    assert outcome["best"] == {"validation": 0.5, "test": 0.9}
    assert outcome["epochs"] == 4
    path = store.cells / f"{cell.name}.json"
    path.write_text(json.dumps({name: value for name, value in outcome.items() if name != "chosen"}))
    assert store.outcomes()[0]["chosen"] == outcome["scores"]  # of a folder from before it was written down


def test_where_a_cell_stands_outlives_a_field_that_was_not_there(store: Store, monkeypatch) -> None:
    cell = tiny(epochs=6)[0]
    earlier = cell.record()
    del earlier["config"]["init"], earlier["recipe"]["patience"]
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "record", lambda self: earlier)
        train([cell], store, minutes=1e-9)
    assert store.standing(cell) is not None
    assert train([cell], store) == "finished"


def test_where_a_cell_stands_is_kept_now_and_then(store: Store, monkeypatch) -> None:
    monkeypatch.setattr("deltanet.training.suites.runner.KEEP_EVERY", 0.0)
    cells, seen = tiny(epochs=3), []
    train(cells, store, Watching(after=lambda cell, found: seen.append(store.standing(cell))))
    assert seen[0] is None
    assert [standing[1]["done"] for standing in seen[1:]] == [4, 8]


@pytest.mark.parametrize("how", ["another cell", "other settings", "cut off", "no tensors"])
def test_where_a_cell_stands_is_refused_if_it_was_altered(store: Store, how: str) -> None:
    cells = tiny(rates=(1e-2, 1e-3), epochs=6)
    train(cells[:1], store, minutes=1e-9)
    path = store.cells / f"{cells[0].name}.safetensors"
    asked = cells[0]
    if how == "another cell":
        asked = cells[1]
        path = path.rename(store.cells / f"{asked.name}.safetensors")
    elif how == "other settings":
        asked = replace(asked, recipe=replace(asked.recipe, beta2=0.9))
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        store.keep(asked, {"loss": torch.zeros(())}, {"done": 4, "seconds": 1.0, "history": []})
    before, watcher = path.read_bytes(), Watching()
    assert train([asked], store, watcher) == "failed"
    assert watcher.failures[asked.name].startswith("ValueError: ")
    assert asked.name in watcher.failures[asked.name]
    assert path.read_bytes() == before
    store.remove(asked)
    assert train([asked], store) == "finished"


def test_an_interrupted_grid_goes_on(store: Store, monkeypatch) -> None:
    import os
    import signal

    cells = tiny(rates=(1e-2, 1e-3))
    stop = Watching(after=lambda cell, found: os.kill(os.getpid(), signal.SIGINT) if cell is cells[1] else None)
    assert train(cells, store, stop) == "interrupted"
    assert [o["status"] for o in store.outcomes()] == ["stopped", "finished"]
    assert train(cells, store) == "finished"
    assert [o["status"] for o in store.outcomes()] == ["finished", "finished"]


def test_other_rates_are_left_out_once_one_has_solved_it(store: Store) -> None:
    cells = tiny(rates=(1e-2, 1e-3), stop_above=-1.0)
    watcher = Watching()
    assert train(cells, store, watcher, until_solved=True) == "finished"
    assert list(watcher.outcomes) == [cells[0].name]
    assert watcher.progress is not None
    assert watcher.progress.left_out == 1
    assert train(cells, store, watcher) == "finished"  # asked for in full, the other is trained
    assert len(store.outcomes()) == 2


def test_a_cell_that_fails_is_told_and_the_others_go_on(store: Store) -> None:
    cells = tiny(rates=(1e-2, 1e-3, 1e-4))
    wrong = replace(cells[0].train, vocab_size=32)  # type: ignore[type-var]
    early = replace(cells[0], tests={"test": replace(cells[0].tests["test"], examples=0)})
    late = replace(cells[1], tests={"test": replace(cells[1].tests["test"], task=wrong)})  # ids that the model does not have
    watcher = Watching()
    assert train([early, late, cells[2]], store, watcher, together=2) == "failed"
    assert watcher.failures[early.name] == "ValueError: count must be at least 1 and start at least 0, got 0 and 0"
    assert watcher.failures[late.name].startswith("IndexError: index out of range")
    assert list(watcher.outcomes) == [cells[2].name]
    assert watcher.progress is not None
    assert (watcher.progress.done, watcher.progress.failed) == (1, 2)
    assert watcher.progress.work == watcher.progress.work_done == cells[2].work
    told = [json.loads(line) for line in (store.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["cell"] for line in told if "Traceback" in line.get("error", "")] == [early.name, late.name]
    again = Watching()
    assert train(cells, store, again) == "finished"  # what failed is tried again
    assert (again.kept, len(again.outcomes)) == (1, 2)


def test_a_lost_device_ends_the_run(store: Store, monkeypatch) -> None:
    """After an error of the device itself no later cell could run there."""

    def lose(trial: Trial, count: int) -> None:
        raise torch.AcceleratorError("the device is lost")

    monkeypatch.setattr(Trial, "_steps", lose)
    watcher = Watching()
    with pytest.raises(torch.AcceleratorError, match="the device is lost"):
        train(tiny(rates=(1e-2, 1e-3)), store, watcher)
    assert not watcher.failures


def test_a_cell_that_another_process_has_is_left_to_it(store: Store) -> None:
    cells = tiny(rates=(1e-2, 1e-3))
    claim = store.claim(cells[0])
    assert claim is not None
    assert store.claim(cells[0]) is None
    watcher = Watching()
    assert train(cells, store, watcher) == "elsewhere"
    assert list(watcher.outcomes) == [cells[1].name]
    claim.release()
    assert train(cells, store) == "finished"


def test_altered_settings_are_refused_by_name(store: Store) -> None:
    (cell,) = tiny()
    train([cell], store)
    changed = replace(cell, recipe=replace(cell.recipe, batch_size=8))
    with pytest.raises(ValueError, match=r"recipe.batch_size = 8 as asked for now, got 16: choose another --out, or --overwrite"):
        train([changed], store)
    changed = replace(cell, config=replace(cell.config, mixer=replace(cell.config.mixer, heads=4)))
    with pytest.raises(ValueError, match=r"config.mixer.heads = 4 as asked for now, got 2"):
        train([changed], store)


def test_a_cell_from_before_a_setting_was_there_has_its_default(store: Store) -> None:
    (cell,) = tiny()
    train([cell], store)
    (path,) = store.cells.glob("*.json")
    outcome = json.loads(path.read_bytes())
    assert outcome["cell"]["config"].pop("init") == "scaled"
    assert outcome["cell"]["recipe"].pop("patience") is None
    path.write_text(json.dumps(outcome))
    watcher = Watching()
    assert train([cell], store, watcher) == "finished"
    assert watcher.kept == 1
    with pytest.raises(ValueError, match=r"config\.init = 'mad' as asked for now, got 'scaled'"):
        train([replace(cell, config=replace(cell.config, init="mad"))], store)


@pytest.mark.parametrize("text", ["", "[]", '{"cell": {}}', '{"cell": {}, "status": "finished", "scores": 3, "epochs": 1}'])
def test_an_altered_file_is_refused_by_name(store: Store, text: str) -> None:
    (cell,) = tiny()
    train([cell], store)
    (path,) = store.cells.glob("*.json")
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{cell.name}.json' must be"):
        train([cell], store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"test": 7}}, "scores between 0 and 1, got 7 for scores.test"),
        ({"best": {"test": float("nan")}}, "scores between 0 and 1, got nan for best.test"),
        ({"chosen": {"test": "much"}}, "scores between 0 and 1, got 'much' for chosen.test"),
        ({"scores": {}}, "a score of the test, got none in scores"),
        ({"status": "done"}, "of status finished, diverged or stopped, got 'done'"),
        ({"seconds": None}, "the outcome of a cell, got no seconds"),
        ({"cell": {"task": "64x4"}}, "the outcome of a cell, got no cell.model"),
        ({"cell": "64x4"}, "the outcome of a cell, got no cell"),
    ],
)
def test_an_altered_outcome_is_refused_by_name_in_the_table_too(store: Store, change: dict, message: str) -> None:
    (cell,) = tiny()
    train([cell], store)
    (path,) = store.cells.glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(ValueError, match=rf"{cell.name}.json' must (be|have) {message}: put it back, or remove it"):
        rows_of(SUITES["mqar"], store.outcomes())


def test_foreign_folders_are_refused(tmp_path, store: Store) -> None:
    with pytest.raises(ValueError, match=r"of the suite mad, got .* of 'mqar'"):
        Store(store.path, "mad")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="with other things"):
        Store(tmp_path / "notes", "mqar")
    with pytest.raises(ValueError, match="must be a folder, got the file"):
        Store(tmp_path / "notes" / "mine.txt", "mqar")
    (store.path / "suite.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON object"):
        Store(store.path, "mqar")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


def outcome(cell, score: float, **values) -> dict:
    record = {"cell": cell.record(), "status": "finished", "scores": {"test": score}, "best": {"test": score}, "epochs": 64}
    record |= {"seconds": 1.0, **values}
    record.setdefault("chosen", record["scores"])
    return json.loads(json.dumps(record))


def test_the_table_takes_the_best_rate_over_all_seeds() -> None:
    suite = SUITES["mqar"]
    grid = replace(suite.grid(quick=False), models=("mamba",), widths=(64,), seeds=(0, 1))
    cells = {(cell.seed, cell.learning_rate): cell for cell in suite.cells(grid, "float32")}
    scores = {(0, 1e-4): 0.9, (1, 1e-4): 0.1, (0, 1e-2): 0.7, (1, 1e-2): 0.5, (0, 2.15e-3): 0.95}
    (row,) = rows_of(suite, [outcome(cells[key], score) for key, score in scores.items()])
    assert (row.ours, row.learning_rate, row.seeds) == (pytest.approx(60), 1e-2, 2)
    assert row.spread == pytest.approx(20)
    assert (row.paper, row.difference) == (81, pytest.approx(-21))
    assert row.reduced == "3 of 4 rates"
    assert "| 512x64 | mamba | 64 | 60.0 (spread 20.0) | 81.0 | -21.0 | 0.01 |" in markdown(suite, [row])
    shallow = replace(grid, models=("deltanet",), seeds=(0,), depth=2, heads=1, epochs=(8,), patience=3)
    (row,) = rows_of(suite, [outcome(cell, 0.5) for cell in suite.cells(shallow, "float32")])
    assert row.reduced == "8 of 64 epochs, ended after 3 epochs without a better one, 2 layers, not 4, 1 heads, not 2"
    plain = [replace(cell, config=replace(cell.config, feed_forward="none")) for cell in suite.cells(replace(shallow, depth=4, heads=2), "float32")]
    (row,) = rows_of(suite, [outcome(cell, 0.5) for cell in plain])
    assert row.reduced.endswith("better one, none for a feed-forward layer, not identity")


def test_the_rate_is_chosen_by_validation_where_there_is_one() -> None:
    suite = SUITES["regbench"]
    grid = replace(
        suite.grid(quick=False), models=("deltanet",), tasks=("2500",), widths=(128,), learning_rates=(2.54e-4, 5e-4), epochs=(120,)
    )
    low, high = suite.cells(grid, "float32")
    found = [
        outcome(low, 0, scores={"validation": 0.8, "test": 0.7}, epochs=120),
        outcome(high, 0, scores={"validation": 0.7, "test": 0.9}, epochs=120),
    ]
    (row,) = rows_of(suite, found)
    assert (row.ours, row.others) == (pytest.approx(70), {"validation": pytest.approx(80)})
    assert row.reduced == "1 of 4 rates and epochs"
    every = suite.cells(replace(grid, learning_rates=(2.54e-4,), epochs=(30, 60, 90, 120)), "float32")
    assert len({cell.name for cell in every}) == 4
    shorter = [outcome(cell, 0, scores={"validation": 0.9 - cell.recipe.epochs / 1000, "test": 0.75}) for cell in every[:3]]
    (row,) = rows_of(suite, [*found, *shorter])
    assert (row.ours, row.others, row.reduced) == (pytest.approx(75), {"validation": pytest.approx(87)}, "")
    early = outcome(every[3], 0, scores={"validation": 0.1, "test": 0.1}, chosen={"validation": 0.9, "test": 0.6})
    (row,) = rows_of(suite, [early, *shorter])  # what a cell was when validation liked it best
    assert (row.ours, row.others) == (pytest.approx(60), {"validation": pytest.approx(90)})
    wider = suite.cells(replace(grid, widths=(512,)), "float32")[0]
    rows = rows_of(suite, [*found, outcome(wider, 0, scores={"validation": 0.75, "test": 0.99}, epochs=120)])
    assert "| deltanet | 70.0 |\n| paper | 81.3 |" in markdown(suite, rows)  # the width too, by validation


def test_regbench_is_the_second_authors_protocol() -> None:
    grid = replace(SUITES["regbench"].grid(quick=False), models=("deltanet", "attention"), tasks=("2500",), epochs=(30,))
    delta, attention = SUITES["regbench"].cells(grid, "float32")
    assert (delta.learning_rate, attention.learning_rate) == (2.54e-4, 3e-4)
    assert (delta.config.feed_forward_width, attention.config.feed_forward_width) == (320, 512)
    assert (attention.config.mixer.heads, attention.config.mixer.rotary, attention.config.positions) == (2, True, 0)
    assert (delta.recipe.warmup_epochs, delta.recipe.schedule, attention.recipe.warmup_epochs) == (0, "epoch", 5)
    rates = attention.recipe.learning_rates(3e-4)  # 30 epochs of 78 steps
    assert (rates[0], len(rates)) == (1e-6, 2340)
    assert max(rates) == rates[390] == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-5, rel=1e-3)
    assert {cell.learning_rate for cell in SUITES["regbench"].cells(replace(grid, learning_rates=(1e-3,)), "float32")} == {1e-3}


def test_mads_means_are_over_configurations() -> None:
    suite = SUITES["mad"]
    grid = replace(suite.grid(quick=False), models=("deltanet",), tasks=("memorization.*",), learning_rates=(1e-3,), weight_decays=(0.0,))
    cells = suite.cells(grid, "float32")
    assert len(cells) == 6
    (row,) = rows_of(suite, [outcome(cells[0], 0.2, best={"test": 0.9})])
    assert row.ours == pytest.approx(90)  # of the best epoch, as in mad-lab
    text = markdown(suite, rows_of(suite, [outcome(cell, i / 10, epochs=200) for i, cell in enumerate(cells)]))
    assert "25.0 (6 of 6)" in text
    assert "| paper | 42.2 | 35.7 | 100.0 | 52.8 | 100.0 | 100.0 | 71.8 |" in text


def test_the_protocols_grids_are_whole() -> None:
    assert len(SUITES["mad"].cells(replace(SUITES["mad"].grid(quick=False), models=("deltanet",)), "float32")) == 396
    cells = SUITES["mqar"].cells(SUITES["mqar"].grid(quick=False), "float32")
    assert len(cells) == 5 * 4 * 4
    assert {cell.recipe.steps for cell in cells} == {781 * 64}
    assert len({cell.name for cell in cells}) == len(cells)
    positions = {cell.model: (cell.config.positions, getattr(cell.config.mixer, "rotary", None)) for cell in cells}
    assert positions["attention"] == (512, False)
    assert positions["deltanet-noconv"] == (0, None)
