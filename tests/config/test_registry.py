"""A method of an installed package stands beside the project's own, and a broken one breaks nothing but itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from baselines.sft import SFT
from mode.config import registry
from mode.config.groups import list_members, read_group
from mode.config.registry import find_method
from mode.core.errors import ConfigError
from mode.methods.pretrain import Pretrain
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Twin(Norms):
    """A method with the name in records of one of the project's."""

    recorded_as: ClassVar[str] = "mode.pretrain.Pretrain"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Left(Norms):
    """One of two methods with the same name in records."""

    recorded_as: ClassVar[str] = "norms-pair"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Right(Norms):
    """The other of two methods with the same name in records."""

    recorded_as: ClassVar[str] = "norms-pair"


class Plain:
    """A class that is not a method."""
'''
FILES = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/norms.py": NORMS,
    f"{PACKAGE}/unimportable.py": "raise RuntimeError('the library that it needs is too old')\n",
    f"{PACKAGE}/leaving.py": "import sys\nsys.exit(0)\n",
    f"{PACKAGE}/conf/method/leaving.yaml": f"_target_: {PACKAGE}.leaving.Norms\nlr: 1.0e-2\n",
    f"{PACKAGE}/conf/method/twin.yaml": f"_target_: {PACKAGE}.norms.Twin\nlr: 1.0e-2\nscope: norm\n",
    f"{PACKAGE}/conf/method/left.yaml": f"_target_: {PACKAGE}.norms.Left\nlr: 1.0e-2\nscope: norm\n",
    f"{PACKAGE}/conf/method/right.yaml": f"_target_: {PACKAGE}.norms.Right\nlr: 1.0e-2\nscope: norm\n",
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
        leaving = {PACKAGE}.leaving:Norms
        twin = {PACKAGE}.norms:Twin
        left = {PACKAGE}.norms:Left
        right = {PACKAGE}.norms:Right
        baselines.sft.SFT = {PACKAGE}.norms:Norms
        """
    ),
}
BROKEN = {
    "not_yaml": "not_yaml.yaml",
    "a_list": "a_list.yaml",
    "no_target": "method._target_",
    "unimportable": "too old",
    "missing_class": f"{PACKAGE}.norms.Missing",
    "not_a_method": f"{PACKAGE}.norms.Plain",
    "unregistered": f"{PACKAGE}.trap.Norms",
    "leaving": f"{PACKAGE}.leaving.Norms",
    "twin": "mode.methods.pretrain.Pretrain",
    "left": f"{PACKAGE}.norms.Right",
    "right": f"{PACKAGE}.norms.Left",
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


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the package in this process."""
    cached = (registry.list_registered, registry.list_registered_folders, registry.list_recorded_methods)
    monkeypatch.syspath_prepend(str(site))
    for function in cached:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.mark.usefixtures("installed")
def test_it_replaces_no_class_of_the_project() -> None:
    assert find_method("norms").recorded_name() == "norms-example"
    assert find_method("baselines.sft.SFT") is SFT
    assert find_method("mode.pretrain.Pretrain") is Pretrain  # by its name in records, which the package has taken


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["leaving", "twin", "left", "right"])
def test_what_cannot_be_used_is_refused(name: str) -> None:
    target = read_group("method", name)["_target_"]
    with pytest.raises(ConfigError, match=rf"^method\._target_={re.escape(target)}: ") as caught:
        find_method(target)
    assert BROKEN[name] in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_name_in_records_of_two_methods_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^method\._target_=norms-pair: recorded_as=norms-pair "):
        find_method("norms-pair")


@pytest.mark.slow
def test_it_is_listed_beside_the_projects_own_whatever_else_is_broken(site: Path) -> None:
    done = run_python(site, "-m", "cli", "show", "methods")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert lines.keys() == {*list_members("method"), "norms_example", "by_name", *BROKEN}
    for name in ("norms_example", "by_name"):
        assert "cannot be used" not in lines[name]
        described = run_python(site, "-m", "cli", "show", "methods", "--describe", name)
        assert described.stdout.splitlines()[0] == f"{name}: Tune the norms alone."
    for name, named in BROKEN.items():
        assert named in lines[name]
    described = run_python(site, "-m", "cli", "show", "methods", "--describe", "sft")
    assert described.stdout.splitlines()[0] != "sft: Tune the norms alone."
    assert not (site / PACKAGE / "sprung").exists()  # what no entry point registers is not imported


@pytest.mark.slow
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
