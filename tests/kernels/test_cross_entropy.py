"""The head with its cross-entropy, fused, against PyTorch in fp64. In the interpreter, or on a GPU if there is one."""

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor

pytest.importorskip("triton")

from kernels import offline

from deltanet import DeltaNetConfig, LanguageModel, ModelConfig
from deltanet.ops import cross_entropy as operator
from deltanet.ops.cross_entropy import fused_linear_cross_entropy, refuse_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows and columns: fewer than a tile's 2,048 columns, exactly so many, more
SHAPES = [(5, 7), (3, 2048), (4, 4101), (1, 1), (0, 9)]


def make(M: int, V: int, D: int = 12, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, targets, of which some are ignored, and dlosses."""
    gen = torch.Generator().manual_seed(0)
    x, weight = 2 * torch.randn(M, D, generator=gen), torch.randn(V, D, generator=gen)
    targets = torch.randint(V, (M,), generator=gen)
    targets[1::3] = -100
    return x.to(DEVICE, dtype), weight.to(DEVICE), targets.to(DEVICE), torch.randn(M, generator=gen).to(DEVICE)


def fused_and_exact(x: Tensor, weight: Tensor, targets: Tensor, dlosses: Tensor) -> list[list[Tensor]]:
    """Losses, dx and dweight of both."""
    found = []
    for dtype in (None, torch.float64):
        leaves = [z.detach().to(dtype or z.dtype).requires_grad_() for z in (x, weight)]
        if dtype is None:
            losses = fused_linear_cross_entropy(*leaves, targets)
        else:
            losses = F.cross_entropy(F.linear(*leaves), targets, reduction="none")
        found.append([losses, *torch.autograd.grad((losses * dlosses.to(losses)).sum(), leaves)])
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("logits", [2**28, 3 * 4101], ids=["whole", "pieces"])
def test_the_definition_forward_and_backward(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], logits: int) -> None:
    monkeypatch.setattr(operator, "LOGITS", logits)
    inputs = make(*shape)
    for name, got, want in zip(("losses", "dx", "dweight"), *fused_and_exact(*inputs), strict=True):
        assert relative_error(got, want) < 2e-6, f"{name}: {relative_error(got, want):.2e}"


def test_large_logits_neither_overflow_nor_vanish() -> None:
    x, weight, targets, dlosses = make(6, 100)
    for name, got, want in zip(("losses", "dx", "dweight"), *fused_and_exact(300 * x, weight, targets, dlosses), strict=True):
        assert relative_error(got, want) < 1e-5, name


def test_a_target_that_does_not_exist_gives_nan_and_reads_nothing() -> None:
    x, weight, targets, _ = make(4, 10)
    targets[:] = torch.tensor([3, 10, -1, -100])
    losses = fused_linear_cross_entropy(x, weight, targets)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert losses[3] == 0


def test_pieces_are_whole_tiles() -> None:
    assert operator._pieces(5, 2**40) == [slice(i, i + 1) for i in range(5)]
    pieces = operator._pieces(20_000, 32_000)
    assert [p.start for p in pieces] == [0, 8320, 16640]
    assert pieces[-1].stop == 20_000
    assert all((p.stop - p.start) * 32_000 <= operator.LOGITS for p in pieces)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gives_what_pytorch_gives(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    config = ModelConfig(vocab_size=50, d_model=32, depth=1, layers=(DeltaNetConfig(heads=2),), tie_embeddings=tied)
    model = LanguageModel(config).to(DEVICE)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = tokens.roll(-1, 1)
    targets[0, 4] = -100

    def both() -> list[Tensor]:
        losses = model.losses(tokens, targets)
        return [losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))]

    got = both()
    monkeypatch.setattr("deltanet.models.language_model.refuse_cross_entropy", lambda x: "off")
    for a, b in zip(got, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_cannot_run_is_refused() -> None:
    x = torch.zeros(1, 2, device=DEVICE)
    assert refuse_cross_entropy(x) is None
    assert refuse_cross_entropy(x.double()) == "it runs float32, bfloat16, float16, not float64"
    with torch.device("meta"):
        assert refuse_cross_entropy(torch.zeros(1, 2)) is not None


def test_compiles_without_spills() -> None:
    compiled = offline.compile_rows(["cross_entropy-2-257-plain", "cross_entropy-2-32000-plain"], 90, workers=1)
    assert {found.kernel for found in compiled} == {"forward", "backward"}
    assert not [problem for found in compiled for problem in offline.problems(found, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [257, 32_000])
def test_under_autocast_no_less_exact_than_pytorch_and_the_same_bits_twice(vocab: int) -> None:
    x, weight, targets, dlosses = make(3000, vocab, D=256)
    weight = weight / 16
    outcomes = []
    for how in ("fused", "fused", "torch", "exact"):
        leaves = [z.detach().to(torch.float64 if how == "exact" else z.dtype).requires_grad_() for z in (x, weight)]
        with torch.autocast("cuda", torch.bfloat16, enabled=how != "exact"):
            if how == "fused":
                losses = fused_linear_cross_entropy(*leaves, targets)
            else:
                logits = F.linear(*leaves)
                losses = F.cross_entropy(logits.float() if how == "torch" else logits, targets, reduction="none")
        outcomes.append([losses, *torch.autograd.grad((losses * dlosses.to(losses)).sum(), leaves)])
    fused, again, torchs, exact = outcomes
    for name, a, b, c, want in zip(("losses", "dx", "dweight"), fused, again, torchs, exact, strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == c.dtype
        assert relative_error(a, want) < 1.05 * relative_error(c, want), name
