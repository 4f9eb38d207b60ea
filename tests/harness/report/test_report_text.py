"""Whatever characters a text has, it is shown as text."""

from __future__ import annotations

import html
import re

from hypothesis import example, given
from hypothesis import strategies as st

from harness.escape import html_text, markdown_code, markdown_text, plain, shortened

TEXTS = st.text(st.characters(codec=None), max_size=60)


@given(TEXTS)
@example("\ud800\x00\u202e\r\n\u2028")
def test_plain_is_one_visible_line_of_valid_utf8(text: str) -> None:
    shown = plain(text)
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert len(shown.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", shown)
    assert plain(shown) == shown


@given(TEXTS)
def test_html_text_has_no_markup_and_reads_back(text: str) -> None:
    escaped = html_text(text)
    assert not re.search("[<>\"']", escaped)
    assert html.unescape(escaped) == plain(text)


@given(TEXTS)
def test_markdown_text_escapes_what_could_start_markup(text: str) -> None:
    assert not re.search(r"[`*_\[\]<>|$&]", re.sub(r"\\[\\`*_{}\[\]<>#|~&$!]", "", markdown_text(text)))


@given(TEXTS)
@example("a``b|c`")
def test_markdown_code_is_closed_by_its_own_fence_only(text: str) -> None:
    span = markdown_code(text)
    fence = re.match("`+", span)
    assert fence and span.endswith(fence[0])
    inside = span[len(fence[0]) : -len(fence[0])]
    assert not re.search(f"(?<!`){fence[0]}(?!`)", inside)
    assert not re.search(r"(?<!\\)\|", inside)


@given(TEXTS, st.integers(8, 40))
def test_shortened_keeps_both_ends(text: str, most: int) -> None:
    short, whole = shortened(text, most), plain(text)
    assert len(short) == min(most, len(whole))
    assert short[0:1] == whole[0:1] and short[-1:] == whole[-1:]
