"""Who can run a call, and why not. Asked for by name, a family runs or says why not; `auto` takes the first that does not refuse.

On CUDA `auto` never falls back to the reference in silence: it would be hundreds of times slower, and nobody would notice.
"""

import difflib
import importlib
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from deltanet import reference
from deltanet.kernels.launch import Problem

__all__ = ["BackendError", "Explanation", "choose", "describe", "explain", "family", "family_of", "nearest"]

FAMILIES = ("hopper", "triton", "reference")  # in the order in which `auto` asks them on a GPU; the reference runs anywhere and comes last
NAMES = ("auto", *FAMILIES)  # what `backend` may say


class BackendError(RuntimeError):
    """No backend can run this call, or the one asked for cannot. The message says why and what to do."""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the problem, the backend that `auto` takes (or None), and each family's refusal (None: it can run)."""

    problem: Problem
    chosen: str | None
    refusals: dict[str, str | None]

    def __str__(self) -> str:
        p = self.problem
        shape = f"B {p.batch} T {p.tokens} H {p.heads} HV {p.value_heads} K {p.key_dim} V {p.value_dim}"
        rule = ("gated" if p.gated else "plain") + (f", {p.sequences} packed sequences" if p.packed else "")
        lines = [f"{p.algorithm} delta rule, {rule}: {shape}, {p.dtype} on {p.device}"]
        lines += [
            f"  {name:<10} {'can run' if why is None else 'refuses: ' + why}{'  <- auto takes it' if name == self.chosen else ''}"
            for name, why in self.refusals.items()
        ]
        return "\n".join(lines)


@cache
def family(name: str) -> ModuleType:
    """The module of a family (docs/conventions.md lists what it provides)."""
    return reference if name == "reference" else importlib.import_module(f"deltanet.kernels.{name}")


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def describe(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, algorithm: str) -> Problem:
    """The call in the terms that families decide by."""
    return _problem(q.shape, q.dtype, q.device, v.shape, g is not None, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, algorithm)


def _problem(
    keys: torch.Size, dtype: torch.dtype, device: torch.device, values: torch.Size, gated: bool, packed: int | None, algorithm: str
) -> Problem:
    batch, tokens, heads, key_dim = keys
    return Problem(
        algorithm=algorithm,
        device=device.type,
        capability=_capability(device),
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        tokens=tokens,
        heads=heads,
        value_heads=values[2],
        key_dim=key_dim,
        value_dim=values[3],
        sequences=batch if packed is None else packed,
        gated=gated,
        packed=packed is not None,
    )


def family_of(q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, algorithm: str, backend: str) -> ModuleType:
    """The family that runs a call; BackendError when none does, or when `backend` names one that cannot."""
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # on a GPU each kind of call is decided once; elsewhere Triton's interpreter may be turned on and off, and sizes may be symbols
    decide = _decide if q.is_cuda and type(q) is Tensor else _decide.__wrapped__
    return decide(q.shape, q.dtype, q.device, v.shape, g is not None, packed, algorithm, backend)


@lru_cache(1024)
def _decide(keys, dtype, device, values, gated, packed, algorithm, backend) -> ModuleType:
    return family(choose(_problem(keys, dtype, device, values, gated, packed, algorithm), backend))


def _refusal(name: str, problem: Problem) -> str | None:
    return None if name == "reference" else family(name).refuse(problem)


def choose(problem: Problem, backend: str) -> str:
    """The name of the family that runs `problem`; BackendError when none does, or when `backend` names one that cannot."""
    if backend == "auto":
        if problem.device != "cuda":  # not even where Triton's interpreter could run a kernel on a CPU, far slower
            return "reference"
        for name in FAMILIES[:-1]:
            if _refusal(name, problem) is None:
                return name
        refusals = "; ".join(f"{name}: {_refusal(name, problem)}" for name in FAMILIES if name != "reference")
        raise BackendError(
            f'no GPU backend can run this call ({refusals}). Pass backend="reference" to run it in plain PyTorch, slowly'
        )
    why = _refusal(backend, problem)
    if why is not None:
        raise BackendError(f"the {backend} backend cannot run this call: {why}")
    return backend


def explain(problem: Problem) -> Explanation:
    refusals = {name: _refusal(name, problem) for name in FAMILIES}
    try:
        chosen = choose(problem, "auto")
    except BackendError:
        chosen = None
    if chosen is None and refusals["reference"] is None:
        refusals["reference"] = (
            'slow on a GPU, so auto never takes it there; pass backend="reference" to run it all the same'
        )
    return Explanation(problem, chosen, refusals)


def nearest(name: str, known: tuple[str, ...]) -> str:
    """`. Did you mean 'x'?` when one of `known` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {close[0]!r}?" if close else ""
