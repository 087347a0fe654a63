"""How a program of the token-by-token kernels holds its strip of the state in the registers of one warp, and finds its tokens."""

import triton
import triton.language as tl

PARTS = tl.constexpr(4)  # sums that a lane carries side by side: one long chain of additions would wait 4 cycles for each
WARP = tl.constexpr(32)  # lanes of a warp: LANES of them share a sum, and WARP / LANES hold different columns


@triton.jit
def place(cu_seqlens, T, HV, STRIPS: tl.constexpr, PACKED: tl.constexpr):
    """The strip, value head and sequence of this program, and the sequence's first token and length."""
    program = tl.program_id(0)
    strip = program % STRIPS
    head = (program // STRIPS) % HV
    n = (program // STRIPS // HV).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32)
    else:
        begin = n * T
        length = T
    return strip, head, n, begin, length


@triton.jit
def along_index(ALONG: tl.constexpr, LANES: tl.constexpr):
    """[PARTS, run, LANES]: what a lane holds lies together in memory, so that it is read in few wide pieces."""
    RUN: tl.constexpr = ALONG // LANES // PARTS
    part = tl.arange(0, PARTS)[:, None, None] * RUN
    return tl.arange(0, LANES)[None, None, :] * (RUN * PARTS) + part + tl.arange(0, RUN)[None, :, None]


@triton.jit
def across_index(strip, STRIP: tl.constexpr, LANES: tl.constexpr):
    """[STRIP / ACROSS, ACROSS], where ACROSS lanes hold different columns."""
    ACROSS: tl.constexpr = WARP // LANES
    return strip * STRIP + tl.arange(0, STRIP // ACROSS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]


@triton.jit
def state_tile(
    state,
    strip,
    ALONG_STRIDE: tl.constexpr,
    ACROSS_STRIDE: tl.constexpr,
    ALONG: tl.constexpr,
    STRIP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Pointers [PARTS, run, STRIP / ACROSS, LANES, ACROSS] to a strip of one state.

    The hints understate how contiguous memory is. Told the truth, the compiler spreads the tile over lanes for wide accesses to the state,
    which happen once, and keeps that layout in the loop, where every sum then costs 10 to 60 times the shuffles. A hint holds only on
    the operation it is given to, so the indices are spelled out again; Triton 3.7 reads the first pair, 3.6 the second.
    """
    RUN: tl.constexpr = ALONG // LANES // PARTS
    ACROSS: tl.constexpr = WARP // LANES
    part = tl.arange(0, PARTS)[:, None, None] * RUN
    along = tl.arange(0, LANES)[None, None, :] * (RUN * PARTS) + part + tl.arange(0, RUN)[None, :, None]
    along = tl.max_contiguous(tl.multiple_of(along, [1, 1, 1]), [1, 1, 1])
    across = strip * STRIP + tl.arange(0, STRIP // ACROSS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]
    across = tl.max_contiguous(tl.multiple_of(across, [1, 1]), [1, 1])
    pointer = state + (along[:, :, None, :, None] * ALONG_STRIDE + across[None, None, :, None, :] * ACROSS_STRIDE)
    return tl.max_contiguous(tl.multiple_of(pointer, [1, 1, 1, 1, 1]), [1, 1, 1, 2, 4])


@triton.jit
def zeros(ALONG: tl.constexpr, STRIP: tl.constexpr, LANES: tl.constexpr):
    """A strip of the state before the first write."""
    return tl.zeros([PARTS, ALONG // LANES // PARTS, STRIP // (WARP // LANES), LANES, WARP // LANES], tl.float32)


@triton.jit
def wide(x):
    """A vector of the summed dimension against the tile, in fp32."""
    return x.to(tl.float32)[:, :, None, :, None]


@triton.jit
def tall(x):
    """A vector of the strip's own dimension against the tile."""
    return x[None, None, :, None, :]


@triton.jit
def total(x):
    """The sum over the summed dimension: runs, then PARTS of them, in registers, then across LANES."""
    return tl.sum(tl.sum(tl.sum(x, 1), 0), 1)


@triton.jit
def two(pointer, step, offset, mask, left):
    """The vectors of the next two tokens; zero where fewer than two are left.

    A pair at a time, because the compiler packs what it has loaded before the end of the loop body, and waits for it there: one token
    a body would leave less than one token's arithmetic to hide the memory behind.
    """
    first = tl.load(pointer + offset, mask=mask & (left > 0), other=0.0)
    return first, tl.load(pointer + step + offset, mask=mask & (left > 1), other=0.0)


@triton.jit
def two_numbers(pointer, step, left):
    first = tl.load(pointer, mask=left > 0, other=0.0)
    return first, tl.load(pointer + step, mask=left > 1, other=0.0)
