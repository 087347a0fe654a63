"""A pytest plugin that makes whatever GPU is here run what an A100 would: kernels compiled for sm_80, with the launch tables of that class.

    PYTHONPATH=src:tests python -m pytest -p kernels.as_ampere -m gpu tests/kernels/test_chunk.py

PTX for 8.0 runs on every later GPU; the driver assembles it for the one it has. So tiles, layouts, mma.sync, cp.async, barriers and addresses are
those of an A100; registers and spills are not, which are tests/kernels/test_compile.py's business, nor are times.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from deltanet.kernels.launch import AMPERE
from deltanet.kernels.triton import chunk_call

_load = CompiledKernel._init_handles


def _load_as_ptx(self) -> None:
    assert ".target sm_80" in self.asm["ptx"], self.name
    self.kernel = self.asm["ptx"].encode()
    _load(self)


def pytest_report_header() -> str:
    return "kernels are compiled for sm_80 and loaded as PTX"


triton.runtime.driver.active.get_current_target = lambda: GPUTarget("cuda", 80, 32)
CompiledKernel._init_handles = _load_as_ptx
chunk_call._gpu = lambda device: AMPERE
