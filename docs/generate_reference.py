"""Write the parts of the reference that are made from the code.

    python docs/generate_reference.py            write them
    python docs/generate_reference.py --check    exit with 1 if a page is not up to date

The parts are blocks of ``recipe.md``, ``command-line.md`` and ``metrics.md`` between
``<!-- generated: NAME -->`` and ``<!-- end -->``. The rest of these pages is written by hand. The
blocks do not depend on the machine: plugins, optional packages and devices are left out.
``tests/test_reference_pages.py`` fails if a page is not up to date, or lacks an option, a command
or a metric.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from bdkd_kernels.options import TABLE

from bdkd.bounds import bounds_of
from bdkd.cli import COMMANDS
from bdkd.cli.completion import argument_classes
from bdkd.cli.flags import Flag, fields_of, is_positional, positionals_of
from bdkd.cli.help import Help
from bdkd.cli.options import element_bounds
from bdkd.cli.recipes import describe
from bdkd.cli.shortcuts import SHORTCUTS
from bdkd.config import (
    CheckpointConfig,
    DistributedConfig,
    NetworkConfig,
    Recipe,
    ScheduleConfig,
    TrainConfig,
    load_recipe,
    shipped_recipes,
    to_toml,
)
from bdkd.metrics import METRICS, SCALED
from bdkd.models import create_model, list_models
from bdkd.models.registry import MODELS, describe_options, image_size_of
from bdkd.registry import OBJECTIVES, OPTIMIZERS, SOURCES, Selection

FOLDER = Path(__file__).parent / "reference"
BLOCK = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NONE = "–"
WIDTH = 120

# An example of each option of a recipe whose type is not true, false or a choice. The keys are
# those of the sections. ``networks.NAME.weights`` has the key ``weights``.
EXAMPLES: dict[str, Any] = {
    # The recipe itself
    "name": "my-recipe", "run_dir": "runs/first", "seed": 1, "device": "cuda:0", "threads": 4,
    "max_steps": 1000, "evaluate_every": 5, "log_every": 50, "log": ["tensorboard", "wandb"],
    "plugins": ["my_plugin"],
    # [data]
    "root": "data", "image_size": 224, "validation": 0.02, "train_images": 5000,
    "label_noise": 0.2, "exclude": "bad-files.txt", "workers": 8, "smallest_crop": 0.35,
    "progressive": [[0, 128], [60, 224]], "rand_augment": [2, 9], "erasing": 0.25, "mixup": 0.2,
    "cutmix": 1.0, "test_share": 0.1, "image_column": "photo", "label_column": "breed",
    "pixel_noise": 0.1, "crop": 4, "cutout": 8, "manifest": "letters.toml", "characters": 500,
    "images": 50_000, "classes": 100,
    # [networks.NAME]
    "model": "resnet20", "weights": "runs/teacher", "weights_key": "state_dict",
    "learning_rate": 0.05, "options": {"width": 0.5},
    # [objective]
    "temperature": 3.0, "student_ce": 0.5, "student_kd": 2.0, "teacher_ce": 0.5,
    "teacher_kd": 0.0, "label_smoothing": 0.1, "gamma": 3.0, "target_kd": 2.0, "other_kd": 2.0,
    # [optimizer]
    "weight_decay": 1e-4, "momentum": 0.95, "betas": [0.9, 0.99],
    # [schedule]; objective.warmup has the same unit
    "warmup": 5.0, "milestones": [150.0, 180.0, 210.0], "factor": 0.2, "final": 0.01,
    # [train]
    "epochs": 240, "batch_size": 64, "accumulate": 2, "clip_norm": 5.0, "ema_decay": 0.999,
    "max_skipped": 50,
    # [checkpoint] and [distributed]
    "every_steps": 1000, "every_minutes": 10.0, "keep": 5, "timeout": 1200.0, "grace": 60.0,
}  # fmt: skip

SECTIONS = {
    "schedule": ScheduleConfig, "train": TrainConfig, "checkpoint": CheckpointConfig,
    "distributed": DistributedConfig,
}  # fmt: skip
OPTION_HEADER = ["key", "type and bounds", "default", "meaning", "example"]


# --- Markdown ------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


COMMAND = re.compile(
    rf"eval \"[^\"]+\"|\bbdkd ({'|'.join(COMMANDS)})\b"
    r"( (list|fetch|check)\b|( \w+)? > [\w./~-]*\w)?"
)
# A word that is code: an option, a section, a suffix, a dotted key, a path or a pattern.
CODE = re.compile(
    r"--[a-z].*|\[[a-z]+\]|\.[a-z]\w+|[a-z]\w*\.\w.*|.*[_*=<~$].*|(?:[a-z]+:[A-Z*]|timm:|torchvision:|hf:).+"
    r"|[\w.]+/([\w.]*[A-Z.].*)?|[A-Z]+/.*"
)
NOT_CODE = {"=", ">", "<", "e.g", "i.e"}


def prose(text: str) -> str:
    """Return a help text, which is plain text, as Markdown in one line."""
    text = COMMAND.sub(lambda match: match[0].replace(" ", "\0"), text)
    text = " ".join(map(_word, text.split())).replace("\0", " ").replace("|", "\\|")
    return text.replace("` `", " ")  # a command and its options


def _word(word: str) -> str:
    """Return a word of a help text as Markdown, without the punctuation around it as code."""
    bare = word.lstrip("(").rstrip(".,;:").removesuffix("'s")
    if bare.count(")") > bare.count("("):
        bare = bare.removesuffix(")").rstrip(".,;:")
    if "\0" in bare or (CODE.fullmatch(bare) and bare not in NOT_CODE):
        before, _, after = word.partition(bare)
        return f"{before}`{bare}`{after}"
    return word


def paragraph(text: str) -> str:
    return textwrap.fill(prose(text), WIDTH, break_long_words=False, break_on_hyphens=False)


def toml_value(value: Any) -> str:
    """Return a value as it is written in TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return str(value)


