"""Names with numbers, and JSON that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.core.files import list_checkpoints, locate_checkpoint, read_json
from tests.support.refusals import refused
from tests.support.work import limit_calls


def test_only_folders_with_a_step_are_checkpoints(tmp_path: Path) -> None:
    steps = [2, 10, 9]
    for name in (
        *(f"checkpoint-{step}" for step in steps),
        "checkpoint-²",
        "checkpoint-٣",
        "checkpoint-",
        "checkpoint-1a",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-last-3").mkdir()
    assert list_checkpoints(tmp_path) == [locate_checkpoint(tmp_path, step) for step in sorted(steps)]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"a"', b"\xff{}", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
)
def test_json_that_is_not_an_object_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with limit_calls(1000), refused(str(path)):
        read_json(path)
    with refused("none.json"):
        read_json(tmp_path / "none.json")


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"a": [1, {"b": null}]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, {"b": None}]}
