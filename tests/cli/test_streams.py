"""Standard streams that are closed, full or ASCII, and a missing home folder: no traceback, and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import World

ASCII = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)
SHOW = ("show", "domains")
STREAMS = [
    *[pytest.param(SHOW, each, 0, marks=pytest.mark.slow) for each in ("", ">&-", "2>&-", "<&- >&- 2>&-")],
    pytest.param(SHOW, ">/dev/full", 2, marks=pytest.mark.slow),
    (("--help",), ">/dev/full", 2),
    (("show", "domain"), ">&-", 2),
    (("show", "domain"), "2>&-", 2),
    (("show", "domain"), "2>/dev/full", 2),
]


def run_shell(words: tuple[str, ...], redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `mode` in a shell, with redirected streams."""
    script = f'exec "$@" {redirection}'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "cli", *words]
    given = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=given, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("words", "redirection", "code"), STREAMS)
def test_streams_that_are_closed_or_full_give_no_traceback(words: tuple[str, ...], redirection: str, code: int) -> None:
    done = run_shell(words, redirection)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if redirection == ">/dev/full":
        (line,) = done.stderr.splitlines()
        assert line.startswith("mode: ")


@pytest.mark.slow
@pytest.mark.parametrize("environment", ASCII)
def test_output_in_ascii_says_the_same(world: World, environment: dict[str, str]) -> None:
    words = ("train", "baseline", "sft", *world.overrides, "--conf", str(world.conf))
    plain, escaped = run_shell(words, "", PYTHONUTF8="1"), run_shell(words, "", **environment)
    for done in (plain, escaped):
        assert done.returncode == 0, done.stderr
    scores = [done.stdout.splitlines()[-3:] for done in (plain, escaped)]
    assert "±" in scores[0][0]
    assert [line.replace("±", r"\xb1") for line in scores[0]] == scores[1]


@pytest.mark.slow
def test_a_closed_output_does_not_get_into_the_files_of_a_run(world: World) -> None:
    words = ("train", "baseline", "sft", *world.overrides, "--conf", str(world.conf))
    done = run_shell(words, "<&- >&- 2>&-")
    assert done.returncode == 0
    files = [path for path in world.root.rglob("*") if path.is_file()]
    assert len(list((world.root / "results" / "records").glob("*.json"))) == 1
    assert not [path for path in files if b"run " in path.read_bytes()[:4]]


@pytest.mark.slow
def test_a_path_that_needs_a_missing_home_folder_is_refused(world: World) -> None:
    words = ("show", "runs", *world.overrides, "paths.results=~no-such-user/results", "--conf", str(world.conf))
    done = run_shell(words, "")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "~no-such-user/results" in line
