"""The messages of errors, as the code raises them, in one file in which their wording is reviewed.

`python -m tests.support.messages` writes the file anew.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("messages.txt")
PACKAGES = ("cli", "mode")
"""Methods outside say what is their own, so that a new one touches nothing here."""
ERRORS = ("ConfigError", "NothingError", "ValueError", "BadParameter", "UsageError")
"""Exceptions whose text reaches the user; pydantic puts that of a ValueError behind the name of the setting."""


def render(node: ast.expr) -> str:
    """Return a message with `{}` for what is filled in; of what is filled in, words are kept."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(render(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return render(left) + render(right)
    texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return "{" + "|".join(text for text in texts if " " in text.strip()) + "}"


def list_messages(path: Path) -> Iterator[str]:
    """List the messages of the errors that a module raises, in order."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ERRORS and (text := render(node.args[0])) != "{}":
                yield text


def render_file() -> str:
    """Return the messages of all modules, in alphabetical order within each."""
    paths = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    found = {path: sorted(set(list_messages(path))) for path in paths}
    return "\n".join(
        f"# {path.relative_to(ROOT)}\n" + "\n".join(texts) + "\n" for path, texts in found.items() if texts
    )


if __name__ == "__main__":
    FILE.write_text(render_file(), "utf-8")
