"""Readers are given thousands of damaged inputs in this process: refused in a line, or read."""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import TierbenchError
from tests.chaos.campaign import Campaign
from tests.chaos.readers import FINISHED, Reader, make_readers
from tests.chaos.work import Command

SECONDS = 10
"""How long a reader may take before it counts as hung."""

_ODD_TEXTS = (
    "",
    "NaN",
    "Infinity",
    "-1",
    "1e400",
    "\x00",
    "\u202e",
    "../../etc/passwd",
    "9" * 400,
    "=,=",
    "{}",
    "a" * 5000,
)
_ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf"), [], {}, [[]], "", "x",
    {"": None},
)  # fmt: skip
_NESTED = 100_000


def fuzz(campaign: Campaign, count: int, commands: Collection[Command] = FINISHED) -> None:
    """Give each reader its share of ``count`` damaged inputs; see `make_readers` for ``commands``."""
    with tempfile.TemporaryDirectory() as folder:
        readers = list(make_readers(campaign, Path(folder), commands))
        for number in range(count):
            if not campaign.in_time:
                return
            reader = readers[number % len(readers)]
            content = damaged(reader.valid, campaign.random("fuzz", number))
            place = campaign.place("fuzz", number)
            faults = faults_of(reader, content)
            if faults:
                place.mkdir(parents=True)
                (place / "input").write_bytes(content)
            campaign.report("fuzz", reader.name, place, faults)


def faults_of(reader: Reader, content: bytes) -> list[str]:
    try:
        with _within(SECONDS):
            reader.read(content)
    except TierbenchError as error:
        return [] if len(str(error).splitlines()) <= 1 else ["refused in more than a line"]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever else comes out is what is looked for
        return [f"{type(error).__name__}: {str(error)[:200]}"]
    return []


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(valid: bytes, draw: random.Random) -> bytes:
    """Bytes, structure or both of a valid input changed."""
    kind = draw.randrange(4)
    if kind == 0 or valid.lstrip()[:1] not in (b"{", b"["):
        return _bytes_changed(valid, draw)
    if kind == 1:
        return b"[" * _NESTED if draw.random() < 0.5 else b'{"a":' * _NESTED
    try:
        value = json.loads(valid)
    except ValueError:
        return _bytes_changed(valid, draw)
    for _ in range(draw.randint(1, 3)):
        value = _structure_changed(value, draw)
    return json.dumps(value).encode()


def _bytes_changed(valid: bytes, draw: random.Random) -> bytes:
    content = bytearray(valid)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        match draw.randrange(4):
            case 0:
                content[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del content[place : place + draw.randint(1, 40)]
            case 2:
                content[place:place] = draw.choice(_ODD_TEXTS).encode()
            case _:
                content[place:place] = content[draw.randrange(len(content) + 1) :][: draw.randint(1, 60)]
    return bytes(content)


def _structure_changed(value: Any, draw: random.Random) -> Any:
    """One value somewhere inside replaced, left out, or put at another key."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = dict(value)
        match draw.randrange(5):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice([*value, "x"])] = value[key]
            case _:
                changed[key] = _structure_changed(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        return [*value[:place], _structure_changed(value[place], draw), *value[place + 1 :]]
    return draw.choice((*_ODD_VALUES, draw.choice(_ODD_TEXTS)))
