"""Every command and Python block of the documentation works, every message that it explains exists,
and it builds without warnings.

The blocks of a page run in order, in one folder and one process. Python blocks share a namespace.
``bdkd`` trains for a few steps only. Write ``<!-- not run: why -->`` before a block that cannot run
in the test; its commands are still parsed. A TOML block whose first line is ``# name.toml`` is
written to a file with this name in the page's folder. A Python block that begins with ``# name.py``
is also written to a file, and does not run by itself.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro
from test_report_browser import BROWSER, browse

from bdkd.cli import COMMANDS, benchmark_files, main, take_plugins
from bdkd.cli.compare_plan import recipe_of_method
from bdkd.cli.tune_search import parse_searches
from bdkd.config import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<body>.*?)^(?P=fence)\s*$",
    re.M | re.S,
)
SHOWN = {"", "text", "json", "html", "diff"}  # output, not code
FEW_STEPS = ["--max-steps", "3", "--log"]


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    body: str
    reason: str | None  # why the block cannot run in this test


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(text.count("\n", 0, m.start("body")) + 1, m["language"], m["body"], m["reason"])
        for m in BLOCK.finditer(text)
        if not m["language"].startswith("{")  # MyST's directives
    ]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- the runners ---------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without comments, variables, redirections and pipes."""
    found = []
    for line in block.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = list(takewhile(lambda word: word not in (">", "|"), words))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def parse_bdkd(arguments: list[str]) -> None:
    """Check that a ``bdkd`` command line is valid. A wrong option exits. Missing folders and
    Parquet files after ``--data`` are created first."""
    for option, place in pairwise(arguments):
        if option == "--data" and place.endswith((".parquet", "/")) and not Path(place).exists():
            Path(place).touch() if place.endswith(".parquet") else Path(place).mkdir(parents=True)
    command, *rest = take_plugins(arguments)
    if command in ("--version", "--help") or "--help" in rest:
        return
    assert command in COMMANDS, f"bdkd has no command {command!r}"
    module = import_module(f"bdkd.cli.{command.replace('-', '_')}")
    if command in ("train", "compare", "tune"):
        name = rest[0] if rest and not rest[0].startswith("-") else "digits"
        known = name in shipped_recipes() or Path(name).exists()
        recipe = load_recipe(name if known else "digits")
        rest = rest if rest and rest[0] == name else [name, *rest]
    if command == "train":
        module.parse(module._expand_resume(rest), recipe)
    elif command == "compare":
        default = module.Arguments(recipe=name, config=recipe)
        for method in tyro.cli(module.Arguments, args=rest, default=default).methods:
            recipe_of_method(method, recipe)
    elif command == "tune":
        default = module.Arguments(recipe=name, config=recipe)
        parse_searches(tyro.cli(module.Arguments, args=rest, default=default).methods, recipe)
    elif command == "benchmark" and module.names_file(rest):
        tyro.cli(benchmark_files.Arguments, prog="bdkd benchmark", args=rest)
    elif command == "benchmark":
        module.parse(rest)
    elif command == "data":
        action = getattr(module, rest[0].capitalize())
        tyro.cli(action, prog=f"bdkd data {rest[0]}", args=rest[1:])
    elif hasattr(module, "Arguments"):
        tyro.cli(module.Arguments, prog=f"bdkd {command}", args=rest)


def run_bdkd(arguments: list[str]) -> None:
    parse_bdkd(arguments)
    if arguments[0] in ("compare", "tune"):
        return  # it trains many networks in subprocesses, and other tests run it
    trains = arguments[0] == "train" and not {"--dry-run", "--help"}.intersection(arguments)
    code = exit_code([*arguments, *(FEW_STEPS if trains else [])])
    assert code == 0, f"bdkd {shlex.join(arguments)} exits {code}"


def exit_code(arguments: list[str]) -> object:
    try:
        main(arguments)
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in (a for a in arguments if "=" not in a):
        assert re.search(rf"^{target}:", makefile, re.M), f"make has no target {target}"