# --- recipe.md -----------------------------------------------------------------------------------


def example_of(key: str, flag: Flag) -> Any:
    """Return an example of an option that differs from its default, if its type allows it."""
    if flag.takes_no_value:
        return not flag.default
    return next((choice for choice in flag.choices if choice != flag.default), EXAMPLES.get(key))


def type_of(section: str, key: str, flag: Flag) -> str:
    """Return the type and the bounds of an option, as error messages name them."""
    of_loss = next((option.bounds for option in TABLE if option.name == key), None)
    if section == "objective" and bounds_of(flag.hint) is None and of_loss is not None:
        return re.sub("^a number in", "number, in", of_loss.needed)
    needed = flag.needed().replace("'", "`").removeprefix("an ").removeprefix("a ")
    each = element_bounds(flag.hint)
    if flag.takes_several and each is not None:
        needed += f", each {each}"
    needed = needed.replace("1000000000.0", "1e9").replace("10000.0", "10000")
    return needed if typing.get_origin(flag.hint) is not dict else "table of names and values"


def option_rows(section: str, options: Mapping[str, Flag]) -> list[list[str]]:
    rows = []
    for key, flag in options.items():
        default = "required" if flag.default is dataclasses.MISSING else NONE
        if flag.default is not dataclasses.MISSING and flag.default is not None:
            default = f"`{toml_value(flag.default)}`"
        example = f"`{key} = {toml_value(example_of(key, flag))}`"
        rows.append([f"`{key}`", type_of(section, key, flag), default, prose(flag.help), example])
    return rows


def option_table(section: str, options: Mapping[str, Flag]) -> str:
    return table(OPTION_HEADER, option_rows(section, options))


def built_in(selection: Selection) -> list[str]:
    """Return the names of a selection in alphabetical order, without those of plugins."""
    return sorted(name for name in selection if not selection.is_foreign(name))


def selected_section(selection: Selection) -> str:
    """Return the tables of a section whose options depend on a name in it."""
    section, names = selection.section, built_in(selection)
    options = {name: fields_of(selection[name].config) for name in names}
    first, *others = options.values()
    shared = {
        key: flag
        for key, flag in first.items()
        if key != selection.key and all(other.get(key) == flag for other in others)
    }
    default = getattr(fields_of(Recipe)[section].default, selection.key)
    choice = [
        f"`{selection.key}`", "one of " + ", ".join(f"`{name}`" for name in names),
        f"`{toml_value(default)}`", prose(first[selection.key].help),
        f"`{selection.key} = {toml_value(names[-1])}`",
    ]  # fmt: skip
    parts = [
        f"### All {selection.kind}s", table(OPTION_HEADER, [choice, *option_rows(section, shared)]),
    ]  # fmt: skip
    groups: dict[str, list[str]] = {}
    for name in names:
        own = {
            key: flag
            for key, flag in options[name].items()
            if key != selection.key and key not in shared
        }
        text = option_table(section, own) if own else "No further options."
        groups.setdefault(text, []).append(name)
    for text, members in groups.items():
        titles = ", ".join(f"`{name}`" for name in members)
        kind = selection.kind.capitalize() + "s" * (len(members) > 1)
        parts += [f"### {kind} {titles}", text]
    return "\n\n".join(parts)


