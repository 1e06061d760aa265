"""Every LaTeX table compiles, whatever its labels are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from mode.core.escape import escape_latex

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "results").glob("*.tex"))
ODD = r"100% of A & B_1, $5 #2 {x} ~ ^ \ <b> | … † ‡ § ¶"

needs_latex = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no LaTeX: apt-get install texlive-latex-recommended"
)


def printed(body: str, folder: Path) -> str:
    """Compile what stands between begin and end of a document and return the log.

    Raises:
        AssertionError: It does not compile.
    """
    head = "\\documentclass{article}\\usepackage[paperwidth=200cm,paperheight=99cm]{geometry}\\usepackage{booktabs}"
    (folder / "page.tex").write_text(f"{head}\n\\begin{{document}}\n{body}\n\\end{{document}}\n", encoding="utf-8")
    words = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "page.pdf").read_bytes().startswith(b"%PDF")
    return done.stdout


@needs_latex
@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=[path.name for path in TABLES])
def test_a_published_table_compiles(path: Path, tmp_path: Path) -> None:
    log = printed(path.read_text("utf-8"), tmp_path)
    assert "Output written on page.pdf (1 page" in log
    assert not re.search(r"Overfull|Missing character|undefined", log)


@needs_latex
@pytest.mark.slow
def test_any_label_compiles(tmp_path: Path) -> None:
    table = pd.DataFrame({"Method": [escape_latex(ODD)], escape_latex("sums_1"): ["1.00"]})
    log = printed(str(table.to_latex(index=False)), tmp_path)
    assert not re.search(r"Missing character|undefined", log)
