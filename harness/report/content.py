"""What a report is made of: sections of text, cards, tables, pictures, single requests; cells of figures.

It does not know how a page is written or a picture is drawn. Texts and cells are plain text, taken from data
as they are: whoever writes a page escapes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.units import format_bytes, format_seconds
from harness.report.inputs.data import NOT_RECORDED

MISSING = "–"


class Name(str):
    """A cell that holds somebody's name for something: shown in the type of code."""

    mark: int | None = None
    """Place in the order of colours and markers, of a policy's name beside pictures."""


class Number(str):
    """A cell that shows a number in words or units; ``value`` is what it is sorted by."""

    value: float

    def __new__(cls, text: str, value: float) -> Number:
        """A text that stands for a value."""
        made = super().__new__(cls, text)
        made.value = value
        return made


Cell = str | Name | Number


def marked(name: str, index: int) -> Name:
    """A policy's name with its colour and marker."""
    made = Name(name)
    made.mark = index
    return made


@dataclass(frozen=True)
class Mean:
    """A mean accuracy; the interval is None where one of its results has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first ``names`` columns are flush left, the others are figures."""

    title: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1

    def part(self, title: str, *places: int) -> Table:
        """Some of its columns, by their places; the first two are names."""
        columns, *rows = (tuple(row[place] for place in places) for row in (self.columns, *self.rows))
        return Table(title, columns, tuple(rows), names=2)


@dataclass(frozen=True)
class Figure:
    """A picture and the table it was drawn from."""

    file: str
    """Name of the SVG file."""

    alt: str
    """What it shows, for those who cannot see it."""

    caption: str
    data: Table
    draw: Callable[[], str]
    """Makes the SVG."""


@dataclass(frozen=True)
class Card:
    """The summary of one policy."""

    name: Name
    facts: tuple[tuple[str, str, str], ...]
    """(label, figure, remark), the most important first."""


@dataclass(frozen=True)
class Reply:
    """One policy's answer to a request."""

    policy: Name
    text: str
    right: bool | None
    """None where answers are not just right or wrong."""

    score: str


@dataclass(frozen=True)
class Case:
    """A request that two policies answered differently."""

    title: str
    question: str
    prompt: str
    correct: tuple[str, ...]
    left: Reply
    right: Reply


@dataclass(frozen=True)
class CaseGroup:
    """Requests under one heading."""

    title: str
    note: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Section:
    """One heading with what belongs to it."""

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()
    """Tables with details; a page may fold them."""

    cards: tuple[Card, ...] = ()
    groups: tuple[CaseGroup, ...] = ()


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    lead: str
    """What was run, on what, in one line."""

    facts: tuple[tuple[str, Cell], ...]
    """The same in single facts: shown at the top."""

    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


def interval(low: float | None, high: float | None) -> Cell:
    """``0.412 to 0.633``."""
    return MISSING if low is None or high is None else Number(f"{low:.3f} to {high:.3f}", low)


def with_interval(mean: Mean | None) -> tuple[Cell, Cell]:
    """A mean and its interval as two cells."""
    return (fraction(mean.value), interval(mean.low, mean.high)) if mean else (MISSING, MISSING)


def signed_interval(low: float, high: float) -> Cell:
    """``−0.041 to +0.012``."""
    return Number(f"{signed(low)} to {signed(high)}", low)


def signed(change: float, digits: int = 3) -> Number:
    """A difference with its sign; what rounds to nothing has none."""
    if abs(change) < 0.5 * 10**-digits:
        return Number(f"{0:.{digits}f}", change)
    return Number(f"{change:+.{digits}f}".replace("-", "−"), change)


def fraction(value: float | None, digits: int = 3) -> Cell:
    """An accuracy, a share or another number with decimals."""
    return MISSING if value is None else Number(f"{value:,.{digits}f}", value)


def per_second(rate: float | None) -> Cell:
    """A rate with three significant digits and no unit; the column names it."""
    if rate is None:
        return MISSING
    return Number(f"{rate:,.{0 if rate >= 100 else 1 if rate >= 10 else 2}f}", rate)


def count(number: int | None) -> Cell:
    """A whole number."""
    return NOT_RECORDED if number is None else Number(f"{number:,}", number)


def size(number: float | None) -> Cell:
    """Bytes."""
    return NOT_RECORDED if number is None else Number(format_bytes(number), number)


def seconds(number: float | None) -> Cell:
    """A duration."""
    return NOT_RECORDED if number is None else Number(format_seconds(number), number)


def ratio(one: float | None, other: float | None) -> Cell:
    """``0.77×``; nothing where either is missing or 0."""
    return Number(f"{one / other:.2f}×", one / other) if one and other else MISSING


def probability(p: float) -> Number:
    """A p value; very small ones are bounded."""
    return Number("< 0.001" if p < 0.001 else f"{p:.3f}", p)
