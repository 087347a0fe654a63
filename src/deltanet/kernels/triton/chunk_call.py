"""One chunked call of a GPU family: its sizes, the memory it keeps for the backward, and how long sequences are cut.

Both families work on what is described here, so that either backward runs behind either forward.
"""

from functools import cache
from itertools import count
from typing import Self

import torch
from torch import Tensor

from deltanet.kernels.launch import HOPPER, LaunchConfig, Table, gpu_class

__all__ = ["Call", "multiprocessors", "or_stand_in", "plain", "saved", "unpack"]

CHUNK = 64
PACKED_ROW = 48  # elements of X per token: of a chunk's 64 x 64, the upper right quarter is zero and not stored
SHORTEST_SEGMENT = 1024  # below 16 chunks a segment, computing its transition costs more than the idle multiprocessors
ROUNDING_COUNTS = (torch.bfloat16, torch.float16)  # of X, where keys repeat: what rounding left of it is used as well


class Call:
    """Sizes of one call, and the scalars by which a kernel finds its place."""

    @classmethod
    def of(cls, q: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None) -> Self:
        """The Call of these tensors. On a GPU each kind is worked out once, as that takes longer than a launch."""
        if not q.is_cuda:
            return cls(q, v, beta, g, cu_seqlens)
        bounds = None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.dtype, cu_seqlens.data_ptr() % 16)
        kind = (cls, q.shape, q.dtype, q.device, v.shape, beta.dtype, None if g is None else g.dtype, bounds, SHORTEST_SEGMENT)
        found = _calls.get(kind)
        if found is None:
            if len(_calls) >= 1024:
                _calls.clear()
            found = _calls[kind] = cls(q, v, beta, g, cu_seqlens)
        if cu_seqlens is None:
            return found
        own = cls.__new__(cls)
        own.__dict__ |= found.__dict__ | {"place": (cu_seqlens, *found.place[1:])}
        return own

    def __init__(self, q: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None):
        B, T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2], v.shape[3]
        self.T, self.tokens, self.packed = T, B * T, cu_seqlens is not None
        self.N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.states = (self.N, self.HV, self.K, self.V)
        self.slots = _slots(q, v)
        self.place = (cu_seqlens, self.N, self.N.bit_length(), T, self.tokens)
        self.sizes = {"H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "PACKED": self.packed}
        self.BK, self.BV, self.itemsize = _width(self.K), _width(self.V), q.element_size()
        self.gpu = _gpu(q.device)
        self.segment = _segment(self.N, T, self.HV, self.V, q.device)
        self.segments = self.parts(self.segment) if self.segment else 0
        # what decides the code of every kernel of this call, beside each kernel's own flags; all other tensors are aligned
        bounds = None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.data_ptr() % 16)
        gate = None if g is None else g.dtype
        large = max(self.tokens, self.N) >= 2**31
        kind = (q.device, q.dtype, v.dtype, beta.dtype, gate, self.H, self.HV, self.K, self.V, bounds, large)
        self.key = _kinds.setdefault(kind, next(_numbers))  # a number, which is looked up in less time; threads never draw the same one

    def memory(self, q: Tensor, v: Tensor, g: Tensor | None, save: str) -> tuple[list[Tensor], tuple]:
        """What the forward keeps, as empty tensors, and X, b, G, M, E, S, of which it keeps none under "nothing"."""
        found = _memory(q, v, g, self.tokens, self.segments, self.slots, save, between=save == "nothing")
        return [] if save == "nothing" else found, unpack(found, self, g)

    def pick(self, tables: dict[str, Table]) -> LaunchConfig:
        return tables[self.gpu][self.itemsize, self.BK]

    def parts(self, granule: int) -> int:
        """Places in a grid over parts of `granule` tokens, whatever cu_seqlens says (tiles.py)."""
        return _parts(self.N, self.T, granule, self.packed)


_calls: dict[tuple, Call] = {}
_kinds: dict[tuple, int] = {}
_numbers = count()


def saved(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, save: str, *, between: bool = False
) -> list[Tensor]:
    """What a forward keeps under `save`, as empty tensors; with `between`, what it needs for itself when it keeps nothing."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment = _segment(N, q.shape[1], v.shape[2], v.shape[3], q.device)
    segments = _parts(N, q.shape[1], segment, cu_seqlens is not None) if segment else 0
    return _memory(q, v, g, v.shape[0] * v.shape[1], segments, _slots(q, v), save, between=between)


def _memory(q, v, g, tokens, segments, slots, save, *, between: bool = False) -> list[Tensor]:
    if save == "nothing" and not between:
        return []
    HV, K = slots[1], slots[3]
    kept = [q.new_empty(HV, tokens * PACKED_ROW), q.new_empty(HV, tokens, dtype=torch.float32)]
    if g is not None:
        kept.append(q.new_empty(HV, tokens, dtype=torch.float32))
    if segments:
        kept.append(q.new_empty(segments, HV, K, K, dtype=torch.float32))
    if not between:
        kept.append(torch.empty_like(v, memory_format=torch.contiguous_format))
        if save == "states":
            kept.append(q.new_empty(slots))
    return kept


def unpack(kept: list[Tensor], call: Call, g: Tensor | None) -> tuple:
    """X, b, G, M, E, S of a list that `saved` made; None for what is not there."""
    rest = iter(kept)
    X, b = next(rest), next(rest)
    G = None if g is None else next(rest)
    M = next(rest) if call.segment else None
    return X, b, G, M, next(rest, None), next(rest, None)


def plain(x: Tensor | None) -> Tensor | None:
    """Contiguous and aligned to 16 bytes, as fresh memory is: by a copy where it must be."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def or_stand_in(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with a pointer that no kernel will follow where there is none."""
    return [stand_in if x is None else x for x in tensors]


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _slots(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Shape of the chunk states: at most one for every 64 tokens, however these divide into sequences (tiles.py)."""
    return max(q.shape[0] * q.shape[1] - 1, 0) // CHUNK, v.shape[2], v.shape[3], q.shape[3]


def _parts(N: int, T: int, granule: int, packed: bool) -> int:
    return T // granule + N if packed else N * -(-T // granule)


def _segment(N: int, T: int, HV: int, V: int, device: torch.device) -> int:
    """Tokens of a segment, or 0 where whole sequences already fill half of the GPU."""
    if T < 2 * SHORTEST_SEGMENT:
        return 0
    programs = N * HV * -(-V // 64)
    free = 2 * multiprocessors(device) // max(programs, 1)
    if free < 4:
        return 0
    length = -(-T // free)
    segment = max(SHORTEST_SEGMENT, -(-length // CHUNK) * CHUNK)
    return segment if 2 * segment <= T else 0


@cache
def _gpu(device: torch.device) -> str:
    return gpu_class(torch.cuda.get_device_properties(device).major) if device.type == "cuda" else HOPPER


def _width(dim: int) -> int:
    return max(64, 1 << (dim - 1).bit_length())
