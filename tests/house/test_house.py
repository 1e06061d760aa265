"""The house keeps its own rules: sizes, docstrings, a fixed top level, and every YAML composes and checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import mode
from mode.config import identity
from mode.config.check import check_run, fill_defaults_of, flatten
from mode.config.compose import compose, compose_plain
from mode.config.groups import GROUPS, read_group
from mode.config.run import Run
from mode.planning.machine import Device, Link, read_machine
from mode.tables.table import compose_row, list_rows_under, load_table
from tests.support import messages

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "mode", "baselines")
FILES = sorted(path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
YAMLS = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.y*ml"))
LINES_OF_A_FUNCTION = 50
LINES_OF_A_FILE = 400
TOLD_IN_ONE_PIECE = {"train": 80, "plan": 60, "modular_cost": 60, "train_and_record": 60, "report": 60}
"""Functions that may be longer, since they read better in one piece: one step, one formula, one table, one record."""
FOLDERS = {"cli", "mode", "conf", "docs", "baselines", "results", "scripts", "tests", ".ci"}
LOOSE = {
    "setup.cfg",
    "pyproject.toml",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "constraints.txt",
    ".pre-commit-config.yaml",
    ".gitignore",
}
MACHINE = re.compile(r"(?<!\w)/(?:home|Users|root|work|mnt|scratch|tmp|data|opt|usr|var)/")


def ids(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


def members(group: str) -> list[str]:
    """Return the names of a group's YAML files."""
    return [path.stem for path in YAMLS if path.parts[:-1] == (group,)]


def tracked() -> list[str]:
    """Return the files that git knows; none outside a clone."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_files_and_functions_stay_small_and_say_what_they_are(path: Path) -> None:
    text = (ROOT / path).read_text("utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [((node.end_lineno or node.lineno) - node.lineno + 1, node.name) for node in functions]
    assert [size for size in sizes if size[0] > TOLD_IN_ONE_PIECE.get(size[1], LINES_OF_A_FUNCTION)] == []


def test_the_top_level_is_the_one_agreed_on() -> None:
    names = {path.split("/")[0] for path in tracked()}
    if not names:
        pytest.skip("not a clone: git knows which files belong to the project")
    assert names <= FOLDERS | LOOSE
    assert names >= {"cli", "mode", "conf", "baselines", "tests", "setup.cfg"}


ROOMS = sorted(path.parent.name for path in (ROOT / "mode").glob("*/__init__.py"))
"""Packages of `mode`, one for each concern."""


def test_every_module_of_mode_lies_in_a_room() -> None:
    assert [path.name for path in (ROOT / "mode").iterdir() if path.is_file()] == ["__init__.py"]
    folders = {path.parts[1] for path in FILES if path.parts[0] == "mode" and len(path.parts) > 2}
    assert folders == set(ROOMS)


def test_the_tests_mirror_the_rooms() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders - {"house", "support", "campaign", "cli", "baselines"} - set(ROOMS) == set()
    assert {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")} == folders
    assert [path.name for path in (ROOT / "tests").glob("test_*.py")] == []


def test_git_knows_every_module() -> None:
    names = tracked()
    if not names:
        pytest.skip("not a clone: git knows which files belong to the project")
    found = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    assert found - set(names) == set()


def test_importing_mode_takes_no_torch() -> None:
    script = "import sys, mode; print({'torch', 'transformers', 'hydra'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_what_models_cards_import_is_there() -> None:
    former_model, former_expert = import_module("mode.model"), import_module("mode.expert")
    assert former_model.MoDEForCausalLM is mode.MoDEForCausalLM
    assert former_model.swap_expert is mode.swap_expert
    assert former_expert.load_experts is mode.load_experts
    with pytest.raises(ModuleNotFoundError):
        import_module("mode.nothing")


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    for name, module in mode.PUBLIC.items():
        assert getattr(mode, name) is getattr(import_module(module), name)
    assert {"MoDEForCausalLM", "make_modular", "swap_expert", "load_experts"} <= mode.PUBLIC.keys() <= set(mode.__all__)
    with pytest.raises(AttributeError):
        _ = mode.nothing


OTHERS = {"device", "domain", "downstream", "launcher", "link", "table"}
"""Groups of configuration that are not chosen for a run."""


@pytest.mark.parametrize(("group", "kind"), [("device", Device), ("link", Link)])
def test_every_device_and_link_checks(group: str, kind: type[Any]) -> None:
    for name in members(group):
        assert isinstance(read_machine(kind, group, name), kind)


def test_conf_holds_data_only() -> None:
    found = [path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*") if path.is_file()]
    odd = [path for path in found if path.suffix != ".yaml" and "__pycache__" not in path.parts]
    assert odd == [Path("__init__.py")]
    assert {path.parts[0] for path in YAMLS} == {*GROUPS, *OTHERS, "run.yaml"}
    assert [path for path in YAMLS if len(path.parts) > 2] == []


@pytest.mark.parametrize("path", [*FILES, *(Path("conf") / path for path in YAMLS)], ids=str)
def test_no_file_depends_on_one_machine(path: Path) -> None:
    lines = (ROOT / path).read_text("utf-8").splitlines()
    assert [line for line in lines if MACHINE.search(line)] == []


@pytest.mark.parametrize("name", members("domain"))
def test_every_domain_checks(name: str) -> None:
    run = compose([f"targets=[{name}]", f"evaluate.domains=[{name}]"])
    assert list(run.domains) == [name]
    assert run.domains[name].sources


@pytest.mark.parametrize("name", members("backbone"))
def test_every_backbone_checks(name: str) -> None:
    assert compose([f"backbone={name}"]).backbone.name == name


@pytest.mark.parametrize("name", members("method"))
def test_every_method_checks_and_its_yaml_says_what_differs_from_the_defaults(name: str) -> None:
    method = compose([f"method={name}"]).method
    node = read_group("method", name)
    assert node.pop("_target_") == f"{type(method).__module__}.{type(method).__name__}"
    check_differs(node, fill_defaults_of(type(method), {}))
    composed = compose_plain([f"method={name}"])["method"]
    assert composed.keys() - {"_target_"} == {item.name for item in fields(method)}
    groups = {item.name: getattr(method, item.name) for item in fields(method)}
    for key, group in groups.items():
        if is_dataclass(group):
            assert composed[key].keys() == {item.name for item in fields(group)}


@pytest.mark.parametrize("path", ["run.yaml", *(f"experiment/{name}.yaml" for name in members("experiment"))])
def test_the_yaml_of_runs_says_what_differs_from_the_defaults(path: str) -> None:
    node = yaml.safe_load((ROOT / "conf" / path).read_text("utf-8"))
    check_differs({key: value for key, value in node.items() if key != "defaults"}, fill_defaults_of(Run, {}))


def check_differs(said: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Compare what a YAML says with the defaults of its class."""
    known = flatten(defaults)
    assert [name for name, value in flatten(said).items() if name in known and known[name] == value] == []


