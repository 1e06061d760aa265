"""A method of an installed package stands beside the project's own, and a broken one breaks nothing but itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from mode.config.groups import list_members
from mode.records.record import read_records
from tests.conftest import World

ROOT = Path(__file__).parents[2]
PACKAGE = "mode_norms_example"
NORMS = '''
"""Tune the norms alone."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from mode.config.base import STRICT
from mode.methods.base import Method


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Norms(Method):
    """Tune the norms alone."""

    recorded_as: ClassVar[str] = "norms-example"

    scope: str

    def build(self, run, material):
        """Return the backbone with its norms trainable."""
        model = material.backbone().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.scope in name)
        return model


class Plain:
    """A class that is not a method."""
'''
FILES = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/norms.py": NORMS,
    f"{PACKAGE}/unimportable.py": "raise RuntimeError('the library that it needs is too old')\n",
    f"{PACKAGE}/conf/method/norms_example.yaml": f"_target_: {PACKAGE}.norms.Norms\nlr: 1.0e-2\nscope: norm\n",
    f"{PACKAGE}/conf/method/by_name.yaml": "_target_: norms\nlr: 1.0e-2\nscope: norm\n",
    f"{PACKAGE}/conf/method/not_yaml.yaml": "lr: [\n",
    f"{PACKAGE}/conf/method/a_list.yaml": "- lr\n",
    f"{PACKAGE}/conf/method/no_target.yaml": "lr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/unimportable.yaml": f"_target_: {PACKAGE}.unimportable.Norms\nlr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/missing_class.yaml": f"_target_: {PACKAGE}.norms.Missing\nlr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/not_a_method.yaml": f"_target_: {PACKAGE}.norms.Plain\nlr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/unregistered.yaml": f"_target_: {PACKAGE}.trap.Norms\nlr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/sft.yaml": f"_target_: {PACKAGE}.norms.Norms\nlr: 1.0e-2\nscope: norm\n",
    f"{PACKAGE}/conf/domain/code.yaml": "description: Another.\n",  # as above: the project's is read
    f"{PACKAGE}/trap.py": "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\n",
    f"{PACKAGE}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n",
    f"{PACKAGE}-1.0.dist-info/entry_points.txt": dedent(
        f"""
        [mode.methods]
        norms = {PACKAGE}.norms:Norms
        unimportable = {PACKAGE}.unimportable:Norms
        missing_class = {PACKAGE}.norms:Missing
        not_a_method = {PACKAGE}.norms:Plain
        """
    ),
}
BROKEN = {
    "not_yaml": "not_yaml.yaml",
    "a_list": "method._target_",
    "no_target": "method._target_",
    "unimportable": "too old",
    "missing_class": f"{PACKAGE}.norms.Missing",
    "not_a_method": f"{PACKAGE}.norms.Plain",
    "unregistered": f"{PACKAGE}.trap.Norms",
}
"""Methods that cannot be used, and what the message has to name."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an installed package."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def run_python(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the package is installed."""
    variables = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=site, env=variables
    )


@pytest.mark.slow
def test_it_is_listed_beside_the_projects_own_whatever_else_is_broken(site: Path) -> None:
    done = run_python(site, "-m", "cli", "show", "methods")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert lines.keys() == {*list_members("method"), "norms_example", "by_name", *BROKEN}
    for name in ("norms_example", "by_name"):
        assert lines[name].split(maxsplit=1)[1] == "Tune the norms alone."
    for name, named in BROKEN.items():
        assert named in lines[name]
    assert lines["sft"].split(maxsplit=1)[1] != "Tune the norms alone."
    assert not (site / PACKAGE / "sprung").exists()  # what no entry point registers is not imported


@pytest.mark.parametrize(
    "name", [name if name == "unregistered" else pytest.param(name, marks=pytest.mark.slow) for name in BROKEN]
)
def test_a_broken_one_says_in_one_line_what_is_wrong(site: Path, name: str) -> None:
    done = run_python(site, "-m", "cli", "show", "config", f"method={name}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mode: ")
    assert BROKEN[name] in line


@pytest.mark.slow
def test_it_trains_and_the_record_has_its_name(site: Path, world: World) -> None:
    done = run_python(
        *(site, "-m", "cli", "train", "baseline", "norms_example", "--conf", str(world.conf), *world.overrides)
    )
    assert done.returncode == 0, done.stderr
    (record,) = read_records(world.root / "results")
    assert record.asked["method"] == {"_target_": "norms-example", "lr": 0.01, "scope": "norm"}
    assert record.happened["steps"] == 4
    assert 0 < record.happened["parameters"]["trainable"] < record.happened["parameters"]["total"]
    again = run_python(
        *(site, "-m", "cli", "train", "baseline", "by_name", "--conf", str(world.conf), *world.overrides)
    )
    assert f"run {record.id} is done" in again.stdout, again.stderr  # the same class by the name of its entry point
