"""chunk_transform: the triangular solve of one chunk.

    L_ij = k_i . k_j e^(G_i - G_j)  for i > j,      X = (I + L diag(beta))^-1 L

X is strictly lower triangular, |X_ij| <= 1 for normalised keys and beta in [0, 2]. It is found without a loop over rows:

     4 x 4            L - N L + N^2 L with N = L diag(beta): the series ends here, as N^3 L = 0
     8, 16, 32, 64    X21 = (I - X2 diag(b2)) L21 (I - diag(b1) X1), level by level, in blocks of 16

Longer series lose digits for repeated keys (all of them over 64 rows), 4 rows lose none. The products run on tensor cores in fp16: with
beta <= 1 everywhere in the chunk errors die out and 11 bits outlast the rounding of X; a chunk with a beta above 1, where they may
grow, runs every product as three of fp16 halves (high * high + high * low + low * high), 22 bits. One warp owns a chunk, so nothing
waits for another warp.
"""

import triton
import triton.language as tl

from deltanet.kernels.triton.tiles import CHUNK, find_part


@triton.jit
def product(a, b, sum, PRECISE: tl.constexpr):
    """sum + a @ b for bounded fp32 values, to 11 bits or to about 22."""
    a_high = a.to(tl.float16)
    b_high = b.to(tl.float16)
    if PRECISE:
        a_low = (a - a_high.to(tl.float32)).to(tl.float16)
        b_low = (b - b_high.to(tl.float32)).to(tl.float16)
        sum = tl.dot(a_high, b_low, tl.dot(a_low, b_high, sum))
    return tl.dot(a_high, b_high, sum)


