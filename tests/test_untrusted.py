"""Untrusted exported files are refused with one line, within seconds, using little memory.

The forged files have a valid checksum, so only the check under test can refuse them.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper
from small_runs import SMALL

from bdkd.cli import main
from bdkd.export.facts import FACTS, digest_of_bytes, memory_limit
from bdkd.export.formats import FORMATS, built_without_weights
from bdkd.export.onnx_format import _without_metadata
from bdkd.export.program_format import _digest_of_weights
from bdkd.export.safetensors_format import _digest_of_tensors

ROOT = Path(__file__).parent.parent
SUFFIXES = {kind: known.suffix for kind, known in FORMATS.items()}
SUFFIX = pytest.mark.parametrize("suffix", SUFFIXES.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of exported files of a run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *SMALL, "--max-steps", "1", "--train.ema-decay", "None",
          "--run-dir", str(folder)])  # fmt: skip
    for kind in SUFFIXES:
        main(["export", str(folder), "--to", kind])
    return folder / "export" / "student"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Return the current folder. onnxruntime resolves file names in an in-memory model there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts_of(run: Path) -> str:
    model = onnx.load(run / "model.onnx")
    return next(entry.value for entry in model.metadata_props if entry.key == FACTS)


def forge(path: Path, model, facts: str, **metadata: str) -> Path:
    """Write a model with facts and with the checksum that ``bdkd export`` would write."""
    digest = digest_of_bytes(_without_metadata(model))(facts)
    helper.set_model_props(model, {"bdkd": facts, "bdkd_sha256": digest, **metadata})
    path.write_bytes(model.SerializeToString())
    return path


def model_of(nodes, initializers=(), **fields):
    """Return a model from images ``(N, 1, 8, 8)`` to ``logits``."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        list(initializers),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, **fields)


def scores(*inputs: str):
    """Return nodes that compute logits from the sum of the images and a vector of 10 values."""
    return [
        helper.make_node("ReduceSum", ["images", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["sums", "one"], ["column"]),
        helper.make_node("Add", ["column", *inputs], ["logits"]),
    ]


def constants():
    return [
        helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]


def vector(name: str = "w"):
    return helper.make_tensor(name, TensorProto.FLOAT, [10], [float(k) for k in range(10)])


def outside(name: str = "w", location: str = "secret.bin"):
    """Return a tensor of 10 values that are stored in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[10])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "40")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def fail(capsys, path: Path) -> str:
    """Run ``bdkd evaluate`` on a file that it must refuse. Return its line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(path)])
    message = capsys.readouterr().err
    assert exit_.value.code == 1, message
    assert message.count("\n") == 1, message
    assert path.name in message
    assert len(message) < 1000
    return message


def branch(name: str, *nodes, initializers=()):
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [10])
    return helper.make_graph(nodes, name, [], [output], list(initializers))


def if_model(then_branch):
    """Return a model whose vector comes from an If with a true condition."""
    otherwise = branch("b", helper.make_node("Constant", [], ["b"], value=vector("b")))
    choose = helper.make_node("If", ["yes"], ["w"], then_branch=then_branch, else_branch=otherwise)
    true = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return model_of([choose, *scores("w")], [true, *constants()])


