"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.

It is chosen for these tests alone: everywhere else, and in what other tests start, Triton is what it is for a user.
"""

import importlib.util
import os
import pkgutil
from importlib import import_module

import pytest
import torch

INTERPRET = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None

if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"
    family = import_module("deltanet.kernels.triton")
    for module in pkgutil.iter_modules(family.__path__):
        import_module(f"{family.__name__}.{module.name}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
