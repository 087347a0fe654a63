"""Chunked equals recurrent in fp64: outputs, states and every gradient, on awkward shapes; and the parallel form too."""

import pytest
import torch
from support import make_inputs, relative_error

from deltanet import reference
from deltanet.reference import chunkwise, recurrent

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
SHAPES = [
    dict(B=1, T=1, H=1, K=4, V=4),
    dict(B=2, T=63, H=2, K=16, V=8),
    dict(B=1, T=64, H=1, K=8, V=24),
    dict(B=2, T=65, H=1, HV=3, K=8, V=5),
    dict(B=1, T=200, H=2, HV=4, K=20, V=12),
    dict(B=3, T=0, H=1, K=4, V=4),
    dict(H=2, HV=2, K=8, V=6, lengths=[0, 1, 64, 0, 65, 130, 1, 0]),
    dict(H=1, HV=2, K=8, V=6, lengths=[7]),
    dict(H=1, K=8, V=6, lengths=[1] * 20),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [None, 0.2, 30.0])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("save", ["states", "lean"])
def test_chunked_is_recurrent(shape: dict, gate: float | None, state: bool, save: str) -> None:
    x = make_inputs(**shape, gate=gate, state=state)
    scale = 0.3
    args = (x.q, x.k, x.v, x.beta, x.g, scale, x.initial_state, x.cu_seqlens)
    expected, final = recurrent.delta_rule(*args)
    o, got_final, saved = chunkwise.forward(*args, save=save)
    assert relative_error(o, expected) < 1e-12
    assert relative_error(got_final, final) < 1e-12
    promised = reference.saved(x.q, x.v, x.g, x.cu_seqlens, algorithm="chunk", save=save)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in promised]
    assert all(t.is_contiguous() for t in saved)

    for dfinal in (None, x.dfinal_state):
        wanted = recurrent.backward(x.do, dfinal, *args, [])
        found = chunkwise.backward(x.do, dfinal, *args, saved)
        for name, got, want in zip(NAMES, found, wanted, strict=True):
            assert (got is None) == (want is None), name
            if want is not None:
                # dg is a difference of terms of order 1, so under strong decay it is exact to their rounding, not its own.
                assert relative_error(got, want) < 1e-12 or (name == "g" and (got - want).abs().max() < 1e-14), name


@pytest.mark.parametrize("keys", ["relu", "correlated"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_hard_keys(keys: str, beta: float) -> None:
    x = make_inputs(T=130, keys=keys, beta=beta)
    args = (x.q, x.k, x.v, x.beta, None, 1.0, None, None)
    assert relative_error(chunkwise.forward(*args)[0], recurrent.delta_rule(*args)[0]) < 1e-11


@pytest.mark.parametrize("chunk", [1, 5, 16, 48, 128])
def test_any_chunk_length(chunk: int) -> None:
    x = make_inputs(T=77, gate=0.1, state=True)
    args = (x.q, x.k, x.v, x.beta, x.g, 1.0, x.initial_state, None)
    o, _, saved = chunkwise.forward(*args, save="states", chunk=chunk)
    assert relative_error(o, recurrent.delta_rule(*args)[0]) < 1e-12
    grads = chunkwise.backward(x.do, None, *args, saved, chunk=chunk)
    for got, want in zip(grads, recurrent.backward(x.do, None, *args, []), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("gate", [None, 0.2])
def test_parallel_is_recurrent(gate: float | None) -> None:
    x = make_inputs(T=50, H=2, HV=4, gate=gate, beta=(0.0, 1.5))
    expected, _ = recurrent.delta_rule(x.q, x.k, x.v, x.beta, x.g)
    assert relative_error(reference.parallel_delta_rule(x.q, x.k, x.v, x.beta, x.g), expected) < 1e-12
    A = reference.attention_matrix(x.q, x.k, x.beta, x.g)
    assert torch.equal(A, A.tril())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_computes_in_fp32(dtype: torch.dtype) -> None:
    """Rounded inputs, fp32 inside: the only error beyond the inputs' is the rounding of the output."""
    x = make_inputs(T=200, dtype=dtype)
    o, state, _ = chunkwise.forward(x.q, x.k, x.v, x.beta, None, 1.0, None, None)
    wide = [t.double() for t in (x.q, x.k, x.v, x.beta)]
    expected, final = recurrent.delta_rule(*wide, scale=1.0)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_error(o, expected) < max(torch.finfo(dtype).eps, 1e-6)
    assert relative_error(state, final) < 1e-6
