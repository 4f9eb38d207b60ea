"""Run entries (``name:key=value,...`` or HELM's .conf files) to HELM's run specs.

It knows HELM's registry of run spec functions; it does not know requests or answers. Whatever HELM
raises for a wrong entry becomes one line that names the entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import TierbenchError, UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    from helm.benchmark.presentation.run_entry import RunEntry
    from helm.benchmark.run_spec import RunSpec

OWN_PLUGIN = "scenarios.plugin"
"""Our own scenarios, registered in every run."""

_MODEL_ARGUMENTS = ("model", "model_deployment")


@dataclass(frozen=True)
class SuiteRun:
    """One HELM run of the suite under one policy."""

    entry: str
    """The run entry as it was typed; where it names a model or stands for several runs, this run's name
    without the model. The same for every policy."""

    spec: RunSpec


def import_plugins(plugins: Sequence[str]) -> None:
    """Import our scenarios, installed HELM plugins and those named by the user, as helm-run does.

    Raises:
        UsageError: if a plugin cannot be imported.
    """
    from helm.benchmark.run import import_user_plugins, load_entry_point_plugins

    load_entry_point_plugins()
    for plugin in (OWN_PLUGIN, *plugins):
        try:
            import_user_plugins([plugin])
        except TierbenchError:
            raise
        except Exception as error:  # whatever the plugin's own code raises
            raise UsageError(f"plugin {plugin} cannot be imported: {first_line(error)}") from error


def read_entries(run_entries: Sequence[str], conf_paths: Sequence[str]) -> list[RunEntry]:
    """Collect the run entries of the command line and of .conf files, in this order: files first.

    Raises:
        UsageError: if a file is missing or malformed, or nothing is left.
    """
    from helm.benchmark.presentation.run_entry import RunEntry, read_run_entries

    entries: list[RunEntry] = []
    for path in conf_paths:
        try:
            entries += read_run_entries([path]).entries
        except FileNotFoundError:
            raise UsageError(f"there is no run entries file {path}") from None
        except Exception as error:  # the HOCON parser and dacite have many exception types
            raise UsageError(
                f"{path} is not a run entries file ({first_line(error)}): "
                'write entries: [{description: "name:key=value", priority: 1}]'
            ) from error
    entries += [RunEntry(description=description, priority=1) for description in run_entries]
    if not entries:
        raise UsageError("there are no run entries: give some with --run-entries or --conf-paths")
    return entries


def make_runs(
    entries: Sequence[RunEntry],
    deployment: str,
    max_eval_instances: int | None,
    num_train_trials: int | None,
) -> list[SuiteRun]:
    """Build the run specs of all entries for one deployment; equal ones only once.

    An entry's own ``model=`` is replaced: a suite evaluates the model that the command names.

    Raises:
        UsageError: for an unknown or malformed entry or arguments that its function does not take.
    """
    runs: dict[str, SuiteRun] = {}
    for entry in entries:
        specs = _make_specs(entry, deployment, max_eval_instances, num_train_trials)
        for spec in specs:
            alone = len(specs) == 1 and not re.search(r"[:,]model(_deployment)?=", entry.description)
            label = entry.description if alone else _without_model(spec.name, deployment)
            runs.setdefault(spec.name, SuiteRun(label, spec))
    return list(runs.values())


def _make_specs(
    entry: RunEntry, deployment: str, max_eval_instances: int | None, num_train_trials: int | None
) -> list[RunSpec]:
    from dataclasses import replace

    from helm.benchmark.run import run_entries_to_run_specs
    from helm.benchmark.run_spec import get_run_spec_function
    from helm.common.object_spec import parse_object_spec

    text = entry.description
    try:
        name, arguments = (parsed := parse_object_spec(text)).class_name, parsed.args
    except ValueError as error:
        raise UsageError(f"run entry {text!r} is malformed ({error}): write name:key=value,...") from None
    if get_run_spec_function(name) is None:
        raise UsageError(f"run entry {text!r}: there is no scenario called {name!r}{_nearest(name)}")
    written = dict(part.split("=", 1) for part in text.partition(":")[2].split(",") if part)
    kept = [f"{key}={written[key]}" for key in arguments if key not in _MODEL_ARGUMENTS]  # 1.10 stays that
    described = f"{name}:{','.join([*kept, f'model={deployment}'])}"
    try:
        return list(
            run_entries_to_run_specs(
                [replace(entry, description=described)], max_eval_instances, num_train_trials
            )
        )
    except TierbenchError:
        raise
    except TypeError as error:  # wrong or missing arguments of the run spec function
        raise UsageError(f"run entry {text!r} does not fit its scenario: {_plain(error)}") from error
    except Exception as error:  # run spec functions check their arguments in many ways, some download
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"run entry {text!r} cannot be built: {reason}") from error


def _plain(error: TypeError) -> str:
    """A wrong call's message without the function's name, which the user did not write."""
    return re.sub(r"^\S+\(\) ", "", first_line(error)).replace("keyword argument", "key")


def _nearest(name: str) -> str:
    from helm.benchmark import run_spec

    known = list(getattr(run_spec, "_REGISTERED_RUN_SPEC_FUNCTIONS", ()))
    return did_you_mean(name, known) or f": {len(known)} others are known"


def _without_model(run_name: str, deployment: str) -> str:
    """A run's name without the model that HELM wrote into it."""
    written = "model=" + deployment.replace("/", "_")
    head, _, tail = run_name.partition(written)
    return (head.rstrip(",") + tail).replace(":,", ":").removesuffix(":")
