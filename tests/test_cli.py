"""The command line as a user meets it: what it prints where, what it leaves behind, and what it says to mistakes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deltanet.cli import COMMANDS, main
from deltanet.cli import compare as compare_command
from deltanet.cli.screen import TextScreen
from deltanet.cli.words import count, duration, printable, size
from deltanet.data import SequentialWindows, load_corpus, tokenize
from deltanet.evaluation import compressed_bits_per_byte, evaluate, plots
from deltanet.inference import Sampling, stream_text
from deltanet.models import MODELS, preset
from deltanet.training import Evaluation, Step, default_run, load_model, read_config, read_metrics

# A model and a text so small that the start of Python is what takes time.
TINY = [
    "--model.d-model", "16", "--model.depth", "1", "--model.feed-forward", "16", "--context", "32",
    "--batch-size", "4", "--micro-batch-size", "4", "--warmup-steps", "2", "--evaluate-tokens", "64",
    "--sample-tokens", "12", "--device", "cpu",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def start(*args, cwd, **options):
    command = [sys.executable, "-m", "deltanet", *map(str, args)]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and, in runs/text-custom, a run on it, made as a user would; and what that printed."""
    folder = tmp_path_factory.mktemp("place")
    words = "the cat sat on the mat and the dog saw the cat é\n"
    (folder / "text.txt").write_text("".join(words[i % 7 :] for i in range(120)))
    code, out, err = finish(
        start("train", "--data", "text.txt", *TINY, "--steps", "6", "--evaluate-every", "3", cwd=folder)
    )
    assert (code, err) == (0, "")
    return folder, out


@pytest.fixture
def here(place, monkeypatch):
    """That folder as the current one."""
    monkeypatch.chdir(place[0])
    return place[0]


