"""Runs a kernel in Triton's interpreter on tensors with forbidden memory right behind, or right before them: who reaches over is killed.

A script, because being killed is the answer: its exit code is 0 or that of a segmentation fault.
"""

import ctypes
import mmap
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept = []  # what is mapped stays so


def fenced(like: Tensor, *, behind: bool) -> Tensor:
    """A copy of `like` whose last byte, or first, borders on a page that nobody may touch."""
    size = like.numel() * like.element_size()
    pages = max(1, -(-size // PAGE))
    region = mmap.mmap(-1, (pages + 1) * PAGE)
    _kept.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    fence, at = (pages * PAGE, pages * PAGE - size) if behind else (0, PAGE)
    copy = torch.frombuffer(region, dtype=like.dtype, count=like.numel(), offset=at).view(like.shape) if size else like.clone()
    copy.copy_(like)
    if _libc.mprotect(ctypes.c_void_p(start + fence), PAGE, 0):  # 0 is PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def short_conv(lengths: list[int] | None, behind: bool) -> None:
    """Forward and backward on every kind of tensor; outputs are fenced too."""
    from deltanet.kernels.triton import short_conv as kernel

    kernel.PART = 8
    empty, empty_like = torch.empty, torch.empty_like
    B, T, D = (2, 13, 10) if lengths is None else (1, sum(lengths), 10)
    N = B if lengths is None else len(lengths)
    tensors = [torch.randn(B, T, D), torch.randn(D, 1, 4), torch.randn(D), torch.randn(N, 3, D)]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, weight, bias, tail = (fenced(z, behind=behind) for z in tensors)
    cu_seqlens = None if cu_seqlens is None else fenced(cu_seqlens, behind=behind)
    torch.empty = lambda *args, **options: fenced(empty(*args, **options), behind=behind)
    torch.empty_like = lambda *args, **options: fenced(empty_like(*args, **options), behind=behind)
    try:
        y = kernel.short_conv_forward(x, weight, bias, tail, cu_seqlens, "silu", 5, 1e-6)
        kernel.short_conv_backward(y, x, weight, bias, tail, cu_seqlens, "silu", 5, 1e-6)
        kernel.short_conv_backward(y, x, weight, None, None, cu_seqlens, "silu", 0, 1e-6)
        token = fenced(torch.randn(N, 1, D), behind=behind)
        kernel.short_conv_step(token, weight, bias, tail, "silu", 5, 1e-6, inplace=True)
    finally:
        torch.empty, torch.empty_like = empty, empty_like


if __name__ == "__main__":
    for lengths in (None, [3, 8, 0, 14, 1, 1, 0, 9, 2], [21, 5]):  # the last place of a grid over the last has no part
        for behind in (True, False):
            short_conv(lengths, behind)
