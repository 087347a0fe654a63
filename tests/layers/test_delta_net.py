"""The layer: its definition written a second way, streaming, packing, padding, and what it refuses."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import relative_error

from deltanet.layers import DeltaNet, DeltaNetConfig, concatenate, reorder, snapshot
from deltanet.reference import recurrent

D = 24
CONFIGS = {
    "paper": DeltaNetConfig(heads=3),
    "no_conv": DeltaNetConfig(heads=3, short_conv=0),
    "conv2_gate": DeltaNetConfig(heads=2, short_conv=2, output_gate=True),
    "grouped": DeltaNetConfig(heads=2, value_heads=4, head_dim=6, expand_v=1.5, negative_eigenvalues=True),
    "schlag": DeltaNetConfig(heads=3, feature_map="elu1", qk_norm="sum"),
    "relu": DeltaNetConfig(heads=1, feature_map="relu"),
    "identity": DeltaNetConfig(heads=4, feature_map="identity"),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> DeltaNet:
    torch.manual_seed(0)
    layer = DeltaNet(D, CONFIGS[request.param]).double()
    for p in layer.parameters():
        p.data.normal_(std=0.5)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(layer: DeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The layer again, from the paper's figure: Conv1d instead of taps, the recurrence instead of chunks."""
    c = layer.config

    def project(name: str) -> torch.Tensor:
        y = x @ getattr(layer, f"{name}_proj").weight.T
        if c.short_conv:
            weight = getattr(layer, f"{name}_conv").weight
            y = F.conv1d(F.pad(y.mT, (c.short_conv - 1, 0)), weight, groups=len(weight)).mT
        return y

    act = {"silu": F.silu, "relu": F.relu, "elu1": lambda z: F.elu(z) + 1, "identity": lambda z: z}[c.feature_map]
    q, k = (act(project(n)).unflatten(-1, (c.heads, -1)) for n in "qk")
    if c.qk_norm == "l2":
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    else:
        q, k = (z / (z.sum(-1, keepdim=True) + 1e-6) for z in (q, k))
    v = F.silu(project("v")).unflatten(-1, (c.value_heads or c.heads, -1))
    beta = torch.sigmoid(x @ layer.b_proj.weight.T) * (2 if c.negative_eigenvalues else 1)
    o, _ = recurrent.delta_rule(q, k, v, beta)
    o = o / (o.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * layer.o_norm.weight
    if c.output_gate:
        o = o * F.silu(x @ layer.g_proj.weight.T).view_as(o)
    return o.flatten(-2) @ layer.o_proj.weight.T


def test_is_the_papers_layer(layer: DeltaNet) -> None:
    x = tokens(2, 70)
    y, state = layer(x)
    assert state is None
    assert relative_error(y, by_hand(layer, x)) < 1e-12


@pytest.mark.parametrize("sizes", [[1] * 5 + [65], [64, 1, 2, 3], [2, 68]])
def test_streams_by_token_and_segment(layer: DeltaNet, sizes: list[int]) -> None:
    x = tokens(2, 70)
    whole, _ = layer(x)
    state, parts = layer.init_state(2), []
    for part in x.split(sizes, 1):
        y, state = layer(part, state)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-12


def test_packed_sequences_do_not_leak(layer: DeltaNet) -> None:
    """Values equal those of each sequence alone, and no gradient crosses a boundary, in the convolution either."""
    lengths = [3, 0, 1, 66, 2]
    x = tokens(1, sum(lengths)).requires_grad_()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    y, _ = layer(x, cu_seqlens=cu_seqlens)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone, _ = layer(x[:, start:end])
        assert relative_error(y[:, start:end], alone) < 1e-12
        (dx,) = torch.autograd.grad(y[:, start:end].sum(), x, retain_graph=True)
        outside = torch.cat([dx[:, :start], dx[:, end:]], 1)
        assert torch.equal(outside, torch.zeros_like(outside))


def test_packed_sequences_stream(layer: DeltaNet) -> None:
    """Segments of several sequences, packed, with a state each: some shorter than the convolution's tail, some empty."""
    x = tokens(3, 9)
    whole, _ = layer(x)
    state, position, got = layer.init_state(3), [0, 0, 0], [[], [], []]
    for lengths in ([1, 0, 4], [0, 2, 1], [3, 6, 1], [5, 1, 3]):
        pieces = [x[n : n + 1, position[n] : position[n] + length] for n, length in enumerate(lengths)]
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        y, state = layer(torch.cat(pieces, 1), state, cu_seqlens=cu_seqlens)
        for n, piece in enumerate(y.split(lengths, 1)):
            got[n].append(piece)
            position[n] += lengths[n]
    for n in range(3):
        assert relative_error(torch.cat(got[n], 1), whole[n : n + 1]) < 1e-12


@pytest.mark.parametrize("where", ["left", "right", "inside", "everything"])
def test_padding_changes_nothing(layer: DeltaNet, where: str) -> None:
    mask = torch.ones(2, 12, dtype=torch.bool)
    index = {"left": slice(0, 5), "right": slice(7, 12), "inside": slice(2, 9, 2), "everything": slice(0, 12)}[where]
    mask[1, index] = False
    x = tokens(2, 12)
    y, state = layer(x, layer.init_state(2), mask=mask)
    alone, alone_state = layer(x[1:, mask[1]], layer.init_state(1))
    assert relative_error(y[1:, mask[1]], alone) < 1e-12
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for part, expected in zip(state, alone_state, strict=True):
        assert relative_error(part[1:], expected) < 1e-12


def test_state_goes_on_after_padding(layer: DeltaNet) -> None:
    x = tokens(2, 12)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    _, state = layer(x[:, :8], layer.init_state(2), mask=mask)
    y, _ = layer(x[:, 8:], state)
    assert relative_error(y[1:], layer(x[1:, 3:])[0][:, 5:]) < 1e-12


def test_snapshot_reorder_concatenate(layer: DeltaNet) -> None:
    x = tokens(3, 6)
    _, state = layer(x[:, :4], layer.init_state(3))
    kept = snapshot(state)
    first, _ = layer(x[:, 4:], state)
    again, _ = layer(x[:, 4:], kept)
    assert torch.equal(first, again)
    index = torch.tensor([2, 0, 0, 1])
    picked, _ = layer(x[index, 4:], reorder(kept, index))
    assert relative_error(picked, first[index]) < 1e-13
    joined, _ = layer(x[:, 4:], concatenate([reorder(kept, torch.tensor([0])), reorder(kept, torch.tensor([1, 2]))]))
    assert torch.equal(joined, first)


def test_batch_invariant(layer: DeltaNet) -> None:
    x = tokens(4, 20)
    y, _ = layer(x)
    for n in range(4):
        assert relative_error(layer(x[n : n + 1])[0], y[n : n + 1]) < 1e-13


def test_gradients_at_zero_are_finite() -> None:
    """A zero token has zero q and k; the normalisation must not divide by their norm."""
    layer = DeltaNet(D, CONFIGS["paper"])
    x = torch.zeros(1, 5, D, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_beta_range() -> None:
    """With negative eigenvalues beta passes 1, so that writing can flip the sign of what is stored."""
    torch.manual_seed(0)
    plain, flipping = (
        DeltaNet(D, DeltaNetConfig(heads=1, negative_eigenvalues=n)).requires_grad_(False) for n in (False, True)
    )
    flipping.load_state_dict(plain.state_dict())
    for layer in (plain, flipping):
        layer.b_proj.weight.fill_(100.0)
    x = torch.ones(1, 1, D)
    state = plain.init_state(1)
    memory = torch.randn_like(state.memory)
    plain_after, flipped_after = (layer(x, state._replace(memory=memory))[1].memory for layer in (plain, flipping))
    torch.testing.assert_close(flipped_after - memory, 2 * (plain_after - memory))


def test_compiles_whole() -> None:
    layer = DeltaNet(D, CONFIGS["conv2_gate"])
    x = torch.randn(2, 70, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = DeltaNet(D, CONFIGS["paper"])
    x = torch.randn(2, 70, D)
    wide, _ = layer(x)
    narrow, state = layer.to(dtype)(x.to(dtype), layer.init_state(2))
    assert narrow.dtype == dtype
    assert state.memory.dtype == torch.float32
    assert relative_error(narrow, wide) < 20 * torch.finfo(dtype).eps


def test_state_size_is_what_the_paper_counts() -> None:
    """128 d_model numbers a layer at head dimension 128 (the paper's state expansion column), beside the convolution's tails."""
    layer = DeltaNet(1024, DeltaNetConfig(heads=8))
    assert layer.init_state(1).memory.numel() == 128 * 1024


BAD = [
    (dict(heads=0), "heads must be between 1 and 4096, got 0"),
    (dict(heads=4, value_heads=6), "value_heads must be a multiple of heads = 4, got 6"),
    (dict(expand_v=0.0), "expand_v must be above 0"),
    (dict(short_conv=-1), "short_conv must be a width between 0 (none) and 64, got -1"),
    (dict(feature_map="gelu"), "feature_map must be one of silu, relu, elu1, identity, got 'gelu'"),
    (dict(qk_norm="l1"), "qk_norm must be one of l2, sum, got 'l1'"),
    (dict(qk_norm="sum"), "qk_norm sum needs positive features"),
    (dict(norm_eps=0.0), "norm_eps must be between 0 and 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_config_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DeltaNetConfig(**options)


def test_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="heads must divide d_model = 10, got 4"):
        DeltaNet(10, DeltaNetConfig(heads=4))
    layer = DeltaNet(D, CONFIGS["paper"])
    with pytest.raises(ValueError, match=re.escape("x must be [B, T, d_model] = [B, T, 24], got [2, 5, 3]")):
        layer(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="give mask or cu_seqlens, not both"):
        layer(torch.zeros(1, 5, D), mask=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="mask must be bool"):
        layer(torch.zeros(1, 5, D), mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match=re.escape("mask must be [B, T] = [1, 5], got [1, 4]")):
        layer(torch.zeros(1, 5, D), mask=torch.ones(1, 4, dtype=torch.bool))
