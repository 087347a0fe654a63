"""Where a run computes, in which precision, with which backend, and whether it can fit."""

import os
import platform
import resource
from contextlib import AbstractContextManager

import torch

from deltanet.layers import DeltaNet, Mixer
from deltanet.models import LanguageModel
from deltanet.ops import explain
from deltanet.ops.backends import NAMES, choose, nearest
from deltanet.training.config import RunConfig

BYTES_PER_PARAMETER = 16  # fp32: the weight, its gradient, and the two means of AdamW


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" a GPU where there is one. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'device must be "auto", "cpu", "cuda" or like "cuda:1", got {name!r}: correct it') from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or like "cuda:1", got {name!r}: choose one of these')
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device must be one that is there, got {name!r} with {count} GPUs: choose another, or auto")
    if device.type == "cuda":
        torch.cuda.init()  # asked about a GPU by its number before that, torch knows of none
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}"


def precision(config: RunConfig, device: torch.device) -> torch.dtype:
    """Of the matrix products. The weights stay fp32."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of every forward pass; it may be entered again and again."""
    dtype = precision(config, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def check_memory(config: RunConfig, device: torch.device) -> None:
    """ValueError, before anything is allocated, if weights and optimizer alone cannot fit on the device."""
    with torch.device("meta"):
        parameters = LanguageModel(config.model).parameter_count()
    needed = parameters * BYTES_PER_PARAMETER
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"the model of {parameters:,} parameters must fit with gradients and optimizer, but needs {needed / 2**30:.1f} GiB "
            f"of the {there / 2**30:.1f} GiB of {device}: make it smaller"
        )


def explain_backend(model: LanguageModel, config: RunConfig, device: torch.device) -> tuple[str, str]:
    """Who will run the delta rule, and why: a line for each family. ValueError or BackendError if the one asked for cannot."""
    asked = config.train.backend
    if asked not in NAMES:
        raise ValueError(f"train.backend must be one of {', '.join(NAMES)}, got {asked!r}{nearest(asked, NAMES)}")
    mixer = next((module for module in model.modules() if isinstance(module, DeltaNet)), None)
    if mixer is None:
        return "none", "no layer uses the delta rule"
    batch = config.train.micro_batch_size or config.train.batch_size
    # Only shapes matter here; expanding one number takes no memory.
    one = torch.zeros((), dtype=precision(config, device), device=device)
    q = one.expand(batch, config.data.context, mixer.heads, mixer.key_dim)
    v = one.expand(batch, config.data.context, mixer.value_heads, mixer.value_dim)
    explanation = explain(q, q, v, v[..., 0].float())
    return choose(explanation.problem, asked), str(explanation)


def explain_paths(model: LanguageModel, config: RunConfig, device: torch.device) -> tuple[str, ...]:
    """Which way each kind of mixer goes that has several, once each: "gla: fla's kernels"."""
    one = torch.zeros((), dtype=precision(config, device), device=device)
    x = one.expand(1, config.data.context, config.model.d_model)
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return tuple(dict.fromkeys(f"{mixer.config.kind}: {path}" for mixer in mixers if (path := mixer.path(x))))


def memory_in_use(device: torch.device) -> int:
    """The most bytes that were in use: on the GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
