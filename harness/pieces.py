"""The pieces of a text: what each token of a prompt or of an answer contributes, as bytes.

It knows tokenizers and the engine's outputs, and no request format.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.spec.request import Output
from harness.tokenizer import Text

Piece = tuple[bytes, float | None]
"""Bytes of one token, which need not be valid UTF-8 on their own, and its log-probability if known."""


def generated_pieces(output: Output, stops: Sequence[str], text: Text) -> list[tuple[bytes, float]]:
    """The generated tokens before the end token or the first stop string.

    A token that holds both text and the beginning of the stop string is kept with its text only.
    """
    tokens = output.tokens[:-1] if output.finish_reason == "eos" else output.tokens
    data = [text.token_bytes(token) for token in tokens]
    joined = b"".join(data)
    ends = [joined.find(stop.encode()) for stop in stops]
    left = min((end for end in ends if end >= 0), default=len(joined))
    kept: list[tuple[bytes, float]] = []
    for piece, logprob in zip(data, output.logprobs, strict=False):
        if left <= 0:
            break
        kept.append((piece[:left], logprob))
        left -= len(piece)
    return kept


def prompt_pieces(ids: Sequence[int], source: bytes, text: Text) -> list[bytes]:
    """The bytes of a prompt's tokens, without the space that SentencePiece puts before a text.

    Args:
        source: the prompt itself, UTF-8.
    """
    pieces = [text.token_bytes(token) for token in ids]
    position = 0
    for index, piece in enumerate(pieces):
        if not source.startswith(piece, position):
            if not (piece[:1] == b" " and source.startswith(piece[1:], position)):
                break  # the tokenizer normalises texts: its own bytes are the best there is
            pieces[index] = piece = piece[1:]
        position += len(piece)
    return pieces
