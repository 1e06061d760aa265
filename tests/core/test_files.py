"""Files appear whole or not at all, a full disk is reported, and the leftovers of killed processes are removed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.core import digests, files
from mode.core.digests import find_damage, make_folder, read_sealed, write_sealed
from mode.core.files import make_partial_path, remove, remove_leftovers, write_atomic
from mode.core.locks import lock_folder
from mode.core.tensors import load_tensors, save_tensors
from mode.records.record import SCHEMA, Record
from mode.train.curve import append_point
from tests.support.refusals import refused


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Limit the size of the files that this process writes, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write_bytes(folder: Path) -> None:
    write_atomic(folder / "target", bytes(5000))


def write_weights(folder: Path) -> None:
    save_tensors(folder / "target", {"w": torch.ones(1250)}, {})


def write_record(folder: Path) -> None:
    asked = {"method": {"_target_": "m.Target"}, "targets": ["a"], "seed": 0, "text": "x" * 5000}
    record = Record(SCHEMA, "target", asked, {}, {})
    object.__setattr__(record, "request", type("Request", (), {"method_name": "M", "targets": ["a"], "seed": 0}))
    record.write(folder)


def write_curve(folder: Path) -> None:
    append_point(folder / "target", {"step": 1, "text": "x" * 5000})


def write_index(folder: Path) -> None:
    make_folder(folder / "target", lambda partial: write_atomic(partial / "data", bytes(5000)) or {}, lambda old: None)


@pytest.mark.parametrize("write", [write_bytes, write_weights, write_record, write_curve, write_index])
def test_a_full_disk_is_reported_with_path_and_bytes(tmp_path: Path, write: Any) -> None:
    with file_limit(2000), refused(str(tmp_path), "5.", "kB needed", "free", "File too large"):
        write(tmp_path)
    whole = [path for path in tmp_path.iterdir() if path.name != "target"]
    assert whole == []
    write(tmp_path)


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "target", b"")


def test_the_old_content_stays_if_the_disk_is_full(tmp_path: Path) -> None:
    save_tensors(tmp_path / "target", {"w": torch.ones(1)}, {})
    with file_limit(2000), refused("target"):
        write_weights(tmp_path)
    assert torch.equal(load_tensors(tmp_path / "target")[0]["w"], torch.ones(1))


# --- leftovers

KILLED = """
import os, signal, sys
from pathlib import Path
from mode.core import digests, files
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
os.replace = kill
files.write_atomic(Path(sys.argv[1]), b"half")
"""


def make_leftover(path: Path) -> Path:
    """Let a process write a file and kill it before the file has its name; return what it left."""
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    (left,) = path.parent.glob(f".{path.name}.*")
    return left


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    left = make_leftover(tmp_path / "record.json")
    folder = left.with_name(left.name.replace("record", "data"))
    (folder / "inner").mkdir(parents=True)
    own = make_partial_path(tmp_path / "mine")
    own.write_text("of a living process")
    (tmp_path / ".hidden").write_text("the user's")
    write_atomic(tmp_path / "other", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own.name, ".hidden", "other"])


@pytest.mark.parametrize("name", [".weights.77.partial", ".partial-abc", ".x.elsewhere-1-2.partial"])
def test_leftovers_of_other_machines_and_versions_are_removed_after_a_day(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert (tmp_path / name).exists()
    a_day_ago = time.time() - files.A_DAY - 1
    os.utime(tmp_path / name, (a_day_ago, a_day_ago))
    remove_leftovers(tmp_path)
    assert not (tmp_path / name).exists()


def test_the_holder_of_a_runs_lock_removes_all_leftovers(tmp_path: Path) -> None:
    for name in (".run.yaml.77.partial", ".weights.safetensors.elsewhere-1-2.partial", ".checkpoint-9.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.yaml").write_text("kept")
    with lock_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "run.yaml"]


def test_a_folder_that_is_missing_has_no_leftovers(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nowhere")


# --- digests


def test_a_sealed_object_is_read_back_and_every_change_is_noticed(tmp_path: Path) -> None:
    path, content = tmp_path / "index.json", {"a": 1, "b": {"c": [1.5, "ü"]}}
    write_sealed(path, content)
    assert read_sealed(path) == content
    text = path.read_bytes()
    for place in range(len(text)):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        assert read_sealed(path) in (None, content)  # white space alone may change
    for other in (b"", b"[]", b"1", b"{}", b"\xff", b"[" * 100_000):
        path.write_bytes(other)
        assert read_sealed(path) is None
    remove(path)
    assert read_sealed(path) is None


def test_a_damaged_folder_is_made_again_and_another_file_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls = tmp_path / "made", []

    def write(partial: Path) -> dict[str, int]:
        calls.append(partial)
        (partial / "data").write_bytes(b"content")
        return {"number": 3}

    first = make_folder(folder, write, lambda old: None)
    assert first == make_folder(folder, write, lambda old: None) == read_sealed(folder / digests.INDEX)
    assert (first["number"], list(first["files"]), len(calls)) == (3, ["data"], 1)
    (folder / "beside").write_text("not in the index")
    assert find_damage(folder, first["files"]) is None
    (folder / "data").write_bytes(b"c0ntent")
    assert make_folder(folder, write, lambda old: None) == first
    assert "data" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