def run(capsys, *args):
    """(exit code, stdout, stderr) of a command, in this process."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def fails(capsys, *args):
    """(exit code, the one line on stderr) of a command that must fail and say nothing else."""
    code, out, err = run(capsys, *args)
    assert out == ""
    assert re.fullmatch(r"deltanet: error: [^\n]+\n", err), err
    return code, err.removeprefix("deltanet: error: ").strip()


# --- train


def test_training_in_a_pipe_prints_plain_lines(place):
    _, out = place
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["model", "device", "backend", "data", "training", "run"]
    assert "CPU" in lines[1]
    assert lines[2].split()[1] == "reference;"
    assert "not triton: it needs a CUDA GPU" in lines[2]
    assert "your own text" in lines[3]
    assert "128 tokens a step, 6 steps" in lines[4]
    assert any(
        re.match(r"step 1/6 · loss 5\.\d+ · \d\.\d\d bits/byte · .* tokens/s · .* left · \d+ MiB", x) for x in lines
    )
    assert sum("bits per byte (a sample of" in line for line in lines) == 1
    assert any(line.startswith("  | ") for line in lines)
    assert re.search(
        r"^validation +\d\.\d+ bits per byte +\(gzip -9 \d\.\d+, xz -9 \d\.\d+ on the same bytes\)", out, re.M
    )
    assert lines[-3].split()[0] == "next"
    assert "\x1b" not in out


def test_training_leaves_a_run_that_latest_points_to(here):
    assert (here / "runs" / "latest").resolve() == here / "runs" / "text-custom"
    config = read_config(here / "runs" / "latest" / "config.toml")
    assert (config.model.d_model, config.data.context, config.train.steps) == (16, 32, 6)
    assert [line["step"] for line in read_metrics(here / "runs" / "latest") if line["event"] == "step"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_training_as_json_and_as_nothing(here, capsys, tmp_path):
    code, out, err = run(capsys, "train", "--data", "text.txt", *TINY, "--steps", 2, "--out", tmp_path / "a", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    kinds = [event["event"] for event in events]
    assert kinds[0] == "header"
    assert kinds[-1] == "end"
    assert {"step", "evaluation"} <= set(kinds)
    assert events[-1]["status"] == "finished"
    assert events[-1]["bits_per_byte"] > 0
    assert not (tmp_path / "latest").exists()  # only beside runs in a folder of that name
    arguments = ["train", "--data", "text.txt", *TINY, "--steps", 2, "--out", tmp_path / "b", "--quiet"]
    assert run(capsys, *arguments) == (0, "", "")


def test_the_same_command_goes_on_or_begins_anew(here, capsys):
    arguments = ["train", "--data", "text.txt", *TINY, "--steps", 6, "--evaluate-every", 3]
    status = here / "runs" / "text-custom" / "status.json"
    finished = status.read_text()
    status.write_text('{"status": "running"}')  # as after kill -9
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "resumed from step 6" in out
    assert "runs/text-custom, from step 6" in out
    assert json.loads(status.read_text())["status"] == json.loads(finished)["status"] == "finished"
    code, out, _ = run(capsys, *arguments)
    assert "runs/text-custom-2\n" in out
    assert (here / "runs" / "latest").resolve().name == "text-custom-2"
    status.write_text('{"status": "running"}')  # unfinished, but another run is asked for
    _, out, _ = run(capsys, *arguments, "--seed", 1)
    assert "runs/text-custom-3\n" in out


def test_a_file_first_and_options_on_top(here, capsys, tmp_path):
    file = here / "runs" / "text-custom" / "config.toml"
    arguments = ["train", "--config", file, "--steps=1", "--learning_rate", "0.5", "--out", tmp_path / "run", "--quiet"]
    assert run(capsys, *arguments)[0] == 0
    config = read_config(tmp_path / "run" / "config.toml")
    assert (config.model.d_model, config.train.steps, config.train.learning_rate) == (16, 1, 0.5)
    assert config.data.source == "text.txt"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], lambda c: c == default_run("nano")),
        (["--size", "small"], lambda c: c == default_run("small")),
        (["--minutes", "3"], lambda c: (c.train.steps, c.train.tokens, c.train.minutes) == (None, None, 3.0)),
        (["--minutes", "3", "--steps", "9"], lambda c: (c.train.steps, c.train.minutes) == (9, 3.0)),
        (["--tokens", "999"], lambda c: (c.train.steps, c.train.tokens) == (None, 999)),
        (["--data", "x.txt"], lambda c: c.data.source == "x.txt"),
        (["--data.source", "x.txt"], lambda c: c.data.source == "x.txt"),
        (["--train.micro-batch-size", "None"], lambda c: c.train.micro_batch_size is None),
        (["--model.layers.0.output-gate"], lambda c: c.model.layers[0].output_gate),
        (
            ["--mix", "delta*2,swa(window=64)"],
            lambda c: [x.kind for x in c.model.layers] == ["delta", "delta", "attention"],
        ),
        (["--size", "micro", "--d-model", "64"], lambda c: (c.model.d_model, c.model.depth) == (64, 6)),
    ],
)
def test_what_options_make_of_a_run(arguments, expected):
    from deltanet.cli.train import train_options, with_sections
    from deltanet.training import RunConfig

    _, config = train_options(with_sections(arguments, RunConfig))
    assert expected(config), config


def test_size_replaces_the_model_of_a_file(here):
    from deltanet.cli.train import train_options

    _, config = train_options(["--config", "runs/text-custom/config.toml", "--size", "nano"])
    assert config.model == default_run("nano").model
    assert config.data.source == "text.txt"


def test_ctrl_c_saves_and_ends_with_130(here, tmp_path):
    process = start(
        "train", "--data", "text.txt", *TINY, "--steps", 10**6, "--out", tmp_path / "run", "--json", cwd=here
    )
    while '"step"' not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert "the same command goes on from there" in out
    assert load_model(tmp_path / "run").step >= 1


def test_a_terminal_gets_one_live_line(monkeypatch):
    file = io.StringIO()
    screen = TextScreen(default_run(), Console(file=file, force_terminal=True, width=100, soft_wrap=True))
    numbers = {
        "steps": 3, "tokens": 10, "loss": 2.0, "bits_per_byte": 2.9, "learning_rate": 0.1, "grad_norm": 1.0,
        "seconds": 1.0, "tokens_per_second": 15300.0, "seconds_left": 65.0, "memory_bytes": 3 << 20,
    }  # fmt: skip
    for step in (1, 2):
        screen.step(Step(step=step, **numbers))
    screen.evaluation(Evaluation(step=2, tokens=10, loss=1.7, bits_per_byte=2.5, bytes=100, whole=False, seconds=0.1))
    screen.sample("a\x1b[2Jb")
    time.sleep(0.3)
    screen.close()
    shown = file.getvalue()
    assert "step 2/3 · loss 2.000 · 2.90 bits/byte · 15.3 k tokens/s · 1:05 min left · 3 MiB" in shown
    assert "\x1b[1;32mstep 2: validation 2.500 bits per byte (a sample of 100 bytes)" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert "\x1b[2J" not in shown


# --- compare


COMPARE = [
    "compare", "--models", "deltanet-noconv", "transformer++", "--depth", "1", "--data", "text.txt", "--context", "32", "--batch-size", "4",
    "--micro-batch-size", "4", "--warmup-steps", "2", "--steps", "2", "--evaluate-tokens", "64", "--device", "cpu",
]  # fmt: skip


def test_comparing_leaves_a_table_and_goes_on(place, tmp_path):
    folder, _ = place
    out = tmp_path / "out"
    code, text, err = finish(start(*COMPARE, "--out", out, cwd=folder))
    assert (code, err) == (0, "")
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("== ")] == ["== deltanet-noconv", "== transformer++"]
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert rows == ["| model", "| ---", "| transformer++", "| deltanet-noconv"]
    code, text, err = finish(start(*COMPARE, "--out", out, "--json", cwd=folder))
    assert (code, err) == (0, "")
    (line,) = text.splitlines()  # nobody was trained again
    assert [row["model"] for row in json.loads(line)["rows"]] == ["transformer++", "deltanet-noconv"]


def test_a_comparison_that_cannot_begin_leaves_nothing_behind(place, tmp_path):
    """Said once, not once a model; and the corrected command may use the same folder."""
    folder, _ = place
    out = tmp_path / "out"
    code, text, err = finish(start(*COMPARE, "--data", "none.txt", "--out", out, "--quiet", cwd=folder))
    assert (code, text) == (2, "")
    assert re.fullmatch(r"deltanet: error: [^\n]*none.txt[^\n]*\n", err)
    assert not out.exists()
    # time is over before a model is finished: the others have theirs all the same, and the next call goes on
    code, text, err = finish(start(*COMPARE, "--steps", "100000", "--minutes", "0.005", "--out", out, "--quiet", cwd=folder))
    assert (code, text) == (1, "")
    assert err == "deltanet: not finished: deltanet-noconv, transformer++; the same command goes on with them\n"
    assert all(read_metrics(out / model) for model in ("deltanet-noconv", "transformer++"))


def test_a_comparison_from_a_file(here, capsys, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, *COMPARE, "--steps", 0, "--only", "deltanet-noconv", "--out", out, "--quiet")[0] == 0
    again = tmp_path / "again"
    options = ["--config", out / "comparison.toml", "--only", "transformer++", "--depth", 2, "--out", again, "--quiet"]
    assert run(capsys, "compare", *options)[0] == 0
    assert read_config(again / "transformer++" / "config.toml").model.depth == 2
    assert read_config(again / "transformer++" / "config.toml").data == read_config(out / "deltanet-noconv" / "config.toml").data


def test_models_side_by_side_have_a_gpu_each(monkeypatch, tmp_path, capsys):
    commands, both = [], threading.Barrier(2)

    def follow(command, prefix, gpu):
        both.wait(10)  # two at a time
        commands.append((prefix, command[command.index("--only") + 1], gpu))
        return 0

    monkeypatch.setattr(compare_command, "follow", follow)
    options = compare_command.CompareOptions(gpus=2)
    models = ["gla", "retnet", "mamba", "deltanet"]
    assert compare_command.train_side_by_side([], options, models, tmp_path) == [0, 0, 0, 0]
    assert sorted((prefix, model) for prefix, model, _ in commands) == sorted(zip(models, models, strict=True))
    assert sorted(gpu for *_, gpu in commands) == ["0", "0", "1", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    compare_command.train_side_by_side([], options, models[:2], tmp_path)
    assert sorted(gpu for *_, gpu in commands[4:]) == ["5", "GPU-abc"]


@pytest.mark.gpu
def test_a_gpu_may_be_named(place, tmp_path):
    """In a process that has not asked for any GPU before."""
    wide = ["--model.d-model", "64"]  # two heads of 32; the kernels have none of 8
    command = ["train", "--data", "text.txt", *TINY, *wide, "--device", "cuda:0", "--steps", "2", "--out", tmp_path / "run", "--quiet"]
    assert finish(start(*command, cwd=place[0]))[0] == 0
    assert finish(start("generate", tmp_path / "run", "-p", "the", "--max-tokens", "3", "--device", "cuda:0", cwd=place[0]))[0] == 0


@pytest.mark.multi_gpu
def test_two_gpus_give_what_one_gives(place, tmp_path):
    tables = []
    for gpus in ("1", "2"):
        out = tmp_path / gpus
        assert finish(start(*COMPARE, "--device", "auto", "--gpus", gpus, "--out", out, "--quiet", cwd=place[0]), 300)[0] == 0
        tables.append({row["model"]: row["loss"] for row in json.loads((out / "comparison.json").read_text())["rows"]})
    assert tables[0] == tables[1]


def test_lines_of_one_of_several_models_say_whose_they_are(capsys):
    command = [sys.executable, "-c", "import os; print('step 1'); print(os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit(3)"]
    assert compare_command.follow(command, "gla", "GPU-abc") == 3
    assert capsys.readouterr().out == "gla              step 1\ngla              GPU-abc\n"


def test_mistakes_in_comparing(here, capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert fails(capsys, "compare", "--models", "deltanet+slides", *out) == (
        2,
        f"model must be one of {', '.join(MODELS)}, got 'deltanet+slides'. Did you mean 'deltanet+swa'?",
    )
    assert fails(capsys, "compare", "--depth", "0", *out)[1] == "depth must be between 1 and 1024, got 0"
    assert fails(capsys, "compare", "--gpus", "3", *out)[1].startswith("gpus must be at most the")
    assert fails(capsys, "compare", "--stepps", "3", *out)[1] == "there is no option --stepps: did you mean --steps?"
    assert not (tmp_path / "out").exists()


def test_a_model_by_name(here, capsys, tmp_path):
    code, out, _ = run(
        capsys, "train", "--model", "gla", "--data", "text.txt", "--context", "32", "--steps", 0, "--out", tmp_path / "a"
    )
    assert code == 0
    assert "mixer      gla: PyTorch, chunk by chunk" in out
    assert read_config(tmp_path / "a" / "config.toml").model == preset("nano", 257, model="gla")
    assert fails(capsys, "train", "--model", "glaa")[1].endswith("got 'glaa'. Did you mean 'gla'?")
    config = tmp_path / "a" / "config.toml"
    assert "--model gla of which size?" in fails(capsys, "train", "--model", "gla", "--config", config)[1]


# --- generate


def test_generated_text_is_the_models(here, capsys):
    trained = load_model("runs/text-custom")
    sampling = Sampling(temperature=0.5, top_k=20, top_p=0.9, seed=7)
    expected = "".join(stream_text(trained.model, trained.tokenizer, "the cat", sampling, max_tokens=30))
    options = ["--max-tokens", 30, "--temperature", 0.5, "--top-k", 20, "--top-p", 0.9, "--seed", 7]
    assert run(capsys, "generate", "runs/text-custom", "-p", "the cat", *options) == (0, f"the cat{expected}\n", "")
    quiet = run(capsys, "generate", "runs/text-custom", "--prompt", "the cat", *options, "--quiet")
    assert quiet == (0, f"{expected}\n", "")
    code, out, _ = run(capsys, "generate", "runs/text-custom", "-p", "the cat", *options, "--json")
    assert code == 0
    assert json.loads(out).items() >= {"prompt": "the cat", "text": expected, "step": 6}.items()


def test_generation_takes_the_latest_run_and_a_long_prompt(here, capsys):
    code, out, err = run(capsys, "generate", "-p", "x" * 100, "--max-tokens", 1)
    assert code == 0
    assert out.startswith("x" * 100)
    assert err == "note: the prompt has 100 tokens, training windows had 32\n"


def test_a_hybrid_says_at_once_that_its_cache_is_too_small(here, capsys, tmp_path):
    """Before anything is trained, read or printed."""
    train = ["train", "--data", "text.txt", "--mix", "delta*2,attention(max_context=40)", "--steps", 0, "--out", tmp_path / "run"]
    train += [*TINY, "--model.depth", 3]
    too_small = "the attention cache takes max_context = 40 tokens, got"
    assert fails(capsys, *train, "--sample-tokens", 41)[1].startswith(f"{too_small} 41: ask for fewer")
    assert run(capsys, *train, "--quiet")[0] == 0
    generate = ["generate", tmp_path / "run", "-p", "the cat", "--temperature", 0, "--device", "cpu", "--max-tokens"]
    assert fails(capsys, *generate, 34)[1].startswith(f"{too_small} 41: ask for fewer")  # 8 tokens of prompt, and 33 that are read
    assert run(capsys, *generate, 33)[0] == 0
    assert fails(capsys, "evaluate", tmp_path / "run", "--longest", 256)[1].startswith(f"{too_small} 256: ask for fewer")


def test_a_reader_that_leaves_is_no_error(here):
    process = start("generate", "runs/text-custom", "-p", "the", "--max-tokens", 3000, cwd=here)
    assert process.stdout.read(3) == "the"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


# --- evaluate, plot


@pytest.fixture
def measured(here, capsys):
    """The run after `deltanet evaluate`, and what that wrote and printed."""
    code, out, err = run(capsys, "evaluate", "runs/text-custom", "--longest", 512)
    assert (code, err) == (0, "")
    return json.loads((here / "runs" / "text-custom" / "evaluation.json").read_text()), out


def test_evaluation_is_that_of_the_text_held_out(measured):
    record, out = measured
    trained, corpus = load_model("runs/text-custom"), load_corpus("text.txt")
    stream = tokenize(corpus.validation, trained.tokenizer)
    score = evaluate(trained.model, SequentialWindows(stream, 32))
    assert record["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert record["bytes"] == stream.bytes == len("".join(corpus.validation).encode())
    assert record["yardsticks"] == compressed_bits_per_byte("".join(corpus.validation).encode())
    rows = record["by_position"]
    assert rows[0][0] == 0
    assert rows[-1][1] == 127
    assert all(after[0] == before[1] + 1 for before, after in pairwise(rows))  # no gap where the long windows take over
    assert [cost["context"] for cost in record["decoding"]] == [256, 512]
    assert f"bits per byte   {score.bits_per_byte:.3f} on {stream.bytes:,} bytes held out, gzip -9 " in out
    assert "longer than in training" in out


def test_evaluation_of_a_part_as_json(here, capsys):
    code, out, _ = run(
        capsys, "evaluate", "runs/text-custom", "--longest", 0, "--max-tokens", 64, "--step", 6, "--json"
    )
    record = json.loads(out)
    assert code == 0
    assert 0 < record["tokens"] <= 64
    assert record["yardsticks"] == {}  # they would be of other bytes
    assert record["decoding"] == []
    assert run(capsys, "evaluate", "runs/text-custom", "--longest", 0, "--quiet") == (0, "", "")


def test_plots_are_drawn(measured, here, capsys):
    names = [
        f"runs/text-custom/plots/{name}.{kind}"
        for name in ("learning", "positions", "decoding")
        for kind in ("png", "svg")
    ]
    assert run(capsys, "plot", "runs/text-custom") == (0, "\n".join(names) + "\n", "")
    assert all(Path(name).stat().st_size > 5000 for name in names)
    assert json.loads(run(capsys, "plot", "runs/text-custom", "--json")[1]) == {"plots": names}
    (here / "runs" / "text-custom" / "evaluation.json").unlink()
    code, out, _ = run(capsys, "plot", "runs/text-custom")
    assert code == 0
    assert out.splitlines()[-1] == "for more: deltanet evaluate runs/text-custom, then this again"
    assert run(capsys, "plot", "runs/text-custom", "--quiet") == (0, "", "")


def test_without_matplotlib_there_is_a_line_of_bars(here, capsys, monkeypatch):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    code, out, err = run(capsys, "plot", "runs/text-custom")
    assert code == 1
    assert re.search(r"^[▁▂▃▄▅▆▇█]{6}$", out, re.M)
    assert "pip install 'deltanet[plot]'" in err


# --- benchmark, doctor, overview


def test_the_benchmark_measures_and_writes(capsys, tmp_path):
    sizes = [
        "--lengths",
        32,
        64,
        "--tokens",
        64,
        "--width",
        32,
        "--head-dims",
        16,
        "--seconds",
        0.001,
        "--device",
        "cpu",
    ]
    code, out, err = run(capsys, "benchmark", "speedup", *sizes, "--out", tmp_path / "new")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "cpu, float32, 64 tokens, width 32"
    assert [line.split()[:2] for line in lines[2:4]] == [["16", "32"], ["16", "64"]]
    assert lines[4:] == [str(tmp_path / "new" / f"speedup.{kind}") for kind in ("json", "png", "svg")]
    record = json.loads((tmp_path / "new" / "speedup.json").read_text())
    assert [row["length"] for row in record["rows"]] == [32, 64]
    assert all(row["speedup"] == row["recurrent_ms"] / row["chunk_ms"] > 0 for row in record["rows"])
    assert json.loads(run(capsys, "benchmark", *sizes, "--json")[1])["tokens"] == 64
    assert run(capsys, "benchmark", *sizes, "--quiet") == (0, "", "")


def test_the_doctor_tells_and_checks(capsys, monkeypatch):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert f"torch      {torch.__version__}" in out
    assert "[plot]     complete" in out
    assert "<- auto takes it" in out
    assert "reference: as defined" in out
    code, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["checks"]["reference"]["right"] is True

    from deltanet.cli import doctor

    right = doctor.chunk_delta_rule
    monkeypatch.setattr(doctor, "chunk_delta_rule", lambda *a, **k: (1.01 * right(*a, **k)[0], None))
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "reference: WRONG" in out


def test_help_and_version(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert all(f"  {name} " in out for name in COMMANDS)
    assert re.fullmatch(r"deltanet \d+\.\d+\.\d+\n", run(capsys, "--version")[1])
    for name in COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"usage: deltanet {name}" in out
    assert "--train.learning-rate" in run(capsys, "train", "--help")[1]


def test_help_reads_nothing_heavy():
    code = "import sys, deltanet.cli as c; c.main(['--help']); print({'tyro', 'rich', 'deltanet.training'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "there is no command 'trian': did you mean 'train'?"),
        ("xyz", f"there is no command 'xyz': known are {', '.join(COMMANDS)}"),
        ("train --stepz 3", "there is no option --stepz: did you mean --steps?"),
        ("train --train.setps 3", "there is no option --train.setps: did you mean --train.steps?"),
        ("train --steps many", "--train.steps must be {None}|INT, got 'many'"),
        ("train --batch-size 1.5", "--train.batch-size: invalid literal for int() with base 10: '1.5'"),
        ("train --steps -3", "[train] steps must be from 0 to"),
        ("train --minutes 0", "[train] minutes must be from 0.001 to"),
        ("train --steps 5 --tokens 5", "[train] steps or tokens must be left out, got 5 and 5"),
        ("train --batch-size 9999999999", "[train] batch_size must be from 1 to"),
        ("train --d-model 999999999", "[model] d_model must be between 1 and 65536, got 999999999"),
        ("train --precision float8", "float8"),
        ("train --size tiny", "size must be one of nano, micro, small, medium, 340m, 1.3b, got 'tiny'"),
        ("train --mix dleta", "mix must name mixers of delta,"),
        ("train --mix delta*2", "mix must have a number of layers that divides depth = 3, got 2"),
        ("train --size", "--size must be given a value"),
        ("train --config none.toml", "nothing is at 'none.toml'"),
        ("train --config bad.toml", "'bad.toml': [train] has no field 'stepz'. Did you mean 'steps'?"),
        ("train --config torn.toml", "'torn.toml' must be TOML"),
        ("train --data none.txt", "nothing is at 'none.txt'"),
        ("train --data empty.txt", "'empty.txt' must hold text, got an empty file"),
        ("train --data latin.txt", "latin.txt:2: expected UTF-8, got byte 0xe9 at column 2"),
        ("train --data short.txt --out o", "one batch of 16 windows of 128 tokens needs 2048 tokens"),
        ("train --data text.txt --out text.txt", "out must be a folder, got the file 'text.txt'"),
        ("train --data text.txt --out full", "out must be a new folder or that of a run, got 'full' with other things"),
        ("train --data text.txt --device tpu --out o", "device must be"),
        ("train --data text.txt --backend tritn --out o", "tritn"),
        ("generate nowhere -p a", "'nowhere' must be a run folder with checkpoints, got none there"),
        ("generate text.txt -p a", "'text.txt' must be a run folder"),
        ("generate runs/text-custom", "--prompt must be given a value"),
        ("generate runs/text-custom -p a --temperature -1", "temperature must be a finite number >= 0, got -1.0"),
        ("generate runs/text-custom -p a --top-k 0", "top_k must be at least 1, got 0"),
        ("generate runs/text-custom -p a --top-p 2", "top_p must lie in (0, 1], got 2.0"),
        ("generate runs/text-custom -p a --max-tokens -5", "max_tokens must be >= 0, got -5"),
        ("generate runs/text-custom -p a --backend tritn", "tritn"),
        ("evaluate nowhere", "'nowhere' must be a run folder"),
        ("evaluate runs/text-custom --stretch 0", "stretch must be at least 1"),
        ("evaluate runs/text-custom --batch-size 0", "batch_size and max_tokens must be at least 1, got 0 and None"),
        ("evaluate runs/text-custom --max-tokens 0", "got 16 and 0"),
        ("plot nowhere", "'nowhere' must be the folder of a run with steps"),
        ("plot broken", "'broken/evaluation.json' must be JSON"),
        ("benchmark sped", "invalid choice 'sped'"),
        ("benchmark --device cpu --lengths 48 --tokens 100", "every length must divide the 100 tokens"),
        ("benchmark --device cpu --lengths 0", "lengths must be at least 1, got 0"),
        ("benchmark --device cpu --seconds 0", "seconds must be above 0"),
        ("doctor --jsn", "there is no option --jsn: did you mean --json?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here, capsys, arguments, message):
    (here / "bad.toml").write_text('[model]\nsize = "nano"\n[train]\nstepz = 3\n')
    (here / "torn.toml").write_text("[model\n")
    (here / "empty.txt").write_text("")
    (here / "latin.txt").write_bytes(b"a\nb\xe9\n" * 50)
    (here / "short.txt").write_text("word " * 50)
    for name in ("full", "broken"):
        (here / name).mkdir(exist_ok=True)
    (here / "full" / "file").write_text("")
    (here / "broken" / "evaluation.json").write_text("{")
    (here / "broken" / "metrics.jsonl").write_text((here / "runs/text-custom/metrics.jsonl").read_text())
    code, said = fails(capsys, *arguments.split())
    assert message in said
    assert code == 2
    assert not (here / "o" / "checkpoints").exists()


def test_an_empty_prompt_is_refused_before_the_model_is_read(here, capsys):
    assert fails(capsys, "generate", "nowhere", "-p", "") == (
        2,
        "the prompt must hold some text, got an empty one: give at least one character to go on from",
    )


def test_what_fails_on_the_way_is_exit_code_1(here, capsys, tmp_path):
    code, said = fails(capsys, "generate", "runs/text-custom", "-p", "a", "--step", 5)
    assert code == 1
    assert "step must be one that was saved (6), got 5" in said
    # Another run in the same folder.
    code, said = fails(
        capsys, "train", "--data", "text.txt", *TINY, "--steps", 9, "--seed", 5, "--out", "runs/text-custom"
    )
    assert code == 1
    assert "train.seed 0 -> 5" in said


def test_a_damaged_checkpoint_is_passed_over_aloud(here, capsys, tmp_path):
    arguments = [
        "train",
        "--data",
        "text.txt",
        *TINY,
        "--steps",
        4,
        "--save-every",
        2,
        "--out",
        tmp_path / "r",
        "--quiet",
    ]
    assert run(capsys, *arguments) == (0, "", "")
    weights = tmp_path / "r" / "checkpoints" / "step-00000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = run(capsys, "generate", tmp_path / "r", "-p", "a", "--max-tokens", 2, "--json")
    assert code == 0
    assert json.loads(out)["step"] == 2
    assert "note: passed over step-00000004: weights.safetensors must have" in err


def test_ctrl_c_and_bugs(capsys, monkeypatch):
    from deltanet.cli import doctor

    def stop(kind):
        def examine():
            raise kind

        return examine

    monkeypatch.setattr(doctor, "examine", stop(KeyboardInterrupt()))
    assert run(capsys, "doctor") == (130, "", "deltanet: interrupted\n")
    monkeypatch.setattr(doctor, "examine", stop(OSError("the disk is gone")))
    assert fails(capsys, "doctor") == (1, "the disk is gone")
    monkeypatch.setattr(doctor, "examine", stop(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_numbers_are_readable():
    assert [count(n) for n in (7, 999, 1500, 2_340_000, 5e9)] == ["7", "999", "1.5 k", "2.34 M", "5 G"]
    assert [size(n) for n in (5, 2048, 3 << 20, 5 << 30)] == ["5 bytes", "2 KiB", "3 MiB", "5 GiB"]
    assert [duration(n) for n in (0.4, 65, 3725)] == ["0:00 min", "1:05 min", "1:02:05 h"]
    assert printable("a\tb\n\x1b[31mé") == "a\tb\n\ufffd[31mé"
