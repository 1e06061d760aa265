"""The script for a machine with a GPU, on a processor with tiny settings: it ends in time and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mode.records.record import read_records
from tests.conftest import World

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.sh"
PARTS = {"TESTS": "", "BENCH": "", "EXPERIMENT": "", "ROWS": "backbone sft", "MINUTES": "2", "PYTHON": sys.executable}


def start(world: World, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(SCRIPT), *world.overrides, "--conf", str(world.conf)]
    environment = os.environ | PARTS | variables
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_rows_are_executed_in_the_time_and_a_second_call_finds_them(world: World) -> None:
    first = start(world)
    assert first.returncode == 0, first.stderr
    assert "2 runs executed" in first.stderr
    assert {record.request.method_name for record in read_records(world.root / "results")} == {"Untouched", "SFT"}
    again = start(world)
    assert again.returncode == 0
    assert "0 runs executed, 2 existed" in again.stderr


@pytest.mark.slow
def test_a_failed_part_is_told_by_the_exit_code_and_the_others_run(world: World) -> None:
    done = start(world, TESTS="tests/no_such_file.py", ROWS="backbone")
    assert done.returncode == 1
    assert "1 runs executed" in done.stderr
