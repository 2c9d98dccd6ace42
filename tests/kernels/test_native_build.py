"""Test how the native CPU kernel is built and called: its sources, structs and sanitizers."""

import ctypes
import re
import subprocess
import sys

import pytest
from bdkd_kernels import native, native_call, options


def cpp_structs(header: str) -> dict[str, list[tuple[str, str]]]:
    """Return the type and the name of each field of each struct."""
    structs = {}
    for name, body in re.findall(r"struct (\w+) {\n(.*?)};", header, re.DOTALL):
        fields = re.findall(r"^  ([\w *]+?\*?) (\w+(?:, \w+)*);", body, re.MULTILINE)
        structs[name] = [(kind, field) for kind, names in fields for field in names.split(", ")]
    return structs


def test_cpp_reads_each_field_where_python_packs_it():
    """The test unpacks a call according to the generated C++ declarations."""
    headers = options.cpp_header() + native_call.cpp_header()
    structs = cpp_structs(headers)

    def numbers(name: str) -> list[tuple[str, str]]:
        fields = []
        for kind, field in structs[name]:
            inner = numbers(kind) if kind in structs else [(kind, "")]
            fields += [(leaf, f"{field} {rest}".strip()) for leaf, rest in inner]
        return fields

    chosen = options.LossOptions(
        temperature=3.0, gamma=5.0, student_ce=7.0, student_kd=9.0, teacher_ce=11.0,
        teacher_kd=13.0, teacher_divergence="forward", soften_entropy=False, label_smoothing=0.5,
        ignore_index=-7, reduction="none",
    )  # fmt: skip
    networks = [{f.name: 100 * k + i for i, f in enumerate(native_call.NETWORK)} for k in (1, 2)]
    call = {f.name: 300 + i for i, f in enumerate(native_call.CALL)}
    packed = native_call.pack(
        options=native._packed(chosen),
        student=native_call.network(**dict(reversed(networks[0].items()))),
        teacher=native_call.network(**networks[1]),
        **dict(reversed(call.items())),
    )
    fields = numbers("Arguments")
    layout = [
        (field, ctypes.c_double if kind == "double" else ctypes.c_int64) for kind, field in fields
    ]
    arguments = type("Arguments", (ctypes.Structure,), {"_fields_": layout})
    assert ctypes.sizeof(arguments) == len(packed)
    unpacked = arguments.from_buffer_copy(packed)
    expected = {f"options {name}": value for name, value in vars(chosen).items()}
    del expected["options _packed"]
    for name, value in (("teacher_divergence", "Forward"), ("reduction", "None")):
        kind = dict(map(reversed, structs["Options"]))[name]
        [enum] = re.findall(rf"enum {kind} : int64_t {{ (.*?) }};", headers)
        expected[f"options {name}"] = enum.split(", ").index(f"k{kind}{value}")
    for network, values in zip(("student", "teacher"), networks, strict=True):
        expected |= {f"{network} {name}": value for name, value in values.items()}
    expected |= call
    assert {field: getattr(unpacked, field) for _, field in fields} == expected


def test_a_call_with_a_missing_field_raises():
    with pytest.raises(TypeError, match="loss"):
        native_call.network(**{f.name: 0 for f in native_call.NETWORK[:-1]})


def test_a_changed_source_is_noticed():
    """In a checkout, the library contains the hash of the sources that it was built from."""
    sources = native._sources_hash()
    if sources is None:
        pytest.skip("waits for a checkout: installed sources cannot change")
    assert native._is_built_from(sources)
    assert not native._is_built_from("0" * 64)


def test_import_does_not_import_triton():
    code = "import sys, bdkd_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.soak  # make sanitize runs it too
def test_clean_under_sanitizers(tmp_path):
    """The short form of ``make sanitize``: the portable kernel, built and run under ASan, UBSan."""
    if not native.CHECKOUT_SOURCES.is_dir():
        pytest.skip("waits for a checkout with the sources; make sanitize runs the same")
    program = native.CHECKOUT_SOURCES / "sanitize.py"
    done = subprocess.run([sys.executable, program, "--short", "--folder", tmp_path],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: 4536 calls" in done.stdout
