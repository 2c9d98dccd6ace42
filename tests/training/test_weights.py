"""Weights of other trainers load from their wrappers, and no code in their files runs."""

import argparse
import collections
import datetime
import enum
import os
import pathlib
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import TINY_RUN, bdkd
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bdkd.cli import main
from bdkd.config import NetworkConfig
from bdkd.errors import RunError
from bdkd.models import create_model
from bdkd.runs.weights import load_weights

MODEL = "resnet8"


def network(model: str = MODEL, classes: int = 10, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(model, classes, 3)


def load(path: Path, model: str = MODEL, classes: int = 10, name: str = "teacher", **options):
    """Return a network with the weights in a file, and the message that describes them."""
    into = network(model, classes, seed=2)
    config = NetworkConfig(model, "teacher", weights=str(path), **options)
    return into, load_weights(into, name, config).text


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def assert_same(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    for key, value in a.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, theirs[key]), key


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


class Colour(enum.Enum):
    RED = 1


class Attributes(dict):
    """A dictionary with attributes, as Lightning's hyperparameters are."""


ODD = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/x"), betas=(0.9, 0.99)),
    "best_acc": np.float64(75.6), "epoch": np.int64(3), "step": torch.tensor(3),
    "history": np.arange(3), "rng": (np.random.RandomState(0).get_state(), random.getstate()),
    "when": datetime.datetime(2020, 1, 1), "took": datetime.timedelta(1), "colour": Colour.RED,
    "options": types.SimpleNamespace(a=1), "hyper_parameters": Attributes(a=Attributes(b=2)),
    "meters": collections.defaultdict(list, {"loss": [1.0]}), "seen": {1, 2}, "c": 1j,
    "window": collections.deque([1.0, 2.0], maxlen=20), "counts": collections.Counter("aab"),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
}  # fmt: skip

