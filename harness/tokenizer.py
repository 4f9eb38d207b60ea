"""The tokenizer's side of a request: text to ids and back, chats, bytes of tokens, stop strings, ends.

It knows tokenizers of `transformers` and neither HELM nor the model's weights.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import CheckpointError, RequestError, UsageError, first_line
from engine.spec.request import Output, StopCheck
from harness.detokenizer import Detokenizer, LeftOut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")
"""Where a chat template shows the date."""

ChatMode = Literal["auto", "on", "off"]
"""Whether prompts are put as a user's message into the tokenizer's chat template; ``auto`` is HELM's own
rule: where it has one."""


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
        self._detokenizer = Detokenizer(tokenizer)

    @classmethod
    def load(cls, model: str, trust_remote_code: bool = False) -> Text:
        """Load the tokenizer of a local folder or a hub name; a local folder never asks the network.

        A generation ends at the tokenizer's end-of-text id and where `transformers` would end it.

        Raises:
            CheckpointError: if there is no usable tokenizer, or one whose tokens cannot be decoded one by
                one, or if the file that names the end ids is damaged.
        """
        from transformers import AutoTokenizer

        is_local = Path(model).is_dir()
        try:
            with _panics_as_errors():
                tokenizer = AutoTokenizer.from_pretrained(
                    model, trust_remote_code=trust_remote_code, local_files_only=is_local
                )
                reason = "" if tokenizer.encode("a", add_special_tokens=False) else "it has no vocabulary"
                tokenizer.encode("a", add_special_tokens=True)
        except Exception as error:  # transformers raises many types here
            reason = first_line(error)
        if reason:  # without tokenizer files transformers makes an empty tokenizer, without an error
            raise CheckpointError(
                f"the tokenizer of {model} cannot be loaded ({reason}): "
                "the model's folder must hold its tokenizer files, such as tokenizer.json"
            )
        text = cls(tokenizer)
        text.end_ids |= _listed_ends(model, is_local)
        try:
            with _panics_as_errors():
                difference = text._detokenizer.difference()
        except Exception as error:  # of a decoder that cannot decode at all
            difference = first_line(error)
        if difference:
            raise CheckpointError(
                f"the tokenizer of {model} ({type(tokenizer).__name__}) does not decode token by token: "
                f"{difference}; use one that does, or, if its tokenizer_config.json has "
                "clean_up_tokenization_spaces, set that to false"
            )
        return text

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

        The template writes its own beginning of the text: nothing is to be put in front of the result.

        Args:
            values: further ones for the template; ``add_generation_prompt=False`` leaves the turn unopened.

        Raises:
            RequestError: if the tokenizer has no chat template, or its template fails.
        """
        if not self.tokenizer.chat_template:
            raise RequestError(
                "a chat request needs a tokenizer with a chat template, which this model lacks"
            )
        values = {"add_generation_prompt": True, "chat_template": self.dated_template(), **values}
        try:
            made = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **values)
        except Exception as error:  # whatever a model's own template raises
            raise RequestError(f"the model's chat template refuses it ({first_line(error)})") from None
        return str(made)

    def uses_chat(self, mode: ChatMode) -> bool:
        """Whether prompts are put into the chat template.

        Raises:
            UsageError: if they shall be and there is none.
        """
        if mode == "on" and not self.tokenizer.chat_template:
            raise UsageError(
                "--chat on needs a tokenizer with a chat template, which this model lacks: put "
                "chat_template.jinja into its folder, or give --chat off"
            )
        return mode != "off" and bool(self.tokenizer.chat_template)

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
        """The bytes of a token in the middle of a text; they need not be valid UTF-8 on their own."""
        return self._detokenizer.piece(token, self._detokenizer.middle)

    def pieces(
        self, tokens: Sequence[int], context: Sequence[int] = (), skip_special: bool = False
    ) -> list[bytes]:
        """The bytes that each of consecutive tokens adds to a text; `harness.detokenizer.text_of` joins them.

        Args:
            context: the tokens in front of them; without any they begin a text.
            skip_special: whether special tokens are no part of the text (they are `LeftOut`).
        """
        return [*self._detokenizer.backwards(tokens, context, skip_special)][::-1]

    def join(self, tokens: Sequence[int]) -> bytes:
        """The bytes of consecutive tokens that begin a text."""
        return b"".join(self.pieces(tokens))

    def stop_check(
        self, stops: Sequence[str], context: Sequence[int] = (), skip_special: bool = False
    ) -> StopCheck | None:
        """A check that is true as soon as one of the strings is complete, across token borders too.

        Args:
            context, skip_special: as in `pieces`. A special token that is no part of the text still ends it
                where its name is one of the strings.
        """
        patterns = [stop.encode() for stop in stops]
        if not patterns:
            return None
        longest = max(map(len, patterns))

        def check(tokens: Sequence[int]) -> bool:
            # Earlier tokens were checked when they came, so a new match ends within the last one.
            pieces = self._detokenizer.backwards(tokens, context, skip_special)
            tail = next(pieces)
            if isinstance(tail, LeftOut):
                return tail in patterns
            wanted = longest - 1 + len(tail) if tail else 0
            while len(tail) < wanted and (piece := next(pieces, None)) is not None:
                tail = tail if isinstance(piece, LeftOut) else piece + tail
            return any(pattern in tail[-wanted:] for pattern in patterns) if wanted else False

        return check


