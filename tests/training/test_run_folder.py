"""A folder is refused before any compute if it is none, not ours, or in use."""

import json
import os
from pathlib import Path

import pytest

from deltanet.training.metrics import Metrics, read_metrics
from deltanet.training.run_folder import open_run, replace_text


def test_new_nested_empty_and_earlier_folders_are_taken(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b"):
        with open_run(path) as run:
            run.config.write_text("")
            (path / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    with open_run(tmp_path / "empty") as run:
        assert run.path.is_dir()


def test_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    cases = {
        "file": "out must be a folder, got the file",
        "file/below": "out must be a folder that can be written, got",
        "photos": "out must be a new folder or that of a run, got .* with other things",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message), open_run(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parents_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="out must be a folder that can be written"), open_run(tmp_path / "run"):
        pass


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run"),
        pytest.raises(ValueError, match=rf"no run is going on, got .* of process {os.getpid()} on "),
        open_run(tmp_path / "run"),
    ):
        pass
    with open_run(tmp_path / "run"):
        pass


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_text(tmp_path / "status.json", "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "status.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"status.json": "old"}


def test_metrics_go_on_without_doubling(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for step in (1, 2, 3):
        metrics.write("step", {"step": step})
    metrics.close()
    path.write_text(path.read_text() + '{"event": "st')  # cut off by a kill
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    metrics = Metrics(path, 2)
    metrics.write("step", {"step": 3})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    Metrics(path, 0).close()
    assert read_metrics(tmp_path) == []


def test_metrics_wait_for_a_full_disk(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    disk = metrics._file

    class Full:
        def write(self, raw: bytes) -> int:
            raise OSError(28, "No space left on device")

    metrics._file = Full()  # type: ignore[assignment]
    metrics.write("step", {"step": 1})
    metrics._file = disk
    metrics.write("step", {"step": 2})
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
