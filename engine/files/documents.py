"""Reads JSON and YAML that others wrote, and refuses what would harm or mislead the program.

A file may come from anywhere: a hub, another version, a disk that lost power, an attacker. So there are
limits on bytes, on nesting and on whole numbers; a key that stands twice, of which parsers silently keep the
last, is refused, and so are infinities and NaN where no one has said that they may be there. Every refusal is
one line that says what and where. It knows no fields: see `engine.spec.fields` for those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UsageError, first_line
from engine.units import MIB, format_bytes

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 512 * MIB
"""Of a JSON file; HELM writes the largest ones."""

MOST_YAML_BYTES = 4 * MIB
MOST_DEPTH = 100
"""Brackets that are open at once."""

MOST_YAML_NODES = 1_000_000
"""Values of a YAML file, those counted again that an alias repeats."""

MOST_INTEGER = 2**64 - 1
"""Magnitude of whole numbers, which become 64 bits sooner or later."""

_LONG_NUMBER = re.compile(r"\d{19}|[eE]\+?\d{3}")
"""Without one of these every number is finite and within `MOST_INTEGER`."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_OTHER_KINDS = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    (b"<!DOCTYPE", "a web page, not the file itself: download it again"),
    (b"<!doctype", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
)


class DocumentError(UsageError, ValueError):
    """A document is refused; the text says what is wrong with it and where, and completes "<file> "."""


def stands_for_another(head: bytes) -> str:
    """What a file is that stands where another was meant, with the cure, from its first bytes; else empty."""
    return next((what for magic, what in _OTHER_KINDS if head.lstrip()[: len(magic)] == magic), "")


def read_json(path: Path, *, finite: bool = True, surrogates: bool = False, most: int = MOST_BYTES) -> Any:
    """The content of a JSON file, see `parse_json`.

    Raises:
        DocumentError: if it is refused.
        OSError: if it cannot be read.
    """
    return parse_json(read_bytes(path, most), finite=finite, surrogates=surrogates, most=most)


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most so many bytes.

    Raises:
        DocumentError: if it is longer, or nothing but zero bytes, as a crash of the machine leaves it.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DocumentError(f"is longer than {format_bytes(most)}, the most that is read of such a file")
    if content and not content.strip(b"\0"):
        raise DocumentError("holds nothing but zero bytes")
    return content


