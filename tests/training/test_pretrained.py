"""``networks.NAME.weights = "pretrained"``: the weights that timm and torchvision publish.

The tests create the caches and the servers themselves, so no test needs internet access.
"""

import dataclasses
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_runs import TINY_RUN, bdkd, components_of, tiny_recipe
from vision import mended_torchvision

from bdkd.cli import main
from bdkd.config import PRETRAINED, NetworkConfig, load_recipe
from bdkd.data.base import Normalisation
from bdkd.errors import RunError, UsageError
from bdkd.models import create_model, published
from bdkd.models.pretrained import has_published_weights, published_weights
from bdkd.models.published import PublishedWeights, locate
from bdkd.runs.weights import check_pretrained, load_initial_weights

mended_torchvision()
timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision").models

# timm's network for its own tests: 0.4 million parameters, images of any size
RESNET, REPOSITORY = "test_resnet", "timm/test_resnet.r160_in1k"
SHUFFLENET = "shufflenet_v2_x0_5"
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Set up empty caches without internet access, and return their folder."""
    from huggingface_hub import constants

    for name, value in {
        "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch"), **NO_NETWORK,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)  # for subprocesses
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # for this process
    return tmp_path


def hub_file(folder: Path, name: str = "model.safetensors", repository: str = REPOSITORY) -> Path:
    """Return the path of a file in the layout of the Hub's cache."""
    cached = folder / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    path = cached / "snapshots" / "0123abc" / name
    for parent in (path.parent, cached / "refs"):
        parent.mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    return path


def timm_network(classes: int = 1000, channels: int = 3, name: str = RESNET):
    torch.manual_seed(7)
    return timm.create_model(name, num_classes=classes, in_chans=channels)


def cached_timm(folder: Path):
    """Return a network of timm, and the path of its weights in the cache."""
    network = timm_network()
    path = hub_file(folder)
    save_file(network.state_dict(), path)
    return network, path


def cached_torchvision(folder: Path, name: str = SHUFFLENET):
    """Return a network of torchvision, and the path of its weights in the cache."""
    torch.manual_seed(7)
    network = models.get_model(name)
    url = models.get_model_weights(name).DEFAULT.url
    path = folder / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return network, path


def recipe(model: str, classes: int = 3, **options):
    teacher = NetworkConfig(model, "teacher", weights=PRETRAINED, **options)
    student = NetworkConfig("resnet8", "student")
    data = {"classes": classes, "images": 10 * classes}
    tiny = tiny_recipe(data=data, train={"batch_size": 2})
    return dataclasses.replace(tiny, networks={"teacher": teacher, "student": student})


def loaded(recipe):
    """Return the weights of the teacher in a new run, and its random weights before loading."""
    components = components_of(recipe, begins=False)
    before = {k: v.clone() for k, v in components.networks.members["teacher"].state_dict().items()}
    load_initial_weights(components)
    return components.networks.members["teacher"].state_dict(), before


# --- what is loaded -------------------------------------------------------------------------------


def test_timms_weights_load_without_a_classifier_of_other_classes(caches, capsys):
    network, path = cached_timm(caches)
    weights, before = loaded(recipe(f"timm:{RESNET}"))
    theirs = network.state_dict()
    for key, value in weights.items():
        same = before if key.startswith("network.fc.") else theirs
        assert torch.equal(value, same.get(key.removeprefix("network."), before[key])), key
    count = len(theirs) - 2
    said = f"teacher: loaded {count} tensors of {path}, the pretrained weights of "
    head = "timm:test_resnet.r160_in1k, without the classifier (1000 classes, needed 3)\n"
    assert said + head in capsys.readouterr().out


def test_a_normalisation_that_the_weights_do_not_expect_is_a_warning(caches, capsys, monkeypatch):
    cached_timm(caches)
    loaded(recipe(f"timm:{RESNET}"))
    said = capsys.readouterr().out
    assert "warning: the pretrained weights of teacher expect images that are" in said
    components = components_of(recipe(f"timm:{RESNET}"), begins=False)
    pixels = Normalisation((127.5,) * 3, (127.5,) * 3, 255.0)
    info = dataclasses.replace(components.source.info, normalisation=pixels)
    monkeypatch.setattr(components.source, "info", info)
    load_initial_weights(components)
    assert "warning" not in capsys.readouterr().out