def check_pip(arguments: list[str]) -> None:
    """Check that extras in a pip command exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        if match := re.fullmatch(r"(?:bdkd|\.)\[([\w,]+)\]", argument):
            for extra in match[1].split(","):
                assert extra in project["optional-dependencies"], f"there is no extra {extra!r}"


def check_python(arguments: list[str]) -> None:
    """Run a line of Python, or check that a script or module exists and has the options."""
    if arguments[0] == "-c":
        exec(compile(arguments[1], "python -c", "exec"), {})
        return
    if arguments[0] == "-m":
        module, *rest = arguments[1:]
        {"bdkd": parse_bdkd, "pytest": check_paths}.get(module, lambda _: None)(rest)
        assert module in ("bdkd", "pytest") or (ROOT / module).is_dir() or module == "venv"
        return
    script = ROOT / arguments[0]
    if not script.exists():  # a file that the page wrote
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=120)
        return
    source = (script / "__main__.py" if script.is_dir() else script).read_text()
    for option in (a for a in arguments[1:] if a.startswith("--")):
        name = option.split("=")[0].removeprefix("--")
        assert re.search(rf"{name}|{name.replace('-', '_')}", source), option


def check_paths(arguments: list[str]) -> None:
    for argument in arguments:
        if "/" in argument and not argument.startswith("-"):
            assert (ROOT / argument.split("::")[0]).exists(), f"there is no {argument}"


def check_torchrun(arguments: list[str]) -> None:
    """Parse the command with torchrun's parser, and the rest with the parser of bdkd."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "bdkd")
    parse_bdkd(parsed.training_script_args)


def check_srun(arguments: list[str]) -> None:
    if "torchrun" in arguments:
        check_torchrun(arguments[arguments.index("torchrun") + 1 :])


def nothing(_: list[str]) -> None:
    """Accept a system command without running it."""


RUNNERS = {
    "bdkd": run_bdkd, "make": check_make, "pip": check_pip, "python": check_python,
    "pytest": check_paths, "bash": check_paths, "torchrun": check_torchrun,
    "srun": check_srun, "cd": lambda arguments: change_folder(arguments),
    **dict.fromkeys(("git", "tensorboard", "export", "sbatch", "source"), nothing),
}  # fmt: skip


def write_file(body: str, folder: Path) -> bool:
    """Write a block that begins with a file name to this file. Return whether it was written."""
    name = re.match(r"# ([\w/-]+\.(?:toml|py))\n", body)
    if name is None:
        return False
    path = folder / name[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    return True


def change_folder(arguments: list[str]) -> None:
    if Path(arguments[0]).is_dir():  # a folder that the page made
        os.chdir(arguments[0])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_runs(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "bdkd" / "recipes" / "digits.toml", tmp_path / "my-recipe.toml")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    names: dict = {"__name__": "__page__"}
    try:
        for block in blocks(page):
            where = f"{page_name(page)}:{block.line}"
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
                if not write_file(block.body, tmp_path) and block.reason is None:
                    exec(code, names)
            elif block.language == "toml":
                tomllib.loads(block.body)
                write_file(block.body, tmp_path)
            elif block.language == "sh":
                for words in commands(block):
                    known = words[0] in RUNNERS
                    assert known, f"{where}: no runner for {words[0]!r}; write one, or mark it"
                    run = RUNNERS[words[0]]
                    if block.reason is not None and run is run_bdkd:
                        run = parse_bdkd
                    run(words[1:])
            else:
                assert block.language in SHOWN, f"{where}: {block.language!r} is not tested"
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_all_code_blocks_are_fenced(page):
    """Markdown also treats indented blocks as code. These would not be tested."""
    outside = BLOCK.sub("", page.read_text("utf-8"))
    for paragraph in re.split(r"\n\s*\n", outside):
        assert not re.match(r"    \S", paragraph) or re.match(r"\s+[-*\d]", paragraph), paragraph


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_have_a_text(page):
    """Sphinx fills in the title of a page. GitHub shows nothing."""
    assert not re.search(r"(?<!!)\[\]\(", page.read_text("utf-8"))


def test_every_example_is_shown():
    page = (DOCS / "how-to" / "your-trainer.md").read_text("utf-8")
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"{literalinclude} \.\./\.\./examples/(\S+)", page)) == examples


