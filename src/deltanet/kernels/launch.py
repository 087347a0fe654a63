"""What a kernel family is asked to run (`Problem`), and the frozen launch tables it answers with. Needs no GPU and no Triton."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the operator, as seen by those who must say whether they can run it."""

    algorithm: str  # "chunk" or "recurrent"
    device: str  # device type: "cpu", "cuda", ...
    capability: tuple[int, int] | None  # CUDA compute capability, None elsewhere
    dtype: str  # of q, k and v: "float32", "bfloat16", "float16", "float64"
    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    sequences: int  # batch, or the number of packed sequences
    gated: bool
    packed: bool  # cu_seqlens given


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How one kernel is launched: the tile one program owns, the warps that share it, the depth of its load pipeline."""

    warps: int
    stages: int = 1
    block_v: int = 0  # most value columns of one program's tile; 0 where a kernel does not split V
    block_k: int = 0  # most key columns of one program's tile; 0 where a kernel does not split K


# A table holds one row per (bytes of an element of q, key dimension rounded up to a power of two). Nothing depends on T, B or H.
Table = dict[tuple[int, int], LaunchConfig]


def padded(dim: int) -> int:
    """The tile width that holds `dim` columns: a power of two, at least 16 (the least that a tensor core multiplies)."""
    return max(16, 1 << (dim - 1).bit_length())


def choose(table: Table, itemsize: int, key_dim: int) -> LaunchConfig:
    """The row for a key dimension; the tables are complete for 2 and 4 bytes and 16 to 256 columns."""
    return table[itemsize, padded(key_dim)]
