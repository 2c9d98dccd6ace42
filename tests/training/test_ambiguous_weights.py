"""Files of weights with several networks, another network or forged content are not misread."""

import dataclasses
import json
import pickle
from collections import OrderedDict

import pytest
import torch
from small_runs import TINY_RUN
from test_weights import MODEL, assert_same, load, network, prefixed, saved
from torch import nn
from vision import mended_torchvision

from bdkd.cli import main
from bdkd.config import NetworkConfig
from bdkd.errors import RunError
from bdkd.models import create_model
from bdkd.runs.weights import load_weights

ONE, TWO = (network(seed=seed).state_dict() for seed in (3, 4))
OTHER = network(classes=100).state_dict()


def refused(content, tmp_path, match, **options):
    with pytest.raises(RunError, match=match) as error:
        load(saved(tmp_path / "w.pt", content), **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"model_s": ONE, "model_t": TWO}, "several networks that fit: 'model_s', 'model_t'"),
        ({"a": {"x": ONE, "y": TWO}}, "'a.x', 'a.y'; set weights_key to one of them"),
        ({**ONE, **prefixed("_orig_mod.", TWO)}, "several networks that fit: '', '_orig_mod'"),
        # The network with the right name, or the average, does not fit.
        (prefixed("student.", ONE) | prefixed("teacher.", OTHER),
         r"shape \(100, 64\), needed \(10, 64\); set weights_key to 'student' to load other"),
        ({"model": ONE, "model_ema": OTHER}, "set weights_key to 'model' to load other"),
    ],
)  # fmt: skip
def test_an_ambiguous_network_is_not_guessed(content, match, tmp_path):
    refused(content, tmp_path, match)


def test_the_same_weights_twice_are_one_network(tmp_path):
    twice = prefixed("model.", ONE) | prefixed("compiled._orig_mod.", ONE)
    loaded, _ = load(saved(tmp_path / "w.pt", {"state_dict": twice, "copy": {"net": ONE}}))
    assert all(torch.equal(value, ONE[key]) for key, value in loaded.state_dict().items())


def test_weights_key_finds_entries_that_are_skipped_by_default(tmp_path):
    path = saved(tmp_path / "w.pt", {"model": ONE, "callbacks": {"EMA": {"weights": TWO}}})
    assert torch.equal(load(path)[0].conv.weight, ONE["conv.weight"])
    loaded, text = load(path, weights_key="callbacks.EMA")
    assert torch.equal(loaded.conv.weight, TWO["conv.weight"])
    assert "under 'callbacks.EMA.weights'" in text


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (torch.full((16, 3, 3, 3), torch.nan), "'conv.weight' contains NaN or infinity"),
        (torch.full((16, 3, 3, 3), 1e300, dtype=torch.float64), "contains NaN or infinity"),
        (torch.ones(16, 3, 3, 3, dtype=torch.int64), "is int64, needed float32"),
        (torch.ones(16, 3, 3, 3).to_sparse(), r"is float32 \(torch.sparse_coo\), needed float32"),
        (torch.ones(16, 3, 3, 3, device="meta"), r"without data \(a meta tensor\), needed float32"),
        (torch.ones(3, 16, 3, 3), r"shape \(3, 16, 3, 3\), needed \(16, 3, 3, 3\)"),
    ],
)
def test_a_tensor_with_wrong_values_dtype_layout_or_shape_is_named(changed, match, tmp_path):
    refused({**ONE, "conv.weight": changed}, tmp_path, match)


def test_batch_counters_may_have_another_dtype(tmp_path):
    """Code that averages all tensors makes the counters floating point."""
    counted = {k: v.float()[None] if "num_batches" in k else v for k, v in ONE.items()}
    loaded, _ = load(saved(tmp_path / "w.pt", counted))
    assert torch.equal(loaded.conv.weight, ONE["conv.weight"])


def cyclic():
    content = OrderedDict(model=torch.ones(1))
    content.update((f"k{i}", content) for i in range(60))
    return content


def cyclic_module():
    module = nn.Sequential()
    for i in range(300):
        dict.__setitem__(module._modules, str(i), module)
        module.register_buffer(f"b{i}", torch.ones(1))
    return {"model": module}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (cyclic, "it contains 1 tensor"),
        (cyclic_module, "it contains 300 tensors"),
        (lambda: {"." * 200_000: torch.ones(1)}, "it contains no state dict"),
        (lambda: {"x" * 5000: ONE}, "it contains no state dict"),
        (lambda: {"model": nn.Sequential(nn.ReLU())}, "it contains no state dict"),
        (lambda: {"w": torch.nested.nested_tensor([torch.ones(1)])}, "no state dict"),
        (lambda: {"format": 3, "recipe": "", "state": {"networks": torch.ones(1), "ema": {},
                  "position": 1}}, "is not a complete checkpoint"),
        (lambda: {"format": 3, "recipe": "", "state": {"networks": {"a": 1}, "ema": [],
                  "position": 1}}, "is not a complete checkpoint"),
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_forged_files_are_refused_in_one_line(make, match, tmp_path):
    refused(make(), tmp_path, match)


