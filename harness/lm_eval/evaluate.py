"""Runs tasks of lm-evaluation-harness with its own evaluator, which writes its own result files.

It knows lm-eval's evaluator, configuration and result files; `harness.lm_eval.model` answers the requests.
lm-eval is optional and is imported inside functions only.
"""

from __future__ import annotations

import importlib.util
import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import StorageError, TierbenchError, UsageError, did_you_mean, first_line, storage_errors
from harness.engines.protocol import EngineLike
from harness.environment import require_memory_for
from harness.identity import identity_of
from harness.lm_eval.kept_answers import kept_answers
from harness.progress.line import Progress
from harness.tokenizer import Text

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class LmEvalOptions:
    """What to evaluate; names and meanings are lm-eval's."""

    tasks: Sequence[str]
    settings: Mapping[str, Any]
    """Fields of lm-eval's configuration."""

    model_args: Mapping[str, str]
    """Written into the result files; lm-eval names their folder after "pretrained"."""


@dataclass(frozen=True)
class LmEvalResult:
    """Results of an evaluation, and the files that hold them."""

    results: dict[str, Any]
    """What lm-eval's evaluator returned, without the samples."""

    shown: str
    """lm-eval's own tables."""

    files: Sequence[Path]
    """Result files; empty without an output path."""


def require_lm_eval() -> None:
    """Raise UsageError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "lm-evaluation-harness is not installed, and this command needs it: run "
            "`pip install 'lm-eval>=0.4.13,<0.5'`"
        )


def key_values(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``key=value,key=value`` pairs, or a JSON object, read as lm-eval's command line reads them.

    Raises:
        UsageError: if a text is neither.
    """
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    merged: dict[str, Any] = {}
    for text in texts:
        try:
            parsed = try_parse_json(text)
            merged |= parsed if isinstance(parsed, dict) else key_val_to_dict(text)
        except ValueError as error:
            raise UsageError(f"{flag} {text!r} is not key=value pairs ({first_line(error)})") from None
    return merged


def evaluate(engine: EngineLike, text: Text, options: LmEvalOptions, progress: Progress) -> LmEvalResult:
    """Evaluate the tasks; the requests of all of them are one call to the engine per request type.

    Raises:
        UsageError: for contradictory options, unknown tasks, and requests that the model cannot take.
        StorageError: if the results cannot be written.
        TierbenchError: if lm-eval itself fails.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    require_memory_for("lm_eval")
    from lm_eval.loggers import EvaluationTracker

    config = _read_config(options, text)
    if config.output_path:
        _require_folder(Path(config.output_path))
    progress.say("loading lm-eval's tasks")
    tracker = EvaluationTracker(output_path=config.output_path)
    try:
        results = _run_tasks(engine, text, options, config, tracker, progress)
    except TierbenchError:
        raise
    except Exception as error:  # tasks are other people's data and code, and may raise anything
        raise TierbenchError(
            f"lm-eval failed ({type(error).__name__}: {first_line(error)}): --debug shows where"
        ) from error
    samples = results.pop("samples", None) if config.log_samples else None
    files = _save(tracker, results, samples)
    return LmEvalResult(results, _tables(config, results), files)


def _read_config(options: LmEvalOptions, text: Text) -> Any:
    """lm-eval's configuration, checked by lm-eval and against the tokenizer."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        given = {"model": "tierbench", "tasks": list(options.tasks), **options.settings}
        config = EvaluatorConfig.from_cli(Namespace(**given))
    except (ValueError, OSError) as error:
        raise UsageError(f"lm-eval refuses the options: {first_line(error)}") from None
    if config.apply_chat_template and not text.tokenizer.chat_template:
        raise UsageError(
            "--apply_chat_template needs a tokenizer with a chat template, which this model lacks: leave it "
            "out"
        )
    return config


