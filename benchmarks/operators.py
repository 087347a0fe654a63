"""The operator on one device: this project's backends and the peers that are installed, on the same tensors, correct before fast.

    python benchmarks/operators.py                                      every shape below, chunked form, forward and backward
    python benchmarks/operators.py --shapes 8x4096x16x128 --peers none --algorithms chunk recurrent
    python benchmarks/operators.py --shapes fla --passes both --seconds 0.5

For each shape B x T x H x D: relative L2 errors against the definition in fp64 on a short slice; then the median time of a call, eager
and replayed from a CUDA graph; nanoseconds per token of one head; the ratio to the least time that the copy and matmul rates of this
device allow; peak memory; host time; and the seconds of the first call. Prints a table and writes
benchmarks/results/operators-<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Cold, Limits, environment, first_call_s, graph_ms, host_us, limits, peak_mib, table
from peers import PEERS, compile_ahead, importable, shorten_search
from torch import Tensor

from deltanet.evaluation.speed import median_ms
from deltanet.ops import chunk_delta_rule, explain, recurrent_delta_rule
from deltanet.reference import recurrent as definition

# docs/results.md names these sets; fla's six are the shapes of its own benchmark.
SETS: dict[str, list[str]] = {
    "targets": ["8x4096x16x128", "32x1024x16x128", "1x32768x16x128"],
    "dims": ["8x4096x32x64", "8x4096x8x256"],
    "fla": ["1x8192x96x128", "2x16384x16x128", "4x2048x16x128", "4x4096x64x128", "8x2048x32x256", "8x1024x8x64"],
    "small": ["1x256x2x64", "2x128x1x128"],  # for a CPU, or to try the script
}
PASSES = ("inference", "forward", "both")  # without gradients; saving what the backward needs; forward and backward
GRADIENTS = ("o", "dq", "dk", "dv", "dbeta", "dg")
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int

    @staticmethod
    def parse(text: str) -> Shape:
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
        if not found:
            raise SystemExit(f"a shape is BxTxHxD or one of {', '.join(SETS)}, got {text!r}")
        return Shape(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.B}x{self.T}x{self.H}x{self.D}"

    @property
    def token_heads(self) -> int:
        return self.B * self.T * self.H

    def work(self, way: str, itemsize: int) -> tuple[float, float]:
        """(floating point operations, bytes) that a call needs: the chunked algorithm at 64 tokens a chunk, each tensor moved once."""
        C, D = CHUNK, self.D
        forward = (8 * C * D + 6 * D * D, 4 * D * itemsize + itemsize)
        backward = (16 * C * D + 12 * D * D, 7 * D * itemsize + 2 * itemsize)
        flops, moved = forward if way != "both" else tuple(a + b for a, b in zip(forward, backward, strict=True))
        return flops * self.token_heads, moved * self.token_heads


def make(shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """Normalised queries, normalised correlated keys, beta = sigmoid of a normal, decays of a trained gate's size."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device)

    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    return {
        "q": F.normalize(normal(B, T, H, D), dim=-1).to(dtype),
        "k": F.normalize(normal(B, T, H, D) + 0.3, dim=-1).to(dtype),
        "v": normal(B, T, H, D).to(dtype),
        "beta": normal(B, T, H).sigmoid().to(dtype),
        "g": F.logsigmoid(normal(B, T, H) + 3.0) if gated else None,
        "do": normal(B, T, H, D).to(dtype),
    }


class Subject:
    """One implementation to measure: `call(q, k, v, beta, g, scale) -> o`."""

    def __init__(self, name: str, algorithm: str, call: Any, backward: bool = True):
        self.name, self.algorithm, self.call, self.backward = name, algorithm, call, backward

    def forward(self, x: dict[str, Any]) -> Tensor:
        return self.call(x["q"], x["k"], x["v"], x["beta"], x["g"], x["q"].shape[-1] ** -0.5)

    def both(self, x: dict[str, Any]) -> tuple[Tensor, ...]:
        o = self.forward(x)
        return o, *torch.autograd.grad(o, leaves(x), x["do"])


def leaves(x: dict[str, Any]) -> list[Tensor]:
    return [x[name] for name in ("q", "k", "v", "beta", "g") if x[name] is not None]


def ours(backend: str, algorithm: str, memory: str) -> Subject:
    operator = {"chunk": chunk_delta_rule, "recurrent": recurrent_delta_rule}[algorithm]
    name = f"{backend}{'-recurrent' if algorithm == 'recurrent' else ''}{'-lean' if memory == 'lean' else ''}"

    def call(q, k, v, beta, g, scale):
        return operator(q, k, v, beta, g, scale, memory=memory, backend=backend)[0]

    return Subject(name, algorithm, call)