def parse_json(
    content: str | bytes, *, finite: bool = True, surrogates: bool = False, most: int = MOST_BYTES
) -> Any:
    """The value that a JSON text stands for; bytes are UTF-8.

    Args:
        finite: whether NaN and infinities are refused.
        surrogates: whether texts may hold halves of surrogate pairs, which no encoding can write.
        most: bytes, or characters, of the text.

    Raises:
        DocumentError: if it is no JSON or beyond one of the limits.
    """
    if len(content) > most:
        raise DocumentError(f"is longer than {format_bytes(most)}, the most that is read of such a text")
    text = _decoded(content) if isinstance(content, bytes) else content
    hooks: dict[str, Any] = {"object_pairs_hook": _object}
    if finite:
        hooks["parse_constant"] = _constant
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = _integer
        hooks["parse_float"] = _finite if finite else float
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        other = stands_for_another(text[:64].encode("utf-8", "replace"))
        lines = "\n" in text.rstrip()
        where = f"line {error.lineno}, column {error.colno}" if lines else f"character {error.pos}"
        raise DocumentError(f"is {other}" if other else f"is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise DocumentError(f"is nested deeper than {MOST_DEPTH} brackets") from None
    lone = not surrogates and _SURROGATE.search(text) is not None
    if lone or text.count("[") + text.count("{") > MOST_DEPTH:
        _check_tree(value, lone)
    return value


def parse_yaml(text: str | bytes, *, typed: bool = False) -> Any:
    """The value that a YAML text stands for: texts, lists, mappings and null.

    Whoever reads a value knows what it means: ``1.10`` may be a version, ``on`` a word, ``012`` a name.

    Args:
        typed: whether plain words become numbers, truth values and dates, as YAML has it.

    Raises:
        DocumentError: if it is no YAML or beyond one of the limits.
    """
    import yaml

    if len(text) > MOST_YAML_BYTES:
        raise DocumentError(f"is longer than {format_bytes(MOST_YAML_BYTES)}, the most that is read of YAML")
    source = _decoded(text) if isinstance(text, bytes) else text
    try:
        value = yaml.load(source, _loader(typed))
    except DocumentError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise DocumentError(
            f"is not YAML: {getattr(error, 'problem', None) or first_line(error)}{where}"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:  # of constructors: a date that is none
        raise DocumentError(f"is not YAML: {first_line(error)}") from None
    _check_tree(value, False, MOST_YAML_NODES)
    return value


def read_yaml(path: Path, *, typed: bool = False) -> Any:
    """The content of a YAML file, see `parse_yaml`.

    Raises:
        DocumentError: if it is refused.
        OSError: if it cannot be read.
    """
    return parse_yaml(read_bytes(path, MOST_YAML_BYTES), typed=typed)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"is not UTF-8: byte {error.start:,}, in line {line}") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DocumentError(f"has the key {twice[:80]!r} twice: keep one")
    return found


def _constant(name: str) -> Any:
    raise DocumentError(f"holds {name}, which is no finite number")


def _integer(digits: str) -> int:
    if len(digits) > 21 or abs(value := int(digits)) > MOST_INTEGER:
        raise DocumentError(f"holds a whole number of {len(digits.lstrip('-'))} digits: 64 bits are the most")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise DocumentError(f"holds the number {digits[:40]}, which is too large for 64 bits")
    return value


def _check_tree(value: Any, lone: bool, most_nodes: int | None = None) -> None:
    """Measure the depth (a value inside itself has none), count values, look for texts that are none."""
    level, depth, nodes = [value], 0, 0
    while level:
        below: list[Any] = []
        for one in level:
            nodes += 1
            if depth == MOST_DEPTH and isinstance(one, (dict, list, set)):
                raise DocumentError(f"is nested deeper than {MOST_DEPTH} brackets")
            if isinstance(one, dict):
                below += one.keys() if lone else ()
                below += one.values()
            elif isinstance(one, (list, set)):
                below += one
            elif lone and isinstance(one, str):
                _check_text(one)
            if most_nodes is not None and len(below) + nodes > most_nodes:
                raise DocumentError(f"stands for more than {most_nodes:,} values")
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DocumentError("holds half of a surrogate pair, which is not text") from None


_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + kind for kind in ("str", "seq", "map", "null", "merge")}


@cache
def _loader(typed: bool) -> type[yaml.SafeLoader]:
    """A loader that refuses depth, keys that stand twice, tags, and merges that multiply."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise DocumentError(f"is nested deeper than {MOST_DEPTH} brackets")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if not typed and node is not None and node.tag not in _TEXT_TAGS:
                raise DocumentError(
                    f"has the tag {node.tag[:80]} in line {node.start_mark.line + 1}: leave it out"
                )
            return node

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node: yaml.MappingNode = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    where = f"the second is in line {key.start_mark.line + 1}"
                    raise DocumentError(f"sets {key.value[:80]} twice: keep one ({where})")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return node

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            merged = [value for key, value in node.value if key.tag == _TAG + "merge"]
            if any(isinstance(value, yaml.SequenceNode) and len(value.value) > 100 for value in merged):
                raise DocumentError("merges more than 100 mappings into one")
            super().flatten_mapping(node)
            if len(node.value) > 10_000:
                raise DocumentError("merges more than 10,000 keys into one mapping")

    if not typed:
        Loader.yaml_implicit_resolvers = {
            first: kept
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
            if (kept := [rule for rule in rules if rule[0] in _TEXT_TAGS])
        }
    return Loader
