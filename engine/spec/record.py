"""What an engine says of how its results came about: the record that lies beside them as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engine.spec.fields import Signed, read_fields
from engine.spec.policy import Policy

Kind = Literal["measured", "simulated", "projected"]
"""How figures came about: timed, simulated from a profile, or scaled up from a part that was timed."""


@dataclass(frozen=True)
class ModelRecord:
    """The model that answered."""

    path: str
    """Folder or hub name as the user gave it."""

    architecture: str
    """Class in transformers."""

    digest: str
    """Identifies config and weights."""

    weights: str
    """``trained`` or ``random``."""

    num_parameters: int
    dtype: str
    """Of the checkpoint's weights."""

    compute_dtype: str

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Tensors of the checkpoint that text does not need: how many, by the first parts of their names."""


@dataclass(frozen=True)
class StoredRecord:
    """Bytes of the weights and of the KV cache as they are kept."""

    weight_bytes: int
    bytes_per_parameter: float
    kv_bytes_per_token: float
    """Mean over ``kv_tokens``, all layers together."""

    kv_tokens: int
    """Tokens of the longest sequence in the KV cache."""

    kernels: str = ""
    """What computes with packed numbers."""


@dataclass(frozen=True)
class TierRecord:
    """Bytes of one tier."""

    budget: int | None
    """None where none was set."""

    planned: int
    """Most bytes that the memory plan foresees; 0 before the first call."""

    peak: int
    """Most bytes that were held at once."""


@dataclass(frozen=True)
class TogetherRecord:
    """Bytes of device and host tier at one time, where they are one memory."""

    planned: int
    peak: int


@dataclass(frozen=True)
class ProcessRecord:
    """Peak bytes of the whole process."""

    peak_rss: int
    """Resident memory, everything in the process included."""

    device_peak: int | None
    """What torch allocated on a CUDA device; None on a CPU."""


@dataclass(frozen=True)
class TotalsRecord:
    """Counts and seconds over all calls of the engine."""

    requests: int
    passes: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Of all passes."""

    load_seconds: float
    computed_tokens: int = 0
    """Tokens that went through the model."""

    padding_tokens: int = 0
    shared_tokens: int = 0
    """Prompt tokens that were taken from a shared prefix."""

    distinct_tokens: int = 0
    """Prompt tokens, each shared prefix counted once."""

    slots_taken: int = 0
    """Slots of the block that held a sequence, summed over the passes."""

    kv_bytes_saved: Signed = 0
    """Bytes that the requests' own copies of their prefixes would have added to the KV cache; below 0 where
    the shared prefixes took more."""


@dataclass(frozen=True)
class SavingsRecord:
    """What shared prefixes, early leaving and refilling saved; counted, nothing estimated.

    It is stored with those of the totals' counts that it is about, see `SAVINGS_COUNTS`.
    """

    needed_tokens: int
    """Tokens that had to go through the model once: nodes of the prompts' tree, and every generated token."""

    computed_per_needed: float | None
    occupancy: float | None
    """Mean fraction of the block's slots that were taken in a pass."""


SAVINGS_COUNTS = (
    "prompt_tokens", "generated_tokens", "computed_tokens", "padding_tokens", "shared_tokens", "passes",
    "kv_bytes_saved",
)  # fmt: skip


@dataclass(frozen=True)
class StreamRecord:
    """What one stream did."""

    busy_seconds: float
    share: float
    """Busy seconds over the seconds of all passes."""

    bytes: int
    bound_seconds: float | None = None
    """Least seconds in which the machine's profile could have done the stream's work; None without one."""


@dataclass(frozen=True)
class WeightsRecord:
    """Where the weights were read from, in numbers of tensors and bytes."""

    in_files: int
    """Tensors that stay in the files of a checkpoint or of the packed store."""

    streamed: int
    """Tensors that were read, converted and placed."""

    store_entry: str | None
    store_bytes: int


@dataclass(frozen=True)
class MachineRecord:
    """The machine that answered."""

    device: str
    cpu: str = ""
    cores: int = 0
    threads: int = 0
    """Threads of torch."""

    memory_bytes: int = 0
    """RAM of the machine."""

    platform: str = ""


@dataclass(frozen=True)
class PredictionRecord:
    """What the planner expected of the policy that it found."""

    policy: Mapping[str, Any]
    """Under the planner's name for it."""

    predicted: Mapping[str, Any]
    """The simulated run: seconds, passes, tokens and more, each answer as long as it may be."""

    memory: Mapping[str, Mapping[str, int]]
    """Planned and available bytes by tier."""

    profile: str
    """Name of the machine's profile."""

    binding: Mapping[str, Any] | None = None
    """The resource and the tiers that limit the run."""


@dataclass(frozen=True)
class AnsweredBy:
    """Another system that answered in the engine's place, in a comparison."""

    system: str
    configuration: str
    settings: Mapping[str, Any]
    peak_bytes: int
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of what it consists of."""


_ONLY_WHERE_KNOWN = ("predicted", "bounds_from", "answered_by")


@dataclass(frozen=True)
class EngineRecord:
    """Everything that an engine says of how its results came about. None: the engine does not know."""

    kind: Kind
    model: ModelRecord
    policy: Mapping[str, Any]
    """As written in a policy file; see `engine.spec.policy.Policy.to_dict`."""

    placement: Mapping[str, Mapping[str, float]]
    """Achieved fractions by kind of tensor (weights, kv, activations) and tier; empty before any call."""

    memory: Mapping[str, TierRecord]
    """By tier."""

    totals: TotalsRecord
    streams: Mapping[str, StreamRecord]
    hardware: MachineRecord
    software: Mapping[str, str]
    """Versions by package."""

    stored: StoredRecord | None = None
    together: TogetherRecord | None = None
    process: ProcessRecord | None = None
    savings: SavingsRecord | None = None
    weights_from: WeightsRecord | None = None
    disk_io: str | None = None
    """How the disk was read and written: ``direct``, ``buffered`` with the reason, or ``unused``."""

    predicted: PredictionRecord | None = None
    """Only of a policy that the planner found."""

    bounds_from: str | None = None
    """Name of the profile behind the streams' ``bound_seconds``."""

    answered_by: AnsweredBy | None = None

    def run_policy(self) -> Policy:
        """The policy as an object."""
        return Policy.from_mapping(self.policy)

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        content = asdict(self)
        for key in _ONLY_WHERE_KNOWN:
            if content[key] is None:
                del content[key]
        for stream in content["streams"].values():
            if stream["bound_seconds"] is None:
                del stream["bound_seconds"]
        content["stored"] = content["stored"] or {}
        if content["savings"]:
            content["savings"] |= {key: content["totals"][key] for key in SAVINGS_COUNTS}
        return content

    @classmethod
    def from_json(cls, content: Any) -> EngineRecord:
        """Read back what `to_json` made.

        Raises:
            FieldError: naming the field that is missing or damaged.
        """
        return read_fields(cls, content)
