"""Every shipped launch configuration compiles for its GPUs without spills past a budget, serialised wgmma, or too much shared memory.

No GPU is needed: offline.py runs the operators with a driver that compiles and never launches. Checked always, in about a minute of one core:
head dimension 128 in bf16, for sm_90 (H100, H200) and sm_80 (A100), with the Triton that is installed and with each in TRITON_FOLDERS, where
`make test` puts the oldest that is supported. Every other row takes about ten minutes of one core and waits to be asked for:

    python -m pytest tests/kernels/test_compile.py -m slow -n 2

Shown to fail: a RECURRENT row of 64 columns at K 128 (spills), CHUNK_GRADIENTS with 6 stages (shared memory), the hints dropped from state_tile
(shuffles), and the logs at the end of this file.
"""

import pytest

pytest.importorskip("triton")

from kernels import offline
from kernels.offline import FOLDERS, Compiled, name, problems, read_log

from deltanet.kernels import launch

# Bytes that a kernel may spill, stores and loads together, each thread, by (capability, row): what is spilled now, with the worse of Triton 3.6.0
# and 3.7.1, so that more is a change to look at; none where nothing stands. A few dozen are numbers kept across a loop body. The hundreds of the
# bf16 rows are their price for tiles that fill the tensor cores: smaller tiles and more warps spill less and were measured slower (docs/log.md).
# Of gradients they are those of grouped value heads, whose sums are kept: as many heads as keys spill 32 (plain, D 128) to 536 (gated, D 64).
# state_gradient has two loops, of which one runs. fp32 is exact, not fast.
SPILLS: dict[tuple[int, str], dict[str, int]] = {
    (90, "chunk-2-64-plain"): {"gradients": 760},
    (90, "chunk-2-64-gated"): {"transform": 16, "forward": 36, "state_gradient": 92, "gradients": 1908},
    (90, "chunk-2-128-plain"): {"forward": 88, "state_gradient": 260, "gradients": 1072},
    (90, "chunk-2-128-gated"): {"transform": 40, "forward": 616, "state_gradient": 1976, "gradients": 1916},
    (90, "chunk-2-256-plain"): {"forward": 1576, "state_gradient": 2836, "gradients": 1008},
    (90, "chunk-2-256-gated"): {"transform": 40, "forward": 3012, "state_gradient": 4732, "gradients": 2028},
    (90, "chunk-4-64-plain"): {"forward": 2552, "state_gradient": 1976, "gradients": 2740},
    (90, "chunk-4-64-gated"): {"transform": 352, "forward": 3288, "state_gradient": 2844, "gradients": 5212},
    (90, "chunk-4-128-plain"): {"forward": 5528, "state_gradient": 5200, "gradients": 2796},
    (90, "chunk-4-128-gated"): {"transform": 360, "forward": 6808, "state_gradient": 6420, "gradients": 5348},
    (90, "chunk-4-256-plain"): {"forward": 13992, "state_gradient": 7964, "gradients": 2812},
    (90, "chunk-4-256-gated"): {"transform": 360, "forward": 17060, "state_gradient": 11720, "gradients": 5348},
    (90, "scan-2-16-packed"): {"_backward": 88},
    (80, "chunk-2-64-plain"): {"gradients": 1136},
    (80, "chunk-2-64-gated"): {"transform": 100, "gradients": 760},
    (80, "chunk-2-128-plain"): {"forward": 48, "state_gradient": 16, "gradients": 944},
    (80, "chunk-2-128-gated"): {"transform": 40, "forward": 104, "state_gradient": 320, "gradients": 1320},
    (80, "chunk-2-256-plain"): {"forward": 112, "gradients": 1326},
    (80, "chunk-2-256-gated"): {"transform": 56, "forward": 400, "gradients": 1432},
    **{(80, f"chunk-4-64-{rule}"): {"transform": 244, "forward": 2492, "state_gradient": 748, "gradients": 7100} for rule in ("plain", "gated")},
    **{(80, f"chunk-4-128-{rule}"): {"transform": 220, "forward": 6612, "state_gradient": 4900, "gradients": 8128} for rule in ("plain", "gated")},
    **{(80, f"chunk-4-256-{rule}"): {"transform": 220, "forward": 19292, "state_gradient": 15376, "gradients": 8128} for rule in ("plain", "gated")},
    **{(80, f"recurrent-{size}-{dim}-gated"): {"errors_backward": 56, "keys_ascending": 84} for size in (2, 4) for dim in (128, 256)},
    **{(90, f"recurrent-{size}-{dim}-gated"): {"errors_backward": 24, "keys_ascending": 112} for size in (2, 4) for dim in (64, 128, 256)},
}
# Rows in which ptxas lets each wgmma wait for the one before (C7512, for want of registers), known and measured.
SERIALISED = {(90, "chunk-2-256"), (90, "chunk-4-128"), (90, "chunk-4-256")}

