"""What kept answers depend on besides the requests: one identity, part by part, for all that keeps answers.

The journal of a suite, the result file of a batch, lm-eval's cache, a curve's points and a comparison's
records keep answers under it, so that none is taken for the answer of another model, tokenizer or format, and
each can say which part has changed. It knows the engine's record, the policy and the tokenizer, not who keeps
what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from engine.errors import PolicyError
from engine.spec.format_key import format_key
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord
from harness.files import digest_of
from harness.tokenizer import Text

REVISION = 1
"""Raised by every change of the program after which a model answers otherwise; part of every identity."""

SHORT = 16
"""Digits of a digest that begin the keys of what is kept under it."""

PART_DIGITS = 4
"""Digits of a part's digest in `Identity.fingerprint`."""

_PROBES = (
    "The quick brown fox jumps over 1,234.50 lazy dogs!\n\n\tdef f(x):  return x ** 2  # ok\r\n",
    "  leading, trailing  ",
    "naïve café 你好 русский 😀",
    "ALL CAPS iPhone don't",
)
"""Texts whose ids tell tokenizers apart that a library reads in two ways from the same files."""


@dataclass(frozen=True)
class Identity:
    """All that answers depend on besides the requests; each part is a short text or a digest."""

    weights: str
    """Of config.json and the weights, or of random weights and their seed; the kind included."""

    tokenizer: str = ""
    start_ids: str = ""
    """Ids that are put before texts."""

    end_ids: str = ""
    """Ids that end a generation: of the tokenizer, the config and generation_config.json together."""

    chat_template: str = ""
    date: str = ""
    """That a chat template shows as today's; empty where it shows none."""

    formats: str = ""
    """In which weights and KV cache are kept and products computed."""

    seed: str = ""
    device: str = ""
    """``cpu`` or ``cuda``."""

    placement: str = ""
    """Everything else of the policy and the device's name, where times are kept with the answers."""

    system: str = ""
    """In a comparison: which system answered, with its settings and packages."""

    reference: str = ""
    """In a comparison: the answers that others are compared with."""

    settings: str = ""
    """Of the command, where they complete what requests leave open."""

    program: str = str(REVISION)
    """How this version of the program answers."""

    @cached_property
    def digest(self) -> str:
        """Of all parts."""
        return digest_of(self.to_dict())

    @property
    def short(self) -> str:
        """The beginning of ``digest``."""
        return self.digest[:SHORT]

    @property
    def fingerprint(self) -> str:
        """A few digits of each part, from which `changed_parts` reads what is another one's."""
        return "".join(digest_of(part)[:PART_DIGITS] for part in self.to_dict().values())

    def to_dict(self) -> dict[str, str]:
        """The parts by their names."""
        return asdict(self)

    def changed_from(self, before: Mapping[str, str]) -> list[str]:
        """Names of the parts that were others in what `to_dict` gave before, in words."""
        now = self.to_dict()
        return [in_words(name) for name in now if now[name] != before.get(name, "")]

    def changed_parts(self, fingerprint: str) -> list[str]:
        """The same from another identity's `fingerprint`."""
        own = self.fingerprint
        if len(own) != len(fingerprint):
            return [in_words("program")]
        begins = range(0, len(own), PART_DIGITS)
        same = [own[i : i + PART_DIGITS] == fingerprint[i : i + PART_DIGITS] for i in begins]
        names = (one.name for one in fields(self))
        return [in_words(name) for name, is_same in zip(names, same, strict=True) if not is_same]


_WORDS = {
    "weights": "weights or config",
    "placement": "placement, schedule or machine",
    "system": "system's settings or packages",
    "settings": "settings of the command",
    "program": "version of this program",
}


def in_words(part: str) -> str:
    """A part's name as messages have it."""
    return _WORDS.get(part, part.replace("_", " "))


def since(changed: Iterable[str]) -> str:
    """Why something is not used, behind what it is: ``, since these changed: tokenizer, end ids``."""
    return f", since these changed: {', '.join(changed)}"


def identity_of(
    record: EngineRecord, policy: Policy, seed: int, text: Text | None = None, *, with_times: bool = False
) -> Identity:
    """The identity of what an engine answers under a policy.

    Args:
        record: the engine's own.
        text: the model's tokenizer; None for requests and answers in token ids.
        with_times: whether times are kept with the answers, so that placement, schedule and machine count.
            Budgets never count: a suite that ran out of memory can be continued with more of it.

    Raises:
        PolicyError: if the policy's calibration cannot be read.
    """
    model, device, by = record.model, record.hardware.device, record.answered_by
    kept = policy.to_dict()
    chosen: dict[str, Any] = {key: kept.pop(key) for key in format_key(policy)._fields}
    chosen |= {"calibration": calibration_digest(policy), "computes_in": model.compute_dtype}
    del kept["name"]
    return Identity(
        weights=f"{model.weights} {model.digest}",
        formats=_shown(chosen),
        seed=str(seed),
        device="cuda" if device.startswith("cuda") else "cpu",
        placement=_shown({**kept, "device": device}) if with_times else "",
        system=""
        if by is None
        else digest_of([by.system, by.configuration, dict(by.settings), dict(by.packages)]),
        **({} if text is None else _text_parts(text) | {"date": text.shown_date}),
    )


def calibration_digest(policy: Policy) -> str:
    """Digest of the statistics that a policy smooths by, which may change under their name; empty for none.

    Raises:
        PolicyError: if they cannot be read.
    """
    if not policy.calibration:
        return ""
    try:
        return hashlib.sha256(Path(policy.calibration).read_bytes()).hexdigest()
    except OSError as error:
        raise PolicyError(
            f"calibration={policy.calibration} cannot be read ({error.strerror}): "
            "write it with run_helm.py calibrate"
        ) from error


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


@lru_cache(maxsize=4)  # of a large vocabulary it takes a second, and every policy of a suite asks
def _text_parts(text: Text) -> dict[str, str]:
    template = text.tokenizer.chat_template
    return {
        "tokenizer": digest_of(_tokenizer_state(text)),
        "start_ids": f"{list(text.start_ids)}, of scored texts {list(text.scoring_prefix)}",
        "end_ids": str(sorted(text.end_ids)),
        "chat_template": digest_of(template) if template else "",
    }


def _tokenizer_state(text: Text) -> list[Any]:
    """Everything by which texts become ids and ids texts, as it was loaded; where from does not matter."""
    tokenizer = text.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        for changed_by_calls in ("truncation", "padding"):
            state.pop(changed_by_calls, None)
    else:  # written in Python: its vocabulary, and the files that it read
        names = (getattr(tokenizer, name, None) for name in tokenizer.vocab_files_names)
        files = [Path(name) for name in names if name and Path(name).is_file()]
        contents = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
        state = [sorted(tokenizer.get_vocab().items()), contents]
    return [
        type(tokenizer).__name__,
        digest_of(state),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.model_max_length,
        [list(text.encode(probe)) for probe in _PROBES],
        [text.join(text.encode(probe)).hex() for probe in _PROBES],
    ]
