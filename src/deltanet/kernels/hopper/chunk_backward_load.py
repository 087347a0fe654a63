"""The loading warps of the Hopper backward, and what all its warps share: barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from deltanet.kernels.hopper.tiles import CHUNK, find_part
from deltanet.kernels.triton import chunk_call

# Barriers, by their place in one array; two places where a tile has two stages.
LOADED_KEYS = gl.constexpr(0)  # k and beta (and G), two stages
FREED_KEYS = gl.constexpr(2)
LOADED_QUERIES = gl.constexpr(4)  # q, two stages
FREED_QUERIES = gl.constexpr(6)
LOADED_ERRORS = gl.constexpr(8)  # E
FREED_ERRORS = gl.constexpr(9)
LOADED_OUTS = gl.constexpr(10)  # do and X
FREED_OUTS = gl.constexpr(11)
LOADED_STATE = gl.constexpr(12)  # S
FREED_STATE = gl.constexpr(13)
READY_P = gl.constexpr(14)  # gradient -> state warpgroups; taken when W of the same chunk is ready
READY_D = gl.constexpr(15)  # state -> gradient warpgroup
TAKEN_D = gl.constexpr(16)
READY_W = gl.constexpr(17)  # dV and what makes dbeta: state -> gradient warpgroup
TAKEN_W = gl.constexpr(18)
READY_G = gl.constexpr(19)  # terms of dg: gradient warpgroup -> the gate's warp
TAKEN_G = gl.constexpr(20)
READY_V = gl.constexpr(21)  # and <S, D>: state warpgroups -> the gate's warp, which takes it before it has taken W
USED_P = gl.constexpr(22)  # in chunks with a beta above 1: the state warpgroups need P no more, and
LOADED_REST = gl.constexpr(23)  # what rounding left of X is in its place

# A chunk's number shifted right by this is always 0, which the compiler cannot know. A tile found through it has its descriptors formed
# where they are used, on the uniform datapath. Otherwise all of them are formed ahead of the loop, in 150 registers that are not there, and
# come back from L2, where what spills ends up: the tiles leave no L1.
ALWAYS_0 = gl.constexpr(30)
ALSO_0 = gl.constexpr(29)  # other such numbers, so that what was formed for one product is not kept for a later one
THIRD_0 = gl.constexpr(28)


def in_32_bits(call: chunk_call.Call) -> bool:
    """Whether rows of tiles, and places in X after a sequence's first, are 32-bit numbers: in 64 bits the loading warp's 24 registers spill."""
    return max(call.tokens * chunk_call.PACKED_ROW, call.slots[0] * call.HV * call.V) < 2**31 - 2**16


@gluon.jit
def widened(x):
    """x in fp32. Of a pair of bf16 each takes one instruction; LLVM takes three for the two."""
    if x.dtype == gl.bfloat16:
        pair: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return gl.inline_asm_elementwise(pair, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def find_rows(place, cu_seqlens, N, steps, T, segment, SPLIT: gl.constexpr, PACKED: gl.constexpr):
    """Of the sequence at `place`, or the segment (SPLIT): its sequence, part and first token, tokens, and tokens to the end of the sequence."""
    if SPLIT:
        sequence, part, first, end = find_part(place, cu_seqlens, N, steps, T, segment, PACKED)
        first = (first + part * segment).to(gl.int32)
        left = end.to(gl.int32) - first
        return sequence, part, first, gl.maximum(gl.minimum(left, segment), 0), left
    else:
        if PACKED:
            first = gl.load(cu_seqlens + place).to(gl.int32)
            rows = gl.load(cu_seqlens + place + 1).to(gl.int32) - first
            return place, place * 0, first, rows, rows
        else:
            return place, place * 0, place * T, T, T


@gluon.jit
def load_keys(k, strength, G, sK, sB, sG, bars, back, at, column, ahead, t, rows, K: gl.constexpr, GATED: gl.constexpr):
    """k, beta and G of a chunk, `ahead` tokens behind the first of `rows`, to the stage where they go."""
    stage = back & 1
    mbarrier.wait(bars.index(FREED_KEYS + stage), ((back >> 1) & 1) ^ 1)
    loaded = bars.index(LOADED_KEYS + stage)
    mbarrier.expect(loaded, k.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [at, column], loaded, sK.index(stage))
    async_copy.async_copy_global_to_shared(sB.index(stage), strength + ahead + t, mask=ahead + t < rows)
    if GATED:  # past the end of the sequence the sum stays what it is at the last token
        async_copy.async_copy_global_to_shared(sG.index(stage), G + gl.minimum(ahead + t, rows - 1))
    async_copy.mbarrier_arrive(loaded, increment_count=False)


@gluon.jit
def load_X(x, sX, bars, r, c, left):
    """X of a chunk with `left` rows to its sequence's end: 32 rows of 32, 32 of 64."""
    async_copy.async_copy_global_to_shared(
        sX.slice(0, 32, 0), x + r[:, None] * 32 + c[None, :], mask=(r < left)[:, None] & (c < 32)[None, :]
    )
    async_copy.async_copy_global_to_shared(
        sX.slice(32, 32, 0), x + 1024 + r[:, None] * 64 + c[None, :], mask=(r + 32 < left)[:, None] & (c < 64)[None, :]
    )
    async_copy.mbarrier_arrive(bars.index(LOADED_OUTS), increment_count=False)