def external_models() -> dict:
    """Return a model for each place of a file that can contain a tensor."""
    constant = helper.make_node("Constant", [], ["w"], value=outside())
    inner = branch("a", helper.make_node("Constant", [], ["a"], value=outside("a")))
    models = {
        "initializer": model_of(scores("w"), [outside(), *constants()]),
        "constant": model_of([constant, *scores("w")], constants()),
        "if_constant": if_model(inner),
        "if_initializer": if_model(
            branch("a", helper.make_node("Identity", ["v"], ["a"]), initializers=[outside("v")])
        ),
        "two_deep": if_model(branch("a", *if_model(inner).graph.node[:1])),
    }
    models["two_deep"].graph.node[0].attribute[0].g.node[0].output[0] = "a"
    plain = [vector(), *constants()]
    models["tensors"] = model_of(scores("w"), plain)
    models["tensors"].graph.node[0].attribute.add(
        name="unknown", type=onnx.AttributeProto.TENSORS
    ).tensors.append(outside())
    models["graphs"] = model_of(scores("w"), plain)
    models["graphs"].graph.node[0].attribute.add(
        name="unknown", type=onnx.AttributeProto.GRAPHS
    ).graphs.append(inner)
    for place in ("values", "indices"):
        models[f"sparse_{place}"] = model_of(scores("w"), plain)
        sparse = models[f"sparse_{place}"].graph.sparse_initializer.add(dims=[10])
        getattr(sparse, place).CopyFrom(outside())
        models[f"sparse_attribute_{place}"] = model_of(scores("w"), plain)
        models[f"sparse_attribute_{place}"].graph.node[0].attribute.add(
            name="unknown", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse
        )
    models["function"] = model_of(scores("w"), plain)
    models["function"].functions.add(name="f", domain="").node.append(constant)
    models["function_default"] = model_of(scores("w"), plain)
    models["function_default"].functions.add(name="f").attribute_proto.add(
        name="a", type=onnx.AttributeProto.TENSOR, t=outside()
    )
    for part in ("initialization", "algorithm"):
        models[part] = model_of(scores("w"), plain)
        getattr(models[part].training_info.add(), part).initializer.append(outside())
    models["unmarked"] = model_of(scores("w"), plain)  # external_data without data_location
    models["unmarked"].graph.initializer[0].external_data.add(key="location", value="secret.bin")
    return models


EXTERNAL = external_models()


@pytest.mark.parametrize("place", EXTERNAL)
def test_no_tensor_comes_from_another_file(place, run, here, capsys):
    (here / "secret.bin").write_bytes(struct.pack("<10f", *range(10)))
    path = forge(here / "model.onnx", EXTERNAL[place], facts_of(run))
    message = fail(capsys, path)
    reasons = ("weights in other files", "sparse tensor", "defines the function")
    assert sum(reason in message for reason in reasons) == 1, message


def test_the_forged_files_are_otherwise_good(run, here, capsys):
    """The test above is meaningful: the same models are accepted if the tensor is inside the file,
    and onnxruntime does read the other file if it gets the forged model."""
    inner = branch("a", helper.make_node("Constant", [], ["a"], value=vector("a")))
    for model in (model_of(scores("w"), [vector(), *constants()]), if_model(inner)):
        path = forge(here / "model.onnx", model, facts_of(run), another="harmless")
        main(["evaluate", str(path)])
        assert "student" in capsys.readouterr().out
    (here / "secret.bin").write_bytes(struct.pack("<10f", *range(10)))
    for place in ("constant", "if_constant"):
        session = onnxruntime.InferenceSession(EXTERNAL[place].SerializeToString())
        [logits] = session.run(None, {"images": np.zeros((1, 1, 8, 8), np.float32)})
        assert logits.tolist() == [list(range(10))]


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "evil"])
def test_operators_of_other_domains(domain, run, here, capsys):
    node = helper.make_node(
        "EPContext", ["images"], ["c"], domain=domain, ep_cache_context="/etc/passwd",
        embed_mode=0, main_context=1, source="X",
    )  # fmt: skip
    plain = [vector(), *constants()]
    model = model_of([node, *scores("w")], plain)
    assert f"'EPContext' of the domain '{domain}'" in fail(
        capsys, forge(here / "a.onnx", model, facts_of(run))
    )
    model = model_of(scores("w"), plain)
    model.opset_import.append(helper.make_opsetid(domain, 1))
    assert f"the domain '{domain}'" in fail(capsys, forge(here / "b.onnx", model, facts_of(run)))


def test_loops_are_refused(run, here, capsys):
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["", "yes"], [], body=body)
    true = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model = model_of([loop, *scores("w")], [true, vector(), *constants()])
    assert "may never end" in fail(capsys, forge(here / "a.onnx", model, facts_of(run)))


def test_shapes_larger_than_the_file_are_refused(run, here, capsys):
    for dims in ([2**40], [2**32, 2**32], [11 * 4]):
        tensor = vector()
        tensor.dims[:] = dims
        tensor.ClearField("float_data")
        tensor.raw_data = b"\0" * 4
        model = model_of(scores("w"), [tensor, *constants()])
        message = fail(capsys, forge(here / "a.onnx", model, facts_of(run)))
        assert ("larger than the data" in message) == (dims[0] > 100), message
    tensor.dims[:] = [-1]
    model = model_of(scores("w"), [tensor, *constants()])
    assert "negative" in fail(capsys, forge(here / "a.onnx", model, facts_of(run)))


