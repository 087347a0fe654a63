"""The channel-wise gate: the paper's matrices, the scalar gate as a special case, and what a single channel forgets."""

import torch
from support import make_inputs, relative_error

from deltanet.reference import channel_gated_delta_rule, recurrent


def test_is_the_papers_product_of_matrices() -> None:
    """S_t = S_{t-1} Diag(alpha_t) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T with S in V x K."""
    x = make_inputs(T=20, K=6, V=5, state=True)
    g = -torch.rand(2, 20, 2, 6, dtype=torch.float64)
    o, final = channel_gated_delta_rule(x.q, x.k, x.v, x.beta, g, 0.5, x.initial_state)
    state, eye = x.initial_state.mT, torch.eye(6, dtype=torch.float64)
    for t in range(20):
        k, v, b = x.k[:, t, :, :, None], x.v[:, t, :, :, None], x.beta[:, t, :, None, None]
        state = state @ (g[:, t].exp()[..., None] * eye) @ (eye - b * k @ k.mT) + b * v @ k.mT
        assert relative_error(o[:, t], 0.5 * (state @ x.q[:, t, :, :, None]).squeeze(-1)) < 1e-13
    assert relative_error(final, state.mT) < 1e-13


def test_one_decay_for_all_channels_is_the_gated_rule() -> None:
    x = make_inputs(T=20, K=6, V=5, gate=1.0, state=True)
    g = x.g[..., None].expand_as(x.k)
    got = channel_gated_delta_rule(x.q, x.k, x.v, x.beta, g, initial_state=x.initial_state)
    expected = recurrent.delta_rule(x.q, x.k, x.v, x.beta, x.g, initial_state=x.initial_state)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-14


def test_a_channel_forgets_alone() -> None:
    """With nothing written, each row of the state decays at its own rate."""
    x = make_inputs(B=1, T=3, H=1, K=4, V=5, beta=0.0, state=True)
    g = torch.tensor([0.0, -1.0, -2.0, -1000.0], dtype=torch.float64).expand(1, 3, 1, 4)
    _, final = channel_gated_delta_rule(x.q, x.k, x.v, x.beta, g, initial_state=x.initial_state)
    assert relative_error(final, (3 * g[:, 0]).exp()[..., None] * x.initial_state) < 1e-14
    assert not final[0, 0, 3].any()


def test_gradients() -> None:
    x = make_inputs(B=1, T=4, H=1, K=3, V=2, state=True)
    g = -torch.rand(1, 4, 1, 3, dtype=torch.float64)
    leaves = [z.detach().requires_grad_() for z in (x.q, x.k, x.v, x.beta, g, x.initial_state)]
    assert torch.autograd.gradcheck(lambda *z: channel_gated_delta_rule(*z[:5], 1.0, z[5]), leaves)
