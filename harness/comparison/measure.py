"""Runs one cell: a child under its limit, warmed up, timed, and checked.

It knows what a fair measurement is: files out of the page cache first, a clock of its own beside the
system's, exactly the tokens that were asked for. It does not know which cells there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.baselines.base import Job
from harness.baselines.registry import CLASSES
from harness.baselines.sandbox.child import Child, ChildError
from harness.baselines.sandbox.environments import Environment
from harness.baselines.sandbox.page_cache import drop
from harness.comparison.options import Cell, CompareOptions, Model, prompts

Record = dict[str, Any]
Launch = Callable[[Environment], Sequence[str]]

_WARM_TOKENS = 2
_WARM_PROMPT = 8
_SERVE = Path(__file__).resolve().parent.parent / "baselines" / "sandbox" / "serve.py"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_CLOCK_SLACK = 0.25
"""Seconds by which a system's own times may exceed ours, for what starts and ends a call."""


def launch(environment: Environment) -> list[str]:
    """The command of a system's child, cut off from our variables and packages."""
    module, name = CLASSES[environment.baseline.name]
    return [str(environment.python), "-I", str(_SERVE), module, name]


@dataclass(frozen=True)
class Bench:
    """Where and how cells are run.

    Attributes:
        started: the command of a child by its environment; tests put others in its place.
    """

    options: CompareOptions
    model: Model
    work: Path
    started: Launch = launch
    expected: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """By prompt of the sample the reference's tokens."""

    def folder(self, system: str) -> Path:
        """The system's own work folder for this model."""
        folder = self.work / self.model.digest[:12] / system
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def prepare(self, environment: Environment, cell: Cell) -> Record:
        """Derive the files that a cell reads, in a child without a limit. Not timed."""
        record: Record = {"status": "ok", "reason": ""}
        began = time.monotonic()
        try:
            with self._child(environment, cell, None, "prepare") as child:
                answer = child.ask("prepare", self.options.prepare_timeout_s, job=asdict(self._job(cell)))
                record["prepared"] = answer.get("prepared")
        except ChildError as error:
            record |= {"status": error.status, "reason": error.reason, "said": error.said}
        return record | {"wall_s": time.monotonic() - began}

    def run(self, environment: Environment, cell: Cell) -> Record:
        """One cell. Whatever happens in the child, a record comes back, never an exception."""
        cold = drop([self.model.folder, self.folder(cell.system)], self.options.drop_caches)
        began = time.monotonic()
        record: Record = {"status": "ok", "reason": "", "cold": cold}
        try:
            with self._child(environment, cell, cell.cap_bytes, "run") as child:
                record |= {"command": child.command, "cap_enforced": child.enforced}
                try:
                    self._measure(child, cell, record)
                finally:
                    record["peak_bytes"] = child.peak()
        except ChildError as error:
            record |= {"status": error.status, "reason": error.reason, "said": error.said}
        return record | {"wall_s": time.monotonic() - began}

    def loaded(self, environment: Environment, cell: Cell) -> Child:
        """A child with its model loaded, under the cell's limit; the caller closes it.

        Raises:
            ChildError: if it does not get that far.
        """
        drop([self.model.folder, self.folder(cell.system)], self.options.drop_caches)
        child = self._child(environment, cell, cell.cap_bytes, "accuracy")
        try:
            child.ask("load", self.options.timeout_s, job=asdict(self._job(cell)))
        except BaseException:
            child.close()
            raise
        return child

    def _measure(self, child: Child, cell: Cell, record: Record) -> None:
        deadline = time.monotonic() + self.options.timeout_s

        def ask(what: str, **content: Any) -> Record:
            return child.ask(what, max(0.01, deadline - time.monotonic()), **content)

        record["versions"] = ask("hello").get("versions", {})
        record["loaded"] = ask("load", job=asdict(self._job(cell))).get("loaded")
        ids = prompts(cell.batch, cell.prompt_len, self.model.vocabulary, self.options.seed)
        warm = [row[: min(_WARM_PROMPT, cell.prompt_len)] for row in ids]
        ask("generate", prompts=warm, new_tokens=min(_WARM_TOKENS, cell.gen_len))
        read, written = child.counted()
        start = time.monotonic()
        answer = ask("generate", prompts=ids, new_tokens=cell.gen_len)
        wall = time.monotonic() - start
        read_after, written_after = child.counted()
        checked(answer, cell, self.model.vocabulary, wall)
        seconds = answer["prefill_s"] + answer["decode_s"]
        generated = cell.batch * cell.gen_len
        record |= {
            "prefill_s": answer["prefill_s"],
            "decode_s": answer["decode_s"],
            "generated_tokens_per_s": generated / seconds,
            "total_tokens_per_s": (generated + cell.batch * cell.prompt_len) / seconds,
            "bytes_read": read_after - read,
            "bytes_written": written_after - written,
            "anonymous_bytes": answer.get("anonymous_bytes", 0),
            "device_peak_bytes": answer.get("device_peak_bytes", 0),
            "tokens": answer["tokens"][: self.options.sample],
        }
        record["agreement"] = agreement(answer["tokens"], self.expected, cell.gen_len)
        if cell.score:
            self._score(ask, ids, cell, record)

    def _score(
        self, ask: Callable[..., Record], ids: Sequence[Sequence[int]], cell: Cell, record: Record
    ) -> None:
        """Log-probabilities of the reference's own tokens; a system without them is not a failure."""
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
            str(index): row[-cell.gen_len :] for index, row in zip(sample, rows, strict=True)
        }

    def _job(self, cell: Cell) -> Job:
        options = self.options
        return Job(
            model=str(self.model.folder),
            work=str(self.folder(cell.system).resolve()),
            settings=dict(cell.settings),
            threads=options.threads,
            device=options.device,
            cap_bytes=cell.cap_bytes,
            batch=max(cell.batch, 1),
            prompt_len=cell.prompt_len,
            new_tokens=cell.gen_len,
        )

    def _child(self, environment: Environment, cell: Cell, limit: int | None, what: str) -> Child:
        variables = environment.variables() | dict.fromkeys(_THREAD_VARIABLES, str(self.options.threads))
        log = self.folder(cell.system) / f"{what}.log"
        return Child(self.started(environment), log, limit, variables)


