"""chunk_transform for Hopper: the triangular solve of one chunk by one warpgroup, four or five of them on a multiprocessor.

    L_ij = k_i . k_j e^(G_i - G_j)  for i > j,      X = (I + L diag(beta))^-1 L

    4 x 4            L - N L + N^2 L with N = L diag(beta): the series ends here
    8, 16            X21 = (I - X2 diag(b2)) L21 (I - diag(b1) X1): one warp a 16 x 16 block of the diagonal, four blocks at once
    64               Y = (I - Xd diag(beta)) L below the diagonal blocks Xd, M = Y diag(beta);
                     X = Xd + Y - M X, by forward substitution: each finished block row of X, once, into all the rows below it

Nothing cancels, whatever the keys. Products run on tensor cores in fp16, 11 bits, which with beta <= 1 outlast the rounding of X; a chunk
with a beta above 1 runs each as three of fp16 halves, 22 bits.

The small blocks keep every matrix and its transpose, both as accumulators: an accumulator is the fragment of a first operand as it is, and
its transpose that of a second one, so between two products no value changes lanes. K K^T is symmetric, which gives the first pair. What is
above the diagonal blocks is never computed: each block column of Y and X is an accumulator of its own, `[64, 16]`, a block of it a warp.

(Inside the forward's auxiliary warpgroup, which has the time, the same code took longer than the forward itself: docs/log.md.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from deltanet.kernels.hopper.tiles import (
    CHUNK,
    LINE,
    PLAIN,
    SWIZZLED,
    WIDE,
    add,
    any_of_warp,
    clear,
    find_part,
    in_X,
    power_of_2,
)

COLUMN = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))  # [64, n]: a warp 16 rows
ALONG = gl.constexpr(gl.SliceLayout(0, COLUMN))
DIAGONAL = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))  # [block, row, column]: a warp a block
ROWS_OF = gl.constexpr(gl.SliceLayout(2, DIAGONAL))
COLUMNS_OF = gl.constexpr(gl.SliceLayout(1, DIAGONAL))
NARROW = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))  # [64, 16] of 16 bits


@gluon.jit
def halves(x, PRECISE: gl.constexpr):
    """x in fp16, and what that leaves over."""
    high = x.to(gl.float16)
    if PRECISE:
        return high, (x - high.to(gl.float32)).to(gl.float16)
    else:
        return high, high


@gluon.jit
def multiply(a, b_t, sum):
    """sum + a @ b for [4, 16, 16] in fp16, given b transposed."""
    first = gl.convert_layout(a, gl.DotOperandLayout(0, DIAGONAL, 2))
    second = gl.convert_layout(gl.permute(b_t, (0, 2, 1)), gl.DotOperandLayout(1, DIAGONAL, 2))
    return mma_v2(first, second, sum)


@gluon.jit
def product(a, b_t, sum, PRECISE: gl.constexpr):
    """sum + a @ b for bounded fp32 values `[4, 16, 16]`, given b transposed, to 11 bits or to about 22."""
    a, a_low = halves(a, PRECISE)
    b_t, b_low = halves(b_t, PRECISE)
    if PRECISE:
        sum = multiply(a, b_low, multiply(a_low, b_t, sum))
    return multiply(a, b_t, sum)


@gluon.jit
def merge(X, X_t, M, M_t, minus_b, PRECISE: gl.constexpr):
    """X of blocks twice as large from the X of the small ones and the part M of L between them, each with its transpose."""
    Xb = X * minus_b
    bX_t = X_t * minus_b
    # M (I - diag(b) X), then (I - X diag(b)) of that
    N = product(M, bX_t, M, PRECISE)
    N_t = product(bX_t, M, M_t, PRECISE)
    return product(Xb, N_t, X + N, PRECISE), product(N_t, Xb, X_t + N_t, PRECISE)


@gluon.jit
def solve_16(D, minus_b, PRECISE: gl.constexpr):
    """X of the four blocks of the diagonal, from the symmetric `[4, 16, 16]` blocks D of K K^T."""
    r = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, ROWS_OF)), 0), 2)
    c = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, COLUMNS_OF)), 0), 1)
    in_4 = (r // 4) == (c // 4)
    in_8 = (r // 8) == (c // 8)
    L = gl.where(r > c, D, 0.0)
    L_t = gl.where(r < c, D, 0.0)
    L4 = gl.where(in_4, L, 0.0)
    L4_t = gl.where(in_4, L_t, 0.0)
    N = L4 * minus_b
    zero = gl.zeros([4, 16, 16], gl.float32, DIAGONAL)
    NL = product(N, L4_t, zero, PRECISE)
    NL_t = product(L4_t, N, zero, PRECISE)
    X = product(N, NL_t, L4 + NL, PRECISE)
    X_t = product(NL_t, N, L4_t + NL_t, PRECISE)
    to_8 = in_8 & (in_4 == 0)
    X, X_t = merge(X, X_t, gl.where(to_8, L, 0.0), gl.where(to_8, L_t, 0.0), minus_b, PRECISE)
    X, X_t = merge(X, X_t, gl.where(in_8, 0.0, L), gl.where(in_8, 0.0, L_t), minus_b, PRECISE)
    return X


@gluon.jit
def four_columns(x):
    """The block columns `[64, 16]` of `[64, 64]`: registers by another name."""
    even, odd = gl.split(gl.permute(gl.reshape(x, [64, 2, 2, 16]), (0, 1, 3, 2)))
    x0, x2 = gl.split(gl.permute(even, (0, 2, 1)))
    x1, x3 = gl.split(gl.permute(odd, (0, 2, 1)))
    return (
        gl.convert_layout(x0, COLUMN), gl.convert_layout(x1, COLUMN), gl.convert_layout(x2, COLUMN), gl.convert_layout(x3, COLUMN)
    )  # fmt: skip


@gluon.jit
def one_of_columns(x0, x1, x2, x3, layout: gl.constexpr):
    """`[64, 64]` again."""
    even = gl.permute(gl.join(x0, x2), (0, 2, 1))
    odd = gl.permute(gl.join(x1, x3), (0, 2, 1))
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(even, odd), (0, 1, 3, 2)), [64, 64]), layout)


@gluon.jit
def turned(x):
    """Of each 8 x 8 tile of a 16-bit `[64, 16]` its transpose, in its place."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
    )


