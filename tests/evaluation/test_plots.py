"""The pictures: written where they should be, the same each time, and showing what they are given."""

import re

import pytest

from deltanet.evaluation import plots
from deltanet.evaluation.decoding import DecodingCost

TOKENS = list(range(100, 5100, 100))
TRAINING = [2 + 6 / (1 + i) for i in range(50)]
EVALUATIONS = [(1000, 2.9), (5000, 2.31)]
COSTS = [
    DecodingCost(context=n, model_ms=1.5, model_bytes=112_128, attention_ms=n / 1000, attention_bytes=3072 * n)
    for n in (256, 1024, 16384)
]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_learning(tmp_path):
    png, svg = plots.plot_learning(tmp_path / "learning", TOKENS, TRAINING, EVALUATIONS, {"gzip": 2.93, "xz": 2.47})
    assert png == tmp_path / "learning.png"
    assert png.read_bytes()[:4] == b"\x89PNG"
    shown = texts(svg)
    assert {
        "training tokens",
        "bits per byte",
        "training",
        "validation",
        "gzip -9: 2.93",
        "xz -9: 2.47",
        "2.31",
    } <= set(shown)
    assert "5k" in shown


def test_learning_without_anything_to_compare_with(tmp_path):
    _, svg = plots.plot_learning(tmp_path / "learning", TOKENS[:1], TRAINING[:1], [], {})
    assert "validation" not in texts(svg)


def test_positions(tmp_path):
    rows = [(0, 0, 4.0), (1, 1, 3.5), (2, 3, 3.0), (4, 7, 2.9)]
    _, svg = plots.plot_positions(tmp_path / "p", rows, 4)
    assert {"tokens of context before the predicted one", "bits per byte", "longer than"} <= set(texts(svg))
    _, svg = plots.plot_positions(tmp_path / "p", rows, 8)
    assert "longer than" not in texts(svg)


def test_decoding(tmp_path):
    _, svg = plots.plot_decoding(tmp_path / "d", COSTS, "DeltaNet")
    shown = set(texts(svg))
    assert {"tokens of context", "milliseconds per token", "DeltaNet", "attention"} <= shown
    assert {"110 KiB of memory", "48 MiB of memory", "256", "1k", "16k"} <= shown


def test_the_same_data_give_the_same_files(tmp_path):
    first = [path.read_bytes() for path in plots.plot_decoding(tmp_path / "a", COSTS, "x")]
    assert first == [path.read_bytes() for path in plots.plot_decoding(tmp_path / "a", COSTS, "x")]


def test_nothing_is_left_of_the_style(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.plot_decoding(tmp_path / "d", COSTS, "x")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    with pytest.raises(ValueError, match=re.escape("pip install 'deltanet[plot]'")):
        plots.plot_decoding(tmp_path / "d", COSTS, "x")


def test_running_mean_follows_without_lag():
    line = [float(i) for i in range(1000)]
    assert plots._running_mean(line)[:900] == pytest.approx(line[:900])
    assert plots._running_mean([3.0]) == [3.0]
    noisy = [5.0 + (-1) ** i for i in range(1000)]
    assert max(abs(x - 5) for x in plots._running_mean(noisy)[50:]) < 0.1


def test_sparkline():
    assert plots.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert plots.sparkline([3.0, 3.0]) == "▁▁"
    assert plots.sparkline([]) == ""
    assert len(plots.sparkline(list(range(1000)), 48)) == 48
    assert plots.sparkline([8, 8, 1, 1], 2) == "█▁"