def top_level() -> dict[str, Flag]:
    """Return the keys of a recipe that are in no section."""
    return {
        key: flag
        for key, flag in fields_of(Recipe).items()
        if not dataclasses.is_dataclass(flag.default) and key != "networks"
    }


def sections() -> str:
    """Return the sections without a choice, after those of networks and objectives."""
    parts = []
    for section, kind in SECTIONS.items():
        what = paragraph(inspect.getdoc(kind) or "")
        parts += [f"## `[{section}]`", what, option_table(section, fields_of(kind))]
    return "\n\n".join(parts)


def complete_recipe() -> str:
    return f"```toml\n# complete.toml\n{to_toml(load_recipe('digits'))}```"


def recipe_table() -> str:
    rows = []
    for name in shipped_recipes():
        recipe = describe(name)
        pair = " → ".join(
            ", ".join(f"`{model}`" for model in models.values())
            for models in (recipe.teachers, recipe.students)
            if models
        )
        rows.append([f"`{name}`", f"`{recipe.data}`", pair, f"`{recipe.objective}`",
                     str(recipe.epochs), prose(recipe.description)])  # fmt: skip
    header = ["recipe", "data", "teacher → student", "objective", "epochs", "description"]
    return table(header, rows)


def model_table() -> str:
    rows = []
    for name in list_models():
        if MODELS.is_foreign(name):
            continue
        size = image_size_of(name, {})
        classes = 1000 if size else 100
        with torch.device("meta"):
            network = create_model(name, classes)
        count = sum(parameter.numel() for parameter in network.parameters())
        options = "; ".join(f"`{key}`: {text}" for key, text in describe_options(name).items())
        options = options.replace("'", "`").replace("default: False", "default: false") or NONE
        rows.append([f"`{name}`", f"{count:,}", str(size or "any"), str(classes), options])
    header = ["model", "parameters", "image size", "classes", "options"]
    return table(header, rows)


# --- command-line.md -----------------------------------------------------------------------------


SHORT_OPTIONS = """\
Short options set keys of the recipe. Every key is also an option, such as
`--train.precision bf16`: see [Recipe options](recipe.md)."""


def list_of_commands() -> str:
    rows = [
        [f"[`bdkd {name}`](#bdkd-{name})", f"{what[0].upper()}{what[1:]}."]
        for name, what in COMMANDS.items()
    ]
    return table(["command", "what it does"], rows)


def command_section(command: str) -> list[str]:
    """Return the section of a command. Each form of it has a subsection if there are several."""
    forms = argument_classes(command)
    parts = [f"## bdkd {command}"]
    for form, kind in forms.items():
        if len(forms) > 1:
            parts.append(f"### bdkd {form}")
        parts += form_section(form, kind)
    return parts


def form_section(form: str, kind: type) -> list[str]:
    """Return usage, description, arguments and options of one form of a command."""
    help_, positionals = help_of(kind), positionals_of(kind)
    first, *rest = re.split(r"\n\s*\n", inspect.getdoc(kind) or "")
    names = " ".join(_optional(name, flag) for name, flag in positionals.items())
    words = form.removesuffix(" FILE")
    usage = help_.usage if help_ else " ".join(f"bdkd {words} {names} [options]".split())
    parts = [f"```text\n{usage}\n```", paragraph(help_.text if help_ else first)]
    parts += map(paragraph, rest)
    if positionals:
        rows = [[f"`{name}`", _with_default(flag)] for name, flag in positionals.items()]
        parts.append(table(["argument", "meaning"], rows))
    own = {
        key: flag
        for key, flag in fields_of(kind).items()
        if not is_positional(flag) and key != "config"
    }
    if own:
        header = ["option", "value", "default", "meaning"]
        parts.append(table(header, map(_option_row, own, own.values())))
    if help_ is not None:
        parts += [SHORT_OPTIONS, shortcut_table(help_)]
        if omitted := [f"`{name}`" for name in help_.omitted if name not in SHORTCUTS]:
            parts.append(f"`bdkd {words.split()[0]}` does not accept {', '.join(omitted)}.")
    return parts


