"""Write the pages of the reference that are made from the code.

    python docs/generate_reference.py            # write them
    python docs/generate_reference.py --check    # exit with 1 if one is not up to date

``reference/recipe.md`` has every option of a recipe: its type, bounds, default and help text from
the dataclasses, and an example from ``EXAMPLES`` below. ``reference/command-line.md`` has the help
of every command. ``reference/metrics.md`` has the table of metrics between two comments; the rest
of that page is written by hand. The pages do not depend on what is installed.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bdkd.bounds import bounds_of, plain_type  # noqa: E402
from bdkd.cli import COMMANDS, main  # noqa: E402
from bdkd.cli.options import element_bounds  # noqa: E402
from bdkd.config import options as sections  # noqa: E402
from bdkd.metrics import METRICS  # noqa: E402
from bdkd.registry import SELECTIONS, Selection  # noqa: E402

PAGES = Path(__file__).parent / "reference"
GENERATED = "<!-- python docs/generate_reference.py writes this page. Do not edit it. -->"
SECTIONS = {  # in the order of the page
    "networks.NAME": sections.NetworkConfig,
    "schedule": sections.ScheduleConfig,
    "train": sections.TrainConfig,
    "checkpoint": sections.CheckpointConfig,
    "distributed": sections.DistributedConfig,
}

# --- examples -------------------------------------------------------------------------------------

EXAMPLES: dict[str, Any] = {
    "name": "my-recipe", "run_dir": "runs/mine", "seed": 1, "device": "cuda:0", "threads": 4,
    "max_steps": 1000, "evaluate_every": 2, "watch_test": True, "log_every": 50,
    "log": ("tensorboard", "wandb"), "plugins": ("my_plugin",),
    "networks.NAME.model": "resnet8", "networks.NAME.role": "teacher",
    "networks.NAME.weights": "runs/alone", "networks.NAME.weights_key": "student",
    "networks.NAME.reset_head": True, "networks.NAME.frozen": True,
    "networks.NAME.learning_rate": 0.01, "networks.NAME.shard": True,
    "networks.NAME.options": {"width": 0.5},
    "schedule.name": "step", "schedule.unit": "steps", "schedule.warmup": 5.0,
    "schedule.milestones": (150.0, 180.0, 210.0), "schedule.factor": 0.2, "schedule.final": 0.01,
    "train.epochs": 240, "train.batch_size": 64, "train.accumulate": 2, "train.precision": "bf16",
    "train.channels_last": False, "train.compile": True, "train.cuda_graph": True,
    "train.overlap": True, "train.tf32": False, "train.deterministic": True,
    "train.clip_norm": 5.0, "train.ema_decay": 0.999, "train.max_skipped": 5,
    "train.select": "last",
    "checkpoint.every_steps": 100, "checkpoint.every_minutes": 10.0, "checkpoint.keep": 3,
    "distributed.timeout": 120.0, "distributed.grace": 15.0, "distributed.compress": "bf16",
    "distributed.sync_batch_norm": True,
    "data.source": "cifar100", "data.root": "data", "data.image_size": 64, "data.validation": 0.02,
    "data.crop": 4, "data.crop_padding": "reflect", "data.flip": True, "data.cutout": 8,
    "data.train_images": 5000, "data.label_noise": 0.2, "data.pixel_noise": 0.1,
    "data.images": 50000, "data.classes": 100, "data.format": "webdataset",
    "data.loader": "dali", "data.workers": 8, "data.smallest_crop": 0.35,
    "data.progressive": (0.0, 128.0), "data.rand_augment": (2, 9), "data.erasing": 0.25,
    "data.mixup": 0.2, "data.cutmix": 1.0, "data.exclude": "bad-files.txt",
    "data.test_share": 0.1, "data.use_val_split": False, "data.image_column": "picture",
    "data.label_column": "breed", "data.characters": 500, "data.manifest": "latin.toml",
    "objective.name": "bdkd", "objective.temperature": 4.0, "objective.gamma": 3.0,
    "objective.student_ce": 0.5, "objective.student_kd": 2.0, "objective.teacher_ce": 0.5,
    "objective.teacher_kd": 0.5, "objective.teacher_divergence": "forward",
    "objective.student_divergence": "reverse", "objective.weighting": "swapped",
    "objective.soften_entropy": False, "objective.label_smoothing": 0.1,
    "objective.backend": "reference", "objective.ensemble": "naive", "objective.target_kd": 2.0,
    "objective.other_kd": 4.0, "objective.warmup": 2.5,
    "optimizer.name": "adamw", "optimizer.learning_rate": 0.05, "optimizer.weight_decay": 1e-4,
    "optimizer.decay_norms": True, "optimizer.momentum": 0.95, "optimizer.nesterov": False,
    "optimizer.betas": (0.9, 0.95),
}  # fmt: skip


# --- the code -------------------------------------------------------------------------------------


@functools.cache
def documentation(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, also of those of its base classes."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        name = ""
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
                found[name] = " ".join(str(node.value.value).split())
            else:
                name = ""
    return found


def type_text(hint: Any) -> str:
    """Return the type of an option and its bounds."""
    plain, bounds = plain_type(hint), bounds_of(hint) or element_bounds(hint)
    if get_origin(plain) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(plain))
    if get_origin(plain) is tuple:
        kinds = [plain_type(kind) for kind in get_args(plain) if kind is not Ellipsis]
        if get_origin(kinds[0]) is Literal:
            text = "list of " + ", ".join(f"`{choice}`" for choice in get_args(kinds[0]))
        else:
            names = {int: "integers", float: "numbers", str: "strings"}
            count = "" if Ellipsis in get_args(plain) else f"{len(kinds)} "
            text = f"list of {count}{names.get(kinds[0], 'numbers')}"
    elif get_origin(plain) is dict:
        text = "table"
    else:
        names = {bool: "boolean", int: "integer", float: "number", str: "string"}
        text = names.get(plain, "number or list of numbers")
    return f"{text}, {bounds}" if bounds else text


def toml(value: Any) -> str:
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return repr(value)


def cell(text: str) -> str:
    """Return text as a cell of a Markdown table: names of options and files are code."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![\w`/])((?:\w+\.)+[a-z]\w*|\w+(?:_\w+)+)(?![\w`(])", r"`\1`", text)


