"""The rows of GPUs of compute capability 8.x and 12.x (`AMPERE` in kernels/launch.py), run on the GPU that is here (as_ampere.py).

Each row is a pytest of its own, because a process that has compiled a kernel for one GPU keeps it. Shown to fail: the PTX not handed over (the
driver has no use for a cubin of 8.0), beta left out of a product.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.test_chunk import BRANCHES, ROWS

HERE = Path(__file__).parent


def run(*tests: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "kernels.as_ampere", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "compiled for sm_80" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_chunked_form(row: tuple) -> None:
    run(*(f"{HERE / 'test_chunk.py'}::test_shipped_configurations[{row}-{branch}]" for branch in BRANCHES))


@pytest.mark.gpu
def test_segments_and_repeated_keys() -> None:
    run(*(f"{HERE / 'test_chunk.py'}::{name}" for name in ("test_segments_on_the_gpu", "test_alike_keys")))


@pytest.mark.gpu
def test_token_by_token() -> None:
    run(str(HERE / "test_recurrent.py"))
