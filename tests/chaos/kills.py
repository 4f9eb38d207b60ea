"""Processes ended at random moments: killed, or stopped by the signals of terminals and schedulers."""

from __future__ import annotations

import signal

from tests.chaos.campaign import Campaign
from tests.chaos.work import COMMANDS, finish, fresh, names, run, start

WEIGHTS = {"run": 6, "batch": 5, "packing": 4, "report": 2, "curve": 2, "compare": 1}
_TRIES = 4
SIGNALLED = ("run", "batch", "curve", "compare", "packing")


def kills(campaign: Campaign, count: int) -> None:
    """Kill a command at up to four random moments, then let it end: the files have to be the same."""
    done = number = 0
    while done < count and campaign.in_time:
        draw = campaign.random("kills", number)
        command = COMMANDS[draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
        seconds = campaign.undisturbed(command).seconds
        place = fresh(command, campaign.place("kills", number))
        ends = (
            run(command, place, after=draw.uniform(0.1, 1.0) * seconds) for _ in range(draw.randint(1, 4))
        )
        killed = sum(ended.killed for ended in ends)
        faults = campaign.same_as_undisturbed(command, place, run(command, place))
        campaign.report("kills", command.name, place, faults, cases=killed)
        done, number = done + killed, number + 1


def signals(campaign: Campaign, count: int) -> None:
    """SIGINT, SIGTERM and SIGHUP: one line, 128 + number, nothing temporary left; then the same files."""
    for number in range(count):
        if not campaign.in_time:
            return
        draw = campaign.random("signals", number)
        command = COMMANDS[draw.choice(SIGNALLED)]
        sent = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        wanted, share, faults = campaign.undisturbed(command), draw.uniform(0.25, 0.95), []
        for _ in range(_TRIES):  # sooner where the command had ended by then
            place = fresh(command, campaign.place("signals", number))
            ended = run(command, place, after=share * wanted.seconds, number=sent)
            if ended.code != 0:
                break
            share *= 0.7
        kind = f"{command.name}, {sent.name}"
        if ended.code == 0:
            kind += " (ended before the signal)"
        else:
            if ended.code != 128 + sent or "Traceback" in ended.text:
                faults.append(f"{sent.name}: ended with {ended.code}: {ended.last_line[:200]}")
            left = {
                name
                for name in names(place) - wanted.names
                if "run-" in name or "partial" in name or "tmp" in name
            }
            faults += [f"{sent.name}: left behind {sorted(left)[:3]}"] if left else []
        faults += campaign.same_as_undisturbed(command, place, run(command, place))
        campaign.report("signals", kind, place, faults)


def pairs(campaign: Campaign, count: int) -> None:
    """The same command twice at once: one may be refused in a line, the files are those of one alone."""
    for number in range(count):
        if not campaign.in_time:
            return
        draw = campaign.random("pairs", number)
        command = COMMANDS[draw.choice(("run", "batch", "packing", "curve"))]
        place = fresh(command, campaign.place("pairs", number))
        other = place.parent / f"{place.name}-other"
        other.mkdir(parents=True, exist_ok=True)
        first = start(command.arguments(place), place)
        second = start(command.arguments(place), other)
        ended = [finish(first, place), finish(second, other)]
        faults = [f"{each.code}: {each.last_line[:300]}" for each in ended if not each.clean]
        if all(each.code for each in ended):
            faults.append("neither of the two ended well")
        faults += campaign.same_as_undisturbed(command, place, run(command, place))
        campaign.report("pairs", command.name, place, faults)