def errors(subject: Subject, shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 of o and of every gradient against the definition in fp64, on at most 2 x 333 tokens of 2 heads."""
    slice_of = Shape(min(shape.B, 2), min(shape.T, 333), min(shape.H, 2), shape.D)
    x = make(slice_of, gated, device, dtype, seed=1)
    q, k, v, beta, g = (None if x[n] is None else x[n].double() for n in ("q", "k", "v", "beta", "g"))
    scale = shape.D**-0.5
    want = [definition.delta_rule(q, k, v, beta, g, scale)[0]]
    if subject.backward:
        for name in ("q", "k", "v", "beta", "g"):
            x[name] = None if x[name] is None else x[name].requires_grad_()
        want += [w for w in definition.backward(x["do"].double(), None, q, k, v, beta, g, scale, None, None, [])[:5] if w is not None]
        got = subject.both(x)
    else:
        with torch.no_grad():
            got = (subject.forward(x),)
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(GRADIENTS, got, want, strict=False)}


def measure(
    subject: Subject, shape: Shape, gated: bool, options: argparse.Namespace, device: torch.device, limit: Limits, cold: Cold
) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    x = make(shape, gated, device, dtype)
    for name in ("q", "k", "v", "beta", "g"):
        x[name] = None if x[name] is None else x[name].requires_grad_()
    full = subject.both if subject.backward else subject.forward
    row: dict[str, Any] = {"shape": str(shape), "rule": "gated" if gated else "plain", "name": subject.name, "algorithm": subject.algorithm}
    row["first_call_s"] = first_call_s(lambda: full(x), device)
    row["errors"] = errors(subject, shape, gated, device, dtype)
    worst = max(row["errors"].values())
    row["correct"] = worst < (1e-2 if dtype.itemsize == 2 else 1e-4)
    for way in options.passes:
        if way == "both" and not subject.backward:
            continue
        with torch.set_grad_enabled(way != "inference"):
            call = (lambda: subject.both(x)) if way == "both" else (lambda: subject.forward(x))
            timing = {
                "eager_ms": median_ms(call, device, seconds=options.seconds, before=cold),
                "host_us": host_us(call, device),
                "peak_mib": peak_mib(call, [*leaves(x), x["do"]], device),
            }
            try:
                timing["graph_ms"] = graph_ms(call, device, cold=cold, seconds=options.seconds)
            except Exception as error:  # a peer that cannot be captured still has its other numbers
                timing["graph_ms"] = None
                timing["graph_error"] = f"{type(error).__name__}: {error}"[:200]
        best = min(t for t in (timing["eager_ms"], timing["graph_ms"]) if t is not None)
        timing["ns_per_token_head"] = 1e6 * best / shape.token_heads
        timing["floor_ms"] = limit.floor_ms(*shape.work(way, dtype.itemsize))
        timing["times_floor"] = best / timing["floor_ms"]
        row[way] = timing
    return row


def cold_start_s(shape: Shape, options: argparse.Namespace, backend: str) -> float | None:
    """Seconds of the first forward and backward of a process with an empty compilation cache, imports not counted."""
    code = (
        "import sys, tempfile, os; os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp(); sys.path.insert(0, sys.argv[1])\n"
        "import torch, operators as o\n"
        "d = torch.device(sys.argv[3]); s = o.Shape.parse(sys.argv[2]); x = o.make(s, False, d, getattr(torch, sys.argv[4]))\n"
        "[x[n].requires_grad_() for n in ('q', 'k', 'v', 'beta')]\n"
        "subject = o.ours(sys.argv[5], 'chunk', 'states')\n"
        "print('seconds', o.first_call_s(lambda: subject.both(x), d))"
    )
    here = str(Path(__file__).parent)
    arguments = [here, str(shape), str(options.device), options.dtype, backend]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    found = re.search(r"seconds ([\d.e+-]+)", done.stdout)
    if not found:
        print(done.stderr[-2000:], file=sys.stderr)
    return float(found.group(1)) if found else None


def report(rows: list[dict[str, Any]], passes: list[str]) -> str:
    parts = []
    for way in passes:
        lines = []
        for row in rows:
            if way not in row:
                continue
            t = row[way]
            numbers = [t[n] for n in ("eager_ms", "graph_ms", "ns_per_token_head", "times_floor", "peak_mib", "host_us")]
            right = "yes" if row["correct"] else "NO"
            lines.append([f"{row['shape']} {row['rule']}", row["name"], *numbers, row["first_call_s"], right])
        if lines:
            head = [way, "", "eager ms", "graph ms", "ns/token-head", "x floor", "peak MiB", "host us", "first s", "correct"]
            parts.append(table(head, lines))
    names = [n for n in GRADIENTS if any(n in r["errors"] for r in rows)]
    lines = [[f"{r['shape']} {r['rule']}", r["name"], *[r["errors"].get(n) for n in names]] for r in rows]
    parts.append(table(["relative error", "", *names], lines))
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"BxTxHxD, or sets: {', '.join(SETS)} (default: all but small; small on a CPU)")
    parser.add_argument("--backends", nargs="*", default=["auto"], help="this project's backends, by name")
    parser.add_argument("--algorithms", nargs="+", default=["chunk"], choices=("chunk", "recurrent"))
    parser.add_argument("--memory", nargs="+", default=["states"], choices=("states", "lean"))
    parser.add_argument("--rules", nargs="+", default=["plain"], choices=("plain", "gated"))
    parser.add_argument("--peers", nargs="+", default=["fla"], help=f"{', '.join(PEERS)}, all or none; those installed are run")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to measure each number")
    parser.add_argument("--compile-ahead", action="store_true", help="compile fla's search space on all cores first")
    parser.add_argument("--search-ms", nargs=2, type=float, metavar=("WARMUP", "REPEAT"), help="shorten the time fla's search gives a setting")
    parser.add_argument("--cold-start", action="store_true", help="also time the first call in a process with an empty cache")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/operators-<device>-<date>.json)")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    names = options.shapes or (["small"] if cpu else ["targets", "dims", "fla"])
    options.shapes = list(dict.fromkeys(s for name in names for s in SETS.get(name, [name])))
    options.peers = list(PEERS) if options.peers == ["all"] else [] if options.peers == ["none"] else options.peers
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    shapes = [Shape.parse(s) for s in options.shapes]
    result: dict[str, Any] = {"environment": environment(device), "options": {**vars(options), "out": str(options.out)}, "rows": [], "failed": []}
    peers = importable(options.peers)
    for name in options.peers:
        if name not in peers:
            print(f"{name} is not installed, so it is left out")
    start = time.perf_counter()
    if options.compile_ahead and "fla" in peers:
        compile_ahead({(s.H, s.D) for s in shapes})
        result["compile_ahead_s"] = time.perf_counter() - start
        print(f"compiled fla's search space in {result['compile_ahead_s']:.0f} s", flush=True)
    if options.search_ms:
        shorten_search(*options.search_ms)
    limit, cold = limits(device), Cold(device)
    result["limits"] = asdict(limit)
    print(f"{result['environment']['device']}: copy {limit.bytes_per_second / 1e12:.2f} TB/s, matmul {limit.flops_per_second / 1e12:.0f} TFLOP/s")
    x = make(shapes[0], False, torch.device("cpu"), torch.float32) if device.type == "cpu" else make(shapes[0], False, device, torch.bfloat16)
    print(explain(x["q"], x["k"], x["v"], x["beta"]))
    del x
    subjects = [ours(b, a, m) for b in options.backends for a in options.algorithms for m in options.memory]
    if options.cold_start:
        result["cold_start_s"] = {b: cold_start_s(shapes[0], options, b) for b in options.backends}
        print(f"first forward and backward with an empty cache, s: {result['cold_start_s']}", flush=True)
    for shape in shapes:
        for gated in (rule == "gated" for rule in options.rules):
            others = [
                Subject(p.name, p.algorithm, p.load(), gated in p.backward) for p in peers.values() if p.can(gated=gated, head_dim=shape.D)
            ]
            for subject in (*subjects, *others):
                try:
                    row = measure(subject, shape, gated, options, device, limit, cold)
                except Exception as error:
                    traceback.print_exc()
                    what = {"shape": str(shape), "gated": gated, "name": subject.name}
                    result["failed"].append({**what, "error": f"{type(error).__name__}: {error}"[:500]})
                    continue
                result["rows"].append(row)
                times = ", ".join(f"{way} {row[way]['eager_ms']:.3f} ({row[way]['graph_ms'] or 0:.3f})" for way in options.passes if way in row)
                print(f"[{time.perf_counter() - start:4.0f} s] {shape} {row['rule']} {subject.name}: {times} ms eager (graph)", flush=True)
                save(result, options, device)
            torch.cuda.empty_cache()
    print("\n" + report(result["rows"], options.passes))
    for failure in result["failed"]:
        print(f"FAILED {failure}")
    print(f"\nwritten to {save(result, options, device)}")


def save(result: dict[str, Any], options: argparse.Namespace, device: torch.device) -> Path:
    """After every row, so that a run that is cut short leaves what it has."""
    info = result["environment"]
    name = re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
    path = options.out or Path(__file__).parent / "results" / f"operators-{name}-{info['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return path


if __name__ == "__main__":
    main()
