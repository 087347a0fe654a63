"""The token-by-token kernels against the definition: forward, backward, and the decode step. In the interpreter, or on a GPU if there is one.

Tolerances: fp32 sums of a few hundred terms lose 1e-6; a 16-bit tensor is rounded once, at the end (fp16 2^-11, bf16 2^-8, both over sqrt 3).
Faults injected into the kernels when this file was written, each of which failed here: scale dropped from dq; decay left out of the
prediction, or of D; last_dg dropped; head // group -> head, and the group averaged; dbeta's last strip dropped; dw rounded to fp16; the final
state of an empty sequence not written; the guards of odd widths and of the two-token prefetch dropped (both crash the interpreter).
"""

import pytest
import torch
from support import Inputs, make_inputs, relative_error
from torch import Tensor

pytest.importorskip("triton")

from deltanet.kernels.triton import recurrent
from deltanet.kernels.triton.decode import decode_step
from deltanet.reference import recurrent as definition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_ONLY = pytest.mark.gpu
NAMES = ("dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

# T, H, HV, K, V and the lengths of packed sequences; the last dimensions are not multiples of anything
SHAPES = {
    "plain": dict(B=2, T=9, H=2, K=16, V=16),
    "two strips": dict(B=1, T=7, H=1, K=32, V=128),
    "odd": dict(B=2, T=5, H=1, K=20, V=36),
    "odd, K over 64": dict(B=1, T=4, H=1, K=100, V=17),
    "grouped": dict(B=1, T=6, H=2, HV=6, K=16, V=24),
    "packed": dict(H=2, HV=4, K=24, V=16, lengths=[0, 1, 5, 0, 2, 0]),
    "one token": dict(B=3, T=1, H=1, HV=2, K=16, V=40),
    "no token": dict(B=2, T=0, H=1, K=16, V=16),
}


def exact(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def run(x: Inputs, *, scale: float = 0.3, save: str = "states", dfinal: bool = True) -> tuple[dict, dict]:
    """Outputs and gradients of the kernels, and the same by the definition in fp64."""
    dfinal_state = x.dfinal_state if dfinal else None
    parts = (x.q, x.k, x.v, x.beta, x.g)
    o, final, saved = recurrent.recurrent_forward(
        *parts, scale, x.initial_state, x.cu_seqlens, output_final_state=True, save=save
    )
    grads = recurrent.recurrent_backward(x.do, dfinal_state, *parts, scale, x.initial_state, x.cu_seqlens, saved)
    wide = [exact(p) for p in parts]
    want_o, want_final = definition.delta_rule(*wide, scale, exact(x.initial_state), x.cu_seqlens)
    want = definition.backward(
        exact(x.do), exact(dfinal_state), *wide, scale, exact(x.initial_state), x.cu_seqlens, []
    )
    return dict(zip(("o", "final", *NAMES), (o, final, *grads), strict=True)), dict(
        zip(("o", "final", *NAMES), (want_o, want_final, *want), strict=True)
    )


def check(got: dict, want: dict, tolerance: float) -> None:
    for name, x in want.items():
        if x is None:
            assert got[name] is None, name
        else:
            assert relative_error(got[name], x) <= tolerance, f"{name}: {relative_error(got[name], x):.2e}"


@pytest.mark.parametrize("gate", [None, 1.0], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_forward_and_backward(shape: str, gate: float | None) -> None:
    got, want = run(make_inputs(**SHAPES[shape], gate=gate, state=True, dtype=torch.float32, device=DEVICE))
    check(got, want, ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=GPU_ONLY)])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x = make_inputs(B=1, T=12, H=1, HV=2, K=32, V=24, gate=0.5, state=True, dtype=dtype, device=DEVICE)
    got, want = run(x)
    for name in ("o", "dq", "dk", "dv", "dbeta", "dg"):
        assert got[name].dtype == dtype, name
    check(got, want, ROUNDING[dtype])
    assert relative_error(got["final"], want["final"]) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("gate", [None, 1.0])
def test_errors_rebuilt_in_the_backward_are_those_of_the_forward(gate: float | None) -> None:
    """Interpreted to the last bit; compiled for sm_80, the two kernels do not round every product before its sum alike."""
    limit = 0.0 if DEVICE == "cpu" else ROUNDING[torch.float32]
    x = make_inputs(B=1, T=6, H=1, K=16, V=20, gate=gate, state=True, dtype=torch.float32, device=DEVICE)
    kept, lean = (run(x, save=save)[0] for save in ("states", "lean"))
    for name in kept:
        assert kept[name] is lean[name] is None or relative_error(kept[name], lean[name]) <= limit, name


def test_without_states_nothing_is_returned_for_them() -> None:
    x = make_inputs(B=2, T=5, H=1, K=16, V=16, gate=0.5, dtype=torch.float32, device=DEVICE)
    got, want = run(x, dfinal=False)
    assert got["dinitial_state"] is None
    check(got, want, ROUNDING[torch.float32])
    o, final, saved = recurrent.recurrent_forward(
        x.q, x.k, x.v, x.beta, x.g, 0.3, None, None, output_final_state=False, save="nothing"
    )
    assert final is None
    assert saved == []
    assert torch.equal(o, got["o"])


def test_any_strides() -> None:
    """Slices of one projection, heads before tokens, every second element, an expanded gradient."""
    x = make_inputs(B=2, T=5, H=2, K=16, V=16, gate=0.5, dtype=torch.float32, device=DEVICE)
    fused = torch.cat([x.q, x.k, x.v], -1)
    y = Inputs(**vars(x))
    y.q, y.k = fused[..., :16], fused[..., 16:32]
    y.v = x.v.transpose(1, 2).contiguous().transpose(1, 2)
    y.beta = torch.stack([x.beta, x.beta], -1)[..., 0]
    y.do = x.do[:, :1, :1, :1].expand_as(x.do)
    x.do = y.do.contiguous()
    assert not any(z.is_contiguous() for z in (y.q, y.k, y.v, y.beta, y.do))
    others, _ = run(y)
    for name, one in run(x)[0].items():
        other = others[name]
        assert one is other is None or torch.equal(one, other), name


def test_packed_equals_separate_bit_for_bit() -> None:
    lengths = [3, 0, 1, 4]
    x = make_inputs(H=1, HV=2, K=16, V=16, gate=1.0, state=True, lengths=lengths, dtype=torch.float32, device=DEVICE)
    packed, _ = run(x)
    start = 0
    for n, length in enumerate(lengths):
        part = {name: getattr(x, name)[:, start : start + length] for name in ("q", "k", "v", "beta", "g", "do")}
        one = Inputs(**part, initial_state=x.initial_state[n : n + 1], cu_seqlens=None, dfinal_state=x.dfinal_state[n : n + 1])
        alone, _ = run(one)
        for name in ("o", "dq", "dk", "dv", "dbeta"):
            assert torch.equal(packed[name][:, start : start + length], alone[name]), (name, n)
        assert relative_error(packed["dg"][:, start : start + length], alone["dg"]) < 1e-6
        assert torch.equal(packed["final"][n : n + 1], alone["final"])
        start += length


@pytest.mark.parametrize("g", [0.0, -1e-4, -1.0, -20.0, -80.0])
def test_gates_from_none_to_forgetting_everything(g: float) -> None:
    """Each gradient is right on the scale of its terms; the gate's own terms cancel when nothing is remembered, so its scale is dq's."""
    x = make_inputs(B=1, T=8, H=1, K=16, V=16, gate=1.0, dtype=torch.float32, device=DEVICE)
    x.g = torch.full_like(x.g, g)
    got, want = run(x, dfinal=False)
    dg, want_dg = got.pop("dg"), want.pop("dg")
    check(got, want, ROUNDING[torch.float32])
    scale_of_terms = (x.q.double() * want["dq"]).sum(-1).norm().item()
    assert (dg.double() - want_dg).norm().item() <= 2e-6 * max(scale_of_terms, want_dg.norm().item())


def test_orthonormal_keys_are_recalled() -> None:
    """With beta 1 every pair is read back exactly, and beta 0 writes nothing."""
    K = V = 16
    k = torch.eye(K, device=DEVICE).view(1, K, 1, K)
    v = torch.randn(1, K, 1, V, device=DEVICE)
    ones = torch.ones(1, K, 1, device=DEVICE)
    o, final, _ = recurrent.recurrent_forward(k, k, v, ones, None, 1.0, None, None, output_final_state=True, save="nothing")
    assert torch.equal(o, v)
    assert torch.equal(final[0, 0], v[0, :, 0])
    o, final, _ = recurrent.recurrent_forward(
        k, k, v, 0 * ones, None, 1.0, None, None, output_final_state=True, save="nothing"
    )
    assert not o.any()
    assert not final.any()


# Decode


def step_inputs(**kwargs) -> Inputs:
    return make_inputs(**{"B": 3, "T": 1, "H": 2, "HV": 4, "K": 20, "V": 36, "state": True, **kwargs}, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("gate", [None, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_decode_is_one_step_of_the_definition(gate: float | None, inplace: bool) -> None:
    x = step_inputs(gate=gate)
    state = x.initial_state.clone()
    want_o, want_state = definition.delta_rule(x.q, x.k, x.v, x.beta, x.g, 0.3, x.initial_state)
    o, new = decode_step(x.q, x.k, x.v, x.beta, x.g, 0.3, state, inplace=inplace)
    assert (new is state) == inplace
    assert relative_error(o, want_o) < 1e-6
    assert relative_error(new, want_state) < 1e-6
    if not inplace:
        assert torch.equal(state, x.initial_state)


def test_decode_without_a_state_starts_from_zero() -> None:
    x = step_inputs(gate=1.0)
    want_o, want_state = definition.delta_rule(x.q, x.k, x.v, x.beta, x.g, 0.3)
    o, new = decode_step(x.q, x.k, x.v, x.beta, x.g, 0.3, None)
    assert relative_error(o, want_o) < 1e-6
    assert relative_error(new, want_state) < 1e-6
    with pytest.raises(ValueError, match="inplace needs a state"):
        decode_step(x.q, x.k, x.v, x.beta, x.g, 0.3, None, inplace=True)


def test_decode_writes_into_a_pool_and_nowhere_else() -> None:
    x = step_inputs()
    pool = torch.full((3, 9, 20, 36), 7.0, device=DEVICE)
    pool[:, 2:6] = x.initial_state
    _, want = definition.delta_rule(x.q, x.k, x.v, x.beta, None, 0.3, x.initial_state)
    decode_step(x.q, x.k, x.v, x.beta, None, 0.3, pool[:, 2:6], inplace=True)
    assert relative_error(pool[:, 2:6], want) < 1e-6
    assert (pool[:, :2] == 7).all()
    assert (pool[:, 6:] == 7).all()
    with pytest.raises(ValueError, match=r"contiguous \[K, V\]"):
        decode_step(x.q, x.k, x.v, x.beta, None, 0.3, pool[:, 2:6].mT.contiguous().mT, inplace=True)


def test_decode_of_an_empty_batch() -> None:
    x = step_inputs(B=0)
    o, new = decode_step(x.q, x.k, x.v, x.beta, None, 0.3, x.initial_state)
    assert o.shape == (0, 1, 4, 36)
    assert new.shape == (0, 4, 20, 36)


def test_steps_follow_the_sequence() -> None:
    x = make_inputs(B=2, T=4, H=1, HV=2, K=16, V=16, gate=0.5, dtype=torch.float32, device=DEVICE)
    o, final, _ = recurrent.recurrent_forward(
        x.q, x.k, x.v, x.beta, x.g, 0.3, None, None, output_final_state=True, save="nothing"
    )
    state = None
    for t in range(4):
        step = slice(t, t + 1)
        one, state = decode_step(x.q[:, step], x.k[:, step], x.v[:, step], x.beta[:, step], x.g[:, step], 0.3, state)
        assert relative_error(one, o[:, step]) < 1e-6
    assert relative_error(state, final) < 1e-6
