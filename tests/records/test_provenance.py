"""Reading the state of the source tree changes nothing in the user's repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mode.records.provenance import run_git


def test_reading_the_state_of_a_repository_takes_no_lock_of_its_index(tmp_path: Path) -> None:
    path, index = tmp_path / "a.py", tmp_path / ".git" / "index"
    path.write_text("a = 1\n", encoding="utf-8")
    for words in (["init", "-q"], ["add", "a.py"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    os.utime(path, (1, 1))  # now git would refresh the index
    before = index.read_bytes()
    assert run_git(tmp_path, "status", "--porcelain") == "A  a.py"
    assert index.read_bytes() == before
    (tmp_path / ".git" / "index.lock").touch()  # as while the user commits
    assert run_git(tmp_path, "status", "--porcelain") == "A  a.py"
