"""What the likelihoods of a curve are measured on: prompts with forced continuations.

A continuation goes through the model one token per pass, so that it attends to its past through the KV cache
as an answer does; scored in one pass it would see its own keys and values before they are compressed. This
module knows token ids, the tokenizer and HELM's files, and nothing of engines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from engine.errors import UsageError
from engine.spec.request import Request
from harness.files import require_json
from harness.tokenizer import Text

Kind = Literal["answer", "text", "last_word"]


@dataclass(frozen=True)
class Item:
    """A prompt and the continuation whose probability is wanted."""

    kind: Kind
    prompt: tuple[int, ...]
    forced: tuple[int, ...]
    """The continuation, at least one token."""

    compared: bool = False
    """Whether its positions count for the divergence from full precision."""

    @property
    def request(self) -> Request:
        """The engine's request."""
        return Request(self.prompt, max_new_tokens=len(self.forced), forced=self.forced)

    @property
    def position(self) -> int:
        """Position of the logits that predict the continuation's first token."""
        return len(self.prompt) - 1


def digest(items: Sequence[Item]) -> str:
    """Identifies what is asked."""
    content = [(item.kind, item.prompt, item.forced, item.compared) for item in items]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def answers(
    run_folders: Sequence[Path], text: Text, most: int, window: int, chat: bool = False
) -> list[Item]:
    """The correct answers of finished HELM runs, at most ``most`` per run, the runs taken in turns.

    An answer is what HELM would write after the prompt in an example: the correct reference, or its letter
    where one is chosen among them. With ``chat`` the model answers after the chat template instead; scored
    choices have none. Runs of language modelling have no answers, and neither has an instance whose answer
    would end outside of the window.
    """
    states = [require_json(folder / "scenario_state.json") for folder in run_folders]
    columns = [_answers_of(state, text, most, window, chat) for state in states]
    return [item for row in zip_longest(*columns) for item in row if item is not None]


def windows(text: Text, source: str, window: int, stride: int, most_tokens: int) -> list[Item]:
    """A running text in windows that overlap: of each the last ``stride`` tokens are the continuation.

    What the tokenizer puts in front of a text stands in front of every window and counts to its length.

    Raises:
        UsageError: if the text is shorter than one window, or the stride leaves no prompt.
    """
    start = text.start_ids
    own = window - len(start)
    if not 0 < stride < own:
        raise UsageError(f"a stride of {stride:,} tokens leaves no prompt in a window of {own:,}: lower it")
    ids = tuple(text.tokenizer.encode(source, add_special_tokens=False, verbose=False))
    if len(ids) < own:
        raise UsageError(
            f"the text has {len(ids):,} tokens, less than a window of {own:,}: "
            "give more text or lower --window"
        )
    count = min((len(ids) - own) // stride + 1, max(1, most_tokens // stride))
    cuts = (ids[begin : begin + own] for begin in range(0, count * stride, stride))
    return [Item("text", start + cut[: own - stride], cut[own - stride :]) for cut in cuts]


def last_words(text: Text, passages: Sequence[str], window: int) -> list[Item]:
    """The last word of every passage; one that is longer than the window loses its beginning.

    Raises:
        UsageError: if a word has no token that could be scored.
    """
    items = []
    for passage in passages:
        before, word = passage.rstrip().rsplit(maxsplit=1)
        prompt, forced = _split(text, before, f" {word}")
        if not forced:
            raise UsageError(
                f"the tokenizer makes no token of {word!r}, the last word of a passage: leave it out"
            )
        longest = window - len(text.start_ids) - len(forced)
        items.append(Item("last_word", text.start_ids + prompt[max(0, len(prompt) - longest) :], forced))
    return items


def choose_compared(items: Sequence[Item], most_positions: int) -> list[Item]:
    """Mark items for the divergence: an equal share of the positions for each kind, whole items only."""
    kinds = list(dict.fromkeys(item.kind for item in items))
    left = {kind: most_positions // len(kinds) for kind in kinds}
    marked = []
    for item in items:
        fits = len(item.forced) <= left[item.kind]
        left[item.kind] -= len(item.forced) if fits else 0
        marked.append(Item(item.kind, item.prompt, item.forced, compared=fits))
    return marked


def _answers_of(state: Mapping[str, Any], text: Text, most: int, window: int, chat: bool) -> list[Item]:
    adapter = state["adapter_spec"]
    made = (_answer(adapter, asked, text, chat) for asked in state["request_states"])
    fitting = (item for item in made if item is not None and len(item.prompt) + len(item.forced) <= window)
    return [item for item, _ in zip(fitting, range(most), strict=False)]


def _answer(adapter: Mapping[str, Any], asked: Mapping[str, Any], text: Text, chat: bool) -> Item | None:
    """One request state's correct answer; None where it is a repetition, an alternative or has none."""
    prompt, instance = asked["request"]["prompt"], asked["instance"]
    if asked.get("train_trial_index", 0) or instance.get("perturbation") or asked["request"].get("messages"):
        return None
    correct = [r["output"]["text"] for r in instance["references"] if "correct" in r["tags"]]
    if not correct:
        return None
    between = adapter["output_prefix"][len(adapter["output_prefix"].rstrip()) :]
    method = adapter["method"]
    if method == "generation":
        before, after, scored = prompt, between + correct[0], False
    elif method == "multiple_choice_joint":
        letters = [letter for letter, choice in asked["output_mapping"].items() if choice in correct]
        before, after, scored = prompt, between + letters[0] if letters else "", False
    elif method == "multiple_choice_separate_original" and prompt.endswith(correct[0]):
        before = prompt[: -len(correct[0])].rstrip()
        after, scored = prompt[len(before) :], True
    else:
        return None
    if chat and not scored:  # the template has its own beginning, and ends where the answer begins
        ids, forced = _split(text, text.chat([{"role": "user", "content": before}]), after.lstrip())
        return Item("answer", ids, forced) if forced and ids else None
    ids, forced = _split(text, before, after)
    return Item("answer", text.start_ids + ids, forced) if forced and (text.start_ids or ids) else None


def _split(text: Text, before: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a prompt and of what follows, as they are encoded together where the border allows it."""
    prompt, whole = text.encode(before), text.encode(before + after)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    return prompt, text.encode(after)
