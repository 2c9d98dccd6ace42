"""``bdkd completion``: the scripts are run in the shells."""

import shutil
import subprocess

import pytest

from bdkd.cli import COMMANDS, main
from bdkd.cli.completion import command_flags

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_bdkd
printf '%s\\n' "${COMPREPLY[@]}"
"""

# (words of a command line, some completions of the last word)
LINES = [
    (["tr"], {"train"}),
    (["train", "digi"], {"digits", "digits-hard"}),
    (["train", "digits", "--train.ep"], {"--train.epochs"}),
    (["train", "digits", "--pre"], {"--pretrained"}),
    (["train", "digits", "--train.precision", "b"], {"bf16"}),
    (["train", "digits", "--teacher", "wrn_16"], {"wrn_16_2"}),
    (["train", "digits", "--objective.name", "d"], {"dml"}),
    (["compare", "digits", "--seed"], {"--seeds"}),
    (["tune", "digi"], {"digits", "digits-hard"}),
    (["tune", "digits", "--train.ep"], {"--train.epochs"}),
    (["evaluate", "runs/mine", "--split", ""], {"val", "test"}),
    (["export", "runs/mine", "--quantize", ""], {"int8"}),
    (["benchmark", "model.onnx", "--roun"], {"--rounds"}),
    (["export", "runs/mine", "--to", "o"], {"onnx"}),
    (["data", "f"], {"fetch"}),
    (["data", "fetch", "f"], {"fashion-mnist"}),
    (["train", "digits", "--data.source", "g"], {"glyphs"}),
    (["completion", "f"], {"fish"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch, open(folder / shell, "w") as file:
            patch.setattr("sys.stdout", file)
            main(["completion", shell])
    return folder


def output(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")


@pytest.mark.parametrize(("words", "expected"), LINES, ids=[" ".join(w) for w, _ in LINES])
def test_bash_completes_command_lines(words, expected, scripts):
    found = output("bash", "-c", BASH, "bash", str(scripts / "bash"), "bdkd", *words)
    assert expected <= set(found)
    assert all(word.startswith(words[-1]) for word in found if word)


def test_file_names_are_completed_where_no_word_is_known(scripts):
    assert "complete -o default -F _bdkd bdkd" in (scripts / "bash").read_text()
    words = ["train", "digits", "--run-dir", "ru"]
    assert output("bash", "-c", BASH, "bash", str(scripts / "bash"), "bdkd", *words) == ["", ""]


def test_zsh_and_fish_can_read_their_scripts(scripts):
    """zsh runs the script of bash. The commands and options in the script of fish are compared even
    if fish is not installed."""
    text = (scripts / "fish").read_text()
    assert all(f"-a {command} -d" in text for command in COMMANDS)
    assert "__fish_seen_subcommand_from fetch' -a 'cifar10 cifar100" in text
    assert "-l train.precision -x -a 'fp32 bf16 fp16'" in text
    assert (scripts / "zsh").read_text().endswith((scripts / "bash").read_text())
    if shutil.which("fish"):
        line = f"source {scripts / 'fish'}; complete -C 'bdkd train digits --train.precision b'"
        assert output("fish", "--no-config", "-c", line)[0].split()[0] == "bf16"
    if shutil.which("zsh"):
        line = (
            f"autoload -Uz compinit && compinit -D; source {scripts / 'zsh'}; print $_comps[bdkd]"
        )
        assert "_bdkd" in output("zsh", "-f", "-c", line)[0]


def test_only_options_that_a_command_accepts_are_completed():
    assert command_flags("models").keys() == {"--json"}
    assert "--config" not in command_flags("tune")