def test_a_deep_pickle_does_not_crash_python(tmp_path):
    """torch's reader computes the hash of a key in C, recursively."""
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})  # of files before torch 1.6
    deep = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s."  # {((((...),),),): 1}
    path = tmp_path / "w.pth"
    path.write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in header) + deep)
    with pytest.raises(RunError, match="refused to read"):
        load(path)


# -- files and folders that name their network ----------------------------------------------------


@pytest.fixture
def timm():
    mended_torchvision()
    return pytest.importorskip("timm", exc_type=ImportError)


def test_another_network_of_timm_with_the_same_shapes_is_refused(timm, tmp_path):
    theirs = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10)
    content = {"arch": "mobilenetv3_small_050.lamb_in1k", "state_dict": theirs.state_dict()}
    path = saved(tmp_path / "w.pth.tar", content)
    with pytest.raises(RunError, match="weights of timm's mobilenetv3_small_050, and"):
        load(path, "timm:tf_mobilenetv3_small_minimal_100")
    saved(path, {**content, "arch": "my_own_name"})
    load(path, "timm:tf_mobilenetv3_small_minimal_100")


def test_the_config_json_of_timm_is_read(timm, tmp_path):
    from safetensors.torch import save_file

    theirs = timm.create_model("resnet18", num_classes=10)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet18", "label_names": [*"abcdefghij"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in ("timm:resnet18", "imagenet_resnet18"):
        into = create_model(model, 10, 3)
        config_of = NetworkConfig(model, "teacher", weights=str(tmp_path))
        loaded = load_weights(into, "teacher", config_of)
        assert loaded.classes == [*"abcdefghij"]
    config |= {"model_args": {"global_pool": "max", "in_chans": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="built with global_pool = 'max': set this in options"):
        load(tmp_path, "timm:resnet18")


@pytest.mark.parametrize("model", ["levit_128s", "convformer_s18", "resnet18", "volo_d1_224"])
def test_reset_head_knows_timms_classifiers(model, timm):
    from bdkd.models.key_names import head_keys

    with torch.device("meta"):
        ten, twenty = (create_model(f"timm:{model}", classes, 3) for classes in (10, 20))
    sizes = twenty.state_dict()
    resized = {k for k, v in ten.state_dict().items() if v.shape != sizes[k].shape}
    assert resized <= head_keys(ten)
    assert len(head_keys(ten)) < len(sizes) / 4


# -- runs and folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [
    MODEL, pytest.param("timm:resnet18", marks=pytest.mark.soak), "torchvision:resnet18",
])  # fmt: skip
def test_a_run_and_its_export_start_another_run(model, timm, tmp_path):
    networks = ["--networks.teacher.model", model, "--max-steps", "1", "--quiet"]
    main(["train", *TINY_RUN, *networks, "--run-dir", str(tmp_path / "a")])
    main(["export", str(tmp_path / "a"), "--to", "safetensors", "--network", "teacher"])
    exported = tmp_path / "a" / "export" / "teacher" / "model.safetensors"
    for number, path in enumerate((tmp_path / "a", exported)):
        main(["train", *TINY_RUN, *networks, "--networks.teacher.frozen",
              "--networks.teacher.weights", str(path), "--run-dir",
              str(tmp_path / str(number))])  # fmt: skip


def test_the_average_of_a_student_is_loaded_from_a_run(tmp_path):
    main(["train", *TINY_RUN, "--max-steps", "2", "--train.ema-decay", "0.5", "--quiet",
          "--run-dir", str(tmp_path / "run")])  # fmt: skip
    into = create_model(MODEL, 3, 3)
    of_run = NetworkConfig(MODEL, "student", weights=str(tmp_path / "run"))
    assert "of 'student_ema' at the top level" in load_weights(into, "student", of_run).text
    of_run = dataclasses.replace(of_run, weights_key="student")
    assert "of 'student' at the top level" in load_weights(into, "student", of_run).text


def test_a_folder_of_two_models_is_refused(tmp_path):
    for name in ("model.safetensors", "model_1.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="weights of several networks: pass the path of a file"):
        load(tmp_path)


def test_a_shard_gives_only_the_tensors_that_the_index_assigns_to_it(tmp_path):
    from safetensors.torch import save_file

    stale = {"conv.weight": TWO["conv.weight"]}
    rest = {key: value for key, value in ONE.items() if key != "conv.weight"}
    save_file({"conv.weight": ONE["conv.weight"].clone()}, tmp_path / "a.safetensors")
    save_file({**{k: v.clone() for k, v in rest.items()}, **stale}, tmp_path / "b.safetensors")
    places = {**dict.fromkeys(rest, "b.safetensors"), "conv.weight": "a.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    given = network()
    given.load_state_dict(ONE)
    assert_same(load(index)[0], given)
