"""Runs a batch file: reads it window by window, has each window answered in one call to the engine.

It knows the order of the steps; lines, records and the result file are other modules' work. Memory is
bounded by the window, whatever the length of the file.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.errors import BudgetError, RequestError, StorageError, UsageError, first_line, storage_errors
from engine.spec.policy import Policy
from engine.spec.record import TotalsRecord
from engine.spec.request import CallProgress, Output, Request
from engine.units import format_rate, format_seconds
from harness.engines.protocol import EngineLike
from harness.identity import Identity, identity_of
from harness.openai_batch.fields import LineError
from harness.openai_batch.grammar import Grammars
from harness.openai_batch.prompts import MOST_TOKENS, PromptReader
from harness.openai_batch.request import BatchRequest, Served, read_envelope, read_request
from harness.openai_batch.response import (
    answer_record,
    error_record,
    record_id,
    shown_date,
    shown_fingerprint,
)
from harness.openai_batch.results import AskedLine, ResultFile
from harness.progress.line import Progress, rate_of
from harness.tokenizer import Text

WINDOW = 4096
"""Requests of one call to the engine, where the user does not say."""

_WINDOW_TOKENS = MOST_TOKENS
"""Prompt tokens of one call, and tokens listed beside others; the line that reaches them ends a window."""

MOST_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class BatchOptions:
    """The command line of a batch."""

    input: Path
    output: Path
    policy: Policy
    names: Sequence[str]
    """What the ``model`` of a request may be; the first one is written into answers."""

    seed: int = 0
    chat_tokens: int = 512
    """Most generated tokens of a chat request that does not say."""

    window: int = WINDOW
    reproducible: bool = False
    """Whether the same input gives the same bytes at any time; see `Served.reproducible`."""


@dataclass
class Summary:
    """What became of the lines of a file."""

    lines: int = 0
    answered: int = 0
    kept: int = 0
    """Lines that an earlier job answered."""

    errors: int = 0
    first_error: str = ""

    def describe(self, seconds: float, totals: TotalsRecord) -> str:
        """One line for people, from the job's wall time and the engine's totals.

        The rate is the tokens of this line divided by its time.
        """
        parts = [f"{self.answered:,} answered", f"{self.errors:,} errors"]
        if self.kept:
            parts.insert(1, f"{self.kept:,} answered before")
        rate, tokens = "", totals.prompt_tokens + totals.generated_tokens
        if tokens:
            rate = f", {tokens:,} tokens, {format_rate(tokens / seconds, 'token')}"
        first = f"; the first error: {self.first_error}" if self.first_error else ""
        return f"batch: {self.lines:,} lines in {format_seconds(seconds)}: {', '.join(parts)}{rate}{first}"


def run_batch(engine: EngineLike, text: Text, options: BatchOptions, progress: Progress) -> Summary:
    """Answer every line of the input that the output holds no answer to.

    Raises:
        UsageError: if a file cannot be used, or the policy fits no request at all.
        StorageError: if the output or a tier fails; what is written stands, and the same call goes on.
    """
    if not options.input.is_file():
        raise UsageError(f"{options.input} is not a file: give a file of requests, one JSON object a line")
    engine.check([Request((0,), 1)])
    if options.output.is_file() and options.output.stat().st_size:
        progress.say(f"reading the answers that {options.output} holds already")
    try:
        with (
            storage_errors(options.input, "read"),
            closing(AskedLine()) as asked,
            closing(ResultFile(options.output, asked)) as results,
        ):
            if results.damaged:
                progress.say(results.complaint("is asked again"))
            served = _served(engine, text, options, asked)
            return _Job(engine, served, options, asked, results, progress).run()
    except sqlite3.Error as error:
        raise StorageError(
            f"the list of custom ids cannot be kept ({first_line(error)}): free space in /tmp"
        ) from error


@dataclass
class _Job:
    """The steps of `run_batch`, and what they hand to each other."""

    engine: EngineLike
    served: Served
    options: BatchOptions
    asked: AskedLine
    results: ResultFile
    progress: Progress
    summary: Summary = field(default_factory=Summary)
    total: int = 0
    said: bool = False

    def run(self) -> Summary:
        self.total = _count_lines(self.options.input)
        self.progress.begin("batch, lines", self.total)
        window: list[BatchRequest] = []
        requests = tokens = 0
        for number, line in _read_lines(self.options.input):
            self.summary.lines += 1
            request = self._read(number, line)
            if request is None:
                self.progress.update(self._done)
                continue
            window.append(request)
            requests += len(request.requests)
            tokens += sum(map(_kept_numbers, request.requests))
            if requests >= self.options.window or tokens >= _WINDOW_TOKENS:
                self._answer(window)
                window, requests, tokens = [], 0, 0
        self._answer(window)
        return self.summary

    def _read(self, number: int, line: bytes) -> BatchRequest | None:
        """The request of a line; None if it is answered already or cannot be."""
        try:
            if len(line) > MOST_LINE_BYTES:
                raise LineError(f"the line is longer than {MOST_LINE_BYTES:,} bytes", status=413)
            envelope = read_envelope(line, self.served.fingerprint)
            if not self.asked.claim(envelope.custom_id, record_id(envelope.key), number):
                self.summary.kept += 1
                return None
            return replace(read_request(envelope, self.served), line=number)
        except LineError as error:
            self._refuse(number, hashlib.sha256(b"%d " % number + line).hexdigest(), error)
            return None

    def _refuse(self, number: int, key: str, error: LineError) -> None:
        record = error_record(key, number, error)
        self.results.add(record)
        self.summary.errors += 1
        message = record["response"]["body"]["error"]["message"]
        self.summary.first_error = self.summary.first_error or message

    def _answer(self, window: list[BatchRequest]) -> None:
        """Answer in as few calls as the budgets allow; what does not fit alone is refused."""
        parts: Iterable[list[BatchRequest]] = [window]
        if self._problem(window) is not None:
            fitting = []
            for request in window:
                problem = self._problem([request])
                if problem is None:
                    fitting.append(request)
                else:
                    error = LineError(str(problem), custom_id=request.envelope.custom_id)
                    self._refuse(request.line, request.envelope.key, error)
            parts = self._halves(fitting)
        for part in parts:
            self._answer_at_once(part)

    def _halves(self, requests: list[BatchRequest]) -> Iterator[list[BatchRequest]]:
        """The requests, halved for as long as they do not fit together."""
        problem = self._problem(requests)
        if problem is None:
            yield requests
            return
        if not self.said:
            self.progress.say(f"{len(requests):,} lines at once do not fit and are halved: {problem}")
            self.said = True
        middle = len(requests) // 2
        yield from self._halves(requests[:middle])
        yield from self._halves(requests[middle:])

    def _problem(self, requests: Sequence[BatchRequest]) -> UsageError | None:
        try:
            self.engine.check([one for request in requests for one in request.requests])
        except (BudgetError, RequestError) as error:
            return error
        return None

    def _answer_at_once(self, part: Sequence[BatchRequest]) -> None:
        """One call to the engine; each line is written as soon as its last choice is there."""
        places = [(line, place) for line, one in enumerate(part) for place in range(len(one.requests))]
        outputs: list[dict[int, Output]] = [{} for _ in part]

        def on_output(index: int, output: Output) -> None:
            line, place = places[index]
            outputs[line][place] = output
            request, done = part[line], outputs[line]
            if len(done) == len(request.requests):
                self._write(request, [done[place] for place in range(len(done))])
                done.clear()

        later = self.total - self._done - len(part)

        def on_progress(state: CallProgress) -> None:
            # what comes after this part is taken to be like it
            eta = state.eta_seconds + later * (state.seconds + state.eta_seconds) / len(part)
            self.progress.update(self._done, rate_of(state), eta)

        requests = [one for request in part for one in request.requests]
        self.engine.answer(requests, on_output=on_output, on_progress=on_progress)

    def _write(self, request: BatchRequest, outputs: Sequence[Output]) -> None:
        try:
            self.results.add(answer_record(request, outputs, self.served))
            self.summary.answered += 1
        except LineError as error:
            self._refuse(request.line, request.envelope.key, error)

    @property
    def _done(self) -> int:
        return self.summary.answered + self.summary.kept + self.summary.errors


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank and their numbers; of one that is too long the beginning."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MOST_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MOST_LINE_BYTES + 1)
            if line.strip():
                yield number, line


def _kept_numbers(request: Request) -> int:
    """Tokens of its prompt, and most tokens that its answer lists beside others: they take memory, too."""
    listed = request.prompt_top_logprobs if request.prompt_logprobs else 0
    return len(request.prompt) * (1 + listed) + request.max_new_tokens * request.top_logprobs


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


def batch_identity(engine: EngineLike, text: Text, options: BatchOptions) -> Identity:
    """What answers depend on besides their line; where things are kept does not count."""
    identity = identity_of(engine.record(), options.policy, options.seed, text)
    settings = f"served model name {options.names[0]}, default max tokens {options.chat_tokens}"
    return replace(identity, settings=settings)


def _served(engine: EngineLike, text: Text, options: BatchOptions, asked: AskedLine) -> Served:
    """Who answers; a chat template shows the day on which the output was begun."""
    text.today = next(filter(None, map(shown_date, asked.fingerprints)), text.today)
    identity, spec = batch_identity(engine, text, options), engine.spec
    asked.about = identity
    return Served(
        prompts=PromptReader(text, spec.vocab_size, spec.max_positions),
        grammars=Grammars(text, spec.vocab_size),
        names=options.names,
        seed=options.seed,
        chat_tokens=options.chat_tokens,
        fingerprint=identity.digest,
        system_fingerprint=shown_fingerprint(identity),
        reproducible=options.reproducible,
    )
