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
    overlaps: bool = False  # starts while the launch before it ends, and waits inside for what that wrote (programmatic dependent launch)
    registers: int | None = None  # most registers of a thread, where the assembler left to itself settles for far too few


# A table holds one row per (bytes of an element of q, key dimension rounded up to a power of two). Nothing depends on T, B or H.
Table = dict[tuple[int, int], LaunchConfig]


def padded(dim: int) -> int:
    """The tile width that holds `dim` columns: a power of two, at least 16 (the least that a tensor core multiplies)."""
    return max(16, 1 << (dim - 1).bit_length())


def choose(table: Table, itemsize: int, key_dim: int) -> LaunchConfig:
    """The row for a key dimension; the tables are complete for 2 and 4 bytes and 16 to 256 columns."""
    return table[itemsize, padded(key_dim)]


# recurrent: one warp holds a strip of the state, [summed dimension, strip], 64 elements a lane: at 32 the conversions of q and k to fp32
# outweigh the arithmetic, at 128 the compiler runs out of registers. Loads are pipelined by hand, two tokens ahead. Every size of element
# has the same row: the arithmetic is fp32. Key: (bytes of an element of q, summed dimension), which is K for "errors" and V for "keys".
_STRIP = {16: 64, 32: 64, 64: 32, 128: 16, 256: 8}
RECURRENT: dict[str, Table] = {
    "errors": {(size, along): LaunchConfig(warps=1, block_v=strip) for size in (2, 4) for along, strip in _STRIP.items()},
    "keys": {(size, along): LaunchConfig(warps=1, block_k=strip) for size in (2, 4) for along, strip in _STRIP.items()},
}

# decode: memory-bound, a program moves a whole [K, 32] piece of the state, 128 bytes of a row at a time. 4 warps have 32 (K 128) or 64 (K 256)
# floats a lane in flight; 16 columns at B 1 would use more multiprocessors, but half a line of each row.
DECODE: Table = {(size, key_dim): LaunchConfig(warps=4, block_v=32) for size in (2, 4) for key_dim in (16, 32, 64, 128, 256)}

# The chunk kernels pad K and V to at least 64 columns: every further width is one more configuration to prove. One table per class of GPU.
# Key: (bytes of an element of q, padded K). Times: one H200, 8 x 4096 x 16 x 128. The rows of other GPUs were compiled for 8.0 alone: what they
# spill is in tests/kernels/test_compile.py, and in 16 bits they fit into 99 KiB of shared memory. Nobody has run them.
HOPPER, AMPERE = "hopper", "ampere"


def gpu_class(major: int) -> str:
    """Whose rows a GPU of compute capability `major`.x takes: products of whole warpgroups need other tiles than those of single warps."""
    return HOPPER if major in (9, 10) else AMPERE


# transform: one warp a chunk, so that nothing waits; the whole of K at once (0.097 ms) beats halves (0.115) and quarters (0.16).
# 256 columns at once would spill.
_TRANSFORM: Table = {
    (size, width): LaunchConfig(warps=1, block_k=min(width, 128) if size == 2 else 32) for size in (2, 4) for width in (64, 128, 256)
}
CHUNK_TRANSFORM = {HOPPER: _TRANSFORM, AMPERE: _TRANSFORM}

