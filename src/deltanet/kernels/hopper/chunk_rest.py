"""What rounding left of X, for the backward, of chunks with a beta above 1: there errors grow instead of dying out, and 8 bits are too few.

It is solved for again rather than kept, and it lies where dv of the chunk will be written, as rows of 64: the program that writes dv has
read it by then. A chunk whose betas are at most 1 is only looked at, and eight of them by one program at once.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from deltanet.kernels.hopper.chunk_transform import solve_64
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.hopper.tiles import CHUNK, any_of_warp, clear, find_part
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton.compiled import launch

__all__ = ["rest_of_X"]

CONFIG = LaunchConfig(warps=4)
PLACES = gl.constexpr(8)  # chunks of a program


@gluon.jit(do_not_specialize=["N", "steps", "T", "tokens"])
def rest(
    k,  # descriptor of [tokens, H * K], blocks [64, K]
    strength,  # [HV, tokens] fp32: beta
    G,  # [HV, tokens] fp32, GATED only
    X,  # [HV, tokens * 48], as the forward stored it
    X_low,  # [tokens, HV, V] out: of each chunk 64 columns, COPIES times at equal distances
    cu_seqlens,
    N,
    steps,
    T,
    tokens,
    H: gl.constexpr,
    HV: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    COPIES: gl.constexpr,
    PACKED: gl.constexpr,
    GATED: gl.constexpr,
):
    here = gl.program_id(0) * PLACES
    head = gl.program_id(1)
    strength += head.to(gl.int64) * tokens
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    t = gl.arange(0, CHUNK, gl.SliceLayout(0, flat))
    places = here + gl.arange(0, PLACES, gl.SliceLayout(1, flat))
    _, chunks, begins, ends = find_part(places, cu_seqlens, N, steps, T, CHUNK, PACKED)
    token = (begins + chunks * CHUNK)[:, None] + t[None, :]
    betas = gl.load(strength + token, mask=(token < ends[:, None]) & (token < tokens), other=0.0)  # places past the last are beyond both
    if any_of_warp(gl.max(gl.max(betas, 1), 0) > 1.0):
        dtype: gl.constexpr = k.dtype
        k_s = gl.allocate_shared_memory(dtype, [CHUNK, K], gl.NVMMASharedLayout(128, 16, 2))
        X_s = gl.allocate_shared_memory(dtype, [CHUNK, CHUNK], gl.NVMMASharedLayout(128, 16, 2))
        b_s = gl.allocate_shared_memory(gl.float32, [CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        G_s = b_s
        if GATED:
            G_s = gl.allocate_shared_memory(gl.float32, [CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(loaded, count=1)
        line: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp holds all 64
        whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        s = gl.arange(0, CHUNK, line)
        r = gl.arange(0, CHUNK, gl.SliceLayout(1, wide))
        c = gl.arange(0, CHUNK, gl.SliceLayout(0, wide))
        solved = 0
        for place in range(here, here + PLACES):
            _sequence, chunk, begin, end = find_part(place, cu_seqlens, N, steps, T, CHUNK, PACKED)
            first = begin + chunk * CHUNK
            rows = gl.maximum(gl.minimum(gl.minimum(end, tokens) - first, CHUNK), 0).to(gl.int32)
            b = gl.load(strength + first + s, mask=s < rows, other=0.0)
            if any_of_warp(gl.max(b, 0) > 1.0):
                mbarrier.expect(loaded, k.block_type.nbytes)
                tma.async_copy_global_to_shared(k, [first.to(gl.int32), (head // (HV // H)) * K], loaded, k_s)
                along = head.to(gl.int64) * tokens + first
                b_s.store(b)
                if GATED:
                    G_s.store(gl.load(G + along + gl.minimum(s, rows - 1)))
                at = along * 48 + gl.where(r < 32, r * 32, r * 64 - 1024)[:, None] + c[None, :]
                keep = ((r[:, None] >= 32) | (c[None, :] < 32)) & (r < rows)[:, None]
                X_s.store(gl.load(X + at, mask=keep, other=0.0))
                mbarrier.wait(loaded, solved & 1)
                solved += 1
                if rows < CHUNK:
                    clear(k_s, rows, K)
                S = warpgroup_mma(k_s, k_s.permute((1, 0)), gl.zeros([CHUNK, CHUNK], gl.float32, whole), use_acc=False, is_async=True)
                S = warpgroup_mma_wait(0, deps=[S])
                x = solve_64(S, b_s, G_s, whole, GATED, True)
                X_s.store((x - X_s.load(whole).to(gl.float32)).to(dtype))
                low = X_s.load(wide)
                out = X_low + ((first + r) * HV + head)[:, None] * V + c[None, :]
                for copy in gl.static_range(COPIES):
                    gl.store(out + copy * (V // COPIES), low, mask=(r < rows)[:, None])


def rest_of_X(call, k: Tensor, b: Tensor, G: Tensor | None, X: Tensor, X_low: Tensor) -> None:
    """Write it over X_low `[B, T, HV, V]`: in the first 64 columns, or where V is cut, for each program of a head, in those it will write."""
    keys = tensor_map(k, call.H * call.K, CHUNK.value, call.K)
    copies = -(-call.V // 128)
    args = (keys, b, b if G is None else G, X, X_low, b if call.place[0] is None else call.place[0], *call.place[1:])
    grid = (-(-call.parts(CHUNK.value) // PLACES.value), call.HV, 1)
    launch(rest, ("hopper rest of X", call.key, copies), grid, args, CONFIG, lambda: dict(COPIES=copies, GATED=G is not None, **call.sizes))