@gluon.jit
def load(
    sources, tiles, bars, places, span,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GATED: gl.constexpr, INITIAL: gl.constexpr,
):  # fmt: skip
    """One warp. Tiles arrive by TMA; X and beta, whose places in memory no tile fits, by copies of 16 and 4 bytes."""
    q, k, do, E, S, first_S, X, strength, G = sources
    sQ, sK, sdO, sE, sS, sX, sB, sG, _, _, _, _, _, _, _, _ = tiles
    head, key_head, part, slot, no_state, given = places
    chunks, rows, first = span
    sdO, sE, sS, sX = sdO.index(0), sE.index(0), sS.index(0), sX.index(0)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    r = gl.arange(0, 32, gl.SliceLayout(1, wide))
    c = gl.arange(0, 64, gl.SliceLayout(0, wide))
    t = gl.arange(0, CHUNK, line)
    size: gl.constexpr = q.dtype.primitive_bitwidth // 8
    for back in range(chunks):
        i = chunks - 1 - back
        at = first + i * CHUNK
        stage = back & 1
        load_keys(k, strength, G, sK, sB, sG, bars, back, at, key_head * K, i * CHUNK, t, rows, K, GATED)

        mbarrier.wait(bars.index(FREED_QUERIES + stage), ((back >> 1) & 1) ^ 1)
        full_q = bars.index(LOADED_QUERIES + stage)
        mbarrier.expect(full_q, size * CHUNK * K)
        tma.async_copy_global_to_shared(q, [at, key_head * K], full_q, sQ.index(stage))

        mbarrier.wait(bars.index(FREED_OUTS), (back & 1) ^ 1)
        mbarrier.expect(bars.index(LOADED_OUTS), size * CHUNK * V)
        tma.async_copy_global_to_shared(do, [at, head * V], bars.index(LOADED_OUTS), sdO)
        load_X(X + i * (48 * CHUNK), sX, bars, r, c, rows - i * CHUNK)

        mbarrier.wait(bars.index(FREED_ERRORS), (back & 1) ^ 1)
        mbarrier.expect(bars.index(LOADED_ERRORS), size * CHUNK * V)
        tma.async_copy_global_to_shared(E, [at, head * V], bars.index(LOADED_ERRORS), sE)

        mbarrier.wait(bars.index(FREED_STATE), (back & 1) ^ 1)
        mbarrier.expect(bars.index(LOADED_STATE), size * K * V)
        if INITIAL:
            if i + part > 0:
                tma.async_copy_global_to_shared(S, [slot + i * (HV * V), 0], bars.index(LOADED_STATE), sS)
            else:
                tma.async_copy_global_to_shared(first_S, [given, 0], bars.index(LOADED_STATE), sS)
        else:
            tma.async_copy_global_to_shared(
                S, [gl.where(i + part > 0, slot + i * (HV * V), no_state), 0], bars.index(LOADED_STATE), sS
            )


@gluon.jit
def load_rest(X_low, strength, head, place, bars, span, HV: gl.constexpr, V: gl.constexpr):
    """One warp: what rounding left of X, of chunks with a beta above 1, to `place`, once that is free: at heads of 64 and 128 it is where P was."""
    chunks, rows, first = span
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, wide))
    t = gl.arange(0, CHUNK, line)
    careful = 0  # chunks so far
    for back in range(chunks):
        i = chunks - 1 - back
        left = rows - i * CHUNK
        if gl.max(gl.load(strength + i * CHUNK + t, mask=t < left, other=0.0), 0) > 1.0:
            mbarrier.wait(bars.index(USED_P), careful & 1)
            at = X_low + ((first + i * CHUNK).to(gl.int64) * HV + head) * V
            async_copy.async_copy_global_to_shared(
                place.index(0), at + (r * (HV * V))[:, None] + c[None, :], mask=(r < left)[:, None] & (c[None, :] < 64)
            )
            async_copy.mbarrier_arrive(bars.index(LOADED_REST), increment_count=False)
            careful += 1
