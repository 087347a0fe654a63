"""chunk_transform: the triangular solve of one chunk.

    L_ij = k_i . k_j e^(G_i - G_j)  for i > j,      X = (I + L diag(beta))^-1 L

X is strictly lower triangular, |X_ij| <= 1 for normalised keys and beta in [0, 2]. It is found without a loop over rows:

     8 x  8   the series L - N L + N^2 L - ... (N = L diag(beta)) ends after 7 terms; by doubling, 4 products
    16, 32, 64   X21 = (I - X2 diag(b2)) L21 (I - diag(b1) X1), 2 products a level

A series over more than 8 rows loses all digits for repeated keys at beta 2; over 8 it loses 7 bits of 22.
Products of fp32 values run as three products of fp16 halves (high * high + high * low + low * high): 22 bits, for half of what
tf32x3 costs, and safe because the values are bounded.
"""

import triton
import triton.language as tl

from deltanet.kernels.triton.tiles import CHUNK, find_part


@triton.jit
def product(a, b):
    """a @ b for bounded fp32 values, to about 22 bits."""
    a_high = a.to(tl.float16)
    b_high = b.to(tl.float16)
    a_low = (a - a_high.to(tl.float32)).to(tl.float16)
    b_low = (b - b_high.to(tl.float32)).to(tl.float16)
    return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def apart(x):
    """[n, r, c] -> [n / 2, r, c] twice: the even blocks and the odd."""
    x = tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1], x.shape[2]])
    return tl.split(tl.permute(x, [0, 2, 3, 1]))


@triton.jit
def beside(a, b):
    """[n, r, c] twice -> [n, r, 2 c]."""
    x = tl.permute(tl.join(a, b), [0, 1, 3, 2])
    return tl.reshape(x, [a.shape[0], a.shape[1], 2 * a.shape[2]])


@triton.jit
def below(a, b):
    """[n, r, c] twice -> [n, 2 r, c]."""
    x = tl.permute(tl.join(a, b), [0, 3, 1, 2])
    return tl.reshape(x, [a.shape[0], 2 * a.shape[1], a.shape[2]])


