"""The fused selective scan against its definition in fp64, with autograd's gradients. In the interpreter, or on a GPU if there is one.

Faults injected when the kernels were written, each of which failed here: the state after a token in d(dt A); that before it in dC; what lies
beyond the end not masked; starts of packed sequences without their own place; the first decay left out of the initial state's gradient.
"""

import pytest
import torch
from support import relative_error
from torch import Tensor

pytest.importorskip("triton")

from deltanet.ops.selective_scan import fused_selective_scan, refuse_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# T, D and S: no multiple of the 8 tokens and 16 channels that a program takes at once, or exactly two; the lengths of packed sequences
SHAPES = {
    "odd": dict(B=2, T=19, D=33, S=3),
    "whole": dict(B=1, T=16, D=32, S=4),
    "many numbers": dict(B=1, T=9, D=17, S=20),
    "one token": dict(B=2, T=1, D=8, S=5),
    "packed": dict(D=6, S=2, lengths=[0, 3, 16, 0, 33, 1, 0]),
    "no token": dict(B=2, T=0, D=8, S=4),
}


def definition(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t, y_t = C_t . h_t; h is `[N, S, D]`."""
    outputs = [u[:, :0]]
    for t in range(u.shape[1]):
        h = (dt[:, t, None] * A.T).exp() * h + (dt * u)[:, t, None] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * h).sum(1)[:, None])
    return torch.cat(outputs, 1), h


def make(B: int = 1, T: int = 0, D: int = 8, S: int = 4, lengths: list[int] | None = None, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    T, N = (T, B) if lengths is None else (sum(lengths), len(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    u, dt, A = normal(B, T, D), normal(B, T, D).abs(), -normal(D, S).abs()
    tensors = [u.to(dtype), dt, A, normal(B, T, S).to(dtype), normal(B, T, S).to(dtype), normal(N, S, D)]
    bounds = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return [x.to(DEVICE) for x in tensors], None if bounds is None else bounds.to(DEVICE), normal(B, T, D), normal(N, S, D)


def exact(tensors: list[Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    *args, h = tensors
    if cu_seqlens is None:
        return definition(*args, h)
    u, dt, A, B, C = args
    parts = []
    for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        cut = [x[:, start:end] for x in (u, dt, B, C)]
        parts.append(definition(cut[0], cut[1], A, cut[2], cut[3], h[n : n + 1]))
    return torch.cat([y for y, _ in parts], 1), torch.cat([final for _, final in parts])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_forward_and_backward(shape: str) -> None:
    tensors, cu_seqlens, dy, dfinal = make(**SHAPES[shape])
    assert refuse_scan(tensors[0], tensors[2]) is None
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        y, final = fused_selective_scan(*leaves, cu_seqlens) if dtype == torch.float32 else exact(leaves, cu_seqlens)
        loss = (y * dy.to(y)).sum() + (final * dfinal.to(final)).sum()
        outcomes.append((y, final, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    names = ("y", "final", "du", "ddt", "dA", "dB", "dC", "dinitial")
    for name, got, want in zip(names, *outcomes, strict=True):
        assert relative_error(got, want) < 2e-6, f"{name}: {relative_error(got, want):.2e}"


def test_no_state_is_zero_and_strides_may_be_any() -> None:
    (u, dt, A, B, C, state), _, _, _ = make(B=1, T=17, D=5, S=3)
    y, final = fused_selective_scan(u, dt, A, B, C, state * 0, None)
    loose = [x.mT.contiguous().mT for x in (u, dt, A, B, C)]
    for got, want in zip(fused_selective_scan(*loose, None, None), (y, final), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    tensors, _, dy, _ = make(B=1, T=20, D=9, S=3, dtype=dtype)
    leaves = [x.requires_grad_() for x in tensors]
    y, _ = fused_selective_scan(*leaves, None)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    want, _ = exact(wide, None)
    assert y.dtype == dtype
    tolerance = {torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert relative_error(y, want) < tolerance
    dy = dy.to(y)
    for got, expected in zip(
        torch.autograd.grad((y * dy).sum(), leaves), torch.autograd.grad((want * dy).sum(), wide), strict=True
    ):
        assert relative_error(got, expected) < tolerance


@pytest.mark.gpu
def test_long_sequences_and_the_same_bits_twice() -> None:
    tensors, cu_seqlens, dy, _ = make(D=1024, S=16, lengths=[2000, 17, 3000, 1], dtype=torch.bfloat16)
    outcomes = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y, final = fused_selective_scan(*leaves, cu_seqlens)
        outcomes.append((y, final, *torch.autograd.grad((y * dy.to(y)).sum(), leaves)))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
    want, want_final = exact([x.double() for x in tensors], cu_seqlens)
    assert relative_error(outcomes[0][0], want) < 5e-3
    assert relative_error(outcomes[0][1], want_final) < 1e-5


@pytest.mark.gpu
def test_compiles_whole() -> None:
    tensors, _, _, _ = make(B=2, T=37, D=37, S=5)
    compiled = torch.compile(fused_selective_scan, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors, None), fused_selective_scan(*tensors, None))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    u, A = torch.zeros(1, 1, 2), torch.zeros(2, 33)
    assert refuse_scan(u.to(DEVICE), A) == "it keeps up to 32 numbers a channel, got 33"
    assert refuse_scan(u.to(DEVICE).double(), A) == "it runs float32, bfloat16, float16, not float64"
