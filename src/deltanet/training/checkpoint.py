"""Checkpoints that are whole or not there, that vouch for every byte, and that hold no code.

A checkpoint is a folder `checkpoints/step-00001200` with weights.safetensors, optimizer.safetensors, state.json (all
that is no tensor) and MANIFEST.json (size and sha256 of the others). It is written under another name, brought to the
disk, and renamed; LATEST names the newest. Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltanet.data import ByteTokenizer, Tokenizer
from deltanet.models import LanguageModel
from deltanet.training.config import RunConfig, check_fields, config_from_dict, config_to_dict
from deltanet.training.run_folder import replace_text

FORMAT = "deltanet checkpoint"
VERSION = 1
WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
FILES = (WEIGHTS, OPTIMIZER, STATE)
SLACK = 1 << 20  # bytes left free beside a checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read. The message says why and what to do."""


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a later deltanet."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, but for its tensors."""

    step: int = 0  # optimizer steps done
    steps: int | None = None  # in all, None until planned
    position: int = 0  # of the next window: the whole state of the data
    tokens: int = 0  # trained on
    seconds: float = 0.0  # of training, over all calls
    skipped: int = 0  # batches left out as not finite
    best_step: int | None = None  # the checkpoint with the best validation ...
    best_bits_per_byte: float | None = None  # ... and what it reached


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    config: RunConfig
    progress: Progress
    tokenizer: str  # its fingerprint
    text: dict[str, str]  # hashes of the tokens of either side
    surroundings: dict[str, Any]  # generators, threads, versions
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save_checkpoint(
    folder: Path,
    config: RunConfig,
    progress: Progress,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    **rest: Any,
) -> Path:
    """Writes a checkpoint of `progress.step` into `folder` and returns its path once it is on the disk.

    `rest` are the other fields of a `Checkpoint`, plain JSON.

    Raises CheckpointError where it cannot be written; then nothing of it is left, and what was there before still is.
    """
    path = folder / _name(progress.step)
    partial = folder / f"{path.name}.tmp-{os.getpid()}"
    tensors = {WEIGHTS: weights, OPTIMIZER: optimizer}
    state = {
        "format": FORMAT,
        "version": VERSION,
        "config": config_to_dict(config),
        "progress": vars(progress),
        **rest,
    }
    needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values()) + SLACK
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        for name, part in tensors.items():
            save_file(part, partial / name)
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for name in FILES:
            _sync(partial / name)
        manifest = {
            name: {"size": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in FILES
        }
        replace_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        _sync(partial)
        partial.rename(path)
        _sync(folder)
        with suppress(OSError):  # a hint for people: readers look for themselves, and the checkpoint is there
            replace_text(folder / "LATEST", path.name + "\n")
        return path
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(
                f"a checkpoint in '{folder}' needs {needed:,} free bytes, got {shutil.disk_usage(folder).free:,}: "
                "make room; older checkpoints are as they were"
            ) from None
        raise CheckpointError(f"'{path}' must be writable, got {error}: older checkpoints are as they were") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, after checking every byte of it. CheckpointError says what is wrong with it."""
    _verify(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}")
        if state["version"] > VERSION:
            raise NewerFormatError(
                f"'{path}' must have format version {VERSION} or older, got {state['version']}: upgrade deltanet"
            )
        config, progress = config_from_dict(state.pop("config")), Progress(**state.pop("progress"))
        check_fields(progress, step=(0, 1 << 62), position=(0, 1 << 62))
        tokenizer, text, surroundings = (state[name] for name in ("tokenizer", "text", "surroundings"))
        weights, optimizer = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"it must be a {FORMAT}, got {error!r}") from None
    return Checkpoint(path, config, progress, tokenizer, text, surroundings, weights, optimizer)


def newest_checkpoint(folder: Path, reject: Callable[[Path, str], None]) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is in order; None where there is none at all.

    `reject` hears the path and the fault of each one passed over. CheckpointError if all are faulty, or the newest is
    of a newer format: going on from an older one would leave it behind.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            reject(path, str(error))
    if paths:
        raise CheckpointError(
            f"'{folder}' must hold a checkpoint in order, got {len(paths)} that are not: "
            "bring one back from a copy, or start again in another folder"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first, in order or not."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a save that was cut off has left."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames a faulty checkpoint, so that its step can be saved again; returns its new path."""
    aside = path.with_name(f"{path.name}.rejected")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def retain(folder: Path, keep: int, best_step: int | None) -> None:
    """Deletes all but the `keep` newest checkpoints and the one of `best_step`. The newest, just written, always stays."""
    for path in list_checkpoints(folder)[keep:]:
        if step_of(path) != best_step:
            # Under its own name a checkpoint is whole: a deletion that is cut off leaves a leftover, not a torso.
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp-deleted")), ignore_errors=True)


class Trained(NamedTuple):
    """A model as a run has left it."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    step: int
    rejected: tuple[str, ...]  # a line for each newer checkpoint that is not in order


def load_model(
    run: str | Path, step: int | None = None, *, device: torch.device | str = "cpu", backend: str = "auto"
) -> Trained:
    """The model of a run folder, of its newest checkpoint that is in order, or of exactly `step`.

    Raises ValueError for what is no run folder, and CheckpointError where no checkpoint, or not that one, can be read.
    """
    run = Path(run)
    folder = run / "checkpoints"
    if not folder.is_dir():
        what = "a file: only safetensors in a run folder are read, never pickles" if run.is_file() else "none there"
        raise ValueError(f"'{run}' must be a run folder with checkpoints, got {what}; `deltanet train` makes one")
    rejected: list[str] = []
    if step is None:
        checkpoint = newest_checkpoint(folder, lambda path, fault: rejected.append(f"passed over {path.name}: {fault}"))
        if checkpoint is None:
            raise CheckpointError(f"'{folder}' must hold a checkpoint, got none yet: train until the first is saved")
    else:
        path = folder / _name(step)
        if not path.is_dir():
            there = ", ".join(str(step_of(path)) for path in reversed(list_checkpoints(folder)))
            raise CheckpointError(
                f"step must be one that was saved ({there or 'none'}), got {step}: choose one of them"
            )
        checkpoint = read_checkpoint(path)
    check_tokenizer(checkpoint, ByteTokenizer())
    with torch.device("meta"):
        check_weights(LanguageModel(checkpoint.config.model), checkpoint)  # before anything of that size is allocated
    model = LanguageModel(checkpoint.config.model, backend=backend)
    load_weights(model, checkpoint)
    return Trained(model.to(device), ByteTokenizer(), checkpoint.config, checkpoint.progress.step, tuple(rejected))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All that a model has learned, once each: of tied weights only the first name."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    second_names = names - {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second_names}


def check_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """CheckpointError, listing the first that differ, if the checkpoint holds other tensors than `model`."""
    expected = {name: list(tensor.shape) for name, tensor in weights_of(model).items()}
    found = {name: list(tensor.shape) for name, tensor in checkpoint.weights.items()}
    different = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if different:
        lines = [f"{name} {expected.get(name, 'absent')}, got {found.get(name, 'absent')}" for name in different[:5]]
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise CheckpointError(
            f"'{checkpoint.path}' must hold the weights of this model, but expected {'; '.join(lines)}{more}: "
            "use the model that it was saved from"
        )


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fills `model` from the checkpoint, which must be of such a model."""
    check_weights(model, checkpoint)
    model.load_state_dict(checkpoint.weights, strict=False)  # second names of tied weights are not in the checkpoint


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """CheckpointError if the run was made with another tokenizer."""
    if checkpoint.tokenizer != tokenizer.fingerprint:
        raise CheckpointError(
            f"'{checkpoint.path}' must be of the tokenizer {tokenizer.fingerprint[:12]}, got {checkpoint.tokenizer[:12]}: "
            "use the tokenizer that it was trained with"
        )


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in FILES}
    except FileNotFoundError:
        raise CheckpointError(f"there is no {MANIFEST}: it was never finished, or is not a {FORMAT}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error!r})") from None
    for name, (size, sha256) in entries.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None:
            raise CheckpointError(f"{name} is missing")
        if found != size:
            raise CheckpointError(f"{name} must have {size:,} bytes, got {found:,}: it is truncated or altered")
        if _sha256(path / name) != sha256:
            raise CheckpointError(f"{name} was altered after it was written: its sha256 differs")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
