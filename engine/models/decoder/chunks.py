"""Chunked attention: tokens see those of their own chunk of positions, so that prompts fall into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def has_chunks(chunk: int | None, begins: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether any sequence reaches beyond the first chunk.

    Args:
        begins: position of each sequence's first fresh token; lengths: its fresh tokens.
    """
    if chunk is None:
        return False
    return any(begin + length > chunk for begin, length in zip(begins, lengths, strict=True))


def pieces(chunk: int | None, begin: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The pieces of fresh tokens that lie in one chunk each.

    Args:
        chunk: positions of a chunk; None where the tokens are one piece.
        begin: position of the first of ``length`` tokens.

    Yields:
        Index of the piece's first token, its number of tokens, and how many of the same chunk come before it.
    """
    if chunk is None:
        yield 0, length, begin
        return
    start = 0
    while start < length:
        before = (begin + start) % chunk
        count = min(length - start, chunk - before)
        yield start, count, before
        start += count
