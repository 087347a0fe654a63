"""`deltanet suite` as a user meets it: what it prints and leaves behind, and what it says to mistakes."""

import json
import re
import time

import pytest
import torch
from rich.console import Console

from deltanet.cli import main
from deltanet.cli.suite import TextWatcher
from deltanet.training.suites import SUITES, Examined, Progress, Trial

TINY = [
    "--tasks", "12x2x16", "--widths", "16", "--epochs", "2", "--train-examples", "64", "--test-examples", "16",
    "--batch-size", "16", "--device", "cpu",
]  # fmt: skip


def run(capsys, *args):
    capsys.readouterr()
    code = main(["suite", *map(str, args)])
    return code, *capsys.readouterr()


def test_a_table_and_a_figure_and_nothing_twice(capsys, tmp_path):
    out = tmp_path / "suite"
    arguments = ["mqar", *TINY, "--models", "attention", "deltanet", "--learning-rates", "1e-2", "1e-3", "--out", out]
    code, said, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "4 cells to train\n" in said
    assert len(re.findall(r"^12x2x16 \S+ d16 lr 0\.0\d+ wd 0\.1 seed 0: \d+\.\d% after 2 epochs, ", said, re.M)) == 4
    assert "\x1b" not in said
    assert {path.name for path in out.iterdir()} == {
        "cells", "suite.json", "metrics.jsonl", "table.md", "table.json", "figure.png", "figure.svg",
    }  # fmt: skip
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [(row["model"], row["width"], row["rates"]) for row in rows] == [("attention", 16, 2), ("deltanet", 16, 2)]
    assert "| 12x2x16 | attention | 16 | " in (out / "table.md").read_text()
    assert rows[0]["reduced"] == "a task of its own"
    code, said, _ = run(capsys, *arguments)
    assert "0 cells to train, 4 done before" in said
    code, said, _ = run(capsys, *arguments, "--overwrite", "--cells", "2/2", "--json")
    events = [json.loads(line) for line in said.splitlines()]
    assert [event["event"] for event in events] == ["begin", *["examined", "examined", "finished"] * 2, "end"]
    assert len(events[-1]["rows"]) == 2


