"""benchmarks/models.py: every row says what it was, and is on disk as soon as it is measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from deltanet.evaluation import plots

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("benchmark_models", FOLDER / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_and_picture(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "throughput.json"
    arguments = ["--size", "nano", "--depth", "1", "--vocab-size", "31", "--models", "deltanet", "transformer++", "--shapes", "2x8", "1x16"]
    monkeypatch.setattr(
        sys, "argv", ["models.py", *arguments, "--documents", "2", "--generate", "1", "3", "--seconds", "0.01", "--device", "cpu", "--out", str(out)]
    )
    models.main()
    result = json.loads(out.read_text())
    assert [(row["model"], row["batch"], row["length"]) for row in result["rows"]] == [
        ("deltanet", 2, 8),
        ("deltanet", 1, 16),
        ("transformer++", 2, 8),
        ("transformer++", 1, 16),
    ]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(16 / (row["step_ms"] / 1e3))
        assert row["steps"] >= 3
    generated = [(row["model"], row["batch"]) for row in result["generation"]]
    assert generated == [("deltanet", 1), ("deltanet", 3), ("transformer++", 1), ("transformer++", 3)]
    assert out.with_suffix(".png").exists() == plots.can_plot()
    assert "2 x 8" in capsys.readouterr().out


def test_the_papers_points_have_a_length_each(models) -> None:
    assert all(len(points) == len(models.SHAPES) for points in models.PAPER.values())
    assert set(models.PAPER) == set(models.LINE_UP)