def test_a_classifier_for_as_many_classes_is_loaded_unless_it_is_reset(caches):
    network, _ = cached_timm(caches)
    theirs = network.state_dict()["fc.weight"]
    weights, _ = loaded(recipe(f"timm:{RESNET}", 1000))
    assert torch.equal(weights["network.fc.weight"], theirs)
    weights, before = loaded(recipe(f"timm:{RESNET}", 1000, reset_head=True))
    assert torch.equal(weights["network.fc.weight"], before["network.fc.weight"])


def test_timm_adapts_weights_to_one_channel_and_another_image_size(caches):
    """The weights are those of timm.create_model with the same file."""
    _, path = cached_timm(caches)
    digits = dataclasses.replace(recipe(f"timm:{RESNET}"), data=load_recipe("digits").data)
    weights, _ = loaded(digits)
    source = {"file": str(path)}
    theirs = timm.create_model(
        RESNET, pretrained=True, pretrained_cfg_overlay=source, num_classes=10, in_chans=1
    )
    assert torch.equal(weights["network.conv1.0.weight"], theirs.conv1[0].weight)
    assert theirs.conv1[0].weight.shape[1] == 1

    vit = timm_network(name="test_vit")
    save_file(vit.state_dict(), hub_file(caches, repository="timm/test_vit.r160_in1k"))
    small = recipe("timm:test_vit", options={"img_size": 32})
    small = dataclasses.replace(small, data=dataclasses.replace(small.data, image_size=32))
    weights, _ = loaded(small)
    assert torch.equal(weights["network.blocks.0.attn.qkv.weight"], vit.blocks[0].attn.qkv.weight)
    assert weights["network.pos_embed"].shape[1] < vit.pos_embed.shape[1]


@pytest.mark.parametrize("model", [f"torchvision:{SHUFFLENET}", f"imagenet_{SHUFFLENET}"])
def test_torchvisions_weights_load(model, caches, capsys):
    """They also load into the network of bdkd that computes the same function."""
    network, path = cached_torchvision(caches)
    recipe_ = recipe(model)
    weights, before = loaded(recipe_)
    theirs = network.state_dict()
    for key, value in weights.items():
        name = key.removeprefix("network.")
        head = key.startswith(("classifier.", "fc."))
        assert torch.equal(value, before[key] if head else theirs[name]), key
    said = capsys.readouterr().out
    assert f"of {path}, the pretrained weights of torchvision:{SHUFFLENET}, without" in said
    weights, _ = loaded(recipe(model, 1000))
    key = "fc.weight" if "fc.weight" in weights else "classifier.weight"
    assert torch.equal(weights[key], theirs["fc.weight"])


