"""The language model: the paper's parameter counts, one forward in many ways, losses in pieces, and what it refuses."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from deltanet.layers import DeltaNet, DeltaNetConfig
from deltanet.models import SIZES, LanguageModel, ModelConfig, preset
from deltanet.models import language_model as module

CONFIG = ModelConfig(vocab_size=31, d_model=16, depth=2, layers=(DeltaNetConfig(heads=2),), feed_forward=24)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG).double()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "count"), [("340m", 374_362_112), ("1.3b", 1_365_677_056)])
def test_the_papers_sizes(size: str, count: int) -> None:
    with torch.device("meta"):
        assert LanguageModel(preset(size)).parameter_count() == count


def test_every_preset_builds() -> None:
    counts = []
    for size in SIZES:
        with torch.device("meta"):
            counts.append(LanguageModel(preset(size)).parameter_count())
    assert counts == sorted(counts)
    with pytest.raises(ValueError, match=r"Did you mean '340m'\?"):
        preset("340")


def test_names_map_onto_flas() -> None:
    """One to one, in order: a checkpoint is converted by renaming (fla's DeltaNetForCausalLM, version 0.6.0)."""
    ours = set(LanguageModel(CONFIG).state_dict())
    rename = {"mixer_norm": "attn_norm", "feed_forward_norm": "mlp_norm", "mixer": "attn", "feed_forward": "mlp"}
    rename |= {"q_conv": "q_conv1d", "k_conv": "k_conv1d", "v_conv": "v_conv1d"}
    theirs = {".".join(rename.get(part, part) for part in name.split(".")) for name in ours}
    layer = [
        "attn_norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.b_proj", "attn.q_conv1d", "attn.k_conv1d",
        "attn.v_conv1d", "attn.o_norm", "attn.o_proj", "mlp_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    assert theirs == expected | {"embeddings.weight", "norm.weight", "lm_head.weight"}


def test_streaming_packing_and_padding_are_the_full_forward(model: LanguageModel) -> None:
    tokens = ids(2, 70)
    full, none = model(tokens)
    assert none is None

    state, parts = model.init_state(2), []
    for part in tokens.split([1, 1, 64, 4], 1):
        logits, state = model(part, state)
        parts.append(logits)
    assert relative_error(torch.cat(parts, 1), full) < 1e-12

    packed, _ = model(tokens.view(1, -1), cu_seqlens=torch.tensor([0, 70, 140]))
    assert relative_error(packed.view_as(full), full) < 1e-12

    padded = torch.cat([ids(2, 5), tokens], 1)
    mask = torch.ones(2, 75, dtype=torch.bool)
    mask[:, :5] = False
    left, _ = model(padded, mask=mask)
    assert relative_error(left[:, 5:], full) < 1e-12


def test_losses_are_cross_entropy(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, targets = ids(2, 30), ids(2, 30).roll(1, 1)
    targets[0, 3] = -100
    logits, _ = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 30)
    losses = model.losses(tokens, targets)
    assert losses[0, 3] == 0
    torch.testing.assert_close(losses, expected)
    wanted = torch.autograd.grad(losses.sum(), list(model.parameters()))

    monkeypatch.setattr(module, "LOGITS", 31 * 7)  # seven tokens at a time
    pieces = model.losses(tokens, targets)
    torch.testing.assert_close(pieces, expected)
    for got, want in zip(torch.autograd.grad(pieces.sum(), list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want)


class Products(TorchDispatchMode):
    """Counts products of matrices, the delta rule, and everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.expensive = self.others = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        expensive = op._opname in module.EXPENSIVE
        self.expensive, self.others = self.expensive + expensive, self.others + (not expensive)
        return op(*args, **(kwargs or {}))


def test_recomputing_changes_memory_alone(model: LanguageModel) -> None:
    tokens, targets = ids(2, 70), ids(2, 70).roll(1, 1)
    gradients, counted = {}, {}
    for model.recompute in ("nothing", "cheap", "blocks"):
        with Products() as products:
            gradients[model.recompute] = torch.autograd.grad(model.losses(tokens, targets).sum(), list(model.parameters()))
        counted[model.recompute] = products
    for other in ("cheap", "blocks"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["nothing"], gradients[other], strict=True))
        assert counted[other].others > counted["nothing"].others
    assert counted["cheap"].expensive == counted["nothing"].expensive
    rules = sum(isinstance(module, DeltaNet) for module in model.modules())
    assert counted["blocks"].expensive > counted["nothing"].expensive + rules


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
def test_recomputing_blocks_compile_whole(model: LanguageModel, recompute: str) -> None:
    tokens, targets = ids(2, 70), ids(2, 70).roll(1, 1)
    wanted = torch.autograd.grad(model.losses(tokens, targets).sum(), list(model.parameters()))
    model.recompute = recompute
    model._train_block = torch.compile(module._train_block, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(model.losses(tokens, targets).sum(), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_tied_head_is_one_matrix() -> None:
    tied = LanguageModel(ModelConfig(vocab_size=31, d_model=16, depth=1, tie_embeddings=True))
    untied = LanguageModel(ModelConfig(vocab_size=31, d_model=16, depth=1))
    assert tied.lm_head.weight is tied.embeddings.weight
    assert untied.parameter_count() - tied.parameter_count() == 31 * 16


def test_initialisation() -> None:
    config = ModelConfig(vocab_size=500, d_model=64, depth=8, layers=(DeltaNetConfig(heads=2),), init_std=0.05)
    model = LanguageModel(config)
    model.init_weights(torch.Generator().manual_seed(3))
    weights = model.state_dict()
    assert weights["layers.0.mixer.q_proj.weight"].std() == pytest.approx(0.05, rel=0.05)
    assert weights["layers.0.mixer.o_proj.weight"].std() == pytest.approx(0.05 / 4, rel=0.05)
    assert weights["layers.0.mixer.q_conv.weight"].abs().max() <= 0.5
    assert torch.equal(weights["norm.weight"], torch.ones(64))
    again = LanguageModel(config)
    again.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(again.state_dict()[n], w) for n, w in weights.items())


def test_flops_are_six_a_parameter_and_the_rule() -> None:
    """Six FLOPs a matrix parameter and token, embeddings aside, and the chunked rule's own (docs/math.md 5)."""
    with torch.device("meta"):
        model = LanguageModel(preset("340m"))
    matrices = model.parameter_count() - model.embeddings.weight.numel()
    rule = 3 * 24 * 8 * (4 * 64 * 128 * 2 + 6 * 128 * 128)
    assert model.flops_per_token(2048) == pytest.approx(6 * matrices + rule, rel=1e-3)


def test_state_bytes_are_the_states() -> None:
    model = LanguageModel(CONFIG)
    assert model.state_bytes(3) == 3 * 2 * 4 * (2 * 8 * 8 + 3 * (16 + 16 + 16))


def test_mixed_patterns_repeat() -> None:
    mixers = (DeltaNetConfig(heads=2), DeltaNetConfig(heads=1, short_conv=0))
    model = LanguageModel(ModelConfig(vocab_size=31, d_model=16, depth=4, layers=mixers))
    assert [block.mixer.heads for block in model.layers] == [2, 1, 2, 1]


def test_compiles_whole(model: LanguageModel) -> None:
    tokens = ids(2, 70)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])


BAD = [
    (dict(vocab_size=0), "vocab_size must be between 1 and 16777216, got 0"),
    (dict(vocab_size=9, d_model=10**9), "d_model must be between 1 and 65536, got 1000000000"),
    (dict(vocab_size=9, depth=-2), "depth must be between 1 and 1024, got -2"),
    (
        dict(vocab_size=9, depth=3, layers=(DeltaNetConfig(), DeltaNetConfig())),
        "depth must be a multiple of the pattern's 2",
    ),
    (dict(vocab_size=9, layers=()), "depth must be a multiple of the pattern's 0"),
    (dict(vocab_size=9, init_std=0.0), "init_std must be between 0 and 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_config_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**options)


def test_tokens_are_checked(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=re.escape("tokens must be integer ids [B, T], got torch.float32 [2, 3]")):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="give mask or cu_seqlens, not both"):
        model(ids(1, 4), mask=torch.ones(1, 4, dtype=torch.bool), cu_seqlens=torch.tensor([0, 4]))