# forward, state_gradient. Hopper: a [block_v, K] state is 64 registers a thread at 4 warps. Two programs share a multiprocessor and hide each
# other's waits; a third load stage costs that (35 to 90% slower). K 256 needs 8 warps; 128 columns there, or the keys are read four times.
# fp32 tiles are twice as wide, and have no room for stages. Elsewhere 32 columns: the operands of a product are registers too.
_FP32: Table = {
    (4, 64): LaunchConfig(warps=4, block_v=64),
    (4, 128): LaunchConfig(warps=8, block_v=64),
    (4, 256): LaunchConfig(warps=8, block_v=32),
}
_NARROW: Table = {
    (2, 64): LaunchConfig(warps=4, block_v=32),
    (2, 128): LaunchConfig(warps=4, block_v=32),
    (2, 256): LaunchConfig(warps=8, block_v=32),
    # fp32 left to itself gets 32 registers there and 60 to 95 kB of spills
    (4, 64): LaunchConfig(warps=8, block_v=32, registers=255),
    (4, 128): LaunchConfig(warps=8, block_v=16, registers=255),
    (4, 256): LaunchConfig(warps=8, block_v=16, registers=255),
}
CHUNK_FORWARD = {
    HOPPER: {
        (2, 64): LaunchConfig(warps=4, stages=2, block_v=64),
        (2, 128): LaunchConfig(warps=4, stages=2, block_v=64),  # 0.336 ms saving states; 8 warps on 128 columns 0.42
        (2, 256): LaunchConfig(warps=8, stages=2, block_v=128),  # 0.86 at half the heads; 64 columns 1.2, 32 columns 1.9, one stage 1.2
        **_FP32,
    },
    AMPERE: _NARROW,
}
CHUNK_STATE_GRADIENT = {
    HOPPER: {
        (2, 64): LaunchConfig(warps=4, stages=2, block_v=64),
        (2, 128): LaunchConfig(warps=4, stages=2, block_v=64),  # 0.359 ms; 8 warps on 128 columns were 0.02 slower
        (2, 256): LaunchConfig(warps=8, block_v=128),  # 0.97 at half the heads; 64 columns 1.7 to 2.0
        **_FP32,
    },
    AMPERE: {**_NARROW, (2, 256): LaunchConfig(warps=8, block_v=16)},  # 32 columns need 104 KiB of shared memory
}

# gradients: 64 columns of K a program at 4 warps, two programs a multiprocessor: 0.51 ms. All 128 columns: 0.61 at 4 warps (spills),
# 0.68 at 8 (one program a multiprocessor). Three stages: 0.69, again for want of the second program.
_GRADIENTS: Table = {
    **{(2, width): LaunchConfig(warps=4, stages=2, block_v=64, block_k=64) for width in (64, 128, 256)},
    **{(4, width): LaunchConfig(warps=8, block_v=32, block_k=64) for width in (64, 128, 256)},
}
_GRADIENTS_FP32: Table = {(4, width): LaunchConfig(warps=8, block_v=32, block_k=32, registers=255) for width in (64, 128, 256)}
CHUNK_GRADIENTS = {HOPPER: _GRADIENTS, AMPERE: {**_GRADIENTS, **_GRADIENTS_FP32}}

# Gated, the chunk's decays and a second accumulator for dk spill at 4 warps on half of K 128 (1.14 ms); 8 warps on all of it take 0.91.
# K 64 (8 x 4096 x 32 x 64): 0.69 at 4 warps, 1.90 at 8.
_GRADIENTS_GATED: Table = {
    **_GRADIENTS,
    (2, 128): LaunchConfig(warps=8, stages=2, block_v=64, block_k=128),
    (2, 256): LaunchConfig(warps=8, stages=2, block_v=64, block_k=128),
}
CHUNK_GRADIENTS_GATED = {
    HOPPER: _GRADIENTS_GATED,
    # ptxas for 8.0 settles for 32 registers and 30 kB of spills at the 64 columns of the plain rule; told, it spills 0.4 kB at 32, 3.6 kB at 64.
    AMPERE: {**_GRADIENTS_GATED, **_GRADIENTS_FP32, (2, 64): LaunchConfig(warps=4, block_v=64, block_k=32, registers=255)},
}

# chain: fp32 throughout, a product a segment, one segment after the other: the wait for M is all there is to it, so narrow columns for many
# programs, and all of M at once while it fits into shared memory. Key: padded K.
SEGMENT_CHAIN: dict[int, LaunchConfig] = {
    64: LaunchConfig(warps=4, block_v=32, block_k=64),
    128: LaunchConfig(warps=8, stages=2, block_v=16, block_k=128),  # 19 us for 8 segments of 16 heads; 32 columns 23
    256: LaunchConfig(warps=8, block_v=64, block_k=32),
}
