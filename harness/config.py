"""One YAML file instead of many flags: ``--config FILE`` and ``--print-config`` of every command.

It knows parsers of `argparse` and YAML, and no command. A file's keys are the long names of the command's
flags; its values go through the flags' own types and choices, and a flag that is given wins over the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UsageError, did_you_mean
from engine.files.documents import DocumentError, read_yaml

_OWN = ("help", "config", "print_config")
"""Destinations that are no settings of a command."""

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def add_config_options(command: argparse.ArgumentParser) -> None:
    """Add the flags to one command's parser."""
    group = command.add_argument_group("configuration")
    group.add_argument(
        "--config", type=Path, metavar="FILE.yaml",
        help="settings by the names of these flags without their dashes; flags that are given win",
    )  # fmt: skip
    group.add_argument(
        "--print-config", action="store_true", help="print what would run, as such a file, and do nothing"
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, by name."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def settings_of(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a file can set, by the first long name of each flag without its dashes."""
    shown = [a for a in command._actions if a.dest not in _OWN and a.help != argparse.SUPPRESS]
    return {option[2:]: action for action in shown for option in _long(action)[:1]}


def parse(make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, taking from its configuration file what no flag says.

    Args:
        make_parser: makes the parser with all commands; it is called anew because parsers are altered here.
        argv: the command's name and its flags.

    Raises:
        UsageError: for a wrong flag, an unreadable file, an unknown key or a value its flag would not take.
    """
    wants_help = any(flag == "-h" or (flag > "--" and "--help".startswith(flag)) for flag in argv)
    given = None if wants_help else _given(make_parser(), argv)
    final = make_parser()
    if given is None or given.config is None:
        return final.parse_args(argv)  # the help shows the true defaults
    name = argv[0]
    command = commands_of(final)[name]
    tokens = _tokens(command, given.config)
    try:
        settled = vars(_given(make_parser(), [name, *tokens])) | vars(given)
    except UsageError as error:
        raise UsageError(f"{given.config}: {error}") from None
    command.set_defaults(**settled)
    for action in command._actions:
        action.required = action.required and action.dest not in settled
    for group in command._mutually_exclusive_groups:
        group.required = group.required and not any(a.dest in settled for a in group._group_actions)
    return final.parse_args([name])


def describe(command: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """All settings of a command as YAML, which ``--config`` reads back.

    A command whose defaults depend on other settings has ``what_runs``, a function from its arguments to the
    settings by destination that replace them here.
    """
    import yaml

    values = vars(args) | (args.what_runs(args) if args.what_runs else {})
    shown = {name: _plain(values[action.dest]) for name, action in settings_of(command).items()}
    return str(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))


def unknown_flags(parser: argparse.ArgumentParser, argv: Sequence[str], rest: Sequence[str]) -> str:
    """The error for arguments that a command does not take: the nearest flags, and where all are listed."""
    named = commands_of(parser)
    command = next((named[argument] for argument in argv if argument in named), parser)
    known = [option for action in command._actions for option in _long(action)]
    shown = [
        argument + (did_you_mean(argument.partition("=")[0], known) if argument.startswith("-") else "")
        for argument in rest
    ]
    return f"unrecognized arguments: {' '.join(shown)}: see {command.prog} --help"


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Only what the arguments themselves say: no defaults, nothing required; ``config`` is always there."""
    for command in commands_of(parser).values():
        for action in command._actions:
            action.required = False
            if action.dest != "config":
                action.default = argparse.SUPPRESS
        for group in command._mutually_exclusive_groups:
            group.required = False
    return parser.parse_args(argv)


def _tokens(command: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's settings as flags."""
    known = {_normal(o[2:]): action for action in settings_of(command).values() for o in _long(action)}
    tokens: list[str] = []
    seen: dict[str, str] = {}
    for key, value in _read(path).items():
        action = known.get(_normal(key))
        if action is None:
            raise UsageError(f"{path} has the key {key!r}, which is unknown{_nearest(key, known)}")
        if action.dest in seen:
            raise UsageError(f"{path} sets {key} twice, as {seen[action.dest]} too: keep one")
        seen[action.dest] = key
        try:
            tokens += _flag(action, value)
        except ValueError as error:
            raise UsageError(f"{path}: {key} {error}") from None
    return tokens


def _flag(action: argparse.Action, value: object) -> list[str]:
    """One setting as flags; none for null, which is the default.

    Raises:
        ValueError: if the flag takes values of another shape; its text completes "<key> ...".
    """
    flag = _long(action)[0]
    if value is None:
        return []
    truth = _TRUTH.get(value.lower()) if isinstance(value, str) else None
    if action.nargs == 0:
        if truth is None:
            raise ValueError(f"is {value!r}: write true or false")
        return [flag] if truth else []
    if action.nargs == argparse.OPTIONAL and truth is not None:
        return [flag] if truth else []
    repeatable = isinstance(action, argparse._AppendAction)  # "extend" is one of them
    several = repeatable or action.nargs not in (None, argparse.OPTIONAL)
    if isinstance(value, list) and not several:
        raise ValueError(f"is a list, but takes one value: write {flag[2:]}: VALUE")
    texts = [_text(item) for item in (value if isinstance(value, list) else [value])]
    if several and not repeatable:
        return [flag, *texts] if texts else []
    return [f"{flag}={text}" for text in texts]


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"holds {repr(value)[:80]}, which is neither text nor a number")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except DocumentError as error:
        raise UsageError(f"the configuration file {path} {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(
            f"the configuration file {path} must map names of flags to values, such as suite: mine"
        )
    return content


def _long(action: argparse.Action) -> list[str]:
    return [option for option in action.option_strings if option.startswith("--")]


def _normal(name: str) -> str:
    """Hyphens and underscores are one, as users mix them up."""
    return name.replace("_", "-")


def _nearest(key: str, known: Mapping[str, argparse.Action]) -> str:
    names = sorted(_long(action)[0][2:] for action in set(known.values()))
    return did_you_mean(_normal(key), names) or f": use one of {', '.join(names)}"


def _plain(value: Any) -> Any:
    """A parsed value as YAML writes it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
