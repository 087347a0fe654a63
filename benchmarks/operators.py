"""The operator on one device: this project's backends and the peers that are installed, on the same tensors, correct before fast.

    python benchmarks/operators.py                                      every shape below, chunked form, forward and backward
    python benchmarks/operators.py --shapes 8x4096x16x128 --peers none --algorithms chunk recurrent
    python benchmarks/operators.py --shapes fla --passes both --seconds 0.5

For each shape B x T x H x D: relative L2 errors against the definition in fp64, of everybody on the same inputs; then the median time of a
call, eager and replayed from a CUDA graph; nanoseconds per token of one head; the ratio to the least time that the copy and matmul rates of
this device allow; peak memory; host time; and the seconds of the first call. This project's rows come first, then the peers', on the same
tensors. Prints tables and writes benchmarks/results/operators-<device>-<date>.json, after every row, so that a run that is cut short leaves
what it has; `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Cold, Limits, environment, first_call_s, host_us, limits, peak_mib, table
from peers import PEERS, CompileAhead, importable, shorten_search
from torch import Tensor

from deltanet.evaluation.speed import graph_ms, median_ms
from deltanet.ops import chunk_delta_rule, explain, recurrent_delta_rule
from deltanet.reference import recurrent as definition

# docs/results.md names these sets; fla's six are the shapes of its own benchmark.
SETS: dict[str, list[str]] = {
    "host": ["1x256x16x128"],  # next to no work: what a call costs on the host
    "targets": ["8x4096x16x128", "32x1024x16x128", "1x32768x16x128"],
    "dims": ["8x4096x32x64", "8x4096x8x256"],
    "fla": ["1x8192x96x128", "2x16384x16x128", "4x2048x16x128", "4x4096x64x128", "8x2048x32x256", "8x1024x8x64"],
    "small": ["1x256x2x64", "2x128x1x128"],  # for a CPU, or to try the script
}
PASSES = ("inference", "forward", "both")  # without gradients; saving what the backward needs; forward and backward
GRADIENTS = ("o", "dq", "dk", "dv", "dbeta", "dg")
CHUNK = 64
PROVED = 777  # tokens on which errors are measured: 12 chunks and a piece
# Inputs that errors are measured on: (keys, beta). The first on every shape, and what is timed; the others on the first shape.
CASES = {
    "usual": ("spread", "sigmoid"),
    "beta to 2": ("spread", "2 sigmoid"),
    "alike, beta 1": ("alike", "1"),
    "alike, beta 2": ("alike", "2"),
    "one key, beta 1": ("one", "1"),
    "one key, beta 2": ("one", "2"),
}


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


def make(shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype, seed: int = 0, case: str = "usual") -> dict[str, Tensor | None]:
    """Normalised queries and keys, write strengths, decays of a trained gate's size.

    Keys are "spread" (with a common part of 0.3), "alike" (of 0.95 to 0.3 of their own), or "one" that is repeated.
    """
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device)

    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    keys, strength = CASES[case]
    own, common, beta = normal(B, T, H, D), normal(1, 1, H, D), normal(B, T, H).sigmoid()
    k = {"spread": own + 0.3, "alike": 0.95 * common + 0.3 * own, "one": common.expand_as(own)}[keys]
    beta = {"sigmoid": beta, "2 sigmoid": 2 * beta, "1": torch.ones_like(beta), "2": torch.full_like(beta, 2)}[strength]
    return {
        "q": F.normalize(normal(B, T, H, D), dim=-1).to(dtype),
        "k": F.normalize(k, dim=-1).to(dtype),
        "v": normal(B, T, H, D).to(dtype),
        "beta": beta.to(dtype),
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


def leave(x: dict[str, Any]) -> dict[str, Any]:
    """x, whose inputs now ask for gradients."""
    for name in ("q", "k", "v", "beta", "g"):
        if x[name] is not None:
            x[name].requires_grad_()
    return x


def leaves(x: dict[str, Any]) -> list[Tensor]:
    return [x[name] for name in ("q", "k", "v", "beta", "g") if x[name] is not None]


def ours(backend: str, algorithm: str, memory: str) -> Subject:
    operator = {"chunk": chunk_delta_rule, "recurrent": recurrent_delta_rule}[algorithm]
    name = f"{backend}{'-recurrent' if algorithm == 'recurrent' else ''}{'-lean' if memory == 'lean' else ''}"

    def call(q, k, v, beta, g, scale):
        return operator(q, k, v, beta, g, scale, memory=memory, backend=backend)[0]

    return Subject(name, algorithm, call)


def proof(shape: Shape) -> Shape:
    """What errors are measured on: two sequences with the shape's heads. On one of 16 heads the Hopper family's backward is not yet its own."""
    return Shape(2, min(shape.T, PROVED), shape.H, shape.D)


@cache
def exact(shape: Shape, gated: bool, case: str, device: torch.device, dtype: torch.dtype) -> tuple[dict, list[Tensor]]:
    """Inputs, and o and every gradient by the definition in fp64."""
    x = make(shape, gated, device, dtype, seed=1, case=case)
    q, k, v, beta, g, do = (None if value is None else value.double() for value in x.values())
    want = [definition.delta_rule(q, k, v, beta, g, shape.D**-0.5)[0]]
    want += [w for w in definition.backward(do, None, q, k, v, beta, g, shape.D**-0.5, None, None, [])[:5] if w is not None]
    return x, want


def errors(subject: Subject, shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype, case: str = "usual") -> dict[str, float]:
    """Relative L2 of o and of every gradient against the definition in fp64, with the shape's heads."""
    given, want = exact(proof(shape), gated, case, device, dtype)
    x = {name: None if value is None else value.clone() for name, value in given.items()}
    if subject.backward:
        got = subject.both(leave(x))
    else:
        with torch.no_grad():
            got = (subject.forward(x),)
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(GRADIENTS, got, want, strict=False)}


