"""What the kernels of this family share: where a program's tokens lie, what it reads of a chunk without TMA, its tiles and barriers, and what
is done with a tile at a sequence's end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

CHUNK = gl.constexpr(64)
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # a tile for TMA and the tensor cores
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # a vector
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # [64, 64] of 16 bits, 16 bytes a thread at once
LINE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # [64]: every warp holds all of it


@gluon.jit
def find_part(place, cu_seqlens, N, steps, T, GRANULE, PACKED: gl.constexpr):
    """As in kernels/triton/tiles.py: the sequence, part, first token and end of the sequence at `place` of the grid."""
    if PACKED:
        low = place * 0
        high = low + N
        for _ in range(steps):
            middle = (low + high) // 2
            below = gl.load(cu_seqlens + middle) // GRANULE + middle <= place
            low = gl.where(below, middle, low)
            high = gl.where(below, high, middle)
        begin = gl.load(cu_seqlens + low).to(gl.int64)
        end = gl.load(cu_seqlens + low + 1).to(gl.int64)
        part = place - (begin // GRANULE).to(gl.int32) - low
        return low, part, begin, end
    else:
        parts = gl.cdiv(T, GRANULE)
        sequence = place // parts
        begin = sequence.to(gl.int64) * T
        return sequence, place % parts, begin, begin + T


@gluon.jit
def find_chunks(place, cu_seqlens, N, steps, T, segment, SPLIT: gl.constexpr, PACKED: gl.constexpr):
    """Of the segment (SPLIT) or sequence at `place`: sequence, part, chunks before it in its sequence, first token and end of the sequence, and
    how many chunks it has.
    """
    if SPLIT:
        sequence, part, begin, end = find_part(place, cu_seqlens, N, steps, T, segment, PACKED)
        before = part * (segment // CHUNK)
        chunks = gl.minimum(gl.cdiv(end - begin, CHUNK).to(gl.int32) - before, segment // CHUNK)
        return sequence, part, before, begin, end, chunks
    else:
        if PACKED:
            begin = gl.load(cu_seqlens + place).to(gl.int64)
            end = gl.load(cu_seqlens + place + 1).to(gl.int64)
        else:
            begin = place.to(gl.int64) * T
            end = begin + T
        return place, place * 0, place * 0, begin, end, gl.cdiv(end - begin, CHUNK).to(gl.int32)


@gluon.jit
def needed(chunks, part, begin, end, before, identity, starts_used, ends_used):
    """Those chunks, or 0 where nobody asks what the segment does: where a sequence's last one leads; and what it, or the first, does to a state
    that is not there. identity < 0: the segment starts from zero, else from the identity.
    """
    is_last = gl.cdiv(end - begin, CHUNK).to(gl.int32) - before <= chunks
    if identity < 0:
        chunks = gl.where(is_last, 0, chunks)
    else:
        chunks = gl.where((is_last & (ends_used == 0)) | ((part == 0) & (starts_used == 0)), 0, chunks)
    return chunks


@gluon.jit
def in_X(token, rows):
    """Where in memory the chunk of X at `token` lies, and what of it is there: rows 0 to 31 as 32 columns (the other 32 are zero), then rows 32 to 63
    as 64. Counted in 16 bytes, 32 bits are enough for 2^31 / 6 tokens; 64 bits from the token on cost registers, and spills (docs/log.md).
    """
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
    c = gl.arange(0, CHUNK, gl.SliceLayout(0, WIDE))
    at = token * 6 + gl.where(r < 32, r * 4, r * 8 - 128)
    return at.to(gl.int64)[:, None] * 8 + c[None, :], ((r[:, None] >= 32) | (c[None, :] < 32)) & (r < rows)[:, None]


@gluon.jit
def ask(X, strength, G, token, length, GATED: gl.constexpr):
    """Of the chunk at `token` X, beta, and if GATED G and its last: what comes without TMA, and is asked for a chunk ahead."""
    t = gl.arange(0, CHUNK, LINE)
    rows = length - token
    at, inside = in_X(token, rows)
    x = gl.load(X + at, mask=inside, other=0.0)
    b = gl.load(strength + token + t, mask=t < rows, other=0.0)
    last = b
    decay = b
    if GATED:
        last = gl.load(G + gl.minimum(length, token + CHUNK) - 1, mask=length > 0, other=0.0)  # an empty sequence has no last token
        decay = gl.load(G + token + t, mask=t < rows, other=0.0)
    return x, b, decay, last


@gluon.jit
def put_vectors(vectors, i, b, decay, last, rows, GATED: gl.constexpr, BETA: gl.constexpr = True):
    """What `ask` brought, to place i of the vectors: beta, e^G as `into`, e^(G_last - G) with BETA beta times as `onward`, e^(G_last) as `last`."""
    b_s, G_s, into_s, onward_s, last_s = vectors
    b_s.index(i).store(b)
    if GATED:
        t = gl.arange(0, CHUNK, LINE)
        decay = gl.where(t < rows, decay, last)
        G_s.store(decay)  # in one place: who puts it there alone reads it, and before the next
        into_s.index(i).store(power_of_2(decay))
        if BETA:
            onward_s.index(i).store(b * power_of_2(last - decay))
        else:
            onward_s.index(i).store(power_of_2(last - decay))
        last_s.index(i).store(power_of_2(gl.zeros_like(decay) + last))


@gluon.jit
def allocate_vectors(PLACES: gl.constexpr, GATED: gl.constexpr):
    """Shared memory for them; all but G have PLACES places."""
    b_s = gl.allocate_shared_memory(gl.float32, [PLACES, CHUNK], PLAIN)
    G_s = b_s.index(0)
    into_s = b_s
    onward_s = b_s
    last_s = b_s
    if GATED:
        G_s = gl.allocate_shared_memory(gl.float32, [CHUNK], PLAIN)
        into_s = gl.allocate_shared_memory(gl.float32, [PLACES, CHUNK], PLAIN)
        onward_s = gl.allocate_shared_memory(gl.float32, [PLACES, CHUNK], PLAIN)
        last_s = gl.allocate_shared_memory(gl.float32, [PLACES, CHUNK], PLAIN)
    return b_s, G_s, into_s, onward_s, last_s


@gluon.jit
def allocate_barriers(PLACES: gl.constexpr, COUNT: gl.constexpr):
    """One for each of PLACES, that COUNT arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def store_tile(desc, tile, pointer, row, col, rows, stride):
    """Write a [64, 64] tile of shared memory to rows of a matrix: by TMA, or in a sequence's last chunk the rows it has."""
    if rows >= CHUNK:
        tma.async_copy_shared_to_global(desc, [row, col], tile)
    else:
        r = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
        c = gl.arange(0, CHUNK, gl.SliceLayout(0, WIDE))
        at = (row + r).to(gl.int64)[:, None] * stride + (col + c)[None, :]
        gl.store(pointer + at, tile.load(WIDE), mask=(r < rows)[:, None])