def _optional(name: str, flag: Flag) -> str:
    required = flag.default is dataclasses.MISSING or name.startswith("[")
    return name if required else f"[{name}]"


def _with_default(flag: Flag) -> str:
    unset = flag.default is dataclasses.MISSING or flag.default is None
    return prose(flag.help) + ("" if unset else f" Default: `{flag.default}`.")


def help_of(kind: type) -> Help | None:
    """Return the short help of a command that takes a recipe."""
    takes_recipe = "config" in fields_of(kind)
    return sys.modules[kind.__module__].HELP if takes_recipe else None


def shortcut_table(help_: Help) -> str:
    rows = []
    for name, shortcut in SHORTCUTS.items():
        if name not in help_.omitted:
            key = shortcut.key.format(teacher="TEACHER", student="STUDENT")
            sets = f"`--{key}`" if key else NONE
            option = f"`{name} {shortcut.metavar}`".replace(" `", "`")
            text = f"{shortcut.help[0].upper()}{shortcut.help[1:]}."
            rows.append([option, prose(text), sets])
    return table(["option", "meaning", "sets"], rows)


def _option_row(key: str, flag: Flag) -> list[str]:
    name = key.replace("_", "-")
    pairs = flag.takes_no_value and not _is_single_flag(flag.hint)
    option = f"`--{name}`" + (f", `--no-{name}`" if pairs else "")
    value = NONE if flag.takes_no_value else type_of("", key, flag)
    value = value.replace("array of ", "one or more ")
    default = NONE
    if flag.default is dataclasses.MISSING:
        default = "required"
    elif pairs:
        default = "on" if flag.default else "off"
    elif not flag.takes_no_value and flag.default not in (None, ()):
        values = flag.default if isinstance(flag.default, tuple) else (flag.default,)
        default = f"`{' '.join(map(str, values))}`"
    return [option, value, default, prose(flag.help)]


def _is_single_flag(hint: Any) -> bool:
    """Return whether a flag has no opposite ``--no-...``."""
    marks = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    return tyro.conf.FlagCreatePairsOff in marks


# --- metrics.md ----------------------------------------------------------------------------------


def metric_table() -> str:
    fitted = {*(f"{key}_scaled" for key in SCALED), "temperature"}
    rows = [
        [
            f"`{metric.key}`", metric.label, _yes(metric.trained), _yes(metric.validated),
            # Metrics at the fitted temperature are computed separately.
            _yes(metric.measured or metric.key in fitted),
            "tested" if metric.tested else _yes(metric.compared), _yes(metric.charted),
            f"`{metric.hub}`" if metric.hub else "",
        ]
        for metric in METRICS.values()
        if metric.of_samples is None
    ]  # fmt: skip
    header = ["metric", "label in tables", "training lines", "evaluation lines", "`summary.json`",
              "`bdkd compare`", "report", "model card"]  # fmt: skip
    return table(header, rows)


def _yes(value: bool) -> str:
    return "yes" if value else ""


# --- pages ---------------------------------------------------------------------------------------


BLOCKS: dict[str, Callable[[], str]] = {
    "keys before the first section": lambda: option_table("", top_level()),
    "data": lambda: selected_section(SOURCES),
    "networks": lambda: option_table("networks.NAME", fields_of(NetworkConfig)),
    "objective": lambda: selected_section(OBJECTIVES),
    "optimizer": lambda: selected_section(OPTIMIZERS),
    "other sections": sections,
    "complete recipe": complete_recipe,
    "recipes": recipe_table,
    "models": model_table,
    "list of commands": list_of_commands,
    "commands": lambda: "\n\n".join(part for name in COMMANDS for part in command_section(name)),
    "metrics": metric_table,
}


def pages() -> dict[Path, tuple[str, str]]:
    """Return the pages with generated blocks: the present text and the text that it must be."""
    found = {}
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text("utf-8")
        new = BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]]()}\n\n{block[3]}", text)
        if BLOCK.search(text):
            found[path] = text, new
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    outdated = {path: new for path, (text, new) in pages().items() if text != new}
    for path, new in outdated.items():
        print(f"{path} {'is not up to date' if check else 'was written'}")
        if not check:
            path.write_text(new, "utf-8")
    sys.exit(check and bool(outdated))


if __name__ == "__main__":
    main()
