"""Every configuration of the Hopper kernels compiles for sm_90a without serialised wgmma, spills past a budget, or too much shared memory.

No GPU is needed (offline.py). Heads of 128 without a gate are checked always, everything else when it is asked for; with the Triton that is
installed, and with each in TRITON_FOLDERS, where `make test` puts the oldest that is supported:

    TRITON_FOLDERS=/path/to/triton-3.6.0:/path/to/another python -m pytest -m slow tests/kernels/test_hopper_compile.py

Shown to fail: STATE_REGISTERS = 136, at heads of 256 200, and all of S as a register operand in their forward (serialised), ALWAYS_0 = ALSO_0 =
31, which the compiler sees to be 0 (spills), two stages of S, in their gated forward two places of G (memory), in the launches of that forward
without outputs the barriers of those with (made over the arguments of its roles).
"""

from functools import cache

import pytest

pytest.importorskip("triton")  # Gluon itself cannot be imported beside the interpreter

from kernels import offline
from kernels.offline import FOLDERS, Compiled, name, problems

# Bytes that a thread may spill, stores and loads together, over all warps of the program, by row: what is spilled now and a little, so that
# a change shows. They are dear here: what is spilled comes back from L2 (docs/kernels.md).
SPILLS = {
    "hopper_forward-2-128-plain": 760,  # with both loops, outside of them; all others 72
    "hopper_forward-2-128-gated": 220,  # the solve
    "hopper_forward-2-64-plain": 80,  # the solve
    "hopper_forward-2-64-gated": 220,  # the solve
    "hopper_forward-2-256-plain": 280,  # outside of the loop
    "hopper_forward-2-256-gated": 380,
    "hopper_backward-2-128-plain": 48,
    "hopper_backward-2-128-gated": 640,
    "hopper_backward-2-64-plain": 32,
    "hopper_backward-2-64-gated": 32,
    "hopper_backward-2-256-plain": 120,
    "hopper_backward-2-256-gated": 200,
}
FAST = [row for row in SPILLS if row.endswith("128-plain")]


@cache
def compiled(rows: tuple[str, ...], folder: str) -> list[Compiled]:
    return offline.compile_rows(list(rows), 90, workers=2, triton=folder)


def check(row: str, rows: list[str], folder: str) -> None:
    kernels = [kernel for kernel in compiled(tuple(rows), folder) if kernel.row == row]
    assert len(kernels) >= 3, f"{row} has lost configurations: {kernels}"
    wrong = [(kernel, found) for kernel in kernels if (found := problems(kernel, SPILLS[row]))]
    assert not wrong, wrong
    # a warpgroup for each role; without roles it would be 4 warps. The triangular solve, what it is solved again for, and the chain have none
    assert {kernel.warps for kernel in kernels if kernel.kernel not in ("transform", "rest", "chain")} <= {12, 16}


def test_a_barrier_made_over_the_arguments_of_roles_is_seen() -> None:
    ptx = """
    add.s32 \t%r7, %r1, 131600;
    @%p1 mbarrier.init.shared::cta.b64 [%r7], 1;
    add.s32 \t%r8, %r1, AT;
    @%p1 mbarrier.init.shared::cta.b64 [%r8], 1;
    st.shared.v2.b64 \t[global_smem+131584], {%rd1, %rd2};
    st.shared.b32 \t[global_smem+131616], %r3;
    barrier.sync \t1;
    st.shared.b32 \t[global_smem+131700], %r3;
    """
    found = {at: offline.overlaid(ptx.replace("AT", str(at))) for at in (131576, 131584, 131592, 131616, 131624, 131700)}
    assert found == {131576: 0, 131584: 1, 131592: 1, 131616: 1, 131624: 0, 131700: 0}


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
@pytest.mark.parametrize("row", FAST)
def test_sm_90a(row: str, folder: str) -> None:
    check(row, FAST, folder)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=name)
@pytest.mark.parametrize("row", SPILLS)
def test_sm_90a_of_every_row(row: str, folder: str, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("compiles for minutes: run with -m slow")
    check(row, list(SPILLS), folder)
