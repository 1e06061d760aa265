"""The documentation names what exists: paths, links, modules and commands."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from typer.main import get_command

from cli.app import app
from mode.report.quotes import QUOTE

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "results/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
FOLDERS = ("baselines", "cli", "conf", "docs", "mode", "results", "tests")
WRITTEN = {"results/local/"}
"""Paths that a run makes and git ignores."""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TICKED = re.compile(r"`([^`]+)`")
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
MODULE = re.compile(r"(?:baselines|cli|mode)(?:\.\w+)+(?<!\.md)")


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def exists(path: str) -> bool:
    """Say whether a path of the repository is there; NAME stands for the name of any file."""
    return path in WRITTEN or next(ROOT.glob(path.replace("NAME", "[a-z]*")), None) is not None


def named_paths(page: str) -> set[str]:
    """Return the paths of the repository that a page has in backticks, or at the start of a line of a listing."""
    prose, listings = FENCED.sub("", read(page)), [text for _, text in FENCED.findall(read(page))]
    words = [word for span in TICKED.findall(prose) for word in span.split()]
    words += [line.split()[0] for text in listings for line in text.splitlines() if line.strip()]
    return {word for word in words if PATH.fullmatch(word)}


def anchors(page: str) -> set[str]:
    """Return what a page's headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", FENCED.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    assert sorted(path for path in named_paths(page) if not exists(path)) == []


def test_paths_are_found() -> None:
    assert {"mode/core/", "results/local/"} <= named_paths("README.md")
    assert {"baselines/NAME.py", "mode/train/loop.py"} <= named_paths("docs/architecture.md")
    assert not exists("mode/train.py")


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    links = [(target, anchor) for target, anchor in LINK.findall(read(page)) if ":" not in target]
    for target, anchor in links:
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_module_and_import_exists(page: str) -> None:
    names = {name for name in TICKED.findall(FENCED.sub("", read(page))) if MODULE.fullmatch(name)}
    for tree in [ast.parse(text) for kind, text in FENCED.findall(read(page)) if kind == "python"]:
        found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names |= {f"{node.module}:{alias.name}" for node in found for alias in node.names}
    for name in names:
        resolve_name(name)


def commands(page: str) -> list[list[str]]:
    """Return the words of every command line in a page's listings, without `mode` and comments."""
    texts = [text.replace("\\\n", " ") for kind, text in FENCED.findall(read(page)) if not kind]
    lines = [shlex.split(line, comments=True) for text in texts for line in text.splitlines() if "mode " in line[:16]]
    return [words[1:] for words in lines if words and Path(words[0]).name == "mode"]


@pytest.mark.parametrize(
    ("page", "part", "settings"),
    [
        ("results/README.md", r"^\*\*What to conclude.*?(?=^\*\*Still running)", ("2.4 M parameters",)),
        (
            "docs/anchored.md",
            r"\A.*",
            (
                "2410.10181)",  # the paper
                "4.6 % to the time of a MoDE step",  # of a benchmark, whose table has no CSV
                "0.3`)",
                "0.2 points in every direction",  # the aim
                "0.1 of SFT",
                "2.4 M parameters",
            ),
        ),
    ],
)
def test_the_conclusions_quote_their_numbers(page: str, part: str, settings: tuple[str, ...]) -> None:
    (conclusions,) = re.findall(part, read(page), re.M | re.S)
    assert len(QUOTE.findall(conclusions)) == conclusions.count("<!--") > 10
    quoted = re.sub(r"<!--.*?-->", "<!-- -->", conclusions)  # a row's name may hold a number
    bare = re.findall(r"\d+\.\d+(?![\d*]*<!--)[^,;.\n]*", quoted)
    assert [text for text in bare if not text.startswith(settings)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page: str) -> None:
    for words in commands(page):
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, words
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word for word in words if re.fullmatch(r"-\w|--[a-z-]+", word)}
        if command.name != "launch":  # whose words are another command
            assert given <= known, (command.name, given - known)


def test_commands_are_found() -> None:
    assert ["report", "table1"] in commands("README.md")
