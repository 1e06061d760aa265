"""Tables on Weights & Biases are those of the files, and offline runs are pushed or stay as they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.app import app
from mode.runs.tracking import list_unsynced, sync
from tests.conftest import World
from tests.runs.test_tracking import read_back
from tests.support.refusals import check_message, check_refused, refused

ROWS = (
    "[{name: backbone, label: Backbone, overrides: [method=backbone]},"
    " {name: lora, label: LoRA, overrides: [method=lora]}]"
)


@pytest.fixture
def own(shared_world: World, tmp_path: Path) -> World:
    """Return a world with folders of its own and a table named mine."""
    world = shared_world.at(tmp_path)
    fixed = [text for text in world.overrides if not text.startswith(("paths.", "track"))]
    table = f"title: Mine\nrows: {ROWS}\noverrides: {json.dumps(fixed)}\n"
    (world.conf / "table" / "mine.yaml").write_text(table, "utf-8")
    return world


def call(world: World, *arguments: str) -> Result:
    folders = [text for text in world.overrides if text.startswith("paths.")]
    return CliRunner().invoke(app, [*arguments, *folders, "--conf", str(world.conf)])


@pytest.fixture
def refusing() -> Iterator[str]:
    """Serve an address that answers and knows no key."""

    class Refuse(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if self.raw_requestline and self.parse_request():
                self.send_response(401)
                self.send_header("Content-Length", "0")
                self.end_headers()
            self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_report_run_has_the_tables_and_their_figures(own: World) -> None:
    assert call(own, "reproduce", "mine", "-j", "1").exit_code == 0
    result = call(own, "report", "mine", "--wandb")
    assert result.exit_code == 0, result.stderr
    run_id = result.stderr.partition("Weights & Biases as ")[2].partition(":")[0]
    assert call(own, "report", "mine", "--wandb").stderr.count(run_id) == 1  # the same tables are the same run
    (log, _) = sorted((own.root / "runs" / "report" / "wandb").glob("offline-run-*"))
    logged = read_back(next(log.glob("*.wandb")))
    assert (logged.run.run_id, logged.run.job_type, logged.exit_code) == (run_id, "report", 0)
    ids = {path.stem.rpartition("-")[2] for path in (own.root / "results" / "records").glob("*.json")}
    assert set(logged.config["records"]) == ids
    (point,) = logged.history
    table = json.loads((log / "files" / point["mine/path"]).read_text("utf-8"))
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    written = (own.root / "results" / "mine.md").read_text("utf-8")
    assert list(rows) == ["Backbone", "LoRA"]
    assert {len(row) for row in rows.values()} == {len(table["columns"])} != {0}
    assert all(cell in written for row in rows.values() for cell in row.values())
    assert (log / "files" / point["mine-figure/path"]).stat().st_size > 1000


@pytest.mark.slow
def test_what_cannot_be_logged_is_told(own: World) -> None:
    assert "one of the two" in call(own, "report", "mine", "--check", "--wandb").stderr
    check_refused(call(own, "report", "mine", "--wandb"), f"paths.results={own.root}/results")
    (own.root / "results").mkdir()
    nothing = call(own, "report", "mine", "--wandb")
    assert nothing.exit_code == 2
    check_message(nothing.stderr.splitlines()[-1], "mine")


def offline_log(runs: Path, name: str) -> Path:
    """Write what an offline run leaves."""
    path = runs / "abc" / "wandb" / f"offline-run-{name}-abc" / "run-abc.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b":W&B")
    return path


@pytest.mark.slow
def test_a_log_that_was_pushed_is_not_pushed_again(own: World) -> None:
    (runs := own.root / "runs").mkdir()
    assert "nothing to push" in call(own, "sync").stdout
    first, second = offline_log(runs, "20260102_000000"), offline_log(runs, "20260101_000000")
    assert list_unsynced(runs) == [second.parent, first.parent]
    second.with_name("run-abc.wandb.synced").touch()
    assert list_unsynced(runs) == [first.parent]


@pytest.mark.slow
def test_without_a_network_offline_runs_stay(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = offline_log(own.root / "runs", "20260101_000000")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    result = call(own, "sync")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert [item.name for item in path.parent.iterdir()] == ["run-abc.wandb"]


@pytest.mark.slow
def test_a_refused_key_is_told_and_offline_runs_stay(
    own: World, refusing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WANDB_BASE_URL": refusing, "HOME": str(own.root), "NETRC": str(own.root / "none")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert call(own, "train", "baseline", "lora", *own.overrides, "track=wandb").exit_code == 0
    (log,) = list_unsynced(own.root / "runs")
    result = call(own, "sync")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("mode: Weights & Biases: No API key configured")
    assert list_unsynced(own.root / "runs") == [log]
    with refused("Weights & Biases", "API key"):
        sync([log])
