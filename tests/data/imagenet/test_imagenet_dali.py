"""DALI's graph for GPUs, checked without a GPU and on a GPU."""

import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from bdkd.data import create_source
from bdkd.data.imagenet import dali
from bdkd.data.imagenet.archives import _fields
from bdkd.data.imagenet.dali import graph
from bdkd.registry import SOURCES


def source(root, device, dtype=torch.float32):
    config = SOURCES.configure(
        "imagenet", root=str(root), loader="dali", image_size=64, flip=True, workers=2
    )
    return create_source(config, 0, torch.device(device), torch.channels_last, dtype)


def nothing() -> tuple:
    return ()


def operators(gpu: bool, raw: bool, dtype: torch.dtype) -> dict[str, dict[str, bytes]]:
    """Return the serialised arguments of each operator, which DALI checks against its schemas."""
    pipeline = Pipeline(batch_size=4, num_threads=1, device_id=None)
    with pipeline:
        node = graph(nothing, gpu, raw, dtype, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
        assert node.device == ("gpu" if gpu else "cpu")
        pipeline.set_outputs(node)
    message, found = pipeline.serialize(), {}
    for _, operator in _fields(message, 0, len(message), 5):
        name, arguments = "", {}
        for number, place in _fields(message, *operator):
            if number == 1:
                name = message[slice(*place)].decode()
            elif number == 4:
                parts = [message[slice(*p)] for n, p in _fields(message, *place) if n == 1]
                arguments[parts[0].decode()] = message[slice(*place)]
        found[name] = {k: v for k, v in arguments.items() if not k.startswith("_")}
    return found


@pytest.mark.parametrize(("raw", "dtype"), [
    (False, torch.float32), (False, torch.float16), (False, torch.bfloat16), (True, torch.float32),
])  # fmt: skip
def test_the_graphs_for_gpu_and_cpu_differ_only_in_devices(raw, dtype):
    """Tests of the CPU graph therefore apply to the GPU graph, if DALI's operators agree."""
    here, there = operators(False, raw, dtype), operators(True, raw, dtype)
    assert set(here) == set(there)
    moved = {"decoders__ImageSlice": b"mixed", "Resize": b"gpu", "CropMirrorNormalize": b"gpu"}
    for name, arguments in there.items():
        assert arguments["device"].rstrip(b"@\0").endswith(moved.get(name, b"cpu")), name
        if name not in moved:  # crop boxes stay in host memory
            assert arguments == here[name]
        for key in {*arguments, *here[name]} - {"device"}:
            assert arguments[key] == here[name][key], (name, key)
    assert set(moved) < set(there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU")
def test_the_gpu_graph_fails_only_because_there_is_no_gpu():
    pipeline = Pipeline(batch_size=4, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(graph(nothing, True, False, torch.float32, [0.0], [1.0]))
    with pytest.raises(RuntimeError, match="requires a CUDA-capable GPU"):
        pipeline.build()


def test_dali_shares_batches_on_the_current_stream(tree, monkeypatch):
    """Without a stream, DALI makes the host wait for every batch."""
    there, asked, share = source(tree, "cpu"), [], Pipeline.share_outputs
    there.training.idle[8, False] = pipeline = dali._Pipeline(there.training, 8, False)
    pipeline.device = torch.device("cuda", 0)
    streams = iter(range(1, 100))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (device, next(streams)))

    def share_outputs(self, cuda_stream=None):
        asked.append(cuda_stream)
        return share(self)

    monkeypatch.setattr(Pipeline, "share_outputs", share_outputs)
    count = len(list(there.train_batches(0, 56, 8, 1)))
    assert asked == [(pipeline.device, number) for number in range(1, count + 2)]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="waits for a GPU; the other tests of this file decode on the CPU",
)
def test_a_gpu_decodes_the_same_crops(tree):
    one, other = source(tree, "cpu"), source(tree, "cuda")
    for a, b in zip(one.train_batches(0, 0, 16, 1), other.train_batches(0, 0, 16, 1), strict=True):
        assert b.views[0].is_cuda
        assert b.views[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.target, b.target.cpu())
        assert (a.views[0] - b.views[0].cpu()).abs().mean() < 0.05
    half = source(tree, "cuda", torch.bfloat16)
    whole = [x.views[0].clone() for x in half.train_batches(1, 0, 16, 1)]
    again = [x.views[0] for x in source(tree, "cuda", torch.bfloat16).train_batches(1, 48, 16, 1)]
    assert all(torch.equal(x, y) for x, y in zip(whole[3:], again, strict=True))