def option_row(section: str, field: dataclasses.Field, hint: Any, text: str) -> list[str]:
    key = f"{section}.{field.name}" if section else field.name
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    shown = f"`{toml(default)}`" if default not in (None, dataclasses.MISSING) else ""
    if default is dataclasses.MISSING:
        shown = "required"
    example = f"`{field.name} = {toml(EXAMPLES[key])}`"
    return [f"`{field.name}`", type_text(hint), shown or "none", example, cell(text)]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEAD = ["key", "type and values", "default", "example", "meaning"]


def section_table(section: str, kind: type, skip: tuple[str, ...] = ()) -> str:
    hints, texts = get_type_hints(kind, include_extras=True), documentation(kind)
    fields = [field for field in dataclasses.fields(kind) if field.name not in skip]
    return table(HEAD, [option_row(section, f, hints[f.name], texts[f.name]) for f in fields])


def selection_table(selection: Selection) -> str:
    """Return the options of all objectives, sources or optimizers, and which of them has each."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, entry in selection.items():
        if selection.is_foreign(name):
            continue
        hints, texts = get_type_hints(entry.config, include_extras=True), {}
        texts = documentation(entry.config)
        for field in dataclasses.fields(entry.config):
            row = option_row(selection.section, field, hints[field.name], texts[field.name])
            rows.setdefault(tuple(row), []).append(name)
    ours = [name for name in selection if not selection.is_foreign(name)]
    order = {key: place for place, key in enumerate(dict.fromkeys(row[0] for row in rows))}
    lines = [
        [row[0], "all" if names == ours else ", ".join(names), *row[1:]]
        for row, names in sorted(rows.items(), key=lambda item: order[item[0][0]])
    ]
    return table([HEAD[0], f"{selection.kind}s", *HEAD[1:]], lines)


# --- the pages ------------------------------------------------------------------------------------


def first_sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def recipe_page() -> str:
    top = tuple(f.name for f in dataclasses.fields(sections.Recipe) if f.name in _SECTION_FIELDS)
    parts = [
        GENERATED,
        "# Options of a recipe",
        (
            "A recipe is a TOML file that describes a run completely. This page lists every "
            "option. `bdkd recipes NAME` prints a shipped recipe. `bdkd train RECIPE --help-all` "
            "lists the options of one recipe with their values."
        ),
        (
            "Every key is also an option of `bdkd train`, `bdkd benchmark`, `bdkd compare` and "
            "`bdkd tune`. A dot separates section and key, and hyphens may replace underscores: "
            "`batch_size` under `[train]` is `--train.batch-size 64`. To set a boolean, write its "
            "name. To unset it, write `no-` before the last part: `--train.compile`, "
            "`--train.no-compile`. The values of a list follow each other: "
            "`--schedule.milestones 150 180 210`. `None` unsets an option that has no default."
        ),
        (
            "An option that is unknown, has the wrong type or is out of its bounds is an error. "
            "Its message is one line that names the option, the value and what is allowed."
        ),
        "## Top level",
        section_table("", sections.Recipe, skip=top),
        "## Networks: `[networks.NAME]`",
        (
            "A recipe has one section for each network. `NAME` is its name in metrics, files and "
            "on the command line: `--networks.student.model resnet20`."
        ),
        section_table("networks.NAME", SECTIONS["networks.NAME"]),
    ]
    for selection in SELECTIONS:
        base = {"data": sections.DataConfig, "objective": sections.ObjectiveConfig,
                "optimizer": sections.OptimizerConfig}[selection.section]  # fmt: skip
        parts += [
            f"## {selection.kind.capitalize()}: `[{selection.section}]`",
            (
                f"{first_sentence(base)} `{selection.key}` selects one. Each {selection.kind} has "
                "its own options, which the second column shows."
            ),
            selection_table(selection),
        ]
    for section, kind in SECTIONS.items():
        if section != "networks.NAME":
            title = {"schedule": "Schedule", "train": "Training", "checkpoint": "Checkpoints",
                     "distributed": "Several ranks"}[section]  # fmt: skip
            parts += [f"## {title}: `[{section}]`", first_sentence(kind)]
            parts.append(section_table(section, kind))
    parts += [_EXAMPLE, "Next: [](command-line.md), [](objectives.md), [](data-sources.md)."]
    return "\n\n".join(parts) + "\n"


_SECTION_FIELDS = ("networks", "data", "objective", "optimizer", *SECTIONS)
_EXAMPLE = """## A complete example

