"""Locks that are waited for, folders that change while they are read, and a home folder that does not exist."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from mode.core.files import expand_home, find_paths, read_existing
from mode.core.locks import LOCK, lock_folder
from tests.support.refusals import refused


@pytest.mark.slow
def test_a_lock_is_refused_or_waited_for_and_names_its_holder(tmp_path: Path) -> None:
    folder, waited, order = tmp_path / "run", [], []
    with lock_folder(folder):
        with refused(str(folder), f"process {os.getpid()}"), lock_folder(folder):
            raise AssertionError

        def take() -> None:
            with lock_folder(folder, waited.append):
                order.append("second")

        second = threading.Thread(target=take)
        second.start()
        second.join(0.7)  # several attempts, one message
        assert second.is_alive()
        order.append("first")
    second.join(30)
    assert order == ["first", "second"]
    assert waited == [f"process {os.getpid()}"]
    assert not folder.exists()  # it holds nothing but the lock


def test_a_lock_of_a_folder_that_was_removed_meanwhile_is_not_enough(tmp_path: Path) -> None:
    """The second process has opened the lock that the first removes; it must not train beside a third."""
    folder = tmp_path / "run"
    held = lock_folder(folder)
    held.__enter__()
    old = (folder / LOCK).stat().st_ino
    taken: list[bool] = []

    def take() -> None:
        with lock_folder(folder, lambda holder: None):
            (folder / "kept").touch()
            with refused(str(folder)), lock_folder(folder):
                raise AssertionError
            taken.append((folder / LOCK).stat().st_ino == old)

    second = threading.Thread(target=take)
    second.start()
    second.join(0.3)
    held.__exit__(None, None, None)
    second.join(30)
    assert len(taken) == 1
    assert (folder / LOCK).read_text("utf-8").strip() == str(os.getpid())


def test_paths_that_vanish_while_a_folder_is_read_are_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(name, encoding="utf-8")
    paths = find_paths(tmp_path, "*/run.yaml")
    assert [path.parent.name for path in paths] == ["a", "b", "c"]
    shutil.rmtree(tmp_path / "b")
    assert read_existing(paths, lambda path: path.read_text("utf-8")) == ["a", "c"]
    assert find_paths(tmp_path / "nowhere", "*/run.yaml") == []
    (tmp_path / "c" / "run.yaml").write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):  # only what is gone is left out
        read_existing(paths, lambda path: path.read_text("utf-8"))


def test_a_folder_that_vanishes_during_the_search_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-1").mkdir()
    scan = os.scandir

    def remove_and_scan(path: str | int) -> object:
        if Path(str(path)).parent == tmp_path:
            for other in set("abc") - {Path(str(path)).name}:
                shutil.rmtree(tmp_path / other, ignore_errors=True)
        return scan(path)

    monkeypatch.setattr(os, "scandir", remove_and_scan)
    assert len(find_paths(tmp_path, "*/checkpoint-*")) == 1


def test_a_path_without_a_home_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_home("~/a") == Path("/somewhere/a")
    assert expand_home("a/~") == Path("a/~")
    with refused("~no-such-user/a", "HOME"):
        expand_home("~no-such-user/a")
