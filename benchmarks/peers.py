"""Other implementations of the same operator, each behind the same call: (q, k, v, beta, g, scale) -> o.

A peer is used if it can be imported. fla searches its launch settings by timing at the first call of every (heads, head dimension); `compile_ahead`
runs the compiler for that search in parallel beforehand, which changes nothing about what is found, only how long one waits for it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util

import torch
from torch import Tensor

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    package: str
    algorithm: str  # "chunk" or "recurrent"
    gated: tuple[bool, ...]  # which rules it has
    backward: tuple[bool, ...]  # the rules of which it has a gradient here
    load: Callable[[], Operator]
    head_dims: tuple[int, ...] | None = None  # None: any that it is asked for here

    def can(self, *, gated: bool, head_dim: int) -> bool:
        return gated in self.gated and (self.head_dims is None or head_dim in self.head_dims)


def _fla_chunk() -> Operator:
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q, k, v, beta, g, scale):
        if g is None:
            return chunk_delta_rule(q, k, v, beta, scale=scale)[0]
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, scale=scale)[0]

    return run


def _fla_recurrent() -> Operator:
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    return lambda q, k, v, beta, g, scale: fused_recurrent_delta_rule(q, k, v, beta, scale=scale)[0]


def _flash_qla() -> Operator:
    from flash_qla import chunk_gated_delta_rule

    return lambda q, k, v, beta, g, scale: chunk_gated_delta_rule(q, k, v, g, beta, scale=scale)[0]


PEERS = {
    peer.name: peer
    for peer in (
        # The gated backward of fla raises on Hopper under Triton 3.4 to 3.7.0, so only its forward is run.
        Peer("fla", "fla", "chunk", (False, True), (False,), _fla_chunk),
        Peer("fla-recurrent", "fla", "recurrent", (False,), (False,), _fla_recurrent),
        Peer("flash-qla", "flash_qla", "chunk", (True,), (True,), _flash_qla, head_dims=(128,)),
    )
}


def importable(names: list[str]) -> dict[str, Peer]:
    """Those of `names` whose package is installed."""
    for name in names:
        if name not in PEERS:
            raise SystemExit(f"peers are {', '.join(PEERS)}, got {name!r}")
    return {name: PEERS[name] for name in names if util.find_spec(PEERS[name].package) is not None}


def compile_ahead(families: set[tuple[int, int]], workers: int | None = None) -> None:
    """Compile all that fla's search over settings will try for each (heads, head dimension), on all cores, into Triton's cache."""
    workers = workers or os.cpu_count() or 1
    weight = {D: max(1.0, D / 64) for _, D in families}  # wider heads take longer to compile
    share = workers / max(1.0, sum(weight[D] for _, D in families))
    parts = {(H, D): max(1, round(2 * share * weight[D])) for H, D in families}  # twice the cores, so that the last ones finish together
    jobs = [(H, D, part, n) for (H, D), n in sorted(parts.items(), key=lambda x: -x[0][1]) for part in range(n)]
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "OMP_NUM_THREADS": "1"}

    def compile_part(job: tuple[int, ...]) -> None:
        command = [sys.executable, __file__, "--compile", *map(str, job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"compiling ahead failed, fla will compile by itself: {done.stderr[-500:]}", file=sys.stderr)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_part, jobs))


def _compile_family(heads: int, head_dim: int, part: int, parts: int) -> None:
    """Call fla once with a Triton that compiles and never launches, and whose search times nothing; every `parts`-th setting is ours."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    run, count = JITFunction.run, 0

    def compile_only(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def one_of(self, *args, config, **meta):
        nonlocal count
        count += 1
        if count % parts == part:
            try:
                self.fn.run(*args, **{**meta, **config.all_kwargs()})
            except Exception as error:  # a setting that does not compile is the search's business, later
                print(f"{self.base_fn.__name__}: {type(error).__name__}", file=sys.stderr)
        return [1.0, 1.0, 1.0]

    JITFunction.run = compile_only
    Autotuner._bench = one_of
    Autotuner.check_disk_cache = lambda self, key, configs, bench: (bench(), False)[1]
    inputs = [torch.zeros(1, 1024, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [x.requires_grad_() for x in (*inputs, torch.zeros(1, 1024, heads, device="cuda", dtype=torch.bfloat16))]
    o = _fla_chunk()(*leaves, None, 1.0)
    torch.autograd.grad(o, leaves, torch.zeros_like(o))


def shorten_search(warmup_ms: float, repeat_ms: float) -> None:
    """Let Triton's search over settings measure each for less time than its default of 25 and 100 ms."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    Autotuner.do_bench = property(
        lambda self: lambda call, quantiles: do_bench(call, warmup=warmup_ms, rep=repeat_ms, quantiles=quantiles)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", nargs=4, type=int, required=True, metavar=("HEADS", "HEAD_DIM", "PART", "PARTS"))
    _compile_family(*parser.parse_args().compile)
