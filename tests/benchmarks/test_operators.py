"""The operator benchmark runs anywhere, says what is wrong with an operator before how fast it is, and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_run_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--shapes", "1x40x2x16", "--device", "cpu", "--seconds", "0", "--rules", "plain", "gated", "--peers", "none"]
    command = [sys.executable, str(BENCHMARKS / "operators.py"), *arguments, "--algorithms", "chunk", "recurrent", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ns/token-head" in done.stdout
    result = json.loads(out.read_text())
    assert [(r["rule"], r["algorithm"]) for r in result["rows"]] == [
        ("plain", "chunk"),
        ("plain", "recurrent"),
        ("gated", "chunk"),
        ("gated", "recurrent"),
    ]
    for row in result["rows"]:
        assert row["correct"]
        assert row["both"]["eager_ms"] > 0
        assert set(row["errors"]) == {"o", "dq", "dk", "dv", "dbeta"} | ({"dg"} if row["rule"] == "gated" else set())
    assert result["environments"][0]["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert result["limits"]["bytes_per_second"] > 0


def test_a_wrong_operator_is_called_wrong() -> None:
    import operators

    shape, device = operators.Shape(1, 20, 1, 16), torch.device("cpu")
    good = operators.ours("reference", "chunk", "states")
    bad = operators.Subject("bad", "chunk", lambda *x: 1.02 * good.call(*x))
    assert max(operators.errors(good, shape, False, device, torch.float32).values()) < 1e-5
    errors = operators.errors(bad, shape, False, device, torch.float32)
    assert min(errors.values()) > 0.015


def test_the_least_work_of_a_shape() -> None:
    import operators
    from measure import Limits

    shape = operators.Shape.parse("8x4096x16x128")
    flops, moved = shape.work("forward", 2)
    assert (flops / shape.token_heads, moved / shape.token_heads) == (163_840, 1_026)
    assert 0.12 < Limits(4.27e12, 672e12).floor_ms(flops, moved) < 0.13
    with pytest.raises(SystemExit, match="BxTxHxD"):
        operators.Shape.parse("8x4096")


def test_the_table_aligns_and_shows_what_is_missing() -> None:
    from measure import table

    assert table(["a", "b"], [["x", 1.5], ["long", None], ["y", 12345.6]]).splitlines() == [
        "a         b",
        "----  -----",
        "x       1.5",
        "long      -",
        "y     12346",
    ]


def test_a_run_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are there stay as they are; a budget of no time begins none."""
    import operators

    out = tmp_path / "result.json"
    common = ["operators.py", "--device", "cpu", "--seconds", "0", "--peers", "none", "--passes", "forward", "--out", str(out)]
    for shapes, more in ((["1x20x1x16"], []), (["1x20x1x16", "1x30x1x16"], ["--resume", "--budget", "0"])):
        monkeypatch.setattr(sys, "argv", [*common, "--shapes", *shapes, *more])
        operators.main()
        result = json.loads(out.read_text())
        assert [r["shape"] for r in result["rows"]] == ["1x20x1x16"]
        assert set(result["rows"][0]["hard_errors"]) == set(operators.CASES) - {"usual"}
    assert result["left_out"] == [{"shape": "1x30x1x16", "rule": "plain", "name": "auto"}]
    monkeypatch.setattr(sys, "argv", [*common, "--shapes", "1x30x1x16", "--resume"])
    operators.main()
    assert [r["shape"] for r in json.loads(out.read_text())["rows"]] == ["1x20x1x16", "1x30x1x16"]


def test_peers_are_compared_with_every_row_of_the_same_work() -> None:
    import operators

    def row(name: str, eager: float, graph: float | None, shape: str = "s") -> dict:
        return {"shape": shape, "rule": "plain", "algorithm": "chunk", "name": name, "both": {"eager_ms": eager, "graph_ms": graph}}

    rows = [row("triton", 2.0, 1.0), row("hopper", 1.0, 1.0), row("fla", 5.0, None), row("fla", 5.0, 4.0, "t")]
    assert operators.compare(rows, ["both"]) == [["s plain", "triton than fla", 2.5, None], ["s plain", "hopper than fla", 5.0, None]]


def test_a_backend_that_refuses_a_shape_has_no_row_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import operators

    out = tmp_path / "result.json"
    common = ["operators.py", "--device", "cpu", "--seconds", "0", "--peers", "none", "--passes", "forward", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*common, "--shapes", "1x20x1x16", "--backends", "hopper", "reference"])
    operators.main()
    result = json.loads(out.read_text())
    assert [r["name"] for r in result["rows"]] == ["reference"]
    assert result["failed"] == []