def test_every_data_source_and_method_is_in_its_table():
    from bdkd.registry import OBJECTIVES, SOURCES

    for page, names in (("data-sources.md", SOURCES), ("objectives.md", OBJECTIVES)):
        text = (DOCS / "reference" / page).read_text("utf-8")
        rows = " ".join(re.findall(r"^\|([^|]*)\|", text, re.M))
        missing = [name for name in names if f"`{name}`" not in rows]
        assert not missing, f"docs/reference/{page} does not tell of {missing}"


# --- messages ------------------------------------------------------------------------------------


def messages_in_the_code() -> list[str]:
    """Return every string of the packages, with ``…`` in place of values."""
    found = []
    for folder in (ROOT / "bdkd", ROOT / "kernels" / "bdkd_kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_message_that_is_explained_exists():
    text = (DOCS / "reference" / "messages.md").read_text("utf-8")
    explained = re.findall(r"^#+ `(.+)`$", text, re.M)
    assert len(explained) >= 30
    known = messages_in_the_code()
    for message in explained:
        parts = [part for part in message.split("…") if part.strip()]
        found = any(all(part in one for part in parts) for one in known)
        assert found, f"no code says {message!r}"


# --- the build -----------------------------------------------------------------------------------


def test_the_documentation_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E",
               "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 10
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)\"|"
                        r"<link[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"([^\"]+)\"|"
                        r"@import|url\((?!data:|['\"]?data:)([^)]+)\)")  # fmt: skip
    for page in pages:
        for match in loaded.finditer(page.read_text("utf-8")):
            address = next(filter(None, match.groups()), "@import")
            assert "//" not in address, (page.name, address)
    for style in (tmp_path / "html" / "_static").rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text("utf-8")), style
    mathematics = (tmp_path / "html" / "explanation" / "mathematics.html").read_text("utf-8")
    assert mathematics.count("<math") > 10
    if BROWSER is not None:
        check_in_a_browser(tmp_path / "html", tmp_path)


PHONE = """<!doctype html><body><script>
for (const page of PAGES) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width: 390, height: 800, src: page});
  frame.onload = () => {
    const line = document.createElement("p"), page = frame.contentDocument;
    const color = getComputedStyle(page.body).backgroundColor;
    line.textContent = `${page.documentElement.scrollWidth} ${color}`;
    document.body.append(line);
  };
  document.body.append(frame);
}
</script></body>"""


def check_in_a_browser(html: Path, folder: Path) -> None:
    """Search, and open pages on a phone's width in light and dark mode, without a network."""
    local = ("--virtual-time-budget=15000", "--allow-file-access-from-files", "--dump-dom")
    dom, asked = browse(html / "search.html", folder, *local, query="q=temperature")
    assert asked == []
    assert int(re.search(r"found (\d+) pages? matching", dom)[1]) > 10
    assert "temperature" in re.search(r'<a href="[^"]*" data-score="\d+">.*?</a>', dom)[0]
    pages = ["index.html", "reference/recipe.html", "evidence.html", "explanation/mathematics.html"]
    phone = html / "phone.html"
    phone.write_text(PHONE.replace("PAGES", json.dumps(pages)))
    for setting, dark in ((1, False), (0, True)):
        theme = f"--blink-settings=preferredColorScheme={setting}"
        dom, asked = browse(phone, folder, theme, *local)
        assert asked == []
        found = re.findall(r"<p>(\d+) rgb\((\d+),", dom)
        assert len(found) == len(pages)
        for width, red in found:
            assert int(width) <= 390  # nothing but tables and code scrolls sideways
            assert (int(red) < 60) == dark
