"""The fused short convolution against its definition in fp64, with autograd's gradients. In the interpreter, or on a GPU if there is one.

Faults injected when this file was written, each of which failed here: later tokens' dp in dw and db; inputs before a sequence's start; dtail only
of later parts, and all sequences' tail the first one's; taps turned round in dx; gradients of the next part left out; the channels that do not
exist counted in a norm with elu1; r instead of r^2 in dh; dx beyond the part; h left out of silu's slope; the window's newest input dropped; any
strides taken for rows; inputs of a place without a part.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor

pytest.importorskip("triton")

from kernels import offline

from deltanet.kernels.triton import short_conv as kernel
from deltanet.layers import ShortConv
from deltanet.layers.short_conv import ACTIVATIONS
from deltanet.ops import short_conv as operator
from deltanet.ops.short_conv import fused_short_conv, refuse_short_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PART = kernel.PART if DEVICE == "cuda" else 8  # what matters is around the ends of parts, and the interpreter goes token by token
EPS = 1e-6
NAMES = ("y", "dx", "dweight", "dbias", "dtail")
# Lengths around a part's tokens and a loop body's 4 and 8; channels that fill a warp's 128 and do not; units of one warp and of several.
CASES = {
    "odd": dict(B=2, T=19, D=33, width=4),
    "one token": dict(B=3, T=1, D=8, width=4, unit=4),
    "no token": dict(B=2, T=0, D=8, width=3),
    "two parts": dict(B=2, T=PART + 1, D=130, width=3, activation="relu"),
    "shorter than the tail": dict(B=2, T=2, D=6, width=5, activation="identity"),
    "units of a warp": dict(B=1, T=PART + 6, D=256, width=4, unit=128),
    "units that share a warp": dict(B=2, T=9, D=5 * 12, width=2, unit=12, activation="elu1"),
    "units of two warps": dict(B=1, T=5, D=400, width=4, unit=200),
    "eight taps": dict(B=1, T=2 * PART, D=20, width=8, unit=10),
    "packed": dict(D=36, width=4, unit=12, lengths=[0, 3, PART, 0, PART + 2, 1, 1, 0]),
    "packed, wide": dict(D=140, width=3, lengths=[1, 2 * PART - 1, 2]),
    "packed, no token": dict(D=8, width=4, lengths=[0, 0]),
}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PART", PART)


def make(
    B: int = 1, T: int = 0, D: int = 8, width: int = 4, lengths: list[int] | None = None, dtype=torch.float32, **options
) -> tuple[list[Tensor], Tensor | None, Tensor, tuple[str, int, float]]:
    """x, weight, bias, tail; cu_seqlens; dy; what follows the sums."""
    gen = torch.Generator().manual_seed(0)
    T, N = (T, B) if lengths is None else (sum(lengths), len(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DEVICE)

    tensors = [normal(B, T, D).to(dtype), normal(D, 1, width), normal(D), normal(N, width - 1, D).to(dtype)]
    bounds = None if lengths is None else F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    return tensors, bounds, normal(B, T, D).to(dtype), (options.get("activation", "silu"), options.get("unit", 0), EPS)


def definition(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, activation: str, unit: int, eps: float) -> Tensor:
    y = F.conv1d(torch.cat([tail, x], 1).mT, weight, bias, groups=len(weight)).mT
    y = ACTIVATIONS[activation](y)
    if not unit:
        return y
    y = y.unflatten(-1, (-1, unit))
    return (y / (y.square().sum(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def exact(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, cu_seqlens: Tensor | None, *options) -> Tensor:
    if not x.shape[1]:
        return x + 0 * (weight.sum() + bias.sum() + tail.sum())
    if cu_seqlens is None:
        return definition(x, weight, bias, tail, *options)
    parts = [
        definition(x[:, start:end], weight, bias, tail[n : n + 1], *options)
        for n, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
        if end > start
    ]
    return torch.cat(parts, 1)


def outcomes(leaves: list[Tensor], cu_seqlens: Tensor | None, dy: Tensor, options, run) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = run(*leaves, cu_seqlens, *options)
    return [y, *torch.autograd.grad((y * dy.to(y)).sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("case", CASES)
def test_the_definition_forward_and_backward(case: str) -> None:
    tensors, cu_seqlens, dy, options = make(**CASES[case])
    assert refuse_short_conv(tensors[0], tensors[1].shape[-1], options[1]) is None
    got = outcomes(tensors, cu_seqlens, dy, options, fused_short_conv)
    want = outcomes([x.double() for x in tensors], cu_seqlens, dy, options, exact)
    for name, x, y in zip(NAMES, got, want, strict=True):
        assert relative_error(x, y) < 2e-6, f"{name}: {relative_error(x, y):.2e}"


@pytest.mark.parametrize("case", ["odd", "packed"])
def test_without_bias_and_tail(case: str) -> None:
    (x, weight, bias, tail), cu_seqlens, dy, options = make(**CASES[case])
    got = outcomes([x, weight], cu_seqlens, dy, options, lambda x, w, *rest: fused_short_conv(x, w, None, None, *rest))
    want = outcomes([x, weight, 0 * bias, 0 * tail], cu_seqlens, dy, options, fused_short_conv)
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    tensors, cu_seqlens, dy, options = make(B=2, T=40, D=64, unit=32, dtype=dtype)
    got = outcomes(tensors, cu_seqlens, dy, options, fused_short_conv)
    want = outcomes([x.double() for x in tensors], cu_seqlens, dy, options, exact)
    rounding = {torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    for name, x, y, leaf in zip(NAMES, got, want, [tensors[0], *tensors], strict=True):
        assert x.dtype == leaf.dtype
        assert relative_error(x, y) < (rounding if x.dtype == dtype else 2e-6), f"{name}: {relative_error(x, y):.2e}"


def test_a_zero_unit_has_a_gradient() -> None:
    """relu may leave a unit of zeros: eps under the root keeps its norm apart from zero."""
    (x, weight, bias, tail), _, dy, _ = make(B=1, T=3, D=8, unit=4)
    options = ("relu", 4, EPS)
    leaves = [x, weight, bias - 100, tail]
    for z in outcomes(leaves, None, dy, options, fused_short_conv):
        assert torch.equal(z, torch.zeros_like(z))


def test_strides_may_be_any() -> None:
    (x, weight, _, tail), _, _, options = make(B=2, T=17, D=12)
    wanted = fused_short_conv(x, weight, None, tail, None, *options)
    for loose in (torch.cat([x, x], -1)[..., :12], x.mT.contiguous().mT, torch.cat([x, x], 1)[:, :17]):
        assert not loose.is_contiguous()
        assert torch.equal(fused_short_conv(loose, weight, None, tail.mT.contiguous().mT, None, *options), wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, as the other tests do where there is no GPU")
def test_nothing_outside_tensors_is_touched() -> None:
    """A place of the grid without a part once read beyond the last token, which no comparison of results can see."""
    script = Path(__file__).parent / "fenced.py"
    done = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", ["everything", "x and weight"])
def test_is_an_operator(packed: bool, given: str) -> None:
    tensors, cu_seqlens, _, options = make(B=1, D=12, unit=4, **(dict(lengths=[3, 0, 4]) if packed else dict(T=7)))
    leaves = [z.requires_grad_() for z in tensors]
    leaves = leaves if given == "everything" else [*leaves[:2], None, None]
    torch.library.opcheck(operator._short_conv, (*leaves, cu_seqlens, *options))


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("overwrite", [False, True])
def test_steps_of_one_token(width: int, overwrite: bool) -> None:
    """Each gives what the whole sequence gives; the old tail stays, unless it may go."""
    (x, _, bias, tail), _, _, _ = make(B=3, T=11, D=12, width=width)
    layer = ShortConv(12, width).to(DEVICE)
    given = dict(activation="silu", bias=bias, unit=6)
    with torch.no_grad():
        whole, last = layer(x, tail, **given)
        state, parts = tail.clone(), []
        for token in x.split(1, 1):
            before = state.clone()
            y, new = layer(token, state, **given, overwrite=overwrite)
            assert (new is state) == overwrite
            assert overwrite or torch.equal(state, before)
            state = new
            parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("lengths", [None, [5, 0, 9, 1]], ids=["rows", "packed"])
@pytest.mark.parametrize("streams", [False, True])
def test_the_layer_gives_what_pytorch_gives(monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None, streams: bool) -> None:
    (x, _, bias, tail), cu_seqlens, _, _ = make(B=1 if lengths else 3, T=15, D=12, lengths=lengths)
    layer = ShortConv(12, 4).to(DEVICE)
    given = dict(activation="silu", bias=bias, unit=6)
    called = []
    monkeypatch.setattr("deltanet.layers.short_conv.fused_short_conv", lambda *a: called.append(1) or fused_short_conv(*a))
    got = layer(x, tail if streams else None, cu_seqlens, **given)
    assert called
    want = layer.double()(x.double(), tail.double() if streams else None, cu_seqlens, **given)  # fp64: no kernel
    assert len(called) == 1
    assert relative_error(got[0], want[0]) < 2e-6
    assert (got[1] is None) == (not streams)
    if streams:
        assert torch.equal(got[1].double(), want[1])


def test_what_cannot_run_is_refused() -> None:
    x = torch.zeros(1, 1, 2, device=DEVICE)
    assert refuse_short_conv(x, 1, 0) == "it runs widths of 2 to 8, got 1"
    assert refuse_short_conv(x, 9, 0) == "it runs widths of 2 to 8, got 9"
    assert refuse_short_conv(x, 4, 1025) == "it normalises up to 1024 channels together, got 1025"
    assert refuse_short_conv(x.double(), 4, 0) == "it runs float32, bfloat16, float16, not float64"
    with pytest.raises(ValueError, match="unit must divide D = 2, got 3"):
        ShortConv(2, 4).to(DEVICE)(x, unit=3)


def test_compiles_without_spills() -> None:
    """For H100 and H200, and for A100: as the layer launches it, 128 channels normalised together, and with bias and tail, packed."""
    for capability in (90, 80):
        compiled = offline.compile_rows(["short_conv-2-128-plain", "short_conv-2-128-packed"], capability, workers=1)
        assert {found.kernel for found in compiled} == {"forward", "backward"}
        assert not [problem for found in compiled for problem in offline.problems(found, 0)]
        for found in compiled:  # 16 warps of 128 registers share a multiprocessor, whose loads fill the memory's queue
            assert found.registers <= 128, (found.kernel, found.registers)


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [0, 64, 128, 256])
def test_long_sequences_and_the_same_bits_twice(unit: int) -> None:
    tensors, cu_seqlens, dy, options = make(D=1024, lengths=[2000, 17, 3000, 0, 1], unit=unit, dtype=torch.bfloat16)
    first, second = (outcomes(tensors, cu_seqlens, dy, options, fused_short_conv) for _ in range(2))
    want = outcomes([x.double() for x in tensors], cu_seqlens, dy, options, exact)
    for name, a, b, y in zip(NAMES, first, second, want, strict=True):
        assert torch.equal(a, b), name
        assert relative_error(a, y) < 3e-3, f"{name}: {relative_error(a, y):.2e}"


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    x = torch.zeros(1, 2**20 + 3, 2048, device="cuda", dtype=torch.bfloat16)
    x[:, -3:] = torch.randn(3, 2048, device="cuda")
    weight = torch.randn(2048, 1, 4, device="cuda", requires_grad=True)
    y = fused_short_conv(x.requires_grad_(), weight, None, None, None, "silu", 128, EPS)
    dx, _ = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    near = x[:, -6:].detach().requires_grad_()
    wanted = fused_short_conv(near, weight, None, None, None, "silu", 128, EPS)
    (wanted_dx,) = torch.autograd.grad(wanted, near, torch.ones_like(wanted))
    assert torch.equal(y[:, -3:], wanted[:, -3:])
    assert torch.equal(dx[:, -3:], wanted_dx[:, -3:])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed: bool) -> None:
    lengths = [30, 0, 45] if packed else None
    (x, _, _, _), cu_seqlens, dy, _ = make(B=1 if packed else 2, T=37, D=256, lengths=lengths, dtype=torch.bfloat16)
    layer = ShortConv(256, 4).cuda()

    def both(run) -> list[Tensor]:
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = run(leaf, None, cu_seqlens, activation="silu", unit=128)[0]
        return [y, *torch.autograd.grad((y * dy).sum(), (leaf, layer.weight))]

    for a, b in zip(both(torch.compile(layer, fullgraph=True)), both(layer), strict=True):
        torch.testing.assert_close(a, b)
