"""One chunked call of a GPU family: its sizes, the memory it keeps for the backward, and how long sequences are cut.

Both families work on what is described here, so that either backward runs behind either forward.
"""

from functools import cache

import torch
from torch import Tensor

from deltanet.kernels.launch import HOPPER, LaunchConfig, Table, gpu_class

__all__ = ["Call", "multiprocessors", "or_stand_in", "plain", "saved", "unpack"]

CHUNK = 64
PACKED_ROW = 48  # elements of X per token: of a chunk's 64 x 64, the upper right quarter is zero and not stored
SHORTEST_SEGMENT = 1024  # below 16 chunks a segment, computing its transition costs more than the idle multiprocessors
ROUNDING_COUNTS = (torch.bfloat16,)  # of X, where keys repeat: what rounding left of it is used as well


class Call:
    """Sizes of one call, and the scalars by which a kernel finds its place."""

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
        # what decides the code of every kernel of this call, beside each kernel's own flags; all other tensors are aligned
        bounds = None if cu_seqlens is None else (cu_seqlens.dtype, cu_seqlens.data_ptr() % 16)
        gate = None if g is None else g.dtype
        large = max(self.tokens, self.N) >= 2**31
        self.key = (q.device, q.dtype, v.dtype, beta.dtype, gate, self.H, self.HV, self.K, self.V, bounds, large)

    def pick(self, tables: dict[str, Table]) -> LaunchConfig:
        return tables[self.gpu][self.itemsize, self.BK]

    def parts(self, granule: int) -> int:
        """Places in a grid over parts of `granule` tokens, whatever cu_seqlens says (tiles.py)."""
        return _parts(self.N, self.T, granule, self.packed)


def saved(
    q: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, save: str, *, between: bool = False
) -> list[Tensor]:
    """What a forward keeps under `save`, as empty tensors; with `between`, what it needs for itself when it keeps nothing."""
    if save == "nothing" and not between:
        return []
    tokens, HV = v.shape[0] * v.shape[1], v.shape[2]
    X = q.new_empty(HV, tokens * PACKED_ROW)
    b_G = [q.new_empty(HV, tokens, dtype=torch.float32) for _ in range(1 if g is None else 2)]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment = _segment(N, q.shape[1], HV, v.shape[3], q.device)
    segments = _parts(N, q.shape[1], segment, cu_seqlens is not None) if segment else 0
    M = [q.new_empty(segments, HV, q.shape[3], q.shape[3], dtype=torch.float32)] if segment else []
    if between:
        return [X, *b_G, *M]
    E = torch.empty_like(v, memory_format=torch.contiguous_format)
    return [X, *b_G, *M, E, *([q.new_empty(_slots(q, v))] if save == "states" else [])]


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
