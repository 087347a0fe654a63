"""The Hopper GPU family: the chunked delta rule in Gluon, warp-specialised, for compute capability 9.0 (H100, H200).

What it has no kernel for it borrows from the portable family, stage by stage, the token-by-token form as a whole; what was not proven on a
GPU it refuses, and `auto` goes on to that family. Triton is imported when an operator runs, never before.
"""

from functools import cache
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

from deltanet.kernels import triton
from deltanet.kernels.launch import Problem

__all__ = [
    "chunk_backward", "chunk_forward", "decode_step", "recurrent_backward", "recurrent_forward", "refuse", "saved", "warmup",
]  # fmt: skip

RELEASES = ((3, 6), (3, 7))  # of Triton: Gluon is experimental, its next release may mean something else by the same words
DTYPES = ("bfloat16", "float16")
DIMS = (64, 128, 256)


def refuse(problem: Problem) -> str | None:
    """None when the family can run `problem`, else what is missing and what to do."""
    if (missing := _missing()) is not None:
        return missing
    if problem.device != "cuda":
        return f"it needs a Hopper GPU, and the tensors are on {problem.device}: move them, or pass backend='reference'"
    if problem.capability != (9, 0):
        which = "none" if problem.capability is None else ".".join(map(str, problem.capability))
        return f"it needs a GPU of compute capability 9.0 (H100, H200), this one has {which}: pass backend='triton'"
    if problem.algorithm != "chunk":
        return triton.refuse(problem)
    if problem.dtype not in DTYPES:
        return f"it runs {' and '.join(DTYPES)}, not {problem.dtype}: cast the tensors, or pass backend='triton'"
    if problem.key_dim != problem.value_dim or problem.key_dim not in DIMS:
        dims = ", ".join(map(str, DIMS))
        return f"K and V must be equal and one of {dims}, got K {problem.key_dim} and V {problem.value_dim}: pass backend='triton'"
    if problem.value_heads > 65_535:
        return f"it runs up to 65535 value heads, got {problem.value_heads}: pass backend='reference'"
    if problem.batch * problem.tokens * problem.value_heads >= 2**30:
        return "it runs up to 2**30 tokens times value heads, a row of its tensor maps each: split the batch, or pass backend='triton'"
    return None


@cache
def _missing() -> str | None:
    """What the installation lacks, found without importing Triton."""
    found = util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        return "Triton is not installed: pip install 'triton>=3.6'"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) not in RELEASES:
        known = " and ".join(".".join(map(str, release)) for release in RELEASES)
        return f"it was written for Triton {known} and this is {version}: install one of these, or pass backend='triton'"
    gluon = Path(found.submodule_search_locations[0], "experimental", "gluon", "language", "nvidia", "hopper")
    if not gluon.is_dir():
        return f"this Triton {version} comes without Gluon for Hopper: reinstall it from PyPI, or pass backend='triton'"
    return None


def saved(q, v, g, cu_seqlens, *, algorithm: str, save: str) -> list[Any]:
    """What a forward will save for the backward, as empty tensors: what the portable family saves."""
    return triton.saved(q, v, g, cu_seqlens, algorithm=algorithm, save=save)


_HOMES = {
    "chunk_forward": "chunk",
    "chunk_backward": "chunk",
    "warmup": "compile_ahead",
}
_BORROWED = ("decode_step", "recurrent_backward", "recurrent_forward")


def __getattr__(name: str) -> Any:
    if name in _BORROWED:
        return getattr(triton, name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_home(_HOMES[name]), name)


@cache
def _home(module: str) -> ModuleType:
    """A module of this family, looked up once: a call is too short to ask importlib each time."""
    return import_module(f"{__name__}.{module}")