def checked(answer: Mapping[str, Any], cell: Cell, vocabulary: int, wall_s: float) -> None:
    """Make sure that an answer is what was asked for.

    Raises:
        ChildError: for missing, surplus or impossible tokens, and for times that our clock contradicts.
    """
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != cell.batch:
        count = len(tokens) if isinstance(tokens, list) else "no"
        raise ChildError("failed", f"{cell.batch} sequences were asked for, {count} came")
    for row in tokens:
        if not isinstance(row, list) or not all(
            type(token) is int and 0 <= token < vocabulary for token in row
        ):
            raise ChildError("failed", f"it generated something else than token ids below {vocabulary}")
        if len(row) != cell.gen_len:
            raise ChildError("failed", f"{cell.gen_len} tokens were asked for, {len(row)} came")
    times = answer.get("prefill_s"), answer.get("decode_s")
    if not all(isinstance(value, int | float) and value >= 0 for value in times) or not sum(times):  # type: ignore[arg-type]
        raise ChildError("failed", f"its times are no seconds: {times}")
    if sum(times) > wall_s * 1.02 + _CLOCK_SLACK or sum(times) < wall_s / 2 - _CLOCK_SLACK:  # type: ignore[arg-type]
        raise ChildError("failed", f"it says {sum(times):.2f} s, our clock {wall_s:.2f} s")  # type: ignore[arg-type]


def agreement(
    tokens: Sequence[Sequence[int]], expected: Mapping[int, Sequence[int]], gen_len: int
) -> float | None:
    """Mean fraction of a prompt's tokens that equal the reference's before the first that differs.

    After one difference the texts are different ones, and tokens that are equal again prove nothing.
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
