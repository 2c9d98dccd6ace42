"""Time calibration and accuracy of a validation set, compared with torchmetrics and netcal."""

import functools
import itertools
from collections.abc import Callable, Mapping

import torch
from harness import Case, Contender, MakeCase
from torch import Tensor

from bdkd.evaluation.calibration import BINS, Calibration

IMAGES, BATCH = 10_000, 500


def cases(quick: bool) -> list[MakeCase]:
    if quick:
        return [functools.partial(_case, 1000, 10)]
    return [functools.partial(_case, IMAGES, classes) for classes in (10, 100, 1000)]


def _case(images: int, classes: int) -> Case:
    rng = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (images,), generator=rng)
    logits = 1.5 * torch.randn(images, classes, generator=rng)
    logits[torch.arange(images), labels] += 4.0
    batches = list(zip(logits.split(BATCH), labels.split(BATCH), strict=True))
    exact = exact_ece(logits, labels)

    def ours(draws: int) -> Callable[[int], float]:
        def call(i: int) -> float:
            calibration = Calibration(classes)
            for x, y in batches:
                calibration.update(x, y)
            return calibration.compute(draws=draws).ece

        return call

    def in_torch(i: int) -> float:
        parts = [(x.softmax(-1).max(-1), y) for x, y in batches]
        confidence = torch.cat([p.values for p, _ in parts])
        correct = torch.cat([p.indices == y for p, y in parts]).float()
        edges = torch.linspace(0, 1, BINS + 1)
        ece = torch.zeros(())
        for low, high in itertools.pairwise(edges):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                gap = (correct[inside].mean() - confidence[inside].mean()).abs()
                ece += inside.float().mean() * gap
        return ece.item()

    def contender(name: str, call: Callable[[int], float], kind="peer", note="") -> Contender:
        return Contender(name, call, kind, note=note, error=lambda: _error(call, exact))

    everything = ("top-1, top-5, NLL, Brier, entropy, ECE, MCE, adaptive and class-wise ECE, "
                  "in float64")  # fmt: skip
    found = [
        contender("Calibration, draws=1", ours(1), "ours", everything),
        contender("Calibration", ours(1000), "ours",
                  everything + ", and the ECE of a calibrated network by chance (1000 draws)"),
        contender("a loop over bins, torch", in_torch, note="only ECE, float32"),
    ]  # fmt: skip
    absent: dict[str, str] = {}
    for add in (_torchmetrics, _netcal):
        try:
            found += [contender(*row) for row in add(batches, classes)]
        except ImportError as error:
            absent[add.__name__.strip("_")] = f"{error}"
    # netcal uses NumPy, and torch's allocator does not see the memory of NumPy.
    return Case(f"{images} images, {classes} classes", {"images": images, "classes": classes},
                tuple(found), absent=absent, memory=False)  # fmt: skip


def exact_ece(logits: Tensor, labels: Tensor) -> float:
    """Return the ECE by its definition, in float64, with bins (k/15, (k+1)/15]."""
    p = logits.double().softmax(-1)
    confidence, predicted = p.max(-1)
    gaps = (predicted == labels).double() - confidence
    bins = (confidence * BINS).ceil().long().clamp(1, BINS)
    return sum(gaps[bins == k].sum().abs().item() for k in range(1, BINS + 1)) / len(labels)


def _error(call: Callable[[int], float], exact: float) -> Mapping[str, float]:
    return {"ECE": abs(call(0) - exact)}


def _mend_torchvision() -> None:
    """Make torchvision importable with a torch that it was not built for, because torchmetrics
    imports it. Defining the schemas of the missing operators is enough; nothing calls them."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # torchmetrics does not require torchvision
    except RuntimeError:
        _SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


def _torchmetrics(batches: list[tuple[Tensor, Tensor]], classes: int):
    _mend_torchvision()
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    def metrics(i: int, with_accuracy: bool) -> float:
        ece = MulticlassCalibrationError(classes, n_bins=BINS, norm="l1", validate_args=False)
        others = []
        if with_accuracy:
            others = [
                MulticlassCalibrationError(classes, n_bins=BINS, norm="max", validate_args=False),
                *(MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False)
                  for k in (1, min(5, classes))),
            ]  # fmt: skip
        for x, y in batches:
            for metric in (ece, *others):
                metric.update(x, y)
        for metric in others:
            metric.compute()
        return ece.compute().item()

    return [
        ("torchmetrics", lambda i: metrics(i, True), "peer", "top-1, top-5, ECE and MCE"),
        ("torchmetrics, ECE", lambda i: metrics(i, False), "peer", "only ECE"),
    ]


def _netcal(batches: list[tuple[Tensor, Tensor]], classes: int):
    from netcal.metrics import ECE

    def ece(i: int) -> float:
        p = torch.cat([x.softmax(-1) for x, _ in batches]).numpy()
        return float(ECE(BINS).measure(p, torch.cat([y for _, y in batches]).numpy()))

    return [("netcal", ece, "peer", "only ECE, of all probabilities at once")]