@gluon.jit
def rows_as_second(x):
    """A `[64, 16]` accumulator in fp16 as the second operand of a product by blocks, `[block, row, column]`."""
    tiles = gl.reshape(turned(x), [4, 2, 8, 2, 8])  # block, half of the rows, column in a tile, half of the columns, row in a tile
    return gl.convert_layout(gl.reshape(gl.permute(tiles, (0, 1, 4, 3, 2)), [4, 16, 16]), gl.DotOperandLayout(1, DIAGONAL, 2))


@gluon.jit
def second(S, PRECISE: gl.constexpr):
    """A block column `[64, 16]` as the second operand of a product by blocks, and what fp16 leaves over of it."""
    high, low = halves(S, PRECISE)
    if PRECISE:
        return rows_as_second(high), rows_as_second(low)
    else:
        high = rows_as_second(high)
        return high, high


@gluon.jit
def column(A, A_low, S, S_low, Xd, block, n: gl.constexpr, PRECISE: gl.constexpr):
    """Block column n of Xd + Y: A, (I - Xd diag(beta)) by blocks, times S below the diagonal block, which is that of Xd."""
    Y = gl.zeros([4, 16, 16], gl.float32, DIAGONAL)
    if PRECISE:
        Y = mma_v2(A, S_low, Y)
        Y = mma_v2(A_low, S, Y)
    Y = mma_v2(A, S, Y)
    Y = gl.convert_layout(gl.reshape(Y, [64, 16]), COLUMN)
    return gl.where(block > n, Y, gl.where(block == n, Xd, 0.0))


@gluon.jit
def first(M, PRECISE: gl.constexpr):
    high, low = halves(M, PRECISE)
    layout: gl.constexpr = gl.DotOperandLayout(0, COLUMN, 2)
    return gl.convert_layout(high, layout), gl.convert_layout(low, layout)


@gluon.jit
def put(tile, tile_low, x, PRECISE: gl.constexpr):
    high, low = halves(x, PRECISE)
    tile.store(high)
    if PRECISE:
        tile_low.store(low)