WRAPPED = {
    "plain": lambda state: state,
    "ddp": lambda state: prefixed("module.", state),
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "compiled ddp": lambda state: prefixed("module._orig_mod.", state),
    "fsdp": lambda state: prefixed("_fsdp_wrapped_module.", state),
    "state_dict": lambda state: {"state_dict": prefixed("module.", state), **ODD},
    "model": lambda state: {"model": state, **ODD},
    "nested": lambda state: {"checkpoint": {"net": {"weights": state}}},
    "lightning": lambda state: {
        "state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(10)}, **ODD,
    },
    "ema alone": lambda state: {"ema": prefixed("module.", state), **ODD},
    "no counters": lambda state: {
        key: value for key, value in state.items() if "num_batches_tracked" not in key
    },
    "flop counters": lambda state: {**state, "total_ops": torch.zeros(1)},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrapped_weights_load(wrap, zipped, tmp_path):
    given = network()
    if wrap == "half":
        given.half().float()
        for value in given.state_dict().values():
            value.copy_(value.half() if value.is_floating_point() else value)
    path = tmp_path / "weights.pth"
    torch.save(WRAPPED[wrap](given.state_dict()), path, _use_new_zipfile_serialization=zipped)
    loaded, text = load(path)
    assert_same(loaded, given)
    assert str(path) in text


def test_modules_that_torch_wraps_load(tmp_path):
    given = network()
    compiled = torch.compile(given, backend="eager")
    wholes = {"module": given, "in a dictionary": {"model": nn.Sequential(given), **ODD}}
    for content in (compiled.state_dict(), AveragedModel(given).state_dict(), *wholes.values()):
        assert_same(load(saved(tmp_path / "x.pt", content))[0], given)


def test_an_average_is_preferred_as_in_timm_and_a_key_chooses(tmp_path):
    plain, average = network(seed=3), network(seed=4)
    for key in ("state_dict_ema", "model_ema", "ema"):
        content = {"state_dict": plain.state_dict(), key: average.state_dict()}
        path = saved(tmp_path / "both.pth", content)
        assert_same(load(path)[0], average)
        assert_same(load(path, weights_key="state_dict")[0], plain)
        with pytest.raises(RunError, match=r"no weights under 'state_dct': there are .*nearest"):
            load(path, weights_key="state_dct")


def test_the_name_chooses_between_two_networks_in_a_file(tmp_path):
    one, two = network(seed=3), network(seed=4)
    state = prefixed("student.", one.state_dict()) | prefixed("teacher.", two.state_dict())
    path = saved(tmp_path / "two.ckpt", {"state_dict": state})
    assert_same(load(path, name="student")[0], one)
    assert_same(load(path, name="teacher")[0], two)
    several = (
        r"several networks that fit: 'state_dict.student', 'state_dict.teacher'; set weights_key"
    )
    with pytest.raises(RunError, match=several):
        load(path, name="pupil")
    for key in ("teacher", "state_dict.teacher"):
        assert_same(load(path, name="pupil", weights_key=key)[0], two)


def test_the_only_network_in_a_file_that_fits_is_loaded(tmp_path):
    one = network()
    state = prefixed("a.", one.state_dict())
    state |= prefixed("b.", network("resnet20").state_dict())
    state |= prefixed("c.", network(classes=100).state_dict())
    assert_same(load(saved(tmp_path / "two.ckpt", state))[0], one)


def test_a_module_that_contains_itself_is_refused(tmp_path):
    module = nn.Sequential()
    dict.__setitem__(module._modules, "0", module)
    with pytest.raises(RunError, match="does not fit 'teacher'"):
        load(saved(tmp_path / "cyclic.pt", {"model": module, "w": torch.ones(1)}))


def test_reset_head_keeps_a_new_classifier(tmp_path):
    path = saved(tmp_path / "w.pt", network(classes=100).state_dict())
    with pytest.raises(RunError, match=r"\(100, 64\), needed \(10, 64\); set reset_head = true"):
        load(path)
    loaded, text = load(path, reset_head=True)
    fresh, given = network(seed=2).state_dict(), network(classes=100).state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, (fresh if "classifier" in key else given)[key]), key
    assert "without the classifier" in text


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        ("resnet20", ["it contains 'stages.0.1.bn1.bias' (16,)", "shapes are those of 'resnet20'"]),
        ("vgg8", ["it contains 37 tensors under 'model'", "'stages.0.0.weight' (64, 3, 3, 3) to",
                  "needs 'conv.weight' (16, 3, 3, 3)", "shapes are those of 'vgg8'"]),
        ("imagenet_resnet18", ["'layer1.1.bn1.bias' (64,)", "those of 'imagenet_resnet18'"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_described(given, reasons, tmp_path):
    path = saved(tmp_path / "w.pt", {"model": network(given).state_dict()})
    with pytest.raises(RunError) as error:
        load(path)
    for reason in reasons:
        assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_nearest_name_to_a_missing_one_is_shown(tmp_path):
    state = network().state_dict()
    state["convolution.weight"] = state.pop("conv.weight")
    with pytest.raises(RunError, match=r"lacks 'conv.weight' .*nearest .* 'convolution.weight'"):
        load(saved(tmp_path / "w.pt", state))


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = network().state_dict()
    code = "open('ran', 'w')"
    for call in (Calls(os.system, "touch ran"), Calls(exec, code), Calls(eval, code)):
        path = tmp_path / "evil.pt"
        torch.save({"model": state, "x": call}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RunError, match=re.escape(f"refused to read {path}: it calls ")):
            load(path)
    torch.save({"model": state, "x": Calls(unknown_function)}, path)  # never called
    assert_same(load(path)[0], network())
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pt"]


def unknown_function():
    Path("ran").touch()


def script(path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"hello", "not a file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer: run git lfs pull"),
        (b"\n<!doctype html><html>", "a web page: download the file again"),
        (b"\x80\x04N.", "not a file of torch.save"),
        ({}, "it contains no state dict, but an empty dictionary"),
        ({"epoch": 1, "optimizer": ODD["optimizer"]}, "keys 'epoch', 'optimizer'"),
        ([1], "it contains no state dict, but a list"),
        (script, r"TorchScript program; save torch.jit.load\('w.pt'\).state_dict\(\)"),
    ],
)
def test_a_file_without_weights_is_described(content, reason, tmp_path):
    path = tmp_path / "w.pt"
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(RunError, match=reason):
        load(path)
    if isinstance(content, bytes):
        path = path.rename(tmp_path / "w.safetensors")
        with pytest.raises(RunError, match=re.escape(f"{path}")):
            load(path)