def prove(subject: Subject, shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype, *, hard: bool) -> dict[str, Any]:
    """The beginning of a row: who it is, how long its first call took, and how wrong it is; `hard`: on every case.

    The first call is on the whole shape: it is what fla's search looks at.
    """
    row: dict[str, Any] = {"shape": str(shape), "rule": "gated" if gated else "plain", "name": subject.name, "algorithm": subject.algorithm}
    call = partial(subject.both if subject.backward else subject.forward, leave(make(shape, gated, device, dtype)))
    row["first_call_s"] = first_call_s(call, device)
    del call
    row["errors"] = errors(subject, shape, gated, device, dtype)
    row["correct"] = max(row["errors"].values()) < (1e-2 if dtype.itemsize == 2 else 1e-4)
    if hard:
        row["hard_errors"] = {case: errors(subject, shape, gated, device, dtype, case) for case in CASES if case != "usual"}
    return row


def clock(row: dict[str, Any], subject: Subject, shape: Shape, gated: bool, options: argparse.Namespace, limit: Limits, cold: Cold) -> None:
    """Adds the times of each pass to a row."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    x = leave(make(shape, gated, device, dtype))
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
                timing["graph_ms"] = graph_ms(call, device, before=cold, seconds=options.seconds)
            except Exception as error:  # a peer that cannot be captured still has its other numbers
                timing["graph_ms"] = None
                timing["graph_error"] = f"{type(error).__name__}: {error}"[:200]
        best = min(t for t in (timing["eager_ms"], timing["graph_ms"]) if t is not None)
        timing["ns_per_token_head"] = 1e6 * best / shape.token_heads
        timing["floor_ms"] = limit.floor_ms(*shape.work(way, dtype.itemsize))
        timing["times_floor"] = best / timing["floor_ms"]
        row[way] = timing


def cold_start_s(shape: Shape, options: argparse.Namespace, backend: str, rule: str) -> float | None:
    """Seconds of the first forward and backward of a process with an empty compilation cache, imports not counted."""
    code = (
        "import sys, tempfile, os; os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp(); sys.path.insert(0, sys.argv[1])\n"
        "import torch, operators as o\n"
        "shape, device, dtype, backend, rule = sys.argv[2:]\n"
        "x = o.leave(o.make(o.Shape.parse(shape), rule == 'gated', torch.device(device), getattr(torch, dtype)))\n"
        "torch.autograd.grad(x['q'] * 1, x['q'], torch.ones_like(x['q']))\n"  # imports sympy at its first call, whatever is differentiated
        "subject = o.ours(backend, 'chunk', 'states')\n"
        "print('seconds', o.first_call_s(lambda: subject.both(x), torch.device(device)))"
    )
    arguments = [str(Path(__file__).parent), str(shape), str(options.device), options.dtype, backend, rule]
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
    hard = [(case, r["name"], found) for r in rows for case, found in r.get("hard_errors", {}).items()]
    if hard:
        lines = [[case, name, *[found.get(n) for n in names]] for case, name, found in sorted(hard, key=lambda x: list(CASES).index(x[0]))]
        parts.append(table([f"relative error, {rows[0]['shape']}", "", *names], lines))
    if ratios := compare(rows, passes):
        parts.append(table(["times as fast", "", *[f"{way}, {how}" for way in passes for how in ("eager", "graph")]], ratios))
    return "\n\n".join(parts)


def compare(rows: list[dict[str, Any]], passes: list[str]) -> list[list[Any]]:
    """Each peer's time over that of each of this project's rows of the same shape, rule and algorithm."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["shape"], row["rule"], row["algorithm"]

    lines = []
    for peer in (row for row in rows if row["name"] in PEERS):
        for own in (row for row in rows if row["name"] not in PEERS and key(row) == key(peer)):
            cells = [(peer.get(way, {}).get(how), own.get(way, {}).get(how)) for way in passes for how in ("eager_ms", "graph_ms")]
            ratios = [a / b if a and b else None for a, b in cells]
            lines.append([f"{peer['shape']} {peer['rule']}", f"{own['name']} than {peer['name']}", *ratios])
    return lines


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
    parser.add_argument("--compile-ahead", action="store_true", help="compile what the peers will first, on all cores")
    parser.add_argument("--search-ms", nargs=2, type=float, metavar=("WARMUP", "REPEAT"), help="shorten the time fla's search gives a setting")
    parser.add_argument("--cold-start", action="store_true", help="also time the first call in a process with an empty cache")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further row is begun")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has, and measure the others")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/operators-<device>-<date>.json)")
    options = parser.parse_args()
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "bfloat16")
    names = options.shapes or (["small"] if cpu else ["targets", "dims", "fla", "host"])
    options.shapes = list(dict.fromkeys(s for name in names for s in SETS.get(name, [name])))
    options.peers = list(PEERS) if options.peers == ["all"] else [] if options.peers == ["none"] else options.peers
    return options


