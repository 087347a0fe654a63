"""Folders of comparisons gathered: each model with its commit and seed, time by the speed alone, and nothing that was trained otherwise."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from deltanet.evaluation import plots
from deltanet.training import DataConfig, TrainConfig
from deltanet.training.compare import Comparison, begin, train_and_measure

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "line_up.py"
spec = importlib.util.spec_from_file_location("benchmarks_line_up", PATH)
line_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(line_up)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} says that {number} is {number * number % 97}.\n" for number in range(100)))
    train = TrainConfig(steps=4, batch_size=2, warmup_steps=1, evaluate_every=2, evaluate_tokens=64, sample_tokens=0, device="cpu")
    return Comparison(size="nano", depth=1, data=DataConfig(source=str(text), context=16), train=train)


def trained(comparison: Comparison, out: Path, *models: str, **changes: int) -> str:
    changed = replace(comparison, train=replace(comparison.train, **changes))
    begin(changed, models, out)
    for model in models:
        train_and_measure(changed, model, out)
    return str(out)


def test_models_of_several_folders_stand_in_one_table(comparison, tmp_path, capsys) -> None:
    a = trained(comparison, tmp_path / "a", "deltanet", "transformer++")
    b = trained(comparison, tmp_path / "b", "gla")
    c = trained(comparison, tmp_path / "c", "deltanet", seed=1)
    speeds = tmp_path / "speeds.json"
    row = {"model": "gla", "tokens_per_second": 2000.0, "step_ms": 1.0, "peak_gib": 3.0, "loss": 1.0, "loss_evaluated": 1.0, "paths": []}
    speeds.write_text(json.dumps({"environment": {"commit": "s"}, "rows": [row], "generation": [{"model": "gla", "generation_ms": 4.0}]}))
    out, stem = tmp_path / "out.json", tmp_path / "figure"
    folders = ["--folder", a, "ca", "--folder", b, "cb", "--folder", c, "cc"]
    options = ["--speeds", str(speeds), "--out", str(out), *(["--figure", str(stem)] if plots.can_plot() else [])]
    assert line_up.main([*folders, *options]) == 0
    found = json.loads(out.read_text())
    assert [(row["model"], row["seed"], row["commit"]) for row in found["rows"]] == [
        ("transformer++", 0, "ca"), ("gla", 0, "cb"), ("deltanet", 0, "ca"), ("deltanet", 1, "cc")
    ]  # fmt: skip
    deltanet = found["rows"][2]
    assert [(e["tokens"], e["whole"]) for e in deltanet["evaluations"]] == [(64, False), (128, True)]
    assert deltanet["evaluations"][-1]["bits_per_byte"] == deltanet["bits_per_byte"]
    assert len(deltanet["training_bits_per_byte_by_tenths"]) == 4
    assert deltanet["training_bits_per_byte"] == pytest.approx(sum(deltanet["training_bits_per_byte_by_tenths"]) / 4)
    assert found["alone"]["gla"] | {"tokens_per_second": 2000.0, "generation_ms": 4.0, "commit": "s"} == found["alone"]["gla"]
    table = capsys.readouterr().out
    assert "| 2 | 3.0 | 4.00 |" in table
    assert "deltanet, seed 1" in table
    assert not plots.can_plot() or stem.with_suffix(".png").exists()


def test_what_was_trained_otherwise_or_twice_is_refused(comparison, tmp_path) -> None:
    a = trained(comparison, tmp_path / "a", "deltanet")
    other = trained(comparison, tmp_path / "other", "gla", steps=2)
    with pytest.raises(ValueError, match=r"other' must have been trained as .*, got another train.steps"):
        line_up.gather([(Path(a), "c"), (Path(other), "c")])
    with pytest.raises(ValueError, match="once for each seed, got one of them twice"):
        line_up.gather([(Path(a), "c"), (Path(a), "c")])