@triton.jit
def solve_16(L, b_row, b_col, PRECISE: tl.constexpr):
    """X of one 16 x 16 block: the series on its 4 x 4 blocks, then two merges."""
    r, c = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    L = tl.where(r > c, L, 0.0)
    L4 = tl.where(r // 4 == c // 4, L, 0.0)
    L8 = tl.where(r // 8 == c // 8, L, 0.0)
    N = -L4 * b_col
    NL = product(N, L4, tl.zeros([16, 16], tl.float32), PRECISE)
    X = product(N, NL, L4 + NL, PRECISE)
    left = L8 - L4
    left = product(left, -b_row * X, left, PRECISE)
    X = product(-X * b_col, left, X + left, PRECISE)
    left = L - L8
    left = product(left, -b_row * X, left, PRECISE)
    return product(-X * b_col, left, X + left, PRECISE)


@triton.jit
def decay_block(L, G, i: tl.constexpr, j: tl.constexpr, rows):
    """Block (i, j) of the keys' products times e^(G_row - G_column); above the diagonal its mirror, which stays finite."""
    r, c = i * 16 + tl.arange(0, 16)[:, None], j * 16 + tl.arange(0, 16)[None, :]
    G_row = tl.load(G + r, mask=r < rows, other=0.0)
    G_col = tl.load(G + c, mask=c < rows, other=0.0)
    return L * tl.math.exp2(-tl.abs(G_row - G_col))


@triton.jit
def beside(a, b):
    """Two blocks side by side."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def store(X, X_low, i: tl.constexpr, x, rows, REST: tl.constexpr, LOW: tl.constexpr, TILE: tl.constexpr, HV: tl.constexpr):
    """Write block row i where the packed layout has it: rows 0..31 are 32 wide, rows 32..63 are 64 wide.

    With LOW, X has been written, and only what its rounding left is, as rows of LOW columns, a copy every TILE.
    """
    WIDTH: tl.constexpr = x.shape[1]
    r, c = tl.arange(0, 16)[:, None], tl.arange(0, WIDTH)[None, :]
    if i < 2:
        at = (i * 16 + r) * 32 + c
    else:
        at = 1024 + (i * 16 - 32 + r) * 64 + c
    mask = i * 16 + r + c * 0 < rows
    if LOW:
        low = x - tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        for copy in tl.static_range(LOW // TILE):
            tl.store(X_low + (i * 16 + r) * (HV * LOW) + copy * TILE + c, low.to(X.dtype.element_ty), mask=mask)
    else:
        high = x.to(X.dtype.element_ty)
        tl.store(X + at, high, mask=mask)
        if REST:
            tl.store(X_low + at, (x - high.to(tl.float32)).to(X.dtype.element_ty), mask=mask)


@triton.jit
def solve_64(
    L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, r0, r1, r2, r3, c0, c1, c2, c3, rows, PRECISE: tl.constexpr,
):  # fmt: skip
    """Blocks of X of a chunk from those of L and the betas of each block of rows, as columns (r) and as rows (c)."""
    zero = tl.zeros([16, 16], tl.float32)
    X00 = solve_16(L00, r0, c0, PRECISE)
    X11 = solve_16(L11, r1, c1, PRECISE)
    X22 = solve_16(L22, r2, c2, PRECISE)
    X33 = solve_16(L33, r3, c3, PRECISE)

    # 32 x 32
    L10 = product(L10, -r0 * X00, L10, PRECISE)
    X10 = product(-X11 * c1, L10, L10, PRECISE)
    L32 = product(L32, -r2 * X22, L32, PRECISE)
    X32 = product(-X33 * c3, L32, L32, PRECISE)

    X20, X21, X30, X31 = zero, zero, zero, zero
    if rows > 32:
        # 64 x 64: first all of (...) (I - diag(b) X) on the right, then (I - X diag(b)) on the left
        L20 = product(L21, -r1 * X10, product(L20, -r0 * X00, L20, PRECISE), PRECISE)
        L30 = product(L31, -r1 * X10, product(L30, -r0 * X00, L30, PRECISE), PRECISE)
        L21 = product(L21, -r1 * X11, L21, PRECISE)
        L31 = product(L31, -r1 * X11, L31, PRECISE)
        X20 = product(-X22 * c2, L20, L20, PRECISE)
        X21 = product(-X22 * c2, L21, L21, PRECISE)
        X30 = product(-X33 * c3, L30, product(-X32 * c2, L20, L30, PRECISE), PRECISE)
        X31 = product(-X33 * c3, L31, product(-X32 * c2, L21, L31, PRECISE), PRECISE)
    return X00, X10, X11, X20, X21, X22, X30, X31, X32, X33


@triton.jit(do_not_specialize=["T", "N", "steps", "tokens"])
def transform(
    k,  # [tokens, H, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    strength,  # [HV, tokens] fp32 out: beta, side by side for the kernels that follow
    G,  # [HV, tokens] fp32 out, gated only: the sum of g inside the chunk, in powers of two
    X,  # [HV, tokens * 48] out: of each chunk rows 0..31 as 32 columns, then rows 32..63 as 64
    X_low,  # the same shape, out: what rounding X left over, REST only; or [tokens, HV, LOW]
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
    LOW: tl.constexpr,  # columns of X_low when it alone is to be written, for chunks with a beta above 1; else 0
    TILE: tl.constexpr,  # columns between two copies of it
    ALWAYS_PRECISE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0)
    head = tl.program_id(1)
    _, chunk, begin, end = find_part(place, cu_seqlens, N, steps, T, CHUNK, PACKED)
    first = begin + chunk * CHUNK
    if first >= end:
        return
    rows = tl.minimum(end - first, CHUNK).to(tl.int32)
    k += (first * H + head // (HV // H)) * K
    beta += first * HV + head
    along = head.to(tl.int64) * tokens + first
    t = tl.arange(0, CHUNK)
    if LOW:
        if tl.max(tl.load(strength + along + t, mask=t < rows, other=0.0), 0) <= 1.0:
            return
    else:
        tl.store(strength + along + t, tl.load(beta + t * HV, mask=t < rows, other=0.0).to(tl.float32), mask=t < rows)

    G += along
    if GATED and not LOW:
        steps_g = tl.load(g + (first + t) * HV + head, mask=t < rows, other=0.0).to(tl.float32) * 1.4426950408889634
        tl.store(G + t, tl.cumsum(steps_g, 0), mask=t < rows)
        tl.debug_barrier()  # read back below, by other threads

    r = tl.arange(0, 16)
    zero = tl.zeros([16, 16], tl.float32)
    L00, L10, L11, L20, L21 = zero, zero, zero, zero, zero
    L22, L30, L31, L32, L33 = zero, zero, zero, zero, zero
    for i in range(0, K, WIDTH):
        d = i + tl.arange(0, WIDTH)[None, :]
        at = k + r[:, None] * (H * K) + d
        k0 = tl.load(at, mask=(r < rows)[:, None] & (d < K), other=0.0)
        k1 = tl.load(at + 16 * H * K, mask=(r + 16 < rows)[:, None] & (d < K), other=0.0)
        k2 = tl.load(at + 32 * H * K, mask=(r + 32 < rows)[:, None] & (d < K), other=0.0)
        k3 = tl.load(at + 48 * H * K, mask=(r + 48 < rows)[:, None] & (d < K), other=0.0)
        L00 = tl.dot(k0, tl.trans(k0), L00, input_precision=PRECISION)
        L10 = tl.dot(k1, tl.trans(k0), L10, input_precision=PRECISION)
        L11 = tl.dot(k1, tl.trans(k1), L11, input_precision=PRECISION)
        L20 = tl.dot(k2, tl.trans(k0), L20, input_precision=PRECISION)
        L21 = tl.dot(k2, tl.trans(k1), L21, input_precision=PRECISION)
        L22 = tl.dot(k2, tl.trans(k2), L22, input_precision=PRECISION)
        L30 = tl.dot(k3, tl.trans(k0), L30, input_precision=PRECISION)
        L31 = tl.dot(k3, tl.trans(k1), L31, input_precision=PRECISION)
        L32 = tl.dot(k3, tl.trans(k2), L32, input_precision=PRECISION)
        L33 = tl.dot(k3, tl.trans(k3), L33, input_precision=PRECISION)
    if GATED:
        L00 = decay_block(L00, G, 0, 0, rows)
        L10 = decay_block(L10, G, 1, 0, rows)
        L11 = decay_block(L11, G, 1, 1, rows)
        L20 = decay_block(L20, G, 2, 0, rows)
        L21 = decay_block(L21, G, 2, 1, rows)
        L22 = decay_block(L22, G, 2, 2, rows)
        L30 = decay_block(L30, G, 3, 0, rows)
        L31 = decay_block(L31, G, 3, 1, rows)
        L32 = decay_block(L32, G, 3, 2, rows)
        L33 = decay_block(L33, G, 3, 3, rows)

    r0 = tl.load(beta + r * HV, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    r1 = tl.load(beta + (r + 16) * HV, mask=r + 16 < rows, other=0.0).to(tl.float32)[:, None]
    r2 = tl.load(beta + (r + 32) * HV, mask=r + 32 < rows, other=0.0).to(tl.float32)[:, None]
    r3 = tl.load(beta + (r + 48) * HV, mask=r + 48 < rows, other=0.0).to(tl.float32)[:, None]
    c0 = tl.load(beta + r * HV, mask=r < rows, other=0.0).to(tl.float32)[None, :]
    c1 = tl.load(beta + (r + 16) * HV, mask=r + 16 < rows, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(beta + (r + 32) * HV, mask=r + 32 < rows, other=0.0).to(tl.float32)[None, :]
    c3 = tl.load(beta + (r + 48) * HV, mask=r + 48 < rows, other=0.0).to(tl.float32)[None, :]
    X += along * 48
    X_low += (first * HV + head) * LOW if LOW else along * 48
    largest = tl.max(tl.maximum(tl.maximum(c0, c1), tl.maximum(c2, c3)))
    if ALWAYS_PRECISE:  # noqa: SIM114 (the next branch is taken at run time)
        X00, X10, X11, X20, X21, X22, X30, X31, X32, X33 = solve_64(
            L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, r0, r1, r2, r3, c0, c1, c2, c3, rows, True
        )
    elif largest > 1.0:
        X00, X10, X11, X20, X21, X22, X30, X31, X32, X33 = solve_64(
            L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, r0, r1, r2, r3, c0, c1, c2, c3, rows, True
        )
    else:
        X00, X10, X11, X20, X21, X22, X30, X31, X32, X33 = solve_64(
            L00, L10, L11, L20, L21, L22, L30, L31, L32, L33, r0, r1, r2, r3, c0, c1, c2, c3, rows, False
        )
    store(X, X_low, 0, beside(X00, zero), rows, REST, LOW, TILE, HV)
    store(X, X_low, 1, beside(X10, X11), rows, REST, LOW, TILE, HV)
    store(X, X_low, 2, beside(beside(X20, X21), beside(X22, zero)), rows, REST, LOW, TILE, HV)
    store(X, X_low, 3, beside(beside(X30, X31), beside(X32, X33)), rows, REST, LOW, TILE, HV)
