"""Gated DeltaNet and DeltaProduct written a second way, and where they are DeltaNet."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor

from deltanet.layers import (
    DeltaNet,
    DeltaNetConfig,
    DeltaProduct,
    DeltaProductConfig,
    GatedDeltaNet,
    GatedDeltaNetConfig,
)

D, T = 24, 66


def randomized(layer: DeltaNet) -> DeltaNet:
    torch.manual_seed(0)
    for p in layer.double().parameters():
        p.data.normal_(std=0.5)
    return layer


def convolved(layer: DeltaNet, x: Tensor, name: str) -> Tensor:
    weight = getattr(layer, f"{name}_conv").weight
    y = (x @ getattr(layer, f"{name}_proj").weight.T).mT
    return F.silu(F.conv1d(F.pad(y, (weight.shape[-1] - 1, 0)), weight, groups=len(weight)).mT)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def read_out(layer: DeltaNet, o: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + layer.config.norm_eps).sqrt() * layer.o_norm.weight


def test_gated_delta_net_is_the_papers() -> None:
    layer = randomized(GatedDeltaNet(D, GatedDeltaNetConfig(heads=2, head_dim=6)))
    x = torch.randn(2, T, D, dtype=torch.float64)
    q, k = (unit(convolved(layer, x, name).unflatten(-1, (2, 6))) for name in "qk")
    v = convolved(layer, x, "v").unflatten(-1, (2, 12))
    beta = torch.sigmoid(x @ layer.b_proj.weight.T)
    rate = torch.log1p((x @ layer.a_proj.weight.T + layer.dt_bias).exp())
    alpha = torch.exp(-layer.A_log.exp() * rate)
    state, outputs = torch.zeros(2, 2, 12, 6, dtype=torch.float64), []  # the paper's S is V x K
    eye = torch.eye(6, dtype=torch.float64)
    for t in range(T):
        K, V, b, a = k[:, t, :, :, None], v[:, t, :, :, None], beta[:, t, :, None, None], alpha[:, t, :, None, None]
        state = state @ (a * (eye - b * K @ K.mT)) + b * V @ K.mT
        outputs.append((state @ q[:, t, :, :, None]).squeeze(-1) * 6**-0.5)
    o = read_out(layer, torch.stack(outputs, 1)).flatten(-2) * F.silu(x @ layer.g_proj.weight.T)
    assert relative_error(layer(x)[0], o @ layer.o_proj.weight.T) < 1e-12


def test_gated_delta_net_without_decay_is_delta_net() -> None:
    gated = randomized(GatedDeltaNet(D, GatedDeltaNetConfig(heads=2)))
    gated.A_log.data.fill_(-100.0)
    plain = DeltaNet(D, DeltaNetConfig(heads=2, expand_v=2.0, output_gate=True)).double()
    plain.load_state_dict(
        {n: w for n, w in gated.state_dict().items() if n not in ("A_log", "dt_bias", "a_proj.weight")}
    )
    x = torch.randn(2, T, D, dtype=torch.float64)
    assert relative_error(gated(x)[0], plain(x)[0]) < 1e-12


def test_first_decays() -> None:
    """Rates up to 16 times steps of 1e-3 to 1e-1: a new layer forgets at most 80% at a token, and some heads next to nothing."""
    layer = GatedDeltaNet(1024, GatedDeltaNetConfig(heads=512, head_dim=2))
    decay = layer.log_decay(torch.zeros(1, 1, 1024)).flatten()
    assert -1.6 - 1e-3 < decay.min() < -0.5
    assert -0.01 < decay.max() < 0


def test_delta_product_is_a_product_of_householder_matrices() -> None:
    layer = randomized(DeltaProduct(D, DeltaProductConfig(heads=2, steps=3)))
    x = torch.randn(2, T, D, dtype=torch.float64)
    q = unit(convolved(layer, x, "q").unflatten(-1, (2, 12)))
    k = unit(convolved(layer, x, "k").unflatten(-1, (3, 2, 12)))
    v = convolved(layer, x, "v").unflatten(-1, (3, 2, 12))
    beta = 2 * torch.sigmoid(x @ layer.b_proj.weight.T).unflatten(-1, (3, 2))
    state, outputs = torch.zeros(2, 2, 12, 12, dtype=torch.float64), []
    eye = torch.eye(12, dtype=torch.float64)
    for t in range(T):
        for j in range(3):
            K, V, b = k[:, t, j, :, :, None], v[:, t, j, :, :, None], beta[:, t, j, :, None, None]
            state = (eye - b * K @ K.mT) @ state + b * K @ V.mT
        outputs.append((q[:, t, :, None] @ state).squeeze(-2) * 12**-0.5)
    o = read_out(layer, torch.stack(outputs, 1)).flatten(-2)
    assert relative_error(layer(x)[0], o @ layer.o_proj.weight.T) < 1e-12


def test_delta_product_of_one_step_is_delta_net() -> None:
    product = randomized(DeltaProduct(D, DeltaProductConfig(heads=2, steps=1)))
    plain = DeltaNet(D, DeltaNetConfig(heads=2, negative_eigenvalues=True)).double()
    plain.load_state_dict(product.state_dict())
    x = torch.randn(2, T, D, dtype=torch.float64)
    assert torch.equal(product(x)[0], plain(x)[0])


def test_flops_count_every_step() -> None:
    with torch.device("meta"):
        one, three = (DeltaProduct(64, DeltaProductConfig(heads=1, steps=n, short_conv=0)) for n in (1, 3))
    per_step = 2 * 64 * (2 * 64 + 1) + 4 * 64 * 64 * 2 + 6 * 64 * 64  # k, v, beta, and the rule
    assert three.flops_per_token(9) - one.flops_per_token(9) == 2 * per_step


def test_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be between 1 and 64, got 0"):
        DeltaProductConfig(steps=0)
    with pytest.raises(ValueError, match=re.escape("value_heads must be a multiple of heads = 4, got 6")):
        DeltaProductConfig(heads=4, value_heads=6)
