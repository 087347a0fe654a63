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

from deltanet.kernels.triton.tiles import CHUNK, decay_between, find_part


@triton.jit
def product(a, b):
    """a @ b for bounded fp32 values, to about 22 bits."""
    a_high = a.to(tl.float16)
    b_high = b.to(tl.float16)
    a_low = (a - a_high.to(tl.float32)).to(tl.float16)
    b_low = (b - b_high.to(tl.float32)).to(tl.float16)
    return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def columns_then_rows(x):
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


@triton.jit(do_not_specialize=["T", "N", "steps", "x_head"])
def transform(
    k,  # [tokens, H, K]
    beta,  # [tokens, HV]
    g,  # [tokens, HV], gated only
    G,  # [tokens, HV] fp32 out, gated only: the sum of g inside the chunk, in powers of two
    X,  # [HV, tokens * 48] out: of each chunk rows 0..31 as 32 columns, then rows 32..63 as 64
    X_low,  # the same shape: what rounding X left over (REST only)
    cu_seqlens,
    N,
    steps,
    T,
    x_head,  # tokens * 48
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    REST: tl.constexpr,
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

    # indices of the three levels: 4 blocks of 16, 2 pairs of 16, 1 pair of 32
    four, two = tl.arange(0, 4)[:, None, None] * 16, tl.arange(0, 2)[:, None, None] * 32
    r16, c16 = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    r32, c32 = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    L16 = tl.zeros([4, 16, 16], tl.float32)
    L32 = tl.zeros([2, 16, 16], tl.float32)
    L64 = tl.zeros([32, 32], tl.float32)
    for i in range(0, BK, 64 if BK > 64 else BK):
        width: tl.constexpr = 64 if BK > 64 else BK
        d3 = i + tl.arange(0, width)[None, None, :]
        d2 = i + tl.arange(0, width)[None, :]
        k16 = tl.load(k + (four + r16) * (H * K) + d3, mask=(four + r16 < rows) & (d3 < K), other=0.0)
        k_even = tl.load(k + (two + r16) * (H * K) + d3, mask=(two + r16 < rows) & (d3 < K), other=0.0)
        k_odd = tl.load(k + (two + 16 + r16) * (H * K) + d3, mask=(two + 16 + r16 < rows) & (d3 < K), other=0.0)
        k_top = tl.load(k + r32 * (H * K) + d2, mask=(r32 < rows) & (d2 < K), other=0.0)
        k_bottom = tl.load(k + (r32 + 32) * (H * K) + d2, mask=(r32 + 32 < rows) & (d2 < K), other=0.0)
        L16 = tl.dot(k16, tl.permute(k16, [0, 2, 1]), L16, input_precision=PRECISION)
        L32 = tl.dot(k_odd, tl.permute(k_even, [0, 2, 1]), L32, input_precision=PRECISION)
        L64 = tl.dot(k_bottom, tl.trans(k_top), L64, input_precision=PRECISION)
    L16 = tl.where(r16 > c16, L16, 0.0)

    if GATED:
        # the sum runs over the whole chunk at once; the levels read it back from memory, each in its own layout
        t = tl.arange(0, CHUNK)
        steps_g = tl.load(g + (first + t) * HV + head, mask=t < rows, other=0.0).to(tl.float32) * 1.4426950408889634
        G += first * HV + head
        tl.store(G + t * HV, tl.cumsum(steps_g, 0), mask=t < rows)
        tl.debug_barrier()
        last = tl.load(G + (rows - 1) * HV)
        Gr = tl.load(G + (four + r16) * HV, mask=four + r16 < rows, other=0.0) + tl.where(four + r16 < rows, 0.0, last)
        Gc = tl.load(G + (four + c16) * HV, mask=four + c16 < rows, other=0.0) + tl.where(four + c16 < rows, 0.0, last)
        L16 *= decay_between(Gr, Gc, r16 > c16)
        Gr = tl.load(G + (two + 16 + r16) * HV, mask=two + 16 + r16 < rows, other=0.0)
        Gc = tl.load(G + (two + c16) * HV, mask=two + c16 < rows, other=0.0)
        L32 *= decay_between(Gr, Gc, two + 16 + r16 + c16 * 0 < rows)
        Gr = tl.load(G + (32 + r32) * HV, mask=32 + r32 < rows, other=0.0)
        Gc = tl.load(G + c32 * HV, mask=c32 < rows, other=0.0)
        L64 *= decay_between(Gr, Gc, 32 + r32 + c32 * 0 < rows)

    # 8 x 8 blocks by doubling, then 16 x 16
    br = tl.load(beta + (four + r16) * HV, mask=four + r16 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (four + c16) * HV, mask=four + c16 < rows, other=0.0).to(tl.float32)
    L8 = tl.where(r16 // 8 == c16 // 8, L16, 0.0)
    L_2 = product(L8 * bc, L8)  # N L, so N^2 = N L diag(beta)
    X8 = L8 - L_2
    L_4 = product(L_2 * bc, L_2)
    X8 += product(L_2 * bc, X8)
    X8 += product(L_4 * bc, X8)
    left = L16 - L8
    left -= product(left, br * X8)
    X16 = X8 + left - product(X8 * bc, left)

    # 32 x 32
    br = tl.load(beta + (two + r16) * HV, mask=two + r16 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (two + 16 + c16) * HV, mask=two + 16 + c16 < rows, other=0.0).to(tl.float32)
    X_even, X_odd = columns_then_rows(X16)
    L32 -= product(L32, br * X_even)
    L32 -= product(X_odd * bc, L32)
    X32 = below(beside(X_even, tl.zeros([2, 16, 16], tl.float32)), beside(L32, X_odd))

    # 64 x 64
    br = tl.load(beta + r32 * HV, mask=r32 < rows, other=0.0).to(tl.float32)
    bc = tl.load(beta + (32 + c32) * HV, mask=32 + c32 < rows, other=0.0).to(tl.float32)
    X_top, X_bottom = tl.split(tl.permute(X32, [1, 2, 0]))
    L64 -= product(L64, br * X_top)
    L64 -= product(X_bottom * bc, L64)

    at = head * x_head.to(tl.int64) + first * 48
    X += at
    X_low += at
    store(X, X_low, r32 * 32 + c32, X_top, r32 < rows, REST)
    store(X, X_low, 1024 + r32 * 64 + c32, L64, r32 + 32 < rows, REST)
    store(X, X_low, 1056 + r32 * 64 + c32, X_bottom, r32 + 32 < rows, REST)


@triton.jit
def store(X, X_low, at, x, mask, REST: tl.constexpr):
    high = x.to(X.dtype.element_ty)
    tl.store(X + at, high, mask=mask)
    if REST:
        tl.store(X_low + at, (x - high.to(tl.float32)).to(X.dtype.element_ty), mask=mask)
