"""Other implementations of the same operator, each behind the same call: (q, k, v, beta, g, scale) -> o.

A peer is used if it can be imported. fla searches its launch settings by timing at the first call of every (heads, head dimension), and each of
FlashQLA's kernels keeps nvcc busy for half a minute; `CompileAhead` runs the compilers in parallel beforehand, which changes nothing about what is
found, only how long one waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

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
    os.environ["FLA_FLASH_QLA"] = "0"  # or it hands gated calls to FlashQLA where that is installed: here each is measured as itself
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
        # The gated backward of fla raises on Hopper under Triton 3.4 to 3.7.0 unless TileLang is installed, which has one of its kernels.
        Peer("fla", "fla", "chunk", (False, True), (False, True) if util.find_spec("tilelang") else (False,), _fla_chunk),
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


Call = tuple[str, bool, str]  # peer, whether gated, shape as BxTxHxD


class CompileAhead:
    """Compiles what peers would compile at their first calls, on all cores: all settings that fla's search will try, FlashQLA's kernels.

    It goes call by call in the background, at low priority, into the caches of Triton and TileLang. Settings that an earlier search left
    in Triton's cache as the best are compiled alone.
    """

    def __init__(self, calls: list[Call], workers: int | None = None):
        self.start, self.workers = time.perf_counter(), workers or len(os.sched_getaffinity(0))
        self.folder = Path(tempfile.mkdtemp())
        self.calls = calls
        self.done: dict[str, float] = {}  # seconds after which a call was compiled
        command = ["nice", "-n", "19", sys.executable, __file__, "--compile", str(self.folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        names = [_name(call) for call in calls]
        self.processes = [
            subprocess.Popen([*command, str(part), str(self.workers), *names], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for part in range(self.workers)
        ]

    def wait(self, call: Call) -> None:
        """Until a call is compiled, or nobody is left to compile it: then the peer will by itself."""
        name = _name(call)
        while call in self.calls and name not in self.done:
            finished = all((self.folder / f"{name}-{part}").exists() for part in range(self.workers))
            if finished or all(process.poll() is not None for process in self.processes):
                self.done[name] = time.perf_counter() - self.start
                print(f"[{self.done[name]:4.0f} s] {name} is compiled{'' if finished else ' in part'}", flush=True)
            time.sleep(0.2)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


def _name(call: Call) -> str:
    peer, gated, shape = call
    return f"{peer}:{'gated' if gated else 'plain'}:{shape}"


def _compile_part(folder: Path, part: int, parts: int, names: list[str]) -> None:
    """Call each peer once with a compiler that launches and times nothing, and compiles every `parts`-th kernel that it is asked for.

    All processes ask for the same kernels in the same order, so each kernel has one of them.
    """
    asked = itertools.count()

    def mine() -> bool:
        return next(asked) % parts == part

    _compile_only_triton(mine)
    if util.find_spec("tilelang") is not None:
        _compile_only_tilelang(mine)
    for name in names:
        peer, rule, shape = name.split(":")
        with contextlib.suppress(Exception):  # what a peer cannot do shows when it is measured
            _visit(PEERS[peer], rule == "gated", *map(int, shape.split("x")))
        (folder / f"{name}-{part}").touch()


def _visit(peer: Peer, gated: bool, B: int, T: int, H: int, D: int) -> None:
    """A forward without gradients; then one with, and its backward, if the peer has one."""
    q, k, v = (torch.zeros(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    beta, g = torch.zeros(B, T, H, device="cuda", dtype=torch.bfloat16), torch.zeros(B, T, H, device="cuda") if gated else None
    leaves = [x for x in (q, k, v, beta, g) if x is not None]
    for train in (False, True):
        for x in leaves:
            x.requires_grad_(train)
        o = peer.load()(q, k, v, beta, g, D**-0.5)
    if gated in peer.backward:
        torch.autograd.grad(o, leaves, torch.zeros_like(o))


def _compile_only_triton(mine: Callable[[], bool]) -> None:
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compile_kernel, search = JITFunction.run, Autotuner.check_disk_cache

    def compile_only(self, *args, grid, warmup, **kwargs):
        if mine():
            with contextlib.suppress(Exception):  # a setting that does not compile is the search's business, later
                compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)

    def compile_setting(self, *args, config, **meta):
        self.fn.run(*args, **{**meta, **config.all_kwargs()})
        return [1.0, 1.0, 1.0]

    class Unknown(Exception):
        pass

    def unknown():
        raise Unknown

    def known_or_all(self, key, configs, compile_all):
        try:
            return search(self, key, configs, unknown)
        except Unknown:  # nor is what was "measured" here kept for the search
            compile_all()
            return False

    JITFunction.run, Autotuner._bench, Autotuner.check_disk_cache = compile_only, compile_setting, known_or_all


def _compile_only_tilelang(mine: Callable[[], bool]) -> None:
    from tilelang.jit import JITImpl

    compile_kernel = JITImpl.compile

    def compile_only(self, *args, **kwargs):
        if mine():
            compile_kernel(self, *args, **kwargs)
        return lambda *_, **__: None

    JITImpl.compile = compile_only


def shorten_search(warmup_ms: float, repeat_ms: float) -> None:
    """Let Triton's search over settings measure each for less time than its default of 25 and 100 ms."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    Autotuner.do_bench = property(
        lambda self: lambda call, quantiles: do_bench(call, warmup=warmup_ms, rep=repeat_ms, quantiles=quantiles)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", nargs="+", required=True, metavar=("FOLDER", "PART PARTS PEER:RULE:SHAPE"))
    folder, part, parts, *names = parser.parse_args().compile
    _compile_part(Path(folder), int(part), int(parts), names)
