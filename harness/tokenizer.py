"""The tokenizer's side of a request: text to ids and back, bytes of tokens, stop strings.

It knows tokenizers of `transformers` (byte-level BPE, SentencePiece style) and neither HELM nor the
model's weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, RequestError, UsageError, first_line
from engine.spec.request import Output, StopCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
"""Where a chat template shows the date."""

Piece = tuple[bytes, float | None]
"""Bytes of one token, which need not be valid UTF-8 on their own, and its log-probability if known."""


class Text:
    """Encodes and decodes for one model.

    Attributes:
        start_ids: ids that the tokenizer itself puts before a text (``<s>``, ``</s>`` for OPT); empty
            for tokenizers in the style of GPT-2.
        scoring_prefix: ids that are put before a text whose every token shall get a probability:
            ``start_ids``, or else the beginning- or end-of-text id that the tokenizer defines. Where
            it defines neither this is empty and the first token of a text has no probability.
        end_ids: ids that end a generation.
        today: the day that a chat template shows as today's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: frozenset[int] = frozenset()) -> None:
        self.tokenizer = tokenizer
        self.start_ids = _start_ids(tokenizer)
        fallback = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.scoring_prefix = self.start_ids or (() if fallback is None else (int(fallback),))
        own_end = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
        self.end_ids = end_ids or own_end
        self.today = date.today()
        self._byte_level = _is_byte_level(tokenizer)
        self._added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model: str, trust_remote_code: bool = False) -> Text:
        """Load the tokenizer of a local folder or a hub name; a local folder never asks the network.

        Raises:
            CheckpointError: if there is no usable tokenizer.
        """
        from transformers import AutoTokenizer, GenerationConfig

        options = {"trust_remote_code": trust_remote_code, "local_files_only": Path(model).is_dir()}
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
            reason = "" if tokenizer.encode("a", add_special_tokens=False) else "it has no vocabulary"
        except Exception as error:  # transformers raises many types here
            reason = first_line(error)
        if reason:  # without tokenizer files transformers makes an empty tokenizer, without an error
            raise CheckpointError(
                f"the tokenizer of {model} cannot be loaded ({reason}): "
                "the model's folder must hold its tokenizer files, such as tokenizer.json"
            )
        ends = {tokenizer.eos_token_id}
        try:
            listed = GenerationConfig.from_pretrained(model, **options).eos_token_id
            ends |= set(listed) if isinstance(listed, list) else {listed}
        except OSError:
            pass  # a model need not have a generation config
        return cls(tokenizer, frozenset(int(i) for i in ends if i is not None))

    @property
    def prefix_token(self) -> str:
        """Text that encodes to the one id of ``scoring_prefix``; empty where there is no such text."""
        if len(self.scoring_prefix) != 1:
            return ""
        piece = str(self.tokenizer.convert_ids_to_tokens(self.scoring_prefix[0]))
        return piece if self.encode(piece) == self.scoring_prefix else ""

    @property
    def end_token(self) -> str:
        """The tokenizer's end-of-text token as text; empty where it has none."""
        return str(self.tokenizer.eos_token or "")

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, nothing added before or after."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, messages: Sequence[dict[str, str]], **values: Any) -> str:
        """A conversation in the model's own chat format, ready for the model's turn.

        Args:
            values: further ones for the template; ``add_generation_prompt=False`` leaves the turn unopened.

        Raises:
            RequestError: if the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise RequestError(
                "a chat request needs a tokenizer with a chat template, which this model lacks"
            )
        values = {"add_generation_prompt": True, "chat_template": self.dated_template(), **values}
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **values))

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest name of a token; no token stands for more."""
        return max(len(name.encode()) for name in self.tokenizer.get_vocab())

    @property
    def shown_date(self) -> str:
        """``today`` in ISO 8601, if the chat template shows it; else empty."""
        return self.today.isoformat() if self.dated_template() else ""

    def dated_template(self) -> str | None:
        """The chat template with ``today`` where it shows the date, at midnight; None where it shows none.

        Without it a conversation that is rendered again another day would be another one.
        """
        if not self.tokenizer.chat_template:
            return None
        midnight, template = datetime.combine(self.today, time()), self.tokenizer.get_chat_template()
        dated, count = _DATE.subn(lambda found: json.dumps(midnight.strftime(found["format"])), template)
        return dated if count else None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; they need not be valid UTF-8 on their own."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(token)
        return found

    def join(self, tokens: Sequence[int]) -> bytes:
        """The bytes of consecutive tokens."""
        return b"".join(map(self.token_bytes, tokens))

    def stop_check(self, stops: Sequence[str]) -> StopCheck | None:
        """A check that is true as soon as one of the strings is complete, across token borders too."""
        patterns = [stop.encode() for stop in stops]
        if not patterns:
            return None
        longest = max(map(len, patterns))

        def check(tokens: Sequence[int]) -> bool:
            # Earlier tokens were checked when they came, so a new match ends within the last one.
            wanted = longest - 1 + len(self.token_bytes(tokens[-1]))
            tail = b""
            for token in reversed(tokens):
                if len(tail) >= wanted:
                    break
                tail = self.token_bytes(token) + tail
            return any(pattern in tail[-wanted:] for pattern in patterns) if wanted else False

        return check

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            return piece
        if piece is None:  # ids of the model's padded vocabulary that the tokenizer does not use
            return b""
        if self._byte_level:
            return b"".join(
                bytes([_BYTE_OF_CHARACTER[c]]) if c in _BYTE_OF_CHARACTER else c.encode() for c in str(piece)
            )
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return str(piece).replace(_SENTENCEPIECE_SPACE, " ").encode()


def shown(data: bytes) -> str:
    """Bytes of a token as HELM writes them: text, or ``bytes:\\xe2\\x80`` where they are not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def generated_pieces(
    output: Output, stops: Sequence[str], text: Text, min_tokens: int = 0
) -> list[tuple[bytes, float]]:
    """The generated tokens before the end token or the first stop string.

    A token that holds both text and the beginning of the stop string is kept with its text only.

    Args:
        min_tokens: a stop string counts that ends behind this many tokens.
    """
    tokens = output.tokens[:-1] if output.finish_reason == "eos" else output.tokens
    data = [text.token_bytes(token) for token in tokens]
    joined = b"".join(data)
    before = sum(map(len, data[:min_tokens]))
    ends = [joined.find(stop, max(0, before + 1 - len(stop))) for stop in map(str.encode, stops)]
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


def require_stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request, sorted and without repeats.

    Raises:
        UsageError: for an empty string, which would end every generation before it begins.
    """
    if not all(stops):
        raise UsageError("a stop string is empty, which would end every generation at once: remove it")
    return tuple(sorted(set(stops)))


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHARACTER = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(256 + place): byte for place, byte in enumerate(_OTHERS)},
}
"""The alphabet of byte-level BPE: printable Latin-1 characters stand for their own code, the other bytes for
the code points from 256 on, in order."""


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a step of a fast tokenizer's decoder is byte-level; false for one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    return '"type": "ByteLevel"' in json.dumps(decoder)


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for length in range(len(full) - len(plain) + 1):
        if full[length : length + len(plain)] == plain:
            return tuple(full[:length])
    return ()
