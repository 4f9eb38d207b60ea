"""Makes texts from data sets, names and files inert: first plain, then escaped for Markdown or HTML.

It knows characters and the two escapes; it does not know reports.
"""

from __future__ import annotations

import html
import re

from engine.errors import visible

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&$!])")


def plain(text: str) -> str:
    """The text on one line, with every character that is not simply visible replaced by U+FFFD."""
    return visible(re.sub(r"[\t\n\r\v\f\x85\u2028\u2029]+", " ", text))


def shortened(text: str, most: int) -> str:
    """`plain` text of at most ``most`` characters; an ellipsis stands for what is left out in the middle."""
    text = plain(text)
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def html_text(text: str) -> str:
    """For an element's content or a quoted attribute."""
    return html.escape(plain(text), quote=True)


def html_block(text: str) -> str:
    """For an element that keeps line breaks: every line by itself as `html_text`."""
    return "\n".join(html_text(line) for line in re.split(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", text))


def markdown_text(text: str) -> str:
    """For running text or a table's cell: what could start markup or HTML is escaped."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def markdown_code(text: str) -> str:
    """A code span that also holds inside a table's cell, whatever the text contains."""
    text = plain(text).replace("|", "\\|") or " "
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    if not longest:
        return f"`{text}`"
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"