@gluon.jit
def clear(tile, rows, WIDTH: gl.constexpr):
    """Zero the rows of a [64, WIDTH] tile from `rows` on: they came by TMA and belong to the next sequence."""
    r = gl.arange(0, CHUNK, gl.SliceLayout(1, WIDE))
    for i in gl.static_range(0, WIDTH, 64):
        part = tile.slice(i, 64, 1)
        x = part.load(WIDE)
        part.store(gl.where(r[:, None] < rows, x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def any_of_warp(flag):
    """flag, in a form that the assembler can see to be the same for the whole warp; wgmma in any other branch is serialised."""
    vote: gl.constexpr = "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.s32 $0, 1, 0, p; }"
    return gl.inline_asm_elementwise(vote, "=r,r", [flag.to(gl.int32)], dtype=gl.int32, is_pure=True, pack=1) != 0


@gluon.jit
def power_of_2(x):
    """2^x in one instruction; what is below the least normal number is 0. gl.exp2 keeps it, at three more instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def masked(keep, x, dtype: gl.constexpr):
    """x where `keep`, else 0, rounded. Said to LLVM as it is, it selects halves of packed pairs, at three times the instructions."""
    x = gl.where(keep, x, 0.0)
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )


FORGOTTEN = gl.constexpr(-48.0)  # a power of two: what decays to less is left out where only states at the end are asked for; fp32 keeps 24 bits


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def remembered(G, length, chunks, BACKWARDS: gl.constexpr):
    """How many of the last chunks still count for the state after them (backwards: of the first, for the gradient before them), and whether
    a state from beyond all of them does. G holds the sums of log2 decay inside chunks. For the four warps before a program's roles begin.
    """
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    j = gl.arange(0, 128, line)
    count = chunks
    total = 0.0
    for start in range(0, chunks, 128):
        c = start + j
        inside = c < chunks
        if not BACKWARDS:
            c = chunks - 1 - c
        decay = gl.load(G + gl.minimum(c * CHUNK + CHUNK - 1, length - 1), mask=inside, other=0.0)
        sums = gl.associative_scan(decay, 0, add) + total
        count = gl.minimum(count, gl.min(gl.where(sums < FORGOTTEN, start + j + 1, chunks), 0))
        total += gl.sum(decay, 0)
    return count, total >= FORGOTTEN


@gluon.jit
def without_forgotten(G, begin, end, chunks, identity):
    """Of a segment, whose end alone is asked for: first token, chunks and identity (below 0: it starts from zero) without what a gate forgets."""
    kept, passed_on = remembered(G + begin, (end - begin).to(gl.int32), chunks, False)
    if identity < 0:
        begin += (chunks - kept) * CHUNK
        chunks = kept
    elif not passed_on:  # nothing of a state is left: zeros
        identity += 1 << 16
        chunks = chunks * 0
    return begin, chunks, identity