@pytest.mark.parametrize("suffix", ["", ".r160_in1k"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_option_pretrained_of_timm_reads_the_cache_too(suffix, name, caches):
    network, path = timm_network(), hub_file(caches, name)
    (save_file if name.endswith("safetensors") else torch.save)(network.state_dict(), path)
    built = create_model(f"timm:{RESNET}{suffix}", 3, pretrained=True)
    assert torch.equal(built.network.conv1[0].weight, network.conv1[0].weight)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match=r"cannot read the weights .*; remove this file") as error:
        create_model(f"timm:{RESNET}", 3, pretrained=True)
    assert "\n" not in str(error.value)


def test_a_tag_of_timm_chooses_the_file():
    names = {published_weights(f"timm:resnet50.{tag}").repository for tag in ("a1_in1k", "a2_in1k")}
    assert names == {"timm/resnet50.a1_in1k", "timm/resnet50.a2_in1k"}
    option = published_weights("timm:resnet50", {"pretrained_cfg": "a2_in1k"})
    assert option == published_weights("timm:resnet50.a2_in1k")
    assert published_weights("timm:resnet50").model == "timm:resnet50.a1_in1k"


def test_which_models_have_published_weights():
    for model in ("timm:resnet18", "TIMM:resnet18.a1_in1k", "torchvision:resnet18",
                  "imagenet_resnet18", "imagenet-ResNet50"):  # fmt: skip
        assert has_published_weights(model), model
    for model in ("wrn_16_2", "resnet18", "imagenet_mobilenet_v1", "timm:resnet18.nothing",
                  "timm:no_such_model", "torchvision:no_such_model", "no_such_model", "",
                  "timm:", "keras:resnet50", "torchvision:fasterrcnn_resnet50_fpn"):  # fmt: skip
        assert not has_published_weights(model), model


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("wrn_16_2", {}, ["weights cannot be pretrained", "wrn_16_2", "bdkd models PATTERN",
                          "imagenet_resnet18"]),
        ("timm:resnet19", {}, ["timm has no model 'resnet19'", "'timm:resnet18'"]),
        ("timm:resnet18.nothing", {}, ["Invalid pretrained tag (nothing)"]),
        ("timm:efficientnet_b8", {}, ["no weights of timm:efficientnet_b8 are published"]),
        ("torchvision:resnet19", {}, ["torchvision has no model 'resnet19'"]),
        ("resnet9", {}, ["no model named 'resnet9'"]),
        ("torchvision:googlenet", {}, ["networks.teacher.options.transform_input must be true"]),
    ],
)  # fmt: skip
def test_networks_without_published_weights_are_refused(model, options, words):
    with pytest.raises(UsageError) as error:
        check_pretrained(recipe(model, options=options))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_googlenet_is_accepted_with_its_own_normalisation(caches):
    given = recipe("torchvision:googlenet", options={"transform_input": True})
    check_pretrained(given)