@pytest.mark.parametrize("name", members("budget"))
def test_every_budget_checks(name: str) -> None:
    assert compose([f"budget={name}"]).budget.policy == name


@pytest.mark.parametrize("name", members("track"))
def test_every_tracker_checks(name: str) -> None:
    assert compose([f"track={name}"]).track.mode == read_group("track", name)["mode"]


@pytest.mark.parametrize("name", members("experiment"))
def test_every_experiment_changes_what_it_says(name: str) -> None:
    plain = compose_plain([f"experiment={name}"])
    run = check_run(plain)
    node = read_group("experiment", name)
    said = {key: value for key, value in node.items() if key != "defaults"}
    assert said
    for key in flatten(said):
        expected, found = said, plain
        for part in key.split("."):
            expected, found = expected[part], found[part]
        assert found == expected, key
    assert run.train.steps > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", members("table"))
def test_every_row_of_every_table_is_a_run_of_its_own(name: str) -> None:
    table = load_table(name)
    for overrides in [variant for variant in table.variants if not any(text.startswith("budget=") for text in variant)]:
        runs = [compose_row(table, row, table.seeds[0], overrides) for row in list_rows_under(table, overrides)]
        asked = [str(identity.describe_run(run)) for run in runs]
        assert len(set(asked)) == len(asked), "two rows ask for the same run"
    published = table.published.rows if table.published else {}
    assert published.keys() <= {row.name for row in table.rows}


def test_messages_are_the_reviewed_ones() -> None:
    command = "python -m tests.support.messages"
    assert messages.FILE.read_text("utf-8").splitlines() == messages.render_file().splitlines(), (
        f"review after {command}"
    )


def test_composing_twice_gives_the_same_run() -> None:
    assert compose(["seed=3"]) == compose(["seed=3"])


def table_cells(text: str) -> dict[str, dict[str, str]]:
    """Return the cells of the first Markdown table of a text by row and column, without emphasis."""
    lines = text[text.index("|") :].partition("\n\n")[0].splitlines()
    (_, *columns), _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows}


def test_readme_shows_cells_of_the_published_table_one() -> None:
    published = table_cells((ROOT / "results" / "table1.md").read_text("utf-8"))
    section = (ROOT / "README.md").read_text("utf-8").partition("<!-- table1 -->")[2].partition("<!-- /table1 -->")[0]
    shown = table_cells(section)
    assert {"Backbone (untouched)", "SFT", "LoRA", "MoDE 2x Experts, equal tokens"} <= shown.keys() <= published.keys()
    for name, cells in shown.items():
        assert {"Math", "Code", "English", "Average", "Retention"} <= cells.keys()
        assert cells == {column: published[name][column] for column in cells}, name


@pytest.mark.slow
def test_settings_records_tables_and_reports_are_read_without_torch() -> None:
    rooms = ("config", "records", "tables", "report", "charts")
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.parts[1:2] in [(room,) for room in rooms]
    ]
    assert modules
    script = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
