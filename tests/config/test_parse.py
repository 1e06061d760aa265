"""YAML that would take very long to read, or that has no end, is refused at once, wherever YAML is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mode.config.check import from_yaml, to_yaml
from mode.config.compose import compose, parse_overrides
from mode.config.groups import list_members, read_group
from mode.config.parse import MAX_DEPTH, MAX_NODES, parse_yaml
from tests.support.refusals import refused
from tests.support.work import limit_calls

NINE = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
BOMB = NINE + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
ENDLESS = {
    "aliases that grow": (BOMB, f"{MAX_NODES:,}"),
    "an alias of itself": ("a: &a [*a]\n", "*a"),
    "an alias of itself in a mapping": ("a: &a {b: {c: *a}}\n", "*a"),
    "nested lists": (f"a: {'[' * 5000}{']' * 5000}\n", str(MAX_DEPTH)),
    "nested mappings": ("".join(f"{' ' * n}a:\n" for n in range(1000)), str(MAX_DEPTH)),
}
READERS: dict[str, Callable[[str, Path], object]] = {
    "domain": lambda name, conf: compose([f"targets=[{name}]"], conf),
    "experiment": lambda name, conf: compose([f"experiment={name}"], conf),
    "backbone": lambda name, conf: compose([f"backbone={name}"], conf),
    "table": lambda name, conf: read_group("table", name, conf),
}


def write(conf: Path, group: str, name: str, text: str) -> Path:
    path = conf / group / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("group", READERS)
def test_endless_yaml_is_refused_at_once(group: str, kind: str, tmp_path: Path) -> None:
    text, named = ENDLESS[kind]
    path = write(tmp_path, group, "mine", text)
    compose([])  # Hydra is loaded, and the project's own files are read
    with limit_calls(2_000_000), refused(str(path), named):
        READERS[group]("mine", tmp_path)


@pytest.mark.parametrize("kind", ENDLESS)
def test_the_endless_settings_of_a_run_are_refused(kind: str) -> None:
    text, named = ENDLESS[kind]
    with refused("runs/1/run.yaml", named):
        from_yaml(text, "runs/1/run.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "seed: 1"])
def test_other_yaml_is_not_the_settings_of_a_run(text: str) -> None:
    with refused("runs/1/run.yaml"):
        from_yaml(text, "runs/1/run.yaml")
    run = compose(["seed=3"])
    assert from_yaml(to_yaml(run)) == run


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {b: 1, c: 2, b: 3}", "- {? [a] : 1, d: 1, 'd': 2}"])
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    key = text[text.rindex(":") - 1].replace("'", "d")
    with refused("x.yaml", f"the key {key}", f"line {len(text.splitlines())}"):
        parse_yaml(text, "x.yaml")
    assert parse_yaml("{a: &x {b: 1}, c: {<<: *x, b: 2}}", "x.yaml") == {"a": {"b": 1}, "c": {"b": 2}}
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text, "utf-8")
    with refused("mine.yaml"):
        compose(["method=mine"], tmp_path)


def test_aliases_are_counted_as_what_they_stand_for() -> None:
    assert parse_yaml(f"{NINE}b: [*a0, *a0]\n", "a")["b"] == [list(range(1, 10))] * 2
    parse_yaml(f"a: {'[' * (MAX_DEPTH - 1)}{']' * (MAX_DEPTH - 1)}", "a")
    with refused("a: ", str(MAX_DEPTH)):
        parse_yaml(f"a: {'[' * MAX_DEPTH}{']' * MAX_DEPTH}", "a")
    items = ", ".join(["1"] * (MAX_NODES // 10))
    repeated = ", ".join(["*a"] * 9)
    with refused("a: ", f"{MAX_NODES:,}"):
        parse_yaml(f"a: &a [{items}]\nb: [{repeated}]", "a")


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("experiment", {"mine": "defaults: [mine]"}),
        ("experiment", {"mine": "defaults: [other]", "other": "defaults: [/experiment/mine]"}),
        ("backbone", {"mine": "defaults: [mine, _self_]\nname: mine"}),
        ("domain", {"mine": "defaults: [mine]"}),
    ],
)
def test_defaults_that_lead_in_a_circle_are_refused(group: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        write(tmp_path, group, name, f"{text}\n")
    with limit_calls(2_000_000), refused(f"{tmp_path}/{group}/", "defaults"):
        READERS[group]("mine", tmp_path)
    assert "mine" in list_members(group, tmp_path)


def test_overrides_nested_too_deeply_are_refused() -> None:
    for depth in (300, 2000):
        with refused("targets=[[[", str(MAX_DEPTH)):
            compose([f"targets={'[' * depth}{']' * depth}"])
    assert parse_overrides(["a=[[1]]"])[0].value == [[1]]
