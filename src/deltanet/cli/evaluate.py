"""`deltanet evaluate`: what a trained model is worth on the text that was held out, written down and shown."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltanet.cli.options import LATEST, Run, parse
from deltanet.cli.runs import REPORT, YARDSTICK_BYTES, load, validation_stream, yardsticks
from deltanet.cli.words import size
from deltanet.data import SequentialWindows
from deltanet.evaluation import evaluate
from deltanet.evaluation.decoding import decoding_costs
from deltanet.training.device import autocast

POSITION_TOKENS = 1 << 18  # read in windows longer than in training, where each range of positions is wide


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a trained model on the text that was held out: bits per byte beside gzip and xz, what context is worth,
    and what a generated token costs after more and more of it. Also writes evaluation.json, for `deltanet plot`.
    """

    run: Run = LATEST
    """The folder of a trained model."""
    step: int | None = None
    """A saved step; by default the newest."""
    max_tokens: int | None = None
    """Read only so many tokens, spread over the held-out text; by default all of it."""
    stretch: int = 4
    """How many times the training window the positions in the context are measured up to."""
    longest: int = 16384
    """The longest context for the cost of a token, from 256 on in doublings; 0 leaves the measurement out."""
    batch_size: int = 16
    """Windows at once."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    backend: str = "auto"
    """Who runs the delta rule: auto, reference, triton or hopper."""
    json: bool = False
    """Report as one JSON object, for programs."""
    quiet: bool = False
    """Report nothing; only write evaluation.json."""


def run(args: list[str]) -> int:
    options = parse(EvaluateOptions, args, "evaluate")
    if options.stretch < 1 or options.longest < 0:
        raise ValueError(
            f"stretch must be at least 1 and longest at least 0, got {options.stretch} and {options.longest}"
        )
    trained = load(options.run, options.step, options.device, options.backend)
    model, context = trained.model, trained.config.data.context
    contexts = [1 << octave for octave in range(8, 40) if 1 << octave <= options.longest]
    model.check_room(max(contexts, default=0))
    stream = validation_stream(trained)
    with autocast(trained.config, model.lm_head.weight.device):
        near, far = (SequentialWindows(stream, length) for length in (context, options.stretch * context))
        part = min(options.max_tokens or POSITION_TOKENS, POSITION_TOKENS)
        score = evaluate(model, near, batch_size=options.batch_size, max_tokens=options.max_tokens)
        beyond = evaluate(model, far, batch_size=options.batch_size, max_tokens=part)
    # Up to the training window from all windows of that length, which are many; only beyond it from the few long ones.
    by_position = score.by_position() + [row for row in beyond.by_position() if row[0] >= context]
    read = int(score.bytes.sum())
    record = {
        "step": trained.step,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "loss": score.loss,
        "tokens": int(score.tokens.sum()),
        "bytes": read,
        "context": context,
        "yardsticks": yardsticks(trained.config) if read == stream.bytes <= YARDSTICK_BYTES else {},
        "by_position": by_position,
        "decoding": [dataclasses.asdict(cost) for cost in decoding_costs(model, contexts)] if contexts else [],
    }
    path = Path(options.run) / REPORT
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(record))
    elif not options.quiet:
        show_evaluation(record, options.run)
    return 0


def show_evaluation(record: Mapping[str, Any], run: str) -> None:
    beside = "".join(f", {name} -9 {bits:.3f}" for name, bits in record["yardsticks"].items())
    print(f"{run} at step {record['step']:,}")
    print(f"bits per byte   {record['bits_per_byte']:.3f} on {record['bytes']:,} bytes held out{beside}")
    print(f"perplexity      {record['perplexity']:.2f} per token")
    if rows := record["by_position"]:
        print("\ncontext, tokens   bits per byte")
        for first, last, bits in rows:
            beyond = "   longer than in training" if first >= record["context"] else ""
            print(f"{f'{first + 1}-{last + 1}' if last > first else f'{first + 1}':>15}   {bits:.3f}{beyond}")
    if record["decoding"]:
        print("\ncontext, tokens   ms per token: model   attention   remembered: model   attention")
        for cost in record["decoding"]:
            print(
                f"{cost['context']:>15,}   {cost['model_ms']:>19.2f}   {cost['attention_ms']:>9.2f}"
                f"   {size(cost['model_bytes']):>17}   {size(cost['attention_bytes']):>9}"
            )
    print(f"\nnext: deltanet plot {run}")
