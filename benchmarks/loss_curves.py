"""The same model trained by several backends from the same weights on the same windows: do the losses agree?

    python benchmarks/loss_curves.py --size 340m --backends hopper triton reference --limit 180 --out curves.json

Bytes of the bundled novels, AdamW, bf16 products as in training, at a rate so low that no step jumps: a jump multiplies whatever rounding
two backends differ by. Writes a JSON of all losses and a plot; `--limit` stops a backend after so many seconds (the reference is slow), and
the others are compared with what it has.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from measure import environment

from deltanet.data.corpus import load_corpus
from deltanet.data.packing import Batch
from deltanet.models import LanguageModel, preset
from deltanet.training.config import TrainConfig
from deltanet.training.optimizer import build_optimizer, learning_rate
from deltanet.training.trainer import train_step


def windows(text: bytes, step: int, batch: int, context: int, seed: int, device: torch.device) -> Batch:
    """The windows of a step: the same for everybody."""
    gen = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(len(text) - context - 1, (batch,), generator=gen).tolist()
    rows = torch.tensor([list(text[s : s + context + 1]) for s in starts], device=device)
    return Batch(rows[:, :-1], rows[:, 1:], None, torch.tensor(starts), batch * context, batch * context)


def train(backend: str, text: bytes, options: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Loss of each step, and the median seconds of a step."""
    torch.manual_seed(options.seed)
    model = LanguageModel(preset(options.size, vocab_size=257), backend=backend).to(device)
    config = TrainConfig(steps=options.steps, learning_rate=options.learning_rate, warmup_steps=options.warmup_steps)
    optimizer, losses, seconds = build_optimizer(model, config), [], []
    begin = time.perf_counter()
    for step in range(options.steps):
        batch = windows(text, step, options.batch, options.context, options.seed, device)
        rows = [slice(i, i + options.micro) for i in range(0, options.batch, options.micro)]
        parts = [batch._replace(inputs=batch.inputs[r], targets=batch.targets[r], scored=batch.targets[r].numel()) for r in rows]
        start = time.perf_counter()
        autocast = torch.autocast(device.type, torch.bfloat16)
        outcome = train_step(model, optimizer, parts, learning_rate(step, options.steps, config), 1.0, autocast)
        losses.append(outcome.loss)
        seconds.append(time.perf_counter() - start)
        if step % 10 == 0:
            print(f"{backend:<10} step {step:>4} loss {outcome.loss:.4f} {seconds[-1]:.3f} s", flush=True)
        if time.perf_counter() - begin > options.limit:
            break
    return losses, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--backends", nargs="+", default=["auto", "reference"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--micro", type=int, default=8, help="windows of a forward pass")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="the peak")
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the windows")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a backend may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; the plot lies beside it")
    options = parser.parse_args()
    device = torch.device(options.device)
    text = "".join(load_corpus("austen").train).encode()
    result = {"environment": environment(device), "options": {k: str(v) for k, v in vars(options).items()}, "losses": {}, "step_s": {}}
    for backend in options.backends:
        losses, seconds = train(backend, text, options, device)
        result["losses"][backend], result["step_s"][backend] = losses, seconds
        first = result["losses"][options.backends[0]]
        gaps = [abs(a - b) for a, b in zip(losses, first, strict=False)]
        print(f"{backend}: {len(losses)} steps, last loss {losses[-1]:.4f}, {seconds:.3f} s a step,", end=" ")
        print(f"largest gap to {options.backends[0]} {max(gaps):.4f}")
        options.out.write_text(json.dumps(result))
    draw(result, options.out.with_suffix(".png"))


def draw(result: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    names = list(result["losses"])
    for name, style in zip(names, ("-", "--", ":", "-."), strict=False):
        above.plot(result["losses"][name], style, label=f"{name}, {result['step_s'][name]:.2f} s a step")
        if name != names[-1]:
            below.plot([a - b for a, b in zip(result["losses"][name], result["losses"][names[-1]], strict=False)], style)
    above.set_ylabel("loss, nats per byte")
    above.legend()
    below.set_ylabel(f"minus {names[-1]}")
    below.set_xlabel("step")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
