"""The options of a comparison, and the trials that it consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import ModelError, UsageError, first_line
from engine.files.documents import DocumentError, read_json
from engine.units import MIB, format_bytes, parse_bytes
from harness.files import digest_of
from harness.identity import SHORT
from harness.progress.line import Progress
from harness.tokenizer import ChatMode

Record = dict[str, Any]
"""What came of one trial; kept in the journal as JSON."""


@dataclass(frozen=True)
class CompareOptions:
    """The command line of a comparison; ``run_helm.py compare --help`` says what each means."""

    model: Path
    name: str
    systems: Sequence[str]
    memory_caps: Sequence[str] = ("none",)
    prompt_len: int = 512
    gen_len: int = 32
    repeats: int = 3
    batches: Mapping[str, int] = field(default_factory=dict)
    """Fixed batch sizes by system or ``system/configuration``, ``""`` for all others; else searched for."""

    first_batches: Mapping[str, int] = field(default_factory=dict)
    """Sizes at which the search begins, by the same names; 1 by default."""

    most_batch: int = 64
    sample: int = 2
    """How many prompts' tokens are compared with those of transformers."""

    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    timeout_s: float = 600.0
    prepare_timeout_s: float = 3600.0
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    run_entries: Sequence[str] = ()
    max_eval_instances: int = 20
    plugins: Sequence[str] = ()
    chat: ChatMode = "auto"
    output_path: Path = Path("results")
    work: Path | None = None
    """Folder of derived files; None for offload/comparisons in the output path."""

    drop_caches: bool = False
    dry_run: bool = False

    @property
    def folder(self) -> Path:
        """Folder of the comparison's own files."""
        return self.output_path / "comparisons" / self.name


@dataclass(frozen=True)
class Model:
    """A checkpoint as files."""

    folder: Path
    name: str
    nbytes: int
    """Bytes of its safetensors files."""

    vocabulary: int
    files: tuple[Path, ...]

    @cached_property
    def digest(self) -> str:
        """Of config and weights, which are read for it.

        Raises:
            StorageError: if a file cannot be read.
        """
        from engine.stored import checkpoint_digest

        return checkpoint_digest(self.folder, self.files, Progress().say).removeprefix("sha256:")

    @staticmethod
    def read(folder: Path) -> Model:
        """Read the config; raises ModelError without a checkpoint in safetensors."""
        files = sorted(folder.glob("*.safetensors"))
        try:
            config = read_json(folder / "config.json", finite=False, most=MIB)
        except (OSError, DocumentError) as error:
            raise ModelError(
                f"config.json of {folder} cannot be used ({first_line(error)}): give a checkpoint's folder"
            ) from error
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors: all systems read the weights from them")
        inner = config.get("text_config", config)
        if "vocab_size" not in inner:
            raise ModelError(f"{folder}/config.json has no vocab_size: give the folder of a language model")
        return Model(
            folder.resolve(), folder.resolve().name, sum(file.stat().st_size for file in files),
            int(inner["vocab_size"]), tuple(files),
        )  # fmt: skip


@dataclass(frozen=True)
class MemoryCap:
    """A limit on host memory; tables call it the setting."""

    label: str
    """In tables: ``all in RAM`` or ``RAM capped at 50% of the model, 512 MiB``."""

    nbytes: int | None
    """None for no limit."""

    @staticmethod
    def parse(text: str, model_bytes: int) -> MemoryCap:
        """From ``none``, a share of the model's bytes such as ``50%``, or a size such as ``2GiB``.

        Raises:
            UsageError: for anything else.
        """
        if text.strip().lower() == "none":
            return MemoryCap("all in RAM", None)
        try:
            if text.strip().endswith("%"):
                cap = int(float(text.strip()[:-1]) / 100 * model_bytes)
            else:
                cap = parse_bytes(text)
        except ValueError:
            raise UsageError(
                f"--memory-cap takes none, a share of the model's bytes such as 50%, or a size, not {text!r}"
            ) from None
        if cap < 1:
            raise UsageError(f"--memory-cap {text} is {cap} bytes: give at least one")
        part = f"{text.strip()} of the model, " if text.strip().endswith("%") else ""
        return MemoryCap(f"RAM capped at {part}{format_bytes(cap)}", cap)


@dataclass(frozen=True)
class Trial:
    """One child process: a system with its settings, a workload and a memory limit."""

    system: str
    configuration: str
    settings: Mapping[str, Any]
    cap_bytes: int | None
    batch: int
    prompt_len: int
    gen_len: int
    purpose: str
    """probe (of variants), search (for a batch size), repeat, reference or accuracy."""

    repeat: int = 0
    score: bool = False
    """Whether the sample is scored, too."""

    @property
    def digest(self) -> str:
        """What is run, whatever else its record depends on."""
        return digest_of(asdict(self))[:SHORT]


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts [count, length], the same for every system; prompt i does not depend on ``count``.

    The first four ids, which are special tokens in most vocabularies, are left out.
    """
    import random

    low = min(4, vocabulary - 1)
    found = []
    for index in range(count):
        draw = random.Random(f"{seed}-{index}")
        found.append([draw.randrange(low, vocabulary) for _ in range(length)])
    return found
