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
