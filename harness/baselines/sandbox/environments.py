"""Environments of other systems: a virtual environment for each, from pinned versions, in a cache folder.

It knows pip and folders. A stamp file records what was installed; an environment without one is unfinished.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import TierbenchError, UsageError, storage_errors
from engine.files.documents import read_json
from engine.files.whole import write_whole
from harness.baselines.base import Baseline, size_of

VARIABLE = "TIERBENCH_BASELINES"
"""Environment variable that names another folder."""

_STAMP = "tierbench.json"


class InstallError(TierbenchError):
    """An environment could not be made."""


@dataclass(frozen=True)
class Environment:
    """The environment of one system."""

    baseline: Baseline
    folder: Path

    @property
    def own(self) -> bool:
        """Whether the system runs in our own environment."""
        return not self.baseline.requirements

    @property
    def python(self) -> Path:
        """The interpreter of its children."""
        return Path(sys.executable) if self.own else self.folder / "bin" / "python"

    @property
    def stamp(self) -> dict[str, Any] | None:
        """What was installed; None if the installation is missing or unfinished."""
        try:
            found = read_json(self.folder / _STAMP)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def state(self) -> str:
        """ready, outdated, unfinished, not installed, or ours."""
        if self.own:
            return "ours"
        if not self.folder.exists():
            return "not installed"
        stamp = self.stamp
        if stamp is None:
            return "unfinished"
        return "ready" if stamp.get("requirements") == _pins(self.baseline) else "outdated"

    @property
    def missing(self) -> str:
        """Why its children cannot be started; empty where they can."""
        if self.baseline.not_run:
            return self.baseline.not_run
        if self.state in ("ours", "ready"):
            return ""
        return f"{self.state}: run_helm.py baselines install {self.baseline.name}"

    def variables(self) -> dict[str, str]:
        """Environment variables of a child, without those of ours that choose Python packages."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "PIP_")) and key not in ("VIRTUAL_ENV", "LD_PRELOAD")
        }
        if not self.own:
            kept["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
            kept["VIRTUAL_ENV"] = str(self.folder)
        kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        return kept | self.baseline.environment(None if self.own else self.folder)


def root() -> Path:
    """The folder of all environments."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tierbench" / "baselines"


def environment_of(baseline: Baseline) -> Environment:
    """Where a system's environment is or would be."""
    return Environment(baseline, root() / baseline.name)


def install(environment: Environment, say: Callable[[str], None]) -> None:
    """Make a system's environment from scratch, unless it is ready.

    Raises:
        UsageError: if the system needs none, or cannot be installed from a package index.
        InstallError: if a step fails; the message names its log.
    """
    baseline = environment.baseline
    if environment.own and not baseline.not_run:
        raise UsageError(
            f"{baseline.name} runs in the project's own environment: there is nothing to install"
        )
    if not baseline.requirements:
        raise UsageError(f"{baseline.name} cannot be installed: {baseline.not_run}")
    if environment.state == "ready":
        say(f"{baseline.name} is already installed in {environment.folder}")
        return
    if baseline.needs:
        say(f"{baseline.name} needs {baseline.needs}")
    began = time.monotonic()
    folder = environment.folder
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.parent / f"{baseline.name}.log"
    with storage_errors(log, "write"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    # Our own pip installs into it, so the environment needs none.
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python)]
    pip += ["--disable-pip-version-check", "--no-input"]
    steps = [
        [sys.executable, "-m", "venv", "--without-pip", str(folder)],
        [*pip, "install", *baseline.requirements],
    ]
    if baseline.later_requirements:
        steps.append([*pip, "install", "--no-build-isolation", *baseline.later_requirements])
    if baseline.unwanted:
        steps.append([*pip, "uninstall", "--yes", *baseline.unwanted])
    steps += [list(step) for step in baseline.after_install(environment.python)]
    for step in steps:
        say(f"{baseline.name}: {' '.join(step)}")
        _run(step, environment.variables() | dict(baseline.build_environment), log)
    listed = subprocess.run(
        [*pip, "freeze"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment.variables(),
    )
    stamp = {
        "requirements": _pins(baseline),
        "seconds": round(time.monotonic() - began, 1),
        "bytes": size_of(folder),
        "packages": listed.stdout.split(),
    }
    write_whole(folder / _STAMP, json.dumps(stamp, indent=1))


def remove(environment: Environment) -> bool:
    """Delete an environment, or raise StorageError, and return whether there was one."""
    if environment.own or not environment.folder.exists():
        return False
    with storage_errors(environment.folder, "remove"):
        shutil.rmtree(environment.folder)
    return True


def _pins(baseline: Baseline) -> list[str]:
    return [*baseline.requirements, *baseline.later_requirements]


def _run(command: Sequence[str], env: dict[str, str], log: Path) -> None:
    # pip itself may be configured by variables, such as another index.
    env |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        try:
            code = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
        except OSError as error:
            raise InstallError(f"{command[0]} cannot be run: {error.strerror}") from error
    if code:
        last = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ][-1:]
        raise InstallError(f"`{' '.join(command)}` ended with code {code}: {''.join(last)} (log: {log})")
