"""What every chunk kernel shares: where a program's tokens lie, and how decay is applied.

A program is given a place in a grid that the host can size without looking at cu_seqlens. Sequence n holds ceil(length / GRANULE) parts;
part p of it sits at place floor(cu[n] / GRANULE) + n + p. Places are unique and ascend with n, there are at most T / GRANULE + N of them,
and the sequence of a place is found by bisection in cu_seqlens itself: no map is built, and the host never waits for the device.

The state at the start of chunk c > 0 of a sequence is kept in slot floor((begin + 64 c) / 64) - 1: unique again, and never more
than T / 64 slots whatever the lengths (chunk 0 starts from the initial state, which needs no slot).
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)


@triton.jit
def find_part(place, cu_seqlens, N, steps, T, GRANULE, PACKED: tl.constexpr):
    """The sequence, part, first token and end of the sequence at `place`; an empty place has part * GRANULE >= end - begin."""
    if PACKED:
        low = place * 0
        high = low + N
        for _ in range(steps):
            middle = (low + high) // 2
            below = tl.load(cu_seqlens + middle) // GRANULE + middle <= place
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        begin = tl.load(cu_seqlens + low).to(tl.int64)
        end = tl.load(cu_seqlens + low + 1).to(tl.int64)
        part = place - (begin // GRANULE).to(tl.int32) - low
        return low, part, begin, end
    else:
        parts = tl.cdiv(T, GRANULE)
        sequence = place // parts
        begin = sequence.to(tl.int64) * T
        return sequence, place % parts, begin, begin + T


@triton.jit
def decay_between(G_row, G_col, keep):
    """exp2(G_row - G_col) where `keep`, else 0. The exponent is masked, not the power: above the diagonal it would overflow."""
    return tl.math.exp2(tl.where(keep, G_row - G_col, float("-inf")))
