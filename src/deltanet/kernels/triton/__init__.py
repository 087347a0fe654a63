"""The portable GPU family: the delta rule in plain Triton, forward and backward, for compute capability 8.0 and above.

Triton is imported when an operator runs, never before: on a machine without it this family can still say that it refuses, and why.
"""

import sys
from functools import cache
from importlib import import_module, metadata, util
from types import ModuleType
from typing import Any

from deltanet.kernels.launch import Problem

__all__ = [
    "chunk_backward", "chunk_forward", "decode_step", "interpreting", "missing",
    "recurrent_backward", "recurrent_forward", "refuse", "saved", "warmup",
]  # fmt: skip

OLDEST = (3, 6)  # the first release whose Hopper code these kernels were checked with
DTYPES = ("float32", "bfloat16", "float16")


def refuse(problem: Problem) -> str | None:
    """None when the family can run `problem`, else what is missing and what to do."""
    if (lacking := missing()) is not None:
        return lacking
    if problem.device != "cuda" and not interpreting():
        return f"it needs a CUDA GPU, and the tensors are on {problem.device}: move them, or pass backend='reference'"
    if problem.capability is not None and problem.capability < (8, 0):
        major, minor = problem.capability
        return f"it needs a GPU of compute capability 8.0 or above, this one has {major}.{minor}: pass backend='reference'"
    if problem.dtype not in DTYPES:
        return f"it runs {', '.join(DTYPES)}, not {problem.dtype}: cast the tensors, or pass backend='reference'"
    for name, dim in (("K", problem.key_dim), ("V", problem.value_dim)):
        if not 16 <= dim <= 256:
            return f"{name} must be 16 to 256, got {dim}: use more or fewer heads, or pass backend='reference'"
    small = problem.capability is not None and (problem.capability in ((8, 6), (8, 9)) or problem.capability[0] == 12)
    if small and problem.algorithm == "chunk" and problem.dtype == "float32" and problem.key_dim > 128:
        return (
            f"in fp32 a K of {problem.key_dim} takes 128 KiB of shared memory, this GPU has 99: cast the tensors to bfloat16, "
            "or pass backend='reference'"
        )
    if problem.value_heads > 65_535:
        return f"it runs up to 65535 value heads, got {problem.value_heads}: pass backend='reference'"
    return None


@cache
def missing() -> str | None:
    """What the installation lacks. Asked once: looking a package up takes longer than launching a kernel."""
    if util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # torch's nightly builds bring it under another name
        version = import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is too old: pip install 'triton>=3.6'"
    return None


def interpreting() -> bool:
    """Whether Triton was imported with its interpreter on, in which kernels run on the CPU."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


def saved(q, v, g, cu_seqlens, *, algorithm: str, save: str) -> list[Any]:
    """What a forward will save for the backward, as empty tensors."""
    if algorithm == "chunk":
        from deltanet.kernels.triton import chunk_call

        return chunk_call.saved(q, v, g, cu_seqlens, save)
    from deltanet.kernels.triton import recurrent

    return recurrent.recurrent_saved(v, save)


_HOMES = {
    "chunk_forward": "chunk",
    "chunk_backward": "chunk",
    "decode_step": "decode",
    "recurrent_forward": "recurrent",
    "recurrent_backward": "recurrent",
    "warmup": "compile_ahead",  # a module named as what it provides would hide it
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_home(_HOMES[name]), name)


@cache
def _home(module: str) -> ModuleType:
    """A module of this family, looked up once: a call is too short to ask importlib each time."""
    return import_module(f"{__name__}.{module}")
