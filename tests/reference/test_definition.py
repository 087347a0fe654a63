"""The definition itself: what the delta rule must do whatever the numbers, and its written-out backward against autograd."""

import pytest
import torch
from support import make_inputs, relative_error

from deltanet.reference import recurrent


def test_orthonormal_keys_are_recalled_exactly() -> None:
    """With beta 1 and orthonormal keys the memory is a dictionary, and writing a key again replaces its value."""
    K, V = 8, 5
    keys = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64)).Q
    first, second = torch.randn(2, K, V, dtype=torch.float64)
    k = torch.cat([keys, keys])[None, :, None]
    v = torch.cat([first, second])[None, :, None]
    _, state = recurrent.delta_rule(k, k, v, torch.ones(1, 2 * K, 1, dtype=torch.float64))
    torch.testing.assert_close(keys @ state[0, 0], second)


def test_beta_zero_writes_nothing() -> None:
    x = make_inputs(beta=0.0, state=True)
    _, state = recurrent.delta_rule(x.q, x.k, x.v, x.beta, initial_state=x.initial_state)
    assert torch.equal(state, x.initial_state)


def test_beta_two_reflects() -> None:
    """beta = 2 and v = 0 apply a Householder reflection, so applying it twice gives the state back."""
    x = make_inputs(B=1, T=2, HV=2, beta=2.0, keys="identical", state=True)
    _, state = recurrent.delta_rule(x.q, x.k, torch.zeros_like(x.v), x.beta, initial_state=x.initial_state)
    torch.testing.assert_close(state, x.initial_state)


def test_gate_forgets() -> None:
    x = make_inputs(T=3, beta=0.0, state=True)
    g = torch.full_like(x.beta, -0.5)
    _, state = recurrent.delta_rule(x.q, x.k, x.v, x.beta, g, initial_state=x.initial_state)
    torch.testing.assert_close(state, x.initial_state * torch.tensor(-1.5, dtype=torch.float64).exp())


@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("lengths", [None, [0, 3, 1, 5, 0]])
@pytest.mark.parametrize("HV", [2, 4])
def test_backward_is_autograd(gate: float | None, lengths: list[int] | None, HV: int) -> None:
    x = make_inputs(B=2, T=7, H=2, HV=HV, K=4, V=3, gate=gate, state=True, lengths=lengths)
    leaves = x.leaves()
    o, state = recurrent.delta_rule(**leaves, scale=0.7, cu_seqlens=x.cu_seqlens)
    expected = torch.autograd.grad([o, state], list(leaves.values()), [x.do, x.dfinal_state])
    got = recurrent.backward(x.do, x.dfinal_state, x.q, x.k, x.v, x.beta, x.g, 0.7, x.initial_state, x.cu_seqlens, [])
    found = dict(zip(("q", "k", "v", "beta", "g", "initial_state"), got, strict=True))
    for name, gradient in zip(leaves, expected, strict=True):
        assert relative_error(found[name], gradient) < 1e-13, name


def test_double_backward() -> None:
    """The definition is plain PyTorch, so second derivatives exist."""
    x = make_inputs(B=1, T=3, H=1, K=3, V=2)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, beta: recurrent.delta_rule(q, k, v, beta)[0],
        [t.requires_grad_() for t in (x.q, x.k, x.v, x.beta)],
    )