def test_a_network_without_weights_is_refused_before_data_are_read(tmp_path):
    """The data set does not exist, and the message is about the weights."""
    for options in ([], ["--dry-run"]):
        done = bdkd(
            "train", "imagenet-r50-mbv1", "--networks.student.weights", "pretrained",
            "--data.root", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run"), *options,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "no weights of imagenet_mobilenet_v1 are published" in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_frozen_network_of_other_classes_is_refused(caches):
    cached_timm(caches)
    with pytest.raises(UsageError, match=r"for 1000 classes, needed 3: its new classifier would"):
        loaded(recipe(f"timm:{RESNET}", frozen=True))
    weights, _ = loaded(recipe(f"timm:{RESNET}", 1000, frozen=True))
    assert weights["network.fc.weight"].shape[0] == 1000


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_weights_that_do_not_fit_are_refused(kind, caches):
    network, path = (cached_timm if kind == "timm" else cached_torchvision)(caches)
    model = f"timm:{RESNET}" if kind == "timm" else f"torchvision:{SHUFFLENET}"
    save = save_file if kind == "timm" else torch.save
    state = network.state_dict()
    key = next(key for key, value in state.items() if value.dim() == 4)

    def refused(content, reason):
        save(content, path)
        with pytest.raises(RunError, match=reason) as error:
            loaded(recipe(model))
        assert str(path) in str(error.value)
        assert str(error.value).startswith("networks.teacher.weights: ")
        assert "\n" not in str(error.value)

    refused({**state, key: state[key] * float("nan")}, f"'(network.)?{key}' contains NaN or inf")
    refused({k: v for k, v in state.items() if k != key}, f"does not fit.*{key}")
    refused({**state, key: torch.zeros(1, 2, 3, 3)}, f"does not fit.*{key}")
    refused({**state, "extra.weight": torch.zeros(2)}, "does not fit.*extra.weight")
    path.write_bytes(b"<html>")
    with pytest.raises(RunError, match=r"networks.teacher.weights: .*cannot read|refused to read"):
        loaded(recipe(model))


# --- downloads ------------------------------------------------------------------------------------


def test_without_a_network_one_line_says_what_to_do(caches):
    run = ["--networks.teacher.weights", "pretrained", "--run-dir", str(caches / "run")]
    for model, words in {
        f"timm:{RESNET}": [
            "timm:test_resnet.r160_in1k are not on this machine, and huggingface.co cannot be",
            f'run "hf download {REPOSITORY} model.safetensors --cache-dir DIR"',
            f"copy DIR/models--timm--test_resnet.r160_in1k into {caches / 'hf' / 'hub'}",
        ],
        f"torchvision:{SHUFFLENET}": [
            "are not on this machine, and download.pytorch.org cannot be reached (",
            "download https://download.pytorch.org/models/shufflenetv2_x0.5-",
            f"copy it into {caches / 'torch' / 'hub' / 'checkpoints'}",
        ],
    }.items():
        done = bdkd("train", *TINY_RUN, "--networks.teacher.model", model, *run)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: the")]
        assert len(lines) == 1, done.stderr
        for word in ("networks.teacher.weights: the pretrained weights of", *words):
            assert word in lines[0]
        assert not (caches / "run").exists()


def test_a_host_that_does_not_answer_is_an_error_after_seconds(caches, monkeypatch):
    monkeypatch.setattr(published, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth"
        with pytest.raises(RunError, match=r"127.0.0.1:\d+ cannot be reached \((timed|no ans)"):
            locate(PublishedWeights("mine", 10, ("w.pth",), url))


class Host:
    """An HTTP server that serves some files as the Hub does, and records its ``requests``."""

    def __init__(self, files: dict[str, bytes]):
        requests = self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self, body=False):
                requests.append((self.command, self.path))
                content = files.get(self.path)
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body and content:
                    self.wfile.write(content)

            def do_GET(self):
                self.do_HEAD(body=True)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_file_at_a_url_is_downloaded_once_and_verified(caches, capfd):
    content = b"weights" * 1000
    name = f"w-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with Host({f"/{name}": content, "/w-00000000.pth": content}) as host:
        weights = PublishedWeights("mine", 10, (name,), f"{host.url}/{name}")
        path = locate(weights)
        assert path == caches / "torch" / "hub" / "checkpoints" / name
        assert path.read_bytes() == content
        assert capfd.readouterr().err == f"downloading {name} of mine from {weights.host()}\n"
        assert locate(weights) == path
        assert [method for method, _ in host.requests] == ["HEAD", "GET"]
        for name, reason in (("w-00000000.pth", "invalid hash value"), ("none.pth", "404")):
            with pytest.raises(RunError, match=f"the download from .* failed .*{reason}"):
                locate(PublishedWeights("mine", 10, (name,), f"{host.url}/{name}"))
            assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_run_downloads_once_and_then_needs_no_file(ranks, caches, monkeypatch, capsys):
    """Download from a repository of the Hub without safetensors, on one rank and on two. Resuming,
    evaluating and exporting read no published weights."""
    torch.save(timm_network().state_dict(), caches / "file")
    files = {f"/{REPOSITORY}/resolve/main/pytorch_model.bin": (caches / "file").read_bytes()}
    run = caches / "run"
    options = [*TINY_RUN, "--networks.teacher.model", f"timm:{RESNET}",
               "--networks.teacher.weights", "pretrained", "--run-dir", str(run)]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [*launcher, "-m", "--", "bdkd"] if ranks > 1 else ["-m", "bdkd"]
    with Host(files) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        done = subprocess.run(
            [sys.executable, *start, "train", *options, "--max-steps", "1"],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        got = [path for method, path in host.requests if method == "GET" and "resolve" in path]
        assert got == list(files)
    assert done.stdout.count("the pretrained weights of timm:test_resnet.r160_in1k, without") == 1
    assert done.stderr.count("downloading pytorch_model.bin") == 1
    if ranks == 1:
        monkeypatch.setenv("HF_HOME", str(caches / "empty"))
        capsys.readouterr()
        main(["train", *options, "--max-steps", "2", "--resume"])
        assert "pretrained weights" not in capsys.readouterr().out
        main(["evaluate", str(run)])
        main(["export", str(run), "--network", "teacher", "--to", "safetensors"])


def test_the_ranks_get_the_weights_of_rank_0(caches):
    """Each rank builds its networks from the seed; only rank 0 has the file."""
    cached_timm(caches)
    components = components_of(recipe(f"timm:{RESNET}"), begins=False)
    sent = []

    class Context(type(components.context)):
        def broadcast_tensors(self, tensors):
            sent.extend(tensors)

    load_initial_weights(dataclasses.replace(components, context=Context()))
    own = components.networks.members["teacher"].state_dict()
    assert {x.data_ptr() for x in sent} == {x.data_ptr() for x in own.values()}