# Each configuration is reached by its gated row; plain rows are light, as their transform has the same configuration.
FAST = {
    90: ["chunk-2-128-gated", "chunk-2-128-plain-light", "recurrent-2-128-gated", "decode-2-128-gated", "scan-2-16-packed"],
    80: ["chunk-2-128-gated-light"],
}


def rows() -> list[str]:
    """`algorithm-itemsize-dim-rule` of every row of the launch tables."""
    tables = {"chunk": launch.CHUNK_FORWARD[launch.HOPPER], "recurrent": launch.RECURRENT["errors"], "decode": launch.DECODE}
    rules = {"chunk": ("gated", "plain-light"), "recurrent": ("gated",), "decode": ("gated",)}
    return [f"{algorithm}-{size}-{dim}-{rule}" for algorithm, table in tables.items() for size, dim in table for rule in rules[algorithm]]


SLOW = [(capability, row) for capability in (90, 80) for row in rows() if row not in FAST[capability]]


def check(kernels: list[Compiled], row: str, capability: int) -> None:
    """Every kernel of a row is there, and none has a problem."""
    algorithm, size, dim, *rule = row.split("-")  # of the scan, the numbers that a channel keeps
    expected = {
        "decode": {"decode"},
        "scan": {"_forward", "_backward"},
        "recurrent": {"forward", "errors_backward", "keys_descending", "keys_ascending"},
        "chunk": {"forward", "state_gradient", "gradients"} | (set() if "light" in rule else {"transform"}),
    }[algorithm]
    names = {kernel.kernel for kernel in kernels}
    assert expected <= names, f"{row} never reached {expected - names}"
    here = (capability, f"{algorithm}-{size}-{dim}")
    allowed = SPILLS.get((capability, row.removesuffix("-light")), {})
    wrong = []
    for kernel in kernels:
        found = problems(kernel, allowed.get(kernel.kernel, 0))
        wrong += [(kernel.kernel, problem) for problem in found if not (here in SERIALISED and "serialised" in problem)]
    assert not wrong, (row, capability, wrong)


def test_the_rows_are_those_of_the_tables() -> None:
    assert {row for fast in FAST.values() for row in fast} <= {*rows(), "chunk-2-128-gated-light", "scan-2-16-packed"}
    for table in (*launch.RECURRENT.values(), launch.DECODE):
        assert {(size, dim) for size in (2, 4) for dim in (16, 32, 64, 128, 256)} == set(table)


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
@pytest.mark.parametrize("capability", FAST)
def test_head_dimension_128(capability: int, folder: str) -> None:
    kernels = offline.compile_rows(FAST[capability], capability, workers=1, triton=folder)
    for row in FAST[capability]:
        check([kernel for kernel in kernels if kernel.row == row], row, capability)
    for kernel in kernels:  # a layout that spreads the summed dimension over lanes is right, and several times slower: it shows as shuffles
        if kernel.row.startswith("recurrent"):
            assert kernel.shuffles <= 60, (kernel.kernel, kernel.shuffles)
        if kernel.row.startswith("scan"):
            assert kernel.shuffles <= {"_forward": 48, "_backward": 288}[kernel.kernel], (kernel.kernel, kernel.shuffles)


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("compiles for minutes: run with -m slow")


@pytest.mark.slow
@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize("folder", FOLDERS, ids=name)
@pytest.mark.parametrize(("capability", "row"), SLOW)
def test_every_other_row(capability: int, row: str, folder: str) -> None:
    check(offline.compile_rows([row], capability, workers=1, triton=folder), row, capability)


def kernel(**changes) -> Compiled:
    good = dict(row="r", kernel="k", capability=90, warps=4, registers=128, stack=0, spill=0, shared=1024, shuffles=0, overlaid=0, warnings=())
    return Compiled(**{**good, **changes})


def test_what_is_wrong_is_said() -> None:
    assert problems(kernel(), 0) == []
    assert problems(kernel(spill=64), 64) == []
    assert "spills 65 bytes" in problems(kernel(spill=65), 64)[0]
    assert "serialised (C7510)" in problems(kernel(warnings=("C7510",)), 0)[0]
    assert "1 barriers that nobody uses" in problems(kernel(overlaid=1), 0)[0]
    assert "166913 bytes of shared memory" in problems(kernel(shared=166_913, capability=80), 0)[0]
    assert problems(kernel(shared=166_913), 0) == []


def test_logs_are_read() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources
ptxas info    : Function properties for forward
    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size"""
    assert read_log(log) == (255, 48, 84, ("C7510",))
    assert read_log("ptxas info : Used 40 registers\n0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == (40, 0, 0, ())
