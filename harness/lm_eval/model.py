"""The engine as a model of lm-evaluation-harness: one call to the engine per request type.

It knows lm-eval's model interface and the tokenizer, and nothing of tasks or files. Prompts are encoded and
truncated, and answers are cut, as in lm-eval's own class for `transformers` models, so that scores are
comparable. Importing this module imports lm-eval, which is optional.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from engine.errors import RequestError, UsageError
from engine.spec.request import Output, Request
from harness.engines.protocol import EngineLike
from harness.progress.line import Progress
from harness.tokenizer import Text

_DEFAULT_WINDOW = 2048
"""lm-eval's own default, for a model and tokenizer without a limit."""

_UNLIMITED = 1 << 40
"""Tokenizers without a limit report one far above this."""

_SUPPORTED = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "use_cache": (True,),
}
"""Generation arguments of `transformers` that are not supported, with the values that have no effect."""

TokenPair = tuple[Any, list[int], list[int]]
"""As lm-eval passes them: the texts or None, the context's ids, the continuation's ids."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests with an engine."""

    def __init__(self, engine: EngineLike, text: Text, seed: int, progress: Progress) -> None:
        """``seed`` is for sampling; raises UsageError for a tokenizer without an end-of-text token."""
        super().__init__()
        self._engine, self._text, self._seed, self._progress = engine, text, seed, progress
        self.tokenizer = text.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "the model's tokenizer has no end-of-text token, which lm-eval needs: set its eos_token"
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """The model's context window in tokens."""
        if self._engine.spec.max_positions is not None:
            return self._engine.spec.max_positions
        named = self.tokenizer.model_max_length
        return int(named) if named is not None and named < _UNLIMITED else _DEFAULT_WINDOW

    @property
    def max_gen_toks(self) -> int:
        """Maximum of generated tokens for tasks that set none."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; by default with the tokenizer's first token, if the text lacks it."""
        if add_special_tokens is None:
            begins = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            options = {"add_special_tokens": False} if begins else {}
        else:
            options = {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's own format.

        Without ``add_generation_prompt`` the last message is left open, to be continued by the model.
        """
        import jinja2

        def render(messages: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    chat_template=self._text.dated_template(),
                )
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:  # some templates refuse a system message
            return render([message for message in chat_history if message["role"] != "system"])

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results; includes the engine's whole record."""
        record = self._engine.record()
        return {
            "model_num_parameters": record.model.num_parameters,
            "model_dtype": record.model.dtype,
            "model_revision": "",
            "model_sha": record.model.digest,
            "engine": record.to_json(),
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding gives it.

        Raises:
            RequestError: for a continuation without a token of its own, whose score would be that of a
                certain one, and for a context without any. lm-eval's own class stops there, too.
        """
        return self._loglikelihood_tokens([self._encoded(request) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; long ones are cut into windows, each of which adds new tokens."""
        windows: list[TokenPair] = []
        counts = []
        for request in requests:
            (string,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(string), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            disjoint = [make_disjoint_window(pair) for pair in pairs]
            windows += [(None, context, continuation) for context, continuation in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._score(windows, "loglikelihood_rolling"))
        sums = []
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts generated after contexts, each up to the first of its stop strings."""
        generations: list[Request] = []
        stops: list[list[str]] = []
        seen: Counter[str] = Counter()
        truncated = 0
        end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        for request in requests:
            context, arguments = request.args
            settings = _settings(arguments, self.max_gen_toks)
            until = [stop for stop in handle_stop_sequences(settings["until"], eos=end) if stop]
            content = json.dumps([context, arguments], sort_keys=True)
            seen[content] += 1  # a repeated request is sampled with another seed
            ids = self.tok_encode(context) or [self.prefix_token_id]
            generations.append(self._generation(ids, settings, until, f"{content}{seen[content]}"))
            truncated += len(generations[-1].prompt) < len(ids)
            stops.append(until)
        self._report_truncated("generate_until", truncated, len(requests))
        answers = [""] * len(generations)

        def on_output(index: int, output: Output) -> None:
            decoded = self.tokenizer.decode(list(output.tokens), skip_special_tokens=True)
            answers[index] = postprocess_generated_text(decoded, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])

        self._ask(generations, "generate_until", on_output)
        return answers

    def _encoded(self, request: Instance) -> TokenPair:
        """A context and its continuation as `TemplateLM` encodes them."""
        context, continuation = request.args
        if context:
            before, scored = self._encode_pair(context, continuation)
        else:
            before, scored = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if scored[:1] == before:
                scored = scored[1:]
        if before and scored:
            return (context, continuation), before, scored
        where = f"task {request.task_name}, document {request.doc_id}: "
        if before:
            raise RequestError(
                f"{where}the choice {continuation[:60]!r} after {context[-60:]!r} has no token of its own "
                "to be scored: begin choices with a word of their own (target_delimiter: ' '), or leave the "
                "document out"
            )
        raise RequestError(
            f"{where}the context {context[-60:]!r} has no token, so that the first of {continuation[:60]!r} "
            "cannot be scored: leave the document out, or make the context empty"
        )

    def _loglikelihood_tokens(self, requests: list[TokenPair], **_: Any) -> list[tuple[float, bool]]:
        return self._score(requests, "loglikelihood")

    def _score(self, pairs: Sequence[TokenPair], label: str) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is greedy; equal sequences run once."""
        users: dict[tuple[int, ...], list[int]] = {}
        truncated = 0
        for index, (_, context, continuation) in enumerate(pairs):
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation of {len(continuation):,} tokens is longer than the model's window of "
                    f"{self.max_length:,}: leave its task out"
                )
            sequence = tuple((context + continuation)[-(self.max_length + 1) :])
            truncated += len(sequence) < len(context) + len(continuation)
            users.setdefault(sequence, []).append(index)
        self._report_truncated(label, truncated, len(pairs))
        scores: dict[int, tuple[float, bool]] = {}
        sequences = list(users)

        def on_output(index: int, output: Output) -> None:
            assert output.prompt_logprobs is not None and output.prompt_greedy is not None
            for user in users[sequences[index]]:
                texts, _, continuation = pairs[user]
                own = slice(-len(continuation), None)
                scores[user] = sum(output.prompt_logprobs[own]), all(output.prompt_greedy[own])
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, scores[user])

        self._ask([Request(ids, prompt_logprobs=True) for ids in sequences], label, on_output)
        return [scores[index] for index in range(len(pairs))]

    def _generation(
        self, context: list[int], settings: dict[str, Any], until: list[str], name: str
    ) -> Request:
        """The engine's request; ``name`` tells requests apart that are sampled with different seeds."""
        max_new_tokens = settings["max_gen_toks"]
        max_prompt = self.max_length - max_new_tokens
        if max_new_tokens < 1 or max_prompt < 1:
            raise RequestError(
                f"max_gen_toks={max_new_tokens:,} leaves no tokens for a prompt in the model's window of "
                f"{self.max_length:,} tokens: give --gen_kwargs max_gen_toks=... or change the task"
            )
        sampled = settings["do_sample"] and settings["temperature"] > 0
        digest = hashlib.sha256(f"{self._seed}{name}".encode()).hexdigest()
        return Request(
            tuple(context[-max_prompt:]),
            max_new_tokens,
            temperature=settings["temperature"] if sampled else 0.0,
            top_p=settings["top_p"],
            top_k=settings["top_k"],
            seed=int(digest[:15], 16) if sampled else 0,
            stop_token_ids=self._text.end_ids | {self.eot_token_id},
            stop=self._text.stop_check(until),
        )

    def _report_truncated(self, label: str, count: int, total: int) -> None:
        if count:
            self._progress.say(
                f"{label}: {count:,} of {total:,} prompts are longer than the window and lose their beginning"
            )

    def _ask(self, requests: list[Request], label: str, on_output: Callable[[int, Output], None]) -> None:
        self._progress.begin(f"{label}, requests", len(requests))
        self._engine.answer(requests, on_output=on_output, on_progress=self._progress.follow)
        self._progress.end()


def _settings(arguments: dict[str, Any], default_max: int) -> dict[str, Any]:
    """A task's generation arguments and defaults; raises UsageError for one that would be ignored."""
    settings: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "temperature": 0.0}
    settings |= normalize_gen_kwargs(arguments, default_max)
    for name, value in settings.items():
        if name not in _SUPPORTED and value not in _DEFAULTS.get(name, ()):
            raise UsageError(
                f"generation argument {name}={value!r} is not available: leave it out of the task or of "
                f"--gen_kwargs (known: {', '.join(sorted(_SUPPORTED))})"
            )
    return settings
