"""The campaign catches faults that are put in on purpose, goes on where it was, and counts truthfully."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mode.downstream.sandbox import Verdict
from tests.campaign import artefacts, calls, sandbox
from tests.campaign.command_lines import find_line_fault
from tests.campaign.place import Place
from tests.campaign.processes import Ended, find_fault, find_refusal_fault, run_mode
from tests.campaign.trials import Kind, Results, Trial, draw, format_table, run_trials


def make_results(folder: Path, code: str = "now") -> Results:
    return Results(folder / "results.jsonl", code)


def test_faults_are_counted_and_finished_trials_are_not_made_again(tmp_path: Path) -> None:
    def leave_mark(folder: Path) -> None:
        with (tmp_path / "marks").open("a") as file:
            file.write(f"{folder.name[:4]}\n")

    trials = {
        "some/0": Trial("survives", leave_mark),
        "some/1": Trial("fails", lambda folder: "broken on purpose"),
        "some/2": Trial("dies", lambda folder: os._exit(3)),
    }
    (tmp_path / "work").mkdir()
    shown: list[str] = []
    for _ in range(2):
        run_trials(trials, make_results(tmp_path), 7, tmp_path / "work", show=shown.append)
    assert (tmp_path / "marks").read_text().splitlines() == ["some"]
    assert sorted(text.split(":")[0] for text in shown) == ["some/1", "some/2"]
    assert all("--seed 7 --only some/" in text for text in shown)
    kinds = [Kind("some", "anything", lambda place, seed: []), Kind("other", "x", lambda place, seed: [])]
    table = format_table(kinds, make_results(tmp_path), 7, {"some": list(trials), "other": "no compiler"})
    assert table.splitlines()[2:] == ["| some | 3 | 1 | anything |", "| other | not run | | no compiler |"]
    assert list((tmp_path / "work").iterdir()) == []


def test_results_of_other_code_do_not_count(tmp_path: Path) -> None:
    make_results(tmp_path).add(0, "some/0", "name", None, 1.0)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"code": "now", "se')  # killed while it wrote
    assert list(make_results(tmp_path).found) == [(0, "some/0")]
    assert make_results(tmp_path, "later").found == {}


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "fine", ""), None),
        (Ended(2, "", "mode: x.yaml: wrong\n"), None),
        (Ended(None, "", ""), "does not end"),
        (Ended(-7, "", ""), "exit code -7"),
        (Ended(3, "", "mode: x\n"), "exit code 3"),
        (Ended(2, "", ""), "without a message"),
        (Ended(1, "", "Traceback (most recent call last):\nKeyError: 1\n"), "traceback: KeyError: 1"),
        (Ended(0, "", "Traceback (most recent call last):\nKeyError: 1\n"), "traceback: KeyError: 1"),
        (Ended(2, "", "mode: one\nand another\n"), "not one line"),
    ],
)
def test_an_end_is_judged(ended: Ended, fault: str | None) -> None:
    assert (find_line_fault(ended) is None) == (fault is None)
    assert fault is None or fault in str(find_line_fault(ended))


def test_a_refusal_names_the_file() -> None:
    refusal = Ended(2, "", "mode: runs/1/weights.safetensors: damaged\n")
    assert find_refusal_fault(refusal, ["weights.safetensors"]) is None
    assert "does not name" in str(find_refusal_fault(refusal, ["curve.jsonl"]))
    assert "exit code 0" in str(find_refusal_fault(Ended(0, "", ""), ["curve.jsonl"]))


def test_a_broken_command_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_fault(run_mode(["show", "tables"], tmp_path)) is None

    def break_it(*arguments: object) -> None:
        raise KeyError("on purpose")

    monkeypatch.setattr("cli.show.print_group", break_it)
    assert "KeyError: 'on purpose'" in str(find_fault(run_mode(["show", "tables"], tmp_path)))
    monkeypatch.setattr("cli.show.print_group", lambda *arguments: os.kill(os.getpid(), 9))
    assert "exit code -9" in str(find_fault(run_mode(["show", "tables"], tmp_path)))


@pytest.mark.slow
def test_a_command_that_does_not_end_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*arguments: object) -> None:
        while True:
            pass

    monkeypatch.setattr("cli.show.print_group", loop)
    assert find_fault(run_mode(["show", "tables"], tmp_path, seconds=1)) == "does not end"


def test_a_sandbox_that_fails_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)  # the attempt sets it, and has a process of its own elsewhere

    def write_outside(program: str, *arguments: object) -> Verdict:
        (tmp_path / "written" / "outside" / "new").write_text("x")
        return Verdict("failed", "PermissionError")

    for name, run, fault in (
        ("passes", lambda *arguments: Verdict("passed"), "passed"),
        ("written", write_outside, "a file outside is changed"),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.setattr("mode.downstream.sandbox.run_program", run)
        assert sandbox.attempt("os.fork()", sandbox.ADD, "failed", tmp_path / name) == fault


@pytest.mark.parametrize("damage", artefacts.DAMAGES)
@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.bin", "a.npy", "a.jsonl", "a.safetensors"])
def test_damage_changes_a_file(name: str, damage: str, tmp_path: Path) -> None:
    import numpy as np
    import yaml
    from safetensors.numpy import save_file

    path, tree = tmp_path / name, {"a": [1, {"b": "text"}], "c": 2.0}
    if path.suffix == ".npy":
        np.save(path, np.arange(5))
    elif path.suffix == ".safetensors":
        save_file({"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.ones(3, dtype="f4")}, path)
    else:
        text = {".json": json.dumps(tree), ".yaml": yaml.safe_dump(tree), ".bin": "abcdef", ".jsonl": "{}\n[1]\n"}
        path.write_text(text[path.suffix])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("other")
    before = path.read_bytes()
    artefacts.apply_damage(path, tmp_path, damage, 0.4, 0.3)
    assert (path.read_bytes() if path.exists() else None) != before


@pytest.mark.slow
def test_examples_are_the_same_for_a_seed() -> None:
    from hypothesis import strategies as st

    drawn = [draw(st.lists(st.integers()), 20, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({repr(each) for each in drawn[0]}) == 20


WATCHED = """
import os, sys
from pathlib import Path
from tests.campaign import calls
folder, action, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
calls.arm(folder / "in", action, number, folder / "log")
(folder / "out").write_bytes(b"not watched")
try:
    with (folder / "in" / "new").open("wb", buffering=0) as file:
        file.write(b"12345678")
        os.fsync(file.fileno())
    os.replace(folder / "in" / "new", folder / "in" / "whole")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "number", "code", "out", "files"),
    [
        (calls.COUNT, 0, 0, "", {"whole": "12345678"}),
        (calls.KILL, 1, -9, "", {}),
        (calls.KILL, 2, -9, "", {"new": "1234"}),
        (calls.KILL, 4, -9, "", {"new": "12345678"}),
        (calls.FULL, 2, 0, "No space left on device", {"new": ""}),
        (calls.FULL, 4, 0, "", {"whole": "12345678"}),
    ],
)
def test_calls_are_counted_killed_and_refused(
    action: int, number: int, code: int, out: str, files: dict[str, str], tmp_path: Path
) -> None:
    library = calls.build_library(tmp_path)
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    (tmp_path / "in").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path), str(action), str(number)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (code, out), done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "in").iterdir()} == files
    if action == calls.COUNT:
        found = [(name, grows) for name, grows, _ in calls.read_log(tmp_path / "log")]
        assert found == [("open", True), ("write", True), ("fsync", True), ("rename", False)]


def test_a_place_makes_nothing_before_it_is_asked(tmp_path: Path) -> None:
    Place(tmp_path)
    assert list(tmp_path.iterdir()) == []
