"""Every row of the paper's two main tables (arXiv 2406.06484, tables 1 and 2), by name and as a user would: built, trained, streamed, saved,
loaded, gone on with, and generated from. And what came after it.

Faults injected when this file was written, each of which failed here: the trained weights not loaded; the state of the last segment returned
unchanged; a block given the state of another.
"""

from pathlib import Path

import pytest
import torch

from deltanet.cli import main
from deltanet.data import SequentialWindows, load_corpus, tokenize
from deltanet.evaluation import evaluate
from deltanet.inference import GREEDY, stream_text
from deltanet.models import MODELS, preset
from deltanet.training import load_model, read_metrics
from deltanet.training.compare import LINE_UP

ABLATIONS = ("deltanet-l1-elu", "deltanet-l2-elu", "deltanet-l2-relu")  # below the main table


def test_the_rows_are_all_there() -> None:
    assert set(LINE_UP) | set(ABLATIONS) < set(MODELS)
    assert len(LINE_UP) == 9


@pytest.mark.parametrize("model", MODELS)
def test_a_row(model: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", "--size", "nano", "--model", model, "--data", str(text), "--out", str(run), "--quiet", "--device", "cpu"]
    settings = ["--context", "32", "--batch-size", "4", "--micro-batch-size", "4", "--warmup-steps", "1"]
    settings += ["--sample-tokens", "0", "--evaluate-tokens", "64"]
    for steps in ("1", "3"):  # begun, saved, and gone on with from there
        assert main([*command, *settings, "--steps", steps]) == 0
    lines = [line for line in read_metrics(run) if line["event"] == "step"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]

    trained = load_model(run)
    assert trained.model.config == preset("nano", 257, model=model)
    assert trained.step == 3
    held_out = tokenize(load_corpus(str(text)).validation, trained.tokenizer)
    score = evaluate(trained.model, SequentialWindows(held_out, 32))
    last = [line for line in read_metrics(run) if line["event"] == "evaluation"][-1]
    assert score.bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-5)

    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, _ = trained.model(tokens)
        state, parts = trained.model.init_state(2), []
        for part in tokens.split([33, 1, 6], 1):
            logits, state = trained.model(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)

    expected = "".join(stream_text(trained.model, trained.tokenizer, "Line 7", GREEDY, max_tokens=8))
    capsys.readouterr()
    assert main(["generate", str(run), "-p", "Line 7", "--max-tokens", "8", "--temperature", "0", "--quiet", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
