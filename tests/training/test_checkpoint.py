"""A checkpoint is whole or not there; what was cut, altered or never ours is passed over, or refused by name."""

import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltanet.layers import DeltaNetConfig
from deltanet.models import LanguageModel
from deltanet.training import CheckpointError, RunConfig, load_model
from deltanet.training import checkpoint as module
from deltanet.training.checkpoint import (
    NewerFormatError,
    Progress,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    retain,
    save_checkpoint,
    weights_of,
)

BYTES = "tokenizer of bytes"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def save(run: Path, config: RunConfig) -> Callable[..., Path]:
    model = LanguageModel(config.model)

    def save(step: int, tokenizer: str = module.ByteTokenizer.fingerprint) -> Path:
        optimizer = {f"{name}.exp_avg": torch.full_like(p, step) for name, p in model.named_parameters()}
        progress = Progress(step=step, steps=12, position=4 * step, tokens=64 * step)
        return save_checkpoint(
            run / "checkpoints", config, progress, weights_of(model), optimizer,
            tokenizer=tokenizer, text={"train": "1", "validation": "2"}, surroundings={"rng": {}},
        )  # fmt: skip

    return save


def reseal(path: Path) -> None:
    """A manifest that fits what lies there: what an attacker, or a later version, would write."""
    sizes = {
        name: {"size": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in module.FILES
    }
    (path / "MANIFEST.json").write_text(json.dumps(sizes))


def edit_state(path: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    reseal(path)


def test_comes_back_as_it_was(save: Callable[..., Path], run: Path, config: RunConfig) -> None:
    path = save(3)
    found = read_checkpoint(path)
    assert path.name == "step-00000003"
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000003\n"
    assert sorted(p.name for p in path.iterdir()) == sorted([*module.FILES, "MANIFEST.json"])
    assert found.config == config
    assert found.progress == Progress(step=3, steps=12, position=12, tokens=192)
    assert found.optimizer["layers.0.mixer.q_proj.weight.exp_avg"].unique().tolist() == [3.0]
    trained = load_model(run)
    assert (trained.step, trained.config, trained.rejected) == (3, config, ())
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, found.weights[name])


def truncate(path: Path) -> None:
    whole = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(whole[:-1])


def flip(path: Path) -> None:
    raw = bytearray((path / "optimizer.safetensors").read_bytes())
    raw[-7] ^= 4
    (path / "optimizer.safetensors").write_bytes(raw)


def plant_pickle(path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return Path.touch, (path / "executed",)

    (path / "weights.safetensors").write_bytes(pickle.dumps(Attack()))
    reseal(path)


def make_foreign(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    (path / ".metadata").write_bytes(pickle.dumps({}))
    (path / "__0_0.distcp").write_bytes(b"1")


FAULTS = {
    "truncated": (truncate, r"weights.safetensors must have [\d,]+ bytes, got [\d,]+"),
    "flipped bit": (flip, "optimizer.safetensors was altered.*sha256 differs"),
    "missing file": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda path: (path / "MANIFEST.json").unlink(), "there is no MANIFEST.json"),
    "unreadable manifest": (lambda path: (path / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read"),
    "pickle": (plant_pickle, "must be a deltanet checkpoint, got .*"),
    "foreign": (make_foreign, "there is no MANIFEST.json"),
    "other format": (lambda path: edit_state(path, lambda s: s.update(format="?")), "must be a deltanet checkpoint"),
    "counter": (lambda path: edit_state(path, lambda s: s["progress"].update(position=-1)), "position must be from 0"),
    "huge config": (
        lambda path: edit_state(path, lambda s: s["config"]["model"].update(d_model=10**12)), r"d_model must be between"
    ),
    "unknown key": (
        lambda path: edit_state(path, lambda s: s["config"]["model"].update(auto_map="x.py")), "no field 'auto_map'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_one_is_passed_over_and_never_taken_by_name(fault: str, save: Callable[..., Path], run: Path) -> None:
    damage, reason = FAULTS[fault]
    save(1)
    damage(save(2))
    heard: list[tuple[str, str]] = []
    found = newest_checkpoint(run / "checkpoints", lambda path, why: heard.append((path.name, why)))
    assert found is not None
    assert found.progress.step == 1
    assert [name for name, _ in heard] == ["step-00000002"]
    with pytest.raises(CheckpointError, match=reason):
        load_model(run, step=2)
    trained = load_model(run)
    assert trained.step == 1
    assert trained.rejected[0].startswith("passed over step-00000002: ")
    assert not list(run.rglob("executed"))


def test_none_in_order_is_an_error_and_none_at_all_is_not(save: Callable[..., Path], run: Path) -> None:
    assert newest_checkpoint(run / "checkpoints", lambda *_: None) is None
    with pytest.raises(CheckpointError, match="must hold a checkpoint, got none yet"):
        load_model(run)
    flip(save(1))
    truncate(save(2))
    with pytest.raises(CheckpointError, match="got 2 that are not"):
        newest_checkpoint(run / "checkpoints", lambda *_: None)


def test_a_newer_format_is_refused_even_with_older_ones_there(save: Callable[..., Path], run: Path) -> None:
    save(1)
    edit_state(save(2), lambda state: state.update(version=module.VERSION + 1))
    with pytest.raises(NewerFormatError, match=r"must have format version 1 or older, got 2: upgrade"):
        load_model(run)


def test_weights_of_another_model_are_refused_before_it_is_built(
    save: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(state: dict) -> None:
        state["config"]["model"].update(d_model=1024)

    edit_state(save(1), widen)
    built = []

    class Spy(LanguageModel):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            built.append(self.embeddings.weight.device.type)

    monkeypatch.setattr(module, "LanguageModel", Spy)
    with pytest.raises(
        CheckpointError, match=r"expected embeddings.weight \[257, 1024\], got \[257, 16\]; .* and \d+ more"
    ):
        load_model(run, step=1)
    assert built == ["meta"]


def test_another_tokenizer_is_refused(save: Callable[..., Path], run: Path) -> None:
    save(1, tokenizer="0123456789abcdef")
    with pytest.raises(CheckpointError, match=r"must be of the tokenizer .* got 0123456789ab"):
        load_model(run)


def test_tied_weights(run: Path, config: RunConfig) -> None:
    tied = replace(config, model=replace(config.model, tie_embeddings=True, layers=(DeltaNetConfig(heads=2),)))
    model = LanguageModel(tied.model)
    rest = {"tokenizer": module.ByteTokenizer.fingerprint, "text": {}, "surroundings": {}}
    save_checkpoint(run / "checkpoints", tied, Progress(), weights_of(model), {}, **rest)
    again = load_model(run).model
    assert again.lm_head.weight is again.embeddings.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_what_is_no_run(tmp_path: Path, save: Callable[..., Path], run: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="only safetensors in a run folder are read, never pickles"):
        load_model(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="must be a run folder"):
        load_model(tmp_path / "nothing")
    save(4)
    with pytest.raises(CheckpointError, match=r"step must be one that was saved \(4\), got 5"):
        load_model(run, step=5)


def test_no_room(save: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(CheckpointError, match=r"needs 1,\d+,\d+ free bytes, got 5,000: make room; older"):
        save(2)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step-00000001"]
    assert load_model(run).step == 1


def test_no_room_half_way(save: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1)

    def fill_up(tensors: dict, path: Path) -> None:
        path.write_bytes(b"torso")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", fill_up)
    with pytest.raises(CheckpointError, match=r"free bytes, got .*: make room; older"):
        save(2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]
    assert (run / "checkpoints" / "LATEST").read_text() == "step-00000001\n"


def test_a_save_that_was_cut_off_is_no_checkpoint(
    save: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed: nobody cleans up
    monkeypatch.setattr(Path, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save(2)
    monkeypatch.undo()
    assert any(".tmp-" in path.name for path in (run / "checkpoints").iterdir())
    assert load_model(run).step == 1
    remove_leftovers(run / "checkpoints")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]


def test_retention(save: Callable[..., Path], run: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(step)
    retain(run / "checkpoints", 2, best_step=2)
    assert [path.name[-1] for path in list_checkpoints(run / "checkpoints")] == ["5", "4", "2"]
    retain(run / "checkpoints", 2, best_step=None)
    assert [path.name[-1] for path in list_checkpoints(run / "checkpoints")] == ["5", "4"]
