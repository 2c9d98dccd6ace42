"""Operations and memory, computed from shapes and compared with counts by hand and real steps."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from small_runs import components_of
from torch import nn

from bdkd.cli import main
from bdkd.config import load_recipe
from bdkd.device import PEAKS, peak_flops, peak_memory_mib, peak_of, set_flags
from bdkd.engine.cost import cost_of, costs
from bdkd.models import create_model


def a_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1),
                         nn.Flatten(), nn.Linear(4 * 64, 10))  # fmt: skip


def test_operations_equal_a_count_by_hand():
    first, second, last = 2 * 64 * 8 * 27, 2 * 64 * 4 * 8, 2 * 256 * 10
    cost = cost_of(a_network(), (3, 8, 8), trains=True)
    assert cost.forward == first + second + last
    # backward: the weights of each layer, and the input of each layer except the first
    assert cost.step == cost.forward + first + 2 * second + 2 * last
    assert cost.parameters == 8 * 27 + 8 + 4 * 8 + 4 + 2560 + 10
    assert cost.largest == 4 * 8 * 64  # the output of the first convolution


def test_a_depthwise_convolution_is_counted_by_its_groups():
    """torch's own counter counts its backward pass as that of a full convolution."""
    depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False)
    network = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), depthwise, nn.Flatten(),
                            nn.Linear(64 * 64, 10))  # fmt: skip
    first, middle, last = 2 * 64 * 64 * 64, 2 * 64 * 64 * 9, 2 * 4096 * 10
    cost = cost_of(network, (64, 8, 8), trains=True)
    assert cost.forward == first + middle + last
    assert cost.step == cost.forward + first + 2 * middle + 2 * last


def test_a_transposed_convolution_is_counted_from_its_input():
    network = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False),
                            nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False),
                            nn.Flatten(), nn.Linear(6 * 64, 10, bias=False))  # fmt: skip
    first, middle, last = 2 * 16 * 8 * 4, 2 * 16 * 8 * 3 * 4, 2 * 384 * 10
    cost = cost_of(network, (4, 4, 4), trains=True)
    assert cost.forward == first + middle + last
    assert cost.step == cost.forward + first + 2 * middle + 2 * last


def test_a_frozen_network_costs_only_its_forward_pass():
    cost = cost_of(a_network(), (3, 8, 8), trains=False)
    assert cost.step == cost.forward > 0
    assert cost.kept == 0


def test_published_operations_of_resnet50():
    """4.09 G multiply-adds at 224 x 224 (torchvision's model page)."""
    cost = cost_of(create_model("imagenet_resnet50", 1000), (3, 224, 224), trains=True)
    assert cost.forward == pytest.approx(2 * 4.09e9, rel=0.01)
    assert cost.step == pytest.approx(3 * cost.forward, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_memory_equals_that_of_a_real_forward_pass(dtype):
    network = create_model("resnet20", 10, in_channels=3).train()
    cost = cost_of(copy.deepcopy(network), (3, 32, 32), trains=True, dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(8, 3, 32, 32)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images)
    real = sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / 8
    assert cost.kept == pytest.approx(real, rel=0.15)


def test_memory_per_image_excludes_weights():
    """A linear layer keeps its transposed weights, whose size does not depend on the batch."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 100_000, bias=False), nn.Tanh())
    cost = cost_of(network, (1, 2, 2), trains=True)
    assert cost.kept == 4 * (4 + 100_000)  # the input of the layer and the output of tanh
    assert cost.largest == 4 * 100_000


def test_counting_leaves_networks_and_random_state_unchanged():
    components = components_of(load_recipe("digits"))
    before, state = copy.deepcopy(components.networks.state_dict()), torch.get_rng_state()
    found = costs(components)
    assert list(found) == ["teacher", "student"]
    assert found["teacher"].step > found["student"].step > 0
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in components.networks.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert costs(components, (16, 16))["teacher"].forward > 3 * found["teacher"].forward


def test_the_plan_prints_operations_and_hours(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", "digits", "--dry-run", "--images-per-second", "10"])
    text = capsys.readouterr().out
    assert "12.6 MFLOP per image forward" in text
    assert "42.4 MFLOP per image forward and backward, 2.71 GFLOP per step" in text
    assert f"{570 * 64 / 10 / 60:.0f} minutes at 10 images/s" in text
    main(["train", "digits", "--dry-run", "--max-steps", "100", "--images-per-second", "0.5"])
    assert f"{100 * 64 / 0.5 / 3600:.1f} hours at 0.5 images/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# --- the device ----------------------------------------------------------------------------------

TRAIN = load_recipe("digits").train


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H200", "bf16", True, 989.5),
        ("NVIDIA H100 80GB HBM3", "fp16", True, 989.5),
        ("NVIDIA H100 PCIe", "bf16", True, 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA A100 80GB PCIe", "bf16", True, 312),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),  # no TF32 on this GPU
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),  # a part of a GPU
        ("NVIDIA A10G", "bf16", True, None),  # not an A10
        ("NVIDIA H100 NVL", "bf16", True, 835.5),
        ("NVIDIA H200 NVL", "fp32", True, 417.5),
        ("NVIDIA GH200 480GB", "bf16", True, 989.5),
        ("NVIDIA B200", "bf16", True, 2250),
        ("NVIDIA L40S", "bf16", True, 362),
        ("NVIDIA L40", "bf16", True, 181),
        ("NVIDIA L4", "fp16", True, 121),
        ("NVIDIA A10", "fp32", False, 31.2),
        ("Tesla T4", "fp16", True, 65),
        ("Tesla V100-PCIE-32GB", "fp16", True, 112),
        ("AMD Instinct MI300X", "bf16", True, 1307),
        ("Intel something", "bf16", True, None),
    ],
)
def test_peak_flops_depend_on_the_device_and_the_precision(name, precision, tf32, peak):
    train = dataclasses.replace(TRAIN, precision=precision, tf32=tf32)
    assert peak_of(name, train) == (None if peak is None else peak * 1e12)


def test_peaks_are_higher_at_lower_precision():
    for pattern, half, tf32, single in PEAKS:
        assert half > single, pattern
        assert tf32 is None or half > tf32 >= single, pattern


def test_flags_come_from_the_recipe_and_not_from_an_earlier_run():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = (torch.are_deterministic_algorithms_enabled(), matmul.allow_tf32, cudnn.allow_tf32,
            cudnn.benchmark, cudnn.deterministic)  # fmt: skip
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    try:
        for tf32 in (True, False):
            for deterministic in (True, False):
                train = dataclasses.replace(TRAIN, tf32=tf32, deterministic=deterministic)
                set_flags(gpu, train)
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
                assert torch.are_deterministic_algorithms_enabled() == deterministic
                assert (cudnn.benchmark, cudnn.deterministic) == (not deterministic, deterministic)
        set_flags(cpu, TRAIN)
        assert not cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(kept[0])
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = kept[1:]


def test_a_cpu_has_no_published_peak_and_the_memory_of_its_process():
    assert peak_flops(torch.device("cpu"), TRAIN) is None
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines()
              if line.startswith("VmHWM:")]  # fmt: skip
    in_mib = int(peak.split()[1]) / 1024  # the kernel gives kB
    assert peak_memory_mib(torch.device("cpu")) == pytest.approx(in_mib, rel=0.02)
