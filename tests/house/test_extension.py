"""A method is one file and one YAML; a domain, a backbone and a table are one YAML each: proven by adding one of each.

The project is copied, five files are added and nothing else is touched; the command line then lists, completes, trains,
corrects and tabulates what was added, and the tests discover it.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import World, documents

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COPIED = ("cli", "mode", "baselines", "conf", "tests")
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc", "embedded")

METHOD = '''"""Tune the norms alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass as settings

from mode.methods.base import Material, Method
from mode.config.base import STRICT
from mode.config.run import Run

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class Norms(Method):
    """Tune the norms alone.

    Attributes:
        scope: All norms, or the last one.
    """

    family: ClassVar[str] = "parts of the backbone"
    source: ClassVar[str] = "common practice"
    identical_at_start: ClassVar[bool] = True

    scope: Literal["all", "last"]

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with its norms trainable."""
        model: nn.Module = material.backbone().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name and (self.scope == "all" or name.startswith("model.norm")))
        return model
'''
METHOD_YAML = """_target_: baselines.norms.Norms
lr: 1.0e-2
scope: all
"""
DOMAIN_YAML = """description: tales of the king
licence: CC0-1.0
sources: [{kind: files, paths: [tales.jsonl]}]
splits: {test: 0.3, validation: 0.2, train: 0.5}
"""
BACKBONE_YAML = """name: nano
path: ./nano
revision: null
"""
TABLE_YAML = """title: "Tales. Norms against the untouched backbone"
overrides: [{overrides}]
rows:
  - {{name: backbone, label: "Backbone (untouched)", overrides: [method=backbone]}}
  - {{name: norms, label: "All norms", overrides: [method=norms]}}
  - {{name: last, label: "Last norm", overrides: [method=norms, method.scope=last]}}
differences: [[norms, last]]
"""
ADDED = {
    "baselines/norms.py",
    "conf/method/norms.yaml",
    "conf/domain/tales.yaml",
    "conf/backbone/nano.yaml",
    "conf/table/tales.yaml",
}


@dataclass(frozen=True)
class Grown:
    """A copy of the project with one of each added.

    Attributes:
        root: The copy.
        overrides: Settings that keep runs small and in the copy.
    """

    root: Path
    overrides: tuple[str, ...]

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy."""
        variables = os.environ | {"PYTHONPATH": str(self.root)} | environment
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=False, cwd=self.root, env=variables
        )

    def mode(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the copy's command line."""
        return self.python("-m", "cli.app", *words)


@pytest.fixture(scope="module")
def grown(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """Copy the project and add a method, a domain, a backbone and a table."""
    root = tmp_path_factory.mktemp("grown")
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=SKIP)
    shutil.copy(ROOT / "setup.cfg", root / "setup.cfg")
    shutil.copytree(shared_world.root / "pico", root / "nano")
    (root / "tales.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents("tales")), encoding="utf-8"
    )
    small = [text for text in shared_world.overrides if text.startswith("train.")]
    small += ["backbone=nano", "targets=[tales]", "evaluate.domains=[tales]", "track=none"]
    paths = [f"paths.{name}=work/{name}" for name in ("runs", "results", "cache")]
    quoted = ", ".join(f'"{text}"' for text in small)
    texts = (
        METHOD,
        METHOD_YAML,
        DOMAIN_YAML,
        BACKBONE_YAML,
        TABLE_YAML.format(overrides=quoted),
    )
    places = ("baselines/norms.py", *(f"conf/{each}" for each in ("method/norms", "domain/tales")))
    places = (*places, "conf/backbone/nano", "conf/table/tales")
    for place, text in zip(places, texts, strict=True):
        path = root / place if place.endswith(".py") else root / f"{place}.yaml"
        assert not path.exists()
        path.write_text(text, encoding="utf-8")
    return Grown(root, (*small, *paths))


def test_five_files_are_added_and_nothing_else_is_touched(grown: Grown) -> None:
    def files(root: Path) -> set[str]:
        found = (path for name in COPIED for path in (root / name).rglob("*") if path.is_file())
        kept = (path.relative_to(root) for path in found)
        return {str(path) for path in kept if not {"__pycache__", "embedded"} & set(path.parts)}

    same = files(ROOT)
    assert files(grown.root) - same == ADDED
    assert filecmp.cmpfiles(ROOT, grown.root, same, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        ("methods backbone=nano", "  norms "),
        ("domains", "tales            tales of the king"),
        ("backbones", "nano "),
        ("tables", "tales            Tales. Norms against the untouched backbone"),
    ],
)
def test_it_is_listed(grown: Grown, shown: str, line: str) -> None:
    done = grown.mode("show", *shown.split())
    assert done.returncode == 0, done.stderr
    assert [text for text in done.stdout.splitlines() if text.startswith(line)] != []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("train baseline no", "norms"), ("train expert --domain ta", "tales"), ("reproduce ta", "tales")],
)
def test_it_is_completed(grown: Grown, typed: str, expected: str) -> None:
    script = "import sys; sys.argv = ['mode']; from cli.app import main; main()"
    done = grown.python("-c", script, _MODE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=f"mode {typed}")
    assert f'"{expected}"' in done.stdout


