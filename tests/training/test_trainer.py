"""The loop: it learns, it gives the same bits twice, and whatever stops it, the same call goes on to the same bits."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from deltanet.data import Batch, ByteTokenizer, SequentialWindows, ShuffledWindows, python_text, tokenize
from deltanet.evaluation import token_losses
from deltanet.layers import AttentionConfig, MambaConfig, RetNetConfig
from deltanet.models import MODELS, Block, LanguageModel, preset
from deltanet.training import (
    CheckpointError,
    NonFiniteError,
    RunConfig,
    default_run,
    read_config,
    read_metrics,
    train,
    write_config,
)
from deltanet.training import checkpoint as checkpoint_module
from deltanet.training import trainer as module
from deltanet.training.optimizer import build_optimizer
from deltanet.training.trainer import forward_backward, train_step

SOURCE = Path(__file__).parents[2] / "src"


def curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run) if line["event"] == "step"]


def test_overfits_a_tiny_batch(config: RunConfig) -> None:
    torch.manual_seed(0)
    model = LanguageModel(replace(config.model, d_model=32))
    optimizer = build_optimizer(model, replace(config.train, weight_decay=0.0))
    batch = ShuffledWindows(tokenize(["The quick brown fox jumps over the lazy dog."], ByteTokenizer()), 16).batch_at(
        0, 2
    )
    losses = [train_step(model, optimizer, [batch], 2e-2, 1.0).loss for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(257), abs=0.1)
    assert losses[-1] < 0.02


def test_golden_losses_and_the_same_bits_twice(config: RunConfig, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(config, tmp_path / name)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert [loss for _, loss in curve(tmp_path / "a")] == pytest.approx(GOLDEN_LOSSES, rel=1e-4)


# A change that is meant to move these losses (another initialisation, say) must say so, and replace them.
GOLDEN_LOSSES = [
    5.54211, 5.51305, 5.44342, 5.45275, 5.36833, 5.29473, 5.07443, 4.87767, 4.68344, 4.60271, 4.47741, 4.52646,
]  # fmt: skip


def test_a_run_leaves_what_it_says(config: RunConfig, tmp_path: Path, listen) -> None:
    listener = listen()
    result = train(config, tmp_path / "run", listener)
    run = tmp_path / "run"
    (header,) = listener.headers
    assert (header.steps, header.tokens_per_step, header.resumed_step, header.backend) == (12, 64, 0, "reference")
    assert list(listener.losses) == list(range(1, 13))
    assert [step.learning_rate for step in listener.steps][:5] == pytest.approx([1e-3, 3.25e-3, 5.5e-3, 7.75e-3, 1e-2])
    assert [(e.step, e.whole) for e in listener.evaluations] == [(5, False), (10, False), (12, True)]
    assert listener.evaluations[0].bytes <= 64 < listener.evaluations[-1].bytes == header.validation_bytes
    assert len(listener.samples) == 3
    assert listener.results == [result]
    assert (result.status, result.step, result.tokens) == ("finished", 12, 768)
    assert result.bits_per_byte == listener.evaluations[-1].bits_per_byte
    assert result.checkpoint == run / "checkpoints" / "step-00000012"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000012"]
    assert read_config(run / "config.toml") == config
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-{n:08d}.txt" for n in (5, 10, 12)]


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(
    config: RunConfig, tmp_path: Path, listen, change
) -> None:
    first = train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    again = listen()
    assert train(config, tmp_path / "run", again).bits_per_byte == first.bits_per_byte
    assert (again.steps, again.evaluations) == ([], [])
    assert read_metrics(tmp_path / "run") == lines
    longer = listen()
    train(change(config, steps=14), tmp_path / "run", longer)
    assert list(longer.losses) == [13, 14]
    assert longer.messages[:2] == ["resumed from step 12", "changed since: train.steps 12 -> 14"]
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 15))


def test_no_steps_is_a_run_too(config: RunConfig, tmp_path: Path, change) -> None:
    result = train(change(config, steps=0), tmp_path / "run")
    assert (result.status, result.step) == ("finished", 0)
    assert train(change(config, steps=3), tmp_path / "run").step == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_accumulation_gives_the_gradient_of_the_whole(config: RunConfig, precision: str) -> None:
    """Documents of different lengths leave different numbers of targets in each part: the mean is over all of them."""
    stream = tokenize(
        ["ab", "a long document that goes on", "c", "de", "another long one, without end"], ByteTokenizer()
    )
    windows = ShuffledWindows(stream, 8)
    parts = [windows.batch_at(0, 1), windows.batch_at(1, 3)]
    counts = [int((part.targets >= 0).sum()) for part in parts]
    assert counts[0] * 3 != counts[1]
    model = LanguageModel(config.model)
    context = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")

    def gradient(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        loss = forward_backward(model, batches, context)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, cut = gradient([windows.batch_at(0, 4)]), gradient(parts)
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert torch.allclose(whole[0], cut[0], rtol=tolerance)
    assert (whole[1] - cut[1]).norm() < tolerance * whole[1].norm()


def test_documents_in_one_row_do_not_see_each_other(config: RunConfig) -> None:
    model, texts = LanguageModel(config.model), ["one document", "and another one"]
    row = SequentialWindows(tokenize(texts, ByteTokenizer()), 28).batch_at(0, 1)
    alone = [SequentialWindows(tokenize([text], ByteTokenizer()), len(text)).batch_at(0, 1) for text in texts]
    expected = torch.cat([torch.nn.functional.pad(token_losses(model, batch).flatten(), (0, 1)) for batch in alone])
    assert torch.allclose(token_losses(model, row).flatten(), expected[:-1], atol=1e-5)


@pytest.mark.parametrize("source", ["pydocs", "pycode"])
def test_trains_on_what_is_installed(config: RunConfig, tmp_path: Path, monkeypatch, source: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text(f'"""{"A docstring. " * 100}"""')
    monkeypatch.setattr(python_text, "_roots", lambda: [tmp_path / "package"])
    data = replace(config.data, source=source, cache=str(tmp_path / "cache"))
    assert train(replace(config, data=data), tmp_path / "run").status == "finished"
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == 1


def test_the_header_counts_a_cache_as_long_as_a_window(config: RunConfig, tmp_path: Path, listen, change) -> None:
    attention = replace(config.model, layers=(AttentionConfig(heads=1),))
    listener = listen()
    train(replace(change(config, steps=0), model=attention), tmp_path / "run", listener)
    assert listener.headers[0].state_bytes == 2 * 16 * 16 * 4 + 8  # keys and values of 16 tokens, fp32; and how many


def test_a_run_says_which_way_its_mixers_go(config: RunConfig, tmp_path: Path, listen, change) -> None:
    mixed = replace(config.model, depth=3, layers=(MambaConfig(state=2), RetNetConfig(heads=1), AttentionConfig(heads=1)))
    listener = listen()
    train(replace(change(config, steps=0, device="cpu"), model=mixed), tmp_path / "run", listener)
    assert listener.headers[0].backend == "none"
    assert listener.headers[0].paths == (
        "mamba: PyTorch, chunk by chunk: the fused kernel refuses, it needs a CUDA GPU, and the tensors are on cpu",
        "retnet: PyTorch, chunk by chunk: not fla's kernels, the tensors are on cpu",
        "attention: scaled_dot_product_attention",
    )


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("model", ["deltanet", "gla", "mamba", "deltanet+swa"])
def test_compiled_blocks_give_what_others_give_on_a_gpu(model: str) -> None:
    windows = ShuffledWindows(tokenize(["a document", "and another one"] * 40, ByteTokenizer()), 64, batch_size=4)
    batch = windows.batch_at(0, 4).packed().to("cuda")
    losses, gradients = [], []
    for half, compiled in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        one = LanguageModel(preset("nano", 257, model=model)).cuda()
        if compiled:
            one.compile_blocks()
        losses.append(forward_backward(one, [batch], torch.autocast("cuda", torch.bfloat16) if half else None).item())
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    exact = gradients[0]
    plain, compiled = (((gradient - exact).norm() / exact.norm()).item() for gradient in gradients[1:])
    print(model, losses, plain, compiled)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-3)
    assert plain < 0.1  # two pipelines in bf16, each rounding at other places: as near to fp32 as each other
    assert compiled < 1.25 * plain


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_packed_step_waits_for_the_gpu_once(model: str, monkeypatch) -> None:
    """Only at its end, for the loss; what boundaries there are the host knows by itself. fla's kernels look for them on the GPU."""
    monkeypatch.setattr("deltanet.layers.linear_attention.HAS_FLA", False)
    module_of = LanguageModel(preset("nano", 257, model=model)).cuda()
    optimizer = build_optimizer(module_of, default_run().train)
    windows = ShuffledWindows(tokenize(["a document", "and another one"] * 40, ByteTokenizer()), 64, batch_size=4)
    autocast = torch.autocast("cuda", torch.bfloat16)

    def step(position: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(module_of, optimizer, [windows.batch_at(position, 4).to("cuda")], 1e-3, 1.0, autocast)
        return [str(w.message) for w in caught if "synchroniz" in str(w.message)]

    step(0)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        assert len(step(4)) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cutting_batches_keeps_the_run(config: RunConfig, tmp_path: Path, listen, change) -> None:
    whole, cut = listen(), listen()
    train(config, tmp_path / "whole", whole)
    train(change(config, micro_batch_size=3), tmp_path / "cut", cut)
    assert list(cut.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-4)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_compiled_blocks_keep_the_run_and_compile_once(
    config: RunConfig, tmp_path: Path, listen, change, monkeypatch, micro_batch_size
) -> None:
    """However many documents there are in a batch, and whether or not there are any."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": "abcdefg" * (1 + number % 20)}) + "\n" for number in range(60)))
    config = replace(config, data=replace(config.data, source=str(source)))
    plain, compiled = listen(), listen()
    train(config, tmp_path / "plain", plain)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    train(change(config, compile=True, micro_batch_size=micro_batch_size), tmp_path / "compiled", compiled)
    assert list(compiled.losses.values()) == pytest.approx(list(plain.losses.values()), rel=1e-4)
    most = 1 if micro_batch_size is None else 3  # 4 windows as 3 and 1: two lengths, then any
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= most


def test_recomputing_blocks_keeps_the_run(config: RunConfig, tmp_path: Path, listen, change, monkeypatch) -> None:
    calls: list[bool] = []
    plain = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(torch.is_grad_enabled()) or plain(*args))
    kept, recomputed = listen(), listen()
    train(config, tmp_path / "kept", kept)
    assert sum(calls) == 12
    train(change(config, recompute="blocks"), tmp_path / "recomputed", recomputed)
    assert sum(calls) == 12 + 2 * 12
    assert recomputed.losses == pytest.approx(kept.losses, rel=1e-6)


def test_bfloat16_follows_float32(config: RunConfig, tmp_path: Path, listen, change) -> None:
    full, half = listen(), listen()
    train(config, tmp_path / "full", full)
    train(change(config, precision="bfloat16"), tmp_path / "half", half)
    assert half.headers[0].precision == "bfloat16"
    assert half.losses != full.losses
    assert list(half.losses.values()) == pytest.approx(list(full.losses.values()), rel=0.02)


@pytest.mark.gpu
def test_a_gpu_follows_the_cpu_and_goes_on(config: RunConfig, tmp_path: Path, listen, change) -> None:
    config = replace(config, model=replace(config.model, d_model=64), data=replace(config.data, context=70))
    cpu, first, rest = (
        listen(),
        listen(lambda step: signal.raise_signal(signal.SIGTERM) if step == 6 else None),
        listen(),
    )
    train(change(config, device="cpu"), tmp_path / "cpu", cpu)
    train(config, tmp_path / "gpu", first)
    train(config, tmp_path / "gpu", rest)
    assert first.headers[0].precision == "bfloat16"
    assert list(rest.losses) == list(range(7, 13))
    losses = first.losses | rest.losses
    assert list(losses.values()) == pytest.approx(list(cpu.losses.values()), rel=0.02)


# --- stopping and going on ---


KILLED = """
import os, signal, sys, torch
from deltanet.training import Silent, read_config, train
torch.set_num_threads(1)
class Killer(Silent):
    def step(self, step):
        if step.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
train(read_config(sys.argv[1]), sys.argv[2], Killer())
"""


def test_killed_between_steps_then_the_same_call(config: RunConfig, tmp_path: Path) -> None:
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    write_config(tmp_path / "config.toml", config)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.toml"), str(run)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert [step for step, _ in curve(run)] == [1, 2, 3, 4, 5, 6, 7]
    train(config, run)
    train(config, uninterrupted)
    assert curve(run) == curve(uninterrupted)
    events = [[line["event"] for line in read_metrics(path)] for path in (run, uninterrupted)]
    assert events[0] == events[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    config: RunConfig, tmp_path: Path, listen, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped = listen(lambda step: signal.raise_signal(number) if step == 5 else None)
    result = train(config, tmp_path / "run", stopped)
    assert (result.status, result.step, result.checkpoint.name) == ("interrupted", 5, "step-00000005")
    assert "stopped after step 5 and saved; the same command goes on from there" in stopped.messages[-1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = listen()
    assert train(config, tmp_path / "run", rest).status == "finished"
    assert rest.messages == ["resumed from step 5"]
    uninterrupted = listen()
    train(config, tmp_path / "uninterrupted", uninterrupted)
    assert stopped.losses | rest.losses == uninterrupted.losses


def test_trains_outside_the_main_thread(config: RunConfig, tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_minutes_stop_and_the_same_call_goes_on(config: RunConfig, tmp_path: Path, change, monkeypatch, listen) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def tick(step: int) -> None:
        nonlocal now
        now += 7.0

    limited = change(config, minutes=0.5)
    first = train(limited, tmp_path / "run", listen(tick))
    assert (first.status, first.step, first.seconds) == ("time", 5, 35.0)
    assert first.bits_per_byte is not None
    rest = listen(tick)
    assert [train(limited, tmp_path / "run", rest).status for _ in range(2)] == ["time", "finished"]
    assert list(rest.losses) == list(range(6, 13))
    assert rest.results[-1].seconds == 12 * 7.0


def test_minutes_alone_plan_the_length(config: RunConfig, tmp_path: Path, change, monkeypatch, listen) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    plain = module.train_step

    def slow_step(*arguments, **options):
        nonlocal now
        now += 2.0
        return plain(*arguments, **options)

    monkeypatch.setattr(module, "train_step", slow_step)
    listener = listen(lambda step: signal.raise_signal(signal.SIGTERM) if step == 22 else None)
    planned = change(config, steps=None, minutes=1.0, evaluate_every=1000, save_every=1000)
    train(planned, tmp_path / "run", listener)
    assert listener.headers[0].steps is None
    assert "planned 29 steps for 1 minutes" in listener.messages  # 20 steps in 40 s; 0.9 of the other 20 s holds 9
    rest = listen()
    result = train(planned, tmp_path / "run", rest)
    assert (result.status, result.step, result.steps) == ("finished", 29, 29)
    assert rest.steps[-1].learning_rate == pytest.approx(1e-3)


def test_a_faulty_checkpoint_is_set_aside_and_the_losses_are_the_same(
    config: RunConfig, tmp_path: Path, listen
) -> None:
    whole = listen()
    train(config, tmp_path / "whole", whole)
    train(config, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-00000012" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    rest = listen()
    train(config, tmp_path / "run", rest)
    assert rest.messages[0].startswith("passed over step-00000012: weights.safetensors must have")
    assert rest.messages[0].endswith("kept as step-00000012.rejected")
    assert rest.messages[1] == "resumed from step 8"
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 8}
    assert [step for step, _ in curve(tmp_path / "run")] == list(range(1, 13))


def test_no_checkpoint_in_order_is_not_a_new_start(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    for path in (tmp_path / "run").rglob("MANIFEST.json"):
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="got 2 that are not"):
            train(config, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_is_refused_and_this_one_left_as_it_was(
    config: RunConfig, tmp_path: Path, text: Path, change
) -> None:
    train(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    cases = {
        "model.d_model 16 -> 32; model.layers.0.heads 1 -> 2": replace(
            config, model=replace(config.model, d_model=32, layers=(replace(config.model.layers[0], heads=2),))
        ),
        "data.context 16 -> 8": replace(config, data=replace(config.data, context=8)),
        "train.seed 0 -> 1": change(config, seed=1),
    }
    for message, other in cases.items():
        with pytest.raises(CheckpointError, match=f"must be gone on with as it was begun, got {message}: use"):
            train(other, tmp_path / "run")
    (text.parent / "same.txt").write_text(text.read_text())
    train(replace(config, data=replace(config.data, source=str(text.parent / "same.txt"))), tmp_path / "run")
    text.write_text(text.read_text().replace("7", "8"))
    with pytest.raises(CheckpointError, match="on the text it was trained on, got other tokens"):
        train(config, tmp_path / "run")
    same = {path: path.read_bytes() for path in before if path.name != "config.toml"}
    assert same.items() <= before.items()


def test_another_batch_size_goes_on_at_the_same_window(config: RunConfig, tmp_path: Path, listen, change) -> None:
    stopped = listen(lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None)
    train(config, tmp_path / "run", stopped)
    seen: list[int] = []
    plain = module.train_step

    def note(model, optimizer, batches, *rest, **options):
        seen.extend(batches[0].samples.tolist())
        return plain(model, optimizer, batches, *rest)

    module.train_step = note
    try:
        rest = listen()
        train(change(config, batch_size=2, steps=6), tmp_path / "run", rest)
    finally:
        module.train_step = plain
    assert seen == [16, 17, 18, 19]
    assert "train.batch_size 4 -> 2" in rest.messages[1]


# --- what goes wrong on the way ---


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch):
    """Makes the loss, or the gradient alone, not a number at the given steps."""

    def make(*steps: int, gradient: bool = False) -> None:
        plain, calls = module.forward_backward, iter(range(1, 1000))

        def forward_backward(model, batches, autocast):
            loss = plain(model, batches, autocast)
            if next(calls) not in steps:
                return loss
            if gradient:
                model.norm.weight.grad[3] = torch.inf
            return loss if gradient else loss * torch.nan

        monkeypatch.setattr(module, "forward_backward", forward_backward)

    return make


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(
    config: RunConfig, tmp_path: Path, sick, gradient: bool
) -> None:
    sick(7, gradient=gradient)
    with pytest.raises(NonFiniteError, match=r"step 7 must have a finite .*nonfinite-00000007.json .*step-00000004"):
        train(config, tmp_path / "run")
    noted = json.loads((tmp_path / "run" / "nonfinite-00000007.json").read_text())
    assert noted["samples"] == [24, 25, 26, 27]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert [step for step, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_updated_by_what_is_not_finite(config: RunConfig, sick) -> None:
    model = LanguageModel(config.model)
    optimizer = build_optimizer(model, config.train)
    batch = ShuffledWindows(tokenize(["some text or other"], ByteTokenizer()), 8).batch_at(0, 1)
    train_step(model, optimizer, [batch], 0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sick(1)
    assert not train_step(model, optimizer, [batch], 0.1).finite
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert train_step(model, optimizer, [batch], 0.1).finite


def test_skipping_counts_and_has_an_end(config: RunConfig, tmp_path: Path, listen, sick, change) -> None:
    sick(3, 6)
    listener = listen()
    result = train(change(config, on_nonfinite="skip", max_skips=2), tmp_path / "run", listener)
    assert (result.status, result.skipped) == ("finished", 2)
    assert list(listener.losses) == [1, 2, 4, 5, 7, 8, 9, 10, 11, 12]
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["event"] == "nonfinite"] == [3, 6]
    assert "left out, 2 of at most 2" in listener.messages[-1]
    sick(3, 6)
    with pytest.raises(NonFiniteError, match=r"step 6 .* \(train.max_skips is 1, 1 skipped\)"):
        train(change(config, on_nonfinite="skip", max_skips=1), tmp_path / "again")


def test_a_full_disk_does_not_end_training_but_a_lost_last_checkpoint_does(
    config: RunConfig, tmp_path: Path, listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, full = checkpoint_module.save_file, {4}

    def save_file(tensors, path: Path) -> None:
        if int(path.parent.name[5:13]) in full:
            raise OSError(28, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(checkpoint_module, "save_file", save_file)
    listener = listen()
    assert train(config, tmp_path / "run", listener).status == "finished"
    assert "not saved: a checkpoint in" in listener.messages[0]
    assert listener.messages[0].endswith("Training goes on; next try at step 8")
    full = {12}
    with pytest.raises(CheckpointError, match="free bytes"):
        train(config, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "status.json").read_text())["status"] == "failed"
    assert sorted(path.name for path in (tmp_path / "again" / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000008",
    ]


def test_the_best_checkpoint_is_kept(config: RunConfig, tmp_path: Path, change, monkeypatch) -> None:
    plain = module.Session.evaluate
    worse = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6, 10: 2.7}

    def evaluate(self, max_tokens):
        self.validated = replace(plain(self, max_tokens), bits_per_byte=worse.get(self.progress.step, 9.0))
        return self.validated

    monkeypatch.setattr(module.Session, "evaluate", evaluate)
    train(change(config, evaluate_every=2, save_every=2), tmp_path / "run")
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [4, 10, 12]


# --- what is refused before anything is computed ---


def test_refusals_come_before_compute(config: RunConfig, tmp_path: Path, change, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "train_step", lambda *_: pytest.fail("computed"))
    cases = [
        (config, "file", "out must be a folder, got the file"),
        (change(config, device="cuda:99"), "run", "device must be one that is there, got 'cuda:99'"),
        (change(config, device="tpu"), "run", "device must be"),
        (change(config, device="meta"), "run", "device must be .* got 'meta'"),
        (
            replace(config, model=replace(config.model, vocab_size=100)),
            "run",
            "vocab_size must be at least .* 257, got 100",
        ),
        (replace(config, data=replace(config.data, source="asten")), "run", "did you mean 'austen'"),
        (change(config, batch_size=100000), "run", "one batch of 100000 windows of 16 tokens needs 1600000 tokens"),
    ]
    for wrong, name, message in cases:
        with pytest.raises(ValueError, match=message):
            train(wrong, tmp_path / name)
    monkeypatch.setattr("deltanet.training.device.os.sysconf", lambda name: 300)  # a machine of 90 kB
    with pytest.raises(
        ValueError, match=r"the model of 11,056 parameters must fit .* but needs .* GiB of the .* GiB of cpu"
    ):
        train(change(config, device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_two_runs_do_not_share_a_folder(config: RunConfig, tmp_path: Path, listen) -> None:
    def intrude(step: int) -> None:
        with pytest.raises(ValueError, match="where no run is going on"):
            train(config, tmp_path / "run")

    assert train(config, tmp_path / "run", listen(intrude)).status == "finished"