@gluon.jit
def update(Z, M, M_low, tile, tile_low, n: gl.constexpr, PRECISE: gl.constexpr):
    """Z + M @ block row n of the tile."""
    layout: gl.constexpr = gl.DotOperandLayout(1, COLUMN, 2)
    row = tile.slice(16 * n, 16, 0).load(layout)
    if PRECISE:
        Z = mma_v2(M, tile_low.slice(16 * n, 16, 0).load(layout), Z)
        Z = mma_v2(M_low, row, Z)
    return mma_v2(M, row, Z)


@gluon.jit
def solve_64(S, b_s, G_s, layout: gl.constexpr, GATED: gl.constexpr, PRECISE: gl.constexpr):
    """X `[64, 64]` in fp32 from S = K K^T."""
    # to work in, where k was: of block rows of X what fp16 keeps and, if precise, what it leaves
    tiles = (
        gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW), gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW),
        gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW), gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW),
        gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW), gl.allocate_shared_memory(gl.float16, [CHUNK, 16], NARROW),
    )  # fmt: skip  (not one array: places in one get barriers between them)
    lows = gl.allocate_shared_memory(gl.float16, [6, CHUNK, 16], NARROW)
    if GATED:
        G_row = G_s.load(gl.SliceLayout(1, layout))
        G_col = G_s.load(gl.SliceLayout(0, layout))
        S = S * power_of_2(-gl.abs(G_row[:, None] - G_col[None, :]))  # of whichever comes first: finite, and still symmetric
    S0, S1, S2, S3 = four_columns(S)
    block = (gl.arange(0, 64, gl.SliceLayout(1, COLUMN)) // 16)[:, None]
    D = gl.where(block == 0, S0, gl.where(block == 1, S1, gl.where(block == 2, S2, S3)))
    D = gl.convert_layout(gl.reshape(D, [4, 16, 16]), DIAGONAL)
    S0, S0_low = second(S0, PRECISE)
    S1, S1_low = second(S1, PRECISE)
    S2, S2_low = second(S2, PRECISE)
    b = gl.expand_dims(b_s.reshape([4, 16]).load(COLUMNS_OF), 1)
    minus_b = b * -1.0
    X = solve_16(D, minus_b, PRECISE)
    r = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, ROWS_OF)), 0), 2)
    c = gl.expand_dims(gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, COLUMNS_OF)), 0), 1)
    A, A_low = halves(X * minus_b + gl.where(r == c, 1.0, 0.0), PRECISE)
    A = gl.convert_layout(A, gl.DotOperandLayout(0, DIAGONAL, 2))
    A_low = gl.convert_layout(A_low, gl.DotOperandLayout(0, DIAGONAL, 2))
    Xd = gl.convert_layout(gl.reshape(X, [64, 16]), COLUMN)
    Z0 = column(A, A_low, S0, S0_low, Xd, block, 0, PRECISE)
    Z1 = column(A, A_low, S1, S1_low, Xd, block, 1, PRECISE)
    Z2 = column(A, A_low, S2, S2_low, Xd, block, 2, PRECISE)
    Z3 = gl.where(block == 3, Xd, 0.0)

    M0, M0_low = first(gl.where(block > 0, Z0 * (b_s.slice(0, 16, 0).load(ALONG) * -1.0)[None, :], 0.0), PRECISE)
    M1, M1_low = first(gl.where(block > 1, Z1 * (b_s.slice(16, 16, 0).load(ALONG) * -1.0)[None, :], 0.0), PRECISE)
    M2, M2_low = first(gl.where(block > 2, Z2 * (b_s.slice(32, 16, 0).load(ALONG) * -1.0)[None, :], 0.0), PRECISE)
    put(tiles[0], lows.index(0), Z0, PRECISE)
    Z0 = update(Z0, M0, M0_low, tiles[0], lows.index(0), 0, PRECISE)
    put(tiles[1], lows.index(1), Z0, PRECISE)
    put(tiles[2], lows.index(2), Z1, PRECISE)
    Z0 = update(Z0, M1, M1_low, tiles[1], lows.index(1), 1, PRECISE)
    Z1 = update(Z1, M1, M1_low, tiles[2], lows.index(2), 1, PRECISE)
    put(tiles[3], lows.index(3), Z0, PRECISE)
    put(tiles[4], lows.index(4), Z1, PRECISE)
    put(tiles[5], lows.index(5), Z2, PRECISE)
    Z0 = update(Z0, M2, M2_low, tiles[3], lows.index(3), 2, PRECISE)
    Z1 = update(Z1, M2, M2_low, tiles[4], lows.index(4), 2, PRECISE)
    Z2 = update(Z2, M2, M2_low, tiles[5], lows.index(5), 2, PRECISE)
    return one_of_columns(Z0, Z1, Z2, Z3, layout)


