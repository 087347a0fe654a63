"""Launching without Triton's front door, which binds, specialises and looks up on every call and costs more than some kernels run.

The first call of a kernel under a key goes through it and keeps the compiled kernel; later calls hand that their arguments directly, and
skip what Triton prepares for profilers unless one listens. The key must hold whatever decides the code: dtypes, alignments and constants.
T is not among them: sizes are plain integers, never specialised. `together` compiles every kernel that a function would launch, side by
side: four compilations take the time of the longest.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from threading import local
from typing import Any

import torch
from triton import knobs

from deltanet.kernels.launch import LaunchConfig

__all__ = ["launch", "on_its_device", "together"]

_kernels: dict[tuple, tuple] = {}  # key -> the compiled kernel, its constants in argument order, its LaunchConfig
_thread = local()  # .recorded: launches noted instead of run, inside `together`


def launch(
    fn: Any, key: tuple, grid: tuple[int, int, int], args: tuple, config: LaunchConfig, constants: Callable[[], dict[str, Any]]
) -> None:
    """fn[grid](*args, **constants()) with the warps and stages of `config`; `args` are the kernel's first arguments, in order."""
    recorded = getattr(_thread, "recorded", None)
    if recorded is not None:
        recorded.append((fn, grid, args, constants(), config))
        return
    key = (*key, id(config))  # kept alive by the entry
    found = _kernels.get(key)
    if found is not None:
        kernel, tail, _ = found
        if _someone_listens():
            kernel[grid](*args, *tail)
        else:
            stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args, *tail)
        return
    named = constants()
    kernel = fn[grid](*args, **named, **_options(config))
    if kernel is not None:  # the interpreter compiles nothing
        _kernels[key] = kernel, tuple(named[name] for name in fn.arg_names[len(args) :]), config


def _someone_listens() -> bool:
    """Whether a profiler hooked into launches; Triton calls its chains of hooks even when they are empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _options(config: LaunchConfig) -> dict[str, int | None]:
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
    return options | {"launch_pdl": True} if config.overlaps else options


def together(run: Callable[[], Any]) -> None:
    """Compile what `run` launches, in threads; `run` itself launches nothing meanwhile, so its results are not to be looked at."""
    _thread.recorded = work = []
    try:
        run()
    finally:
        _thread.recorded = None
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(_compile, work))


def _compile(work: tuple) -> None:
    fn, grid, args, constants, config = work
    kernel = fn.warmup(*args, grid=grid, **constants, **_options(config))
    if hasattr(kernel, "_init_handles"):  # the launcher is a small C program of its own, compiled on first use
        kernel._init_handles()


def on_its_device(function: Callable) -> Callable:
    """Run `function` with the device of its first tensor current: kernels are launched on the current device, wherever their data is."""

    @wraps(function)
    def guarded(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(first.device):
                return function(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    return guarded
