"""The page of options is what is generated from the settings' classes."""

from __future__ import annotations

from pathlib import Path

from mode.config.check import flatten
from mode.config.compose import compose_plain
from mode.config.names import RECORDED
from mode.config.options import list_groups, read_attributes, render_options
from mode.config.run import Evaluate
from mode.config.train import Train

PAGE = Path(__file__).parents[2] / "docs" / "training-options.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text("utf-8") == render_options(), "python -m mode.config.options > docs/training-options.md"


def test_the_page_has_every_option_and_every_old_name() -> None:
    page, plain = render_options(), compose_plain([])
    for name in [*flatten({"train": plain["train"], "evaluate": plain["evaluate"]}), *RECORDED.values()]:
        assert f"| `{name}` |" in page, name


def test_every_option_is_described() -> None:
    for _, cls in [*list_groups(Train, "train"), *list_groups(Evaluate, "evaluate")]:
        assert all(read_attributes(cls).values())
        assert len(read_attributes(cls)) > 1
