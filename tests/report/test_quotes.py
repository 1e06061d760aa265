"""Numbers that prose quotes follow the tables that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.report.quotes import find_stale_quotes, update_quotes
from tests.support.refusals import refused

PAGE = """# Results

SFT has 53.2<!-- t/sft/math --> and **+0.55**<!-- t/mode - sft/average -->, loses 5.10<!-- t/sft/retention --> points
(-5.10<!-- t/sft/retention --> and −5.1<!-- t/sft/retention -->) in 1,250<!-- t/sft/seconds --> seconds; 7 is no quote.
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Return a page beside the table that it quotes."""
    write_table(tmp_path, 53.2, -5.1)
    path = tmp_path / "README.md"
    path.write_text(PAGE, "utf-8")
    return path


def write_table(folder: Path, math: float, retention: float) -> None:
    cells = {
        ("sft", "math"): math,
        ("sft", "retention"): retention,
        ("sft", "seconds"): 1250,
        ("mode - sft", "average"): 0.55,
    }
    lines = [f"{row},{column},{mean},,1,," for (row, column), mean in cells.items()]
    (folder / "t.csv").write_text("\n".join(["row,column,mean,std,n,low,high", *lines]) + "\n", "utf-8")


def test_a_page_that_agrees_is_left_alone(page: Path) -> None:
    assert find_stale_quotes([page], page.parent) == []
    assert update_quotes([page], page.parent) == []
    assert page.read_text("utf-8") == PAGE


def test_numbers_follow_their_table_in_the_form_of_the_text(page: Path) -> None:
    write_table(page.parent, 54.26, 0.04)
    stale = find_stale_quotes([page], page.parent)
    assert [line.partition(" ")[0] for line in stale] == [f"{page}:{line}:" for line in (3, 3, 4, 4)]
    assert "53.2 is 54.3" in stale[0]
    assert update_quotes([page], page.parent) == [page]
    text = page.read_text("utf-8")
    assert "SFT has 54.3<!-- t/sft/math --> and **+0.55**<!--" in text
    assert "loses 0.04<!--" in text
    assert "(+0.04<!-- t/sft/retention --> and +0.0<!--" in text
    assert find_stale_quotes([page], page.parent) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("t/sft/math", "u/sft/math", ("u.csv",)),
        ("t/sft/math", "t/sfd/math", ("sfd", "sft?")),
        ("t/sft/math", "t/sft/maths", ("maths", "math?")),
    ],
)
def test_a_wrong_address_is_refused(page: Path, old: str, new: str, named: tuple[str, ...]) -> None:
    page.write_text(PAGE.replace(old, new), "utf-8")
    with refused(str(page), *named):
        find_stale_quotes([page], page.parent)