@gluon.jit(do_not_specialize=["T", "N", "steps", "tokens"])
def transform(
    k,  # descriptor of [tokens, H * K], blocks [64, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    strength,  # [HV, tokens] fp32 out: beta, side by side
    G,  # [HV, tokens] fp32 out, gated only: the sum of g inside the chunk, in powers of two
    X,  # [HV, tokens * 48] out: of each chunk rows 0..31 as 32 columns, then rows 32..63 as 64
    X_low,  # the same shape, out: what rounding X left over, of chunks with a beta above 1
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
):
    gdc_launch_dependents()
    # neighbouring heads run together and read whole rows; the first chunks run last, so that the forward finds them in L2
    head = gl.program_id(0) % HV
    place = gl.num_programs(0) // HV - 1 - gl.program_id(0) // HV
    if PACKED:
        _, chunk, begin, end = find_part(place, cu_seqlens, N, steps, T, CHUNK, PACKED)
    else:
        chunk = place // N
        begin = (place % N).to(gl.int64) * T
        end = begin + T
    first = begin + chunk * CHUNK
    if first < end:
        rows = gl.minimum(end - first, CHUNK).to(gl.int32)
        dtype: gl.constexpr = k.dtype
        k_s = gl.allocate_shared_memory(dtype, [CHUNK, K], SWIZZLED)
        b_s = gl.allocate_shared_memory(gl.float32, [CHUNK], PLAIN)
        G_s = b_s
        if GATED:
            G_s = gl.allocate_shared_memory(gl.float32, [CHUNK], PLAIN)
        loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(loaded, count=1)
        mbarrier.expect(loaded, k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [first.to(gl.int32), (head // (HV // H)) * K], loaded, k_s)

        whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        along = head.to(gl.int64) * tokens + first
        t = gl.arange(0, CHUNK, LINE)
        at = (first + t) * HV + head
        # asked for now and looked at when the product is under way: before that the wait for them would hold up the load of k
        b = gl.load(beta + at, mask=t < rows, other=0.0)
        if GATED:
            decay = gl.load(g + at, mask=t < rows, other=0.0)

        mbarrier.wait(loaded, 0)
        if rows < CHUNK:
            clear(k_s, rows, K)
        S = warpgroup_mma(k_s, k_s.permute((1, 0)), gl.zeros([CHUNK, CHUNK], gl.float32, whole), use_acc=False, is_async=True)
        b = b.to(gl.float32)
        b_s.store(b)
        gl.store(strength + along + t, b, mask=t < rows)
        if GATED:
            # rows past the end add nothing
            Gc = gl.associative_scan(decay.to(gl.float32) * 1.4426950408889634, 0, add)
            G_s.store(Gc)
            gl.store(G + along + t, Gc, mask=t < rows)
        above_one = any_of_warp(gl.max(b, 0) > 1.0)
        S = warpgroup_mma_wait(0, deps=[S])
        if above_one:
            x = solve_64(S, b_s, G_s, whole, GATED, True)
        else:
            x = solve_64(S, b_s, G_s, whole, GATED, False)

        at, keep = in_X(rows * 0, rows)
        high = x.to(dtype)
        X_s = gl.allocate_shared_memory(dtype, [CHUNK, CHUNK], SWIZZLED)
        X_s.store(high)
        gl.store(X + along * 48 + at, X_s.load(WIDE), mask=keep)
        if above_one:
            X_s.store((x - high.to(gl.float32)).to(dtype))
            gl.store(X_low + along * 48 + at, X_s.load(WIDE), mask=keep)
