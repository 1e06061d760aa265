"""Text from outside: names, messages, and what they do in Markdown."""

from __future__ import annotations

import pytest

from mode.core.errors import ConfigError
from mode.core.escape import check_name, escape_markdown, format_code


@pytest.mark.parametrize("name", ["../x", "a/b", "<b>", "", "a b", "a\n", "é", "-x", "1e3", "a" * 101, "a|b", "a.b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a name has"):
        check_name(name)


@pytest.mark.parametrize("name", ["true", "False", "NULL", "nan", "Inf", "on", "No"])
def test_a_word_that_yaml_reads_as_a_value_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_name(name)


@pytest.mark.parametrize(
    "url",
    ["https://me:se/cret@host/x", "http://token@host:80", "see ray://me:a@b@host:1 and more", "https://:cret@host"],
)
def test_a_message_is_one_line_and_shows_no_password(url: str) -> None:
    message = str(ConfigError(f"{url}: not\nreachable\x1b[2J"))
    assert "***@host" in message
    assert not any(part in message for part in ("me", "cret", "token", "a@b", "\n", "\x1b"))


def test_a_url_without_a_password_stays() -> None:
    assert str(ConfigError("https://host:80/a, x@y")) == "https://host:80/a, x@y"


def test_a_text_adds_no_markup() -> None:
    assert escape_markdown("snake_case 1 < 2 & co") == "snake_case 1 &lt; 2 & co"
    assert escape_markdown("_a_\n# b ~~c~~") == r"\_a\_ # b \~\~c\~\~"
    assert format_code("a``b`\nc") == "``` a``b` c ```"