@triton.jit
def inner_products(
    k, G, rows, BLOCKS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCKS, SIZE, SIZE]: decayed products of keys STEP n + SHIFT + i and STEP n + j, for block n."""
    high = tl.arange(0, BLOCKS)[:, None, None] * STEP + SHIFT + tl.arange(0, SIZE)[None, :, None]
    low = tl.arange(0, BLOCKS)[:, None, None] * STEP + tl.arange(0, SIZE)[None, :, None]
    out = tl.zeros([BLOCKS, SIZE, SIZE], tl.float32)
    for i in range(0, K, WIDTH):
        d = i + tl.arange(0, WIDTH)[None, None, :]
        a = tl.load(k + high * (H * K) + d, mask=(high < rows) & (d < K), other=0.0)
        b = a if SHIFT == 0 else tl.load(k + low * (H * K) + d, mask=(low < rows) & (d < K), other=0.0)
        out = tl.dot(a, tl.permute(b, [0, 2, 1]), out, input_precision=PRECISION)
    if GATED:
        at = tl.arange(0, BLOCKS)[:, None, None] * STEP + tl.arange(0, SIZE)[None, None, :]
        G_high = tl.load(G + high, mask=high < rows, other=0.0)
        G_low = tl.load(G + at, mask=at < rows, other=0.0)
        out *= tl.math.exp2(-tl.abs(G_high - G_low))  # G falls, so below the diagonal this is the decay; above, its mirror
    return out


@triton.jit
def inner_products_64(k, G, rows, WIDTH: tl.constexpr, H: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr):
    """[32, 32]: decayed products of keys 32 + i and j. A batch of one would have every warp do the same work, so no batch."""
    low = tl.arange(0, 32)[:, None]
    out = tl.zeros([32, 32], tl.float32)
    for i in range(0, K, WIDTH):
        d = i + tl.arange(0, WIDTH)[None, :]
        a = tl.load(k + (32 + low) * (H * K) + d, mask=(32 + low < rows) & (d < K), other=0.0)
        b = tl.load(k + low * (H * K) + d, mask=(low < rows) & (d < K), other=0.0)
        out = tl.dot(a, tl.trans(b), out, input_precision=PRECISION)
    if GATED:
        at = tl.arange(0, 32)[None, :]
        out *= tl.math.exp2(-tl.abs(tl.load(G + 32 + low, mask=32 + low < rows, other=0.0) - tl.load(G + at, mask=at < rows, other=0.0)))
    return out


@triton.jit
def by_series(L16, br, bc):
    """X of 16 x 16 blocks: the series on their 8 x 8 blocks by doubling, then one level of merging."""
    r16, c16 = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    L8 = tl.where(r16 // 8 == c16 // 8, L16, 0.0)
    L_2 = product(L8 * bc, L8)  # N L, so N^2 = N L diag(beta)
    X8 = L8 - L_2
    L_4 = product(L_2 * bc, L_2)
    X8 += product(L_2 * bc, X8)
    X8 += product(L_4 * bc, X8)
    left = L16 - L8
    left -= product(left, br * X8)
    return X8 + left - product(X8 * bc, left)


@triton.jit
def four_apart(x):
    """[n, m, 4] -> its four columns."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def by_columns(K16, scratch, beta, rows, HV: tl.constexpr):
    """X of 16 x 16 blocks by forward substitution, a column a thread; the coefficients of a row come from memory, four at a time.

    K16 is K K^T with its upper half, which by symmetry hands each thread its own column as a row.
    """
    block, r16, c16 = tl.arange(0, 4)[:, None, None] * 16, tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    tl.store(scratch + (block + r16) * 16 + c16, K16, mask=block + r16 < rows)
    tl.debug_barrier()
    column = tl.arange(0, 16)[None, :, None]
    by4 = tl.arange(0, 4)[None, None, :]
    b2 = tl.arange(0, 4)[:, None] * 16
    col = tl.arange(0, 16)[None, :]
    own = ()
    for m in tl.static_range(4):
        own = own + four_apart(tl.load(scratch + (block + column) * 16 + m * 4 + by4, mask=block + column + by4 * 0 < rows, other=0.0))
    xs = ()
    ys = ()
    for i in tl.static_range(16):
        x = tl.where(i > col, own[i], 0.0)
        for m in tl.static_range((i + 3) // 4):
            at = scratch + (block + i) * 16 + m * 4 + by4 + column * 0
            c = four_apart(tl.load(at, mask=block + i + column * 0 + by4 * 0 < rows, other=0.0))
            for j in tl.static_range(4):
                if m * 4 + j < i:
                    x -= c[j] * ys[m * 4 + j]
        b = tl.load(beta + (b2 + i + col * 0) * HV, mask=b2 + i + col * 0 < rows, other=0.0).to(tl.float32)
        xs = xs + (x,)
        ys = ys + (x * b,)
    tl.debug_barrier()  # the scratch is where X will be written
    return tl.permute(gather16(xs), [0, 2, 1])


@triton.jit
def gather16(xs):
    """16 tensors [n, m] -> [n, m, 16]."""
    a = ()
    for i in tl.static_range(8):
        a = a + (tl.join(xs[i], xs[i + 8]),)
    b = ()
    for i in tl.static_range(4):
        b = b + (tl.join(a[i], a[i + 4]),)
    lower = tl.join(b[0], b[2])
    upper = tl.join(b[1], b[3])
    return tl.reshape(tl.join(lower, upper), [xs[0].shape[0], xs[0].shape[1], 16])


@triton.jit(do_not_specialize=["T", "N", "steps", "tokens"])
def transform(
    k,  # [tokens, H, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    strength,  # [HV, tokens] fp32 out: beta, side by side for the kernels that follow
    G,  # [HV, tokens] fp32 out, gated only: the sum of g inside the chunk, in powers of two
    X,  # [HV, tokens * 48] out: of each chunk rows 0..31 as 32 columns, then rows 32..63 as 64
    X_low,  # the same shape: what rounding X left over (REST only)
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
    LATE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0)
    head = tl.program_id(1)
    sequence, chunk, begin, end = find_part(place, cu_seqlens, N, steps, T, CHUNK, PACKED)
    first = begin + chunk * CHUNK
    if first >= end:
        return
    rows = tl.minimum(end - first, CHUNK).to(tl.int32)
    k += (first * H + head // (HV // H)) * K
    beta += first * HV + head
    along = head.to(tl.int64) * tokens + first
    t = tl.arange(0, CHUNK)
    tl.store(strength + along + t, tl.load(beta + t * HV, mask=t < rows, other=0.0).to(tl.float32), mask=t < rows)

    G += along
    if GATED:
        steps_g = tl.load(g + (first + t) * HV + head, mask=t < rows, other=0.0).to(tl.float32) * 1.4426950408889634
        tl.store(G + t, tl.cumsum(steps_g, 0), mask=t < rows)
        tl.debug_barrier()  # read back below, by other threads

    four, two = tl.arange(0, 4)[:, None, None] * 16, tl.arange(0, 2)[:, None, None] * 32
    r16, c16 = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    r32, c32 = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    L16 = inner_products(k, G, rows, 4, 16, 16, 0, WIDTH, H, K, GATED, PRECISION)
    if not LATE:
        L32 = inner_products(k, G, rows, 2, 16, 32, 16, WIDTH, H, K, GATED, PRECISION)
        L64 = inner_products_64(k, G, rows, WIDTH, H, K, GATED, PRECISION)
    br = tl.load(beta + (four + r16) * HV, mask=four + r16 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (four + c16) * HV, mask=four + c16 < rows, other=0.0).to(tl.float32)
    if COLUMNS:
        X16 = by_columns(L16, (X + along * 48).to(tl.pointer_type(tl.float32)), beta, rows, HV)
    else:
        X16 = by_series(tl.where(r16 > c16, L16, 0.0), br, bc)

    # 32 x 32
    if LATE:
        L32 = inner_products(k, G, rows, 2, 16, 32, 16, WIDTH, H, K, GATED, PRECISION)
    br = tl.load(beta + (two + r16) * HV, mask=two + r16 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (two + 16 + c16) * HV, mask=two + 16 + c16 < rows, other=0.0).to(tl.float32)
    X_even, X_odd = apart(X16)
    L32 -= product(L32, br * X_even)
    L32 -= product(X_odd * bc, L32)
    X32 = below(beside(X_even, tl.zeros([2, 16, 16], tl.float32)), beside(L32, X_odd))

    # 64 x 64
    if LATE:
        L64 = inner_products_64(k, G, rows, WIDTH, H, K, GATED, PRECISION)
    br = tl.load(beta + r32 * HV, mask=r32 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (32 + c32) * HV, mask=32 + c32 < rows, other=0.0).to(tl.float32)
    X_top, X_bottom = tl.split(tl.permute(X32, [1, 2, 0]))
    L64 -= product(L64, br * X_top)
    L64 -= product(X_bottom * bc, L64)

    X += along * 48
    X_low += along * 48
    store(X, X_low, r32 * 32 + c32, X_top, r32 < rows, REST)
    store(X, X_low, 1024 + r32 * 64 + c32, L64, r32 + 32 < rows, REST)
    store(X, X_low, 1056 + r32 * 64 + c32, X_bottom, r32 + 32 < rows, REST)


@triton.jit
def store(X, X_low, at, x, mask, REST: tl.constexpr):
    high = x.to(X.dtype.element_ty)
    tl.store(X + at, high, mask=mask)
    if REST:
        tl.store(X_low + at, (x - high.to(tl.float32)).to(X.dtype.element_ty), mask=mask)
