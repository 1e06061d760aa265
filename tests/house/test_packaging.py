"""The wheel holds the four packages, all their data and the licence, and nothing that belongs to a clone."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "mode", "baselines", "conf")
LOOSE = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc")


def files(folder: Path) -> set[str]:
    """Return the files of a source folder as they should stand in the wheel."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Build the wheel from a copy of the tree, with tests and results beside it, as in a clone."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=SKIP)
    for name in LOOSE:
        shutil.copy(ROOT / name, tree / name)
    (tree / "results" / "records").mkdir(parents=True)
    (tree / "results" / "records" / "some.json").write_text("{}", "utf-8")
    (tree / "runs" / "some").mkdir(parents=True)
    out = tree / "dist"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("mode_experts-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert len(tops) == len(PACKAGES) + 1


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_holds_every_file_of_a_package(wheel: zipfile.ZipFile, package: str) -> None:
    packed = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert packed == files(ROOT / package)


def test_the_wheel_holds_the_embedded_backbone_whole(wheel: zipfile.ZipFile) -> None:
    if not (ROOT / "mode" / "backbone" / "embedded" / "tiny").exists():
        pytest.skip("no embedded backbone in this tree")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = f"mode/backbone/embedded/tiny/{name}"
        assert wheel.read(path) == (ROOT / path).read_bytes()


def test_the_wheel_names_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entry = configparser.ConfigParser()
    entry.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry["console_scripts"]) == {"mode": "cli.app:main"}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nName: mode-experts\n" in metadata
    assert "Apache-2.0" in metadata
    (licence,) = [name for name in wheel.namelist() if name.startswith(info) and name.endswith("LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_unpacked_wheel_composes_a_run_away_from_the_clone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    script = "import sys, conf, cli.app; print(conf.__file__); sys.argv = ['mode', 'show', 'config']; cli.app.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    place, *shown = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert "targets:" in shown
