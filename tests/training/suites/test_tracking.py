"""The tracking suite: its cells are what their names say, and one layer solves parity where beta may reach 2."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltanet.data.synthetic import ModularAddition, Parity, PermutationGroup
from deltanet.data.synthetic.state_tracking import GroupWords, is_even
from deltanet.evaluation.plots import can_plot
from deltanet.layers import DeltaNetConfig, DeltaProductConfig
from deltanet.ops import chunk_delta_rule
from deltanet.training.suites import SUITES, Store, rows_of

from .conftest import Watching, train

SUITE = SUITES["tracking"]


def test_the_protocol() -> None:
    cells = SUITE.cells(SUITE.grid(quick=False), "float32")
    assert {cell.task for cell in cells} == {"parity", "S3", "S4", "A5", "S5"}
    for cell in cells:
        mixer = cell.config.mixer
        assert isinstance(mixer, DeltaNetConfig)
        assert (cell.config.depth, cell.config.d_model, mixer.heads, mixer.head_dim, mixer.short_conv) == (
            1,
            128,
            8,
            32,
            0,
        )
        assert cell.config.vocab_size == cell.train.vocab_size
        steps = (40, 400) if cell.task == "parity" else (128, 512)
        assert cell.train.length == steps[0] + 1
        assert cell.tests["test"].task.length == cell.tests["validation"].task.length == steps[1] + 1
        assert cell.tests[f"{steps[0]} steps"].task == cell.train
        assert mixer.negative_eigenvalues == (cell.model not in ("deltanet-noconv", "deltaproduct2-positive-noconv"))
        steps_of = mixer.steps if isinstance(mixer, DeltaProductConfig) else 1
        assert str(steps_of) in cell.model or steps_of == 1


def test_tasks_by_name() -> None:
    grid = replace(SUITE.grid(quick=True), tasks=("mod7", "A4"), models=("deltaproduct4-noconv",))
    seventh, even = SUITE.cells(grid, "float32")
    assert (seventh.train.vocab_size, even.train.vocab_size) == (8, 13)
    with pytest.raises(ValueError, match=r"tasks must be of parity, .*got 'S6'"):
        SUITE.cells(replace(grid, tasks=("S6",)), "float32")
    with pytest.raises(ValueError, match="modulus must be an integer between 2"):
        SUITE.cells(replace(grid, tasks=("mod1",)), "float32")


@pytest.mark.slow
def test_parity_needs_a_beta_beyond_one(tmp_path) -> None:
    """At ten times the length of training: the quick version, with fewer steps for the one that does not get there."""
    negative, positive = SUITE.cells(replace(SUITE.grid(quick=True), test_examples=64), "float32")
    positive = replace(positive, recipe=replace(positive.recipe, epochs=2))
    watcher = Watching()
    assert train([positive, negative], Store(tmp_path / "suite", "tracking"), watcher) == "finished"
    assert watcher.outcomes[negative.name]["scores"]["test"] > 0.999
    assert watcher.outcomes[positive.name]["scores"]["test"] < 0.6
    rows = rows_of(SUITE, Store(tmp_path / "suite", "tracking").outcomes())
    drawn = SUITE.draw(rows, tmp_path / "figure", "") if can_plot() else []
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_sums_have_a_rate_of_their_own_unless_one_is_asked_for() -> None:
    suite = SUITES["tracking"]
    grid = replace(suite.grid(quick=False), models=("deltanet-negative-noconv",), tasks=("parity", "S3", "mod5"))
    assert [cell.learning_rate for cell in suite.cells(grid, "float32")] == [2e-2, 1e-3, 5e-3]
    assert [cell.recipe.steps for cell in suite.cells(grid, "float32")] == [1000, 4800, 2000]
    quick = replace(suite.grid(quick=True), tasks=("parity", "mod3"), models=("deltanet-negative-noconv",))
    assert [cell.learning_rate for cell in suite.cells(quick, "float32")] == [2e-2, 5e-3]
    asked = replace(grid, learning_rates=(1e-3,))
    assert [cell.learning_rate for cell in suite.cells(asked, "float32")] == [1e-3, 1e-3, 1e-3]


def turn(axis: list[float], angle: float) -> Tensor:
    """The rotation of space by `angle` about `axis`."""
    x, y, z = axis
    return torch.linalg.matrix_exp(angle * torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def in_the_plane(task: ModularAddition) -> Tensor:
    angle = 2 * math.pi * torch.arange(task.order, dtype=torch.float64) / task.order
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)


def as_swaps(task: PermutationGroup) -> Tensor:
    """Element x takes e_i to e_x(i)."""
    places = torch.tensor(task.elements())
    return torch.nn.functional.one_hot(places, places.shape[1]).mT.double()


def in_space(task: PermutationGroup) -> Tensor:
    """Rotations: S4's of a cube, A5's of an icosahedron."""
    if task.group == "S4":  # what swaps do across (1, 1, 1, 1), those of an odd number mirrored as a whole
        across = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
        signs = torch.tensor([1.0 if is_even(p) else -1.0 for p in task.elements()], dtype=torch.float64)
        return signs[:, None, None] * (across @ as_swaps(task) @ across.T)
    # a of order 2 and b of order 3 with a b of order 5 make all of A5; so do a half and a third turn about axes that meet in that angle.
    table, identity = task.table(), 0
    order = [next(n for n in range(1, 6) if power(table, x, n) == identity) for x in range(task.order)]
    a, b = next((a, b) for a in range(60) for b in range(60) if (order[a], order[b], order[table[a, b]]) == (2, 3, 5))
    cosine = -math.cos(math.pi / 5) / math.sin(math.pi / 3)
    moves = {a: turn([0, 0, 1], math.pi), b: turn([math.sqrt(1 - cosine**2), 0, cosine], 2 * math.pi / 3)}
    known, waiting = {identity: torch.eye(3, dtype=torch.float64)}, [identity]
    for x in waiting:  # grows as elements are reached
        for move, matrix in moves.items():
            if (product := int(table[x, move])) not in known:
                known[product] = known[x] @ matrix
                waiting.append(product)
    return torch.stack([known[x] for x in range(task.order)])


def power(table: Tensor, x: int, n: int) -> int:
    found = x
    for _ in range(n - 1):
        found = int(table[found, x])
    return found


def reflections(matrix: Tensor) -> list[Tensor]:
    """Unit vectors k_1, k_2, ... whose reflections one after the other make `matrix`: as many as it has dimensions that it moves."""
    found, n = [], matrix.shape[0]
    while (moved := matrix - torch.eye(n, dtype=torch.float64)).norm() > 1e-9:
        k = moved[:, moved.norm(dim=0).argmax()]  # from where an axis stands to where it goes: its reflection takes it back
        k = k / k.norm()
        found.insert(0, k)
        matrix = matrix - 2 * torch.outer(k, k @ matrix)
    return found


@pytest.mark.parametrize(
    ("task", "turned", "steps"),
    [
        (Parity(steps=512), lambda task: torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64), 1),
        (ModularAddition(modulus=5, steps=512), in_the_plane, 2),
        (PermutationGroup(group="S3", steps=512), as_swaps, 2),
        (PermutationGroup(group="S4", steps=512), as_swaps, 3),
        (PermutationGroup(group="S4", steps=512), in_space, 2),
        (PermutationGroup(group="A5", steps=512), in_space, 2),
        (PermutationGroup(group="S5", steps=512), as_swaps, 4),
    ],
)
def test_so_many_reflections_a_token_suffice(task: GroupWords, turned, steps: int) -> None:
    """docs/synthetic.md's table: one head with keys set by hand follows words of 512, its state being the product itself."""
    matrices = turned(task)
    every = torch.arange(task.order)
    products = matrices[:, None] @ matrices[None]
    torch.testing.assert_close(matrices[task.table()[every[:, None], every]], products)
    vectors = [reflections(matrix.T) for matrix in matrices]
    assert max(map(len, vectors)) == steps
    n = matrices.shape[1]
    k, beta = torch.zeros(task.order, steps, n, dtype=torch.float64), torch.zeros(task.order, steps, dtype=torch.float64)
    for x, found in enumerate(vectors):
        for j, vector in enumerate(found):
            k[x, j], beta[x, j] = vector, 2.0
    look = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    examples = task.sample(2, seed=0)
    words, targets = examples.inputs[:, 1:], examples.targets[:, 1:]
    k, beta = k[words].flatten(1, 2)[:, :, None], beta[words].flatten(1, 2)[:, :, None]
    state = torch.eye(n, dtype=torch.float64).expand(2, 1, n, n)
    o, _ = chunk_delta_rule(look.expand_as(k), k, torch.zeros_like(k), beta, scale=1.0, initial_state=state)
    seen = o[:, steps - 1 :: steps, 0]  # what is left of the vector that is looked along, of which each element makes another
    assert torch.equal(torch.cdist(seen, (matrices @ look).expand(2, -1, -1)).argmin(-1), targets)
