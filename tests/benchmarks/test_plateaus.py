import importlib.util
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks/results/mqar-variants-nvidia-h200-2026-11-22.json"
SPEC = importlib.util.spec_from_file_location("plateaus", Path(__file__).parents[2] / "benchmarks" / "plateaus.py")
plateaus = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plateaus)


def run(**others) -> dict:
    return {
        "model": "gla", "width": 64, "learning_rate": 1e-3, "seed": 0, "epochs": 64, "changed": {},
        "curve": [[1, 8.3, 0.03], [2, 5.0, 40.0]], **others,
    }  # fmt: skip


def test_only_runs_of_the_protocol_that_left_the_plateau_are_drawn() -> None:
    runs = [
        run(width=128),
        run(seed=1),
        run(changed={"depth": 4}),
        run(epochs=20),
        run(curve=[[1, 7.6, 0.8]]),
        run(model="attention", width=256),
    ]
    assert [(r["model"], r["width"], r["seed"]) for r in plateaus.left(runs, 3.0)] == [("attention", 256, 0), ("gla", 64, 1), ("gla", 128, 0)]


def test_the_figure_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert plateaus.main(["--results", str(RESULTS), "--figure", str(tmp_path / "figure")]) == 0
    drawn = (tmp_path / "figure.svg").read_text()
    for run in plateaus.left(json.loads(RESULTS.read_text())["runs"], 3.0):
        assert f"{run['model']}, {run['width']} wide" in drawn
    assert "rate 0.00215, seed 1" in drawn
    assert "figure.png" in capsys.readouterr().out


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.json").write_text(json.dumps({"runs": [run()]}))
    with pytest.raises(SystemExit):
        plateaus.main(["--results", str(tmp_path / "runs.json"), "--figure", str(tmp_path / "figure"), "--above", "50"])
    assert "give a smaller --above" in capsys.readouterr().err
