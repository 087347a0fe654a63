"""Folders of suites gathered: settings apart, the longer training of a cell, and nothing that does not belong together."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltanet.training.suites import SUITES, Store, run_cells

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "suites.py"
spec = importlib.util.spec_from_file_location("benchmarks_suites", PATH)
suites = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suites)


class Silent:
    def begin(self, progress, kept): ...
    def tick(self, progress): ...
    def examined(self, cell, found, progress): ...
    def finished(self, cell, outcome, progress): ...
    def failed(self, cell, error, progress): ...


def folder(path, epochs=(1,), heads=None, models=("deltanet", "attention")):
    """Cells of MQAR so small that they take no time."""
    grid = replace(
        SUITES["mqar"].grid(quick=False), tasks=("12x2x16",), models=models, widths=(16,), learning_rates=(1e-2,),
        train_examples=32, test_examples=8, batch_size=16, epochs=epochs, heads=heads,
    )  # fmt: skip
    run_cells(
        SUITES["mqar"].cells(grid, "float32"), Store(path, "mqar"), device=torch.device("cpu"), together=1,
        environment={"device": "a machine", "torch": "2", "date": "today"}, watcher=Silent(),
    )  # fmt: skip
    return str(path)


def test_settings_stay_apart_and_commits_stay_with_their_cells(tmp_path, capsys):
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b", heads=1, models=("deltanet",))
    out = tmp_path / "out.json"
    command = "deltanet suite mqar"
    assert (
        suites.main(
            ["--folder", first, "c1", "--folder", second, "c2", "one head", "--command", command, "--out", str(out)]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "mqar, protocol" in told
    assert "mqar, one head" in told
    found = json.loads(out.read_text())
    assert (found["suite"], found["commits"], found["commands"]) == ("mqar", ["c1", "c2"], [command])
    assert found["devices"] == ["a machine"]
    protocol, one_head = found["settings"]
    assert [row["model"] for row in protocol["rows"]] == ["attention", "deltanet"]
    assert [row["model"] for row in one_head["rows"]] == ["deltanet"]
    assert {cell["commit"] for cell in protocol["cells"]} == {"c1"}
    assert one_head["cells"][0]["config"]["mixer"]["heads"] == 1
    assert 0 <= protocol["rows"][0]["ours"] <= 100


def test_of_a_cell_in_two_folders_the_longer_training_counts(tmp_path):
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b")
    path = next(Path(first).glob("cells/*deltanet*.json"))
    outcome = json.loads(path.read_text())
    path.write_text(json.dumps({**outcome, "epochs": 7}))
    for order in ([first, "c1"], [second, "c2"]), ([second, "c2"], [first, "c1"]):
        _, settings = suites.gather(order)
        epochs = {o["cell"]["model"]: (o["epochs"], o["commit"]) for o in settings["protocol"]}
        assert epochs["deltanet"] == (7, "c1")
        assert len(settings["protocol"]) == 2


def test_what_does_not_belong_together_is_refused(tmp_path):
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b", heads=1)
    with pytest.raises(ValueError, match="got other settings: name a setting"):
        suites.gather([[first, "c1"], [second, "c2"]])
    Store(tmp_path / "mad", "mad")
    with pytest.raises(ValueError, match="folders must be of one suite, got mad, mqar"):
        suites.gather([[first, "c1"], [str(tmp_path / "mad"), "c2"]])