def main() -> None:
    start = time.perf_counter()
    options = parse()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shapes = [Shape.parse(s) for s in options.shapes]
    rules = [rule == "gated" for rule in options.rules]
    peers = importable(options.peers)
    for name in options.peers:
        if name not in peers:
            print(f"{name} is not installed, so it is left out")
    result, path = begin(options, device)
    if options.cold_start:  # before anything else compiles
        result["cold_start_s"] = {f"{b} {rule}": cold_start_s(shapes[0], options, b, rule) for rule in options.rules for b in options.backends}
        print(f"first forward and backward with an empty cache, s: {result['cold_start_s']}", flush=True)
    asked = [s for shape in shapes for s in (shape, proof(shape))]  # FlashQLA has other kernels for two short sequences than for many
    wanted = ((peer.name, g, str(s)) for s in asked for g in rules for peer in peers.values() if peer.can(gated=g, head_dim=s.D))
    calls = list(dict.fromkeys(wanted))
    ahead = CompileAhead(calls) if options.compile_ahead and calls else None
    if options.search_ms:
        shorten_search(*options.search_ms)
    x = make(Shape(1, 64, shapes[0].H, shapes[0].D), False, device, dtype)
    print(explain(x["q"], x["k"], x["v"], x["beta"]), flush=True)

    def save(row: dict[str, Any] | None = None) -> None:
        if row is not None and row not in result["rows"]:
            result["rows"].append(row)
        result["seconds"] = time.perf_counter() - start
        path.write_text(json.dumps(result, indent=1, default=str) + "\n")

    def each(make_subjects: Any, step: Any) -> None:
        """step(row or None, subject, shape, gated) for each that is not done, in order, while there is time; what fails is written down."""
        for shape, gated in ((s, g) for s in shapes for g in rules):
            for subject in make_subjects(shape, gated):
                what = {"shape": str(shape), "rule": "gated" if gated else "plain", "name": subject.name}
                row = next((r for r in result["rows"] if what.items() <= r.items()), None)
                if row is not None and any(way in row for way in PASSES):
                    continue
                if time.perf_counter() - start > options.budget:
                    result["left_out"].append(what)
                    continue
                try:
                    if ahead is not None and subject.name in PEERS:
                        ahead.wait((subject.name, gated, str(shape)))
                    save(step(row, subject, shape, gated))
                except Exception as error:
                    traceback.print_exc()
                    result["failed"].append({**what, "error": f"{type(error).__name__}: {error}"[:500]})
                    save()
                    torch.cuda.empty_cache()

    def proved(row: dict[str, Any] | None, subject: Subject, shape: Shape, gated: bool) -> dict[str, Any]:
        return row or prove(subject, shape, gated, device, dtype, hard=shape == shapes[0] and not gated)

    def measured(row: dict[str, Any] | None, subject: Subject, shape: Shape, gated: bool) -> dict[str, Any]:
        row = proved(row, subject, shape, gated)
        clock(row, subject, shape, gated, options, limit, cold)
        row["environment"] = result["environments"].index(now)
        times = ", ".join(f"{way} {row[way]['eager_ms']:.3f} ({row[way]['graph_ms'] or 0:.3f})" for way in options.passes if way in row)
        print(f"[{time.perf_counter() - start:4.0f} s] {shape} {row['rule']} {subject.name}: {times} ms eager (graph)", flush=True)
        torch.cuda.empty_cache()
        return row

    def own(shape: Shape, gated: bool) -> list[Subject]:
        x = make(Shape(shape.B, 1, shape.H, shape.D), gated, device, dtype)
        given = [x[name] for name in ("q", "k", "v", "beta", "g")]
        takes = {a: explain(*given, algorithm=a) for a in options.algorithms}
        runs = [(b, a) for b in options.backends for a in options.algorithms if b == "auto" or takes[a].refusals[b] is None]
        return [ours(b, a, m) for b, a in runs for m in options.memory]

    def others(shape: Shape, gated: bool) -> list[Subject]:
        return [Subject(p.name, p.algorithm, p.load(), gated in p.backward) for p in peers.values() if p.can(gated=gated, head_dim=shape.D)]

    now = result["environments"][-1]
    if ahead is not None:  # errors need no quiet machine, times do
        each(own, proved)
        for call in calls:
            ahead.wait(call)
    limit, cold = limits(device), Cold(device)
    result["limits"] = asdict(limit)
    print(f"{now['device']}: copy {limit.bytes_per_second / 1e12:.2f} TB/s, matmul {limit.flops_per_second / 1e12:.0f} TFLOP/s", flush=True)
    each(own, measured)
    each(others, measured)
    if ahead is not None:
        result["compile_ahead_s"] = ahead.done
        ahead.stop()
    save()
    print("\n" + report([r for r in result["rows"] if any(way in r for way in PASSES)], options.passes))
    for failure in result["failed"]:
        print(f"FAILED {failure}")
    if result["left_out"]:
        print(f"no time left for {len(result['left_out'])} rows; go on with --resume")
    print(f"\nwritten to {path}")


def begin(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Path]:
    """The result to fill, new or taken up again, and its file."""
    info = environment(device)
    name = re.sub(r"[^a-z0-9]+", "-", str(info["device"]).lower()).strip("-")
    path = options.out or Path(__file__).parent / "results" / f"operators-{name}-{info['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environments": [], "rows": []}
    if options.resume and path.exists():
        result = json.loads(path.read_text())
        if result["environments"][-1]["device"] != info["device"]:
            raise SystemExit(f"{path} was measured on {result['environments'][-1]['device']}, not {info['device']}: give another --out")
    if info not in result["environments"]:
        result["environments"].append(info)
    result |= {"options": {**vars(options), "out": str(path)}, "failed": [], "left_out": []}
    return result, path


if __name__ == "__main__":
    main()
