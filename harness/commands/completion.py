"""``run_helm.py completion``: a script that completes commands and flags in a shell, made from the parser."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

PROGRAMS = ("run_helm.py", "tierbench")
"""Names under which a shell can find the program."""

_FILES = ("FILE", "FOLDER", "PATH")
"""How the placeholders of values begin that are completed as file names."""

DESCRIPTION = "Print a script that completes commands, flags, their choices and file names."

EPILOG = """\
examples:
  # bash: in this shell, or as a line of ~/.bashrc
  run_helm.py completion bash          # eval "$(tierbench completion bash)"

  # zsh: a line of ~/.zshrc after compinit
  run_helm.py completion zsh           # eval "$(tierbench completion zsh)"

  # fish: once
  run_helm.py completion fish          # tierbench completion fish > ~/.config/fish/completions/tierbench.fish
"""

_BASH = """\
# Completes {programs} in bash.
_tierbench() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command= flag= flags= values= files= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in
            {commands_pattern}) [ -n "$command" ] || command=${{COMP_WORDS[i]}} ;;
            -*) flag=${{COMP_WORDS[i]}} ;;
        esac
    done
    case $command in
        "") flags="--help" values="{commands}" ;;
{cases}
    esac
    case $word in
        -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
        *) if [ -n "$files" ]; then COMPREPLY=($(compgen -f -- "$word"))
           else COMPREPLY=($(compgen -W "$values" -- "$word")); fi ;;
    esac
}}
complete -o filenames -F _tierbench {programs}
"""

_ZSH = """\
#compdef {programs}
autoload -U +X bashcompinit && bashcompinit
{bash}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's argument."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")


def execute(args: argparse.Namespace) -> int:
    """Print the script."""
    from harness.cli import build_parser

    print(script(build_parser(), args.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of ``bash``, ``zsh`` or ``fish``.

    Args:
        parser: with all commands.
    """
    from harness.config import commands_of

    commands = commands_of(parser)
    if shell == "fish":
        return _fish(parser, commands)
    bash = _BASH.format(
        programs=" ".join(PROGRAMS),
        commands=" ".join(commands),
        commands_pattern="|".join(commands),
        cases="\n".join(_bash_case(name, command) for name, command in commands.items()),
    )
    return bash if shell == "bash" else _ZSH.format(programs=" ".join(PROGRAMS), bash=bash)


def _bash_case(name: str, command: argparse.ArgumentParser) -> str:
    flags = " ".join(option for action in _flags(command) for option in action.option_strings)
    lines = [f"        {name})", f'            flags="{flags}"', "            case $flag in"]
    # What may follow a flag: its choices, a file, anything (nothing is offered), or the next flag.
    for action in _flags(command):
        if action.nargs == 0:
            continue
        offer = f'values="{" ".join(map(str, action.choices or ()))}"'
        offer = "files=yes" if _takes_file(action) else offer
        lines.append(f"                {'|'.join(action.option_strings)}) {offer} ;;")
    words = " ".join(_words(command)) or "$flags"
    return "\n".join([*lines, f'                *) values="{words}" ;;', "            esac ;;"])


def _fish(parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser]) -> str:
    lines = [f"# Completes {' and '.join(PROGRAMS)} in fish."]
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in subparsers._get_subactions()}
    for program in PROGRAMS:
        base = f"complete -c {program}"
        lines.append(f"{base} -f")
        for name, command in commands.items():
            lines.append(f"{base} -n __fish_use_subcommand -a {name} -d {shlex.quote(helps[name])}")
            inside = f"{base} -n {shlex.quote(f'__fish_seen_subcommand_from {name}')}"
            if words := _words(command):
                lines.append(f"{inside} -a {shlex.quote(' '.join(words))}")
            lines += [f"{inside} {_fish_flag(action)}" for action in _flags(command)]
    return "\n".join(lines) + "\n"


def _fish_flag(action: argparse.Action) -> str:
    names = " ".join(f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings)
    values = ""
    if _takes_file(action):
        values = " -r -F"
    elif action.choices:
        values = f" -x -a {shlex.quote(' '.join(map(str, action.choices)))}"
    elif action.nargs != 0:
        values = " -x"
    return f"{names}{values} -d {shlex.quote((action.help or '') % vars(action))}"


def _flags(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in command._actions if a.option_strings and a.help != argparse.SUPPRESS]


def _words(command: argparse.ArgumentParser) -> list[str]:
    """Choices of the arguments that have no flag."""
    return [str(word) for a in command._actions if not a.option_strings for word in a.choices or ()]


def _takes_file(action: argparse.Action) -> bool:
    return action.nargs != 0 and (action.type is Path or str(action.metavar).startswith(_FILES))