def test_huge_tensors_are_an_error(run, here, capsys):
    """A file of 1 kB that needs 4 TiB, when it is loaded or when it is run."""
    size = helper.make_tensor("size", TensorProto.INT64, [1], [2**40])
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["w"], keepdims=1),
        *scores("w"),
    ]
    model = model_of(nodes, [size, *constants()])
    assert "onnxruntime cannot run" in fail(capsys, forge(here / "a.onnx", model, facts_of(run)))
    size = helper.make_tensor("size", TensorProto.INT64, [4], [2**20, 2**20, 8, 8])
    nodes[:2] = [
        helper.make_node("Expand", ["images", "size"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["w"], keepdims=0),
    ]
    model = model_of(nodes, [size, *constants()])
    assert "onnxruntime cannot run" in fail(capsys, forge(here / "a.onnx", model, facts_of(run)))


def test_the_limit_is_half_of_the_memory():
    here = psutil.virtual_memory().total // 2
    group = Path("/sys/fs/cgroup/memory.max")
    bounded = group.exists() and group.read_text().strip() != "max"
    assert memory_limit() <= here if bounded else memory_limit() == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize(("constant", "limit", "status"), [
    (False, 2**26, 1), (True, 2**26, 1), pytest.param(True, 2**30, 0, marks=pytest.mark.soak),
])  # fmt: skip
def test_tensors_are_limited_even_if_memory_is_free(constant, limit, status, run, here):
    """The tensors have 128 MiB. They depend on the images, or are constants, which onnxruntime
    would fold without a limit. Each case runs in a separate process, because the limit is set only
    once per process."""
    shape = [2**25 // 10, 10] if constant else [2**19, 1, 8, 8]
    size = helper.make_tensor("size", TensorProto.INT64, [len(shape)], shape)
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["pixel"], keepdims=1),
        helper.make_node("Expand", ["v" if constant else "pixel", "size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Add", ["most", "v"], ["w"]),
        *scores("w"),
    ]
    model = model_of(nodes, [size, vector("v"), *constants()])
    file = forge(here / "a.onnx", model, facts_of(run))
    code = (
        "import sys\nfrom bdkd.cli import main\nfrom bdkd.export import facts as exported\n"
        f"exported.memory_limit = lambda: {limit}\nmain(['evaluate', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("onnxruntime cannot run" in done.stderr) == bool(status)


def test_a_file_in_two_formats(run, here, capsys):
    """With this producer name, the same bytes are also a file in onnxruntime's format. The file is
    read as ONNX, which is the format that was checked."""
    model = model_of(scores("w"), [vector(), *constants()], producer_name="ORTM 1.0")
    path = forge(here / "a.onnx", model, facts_of(run))
    assert path.read_bytes()[4:8] == b"ORTM"
    main(["evaluate", str(path)])
    assert "student" in capsys.readouterr().out


def test_metadata_sets_no_options_of_the_session(run, here, capsys, monkeypatch):
    """onnxruntime reads options in ``ort_config`` if this environment variable is set."""
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    model = model_of(scores("w"), [vector(), *constants()])
    options = {"session_options": {"intra_op_num_threads": "not a number"}}
    path = forge(here / "a.onnx", model, facts_of(run), ort_config=json.dumps(options))
    with pytest.raises(Exception, match="in the model file"):  # without our check
        onnxruntime.InferenceSession(path.read_bytes())
    main(["evaluate", str(path)])
    assert "student" in capsys.readouterr().out


def delimited(field: int, content: bytes) -> bytes:
    """Return a protobuf field of bytes."""
    length, size = len(content), b""
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([field << 3 | 2]) + size + bytes([length]) + content


@pytest.mark.parametrize("depth", [30, 34, 10_000])
def test_deep_nesting(depth, here, capsys):
    """Graphs are nested in attributes of nodes. Each level has three messages, and protobuf allows
    100."""
    graph = b""
    for _ in range(depth):
        graph = delimited(1, delimited(5, delimited(6, graph)))
    path = here / "deep.onnx"
    path.write_bytes(delimited(7, graph))
    message = fail(capsys, path)
    assert ("corrupt" in message) == (depth > 30), message


def test_unknown_fields_do_not_reach_onnxruntime(run, here, capsys):
    """A later version of ONNX may add fields with tensors that the installed version ignores."""
    model = model_of(scores("w"), [vector(), *constants()])
    path = forge(here / "a.onnx", model, facts_of(run))
    path.write_bytes(path.read_bytes() + delimited(15, b"x" * 10))
    given = []
    session = onnxruntime.InferenceSession
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "onnxruntime.InferenceSession",
            lambda content, *a, **k: given.append(content) or session(content, *a, **k),
        )
        main(["evaluate", str(path)])
    assert b"x" * 10 not in given[0]
    assert b"bdkd_sha256" not in given[0]


def test_text_that_is_not_utf_8(run, here, capsys):
    path = forge(here / "a.onnx", model_of(scores("w"), [vector(), *constants()]), facts_of(run))
    content = path.read_bytes()
    for part in (b"bdkd_sha256", b"resnet8", b"ReduceSum"):
        path.write_bytes(content.replace(part, b"\xff" * len(part)))
        fail(capsys, path)


# --- facts ---------------------------------------------------------------------------------------


def recipe_line(line: str):
    return lambda facts: facts | {"recipe": facts["recipe"] + "\n" + line}


BAD_FACTS = {
    "deep": lambda facts: '{"x":' + "[" * 100_000 + "]" * 100_000 + "}",
    "huge_number": lambda facts: '{"version": 1' + "0" * 5000 + "}",
    "infinite": lambda facts: '{"version": 1e999}',
    "long": lambda facts: json.dumps(facts | {"method": "x" * 2**25}),
    "no_image": lambda facts: json.dumps(facts | {"image_size": [0, 8]}),
    "negative_image": lambda facts: json.dumps(facts | {"image_size": [-8, -8]}),
    "huge_image": lambda facts: json.dumps(facts | {"image_size": [10**6, 10**6]}),
    "deep_recipe": recipe_line("a = " + "[" * 10_000),
    "dotted_recipe": recipe_line("a." * 30_000 + "b = 1"),  # takes 4 GB in tomllib
    "long_recipe": recipe_line("# comment" * 10_000),
    "number_in_recipe": recipe_line("a = " + "9" * 5000),
    "no_recipe": lambda facts: facts | {"recipe": "\0"},
    "newline": lambda facts: facts | {"version": "1\n2"},
}


# All formats share the code that reads facts, so two cases are enough for .pt2 files.
CASES = [(suffix, case) for suffix in (".onnx", ".safetensors") for case in BAD_FACTS]
CASES += [(".pt2", "deep"), (".pt2", "dotted_recipe")]


@pytest.mark.parametrize(("suffix", "case"), CASES)
def test_malformed_facts_are_refused(suffix, case, run, here, capsys):
    bad = BAD_FACTS[case](json.loads(facts_of(run)))
    text = bad if isinstance(bad, str) else json.dumps(bad)
    path = here / f"model{suffix}"
    if suffix == ".onnx":
        forge(path, model_of(scores("w"), [vector(), *constants()]), text)
    elif suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(run / "model.safetensors")
        digest = _digest_of_tensors(tensors)(text)
        save_file(tensors, path, {"bdkd": text, "bdkd_sha256": digest})
    else:
        with zipfile.ZipFile(run / "model.pt2") as old, zipfile.ZipFile(path, "w") as new:
            digest = _digest_of_weights(old)(text)
            changed = {"archive/extra/bdkd": text, "archive/extra/bdkd_sha256": digest}
            for name in old.namelist():
                new.writestr(name, changed.get(name, old.read(name)))
    message = fail(capsys, path)
    assert "changed since" not in message, message


def test_options_that_load_other_weights_are_ignored():
    """timm unpickles the file that ``checkpoint_path`` names."""
    from bdkd.config import NetworkConfig

    options = {"pretrained": True, "pretrained_cfg": "x", "pretrained_cfg_overlay": "x",
               "checkpoint_path": "evil.pt", "cache_dir": "x", "img_size": 8}  # fmt: skip
    config = NetworkConfig(model="timm:resnet18", role="student", options=options)
    assert built_without_weights(config) == {"img_size": 8}


# --- files of the operating system ---------------------------------------------------------------


@SUFFIX
def test_paths_that_are_not_regular_files_are_refused(suffix, here, capsys):
    os.mkfifo(here / f"fifo{suffix}")
    (here / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        assert "not a regular file" in fail(capsys, here / f"{name}{suffix}")
    (here / f"nothing{suffix}").symlink_to("nowhere")
    assert "No such file" in fail(capsys, here / f"nothing{suffix}")
    (here / f"circle{suffix}").symlink_to(f"circle{suffix}")
    assert "symbolic links" in fail(capsys, here / f"circle{suffix}")


@SUFFIX
def test_files_that_are_too_large_are_refused(suffix, here, capsys):
    path = here / f"sparse{suffix}"
    with open(path, "wb") as file:
        file.truncate(20 * 2**30)
    assert "21,474,836,480 bytes" in fail(capsys, path)
    kind = next(kind for kind, known in SUFFIXES.items() if known == suffix)
    with open(path, "wb") as file:  # the largest size that is read; its content is zeros
        file.truncate(min(FORMATS[kind].max_bytes, memory_limit()))
    if suffix != ".onnx":
        assert "corrupt" in fail(capsys, path)


# --- safetensors ---------------------------------------------------------------------------------


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "header_longer_than_file": struct.pack("<Q", 2**40) + b"{}",
    "header_of_all_memory": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no_header": struct.pack("<Q", 0),
    "overlap": ({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, 16),
    "hole": ({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, 12),
    "rest": ({"a": tensor([1], 0, 4)}, 12),
    "past_the_end": ({"a": tensor([4], 0, 16)}, 8),
    "overflow": ({"a": tensor([2**32, 2**32], 0, 0)}, 0),
    "strides": ({"a": tensor([0, 2**63 - 1, 2**63 - 1], 0, 0)}, 0),
    "negative": ({"a": tensor([-1], 0, 0)}, 0),
    "type": ({"a": tensor([1], 0, 4, "F99")}, 4),
    "type_without_torch": ({"a": tensor([2], 0, 1, "F4")}, 1),
    "twice": (
        b'{"a":%b,"a":%b}'
        % (json.dumps(tensor([1], 0, 4)).encode(), json.dumps(tensor([1], 4, 8)).encode()),
        8,
    ),
    "deep": (b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", 0),
    "no_object": (b"[]", 0),
    "metadata_of_numbers": ({"__metadata__": {"bdkd": 1}}, 0),
    "metadata_of_nothing": ({"__metadata__": None}, 0),
    "surrogate": (b'{"__metadata__":{"bdkd":"\\ud800"}}', 0),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_malformed_safetensors_are_refused(case, here, capsys):
    content = SAFETENSORS[case]
    if isinstance(content, tuple):
        header, size = content
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<Q", len(header)) + header + b"\0" * size
    path = here / "model.safetensors"
    path.write_bytes(content)
    message = fail(capsys, path)
    assert ("corrupt" in message) == (case != "metadata_of_nothing"), message


# --- .pt2 ----------------------------------------------------------------------------------------


def test_a_compressed_archive_is_refused_before_it_is_inflated(here, capsys):
    """The archive has 1 MB and would inflate to 1 GB of zeros."""
    path = here / "bomb.pt2"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/extra/bdkd", "w", force_zip64=True) as member,
    ):
        for _ in range(1000):
            member.write(b"\0" * 10**6)
    limited = f"import resource as r; r.setrlimit(r.RLIMIT_DATA, (2**31, 2**31)); {EVALUATE}"
    done = subprocess.run(
        [sys.executable, "-c", limited, str(path)],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "is compressed" in done.stderr


EVALUATE = "import sys; from bdkd.cli import main; main(['evaluate', sys.argv[1]])"


def test_every_kind_of_damage_to_an_archive_is_one_line(run, here, capsys):
    """tests/training/test_archive.py tests the checks themselves."""
    content = (run / "model.pt2").read_bytes()
    path = here / "model.pt2"
    for damaged in (b"#!" + content, content + b"end", content.replace(b"PK\1\2", b"PK\1\3", 1)):
        path.write_bytes(damaged)
        assert "corrupt" in fail(capsys, path)


def test_the_files_of_bdkd_itself_are_read(run, capsys):
    for suffix in SUFFIXES.values():
        main(["evaluate", str(run / f"model{suffix}")])
        assert "student" in capsys.readouterr().out
