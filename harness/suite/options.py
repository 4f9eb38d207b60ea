"""The options of a suite, and what its steps share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness.environment import check_torchvision, require_helm, require_memory_for
from harness.files import SuiteStore
from harness.progress.dashboard import make_progress
from harness.progress.line import Progress
from harness.suite.manifest import kept_date
from harness.tokenizer import ChatMode, Text


@dataclass(frozen=True)
class SuiteOptions:
    """The command line of a suite; ``run_helm.py run --help`` says what each means."""

    settings: EngineSettings
    model_name: str
    """The model's name in tables."""

    policies: Sequence[Policy]
    suite: str
    output_path: Path
    run_entries: Sequence[str] = ()
    conf_paths: Sequence[str] = ()
    max_eval_instances: int | None = None
    num_train_trials: int | None = None
    forbid_truncation: bool = False
    chat: ChatMode = "auto"
    plugins: Sequence[str] = ()
    local_path: Path = Path("prod_env")
    """HELM's configuration folder."""

    only_accepted: Path | None = None
    """A curve.json whose gate has to have accepted how every policy compresses."""

    dry_run: bool = False
    report: bool = True
    quiet: bool = False
    """Whether no progress is shown."""

    today: date | None = None
    """That a chat template shows as today's; None is the day of the suite's first run."""


@dataclass(frozen=True)
class Suite:
    """What the steps of one suite share."""

    options: SuiteOptions
    store: SuiteStore
    progress: Progress
    closing: ExitStack
    """Closed when the suite is left."""

    @cached_property
    def text(self) -> Text:
        """The model's tokenizer, loaded after an engine has found the model usable."""
        settings = self.options.settings
        text = Text.load(settings.model, settings.trust_remote_code)
        if text.shown_date:
            kept = self.options.today or kept_date(self.store.folder.glob("policies/*/manifest.json"))
            text.today = kept or text.today
        return text

    @cached_property
    def chat(self) -> bool:
        """Whether prompts are put into the tokenizer's chat template."""
        return self.text.uses_chat(self.options.chat)


@contextmanager
def open_suite(options: SuiteOptions) -> Iterator[Suite]:
    """Lock a suite's folder while its steps are taken.

    Raises:
        UsageError: if HELM is missing or another process works on the suite.
        StorageError: if the folder cannot be written.
    """
    require_memory_for("torch")
    check_torchvision()
    require_helm()
    store = SuiteStore(options.output_path, options.suite)
    with ExitStack() as stack:
        stack.enter_context(store.locked())
        stack.callback(store.clear_staging)
        progress = make_progress(options.quiet)
        stack.callback(progress.close)
        yield Suite(options, store, progress, stack)
