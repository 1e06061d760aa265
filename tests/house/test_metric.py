"""A metric is one declaration: proven by adding one to a copy of the project and using its command line.

The copy differs in one place of one file. Its command line then prints the metric, records it, and shows it in a table
and on the page.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import World

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLACE = Path("mode/records/metrics.py")
COPIED = ("cli", "mode", "baselines", "conf")
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc", "embedded")
LAST = """        Metric(
            name="bits-per-byte","""
METRIC = """        Metric(
            name="mean-reciprocal-rank",
            heading="Mean reciprocal rank",
            definition="mean reciprocal rank of the right token",
            value=lambda tokens: 1.0 / (1.0 + tokens.rank),
            sums="document_reciprocal_ranks",
            decimals=4,
        ),
"""
TABLE = """title: "Ranks"
overrides: [{overrides}]
rows:
  - {{name: backbone, label: "Backbone", overrides: [method=backbone]}}
  - {{name: sft, label: "SFT", overrides: [method=sft]}}
differences: [[sft, backbone]]
"""


@dataclass(frozen=True)
class Grown:
    """A copy of the project with one metric more.

    Attributes:
        root: The copy.
        words: Settings and the folder of configuration that keep runs small.
        printed: What the two runs' commands printed.
    """

    root: Path
    words: tuple[str, ...]
    printed: dict[str, str]

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the two records by method."""
        paths = (self.root / "results" / "records").glob("*.json")
        return {path.name.partition("-")[0]: json.loads(path.read_text("utf-8")) for path in paths}


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a copy's command line."""
    command = [sys.executable, "-m", "cli.app", *words]
    variables = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=variables)


@pytest.fixture(scope="module")
def grown(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """Copy the project, declare a metric in it, and make two runs."""
    root = tmp_path_factory.mktemp("grown")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=SKIP)
    text = (root / PLACE).read_text("utf-8")
    assert text.count(LAST) == 1
    (root / PLACE).write_text(text.replace(LAST, METRIC + LAST), encoding="utf-8")
    conf = root / "own"
    shutil.copytree(shared_world.conf, conf)
    small = [text for text in shared_world.overrides if not text.startswith("paths.")]
    quoted = ", ".join(f'"{text}"' for text in small)
    (conf / "table" / "ranks.yaml").write_text(TABLE.format(overrides=quoted), encoding="utf-8")
    paths = (f"paths.runs={root}/runs", f"paths.results={root}/results", f"paths.cache={root}/cache")
    printed = {}
    for method in ("backbone", "sft"):
        done = run(root, "train", "baseline", method, *small, *paths, "--conf", str(conf))
        assert done.returncode == 0, done.stderr
        printed[method] = done.stdout
    return Grown(root, (*paths, "--conf", str(conf)), printed)


def cells(text: str, heading: str) -> dict[str, str]:
    """Return a column of the first table in Markdown, by label."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[1].splitlines()]
    return {line[0]: line[lines[0].index(heading)] for line in lines[2:]}


def test_one_file_differs_by_the_declaration(grown: Grown) -> None:
    found = [path for name in COPIED for path in (grown.root / name).rglob("*") if path.is_file()]
    names = [str(path.relative_to(grown.root)) for path in found if "__pycache__" not in path.parts]
    assert filecmp.cmpfiles(ROOT, grown.root, names, shallow=False)[1:] == ([str(PLACE)], [])
    assert (grown.root / PLACE).read_text("utf-8").replace(METRIC, "") == (ROOT / PLACE).read_text("utf-8")


def test_records_hold_it_whole_and_by_document(grown: Grown) -> None:
    for record in grown.records().values():
        for score in record["happened"]["scores"].values():
            sums, tokens = score["document_reciprocal_ranks"], score["document_tokens"]
            assert len(sums) == len(tokens)
            assert score["mean_reciprocal_rank"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-3)
            # A right guess has 1, and any of the five likeliest at least 1/5.
            least = score["accuracy"] + (score["top_5_accuracy"] - score["accuracy"]) / 5
            assert least <= score["mean_reciprocal_rank"] < 1.0


def test_the_command_line_prints_it(grown: Grown) -> None:
    for method, record in grown.records().items():
        printed = grown.printed["backbone" if method == "untouched" else method]
        heads, *rows = [re.split(r"  +", line) for line in printed.splitlines() if line[:1] not in (" ", "r")]
        place = heads.index("mean reciprocal rank")
        found = {row[0]: row[place].split()[0] for row in rows}
        assert found == {
            name: f"{score['mean_reciprocal_rank']:.4f}" for name, score in record["happened"]["scores"].items()
        }


def test_a_table_shows_it_with_differences_and_intervals(grown: Grown) -> None:
    done = run(grown.root, "report", "ranks", "--metric", "mean-reciprocal-rank", *grown.words)
    assert done.returncode == 0, done.stderr
    assert (grown.root / "results" / "ranks-mean-reciprocal-rank.md").exists()
    scores = {name: record["happened"]["scores"] for name, record in grown.records().items()}
    shown = cells(done.stdout, "Prose, mean reciprocal rank")
    sft, bare = (scores[name]["prose"]["mean_reciprocal_rank"] for name in ("sft", "untouched"))
    assert (shown["SFT"].strip("*"), shown["Backbone"].strip("*")) == (f"{sft:.4f}", f"{bare:.4f}")
    assert shown["SFT − Backbone"].strip("*") == f"{sft - bare:+.4f}"
    intervals = done.stdout.partition("over documents:")[2]
    assert " to " in cells(f"\n\n{intervals.strip()}", "Prose, mean reciprocal rank")["SFT − Backbone"]
    usual = run(grown.root, "report", "ranks", *grown.words)
    assert "reciprocal" not in usual.stdout


def test_the_page_shows_it(grown: Grown) -> None:
    done = run(grown.root, "report", "ranks", "--html", *grown.words)
    assert done.returncode == 0, done.stderr
    page = (grown.root / "results" / "report.html").read_text("utf-8")
    assert "Mean reciprocal rank</th>" in page
    for record in grown.records().values():
        for score in record["happened"]["scores"].values():
            assert f"{score['mean_reciprocal_rank']:.4f}" in page


def test_a_record_made_before_shows_a_dash(grown: Grown, tmp_path: Path) -> None:
    shutil.copytree(grown.root / "results" / "records", tmp_path / "records")
    (path,) = (tmp_path / "records").glob("sft-*.json")
    record = json.loads(path.read_text("utf-8"))
    for score in record["happened"]["scores"].values():
        del score["mean_reciprocal_rank"], score["document_reciprocal_ranks"]
    del record["digest"]
    path.write_text(json.dumps(record), encoding="utf-8")
    words = [text for text in grown.words if not text.startswith("paths.results=")]
    done = run(grown.root, "report", "ranks", "--metric", "mean-reciprocal-rank", f"paths.results={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    shown = cells(done.stdout, "Prose, mean reciprocal rank")
    assert (shown["SFT"], shown["SFT − Backbone"]) == ("–", "–")
    assert shown["Backbone"] != "–"
    assert cells(run(grown.root, "report", "ranks", f"paths.results={tmp_path}", *words).stdout, "Prose")["SFT"] != "–"
