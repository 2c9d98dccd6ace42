"""``bdkd completion``: print a script that completes command lines of bdkd in a shell."""

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import tyro

from bdkd.cli import benchmark_files
from bdkd.cli.flags import Flag, fields_of, flags_of, parse
from bdkd.cli.shortcuts import SHORTCUTS
from bdkd.config import load_recipe, shipped_recipes
from bdkd.data.fetch import DATA_SETS
from bdkd.models import list_models
from bdkd.registry import SELECTIONS

WITH_RECIPE = ("train", "compare", "tune", "benchmark", "recipes")
EXAMPLE = "digits"  # the recipe whose options are completed

BASH = """\
_bdkd() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="%(commands)s"
  elif [ "${current:0:1}" = "-" ]; then
    case "${COMP_WORDS[1]}" in
%(flags)s
    esac
  elif [ "$COMP_CWORD" -eq 2 ]; then
    case "${COMP_WORDS[1]}" in
%(arguments)s
    esac
  else
    case "${COMP_WORDS[1]} $previous" in
%(values)s
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _bdkd bdkd
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class Arguments:
    """Print a script that completes commands, options, choices and recipes in your shell.

    In bash: bdkd completion bash > ~/.local/share/bash-completion/completions/bdkd

    In zsh, add this line to ~/.zshrc: eval "$(bdkd completion zsh)"

    In fish: bdkd completion fish > ~/.config/fish/completions/bdkd.fish"""

    shell: Annotated[
        Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")
    ]
    """bash, zsh or fish."""


def run(given: list[str]) -> None:
    """Print the script."""
    arguments = parse(Arguments, "bdkd completion", given)
    writers: dict[str, Callable[[], str]] = {
        "bash": bash_script, "zsh": lambda: ZSH + bash_script(), "fish": fish_script,
    }  # fmt: skip
    print(writers[arguments.shell](), end="")


def bash_script() -> str:
    """Return the script for bash."""
    from bdkd.cli import COMMANDS

    known = {command: command_flags(command) for command in COMMANDS}
    values = {
        f"{command} {name}": choices(name, flag)
        for command, flags in known.items()
        for name, flag in flags.items()
    }
    values["data fetch"] = list(DATA_SETS)
    return BASH % {
        "commands": " ".join([*COMMANDS, "--help", "--version"]),
        "flags": _cases(known),
        "arguments": _cases({command: first_arguments(command) for command in COMMANDS}),
        "values": _cases(values),
    }


def _cases(words: Mapping[str, Iterable[str]]) -> str:
    """Return the branches of a ``case``, without those that have no words."""
    texts = {name: " ".join(found) for name, found in words.items()}
    return "\n".join(f'      "{name}") words="{text}" ;;' for name, text in texts.items() if text)


def fish_script() -> str:
    """Return the script for fish."""
    from bdkd.cli import COMMANDS

    lines = []
    for command, what in COMMANDS.items():
        lines.append(
            f"complete -c bdkd -n __fish_use_subcommand -f -a {command} -d {shlex.quote(what)}"
        )
        seen = f"complete -c bdkd -n '__fish_seen_subcommand_from {command}'"
        if first := first_arguments(command):
            lines.append(f"{seen} -a {shlex.quote(' '.join(first))}")
        for name, flag in command_flags(command).items():
            found = choices(name, flag)
            takes = f" -x -a {shlex.quote(' '.join(found))}" if found else " -r"
            takes = "" if flag.takes_no_value else takes
            text = flag.help.split(". ")[0][:70]
            lines.append(f"{seen} -l {name.removeprefix('--')}{takes} -d {shlex.quote(text)}")
    fetch = "complete -c bdkd -n '__fish_seen_subcommand_from fetch'"
    lines.append(f"{fetch} -a {shlex.quote(' '.join(DATA_SETS))}")
    return "\n".join(lines) + "\n"


def argument_classes(command: str) -> dict[str, type]:
    """Return the dataclass of a command's arguments. Commands with several forms have several
    classes. The keys are the words that choose a form, such as ``data check``."""
    module: Any = import_module(f"bdkd.cli.{command.replace('-', '_')}")
    if command == "data":
        return {f"data {action}": getattr(module, action.capitalize()) for action in module.ACTIONS}
    if command == "benchmark":
        return {"benchmark RECIPE": module.Arguments, "benchmark FILE": benchmark_files.Arguments}
    return {command: module.Arguments}


def command_flags(command: str) -> dict[str, Flag]:
    """Return the flags of a command. Commands that take a recipe also have short flags."""
    found: dict[str, Flag] = {}
    for kind in argument_classes(command).values():
        if "config" not in fields_of(kind):
            found |= flags_of(kind)
            continue
        for name, shortcut in SHORTCUTS.items():
            found[name] = Flag(str if shortcut.metavar else bool, None, shortcut.help)
        found |= flags_of(kind(recipe=EXAMPLE, config=load_recipe(EXAMPLE)))
    return found


def first_arguments(command: str) -> list[str]:
    """Return the words that may follow a command."""
    if command in WITH_RECIPE:
        return shipped_recipes()
    if command == "data":
        from bdkd.cli.data import ACTIONS

        return list(ACTIONS)
    return ["bash", "zsh", "fish"] if command == "completion" else []


def choices(name: str, flag: Flag) -> list[str]:
    """Return the values of a flag, or an empty list if they are not known."""
    if name in ("--teacher", "--student") or name.endswith(".model"):
        return list_models()
    for selection in SELECTIONS:
        if name == f"--{selection.section}.{selection.key}":
            return list(selection)
    if name == "--objective":
        return list(SELECTIONS[1])
    return list(map(str, flag.choices))