def test_regbench_says_what_it_had_where_validation_liked_it_best(capsys, tmp_path, monkeypatch):
    scores = iter([{"validation": 0.9, "test": 0.8}, {"validation": 0.7, "test": 0.6}])
    monkeypatch.setattr(Trial, "_scores", lambda trial, predictions: next(scores))
    out = tmp_path / "suite"
    code, said, _ = run(
        capsys, "regbench", "--tasks", "32", "--models", "attention", "--widths", "8", "--depth", "1", "--epochs", "10",
        "--test-examples", "2", "--device", "cpu", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert ": 60.0%, validation 70.0% after 10 epochs, " in said
    assert "; 80.0% where validation likes it best\n" in said
    assert "| 32 | attention | 8 | 80.0 |" in said


def test_a_cell_that_fails_is_told_at_the_end(capsys, tmp_path, monkeypatch):
    begin = Trial.__init__

    def fail(trial, cell, *args, **options):
        if cell.model == "attention":
            raise torch.OutOfMemoryError("out of memory\nTried to allocate 7 GiB")
        begin(trial, cell, *args, **options)

    monkeypatch.setattr(Trial, "__init__", fail)
    out = tmp_path / "suite"
    arguments = ["mqar", *TINY, "--models", "attention", "deltanet", "--learning-rates", "1e-2", "--out", out]
    code, said, err = run(capsys, *arguments)
    assert code == 1
    named = "12x2x16 attention d16 lr 0.01 wd 0.1 seed 0"
    assert f"\n{named}: failed, OutOfMemoryError: out of memory\n" in said
    assert "| 12x2x16 | deltanet | 16 | " in said
    assert err == (
        f"deltanet: error: 1 of the cells failed; {out / 'metrics.jsonl'} says where, the same command tries them again:\n"
        f"  {named}: OutOfMemoryError: out of memory\n"
    )
    assert "Tried to allocate 7 GiB" in (out / "metrics.jsonl").read_text()
    code, said, err = run(capsys, *arguments, "--json")
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["begin", "failed", "end"]
    assert (code, json.loads(said.splitlines()[-1])["status"]) == (1, "failed")
    monkeypatch.setattr(Trial, "__init__", begin)
    code, said, err = run(capsys, *arguments, "--quiet")
    assert (code, said, err) == (0, "", "")


def test_an_example_is_shown(capsys):
    code, said, _ = run(capsys, "mqar", *TINY, "--show")
    assert code == 0
    assert said.startswith("12x2x16: 12 tokens of 16 ids, 64 training examples\n")
    _, tokens, asked = said.split("\n\n")[0].splitlines()
    assert len(tokens.split()) == 12
    assert asked.startswith("asked ")


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_quick_version_and_a_full_one(suite):
    for quick in (True, False):
        cells = SUITES[suite].cells(SUITES[suite].grid(quick), "float32")
        assert {cell.suite for cell in cells} == {suite}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mqra"], "there is no suite 'mqra', only .*Did you mean 'mqar'?"),
        (["mqar", "--models", "deltanett"], "models must be of .*, got 'deltanett'. Did you mean 'deltanet'?"),
        (["mqar", "--tasks", "8x4"], "mqar 8x4, .* pairs must be at most length / 4 = 2, got 4"),
        (["mqar", "--tasks", "64x16x16"], "pairs must be at most the 7 keys in a vocabulary of 16, got 16"),
        (["mqar", "--tasks", "512y64"], "tasks must be of 64x4, .*got '512y64'. Did you mean '512x64'?"),
        (["mqar", "--widths", "33", "--heads", "2"], "at width 33: heads must divide d_model = 33, got 2"),
        (["mad", "--tasks", "fuzzy_recal.baseline"], "Did you mean 'fuzzy_recall.baseline'?"),
        (["regbench", "--tasks", "7"], "tasks must be of 1000, .*got '7'"),
        (["mqar", "--learning-rates", "0"], "learning_rates must be above 0 and at most 10, got 0"),
        (["mqar", "--seeds", "1", "1"], "seeds must be given once each, got 1 1"),
        (["mqar", "--batch-size", "0"], "batch_size must be between 1 and"),
        (["mqar", "--train-examples", "3"], "train_examples must fill a batch of 64, got 3"),
        (["mqar", "--cells", "3/2"], "cells must be like 2/3, the second of three parts, got '3/2'"),
        (["mqar", "--minutes", "-1"], "minutes must be above 0"),
        (["mqar", "--together", "0"], "together must be above 0"),
        (["mqar", "--quick", "--full"], "give --quick or --full, not both"),
        (["mqar", "--precision", "half"], "precision must be one of auto, bfloat16, float32, got 'half'"),
        (["mqar", "--minuts", "1"], "there is no option --minuts: did you mean --minutes?"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, message):
    code, said, err = run(capsys, *arguments, "--device", "cpu", "--out", tmp_path / "out")
    assert (code, said) == (2, "")
    assert re.fullmatch(rf"deltanet: error: .*{message}.*\n".replace("?", r"\?"), err), err
    assert not (tmp_path / "out" / "cells").exists() or not list((tmp_path / "out" / "cells").iterdir())


def test_progress_on_a_terminal_and_in_a_pipe(monkeypatch, capsys):
    cell = SUITES["mqar"].cells(SUITES["mqar"].grid(quick=True), "float32")[0]
    progress = Progress(cells=4, done=1, work=10, work_done=5, began=time.monotonic() - 60, tokens=6_000_000)
    for terminal in (False, True):
        console = Console(force_terminal=terminal, width=200, highlight=False)
        watcher = TextWatcher(console, None)
        watcher.begin(progress, 0)
        watcher.examined(cell, Examined(3, 0.5, {"test": 0.25}, 1.0), progress)
        monkeypatch.setattr(watcher, "_told", 0.0)
        watcher.tick(progress)
        assert (watcher._live is not None) == terminal
        watcher.close()
        line = capsys.readouterr().out
        assert re.search(r"1/4 cells · \S+ .*: epoch 3/\d+, 25\.0% · 100 k tokens/s · at most 1:00 min left", line), line
