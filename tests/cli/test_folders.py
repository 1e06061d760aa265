"""Folders that a command reads and that do not exist are named, and a broken file does not stop a listing."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app
from tests.support.refusals import check_refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("report", "table1"), "results"),
        (("report", "--check"), "results"),
        (("show", "runs"), "results"),
        (("show", "runs"), "runs"),
        (("sync",), "runs"),
        (("prune", "3f2a"), "runs"),
        (("generate", "3f2a", "text"), "runs"),
        (("export", "3f2a", "new"), "runs"),
        (("expert", "show", "3f2a"), "runs"),
    ],
)
def test_a_folder_that_does_not_exist_is_named(
    words: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody has trained
    folder = tmp_path / "none"
    check_refused(CliRunner().invoke(app, [*words, f"paths.{name}={folder}"]), f"paths.{name}={folder}")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_does_not_stop_a_listing(tmp_path: Path) -> None:
    (tmp_path / "domain").mkdir()
    (tmp_path / "domain" / "mine.yaml").write_bytes(b"description: \xe9\n")
    done = CliRunner().invoke(app, ["show", "domains", "--conf", str(tmp_path)])
    assert done.exit_code == 0
    assert str(tmp_path / "domain" / "mine.yaml") in done.stdout
    assert {"code", "english", "math"} <= {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", ["../x", "true", "a b"])
def test_a_name_for_a_machine_is_checked_before_it_is_measured(name: str, tmp_path: Path) -> None:
    check_refused(CliRunner().invoke(app, ["plan", "--calibrate", name, "--conf", str(tmp_path)]), name)
    assert list(tmp_path.iterdir()) == []