# -- folders and the command line ------------------------------------------------------------------


def test_folders_of_weights_load(tmp_path):
    from safetensors.torch import save_file

    given, folder = network(), tmp_path / "saved"
    folder.mkdir()
    with pytest.raises(RunError, match="is not the folder of a run, and contains no weight file"):
        load(folder)
    saved(folder / "only.pth", given.state_dict())
    assert_same(load(folder)[0], given)
    saved(folder / "other.pth", given.state_dict())
    with pytest.raises(RunError, match=r"several weight files: pass .* only.pth, other.pth"):
        load(folder)
    items = list(given.state_dict().items())
    parts = {"model-1.safetensors": dict(items[:20]), "model-2.safetensors": dict(items[20:])}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    where = {key: name for name, tensors in parts.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {str(where).replace(chr(39), chr(34))}}}'
    )
    assert_same(load(folder)[0], given)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.pt"}}')
    with pytest.raises(
        RunError, match=r"names '../x.pt', which is not a file of weights next to it"
    ):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(RunError, match="no list of files under 'weight_map'"):
        load(folder)


FROZEN = [*TINY_RUN, "--networks.teacher.frozen", "--max-steps", "1"]


def test_a_frozen_network_needs_weights_or_says_random(tmp_path):
    for options in ([], ["--dry-run"]):
        done = bdkd("train", *FROZEN, *options, "--run-dir", str(tmp_path / "run"))
        assert done.returncode == 2
        assert "networks.teacher is frozen and has no weights" in done.stderr
        assert not (tmp_path / "run").exists()
    done = bdkd("train", *FROZEN, "--networks.teacher.weights", "random",
                "--run-dir", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["reset-head"], "reset_head must be false without networks.teacher.weights"),
        (["weights-key", "ema"], "weights_key must be left out unless networks.teacher.weig"),
        (
            ["weights", "x.pt", "reset-head", "frozen"],
            "reset_head must be false for a frozen",
        ),
        (["weights", "pretrained", "weights-key", "ema"], "weights_key must be left out unless"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, reason, capsys, tmp_path):
    given = [f"--networks.teacher.{x}" if x in ("reset-head", "weights-key", "weights", "frozen")
             else x for x in options]  # fmt: skip
    with pytest.raises(SystemExit) as exit_:
        main(["train", *TINY_RUN, *given, "--run-dir", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_command_says_which_weights_it_loaded(tmp_path):
    torch.manual_seed(0)
    teacher = create_model("resnet8", 3, 3)
    path = saved(tmp_path / "their.pth", {"model_ema": prefixed("module.", teacher.state_dict())})
    done = bdkd("train", *FROZEN, "--networks.teacher.weights", str(path), "--run-dir",
                str(tmp_path / "run"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"teacher: loaded 56 tensors under 'model_ema' with the prefix 'module.' of {path}" in (
        done.stdout
    )


def test_a_tensor_that_the_file_lacks_is_named(tmp_path):
    """This is so even if no name in the file is similar."""
    state = network().state_dict()
    del state["conv.weight"]
    with pytest.raises(RunError, match=r"it lacks 'conv.weight' \(16, 3, 3, 3\)$"):
        load(saved(tmp_path / "x.pt", state))