def shown(data: bytes) -> str:
    """Bytes of a token as HELM writes them: text, or ``bytes:\\xe2\\x80`` where they are not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _named_stop(pieces: Sequence[bytes], patterns: Sequence[bytes], min_tokens: int) -> int:
    """The place of the first special token that is not shown and whose name is a stop string."""
    for place, piece in enumerate(pieces):
        if place >= min_tokens and isinstance(piece, LeftOut) and piece in patterns:
            return place
    return len(pieces)


def generated_pieces(
    output: Output,
    stops: Sequence[str],
    text: Text,
    min_tokens: int = 0,
    context: Sequence[int] = (),
    skip_special: bool = False,
) -> list[tuple[bytes, float]]:
    """The generated tokens before the end token or the first stop string.

    A token that holds both text and the beginning of the stop string is kept with its text only.

    Args:
        min_tokens: a stop string counts that ends behind this many tokens.
        context, skip_special: as in `Text.stop_check`.
    """
    tokens = output.tokens[:-1] if output.finish_reason == "eos" else output.tokens
    pieces = text.pieces(tokens, context, skip_special)
    patterns = [stop.encode() for stop in stops]
    pieces = pieces[: _named_stop(pieces, patterns, min_tokens)]
    joined = b"".join(piece for piece in pieces if not isinstance(piece, LeftOut))
    before = sum(len(piece) for piece in pieces[:min_tokens] if not isinstance(piece, LeftOut))
    found = (joined.find(pattern, max(0, before + 1 - len(pattern))) for pattern in patterns)
    ends = [end for end in found if end >= 0]
    left = min(ends, default=len(joined))
    kept: list[tuple[bytes, float]] = []
    for piece, logprob in zip(pieces, output.logprobs, strict=False):
        if ends and left <= 0:
            break
        if isinstance(piece, LeftOut):
            kept.append((piece, logprob))
            continue
        kept.append((piece if len(piece) <= left else piece[:left], logprob))
        left -= len(piece)
    return kept


def prompt_pieces(ids: Sequence[int], source: bytes, text: Text) -> list[bytes]:
    """The bytes of a prompt's tokens, without a space that the tokenizer puts in the middle of a text.

    Args:
        source: the prompt itself, UTF-8.
    """
    pieces = text.pieces(ids)
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


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Within it a panic of the tokenizers library, printed and no `Exception`, is a RuntimeError."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                said.truncate(0)
                raise RuntimeError(str(error)) from None
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))


_GENERATION_CONFIG = "generation_config.json"


def _listed_ends(model: str, is_local: bool) -> frozenset[int]:
    """The end ids of a model's generation config or, without one, of its config, as `transformers` has them.

    Raises:
        CheckpointError: if the file is there and cannot be read.
    """
    from transformers import GenerationConfig

    has_own = _is_there(model, _GENERATION_CONFIG, is_local)
    name = _GENERATION_CONFIG if has_own else "config.json"
    if not has_own and not _is_there(model, name, is_local):
        return frozenset()
    try:
        config = GenerationConfig.from_pretrained(
            model, config_file_name=name, local_files_only=is_local, _from_model_config=not has_own
        )
    except Exception as error:  # it checks nothing before it uses it
        cure = ": mend it, or remove it to end answers as config.json says" if has_own else ": mend it"
        raise CheckpointError(f"{name} of {model} cannot be read ({first_line(error)}){cure}") from None
    ends = config.eos_token_id
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise CheckpointError(
            f"{name} of {model} has eos_token_id={ends!r}, which is no token id and no list of them: mend it"
        )
    return frozenset(i for i in listed if i >= 0)


def _is_there(model: str, name: str, is_local: bool) -> bool:
    """Whether a model has a file, readable or not; what cannot be fetched from the hub is not there."""
    from transformers.utils import cached_file

    if is_local:
        return os.path.lexists(Path(model, name))
    try:
        return cached_file(model, name) is not None
    except OSError:
        return False


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for length in range(len(full) - len(plain) + 1):
        if full[length : length + len(plain)] == plain:
            return tuple(full[:length])
    return ()
