"""The speed-up figure: the sizes it runs, the numbers it reports, the picture. On the CPU, with the reference, small."""

from pathlib import Path

import pytest
import torch

from deltanet.evaluation import speed


def small(**kwargs) -> dict:
    settings = dict(
        head_dims=(8, 16), lengths=(8, 32), tokens=32, width=32, device="cpu", dtype=torch.float32, seconds=0.0
    )
    return speed.speedup(**{**settings, "backend": "reference", **kwargs})


def test_every_point_has_the_same_tokens_and_width() -> None:
    seen = []
    result = small(progress=seen.append)
    assert seen == result["rows"]
    assert [(r["head_dim"], r["length"]) for r in result["rows"]] == [(8, 8), (8, 32), (16, 8), (16, 32)]
    for row in result["rows"]:
        assert row["batch"] * row["length"] == 32
        assert row["heads"] * row["head_dim"] == 32
        assert row["speedup"] == row["recurrent_ms"] / row["chunk_ms"] > 0
        assert row["paper"] is None  # the paper's points are of its own size
    assert result["dtype"] == "float32"


def test_both_forms_are_run_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"chunk": 0, "recurrent": 0, "backward": 0}

    def counted(name, operator):
        def call(*args, **kwargs):
            calls[name] += 1
            return operator(*args, **kwargs)

        return call

    grad = torch.autograd.grad
    monkeypatch.setattr(speed, "chunk_delta_rule", counted("chunk", speed.chunk_delta_rule))
    monkeypatch.setattr(speed, "recurrent_delta_rule", counted("recurrent", speed.recurrent_delta_rule))
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (calls.__setitem__("backward", calls["backward"] + 1), grad(*a, **k))[1]
    )
    small(head_dims=(8,), lengths=(32,))
    assert calls["chunk"] == calls["recurrent"] == 5  # two that do not count and three that do
    assert calls["backward"] == 10


def test_another_baseline() -> None:
    def baseline(q, k, v, beta):
        return v * beta[..., None] * (q * k).sum(-1, keepdim=True), None

    result = small(head_dims=(8,), lengths=(32,), recurrent=baseline)
    assert result["rows"][0]["recurrent_ms"] > 0


def test_lengths_must_divide_the_tokens() -> None:
    with pytest.raises(ValueError, match="length 24 does not"):
        small(lengths=(24,))


def test_the_papers_points() -> None:
    assert len(speed.PAPER) == 18
    assert (min(speed.PAPER.values()), max(speed.PAPER.values())) == (4.0, 36.6)


def test_the_median_is_of_timed_calls_only() -> None:
    order = []
    speed.median_ms(
        lambda: order.append("call"), torch.device("cpu"), seconds=0.0, before=lambda: order.append("before")
    )
    assert order == ["call", "call", *["before", "call"] * 3]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = small(head_dims=(8,), lengths=(8, 32))
    for row in result["rows"]:
        row["paper"] = 5.0
    paths = speed.plot_speedup(tmp_path / "speedup", result)
    assert [p.suffix for p in paths] == [".png", ".svg"]
    assert "paper, H100" in paths[1].read_text()
    assert "head dimension 8" in paths[1].read_text()