_PASSED_ON = (
    "num_fewshot", "limit", "samples", "write_out", "log_samples", "system_instruction",
    "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "predict_only", "confirm_run_unsafe_code",
    "metadata",
)  # fmt: skip
"""Fields of lm-eval's configuration that are arguments of its evaluator under the same name."""


def _run_tasks(
    engine: EngineLike, text: Text, options: LmEvalOptions, config: Any, tracker: Any, progress: Progress
) -> dict[str, Any]:
    """Load the tasks and have lm-eval's evaluator ask the engine."""
    from lm_eval import simple_evaluate

    from harness.lm_eval.model import EngineLM

    seeds, record = config.seed or [None] * 4, engine.record()
    kept = config.use_cache
    if kept:
        identity = identity_of(record, record.run_policy(), seeds[2] or 0, text)
        kept = kept_answers(kept, identity, text, progress)
    manager, tasks = find_tasks(options.tasks, config.include_path, config.metadata)
    results = simple_evaluate(
        model=EngineLM(engine, text, seed=seeds[2] or 0, progress=progress),
        model_args=dict(options.model_args),
        tasks=tasks,
        use_cache=kept,
        batch_size=record.run_policy().block_size,  # sequences that share a pass come nearest to it
        device=record.hardware.device,
        evaluation_tracker=tracker,
        task_manager=manager,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        **{name: getattr(config, name) for name in _PASSED_ON},
    )
    return dict(results)


def _tables(config: Any, results: dict[str, Any]) -> str:
    """What lm-eval's command line prints: heading and tables; all results as JSON with ``--show_config``."""
    from lm_eval.utils import handle_non_serializable, make_table

    model, batch = results["config"]["model_args"], results["config"]["batch_size"]
    shown = [
        f"{config.model} ({model}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}, "
        f"num_fewshot: {config.num_fewshot}, batch_size: {batch}",
        make_table(results),
    ]
    if config.show_config:
        shown.insert(0, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    if "groups" in results:
        shown.append(make_table(results, "groups"))
    return "\n".join(shown)


def find_tasks(
    names: Sequence[str], include_path: str | None, metadata: dict[str, Any] | None = None
) -> tuple[TaskManager, list[str]]:
    """A task manager that knows all the names, and the names with patterns resolved.

    lm-eval's own 14,000 task files take half a minute to read, so they are left out if the user's folder
    holds all the tasks.

    Raises:
        UsageError: for an unknown name, with the most similar known one.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include_path {include_path} is not a folder")
    own = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
    if include_path is not None and all(name in own.all_subtasks for name in names):
        return own, list(names)
    manager = TaskManager(include_path=include_path, metadata=metadata)
    resolved: list[str] = []
    for name in names:
        if name.endswith(".yaml"):
            if not Path(name).is_file():
                raise UsageError(f"the task file {name} does not exist")
            resolved.append(str(Path(name).resolve()))
            continue
        matches = manager.match_tasks([name])
        if not matches:
            hint = did_you_mean(name, manager.all_tasks)
            raise UsageError(f"there is no task {name!r}{hint}: `lm-eval ls tasks` lists them")
        resolved += matches
    return manager, list(dict.fromkeys(resolved))


def _require_folder(path: Path) -> None:
    folder = path.parent if path.suffix == ".json" else path
    with storage_errors(folder, "make", "choose another --output_path"):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} cannot be written: choose another --output_path")


def _save(tracker: Any, results: dict[str, Any], samples: dict[str, Any] | None) -> list[Path]:
    """Have lm-eval write its files, and raise StorageError if any is missing: it swallows errors."""
    if not tracker.output_path:
        return []
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, own in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=own)
    folder = Path(tracker.output_path)
    folder = folder.parent if folder.suffix == ".json" else folder
    files = sorted(folder.rglob(f"*{tracker.date_id}*"))
    wanted = 1 + len(samples or {})
    if len(files) < wanted:
        raise StorageError(
            f"lm-eval wrote {len(files)} of {wanted} result files into {folder}: is the disk full?"
        )
    return files
