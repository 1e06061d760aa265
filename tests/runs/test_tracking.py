"""What Weights & Biases is told, read back from the file that it writes offline."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mode.config.compose import compose as compose_run
from mode.config.run import Run, Track
from mode.core.errors import ConfigError
from mode.runs.execute import execute
from mode.runs.prepare import Prepared, prepare_run
from mode.runs.tracking import NoTracker, make_tracker, sync
from tests.conftest import World
from tests.support.refusals import refused

BLOCK, HEADER = 32768, 7


@dataclass
class Logged:
    """One offline run as its file tells it."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Configuration, without the library's own entry."""
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}


def frames(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a log in LevelDB's format: blocks of 32 KiB, entries cut into parts where a block ends."""
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def read_back(path: Path) -> Logged:
    """Read one .wandb file."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    logged = Logged()
    for frame in frames(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(frame)
        match record.WhichOneof("record_type"):
            case "run":
                logged.run = record.run
            case "history":
                logged.history.append(plain(record.history.item))
            case "summary":
                logged.summary |= plain(record.summary.update)
            case "exit":
                logged.exit_code = record.exit.exit_code
    return logged


def plain(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def offline(prepared: Prepared) -> list[Logged]:
    """Read what a run logged, oldest first."""
    paths = sorted((prepared.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert all(path.name == f"run-{prepared.id}.wandb" for path in paths)
    return [read_back(path) for path in paths]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuse any connection but to this machine itself, and any question to a person."""
    refused: list[Any] = []
    genuine = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            refused.append(address)
            raise OSError("no network in tests")
        genuine(self, address)

    def ask(prompt: str = "") -> str:
        refused.append(prompt)
        raise EOFError(prompt)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("builtins.input", ask)
    return refused


def compose(world: World, *overrides: str) -> Run:
    given = [text for text in world.overrides if not text.startswith("track")]
    return compose_run([*given, "track=wandb", "track.group=Tiny", "track.name=row", *overrides], world.conf)


@pytest.mark.slow
def test_a_run_can_be_watched_in_full(world: World, no_network: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = compose(world, "method=mode", "train.validate_every=2")
    seen: dict[str, list[dict[str, Any]]] = {}
    record = execute(run, observe=lambda prepared, point: seen.setdefault(prepared.id, []).append(dict(point)))
    assert no_network == []
    assert "wandb" not in "".join(capsys.readouterr()).lower()

    prepared = prepare_run(run)
    (logged,) = offline(prepared)
    told = logged.run
    assert (told.run_id, told.project, told.run_group) == (record.id, run.track.project, "Tiny")
    assert (told.job_type, told.display_name) == ("MoDE", "row-py-sums-s0")
    assert logged.config == record.asked
    assert logged.exit_code == 0

    assert [point["_step"] for point in logged.history] == [2, 4]
    gates = {f"gate/block{block}/branch{branch}" for block in range(3) for branch in range(3)}
    validations = {f"validation/{name}/{what}" for name in ("py", "sums") for what in ("accuracy", "loss")}
    for point, observed, kept in zip(logged.history, seen[record.id], record.happened["curve"], strict=True):
        wanted = {"loss", "accuracy", "lr", "tokens_per_second", "seconds", *gates, *validations}
        assert wanted <= set(point)
        for name in wanted:
            assert point[name] == pytest.approx(observed[name])
        assert {**kept, "tokens_per_second": observed["tokens_per_second"]} == observed
        assert point["tokens_per_second"] > 0
        assert 0 < point["lr"] <= run.lr
        for block in range(3):
            assert sum(point[f"gate/block{block}/branch{branch}"] for branch in range(3)) == pytest.approx(1, abs=1e-5)

    scores = record.happened["scores"]
    assert list(scores) == ["sums", "py", "prose"]
    for name, score in scores.items():
        assert logged.summary[f"test/{name}/accuracy"] == pytest.approx(score["accuracy"])

    # Each stage is a run of its own, under its own id.
    for stage in map(prepare_run, run.method.needs(run)):  # type: ignore[attr-defined]
        (logged,) = offline(stage)
        assert (logged.run.run_id, len(logged.history)) == (stage.id, 2)


@pytest.mark.slow
def test_an_interrupted_run_is_closed_and_goes_on_under_its_own_id(world: World) -> None:
    run = compose(world, "method=sft", "train.log_every=1")

    def interrupt(prepared: Prepared, point: dict[str, Any]) -> None:
        if point["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run, observe=interrupt)
    record = execute(run)  # from the checkpoint of step 2
    first, second = offline(prepare_run(run))
    assert first.run.run_id == second.run.run_id == record.id
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert [point["_step"] for point in first.history] == [1, 2]
    assert [point["_step"] for point in second.history] == [3, 4]
    assert not any(name.startswith("test/") for name in first.summary)
    assert second.summary["test/py/accuracy"] == pytest.approx(record.happened["scores"]["py"]["accuracy"])


@pytest.mark.slow
def test_an_offline_tracker_opens_with_what_is_logged_first(tmp_path: Path) -> None:
    settings = Track(mode="offline", project="p")
    tracker = make_tracker(settings, run_id="x", name="n", job_type="j", config={}, folder=tmp_path)
    tracker.abandon()
    assert not list(tmp_path.iterdir())
    tracker.log({"loss": 1.0}, step=1)
    assert list(tmp_path.glob("wandb/offline-run-*"))
    tracker.finish({})


@pytest.mark.slow
def test_tracking_changes_neither_a_runs_id_nor_its_numbers(world: World, tmp_path: Path) -> None:
    tracked = execute(compose(world, "method=sft"))
    plain = compose_run([*world.at(tmp_path / "other").overrides, "method=sft"], world.conf)
    record = execute(plain)
    assert record.id == tracked.id
    assert record.happened["scores"] == tracked.happened["scores"]
    assert not list((tmp_path / "other").rglob("*wandb*"))


def test_without_tracking_nothing_is_written(tmp_path: Path) -> None:
    settings = Track(mode="none", project="p")
    tracker = make_tracker(settings, run_id="x", name="n", job_type="j", config={}, folder=tmp_path)
    assert isinstance(tracker, NoTracker)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish({"accuracy": 0.5})
    tracker.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_refusal_of_weights_and_biases_takes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("no API key configured.\nUse wandb login.")

    monkeypatch.setattr(wandb, "init", refuse)
    settings = Track(mode="online", project="p")
    with pytest.raises(ConfigError) as caught:
        make_tracker(settings, run_id="x", name="n", job_type="j", config={}, folder=tmp_path)
    assert str(caught.value) == "Weights & Biases: no API key configured. (track=wandb logs offline)"


def test_without_a_home_folder_tracking_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with refused("HOME", "track=none"):
        make_tracker(Track(project="p", mode="offline"), run_id="x", name="n", job_type="j", config={}, folder=tmp_path)
    assert isinstance(
        make_tracker(Track(project="p", mode="none"), run_id="x", name="n", job_type="j", config={}, folder=tmp_path),
        NoTracker,
    )


@pytest.mark.parametrize("place", ["127.0.0.1:1", "127.0.0.1:no", "[::1"])
def test_no_password_of_a_server_is_printed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://somebody:secret@{place}/x")
    with refused(f"http://***@{place}/x") as caught:
        sync([tmp_path])
    assert not any(part in str(caught.value) for part in ("somebody", "secret"))


@pytest.mark.parametrize("project", ["a/b", "", "a\nb", "x" * 129])
def test_a_project_that_the_server_refuses_is_refused_before_training(project: str) -> None:
    with pytest.raises(ValueError, match="project"):
        Track(mode="offline", project=project)
