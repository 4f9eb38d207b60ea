"""Less memory and less disk than a command needs: a refusal in a line, and success where there is enough."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.campaign import Campaign
from tests.chaos.work import COMMANDS, RUN, Command, finish, fresh, run, start
from tests.support.cgroup import MemoryGroup, memory_group

MIB = 1 << 20

_POLICIES = (
    "resident",
    "offloaded,weight_quant=4",
    "name=d,weights=disk,kv=disk,activations=disk,device_batch=4,num_device_batches=2",
)
_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def memory(campaign: Campaign, count: int) -> None:
    """Run under a memory cgroup of 0.5 to 1.0 of the need of the policy: never killed for memory."""
    needs: dict[str, int] = {}
    for number in range(count):
        if not campaign.in_time:
            return
        policy, fraction = _POLICIES[number % 3], _FRACTIONS[number // 3 % 6]
        with memory_group("tierbench-chaos") as group:
            if isinstance(group, str):
                print(f"memory: not run, {group}", file=sys.stderr)
                return
            place = campaign.place("memory", number)
            command = _of_policy(policy)
            if policy not in needs:
                needs[policy] = _need(command, place, group)
            group.limit(int(fraction * needs[policy]))
            fresh(command, place)
            ended = finish(start(command.arguments(place), place, lambda: group.join(os.getpid())), place)
            faults = (
                [f"{fraction} of {needs[policy] / MIB:.0f} MiB: killed for memory"] if group.kills else []
            )
            if not ended.clean:
                faults.append(
                    f"{fraction} of {needs[policy] / MIB:.0f} MiB: {ended.code}: {ended.last_line[:300]}"
                )
            kind = f"{policy.split(',')[0]}: {'refused' if ended.code else 'done'} at {fraction}"
            campaign.report("memory", kind, place, faults)


def full_disks(campaign: Campaign, count: int) -> None:
    """Everything on a disk of a few hundred KiB, then with room: one line first, the same files then."""
    for number in range(count):
        if not campaign.in_time:
            return
        draw = campaign.random("disks", number)
        command = COMMANDS[draw.choice(("run", "batch", "packing", "curve", "report"))]
        place = campaign.place("disks", number)
        place.mkdir(parents=True, exist_ok=True)
        size = sum(
            path.stat().st_size for path in campaign.undisturbed(command).folder.rglob("*") if path.is_file()
        )
        with _disk(place, max(8192, int(size * draw.uniform(0.02, 1.0)))) as reason:
            if reason:
                print(f"disks: not run, {reason}", file=sys.stderr)
                return
            command.prepare(place)
            first = run(command, place)
            faults = [] if first.clean else [f"full: {first.code}: {first.last_line[:300]}"]
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            faults += campaign.same_as_undisturbed(command, place, run(command, place))
        campaign.report("disks", f"{command.name}: {'refused' if first.code else 'enough'}", place, faults)


def _of_policy(policy: str) -> Command:
    def arguments(folder: Path) -> list[str]:
        given = RUN.arguments(folder)
        return [*given[: given.index("--policy")], "--policy", policy]

    return Command("run", arguments, RUN.outcome)


def _need(command: Command, place: Path, group: MemoryGroup) -> int:
    """Most bytes, page cache aside, that the command holds where nothing limits it."""
    process = start(command.arguments(fresh(command, place)), place, lambda: group.join(os.getpid()))
    peak = 0
    while process.poll() is None:
        peak = max(peak, group.held)
        time.sleep(0.02)
    return peak


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[str]:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        yield made.stderr.strip() or "no disk can be mounted"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
