"""Runs one trial: a child process under its memory limit, warmed up, timed and checked.

It knows what makes a measurement fair: the page cache is emptied first, the system's own times are checked
against our clock, and exactly the requested number of tokens is generated. It does not choose the trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import storage_errors
from engine.files.scratch import Scratch
from harness.baselines.base import Job
from harness.baselines.registry import CLASSES
from harness.baselines.sandbox.child import Child, ChildError
from harness.baselines.sandbox.environments import Environment
from harness.baselines.sandbox.page_cache import drop
from harness.comparison.options import CompareOptions, Model, Record, Trial, prompts

Launch = Callable[[Environment], Sequence[str]]

_WARM_TOKENS = 2
_WARM_PROMPT = 8
_SERVE = Path(__file__).resolve().parent.parent / "baselines" / "sandbox" / "serve.py"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_CLOCK_SLACK = 0.25
"""Seconds by which a system's own times may differ from ours, for the overhead of a call."""


def launch(environment: Environment) -> list[str]:
    """The command line of a system's child, isolated from our variables and packages."""
    module, name = CLASSES[environment.baseline.name]
    return [str(environment.python), "-I", str(_SERVE), module, name]


@dataclass(frozen=True)
class Bench:
    """Where and how trials are run."""

    options: CompareOptions
    model: Model
    work: Path
    started: Launch = launch
    """The command line of a child by its environment; replaced by tests."""

    expected: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The reference's tokens by index of the prompt."""

    def folder(self, system: str) -> Path:
        """The system's work folder for this model."""
        folder = self.work / self.model.digest[:12] / system
        with storage_errors(folder, "make", "choose another --work"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def prepare(self, environment: Environment, trial: Trial) -> Record:
        """Derive the files that a trial reads, in a child without a memory limit; not timed."""
        record: Record = {"status": "ok", "reason": ""}
        began = time.monotonic()
        try:
            with self._child(environment, trial, None, "prepare") as child:
                job = self._job(trial, child)
                answer = child.ask("prepare", self.options.prepare_timeout_s, job=job)
                record["prepared"] = answer.get("prepared")
        except ChildError as error:
            record |= {"status": error.status, "reason": error.reason, "said": error.said}
        return record | {"wall_s": time.monotonic() - began}

    def run(self, environment: Environment, trial: Trial) -> Record:
        """Run one trial; whatever happens in the child, the result is a record and never an exception."""
        cold = drop([self.model.folder, self.folder(trial.system)], self.options.drop_caches)
        began = time.monotonic()
        record: Record = {"status": "ok", "reason": "", "cold": cold}
        try:
            with self._child(environment, trial, trial.cap_bytes, "run") as child:
                record |= {"command": child.command, "cap_enforced": child.enforced}
                try:
                    self._measure(child, trial, record)
                finally:
                    record["peak_bytes"] = child.peak()
        except ChildError as error:
            record |= {"status": error.status, "reason": error.reason, "said": error.said}
        return record | {"wall_s": time.monotonic() - began}

    def loaded(self, environment: Environment, trial: Trial) -> Child:
        """A child under the trial's memory limit that has loaded the model; the caller closes it.

        Raises:
            ChildError: if the model cannot be loaded.
        """
        drop([self.model.folder, self.folder(trial.system)], self.options.drop_caches)
        child = self._child(environment, trial, trial.cap_bytes, "accuracy")
        try:
            child.ask("load", self.options.timeout_s, job=self._job(trial, child))
        except BaseException:
            child.close()
            raise
        return child

    def _measure(self, child: Child, trial: Trial, record: Record) -> None:
        deadline = time.monotonic() + self.options.timeout_s

        def ask(what: str, **content: Any) -> Record:
            return child.ask(what, max(0.01, deadline - time.monotonic()), **content)

        record["versions"] = ask("hello").get("versions", {})
        record["loaded"] = ask("load", job=self._job(trial, child)).get("loaded")
        ids = prompts(trial.batch, trial.prompt_len, self.model.vocabulary, self.options.seed)
        warm = [row[: min(_WARM_PROMPT, trial.prompt_len)] for row in ids]
        ask("generate", prompts=warm, new_tokens=min(_WARM_TOKENS, trial.gen_len))
        read, written = child.counted()
        start = time.monotonic()
        answer = ask("generate", prompts=ids, new_tokens=trial.gen_len)
        wall = time.monotonic() - start
        read_after, written_after = child.counted()
        checked(answer, trial, self.model.vocabulary, wall)
        seconds = answer["prefill_s"] + answer["decode_s"]
        generated = trial.batch * trial.gen_len
        record |= {
            "prefill_s": answer["prefill_s"],
            "decode_s": answer["decode_s"],
            "generated_tokens_per_s": generated / seconds,
            "total_tokens_per_s": (generated + trial.batch * trial.prompt_len) / seconds,
            "bytes_read": read_after - read,
            "bytes_written": written_after - written,
            "anonymous_bytes": answer.get("anonymous_bytes", 0),
            "device_peak_bytes": answer.get("device_peak_bytes", 0),
            "tokens": answer["tokens"][: self.options.sample],
        }
        record["agreement"] = agreement(answer["tokens"], self.expected, trial.gen_len)
        if trial.score:
            self._score(ask, ids, trial, record)

    def _score(
        self, ask: Callable[..., Record], ids: Sequence[Sequence[int]], trial: Trial, record: Record
    ) -> None:
        """Log-probabilities of the reference's tokens; a system that cannot give them has not failed."""
        known = self.expected or dict(enumerate(record["tokens"]))
        sample = {index: list(tokens) for index, tokens in known.items() if index < len(ids)}
        sequences = [list(ids[index]) + tokens for index, tokens in sample.items()]
        if not sequences:
            return
        try:
            answer = ask("score", sequences=sequences)
        except ChildError as error:
            record["unscored"] = error.reason
            return
        rows = answer.get("logprobs")
        if not _is_score(rows, sequences):
            raise ChildError("failed", "its log-probabilities are not one per token but the first")
        assert isinstance(rows, list)
        record["logprobs"] = {
            str(index): row[-trial.gen_len :] for index, row in zip(sample, rows, strict=True)
        }

    def _job(self, trial: Trial, child: Child) -> dict[str, Any]:
        options = self.options
        assert child.scratch is not None
        job = Job(
            model=str(self.model.folder),
            work=str(self.folder(trial.system).resolve()),
            scratch=str(child.scratch.path.resolve()),
            settings=dict(trial.settings),
            threads=options.threads,
            device=options.device,
            cap_bytes=trial.cap_bytes,
            batch=max(trial.batch, 1),
            prompt_len=trial.prompt_len,
            new_tokens=trial.gen_len,
        )
        return asdict(job)

    def _child(self, environment: Environment, trial: Trial, limit: int | None, what: str) -> Child:
        variables = environment.variables() | dict.fromkeys(_THREAD_VARIABLES, str(self.options.threads))
        log = self.folder(trial.system) / f"{what}.log"
        with storage_errors(self.work, "use", "choose another --work"):
            scratch = Scratch(self.work)
        return Child(self.started(environment), log, limit, variables, scratch=scratch)


def checked(answer: Mapping[str, Any], trial: Trial, vocabulary: int, wall_s: float) -> None:
    """Check that an answer has the requested tokens and plausible times.

    Raises:
        ChildError: for missing, surplus or impossible tokens, and for times that our clock contradicts.
    """
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != trial.batch:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise ChildError("failed", f"{trial.batch} sequences were asked for, {count} came")
    for row in tokens:
        if not isinstance(row, list) or not all(
            type(token) is int and 0 <= token < vocabulary for token in row
        ):
            raise ChildError("failed", f"it generated something other than token ids below {vocabulary}")
        if len(row) != trial.gen_len:
            raise ChildError("failed", f"{trial.gen_len} tokens were asked for, {len(row)} came")
    given = answer.get("prefill_s"), answer.get("decode_s")
    times = [value for value in given if isinstance(value, int | float) and value >= 0]
    if len(times) < len(given) or not sum(times):
        raise ChildError("failed", f"its times are not seconds: {given}")
    if sum(times) > wall_s * 1.02 + _CLOCK_SLACK or sum(times) < wall_s / 2 - _CLOCK_SLACK:
        raise ChildError("failed", f"it reports {sum(times):.2f} s, our clock {wall_s:.2f} s")


def agreement(
    tokens: Sequence[Sequence[int]], expected: Mapping[int, Sequence[int]], gen_len: int
) -> float | None:
    """Mean fraction of generated tokens that equal the reference's, up to the first that differs.

    Args:
        tokens: [batch, gen_len].

    After one difference the texts are different, and tokens that are equal again prove nothing.
    """
    parts = []
    for index, right in expected.items():
        if index < len(tokens) and len(right) >= gen_len:
            same = 0
            while same < gen_len and tokens[index][same] == right[same]:
                same += 1
            parts.append(same / gen_len)
    return sum(parts) / len(parts) if parts else None


def distance(found: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]]) -> float | None:
    """Mean absolute difference, in nats, of the log-probabilities of the reference's tokens."""
    pairs = [
        pair for index in found if index in right for pair in zip(found[index], right[index], strict=False)
    ]
    return sum(abs(mine - other) for mine, other in pairs) / len(pairs) if pairs else None


def _is_score(rows: object, sequences: Sequence[Sequence[int]]) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == len(sequences)
        and all(
            isinstance(row, list) and len(row) == len(ids) - 1 and all(isinstance(p, float) for p in row)
            for row, ids in zip(rows, sequences, strict=True)
        )
    )
