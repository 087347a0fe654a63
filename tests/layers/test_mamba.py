"""The selective scan against its definition in fp64, the Mamba layer written a second way, its first values, and what it refuses."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor

from deltanet.layers import Mamba, MambaConfig
from deltanet.layers.selective_scan import selective_scan


def definition(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t, y_t = C_t . h_t; h is `[N, S, D]`."""
    outputs = []
    for t in range(u.shape[1]):
        h = (dt[:, t, None] * A.T).exp() * h + (dt * u)[:, t, None] * B[:, t, :, None]
        outputs.append((C[:, t, :, None] * h).sum(1))
    return torch.stack(outputs, 1), h


def make(T: int, batch: int = 2, N: int = 2) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    D, S = 5, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    u, dt, A = normal(batch, T, D), normal(batch, T, D).abs(), -normal(D, S).abs()
    return [u, dt, A, normal(batch, T, S), normal(batch, T, S), normal(N, S, D)]


@pytest.mark.parametrize("T", [1, 2, 7, 64, 65, 150])
def test_the_scan_is_the_recurrence(T: int) -> None:
    leaves = [x.requires_grad_() for x in make(T)]
    *args, state = leaves
    y, final = selective_scan(*args, initial_state=state)
    expected, expected_final = definition(*leaves)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(final, expected_final) < 1e-12
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    got = torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), leaves)
    wanted = torch.autograd.grad((expected * dy).sum() + (expected_final * dfinal).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < 1e-11


def test_the_scan_of_packed_sequences_is_that_of_each() -> None:
    bounds = [0, 3, 3, 70, 71, 200]
    u, dt, A, B, C, state = make(200, batch=1, N=5)
    y, final = selective_scan(u, dt, A, B, C, initial_state=state, cu_seqlens=torch.tensor(bounds))
    for n in (0, 2, 3, 4):
        part = slice(bounds[n], bounds[n + 1])
        expected, expected_final = definition(u[:, part], dt[:, part], A, B[:, part], C[:, part], state[n : n + 1])
        assert relative_error(y[:, part], expected) < 1e-12
        assert relative_error(final[n : n + 1], expected_final) < 1e-12
    assert torch.equal(final[1], state[1])


def test_autocast_does_not_reach_inside_the_scan() -> None:
    *args, state = (x.float() for x in make(70))
    y, final = selective_scan(*args, initial_state=state)
    with torch.autocast("cpu", torch.bfloat16):
        again, final_again = selective_scan(*args, initial_state=state)
    assert torch.equal(again, y)
    assert torch.equal(final_again, final)


@pytest.mark.parametrize("short_conv", [0, 4])
def test_is_the_papers_layer(short_conv: int) -> None:
    torch.manual_seed(0)
    layer = Mamba(24, MambaConfig(state=5, short_conv=short_conv)).double()
    for p in layer.parameters():
        p.data.normal_(std=0.5)
    x = torch.randn(2, 70, 24, dtype=torch.float64)
    u, z = (x @ layer.in_proj.weight.T).split(48, -1)
    if short_conv:
        u = F.conv1d(F.pad(u.mT, (3, 0)), layer.conv.weight, layer.conv_bias, groups=48).mT
    u = F.silu(u)
    r, B, C = (u @ layer.x_proj.weight.T).split([2, 5, 5], -1)
    dt = torch.log1p((r @ layer.dt_proj.weight.T + layer.dt_proj.bias).exp())
    y, _ = definition(u, dt, -layer.A_log.exp(), B, C, torch.zeros(2, 5, 48, dtype=torch.float64))
    y = (y + u * layer.D) * F.silu(z)
    assert relative_error(layer(x)[0], y @ layer.o_proj.weight.T) < 1e-12


def test_first_values() -> None:
    """Decays 1 .. S, D 1, and steps log-uniform in [1e-3, 1e-1] (arXiv 2312.00752, section 3.6)."""
    layer = Mamba(512)
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    assert torch.equal(layer.D, torch.ones(1024))
    steps = F.softplus(layer.dt_proj.bias.detach())
    assert 1e-3 * 0.99 < steps.min() < 1.1e-3
    assert 0.9e-1 < steps.max() < 1e-1 * 1.01
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=0.15)
    assert layer.dt_proj.weight.abs().max() <= 32**-0.5


BAD = [
    (dict(state=0), "state must be between 1 and 4096, got 0"),
    (dict(expand=0.0), "expand must be above 0 and at most 64, got 0.0"),
    (dict(step_rank=0), "step_rank must be between 1 and 65536, got 0"),
    (dict(short_conv=-1), "short_conv must be a width between 0 (none) and 64, got -1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_config_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MambaConfig(**options)
