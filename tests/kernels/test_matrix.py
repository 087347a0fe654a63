"""The standing matrix: inputs of every kind against fp64, each error at most 1.3 times that of the emulated pipeline on the same inputs.

All combinations would be 16,128; a fixed sample of them meets every pair of values several times. In the interpreter a few of them run in fp16.
The Hopper family runs the cells that it takes, with as many heads as its backward wants before it is chosen.

On a GPU nearly all of the time is compilation. As a script this file compiles one part of what the cells need into Triton's cache:

    for i in $(seq 0 15); do PYTHONPATH=src:tests python tests/kernels/test_matrix.py $i 16 & done; wait
    python -m pytest -n 16 tests/kernels/test_matrix.py
"""

import itertools
import random
import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kernels.emulation import emulate

from deltanet.kernels import hopper
from deltanet.reference import chunkwise

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HEADS = {"triton": 2, "hopper": 16}  # below 32 programs, heads of all sequences, the Hopper family runs the portable backward
AXES = {
    "dtype": ("bfloat16", "float16"),
    "D": (64, 128, 256),
    "T": (1, 15, 63, 64, 65, 1000, 4096),
    "state": ("none", "initial", "final", "both"),
    "packed": ("rows", "ragged", "with empty ones"),
    "beta": ("to 1", "to 2", "0", "2"),
    "keys": ("independent", "relu", "correlated", "identical"),
    "gate": ("none", "0", "mild", "strong"),
}


def sample(count: int, seed: int = 0) -> list[dict]:
    """Random cells of the matrix, dtype, D, state and gate in turn: a kernel is compiled for each combination of those."""
    rng = random.Random(seed)
    fixed = list(itertools.product(*(AXES[name] for name in ("dtype", "D", "state", "gate"))))
    rng.shuffle(fixed)
    cells = []
    for i in range(count):
        cell = {name: rng.choice(values) for name, values in AXES.items()}
        cells.append(cell | dict(zip(("dtype", "D", "state", "gate"), fixed[i % len(fixed)], strict=True)))
    return cells


