"""What is done with the state of a mixer, a block or a model: it is data, nested tuples of tensors whose first dimension is the sequence."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["concatenate", "reorder", "snapshot", "state_bytes"]

State = TypeVar("State")


def _map(function: Callable[..., Tensor], *states: Any) -> Any:
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    parts = [_map(function, *parts) for parts in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def snapshot(state: State) -> State:
    """A copy to come back to: going on from the copy gives the same bits as going on from the original did."""
    return _map(torch.clone, state)


def reorder(state: State, index: Tensor) -> State:
    """The states of sequences `index` `[M]`: select, repeat or permute (beam search, dropping finished sequences)."""
    return _map(lambda x: x.index_select(0, index.to(x.device)), state)


def concatenate(states: Sequence[State]) -> State:
    """One batch out of several: sequences of `states[0]`, then of `states[1]`, ...

    Caches, whose rows `[N, L, ...]` end with the newest token, are filled up in front to the longest.
    """
    return _map(_stack, *states)


def _stack(*parts: Tensor) -> Tensor:
    if all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return torch.cat(parts)
    rows = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (rows - x.shape[1], 0)) for x in parts])


def state_bytes(state: Any) -> int:
    """Bytes that `state` occupies."""
    return state.nbytes if isinstance(state, Tensor) else sum(state_bytes(part) for part in state)
