"""How the benchmarks measure: one place, so that every row of every table means the same.

    eager     median device time of calls queued one behind the other, L2 emptied before each
    graph     the same call captured in a CUDA graph and replayed: no host time in it at all
    host      time until the call returns to Python, with nothing to wait for on the device
    limits    a large device-to-device copy (bytes read plus written) and a large bf16 matrix product, measured in the same run
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deltanet.evaluation.speed import median_ms

ROOT = Path(__file__).parent.parent
PACKAGES = ("deltanet", "torch", "triton", "numpy", "fla-core", "flash-linear-attention", "flash-qla", "tilelang")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what a number is worth nothing without."""
    info: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") or _exported(),
        "uncommitted": bool(_git("status", "--porcelain", "src", "benchmarks")),
        "versions": {},
    }
    for name in PACKAGES:
        try:
            info["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["multiprocessors"] = properties.multi_processor_count
        info["capability"] = f"{properties.major}.{properties.minor}"
        info["cuda"] = torch.version.cuda
    return info


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _exported() -> str | None:
    """The commit of a copy without history, if whoever made it left it in a file COMMIT."""
    file = ROOT / "COMMIT"
    return file.read_text().strip() if file.exists() else None


@dataclass(frozen=True)
class Limits:
    """What this device can do at best, measured."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """The time that work takes at least: whichever of arithmetic and memory needs longer."""
        return 1e3 * max(flops / self.flops_per_second, moved / self.bytes_per_second)


def limits(device: torch.device) -> Limits:
    """Copy 2 GiB and multiply 8192 x 8192 matrices of random bf16 (smaller on a CPU)."""
    cuda = device.type == "cuda"
    source = torch.randn(1 << 29 if cuda else 1 << 22, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, seconds=0.1)
    moved = 2 * source.numel() * source.element_size()
    n = 8192 if cuda else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    out = torch.empty_like(a)
    product_ms = median_ms(lambda: torch.mm(a, b, out=out), device, seconds=0.1)
    return Limits(1e3 * moved / copy_ms, 1e3 * 2 * n**3 / product_ms)


class Cold:
    """Empties the L2 cache between calls, by writing something larger than it."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def host_us(call: Callable[[], object], device: torch.device, calls: int = 200, seconds: float = 0.5) -> float:
    """Microseconds until a call returns, the median of many; the queue of the device is empty before each."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 20 or (len(times) < calls and time.perf_counter() - begin < seconds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * statistics.median(times)


def first_call_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the first call, compilation and searches included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_mib(call: Callable[[], object], inputs: list[torch.Tensor], device: torch.device) -> float | None:
    """The most memory that a call and its inputs take together, in MiB, whatever else is allocated."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - sum(x.numel() * x.element_size() for x in inputs)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return (torch.cuda.max_memory_allocated(device) - others) / 2**20


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Plain text, columns aligned; None is a dash."""

    def show(x: Any) -> str:
        if x is None:
            return "-"
        if isinstance(x, float):
            return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 0.01 or x == 0 else f"{x:.1e}"
        return str(x)

    cells = [head, *[[show(x) for x in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