```toml
# example.toml
name = "example"
seed = 1

[data]
source = "digits"
validation = 0.15
crop = 1

[networks.teacher]
model = "wrn_16_2"
role = "teacher"

[networks.student]
model = "resnet8"
role = "student"

[objective]
name = "bdkd"
temperature = 2.0
gamma = 3.0

[optimizer]
name = "sgd"
learning_rate = 0.1

[schedule]
name = "cosine"
warmup = 1.0

[train]
epochs = 20
batch_size = 64
ema_decay = 0.99

[checkpoint]
every_minutes = 10.0
```

```sh
bdkd train example.toml --run-dir runs/example
```"""


def help_of(*command: str) -> str:
    """Return what ``bdkd COMMAND --help`` prints on a terminal of 80 columns without colours."""
    old = dict(os.environ)
    os.environ.update({"COLUMNS": "80", "NO_COLOR": "1", "PYTHON_TYRO_ANSI_CODES": "False"})
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.clear()
        os.environ.update(old)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    footer = "Every command has the options --plugin MODULE and --debug; see bdkd --help."
    return "\n".join(line for line in lines if line != footer).strip("\n")


def command_line_page() -> str:
    parts = [
        GENERATED,
        "# Command line",
        (
            "`bdkd COMMAND --help` prints the options of a command. This page shows the help of "
            "every command. Commands with a recipe also have every [option of a recipe](recipe.md)."
        ),
        "```text\n" + help_of() + "\n```",
        "## Exit codes",
        table(
            ["code", "meaning"],
            [
                ["0", "success"],
                ["1", "the command failed: a file, the network, the disk, memory, a rank"],
                ["2", "the command line or the recipe is wrong"],
                ["130, 143, 138", "SIGINT, SIGTERM or SIGUSR1 stopped it; a training run has saved"
                 " a checkpoint"],
            ],
        ),
        (
            "Errors are one line on standard error. `--debug` prints the traceback too. "
            "[](messages.md) explains the messages."
        ),
        "## Options of every command",
        table(
            ["option", "meaning"],
            [
                ["`--plugin MODULE`", "import a module or a `.py` file that registers objectives, "
                 "models, data sources, optimizers or metrics. Repeat it for several plugins"],
                ["`--debug`", "print the traceback of an error"],
                ["`--version`", "print the version (without a command)"],
            ],
        ),
    ]  # fmt: skip
    for command, text in COMMANDS.items():
        parts += [f"## bdkd {command}", f"{text[0].upper()}{text[1:]}."]
        names = [(command,)]
        if command == "data":
            names += [("data", action) for action in ("list", "fetch", "check")]
        parts += [f"```text\n{help_of(*name)}\n```" for name in names]
    return "\n\n".join(parts) + "\n"


def metrics_table() -> str:
    rows = []
    for metric in METRICS.values():
        if metric.of_samples is not None:
            continue
        places = [
            place
            for place, shown in (
                ("training lines", metric.trained),
                ("evaluation lines", metric.validated),
                ("`summary.json`", metric.key != "loss"),
                ("`bdkd compare`", metric.compared),
            )
            if shown
        ]
        rows.append([f"`{metric.key}`", metric.label, metric.description, ", ".join(places)])
    return table(["key", "in tables", "meaning", "appears in"], rows)


BEGIN, END = "<!-- the table of metrics, from bdkd/metrics.py -->", "<!-- end of the table -->"


def metrics_page() -> str:
    page = (PAGES / "metrics.md").read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{metrics_table()}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    return {
        PAGES / "recipe.md": recipe_page(),
        PAGES / "command-line.md": command_line_page(),
        PAGES / "metrics.md": metrics_page(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if path.read_text("utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(pages()[path], "utf-8")
        print(f"{path.relative_to(ROOT)} {'is not up to date' if check else 'written'}")
    sys.exit(bool(check and stale))