def make(cell: dict, heads: int, device: str, D: int | None = None, T: int | None = None) -> tuple:
    """q, k, v, beta, g, scale, initial state, cu_seqlens, do, and the gradient of the final state."""
    gen = torch.Generator().manual_seed(1)
    dtype, D, T, H = getattr(torch, cell["dtype"]), D or cell["D"], T or cell["T"], heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    lengths = {"rows": [T, T], "ragged": [T - T // 3, T // 3], "with empty ones": [0, T // 2, 0, T - T // 2, 0]}[cell["packed"]]
    lengths = [n for n in lengths if n or cell["packed"] == "with empty ones"]
    tokens = sum(lengths)
    k = normal(tokens, H, D)
    k = {"independent": k, "relu": k.relu(), "correlated": 0.95 * normal(1, H, D) + 0.3 * k, "identical": normal(1, H, D).expand_as(k)}[cell["keys"]]
    beta = {"to 1": torch.rand(tokens, H, generator=gen), "to 2": 2 * torch.rand(tokens, H, generator=gen), "0": torch.zeros(tokens, H),
            "2": torch.full((tokens, H), 2.0)}[cell["beta"]]  # fmt: skip
    g = {"none": None, "0": torch.zeros(tokens, H), "mild": -0.1 * torch.rand(tokens, H, generator=gen),
         "strong": -20 * torch.rand(tokens, H, generator=gen)}[cell["gate"]]  # fmt: skip
    halves = (F.normalize(normal(tokens, H, D), dim=-1), F.normalize(k, dim=-1), normal(tokens, H, D), beta, normal(tokens, H, D))
    q, k, v, beta, do = (x.to(device, dtype) for x in halves)
    N = len(lengths)
    state = normal(N, H, D, D).to(device) if cell["state"] in ("initial", "both") else None
    dstate = normal(N, H, D, D).to(device) if cell["state"] in ("final", "both") else None
    rows = cell["packed"] == "rows"
    cu = None if rows else torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    shape = (N, T) if rows else (1, tokens)
    q, k, v, beta, g, do = (None if x is None else x.to(device).unflatten(0, shape).contiguous() for x in (q, k, v, beta, g, do))
    return q, k, v, beta, g, D**-0.5, state, cu, do, dstate


def both(home, q, k, v, beta, g, scale, state, cu, do, dstate) -> dict[str, torch.Tensor | None]:
    """o, final state and every gradient, by the forward and backward of a family or of the reference."""
    forward, backward = (getattr(home, f"{'chunk_' if hasattr(home, 'chunk_forward') else ''}{way}") for way in ("forward", "backward"))
    given = (q, k, v, beta, g, scale, state, cu)
    o, final, kept = forward(*given, output_final_state=True, save="states")
    return dict(zip(("o", "final", "dq", "dk", "dv", "dbeta", "dg", "dstate"), (o, final, *backward(do, dstate, *given, kept)), strict=True))


def run(cell: dict, family: str = "triton", D: int | None = None, T: int | None = None) -> dict[str, tuple[float, float]]:
    """(error of the kernels, error of the emulation), each by the name of the tensor."""
    given = make(cell, HEADS[family], DEVICE, D, T)
    q, k, v, beta, g, scale, state, cu, do, dstate = given
    found = both(import_module(f"deltanet.kernels.{family}"), *given)
    lengths = [q.shape[1]] * q.shape[0] if cu is None else cu.diff().tolist()
    flat = (None if x is None else x.flatten(0, 1) for x in (q, k, v, beta, g))
    expected = emulate(*flat, scale, state, lengths, do.flatten(0, 1), dstate, family)
    exact = both(chunkwise, *(x.double() if isinstance(x, torch.Tensor) and x is not cu else x for x in given))
    errors = {}
    for name, x in exact.items():
        if x is not None:
            size = x.norm().item()
            size = size if size > 1e-9 else 1.0  # dg of what no later token reads is zero, but for the rounding of fp64
            pair = (found[name].double(), expected[name].view(x.shape).double())
            errors[name] = tuple(((y - x).norm() / size).item() for y in pair)
    return errors


def check(errors: dict[str, tuple[float, float]], cell: dict) -> None:
    # Under strong decay dg is what is left of terms as large as dq, and sums of g near -600 a chunk lose 1e-5 of an exponent in fp32.
    noise = {"dg": 5e-3 if cell["gate"] == "strong" else 1e-4}
    for name, (ours, emulated) in errors.items():
        assert ours <= 1.3 * emulated + noise.get(name, 1e-5), (name, ours, emulated, cell)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(192))
def test_cell(number: int, record_property) -> None:
    cell = sample(192)[number]
    errors = run(cell)
    record_property("errors", errors)
    check(errors, cell)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("number", [i for i, cell in enumerate(sample(192)) if cell["D"] in hopper.DIMS])
def test_cell_on_hopper(number: int, record_property) -> None:
    cell = sample(192)[number]
    errors = run(cell, "hopper")
    record_property("errors", errors)
    check(errors, cell)


@pytest.mark.skipif(ON_GPU, reason="the matrix itself runs here")
@pytest.mark.parametrize("number", [0, 3, 5, 7, 11, 13])
def test_cell_in_the_interpreter(number: int) -> None:
    cell = sample(192)[number] | {"dtype": "float16"}
    check(run(cell, D=64, T=min(cell["T"], 130)), cell)


def test_the_sample_meets_every_pair() -> None:
    cells = sample(192)
    for one, other in itertools.combinations(AXES, 2):
        met = {(cell[one], cell[other]) for cell in cells}
        assert met == set(itertools.product(AXES[one], AXES[other])), (one, other)


def compile_part(part: int, parts: int, families: list[str]) -> int:
    """Compile every `parts`-th of the kernels that the cells launch; how many."""
    from deltanet.kernels.triton import compiled

    work: dict[tuple, tuple] = {}
    for family in families:
        home = import_module(f"deltanet.kernels.{family}")
        import_module(f"deltanet.kernels.{family}.chunk")._compile_once = lambda *_: None
        for cell in sample(192):
            if family == "hopper" and cell["D"] not in hopper.DIMS:
                continue
            compiled._thread.recorded = recorded = []
            both(home, *make(cell, HEADS[family], DEVICE))
            compiled._thread.recorded = None
            for fn, grid, args, constants, config in recorded:
                kinds = tuple(str(x.dtype) if isinstance(x, torch.Tensor) else type(x) for x in args)
                work.setdefault((fn.__name__, fn.__module__, tuple(sorted(constants.items())), config, kinds), (fn, grid, args, constants, config))
    mine = list(work.values())[part::parts]
    for one in mine:
        compiled._compile(one)
    return len(mine)


if __name__ == "__main__":
    print(compile_part(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(HEADS)), "compiled")
