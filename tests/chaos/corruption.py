"""Files damaged behind a finished command's back: the next command mends what it can and names the rest."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.chaos.campaign import Campaign
from tests.chaos.work import COMMANDS, MODEL, RUN, Command, run

# Kinds of files: the command that wrote them, and where.
KINDS: dict[str, tuple[str, str]] = {
    "journal": ("run", "out/runs/s/policies/*/journal.jsonl"),
    "manifest": ("run", "out/runs/s/policies/*/manifest.json"),
    "trace": ("run", "out/runs/s/policies/*/trace.json"),
    "HELM's run_spec": ("run", "out/runs/s/*/run_spec.json"),
    "HELM's scenario": ("run", "out/runs/s/*/scenario.json"),
    "HELM's scenario_state": ("run", "out/runs/s/*/scenario_state.json"),
    "HELM's stats": ("run", "out/runs/s/*/stats.json"),
    "HELM's per_instance_stats": ("run", "out/runs/s/*/per_instance_stats.json"),
    "table": ("run", "out/runs/s/table.*"),
    "report": ("report", "out/reports/s/*"),
    "batch answers": ("batch", "answers.jsonl"),
    "curve's points": ("curve", "out/curves/c/points/*.json"),
    "curve's table": ("curve", "out/curves/c/curve.*"),
    "curve's journal": ("curve", "out/curves/c/helm/runs/*/policies/*/journal.jsonl"),
    "comparison's journal": ("compare", "out/comparisons/c/journal.jsonl"),
    "comparison's table": ("compare", "out/comparisons/c/comparison.*"),
    "store's index": ("packing", "store/*/index.json"),
    "store's weights (--verify)": ("packing", "store/*/weights.bin"),
    "HELM's configuration": ("run", "prod/*.yaml"),
    "model": ("own model", "model/*"),
}


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _zero(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    page = min(4096, len(content) - place)
    return content[:place] + bytes(page) + content[place + page :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit": _flip,
    "a page of zeros": _zero,
    "cut short": lambda content, draw: content[: draw.randrange(len(content))],
    "emptied": lambda content, draw: b"",
    "noise": lambda content, draw: draw.randbytes(min(len(content), 5000)),
    "twice": lambda content, draw: content + content,
}

OWN_MODEL = Command(
    "own model",
    lambda folder: [*RUN.arguments(folder), "--model", str(folder / "model")],
    RUN.outcome,
    lambda folder: shutil.copytree(MODEL, folder / "model") and None,
)


def corruptions(campaign: Campaign, count: int) -> None:
    """Damage one file of finished work and give the command again."""
    for number in range(count):
        if not campaign.in_time:
            return
        draw = campaign.random("corruptions", number)
        kind = list(KINDS)[number % len(KINDS)]
        name, pattern = KINDS[kind]
        command = OWN_MODEL if name == OWN_MODEL.name else COMMANDS[name]
        place = campaign.place("corruptions", number)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(campaign.undisturbed(command).folder, place)
        path = draw.choice(
            sorted(path for path in place.glob(pattern) if path.is_file() and path.stat().st_size)
        )
        damage, before = draw.choice(list(DAMAGES)), path.read_bytes()
        after = DAMAGES[damage](before, draw)
        path.write_bytes(after)
        if name == "packing":  # finished suites read no weights
            shutil.rmtree(place / "out")
        if "--verify" in kind:
            arguments = command.arguments
            command = replace(command, arguments=lambda folder, given=arguments: [*given(folder), "--verify"])
        faults = _faults(campaign, command, path, after, place) if after != before else []
        campaign.report("corruptions", kind, place, [f"{path.name}, {damage}: {fault}" for fault in faults])


def _faults(campaign: Campaign, command: Command, path: Path, damaged: bytes, place: Path) -> list[str]:
    ended = run(command, place)
    if not ended.clean:
        return [f"ended with {ended.code}: {ended.last_line[:300]}"]
    named = path.name in ended.text or path.parent.name in ended.text
    if ended.code:
        return [] if named else [f"refused without its name: {ended.last_line[:300]}"]
    faults = campaign.same_as_undisturbed(command, place, ended)
    if path.name == "trace.json":  # times alone, which nothing can make again: it is removed
        faults = [fault for fault in faults if not fault.startswith("lacking")]
    silent = path.exists() and path.read_bytes() == damaged and not named
    return [*faults, "neither mended nor named"] if silent else faults
