"""Training throughput of whole models against sequence length, as in figure 6 of the paper (arXiv 2406.06484): forward, backward, AdamW.

    python benchmarks/models.py                                            the figure: 1.3b, 2K x 8 to 16K x 1
    python benchmarks/models.py --size 340m --shapes 16x2048 1x32768 --models deltanet transformer++

Random tokens, bfloat16 products over weights in float32 as the trainer has it (--weights bfloat16: the weights too). Tokens a second are those
of the median step. A file is written after every row, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measure import environment, table

from deltanet.evaluation import plots
from deltanet.evaluation.decoding import token_ms
from deltanet.layers import Mixer
from deltanet.models import MODELS, SIZES, LanguageModel, preset
from deltanet.ops.segments import upload
from deltanet.training import TrainConfig
from deltanet.training.optimizer import build_optimizer

SHAPES = ("8x2048", "4x4096", "2x8192", "1x16384")
LINE_UP = ("transformer++", "mamba", "gla", "deltanet")
# Thousand tokens a second on one H100 at 1.3b and SHAPES; digitized from figure 6, so good to about 0.3.
PAPER = {
    "transformer++": (51.3, 46.7, 38.7, 29.1),
    "mamba": (22.8, 22.8, 22.8, 26.0),
    "gla": (43.8, 43.5, 43.2, 41.1),
    "deltanet": (41.5, 41.6, 40.0, 37.3),
}


class Trainee:
    """A model in training, as `step()`."""

    def __init__(self, size: str, name: str, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        config = preset(size, options.vocab_size, model=name, **({"depth": options.depth} if options.depth else {}))
        torch.manual_seed(0)
        with self.device:
            self.model = LanguageModel(config)
        if options.weights == "bfloat16":
            self.model.bfloat16()
        self.autocast = options.weights == "float32" and self.device.type == "cuda"
        self.model.recompute = options.recompute
        self.packs = options.compile and not options.rows
        if options.compile:
            self.model.compile_blocks()
        self.optimizer = build_optimizer(self.model, TrainConfig(steps=1))

    def cut(self, batch: int, length: int, documents: int) -> None:
        """The next steps are on `batch` rows of `length` tokens, in which so many documents lie, on average, of unequal length."""
        generator = torch.Generator().manual_seed(0)
        self.length, tokens = length, batch * length
        packed = self.packs or documents > 1  # as the trainer has it: one shape whatever the rows, so that it is compiled once
        shape = (1, tokens) if packed else (batch, length)
        self.tokens, self.targets = torch.randint(self.model.config.vocab_size, (2, *shape), generator=generator).to(self.device)
        self.cu_seqlens = None
        if packed:
            starts = [torch.arange(0, tokens + 1, length), torch.randint(1, tokens, (batch * (documents - 1),), generator=generator)]
            self.cu_seqlens = upload(torch.cat(starts).unique().to(torch.int32), self.device)

    def loss(self) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            return self.model.losses(self.tokens, self.targets, cu_seqlens=self.cu_seqlens).mean()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def paths(model: LanguageModel) -> list[str]:
    """Which way the mixers go that have several."""
    weight = model.lm_head.weight
    x = torch.empty(1, 2, 1, device=weight.device, dtype=torch.bfloat16 if weight.is_cuda else weight.dtype)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return sorted({path for mixer in mixers if (path := mixer.path(x))})


def measure(trainee: Trainee, seconds: float) -> dict[str, Any]:
    cuda = trainee.device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    trainee.step()
    wait()
    first = time.perf_counter() - begun
    trainee.step()
    wait()
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        trainee.step()
        wait()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None  # of steps: a loss more would find the last gradients beside it
    trained_on = trainee.loss().item()
    with torch.no_grad():  # as a model is evaluated: never compiled
        evaluated = trainee.loss().item()
    tokens, median = trainee.tokens.numel(), statistics.median(times)
    return {
        "step_ms": 1e3 * median,
        "steps": len(times),
        "tokens_per_second": tokens / median,
        "first_step_s": first,
        "peak_gib": peak,
        "loss": trained_on,
        "loss_evaluated": evaluated,
        "flops_per_second": trainee.model.flops_per_token(trainee.length) * tokens / median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3b", choices=SIZES)
    parser.add_argument("--depth", type=int, default=None, help="blocks, if not the size's")
    parser.add_argument("--models", nargs="+", default=list(LINE_UP), choices=MODELS, metavar="MODEL")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxT")
    parser.add_argument("--documents", type=int, default=1, help="documents in a row, packed; 1: none")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile over each block")
    parser.add_argument("--rows", action="store_true", help="compiled, too, leave rows without documents unpacked (compiles twice)")
    help = "also generation after the first length, in bfloat16, of so many sequences at a time (1 if no number is given)"
    parser.add_argument("--generate", nargs="*", type=int, metavar="B", help=help)
    parser.add_argument("--recompute", default="nothing", choices=("nothing", "cheap", "blocks"), help="as train.recompute")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, a row")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="a .json file; the plot goes beside it")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {"settings": settings, "environment": environment(torch.device(options.device)), "rows": []}
    for name in options.models:
        trainee = Trainee(options.size, name, options)
        for batch, length in shapes:
            row: dict[str, Any] = {
                "model": name,
                "batch": batch,
                "length": length,
                "documents": options.documents,
                "compile": options.compile,
                "parameters": trainee.model.parameter_count(),
                "paths": paths(trainee.model),
            }
            trainee.cut(batch, length, options.documents)
            try:
                row |= measure(trainee, options.seconds)
                print(line(row), flush=True)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).split(".")[0]
                print(f"{name:<16} {batch:>3} x {length:<6} {row['error']}", flush=True)
            result["rows"].append(row)
            write(options.out, result)
        for batch in [] if options.generate is None else options.generate or [1]:
            trainee.optimizer.zero_grad(set_to_none=True)
            ms = token_ms(trainee.model.bfloat16(), shapes[0][1], batch)
            row = {"model": name, "context": shapes[0][1], "batch": batch, "generation_ms": ms, "tokens_per_second": 1e3 * batch / ms}
            print(f"{name:<16} {ms:.2f} ms a token of {batch} sequences", flush=True)
            result.setdefault("generation", []).append(row)
        write(options.out, result)
        del trainee
        torch.compiler.reset()  # its memory of other models' blocks counts against a limit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if options.out and plots.can_plot():
        plot(options.out.with_suffix(""), result)
    print(summary(result["rows"]))


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<16} {row['batch']:>3} x {row['length']:<6} {row['tokens_per_second'] / 1e3:8.1f} kt/s  {row['peak_gib'] or 0:6.1f} GiB"
        f"  first {row['first_step_s']:.1f} s  loss {row['loss']:.4f}, evaluated {row['loss_evaluated']:.4f}  {'; '.join(row['paths'])}"
    )


def write(out: Path | None, result: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def summary(rows: list[dict[str, Any]]) -> str:
    """Thousand tokens a second, models down and shapes across."""
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in rows))
    found = {(row["model"], row["batch"], row["length"]): row.get("tokens_per_second") for row in rows}
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        values = [found.get((model, *shape)) for shape in shapes]
        body.append([model, *(None if value is None else value / 1e3 for value in values)])
    return table(["kt/s", *(f"{batch} x {length}" for batch, length in shapes)], body)


def plot(stem: Path, result: dict[str, Any]) -> list[Path]:
    """Tokens a second against length, the paper's points hollow and dashed beside them where it has the model and size."""
    size = result["settings"]["size"]
    lengths = list(dict.fromkeys(row["length"] for row in result["rows"]))
    title = f"Training throughput, {size}"
    with plots.figure_with_axes(title, "length of a sequence", "thousand tokens a second") as (figure, axes):
        for name, colour in zip(dict.fromkeys(row["model"] for row in result["rows"]), plots.COLOURS, strict=False):
            rows = [row for row in result["rows"] if row["model"] == name and "tokens_per_second" in row]
            x, y = [row["length"] for row in rows], [row["tokens_per_second"] / 1e3 for row in rows]
            axes.plot(x, y, color=colour, marker="o", markersize=5, label=name)
            if size == "1.3b" and name in PAPER and lengths == [int(shape.split("x")[1]) for shape in SHAPES]:
                axes.plot(lengths, PAPER[name], color=colour, marker="o", markersize=5, markerfacecolor="white",
                          linestyle=(0, (4, 2)), linewidth=1.2)  # fmt: skip
        axes.plot([], [], color=plots.GREY, marker="o", markersize=5, markerfacecolor="white",
                  linestyle=(0, (4, 2)), label="paper, H100")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        plots.powers_of_two(axes.xaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        device = result["environment"]["device"]
        axes.annotate(f"{device}, the same tokens a step at every length", (1.0, 0.02), xycoords="axes fraction",
                      ha="right", color=plots.GREY, fontsize=9)  # fmt: skip
        return plots.save(figure, stem)


if __name__ == "__main__":
    main()