def test_a_mistyped_setting_of_it_is_corrected(grown: Grown) -> None:
    done = grown.mode("train", "baseline", "norms", "method.scop=last", *grown.overrides)
    assert done.returncode == 2
    assert done.stderr == "mode: method.scop: no such setting; did you mean method.scope?\n"
    wrong = grown.mode("train", "baseline", "norms", "method.scope=first", *grown.overrides)
    assert wrong.returncode == 2
    assert wrong.stderr == "mode: method.scope=first: Input should be 'all' or 'last'\n"


def test_it_trains_and_leaves_a_record(grown: Grown) -> None:
    done = grown.mode("train", "baseline", "norms", "seed=5", *grown.overrides)
    assert done.returncode == 0, done.stderr
    (path,) = (grown.root / "work" / "results" / "records").glob("norms-tales-s5-*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["asked"]["method"] == {"_target_": "baselines.norms.Norms", "lr": 0.01, "scope": "all"}
    assert record["happened"]["steps"] == 4
    assert record["happened"]["parameters"]["added"] == 0
    assert 0 < record["happened"]["parameters"]["trainable"] < record["happened"]["parameters"]["total"]


def test_its_table_is_reproduced_and_then_only_rendered(grown: Grown) -> None:
    paths = [text for text in grown.overrides if text.startswith("paths.")]
    done = grown.mode("reproduce", "tales", "--jobs", "2", *paths)
    assert done.returncode == 0, done.stderr
    assert "3 runs executed, 0 existed, 0 failed" in done.stderr
    table = done.stdout.split("\n\n")[1]
    rows = [line.split("|")[1].strip() for line in table.splitlines()]
    assert rows[0] == "Method"
    assert rows[2:] == ["Backbone (untouched)", "All norms", "Last norm", "All norms − Last norm"]
    again = grown.mode("reproduce", "tales", *paths)
    assert "0 runs executed, 3 existed, 0 failed" in again.stderr
    assert again.stdout == done.stdout
    checked = grown.mode("report", "tales", "--check", *paths)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", ["tests/house/test_house.py", "tests/baselines/test_contract.py"])
def test_the_tests_discover_it_and_pass(grown: Grown, path: str) -> None:
    done = grown.python("-m", "pytest", "-p", "no:cacheprovider", "-vv", path, "-k", "norms or tales or nano")
    assert done.returncode == 0, done.stdout
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    found = {line.partition("[")[2].partition("]")[0] for line in passed}
    assert found >= ({"norms"} if "contract" in path else {"norms", "tales", "nano"} | ADDED)
    if "contract" in path:  # what the class states of itself is tested too
        assert [line for line in passed if "test_starts_as_the_backbone[norms]" in line]
