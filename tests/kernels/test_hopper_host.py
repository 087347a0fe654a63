"""The host side of the Hopper family without a GPU: every launch hands each kernel each of its arguments once, whatever the call.

The operators run on small CPU tensors in a process of its own (Gluon cannot be imported beside Triton's interpreter), launches are looked at
instead of made. Shown to fail: an argument left out, a constant misspelt, and no bound on the places in X.
"""

import itertools
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_every_argument_is_given_once() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = ["backward_kernel", "ends_kernel", "forward", "forward_256", "gradients_kernel", "rest", "state_gradient_kernel", "transform"]
    assert done.stdout.split() == sorted([*ours, "chain"])


def main() -> None:
    import torch

    from deltanet.kernels.hopper import (
        chunk,
        chunk_backward_256,
        chunk_backward_ends,
        chunk_backward_kernel,
        chunk_gradients_256,
        chunk_rest,
        chunk_state_gradient_256,
    )
    from deltanet.kernels.triton import chunk as portable
    from deltanet.kernels.triton import chunk_call

    seen = set()

    def look(fn, key, grid, args, config, constants) -> None:
        given = [*fn.arg_names[: len(args)], *constants()]
        assert sorted(given) == sorted(fn.arg_names), (fn.__name__, set(given) ^ set(fn.arg_names))
        assert all(size > 0 for size in grid), (fn.__name__, grid)
        seen.add(fn.__name__)

    for module in (chunk, chunk_backward_ends, chunk_backward_kernel, chunk_gradients_256, chunk_rest, chunk_state_gradient_256, portable):
        module.launch = look
    chunk._compile_once = lambda *_: None
    chunk_call.multiprocessors = lambda device: 132

    for home, HV, D in ((chunk_backward_kernel, 32, 64), (chunk_backward_256, 8, 256)):  # places in X are 32-bit numbers
        calls = [torch.empty(1, T, HV, D, dtype=torch.bfloat16, device="meta") for T in (44_700_000, 44_800_000)]
        assert [home.takes(chunk_call.Call(x, x, x[..., 0], None, None)) for x in calls] == [True, False]

    kinds = itertools.product(
        ("bfloat16", "float16"), (64, 128, 256), (False, True), (False, True), (False, True), ("states", "lean", "nothing"), (130, 4500)
    )
    for dtype, D, gated, packed, states, save, T in kinds:
        B, H, HV, N = 1, 4, 8, 3 if packed else 1
        q, k = (torch.zeros(B, T, H, D, dtype=getattr(torch, dtype)) for _ in range(2))
        v, beta = q.new_zeros(B, T, HV, D), q.new_zeros(B, T, HV)
        g = torch.zeros(B, T, HV) if gated else None
        cu_seqlens = torch.tensor([0, 70, 70, T], dtype=torch.int32) if packed else None
        state = torch.zeros(N, HV, D, D) if states else None
        given = (q, k, v, beta, g, 1.0, state, cu_seqlens)
        o, final, kept = chunk.chunk_forward(*given, output_final_state=states, save=save)
        assert o.shape == v.shape
        if save != "nothing":
            chunk_backward_kernel.takes = lambda call: call.K in chunk_backward_kernel.DIMS  # with fewer heads than it asks for, too
            grads = chunk.chunk_backward(o, final, *given, kept)
            for x, dx in zip((q, k, v, beta, g, state), grads, strict=True):
                assert x is dx is None or (x.shape, x.dtype) == (dx.shape, dx.dtype)
    print(*sorted(seen))


if __name__ == "__main__":
    main()
